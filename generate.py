"""Text from a checkpoint: sampling, scoring and measuring.

    python generate.py --prompt "Once upon a time"                    # from the newest run
    python generate.py stories15M.bin --prompt "One day" --prompt "Two dogs" --json
    python generate.py Llama-3.2-1B-Instruct/ --chat                  # a conversation
    python generate.py model.gguf --quantize int8 --compile --prompt "The sky is"
    python generate.py runs/tiny --score README.md                    # bits per byte of a text
    python generate.py SmolLM2-135M/ --bench 64                       # tokens a second
    python generate.py llama-2-7b/ --export hf llama-2-7b-hf/         # for transformers
"""
import contextlib
import ctypes
import itertools
import json
import math
import random
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

STARTED = time.perf_counter()  # before torch, whose import is part of the wait for a first token

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from formats import EXPORTS, export, gguf_fields, load, open_checkpoint, read_blocks
from llama import KVCache, Linear, Llama, logit_rows
from tokenizer import (Parser, StreamDecoder, Tokenizer, command, documents, huggingface_files,
                       load_tokenizer, positive, read_json, tokenizer_from_gguf, write_aside)

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_device() -> str:
    """cuda, mps or cpu: the fastest that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep freed blocks of any size for the next use. Else large blocks go
    to the system and come back as pages to be cleared, which takes a third of a training step."""
    trim_threshold, mmap_max = -1, -4  # names of options in malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc: nothing to set
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


# ---------------------------------------------------------------------------------------------
# Products: matrices laid out for few rows. A new token reads every weight once, so its speed is
# the rate at which bytes come from memory.

MAX_GEMV_ROWS = 16  # up to so many rows of x, kernels made for one row are the faster ones
QUANT_ROWS = 512    # rows of W quantised at a time; a multiple of the kernels' blocks of 16


class Product(nn.Module):
    """x W^T in place of a Linear: multiply(x, *tensors) with x (rows, in) and tensors that hold W
    (out, in) in a layout of their own."""

    def __init__(self, multiply: Callable, *tensors: Tensor):
        super().__init__()
        self.multiply = multiply
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"w{i}", tensor)

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x.flatten(0, -2), *self.buffers())
        return y.view(*x.shape[:-1], -1).to(x.dtype)


def multiply_plain(x: Tensor, w: Tensor) -> Tensor:
    if torch.compiler.is_compiling() and len(x) == 1:
        # The loops that the compiler writes for one row outrun the matrix kernels.
        return (x.float() * w.float()).sum(-1)[None]
    if w.dtype == torch.float16 and w.device.type == "cpu" and len(x) > MAX_GEMV_ROWS:
        return F.linear(x.float(), w.float())  # the kernel for fp16 is slow
    return F.linear(x, w)


def quantise_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """W = s q: integers q (out, in), and for each row a scale s = max |w| / 127 in bf16.
    A row (1.27, -0.5) has s = 0.01 and q = (127, -50)."""
    s = (torch.linalg.vector_norm(w, math.inf, dim=1) / 127).clamp(min=1e-30).bfloat16()
    q = torch.empty_like(w, dtype=torch.int8)
    for start in range(0, len(w), QUANT_ROWS):
        some = slice(start, start + QUANT_ROWS)
        q[some] = (w[some].float() / s[some, None]).round().clamp(-127, 127)
    return q, s


def multiply_int8(x: Tensor, q: Tensor, s: Tensor) -> Tensor:
    x = x.bfloat16()
    # The kernel for few rows reads past the end of rows of x that are no multiple of 16.
    if x.device.type == "cpu" and len(x) <= MAX_GEMV_ROWS and x.shape[1] % 16 == 0:
        return torch._weight_int8pack_mm(x, q, s)
    return F.linear(x, q.bfloat16()) * s


def quantise_int4(w: Tensor) -> tuple[Tensor, Tensor]:
    """W = s (q - 8) + z: q of 0 .. 15, and for each 32 weights of a row s and z in bf16, such that
    z - 8 s is the smallest of them and z + 7 s the largest. For weights from -1 to 2, s = 0.2 and
    z = 0.6: q = 0 is -1 and q = 15 is 2."""
    packed, scales = [], []
    for some in w.split(QUANT_ROWS):
        groups = some.float().unflatten(1, (-1, 32))
        low, high = groups.aminmax(dim=-1, keepdim=True)
        s = ((high - low) / 15).clamp(min=1e-30).bfloat16()
        z = (low + 8 * s).bfloat16()
        q = ((groups - z) / s + 8).round().clamp(0, 15).flatten(1).int()
        packed.append(torch._convert_weight_to_int4pack_for_cpu(q, 1))
        scales.append(torch.cat((s, z), -1))
    return torch.cat(packed), torch.cat(scales).transpose(0, 1).contiguous()


