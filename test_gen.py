from test_head import *

import shutil

import generate
import tokenizer
from generate import Sampling
from test_fmt import save_gguf, save_meta

PROSE = ("It is a truth universally acknowledged, that a single man in possession of 1000 pounds\n"
         "    must be in want of a wife.  Don't you think so?\n\nÇa va: 42!\n")


@pytest.fixture(scope="module")
def words():
    """A small SentencePiece model."""
    return tokenizer.train_sentencepiece([PROSE * 5, "x = 12\n        y = 345\n" * 20], 400)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, words):
    """A small checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    save_meta(folder, random_model(replace(SMALL, dim=64, vocab_size=400, max_seq_len=128)))
    words.save(folder / "tokenizer.model")
    return folder


@pytest.fixture
def reads(monkeypatch):
    """Notes what models read, call by call: (after how many tokens, ids, what comes out)."""
    hidden, calls = Llama.hidden, []

    def noted(model, ids, cache=None, *more):
        at = cache and cache.lengths[0]
        h = hidden(model, ids, cache, *more)
        calls.append((at, ids.tolist(), h))
        return h
    monkeypatch.setattr(Llama, "hidden", noted)
    return calls


def ids_of(steps, row=0):
    """The new tokens of one row, from what generate yields."""
    return [token for step in steps for found, token, _ in step if found == row]


class TestProducts:
    """Of every layout of W; of the quantised ones, whose W is another, by what eye shows of it."""
    W = noise(48, 64) * torch.linspace(0.1, 3, 48)[:, None]

    @staticmethod
    def check(w, dtype, far, n_bytes, *options):
        product, (n, k) = generate.product(w, dtype, *options), w.shape
        shown = product(torch.eye(k, dtype=dtype)).T.double()
        for shape in ((1, k), (1, 1, k), (2, 3, k), (20, k)):
            x = noise(*shape, seed=1, dtype=dtype)
            wanted, found = x.double() @ shown.T, product(x)
            assert found.dtype == dtype and (found - wanted).norm() < far * wanted.norm()
        assert sum(tensor.nbytes for tensor in product.buffers()) == n_bytes
        return next(product.buffers()), (shown - w).abs()

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("dtype, far", [
        (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)])
    def test_equation(self, compiled, dtype, far, monkeypatch):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
        size = 48 * 64 * dtype.itemsize
        stored, wrong = self.check(self.W, dtype, far, size, None, compiled)
        assert torch.all(wrong <= far * self.W.abs())
        assert stored.is_mkldnn == (
            torch.backends.mkldnn.is_available() and not compiled and dtype != torch.float16
            and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("kind, size", [("int8", 66), ("int4", 40)])
    def test_quantised(self, dtype, kind, size):
        """No weight is further from its own than half a step, and bf16's rounding."""
        w = torch.cat((self.W, self.W + 9, torch.zeros(16, 64)))
        largest = w.abs().amax(1)[:, None, None]
        low, high = w.view(112, 2, 32).aminmax(dim=-1, keepdim=True)
        step = {"int8": largest / 127, "int4": (high - low) / 15}[kind]
        _, wrong = self.check(w, dtype, 2**-7, 112 * size, kind)
        assert torch.all(wrong.view(112, 2, 32) <= step / 2 + largest / 200)

    def test_int8_where_int4_does_not_fit(self):
        for shape, kind, size in (((48, 64), torch.uint8, 40), ((40, 64), torch.int8, 66),
                                  ((48, 50), torch.int8, 52)):
            stored, _ = self.check(noise(*shape), torch.bfloat16, 2**-7, shape[0] * size, "int4")
            assert stored.dtype == kind

    def test_on_other_devices(self):
        """The branches without kernels of the CPU, by tensors that say to be elsewhere."""
        class Elsewhere(torch.Tensor):
            device = torch.device("cuda")
        x, w = noise(2, 3, 64), self.W.as_subclass(Elsewhere)
        for kind in (None, "int8", "int4"):
            there = generate.product(w, torch.float32, kind)
            assert next(there.buffers()).dtype == {None: torch.float32}.get(kind, torch.int8)
            found = there(x.as_subclass(Elsewhere)).as_subclass(torch.Tensor)
            torch.testing.assert_close(found, x @ self.W.T, rtol=0.02, atol=0.4)


