"""Training: text, recipe, state, and a line that shows how it goes (LLaMA, sections 2.1 to 2.4).

    python train.py                                 # `tiny` on Python's own library, 5 minutes
    python train.py --data book.txt notes/ --minutes 20                             # your text
    python train.py --size 7b --data corpus/ --tokenizer tokenizer.model
    python train.py --size stories15m --bench 5     # speed alone, on random tokens

The same command goes on where it stopped. DIR (runs/SIZE) then holds params.json,
consolidated.00.pth and tokenizer.model (for generate.py), log.jsonl, loss.svg, state/ and tokens/.
"""
import argparse
import bisect
import collections
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePath

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from generate import (DTYPES, Sampling, best_device, check_compiler, keep_freed_memory, positive,
                      sample_texts)
from llama import (ATTENTION, BACKWARD, SIZES, Llama, LlamaConfig, Recipe, rope_table,
                   rows_at_once, save_meta, write_aside)
from tokenizer import (Parser, command, documents, load_tokenizer, prepare, standard_library,
                       survey, train_sentencepiece, training_text)

TABLE_1 = {"commoncrawl": 67.0, "c4": 15.0, "github": 4.5, "wikipedia": 4.5, "books": 4.5,
           "arxiv": 2.5, "stackexchange": 2.0}  # sampling proportions in percent (LLaMA, Table 1)
EVAL_TOKENS, FINAL_EVAL_TOKENS = 2**15, 2**21  # held-out tokens read on the way, and at the end
BAD_STEPS = 5  # non-finite steps in a row that stop a run

# Of a GPU's data sheet: a part of what the driver calls it, bytes, watts, FLOP/s of dense products
# in bf16, bytes/s that it sends inside a node of 8 and, by a network card of its own, between them.
Device = collections.namedtuple("Device", "name memory watts flops inside between")
GPUS = {"A100": Device("A100", 80e9, 400, 312e12, 300e9, 25e9),
        "A100-40GB": Device("A100", 40e9, 400, 312e12, 300e9, 25e9),
        "H100": Device("H100 80GB HBM3", 80e9, 700, 989e12, 450e9, 50e9),
        "H200": Device("H200", 141e9, 700, 989e12, 450e9, 50e9),
        "RTX 4090": Device("RTX 4090", 24e9, 450, 165e12, 32e9, 3e9)}
NODE = 8
COMPUTING = 0.5  # of that FLOP/s, while nothing is waited for; LLaMA's 65B had 0.48 in all

# ---------------------------------------------------------------------------------------------
# Batches (section 2.1)


class Batches:
    """Sequences from memory-mapped token shards. There is no loader state: sequence i of step s is
    a function of (seed, s, i) and the shards alone.

    Sequence number g = s n + i is at the point u_g = frac(u_0 + g phi) of the unit interval, phi
    the golden ratio. The interval is divided among the sources by their weights, and within its
    part u says where in the source the sequence begins. Steps of phi spread points best: each
    source has its weight, and all but some 14 % of it is read in an epoch, the rest in the next.
    """

    def __init__(self, folder: Path, sources: list[dict], seq_len: int, batch_tokens: int,
                 seed: int):
        self.seq_len, self.rows = seq_len, batch_tokens // seq_len  # T and N
        self.first = int.from_bytes(hashlib.sha256(f"batches {seed}".encode()).digest()[:8], "big")
        self.sources = sources
        try:
            self.train, self.val = ([np.memmap(folder / f"{source['name']}.{split}.bin", mode="r",
                                               shape=source[f"{split}_tokens"],
                                               dtype=source["dtype"]) for source in sources]
                                    for split in ("train", "val"))
        except (KeyError, TypeError, ValueError, OverflowError, OSError):
            raise ValueError(f"the token shards in {folder} are damaged; try --fresh") from None
        for source, tokens in zip(sources, self.train):
            if len(tokens) <= seq_len:
                raise ValueError(f"{source['path']} has {len(tokens)} tokens and a sequence needs "
                                 f"{seq_len + 1}; try more text or a smaller --seq-len")
        sizes = [source["weight"] or len(t) for source, t in zip(sources, self.train)]
        self.edges = [round(2**64 * sum(sizes[:k]) / sum(sizes)) for k in range(len(sizes) + 1)]

    def sequence(self, number: int) -> np.ndarray:
        """The T + 1 tokens of sequence g, counted over the whole run."""
        u = (self.first + number * 0x9E3779B97F4A7C15) % 2**64  # 2**64 / golden ratio
        k = bisect.bisect_right(self.edges, u) - 1
        places = len(self.train[k]) - self.seq_len
        start = (u - self.edges[k]) * places // (self.edges[k + 1] - self.edges[k])
        return self.train[k][start:start + self.seq_len + 1]

    def step(self, step: int) -> Tensor:
        """The batch of a step: (N, T + 1)."""
        rows = [self.sequence(step * self.rows + i) for i in range(self.rows)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def held_out(self, limit: int) -> list[tuple[float, list[np.ndarray]]]:
        """Per source: bytes of text a token stands for, and windows of up to T + 1 tokens spread
        evenly over what was held out, of about `limit` tokens in all."""
        every = [range(0, len(tokens) - 1, self.seq_len)[::-(-len(tokens) * len(self.val) // limit)]
                 for tokens in self.val]
        return [(source["val_bytes"] / len(tokens),
                 [tokens[at:at + self.seq_len + 1] for at in starts])
                for source, tokens, starts in zip(self.sources, self.val, every)]

    def epochs(self, steps: int) -> list[float]:
        """How often a run of that many steps reads each source."""
        shares = [(b - a) / 2**64 for a, b in zip(self.edges, self.edges[1:])]
        return [share * steps * self.rows * self.seq_len / len(tokens)
                for share, tokens in zip(shares, self.train)]


def document_starts(tokens: Tensor, bos_id: int) -> Tensor:
    """The boundaries that attention takes for tokens (B, T): every BOS and every row begins one."""
    starts = F.pad((tokens == bos_id).flatten(), (0, 1), value=True)
    starts[::tokens.shape[1]] = True
    return starts.nonzero()[:, 0].int()


def data_sources(args) -> list[tuple[str, float | None, object]]:
    """(path, weight, function that reads its documents) of each source that was asked for."""
    asked = []
    if args.mixture:
        preset, folder = args.mixture
        if preset != "table1":
            raise ValueError(f"there is no mixture {preset!r}; try --mixture table1 DIR")
        asked = [(os.path.join(folder, name), weight) for name, weight in TABLE_1.items()]
    for data in args.data:
        path, equals, weight = data.rpartition("=")
        whole = not equals or os.path.exists(data)
        try:
            asked.append((data, None) if whole else (path, positive(float)(weight)))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"the weight {error}; try --data {path}=0.5") from None
    for path, _ in asked:
        if not os.path.exists(path):
            raise ValueError(f"there is no {path}; try --data with a file or folder of text")
    if len({weight is None for _, weight in asked}) > 1:
        raise ValueError("some sources have a weight and some have none; try PATH=WEIGHT for all")
    return [(path, weight, partial(documents, [path])) for path, weight in asked] or [
        ("the standard library", None, standard_library)]


def prepare_data(args, folder: Path, vocab_size: int):
    """The run's tokenizer and token shards, made once: (tokenizer, facts of each source)."""
    index = folder / "tokens" / "sources.json"
    if index.exists():
        return load_tokenizer(folder / "tokenizer.model"), read_json(index, list)
    sources, facts = data_sources(args), []
    say(f"reading {', '.join(path for path, _, _ in sources)}")
    surveys = [survey(read) for _, _, read in sources]
    for (path, _, _), known in zip(sources, surveys):
        for reason in known.skipped[:20]:
            say(f"passed over {reason}")
        if known.skipped:
            say(f"passed over {len(known.skipped)} in all of {path}")
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
    else:
        say(f"training a tokenizer of {vocab_size} tokens")
        texts = (text for (_, _, read), known in zip(sources, surveys)
                 for text in training_text(read, known.chosen))
        tokenizer = train_sentencepiece(texts, vocab_size)
    for (path, weight, read), known in zip(sources, surveys):
        say(f"cutting {path} into tokens")
        made = prepare(str(len(facts)), read, known, tokenizer, index.parent)
        facts.append({**made, "path": path, "weight": weight})
    tokenizer.save(folder / "tokenizer.model")
    write_aside(index, lambda file: file.write(json.dumps(facts).encode()))
    return tokenizer, facts


def read_json(path: Path, kind: type):
    """The JSON of a run's own file; ValueError if it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, kind):
        raise ValueError(f"{path} is damaged; try --fresh to start over, or another --out")
    return value


# ---------------------------------------------------------------------------------------------
# The recipe (section 2.3 "Optimizer", Table 2)


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to final_lr of the peak at the last step (section 2.3)."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, steps - 1 - recipe.warmup)
    low = recipe.final_lr
    return recipe.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def make_optimizer(model: Llama, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2017). Matrices decay, norms do not: the field's custom, the
    papers do not say. Its state exists from the start, so that every state has the same tensors."""
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == decays],
               "weight_decay": recipe.weight_decay * decays} for decays in (True, False)]
    optimizer = torch.optim.AdamW(groups, recipe.lr, recipe.betas, recipe.eps, fused=True)
    for p in model.parameters():
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def predictions(model: Llama, batch: Tensor, bos_id: int | None) -> tuple[Tensor, ...]:
    """What Llama.loss takes, from (N, T + 1) tokens: each is to predict the next; bos_id: no
    attention across the documents that it begins."""
    batch = batch.to(model.tok_embeddings.weight.device)
    x = batch[:, :-1]
    return x, batch[:, 1:], None if bos_id is None else document_starts(x, bos_id)