def product(w: Tensor, dtype: torch.dtype, quantize: str | None = None,
            compiled: bool = False) -> Product:
    """The fastest Product for W on its device. int8 stands in for int4 where the shape or the
    device does not allow it."""
    (n_out, n_in), on_cpu = w.shape, w.device.type == "cpu"
    if quantize == "int4" and on_cpu and n_in % 32 == 0 and n_out % 16 == 0:
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
        return Product(lambda x, q, s: kernel(x.bfloat16(), q, 32, s), *quantise_int4(w))
    if quantize:
        return Product(multiply_int8, *quantise_int8(w))
    w, can_pack = w.to(dtype), on_cpu and torch.backends.mkldnn.is_available()
    if dtype == torch.bfloat16:
        can_pack = can_pack and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16 or compiled or not can_pack:
        return Product(multiply_plain, w)
    # oneDNN's kernel wants blocks, which F.linear would make at each call: made once, few rows are
    # up to twice as fast. Those for 64 rows are the best for one too. They cannot be compiled.
    pack, kernel = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    return Product(lambda x, w: kernel(x, w, None, "none", [], ""), pack(w.contiguous(), 64))


# ---------------------------------------------------------------------------------------------
# A model to generate with


class CompiledLlama(Llama):
    """A Llama whose layers are compiled for one new token of one text. Prompts run as usual: each
    has another length, for which all would be compiled again. Layers are called in groups of n with
    their tensors as inputs, so that one piece of code serves every group and a deep model compiles
    as fast as a shallow one."""

    def compile_layers(self, most: int = 16) -> None:
        """Once all weights are in place. n is the largest divisor of L up to `most`."""
        self.n = max(n for n in range(1, most + 1) if len(self.layers) % n == 0)
        # state_dict detaches: else the compiler notes that the first layer's are the module's own.
        self.tensors = [dict(layer.state_dict()) for layer in self.layers]
        # With the calls between the kernels in C++ too, a token takes a fifth less.
        self.compiled_group = torch.compile(self.group, fullgraph=True,
                                            options={"cpp_wrapper": True, "size_asserts": False})

    def group(self, tensors: list[dict[str, Tensor]], held: list[tuple[Tensor, Tensor]], h: Tensor,
              cos: Tensor, sin: Tensor, position: Tensor, seen: Tensor) -> Tensor:
        """h (1, 1, D) through n layers; seen (S,) counts the tokens, the new one among them."""
        S = len(seen)
        for own, (keys, values) in zip(tensors, held):
            def attend(q: Tensor, k: Tensor, v: Tensor, keys=keys, values=values):
                # KVCache.write cannot serve: it reads lengths, which would become constants.
                keys[:, :, S - 1:S] = k
                values[:, :, S - 1:S] = v
                o, lse = self.attend(q.to(keys.dtype), keys[:, :, :S], values[:, :, :S], position)
                return o.to(q.dtype), lse
            h = functional_call(self.layers[0], own, (h, cos, sin, attend))
        return h

    def hidden(self, tokens: Tensor, cache: KVCache | None = None,
               boundaries: Tensor | None = None) -> Tensor:
        if cache is None or tokens.numel() > 1 or cache.lengths[0] == 0:
            return super().hidden(tokens, cache, boundaries)
        h, position = self.embed(tokens), cache.positions(1)
        seen = cache.places[:cache.lengths[0] + 1]
        torch._dynamo.mark_dynamic(seen, 0)  # or each length would be compiled anew
        for i in range(0, len(self.layers), self.n):
            h = self.compiled_group(self.tensors[i:i + self.n], cache.held[i:i + self.n], h,
                                    cache.cos[position], cache.sin[position], position, seen)
        cache.advance(1)
        return self.norm(h)


def check_compiler() -> None:
    """ValueError where torch.compile does not work."""
    try:
        torch.compile(torch.neg)(torch.ones(2))
    except Exception as error:
        raise ValueError(f"nothing can be compiled here ({str(error).splitlines()[0]:.200}); try "
                         "without --compile, or install a C++ compiler") from None


