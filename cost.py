"""Layouts and what a run costs: the sections of train.py."""
import contextlib
import math
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from generate import DTYPES
from llama import SIZES, LlamaConfig, logit_rows

NODE = 8   # GPUs of a machine
MFU = 0.5  # of a GPU's FLOP/s, where no pipeline idles: LLaMA's 65B had 0.48


class Device(NamedTuple):
    """Of a GPU's data sheet."""
    name: str      # a part of what the driver calls it
    memory: float  # bytes
    watts: float
    flops: float   # FLOP/s of dense products in bf16


GPUS = {"A100": Device("A100", 80e9, 400, 312e12),
        "A100-40GB": Device("A100", 40e9, 400, 312e12),
        "H100": Device("H100 80GB HBM3", 80e9, 700, 989e12),
        "H200": Device("H200", 141e9, 700, 989e12),
        "RTX 4090": Device("RTX 4090", 24e9, 450, 165e12)}

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

    def bubble(self, micro_batches: int) -> float:
        """How long a pipeline idles for what it computes, while it fills and drains: (p - 1) / m.
        With p = 4 and m = 16 it is 3/16."""
        return (self.pp - 1) / micro_batches


def stage_layers(config: LlamaConfig, stage: int, stages: int) -> int:
    """Layers of a stage: L/S, one more in the first of those between embedding and output."""
    return config.n_layers // stages + (1 <= stage <= config.n_layers % stages)


def arrange(config: LlamaConfig, rows: int, seq_len: int, world_size: int, local_size: int,
            dp: str | None, tp: int | None, pp: int | None) -> Layout:
    """The layout that --dp, --tp and --pp ask for, of world_size ranks, local_size of them on a
    machine, and steps of so many rows; ValueError with the numbers that would do."""
    tp, pp, dp = tp or 1, pp or 1, dp or "fsdp"

    def divisors(n: int) -> str:
        return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)

    shared = {"n_kv_heads": config.n_kv_heads, "hidden_dim": config.hidden_dim,
              "vocab_size": config.vocab_size, "seq_len": seq_len}
    for name, n in shared.items():
        if n % tp:
            raise ValueError(f"--tp {tp} does not divide {name}={n}; try --tp with one of "
                             f"{divisors(math.gcd(*shared.values()))}")
    if pp > config.n_layers:
        raise ValueError(f"--pp {pp}: {config.n_layers} layers make at most as many stages; try "
                         f"--pp with up to {config.n_layers}")
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
    if dp == "hybrid" and near == 1 < ways:
        raise ValueError(f"--dp hybrid would shard over the {local_size} processes of a machine, "
                         f"and --tp x --pp takes {tp * pp}; try --dp fsdp")
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


def matmul_flops(device: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of large matrix products: measured on a CPU, a table's on a GPU, None if unknown."""
    if device != "cpu":
        name = torch.cuda.get_device_name() if device == "cuda" else device
        known = [gpu.flops for gpu in GPUS.values() if gpu.name in name]
        return known[0] if known and dtype is torch.bfloat16 else None
    a, times, end = torch.ones(1024, 1024, dtype=dtype), [], time.perf_counter() + 0.25
    while time.perf_counter() < end:
        begin = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begin)
    return 2 * 1024**3 / min(times)


def energy(gpu_hours: float, watts: float) -> tuple[float, float]:
    """(MWh, tCO2eq) of a training (LLaMA, section 6): what GPUs at their limit of power draw, times
    1.1 for the data centre (PUE), at the 0.385 kg of CO2eq for a kWh of the average US grid."""
    mwh = gpu_hours * watts * 1.1 / 1e6
    return mwh, mwh * 0.385


