"""Text from a checkpoint: sampling, scoring and measuring.

    python generate.py --prompt "Once upon a time"                    # from the newest run
    python generate.py runs/tiny --prompt "" --temperature 0          # greedy, from BOS alone
    python generate.py stories15M.bin --prompt "One day" --prompt "Two dogs" --json
    python generate.py Llama-3.2-1B-Instruct/ --chat                  # a conversation
    python generate.py model.gguf --quantize int8 --compile --prompt "The sky is"
    python generate.py runs/tiny --score README.md                    # bits per byte of a text
    python generate.py SmolLM2-135M/ --bench 64                       # tokens a second
    python generate.py llama-2-7b/ --export hf llama-2-7b-hf/         # for transformers
"""
import argparse
import contextlib
import ctypes
import itertools
import json
import math
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

STARTED = time.perf_counter()  # before torch, whose import is a good part of the first token's wait

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from llama import (EXPORTS, Attention, FeedForward, KVCache, Layer, Llama, export, gguf_fields,
                   load, open_checkpoint, through)
from tokenizer import (HuggingFace, Parser, SentencePiece, StreamDecoder, Tokenizer, command,
                       documents, from_gguf, load_tokenizer)

FEW = 16  # rows up to which kernels for one row are the faster ones
AT_ONCE = 512  # rows that are quantised at a time; kernels' blocks of rows divide it
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_device() -> str:
    """cuda, mps or cpu: the fastest that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def keep_freed_memory(keep: bool = True) -> None:
    """Tells glibc's malloc to keep freed blocks, however large, for the next use. Else they go to
    the system and come back as pages to be cleared: a third of a training step's time, or more.
    keep False: to give all over a megabyte back at once, while a model is loaded."""
    mmap_threshold, trim_threshold, mmap_max = -3, -1, -4
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system's library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**20)
        mallopt(trim_threshold, -1 if keep else 2**20)
        mallopt(mmap_max, 0 if keep else 2**16)


# ---------------------------------------------------------------------------------------------
# Finding things


def newest_run(root: Path = Path("runs")) -> Path:
    """The run whose weights were written last."""
    runs = sorted(root.glob("*/consolidated.00.pth"), key=lambda file: file.stat().st_mtime)
    if not runs:
        raise ValueError("there is no run in runs/ yet; try python train.py, or name a checkpoint")
    return runs[-1].parent


def tokenizer_beside(checkpoint: Path, vocab_size: int, given: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint: the one given, or the one inside a GGUF file, or the file
    beside it (or one folder up, where LLaMA 1 has it). Its size must be the model's. What ends a
    text is also in transformers' generation_config.json."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    names = (f"tok{vocab_size}.bin", "tokenizer.json", "tokenizer.model", "tokenizer.bin")
    folders = [Path(given)] if given else [folder, folder.resolve().parent]
    path = Path(given) if given else checkpoint
    fields = gguf_fields(path) if path.is_file() else None
    if fields is None and (path.is_dir() or not given):
        found = (place / name for place in folders for name in names)
        path = next((place for place in found if place.is_file()), None)
    if path is None:
        raise ValueError(f"there is no tokenizer beside {checkpoint}; try --tokenizer PATH")
    tokenizer = from_gguf(fields) if fields else load_tokenizer(path)
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(f"{path} has {tokenizer.vocab_size} tokens and the model {vocab_size}: "
                         "they do not belong together, or the model's embedding was padded; try "
                         "--tokenizer with the model's own, or a model cut to its vocabulary")
    ends = folder / "generation_config.json"
    if ends.is_file():
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            eos = json.loads(ends.read_bytes()).get("eos_token_id") or []
            tokenizer.stop_ids |= frozenset(eos if isinstance(eos, list) else [eos])
    return tokenizer


# ---------------------------------------------------------------------------------------------
# Products of few rows. A token reads every weight once, so what counts is bytes and their order:
# each class lays a matrix W (out, in) out for y = x W^T, x (..., in), and says its `nbytes`.


def rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


class Product(nn.Module):
    """W as it is. On a CPU many rows in fp16 are computed in fp32, whose kernel is faster."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.nbytes = self.weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if w.dtype == torch.float16 and w.device.type == "cpu" and rows(x) > FEW:
            return F.linear(x.float(), w.float()).to(x.dtype)
        return F.linear(x, w)


class PackedProduct(nn.Module):
    """W in fp32 or bf16 in the order of oneDNN's kernel, which F.linear would make at each call.
    The compiler cannot trace that order, so what it compiles calls llama::packed with a number."""

    numbered, numbers = weakref.WeakValueDictionary(), itertools.count()

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("number", torch.tensor(next(self.numbers)))
        self.numbered[int(self.number)] = self
        self.n_out = weight.shape[0]
        # Packed for 64 rows it is the fastest for one row too.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), 64)
        self.nbytes = weight.numel() * dtype.itemsize

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.llama.packed(x, self.number, self.n_out)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