@torch.no_grad()
def open_model(path: Path, dtype: torch.dtype | None = None, quantize: str | None = None,
               compiled: bool = False) -> Llama:
    """The model in any checkpoint, ready to generate on the best device. dtype is what is computed
    in; None is the file's, but bf16 with `quantize`. Each matrix becomes a Product as soon as its
    layer is read: a model that is quantised never needs the memory of the whole."""
    config, weights = open_checkpoint(path)
    dtype = dtype or (torch.bfloat16 if quantize else weights["tok_embeddings.weight"].dtype)
    kind = Llama
    if compiled:
        check_compiler()
        kind = CompiledLlama
    with torch.device("meta"):
        model = kind(config, backward="autograd", dtype=dtype)
    # What is to be quantised comes in the file's own type.
    for block, tensors in read_blocks(weights, best_device(), None if quantize else dtype):
        for parameter, tensor in tensors.items():
            name = f"{block}.{parameter}".removesuffix(".weight")
            module = model.get_submodule(name)
            if isinstance(module, Linear):
                in_group = compiled and name != "output"
                model.set_submodule(name, product(tensor, dtype, quantize, in_group))
            else:
                module.load_state_dict({"weight": tensor.to(dtype)}, assign=True)
    if model.output is None:
        model.output = product(model.tok_embeddings.weight, dtype, quantize)
    if compiled:
        model.compile_layers()
    return model.eval()


def newest_run(root: Path = Path("runs")) -> Path:
    """The run whose weights were written last."""
    runs = sorted(root.glob("*/consolidated.00.pth"), key=lambda file: file.stat().st_mtime)
    if not runs:
        raise ValueError("there is no run in runs/ yet; try python train.py, or name a checkpoint")
    return runs[-1].parent


def tokenizer_beside(checkpoint: Path, vocab_size: int, given: str | None = None) -> Tokenizer:
    """The tokenizer given or else the checkpoint's: inside a GGUF file, beside it, or one folder up
    (LLaMA 1). What ends a text is also in transformers' generation_config.json."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    path = Path(given or checkpoint)
    fields = gguf_fields(path) if path.is_file() else None
    if fields is None and (path.is_dir() or not given):
        names = (f"tok{vocab_size}.bin", "tokenizer.json", "tokenizer.model", "tokenizer.bin")
        places = [Path(given)] if given else [folder, folder.resolve().parent]
        candidates = [place / name for place in places for name in names]
        path = next(filter(Path.is_file, candidates), None)
        if path is None:
            raise ValueError(f"there is no tokenizer in {places[0]}; try --tokenizer PATH")
    tokenizer = tokenizer_from_gguf(fields) if fields else load_tokenizer(path)
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(f"{path} has {tokenizer.vocab_size} tokens and the model {vocab_size}: "
                         "they do not belong together, or the model's embedding was padded; try "
                         "--tokenizer with the model's own, or a model cut to its vocabulary")
    with contextlib.suppress(OSError, ValueError, TypeError):  # not there, or not understood
        eos = read_json((folder / "generation_config.json").read_bytes()).get("eos_token_id") or []
        tokenizer.stop_ids |= frozenset(eos if isinstance(eos, list) else [eos])
    return tokenizer


# ---------------------------------------------------------------------------------------------
# Sampling


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its scores."""
    temperature: float = 0.6  # 0: always the likeliest token
    top_k: int = 0            # only the k likeliest; 0: all
    top_p: float = 0.9        # only the likeliest that together have this probability
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:  # not nan either
            raise ValueError(f"--temperature {self.temperature} is no number from 0; try 0.6")
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k} is negative; try 0 for all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p} is not in (0, 1]; try 0.9")

    def generator(self, number: int) -> random.Random:
        """Random numbers of one sample, a function of (seed, number) alone. Python hashes the whole
        text with SHA-512; torch keeps 32 bits of a seed, so that different seeds would be one."""
        return random.Random(f"{self.seed}/{number}")

    def probabilities(self, logits: Tensor) -> Tensor:
        """softmax(z / temperature) of logits z (B, V), cut to the k likeliest tokens, then to the
        smallest set of the likeliest whose sum reaches p, and normalised again: with p = 0.7,
        0.5, 0.3, 0.1, 0.1 becomes 0.625, 0.375, 0, 0."""
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        z = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, 1e-6)
        if not self.top_k and self.top_p == 1:
            return z.softmax(-1)
        # 256 tokens nearly always reach p, and to sort all V would take as long as the model.
        best, order = z.topk(min(self.top_k or 256, z.shape[-1]))
        total = (best if self.top_k else z).logsumexp(-1, keepdim=True)
        if not self.top_k and ((best - total).exp().sum(-1) < self.top_p).any():
            best, order = z.sort(-1, descending=True)
        p = (best - total).exp()
        p_before = p.cumsum(-1) - p  # sum of all likelier tokens
        p_before[:, 0] = -1  # the likeliest stays, however small top_p is
        p[p_before >= self.top_p] = 0
        return torch.zeros_like(z).scatter(-1, order, p / p.sum(-1, keepdim=True))

    def draw(self, logits: Tensor, generators: list[random.Random]) -> list[tuple[int, float]]:
        """A token for each row of logits (B, V), with its log-probability before any cut."""
        total = logits.logsumexp(-1)
        if not total.isfinite().all():
            raise ValueError("the model's scores are not finite; try --dtype fp32")
        if self.temperature == 0:
            ids = logits.argmax(-1)
        else:
            # Token i where P(< i) <= u < P(<= i): torch.multinomial takes 20 times as long.
            ends = self.probabilities(logits).cumsum(-1)
            u = torch.tensor([row.random() for row in generators])[:, None] * ends[:, -1:]
            u = u.minimum(ends[:, -1:].nextafter(torch.zeros(())))  # below P, however rounded
            ids = torch.searchsorted(ends, u, right=True)[:, 0]
        logprobs = logits.gather(-1, ids[:, None])[:, 0] - total
        return list(zip(ids.tolist(), logprobs.tolist()))


