from test_head import *

import base64
import hashlib
import io
import random
import struct
import unicodedata
import threading
import time
import functools
import shutil
import pickle
import contextlib
import textwrap
import tracemalloc

import regex
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import generate_merges

import generate
import tokenizer

PAT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"  # Llama 3's
       r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
NOVEL = ("It is a truth universally acknowledged, that a single man in possession of 1000 pounds\n"
         "    must be in want of a wife.  Don't you think so?\n\nНо это другое дело. Ça va: 42!\n")
FIXED = [
    "", " ", "\n", "  a  ", "In 2023: 1234567 llamas\n\n\n  x", NOVEL, "'s", "'rE", "\r", "日本語",
    "it's IT'S we'LLx I'Sx 'ſx don'Tx", "tab\tand\x1c\x1d\x85\xa0\u2028end", "a\r\n\r\nb \r\n c",
    "def f(x):\n    return x  # 10%\n", "👩\u200d👩\u200d👧 🦙", "٣٤٥٦ ⅷ½ 二〇 𝟙𝟚𝟛𝟜", "a\0b",
    "!" * 50 + "\n\n x", "<|eot_id|> <s> <0x0A> <unk>", "Ünï e\u0301 ß ǅ ﬁ ½ Å x𐐀𐐁1"]
CHARACTERS = st.characters(exclude_categories=("Cs", "Cn"))
TEXTS = st.lists(st.one_of(CHARACTERS, st.sampled_from(FIXED), st.text(CHARACTERS, max_size=8)),
                 max_size=12).map("".join)
BYTES = [bytes([i]) for i in range(256)]
NEEDED = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
LLAMA2, LLAMA3, TOK512 = (pytest.param(SHARED / "data" / name, marks=NEEDED) for name in (
    "tokenizers/llama2/tokenizer.model", "tokenizers/llama3/tokenizer.model",
    "stories260K/tok512.bin"))


def for_texts(check):
    for text in FIXED:
        check(text)
    seeded = settings(derandomize=True, deadline=None, max_examples=120, database=None)
    seeded(given(TEXTS)(lambda text: check(text)))()


def byte_pair(ranked):
    lines = (b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(ranked))
    return tokenizer.BytePair(b"".join(lines))


@functools.cache
def trained():
    """A small SentencePiece model."""
    lines = "x = 12\n        y = 345\n"
    return tokenizer.train_sentencepiece([NOVEL * 5, lines * 20], 420)


@functools.cache
def llama2c():
    """The same as llama2.c's export writes it."""
    model = trained().processor
    texts = [model.id_to_piece(i).replace("▁", " ").encode() for i in range(420)]
    return struct.pack("<I", 48) + b"".join(
        struct.pack("<fI", model.get_score(i), len(text)) + text for i, text in enumerate(texts))


@functools.cache
def ranked():
    """A small BytePair, whose ranks overlap as learned ones do."""
    draw, corpus = random.Random(0), "".join(FIXED).encode()
    return byte_pair(dict.fromkeys([*draw.sample(BYTES, 256), *(
        corpus[i:i + n] for n in range(2, 9) for i in draw.sample(range(len(corpus) - 8), 120))]))


def over_characters(model, normalizer=None, split=None):
    """Hugging Face's tokenizer of a SentencePiece model, as transformers converts LLaMA's."""
    names = [model.id_to_piece(i) for i in range(len(model))]
    vocab = {name: i for i, name in enumerate(names)}
    merges = generate_merges(vocab, {name: model.get_score(i) for name, i in vocab.items()})
    theirs = tokenizers.Tokenizer(models.BPE(
        vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer:
        theirs.normalizer = normalizer
    else:
        theirs.pre_tokenizer = split
    theirs.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        *[decoders.Strip(" ", 1, 0)] * ("prepend" in str(normalizer or split).lower())])
    theirs.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    theirs.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in names[:3]])
    theirs.add_special_tokens(["<|im_end|>", "<|im_end|>x"])
    return theirs


def over_words(theirs):
    """The same, with a token that goes over the end of a word."""
    file = json.loads(theirs.to_str())
    file["model"]["vocab"]["n▁"] = 420
    for token in file["added_tokens"][3:]:
        token["id"] += 1
    file["model"]["merges"].insert(0, ["n", "▁"])
    return tokenizers.Tokenizer.from_str(json.dumps(file))