OPS = torch.library.Library("llama", "FRAGMENT")
OPS.define("packed(Tensor x, Tensor number, int n_out) -> Tensor")
OPS.impl("packed", lambda x, number, n_out: PackedProduct.numbered[int(number)](x), "CPU")
OPS._register_fake("packed", lambda x, number, n_out: x.new_empty(*x.shape[:-1], n_out))


class Int8Product(nn.Module):
    """W = s q, q in int8 and for each row a scale s = max |w| / 127 in bf16. Computes in bf16."""

    def __init__(self, weight: Tensor):
        super().__init__()
        s = (torch.linalg.vector_norm(weight, math.inf, dim=1) / 127).clamp(min=1e-30).bfloat16()
        self.register_buffer("q", torch.empty_like(weight, dtype=torch.int8))
        for q, w, scale in zip(*(x.split(AT_ONCE) for x in (self.q, weight, s[:, None]))):
            q.copy_((w.float() / scale).round().clamp(-127, 127))
        self.register_buffer("s", s)
        self.nbytes = self.q.nbytes + self.s.nbytes

    def forward(self, x: Tensor) -> Tensor:
        y = x.bfloat16()
        # The kernel for few rows reads past the end of rows that are no multiple of 16.
        if x.device.type == "cpu" and rows(x) <= FEW and x.shape[-1] % 16 == 0:
            y = torch._weight_int8pack_mm(y.flatten(0, -2), self.q, self.s).view(*x.shape[:-1], -1)
        else:
            y = F.linear(y, self.q.bfloat16()) * self.s
        return y.to(x.dtype)


class Int4Product(nn.Module):
    """W = s (q - 8) + z, q of 0 .. 15, with s and z in bf16 for each 32 weights of a row: from the
    smallest and the largest of them, z - 8 s and z + 7 s. Computes in bf16."""

    def __init__(self, weight: Tensor):
        super().__init__()
        packed, scales, on_cpu = [], [], weight.device.type == "cpu"
        for some in weight.split(AT_ONCE):
            w = some.float().unflatten(1, (-1, 32))
            low, high = w.aminmax(dim=-1, keepdim=True)
            s = ((high - low) / 15).clamp(min=1e-30).bfloat16()
            z = (low + 8 * s).bfloat16()
            q = ((w - z) / s + 8).round().clamp(0, 15).flatten(1).int()
            if on_cpu:
                packed.append(torch._convert_weight_to_int4pack_for_cpu(q, 1))
            else:
                packed.append((q[:, ::2] | q[:, 1::2] << 4).to(torch.uint8))
            scales.append(torch.cat((s, z), -1))
        self.register_buffer("q", torch.cat(packed))
        scales = torch.cat(scales)
        self.register_buffer("scales", scales.transpose(0, 1).contiguous() if on_cpu else scales)
        self.nbytes = self.q.nbytes + self.scales.nbytes

    def forward(self, x: Tensor) -> Tensor:
        y = x.bfloat16()
        if x.device.type == "cpu":
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(y.flatten(0, -2), self.q, 32,
                                                           self.scales).view(*x.shape[:-1], -1)
        else:
            q = torch.stack((self.q & 15, self.q >> 4), -1).view(len(self.q), -1, 32)
            w = self.scales[..., :1] * (q.bfloat16() - 8) + self.scales[..., 1:]
            y = F.linear(y, w.flatten(1))
        return y.to(x.dtype)