def new_cache(model: Llama, batch: int, capacity: int) -> KVCache:
    """A cache in the type computed in; fp32 for fp16 on a CPU, whose attention in fp16 is slow."""
    weight = model.tok_embeddings.weight
    dtype = model.dtype or weight.dtype
    if weight.device.type == "cpu" and dtype == torch.float16:
        dtype = torch.float32
    return KVCache(model.config, batch, capacity, dtype, weight.device)


def prefill(model: Llama, prompts: list[list[int]], capacity: int) -> tuple[KVCache, Tensor]:
    """Reads distinct prompts once, in one batch padded on the right. Returns the cache (rows copied
    for duplicates) and each prompt's last hidden state, (B, 1, D)."""
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    lengths = [len(prompt) for prompt in distinct]
    cache = new_cache(model, len(distinct), capacity)
    padded = torch.zeros(len(distinct), max(lengths), dtype=torch.long, device=cache.places.device)
    for row, prompt in zip(padded, distinct):
        row[:len(prompt)] = torch.tensor(prompt)
    h = model.hidden(padded, cache)
    h = h[range(len(distinct)), [length - 1 for length in lengths]][:, None]
    cache.lengths = lengths
    if len(distinct) == len(prompts):
        return cache, h
    rows = [distinct.index(tuple(prompt)) for prompt in prompts]
    copied = new_cache(model, len(prompts), capacity)
    copied.take(cache, rows)
    return copied, h[rows]


@torch.inference_mode()
def generate(model: Llama, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling,
             stop_ids: frozenset[int] = frozenset(), numbers: list[int] | None = None,
             cache: KVCache | None = None) -> Iterator[list[tuple[int, int, float]]]:
    """Continues each prompt; yields, step by step, (row, id, log-probability) of every row that is
    still running. A row ends with a stop id, after max_new_tokens or when the context is full, and
    is what it would be alone. numbers[row] tells the samples of one prompt apart. A cache, of one
    row, holds the beginning of its prompt."""
    context, device = model.config.max_seq_len, model.tok_embeddings.weight.device
    longest = max(map(len, prompts))
    if not min(map(len, prompts)):
        raise ValueError("a prompt has no token; try one with BOS")
    if longest >= context:
        raise ValueError(f"a prompt of {longest} tokens leaves no room in the context of "
                         f"{context}; try a shorter one")
    generators = [sampling.generator(number) for number in numbers or [0] * len(prompts)]
    left = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    newest = torch.zeros(len(prompts), 1, dtype=torch.long)
    if cache is None:
        cache, h = prefill(model, prompts, min(context, longest + max_new_tokens))
    else:
        unread = torch.tensor([prompts[0][cache.lengths[0]:]], device=device)
        h = model.hidden(unread, cache)[:, -1:]
    running = list(range(len(prompts)))
    while True:
        logits = model.logits(h)[running, 0].cpu()
        drawn = sampling.draw(logits, [generators[row] for row in running])
        yield [(row, token, logprob) for row, (token, logprob) in zip(running, drawn)]
        for row, (token, _) in zip(running, drawn):
            newest[row] = token
            left[row] -= 1
            if token in stop_ids:
                left[row] = 0
        running = [row for row in running if left[row]]
        if not running:
            return
        # Rows that ended are computed too, and thrown away. They count as long as the longest, so
        # that they stay inside the cache and equal lengths stay equal, which is faster.
        longest = max(cache.lengths[row] for row in running)
        for row in set(range(len(prompts))) - set(running):
            cache.lengths[row] = longest
        h = model.hidden(newest.to(device), cache)