class TestOpenModel:
    @pytest.mark.parametrize("tied", [False, True])
    def test_logits_and_scores_in_every_format(self, tmp_path, tied):
        config = replace(SMALL, dim=64, hidden_dim=96, vocab_size=112, tie_embeddings=tied)
        save_meta(tmp_path, random_model(config))
        x, model = tokens(1, 40), generate.load(tmp_path)
        nll = generate.token_nll(model, x[0].tolist()).mean().item()
        for dtype, quantize, far in (
                ("auto", None, 1e-5), ("bf16", None, 0.03), ("fp16", None, 0.005),
                ("auto", "int8", 0.05), ("fp32", "int8", 0.04), ("auto", "int4", 0.4)):
            found = generate.open_model(tmp_path, generate.DTYPES[dtype], quantize)
            with torch.no_grad():
                wanted = model(x)
                assert (found(x) - wanted).norm() < far * wanted.norm(), (dtype, quantize)
            bits = generate.token_nll(found, x[0].tolist()).mean().item()
            assert bits == pytest.approx(nll, rel=far / 10 + 1e-6), (dtype, quantize)

    def test_half_precision_on_a_cpu(self, tiny):
        """Its cache is in fp32, and so must be the query that reads it."""
        half, texts = generate.open_model(tiny, torch.float16), []
        for model in (half, generate.load(tiny)):
            steps = list(generate.generate(model, [[1, 50, 60], [1]], 12, Sampling(0.0)))
            texts.append([ids_of(steps, 0), ids_of(steps, 1)])
        assert texts[0] == texts[1]
        assert generate.new_cache(half, 1, 4).held[0][0].dtype == torch.float32

    def test_no_compiler_is_needed(self, monkeypatch):
        """nanoGPT#28, gpt-fast#68."""
        monkeypatch.setattr(torch, "compile", lambda f: lambda x: [].pop())
        with pytest.raises(ValueError, match="compiled here .pop.*; try without --compile"):
            generate.check_compiler()

    @pytest.mark.parametrize("layers, dtype, quantize, prompt", [
        (4, None, None, [1, 2]), (18, None, "int8", [1, 2]), (3, torch.float16, None, [1])])
    def test_compiled_once_for_groups_of_layers(self, tmp_path, monkeypatch, layers, dtype,
                                                quantize, prompt):
        from torch._dynamo.testing import CompileCounter
        torch._dynamo.reset()
        config = replace(SMALL, n_layers=layers, dim=64, hidden_dim=96)
        save_meta(tmp_path, random_model(config))
        run = partial(generate.generate, prompts=[prompt], max_new_tokens=30,
                      sampling=Sampling(0.0))
        wanted = ids_of(run(generate.open_model(tmp_path, dtype, quantize)))
        counted, groups, real = CompileCounter(), [], torch.compile

        def compiled(run, **options):
            compiled = real(run, fullgraph=True, backend=counted)
            return lambda *args: groups.append(len(args[0])) or compiled(*args)
        monkeypatch.setattr(torch, "compile", compiled)
        monkeypatch.setattr(generate, "check_compiler", lambda: None)
        model = generate.open_model(tmp_path, dtype, quantize, compiled=True)
        assert ids_of(run(model)) == wanted and counted.frame_count == 1
        assert groups == {4: [4], 18: [9, 9], 3: [3]}[layers] * 29


