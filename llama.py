"""Llama, to be read beside the papers.

    LLaMA    "LLaMA: Open and Efficient Foundation Language Models", arXiv 2302.13971
    Llama 2  "Llama 2: Open Foundation and Fine-Tuned Chat Models", arXiv 2307.09288
    Llama 3  "The Llama 3 Herd of Models", arXiv 2407.21783

From top to bottom: the sizes and their recipes, the pieces (RMSNorm, rotary embedding, SwiGLU,
attention), the layer, the model, its cache and loss, and the files that hold its weights.
Module names are the keys of Meta's checkpoints.

    python -c "import llama; print(llama.SIZES['7b'][0].n_params)"   # 6738415616

Axes, the same letters everywhere:
    B batch    T new positions    S positions seen so far (S = T unless a cache holds earlier ones)
    D model width (dim)    H query heads    K key/value heads    E head size, D / H
    F hidden width of the feed-forward    V vocabulary    L layers
"""
import hashlib
import json
import math
import os
import pickle
import struct
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------
# Sizes and recipes (LLaMA Table 2, Llama 2 Table 1 and appendix, Llama 3 Table 3, model cards)


@dataclass(frozen=True)
class LlamaConfig:
    """Everything that fixes the shape and the function of a Llama."""
    dim: int                          # D, width of the residual stream
    n_layers: int                     # L
    n_heads: int                      # H
    n_kv_heads: int                   # K; K < H is grouped-query attention (Llama 2, section 2.2)
    hidden_dim: int                   # F, near 2/3 * 4 D in LLaMA (section 2.2)
    vocab_size: int                   # V, rows of the embedding
    max_seq_len: int                  # longest context trained for, in tokens
    norm_eps: float = 1e-5            # epsilon inside the square root of RMSNorm
    rope_theta: float = 10000.0       # base of the rotary frequencies
    rope_scaling: float | None = None  # factor of Llama 3.1's slow frequencies (3.1: 8, 3.2: 32)
    tie_embeddings: bool = False      # the output projection is the embedding (3.2 1B and 3B)

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            if kind is bool and type(value) is bool or value is None and field.default is None:
                continue
            if type(value) not in {int, kind if kind is int else float} or not 0 < value < 2**24:
                wanted = {int: "a positive whole number", bool: "true or false"}
                raise ValueError(f"{field.name}={value!r} must be {wanted.get(kind, 'positive')}; "
                                 "try the published value")
        if self.dim % (2 * self.n_heads) or self.n_heads % self.n_kv_heads or self.n_layers > 1024:
            raise ValueError(f"dim={self.dim} must split into n_heads={self.n_heads} of even size, "
                             f"they into n_kv_heads={self.n_kv_heads} groups, and n_layers="
                             f"{self.n_layers} be 1024 at most; try the published shape")

    @classmethod
    def from_dict(cls, values: dict) -> "LlamaConfig":
        """The config of these fields; a field that does not exist is an error that names it."""
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"unknown field {unknown[0]!r}; try one of {', '.join(known)}")
        return cls(**values)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def n_params(self) -> int:
        """Exact number of parameters, tied weights once."""
        attention = 2 * self.dim * (self.n_heads + self.n_kv_heads) * self.head_dim
        layer = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        tables = 1 if self.tie_embeddings else 2
        return self.n_layers * layer + self.dim + tables * self.vocab_size * self.dim


@dataclass(frozen=True)
class Recipe:
    """How a size was trained. None: never published (`filled` puts Llama 2's figure there)."""
    lr: float | None                  # peak learning rate
    batch_tokens: int | None          # tokens a step
    train_tokens: float | None        # tokens in all
    warmup: int | None = 2000         # steps of linear warm-up
    final_lr: float | None = 0.1      # where the cosine ends, as a fraction of the peak
    betas: tuple[float, float] | None = (0.9, 0.95)
    eps: float | None = None          # of AdamW
    weight_decay: float | None = 0.1
    clip: float | None = 1.0          # largest norm of the gradient
    document_mask: bool = False       # no attention across documents (Llama 3, section 3.2)

    def filled(self) -> tuple["Recipe", list[str]]:
        """(the recipe without gaps, the names of the figures that were never published)"""
        base = Recipe(3e-4, 4 * 2**20, 2e12, eps=1e-5)
        missing = [f.name for f in fields(self) if getattr(self, f.name) is None]
        return replace(self, **{name: getattr(base, name) for name in missing}), missing