class Sample:
    """One text as it grows: ids and log-probabilities of the new tokens, and their text."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, stop_texts: list[str] = ()):
        self.prompt, self.stop_ids, self.stop_texts = prompt, tokenizer.stop_ids, stop_texts
        self.decoder = StreamDecoder(tokenizer, start=not prompt)
        self.ids, self.logprobs, self.text, self.finish_reason = [], [], "", None
        self.shown = 0  # characters of text that were handed out

    def push(self, token: int, logprob: float) -> str:
        """Takes a token; returns the text that is new and cannot begin a stop text. With the stop
        text "END", an "E" is held back until the next token shows what it is."""
        if token in self.stop_ids:
            return self.end("stop")
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.text += self.decoder.push(token)
        ends = [self.text.index(stop) for stop in self.stop_texts if stop in self.text]
        if ends:
            self.text = self.text[:min(ends)]
            return self.end("stop")
        held_back = 0
        for stop in self.stop_texts:
            for n in range(1, len(stop)):
                if self.text.endswith(stop[:n]):
                    held_back = max(held_back, n)
        return self.show(len(self.text) - held_back)

    def end(self, reason: str) -> str:
        """Closes the text; returns what of it was not handed out yet."""
        self.finish_reason = reason
        if reason == "length":
            self.text += self.decoder.flush()
        return self.show(len(self.text))

    def show(self, until: int) -> str:
        new = self.text[self.shown:until]
        self.shown = max(self.shown, until)
        return new

    def json(self) -> str:
        names = ("prompt", "ids", "text", "logprobs", "finish_reason")
        return json.dumps({name: getattr(self, name) for name in names})


def grow(samples: list[Sample], model: Llama, prompts: list[list[int]], max_new_tokens: int,
         sampling: Sampling, numbers: list[int], cache: KVCache | None = None
         ) -> Iterator[tuple[int, str]]:
    """Runs generate until every sample has ended; yields (row, its new text) as it comes."""
    stop_ids = samples[0].stop_ids
    for step in generate(model, prompts, max_new_tokens, sampling, stop_ids, numbers, cache):
        for row, token, logprob in step:
            if samples[row].finish_reason is None:
                yield row, samples[row].push(token, logprob)
        if all(sample.finish_reason for sample in samples):
            return
    for row, sample in enumerate(samples):
        if sample.finish_reason is None:
            yield row, sample.end("length")


def sample_texts(model: Llama, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int,
                 sampling: Sampling, num_samples: int = 1, stop_texts: list[str] = (),
                 show: Callable[[str], None] | None = None) -> list[Sample]:
    """num_samples texts of each prompt, in one batch. show(text) gets the first as it comes."""
    samples, ids, numbers = [], [], []
    for prompt in prompts:
        encoded = tokenizer.encode(prompt, bos=tokenizer.adds_bos) or [tokenizer.bos_id]
        for number in range(num_samples):
            samples.append(Sample(tokenizer, prompt, stop_texts))
            ids.append(encoded)
            numbers.append(number)
    for n, (row, text) in enumerate(grow(samples, model, ids, max_new_tokens, sampling, numbers)):
        if show and n == 0:
            show(prompts[0])
        if show and row == 0:
            show(text)
    return samples


# ---------------------------------------------------------------------------------------------
# Conversation

CHATS = {  # what stands before and around a text, and what after it; <|…|> is a special token
    "llama3": (("<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n{text}"),
               ("<|eot_id|>",)),
    "chatml": (("<|im_start|>", "{role}\n{text}"), ("<|im_end|>", "\n"))}
LLAMA2_MARKS = ("<<SYS>>", "<</SYS>>", "[INST]", "[/INST]")  # these are no special tokens


def chat_format(tokenizer: Tokenizer) -> str:
    """The format that a model was tuned for, by the marks in its template or, where there is none,
    by its special tokens."""
    template = tokenizer.chat_template
    marks = tokenizer.special if template is None else template
    for name, (begin, end) in CHATS.items():
        if begin[0] not in marks:
            continue
        for part in begin + end:
            if part.startswith("<|") and part not in tokenizer.special:
                raise ValueError(f"the chat format needs {part}, which the tokenizer has not; try "
                                 "--tokenizer with the model's own")
        return name
    if LLAMA2_MARKS[0] in marks or (template is None and "<s>" in marks):
        return "llama2"  # whose own files have no template
    raise ValueError("the model's chat format is none of llama3, chatml, llama2; try --prompt")


def turn(tokenizer: Tokenizer, text: str, system: str = "", first: bool = True) -> list[int]:
    r"""The ids from the end of the last answer to where the next one begins.

        llama3  <|start_header_id|>user<|end_header_id|>\n\n TEXT <|eot_id|>, and the same for the
                system; the answer follows <|start_header_id|>assistant<|end_header_id|>\n\n
        chatml  <|im_start|>user\n TEXT <|im_end|>\n; the answer follows <|im_start|>assistant\n
        llama2  BOS [INST] <<SYS>>\n SYSTEM \n<</SYS>>\n\n TEXT [/INST] ANSWER EOS

    Special tokens come from here alone: in what a user types they are ordinary characters.
    """
    name, ids = chat_format(tokenizer), []
    if not first:
        system = ""
    if name == "llama2":
        for mark in LLAMA2_MARKS:
            if mark in text + system:
                raise ValueError(f"{mark} is a mark of this chat format; try a text without it")
        if system:
            text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}"
        ids = tokenizer.encode(f"[INST] {text.strip()} [/INST]", bos=True)
        return ids if first else [tokenizer.eos_id, *ids]
    begin, end = CHATS[name]
    if first and tokenizer.adds_bos:
        ids.append(tokenizer.bos_id)
    messages = [("user", text), ("assistant", "")]
    if system:
        messages.insert(0, ("system", system))
    for number, (role, content) in enumerate(messages):
        for part in begin if first and number == 0 else end + begin:
            if part.startswith("<|"):
                ids.append(tokenizer.special[part])
            else:
                plain = part.replace("{role}", role).replace("{text}", content.strip())
                ids += tokenizer.encode(plain, continues=True)
    return ids


def chat(model: Llama, tokenizer: Tokenizer, max_new_tokens: int, sampling: Sampling, system: str,
         stop_texts: list[str] = ()) -> None:
    """A conversation over stdin and stdout, kept in the cache; the end of the input ends it."""
    print(f"a conversation in the format {chat_format(tokenizer)}; Ctrl-C stops an answer, "
          "Ctrl-D (Windows: Ctrl-Z) ends it", file=sys.stderr)
    ids, cache, context = [], new_cache(model, 1, 0), model.config.max_seq_len
    for number in itertools.count():
        sample = Sample(tokenizer, "-", stop_texts)
        try:
            text = input("> ")
            new, alone = turn(tokenizer, text, system, not ids), turn(tokenizer, text, system)
            if len(alone) >= context:
                raise ValueError(f"a text of {len(alone)} tokens does not fit {context}; try less")
            if len(ids) + len(new) >= context:
                print(f"the context of {context} tokens is full: it begins anew", file=sys.stderr)
                ids, cache, new = [], new_cache(model, 1, 0), alone
            ids += new
            smaller, cache = cache, new_cache(model, 1, min(context, len(ids) + max_new_tokens))
            cache.take(smaller, [0])
            for _, piece in grow([sample], model, [ids], max_new_tokens, sampling, [number], cache):
                print(piece, end="", flush=True)
            print()
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print(" [stopped]")
        except ValueError as error:
            print("error:", error, file=sys.stderr)
        ids += sample.ids


# ---------------------------------------------------------------------------------------------
# Scoring and measuring


@torch.inference_mode()
def token_nll(model: Llama, ids: list[int]) -> Tensor:
    """-log p(id | all before it in its window) of every id but the first, in nats: (len(ids) - 1,).
    A text longer than the context is read in windows that overlap by half: each token is scored
    once, with at least half a context before it where the text has that much."""
    context, device = model.config.max_seq_len, model.tok_embeddings.weight.device
    rows = logit_rows(model.config.vocab_size, model.config.dim)
    done, parts = 0, []
    for start in range(0, len(ids) - 1, max(1, context // 2)):
        window = torch.tensor(ids[start:start + context + 1], device=device)
        h = model.hidden(window[None, :-1])[0]
        new = slice(done - start, None)  # the rest of the window was scored in the last one
        for some, targets in zip(h[new].split(rows), window[1:][new].split(rows)):
            parts.append(F.cross_entropy(model.logits(some), targets, reduction="none").cpu())
        done = start + len(h)
        if done == len(ids) - 1:
            break
    return torch.cat(parts)


def figures(tokens: int, nll: float, n_bytes: int) -> dict:
    """Of 4 tokens of probability 1/2 each, for 2 bytes: perplexity 2, 2 bits per byte."""
    return {"tokens": tokens, "nll": nll, "perplexity": math.exp(min(700, nll / tokens)),
            "bits_per_byte": nll / math.log(2) / n_bytes}


def score(model: Llama, tokenizer: Tokenizer, path: str) -> Iterator[dict]:
    """The figures of each document of a file or folder, then of all. Each document's also hold its
    ids, their log-probabilities, and the windows' length and distance (0: one window held it)."""
    context, skipped, totals = model.config.max_seq_len, [], (0, 0.0, 0)
    for number, pieces in enumerate(documents([path], skipped)):
        text = "".join(pieces)
        ids = tokenizer.encode(text, bos=True)
        if len(ids) < 2:  # empty, or of characters that the vocabulary does not have
            continue
        nll = token_nll(model, ids)
        counts = len(nll), nll.double().sum().item(), len(text.encode())
        totals = tuple(map(sum, zip(totals, counts)))
        yield {"document": number, **figures(*counts), "window": context,
               "stride": context // 2 * (len(nll) > context), "ids": ids[1:],
               "logprobs": (-nll).tolist()}
    for reason in skipped:
        print(f"passed over {reason}", file=sys.stderr)
    if not totals[0]:
        raise ValueError(f"{path} holds no text; try a UTF-8 text file or a .jsonl with \"text\"")
    yield {"document": "all", **figures(*totals)}