def rank_params(config: LlamaConfig, layout: Layout, place: int, shards: int
                ) -> tuple[int, int, int, int]:
    """Of the rank at that place of the pipeline: (layers, parameters of a layer, of the root, which
    is embedding, norm and output, number of tensors) as the fullest of `shards` ranks keeps them.
    FSDP cuts the rows by torch.chunk: of 97 rows the first of 7 ranks has 14."""
    D, F, t = config.dim, config.hidden_dim // layout.tp, layout.tp
    q, kv = config.n_heads * config.head_dim // t, config.n_kv_heads * config.head_dim // t
    first, last, layers = place == 0, place == layout.pp - 1, stage_layers(config, place, layout.pp)
    tables = first + last - (first and last and config.tie_embeddings)
    layer = [(q, D), (kv, D), (kv, D), (D, q), (F, D), (D, F), (F, D), (D, 1), (D, 1)]
    root = [(config.vocab_size // t, D)] * tables + [(D, 1)] * last
    of_layer, of_root = (sum(-(-rows // shards) * columns for rows, columns in shapes)
                         for shapes in (layer, root))
    return layers, of_layer, of_root, layers * len(layer) + len(root)


def layer_saves(config: LlamaConfig, seq_len: int, dtype: torch.dtype, attention: str,
                backward: str) -> int:
    """Bytes a token that a layer keeps for its backward: by hand the table of LayerByHand; autograd
    keeps, besides, each norm with and without its weight, silu(a) and swiglu(a, b)."""
    H, q, kv = config.n_heads, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    kept, in_fp32 = 2 * (config.dim + q + kv + config.hidden_dim), H + 2
    if backward != "manual":
        casts = dtype != torch.float32
        kept += 4 * config.dim + 2 * config.hidden_dim
        in_fp32 += 2 * config.dim * casts  # x of the norms
        if attention != "fused":  # k and v of each query head; scores and weights of T keys
            kept += 2 * (q - kv) + H * seq_len * casts
            in_fp32 += 2 * H * seq_len
    return kept * dtype.itemsize + in_fp32 * 4


def memory_needed(config: LlamaConfig, layout: Layout, rows: int, seq_len: int, dtype: torch.dtype,
                  attention: str, backward: str, micro_batches: int = 1, place: int = 0
                  ) -> dict[str, int]:
    """Bytes of a step of micro_batches times `rows` sequences, by what they hold, on the rank at
    that place of the pipeline.

    Weights, gradients and AdamW's moments are in fp32. Of t tensor parallel ranks each saves a t-th
    of a layer, but under autograd its two gathered inputs whole. Buffers: ddp has a copy of all
    weights to compute with; fsdp the root's and two layers', and a layer's gradients until they are
    reduced; in a pipeline a copy of its weights, and whole gradients until the last micro-batch.
    """
    layers, layer, root, tensors = rank_params(config, layout, place, layout.shards)
    held = layers * layer + root
    _, layer, root, _ = rank_params(config, layout, place, 1)
    size, t, tokens, V = dtype.itemsize, layout.tp, rows * seq_len, config.vocab_size // layout.tp
    x, by_hand, sharded = tokens * config.dim * size, backward == "manual", layout.shards > 1
    saved = tokens * layer_saves(config, seq_len, dtype, attention, backward) // t
    if not by_hand:
        saved += 2 * x * (t - 1) // t
        if layout.dp == 1 and size < 4:  # weights in dtype, which FSDP makes otherwise
            saved += size * layer
    # 1F1B: a rank begins pp - place micro-batches before the first one is back.
    in_flight = layers * min(layout.pp - place, micro_batches)
    activations = in_flight * saved
    if backward == "recompute":  # the input of each layer, and one layer at a time
        activations = in_flight * x // t + saved
    if by_hand and attention == "equation":  # A, dA and their like, of one layer at a time
        activations += 16 * tokens * config.n_heads // t * seq_len
    logits = 0
    if place == layout.pp - 1:  # a chunk of them, W cast, a chunk's dW, and dW until it is sharded
        at_once = min(logit_rows(V, config.dim), tokens)
        logits = (8 + 2 * size) * at_once * V + (2 * size + 4 * sharded) * V * config.dim
    whole, most, buffers = layers * layer + root, max(layer, root), 2 * x * (t > 1)
    if sharded and layout.pp == 1:
        buffers += size * (root + 2 * layer) + (size + 4) * most
    elif layout.dp > 1:
        buffers += size * whole + 4 * (whole if sharded else most)
    return {"weights": 4 * held, "gradients": 4 * held, "AdamW": 8 * held + 4 * tensors,  # steps
            "activations": activations, "logits": logits, "buffers": buffers}


def wire_bytes(config: LlamaConfig, layout: Layout, rows: int, seq_len: int, dtype: torch.dtype,
               backward: str, micro_batches: int, place: int = 0) -> dict[str, int]:
    """Bytes that such a rank sends in a step, by the field of Layout that they are for.

    In a ring of s ranks n bytes are gathered, or summed and scattered, in s - 1 turns of n/s: a
    rank sends n (s - 1)/s, and twice that for both, an all-reduce. Weights travel in dtype,
    gradients in fp32. A layer of t ranks exchanges x 4 times forward and 4 times backward; by hand
    the 2 inputs of products are gathered again, recomputing does the forward again.
    """
    layers, layer, root, _ = rank_params(config, layout, place, layout.shards)
    held, m, ends = layers * layer + root, micro_batches, (place == 0) + (place == layout.pp - 1)
    data = dtype.itemsize * held + 4 * held  # in a pipeline once, else for each micro-batch
    if layout.pp == 1:  # the root's weights stay until the backward, a layer's come twice
        data = m * (dtype.itemsize * (2 * held - root) + 4 * held)
    x = rows * seq_len * config.dim * dtype.itemsize // layout.tp
    exchanges = layers * {"manual": 10, "autograd": 8, "recompute": 12}[backward] + 2 * ends
    return {"replicas": 8 * held * (layout.replicas - 1) // layout.replicas,
            "shards": data * (layout.shards - 1), "pp": m * (2 - ends) * x,  # x there, dx back
            "tp": m * exchanges * x * (layout.tp - 1)}


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


def fit_micro_batch(config: LlamaConfig, layout: Layout, rows: int, seq_len: int,
                    dtype: torch.dtype, attention: str, backward: str, micro_batch: int | None,
                    there: float) -> tuple[int, dict[str, int], bool]:
    """(sequences to compute at once, memory_needed by the fullest rank, whether it is there but for
    a tenth, which is left for what is not counted). Without micro_batch, up to 8192 tokens as far
    as they fit and, in a pipeline, a quarter of what would fill it."""
    each = rows // layout.dp
    if layout.pp > 1:
        each //= 4 * layout.pp
    size = micro_batch or max(1, min(8192 // seq_len, each))
    while True:
        passes = layout.passes(rows, size)
        needs = [memory_needed(config, layout, size, seq_len, dtype, attention, backward, passes,
                               place) for place in range(layout.pp)]
        need = max(needs, key=lambda need: sum(need.values()))
        fits = sum(need.values()) < 0.9 * there
        if fits or micro_batch or size == 1:
            return size, need, fits
        size //= 2


def fit_memory(config: LlamaConfig, layout: Layout, rows: int, seq_len: int, dtype: torch.dtype,
               attention: str, backward: str, device: str, local_size: int,
               micro_batch: int | None, name: str) -> tuple[int, bool]:
    """Sequences to compute at once on this machine, and whether freed memory may be kept, whose
    gaps take up to a third more. ValueError, before anything large is allocated, if nothing fits.
    """
    there = memory_there(device) // (local_size if device == "cpu" else 1)
    size, need, fits = fit_micro_batch(config, layout, rows, seq_len, dtype, attention, backward,
                                       micro_batch, there)
    total = sum(need.values())
    if fits:
        return size, total < 0.6 * there
    advice, least = f"--micro-batch 1 or --seq-len {seq_len // 2}", need["weights"] + need["AdamW"]
    if 1.5 * least > there:
        smaller = [(c.n_params, size) for size, (c, _) in SIZES.items() if 20 * c.n_params < there]
        advice = f"--size {max(smaller)[1]}"
    parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in need.items())
    raise ValueError(f"{name} needs about {total / 1e9:.0f} GB a process to train ({parts}) "
                     f"and this machine has {there / 1e9:.0f} GB free for it; try {advice}")


def plan(run: "Run", gpus: int, name: str, mfu: float | None) -> dict:
    """What the run takes on `gpus` GPUs of that name in its layout. Allocates nothing. mfu: of the
    whole step, if it was measured."""
    gpu, layout, config, dtype = GPUS.get(name), run.layout, run.config, DTYPES[run.dtype]
    if gpu is None:  # machines like this one, whose watts are a guess
        gpu = Device("cpu", memory_there("cpu"), 100, matmul_flops("cpu", dtype))
    elif run.dtype != "bf16":
        raise ValueError("only the bf16 FLOP/s of GPUs are known; try --dtype bf16")
    step = run.rows, run.seq_len, dtype, run.attention, run.backward
    micro_batch, memory, fits = fit_micro_batch(config, layout, *step, run.micro_batch, gpu.memory)
    passes, verdict = layout.passes(run.rows, micro_batch), "yes"
    if not fits:
        verdict = f"no; try {nearest_that_fits(config, layout, gpu.memory, *step)}"
    sent = wire_bytes(config, layout, micro_batch, run.seq_len, dtype, run.backward, passes,
                      layout.pp // 2)  # a rank in the middle
    if mfu is None:
        mfu = MFU / (1 + layout.bubble(passes))
        if run.backward == "recompute":  # the forward twice
            mfu *= 3 / 4
    flops, as_papers = (flops_per_token(config, run.seq_len, papers) for papers in (False, True))
    steps = run.steps or math.ceil(run.recipe.train_tokens / run.recipe.batch_tokens)
    tokens, speed = steps * run.rows * run.seq_len, mfu * gpus * gpu.flops / flops
    hours = tokens / speed / 3600
    mwh, tons = energy(gpus * hours, gpu.watts)
    return {"size": run.size, "params": config.n_params, "flops_per_token": flops, "gpus": gpus,
            "gpu": name, **asdict(layout), "micro_batch": micro_batch, "micro_batches": passes,
            "backward": run.backward, "memory": memory,
            "each": {"needs": sum(memory.values()), "has": gpu.memory}, "fits": verdict,
            "sends": sent, "bubble": layout.bubble(passes), "mfu": mfu,
            "mfu_as_papers": mfu * as_papers / flops, "steps": steps, "tokens": tokens,
            "tokens_per_s": speed, "step_s": run.rows * run.seq_len / speed, "days": hours / 24,
            "gpu_hours": gpus * hours, "mwh": mwh, "tco2eq": tons}


def nearest_that_fits(config: LlamaConfig, layout: Layout, there: float, rows: int, seq_len: int,
                      *options) -> str:
    """What to try where the memory does not hold a layout: FSDP with the fewest doublings and
    halvings of --tp and --pp."""
    splits = [(2**i, 2**j) for i in range(4) for j in range(8)]
    splits.sort(key=lambda split: abs(math.log2(split[0] / layout.tp))
                + abs(math.log2(split[1] / layout.pp)))
    for tp, pp in splits:
        with contextlib.suppress(ValueError):  # there is no such layout
            near = arrange(config, rows, seq_len, layout.size, NODE, "fsdp", tp, pp)
            if fit_micro_batch(config, near, rows, seq_len, *options, None, there)[2]:
                return f"--dp fsdp --tp {tp} --pp {pp}"
    return "more --gpus or --backward recompute"


def plan_text(planned: dict) -> str:
    """A plan to be read, one figure a line, bytes in GB of 1e9."""
    lines = []
    for name, value in planned.items():
        if isinstance(value, float) and value < 1000:
            value = f"{value:.4g}"
        elif isinstance(value, (int, float)):
            value = f"{value:,.0f}"
        elif isinstance(value, dict):
            for part, size in value.items():
                lines.append(f"{f'{name} {part}':22}{size / 1e9:,.2f} GB")
            continue
        lines.append(f"{name.replace('_', ' '):22}{value}")
    return "\n".join(lines)
