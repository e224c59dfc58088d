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
    D model width (dim)    H query heads    K key/value heads    E head size, D / H (or head_size)
    F hidden width of the feed-forward    V vocabulary    L layers
"""
import contextlib
import ctypes
import hashlib
import itertools
import json
import math
import mmap
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

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
    head_size: int | None = None      # E where it is not D / H

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            if kind is bool and type(value) is bool or value is None and field.default is None:
                continue
            whole = kind in (int, int | None)
            most = 2**24 if whole else 1e30
            if type(value) not in {int, int if whole else float} or not 0 < value < most:
                wanted = {int: "a positive whole number", bool: "true or false"}
                raise ValueError(f"{field.name}={value!r} must be {wanted.get(kind, 'positive')}; "
                                 "try the published value")
        split = self.n_heads * (self.head_size or 0)  # what must be the heads' width, D unless said
        if ((split or self.dim) % (2 * self.n_heads) or self.n_heads % self.n_kv_heads
                or self.n_layers > 1024):
            raise ValueError(f"dim={self.dim} must split into n_heads={self.n_heads} of even size, "
                             f"they into n_kv_heads={self.n_kv_heads} groups, and n_layers="
                             f"{self.n_layers} be 1024 at most; try the published shape")
        if split == self.dim:
            object.__setattr__(self, "head_size", None)  # one way to write a config

    @classmethod
    def from_dict(cls, values: dict) -> "LlamaConfig":
        """The config of these fields; a field that does not exist is an error that names it."""
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"unknown field {unknown[0]!r}; try one of {', '.join(known)}")
        return cls(**values)

    @property
    def head_dim(self) -> int:
        return self.head_size or self.dim // self.n_heads

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


def fp32(x: Tensor) -> Tensor:
    """x in fp32; float64 stays, for gradcheck."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float, r: Tensor | None = None
             ) -> tuple[Tensor, Tensor]:
    """RMSNorm (section 2.2, "Pre-normalization"; Zhang and Sennrich 2019).

        y_i = g_i r x_i,   r = 1 / sqrt( (1/D) sum_j x_j^2 + eps )

    x (..., D), weight g (D,) -> y (..., D), r (..., 1). In fp32, rounded to the type of x before
    the weight. A backward that kept r gives it back, and y is recomputed from it.
    """
    if r is None:
        r = torch.rsqrt(fp32(x).pow(2).mean(-1, keepdim=True) + eps)
    return (x * r).to(x.dtype) * weight.to(x.dtype), r


def rms_norm_backward(dy: Tensor, x: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """dx (..., D) and dg (D,) of rms_norm. With n = r x and dn = g dy, from dr/dx_i = -r^3 x_i / D:

        dx = r ( dn - n (1/D) sum_j n_j dn_j ),   dg = sum over tokens of dy n
    """
    n, dn = x * r, fp32(dy) * weight
    dx = (dn - n * (n * dn).mean(-1, keepdim=True)) * r
    return dx.to(x.dtype), (dy * n).flatten(0, -2).sum(0)


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
    """cos and sin of the angle p f_i for each position p; positions (T,) or (B, T) -> two of
    (T, 1, E/2) or (B, T, 1, E/2), the same for every head."""
    angle = positions[..., None, None].float() * rope_frequencies(config, positions.device)
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (section 2.2; Su et al. 2021, equation 34): each pair turns by p f_i.

        [y_2i  ]   [cos p f_i   -sin p f_i] [x_2i  ]
        [y_2i+1] = [sin p f_i    cos p f_i] [x_2i+1]

    x (B, T, H or K, E), cos and sin of rope_table -> like x. The rotation R_p is orthogonal: with
    -sin it is its own inverse, and its backward. q k^T = x_q R_(s-p) x_k knows distances alone, so
    a document may begin at any position: its logits are the same.
    """
    x0, x1 = fp32(x).unflatten(-1, (-1, 2)).unbind(-1)
    y = torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1)
    return y.flatten(-2).to(x.dtype)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """SwiGLU (section 2.2; Shazeer 2020): silu(a) * b with silu(a) = a sigmoid(a).

    In the layer a = W1 x and b = W3 x, both (..., F) -> (..., F).
    """
    return F.silu(a) * b


def swiglu_backward(dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """da and db of swiglu, all (..., F). With s = sigmoid(a):

        da = dy b s (1 + a (1 - s)),   db = dy a s
    """
    return torch.ops.aten.silu_backward(dy * b, a), dy * F.silu(a)


# Attention, three times: its equation, the equation in tiles, and the fused kernel. Each is a pair:
#   forward(q, k, v, positions, boundaries) -> o, lse        q, o (B, H, T, E), k, v (B, K, S, E)
#   backward(do, q, k, v, o, lse, boundaries) -> dq, dk, dv  in training, where S = T
# lse (B, H, T), the logsumexp of the scores, is all that backward needs to have A again. Query
# head h reads key/value head h // (H/K). positions: the last T of 0 .. S-1, or (B, T) where rows
# differ. boundaries: where documents begin in the B*T tokens laid end to end, 0 and every row's
# first token among them, then B*T, as int32; only without a cache, where S = T.


def first_visible(positions: Tensor, boundaries: Tensor | None) -> Tensor:
    """The first key that each query sees, like positions or (B, T): 0, or its document's first
    token (Llama 3, section 3.2). The last one is its own position."""
    if boundaries is None:
        return torch.zeros_like(positions)
    T = positions.shape[-1]
    token = torch.arange(boundaries[-1], device=positions.device)
    start = boundaries[torch.bucketize(token, boundaries, right=True) - 1]
    return (start % T).view(-1, T)


def visible(positions: Tensor, first: Tensor, keys: Tensor) -> Tensor:
    """The mask of attention: may the query at position p see the key at position s?

        first visible <= s <= p

    positions and first (T,) or (B, T), keys (S,) -> bool (T, S) or (B, 1, T, S).
    """
    mask = (first[..., None] <= keys) & (keys <= positions[..., None])
    return mask if mask.dim() == 2 else mask[:, None]


def per_query_head(x: Tensor, like: Tensor) -> Tensor:
    """Keys or values (B, K, S, E), each repeated for the H/K query heads that read it."""
    groups = like.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def masked_scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """q k^T / sqrt(E) where the mask is true, else -inf: (B, H, T, S) in fp32."""
    scores = fp32(q @ per_query_head(k, q).mT).mul_(1 / math.sqrt(q.shape[-1]))
    return scores.masked_fill_(~mask, -math.inf)


def attention_equation(q: Tensor, k: Tensor, v: Tensor, positions: Tensor,
                       boundaries: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention as its equation says (Vaswani et al. 2017, equation 1), to read.

        S = q k^T / sqrt(E) + mask,   A = softmax(S),   o = A v,   lse = log sum exp S

    mask 0 where visible, else -inf. Softmax in fp32. Holds T x S numbers a head.
    """
    keys = torch.arange(k.shape[2], device=k.device)
    scores = masked_scores(q, k, visible(positions, first_visible(positions, boundaries), keys))
    return scores.softmax(-1).to(v.dtype) @ per_query_head(v, q), scores.logsumexp(-1)


def tile_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor,
                  mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the scores of some queries and some keys (all of them, or a tile) give to dq, dk, dv.

        A = exp(S - lse)   dv = A^T do   dA = do v^T   dS = A (dA - delta)
        dq = dS k / sqrt(E)   dk = dS^T q / sqrt(E)

    delta (B, H, T) = sum_e do_e o_e, which is the sum over s of A dA in softmax's own backward.
    """
    a = masked_scores(q, k, mask).sub_(lse[..., None]).exp_()
    da = fp32(do @ per_query_head(v, q).mT)
    ds = da.sub_(delta[..., None]).mul_(a).mul_(1 / math.sqrt(q.shape[-1])).to(q.dtype)
    dk, dv = ds.mT @ q, a.to(do.dtype).mT @ do
    groups = q.shape[1] // k.shape[1]  # a key head's gradient: the sum over those that read it
    dk, dv = (d.unflatten(1, (-1, groups)).sum(2) for d in (dk, dv))
    return ds @ per_query_head(k, q), dk, dv


def attention_equation_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
                                boundaries: Tensor | None = None) -> tuple[Tensor, ...]:
    """dq, dk, dv of attention_equation: one tile that holds everything."""
    positions = torch.arange(q.shape[2], device=q.device)
    mask = visible(positions, first_visible(positions, boundaries), positions)
    return tile_backward(do, q, k, v, lse, (fp32(do) * o).sum(-1), mask)


def tiles(positions: Tensor, boundaries: Tensor | None, n_keys: int, size: int):
    """Every block of `size` queries with its tiles, (keys, mask), in which one of them sees one."""
    first = first_visible(positions, boundaries)
    keys = torch.arange(n_keys, device=positions.device)
    for i in range(0, positions.shape[-1], size):
        p, f = positions[..., i:i + size], first[..., i:i + size]
        low, end = int(f.min()), int(p.max()) + 1
        columns = [slice(j, min(j + size, end)) for j in range(low, end, size)]
        yield slice(i, i + size), [(c, visible(p, f, keys[c])) for c in columns]


def attention_tiled(q: Tensor, k: Tensor, v: Tensor, positions: Tensor,
                    boundaries: Tensor | None = None, size: int = 128) -> tuple[Tensor, Tensor]:
    """The equation with an online softmax (Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023,
    algorithm 1): never T x S numbers, only size x size tiles, and none that is all masked.

    Over the tiles of a block of queries, with m the largest score so far, l = sum exp(S - m) and
    u = sum exp(S - m) v:

        m' = max(m, max S)   c = exp(m - m')   l' = c l + sum exp(S - m')   u' = c u + exp(S - m') v

    At the end o = u / l and lse = m + log l.
    """
    blocks = []
    for rows, columns in tiles(positions, boundaries, k.shape[2], size):
        u = l = torch.zeros((), device=q.device)
        m = u - 1e30  # finite: in one tile a query may see nothing
        for here, mask in columns:
            scores = masked_scores(q[:, :, rows], k[:, :, here], mask)
            before, m = m, torch.maximum(m, scores.amax(-1, keepdim=True))
            p, c = (scores - m).exp(), (before - m).exp()
            l = c * l + p.sum(-1, keepdim=True)
            u = c * u + p.to(v.dtype) @ per_query_head(v[:, :, here], q)
        blocks.append(((u / l).to(q.dtype), (m + l.log())[..., 0]))
    o, lse = (torch.cat(parts, dim=2) for parts in zip(*blocks))
    return o, lse


def attention_tiled_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
                             boundaries: Tensor | None = None, size: int = 128
                             ) -> tuple[Tensor, ...]:
    """dq, dk, dv of attention_tiled, tile by tile from lse (Dao 2023, algorithm 2)."""
    positions, delta = torch.arange(q.shape[2], device=q.device), (fp32(do) * o).sum(-1)
    dq, dk, dv = (torch.zeros_like(z, dtype=delta.dtype) for z in (q, k, v))
    for rows, columns in tiles(positions, boundaries, k.shape[2], size):
        for here, mask in columns:
            parts = tile_backward(do[:, :, rows], q[:, :, rows], k[:, :, here], v[:, :, here],
                                  lse[:, :, rows], delta[:, :, rows], mask)
            for whole, where, part in zip((dq, dk, dv), (rows, here, here), parts):
                whole[:, :, where] += part
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def has_flash(q: Tensor) -> bool:
    """May a flash kernel be called by hand on tensors like q?"""
    return q.device.type == "cpu" or (
        q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0))


def by_document(T: int, boundaries: Tensor, *tensors: Tensor):
    """Views (1, heads, t, ...) of (B, heads, T, ...), all tensors together, on each document."""
    for start, end in itertools.pairwise(boundaries.tolist()):
        yield [x[start // T:start // T + 1, :, start % T:start % T + end - start] for x in tensors]


def attention_fused(q: Tensor, k: Tensor, v: Tensor, positions: Tensor,
                    boundaries: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The same function by fused kernels (section 2.4: the weights are never stored, and scores
    that the mask hides are not computed). Documents: one by one on a CPU, by the kernel for
    sequences of any length on CUDA. lse is None where no flash kernel gives it."""
    flash, T, rows_alike = torch.ops.aten, q.shape[2], positions.dim() == 1
    if rows_alike and T == 1:  # the newest token sees everything: a group's heads are its queries
        groups = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
        return F.scaled_dot_product_attention(groups, k, v).flatten(1, 2).unsqueeze(2), None
    square = rows_alike and T == k.shape[2]
    if not (square and has_flash(q)):
        causal = square and boundaries is None
        mask = None
        if not causal:
            keys = torch.arange(k.shape[2], device=k.device)
            mask = visible(positions, first_visible(positions, boundaries), keys)
        if not has_flash(q):  # torch's other kernels do not know groups, or hold T x S numbers
            k, v = per_query_head(k, q), per_query_head(v, q)
        attend = F.scaled_dot_product_attention
        return attend(q, k, v, mask, is_causal=causal, enable_gqa=True), None
    if q.device.type == "cpu":
        kernel = partial(flash._scaled_dot_product_flash_attention_for_cpu, is_causal=True)
        if boundaries is None:
            return kernel(q, k, v)
        parts = zip(*(kernel(*part) for part in by_document(T, boundaries, q, k, v)))
        o, lse = (torch.cat(part, dim=2).squeeze(0) for part in parts)  # (heads, B T, ...)
        return o.unflatten(1, (-1, T)).transpose(0, 1), lse.unflatten(1, (-1, T)).transpose(0, 1)
    rows = 1 if boundaries is None else 2
    laid = [x.transpose(1, 2).flatten(0, rows - 1) for x in (q, k, v)]
    o, lse, *_ = flash._flash_attention_forward(*laid, boundaries, boundaries, T, T, 0.0, True,
                                                False)
    return o.view(-1, T, *o.shape[-2:]).transpose(1, 2), lse