def over_bytes(split, whole=False, alphabet=()):
    """A BPE over bytes, trained by Hugging Face's library, with one token that no merge makes."""
    theirs = tokenizers.Tokenizer(models.BPE(ignore_merges=whole))
    theirs.pre_tokenizer, theirs.decoder = split, decoders.ByteLevel()
    theirs.train_from_iterator([NOVEL] * 9, trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=list(alphabet), min_frequency=2,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"] * (not whole)))
    file = json.loads(theirs.to_str())
    file["model"]["vocab"]["Ġwifes"] = len(file["model"]["vocab"])
    theirs = tokenizers.Tokenizer.from_str(json.dumps(file))
    if whole:
        theirs.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
        template = processors.TemplateProcessing(
            "<|begin_of_text|> $A", None, [("<|begin_of_text|>", len(file["model"]["vocab"]))])
        theirs.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return theirs


METASPACE = functools.partial(pre_tokenizers.Metaspace, "▁", split=False)
IN_BYTES = functools.partial(pre_tokenizers.ByteLevel, False)
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
HUGGING_FACE = {
    "legacy": lambda: over_characters(trained().processor, PREPEND),
    "replace": lambda: over_characters(trained().processor, normalizers.Replace(" ", "▁")),
    "first": lambda: over_characters(trained().processor, split=METASPACE(prepend_scheme="first")),
    "always": lambda: over_characters(trained().processor, split=METASPACE()),
    "never": lambda: over_characters(trained().processor, split=METASPACE(prepend_scheme="never")),
    "words": lambda: over_words(HUGGING_FACE["always"]()),
    "smollm": lambda: over_bytes(pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), IN_BYTES()])),
    "llama-bpe": lambda: over_bytes(pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(PAT), "isolated"), IN_BYTES(use_regex=False)]),
        True, IN_BYTES.func.alphabet()),
    "gpt-2": lambda: over_bytes(IN_BYTES(), False, IN_BYTES.func.alphabet())}


def many(n):
    """A BytePair of 512 + n tokens."""
    return byte_pair(BYTES + [b"%d!" % i for i in range(n)])


class TestSentencePiece:
    @pytest.mark.parametrize("file", [None, LLAMA2])
    def test_equals_sentencepiece(self, file):
        ours = tokenizer.load_tokenizer(file) if file else trained()
        theirs = sentencepiece.SentencePieceProcessor(model_proto=ours.data)
        def check(text):
            ids, plain = theirs.encode(text), text.replace("▁", " ")
            assert ours.encode(text, bos=True) + ours.encode(text, eos=True) == [1, *ids, *ids, 2]
            assert ours.decode(ids) == theirs.decode(ids) == plain
            for inside in (False, True):
                ids = [1, *ours.encode(text, continues=inside), 2]
                shown = b"".join(map(ours.token_bytes, ids)).decode()
                assert shown == " " * (not inside and text > "") + plain
        for_texts(check)
        assert ours.vocab_size == len(theirs) and ours.stop_ids == {2} and ours.adds_bos
        assert ours.special == {"<s>": 1, "</s>": 2} and ours.chat_template is None
        ids = [5, 1, *theirs.encode("a"), 2, *theirs.encode(" <s>")]
        assert [5, *ours.encode("<s>a</s> <s>", continues=True, allowed_special=["<s>", "</s>"])
                ][:4] == ids[:4] and 1 not in ours.encode("<s>a")
        assert [ours.token_bytes(i) for i in range(259)] == [" ⁇ ".encode(), b"", b"", *BYTES]


class TestTrainSentencePiece:
    def test_layout_of_llama_and_an_even_sample(self):
        pieces = [trained().processor.id_to_piece(i) for i in range(420)]
        assert pieces[:259] == ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        assert not any(re.search(r"\d.|.\d|\n", piece) for piece in pieces[259:])
        assert "▁▁▁▁" in pieces and trained().vocab_size == 420
        assert trained().processor.pad_id() == -1
        long = tokenizer.train_sentencepiece(["xy " * 3000 + "ab " * 2000], 268)
        assert [long.token_bytes(i) for i in long.encode("xy ab")] == [b" xy", b" ab"]
        texts = ["".join(random.Random(i).choices("abcdef \n", k=3000)) for i in range(30)]
        model = [tokenizer.train_sentencepiece(texts, 300, n).data for n in (9000, 90000)]
        assert model[0] == tokenizer.train_sentencepiece(texts[::16], 300).data != model[1]


