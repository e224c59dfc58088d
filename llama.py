"""Llama, to be read beside the papers.

    LLaMA    "LLaMA: Open and Efficient Foundation Language Models", arXiv 2302.13971
    Llama 2  "Llama 2: Open Foundation and Fine-Tuned Chat Models", arXiv 2307.09288
    Llama 3  "The Llama 3 Herd of Models", arXiv 2407.21783

From top to bottom: the sizes and their recipes; the pieces (RMSNorm, rotary embedding, SwiGLU,
attention); the layer; its split over several devices; its backward, written by hand; the cache,
the model and its loss. Module names are the keys of Meta's checkpoints.

    python -c "import llama; print(llama.SIZES['7b'][0].n_params)"   # 6738415616

Axes, the same letters everywhere:
    B batch    T new positions    S positions seen so far (S = T unless a cache holds earlier ones)
    D model width (dim)    H query heads    K key/value heads    E head size, D / H (or head_size)
    F hidden width of the feed-forward    V vocabulary    L layers    N tokens, B T
"""
import hashlib
import itertools
import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

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
    """Everything that fixes the shape and the function of a Llama; ValueError for a bad field."""
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
        for name, value in vars(self).items():
            if name in ("norm_eps", "rope_theta", "rope_scaling"):
                wanted, good = "positive", type(value) in (int, float) and 0 < value < 1e30
            elif name == "tie_embeddings":
                wanted, good = "true or false", type(value) is bool
            else:
                wanted, good = "a positive whole number", type(value) is int and 0 < value < 2**24
            optional = name in ("rope_scaling", "head_size")
            if not good and not (optional and value is None):
                raise ValueError(f"{name}={value!r} must be {wanted}; try the published value")
        if self.n_layers > 1024:
            raise ValueError(f"n_layers={self.n_layers} is over 1024; try the published shape")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} must split into n_kv_heads={self.n_kv_heads} "
                             "groups; try the published shape")
        if self.head_size is None and self.dim % self.n_heads or self.head_dim % 2:
            raise ValueError(f"dim={self.dim} must split into n_heads={self.n_heads} of even size "
                             f"(head_size={self.head_size}); try the published shape")
        if self.head_size == self.dim / self.n_heads:
            object.__setattr__(self, "head_size", None)  # equal shapes then compare as equal

    @classmethod
    def from_dict(cls, values: dict) -> "LlamaConfig":
        """The config with these fields; a field that does not exist is a ValueError naming it."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"unknown field {name!r}; try one of {', '.join(known)}")
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
        missing = [field.name for field in fields(self) if getattr(self, field.name) is None]
        return replace(self, **{name: getattr(LLAMA2_SMALL, name) for name in missing}), missing


M = 2**20  # the papers' "4M tokens" is taken as 4 * 2**20 = 4,194,304
LLAMA1_SMALL = Recipe(3e-4, 4 * M, 1.0e12)
LLAMA1_LARGE = Recipe(1.5e-4, 4 * M, 1.4e12)
LLAMA2_SMALL = Recipe(3e-4, 4 * M, 2.0e12, eps=1e-5)
LLAMA2_LARGE = Recipe(1.5e-4, 4 * M, 2.0e12, eps=1e-5)
# Llama 3 prints peak rates; the rest only for 405B, whose batch grew from 4M to 8M to 16M tokens.
LLAMA3 = partial(Recipe, batch_tokens=None, train_tokens=15e12, warmup=None, final_lr=None,
                  betas=None, weight_decay=None, clip=None, document_mask=True)
LLAMA31_405B = LLAMA3(8e-5, batch_tokens=16 * M, train_tokens=15.6e12, warmup=8000, final_lr=0.01)
LLAMA32 = LLAMA3(None, train_tokens=9e12)
TINYLLAMA = Recipe(4e-4, 2 * M, 3e12)
STORIES = partial(Recipe, warmup=1000, final_lr=0.0, eps=1e-8)
SHAPE3 = partial(LlamaConfig, vocab_size=128256, max_seq_len=8192, rope_theta=5e5)
SHAPE31 = partial(SHAPE3, max_seq_len=131072, rope_scaling=8.0)
SHAPE32 = partial(SHAPE31, rope_scaling=32.0, tie_embeddings=True)

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
    "llama3-8b": (SHAPE3(4096, 32, 32, 8, 14336), LLAMA3(3e-4)),
    "llama3-70b": (SHAPE3(8192, 80, 64, 8, 28672), LLAMA3(1.5e-4)),
    "llama3.1-8b": (SHAPE31(4096, 32, 32, 8, 14336), LLAMA3(3e-4)),
    "llama3.1-70b": (SHAPE31(8192, 80, 64, 8, 28672), LLAMA3(1.5e-4)),
    "llama3.1-405b": (SHAPE31(16384, 126, 128, 8, 53248), LLAMA31_405B),
    # Pruned from 8B and distilled from 8B and 70B.
    "llama3.2-1b": (SHAPE32(2048, 16, 32, 8, 8192), LLAMA32),
    "llama3.2-3b": (SHAPE32(3072, 28, 24, 8, 8192), LLAMA32),
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
    """x in fp32, where sums of many terms keep their digits; float64 stays, for gradcheck."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float | None, r: Tensor | None = None
             ) -> tuple[Tensor, Tensor]:
    """RMSNorm (section 2.2, "Pre-normalization"; Zhang and Sennrich 2019).

        y_i = g_i r x_i,   r = 1 / sqrt( (1/D) sum_j x_j^2 + eps )

    x (..., D), weight g (D,) -> y (..., D), r (..., 1). Computed in fp32, rounded to the type of x
    before the weight is multiplied. It rescales each token to mean square 1, however large the
    residual stream has grown, and needs no mean, unlike LayerNorm: (3, 4) has mean square 12.5 and
    becomes (0.85, 1.13). A backward that saved r gives it instead of eps: no sum is taken again.
    """
    if r is None:
        r = torch.rsqrt(fp32(x).pow(2).mean(-1, keepdim=True) + eps)
    return (x * r).to(x.dtype) * weight.to(x.dtype), r


def rms_norm_backward(dy: Tensor, x: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """dx (..., D) and dg (D,) of rms_norm. With n = r x and dn = g dy, from dr/dx_i = -r^3 x_i / D:

        dx = r ( dn - n (1/D) sum_j n_j dn_j ),   dg = sum over tokens of dy n

    The second term removes from dn its part along n: scaling x does not change y.
    """
    n, dn = x * r, fp32(dy) * weight
    dx = (dn - n * (n * dn).mean(-1, keepdim=True)) * r
    return dx.to(x.dtype), (dy * n).flatten(0, -2).sum(0)


def rope_frequencies(config: LlamaConfig, device=None) -> Tensor:
    """Angle by which pair i turns from one position to the next (Su et al. 2021), (E/2,) in fp32.

        f_i = theta^(-2i/E),  i = 0 .. E/2 - 1

    The first pair turns by 1 radian a position and tells neighbours apart; the last one turns once
    in about 2 pi theta positions. Llama 3.1 divides the low frequencies by a factor s, so that
    positions far beyond the C = 8192 of its first training meet angles that it has seen. With the
    wavelength w_i = 2 pi / f_i, in positions:

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
    """Rotary embedding (section 2.2; Su et al. 2021, equation 34): pair i turns by the angle p f_i.

        [y_2i  ]   [cos p f_i   -sin p f_i] [x_2i  ]
        [y_2i+1] = [sin p f_i    cos p f_i] [x_2i+1]

    At position p = 1 the first pair (1, 0), with f_0 = 1, becomes (cos 1, sin 1) = (0.540, 0.841).

    x (B, T, H or K, E), cos and sin of rope_table -> like x. A score q k^T then depends on the
    distance of the two positions alone: R_p^T R_s = R_(s-p). So a text may begin at any position.
    The rotation is orthogonal: with -sin it is its own inverse, and its own backward.
    """
    x0, x1 = fp32(x).unflatten(-1, (-1, 2)).unbind(-1)
    y = torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1)
    return y.flatten(-2).to(x.dtype)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """SwiGLU (section 2.2; Shazeer 2020): silu(a) * b with silu(a) = a sigmoid(a).

    In the layer a = W1 x and b = W3 x, both (..., F) -> (..., F): silu(a) is a gate that decides
    how much of b passes. swiglu(2, 3) = 2 * 0.881 * 3 = 5.28.
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
# lse (B, H, T) is the logsumexp of the scores; from it backward computes the softmax A again.
# Query head h reads key/value head h // (H/K).
# positions: the last T of 0 .. S-1 as (T,), or (B, T) where rows of a cache differ in length.
# boundaries: int32 offsets at which documents start in the flattened batch, then B*T (the
# cu_seqlens of flash attention). Every row starts a document. They are for training, not a cache.


def first_visible(positions: Tensor, boundaries: Tensor | None) -> Tensor:
    """The first key that each query may see, shaped like positions, or (B, T) with boundaries: 0,
    or the first token of the query's own document (Llama 3, section 3.2)."""
    if boundaries is None:
        return torch.zeros_like(positions)
    T = positions.shape[-1]
    token = torch.arange(boundaries[-1], device=positions.device)
    document = torch.bucketize(token, boundaries, right=True) - 1
    return (boundaries[document] % T).view(-1, T)


def visible(positions: Tensor, first: Tensor, keys: Tensor) -> Tensor:
    """The mask of attention: may the query at position p see the key at position s?

        first visible <= s <= p

    Nobody sees what comes later, since that is what the model must predict.
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
    """Attention, written as its equation (Vaswani et al. 2017, equation 1).

        S = q k^T / sqrt(E) + mask,   A = softmax(S),   o = A v,   lse = log sum exp S

    A sum of E products of independent numbers of variance 1 has variance E: the root keeps the
    scores near 1 in size, where softmax has a gradient. The mask is 0 where visible, else -inf.
    Softmax in fp32. Memory: T x S numbers a head.
    """
    keys = torch.arange(k.shape[2], device=k.device)
    scores = masked_scores(q, k, visible(positions, first_visible(positions, boundaries), keys))
    return scores.softmax(-1).to(v.dtype) @ per_query_head(v, q), scores.logsumexp(-1)


def tile_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor,
                  mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq, dk, dv from one tile of scores; attention_equation passes everything as one.

        A = exp(S - lse)   dv = A^T do   dA = do v^T   dS = A (dA - delta)
        dq = dS k / sqrt(E)   dk = dS^T q / sqrt(E)

    delta (B, H, T) = sum_e do_e o_e equals sum_s A_s dA_s, the sum in the softmax's backward; taken
    from o it needs no other tile.
    """
    a = masked_scores(q, k, mask).sub_(lse[..., None]).exp_()
    da = fp32(do @ per_query_head(v, q).mT)
    ds = da.sub_(delta[..., None]).mul_(a).mul_(1 / math.sqrt(q.shape[-1])).to(q.dtype)
    dk, dv = ds.mT @ q, a.to(do.dtype).mT @ do
    groups = q.shape[1] // k.shape[1]  # a key head's gradient: the sum over the heads that read it
    dk = dk.unflatten(1, (-1, groups)).sum(2)
    dv = dv.unflatten(1, (-1, groups)).sum(2)
    return ds @ per_query_head(k, q), dk, dv


def attention_equation_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
                                boundaries: Tensor | None = None) -> tuple[Tensor, ...]:
    """dq, dk, dv of attention_equation: one tile that holds everything."""
    positions = torch.arange(q.shape[2], device=q.device)
    mask = visible(positions, first_visible(positions, boundaries), positions)
    return tile_backward(do, q, k, v, lse, (fp32(do) * o).sum(-1), mask)


def tiles(positions: Tensor, boundaries: Tensor | None, n_keys: int, size: int):
    """Yields each block of `size` queries with the key tiles that it must visit, as
    (queries, [(keys, mask), ...]); tiles that are masked entirely are skipped."""
    first = first_visible(positions, boundaries)
    keys = torch.arange(n_keys, device=positions.device)
    for i in range(0, positions.shape[-1], size):
        rows = slice(i, i + size)
        end = int(positions[..., rows].max()) + 1
        visited = []
        for j in range(int(first[..., rows].min()), end, size):
            columns = slice(j, min(j + size, end))
            mask = visible(positions[..., rows], first[..., rows], keys[columns])
            visited.append((columns, mask))
        yield rows, visited


def attention_tiled(q: Tensor, k: Tensor, v: Tensor, positions: Tensor,
                    boundaries: Tensor | None = None, size: int = 128) -> tuple[Tensor, Tensor]:
    """The equation with an online softmax (Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023,
    algorithm 1): never T x S numbers, only size x size tiles, and none that is masked entirely.

    Softmax needs the largest score and the sum over all keys, which a tile does not know. So keep,
    over the tiles seen so far, m the largest score, l = sum exp(S - m) and u = sum exp(S - m) v,
    and correct l and u by c whenever m grows:

        m' = max(m, max S)   c = exp(m - m')   l' = c l + sum exp(S - m')   u' = c u + exp(S - m') v

    After the last tile o = u / l and lse = m + log l.
    """
    o, lse = [], []
    for rows, visited in tiles(positions, boundaries, k.shape[2], size):
        u = l = torch.zeros((), device=q.device)
        m = u - 1e30  # finite: a query may see nothing of its block's first tile, and S - m is NaN
        for columns, mask in visited:
            scores = masked_scores(q[:, :, rows], k[:, :, columns], mask)
            before, m = m, torch.maximum(m, scores.amax(-1, keepdim=True))
            p = (scores - m).exp()
            c = (before - m).exp()
            l = c * l + p.sum(-1, keepdim=True)
            u = c * u + p.to(v.dtype) @ per_query_head(v[:, :, columns], q)
        o.append((u / l).to(q.dtype))
        lse.append((m + l.log())[..., 0])
    return torch.cat(o, dim=2), torch.cat(lse, dim=2)


def attention_tiled_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
                             boundaries: Tensor | None = None, size: int = 128
                             ) -> tuple[Tensor, ...]:
    """dq, dk, dv of attention_tiled, summed over the same tiles (Dao 2023, algorithm 2)."""
    positions, delta = torch.arange(q.shape[2], device=q.device), (fp32(do) * o).sum(-1)
    dq = torch.zeros_like(q, dtype=delta.dtype)
    dk = torch.zeros_like(k, dtype=delta.dtype)
    dv = torch.zeros_like(v, dtype=delta.dtype)
    for rows, visited in tiles(positions, boundaries, k.shape[2], size):
        for columns, mask in visited:
            part_q, part_k, part_v = tile_backward(
                do[:, :, rows], q[:, :, rows], k[:, :, columns], v[:, :, columns],
                lse[:, :, rows], delta[:, :, rows], mask)
            dq[:, :, rows] += part_q
            dk[:, :, columns] += part_k
            dv[:, :, columns] += part_v
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def has_flash(q: Tensor) -> bool:
    """Can torch's flash attention kernels be called on tensors like q?"""
    return q.device.type == "cpu" or (
        q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0))


def attention_fused(q: Tensor, k: Tensor, v: Tensor, positions: Tensor,
                    boundaries: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The same function by torch's fused kernels (section 2.4: the attention weights are not
    stored, and masked scores are not computed). lse is None where no flash kernel gives it."""
    T, S, same_length = q.shape[2], k.shape[2], positions.dim() == 1
    attend = F.scaled_dot_product_attention
    if same_length and T == 1:
        # The newest token sees every key, so the heads that share a key head can be its queries.
        groups = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
        return attend(groups, k, v).flatten(1, 2).unsqueeze(2), None
    if same_length and T == S and has_flash(q):
        return flash(q, k, v, boundaries)
    if not has_flash(q):  # torch's other kernels do not know groups, or hold T x S numbers
        k, v = per_query_head(k, q), per_query_head(v, q)
    if same_length and T == S and boundaries is None:
        return attend(q, k, v, is_causal=True, enable_gqa=True), None
    keys = torch.arange(S, device=k.device)
    mask = visible(positions, first_visible(positions, boundaries), keys)
    return attend(q, k, v, mask, enable_gqa=True), None


def attention_fused_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor,
                             lse: Tensor | None, boundaries: Tensor | None = None
                             ) -> tuple[Tensor, ...]:
    """dq, dk, dv by the flash kernels' own backward; without lse, by autograd on the forward."""
    if lse is None:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            positions = torch.arange(q.shape[2], device=q.device)
            again, _ = attention_fused(*inputs, positions, boundaries)
        return torch.autograd.grad(again, inputs, do)
    return flash_backward(do, q, k, v, o, lse, boundaries)


def flash(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor | None) -> tuple[Tensor, Tensor]:
    """o, lse of causal attention by the flash kernel of the CPU or of CUDA."""
    T = q.shape[2]
    if q.device.type != "cpu":
        inputs = [packed(x, boundaries) for x in (q, k, v)]
        o, lse, *_ = torch.ops.aten._flash_attention_forward(
            *inputs, boundaries, boundaries, T, T, 0.0, True, False)  # no dropout, causal, no debug
        return o.view(-1, T, *o.shape[-2:]).transpose(1, 2), lse
    kernel = partial(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, is_causal=True)
    if boundaries is None:
        return kernel(q, k, v)
    lse = torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return by_document(kernel, boundaries, (q, k, v), (torch.empty_like(q), lse))


def flash_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
                   boundaries: Tensor | None) -> tuple[Tensor, ...]:
    """dq, dk, dv of flash."""
    T = q.shape[2]
    if q.device.type != "cpu":
        inputs = [packed(x, boundaries) for x in (do, q, k, v, o)]
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # random state of dropout
        grads = torch.ops.aten._flash_attention_backward(
            *inputs, lse, boundaries, boundaries, T, T, 0.0, True, unused, unused)
        return tuple(d.view(-1, T, *d.shape[-2:]).transpose(1, 2) for d in grads)
    kernel = partial(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
                     dropout_p=0.0, is_causal=True)
    if boundaries is None:
        return kernel(do, q, k, v, o, lse)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    return by_document(kernel, boundaries, (do, q, k, v, o, lse), grads)


def packed(x: Tensor, boundaries: Tensor | None) -> Tensor:
    """(B, heads, T, E) as CUDA's kernel takes it: (B, T, heads, E), or (B T, heads, E)."""
    x = x.transpose(1, 2)
    return x if boundaries is None else x.flatten(0, 1)


def by_document(kernel: Callable, boundaries: Tensor, inputs: tuple[Tensor, ...],
                outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Fills the outputs, a document at a time: the CPU's kernel knows no documents, and one call
    for each is five times as fast as a mask. All tensors (B, heads, T, ...)."""
    T = inputs[0].shape[2]
    for start, end in itertools.pairwise(boundaries.tolist()):
        row, first = divmod(start, T)
        here = slice(row, row + 1), slice(None), slice(first, first + end - start)
        document = [x[here] for x in inputs]
        if inputs[0].dtype == torch.bfloat16:  # whose kernel keeps memory for each length
            missing = (start - end) % 64
            document = [F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing)) for x in document]
        for output, found in zip(outputs, kernel(*document)):
            output[here] = found[:, :, :end - start]
    return outputs


ATTENTION = {"fused": (attention_fused, attention_fused_backward),
             "tiled": (attention_tiled, attention_tiled_backward),
             "equation": (attention_equation, attention_equation_backward)}

# ---------------------------------------------------------------------------------------------
# The layer


def local_shard(weight: Tensor) -> Tensor:
    """Local shard of a DTensor (differentiable); a plain tensor unchanged."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def linear(x: Tensor, W: Tensor, A: Tensor | None = None, B: Tensor | None = None) -> Tensor:
    """y = x W^T (section 2.2: no bias), W (out, in) cast to the type that x is computed in. With
    the A (r, in) and B (out, r) of LoRALinear, y = x W^T + (x A^T) B^T."""
    y = F.linear(x, local_shard(W).to(x.dtype))
    return y if A is None else add_product(y, F.linear(x, A.to(x.dtype)), B.T)


def add_product(y: Tensor, x: Tensor, M: Tensor) -> Tensor:
    """y + x M, in the memory of y: one pass over y, where a product and a sum make three."""
    y.flatten(0, -2).addmm_(x.flatten(0, -2), M.to(y.dtype))
    return y


class Linear(nn.Module):
    """y = x W^T; W is zero until Llama.init_weights or a checkpoint fills it."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_out, n_in))

    def factors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """W, A, B as `linear` and LayerByHand take them."""
        return local_shard(self.weight), None, None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, *self.factors())


class RMSNorm(nn.Module):
    """rms_norm with its weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, local_shard(self.weight), self.eps)[0]


class Attention(nn.Module):
    """o = Wo attention(rope(Wq x), rope(Wk x), Wv x), (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        q_dim = config.n_heads * config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.wq = Linear(config.dim, q_dim)
        self.wk = Linear(config.dim, kv_dim)
        self.wv = Linear(config.dim, kv_dim)
        self.wo = Linear(q_dim, config.dim)
        self.register_parameter("prompt", None)  # see attention_to_prompt
        self.register_parameter("gate", None)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable) -> Tensor:
        heads = (-1, self.head_dim)
        q = self.wq(x).unflatten(-1, heads)  # (B, T, H, E)
        k = self.wk(x).unflatten(-1, heads)
        v = self.wv(x).unflatten(-1, heads)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q = q.transpose(1, 2)  # (B, H, T, E)
        o, _ = attend(q, k.transpose(1, 2), v.transpose(1, 2))
        if self.prompt is not None:
            prompt = self.prompt.to(x.dtype)[None]
            k = self.wk(prompt).unflatten(-1, heads).transpose(1, 2)  # (1, K, P, E)
            v = self.wv(prompt).unflatten(-1, heads).transpose(1, 2)
            o = o + attention_to_prompt(q, k, v, self.gate)
        return self.wo(o.transpose(1, 2).flatten(2))


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
    """One transformer layer (section 2.2).

        h = x + Attention(RMSNorm(x)),   y = h + FeedForward(RMSNorm(h))

    Each half is normalised before it, not after, so that the residual stream from x to y stays
    free of norms and gradients pass through all layers undamped.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable,
                run: Callable | None = None) -> Tensor:
        """x (B, T, D) -> y (B, T, D); attend(q, k, v) -> o, lse is one of the attentions above.
        run is over_ranks or by_hand, below, which compute the same. The layer calls them, since
        FSDP and torch.compile change what a call of the layer does. A layer with a prompt leaves
        its backward to torch."""
        if run is not None and self.attention.prompt is None:
            return run(self, x, cos, sin, attend)
        h = x + self.attention(self.attention_norm(x), cos, sin, attend)
        return h + self.feed_forward(self.ffn_norm(h))


# ---------------------------------------------------------------------------------------------
# Model and sequence parallelism (section 2.4; Korthikanti et al. 2022)