def product(weight: Tensor, dtype: torch.dtype, quantize: str | None) -> nn.Module:
    """The fastest layout of a matrix: as it is, packed, or quantised where its shape allows."""
    if quantize == "int4" and weight.shape[1] % 32 == 0 and weight.shape[0] % 16 == 0:
        return Int4Product(weight)
    if quantize:
        return Int8Product(weight)
    if weight.device.type == "cpu" and torch.backends.mkldnn.is_available():  # not on every machine
        if dtype == torch.float32 or (dtype == torch.bfloat16
                                      and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            return PackedProduct(weight, dtype)
    return Product(weight, dtype)


class FusedAttention(Attention):
    """Attention whose Wq, Wk and Wv are one matrix: one large product is faster than three."""

    def __init__(self, attention: Attention, lay_out):
        nn.Module.__init__(self)
        q, k, v = (w.weight for w in (attention.wq, attention.wk, attention.wv))
        self.head_dim, self.sizes = attention.head_dim, (len(q) + len(k), len(v))
        self.wqkv = lay_out(torch.cat((q, k, v)))
        self.wo = lay_out(attention.wo.weight)

    def products(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.wqkv(x).split(self.sizes, -1)


class FusedFeedForward(FeedForward):
    """FeedForward whose W1 and W3 are one matrix."""

    def __init__(self, feed_forward: FeedForward, lay_out):
        nn.Module.__init__(self)
        self.w13 = lay_out(torch.cat((feed_forward.w1.weight, feed_forward.w3.weight)))
        self.w2 = lay_out(feed_forward.w2.weight)

    def products(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.w13(x).chunk(2, -1)


def open_model(path: Path, dtype: torch.dtype | None = None, quantize: str | None = None,
               compiled: bool = False) -> Llama:
    """The model in any checkpoint, ready to generate on the best device: its matrices laid out for
    products of few rows as soon as they are read, one layer after the other. dtype None is the
    file's, but bf16 with `quantize`."""
    device = best_device()
    if device != "cpu" and not quantize:
        model = load(path, device, dtype)
    else:
        def finish(name: str, block: nn.Module) -> nn.Module:
            nonlocal dtype
            dtype = dtype or (torch.bfloat16 if quantize else block.weight.dtype)
            lay_out = partial(product, dtype=dtype, quantize=quantize)
            if not isinstance(block, Layer):
                return lay_out(block.weight) if name == "output" else block.to(dtype)
            block.attention_norm.to(dtype)
            block.ffn_norm.to(dtype)
            block.attention = FusedAttention(block.attention, lay_out)
            block.feed_forward = FusedFeedForward(block.feed_forward, lay_out)
            return block

        with torch.no_grad():
            # To be quantised they come as they are in the file, mapped.
            model = load(path, device, None if quantize else dtype, finish)
            if model.output is None:
                model.output = product(model.tok_embeddings.weight, dtype, quantize)
        model.dtype, model.backward = dtype, "autograd"  # LayerByHand wants single matrices
    if compiled:
        compile_steps(model)
    return model


def check_compiler() -> None:
    """ValueError where torch.compile does not work."""
    try:
        torch.compile(torch.neg)(torch.ones(2))
    except Exception as error:
        raise ValueError(f"nothing can be compiled here ({str(error).splitlines()[0]:.200}); try "
                         "without --compile, or install a C++ compiler") from None


def compile_steps(model: Llama, most: int = 16) -> None:
    """Compiles `through` for one token and n layers, n the largest divisor of their number up to
    `most`: the same code serves each n of them, so that a deep model takes no longer to compile.
    Inductor keeps what it compiled for the next time."""
    check_compiler()
    layers = list(model.layers)
    n = max(n for n in range(1, most + 1) if len(layers) % n == 0)
    # Detached, or the compiler would note that the first layer's tensors are its own, and compile
    # a second time for those of other layers.
    tensors = [{name: x.detach() for name, x in itertools.chain(
        layer.named_parameters(), layer.named_buffers())} for layer in layers]

    def some_layers(tensors, *rest):
        # Tensors as inputs of the first layer's code: quicker to check at each call than modules.
        called = [partial(functional_call, layers[0], own) for own in tensors]
        return through([lambda *args, call=call: call(args) for call in called], *rest)
    # With the calls between the products in C++ too a token takes a fifth less.
    compiled = torch.compile(some_layers, fullgraph=True,
                             options={"cpp_wrapper": True, "size_asserts": False})

    def through_one(held, h, cos, sin, positions, keys, attention):
        torch._dynamo.mark_dynamic(keys, 0)  # grows with each token
        for i in range(0, len(layers), n):
            h = compiled(tensors[i:i + n], held[i:i + n], h, cos, sin, positions, keys, attention)
        return h
    model.through_one = through_one


# ---------------------------------------------------------------------------------------------
# Sampling


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.6  # 0: always the likeliest token
    top_k: int = 0            # only the k likeliest; 0: all
    top_p: float = 0.9        # only the likeliest that together have this probability
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:  # nan neither
            raise ValueError(f"--temperature {self.temperature} is no number from 0; try 0 for "
                             "greedy")
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k} is negative; try 0 for all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p} is not in (0, 1]; try 0.9")

    def probabilities(self, logits: Tensor) -> Tensor:
        """What the next token is drawn from: logits (B, V) -> (B, V).

            softmax(z / temperature), cut to the k likeliest, then to the smallest set of the
            likeliest whose sum reaches p, and normalised again
        """
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        z = (logits - logits.max(-1, keepdim=True).values) / max(self.temperature, 1e-6)
        if not self.top_k and self.top_p == 1:
            return z.softmax(-1)
        total, some = z.logsumexp(-1, keepdim=True), min(self.top_k or 256, z.shape[-1])
        best, order = z.topk(some)  # to sort all of V would take as long as the model
        if self.top_k:
            total = best.logsumexp(-1, keepdim=True)
        elif ((best - total).exp().sum(-1) < self.top_p).any():
            best, order = z.sort(-1, descending=True)
        p = (best - total).exp()
        before = p.cumsum(-1) - p  # probability of all likelier tokens
        before[:, 0] = -1  # the likeliest stays, however small top_p is
        p[before >= self.top_p] = 0
        return torch.zeros_like(z).scatter(-1, order, p / p.sum(-1, keepdim=True))

    def draw(self, logits: Tensor, random: list[torch.Generator]) -> list[tuple[int, float]]:
        """A token for each row of logits (B, V), with its log-probability before any cut."""
        total = logits.logsumexp(-1)
        if not total.isfinite().all():
            raise ValueError("the model's scores are not finite; try --dtype fp32")
        if self.temperature == 0:
            ids = logits.argmax(-1)
        else:
            p = self.probabilities(logits)
            # By the inverse of the distribution: torch.multinomial takes 20 times as long.
            ends = p.cumsum(-1)
            at = torch.stack([torch.rand(1, generator=g) for g in random]) * ends[:, -1:]
            ids = torch.searchsorted(ends, at, right=True)[:, 0]
        logprobs = logits.gather(-1, ids[:, None])[:, 0] - total
        return list(zip(ids.tolist(), logprobs.tolist()))


class Text(list):
    """The ids of a text as it grows, and what followed each pair of them last."""

    def __init__(self, ids: list[int]):
        super().__init__(ids)
        self.after = {pair: i + 2 for i, pair in enumerate(zip(ids, ids[1:-1]))}

    def add(self, token: int) -> None:
        self.after[tuple(self[-2:])] = len(self)
        self.append(token)

    def guess(self, n: int) -> list[int]:
        """Up to n ids that may come next: those after the last place where the last two stood."""
        at = self.after.get(tuple(self[-2:]), len(self))
        return self[at:at + n]


def read_prompts(model: Llama, prompts: list[list[int]], size: int, cache: KVCache | None
                 ) -> tuple[KVCache, Tensor]:
    """All prompts in one pass, equal ones once: (a cache of `size` tokens a row that holds them,
    what the last token of each gives, (B, 1, D)). A cache given holds a prompt's beginning."""
    held = cache.lengths[0] if cache else 0
    prompts = [prompt[held:] for prompt in prompts]
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    longest, shared = max(map(len, prompts)), len(distinct) < len(prompts)
    read = cache or new_cache(model, len(distinct), longest if shared else size)
    padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in distinct]
    h = model.hidden(torch.tensor(padded, device=model.tok_embeddings.weight.device), read)
    h = h[range(len(distinct)), [len(prompt) - 1 for prompt in distinct]]  # (B, T, D) -> (B, D)
    read.lengths = [held + len(prompt) for prompt in distinct]
    if shared:
        rows = [distinct.index(tuple(prompt)) for prompt in prompts]
        cache, h = new_cache(model, len(prompts), size), h[rows]
        cache.take(read, rows)
    return cache or read, h[:, None]


