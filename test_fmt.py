from test_head import *

import contextlib
import ctypes
import io
import random
import signal
import struct
import tracemalloc

import generate
import tokenizer

FP16, BF16 = torch.float16, torch.bfloat16
WIDE = replace(SMALL, dim=256, n_layers=1, n_heads=4, hidden_dim=512)  # whole blocks of 256
SCALED = {"rope_scaling": 32.0, "max_seq_len": 16384}
PLAIN_HF = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 100,
            "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
GGUF_NAMES = dict(zip(HF_NAMES, (
    "token_embd", "output_norm", "output", "attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v",
    "attn_output", "ffn_gate", "ffn_down", "ffn_up")))


def state_of(model):
    return {name: w.detach().clone() for name, w in model.named_parameters()}


def state_equal(model, wanted):
    """Are all weights of the model those of a state dict, bit for bit?"""
    found = model.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


# Writers, none of which is the project's but save_meta: each writes a checkpoint of the model into
# a folder and returns (path to load, {name: what the file then holds}).


def save_meta(folder, model):
    weights = {name: generate.Weight(w.shape, w.dtype, (), lambda w=w: w)
               for name, w in state_of(model).items()}
    generate.write_meta(model.config, weights, folder)
    return folder, state_of(model)


def save_shards(folder, model, n=2, axis=0):
    """Meta's folder in n shards; the embedding is cut along `axis`."""
    folder.mkdir(exist_ok=True)
    shards = [{"rope.freqs": torch.zeros(6)} for _ in range(n)]
    for name, w in state_of(model).items():
        kind, pieces = name.split(".")[-2], [w] * n
        if w.dim() == 2:
            along = axis if kind == "tok_embeddings" else int(kind in ("wo", "w2"))
            repeat = max(1, n // model.config.n_kv_heads) if kind in ("wk", "wv") else 1
            pieces = [piece for piece in w.chunk(n // repeat, along) for _ in range(repeat)]
        for shard, piece in zip(shards, pieces):
            shard[name] = piece.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    (folder / "params.json").write_text(json.dumps(generate.write_params(model.config)))
    return folder, state_of(model)


def save_hf(folder, model, dtype=torch.float32, size="1GB"):
    """A folder that transformers writes."""
    oracle = oracle_of(model).to(dtype)
    oracle.save_pretrained(folder, max_shard_size=size)
    assert (size != "1GB") == (len(list(folder.glob("*.safetensors"))) > 1)
    return folder, {name: w.to(dtype) for name, w in state_of(model).items()}


def save_hf4(folder, model):
    """The same with the fields of transformers 4, without those that have a default."""
    save_hf(folder, model)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "pretraining_tp": 2}
    for name in ("head_dim", "num_key_value_heads", "attention_bias", "mlp_bias"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    return folder, state_of(model)


def save_bin(folder, model, names=("pytorch_model.bin",)):
    """transformers' .bin, with an index if there are several; what stands beside is passed over."""
    save_hf(folder, model)
    (folder / "model.safetensors").rename(folder / "model (1).safetensors")
    table = {hf_name(name): in_hf_order(name, w, model.config)
             for name, w in state_of(model).items()}
    table["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # in old files
    if model.config.tie_embeddings:
        table["lm_head.weight"] = table["model.embed_tokens.weight"]
    for name in ("._pytorch_model.bin", "adapter_model.safetensors", "consolidated.safetensors"):
        (folder / name).write_bytes(b"of no interest")
    where = {name: names[i % len(names)] for i, name in enumerate(table)}
    for file in names:
        torch.save({name: w for name, w in table.items() if where[name] == file}, folder / file)
    if len(names) > 1:
        index = json.dumps({"weight_map": where})
        (folder / "pytorch_model.bin.index.json").write_text(index)
    return folder / names[-1], state_of(model)  # one of them stands for all


def save_pt(folder, model, prefix=""):
    """llama2.c's checkpoint of training, with the output beside the embedding that it is."""
    table = {prefix + name: w for name, w in state_of(model).items()}
    table[prefix + "output.weight"] = table[prefix + "tok_embeddings.weight"]
    names = "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len"
    args = {name: getattr(model.config, name) for name in names}
    folder.mkdir(exist_ok=True)
    torch.save({"model": table, "model_args": args | {"multiple_of": 32, "dropout": 0.1},
                "optimizer": {"state": {0: torch.zeros(3)}}}, folder / "ckpt.pt")
    return folder / "ckpt.pt", state_of(model)


def save_llama2c(folder, model, version=0):
    """llama2.c's .bin, from its description. In version 2 groups of 8 share a scale."""
    c, stored = model.config, state_of(model)
    kinds = ("tok_embeddings layers.attention_norm layers.attention.wq layers.attention.wk "
             "layers.attention.wv layers.attention.wo layers.ffn_norm layers.feed_forward.w1 "
             "layers.feed_forward.w2 layers.feed_forward.w3 norm").split()
    if version:
        kinds = [kinds[i] for i in (1, 6, 10, 0, 2, 3, 4, 5, 7, 8, 9)]
    parts = [stored[f"{kind.replace('layers', f'layers.{i}')}.weight"] for kind in kinds
             for i in range(c.n_layers if "layers" in kind else 1)]
    if version == 0:
        parts.append(torch.full((c.max_seq_len * c.head_dim,), math.nan))  # cos and sin
    if not c.tie_embeddings:
        parts.append(stored["output.weight"])
    vocab = c.vocab_size if c.tie_embeddings or version else -c.vocab_size
    header = struct.pack("<7i", c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, vocab,
                         c.max_seq_len)
    if version:
        header = struct.pack("<Ii", 0x616b3432, version) + header
        header += struct.pack("<Bi", c.tie_embeddings, 8) + bytes(256 - 41)
    folder.mkdir(exist_ok=True)
    with open(folder / "model.bin", "wb") as file:
        file.write(header)
        for part in parts:
            data = part.numpy().tobytes()
            if version == 2 and part.dim() == 2:
                scales = part.view(-1, 8).abs().amax(1) / 127
                int8 = (part.view(-1, 8) / scales[:, None]).round().to(torch.int8)
                data = int8.numpy().tobytes() + scales.numpy().tobytes()
                part.copy_(int8.float().mul(scales[:, None]).view_as(part))
            file.write(data)
    return folder / "model.bin", stored


def save_gguf(folder, model, kind="F32", extra=lambda writer: None):
    """A GGUF file by the package gguf, from transformers' weights as llama.cpp converts them."""
    import gguf
    folder.mkdir(exist_ok=True)
    c, stored = model.config, {}
    w = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for name, value in {
            "context_length": c.max_seq_len, "embedding_length": c.dim, "block_count": c.n_layers,
            "feed_forward_length": c.hidden_dim, "head_count": c.n_heads, "key_length": c.head_dim,
            "head_count_kv": c.n_kv_heads, "layer_norm_rms_eps": c.norm_eps,
            "rope_freq_base": c.rope_theta, "rope_dimension_count": c.head_dim,
            "value_length": c.head_dim, "tokenizer_model": "llama",
            "token_list": [f"piece {i}" for i in range(c.vocab_size)],
            "token_scores": [0.5] * c.vocab_size}.items():
        getattr(w, f"add_{name}")(value)
    extra(w)
    if c.rope_scaling:
        f = 1e4 ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        m = ((8192 * f / (2 * math.pi) - 1) / 3).clamp(0, 1)
        w.add_tensor("rope_freqs.weight", (f / ((1 - m) * f / c.rope_scaling + m * f)).numpy())
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    for name, x in state_of(model).items():
        x = in_hf_order(name, x, c)
        heads = {"wq": c.n_heads, "wk": c.n_kv_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp's permute
            x = x.reshape(heads, 2, len(x) // heads // 2, -1).transpose(1, 2).reshape(x.shape)
        layer, what = re.fullmatch(r"(layers\.\d+\.)?(.*)\.weight", name).groups()
        theirs = f"{(layer or '').replace('layers', 'blk')}{GGUF_NAMES[what]}.weight"
        stored[name] = x
        if x.dim() == 1 or kind.name == "F32":
            w.add_tensor(theirs, x.numpy())
            continue
        try:
            data = gguf.quants.quantize(x.numpy(), kind)
        except NotImplementedError:  # gguf decodes this type alone: any blocks will do
            data = np.random.default_rng(0).integers(0, 60, (len(x), x.shape[1] // block * size),
                                                     dtype=np.uint8)
        w.add_tensor(theirs, data, raw_dtype=kind)
        stored[name] = torch.from_numpy(gguf.quants.dequantize(data, kind))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return folder / "model.gguf", stored


TIED = {"tie_embeddings": True}
TABLE = [  # (writer, its options, change of SMALL or a whole config)
    (save_meta, {}, {}), (save_meta, {}, {"hidden_dim": 500}), (save_meta, {}, {"head_size": 20}),
    (save_meta, {}, {"hidden_dim": 128}), (save_meta, {}, {**TIED, **SCALED, "rope_theta": 5e5}),
    *((save_shards, {"n": n, "axis": axis}, {"vocab_size": 96, **change}) for n, axis, change in (
        (2, 0, {}), (2, 1, {"n_kv_heads": 4}), (4, 0, {}), (4, 1, {"dim": 64, "n_heads": 8}),
        (4, 1, {"n_kv_heads": 1, "head_size": 16}))),
    *((save_hf, {}, change) for change in (
        {}, {"n_kv_heads": 4}, {"n_kv_heads": 1}, TIED, {"norm_eps": 0.3}, {"rope_theta": 50.0},
        {**SCALED, "rope_scaling": 8.0}, SCALED)),
    (save_hf, {"dtype": BF16}, {}), (save_hf, {"dtype": FP16}, TIED),
    (save_hf, {"dtype": BF16, "size": "60KB"}, {}), (save_hf4, {}, {"n_kv_heads": 4, **SCALED}),
    (save_bin, {}, TIED), (save_bin, {"names": ("1.bin", "2.bin")}, {}),
    *((save_pt, {"prefix": prefix}, {"hidden_dim": 128, **TIED})
      for prefix in ("", "_orig_mod.", "module.")),
    *((save_llama2c, {"version": version}, {"hidden_dim": 96, **tied})
      for version in (0, 1, 2) for tied in ({}, TIED)),
    (save_gguf, {}, SCALED), (save_gguf, {}, {**SCALED, **TIED, "rope_scaling": 8.0}),
    (save_gguf, {}, {"head_size": 20}),
    *((save_gguf, {"kind": kind}, WIDE) for kind in (
        "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_NL"))]


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("code in a pickle was executed",)


class TestFormats:
    """Whatever wrote a checkpoint: config, every number and the logits are those that it holds."""

    @pytest.mark.parametrize("writer, options, change", TABLE)
    def test_reads(self, tmp_path, writer, options, change):
        config = change if isinstance(change, LlamaConfig) else replace(SMALL, **change)
        path, stored = writer(tmp_path / "in", random_model(config), **options)
        model = generate.load(path)
        assert model.config == config and not model.training
        wide = {name: w.float() for name, w in stored.items()}
        assert state_equal(generate.load(path, dtype=torch.float32), wide)
        half = {name: w.to(BF16) for name, w in stored.items()}
        assert state_equal(generate.load(path, dtype=BF16), half)
        dtype = FP16 if options.get("kind") == "F16" else BF16
        is_half = options.get("kind") in ("F16", "BF16")
        wanted = dtype if is_half else options.get("dtype", torch.float32)
        assert model.norm.weight.dtype == wanted

    @pytest.mark.parametrize("change", [{}, {"n_kv_heads": 1, **SCALED}])
    def test_logits_of_transformers(self, tmp_path, hf, change):
        """The order of wq and wk, and the frequencies, as transformers reads its own files."""
        from transformers import LlamaForCausalLM
        model = random_model(replace(SMALL, **change))
        x = tokens(2, 60)
        for writer in (save_hf, save_gguf):
            path, _ = writer(tmp_path / writer.__name__, model)
            folder = tmp_path / "save_hf"
            with torch.no_grad():
                wanted = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(x).logits
                close(generate.load(path)(x), wanted, atol=1e-4)

    @pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
    def test_stories260k(self):
        """A published file, and the greedy text that llama2.c's own program makes of it."""
        folder = SHARED / "data" / "stories260K"
        model = generate.load(folder / "stories260K.bin")
        assert model.config == SIZES["stories260k"][0]
        cache, ids = KVCache(model.config, 1, 200), [1]
        with torch.no_grad():
            for _ in range(200):
                ids.append(int(model(torch.tensor([ids[-1:]]), cache)[0, -1].argmax()))
        text = tokenizer.load_tokenizer(folder / "tok512.bin").decode(ids)
        assert text.strip() == (folder / "expected_greedy_200.txt").read_text().strip()

    def test_published_params(self):
        llama3 = {"n_heads": 32, "n_kv_heads": 8, "norm_eps": 1e-05, "rope_theta": 500000.0,
                  "use_scaled_rope": True, "vocab_size": 128256}
        published = {  # as Meta's files have them
            "7b": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32,
                   "norm_eps": 1e-06, "vocab_size": -1},
            "llama2-70b": {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3,
                           "n_heads": 64, "n_kv_heads": 8, "n_layers": 80, "norm_eps": 1e-05,
                           "vocab_size": -1},
            "llama3.1-8b": {"dim": 4096, "ffn_dim_multiplier": 1.3, "multiple_of": 1024,
                            "n_layers": 32, **llama3},
            "llama3.2-1b": {"dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256,
                            "n_layers": 16, "max_batch_size": 6, **llama3}}
        for name, params in published.items():
            config = SIZES[name][0]
            weights = {"tok_embeddings.weight": torch.empty(config.vocab_size, 1, device="meta")}
            if not config.tie_embeddings:
                weights["output.weight"] = torch.empty(config.vocab_size, 2, device="meta")
            weights = {n: generate.Weight.of(w) for n, w in weights.items()}
            assert generate.read_params(params, weights) == config
        other = generate.read_params({**params, "rope_scaling_factor": 16, "max_seq_len": 9},
                                     weights)
        assert other == replace(config, rope_scaling=16, max_seq_len=9)
        unknown = {**params, "n_layers": 3}  # a shape that is in no size: 3.1's factor
        assert generate.read_params(unknown, weights).rope_scaling == 8

    STRICT = {  # what the message says: what is done to the weights
        "extra is .48,., not known": lambda w: w.update(extra=w["norm.weight"]),
        "norm.weight is missing": lambda w: w.pop("norm.weight"),
        "wk.weight is .24, 40.": lambda w: w.update(
            {"layers.1.attention.wk.weight": torch.zeros(24, 40)}),
        "norm.weight is of torch.int64": lambda w: w.update({"norm.weight": torch.arange(48)}),
        "KeyError.*tok_emb": lambda w: w.pop("tok_embeddings.weight"),
        "could run code": lambda w: w.update(x=Bomb())}

    @pytest.mark.parametrize("named", STRICT)
    def test_strict(self, tmp_path, named):
        folder, weights = save_meta(tmp_path / "in", random_model(SMALL))
        self.STRICT[named](weights)
        torch.save(weights, folder / "consolidated.00.pth")
        with pytest.raises(ValueError, match=named):
            generate.load(folder)

    @pytest.mark.parametrize("gone", [[0], [1], [3], [2, 3], [0, 1, 2, 3]])
    def test_a_missing_shard_is_named(self, tmp_path, gone):
        folder, _ = save_shards(tmp_path, random_model(replace(SMALL, vocab_size=96)), 4, 1)
        for i in gone:
            (folder / f"consolidated.{i:02}.pth").unlink()
        with pytest.raises(ValueError, match=f"consolidated.{gone[0]:02}.pth is missing"):
            generate.load(folder)

    @pytest.mark.parametrize("named, change", [
        ("different tensors", {"extra": torch.zeros(3)}),
        ("wq.weight in different shapes", {"layers.1.attention.wq.weight": torch.zeros(3, 48)})])
    def test_shards_that_do_not_fit_together(self, tmp_path, named, change):
        folder, _ = save_shards(tmp_path, random_model(replace(SMALL, vocab_size=96)))
        shard = torch.load(folder / "consolidated.01.pth") | change
        torch.save(shard, folder / "consolidated.01.pth")
        with pytest.raises(ValueError, match=named):
            generate.load(folder)

    def test_an_adapter_alone_is_said_to_be_none(self, tmp_path):
        (tmp_path / "adapter_model.safetensors").write_bytes(b"12345678{}")
        with pytest.raises(ValueError, match="adapter"):
            generate.load(tmp_path)

    def test_oldest_config(self):
        oldest = PLAIN_HF | {"max_sequence_length": 2048, "architectures": ["LLaMAForCausalLM"]}
        assert generate.read_hf_config(oldest) == LlamaConfig(64, 3, 4, 4, 100, 97, 2048, 1e-6)

    def test_a_single_file_is_told_by_what_is_in_it(self, tmp_path, hf):
        folder, stored = save_hf(tmp_path, random_model(SMALL))
        assert state_equal(generate.load(folder / "config.json"), stored)
        file = (folder / "model.safetensors").rename(folder / "weights.of.mine")
        assert state_equal(generate.load(file), stored)

    HF_REFUSED = {
        **{f"{name}={value!r}": {name: value} for name, value in (
            ("model_type", "mixtral"), ("hidden_act", "gelu"), ("attention_bias", True),
            ("mlp_bias", True), ("sliding_window", 4096), ("num_local_experts", 8),
            ("partial_rotary_factor", 0.5))},
        "quantization_config": {"quantization_config": {"bits": 4}},
        "type='linear'": {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_type='yarn'": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        "low_freq_factor=2.0": {"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 2.0}},
        "original_max_position_embeddings=4096": {"rope_scaling": {
            **LLAMA3_ROPE, "original_max_position_embeddings": 4096}}}

    @pytest.mark.parametrize("named", HF_REFUSED)
    def test_an_option_of_transformers_that_is_not_implemented(self, named):
        plain = PLAIN_HF | {"rope_scaling": LLAMA3_ROPE, "pretraining_tp": 4, "use_cache": True}
        assert generate.read_hf_config(plain).rope_scaling == 8
        with pytest.raises(ValueError, match=named):
            generate.read_hf_config(PLAIN_HF | self.HF_REFUSED[named])

    GGUF_REFUSED = {
        "expert_count": lambda w: w.add_expert_count(8),
        "rope.scaling.type": lambda w: w.add_string("llama.rope.scaling.type", "linear"),
        "sliding_window": lambda w: w.add_sliding_window(4096),
        "logit_scale": lambda w: w.add_logit_scale(0.5),
        "split.count=2": lambda w: w.add_uint16("split.count", 2),
        "rope_freqs.weight": lambda w: w.add_tensor(
            "rope_freqs.weight", np.linspace(1, 8, 6, dtype=np.float32)),
        "unknown blk.7.x": lambda w: w.add_tensor("blk.7.x", np.zeros(4, np.float32)),
        "type 26": lambda w: w.add_tensor("a", np.zeros((4, 4), np.int32))}

    @pytest.mark.parametrize("named", GGUF_REFUSED)
    def test_an_option_of_gguf_that_is_not_implemented(self, tmp_path, named):
        path, _ = save_gguf(tmp_path, random_model(SMALL), extra=self.GGUF_REFUSED[named])
        with pytest.raises(ValueError, match=named):
            generate.load(path)

    def test_quantised_gguf_without_the_package(self, tmp_path, monkeypatch):
        native, _ = save_gguf(tmp_path / "native", random_model(WIDE), "F16")
        quantised, _ = save_gguf(tmp_path / "quantised", random_model(WIDE), "Q8_0")
        monkeypatch.setitem(sys.modules, "gguf", None)
        generate.load(native)
        with pytest.raises(ValueError, match="try pip install -U gguf"):
            generate.load(quantised)


class TestExport:
    @pytest.mark.parametrize("dtype, change", [
        (torch.float32, {}), (BF16, TIED), (torch.float32, {"head_size": 24}),
        (torch.float32, {"n_kv_heads": 1, **SCALED})])
    @pytest.mark.parametrize("format", ["meta", "hf", "llama2c"])
    def test_in_out_in_is_bit_equal(self, tmp_path, hf, format, dtype, change):
        from transformers import LlamaForCausalLM
        source, stored = save_shards(tmp_path / "in", random_model(replace(SMALL, vocab_size=96,
                                                                           **change)).to(dtype))
        out = tmp_path / "out"
        if format == "llama2c" and change.keys() & {"head_size", "rope_scaling"}:
            with pytest.raises(ValueError, match="head_size|rope_scaling"):
                generate.export(source, format, out)
            assert not out.exists()
            return
        generate.export(source, format, out)
        again = generate.load(out, dtype=dtype)
        assert again.config == generate.load(source).config and state_equal(again, stored)
        names = {"meta": {"consolidated.00.pth", "params.json"},
                 "hf": {"model.safetensors", "config.json"}}.get(format)
        assert names is None or {file.name for file in out.iterdir()} == names
        if format == "hf":
            theirs, x = LlamaForCausalLM.from_pretrained(out), tokens(2, 60, vocab=96)
            assert theirs.dtype == dtype
            with torch.no_grad():
                close(again.float()(x), theirs.float()(x).logits, atol=1e-4)

    def test_what_is_there_stays(self, tmp_path):
        save_meta(tmp_path / "in", random_model(SMALL))
        with pytest.raises(ValueError, match="no format 'gguf'; try one of meta, hf, llama2c"):
            generate.export(tmp_path / "in", "gguf", tmp_path / "out")
        for format, out in (("hf", "in"), ("llama2c", "in/params.json")):
            with pytest.raises(ValueError, match="exists already"):
                generate.export(tmp_path / "in", format, tmp_path / out)

    @pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
    def test_a_full_disk_keeps_what_was_there(self, tmp_path):
        import resource
        save_meta(tmp_path / "in", random_model(SMALL))
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the kernel refuses larger files
        old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            with pytest.raises(OSError, match="could not be written.*try to free space"):
                save_meta(tmp_path / "in", random_model(SMALL, seed=2))
            for format in generate.EXPORTS:
                with pytest.raises(OSError, match="could not be written.*try to free space"):
                    generate.export(tmp_path / "in", format, tmp_path / "out" / format)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, old)
        assert before == {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}


def memory(field):
    """Of this process, in bytes, by its name in /proc/self/status."""
    return 1024 * int(re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_memory(act, field="VmRSS", most="VmHWM"):
    """The most memory that act() holds beyond what there was before, mapped pages included, in
    bytes: the least of three runs, for the kernel counts pages by processor and a little late."""
    used, libc = [], ctypes.CDLL(None)
    for _ in range(3):
        with contextlib.suppress(AttributeError):  # glibc: what is freed goes back to the system
            libc.mallopt(-3, 1 << 18)
            libc.malloc_trim(0)
        before = memory(field)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        held = act()
        used.append(memory(most) - before)
        del held
    with contextlib.suppress(AttributeError):
        libc.mallopt(-3, 1 << 25)
    return min(used)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestStreaming:
    """Memory is taken tensor by tensor, whatever the format."""
    CONFIG = replace(SMALL, dim=768, n_layers=2, hidden_dim=3072, vocab_size=1024)
    LARGEST, SLACK = 4 * 3072 * 768, 15e6  # bytes in fp32; the kernel maps up to 2 MB at a time
    WRITERS = {"meta": save_meta, "hf": save_hf, "F32": save_gguf, "llama2c": save_llama2c,
               "Q8_0": partial(save_gguf, kind="Q8_0"), "shards": save_shards}

    @pytest.fixture(scope="class")
    @classmethod
    def saved(cls, tmp_path_factory):
        """{kind: path to load}; shards are of 16 bits, as all published ones."""
        folder, model = tmp_path_factory.mktemp("saved"), Llama.create(cls.CONFIG, 0)
        paths = {}
        for kind, writer in cls.WRITERS.items():
            paths[kind], _ = writer(folder / kind, model.to(BF16) if kind == "shards" else model)
        return paths

    @pytest.mark.parametrize("kind", WRITERS)
    def test_loading_takes_the_weights_and_one_tensor(self, saved, kind):
        used = peak_memory(partial(generate.load, saved[kind], dtype=BF16))
        temporary = 3 * self.LARGEST if kind == "Q8_0" else self.LARGEST  # in the package gguf
        assert used < 2 * self.CONFIG.n_params + temporary + self.SLACK  # a layer has 35 MB

    @pytest.mark.parametrize("kind", ["meta", "F32", "llama2c"])
    def test_mapped(self, saved, kind):
        assert peak_memory(partial(generate.load, saved[kind]), "RssAnon", "RssAnon") < 4e6

    def test_blocks_come_in_order_and_leave_memory(self, saved):
        seen = []

        def act():
            seen.clear()
            for name, tensors in generate.read_blocks(generate.open_checkpoint(saved["F32"])[1]):
                assert all(x.sum().isfinite() and x.device.type == "cpu" for x in tensors.values())
                seen.append(name)
        assert peak_memory(act) < 35e6 + self.SLACK  # of 77 MB
        assert seen == ["tok_embeddings", *(f"layers.{i}" for i in range(2)), "norm", "output"]

    def test_exporting_takes_one_tensor(self, saved, tmp_path):
        paths = iter("abc")

        def act():
            generate.export(saved["meta"], "hf", tmp_path / next(paths))
        assert peak_memory(act) < self.LARGEST + self.SLACK

    @pytest.mark.parametrize("kind", ["meta", "hf"])
    def test_a_fresh_process_loads_no_compiler_and_keeps_the_file(self, saved, kind):
        code = (f"import sys, {generate.__name__} as g; model = g.load({str(saved[kind])!r}); "
                "model.norm.weight.data.add_(1); sys.exit('torch._dynamo' in sys.modules)")
        before = generate.load(saved[kind]).norm.weight.clone()
        assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0
        assert torch.equal(generate.load(saved[kind]).norm.weight, before)


LITTLE = LlamaConfig(16, 2, 2, 1, 32, 19, 32)


def gguf_bytes(n_tensors, kind, rest, key=b"general.architecture"):
    """A GGUF file of one key, whose value and what comes behind it are `rest`."""
    head = struct.pack("<IQQQ", 3, n_tensors, 1, len(key)) + key
    return b"GGUF" + head + struct.pack("<I", kind) + rest


class TestMalformed:
    """A file that is damaged or lies is one line, takes no memory and executes nothing."""
    @pytest.fixture(scope="class")
    @classmethod
    def good(cls, tmp_path_factory):
        """{name: (path to load, file to spoil)} of small checkpoints in every format."""
        folder, model = tmp_path_factory.mktemp("good"), random_model(LITTLE)
        paths = {"gguf": (save_gguf, {"kind": "F16"}), "pt": (save_pt, {})}
        paths |= {f"bin{version}": (save_llama2c, {"version": version}) for version in (0, 1, 2)}
        for name, (writer, options) in paths.items():
            path, _ = writer(folder / name, model, **options)
            paths[name] = path, path
        meta, hf = folder / "meta", folder / "hf"
        save_meta(meta, model)
        generate.export(meta, "hf", hf)
        several, _ = save_hf(folder / "several", model, size="2KB")
        return paths | {"index": (several, several / "model.safetensors.index.json"),
                        "pth": (meta, meta / "consolidated.00.pth"),
                        "params": (meta, meta / "params.json"),
                        "safetensors": (hf, hf / "model.safetensors"),
                        "config": (hf, hf / "config.json")}

    @staticmethod
    def refused(path, file, data, must=True):
        """Loads `path` with `data` in one of its files: a model, or one line that says why not."""
        whole = file.read_bytes()
        file.unlink()  # a new file: the old one may be mapped
        file.write_bytes(data)
        try:
            model = generate.load(path)
            assert not must and isinstance(model, Llama)
        except (ValueError, OSError) as error:
            text = str(error)
            assert text and "\n" not in text and len(text) < 1000
            assert isinstance(error, OSError) or str(path) in text and "; try " in text, text
            return text
        finally:
            file.unlink()
            file.write_bytes(whole)

    ENTRIES = [  # changes of one tensor's entry
        {"dtype": "I64"}, {"dtype": []}, {"dtype": None}, {"shape": "19"}, {"shape": [16, 19]},
        {"shape": [-19, -16]}, {"shape": [19.0, 16.0]}, {"shape": [True, 304]},
        {"shape": [2**62, 2**62]}, {"shape": [2] * 10**5}, {"shape": [0, 16]},
        {"shape": [0, 16], "data_offsets": [0, 0]}, {"data_offsets": [10**9, 10**9 + 1216]},
        {"data_offsets": [-1216, 0]}, {"data_offsets": [1216, 0]}, {"data_offsets": [0, 1, 2]},
        {"data_offsets": [4, 1220]}, {"data_offsets": [1, 1217]}, {"data_offsets": [0, 1212]}]
    HEADERS = [  # other changes; a text takes the header's place
        *(lambda h, change=change: h["lm_head.weight"].update(change) for change in ENTRIES),
        lambda h: h["lm_head.weight"].pop("dtype") and None,
        lambda h: h.update({"lm_head.weight": 3}),
        lambda h: h.pop("lm_head.weight") and None, lambda h: h.update(x=h["lm_head.weight"]),
        lambda h: h.update({"norm.weight": h.pop("model.norm.weight")}),
        lambda h: h.update({"a\nb": h.pop("model.norm.weight")}),
        lambda h: "[]", lambda h: "{", lambda h: "[" * 10**5,
        lambda h: json.dumps(h)[:-1] + ', "model.norm.weight": {}}',
        lambda h: '{"a": ' + "9" * 5000 + "}"]

    @pytest.mark.parametrize("change", HEADERS)
    def test_safetensors(self, good, change):
        path, file = good["safetensors"]
        size, = struct.unpack("<Q", (whole := file.read_bytes())[:8])
        header = json.loads(whole[8:8 + size])
        text = (change(header) or json.dumps(header)).encode()
        text += b" " * (-len(text) % 8)
        self.refused(path, file, struct.pack("<Q", len(text)) + text + whole[8 + size:])

    NUMBERS = {  # (place in the file, its type in struct, values that lie)
        "safetensors": [(0, "Q", (0, 3, 10**4, 2**63))],
        "gguf": [(4, "I", (1, 0x03000000)), (8, "Q", (0, 2**63)), (16, "Q", (0, 2**64 - 1)),
                 (24, "Q", (0, 10**4, 2**62))],
        "bin0": [(4 * i, "i", (0, -1, 5, 2**31 - 1, -2**31)) for i in range(6)],
        "bin1": [(8 + 4 * i, "i", (0, -1, 5, 2**31 - 1, -2**31)) for i in range(6)],
        "bin2": [(4, "i", (3,)), (36, "B", (1,)), (37, "i", (0, -4, 7))]}

    @pytest.mark.parametrize("name", NUMBERS)
    def test_numbers_that_lie_and_files_cut_short(self, good, name):
        path, file = good[name]
        whole = file.read_bytes()
        for at, form, values in self.NUMBERS[name]:
            for value in values:
                number = struct.pack("<" + form, value)
                self.refused(path, file, whole[:at] + number + whole[at + len(number):])
        for data in (b"", whole[:4], whole[:8], whole[:30], whole[:100], whole[:-4]):
            self.refused(path, file, data)
        if name.startswith("bin"):
            self.refused(path, file, whole + b"0000")

    @pytest.mark.parametrize("data", [*(gguf_bytes(1, kind, value) for kind, value in (
        (9, struct.pack("<IQ", 9, 2**40)), (9, struct.pack("<IQ", 8, 2**60)),
        (9, struct.pack("<IQ", 0, 2**60)), (9, struct.pack("<IQ", 77, 1)), (8, b"\xff" * 8),
        (9, struct.pack("<IQ", 9, 1) * 2000), (77, b""), (4, b""))), *(
        gguf_bytes(1, 8, struct.pack("<Q5sQs", 5, b"llama", 1, b"x")
             + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset) + bytes(200))
        for dims, kind, offset in (
            ([2**63, 2], 0, 0), ([2**63] * 10**6, 0, 0), ([2**32, 2**32], 2, 0), ([16] * 5, 0, 0),
            ([16], 99, 0), ([], 0, 0),
            ([16], 0, 2**63), ([15], 2, 0), ([0], 0, 0), ([16], 0, 1), ([2**40], 8, 0)))], ids=len)
    def test_gguf_values_and_tensors(self, tmp_path, data):
        (tmp_path / "m").write_bytes(gguf_bytes(0, 8, struct.pack("<Q", 9) + b"cut shor"))
        with pytest.raises(ValueError, match="beyond the file's end"):
            generate.gguf_fields(tmp_path / "m")
        self.refused(tmp_path / "m", tmp_path / "m", data)

    @pytest.mark.parametrize("values", [
        [], {"model": {}}, {"model": [1], "model_args": {}}, {"model": {"a": 3}, "model_args": {}},
        {"model": {}, "model_args": {"dim": 16}}, {1: torch.zeros(2)}, {"model": {}, "x": None},
        {"model_args": {"dim": 16, "moe": 3}, "model": {"norm.weight": torch.zeros(16)}},
        {"tok_embeddings.weight": torch.zeros(1).expand(10**9, 16)},
        {"norm.weight": torch.zeros(16, device="meta")},
        {"norm.weight": torch.zeros(16, 16).to_sparse()}, {"norm.weight": torch.zeros(16, 16).T}])
    def test_pickles(self, good, values):
        for name in ("pt", "pth"):
            path, file = good[name]
            data = io.BytesIO()
            torch.save(values, data)
            self.refused(path, file, data.getvalue())

    @pytest.mark.parametrize("text", ["", "[]", "3", "{", "null", '{"dim": 16}', "[" * 10**5,
                                      '{"model_type": "llama", "model_type": "llama"}', "\x00",
                                      '{"model_type": "llama", "rope_scaling": [1]}',
                                      '{"weight_map": {"a": "../../../etc/passwd"}}', *(
        json.dumps(generate.write_params(LITTLE) | change) for change in (
            {"dim": "48"}, {"multiple_of": 0}, {"n_layers": 10**9}, {"moe": {}}, {"n_heads": None},
            {"dim": 10**400}, {"ffn_dim_multiplier": math.nan}, {"norm_eps": "x"}))])
    def test_json(self, good, text):
        for name in ("params", "config", "index"):
            self.refused(*good[name], text.encode())

    @pytest.mark.parametrize("name", ["safetensors", "gguf", "pt", "pth", "bin0", "bin1", "bin2",
                                      "params", "config", "index"])
    def test_any_bytes_changed(self, good, name):
        import resource
        path, file = good[name]
        whole, chance = file.read_bytes(), random.Random(0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tracemalloc.start()
        for _ in range(25):
            data = bytearray(whole)
            where = len(data) if chance.random() < 0.3 else min(len(data), 2000)  # mostly headers
            for _ in range(chance.choice([1, 1, 2, 8])):
                data[chance.randrange(where)] = chance.choice([0, 1, 34, 127, 255])
            if chance.random() < 0.2:
                del data[chance.randrange(len(data)):]
            self.refused(path, file, bytes(data), must=False)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 30e6
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB
