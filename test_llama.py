"""One class of tests per piece, named as the piece; each compares with an oracle that is not ours.

    python -m pytest                              # everything, offline, about a minute on 2 cores
    python -m pytest -k TestRoPE                  # one piece
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small products; a second thread only waits

import ast
import base64
import contextlib
import ctypes
import functools
import hashlib
import io
import json
import math
import pickle
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import unicodedata
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import regex
import sentencepiece
import tiktoken
import tokenizers
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.convert_slow_tokenizer import generate_merges

import generate
import llama
import tokenizer
import train
from generate import Sampling
from llama import SIZES, KVCache, LayerByHand, Llama, LlamaConfig, Recipe

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
SMALL = LlamaConfig(dim=48, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=100, vocab_size=97,
                    max_seq_len=64)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens(*shape, vocab=97, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def close(found, wanted, atol=1e-5):
    torch.testing.assert_close(found, wanted, atol=atol, rtol=1e-4, check_dtype=False)


def starts(*tokens):
    """Boundaries: where documents begin in the tokens of a batch laid end to end, and the end."""
    return torch.tensor(tokens, dtype=torch.int32)


def check_pair(forward, backward, *shapes):
    """backward(dy, *x, *forward(*x)) against numerical derivatives in float64."""
    class Pair(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *x):
            y, *rest = forward(*x)
            ctx.known = (*x, y.detach(), *rest)
            return y

        @staticmethod
        def backward(ctx, dy):
            return backward(dy, *ctx.known)
    x = [noise(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(Pair.apply, [z.requires_grad_() for z in x])


class Calls(TorchDispatchMode):
    """Notes the arguments of every operation inside, by its name, and all shapes that are made."""

    def __init__(self):
        super().__init__()
        self.args, self.shapes = {}, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        self.args.setdefault(operation.__name__, []).append(args)
        self.shapes += [x.shape for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        return made


def random_model(config, seed=1, **options):
    """Initial weights, but the norms too are random, so that a norm left out shows."""
    model = Llama.create(config, seed, **options)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(noise(*p.shape, seed=i), alpha=0.1)
    return model


def save_meta(model, folder):
    """Meta's folder of a model; the copies do not survive their being written."""
    weights = {name: llama.Weight.of(w.clone()) for name, w in model.state_dict().items()}
    llama.write_meta(model.config, weights, folder)


class TestSizes:
    COUNTS = {  # exact, from the published shapes
        "7b": 6738415616, "13b": 13015864320, "33b": 32528943616, "65b": 65285660672,
        "llama2-7b": 6738415616, "llama2-13b": 13015864320, "llama2-34b": 33743970304,
        "llama2-70b": 68976648192, "llama3-8b": 8030261248, "llama3-70b": 70553706496,
        "llama3.1-8b": 8030261248, "llama3.1-70b": 70553706496, "llama3.1-405b": 405853388800,
        "llama3.2-1b": 1235814400, "llama3.2-3b": 3212749824, "tinyllama-1.1b": 1100048384,
        "smollm2-135m": 134515008, "stories260k": 260032, "stories15m": 15191712,
        "stories42m": 41689600, "stories110m": 109529856}

    def test_parameters_of_every_size(self):
        assert set(self.COUNTS) | {"tiny"} == set(SIZES)
        for name, (config, _) in SIZES.items():
            with torch.device("meta"):
                counted = sum(p.numel() for p in Llama(config).parameters())
            assert counted == config.n_params == self.COUNTS.get(name, counted), name

    def test_heads_of_a_size_of_their_own(self):
        config = replace(SMALL, head_size=20)
        model = Llama.create(config, 0)
        assert model.layers[0].attention.wo.weight.shape == (48, 4 * 20) and config.head_dim == 20
        assert sum(p.numel() for p in model.parameters()) == config.n_params
        assert replace(SMALL, head_size=12) == SMALL  # where it is D / H it is not said
        assert replace(SMALL, dim=96).head_dim == 24 and replace(config, dim=50).head_dim == 20
        assert "head_size" not in llama.write_params(SMALL)

    def test_table_2(self):
        rows = {"7b": (4096, 32, 32, 3e-4, 1.0e12), "13b": (5120, 40, 40, 3e-4, 1.0e12),
                "33b": (6656, 52, 60, 1.5e-4, 1.4e12), "65b": (8192, 64, 80, 1.5e-4, 1.4e12)}
        for name, row in rows.items():
            c, r = SIZES[name]
            assert (c.dim, c.n_heads, c.n_layers, r.lr, r.train_tokens) == row
            assert (r.batch_tokens, r.warmup, r.final_lr) == (4194304, 2000, 0.1)
            assert (r.betas, r.weight_decay, r.clip, r.eps) == ((0.9, 0.95), 0.1, 1.0, None)

    def test_successors(self):
        eps = {name: c.norm_eps for name, (c, _) in SIZES.items()}
        assert eps["33b"] == 1e-6 and eps["65b"] == 1e-5 and eps["llama2-7b"] == 1e-5
        theta = {name: c.rope_theta for name, (c, _) in SIZES.items()}
        assert theta["llama2-70b"] == 1e4 and theta["llama3-8b"] == 5e5
        scaling = {name: c.rope_scaling for name, (c, _) in SIZES.items() if c.rope_scaling}
        assert scaling == {"llama3.1-8b": 8, "llama3.1-70b": 8, "llama3.1-405b": 8,
                           "llama3.2-1b": 32, "llama3.2-3b": 32}
        r = SIZES["llama3.1-405b"][1]
        assert (r.lr, r.final_lr, r.warmup, r.train_tokens) == (8e-5, 0.01, 8000, 15.6e12)
        assert SIZES["llama2-70b"][1].eps == 1e-5 and SIZES["llama3-8b"][1].document_mask
        assert not SIZES["llama2-7b"][1].document_mask

    def test_what_was_never_published_is_named(self):
        assert SIZES["7b"][1].filled()[1] == ["eps"]
        recipe, missing = SIZES["llama3.2-1b"][1].filled()
        assert "lr" in missing and None not in asdict(recipe).values()
        assert SIZES["llama2-7b"][1].filled()[1] == []

    @pytest.mark.parametrize("change, named", [
        ({"dims": 3}, "dims"), ({"dim": 50}, "dim=50"), ({"n_kv_heads": 3}, "n_kv_heads=3"),
        ({"n_layers": 0}, "n_layers=0"), ({"n_layers": 10**6}, "n_layers"),
        ({"dim": 4.0}, "dim=4.0"), ({"norm_eps": -1.0}, "norm_eps"),
        ({"rope_theta": None}, "rope_theta"), ({"head_size": 12.5}, "head_size"),
        ({"head_size": 7}, "even size")])
    def test_bad_fields_are_named(self, change, named):
        with pytest.raises(ValueError, match=named):
            LlamaConfig.from_dict({**asdict(SMALL), **change})


class TestRMSNorm:
    def test_equation(self):
        x, g = noise(3, 5, 48), noise(48, seed=1)
        close(llama.rms_norm(x, g, 1e-5)[0], F.rms_norm(x, (48,), g, 1e-5))
        tiny = x * 1e-3  # where eps is what counts
        close(llama.rms_norm(tiny, g, 1e-5)[0], F.rms_norm(tiny, (48,), g, 1e-5))
        close(llama.RMSNorm(48, 0.5)(x), F.rms_norm(x, (48,), torch.ones(48), 0.5))

    def test_rounds_before_the_weight(self):
        from transformers.models.llama.modeling_llama import LlamaRMSNorm
        oracle = LlamaRMSNorm(48, 1e-5).bfloat16()
        oracle.weight.data = noise(48, seed=1, dtype=torch.bfloat16)
        x = noise(64, 48, dtype=torch.bfloat16) * 100
        found, r = llama.rms_norm(x, oracle.weight, 1e-5)
        assert found.dtype == torch.bfloat16 and torch.equal(found, oracle(x))
        assert llama.rms_norm(x, oracle.weight.float(), 1e-5)[0].dtype == torch.bfloat16
        assert r.dtype == torch.float32 and r.shape == (64, 1)
        assert torch.equal(llama.rms_norm(x, oracle.weight, 0, r)[0], found)

    def test_gradient(self):
        check_pair(lambda x, g: llama.rms_norm(x, g, 0.1),
                   lambda dy, x, g, y, r: llama.rms_norm_backward(dy, x, r, g), (2, 3, 5), (5,))


def hf_order(w, n_heads):
    """Rows of wq or wk from Meta's interleaved pairs to the two halves of transformers."""
    rows, columns = w.shape
    return w.view(n_heads, rows // n_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def hf_config(config):
    from transformers import LlamaConfig as HFConfig
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= {"rope_type": "llama3", "factor": config.rope_scaling, "low_freq_factor": 1.0,
                 "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return HFConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings,
        rope_parameters=rope)


class TestRoPE:
    @pytest.mark.parametrize("config", [
        SMALL, SIZES["llama3.1-8b"][0], SIZES["llama3.2-1b"][0],
        replace(SIZES["llama3.2-3b"][0], rope_theta=1e4)])
    def test_frequencies(self, config):
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
        oracle = LlamaRotaryEmbedding(hf_config(config)).inv_freq
        torch.testing.assert_close(llama.rope_frequencies(config), oracle, rtol=1e-5, atol=0)

    def test_rotation_by_complex_numbers(self):
        x, positions = noise(2, 7, 4, 12), torch.arange(3, 10)
        f = 1e4 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
        angle = positions[:, None, None] * f
        z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        wanted = torch.view_as_real(z * torch.exp(1j * angle)).flatten(-2)
        cos, sin = llama.rope_table(replace(SMALL, dim=48), positions)
        close(llama.apply_rope(x, cos, sin), wanted.float())

    def test_transformers_rotation_after_the_permutation(self):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
        x, positions = noise(1, 9, 4, 12), torch.arange(9)
        halves = x.transpose(1, 2).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        cos, sin = LlamaRotaryEmbedding(hf_config(SMALL))(x, positions[None])
        wanted = apply_rotary_pos_emb(halves, halves, cos, sin)[0]
        found = llama.apply_rope(x, *llama.rope_table(SMALL, positions))
        found = found.transpose(1, 2).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        close(found, wanted)

    def test_own_inverse_and_rows_of_their_own(self):
        x = noise(2, 7, 4, 12)
        cos, sin = llama.rope_table(SMALL, torch.arange(7) + torch.tensor([0, 5])[:, None])
        assert cos.shape == (2, 7, 1, 6)
        y = llama.apply_rope(x, cos, sin)
        close(llama.apply_rope(y, cos, -sin), x)
        close(y[1:], llama.apply_rope(x[1:], *llama.rope_table(SMALL, torch.arange(5, 12))))
        half = llama.apply_rope(x.bfloat16(), cos, sin)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), y, atol=0.03, rtol=0.03)

    def test_gradient(self):
        cos, sin = llama.rope_table(replace(SMALL, dim=16), torch.arange(3, 6))
        check_pair(lambda x: [llama.apply_rope(x, cos, sin)],
                   lambda dy, x, y: llama.apply_rope(dy, cos, -sin), (2, 3, 2, 4))


class TestSwiGLU:
    def test_equation(self):
        from transformers.activations import ACT2FN
        a, b = noise(5, 7) * 4, noise(5, 7, seed=1)
        close(llama.swiglu(a, b), ACT2FN["silu"](a) * b)
        assert llama.swiglu(torch.tensor(2.0), torch.tensor(3.0)).item() == pytest.approx(5.284782)

    def test_feed_forward(self):
        from transformers.models.llama.modeling_llama import LlamaMLP
        ours, oracle = llama.FeedForward(SMALL), LlamaMLP(hf_config(SMALL))
        for mine, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            getattr(oracle, theirs).weight = getattr(ours, mine).weight
        x = noise(2, 3, 48)
        close(ours(x), oracle(x))

    def test_gradient(self):
        check_pair(lambda a, b: [llama.swiglu(a, b)],
                   lambda dy, a, b, y: llama.swiglu_backward(dy, a, b), (3, 4), (3, 4))


TILED = [partial(f, size=4) for f in (llama.attention_tiled, llama.attention_tiled_backward)]


def dense_mask(B, T, documents):
    """Which key each query sees, (B, 1, T, T): none after it, none of another document."""
    number = torch.tensor([sum(start <= i for start in documents) for i in range(B * T)])
    number = number.view(B, 1, T)
    return (number[..., None] == number[..., None, :]) & torch.ones(T, T).tril().bool()


@pytest.fixture(params=["equation", "tiled", "fused", "fallback"])
def attention(request, monkeypatch):
    """The pair (forward, backward); fallback: what fused does where there is no flash kernel."""
    if request.param == "fallback":
        monkeypatch.setattr(llama, "has_flash", lambda q: False)
    return {**llama.ATTENTION, "tiled": TILED}.get(request.param, llama.ATTENTION["fused"])


class TestAttention:
    @pytest.mark.parametrize("kv_heads, T, documents", [
        (4, 9, None), (2, 17, None), (1, 5, None), (2, 1, None), (2, 9, [0, 4, 5, 9, 12, 18]),
        (1, 9, [0, 9, 18]), (4, 33, [0, 33, 50, 66])])
    def test_equation(self, attention, kv_heads, T, documents):
        q, do = noise(2, 2, 4, T, 8)
        k, v = noise(2, 2, kv_heads, T, 8, seed=1)
        mask = dense_mask(2, T, documents or [0, T])
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        wanted = F.scaled_dot_product_attention(*exact, attn_mask=mask, enable_gqa=True)
        boundaries = starts(*documents) if documents else None
        o, lse = attention[0](q, k, v, torch.arange(T), boundaries)
        close(o, wanted.float())
        if lse is not None:
            scores = q @ k.repeat_interleave(4 // kv_heads, 1).mT / math.sqrt(8)
            close(lse, scores.masked_fill(~mask, -math.inf).logsumexp(-1))
        found = attention[1](do, q, k, v, o, lse, boundaries)
        for mine, theirs in zip(found, torch.autograd.grad(wanted, exact, do.double())):
            close(mine, theirs.float())

    def test_later_queries_and_rows_of_different_length(self, attention):
        def attend(*args):
            return attention[0](*args)[0]
        q, k, v = noise(2, 4, 3, 8), noise(2, 2, 9, 8, seed=1), noise(2, 2, 9, 8, seed=2)
        late = attend(q, k, v, torch.arange(6, 9))
        full = attend(torch.cat([noise(2, 4, 6, 8, seed=3), q], 2), k, v, torch.arange(9))
        close(late, full[:, :, 6:])
        ragged = attend(q, k, v, torch.arange(3) + torch.tensor([6, 2])[:, None])
        close(ragged[:1], late[:1])
        close(ragged[1:], attend(q[1:], k[1:, :, :5], v[1:, :, :5], torch.arange(2, 5)))
        newest = attend(q[:, :, 2:], k, v, torch.arange(8, 9))
        close(newest, late[:, :, 2:])
        close(attend(q[:, :, 2:], k, v, torch.tensor([[8], [4]])), ragged[:, :, 2:])

    @pytest.mark.parametrize("kv_heads, documents", [(2, None), (1, [0, 2, 5, 6, 10])])
    def test_gradient(self, attention, kv_heads, documents):
        options = {"boundaries": starts(*documents) if documents else None}
        check_pair(partial(attention[0], positions=torch.arange(5), **options),
                   partial(attention[1], **options), (2, 2, 5, 2), *[(2, kv_heads, 5, 2)] * 2)

    def test_half_precision(self, attention):
        q, k, v, do = (noise(1, 2, 33, 8, seed=s).requires_grad_() for s in range(4))
        wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        half = [x.detach().bfloat16() for x in (q, k, v)]
        o, lse = attention[0](*half, torch.arange(33))
        grads = attention[1](do.detach().bfloat16(), *half, o, lse)
        for mine, theirs in zip((o, *grads), (wanted, *torch.autograd.grad(wanted, (q, k, v), do))):
            assert mine.dtype == torch.bfloat16
            torch.testing.assert_close(mine.float(), theirs, atol=0.05, rtol=0.03)

    @pytest.mark.parametrize("documents", [[0, 34, 68], [0, 3, 20, 34, 51, 68]])
    def test_tiles_are_small_and_none_is_all_masked(self, documents):
        forward, backward = TILED
        q, k, v = noise(2, 2, 34, 8), *noise(2, 2, 1, 34, 8, seed=1)
        seen = dense_mask(2, 34, documents).any(0)[0]
        spans = [(rows.any(0).nonzero(), len(rows)) for rows in seen.split(4)]
        scores = sum((keys.max() - keys.min() + 1).item() * rows for keys, rows in spans)
        with FlopCounterMode(display=False) as first, Calls() as there:
            o, lse = forward(q, k, v, torch.arange(34), starts(*documents))
        with FlopCounterMode(display=False) as second, Calls() as back:
            backward(o, q, k, v, o, lse, starts(*documents))
        assert all(min(s[-2:]) <= 8 for s in there.shapes + back.shapes if len(s) > 1)
        of_a_product = 2 * 2 * 2 * 8 * scores  # B H E multiplications and additions a score
        assert first.get_total_flops() == 2 * of_a_product  # q k^T, A v
        assert second.get_total_flops() == 5 * of_a_product  # and dv, dA, dq, dk

    @pytest.mark.parametrize("kv_heads, documents", [(4, None), (2, [0, 5, 9, 18])])
    def test_on_cuda(self, kv_heads, documents, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        with FakeTensorMode(), torch.device("cuda"), Calls() as seen:  # no memory, and no GPU
            q, do = (torch.empty(2, 9, 4, 16, dtype=torch.bfloat16) for _ in "qo")
            k, v = (torch.empty(2, 9, kv_heads, 16, dtype=torch.bfloat16) for _ in "kv")
            q, k, v, do = (x.transpose(1, 2) for x in (q, k, v, do))
            boundaries = torch.tensor(documents, dtype=torch.int32) if documents else None
            o, lse = llama.attention_fused(q, k, v, torch.arange(9), boundaries)
            grads = llama.attention_fused_backward(do, q, k, v, o, lse, boundaries)
            assert not llama.has_flash(q.float())
            assert not llama.has_flash(torch.empty(2, 4, 9, 12, dtype=q.dtype))
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
            assert not llama.has_flash(q)
        facts = [(x.shape, x.dtype, x.device, x.stride()) for x in (o, *grads, q, q, k, v)]
        assert facts[:4] == facts[4:]
        assert lse.shape == ((4, 18) if documents else (2, 4, 9)) and lse.dtype == torch.float32
        for direction, given in (("forward", (q, k, v)), ("backward", (do, q, k, v, o, lse))):
            (args,), n = seen.args[f"_flash_attention_{direction}.default"], len(given)
            for x, like in zip(args[:min(n, 5)], given):  # packed: no row's end in between
                packed = like.transpose(1, 2).flatten(0, 1 if documents else 0)
                assert (x.shape, x.stride()) == (packed.shape, packed.stride())
            assert args[n] is args[n + 1] is boundaries  # the kernel's own document mask
            assert args[n + 2:n + 6] == (9, 9, 0.0, True)  # longest, no dropout, causal


class TestInitialisation:
    def test_a_value_depends_on_seed_and_name_alone(self):
        small, deep = Llama.create(SMALL, 7), Llama.create(replace(SMALL, n_layers=5), 7)
        for name, p in small.named_parameters():
            if not name.endswith(("wo.weight", "w2.weight")):  # their scale knows the depth
                assert torch.equal(p, deep.state_dict()[name]), name
        other = Llama.create(SMALL, 8).state_dict()
        again = Llama.create(SMALL, 7).state_dict()
        first = {name: p[0, 0].item() for name, p in small.named_parameters() if p.dim() == 2}
        assert not any(torch.equal(small.state_dict()[name], other[name]) for name in first)
        assert all(torch.equal(small.state_dict()[name], again[name]) for name in again)
        assert len(set(first.values())) == len(first)

    def test_scales(self):
        config = replace(SMALL, dim=128, n_heads=4, n_layers=8, hidden_dim=300)
        for name, p in Llama.create(config, 0).named_parameters():
            if p.dim() == 1:
                assert torch.equal(p, torch.ones_like(p))
                continue
            wanted = 0.02 / 4 if name.endswith(("wo.weight", "w2.weight")) else 0.02
            assert p.std().item() == pytest.approx(wanted, rel=0.05), name
            assert abs(p.mean().item()) < wanted / 20


HF_NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj"}


def hf_name(name):
    layer, kind = re.fullmatch(r"(layers\.\d+\.)?(.*)\.weight", name).groups()
    return f"{'model.' + layer if layer else ''}{HF_NAMES[kind]}.weight"


def in_hf_order(name, w, config):
    heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.split(".")[-2])
    return hf_order(w, heads) if heads else w


def oracle_of(model):
    """transformers' LlamaForCausalLM with our weights."""
    from transformers import LlamaForCausalLM
    oracle = LlamaForCausalLM(hf_config(model.config))
    state = {hf_name(name): in_hf_order(name, w, model.config)
             for name, w in model.state_dict().items()}
    if model.config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    oracle.load_state_dict(state)
    return oracle


class TestLlama:
    @pytest.mark.parametrize("change", [
        {}, {"n_kv_heads": 4}, {"n_kv_heads": 1, "tie_embeddings": True},
        {"rope_theta": 5e5, "rope_scaling": 8.0, "dim": 96, "max_seq_len": 131072},
        {"rope_theta": 1e5, "rope_scaling": 32.0, "tie_embeddings": True, "max_seq_len": 131072}])
    def test_logits_loss_and_gradients_of_transformers(self, change):
        model = random_model(replace(SMALL, **change))
        oracle = oracle_of(model)
        x, y = tokens(2, 40), tokens(2, 40, seed=1)
        theirs = oracle(input_ids=x).logits
        close(model(x), theirs, atol=1e-4)
        loss, wanted = model.loss(x, y), F.cross_entropy(theirs.flatten(0, 1), y.flatten())
        close(loss, wanted, atol=1e-4)
        loss.backward()
        wanted.backward()
        theirs = dict(oracle.named_parameters())
        for name, p in model.named_parameters():
            close(in_hf_order(name, p.grad, model.config), theirs[hf_name(name)].grad, 1e-4)

    def test_equation_and_documents(self):
        model, x, y = random_model(SMALL), tokens(2, 20), tokens(2, 20, seed=1)
        grads = {}
        for name in llama.ATTENTION:
            other = Llama.create(SMALL, 0, attention=name)
            other.load_state_dict(model.state_dict())
            other.loss(x, y, starts(0, 7, 20, 40)).backward()
            grads[name] = [p.grad for p in other.parameters()]
        for one, *others in zip(*grads.values()):
            for other in others:
                close(one, other)

    def test_a_document_may_stand_anywhere(self):
        model, x = random_model(SMALL), tokens(1, 60)
        alone = model(x[:, 50:])
        assert (model(x)[:, 50:] - alone).abs().max() > 0.1
        for before in (1, 17, 50):
            found = model(x[:, 50 - before:], boundaries=starts(0, before, before + 10))
            close(found[:, before:], alone)

    def test_half_precision_computes_in_half_and_keeps_fp32_weights(self):
        model = random_model(SMALL, dtype=torch.bfloat16)
        x, kinds = tokens(2, 20), set()
        for layer in model.layers:
            layer.register_forward_hook(lambda m, i, o: kinds.add(o.dtype))
        logits = model(x)
        assert kinds == {torch.bfloat16} and logits.dtype == torch.float32
        full = random_model(SMALL)(x)
        assert 1e-4 < (logits - full).abs().mean() < 0.05 * full.abs().mean()
        model.loss(x, x).backward()
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}

    def test_loss_by_log_softmax(self):
        model, x, y = random_model(SMALL), tokens(2, 9), tokens(2, 9, seed=1)
        chosen = model(x).double().log_softmax(-1).gather(-1, y[..., None])
        assert model.loss(x, y).item() == pytest.approx(-chosen.mean().item(), rel=1e-5)


def gradients(model, shape=(2, 19), documents=None):
    """The losses of two batches, and the gradients that both together leave."""
    found = []
    for seed in (0, 1):
        boundaries = starts(*documents) if documents else None
        loss = model.loss(tokens(*shape, seed=seed), tokens(*shape, seed=seed + 2), boundaries)
        loss.backward()
        found.append(loss.detach())
    return found + [p.grad for p in model.parameters()]


class TestLayerByHand:
    @pytest.mark.parametrize("kv_heads", [2, 1])
    def test_gradient(self, kv_heads):
        forward, backward = llama.ATTENTION["equation"]
        tables = llama.rope_table(replace(SMALL, dim=16), torch.arange(3))
        attend = partial(forward, positions=torch.arange(3), boundaries=starts(0, 1, 3, 6))
        attend_backward = partial(backward, boundaries=starts(0, 1, 3, 6))
        kv = (4 * kv_heads, 8)
        shapes = [(2, 3, 8), (8,), (8, 8), kv, kv, (8, 8), (8,), (6, 8), (8, 6), (6, 8)]
        inputs = [noise(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate(shapes)]
        assert torch.autograd.gradcheck(lambda x, *weights: LayerByHand.apply(
            x, *tables, attend, attend_backward, 0.1, llama.Alone(), *weights),
            [z.requires_grad_() for z in inputs])

    @pytest.mark.parametrize("change, shape, documents", [
        ({}, (2, 19), None), ({"n_kv_heads": 4}, (1, 8), None), ({}, (3, 1), None),
        ({"n_kv_heads": 1, "tie_embeddings": True}, (2, 7), [0, 3, 7, 9, 14])])
    def test_equals_autograd(self, change, shape, documents):
        config = replace(SMALL, **change)
        wanted, *others = (gradients(random_model(config, backward=name), shape, documents)
                           for name in ("autograd", "manual", "recompute"))
        scale = max(gradient.abs().max().item() for gradient in wanted[2:])
        for other in others:
            for mine, theirs in zip(other, wanted):
                close(mine, theirs, atol=1e-5 * scale)

    def test_half_precision_is_as_good_as_autograd(self):
        exact = gradients(random_model(SMALL))
        hand, torchs = (gradients(random_model(SMALL, backward=name, dtype=torch.bfloat16))
                        for name in ("manual", "autograd"))
        for mine, theirs, true in zip(hand[2:], torchs[2:], exact[2:]):
            assert (mine - true).norm() <= 1.25 * (theirs - true).norm() < 0.05 * true.norm()

    def test_frozen_weights_cost_nothing(self):
        def run(frozen=None):
            model = random_model(SMALL)
            for name, p in model.named_parameters():
                p.requires_grad_(name != frozen)
            with FlopCounterMode(display=False) as counter:
                return gradients(model), counter
        whole, counter = run()
        names = [name for name, _ in random_model(SMALL).named_parameters()]
        for i, name in enumerate(names, 2):
            if name.startswith(("layers.1", "output")):
                found, less = run(name)
                assert found[i] is None
                assert all(torch.equal(a, b) for a, b in zip(found, whole) if a is not None)
                spared = 2 * (2 * 38 * whole[i].numel()) if whole[i].dim() == 2 else 0
                assert less.get_total_flops() == counter.get_total_flops() - spared, name

    @pytest.mark.parametrize("documents", [None, [0, 5, 19, 38]])
    def test_compiled(self, documents):
        model = random_model(replace(SMALL, n_layers=1))
        wanted = gradients(model, documents=documents)
        model.zero_grad()  # the loop over documents runs outside of the graph
        model.loss = torch.compile(model.loss, backend="aot_eager", fullgraph=documents is None)
        for mine, theirs in zip(gradients(model, documents=documents), wanted):
            close(mine, theirs)

    def test_autocast_is_left_to_autograd(self):
        model = random_model(SMALL)
        wanted = gradients(model)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(model)
        assert all((a - b).norm() < 0.1 * b.norm() for a, b in zip(found, wanted))

    def test_three_backwards_and_their_work(self):
        work, made = {}, []
        for name in llama.BACKWARD:
            model = random_model(SMALL, backward=name)
            model.layers[0].register_forward_hook(lambda m, i, o: made.append(o.grad_fn.name()))
            with FlopCounterMode(display=False) as counter:
                model.hidden(tokens(2, 19)).sum().backward()
            work[name] = counter.get_total_flops()
        again = work["manual"] // 3 - 3 * 2 * 38 * 48 * 100  # of W2 s nothing is saved: spared
        assert work["manual"] == work["autograd"] == work["recompute"] - again
        assert made[0] == "LayerByHandBackward" != made[1]

    def saved(self, by_hand):
        """Bytes a token that a layer of 7B saves in bf16, without weights and rope's table."""
        storages = {}

        def keep(x):
            storages[x.untyped_storage()._cdata] = x.untyped_storage()
            return x
        with FakeTensorMode():
            config, positions = replace(SIZES["7b"][0], n_layers=1, vocab_size=1), torch.arange(64)
            layer, tables = Llama(config).layers[0], llama.rope_table(config, positions)
            for p in layer.parameters():
                p.data = p.bfloat16()
            forward, backward = llama.ATTENTION["fused"]
            x = torch.empty(1, 64, 4096, dtype=torch.bfloat16, requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                y = layer(x, *tables, partial(forward, positions=positions),
                          backward if by_hand else None)
        aside = getattr(y.grad_fn, "__dict__", {}).values()
        assert not any(isinstance(z, torch.Tensor) for z in aside)
        for tensor in (*layer.parameters(), *tables):
            storages.pop(tensor.untyped_storage()._cdata, None)
        return sum(storage.nbytes() for storage in storages.values()) / 64

    def test_saves_what_its_table_says(self):
        def said(pattern):
            return int(re.search(pattern, LayerByHand.__doc__)[1].replace(",", ""))
        rows = [said(rf"{row} .*? ([\d,]{{3,}})") for row in (
            "x, q, o, h", "k, v", "a, b", "lse, r of each norm")]
        assert sum(rows[:3]) == said(r"([\d,]+) so far") == 93_184
        assert sum(rows) == said(r"([\d,]+) in all") == self.saved(True)
        assert self.saved(False) >= said(r"Autograd keeps ([\d,]+)") >= self.saved(True) / 0.62

    def test_on_cuda(self, monkeypatch):
        monkeypatch.setattr(llama, "has_flash", lambda q: True)
        with torch.device("meta"):  # shapes alone, and the kernels of CUDA
            model, x = Llama(SMALL, dtype=torch.bfloat16), torch.empty(2, 9, dtype=torch.long)
            boundaries = torch.empty(4, dtype=torch.int32)
        for documents in (None, boundaries):
            with Calls() as seen:
                model.loss(x, x, documents).backward()
            for direction in ("forward", "backward"):
                assert len(seen.args[f"_flash_attention_{direction}.default"]) == SMALL.n_layers


class TestMeanLoss:
    """Four rows of logits at once, so that 18 rows are five chunks and the last is shorter."""

    @pytest.fixture(autouse=True)
    def chunks(self, monkeypatch):
        monkeypatch.setattr(llama, "rows_at_once", lambda V, D: 4)

    def inputs(self):
        return noise(18, 6), noise(97, 6, seed=1), tokens(18)

    def test_equals_cross_entropy(self):
        h, w, targets = self.inputs()
        exact = [x.double().requires_grad_() for x in (h, w)]
        wanted = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="none")
        nll, dh, dw = llama.next_token_nll(h, w, targets, (True, True))
        close(nll, wanted.float())
        for mine, theirs in zip((dh, dw), torch.autograd.grad(wanted.sum(), exact)):
            close(mine, theirs.float())
        assert llama.next_token_nll(h, w, targets)[1:] == (None, None)

    def test_gradient(self):
        def forward(h, w):
            nll, *gradients = llama.next_token_nll(h, w, tokens(9), (True, True))
            return nll.sum(), *gradients
        check_pair(forward, lambda dy, h, w, y, dh, dw: (dy * dh, dy * dw), (9, 2), (97, 2))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        h, w, targets = self.inputs()
        exact = llama.next_token_nll(h, w, targets, (True, True))
        half = llama.next_token_nll(h.to(dtype), w, targets, (True, True))
        assert [x.dtype for x in half] == [torch.float32, dtype, torch.float32]
        for mine, theirs in zip(half, exact):
            assert (mine - theirs).norm() < 0.02 * theirs.norm()

    def test_a_second_backward_is_refused(self):
        h, w, targets = self.inputs()
        loss = 54 * llama.MeanLoss.apply(h.requires_grad_(), w.requires_grad_(), targets,
                                         llama.Alone())
        loss.backward(retain_graph=True)
        for x, d in zip((h, w), llama.next_token_nll(h, w, targets, (True, True))[1:]):
            close(x.grad, 3 * d)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_rare_targets_do_not_overflow(self):
        h, w = torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0]])
        nll, dh, _ = llama.next_token_nll(h, w, torch.tensor([1]), (True, True))
        assert nll.item() == 400 and dh.item() == 2

    def test_never_holds_more_logits(self, monkeypatch):
        monkeypatch.undo()
        shapes = {(32000, 288): 262, (32000, 4096): 1048, (128256, 16384): 261, (2**24, 8): 2}
        assert {shape: llama.rows_at_once(*shape) for shape in shapes} == shapes
        monkeypatch.setattr(llama, "rows_at_once", lambda V, D: 4)
        h, w, targets = noise(400, 4), noise(97, 4, seed=1), tokens(400)
        with Calls() as seen:
            llama.next_token_nll(h, w, targets, (True, True))
        logits = [shape for shape in seen.shapes if 97 in shape and shape != w.shape]
        assert max(map(math.prod, logits)) == 4 * 97

    def test_nll_of_a_model(self):
        model, x, y = random_model(SMALL), tokens(2, 9), tokens(2, 9, seed=1)
        nll = model.nll(x, y, starts(0, 4, 9, 18))
        assert nll.shape == (2, 9)
        close(nll.mean(), model.loss(x, y, starts(0, 4, 9, 18)))
        assert not nll.requires_grad
        close(nll[0, 4:], model.nll(x[:1, 4:], y[:1, 4:])[0])