class TensorParallel:
    """t ranks share each layer. A rank holds rows of Wq, Wk, Wv, W1, W3 (its heads, its hidden
    units) and the matching columns of Wo and W2, W being (out, in): each head and hidden unit is
    computed on one rank alone, and what Wo and W2 put out is a sum over ranks. Korthikanti's
    exchanges, in pairs of which each is the other's backward:

               forward                  backward                used
        f      identity                 all-reduce              before the products
        f_bar  all-reduce               identity                after them
        g      all-gather of tokens     reduce-scatter          like f, with sequence parallelism
        g_bar  reduce-scatter           all-gather of tokens    like f_bar, likewise

    An all-reduce is a reduce-scatter and an all-gather. So sequence parallelism (g and g_bar, used
    here) sends as many bytes as f and f_bar, and splits norms and residual stream too: each rank
    keeps N/t of the B T tokens. Exception: LayerByHand gathers two inputs again instead of saving
    them. The weights of norms meet the tokens of one rank alone; their gradients are summed over
    ranks once a step (train.py, Engine.complete).

    gather (N/t, ...) -> (N/T, T, ...) and scatter_sum (N/T, T, ...) -> (N/t, ...) start a
    collective and return a function that waits for its result, so that products run meanwhile.
    Without a process group there is one rank, and both return x as it is.
    """

    def __init__(self, group=None):
        self.group, self.rank, self.size = group, 0, 1
        if group is not None:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, x: Tensor, T: int) -> Callable[[], Tensor]:
        if self.size == 1:
            return lambda: x
        whole = x.new_empty(self.size * len(x), *x.shape[1:])
        work = dist.all_gather_single(whole, x.contiguous(), self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return whole.unflatten(0, (-1, T))
        return wait

    def scatter_sum(self, x: Tensor, T: int) -> Callable[[], Tensor]:
        if self.size == 1:
            return lambda: x
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


def over_ranks(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable,
               tp: TensorParallel) -> Tensor:
    """The layer with its exchanges; x and y are this rank's tokens, (N/t, D)."""
    T = len(cos)
    n = tp.g(layer.attention_norm(x), T)
    h = x + tp.g_bar(layer.attention(n, cos, sin, attend), T)
    m = tp.g(layer.ffn_norm(h), T)
    return h + tp.g_bar(layer.feed_forward(m), T)


# ---------------------------------------------------------------------------------------------
# The layer's backward by hand (section 2.4)


def by_hand(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable,
            attend_backward: Callable, tp: TensorParallel) -> Tensor:
    """The layer by LayerByHand, which takes plain tensors: W, A and B of each matrix."""
    a, f = layer.attention, layer.feed_forward
    g_n, g_m = local_shard(layer.attention_norm.weight), local_shard(layer.ffn_norm.weight)
    factors = []
    for matrix in (a.wq, a.wk, a.wv, a.wo, f.w1, f.w2, f.w3):
        factors += matrix.factors()
    return LayerByHand.apply(x, cos, sin, attend, attend_backward, layer.ffn_norm.eps, tp, g_n, g_m,
                             *factors)


def by_threes(values: Sequence) -> list[Sequence]:
    """by_threes("abcdef") == ["abc", "def"]: the W, A, B of each matrix."""
    return [values[i:i + 3] for i in range(0, len(values), 3)]


def input_gradient(dz: Tensor, W: Tensor, A: Tensor | None, B: Tensor | None) -> Tensor:
    """du of z = u W^T + (u A^T) B^T: dz W + (dz B) A."""
    du = dz @ W.to(dz.dtype)
    return du if A is None else add_product(du, dz @ B.to(dz.dtype), A)


def weight_gradients(dz: Tensor, u: Tensor, matrix: tuple, wanted: tuple) -> list[Tensor | None]:
    """dW, dA, dB of z = u W^T + (u A^T) B^T, None for those that are not wanted:

        dW = dz^T u,   dA = (dz B)^T u,   dB^T = (u A^T)^T dz       summed over all tokens

    dW takes as many operations as the product itself. With r = 8 dA and dB take next to none.
    """
    (W, A, B), (dz, u), grads = matrix, (dz.flatten(0, 1), u.flatten(0, 1)), [None, None, None]
    if wanted[0]:
        grads[0] = (dz.T @ u).to(W.dtype)
    if wanted[1]:
        grads[1] = ((dz @ B.to(dz.dtype)).T @ u).to(A.dtype)
    if wanted[2]:
        grads[2] = ((u @ A.T.to(u.dtype)).T @ dz).T.to(B.dtype)
    return grads


class LayerByHand(torch.autograd.Function):
    """The layer with its backward written out. What linear layers put out is saved, because it is
    expensive to compute; what is cheap is computed again.

    Forward, with R the rotation of apply_rope and g, g_bar of TensorParallel (the identity on one
    device):

        n = g(rms_norm(x))    q, k, v = R(n Wq^T), R(n Wk^T), n Wv^T    o, lse = attention(q, k, v)
        h = x + g_bar(o Wo^T)     m = g(rms_norm(h))    a, b = m W1^T, m W3^T    s = swiglu(a, b)
        y = h + g_bar(s W2^T)

    Backward, where dz is the gradient of the loss by z. A product z = u W^T gives du = dz W and,
    summed over tokens, dW = dz^T u. A sum hands its gradient to both terms. `<-` starts a
    collective; the products in the right column run meanwhile:

        dY <- g(dy)    m <- g(rms_norm(h))
        ds = dY W2                               da, db = swiglu_backward(ds)
        dm <- g_bar(da W1 + db W3)               dW2 = dY^T s    dW1 = da^T m    dW3 = db^T m
        dh = dy + rms_norm_backward(dm)
        dH <- g(dh)    n <- g(rms_norm(x))
        do = dH Wo                               dq, dk, dv = attention_backward(do)
        dq, dk = R^-1(dq), R^-1(dk)
        dn <- g_bar(dq Wq + dk Wk + dv Wv)       dWo = dH^T o    dWq, dWk, dWv = (dq, dk, dv)^T n
        dx = dh + rms_norm_backward(dn)

    Bytes that a layer of 7B saves a token in bf16 (D = 4096, F = 11008, H = K = 32, E = 128):

        saved                           elements           bytes
        x, q, o, h                      4 D                32,768
        k, v                            2 K E              16,384
        a, b                            2 F                44,032     93,184 so far
        lse, r of each norm             H + 2, in fp32        136     93,320 in all
        computed again: n, m, s, silu(a) and, a tile at a time, the weights of attention

    A matrix may have a LoRA, and then is W, A and B: see `linear` and weight_gradients.
    Autograd keeps 153,600 and more. Each of t tensor parallel ranks keeps a t-th. The product for
    the gradient of a frozen weight is not computed.
    """

    @staticmethod
    def forward(ctx, x, cos, sin, attend, attend_backward, eps, tp, g_n, g_m, *factors):
        wq, wk, wv, wo, w1, w2, w3 = by_threes(factors)
        T, heads = len(cos), (-1, 2 * cos.shape[-1])
        n, r_n = rms_norm(x, g_n, eps)
        n = tp.gather(n, T)()
        q = apply_rope(linear(n, *wq).unflatten(-1, heads), cos, sin)  # (B, T, H, E)
        k = apply_rope(linear(n, *wk).unflatten(-1, heads), cos, sin)
        v = linear(n, *wv).unflatten(-1, heads)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, E)
        o, lse = attend(q, k, v)
        h = x + tp.scatter_sum(linear(o.transpose(1, 2).flatten(2), *wo), T)()
        m, r_m = rms_norm(h, g_m, eps)
        m = tp.gather(m, T)()
        a, b = linear(m, *w1), linear(m, *w3)
        ctx.save_for_backward(x, r_n, q, k, v, o, lse, h, r_m, a, b, cos, sin, g_n, g_m, *factors)
        ctx.attend_backward, ctx.tp = attend_backward, tp
        return h + tp.scatter_sum(linear(swiglu(a, b), *w2), T)()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, r_n, q, k, v, o, lse, h, r_m, a, b, cos, sin, g_n, g_m, *factors = ctx.saved_tensors
        wq, wk, wv, wo, w1, w2, w3 = by_threes(factors)
        need_q, need_k, need_v, need_o, need_1, need_2, need_3 = by_threes(ctx.needs_input_grad[9:])
        tp, T = ctx.tp, len(cos)
        wait_dy, wait_m = tp.gather(dy, T), tp.gather(rms_norm(h, g_m, None, r_m)[0], T)
        dy_whole = wait_dy()
        da, db = swiglu_backward(input_gradient(dy_whole, *w2), a, b)
        wait_dm = tp.scatter_sum(input_gradient(da, *w1) + input_gradient(db, *w3), T)
        dw2, m = weight_gradients(dy_whole, swiglu(a, b), w2, need_2), wait_m()
        dw1, dw3 = weight_gradients(da, m, w1, need_1), weight_gradients(db, m, w3, need_3)
        dh, dg_m = rms_norm_backward(wait_dm(), h, r_m, g_m)
        dh += dy
        wait_dh, wait_n = tp.gather(dh, T), tp.gather(rms_norm(x, g_n, None, r_n)[0], T)
        dh_whole = wait_dh()
        do = input_gradient(dh_whole, *wo).unflatten(-1, (-1, q.shape[-1])).transpose(1, 2)
        dq, dk, dv = ctx.attend_backward(do, q, k, v, o, lse)
        dq = apply_rope(dq.transpose(1, 2), cos, -sin).flatten(2)
        dk = apply_rope(dk.transpose(1, 2), cos, -sin).flatten(2)
        dv = dv.transpose(1, 2).flatten(2)
        dn = input_gradient(dq, *wq) + input_gradient(dk, *wk) + input_gradient(dv, *wv)
        wait_dn = tp.scatter_sum(dn, T)
        dwo = weight_gradients(dh_whole, o.transpose(1, 2).flatten(2), wo, need_o)
        n = wait_n()
        dwq, dwk = weight_gradients(dq, n, wq, need_q), weight_gradients(dk, n, wk, need_k)
        dwv = weight_gradients(dv, n, wv, need_v)
        dx, dg_n = rms_norm_backward(wait_dn(), x, r_n, g_n)
        dx += dh
        return (dx, *[None] * 6, dg_n, dg_m, *dwq, *dwk, *dwv, *dwo, *dw1, *dw2, *dw3)


