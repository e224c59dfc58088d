"""Training: text, recipe, devices, state, and a line that shows how it goes (LLaMA, section 2).

    python train.py                                 # `tiny` on Python's own library, 5 minutes
    python train.py --data book.txt notes/ --minutes 20                             # your text
    python train.py --size stories15m --bench 5     # speed alone, on random tokens
    python train.py --nproc 4 --tp 2                # many processes; torchrun starts them too
    python train.py --size 65b --plan --gpus 2048   # what it would take

The same command goes on where it stopped. DIR (runs/SIZE) then holds params.json,
consolidated.00.pth and tokenizer.model (for generate.py), log.jsonl, loss.svg, state/ and tokens/.
"""
import argparse
import bisect
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import pickle
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from io import BytesIO
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import (DefaultLogsSpecs, SignalException,
                                                       start_processes)

from generate import (DTYPES, Sampling, Weight, best_device, check_compiler, keep_freed_memory,
                      leave_busy_cores, load, sample_texts, shapes, write_meta)
from llama import (ATTENTION, BACKWARD, SIZES, Llama, LlamaConfig, Recipe, TensorParallel,
                   local_shard, logit_rows)
from tokenizer import (Parser, Tokenizer, command, cores, documents, files_of, load_tokenizer,
                       positive, prepare, read_json, standard_library, survey, train_sentencepiece,
                       training_text, write_aside, write_json)

TABLE_1 = {"commoncrawl": 67.0, "c4": 15.0, "github": 4.5, "wikipedia": 4.5, "books": 4.5,
           "arxiv": 2.5, "stackexchange": 2.0}  # sampling proportions in percent (LLaMA, Table 1)
EVAL_TOKENS = 2**15        # held-out tokens of an evaluation on the way
FINAL_EVAL_TOKENS = 2**21  # and of the last one
BAD_STEPS = 5              # steps in a row without a finite loss and gradient that stop a run
TINY_MINUTES = 4.6         # of the default run, with its sample: promised in 5 on two cores

# ---------------------------------------------------------------------------------------------
# Batches (section 2.1)


class Batches:
    """Batches of a run, from memory-mapped token shards. There is no loader state to save:
    sequence i of step s is a function of (seed, s, i) and the shards alone.

    Sequence number g = s n + i of n a step lies at the point u = frac(u_0 + g phi) of the unit
    interval, phi the golden ratio. The interval is divided among the sources by their weights, and
    the place of u within its source's part says where in the source the sequence begins. Multiples
    of phi are evenly spread: after any number of steps each source was read by its weight, and one
    epoch touches about 86 % of the text.
    """

    def __init__(self, folder: Path, sources: list[dict], seq_len: int, rows: int, seed: int,
                 bos_id: int | None = None):
        """rows: sequences a step. bos_id: the token that begins a document, to mask others."""
        self.sources, self.seq_len, self.rows, self.bos_id = sources, seq_len, rows, bos_id
        self.first = int.from_bytes(hashlib.sha256(f"batches {seed}".encode()).digest()[:8], "big")
        self.train = open_shards(folder, sources, "train")
        self.val = open_shards(folder, sources, "val")
        sizes = []
        for source, tokens in zip(sources, self.train):
            if len(tokens) <= seq_len:
                raise ValueError(f"{source['path']} has {len(tokens)} tokens and a sequence needs "
                                 f"{seq_len + 1}; try more text or a smaller --seq-len")
            sizes.append(source["weight"] or len(tokens))
        ends = itertools.accumulate(sizes, initial=0)
        self.edges = [round(2**64 * end / sum(sizes)) for end in ends]

    def sequence(self, number: int) -> np.ndarray:
        """The T + 1 tokens of sequence g, counted over the whole run."""
        u = (self.first + number * 0x9E3779B97F4A7C15) % 2**64  # 2**64 / golden ratio
        k = bisect.bisect_right(self.edges, u) - 1
        places = len(self.train[k]) - self.seq_len
        begin = (u - self.edges[k]) * places // (self.edges[k + 1] - self.edges[k])
        return self.train[k][begin:begin + self.seq_len + 1]

    def step(self, step: int) -> dict[str, Tensor]:
        """The batch of a step."""
        rows = [self.sequence(step * self.rows + i) for i in range(self.rows)]
        return next_tokens(torch.from_numpy(np.stack(rows).astype(np.int64)), self.bos_id)

    def held_out(self, limit: int) -> tuple[Tensor, float]:
        """About `limit` held-out tokens: windows (n, T + 1) that are spread evenly over the text
        and filled up with -1, and the bytes of text that their targets stand for."""
        windows, size = [], 0.0
        for source, tokens in zip(self.sources, self.val):
            every = -(-len(tokens) * len(self.val) // limit)
            for at in range(0, len(tokens) - 1, self.seq_len)[::every]:
                part = torch.from_numpy(tokens[at:at + self.seq_len + 1].astype(np.int64))
                size += (len(part) - 1) * source["val_bytes"] / len(tokens)
                windows.append(F.pad(part, (0, self.seq_len + 1 - len(part)), value=-1))
        return torch.stack(windows), size

    def epochs(self, k: int, steps: int) -> float:
        """How often a run of that many steps reads source k."""
        share = (self.edges[k + 1] - self.edges[k]) / 2**64
        return share * steps * self.rows * self.seq_len / len(self.train[k])


def open_shards(folder: Path, sources: list[dict], split: str) -> list[np.ndarray]:
    """The tokens of each source's split, mapped; ValueError if a file is not as `prepare` said."""
    try:
        return [np.memmap(folder / f"{source['name']}.{split}.bin", source["dtype"], "r",
                          shape=source[f"{split}_tokens"]) for source in sources]
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        raise ValueError(f"the token shards in {folder} are damaged, or not on this machine; try "
                         "--fresh, or an --out that all machines share") from None


def next_tokens(rows: Tensor, bos_id: int | None = None) -> dict[str, Tensor]:
    """The batch of rows (N, T + 1), -1 where there is no token: tokens and targets (N, T), of which
    negative ones are none; with bos_id also `begins`, where a document starts."""
    batch = {"tokens": rows[:, :-1].clamp(min=0), "targets": rows[:, 1:]}
    if bos_id is not None:
        batch["begins"] = batch["tokens"] == bos_id
    return batch


def document_starts(batch: dict[str, Tensor]) -> Tensor | None:
    """The boundaries (cu_seqlens) of a batch's documents, every row starting one too; None where
    attention may cross them."""
    if "begins" not in batch:
        return None
    starts = F.pad(batch["begins"].flatten(), (0, 1), value=True)
    starts[::batch["begins"].shape[1]] = True
    return starts.nonzero()[:, 0].int()


def data_argument(text: str) -> tuple[str, float | None]:
    """A type for argparse: PATH=WEIGHT, or PATH, whose weight is its number of tokens (None)."""
    path, equals, weight = text.rpartition("=")
    if not equals or os.path.exists(text):
        return os.path.normpath(text), None
    return os.path.normpath(path), positive(float)(weight)


def latest_change(path: str) -> list[int]:
    """What shows that a text was edited: the number of its files, their bytes, the newest time."""
    changes = [0, 0, 0]
    for file in files_of(path, []) if os.path.exists(path) else []:
        stat = file.stat()
        changes = [changes[0] + 1, changes[1] + stat.st_size, max(changes[2], stat.st_mtime_ns)]
    return changes


def data_sources(run: "Run") -> list[tuple[str, float | None, Callable]]:
    """(path, weight, tokenizer.Reader) of each text that --data and --mixture ask for; the standard
    library where they ask for nothing."""
    asked = list(run.data)
    if run.mixture:
        preset, folder = run.mixture
        if preset != "table1":
            raise ValueError(f"there is no mixture {preset!r}; try --mixture table1 DIR")
        asked += [(os.path.join(folder, name), weight) for name, weight in TABLE_1.items()]
    sources = []
    for path, weight in asked:
        if not os.path.exists(path):
            raise ValueError(f"there is no {path}; try --data with a file or folder of text")
        if (weight is None) != (asked[0][1] is None):
            raise ValueError("some sources have a weight, some have none; try PATH=WEIGHT for all")
        sources.append((path, weight, partial(documents, [path])))
    return sources or [("the standard library", None, standard_library)]


def prepare_data(run: "Run") -> list[dict]:
    """Makes the run's tokenizer and token shards; returns the facts of each source."""
    surveyed, texts, size, facts = [], [], 0, []
    for path, weight, reader in data_sources(run):
        print_rank0(f"reading {path}")
        found = survey(reader)
        if found.skipped:
            print_rank0("\n  ".join([f"passed over {len(found.skipped)}:", *found.skipped[:20]]))
        surveyed.append((path, weight, reader, found))
        texts.append(training_text(reader, found.chosen))
        size += found.size
    if run.tokenizer:
        tokenizer = load_tokenizer(run.tokenizer)
    else:
        print_rank0(f"training a tokenizer of {run.config.vocab_size} tokens")
        tokenizer = train_sentencepiece(itertools.chain(*texts), run.config.vocab_size, size)
    for path, weight, reader, found in surveyed:
        print_rank0(f"cutting {path} into tokens")
        made = prepare(str(len(facts)), reader, found, tokenizer, run.out / "tokens")
        facts.append({**made, "path": path, "weight": weight, "changed": latest_change(path)})
    tokenizer.save(run.out / "tokenizer.model")
    return facts


# ---------------------------------------------------------------------------------------------
# The recipe (section 2.3 "Optimizer", Table 2)


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to final_lr of the peak at the last step (section 2.3).
    With lr 3e-4, warmup 2000 and final_lr 0.1, step 0 has 1.5e-7 and the last step 3e-5."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, steps - 1 - recipe.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * cosine)


def make_optimizer(parameters: dict[str, Tensor], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2017). Matrices decay, norms do not: the field's custom, the
    papers do not say. Its state exists from the start, so that every state has the same tensors."""
    groups = []
    for decays in (True, False):
        chosen = [p for p in parameters.values() if (p.dim() > 1) == decays]
        groups.append({"params": chosen, "weight_decay": recipe.weight_decay * decays})
    optimizer = torch.optim.AdamW(groups, recipe.lr, recipe.betas, recipe.eps, fused=True)
    for p in parameters.values():
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


NODE = 8   # GPUs of a machine
MFU = 0.5  # of a GPU's FLOP/s, where no pipeline idles: LLaMA's 65B had 0.48
# Of data sheets: bytes of memory, watts, FLOP/s of dense products in bf16 (A100 and H100 as SXM).
GPUS = {"A100": (80e9, 400, 312e12), "A100-40GB": (40e9, 400, 312e12), "H100": (80e9, 700, 989e12),
        "H200": (141e9, 700, 989e12), "RTX 4090": (24e9, 450, 165e12)}

# ---------------------------------------------------------------------------------------------
# How ranks share a step (Llama 3, section 3.3.2)


@dataclass(frozen=True)
class Layout:
    """Ranks next to each other share layers (tp), since tensor parallelism sends the most; then the
    depth (pp), then the state (shards). What is left repeats all of that for other rows."""
    replicas: int = 1  # copies of the whole state: plain data parallelism
    shards: int = 1    # ranks that weights, gradients and AdamW's moments are split over (FSDP)
    pp: int = 1        # ranks that the layers are split over: pipeline
    tp: int = 1        # ranks that each layer is split over: tensor and sequence parallelism

    @property
    def dp(self) -> int:
        return self.replicas * self.shards

    @property
    def size(self) -> int:
        return self.dp * self.pp * self.tp

    def passes(self, rows: int, micro_batch: int) -> int:
        """Micro-batches of a step of so many rows on each rank: in a pipeline pp, 2 pp, ..."""
        return -(-rows // (self.dp * self.pp * micro_batch)) * self.pp


def stage_layers(config: LlamaConfig, stage: int, stages: int) -> int:
    """Layers of a stage: L/S, one more in the first of those between embedding and output."""
    return config.n_layers // stages + (1 <= stage <= config.n_layers % stages)


def divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def arrange(config: LlamaConfig, rows: int, seq_len: int, world_size: int, local_size: int,
            dp: str | None, tp: int | None, pp: int | None) -> Layout:
    """The layout that --dp, --tp and --pp ask for, of world_size ranks, local_size of them on a
    machine, and steps of so many rows; ValueError with the numbers that would do."""
    tp, pp, dp = tp or 1, pp or 1, dp or "fsdp"
    shared = {"n_kv_heads": config.n_kv_heads, "hidden_dim": config.hidden_dim,
              "vocab_size": config.vocab_size, "seq_len": seq_len}
    for name, n in shared.items():
        if n % tp:
            raise ValueError(f"--tp {tp} does not divide {name}={n}; try --tp with one of "
                             f"{divisors(math.gcd(*shared.values()))}")
    if pp > config.n_layers:
        raise ValueError(f"--pp {pp}: the model has {config.n_layers} layers; try --pp with up to "
                         f"{config.n_layers}")
    ways, left = divmod(world_size, tp * pp)
    if left:
        raise ValueError(f"{world_size} processes are no multiple of --tp {tp} x --pp {pp}; try "
                         f"--tp and --pp whose product is one of {divisors(world_size)}")
    if ways > rows:
        raise ValueError(f"{ways} data-parallel ranks cannot share the {rows} sequences of a step; "
                         f"try at most {rows * tp * pp} processes, or a larger --batch-tokens")
    if dp == "none" and ways > 1:
        raise ValueError(f"--dp none leaves {ways} x {tp * pp} processes the same work; try --dp "
                         f"ddp or --dp fsdp, or {tp * pp} processes")
    near = max(1, local_size // (tp * pp))  # data-parallel ranks of one machine
    shards = {"none": 1, "ddp": 1, "fsdp": ways, "hybrid": math.gcd(near, ways)}[dp]
    return Layout(ways // shards, shards, pp, tp)


# ---------------------------------------------------------------------------------------------
# What it costs


def flops_per_token(config: LlamaConfig, seq_len: int, as_papers: bool = False) -> float:
    """Of forward and backward: 6 N + 6 L H E T, N without the look-up table, no masked scores.
    As the papers count: 6 N + 12 L H E T, both included (Chowdhery et al. 2022, appendix B)."""
    scores = 6 * config.n_layers * config.n_heads * config.head_dim * seq_len
    if as_papers:
        return 6 * config.n_params + 2 * scores
    table = config.vocab_size * config.dim * (not config.tie_embeddings)
    return 6 * (config.n_params - table) + scores


@functools.cache
def matmul_flops(device: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of large matrix products: measured on a CPU, a table's on a GPU, None if unknown."""
    if device != "cpu":
        card = torch.cuda.get_device_name() if device == "cuda" else device
        known = [flops for name, (_, _, flops) in GPUS.items() if name in card]
        return known[0] if known and dtype is torch.bfloat16 else None
    a, times, end = torch.ones(1024, 1024, dtype=dtype), [], time.perf_counter() + 0.15
    while time.perf_counter() < end:
        begin = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begin)
    return 2 * 1024**3 / min(times)