class TestKVCache:
    def test_equal_to_none_in_any_steps(self):
        model, x = random_model(SMALL).eval(), tokens(2, 20)
        wanted = model(x)
        for steps in ([20], [1] * 20, [7, 1, 12], [19, 1]):
            cache, done = KVCache(SMALL, 2, 20), 0
            for n in steps:
                close(model(x[:, done:done + n], cache), wanted[:, done:done + n])
                done += n
            assert cache.lengths == [20, 20]

    def test_rows_of_different_length(self):
        model, x = random_model(SMALL).eval(), tokens(3, 20)
        cache, lengths = KVCache(SMALL, 3, 20), [9, 2, 5]
        padded = x[:, :9].where(torch.arange(9) < torch.tensor(lengths)[:, None], 0)
        model(padded, cache)
        cache.lengths = list(lengths)
        for T in (1, 3, 1):
            new = torch.stack([x[row, n:n + T] for row, n in enumerate(cache.lengths)])
            logits = model(new, cache)
            for row, n in enumerate(cache.lengths):
                close(logits[row], model(x[row:row + 1, :n])[0, -T:])

    def test_sized_to_the_request(self):
        cache = KVCache(SIZES["llama2-70b"][0], 1, 100, torch.bfloat16, "meta")
        held = sum(k.nbytes + v.nbytes for k, v in cache.held)
        assert held == 100 * 327680  # 4 L K E bytes a token in bf16