class TestPretokenPattern:
    def test_equals_the_regex_module(self):
        theirs = PAT.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
        def check(text, top=0x110000):
            assert tokenizer.pretoken_pattern(top).findall(text) == regex.findall(theirs, text)
        for_texts(check)
        known = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in
                 ("Cn", "Co", "Cs") and (not c.isalpha() or c < "\U00020000" and ord(c) % 5 == 1)]
        for top in (128, 0x110000):
            check("".join(f"x{c}x {c} 1{c}2!{c}\n" for c in known if ord(c) < top), top)


class TestBytePair:
    def oracle(self, o):
        return tiktoken.Encoding("", pat_str=PAT, mergeable_ranks=o.ranks, special_tokens=o.special)

    @pytest.mark.parametrize("file", [None, LLAMA3])
    def test_equals_tiktoken(self, file):
        ours = tokenizer.load_tokenizer(file) if file else ranked()
        theirs, n = self.oracle(ours), len(ours.ranks)
        def check(text):
            ids = theirs.encode(text, disallowed_special=())
            assert ours.encode(text, True) == ours.encode(text, True, continues=True) == [n, *ids]
            assert ours.encode(text, eos=True) == [*ids, n + 1] and ours.decode(ids) == text
            assert b"".join(map(ours.token_bytes, ids)) == text.encode()
        for_texts(check)
        for text in ("a" * 3000, " " * 3000, "!\n" * 3000, "ab" * 3000, " universally univers"):
            check(text)
        ids = [*range(1, ours.vocab_size, 3)]
        assert ours.decode(ids) == theirs.decode(ids) and ours.vocab_size == n + 256

    @pytest.mark.parametrize("names, words, stops", [
        ("3.0", "0 1 2 3 start_header_id end_header_id 4 eot_id 5 250", {1, 9}),
        ("3.1", "0 1 finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id "
                "python_tag image 2 245", {1, 8, 9})])
    def test_special_tokens_only_where_allowed(self, names, words, stops):
        ours, n = tokenizer.BytePair(ranked().data, names), ranked().bos_id
        words = [f"<|{'reserved_special_token_' * w.isdigit()}{w}|>" for w in words.split()]
        assert [*ours.special][2:len(words) + 1] + [*ours.special][-1:] == words
        assert ours.stop_ids == {n + stop for stop in stops} and ours.token_bytes(n + 9) == b""
        text, allowed = "a<|eot_id|>b<|image|><|eot_id|>", {"<|eot_id|>", "<|end_of_text|>"}
        ids = ours.encode(text, allowed_special=allowed)
        assert ids == self.oracle(ours).encode(text, allowed_special=allowed, disallowed_special=())
        assert [i for i in ids if i >= n] == [n + 9] * 2 and max(ours.encode(text)) < n