def faster_dtype(device: str) -> str:
    """What --dtype auto means: bf16 on GPUs that have it, and on processors that multiply faster
    in it. Some with bf16 instructions do not: a Xeon without AMX takes twice as long as in fp32."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    known = torch.cpu.get_capabilities()
    if device == "mps" or not any(map(known.get, ("avx512_bf16", "amx_bf16", "bf16"))):
        return "fp32"
    rates = {name: matmul_flops("cpu", DTYPES[name]) for name in ("fp32", "bf16")}
    return max(rates, key=rates.get)


def energy(gpu_hours: float, watts: float) -> tuple[float, float]:
    """(MWh, tCO2eq) of a training (LLaMA, section 6): what GPUs at their limit of power draw, times
    1.1 for the data centre (PUE), at the 0.385 kg of CO2eq for a kWh of the average US grid."""
    mwh = gpu_hours * watts * 1.1 / 1e6
    return mwh, mwh * 0.385


def rank_params(config: LlamaConfig, layout: Layout, place: int, shards: int
                ) -> tuple[int, int, int]:
    """Of the rank at that place of the pipeline: parameters of its layers, of the root (embedding,
    norm, output), and number of tensors, as the fullest of `shards` ranks keeps them. FSDP cuts the
    rows by torch.chunk: of 97 rows the first of 7 ranks has 14."""
    D, F, t = config.dim, config.hidden_dim // layout.tp, layout.tp
    q, kv = config.n_heads * config.head_dim // t, config.n_kv_heads * config.head_dim // t
    first, last, layers = place == 0, place == layout.pp - 1, stage_layers(config, place, layout.pp)
    tables = first + last - (first and last and config.tie_embeddings)
    layer = [(q, D), (kv, D), (kv, D), (D, q), (F, D), (D, F), (F, D), (D, 1), (D, 1)] * layers
    root = [(config.vocab_size // t, D)] * tables + [(D, 1)] * last
    in_layers, in_root = (sum(-(-rows // shards) * columns for rows, columns in shapes)
                          for shapes in (layer, root))
    return in_layers, in_root, len(layer + root)


def layer_saves(run: "Run") -> int:
    """Bytes a token that a layer keeps for its backward: by hand the table of LayerByHand; autograd
    keeps, besides, each norm with and without its weight, silu(a) and swiglu(a, b)."""
    c, size = run.config, DTYPES[run.dtype].itemsize
    H, q, kv = c.n_heads, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    kept, in_fp32 = 2 * (c.dim + q + kv + c.hidden_dim), H + 2
    if run.backward != "manual":
        kept += 4 * c.dim + 2 * c.hidden_dim
        in_fp32 += 2 * c.dim * (size < 4)  # x of the norms
        if run.attention != "fused":  # k and v of each query head; scores and weights of T keys
            kept += 2 * (q - kv) + H * run.seq_len * (size < 4)
            in_fp32 += 2 * H * run.seq_len
    return kept * size + in_fp32 * 4


def rank_cost(run: "Run", rows: int, place: int) -> tuple[dict[str, int], dict[str, int]]:
    """What a step in micro-batches of so many rows takes on the rank at that place of the pipeline:
    bytes of memory by what they hold, and bytes sent by the field of Layout that they are for.

    Weights, gradients and AdamW's moments are in fp32; weights travel in run.dtype. In a ring of s
    ranks n bytes are gathered, or summed and scattered, in s - 1 turns of n/s: a rank sends
    n (s - 1)/s, and twice that for both, an all-reduce.
    """
    config, layout, size, t = run.config, run.layout, DTYPES[run.dtype].itemsize, run.layout.tp
    in_layers, in_root, tensors = rank_params(config, layout, place, layout.shards)
    held, layers = in_layers + in_root, stage_layers(config, place, layout.pp)
    whole_layers, root, _ = rank_params(config, layout, place, 1)
    layer, whole, last = whole_layers // layers, whole_layers + root, place == layout.pp - 1
    tokens, V, m = rows * run.seq_len, config.vocab_size // t, layout.passes(run.rows, rows)
    x, sharded, by_hand = tokens * config.dim * size, layout.shards > 1, run.backward == "manual"

    saved = tokens * layer_saves(run) // t
    if not by_hand:
        saved += 2 * x * (t - 1) // t  # both gathered inputs whole
        if layout.dp == 1 and size < 4:  # weights in run.dtype, which FSDP makes otherwise
            saved += size * layer
    in_flight = layers * min(layout.pp - place, m)  # 1F1B: the first is back after pp - place
    activations = in_flight * saved
    if run.backward == "recompute":  # the input of each layer, and one layer at a time
        activations = in_flight * x // t + saved
    if by_hand and run.attention == "equation":  # A, dA and their like, of one layer
        activations += 16 * tokens * config.n_heads // t * run.seq_len
    logits = 0
    if last:  # a chunk of them, W cast, a chunk's dW, and dW until it is sharded
        at_once = min(logit_rows(V, config.dim), tokens)
        logits = (8 + 2 * size) * at_once * V + (2 * size + 4 * sharded) * V * config.dim
    buffers = 2 * x * (t > 1)
    if sharded and layout.pp == 1:  # weights of the root and two layers, gradients of one
        buffers += size * (root + 2 * layer) + (size + 4) * max(layer, root)
    elif sharded:  # in a pipeline all weights, and gradients until the last micro-batch
        buffers += (size + 4) * whole
    elif layout.dp > 1:  # all weights
        buffers += size * whole + 4 * max(layer, root)

    data, ends = (size + 4) * held, (place == 0) + last
    if layout.pp == 1:  # for each micro-batch, and a layer's weights twice; in a pipeline once
        data = m * (data + size * in_layers)
    # A layer exchanges x 4 times forward and 4 times backward; by hand it gathers the 2 inputs of
    # products again, recomputing does the forward again.
    exchanges = layers * {"manual": 10, "autograd": 8, "recompute": 12}[run.backward] + 2 * ends
    sent = {"replicas": 8 * held * (layout.replicas - 1) // layout.replicas,
            "shards": data * (layout.shards - 1), "pp": m * (2 - ends) * x // t,  # x there, dx back
            "tp": m * exchanges * (x // t) * (t - 1)}
    return {"weights": 4 * held, "gradients": 4 * held, "AdamW": 8 * held + 4 * tensors,  # steps
            "activations": activations, "logits": logits, "buffers": buffers}, sent


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


def fit_micro_batch(run: "Run", there: float) -> tuple[int, dict, dict, bool]:
    """(sequences to compute at once, both of rank_cost for the fullest rank, whether the memory is
    there but for a tenth, which is left for what is not counted). If the run leaves it open, up to
    8192 tokens as far as they fit and, in a pipeline, a quarter of what would fill it."""
    each = run.rows // run.layout.dp
    if run.layout.pp > 1:
        each //= 4 * run.layout.pp
    size = run.micro_batch or max(1, min(8192 // run.seq_len, each))
    while True:
        costs = [rank_cost(run, size, place) for place in range(run.layout.pp)]
        memory, sent = max(costs, key=lambda cost: sum(cost[0].values()))
        fits = sum(memory.values()) < 0.9 * there
        if fits or run.micro_batch or size == 1:
            return size, memory, sent, fits
        size //= 2


def fit(run: "Run") -> "Run":
    """The run with a micro-batch that this machine holds, and whether freed memory may be kept,
    whose gaps take up to a third more. ValueError, before anything is allocated, if none fits."""
    auto = run.dtype == "auto"
    if auto:
        run = replace(run, dtype=faster_dtype(run.device))
    there = memory_there(run.device)
    if run.device == "cpu":
        there //= run.local_size
    size, need, _, fits = fit_micro_batch(run, there)
    total = sum(need.values())
    if not fits and auto and run.dtype == "fp32":
        return fit(replace(run, dtype="bf16"))
    if not fits:
        parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in need.items())
        raise ValueError(f"{run.size} needs about {total / 1e9:.0f} GB a process to train ({parts})"
                         f", and {there / 1e9:.0f} GB are free; try a smaller --size, "
                         f"--micro-batch 1 or --seq-len {run.seq_len // 2}")
    return replace(run, micro_batch=size, roomy=total < 0.6 * there)


def plan(run: "Run", name: str, mfu: float | None) -> dict:
    """What the run takes in its layout on GPUs of that name. mfu: of the whole step, if it was
    measured. Sent is what the fullest rank sends. Allocates nothing."""
    if name == "cpu":  # machines like this one, whose watts are a guess
        there, watts, peak = memory_there("cpu"), 100, matmul_flops("cpu", DTYPES[run.dtype])
    elif run.dtype == "bf16":
        there, watts, peak = GPUS[name]
    else:
        raise ValueError("only the bf16 FLOP/s of GPUs are known; try --dtype bf16")
    layout, config = run.layout, run.config
    micro_batch, memory, sent, fits = fit_micro_batch(run, there)
    passes = layout.passes(run.rows, micro_batch)
    bubble = (layout.pp - 1) / passes  # how long a pipeline idles for what it computes
    if mfu is None:
        mfu = MFU / (1 + bubble)
        if run.backward == "recompute":  # the forward twice
            mfu *= 3 / 4
    flops, as_papers = (flops_per_token(config, run.seq_len, papers) for papers in (False, True))
    steps = run.steps or math.ceil(run.recipe.train_tokens / run.recipe.batch_tokens)
    tokens, speed = steps * run.rows * run.seq_len, mfu * layout.size * peak / flops
    gpu_hours = layout.size * tokens / speed / 3600
    mwh, tons = energy(gpu_hours, watts)
    return {"size": run.size, "params": config.n_params, "flops_per_token": flops, "gpu": name,
            "gpus": layout.size, **asdict(layout), "micro_batch": micro_batch, "passes": passes,
            "memory": {**memory, "needed": sum(memory.values()), "there": there},
            "fits": "yes" if fits else f"no; try {nearest_that_fits(run, there)}",
            "sent": sent, "bubble": bubble, "mfu": mfu, "mfu_as_papers": mfu * as_papers / flops,
            "steps": steps, "tokens": tokens, "tokens_per_s": speed,
            "step_s": tokens / steps / speed, "days": tokens / speed / 86400,
            "gpu_hours": gpu_hours, "mwh": mwh, "tco2eq": tons}


def nearest_that_fits(run: "Run", there: float) -> str:
    """What to try where the memory does not hold a layout: FSDP with the fewest doublings and
    halvings of --tp and --pp."""
    splits = list(itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64)))
    splits.sort(key=lambda split: abs(math.log2(split[0] / run.layout.tp))
                + abs(math.log2(split[1] / run.layout.pp)))
    for tp, pp in splits:
        with contextlib.suppress(ValueError):  # there is no such layout
            near = arrange(run.config, run.rows, run.seq_len, run.layout.size, NODE, "fsdp", tp, pp)
            if fit_micro_batch(replace(run, layout=near, micro_batch=None), there)[-1]:
                return f"--dp fsdp --tp {tp} --pp {pp}"
    return "more --gpus or --backward recompute"


def plan_text(planned: dict) -> str:
    """One name and value a line, bytes in GB of 1e9."""
    lines = []
    for name, value in planned.items():
        if isinstance(value, dict):
            for part, size in value.items():
                lines.append(f"{f'{name} {part}':22}{size / 1e9:,.2f} GB")
        elif isinstance(value, str):
            lines.append(f"{name:22}{value}")
        else:
            lines.append(f"{name:22}{value:,.4g}" if value < 1000 else f"{name:22}{value:,.0f}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# State: torch.distributed.checkpoint's folder, tensors only; everything else is JSON


class SafeUnpickler(pickle.Unpickler):
    """Reads a checkpoint's metadata with the classes that it needs and no others. Entries that are
    not tensors, which would be unpickled when loaded, are refused by the same rule."""
    NEEDED = {"torch.distributed.checkpoint.metadata":
              "Metadata TensorStorageMetadata TensorProperties ChunkStorageMetadata MetadataIndex "
              "StorageMeta _MEM_FORMAT_ENCODING",
              "torch.distributed.checkpoint.filesystem": "_StorageInfo",
              "torch.serialization": "_get_layout",
              "torch": "Size float32 float16 bfloat16 float64 uint8 int64"}

    def find_class(self, module: str, name: str):
        if name in self.NEEDED.get(module, "").split():
            return super().find_class(module, name)
        if module.split(".")[0] == "pathlib":
            return PurePath  # the folder it was written to; not used
        raise pickle.UnpicklingError(f"its metadata names {module}.{name}")


class SafeReader(dcp.FileSystemReader):
    """Of one state, whose metadata is read once, by SafeUnpickler."""

    def __init__(self, state: Path):
        super().__init__(state)
        self.metadata = SafeUnpickler(BytesIO((state / ".metadata").read_bytes())).load()

    def read_metadata(self, *args, **kwargs):
        return self.metadata


class Writer(dcp.FileSystemWriter):
    """Writes a state aside. When all ranks have written, the one that coordinates renames it: a
    state is there wholly or not at all. The last two up to this step are kept."""

    def __init__(self, folder: Path, facts: dict):
        super().__init__(folder / "saving", per_thread_copy_ahead=0)
        self.facts, self.done = facts, folder / f"step-{facts['step']:09d}"

    def prepare_global_plan(self, plans):
        shutil.rmtree(self.path)  # of a save that was cut short
        self.path.mkdir()
        return super().prepare_global_plan(plans)

    def finish(self, metadata, results):
        super().finish(metadata, results)
        facts = {**self.facts, "crc32": checksum(self.path, self.facts)}
        (self.path / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        shutil.rmtree(self.done, ignore_errors=True)
        os.replace(self.path, self.done)
        states = sorted(self.done.parent.glob("step-*"))
        before = states.index(self.done) - 1
        for state in states[:max(0, before)] + states[before + 2:]:
            shutil.rmtree(state, ignore_errors=True)


def checksum(state: Path, facts: dict) -> int:
    """Of the two files of a state that are not zip archives."""
    return zlib.crc32((state / ".metadata").read_bytes() + json.dumps(facts).encode())


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict,
               group: dist.ProcessGroup | None, before: Future | None = None) -> Future:
    """Begins to write folder/step-N, N being facts["step"], when the save `before` is done. A copy
    is written while training goes on; where memory for a copy is short, training waits. The
    result() waits; OSError on every rank if one failed. group: of all ranks, for this alone."""
    if before:
        before.result()
    writer, size = Writer(folder, facts), sum(local_shard(x).nbytes for x in tensors.values())
    size *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of all ranks on this machine
    roomy = memory_there("cpu") > 2 * size
    if roomy:
        tensors = writer.stage(tensors)
    saving = ThreadPoolExecutor(1).submit(write_state, writer, tensors, group)
    if not roomy:
        saving.result()
    return saving


def write_state(writer: Writer, tensors: dict[str, Tensor], group: dist.ProcessGroup | None):
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    except (OSError, dcp.api.CheckpointException) as error:
        if group is None or dist.get_rank() == 0:
            shutil.rmtree(writer.path, ignore_errors=True)
        raise OSError(f"the state of step {writer.facts['step']} could not be written "
                      f"({cause_of(error)}); older states are untouched; try to free space, then "
                      "the same command") from None


def load_state(folder: Path, tensors: dict[str, Tensor]) -> dict | None:
    """Fills the tensors from the newest state that is good on every rank, whatever layout it was
    saved in, and returns its facts; None if there is none. A damaged one is named, passed over."""
    states = together(lambda: sorted(folder.glob("step-*")))
    for state in reversed(states):
        try:
            return together(partial(read_state, state, tensors), everywhere=True)
        except ValueError as error:
            print_rank0(f"{state} is damaged and passed over: {error}")
    if states:
        raise ValueError(f"no state in {folder} is good; try --fresh to start over")
    return None


def read_state(state: Path, tensors: dict[str, Tensor]) -> dict:
    """Fills the tensors and returns the facts; ValueError if bytes are not as they were written.
    Each tensor is stored as a zip archive (torch.save) with a CRC-32, which torch ignores and
    Python's zipfile checks. Each rank checks its share of the archives."""
    rank, size = 0, 1
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    try:
        facts = json.loads((state / "facts.json").read_text(encoding="utf-8"))
        if facts.pop("crc32") != checksum(state, facts):
            raise ValueError("facts.json or .metadata is not what was written")
        reader = SafeReader(state)
        for part in list(reader.metadata.storage_data.values())[rank::size]:
            with open(state / part.relative_path, "rb") as file:
                file.seek(part.offset)
                archive = BytesIO(file.read(part.length))
            if zipfile.ZipFile(archive).testzip():
                raise ValueError(f"{part.relative_path} is not what was written")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        return facts
    except (Exception, dcp.api.CheckpointException) as error:  # whatever damaged bytes lead to
        raise ValueError(cause_of(error)) from None