# ---------------------------------------------------------------------------------------------
# Adapters: a few new weights that learn beside frozen ones

MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


class LoRALinear(Linear):
    """A frozen Linear with a change of low rank r that learns (Hu et al. 2021).

        y = W x + (alpha / r) B A x,    A (r, in),  B (out, r)

    B begins at zero, so that y is the frozen layer's at first. For D = 4096 and r = 8 the two have
    65,536 numbers, W 16,777,216. alpha / r keeps the size of the change when r varies. The recipes'
    dropout on x (0.05) is left out. Merged, W + (alpha / r) B A is an ordinary W.
    """

    def __init__(self, n_in: int, n_out: int, rank: int, alpha: float):
        super().__init__(n_in, n_out)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(torch.zeros(rank, n_in))
        self.lora_b = nn.Parameter(torch.zeros(n_out, rank))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.lora_a, self.lora_b * self.scale


def add_lora(model: "Llama", rank: int, alpha: float, names: Sequence[str] = MATRICES) -> None:
    """Gives the named matrices of every layer a LoRA; only these learn then."""
    model.requires_grad_(False)
    for layer in model.layers:
        for part in (layer.attention, layer.feed_forward):
            for name, plain in list(part.named_children()):
                if name in names:
                    n_out, n_in = plain.weight.shape
                    lora = LoRALinear(n_in, n_out, rank, alpha)
                    lora.weight = plain.weight
                    part.register_module(name, lora)