class TestLoadTokenizer:
    def load(self, folder, data):
        (folder / "file").write_bytes(data)
        return tokenizer.load_tokenizer(folder / "file")

    @pytest.mark.parametrize("file", [None, TOK512])
    def test_llama2c_merges_by_score(self, file, tmp_path):
        data, vocab, at = file.read_bytes() if file else llama2c(), {}, 4
        ours = self.load(tmp_path, data)
        while at < len(data):
            score, size = struct.unpack_from("<fI", data, at)
            at += 8 + size
            vocab[data[at - size:at].decode()] = (len(vocab), score)
        for text in [NOVEL, "Once upon a time, there was a little girl.", "Zoë 🦙  x\n\n"]:
            parts = [c if c in vocab else f"<0x{b:02X}>"
                     for c in " " + text for b in ([0] if c in vocab else c.encode())]
            while pairs := [(-vocab[a + b][1], i) for i, (a, b) in enumerate(zip(parts, parts[1:]))
                            if a + b in vocab]:
                i = min(pairs)[1]
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            assert ours.encode(text) == [vocab[part][0] for part in parts]
            assert ours.decode(ours.encode(text)) == text and ours.vocab_size == len(vocab)

    @pytest.mark.parametrize("kind", ["model", "ranks", "bin"])
    def test_told_apart_wrong_ids_and_damage(self, kind, tmp_path):
        ours = ranked() if kind == "ranks" else trained()
        data = llama2c() if kind == "bin" else ours.data
        self.load(tmp_path, data).save(tmp_path / "saved")
        again, draw = tokenizer.load_tokenizer(tmp_path / "saved", "3.0"), random.Random(0)
        assert type(again) is (tokenizer.HuggingFace if kind == "bin" else type(ours))
        assert ranked().bos_id + 8 not in again.stop_ids
        for text in FIXED:
            assert again.encode(text) == ours.encode(text)
        for call in (lambda: again.decode([-1]), lambda: again.token_bytes(again.vocab_size),
                     lambda: again.encode("\ud800"),
                     lambda: ranked().encode("", allowed_special="x")):
            with pytest.raises(ValueError, match="; try"):
                call()
        for _ in range(25):
            with pytest.raises(ValueError, match="file: .*try|file holds no"):
                self.load(tmp_path, data[:draw.randrange(2000)])
            wrong = bytearray(data)
            for at in draw.sample(range(len(data)), 8):
                wrong[at] = draw.randrange(256)
            with contextlib.suppress(ValueError):  # nothing else, and no crash
                self.load(tmp_path, bytes(wrong)).encode(NOVEL)

    def test_lies(self, tmp_path):
        data, model, lines = llama2c(), trained().data, ranked().data.splitlines()
        lies = [b"\n".join(lines[:4] + [line] + lines[5:]) for line in (
            b"QQ== 7", lines[3], lines[3][:-1] + b"4", b"!! 4", b"")]
        lies += [data[:at] + struct.pack("<I", value) + data[at + 4:] for at, value in (
            (0, 2), (4, 0x7FC00000), (8, 2**31), (8, 2**32 - 1), (8, 6), (8, 4))]  # 7FC00000: NaN
        lies += [data + b"\0\0\0\0\2\0\0\0\7", data + b"\0", data.replace(b"<0xC1>", b"<0xC2>"),
                 b"", b"\n", b"hello", b"\n".join(lines[:255]), model[:model.rindex(b"\x08id") - 3]]
        for i, lie in enumerate(lies):
            with pytest.raises(ValueError, match="line 5 .*; try" if i < 5 else "; try"):
                self.load(tmp_path, lie)


LIES = [None, True, -1, 0.5, 2**40, 10**400, "", "x", "\ud800", [], {}, [[]], {"x": []}, ["a b"],
        [["a", "b", "c"]], {"a": 0, "b": 0}, {"type": "Sequence"}, {"type": []}]