def draw_texts(logits: Tensor, texts: list[Text], guesses: list[list[int]], running: list[int],
               sampling: Sampling, random: list[torch.Generator], ends
               ) -> list[tuple[int, int, float]]:
    """Adds to each running text what is drawn from its scores (B, T, V): a token, and as long as it
    is the one that was guessed, and ends(row) is false, the next."""
    step, drawing = [], running
    for t in range(logits.shape[1]):
        z = logits[:, t] if len(drawing) == len(logits) else logits[drawing, t]
        drawn = sampling.draw(z, [random[row] for row in drawing])
        step += [(row, *new) for row, new in zip(drawing, drawn)]
        for row, (token, _) in zip(drawing, drawn):
            texts[row].add(token)
        drawing = [row for row, (token, _) in zip(drawing, drawn)
                   if guesses[row][t:t + 1] == [token] and not ends(row)]
        if not drawing:
            break
    return step


@torch.inference_mode()
def generate(model: Llama, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling,
             stop_ids: frozenset[int] = frozenset(), numbers: list[int] | None = None,
             speculate: int = 0, cache: KVCache | None = None
             ) -> Iterator[list[tuple[int, int, float]]]:
    """Continues each prompt; yields (row, id, log-probability) of every row still running, a step
    at a time. A row ends with a stop id, or when the context is full.

    One batch, prompts of any lengths padded on the right: each row is what it would be alone.
    numbers[row] tells samples of one prompt apart: a row's randomness is (seed, number) alone.
    With `speculate`, up to so many guesses go through the model together with the last token; as
    long as what is drawn is what was guessed, the next scores are there already, and what is drawn
    is what it would be without (but for the rounding of products of several rows). A cache of one
    row may hold the beginning of its prompt.
    """
    longest, room = max(map(len, prompts)), model.config.max_seq_len
    if min(map(len, prompts)) == 0:
        raise ValueError("a prompt has no token; try one with BOS")
    if longest >= room:
        raise ValueError(f"a prompt of {longest} tokens leaves no room in the context of "
                         f"{room}; try a shorter one")
    device, size = model.tok_embeddings.weight.device, min(room, longest + max_new_tokens)
    random = [torch.Generator().manual_seed((sampling.seed * 2**20 + number) % 2**63)
              for number in numbers or [0] * len(prompts)]
    cache, h = read_prompts(model, prompts, size, cache)
    texts, guesses = [Text(prompt) for prompt in prompts], [[] for _ in prompts]

    def ends(row: int) -> bool:
        made = len(texts[row]) - len(prompts[row])
        return (made == max_new_tokens or len(texts[row]) >= room
                or made > 0 and texts[row][-1] in stop_ids)

    running = list(range(len(prompts)))
    while True:
        yield draw_texts(model.logits(h).cpu(), texts, guesses, running, sampling, random, ends)
        running = [row for row in running if not ends(row)]
        if not running:
            return
        # All but the last token of each text are in the cache: what followed a wrong guess is not.
        # Rows that ended count as long as the longest, so that equal lengths stay equal.
        most = max(len(texts[row]) for row in running) - 1
        cache.lengths = [len(text) - 1 if row in running else most
                         for row, text in enumerate(texts)]
        guesses = [text.guess(min(speculate, size - most - 1)) if row in running else []
                   for row, text in enumerate(texts)]
        T = 1 + max(map(len, guesses))
        new = [(text[-1:] + guess + [0] * T)[:T] for text, guess in zip(texts, guesses)]
        h = model.hidden(torch.tensor(new, device=device), cache)


