"""Files that hold weights: the section of generate.py."""
import ctypes
import json
import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama import SIZES, Llama, LlamaConfig, rope_frequencies, rope_table
from tokenizer import one_line_errors, read_json, write_aside, write_json

# ---------------------------------------------------------------------------------------------
# Files that hold weights


class Weight(NamedTuple):
    """A tensor still in its file: decode(*parts) of the parts that are mapped from there. So a
    checkpoint of any size is opened at once, and memory is taken as each tensor is read."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Tensor, ...]
    decode: Callable[..., Tensor] = lambda part: part

    @classmethod
    def of(cls, mapped: Tensor) -> "Weight":
        return cls(tuple(mapped.shape), mapped.dtype, (mapped,))

    def read(self, device="cpu", dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on a device; a view of the file where nothing has to be converted."""
        x = self.decode(*self.parts).to(device, dtype or self.dtype).reshape(self.shape)
        if self.parts and x.data_ptr() != self.parts[0].data_ptr():
            self.drop_pages()
        return x

    def drop_pages(self) -> None:
        """Takes the file's pages out of this process's memory; their next use reads them again."""
        for part in self.parts:
            before = part.data_ptr() % mmap.PAGESIZE
            if hasattr(mmap, "MADV_DONTNEED"):  # Linux and macOS
                ctypes.CDLL(None).madvise(ctypes.c_void_p(part.data_ptr() - before),
                                          ctypes.c_size_t(part.nbytes + before), mmap.MADV_DONTNEED)

    def permuted_for_rope(self, n: int, m: int) -> "Weight":
        """wq or wk with the rows of each head, (n, m), transposed to (m, n). Meta's heads hold the
        two rows of a rotated pair side by side (E/2, 2), transformers' the first rows of all pairs,
        then the second ones (2, E/2). For E = 4, Meta's 0 1 2 3 is 0 2 1 3 there."""
        def decode(*parts: Tensor) -> Tensor:
            return self.decode(*parts).reshape(-1, n, m, self.shape[-1]).transpose(1, 2)
        return self._replace(decode=decode)


def equal(a: Weight, b: Weight) -> bool:
    """Do two weights hold the same numbers?"""
    return a.shape == b.shape and torch.equal(a.read(), b.read(dtype=a.dtype))