def places(tree):
    """(dict or list, key) of the places in a tree, three of each list."""
    for key in list(tree)[:12] if isinstance(tree, dict) else range(min(len(tree), 3)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from places(tree[key])


def check_lies(read, tree):
    """A tree with a lie at any place reads, or is one line of ValueError; returns those lines."""
    said = []
    for inside, key in [*places(tree)]:
        true = inside[key]
        for lie in LIES:
            inside[key] = lie
            try:
                read(tree).encode("a 1\u20ac", bos=True, eos=True)
            except ValueError as error:
                assert "; try" in str(error) and "\n" not in str(error) and len(str(error)) < 400
                said.append(str(error))
        inside[key] = true
    return said


class TestHuggingFace:
    load = TestLoadTokenizer.load

    def equal(self, ours, theirs, for_texts=for_texts):
        names, hides = ours.special.keys(), ours.spaced
        def check(text):
            ids = theirs.encode(text).ids
            assert ours.encode(text, bos=ours.adds_bos, allowed_special=names) == ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=hides)
            plain = ours.encode(text)
            assert not {*plain} & {*ours.special.values()}
            if b"\xf1" in ours.tokens:  # SmolLM2 and ours of its kind have not all bytes
                shown = b"".join(map(ours.token_bytes, ours.encode(text, continues=True)))
                assert shown.decode() == (text.replace("▁", " ") if hides else text)
        for_texts(check)
        for text in ("ab" * 1000, " wifes wifesx", "  <s> a<|im_end|> 1 <|eot_id|>b", "ananas\n",
                     "a<|im_end|>x<|im_end|>", "x    1   2  345    \n    6"):
            check(text)

    @pytest.mark.parametrize("kind", HUGGING_FACE)
    def test_equals_tokenizers(self, kind, tmp_path):
        theirs = HUGGING_FACE[kind]()
        ours = self.load(tmp_path, theirs.to_str().encode())
        self.equal(ours, theirs)
        added = {token.content: i for i, token in theirs.get_added_tokens_decoder().items()}
        assert ours.special == added and ours.vocab_size == theirs.get_vocab_size()
        begins, ends = {"smollm": (0, {0, 2}), "gpt-2": (0, {0, 2}), "llama-bpe": (
            added.get("<|begin_of_text|>"), {added.get("<|end_of_text|>"), added.get("<|eot_id|>")})
            }.get(kind, (1, {2, added.get("<|im_end|>")}))
        assert (ours.bos_id, ours.stop_ids) == (begins, ends) and ours.eos_id in ends
        assert ours.adds_bos is (kind not in ("smollm", "gpt-2")) and ours.chat_template is None
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({
            "add_bos_token": not ours.adds_bos, "bos_token": {"content": [*added][-1]},
            "eos_token": [*added][0], "chat_template": [
                {"name": "default", "template": "{{ 1 }}"}, {"name": "x", "template": "y"}]}))
        told = self.load(tmp_path, theirs.to_str().encode())
        assert told.adds_bos is not ours.adds_bos and told.chat_template == "{{ 1 }}"
        assert told.bos_id == max(added.values()) and told.eos_id == min(added.values())
        (tmp_path / "chat_template.jinja").write_text("{% if é %}", "utf-8")
        assert self.load(tmp_path, theirs.to_str().encode()).chat_template == "{% if é %}"
        (tmp_path / "x").mkdir()
        told.save(tmp_path / "x" / "file")
        again = tokenizer.load_tokenizer(tmp_path / "x" / "file")
        for name in ("tokens", "ranks", "merges", "special", "bos_id", "stop_ids", "adds_bos",
                     "chat_template", "eos_id", "hidden", "pattern", "data"):
            assert getattr(again, name) == getattr(told, name), name
        theirs = tokenizers.Tokenizer.from_str(again.data.decode())
        self.equal(ours, theirs, lambda check: [*map(check, FIXED)])

    @pytest.mark.parametrize("kind", ["legacy", "llama-bpe"])
    def test_lies(self, kind, tmp_path):
        data = HUGGING_FACE[kind]().to_str()
        read = lambda tree: self.load(tmp_path, json.dumps(tree).encode())
        if kind == "legacy":
            assert len(check_lies(read, json.loads(data))) > 300
        for change, named in (
                ({"normalizer": {"type": "NFC"}}, "NFC"), ({"decoder": None}, "decoder"),
                ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
                ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFD"}]}}, "NFD"),
                ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a+"}}}, "a[+]"),
                ({"post_processor": {"type": "BertProcessing"}}, "Bert")):
            with pytest.raises(ValueError, match=f"file: .*{named}.*; try"):
                read(json.loads(data) | change)
        for change, named in (
                ({"type": "WordPiece"}, "type .WordPiece"), ({"dropout": 0.1}, "dropout 0.1"),
                ({"end_of_word_suffix": "</w>"}, "</w>"), ({"merges": ["a zz"]}, "merge 0"),
                ({"merges": ["u i"]}, "merge 0"), ({"merges": [["", "e"]]}, "merge 0"),
                ({"byte_fallback": kind != "legacy"}, "byte_fallback")):
            with pytest.raises(ValueError, match=f"file: .*{named}.*; try"):
                read({**json.loads(data), "model": json.loads(data)["model"] | change})
        vocab = json.loads(HUGGING_FACE["llama-bpe"]().to_str())
        number = vocab["model"]["vocab"].pop("Ġwifes")
        for name, value in (("", number), ("\ud800", number), ("Ġwifes", float(number))):
            vocab["model"]["vocab"][name] = value
            with pytest.raises(ValueError, match="file: (the ids|text holds half).*; try"):
                read(vocab)
            del vocab["model"]["vocab"][name]
        deep = b'{"model":' * 100_000
        for lie in (deep, data[:-9].encode(), b'{"a": 1}', b'{"model": "\xff"}'):
            with pytest.raises(ValueError, match="file: .*; try"):
                self.load(tmp_path, lie)
        for name, lie in (("tokenizer_config.json", deep), ("tokenizer_config.json", b"[7]"),
                          ("tokenizer_config.json", b'{"bos_token": "absent"}'),
                          ("tokenizer_config.json", b'{"add_bos_token": 7}'),
                          ("chat_template.jinja", b"\xff")):
            (tmp_path / name).write_bytes(lie)
            with pytest.raises(ValueError, match="; try"):
                self.load(tmp_path, data.encode())
            (tmp_path / name).unlink()

    @pytest.mark.parametrize("file", [LLAMA2])
    def test_llama_2(self, file):
        ours = tokenizer.load_tokenizer(file)
        theirs = over_characters(ours.processor, PREPEND)
        self.equal(tokenizer.HuggingFace(theirs.to_str().encode()), theirs)