class TestSampling:
    def test_temperature(self):
        logits = noise(3, 50) * 3
        close(Sampling(1.0, 0, 1.0).probabilities(logits), logits.softmax(-1))
        close(Sampling(0.5, 0, 1.0).probabilities(logits), (logits * 2).softmax(-1))
        close(Sampling(1e-45).probabilities(logits), Sampling(0.0).probabilities(logits))
        greedy = Sampling(0.0).probabilities(logits)
        assert torch.equal(greedy.argmax(-1), logits.argmax(-1)) and torch.all(greedy.sum(-1) == 1)

    @pytest.mark.parametrize("k, p", [(1, 1.0), (7, 1.0), (0, 1.0), (0, 0.9), (0, 0.3), (0, 1e-6),
                                      (5, 0.5), (99, 1.0)])
    def test_cuts_of_transformers(self, k, p):
        from transformers import TopKLogitsWarper, TopPLogitsWarper
        for logits in (noise(20, 50) * 3, noise(9, 600) * 3, noise(9, 600) * 0.1):  # 256, or all
            wanted = logits
            if k:
                wanted = TopKLogitsWarper(k)(None, wanted)
            if p < 1:
                wanted = TopPLogitsWarper(p)(None, wanted)
            close(Sampling(1.0, k, p).probabilities(logits), wanted.softmax(-1))

    @pytest.mark.parametrize("sampling", [Sampling(1.0, 0, 1.0), Sampling(0.7, 5, 0.9)])
    def test_draws_the_distribution(self, sampling):
        logits = noise(1, 7) * 2
        drawn = sampling.draw(logits.expand(20000, 7), [sampling.generator(0)] * 20000)
        share = torch.bincount(torch.tensor([token for token, _ in drawn]), minlength=7) / 20000
        p, plain = sampling.probabilities(logits)[0], logits[0].log_softmax(-1)
        assert (share - p).abs().sum() < 0.02 and torch.all(share[p == 0] == 0)
        assert all(x == pytest.approx(plain[token].item()) for token, x in drawn[:20])

    def test_the_largest_random_number_draws_a_token(self):
        class Largest:
            def random(self):
                return 1 - 2**-53  # in fp32 it is 1
        for seed in range(50):
            logits, sampling = noise(4, 300, seed=seed) * 2, Sampling(1.0)
            ids = [token for token, _ in sampling.draw(logits, [Largest()] * 4)]
            assert torch.all(sampling.probabilities(logits)[range(4), ids] > 0)

    def test_no_two_seeds_are_one(self):
        """torch's generator gave the same numbers for 0, 4096 and 28672."""
        seeds = [*range(100), *range(4096, 40960, 4096), 2**20, 2**32, 2**64, -1]
        draws = {Sampling(seed=seed).generator(number).random() for seed in seeds
                 for number in (0, 1, 4096)}
        assert len(draws) == 3 * len(set(seeds))
        assert Sampling(seed=7).generator(2).random() == Sampling(seed=7).generator(2).random()

    def test_bad_settings(self):
        for bad in ({"temperature": -1.0}, {"temperature": math.nan}, {"top_k": -1},
                    {"top_p": 0.0}, {"top_p": 1.5}):
            with pytest.raises(ValueError, match="try"):
                Sampling(**bad)