Checkpoint = tuple[LlamaConfig, dict[str, Weight]]  # weights by Meta's names
# By the names of safetensors; tensors of other types are refused.
DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)
NAMES = {  # Meta's: (transformers', GGUF's), in the order of llama2.c's version 0
    "tok_embeddings": ("model.embed_tokens", "token_embd"),
    "layers.{}.attention_norm": ("model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    "layers.{}.attention.wq": ("model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    "layers.{}.attention.wk": ("model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    "layers.{}.attention.wv": ("model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    "layers.{}.attention.wo": ("model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    "layers.{}.ffn_norm": ("model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    "layers.{}.feed_forward.w1": ("model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    "layers.{}.feed_forward.w2": ("model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
    "layers.{}.feed_forward.w3": ("model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    "norm": ("model.norm", "output_norm"), "output": ("lm_head", "output")}
PERMUTED = ("wq.weight", "wk.weight")  # their rows have another order in transformers
# Tables of frequencies, which llama.py computes.
IGNORED = ("rope.freqs", "rotary_emb.inv_freq", "rope_freqs.weight", "rope.cos", "rope.sin")


def meta_names(config: LlamaConfig, column: int) -> dict[str, str]:
    """{name in a column of NAMES: Meta's name} of every weight, each kind over all layers."""
    names = {}
    for ours, theirs in NAMES.items():
        for i in range(config.n_layers):
            names[f"{theirs[column].format(i)}.weight"] = f"{ours.format(i)}.weight"
    return names


def renamed(config: LlamaConfig, table: dict[str, Weight], column: int) -> dict[str, Weight]:
    """Weights by Meta's names, from the names in a column of NAMES."""
    ours = meta_names(config, column)
    return {ours.get(name, f"unknown {name}"): weight for name, weight in table.items()}


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by its name, in the order of the model."""
    with torch.device("meta"):  # takes no memory
        return {name: tuple(w.shape) for name, w in Llama(config).named_parameters()}


def map_file(path: Path) -> mmap.mmap:
    """The bytes of a file, read when they are used; changes to them stay in memory."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def tensor_at(data: mmap.mmap, name: str, dtype: torch.dtype, shape, start: int) -> Tensor:
    """The tensor at a byte of a mapped file; ValueError if it does not lie in it."""
    count = math.prod(shape[:3])
    if len(shape) > 2 or count == 0:
        raise ValueError(f"{name:.99} is empty or has over 2 axes; try a Llama saved in one piece")
    if not start <= start + count * dtype.itemsize <= len(data):
        raise ValueError(f"{name:.99} lies beyond the file's end: cut short; try to fetch it again")
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start).view(shape)


def refuse_unless(values: dict, accepted: dict[str, tuple]) -> None:
    """ValueError for an option that is not implemented: a value that is not among the accepted."""
    for name, allowed in accepted.items():
        if values.get(name) not in allowed:
            raise ValueError(f"{name}={values.get(name)!r:.99} is not implemented, only "
                             f"{allowed[-1]!r}; try a plain Llama")


def read_pickle(path: Path) -> dict:
    """The dictionary in a file of torch.save, its tensors mapped; nothing in it is executed."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{path.name} is damaged, or holds more than tensors, which could run "
                         f"code ({error!r:.99}); try a file of weights alone") from None


def weights_of(table: dict[str, Tensor]) -> dict[str, Weight]:
    """The weights in a table of mapped tensors; ValueError for any other entry."""
    weights = {}
    for name, w in table.items():
        if not (w.dtype in DTYPES.values() and w.layout is torch.strided
                and w.device.type == "cpu" and w.is_contiguous()):
            raise ValueError(f"{name:.99} is of {w.dtype}, or not contiguous; try to save floats")
        name = name.removeprefix("_orig_mod.").removeprefix("module.")  # torch.compile's, DDP's
        weights[name] = Weight.of(w.detach())
    return weights


def write_params(config: LlamaConfig) -> dict:
    """Meta's params.json. It has no field for F: the last two give any F in Meta's formula."""
    params = {name: value for name, value in asdict(config).items() if value is not None}
    del params["tie_embeddings"]
    if factor := params.pop("rope_scaling", None):
        params |= {"use_scaled_rope": True, "rope_scaling_factor": factor}
    hidden_dim = params.pop("hidden_dim")
    return {**params, "multiple_of": hidden_dim,
            "ffn_dim_multiplier": min(1, hidden_dim / int(8 * config.dim / 3))}


def read_params(params: dict, weights: dict[str, Weight]) -> LlamaConfig:
    """The config from Meta's params.json and the weights. F = the next multiple of multiple_of
    from int(ffn_dim_multiplier * int(8 D / 3)); 7B: D = 4096 and multiple_of = 256 give 10922 ->
    11008. What params.json does not say (context, factor of the frequencies) is that of the size
    in SIZES with this shape."""
    values = {"n_kv_heads": params["n_heads"], "max_seq_len": 2048, "ffn_dim_multiplier": 1}
    values |= {name: value for name, value in params.items() if value is not None}
    hidden = int(values.pop("ffn_dim_multiplier") * int(8 * values["dim"] / 3))
    multiple_of = values.pop("multiple_of")
    values.setdefault("hidden_dim", -(-hidden // multiple_of) * multiple_of)
    embedding, output = weights["tok_embeddings.weight"], weights.get("output.weight")
    values["vocab_size"] = embedding.shape[0]  # params.json of LLaMA 1 and 2 says -1
    values["tie_embeddings"] = output is None or equal(output, embedding)
    scaled, factor = values.pop("use_scaled_rope", False), values.pop("rope_scaling_factor", None)
    if scaled:
        values["rope_scaling"] = factor or 8.0
    for name in ("dropout", "max_batch_size"):  # which do not change the function
        values.pop(name, None)
    config = LlamaConfig.from_dict(values)
    for size, _ in SIZES.values():
        like = replace(config, max_seq_len=size.max_seq_len, rope_scaling=size.rope_scaling)
        if like == size and bool(scaled) == bool(size.rope_scaling):
            return replace(size, max_seq_len=params.get("max_seq_len", size.max_seq_len),
                           rope_scaling=factor or size.rope_scaling)
    return config


def merged(name: str, parts: tuple[Tensor, ...], params: dict) -> Weight:
    """One weight of its parts in all shards: rows below each other, but columns side by side for
    wo, w2 and the embedding of LLaMA 1 and 2. Norms are equal in all shards, and so are the wk and
    wv of neighbours where there are more shards than key/value heads."""
    kind, shape = name.removesuffix(".weight").split(".")[-1], list(parts[0].shape)
    if kind in ("wk", "wv"):
        parts = parts[::max(1, len(parts) // (params.get("n_kv_heads") or params["n_heads"]))]
    if len(parts) == 1 or len(shape) == 1:
        return Weight.of(parts[0])
    if any(list(part.shape) != shape for part in parts):
        raise ValueError(f"the shards hold {name} in different shapes; try to fetch them")
    axis = int(kind in ("wo", "w2") or kind == "tok_embeddings" and shape[1] < params["dim"])
    shape[axis] *= len(parts)
    return Weight(tuple(shape), parts[0].dtype, parts, lambda *parts: torch.cat(parts, axis))


def read_meta(folder: Path) -> Checkpoint:
    """Meta's folder (LLaMA 1, 2, 3 and our own runs), any number of shards."""
    params, shards, weights = read_json((folder / "params.json").read_bytes()), [], {}
    while (file := folder / f"consolidated.{len(shards):02}.pth").is_file():
        shards.append(weights_of(read_pickle(file)))
    wanted = 1
    if shards:  # the columns of wo are split over all shards that there were
        width = params["n_heads"] * params.get("head_size", params["dim"] // params["n_heads"])
        wanted = width // shards[0]["layers.0.attention.wo.weight"].shape[1]
    if len(shards) < wanted:
        raise ValueError(f"{file.name} is missing; try to fetch it")
    for name in list(shards[0]):
        weights[name] = merged(name, tuple(shard.pop(name).parts[0] for shard in shards), params)
    if any(shards):
        raise ValueError("the shards hold different tensors; try to fetch them again")
    return read_params(params, weights), weights


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Mapped tensors by name. The file: the header's length as a uint64, the header in JSON,
    {name: {"dtype", "shape", "data_offsets": [begin, end]}}, and the bytes that it describes."""
    data, tensors, begin = map_file(path), {}, 0
    size, = struct.unpack_from("<Q", data)
    if size > min(len(data) - 8, 10**8):  # the limit of its own library
        raise ValueError(f"the header of {path.name} lies beyond the file's end: cut short")
    header = read_json(data[8:8 + size])
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = entry["dtype"]
        if dtype not in DTYPES:
            raise ValueError(f"{name:.99} is of type {dtype}; try one of {', '.join(DTYPES)}")
        x = tensor_at(data, name, DTYPES[dtype], entry["shape"], 8 + size + begin)
        if entry["data_offsets"] != [begin, begin + x.nbytes]:
            raise ValueError(f"{name:.99} does not lie where the one before it ends")
        tensors[name] = x
        begin += x.nbytes
    return tensors


HF_FIELDS = {"hidden_size": "dim", "num_hidden_layers": "n_layers",
             "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads",
             "intermediate_size": "hidden_dim", "vocab_size": "vocab_size",
             "max_position_embeddings": "max_seq_len", "rms_norm_eps": "norm_eps",
             "tie_word_embeddings": "tie_embeddings", "head_dim": "head_size",
             "rope_theta": "rope_theta"}
HF_ONLY = {"model_type": ("llama",), "hidden_act": (None, "silu"), "attention_bias": (None, False),
           "mlp_bias": (None, False), "sliding_window": (None,), "quantization_config": (None,),
           "num_local_experts": (None,), "partial_rotary_factor": (None, 1),
           "rope_type": (None, "default", "llama3"), "type": (None, "default", "llama3"),
           "low_freq_factor": (None, 1.0), "high_freq_factor": (None, 4.0),
           "original_max_position_embeddings": (None, 8192)}


def read_hf_config(values: dict) -> LlamaConfig:
    """The config in config.json. Frequencies: rope_theta and rope_scaling of transformers 4, or
    rope_parameters of 5. What a file leaves out has transformers' default."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    values = {name: value for name, value in {**values, **rope}.items() if value is not None}
    refuse_unless(values, HF_ONLY)
    config = {"n_kv_heads": values["num_attention_heads"], "norm_eps": 1e-6,
              "max_seq_len": values.get("max_sequence_length", 2048)}
    config |= {ours: values[theirs] for theirs, ours in HF_FIELDS.items() if theirs in values}
    if "llama3" in (rope.get("rope_type"), rope.get("type")):
        config["rope_scaling"] = rope["factor"]
    return LlamaConfig.from_dict(config)


def hf_files(folder: Path) -> list[Path]:
    """The files that transformers would load from a folder, whatever stands beside them."""
    for whole in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index = folder / f"{whole.name}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            names = set(read_json(index.read_bytes())["weight_map"].values())
            return [folder / Path(name).name for name in sorted(names)]
    return []


def read_hf(folder: Path, file: Path | None = None) -> Checkpoint:
    """A folder of transformers, or one file of it, which may be part of a model."""
    config, table = read_hf_config(read_json((folder / "config.json").read_bytes())), {}
    files = hf_files(folder)
    if file and file not in files:
        files = [file]
    for path in files:
        read = read_pickle if map_file(path)[:2] == b"PK" else read_safetensors
        table |= weights_of(read(path))
    weights = renamed(config, table, 0)
    for name in weights:
        if name.endswith(PERMUTED):
            weights[name] = weights[name].permuted_for_rope(2, config.head_dim // 2)
    return config, weights


GGUF_TEXT, GGUF_ARRAY = 8, 9  # types of values
GGUF_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # types: struct's codes
GGUF_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
GGUF_FIELDS = {"embedding_length": "dim", "block_count": "n_layers",
               "attention.head_count": "n_heads", "attention.head_count_kv": "n_kv_heads",
               "feed_forward_length": "hidden_dim", "context_length": "max_seq_len",
               "attention.layer_norm_rms_epsilon": "norm_eps", "rope.freq_base": "rope_theta",
               "attention.key_length": "head_size"}


def take(data: mmap.mmap, form: str) -> tuple:
    """The next values of a header, by struct's codes; ValueError beyond the end of the file."""
    size = struct.calcsize("<" + form)
    if size > len(data) - data.tell():
        raise ValueError("the header lies beyond the file's end: cut short; try to fetch it again")
    return struct.unpack("<" + form, data.read(size))


def take_value(data: mmap.mmap, kind: int):
    """The next value of a GGUF's key, by the number of its type."""
    if kind == GGUF_TEXT:
        return take(data, f"{take(data, 'Q')[0]}s")[0].decode()
    if kind == GGUF_ARRAY:
        kind, n = take(data, "IQ")
        if kind in GGUF_NUMBERS:
            return list(take(data, f"{n}{GGUF_NUMBERS[kind]}"))
        return [take_value(data, kind) for _ in range(n)]
    number, = take(data, GGUF_NUMBERS[kind])
    return float(str(np.float32(number))) if kind == 6 else number  # fp32's 1e-5, not 9.99e-6


def read_gguf_header(data: mmap.mmap) -> tuple[dict, dict[str, tuple]]:
    """(values by key, (shape, ggml type, offset) by name) of version 2 and 3, little-endian; the
    mapped file then stands at the header's end."""
    (_, version, n_tensors, n_keys), keys, tensors = take(data, "IIQQ"), {}, {}
    if version not in (2, 3) or max(n_tensors, n_keys) > 2**20:
        raise ValueError(f"GGUF of version {version} with {n_tensors} tensors is not known; try "
                         "a little-endian one of version 3")
    for _ in range(n_keys):
        key = take_value(data, GGUF_TEXT)
        keys[key] = take_value(data, *take(data, "I"))
    for _ in range(n_tensors):
        name, (n_axes,) = take_value(data, GGUF_TEXT), take(data, "I")
        shape = take(data, f"{n_axes}Q")[::-1]  # the fastest axis stands first
        tensors[name] = (shape, *take(data, "IQ"))
    return keys, tensors


def gguf_fields(path: Path) -> dict | None:
    """What a GGUF file says by key, its vocabulary too; None for any other file."""
    with one_line_errors(path):
        data = map_file(path)
        return read_gguf_header(data)[0] if data[:4] == b"GGUF" else None


def gguf_weight(data: mmap.mmap, name: str, shape, kind: int, start: int) -> Weight:
    """A tensor of one of ggml's types: F32, F16 and BF16 are mapped, the others are in blocks that
    the package gguf decodes to fp32."""
    if kind in GGUF_DTYPES:
        return Weight.of(tensor_at(data, name, GGUF_DTYPES[kind], shape, start))
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
        kind = GGMLQuantizationType(kind)
        block, size = GGML_QUANT_SIZES[kind]
        quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except (ImportError, ValueError, NotImplementedError):
        raise ValueError(f"tensors of ggml's type {int(kind)} need the package gguf, if it knows "
                         "them; try pip install -U gguf") from None
    if shape[-1] % block:
        raise ValueError(f"{name:.99} has no whole blocks of {kind.name}")
    raw = tensor_at(data, name, torch.uint8, (*shape[:-1], shape[-1] // block * size), start)
    return Weight(shape, torch.float32, (raw,),
                  lambda raw: torch.from_numpy(quants.dequantize(raw.numpy(), kind)))


def read_gguf(path: Path) -> Checkpoint:
    """GGUF, of llama.cpp, whose wq and wk have Meta's order. Llama 3.1's frequencies are in it as
    the numbers by which they are divided."""
    data, weights = map_file(path), {}
    keys, tensors = read_gguf_header(data)
    refuse_unless(keys, {"general.architecture": ("llama",), "split.count": (None, 0, 1)})
    alignment = keys.get("general.alignment", 32)
    end = -(-data.tell() // alignment) * alignment
    for name, (shape, kind, offset) in tensors.items():
        weights[name] = gguf_weight(data, name, shape, kind, end + offset)
    keys = {name[6:]: value for name, value in keys.items() if name.startswith("llama.")}
    values = {"n_kv_heads": keys["attention.head_count"],
              "vocab_size": weights["token_embd.weight"].shape[0],
              "tie_embeddings": "output.weight" not in weights}
    for theirs in GGUF_FIELDS.keys() & keys.keys():
        values[GGUF_FIELDS[theirs]] = keys.pop(theirs)
    config = LlamaConfig.from_dict(values)
    plain = {"vocab_size": keys.get("vocab_size"), "rope.dimension_count": config.head_dim,
             "attention.value_length": config.head_dim, "rope.scaling.type": "none",
             "tensor_data_layout": "Meta AI original pth"}
    refuse_unless(keys, {name: (0, 1, plain.get(name)) for name in keys})
    if "rope_freqs.weight" in weights:
        divisors = weights["rope_freqs.weight"].read(dtype=torch.float32)
        scaled = replace(config, rope_scaling=float(divisors.max()))
        wanted = rope_frequencies(config) / rope_frequencies(scaled)
        if wanted.shape != divisors.shape or not torch.allclose(wanted, divisors, rtol=1e-3):
            raise ValueError("rope_freqs.weight is not Llama 3.1's scaling; try a Llama of Meta's")
        config = scaled
    return config, renamed(config, weights, 1)


def llama2c_order(config: LlamaConfig, version: int) -> list[str]:
    """The tensors in the order of the file, each kind over all layers; 1 and 2 have norms first."""
    names = list(meta_names(config, 0).values())
    if config.tie_embeddings:
        names.remove("output.weight")
    if version:
        return sorted(names, key=lambda name: "norm" not in name)
    end = names.index("norm.weight") + 1
    return [*names[:end], "rope.cos", "rope.sin", *names[end:]]


def read_llama2c(path: Path) -> Checkpoint:
    """llama2.c's .bin. Version 0 begins with D, F, L, H, K, V (negative: the output is not tied)
    and the context as int32; 1 and 2 with a magic number, the version, the same seven, whether
    the output is tied, and in 2 how many int8 share a scale, in 256 bytes."""
    data, version, at, weights = map_file(path), 0, 28, {}
    if data[:4] == b"24ka":
        version, at = struct.unpack_from("<i", data, 4)[0], 256
        refuse_unless({"llama2.c's version": version}, {"llama2.c's version": (1, 2)})
    dim, hidden, layers, heads, kv_heads, vocab, context, shared, group = struct.unpack_from(
        "<7iBi", data, 8 if version else 0)
    tied = bool(shared) if version else vocab > 0
    config = LlamaConfig(dim, layers, heads, kv_heads, hidden, abs(vocab), context,
                         tie_embeddings=tied)
    wanted = shapes(config)
    for name in llama2c_order(config, version):
        shape = wanted.get(name, (context, config.head_dim // 2))  # the tables of cos and sin
        if version == 2 and len(shape) == 2:
            int8 = tensor_at(data, name, torch.int8, shape, at).view(-1, group)
            scales = tensor_at(data, name, torch.float32, (len(int8), 1), at + int8.nbytes)
            weights[name] = Weight(shape, torch.float32, (int8, scales), torch.mul)
            at += int8.nbytes + scales.nbytes
        else:
            weights[name] = Weight.of(tensor_at(data, name, torch.float32, shape, at))
            at += 4 * math.prod(shape)
    if at != len(data):
        raise ValueError(f"it is no llama2.c file, whose header would ask for {at:,} bytes; try a "
                         "folder of Meta's or transformers', a GGUF file or llama2.c's .bin")
    return config, weights


def read_any(path: Path) -> Checkpoint:
    """Chooses the reader by content, never by name."""
    if path.is_dir():
        if hf_files(path):
            return read_hf(path)
        if (path / "params.json").is_file():
            return read_meta(path)
        raise ValueError("there is no checkpoint (an adapter alone is none); try a folder of "
                         "Meta's or transformers', a GGUF file or llama2.c's .bin")
    head = map_file(path)[:9]
    if head[:4] == b"GGUF":
        return read_gguf(path)
    if head[:1] == b"{":
        return read_any(path.parent)
    if head[:2] == b"PK":
        table = read_pickle(path)
        if "model_args" in table:  # llama2.c's .pt
            weights = weights_of(table["model"])
            return read_params({"multiple_of": 256, **table["model_args"]}, weights), weights
        if "tok_embeddings.weight" in table:
            return read_meta(path.parent)
        return read_hf(path.parent, path)
    if head[8:] == b"{":
        return read_hf(path.parent, path)
    return read_llama2c(path)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The config and the weights, still in their files, of any checkpoint, in the model's order.
    Strict: an unknown or missing tensor or a wrong shape is a ValueError that names it, as is
    whatever is damaged or asks for what is not implemented."""
    with one_line_errors(path):
        config, found = read_any(Path(path))
        output = found.get("output.weight") if config.tie_embeddings else None
        if output and equal(output, found["tok_embeddings.weight"]):
            del found["output.weight"]  # some files of tied models have it twice
        wanted, wrong = shapes(config), []
        for name in wanted | found:
            shape = found[name].shape if name in found else "missing"
            if shape != wanted.get(name) and not name.endswith(IGNORED):
                wrong.append(f"{name:.99} is {shape}, not {wanted.get(name, 'known')}")
        if wrong:
            raise ValueError(f"not the Llama of its header ({len(wrong)} tensors): "
                             f"{', '.join(wrong[:3])}; try the files as they were published")
        return config, {name: found[name] for name in wanted}


def read_blocks(weights: dict[str, Weight], device="cpu", dtype: torch.dtype | None = None
                ) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields (name of a submodule of Llama, {name of a parameter in it: tensor}): the embedding,
    each layer, the norm, the output unless it is tied.
    dtype None keeps each weight's type; then the tensors are views of the file. When the next block
    is asked for, the pages of the last one leave memory: whoever makes something else of each block
    (quantises it) holds one block in the file's form at a time."""
    blocks = {}
    for name, weight in weights.items():
        block = re.match(r"layers\.\d+|\w+", name)[0]
        blocks.setdefault(block, {})[name.removeprefix(f"{block}.")] = weight
    for block, parameters in blocks.items():
        yield block, {name: w.read(device, dtype) for name, w in parameters.items()}
        for weight in parameters.values():
            weight.drop_pages()


def load(path: str | Path, device="cpu", dtype: torch.dtype | None = None) -> Llama:
    """The model in any checkpoint, mapped from its file where nothing has to be converted; dtype
    None keeps the file's, that of its embedding."""
    config, weights = open_checkpoint(path)
    with torch.device("meta"):
        model = Llama(config)
    dtype = dtype or weights["tok_embeddings.weight"].dtype
    for name, tensors in read_blocks(weights, device, dtype):
        model.get_submodule(name).load_state_dict(tensors, assign=True)
    return model.eval()


def write_tensor(file, weight: Weight, dtype: torch.dtype) -> None:
    """The bytes of a weight, which then leaves memory."""
    file.write(weight.read(dtype=dtype).flatten().view(torch.uint8).numpy())
    weight.drop_pages()


def write_safetensors(file, weights: dict[str, Weight]) -> None:
    """A safetensors file, tensor by tensor."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    codes = {dtype: code for code, dtype in DTYPES.items()}
    for name, w in weights.items():
        end = at + math.prod(w.shape) * w.dtype.itemsize
        header[name] = {"dtype": codes[w.dtype], "shape": w.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    file.write(struct.pack("<Q", len(text)) + text)
    for w in weights.values():
        write_tensor(file, w, w.dtype)


def write_meta(config: LlamaConfig, weights: dict[str, Weight], folder: Path) -> None:
    """Meta's folder. torch.save wants all tensors at once: they are mapped from a file aside."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / "weights.aside"
    try:
        write_aside(aside, lambda file: write_safetensors(file, weights))
        write_aside(folder / "consolidated.00.pth",
                    lambda file: torch.save(read_safetensors(aside), file))
    finally:
        aside.unlink(missing_ok=True)
    write_json(folder / "params.json", write_params(config))


def write_hf(config: LlamaConfig, weights: dict[str, Weight], folder: Path) -> None:
    """The folder that transformers loads, its frequencies in the form that 4 and 5 both read."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {}
    for theirs, ours in meta_names(config, 0).items():
        if ours in weights:  # the output is not, if it is tied
            table[theirs] = weights[ours]
        if ours.endswith(PERMUTED):
            table[theirs] = weights[ours].permuted_for_rope(config.head_dim // 2, 2)
    write_aside(folder / "model.safetensors", lambda file: write_safetensors(file, table))
    values = {name: getattr(config, ours) for name, ours in HF_FIELDS.items()}
    if config.rope_scaling:
        values["rope_scaling"] = {
            "rope_type": "llama3", "factor": config.rope_scaling, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    dtype = str(weights["tok_embeddings.weight"].dtype).removeprefix("torch.")
    write_json(folder / "config.json", values | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "head_dim": config.head_dim, "torch_dtype": dtype,
        "bos_token_id": None, "eos_token_id": None})  # which only the tokenizer knows


def write_llama2c(config: LlamaConfig, weights: dict[str, Weight], path: Path) -> None:
    """llama2.c's .bin of version 0, in fp32; ValueError for what it has no field for."""
    plain = replace(config, rope_theta=1e4, rope_scaling=None, norm_eps=1e-5, head_size=None)
    if config != plain:
        raise ValueError("llama2.c's header has no rope_theta, rope_scaling, norm_eps or head_size "
                         "and takes LLaMA's; try the format meta or hf")
    cos, sin = rope_table(config, torch.arange(config.max_seq_len))
    tables = {"rope.cos": cos, "rope.sin": sin}
    vocab = config.vocab_size if config.tie_embeddings else -config.vocab_size

    def write(file) -> None:
        file.write(struct.pack("<7i", config.dim, config.hidden_dim, config.n_layers,
                               config.n_heads, config.n_kv_heads, vocab, config.max_seq_len))
        for name in llama2c_order(config, 0):
            if name in tables:
                file.write(tables[name].numpy())
            else:
                write_tensor(file, weights[name], torch.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, write)


EXPORTS = {"meta": write_meta, "hf": write_hf, "llama2c": write_llama2c}


def export(path: str | Path, format: str, out: str | Path) -> None:
    """Writes any checkpoint in another format, tensor by tensor: a folder of Meta's ("meta") or of
    transformers ("hf"), or a file of llama2.c ("llama2c"). Numbers keep their type; quantised
    ones, and all in llama2.c, are fp32."""
    out = Path(out)
    if format not in EXPORTS:
        raise ValueError(f"there is no format {format!r}; try one of {', '.join(EXPORTS)}")
    if out.is_dir() and any(out.iterdir()) or out.exists() and not out.is_dir():
        raise ValueError(f"{out} exists already and stays as it is; try another name")
    EXPORTS[format](*open_checkpoint(path), out)
