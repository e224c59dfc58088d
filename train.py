"""Training: text, recipe, state, and a line that shows how it goes (LLaMA, sections 2.1 to 2.4).

    python train.py                                 # `tiny` on Python's own library, 5 minutes
    python train.py --data book.txt notes/ --minutes 20                             # your text
    python train.py --size 7b --data corpus/ --tokenizer tokenizer.model
    python train.py --size stories15m --bench 5     # speed alone, on random tokens
    python train.py --nproc 4 --tp 2                # many processes; torchrun and srun do too
    python train.py --size 65b --plan --gpus 2048   # what it would take

The same command goes on where it stopped. DIR (runs/SIZE) then holds params.json,
consolidated.00.pth and tokenizer.model (for generate.py), log.jsonl, loss.svg, state/ and tokens/.
"""
import argparse
import atexit
import bisect
import collections
import contextlib
import faulthandler
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
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cache, cached_property, partial
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import is_fake, unset_fake_temporarily
from torch.distributed.checkpoint.utils import _DistWrapper
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from generate import (DTYPES, Sampling, best_device, check_compiler, keep_freed_memory, positive,
                      sample_texts)
from llama import (ATTENTION, BACKWARD, SIZES, Llama, LlamaConfig, Recipe, TensorParallel, Weight,
                   load, local, next_token_nll, rope_table, rows_at_once, shapes, write_aside,
                   write_json, write_meta)
from tokenizer import (Parser, command, cores, documents, load_tokenizer, prepare,
                       standard_library, survey, train_sentencepiece, training_text)

TABLE_1 = {"commoncrawl": 67.0, "c4": 15.0, "github": 4.5, "wikipedia": 4.5, "books": 4.5,
           "arxiv": 2.5, "stackexchange": 2.0}  # sampling proportions in percent (LLaMA, Table 1)
EVAL_TOKENS, FINAL_EVAL_TOKENS = 2**15, 2**21  # held-out tokens read on the way, and at the end
BAD_STEPS = 5  # non-finite steps in a row that stop a run
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1")  # SLURM can send USR1
         if hasattr(signal, name)]

# Of a GPU's data sheet: a part of what the driver calls it, bytes, watts, FLOP/s of dense products
# in bf16, bytes/s that it sends inside a node of 8 and, by a network card of its own, between them.
Device = collections.namedtuple("Device", "name memory watts flops inside between")
GPUS = {"A100": Device("A100", 80e9, 400, 312e12, 300e9, 25e9),
        "A100-40GB": Device("A100", 40e9, 400, 312e12, 300e9, 25e9),
        "H100": Device("H100 80GB HBM3", 80e9, 700, 989e12, 450e9, 50e9),
        "H200": Device("H200", 141e9, 700, 989e12, 450e9, 50e9),
        "RTX 4090": Device("RTX 4090", 24e9, 450, 165e12, 32e9, 3e9)}
NODE = 8
KERNELS = 44 * 2**20  # bytes of code and scratch that a first step touches on a CPU, measured
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
        except (KeyError, TypeError, ValueError, OverflowError, OSError) as error:
            if dist.is_initialized() and isinstance(error, FileNotFoundError):
                raise ValueError(f"{folder} is not there on this machine; try --out with a folder "
                                 "that all machines share") from None
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