def bench(model: Llama, n: int, load_s: float) -> dict:
    """Speed of reading a prompt of n random tokens and of n - 1 steps after it, best of three."""
    context, embedding = model.config.max_seq_len, model.tok_embeddings.weight
    if not 1 < n <= context // 2:
        raise ValueError(f"--bench {n} must be 2 or more and twice it fit the model's context of "
                         f"{context}; try {min(64, context // 2)}")
    prompt = random.Random(0).choices(range(model.config.vocab_size), k=n)
    read_s, write_s, first_token_s = math.inf, math.inf, None
    for _ in range(3):
        times = [time.perf_counter()]
        for _ in generate(model, [prompt], n, Sampling(temperature=0)):
            times.append(time.perf_counter())
        read_s, write_s = min(read_s, times[1] - times[0]), min(write_s, times[-1] - times[1])
        first_token_s = first_token_s or times[1] - STARTED
    # A token reads every weight, but only one row of the embedding.
    weights = itertools.chain(model.parameters(), model.buffers())
    read_bytes = sum(weight.nbytes for weight in weights) - embedding.nbytes
    data = torch.ones(2**26, device=embedding.device)
    bandwidth = data.nbytes / min(timeit.repeat(lambda: data.sum().item(), number=1))
    used = read_bytes * (n - 1) / write_s
    return {"prefill_tokens_per_s": n / read_s, "decode_tokens_per_s": (n - 1) / write_s,
            "weight_gb": (read_bytes + embedding.nbytes) / 1e9, "bandwidth_gb_s": used / 1e9,
            "bandwidth_fraction": round(used / bandwidth, 3), "load_s": load_s,
            "first_token_s": first_token_s, "dtype": str(model.dtype).removeprefix("torch.")}