class TestCheckpoints:
    @pytest.fixture
    def saved(self, tmp_path):
        model = random_model(SMALL)
        save_meta(model, tmp_path)
        return model, tmp_path

    @pytest.mark.parametrize("change", [
        {}, {"hidden_dim": 500}, {"hidden_dim": 128}, {"head_size": 20},
        {"tie_embeddings": True, "rope_theta": 5e5, "rope_scaling": 32.0}])
    def test_there_and_back(self, tmp_path, change):
        model = random_model(replace(SMALL, **change))
        save_meta(model, tmp_path)
        again = llama.load(tmp_path)
        assert again.config == model.config and state_equal(again, model.state_dict())
        assert llama.load(tmp_path, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16

    def test_published_params(self):
        published = {  # as Meta's files have them
            "7b": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32,
                   "norm_eps": 1e-06, "vocab_size": -1},
            "llama2-70b": {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3,
                           "n_heads": 64, "n_kv_heads": 8, "n_layers": 80, "norm_eps": 1e-05,
                           "vocab_size": -1},
            "llama3.1-8b": {"dim": 4096, "ffn_dim_multiplier": 1.3, "multiple_of": 1024,
                            "n_heads": 32, "n_kv_heads": 8, "n_layers": 32, "norm_eps": 1e-05,
                            "rope_theta": 500000.0, "use_scaled_rope": True,
                            "vocab_size": 128256},
            "llama3.2-1b": {"dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256,
                            "n_heads": 32, "n_kv_heads": 8, "n_layers": 16, "norm_eps": 1e-05,
                            "rope_theta": 500000.0, "use_scaled_rope": True,
                            "vocab_size": 128256}}
        for name, params in published.items():
            config = SIZES[name][0]
            weights = {"tok_embeddings.weight": torch.empty(config.vocab_size, 1, device="meta")}
            if not config.tie_embeddings:
                weights["output.weight"] = torch.empty(config.vocab_size, 2, device="meta")
            weights = {n: llama.Weight.of(w) for n, w in weights.items()}
            assert llama.read_params(params, weights) == config
        other = llama.read_params({**params, "rope_scaling_factor": 16, "max_seq_len": 9}, weights)
        assert other == replace(config, rope_scaling=16, max_seq_len=9)
        unknown = {**params, "n_layers": 3}  # a shape that is in no size: 3.1's factor
        assert llama.read_params(unknown, weights).rope_scaling == 8

    def test_tied_is_read_from_the_weights(self, saved):
        model, folder = saved
        weights = dict(model.state_dict())
        weights["output.weight"] = weights["tok_embeddings.weight"].clone()
        weights["rope.freqs"] = torch.zeros(6)
        torch.save(weights, folder / "consolidated.00.pth")
        again = llama.load(folder)
        assert again.config.tie_embeddings and again.output is None

    @pytest.mark.parametrize("name, spoil", [
        ("unknown", lambda w: w.update(extra=w["norm.weight"])),
        ("norm.weight is missing", lambda w: w.pop("norm.weight")),
        ("wk.weight is .24, 40.", lambda w: w.update(
            {"layers.1.attention.wk.weight": torch.zeros(24, 40)})),
        ("not a table of weights", lambda w: w.update({"norm.weight": torch.arange(48)})),
        ("damaged .KeyError..tok_emb", lambda w: w.pop("tok_embeddings.weight"))])
    def test_strict(self, saved, name, spoil):
        model, folder = saved
        weights = dict(model.state_dict())
        spoil(weights)
        torch.save(weights, folder / "consolidated.00.pth")
        with pytest.raises(ValueError, match=name.replace("unknown", "extra is .48,., not known")):
            llama.load(folder)

    @pytest.mark.parametrize("n, axis, change", [
        (2, 0, {}), (2, 1, {"n_kv_heads": 4}), (4, 0, {"vocab_size": 96}),
        (4, 1, {"n_kv_heads": 1, "head_size": 16}), (4, 1, {"dim": 64, "n_heads": 8})])
    def test_any_number_of_shards(self, tmp_path, n, axis, change):
        """Merged in one process; LLaMA 1 and 2 cut the embedding by columns, Llama 3 by rows."""
        model = random_model(replace(SMALL, **{"vocab_size": 96, **change}))
        write_shards(tmp_path, model, n, axis)
        again = llama.load(tmp_path)
        assert again.config == model.config and state_equal(again, model.state_dict())
        assert torch.equal(again(tokens(2, 30)), model(tokens(2, 30)))
        half = llama.load(tmp_path, dtype=torch.bfloat16).state_dict()
        assert all(torch.equal(half[name], w.bfloat16()) for name, w in model.state_dict().items())

    @pytest.mark.parametrize("gone", [[0], [1], [3], [2, 3], [0, 1, 2, 3]])
    def test_a_missing_shard_is_named(self, tmp_path, gone):
        write_shards(tmp_path, random_model(replace(SMALL, vocab_size=96)), 4, 1)
        for i in gone:
            (tmp_path / f"consolidated.{i:02}.pth").unlink()
        with pytest.raises(ValueError, match=f"consolidated.{gone[0]:02}.pth is missing"):
            llama.load(tmp_path)

    @pytest.mark.parametrize("named, change", [
        ("different tensors", {"extra": torch.zeros(3)}),
        ("wq.weight in different shapes", {"layers.1.attention.wq.weight": torch.zeros(3, 48)})])
    def test_shards_that_do_not_fit_together(self, tmp_path, named, change):
        write_shards(tmp_path, random_model(replace(SMALL, vocab_size=96)), 2, 1)
        shard = torch.load(tmp_path / "consolidated.01.pth") | change
        torch.save(shard, tmp_path / "consolidated.01.pth")
        with pytest.raises(ValueError, match=named):
            llama.load(tmp_path)

    def test_pickled_code_is_not_run(self, saved, tmp_path):
        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "executed"),)
        torch.save({"norm.weight": Bomb()}, saved[1] / "consolidated.00.pth")
        with pytest.raises(ValueError, match="could run code"):
            llama.load(saved[1])
        assert not (tmp_path / "executed").exists()

    def test_a_full_disk_keeps_what_was_there(self, saved, monkeypatch):
        import resource
        folder = saved[1]
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the kernel refuses larger files
        old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            with pytest.raises(OSError, match="could not be written.*try to free space"):
                save_meta(random_model(SMALL, seed=2), folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, old)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def write_shards(folder, model, n, axis):
    """Meta's folder in n shards; the embedding is cut along `axis`."""
    folder.mkdir(exist_ok=True)
    shards = [{} for _ in range(n)]
    for name, w in model.state_dict().items():
        kind, pieces = name.split(".")[-2], [w] * n
        if w.dim() == 2:
            along = axis if kind == "tok_embeddings" else int(kind in ("wo", "w2"))
            repeat = max(1, n // model.config.n_kv_heads) if kind in ("wk", "wv") else 1
            pieces = [piece for piece in w.chunk(n // repeat, along) for _ in range(repeat)]
        for shard, piece in zip(shards, pieces):
            shard[name] = piece.clone()
    for i, shard in enumerate(shards):
        torch.save(shard | {"rope.freqs": torch.zeros(6)}, folder / f"consolidated.{i:02}.pth")
    (folder / "params.json").write_text(json.dumps(llama.write_params(model.config)))


def write_llama2c(model, path, version=0):
    """llama2.c's files, written from their description by the test itself. In version 2 groups of
    8 share a scale; the state that such a file holds."""
    c, state = model.config, {n: w.detach() for n, w in model.state_dict().items()}
    kinds = ("tok_embeddings layers.attention_norm layers.attention.wq layers.attention.wk "
             "layers.attention.wv layers.attention.wo layers.ffn_norm layers.feed_forward.w1 "
             "layers.feed_forward.w2 layers.feed_forward.w3 norm").split()
    if version:
        kinds = [kinds[i] for i in (1, 6, 10, 0, 2, 3, 4, 5, 7, 8, 9)]
    order = [f"{kind.replace('layers', f'layers.{i}')}.weight" for kind in kinds
             for i in range(c.n_layers if "layers" in kind else 1)]
    tables = torch.full((2 * c.max_seq_len * c.head_dim // 2,), math.nan)
    parts = [state[name] for name in order] + ([] if version else [tables])
    parts += [] if c.tie_embeddings else [state["output.weight"]]
    vocab = c.vocab_size if c.tie_embeddings or version else -c.vocab_size
    header = struct.pack("<7i", c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, vocab,
                         c.max_seq_len)
    if version:
        header = struct.pack("<Ii", 0x616b3432, version) + header
        header += struct.pack("<Bi", c.tie_embeddings, 8) + bytes(256 - 41)
    data = [part.numpy().tobytes() for part in parts]
    if version == 2:
        for i, part in enumerate(parts):
            if part.dim() == 2:
                scales = part.view(-1, 8).abs().amax(1) / 127
                int8 = (part.view(-1, 8) / scales[:, None]).round().to(torch.int8)
                data[i] = int8.numpy().tobytes() + scales.numpy().tobytes()
                part.copy_(int8.float().mul(scales[:, None]).view_as(part))
    path.write_bytes(header + b"".join(data))


class TestLlama2c:
    @pytest.mark.parametrize("version", [0, 1, 2])
    @pytest.mark.parametrize("tied", [True, False])
    def test_versions(self, tmp_path, version, tied):
        model = random_model(replace(SMALL, hidden_dim=96, tie_embeddings=tied))
        before = model.tok_embeddings.weight.clone()
        write_llama2c(model, tmp_path / "m", version)  # model now has what version 2 rounds
        again = llama.load(tmp_path / "m")
        assert again.config == model.config and state_equal(again, model.state_dict())
        assert torch.equal(before, model.tok_embeddings.weight) is (version < 2)

    @pytest.mark.parametrize("compiled", ["", "_orig_mod."])
    def test_pt(self, tmp_path, compiled):
        model = random_model(replace(SMALL, hidden_dim=128, tie_embeddings=True))
        state = {compiled + name: w for name, w in model.state_dict().items()}
        state[compiled + "output.weight"] = state[compiled + "tok_embeddings.weight"]
        args = {"dim": 48, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 97,
                "multiple_of": 32, "max_seq_len": 64, "dropout": 0.1}
        torch.save({"model": state, "model_args": args, "iter_num": 3, "config": {"x": "y"},
                    "optimizer": {"state": {0: torch.zeros(3)}}}, tmp_path / "ckpt")
        again = llama.load(tmp_path / "ckpt")
        assert again.config == model.config and state_equal(again, model.state_dict())

    @pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
    def test_stories260k(self, capsys):
        folder = SHARED / "data" / "stories260K"
        generate.main([str(folder / "stories260K.bin"), "--prompt", "", "--temperature", "0",
                       "--max-new-tokens", "200"])
        assert capsys.readouterr().out == (folder / "expected_greedy_200.txt").read_text()
        config = llama.load(folder / "stories260K.bin").config
        assert config == SIZES["stories260k"][0]


def state_equal(model, wanted):
    """Are all weights of the model those of a state dict, bit for bit?"""
    found = model.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


def greedy(model, n=200):
    """n tokens, each the most likely one after those before it."""
    cache, text = KVCache(model.config, 1, n), [1]
    with torch.no_grad():
        while len(text) < n:
            text.append(int(model(torch.tensor([text[-1:]]), cache)[0, -1].argmax()))
    return torch.tensor([text])


def llama3_rope(factor):
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_theta": 1e4}


def save_hf(folder, dtype=torch.float32, shard="1GB", **change):
    """A folder that transformers writes, and its model as transformers reads it again."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
             "max_position_embeddings": 16384, "initializer_range": 0.2}
    model = LlamaForCausalLM(HFConfig(**{**shape, **change})).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(noise(*p.shape, seed=len(name)).to(dtype), alpha=0.1 * (p.dim() == 1))
    model.save_pretrained(folder, max_shard_size=shard)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class TestReadHF:
    """Folders that transformers writes give the logits and the greedy text of transformers."""

    @staticmethod
    def check(oracle, path):
        model = llama.load(path, dtype=torch.float32)
        text = greedy(model)
        assert len(set(text[0].tolist())) > 20  # it does not go round in circles
        with torch.no_grad():
            theirs = oracle(input_ids=text).logits
            close(model(text), theirs, atol=1e-4)
        assert torch.equal(theirs.argmax(-1)[:, :-1], text[:, 1:])
        return model

    @pytest.mark.parametrize("change", [
        {}, {"dtype": torch.bfloat16}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1},
        {"tie_word_embeddings": True}, {"head_dim": 24}, {"head_dim": 8, "dtype": torch.float16},
        {"shard": "60KB", "dtype": torch.bfloat16}, {"rms_norm_eps": 0.3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}])
    def test_logits_and_greedy_text(self, tmp_path, change):
        oracle = save_hf(tmp_path, **change)
        self.check(oracle, tmp_path)
        assert ("shard" in change) == (len(list(tmp_path.glob("*.safetensors"))) > 1)

    @pytest.mark.parametrize("factor", [8.0, 32.0])
    def test_scaled_frequencies_of_3_1_and_3_2(self, tmp_path, factor):
        model = self.check(save_hf(tmp_path, rope_parameters=llama3_rope(factor)), tmp_path)
        assert model.config.rope_scaling == factor
        text = greedy(model)
        wanted = model(text)
        for other in (None, 40.0 - factor):  # 8 where the file says 32 is an old mistake
            model.config = replace(model.config, rope_scaling=other)
            assert (model(text) - wanted).abs().max() > 0.01

    def test_the_wrong_layout_of_rope_fails(self, tmp_path, monkeypatch):
        oracle = save_hf(tmp_path)
        monkeypatch.setattr(llama.Weight, "turned", lambda weight, n, m: weight)
        with pytest.raises(AssertionError):
            self.check(oracle, tmp_path)

    def test_config_of_transformers_4_and_older(self, tmp_path):
        oracle = save_hf(tmp_path, num_key_value_heads=4, rope_parameters=llama3_rope(8.0))
        config = json.loads((tmp_path / "config.json").read_text())
        rope = config.pop("rope_parameters")
        theta = rope.pop("rope_theta")
        for name in ("head_dim", "num_key_value_heads", "attention_bias", "mlp_bias"):
            del config[name]
        (tmp_path / "config.json").write_text(json.dumps(
            {**config, "rope_theta": theta, "rope_scaling": rope, "pretraining_tp": 2}))
        self.check(oracle, tmp_path)
        oldest = {name: config[name] for name in ("hidden_size", "intermediate_size", "vocab_size",
                                                  "num_hidden_layers", "num_attention_heads")}
        assert llama.read_hf_config({**oldest, "model_type": "llama", "max_sequence_length": 2048,
                                     "architectures": ["LLaMAForCausalLM"]}) == LlamaConfig(
            64, 3, 4, 4, 100, 97, 2048, 1e-6)

    def test_files_of_torch_save_in_any_number(self, tmp_path):
        oracle = save_hf(tmp_path, tie_word_embeddings=True)
        state = {name: w.clone() for name, w in oracle.state_dict().items()}
        assert "lm_head.weight" in state  # the same numbers as the embedding: skipped
        (tmp_path / "model.safetensors").unlink()
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # in old files
        torch.save(state, tmp_path / "pytorch_model.bin")
        self.check(oracle, tmp_path)
        self.check(oracle, tmp_path / "pytorch_model.bin")
        (tmp_path / "pytorch_model.bin").unlink()
        files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        for i, file in enumerate(files):
            torch.save(dict(list(state.items())[i::2]), tmp_path / file)
        self.check(oracle, tmp_path)  # without an index, and with one
        index = {"weight_map": {name: files[i % 2] for i, name in enumerate(state)}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model_other.bin")
        self.check(oracle, tmp_path)
        self.check(oracle, tmp_path / files[1])
        torch.save(state, tmp_path / files[1])
        with pytest.raises(ValueError, match="is in two files; try"):
            llama.load(tmp_path)

    def test_a_single_file_is_told_by_what_is_in_it(self, tmp_path):
        oracle = save_hf(tmp_path)
        self.check(oracle, tmp_path / "config.json")
        file = (tmp_path / "model.safetensors").rename(tmp_path / "weights.of.mine")
        self.check(oracle, file)

    @pytest.mark.parametrize("named, change", [
        ("model_type='mixtral'", {"model_type": "mixtral"}),
        ("hidden_act='gelu'", {"hidden_act": "gelu"}),
        ("attention_bias=True", {"attention_bias": True}), ("mlp_bias=True", {"mlp_bias": True}),
        ("sliding_window=4096", {"sliding_window": 4096}),
        ("quantization_config", {"quantization_config": {"bits": 4}}),
        ("num_local_experts=8", {"num_local_experts": 8}),
        ("partial_rotary_factor=0.5", {"partial_rotary_factor": 0.5}),
        ("type='linear'", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("rope_type='yarn'", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}),
        ("low_freq_factor=2.0", {"rope_scaling": {**llama3_rope(8.0), "low_freq_factor": 2.0}}),
        ("original_max_position_embeddings=4096", {"rope_scaling": {
            **llama3_rope(8.0), "original_max_position_embeddings": 4096}})])
    def test_what_is_not_implemented_is_named(self, named, change):
        plain = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 100,
                 "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97}
        assert llama.read_hf_config({**plain, "rope_scaling": llama3_rope(8.0),
                                     "pretraining_tp": 4, "use_cache": True}).rope_scaling == 8
        with pytest.raises(ValueError, match=named):
            llama.read_hf_config({**plain, **change})


GGUF_NAMES = dict(zip(HF_NAMES, (
    "token_embd", "output_norm", "output", "attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v",
    "attn_output", "ffn_gate", "ffn_down", "ffn_up")))
WIDE = replace(SMALL, dim=256, n_layers=1, n_heads=4, hidden_dim=512)  # whole blocks of 256


def write_gguf(path, config, state, kind=None, factor=None, extra=lambda writer: None):
    """A GGUF file by the package gguf; matrices of `kind`, or fp32. {name: what it then holds}"""
    import gguf
    from gguf import quants
    w, stored = gguf.GGUFWriter(path, "llama"), {}
    w.add_context_length(config.max_seq_len)
    w.add_embedding_length(config.dim)
    w.add_block_count(config.n_layers)
    w.add_feed_forward_length(config.hidden_dim)
    w.add_head_count(config.n_heads)
    w.add_head_count_kv(config.n_kv_heads)
    w.add_layer_norm_rms_eps(config.norm_eps)
    w.add_rope_freq_base(config.rope_theta)
    w.add_rope_dimension_count(config.head_dim)
    w.add_key_length(config.head_dim)
    w.add_value_length(config.head_dim)
    w.add_tokenizer_model("llama")
    w.add_token_list([f"piece {i}" for i in range(config.vocab_size)])
    w.add_token_scores([0.5] * config.vocab_size)
    extra(w)
    if factor:
        f = 1e4 ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        turns = 8192 * f / (2 * math.pi)
        m = ((turns - 1) / 3).clamp(0, 1)
        w.add_tensor("rope_freqs.weight", (f / ((1 - m) * f / factor + m * f)).numpy())
    kind = gguf.GGMLQuantizationType[kind or "F32"]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    for name, x in state.items():
        layer, what = re.fullmatch(r"(layers\.\d+\.)?(.*)\.weight", name).groups()
        name_there = f"{(layer or '').replace('layers', 'blk')}{GGUF_NAMES[what]}.weight"
        if x.dim() == 1 or kind.name == "F32":
            w.add_tensor(name_there, x.numpy())
            stored[name] = x
            continue
        try:
            data = quants.quantize(x.numpy(), kind)
        except NotImplementedError:  # gguf decodes this type alone: any blocks will do
            data = np.random.default_rng(0).integers(0, 60, (len(x), x.shape[1] // block * size),
                                                     dtype=np.uint8)
        w.add_tensor(name_there, data, raw_dtype=kind)
        stored[name] = torch.from_numpy(quants.dequantize(data, kind))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return stored


class TestGGUF:
    @pytest.mark.parametrize("kind", [None, "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K",
                                      "IQ4_NL"])
    def test_types(self, tmp_path, kind):
        state = {name: w.detach() for name, w in random_model(WIDE).state_dict().items()}
        stored = write_gguf(tmp_path / "model", WIDE, state, kind)
        model = llama.load(tmp_path / "model")
        assert model.config == WIDE
        assert model.norm.weight.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(
            kind, torch.float32)
        model = llama.load(tmp_path / "model", dtype=torch.float32)
        assert state_equal(model, stored)

    @pytest.mark.parametrize("factor, change", [
        (None, {"head_dim": 24}), (8.0, {}), (32.0, {"tie_word_embeddings": True})])
    def test_logits_of_transformers(self, tmp_path, factor, change):
        """Rows of wq and wk in the order of llama.cpp's conversion; its frequency factors."""
        rope = {"rope_parameters": llama3_rope(factor)} if factor else {}
        oracle = save_hf(tmp_path, **change, **rope)
        state = llama.load(tmp_path).state_dict()  # names alone: all values are replaced
        theirs = oracle.state_dict()
        for name in state:
            state[name] = theirs[hf_name(name)]
            if name.endswith(("wq.weight", "wk.weight")):
                heads = 4 if "wq" in name else 2
                w = state[name].numpy()
                state[name] = torch.from_numpy(w.reshape(
                    heads, 2, w.shape[0] // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape))
        config = llama.load(tmp_path).config
        write_gguf(tmp_path / "m.gguf", config, state, factor=factor)
        assert TestReadHF.check(oracle, tmp_path / "m.gguf").config == config

    @pytest.mark.parametrize("named, extra", [
        ("expert_count", lambda w: w.add_expert_count(8)),
        ("rope.scaling.type", lambda w: w.add_string(
            "llama.rope.scaling.type", "linear")),
        ("sliding_window", lambda w: w.add_sliding_window(4096)),
        ("logit_scale", lambda w: w.add_logit_scale(0.5)),
        ("rope_freqs.weight", lambda w: w.add_tensor("rope_freqs.weight", np.linspace(
            1, 8, 32, dtype=np.float32))),
        ("unknown blk.7.x", lambda w: w.add_tensor("blk.7.x", np.zeros(4, np.float32))),
        ("type 26 need the package", lambda w: w.add_tensor("a", np.zeros((4, 4), np.int32)))])
    def test_what_is_not_implemented_is_named(self, tmp_path, named, extra):
        state = {name: w.detach() for name, w in random_model(WIDE).state_dict().items()}
        write_gguf(tmp_path / "m", WIDE, state, extra=extra)
        with pytest.raises(ValueError, match=named):
            llama.load(tmp_path / "m")

    def test_without_the_package(self, tmp_path, monkeypatch):
        state = {name: w.detach() for name, w in random_model(WIDE).state_dict().items()}
        write_gguf(tmp_path / "native", WIDE, state, "F16")
        write_gguf(tmp_path / "quantised", WIDE, state, "Q8_0")
        monkeypatch.setitem(sys.modules, "gguf", None)
        llama.load(tmp_path / "native")
        with pytest.raises(ValueError, match="try pip install -U gguf"):
            llama.load(tmp_path / "quantised")


class TestExport:
    @pytest.mark.parametrize("change", [
        {}, {"dtype": torch.bfloat16, "tie_word_embeddings": True}, {"head_dim": 24},
        {"rope_parameters": llama3_rope(32.0), "num_key_value_heads": 1}])
    @pytest.mark.parametrize("format", ["meta", "hf", "llama2c"])
    def test_in_out_in_is_bit_equal(self, tmp_path, format, change):
        oracle = save_hf(tmp_path / "in", **change)
        model, out = llama.load(tmp_path / "in"), tmp_path / "out"
        if format == "llama2c" and change.keys() & {"head_dim", "rope_parameters"}:
            with pytest.raises(ValueError, match="head_size|rope_scaling"):
                llama.export(tmp_path / "in", format, out)
            assert not out.exists()
            return
        llama.export(tmp_path / "in", format, out)
        again = llama.load(out, dtype=model.norm.weight.dtype)
        assert again.config == model.config and state_equal(again, model.state_dict())
        if format == "hf":
            from transformers import LlamaForCausalLM
            theirs = LlamaForCausalLM.from_pretrained(out)
            assert theirs.dtype == model.norm.weight.dtype
            x = tokens(2, 60)
            assert torch.equal(theirs.float()(x).logits, oracle(x).logits)
        names = {"meta": {"consolidated.00.pth", "params.json"},
                 "hf": {"model.safetensors", "config.json"}}.get(format)
        assert names is None or {file.name for file in out.iterdir()} == names

    def test_what_is_there_stays(self, tmp_path, monkeypatch):
        save_meta(random_model(SMALL), tmp_path / "in")
        with pytest.raises(ValueError, match="no format 'gguf'; try one of meta, hf, llama2c"):
            llama.export(tmp_path / "in", "gguf", tmp_path / "out")
        with pytest.raises(ValueError, match="exists already"):
            llama.export(tmp_path / "in", "hf", tmp_path / "in")
        with pytest.raises(ValueError, match="exists already"):
            llama.export(tmp_path / "in", "llama2c", tmp_path / "in" / "params.json")
        (tmp_path / "empty").mkdir()

        def full_disk(*args):
            raise OSError("No space left on device")
        monkeypatch.setattr(os, "fsync", full_disk)
        for format in llama.EXPORTS:
            with pytest.raises(OSError, match="could not be written.*No space"):
                llama.export(tmp_path / "in", format, tmp_path / "empty" / format)
        assert not [file for file in (tmp_path / "empty").rglob("*") if file.is_file()]


def memory(field):
    """Of this process, in bytes, by its name in /proc/self/status."""
    return 1024 * int(re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_memory(act, field="VmRSS", most="VmHWM"):
    """The most memory that act() held beyond what there was before, with mapped pages, in bytes."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there to be used again
    before = memory(field)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    held = act()
    return memory(most) - before, held


class TestStreaming:
    """Loading takes the weights in their new type and one tensor, whatever the format."""
    CONFIG = replace(SMALL, dim=256, n_heads=4, n_layers=12, hidden_dim=1024, vocab_size=4096)
    KINDS = ["meta", "shards", "hf", "F32", "Q8_0", "llama2c"]

    @pytest.fixture(scope="class")
    @classmethod
    def saved(cls, tmp_path_factory):
        folder, model = tmp_path_factory.mktemp("saved"), Llama.create(cls.CONFIG, 0)
        state = {name: w.detach() for name, w in model.state_dict().items()}
        save_meta(model, folder / "meta")
        write_shards(folder / "shards", model, 2, 0)
        llama.export(folder / "meta", "hf", folder / "hf")
        llama.export(folder / "meta", "llama2c", folder / "llama2c")
        for kind in ("F32", "Q8_0"):
            write_gguf(folder / kind, cls.CONFIG, state, kind)
        return folder

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    @pytest.mark.parametrize("kind", KINDS)
    def test_memory_is_not_doubled(self, saved, kind):
        llama.load(saved / kind, dtype=torch.bfloat16)  # what is imported and allocated once
        used, model = peak_memory(lambda: llama.load(saved / kind, dtype=torch.bfloat16))
        largest = 4 * self.CONFIG.vocab_size * self.CONFIG.dim
        assert model.norm.weight.dtype == torch.bfloat16
        temporary = largest if kind == "Q8_0" else 0  # the package gguf takes twice
        assert used < 2 * self.CONFIG.n_params + largest + temporary + 3e6

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    @pytest.mark.parametrize("kind", ["meta", "F32", "llama2c"])
    def test_memory_mapped(self, saved, kind):
        used, _ = peak_memory(lambda: llama.load(saved / kind), "RssAnon", "RssAnon")
        assert used < 4e6

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_a_finished_block_leaves_memory(self, saved):
        def finish(name, block):
            assert all(p.sum().isfinite() for p in block.parameters())
            return torch.nn.Identity()
        used, _ = peak_memory(lambda: llama.load(saved / "F32", finish=finish))
        assert used < 4 * self.CONFIG.vocab_size * self.CONFIG.dim + 8e6

    @pytest.mark.parametrize("kind", ["meta", "hf"])
    def test_a_fresh_process_loads_no_compiler_and_keeps_the_file(self, saved, kind):
        code = (f"import sys, llama; model = llama.load({str(saved / kind)!r}); "
                "model.norm.weight.data.add_(1); sys.exit('torch._dynamo' in sys.modules)")
        before = llama.load(saved / kind).norm.weight.clone()
        assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0
        assert torch.equal(llama.load(saved / kind).norm.weight, before)

    def test_blocks_in_their_order(self, saved):
        seen = []

        def finish(name, block):
            assert {p.device.type for p in block.parameters()} == {"cpu"}
            seen.append(name)
            return torch.nn.Identity() if name == "output" else block
        model = llama.load(saved / "hf", finish=finish)
        assert seen == ["tok_embeddings", *(f"layers.{i}" for i in range(12)), "norm", "output"]
        assert isinstance(model.output, torch.nn.Identity)


LITTLE = LlamaConfig(16, 2, 2, 1, 24, 19, 32)


def gguf_bytes(n_tensors, kind, rest, key=b"general.architecture"):
    """A GGUF file of one key, whose value and what comes behind it are `rest`."""
    head = struct.pack("<IQQQ", 3, n_tensors, 1, len(key)) + key
    return b"GGUF" + head + struct.pack("<I", kind) + rest


class TestMalformed:
    """A file that is damaged or lies is one line, takes no memory and executes nothing."""
    @pytest.fixture(scope="class")
    @classmethod
    def good(cls, tmp_path_factory):
        """{name: (path to load, file to spoil)} of small checkpoints in every format."""
        folder, model = tmp_path_factory.mktemp("good"), random_model(LITTLE)
        state = {name: w.detach() for name, w in model.state_dict().items()}
        save_meta(model, folder / "meta")
        llama.export(folder / "meta", "hf", folder / "hf")
        write_gguf(folder / "gguf", LITTLE, state, "F16", 8.0)
        args = {"dim": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 19,
                "multiple_of": 24, "max_seq_len": 32, "hidden_dim": 24}
        torch.save({"model": state, "model_args": args}, folder / "pt")
        for version in (0, 1, 2):
            write_llama2c(model, folder / f"bin{version}", version)
        paths = {name: (folder / name,) * 2 for name in ("gguf", "pt", "bin0", "bin1", "bin2")}
        return paths | {
            "pth": (folder / "meta", folder / "meta" / "consolidated.00.pth"),
            "params": (folder / "meta", folder / "meta" / "params.json"),
            "safetensors": (folder / "hf", folder / "hf" / "model.safetensors"),
            "config": (folder / "hf", folder / "hf" / "config.json")}

    @staticmethod
    def refused(path, file, data, must=True):
        """Loads `path` with `data` in one of its files: a model, or one line that says why not."""
        whole = file.read_bytes()
        file.unlink()  # a new file: the old one may be mapped
        file.write_bytes(data)
        try:
            model = llama.load(path)
            assert not must and isinstance(model, Llama)
        except (ValueError, OSError) as error:
            text = str(error)
            assert text and "\n" not in text and len(text) < 1000
            assert isinstance(error, OSError) or "; try " in text, text
            return text
        finally:
            file.unlink()
            file.write_bytes(whole)

    SAFETENSORS = {
        "dtype unknown": lambda h: h["lm_head.weight"].update(dtype="I64"),
        "dtype a list": lambda h: h["lm_head.weight"].update(dtype=[]),
        "no dtype": lambda h: h["lm_head.weight"].pop("dtype"),
        "entry a number": lambda h: h.update({"lm_head.weight": 3}),
        "shape negative": lambda h: h["lm_head.weight"].update(shape=[-19, -16]),
        "shape of floats": lambda h: h["lm_head.weight"].update(shape=[19.0, 16.0]),
        "shape of booleans": lambda h: h["model.norm.weight"].update(shape=[True, 16]),
        "shape huge": lambda h: h["lm_head.weight"].update(shape=[2**62, 2**62]),
        "shape of many": lambda h: h["lm_head.weight"].update(shape=[2] * 10**5),
        "shape with 0": lambda h: h["lm_head.weight"].update(shape=[0, 16], data_offsets=[0, 0]),
        "shape a text": lambda h: h["lm_head.weight"].update(shape="19"),
        "shape another": lambda h: h["lm_head.weight"].update(shape=[16, 19]),
        "offsets beyond": lambda h: h["lm_head.weight"].update(data_offsets=[10**9, 10**9 + 1216]),
        "offsets negative": lambda h: h["lm_head.weight"].update(data_offsets=[-1216, 0]),
        "offsets reversed": lambda h: h["lm_head.weight"].update(data_offsets=[1216, 0]),
        "offsets three": lambda h: h["lm_head.weight"].update(data_offsets=[0, 1, 2]),
        "offsets overlap": lambda h: h["lm_head.weight"].update(data_offsets=[4, 1220]),
        "offsets odd": lambda h: h["lm_head.weight"].update(data_offsets=[1, 1217]),
        "offsets short": lambda h: h["lm_head.weight"].update(data_offsets=[0, 1212]),
        "missing": lambda h: h.pop("lm_head.weight"),
        "unknown": lambda h: h.update(x=h["lm_head.weight"]),
        "Meta's name": lambda h: h.update({"norm.weight": h.pop("model.norm.weight")}),
        "a name of two lines": lambda h: h.update({"a\nb": h.pop("model.norm.weight")}),
        "a list": lambda h: "[]", "no JSON": lambda h: "{", "deep": lambda h: "[" * 10**5,
        "a name twice": lambda h: json.dumps(h)[:-1] + ', "model.norm.weight": '
        + json.dumps(h["model.norm.weight"]) + "}",
        "a number of many digits": lambda h: '{"a": ' + "9" * 5000 + "}"}

    @pytest.mark.parametrize("name", SAFETENSORS)
    def test_safetensors(self, good, name):
        path, file = good["safetensors"]
        size, = struct.unpack("<Q", (whole := file.read_bytes())[:8])
        header = json.loads(whole[8:8 + size])
        text = self.SAFETENSORS[name](header)
        text = (text if isinstance(text, str) else json.dumps(header)).encode()
        text += b" " * (-len(text) % 8)  # aligned
        self.refused(path, file, struct.pack("<Q", len(text)) + text + whole[8 + size:])

    def test_safetensors_lengths(self, good):
        path, file = good["safetensors"]
        whole = file.read_bytes()
        for size in (0, 3, len(whole) - 8, len(whole) - 7, 2**63):
            text = self.refused(path, file, struct.pack("<Q", size) + whole[8:])
            assert ("the header" in text) == (size > len(whole) - 8)
        for data in (b"", whole[:4], whole[:8], whole[:100], whole[:-1]):
            self.refused(path, file, data)

    @pytest.mark.parametrize("at, form, value", [
        (4, "I", 1), (4, "I", 0x03000000), (8, "Q", 0), (8, "Q", 2**63), (16, "Q", 0),
        (16, "Q", 2**64 - 1), (24, "Q", 2**62), (24, "Q", 0), (24, "Q", 10**4)])
    def test_gguf_header(self, good, at, form, value):
        path, file = good["gguf"]
        whole = file.read_bytes()
        self.refused(path, file, whole[:at] + struct.pack("<" + form, value)
                     + whole[at + struct.calcsize(form):])

    @pytest.mark.parametrize("data", [*(gguf_bytes(1, kind, value) for kind, value in (
        (9, struct.pack("<IQ", 9, 2**40)), (9, struct.pack("<IQ", 8, 2**60)),
        (9, struct.pack("<IQ", 0, 2**60)), (9, struct.pack("<IQ", 77, 1)), (8, b"\xff" * 8),
        (9, struct.pack("<IQ", 9, 1) * 2000), (77, b""), (4, b""))), *(
        gguf_bytes(1, 8, struct.pack("<Q5sQs", 5, b"llama", 1, b"x")
             + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset) + bytes(200))
        for dims, kind, offset in (
            ([2**63, 2], 0, 0), ([2**63] * 10**6, 0, 0), ([2**32, 2**32], 2, 0), ([16] * 5, 0, 0),
            ([16], 99, 0), ([], 0, 0),
            ([16], 0, 2**63), ([15], 2, 0), ([0], 0, 0), ([16], 0, 1), ([2**40], 8, 0)))], ids=len)
    def test_gguf_values_and_tensors(self, tmp_path, data):
        (tmp_path / "m").write_bytes(gguf_bytes(0, 8, struct.pack("<Q", 9) + b"cut shor"))
        with pytest.raises(ValueError, match="beyond the end"):
            llama.gguf_fields(tmp_path / "m")
        self.refused(tmp_path / "m", tmp_path / "m", data)

    def test_llama2c(self, good):
        for name, start in (("bin0", 0), ("bin1", 8), ("bin2", 8)):
            path, file = good[name]
            whole = file.read_bytes()
            for at in range(start, start + 24, 4):
                for n in (0, -1, 5, 2**31 - 1, -2**31):
                    self.refused(path, file, whole[:at] + struct.pack("<i", n) + whole[at + 4:])
            for data in (whole[:3], whole[:30], whole[:-4], whole + b"0000"):
                self.refused(path, file, data)
        for at, data in ((4, struct.pack("<i", 3)), (37, struct.pack("<i", 0)),
                         (37, struct.pack("<i", -4)), (37, struct.pack("<i", 7)), (36, b"\1")):
            self.refused(path, file, whole[:at] + data + whole[at + len(data):])

    @pytest.mark.parametrize("values", [
        [], {"model": {}}, {"model": [1], "model_args": {}}, {"model": {"a": 3}, "model_args": {}},
        {"model": {}, "model_args": {"dim": 16}}, {1: torch.zeros(2)}, {"model": {}, "x": None},
        {"model_args": {"dim": 16, "moe": 3}, "model": {"norm.weight": torch.zeros(16)}},
        {"tok_embeddings.weight": torch.zeros(1).expand(10**9, 16)},
        {"norm.weight": torch.zeros(16, device="meta")},
        {"norm.weight": torch.zeros(16, 16).to_sparse()}, {"norm.weight": torch.zeros(16, 16).T}])
    def test_pickles(self, good, values):
        for name in ("pt", "pth"):
            path, file = good[name]
            data = io.BytesIO()
            torch.save(values, data)
            self.refused(path, file, data.getvalue())

    @pytest.mark.parametrize("text", ["", "[]", "3", "{", "null", '{"dim": 16}', "[" * 10**5,
                                      '{"model_type": "llama", "model_type": "llama"}', "\x00",
                                      '{"model_type": "llama", "rope_scaling": [1]}', *(
        json.dumps(llama.write_params(LITTLE) | change) for change in (
            {"dim": "48"}, {"multiple_of": 0}, {"n_layers": 10**9}, {"moe": {}}, {"n_heads": None},
            {"dim": 10**400}, {"ffn_dim_multiplier": math.nan}, {"norm_eps": "x"}))])
    def test_json(self, good, text):
        for name in ("params", "config"):
            self.refused(*good[name], text.encode())
        index = good["config"][0] / "model.safetensors.index.json"
        index.write_text(text)
        try:
            self.refused(*good["config"], good["config"][1].read_bytes())
            index.write_text('{"weight_map": {"a": "../../../etc/passwd"}}')
            self.refused(*good["config"], good["config"][1].read_bytes())
        finally:
            index.unlink()

    @pytest.mark.parametrize("name", ["safetensors", "gguf", "pt", "pth", "bin0", "bin1", "bin2",
                                      "params", "config"])
    def test_any_bytes_changed(self, good, name):
        import resource
        path, file = good[name]
        whole, chance = file.read_bytes(), random.Random(0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tracemalloc.start()
        for _ in range(25):
            data = bytearray(whole)
            where = len(data) if chance.random() < 0.3 else min(len(data), 2000)  # mostly headers
            for _ in range(chance.choice([1, 1, 2, 8])):
                data[chance.randrange(where)] = chance.choice([0, 1, 34, 127, 255])
            if chance.random() < 0.2:
                del data[chance.randrange(len(data)):]
            self.refused(path, file, bytes(data), must=False)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 30e6
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


PACKED = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


class TestProducts:
    """Of every layout of W; of the quantised ones, whose W is another, by what eye shows of it."""
    W = noise(48, 64) * torch.linspace(0.1, 3, 48)[:, None]

    @staticmethod
    def check(lay_out, dtype, w, far):
        product, (n, k) = lay_out(w), w.shape
        shown = product(torch.eye(k, dtype=dtype)).T.double()
        for shape in ((1, k), (1, 1, k), (2, 3, k), (20, k)):
            x = noise(*shape, seed=1, dtype=dtype)
            wanted, found = x.double() @ shown.T, product(x)
            assert found.dtype == dtype and (found - wanted).norm() < far * wanted.norm()
        return product, (shown - w).abs()

    @pytest.mark.parametrize("lay_out", [generate.Product, partial(generate.product, quantize="")])
    @pytest.mark.parametrize("dtype, far", [
        (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)])
    def test_equation(self, lay_out, dtype, far):
        product, wrong = self.check(partial(lay_out, dtype=dtype), dtype, self.W, far)
        assert torch.all(wrong <= far * self.W.abs()) and product.nbytes == 48 * 64 * dtype.itemsize

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_quantised(self, dtype):
        """No weight is further from its own than half a step, and bf16's rounding."""
        w = torch.cat((self.W, self.W + 9, torch.zeros(16, 64)))
        low, high = w.view(112, 2, 32).aminmax(dim=-1, keepdim=True)
        largest = w.abs().amax(1, True)
        for kind, step, size in ((generate.Int8Product, largest / 127, 64 + 2),
                                 (generate.Int4Product, (high - low) / 15, 32 + 2 * 2 * 2)):
            product, wrong = self.check(kind, dtype, w, 2**-7)
            most = step.view(112, -1, 1) / 2 + largest[..., None] / 200
            assert torch.all(wrong.view(112, 2, 32) <= most) and product.nbytes == 112 * size

    @pytest.mark.parametrize("shape, kind", [
        ((48, 64), generate.Int4Product), ((40, 64), generate.Int8Product),
        ((48, 50), generate.Int8Product)])
    def test_chosen_by_shape(self, shape, kind):
        lay_out = partial(generate.product, dtype=torch.bfloat16, quantize="int4")
        assert type(self.check(lay_out, torch.bfloat16, noise(*shape), 2**-7)[0]) is kind

    @PACKED
    def test_packed(self):
        for dtype, kind in ((torch.float16, "Product"), (torch.float32, "PackedProduct")):
            assert type(generate.product(self.W, dtype, None)).__name__ == kind

    @pytest.mark.parametrize("kind", [generate.Int8Product, generate.Int4Product])
    def test_on_other_devices(self, kind):
        """The branch without kernels of the CPU, by tensors that say to be elsewhere."""
        class Elsewhere(torch.Tensor):
            device = torch.device("cuda")
        there, x = kind(self.W.as_subclass(Elsewhere)), noise(2, 3, 64)
        found = there(x.as_subclass(Elsewhere)).as_subclass(torch.Tensor)
        torch.testing.assert_close(found, kind(self.W)(x), rtol=0.01, atol=0.2)

    def test_fused(self):
        layer, x, at = random_model(SMALL).layers[0], noise(2, 7, 48), torch.arange(7)
        attend = partial(llama.attention_equation, positions=at, boundaries=None)
        more = (*llama.rope_table(SMALL, at), attend)
        lay_out = partial(generate.Product, dtype=torch.float32)
        close(generate.FusedAttention(layer.attention, lay_out)(x, *more),
              layer.attention(x, *more))
        close(generate.FusedFeedForward(layer.feed_forward, lay_out)(x), layer.feed_forward(x))

    @PACKED
    def test_every_packed_one_has_its_own_number(self):
        first, second = (generate.PackedProduct(self.W, torch.float32) for _ in range(2))
        del first
        third = generate.PackedProduct(self.W, torch.float32)
        assert int(second.number) != int(third.number)


class TestOpenModel:
    @pytest.mark.parametrize("tied", [False, True])
    def test_logits_and_scores_in_every_format(self, tmp_path, tied):
        save_meta(random_model(replace(WIDE, tie_embeddings=tied)), tmp_path)
        x, model = tokens(1, 40), llama.load(tmp_path)
        nll = generate.token_nll(model, x[0].tolist()).mean().item()
        for dtype, quantize, far in (
                ("auto", None, 1e-5), ("bf16", None, 0.03), ("fp16", None, 0.005),
                ("auto", "int8", 0.05), ("fp32", "int8", 0.04), ("auto", "int4", 0.4)):
            found = generate.open_model(tmp_path, generate.DTYPES[dtype], quantize)
            with torch.no_grad():
                wanted = model(x)
                assert (found(x) - wanted).norm() < far * wanted.norm(), (dtype, quantize)
            bits = generate.token_nll(found, x[0].tolist()).mean().item()
            assert bits == pytest.approx(nll, rel=far / 10 + 1e-6), (dtype, quantize)

    def test_no_cuda_is_needed(self, monkeypatch):
        """meta-llama/llama#50, #112 and six more: a machine with a CPU alone."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        assert generate.best_device() == "cpu"

    def test_no_compiler_is_needed(self, monkeypatch):
        """nanoGPT#28, gpt-fast#68."""
        monkeypatch.setattr(torch, "compile", lambda f: lambda x: [].pop())
        with pytest.raises(ValueError, match="compiled here .pop.*; try without --compile"):
            generate.check_compiler()

    @pytest.mark.parametrize("quantize, prompt", [
        (None, [1, 2]), ("int8", [1, 2]), (None, [1])])
    def test_compiled_once_for_groups_of_layers(self, tmp_path, monkeypatch, quantize, prompt):
        from torch._dynamo.testing import CompileCounter
        torch._dynamo.reset()
        save_meta(random_model(replace(SMALL, n_layers=4, dim=64, hidden_dim=96)), tmp_path)
        model, counted = generate.open_model(tmp_path, None, quantize), CompileCounter()

        def text():
            return spelled(generate.generate(model, [prompt], 30, Sampling(0.0)), 0)
        wanted = text()
        compiled = partial(torch.compile, fullgraph=True, backend=counted)
        monkeypatch.setattr(torch, "compile", lambda run, **options: compiled(run))
        generate.compile_steps(model, 2)
        counted.clear()
        assert text() == wanted and model.through_one and counted.frame_count == 1


class TestSampling:
    def test_temperature(self):
        logits = noise(3, 50) * 3
        close(Sampling(1.0, 0, 1.0).probabilities(logits), logits.softmax(-1))
        close(Sampling(0.5, 0, 1.0).probabilities(logits), (logits * 2).softmax(-1))
        close(Sampling(1e-45).probabilities(logits), Sampling(0.0).probabilities(logits))
        greedy = Sampling(0.0).probabilities(logits)
        assert torch.equal(greedy.argmax(-1), logits.argmax(-1)) and torch.all(greedy.sum(-1) == 1)

    @pytest.mark.parametrize("k, p", [(1, 1.0), (7, 1.0), (0, 0.9), (0, 0.3), (0, 1e-6),
                                      (5, 0.5), (99, 1.0)])
    def test_cuts_of_transformers(self, k, p):
        from transformers import TopKLogitsWarper, TopPLogitsWarper
        for logits in (noise(20, 50) * 3, noise(9, 600) * 3, noise(9, 600) * 0.1):  # 256, or all
            wanted = TopKLogitsWarper(k)(None, logits) if k else logits
            wanted = TopPLogitsWarper(p)(None, wanted) if p < 1 else wanted
            close(Sampling(1.0, k, p).probabilities(logits), wanted.softmax(-1))

    @pytest.mark.parametrize("sampling", [Sampling(1.0, 0, 1.0), Sampling(0.7, 5, 0.9)])
    def test_draws_the_distribution(self, sampling):
        logits, random = noise(1, 7) * 2, torch.Generator().manual_seed(0)
        drawn = sampling.draw(logits.expand(20000, 7), [random] * 20000)
        share = torch.bincount(torch.tensor([token for token, _ in drawn]), minlength=7) / 20000
        p, plain = sampling.probabilities(logits)[0], logits[0].log_softmax(-1)
        assert (share - p).abs().sum() < 0.02 and torch.all(share[p == 0] == 0)
        assert all(x == pytest.approx(plain[token].item()) for token, x in drawn[:20])

    def test_the_largest_random_number_draws_a_token(self, monkeypatch):
        monkeypatch.setattr(torch, "rand", lambda n, **more: torch.tensor([1 - 2**-24]))
        for seed in range(50):
            logits, sampling = noise(4, 300, seed=seed) * 2, Sampling(1.0)
            ids = [token for token, _ in sampling.draw(logits, [None] * 4)]
            assert torch.all(sampling.probabilities(logits)[range(4), ids] > 0)

    def test_bad_settings(self):
        for bad in ({"temperature": -1.0}, {"temperature": math.nan}, {"top_k": -1},
                    {"top_p": 0.0}, {"top_p": 1.5}):
            with pytest.raises(ValueError, match="try"):
                Sampling(**bad)


@pytest.fixture
def read(monkeypatch):
    """Notes what models read, call by call: (after how many tokens, ids, what comes out)."""
    hidden, calls = Llama.hidden, []

    def noted(model, ids, cache=None, *more):
        at = cache and cache.lengths[0]
        h = hidden(model, ids, cache, *more)
        calls.append((at, ids.tolist(), h))
        return h
    monkeypatch.setattr(Llama, "hidden", noted)
    return calls


def spelled(steps, row):
    return [token for step in steps for r, token, _ in step if r == row]


class TestGenerate:
    PROMPTS = [[1, 5, 9, 13, 60], [1], [1, 7, 7]]

    def test_greedy_is_the_argmax_of_the_whole_text(self):
        model, ids = random_model(SMALL).eval(), [1, 5, 9]
        steps = list(generate.generate(model, [ids], 12, Sampling(0.0)))
        for (_, token, logprob), in steps:
            wanted, best = model(torch.tensor([ids]))[0, -1].log_softmax(-1).max(-1)
            assert token == best and logprob == pytest.approx(wanted.item(), abs=1e-4)
            ids = ids + [token]

    @pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0, 20, 0.95, seed=3)])
    def test_a_batch_is_each_alone(self, sampling):
        model = random_model(SMALL).eval()
        together = list(generate.generate(model, self.PROMPTS, 20, sampling))
        for row, prompt in enumerate(self.PROMPTS):
            alone = list(generate.generate(model, [prompt], 20, sampling))
            assert spelled(together, row) == spelled(alone, 0)

    def test_seed_and_number_make_the_sample(self):
        model = random_model(SMALL).eval()

        def draw(seed, numbers):
            steps = list(generate.generate(model, [[1]] * len(numbers), 20,
                                           Sampling(1.0, seed=seed), numbers=numbers))
            return [spelled(steps, row) for row in range(len(numbers))]
        one, two = draw(0, [0, 1])
        assert one != two and draw(0, [1])[0] == two and draw(1, [0])[0] not in (one, two)

    def test_ends_with_a_stop_id_or_the_context(self):
        model = random_model(SMALL).eval()
        free = spelled(list(generate.generate(model, [[1]], 20, Sampling(0.0))), 0)
        stop = frozenset([free[3]])
        steps = list(generate.generate(model, [[1], [1, 2]], 20, Sampling(0.0), stop))
        assert spelled(steps, 0) == free[:free.index(free[3]) + 1]
        room = list(generate.generate(model, [[1] * 60, [1]], 100, Sampling(0.0)))
        assert len(spelled(room, 0)) == 4 and len(spelled(room, 1)) == 63
        with pytest.raises(ValueError, match="no room in the context of 64"):
            next(generate.generate(model, [[1] * 64], 1, Sampling()))

    def test_equal_prompts_are_read_once(self, read):
        model, prompts = random_model(SMALL).eval(), [[1, 5, 9], [7, 3], [1, 5, 9], [1, 5, 9]]
        run = partial(generate.generate, model, max_new_tokens=9, sampling=Sampling(1.0))
        together = list(run(prompts, numbers=[0, 0, 1, 2]))
        assert [ids for _, ids, _ in read][0] == [[1, 5, 9], [7, 3, 0]]
        assert {torch.tensor(ids).shape for _, ids, _ in read[1:]} == {(4, 1)} and len(read) == 9
        for row, number in enumerate([0, 0, 1, 2]):
            assert spelled(together, row) == spelled([*run([prompts[row]], numbers=[number])], 0)

    @pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0, seed=3)])
    @pytest.mark.parametrize("speculate", [1, 3, 99])
    def test_guesses_change_nothing_but_the_steps(self, read, sampling, speculate):
        model = random_model(replace(SMALL, vocab_size=5)).eval()  # where many guesses are right
        prompts = [[1, 2, 3, 1, 2], [4], [1, 2, 2, 1, 2, 2, 1]]
        for n, stops in ((7, []), (99, []), (99, [2])):
            steps = []
            for guesses in (0, speculate):
                steps.append(list(generate.generate(model, prompts, n, sampling, frozenset(stops),
                                                    speculate=guesses)))
            plain, guessed = ([[new for step in kind for new in step if new[0] == row]
                               for row in range(3)] for kind in steps)
            for prompt, one, other in zip(prompts, plain, guessed):
                assert [new[:2] for new in one] == [new[:2] for new in other]
                close(torch.tensor([x for *_, x in one]), torch.tensor([x for *_, x in other]))
                assert stops or len(other) == min(n, 64 - len(prompt))
            assert len(steps[1]) < len(steps[0]) or n == 7 or stops

    def test_guesses_by_hand(self):
        text = generate.Text([1, 2, 3, 1, 2])
        assert text.guess(2) == [3, 1] and text.guess(9) == [3, 1, 2] and text.guess(0) == []
        text.add(7)
        assert text.guess(3) == [] == generate.Text([5]).guess(3)
        text.add(1)
        text.add(2)
        assert text.guess(2) == [7, 1]  # the last place counts

    @pytest.mark.parametrize("speculate", [0, 3])
    def test_a_cache_goes_on_where_it_ends(self, speculate):
        model, cache = random_model(replace(SMALL, vocab_size=5)).eval(), KVCache(SMALL, 1, 64)
        run = partial(generate.generate, model, sampling=Sampling(0.0), speculate=speculate)
        whole = spelled(list(run([[1, 2, 3, 4, 1, 2]], 99)), 0)
        next(run([[1, 2, 3]], 1, cache=cache))
        assert spelled(list(run([[1, 2, 3, 4, 1, 2]], 99, cache=cache)), 0) == whole
        assert len(whole) == 58

    def test_scores_that_are_not_finite_are_said(self):
        model = random_model(SMALL)
        model.norm.weight.data[0] = math.nan
        with pytest.raises(ValueError, match="not finite"):
            next(generate.generate(model, [[1]], 1, Sampling()))


class Letters:
    """A tokenizer of one byte a token, for tests of what is built on tokenizers."""
    vocab_size, bos_id, eos_id, stop_ids, adds_bos = 97, 1, 2, frozenset([2]), True

    def encode(self, text, bos=False, **options):
        return [1] * bos + [byte - 30 for byte in text.encode()]

    def token_bytes(self, token):
        return b"" if token < 3 else bytes([token + 30])


class TestSample:
    def push(self, text, stops=(), end="length"):
        sample = generate.Sample(Letters(), "x", frozenset([2]), list(stops))
        shown = [sample.push(byte - 30, -1.0) for byte in text.encode() if not sample.finish_reason]
        shown.append(sample.push(2, -1.0) if end == "stop" else
                     "" if sample.finish_reason else sample.end("length"))
        return sample, shown

    def test_streams_and_ends(self):
        sample, shown = self.push("abc")
        assert shown == ["a", "b", "c", ""] and sample.json() == {
            "prompt": "x", "ids": [67, 68, 69], "text": "abc", "logprobs": [-1.0] * 3,
            "finish_reason": "length"}
        sample, shown = self.push("ab", end="stop")
        assert (sample.text, sample.finish_reason, sample.ids) == ("ab", "stop", [67, 68])

    def test_stop_texts_never_show(self):
        sample, shown = self.push("abEaENDc", ["END", "zzz"])
        assert "".join(shown) == sample.text == "abEa" and sample.finish_reason == "stop"
        assert shown[2] == "" and shown[3] == "Ea"  # E may begin a stop text until a follows
        sample, shown = self.push("abEN", ["END"])
        assert "".join(shown) == "abEN"

    def test_half_a_character_at_the_end(self):
        sample = generate.Sample(Letters(), "x", frozenset([2]), [])
        assert sample.push("é".encode()[0] - 30, -1.0) == ""
        assert sample.end("length") == sample.text == "\ufffd"


class TestScore:
    def test_every_token_once(self):
        model, ids = random_model(SMALL).eval(), tokens(61).tolist()
        logits = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        wanted = -logits.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        close(generate.token_nll(model, ids), wanted)

    @pytest.mark.parametrize("n", [2, 3, 65, 66, 96, 97, 98, 129, 200, 201])
    def test_windows_overlap_by_half(self, n):
        model, ids = random_model(SMALL).eval(), tokens(n, seed=n).tolist()
        found = generate.token_nll(model, ids)
        assert len(found) == n - 1
        for i in range(n - 1):  # token i + 1: window of 64 that begins at a multiple of 32
            start = max(0, -(-(i + 1 - 64) // 32)) * 32
            logits = model(torch.tensor([ids[start:i + 1]]))[0, -1].log_softmax(-1)
            assert found[i].item() == pytest.approx(-logits[ids[i + 1]].item(), abs=1e-4)

    def test_figures(self):
        row = generate.figures(4, 4 * math.log(2), 2)
        assert row["perplexity"] == pytest.approx(2) and row["bits_per_byte"] == pytest.approx(2)


PAT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"  # Llama 3's
       r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
NOVEL = ("It is a truth universally acknowledged, that a single man in possession of 1000 pounds\n"
         "    must be in want of a wife.  Don't you think so?\n\nНо это другое дело. Ça va: 42!\n")
FIXED = [
    "", " ", "\n", "  a  ", "In 2023: 1234567 llamas\n\n\n  x", NOVEL, "'s", "'rE", "\r", "日本語",
    "it's IT'S we'LLx I'Sx 'ſx don'Tx", "tab\tand\x1c\x1d\x85\xa0\u2028end", "a\r\n\r\nb \r\n c",
    "def f(x):\n    return x  # 10%\n", "👩\u200d👩\u200d👧 🦙", "٣٤٥٦ ⅷ½ 二〇 𝟙𝟚𝟛𝟜", "a\0b",
    "!" * 50 + "\n\n x", "<|eot_id|> <s> <0x0A> <unk>", "Ünï e\u0301 ß ǅ ﬁ ½ Å x𐐀𐐁1"]
CHARACTERS = st.characters(exclude_categories=("Cs", "Cn"))
TEXTS = st.lists(st.one_of(CHARACTERS, st.sampled_from(FIXED), st.text(CHARACTERS, max_size=8)),
                 max_size=12).map("".join)
BYTES = [bytes([i]) for i in range(256)]
NEEDED = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
LLAMA2, LLAMA3, TOK512 = (pytest.param(SHARED / "data" / name, marks=NEEDED) for name in (
    "tokenizers/llama2/tokenizer.model", "tokenizers/llama3/tokenizer.model",
    "stories260K/tok512.bin"))


def for_texts(check):
    for text in FIXED:
        check(text)
    seeded = settings(derandomize=True, deadline=None, max_examples=120, database=None)
    seeded(given(TEXTS)(lambda text: check(text)))()


def byte_pair(ranked):
    lines = (b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(ranked))
    return tokenizer.BytePair(b"".join(lines))


@functools.cache
def trained():
    """A small SentencePiece model."""
    lines = "x = 12\n        y = 345\n"
    return tokenizer.train_sentencepiece([NOVEL * 5, lines * 20], 420)


@functools.cache
def llama2c():
    """The same as llama2.c's export writes it."""
    model = trained().processor
    texts = [model.id_to_piece(i).replace("▁", " ").encode() for i in range(420)]
    return struct.pack("<I", 48) + b"".join(
        struct.pack("<fI", model.get_score(i), len(text)) + text for i, text in enumerate(texts))


@functools.cache
def ranked():
    """A small BytePair, whose ranks overlap as learned ones do."""
    draw, corpus = random.Random(0), "".join(FIXED).encode()
    return byte_pair(dict.fromkeys([*draw.sample(BYTES, 256), *(
        corpus[i:i + n] for n in range(2, 9) for i in draw.sample(range(len(corpus) - 8), 120))]))


def over_characters(model, normalizer=None, split=None):
    """Hugging Face's tokenizer of a SentencePiece model, as transformers converts LLaMA's."""
    names = [model.id_to_piece(i) for i in range(len(model))]
    vocab = {name: i for i, name in enumerate(names)}
    merges = generate_merges(vocab, {name: model.get_score(i) for name, i in vocab.items()})
    theirs = tokenizers.Tokenizer(models.BPE(
        vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer:
        theirs.normalizer = normalizer
    else:
        theirs.pre_tokenizer = split
    theirs.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        *[decoders.Strip(" ", 1, 0)] * ("prepend" in str(normalizer or split).lower())])
    theirs.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    theirs.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in names[:3]])
    theirs.add_special_tokens(["<|im_end|>", "<|im_end|>x"])
    return theirs


def over_words(theirs):
    """The same, with a token that goes over the end of a word."""
    file = json.loads(theirs.to_str())
    file["model"]["vocab"]["n▁"] = 420
    for token in file["added_tokens"][3:]:
        token["id"] += 1
    file["model"]["merges"].insert(0, ["n", "▁"])
    return tokenizers.Tokenizer.from_str(json.dumps(file))


def over_bytes(split, whole=False, alphabet=()):
    """A BPE over bytes, trained by Hugging Face's library, with one token that no merge makes."""
    theirs = tokenizers.Tokenizer(models.BPE(ignore_merges=whole))
    theirs.pre_tokenizer, theirs.decoder = split, decoders.ByteLevel()
    theirs.train_from_iterator([NOVEL] * 9, trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=list(alphabet), min_frequency=2,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"] * (not whole)))
    file = json.loads(theirs.to_str())
    file["model"]["vocab"]["Ġwifes"] = len(file["model"]["vocab"])
    theirs = tokenizers.Tokenizer.from_str(json.dumps(file))
    if whole:
        theirs.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
        template = processors.TemplateProcessing(
            "<|begin_of_text|> $A", None, [("<|begin_of_text|>", len(file["model"]["vocab"]))])
        theirs.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return theirs


METASPACE = functools.partial(pre_tokenizers.Metaspace, "▁", split=False)
IN_BYTES = functools.partial(pre_tokenizers.ByteLevel, False)
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
HUGGING_FACE = {
    "legacy": lambda: over_characters(trained().processor, PREPEND),
    "replace": lambda: over_characters(trained().processor, normalizers.Replace(" ", "▁")),
    "first": lambda: over_characters(trained().processor, split=METASPACE(prepend_scheme="first")),
    "always": lambda: over_characters(trained().processor, split=METASPACE()),
    "never": lambda: over_characters(trained().processor, split=METASPACE(prepend_scheme="never")),
    "words": lambda: over_words(HUGGING_FACE["always"]()),
    "smollm": lambda: over_bytes(pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), IN_BYTES()])),
    "llama-bpe": lambda: over_bytes(pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(PAT), "isolated"), IN_BYTES(use_regex=False)]),
        True, IN_BYTES.func.alphabet()),
    "gpt-2": lambda: over_bytes(IN_BYTES(), False, IN_BYTES.func.alphabet())}


def many(n):
    """A BytePair of 512 + n tokens."""
    return byte_pair(BYTES + [b"%d!" % i for i in range(n)])


class TestSentencePiece:
    @pytest.mark.parametrize("file", [None, LLAMA2])
    def test_equals_sentencepiece(self, file):
        ours = tokenizer.load_tokenizer(file) if file else trained()
        theirs = sentencepiece.SentencePieceProcessor(model_proto=ours.data)
        def check(text):
            ids, plain = theirs.encode(text), text.replace("▁", " ")
            assert ours.encode(text, bos=True) + ours.encode(text, eos=True) == [1, *ids, *ids, 2]
            assert ours.decode(ids) == theirs.decode(ids) == plain
            for inside in (False, True):
                ids = [1, *ours.encode(text, continues=inside), 2]
                shown = b"".join(map(ours.token_bytes, ids)).decode()
                assert shown == " " * (not inside and text > "") + plain
        for_texts(check)
        assert ours.vocab_size == len(theirs) and ours.stop_ids == {2} and ours.adds_bos
        assert ours.special == {"<s>": 1, "</s>": 2} and ours.chat_template is None
        ids = [5, 1, *theirs.encode("a"), 2, *theirs.encode(" <s>")]
        assert [5, *ours.encode("<s>a</s> <s>", continues=True, allowed_special=["<s>", "</s>"])
                ][:4] == ids[:4] and 1 not in ours.encode("<s>a")
        assert [ours.token_bytes(i) for i in range(259)] == [" ⁇ ".encode(), b"", b"", *BYTES]


class TestTrainSentencePiece:
    def test_layout_of_llama_and_an_even_sample(self):
        pieces = [trained().processor.id_to_piece(i) for i in range(420)]
        assert pieces[:259] == ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        assert not any(re.search(r"\d.|.\d|\n", piece) for piece in pieces[259:])
        assert "▁▁▁▁" in pieces and trained().vocab_size == 420
        assert trained().processor.pad_id() == -1
        long = tokenizer.train_sentencepiece(["xy " * 3000 + "ab " * 2000], 268)
        assert [long.token_bytes(i) for i in long.encode("xy ab")] == [b" xy", b" ab"]
        texts = ["".join(random.Random(i).choices("abcdef \n", k=3000)) for i in range(30)]
        model = [tokenizer.train_sentencepiece(texts, 300, n).data for n in (9000, 90000)]
        assert model[0] == tokenizer.train_sentencepiece(texts[::16], 300).data != model[1]


class TestPretokenPattern:
    def test_equals_the_regex_module(self):
        theirs = PAT.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
        def check(text, top=0x110000):
            assert tokenizer.pretoken_pattern(top).findall(text) == regex.findall(theirs, text)
        for_texts(check)
        known = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in
                 ("Cn", "Co", "Cs") and (not c.isalpha() or c < "\U00020000" and ord(c) % 5 == 1)]
        for top in (128, 0x110000):
            check("".join(f"x{c}x {c} 1{c}2!{c}\n" for c in known if ord(c) < top), top)


class TestBytePair:
    def oracle(self, o):
        return tiktoken.Encoding("", pat_str=PAT, mergeable_ranks=o.ranks, special_tokens=o.special)

    @pytest.mark.parametrize("file", [None, LLAMA3])
    def test_equals_tiktoken(self, file):
        ours = tokenizer.load_tokenizer(file) if file else ranked()
        theirs, n = self.oracle(ours), len(ours.ranks)
        def check(text):
            ids = theirs.encode(text, disallowed_special=())
            assert ours.encode(text, True) == ours.encode(text, True, continues=True) == [n, *ids]
            assert ours.encode(text, eos=True) == [*ids, n + 1] and ours.decode(ids) == text
            assert b"".join(map(ours.token_bytes, ids)) == text.encode()
        for_texts(check)
        for text in ("a" * 3000, " " * 3000, "!\n" * 3000, "ab" * 3000, " universally univers"):
            check(text)
        ids = [*range(1, ours.vocab_size, 3)]
        assert ours.decode(ids) == theirs.decode(ids) and ours.vocab_size == n + 256

    @pytest.mark.parametrize("names, words, stops", [
        ("3.0", "0 1 2 3 start_header_id end_header_id 4 eot_id 5 250", {1, 9}),
        ("3.1", "0 1 finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id "
                "python_tag image 2 245", {1, 8, 9})])
    def test_special_tokens_only_where_allowed(self, names, words, stops):
        ours, n = tokenizer.BytePair(ranked().data, names), ranked().bos_id
        words = [f"<|{'reserved_special_token_' * w.isdigit()}{w}|>" for w in words.split()]
        assert [*ours.special][2:len(words) + 1] + [*ours.special][-1:] == words
        assert ours.stop_ids == {n + stop for stop in stops} and ours.token_bytes(n + 9) == b""
        text, allowed = "a<|eot_id|>b<|image|><|eot_id|>", {"<|eot_id|>", "<|end_of_text|>"}
        ids = ours.encode(text, allowed_special=allowed)
        assert ids == self.oracle(ours).encode(text, allowed_special=allowed, disallowed_special=())
        assert [i for i in ids if i >= n] == [n + 9] * 2 and max(ours.encode(text)) < n


class TestLoadTokenizer:
    def load(self, folder, data):
        (folder / "file").write_bytes(data)
        return tokenizer.load_tokenizer(folder / "file")

    @pytest.mark.parametrize("file", [None, TOK512])
    def test_llama2c_merges_by_score(self, file, tmp_path):
        data, vocab, at = file.read_bytes() if file else llama2c(), {}, 4
        ours = self.load(tmp_path, data)
        while at < len(data):
            score, size = struct.unpack_from("<fI", data, at)
            at += 8 + size
            vocab[data[at - size:at].decode()] = (len(vocab), score)
        for text in [NOVEL, "Once upon a time, there was a little girl.", "Zoë 🦙  x\n\n"]:
            parts = [c if c in vocab else f"<0x{b:02X}>"
                     for c in " " + text for b in ([0] if c in vocab else c.encode())]
            while pairs := [(-vocab[a + b][1], i) for i, (a, b) in enumerate(zip(parts, parts[1:]))
                            if a + b in vocab]:
                i = min(pairs)[1]
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            assert ours.encode(text) == [vocab[part][0] for part in parts]
            assert ours.decode(ours.encode(text)) == text and ours.vocab_size == len(vocab)

    @pytest.mark.parametrize("kind", ["model", "ranks", "bin"])
    def test_told_apart_wrong_ids_and_damage(self, kind, tmp_path):
        ours = ranked() if kind == "ranks" else trained()
        data = llama2c() if kind == "bin" else ours.data
        self.load(tmp_path, data).save(tmp_path / "saved")
        again, draw = tokenizer.load_tokenizer(tmp_path / "saved", "3.0"), random.Random(0)
        assert type(again) is (tokenizer.HuggingFace if kind == "bin" else type(ours))
        assert ranked().bos_id + 8 not in again.stop_ids
        for text in FIXED:
            assert again.encode(text) == ours.encode(text)
        for call in (lambda: again.decode([-1]), lambda: again.token_bytes(again.vocab_size),
                     lambda: again.encode("\ud800"),
                     lambda: ranked().encode("", allowed_special="x")):
            with pytest.raises(ValueError, match="; try"):
                call()
        for _ in range(25):
            with pytest.raises(ValueError, match="file: .*try|file holds no"):
                self.load(tmp_path, data[:draw.randrange(2000)])
            wrong = bytearray(data)
            for at in draw.sample(range(len(data)), 8):
                wrong[at] = draw.randrange(256)
            with contextlib.suppress(ValueError):  # nothing else, and no crash
                self.load(tmp_path, bytes(wrong)).encode(NOVEL)

    def test_lies(self, tmp_path):
        data, model, lines = llama2c(), trained().data, ranked().data.splitlines()
        lies = [b"\n".join(lines[:4] + [line] + lines[5:]) for line in (
            b"QQ== 7", lines[3], lines[3][:-1] + b"4", b"!! 4", b"")]
        lies += [data[:at] + struct.pack("<I", value) + data[at + 4:] for at, value in (
            (0, 2), (4, 0x7FC00000), (8, 2**31), (8, 2**32 - 1), (8, 6), (8, 4))]  # 7FC00000: NaN
        lies += [data + b"\0\0\0\0\2\0\0\0\7", data + b"\0", data.replace(b"<0xC1>", b"<0xC2>"),
                 b"", b"\n", b"hello", b"\n".join(lines[:255]), model[:model.rindex(b"\x08id") - 3]]
        for i, lie in enumerate(lies):
            with pytest.raises(ValueError, match="line 5 .*; try" if i < 5 else "; try"):
                self.load(tmp_path, lie)


LIES = [None, True, -1, 0.5, 2**40, 10**400, "", "x", "\ud800", [], {}, [[]], {"x": []}, ["a b"],
        [["a", "b", "c"]], {"a": 0, "b": 0}, {"type": "Sequence"}, {"type": []}]


def places(tree):
    """(dict or list, key) of the places in a tree, three of each list."""
    for key in list(tree)[:12] if isinstance(tree, dict) else range(min(len(tree), 3)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from places(tree[key])


def check_lies(read, tree):
    """A tree with a lie at any place reads, or is one line of ValueError; returns those lines."""
    said = []
    for inside, key in [*places(tree)]:
        true = inside[key]
        for lie in LIES:
            inside[key] = lie
            try:
                read(tree).encode("a 1\u20ac", bos=True, eos=True)
            except ValueError as error:
                assert "; try" in str(error) and "\n" not in str(error) and len(str(error)) < 400
                said.append(str(error))
        inside[key] = true
    return said


class TestHuggingFace:
    load = TestLoadTokenizer.load

    def equal(self, ours, theirs, for_texts=for_texts):
        names, hides = ours.special.keys(), ours.spaced
        def check(text):
            ids = theirs.encode(text).ids
            assert ours.encode(text, bos=ours.adds_bos, allowed_special=names) == ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=hides)
            plain = ours.encode(text)
            assert not {*plain} & {*ours.special.values()}
            if b"\xf1" in ours.tokens:  # SmolLM2 and ours of its kind have not all bytes
                shown = b"".join(map(ours.token_bytes, ours.encode(text, continues=True)))
                assert shown.decode() == (text.replace("▁", " ") if hides else text)
        for_texts(check)
        for text in ("ab" * 1000, " wifes wifesx", "  <s> a<|im_end|> 1 <|eot_id|>b", "ananas\n",
                     "a<|im_end|>x<|im_end|>", "x    1   2  345    \n    6"):
            check(text)

    @pytest.mark.parametrize("kind", HUGGING_FACE)
    def test_equals_tokenizers(self, kind, tmp_path):
        theirs = HUGGING_FACE[kind]()
        ours = self.load(tmp_path, theirs.to_str().encode())
        self.equal(ours, theirs)
        added = {token.content: i for i, token in theirs.get_added_tokens_decoder().items()}
        assert ours.special == added and ours.vocab_size == theirs.get_vocab_size()
        begins, ends = {"smollm": (0, {0, 2}), "gpt-2": (0, {0, 2}), "llama-bpe": (
            added.get("<|begin_of_text|>"), {added.get("<|end_of_text|>"), added.get("<|eot_id|>")})
            }.get(kind, (1, {2, added.get("<|im_end|>")}))
        assert (ours.bos_id, ours.stop_ids) == (begins, ends) and ours.eos_id in ends
        assert ours.adds_bos is (kind not in ("smollm", "gpt-2")) and ours.chat_template is None
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({
            "add_bos_token": not ours.adds_bos, "bos_token": {"content": [*added][-1]},
            "eos_token": [*added][0], "chat_template": [
                {"name": "default", "template": "{{ 1 }}"}, {"name": "x", "template": "y"}]}))
        told = self.load(tmp_path, theirs.to_str().encode())
        assert told.adds_bos is not ours.adds_bos and told.chat_template == "{{ 1 }}"
        assert told.bos_id == max(added.values()) and told.eos_id == min(added.values())
        (tmp_path / "chat_template.jinja").write_text("{% if é %}", "utf-8")
        assert self.load(tmp_path, theirs.to_str().encode()).chat_template == "{% if é %}"
        (tmp_path / "x").mkdir()
        told.save(tmp_path / "x" / "file")
        again = tokenizer.load_tokenizer(tmp_path / "x" / "file")
        for name in ("tokens", "ranks", "merges", "special", "bos_id", "stop_ids", "adds_bos",
                     "chat_template", "eos_id", "hidden", "pattern", "data"):
            assert getattr(again, name) == getattr(told, name), name
        theirs = tokenizers.Tokenizer.from_str(again.data.decode())
        self.equal(ours, theirs, lambda check: [*map(check, FIXED)])

    @pytest.mark.parametrize("kind", ["legacy", "llama-bpe"])
    def test_lies(self, kind, tmp_path):
        data = HUGGING_FACE[kind]().to_str()
        read = lambda tree: self.load(tmp_path, json.dumps(tree).encode())
        if kind == "legacy":
            assert len(check_lies(read, json.loads(data))) > 300
        for change, named in (
                ({"normalizer": {"type": "NFC"}}, "NFC"), ({"decoder": None}, "decoder"),
                ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
                ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFD"}]}}, "NFD"),
                ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a+"}}}, "a[+]"),
                ({"post_processor": {"type": "BertProcessing"}}, "Bert")):
            with pytest.raises(ValueError, match=f"file: .*{named}.*; try"):
                read(json.loads(data) | change)
        for change, named in (
                ({"type": "WordPiece"}, "type .WordPiece"), ({"dropout": 0.1}, "dropout 0.1"),
                ({"end_of_word_suffix": "</w>"}, "</w>"), ({"merges": ["a zz"]}, "merge 0"),
                ({"merges": ["u i"]}, "merge 0"), ({"merges": [["", "e"]]}, "merge 0"),
                ({"byte_fallback": kind != "legacy"}, "byte_fallback")):
            with pytest.raises(ValueError, match=f"file: .*{named}.*; try"):
                read({**json.loads(data), "model": json.loads(data)["model"] | change})
        vocab = json.loads(HUGGING_FACE["llama-bpe"]().to_str())
        number = vocab["model"]["vocab"].pop("Ġwifes")
        for name, value in (("", number), ("\ud800", number), ("Ġwifes", float(number))):
            vocab["model"]["vocab"][name] = value
            with pytest.raises(ValueError, match="file: (the ids|text holds half).*; try"):
                read(vocab)
            del vocab["model"]["vocab"][name]
        deep = b'{"model":' * 100_000
        for lie in (deep, data[:-9].encode(), b'{"a": 1}', b'{"model": "\xff"}'):
            with pytest.raises(ValueError, match="file: .*; try"):
                self.load(tmp_path, lie)
        for name, lie in (("tokenizer_config.json", deep), ("tokenizer_config.json", b"[7]"),
                          ("tokenizer_config.json", b'{"bos_token": "absent"}'),
                          ("tokenizer_config.json", b'{"add_bos_token": 7}'),
                          ("chat_template.jinja", b"\xff")):
            (tmp_path / name).write_bytes(lie)
            with pytest.raises(ValueError, match="; try"):
                self.load(tmp_path, data.encode())
            (tmp_path / name).unlink()

    @pytest.mark.parametrize("file", [LLAMA2])
    def test_llama_2(self, file):
        ours = tokenizer.load_tokenizer(file)
        theirs = over_characters(ours.processor, PREPEND)
        self.equal(tokenizer.HuggingFace(theirs.to_str().encode()), theirs)


class TestFromGGUF:
    def fields(self, theirs, **more):
        """What a GGUF file has of it."""
        file, added = json.loads(theirs.to_str()), theirs.get_added_tokens_decoder()
        names = [theirs.id_to_token(i) for i in range(theirs.get_vocab_size())]
        types = [3 if i in added else 6 if re.fullmatch("<0x..>", name) else 1
                 for i, name in enumerate(names)]
        more |= {"tokens": names, "token_type": types, "merges": file["model"]["merges"]}
        more["merges"] = [" ".join(merge) for merge in more["merges"]]
        return {f"tokenizer.ggml.{key}": value for key, value in more.items()}

    @pytest.mark.parametrize("kind, front", [("legacy", True), ("replace", False)])
    def test_llama(self, kind, front):
        theirs = HUGGING_FACE[kind]()
        scores = [trained().processor.get_score(i) for i in range(420)] + [0.0] * 2
        fields = self.fields(theirs, model="llama", scores=scores, add_space_prefix=front,
                             bos_token_id=1, eos_token_id=2)
        fields["tokenizer.ggml.token_type"][0] = 2
        ours = tokenizer.from_gguf(fields)
        TestHuggingFace().equal(ours, theirs)
        assert ours.adds_bos and (ours.bos_id, ours.stop_ids) == (1, {2, 420})
        with pytest.raises(ValueError, match="no token has id -1; try"):
            tokenizer.from_gguf(fields | {"tokenizer.ggml.bos_token_id": -1})
        used = next(i for i in ours.encode(NOVEL) if len(ours.tokens[i]) > 2)
        fields["tokenizer.ggml.token_type"][used] = 5  # unused
        assert used not in tokenizer.from_gguf(fields).encode(NOVEL)
        fields["tokenizer.ggml.token_type"][420] = 4
        assert tokenizer.from_gguf(fields).token_bytes(420) == b"<|im_end|>"
        if front:
            assert len(check_lies(tokenizer.from_gguf, fields)) > 100

    @pytest.mark.parametrize("pre, kind", [
        ("llama-bpe", "llama-bpe"), ("smollm", "smollm"), ("gpt-2", "gpt-2"), ("default", "gpt-2")])
    def test_gpt2(self, pre, kind):
        theirs = HUGGING_FACE[kind]()
        bos, eot, eos = theirs.get_added_tokens_decoder()
        fields = self.fields(theirs, model="gpt2", pre=pre, bos_token_id=bos, eos_token_id=eos,
                             eot_token_id=eot)
        fields["tokenizer.chat_template"] = "{{ 2 }}"
        ours = tokenizer.from_gguf(fields)
        TestHuggingFace().equal(ours, theirs)
        assert ours.adds_bos is (kind == "llama-bpe") and ours.chat_template == "{{ 2 }}"
        assert (ours.bos_id, ours.eos_id) == (bos, eos) and {eos, eot} <= ours.stop_ids
        assert not tokenizer.from_gguf(fields | {"tokenizer.ggml.add_bos_token": False}).adds_bos
        with pytest.raises(ValueError, match="pre .qwen2.*; try"):
            tokenizer.from_gguf(fields | {"tokenizer.ggml.pre": "qwen2"})
        if kind == "smollm":
            assert len(check_lies(tokenizer.from_gguf, fields)) > 100


class TestStreamDecoder:
    @pytest.mark.parametrize("ours", [trained, ranked, *(
        lambda kind=kind: tokenizer.HuggingFace(HUGGING_FACE[kind]().to_str().encode())
        for kind in ("legacy", "llama-bpe"))])
    def test_equals_decode(self, ours):
        ours = ours()

        def check(ids):
            stream = tokenizer.StreamDecoder(ours, start=True)
            assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids)
        for_texts(lambda text: check(ours.encode(text)))
        for ids in ([0, 5], [35, 68], ours.encode("   a"), [1, 1, *ours.encode("  a b")]):
            check(ids)
        later = tokenizer.StreamDecoder(ours, start=False)
        assert "".join(map(later.push, ours.encode(" a", continues=True))) == " a"
        ids = [[ours.token_bytes(i) for i in range(259)].index(bytes([b])) for b in "🦙".encode()]
        assert [later.push(i) for i in ids] == ["", "", "", "🦙"]
        assert later.push(ids[0]) + later.flush() == "\ufffd"


class TestCut:
    @pytest.mark.parametrize("text, lengths", [
        ("", []), ("a\n\n" * 21845 + "b", [65536]), ("é" * 32768 + "a", [65536, 1]),
        ("x" + "é" * 40000, [65535, 14466]), ("w" * 200000, [65536] * 3 + [3392]),
        (("y" * 99 + "\n\n") * 2000, [16463] * 12 + [4444]),  # at blank lines
        (("y" * 99 + "\r\n\r\n") * 2000, [16480] * 12 + [8240]),
        (("y" * 30000 + "\n\n\n\n") * 10, [30004] * 10),
        (("z" * 99 + "\n") * 2000, [16400] * 12 + [3200]),  # at line ends, where there are none
        ("v" * 60000 + "\n" + "v" * 5000 + "\n\n" + "v" * 9000, [65003, 9000]),
        ("v" * 60000 + "\n" + "v" * 9000 + "\n\n" + "v" * 60000, [60001, 65536, 3466])])
    def test_where_whatever_the_chunks(self, text, lengths):
        data = text.encode()
        for step in (999, 1 << 16, 1 << 17):
            pieces = list(tokenizer.cut(data[i:i + step] for i in range(0, len(data), step)))
            assert "".join(pieces) == text and [len(p.encode()) for p in pieces] == lengths


class TestDocuments:
    def test_files_folders_and_jsonl(self, tmp_path):
        skipped, jsonl = [], "\n".join(['{"text": "a\\nb"}', "", "{", '{"text":5}', "[1]", '"text"',
                 "7", '{"text": "\\ud800 pair"}', "[" * 100_000, json.dumps({"text": NOVEL * 999})])
        for name, data in {
                "z": b"last", "b/a": b"\xef\xbb\xbf\r\n", ".n/x": b"", ".x": b"", "a.py": b"first",
                "empty": b"", "nul": b"a\0b", "short": b"\xc3", "m.jsonl": jsonl.encode()}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
        reader = tokenizer.documents([tmp_path, tmp_path / "a.py", tmp_path / "absent"], skipped)
        assert ["".join(next(reader)) for _ in range(7)] == [
            "first", "a\nb", "? pair", NOVEL * 999, "last", "\r\n", "first"]
        with pytest.raises(ValueError, match="absent does not exist; try"):
            next(reader)
        assert [line.removeprefix(str(tmp_path))[1:19] for line in skipped] == [
            "empty: empty or no", "m.jsonl: 6 lines a", "nul: holds NUL byt", "short: not UTF-8 t"]

    def test_standard_library(self):
        from pydoc_data.topics import topics
        skipped, root = [], Path(os.__file__).parent
        found = ["".join(document) for document in tokenizer.standard_library(skipped)]
        assert skipped == [] and len(set(found)) > 400 and found[-1] == topics[max(topics)]
        for left_out in ("config-*/*.py", "_sysconfigdata*.py", "idlelib/r*.py", "test/*ast.py"):
            assert not {file.read_text("utf-8") for file in root.glob(left_out)} & {*found}


class TestPrepare:
    SHA = {text: int(hashlib.sha1(text.encode()).hexdigest(), 16)
           for text in map("é%d".__mod__, range(600))}
    HELD = [t for t, number in SHA.items() if number % 20 == 0]
    REST = [t for t, number in SHA.items() if number % 20]

    def test_too_little_text(self):
        for texts in (["a"], ["a", "a"], self.HELD[:1], self.HELD[:2], []):
            with pytest.raises(ValueError, match="(too little|no) text.*try"):
                tokenizer.survey(lambda skipped: [texts])

    @pytest.mark.parametrize("ours, texts, held, size", [  # held: if none by itself, the least
        (trained, [*SHA], HELD, 2), (functools.partial(many, 65024), [*SHA], HELD, 2),
        (functools.partial(many, 65025), REST, [min(REST, key=SHA.get)], 4)])
    def test_shards(self, tmp_path, ours, texts, held, size):
        ours = ours()
        documents = [texts[i:i + 10] for i in range(0, len(texts), 10)]
        ids, sizes = [[], []], [0, 0]
        for document in documents:
            for split in (0, 1):
                mine = [text for text in document if (text in held) == split]
                sizes[split] += len("".join(mine).encode())
                for i, text in enumerate(mine):
                    ids[split] += ours.encode(text, bos=i == 0, continues=i > 0)
                ids[split] += [ours.eos_id] * bool(mine)
        reader = lambda skipped: iter(documents)
        known = tokenizer.survey(reader)
        free = [text for text in texts if text not in held]
        assert [*tokenizer.training_text(reader, known.chosen)] == free
        for workers in (1, 2):
            entry = tokenizer.prepare("x", reader, known, ours, tmp_path, workers)
            found = {f.name: np.fromfile(f, f"<u{size}").tolist() for f in tmp_path.iterdir()}
            assert found == {"x.train.bin": ids[0], "x.val.bin": ids[1]}
            counts = [entry[f"{split}_{unit}"] for unit in ("bytes", "tokens")
                      for split in ("train", "val")]
            assert counts == [*sizes, *map(len, ids)] and entry["dtype"] == f"uint{8 * size}"