class TestFromGGUF:
    def fields(self, theirs, **more):
        """What a GGUF file has of it."""
        file, added = json.loads(theirs.to_str()), theirs.get_added_tokens_decoder()
        names = [theirs.id_to_token(i) for i in range(theirs.get_vocab_size())]
        types = [3 if i in added else 6 if re.fullmatch("<0x..>", name) else 1
                 for i, name in enumerate(names)]
        more |= {"tokens": names, "token_type": types, "merges": file["model"]["merges"]}
        more["merges"] = [" ".join(merge) for merge in more["merges"]]
        return {f"tokenizer.ggml.{key}": value for key, value in more.items()}

    @pytest.mark.parametrize("kind, front", [("legacy", True), ("replace", False)])
    def test_llama(self, kind, front):
        theirs = HUGGING_FACE[kind]()
        scores = [trained().processor.get_score(i) for i in range(420)] + [0.0] * 2
        fields = self.fields(theirs, model="llama", scores=scores, add_space_prefix=front,
                             bos_token_id=1, eos_token_id=2)
        fields["tokenizer.ggml.token_type"][0] = 2
        ours = tokenizer.tokenizer_from_gguf(fields)
        TestHuggingFace().equal(ours, theirs)
        assert ours.adds_bos and (ours.bos_id, ours.stop_ids) == (1, {2, 420})
        with pytest.raises(ValueError, match="no token has id -1; try"):
            tokenizer.tokenizer_from_gguf(fields | {"tokenizer.ggml.bos_token_id": -1})
        used = next(i for i in ours.encode(NOVEL) if len(ours.tokens[i]) > 2)
        fields["tokenizer.ggml.token_type"][used] = 5  # unused
        assert used not in tokenizer.tokenizer_from_gguf(fields).encode(NOVEL)
        fields["tokenizer.ggml.token_type"][420] = 4
        assert tokenizer.tokenizer_from_gguf(fields).token_bytes(420) == b"<|im_end|>"
        if front:
            assert len(check_lies(tokenizer.tokenizer_from_gguf, fields)) > 100

    @pytest.mark.parametrize("pre, kind", [
        ("llama-bpe", "llama-bpe"), ("smollm", "smollm"), ("gpt-2", "gpt-2"), ("default", "gpt-2")])
    def test_gpt2(self, pre, kind):
        theirs = HUGGING_FACE[kind]()
        bos, eot, eos = theirs.get_added_tokens_decoder()
        fields = self.fields(theirs, model="gpt2", pre=pre, bos_token_id=bos, eos_token_id=eos,
                             eot_token_id=eot)
        fields["tokenizer.chat_template"] = "{{ 2 }}"
        ours = tokenizer.tokenizer_from_gguf(fields)
        TestHuggingFace().equal(ours, theirs)
        assert ours.adds_bos is (kind == "llama-bpe") and ours.chat_template == "{{ 2 }}"
        assert (ours.bos_id, ours.eos_id) == (bos, eos) and {eos, eot} <= ours.stop_ids
        assert not tokenizer.tokenizer_from_gguf(fields | {"tokenizer.ggml.add_bos_token": False}).adds_bos
        with pytest.raises(ValueError, match="pre .qwen2.*; try"):
            tokenizer.tokenizer_from_gguf(fields | {"tokenizer.ggml.pre": "qwen2"})
        if kind == "smollm":
            assert len(check_lies(tokenizer.tokenizer_from_gguf, fields)) > 100