def cause_of(error: BaseException) -> str:
    """The last line of what happened on the first rank that failed; Ctrl-C stays Ctrl-C."""
    while isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, KeyboardInterrupt):
        raise error
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


def export_state(state: Path, config: LlamaConfig, folder: Path) -> None:
    """Meta's folder from the state in step-N, a tensor at a time, whatever layout wrote it."""
    reader, weights = SafeReader(state), {}

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        tensors = {f"model.{name}": torch.empty(shape)}
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        return tensors[f"model.{name}"]

    for name, shape in shapes(config).items():
        weights[name] = Weight(shape, torch.float32, (), partial(read, name, shape))
    write_meta(config, weights, folder)


def state_tensors(parameters: dict[str, Tensor], optimizer) -> dict[str, Tensor]:
    """Everything that training goes on from: weights and AdamW's moments, by name."""
    state = {}
    for name, p in parameters.items():
        state[f"model.{name}"] = p.detach()
        for key, value in optimizer.state[p].items():
            state[f"{key}.{name}"] = value
    return state


# ---------------------------------------------------------------------------------------------
# Many processes: how they start, and how a run survives one that ends

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
         if hasattr(signal, name)]  # of a terminal, a system, a dropped ssh, SLURM


class World(NamedTuple):
    rank: int        # of this process
    size: int        # processes in all
    local_size: int  # on this machine