# ---------------------------------------------------------------------------------------------
# Command line


def parser() -> Parser:
    p = Parser(prog="generate.py", description="Text from a run, a folder of Meta or transformers, "
               "a GGUF file or llama2.c's files: the format is recognised by the content.")
    p.add_argument("checkpoint", nargs="?", help="folder or file; default: the newest run in runs/")
    add = p.add_argument_group("text").add_argument
    add("--prompt", action="append", default=[], metavar="TEXT",
        help="repeat it for a batch; - reads stdin; \"\" starts from BOS alone")
    add("--max-new-tokens", type=positive(int), default=200, metavar="N",
        help="tokens at most; the context may end a text earlier")
    add("--temperature", type=float, default=0.6, metavar="X",
        help="0 for the likeliest text, about 1 for variety")
    add("--top-p", type=float, default=0.9, metavar="X", help="less if the text loses its thread")
    add("--top-k", type=int, default=0, metavar="N", help="0 for all tokens")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same text")
    add("--num-samples", type=positive(int), default=1, metavar="N", help="texts of each prompt")
    add("--stop", action="append", default=[], metavar="TEXT",
        help="end a text where this begins; repeatable")
    add = p.add_argument_group("model").add_argument
    add("--dtype", choices=DTYPES, default="auto",
        help="auto keeps the file's; bf16 halves the memory of an fp32 file")
    add("--quantize", choices=["int8", "int4"], help="weights alone, all else in bf16: int8 loses "
        "next to nothing, int4 little; compare with --score")
    add("--compile", action="store_true", help="faster tokens of a single text after up to a "
        "minute of compiling, less the second time; small models gain most")
    add("--tokenizer", metavar="PATH", help="default: the one beside the checkpoint")
    add = p.add_argument_group("instead of sampling, and output").add_argument
    add("--chat", action="store_true",
        help="a conversation in the model's own format; Ctrl-C stops an answer")
    add("--system", default="", metavar="TEXT", help="who answers in --chat")
    add("--export", nargs=2, metavar=("FORMAT", "OUT"),
        help=f"write the checkpoint as one of {', '.join(EXPORTS)}, with its tokenizer")
    add("--score", metavar="FILE", help="bits per byte of its documents, after BOS, those longer "
        "than the context in windows that overlap by half")
    add("--bench", type=positive(int), metavar="N", help="speed: N tokens read, N written")
    add("--json", action="store_true", help="one JSON object a sample or document")
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
    if format == "hf":
        ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.stop_ids)}
        ends = json.dumps(ends).encode()
        files = {**huggingface_files(tokenizer), "generation_config.json": ends}
    else:
        is_json = tokenizer.data.startswith(b"{")
        files = {"tokenizer.json" if is_json else "tokenizer.model": tokenizer.data}
    for name, data in files.items():
        path = folder / name
        if path.exists() and path.read_bytes() != data:
            print(f"{path} is another tokenizer and stays; {out} needs its own", file=sys.stderr)
        else:
            write_aside(path, lambda file, data=data: file.write(data))