class TestGenerate:
    PROMPTS = [[1, 5, 9, 13, 60], [1], [1, 7, 7]]

    def test_greedy_is_the_argmax_of_the_whole_text(self):
        model, ids = random_model(SMALL).eval(), [1, 5, 9]
        for (_, token, logprob), in generate.generate(model, [ids], 12, Sampling(0.0)):
            wanted, best = model(torch.tensor([ids]))[0, -1].log_softmax(-1).max(-1)
            assert token == best and logprob == pytest.approx(wanted.item(), abs=1e-4)
            ids = ids + [token]
        assert len(ids) == 15

    @pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0, 20, 0.95, seed=3)])
    def test_a_batch_is_each_alone(self, sampling):
        model = random_model(SMALL).eval()
        together = list(generate.generate(model, self.PROMPTS, 20, sampling))
        for row, prompt in enumerate(self.PROMPTS):
            alone = list(generate.generate(model, [prompt], 20, sampling))
            assert ids_of(together, row) == ids_of(alone)

    def test_seed_and_number_make_the_sample(self):
        model = random_model(SMALL).eval()

        def draw(seed, numbers):
            steps = list(generate.generate(model, [[1]] * len(numbers), 20,
                                           Sampling(1.0, seed=seed), numbers=numbers))
            return [ids_of(steps, row) for row in range(len(numbers))]
        one, two = draw(0, [0, 1])
        assert one != two and draw(0, [1])[0] == two and draw(1, [0])[0] not in (one, two)

    def test_ends_with_a_stop_id_or_the_context(self):
        model = random_model(SMALL).eval()
        free = ids_of(generate.generate(model, [[1]], 20, Sampling(0.0)))
        stop = frozenset([free[3]])
        steps = list(generate.generate(model, [[1], [1, 2]], 20, Sampling(0.0), stop))
        assert ids_of(steps) == free[:free.index(free[3]) + 1]
        room = list(generate.generate(model, [[1] * 60, [1]], 100, Sampling(0.0)))
        assert len(ids_of(room)) == 4 and len(ids_of(room, 1)) == 63
        with pytest.raises(ValueError, match="no room in the context of 64"):
            next(generate.generate(model, [[1] * 64], 1, Sampling()))
        with pytest.raises(ValueError, match="no token; try one with BOS"):
            next(generate.generate(model, [[1], []], 1, Sampling()))

    def test_equal_prompts_are_read_once(self, reads):
        model, prompts = random_model(SMALL).eval(), [[1, 5, 9], [7, 3], [1, 5, 9], [1, 5, 9]]
        run = partial(generate.generate, model, max_new_tokens=9, sampling=Sampling(1.0))
        together = list(run(prompts, numbers=[0, 0, 1, 2]))
        assert reads[0][1] == [[1, 5, 9], [7, 3, 0]]
        assert {torch.tensor(ids).shape for _, ids, _ in reads[1:]} == {(4, 1)} and len(reads) == 9
        for row, number in enumerate([0, 0, 1, 2]):
            assert ids_of(together, row) == ids_of(run([prompts[row]], numbers=[number]))

    def test_a_cache_goes_on_where_it_ends(self):
        model, cache = random_model(SMALL).eval(), KVCache(SMALL, 1, 64)
        run = partial(generate.generate, model, sampling=Sampling(0.0))
        whole = ids_of(run([[1, 2, 3, 4, 1, 2]], 99))
        next(run([[1, 2, 3]], 1, cache=cache))
        assert ids_of(run([[1, 2, 3, 4, 1, 2]], 99, cache=cache)) == whole
        assert len(whole) == 58

    def test_scores_that_are_not_finite_are_said(self):
        model = random_model(SMALL)
        model.norm.weight.data[0] = math.nan
        with pytest.raises(ValueError, match="not finite"):
            next(generate.generate(model, [[1]], 1, Sampling()))


class TestSample:
    @staticmethod
    def push(words, data, stops=(), last="length"):
        """The sample, and what it shows after each byte (whose token is 3 more) and at the end."""
        sample, shown = generate.Sample(words, "x", list(stops)), []
        for byte in data:
            if not sample.finish_reason:
                shown.append(sample.push(byte + 3, -1.0))
        if last == "stop":
            shown.append(sample.push(2, -1.0))
        elif not sample.finish_reason:
            shown.append(sample.end("length"))
        return sample, shown

    def test_streams_and_ends(self, words):
        sample, shown = self.push(words, b"abc")
        assert shown == ["a", "b", "c", ""] and json.loads(sample.json()) == {
            "prompt": "x", "ids": [100, 101, 102], "text": "abc", "logprobs": [-1.0] * 3,
            "finish_reason": "length"}
        sample, shown = self.push(words, b"ab", last="stop")
        assert (sample.text, sample.finish_reason, sample.ids) == ("ab", "stop", [100, 101])
        assert self.push(words, "é".encode()[:1])[1] == ["", "\ufffd"]

    def test_stop_texts_never_show(self, words):
        sample, shown = self.push(words, b"abEaENDc", ["END", "zzz"])
        assert "".join(shown) == sample.text == "abEa" and sample.finish_reason == "stop"
        assert shown[2] == "" and shown[3] == "Ea"  # E may begin a stop text until a follows
        assert "".join(self.push(words, b"abEN", ["END"])[1]) == "abEN"
        assert self.push(words, b"abcd", ["bc", "abc"])[0].text == ""  # the earliest one counts