def attention_to_prompt(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """What LLaMA-Adapter adds to the attention o of a layer (Zhang et al. 2023, equation 7).

        o + tanh(g) softmax( q k^T / sqrt(E) ) v

    k, v (1, K, P, E) are made by the layer's Wk and Wv from a prompt of P vectors that learn; they
    are not rotated, and every token of q (B, H, T, E) sees all of them. The softmax is their own,
    so that with the gate g (H,) at its beginning, zero, the layer is the frozen one, bit for bit.
    """
    scores = fp32(q @ per_query_head(k, q).mT) / math.sqrt(q.shape[-1])
    weights = gate.tanh()[:, None, None] * scores.softmax(-1)
    return weights.to(v.dtype) @ per_query_head(v, q)


def add_adapter(model: "Llama", length: int, layers: int) -> None:
    """Gives the last layers LLaMA-Adapter's prompts of `length` vectors, and a gate for each head;
    only these learn then."""
    model.requires_grad_(False)
    for layer in model.layers[-layers:]:
        layer.attention.prompt = nn.Parameter(torch.zeros(length, model.config.dim))
        layer.attention.gate = nn.Parameter(torch.zeros(model.config.n_heads))


# ---------------------------------------------------------------------------------------------
# The model


class KVCache:
    """Keys and values of the tokens read so far, so that a new token attends to them without
    computing them again: held[layer] is a pair of (B, K, S, E), S = capacity, sized to the request.

    lengths[b] tokens of row b are held. Rows may differ: positions beyond a row's length are never
    visible, so prompts padded on the right need no mask of their own.
    """

    def __init__(self, config: LlamaConfig, batch: int, capacity: int, dtype=None, device=None):
        shape = (batch, config.n_kv_heads, capacity, config.head_dim)
        self.held = []
        for _ in range(config.n_layers):
            k = torch.zeros(shape, dtype=dtype, device=device)
            self.held.append((k, torch.zeros_like(k)))
        self.capacity = capacity
        self.places = torch.arange(capacity, device=device)
        self.cos, self.sin = rope_table(config, self.places)
        self.lengths = [0] * batch

    def positions(self, T: int) -> Tensor:
        """Positions of the next T tokens: (T,) if all rows are equally long, else (B, T)."""
        if len(set(self.lengths)) == 1:
            return self.places[self.lengths[0]:self.lengths[0] + T]
        return self.places[:T] + torch.tensor(self.lengths, device=self.places.device)[:, None]

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's k, v (B, K, T, E) at `positions`, given by positions(T); returns all
        keys and values up to the newest, two of (B, K, S, E)."""
        T = k.shape[2]
        end = max(self.lengths) + T
        for past, new in zip(self.held[layer], (k, v)):
            if positions.dim() == 1:
                past[:, :, end - T:end] = new
            else:
                row = torch.arange(len(past), device=past.device)[:, None]
                past[row, :, positions] = new.transpose(1, 2).to(past.dtype)
        keys, values = self.held[layer]
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, T: int) -> None:
        """Counts T more tokens in every row, once all layers have written them."""
        self.lengths = [length + T for length in self.lengths]

    def take(self, other: "KVCache", rows: list[int]) -> None:
        """Begins row i with what row rows[i] of another, smaller cache holds."""
        for mine, theirs in zip(self.held, other.held):
            for past, new in zip(mine, theirs):
                past[:, :, :new.shape[2]] = new[rows]
        self.lengths = [other.lengths[row] for row in rows]


BACKWARD = ("manual", "autograd", "recompute")


class Llama(nn.Module):
    """The language model: embedding, L layers, RMSNorm, output projection (section 2.2).

        p(token t+1 | tokens 0..t) = softmax( Wo RMSNorm(h_L) )_t

    attention names an entry of ATTENTION. backward: `manual` is LayerByHand, `autograd` torch's
    own, `recompute` keeps only the input of each layer and computes the layer again (Chen et al.
    2016). dtype is the type to compute in (None: that of the weights); norms, softmax and loss are
    in fp32. tp: the ranks that share each layer.
    """

    def __init__(self, config: LlamaConfig, attention: str = "fused", backward: str = "manual",
                 dtype: torch.dtype | None = None,
                 tp: TensorParallel = TensorParallel()):
        super().__init__()
        self.config, self.backward, self.dtype, self.tp = config, backward, dtype, tp
        self.attend, self.attend_backward = ATTENTION[attention]
        shape = config.vocab_size, config.dim
        self.tok_embeddings = nn.Embedding(*shape, _weight=torch.zeros(shape))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)
        self.register_parameter("score", None)  # see add_score

    @classmethod
    def create(cls, config: LlamaConfig, seed: int, device="cpu", **options) -> "Llama":
        """A new model with initial weights in fp32, the same on every device."""
        with torch.device("meta"):
            model = cls(config, **options)
        model.to_empty(device=device)
        model.init_weights(seed)
        return model

    @torch.no_grad()
    def init_weights(self, seed: int, known: Container[str] = ()) -> None:
        """Fills the weights, but not those that are `known` by name (Meta never published its own
        initial values; Radford et al. 2019):

            norms                                                      1
            score, and what an adapter multiplies its change by        0
            lora_a (Kaiming-uniform)                                   U(-1/sqrt(in), 1/sqrt(in))
            prompts                                                    N(0, 1)
            wo, w2, which add to the residual stream in 2 L places     N(0, 0.02^2 / (2 L))
            all other matrices                                         N(0, 0.02^2)

        A row depends on (seed, parameter name, row) alone, not on order, layout or device: the
        generator counts (Salmon et al. 2011), so that a rank draws only the rows that it holds.
        """
        for name, p in self.named_parameters():
            if name in known:
                continue
            shard = local_shard(p)
            if name.endswith(("lora_b", "gate", "score")):
                shard.zero_()
                continue
            if p.dim() == 1:
                shard.fill_(1.0)
                continue
            key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
            std = 0.02
            if name.endswith(("wo.weight", "w2.weight")):
                std /= math.sqrt(2 * self.config.n_layers)
            elif name.endswith("prompt"):
                std = 1.0
            elif name.endswith("lora_a"):
                std = 1 / math.sqrt(p.shape[1])
            first_row, first_column = shard_offset(p)
            drawn = np.empty(shard.shape, np.float32)
            for row, values in enumerate(drawn, first_row):
                random = np.random.Generator(np.random.Philox(key=key, counter=row << 64))
                if name.endswith("lora_a"):
                    whole = random.random(p.shape[1], dtype=np.float32) * 2 - 1
                else:
                    whole = random.standard_normal(p.shape[1], dtype=np.float32)
                mine = whole[first_column:first_column + len(values)]
                np.multiply(mine, np.float32(std), out=values)
            shard.copy_(torch.from_numpy(drawn))

    def hidden(self, tokens: Tensor, cache: KVCache | None = None,
               boundaries: Tensor | None = None) -> Tensor:
        """What the output projection reads: tokens (B, T) -> RMSNorm(h_L), (B, T, D).

        With a cache, the tokens continue what it holds, and it grows by T in every row.
        """
        h, T = self.embed(tokens), tokens.shape[1]
        if cache is None:
            return self.norm(self.run_layers(h, T, boundaries))
        positions = cache.positions(T)
        cos, sin = cache.cos[positions], cache.sin[positions]
        for i, layer in enumerate(self.layers):
            h = layer(h, cos, sin, partial(self.attend_to_cache, cache, i, positions))
        cache.advance(T)
        return self.norm(h)

    def attend_to_cache(self, cache: KVCache, layer: int, positions: Tensor, q: Tensor, k: Tensor,
                        v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attention of new tokens, whose keys and values the cache takes in, in its own type."""
        k, v = cache.write(layer, k, v, positions)
        o, lse = self.attend(q.to(k.dtype), k, v, positions)
        return o.to(q.dtype), lse

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, D). With tensor parallelism a rank holds V/t rows of the table and adds
        zero for other tokens; the sum over ranks leaves each rank N/t tokens, (N/t, D)."""
        if self.tp.size == 1:
            h = self.tok_embeddings(tokens)
            return h.to(self.dtype or h.dtype)
        table = local_shard(self.tok_embeddings.weight)
        row = tokens - self.tp.rank * len(table)
        mine = (0 <= row) & (row < len(table))
        h = F.embedding(row.where(mine, 0), table) * mine[..., None]
        return self.tp.g_bar(h.to(self.dtype or h.dtype), tokens.shape[1])

    def run_layers(self, h: Tensor, T: int, boundaries: Tensor | None) -> Tensor:
        """h of embed through the layers, for rows of T tokens. A layer that is None belongs to
        another stage of a pipeline."""
        positions = torch.arange(T, device=h.device)
        cos, sin = rope_table(self.config, positions)
        attend = partial(self.attend, positions=positions, boundaries=boundaries)
        run = None
        if self.tp.size > 1:
            run = partial(over_ranks, tp=self.tp)
        if self.backward == "manual":
            attend_backward = partial(self.attend_backward, boundaries=boundaries)
            run = partial(by_hand, attend_backward=attend_backward, tp=self.tp)
        for layer in self.layers:
            if layer is None:
                continue
            if self.backward == "recompute":
                h = checkpoint(layer, h, cos, sin, attend, run, use_reentrant=False)
            else:
                h = layer(h, cos, sin, attend, run)
        return h

    @property
    def output_weight(self) -> Tensor:
        """(V, D), with tensor parallelism this rank's (V/t, D)."""
        return local_shard((self.tok_embeddings if self.output is None else self.output).weight)

    def logits(self, h: Tensor) -> Tensor:
        """Scores of the next token in fp32: (..., D) -> (..., V)."""
        return fp32(linear(h, self.output_weight) if self.output is None else self.output(h))

    def forward(self, tokens: Tensor, cache: KVCache | None = None,
                boundaries: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> logits (B, T, V) in fp32."""
        return self.logits(self.hidden(tokens, cache, boundaries))

    def loss(self, tokens: Tensor, targets: Tensor, boundaries: Tensor | None = None,
             reduction: str = "mean") -> Tensor:
        """Negative log-likelihood of the targets in nats, mean or sum: two of (B, T) -> scalar.

            loss = -(1/n) sum log p(target | tokens up to here)     over the n targets >= 0

        A negative target is none: padding, or a prompt that is not to be learned.
        """
        return self.loss_of(self.hidden(tokens, boundaries=boundaries), targets, reduction)

    def nll_of(self, h: Tensor, targets: Tensor) -> Tensor:
        """-log p of each target from hidden(tokens): (B, T) in fp32, 0 where it is negative, with
        its gradient; for objectives that weigh tokens or texts against each other."""
        nll = TokenNLL.apply(h.flatten(0, -2), self.output_weight, targets.flatten(), self.tp)
        return nll.view(targets.shape)

    def rewards_of(self, h: Tensor, shape: Sequence[int]) -> Tensor:
        """What the score head makes of hidden(tokens), in the shape (B, T) of the tokens, in fp32
        (Llama 2, section 3.2.2: it replaces the output projection). A text's reward is its last."""
        mine = fp32(h).flatten(0, -2) @ fp32(local_shard(self.score))
        every = self.tp.gather(mine.detach(), 1)().flatten()  # of tensor parallel ranks
        begin = self.tp.rank * len(mine)
        return torch.cat((every[:begin], mine, every[begin + len(mine):])).view(shape)

    def loss_of(self, h: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """The loss from RMSNorm(h_L), (B, T, D) or, with tensor parallelism, (N/t, D)."""
        total = SumNLL.apply(h.flatten(0, -2), self.output_weight, targets.flatten(), self.tp)
        return total if reduction == "sum" else total / (targets >= 0).sum().clamp(min=1)


def add_score(model: Llama, freeze_output: bool = True) -> None:
    """Gives the model a score head. Of a reward model it replaces the output projection, which is
    frozen then; of PPO it is the value, beside it."""
    model.score = nn.Parameter(torch.zeros(model.config.dim))
    if freeze_output and model.output is not None:
        model.output.requires_grad_(False)


def shard_offset(weight: Tensor) -> tuple[int, ...]:
    """Where in the whole weight this rank's shard begins, for each axis."""
    if not hasattr(weight, "to_local"):
        return (0,) * weight.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    return compute_local_shape_and_global_offset(weight.shape, weight.device_mesh,
                                                 weight.placements)[1]


# ---------------------------------------------------------------------------------------------
# The loss


def logit_rows(V: int, D: int, learns: bool = True) -> int:
    """Rows of logits that next_token_nll holds at a time. 8 Mi logits (34 MB in fp32) were fastest
    on our CPUs; where W learns up to four times as many for large D, because each chunk adds a
    V x D sum."""
    return max(1, 2**23 // V, learns * min(D // 2, 2**25 // V))


def next_token_nll(h: Tensor, weight: Tensor, targets: Tensor,
                   wanted: tuple[bool, bool] = (False, False),
                   tp: TensorParallel = TensorParallel(), dnll: Tensor | None = None
                   ) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cross entropy of the output projection, and in the same pass the gradient of its sum, chunk
    by chunk: the N x V logits are never all in memory.

        z = h W^T    p = softmax(z)    nll_i = -log p_i,target
        dz = (p - onehot(target)) dnll                dh = dz W     dW = dz^T h

    dnll (N,) is the gradient of what follows by each nll; None: 1, for the gradient of the sum.

    h (N, D), W (V, D), targets (N,) -> nll (N,) in fp32, and dh (N, D), dW (V, D) where wanted.
    Where a target is negative there is none: its nll and its dz are 0.
    With tensor parallelism h is (N/t, D) and W this rank's (V/t, D).
    """
    w, rows = weight.to(h.dtype), logit_rows(*weight.shape, wanted[1])
    h = tp.gather(h, 1)().view(-1, h.shape[-1])
    counted = (targets >= 0)[:, None]
    column = (targets - tp.rank * len(w))[:, None]  # of the target, among this rank's
    mine = counted
    if tp.size > 1:
        mine = counted & (0 <= column) & (column < len(w))
    column = column.where(mine, 0)
    scale = counted if dnll is None else (dnll[:, None] * counted).to(h.dtype)
    nll = torch.empty(len(h), dtype=fp32(h[:0]).dtype, device=h.device)
    dh = torch.empty_like(h) if wanted[0] else None
    dw = None
    for start in range(0, len(h), rows):
        chunk = slice(start, start + rows)
        z = fp32(F.linear(h[chunk], w))
        z_target = z.gather(1, column[chunk]) * mine[chunk]
        p, logsumexp, z_target = softmax_over_ranks(z, z_target, tp)
        nll[chunk] = ((logsumexp - z_target) * counted[chunk])[:, 0]
        if not any(wanted):
            continue
        dz = p.scatter_add_(1, column[chunk], -mine[chunk].to(p.dtype)).to(h.dtype)
        if wanted[0]:
            dh[chunk] = (dz @ w).mul_(scale[chunk])
        if wanted[1]:
            part = dz.T @ (h[chunk] * scale[chunk])
            dw = part if dw is None else fp32(dw).add_(part)  # one chunk alone needs no sum
    if wanted[1] and dw is None:  # no tokens: ranks still add up their gradients
        dw = torch.zeros_like(w)
    if wanted[0]:
        dh = tp.scatter_sum(dh[None], 0)().view(-1, dh.shape[-1])
    return nll, dh, dw


def softmax_over_ranks(z: Tensor, z_target: Tensor, tp: TensorParallel
                       ) -> tuple[Tensor, Tensor, Tensor]:
    """p (n, V/t), logsumexp and z_target (n, 1) of the whole vocabulary, of which this rank has the
    logits z (n, V/t) and the target's, or 0. Ranks exchange two numbers a token, no logits."""
    p = z.softmax(-1)
    # log p_max = z_max - logsumexp spares the exp of another pass over all V logits.
    logsumexp = z.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
    if tp.size == 1:
        return p, logsumexp, z_target
    every = tp.gather(torch.stack((logsumexp, z_target)), 2)()  # (t, 2, n, 1)
    whole = every[:, 0].logsumexp(0)
    p *= (logsumexp - whole).exp()
    return p, whole, every[:, 1].sum(0)


class SumNLL(torch.autograd.Function):
    """The sum of next_token_nll, whose gradient is computed with it."""

    @staticmethod
    def forward(ctx, h, weight, targets, tp):
        nll, dh, dw = next_token_nll(h, weight, targets, ctx.needs_input_grad[:2], tp)
        ctx.save_for_backward(dh, dw)
        return nll.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        # In place, to spare a copy: torch refuses a second backward, which would scale twice.
        dh, dw = ctx.saved_tensors
        dh = None if dh is None else dh.mul_(dloss)
        dw = None if dw is None else dw.mul_(dloss)
        return dh, dw, None, None


class TokenNLL(torch.autograd.Function):
    """nll of next_token_nll, whose gradient is computed once it is known how much a token counts:
    the logits are computed twice, and never kept."""

    @staticmethod
    def forward(ctx, h, weight, targets, tp):
        ctx.save_for_backward(h, weight, targets)
        ctx.tp = tp
        return next_token_nll(h, weight, targets, tp=tp)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dnll):
        _, dh, dw = next_token_nll(*ctx.saved_tensors, ctx.needs_input_grad[:2], ctx.tp, dnll)
        return dh, dw, None, None