class TestStreamDecoder:
    @pytest.mark.parametrize("ours", [trained, ranked, *(
        lambda kind=kind: tokenizer.HuggingFace(HUGGING_FACE[kind]().to_str().encode())
        for kind in ("legacy", "llama-bpe"))])
    def test_equals_decode(self, ours):
        ours = ours()

        def check(ids):
            stream = tokenizer.StreamDecoder(ours, start=True)
            assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids)
        for_texts(lambda text: check(ours.encode(text)))
        for ids in ([0, 5], [35, 68], ours.encode("   a"), [1, 1, *ours.encode("  a b")]):
            check(ids)
        later = tokenizer.StreamDecoder(ours, start=False)
        assert "".join(map(later.push, ours.encode(" a", continues=True))) == " a"
        ids = [[ours.token_bytes(i) for i in range(259)].index(bytes([b])) for b in "🦙".encode()]
        assert [later.push(i) for i in ids] == ["", "", "", "🦙"]
        assert later.push(ids[0]) + later.flush() == "\ufffd"


class TestCut:
    @pytest.mark.parametrize("text, lengths", [
        ("", []), ("a\n\n" * 21845 + "b", [65536]), ("é" * 32768 + "a", [65536, 1]),
        ("x" + "é" * 40000, [65535, 14466]), ("w" * 200000, [65536] * 3 + [3392]),
        (("y" * 99 + "\n\n") * 2000, [16463] * 12 + [4444]),  # at blank lines
        (("y" * 99 + "\r\n\r\n") * 2000, [16480] * 12 + [8240]),
        (("y" * 30000 + "\n\n\n\n") * 10, [30004] * 10),
        (("z" * 99 + "\n") * 2000, [16400] * 12 + [3200]),  # at line ends, where there are none
        ("v" * 60000 + "\n" + "v" * 5000 + "\n\n" + "v" * 9000, [65003, 9000]),
        ("v" * 60000 + "\n" + "v" * 9000 + "\n\n" + "v" * 60000, [60001, 65536, 3466])])
    def test_where_whatever_the_chunks(self, text, lengths):
        data = text.encode()
        for step in (999, 1 << 16, 1 << 17):
            pieces = list(tokenizer.cut(data[i:i + step] for i in range(0, len(data), step)))
            assert "".join(pieces) == text and [len(p.encode()) for p in pieces] == lengths


class TestDocuments:
    def test_files_folders_and_jsonl(self, tmp_path):
        skipped, jsonl = [], "\n".join(['{"text": "a\\nb"}', "", "{", '{"text":5}', "[1]", '"text"',
                 "7", '{"text": "\\ud800 pair"}', "[" * 100_000, json.dumps({"text": NOVEL * 999})])
        for name, data in {
                "z": b"last", "b/a": b"\xef\xbb\xbf\r\n", ".n/x": b"", ".x": b"", "a.py": b"first",
                "empty": b"", "nul": b"a\0b", "short": b"\xc3", "m.jsonl": jsonl.encode()}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
        reader = tokenizer.documents([tmp_path, tmp_path / "a.py", tmp_path / "absent"], skipped)
        assert ["".join(next(reader)) for _ in range(7)] == [
            "first", "a\nb", "? pair", NOVEL * 999, "last", "\r\n", "first"]
        with pytest.raises(ValueError, match="absent does not exist; try"):
            next(reader)
        assert [line.removeprefix(str(tmp_path))[1:19] for line in skipped] == [
            "empty: empty or no", "m.jsonl: 6 lines a", "nul: holds NUL byt", "short: not UTF-8 t"]

    def test_standard_library(self):
        from pydoc_data.topics import topics
        skipped, root = [], Path(os.__file__).parent
        found = ["".join(document) for document in tokenizer.standard_library(skipped)]
        assert skipped == [] and len(set(found)) > 400 and found[-1] == topics[max(topics)]
        for left_out in ("config-*/*.py", "_sysconfigdata*.py", "idlelib/r*.py", "test/*ast.py"):
            assert not {file.read_text("utf-8") for file in root.glob(left_out)} & {*found}