def new_cache(model: Llama, batch: int, length: int) -> KVCache:
    """A cache in the type that is computed in; fp32 for fp16 on a CPU, whose kernel is slow."""
    weight = model.tok_embeddings.weight
    dtype = model.dtype or weight.dtype
    if weight.device.type == "cpu" and dtype == torch.float16:
        dtype = torch.float32
    return KVCache(model.config, batch, length, dtype, weight.device)


class Sample:
    """One text as it grows: ids and log-probabilities of the new tokens, and their text."""

    def __init__(self, tokenizer, prompt: str, stop_ids: frozenset[int], stop_texts: list[str]):
        self.prompt, self.stop_ids, self.stop_texts = prompt, stop_ids, stop_texts
        self.decoder = StreamDecoder(tokenizer, start=not prompt)
        self.ids, self.logprobs, self.text = [], [], ""
        self.finish_reason = None
        self.shown = 0  # characters of text that were handed out

    def push(self, token: int, logprob: float) -> str:
        """Takes a token; the text that is new and cannot be the beginning of a stop text."""
        if token in self.stop_ids:
            return self.end("stop")
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.text += self.decoder.push(token)
        ends = [at for at in (self.text.find(stop) for stop in self.stop_texts) if at >= 0]
        if ends:
            self.text = self.text[:min(ends)]
            return self.end("stop")
        held = max((n for stop in self.stop_texts for n in range(1, len(stop))
                    if self.text.endswith(stop[:n])), default=0)
        return self.show(len(self.text) - held)

    def end(self, reason: str) -> str:
        """Closes the text; what of it was not handed out yet."""
        self.finish_reason = reason
        if reason == "length":
            self.text += self.decoder.flush()
        return self.show(len(self.text))

    def show(self, until: int) -> str:
        new = self.text[self.shown:until]
        self.shown = max(self.shown, until)
        return new

    def json(self) -> dict:
        return {"prompt": self.prompt, "ids": self.ids, "text": self.text,
                "logprobs": self.logprobs, "finish_reason": self.finish_reason}


def sample_texts(model: Llama, tokenizer, prompts: list[str], max_new_tokens: int,
                 sampling: Sampling, num_samples: int = 1, stop_texts: list[str] = (),
                 speculate: int = 0, show=None) -> list[Sample]:
    """num_samples texts of each prompt, one batch; show(text) gets the first as it comes."""
    samples = [Sample(tokenizer, prompt, tokenizer.stop_ids, list(stop_texts))
               for prompt in prompts for _ in range(num_samples)]
    ids = [ids for prompt in prompts for ids in num_samples * [
        tokenizer.encode(prompt, bos=tokenizer.adds_bos) if prompt else [tokenizer.bos_id]]]
    numbers = list(range(num_samples)) * len(prompts)
    show = show or (lambda text: None)
    for n, step in enumerate(generate(model, ids, max_new_tokens, sampling, tokenizer.stop_ids,
                                      numbers, speculate)):
        if n == 0:
            show(prompts[0])
        for row, token, logprob in step:
            if samples[row].finish_reason is None:
                text = samples[row].push(token, logprob)
                if row == 0:
                    show(text)
        if all(sample.finish_reason for sample in samples):
            break
    for row, sample in enumerate(samples):
        rest = sample.end("length") if sample.finish_reason is None else ""
        if row == 0:
            show(rest)
    return samples


# ---------------------------------------------------------------------------------------------
# Conversation

CHATS = {  # what stands before a role, after it, before the text, and after the text
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "\n\n", "<|eot_id|>", ""),
    "chatml": ("<|im_start|>", None, "\n", "<|im_end|>", "\n"),
    "llama2": ("[INST]",)}  # all in the text; no special tokens but BOS and EOS


def chat_format(tokenizer: Tokenizer) -> str:
    """Which of CHATS a model was tuned for: by its template, else by its special tokens."""
    template = tokenizer.chat_template
    for name, marks in CHATS.items():
        if marks[0] in (tokenizer.special if template is None else template):
            missing = [mark for mark in marks if mark and mark[:2] == "<|"
                       and mark not in tokenizer.special]
            if missing:
                raise ValueError(f"the chat format needs {missing[0]}, which the tokenizer has "
                                 "not; try --tokenizer with the model's own")
            return name
    if template is None and "<s>" in tokenizer.special:
        return "llama2"  # whose files name no format
    raise ValueError("this model's chat format is none of " + ", ".join(CHATS) + "; try --prompt")