M = 2**20  # the papers' "4M tokens" is taken as 4 * 2**20 = 4,194,304
LLAMA1_SMALL = Recipe(3e-4, 4 * M, 1.0e12)
LLAMA1_LARGE = Recipe(1.5e-4, 4 * M, 1.4e12)
LLAMA2_SMALL = Recipe(3e-4, 4 * M, 2.0e12, eps=1e-5)
LLAMA2_LARGE = Recipe(1.5e-4, 4 * M, 2.0e12, eps=1e-5)
# Llama 3 prints peak rates; the rest only for 405B, whose batch grew from 4M to 8M to 16M tokens.
LLAMA3 = partial(Recipe, batch_tokens=None, train_tokens=15e12, warmup=None, final_lr=None,
                  betas=None, weight_decay=None, clip=None, document_mask=True)
LLAMA3_405B = LLAMA3(8e-5, batch_tokens=16 * M, train_tokens=15.6e12, warmup=8000, final_lr=0.01)
SMALL3 = LLAMA3(None, train_tokens=9e12)
TINYLLAMA = Recipe(4e-4, 2 * M, 3e12)
STORIES = partial(Recipe, warmup=1000, final_lr=0.0, eps=1e-8)
WIDE = partial(LlamaConfig, vocab_size=128256, max_seq_len=8192, rope_theta=5e5)
LONG = partial(WIDE, max_seq_len=131072, rope_scaling=8.0)

SIZES = {  # D, L, H, K, F, V, context, eps, theta, factor, tied
    "tiny": (LlamaConfig(96, 4, 2, 2, 256, 2048, 256), Recipe(6e-3, 2048, None, 100, eps=1e-8)),
    "7b": (LlamaConfig(4096, 32, 32, 32, 11008, 32000, 2048, 1e-6), LLAMA1_SMALL),
    "13b": (LlamaConfig(5120, 40, 40, 40, 13824, 32000, 2048, 1e-6), LLAMA1_SMALL),
    "33b": (LlamaConfig(6656, 60, 52, 52, 17920, 32000, 2048, 1e-6), LLAMA1_LARGE),
    "65b": (LlamaConfig(8192, 80, 64, 64, 22016, 32000, 2048, 1e-5), LLAMA1_LARGE),
    "llama2-7b": (LlamaConfig(4096, 32, 32, 32, 11008, 32000, 4096), LLAMA2_SMALL),
    "llama2-13b": (LlamaConfig(5120, 40, 40, 40, 13824, 32000, 4096), LLAMA2_SMALL),
    # Never released; this is Code Llama 34B's shape, which was initialised from it.
    "llama2-34b": (LlamaConfig(8192, 48, 64, 8, 22016, 32000, 4096), LLAMA2_LARGE),
    "llama2-70b": (LlamaConfig(8192, 80, 64, 8, 28672, 32000, 4096), LLAMA2_LARGE),
    "llama3-8b": (WIDE(4096, 32, 32, 8, 14336), LLAMA3(3e-4)),
    "llama3-70b": (WIDE(8192, 80, 64, 8, 28672), LLAMA3(1.5e-4)),
    "llama3.1-8b": (LONG(4096, 32, 32, 8, 14336), LLAMA3(3e-4)),
    "llama3.1-70b": (LONG(8192, 80, 64, 8, 28672), LLAMA3(1.5e-4)),
    "llama3.1-405b": (LONG(16384, 126, 128, 8, 53248), LLAMA3_405B),
    # Pruned from 8B and distilled from 8B and 70B.
    "llama3.2-1b": (LONG(2048, 16, 32, 8, 8192, rope_scaling=32.0, tie_embeddings=True), SMALL3),
    "llama3.2-3b": (LONG(3072, 28, 24, 8, 8192, rope_scaling=32.0, tie_embeddings=True), SMALL3),
    "tinyllama-1.1b": (LlamaConfig(2048, 22, 32, 4, 5632, 32000, 2048), TINYLLAMA),
    "smollm2-135m": (LlamaConfig(576, 30, 9, 3, 1536, 49152, 8192, 1e-5, 1e5, None, True),
                     Recipe(None, None, 2e12, None, None, None, None, None, None)),
    "stories260k": (LlamaConfig(64, 5, 8, 4, 172, 512, 512, tie_embeddings=True),
                    STORIES(1e-3, 65536, 6.5536e9, betas=(0.9, 0.99), weight_decay=0.01)),
    "stories15m": (LlamaConfig(288, 6, 6, 6, 768, 32000, 256, tie_embeddings=True),
                    STORIES(5e-4, 131072, 13.1072e9)),
    "stories42m": (LlamaConfig(512, 8, 8, 8, 1376, 32000, 1024, tie_embeddings=True),
                    STORIES(None, None, None, warmup=None)),
    "stories110m": (LlamaConfig(768, 12, 12, 12, 2048, 32000, 1024, tie_embeddings=True),
                    STORIES(4e-4, 131072, 26.2144e9, warmup=None)),
}