def show_scores(scores: Iterator[dict], as_json: bool) -> None:
    for row in scores:
        line = json.dumps(row)
        if not as_json:
            line = ("document {document}: {tokens} tokens, nll {nll:.2f}, perplexity "
                    "{perplexity:.2f}, {bits_per_byte:.3f} bits per byte").format(**row)
            if row.get("stride"):
                line += ", in windows of {window} tokens, {stride} apart".format(**row)
        print(line, flush=True)


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if "" in args.stop:
        raise ValueError("--stop needs a text; try --stop with one, or none")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    tasks = {"--chat": args.chat, "--export": args.export, "--score": args.score,
             "--bench": args.bench, "--prompt": args.prompt}
    chosen = [name for name, value in tasks.items() if value]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} do not go together; try one of them")
    checkpoint = Path(args.checkpoint or newest_run())
    if args.export:
        return export_all(checkpoint, *args.export, args.tokenizer)
    start = time.perf_counter()
    model = open_model(checkpoint, DTYPES[args.dtype], args.quantize, args.compile)
    load_s = time.perf_counter() - start
    keep_freed_memory()  # only now: what loading freed has gone back to the system
    if args.bench:
        return print(json.dumps({**bench(model, args.bench, load_s), "quantize": args.quantize}))
    tokenizer = tokenizer_beside(checkpoint, model.config.vocab_size, args.tokenizer)
    if args.score:
        return show_scores(score(model, tokenizer, args.score), args.json)
    if args.chat:
        return chat(model, tokenizer, args.max_new_tokens, sampling, args.system, args.stop)
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt or [""]]
    alone = len(prompts) * args.num_samples == 1 and not args.json
    show = partial(print, end="", flush=True) if alone else None
    samples = sample_texts(model, tokenizer, prompts, args.max_new_tokens, sampling,
                           args.num_samples, args.stop, show)
    for number, sample in enumerate(samples, 1):
        if args.json:
            print(sample.json())
        elif alone:
            print()
        else:
            print(f"--- {number} of {len(samples)}\n{sample.prompt}{sample.text}")


if __name__ == "__main__":
    command(main)