def turn(tokenizer: Tokenizer, text: str, system: str = "", first: bool = True) -> list[int]:
    r"""The ids from the end of the last answer to where the next one begins.

        llama3  <|start_header_id|>user<|end_header_id|>\n\n TEXT <|eot_id|>, and the same for the
                system; the answer follows <|start_header_id|>assistant<|end_header_id|>\n\n
        chatml  <|im_start|>user\n TEXT <|im_end|>\n; the answer follows <|im_start|>assistant\n
        llama2  BOS [INST] <<SYS>>\n SYSTEM \n<</SYS>>\n\n TEXT [/INST] ANSWER EOS

    Special tokens come from here alone: in a text they are ordinary characters.
    """
    name = chat_format(tokenizer)
    if name == "llama2":
        if tag := next((tag for tag in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
                        if tag in text + system), None):
            raise ValueError(f"{tag} is a mark of this chat format; try a text without it")
        system = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and first else ""
        ids = tokenizer.encode(f"[INST] {system}{text.strip()} [/INST]", bos=True)
        return ids if first else [tokenizer.eos_id, *ids]
    before, after, gap, end, newline = CHATS[name]

    def mark(special: str) -> list[int]:
        return [tokenizer.special[special]]

    def words(plain: str) -> list[int]:
        return tokenizer.encode(plain, continues=True)

    def begin(role: str, content: str = "") -> list[int]:
        if after is None:
            return mark(before) + words(role + gap + content)
        return mark(before) + words(role) + mark(after) + words(gap + content)

    messages = [("system", system)] * bool(system and first) + [("user", text)]
    ids = [tokenizer.bos_id] * tokenizer.adds_bos if first else mark(end) + words(newline)
    for role, content in messages:
        ids += begin(role, content.strip()) + mark(end) + words(newline)
    return ids + begin("assistant")


def answer(model: Llama, tokenizer: Tokenizer, ids: list[int], cache: KVCache, number: int,
           max_new_tokens: int, sampling: Sampling, stop_texts: list[str], speculate: int
           ) -> list[int]:
    """Prints the answer to a conversation, of which the cache holds the beginning; its ids. Ctrl-C
    ends it. `number` is the answer's own randomness."""
    sample = Sample(tokenizer, "-", tokenizer.stop_ids, list(stop_texts))
    try:
        for step in generate(model, [ids], max_new_tokens, sampling, tokenizer.stop_ids, [number],
                             speculate, cache):
            for _, token, logprob in step:
                if sample.finish_reason is None:
                    print(sample.push(token, logprob), end="", flush=True)
            if sample.finish_reason:
                break
        print("" if sample.finish_reason else sample.end("length"))
    except KeyboardInterrupt:
        print(" [stopped]")
    return sample.ids