class TestTokenizerCommand:
    def run(self, capsys, *arguments):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", ["tokenizer.py", *map(str, arguments)])
            tokenizer.command(tokenizer.main)
        return ended.value.code, *capsys.readouterr()

    def test_tokenizer_json(self, tmp_path, capsys):
        HUGGING_FACE["legacy"]().save(str(tmp_path / "t.json"))
        status, out, err = self.run(capsys, "info", tmp_path / "t.json")
        assert (status, err) == (0, "") and "HuggingFace: 422 tokens, bos 1, eos 2, ends at" in out
        status, out, err = self.run(capsys, "decode", "--tokenizer", tmp_path / "t.json", 1, 20)
        assert (status, out, err) == (0, "\x11\n", "")

    def test_train_encode_decode(self, tmp_path, capsys):
        model, texts = tmp_path / "m", (tokenizer.__file__, __file__)
        train = ["train", "--out", model, "--vocab-size", 500, "--data", *texts]
        status, out, err = self.run(capsys, *train)
        assert (status, err) == (0, "") and "500 tokens, bos 1, eos 2" in out
        assert self.run(capsys, *train)[2].endswith("exists; try --force or another --out\n")
        for flag in ("bos", "eos"):
            ids = tokenizer.load_tokenizer(model).encode("12 🦙", **{flag: True})
            found = self.run(capsys, "encode", "--tokenizer", model, f"--{flag}", "12 🦙")
            assert found == (0, " ".join(map(str, ids)) + "\n", "")
            assert self.run(capsys, "decode", "--tokenizer", model, *ids) == (0, "12 🦙\n", "")

    @pytest.mark.parametrize("command, message", [
        (f"train --out x --vocab-size 99 --data {__file__} {tokenizer.__file__}", "smaller"),
        ("", "required"), ("info absent", "absent"), (f"info {__file__}", "holds no tokenizer"),
        ("train --out x --data absent", "not exist"), ("decode --tok m 1", "--tok"),
        ("decode --tokenizer m 1 x", "x is no id"), ("decode --tokenizer m 999", "has id 999")])
    def test_mistakes_are_one_line(self, tmp_path, monkeypatch, capsys, command, message):
        monkeypatch.chdir(tmp_path)
        trained().save("m")
        status, out, err = self.run(capsys, *command.split())
        assert (status, out, err.count("\n"), err[:7]) == (2, "", 1, "error: ") and message in err


def shards(folder, sizes, weights=None):
    """Token shards of counted numbers, so that a token says where it stands."""
    sources = []
    for k, size in enumerate(sizes):
        for split, count in (("train", size), ("val", 101)):
            (np.arange(count) + 10_000 * k).astype("<u2").tofile(folder / f"{k}.{split}.bin")
        sources.append({"name": str(k), "path": f"text{k}", "dtype": "uint16", "val_bytes": 303,
                        "train_tokens": size, "val_tokens": 101,
                        "weight": weights[k] if weights else None})
    return sources


class TestBatches:
    def test_a_function_of_seed_step_and_number(self, tmp_path):
        sources = shards(tmp_path, [5000])
        one, two, other = (train.Batches(tmp_path, sources, 16, 64, seed) for seed in (0, 0, 1))
        for step in (9, 3, 7):
            assert one.step(step).shape == (4, 17) and torch.equal(one.step(step), two.step(step))
            assert one.step(step)[2].tolist() == one.sequence(4 * step + 2).tolist()
        assert not torch.equal(one.step(0), other.step(0))
        assert not torch.equal(one.step(0), one.step(1))
        assert torch.all(one.step(0).diff() == 1)  # T + 1 in a row

    def test_every_epoch_reads_everything_evenly(self, tmp_path):
        batches = train.Batches(tmp_path, shards(tmp_path, [5000]), 16, 64, 0)
        seen = np.zeros(5000)
        for step in range(3 * 5000 // 64):
            for row in batches.step(step):
                seen[row[:-1]] += 1
        assert np.mean(seen == 0) < 0.01 and seen.max() <= 6
        assert batches.epochs(3 * 5000 // 64) == [pytest.approx(3, rel=0.02)]

    def test_weights(self, tmp_path):
        sources = shards(tmp_path, [900, 5000, 300], [1, 2.0, 7])
        batches = train.Batches(tmp_path, sources, 16, 64, 0)
        from_source = torch.stack([batches.step(s)[:, 0] // 10_000 for s in range(250)]).flatten()
        share = [(from_source == k).float().mean().item() for k in range(3)]
        assert share == [pytest.approx(p, abs=0.01) for p in (0.1, 0.2, 0.7)]
        free = train.Batches(tmp_path, shards(tmp_path, [900, 5000, 300]), 16, 64, 0)
        assert free.epochs(100) == [pytest.approx(100 * 64 / 6200, rel=1e-3)] * 3

    def test_last_token_is_reached_and_too_little_is_said(self, tmp_path):
        batches = train.Batches(tmp_path, shards(tmp_path, [20]), 16, 64, 0)
        assert {int(batches.sequence(g)[0]) for g in range(50)} == {0, 1, 2, 3}
        assert batches.step(5).shape == (4, 17)
        with pytest.raises(ValueError, match="text0 has 16 tokens"):
            train.Batches(tmp_path, shards(tmp_path, [16]), 16, 64, 0)

    def test_damaged_shards_are_said(self, tmp_path):
        sources = shards(tmp_path, [900])
        for change in ({"train_tokens": 901}, {"dtype": "x"}, {"val_tokens": -9}, {"name": 3}):
            with pytest.raises(ValueError, match="shards in .* are damaged; try --fresh"):
                train.Batches(tmp_path, [{**sources[0], **change}], 16, 64, 0)
        with pytest.raises(ValueError, match="damaged"):
            train.Batches(tmp_path, [{}], 16, 64, 0)

    def test_held_out_windows(self, tmp_path):
        batches = train.Batches(tmp_path, shards(tmp_path, [900]), 16, 64, 0)
        (ratio, windows), = batches.held_out(10**6)
        targets = np.concatenate([w[1:] for w in windows])
        assert ratio == 3 and targets.tolist() == list(range(1, 101))  # each token once
        assert len(batches.held_out(60)[0][1]) == 4

    def test_document_starts(self):
        x = torch.tensor([[5, 1, 6, 7], [6, 6, 1, 1]])
        torch.testing.assert_close(train.document_starts(x, 1), starts(0, 1, 4, 6, 7, 8))


class TestRecipe:
    def test_warm_up_and_cosine(self):
        recipe = Recipe(1.0, 1, 1, warmup=10)
        rates = [train.learning_rate(step, 110, recipe) for step in range(110)]
        oracle = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(oracle, 99, eta_min=0.1)
        assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
        for rate in rates[10:]:
            assert rate == pytest.approx(cosine.get_last_lr()[0], rel=1e-5)
            oracle.step()
            cosine.step()
        assert rates[-1] == pytest.approx(0.1) and train.learning_rate(0, 1, recipe) > 0

    def test_adamw_decays_matrices_alone(self):
        model = random_model(SMALL)
        recipe = Recipe(0.01, 1, 1, eps=1e-8, weight_decay=0.5)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        oracle = {name: torch.nn.Parameter(p.clone()) for name, p in before.items()}
        optimizers = [torch.optim.AdamW([p], lr=0.01, betas=(0.9, 0.95), eps=1e-8,
                                        weight_decay=0.5 if p.dim() > 1 else 0.0)
                      for p in oracle.values()]
        optimizer = train.make_optimizer(dict(model.named_parameters()), recipe)
        for step in range(3):
            for (name, p), ours in zip(oracle.items(), model.parameters()):
                p.grad = noise(*p.shape, seed=step)
                ours.grad = p.grad.clone()
            for each in (optimizer, *optimizers):
                each.step()
        for name, p in model.named_parameters():
            close(p, oracle[name], atol=1e-6)
            assert not torch.equal(p, before[name])


def engine_of(model, micro_batch=4, **options):
    """One rank that holds all of it, with the weights of a model."""
    engine = train.Engine(model.config, train.Layout(), "cpu", micro_batch, dtype=model.dtype,
                          **options)
    engine.stages[0].load_state_dict(model.state_dict())
    return engine


class TestTrainStep:
    def step(self, engine, clip=1e9, lr=0.1, batch=None):
        model, recipe = engine.stages[0], Recipe(0.1, 1, 1, eps=1e-8, weight_decay=0.0)
        optimizer = train.make_optimizer(engine.parameters, recipe)
        seen = {}
        optimizer.register_step_pre_hook(lambda *_: seen.update(
            {name: p.grad.clone() for name, p in model.named_parameters()}))
        batch = tokens(6, 21) if batch is None else batch
        return train.train_step(engine, optimizer, batch, lr, clip)[:2], seen

    def test_frozen_weights_stay(self):
        engine = engine_of(random_model(SMALL))
        model = engine.stages[0].requires_grad_(False)
        model.output.requires_grad_(True)
        optimizer = train.make_optimizer(engine.parameters, SIZES["tiny"][1])
        train.train_step(engine, optimizer, tokens(2, 9), 1, 1)
        changed = {name for (name, p), before in zip(model.named_parameters(),
                   random_model(SMALL).parameters()) if not torch.equal(p, before)}
        assert changed == {"output.weight"}

    def test_accumulation_is_one_batch(self):
        (loss, norm), whole = self.step(engine_of(random_model(SMALL), 6))
        x = tokens(6, 21)
        model = random_model(SMALL)
        model.loss(x[:, :-1], x[:, 1:]).backward()
        wanted = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        assert norm == pytest.approx(wanted, rel=1e-4)
        for micro_batch in (1, 2, 4):
            (other, same), parts = self.step(engine_of(random_model(SMALL), micro_batch))
            assert (other, same) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4))
            for name, grad in whole.items():
                close(parts[name], grad, atol=1e-6)

    def test_clips_to_the_norm(self):
        (_, norm), grads = self.step(engine_of(random_model(SMALL)), clip=1e-3)
        clipped = torch.cat([g.flatten() for g in grads.values()]).norm().item()
        assert norm > 0.01 and clipped == pytest.approx(1e-3, rel=1e-3)
        (_, norm), grads = self.step(engine_of(random_model(SMALL)), clip=1e9)
        whole = torch.cat([g.flatten() for g in grads.values()]).norm().item()
        assert whole == pytest.approx(norm, rel=1e-4)

    def test_learning_rate_is_the_one_given(self):
        engine = engine_of(random_model(SMALL))
        model = engine.stages[0]
        before = model.norm.weight.detach().clone()
        self.step(engine, lr=1e-3)  # AdamW's first step moves each weight by lr
        close((model.norm.weight - before).abs(), torch.full((48,), 1e-3), atol=1e-5)

    def test_not_finite_changes_nothing(self):
        engine = engine_of(random_model(SMALL), 3)
        model = engine.stages[0]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        handle = model.layers[1].feed_forward.w2.weight.register_hook(lambda g: g * math.inf)
        (loss, norm), _ = self.step(engine)
        assert math.isfinite(loss) and not math.isfinite(norm)
        handle.remove()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert all(p.grad is None for p in model.parameters())

    def test_mask_across_documents(self):
        batch = tokens(2, 21).clamp(min=2)
        batch[:, 8] = 1
        (loss, _), _ = self.step(engine_of(random_model(SMALL), 2, bos_id=1), batch=batch)
        model, x = random_model(SMALL), batch[:, :-1]
        documents = starts(0, 8, 20, 28, 40)
        assert loss == pytest.approx(model.loss(x, batch[:, 1:], documents).item(), rel=1e-5)
        assert loss != pytest.approx(model.loss(x, batch[:, 1:]).item(), rel=1e-5)


class TestEvaluate:
    @pytest.mark.parametrize("bos_id", [None, 50])
    def test_bits_per_byte(self, tmp_path, bos_id):
        sources = shards(tmp_path, [900])
        (np.arange(101) % 97).astype("<u2").tofile(tmp_path / "0.val.bin")
        batches, model = train.Batches(tmp_path, sources, 16, 64, 0), random_model(SMALL)
        loss, bpb = train.evaluate(engine_of(model, bos_id=bos_id), batches, 10**6)
        nll = 0
        for at in range(0, 100, 16):
            x = torch.arange(at, min(at + 17, 101)) % 97
            cut = [2] if at == 48 and bos_id else []  # token 50 begins a document
            each = model.nll(x[None, :-1], x[None, 1:], starts(0, *cut, len(x) - 1))
            nll += each.sum().item()
        assert loss == pytest.approx(nll / 100, rel=1e-5)
        assert bpb == pytest.approx(nll / math.log(2) / 300, rel=1e-5)  # 3 bytes a token


class Case(NamedTuple):
    layout: train.Layout
    config: LlamaConfig
    bos_id: int | None
    steps: int
    options: dict


def case(steps=20, bos_id=None, backward="manual", dtype=None, tied=False, n_layers=2,
         hidden_dim=36, **layout):
    config = LlamaConfig(32, n_layers, 8, 4, hidden_dim, 64, 16, tie_embeddings=tied)
    return Case(train.Layout(**layout), config, bos_id, steps,
                {"backward": backward, "dtype": dtype})


LAYOUTS = {
    "ddp 2": {"replicas": 2}, "fsdp 2": {"shards": 2}, "fsdp 4": {"shards": 4, "hidden_dim": 38},
    "tp 2": {"tp": 2}, "tp 4": {"tp": 4}, "fsdp 2 x tp 2": {"shards": 2, "tp": 2},
    "pp 2": {"pp": 2, "n_layers": 3}, "pp 2 x fsdp 2": {"pp": 2, "shards": 2, "n_layers": 3}}
CASES = {f"{name}, {kind}": case(**layout, **change) for name, layout in LAYOUTS.items()
         for kind, change in {"documents": {"bos_id": 12}, "tied": {"tied": True, "steps": 3}
                              }.items()} | {
    "hybrid 2 x 2": case(3, 12, replicas=2, shards=2),
    "ddp 2 x tp 2": case(3, 12, replicas=2, tp=2),
    "pp 2 x tp 2, tied": case(3, 12, pp=2, tp=2, tied=True),
    "pp 2 x 2 stages": case(3, 12, pp=2, interleave=2, n_layers=5),
    "pp 2 x 2 stages, tied": case(3, pp=2, interleave=2, n_layers=4, tied=True),
    "tp 2, autograd": case(2, 12, "autograd", tp=2),
    "tp 2, recompute": case(2, 12, "recompute", tp=2),
    "fsdp 2, bf16": case(3, 12, dtype=torch.bfloat16, shards=2),
    "tp 2, bf16": case(2, 12, dtype=torch.bfloat16, tp=2)}


def step_batch(step):
    """Tokens of a step, some at the edges of each rank's part of 64 words; rows that 2 and 4 ranks
    share evenly and not, and some with a rank that has none."""
    return 3 * tokens((8, 7, 5)[step % 3], 17, vocab=22, seed=step)


def held_out_batch():
    batch = step_batch(2)
    batch[4, 9:] = -1
    return batch


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


@torch.no_grad()
def grow(parameters):
    """Weights that make every part of a layer matter."""
    for p in parameters:
        llama.local(p).mul_(8 if p.dim() == 2 else 1)


def as_rank(layout, config, bos_id, steps, options):
    """What this process finds as one of a layout, in two micro-batches a step and more."""
    micro_batch = 4 // (layout.dp * layout.pp)
    engine = train.Engine(config, layout, "cpu", micro_batch, bos_id=bos_id, **options)
    named = engine.parameters
    found = {"initial": {name: whole(p.detach()) for name, p in named.items()}}
    grow(named.values())
    optimizer = train.make_optimizer(named, Recipe(3e-3, 1, 1, eps=1e-8))
    with Calls() as calls:
        engine.loss(step_batch(1))
    names = ("allreduce_", "_allgather_base_", "_reduce_scatter_base_", "broadcast_")
    calls = [f"{name} {tree_leaves(each)[0].dtype}".replace("torch.", "") for name in names
             for each in calls.args.get(f"{name}.default", ())]
    found["calls"] = {call: calls.count(call) for call in calls}
    engine.complete()
    found["gradients"] = {name: whole(p.grad) for name, p in named.items()}
    state = [x for values in optimizer.state.values() for x in values.values()]
    for name, held in {"weights": named.values(), "gradients": [p.grad for p in named.values()],
                       "AdamW": state}.items():
        found[f"bytes of {name}"] = sum(llama.local(x).nbytes for x in held)
    optimizer.zero_grad()
    found["steps"] = [train.train_step(engine, optimizer, step_batch(i), 3e-3, 1.0)[:2]
                      for i in range(steps)]
    with torch.no_grad():
        found["nll"], = engine.add_up(engine.loss(held_out_batch()))
    return found | {"place": engine.pp_rank, "rows": len(engine.rows(step_batch(0))),
                    "micro_batches": engine.layout.passes(len(step_batch(0)), engine.micro_batch)}


@functools.cache
def alone(config, bos_id, steps, dtype):
    """The same by torch's own loss, backward, clipping and AdamW in one process."""
    model = Llama.create(config, 0, backward="autograd", dtype=dtype)
    named = dict(model.named_parameters())
    found = {"initial": {name: whole(p.detach()) for name, p in named.items()}}
    grow(named.values())

    def loss(batch, reduction="mean"):
        x, y = batch[:, :-1].clamp(min=0), batch[:, 1:].flatten()
        begin = [at for at, token in enumerate(x.flatten()) if at % 16 == 0 or token == bos_id]
        logits = model(x, boundaries=starts(*begin, x.numel()) if bos_id else None)
        return F.cross_entropy(logits.flatten(0, 1), y, reduction=reduction, ignore_index=-1)

    loss(step_batch(1)).backward()
    found["gradients"] = {name: whole(p.grad) for name, p in named.items()}
    matrices, norms = ([p for p in named.values() if p.dim() == n] for n in (2, 1))
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": norms, "weight_decay": 0}],
                                  3e-3, (0.9, 0.95), weight_decay=0.1)
    found["steps"] = []
    for i in range(steps):
        optimizer.zero_grad()
        value = loss(step_batch(i))
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        found["steps"].append((value.item(), norm.item()))
    with torch.no_grad():
        return found | {"nll": loss(held_out_batch(), "sum").item()}


def exchanged():
    """What g and g_bar of two ranks make of 3 of 6 tokens each, in rows of 2, and of a gradient."""
    import torch.distributed as dist
    tp, found = llama.TensorParallel(dist.group.WORLD), {}
    for name, x in (("g", noise(3, 4, seed=tp.rank)), ("g_bar", noise(3, 2, 4, seed=tp.rank))):
        x = x.double().requires_grad_()
        y = getattr(tp, name)(x, 2)
        dy = noise(*y.shape, seed=2 + tp.rank, dtype=y.dtype)
        y.backward(dy)
        found[name] = [z.detach() for z in (x, y, dy, x.grad)]
    return found


def run_rank(rank, size, folder):
    """All that one of `size` processes has to find out, each case in a file."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/{size}", rank=rank,
                                         world_size=size)
    for name, of_case in CASES.items():
        if of_case.layout.size == size:
            torch.save(as_rank(*of_case), f"{folder}/{name} {rank}")
    if size == 2:
        torch.save(exchanged(), f"{folder}/exchanged {rank}")
    torch.distributed.destroy_process_group()


def run_worlds(folder):
    for size in (2, 4):
        torch.multiprocessing.start_processes(run_rank, (size, folder), size, start_method="fork")


@pytest.fixture(scope="module")
def found_by(tmp_path_factory):
    """name of a case -> what each rank found. Two and four processes run all cases; they are forks
    of a fresh one, where no threads are yet."""
    folder = tmp_path_factory.mktemp("ranks")
    code = f"import test_llama; test_llama.run_worlds({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr

    @functools.cache
    def read(name):
        paths = sorted(folder.glob(f"{name} ?"))
        assert paths
        return [torch.load(path) for path in paths]
    return read


@pytest.fixture(params=CASES)
def compared(request, found_by):
    """A case, what its ranks found, and what one process did."""
    case = CASES[request.param]
    oracle = alone(case.config, case.bos_id, case.steps, case.options["dtype"])
    return case, found_by(request.param), oracle


class TestLayouts:
    """The same training by one process and by many."""

    def test_initial_weights_are_those_of_one_process_bit_for_bit(self, compared):
        _, ranks, oracle = compared
        for rank in ranks:
            for name, p in rank["initial"].items():
                assert torch.equal(p, oracle["initial"][name]), name
        assert set().union(*(rank["initial"] for rank in ranks)) == set(oracle["initial"])

    def test_gradients(self, compared):
        case, ranks, oracle = compared
        within = 0.03 if case.options["dtype"] else 1e-5
        for rank in ranks:
            for name, grad in rank["gradients"].items():
                wanted = oracle["gradients"][name]
                assert (grad - wanted).abs().max() <= within * wanted.abs().max(), name

    def test_losses_and_norms_of_all_steps(self, compared):
        case, ranks, oracle = compared
        within = (2e-3, 0.03) if case.options["dtype"] else (1e-5, 1e-4)
        for rank in ranks:
            for (loss, norm), wanted in zip(rank["steps"], oracle["steps"], strict=True):
                assert loss == pytest.approx(wanted[0], rel=within[0])
                assert norm == pytest.approx(wanted[1], rel=within[1])
            assert rank["nll"] == pytest.approx(oracle["nll"], rel=within[0])
        learnt = oracle["steps"][0][0] - oracle["steps"][-1][0]
        assert case.steps < 20 or learnt > 0.5

    def test_the_plan_is_true(self, compared):
        case, ranks, _ = compared
        dtype = case.options["dtype"] or torch.float32
        for place in range(case.layout.pp):
            planned = train.memory_needed(
                case.config, 1, 16, dtype, "fused", case.options["backward"], case.layout,
                ranks[0]["micro_batches"], place)
            there = [rank for rank in ranks if rank["place"] == place]
            for what in ("weights", "gradients", "AdamW"):
                assert max(rank[f"bytes of {what}"] for rank in there) == planned[what]

    def test_work_is_split(self, compared):
        case, ranks, _ = compared
        layout = case.layout
        assert all(rank["rows"] == 8 // layout.dp for rank in ranks)
        assert all(rank["micro_batches"] >= 2 for rank in ranks)
        held = sum(rank["bytes of weights"] for rank in ranks) / 4
        norms, tables = case.config.dim * (2 * case.config.n_layers + 1), 64 * 32
        copies = layout.replicas * (layout.tp - 1) * norms  # norms are whole on each
        if layout.pp > 1 and case.config.tie_embeddings:
            copies += layout.replicas * tables  # on the first and on the last stage
        assert held == layout.replicas * case.config.n_params + copies

    def test_a_quarter_of_the_state_on_each_of_four(self, found_by):
        whole = 16 * CASES["fsdp 4, documents"].config.n_params
        for rank in found_by("fsdp 4, documents"):
            held = sum(rank[f"bytes of {what}"] for what in ("weights", "gradients", "AdamW"))
            assert held == pytest.approx(whole / 4, rel=0.1)

    @pytest.mark.parametrize("name, sums, gathers, reductions", [
        # by 2 layers and the root, of 2 micro-batches; the root's weights stay for the backward
        ("ddp 2, documents", 3, 0, 0),  # once a step
        ("fsdp 2, documents", 0, 2 * (2 * 2 + 1), 2 * 3),
        ("fsdp 2, bf16", 0, 2 * (2 * 2 + 1), 2 * 3),
        ("hybrid 2 x 2", 3, 2 * (2 * 2 + 1), 2 * 3),  # between the replicas once a step
        # of 2 layers g and g_bar, forward and backward, h and h again; embedding and loss
        ("tp 2, documents", 0, 2 * (2 * 6 + 3), 2 * (2 * 4 + 2)),
        ("pp 2, documents", 0, 0, 0)])
    def test_collectives_of_a_step(self, name, sums, gathers, reductions, found_by):
        half = "bf16" in name  # in which weights travel, not gradients
        wanted = {"allreduce_ float32": sums, "_reduce_scatter_base_ float32": reductions,
                  f"_allgather_base_ {'bfloat16' if half else 'float32'}": gathers}
        for rank in found_by(name):
            assert rank["calls"] == {call: n for call, n in wanted.items() if n}


class TestTensorParallel:
    def test_g_and_g_bar_are_each_others_backward(self, found_by):
        ranks = found_by("exchanged")
        for name in ("g", "g_bar"):
            x, y, dy, dx = (torch.stack(each) for each in zip(*(rank[name] for rank in ranks)))
            parts, wholes, gathered, summed = (x, dy, y, dx) if name == "g" else (dy, x, dx, y)
            for rank in range(2):  # all tokens on each rank; of its own, the sum of all ranks'
                close(gathered[rank], parts.view(3, 2, 4), atol=0)
                close(summed[rank], wholes.sum(0).view(2, 3, 4)[rank], atol=1e-12)
            close((x * dx).sum(), (y * dy).sum(), atol=1e-12)

    def test_backward_multiplies_while_others_send(self):
        """The order of LayerByHand's table: "z<" asks for z, "z>" waits for it, a dot is a product
        with a weight, and Wo that for the gradient of Wo."""
        order, names = [], iter("n H m y dy m dm dh n dn".split())

        class Order(TorchDispatchMode):
            def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
                made = operation(*args, **(kwargs or {}))
                if operation is torch.ops.aten.mm.default:
                    order.append(weights.get(tuple(made.shape), "."))
                return made

        class Noted(llama.Alone):
            def gather(self, x, T):
                name = next(names)
                order.append(f"{name}<")
                return lambda: order.append(f"{name}>") or x

            scatter_sum = gather

        layer, x = random_model(SMALL).layers[0], noise(1, 7, 48).requires_grad_()
        weights = {tuple(p.shape): name.split(".")[-2] for name, p in layer.named_parameters()}
        forward, backward = llama.ATTENTION["fused"]
        attend = partial(forward, positions=torch.arange(7))
        with Order():
            y = layer(x, *llama.rope_table(SMALL, torch.arange(7)), attend, backward, Noted())
            del order[:]
            y.sum().backward()
        assert " ".join(order) == (
            "dy< m< dy> . . . dm< w2 m> w3 w3 dm> dh< n< dh> . . . . dn< wo n> wo wv wv dn>")


class TestArrange:
    CONFIG = LlamaConfig(32, 4, 8, 4, 36, 64, 32)

    def arrange(self, options, size, near, **change):
        args = train.parser().parse_args(
            ["--batch-tokens", "256", "--seq-len", "32", *options.split()])  # 8 rows
        world = train.World(0, size, 0, near or size)
        return train.arrange(args, replace(self.CONFIG, **change), world)

    @pytest.mark.parametrize("options, size, near, layout", [
        ("", 1, 1, {}), ("--dp none", 1, 1, {}), ("", 4, 4, {"shards": 4}),
        ("", 8, 2, {"shards": 8}), ("--dp ddp", 4, 2, {"replicas": 4}),
        ("--tp 2", 4, 4, {"tp": 2, "shards": 2}), ("--tp 4 --dp none", 4, 4, {"tp": 4}),
        ("--pp 2 --dp ddp", 4, 4, {"pp": 2, "replicas": 2}),
        ("--pp 2 --tp 2 --dp fsdp", 8, 8, {"pp": 2, "tp": 2, "shards": 2}),
        ("--pp 2 --interleave 2", 4, 4, {"pp": 2, "interleave": 2, "shards": 2}),
        ("--pp 4", 4, 4, {"pp": 4}), ("--tp 4", 32, 8, {"tp": 4, "shards": 8}),
        ("--dp hybrid", 8, 4, {"replicas": 2, "shards": 4}),  # the state within a machine
        ("--dp hybrid --tp 2", 8, 4, {"replicas": 2, "shards": 2, "tp": 2}),
        ("--dp hybrid", 6, 4, {"replicas": 3, "shards": 2})])
    def test_possible(self, options, size, near, layout):
        assert self.arrange(options, size, near) == train.Layout(**layout)

    def test_hybrid_wants_ranks_of_one_machine(self):
        with pytest.raises(ValueError, match="over the 2 processes .* takes 4; try --dp fsdp"):
            self.arrange("--dp hybrid --tp 4", 8, 2)

    @pytest.mark.parametrize("options, size, change, message", [
        ("--tp 3", 3, {}, "--tp 3 does not divide n_kv_heads=4; try --tp with one of 1, 2, 4"),
        ("--tp 4", 4, {"hidden_dim": 38}, "--tp 4 .* hidden_dim=38; try --tp with one of 1, 2$"),
        ("--tp 4", 4, {"vocab_size": 61}, "--tp 4 .* vocab_size=61; try --tp with one of 1$"),
        ("--tp 4 --seq-len 30", 4, {}, "--tp 4 .* seq_len=30; try --tp with one of 1, 2$"),
        ("--pp 5", 5, {}, "--pp 5 .*: 4 layers .*; try --interleave 1 with --pp up to 4"),
        ("--interleave 2", 4, {}, "--interleave 2: .*; try --interleave 1 with --pp up to 4"),
        ("--pp 2 --interleave 3", 2, {}, "4 layers .*; try --pp 2 with --interleave up to 2"),
        ("--tp 4", 6, {}, "6 processes .* --tp 4 x --pp 1; try .* product is one of 1, 2, 3, 6"),
        ("--tp 2 --pp 4", 4, {}, "4 processes .* --tp 2 x --pp 4; try .* is one of 1, 2, 4"),
        ("", 9, {}, "9 data-parallel ranks .* 8 sequences of a step; try at most 8 processes, or"),
        ("--tp 2 --dp ddp", 18, {}, "9 data-parallel .*; try at most 16 processes, or a larger"),
        ("--dp none --tp 2", 4, {}, "--dp none .* 2 x 2 .*--dp ddp or --dp fsdp, or 2 processes")])
    def test_impossible(self, options, size, change, message):
        with pytest.raises(ValueError, match=message) as error:
            self.arrange(options, size, size, **change)
        assert "\n" not in str(error.value)


class TestCost:
    def test_flops(self):
        config = SIZES["65b"][0]
        matrices = 65285660672 - 32000 * 8192
        assert train.flops_per_token(config, 2048) == 6 * matrices + 6 * 80 * 8192 * 2048
        tied = SIZES["stories15m"][0]
        assert train.flops_per_token(tied, 256) == 6 * 15191712 + 6 * 6 * 288 * 256

    @pytest.mark.parametrize("backward, attention", [
        ("manual", "fused"), ("manual", "tiled"), ("autograd", "fused"), ("autograd", "equation")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_memory_counts_what_is_saved(self, dtype, backward, attention):
        config = replace(SMALL, n_layers=2)
        model = random_model(config, dtype=dtype, attention=attention, backward=backward)
        inside, layers = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def walk(layer, inputs, output):
            """What the nodes of the graph between output and input hold."""
            inside.update(table.untyped_storage().data_ptr() for table in inputs[1:3])
            nodes, done = [output.grad_fn], {None, inputs[0].grad_fn}
            while nodes:
                node = nodes.pop()
                if node in done:
                    continue
                done.add(node)
                nodes += [following for following, _ in node.next_functions]
                held = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
                for x in tree_leaves([*held, getattr(node, "saved_tensors", ())]):
                    if isinstance(x, torch.Tensor):
                        layers[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        model.layers[0].register_forward_hook(walk)
        model.hidden(tokens(3, 32))
        real = sum(size for at, size in layers.items() if at not in inside)
        found = train.memory_needed(config, 3, 32, dtype, attention, backward)
        assert found["activations"] == pytest.approx(2 * real, rel=0.03)
        held = found["weights"] + found["gradients"] + found["AdamW"]
        assert held == 16 * config.n_params + 4 * 21  # a count of steps for each parameter
        if backward == "autograd":
            again = train.memory_needed(config, 3, 32, dtype, attention, "recompute")
            inputs = 2 * 3 * 32 * 48 * dtype.itemsize
            assert again["activations"] == inputs + found["activations"] // 2

    @pytest.mark.parametrize("there, options, advice", [
        (25e9, ["--size", "7b"],
         "7b needs about 115 GB .*has 25 GB free for it; try --size llama3.2-1b"),
        (25e9, ["--size", "llama3.1-405b"], "405b needs about .*; try --size"),
        (2e8, ["--set", "max_seq_len=65536", "--batch-tokens", "65536"], "try .*--seq-len 32768")])
    def test_what_does_not_fit_is_said_at_once(self, there, options, advice, monkeypatch):
        assert train.memory_there("cpu") > 1e8
        monkeypatch.setattr(train, "memory_there", lambda device: int(there))
        with pytest.raises(ValueError, match=advice):
            train.main(options)

    def test_fewer_sequences_at_once_where_more_do_not_fit(self, monkeypatch):
        args = train.parser().parse_args(["--size", "stories15m", "--seq-len", "256"])
        monkeypatch.setattr(train, "memory_there", lambda device: int(6e8))
        config, _ = train.resolve(args, "cpu")
        rows, roomy = train.fit_memory(args, config, "cpu", train.Layout(), train.World())
        assert rows in (1, 2, 4, 8, 16) and not roomy

    def test_matmul_rate(self):
        assert 1e8 < train.matmul_flops("cpu", torch.float32) < 1e15
        assert train.matmul_flops("mps", torch.float32) is None

    def test_bench(self, capsys):
        train.main(["--set", "n_layers=1", "vocab_size=300", "--bench", "2",
                    "--batch-tokens", "512"])
        row = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert set(row) == {"tokens_per_s", "mfu", "peak_gflops", "step_s", "peak_rss_gb", "loss",
                            "params", "backward", "dtype", "world", "layout"}
        assert row["loss"] == pytest.approx(math.log(300), rel=0.05)
        assert row["tokens_per_s"] == pytest.approx(512 / row["step_s"])
        config = replace(SIZES["tiny"][0], n_layers=1, vocab_size=300)
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * train.flops_per_token(config, 256)
                                           / row["peak_gflops"] / 1e9)


def tensors_of(model):
    parameters = dict(model.named_parameters())
    optimizer = train.make_optimizer(parameters, Recipe(0.1, 1, 1, eps=1e-8))
    return train.state_tensors(parameters, optimizer)


def planned(capsys, *options):
    train.main(["--plan", "--json", *map(str, options)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


class TestPlan:
    @pytest.mark.parametrize("gpu_hours, watts, mwh, tons, within", [
        (809472, 400, 356, 137, 0.005), (1082880, 400, 475, 183, 0.005),  # OPT, BLOOM: Table 15
        (82432, 400, 36, 14, 0.005), (135168, 400, 59, 23, 0.005),
        (530432, 400, 233, 90, 0.005), (1022362, 400, 449, 173, 0.005),
        (184320, 400, None, 31.22, 0.005), (368640, 400, None, 62.44, 0.005),  # Llama 2
        (1038336, 350, None, 153.90, 0.005), (1720320, 400, None, 291.42, 0.005),
        (1.3e6, 700, None, 390, 0.035), (6.4e6, 700, None, 1900, 0.035),  # Llama 3 to 3.2
        (1.46e6, 700, None, 420, 0.035), (7.0e6, 700, None, 2040, 0.035),
        (30.84e6, 700, None, 8930, 0.035), (370e3, 700, None, 107, 0.035),
        (460e3, 700, None, 133, 0.035)])
    def test_energy_and_carbon_of_the_papers(self, gpu_hours, watts, mwh, tons, within):
        found = train.energy(gpu_hours, watts)
        unit = 1 if mwh else 0  # Table 15 is cut to whole numbers
        assert found[1] == pytest.approx(tons, rel=within, abs=unit)
        assert mwh is None or found[0] == pytest.approx(mwh, rel=within, abs=unit)

    def test_65b_takes_21_days(self, capsys):
        """At the paper's 380 tokens/s on each of 2,048 A100: 49.7 % of their FLOP/s."""
        mfu = 380 * train.flops_per_token(SIZES["65b"][0], 2048) / 312e12
        found = planned(capsys, "--size", "65b", "--gpus", 2048, "--gpu", "A100", "--mfu", mfu)
        assert found["tokens_per_s"] == pytest.approx(380 * 2048)
        assert found["days"] == pytest.approx(20.8, abs=0.05)
        assert found["mfu_as_papers"] == pytest.approx(0.497, abs=5e-4)
        assert found["gpu_hours"] == pytest.approx(1022362, rel=0.005)
        assert found["tco2eq"] == pytest.approx(173, rel=0.005)

    def test_the_peak_of_many_layers_from_few(self):
        """What is traced with few layers and drawn out is what all of them need, traced."""
        config, options = replace(SIZES["65b"][0], n_layers=10), {"dtype": torch.bfloat16}
        for layout in (train.Layout(shards=64), train.Layout(pp=2, shards=4)):
            whole = train.simulate(config, layout, 0, 1, 2 * layout.size, 512,
                                   Recipe(1.0, 1, 1, eps=1.0), **options)["peak"]
            drawn_out = train.peak_bytes(config, layout, 1, 2 * layout.pp, 512, **options)
            assert drawn_out - train.KERNELS == pytest.approx(whole, rel=0.02)

    @pytest.mark.parametrize("fixed", [[], ["--tp", 8, "--pp", 16, "--dp", "fsdp"]])
    def test_405b_as_it_was_trained(self, fixed, capsys):
        found = planned(capsys, "--size", "llama3.1-405b", "--gpus", 16384, "--seq-len", 8192,
                        *fixed)
        assert {"replicas": 1, "shards": 128, "tp": 8, "pp": 16}.items() <= found["layout"].items()
        assert sum(found["memory"]["manual"].values()) < 72e9
        assert found["bubble"] == 15 / 16 / found["interleave"]
        config = SIZES["llama3.1-405b"][0]
        assert [train.stage_layers(config, s, 16) for s in range(16)] == [7, *[8] * 14, 7]

    @pytest.mark.parametrize("tied", [False, True])
    def test_rank_params_are_those_of_torch(self, tied):
        """Uneven shards: 48, 24, 100 and 97 rows over 7 ranks."""
        import torch.distributed as dist
        from torch.distributed.fsdp import fully_shard
        from torch.testing._internal.distributed.fake_pg import FakeStore
        config = replace(SMALL, tie_embeddings=tied)
        dist.init_process_group("fake", rank=0, world_size=7, store=FakeStore())
        try:
            with torch.device("meta"):
                model = Llama(config)
            mesh = dist.init_device_mesh("cpu", (7,))
            for part in (*model.layers, model):
                fully_shard(part, mesh=mesh)
            real = sum(p.to_local().numel() for p in model.parameters())
        finally:
            dist.destroy_process_group()
        layout = train.Layout(shards=7)
        assert train.rank_params(config, layout) == real > config.n_params / 7
        memory = train.memory_needed(config, 1, 8, torch.float32, "fused", "manual", layout)
        assert memory["weights"] == memory["gradients"] == 4 * real
        assert memory["AdamW"] == 8 * real + 4 * len(list(model.parameters()))

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("pp, interleave", [(1, 1), (2, 1), (3, 1), (3, 2), (7, 1)])
    def test_every_parameter_has_its_ranks(self, pp, interleave, tied):
        config = replace(SMALL, n_layers=7, tie_embeddings=tied, vocab_size=96)
        for tp in (1, 2):
            layout = train.Layout(1, 1, pp, tp, interleave)
            held = tp * sum(train.rank_params(config, layout, place) for place in range(pp))
            norms = (tp - 1) * 15 * 48  # whole on each tensor parallel rank
            assert held == config.n_params + norms + tied * (pp > 1) * 96 * 48

    @pytest.mark.parametrize("p, v, m", [(2, 2, 4), (4, 2, 8), (4, 3, 4), (3, 5, 9)])
    def test_in_flight_is_that_of_torch(self, p, v, m):
        from torch.distributed.pipelining import schedules
        for rank in range(p):
            warmup = schedules._get_warmup_ops(rank, v, p, p, m, multiply_factor=2)
            ops = schedules._get_1f1b_rank_ops(
                v, p, warmup, v * m - warmup, warmup, rank,
                lambda step: step // p % v * p + rank,
                lambda step: (v - 1 - (step - warmup) // p % v) * p + rank)
            kept = np.cumsum([1 if op.computation_type.name == "FORWARD" else -1
                              for op in ops if op])
            assert train.Layout(pp=p, interleave=v).in_flight(m, rank) == max(kept)
            assert train.Layout(pp=p).in_flight(m, rank) == p - rank

    def test_memory_falls_as_the_work_is_split(self):
        config = replace(SMALL, n_layers=8, n_heads=8, n_kv_heads=8, dim=64, hidden_dim=128,
                         vocab_size=512)
        for backward in llama.BACKWARD:
            need = partial(train.memory_needed, config, 2, 32, torch.bfloat16, "fused", backward)
            one = need()
            ddp, fsdp, hybrid = (need(train.Layout(replicas, 8 // replicas))
                                 for replicas in (8, 1, 4))
            assert ddp["weights"] == one["weights"] == 2 * hybrid["weights"] == 8 * fsdp["weights"]
            assert fsdp["activations"] == ddp["activations"] <= one["activations"]
            tp = need(train.Layout(tp=4))
            times = 4 * tp["activations"] / one["activations"]
            assert times == 1 if backward == "manual" else 1 < times < 2  # gathered inputs, whole
            first, last = (need(train.Layout(pp=4), 8, place) for place in (0, 3))
            if backward == "manual":  # a quarter of the layers, of four micro-batches or one
                assert first["activations"] == one["activations"] == 4 * last["activations"]
            assert first["logits"] == 0 < last["logits"] == one["logits"]

    def test_bytes_on_the_wire(self):
        config, wire = SIZES["7b"][0], partial(train.wire_bytes, SIZES["7b"][0], 4, 2048,
                                                torch.bfloat16)
        P, root, x = config.n_params, (2 * 32000 + 1) * 4096, 4 * 2048 * 4096 * 2
        nothing = {"replicas": 0, "shards": 0, "pp": 0, "tp": 0}
        assert wire("manual", train.Layout(), 3, 0) == nothing
        ddp = wire("manual", train.Layout(8), 3, 0)  # one all-reduce, in fp32
        assert ddp == {**nothing, "replicas": 2 * 4 * P * 7 // 8}
        fsdp = wire("manual", train.Layout(1, 8), 3, 0)["shards"]
        assert fsdp == 3 * (2 * P + 2 * (P - root) + 4 * P) * 7 // 8
        hybrid = wire("manual", train.Layout(2, 8), 3, 0)
        assert hybrid == {**nothing, "shards": fsdp, "replicas": 2 * 4 * P // 8 // 2}
        once = wire("manual", train.Layout(1, 8, pp=2), 3, 1)["shards"]
        assert once == 6 * train.rank_params(config, train.Layout(pp=2), 1) * 7 // 8
        for backward, exchanges in (("manual", 10), ("autograd", 8), ("recompute", 12)):
            tensor = wire(backward, train.Layout(tp=8), 3, 0)
            assert tensor == {**nothing, "tp": 3 * (32 * exchanges + 4) * x * 7 // 8}
        crossings = [wire("manual", train.Layout(tp=2, pp=4, interleave=2), 8, place)["pp"]
                     for place in range(4)]
        assert crossings == [8 * n * x // 2 for n in (3, 4, 4, 3)]

    def test_rings_use_the_cards_of_all_their_ranks(self):
        gpu = train.GPUS["H100"]
        assert train.bandwidth(gpu, 8, 1) == train.bandwidth(gpu, 2, 4) == gpu.inside
        assert train.bandwidth(gpu, 128, 8) == train.bandwidth(gpu, 2, 64) == gpu.between
        assert train.bandwidth(gpu, 16, 2) == 4 * gpu.between
        assert train.bandwidth(gpu, 16, 1) == 8 * gpu.between < gpu.inside

    @pytest.mark.parametrize("options, layout", [
        (["--size", "stories110m"], {"replicas": 8, "shards": 1}),  # the simplest that is as fast
        (["--size", "7b"], {"replicas": 1, "shards": 8}),
        (["--size", "7b", "--dp", "ddp"], {"shards": 1}),
        (["--size", "7b", "--tp", "2", "--gpus", "16", "--dp", "hybrid"],
         {"replicas": 2, "shards": 4}),
        (["--size", "7b", "--pp", "4", "--interleave", "4"], {"pp": 4, "interleave": 4})])
    def test_search(self, options, layout, capsys):
        found = planned(capsys, *options)
        assert layout.items() <= found["layout"].items()
        assert set(found["why"]) == {"tp", "pp", "dp", "micro_batch", "interleave"}
        sizes = found["layout"]
        dp = sizes["replicas"] * sizes["shards"]
        assert dp * sizes["tp"] * sizes["pp"] == found["gpus"]
        rows = found["micro_batch"] * found["micro_batches"] * dp
        assert rows * SIZES[found["size"]][0].max_seq_len == found["tokens"] // found["steps"]
        assert 0.3 < found["mfu"] < 0.5

    def test_rows_that_do_not_divide_are_filled_up(self, capsys):
        uneven, even = (planned(capsys, "--size", "7b", "--micro-batch", n, "--pp", 2, "--gpus", 8)
                        for n in (3, 4))
        assert uneven["micro_batches"] == 172 and even["micro_batches"] == 128  # 2048 / 4 rows
        assert uneven["mfu"] < even["mfu"]

    def test_cpu(self, capsys):
        found = planned(capsys, "--gpu", "cpu", "--gpus", 2, "--steps", 50)
        assert found["flops_per_token"] == train.flops_per_token(SIZES["tiny"][0], 256)
        assert found["steps"] == 50 and found["tokens"] == 50 * 2048 and 0 < found["days"] < 1

    def test_text(self, capsys):
        train.main(["--plan", "--size", "7b"])
        text = capsys.readouterr().out.splitlines()
        assert len(text) <= 30 and max(map(len, text)) <= 100
        assert any(re.fullmatch(r"  weights +3.37 +3.37 +3.37", line) for line in text)
        assert "\n".join(text) in (HERE / "README.md").read_text()

    @pytest.mark.parametrize("options, message", [
        ("--tp 3", "--tp 3 does not divide n_kv_heads=32; try --tp with one of 1, 2, 4, 8"),
        ("--tp 3 --gpus 24", "--tp 3 .*; try --tp with one of 1, 2, 4, 8"),
        ("--tp 4 --pp 4", "8 processes .*; try --tp and --pp whose product is one of 1, 2, 4, 8"),
        ("--pp 64 --gpus 64", "--pp 64 .* try --interleave 1 with --pp up to 32"),
        ("--pp 2 --interleave 17", "--interleave 17.*try --pp 2 with --interleave up to 16"),
        ("--tp 2 --pp 2 --dp none", "--dp none .*; try --dp ddp or --dp fsdp"),
        ("--gpus 4099", "4099 .* cannot share the 2048 sequences of a step; try at most 2048 "),
        ("--gpus 1", "7b needs .* GB on each of 1 devices, which have 72 .*; try --gpus 2"),
        ("--dtype fp32", "try --dtype bf16"), ("--gpu K80", "invalid choice: 'K80'")])
    def test_mistakes(self, options, message):
        with pytest.raises(ValueError, match=message):
            train.main(["--plan", "--size", "7b", *options.split()])
class TestTrace:
    """Hand-counted allocations and collectives; then a real process against its plan."""

    def test_live_bytes_and_their_peak(self):
        with FakeTensorMode(), train.Trace() as trace:
            a = torch.zeros(1000)          # 4000 bytes
            b = torch.zeros(500)           # 6000
            assert trace.live == 6000
            b = a.double()                 # the 8000 are there before the 2000 go
            assert (trace.live, trace.peak) == (12000, 14000)
            view = a[10:20].view(2, 5)     # nothing new, and it keeps all of a
            del a
            assert trace.live == 12000
            del view, b
        assert (trace.live, trace.peak) == (0, 14000)

    def test_a_storage_that_is_resized(self):
        with FakeTensorMode(), train.Trace() as trace:
            x = torch.zeros(1000)
            x.untyped_storage().resize_(0)
            assert trace.live == 0
            x.untyped_storage().resize_(8000)
            assert trace.live == 8000
            x.add_(1)
            del x
        assert (trace.live, trace.peak) == (0, 8000)
        assert torch.zeros(5).untyped_storage().resize_(8).nbytes() == 8  # torch's own again

    LAYER = 4 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64)  # bytes of a layer's weights in fp32
    ENDS = 4 * (2 * 64 * 512 + 64)                     # of embedding, output and last norm

    def simulate(self, rank=0, backward="manual", T=16, rows=32, micro=2, **layout):
        config = LlamaConfig(64, 4, 4, 4, 128, 512, 64)
        return train.simulate(config, train.Layout(**layout), rank, micro, rows, T,
                              Recipe(1e-3, 1, None, 10, eps=1e-8), backward=backward,
                              dtype=torch.float32)

    def test_collectives_of_a_world_that_does_not_exist(self):
        """FSDP over 16: a layer is gathered for forward and again for backward, the ends once."""
        found = self.simulate(rank=5, shards=16)
        assert found["collectives"] == {
            ("_allgather_base_", 16, self.LAYER): 8, ("_allgather_base_", 16, self.ENDS): 1,
            ("_reduce_scatter_base_", 16, self.LAYER): 4,
            ("_reduce_scatter_base_", 16, self.ENDS): 1, ("allreduce_", 16, 24): 1}
        weights = (4 * self.LAYER + self.ENDS) // 16
        assert sum(4 * math.prod(s) for s in found["shards"].values()) == weights
        assert weights * 3 <= found["state"] < weights * 3 + 400  # AdamW's counters

    def test_tensor_and_pipeline_parallel(self):
        found = self.simulate(rank=0, tp=2, pp=2, T=16, rows=8, micro=2)
        assert {name.split(".")[1] for name in found["shards"] if "layers" in name} == {"0", "1"}
        assert found["shards"]["layers.0.attention.wq.weight"] == (32, 64)
        assert found["shards"]["layers.0.attention.wo.weight"] == (64, 32)
        activation = 2 * 16 * 64 * 4 // 2  # of 2 rows, split over tp: sent on for each of 4 parts
        assert found["collectives"]["send", 2, activation] == 4
        assert found["collectives"]["recv_", 2, activation] == 4

    def test_nothing_of_it_is_left(self):
        assert self.simulate(shards=2) == self.simulate(shards=2)
        assert not torch.distributed.is_initialized()

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_the_plan_is_true(self):
        """The peak of a real process beyond its start, in real steps, where malloc gives back."""
        code = """if True:
            import re
            from train import *
            keep_freed_memory(False)
            torch.set_num_threads(2)
            status = Path("/proc/self/status")
            def kb(name):
                return int(re.search(name + r":\\s+(\\d+)", status.read_text())[1])
            config, layout = LlamaConfig(512, 3, 8, 8, 1376, 8000, 256), Layout()
            start, options = kb("VmRSS"), {"dtype": torch.bfloat16}
            engine = Engine(config, layout, "cpu", 8, **options)
            optimizer = make_optimizer(engine.parameters, Recipe(1e-4, 1, 1, eps=1e-8))
            train_step(engine, optimizer, torch.randint(8000, (16, 257)), 1e-4, 1.0)
            real = 1024 * (kb("VmHWM") - start)
            print(real, peak_bytes(config, layout, 8, 2, 256, **options))"""
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True,
                              text=True)
        real, planned = map(int, done.stdout.split())
        assert real == pytest.approx(planned, rel=0.1)


class TestState:
    @pytest.fixture
    def states(self, tmp_path):
        tensors = tensors_of(random_model(SMALL))
        states = train.States(tmp_path)
        for step in (1, 2, 3):
            tensors["model.norm.weight"].fill_(step)
            states.save(step, tensors, {"skipped": step})
        states.wait()
        return tmp_path, tensors

    def test_there_and_back_keeps_two(self, states):
        folder, tensors = states
        assert sorted(f.name for f in folder.iterdir()) == ["step-000000002", "step-000000003"]
        wanted = {name: t.clone() for name, t in tensors.items()}
        for t in tensors.values():
            t.fill_(-1)
        assert train.States(folder).load(tensors) == {"step": 3, "skipped": 3}
        assert all(torch.equal(t, wanted[name]) for name, t in tensors.items())
        kinds = {name.split(".")[0] for name in tensors}
        assert kinds == {"model", "exp_avg", "exp_avg_sq", "step"}
        assert train.States(folder / "none").load(tensors) is None

    @pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "facts.json", "manifest.json"])
    def test_damaged_is_named_and_passed_over(self, states, name, capsys):
        folder, tensors = states
        file = folder / "step-000000003" / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1  # one bit
        file.write_bytes(data)
        assert train.States(folder).load(tensors)["step"] == 2
        assert torch.all(tensors["model.norm.weight"] == 2)
        said = capsys.readouterr().err
        assert "step-000000003 is damaged" in said and said.count("\n") == 1
        shutil.rmtree(folder / "step-000000002")
        with pytest.raises(ValueError, match="no state in .* is good; try --fresh"):
            train.States(folder).load(tensors)

    def hostile(self, state, data):
        """Replaces the metadata and all hashes, as someone who means it would."""
        if data is not None:
            (state / ".metadata").write_bytes(data)
        (state / "manifest.json").unlink()
        manifest = {file.name: train.sha256(file) for file in state.iterdir()}
        (state / "manifest.json").write_text(json.dumps(manifest))

    @pytest.mark.parametrize("facts", ["{}", "[]", '{"step": "x"}', '{"step": -5, "skipped": 0}',
                                       '{"step": 3}', "nonsense"])
    def test_hostile_facts(self, states, facts, capsys):
        folder, tensors = states
        (folder / "step-000000003" / "facts.json").write_text(facts)
        self.hostile(folder / "step-000000003", None)
        assert train.States(folder).load(tensors)["step"] == 2
        assert "is damaged and passed over" in capsys.readouterr().err

    def test_hostile_metadata_is_not_executed(self, states, capsys, tmp_path):
        folder, tensors = states
        mark = tmp_path.parent / "executed"

        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(mark),)
        self.hostile(folder / "step-000000003", pickle.dumps(Bomb()))
        assert train.States(folder).load(tensors)["step"] == 2 and not mark.exists()
        assert "mkdir" in capsys.readouterr().err

    def test_entries_that_are_not_tensors_are_refused(self, states, capsys):
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata
        folder, tensors = states
        state = folder / "step-000000003"
        metadata = train.SafeReader(state).read_metadata()
        metadata.state_dict_metadata["model.norm.weight"] = BytesStorageMetadata()
        self.hostile(state, pickle.dumps(metadata))
        assert train.States(folder).load(tensors)["step"] == 2
        assert "BytesStorageMetadata" in capsys.readouterr().err

    def test_a_full_disk_keeps_the_older_states(self, states):
        import resource
        folder, tensors = states
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            with pytest.raises(OSError, match="state of step 4 could not be written.*try"):
                failing = train.States(folder)
                failing.save(4, tensors, {})
                failing.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, old)
        assert sorted(f.name for f in folder.iterdir()) == ["step-000000002", "step-000000003"]
        assert train.States(folder).load(tensors)["step"] == 3


    @pytest.mark.parametrize("free", [0, 2**60])
    def test_a_save_is_of_its_moment(self, tmp_path, monkeypatch, free):
        monkeypatch.setattr(train, "memory_there", lambda device: free)
        states, tensors, release = train.States(tmp_path), {"x": torch.ones(3)}, threading.Event()
        write = train.Writer.write_data

        def slow(*args):
            assert release.wait(60)
            return write(*args)
        monkeypatch.setattr(train.Writer, "write_data", slow)
        if free == 0:  # no room for a copy: there must be nobody who changes it before it is saved
            release.set()
        states.save(1, tensors, {"skipped": 0})
        assert (tmp_path / "step-000000001").exists() == (free == 0)
        tensors["x"].fill_(2)
        wanted = torch.get_rng_state()
        release.set()
        states.save(2, tensors, {"skipped": 0})  # which waits for the first
        assert (tmp_path / "step-000000001").exists()
        states.wait()
        torch.rand(3)
        assert states.load(tensors)["step"] == 2 and torch.all(tensors["x"] == 2)
        assert torch.equal(torch.get_rng_state(), wanted)
        shutil.rmtree(tmp_path / "step-000000002")
        assert states.load(tensors)["step"] == 1 and torch.all(tensors["x"] == 1)

    def test_ctrl_c_is_no_damage(self, states, monkeypatch):
        folder, tensors = states

        def pressed(path):
            raise KeyboardInterrupt
        monkeypatch.setattr(train, "sha256", pressed)
        with pytest.raises(KeyboardInterrupt):
            train.States(folder).load(tensors)

    def test_a_state_of_a_later_step_goes(self, states):
        folder, tensors = states
        (folder / "step-000000009").mkdir()  # of what was given up by going back to step 3
        again = train.States(folder)
        again.save(4, tensors, {"skipped": 0})
        again.wait()
        assert sorted(f.name for f in folder.iterdir()) == ["step-000000003", "step-000000004"]

    @pytest.mark.parametrize("tied", [False, True])
    def test_export_is_the_model(self, tmp_path, tied):
        model = random_model(replace(SMALL, tie_embeddings=tied))
        states = train.States(tmp_path / "state")
        states.save(1, tensors_of(model), {"skipped": 0})
        states.wait()
        train.export_state(tmp_path / "state" / "step-000000001", model.config, tmp_path)
        found, wanted = torch.load(tmp_path / "consolidated.00.pth"), model.state_dict()
        assert list(found) == [name for name in wanted if name != "output.weight" or not tied]
        assert state_equal(llama.load(tmp_path), wanted)
        assert llama.load(tmp_path).config == model.config

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_export_holds_one_tensor(self, tmp_path, monkeypatch):
        config, used = replace(SMALL, n_layers=24, dim=256, hidden_dim=512), []
        states = train.States(tmp_path)
        states.save(1, {f"model.{name}": torch.randn(shape)
                        for name, shape in llama.shapes(config).items()}, {"skipped": 0})
        states.wait()

        def measured(file, weight, dtype, write=llama.write_tensor):
            write(file, weight, dtype)
            used.append(memory("RssAnon") - before)
        monkeypatch.setattr(llama, "write_tensor", measured)
        ctypes.CDLL(None).malloc_trim(0)
        before = memory("RssAnon")
        train.export_state(tmp_path / "step-000000001", config, tmp_path / "out")
        assert len(used) == 24 * 9 + 3 and max(used) < 4 * config.n_params / 5


RANKS = """if True:
    import os, resource, sys, warnings
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    import llama, train
    warnings.simplefilter("ignore")
    rank, folder, config = int(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3], vars(llama))
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=4)
    group, report = dist.new_group(backend="gloo"), open(folder / f"rank-{rank}", "w")

    def tell(*what):
        print(*what, sep="; ", file=report, flush=True)
        dist.barrier()

    def model_of(mesh, sharded, split):
        # A model of other values, its weights cut over a mesh `split`, then by fully_shard.
        model = llama.Llama.create(config, 100 + rank)
        for name, module in model.named_modules():
            for key, p in list(module.named_parameters(recurse=False)):
                if split is not None:
                    place = (Shard(1) if name.endswith(("wo", "w2")) else
                             Replicate() if name.endswith("norm") else Shard(0))
                    p = nn.Parameter(distribute_tensor(p.detach(), split, [place]))
                module.register_parameter(key, p)
        for part in [*model.layers, model] if sharded is not None else []:
            fully_shard(part, mesh=sharded)
        return model

    def tensors_of(model):
        parameters = dict(model.named_parameters())
        optimizer = train.make_optimizer(parameters, llama.Recipe(0.1, 1, 1, eps=1e-8))
        return train.state_tensors(parameters, optimizer)

    def saved(states, step, tensors):
        try:
            states.save(step, tensors, {"skipped": 0})
            states.wait()
        except OSError as error:
            return error

    line = init_device_mesh("cpu", (4,))
    w, row = torch.arange(12.0).view(3, 4), init_device_mesh("cpu", (1, 4))
    def copied(w):
        local = {"a": torch.ones(5, dtype=torch.bfloat16), "b.weight": w, "parts": w + rank}
        places = {"parts": Shard(0)}
        made = {name: train.DTensor.from_local(x, row, (Replicate(), places.get(name, Replicate())),
                                               run_check=False) for name, x in local.items()}
        return made | {"step": w}  # not distributed: its own on each
    train.replicas_agree(copied(w))
    if rank == 1:
        w.view(torch.int32)[2, 3] ^= 1
    try:
        train.replicas_agree(copied(w))
    except SystemExit as end:
        tell("wrong", end.code)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plain = tensors_of(model_of(None, None, None))
    stage = {name: t for i, (name, t) in enumerate(plain.items()) if i % 2 == rank}  # 2, 3: none
    layouts = [("grid", group, tensors_of(model_of(grid, grid["dp"], grid["tp"]))),
               ("four", group, tensors_of(model_of(line, line, None))),
               ("stages", group, stage),
               (f"pair{rank // 2}", grid["tp"].get_group(),
                tensors_of(model_of(grid, None, grid["tp"])))]
    source = "one"
    for name, ranks, tensors in layouts:
        facts = train.States(folder / source, group).load(tensors)
        states = train.States(folder / name, ranks)
        states.save(facts["step"], tensors, {"skipped": 7})
        states.wait()
        tell(name, facts)
        source = name if ranks is group else source
    states, tensors = train.States(folder / "four", group), layouts[1][2]
    if rank == 2:  # its disk is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    error = saved(states, 2, tensors)
    dist.barrier()
    tell("full", error, sorted(file.name for file in states.folder.iterdir()))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert saved(states, 2, tensors) is None
    if rank == 0:
        file = states.folder / "step-000000002" / "__3_0.distcp"
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    dist.barrier()
    tell("damaged", states.load(tensors))
    # A part of a run: tp 2 x fsdp 2; rank 2 alone is asked to stop.
    args = train.parser().parse_args(sys.argv[4:])
    args.watchdog = None

    def step(run, go=train.Training.step):
        if rank == 2 and run.facts["step"] == 11:
            os.kill(os.getpid(), train.signal.SIGUSR1)
        return go(run)
    train.Training.step = step
    try:
        train.run_rank(args, "cpu", train.World(rank, 4, rank, 4))
    except SystemExit as end:
        tell("stopped", end.code)
    if rank == 1:  # killed when it has written, before the others know
        train.sha256 = lambda path: os.kill(os.getpid(), 9)
    print("killed", saved(states, 3, tensors), sep="; ", file=report, flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of real text: some modules of the standard library."""
    import argparse
    folder = tmp_path_factory.mktemp("text")
    for name in ("argparse ast bdb calendar cmd code codecs copy csv dis enum filecmp fractions "
                 "ftplib gzip heapq mailbox pdb platform queue random selectors shlex").split():
        file = Path(argparse.__file__).with_name(f"{name}.py")
        if file.exists():
            shutil.copy(file, folder)
    return folder


def run_options(text, out, *more):
    shape = "dim=32 n_layers=2 n_heads=2 n_kv_heads=1 hidden_dim=64 max_seq_len=64"
    options = "--vocab-size 400 --batch-tokens 256 --micro-batch 3 --steps 30 --save-every 6"
    return ["--data", str(text), "--set", *shape.split(), *options.split(), "--eval-every", "10",
            "--lr", "0.003", "--out", str(out), *more]


@pytest.fixture
def signals():
    """train.main sets handlers; put pytest's back."""
    kept = {number: signal.getsignal(number) for number in train.STOPS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole_run(text, tmp_path_factory):
    """An undisturbed run of 30 steps, made once."""
    kept = {number: signal.getsignal(number) for number in train.STOPS}
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.main(run_options(text, out))
    for number, handler in kept.items():
        signal.signal(number, handler)
    return out


def log_of(out):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(out):
    """Everything about each step that must not depend on how the run got there."""
    return [(r["step"], r["tokens"], r["loss"], r["lr"], r["grad_norm"], r.get("val_loss"))
            for r in log_of(out) if "event" not in r]


def begun(whole_run, out, **changes):
    """A folder with the text of whole_run, where a run with such settings can begin."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(whole_run / "tokens", out / "tokens")
    shutil.copy(whole_run / "tokenizer.model", out)
    run = json.loads((whole_run / "run.json").read_text()) | changes
    (out / "run.json").write_text(json.dumps(run))
    return out


@contextlib.contextmanager
def faults(fault):
    """Calls fault(run, step) before each step of runs in this process."""
    kept = {number: signal.getsignal(number) for number in train.STOPS}

    def step(run, go=train.Training.step):
        fault(run, run.facts["step"] + 1)
        return go(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Training, "step", step)
        yield patch
    for number, handler in kept.items():
        signal.signal(number, handler)


def stop_me():
    os.kill(os.getpid(), signal.SIGTERM)


def nearly_equal(out, wanted):
    for ours, theirs in zip(losses(out), losses(wanted), strict=True):
        assert ours[:2] == theirs[:2]
        for a, b, within in zip(ours[2:], theirs[2:], (1e-5, 1e-5, 1e-4, 1e-5)):
            assert a == b or a == pytest.approx(b, rel=within)


def same_weights(out, wanted):
    ours, theirs = (torch.load(folder / "consolidated.00.pth") for folder in (out, wanted))
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


class TestRun:
    def test_learns_and_leaves_what_it_promises(self, whole_run):
        rows = log_of(whole_run)
        assert [r["step"] for r in rows] == list(range(1, 31))
        assert rows[0]["loss"] == pytest.approx(math.log(400), abs=0.3) and rows[-1]["loss"] < 5.6
        assert rows[9]["val_bpb"] > rows[29]["val_bpb"] and "val_bpb" not in rows[10]
        assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "world",
                "rank_params", "rank_tokens"} <= set(rows[0])
        assert rows[-1]["tokens"] == 30 * 256 and rows[0]["rank_tokens"] == 256
        names = {file.name for file in whole_run.iterdir()}
        assert {"params.json", "consolidated.00.pth", "tokenizer.model", "log.jsonl", "loss.svg",
                "state", "tokens"} <= names
        model = llama.load(whole_run)
        assert model.config.vocab_size == 400 and model.config.hidden_dim == 64

    def test_killed_and_gone_on_bit_for_bit(self, text, whole_run, tmp_path):
        code = """if True:
            import os, sys, train
            step, at, number = train.train_step, int(sys.argv[1]), int(sys.argv[2])
            def counted(*args):
                counted.calls += 1
                if counted.calls == at:
                    os.kill(os.getpid(), number)
                return step(*args)
            counted.calls = 0
            train.train_step = counted
            train.main(sys.argv[3:])"""
        options, draw = run_options(text, tmp_path / "r"), random.Random(0)
        for number, status in ((9, -9), (signal.SIGTERM, 143), (9, -9), (0, 0)):
            at = draw.randint(4, 9)  # steps after the last state
            done = subprocess.run([sys.executable, "-c", code, str(at), str(int(number)), *options],
                                  cwd=HERE, capture_output=True, text=True)
            assert done.returncode == status, done.stderr
            with open(tmp_path / "r" / "log.jsonl", "a") as file:
                file.write('{"step": 2')  # a torn line
        assert losses(tmp_path / "r") == losses(whole_run)
        assert same_weights(tmp_path / "r", whole_run)

    def test_goes_on_from_before_a_damaged_state(self, text, whole_run, tmp_path, signals, capsys):
        shutil.copytree(whole_run, tmp_path / "r")
        newest = sorted((tmp_path / "r/state").iterdir())[-1]
        (newest / "__0_0.distcp").write_bytes(b"broken")
        train.main(run_options(text, tmp_path / "r"))
        assert "is damaged and passed over" in capsys.readouterr().err
        assert losses(tmp_path / "r") == losses(whole_run)
        events = [row for row in log_of(tmp_path / "r") if "event" in row]
        assert [(row["event"], row["step"]) for row in events] == [("resume", 24)]

    def test_finished_and_other_settings(self, text, whole_run, signals, capsys):
        (whole_run / "consolidated.00.pth").unlink()  # as if killed just before it was written
        before, file = losses(whole_run), whole_run / "run.json"
        run = json.loads(file.read_text())
        del run["compile"]  # a run of before this setting existed
        file.write_text(json.dumps(run))
        train.main(run_options(text, whole_run))
        assert "finished at step 30; --steps N goes on, --fresh" in capsys.readouterr().err
        assert losses(whole_run) == before and llama.load(whole_run).config.dim == 32
        with pytest.raises(ValueError, match=r"trained with lr=0.003; try --out DIR or --fresh"):
            train.main([*run_options(text, whole_run), "--lr", "0.004"])

    def test_fresh_removes_nothing_that_is_not_a_run(self, text, whole_run, tmp_path, signals):
        (tmp_path / "mine" / "tokens").mkdir(parents=True)
        shutil.copytree(text, tmp_path / "mine" / "state")
        with pytest.raises(ValueError, match="there is no nowhere"):
            train.main(["--data", "nowhere", "--out", str(whole_run), "--fresh"])
        assert losses(whole_run)
        options = run_options(tmp_path / "mine" / "state", tmp_path / "mine", "--fresh")
        train.main([*options, "--steps", "3"])
        assert len(list((tmp_path / "mine" / "state").glob("*.py"))) == len(list(text.iterdir()))
        assert len(losses(tmp_path / "mine")) == 3
        train.main([*run_options(text, tmp_path / "mine", "--fresh"), "--steps", "2"])
        assert len(losses(tmp_path / "mine")) == 2

    def test_a_mistake_before_there_is_text_leaves_no_settings(self, text, tmp_path, signals):
        with pytest.raises(ValueError, match="; try"):
            train.main([*run_options(text, tmp_path / "r"), "--vocab-size", "99999"])
        train.main([*run_options(text, tmp_path / "r"), "--steps", "2"])
        assert len(losses(tmp_path / "r")) == 2

    @pytest.mark.parametrize("name, data", [
        ("run.json", "[]"), ("run.json", "{"), ("tokens/sources.json", "{}"),
        ("tokens/sources.json", "[{}]"), ("tokens/0.train.bin", "")])
    def test_damaged_files_of_a_run(self, text, whole_run, tmp_path, signals, name, data):
        shutil.copytree(whole_run, tmp_path / "r")
        (tmp_path / "r" / name).write_text(data)
        with pytest.raises(ValueError, match="damaged; try --fresh"):
            train.main(run_options(text, tmp_path / "r"))

    def test_bad_files_are_named_and_counted(self, text, tmp_path, signals, capsys):
        shutil.copytree(text, tmp_path / "t")
        (tmp_path / "t" / "bad.txt").write_bytes(b"\xff\xfe\x00")
        (tmp_path / "t" / "empty.txt").touch()
        (tmp_path / "t" / "lines.jsonl").write_text('{"text": "a"}\n{"txt": 3}\nx\n')
        train.main([*run_options(tmp_path / "t", tmp_path / "r"), "--steps", "1"])
        said = capsys.readouterr().err
        for name in ("bad.txt: not UTF-8 text", "empty.txt: empty", "lines.jsonl: 2 lines are not"):
            assert f"passed over {tmp_path / 't'}/{name}" in said
        assert "passed over 3 in all" in said

    def test_skips_steps_that_are_not_finite_and_stops(self, text, tmp_path, signals, monkeypatch):
        loss, calls = Llama.mean_loss, []

        def poisoned(model, h, targets):
            calls.append(model.training)
            bad = len(calls) in (5, 6, 7) or len(calls) > 30  # of two micro-batches a step
            return loss(model, h, targets) * (math.nan if bad else 1)
        monkeypatch.setattr(Llama, "mean_loss", poisoned)
        with pytest.raises(ValueError, match="5 steps in a row .* is kept; try a lower --lr"):
            train.main([*run_options(text, tmp_path / "r", "--eval-every", "99"),
                        "--micro-batch", "2"])
        rows = log_of(tmp_path / "r")
        assert [r["step"] for r in rows if r["loss"] is None] == [3, 4, 16, 17, 18, 19, 20]
        assert rows[-1]["skipped"] == 7 and rows[5]["skipped"] == 2
        states = sorted(state.name for state in (tmp_path / "r" / "state").iterdir())
        assert states == ["step-000000006", "step-000000012"]

    def test_a_last_step_that_is_not_finite(self, text, tmp_path, signals, monkeypatch):
        loss, calls = Llama.mean_loss, []

        def poisoned(*args):
            calls.append(loss(*args))
            return calls[-1] * (math.nan if len(calls) > 4 else 1)  # two micro-batches a step
        monkeypatch.setattr(Llama, "mean_loss", poisoned)
        train.main([*run_options(text, tmp_path), "--micro-batch", "2", "--steps", "3"])
        assert [state.name for state in (tmp_path / "state").iterdir()] == ["step-000000003"]
        assert log_of(tmp_path)[-1]["skipped"] == 1 and llama.load(tmp_path).config.dim == 32

    def test_samples(self, whole_run, capsys):
        generate.main([str(whole_run), "--prompt", "import", "--prompt", "-1 + 2", "--json",
                       "--num-samples", "2", "--max-new-tokens", "9", "--temperature", "1"])
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [r["prompt"] for r in rows] == ["import"] * 2 + ["-1 + 2"] * 2
        assert all(len(r["ids"]) == len(r["logprobs"]) == 9 for r in rows)
        assert rows[0]["ids"] != rows[1]["ids"] and {r["finish_reason"] for r in rows} == {"length"}
        generate.main([str(whole_run), "--prompt", "import", "--max-new-tokens", "9",
                       "--temperature", "1"])
        assert capsys.readouterr().out == "import" + rows[0]["text"] + "\n"

    def test_scores(self, whole_run, text, capsys, tmp_path):
        for name in ("copy.py", "queue.py"):
            shutil.copy(text / name, tmp_path)
        generate.main([str(whole_run), "--score", str(tmp_path), "--json"])
        *rows, total = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert total["nll"] == pytest.approx(sum(r["nll"] for r in rows)) and len(rows) == 2
        model = llama.load(whole_run)
        words = tokenizer.load_tokenizer(whole_run / "tokenizer.model")
        file = text / "copy.py"
        ids = words.encode(file.read_text(), bos=True)
        assert rows[0]["tokens"] == len(ids) - 1
        nll = generate.token_nll(model, ids).sum().item()
        assert rows[0]["nll"] == pytest.approx(nll, rel=1e-4)
        bits = rows[0]["nll"] / math.log(2) / file.stat().st_size
        assert rows[0]["bits_per_byte"] == pytest.approx(bits)

    def test_bench_of_generation(self, whole_run, capsys):
        generate.main([str(whole_run), "--bench", "16"])
        row = json.loads(capsys.readouterr().out)
        assert set(row) == {"prefill_tokens_per_s", "decode_tokens_per_s", "weight_gb",
                            "bandwidth_gb_s", "bandwidth_fraction", "load_s", "first_token_s",
                            "dtype", "quantize"}
        assert row["weight_gb"] == pytest.approx(4 * llama.load(whole_run).config.n_params / 1e9)


@pytest.fixture(scope="module")
def ranks(whole_run, text, tmp_path_factory):
    """One state written by one process, and a run of one stopped after step 6; what four made of
    the state and told; the run went on by the four to step 12, and then by one."""
    folder, model = tmp_path_factory.mktemp("ranks"), random_model(LITTLE)
    tensors = tensors_of(model)
    for i, t in enumerate(tensors.values()):
        t.copy_(noise(1, *t.shape, seed=i)[0])
    torch.manual_seed(7)
    states = train.States(folder / "one")
    states.save(1, tensors, {"skipped": 7})
    states.wait()
    options = [word.replace("n_kv_heads=1", "n_kv_heads=2") for word in
               run_options(text, begun(whole_run, folder / "run"), "--dtype", "fp32")]
    for name in ("run", "alone"):
        begun(whole_run, folder / name, dtype="fp32", set=options[3:9])
    with faults(lambda run, step: None):
        train.main([*options, "--out", str(folder / "alone")])
    with faults(lambda run, step: step == 6 and stop_me()), pytest.raises(SystemExit, match="143"):
        train.main(options)
    command = [sys.executable, "-c", RANKS]
    running = [subprocess.Popen([*command, str(rank), str(folder), repr(LITTLE), *options, "--tp",
                                 "2"], cwd=HERE, stderr=subprocess.PIPE, text=True)
               for rank in range(4)]
    errors = [process.communicate(timeout=100)[1] for process in running]
    assert [process.returncode for process in running] == [0, -9, 0, 0], "".join(errors)
    told = [(folder / f"rank-{rank}").read_text().splitlines() for rank in range(4)]
    lines = [{line.split("; ")[0]: line for line in lines} for lines in told]
    with faults(lambda run, step: None):
        train.main(options)
    return folder, tensors, lines, "".join(errors)


class TestStatesOfRanks:
    @pytest.mark.parametrize("layout", ["grid", "four", "stages", "pair0", "pair1"])
    def test_there_and_back_through_every_layout(self, ranks, layout):
        folder, wanted, lines, _ = ranks
        tensors = {name: torch.full_like(t, -1) for name, t in wanted.items()}
        torch.manual_seed(8)
        assert train.States(folder / layout).load(tensors) == {"step": 1, "skipped": 7}
        assert all(torch.equal(t, wanted[name]) for name, t in tensors.items())
        assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(7).get_state())
        files = {file.name for file in (folder / layout / "step-000000001").glob("*.distcp")}
        assert files == {f"__{rank}_0.distcp" for rank in range(2 if "pair" in layout else 4)}

    def test_one_full_disk_is_told_to_all(self, ranks):
        for lines in ranks[2]:
            assert re.match(r"full; the state of step 2 could not be written \(.*File too large.*"
                            r"try to free space.*; \['step-000000001'\]", lines["full"])

    def test_damage_is_seen_by_all(self, ranks):
        for lines in ranks[2]:
            assert lines["damaged"] == "damaged; {'step': 1, 'skipped': 7}"

    def test_a_rank_killed_while_it_writes(self, ranks, capsys):
        folder, wanted, lines, _ = ranks
        for rank in (0, 2, 3):
            assert "killed; the state of step 3 could not be written" in lines[rank]["killed"]
        assert {file.name for file in (folder / "four").iterdir()} == {
            "step-000000001", "step-000000002"}
        assert train.States(folder / "four").load(wanted)["step"] == 1
        assert "__3_0.distcp is not what was written" in capsys.readouterr().err

    def test_a_run_of_one_of_four_and_of_one(self, ranks):
        rows = [row for row in log_of(ranks[0] / "run") if "event" not in row]
        assert [row["world"] for row in rows] == [1] * 6 + [4] * 6 + [1] * 18
        nearly_equal(ranks[0] / "run", ranks[0] / "alone")


LLAMA3_CHAT = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant"
    "<|end_header_id|>\n\n' }}{% endif %}")
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}")
LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set "
    "system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set "
    "system_message = false %}{% endif %}{% for message in loop_messages %}{% if loop.index0 == 0 "
    "and system_message != false %}{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n'"
    " + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if "
    "message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif "
    "message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    save_meta(random_model(replace(SMALL, dim=64, vocab_size=420, max_seq_len=128)), folder)
    trained().save(folder / "tokenizer.model")
    return folder


class TestTurn:
    """Turns as the templates that were published spell them, by transformers."""

    @pytest.mark.parametrize("kind, template, begins, ends", [
        ("llama-bpe", LLAMA3_CHAT, "<|begin_of_text|>", "<|eot_id|>"),
        ("smollm", CHATML, "<|im_start|>", "<|im_end|>"), ("legacy", LLAMA2_CHAT, "<s>", "</s>")])
    def test_equals_transformers(self, kind, template, begins, ends):
        from transformers import PreTrainedTokenizerFast
        theirs = HUGGING_FACE[kind]()
        if kind == "llama-bpe":
            theirs.add_special_tokens(["<|start_header_id|>", "<|end_header_id|>"])
        ours = tokenizer.HuggingFace(theirs.to_str().encode(), {"chat_template": template})
        oracle = PreTrainedTokenizerFast(tokenizer_object=theirs, bos_token=begins, eos_token=ends)
        for system in ("Be brief.\nNo wife", ""):
            said = [("user", "a man? 12"), ("assistant", "It is 42!"), ("user", "in want\n\nof x")]
            said = [("system", system)] * bool(system) + said
            said = [{"role": role, "content": text} for role, text in said]
            wanted = oracle.apply_chat_template(said, chat_template=template, tokenize=True,
                                                add_generation_prompt=True, return_dict=False)
            answer = ours.encode(" It is 42! " if kind == "legacy" else "It is 42!", continues=True)
            first = generate.turn(ours, "a man? 12", system)
            assert first + answer + generate.turn(ours, "in want\n\nof x", system, False) == wanted
            if kind == "legacy":
                assert generate.turn(trained(), "a man? 12", system) == first
        names = [name for name in ours.special if kind != "legacy"] + ["<s></s>"]
        special, plain = ({*generate.turn(ours, text, text)} & {*ours.special.values()}
                          for text in (" x ".join(names), "a"))
        assert special == plain

    def test_ranks_of_meta(self):
        ours, mark = ranked(), "<|start_header_id|>{}<|end_header_id|>\n\n"
        found = generate.turn(ours, "a", "b") + generate.turn(ours, " c ", "b", first=False)
        text = (f"<|begin_of_text|>{mark}b<|eot_id|>{mark}a<|eot_id|>{mark}<|eot_id|>{mark}c"
                f"<|eot_id|>{mark}").format("system", "user", "assistant", "user", "assistant")
        assert found == ours.encode(text, allowed_special=ours.special)

    def test_what_is_refused(self):
        for text, system in (("a [/INST] b", ""), ("a", "<</SYS>>")):
            with pytest.raises(ValueError, match="is a mark of this chat format; try"):
                generate.turn(trained(), text, system)
        for template, said in (("{{ '<|user|>' }}", "none of llama3, chatml, llama2; try --prompt"),
                               ("<|im_start|>", "needs <.im_start.>, which the tokenizer has not")):
            other = tokenizer.HuggingFace(HUGGING_FACE["legacy"]().to_str().encode(),
                                          {"chat_template": template})
            with pytest.raises(ValueError, match=said):
                generate.turn(other, "a")


class TestChat:
    @staticmethod
    def talk(monkeypatch, folder, *said, more=()):
        said = iter(said)

        def typed(prompt):
            for text in said:
                return text
            raise EOFError
        monkeypatch.setattr("builtins.input", typed)
        try:
            generate.main([str(folder), "--chat", "--temperature", "0", "--system", "S", *more])
        except KeyboardInterrupt:
            pytest.fail("Ctrl-C ended more than an answer")

    @staticmethod
    def told(read):
        """What the model was told in all, and what it read of it at each turn."""
        text, turns = [], []
        for at, (ids,), _ in read:
            text[at:] = ids
            if len(ids) > 4:  # a token and guesses are fewer
                turns.append((at, ids, list(text)))
        return turns

    @pytest.mark.parametrize("stopped", [None, "before", "after"])
    def test_reads_what_is_new(self, tiny, read, monkeypatch, capsys, stopped):
        """And Ctrl-C ends an answer, not the conversation."""
        noted = Llama.hidden

        def interrupted(model, *args):
            if stopped == "before" and len(read) == 3:
                read.append((args[1].lengths[0], args[0].tolist(), None))
                raise KeyboardInterrupt
            h = noted(model, *args)
            if stopped == "after" and len(read) == 4:
                raise KeyboardInterrupt
            return h
        monkeypatch.setattr(Llama, "hidden", interrupted)
        self.talk(monkeypatch, tiny, "a man", "", "of x", more=["--max-new-tokens", "6"])
        out, err = capsys.readouterr()
        assert err.startswith("a conversation in the format llama2; Ctrl-C") and "error" not in err
        words, (one, two, three) = trained(), self.told(read)
        first, second = (generate.turn(words, *said) for said in (("a man", "S"), ("", "S", False)))
        assert one == (0, first, first) and two[1][-len(second):] == second
        answer = two[2][len(first):-len(second)]
        assert len(answer) == (3 if stopped else 6) and len(two[1]) <= 1 + len(second)
        assert out.startswith(words.decode(words.encode("x") + answer)[1:]
                              + " [stopped]" * bool(stopped) + "\n")
        model = llama.load(tiny)
        for at, ids, text in (two, three):
            h, = (h for start, (some,), h in read if (start, some) == (at, ids))
            close(h[0, -1], model.hidden(torch.tensor([text]))[0, -1], atol=1e-4)

    def test_a_full_context_begins_anew(self, tiny, read, monkeypatch, capsys):
        self.talk(monkeypatch, tiny, "a man", "of x " * 9, "x " * 200, "[INST]",
                  more=["--max-new-tokens", "999"])
        err = capsys.readouterr().err
        assert re.findall("error: (a text of|.INST. is)", err) == ["a text of", "[INST] is"]
        assert "the context of 128 tokens is full: it begins anew" in err
        ids = [generate.turn(trained(), text, "S") for text in ("a man", "of x " * 9)]
        assert [turn[:2] for turn in self.told(read)] == [(0, ids[0]), (0, ids[1])]

    def test_guesses_change_nothing(self, tiny, read, monkeypatch, capsys):
        logits, few = Llama.logits, torch.tensor(trained().encode("abc", continues=True))
        only = torch.full((420,), -1e9).index_fill(0, few, 0)
        monkeypatch.setattr(Llama, "logits", lambda model, h: logits(model, h) + only)
        turns = []
        for more in ([], ["--speculate", "3"]):
            for seed in "012345":
                self.talk(monkeypatch, tiny, *"abc", more=[
                    "--temperature", "1", "--max-new-tokens", "9", "--seed", seed, *more])
            turns.append(([text for *_, text in self.told(read)], capsys.readouterr().out))
            read.clear()
        assert turns[0] == turns[1]


class TestEnds:
    """alpaca-lora#325, TinyLlama#55, vllm#4180 (Llama 3 has two): output that never ends."""

    @pytest.mark.parametrize("ours, count", [
        (trained, 1), (ranked, 3), (lambda: tokenizer.HuggingFace(
            HUGGING_FACE["smollm"]().to_str().encode()), 2)])
    def test_every_stop_of_the_family(self, ours, count):
        ours = ours()
        assert len(ours.stop_ids) == count
        model = random_model(replace(SMALL, vocab_size=ours.vocab_size))
        for stop in ours.stop_ids:
            script = iter(F.one_hot(torch.tensor([40, 41, stop]), ours.vocab_size) * 9.0)
            model.logits = lambda h: next(script)[None, None]
            sample, = generate.sample_texts(model, ours, ["a"], 20, Sampling(0.0))
            assert (sample.ids, sample.finish_reason) == ([40, 41], "stop")

    def test_those_of_generation_config(self, tiny, tmp_path):
        shutil.copy(tiny / "tokenizer.model", tmp_path)
        for text, more in (('{"eos_token_id": [2, 35]}', {35}), ('{"eos_token_id": 7}', {7}),
                           ("{}", set()), ('{"eos_token_id": null}', set()), ("[", set())):
            (tmp_path / "generation_config.json").write_text(text)
            assert generate.tokenizer_beside(tmp_path, 420).stop_ids == {2} | more

    def test_a_padded_vocabulary_is_named(self, tiny):
        """Chinese-LLaMA#87, llama2.c#263, build-nanogpt#95: gibberish by another vocabulary."""
        with pytest.raises(ValueError, match="420 tokens and the model 448: .* padded; try"):
            generate.tokenizer_beside(tiny, 448)


class TestGenerateCommand:
    def test_score_says_ids_and_windows(self, tiny, tmp_path, capsys):
        lines = [json.dumps({"text": text}) for text in (NOVEL * 3, "in want of a wife")]
        (tmp_path / "t.jsonl").write_text("\n".join(lines))
        options = [str(tiny), "--score", str(tmp_path / "t.jsonl")]
        generate.main([*options, "--json"])
        long, short, total = map(json.loads, capsys.readouterr().out.splitlines())
        assert [(row["window"], row["stride"]) for row in (long, short)] == [(128, 64), (128, 0)]
        ids = trained().encode("in want of a wife", bos=True)
        scores = llama.load(tiny)(torch.tensor([ids]))[0].log_softmax(-1)
        close(torch.tensor(short["logprobs"]), scores[range(len(ids) - 1), ids[1:]])
        for row in (long, short):
            assert row["ids"] == trained().encode(NOVEL * 3 if row is long else "in want of a wife")
            assert row["nll"] == pytest.approx(-sum(row["logprobs"]), rel=1e-4)
        assert total["tokens"] == len(long["ids"] + short["ids"]) and "ids" not in total
        generate.main(options)
        said = capsys.readouterr().out.splitlines()
        assert [", in windows of 128 tokens, 64 apart" in line for line in said] == [1, 0, 0]

    @pytest.mark.parametrize("format", llama.EXPORTS)
    def test_export(self, tiny, tmp_path, capsys, format):
        out, options = tmp_path / "out" / "model", ["--prompt", "a man", "--temperature", "0"]
        out.parent.mkdir()
        generate.main([str(tiny), "--export", format, str(out)])
        with pytest.raises(ValueError, match="exists already"):
            generate.main([str(tiny), "--export", format, str(out)])
        folder = out.parent if format == "llama2c" else out
        if format != "hf":
            assert (folder / "tokenizer.model").read_bytes() == trained().data
        for path in (tiny, out):
            generate.main([str(path), *options, "--max-new-tokens", "9"])
        said = capsys.readouterr().out
        assert said[:len(said) // 2] == said[len(said) // 2:] and "a man" in said
        if format == "hf":
            from transformers import AutoTokenizer, LlamaForCausalLM
            words = AutoTokenizer.from_pretrained(out)
            assert words.encode(NOVEL) == trained().encode(NOVEL, bos=True)
            assert (words.bos_token, words.eos_token) == ("<s>", "</s>")
            theirs, x = LlamaForCausalLM.from_pretrained(out), tokens(1, 40, vocab=420)
            close(theirs(x).logits, llama.load(tiny)(x), atol=1e-4)
            ends = theirs.generation_config
            assert (ends.bos_token_id, ends.eos_token_id) == (1, [2])

    def test_gguf_with_its_vocabulary(self, tiny, tmp_path, capsys):
        model, words = llama.load(tiny), trained().processor
        state = {name: w.detach() for name, w in model.state_dict().items()}
        names = [words.id_to_piece(i) for i in range(420)]

        def vocabulary(w):
            w.kv_data[0].pop("tokenizer.ggml.tokens")
            w.kv_data[0].pop("tokenizer.ggml.scores")
            w.add_token_list(names)
            w.add_token_scores([words.get_score(i) for i in range(420)])
            w.add_token_types([2, 3, 3] + [6] * 256 + [1] * 161)
            w.add_bos_token_id(1)
            w.add_eos_token_id(2)
        write_gguf(tmp_path / "m.gguf", model.config, state, extra=vocabulary)
        for path in (tiny, tmp_path / "m.gguf"):
            generate.main([str(path), "--prompt", "a man", "--temperature", "0", "--json"])
        ours, theirs = capsys.readouterr().out.splitlines()
        assert ours == theirs and len(json.loads(ours)["ids"]) > 20


class TestTorchrunNames:
    """srun's variables as its manual page describes them; no cluster is here."""
    STEP = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
            "SLURM_NTASKS": "11", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
            "SLURM_STEP_NODELIST": "gpu[003-010,012],cpu1"}

    def test_srun(self):
        found = train.torchrun_names(self.STEP)
        port = int(found.pop("MASTER_PORT"))
        assert found == {"RANK": "5", "WORLD_SIZE": "11", "LOCAL_RANK": "1",
                         "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu003"}
        assert 1024 <= port < 32768  # no system's own choice
        for change in ({"SLURM_STEP_ID": "3"}, {"SLURM_JOB_ID": "4712"}):
            assert int(train.torchrun_names(self.STEP | change)["MASTER_PORT"]) != port

    @pytest.mark.parametrize("node, tasks, size", [
        ("0", "4(x2),3", "4"), ("1", "4(x2),3", "4"), ("2", "4(x2),3", "3"), ("0", "8", "8"),
        ("7", "2(x8)", "2"), ("1", "1,16", "16")])
    def test_tasks_of_a_node(self, node, tasks, size):
        step = self.STEP | {"SLURM_NODEID": node, "SLURM_STEP_TASKS_PER_NODE": tasks}
        assert train.torchrun_names(step)["LOCAL_WORLD_SIZE"] == size

    @pytest.mark.parametrize("nodes, first", [
        ("gpu1", "gpu1"), ("gpu1,gpu2", "gpu1"), ("gpu[7,9]", "gpu7"), ("a[09-11]-ib,c", "a09-ib"),
        ("rack[0-1]node[02-03]", "rack0node02"), ("x.y.org,z[1-2]", "x.y.org")])
    def test_first_node(self, nodes, first):
        step = self.STEP | {"SLURM_STEP_NODELIST": nodes}
        assert train.torchrun_names(step)["MASTER_ADDR"] == first

    def test_what_the_user_chose_stays(self):
        found = train.torchrun_names(self.STEP | {"MASTER_ADDR": "here", "MASTER_PORT": "77"})
        assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("here", "77")

    @pytest.mark.parametrize("change", [
        {"SLURM_STEP_ID": None}, {"SLURM_PROCID": None}, {"SLURM_NTASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "1"}, {"RANK": "0"}])
    def test_one_process_or_not_sruns(self, change):
        """sbatch's script, an interactive step (told of all tasks of its allocation), torchrun."""
        step = {name: value for name, value in (self.STEP | change).items() if value is not None}
        assert train.torchrun_names(step) == {}


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def alive(pid):
    """Neither gone nor only waiting to be asked for its status."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def supervised(folder, code, n=2, before=""):
    """supervise's status over n ranks that run the code in the folder; states are in state/."""
    (folder / "state").mkdir(exist_ok=True)
    (folder / "rank.py").write_text(before + textwrap.dedent(code))
    return train.supervise(n, [sys.executable, str(folder / "rank.py")], folder / "state")


RANK = """
import os, signal, sys, time
from pathlib import Path
os.chdir(Path(__file__).parent)
rank, start = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
Path(f"{start}-{rank}").write_text(str(os.getpid()))
while not Path(f"{start}-{1 - rank}").exists():
    time.sleep(0.01)
"""
TRAIN = f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport torch, train" + """
import torch.distributed as dist
from tokenizer import command
args = train.parser().parse_args(sys.argv[1:])
""" + RANK


@pytest.mark.usefixtures("signals")
class TestSupervise:
    """The ranks are small scripts without torch; each start leaves files START-RANK."""

    def test_a_dead_rank_is_started_again_with_the_others(self, tmp_path, capfd):
        status = supervised(tmp_path, """
            if start < 3 and rank == 1:
                os.mkdir(f"state/step-{start}")
                os.kill(os.getpid(), 9) if start else sys.exit(1)
            if start < 3:
                time.sleep(60)""", before=RANK)
        assert status == 0
        assert {f"{start}-{rank}" for start in range(4) for rank in range(2)} <= {
            file.name for file in tmp_path.iterdir()} and not (tmp_path / "4-0").exists()
        assert not any(alive((tmp_path / f"{start}-0").read_text()) for start in range(4))
        lines = capfd.readouterr().err.splitlines()
        assert lines[0] == "rank 1 ended with status 1; going on from the last good state"
        assert lines[1:] == 2 * ["rank 1 was killed by signal 9; going on from the last good state"]

    @pytest.mark.parametrize("states", ["state/step-1", "state"])
    def test_twice_without_a_new_state_is_the_end(self, tmp_path, capfd, states):
        code = f"os.makedirs('{states}', exist_ok=True); os.kill(os.getpid(), 9 * rank)"
        assert supervised(tmp_path, code + "; time.sleep(60)", before=RANK) == 1
        first, last = capfd.readouterr().err.splitlines()
        assert "going on" in first
        assert last.startswith("error: rank 1 was killed by signal 9, again")
        assert (tmp_path / "1-0").exists() and not (tmp_path / "2-0").exists()

    @pytest.mark.parametrize("status", [2, 143, 0])
    def test_what_was_meant_is_not_tried_again(self, tmp_path, status, capfd):
        """Asked to stop, others may still save; after an error they may wait for ever."""
        code = f"time.sleep((0.5 if {status} != 2 else 60) * (1 - rank))"
        code += f"\nPath(f'saved-{{rank}}').touch(); sys.exit({status})"
        assert supervised(tmp_path, code, before=RANK) == status
        assert (tmp_path / "saved-0").exists() == (status != 2)
        assert capfd.readouterr().err == "" and not (tmp_path / "1-0").exists()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signals_are_passed_on_once(self, tmp_path, number):
        code = f"""
            def stop(number, frame):
                with open(f"got-{{rank}}", "a") as file:
                    print(number, file=file)
            signal.signal({int(number)}, stop)
            Path(f"ready-{{rank}}").write_text(str(os.getpgrp()))
            while not Path(f"got-{{rank}}").exists():
                time.sleep(0.01)
            time.sleep(0.3)
            sys.exit({128 + number})"""

        def send():
            until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(2)))
            os.kill(os.getpid(), number)
        thread = threading.Thread(target=send)
        thread.start()
        assert supervised(tmp_path, code, before=RANK) == 128 + number
        thread.join()
        for rank in range(2):
            assert (tmp_path / f"got-{rank}").read_text() == f"{number}\n"
            group = int((tmp_path / f"ready-{rank}").read_text())
            assert group != os.getpgrp()  # the terminal's Ctrl-C does not come here a second time

    def test_without_the_supervisor_no_rank_lives(self, tmp_path):
        code = """
            with train.join(args, "cpu"):
                Path(f"joined-{rank}").touch()
                time.sleep(60)"""
        (tmp_path / "rank.py").write_text(TRAIN + textwrap.dedent(code))
        start = "import sys, train, pathlib; train.supervise(2, sys.argv[1:], pathlib.Path())"
        process = subprocess.Popen([sys.executable, "-c", start, sys.executable,
                                    str(tmp_path / "rank.py")], cwd=HERE)
        until(lambda: all((tmp_path / f"joined-{rank}").exists() for rank in range(2)))
        ranks = [(tmp_path / f"0-{rank}").read_text() for rank in range(2)]
        assert all(map(alive, ranks))
        process.kill()
        process.wait()
        until(lambda: not any(map(alive, ranks)), 10)


FAULTS = """
import math, resource

def faulty(*args, loss=train.Llama.mean_loss):
    return loss(*args) * factor

def step(run, go=train.Training.step):
    fault(run, run.facts["step"] + 1)
    return go(run)

def not_a_number(run, step):
    global factor
    factor = math.nan if rank == 1 and step == 10 else 1

def jumps(run, step):
    global factor
    factor = 5 if rank == 1 and step + run.facts["passed"] in (22, 32) else 1

train.Llama.mean_loss, train.Training.step, fault, factor = faulty, step, not_a_number, 1
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, whole_run, text):
    """Status and what was written by two ranks: at first one hangs; then runs, undisturbed but for
    what is in FAULTS; then rank 0 errs for all."""
    folder, kept = tmp_path_factory.mktemp("two"), {n: signal.getsignal(n) for n in train.STOPS}
    begun(whole_run, folder / "fsdp", threads=7)
    begun(whole_run, folder / "ddp")
    begun(whole_run, folder / "minutes")
    code = """
        def hang_here():
            time.sleep(60)

        def slow():
            time.sleep(1.5)
            return {"a": 1}

        def wrong():
            raise OSError(28, "No space left on device", "shards")

        def main(_):
            args.watchdog = 60 if start else 1
            with train.join(args, "cpu") as world:
                train.watch(args.watchdog)
                if not start:
                    dist.barrier() if rank else hang_here()
                train.watch(1)
                made = train.on_first(world, slow)  # longer than the watchdog would wait
                Path(f"made-{rank}").write_text(f"{world} {torch.get_num_threads()} {made}")
                runs(world)
                train.on_first(world, wrong)

        def go(world, out, *more):
            args = train.parser().parse_args([*options, "--out", out, *more])
            args.steps = None if args.minutes else args.steps
            train.run_rank(args, "cpu", world)

        def runs(world):
            global fault
            go(world, "fsdp")
            Path(f"threads-{rank}").write_text(str(torch.get_num_threads()))
            go(world, "fsdp", "--dp", "ddp")  # is finished
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            try:
                go(world, "fsdp", "--steps", "40")
            except OSError as error:
                Path(f"full-{rank}").write_text(str(error))
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            fault, read, take = jumps, [], train.Batches.step
            train.Batches.step = lambda batches, at: (read.append(at), take(batches, at))[1]
            go(world, "ddp", "--dp", "ddp", "--spike")
            Path(f"read-{rank}").write_text(repr(read))
            go(world, "none", "--bench", "2")
            engine = train.Engine(train.LlamaConfig(32, 2, 2, 2, 64, 50, 16),
                                  train.Layout(replicas=2), "cpu", 1)
            batch = torch.arange(34).view(2, 17)
            with torch.no_grad():
                engine.loss(batch)  # and leaves gathered weights
                for p in engine.parameters.values():
                    p.to_local().mul_(3)
            engine.forget_gathered()
            Path(f"set-{rank}").write_text(repr([engine.loss(batch) for _ in range(2)]))
            train.time = type("", (), vars(time))
            if rank == 1:  # whose clock is three times as fast
                train.time.perf_counter = lambda: 3 * time.perf_counter()
            train.Training = lambda args, run, *rest: sys.exit(run["steps"])
            try:
                go(world, "minutes", "--minutes", "0.2")
            except SystemExit as end:
                Path(f"steps-{rank}").write_text(str(end.code))
        command(main)"""
    code = f"options = {run_options(text, folder)}" + textwrap.dedent(code)
    with (pytest.MonkeyPatch.context() as patch, open(folder / "err", "w+") as err,
          open(folder / "out", "w+") as out):
        popen = functools.partial(subprocess.Popen, stderr=err, stdout=out)
        patch.setattr(train.subprocess, "Popen", popen)
        status = supervised(folder, code, before=TRAIN + FAULTS)
    for number, handler in kept.items():
        signal.signal(number, handler)
    return status, (folder / "err").read_text(), folder


class TestWatch:
    def test_what_hangs_says_where_and_is_started_again(self, two_ranks):
        _, err, folder = two_ranks
        assert "Timeout (0:00:01)!" in err and "Thread 0x" in err and (folder / "1-0").exists()
        assert "in hang_here" in err and err.count("Timeout (0:00:01") == 2  # both have said it
        assert "Traceback" not in err  # of the barrier that rank 0 left

    def test_off_again(self):
        train.watch(0.2)
        train.watch(None)
        time.sleep(0.4)  # else pytest ends here


class TestJoin:
    def test_place_and_threads(self, two_ranks):
        threads = max(1, tokenizer.cores() // 2)
        for rank in range(2):
            place = f"World(rank={rank}, size=2, local_rank={rank}, local_size=2) {threads} "
            assert (two_ranks[2] / f"made-{rank}").read_text().startswith(place)

    def test_alone_nothing_is_started(self):
        with train.join(train.parser().parse_args([]), "cpu") as world:
            assert world == (0, 1, 0, 1) and not torch.distributed.is_initialized()

    def test_other_nproc_than_was_started(self, monkeypatch):
        for name, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ValueError, match="2 processes were started here and --nproc says 3"):
            with train.join(train.parser().parse_args(["--nproc", "3"]), "cpu"):
                pass


    def test_what_one_rank_has_alone_is_said_with_its_number(self, monkeypatch):
        start = partial(torch.distributed.init_process_group, store=torch.distributed.HashStore())
        monkeypatch.setattr(train.dist, "init_process_group",
                            lambda backend, **options: start("gloo", rank=0, world_size=1))
        monkeypatch.setattr(train.time, "sleep", lambda seconds: None)
        for name, value in {"RANK": 1, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        try:
            with pytest.raises(ValueError, match="^rank 1: no disk here; try another"):
                with train.join(train.parser().parse_args([]), "cpu"):
                    raise ValueError("no disk here; try another")
        finally:
            train.watch(None)
            torch.distributed.destroy_process_group()


class TestOnFirst:
    def test_result_is_everyones(self, two_ranks):
        for rank in range(2):
            assert (two_ranks[2] / f"made-{rank}").read_text().endswith("{'a': 1}")

    def test_error_is_everyones_and_one_line(self, two_ranks):
        status, err, folder = two_ranks
        assert status == 2 and not (folder / "2-0").exists()
        assert re.findall("error:.*", err) == [
            "error: No space left on device: shards; try another path or disk"]

    def test_alone(self):
        assert train.on_first(train.World(), lambda: 7) == 7


class TestReplicasAgree:
    def test_a_wrong_bit_ends_all_ranks(self, ranks):
        lines = ranks[2]
        assert [told["wrong"] for told in lines] == ["wrong; 1"] * 4
        said = re.findall("error: (.*) is not what the other copies are (.*):", ranks[3])
        assert said == [("b.weight of rank 1", "(1 such tensors)")]


class TestStopper:
    def test_a_signal_to_one_rank_stops_all_after_the_same_step(self, ranks):
        lines = ranks[2]
        assert [told["stopped"] for told in lines] == [
            f"stopped; {128 + (signal.SIGUSR1 if rank == 2 else signal.SIGTERM)}"
            for rank in range(4)]
        worlds = [row["world"] for row in log_of(ranks[0] / "run") if "event" not in row]
        assert worlds.count(4) == 6  # steps 7 to 12


@pytest.mark.usefixtures("signals")
class TestTraining:
    """Runs of two ranks with a fault, against the same ones in `two_ranks` without."""

    def start(self, folder, options, code, patch):
        """Status of train.py --nproc 2 whose ranks do this too."""
        (folder / "rank.py").write_text(TRAIN + FAULTS + textwrap.dedent(code)
                                        + "\ncommand(train.main)")
        patch.setattr(train, "__file__", str(folder / "rank.py"))
        status = train.main([*options, "--nproc", "2"])
        patch.undo()
        return status

    def test_killed_asked_to_stop_and_on_a_slow_disk(self, text, whole_run, two_ranks, tmp_path,
                                                     monkeypatch, capfd):
        out = tmp_path / "r"
        shutil.copytree(whole_run, out)
        options = run_options(text, out)
        code = """
            def fault(run, step):
                not_a_number(run, step)
                if (rank, start, step) == (1, 0, 8):
                    while not (run.states.folder / "step-000000006").exists():
                        time.sleep(0.01)
                    os.kill(os.getpid(), 9)
                if (rank, start, step) == (0, 1, 14):
                    os.kill(os.getppid(), signal.SIGTERM)
                    time.sleep(0.5)"""
        assert self.start(tmp_path, [*options, "--fresh"], code, monkeypatch) == 143
        said = capfd.readouterr().err
        assert "rank 1 was killed by signal 9; going on" in said and "Traceback" not in said
        assert said.count("stopping after this step") == 1
        at = log_of(out)[-1]["step"]
        assert at in (14, 15) and (out / "state" / f"step-{at:09d}").exists()
        assert [row["step"] for row in log_of(out) if "event" in row] == [6]
        code = """
            def slowly(writer, *args, write=train.Writer.write_data):
                time.sleep(0.3)
                Path(f"until-{writer.facts['step']}").write_text(str(steps[-1]))
                return write(writer, *args)
            def fault(run, step):
                steps.append(step)
            train.Writer.write_data, steps = slowly, [0]"""
        options = [word.replace("6", "3") if options[i - 1] == "--save-every" else word
                   for i, word in enumerate(options)]
        assert self.start(tmp_path, options, code, monkeypatch) == 0
        assert int((tmp_path / "until-27").read_text()) > 27  # went on while it was written
        assert losses(out) == losses(two_ranks[2] / "fsdp")[:30]
        assert same_weights(out, two_ranks[2] / "fsdp")

    def test_a_wrong_bit_after_a_spike(self, text, whole_run, two_ranks, tmp_path, monkeypatch,
                                       capfd):
        code = """
            def fault(run, step):
                jumps(run, step)
                if rank == 1 and not start and step == 27 and run.facts["passed"] == 8:
                    w = run.engine.parameters["layers.0.attention.wq.weight"].to_local()
                    w.view(torch.int32)[0, 3] ^= 1 << 20"""
        options = run_options(text, begun(whole_run, tmp_path / "r"), "--dp", "ddp", "--spike")
        assert self.start(tmp_path, options, code, monkeypatch) == 0
        said = capfd.readouterr().err
        assert "error: layers.0.attention.wq.weight of rank 0 or 1 is not what the other" in said
        assert "ended with status 1; going on from the last good state" in said
        wanted = two_ranks[2] / "ddp"
        spikes = [("spike", 18, 22), ("spike", 24, 28)]
        for out, events in ((wanted, spikes),
                            (tmp_path / "r", [*spikes, ("resume", 24, None), spikes[1]])):
            assert [(row["event"], row["step"], row.get("at")) for row in log_of(out)
                    if "event" in row] == events
        assert losses(tmp_path / "r") == losses(wanted)
        assert same_weights(tmp_path / "r", wanted)
        for rank in range(2):  # no text is read twice
            assert (two_ranks[2] / f"read-{rank}").read_text() == repr(list(range(38)))

    def test_spikes_are_left_alone_unless_asked(self, text, whole_run, tmp_path, capsys):
        """And always the same one is not fled from for ever."""
        def jump(run, step):
            factor[0] = 9 if step == 23 else 1
        factor, loss, out = [1], Llama.mean_loss, begun(whole_run, tmp_path / "r")
        options = [*run_options(text, out), "--save-every", "9"]
        with faults(jump) as patch:
            patch.setattr(Llama, "mean_loss", lambda *args: loss(*args) * factor[0])
            train.main(options)
            assert [row["step"] for row in log_of(out)] == list(range(1, 31))
            assert log_of(out)[22]["loss"] > 30
            begun(whole_run, out)
            with pytest.raises(ValueError, match="jumped 5 times before a state after step 18"):
                train.main([*options, "--spike"])
        assert [row["step"] for row in log_of(out) if "event" in row] == [18] * 5

    def test_weights_that_were_set_are_used_at_once(self, two_ranks):
        for rank in range(2):
            first, second = json.loads((two_ranks[2] / f"set-{rank}").read_text())
            assert first == second

    def test_not_a_number_on_one_rank(self, two_ranks):
        rows = log_of(two_ranks[2] / "fsdp")
        assert [row["step"] for row in rows if row.get("loss", 0) is None] == [10]
        assert rows[-1]["skipped"] == 1 and rows[-1]["loss"] < 5.6

    def test_useful_time(self, two_ranks):
        """Steps whose loss was not finite, or that were gone back on, were of no use."""
        for name in ("fsdp", "ddp"):
            useful = 0
            for row in log_of(two_ranks[2] / name):
                if "event" not in row and row["step"] <= 30:
                    useful += row["tokens"] / row["step"] / row["tokens_per_s"] * (
                        row["loss"] is not None)
                    assert row["useful"] == pytest.approx(useful / row["elapsed_s"], abs=2e-3)
            said = re.findall(r"(\d+)% of \d+\.\d minutes went into", two_ranks[1])
            assert 0 < row["useful"] < 1 and said

    def test_full_disk(self, two_ranks):
        folder = two_ranks[2]
        for rank in range(2):
            said = (folder / f"full-{rank}").read_text()
            assert re.match("the state of step 36 could not be written .*File too large.*try", said)
        states = sorted((folder / "fsdp" / "state").iterdir())
        assert [state.name for state in states] == ["step-000000024", "step-000000030"]
        assert [train.States(states[0].parent).check(state)["step"] for state in states] == [24, 30]

    def test_finished(self, two_ranks):
        assert two_ranks[1].count("finished at step 30; --steps N goes on, --fresh starts") == 1

    def test_many_ranks_know_one_number_of_steps(self, two_ranks):
        first, second = ((two_ranks[2] / f"steps-{rank}").read_text() for rank in range(2))
        assert first == second and int(first) > 10

    def test_bench(self, two_ranks):
        lines = (two_ranks[2] / "out").read_text().splitlines()
        benched, = [json.loads(line) for line in lines if line.startswith('{"tokens_per_s"')]
        assert benched["world"] == 2 and benched["layout"]["shards"] == 2

    def test_threads(self, two_ranks, text, whole_run, tmp_path, capsys):
        """Many ranks share the cores; one goes on with the number that it began with."""
        for rank in range(2):
            assert int((two_ranks[2] / f"threads-{rank}").read_text()) == max(
                1, tokenizer.cores() // 2)
        mine, file = torch.get_num_threads(), whole_run / "run.json"
        settings = json.loads(file.read_text())
        asked = {name: value for name, value in settings.items()
                 if name not in ("threads", "code", "steps")}
        out = begun(whole_run, tmp_path / "r", threads=mine + 1)
        assert train.open_run(out, asked, False)["threads"] == torch.get_num_threads() == mine + 1
        torch.set_num_threads(mine)
        del settings["threads"]  # many ranks began it
        (out / "run.json").write_text(json.dumps(settings))
        assert train.open_run(out, asked, False)["threads"] == torch.get_num_threads() == mine

    def test_torchrun_goes_on_without_a_node(self, text, whole_run, ranks, tmp_path):
        """Two agents of torchrun; one ends with its rank at step 9: the other goes on alone."""
        begun(whole_run, tmp_path / "r", dtype="fp32")
        options = run_options(text, tmp_path / "r", "--dtype", "fp32")
        code = f"import sys; sys.path.insert(0, {str(HERE)!r})" + """
import os, time, train
from tokenizer import command
def step(run, go=train.Training.step):
    if run.facts["step"] == 8 and os.environ["NODE"] == "1":
        while not (run.states.folder / "step-000000006").exists():
            time.sleep(0.01)
        os.kill(os.getppid(), 9)
        os.kill(os.getpid(), 9)
    return go(run)
train.Training.step = step
train.time.sleep = lambda seconds, sleep=time.sleep: sleep(seconds / 10)
command(train.main)"""
        (tmp_path / "rank.py").write_text(code)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        agents = []
        for node in (0, 1):
            conf = f"is_host={1 - node},last_call_timeout=1,keep_alive_interval=1"
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2",
                       "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d",
                       "--rdzv-id", "7", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr",
                       "127.0.0.1", "--rdzv-conf", conf, "--monitor-interval", "0.1"]
            agents.append(subprocess.Popen([*command, "rank.py", *options], cwd=tmp_path, text=True,
                                           env=os.environ | {"NODE": str(node)},
                                           stderr=subprocess.PIPE))
        said = [agent.communicate(timeout=100)[1] for agent in agents]
        assert [agent.returncode for agent in agents] == [0, -9], said[0]
        rows = [row for row in log_of(tmp_path / "r") if "event" not in row]
        assert [row["world"] for row in rows] == [2] * 6 + [1] * 24
        with faults(lambda run, step: None):
            train.main([*options, "--out", str(begun(whole_run, tmp_path / "a", dtype="fp32"))])
        nearly_equal(tmp_path / "r", tmp_path / "a")

    def test_fresh_is_not_for_torchrun(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        with pytest.raises(ValueError, match="try without --fresh"):
            train.main(["--fresh", "--out", str(tmp_path)])


class TestIsSpike:
    calm = [3 + 2 * math.exp(-step / 50) + noise / 20 for step, noise in
            enumerate(torch.randn(600, generator=torch.Generator().manual_seed(0)).tolist())]

    def test_no_loss_of_a_calm_run(self):
        assert not any(train.is_spike(self.calm[:at], loss) for at, loss in enumerate(self.calm))

    def test_spikes(self):
        for at in (200, 500):
            before = self.calm[:at]
            assert train.is_spike(before, before[-1] + 1.5)
            assert not train.is_spike(before, before[-1] - 1.5)  # only upwards

    def test_what_it_takes(self):
        assert not train.is_spike([3.0] * 19, 9.0) and train.is_spike([3.0] * 20, 9.0)
        assert not train.is_spike([3.0] * 50, 3.05) and train.is_spike([3.0] * 50, 3.07)
        assert train.is_spike([9.0] * 900 + [3.0] * 100, 4.0)  # what was long ago is no measure
        noisy = [3.0, 3.1] * 25  # median 3.05, all 0.05 from it
        assert not train.is_spike(noisy, 3.05 + 6 * 1.48 * 0.05 - 0.001)
        assert train.is_spike(noisy, 3.05 + 6 * 1.48 * 0.05 + 0.001)


class TestLog:
    def test_picture(self, tmp_path):
        import xml.etree.ElementTree as ElementTree
        rows = [{"tokens": 1000 * (i + 1), "loss": 8 - i / 20} for i in range(100)]
        rows[50]["val_loss"], rows[30]["loss"] = 5.0, None
        train.draw_loss(rows, tmp_path / "loss.svg", "tiny")
        tree = ElementTree.parse(tmp_path / "loss.svg").getroot()
        numbers = list(map(float, tree.find(".//{*}polyline").get("points").split()))
        xs, ys = numbers[::2], numbers[1::2]
        assert len(xs) == 98 and xs == sorted(xs) and ys == sorted(ys)  # falling loss: y grows
        assert min(xs) >= 70 and max(xs) == 620 and min(ys) >= 50 and max(ys) <= 350
        texts = [t.text for t in tree.iter("{http://www.w3.org/2000/svg}text")]
        assert "tokens" in texts and "tiny" in texts
        assert len(list(tree.iter("{http://www.w3.org/2000/svg}circle"))) == 1

    def test_nice_steps(self):
        steps = [train.nice_step(span) for span in (6, 10, 29, 0.7, 6e9)]
        assert steps == [1, 2, 5, pytest.approx(0.2), 1e9]


class TestMistakes:
    """What a user gets wrong is answered in one line with exit status 2."""

    CASES = [
        (["train.py", "--size", "8b"], "no size '8b'"),
        (["train.py", "--set", "dims=3"], "unknown field 'dims'"),
        (["train.py", "--set", "dim"], "FIELD=NUMBER"),
        (["train.py", "--set", "vocab_size=3"], "--vocab-size"),
        (["train.py", "--steps", "-3"], "--steps"),
        (["train.py", "--seq-len", "4096"], "--seq-len 4096"),
        (["train.py", "--data", "nowhere.txt"], "no nowhere.txt"),
        (["train.py", "--data", "README.md=x"], "'x' is not a positive float"),
        (["train.py", "--mixture", "table2", "."], "no mixture 'table2'"),
        (["train.py", "--mixture", "table1", "."], "commoncrawl"),
        (["train.py", "--warmpu", "3"], "--warmpu"),
        (["train.py", "--backward", "hand"], "'manual', 'autograd', 'recompute'"),
        (["train.py", "--compile", "--document-mask"], "try --no-document-mask"),
        (["generate.py", "nowhere"], "nowhere: there is no checkpoint"),
        (["generate.py", "README.md"], "README.md"),
        (["generate.py", "--top-p", "2"], "--top-p"),
    ]

    @pytest.mark.parametrize("command, named", CASES)
    def test_in_process(self, command, named, monkeypatch, capsys, tmp_path):
        out = ["--out", str(tmp_path)] * (command[0] == "train.py")
        monkeypatch.setattr(sys, "argv", command + out)
        monkeypatch.chdir(HERE)
        with pytest.raises(SystemExit) as end:
            tokenizer.command({"train.py": train, "generate.py": generate}[command[0]].main)
        out, err = capsys.readouterr()
        assert end.value.code == 2 and out == "" and "Traceback" not in err
        line = err.splitlines()[-1]
        assert line.startswith("error: ") and named in line and "; try" in line and len(line) < 400

    def test_through_the_shell(self, tmp_path):
        (tmp_path / "data.txt").write_bytes(bytes(range(256)) * 100)
        done = subprocess.run([sys.executable, "train.py", "--data", str(tmp_path), "--out",
                               str(tmp_path / "r")], cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ")
        assert "data.txt" in done.stderr and "Traceback" not in done.stderr

    def test_tokenizer_of_another_size(self, whole_run, tmp_path):
        shutil.copytree(whole_run, tmp_path / "r")
        other = tokenizer.train_sentencepiece((HERE / "llama.py").read_text().splitlines(), 350)
        other.save(tmp_path / "r" / "tokenizer.model")
        with pytest.raises(ValueError, match="350 tokens and the model 400"):
            generate.main([str(tmp_path / "r")])

    def test_prompt_longer_than_the_context(self, whole_run):
        with pytest.raises(ValueError, match="no room in the context of 64"):
            generate.main([str(whole_run), "--prompt", "word " * 100])


class TestReadme:
    def test_every_symbol_exists(self):
        table = re.findall(r"^\|.*\|$", (HERE / "README.md").read_text(), re.M)
        symbols = [s for row in table for s in re.findall(r"`(\w+\.py):([\w.]+)`", row)]
        assert len(symbols) >= 20
        for file, symbol in symbols:
            where = {"llama.py": llama, "train.py": train, "generate.py": generate,
                     "tokenizer.py": tokenizer}[file]
            for part in symbol.split("."):
                where = getattr(where, part)

    def test_one_statement_a_line_of_100_columns(self):
        for name in ("llama", "tokenizer", "generate", "train"):
            source = (HERE / f"{name}.py").read_text()
            assert max(map(len, source.splitlines())) <= 100, name
            nodes = ast.walk(ast.parse(source))
            lines = [node.lineno for node in nodes if isinstance(node, ast.stmt)]
            assert len(lines) == len(set(lines)), f"two statements on a line of {name}.py"