def make_optimizer(parameters: dict[str, Tensor], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2017). Matrices decay, norms do not: the field's custom, the
    papers do not say. Its state exists from the start, so that every state has the same tensors."""
    groups = [{"params": [p for p in parameters.values() if (p.dim() > 1) == decays],
               "weight_decay": recipe.weight_decay * decays} for decays in (True, False)]
    optimizer = torch.optim.AdamW(groups, recipe.lr, recipe.betas, recipe.eps, fused=True)
    for p in parameters.values():
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


# ---------------------------------------------------------------------------------------------
# Many devices (LLaMA, section 2.4; Llama 3, section 3.3.2)


class World(NamedTuple):
    rank: int = 0        # of this process among all
    size: int = 1        # processes in all
    local_rank: int = 0  # among those of this machine
    local_size: int = 1


@dataclass(frozen=True)
class Layout:
    """How ranks share a step. Ranks next to each other share layers (tp), then the depth (pp),
    then the state (shards); the rest repeats all of that with other rows of the batch."""
    replicas: int = 1    # copies of the whole state: plain data parallelism
    shards: int = 1      # ranks that one copy of weights, gradients, AdamW is split over (FSDP)
    pp: int = 1          # ranks that the layers are split over: pipeline
    tp: int = 1          # ranks that each layer is split over: tensor and sequence parallelism
    interleave: int = 1  # stages of the pipeline that a rank holds

    @property
    def dp(self) -> int:
        return self.replicas * self.shards

    @property
    def size(self) -> int:
        return self.dp * self.pp * self.tp

    def mesh(self, device: str):
        with unset_fake_temporarily():  # its numbers are needed, whatever is simulated
            return dist.init_device_mesh(device, (self.replicas, self.shards, self.pp, self.tp),
                                         mesh_dim_names=("replicas", "shards", "pp", "tp"))

    @property
    def places(self) -> list[int]:
        """Of the pipeline: the first, the second, which is like those after it, and the last."""
        return sorted({0, min(1, self.pp - 1), self.pp - 1})

    def passes(self, rows: int, micro_batch: int) -> int:
        """Micro-batches of a step of so many rows on each rank: in a pipeline pp, 2 pp, ..."""
        return -(-rows // (self.dp * self.pp * micro_batch)) * self.pp

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


class Stage(Llama):
    """Consecutive layers of a Llama: all of them, or stage `index` of `count` of a pipeline. The
    first one embeds, the last one has the final norm, the output projection and the loss. The names
    of the parameters are those of the whole."""

    def __init__(self, config: LlamaConfig, index: int = 0, count: int = 1,
                 bos_id: int | None = None, **options):
        super().__init__(config, **options)
        self.bos_id, self.index = bos_id, index
        self.first, self.last = index == 0, index == count - 1
        start = sum(stage_layers(config, before, count) for before in range(index))
        mine = range(start, start + stage_layers(config, index, count))
        for i in set(range(config.n_layers)).difference(mine):
            self.layers[i] = None
        if not (self.first or self.last and config.tie_embeddings):
            self.tok_embeddings = None
        if not self.last:
            self.norm = self.output = None

    def forward(self, h: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        """h of the stage before (unused by the first) -> h; of the last: the mean loss or, without
        gradients, the sum. tokens, targets (B, T); a negative target is none."""
        boundaries = None if self.bos_id is None else document_starts(tokens, self.bos_id)
        h = self.without_cache(self.embed(tokens) if self.first else h, boundaries, tokens.shape[1])
        if not self.last:
            return h
        h = self.norm(h)
        if torch.is_grad_enabled():
            return self.mean_loss(h, targets)
        return next_token_nll(h.flatten(0, -2), self.output_weight, targets.flatten(),
                              tp=self.tp)[0].sum()


def share(stage: Stage, layout: Layout, mesh) -> None:
    """Splits the parameters of a stage (on meta: nothing is there yet) and what it does.

    Tensor parallelism: Wq, Wk, Wv, W1, W3, embedding and output by rows, which are heads, hidden
    units and words; Wo and W2 by columns. Data parallelism: torch's replicate (DDP) or fully_shard
    (FSDP2), layer by layer; the next layer's weights come while one is computed; weights travel in
    the type of the computation, gradients in fp32.
    """
    from torch.distributed._composable.replicate_with_fsdp import replicate
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    if layout.tp > 1:
        stage.tp = TensorParallel(mesh.get_group("tp"))
        for name, p in list(stage.named_parameters()):
            columns = name.endswith(("wo.weight", "w2.weight"))
            placement = Replicate() if p.dim() == 1 else Shard(1 if columns else 0)
            part = nn.Parameter(distribute_tensor(p, mesh["tp"], [placement]))
            owner, _, key = name.rpartition(".")
            stage.get_submodule(owner).register_parameter(key, part)
    if layout.dp == 1:
        return
    dims = [name for name in ("replicas", "shards") if getattr(layout, name) > 1]
    policy = MixedPrecisionPolicy(stage.dtype, torch.float32, cast_forward_inputs=False)
    split = partial(fully_shard if layout.shards > 1 else replicate, mesh=mesh[tuple(dims)],
                    mp_policy=policy)
    # A pipeline gathers a layer once a step, not for each micro-batch, and so holds it meanwhile.
    kept = {"reshard_after_forward": False} if layout.shards > 1 < layout.pp else {}
    layers = [split(layer, **kept) for layer in stage.layers if layer is not None]
    split(stage)
    for layer, following in itertools.pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([layer])


class Engine:
    """What this rank holds of a model, and how its part of a batch passes through it."""

    def __init__(self, config: LlamaConfig, layout: Layout, device: str, micro_batch: int,
                 seed: int | None = 0, compiled: bool = False, watchdog: float | None = None,
                 **options):
        """options are Stage's. seed None: no initial weights, for tensors that are fake. compiled:
        torch.compile fuses what lies between the products; once serves all layers. watchdog:
        seconds that a batch may take."""
        if compiled:
            check_compiler()
        self.config, self.layout, self.device = config, layout, device
        self.micro_batch, self.watchdog = micro_batch, watchdog
        self.mesh = None if layout.size == 1 else layout.mesh(device)
        replica, shard, pp, tp = self.mesh.get_coordinate() if self.mesh else (0, 0, 0, 0)
        self.dp_rank, self.pp_rank = replica * layout.shards + shard, pp
        count, self.stages = layout.pp * layout.interleave, []
        for index in range(pp, count, layout.pp):
            with unset_fake_temporarily():  # thousands of parts: fake ones would take minutes
                with torch.device("meta"):
                    stage = Stage(config, index, count, **options)
                for layer in filter(None, stage.layers if compiled else ()):
                    layer.compile()
                share(stage, layout, self.mesh)
            stage.to_empty(device=device)
            if seed is not None:
                stage.init_weights(seed)
            self.stages.append(stage)
        # FSDP puts gathered weights in their place for a while: these are the ones that stay.
        self.parameters = {name: p for stage in self.stages for name, p in stage.named_parameters()}
        self.schedules = {}

    def forget_gathered(self) -> None:
        """After the weights were set by hand: what FSDP gathered of the old ones goes."""
        for module in itertools.chain(*(stage.modules() for stage in self.stages)):
            if hasattr(module, "reshard"):
                module.reshard()

    def rows(self, batch: Tensor) -> Tensor:
        """The rows of a batch that this rank computes, as many on every rank: what is missing is
        filled with rows of -1, which have no target. A pipeline wants pp micro-batches, or twice
        as many, and so on."""
        unit = self.layout.pp * self.micro_batch if self.layout.pp > 1 else 1
        each = -(-len(batch) // (self.layout.dp * unit)) * unit
        batch = F.pad(batch, (0, 0, 0, each * self.layout.dp - len(batch)), value=-1)
        return batch[self.dp_rank * each:][:each].to(self.device)

    def loss(self, batch: Tensor) -> float:
        """This rank's share of the loss of a batch (N, T + 1): shares add up, over all ranks, to
        the mean over N T or, without gradients, to the sum. Leaves .grad of the mean."""
        rows, backward = self.rows(batch), torch.is_grad_enabled()
        inputs = rows[:, :-1], rows[:, :-1].clamp(min=0), rows[:, 1:]
        weight = self.layout.dp / len(batch) if backward else 1  # data parallelism takes the mean
        if self.layout.pp > 1:
            total = self.through_pipeline(*inputs, weight)
        else:
            total, stage = 0.0, self.stages[0]
            parts = list(zip(*(x.split(self.micro_batch) for x in inputs)))
            for i, part in enumerate(parts, 1):
                if self.layout.shards == 1 < self.layout.replicas:
                    stage.set_requires_gradient_sync(i == len(parts))
                elif self.layout.replicas > 1:
                    stage.set_requires_all_reduce(i == len(parts))
                loss = stage(*part) * (len(part[0]) * weight if backward else 1)
                if backward:
                    loss.backward()
                total += loss.item()
        return total / (self.layout.tp * (self.layout.dp if backward else 1))

    def through_pipeline(self, h: Tensor, tokens: Tensor, targets: Tensor, weight: float) -> float:
        """The loss of rows (R, T) through the ranks of the pipeline, 0 on all but the last: each
        micro-batch goes back as soon as it came to the end (1F1B), through one stage a rank or
        several (interleaved; Narayanan et al. 2021)."""
        count = len(tokens) // self.micro_batch
        if count not in self.schedules:
            self.schedules[count] = self.schedule(count, tokens.shape[1])
        last, losses = self.stages[-1].last, []
        run = self.schedules[count].step if torch.is_grad_enabled() else self.schedules[count].eval
        self.weight = weight * self.micro_batch if torch.is_grad_enabled() else 1
        run(*[h] * self.stages[0].first, tokens=tokens, targets=targets, return_outputs=False,
            target=targets if last else None, losses=losses if last else None)
        return sum(loss.item() for loss in losses)

    def schedule(self, count: int, T: int):
        """torch's order of work for `count` micro-batches. Shapes are said, so none are sent."""
        from torch.distributed.pipelining import (PipelineStage, Schedule1F1B,
                                                  ScheduleInterleaved1F1B)
        tokens = torch.empty(self.micro_batch, T, dtype=torch.int64, device="meta")
        tp = self.layout.tp
        shape = tokens.shape if tp == 1 else (tokens.numel() // tp,)
        h = torch.empty(*shape, self.config.dim, dtype=self.stages[0].dtype, device="meta",
                        requires_grad=True)
        loss = torch.empty((), device="meta", requires_grad=True)
        stages = [PipelineStage(stage, stage.index, self.layout.pp * self.layout.interleave,
                                torch.device(self.device), tokens if stage.first else h,
                                loss if stage.last else h, group=self.mesh.get_group("pp"))
                  for stage in self.stages]
        options = {"loss_fn": lambda loss, target: loss * self.weight, "scale_grads": False}
        return (ScheduleInterleaved1F1B(stages, count, **options) if self.layout.interleave > 1
                else Schedule1F1B(stages[0], count, **options))

    def gradients(self) -> list[Tensor]:
        """This rank's part of every gradient."""
        return [local(p.grad) for p in self.parameters.values() if p.grad is not None]

    def complete(self) -> None:
        """Adds what a backward leaves on other ranks. A norm saw this rank's tokens alone (tensor
        parallelism); a tied embedding is used on the first and on the last stage."""
        if self.layout.tp > 1:
            norms = [grad for grad in self.gradients() if grad.dim() == 1]
            whole = torch.cat(norms)
            dist.all_reduce(whole, group=self.mesh.get_group("tp"))
            torch._foreach_copy_(norms, whole.split([len(norm) for norm in norms]))
        if self.layout.pp > 1 and self.config.tie_embeddings and (
                self.stages[0].first or self.stages[-1].last):
            end = self.stages[0] if self.stages[0].first else self.stages[-1]
            mine = local(end.tok_embeddings.weight.grad)
            theirs, group = torch.empty_like(mine), self.mesh.get_group("pp")
            peer = self.layout.pp - 1 if end.first else 0
            for work in dist.batch_isend_irecv([
                    dist.P2POp(dist.isend, mine, group=group, group_peer=peer),
                    dist.P2POp(dist.irecv, theirs, group=group, group_peer=peer)]):
                work.wait()
            mine += theirs

    def squared_norm(self) -> float:
        """This rank's share of the squared norm of the gradient: what several hold is divided."""
        held = {name: p for name, p in self.parameters.items() if p.grad is not None}
        if not self.stages[0].first:
            held.pop("tok_embeddings.weight", None)  # tied: the first stage's again
        norms = torch._foreach_norm([local(p.grad) for p in held.values()])
        return sum(norm**2 / copies(p)
                   for norm, p in zip(torch.stack(norms).tolist(), held.values()))

    def add_up(self, *shares: float) -> list[float]:
        """The sums over all ranks, on all ranks."""
        if self.layout.size == 1:
            return list(shares)
        sums = torch.tensor(shares, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()


def copies(weight: Tensor) -> int:
    """How many ranks hold the same part of it."""
    if not hasattr(weight, "to_local"):
        return 1
    return math.prod(size for size, placement in zip(weight.device_mesh.shape, weight.placements)
                     if placement.is_replicate())


def train_step(engine: Engine, optimizer, batch: Tensor, lr: float, clip: float,
               flag: float = 0) -> tuple[float, float, float]:
    """One step on (N, T + 1) tokens: (loss, norm of the gradient, sum of all ranks' flags).

    The gradient is that of the mean over all N sequences, scaled to norm `clip` if it is longer.
    If loss or norm is not finite, on whichever rank, the weights stay as they are on all.
    """
    watch(engine.watchdog)
    share = engine.loss(batch)
    engine.complete()
    loss, square, flags = engine.add_up(share, engine.squared_norm(), flag)
    norm = math.sqrt(square)
    if math.isfinite(loss) and math.isfinite(norm):
        if norm > clip:
            torch._foreach_mul_(engine.gradients(), clip / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, flags


@torch.no_grad()
def evaluate(engine: Engine, batches: Batches, limit: int) -> tuple[float, float]:
    """Held-out text: (mean negative log-likelihood a token in nats, bits per byte)."""
    rows, count, size = [], 0, 0.0
    for bytes_per_token, windows in batches.held_out(limit):
        rows += [np.pad(window.astype(np.int64), (0, batches.seq_len + 1 - len(window)),
                        constant_values=-1) for window in windows]
        tokens = sum(len(window) - 1 for window in windows)
        count, size = count + tokens, size + tokens * bytes_per_token
    total = 0.0
    for part in torch.from_numpy(np.stack(rows)).split(batches.rows):
        watch(engine.watchdog)
        total += engine.loss(part)
    nll, = engine.add_up(total)
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
    """Bytes that a layer keeps for its backward, as Trace sees them where one runs without memory.
    cast: its weights are in fp32, and autograd keeps them in dtype too."""
    # By hand all attentions save the same. Under autograd, tiled saves at most what equation does.
    alike = "fused" if by_hand else {"tiled": "equation"}.get(attention, attention)
    attend, attend_backward = ATTENTION[alike]
    with FakeTensorMode(), Trace() as trace:
        layer = Llama(replace(config, n_layers=1, vocab_size=1)).layers[0]
        for p in () if cast else layer.parameters():
            p.data = p.data.to(dtype)
        x = torch.empty(rows, seq_len, config.dim, dtype=dtype, requires_grad=True)
        positions = torch.arange(seq_len)
        tables, before = rope_table(config, positions), trace.live
        y = layer(x, *tables, partial(attend, positions=positions),
                  attend_backward if by_hand else None)
        return trace.live - before + x.nbytes - y.nbytes


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
    """Bytes that such a rank sends in a step, by the field of Layout that they are for.

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
    data = (s - 1) * (dtype.itemsize * gathered + 4 * reduced)
    x = rows * seq_len * config.dim * dtype.itemsize // t
    exchanges = layers * {"manual": 10, "autograd": 8, "recompute": 12}[backward]
    exchanges += 2 * (first + last)  # of what the embedding puts out and the output takes
    crossings = 2 * layout.interleave - first - last  # x to the next stage, dx to the one before
    return {"replicas": 8 * held * (copies - 1) // copies, "shards": data,
            "pp": m * crossings * x, "tp": m * exchanges * x * (t - 1)}


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


def fullest(args, config: LlamaConfig, layout: Layout, rows: int, backward: str
            ) -> tuple[dict[str, int], int]:
    """memory_needed by the rank that needs most, `rows` sequences at once; its place."""
    passes = layout.passes(args.batch_tokens // args.seq_len, rows)
    return max(((memory_needed(config, rows, args.seq_len, DTYPES[args.dtype], args.attention,
                               backward, layout, passes, place), place)
                for place in layout.places), key=lambda found: sum(found[0].values()))


def fit_memory(args, config: LlamaConfig, device: str, layout: Layout, world: World
               ) -> tuple[int, bool]:
    """Sequences to compute at once, what was asked for, else up to 8192 tokens as far as they fit,
    and in a pipeline a quarter of what would fill it; and whether freed memory may be kept, whose
    gaps take up to a third more. Refuses, before anything large is allocated, what the machine
    cannot hold."""
    there = memory_there(device) // (world.local_size if device == "cpu" else 1)
    each = args.batch_tokens // args.seq_len // layout.dp
    filled = 4 * layout.pp if layout.pp > 1 else 1
    rows = args.micro_batch or max(1, min(8192 // args.seq_len, each // filled))
    while True:
        need, _ = fullest(args, config, layout, rows, args.backward)
        total = sum(need.values())
        if total < 0.9 * there:  # a tenth for what is not counted
            return rows, total < 0.6 * there
        if args.micro_batch or rows == 1:
            break
        rows //= 2
    smaller = max((c.n_params, name) for name, (c, _) in SIZES.items() if 20 * c.n_params < there)
    advice = f"--size {smaller[1]}" if 18 * rank_params(config, layout) > there else (
        f"--micro-batch 1 or --seq-len {args.seq_len // 2}")
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in need.items())
    raise ValueError(f"{args.size} needs about {total / 1e9:.0f} GB a process to train ({parts}) "
                     f"and this machine has {there / 1e9:.0f} GB free for it; try {advice}")


def bandwidth(gpu: Device, ranks: int, stride: int) -> float:
    """Bytes/s of a ring of ranks that lie `stride` apart. It leaves a node through one card, so
    that the rings of all its ranks in a node have as many cards."""
    there = gpu.inside if ranks * stride <= NODE else max(1, NODE // stride) * gpu.between
    return min(gpu.inside, there)


def layouts(args, config: LlamaConfig) -> dict[Layout, dict]:
    """Every way of args.gpus devices with the options that ask for it, given ones as they are. If
    none is possible: what is wrong with the first."""
    n, found, wrong, depth = args.gpus, {}, None, range(1, config.n_layers + 1)
    values = {"tp": range(1, NODE + 1), "pp": [pp for pp in depth if n % pp == 0],
              "interleave": depth, "dp": ("fsdp", "ddp", "hybrid")}
    values |= {name: [vars(args)[name]] for name in values if vars(args)[name]}
    for each in itertools.product(*values.values()):
        choice = dict(zip(values, each))
        try:
            layout = arrange(argparse.Namespace(**vars(args) | choice), config,
                             World(0, n, 0, min(n, NODE)))
            found.setdefault(layout, choice if layout.dp > 1 else {**choice, "dp": "none"})
        except ValueError as error:
            wrong = wrong or error
    if not found:
        raise wrong
    return found


def assess(args, config: LlamaConfig, gpu: Device, layout: Layout, micro: int) -> dict:
    """What a layout costs: memory of the fullest rank, bytes that one sends, and seconds a step. A
    rank computes, waits for tensor and pipeline parallel neighbours, and idles in the bubble; data
    parallel traffic runs beside that, but for one layer's."""
    tp, pp, m = layout.tp, layout.pp, layout.passes(args.rows, micro)
    memory, place = fullest(args, config, layout, micro, args.backward)
    wires = [wire_bytes(config, micro, args.seq_len, DTYPES[args.dtype], args.backward, layout, m,
                        place) for place in layout.places]
    wire = {kind: max(each[kind] for each in wires) for kind in wires[0]}
    data = wire["shards"] / bandwidth(gpu, layout.shards, tp * pp)
    data += wire["replicas"] / bandwidth(gpu, layout.replicas, tp * pp * layout.shards)
    waits = wire["tp"] / bandwidth(gpu, tp, 1) + wire["pp"] / bandwidth(gpu, pp, tp)
    layers = max(rank_shapes(config, layout, place)[0] for place in layout.places)
    flops = args.seq_len * flops_per_token(config, args.seq_len)  # of a sequence
    work = m * micro * flops * layers / config.n_layers / tp
    work *= (4 / 3 if args.backward == "recompute" else 1) / (COMPUTING * gpu.flops)
    step = max((work + waits) * (1 + layout.bubble(m)), data) + data / config.n_layers
    return {"layout": layout, "micro_batch": micro, "micro_batches": m, "place": place,
            "total": sum(memory.values()), "wire": wire, "bubble": layout.bubble(m),
            "step_s": step, "mfu": args.rows * flops / args.gpus / gpu.flops / step}


def search(args, config: LlamaConfig, gpu: Device) -> dict:
    """Of the layouts that the options leave and the memory holds, the simplest that is within 2 %
    of the fastest; `why`: what the best one with another value would take."""
    names, room = ("tp", "pp", "dp", "micro_batch", "interleave"), 0.9 * gpu.memory
    sizes = [args.micro_batch] if args.micro_batch else range(1, max(2, 8192 // args.seq_len + 1))
    found = sorted(({**choice, **assess(args, config, gpu, layout, size)}
                    for layout, choice in layouts(args, config).items() for size in sizes),
                   key=lambda each: (each["total"] >= room, each["step_s"]))
    fits = [each for each in found if each["total"] < room]  # a tenth for what is not counted
    if not fits:
        least = min(each["total"] for each in found)
        raise ValueError(f"{args.size} needs {least / 1e9:.0f} GB on each of {args.gpus} devices, "
                         f"which have {room / 1e9:.0f} for it; try --gpus {2 * args.gpus} or "
                         "--backward recompute")
    best = min((each for each in fits if each["step_s"] < 1.02 * fits[0]["step_s"]),
               key=lambda each: (each["pp"] * each["interleave"], each["tp"], each["dp"],
                                 -each["micro_batch"]))
    why = {}
    for name in names:
        others = [each for each in found if each[name] != best[name] and all(
            each[kept] == best[kept] for kept in names if kept not in (name, "micro_batch"))]
        why[name] = "as asked" if vars(args)[name] else "no other is possible"
        if others:
            cost = f"{others[0]['step_s']:.3g} s a step"
            if others[0]["total"] >= room:
                cost = f"{others[0]['total'] / 1e9:.0f} GB"
            why[name] = f"{others[0][name]} would take {cost}"
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
    peak = None
    if best["interleave"] == 1:  # tracing many stages with many micro-batches would take minutes
        peak = peak_bytes(config, best["layout"], best["micro_batch"], best["micro_batches"],
                          args.seq_len, best["place"], attention=args.attention,
                          backward=args.backward, dtype=DTYPES[args.dtype])
    steps = args.steps or math.ceil(recipe.train_tokens / recipe.batch_tokens)
    mfu, flops = args.mfu or best["mfu"], flops_per_token(config, args.seq_len)
    tokens, speed = steps * args.rows * args.seq_len, mfu * args.gpus * gpu.flops / flops
    hours = tokens / speed / 3600
    mwh, tons = energy(args.gpus * hours, gpu.watts)
    return {"size": args.size, "backward": args.backward, "params": config.n_params,
            "gpus": args.gpus, "gpu": args.gpu, "gpu_gb": gpu.memory / 1e9,
            "flops_per_token": flops, "steps": steps, "tokens": tokens,
            **best, "peak": peak, "layout": asdict(best["layout"]), "mfu": mfu,
            "mfu_as_papers": mfu * flops_per_token(config, args.seq_len, as_papers=True) / flops,
            "memory": {backward: fullest(args, config, best["layout"], best["micro_batch"],
                                         backward)[0] for backward in BACKWARD},
            "step_s": args.rows * args.seq_len / speed,
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
    peak = [f"  at most       {p['peak'] / 1e9:.2f} in a traced step, --backward {p['backward']}"
            ] if p["peak"] else []
    sent = ", ".join(f"{field} {size / 1e9:,.1f}" for field, size in p["wire"].items())
    return "\n".join([
        f"{p['size']} on {p['gpus']:,} x {p['gpu']}: {p['params']:,} parameters, "
        f"{p['steps']:,} steps, {p['tokens'] / 1e9:,.1f} billion tokens", "",
        f"layout          dp {copies * shards} x pp {p['pp']} x tp {p['tp']}, state over {shards}, "
        f"{p['micro_batches']} x {p['micro_batch']} sequences a step", *why, "",
        f"GB of {p['gpu_gb']:<10.0f}{'    '.join(f'{way:8}' for way in memory)}", *table,
        *peak, "",
        f"GB sent a step  {sent}",
        f"step            {p['step_s']:.3g} s, pipeline's bubble {p['bubble']:.1%}",
        f"speed           {p['tokens_per_s']:,.0f} tokens/s, {p['tokens_per_s'] / p['gpus']:,.0f} "
        f"each; MFU {p['mfu']:.1%}, as the papers count {p['mfu_as_papers']:.1%}",
        f"training        {p['days']:,.1f} days, {p['gpu_hours']:,.0f} GPU-hours, "
        f"{p['mwh']:,.2f} MWh, {p['tco2eq']:,.2f} tCO2eq"])


# ---------------------------------------------------------------------------------------------
# A world that does not exist


class Trace(TorchDispatchMode):
    """Follows tensors, which may be fake, through whatever is computed inside: bytes alive now and
    at most, and how often each collective ran, by (operation, ranks in its group, bytes of its
    whole tensors). Of the numbers that a program asks for, each is 1: a fake tensor has none."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.held, self.collectives = {}, Counter()

    def hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.held:
            weakref.finalize(storage, self.resize, key, None)
        self.resize(key, storage.nbytes())

    def resize(self, key: int, size: int | None) -> None:
        """The storage now has `size` bytes; None: it is gone."""
        self.live += (size or 0) - self.held.pop(key, 0)
        self.peak = max(self.peak, self.live)
        if size is not None:
            self.held[key] = size

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with what is local, and its collectives
        if self.shapes.locked():
            return operation(*args, **(kwargs or {}))
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        fake = any(map(is_fake, taken)) or not taken
        if fake and operation is torch.ops.aten._local_scalar_dense.default:
            return 1
        with contextlib.nullcontext() if fake else unset_fake_temporarily():  # what is real stays
            made = operation(*args, **(kwargs or {}))
        if operation.namespace in ("c10d", "_c10d_functional"):
            self.note(operation.__name__.split(".")[0], (made, *args))
        for x in (*taken, *tree_leaves(made)):
            if isinstance(x, Tensor):
                self.hold(x.untyped_storage())
        return made

    def note(self, name: str, parts: tuple) -> None:
        """A collective with what it made and took: tensors, and a group by itself or by name."""
        size = max(sum(x.nbytes for x in tree_leaves(part) if isinstance(x, Tensor))
                   for part in parts)
        for part in parts:
            if isinstance(part, torch.ScriptObject) and "ProcessGroup" in str(part._type()):
                self.collectives[name, dist.ProcessGroup.unbox(part).size(), size] += 1
            elif isinstance(part, str) and part not in ("sum", "avg"):
                group = dist.distributed_c10d._resolve_process_group(part)
                self.collectives[name, group.size(), size] += 1

    def __enter__(self):
        """FSDP2 frees what it gathered by storage.resize_, which is no operation. DTensor works out
        shapes with fake tensors of full size, which are not there: under a lock, so that it tells.
        """
        self.before = torch.UntypedStorage.resize_, ShardingPropagator._fake_mode_lock
        self.shapes = ShardingPropagator._fake_mode_lock = threading.Lock()

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            self.before[0](storage, size)
            self.hold(storage)
            return storage

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_, ShardingPropagator._fake_mode_lock = self.before
        return super().__exit__(*error)


def simulate(config: LlamaConfig, layout: Layout, rank: int, micro_batch: int, rows: int, T: int,
             recipe: Recipe, **options) -> dict:
    """Traces one real step, on tensors without memory, of one rank of a world that does not exist:
    rows of T + 1 tokens, micro_batch at once. options are Stage's."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    if layout.size > 1:
        dist.init_process_group("fake", rank=rank, world_size=layout.size, store=FakeStore())
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            engine = Engine(config, layout, "cpu", micro_batch, seed=None, **options)
            with Trace() as trace:
                optimizer, held = make_optimizer(engine.parameters, recipe), trace.live
                batch = torch.zeros(rows, T + 1, dtype=torch.int64)
                train_step(engine, optimizer, batch, recipe.lr, recipe.clip)
        shards = {name: tuple(local(p).shape) for name, p in engine.parameters.items()}
        return {"shards": shards, "state": held, "live": trace.live, "peak": trace.peak,
                "collectives": trace.collectives}
    finally:
        if layout.size > 1:
            dist.destroy_process_group()


def peak_bytes(config: LlamaConfig, layout: Layout, micro_batch: int, passes: int, seq_len: int,
               place: int = 0, **options) -> int:
    """The most that the rank at that place of the pipeline holds in a step: traced with three and
    with four layers, all that FSDP gathers at a time (a pipeline gathers all: one and two in each
    stage); further ones add as much as the last.
    A CPU adds KERNELS, if malloc gives back what is freed; else its gaps, up to a third more."""
    stages, recipe = layout.pp * layout.interleave, Recipe(1.0, 1, 1, eps=1.0)
    rows = min(passes, 2 * layout.pp) * micro_batch * layout.dp  # more add nothing
    few = 3 if layout.pp == 1 else 1
    low, high = (simulate(replace(config, n_layers=n * stages), layout, place * layout.tp,
                          micro_batch, rows, seq_len, recipe, **options)["peak"]
                 for n in (few, few + 1))
    layers = rank_shapes(config, layout, place)[0] / layout.interleave
    return round(low + (layers - few) * (high - low)) + KERNELS


def simulate_world(args, config: LlamaConfig, recipe: Recipe) -> str:
    """What `simulate` tells of the ranks of --simulate-world at each of the pipeline's places that
    differ, beside what --plan says."""
    n, micro, dtype = args.simulate_world, args.micro_batch or 1, DTYPES[args.dtype]
    layout = arrange(args, config, World(0, n, 0, min(n, NODE)))
    rows = args.batch_tokens // args.seq_len
    passes = layout.passes(rows, micro)
    lines = [f"{args.size} on {n:,} ranks: {layout}, {passes} micro-batches of {micro} x "
             f"{args.seq_len} tokens on each"]
    for place in layout.places:
        found = simulate(config, layout, place * layout.tp, micro, rows, args.seq_len, recipe,
                         attention=args.attention, backward=args.backward, dtype=dtype)
        planned = memory_needed(config, micro, args.seq_len, dtype, args.attention, args.backward,
                                layout, passes, place)
        state, total = planned["weights"] + planned["AdamW"], sum(planned.values())
        kinds = Counter((re.sub(r"layers\.\d+", "layer", name), " x ".join(map(str, shape)))
                        for name, shape in found["shards"].items())
        lines += [
            f"\nplace {place} of the pipeline (rank {place * layout.tp} and its like)",
            *(f"  {count:4} x {name:30} {shape}" for (name, shape), count in kinds.items()),
            f"  bytes: weights and AdamW {found['state']:,} (planned {state:,}), alive after the "
            f"step {found['live']:,}, at most {found['peak']:,} (planned {total:,})",
            *(f"  {count:6} x {name:24} {ranks:6} ranks {size:16,} bytes"
              for (name, ranks, size), count in sorted(found["collectives"].items()))]
    return "\n".join(lines)


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
    """Of one state; its metadata, which may be long, is read once."""

    @cached_property
    def metadata(self):
        return SafeUnpickler(io.BytesIO((self.path / ".metadata").read_bytes())).load()

    def read_metadata(self, *args, **kwargs):
        self.metadata.storage_meta.load_id = self.load_id
        return self.metadata


class Writer(dcp.FileSystemWriter):
    """Writes one state aside, with the SHA-256 of every file. The rank that coordinates makes the
    folder before any rank writes, and renames it when all have written: the state is there wholly
    or not at all. The last two up to this step are kept."""

    def __init__(self, folder: Path, facts: dict):
        super().__init__(folder / "saving")
        self.facts, self.done = facts, folder / f"step-{facts['step']:09d}"

    def prepare_local_plan(self, plan):  # DCP's makes the folder on every rank
        return plan

    def prepare_global_plan(self, plans):
        shutil.rmtree(self.path, ignore_errors=True)  # of a save that was cut short
        self.path.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan, planner):
        """What this rank wrote, and then, for `finish`, the hashes of its files."""
        try:
            written = super().write_data(plan, planner)
        except RuntimeError as error:  # torch's, in the place of the system's
            raise error.__context__ or error from None
        hashes = {file.name: sha256(file)
                  for file in self.path.glob(f"{plan.storage_data.prefix}*")}
        return written.then(lambda future: [*future.value(), hashes])

    def finish(self, metadata, results):
        manifest = dict(pair for written in results for pair in written.pop().items())
        super().finish(metadata, results)
        (self.path / "facts.json").write_text(json.dumps(self.facts), encoding="utf-8")
        manifest |= {name: sha256(self.path / name) for name in (".metadata", "facts.json")}
        (self.path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        shutil.rmtree(self.done, ignore_errors=True)
        os.replace(self.path, self.done)
        states = sorted(self.done.parent.glob("step-*"))
        at = states.index(self.done)
        for other in states[:max(0, at - 1)] + states[at + 1:]:
            shutil.rmtree(other, ignore_errors=True)


class States:
    """The states of a run. All ranks of `group`, which has gloo and serves nothing else, call each
    method; None: there is one process. local_size: how many of them share a machine's memory."""

    def __init__(self, folder: Path, group=None, local_size: int = 1):
        self.folder, self.local_size, self.step, self.end = folder, local_size, 0, None
        self.options = {"process_group": group, "no_dist": group is None}
        self.ranks = _DistWrapper(group, group is not None, 0)  # what fails on one is told to all

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict) -> None:
        """Writes folder/step-N from a copy of the tensors, while training goes on; without a copy,
        while training waits, where memory for it is short. First waits for the save before."""
        self.wait()
        tensors = {**tensors, "random": torch.get_rng_state()}
        size = sum(local(t).nbytes for t in tensors.values())
        options = {"storage_writer": Writer(self.folder, {"step": step, **facts}), **self.options}
        self.step = step
        if memory_there("cpu") > 2 * self.local_size * size:
            self.end = dcp.async_save(tensors, **options).result
        else:
            self.end = partial(dcp.save, tensors, **options)
            self.wait()

    def wait(self) -> None:
        """Until the last save is done; OSError, on every rank, if it could not be written."""
        end, self.end = self.end, None
        try:
            if end is not None:
                end()
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
            if self.ranks.is_coordinator:
                shutil.rmtree(self.folder / "saving", ignore_errors=True)
            raise OSError(f"the state of step {self.step} could not be written "
                          f"({last_line(error)}); older states are untouched; try to free space, "
                          "then the same command") from None

    def load(self, tensors: dict[str, Tensor]) -> dict | None:
        """Fills the tensors, and torch's random generator, from the newest state that is good on
        every rank, whatever layout it was saved in, and returns its facts; None if there is none.
        A damaged one is named and passed over."""
        self.wait()
        states = self.ranks.broadcast("list", lambda: sorted(self.folder.glob("step-*")))
        for state in reversed(states):
            try:
                facts = self.ranks.all_gather("check", partial(self.check, state))[0]
                self.ranks.all_gather("read", partial(self.read, state, tensors))
                return facts
            except dcp.api.CheckpointException as error:  # any other is not the state's
                if isinstance(cause_of(error), KeyboardInterrupt):
                    raise KeyboardInterrupt from None
                say(f"{state} is damaged and passed over: {last_line(error)}")
        if states:
            raise ValueError(f"no state in {self.folder} is good; try --fresh to start over")
        return None

    def check(self, state: Path) -> dict:
        """The facts of a state; ValueError if this rank's share of its files is not as written."""
        manifest = json.loads((state / "manifest.json").read_text(encoding="utf-8"))
        names = {file.name for file in state.iterdir()} - {"manifest.json"}
        share = slice(self.ranks.get_rank(), None, self.ranks.get_world_size())
        for name in sorted(names | set(manifest))[share]:
            if name not in names or sha256(state / name) != manifest.get(name):
                raise ValueError(f"{name} is not what was written")
        facts = json.loads((state / "facts.json").read_text(encoding="utf-8"))
        if state.name != f"step-{facts['step']:09d}" or type(facts["skipped"]) is not int:
            raise ValueError("facts.json is not of this step")
        return facts

    def read(self, state: Path, tensors: dict[str, Tensor]) -> None:
        """Fills this rank's tensors, each from the parts of it that any ranks wrote."""
        reader, random = SafeReader(state), torch.get_rng_state()
        reader.read_metadata()  # first alone: dcp.load would wrap what is wrong with it
        dcp.load({**tensors, "random": random}, storage_reader=reader, no_dist=True)
        torch.set_rng_state(random)


def export_state(state: Path, config: LlamaConfig, folder: Path) -> None:
    """Meta's folder from the state in step-N, a tensor at a time, whatever layout wrote it."""
    reader = SafeReader(state)

    def read(name: str, shape: tuple[int, ...], dtype: torch.dtype, _) -> Tensor:
        tensors = {f"model.{name}": torch.empty(shape, dtype=dtype)}
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        return tensors[f"model.{name}"]

    weights, no_part = {}, (torch.empty(0),)  # which `read` need not decode
    for name, shape in shapes(config).items():
        dtype = reader.metadata.state_dict_metadata[f"model.{name}"].properties.dtype
        weights[name] = Weight(shape, dtype, no_part, partial(read, name, shape, dtype))
    write_meta(config, weights, folder)


def state_tensors(parameters: dict[str, Tensor], optimizer) -> dict[str, Tensor]:
    """Everything that training goes on from: weights and AdamW's moments, by name."""
    state = {f"model.{name}": p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        state |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    return state


def sha256(path: Path) -> str:
    data = np.memmap(path, mode="r") if path.stat().st_size else b""
    return hashlib.sha256(data).hexdigest()


def cause_of(error: BaseException) -> BaseException:
    """What happened on the first rank that failed."""
    while isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return error


def last_line(error: BaseException) -> str:
    error = cause_of(error)
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


def say(text: str) -> None:
    """Of many ranks the first speaks for all."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# Many processes: how they come to be, and how a run survives one that does not


def torchrun_names(env: Mapping[str, str]) -> dict[str, str]:
    """What srun tells its processes, in torchrun's variables. {} where srun started one process or
    none: the script that sbatch runs is told of all tasks too, but is no step."""
    size = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
    if "RANK" in env or size == "1" or not {"SLURM_STEP_ID", "SLURM_PROCID"} <= env.keys():
        return {}
    tasks = next(env[name] for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE",
                                        "SLURM_NTASKS_PER_NODE") if name in env)
    on_node = [int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)
               for _ in range(int(times or 1))]  # 4(x2),3 is 4, 4, 3
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or "localhost"
    first = re.match(r"([^,[]|\[[^]]*\])+", nodes)[0]  # gpu[003-010,012] of gpu[003-010,012],cpu1
    job, step = int(env.get("SLURM_JOB_ID", 0)), int(env["SLURM_STEP_ID"])
    return {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": size, "LOCAL_RANK": env["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(on_node[int(env.get("SLURM_NODEID", 0)) % len(on_node)]),
            "MASTER_ADDR": env.get("MASTER_ADDR") or re.sub(r"\[(\d+)[^]]*\]", r"\1", first),
            "MASTER_PORT": env.get("MASTER_PORT") or str(10_000 + (8 * job + step) % 20_000)}


@contextlib.contextmanager
def join(args, device: str) -> Iterator[World]:
    """This process's place in the world that torchrun, srun or `supervise` made; alone without.
    The first speaks for all: an error that every rank meets is one line, and what a rank has alone
    comes with its number."""
    env = os.environ
    rank, size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    world = World(rank, size, int(env.get("LOCAL_RANK", rank)),
                  int(env.get("LOCAL_WORLD_SIZE", size)))
    if size > 1 and args.nproc not in (None, world.local_size):
        raise ValueError(f"{world.local_size} processes were started here and --nproc says "
                         f"{args.nproc}; try without --nproc")
    if size == 1:
        yield world
        return
    args.watchdog = (args.watchdog or 1800) + 0.1 * world.local_rank  # one speaks after the other
    watch(args.watchdog)
    if parent := env.get("SUPERVISOR_PID"):
        threading.Thread(target=die_with, args=(int(parent),), daemon=True).start()
    if device == "cuda":
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())  # srun may show one
    else:
        torch.set_num_threads(max(1, cores() // world.local_size))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    # Rank 0 may prepare text for days while all wait. What hangs is the watchdog's.
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(days=7))
    store = dist.distributed_c10d._get_default_store()
    try:
        if rank == 0:
            atexit.register(store.set, "rank 0 has ended", "")  # all it had to say is said
        yield world
        dist.destroy_process_group()
    except (ValueError, OSError) as error:
        if rank == 0:
            raise
        with contextlib.suppress(RuntimeError):  # the store itself may have ended with rank 0
            for _ in range(100):  # 5 seconds
                if store.check(["rank 0 has ended"]):
                    sys.exit(2)
                time.sleep(0.05)
            raise ValueError(f"rank {rank}: {error}") from None
        sys.exit(2)
    except Exception:
        time.sleep(3)  # if this came of another rank's end, we are ended too and need not speak
        raise


def die_with(parent: int) -> None:
    """Ends a rank and the processes it started when its supervisor is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def on_first(world: World, work: Callable):
    """What work() gives on rank 0, on all ranks, or its ValueError or OSError."""
    watch(None)  # it may take its time
    if world.size == 1:
        return work()
    result, error = None, None
    if world.rank == 0:
        try:
            result = work()
        except (ValueError, OSError) as caught:
            error = caught
    box = [result, error]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if box[1] is not None:
        raise box[1]
    return box[0]


def watch(seconds: float | None) -> None:
    """A process that does not call this again in time says where each of its threads hangs, and
    ends with status 1. It needs no thread of Python's, which might hang too. None: never."""
    faulthandler.cancel_dump_traceback_later()
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)


def supervise(n: int, command: list[str], states: Path) -> int:
    """Runs the command as n ranks on this machine (Linux, macOS) and stays: the exit status. A rank
    that dies takes all with it, and they start again from the newest state; dying twice without a
    new one is the end. A user's mistake, and a stop that was asked for, are not tried again."""
    stops, reached, began, run = [], None, time.time(), states.parent / "run.json"
    for number in STOPS:
        signal.signal(number, lambda number, frame: stops.append(number))
    for start in itertools.count():
        # A store of ours, new at each start: its port is held from the first moment.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = start_ranks(n, command, store.port, start)
        rank, status = wait_for(ranks, stops)
        for process in ranks:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes it started
            process.wait()
        if status in (0, 2) or status > 128:
            return status
        if stops:
            return 128 + stops[-1]
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        state = max(states.glob("step-*"), default=None)
        if start and state == reached:
            say(f"error: rank {rank} {how}, again before a new state was saved; try --save-every "
                "with fewer steps, or the same command, which goes on from the last good state")
            return 1
        say(f"rank {rank} {how}; going on from the last good state")
        reached = state
        if run.exists() and run.stat().st_mtime > began:  # --fresh has been done
            command = [word for word in command if word != "--fresh"]


def start_ranks(n: int, command: list[str], port: int, start: int) -> list[subprocess.Popen]:
    """The command n times, each in a session of its own: the terminal's Ctrl-C comes to us alone,
    and from us to them, once."""
    shared = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True,
              "TORCHELASTIC_RESTART_COUNT": start, "SUPERVISOR_PID": os.getpid()}
    each = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(n)]
    return [subprocess.Popen(command, start_new_session=True,
                             env=os.environ | {name: str(value) for name, value in own.items()})
            for own in each]


def wait_for(ranks: list[subprocess.Popen], stops: list[int]) -> tuple[int, int]:
    """(rank, status as Popen has it) of the first that died or met an error, else of rank 0 when
    all have ended. Passes on the signals that come to `stops`."""
    sent = 0
    while True:
        for number in stops[sent:]:
            sent += 1
            for process in ranks:
                process.send_signal(number)
        statuses = [process.poll() for process in ranks]
        # Above 128 a rank was asked to stop, and others may still save.
        failed = [(rank, status) for rank, status in enumerate(statuses)
                  if status and status <= 128]
        if failed:  # of several, more likely the cause: a signal, then an error it could name
            rank, status = min(failed, key=lambda found: (found[1] > 0, found[1] != 2))
            time.sleep(status == 1)  # where one hung, let all say where they are
            return rank, status
        if None not in statuses:
            return 0, statuses[0]
        time.sleep(0.05)


def replicas_agree(tensors: Mapping[str, Tensor]) -> None:
    """Ends all ranks with status 1 where a DTensor's copies along a dimension of its mesh are not
    the same bits. To be called before a save, so that the last state stays good. One checksum each
    (the exclusive or of all elements) is exchanged: any one wrong bit changes it."""
    copies, wrong = {}, []
    for name, tensor in tensors.items():
        for dim, placement in enumerate(getattr(tensor, "placements", ())):
            if placement.is_replicate() and tensor.device_mesh.size(dim) > 1:
                found = torch.hash_tensor(tensor.to_local()).view(torch.int64)
                copies.setdefault(tensor.device_mesh.get_group(dim), {})[name] = found
    for group, sums in copies.items():
        mine, ranks = torch.stack(list(sums.values())), dist.get_process_group_ranks(group)
        every = [torch.empty_like(mine) for _ in ranks]
        dist.all_gather(every, mine, group)
        for name, column in zip(sums, torch.stack(every, dim=1).tolist()):
            common = statistics.mode(column)
            odd = [rank for rank, x in zip(ranks, column) if x != common or len(ranks) == 2]
            if len(set(column)) > 1:
                wrong.append(f"{name} of rank {' or '.join(map(str, odd))}")
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, wrong)
    if wrong := sorted(set(itertools.chain(*found))):
        say(f"error: {wrong[0]} is not what the other copies are ({len(wrong)} such tensors): a "
            "memory or processor failed in silence; nothing was saved since; try without that one")
        dist.barrier()
        sys.exit(1)


def is_spike(before: Sequence[float], loss: float) -> bool:
    """Whether a loss lies out of what the last 100 let expect: over their median by 6 times their
    spread, which is the median distance from it (x 1.48: of a normal distribution, one standard
    deviation), and at least 0.01 nats. Not before there are 20."""
    last = before[-100:]
    if len(last) < 20:
        return False
    middle = statistics.median(last)
    spread = 1.48 * statistics.median(abs(x - middle) for x in last)
    return loss > middle + 6 * max(spread, 0.01)


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
    if "vocab_size" in changes and not (args.bench or args.plan or args.simulate_world):
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
    run = {**settings, "code": code}
    if file.exists() and (folder / "tokens" / "sources.json").exists():  # else nothing to keep
        run = {**settings, **read_json(file, dict)}  # a run of before a setting existed
    for name, value in settings.items():
        if run[name] != value:
            raise ValueError(f"{folder} was trained with {name}={run[name]}; "
                             "try --out DIR or --fresh")
    if run.get("code") != code:
        say("warning: llama.py is not what this run began with; its losses may differ")
    if dist.is_initialized():  # of many ranks each has its share of the cores, see `join`
        return run
    if (threads := run.setdefault("threads", torch.get_num_threads())) != torch.get_num_threads():
        say(f"going on with the {threads} threads that this run began with")
        torch.set_num_threads(threads)
    return run


def uncompiled(args):
    """For evaluation and samples, whose shapes are many: none is worth its compilation."""
    return torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext()


def timed_steps(args, engine: Engine, recipe: Recipe, count: int) -> tuple[float, float]:
    """Median seconds of `count` steps on random tokens, after two untimed ones; the last loss."""
    times, random = [], torch.Generator().manual_seed(0)
    optimizer = make_optimizer(engine.parameters, recipe)
    shape = (args.batch_tokens // args.seq_len, args.seq_len + 1)
    for _ in range(count + 2):
        batch = torch.randint(engine.config.vocab_size, shape, generator=random)
        start = time.perf_counter()
        loss, _, _ = train_step(engine, optimizer, batch, recipe.lr, recipe.clip)
        times.append(time.perf_counter() - start)
    seconds, = engine.add_up(statistics.median(times[2:]))
    return seconds / engine.layout.size, loss


def bench(args, engine: Engine, recipe: Recipe, peak: float | None) -> dict:
    step_s, loss = timed_steps(args, engine, recipe, args.bench)
    config, world = engine.config, engine.layout.size
    speed = args.batch_tokens // args.seq_len * args.seq_len / step_s
    mfu = peak and speed * flops_per_token(config, args.seq_len) / (peak * world)
    rss = None
    if sys.platform != "win32":
        import resource
        unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {"tokens_per_s": speed, "mfu": mfu or "unknown", "peak_gflops": peak and peak / 1e9,
            "step_s": step_s, "peak_rss_gb": rss, "loss": loss, "params": config.n_params,
            "backward": args.backward, "dtype": args.dtype, "world": world,
            "layout": asdict(engine.layout)}


class Log:
    """log.jsonl, one object a line, and the line that shows progress; of many ranks the first's."""

    def __init__(self, folder: Path, first: bool = True, began: float | None = None):
        """began: when the process did, by time.perf_counter."""
        self.path, self.rows, self.shown = folder / "log.jsonl", [], 0.0
        self.first, self.elapsed_before = first, 0.0
        self.began = time.perf_counter() if began is None else began
        for line in self.path.read_bytes().splitlines() if first and self.path.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self.rows += [row for row in [json.loads(line)] if type(row["step"]) is int]
                self.elapsed_before = max(self.elapsed_before, self.rows[-1]["elapsed_s"])

    def cut(self, step: int) -> None:
        """Back to `step`; a torn last line goes too."""
        if not self.first:
            return
        self.rows = [row for row in self.rows if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_aside(self.path, lambda file: file.write(text.encode()))

    def elapsed(self) -> float:
        """Seconds that the run took up to now, those of lost steps too; not while it was down."""
        return self.elapsed_before + time.perf_counter() - self.began

    def add(self, row: dict) -> None:
        if not self.first:
            return
        self.rows.append({key: None if isinstance(value, float) and not math.isfinite(value)
                          else value for key, value in row.items()})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def show(self, row: dict, steps: int, left: float) -> None:
        if not self.first:
            return
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
    """Ctrl-C, SIGTERM and SIGUSR1 end the run after the step, with its state saved; the same one
    again at once. `signal` is its number, else 0: the largest over all ranks stops them alike."""

    def __init__(self):
        self.signal = 0
        self.before = {number: signal.signal(number, self.stop) for number in STOPS}

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        say("\nstopping after this step; the same command goes on from there")


class Training:
    """A run from its newest good state to its last step. `facts` is where it stands: step, steps
    that were skipped (not finite), data that was passed over in steps, seconds of useful steps and,
    with --spike, the last losses."""

    def __init__(self, args, run: dict, folder: Path, world: World, engine: Engine,
                 batches: Batches, recipe: Recipe, peak: float | None, began: float | None = None):
        self.args, self.folder, self.world, self.steps = args, folder, world, run["steps"]
        self.engine, self.batches, self.peak = engine, batches, peak
        self.recipe = replace(recipe, warmup=min(recipe.warmup, self.steps // 10))
        self.optimizer = make_optimizer(engine.parameters, recipe)
        self.tensors = state_tensors(engine.parameters, self.optimizer)
        group = None if world.size == 1 else dist.new_group(backend="gloo")
        self.states = States(folder / "state", group, world.local_size)
        self.facts = {"step": 0, "skipped": 0, "passed": 0, "useful_s": 0.0, "losses": []}
        self.log = Log(folder, world.rank == 0, began)
        self.times, self.rolled, self.bad, self.stopper = [], [], 0, Stopper()
        mine = engine.rows(torch.zeros(batches.rows, 1)) >= 0
        self.rank_tokens = int(mine.sum()) * batches.seq_len
        self.eval_every = args.eval_every or max(1, min(1000, self.steps // 10))
        self.save_every = args.save_every or self.eval_every
        self.load()

    def load(self) -> bool:
        """Goes on from the newest good state; whether there is one."""
        watch(None)  # it may take its time
        found = self.states.load(self.tensors)
        self.engine.forget_gathered()
        self.facts |= found or {}
        self.log.cut(self.facts["step"])
        return found is not None

    def run(self) -> None:
        if self.facts["step"] >= self.steps:
            say(f"{self.folder} is finished at step {self.facts['step']}; --steps N goes on, "
                "--fresh starts over")
        elif self.facts["step"]:
            self.log.add({"event": "resume", "step": self.facts["step"],
                          "elapsed_s": self.log.elapsed()})
        while self.facts["step"] < self.steps:
            row, stopping = self.step()
            finite, done = not self.bad, row["step"] == self.steps
            if self.args.spike and finite and self.passes_over(row):
                continue
            self.log.add(row)
            self.log.show(row, self.steps, (self.steps - row["step"])
                          * statistics.median(self.times[-50:]))
            if self.bad == BAD_STEPS:
                self.states.wait()
                raise ValueError(
                    f"{self.bad} steps in a row had a loss or gradient that is not finite; the "
                    f"last good state in {self.states.folder} is kept; try a lower --lr")
            if done or stopping or finite and row["step"] % self.save_every == 0:
                if self.world.size > 1:
                    replicas_agree(self.engine.parameters)
                watch(None)  # a disk may be slow
                self.states.save(row["step"], self.tensors, self.facts)
            if stopping:
                self.states.wait()
                sys.exit(128 + (self.stopper.signal or signal.SIGTERM))
        self.states.wait()
        self.stopper.close()
        on_first(self.world, self.finish)

    def step(self) -> tuple[dict, bool]:
        """One step: its row of the log, and whether some rank was asked to stop."""
        start, facts, engine, batches = time.perf_counter(), self.facts, self.engine, self.batches
        lr = learning_rate(facts["step"], self.steps, self.recipe)
        batch = batches.step(facts["step"] + facts["passed"])
        loss, norm, stops = train_step(engine, self.optimizer, batch, lr, self.recipe.clip,
                                       self.stopper.signal)
        seconds, tokens = time.perf_counter() - start, batches.rows * batches.seq_len
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.times.append(seconds)
        self.bad = 0 if finite else self.bad + 1
        facts |= {"step": facts["step"] + 1, "skipped": facts["skipped"] + (not finite),
                  "useful_s": facts["useful_s"] + seconds * finite}
        mfu = self.peak and tokens * flops_per_token(engine.config, batches.seq_len) / (
            seconds * self.peak * self.world.size)
        row = {"step": facts["step"], "tokens": facts["step"] * tokens, "loss": loss, "lr": lr,
               "grad_norm": norm, "tokens_per_s": round(tokens / seconds, 1),
               "skipped": facts["skipped"], "world": self.world.size,
               "mfu": mfu and round(mfu, 3),
               "rank_tokens": self.rank_tokens,
               "rank_params": sum(local(p).numel() for p in engine.parameters.values())}
        last, share = facts["step"] == self.steps, self.steps * tokens // 10
        if last or facts["step"] % self.eval_every == 0:
            # At the end on a tenth of the run's tokens, at a third of their cost.
            limit = min(FINAL_EVAL_TOKENS, share) if last else min(EVAL_TOKENS, share // 10)
            with uncompiled(self.args):
                row["val_loss"], row["val_bpb"] = evaluate(engine, batches, limit)
        row["elapsed_s"] = round(self.log.elapsed(), 3)
        row["useful"] = round(facts["useful_s"] / row["elapsed_s"], 3)
        return row, stops > 0

    def passes_over(self, row: dict) -> bool:
        """After a spike of the loss: back to the last good state, and from there past the text up
        to here (as PaLM did; Chowdhery et al. 2022, section 5.1). False if there was none."""
        spike = is_spike(self.facts["losses"], row["loss"])
        # A new list: a save has the old one.
        self.facts["losses"] = [*self.facts["losses"], row["loss"]][-100:]
        if not spike:
            return False
        text = row["step"] + self.facts["passed"]  # read up to here
        say(f"the loss jumped to {row['loss']:.3f} at step {row['step']}")
        if not self.load():
            return False
        self.facts["passed"] = text - self.facts["step"]
        self.log.add({"event": "spike", "step": self.facts["step"], "at": row["step"],
                      "jumped_to": row["loss"], "elapsed_s": round(self.log.elapsed(), 3)})
        self.rolled.append(self.facts["step"])
        if self.rolled.count(self.facts["step"]) == BAD_STEPS:
            raise ValueError(f"the loss jumped {BAD_STEPS} times before a state after step "
                             f"{self.facts['step']} was saved; try a lower --lr, or no --spike")
        return True

    def finish(self) -> None:
        """The weights in Meta's layout, and the picture."""
        export_state(self.states.folder / f"step-{self.facts['step']:09d}", self.engine.config,
                     self.folder)
        title = f"{self.args.size}, {self.engine.config.n_params:,} parameters"
        draw_loss(self.log.rows, self.folder / "loss.svg", title)
        elapsed = self.log.elapsed()
        say(f"{self.facts['useful_s'] / elapsed:.0%} of {elapsed / 60:.1f} minutes went into "
            f"training steps that were kept")


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
    g.add_argument("--dp", choices=("none", "ddp", "fsdp", "hybrid"), help="data parallelism: ddp "
                   "repeats the model, fsdp (default) splits it over all ranks, hybrid over those "
                   "of a machine")
    g.add_argument("--tp", type=whole, metavar="N", help="ranks that share each layer, "
                   "and its tokens between the products: those of one machine")
    g.add_argument("--pp", type=whole, metavar="N", help="ranks that the layers are "
                   "split over")
    g.add_argument("--interleave", type=whole, metavar="N", help="stages of the "
                   "pipeline that a rank holds: less waiting, more messages")
    g.add_argument("--nproc", type=whole, metavar="N", help="processes on this machine (default: "
                   "its GPUs, else 1); one that dies is started again; not under torchrun or srun")
    g.add_argument("--watchdog", type=number, metavar="S", help="a step, or a batch of an "
                   "evaluation, that takes S seconds hangs: say where, and start again (default: "
                   "1800 with many processes, else never)")
    g.add_argument("--spike", action="store_true", help="after a loss far over the last hundred go "
                   "back to the last good state, and past that text")
    g = p.add_argument_group("plan (of the options above, those that are given are kept)")
    g.add_argument("--plan", action="store_true", help="no run: what it would take, and how best")
    g.add_argument("--gpus", type=whole, default=NODE, metavar="N", help="default: %(default)s")
    g.add_argument("--gpu", choices=(*GPUS, "cpu"), default="H100", help="default: %(default)s; "
                   "cpu: machines like this one")
    g.add_argument("--mfu", type=number, metavar="X", help="of the whole step, as measured; "
                   f"default: that of computing at {COMPUTING} of the peak, less what it waits for")
    g.add_argument("--json", action="store_true", help="the plan as one JSON object")
    g.add_argument("--simulate-world", type=whole, metavar="N", help="no run: one step of a rank "
                   "of N that do not exist, its shards, bytes and all that it exchanges")
    return p


def main(argv: list[str]) -> int | None:
    device, args = best_device(), parser().parse_args(argv)
    if args.json and not args.plan:
        raise ValueError("--json is for --plan; try it without")
    if args.plan or args.simulate_world:
        args.dtype = "bf16" if args.gpu != "cpu" and args.dtype == "auto" else args.dtype
        shape = resolve(args, device)
        planned = plan(args, *shape) if args.plan else simulate_world(args, *shape)
        print(json.dumps(planned) if args.json else plan_text(planned) if args.plan else planned)
        return
    os.environ.update(torchrun_names(os.environ))
    gpus = torch.cuda.device_count()
    n = 1 if "RANK" in os.environ else args.nproc or max(1, gpus)
    if n > 1 and 0 < gpus < n:
        raise ValueError(f"--nproc {n} needs as many GPUs, and here are {gpus}; try --nproc {gpus}")
    if n > 1:
        states = Path(args.out or f"runs/{args.size}") / "state"
        return supervise(n, [sys.executable, __file__, *argv], states)
    args.fresh = args.fresh and os.environ.get("SLURM_RESTART_COUNT", "0") == "0"  # not requeued
    if "RANK" in os.environ and device == "mps":
        device = "cpu"  # which many processes can share
    with join(args, device) as world:
        run_rank(args, device, world)


def arrange(args, config: LlamaConfig, world: World) -> Layout:
    """How all ranks share the work; ValueError with the numbers that would do."""
    tp, pp, interleave = args.tp or 1, args.pp or 1, args.interleave or 1
    rows = args.batch_tokens // args.seq_len

    def divisors(n: int) -> str:
        return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)

    for name, n in (("n_kv_heads", config.n_kv_heads), ("hidden_dim", config.hidden_dim),
                    ("vocab_size", config.vocab_size), ("seq_len", args.seq_len)):
        if n % tp:
            shared = math.gcd(config.n_kv_heads, config.hidden_dim, config.vocab_size, args.seq_len)
            raise ValueError(f"--tp {tp} does not divide {name}={n}; try --tp with one of "
                             f"{divisors(shared)}")
    if pp * interleave > config.n_layers or interleave > 1 == pp:
        fits = f"--interleave 1 with --pp up to {config.n_layers}"
        if 1 < pp <= config.n_layers:
            fits = f"--pp {pp} with --interleave up to {config.n_layers // pp}"
        raise ValueError(f"--pp {pp} --interleave {interleave}: {config.n_layers} layers make "
                         f"at most as many stages, of at least two ranks; try {fits}")
    if world.size % (tp * pp):
        raise ValueError(f"{world.size} processes are no multiple of --tp {tp} x --pp {pp}; try "
                         f"--tp and --pp whose product is one of {divisors(world.size)}")
    if tp > 1 and args.compile:
        raise ValueError("--compile cannot see through the exchanges of --tp; try one of both")
    dp = world.size // (tp * pp)
    if dp > rows:
        raise ValueError(f"{dp} data-parallel ranks cannot share the {rows} sequences of a step; "
                         f"try at most {rows * tp * pp} processes, or a larger --batch-tokens")
    kind = args.dp or "fsdp"
    if kind == "none" and dp > 1:
        raise ValueError(f"--dp none leaves {dp} x {tp * pp} processes the same work; try --dp ddp "
                         f"or --dp fsdp, or {tp * pp} processes")
    near = max(1, world.local_size // (tp * pp))  # data-parallel ranks of one machine
    if kind == "hybrid" and near == 1 < dp:
        raise ValueError(f"--dp hybrid would shard over the {world.local_size} processes of a "
                         f"machine, and --tp x --pp takes {tp * pp}; try --dp fsdp")
    shards = {"none": 1, "ddp": 1, "fsdp": dp, "hybrid": math.gcd(near, dp)}[kind]
    return Layout(dp // shards, shards, pp, tp, interleave)


def first_steps(args, run: dict, folder: Path, engine: Engine, recipe: Recipe, started: float
                ) -> None:
    """Sets the number of steps: as asked, or as many as the time allows at the measured speed."""
    minutes = args.minutes or (4.6 if args.size == "tiny" and not args.steps else None)
    if args.steps or not minutes:
        run.pop("minutes", None)
        run["steps"] = args.steps or math.ceil(recipe.train_tokens / recipe.batch_tokens)
    elif run.get("minutes") != minutes or "steps" not in run:
        step_s, _ = timed_steps(args, engine, recipe, 5)
        count = max(5, int(1.2 * minutes / step_s))  # a fiftieth of the time, to be sure of it
        step_s, _ = timed_steps(args, engine, recipe, count)
        passed, = engine.add_up(time.perf_counter() - started)
        left = 60 * minutes - passed / engine.layout.size - 5
        run |= {"minutes": minutes, "steps": max(10, int(left / (1.12 * step_s)))}  # evaluations
        for stage in engine.stages:
            stage.init_weights(args.seed)


def run_rank(args, device: str, world: World) -> None:
    """What one process does."""
    # What may differ when a run goes on.
    free = {"steps", "minutes", "eval_every", "save_every", "out", "fresh", "bench", "spike",
            "nproc", "watchdog", "dp", "tp", "pp", "interleave", "plan", "gpus", "gpu", "mfu",
            "json", "simulate_world", "micro_batch"}
    started, chosen = time.perf_counter(), args.micro_batch
    if args.fresh and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError("a run that torchrun starts again, because of a node that came or went, "
                         "would be lost; try without --fresh, or another --out")
    config, recipe = resolve(args, device)
    layout = arrange(args, config, world)
    args.micro_batch, roomy = on_first(world, lambda: fit_memory(args, config, device, layout,
                                                                 world))
    keep_freed_memory(roomy)
    peak = matmul_flops(device, DTYPES[args.dtype])

    def create(config: LlamaConfig, bos_id: int | None) -> Engine:
        return Engine(config, arrange(args, config, world), device, args.micro_batch, args.seed,
                      args.compile, args.watchdog, bos_id=bos_id if args.document_mask else None,
                      attention=args.attention, backward=args.backward,
                      dtype=None if args.dtype == "fp32" else DTYPES[args.dtype])

    if args.bench:
        result = bench(args, create(config, 1), recipe, peak)
        if world.rank == 0:
            print(json.dumps(result))
        return
    folder = Path(args.out or f"runs/{args.size}")
    settings = {name: value for name, value in vars(args).items() if name not in free}

    def prepare() -> tuple[dict, list[dict]]:
        if args.fresh:
            data_sources(args)  # what is not there is said before anything is removed
        run = open_run(folder, settings, args.fresh)
        if chosen or run.get("layout") != asdict(layout):
            run |= {"micro_batch": args.micro_batch, "layout": asdict(layout)}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", run)
        return run, prepare_data(args, folder, config.vocab_size)

    run, (tokenizer, sources) = on_first(world, prepare)
    args.micro_batch = run["micro_batch"]
    config = replace(config, vocab_size=tokenizer.vocab_size)
    batches = Batches(folder / "tokens", sources, args.seq_len, args.batch_tokens, args.seed)
    engine = create(config, tokenizer.bos_id)
    first_steps(args, run, folder, engine, recipe, started)
    on_first(world, lambda: write_json(folder / "run.json", run))
    say(f"{args.size}: {config.n_params:,} parameters, {run['steps']} steps of {batches.rows} x "
        f"{args.seq_len} tokens, {args.dtype}, on {device}")
    if world.size > 1:
        passes = layout.passes(batches.rows, args.micro_batch)
        say(f"{world.size} processes: {layout.replicas} replicas of the state x {layout.shards} "
            f"shards x pp {layout.pp} x tp {layout.tp}; gradients of {passes} micro-batches of "
            f"{args.micro_batch} add up on each")
    for source, epochs in zip(sources, batches.epochs(run["steps"])):
        say(f"{source['path']}: {source['train_tokens']:,} tokens, read {epochs:.2f} times")
    Training(args, run, folder, world, engine, batches, recipe, peak, started).run()
    prompt = "" if args.data or args.mixture else "class"  # the default text is Python
    del engine
    dtype = DTYPES[args.dtype]
    if world.rank == 0 and config.n_params * dtype.itemsize < 0.8 * memory_there(device):
        model = load(folder, device, dtype)
        sample = sample_texts(model, tokenizer, [prompt], 120, Sampling(seed=args.seed))[0]
        print(f"--- a sample of {folder}\n{prompt}{sample.text}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    command(main)