class TestScore:
    @pytest.mark.parametrize("n", [2, 3, 61, 65, 66, 96, 97, 98, 129, 200, 201])
    def test_windows_overlap_by_half(self, n, monkeypatch):
        monkeypatch.setattr(generate, "logit_rows", lambda V, D: 7)
        model, ids = random_model(SMALL).eval(), tokens(n, seed=n).tolist()
        found = generate.token_nll(model, ids)
        assert len(found) == n - 1
        for i in range(n - 1):  # token i + 1: window of 64 that begins at a multiple of 32
            start = max(0, -(-(i + 1 - 64) // 32)) * 32
            logits = model(torch.tensor([ids[start:i + 1]]))[0, -1].log_softmax(-1)
            assert found[i].item() == pytest.approx(-logits[ids[i + 1]].item(), abs=1e-4)

    def test_figures(self):
        row = generate.figures(4, 4 * math.log(2), 2)
        assert row["perplexity"] == pytest.approx(2) and row["bits_per_byte"] == pytest.approx(2)


LLAMA3_CHAT = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant"
    "<|end_header_id|>\n\n' }}{% endif %}")
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}")
LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set "
    "system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set "
    "system_message = false %}{% endif %}{% for message in loop_messages %}{% if loop.index0 == 0 "
    "and system_message != false %}{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n'"
    " + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if "
    "message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif "
    "message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}")


