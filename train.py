"""Training: text, recipe, devices, state, and a line that shows how it goes (LLaMA, section 2).

    python train.py                                 # `tiny` on Python's own library, 5 minutes
    python train.py --data book.txt notes/ --minutes 20                             # your text
    python train.py --size stories15m --bench 5     # speed alone, on random tokens
    python train.py --nproc 4 --tp 2                # many processes; torchrun starts them too
    python train.py --size 65b --plan --gpus 2048   # what it would take
    python train.py --from llama-7b/ --recipe alpaca --data alpaca_data.json       # fine-tuning

The same command resumes a run that stopped. Its folder, runs/SIZE, then holds params.json,
consolidated.00.pth and tokenizer.model for generate.py, log.jsonl, loss.svg, state/ and tokens/.
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

from generate import (CHATS, DTYPES, PEFT_TARGETS, TASKS, Chat, EvalSettings, Sample, Sampling,
                      Scorer, Weight, benchmarks_of, best_device, chat_format, check_compiler, grow,
                      keep_freed_memory, leave_busy_cores, load, locate, measure, merge_lora,
                      open_checkpoint, open_model, questions, render, return_freed_memory,
                      reward_source, sample_texts, shapes, tokenizer_beside, turn, with_rows,
                      write_adapter, write_meta, write_safetensors)
from llama import (ATTENTION, BACKWARD, MATRICES, SIZES, Llama, LlamaConfig, Recipe,
                   TensorParallel, add_adapter, add_lora, add_score, local_shard, logit_rows,
                   shard_offset)
from tokenizer import (Parser, Survey, Tokenizer, command, cores, data_rows, documents, files_of,
                       load_tokenizer, positive, prepare, read_json, sha1, standard_library, survey,
                       train_sentencepiece, training_text, write_aside, write_json)

TABLE_1 = {"commoncrawl": 67.0, "c4": 15.0, "github": 4.5, "wikipedia": 4.5, "books": 4.5,
           "arxiv": 2.5, "stackexchange": 2.0}  # sampling proportions in percent (LLaMA, Table 1)
EVAL_TOKENS = 2**15        # held-out tokens of an evaluation during training, at most
FINAL_EVAL_TOKENS = 2**21  # held-out tokens of the last evaluation, at most
BAD_STEPS = 5              # a run ends after as many steps in a row whose loss is not finite
TINY_MINUTES = 4.6         # length of the default run, so that it ends within 5 minutes

# ---------------------------------------------------------------------------------------------
# Batches (section 2.1)


class Batches:
    """Batches of a run, from memory-mapped token shards. A resumed run needs no loader state:
    sequence i of step s is a function of (seed, s, i) and the shards alone.

    With n sequences a step, sequence number g = s n + i lies at the point u = frac(u_0 + g phi) of
    the unit interval, phi the golden ratio. Each source has a part of the interval as long as its
    weight; the place of u within the part says where in the source the sequence begins. Multiples
    of phi are evenly spread: after any number of steps each source was read by its weight, and one
    epoch touches about 86 % of the text.
    """

    def __init__(self, folder: Path, sources: list[dict], seq_len: int, rows: int, seed: int,
                 bos_id: int | None = None):
        """rows: sequences a step. bos_id: begins a document; None: attention crosses documents."""
        self.sources, self.seq_len, self.rows, self.bos_id = sources, seq_len, rows, bos_id
        self.u_0 = int.from_bytes(hashlib.sha256(f"batches {seed}".encode()).digest()[:8], "big")
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
        """The T + 1 tokens of sequence number g. u is an integer, in units of 2**-64: exact."""
        u = (self.u_0 + number * 0x9E3779B97F4A7C15) % 2**64  # 2**64 frac(golden ratio)
        k = bisect.bisect_right(self.edges, u) - 1
        places = len(self.train[k]) - self.seq_len  # where a sequence can begin
        begin = (u - self.edges[k]) * places // (self.edges[k + 1] - self.edges[k])
        return self.train[k][begin:begin + self.seq_len + 1]

    def step(self, step: int) -> dict[str, Tensor]:
        """The batch of a step."""
        rows = [self.sequence(step * self.rows + i) for i in range(self.rows)]
        return next_tokens(torch.from_numpy(np.stack(rows).astype(np.int64)), self.bos_id)

    def facts(self, step: int) -> dict:
        """What log.jsonl says of a step's batch."""
        return {}

    def held_out(self, limit: int) -> tuple[list[dict[str, Tensor]], float]:
        """Batches of about `limit` held-out tokens, as many of each source: windows evenly spread
        over the text, short ones padded; and the bytes of text of their targets."""
        windows, text_bytes = [], 0.0
        for source, tokens in zip(self.sources, self.val):
            stride = -(-len(tokens) * len(self.val) // limit)  # one window of so many
            for begin in range(0, len(tokens) - 1, self.seq_len * stride):
                window = torch.from_numpy(tokens[begin:begin + self.seq_len + 1].astype(np.int64))
                text_bytes += (len(window) - 1) * source["val_bytes"] / len(tokens)
                windows.append(F.pad(window, (0, self.seq_len + 1 - len(window)), value=-1))
        batches = []
        for rows in torch.stack(windows).split(self.rows):
            batches.append(next_tokens(rows, self.bos_id))
        return batches, text_bytes

    def epochs(self, k: int, steps: int) -> float:
        """How often a run of that many steps reads source k."""
        share = (self.edges[k + 1] - self.edges[k]) / 2**64
        return share * steps * self.rows * self.seq_len / len(self.train[k])


def open_shards(folder: Path, sources: list[dict], split: str) -> list[np.ndarray]:
    """Memory-maps the split ("train" or "val") of each source; ValueError if a file is damaged."""
    try:
        return [np.memmap(folder / f"{source['name']}.{split}.bin", source["dtype"], "r",
                          shape=source[f"{split}_tokens"]) for source in sources]
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        raise ValueError(f"the token shards in {folder} are damaged, or not on this machine; try "
                         "--fresh, or an --out that all machines share") from None


def next_tokens(rows: Tensor, bos_id: int | None = None) -> dict[str, Tensor]:
    """Tokens and targets (N, T) from rows (N, T + 1) padded with -1: the padding is token 0, and
    the loss leaves out negative targets. With bos_id also `begins`: where a document starts."""
    batch = {"tokens": rows[:, :-1].clamp(min=0), "targets": rows[:, 1:]}
    if bos_id is not None:
        batch["begins"] = batch["tokens"] == bos_id
    return batch


def document_starts(batch: dict[str, Tensor]) -> Tensor | None:
    """Offsets at which documents start in the flattened batch, then N T (cu_seqlens): every row
    starts one too. None where attention may cross from one document into the next."""
    if "begins" not in batch:
        return None
    starts = F.pad(batch["begins"].flatten() > 0, (0, 1), value=True)
    starts[::batch["begins"].shape[1]] = True
    return starts.nonzero()[:, 0].int()


class Examples:
    """Batches of examples: conversations, or pairs of them, each with its own targets. Several are
    packed into a row, where attention does not cross from one into the next. An epoch's order, and
    so sequence number g, is a function of (seed, epoch) and the examples alone."""

    def __init__(self, folder: Path, seq_len: int, rows: int, seed: int):
        self.seq_len, self.rows, self.seed = seq_len, rows, seed
        with np.load(folder / "examples.npz", allow_pickle=False) as file:
            arrays = dict(file)
        self.offsets, self.held = arrays.pop("offsets"), arrays.pop("held")
        self.numbers, self.arrays = arrays.pop("rows"), arrays
        self.plan = functools.cache(self.plan)

    def plan(self, epoch: int | None) -> list[list[int]]:
        """The examples in each row of an epoch; of the held-out ones for None."""
        chosen = np.flatnonzero(self.held == (epoch is None))
        if epoch is not None:
            chosen = np.random.default_rng([self.seed, epoch]).permutation(chosen)
        return pack(self.offsets[1:] - self.offsets[:-1], chosen.tolist(), self.seq_len)

    def sequence(self, number: int) -> list[int]:
        """The examples in row number g, counted over all epochs."""
        epoch = 0
        while number >= len(self.plan(epoch)):
            number -= len(self.plan(epoch))
            epoch += 1
        return self.plan(epoch)[number]

    def batch(self, rows: list[list[int]]) -> dict[str, Tensor]:
        """The tensors (N, T) of rows of examples, padded at their ends."""
        batch = {}
        for name, values in self.arrays.items():
            padding = -1 if name == "targets" else 0
            whole = np.full((len(rows), self.seq_len), padding, values.dtype)
            for row, examples in zip(whole, rows):
                parts = [values[self.offsets[i]:self.offsets[i + 1]] for i in examples]
                part = np.concatenate(parts)
                row[:len(part)] = part
            batch[name] = torch.from_numpy(whole)
        return batch

    def rows_of(self, step: int) -> list[list[int]]:
        return [self.sequence(step * self.rows + i) for i in range(self.rows)]

    def step(self, step: int) -> dict[str, Tensor]:
        return self.batch(self.rows_of(step))

    def facts(self, step: int) -> dict:
        examples = list(itertools.chain(*self.rows_of(step)))
        lengths = self.offsets[1:] - self.offsets[:-1]
        numbers = self.numbers[examples].tolist()
        return {"rows": numbers, "real_tokens": int(lengths[examples].sum())}

    def held_out(self, limit: int) -> tuple[list[dict[str, Tensor]], None]:
        rows = self.plan(None)[:max(1, limit // self.seq_len)]
        starts = range(0, len(rows), self.rows)
        return [self.batch(rows[i:i + self.rows]) for i in starts], None


def pack(lengths: np.ndarray, order: list[int], size: int) -> list[list[int]]:
    """Puts examples, in this order, each into the first of the last 64 rows with room for it. With
    lengths 6, 5, 4 and size 10: [[0, 2], [1]]."""
    rows, room = [], []
    for i in order:
        need = int(lengths[i])
        first = max(0, len(rows) - 64)
        k = next((k for k in range(first, len(rows)) if room[k] >= need), len(rows))
        if k == len(rows):
            rows.append([])
            room.append(size)
        rows[k].append(i)
        room[k] -= need
    return rows


ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "system": "system"}  # as the messages of several formats name them
MARGINS = {"none": (0, 0, 0, 0), "small": (1, 2 / 3, 1 / 3, 0), "large": (3, 2, 1, 0)}
RATINGS = ("significantly", "better", "slightly", "negligibly")  # Llama 2, Table 27


def chat_of(run: "Run", tokenizer: Tokenizer) -> Chat:
    """The form in which conversations are learned."""
    chat = chat_format(tokenizer, run.template)
    if chat.name == "none":
        names = " or ".join(CHATS)
        raise ValueError(f"the tokenizer brings no chat template; try --template {names}")
    return chat


def message(value: dict | str) -> tuple[str, str]:
    """(role, text) of a message {"role", "content"} or {"from", "value"}, or of an answer alone."""
    if isinstance(value, str):
        return "assistant", value
    text = value.get("content", value.get("value"))
    if not isinstance(text, str):
        raise ValueError("a message has no text")
    return ROLES[value.get("role", value.get("from"))], text


def conversation(row: dict, chat: Chat) -> tuple[Chat, list[tuple[str, str]]]:
    """The (role, text) of each message of a row of data: Alpaca's {"instruction", "input",
    "output"}, or "messages" or "conversations"; and the chat's form, which for Alpaca depends on
    whether there is an input."""
    if "instruction" not in row:
        return chat, [message(value) for value in row.get("messages") or row["conversations"]]
    text = row["instruction"]
    if row.get("input") and chat.name in ("alpaca", "alpaca-lora", "chatdoctor"):
        with_input = "task, paired with an input that provides further context."
        chat = chat._replace(message=chat.message.replace("task.", with_input, 1))
        text = f"{text}\n\n### Input:\n{row['input']}"
    elif row.get("input"):
        text = f"{text}\n{row['input']}"
    messages = [("user", text)]
    if "output" in row:
        messages.append(("assistant", row["output"]))
    return chat, messages


def encode_conversation(tokenizer: Tokenizer, chat: Chat, messages: list[tuple[str, str]],
                        last_only: bool = False, learn_end: bool = True
                        ) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and which of them are learned: the assistant's answers, and the
    token that ends each (learn_end). last_only: of the last answer alone. Prompts and answers are
    encoded apart, so that no token is of both."""
    ids, learned, system = [], [], ""
    end = render(tokenizer, chat.end, "", "")
    for i, (role, text) in enumerate(messages):
        if role == "system":
            system = text
        elif role == "user":
            new = turn(tokenizer, chat, text, system, first=not ids)
            if ids:
                new = new[len(end):]  # `turn` begins with the end of the answer before
            ids += new
            learned += [False] * len(new)
        else:
            if chat.strip:
                text = text.strip()
            new = tokenizer.encode(chat.said.format(text=text), continues=True)
            wanted = not last_only or i == len(messages) - 1
            ids += new + end
            learned += [wanted] * len(new) + [wanted and learn_end] + [False] * (len(end) - 1)
    return ids, learned


def example_of(row: dict, tokenizer: Tokenizer, chat: Chat, run: "Run"
               ) -> dict[str, np.ndarray] | None:
    """The arrays of one example, from a row of data: "tokens", "targets" (-1: none) and "begins" (1
    at the first token); of a pair both texts, chosen and rejected, one behind the other. Cut at the
    end to --seq-len, for both; None if no answer is left. ValueError for a row that the objective
    cannot learn from."""
    chat, messages = conversation(row, chat)
    if "ghost" in row:  # what was put before every question while the answers were sampled
        first = [role for role, _ in messages].index("user")
        messages[first] = "user", f"{row['ghost']}\n{messages[first][1]}"
    texts, margin = [messages], 0.0
    if run.objective == "sft" and "chosen" in row:
        messages.append(message(row["chosen"]))
    if run.objective != "sft" and "chosen" in row and "rejected" not in row:
        return None  # answers of equal reward, from generate.py --best-of
    if run.objective != "sft":
        chosen, rejected = message(row["chosen"]), message(row["rejected"])
        if chosen == rejected:
            raise ValueError("its two answers are equal")
        texts = [[*messages, chosen], [*messages, rejected]]
        margin = MARGINS[run.margin][RATINGS.index(row.get("rating", "negligibly"))]
    arrays = {"tokens": [], "targets": [], "begins": [], "margin": []}
    for k, text in enumerate(texts):
        if text[-1][0] != "assistant":
            raise ValueError("it has no answer")
        ids, learned = encode_conversation(tokenizer, chat, text, run.ghost or len(texts) > 1,
                                           run.objective != "dpo")
        if sum(learned) > run.config.max_seq_len:
            raise ValueError(f"its answer of {sum(learned)} tokens is longer than the context")
        ids = ids[:run.seq_len // len(texts)]
        targets = [id if wanted else -1 for id, wanted in zip(ids, learned)][1:] + [-1]
        if max(targets) < 0:
            return None
        if run.objective == "reward":
            targets = [-1] * (len(ids) - 1) + [1 - k]
        arrays["tokens"] += ids
        arrays["targets"] += targets
        arrays["begins"] += [1] + [0] * (len(ids) - 1)
        arrays["margin"] += [0.0] * (len(ids) - 1) + [margin * (k == 0)]
    kinds = {"tokens": np.int64, "targets": np.int64, "begins": np.int8, "margin": np.float32}
    return {name: np.array(values, kinds[name]) for name, values in arrays.items()}


def read_examples(run: "Run") -> tuple[Tokenizer, dict[str, np.ndarray]]:
    """The run's tokenizer, and the arrays that Examples reads. Held out are rows whose SHA-1 is 0
    mod 20, at least one."""
    tokenizer = tokenizer_of(run)
    chat, examples, held, numbers, count = chat_of(run, tokenizer), [], [], [], 0
    for path, _ in run.data:
        print_rank0(f"reading {path}")
        for row in data_rows(path):
            try:
                example = example_of(row, tokenizer, chat, run)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                reason = str(error)
                if not isinstance(error, ValueError):
                    reason = f"no row of a known form ({type(error).__name__}: {reason})"
                raise ValueError(f"row {count} of the data, {json.dumps(row)[:60]}: {reason}; try "
                                 "to mend or remove it") from None
            if example:
                examples.append(example)
                held.append(sha1(json.dumps(row, sort_keys=True)))
                numbers.append(count)
            count += 1
    if count > len(examples):
        print_rank0(f"passed over {count - len(examples)} rows whose questions fill --seq-len, or "
                    "without an answer that is worse")
    if len(examples) < 2:
        raise ValueError(f"{len(examples)} rows are too few; try --data with .json or .jsonl files")
    chosen = min(held) if all(number % 20 for number in held) else None
    held = [number % 20 == 0 or number == chosen for number in held]
    arrays = {name: np.concatenate([example[name] for example in examples])
              for name in examples[0]}
    offsets = [0, *itertools.accumulate(len(example["tokens"]) for example in examples)]
    return tokenizer, {**arrays, "held": held, "rows": numbers, "offsets": offsets}


def write_examples(run: "Run", tokenizer: Tokenizer, arrays: dict[str, np.ndarray]) -> list[dict]:
    """Writes what read_examples gives; returns what run.json keeps of the data."""
    (run.out / "tokens").mkdir(exist_ok=True)
    write_aside(run.out / "tokens/examples.npz", lambda file: np.savez(file, **arrays))
    tokenizer.save(run.out / "tokenizer.model")
    packed = Examples(run.out / "tokens", run.seq_len, run.rows, run.seed).plan(0)
    learned = int((arrays["targets"] >= 0).sum())
    print_rank0(f"{len(arrays['rows'])} examples in {len(packed)} rows of {run.seq_len} tokens, "
                f"{sum(arrays['held'])} held out, {learned:,} tokens learned")
    return [{"path": path, "packed_rows": len(packed)} for path, _ in run.data]


def data_argument(text: str) -> tuple[str, float | None]:
    """A type for argparse: PATH=WEIGHT; the weight of PATH alone is None, its number of tokens."""
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


def survey_data(run: "Run") -> list[tuple[str, float | None, Callable, Survey]]:
    """data_sources with what was counted in each; names what is no text."""
    surveyed = []
    for path, weight, reader in data_sources(run):
        print_rank0(f"reading {path}")
        counted = survey(reader)
        if counted.skipped:
            heading = f"passed over {len(counted.skipped)}:"
            print_rank0("\n  ".join([heading, *counted.skipped[:20]]))
        surveyed.append((path, weight, reader, counted))
    return surveyed


def tokenizer_of(run: "Run") -> Tokenizer | None:
    """The tokenizer that is given, or that of the checkpoint that the run begins from."""
    if run.tokenizer:
        return load_tokenizer(run.tokenizer)
    if run.start:
        return tokenizer_beside(locate(run.start), run.config.vocab_size)
    return None


def prepare_data(run: "Run", surveyed: list[tuple]) -> list[dict]:
    """Makes the run's tokenizer and token shards; returns what run.json keeps of each source."""
    texts, size, sources = [], 0, []
    for path, weight, reader, counted in surveyed:
        texts.append(training_text(reader, counted.chosen))
        size += counted.size
    tokenizer = tokenizer_of(run)
    if tokenizer is None:
        print_rank0(f"training a tokenizer of {run.config.vocab_size} tokens")
        tokenizer = train_sentencepiece(itertools.chain(*texts), run.config.vocab_size, size)
    for path, weight, reader, counted in surveyed:
        print_rank0(f"cutting {path} into tokens")
        source = prepare(str(len(sources)), reader, counted, tokenizer, run.out / "tokens")
        sources.append({**source, "path": path, "weight": weight, "changed": latest_change(path)})
    tokenizer.save(run.out / "tokenizer.model")
    return sources


# ---------------------------------------------------------------------------------------------
# The recipe (section 2.3 "Optimizer", Table 2)


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine that ends at final_lr times the peak (section 2.3).
    With lr 3e-4, warmup 2000 and final_lr 0.1, step 0 has 1.5e-7 and the last step 3e-5."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, steps - 1 - recipe.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * cosine)


def with_warmup(recipe: Recipe, steps: int) -> Recipe:
    """The recipe for a run of so many steps: a warm-up under 1 is a part of them; else it is cut to
    a tenth of them."""
    if recipe.warmup < 1:
        return replace(recipe, warmup=int(recipe.warmup * steps))
    return replace(recipe, warmup=min(recipe.warmup, steps // 10))


def make_optimizer(parameters: dict[str, Tensor], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2017). Matrices decay, the weights of norms do not: the field's
    custom, the papers do not say. Its moments are made at once, for load_state to fill."""
    groups = []
    for decays in (True, False):
        chosen = [p for p in parameters.values() if (p.dim() > 1) == decays]
        groups.append({"params": chosen, "weight_decay": recipe.weight_decay * decays})
    optimizer = torch.optim.AdamW(groups, recipe.lr, recipe.betas, recipe.eps, fused=True)
    for p in parameters.values():
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


# Fine-tuning where nothing else is said: Llama 2-Chat's (Llama 2, section 3.1).
TUNING = Recipe(2e-5, 16384, None, warmup=0.03, eps=1e-5)
# What others fine-tuned LLaMA with, as options. Their batches are of examples; here a step has as
# many tokens as the batch has, at about 128 tokens an example (Alpaca's). alpaca-lora learned the
# prompts too; here answers alone are learned.
FULL = {"objective": "sft", "warmup": 0.03, "weight_decay": 0.0}
LORA = FULL | {"tune": "lora", "batch_tokens": 16384}
RECIPES = {
    "alpaca": FULL | {"template": "alpaca", "lr": 2e-5, "epochs": 3.0, "batch_tokens": 16384,
                      "seq_len": 512},
    "alpaca-lora": LORA | {"template": "alpaca-lora", "lr": 3e-4, "epochs": 3.0, "seq_len": 256,
                           "warmup": 100, "lora_targets": ["wq", "wv"]},
    "llama-adapter": FULL | {"template": "alpaca", "lr": 9e-3, "epochs": 5.0, "seq_len": 512,
                             "batch_tokens": 8192, "tune": "adapter", "weight_decay": 0.02,
                             "warmup": 0.4},
    "chinese-alpaca": LORA | {"template": "chinese-alpaca", "lr": 1e-4, "seq_len": 512,
                              "lora_alpha": 32.0},
    "belle": FULL | {"template": "belle", "lr": 5e-6, "epochs": 3.0, "batch_tokens": 4096,
                     "seq_len": 2048},
    "chatdoctor": FULL | {"template": "chatdoctor", "lr": 2e-6, "epochs": 1.0, "seq_len": 512,
                          "batch_tokens": 16384},
    "llama2-chat": FULL | {"lr": 2e-5, "epochs": 2.0, "weight_decay": 0.1, "seq_len": 4096,
                           "batch_tokens": 64 * 4096},
}


# ---------------------------------------------------------------------------------------------
# How ranks share a step (Llama 3, section 3.3.2)


@dataclass(frozen=True)
class Layout:
    """The number of ranks along each dimension of the mesh. Tensor parallelism sends the most, so
    its ranks are neighbours: rank = ((replica * shards + shard) * pp + stage) * tp + tp_rank."""
    replicas: int = 1  # copies of the whole state: plain data parallelism
    shards: int = 1    # ranks that weights, gradients and AdamW's moments are split over (FSDP)
    pp: int = 1        # ranks that the layers are split over: pipeline stages
    tp: int = 1        # ranks that each layer is split over: tensor and sequence parallelism

    @property
    def dp(self) -> int:
        """Ranks that compute different rows (sequences) of a batch."""
        return self.replicas * self.shards

    @property
    def size(self) -> int:
        return self.dp * self.pp * self.tp

    def passes(self, rows: int, micro_batch: int) -> int:
        """Micro-batches on each rank in a step of so many rows; in a pipeline a multiple of pp."""
        return -(-rows // (self.dp * self.pp * micro_batch)) * self.pp


def stage_layers(config: LlamaConfig, stage: int, stages: int) -> int:
    """Layers of a pipeline stage: L // stages. The remainder goes to the stages after the first,
    one each, because the first has the embedding and the last the output."""
    return config.n_layers // stages + (1 <= stage <= config.n_layers % stages)


def divisors(n: int) -> str:
    """divisors(6) == "1, 2, 3, 6", for messages."""
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def arrange(config: LlamaConfig, rows: int, seq_len: int, world_size: int, local_size: int,
            dp: str, tp: int, pp: int) -> Layout:
    """The layout that --dp, --tp and --pp ask for, of world_size ranks, local_size of them on a
    machine, and steps of so many rows; ValueError with the numbers that would do."""
    shared = {"n_kv_heads": config.n_kv_heads, "hidden_dim": config.hidden_dim,
              "vocab_size": config.vocab_size, "seq_len": seq_len}
    for name, n in shared.items():
        if n % tp:
            raise ValueError(f"--tp {tp} does not divide {name}={n}; try --tp with one of "
                             f"{divisors(math.gcd(*shared.values()))}")
    if pp > config.n_layers:
        raise ValueError(f"--pp {pp}: the model has {config.n_layers} layers; try --pp with up to "
                         f"{config.n_layers}")
    ways = world_size // (tp * pp)  # data-parallel ranks
    if world_size % (tp * pp):
        raise ValueError(f"{world_size} processes are no multiple of --tp {tp} x --pp {pp}; try "
                         f"--tp and --pp whose product is one of {divisors(world_size)}")
    if ways > rows:
        raise ValueError(f"{ways} data-parallel ranks cannot share the {rows} sequences of a step; "
                         f"try at most {rows * tp * pp} processes, or a larger --batch-tokens")
    if dp == "none" and ways > 1:
        raise ValueError(f"--dp none leaves {ways} x {tp * pp} processes the same work; try --dp "
                         f"ddp or --dp fsdp, or {tp * pp} processes")
    local_ways = max(1, local_size // (tp * pp))  # those on one machine
    shards = {"none": 1, "ddp": 1, "fsdp": ways, "hybrid": math.gcd(local_ways, ways)}[dp]
    return Layout(ways // shards, shards, pp, tp)


# ---------------------------------------------------------------------------------------------
# What a step costs: FLOPs, memory, bytes sent; and what a whole run costs (--plan)

GPUS_PER_NODE = 8
USUAL_MFU = 0.5  # without a pipeline, which idles at times; LLaMA's 65B had 0.48
# From data sheets: bytes of memory, watts, dense bf16 FLOP/s (A100 and H100 as SXM).
GPUS = {"A100": (80e9, 400, 312e12), "A100-40GB": (40e9, 400, 312e12), "H100": (80e9, 700, 989e12),
        "H200": (141e9, 700, 989e12), "RTX 4090": (24e9, 450, 165e12)}


def flops_per_token(config: LlamaConfig, seq_len: int, as_papers: bool = False) -> float:
    """FLOPs of forward and backward: 6 N + 6 L H E T, without the embedding, which is looked up,
    and masked scores. as_papers: 6 N + 12 L H E T, with both (Chowdhery et al. 2022, app. B)."""
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
    a, times = torch.ones(1024, 1024, dtype=dtype), []
    end = time.perf_counter() + 0.15  # seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begin)
    return 2 * 1024**3 / min(times)


def faster_dtype(device: str) -> str:
    """What --dtype auto means: bf16 on GPUs that have it, and on CPUs whose matrix products are
    faster in bf16. Instructions do not tell: a Xeon with AVX-512 but no AMX is slower in bf16."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has = torch.cpu.get_capabilities().get
    if device == "mps" or not (has("avx512_bf16") or has("amx_bf16") or has("bf16")):
        return "fp32"  # no need to measure
    rates = {name: matmul_flops("cpu", DTYPES[name]) for name in ("fp32", "bf16")}
    return max(rates, key=rates.get)


def energy(gpu_hours: float, watts: float) -> tuple[float, float]:
    """(MWh, tons of CO2eq) of a training (LLaMA, section 6): GPUs draw their power limit, the data
    centre 1.1 times that (PUE), and a kWh of the average US grid emits 0.385 kg of CO2eq."""
    mwh = gpu_hours * watts * 1.1 / 1e6
    return mwh, mwh * 0.385


def rank_params(config: LlamaConfig, layout: Layout, place: int, shards: int
                ) -> tuple[int, int, int]:
    """(parameters in layers, parameters outside: embedding, norm, output; tensors in all) on the
    fullest of `shards` ranks of pipeline stage `place`. FSDP cuts rows like torch.chunk: of 97 rows
    the first of 7 ranks has 14."""
    D, head = config.dim, config.head_dim
    q, kv = config.n_heads * head // layout.tp, config.n_kv_heads * head // layout.tp
    hidden, vocab = config.hidden_dim // layout.tp, config.vocab_size // layout.tp
    norm = (D, 1)
    layer = [(q, D), (kv, D), (kv, D), (D, q), (hidden, D), (D, hidden), (hidden, D), norm, norm]
    outside = [(vocab, D)] if place == 0 else []
    if place == layout.pp - 1:
        outside.append(norm)
        if place > 0 or not config.tie_embeddings:
            outside.append((vocab, D))

    def held(matrices: list[tuple[int, int]]) -> int:
        return sum(-(-rows // shards) * columns for rows, columns in matrices)

    layers = stage_layers(config, place, layout.pp)
    return layers * held(layer), held(outside), layers * len(layer) + len(outside)


def layer_saves(run: "Run") -> int:
    """Bytes a token that a layer keeps for its backward: by hand the table of LayerByHand; autograd
    keeps, besides, each norm with and without its weight, silu(a) and swiglu(a, b)."""
    c, size = run.config, DTYPES[run.dtype].itemsize
    H, q, kv = c.n_heads, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    kept = 2 * (c.dim + q + kv + c.hidden_dim)  # numbers in run.dtype
    in_fp32 = H + 2                             # and in fp32
    if run.backward != "manual":
        kept += 4 * c.dim + 2 * c.hidden_dim
        in_fp32 += 2 * c.dim * (size < 4)  # x of the norms
        if run.attention != "fused":  # k and v of each query head; scores and weights of T keys
            kept += 2 * (q - kv) + H * run.seq_len * (size < 4)
            in_fp32 += 2 * H * run.seq_len
    return kept * size + in_fp32 * 4


def rank_memory(run: "Run", rows: int, place: int) -> dict[str, int]:
    """Bytes by what they hold, on a rank of pipeline stage `place`, in a step with micro-batches of
    so many rows. Weights, gradients and AdamW's moments are in fp32."""
    config, layout, t = run.config, run.layout, run.layout.tp
    size = DTYPES[run.dtype].itemsize
    by_hand, sharded = run.backward == "manual", layout.shards > 1
    layers = stage_layers(config, place, layout.pp)
    in_layers, outside, tensors = rank_params(config, layout, place, layout.shards)
    held = in_layers + outside
    whole_layers, outside, _ = rank_params(config, layout, place, 1)  # before FSDP splits them
    layer = whole_layers // layers
    tokens = rows * run.seq_len
    x = tokens * config.dim * size

    saved = tokens * layer_saves(run) // t  # by one layer
    if not by_hand:
        saved += 2 * x * (t - 1) // t  # both gathered inputs whole
        if layout.dp == 1 and size < 4:  # weights in run.dtype, which FSDP makes otherwise
            saved += size * layer
    # 1F1B: the first micro-batch is back after pp - place of them.
    in_flight = layers * min(layout.pp - place, layout.passes(run.rows, rows))
    activations = in_flight * saved
    if run.backward == "recompute":  # the input of each layer, and one layer at a time
        activations = in_flight * x // t + saved
    if by_hand and run.attention == "equation":  # A, dA and their like, of one layer
        activations += 16 * tokens * config.n_heads // t * run.seq_len
    logits = 0
    if place == layout.pp - 1:  # a chunk of them, W cast, a chunk's dW, and dW until it is sharded
        V = config.vocab_size // t
        at_once = min(logit_rows(V, config.dim), tokens)
        logits = (8 + 2 * size) * at_once * V + (2 * size + 4 * sharded) * V * config.dim
    buffers = 2 * x * (t > 1)
    if sharded and layout.pp == 1:  # weights of two layers and those outside, gradients of one
        buffers += size * (outside + 2 * layer) + (size + 4) * max(layer, outside)
    elif sharded:  # in a pipeline all weights, and gradients until the last micro-batch
        buffers += (size + 4) * (whole_layers + outside)
    elif layout.dp > 1:  # all weights
        buffers += size * (whole_layers + outside) + 4 * max(layer, outside)
    learned = int(held * run.learned)
    frozen = held - min(held, learned)
    return {"weights": 4 * (held - frozen) + (size if layout.size == 1 else 4) * frozen,
            "gradients": 4 * learned,
            "AdamW": 8 * learned + 4 * tensors,  # two moments; a count of steps for each tensor
            "activations": activations, "logits": logits, "buffers": buffers}


def rank_traffic(run: "Run", rows: int, place: int) -> dict[str, int]:
    """Bytes that a rank of pipeline stage `place` sends in a step, by dimension of the layout. In a
    ring of s ranks an all-gather or a reduce-scatter of n bytes takes s - 1 turns of n/s bytes:
    each rank sends n (s - 1)/s; an all-reduce is both. Weights travel in run.dtype, gradients in
    fp32."""
    config, layout, t = run.config, run.layout, run.layout.tp
    size = DTYPES[run.dtype].itemsize
    in_layers, outside, _ = rank_params(config, layout, place, layout.shards)
    held = in_layers + outside
    passes = layout.passes(run.rows, rows)
    part = rows * run.seq_len * config.dim * size // t  # of x on one rank

    shards = (size + 4) * held
    if layout.pp == 1:  # for each micro-batch, weights of layers twice; a pipeline: once a step
        shards = passes * (shards + size * in_layers)
    ends = (place == 0) + (place == layout.pp - 1)
    # A layer exchanges x 4 times forward and 4 times backward. By hand, it gathers 2 inputs of
    # products again; recomputing, it does the forward again.
    exchanges = {"manual": 10, "autograd": 8, "recompute": 12}[run.backward]
    exchanges = exchanges * stage_layers(config, place, layout.pp) + 2 * ends
    return {"replicas": 8 * held * (layout.replicas - 1) // layout.replicas,
            "shards": shards * (layout.shards - 1),
            "pp": passes * (2 - ends) * part,  # x to the next stage, dx to the one before
            "tp": passes * exchanges * part * (t - 1)}


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
        if os.path.exists(file):
            for number in re.findall(pattern, Path(file).read_text()):
                limits.append(unit * int(number))
    return min(limits)


def fit_micro_batch(run: "Run", there: float) -> tuple[int, int, dict[str, int], bool]:
    """(rows of a micro-batch, the pipeline stage that needs the most memory, that memory, whether
    it is under 90 % of the bytes that are there: the rest is for what rank_memory leaves out).
    Unless the run says how many rows: up to 8192 tokens, if they fit; in a pipeline few enough for
    4 pp micro-batches a step, so that it idles little. A CPU is as fast with 512 where little
    learns, and so hardly a gradient is added up."""
    most = run.rows // run.layout.dp
    if run.layout.pp > 1:
        most //= 4 * run.layout.pp
    tokens = 512 if run.device == "cpu" and run.learned < 0.1 else 8192
    rows = run.micro_batch or max(1, min(tokens // run.seq_len, most))
    while True:
        needs = [rank_memory(run, rows, place) for place in range(run.layout.pp)]
        totals = [sum(need.values()) for need in needs]
        fullest = totals.index(max(totals))
        fits = totals[fullest] < 0.9 * there
        if fits or run.micro_batch or rows == 1:
            return rows, fullest, needs[fullest], fits
        rows //= 2


def fit(run: "Run") -> "Run":
    """The run with its dtype and a micro-batch that this machine holds. ValueError, before anything
    is allocated, if none fits. roomy: freed memory may be kept for the next allocation, whose gaps
    take up to a third more."""
    auto = run.dtype == "auto"
    if auto:
        run = replace(run, dtype=faster_dtype(run.device))
    there = memory_there(run.device)
    if run.device == "cpu":
        there //= run.local_size
    rows, _, need, fits = fit_micro_batch(run, there)
    total = sum(need.values())
    if not fits and auto and run.dtype == "fp32":
        return fit(replace(run, dtype="bf16"))
    if not fits:
        parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in need.items())
        raise ValueError(f"{run.size} needs about {total / 1e9:.0f} GB a process to train ({parts})"
                         f", and {there / 1e9:.0f} GB are free; try a smaller --size, "
                         f"--micro-batch 1 or --seq-len {run.seq_len // 2}")
    return replace(run, micro_batch=rows, roomy=total < 0.6 * there)


def plan(run: "Run", name: str, mfu: float | None) -> dict:
    """Memory, bytes sent, time and energy of the run on GPUs of that name (`cpu`: machines like
    this one), as --plan prints them. mfu: of the whole step, if it was measured. Memory and bytes
    are those of the rank that needs the most memory. Allocates nothing."""
    if name == "cpu":
        there, watts = memory_there("cpu"), 100  # a guess
        peak = matmul_flops("cpu", DTYPES[run.dtype])
    elif run.dtype == "bf16":
        there, watts, peak = GPUS[name]
    else:
        raise ValueError("only the bf16 FLOP/s of GPUs are known; try --dtype bf16")
    layout, config = run.layout, run.config
    micro_batch, fullest, memory, fits = fit_micro_batch(run, there)
    passes = layout.passes(run.rows, micro_batch)
    bubble = (layout.pp - 1) / passes  # time that a pipeline idles / time that it computes
    if mfu is None:
        mfu = USUAL_MFU / (1 + bubble)
        if run.backward == "recompute":  # the forward twice
            mfu *= 3 / 4
    flops = flops_per_token(config, run.seq_len)
    as_papers = flops_per_token(config, run.seq_len, as_papers=True)
    steps = run.steps or math.ceil(run.recipe.train_tokens / run.recipe.batch_tokens)
    tokens = steps * run.rows * run.seq_len
    speed = mfu * layout.size * peak / flops  # tokens a second
    gpu_hours = layout.size * tokens / speed / 3600
    mwh, tons = energy(gpu_hours, watts)
    return {"size": run.size, "params": config.n_params, "flops_per_token": flops, "gpu": name,
            "gpus": layout.size, **asdict(layout), "micro_batch": micro_batch, "passes": passes,
            "memory": {**memory, "needed": sum(memory.values()), "there": there},
            "fits": "yes" if fits else f"no; try {nearest_that_fits(run, there)}",
            "sent": rank_traffic(run, micro_batch, fullest), "bubble": bubble, "mfu": mfu,
            "mfu_as_papers": mfu * as_papers / flops, "steps": steps, "tokens": tokens,
            "tokens_per_s": speed, "step_s": tokens / steps / speed, "days": tokens / speed / 86400,
            "gpu_hours": gpu_hours, "mwh": mwh, "tco2eq": tons}


def nearest_that_fits(run: "Run", there: float) -> str:
    """What to try where the run's layout does not fit: FSDP, with --tp and --pp doubled or halved
    as few times as possible."""
    splits = list(itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64)))
    splits.sort(key=lambda split: abs(math.log2(split[0] / run.layout.tp))
                + abs(math.log2(split[1] / run.layout.pp)))
    for tp, pp in splits:
        with contextlib.suppress(ValueError):  # there is no such layout
            layout = arrange(run.config, run.rows, run.seq_len, run.layout.size, GPUS_PER_NODE,
                             "fsdp", tp, pp)
            *_, fits = fit_micro_batch(replace(run, layout=layout, micro_batch=None), there)
            if fits:
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
        elif value < 1000:
            lines.append(f"{name:22}{value:,.4g}")
        else:
            lines.append(f"{name:22}{value:,.0f}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# State: torch.distributed.checkpoint's folder, tensors only; everything else is JSON


class SafeUnpickler(pickle.Unpickler):
    """Unpickles a state's metadata with no other classes than it needs: a hostile pickle can run
    nothing. BytesStorageMetadata is not one of them, because what it describes is a pickle too."""
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
            return PurePath  # the folder that it was written to, which is not used
        raise pickle.UnpicklingError(f"its metadata names {module}.{name}")


class SafeReader(dcp.FileSystemReader):
    """Reads one state; its metadata once, by SafeUnpickler."""

    def __init__(self, state: Path):
        super().__init__(state)
        self.metadata = SafeUnpickler(BytesIO((state / ".metadata").read_bytes())).load()

    def read_metadata(self, *args, **kwargs):
        return self.metadata


class Writer(dcp.FileSystemWriter):
    """Writes a state into folder/saving and renames it to folder/step-N when all ranks have
    written: a state is there wholly or not at all. Keeps the last two states up to step N.
    dcp.save calls both methods on rank 0 alone, before and after the ranks write."""

    def __init__(self, folder: Path, facts: dict):
        super().__init__(folder / "saving", per_thread_copy_ahead=0)  # no second copy of a tensor
        self.facts, self.done = facts, folder / f"step-{facts['step']:09d}"

    def prepare_global_plan(self, plans):
        shutil.rmtree(self.path)  # a save that was cut short
        self.path.mkdir()
        return super().prepare_global_plan(plans)

    def finish(self, metadata, results):
        super().finish(metadata, results)
        facts = {**self.facts, "crc32": checksum(self.path, self.facts)}
        (self.path / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        shutil.rmtree(self.done, ignore_errors=True)
        os.replace(self.path, self.done)
        states = sorted(self.done.parent.glob("step-*"))
        kept = states[:states.index(self.done) + 1][-2:]
        for state in set(states) - set(kept):
            shutil.rmtree(state, ignore_errors=True)


def checksum(state: Path, facts: dict) -> int:
    """CRC-32 of the metadata and the facts; the tensors, zip archives, have their own."""
    return zlib.crc32((state / ".metadata").read_bytes() + json.dumps(facts).encode())


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict,
               group: dist.ProcessGroup | None, before: Future | None = None) -> Future:
    """Starts to save the tensors as folder/step-N, where N is facts["step"], after the save
    `before`. A thread writes a copy while training goes on; without memory for a copy, training
    waits. result() of the Future raises OSError on every rank if one could not write. group: of all
    ranks, for the thread's collectives alone."""
    def write() -> None:
        try:
            dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
        except (OSError, dcp.api.CheckpointException) as error:
            if group is None or dist.get_rank() == 0:
                shutil.rmtree(writer.path, ignore_errors=True)
            raise OSError(f"the state of step {facts['step']} could not be written "
                          f"({cause_of(error)}); older states are untouched; try to free space, "
                          "then the same command") from None

    if before:
        before.result()
    writer = Writer(folder, facts)
    size = sum(local_shard(x).nbytes for x in tensors.values())
    size *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # all ranks of this machine copy
    roomy = memory_there("cpu") > 2 * size
    if roomy:
        tensors = writer.stage(tensors)
    saving = ThreadPoolExecutor(1).submit(write)
    if not roomy:
        saving.result()
    return saving


def load_state(folder: Path, tensors: dict[str, Tensor]) -> dict | None:
    """Fills the tensors from the newest state that every rank can read, whatever layout saved it,
    and returns its facts; None without any state. Names damaged states and passes over them."""
    states = together(lambda: sorted(folder.glob("step-*")))
    for state in reversed(states):
        try:
            return of_all_ranks(partial(read_state, state, tensors))[0]
        except ValueError as error:
            print_rank0(f"{state} is damaged and passed over: {error}")
    if states:
        raise ValueError(f"no state in {folder} is good; try --fresh to start over")
    return None


def read_state(state: Path, tensors: dict[str, Tensor]) -> dict:
    """Fills the tensors and returns the facts; ValueError if a byte is not as it was written. Each
    tensor is stored as a zip archive (torch.save) with a CRC-32, which torch ignores and Python's
    zipfile checks. Each rank checks every world_size-th archive."""
    rank, world_size = 0, 1
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    try:
        facts = json.loads((state / "facts.json").read_text(encoding="utf-8"))
        if facts.pop("crc32") != checksum(state, facts):
            raise ValueError("facts.json or .metadata is not what was written")
        reader = SafeReader(state)
        for part in list(reader.metadata.storage_data.values())[rank::world_size]:
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
    """The last line of the first failed rank's message. Raises KeyboardInterrupt: no damage."""
    while isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, KeyboardInterrupt):
        raise error
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


def export_state(state: Path, run: "Run") -> None:
    """Writes the weights of a state (step-N), and those that did not learn, in Meta's format; reads
    one tensor at a time. A LoRA is merged; an adapter or a score head is written beside it too."""
    reader, learned = SafeReader(state), {}

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        tensors = {f"model.{name}": torch.empty(shape)}
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        return tensors[f"model.{name}"]

    for name, entry in reader.metadata.state_dict_metadata.items():
        if name.startswith("model."):
            name, shape = name.removeprefix("model."), tuple(entry.size)
            learned[name] = Weight(shape, torch.float32, (), partial(read, name, shape))
    weights = start_weights(run) | {name: learned[name] for name in shapes(run.config)
                                    if name in learned}
    if run.tune == "lora":
        weights = merge_lora(weights, learned, run.lora_alpha / run.lora_rank)
    write_meta(run.config, weights, run.out)
    if run.tune in ("lora", "adapter"):
        write_adapter(run.config, adapter_settings(run), learned, run.out)
    if "score" in learned:
        score = {"score": learned["score"]}
        write_aside(run.out / "score.safetensors", lambda file: write_safetensors(file, score))


def adapter_settings(run: "Run") -> dict:
    """What adapter_config.json says, in peft's words."""
    if run.tune == "adapter":
        layers = min(run.adapter_layers, run.config.n_layers)
        return {"peft_type": "ADAPTION_PROMPT", "adapter_len": run.adapter_length,
                "adapter_layers": layers, "base_model_name_or_path": run.start}
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": run.lora_rank,
            "lora_alpha": run.lora_alpha, "lora_dropout": 0.0, "bias": "none",
            "target_modules": [PEFT_TARGETS[name] for name in run.lora_targets],
            "base_model_name_or_path": run.start}


def state_tensors(parameters: dict[str, Tensor], optimizer) -> dict[str, Tensor]:
    """The tensors that training resumes from: weights, AdamW's moments and step counts, by name."""
    state = {}
    for name, p in parameters.items():
        state[f"model.{name}"] = p.detach()
        for key, value in optimizer.state[p].items():
            state[f"{key}.{name}"] = value
    return state


# ---------------------------------------------------------------------------------------------
# Many processes: how they start, and how a run survives the death of one
#
# torchrun, and `start` on one machine, tell each process (rank) its place in its environment: RANK
# of WORLD_SIZE, LOCAL_RANK of LOCAL_WORLD_SIZE on its machine, MASTER_ADDR and MASTER_PORT of the
# store where ranks meet, TORCHELASTIC_RESTART_COUNT. `start` adds PARENT_PID, its own process.

# Sent by Ctrl-C, the system, a dropped ssh, SLURM; Windows has two of them.
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
         if hasattr(signal, name)]


class World(NamedTuple):
    """Where this process is among all."""
    rank: int
    size: int        # processes in all
    local_size: int  # processes on this machine


def print_rank0(text: str) -> None:
    """Prints on stderr, on rank 0 alone."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def join(device: str, timeout: float) -> Iterator[World]:
    """Makes this process one of the ranks that torchrun or `start` launched; without them it is the
    only one. A collective that waits `timeout` seconds raises an error."""
    env = os.environ
    size = int(env.get("WORLD_SIZE", 1))
    world = World(int(env.get("RANK", 0)), size, int(env.get("LOCAL_WORLD_SIZE", size)))
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
    except (ValueError, OSError):  # a user's mistake: all ranks raise it, rank 0 prints it
        if world.rank > 0:
            time.sleep(5)
        dist.destroy_process_group()  # gloo's threads may not outlive Python
        raise
    except Exception:  # perhaps a rank died; its launcher, which names it, then kills this one too
        time.sleep(5)
        raise


def end_with_parent(parent: int) -> None:
    """Kills this rank and its children when `start` is gone: then it gets another parent."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def patient_group() -> dist.ProcessGroup | None:
    """A group of all ranks, if there are several, whose collectives may wait longer than --timeout:
    while rank 0 prepares text, or for a slow disk."""
    if dist.is_initialized():
        return dist.new_group(backend="gloo", timeout=timedelta(days=7))
    return None


def of_all_ranks(work: Callable) -> list:
    """What work() gives on each rank, on all ranks, or the first ValueError or OSError of any."""
    group, result, error = patient_group(), None, None
    if group is None:
        return [work()]
    try:
        result = work()
    except (ValueError, OSError) as caught:
        error = caught
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, (result, error), group)
    for _, error in found:
        if error is not None:
            raise error
    return [result for result, _ in found]


def together(work: Callable):
    """What work() gives on rank 0, which alone does it, on all ranks, or its error."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    return of_all_ranks(work if first else lambda: None)[0]


def start(n: int, command: list[str], states: Path) -> int:
    """Runs the command as n ranks on this machine (Linux, macOS) and returns its exit status. When
    a rank dies, all start again from the newest state, unless there is no newer one than at the
    death before. A user's mistake (status 2) or a stop by a signal (over 128) ends the run."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Which signals start_processes turns into a SignalException; those that nohup ignores stay so.
    handled = [number.name for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(handled)
    newest_before = None
    for restarts in itertools.count():
        try:
            rank, status = run_ranks(n, command, restarts)
        except SignalException as stop:
            return 128 + stop.sigval
        if status in (0, 2) or status > 128:
            return status
        cause = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        newest = max(states.glob("step-*"), default=None)
        if restarts and newest == newest_before:
            print_rank0(f"error: rank {rank} {cause}, again before a new state was saved; try "
                        "--save-every with fewer steps, then the same command, which goes on")
            return 1
        print_rank0(f"rank {rank} {cause}; going on from the last good state")
        newest_before = newest


def run_ranks(n: int, command: list[str], restarts: int) -> tuple[int, int]:
    """Starts the ranks and waits until one fails or all have ended: (that rank, its exit status, or
    minus the signal that killed it). Each rank has a session of its own, so that Ctrl-C in a
    terminal reaches this process alone, which passes it on once."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": store.port, "TORCHELASTIC_RESTART_COUNT": restarts,
              "TORCHELASTIC_USE_AGENT_STORE": True,  # this store; rank 0 shall not make one
              "PARENT_PID": os.getpid()}
    common, envs = {name: str(value) for name, value in common.items()}, {}
    for rank in range(n):
        envs[rank] = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    args = dict.fromkeys(range(n), tuple(command[1:]))
    with tempfile.TemporaryDirectory() as logs:
        ranks = start_processes("train", command[0], args, envs, DefaultLogsSpecs(logs))
        processes = [handler.proc for handler in ranks.subprocess_handlers.values()]
        try:
            while True:  # ranks.wait() would end all when the first has stopped, while others save
                statuses = [process.poll() for process in processes]
                failed = [status for status in statuses if status and status <= 128]
                if failed:  # killed (negative) rather than ended by an error: more likely the cause
                    return statuses.index(min(failed)), min(failed)
                if None not in statuses:
                    return statuses.index(max(statuses)), max(statuses)
                time.sleep(0.05)
        except SignalException as stop:
            with contextlib.suppress(SignalException):  # a second signal: do not wait for states
                ranks.close(stop.sigval, timeout=600)
            raise
        finally:
            ranks.close(signal.SIGKILL)


def replicas_agree(tensors: dict[str, Tensor]) -> None:
    """Ends all ranks with status 1 if a tensor that several ranks hold is not bit for bit the same:
    a device computed wrongly. Called before a save, so that the last state stays good. Compares one
    checksum for each tensor: the exclusive or of its elements, which any one wrong bit changes."""
    if not dist.is_initialized():
        return
    wrong = set()
    for name, tensor in tensors.items():
        for dim, placement in enumerate(getattr(tensor, "placements", ())):
            if placement.is_replicate():
                mine = torch.hash_tensor(tensor.to_local()).view(torch.int64)
                extremes = torch.stack([mine, ~mine])  # ~ reverses the order: max and min
                dist.all_reduce(extremes, dist.ReduceOp.MAX, tensor.device_mesh.get_group(dim))
                if extremes[0] != ~extremes[1]:
                    wrong.add(name)
    wrong_anywhere = [None] * dist.get_world_size()
    dist.all_gather_object(wrong_anywhere, wrong)
    wrong = sorted(set().union(*wrong_anywhere))
    if wrong:
        print_rank0(f"error: the copies of {wrong[0]} on several ranks differ ({len(wrong)} such "
                    "tensors): a memory or processor failed in silence; nothing was saved since")
        dist.barrier()
        sys.exit(1)


class Stopper:
    """Catches the signals STOPS, except those that nohup ignores: the run ends after the current
    step, with a state. The same signal again kills at once. `signal`: its number, 0 before."""

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


class Objective(NamedTuple):
    """What is learned. The engine divides the sums of all micro-batches by the count of the whole
    step, so that the loss does not depend on how rows are split."""
    loss: Callable[[Llama, dict[str, Tensor]], Tensor]  # the SUM over a micro-batch
    count: Callable[[dict[str, Tensor]], int]           # of what the loss is the mean
    hits: Callable | None = None                        # how many pairs are ordered rightly


def n_targets(batch: dict[str, Tensor]) -> int:
    return int((batch["targets"] >= 0).sum())


def n_pairs(batch: dict[str, Tensor]) -> int:
    return int((batch["begins"] > 0).sum()) // 2


def next_token_loss(model: Llama, batch: dict[str, Tensor]) -> Tensor:
    """Section 2, and SFT, where answers alone have targets: negative log-likelihood of the next
    token, in nats."""
    h, targets = model.hidden(batch["tokens"], boundaries=document_starts(batch)), batch["targets"]
    if model.tp.size == 1:  # no logits where nothing is learned
        h, targets = h[targets >= 0], targets[targets >= 0]
        # Few different sizes: for each, the CPU's bf16 products keep memory.
        missing = -len(targets) % 64
        h, targets = F.pad(h, (0, 0, 0, missing)), F.pad(targets, (0, missing), value=-1)
    return model.loss_of(h, targets, reduction="sum")


def text_sums(x: Tensor, begins: Tensor) -> Tensor:
    """Sums of x (N, T) over each text, of which begins (N, T) marks the first token: (texts,)."""
    begins = begins.flatten() > 0
    text = (begins.cumsum(0) - 1).clamp(min=0)
    sums = x.new_zeros(int(begins.sum()))
    return sums.index_add(0, text, x.flatten()) if len(sums) else sums


def pair_rewards(model: Llama, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The reward model's r of the chosen and the rejected text of each pair, two of (pairs,). It is
    read at the last token of each text, where the target is 1 (chosen) or 0."""
    h = model.hidden(batch["tokens"], boundaries=document_starts(batch))
    rewards = model.rewards_of(h, batch["tokens"].shape)
    return rewards[batch["targets"] == 1], rewards[batch["targets"] == 0]


def reward_loss(model: Llama, batch: dict[str, Tensor]) -> Tensor:
    """Llama 2, equation 2: -log sigmoid(r_c - r_r - m), the margin m by how much better the chosen
    text was rated."""
    chosen, rejected = pair_rewards(model, batch)
    return -F.logsigmoid(chosen - rejected - batch["margin"][batch["targets"] == 1]).sum()


def reward_hits(model: Llama, batch: dict[str, Tensor]) -> Tensor:
    chosen, rejected = pair_rewards(model, batch)
    return (chosen > rejected).sum()


def answer_nll(model: Llama, batch: dict[str, Tensor]) -> Tensor:
    """-log pi of each target, (N, T)."""
    h = model.hidden(batch["tokens"], boundaries=document_starts(batch))
    return model.nll_of(h, batch["targets"])


def implicit_rewards(model: Llama, batch: dict[str, Tensor], beta: float
                     ) -> tuple[Tensor, Tensor, Tensor]:
    """DPO's rewards (Rafailov et al. 2023), beta (log pi(y|x) - log pi_ref(y|x)), of the chosen and
    of the rejected text of each pair, summed over the answer's tokens; and -log pi of the chosen
    ones, as means over their tokens: three of (pairs,)."""
    nll = text_sums(answer_nll(model, batch), batch["begins"])
    reference = batch["reference"][batch["begins"] > 0]
    n = text_sums((batch["targets"] >= 0).float(), batch["begins"])
    rewards = beta * (-nll - reference)
    return rewards[0::2], rewards[1::2], nll[0::2] / n[0::2]


def dpo_loss(model: Llama, batch: dict[str, Tensor], beta: float, nll: float) -> Tensor:
    """-log sigmoid(r_c - r_r) with the implicit rewards, and Llama 3's term, nll times the negative
    log-likelihood of the chosen answer (section 4.1.4: 0.2), a mean over its tokens."""
    chosen, rejected, nll_chosen = implicit_rewards(model, batch, beta)
    return (nll * nll_chosen - F.logsigmoid(chosen - rejected)).sum()


def dpo_hits(model: Llama, batch: dict[str, Tensor], beta: float) -> Tensor:
    chosen, rejected, _ = implicit_rewards(model, batch, beta)
    return (chosen > rejected).sum()


def whiten(x: Tensor, mask: Tensor, shift: bool = True) -> Tensor:
    """x (n, T) with variance 1, and without `shift` its own mean, over the places of the mask."""
    n = mask.sum()
    mean = (x * mask).sum() / n
    variance = ((x - mean).square() * mask).sum() / (n - 1).clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return white if shift else white + mean


def token_rewards(scores: Tensor, logp: Tensor, reference: Tensor, mask: Tensor, beta: float
                  ) -> Tensor:
    """The reward of each token of an answer, (n, T): -beta (log pi - log pi_ref), and at the last
    one the answer's score (n,) too. Over many answers log pi - log pi_ref is on average their KL
    divergence. mask: which are tokens of an answer."""
    rewards = -beta * (logp - reference) * mask
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return rewards.index_put((torch.arange(len(scores)), last), scores, accumulate=True)


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
               ) -> tuple[Tensor, Tensor]:
    """Generalised advantages (Schulman et al. 2016) and returns, two of (n, T), from the last token
    of each answer to its first:

        d_t = r_t + gamma V_(t+1) - V_t     A_t = d_t + gamma lam A_(t+1)     R_t = A_t + V_t
    """
    values, A = values * mask, torch.zeros_like(values)
    after, V_after = torch.zeros(len(values)), torch.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * V_after - values[:, t]
        after = delta + gamma * lam * after
        A[:, t], V_after = after, values[:, t]
    return whiten(A, mask), A + values


def ppo_losses(logp: Tensor, values: Tensor, batch: dict[str, Tensor], clip: float = 0.2
               ) -> tuple[Tensor, Tensor]:
    """The clipped losses of policy and value (Schulman et al. 2017), each like logp:

        -min( rho A, clip(rho, 1 - c, 1 + c) A ),   rho = pi / pi_old
        max( (V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2 ) / 2
    """
    rho, A = (logp - batch["old_logp"]).exp(), batch["advantages"]
    policy = -torch.minimum(rho * A, rho.clamp(1 - clip, 1 + clip) * A)
    near = values.clamp(batch["old_values"] - clip, batch["old_values"] + clip)
    value = torch.maximum((values - batch["returns"]).square(), (near - batch["returns"]).square())
    return policy, value / 2


def policy_and_values(model: Llama, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log pi of each target and the score head's value before it, two of (N, T)."""
    h = model.hidden(batch["tokens"])
    return -model.nll_of(h, batch["targets"]), model.rewards_of(h, batch["tokens"].shape)


def ppo_loss(model: Llama, batch: dict[str, Tensor]) -> Tensor:
    """Policy loss + 0.1 value loss over the answers' tokens."""
    policy, value = ppo_losses(*policy_and_values(model, batch), batch)
    return ((policy + 0.1 * value) * (batch["targets"] >= 0)).sum()


def gather(model: Llama) -> None:
    """Reads a token, for which FSDP gathers the weights: while texts are written, in torch's
    inference_mode, it cannot. With --dp ddp they stay until the next backward."""
    with torch.no_grad():
        model.hidden(torch.zeros(1, 1, dtype=torch.long, device=model.tok_embeddings.weight.device))


class Prompts:
    """The questions of the data, and answers to them that the model gives while it learns: PPO's
    batches. Iteration s asks questions s n to s n + n, over and over."""

    def __init__(self, run: "Run", tokenizer: Tokenizer):
        self.run, self.tokenizer, self.rows = run, tokenizer, run.rows
        self.ids = []
        for path, _ in run.data:
            for row in data_rows(path):
                chat, messages = conversation(row, chat_of(run, tokenizer))
                question = next(text for role, text in messages if role == "user")
                ids = turn(tokenizer, chat, question)
                if len(ids) >= run.seq_len:
                    raise ValueError(f"a question of {len(ids)} tokens leaves no room for an "
                                     f"answer in --seq-len {run.seq_len}; try a larger one")
                self.ids.append((question, ids))
        self.reference = load(run.reference or run.start, run.device, DTYPES[run.dtype])
        self.reward = reward_source(run.reward)

    @torch.no_grad()
    def answer(self, model: Llama, step: int, rank: int, ranks: int) -> dict[str, Tensor]:
        """Sampled answers to this rank's share of the questions, every ranks-th, (n / ranks, T),
        with their scores, the model's log pi and values, and the reference's log pi."""
        run, n = self.run, self.rows
        asked = [self.ids[(step * n + i) % len(self.ids)] for i in range(n)]
        room = run.seq_len - max(len(ids) for _, ids in asked)
        samples = [Sample(self.tokenizer, *asked[i], i) for i in range(rank, n, ranks)]
        sampling = Sampling(1.0, 0, 1.0, f"{run.seed}/{step}", self.tokenizer.vocab_size)
        gather(model)
        grow(samples, model, room, sampling)
        scores = [self.reward(sample.prompt, sample.text) for sample in samples]
        tokens = torch.zeros(len(samples), run.seq_len, dtype=torch.long)
        targets = torch.full_like(tokens, -1)
        for row, sample in enumerate(samples):
            begin, text = len(sample.prompt_ids), sample.prompt_ids + sample.ids
            if sample.stop_id is not None:
                text.append(sample.stop_id)
            text = torch.tensor(text)
            tokens[row, :len(text)] = text
            targets[row, begin - 1:len(text) - 1] = text[begin:]
        batch = {"tokens": tokens.to(run.device), "targets": targets.to(run.device)}
        logp, values = policy_and_values(model, batch)
        reference = -self.reference.nll_of(self.reference.hidden(batch["tokens"]), batch["targets"])
        found = {**batch, "old_logp": logp, "old_values": values, "reference": reference,
                 "scores": torch.tensor(scores)}
        return {name: x.cpu() for name, x in found.items()}

    def rollout(self, engine: "Engine", step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What ppo_loss asks for, of all ranks' answers, (n, T), and their figures."""
        rank, ranks = engine.dp_rank, engine.layout.dp
        parts = of_all_ranks(lambda: engine.stage.compute(
            lambda model, batch: self.answer(model, step, rank, ranks), {}))
        batch = {}
        for name in parts[0]:  # rank r answered the questions r, r + ranks, r + 2 ranks ...
            x = torch.cat([part[name] for part in parts])
            batch[name] = x[torch.cat([torch.arange(r, self.rows, ranks)
                                       for r in range(ranks)]).argsort()]
        mask, scores = (batch["targets"] >= 0).float(), batch.pop("scores")
        logp, reference = batch["old_logp"], batch.pop("reference")
        white = whiten(scores[None], torch.ones(1, self.rows))[0]
        rewards = token_rewards(white, logp, reference, mask, self.run.beta)
        batch["advantages"], batch["returns"] = advantages(rewards, batch["old_values"], mask)
        kl = ((logp - reference) * mask).sum().item() / self.rows
        return batch, {"reward": scores.mean().item(), "kl": kl}


def ppo_step(engine: "Engine", optimizer, prompts: Prompts, step: int, lr: float, clip: float,
             flag: float) -> tuple[float, float, float, dict[str, float]]:
    """One iteration: answers are sampled, and learned from in eight minibatches, each once (Llama
    2, section 3.2.3: 512 answers, 64 a minibatch). What train_step returns, as means, and figures.
    """
    batch, figures = prompts.rollout(engine, step)
    results = []
    for rows in torch.arange(prompts.rows).chunk(8):
        part = {name: x[rows] for name, x in batch.items()}
        results.append(train_step(engine, optimizer, part, PPO, lr, clip, flag))
    loss, norm, stop = (statistics.fmean(values) for values in zip(*results))
    return loss, norm, stop, figures


def objective_of(run: "Run") -> Objective:
    """The objective that a run learns."""
    if run.objective == "reward":
        return Objective(reward_loss, n_pairs, reward_hits)
    if run.objective == "dpo":
        return Objective(partial(dpo_loss, beta=run.beta, nll=run.nll), n_pairs,
                         partial(dpo_hits, beta=run.beta))
    return PRETRAIN


PRETRAIN, PPO = Objective(next_token_loss, n_targets), Objective(ppo_loss, n_targets)


class Stage(Llama):
    """Stage `index` of `count` of a pipeline: consecutive layers of a Llama, or all of them. The
    first stage has the embedding; the last has the final norm, the output projection and the loss.
    Parameters keep their names of the whole model, so that states fit every layout."""

    def __init__(self, config: LlamaConfig, index: int = 0, count: int = 1, **options):
        super().__init__(config, **options)
        self.first, self.last = index == 0, index == count - 1
        begin = sum(stage_layers(config, before, count) for before in range(index))
        end = begin + stage_layers(config, index, count)
        for i in range(config.n_layers):
            if not begin <= i < end:
                self.layers[i] = None
        tied_output = self.last and config.tie_embeddings
        if not self.first and not tied_output:
            self.tok_embeddings = None
        if not self.last:
            self.norm = self.output = None

    def compute(self, work: Callable, batch: dict[str, Tensor]) -> Tensor:
        """work(self, batch): a method, for share_state to hook its gathering of weights to."""
        return work(self, batch)

    def forward(self, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The stage's part of next_token_loss, called by torch's pipeline. x: the tokens on the
        first stage, elsewhere h of the stage before. Returns h, on the last stage the loss."""
        h = self.embed(x) if self.first else x
        h = self.run_layers(h, batch["targets"].shape[1], document_starts(batch))
        if not self.last:
            return h
        return self.loss_of(self.norm(h), batch["targets"], reduction="sum")


def share_layers(stage: Stage, mesh) -> None:
    """Tensor parallelism: makes each parameter a DTensor over the mesh. Wq, Wk, Wv, W1, W3,
    embedding and output are split by rows (heads, hidden units, tokens of the vocabulary), Wo and
    W2 by columns; norms are replicated. The stage is still on meta, so nothing is copied."""
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
    layer: weights are gathered in the stage's dtype, the next layer's while one computes; gradients
    are summed in fp32. With one shard this is DDP: there is nothing to gather."""
    from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                        register_fsdp_forward_method)
    dims = ("replicas", "shards") if layout.replicas > 1 else ("shards",)
    policy = MixedPrecisionPolicy(stage.dtype, torch.float32, cast_forward_inputs=False)
    # Gathered weights are freed after the forward. Not in DDP, where no memory would be saved; nor
    # in a pipeline, which would gather them again for each micro-batch.
    reshard = layout.shards > 1 and layout.pp == 1
    shard = partial(fully_shard, mesh=mesh[dims], mp_policy=policy)
    for layer in stage.layers:
        if layer is not None:
            shard(layer, reshard_after_forward=reshard)
    shard(stage)
    register_fsdp_forward_method(stage, "compute")


def start_weights(run: "Run") -> dict[str, Weight]:
    """The weights of the checkpoint that the run begins from, with rows for a larger vocabulary."""
    if not run.start:
        return {}
    _, weights = open_checkpoint(run.start)
    for name in ("tok_embeddings.weight", "output.weight"):
        if name in weights and weights[name].shape[0] < run.config.vocab_size:
            weights[name] = with_rows(weights[name], run.config.vocab_size)
    return weights


class Engine:
    """This rank's part of the model, and the forward and backward of its part of a batch."""

    def __init__(self, run: "Run"):
        """run.compile: torch.compile fuses what a layer does between its matrix products."""
        self.config, self.layout, self.device = run.config, run.layout, run.device
        self.micro_batch, self.compiled = run.micro_batch, run.compile
        self.dp_rank = self.pp_rank = 0
        layout, tp = run.layout, TensorParallel()
        if run.compile:
            check_compiler()
        if layout.size > 1:
            dims = asdict(layout)
            self.mesh = dist.init_device_mesh(run.device, tuple(dims.values()),
                                              mesh_dim_names=tuple(dims))
            replica, shard, self.pp_rank, _ = self.mesh.get_coordinate()
            self.dp_rank = replica * layout.shards + shard
            if layout.tp > 1:
                tp = TensorParallel(self.mesh.get_group("tp"))
        dtype = None if run.dtype == "fp32" else DTYPES[run.dtype]
        with torch.device("meta"):
            self.stage = Stage(run.config, self.pp_rank, layout.pp, attention=run.attention,
                               backward=run.backward, dtype=dtype, tp=tp)
            prepare_tuning(self.stage, run)
        for layer in self.stage.layers:
            if run.compile and layer is not None:
                layer.compile()
        if layout.tp > 1:
            share_layers(self.stage, self.mesh["tp"])
        if layout.dp > 1:
            share_state(self.stage, layout, self.mesh)
        for p in self.stage.parameters():
            if not p.requires_grad and layout.size == 1 and dtype:
                p.data = p.data.to(dtype)  # what does not learn needs no more digits
        self.stage.to_empty(device=run.device)
        # FSDP replaces the stage's parameters while they are gathered; these are the shards.
        self.parameters = {name: p for name, p in self.stage.named_parameters() if p.requires_grad}
        self.begin(run)
        self.schedules = {}  # number of micro-batches -> the pipeline's schedule

    @torch.no_grad()
    def begin(self, run: "Run") -> None:
        """Fills the weights: those of the checkpoint that the run begins from, the others anew."""
        weights = start_weights(run)
        self.stage.init_weights(run.seed, weights)
        for name, p in self.stage.named_parameters():
            if name in weights:
                shard = local_shard(p)
                whole = weights[name].read(dtype=p.dtype)
                mine = tuple(slice(begin, begin + size)
                             for begin, size in zip(shard_offset(p), shard.shape))
                shard.copy_(whole[mine])

    def rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows of a batch that this rank computes. The batch is padded with rows without
        targets (-1), because ranks compute equally many rows, in a pipeline whole micro-batches."""
        count = len(batch["targets"])
        each = -(-count // self.layout.dp)
        if self.layout.pp > 1:
            each = self.layout.passes(count, self.micro_batch) * self.micro_batch
        rows = {}
        for name, x in batch.items():
            missing = each * self.layout.dp - count
            x = F.pad(x, (0, 0, 0, missing), value=-(name == "targets"))
            rows[name] = x[self.dp_rank * each:][:each].to(self.device)
        return rows

    def loss(self, batch: dict[str, Tensor], objective: Objective, train: bool) -> float:
        """This rank's share of a batch's loss; the sum of all ranks' shares is the mean over
        all that the objective counts. train: adds the gradient to .grad. A pipeline knows
        PRETRAIN alone."""
        rows = self.rows(batch)
        count = max(1, objective.count(batch))
        scale = self.layout.dp / count  # because FSDP averages gradients over data-parallel ranks
        stance = contextlib.nullcontext()
        if self.compiled and not train:  # evaluations have more shapes than are worth compiling
            stance = torch.compiler.set_stance("force_eager")
        with torch.set_grad_enabled(train), stance:
            if self.layout.pp > 1:
                total = self.run_pipeline(rows, scale, train)
            else:
                total = 0.0
                starts = range(0, len(rows["targets"]), self.micro_batch)
                for i in starts:
                    micro_batch = {name: x[i:i + self.micro_batch] for name, x in rows.items()}
                    if self.layout.replicas > 1:  # all-reduce gradients once a step
                        self.stage.set_requires_all_reduce(i == starts[-1])
                    loss = self.stage.compute(objective.loss, micro_batch)
                    if train:
                        (loss * scale).backward()
                    total += loss.item()
        if train:
            self.complete()
        return total / (count * self.layout.tp)  # every tensor parallel rank has the same total

    def run_pipeline(self, rows: dict[str, Tensor], scale: float, train: bool) -> float:
        """The sum of next_token_loss over the rows, on the last stage; 0 on others. In 1F1B
        (Narayanan et al. 2021) a micro-batch's backward follows its forward at once, so that a rank
        keeps the activations of at most pp micro-batches."""
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B
        count = len(rows["targets"]) // self.micro_batch
        if count not in self.schedules:
            stage = PipelineStage(self.stage, self.pp_rank, self.layout.pp,
                                  torch.device(self.device), group=self.mesh.get_group("pp"))
            self.schedules[count] = Schedule1F1B(
                stage, count, loss_fn=lambda loss, scale: loss * scale[0], scale_grads=False)
        losses, options = [], {}
        inputs = [rows["tokens"]] if self.stage.first else []
        if self.stage.last:  # torch splits `target` by micro-batch and passes it to loss_fn
            options = {"target": torch.full((count,), scale), "losses": losses}
        schedule = self.schedules[count]
        compute = schedule.step if train else schedule.eval
        compute(*inputs, batch=rows, return_outputs=False, **options)
        return sum(loss.item() for loss in losses) / scale

    def gradients(self) -> list[Tensor]:
        """This rank's shard of every gradient."""
        return [local_shard(p.grad) for p in self.parameters.values() if p.grad is not None]

    def complete(self) -> None:
        """Adds the parts of gradients that other ranks computed. With tensor parallelism the weight
        of a norm meets this rank's tokens alone; in a pipeline a tied embedding has a gradient on
        the first stage, from the input, and one on the last, from the output."""
        if self.layout.tp > 1:
            norms = [grad for grad in self.gradients() if grad.dim() == 1]
            sums = torch.cat(norms)
            dist.all_reduce(sums, group=self.mesh.get_group("tp"))
            torch._foreach_copy_(norms, sums.split([len(norm) for norm in norms]))
        embedding = self.stage.tok_embeddings
        if self.layout.pp > 1 and self.config.tie_embeddings and embedding is not None:
            mine = local_shard(embedding.weight.grad)
            theirs = torch.empty_like(mine)
            peer = self.layout.pp - 1 if self.stage.first else 0
            swap = partial(dist.P2POp, group=self.mesh.get_group("pp"), group_peer=peer)
            for work in dist.batch_isend_irecv([swap(dist.isend, mine), swap(dist.irecv, theirs)]):
                work.wait()
            mine += theirs

    def squared_norm(self) -> float:
        """This rank's share of the gradient's squared norm; all shares add up to it. Ranks with
        copies divide by their number: replicas for all weights, tensor parallel ranks for norms."""
        grads, copies = [], []
        for name, p in self.parameters.items():
            counted = name == "tok_embeddings.weight" and not self.stage.first  # on the first stage
            if p.grad is not None and not counted:
                grads.append(local_shard(p.grad))
                copies.append(self.layout.replicas * self.layout.tp ** (p.dim() == 1))
        squares = torch.stack(torch._foreach_norm(grads)).double().square().cpu()
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
    """One step: (loss, norm of the gradient, sum of all ranks' flags, which tells all ranks if one
    shall stop). The loss is the mean over the batch's targets; a gradient with a norm over `clip`
    is scaled down to it. If loss or norm is not finite, no rank changes its weights."""
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


def evaluate(engine: Engine, batches: Batches | Examples, objective: Objective, limit: int
             ) -> dict[str, float]:
    """Figures of about `limit` held-out tokens: the loss; of text bits per byte, of pairs the share
    that is ordered rightly."""
    held_out, text_bytes = batches.held_out(limit)
    share, hits, counted = 0.0, 0.0, 0
    for batch in held_out:
        count = objective.count(batch)
        share += count * engine.loss(batch, objective, train=False)
        if objective.hits:
            right = objective._replace(loss=objective.hits)
            hits += count * engine.loss(batch, right, train=False)
        counted += count
    total, hits = engine.add_up(share, hits)
    figures = {"val_loss": total / counted}
    if text_bytes:
        figures["val_bpb"] = total / math.log(2) / text_bytes
    if objective.hits:
        figures["val_accuracy"] = hits / counted
    return figures


def benchmark_scores(run: "Run", engine: Engine, tokenizer: Tokenizer, asked: dict[str, list]
                     ) -> dict[str, float]:
    """The score of each benchmark. Ranks with whole weights share the items out; where weights are
    split, all take all of them, because each layer is gathered by all at once."""
    rank, ranks = engine.dp_rank, engine.layout.dp
    if engine.layout.shards > 1:
        rank, ranks = 0, 1
    settings, scores = EvalSettings(seed=run.seed), {}
    for name, items in asked.items():
        def work(model: Llama, batch: dict[str, Tensor]) -> Tensor:
            scorer = Scorer(model, tokenizer)
            gather(model)
            parts = measure(scorer, name, items[rank::ranks], settings, {})
            return torch.tensor([float(row["right"]) for part in parts for row in part])
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            right = engine.stage.compute(work, {})
        total, count = engine.add_up(right.sum().item(), len(right))
        scores[name] = total / count
    return scores


def add_reference(run: "Run", engine: Engine, examples: Examples) -> None:
    """Gives every pair's texts log pi_ref, computed once with the weights that the run begins from,
    or those of --reference, and kept in a file."""
    path = run.out / "tokens/reference.npy"
    if not together(path.exists):
        if run.reference:
            engine = Engine(replace(run, start=run.reference, tune="all"))
        found = np.zeros(len(examples.arrays["tokens"]), np.float32)
        starts = np.flatnonzero(examples.arrays["begins"])
        print_rank0(f"computing the reference's log-probabilities of {len(starts)} texts")
        for i in range(len(examples.numbers)):
            first, last = examples.offsets[i], examples.offsets[i + 1]
            batch = {name: x.to(run.device) for name, x in examples.batch([[i]]).items()}

            def logprobs(model: Llama, batch: dict[str, Tensor]) -> Tensor:
                return -text_sums(answer_nll(model, batch), batch["begins"])
            with torch.no_grad():
                values = engine.stage.compute(logprobs, batch)
            found[starts[(first <= starts) & (starts < last)]] = values.cpu().numpy()
        together(lambda: write_aside(path, lambda file: np.save(file, found)))
    examples.arrays["reference"] = np.load(path, allow_pickle=False)


# ---------------------------------------------------------------------------------------------
# The run: its settings, and the folder that keeps them


@dataclass(frozen=True)
class Run:
    """Every setting of a run. run.json holds them all, config and recipe by field."""
    size: str
    start: str | None            # --from: the checkpoint to begin from
    config: LlamaConfig
    recipe: Recipe               # with every field filled
    objective: str
    template: str | None         # None: the tokenizer's own
    tune: str                    # what learns
    lora_rank: int
    lora_alpha: float
    lora_targets: list[str]
    adapter_length: int
    adapter_layers: int
    reference: str | None        # None: the model that the run begins from
    reward: list[str] | None     # models or commands, of ppo
    beta: float
    nll: float
    margin: str
    ghost: bool
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
    minutes: float | None        # None: --steps or the recipe sets the steps
    steps: int | None            # None until the speed is measured, with minutes
    epochs: float                # of examples, where neither steps nor minutes are given
    eval: list[str]              # benchmarks, TASK=PATH
    eval_items: int              # of each
    eval_every: int | None       # None: a tenth of the steps, at most 1000
    save_every: int | None       # None: as eval_every
    layout: Layout
    device: str
    local_size: int              # processes on this machine
    micro_batch: int | None      # None until `fit` finds what the memory holds
    learned: float = 1.0         # part of the parameters that learns
    roomy: bool = False          # see `fit`
    threads: int | None = None   # torch's; None where several processes share the cores
    sources: list[dict] | None = None  # from prepare_data; None until the token shards are made
    code: int = zlib.crc32(Path(__file__).with_name("llama.py").read_bytes())

    @property
    def rows(self) -> int:
        """Sequences a step."""
        return self.recipe.batch_tokens // self.seq_len


# Settings that change the result: a resumed run must have the same.
MUST_MATCH = ("size", "start", *LlamaConfig.__dataclass_fields__, *Recipe.__dataclass_fields__,
              "objective", "template", "tune", "lora_rank", "lora_alpha", "lora_targets",
              "adapter_length", "adapter_layers", "reference", "reward", "beta", "nll", "margin",
              "ghost", "data", "mixture", "tokenizer", "seq_len", "seed", "dtype", "attention",
              "backward", "compile")


def setting(text: str) -> tuple[str, object]:
    """A type for argparse: FIELD=VALUE as (field, value); the value as in JSON, or none."""
    name, _, value = text.partition("=")
    return name, json.loads(value.lower().replace("none", "null"))


def shape_of(args) -> tuple[LlamaConfig, Recipe]:
    """The config and recipe of --size, or the config of --from with TUNING, with the changes that
    other options ask for."""
    if args.size not in SIZES:
        raise ValueError(f"there is no size {args.size!r}; try one of {', '.join(SIZES)}")
    config, recipe = SIZES[args.size]
    if args.start:
        config, recipe = open_checkpoint(args.start)[0], TUNING
    changes = asdict(config) | dict(args.set)
    if args.vocab_size:
        changes["vocab_size"] = args.vocab_size
    if args.tokenizer:
        wanted = load_tokenizer(args.tokenizer).vocab_size
        changes["vocab_size"] = max(wanted, config.vocab_size) if args.start else wanted
    recipe, _ = recipe.filled()
    for name in ("lr", "warmup", "batch_tokens", "document_mask", "weight_decay"):
        if getattr(args, name) is not None:
            recipe = replace(recipe, **{name: getattr(args, name)})
    return LlamaConfig.from_dict(changes), recipe


def resolve(args, device: str, world_size: int, local_size: int) -> Run:
    """All settings of a run, from the command line; ValueError for what cannot be."""
    check_objective(args)
    config, recipe = shape_of(args)
    longest = min(config.max_seq_len, recipe.batch_tokens)
    settings = {name: value for name, value in vars(args).items()
                if name in Run.__dataclass_fields__}
    seq_len = args.seq_len or min(longest, 512 if args.start else longest)
    if seq_len > longest:
        raise ValueError(f"--seq-len {seq_len} is over the context, {config.max_seq_len}, or the "
                         f"batch, {recipe.batch_tokens}; try --set max_seq_len=N")
    if args.dtype == "auto" and args.plan:
        settings["dtype"] = faster_dtype(device) if args.gpu == "cpu" else "bf16"
    new_shapes = recipe.document_mask and device == "cpu"
    if args.compile and (args.tp > 1 or new_shapes):
        raise ValueError("--compile cannot see through the exchanges of --tp, and on a CPU would "
                         "compile anew for every document; try --no-document-mask, or without it")
    if args.eval and (args.tp > 1 or args.pp > 1):
        raise ValueError("--eval reads texts with a cache, which --tp and --pp have not; try it on "
                         "the run's folder with generate.py")
    for text in args.eval:
        for name, _ in benchmarks_of(text, judged=False):
            split = world_size > 1 and args.dp != "ddp"
            if TASKS[name].stop and (split or not TASKS[name].same):
                raise ValueError(f"{name} asks for texts: programs are for generate.py "
                                 "--allow-code, others want whole weights; try --dp ddp")
    layout = arrange(config, recipe.batch_tokens // seq_len, seq_len, world_size, local_size,
                     args.dp, args.tp, args.pp)
    out = f"runs/{args.size}"
    if args.start:
        settings["size"] = Path(args.start).name
        out = f"runs/{settings['size']}-{args.objective}"
    elif not args.steps and not args.minutes:
        if args.size == "tiny":
            settings["minutes"] = TINY_MINUTES
        else:
            settings["steps"] = math.ceil(recipe.train_tokens / recipe.batch_tokens)
    if world_size == 1:
        settings["threads"] = torch.get_num_threads()
    settings["out"] = Path(args.out or out)
    run = Run(**settings | {"config": config, "recipe": recipe, "seq_len": seq_len,
                            "layout": layout, "device": device, "local_size": local_size})
    with torch.device("meta"):
        model = Llama(config)
        prepare_tuning(model, run)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return replace(run, learned=learned / config.n_params)


def check_objective(args) -> None:
    """ValueError for options of fine-tuning that do not go together."""
    if args.objective != "pretrain" or args.tune != "all":
        if not args.start:
            raise ValueError(f"--objective {args.objective} and --tune {args.tune} need a model to "
                             "begin from; try --from CHECKPOINT")
        if args.pp > 1 or args.tp > 1 and args.tune != "all":
            raise ValueError("adapters run with --dp ddp or fsdp, other fine-tuning with --tp too; "
                             "try it without --pp, or --tune all")
    if args.objective == "pretrain":
        return
    ranks = max(args.nproc or torch.cuda.device_count(), int(os.environ.get("WORLD_SIZE", 1)))
    if args.objective == "ppo" and (not args.reward or args.tp > 1 or ranks > 1
                                    and args.dp != "ddp"):
        raise ValueError("ppo needs --reward, and whole weights on each rank, because it samples; "
                         "try --reward MODEL_OR_COMMAND, --dp ddp, and no --tp")
    if not args.data or any(weight for _, weight in args.data):
        raise ValueError("fine-tuning needs rows; try --data FILE.json, without a weight")
    if args.minutes:
        raise ValueError("fine-tuning counts epochs; try --epochs or --steps")


def prepare_tuning(model: Llama, run: Run) -> None:
    """Adds what the run's objective and --tune ask for, and freezes what does not learn."""
    if run.tune == "lora":
        add_lora(model, run.lora_rank, run.lora_alpha, run.lora_targets)
    elif run.tune == "adapter":
        add_adapter(model, run.adapter_length, min(run.adapter_layers, run.config.n_layers))
    elif run.tune == "embeddings":
        model.requires_grad_(False)
        for part in (model.tok_embeddings, model.output):
            if part is not None:
                part.requires_grad_(True)
    if run.objective in ("reward", "ppo"):
        add_score(model, freeze_output=run.objective == "reward")


def settings_of(run: Run) -> dict:
    """The content of run.json."""
    values = asdict(run)
    values = {**values.pop("config"), **values.pop("recipe"), **values}
    return json.loads(json.dumps(values, default=str))


def resume(run: Run, old: dict) -> Run:
    """The run with what `old`, its run.json, keeps; ValueError if it would give another result."""
    if run.dtype == "auto":
        run = replace(run, dtype=old.get("dtype", "auto"))
    new = settings_of(run)
    for name in MUST_MATCH:
        if old.get(name, new[name]) != new[name]:  # an older run.json may lack a newer setting
            raise ValueError(f"{run.out} was trained with {name}={old[name]}; "
                             "try --out DIR or --fresh")
    if old.get("code") != run.code:
        print_rank0("warning: llama.py is not what this run began with; its losses may differ")
    kept = {"sources": old["sources"]}
    if run.steps is None and old.get("minutes") == run.minutes:  # --minutes sets them once
        kept["steps"] = old.get("steps")
    if run.micro_batch is None and old.get("layout") == new["layout"]:
        kept["micro_batch"] = old.get("micro_batch")
    if run.threads and old.get("threads"):
        kept["threads"] = old["threads"]
    return replace(run, **kept)


def steps_of_epochs(run: Run) -> int:
    """Steps that read the data --epochs times."""
    rows = run.sources[0].get("packed_rows")
    if run.objective == "pretrain":
        rows = sum(source["train_tokens"] for source in run.sources) / run.seq_len
    return max(1, round(run.epochs * rows / run.rows))


def read_data(run: Run):
    """What write_data takes; ValueError for a mistake in the data. Writes nothing."""
    if run.objective == "pretrain":
        return survey_data(run)
    if run.objective == "ppo":
        return tokenizer_of(run)
    return read_examples(run)


def write_data(run: Run, read) -> list[dict]:
    """Writes the run's tokenizer and tokens; returns what run.json keeps of the data."""
    if run.objective == "pretrain":
        return prepare_data(run, read)
    if run.objective == "ppo":
        read.save(run.out / "tokenizer.model")
        return [{"path": path, "packed_rows": run.rows} for path, _ in run.data]
    return write_examples(run, *read)


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Locks a run's folder; ValueError if another process holds the lock. The system unlocks it
    when this process ends, even if it is killed."""
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


def open_run(run: Run, locks: contextlib.ExitStack) -> Run:
    """Makes the run's folder and prepares its text, or resumes what the folder holds. The lock is
    left to `locks`, so that the caller keeps it until the run ends."""
    file, old, read = run.out / "run.json", {}, None
    if not file.exists() and run.out.exists() and set(os.listdir(run.out)) - {"lock"}:
        raise ValueError(f"{run.out} holds files that are no run's; try another --out")
    run.out.mkdir(parents=True, exist_ok=True)
    if "PARENT_PID" not in os.environ:  # else `start` has locked it
        locks.enter_context(sole_writer(run.out))
    if file.exists() and run.fresh:  # a folder without run.json is not ours to empty
        read = read_data(run)  # a mistake in --data, or too little memory, is found before
        fit(run)
        for folder in ("state", "tokens"):
            shutil.rmtree(run.out / folder, ignore_errors=True)
        for name in ("run.json", "log.jsonl", "loss.svg", "scores.svg", "params.json",
                     "consolidated.00.pth", "tokenizer.model", "tokenizer_config.json",
                     "score.safetensors", "adapter_config.json", "adapter_model.safetensors"):
            (run.out / name).unlink(missing_ok=True)
    elif file.exists():
        try:
            old = read_json(file.read_bytes())
        except ValueError:
            raise ValueError(f"{file} is damaged; try --fresh to start over, or another --out"
                             ) from None
    if old.get("sources"):
        run = resume(run, old)
    run = fit(run)
    write_json(file, settings_of(run))
    if not run.sources:
        run = replace(run, sources=write_data(run, read or read_data(run)))
    if run.steps is None and run.start and not run.minutes:
        run = replace(run, steps=steps_of_epochs(run))
    write_json(file, settings_of(run))
    return run


# ---------------------------------------------------------------------------------------------
# What a run does, and its log


def utilisation(run: Run, tokens_per_s: float, peak: float | None) -> float | None:
    """MFU: the model's FLOP/s / the peak FLOP/s of all devices; None where that is unknown. Of the
    three products of a weight, forward and two of the backward, a frozen one needs two."""
    flops = tokens_per_s * flops_per_token(run.config, run.seq_len) * (2 + run.learned) / 3
    return peak and flops / (peak * run.layout.size)


def timed_steps(run: Run, engine: Engine, count: int) -> tuple[float, float]:
    """(median seconds of `count` steps on random tokens after two that warm up, the last loss)."""
    recipe, times = run.recipe, []
    optimizer = make_optimizer(engine.parameters, recipe)
    random, shape = torch.Generator().manual_seed(0), (run.rows, run.seq_len + 1)
    for _ in range(count + 2):
        tokens = torch.randint(run.config.vocab_size, shape, generator=random)
        batch = next_tokens(tokens, 1 if recipe.document_mask else None)
        begin = time.perf_counter()
        loss, _, _ = train_step(engine, optimizer, batch, PRETRAIN, recipe.lr, recipe.clip)
        times.append(time.perf_counter() - begin)
    total, = engine.add_up(statistics.median(times[2:]))
    return total / run.layout.size, loss


def bench(run: Run, count: int) -> dict:
    """What --bench prints: the speed of `count` steps and the memory that they took."""
    peak = matmul_flops(run.device, DTYPES[run.dtype])
    engine = Engine(run)
    if run.roomy:
        keep_freed_memory()
    step_s, loss = timed_steps(run, engine, count)
    speed = run.rows * run.seq_len / step_s  # tokens a second
    rss = None
    if sys.platform != "win32":
        import resource
        unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {"tokens_per_s": speed, "mfu": utilisation(run, speed, peak) or "unknown",
            "peak_gflops": peak and peak / 1e9, "step_s": step_s, "peak_rss_gb": rss, "loss": loss,
            "params": run.config.n_params, "backward": run.backward, "dtype": run.dtype,
            "world": run.layout.size, "layout": asdict(run.layout)}


def steps_in_time(run: Run, engine: Engine, began: float) -> int:
    """How many steps fit into --minutes at the measured speed, 12 % of them left to evaluations and
    5 seconds to the sample. began: when the process started, by time.perf_counter."""
    step_s, _ = timed_steps(run, engine, 5)
    count = max(5, int(1.2 * run.minutes / step_s))  # measured again in a fiftieth of the time
    step_s, _ = timed_steps(run, engine, count)
    engine.begin(run)
    passed, = engine.add_up(time.perf_counter() - began)
    left = 60 * run.minutes - passed / run.layout.size - 5
    return max(10, int(left / (1.12 * step_s)))


@dataclass(frozen=True)
class Progress:
    """How far a run is; saved with each state."""
    step: int = 0
    skipped: int = 0       # steps whose loss or gradient was not finite
    useful_s: float = 0.0  # seconds that all other steps took


class Log:
    """Writes log.jsonl, one object a line, and shows progress on stderr. Rank 0 alone has one."""

    def __init__(self, run: Run, engine: Engine, began: float, step: int):
        """Keeps the lines of an earlier process up to `step`, as training resumes there. began:
        when this process started, by time.perf_counter."""
        self.run, self.path = run, run.out / "log.jsonl"
        self.rows, self.times = [], []  # of log.jsonl; seconds of this process's steps
        self.shown_at, self.held_out = 0.0, "-"  # time.monotonic; the newest evaluation
        self.peak = matmul_flops(run.device, DTYPES[run.dtype])
        params = sum(local_shard(p).numel() for p in engine.parameters.values())
        self.fixed = {"world": run.layout.size, "rank_params": params,
                      "rank_tokens": -(-run.rows // run.layout.dp) * run.seq_len}
        elapsed_before = 0.0
        self.path.touch()
        for line in self.path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short
                row = json.loads(line)
                elapsed_before = max(elapsed_before, row["elapsed_s"])
                if row["step"] <= step:
                    self.rows.append(row)
        self.began = began - elapsed_before
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_aside(self.path, lambda file: file.write(text.encode()))
        if 0 < step < run.steps:
            self.add({"event": "resume", "step": step, "elapsed_s": self.elapsed()})

    def elapsed(self) -> float:
        """Seconds that the run's processes have run, steps that were lost included."""
        return round(time.perf_counter() - self.began, 3)

    def add(self, row: dict) -> None:
        """Appends a line to log.jsonl."""
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def add_step(self, progress: Progress, seconds: float, figures: dict, facts: dict) -> None:
        """Logs and shows a step that took so many seconds; figures: its loss, lr and so on; facts:
        of its batch."""
        run, step, elapsed = self.run, progress.step, self.elapsed()
        finite = {}
        for name, value in figures.items():  # JSON has no infinity
            finite[name] = value if math.isfinite(value) else None
        tokens = run.rows * run.seq_len
        mfu = utilisation(run, tokens / seconds, self.peak)
        self.add({"step": step, "tokens": step * tokens, **finite, **facts, **self.fixed,
                  "mfu": mfu, "tokens_per_s": round(tokens / seconds, 1),
                  "skipped": progress.skipped, "elapsed_s": elapsed,
                  "useful": round(progress.useful_s / elapsed, 3)})
        self.times.append(seconds)
        if "val_bpb" in figures:
            self.held_out = f"{figures['val_bpb']:.3f} bits/byte"
        elif "val_accuracy" in figures:
            self.held_out = f"{figures['val_loss']:.3f} ({figures['val_accuracy']:.0%} right)"
        elif "val_loss" in figures:
            self.held_out = f"{figures['val_loss']:.3f}"
        left = (run.steps - step) * statistics.median(self.times[-50:])
        self.show(f"step {step}/{run.steps}  loss {figures['loss']:.3f}  held out "
                  f"{self.held_out}  {tokens / seconds:,.0f} tokens/s  MFU "
                  f"{mfu or math.nan:.0%}  {left // 60:.0f}m{left % 60:02.0f}s left  "
                  f"{progress.skipped} skipped", step == run.steps)

    def show(self, text: str, last: bool) -> None:
        """On a terminal overwrites one line at every step; elsewhere a line every ten seconds."""
        if sys.stderr.isatty():
            print(f"\r{text:110}", end="\n" * last, file=sys.stderr, flush=True)
        elif last or time.monotonic() - self.shown_at > 10:
            self.shown_at = time.monotonic()
            print_rank0(text)


def draw_loss(rows: list[dict], path: Path, title: str) -> None:
    """Training loss against tokens, as in the paper's Figure 1, with the held-out loss as dots. The
    line has up to 500 points, each the mean of as many rows; without the steep first 2 %."""
    rows = [row for row in rows if row.get("loss") is not None]
    if not rows:
        return
    held_out = [(row["tokens"], row["val_loss"]) for row in rows if row.get("val_loss")]
    rows = rows[len(rows) // 50:]
    width = -(-len(rows) // 500)
    line = []
    for i in range(0, len(rows), width):
        part = rows[i:i + width]
        line.append((part[-1]["tokens"], statistics.fmean(row["loss"] for row in part)))
    draw({"": line}, held_out, path, title, "loss (nats a token)")


def draw_scores(rows: list[dict], path: Path) -> None:
    """The scores of benchmarks against tokens, as in the paper's Figure 2."""
    lines = {}
    for row in rows:
        for name, score in row.get("scores", {}).items():
            lines.setdefault(name, []).append((row["tokens"], 100 * score))
    if lines:
        draw(lines, [], path, "benchmarks", "right (%)")


COLOURS = "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #7f7f7f #bcbd22 #17becf".split()


def draw(lines: dict[str, list[tuple]], dots: list[tuple], path: Path, title: str, unit: str,
         across: str = "tokens") -> None:
    """A picture of named lines and of dots, of points (tokens, value) or with another x axis."""
    values = [value for line in [*lines.values(), dots] for _, value in line]
    low, high = math.floor(10 * min(values)) / 10, math.ceil(10 * max(values) + 0.01) / 10
    end = max(line[-1][0] for line in lines.values())

    def at(tokens: float, value: float) -> str:
        return f"{70 + 550 * tokens / end:.1f} {350 - 300 * (value - low) / (high - low):.1f}"

    svg = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 400" font-size="13" '
           'font-family="sans-serif" text-anchor="middle"><rect width="640" height="400" '
           f'fill="white"/><text x="345" y="28">{title}</text><text x="345" y="392">{across}</text>'
           f'<text transform="translate(18 200) rotate(-90)">{unit}</text>']
    for i in range(5):  # the grid and its numbers
        value, tokens = low + i * (high - low) / 4, i * end / 4
        svg += [f'<path d="M{at(0, value)}h550" stroke="#ddd"/>',
                f'<text transform="translate({at(0, value)})" x="-22" y="4">{value:.2f}</text>',
                f'<text transform="translate({at(tokens, low)})" y="20">{tokens:,.0f}</text>']
    for (name, line), colour in zip(lines.items(), itertools.cycle(COLOURS)):
        points = " ".join(at(*point) for point in line)
        svg += [f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>',
                f'<text transform="translate({at(*line[-1])})" y="-6" text-anchor="end" '
                f'fill="{colour}">{name}</text>']
    for point in dots:
        svg.append(f'<circle transform="translate({at(*point)})" r="3.5" fill="#d62728"/>')
    text = "\n".join(svg) + "</svg>\n"
    write_aside(path, lambda file: file.write(text.encode()))


def train_run(run: Run, engine: Engine, batches: Batches | Examples, began: float, rank: int,
              benchmarks: Callable[[Engine], dict]) -> tuple["Progress", "Log | None"]:
    """Trains from the newest good state to the last step. benchmarks: the scores of --eval."""
    recipe, objective = with_warmup(run.recipe, run.steps), objective_of(run)
    eval_every = run.eval_every or max(1, min(1000, run.steps // 10))
    save_every, folder = run.save_every or eval_every, run.out / "state"
    optimizer = make_optimizer(engine.parameters, recipe)
    tensors = state_tensors(engine.parameters, optimizer)
    progress = Progress(**(load_state(folder, tensors) or {}))
    log = Log(run, engine, began, progress.step) if rank == 0 else None
    stopper, group, saving = Stopper(), patient_group(), None
    bad_steps = stop = 0
    done = progress.step >= run.steps
    if done:
        print_rank0(f"{run.out} is finished at step {progress.step}; --steps N goes on, --fresh "
                    "starts over")
    while not done and not stop and bad_steps < BAD_STEPS:
        begin = time.perf_counter()
        lr = learning_rate(progress.step, run.steps, recipe)
        facts = {}
        if run.objective == "ppo":
            loss, norm, stop, facts = ppo_step(engine, optimizer, batches, progress.step, lr,
                                               recipe.clip, stopper.signal)
        else:
            loss, norm, stop = train_step(engine, optimizer, batches.step(progress.step),
                                          objective, lr, recipe.clip, stopper.signal)
            facts = batches.facts(progress.step)
        seconds = time.perf_counter() - begin
        finite = math.isfinite(loss + norm)
        bad_steps = 0 if finite else bad_steps + 1
        progress = Progress(progress.step + 1, progress.skipped + (not finite),
                            progress.useful_s + seconds * finite)
        done = progress.step == run.steps
        figures = {"loss": loss, "lr": lr, "grad_norm": norm}
        if done or progress.step % eval_every == 0:
            if run.objective != "ppo":
                figures |= evaluate(engine, batches, objective, held_out_tokens(run, done))
            if run.eval:
                facts = {**facts, "scores": benchmarks(engine)}
        if log:
            log.add_step(progress, seconds, figures, facts)
        save = finite and progress.step % save_every == 0
        if save or done or stop:
            replicas_agree(engine.parameters)
            saving = save_state(folder, tensors, asdict(progress), group, saving)
    if saving:
        saving.result()
    if bad_steps == BAD_STEPS:
        raise ValueError(f"{BAD_STEPS} steps in a row had a loss or gradient that is not finite; "
                         f"the last good state in {folder} is kept; try a lower --lr")
    if stop:  # by a signal to this rank, or to another
        sys.exit(128 + (stopper.signal or signal.SIGTERM))
    stopper.close()
    return progress, log


def held_out_tokens(run: Run, last: bool) -> int:
    """Tokens of an evaluation. One costs a third of one that is trained on. So a tenth of the
    run's takes 3 % of the time: in the last evaluation, and in the ten before together."""
    tenth = run.steps * run.rows * run.seq_len // 10
    return min(FINAL_EVAL_TOKENS, tenth) if last else min(EVAL_TOKENS, tenth // 10)


def finish(run: Run, progress: Progress, log: Log) -> None:
    """Exports the weights in Meta's format and draws the loss."""
    return_freed_memory()
    export_state(run.out / "state" / f"step-{progress.step:09d}", run)
    draw_loss(log.rows, run.out / "loss.svg", f"{run.size}, {run.config.n_params:,} parameters")
    draw_scores(log.rows, run.out / "scores.svg")
    elapsed = log.elapsed()
    print_rank0(f"{progress.useful_s / elapsed:.0%} of {elapsed / 60:.1f} minutes went into "
                "training steps that were kept")


def announce(run: Run, batches: Batches | Examples) -> None:
    """Prints the settings of the run that matter most, and its texts."""
    assumed = [] if run.start else SIZES[run.size][1].filled()[1]
    if assumed:
        print_rank0(f"never published, so from Llama 2 unless given here: {', '.join(assumed)}")
    print_rank0(f"{run.size}: {run.config.n_params:,} parameters, {run.steps} steps of {run.rows} "
                f"x {run.seq_len} tokens in micro-batches of {run.micro_batch}, {run.dtype}, on "
                f"{run.layout.size} x {run.device} ({run.layout})")
    if run.start:
        print_rank0(f"begins from {run.start}; {run.learned:.2%} of the parameters learn")
    for k, source in enumerate(run.sources):
        if run.objective != "pretrain":
            continue
        if source.get("changed") not in (None, latest_change(source["path"])):
            print_rank0(f"warning: {source['path']} changed since it was cut into tokens, and is "
                        "read as it was; try --fresh, or --out DIR, for the new text")
        print_rank0(f"{source['path']}: {source['train_tokens']:,} tokens, read "
                    f"{batches.epochs(k, run.steps):.2f} times")


def sample(run: Run, tokenizer: Tokenizer) -> None:
    """Prints what the trained model writes, if the whole model fits into this device."""
    dtype = DTYPES[run.dtype]
    if run.config.n_params * dtype.itemsize < 0.8 * memory_there(run.device):
        if run.objective != "pretrain":
            return sample_answer(run, tokenizer)
        model = load(run.out, run.device, dtype)
        prompt = "" if run.data or run.mixture else "class"  # the default text is Python
        text = sample_texts(model, tokenizer, [prompt], 120, Sampling(seed=run.seed))[0].text
        print(f"--- a sample of {run.out}\n{prompt}{text}")


def sample_answer(run: Run, tokenizer: Tokenizer) -> None:
    """Prints the model's answer to the first question of the data, in the form of the template."""
    if run.objective == "reward":
        return
    row = next(data_rows(run.data[0][0]))
    chat, messages = conversation(row, chat_of(run, tokenizer))
    question = next(text for role, text in messages if role == "user")
    adapter = run.out if run.tune == "adapter" else None
    model = open_model(run.out, DTYPES[run.dtype], adapter=adapter)
    answer = Sample(tokenizer, "-", turn(tokenizer, chat, question), 0)
    grow([answer], model, 120, Sampling(seed=run.seed))
    print(f"--- a sample of {run.out}\n> {question}\n{answer.text}")


# ---------------------------------------------------------------------------------------------
# Command line


def number(group, flag: str, text: str, kind: type = int, **options) -> None:
    """Adds an option that takes a positive number."""
    group.add_argument(flag, type=positive(kind), metavar="N" if kind is int else "X", help=text,
                       **options)


def parser() -> Parser:
    """The command line. Options that are fields of Run have their names."""
    p = Parser(prog="train.py", description="Trains a Llama from text: tokenizer, weights, sample.")
    several = {"nargs": "+", "default": [], "action": "extend"}

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
    number(g, "--warmup", "steps, or a part of them; a tenth of the run at most", float)
    g.add_argument("--weight-decay", type=float, metavar="X")
    g.add_argument("--seed", type=int, default=0, metavar="N")
    g.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto",
                   help="to compute in; weights stay fp32; auto: the faster one here, as measured")
    g = p.add_argument_group("run")
    g.add_argument("--out", metavar="DIR", help="default: runs/SIZE")
    g.add_argument("--fresh", action="store_true", help="start over: a run in DIR is removed")
    number(g, "--eval-every", "steps")
    g.add_argument("--eval", **several, metavar="TASK=PATH", help="benchmarks, as in generate.py, "
                   "measured at every evaluation")
    number(g, "--eval-items", "the first N of each (default: %(default)s)", default=200)
    number(g, "--save-every", "steps between states")
    number(g, "--bench", "no run: the speed of N steps")
    add_fine_tuning(p.add_argument_group("fine-tuning"))
    add_devices(p.add_argument_group("many devices"))
    add_plan(p.add_argument_group("plan"))
    return p


def add_fine_tuning(g) -> None:
    g.add_argument("--from", dest="start", metavar="CHECKPOINT", help="begin from any checkpoint: "
                   "its shape, weights and tokenizer (a larger --tokenizer adds rows)")
    g.add_argument("--recipe", choices=RECIPES, help="another's settings; options change them")
    g.add_argument("--objective", choices=("pretrain", "sft", "reward", "dpo", "ppo"),
                   default="pretrain", help="sft: answers; reward, dpo: pairs of answers, chosen "
                   "and rejected; ppo: the model's own answers by --reward")
    g.add_argument("--reward", action="append", metavar="MODEL|COMMAND", help="of ppo: a run of "
                   "--objective reward, or a command that reads an answer and prints a number; "
                   "twice: helpfulness, safety (Llama 2)")
    g.add_argument("--template", choices=CHATS, help="how rows are written; default: the model's")
    g.add_argument("--tune", choices=("all", "lora", "adapter", "embeddings"), default="all",
                   help="what learns")
    number(g, "--lora-rank", "default: %(default)s", default=8)
    number(g, "--lora-alpha", "default: %(default)s", float, default=16.0)
    g.add_argument("--lora-targets", type=lambda text: text.split(","), default=list(MATRICES),
                   metavar="NAMES", help=f"default: {','.join(MATRICES)}")
    number(g, "--adapter-length", "vectors of a prompt (default: %(default)s)", default=10)
    number(g, "--adapter-layers", "the last ones (default: %(default)s)", default=30)
    number(g, "--epochs", "of the data", float, default=1.0)
    g.add_argument("--reference", metavar="CHECKPOINT", help="of dpo; default: the one of --from")
    number(g, "--beta", "of dpo, and of the KL term of ppo (default: %(default)s)", float,
           default=0.1)
    g.add_argument("--nll", type=float, default=0.2, metavar="X",
                   help="of dpo: weight of the chosen answers' likelihood (default: %(default)s)")
    g.add_argument("--margin", choices=MARGINS, default="none", help="of reward, by the rating")
    g.add_argument("--ghost", action="store_true", help="sft on the last answer of each row alone")


def add_devices(g) -> None:
    g.add_argument("--dp", choices=("none", "ddp", "fsdp", "hybrid"), default="fsdp",
                   help="ddp repeats the model, fsdp (default) splits it over all ranks, hybrid "
                   "over those of a machine")
    number(g, "--tp", "ranks of one machine that share each layer and its tokens", default=1)
    number(g, "--pp", "ranks that the layers are split over", default=1)
    number(g, "--nproc", "processes on this machine (default: its GPUs, else 1); one that dies is "
           "started again; not under torchrun")
    number(g, "--timeout", "a rank for which others wait X seconds hangs: all start again "
           "(default: %(default)s)", float, default=1800)


def add_plan(g) -> None:
    g.add_argument("--plan", action="store_true", help="no run: what it would take")
    number(g, "--gpus", "default: %(default)s", default=GPUS_PER_NODE)
    g.add_argument("--gpu", choices=(*GPUS, "cpu"), default="H100", help="default: %(default)s; "
                   "cpu: machines like this one")
    number(g, "--mfu", "of the whole step, as measured", float)
    g.add_argument("--json", action="store_true", help="the plan as one JSON object")


def train_rank(args, device: str, world: World, began: float, locks: contextlib.ExitStack) -> None:
    """One process of a run. began: when it started, by time.perf_counter. locks: see open_run."""
    run = resolve(args, device, world.size, world.local_size)
    begin = partial(fit, run) if args.bench else partial(open_run, run, locks)
    run = together(begin)  # rank 0 alone measures and prepares
    if args.bench:
        result = bench(run, args.bench)
        if world.rank == 0:
            print(json.dumps(result))
        return
    if run.threads:
        torch.set_num_threads(run.threads)
    tokenizer = load_tokenizer(run.out / "tokenizer.model")
    bos_id = tokenizer.bos_id if run.recipe.document_mask else None
    if run.objective == "pretrain":
        batches = Batches(run.out / "tokens", run.sources, run.seq_len, run.rows, run.seed, bos_id)
    elif run.objective == "ppo":
        batches = Prompts(run, tokenizer)
    else:
        batches = Examples(run.out / "tokens", run.seq_len, run.rows, run.seed)
    engine = Engine(run)
    if run.roomy:
        keep_freed_memory()  # only now: what loading freed has gone back to the system
    if run.objective == "dpo":
        add_reference(run, engine, batches)
    if run.steps is None:
        run = replace(run, steps=steps_in_time(run, engine, began))
        together(partial(write_json, run.out / "run.json", settings_of(run)))
    announce(run, batches)
    asked = {name: questions(name, path, TASKS[name].shots, run.eval_items)
             for text in run.eval for name, path in benchmarks_of(text, judged=False)}
    scores = partial(benchmark_scores, run, tokenizer=tokenizer, asked=asked)
    trained = train_run(run, engine, batches, began, world.rank, scores)
    del engine, batches
    together(partial(finish, run, *trained))
    if world.rank == 0:
        sample(run, tokenizer)


def main(argv: list[str]) -> int | None:
    """Plans, or trains in this process, or starts one process for each GPU."""
    began, device, options = time.perf_counter(), best_device(), parser()
    args = options.parse_args(argv)
    if args.recipe:
        options.set_defaults(**RECIPES[args.recipe])
        args = options.parse_args(argv)
    if args.json and not args.plan:
        raise ValueError("--json is for --plan; try it without")
    if args.plan:
        run = resolve(args, device, args.gpus, min(args.gpus, GPUS_PER_NODE))
        planned = plan(run, args.gpu, args.mfu)
        print(json.dumps(planned) if args.json else plan_text(planned))
        return None
    is_rank = "RANK" in os.environ  # started by torchrun, or by `start`
    gpus = torch.cuda.device_count()
    n = 1 if is_rank else args.nproc or max(1, gpus)
    if n > 1 and 0 < gpus < n:
        raise ValueError(f"--nproc {n} needs as many GPUs, and here are {gpus}; try --nproc {gpus}")
    if is_rank and args.fresh:
        raise ValueError("a run that torchrun starts again, because of a node that came or went, "
                         "would be lost; try without --fresh, or another --out")
    if device == "mps" and (is_rank or n > 1):
        device = "cpu"  # several processes cannot share Apple's GPU
    with contextlib.ExitStack() as locks:
        if n == 1:
            if not is_rank:
                leave_busy_cores()
            with join(device, args.timeout) as world:
                train_rank(args, device, world, began, locks)
            return None
        # Mistakes are reported, and the text is prepared, once, before there are ranks.
        run = resolve(args, device, n, n)
        if not args.bench:
            open_run(run, locks)
        rest = [word for word in argv if word != "--fresh"]
        return start(n, [sys.executable, __file__, *rest], run.out / "state")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    command(main)