def attention_fused_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor,
                             lse: Tensor | None, boundaries: Tensor | None = None
                             ) -> tuple[Tensor, ...]:
    """dq, dk, dv by the kernels' own backward; without lse, by autograd on the forward again."""
    flash, T = torch.ops.aten, q.shape[2]
    if lse is None:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            again, _ = attention_fused(*inputs, torch.arange(T, device=q.device), boundaries)
        return torch.autograd.grad(again, inputs, do)
    if q.device.type == "cpu":
        kernel = partial(flash._scaled_dot_product_flash_attention_for_cpu_backward, dropout_p=0.0,
                         is_causal=True)
        if boundaries is None:
            return kernel(do, q, k, v, o, lse)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for *part, dq, dk, dv in by_document(T, boundaries, do, q, k, v, o, lse, *grads):
            for whole, d in zip((dq, dk, dv), kernel(*part)):
                whole.copy_(d)
        return tuple(grads)
    rows = 1 if boundaries is None else 2
    laid = [x.transpose(1, 2).flatten(0, rows - 1) for x in (do, q, k, v, o)]
    random = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none
    grads = flash._flash_attention_backward(*laid, lse, boundaries, boundaries, T, T, 0.0, True,
                                            random, random)
    return tuple(d.view(-1, T, *d.shape[-2:]).transpose(1, 2) for d in grads)


BACKWARD = ("manual", "autograd", "recompute")
ATTENTION = {"fused": (attention_fused, attention_fused_backward),
             "tiled": (attention_tiled, attention_tiled_backward),
             "equation": (attention_equation, attention_equation_backward)}

# ---------------------------------------------------------------------------------------------
# Model and sequence parallelism (section 2.4; Korthikanti et al. 2022)


class Alone:
    """A rank that holds every layer whole has nothing to exchange."""
    rank, size = 0, 1

    def gather(self, x: Tensor, T: int) -> Callable[[], Tensor]:
        return lambda: x

    scatter_sum = gather

    def g(self, x: Tensor, T: int) -> Tensor:
        return x

    g_bar = g