@pytest.fixture
def chat_tokenizer(words, tmp_path):
    """A function of (kind, chat template): (ours, the same as transformers reads it)."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    def make(kind, template):
        begins, ends = {"llama2": ("<s>", "</s>"), "chatml": ("<|im_start|>", "<|im_end|>"),
                        "llama3": ("<|begin_of_text|>", "<|eot_id|>")}[kind]
        if kind == "llama2":
            theirs = tokenizers.Tokenizer.from_str(
                tokenizer.huggingface_files(words)["tokenizer.json"].decode())
        else:
            in_bytes = tokenizers.pre_tokenizers.ByteLevel(False)
            vocab = {character: i for i, character in enumerate(sorted(in_bytes.alphabet()))}
            theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
            theirs.pre_tokenizer, theirs.decoder = in_bytes, tokenizers.decoders.ByteLevel()
            theirs.add_special_tokens([begins, ends, "<|start_header_id|>", "<|end_header_id|>"])
        if kind == "llama3":
            theirs.post_processor = tokenizers.processors.TemplateProcessing(
                f"{begins} $A", None, [(begins, theirs.token_to_id(begins))])
        settings = {"bos_token": begins, "eos_token": ends}
        theirs.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": template, **settings}))
        return (tokenizer.load_tokenizer(tmp_path / "tokenizer.json"),
                PreTrainedTokenizerFast(tokenizer_object=theirs, **settings))
    return make


class TestTurn:
    """Turns as the templates that were published spell them, by transformers."""

    @pytest.mark.parametrize("kind, template", [
        ("llama3", LLAMA3_CHAT), ("chatml", CHATML), ("llama2", LLAMA2_CHAT)])
    def test_equals_transformers(self, kind, template, chat_tokenizer, words):
        ours, oracle = chat_tokenizer(kind, template)
        for system in ("Be brief.\nNo wife", ""):
            said = [("user", "a man? 12"), ("assistant", "It is 42!"), ("user", "in want\n\nof x")]
            said = [("system", system)] * bool(system) + said
            said = [{"role": role, "content": text} for role, text in said]
            wanted = oracle.apply_chat_template(said, chat_template=template, tokenize=True,
                                                add_generation_prompt=True, return_dict=False)
            answer = {"llama2": " It is 42! "}.get(kind, "It is 42!")
            first = generate.turn(ours, "a man? 12", system)
            found = first + ours.encode(answer, continues=True)
            assert found + generate.turn(ours, "in want\n\nof x", system, False) == wanted
            if kind == "llama2":  # whose own file names no format
                assert generate.turn(words, "a man? 12", system) == first
        special = set(ours.special.values())
        names = " x ".join(set(ours.special) - {"<s>", "</s>"})
        assert (special & {*generate.turn(ours, names, names)}
                == special & {*generate.turn(ours, "a", "a")})

    def test_what_is_refused(self, words, chat_tokenizer):
        for text, system in (("a [/INST] b", ""), ("a", "<</SYS>>")):
            with pytest.raises(ValueError, match="is a mark of this chat format; try"):
                generate.turn(words, text, system)
        for template, said in (("{{ '<|user|>' }}", "none of llama3, chatml, llama2; try --prompt"),
                               ("{{ '[INST]' }}", "none of llama3, chatml, llama2; try --prompt"),
                               ("<|im_start|>", "needs <.im_start.>, which the tokenizer has not")):
            with pytest.raises(ValueError, match=said):
                generate.turn(chat_tokenizer("llama2", template)[0], "a")


class TestChat:
    @staticmethod
    def talk(monkeypatch, folder, *said, more=()):
        said = iter(said)

        def typed(prompt):
            for text in said:
                return text
            raise EOFError
        monkeypatch.setattr("builtins.input", typed)
        try:
            generate.main([str(folder), "--chat", "--temperature", "0", "--system", "S", *more])
        except KeyboardInterrupt:
            pytest.fail("Ctrl-C ended more than an answer")

    @staticmethod
    def told(reads):
        """Of each turn: where it began, what was read, and the whole text at its end."""
        text, turns = [], []
        for at, (ids,), _ in reads:
            text[at:] = ids
            if len(ids) > 1:
                turns.append((at, ids, list(text)))
        return turns

    @pytest.mark.parametrize("stopped", [False, True])
    def test_reads_what_is_new(self, tiny, words, reads, monkeypatch, capsys, stopped):
        """And Ctrl-C ends an answer, not the conversation."""
        noted = Llama.hidden

        def interrupted(model, *args):
            h = noted(model, *args)
            if stopped and len(reads) == 4:
                raise KeyboardInterrupt
            return h
        monkeypatch.setattr(Llama, "hidden", interrupted)
        self.talk(monkeypatch, tiny, "a man", "", "of x", more=["--max-new-tokens", "6"])
        out, err = capsys.readouterr()
        assert err.startswith("a conversation in the format llama2; Ctrl-C") and "error" not in err
        assert (" [stopped]" in out) == stopped
        one, two, three = self.told(reads)
        first = generate.turn(words, "a man", "S")
        second = generate.turn(words, "", "S", False)
        assert one == (0, first, first) and two[1][-len(second):] == second
        answer = two[2][len(first):-len(second)]
        assert len(answer) == 6 - 3 * stopped and len(two[1]) <= 1 + len(second)
        assert out[:2] == words.decode(words.encode("x") + answer)[1:3]
        model = generate.load(tiny)
        for at, ids, text in (two, three):
            h, = (h for start, (some,), h in reads if (start, some) == (at, ids))
            close(h[0, -1], model.hidden(torch.tensor([text]))[0, -1], atol=1e-4)

    def test_a_full_context_begins_anew(self, tiny, words, reads, monkeypatch, capsys):
        self.talk(monkeypatch, tiny, "a man", "of x " * 9, "x " * 200, "[INST]",
                  more=["--max-new-tokens", "999"])
        err = capsys.readouterr().err
        assert re.findall("error: (a text of|.INST. is)", err) == ["a text of", "[INST] is"]
        assert "the context of 128 tokens is full: it begins anew" in err
        ids = [generate.turn(words, text, "S") for text in ("a man", "of x " * 9)]
        assert [turn[:2] for turn in self.told(reads)] == [(0, ids[0]), (0, ids[1])]


class TestEnds:
    """alpaca-lora#325, TinyLlama#55, vllm#4180 (Llama 3 has two): output that never ends."""

    def test_every_stop_of_the_family(self, chat_tokenizer, words):
        for ours in (words, chat_tokenizer("llama3", "")[0], chat_tokenizer("chatml", "")[0]):
            model = random_model(replace(SMALL, vocab_size=ours.vocab_size))
            assert ours.eos_id in ours.stop_ids
            for stop in ours.stop_ids:
                script = iter(F.one_hot(torch.tensor([40, 41, stop]), ours.vocab_size) * 9.0)
                model.logits = lambda h: next(script)[None, None]
                sample, = generate.sample_texts(model, ours, ["a"], 20, Sampling(0.0))
                assert (sample.ids, sample.finish_reason) == ([40, 41], "stop")

    def test_those_of_generation_config(self, tiny, tmp_path):
        shutil.copy(tiny / "tokenizer.model", tmp_path)
        for text, more in (('{"eos_token_id": [2, 35]}', {35}), ('{"eos_token_id": 7}', {7}),
                           ("{}", set()), ('{"eos_token_id": null}', set()), ("[", set())):
            (tmp_path / "generation_config.json").write_text(text)
            assert generate.tokenizer_beside(tmp_path, 400).stop_ids == {2} | more

    def test_a_padded_vocabulary_is_named(self, tiny):
        """Chinese-LLaMA#87, llama2.c#263, build-nanogpt#95: gibberish by another vocabulary."""
        with pytest.raises(ValueError, match="400 tokens and the model 448: .* padded; try"):
            generate.tokenizer_beside(tiny, 448)