def train_step(model: Llama, optimizer, batch: Tensor, lr: float, clip: float, micro_batch: int,
               bos_id: int | None = None) -> tuple[float, float]:
    """One step on (N, T + 1) tokens, micro_batch sequences at a time: (loss, norm of the gradient).

    The gradient is that of the mean over all N sequences, scaled to norm `clip` if it is longer.
    If loss or norm is not finite the weights stay as they are.
    """
    total = 0.0
    for part in batch.split(micro_batch):
        loss = model.loss(*predictions(model, part, bos_id)) * (len(part) / len(batch))
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters()
                                          if p.grad is not None).item()
    if math.isfinite(total) and math.isfinite(norm):
        if norm > clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip, torch.tensor(norm))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


@torch.no_grad()
def evaluate(model: Llama, batches: Batches, limit: int, micro_batch: int,
             bos_id: int | None) -> tuple[float, float]:
    """Held-out text: (mean negative log-likelihood a token in nats, bits per byte)."""
    nll, count, size = 0.0, 0, 0.0
    for bytes_per_token, windows in batches.held_out(limit):
        whole = [w for w in windows if len(w) == batches.seq_len + 1]
        groups = [whole[at:at + micro_batch] for at in range(0, len(whole), micro_batch)]
        for group in groups + [[w] for w in windows if len(w) <= batches.seq_len]:
            batch = torch.from_numpy(np.stack(group).astype(np.int64))
            each = model.nll(*predictions(model, batch, bos_id))
            nll += each.sum().item()
            count, size = count + each.numel(), size + each.numel() * bytes_per_token
    return nll / count, nll / math.log(2) / size


# ---------------------------------------------------------------------------------------------
# What it costs


def flops_per_token(config: LlamaConfig, seq_len: int, as_papers: bool = False) -> float:
    """Of forward and backward: 6 N + 6 L H E T, N without the look-up table, no masked scores.
    As the papers count: 6 N + 12 L H E T, both included (Chowdhery et al. 2022, appendix B)."""
    table, width = config.vocab_size * config.dim, config.n_heads * config.head_dim
    if as_papers:
        return 6 * config.n_params + 12 * config.n_layers * width * seq_len
    looked_up = 0 if config.tie_embeddings else table
    return 6 * (config.n_params - looked_up) + 6 * config.n_layers * width * seq_len


def matmul_flops(device: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of large matrix products: measured on a CPU, a table's on a GPU, None if unknown."""
    if device != "cpu":
        name = torch.cuda.get_device_name() if device == "cuda" else device
        return next((gpu.flops for gpu in GPUS.values()
                     if gpu.name in name and dtype is torch.bfloat16), None)
    a, times, end = torch.ones(1024, 1024, dtype=dtype), [], time.perf_counter() + 0.25
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)


def energy(gpu_hours: float, watts: float) -> tuple[float, float]:
    """(MWh, tCO2eq) of a training (LLaMA, section 6): what GPUs at their limit of power draw, times
    1.1 for the data centre (PUE), at the 0.385 kg of CO2eq for a kWh of the average US grid."""
    mwh = gpu_hours * watts * 1.1 / 1e6
    return mwh, mwh * 0.385


@dataclass(frozen=True)
class Layout:
    """How ranks share a step: replicas x shards x pp x tp of them, those of tp adjacent."""
    replicas: int = 1                 # copies of the whole state
    shards: int = 1                   # ranks that one copy of the state is split over (FSDP)
    pp: int = 1                       # ranks in a pipeline
    tp: int = 1                       # ranks that share each layer (tensor and sequence parallel)
    interleave: int = 1               # stages of each in a pipeline: rank r has r, r + pp, ...

    @property
    def dp(self) -> int:
        return self.replicas * self.shards

    def bubble(self, micro_batches: int) -> float:
        """How long a pipeline idles for what it computes: p - 1 stages fill and drain, each a v-th
        of a rank's work on one of m micro-batches: (p - 1) / (v m)."""
        return (self.pp - 1) / (self.interleave * micro_batches)

    def in_flight(self, micro_batches: int, place: int) -> int:
        """Stages times micro-batches whose activations the rank at that place of the pipeline keeps
        under 1F1B: those it starts before the first one is back."""
        p, v = self.pp, self.interleave
        ahead = p - place if v == 1 else 2 * (p - place - 1) + (v - 1) * p + 1
        return min(ahead, v * micro_batches)