class TestPrepare:
    SHA = {text: int(hashlib.sha1(text.encode()).hexdigest(), 16)
           for text in map("é%d".__mod__, range(600))}
    HELD = [t for t, number in SHA.items() if number % 20 == 0]
    REST = [t for t, number in SHA.items() if number % 20]

    def test_too_little_text(self):
        for texts in (["a"], ["a", "a"], self.HELD[:1], self.HELD[:2], []):
            with pytest.raises(ValueError, match="(too little|no) text.*try"):
                tokenizer.survey(lambda skipped: [texts])

    @pytest.mark.parametrize("ours, texts, held, size", [  # held: if none by itself, the least
        (trained, [*SHA], HELD, 2), (functools.partial(many, 65024), [*SHA], HELD, 2),
        (functools.partial(many, 65025), REST, [min(REST, key=SHA.get)], 4)])
    def test_shards(self, tmp_path, ours, texts, held, size):
        ours = ours()
        documents = [texts[i:i + 10] for i in range(0, len(texts), 10)]
        ids, sizes = [[], []], [0, 0]
        for document in documents:
            for split in (0, 1):
                mine = [text for text in document if (text in held) == split]
                sizes[split] += len("".join(mine).encode())
                for i, text in enumerate(mine):
                    ids[split] += ours.encode(text, bos=i == 0, continues=i > 0)
                ids[split] += [ours.eos_id] * bool(mine)
        reader = lambda skipped: iter(documents)
        known = tokenizer.survey(reader)
        free = [text for text in texts if text not in held]
        assert [*tokenizer.training_text(reader, known.chosen)] == free
        for workers in (1, 2):
            entry = tokenizer.prepare("x", reader, known, ours, tmp_path, workers)
            found = {f.name: np.fromfile(f, f"<u{size}").tolist() for f in tmp_path.iterdir()}
            assert found == {"x.train.bin": ids[0], "x.val.bin": ids[1]}
            counts = [entry[f"{split}_{unit}"] for unit in ("bytes", "tokens")
                      for split in ("train", "val")]
            assert counts == [*sizes, *map(len, ids)] and entry["dtype"] == f"uint{8 * size}"


class TestTokenizerCommand:
    def run(self, capsys, *arguments):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", ["tokenizer.py", *map(str, arguments)])
            tokenizer.command(tokenizer.main)
        return ended.value.code, *capsys.readouterr()

    def test_tokenizer_json(self, tmp_path, capsys):
        HUGGING_FACE["legacy"]().save(str(tmp_path / "t.json"))
        status, out, err = self.run(capsys, "info", tmp_path / "t.json")
        assert (status, err) == (0, "") and "HuggingFace: 422 tokens, bos 1, eos 2, ends at" in out
        status, out, err = self.run(capsys, "decode", "--tokenizer", tmp_path / "t.json", 1, 20)
        assert (status, out, err) == (0, "\x11\n", "")

    def test_train_encode_decode(self, tmp_path, capsys):
        model, texts = tmp_path / "m", (tokenizer.__file__, __file__)
        train = ["train", "--out", model, "--vocab-size", 500, "--data", *texts]
        status, out, err = self.run(capsys, *train)
        assert (status, err) == (0, "") and "500 tokens, bos 1, eos 2" in out
        assert self.run(capsys, *train)[2].endswith("exists; try --force or another --out\n")
        for flag in ("bos", "eos"):
            ids = tokenizer.load_tokenizer(model).encode("12 🦙", **{flag: True})
            found = self.run(capsys, "encode", "--tokenizer", model, f"--{flag}", "12 🦙")
            assert found == (0, " ".join(map(str, ids)) + "\n", "")
            assert self.run(capsys, "decode", "--tokenizer", model, *ids) == (0, "12 🦙\n", "")

    @pytest.mark.parametrize("command, message", [
        (f"train --out x --vocab-size 99 --data {__file__} {tokenizer.__file__}", "smaller"),
        ("", "required"), ("info absent", "absent"), (f"info {__file__}", "holds no tokenizer"),
        ("train --out x --data absent", "not exist"), ("decode --tok m 1", "--tok"),
        ("decode --tokenizer m 1 x", "x is no id"), ("decode --tokenizer m 999", "has id 999")])
    def test_mistakes_are_one_line(self, tmp_path, monkeypatch, capsys, command, message):
        monkeypatch.chdir(tmp_path)
        trained().save("m")
        status, out, err = self.run(capsys, *command.split())
        assert (status, out, err.count("\n"), err[:7]) == (2, "", 1, "error: ") and message in err