class TestGenerateCommand:
    def test_one_text_and_many(self, tiny, words, capsys):
        options = [str(tiny), "--prompt", "a man", "--max-new-tokens", "5"]
        generate.main([*options, "--json"])
        row = json.loads(capsys.readouterr().out)
        text = "a man" + row["text"]
        generate.main(options)
        assert capsys.readouterr().out == text + "\n" and len(row["ids"]) == 5
        generate.main([*options, "--num-samples", "2"])
        assert capsys.readouterr().out.startswith(f"--- 1 of 2\n{text}\n--- 2 of 2\na man")
        generate.main([str(tiny), "--prompt", "", "--stop", "the", "--json"])
        assert "the" not in json.loads(capsys.readouterr().out)["text"]
        for bad in (["--stop", ""], ["--chat", "--bench", "4"], ["--bench", "65"]):
            with pytest.raises(ValueError, match="; try"):
                generate.main([str(tiny), *bad])

    def test_bench(self, tiny, capsys):
        generate.main([str(tiny), "--bench", "4", "--quantize", "int8"])
        row = json.loads(capsys.readouterr().out)
        assert list(row) == ["prefill_tokens_per_s", "decode_tokens_per_s", "weight_gb",
                             "bandwidth_gb_s", "bandwidth_fraction", "load_s", "first_token_s",
                             "dtype", "quantize"]
        matrices = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 100 * 64) + 400 * 64
        scales = 3 * (2 * 64 + 2 * 32 + 2 * 100 + 64) + 400
        assert row["weight_gb"] * 1e9 == matrices + 2 * (scales + 7 * 64 + 400 * 64)
        assert row["dtype"] == "bfloat16" and row["decode_tokens_per_s"] > 0

    def test_score_says_ids_and_windows(self, tiny, words, tmp_path, capsys):
        lines = [json.dumps({"text": text}) for text in (PROSE * 3, "in want of a wife")]
        (tmp_path / "t.jsonl").write_text("\n".join(lines))
        options = [str(tiny), "--score", str(tmp_path / "t.jsonl")]
        generate.main([*options, "--json"])
        long, short, total = map(json.loads, capsys.readouterr().out.splitlines())
        assert [(row["window"], row["stride"]) for row in (long, short)] == [(128, 64), (128, 0)]
        ids = words.encode("in want of a wife", bos=True)
        scores = generate.load(tiny)(torch.tensor([ids]))[0].log_softmax(-1)
        close(torch.tensor(short["logprobs"]), scores[range(len(ids) - 1), ids[1:]])
        for row, text in ((long, PROSE * 3), (short, "in want of a wife")):
            assert row["ids"] == words.encode(text)
            assert row["nll"] == pytest.approx(-sum(row["logprobs"]), rel=1e-4)
        assert total["tokens"] == len(long["ids"] + short["ids"]) and "ids" not in total
        generate.main(options)
        said = capsys.readouterr().out.splitlines()
        assert [", in windows of 128 tokens, 64 apart" in line for line in said] == [1, 0, 0]
        with pytest.raises(ValueError, match="holds no text; try"):
            (tmp_path / "empty.txt").write_text("")
            generate.main([str(tiny), "--score", str(tmp_path / "empty.txt")])

    @pytest.mark.parametrize("format", generate.EXPORTS)
    def test_export(self, tiny, words, tmp_path, capsys, format):
        out, options = tmp_path / "out" / "model", ["--prompt", "a man", "--temperature", "0"]
        out.parent.mkdir()
        generate.main([str(tiny), "--export", format, str(out)])
        with pytest.raises(ValueError, match="exists already"):
            generate.main([str(tiny), "--export", format, str(out)])
        if format == "meta":
            assert (out / "tokenizer.model").read_bytes() == words.data
        for path in (tiny, out):
            generate.main([str(path), *options, "--max-new-tokens", "9"])
        said = capsys.readouterr().out
        assert said[:len(said) // 2] == said[len(said) // 2:] and "a man" in said
        if format == "hf":
            from transformers import AutoTokenizer, LlamaForCausalLM
            theirs = AutoTokenizer.from_pretrained(out)
            assert theirs.encode(PROSE) == words.encode(PROSE, bos=True)
            assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")
            model, x = LlamaForCausalLM.from_pretrained(out), tokens(1, 40, vocab=400)
            close(model(x).logits, generate.load(tiny)(x), atol=1e-4)
            ends = model.generation_config
            assert (ends.bos_token_id, ends.eos_token_id) == (1, [2])

    def test_gguf_with_its_vocabulary(self, tiny, words, tmp_path, capsys):
        pytest.importorskip("gguf")
        names = [words.processor.id_to_piece(i) for i in range(400)]

        def vocabulary(w):
            w.kv_data[0].pop("tokenizer.ggml.tokens")
            w.kv_data[0].pop("tokenizer.ggml.scores")
            w.add_token_list(names)
            w.add_token_scores([words.processor.get_score(i) for i in range(400)])
            w.add_token_types([2, 3, 3] + [6] * 256 + [1] * 141)
            w.add_bos_token_id(1)
            w.add_eos_token_id(2)
        file, _ = save_gguf(tmp_path / "m", generate.load(tiny), extra=vocabulary)
        for path in (tiny, file):
            generate.main([str(path), "--prompt", "a man", "--temperature", "0", "--json"])
        ours, theirs = capsys.readouterr().out.splitlines()
        assert ours == theirs and len(json.loads(ours)["ids"]) > 20