# ---------------------------------------------------------------------------------------------
# The pieces (LLaMA, section 2.2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (section 2.2, "Pre-normalization"; Zhang and Sennrich 2019).

        y_i = g_i x_i / sqrt( (1/D) sum_j x_j^2 + eps )

    x (..., D), weight g (D,) -> (..., D). In fp32, rounded to the type of x before the weight.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)


def rope_frequencies(config: LlamaConfig, device=None) -> Tensor:
    """Angle by which pair i turns from one position to the next (Su et al. 2021), (E/2,) in fp32.

        f_i = theta^(-2i/E),  i = 0 .. E/2 - 1

    Llama 3.1 slows the slow ones down by a factor s, so that positions far beyond the C = 8192
    of its training meet angles it knows. With w_i = 2 pi / f_i, the positions that one turn takes:

        w_i < C/4: f_i      w_i > C: f_i / s      between: (1-m) f_i/s + m f_i,  m = (C/w_i - 1) / 3
    """
    pair = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    f = 1.0 / config.rope_theta ** (pair / config.head_dim)
    if config.rope_scaling is None:
        return f
    turns = 8192 * f / (2 * math.pi)  # C / w_i
    m = ((turns - 1) / 3).clamp(0, 1)
    return (1 - m) * f / config.rope_scaling + m * f


def rope_table(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the angle p f_i for each position p; positions (...) -> two of (..., E/2)."""
    angle = positions[..., None].float() * rope_frequencies(config, positions.device)
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (section 2.2; Su et al. 2021, equation 34): each pair turns by p f_i.

        [y_2i  ]   [cos p f_i   -sin p f_i] [x_2i  ]
        [y_2i+1] = [sin p f_i    cos p f_i] [x_2i+1]

    x (B, H or K, T, E), cos and sin (T, E/2) or (B, 1, T, E/2) -> like x. The rotation is
    orthogonal: with -sin it is its own inverse, and its backward.
    """
    x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    y = torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1)
    return y.flatten(-2).to(x.dtype)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """SwiGLU (section 2.2; Shazeer 2020): silu(a) * b with silu(a) = a sigmoid(a).

    In the layer a = W1 x and b = W3 x, both (..., F) -> (..., F).
    """
    return F.silu(a) * b