def print_rank0(text: str) -> None:
    """On stderr, once for all ranks."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def join(device: str, timeout: float) -> Iterator[World]:
    """This process's place among the ranks that torchrun or `start` made; without them it is alone.
    A collective that takes `timeout` seconds is an error."""
    env = os.environ
    rank, size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    world = World(rank, size, int(env.get("LOCAL_WORLD_SIZE", size)))
    if size == 1:
        yield world
        return
    if "PARENT_PID" in env:
        watch = partial(end_with_parent, int(env["PARENT_PID"]))
        threading.Thread(target=watch, daemon=True).start()
    if device == "cuda":
        torch.cuda.set_device(int(env["LOCAL_RANK"]))
    else:
        torch.set_num_threads(max(1, cores() // world.local_size))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield world
        dist.destroy_process_group()
    except Exception as error:
        # A mistake that all ranks meet is said by rank 0. Other errors often come from the end of
        # another rank. Within seconds whoever started the ranks has ended the others.
        if rank > 0 or not isinstance(error, (ValueError, OSError)):
            time.sleep(5)
        raise


def end_with_parent(parent: int) -> None:
    """Ends a rank, and the processes that it started, when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def patient_group() -> dist.ProcessGroup | None:
    """A group of all ranks, if there are several, for collectives that wait longer than --timeout:
    for text that rank 0 prepares, or for a slow disk."""
    if dist.is_initialized():
        return dist.new_group(backend="gloo", timeout=timedelta(days=7))
    return None


def together(work: Callable, everywhere: bool = False):
    """Runs work() on rank 0, or with `everywhere` on all ranks. Every rank gets rank 0's result or
    raises the first ValueError or OSError of any rank."""
    group = patient_group()
    if group is None:
        return work()
    result = error = None
    try:
        if everywhere or dist.get_rank() == 0:
            result = work()
    except (ValueError, OSError) as caught:
        error = caught
    errors, results = [None] * dist.get_world_size(), [result]
    dist.all_gather_object(errors, error, group)
    for error in errors:
        if error is not None:
            raise error
    dist.broadcast_object_list(results, 0, group)
    return results[0]


def start(n: int, command: list[str], states: Path) -> int:
    """Runs the command as n ranks on this machine (Linux, macOS) and returns its exit status. When
    a rank dies, all start again from the newest state; a second death without a new state is the
    end. A user's mistake (2) and a stop by a signal (over 128) are not tried again."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    heard = [number.name for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(heard)
    reached = None
    for again in itertools.count():
        try:
            rank, status = run_ranks(n, command, again)
        except SignalException as stop:
            return 128 + stop.sigval
        if status in (0, 2) or status > 128:
            return status
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        newest = max(states.glob("step-*"), default=None)
        if again and newest == reached:
            print_rank0(f"error: rank {rank} {how}, again before a new state was saved; try "
                        "--save-every with fewer steps, then the same command, which goes on")
            return 1
        print_rank0(f"rank {rank} {how}; going on from the last good state")
        reached = newest


def run_ranks(n: int, command: list[str], again: int) -> tuple[int, int]:
    """Starts the ranks and waits: (rank, exit status or minus the signal) of the first that died or
    met an error, else of one when all have ended. Each rank has a session of its own, so that a
    terminal's Ctrl-C reaches this process alone, which passes it on, once."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    envs, args = {}, dict.fromkeys(range(n), tuple(command[1:]))
    for rank in args:
        envs[rank] = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{n}",
                      "LOCAL_WORLD_SIZE": f"{n}", "MASTER_ADDR": "127.0.0.1",
                      "MASTER_PORT": f"{store.port}", "TORCHELASTIC_USE_AGENT_STORE": "True",
                      "TORCHELASTIC_RESTART_COUNT": f"{again}", "PARENT_PID": f"{os.getpid()}"}
    with tempfile.TemporaryDirectory() as logs:
        ranks = start_processes("train", command[0], args, envs, DefaultLogsSpecs(logs))
        processes = [handler.proc for handler in ranks.subprocess_handlers.values()]
        try:
            while True:  # ranks.wait() would end all when the first has stopped, while others save
                statuses = [process.poll() for process in processes]
                failed = [status for status in statuses if status and status <= 128]
                if failed or None not in statuses:  # of several, a signal is more likely the cause
                    status = min(failed) if failed else max(statuses)
                    return statuses.index(status), status
                time.sleep(0.05)
        except SignalException as stop:
            with contextlib.suppress(SignalException):  # a second one: at once
                ranks.close(stop.sigval, timeout=600)
            raise
        finally:
            ranks.close(signal.SIGKILL)


def replicas_agree(tensors: dict[str, Tensor]) -> None:
    """Ends all ranks with status 1 where the copies of a tensor on several ranks are not the same
    bits. To be called before a save, so that the last state stays good. Ranks compare one checksum
    a tensor, the exclusive or of its elements, which any one wrong bit changes."""
    if not dist.is_initialized():
        return
    wrong = set()
    for name, tensor in tensors.items():
        for dim, placement in enumerate(getattr(tensor, "placements", ())):
            if placement.is_replicate():
                mine = torch.hash_tensor(tensor.to_local()).view(torch.int64)
                ends = torch.stack([mine, ~mine])  # most and, as ~ turns the order, least
                dist.all_reduce(ends, dist.ReduceOp.MAX, tensor.device_mesh.get_group(dim))
                if ends[0] != ~ends[1]:
                    wrong.add(name)
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, wrong)
    wrong = sorted(set().union(*found))
    if wrong:
        print_rank0(f"error: the copies of {wrong[0]} on several ranks differ ({len(wrong)} such "
                    "tensors): a memory or processor failed in silence; nothing was saved since")
        dist.barrier()
        sys.exit(1)