def stage_layers(config: LlamaConfig, stage: int, stages: int) -> int:
    """Layers of a stage: L/S, one more in the first of those between embedding and output."""
    return config.n_layers // stages + (1 <= stage <= config.n_layers % stages)


def rank_shapes(config: LlamaConfig, layout: Layout, place: int) -> tuple[int, list, list]:
    """What the rank at that place of the pipeline computes with: (number of its layers, shapes of a
    layer's parameters, shapes of the root's: embedding, norm and output)."""
    D, F, t, stages = config.dim, config.hidden_dim, layout.tp, layout.pp * layout.interleave
    q, kv = (heads * config.head_dim // t for heads in (config.n_heads, config.n_kv_heads))
    layer = [(q, D), (kv, D), (kv, D), (D, q), (F // t, D), (D, F // t), (F // t, D), (D,), (D,)]
    layers = sum(stage_layers(config, s, stages) for s in range(place, stages, layout.pp))
    first, last = place == 0, place == layout.pp - 1
    tables = first + last - (first and last and config.tie_embeddings)
    return layers, layer, [(config.vocab_size // t, D)] * tables + [(D,)] * last


def elements(shapes: list[tuple[int, ...]], shards: int = 1) -> int:
    """Of these tensors, what the fullest of `shards` ranks holds: FSDP cuts rows by torch.chunk."""
    return sum(-(-rows // shards) * math.prod(columns) for rows, *columns in shapes)


def rank_params(config: LlamaConfig, layout: Layout, place: int = 0) -> int:
    """Parameters that the rank at that place of the pipeline keeps."""
    layers, layer, root = rank_shapes(config, layout, place)
    return layers * elements(layer, layout.shards) + elements(root, layout.shards)


@cache
def layer_saves(config: LlamaConfig, rows: int, seq_len: int, dtype: torch.dtype, attention: str,
                by_hand: bool, cast: bool) -> int:
    """Bytes that a layer saves for its backward, counted by running one on fake tensors, which have
    shapes and no memory. cast: its weights are in fp32, and autograd keeps them in dtype too."""
    saved = {}

    def count(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    # By hand all attentions save the same. Under autograd, tiled saves at most what equation does.
    alike = "fused" if by_hand else {"tiled": "equation"}.get(attention, attention)
    forward, attend_backward = ATTENTION[alike]
    with FakeTensorMode():
        layer = Llama(replace(config, n_layers=1, vocab_size=1)).layers[0]
        for p in () if cast else layer.parameters():
            p.data = p.data.to(dtype)
        x = torch.empty(rows, seq_len, config.dim, dtype=dtype, requires_grad=True)
        positions = torch.arange(seq_len)
        tables = rope_table(config, positions)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            attend = partial(forward, positions=positions)
            layer(x, *tables, attend, attend_backward if by_hand else None)
    for shared in (*layer.parameters(), *tables):
        saved.pop(shared.untyped_storage()._cdata, None)
    return sum(saved.values())


def memory_needed(config: LlamaConfig, rows: int, seq_len: int, dtype: torch.dtype,
                  attention: str, backward: str, layout: Layout = Layout(), micro_batches: int = 1,
                  place: int = 0) -> dict[str, int]:
    """Bytes of a step of micro_batches times `rows` sequences, by what they hold, on the rank at
    that place of the pipeline.

    Weights, gradients and AdamW's moments are in fp32. Of t tensor parallel ranks each saves a t-th
    of a layer, but under autograd its two gathered inputs whole. Buffers: ddp has a copy of all
    weights to compute with; fsdp the root's and two layers', and a layer's gradients until they are
    reduced; in a pipeline a copy of its weights, and whole gradients until the last micro-batch.
    """
    layers, layer, root = rank_shapes(config, layout, place)
    held, size, t = rank_params(config, layout, place), dtype.itemsize, layout.tp
    stream, V = rows * seq_len * config.dim * size, config.vocab_size // t  # bytes of x; rows of W
    by_hand, sharded = backward == "manual", layout.shards > 1
    saved = layer_saves(config, rows, seq_len, dtype, attention, by_hand, layout.dp == 1) // t
    saved += 0 if by_hand else 2 * stream * (t - 1) // t
    kept = -(-layout.in_flight(micro_batches, place) * layers // layout.interleave)
    activations = kept * saved
    if backward == "recompute":  # the input of each layer, and one layer at a time
        activations = kept * stream // t + saved
    if by_hand and attention == "equation":  # A, dA and their like, of one layer at a time
        activations += 16 * rows * config.n_heads // t * seq_len**2
    logits = 0
    if place == layout.pp - 1:  # a chunk of them, W cast, a chunk's dW, and dW until it is sharded
        at_once = min(rows_at_once(V, config.dim), rows * seq_len)
        logits = (8 + 2 * size) * at_once * V + (2 * size + 4 * sharded) * V * config.dim
    whole, most = layers * elements(layer) + elements(root), max(elements(layer), elements(root))
    buffers = 2 * stream * (t > 1)
    if sharded and layout.pp == 1:
        buffers += size * (elements(root) + 2 * elements(layer)) + (size + 4) * most
    elif layout.dp > 1:
        buffers += size * whole + 4 * (whole if sharded else most)
    return {"weights": 4 * held, "gradients": 4 * held,
            "AdamW": 8 * held + 4 * (layers * len(layer) + len(root)),  # two moments; steps
            "activations": activations, "logits": logits, "buffers": buffers}


def wire_bytes(config: LlamaConfig, rows: int, seq_len: int, dtype: torch.dtype, backward: str,
               layout: Layout, micro_batches: int, place: int) -> dict[str, int]:
    """Bytes that such a rank sends in a step, by the kind of parallelism.

    In a ring of s ranks n bytes are gathered, or summed and scattered, in s - 1 turns of n/s: a
    rank sends n (s - 1)/s, and twice that for both, an all-reduce. Weights travel in dtype,
    gradients in fp32. A layer of t ranks exchanges x 4 times forward and 4 times backward; by hand
    the 2 inputs of products are gathered again, recomputing does the forward again.
    """
    layers, _, root = rank_shapes(config, layout, place)
    held, s, copies = rank_params(config, layout, place), layout.shards, layout.replicas
    t, m, first, last = layout.tp, micro_batches, place == 0, place == layout.pp - 1
    gathered, reduced = (held, held) if layout.pp > 1 else (
        m * (2 * held - elements(root, s)), m * held)
    data = (s - 1) * (dtype.itemsize * gathered + 4 * reduced) + 8 * held * (copies - 1) // copies
    x = rows * seq_len * config.dim * dtype.itemsize // t
    exchanges = layers * {"manual": 10, "autograd": 8, "recompute": 12}[backward]
    exchanges += 2 * (first + last)  # of what the embedding puts out and the output takes
    crossings = 2 * layout.interleave - first - last  # x to the next stage, dx to the one before
    return {"data": data, "tensor": m * exchanges * x * (t - 1), "pipeline": m * crossings * x}


def memory_there(device: str) -> int:
    """Bytes that the device has free; 2**63 where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device == "mps":
        return torch.mps.recommended_max_memory()
    limits = [2**63]
    if hasattr(os, "sysconf"):  # not on Windows
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file, pattern, unit in (("/proc/meminfo", r"MemAvailable: +(\d+)", 1024),
                                ("/sys/fs/cgroup/memory.max", r"(\d+)", 1)):  # of a container
        if os.path.exists(file) and (found := re.search(pattern, Path(file).read_text())):
            limits.append(unit * int(found[1]))
    return min(limits)


def fit_memory(args, config: LlamaConfig, device: str) -> int:
    """Sequences to compute at once: what was asked for, else up to 8192 tokens as far as they fit.
    Refuses, before anything large is allocated, what the machine cannot hold."""
    there = memory_there(device)
    rows = args.micro_batch or max(1, min(8192, args.batch_tokens) // args.seq_len)
    while True:
        need = memory_needed(config, rows, args.seq_len, DTYPES[args.dtype], args.attention,
                             args.backward)
        total = sum(need.values())
        if total < 0.9 * there:  # a tenth for what is not counted
            return rows
        if args.micro_batch or rows == 1:
            break
        rows //= 2
    smaller = max((c.n_params, name) for name, (c, _) in SIZES.items() if 20 * c.n_params < there)
    advice = f"--size {smaller[1]}" if 18 * config.n_params > there else (
        f"--micro-batch 1 or --seq-len {args.seq_len // 2}")
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in need.items())
    raise ValueError(f"{args.size} needs about {total / 1e9:.0f} GB to train ({parts}) and this "
                     f"machine has {there / 1e9:.0f} GB free; try {advice}")


def bandwidth(gpu: Device, ranks: int, stride: int) -> float:
    """Bytes/s of a ring of ranks that lie `stride` apart. It leaves a node through one card, so
    that the rings of all its ranks in a node have as many cards."""
    there = gpu.inside if ranks * stride <= NODE else max(1, NODE // stride) * gpu.between
    return min(gpu.inside, there)


def layouts(config: LlamaConfig, gpus: int, rows: int, seq_len: int, most: int):
    """Every way for so many GPUs to train on `rows` sequences a step, up to `most` at once on each:
    a Layout, and the options that ask for it."""
    common = math.gcd(gpus, config.n_kv_heads, config.hidden_dim, config.vocab_size, seq_len)
    for tp, pp in itertools.product(range(1, NODE + 1), range(1, config.n_layers + 1)):
        dp, node = gpus // (tp * pp), NODE // (tp * pp)
        if common % tp or gpus % (tp * pp) or rows % dp:
            continue
        kinds = {"ddp": 1, "fsdp": dp} if dp > 1 else {"none": 1}
        if 1 < node < dp and dp % node == 0:
            kinds["hybrid"] = node
        for micro in range(1, min(most, rows // dp) + 1):
            m = rows // dp // micro
            if m * micro * dp < rows or m < pp:
                continue
            for v in range(1, config.n_layers // pp + 1 if m % pp == 0 < pp - 1 else 2):
                for kind, shards in kinds.items():
                    yield {"dp": kind, "tp": tp, "pp": pp, "interleave": v, "micro_batch": micro,
                           "layout": Layout(dp // shards, shards, pp, tp, v)}


def assess(args, config: LlamaConfig, gpu: Device, backward: str, choice: dict) -> dict:
    """A choice of `layouts` with what it costs: memory of the fullest rank, bytes that one sends,
    and seconds a step. A rank computes, waits for tensor and pipeline parallel neighbours, and
    idles in the bubble; data parallel traffic runs beside that, but for one layer's."""
    layout, micro = choice["layout"], choice["micro_batch"]
    dp, tp, pp = layout.dp, layout.tp, layout.pp
    m, shape = args.rows // dp // micro, (micro, args.seq_len, DTYPES[args.dtype])
    places = sorted({0, min(1, pp - 1), pp - 1})  # the others are like the second
    memory = max((memory_needed(config, *shape, args.attention, backward, layout, m, place)
                  for place in places), key=lambda parts: sum(parts.values()))
    wires = [wire_bytes(config, *shape, backward, layout, m, place) for place in places]
    wire = {kind: max(each[kind] for each in wires) for kind in wires[0]}
    data = wire["data"] / bandwidth(gpu, dp, tp * pp)
    waits = wire["tensor"] / bandwidth(gpu, tp, 1) + wire["pipeline"] / bandwidth(gpu, pp, tp)
    flops = args.rows * args.seq_len * flops_per_token(config, args.seq_len) / args.gpus
    uneven = max(rank_shapes(config, layout, place)[0] for place in places) * pp / config.n_layers
    work = flops * uneven * (4 / 3 if backward == "recompute" else 1) / (COMPUTING * gpu.flops)
    step = max((work + waits) * (1 + layout.bubble(m)), data) + data / config.n_layers
    return {**choice, "micro_batches": m, "memory": memory, "total": sum(memory.values()),
            "rank_params": max(rank_params(config, layout, place) for place in places),
            "wire": wire, "bubble": layout.bubble(m), "step_s": step,
            "mfu": flops / gpu.flops / step}


def search(args, config: LlamaConfig, gpu: Device) -> dict:
    """Of the layouts that the options leave and the memory holds, the simplest that is within 2 %
    of the fastest; `why`: what the values next to those of the best one would take."""
    names, asked = ("tp", "pp", "dp", "micro_batch", "interleave"), vars(args)
    most = max(1, 8192 // args.seq_len, args.micro_batch or 0)
    found = list(layouts(config, args.gpus, args.rows, args.seq_len, most))
    if not found:
        raise ValueError(f"{args.gpus} devices cannot share {args.rows} sequences a step; try "
                         f"--gpus {math.gcd(args.gpus, args.rows)} or another --batch-tokens")
    for name in names:
        left = [each for each in found if asked[name] in (None, each[name])]
        if not left:
            option, would = f"--{name.replace('_', '-')}", sorted({each[name] for each in found})
            raise ValueError(f"{option} {asked[name]} is impossible for {args.size} on {args.gpus} "
                             f"devices; try {option} with {', '.join(map(str, would))}")
        found = left
    room = 0.9 * gpu.memory  # a tenth for what is not counted
    found = sorted((assess(args, config, gpu, args.backward, each) for each in found),
                   key=lambda each: (each["total"] >= room, each["step_s"]))
    best = min((each for each in found if each["step_s"] < 1.02 * found[0]["step_s"]),
               key=lambda each: (each["total"] >= room, each["pp"] * each["interleave"],
                                 each["tp"], each["dp"], -each["micro_batch"]))
    if best["total"] >= room:
        least = min(each["total"] for each in found)
        raise ValueError(f"{args.size} needs {least / 1e9:.0f} GB on each of {args.gpus} devices, "
                         f"which have {room / 1e9:.0f} for it; try --gpus {2 * args.gpus} or "
                         "--backward recompute")
    why = {}
    for name in names:
        kept = [other for other in names if other not in (name, "micro_batch")]
        found_at = {each[name]: each for each in reversed(found)
                    if all(each[other] == best[other] for other in kept)}
        values = sorted(found_at)
        at = values.index(best[name])
        near = [found_at[value] for value in values[max(0, at - 1):at] + values[at + 1:at + 2]]
        why[name] = "; ".join(
            f"{each[name]} would take {each['step_s']:.3g} s a step" if each["total"] < room else
            f"{each[name]} would need {each['total'] / 1e9:.0f} GB" for each in near) or (
            "as asked" if asked[name] else "no other is possible")
    return {**best, "why": why}


def plan(args, config: LlamaConfig, recipe: Recipe) -> dict:
    """What the training takes on args.gpus devices in the best layout. Allocates nothing."""
    gpu, args.rows = GPUS.get(args.gpu), args.batch_tokens // args.seq_len
    if gpu is None:  # machines like this one; their watts and network are a guess
        flops = matmul_flops("cpu", DTYPES[args.dtype])
        gpu = Device("cpu", memory_there("cpu"), 100, flops, 1e9, 1e9)
    elif args.dtype != "bf16":
        raise ValueError("only the bf16 FLOP/s of GPUs are known; try --dtype bf16")
    best = search(args, config, gpu)
    steps = args.steps or math.ceil(recipe.train_tokens / recipe.batch_tokens)
    mfu, flops = args.mfu or best["mfu"], flops_per_token(config, args.seq_len)
    tokens, speed = steps * args.rows * args.seq_len, mfu * args.gpus * gpu.flops / flops
    hours = tokens / speed / 3600
    mwh, tons = energy(args.gpus * hours, gpu.watts)
    return {"size": args.size, "params": config.n_params, "gpus": args.gpus, "gpu": args.gpu,
            "gpu_gb": gpu.memory / 1e9, "flops_per_token": flops, "steps": steps, "tokens": tokens,
            **best, "layout": asdict(best["layout"]), "mfu": mfu,
            "mfu_as_papers": mfu * flops_per_token(config, args.seq_len, as_papers=True) / flops,
            "memory": {backward: assess(args, config, gpu, backward, best)["memory"]
                       for backward in BACKWARD}, "step_s": args.rows * args.seq_len / speed,
            "tokens_per_s": speed, "days": hours / 24, "gpu_hours": args.gpus * hours, "mwh": mwh,
            "tco2eq": tons}


def plan_text(p: dict) -> str:
    """A plan to be read, in GB of 1e9 bytes."""
    memory, (copies, shards, *_) = p["memory"], p["layout"].values()
    why = [f"  {name.replace('_', '-'):14}{p[name]:<8}{text}" for name, text in p["why"].items()]
    rows = {part: [ways[part] for ways in memory.values()] for part in memory["manual"]}
    rows["together"] = [sum(ways.values()) for ways in memory.values()]
    table = [f"  {part:14}" + "".join(f"{size / 1e9:<12.2f}" for size in sizes).rstrip()
             for part, sizes in rows.items()]
    sent = ", ".join(f"{kind} parallel {size / 1e9:,.1f}" for kind, size in p["wire"].items())
    return "\n".join([
        f"{p['size']} on {p['gpus']:,} x {p['gpu']}: {p['params']:,} parameters, "
        f"{p['steps']:,} steps, {p['tokens'] / 1e9:,.1f} billion tokens", "",
        f"layout          dp {copies * shards} x pp {p['pp']} x tp {p['tp']}, state over {shards}, "
        f"{p['micro_batches']} x {p['micro_batch']} sequences a step", *why, "",
        f"GB of {p['gpu_gb']:<10.0f}{'    '.join(f'{way:8}' for way in memory)}", *table, "",
        f"GB sent a step  {sent}",
        f"step            {p['step_s']:.3g} s, pipeline's bubble {p['bubble']:.1%}",
        f"speed           {p['tokens_per_s']:,.0f} tokens/s, {p['tokens_per_s'] / p['gpus']:,.0f} "
        f"each; MFU {p['mfu']:.1%}, as the papers count {p['mfu_as_papers']:.1%}",
        f"training        {p['days']:,.1f} days, {p['gpu_hours']:,.0f} GPU-hours, "
        f"{p['mwh']:,.2f} MWh, {p['tco2eq']:,.2f} tCO2eq"])


# ---------------------------------------------------------------------------------------------
# State: torch.distributed.checkpoint's folder, tensors only; everything else is JSON


class SafeUnpickler(pickle.Unpickler):
    """Reads a checkpoint's metadata with the classes that metadata needs and no others. Entries
    that are not tensors, which would be unpickled when loaded, are refused by the same rule."""
    METADATA = {"Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
                "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"}

    def find_class(self, module: str, name: str):
        known = (module == "torch.distributed.checkpoint.metadata" and name in self.METADATA
                 or (module, name) in {("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
                                       ("torch.serialization", "_get_layout"), ("torch", "Size")}
                 or module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        if known:
            return super().find_class(module, name)
        if module.split(".")[0] == "pathlib":
            return PurePath  # the folder it was written to; not used
        raise pickle.UnpicklingError(f"its metadata names {module}.{name}")


class SafeReader(dcp.FileSystemReader):
    def read_metadata(self, *args, **kwargs):
        metadata = SafeUnpickler(io.BytesIO((self.path / ".metadata").read_bytes())).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def state_tensors(model: Llama, optimizer) -> dict[str, Tensor]:
    """Everything that training goes on from: weights and AdamW's moments, by name."""
    state = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        state |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    return state


def sha256(path: Path) -> str:
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict) -> None:
    """Writes folder/step-N aside, with each file's SHA-256, and renames it; keeps the last two."""
    aside, done = folder / "saving", folder / f"step-{step:09d}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        dcp.save(tensors, checkpoint_id=aside, no_dist=True)
        (aside / "facts.json").write_text(json.dumps({"step": step, **facts}), encoding="utf-8")
        manifest = {file.name: sha256(file) for file in sorted(aside.iterdir())}
        (aside / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        shutil.rmtree(done, ignore_errors=True)
        os.replace(aside, done)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"the state of step {step} could not be written ({last_line(error)}); older "
                      "states are untouched; try to free space, then the same command") from None
    for old in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path, tensors: dict[str, Tensor]) -> dict | None:
    """Fills the tensors from the newest good state and returns its facts; None if there is none.
    A damaged one is named and passed over."""
    states = sorted(folder.glob("step-*"), reverse=True)
    for state in states:
        try:
            manifest = json.loads((state / "manifest.json").read_text(encoding="utf-8"))
            names = {file.name for file in state.iterdir()} - {"manifest.json"}
            wrong = [name for name in names | set(manifest)
                     if name not in names or sha256(state / name) != manifest.get(name)]
            if wrong:
                raise ValueError(f"{sorted(wrong)[0]} is not what was written")
            facts = json.loads((state / "facts.json").read_text(encoding="utf-8"))
            if state.name != f"step-{facts['step']:09d}" or type(facts["skipped"]) is not int:
                raise ValueError("facts.json is not of this step")
            reader = SafeReader(state)
            reader.read_metadata()  # first alone: dcp.load would wrap what is wrong with it
            dcp.load(tensors, storage_reader=reader, no_dist=True)
            return facts
        except (Exception, dcp.api.CheckpointException) as error:
            say(f"{state} is damaged and passed over: {last_line(error)}")
    if states:
        raise ValueError(f"no state in {folder} is good; try --fresh to start over")
    return None


def last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# The run


def resolve(args, device: str) -> tuple[LlamaConfig, Recipe]:
    """The size's shape and recipe with the changes that were asked for; fills the gaps of args."""
    if args.size not in SIZES:
        raise ValueError(f"there is no size {args.size!r}; try one of {', '.join(SIZES)}")
    config, recipe = SIZES[args.size]
    try:
        pairs = (change.split("=") for change in args.set)
        changes = {name: json.loads(text.lower().replace("none", "null")) for name, text in pairs}
    except ValueError:
        raise ValueError(f"--set takes FIELD=NUMBER, not {' '.join(args.set)}; "
                         "try --set n_layers=4") from None
    if "vocab_size" in changes and not (args.bench or args.plan):
        raise ValueError("the vocabulary is the tokenizer's; try --vocab-size")
    if args.vocab_size:
        changes["vocab_size"] = args.vocab_size
    if args.tokenizer:
        changes["vocab_size"] = load_tokenizer(args.tokenizer).vocab_size
    config = LlamaConfig.from_dict({**asdict(config), **changes})
    recipe, assumed = recipe.filled()
    names = ("lr", "warmup", "batch_tokens", "document_mask")
    asked = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    recipe = replace(recipe, **asked)
    vars(args).update({name: getattr(recipe, name) for name in names})
    if gaps := [name for name in assumed if name not in asked and name != "train_tokens"]:
        say(f"never published for {args.size}, taken from Llama 2: "
            + ", ".join(f"{name}={getattr(recipe, name)}" for name in gaps))
    args.seq_len = args.seq_len or min(config.max_seq_len, recipe.batch_tokens)
    if args.seq_len > min(config.max_seq_len, recipe.batch_tokens):
        raise ValueError(f"--seq-len {args.seq_len} is over the context, {config.max_seq_len}, "
                         f"or the batch, {recipe.batch_tokens}; try --set max_seq_len=N")
    if args.dtype == "auto":
        args.dtype = "bf16" if has_bf16(device) else "fp32"
    if args.compile and args.document_mask and device == "cpu":
        raise ValueError("on a CPU documents are taken one by one, which --compile would compile "
                         "anew in every step; try --no-document-mask, or without --compile")
    if not args.plan:
        args.micro_batch = fit_memory(args, config, device)
    return config, recipe


def has_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return device == "cpu" and any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def open_run(folder: Path, settings: dict, fresh: bool) -> dict:
    """What a run remembers: a new one, or the old one if its settings are the same."""
    file = folder / "run.json"
    if fresh and file.exists():  # only of a run is anything removed
        for name in ("state", "tokens"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("run.json", "log.jsonl", "loss.svg", "params.json", "consolidated.00.pth"):
            (folder / name).unlink(missing_ok=True)
    settings = json.loads(json.dumps(settings))  # as JSON gives it back
    code = sha256(Path(__file__).with_name("llama.py"))
    if not (file.exists() and (folder / "tokens" / "sources.json").exists()):  # nothing yet to keep
        return {**settings, "threads": torch.get_num_threads(), "code": code}
    run = read_json(file, dict)
    run = {**settings, **run}  # a run of before a setting existed
    for name, value in settings.items():
        if run[name] != value:
            raise ValueError(f"{folder} was trained with {name}={run[name]}; "
                             "try --out DIR or --fresh")
    if run.get("code") != code:
        say("warning: llama.py is not what this run began with; its losses may differ")
    if (threads := run.get("threads")) != torch.get_num_threads():
        say(f"going on with the {threads} threads that this run began with")
        torch.set_num_threads(threads)
    return run


def compile_layers(model: Llama) -> Llama:
    """torch.compile of every layer, in place, which fuses what lies between the products: one
    compilation serves all layers of a training step."""
    check_compiler()
    for layer in model.layers:
        layer.compile()
    return model


def uncompiled(args):
    """For evaluation and samples, whose shapes are many: none is worth its compilation."""
    return torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext()


def timed_steps(args, model: Llama, recipe: Recipe, count: int) -> tuple[float, float]:
    """Median seconds of `count` steps on random tokens, after two untimed ones; the last loss."""
    times, random, optimizer = [], torch.Generator().manual_seed(0), make_optimizer(model, recipe)
    shape = (args.batch_tokens // args.seq_len, args.seq_len + 1)
    for _ in range(count + 2):
        batch = torch.randint(model.config.vocab_size, shape, generator=random)
        start = time.perf_counter()
        loss, _ = train_step(model, optimizer, batch, recipe.lr, recipe.clip, args.micro_batch,
                             1 if args.document_mask else None)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]), loss


def bench(args, model: Llama, recipe: Recipe, peak: float | None) -> dict:
    step_s, loss = timed_steps(args, model, recipe, args.bench)
    speed = args.batch_tokens // args.seq_len * args.seq_len / step_s
    mfu = peak and speed * flops_per_token(model.config, args.seq_len) / peak
    rss = None
    if sys.platform != "win32":
        import resource
        unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {"tokens_per_s": speed, "mfu": mfu or "unknown", "peak_gflops": peak and peak / 1e9,
            "step_s": step_s, "peak_rss_gb": rss, "loss": loss, "params": model.config.n_params,
            "backward": args.backward, "dtype": args.dtype}


class Log:
    """log.jsonl, one object a line, and the line that shows progress."""

    def __init__(self, folder: Path, step: int):
        """Cuts an older log back to `step`, a torn last line too."""
        self.path, self.rows, self.shown = folder / "log.jsonl", [], 0.0
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self.rows += [row for row in [json.loads(line)] if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_aside(self.path, lambda file: file.write(text.encode()))

    def add(self, row: dict) -> None:
        self.rows.append({key: None if isinstance(value, float) and not math.isfinite(value)
                          else value for key, value in row.items()})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def show(self, row: dict, steps: int, left: float) -> None:
        held = next((f"  held out {r['val_bpb']:.3f} bits/byte" for r in reversed(self.rows)
                     if r.get("val_bpb")), "")
        mfu = "unknown" if row["mfu"] is None else f"{row['mfu']:.0%}"
        line = (f"step {row['step']}/{steps}  loss {row['loss']:.3f}{held}  "
                f"{row['tokens_per_s']:,.0f} tokens/s  MFU {mfu}  {left // 60:.0f}m"
                f"{left % 60:02.0f}s left" + f"  {row['skipped']} skipped" * (row["skipped"] > 0))
        if sys.stderr.isatty():
            end = "\n" if row["step"] == steps else ""
            print(f"\r{line:110}", end=end, file=sys.stderr, flush=True)
        elif row["step"] == steps or time.monotonic() - self.shown > 10:
            self.shown = time.monotonic()
            say(line)


def draw_loss(rows: list[dict], path: Path, title: str) -> None:
    """Training loss against tokens, as in the paper's Figure 1, with the held-out loss as dots. The
    line has up to 500 points, each the mean of a stretch; the steep first fiftieth is left out."""
    losses = [(row["tokens"], row["loss"]) for row in rows if row.get("loss") is not None]
    held = [(row["tokens"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    if not losses:
        return
    stretch, end = -(-len(losses) // 500), losses[-1][0]
    first = len(losses) - (len(losses) - len(losses) // 50) // stretch * stretch
    parts = [losses[i:i + stretch] for i in range(first, len(losses), stretch)]
    line = [(part[-1][0], statistics.fmean(loss for _, loss in part)) for part in parts]
    values = [loss for _, loss in line + held]
    x_step, y_step = nice_step(end), nice_step(max(values) - min(values))
    low, high = math.floor(min(values) / y_step), math.ceil(max(values) / y_step)
    unit, word = next((u, w) for u, w in ((1e9, "billions of "), (1e6, "millions of "), (1, ""))
                      if end >= u)

    def at(tokens: float, loss: float) -> str:
        up = (loss / y_step - low) / max(1, high - low)
        return f"{70 + 550 * tokens / end:.1f} {350 - 300 * up:.1f}"

    def text(place: str, attributes: str, words: str) -> str:
        return f'<text transform="translate({place})" {attributes}>{words}</text>'

    parts = [text("345 28", 'text-anchor="middle" font-size="15"', title)]
    for i in range(low, high + 1):
        parts.append(f'<path d="M{at(0, i * y_step)}h550" stroke="#ddd"/>')
        parts.append(text(at(0, i * y_step), 'x="-8" y="4" text-anchor="end"', f"{i * y_step:.4g}"))
    for i in range(int(end / x_step) + 1):
        place, words = at(i * x_step, low * y_step), f"{i * x_step / unit:.4g}"
        parts.append(text(place, 'y="20" text-anchor="middle"', words))
    parts += [f'<polyline points="{" ".join(at(*point) for point in line)}" fill="none" '
              'stroke="#1f77b4" stroke-width="1.6"/>', '<path d="M620 350H70V50" stroke="#444" '
              'fill="none"/>', text("345 395", 'text-anchor="middle"', f"{word}tokens"),
              text("22 200) rotate(-90", 'text-anchor="middle"', "loss (nats a token)"),
              text("610 66", 'text-anchor="end" fill="#1f77b4"', "training"),
              text("610 84", 'text-anchor="end" fill="#d62728"', "held out")]
    parts += [f'<circle transform="translate({at(*point)})" r="3.5" fill="#d62728"/>'
              for point in held]
    svg = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 410" font-family="sans-serif" '
           'font-size="13"><rect width="640" height="410" fill="white"/>\n')
    write_aside(path, lambda file: file.write((svg + "\n".join(parts) + "</svg>\n").encode()))


def nice_step(span: float) -> float:
    """Of 1, 2, 5 times a power of ten, the smallest that divides the span into at most six."""
    power = 10.0 ** math.floor(math.log10(max(span, 1e-9) / 6))
    return next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= 6)


class Stopper:
    """Ctrl-C and SIGTERM end the run after the step, with its state saved; a second one at once."""

    def __init__(self):
        self.signal = None
        self.before = {number: signal.signal(number, self.stop)
                       for number in (signal.SIGINT, signal.SIGTERM)}

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        say("\nstopping after this step; the same command goes on from there")


def train(args, run: dict, folder: Path, model: Llama, batches: Batches, recipe: Recipe,
          bos_id: int | None, peak: float | None) -> None:
    """From the newest good state to the last step, then the weights in Meta's layout."""
    optimizer, steps, bad, times = make_optimizer(model, recipe), run["steps"], 0, []
    tensors = state_tensors(model, optimizer)
    facts = load_state(folder / "state", tensors)
    facts = {"step": 0, "skipped": 0} if facts is None else facts
    log, skipped, stopper = Log(folder, facts["step"]), facts["skipped"], Stopper()
    if facts["step"] >= steps:
        say(f"{folder} is finished at step {facts['step']}; --steps N goes on, --fresh starts over")
    elif facts["step"]:
        log.add({"event": "resume", "step": facts["step"]})
    tokens, flops = batches.rows * batches.seq_len, flops_per_token(model.config, batches.seq_len)
    eval_every = args.eval_every or max(1, min(1000, steps // 10))
    save_every = args.save_every or eval_every
    recipe = replace(recipe, warmup=min(recipe.warmup, steps // 10))
    share = steps * tokens // 10  # a tenth of the run's tokens at the end, at a third of their cost
    for step in range(facts["step"], steps):
        start, done = time.perf_counter(), step + 1
        lr, batch = learning_rate(step, steps, recipe), batches.step(step)
        loss, norm = train_step(model, optimizer, batch, lr, recipe.clip, args.micro_batch, bos_id)
        times.append(time.perf_counter() - start)
        finite, speed = math.isfinite(loss) and math.isfinite(norm), tokens / times[-1]
        bad, skipped = (0, skipped) if finite else (bad + 1, skipped + 1)
        row = {"step": done, "tokens": done * tokens, "loss": loss, "lr": lr, "grad_norm": norm,
               "tokens_per_s": round(speed, 1), "skipped": skipped, "world": 1,
               "mfu": peak and round(speed * flops / peak, 3), "rank_tokens": tokens,
               "rank_params": model.config.n_params}
        if done % eval_every == 0 or done == steps:
            limit = min(EVAL_TOKENS, share // 10) if done < steps else min(FINAL_EVAL_TOKENS, share)
            with uncompiled(args):
                row["val_loss"], row["val_bpb"] = evaluate(model, batches, limit, args.micro_batch,
                                                           bos_id)
        log.add(row)
        log.show(row, steps, (steps - done) * statistics.median(times[-50:]))
        if bad == BAD_STEPS:
            raise ValueError(f"{bad} steps in a row had a loss or gradient that is not finite; the "
                             f"last good state in {folder / 'state'} is kept; try a lower --lr")
        if finite and (done % save_every == 0 or done == steps or stopper.signal):
            save_state(folder / "state", done, tensors, {"skipped": skipped})
        if stopper.signal:
            sys.exit(128 + stopper.signal)
    stopper.close()
    save_meta(model, folder)
    draw_loss(log.rows, folder / "loss.svg", f"{args.size}, {model.config.n_params:,} parameters")


def parser() -> Parser:
    p = Parser(prog="train.py", description="Trains a Llama from text: tokenizer, weights, sample.")
    whole, number = positive(int), positive(float)
    g = p.add_argument_group("model")
    g.add_argument("--size", default="tiny", metavar="NAME", help=", ".join(SIZES))
    g.add_argument("--set", nargs="+", default=[], action="extend", metavar="FIELD=VALUE",
                   help="change a field of the size, as n_layers=4 or rope_scaling=8")
    g.add_argument("--attention", choices=ATTENTION, default="fused",
                   help="tiled and equation are for reading; the memory of equation grows with the "
                   "square of T")
    g.add_argument("--backward", choices=BACKWARD, default="manual",
                   help="of a layer: by hand (section 2.4); by torch; or keeping its input alone, "
                   "which needs the least memory and a third more work")
    g.add_argument("--compile", action="store_true", help="compile the layers: 10 to 30 seconds, "
                   "then steps a tenth to a fifth faster: even after 1 to 4 minutes")
    g.add_argument("--document-mask", action=argparse.BooleanOptionalAction,
                   help="no attention across documents; default: from Llama 3 on")
    g = p.add_argument_group("text")
    g.add_argument("--data", nargs="+", default=[], action="extend", metavar="PATH[=WEIGHT]",
                   help="files and folders; .jsonl by \"text\"; default: Python's own library")
    g.add_argument("--mixture", nargs=2, metavar=("table1", "DIR"),
                   help=f"subfolders {' '.join(TABLE_1)} with the weights of Table 1")
    g.add_argument("--tokenizer", metavar="PATH", help="default: one is trained on the text")
    g.add_argument("--vocab-size", type=whole, metavar="N", help="of the tokenizer to train")
    g = p.add_argument_group("length and recipe (default: the size's own)")
    g.add_argument("--steps", type=whole, metavar="N", help="more than before: a run goes on")
    g.add_argument("--minutes", type=number, metavar="X", help="of the whole command: sets the "
                   "steps once, from the measured speed (default for tiny: 4.6)")
    g.add_argument("--batch-tokens", type=whole, metavar="N", help="tokens of a step")
    g.add_argument("--micro-batch", type=whole, metavar="N", help="sequences computed at once; "
                   "fewer need less memory and give the same result")
    g.add_argument("--seq-len", type=whole, metavar="N", help="default: the size's context")
    g.add_argument("--lr", type=number, metavar="X", help="lower it if the loss is not finite")
    g.add_argument("--warmup", type=whole, metavar="N", help="steps; a tenth of the run at most")
    g.add_argument("--seed", type=int, default=0, metavar="N")
    g.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto",
                   help="to compute in; weights stay fp32; auto: bf16 where the processor has it")
    g = p.add_argument_group("run")
    g.add_argument("--out", metavar="DIR", help="default: runs/SIZE")
    g.add_argument("--fresh", action="store_true", help="start over: a run in DIR is removed")
    g.add_argument("--eval-every", type=whole, metavar="N", help="steps")
    g.add_argument("--save-every", type=whole, metavar="N", help="steps between states")
    g.add_argument("--bench", type=whole, metavar="N", help="no run: the speed of N steps")
    g = p.add_argument_group("many devices")
    g.add_argument("--dp", choices=("none", "ddp", "fsdp", "hybrid"))
    g.add_argument("--tp", type=whole, metavar="N")
    g.add_argument("--pp", type=whole, metavar="N")
    g.add_argument("--interleave", type=whole, metavar="N")
    g = p.add_argument_group("plan (of the options above, those that are given are kept)")
    g.add_argument("--plan", action="store_true", help="no run: what it would take, and how best")
    g.add_argument("--gpus", type=whole, default=NODE, metavar="N", help="default: %(default)s")
    g.add_argument("--gpu", choices=(*GPUS, "cpu"), default="H100", help="default: %(default)s; "
                   "cpu: machines like this one")
    g.add_argument("--mfu", type=number, metavar="X", help="of the whole step, as measured; "
                   f"default: that of computing at {COMPUTING} of the peak, less what it waits for")
    g.add_argument("--json", action="store_true", help="the plan as one JSON object")
    return p


def main(argv: list[str]) -> None:
    started, device, args = time.perf_counter(), best_device(), parser().parse_args(argv)
    # What is free of the settings may differ when a run goes on; a chosen micro-batch is kept.
    free = {"steps", "minutes", "eval_every", "save_every", "out", "fresh", "bench"}
    free |= {"dp", "tp", "pp", "interleave", "plan", "gpus", "gpu", "mfu", "json"}
    free |= set() if args.micro_batch else {"micro_batch"}
    if args.plan and args.gpu != "cpu" and args.dtype == "auto":
        args.dtype = "bf16"
    config, recipe = resolve(args, device)
    if args.plan:
        planned = plan(args, config, recipe)
        print(json.dumps(planned) if args.json else plan_text(planned))
        return
    keep_freed_memory()
    peak = matmul_flops(device, DTYPES[args.dtype])
    dtype = None if args.dtype == "fp32" else DTYPES[args.dtype]

    def create(config: LlamaConfig) -> Llama:
        model = Llama.create(config, args.seed, device, attention=args.attention,
                             backward=args.backward, dtype=dtype)
        return compile_layers(model) if args.compile else model

    if args.bench:
        print(json.dumps(bench(args, create(config), recipe, peak)))
        return
    folder = Path(args.out or f"runs/{args.size}")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    if args.fresh:
        data_sources(args)  # what is not there is said before anything is removed
    run = open_run(folder, settings, args.fresh)
    args.micro_batch = run.setdefault("micro_batch", args.micro_batch)
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / "run.json", lambda file: file.write(json.dumps(run, indent=1).encode()))
    tokenizer, sources = prepare_data(args, folder, config.vocab_size)
    config = replace(config, vocab_size=tokenizer.vocab_size)
    batches = Batches(folder / "tokens", sources, args.seq_len, args.batch_tokens, args.seed)
    model = create(config)
    minutes = args.minutes or (4.6 if args.size == "tiny" and not args.steps else None)
    if args.steps or not minutes:
        run.pop("minutes", None)
        run["steps"] = args.steps or math.ceil(recipe.train_tokens / recipe.batch_tokens)
    elif run.get("minutes") != minutes or "steps" not in run:
        step_s, _ = timed_steps(args, model, recipe, 5)
        count = max(5, int(1.2 * minutes / step_s))  # a fiftieth of the time, to be sure of it
        step_s, _ = timed_steps(args, model, recipe, count)
        left = 60 * minutes - (time.perf_counter() - started) - 5
        run |= {"minutes": minutes, "steps": max(10, int(left / (1.12 * step_s)))}  # evaluations
        model.init_weights(args.seed)
    write_aside(folder / "run.json", lambda file: file.write(json.dumps(run, indent=1).encode()))
    say(f"{args.size}: {config.n_params:,} parameters, {run['steps']} steps of {batches.rows} x "
        f"{args.seq_len} tokens, {args.dtype}, on {device}")
    for source, epochs in zip(sources, batches.epochs(run["steps"])):
        say(f"{source['path']}: {source['train_tokens']:,} tokens, read {epochs:.2f} times")
    bos_id = tokenizer.bos_id if args.document_mask else None
    train(args, run, folder, model, batches, recipe, bos_id, peak)
    prompt = "" if args.data or args.mixture else "class"  # the default text is Python
    with uncompiled(args):
        sample = sample_texts(model.eval(), tokenizer, [prompt], 120, Sampling(seed=args.seed))[0]
    print(f"--- a sample of {folder}\n{prompt}{sample.text}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    command(main)