def visible(positions: Tensor, n_keys: int, boundaries: list[int] | None = None) -> Tensor:
    """The mask of attention: may the query at position p see the key at position s?

        s <= p  and, with a document mask, both in the same document (Llama 3, section 3.2)

    positions (T,), or (B, 1, T) where rows differ -> bool (T, S) or (B, 1, T, S), S = n_keys.
    boundaries: where documents begin in the B*T tokens laid end to end, 0 and every row's first
    token among them, then B*T; only without a cache, where S = T.
    """
    mask = torch.arange(n_keys, device=positions.device) <= positions[..., None]
    if boundaries is None:
        return mask
    starts = torch.tensor(boundaries[1:-1], dtype=torch.long, device=positions.device)
    document = torch.bucketize(torch.arange(boundaries[-1], device=positions.device), starts,
                               right=True).view(-1, 1, n_keys)
    return mask & (document[..., None] == document[..., None, :])


def attention_equation(q: Tensor, k: Tensor, v: Tensor, positions: Tensor,
                       boundaries: list[int] | None = None) -> Tensor:
    """Attention as its equation says (Vaswani et al. 2017, equation 1), to read.

        A = softmax( q k^T / sqrt(E) + mask ),  o = A v,   mask 0 where visible, else -inf

    q (B, H, T, E), k and v (B, K, S, E) -> (B, H, T, E). Query head h reads key/value head
    h // (H/K). Softmax in fp32. Holds T x S numbers a head: see attention_fused.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(q.shape[-1])
    mask = visible(positions, k.shape[2], boundaries)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype) @ v


def attention_fused(q: Tensor, k: Tensor, v: Tensor, positions: Tensor,
                    boundaries: list[int] | None = None) -> Tensor:
    """The same function by the fused kernel (section 2.4: the weights are never stored, and scores
    that the causal mask hides are not computed). Documents are taken one by one."""
    attend = partial(F.scaled_dot_product_attention, enable_gqa=True)
    if boundaries is not None:
        parts = []
        for start, end in zip(boundaries, boundaries[1:]):
            b, t = divmod(start, q.shape[2])
            here = (slice(b, b + 1), slice(None), slice(t, t + end - start))
            parts.append(attend(q[here], k[here], v[here], is_causal=True))
        o = torch.cat(parts, dim=2).squeeze(0)  # (H, B T, E)
        return o.unflatten(1, (-1, q.shape[2])).transpose(0, 1)
    one_for_all = positions.dim() == 1
    if one_for_all and q.shape[2] == k.shape[2]:
        return attend(q, k, v, is_causal=True)
    if one_for_all and q.shape[2] == 1:
        return attend(q, k, v)  # the newest token sees everything
    return attend(q, k, v, attn_mask=visible(positions, k.shape[2]))


ATTENTION = {"fused": attention_fused, "equation": attention_equation}

# ---------------------------------------------------------------------------------------------
# The layer and the model


class Linear(nn.Linear):
    """y = x W^T without bias (section 2.2), W (out, in) cast to the type that x is computed in."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """o = Wo attention(rope(Wq x), rope(Wk x), Wv x), (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.wq = Linear(config.dim, config.dim)
        self.wk = Linear(config.dim, kv_dim)
        self.wv = Linear(config.dim, kv_dim)
        self.wo = Linear(config.dim, config.dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        split = (-1, self.head_dim)  # (B, T, H E) -> (B, H, T, E), local heads only
        q, k, v = (w(x).unflatten(-1, split).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        o = attend(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)
        return self.wo(o.transpose(1, 2).flatten(2))  # (B, H, T, E) -> (B, T, D)


class FeedForward(nn.Module):
    """W2 swiglu(W1 x, W3 x), (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.w1 = Linear(config.dim, config.hidden_dim)
        self.w2 = Linear(config.hidden_dim, config.dim)
        self.w3 = Linear(config.dim, config.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class Layer(nn.Module):
    """One transformer layer, normalised before each half (section 2.2).

        h = x + Attention(RMSNorm(x)),   y = h + FeedForward(RMSNorm(h))
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        h = x + self.attention(self.attention_norm(x), cos, sin, attend)
        return h + self.feed_forward(self.ffn_norm(h))


class KVCache:
    """Keys and values of the tokens read so far, sized to the request: two of (L, B, K, S, E).

    lengths[b] tokens of row b are held. Rows may differ: what lies beyond a row's length is
    never visible, so prompts padded on the right need no mask of their own.
    """

    def __init__(self, config: LlamaConfig, batch: int, length: int, dtype=None, device=None):
        shape = (config.n_layers, batch, config.n_kv_heads, length, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.lengths = [0] * batch

    def positions(self, T: int) -> Tensor:
        """Positions of the next T tokens: (T,) if all rows are as long, else (B, 1, T)."""
        new = torch.arange(T, device=self.k.device)
        if len(set(self.lengths)) == 1:
            return new + self.lengths[0]
        return new + torch.tensor(self.lengths, device=self.k.device)[:, None, None]

    def append(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Puts k and v (B, K, T, E) at their positions; all of the layer's, two of (B, K, S, E)."""
        end = max(self.lengths) + k.shape[2]
        for cache, new in ((self.k[layer], k), (self.v[layer], v)):
            if positions.dim() == 1:
                cache[:, :, self.lengths[0]:end] = new
            else:
                row = torch.arange(len(cache), device=cache.device)[:, None]
                cache[row, :, positions[:, 0]] = new.transpose(1, 2)
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Llama(nn.Module):
    """The language model: embedding, L layers, RMSNorm, output projection (section 2.2).

        p(token t+1 | tokens 0..t) = softmax( Wo RMSNorm(h_L) )_t

    attention names an entry of ATTENTION; dtype is the type to compute in (None: that of the
    weights), while norms, softmax and loss are in fp32.
    """

    def __init__(self, config: LlamaConfig, attention: str = "fused",
                 dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.attention = ATTENTION[attention]
        self.dtype = dtype
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)

    @classmethod
    def create(cls, config: LlamaConfig, seed: int, device="cpu", **options) -> "Llama":
        """A new model with initial weights in fp32, the same on every device."""
        with torch.device("meta"):
            model = cls(config, **options)
        model.to_empty(device=device)
        model.init_weights(seed)
        return model

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Norms 1, matrices N(0, 0.02^2), those that write to the residual stream (wo and w2)
        divided by sqrt(2L) (Radford et al. 2019). Meta never published its own.

        A value depends on (seed, parameter name) alone, not on order, layout or device.
        """
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0)
                continue
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            random = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            residual = name.endswith(("wo.weight", "w2.weight"))
            std = 0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02
            p.copy_(torch.empty(p.shape).normal_(0, std, generator=random))

    def hidden(self, tokens: Tensor, cache: KVCache | None = None,
               boundaries: list[int] | None = None) -> Tensor:
        """What the output projection reads: tokens (B, T) -> RMSNorm(h_L), (B, T, D).

        With a cache, tokens go on from what it holds, and it grows by T in every row.
        """
        T = tokens.shape[1]
        positions = torch.arange(T, device=tokens.device) if cache is None else cache.positions(T)
        cos, sin = rope_table(self.config, positions)
        h = self.tok_embeddings(tokens)
        h = h.to(self.dtype or h.dtype)
        for i, layer in enumerate(self.layers):
            def attend(q: Tensor, k: Tensor, v: Tensor, i: int = i) -> Tensor:
                if cache is not None:
                    k, v = cache.append(i, k, v, positions)
                return self.attention(q, k, v, positions, boundaries)

            h = layer(h, cos, sin, attend)
        if cache is not None:
            cache.lengths = [length + T for length in cache.lengths]
        return self.norm(h)

    def logits(self, h: Tensor) -> Tensor:
        """Scores of the next token in fp32: (..., D) -> (..., V)."""
        output = self.tok_embeddings if self.output is None else self.output
        return F.linear(h, output.weight.to(h.dtype)).float()

    def forward(self, tokens: Tensor, cache: KVCache | None = None,
                boundaries: list[int] | None = None) -> Tensor:
        """tokens (B, T) -> logits (B, T, V) in fp32."""
        return self.logits(self.hidden(tokens, cache, boundaries))

    def loss(self, tokens: Tensor, targets: Tensor, boundaries: list[int] | None = None) -> Tensor:
        """Mean negative log-likelihood of the targets in nats: two of (B, T) -> scalar.

            loss = -1/(B T) sum log p(target | tokens up to here)
        """
        logits = self(tokens, boundaries=boundaries)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---------------------------------------------------------------------------------------------
# Files that hold weights


def write_params(config: LlamaConfig) -> dict:
    """Meta's params.json. It has no field for F: the last two give any F in Meta's formula."""
    params = asdict(config)
    hidden_dim, factor, _ = (params.pop(name) for name in ("hidden_dim", "rope_scaling",
                                                           "tie_embeddings"))
    scaling = {"use_scaled_rope": True, "rope_scaling_factor": factor} if factor else {}
    return {**params, **scaling, "multiple_of": hidden_dim,
            "ffn_dim_multiplier": min(1, hidden_dim / int(8 * config.dim / 3))}


def read_params(params: dict, weights: dict[str, Tensor]) -> LlamaConfig:
    """The config of a Meta folder from its params.json and the shapes of its weights.

    F = the next multiple of multiple_of from int(ffn_dim_multiplier * int(8 D / 3)). What
    params.json does not say (context, factor of the scaling) comes from the size of that shape.
    """
    try:
        values = dict(params)
        hidden = int((values.pop("ffn_dim_multiplier", None) or 1) * int(8 * values["dim"] / 3))
        multiple_of = values.pop("multiple_of")
        values["hidden_dim"] = -(-hidden // multiple_of) * multiple_of
        values["n_kv_heads"] = values.get("n_kv_heads") or values["n_heads"]
        embedding, output = weights["tok_embeddings.weight"], weights.get("output.weight")
        if values.get("vocab_size", -1) == -1:
            values["vocab_size"] = embedding.shape[0]
        values["tie_embeddings"] = output is None or (
            output.shape == embedding.shape and torch.equal(output, embedding))
        scaled = values.pop("use_scaled_rope", False)
        factor = values.pop("rope_scaling_factor", None)
        values["rope_scaling"] = (factor or 8.0) if scaled else None
        config = LlamaConfig.from_dict({"max_seq_len": 2048, **values})
    except (KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(f"params.json or the weights lack what a Llama needs: {error!r}; "
                         "try the folder as it was published") from None
    for size, _ in SIZES.values():
        like = replace(config, max_seq_len=size.max_seq_len, rope_scaling=size.rope_scaling)
        if like == size and bool(scaled) == bool(size.rope_scaling):
            return replace(size, max_seq_len=params.get("max_seq_len", size.max_seq_len),
                           rope_scaling=factor or size.rope_scaling)
    return config


def read_meta(folder: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Meta's layout: params.json and consolidated.00.pth (LLaMA 1, 2, 3 and our own runs). The
    weights are mapped into memory; only tensors are read, nothing in the file is executed."""
    file = folder / "consolidated.00.pth"
    if (folder / "consolidated.01.pth").exists():
        raise ValueError(f"{folder} holds several shards; try a checkpoint of one")
    try:
        params = json.loads((folder / "params.json").read_text(encoding="utf-8"))
        weights = dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except pickle.UnpicklingError:
        raise ValueError(f"{file} holds more than tensors, which could run code, and was not "
                         "opened; try a file of weights alone") from None
    except (RuntimeError, EOFError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} is cut short or no checkpoint ({str(error)[:100]}); "
                         "try to fetch it again") from None
    weights.pop("rope.freqs", None)  # LLaMA 1 and 2 hold this table; here it is computed
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if not all(isinstance(w, Tensor) and w.dtype in kinds and w.layout is torch.strided
               and w.device.type == "cpu" for w in weights.values()):
        raise ValueError(f"{file} is not a table of weights; try the one that was published")
    config = read_params(params, weights)
    if config.tie_embeddings:
        weights.pop("output.weight", None)
    return config, weights


def read_llama2c(path: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """llama2.c's .bin, version 0: D, F, L, H, K, V (negative: the output is not tied) and context
    as int32, then fp32 weights, each kind over all layers. Mapped into memory."""
    with open(path, "rb") as file:
        header = file.read(28)
    if len(header) < 28:
        raise ValueError(f"{path} is too short for a checkpoint; try to fetch it again")
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", header)
    try:
        config = LlamaConfig(dim, layers, heads, kv_heads, hidden, abs(vocab), context,
                             tie_embeddings=vocab > 0)
    except ValueError as error:
        raise ValueError(f"{path} is no llama2.c file of version 0: {error}") from None
    kinds = ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
             "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    order = ["tok_embeddings.weight"]
    order += [f"layers.{i}.{kind}.weight" for kind in kinds for i in range(layers)]
    order += ["norm.weight", "cos", "sin"] + ["output.weight"] * (vocab < 0)
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in Llama(config).state_dict().items()}
    shapes["cos"] = shapes["sin"] = torch.Size((context, config.head_dim // 2))  # not used
    sizes = [shapes[name].numel() for name in order]
    if path.stat().st_size != 28 + 4 * sum(sizes):
        raise ValueError(f"{path} has not the {28 + 4 * sum(sizes):,} bytes that its header asks "
                         "for: cut short, or no llama2.c file of version 0; try to fetch it again")
    data = torch.from_numpy(np.memmap(path, dtype="<f4", mode="c", offset=28))
    weights = {name: part.view(shapes[name]) for name, part in zip(order, data.split(sizes))}
    return config, {name: w for name, w in weights.items() if name not in ("cos", "sin")}


def load(path: str | Path, device="cpu", dtype: torch.dtype | None = None) -> Llama:
    """The model in a folder of Meta's layout or a llama2.c file; dtype None keeps the file's.

    Strict: an unknown or missing tensor or a wrong shape is an error that names it. Weights stay
    in the file, mapped into memory, until they are used or converted.
    """
    path = Path(path)
    if not (path.is_file() or (path / "params.json").is_file()):
        raise ValueError(f"{path} is no checkpoint; try a folder with params.json and "
                         "consolidated.00.pth, or a llama2.c .bin file")
    config, weights = read_llama2c(path) if path.is_file() else read_meta(path)
    with torch.device("meta"):
        model = Llama(config)
    wanted = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    found = {name: tuple(w.shape) for name, w in weights.items()}
    if wrong := [name for name in wanted | found if wanted.get(name) != found.get(name)]:
        detail = "; ".join(f"{name} is {found.get(name, 'missing')}, not "
                           f"{wanted.get(name, 'known')}" for name in wrong[:3])
        raise ValueError(f"{path} is not the Llama of its header: {detail} ({len(wrong)} tensors "
                         "in all); try the files as they were published")
    dtype = dtype or weights["tok_embeddings.weight"].dtype
    weights = {name: w.to(device=device, dtype=dtype) for name, w in weights.items()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def write_aside(path: Path, write) -> None:
    """Calls write(file) on a new file beside `path` and renames it when all of it is on the disk:
    what was there before stays until then."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        aside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({str(error)[:100]}) and is as it was before; "
                      "try to free space on the disk") from None


def save_meta(model: Llama, folder: Path) -> None:
    """Writes Meta's layout: consolidated.00.pth and params.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / "consolidated.00.pth", lambda file: torch.save(model.state_dict(), file))
    text = json.dumps(write_params(model.config), indent=1)
    write_aside(folder / "params.json", lambda file: file.write(text.encode()))