class Stopper:
    """A signal of STOPS, unless it is ignored (nohup), ends the run after the step, with its state
    saved; the same one again at once. `signal` is its number, else 0."""

    def __init__(self):
        self.signal, self.before = 0, {}
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.stop)

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        print_rank0("\nstopping after this step; the same command goes on from there")


# ---------------------------------------------------------------------------------------------
# Many devices (LLaMA, section 2.4; Llama 3, section 3.3.2)

# An objective gives the SUM of a micro-batch's losses, so that the engine can divide once by the
# number of targets of the whole step, and the loss does not depend on how rows are grouped.
Objective = Callable[[Llama, dict[str, Tensor]], Tensor]


def pretrain(model: Llama, batch: dict[str, Tensor]) -> Tensor:
    """Objective of section 2: negative log-likelihood of the next token, in nats."""
    return model.loss(batch["tokens"], batch["targets"], document_starts(batch), reduction="sum")


class Stage(Llama):
    """Consecutive layers of a Llama: all of them, or stage `index` of `count` of a pipeline. The
    first stage embeds; the last has the final norm, the output projection and the loss. Parameters
    have the names that they have in the whole model."""

    def __init__(self, config: LlamaConfig, index: int = 0, count: int = 1, **options):
        super().__init__(config, **options)
        self.first, self.last = index == 0, index == count - 1
        begin = sum(stage_layers(config, before, count) for before in range(index))
        end = begin + stage_layers(config, index, count)
        for i in range(config.n_layers):
            if not begin <= i < end:
                self.layers[i] = None
        if not (self.first or self.last and config.tie_embeddings):
            self.tok_embeddings = None
        if not self.last:
            self.norm = self.output = None

    def compute(self, objective: Objective, batch: dict[str, Tensor]) -> Tensor:
        """objective(self, batch), between the hooks by which FSDP gathers the root's weights."""
        return objective(self, batch)

    def forward(self, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """What torch's pipeline calls, for `pretrain` in stages: x is the tokens on the first
        stage, else h of the stage before; the last stage gives the loss, the others h."""
        h = self.embed(x) if self.first else x
        h = self.run_layers(h, batch["targets"].shape[1], document_starts(batch))
        if not self.last:
            return h
        return self.loss_of(self.norm(h), batch["targets"], reduction="sum")


def share_layers(stage: Stage, mesh) -> None:
    """Tensor parallelism: splits the parameters over the mesh's ranks. Wq, Wk, Wv, W1, W3,
    embedding and output by rows, which are heads, hidden units and words; Wo and W2 by columns;
    norms stay whole. The stage is on meta: nothing is there yet."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    for name, p in list(stage.named_parameters()):
        placement = Shard(0)
        if p.dim() == 1:
            placement = Replicate()
        elif name.endswith(("wo.weight", "w2.weight")):
            placement = Shard(1)
        owner, _, key = name.rpartition(".")
        part = nn.Parameter(distribute_tensor(p, mesh, [placement]))
        stage.get_submodule(owner).register_parameter(key, part)


def share_state(stage: Stage, layout: Layout, mesh) -> None:
    """Data parallelism by torch's fully_shard (FSDP2) on the mesh (replicas, shards), layer by
    layer: weights travel in the type of the computation, gradients in fp32, and the next layer's
    weights are gathered while one is computed. One shard is DDP: nothing to gather, gradients are
    summed over the replicas."""
    from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                        register_fsdp_forward_method)
    dims = ("replicas", "shards") if layout.replicas > 1 else ("shards",)
    policy = MixedPrecisionPolicy(stage.dtype, torch.float32, cast_forward_inputs=False)
    # Weights that were gathered stay until the backward where there is nothing to free them for
    # (DDP), and in a pipeline, which would gather them again for every micro-batch.
    freed = layout.shards > 1 and layout.pp == 1
    split = partial(fully_shard, mesh=mesh[dims], mp_policy=policy)
    for layer in stage.layers:
        if layer is not None:
            split(layer, reshard_after_forward=freed)
    split(stage)
    register_fsdp_forward_method(stage, "compute")


class Engine:
    """What this rank holds of a model, and how its part of a batch passes through it."""

    def __init__(self, run: "Run"):
        """With run.compile torch.compile fuses what lies between the products of a layer."""
        self.config, self.layout, self.device = run.config, run.layout, run.device
        self.micro_batch, self.compiled = run.micro_batch, run.compile
        self.dp_rank = self.pp_rank = 0
        layout, tp, names = run.layout, TensorParallel(), ("replicas", "shards", "pp", "tp")
        if run.compile:
            check_compiler()
        if layout.size > 1:
            shape = (layout.replicas, layout.shards, layout.pp, layout.tp)
            self.mesh = dist.init_device_mesh(run.device, shape, mesh_dim_names=names)
            replica, shard, self.pp_rank, _ = self.mesh.get_coordinate()
            self.dp_rank = replica * layout.shards + shard
            if layout.tp > 1:
                tp = TensorParallel(self.mesh.get_group("tp"))
        dtype = None if run.dtype == "fp32" else DTYPES[run.dtype]
        with torch.device("meta"):
            self.stage = Stage(run.config, self.pp_rank, layout.pp, attention=run.attention,
                               backward=run.backward, dtype=dtype, tp=tp)
        for layer in self.stage.layers:
            if run.compile and layer is not None:
                layer.compile()
        if layout.tp > 1:
            share_layers(self.stage, self.mesh["tp"])
        if layout.dp > 1:
            share_state(self.stage, layout, self.mesh)
        self.stage.to_empty(device=run.device)
        self.stage.init_weights(run.seed)
        # FSDP replaces parameters by gathered ones for a while; these stay.
        self.parameters = dict(self.stage.named_parameters())
        self.schedules = {}  # of the pipeline, by the number of micro-batches

    def rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows of a batch that this rank computes: as many as others do, in a pipeline whole
        micro-batches, filled up with rows without targets."""
        count, dp = len(batch["targets"]), self.layout.dp
        each, mine = -(-count // dp), {}
        if self.layout.pp > 1:
            each = self.layout.passes(count, self.micro_batch) * self.micro_batch
        for name, x in batch.items():
            x = F.pad(x, (0, 0, 0, each * dp - count), value=-(name == "targets"))
            mine[name] = x[self.dp_rank * each:][:each].to(self.device)
        return mine

    def loss(self, batch: dict[str, Tensor], objective: Objective, train: bool) -> float:
        """This rank's share of the loss of a batch: shares add up, over all ranks, to the mean of
        the objective over all targets >= 0. train: leaves its gradient in .grad."""
        rows, count = self.rows(batch), max(1, int((batch["targets"] >= 0).sum()))
        scale = self.layout.dp / count  # the gradients' mean over data-parallel ranks is taken
        starts, total = range(0, len(rows["targets"]), self.micro_batch), 0.0
        stance = contextlib.nullcontext()
        if self.compiled and not train:  # evaluations have more shapes than are worth compiling
            stance = torch.compiler.set_stance("force_eager")
        with torch.set_grad_enabled(train), stance:
            if self.layout.pp > 1:
                starts, total = [], self.run_pipeline(rows, scale, train)
            for at in starts:
                part = {name: x[at:at + self.micro_batch] for name, x in rows.items()}
                if self.layout.replicas > 1:  # they exchange gradients once
                    self.stage.set_requires_all_reduce(at == starts[-1])
                loss = self.stage.compute(objective, part)
                if train:
                    (loss * scale).backward()  # adds to .grad
                total += loss.item()
        if train:
            self.complete()
        return total / (count * self.layout.tp)

    def run_pipeline(self, rows: dict[str, Tensor], scale: float, train: bool) -> float:
        """The sum of `pretrain` through the ranks of the pipeline, 0 on all but the last. Each
        micro-batch goes back as soon as it came to the end (1F1B; Narayanan et al. 2021), so that
        a rank keeps the activations of pp micro-batches at most."""
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B
        count = len(rows["targets"]) // self.micro_batch
        if count not in self.schedules:
            stage = PipelineStage(self.stage, self.pp_rank, self.layout.pp,
                                  torch.device(self.device), group=self.mesh.get_group("pp"))
            self.schedules[count] = Schedule1F1B(
                stage, count, loss_fn=lambda loss, scale: loss * scale[0], scale_grads=False)
        schedule, inputs, ends, losses = self.schedules[count], [], {}, []
        if self.stage.first:
            inputs = [rows["tokens"]]
        if self.stage.last:  # torch splits `target` by micro-batch and gives it to loss_fn
            ends = {"target": torch.full((count,), scale), "losses": losses}
        go = schedule.step if train else schedule.eval
        go(*inputs, batch=rows, return_outputs=False, **ends)
        return sum(loss.item() for loss in losses) / scale

    def gradients(self) -> list[Tensor]:
        """This rank's part of every gradient."""
        return [local_shard(p.grad) for p in self.parameters.values() if p.grad is not None]

    def complete(self) -> None:
        """Adds what a backward leaves on other ranks. A norm saw this rank's tokens alone (tensor
        parallelism); a tied embedding is used on the first and on the last stage."""
        if self.layout.tp > 1:
            norms = [grad for grad in self.gradients() if grad.dim() == 1]
            whole = torch.cat(norms)
            dist.all_reduce(whole, group=self.mesh.get_group("tp"))
            torch._foreach_copy_(norms, whole.split([len(norm) for norm in norms]))
        ends = self.stage.first or self.stage.last
        if self.layout.pp > 1 and ends and self.config.tie_embeddings:
            mine = local_shard(self.stage.tok_embeddings.weight.grad)
            theirs = torch.empty_like(mine)
            peer = self.layout.pp - 1 if self.stage.first else 0
            swap = partial(dist.P2POp, group=self.mesh.get_group("pp"), group_peer=peer)
            for work in dist.batch_isend_irecv([swap(dist.isend, mine), swap(dist.irecv, theirs)]):
                work.wait()
            mine += theirs

    def squared_norm(self) -> float:
        """This rank's share of the squared norm of the gradient: a part that several ranks hold,
        of all weights the replicas and of a norm the tensor parallel ranks, is divided among them.
        """
        norms, copies = [], []
        for name, p in self.parameters.items():
            tied = name == "tok_embeddings.weight" and not self.stage.first  # the first one's again
            if p.grad is not None and not tied:
                norms.append(local_shard(p.grad))
                copies.append(self.layout.replicas * self.layout.tp ** (p.dim() == 1))
        squares = torch.stack(torch._foreach_norm(norms)).double().square().cpu()
        return (squares / torch.tensor(copies)).sum().item()

    def add_up(self, *shares: float) -> list[float]:
        """The sums over all ranks, on all ranks."""
        if self.layout.size == 1:
            return list(shares)
        sums = torch.tensor(shares, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()


def train_step(engine: Engine, optimizer, batch: dict[str, Tensor], objective: Objective,
               lr: float, clip: float, flag: float = 0) -> tuple[float, float, float]:
    """One step: (loss, norm of the gradient, sum of all ranks' flags).

    The gradient is that of the mean over all targets, scaled to norm `clip` if it is longer.
    If loss or norm is not finite, on whichever rank, the weights stay as they are on all.
    """
    share = engine.loss(batch, objective, train=True)
    loss, square, flags = engine.add_up(share, engine.squared_norm(), flag)
    norm = math.sqrt(square)
    if math.isfinite(loss + norm):
        if norm > clip:
            torch._foreach_mul_(engine.gradients(), clip / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, flags


def evaluate(engine: Engine, batches: Batches, limit: int) -> tuple[float, float]:
    """About `limit` tokens of held-out text: (mean negative log-likelihood a token in nats, bits
    per byte)."""
    windows, size = batches.held_out(limit)
    share, tokens = 0.0, 0
    for rows in windows.split(batches.rows):
        batch = next_tokens(rows, batches.bos_id)
        count = int((batch["targets"] >= 0).sum())
        share += count * engine.loss(batch, pretrain, train=False)
        tokens += count
    nll, = engine.add_up(share)
    return nll / tokens, nll / math.log(2) / size


# ---------------------------------------------------------------------------------------------
# The run: its settings, and the folder that it goes on from


@dataclass(frozen=True)
class Run:
    """Every setting of a run, resolved. run.json holds them all, config and recipe by field."""
    size: str
    config: LlamaConfig
    recipe: Recipe               # without gaps
    data: list[tuple[str, float | None]]  # path, weight
    mixture: list[str] | None
    tokenizer: str | None        # None: one is trained
    seq_len: int
    seed: int
    dtype: str
    attention: str
    backward: str
    compile: bool
    out: Path
    fresh: bool
    minutes: float | None        # what sets the steps, if anything does
    steps: int | None            # None until the speed is known
    eval_every: int | None       # None: a tenth of the steps, at most 1000
    save_every: int | None       # None: as eval_every
    layout: Layout
    device: str
    local_size: int              # processes of this machine
    micro_batch: int | None      # None until it is known what the memory holds,
    roomy: bool = False          # and whether freed memory may be kept
    threads: int | None = None   # torch's; None where many processes share the cores
    sources: list[dict] | None = None  # facts of the token shards, when they are there
    code: int = zlib.crc32(Path(__file__).with_name("llama.py").read_bytes())

    @property
    def rows(self) -> int:
        """Sequences a step."""
        return self.recipe.batch_tokens // self.seq_len


# What a resumed run must match.
MUST_MATCH = ("size", *LlamaConfig.__dataclass_fields__, *Recipe.__dataclass_fields__, "data",
              "mixture", "tokenizer", "seq_len", "seed", "dtype", "attention", "backward",
              "compile")


def setting(text: str) -> tuple[str, object]:
    """A type for argparse: FIELD=VALUE as (field, value)."""
    name, _, value = text.partition("=")
    return name, json.loads(value.lower().replace("none", "null"))


def shape_of(args) -> tuple[LlamaConfig, Recipe]:
    """The size's shape and recipe, with the changes that were asked for."""
    if args.size not in SIZES:
        raise ValueError(f"there is no size {args.size!r}; try one of {', '.join(SIZES)}")
    config, recipe = SIZES[args.size]
    changes = asdict(config) | dict(args.set)
    if args.vocab_size:
        changes["vocab_size"] = args.vocab_size
    if args.tokenizer:
        changes["vocab_size"] = load_tokenizer(args.tokenizer).vocab_size
    recipe, _ = recipe.filled()
    for name in ("lr", "warmup", "batch_tokens", "document_mask"):
        if getattr(args, name) is not None:
            recipe = replace(recipe, **{name: getattr(args, name)})
    return LlamaConfig.from_dict(changes), recipe


def resolve(args, device: str, size: int, local_size: int) -> Run:
    """All settings of a run of `size` processes; ValueError for what cannot be."""
    config, recipe = shape_of(args)
    most = min(config.max_seq_len, recipe.batch_tokens)
    settings = {name: value for name, value in vars(args).items()
                if name in Run.__dataclass_fields__}
    seq_len = args.seq_len or most
    if seq_len > most:
        raise ValueError(f"--seq-len {seq_len} is over the context, {config.max_seq_len}, or the "
                         f"batch, {recipe.batch_tokens}; try --set max_seq_len=N")
    if args.dtype == "auto" and args.plan:
        settings["dtype"] = faster_dtype(device) if args.gpu == "cpu" else "bf16"
    if args.compile and (args.tp or recipe.document_mask and device == "cpu"):
        raise ValueError("--compile cannot see through the exchanges of --tp, and on a CPU would "
                         "compile anew for every document; try --no-document-mask, or without it")
    layout = arrange(config, recipe.batch_tokens // seq_len, seq_len, size, local_size, args.dp,
                     args.tp, args.pp)
    if args.size == "tiny" and not (args.steps or args.minutes):
        settings["minutes"] = TINY_MINUTES
    elif not (args.steps or args.minutes):
        settings["steps"] = math.ceil(recipe.train_tokens / recipe.batch_tokens)
    if size == 1:
        settings["threads"] = torch.get_num_threads()
    settings["out"] = Path(args.out or f"runs/{args.size}")
    return Run(**settings | {"config": config, "recipe": recipe, "seq_len": seq_len,
                             "layout": layout, "device": device, "local_size": local_size})


def settings_of(run: Run) -> dict:
    """What run.json holds."""
    values = asdict(run)
    values = {**values.pop("config"), **values.pop("recipe"), **values}
    return json.loads(json.dumps(values, default=str))


def go_on(run: Run, old: dict) -> Run:
    """The run with what run.json kept; ValueError where a setting must be what it was."""
    if run.dtype == "auto":
        run = replace(run, dtype=old.get("dtype", "auto"))
    new = settings_of(run)
    for name in MUST_MATCH:
        if old.get(name, new[name]) != new[name]:  # a run may be of before a setting existed
            raise ValueError(f"{run.out} was trained with {name}={old[name]}; "
                             "try --out DIR or --fresh")
    if old.get("code") != run.code:
        print_rank0("warning: llama.py is not what this run began with; its losses may differ")
    kept = {"sources": old["sources"]}
    if run.steps is None and old.get("minutes") == run.minutes:  # the clock sets them once
        kept["steps"] = old.get("steps")
    if run.micro_batch is None and old.get("layout") == new["layout"]:
        kept["micro_batch"] = old.get("micro_batch")
    if run.threads and old.get("threads"):
        kept["threads"] = old["threads"]
    return replace(run, **kept)


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Locks a run's folder, as long as this process lives at most: the system unlocks it even when
    the process is killed. ValueError if another process holds the lock."""
    with open(folder / "lock", "a") as file:
        try:
            if sys.platform == "win32":
                import msvcrt
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process trains in {folder}; try --out with another folder, "
                             "or wait until it ends") from None
        yield


def open_run(run: Run, held: contextlib.ExitStack) -> Run:
    """Makes the run's folder, or opens it: the run with what it kept, with its text prepared. The
    folder is locked until `held` is closed."""
    file, old = run.out / "run.json", {}
    if not file.exists() and run.out.exists() and set(os.listdir(run.out)) - {"lock"}:
        raise ValueError(f"{run.out} holds files that are no run's; try another --out")
    run.out.mkdir(parents=True, exist_ok=True)
    if "PARENT_PID" not in os.environ:  # else the parent has locked it
        held.enter_context(sole_writer(run.out))
    if file.exists() and run.fresh:  # only of a run of ours is anything removed
        data_sources(run)  # a mistake there, or in memory, is said before
        fit(run)
        for folder in ("state", "tokens"):
            shutil.rmtree(run.out / folder, ignore_errors=True)
        for name in ("run.json", "log.jsonl", "loss.svg", "params.json", "consolidated.00.pth",
                     "tokenizer.model", "tokenizer_config.json"):
            (run.out / name).unlink(missing_ok=True)
    elif file.exists():
        try:
            old = read_json(file.read_bytes())
        except ValueError:
            raise ValueError(f"{file} is damaged; try --fresh to start over, or another --out"
                             ) from None
    run = fit(go_on(run, old) if old.get("sources") else run)
    write_json(file, settings_of(run))
    if not run.sources:
        run = replace(run, sources=prepare_data(run))
        write_json(file, settings_of(run))
    return run


# ---------------------------------------------------------------------------------------------
# What a run does, and the line that shows it


def utilisation(run: Run, tokens_per_s: float, peak: float | None) -> float | None:
    """MFU: FLOP/s that the model needs, of the peak of all devices; None where that is unknown."""
    flops = tokens_per_s * flops_per_token(run.config, run.seq_len)
    return peak and flops / (peak * run.layout.size)


def timed_steps(run: Run, engine: Engine, count: int) -> tuple[float, float]:
    """Median seconds of `count` steps on random tokens, after two untimed ones; the last loss."""
    optimizer, times = make_optimizer(engine.parameters, run.recipe), []
    random, shape = torch.Generator().manual_seed(0), (run.rows, run.seq_len + 1)
    for _ in range(count + 2):
        tokens = torch.randint(run.config.vocab_size, shape, generator=random)
        batch = next_tokens(tokens, 1 if run.recipe.document_mask else None)
        begin = time.perf_counter()
        loss, _, _ = train_step(engine, optimizer, batch, pretrain, run.recipe.lr, run.recipe.clip)
        times.append(time.perf_counter() - begin)
    seconds, = engine.add_up(statistics.median(times[2:]))
    return seconds / run.layout.size, loss


def bench(run: Run, count: int) -> dict:
    """What --bench prints: the speed of `count` steps and the memory that they took."""
    peak = matmul_flops(run.device, DTYPES[run.dtype])
    step_s, loss = timed_steps(run, Engine(run), count)
    speed, rss = run.rows * run.seq_len / step_s, None
    if sys.platform != "win32":
        import resource
        unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {"tokens_per_s": speed, "mfu": utilisation(run, speed, peak) or "unknown",
            "peak_gflops": peak and peak / 1e9, "step_s": step_s, "peak_rss_gb": rss, "loss": loss,
            "params": run.config.n_params, "backward": run.backward, "dtype": run.dtype,
            "world": run.layout.size, "layout": asdict(run.layout)}


def steps_in_time(run: Run, engine: Engine, began: float) -> int:
    """How many steps --minutes allow at the measured speed, less a ninth for evaluations and five
    seconds for the sample. began: when the process did, by time.perf_counter."""
    step_s, _ = timed_steps(run, engine, 5)
    count = max(5, int(1.2 * run.minutes / step_s))  # a fiftieth of the time, to be sure of it
    step_s, _ = timed_steps(run, engine, count)
    engine.stage.init_weights(run.seed)
    passed, = engine.add_up(time.perf_counter() - began)
    left = 60 * run.minutes - passed / run.layout.size - 5
    return max(10, int(left / (1.12 * step_s)))


@dataclass(frozen=True)
class Progress:
    """Where a run stands; saved with each state."""
    step: int = 0
    skipped: int = 0       # steps whose loss or gradient was not finite
    useful_s: float = 0.0  # seconds of the others


class Log:
    """log.jsonl, one object a line, and the line that shows progress; rank 0 has one."""

    def __init__(self, run: Run, engine: Engine, began: float, step: int):
        """Goes on from `step`: later lines, and torn ones, are cut off. began: when the process
        did, by time.perf_counter."""
        self.run, self.path, self.rows, self.times = run, run.out / "log.jsonl", [], []
        self.shown, self.held_out, before = 0.0, math.nan, 0.0
        self.peak = matmul_flops(run.device, DTYPES[run.dtype])
        held = sum(local_shard(p).numel() for p in engine.parameters.values())
        self.fixed = {"world": run.layout.size, "rank_params": held,
                      "rank_tokens": -(-run.rows // run.layout.dp) * run.seq_len}
        self.path.touch()
        for line in self.path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                before = max(before, row["elapsed_s"])
                if row["step"] <= step:
                    self.rows.append(row)
        self.began = began - before
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_aside(self.path, lambda file: file.write(text.encode()))
        if 0 < step < run.steps:
            self.add({"event": "resume", "step": step, "elapsed_s": self.elapsed()})

    def elapsed(self) -> float:
        """Seconds that the run took up to now, those of lost steps too; not while it was down."""
        return round(time.perf_counter() - self.began, 3)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def add_step(self, progress: Progress, seconds: float, figures: dict) -> None:
        """Notes and shows a step that took so many seconds; figures: its loss, lr and the like."""
        run, step, elapsed, noted = self.run, progress.step, self.elapsed(), {}
        for name, value in figures.items():  # JSON has no number that is not finite
            noted[name] = value if math.isfinite(value) else None
        tokens = run.rows * run.seq_len
        mfu = utilisation(run, tokens / seconds, self.peak)
        self.add({"step": step, "tokens": step * tokens, **noted, "mfu": mfu, **self.fixed,
                  "tokens_per_s": round(tokens / seconds, 1), "skipped": progress.skipped,
                  "elapsed_s": elapsed, "useful": round(progress.useful_s / elapsed, 3)})
        self.times.append(seconds)
        self.held_out = figures.get("val_bpb", self.held_out)
        left = (run.steps - step) * statistics.median(self.times[-50:])
        self.show(f"step {step}/{run.steps}  loss {figures['loss']:.3f}  held out "
                  f"{self.held_out:.3f} bits/byte  {tokens / seconds:,.0f} tokens/s  MFU "
                  f"{mfu or math.nan:.0%}  {left // 60:.0f}m{left % 60:02.0f}s left  "
                  f"{progress.skipped} skipped", step == run.steps)

    def show(self, text: str, last: bool) -> None:
        """On a terminal every step, in one line; else a line every ten seconds."""
        if sys.stderr.isatty():
            print(f"\r{text:110}", end="\n" * last, file=sys.stderr, flush=True)
        elif last or time.monotonic() - self.shown > 10:
            self.shown = time.monotonic()
            print_rank0(text)


def draw_loss(rows: list[dict], path: Path, title: str) -> None:
    """Training loss against tokens, as in the paper's Figure 1, with the held-out loss as dots. The
    line has up to 500 points, each the mean of a stretch; the steep first fiftieth is left out."""
    rows = [row for row in rows if row.get("loss") is not None]
    held = [(row["tokens"], row["val_loss"]) for row in rows if row.get("val_loss")]
    rows, line = rows[len(rows) // 50:], []
    stretch = -(-len(rows) // 500)
    while len(line) * stretch < len(rows):
        part = rows[len(line) * stretch:][:stretch]
        line.append((part[-1]["tokens"], statistics.fmean(row["loss"] for row in part)))
    if not line:
        return
    values, end = [loss for _, loss in line + held], line[-1][0]
    low, high = math.floor(10 * min(values)) / 10, math.ceil(10 * max(values) + 0.01) / 10

    def at(tokens: float, loss: float) -> str:
        return f"{70 + 550 * tokens / end:.1f} {350 - 300 * (loss - low) / (high - low):.1f}"

    svg = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 400" font-size="13" '
           'font-family="sans-serif" text-anchor="middle"><rect width="640" height="400" '
           f'fill="white"/><text x="345" y="28">{title}</text><text x="345" y="392">tokens</text>'
           '<text transform="translate(18 200) rotate(-90)">loss (nats a token)</text>']
    for i in range(5):  # lines and numbers to read values from
        loss, tokens = low + i * (high - low) / 4, i * end / 4
        svg += [f'<path d="M{at(0, loss)}h550" stroke="#ddd"/>',
                f'<text transform="translate({at(0, loss)})" x="-22" y="4">{loss:.2f}</text>',
                f'<text transform="translate({at(tokens, low)})" y="20">{tokens:,.0f}</text>']
    points = " ".join(at(*point) for point in line)
    svg.append(f'<polyline points="{points}" fill="none" stroke="#1f77b4" stroke-width="1.6"/>')
    for point in held:
        svg.append(f'<circle transform="translate({at(*point)})" r="3.5" fill="#d62728"/>')
    text = "\n".join(svg) + "</svg>\n"
    write_aside(path, lambda file: file.write(text.encode()))


def train_run(run: Run, engine: Engine, batches: Batches, began: float, rank: int) -> None:
    """From the newest good state to the last step."""
    recipe = replace(run.recipe, warmup=min(run.recipe.warmup, run.steps // 10))
    eval_every = run.eval_every or max(1, min(1000, run.steps // 10))
    save_every, folder = run.save_every or eval_every, run.out / "state"
    optimizer = make_optimizer(engine.parameters, recipe)
    tensors = state_tensors(engine.parameters, optimizer)
    progress = Progress(**(load_state(folder, tensors) or {}))
    log = Log(run, engine, began, progress.step) if rank == 0 else None
    stopper, group, saving = Stopper(), patient_group(), None
    bad, stops, done = 0, 0, progress.step >= run.steps
    if done:
        print_rank0(f"{run.out} is finished at step {progress.step}; --steps N goes on, --fresh "
                    "starts over")
    while not (done or stops):
        begin = time.perf_counter()
        lr = learning_rate(progress.step, run.steps, recipe)
        loss, norm, stops = train_step(engine, optimizer, batches.step(progress.step), pretrain,
                                       lr, recipe.clip, stopper.signal)
        seconds, finite = time.perf_counter() - begin, math.isfinite(loss + norm)
        bad = 0 if finite else bad + 1
        progress = Progress(progress.step + 1, progress.skipped + (not finite),
                            progress.useful_s + seconds * finite)
        done, figures = progress.step == run.steps, {"loss": loss, "lr": lr, "grad_norm": norm}
        if done or progress.step % eval_every == 0:
            # A held-out token costs a third of one that is trained on: the last evaluation takes
            # up to a thirtieth of the time, and those on the way together as much.
            tenth = run.steps * run.rows * run.seq_len // 10
            limit = min(FINAL_EVAL_TOKENS, tenth) if done else min(EVAL_TOKENS, tenth // 10)
            figures["val_loss"], figures["val_bpb"] = evaluate(engine, batches, limit)
        if log:
            log.add_step(progress, seconds, figures)
        if bad == BAD_STEPS:
            raise ValueError(f"{bad} steps in a row had a loss or gradient that is not finite; the "
                             f"last good state in {folder} is kept; try a lower --lr")
        if done or stops or finite and progress.step % save_every == 0:
            replicas_agree(engine.parameters)
            saving = save_state(folder, tensors, asdict(progress), group, saving)
    if saving:
        saving.result()
    if stops:
        sys.exit(128 + (stopper.signal or signal.SIGTERM))
    stopper.close()
    together(partial(finish, run, progress, log))


def finish(run: Run, progress: Progress, log: Log) -> None:
    """The weights in Meta's layout, and the picture."""
    export_state(run.out / "state" / f"step-{progress.step:09d}", run.config, run.out)
    draw_loss(log.rows, run.out / "loss.svg", f"{run.size}, {run.config.n_params:,} parameters")
    elapsed = log.elapsed()
    print_rank0(f"{progress.useful_s / elapsed:.0%} of {elapsed / 60:.1f} minutes went into "
                "training steps that were kept")


def announce(run: Run, batches: Batches) -> None:
    """Says what is trained, and on what."""
    _, assumed = SIZES[run.size][1].filled()
    if assumed:
        print_rank0(f"never published, so from Llama 2 unless given here: {', '.join(assumed)}")
    print_rank0(f"{run.size}: {run.config.n_params:,} parameters, {run.steps} steps of {run.rows} "
                f"x {run.seq_len} tokens in micro-batches of {run.micro_batch}, {run.dtype}, on "
                f"{run.layout.size} x {run.device} ({run.layout})")
    for k, source in enumerate(run.sources):
        if source.get("changed") not in (None, latest_change(source["path"])):
            print_rank0(f"warning: {source['path']} changed since it was cut into tokens, and is "
                        "read as it was; try --fresh, or --out DIR, for the new text")
        print_rank0(f"{source['path']}: {source['train_tokens']:,} tokens, read "
                    f"{batches.epochs(k, run.steps):.2f} times")


def sample(run: Run, tokenizer: Tokenizer) -> None:
    """Prints what the trained model writes, if this machine holds it whole."""
    dtype = DTYPES[run.dtype]
    if run.config.n_params * dtype.itemsize < 0.8 * memory_there(run.device):
        model = load(run.out, run.device, dtype)
        prompt = "" if run.data or run.mixture else "class"  # the default text is Python
        text = sample_texts(model, tokenizer, [prompt], 120, Sampling(seed=run.seed))[0].text
        print(f"--- a sample of {run.out}\n{prompt}{text}")


# ---------------------------------------------------------------------------------------------
# Command line


def parser() -> Parser:
    p = Parser(prog="train.py", description="Trains a Llama from text: tokenizer, weights, sample.")

    several = {"nargs": "+", "default": [], "action": "extend"}

    def number(group, flag: str, text: str, kind: type = int, **options) -> None:
        group.add_argument(flag, type=positive(kind), metavar="N" if kind is int else "X",
                           help=text, **options)

    g = p.add_argument_group("model")
    g.add_argument("--size", default="tiny", metavar="NAME", help=", ".join(SIZES))
    g.add_argument("--set", **several, type=setting, metavar="FIELD=VALUE",
                   help="change a field of the size, as n_layers=4 or rope_scaling=8")
    g.add_argument("--attention", choices=ATTENTION, default="fused",
                   help="tiled and equation are for reading; equation takes memory as T squared")
    g.add_argument("--backward", choices=BACKWARD, default="manual", help="of a layer: by hand "
                   "(section 2.4); by torch; or from its input alone: least memory, a third slower")
    g.add_argument("--compile", action="store_true",
                   help="compile the layers: 10 to 30 seconds, then a tenth to a fifth faster")
    g.add_argument("--document-mask", action=argparse.BooleanOptionalAction,
                   help="no attention across documents; default: from Llama 3 on")
    g = p.add_argument_group("text")
    g.add_argument("--data", **several, type=data_argument, metavar="PATH[=WEIGHT]",
                   help="files and folders; .jsonl by \"text\"; default: Python's own library")
    g.add_argument("--mixture", nargs=2, metavar=("table1", "DIR"),
                   help=f"subfolders {' '.join(TABLE_1)} with the weights of Table 1")
    g.add_argument("--tokenizer", metavar="PATH", help="default: one is trained on the text")
    number(g, "--vocab-size", "of the tokenizer to train")
    g = p.add_argument_group("length and recipe (default: the size's own)")
    number(g, "--steps", "more than before: a run goes on")
    number(g, "--minutes", "of the whole command: sets the steps once, from the measured speed "
           f"(default for tiny: {TINY_MINUTES})", float)
    number(g, "--batch-tokens", "tokens of a step")
    number(g, "--micro-batch", "sequences computed at once; fewer: less memory, the same result")
    number(g, "--seq-len", "default: the size's context")
    number(g, "--lr", "lower it if the loss is not finite", float)
    number(g, "--warmup", "steps; a tenth of the run at most")
    g.add_argument("--seed", type=int, default=0, metavar="N")
    g.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto",
                   help="to compute in; weights stay fp32; auto: the faster one here, as measured")
    g = p.add_argument_group("run")
    g.add_argument("--out", metavar="DIR", help="default: runs/SIZE")
    g.add_argument("--fresh", action="store_true", help="start over: a run in DIR is removed")
    number(g, "--eval-every", "steps")
    number(g, "--save-every", "steps between states")
    number(g, "--bench", "no run: the speed of N steps")
    g = p.add_argument_group("many devices")
    g.add_argument("--dp", choices=("none", "ddp", "fsdp", "hybrid"), help="ddp repeats the model, "
                   "fsdp (default) splits it over all ranks, hybrid over those of a machine")
    number(g, "--tp", "ranks of one machine that share each layer, and its tokens in between")
    number(g, "--pp", "ranks that the layers are split over")
    number(g, "--nproc", "processes on this machine (default: its GPUs, else 1); one that dies is "
           "started again; not under torchrun")
    number(g, "--timeout", "a rank for which others wait X seconds hangs: all start again "
           "(default: %(default)s)", float, default=1800)
    g = p.add_argument_group("plan")
    g.add_argument("--plan", action="store_true", help="no run: what it would take")
    number(g, "--gpus", "default: %(default)s", default=NODE)
    g.add_argument("--gpu", choices=(*GPUS, "cpu"), default="H100", help="default: %(default)s; "
                   "cpu: machines like this one")
    number(g, "--mfu", "of the whole step, as measured", float)
    g.add_argument("--json", action="store_true", help="the plan as one JSON object")
    return p


def train_rank(args, device: str, world: World, began: float, held: contextlib.ExitStack) -> None:
    """What one process does. began: when it did, by time.perf_counter. held: see open_run."""
    run = resolve(args, device, world.size, world.local_size)
    run = together(partial(fit, run) if args.bench else partial(open_run, run, held))
    if run.roomy:
        keep_freed_memory()
    if args.bench:
        result = bench(run, args.bench)
        if world.rank == 0:
            print(json.dumps(result))
        return
    if run.threads:
        torch.set_num_threads(run.threads)
    tokenizer = load_tokenizer(run.out / "tokenizer.model")
    bos_id = tokenizer.bos_id if run.recipe.document_mask else None
    batches = Batches(run.out / "tokens", run.sources, run.seq_len, run.rows, run.seed, bos_id)
    engine = Engine(run)
    if run.steps is None:
        run = replace(run, steps=steps_in_time(run, engine, began))
        together(partial(write_json, run.out / "run.json", settings_of(run)))
    announce(run, batches)
    train_run(run, engine, batches, began, world.rank)
    del engine
    if world.rank == 0:
        sample(run, tokenizer)


def main(argv: list[str]) -> int | None:
    began, device, args = time.perf_counter(), best_device(), parser().parse_args(argv)
    if args.json and not args.plan:
        raise ValueError("--json is for --plan; try it without")
    if args.plan:
        run = resolve(args, device, args.gpus, min(args.gpus, NODE))
        found = plan(run, args.gpu, args.mfu)
        print(json.dumps(found) if args.json else plan_text(found))
        return None
    is_rank, gpus = "RANK" in os.environ, torch.cuda.device_count()  # of torchrun, or of `start`
    n = 1 if is_rank else args.nproc or max(1, gpus)
    if n > 1 and 0 < gpus < n:
        raise ValueError(f"--nproc {n} needs as many GPUs, and here are {gpus}; try --nproc {gpus}")
    if is_rank and args.fresh:
        raise ValueError("a run that torchrun starts again, because of a node that came or went, "
                         "would be lost; try without --fresh, or another --out")
    if device == "mps" and (is_rank or n > 1):
        device = "cpu"  # which many processes can share
    if n == 1:
        if not is_rank:
            leave_busy_cores()
        with join(device, args.timeout) as world, contextlib.ExitStack() as held:
            train_rank(args, device, world, began, held)
        return None
    with contextlib.ExitStack() as held:
        # Mistakes are said, and the text is prepared, before there are ranks.
        run = resolve(args, device, n, n)
        if not args.bench:
            open_run(run, held)
        rest = [word for word in argv if word != "--fresh"]
        return start(n, [sys.executable, __file__, *rest], run.out / "state")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    command(main)