def chat(model: Llama, tokenizer: Tokenizer, max_new_tokens: int, sampling: Sampling, system: str,
         stop_texts: list[str] = (), speculate: int = 0) -> None:
    """A conversation over stdin and stdout, kept in the cache; the end of the input ends it."""
    print(f"a conversation in the format {chat_format(tokenizer)}; Ctrl-C stops an answer, "
          f"{'Ctrl-Z' if sys.platform == 'win32' else 'Ctrl-D'} ends it", file=sys.stderr)
    ids, cache, room = [], new_cache(model, 1, 0), model.config.max_seq_len
    for number in itertools.count():
        try:
            text = input("> ")
            new = turn(tokenizer, text, system, first=not ids)
            alone = turn(tokenizer, text, system)
            if len(alone) >= room:
                raise ValueError(f"a text of {len(alone)} tokens is too long for {room}; try less")
            if len(ids) + len(new) >= room:
                print(f"the context of {room} tokens is full: it begins anew", file=sys.stderr)
                ids, cache, new = [], new_cache(model, 1, 0), alone
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print()
            continue
        except ValueError as error:
            print("error:", error, file=sys.stderr)
            continue
        ids += new
        needed = min(room, len(ids) + max_new_tokens)
        if needed > len(cache.keys):
            smaller, cache = cache, new_cache(model, 1, min(room, needed + needed // 2))
            cache.take(smaller, [0])
        ids += answer(model, tokenizer, ids, cache, number, max_new_tokens, sampling, stop_texts,
                      speculate)
        # A guess that was not drawn may be in the cache where the last token belongs.
        cache.lengths = [min(cache.lengths[0], len(ids) - 1)]


# ---------------------------------------------------------------------------------------------
# Scoring and measuring


@torch.inference_mode()
def token_nll(model: Llama, ids: list[int]) -> Tensor:
    """-log p(id | all before it in its window) of every id but the first, in nats: (len(ids) - 1,).

    A text longer than the context is read in windows that overlap by half: each token is scored
    once, with at least half a context before it where the text has that much.
    """
    context, device = model.config.max_seq_len, model.tok_embeddings.weight.device
    step, done, parts = max(1, context // 2), 0, []
    for start in range(0, len(ids) - 1, step):
        window = torch.tensor(ids[start:start + context + 1], device=device)
        nll = model.nll(window[None, :-1], window[None, 1:])[0]
        parts.append(nll[done - start:].cpu())
        done = start + len(nll)
        if done == len(ids) - 1:
            break
    return torch.cat(parts)


def score(model: Llama, tokenizer: Tokenizer, path: str) -> Iterator[dict]:
    """Per document of a file or folder, then in all: tokens, nll, perplexity, bits per byte; per
    document also its ids and their log-probabilities, and what is between the windows it is read
    in (0: one window holds it)."""
    skipped, totals = [], []
    for number, pieces in enumerate(documents([path], skipped)):
        if not (text := "".join(pieces)):
            continue
        ids = tokenizer.encode(text, bos=True)
        if len(ids) < 2:  # of characters that the vocabulary has not
            continue
        nll = token_nll(model, ids)
        totals.append((len(ids) - 1, float(nll.double().sum()), len(text.encode())))
        context = model.config.max_seq_len
        yield {"document": number, **figures(*totals[-1]), "window": context,
               "stride": context // 2 if len(ids) - 1 > context else 0,
               "ids": ids[1:], "logprobs": (-nll).tolist()}
    for reason in skipped:
        print(f"passed over {reason}", file=sys.stderr)
    if not totals:
        raise ValueError(f"{path} holds no text; try a UTF-8 text file or a .jsonl with \"text\"")
    yield {"document": "all", **figures(*map(sum, zip(*totals)))}


def figures(tokens: int, nll: float, size: int) -> dict:
    return {"tokens": tokens, "nll": nll, "perplexity": math.exp(min(700, nll / max(1, tokens))),
            "bits_per_byte": nll / math.log(2) / max(1, size)}


def memory_bandwidth(device: str) -> float:
    """Bytes a second that a large sum reads, best of five."""
    data = torch.ones(2**26, device=device)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum().item()
        times.append(time.perf_counter() - start)
    return 4 * data.numel() / min(times)


def bench(model: Llama, n: int, load_s: float) -> dict:
    """Speed of reading a prompt of n random tokens and of n - 1 steps after it, best of three."""
    context, dtype = model.config.max_seq_len, model.dtype or model.tok_embeddings.weight.dtype
    if not 1 < n <= context // 2:
        raise ValueError(f"--bench {n} must be 2 or more and twice it fit the model's context of "
                         f"{context}; try {min(64, context // 2)}")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (n,), generator=generator).tolist()
    prefill, decode, first = [], [], None
    for _ in range(3):
        start = time.perf_counter()
        steps = generate(model, [prompt], n, Sampling(temperature=0))
        next(steps)
        read = time.perf_counter()
        first = first or read - STARTED
        made = sum(1 for _ in steps)
        prefill.append(n / (read - start))
        decode.append(made / (time.perf_counter() - read))
    # A token reads all of it but the embedding, of which it reads a row, where that is not tied.
    table = 0 if model.output is None else model.tok_embeddings.weight.nbytes
    read_bytes = sum(getattr(m, "nbytes", 0) or sum(p.nbytes for p in m.parameters(recurse=False))
                     for m in model.modules()) - table
    bandwidth = read_bytes * max(decode)
    fraction = bandwidth / memory_bandwidth(model.tok_embeddings.weight.device.type)
    return {"prefill_tokens_per_s": max(prefill), "decode_tokens_per_s": max(decode),
            "weight_gb": (read_bytes + table) / 1e9, "bandwidth_gb_s": bandwidth / 1e9,
            "bandwidth_fraction": round(fraction, 3), "load_s": load_s, "first_token_s": first,
            "dtype": str(dtype).removeprefix("torch.")}


# ---------------------------------------------------------------------------------------------
# Command line


def positive(kind: type):
    """A type for argparse: int or float, above zero and finite."""
    def parse(text: str):
        with contextlib.suppress(ValueError):
            if 0 < kind(text) < math.inf:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive {kind.__name__}")
    return parse


def parser() -> Parser:
    p = Parser(prog="generate.py", description="Text from a run, a folder of Meta or transformers, "
               "a GGUF file or llama2.c's files: what it is, is seen from what is in it.")
    p.add_argument("checkpoint", nargs="?", help="folder or file; default: the newest run in runs/")
    text = p.add_argument_group("text")
    text.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                      help="repeat it for a batch; - reads stdin; \"\" starts from BOS alone")
    text.add_argument("--max-new-tokens", type=positive(int), default=200, metavar="N",
                      help="tokens at most; the context may end a text earlier")
    text.add_argument("--temperature", type=float, default=0.6, metavar="X",
                      help="0 for the likeliest text, about 1 for variety")
    text.add_argument("--top-p", type=float, default=0.9, metavar="X",
                      help="lower it if the text loses its thread")
    text.add_argument("--top-k", type=int, default=0, metavar="N", help="0 for all tokens")
    text.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same text")
    text.add_argument("--num-samples", type=positive(int), default=1, metavar="N",
                      help="texts of each prompt")
    text.add_argument("--stop", action="append", default=[], metavar="TEXT",
                      help="end a text where this begins; repeatable")
    model = p.add_argument_group("model")
    model.add_argument("--dtype", choices=DTYPES, default="auto",
                       help="auto keeps the file's; bf16 halves the memory of an fp32 file")
    model.add_argument("--quantize", choices=["int8", "int4"],
                       help="weights alone, all else in bf16: int8 loses next to nothing, int4 "
                       "little; compare with --score")
    model.add_argument("--compile", action="store_true",
                       help="faster tokens after up to a minute of compiling, less the second "
                       "time; small models gain most")
    model.add_argument("--speculate", type=positive(int), default=0, metavar="N",
                       help="guess N tokens from the text so far and check them together: the same "
                       "text (but for rounding, in bf16), sooner where it repeats itself; try 4")
    model.add_argument("--tokenizer", metavar="PATH", help="default: the one beside the checkpoint")
    other = p.add_argument_group("instead of sampling, and output")
    other.add_argument("--chat", action="store_true",
                       help="a conversation in the model's own format; Ctrl-C stops an answer")
    other.add_argument("--system", default="", metavar="TEXT", help="who answers in --chat")
    other.add_argument("--export", nargs=2, metavar=("FORMAT", "OUT"), help="write the checkpoint "
                       f"as one of {', '.join(EXPORTS)}, with its tokenizer")
    other.add_argument("--score", metavar="FILE", help="bits per byte of its documents, after BOS, "
                       "the ones longer than the context in windows that overlap by half")
    other.add_argument("--bench", type=positive(int), metavar="N",
                       help="speed: N tokens read, N written")
    other.add_argument("--json", action="store_true", help="one JSON object a sample or document")
    return p


def export_all(checkpoint: Path, format: str, out: str, given: str | None) -> None:
    """The checkpoint in another format, and beside it its tokenizer, if there is one."""
    config, _ = open_checkpoint(checkpoint)
    export(checkpoint, format, out)
    folder = Path(out) if Path(out).is_dir() else Path(out).parent
    try:
        tokenizer = tokenizer_beside(checkpoint, config.vocab_size, given)
    except ValueError as error:
        return print(f"{out} is written, without a tokenizer: {error}", file=sys.stderr)
    if format == "hf" and isinstance(tokenizer, SentencePiece):
        tokenizer = tokenizer.as_json()  # which transformers reads without further packages
    name = "tokenizer.json" if isinstance(tokenizer, HuggingFace) else "tokenizer.model"
    if (folder / name).exists() and (folder / name).read_bytes() != tokenizer.data:
        return print(f"{folder / name} is another tokenizer and stays; {out} needs its own",
                     file=sys.stderr)
    tokenizer.save(folder / name)
    if format == "hf":
        ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.stop_ids)}
        (folder / "generation_config.json").write_text(json.dumps(ends))
        config = {key: value for key, value in tokenizer.config.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", **config}))


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if "" in args.stop:
        raise ValueError("--stop needs a text; try --stop with one, or none")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    instead = [f"--{name}" for name in ("chat", "export", "score", "bench", "prompt")
               if getattr(args, name) not in (None, False, [])]
    if len(instead) > 1:
        raise ValueError(f"{' and '.join(instead)} do not go together; try one of them")
    checkpoint = Path(args.checkpoint) if args.checkpoint else newest_run()
    if args.export:
        return export_all(checkpoint, *args.export, args.tokenizer)
    start = time.perf_counter()
    keep_freed_memory(False)
    model = open_model(checkpoint, DTYPES[args.dtype], args.quantize, args.compile)
    load_s = time.perf_counter() - start
    keep_freed_memory()
    if args.bench:
        row = bench(model, args.bench, load_s)
        print(json.dumps({**row, "quantize": args.quantize}))
        return
    tokenizer = tokenizer_beside(checkpoint, model.config.vocab_size, args.tokenizer)
    if args.score is not None:
        show_scores(score(model, tokenizer, args.score), args.json)
    elif args.chat:
        chat(model, tokenizer, args.max_new_tokens, sampling, args.system, args.stop,
             args.speculate)
    else:
        show_samples(args, model, tokenizer, sampling)


def show_scores(rows: Iterator[dict], as_json: bool) -> None:
    for row in rows:
        windows = ", in windows of {window} tokens, {stride} apart" if row.get("stride") else ""
        text = ("document {document}: {tokens} tokens, nll {nll:.2f}, perplexity {perplexity:.2f}, "
                "{bits_per_byte:.3f} bits per byte" + windows)
        print(json.dumps(row) if as_json else text.format(**row), flush=True)


def show_samples(args, model: Llama, tokenizer: Tokenizer, sampling: Sampling) -> None:
    """A single text as it comes, several when all are done."""
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt or [""]]
    alone = len(prompts) * args.num_samples == 1 and not args.json

    def show(text: str) -> None:
        print(text, end="", flush=True)

    samples = sample_texts(model, tokenizer, prompts, args.max_new_tokens, sampling,
                           args.num_samples, args.stop, args.speculate, show if alone else None)
    for number, sample in enumerate(samples):
        if args.json:
            print(json.dumps(sample.json()))
        elif alone:
            print()
        else:
            print(f"--- {number + 1} of {len(samples)}\n{sample.prompt}{sample.text}")


if __name__ == "__main__":
    command(main)