class TensorParallel(Alone):
    """t ranks share each layer: rows of Wq, Wk, Wv, W1, W3 (heads, hidden units), columns of Wo and
    W2, W being (out, in). What Wo and W2 put out is a sum over ranks. Korthikanti's exchanges, each
    pair the other's backward:

               forward                  backward                between
        f      identity                 all-reduce              tensor parallelism alone
        f_bar  all-reduce               identity
        g      all-gather of tokens     reduce-scatter          with sequence parallelism
        g_bar  reduce-scatter           all-gather of tokens

    An all-reduce is a reduce-scatter and an all-gather. So with g and g_bar in place of f and f_bar
    no more bytes travel (but for the inputs of products, which LayerByHand gathers again instead of
    saving them whole), and norms, residual stream and what is saved of them are split too: the
    B T tokens, laid end to end, into t stretches of N/t. What f does for the weights of norms, of
    which each rank saw its own tokens alone, is done once a step (train.py, Engine.complete).

    gather (N/t, ...) -> (N/T, T, ...) and scatter_sum (B, T, ...) -> (N/t, ...) begin at once
    and return a function that waits for the result: the backward multiplies meanwhile.
    """

    def __init__(self, group):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def gather(self, x: Tensor, T: int) -> Callable[[], Tensor]:
        whole = x.new_empty(self.size * len(x), *x.shape[1:])
        work = dist.all_gather_single(whole, x.contiguous(), self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return whole.unflatten(0, (-1, T))
        return wait

    def scatter_sum(self, x: Tensor, T: int) -> Callable[[], Tensor]:
        x = x.flatten(0, 1)
        mine = x.new_empty(len(x) // self.size, *x.shape[1:])
        work = dist.reduce_scatter_single(mine, x, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return mine
        return wait

    def g(self, x: Tensor, T: int) -> Tensor:
        return Exchange.apply(x, T, self.gather, self.scatter_sum)

    def g_bar(self, x: Tensor, T: int) -> Tensor:
        return Exchange.apply(x, T, self.scatter_sum, self.gather)


class Exchange(torch.autograd.Function):
    """g or g_bar under autograd."""

    @staticmethod
    def forward(ctx, x, T, there, back):
        ctx.T, ctx.back = T, back
        return there(x, T)()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return ctx.back(dy, ctx.T)(), None, None, None


def local(weight: Tensor) -> Tensor:
    """What this rank holds of a weight, with its gradient; all of it if it is no DTensor."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def offsets(weight: Tensor) -> tuple[int, ...]:
    """Where in the whole weight this rank's part begins, for each axis."""
    if not hasattr(weight, "to_local"):
        return (0,) * weight.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    return compute_local_shape_and_global_offset(weight.shape, weight.device_mesh,
                                                 weight.placements)[1]


# ---------------------------------------------------------------------------------------------
# The layer and the model


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """y = x W^T (section 2.2: no bias), W (out, in) cast to the type that x is computed in."""
    return F.linear(x, local(weight).to(x.dtype))


class Linear(nn.Linear):

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # where torch would load its compiler to fill nothing
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, local(self.weight), self.eps)[0]


class Attention(nn.Module):
    """o = Wo attention(rope(Wq x), rope(Wk x), Wv x), (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        q_dim, kv_dim = (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
        self.wq = Linear(config.dim, q_dim)
        self.wk = Linear(config.dim, kv_dim)
        self.wv = Linear(config.dim, kv_dim)
        self.wo = Linear(q_dim, config.dim)

    def products(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys side by side, which turn together, and values."""
        return torch.cat((self.wq(x), self.wk(x)), -1), self.wv(x)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        split = (-1, self.head_dim)  # (B, T, H E) -> (B, T, H, E), local heads only
        qk, v = (z.unflatten(-1, split) for z in self.products(x))
        n_kv = v.shape[2]
        q, k = apply_rope(qk, cos, sin).split((qk.shape[2] - n_kv, n_kv), dim=2)
        o, _ = attend(*(z.transpose(1, 2) for z in (q, k, v)))  # (B, H, T, E)
        return self.wo(o.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """W2 swiglu(W1 x, W3 x), (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.w1 = Linear(config.dim, config.hidden_dim)
        self.w2 = Linear(config.hidden_dim, config.dim)
        self.w3 = Linear(config.dim, config.hidden_dim)

    def products(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.w1(x), self.w3(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(*self.products(x)))


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend, attend_backward=None,
                tp: Alone = Alone()) -> Tensor:
        """attend(q, k, v) -> o, lse; with attend_backward, the layer's own backward by hand. With
        tensor parallelism x and y are this rank's tokens, (N/t, D), and the weights its parts."""
        if attend_backward is not None:
            a, f = self.attention, self.feed_forward
            modules = (self.attention_norm, a.wq, a.wk, a.wv, a.wo, self.ffn_norm, f.w1, f.w2, f.w3)
            return LayerByHand.apply(x, cos, sin, attend, attend_backward, self.ffn_norm.eps, tp,
                                     *(local(m.weight) for m in modules))
        T = len(cos)
        h = x + tp.g_bar(self.attention(tp.g(self.attention_norm(x), T), cos, sin, attend), T)
        return h + tp.g_bar(self.feed_forward(tp.g(self.ffn_norm(h), T)), T)


class LayerByHand(torch.autograd.Function):
    """The layer with its backward written out (section 2.4): what linear layers put out is saved,
    what is cheap is computed again.

    Forward, R the rotation of apply_rope, g and g_bar of TensorParallel (nothing on one device):

        n = g(rms_norm(x))    q, k, v = R(n Wq^T), R(n Wk^T), n Wv^T    o, lse = attention(q, k, v)
        h = x + g_bar(o Wo^T)     m = g(rms_norm(h))    a, b = m W1^T, m W3^T    s = swiglu(a, b)
        y = h + g_bar(s W2^T)

    Backward, dz for the gradient of the loss by z. A product z = u W^T gives du = dz W and, summed
    over tokens, dW = dz^T u; a sum hands its gradient to both terms; what g and g_bar bring is
    asked for early (<-) and is under way while the products on the right are computed:

        dY <- g(dy)    m <- g(rms_norm(h))
        ds = dY W2                               da, db = swiglu_backward(ds)
        dm <- g_bar(da W1 + db W3)               dW2 = dY^T s    dW1 = da^T m    dW3 = db^T m
        dh = dy + rms_norm_backward(dm)
        dH <- g(dh)    n <- g(rms_norm(x))
        do = dH Wo                               dq, dk, dv = attention_backward(do)
        dq, dk = R^-1(dq), R^-1(dk)
        dn <- g_bar(dq Wq + dk Wk + dv Wv)       dWo = dH^T o    dWq, dWk, dWv = (dq, dk, dv)^T n
        dx = dh + rms_norm_backward(dn)

    A token's bytes in a layer of 7B in bf16 (D = 4096, F = 11008, H = K = 32, E = 128):

        saved                           elements           bytes
        x, q, o, h                      4 D                32,768
        k, v                            2 K E              16,384
        a, b                            2 F                44,032     93,184 so far
        lse, r of each norm             H + 2, in fp32        136     93,320 in all
        computed again: n, m, s, silu(a) and, a tile at a time, the weights of attention

    Autograd keeps 153,600 and more. t ranks of tensor parallelism keep a t-th each. The product for
    the gradient of a frozen weight is left out.
    """

    @staticmethod
    def forward(ctx, x, cos, sin, attend, attend_backward, eps, tp, *weights):
        g_n, wq, wk, wv, wo, g_m, w1, w2, w3 = weights
        n, r_n = rms_norm(x, g_n, eps)
        n = tp.gather(n, len(cos))()
        split = (-1, 2 * cos.shape[-1])  # (B, T, H E) -> (B, T, H, E)
        q, k, v = (linear(n, w).unflatten(-1, split) for w in (wq, wk, wv))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, H, T, E)
        o, lse = attend(q, k, v)
        h = x + tp.scatter_sum(linear(o.transpose(1, 2).flatten(2), wo), len(cos))()
        m, r_m = rms_norm(h, g_m, eps)
        m = tp.gather(m, len(cos))()
        a, b = linear(m, w1), linear(m, w3)
        ctx.save_for_backward(x, r_n, q, k, v, o, lse, h, r_m, a, b, cos, sin, *weights)
        ctx.attend_backward, ctx.tp = attend_backward, tp
        return h + tp.scatter_sum(linear(swiglu(a, b), w2), len(cos))()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, r_n, q, k, v, o, lse, h, r_m, a, b, cos, sin, *weights = ctx.saved_tensors
        g_n, wq, wk, wv, wo, g_m, w1, w2, w3 = weights
        _, need_q, need_k, need_v, need_o, _, need_1, need_2, need_3 = ctx.needs_input_grad[-9:]
        tp, T = ctx.tp, len(cos)

        def by_input(dz: Tensor, w: Tensor) -> Tensor:
            return dz @ w.to(dz.dtype)

        def by_weight(dz: Tensor, u: Tensor, wanted: bool) -> Tensor | None:
            return (dz.flatten(0, 1).T @ u.flatten(0, 1)).to(w1.dtype) if wanted else None

        wait_dy, wait_m = tp.gather(dy, T), tp.gather(rms_norm(h, g_m, 0, r_m)[0], T)
        dy_whole = wait_dy()
        da, db = swiglu_backward(by_input(dy_whole, w2), a, b)
        wait_dm = tp.scatter_sum(by_input(da, w1) + by_input(db, w3), T)
        dw2, m = by_weight(dy_whole, swiglu(a, b), need_2), wait_m()
        dw1, dw3 = by_weight(da, m, need_1), by_weight(db, m, need_3)
        dh, dg_m = rms_norm_backward(wait_dm(), h, r_m, g_m)
        dh += dy
        wait_dh, wait_n = tp.gather(dh, T), tp.gather(rms_norm(x, g_n, 0, r_n)[0], T)
        dh_whole = wait_dh()
        do = by_input(dh_whole, wo).unflatten(-1, (-1, q.shape[-1])).transpose(1, 2)
        dq, dk, dv = (d.transpose(1, 2) for d in ctx.attend_backward(do, q, k, v, o, lse))
        dq, dk = apply_rope(dq, cos, -sin), apply_rope(dk, cos, -sin)
        dq, dk, dv = (d.flatten(2) for d in (dq, dk, dv))
        wait_dn = tp.scatter_sum(by_input(dq, wq) + by_input(dk, wk) + by_input(dv, wv), T)
        dwo, n = by_weight(dh_whole, o.transpose(1, 2).flatten(2), need_o), wait_n()
        dwq, dwk, dwv = by_weight(dq, n, need_q), by_weight(dk, n, need_k), by_weight(dv, n, need_v)
        dx, dg_n = rms_norm_backward(wait_dn(), x, r_n, g_n)
        dx += dh
        return (dx, *[None] * 6, dg_n, dwq, dwk, dwv, dwo, dg_m, dw1, dw2, dw3)


class KVCache:
    """Keys and values of the tokens read so far, sized to the request: held[layer] is two of
    (B, K, S, E). Its rotary table is made once.

    lengths[b] tokens of row b are held. Rows may differ: what lies beyond a row's length is
    never visible, so prompts padded on the right need no mask of their own.
    """

    def __init__(self, config: LlamaConfig, batch: int, length: int, dtype=None, device=None):
        zeros = partial(torch.zeros, dtype=dtype, device=device)
        shape = (batch, config.n_kv_heads, length, config.head_dim)
        self.held = [(zeros(shape), zeros(shape)) for _ in range(config.n_layers)]
        self.keys = torch.arange(length, device=device)
        self.cos, self.sin = rope_table(config, self.keys)
        self.lengths = [0] * batch

    def positions(self, T: int) -> Tensor:
        """Positions of the next T tokens: (T,) if all rows are as long, else (B, T)."""
        if len(set(self.lengths)) == 1:
            return self.keys[self.lengths[0]:self.lengths[0] + T]
        return self.keys[:T] + torch.tensor(self.lengths, device=self.keys.device)[:, None]

    def take(self, other: "KVCache", rows: list[int]) -> None:
        """Begins each row with what a row of another cache, of the same kind, holds."""
        for mine, theirs in zip(self.held, other.held):
            for past, new in zip(mine, theirs):
                past[:, :, :new.shape[2]] = new[rows]
        self.lengths = [other.lengths[row] for row in rows]


def through(layers, held, h: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, keys: Tensor,
            attention) -> Tensor:
    """h (B, T, D) through layers with a cache: held[i] takes in a layer's new keys and values at
    `positions`; keys (S,) are those seen by now. For one token, generate.py compiles this."""
    end = len(keys)
    for layer, pair in zip(layers, held):
        def attend(q: Tensor, k: Tensor, v: Tensor, pair=pair) -> tuple[Tensor, Tensor | None]:
            for past, new in zip(pair, (k, v)):
                if positions.dim() == 1:
                    past[:, :, end - new.shape[2]:end] = new
                else:
                    row = torch.arange(len(past), device=past.device)[:, None]
                    past[row, :, positions] = new.transpose(1, 2).to(past.dtype)
            k, v = (past[:, :, :end] for past in pair)
            o, lse = attention(q.to(k.dtype), k, v, positions)
            return o.to(q.dtype), lse

        h = layer(h, cos, sin, attend)
    return h


class Llama(nn.Module):
    """The language model: embedding, L layers, RMSNorm, output projection (section 2.2).

        p(token t+1 | tokens 0..t) = softmax( Wo RMSNorm(h_L) )_t

    attention names an entry of ATTENTION; dtype is the type to compute in (None: that of the
    weights), while norms, softmax and loss are in fp32. backward: `manual` is LayerByHand,
    `autograd` torch's own, `recompute` keeps the input of each layer alone and computes the rest
    again (Chen et al. 2016).
    """

    def __init__(self, config: LlamaConfig, attention: str = "fused", backward: str = "manual",
                 dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.attention = ATTENTION[attention]
        self.backward = backward
        self.dtype = dtype
        self.through_one = None  # generate.py's: `through` for one token, compiled
        self.tp = Alone()
        shape = config.vocab_size, config.dim
        self.tok_embeddings = nn.Embedding(*shape, _weight=torch.zeros(shape))
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

        A row depends on (seed, parameter name, row) alone, not on order, layout or device: random
        numbers by counter (Salmon et al. 2011), of which a rank draws the rows that it holds.
        """
        for name, p in self.named_parameters():
            if p.dim() == 1:
                local(p).fill_(1.0)
                continue
            key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
            residual = name.endswith(("wo.weight", "w2.weight"))
            std = 0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02
            (first, left), part = offsets(p), local(p)
            drawn = np.empty(part.shape, np.float32)
            for row, values in enumerate(drawn, first):
                random = np.random.Generator(np.random.Philox(key=key, counter=row << 64))
                whole = random.standard_normal(p.shape[1], dtype=np.float32)
                np.multiply(whole[left:left + len(values)], np.float32(std), out=values)
            part.copy_(torch.from_numpy(drawn))

    def hidden(self, tokens: Tensor, cache: KVCache | None = None,
               boundaries: Tensor | None = None) -> Tensor:
        """What the output projection reads: tokens (B, T) -> RMSNorm(h_L), (B, T, D).

        With a cache, tokens go on from what it holds, and it grows by T in every row.
        """
        h = self.embed(tokens)
        if cache is None:
            h = self.without_cache(h, boundaries, tokens.shape[1])
        else:
            T = tokens.shape[1]
            positions, keys = cache.positions(T), cache.keys[:max(cache.lengths) + T]
            cos, sin = cache.cos[positions], cache.sin[positions]
            run = partial(through, self.layers)
            if self.through_one and T == 1 < len(keys) and positions.dim() == 1:
                run = self.through_one
            h = run(cache.held, h, cos, sin, positions, keys, self.attention[0])
            cache.lengths = [length + T for length in cache.lengths]
        return self.norm(h)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, D). With tensor parallelism a rank knows V/t rows, those of others add
        zero, and it goes on with N/t tokens: (N/t, D)."""
        if self.tp.size == 1:
            h = self.tok_embeddings(tokens)
            return h.to(self.dtype or h.dtype)
        rows = local(self.tok_embeddings.weight)
        row = tokens - self.tp.rank * len(rows)
        mine = (0 <= row) & (row < len(rows))
        h = F.embedding(row.where(mine, 0), rows) * mine[..., None]
        return self.tp.g_bar(h.to(self.dtype or h.dtype), tokens.shape[1])

    def without_cache(self, h: Tensor, boundaries: Tensor | None, T: int) -> Tensor:
        """h of embed through the layers, for rows of T; with a backward if gradients are wanted."""
        positions = torch.arange(T, device=h.device)
        cos, sin = rope_table(self.config, positions)
        attention, attention_backward = self.attention
        attend = partial(attention, positions=positions, boundaries=boundaries)
        by_hand = None
        if (self.backward == "manual" and torch.is_grad_enabled()
                and not torch._C._is_any_autocast_enabled()):  # which autograd alone honours
            by_hand = partial(attention_backward, boundaries=boundaries)
        for layer in filter(None, self.layers):  # None: another rank's, in a pipeline
            if self.backward == "recompute" and torch.is_grad_enabled():
                h = checkpoint(layer, h, cos, sin, attend, None, self.tp, use_reentrant=False)
            else:
                h = layer(h, cos, sin, attend, by_hand, self.tp)
        return h

    def logits(self, h: Tensor) -> Tensor:
        """Scores of the next token in fp32: (..., D) -> (..., V)."""
        return fp32(linear(h, self.output_weight) if self.output is None else self.output(h))

    @property
    def output_weight(self) -> Tensor:
        return local((self.tok_embeddings if self.output is None else self.output).weight)

    def forward(self, tokens: Tensor, cache: KVCache | None = None,
                boundaries: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> logits (B, T, V) in fp32."""
        return self.logits(self.hidden(tokens, cache, boundaries))

    @torch.no_grad()
    def nll(self, tokens: Tensor, targets: Tensor, boundaries: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of each target in nats: two of (B, T) -> (B, T), no gradient."""
        h = self.hidden(tokens, boundaries=boundaries).flatten(0, 1)
        rows = rows_at_once(self.config.vocab_size, self.config.dim)
        parts = zip(h.split(rows), targets.flatten().split(rows))
        return torch.cat([F.cross_entropy(self.logits(part), wanted, reduction="none")
                          for part, wanted in parts]).view_as(targets)

    def loss(self, tokens: Tensor, targets: Tensor, boundaries: Tensor | None = None) -> Tensor:
        """Mean negative log-likelihood of the targets in nats: two of (B, T) -> scalar. A negative
        target stands for none and adds 0.

            loss = -1/(B T) sum log p(target | tokens up to here)
        """
        return self.mean_loss(self.hidden(tokens, boundaries=boundaries), targets)

    def mean_loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """The loss from RMSNorm(h_L), (B, T, D) or, with tensor parallelism, (N/t, D)."""
        return MeanLoss.apply(h.flatten(0, -2), self.output_weight, targets.flatten(), self.tp)


def rows_at_once(V: int, D: int) -> int:
    """Rows of logits that next_token_nll holds: 34 MB of them in fp32, which processors like; up
    to four times as many where D is large, and with it the cost of each chunk's sum into dW."""
    return max(1, 2**23 // V, min(D // 2, 2**25 // V))


def next_token_nll(h: Tensor, weight: Tensor, targets: Tensor, wanted=(False, False),
                   tp: Alone = Alone()) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cross entropy of the output projection, and in the same pass the gradient of its sum, for
    some rows at a time: the N x V logits are never all in memory.

        z = h W^T    p = softmax(z)    nll_i = -log p_i,target
        dz = p - onehot(target)        dh = dz W     dW = dz^T h

    h (N, D), W (V, D), targets (N,) -> nll (N,) in fp32, and dh (N, D), dW (V, D) where wanted.
    Where a target is negative there is none: its nll and its dz are 0.
    With tensor parallelism h is (N/t, D) and W this rank's (V/t, D): of each token ranks tell each
    other the logsumexp of their part of z and z_target, 0 where another has it.
    """
    w, rows = weight.to(h.dtype), rows_at_once(*weight.shape)
    h = tp.gather(h, 1)().view(-1, h.shape[-1])
    asked, targets = (targets >= 0)[:, None], targets - tp.rank * len(w)
    nll = torch.empty(len(h), dtype=fp32(h[:0]).dtype, device=h.device)
    dh = torch.empty_like(h) if wanted[0] else None
    dw = None
    for at in range(0, len(h), rows):
        here = slice(at, at + rows)
        z, target = fp32(F.linear(h[here], w)), targets[here, None]
        mine = (0 <= target) & (target < len(w)) if tp.size > 1 else target >= 0
        target = target.where(mine, 0)
        p = z.softmax(-1)
        # log p_t = z_t - (max z - log max p), without the exp of another log_softmax over all V
        logsumexp = z.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
        z_target = z.gather(1, target) * mine
        if tp.size > 1:
            both = tp.gather(torch.stack((logsumexp, z_target)), 2)()  # (t, 2, rows, 1)
            whole, z_target = both[:, 0].logsumexp(0), both[:, 1].sum(0)
            p *= (logsumexp - whole).exp()
            logsumexp = whole
        nll[here] = ((logsumexp - z_target) * asked[here])[:, 0]
        if not any(wanted):
            continue
        dz = p.scatter_add_(1, target, -mine.to(p.dtype)).to(h.dtype)
        if wanted[0]:
            dh[here] = (dz @ w).mul_(asked[here])
        if wanted[1]:
            part = dz.T @ (h[here] * asked[here])
            dw = part if dw is None else fp32(dw).add_(part)  # one chunk alone needs no sum
    if wanted[0]:
        dh = tp.scatter_sum(dh[None], 0)().view(-1, dh.shape[-1])
    return nll, dh, dw


class MeanLoss(torch.autograd.Function):
    """The mean of next_token_nll, whose gradient is there before backward asks for it."""

    @staticmethod
    def forward(ctx, h, weight, targets, tp):
        nll, dh, dw = next_token_nll(h, weight, targets, ctx.needs_input_grad[:2], tp)
        ctx.save_for_backward(dh, dw)
        ctx.count = len(nll)
        return nll.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        # In place, to spare a copy: torch refuses a second backward, which would be scaled twice.
        scale = dloss / ctx.count
        return *(None if d is None else d.mul_(scale) for d in ctx.saved_tensors), None, None


# ---------------------------------------------------------------------------------------------
# Files that hold weights


def give_back(x: Tensor) -> None:
    """Hands the pages that lie wholly in x back to the system, which reads them from the file again
    when they are used again. Only for tensors that are mapped from a file and unchanged."""
    start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (x.data_ptr() + x.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0 and hasattr(mmap, "MADV_DONTNEED"):  # Linux and macOS
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


class Weight(NamedTuple):
    """A tensor that is still in its file: nothing of it is in memory until read.

    `parts` are mapped from files. Along an `axis` they are pieces of it, one shard's each; else
    decode(*parts) is the tensor.
    """
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Tensor, ...]
    decode: Callable = lambda part: part
    axis: int | None = None

    @classmethod
    def of(cls, x: Tensor) -> "Weight":
        return cls(tuple(x.shape), x.dtype, (x,))

    def read(self, device="cpu", dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on its device; a view of the file where nothing has to be converted."""
        dtype = dtype or self.dtype
        if self.axis is not None:
            x = torch.empty(self.shape, dtype=dtype, device=device)
            for place, part in zip(x.chunk(len(self.parts), self.axis), self.parts):
                place.copy_(part)
                give_back(part)
            return x
        x = self.decode(*self.parts).to(device=device, dtype=dtype,
                                        memory_format=torch.contiguous_format).reshape(self.shape)
        if x.data_ptr() != self.parts[0].data_ptr():
            self.leave()
        return x

    def leave(self) -> None:
        """Its pages leave memory; the file still has them. Not after a view of it was changed."""
        for part in self.parts:
            give_back(part)

    def equals(self, other: "Weight") -> bool:
        """Are both the same numbers?"""
        if self.shape != other.shape:
            return False
        same = torch.equal(self.read(), other.read(dtype=self.dtype))
        self.leave()
        other.leave()
        return same

    def turned(self, n: int, m: int) -> "Weight":
        """wq or wk with the rows of each head, n x m, turned to m x n. The two of a rotated pair
        are neighbours in Meta's heads (E/2 x 2); transformers' (2 x E/2) have the first of all
        pairs, then the second."""
        return Weight(self.shape, self.dtype, self.parts, lambda *parts: self.read().view(
            -1, n, m, self.shape[-1]).transpose(1, 2))


def head_of(path: Path) -> bytes:
    """The first bytes, which tell formats apart."""
    with open(path, "rb") as file:
        return file.read(9)


def map_file(path: Path) -> mmap.mmap:
    """The bytes of a file, read when they are used."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writable, in memory alone


def mapped(data: mmap.mmap, dtype: torch.dtype, shape: tuple[int, ...], start: int) -> Tensor:
    """The tensor at a byte of a mapped file; ValueError if it does not lie in it."""
    count = math.prod(shape) if len(shape) < 5 else 0  # a product of a million takes minutes
    if count <= 0 or not 0 <= start <= start + count * dtype.itemsize <= len(data):
        raise ValueError("a tensor lies beyond the end of the file: cut short")
    if start % dtype.itemsize:
        raise ValueError("a tensor is not aligned; try to save it with a newer safetensors")
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start).view(shape)


def once(pairs: list[tuple]) -> dict:
    """The dictionary of pairs; ValueError if a name stands there twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice in it")
    return dict(pairs)


def read_json(data: bytes) -> dict:
    """The object in JSON; TypeError if there is another thing."""
    return {**json.loads(data, object_pairs_hook=once)}


def only(values: dict, accepted: dict[str, tuple]) -> None:
    """Refuses fields whose value makes another function than the one in this file."""
    for name, allowed in accepted.items():
        if values.get(name) not in allowed:
            raise ValueError(f"{name}={values.get(name)!r} is not implemented, only {allowed[-1]!r}"
                             "; try a plain Llama")


def empty(config: LlamaConfig) -> Llama:
    """The model without values, which takes no memory."""
    with torch.device("meta"):
        return Llama(config)


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by its name."""
    return {name: tuple(w.shape) for name, w in empty(config).named_parameters()}


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
    "norm": ("model.norm", "output_norm"),
    "output": ("lm_head", "output")}
TURNED = ("wq.weight", "wk.weight")  # whose rows transformers has in another order


def their_names(config: LlamaConfig, column: int) -> dict[str, str]:
    """Meta's name of every weight: the name in a column of NAMES."""
    return {f"{ours.format(i)}.weight": f"{theirs[column].format(i)}.weight"
            for ours, theirs in NAMES.items() for i in range(config.n_layers)}


def renamed(config: LlamaConfig, weights: dict[str, Weight], column: int) -> dict[str, Weight]:
    """Weights by Meta's names, from the names in a column of NAMES."""
    ours = {theirs: name for name, theirs in their_names(config, column).items()}
    return {ours.get(name, f"unknown {name}"): weight for name, weight in weights.items()}


def read_pickle(path: Path) -> dict:
    """The dictionary in a file of torch.save, its tensors mapped; nothing in it is executed."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except pickle.UnpicklingError:
        raise ValueError(f"{path.name} holds more than tensors, which could run code, and was not "
                         "opened; try a file of weights alone") from None
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{path.name} is cut short or no checkpoint ({error!r:.99})") from None


def weights_of(table: dict) -> dict[str, Weight]:
    """The weights in a table of mapped tensors; ValueError for any other entry."""
    if not all(isinstance(w, Tensor) and w.dtype in SAFE_TYPES.values() and w.numel()
               and w.layout is torch.strided and w.device.type == "cpu" and w.is_contiguous()
               for w in table.values()):
        raise ValueError("not a table of weights; try the file that was published")
    return {str(name): Weight.of(w.detach()) for name, w in table.items()}


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
    """The config of a Meta folder from its params.json and its weights, of which a tied output is
    taken out.

    F = the next multiple of multiple_of from int(ffn_dim_multiplier * int(8 D / 3)). What
    params.json does not say (context, factor of the scaling) comes from the size of that shape.
    """
    values = dict(params)
    hidden = int((values.pop("ffn_dim_multiplier", None) or 1) * int(8 * values["dim"] / 3))
    multiple_of = values.pop("multiple_of")
    values["hidden_dim"] = values.get("hidden_dim") or -(-hidden // multiple_of) * multiple_of
    values["n_kv_heads"] = values.get("n_kv_heads") or values["n_heads"]
    embedding, output = weights["tok_embeddings.weight"], weights.get("output.weight")
    if values.get("vocab_size", -1) == -1:
        values["vocab_size"] = embedding.shape[0]
    values["tie_embeddings"] = output is None or output.equals(embedding)
    if values["tie_embeddings"]:
        weights.pop("output.weight", None)
    scaled = values.pop("use_scaled_rope", False)
    factor = values.pop("rope_scaling_factor", None)
    values["rope_scaling"] = (factor or 8.0) if scaled else None
    config = LlamaConfig.from_dict({"max_seq_len": 2048, **values})
    for size, _ in SIZES.values():
        like = replace(config, max_seq_len=size.max_seq_len, rope_scaling=size.rope_scaling)
        if like == size and bool(scaled) == bool(size.rope_scaling):
            return replace(size, max_seq_len=params.get("max_seq_len", size.max_seq_len),
                           rope_scaling=factor or size.rope_scaling)
    return config


def merged(name: str, parts: tuple[Tensor, ...], params: dict) -> Weight:
    """One weight of the parts in all shards: rows laid below each other, but columns side by side
    for wo, w2 and the embedding of LLaMA 1 and 2. Norms are the same in all of them, and so are
    the neighbours' wk and wv where there are more shards than key/value heads."""
    kind, shape = name.removesuffix(".weight").split(".")[-1], list(parts[0].shape)
    if kind in ("wk", "wv"):
        parts = parts[::max(1, len(parts) // (params.get("n_kv_heads") or params["n_heads"]))]
    if len(parts) == 1 or len(shape) == 1:
        return Weight.of(parts[0])
    if any(part.shape != parts[0].shape for part in parts):
        raise ValueError(f"the shards hold {name} in different shapes")
    axis = int(kind in ("wo", "w2") or kind == "tok_embeddings" and shape[1] < params["dim"])
    shape[axis] *= len(parts)
    return Weight(tuple(shape), parts[0].dtype, parts, axis=axis)


def read_meta(folder: Path) -> tuple[LlamaConfig, dict[str, Weight]]:
    """Meta's layout (LLaMA 1, 2, 3 and our own runs), any number of shards."""
    params = read_json((folder / "params.json").read_bytes())
    names = sorted(file.name for file in folder.glob("consolidated.[0-9][0-9].pth"))
    shards = [weights_of(read_pickle(folder / name)) for name in names]
    missing = next(i for i in range(101) if f"consolidated.{i:02}.pth" not in names)
    width = params["n_heads"] * params.get("head_size", params["dim"] // params["n_heads"])
    first = shards[0] if missing else {}
    count = width // first["layers.0.attention.wo.weight"].shape[1] if first else 1
    if missing < max(len(names), count):
        raise ValueError(f"consolidated.{missing:02}.pth is missing; try to fetch it")
    if any(shard.keys() != first.keys() for shard in shards):
        raise ValueError("the shards hold different tensors")
    weights = {name: merged(name, tuple(shard[name].parts[0] for shard in shards), params)
               for name in first}
    return read_params(params, weights), weights


SAFE_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
              "BF16": torch.bfloat16}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Mapped tensors by name. The file: the header's length as a uint64, the header in JSON,
    {name: {"dtype", "shape", "data_offsets": [begin, end]}}, and the bytes they count."""
    data = map_file(path)
    size, = struct.unpack_from("<Q", data)
    if size > min(len(data) - 8, 100 * 10**6):
        raise ValueError(f"the header of {path.name} lies beyond the end of the file: cut short")
    header, tensors, spans = read_json(data[8:8 + size]), {}, []
    header.pop("__metadata__", None)
    for name, entry in header.items():
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in SAFE_TYPES:
            raise ValueError(f"{name} is of type {dtype}; try one of {', '.join(SAFE_TYPES)}")
        if not (all(type(n) is int and n >= 0 for n in (begin, end, *shape)) and len(shape) < 3
                and end - begin == math.prod(shape) * SAFE_TYPES[dtype].itemsize):
            raise ValueError(f"{name} has not the size of its shape")
        tensors[name] = mapped(data, SAFE_TYPES[dtype], shape, 8 + size + begin)
        spans.append((begin, end))
    if any(end > begin for (_, end), (begin, _) in itertools.pairwise(sorted(spans))):
        raise ValueError("tensors overlap")
    return tensors


HF_FIELDS = {"hidden_size": "dim", "num_hidden_layers": "n_layers",
             "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads",
             "intermediate_size": "hidden_dim", "vocab_size": "vocab_size",
             "max_position_embeddings": "max_seq_len", "rms_norm_eps": "norm_eps",
             "tie_word_embeddings": "tie_embeddings", "head_dim": "head_size",
             "rope_theta": "rope_theta"}
HF_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}
HF_ONLY = {"model_type": ("llama",), "hidden_act": (None, "silu"), "attention_bias": (None, False),
           "mlp_bias": (None, False), "sliding_window": (None,), "quantization_config": (None,),
           "num_local_experts": (None,), "partial_rotary_factor": (None, 1),
           "rope_type": (None, "default", "llama3"), "type": (None, "default", "llama3")}


def read_hf_config(values: dict) -> LlamaConfig:
    """The config in config.json. Frequencies: rope_theta and rope_scaling of transformers 4, or
    rope_parameters of 5. What a file leaves out has transformers' default."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    values = {name: value for name, value in {**values, **rope}.items() if value is not None}
    values = {"num_key_value_heads": values["num_attention_heads"], "rms_norm_eps": 1e-6,
              "max_position_embeddings": values.get("max_sequence_length", 2048), **values}
    only(values, HF_ONLY)
    config = {ours: values[theirs] for theirs, ours in HF_FIELDS.items() if theirs in values}
    if "llama3" in (rope.get("rope_type"), rope.get("type")):
        only(rope, {name: (plain,) for name, plain in HF_SCALING.items()})
        config["rope_scaling"] = rope["factor"]
    return LlamaConfig.from_dict(config)


def read_hf(folder: Path, file: Path | None = None) -> tuple[LlamaConfig, dict[str, Weight]]:
    """A folder of transformers, or one file of it."""
    config = read_hf_config(read_json((folder / "config.json").read_bytes()))
    weights, files = {}, [file] if file else []
    for pattern in ("pytorch_model*.bin", "*.safetensors"):  # which is taken where both are there
        listed = {folder / Path(name).name for index in folder.glob(pattern + ".index.json")
                  for name in read_json(index.read_bytes())["weight_map"].values()}
        if not file or file in listed:
            files = sorted(listed or folder.glob(pattern)) or files
    for path in files:
        read = read_pickle if head_of(path)[:2] == b"PK" else read_safetensors
        found = weights_of(read(path))
        if twice := found.keys() & weights.keys():
            raise ValueError(f"{min(twice)} is in two files")
        weights |= found
    weights = renamed(config, weights, 0)
    for name in weights:
        if name.endswith(TURNED):
            weights[name] = weights[name].turned(2, config.head_dim // 2)
    return config, weights


GGUF_KINDS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
GGUF_TYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
GGUF_FIELDS = {"embedding_length": "dim", "block_count": "n_layers",
               "attention.head_count": "n_heads", "attention.head_count_kv": "n_kv_heads",
               "feed_forward_length": "hidden_dim", "context_length": "max_seq_len",
               "attention.layer_norm_rms_epsilon": "norm_eps", "rope.freq_base": "rope_theta",
               "attention.key_length": "head_size"}


def quantised(data: mmap.mmap, shape: tuple[int, ...], kind: int, start: int) -> Weight:
    """A tensor in blocks of one of ggml's types, which the package gguf decodes to fp32."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
        kind = GGMLQuantizationType(kind)
        block, size = GGML_QUANT_SIZES[kind]
        quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except (ImportError, ValueError, NotImplementedError):
        raise ValueError(f"tensors of ggml's type {int(kind)} need the package gguf, if it knows "
                         "them; try pip install -U gguf") from None
    if shape[-1] % block:
        raise ValueError(f"rows of {shape[-1]} are no whole blocks of {kind.name}")
    raw = mapped(data, torch.uint8, (*shape[:-1], shape[-1] // block * size), start)
    return Weight(shape, torch.float32, (raw,), lambda raw: torch.from_numpy(
        quants.dequantize(raw.numpy(), kind)))


def read_gguf_header(data: mmap.mmap) -> tuple[dict, dict[str, tuple], int]:
    """(values by key, (shape, ggml type, offset) by name, where the header ends) of version 2 and
    3, little-endian. What points beyond the end is an error, a struct.error for numbers."""
    at, length = 4, struct.Struct("<Q").unpack_from

    def take(form: str) -> tuple:
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values

    def text() -> str:
        nonlocal at
        start = at + 8
        at = start + length(data, at)[0]
        if at > len(data):
            raise ValueError("a text lies beyond the end of the file: cut short")
        return data[start:at].decode()

    def value(kind: int):
        nonlocal at
        if kind == 8:
            return text()
        if kind != 9:
            number, = take(GGUF_KINDS[kind])
            return float(str(np.float32(number))) if kind == 6 else number  # 1e-5, not 9.99e-6
        kind, n = take("IQ")
        if kind in GGUF_KINDS:
            return list(take(f"{n}{GGUF_KINDS[kind]}"))
        return [text() if kind == 8 else value(kind) for _ in range(n)]

    version, n_tensors, n_keys = take("IQQ")
    if version not in (2, 3) or max(n_tensors, n_keys) > 2**20:
        raise ValueError(f"GGUF of version {version} with {n_tensors} tensors is not known; try "
                         "one of version 3")
    keys = once([(text(), value(*take("I"))) for _ in range(n_keys)])
    tensors = once([(text(), (take(f"{take('I')[0]}Q")[::-1], *take("IQ")))
                    for _ in range(n_tensors)])  # shapes: the fastest axis first
    return keys, tensors, at


def read_gguf(path: Path) -> tuple[LlamaConfig, dict[str, Weight]]:
    """GGUF, of llama.cpp, whose wq and wk have Meta's order: F32, F16 and BF16 are mapped, other
    types decoded. Llama 3.1's frequencies are in it as the numbers that they are divided by."""
    data, weights = map_file(path), {}
    keys, tensors, end = read_gguf_header(data)
    only(keys, {"general.architecture": ("llama",), "split.count": (None, 0, 1)})
    alignment = keys.get("general.alignment", 32)
    for name, (shape, kind, offset) in tensors.items():
        start = -(-end // alignment) * alignment + offset
        weights[name] = (Weight.of(mapped(data, GGUF_TYPES[kind], shape, start))
                         if kind in GGUF_TYPES else quantised(data, shape, kind, start))
    keys = {name[6:]: value for name, value in keys.items() if name.startswith("llama.")}
    config = {"n_kv_heads": keys["attention.head_count"],
              **{ours: keys.pop(theirs) for theirs, ours in GGUF_FIELDS.items() if theirs in keys}}
    config = LlamaConfig.from_dict({
        **config, "vocab_size": weights["token_embd.weight"].shape[0],
        "tie_embeddings": "output.weight" not in weights})
    plain = {"vocab_size": keys.get("vocab_size"), "rope.dimension_count": config.head_dim,
             "attention.value_length": config.head_dim, "rope.scaling.type": "none",
             "tensor_data_layout": "Meta AI original pth"}
    only(keys, {name: (0, 1, plain.get(name)) for name in keys})  # all else changes the function
    if "rope_freqs.weight" in weights:
        factors = weights["rope_freqs.weight"].read(dtype=torch.float32)
        scaled = replace(config, rope_scaling=float(factors.max()))
        wanted = rope_frequencies(config) / rope_frequencies(scaled)
        if wanted.shape != factors.shape or not torch.allclose(wanted, factors, rtol=1e-3):
            raise ValueError("rope_freqs.weight is not Llama 3.1's scaling; try a Llama of Meta's")
        config = scaled
    return config, renamed(config, weights, 1)


def llama2c_order(config: LlamaConfig, version: int) -> list[str]:
    """The tensors in the order of the file, each kind over all layers; 1 and 2 have norms first."""
    names = [name for name in their_names(config, 0)
             if name != "output.weight" or not config.tie_embeddings]
    if version:
        return sorted(names, key=lambda name: "norm" not in name)
    end = names.index("norm.weight") + 1
    return [*names[:end], "cos", "sin", *names[end:]]


def read_llama2c(path: Path) -> tuple[LlamaConfig, dict[str, Weight]]:
    """llama2.c's .bin. Version 0 begins with D, F, L, H, K, V (negative: the output is not tied)
    and the context as int32; 1 and 2 with a magic number, the version, the same seven, whether
    the output is tied, and in 2 how many int8 share a scale, in 256 bytes."""
    data, version, start = map_file(path), 0, 28
    if data[:4] == b"24ka":
        version, start = struct.unpack_from("<i", data, 4)[0], 256
        if version not in (1, 2):
            raise ValueError(f"llama2.c's version {version} is not known; try 0, 1 or 2")
    dim, hidden, layers, heads, kv_heads, vocab, context, shared, group = struct.unpack_from(
        "<7iBi", data, 8 if version else 0)
    config = LlamaConfig(dim, layers, heads, kv_heads, hidden, abs(vocab), context,
                         tie_embeddings=bool(shared) if version else vocab > 0)

    def scaled(int8: Tensor, scales: Tensor) -> Tensor:
        return int8.float().view(-1, group).mul_(scales[:, None])

    weights, wanted = {}, shapes(config)
    for name in llama2c_order(config, version):
        shape = wanted.get(name, (context, config.head_dim // 2))  # the tables of cos and sin
        n = math.prod(shape)
        if version == 2 and len(shape) == 2:
            if group < 4 or group % 4 or n % group:
                raise ValueError(f"{group} int8 to a scale do not divide its tensors")
            parts = (mapped(data, torch.int8, (n,), start),
                     mapped(data, torch.float32, (n // group,), start + n))
            weights[name] = Weight(shape, torch.float32, parts, scaled)
        else:
            weights[name] = Weight.of(mapped(data, torch.float32, shape, start))
        start += sum(part.nbytes for part in weights[name].parts)
    if start != len(data):
        raise ValueError(f"it has not the {start:,} bytes that its header asks for: cut short, or "
                         "no llama2.c file; try to fetch it again")
    return config, {name: weights[name] for name in wanted}


def read_torch_file(path: Path) -> tuple[LlamaConfig, dict[str, Weight]]:
    """A file of torch.save: llama2.c's .pt, or one of a folder."""
    table = read_pickle(path)
    if "model_args" not in table:
        transformers = any(str(name).startswith("model.") for name in table)
        return read_hf(path.parent, path) if transformers else read_meta(path.parent)
    weights = {str(name).removeprefix("_orig_mod."): weight
               for name, weight in weights_of(table["model"]).items()}
    params = {name: value for name, value in table["model_args"].items() if name != "dropout"}
    return read_params({"multiple_of": 256, **params}, weights), weights


HARMLESS = ("rope.freqs", "rotary_emb.inv_freq", "rope_freqs.weight")  # tables computed here


def read_any(path: Path) -> tuple[LlamaConfig, dict[str, Weight]]:
    """The reader of what is found in the file or the folder, not of its name."""
    if path.is_file():
        head = head_of(path)
        if head[:4] == b"GGUF":
            return read_gguf(path)
        if head[:2] == b"PK":
            return read_torch_file(path)
        if head[8:] == b"{":
            return read_hf(path.parent, path)
        return read_any(path.parent) if head[:1] == b"{" else read_llama2c(path)
    if (path / "config.json").is_file() and not any(path.glob("consolidated.*.pth")):
        return read_hf(path)
    if (path / "params.json").is_file():
        return read_meta(path)
    raise ValueError("there is no checkpoint; try a folder of Meta's or transformers', a GGUF file "
                     "or llama2.c's .bin")


@contextlib.contextmanager
def blamed(path: Path):
    """Whatever a damaged file raises becomes one line that names it."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
            struct.error) as error:
        text = str(error) if isinstance(error, ValueError) else f"cut short or damaged ({error!r})"
        text = " ".join(text.split())[:400]
        advice = "" if "; try" in text else "; try to fetch it again"
        raise ValueError(f"{path}: {text}{advice}") from None


def gguf_fields(path: Path) -> dict | None:
    """What a GGUF file says by key, its vocabulary too; None for any other file."""
    with blamed(path):
        gguf = head_of(path)[:4] == b"GGUF"
        return read_gguf_header(map_file(path))[0] if gguf else None


def open_checkpoint(path: str | Path) -> tuple[LlamaConfig, dict[str, Weight]]:
    """The config and the weights, still in their files, of any checkpoint by Meta's names.

    Strict: an unknown or missing tensor or a wrong shape is a ValueError that names it, as is
    whatever is damaged or asks for what is not implemented.
    """
    path = Path(path)
    with blamed(path):
        config, weights = read_any(path)
        weights = {name: w for name, w in weights.items() if not name.endswith(HARMLESS)}
        output = weights.get("output.weight") if config.tie_embeddings else None
        if output and output.equals(weights["tok_embeddings.weight"]):
            del weights["output.weight"]  # transformers' old files have it twice
        wanted, found = shapes(config), {name: w.shape for name, w in weights.items()}
        if wrong := [name for name in wanted | found if wanted.get(name) != found.get(name)]:
            detail = "; ".join(f"{name:.100} is {found.get(name, 'missing')}, not "
                               f"{wanted.get(name, 'known')}" for name in wrong[:3])
            raise ValueError(f"not the Llama of its header ({len(wrong)} tensors): {detail}; try "
                             "the files as they were published")
    return config, weights


def load(path: str | Path, device="cpu", dtype: torch.dtype | None = None, finish=None) -> Llama:
    """The model in any checkpoint; dtype None keeps the file's, that of its embedding.

    Weights stay in the file, mapped into memory, unless they are converted: one block (embedding,
    layer, norm, output) after the other, and of it one tensor. Then finish(name, block), if given,
    returns what takes its place, before the next one is read.
    """
    config, weights = open_checkpoint(path)
    dtype = dtype or weights["tok_embeddings.weight"].dtype
    model = empty(config)
    blocks = ["tok_embeddings", *(f"layers.{i}" for i in range(config.n_layers)), "norm"]
    for name in blocks + ["output"] * (not config.tie_embeddings):
        block = model.get_submodule(name)
        sources = {key: weights[f"{name}.{key}"] for key, _ in block.named_parameters()}
        block.load_state_dict({key: w.read(device, dtype) for key, w in sources.items()},
                              assign=True)
        if finish is not None:
            model.set_submodule(name, finish(name, block))
            for weight in sources.values():
                weight.leave()
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
        raise OSError(f"{path} could not be written ({str(error)[:100]}) and is as it was before; "
                      "try to free space on the disk, or another place") from None
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, values: dict) -> None:
    write_aside(path, lambda file: file.write(json.dumps(values, indent=1).encode()))


def write_tensor(file, weight: Weight, dtype: torch.dtype) -> None:
    """The bytes of a weight, which then leaves memory."""
    file.write(weight.read(dtype=dtype).flatten().view(torch.uint8).numpy())
    weight.leave()


def write_safetensors(file, weights: dict[str, Weight]) -> None:
    """A safetensors file, tensor by tensor."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    codes = {dtype: code for code, dtype in SAFE_TYPES.items()}
    for name, w in weights.items():
        end = at + math.prod(w.shape) * w.dtype.itemsize
        header[name] = {"dtype": codes[w.dtype], "shape": w.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
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
    """The folder that transformers loads; what the frequencies are is said as in its version 4."""
    folder.mkdir(parents=True, exist_ok=True)
    names = their_names(config, 0)
    theirs = {names[name]: weight.turned(config.head_dim // 2, 2) if name.endswith(TURNED)
              else weight for name, weight in weights.items()}
    write_aside(folder / "model.safetensors", lambda file: write_safetensors(file, theirs))
    scaling = {"rope_type": "llama3", "factor": config.rope_scaling, **HF_SCALING}
    write_json(folder / "config.json", {
        **{theirs: getattr(config, ours) for theirs, ours in HF_FIELDS.items()},
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "head_dim": config.head_dim, "rope_scaling": scaling if config.rope_scaling else None,
        "torch_dtype": str(weights["tok_embeddings.weight"].dtype).removeprefix("torch."),
        "bos_token_id": None, "eos_token_id": None})  # which only the tokenizer knows


def write_llama2c(config: LlamaConfig, weights: dict[str, Weight], path: Path) -> None:
    """llama2.c's .bin of version 0, in fp32; ValueError for what it has no field for."""
    plain = {"rope_theta": 1e4, "rope_scaling": None, "norm_eps": 1e-5, "head_size": None}
    for name, value in plain.items():
        if getattr(config, name) != value:
            raise ValueError(f"llama2.c has no {name} but {value}, and this model's is "
                             f"{getattr(config, name)}; try the format meta or hf")
    tables = dict(zip(("cos", "sin"), rope_table(config, torch.arange(config.max_seq_len))))
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
