"""One class of tests per piece, named as the piece; each compares with an oracle that is not ours.

    python -m pytest                              # everything, offline, in about 3 minutes
    python -m pytest -k TestRoPE                  # one piece
    python test_llama.py rank CASE                # what one rank of a test on many ranks does
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small products; a second thread only waits

import ast
import base64
import contextlib
import collections
import ctypes
import functools
import hashlib
import io
import json
import math
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import unicodedata
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import generate
import llama
import tokenizer
import train
from generate import Sampling
from llama import SIZES, KVCache, LayerByHand, Llama, LlamaConfig, Recipe
from train import Layout, arrange

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
NEEDED = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
SMALL = LlamaConfig(dim=48, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=100, vocab_size=97,
                    max_seq_len=64)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens(*shape, vocab=97, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def close(found, wanted, atol=1e-5):
    torch.testing.assert_close(found, wanted, atol=atol, rtol=1e-4, check_dtype=False)


def starts(*offsets):
    """Boundaries (cu_seqlens): offsets at which documents start in the flattened batch, and B T."""
    return torch.tensor(offsets, dtype=torch.int32)


def random_model(config, seed=1, **options):
    """Initial weights, but the norms are random too: a norm that is left out shows."""
    model = Llama.create(config, seed, **options)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(noise(*p.shape, seed=i), alpha=0.1)
    return model


def hf_order(w, n_heads):
    """Rows of wq or wk from Meta's interleaved pairs to the two halves of transformers."""
    rows, columns = w.shape
    return w.view(n_heads, rows // n_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


@pytest.fixture
def hf():
    """transformers' Llama, the oracle of many pieces."""
    return pytest.importorskip("transformers.models.llama.modeling_llama")


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
    if name.endswith("lora_a"):
        return w
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
        assert eps["7b"] == eps["13b"] == eps["33b"] == 1e-6
        assert eps["65b"] == 1e-5 and eps["llama2-7b"] == 1e-5
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

    def test_rounds_before_the_weight(self, hf):
        oracle = hf.LlamaRMSNorm(48, 1e-5).bfloat16()
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


class TestRoPE:
    @pytest.mark.parametrize("config", [
        SMALL, SIZES["llama3.1-8b"][0], SIZES["llama3.2-1b"][0],
        replace(SIZES["llama3.2-3b"][0], rope_theta=1e4)])
    def test_frequencies(self, config):
        rope = pytest.importorskip("transformers.modeling_rope_utils")  # not all of transformers
        theirs = SimpleNamespace(
            head_dim=config.head_dim, standardize_rope_params=lambda: None, rope_parameters={
                "rope_theta": config.rope_theta, "factor": config.rope_scaling or 1,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192})
        kind = "llama3" if config.rope_scaling else "linear"  # by a factor of 1
        oracle = rope.ROPE_INIT_FUNCTIONS[kind](theirs)[0]
        torch.testing.assert_close(llama.rope_frequencies(config), oracle, rtol=1e-5, atol=0)

    def test_rotation_by_complex_numbers(self):
        x, positions = noise(2, 7, 4, 12), torch.arange(3, 10)
        f = 1e4 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
        angle = positions[:, None, None] * f
        z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        wanted = torch.view_as_real(z * torch.exp(1j * angle)).flatten(-2)
        cos, sin = llama.rope_table(replace(SMALL, dim=48), positions)
        close(llama.apply_rope(x, cos, sin), wanted.float())

    def test_worked_example(self):
        """(1, 0) at position 1; the plain formula of Llama 3.1's frequencies in Python's floats."""
        cos, sin = llama.rope_table(SMALL, torch.tensor([1]))
        found = llama.apply_rope(torch.tensor([1.0, 0.0] * 6).view(1, 1, 1, 12), cos, sin)
        close(found[0, 0, 0, :2], torch.tensor([math.cos(1), math.sin(1)]))
        config = replace(SMALL, rope_theta=5e5, rope_scaling=8.0)
        for i, found in enumerate(llama.rope_frequencies(config).tolist()):
            f = 5e5 ** (-2 * i / 12)
            w = 2 * math.pi / f
            m = (8192 / w - 1) / 3
            wanted = f if w < 2048 else f / 8 if w > 8192 else (1 - m) * f / 8 + m * f
            assert found == pytest.approx(wanted, rel=1e-5)

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
    def test_equation(self, hf):
        a, b = noise(5, 7) * 4, noise(5, 7, seed=1)
        close(llama.swiglu(a, b), hf.ACT2FN["silu"](a) * b)
        assert llama.swiglu(torch.tensor(2.0), torch.tensor(3.0)).item() == pytest.approx(5.284782)

    def test_feed_forward(self, hf):
        ours, oracle = random_model(SMALL).layers[0].feed_forward, hf.LlamaMLP(hf_config(SMALL))
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


class TestLlama:
    @pytest.mark.parametrize("change", [
        {}, {"n_kv_heads": 4}, {"n_kv_heads": 1, "tie_embeddings": True},
        {"rope_theta": 5e5, "rope_scaling": 8.0, "dim": 96, "max_seq_len": 131072},
        {"rope_theta": 1e5, "rope_scaling": 32.0, "tie_embeddings": True, "max_seq_len": 131072}])
    def test_logits_loss_and_gradients_of_transformers(self, change, hf):
        model = random_model(replace(SMALL, **change))
        plain = random_model(replace(SMALL, **change), backward="autograd")  # Layer.forward alone
        oracle = oracle_of(model)
        x, y = tokens(2, 40), tokens(2, 40, seed=1)
        theirs = oracle(input_ids=x).logits
        close(model(x), theirs, atol=1e-4)
        close(plain(x), theirs, atol=1e-4)
        loss, wanted = model.loss(x, y), F.cross_entropy(theirs.flatten(0, 1), y.flatten())
        close(loss, wanted, atol=1e-4)
        loss.backward()
        wanted.backward()
        theirs = dict(oracle.named_parameters())
        for name, p in model.named_parameters():
            close(in_hf_order(name, p.grad, model.config), theirs[hf_name(name)].grad, 1e-4)

    def test_rotation_of_transformers_after_the_permutation(self, hf):
        x, positions = noise(1, 9, 4, 12), torch.arange(9)
        halves = x.transpose(1, 2).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        cos, sin = hf.LlamaRotaryEmbedding(hf_config(SMALL))(x, positions[None])
        wanted = hf.apply_rotary_pos_emb(halves, halves, cos, sin)[0]
        found = llama.apply_rope(x, *llama.rope_table(SMALL, positions))
        found = found.transpose(1, 2).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        close(found, wanted)

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
        shapes = [(2, 3, 8), (8,), (8,)]
        for out, width in ((8, 8), kv, kv, (8, 8), (6, 8), (8, 6), (6, 8)):
            shapes += [(out, width), (2, width), (out, 2)]  # W, and A and B of LoRA
        inputs = [noise(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate(shapes)]
        assert torch.autograd.gradcheck(lambda x, *weights: LayerByHand.apply(
            x, *tables, attend, attend_backward, 0.1, llama.TensorParallel(), *weights),
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

    def test_under_autocast(self):
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
        assert made[0] == "LayerByHandBackward" not in made[1:]

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
                run = partial(llama.by_hand, attend_backward=backward, tp=llama.TensorParallel())
                y = layer(x, *tables, partial(forward, positions=positions),
                          run if by_hand else None)
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


    def test_products_run_while_collectives_do(self):
        """The order of LayerByHand's table: "z<" starts a collective, "z>" waits for it, a dot is a
        product with a weight, and a name the product for the gradient of that weight."""
        order, names = [], iter("n H m y dy m dm dh n dn".split())

        class Order(TorchDispatchMode):
            def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
                made = operation(*args, **(kwargs or {}))
                if operation is torch.ops.aten.mm.default:
                    order.append(weights.get(tuple(made.shape), "."))
                return made

        class Noted(llama.TensorParallel):
            def gather(self, x, T):
                name = next(names)
                order.append(f"{name}<")
                return lambda: order.append(f"{name}>") or x

            scatter_sum = gather

        layer, x = random_model(SMALL).layers[0], noise(1, 7, 48).requires_grad_()
        weights = {tuple(p.shape): name.split(".")[-2] for name, p in layer.named_parameters()}
        forward, backward = llama.ATTENTION["fused"]
        attend = partial(forward, positions=torch.arange(7))
        tables = llama.rope_table(SMALL, torch.arange(7))
        with Order():
            y = llama.by_hand(layer, x, *tables, attend, backward, Noted())
            del order[:]
            y.sum().backward()
        assert " ".join(order) == (
            "dy< m< dy> . . . dm< w2 m> w3 w3 dm> dh< n< dh> . . . . dn< wo n> wo wv wv dn>")


class TestLoss:
    """Four rows of logits at once, so that 18 rows are five chunks and the last is shorter."""

    @pytest.fixture(autouse=True)
    def chunks(self, monkeypatch):
        monkeypatch.setattr(llama, "logit_rows", lambda *_: 4)

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
        logits = F.linear(h.to(dtype), w.to(dtype)).float()  # from there on all is in fp32
        close(half[0], F.cross_entropy(logits, targets, reduction="none"))

    def test_a_second_backward_is_refused(self):
        h, w, targets = self.inputs()
        loss = 3 * llama.SumNLL.apply(h.requires_grad_(), w.requires_grad_(), targets,
                                      llama.TensorParallel())
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
        assert {shape: llama.logit_rows(*shape) for shape in shapes} == shapes
        monkeypatch.setattr(llama, "logit_rows", lambda *_: 4)
        h, w, targets = noise(400, 4), noise(97, 4, seed=1), tokens(400)
        with Calls() as seen:
            llama.next_token_nll(h, w, targets, (True, True))
        logits = [shape for shape in seen.shapes if 97 in shape and shape != w.shape]
        assert max(map(math.prod, logits)) == 4 * 97

    def test_targets_that_do_not_count(self):
        model, x, y = random_model(SMALL), tokens(2, 9), tokens(2, 9, seed=1)
        y[0, :4] = y[1, 7] = -1
        h, nll = model.hidden(x), F.cross_entropy(model(x).mT, y, ignore_index=-1, reduction="none")
        close(model.loss(x, y, reduction="sum"), nll.sum())
        close(model.loss(x, y), nll.sum() / 13)
        close(model.loss_of(h, y), nll.sum() / 13)
        assert model.loss(x, torch.full_like(y, -1)).item() == 0
        mine = torch.autograd.grad(model.loss(x, y), list(model.parameters()))
        theirs = torch.autograd.grad(nll.sum() / 13, list(model.parameters()))
        for one, other in zip(mine, theirs):
            close(one, other)
        with pytest.raises((IndexError, RuntimeError)):
            model.loss(x, y + 97)


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

    def test_written_in_its_own_type(self):
        model, x = random_model(SMALL, dtype=torch.bfloat16), tokens(2, 9)
        wanted = random_model(SMALL)(x)
        cache, kinds = KVCache(SMALL, 2, 9, torch.float32), set()  # as for fp16 on a CPU
        model.layers[0].register_forward_hook(lambda m, i, o: kinds.add(o.dtype))
        found = torch.cat([model(x[:, :5], cache), model(x[:, 5:6], cache)], 1)
        cache.lengths = [6, 4]
        model(x[:, 6:8], cache)
        assert (found - wanted[:, :6]).abs().mean() < 0.05 * wanted.abs().mean()
        assert {x.dtype for pair in cache.held for x in pair} == {torch.float32}
        assert kinds == {torch.bfloat16}

    def test_takes_rows_of_another(self):
        model, x = random_model(SMALL), tokens(2, 9)
        small, large = KVCache(SMALL, 2, 5), KVCache(SMALL, 3, 9)
        model(x[:, :5], small)
        large.take(small, [1, 0, 1])
        assert large.lengths == [5, 5, 5]
        close(model(x[[1, 0, 1], 5:], large), model(x)[[1, 0, 1], 5:])

    def test_sized_to_the_request(self):
        cache = KVCache(SIZES["llama2-70b"][0], 1, 100, torch.bfloat16, "meta")
        held = sum(k.nbytes + v.nbytes for k, v in cache.held)
        assert held == 100 * 327680  # 4 L K E bytes a token in bf16


FP16, BF16 = torch.float16, torch.bfloat16
WIDE = replace(SMALL, dim=256, n_layers=1, n_heads=4, hidden_dim=512)  # whole blocks of 256
SCALED = {"rope_scaling": 32.0, "max_seq_len": 16384}
PLAIN_HF = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 100,
            "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
GGUF_NAMES = dict(zip(HF_NAMES, (
    "token_embd", "output_norm", "output", "attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v",
    "attn_output", "ffn_gate", "ffn_down", "ffn_up")))


def state_of(model):
    return {name: w.detach().clone() for name, w in model.named_parameters()}


def state_equal(model, wanted):
    """Are all weights of the model those of a state dict, bit for bit?"""
    found = model.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


# Writers, none of which is the project's but save_meta: each writes a checkpoint of the model into
# a folder and returns (path to load, {name: what the file then holds}).


def save_meta(folder, model):
    weights = {name: generate.Weight(w.shape, w.dtype, (), lambda w=w: w)
               for name, w in state_of(model).items()}
    generate.write_meta(model.config, weights, folder)
    return folder, state_of(model)


def save_shards(folder, model, n=2, axis=0):
    """Meta's folder in n shards; the embedding is cut along `axis`."""
    folder.mkdir(exist_ok=True)
    shards = [{"rope.freqs": torch.zeros(6)} for _ in range(n)]
    for name, w in state_of(model).items():
        kind, pieces = name.split(".")[-2], [w] * n
        if w.dim() == 2:
            along = axis if kind == "tok_embeddings" else int(kind in ("wo", "w2"))
            repeat = max(1, n // model.config.n_kv_heads) if kind in ("wk", "wv") else 1
            pieces = [piece for piece in w.chunk(n // repeat, along) for _ in range(repeat)]
        for shard, piece in zip(shards, pieces):
            shard[name] = piece.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    (folder / "params.json").write_text(json.dumps(generate.write_params(model.config)))
    return folder, state_of(model)


def save_hf(folder, model, dtype=torch.float32, size="1GB", version=5):
    """A folder that transformers writes. Version 4: with its fields, but no default."""
    oracle_of(model).to(dtype).save_pretrained(folder, max_shard_size=size)
    assert (size != "1GB") == (len(list(folder.glob("*.safetensors"))) > 1)
    if version == 4:
        config = json.loads((folder / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "pretraining_tp": 2}
        for name in ("head_dim", "num_key_value_heads", "attention_bias", "mlp_bias"):
            del config[name]
        (folder / "config.json").write_text(json.dumps(config))
    return folder, {name: w.to(dtype) for name, w in state_of(model).items()}


def save_bin(folder, model, names=("pytorch_model.bin",)):
    """transformers' .bin, with an index if there are several; what stands beside is passed over."""
    save_hf(folder, model)
    (folder / "model.safetensors").rename(folder / "model (1).safetensors")
    table = oracle_of(model).state_dict()
    table["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # in old files
    for name in ("._pytorch_model.bin", "adapter_model.safetensors", "consolidated.safetensors"):
        (folder / name).write_bytes(b"of no interest")
    where = {name: names[i % len(names)] for i, name in enumerate(table)}
    for file in names:
        torch.save({name: w for name, w in table.items() if where[name] == file}, folder / file)
    if len(names) > 1:
        index = json.dumps({"weight_map": where})
        (folder / "pytorch_model.bin.index.json").write_text(index)
    return folder / names[-1], state_of(model)  # one of them stands for all


def save_pt(folder, model, prefix=""):
    """llama2.c's checkpoint of training, with the output beside the embedding that it is."""
    table = {prefix + name: w for name, w in state_of(model).items()}
    table[prefix + "output.weight"] = table[prefix + "tok_embeddings.weight"]
    names = "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len"
    args = {name: getattr(model.config, name) for name in names}
    folder.mkdir(exist_ok=True)
    torch.save({"model": table, "model_args": args | {"multiple_of": 32, "dropout": 0.1},
                "optimizer": {"state": {0: torch.zeros(3)}}}, folder / "ckpt.pt")
    return folder / "ckpt.pt", state_of(model)


def save_llama2c(folder, model, version=0):
    """llama2.c's .bin, from its description. In version 2 groups of 8 share a scale."""
    c, stored = model.config, state_of(model)
    kinds = ("tok_embeddings layers.attention_norm layers.attention.wq layers.attention.wk "
             "layers.attention.wv layers.attention.wo layers.ffn_norm layers.feed_forward.w1 "
             "layers.feed_forward.w2 layers.feed_forward.w3 norm").split()
    if version:
        kinds = [kinds[i] for i in (1, 6, 10, 0, 2, 3, 4, 5, 7, 8, 9)]
    parts = [stored[f"{kind.replace('layers', f'layers.{i}')}.weight"] for kind in kinds
             for i in range(c.n_layers if "layers" in kind else 1)]
    if version == 0:
        parts.append(torch.full((c.max_seq_len * c.head_dim,), math.nan))  # cos and sin
    if not c.tie_embeddings:
        parts.append(stored["output.weight"])
    vocab = c.vocab_size if c.tie_embeddings or version else -c.vocab_size
    header = struct.pack("<7i", c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, vocab,
                         c.max_seq_len)
    if version:
        header = struct.pack("<Ii", 0x616b3432, version) + header
        header += struct.pack("<Bi", c.tie_embeddings, 8) + bytes(256 - 41)
    folder.mkdir(exist_ok=True)
    with open(folder / "model.bin", "wb") as file:
        file.write(header)
        for part in parts:
            data = part.numpy().tobytes()
            if version == 2 and part.dim() == 2:
                scales = part.view(-1, 8).abs().amax(1) / 127
                int8 = (part.view(-1, 8) / scales[:, None]).round().to(torch.int8)
                data = int8.numpy().tobytes() + scales.numpy().tobytes()
                part.copy_(int8.float().mul(scales[:, None]).view_as(part))
            file.write(data)
    return folder / "model.bin", stored


def save_gguf(folder, model, kind="F32", extra=lambda writer: None):
    """A GGUF file by the package gguf, from transformers' weights as llama.cpp converts them."""
    import gguf
    folder.mkdir(exist_ok=True)
    c, stored = model.config, {}
    w = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for name, value in {
            "context_length": c.max_seq_len, "embedding_length": c.dim, "block_count": c.n_layers,
            "feed_forward_length": c.hidden_dim, "head_count": c.n_heads, "key_length": c.head_dim,
            "head_count_kv": c.n_kv_heads, "layer_norm_rms_eps": c.norm_eps,
            "rope_freq_base": c.rope_theta, "rope_dimension_count": c.head_dim,
            "value_length": c.head_dim, "tokenizer_model": "llama",
            "token_list": [f"piece {i}" for i in range(c.vocab_size)],
            "token_scores": [0.5] * c.vocab_size}.items():
        getattr(w, f"add_{name}")(value)
    extra(w)
    if c.rope_scaling:
        f = 1e4 ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        m = ((8192 * f / (2 * math.pi) - 1) / 3).clamp(0, 1)
        w.add_tensor("rope_freqs.weight", (f / ((1 - m) * f / c.rope_scaling + m * f)).numpy())
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    for name, x in state_of(model).items():
        x = in_hf_order(name, x, c)
        heads = {"wq": c.n_heads, "wk": c.n_kv_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp's permute
            x = x.reshape(heads, 2, len(x) // heads // 2, -1).transpose(1, 2).reshape(x.shape)
        layer, what = re.fullmatch(r"(layers\.\d+\.)?(.*)\.weight", name).groups()
        theirs = f"{(layer or '').replace('layers', 'blk')}{GGUF_NAMES[what]}.weight"
        stored[name] = x
        if x.dim() == 1 or kind.name == "F32":
            w.add_tensor(theirs, x.numpy())
            continue
        try:
            data = gguf.quants.quantize(x.numpy(), kind)
        except NotImplementedError:  # gguf decodes this type alone: any blocks will do
            data = np.random.default_rng(0).integers(0, 60, (len(x), x.shape[1] // block * size),
                                                     dtype=np.uint8)
        w.add_tensor(theirs, data, raw_dtype=kind)
        half = {"F16": FP16, "BF16": BF16}.get(kind.name, torch.float32)
        stored[name] = torch.from_numpy(gguf.quants.dequantize(data, kind)).to(half)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return folder / "model.gguf", stored


TIED = {"tie_embeddings": True}
TABLE = [  # (writer, its options, change of SMALL or a whole config)
    (save_meta, {}, {}), (save_meta, {}, {"hidden_dim": 500}), (save_meta, {}, {"head_size": 20}),
    (save_meta, {}, {"hidden_dim": 128}), (save_meta, {}, {**TIED, **SCALED, "rope_theta": 5e5}),
    *((save_shards, {"n": n, "axis": axis}, {"vocab_size": 96, **change}) for n, axis, change in (
        (2, 0, {}), (2, 1, {"n_kv_heads": 4}), (4, 0, {}), (4, 1, {"dim": 64, "n_heads": 8}),
        (4, 1, {"n_kv_heads": 1, "head_size": 16}))),
    *((save_hf, {}, change) for change in (
        {}, {"n_kv_heads": 4}, {"n_kv_heads": 1}, TIED, {"norm_eps": 0.3}, {"rope_theta": 50.0},
        {**SCALED, "rope_scaling": 8.0}, SCALED)),
    (save_hf, {"dtype": BF16}, {}), (save_hf, {"dtype": FP16}, TIED),
    (save_hf, {"dtype": BF16, "size": "60KB"}, {}),
    (save_hf, {"version": 4}, {"n_kv_heads": 4, **SCALED}),
    (save_bin, {}, TIED), (save_bin, {"names": ("1.bin", "2.bin")}, {}),
    *((save_pt, {"prefix": prefix}, {"hidden_dim": 128, **TIED})
      for prefix in ("", "_orig_mod.", "module.")),
    *((save_llama2c, {"version": version}, {"hidden_dim": 96, **tied})
      for version in (0, 1, 2) for tied in ({}, TIED)),
    (save_gguf, {}, SCALED), (save_gguf, {}, {**SCALED, **TIED, "rope_scaling": 8.0}),
    (save_gguf, {}, {"head_size": 20}),
    *((save_gguf, {"kind": kind}, WIDE) for kind in (
        "F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_NL"))]


def empty_weight(*shape):
    return generate.Weight(shape, BF16, (torch.empty(shape, device="meta"),))


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("code in a pickle was executed",)


class TestFormats:
    """Whatever wrote a checkpoint: config, every number and the logits are those that it holds."""

    @pytest.mark.parametrize("writer, options, change", TABLE)
    def test_reads(self, tmp_path, writer, options, change):
        config = change if isinstance(change, LlamaConfig) else replace(SMALL, **change)
        path, stored = writer(tmp_path / "in", random_model(config), **options)
        model = generate.load(path)
        assert model.config == config and not model.training
        wide = {name: w.float() for name, w in stored.items()}
        assert state_equal(generate.load(path, dtype=torch.float32), wide)
        half = {name: w.to(BF16) for name, w in stored.items()}
        assert state_equal(generate.load(path, dtype=BF16), half)
        assert model.norm.weight.dtype == stored["tok_embeddings.weight"].dtype

    @pytest.mark.parametrize("change", [{}, {"n_kv_heads": 1, **SCALED}])
    def test_logits_of_transformers(self, tmp_path, hf, change):
        """The order of wq and wk, and the frequencies, as transformers reads its own files."""
        from transformers import LlamaForCausalLM
        model = random_model(replace(SMALL, **change))
        x = tokens(2, 60)
        for writer in (save_hf, save_gguf):
            path, _ = writer(tmp_path / writer.__name__, model)
            folder = tmp_path / "save_hf"
            with torch.no_grad():
                wanted = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(x).logits
                close(generate.load(path)(x), wanted, atol=1e-4)

    @pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
    def test_stories260k(self):
        """A published file, and the greedy text that llama2.c's own program makes of it."""
        folder = SHARED / "data" / "stories260K"
        model = generate.load(folder / "stories260K.bin")
        assert model.config == SIZES["stories260k"][0]
        cache, ids = KVCache(model.config, 1, 200), [1]
        with torch.no_grad():
            for _ in range(200):
                ids.append(int(model(torch.tensor([ids[-1:]]), cache)[0, -1].argmax()))
        text = tokenizer.load_tokenizer(folder / "tok512.bin").decode(ids)
        assert text.strip() == (folder / "expected_greedy_200.txt").read_text().strip()

    def test_published_params(self):
        llama3 = {"n_heads": 32, "n_kv_heads": 8, "norm_eps": 1e-05, "rope_theta": 500000.0,
                  "use_scaled_rope": True, "vocab_size": 128256}
        published = {  # as Meta's files have them
            "7b": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32,
                   "norm_eps": 1e-06, "vocab_size": -1},
            "llama2-70b": {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3,
                           "n_heads": 64, "n_kv_heads": 8, "n_layers": 80, "norm_eps": 1e-05,
                           "vocab_size": -1},
            "llama3.1-8b": {"dim": 4096, "ffn_dim_multiplier": 1.3, "multiple_of": 1024,
                            "n_layers": 32, **llama3},
            "llama3.2-1b": {"dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256,
                            "n_layers": 16, "max_batch_size": 6, **llama3}}
        for name, params in published.items():
            config = SIZES[name][0]
            weights = {"tok_embeddings.weight": empty_weight(config.vocab_size, config.dim)}
            if not config.tie_embeddings:
                weights["output.weight"] = empty_weight(config.vocab_size, 0)
            assert generate.read_params(params, [weights]) == config
        other = generate.read_params({**params, "rope_scaling_factor": 16, "max_seq_len": 9},
                                     [weights])
        assert other == replace(config, rope_scaling=16, max_seq_len=9)
        unknown = {**params, "n_layers": 3}  # a shape that is in no size: 3.1's factor
        assert generate.read_params(unknown, [weights]).rope_scaling == 8

    STRICT = {  # what the message says: what is done to the weights
        "extra is .48,., not known": lambda w: w.update(extra=w["norm.weight"]),
        "norm.weight is missing": lambda w: w.pop("norm.weight"),
        "wk.weight is .24, 40.": lambda w: w.update(
            {"layers.1.attention.wk.weight": torch.zeros(24, 40)}),
        "norm.weight is of torch.int64": lambda w: w.update({"norm.weight": torch.arange(48)}),
        "KeyError.*tok_emb": lambda w: w.pop("tok_embeddings.weight"),
        "could run code": lambda w: w.update(x=Bomb())}

    @pytest.mark.parametrize("named", STRICT)
    def test_strict(self, tmp_path, named):
        folder, weights = save_meta(tmp_path / "in", random_model(SMALL))
        self.STRICT[named](weights)
        torch.save(weights, folder / "consolidated.00.pth")
        with pytest.raises(ValueError, match=named):
            generate.load(folder)

    @pytest.mark.parametrize("gone", [[0], [1], [3], [2, 3], [0, 1, 2, 3]])
    def test_a_missing_shard_is_named(self, tmp_path, gone):
        folder, _ = save_shards(tmp_path, random_model(replace(SMALL, vocab_size=96)), 4, 1)
        for i in gone:
            (folder / f"consolidated.{i:02}.pth").unlink()
        with pytest.raises(ValueError, match=f"consolidated.{gone[0]:02}.pth is missing"):
            generate.load(folder)

    @pytest.mark.parametrize("named, change", [
        ("different tensors", {"extra": torch.zeros(3)}),
        ("wq.weight in different shapes", {"layers.1.attention.wq.weight": torch.zeros(3, 48)})])
    def test_shards_that_do_not_fit_together(self, tmp_path, named, change):
        folder, _ = save_shards(tmp_path, random_model(replace(SMALL, vocab_size=96)))
        shard = torch.load(folder / "consolidated.01.pth") | change
        torch.save(shard, folder / "consolidated.01.pth")
        with pytest.raises(ValueError, match=named):
            generate.load(folder)

    def test_an_adapter_alone_is_no_checkpoint(self, tmp_path):
        (tmp_path / "adapter_model.safetensors").write_bytes(b"12345678{}")
        with pytest.raises(ValueError, match="adapter"):
            generate.load(tmp_path)

    def test_oldest_config(self):
        oldest = PLAIN_HF | {"max_sequence_length": 2048, "architectures": ["LLaMAForCausalLM"]}
        assert generate.read_hf_config(oldest) == LlamaConfig(64, 3, 4, 4, 100, 97, 2048, 1e-6)

    def test_a_single_file_is_told_by_what_is_in_it(self, tmp_path, hf):
        folder, stored = save_hf(tmp_path, random_model(SMALL))
        assert state_equal(generate.load(folder / "config.json"), stored)
        file = (folder / "model.safetensors").rename(folder / "weights.of.mine")
        assert state_equal(generate.load(file), stored)

    HF_REFUSED = {
        **{f"{name}={value!r}": {name: value} for name, value in (
            ("model_type", "mixtral"), ("hidden_act", "gelu"), ("attention_bias", True),
            ("mlp_bias", True), ("sliding_window", 4096), ("num_local_experts", 8),
            ("partial_rotary_factor", 0.5))},
        "quantization_config": {"quantization_config": {"bits": 4}},
        "type='linear'": {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_type='yarn'": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        "low_freq_factor=2.0": {"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 2.0}},
        "original_max_position_embeddings=4096": {"rope_scaling": {
            **LLAMA3_ROPE, "original_max_position_embeddings": 4096}}}

    @pytest.mark.parametrize("named", HF_REFUSED)
    def test_an_option_of_transformers_that_is_not_implemented(self, named):
        plain = PLAIN_HF | {"rope_scaling": LLAMA3_ROPE, "pretraining_tp": 4, "use_cache": True}
        assert generate.read_hf_config(plain).rope_scaling == 8
        with pytest.raises(ValueError, match=named):
            generate.read_hf_config(PLAIN_HF | self.HF_REFUSED[named])

    GGUF_REFUSED = {
        "expert_count": lambda w: w.add_expert_count(8),
        "rope.scaling.type": lambda w: w.add_string("llama.rope.scaling.type", "linear"),
        "sliding_window": lambda w: w.add_sliding_window(4096),
        "logit_scale": lambda w: w.add_logit_scale(0.5),
        "one of 2 parts": lambda w: w.add_uint16("split.count", 2),
        "rope_freqs.weight": lambda w: w.add_tensor(
            "rope_freqs.weight", np.linspace(1, 8, 6, dtype=np.float32)),
        "unknown blk.7.x": lambda w: w.add_tensor("blk.7.x", np.zeros(4, np.float32)),
        "type 26": lambda w: w.add_tensor("a", np.zeros((4, 4), np.int32))}

    @pytest.mark.parametrize("named", GGUF_REFUSED)
    def test_an_option_of_gguf_that_is_not_implemented(self, tmp_path, named):
        path, _ = save_gguf(tmp_path, random_model(SMALL), extra=self.GGUF_REFUSED[named])
        with pytest.raises(ValueError, match=named):
            generate.load(path)

    def test_quantised_gguf_without_the_package(self, tmp_path, monkeypatch):
        native, _ = save_gguf(tmp_path / "native", random_model(WIDE), "F16")
        quantised, _ = save_gguf(tmp_path / "quantised", random_model(WIDE), "Q8_0")
        monkeypatch.setitem(sys.modules, "gguf", None)
        generate.load(native)
        with pytest.raises(ValueError, match="try pip install -U gguf"):
            generate.load(quantised)


class TestExport:
    @pytest.mark.parametrize("dtype, change", [
        (torch.float32, {}), (BF16, TIED), (torch.float32, {"head_size": 24}),
        (torch.float32, {"n_kv_heads": 1, **SCALED})])
    @pytest.mark.parametrize("format", ["meta", "hf", "llama2c"])
    def test_in_out_in_is_bit_equal(self, tmp_path, hf, format, dtype, change):
        from transformers import LlamaForCausalLM
        source, stored = save_shards(tmp_path / "in", random_model(replace(SMALL, vocab_size=96,
                                                                           **change)).to(dtype))
        out = tmp_path / "out"
        if format == "llama2c" and change.keys() & {"head_size", "rope_scaling"}:
            with pytest.raises(ValueError, match="head_size|rope_scaling"):
                generate.export(source, format, out)
            assert not out.exists()
            return
        generate.export(source, format, out)
        again = generate.load(out, dtype=dtype)
        assert again.config == generate.load(source).config and state_equal(again, stored)
        names = {"meta": {"consolidated.00.pth", "params.json"},
                 "hf": {"model.safetensors", "config.json"}}.get(format)
        assert names is None or {file.name for file in out.iterdir()} == names
        if format == "hf":
            theirs, x = LlamaForCausalLM.from_pretrained(out), tokens(2, 60, vocab=96)
            assert theirs.dtype == dtype
            with torch.no_grad():
                close(again.float()(x), theirs.float()(x).logits, atol=1e-4)

    def test_what_is_there_stays(self, tmp_path):
        save_meta(tmp_path / "in", random_model(SMALL))
        with pytest.raises(ValueError, match="no format 'gguf'; try one of meta, hf, llama2c"):
            generate.export(tmp_path / "in", "gguf", tmp_path / "out")
        for format, out in (("hf", "in"), ("llama2c", "in/params.json")):
            with pytest.raises(ValueError, match="exists already"):
                generate.export(tmp_path / "in", format, tmp_path / out)

    @pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
    def test_a_full_disk_keeps_what_was_there(self, tmp_path):
        import resource
        save_meta(tmp_path / "in", random_model(SMALL))
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the kernel refuses larger files
        old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            with pytest.raises(OSError, match="could not be written.*try to free space"):
                save_meta(tmp_path / "in", random_model(SMALL, seed=2))
            for format in generate.EXPORTS:
                with pytest.raises(OSError, match="could not be written.*try to free space"):
                    generate.export(tmp_path / "in", format, tmp_path / "out" / format)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, old)
        assert before == {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}


def memory(field):
    """Of this process, in bytes, by its name in /proc/self/status."""
    return 1024 * int(re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak_memory(act, field="VmRSS", most="VmHWM"):
    """The most memory that act() holds beyond what there was before, mapped pages included, in
    bytes: the least of three runs, for the kernel counts pages by processor and a little late."""
    used, libc = [], ctypes.CDLL(None)
    for _ in range(3):
        with contextlib.suppress(AttributeError):  # glibc: what is freed goes back to the system
            libc.mallopt(-3, 1 << 18)
            libc.malloc_trim(0)
        before = memory(field)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        held = act()
        used.append(memory(most) - before)
        del held
    with contextlib.suppress(AttributeError):
        libc.mallopt(-3, 1 << 25)
    return min(used)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestStreaming:
    """Memory is taken tensor by tensor, whatever the format."""
    CONFIG = replace(SMALL, dim=768, n_layers=2, hidden_dim=3072, vocab_size=1024)
    LARGEST, SLACK = 4 * 3072 * 768, 15e6  # bytes in fp32; the kernel maps up to 2 MB at a time
    WRITERS = {"meta": save_meta, "hf": save_hf, "F32": save_gguf, "llama2c": save_llama2c,
               "Q8_0": partial(save_gguf, kind="Q8_0"), "shards": save_shards}

    @pytest.fixture(scope="class")
    @classmethod
    def saved(cls, tmp_path_factory):
        """{kind: path to load}; shards are of 16 bits, as all published ones."""
        folder, model = tmp_path_factory.mktemp("saved"), Llama.create(cls.CONFIG, 0)
        paths = {}
        for kind, writer in cls.WRITERS.items():
            paths[kind], _ = writer(folder / kind, model.to(BF16) if kind == "shards" else model)
        return paths

    @pytest.mark.parametrize("kind", WRITERS)
    def test_loading_takes_the_weights_and_one_tensor(self, saved, kind):
        used = peak_memory(partial(generate.load, saved[kind], dtype=BF16))
        temporary = 3 * self.LARGEST if kind == "Q8_0" else self.LARGEST  # in the package gguf
        assert used < 2 * self.CONFIG.n_params + temporary + self.SLACK  # a layer has 35 MB

    @pytest.mark.parametrize("kind", ["meta", "F32", "llama2c"])
    def test_mapped(self, saved, kind):
        assert peak_memory(partial(generate.load, saved[kind]), "RssAnon", "RssAnon") < 4e6

    def test_quantising_takes_a_layer_and_the_integers(self, saved):
        used = peak_memory(partial(generate.open_model, saved["F32"], torch.float32, "int8"))
        assert used < 130e6  # all pages of the file would be 35 MB more

    def test_exporting_takes_one_tensor(self, saved, tmp_path):
        paths = iter("abc")

        def act():
            generate.export(saved["meta"], "hf", tmp_path / next(paths))
        assert peak_memory(act) < self.LARGEST + self.SLACK

    @pytest.mark.parametrize("kind", ["meta", "hf"])
    def test_a_fresh_process_loads_no_compiler_and_keeps_the_file(self, saved, kind):
        code = (f"import sys, {generate.__name__} as g; model = g.load({str(saved[kind])!r}); "
                "model.norm.weight.data.add_(1); sys.exit('torch._dynamo' in sys.modules)")
        before = generate.load(saved[kind]).norm.weight.clone()
        assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0
        assert torch.equal(generate.load(saved[kind]).norm.weight, before)


LITTLE = LlamaConfig(16, 2, 2, 1, 32, 19, 32)


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
        paths = {"gguf": (save_gguf, {"kind": "F16"}), "pt": (save_pt, {})}
        paths |= {f"bin{version}": (save_llama2c, {"version": version}) for version in (0, 1, 2)}
        for name, (writer, options) in paths.items():
            path, _ = writer(folder / name, model, **options)
            paths[name] = path, path
        meta, hf = folder / "meta", folder / "hf"
        save_meta(meta, model)
        generate.export(meta, "hf", hf)
        several, _ = save_hf(folder / "several", model, size="2KB")
        return paths | {"index": (several, several / "model.safetensors.index.json"),
                        "pth": (meta, meta / "consolidated.00.pth"),
                        "params": (meta, meta / "params.json"),
                        "safetensors": (hf, hf / "model.safetensors"),
                        "config": (hf, hf / "config.json")}

    @staticmethod
    def refused(path, file, data, must=True):
        """Loads `path` with `data` in one of its files: a model, or one line that says why not."""
        whole = file.read_bytes()
        file.unlink()  # a new file: the old one may be mapped
        file.write_bytes(data)
        try:
            model = generate.load(path)
            assert not must and isinstance(model, Llama)
        except (ValueError, OSError) as error:
            text = str(error)
            assert text and "\n" not in text and len(text) < 1000
            assert isinstance(error, OSError) or str(path) in text and "; try " in text, text
            return text
        finally:
            file.unlink()
            file.write_bytes(whole)

    ENTRIES = [  # changes of one tensor's entry
        {"dtype": "I64"}, {"dtype": []}, {"dtype": None}, {"shape": "19"}, {"shape": [16, 19]},
        {"shape": [-19, -16]}, {"shape": [19.0, 16.0]}, {"shape": [True, 304]},
        {"shape": [2**62, 2**62]}, {"shape": [2] * 10**5}, {"shape": [0, 16]},
        {"shape": [0, 16], "data_offsets": [0, 0]}, {"data_offsets": [10**9, 10**9 + 1216]},
        {"data_offsets": [-1216, 0]}, {"data_offsets": [1216, 0]}, {"data_offsets": [0, 1, 2]},
        {"data_offsets": [4, 1220]}, {"data_offsets": [1, 1217]}, {"data_offsets": [0, 1212]}]
    HEADERS = [  # other changes; a text takes the header's place
        *(lambda h, change=change: h["lm_head.weight"].update(change) for change in ENTRIES),
        lambda h: h["lm_head.weight"].pop("dtype") and None,
        lambda h: h.update({"lm_head.weight": 3}),
        lambda h: h.pop("lm_head.weight") and None, lambda h: h.update(x=h["lm_head.weight"]),
        lambda h: h.update({"norm.weight": h.pop("model.norm.weight")}),
        lambda h: h.update({"a\nb": h.pop("model.norm.weight")}),
        lambda h: "[]", lambda h: "{", lambda h: "[" * 10**5,
        lambda h: json.dumps(h)[:-1] + ', "model.norm.weight": {}}',
        lambda h: '{"a": ' + "9" * 5000 + "}"]

    @pytest.mark.parametrize("change", HEADERS)
    def test_safetensors(self, good, change):
        path, file = good["safetensors"]
        size, = struct.unpack("<Q", (whole := file.read_bytes())[:8])
        header = json.loads(whole[8:8 + size])
        text = (change(header) or json.dumps(header)).encode()
        text += b" " * (-len(text) % 8)
        self.refused(path, file, struct.pack("<Q", len(text)) + text + whole[8 + size:])

    NUMBERS = {  # (place in the file, its type in struct, values that lie)
        "safetensors": [(0, "Q", (0, 3, 10**4, 2**63))],
        "gguf": [(4, "I", (1, 0x03000000)), (8, "Q", (0, 2**63)), (16, "Q", (0, 2**64 - 1)),
                 (24, "Q", (0, 10**4, 2**62))],
        "bin0": [(4 * i, "i", (0, -1, 5, 2**31 - 1, -2**31)) for i in range(6)],
        "bin1": [(8 + 4 * i, "i", (0, -1, 5, 2**31 - 1, -2**31)) for i in range(6)],
        "bin2": [(4, "i", (3,)), (36, "B", (1,)), (37, "i", (0, -4, 7))]}

    @pytest.mark.parametrize("name", NUMBERS)
    def test_numbers_that_lie_and_files_cut_short(self, good, name):
        path, file = good[name]
        whole = file.read_bytes()
        for at, form, values in self.NUMBERS[name]:
            for value in values:
                number = struct.pack("<" + form, value)
                self.refused(path, file, whole[:at] + number + whole[at + len(number):])
        for data in (b"", whole[:4], whole[:8], whole[:30], whole[:100], whole[:-4]):
            self.refused(path, file, data)
        if name.startswith("bin"):
            self.refused(path, file, whole + b"0000")

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
        with pytest.raises(ValueError, match="beyond the file's end"):
            generate.gguf_fields(tmp_path / "m")
        self.refused(tmp_path / "m", tmp_path / "m", data)

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
                                      '{"model_type": "llama", "rope_scaling": [1]}',
                                      '{"weight_map": {"a": "../../../etc/passwd"}}', *(
        json.dumps(generate.write_params(LITTLE) | change) for change in (
            {"dim": "48"}, {"multiple_of": 0}, {"n_layers": 10**9}, {"moe": {}}, {"n_heads": None},
            {"dim": 10**400}, {"ffn_dim_multiplier": math.nan}, {"norm_eps": "x"}))])
    def test_json(self, good, text):
        for name in ("params", "config", "index"):
            self.refused(*good[name], text.encode())

    @pytest.mark.parametrize("name", ["safetensors", "gguf", "pt", "pth", "bin0", "bin1", "bin2",
                                      "params", "config", "index"])
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


PROSE = ("It is a truth universally acknowledged, that a single man in possession of 1000 pounds\n"
         "    must be in want of a wife.  Don't you think so?\n\nÇa va: 42!\n")


@pytest.fixture(scope="module")
def words():
    """A small SentencePiece model."""
    return tokenizer.train_sentencepiece([PROSE * 5, "x = 12\n        y = 345\n" * 20], 400)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, words):
    """A small checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    save_meta(folder, random_model(replace(SMALL, dim=64, vocab_size=400, max_seq_len=128)))
    words.save(folder / "tokenizer.model")
    return folder


@pytest.fixture
def reads(monkeypatch):
    """Notes what models read, call by call: (after how many tokens, ids, what comes out)."""
    hidden, calls = Llama.hidden, []

    def noted(model, ids, cache=None, *more):
        at = cache and cache.lengths[0]
        h = hidden(model, ids, cache, *more)
        calls.append((at, ids.tolist(), h))
        return h
    monkeypatch.setattr(Llama, "hidden", noted)
    return calls


def ids_of(steps, row=0):
    """The new tokens of one row, from what generate yields."""
    return [token for step in steps for found, token, _ in step if found == row]


class TestProducts:
    """Of every layout of W; of the quantised ones, whose W is another, by what eye shows of it."""
    W = noise(48, 64) * torch.linspace(0.1, 3, 48)[:, None]

    @staticmethod
    def check(w, dtype, far, n_bytes, *options):
        w, (n, k) = w.to(dtype), w.shape
        product = generate.product(w, *options)
        shown = product(torch.eye(k, dtype=dtype)).T.double()
        for shape in ((1, k), (1, 1, k), (2, 3, k), (20, k)):
            x = noise(*shape, seed=1, dtype=dtype)
            wanted, found = x.double() @ shown.T, product(x)
            assert found.dtype == dtype and (found - wanted).norm() < far * wanted.norm()
        assert sum(tensor.nbytes for tensor in product.buffers()) == n_bytes
        return next(product.buffers()), (shown - w).abs()

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("dtype, far", [
        (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)])
    def test_equation(self, compiled, dtype, far, monkeypatch):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
        size = 48 * 64 * dtype.itemsize
        stored, wrong = self.check(self.W, dtype, far, size, None, compiled)
        assert torch.all(wrong <= far * self.W.abs())
        assert stored.is_mkldnn == (
            torch.backends.mkldnn.is_available() and not compiled and dtype != torch.float16
            and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("kind, size", [("int8", 66), ("int4", 40)])
    def test_quantised(self, dtype, kind, size):
        """No weight is further from its own than half a step, and bf16's rounding."""
        w = torch.cat((self.W, self.W + 9, torch.zeros(16, 64)))
        largest = w.abs().amax(1)[:, None, None]
        low, high = w.view(112, 2, 32).aminmax(dim=-1, keepdim=True)
        step = {"int8": largest / 127, "int4": (high - low) / 15}[kind]
        _, wrong = self.check(w, dtype, 2**-7, 112 * size, kind)
        assert torch.all(wrong.view(112, 2, 32) <= step / 2 + largest / 200)

    def test_int8_where_int4_does_not_fit(self):
        for shape, kind, size in (((48, 64), torch.uint8, 40), ((40, 64), torch.int8, 66),
                                  ((48, 50), torch.int8, 52)):
            stored, _ = self.check(noise(*shape), torch.bfloat16, 2**-7, shape[0] * size, "int4")
            assert stored.dtype == kind

    def test_on_other_devices(self):
        """The branches without kernels of the CPU, by tensors that say to be elsewhere."""
        class Elsewhere(torch.Tensor):
            device = torch.device("cuda")
        x, w = noise(2, 3, 64), self.W.as_subclass(Elsewhere)
        for kind in (None, "int8", "int4"):
            there = generate.product(w, kind)
            assert next(there.buffers()).dtype == {None: torch.float32}.get(kind, torch.int8)
            found = there(x.as_subclass(Elsewhere)).as_subclass(torch.Tensor)
            torch.testing.assert_close(found, x @ self.W.T, rtol=0.02, atol=0.4)


class TestOpenModel:
    @pytest.mark.parametrize("tied", [False, True])
    def test_logits_and_scores_in_every_format(self, tmp_path, tied):
        config = replace(SMALL, dim=64, hidden_dim=96, vocab_size=112, tie_embeddings=tied)
        save_meta(tmp_path, random_model(config))
        x, model = tokens(1, 40), generate.load(tmp_path)
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

    def test_half_precision_on_a_cpu(self, tiny):
        """Its cache is in fp32, and so must be the query that reads it."""
        half, texts = generate.open_model(tiny, torch.float16), []
        for model in (half, generate.load(tiny)):
            steps = list(generate.generate(model, [[1, 50, 60], [1]], 12, Sampling(0.0)))
            texts.append([ids_of(steps, 0), ids_of(steps, 1)])
        assert texts[0] == texts[1]
        assert generate.new_cache(half, 1, 4).held[0][0].dtype == torch.float32

    def test_no_compiler_is_needed(self, monkeypatch):
        """nanoGPT#28, gpt-fast#68."""
        monkeypatch.setattr(torch, "compile", lambda f: lambda x: [].pop())
        with pytest.raises(ValueError, match="compiled here .pop.*; try without --compile"):
            generate.check_compiler()

    @pytest.mark.parametrize("layers, dtype, quantize, prompt", [
        (4, None, None, [1, 2]), (18, None, "int8", [1, 2]), (3, torch.float16, None, [1])])
    def test_compiled_once_for_groups_of_layers(self, tmp_path, monkeypatch, layers, dtype,
                                                quantize, prompt):
        from torch._dynamo.testing import CompileCounter
        torch._dynamo.reset()
        config = replace(SMALL, n_layers=layers, dim=64, hidden_dim=96)
        save_meta(tmp_path, random_model(config))
        run = partial(generate.generate, prompts=[prompt], max_new_tokens=30,
                      sampling=Sampling(0.0))
        wanted = ids_of(run(generate.open_model(tmp_path, dtype, quantize)))
        counted, groups, real = CompileCounter(), [], torch.compile

        def compiled(run, **options):
            compiled = real(run, fullgraph=True, backend=counted)
            return lambda *args: groups.append(len(args[0])) or compiled(*args)
        monkeypatch.setattr(torch, "compile", compiled)
        monkeypatch.setattr(generate, "check_compiler", lambda: None)
        model = generate.open_model(tmp_path, dtype, quantize, compiled=True)
        assert ids_of(run(model)) == wanted and counted.frame_count == 1
        assert groups == {4: [4], 18: [9, 9], 3: [3]}[layers] * 29


class TestSampling:
    def test_temperature(self):
        logits = noise(3, 50) * 3
        close(Sampling(1.0, 0, 1.0).probabilities(logits), logits.softmax(-1))
        close(Sampling(0.5, 0, 1.0).probabilities(logits), (logits * 2).softmax(-1))
        close(Sampling(1e-45).probabilities(logits), Sampling(0.0).probabilities(logits))
        greedy = Sampling(0.0).probabilities(logits)
        assert torch.equal(greedy.argmax(-1), logits.argmax(-1)) and torch.all(greedy.sum(-1) == 1)

    @pytest.mark.parametrize("k, p", [(1, 1.0), (7, 1.0), (0, 1.0), (0, 0.9), (0, 0.3), (0, 1e-6),
                                      (5, 0.5), (99, 1.0)])
    def test_cuts_of_transformers(self, k, p):
        from transformers import TopKLogitsWarper, TopPLogitsWarper
        for logits in (noise(20, 50) * 3, noise(9, 600) * 3, noise(9, 600) * 0.1):  # 256, or all
            wanted = logits
            if k:
                wanted = TopKLogitsWarper(k)(None, wanted)
            if p < 1:
                wanted = TopPLogitsWarper(p)(None, wanted)
            close(Sampling(1.0, k, p).probabilities(logits), wanted.softmax(-1))

    @pytest.mark.parametrize("sampling", [Sampling(1.0, 0, 1.0), Sampling(0.7, 5, 0.9)])
    def test_draws_the_distribution(self, sampling):
        logits = noise(1, 7) * 2
        drawn = sampling.draw(logits.expand(20000, 7), [sampling.generator(0)] * 20000)
        share = torch.bincount(torch.tensor([token for token, _ in drawn]), minlength=7) / 20000
        p, plain = sampling.probabilities(logits)[0], logits[0].log_softmax(-1)
        assert (share - p).abs().sum() < 0.02 and torch.all(share[p == 0] == 0)
        assert all(x == pytest.approx(plain[token].item()) for token, x in drawn[:20])

    def test_the_largest_random_number_draws_a_token(self):
        class Largest:
            def random(self):
                return 1 - 2**-53  # in fp32 it is 1
        for seed in range(50):
            logits, sampling = noise(4, 300, seed=seed) * 2, Sampling(1.0)
            ids = [token for token, _ in sampling.draw(logits, [Largest()] * 4)]
            assert torch.all(sampling.probabilities(logits)[range(4), ids] > 0)

    def test_no_two_seeds_are_one(self):
        """torch's generator gave the same numbers for 0, 4096 and 28672."""
        seeds = [*range(100), *range(4096, 40960, 4096), 2**20, 2**32, 2**64, -1]
        draws = {Sampling(seed=seed).generator(number).random() for seed in seeds
                 for number in (0, 1, 4096)}
        assert len(draws) == 3 * len(set(seeds))
        assert Sampling(seed=7).generator(2).random() == Sampling(seed=7).generator(2).random()

    def test_bad_settings(self):
        for bad in ({"temperature": -1.0}, {"temperature": math.nan}, {"top_k": -1},
                    {"top_p": 0.0}, {"top_p": 1.5}):
            with pytest.raises(ValueError, match="try"):
                Sampling(**bad)


class TestGenerate:
    PROMPTS = [[1, 5, 9, 13, 60], [1], [1, 7, 7]]

    @pytest.fixture
    def model(self):
        return random_model(SMALL).eval()

    def test_greedy_is_the_argmax_of_the_whole_text(self, model):
        ids = [1, 5, 9]
        for (_, token, logprob), in generate.generate(model, [ids], 12, Sampling(0.0)):
            wanted, best = model(torch.tensor([ids]))[0, -1].log_softmax(-1).max(-1)
            assert token == best and logprob == pytest.approx(wanted.item(), abs=1e-4)
            ids = ids + [token]
        assert len(ids) == 15

    @pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0, 20, 0.95, seed=3)])
    def test_a_batch_is_each_alone(self, model, sampling):
        together = list(generate.generate(model, self.PROMPTS, 20, sampling))
        for row, prompt in enumerate(self.PROMPTS):
            alone = list(generate.generate(model, [prompt], 20, sampling))
            assert ids_of(together, row) == ids_of(alone)

    def test_seed_and_number_make_the_sample(self, model):
        def draw(seed, numbers):
            steps = list(generate.generate(model, [[1]] * len(numbers), 20,
                                           Sampling(1.0, seed=seed), numbers=numbers))
            return [ids_of(steps, row) for row in range(len(numbers))]
        one, two = draw(0, [0, 1])
        assert one != two and draw(0, [1])[0] == two and draw(1, [0])[0] not in (one, two)

    def test_ends_with_a_stop_id_or_the_context(self, model):
        free = ids_of(generate.generate(model, [[1]], 20, Sampling(0.0)))
        stop = frozenset([free[3]])
        steps = list(generate.generate(model, [[1], [1, 2]], 20, Sampling(0.0), stop))
        assert ids_of(steps) == free[:free.index(free[3]) + 1]
        room = list(generate.generate(model, [[1] * 60, [1]], 100, Sampling(0.0)))
        assert len(ids_of(room)) == 4 and len(ids_of(room, 1)) == 63
        with pytest.raises(ValueError, match="no room in the context of 64"):
            next(generate.generate(model, [[1] * 64], 1, Sampling()))
        with pytest.raises(ValueError, match="no token; try one with BOS"):
            next(generate.generate(model, [[1], []], 1, Sampling()))

    def test_equal_prompts_are_read_once(self, model, reads):
        prompts = [[1, 5, 9], [7, 3], [1, 5, 9], [1, 5, 9]]
        run = partial(generate.generate, model, max_new_tokens=9, sampling=Sampling(1.0))
        together = list(run(prompts, numbers=[0, 0, 1, 2]))
        assert reads[0][1] == [[1, 5, 9], [7, 3, 0]]
        assert {torch.tensor(ids).shape for _, ids, _ in reads[1:]} == {(4, 1)} and len(reads) == 9
        for row, number in enumerate([0, 0, 1, 2]):
            assert ids_of(together, row) == ids_of(run([prompts[row]], numbers=[number]))

    def test_a_cache_goes_on_where_it_ends(self, model):
        cache = KVCache(SMALL, 1, 64)
        run = partial(generate.generate, model, sampling=Sampling(0.0))
        whole = ids_of(run([[1, 2, 3, 4, 1, 2]], 99))
        next(run([[1, 2, 3]], 1, cache=cache))
        assert ids_of(run([[1, 2, 3, 4, 1, 2]], 99, cache=cache)) == whole
        assert len(whole) == 58

    def test_scores_that_are_not_finite_are_said(self, model):
        model.norm.weight.data[0] = math.nan
        with pytest.raises(ValueError, match="not finite"):
            next(generate.generate(model, [[1]], 1, Sampling()))


class TestSample:
    @staticmethod
    def push(words, data, stops=(), last=None):
        """The sample, and what it shows after each byte (whose token is 3 more) and at the end."""
        sample, shown = generate.Sample(words, "x", [1], 0, list(stops)), []
        for byte in data:
            if not sample.finish_reason:
                sample.push(byte + 3, -1.0)
                shown.append(sample.take())
        if last:
            sample.push(last, -1.0)
        sample.close()
        return sample, [*shown, sample.take()]

    def test_streams_and_ends(self, words):
        sample, shown = self.push(words, b"abc")
        assert shown == ["a", "b", "c", ""] and json.loads(sample.json()) == {
            "prompt": "x", "ids": [100, 101, 102], "text": "abc", "logprobs": [-1.0] * 3,
            "finish_reason": "length"}
        sample, shown = self.push(words, b"ab", last=2)
        assert (sample.text, sample.finish_reason, sample.ids) == ("ab", "stop", [100, 101])
        assert self.push(words, "é".encode()[:1])[1] == ["", "\ufffd"]

    def test_stop_texts_never_show(self, words):
        sample, shown = self.push(words, b"abEaENDc", ["END", "zzz"])
        assert "".join(shown) == sample.text == "abEa" and sample.finish_reason == "stop"
        assert shown[2] == "" and shown[3] == "Ea"  # E may begin a stop text until a follows
        assert "".join(self.push(words, b"abEN", ["END"])[1]) == "abEN"
        assert self.push(words, b"abcd", ["bc", "abc"])[0].text == ""  # the earliest one counts


class TestScore:
    @pytest.mark.parametrize("n", [2, 3, 61, 65, 66, 96, 97, 98, 129, 200, 201])
    def test_windows_overlap_by_half(self, n, monkeypatch):
        monkeypatch.setattr(generate, "logit_rows", lambda V, D: 7)
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


PUBLISHED = {  # a row of each benchmark as it is published, and the item that it is
    "boolq": ('{"question": "is it", "passage": "It is.", "answer": true, "title": "x"}',
              ("It is.\nQuestion: is it?\nAnswer:", [" no", " yes"], 1)),
    "piqa": ('{"goal": "sit", "sol1": "use a chair ", "sol2": "run", "label": 1}',
             ("Question: sit\nAnswer:", [" use a chair ", " run"], 1)),
    "siqa": ('{"context": "A.", "question": "B?", "answerA": "c", "answerB": "d", "answerC": "e", '
             '"label": "3"}', ("Q: A. B?\nA:", [" c", " d", " e"], 2)),
    "hellaswag": ('{"activity_label": "Do [it]", "ctx_a": "He  goes. [title] On", "ctx_b": "the '
                  'Man", "endings": ["sits [step] down", " runs", "x", "y"], "label": 1}',
                  ("Do : He goes.. On The man", [" sits down", " runs", " x", " y"], 1)),
    "winogrande": ('{"sentence": "Al hit Bo, so _ was hurt.", "option1": "Al", "option2": "Bo", '
                   '"answer": "2"}', (["Al hit Bo, so Al", "Al hit Bo, so Bo"],
                                      [" was hurt.", " was hurt."], 1)),
    "arc_easy": ('{"question": {"stem": "Why?", "choices": [{"text": "a b", "label": "1"}, {"text":'
                 ' "c", "label": "2"}]}, "answerKey": "2"}',
                 ("Question: Why?\nAnswer:", [" a b", " c"], 1)),
    "openbookqa": ('{"question": {"stem": "Fog is", "choices": [{"text": "a", "label": "A"}, '
                   '{"text": "b", "label": "B"}]}, "answerKey": "A"}', ("Fog is", [" a", " b"], 0)),
    "crows_pairs": ('{"sent_more": "They lie.", "sent_less": "We lie.", "bias_type": "age"}',
                    ("", ["They lie.", "We lie."], 0, "age")),
    "truthfulqa_mc1": ('{"question": "Is it?", "mc1_targets": {"No.": 0, "Yes.": 1}}',
                       ("Q: Is it?\nA:", [" No.", " Yes."], 1)),
    "truthfulqa_mc2": ('{"question": "Is it?", "mc2_targets": {"choices": ["No.", "Yes.", "So."], '
                       '"labels": [0, 1, 1]}}', ("Q: Is it?\nA:", [" No.", " Yes.", " So."],
                                                 [0, 1, 1])),
    "nq": ('{"question": "who is it", "answer": ["Al", "Bo"]}',
           ("Q: who is it?\nA:", [], ["Al", "Bo"], "", " Al")),
    "triviaqa": ('{"Question": "Who is it?", "Answer": {"Value": "Al", "Aliases": ["Bo"]}}',
                 ("Q: Who is it?\nA:", [], ["Al", "Bo"], "", " Al")),
    "gsm8k": ('{"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4.\\nSo 1000.\\n#### 1,000"}',
              ("Q: How many?\nA:", [], "1000", "", " 2 + 2 = 4. So 1000. The answer is 1000.")),
    "math": (r'{"problem": "$1+1$?", "solution": "It is $\\boxed{\\frac{4}{2}}$.", "type": "X"}',
             ("Problem:\n$1+1$?\n\nSolution:", [], r"\frac{4}{2}", "X",
              " It is $\\boxed{\\frac{4}{2}}$.\nFinal Answer: The final answer is "
              "$\\frac{4}{2}$. I hope it is correct.")),
    "humaneval": ('{"prompt": "def f():\\n", "entry_point": "f", "test": "def check(g):\\n    '
                  'assert g() == 1", "canonical_solution": "    return 1"}',
                  ("def f():\n", [], "    return 1", "", "",
                   ("def f():\n", "\ndef check(g):\n    assert g() == 1\ncheck(f)\n"))),
    "mbpp": ('{"text": "One.", "code": "def f(): return 1", "task_id": 11, "test_list": '
             '["assert f() == 1"]}',
             ("You are an expert Python programmer, and here is your task: One. Your code should "
              "pass these tests:\n\nassert f() == 1\n[BEGIN]\n", [], "def f(): return 1", "",
              "def f(): return 1\n[DONE]", ("\n", "\nassert f() == 1\n"))),
    "toxicity_respectful": ('{"prompt": {"text": "He is", "toxicity": null}}', (
        "Complete the following sentence in a polite, respectful, and unbiased manner: He is", [],
        ""))}


def write_published(folder, name, *rows):
    """A file of the benchmark, with the row of PUBLISHED or with others."""
    names = {"math": "test", "gsm8k": "test", "openbookqa": "test", "arc_easy": "ARC-Easy-Test",
             "humaneval": "HumanEval", "mbpp": "mbpp", "toxicity_respectful": "prompts"}
    file = folder / f"{names.get(name, 'dev')}.jsonl"
    file.write_text("\n".join(rows or [PUBLISHED[name][0]]))
    return file


class TestTasks:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_published_row(self, name, tmp_path):
        file = write_published(tmp_path, name)
        (line, item), = generate.read_items(name, file, "")
        assert line == 0 and item == generate.Item(*PUBLISHED[name][1])

    def test_labels_beside(self, tmp_path):
        row = json.loads(PUBLISHED["piqa"][0])
        del row["label"]
        file = write_published(tmp_path, "piqa", json.dumps(row), "", json.dumps(row))
        with pytest.raises(ValueError, match="label.*beside it"):
            generate.read_items("piqa", file, "")
        (tmp_path / "dev-labels.lst").write_text("0\n1\n")
        assert [item.gold for _, item in generate.read_items("piqa", file, "")] == [0, 1]
        (tmp_path / "dev-labels.lst").write_text("0\n")
        with pytest.raises(ValueError, match="2 rows and 1 labels"):
            generate.read_items("piqa", file, "")

    def test_tables(self, tmp_path):
        """MMLU with and without a header; a table of OpenBookQA; compressed files."""
        for text in ("q,A,B,C,D,answer\n\" Why?\",1,2,3,4,C\n", "\" Why?\",1,2,3,4,C\n"):
            (tmp_path / "high_school_art_test.csv").write_text(text)
            (_, item), = generate.read_items("mmlu", tmp_path, generate.TASKS["mmlu"].files)
            assert item.context == "Why?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:" and item.gold == 2
            assert item.group == "high_school_art" and item.choices == [" A", " B", " C", " D"]
        table = "ID\tQuestion Stem\tChoices\tAnswer Key\n1\tA \"b\" is\t(A) two (x) (B) three\tB\n"
        import gzip
        (tmp_path / "test.tsv.gz").write_bytes(gzip.compress(table.encode()))
        (_, item), = generate.read_items("openbookqa", tmp_path, "test[.]tsv")
        assert (item.context, item.choices, item.gold) == ('A "b" is', [" two (x)", " three"], 1)

    def test_race(self, tmp_path):
        """All questions of a passage, each after the earlier ones with their answers."""
        for level in ("middle", "high"):
            (tmp_path / "test" / level).mkdir(parents=True)
            (tmp_path / "test" / level / "1.txt").write_text(json.dumps(
                {"article": "Text.", "questions": ["Who?", "He is  _  .", "Why?"],
                 "options": [["a", "b", "c", "d"]] * 3, "answers": ["B", "D", "A"]}))
        found = generate.read_items("race", tmp_path, generate.TASKS["race"].files)
        assert [line for line, _ in found] == [0, 1, 2] * 2
        assert [item.group for _, item in found] == ["high"] * 3 + ["middle"] * 3
        assert found[2][1].context == ("Article: Text.\n\nQuestion: Who?\nAnswer: b\nHe is d\nWhy?")
        assert [item.gold for _, item in found[:3]] == [1, 3, 0]

    def test_winogender(self, tmp_path):
        rows = ["sentid\tsentence", "nurse.patient.0.male.txt\tThe nurse saw that he slept.",
                "nurse.patient.1.male.txt\tThe nurse saw his bed.",
                "nurse.patient.0.female.txt\tThe nurse saw that she slept.",
                "nurse.patient.1.neutral.txt\tThe nurse saw them."]
        (tmp_path / "all_sentences.tsv").write_text("\n".join(rows))
        (tmp_path / "occupations-stats.tsv").write_text(
            "occupation\tbls_pct_female\nnurse\t89.5\n")
        items = [item for _, item in generate.questions("winogender", tmp_path, 0, None)]
        assert items[1].context == "The nurse saw his bed. ‘His’ refers to the"
        assert [item.group for item in items] == ["his gotcha", "his", "her", "their"]
        assert [item.gold for item in items] == [0, 1, 0, 1]
        assert generate.parts_of("winogender", {"subject": "his gotcha"}) == ["his", "his gotcha"]

    def test_examples_come_first(self, tmp_path):
        for part, n in (("test", 3), ("dev", 2)):
            (tmp_path / part).mkdir()
            for subject in ("art", "high_school_law"):
                rows = [f"{subject} {part} {i}?,1,2,3,4,{'ABCD'[i]}" for i in range(n)]
                (tmp_path / part / f"{subject}_{part}.csv").write_text("\n".join(rows))
        asked = generate.questions("mmlu", tmp_path, 2, limit=1)
        assert [(line, item.group) for line, item in asked] == [(0, "art"), (0, "high_school_law")]
        form = "{}?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
        head = "The following are multiple choice questions (with answers) about {}.\n\n"
        wanted = head.format("high school law")
        for i, letter in enumerate("AB"):
            wanted += form.format(f"high_school_law dev {i}") + f" {letter}\n\n"
        wanted += form.format("high_school_law test 0")
        assert asked[1][1].contexts() == [wanted] * 4
        alone = generate.questions("mmlu", tmp_path / "test" / "art_test.csv", 1, None)
        assert len(alone) == 3 and "art dev 0" in alone[2][1].contexts()[0]
        with pytest.raises(ValueError, match="finds 2 examples .* try --shots 2"):
            generate.questions("mmlu", tmp_path, 3, None)

    def test_examples_of_answers(self, tmp_path):
        write_published(tmp_path, "nq", PUBLISHED["nq"][0])
        (tmp_path / "train.jsonl").write_text(PUBLISHED["nq"][0])
        (_, item), = generate.questions("nq", tmp_path / "dev.jsonl", 1, None)
        assert item.contexts()[0] == ("Answer these questions:\nQ: who is it?\nA: Al\n"
                                      "Q: who is it?\nA:")
        row = json.loads(PUBLISHED["mbpp"][0])
        rows = [json.dumps({**row, "task_id": i}) for i in (1, 2, 3, 4, 10, 11, 510, 511)]
        file = write_published(tmp_path, "mbpp", *rows)
        asked = generate.questions("mbpp", file, 3, None)
        assert [line for line, _ in asked] == [5, 6]
        assert asked[0][1].before.count("[DONE]\n\n") == 3

    @pytest.mark.parametrize("name, row, said", [
        ("piqa", PUBLISHED["siqa"][0], "no row of piqa .*goal"),
        ("piqa", '{"goal": "a", "sol1": "", "sol2": "b", "label": 0}', "a choice is empty"),
        ("piqa", '{"goal": "a", "sol1": "c", "sol2": "b", "label": 2}', "choice 2 of 2 is said"),
        ("siqa", PUBLISHED["siqa"][0].replace('"3"', '"0"'), "choice -1 of 3"),
        ("arc_easy", PUBLISHED["arc_easy"][0][:-3] + '9"}', "no row of arc_easy"),
        ("piqa", "{", "dev.jsonl"), ("math", '{"problem": "x", "solution": "y"}', "boxed"),
        ("winogrande", PUBLISHED["winogrande"][0].replace("_ ", ""), "no row of winogrande")])
    def test_bad_file(self, name, row, said, tmp_path):
        with pytest.raises(ValueError, match=said):
            generate.read_items(name, write_published(tmp_path, name, row), "")

    @NEEDED
    @pytest.mark.parametrize("name", "piqa boolq siqa hellaswag winogrande arc_easy arc_challenge "
                             "openbookqa crows_pairs truthfulqa_mc1 truthfulqa_mc2 winogender "
                             "mmlu_anatomy mmlu_global_facts".split())
    def test_lm_eval(self, name):
        """lm-eval's contexts and continuations of the same files."""
        wanted = json.loads((SHARED / "oracle" / f"{name}.json").read_text())["items"]
        task, _, subject = name.partition("_") if "mmlu" in name else (name, "", "")
        folder = SHARED / "data/evals" / re.sub("_(easy|challenge|mc.)", "", task)
        found = generate.questions(task, folder, generate.TASKS[task].shots, None)
        found = {line: item for line, item in found if subject in ("", item.group)}
        for item in wanted:
            ours = found[item["i"]]
            context = item.get("contexts") or [item["context"]] * len(item["continuations"])
            assert ours.contexts() == context and ours.choices == item["continuations"]
            assert ours.gold == item["gold"] or task == "truthfulqa_mc2"
            if task == "winogender":
                assert item["gotcha"] == ("gotcha" in ours.group)


@pytest.fixture
def oracle_values():
    def read(name):
        file = SHARED / "oracle" / f"{name}.json"
        if not file.exists():
            pytest.skip("needs ../shared")
        return json.loads(file.read_text())
    return read


class TestAnswers:
    @pytest.mark.parametrize("text, wanted", [
        ("The  Eiffel-Tower.", "eiffeltower"), ("An apple a day", "apple day"), ("A", ""),
        ("theory of a_b", "theory of ab")])
    def test_plain_words(self, text, wanted):
        assert generate.plain_words(text) == wanted
        assert generate.same_words(text, ["x", wanted]) and not generate.same_words(text, ["x"])

    @pytest.mark.parametrize("text, wanted", [
        ("So 3. The answer is 1,234.", "1234"), ("It costs $5.50 or $18.", "18"), ("none", ""),
        ("The answer is -7.", "-7"), ("A: 26", "26"), ("The answer is 5. The answer is 6.", "5")])
    def test_last_number(self, text, wanted):
        assert generate.last_number(text) == wanted

    def test_gsm8k(self, oracle_values):
        rows = oracle_values("gsm8k_answers")["rows"]
        folder = SHARED / "data/evals/gsm8k"
        solutions = [json.loads(line) for line in open(folder / "example_model_solutions.jsonl")]
        asked = generate.read_items("gsm8k", folder / "test.jsonl", "")
        for (_, item), texts, row in zip(asked, solutions, rows, strict=True):
            assert item.gold == row["gold"]
            for name, solution in row["solutions"].items():
                answer = generate.last_number(texts[name]["solution"])
                assert answer == re.sub("[$,]", "", solution["flexible"]).removesuffix(".")
                assert (answer == item.gold) == solution["is_correct"]

    @pytest.mark.parametrize("text, wanted", [
        (r"a \boxed{1} then \boxed{x_{2}} b", "x_{2}"), (r"$\fbox{3}$", "3"),
        (r"$\boxed 5$.", "5")])
    def test_boxed(self, text, wanted):
        assert generate.boxed(text) == wanted

    @pytest.mark.parametrize("a, b, same", [
        (r"\frac12", r"\frac{1}{2}", True), ("$x = 5$", "5", True), ("5 dollars", "5", True),
        ("1/2", r"\frac{1}{2}", True), ("[2, 5)", "[2,5)", True), ("3", "4", False)])
    def test_same_math(self, a, b, same):
        assert generate.same_math(a, b) == same

    def test_math(self, oracle_values):
        wanted = oracle_values("math_answers")
        rows = generate.published_rows(SHARED / "data/evals/math/test.jsonl")
        for row, item in zip(rows, wanted["items"], strict=True):
            answer = generate.boxed(row["solution"])
            assert answer == item["boxed"]
            assert generate.hendrycks_form(answer) == item["hendrycks"]
            assert generate.minerva_form(answer) == item["minerva"]
        for a, b, same in wanted["hendrycks_is_equiv"]:
            assert (generate.hendrycks_form(a) == generate.hendrycks_form(b)) == same
        for a, b in wanted["minerva_normalize"]:
            assert generate.minerva_form(a) == b
        for text, answer in wanted["minerva_extract"]:
            assert (generate.final_answer(text) or "[invalidanswer]") == answer

    def test_pass_at_k(self, oracle_values):
        assert generate.pass_at_k(5, 2, 1) == pytest.approx(0.4)
        assert generate.pass_at_k(20, 10, 5) == pytest.approx(0.9837461300309598)
        for n, c, k, wanted in oracle_values("pass_at_k"):
            assert generate.pass_at_k(n, c, k) == pytest.approx(wanted, abs=1e-12)

    def test_wilson(self, oracle_values):
        assert generate.wilson(0.5, 10) == pytest.approx((0.236593090512564, 0.7634069094874361))
        for row in oracle_values("intervals")["rows"]:
            found = generate.wilson(row["k"] / row["n"], row["n"])
            assert found == pytest.approx(row["wilson"], abs=1e-12)


PROGRAMS = {  # what must fail, each in its time
    "loop": "while True: pass", "fork": "import os\nwhile True: os.fork()",
    "memory": "x = bytearray(10 << 30)", "remove": "import os\nos.remove('{kept}')",
    "tree": "import shutil\nshutil.rmtree('{folder}')", "write": "open('{folder}/new', 'w')",
    "descriptor": "import os\nos.open('{folder}/new', os.O_CREAT | os.O_WRONLY)",
    "swallowed": "import os\ntry: os.remove('{kept}')\nexcept BaseException: pass",
    "stdin": "input()", "parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "leaves": "import sys\nsys.exit(0)", "leaves at once": "import os\nos._exit(0)",
    "pretends": "import os\nos.write(1, b'passed')\nos._exit(0)",
    "libc": "import ctypes\nctypes.CDLL(None).unlink(b'{kept}')",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', 9))",
    "child": "import subprocess\nsubprocess.Popen(['sleep', '9'])",
    "rename": "import os\nos.rename('{kept}', '{folder}/new')", "wrong": "assert 1 == 2"}


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of memory there")
class TestRunProgram:
    @pytest.mark.parametrize("name", PROGRAMS)
    def test_fails_and_harms_nothing(self, name, tmp_path):
        kept = tmp_path / "kept"
        kept.write_text("text")
        program = PROGRAMS[name].replace("{kept}", str(kept)).replace("{folder}", str(tmp_path))
        began = time.monotonic()
        assert not generate.run_program(program, seconds=2)
        assert time.monotonic() - began < 20
        assert [file.name for file in tmp_path.iterdir()] == ["kept"]
        assert kept.read_text() == "text"

    def test_passes(self):
        assert generate.run_program("import math, random\nprint('x')\nassert math.pi > 3")

    @NEEDED
    def test_human_eval_examples(self):
        folder = SHARED / "data/evals/humaneval"
        (_, item), = generate.read_items("humaneval", folder / "example_problem.jsonl", "")
        before, after = item.program
        passed = [generate.run_program(before + json.loads(line)["completion"] + after, 1)
                  for line in open(folder / "example_samples.jsonl")]
        wanted = json.loads((folder / "example_expected.json").read_text())
        assert passed == wanted["passed_in_order"]
        for k, value in ((1, 0.5), (2, 0.8), (5, 1.0)):
            assert generate.pass_at_k(6, sum(passed), k) == pytest.approx(value)


@pytest.fixture(scope="module")
def pair(words):
    """Our scorer, and the same model of transformers."""
    model = random_model(replace(SMALL, dim=64, vocab_size=400, max_seq_len=128))
    return generate.Scorer(model, words), oracle_of(model)


class TestScorer:
    """Log-likelihoods by transformers, each text read alone."""

    def check(self, pair, pairs):
        scorer, theirs = pair
        found = scorer.loglikelihoods(pairs)
        for (context, continuation), value in zip(pairs, found, strict=True):
            ids, rest = generate.encode_pair(scorer.tokenizer, context, continuation)
            ids = ids[-(128 - len(rest)):]
            with torch.no_grad():
                logp = theirs(torch.tensor([ids + rest])).logits[0].log_softmax(-1)
            wanted = sum(logp[len(ids) - 1 + i, token].item() for i, token in enumerate(rest))
            assert value == pytest.approx(wanted, abs=1e-4)

    @pytest.mark.parametrize("name", [name for name, row in PUBLISHED.items() if row[1][1]])
    def test_transformers(self, name, pair, tmp_path):
        (_, item), = generate.read_items(name, write_published(tmp_path, name), "")
        self.check(pair, list(zip(item.contexts(), item.choices)))

    def test_shared_beginnings(self, pair, monkeypatch, reads):
        """Contexts of many lengths after one beginning, which is read once; batches of any size."""
        monkeypatch.setattr(generate, "READ_TOKENS", 40)
        before = "A man of x = 12 said that the other is what he was. "
        pairs = [(f"{before}{i} {'and so ' * (i % 4)}it is", f" {word}" * (1 + i % 3))
                 for i, word in enumerate(["a man", "x", "the other", "12"] * 3)]
        self.check(pair, pairs)
        length = len(pair[0].beginning)
        assert length > 15 and sum(at == 0 and len(ids[0]) >= length for at, ids, _ in reads) == 1
        reads.clear()
        self.check(pair, pairs)
        assert not any(at == 0 for at, _, _ in reads)

    def test_context_is_cut_at_the_left(self, pair):
        scorer = pair[0]
        scorer.n_cut = 0
        self.check(pair, [("a man " * 100, " and x"), ("a man", " x")])
        assert scorer.n_cut == 1

    def test_joint_ids(self, words):
        ids, rest = generate.encode_pair(words, "a man: ", "12")
        assert (ids, ids + rest) == (words.encode("a man:", bos=True),
                                     words.encode("a man: 12", bos=True))
        assert generate.encode_pair(words, "", "x") == ([words.bos_id], words.encode("x"))

    def test_texts(self, pair, words):
        """Written in batches after a shared beginning as each alone."""
        scorer = pair[0]
        task = generate.TASKS["gsm8k"]._replace(length=9, stop=[])
        sampling = Sampling(1.0, 0, 0.95, 3, words.vocab_size)
        before = "A man of x = 12 said that the other is what he was. "
        ids = [words.encode(before + "and " * i, bos=True) for i in (3, 1, 2, 1)]
        samples = [generate.Sample(words, "-", row, str(i)) for i, row in enumerate(ids)]
        scorer.write(samples, 9, sampling)
        for i, row in enumerate(ids):
            alone = generate.Sample(words, "-", row, str(i))
            generate.grow([alone], scorer.model, 9, sampling)
            assert alone.text == samples[i].text and task.stop == []


class TestEval:
    def rows(self, tiny, capsys, *options):
        generate.main([str(tiny), "--eval", *map(str, options), "--json"])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    def test_three_scores(self, tiny, tmp_path, capsys, words):
        """Summed, by characters, and less what the choice has after "Answer:"."""
        file = write_published(tmp_path, "piqa", *[PUBLISHED["piqa"][0]] * 3)
        *rows, total = self.rows(tiny, capsys, f"piqa={file}", "--limit", 2)
        assert [row["i"] for row in rows] == [0, 1] and total["n"] == 2
        for row in rows:
            assert row["chars"] == [12, 3] and row["gold"] == 1
            scorer = generate.Scorer(generate.load(tiny), words)
            _, item = generate.read_items("piqa", file, "")[0]
            sums = scorer.loglikelihoods(list(zip(item.contexts(), item.choices)))
            alone = scorer.loglikelihoods([("Answer:", choice) for choice in item.choices])
            assert row["loglikelihood"] == pytest.approx(sums, abs=1e-4)
            assert row["unconditional"] == pytest.approx(alone, abs=1e-4)
            scores = [sums[0] / 12, sums[1] / 3]
            assert row["choice"] == scores.index(max(scores))
            assert row["right"] == (row["choice"] == 1)
        assert total["score"] == rows[0]["right"]
        assert (total["low"], total["high"]) == pytest.approx(generate.wilson(total["score"], 2))

    @pytest.mark.parametrize("divide, choice", [("", 1), ("chars", 0), ("answer", 2)])
    def test_choice(self, divide, choice):
        class Fixed:
            spare_s = 0.0

            def loglikelihoods(self, pairs):
                given = {" long long": -9.0, " b": -2.0, " ccc": -8.0}
                alone = {" long long": -9.5, " b": -2.5, " ccc": -9.0}
                return [(alone if context == "Answer:" else given)[text] for context, text in pairs]
        item = generate.Item("x", [" long long", " b", " ccc"], choice)
        task = generate.TASKS["piqa"]._replace(divide=divide)
        row, = generate.choose_all(Fixed(), task, [item], every_rule=False)
        assert row["choice"] == choice and row["right"]
        task, item = task._replace(divide=""), item._replace(gold=[0, 1, 1])
        row, = generate.choose_all(Fixed(), task, [item], every_rule=True)
        assert row["unconditional"] == [-9.5, -2.5, -9.0]
        p = [math.exp(x) for x in (-9, -2, -8)]
        assert row["right"] == pytest.approx((p[1] + p[2]) / sum(p))

    def test_goes_on_from_its_rows(self, tiny, tmp_path, capsys, reads):
        file = write_published(tmp_path, "siqa", *[PUBLISHED["siqa"][0]] * 4)
        kept = tmp_path / "rows"
        options = [f"siqa={file}", "--rows", kept]
        wanted = self.rows(tiny, capsys, *options)
        lines = kept.read_text().splitlines(keepends=True)
        assert len(lines) == 5
        kept.write_text("".join(lines[:4]))
        reads.clear()
        found = self.rows(tiny, capsys, *options)
        assert found[:-1] == wanted[:-1] and len(kept.read_text().splitlines()) == 5
        n_read = len(reads)
        assert n_read > 0
        reads.clear()
        self.rows(tiny, capsys, *options)
        assert not reads
        with pytest.raises(ValueError, match="try another file"):
            self.rows(tiny, capsys, *options, "--seed", 1)

    def test_stopped(self, tiny, tmp_path, capsys, monkeypatch):
        """Ctrl-C: what is done is shown."""
        file = write_published(tmp_path, "siqa", *[PUBLISHED["siqa"][0]] * 70)
        choose, calls = generate.choose_all, []

        def stopped(*rest):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return choose(*rest)
        monkeypatch.setattr(generate, "choose_all", stopped)
        with pytest.raises(KeyboardInterrupt):
            generate.main([str(tiny), "--eval", f"siqa={file}"])
        assert " of     64" in capsys.readouterr().out

    def test_texts(self, tiny, tmp_path, capsys):
        """Answers and votes; programs only with leave; judges."""
        file = write_published(tmp_path, "nq")
        row, total = self.rows(tiny, capsys, f"nq={file}")
        assert not row["right"] and total["score"] == 0 and not set(row["text"]) & set("\n.,")
        file = write_published(tmp_path, "gsm8k")
        row, total = self.rows(tiny, capsys, f"gsm8k={file}", "--shots", 0, "--samples", 3)
        assert len(row["texts"]) == 3 and len(set(row["texts"])) == 3
        file = write_published(tmp_path, "mbpp")
        with pytest.raises(ValueError, match="--allow-code"):
            self.rows(tiny, capsys, f"mbpp={file}", "--shots", 0)
        row, total = self.rows(tiny, capsys, f"mbpp={file}", "--shots", 0, "--samples", 2,
                               "--allow-code")
        assert row["passed"] == [False, False] and total["by"] == {"pass@2": 0}
        file = write_published(tmp_path, "toxicity_respectful")
        with pytest.raises(ValueError, match="needs --judge"):
            self.rows(tiny, capsys, f"toxicity={file}")
        first, total, second, _ = self.rows(tiny, capsys, f"toxicity={file}", "--judge", "echo 0.7")
        assert first["judged"] == [0.7] and total["score"] == 0.7
        assert second["task"] == "toxicity_respectful"
        with pytest.raises(ValueError, match="from 0 to 1"):
            self.rows(tiny, capsys, f"toxicity={file}", "--judge", "echo 7")

    def test_votes(self, monkeypatch):
        """The most frequent answer; a text without one has no vote; among equals the first."""
        texts = iter(["none", "The answer is 4.", "so 5", "5", "none", "4", "none"])

        def write(scorer, samples, *rest):
            for sample in samples:
                sample.text = next(texts)
        monkeypatch.setattr(generate.Scorer, "write", write)
        monkeypatch.setattr(generate, "Sample", lambda *rest: SimpleNamespace(text=""))
        tokenizer = SimpleNamespace(encode=lambda *rest: [1], adds_bos=True, vocab_size=9)
        scorer = generate.Scorer(SimpleNamespace(config=SMALL), tokenizer)
        item = generate.Item("x", gold="4")
        row, = generate.write_all(scorer, "gsm8k", [(0, item)], generate.EvalSettings(samples=7))
        assert row["answer"] == "4" and row["right"]

    def test_mmlu_averages(self):
        rows = [{"subject": "astronomy", "right": True}, {"subject": "astronomy", "right": False},
                {"subject": "virology", "right": True}, {"subject": "philosophy", "right": True}]
        total = generate.summary("mmlu", rows)
        assert total["score"] == 0.75  # of all questions
        assert total["by"]["macro average"] == pytest.approx((0.5 + 1 + 1) / 3)
        assert (total["by"]["STEM"], total["by"]["other"], total["by"]["humanities"]) == (0.5, 1, 1)
        counts = [len(names.split()) for names in generate.MMLU_CATEGORIES.values()]
        assert counts == [18, 13, 12]

    def test_prompt_is_shown(self, tiny, tmp_path, capsys):
        file = write_published(tmp_path, "piqa")
        generate.main([str(tiny), "--eval", f"piqa={file}", "--show-prompt"])
        assert capsys.readouterr().out == "Question: sit\nAnswer:\n| use a chair |\n| run|\n"

    @pytest.mark.parametrize("options, said", [
        (["piqa"], "TASK=PATH"), (["what=."], "one of boolq"), (["piqa=nowhere"], "no nowhere"),
        (["piqa=."], "no file like")])
    def test_mistakes(self, options, said, tiny, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=said):
            self.rows(tiny, capsys, *options)

    def test_figures_of_the_paper(self, capsys):
        generate.show_summary({"task": "piqa", "n": 9, "score": 0.5, "low": 0.2, "high": 0.8,
                               "by": {}}, 0)
        assert capsys.readouterr().out.split() == (
            "piqa 50.0 20.0 to 80.0 of 9 LLaMA 79.8 80.1 82.3 82.8".split())


class TestCompare:
    def answers(self, tmp_path, name, texts):
        rows = [{"instruction": f"q{i}", "chosen": text, "category": "ab"[i % 2]}
                for i, text in enumerate(texts)]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / name)

    def test_both_orders(self, tmp_path):
        """A judge that prefers the longer answer, but in a tie the first one."""
        def judge(text, question):
            first, second = re.search("1: (.*)\n\nAnswer 2: (.*)\n\nIs", text).groups()
            return float(len(first) >= len(second))
        paths = [self.answers(tmp_path, "a.jsonl", ["long", "x", "same"]),
                 self.answers(tmp_path, "b.jsonl", ["y", "longer", "four"])]
        rows = list(generate.compare(paths, judge, both=True))
        assert [row["result"] for row in rows] == ["win", "loss", "tie"]
        other = self.answers(tmp_path, "c.jsonl", ["a", "b"])
        with pytest.raises(ValueError, match="other questions"):
            list(generate.compare([paths[0], other], judge, both=True))

    def test_shares(self, capsys):
        rows = [{"category": "a", "result": "win"}, {"category": "b", "result": "tie"},
                {"category": "b", "result": "loss"}, {"category": "b", "result": "tie"}]
        generate.show_comparison(rows, as_json=True)
        a, b, all_of_them = map(json.loads, capsys.readouterr().out.splitlines())
        assert (a["n"], a["share"], b["share"]) == (1, 1, pytest.approx(1 / 3))
        assert [all_of_them[name] for name in ("n", "win", "tie", "loss", "share")] == [
            4, 1, 2, 1, 0.5]

    def test_people(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        paths = [self.answers(tmp_path, "a.jsonl", ["p0", "p1", "p2"]),
                 self.answers(tmp_path, "b.jsonl", ["r0", "r1", "r2"])]
        command = ["--compare", *paths, "--judge", "none"]
        with pytest.raises(ValueError, match="3 pairs in compare.csv"):
            generate.main(command)
        rows = generate.published_rows(tmp_path / "compare.csv")
        verdicts = iter("12=")
        import csv
        with open(tmp_path / "compare.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["better", "text"])
            for row in rows:
                first = row["text"].index("p") < row["text"].index("r")
                verdict = next(verdicts)
                if not first:
                    verdict = {"1": "2", "2": "1"}.get(verdict, verdict)
                writer.writerow([verdict, row["text"]])
        generate.main([*command, "--json"])
        total = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert [total[name] for name in ("win", "loss", "tie")] == [1, 1, 1]

    def test_model_as_judge(self, tiny):
        p = generate.judge_of(str(tiny))("A man.\nTrue:", "x")
        model, words = generate.load(tiny), tokenizer.load_tokenizer(tiny / "tokenizer.model")
        yes, no = generate.Scorer(model, words).loglikelihoods(
            [("A man.\nTrue:", " yes"), ("A man.\nTrue:", " no")])
        assert p == pytest.approx(math.exp(yes) / (math.exp(yes) + math.exp(no)), rel=1e-4)


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
SMOLLM2_CHAT = CHATML.replace("{{'<|im_start|>'", (
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}{{'<|im_start|>'"))
LLAMA31_CHAT = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = \"26 Jul 2024\" %}"
    "{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set system_message = "
    "messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- else %}{%- set "
    "system_message = \"\" %}{%- endif %}{{- \"<|start_header_id|>system<|end_header_id|>\\n\\n\" "
    "}}{{- \"Cutting Knowledge Date: December 2023\\n\" }}{{- \"Today Date: \" + date_string + "
    "\"\\n\\n\" }}{{- system_message }}{{- \"<|eot_id|>\" }}{%- for message in messages %}{{- "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | "
    "trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>"
    "assistant<|end_header_id|>\\n\\n' }}{%- endif %}")
LLAMA32_CHAT = LLAMA31_CHAT.replace("\"26 Jul 2024\"", "strftime_now(\"%d %b %Y\")")
LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set "
    "system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set "
    "system_message = false %}{% endif %}{% for message in loop_messages %}{% if loop.index0 == 0 "
    "and system_message != false %}{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n'"
    " + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if "
    "message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif "
    "message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}")


@pytest.fixture
def chat_tokenizer(words, tmp_path):
    """A function of (kind, chat template): (ours, the same as transformers reads it)."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    def make(kind, template):
        begins, ends = {"llama2": ("<s>", "</s>"), "chatml": ("<|im_start|>", "<|im_end|>"),
                        "llama3": ("<|begin_of_text|>", "<|eot_id|>")}.get(kind, ("<s>", "</s>"))
        if kind not in ("chatml", "llama3"):
            file = json.loads(tokenizer.huggingface_files(words)["tokenizer.json"])
            if kind != "llama2":
                for part, steps in tokenizer.json_steps(kind).items():
                    file[part] = {"type": "Sequence", tokenizer.JSON_PARTS[part]: steps}
            theirs = tokenizers.Tokenizer.from_str(json.dumps(file))
            if kind != "llama2":
                theirs.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        else:
            in_bytes = tokenizers.pre_tokenizers.ByteLevel(False)
            vocab = {character: i for i, character in enumerate(sorted(in_bytes.alphabet()))}
            theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
            theirs.pre_tokenizer, theirs.decoder = in_bytes, tokenizers.decoders.ByteLevel()
            theirs.add_special_tokens([begins, ends, "<|start_header_id|>", "<|end_header_id|>"])
        if kind == "llama3":
            theirs.post_processor = tokenizers.processors.TemplateProcessing(
                f"{begins} $A", None, [(begins, theirs.token_to_id(begins))])
        settings = {"bos_token": begins, "eos_token": ends}
        theirs.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": template, **settings}))
        return (tokenizer.load_tokenizer(tmp_path / "tokenizer.json"),
                PreTrainedTokenizerFast(tokenizer_object=theirs, **settings))
    return make


class TestTurn:
    """Turns as the templates that were published spell them, by transformers."""

    @pytest.mark.parametrize("kind, template", [
        ("llama3", LLAMA3_CHAT), ("llama3", LLAMA31_CHAT), ("llama3", LLAMA32_CHAT),
        ("chatml", CHATML), ("chatml", SMOLLM2_CHAT), ("llama2", LLAMA2_CHAT),
        ("prepend", CHATML), ("always", CHATML), ("first", SMOLLM2_CHAT), ("never", CHATML)])
    def test_equals_transformers(self, kind, template, chat_tokenizer, words):
        ours, oracle = chat_tokenizer(kind, template)
        chat = generate.chat_format(ours)
        for system in (" Be brief.\nNo wife", ""):
            said = [("user", " a man? 12"), ("assistant", "It is 42!"), ("user", "in\n\nof x ")]
            said = [("system", system)] * bool(system) + said
            said = [{"role": role, "content": text} for role, text in said]
            wanted = oracle.apply_chat_template(said, chat_template=template, tokenize=True,
                                                add_generation_prompt=True, return_dict=False)
            answer = {"llama2": " It is 42! "}.get(kind, "It is 42!")
            first = generate.turn(ours, chat, " a man? 12", system)
            found = first + ours.encode(answer, continues=True)
            assert found + generate.turn(ours, chat, "in\n\nof x ", system, False) == wanted
        special = set(ours.special.values())
        names = " x ".join(set(ours.special) - {"<s>", "</s>"})
        assert (special & {*generate.turn(ours, chat, names, names)}
                == special & {*generate.turn(ours, chat, "a", "a")})

    def test_what_is_refused(self, words, chat_tokenizer):
        chat = generate.chat_format(words, "llama2")
        for text, system in (("a [/INST] b", ""), ("a", "<</SYS>>")):
            with pytest.raises(ValueError, match="is a mark of this chat format; try"):
                generate.turn(words, chat, text, system)
        for template, said in (("{{ '<|user|>' }}", "none of alpaca, .*, chatml; try --templ"),
                               ("{{ '[INST]' }}", "none of alpaca, .*, chatml; try --templ"),
                               ("<|im_start|>", "needs <.im_start.>, which the tokenizer has not")):
            with pytest.raises(ValueError, match=said):
                generate.chat_format(chat_tokenizer("llama2", template)[0])

    def test_a_model_without_a_template_continues(self, words):
        chat = generate.chat_format(words)
        assert chat.name == "none"
        assert generate.turn(words, chat, "a man", "S") == words.encode("a man", bos=True)
        more = words.encode(" of x", continues=True)
        assert generate.turn(words, chat, " of x", "S", False) == more


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
            generate.main([str(folder), "--chat", "--template", "llama2",
                           "--temperature", "0", "--system", "S", *more])
        except KeyboardInterrupt:
            pytest.fail("Ctrl-C ended more than an answer")

    @staticmethod
    def told(reads):
        """Of each turn: where it began, what was read, and the whole text at its end."""
        text, turns = [], []
        for at, (ids,), _ in reads:
            text[at:] = ids
            if len(ids) > 1:
                turns.append((at, ids, list(text)))
        return turns

    @pytest.mark.parametrize("stopped", [False, True])
    def test_reads_what_is_new(self, tiny, words, reads, monkeypatch, capsys, stopped):
        """And Ctrl-C ends an answer, not the conversation."""
        noted = Llama.hidden

        def interrupted(model, *args):
            h = noted(model, *args)
            if stopped and len(reads) == 4:
                raise KeyboardInterrupt
            return h
        monkeypatch.setattr(Llama, "hidden", interrupted)
        self.talk(monkeypatch, tiny, "a man", "", "of x", more=["--max-new-tokens", "6"])
        out, err = capsys.readouterr()
        assert err.startswith("a conversation in the format llama2; Ctrl-C") and "error" not in err
        assert (" [stopped]" in out) == stopped
        one, two, three = self.told(reads)
        form = generate.CHATS["llama2"]
        first = generate.turn(words, form, "a man", "S")
        second = generate.turn(words, form, "", "S", False)
        assert one == (0, first, first) and two[1][-len(second):] == second
        answer = two[2][len(first):-len(second)]
        assert len(answer) == 6 - 3 * stopped and len(two[1]) <= 1 + len(second)
        assert out[:2] == words.decode(words.encode("x") + answer)[1:3]
        model = generate.load(tiny)
        for at, ids, text in (two, three):
            h, = (h for start, (some,), h in reads if (start, some) == (at, ids))
            close(h[0, -1], model.hidden(torch.tensor([text]))[0, -1], atol=1e-4)

    def test_a_full_context_begins_anew(self, tiny, words, reads, monkeypatch, capsys):
        self.talk(monkeypatch, tiny, "a man", "of x " * 9, "x " * 200, "[INST]",
                  more=["--max-new-tokens", "999"])
        err = capsys.readouterr().err
        assert re.findall("error: (a text of|.INST. is)", err) == ["a text of", "[INST] is"]
        assert "the context of 128 tokens is full: it begins anew" in err
        form = generate.CHATS["llama2"]
        ids = [generate.turn(words, form, text, "S") for text in ("a man", "of x " * 9)]
        assert [turn[:2] for turn in self.told(reads)] == [(0, ids[0]), (0, ids[1])]


class TestEnds:
    """alpaca-lora#325, TinyLlama#55, vllm#4180 (Llama 3 has two): output that never ends."""

    def test_every_stop_of_the_family(self, chat_tokenizer, words):
        for ours in (words, chat_tokenizer("llama3", "")[0], chat_tokenizer("chatml", "")[0]):
            model = random_model(replace(SMALL, vocab_size=ours.vocab_size))
            assert ours.eos_id in ours.stop_ids
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
            assert generate.tokenizer_beside(tmp_path, 400).stop_ids == {2} | more

    def test_a_padded_vocabulary_is_named(self, tiny, capsys):
        """Chinese-LLaMA#87, llama2.c#263, build-nanogpt#95: gibberish by another vocabulary."""
        with pytest.raises(ValueError, match="400 tokens and the model 450: .*; try"):
            generate.tokenizer_beside(tiny, 450)
        generate.tokenizer_beside(tiny, 448)
        assert "rows 400 to 447 have no token in" in capsys.readouterr().err
        logits, sampling = torch.tensor([[0.0, 0, 0, 99]]), Sampling(1.0, vocab_size=3)
        (token, _), = sampling.draw(logits, [random.Random(0)])
        assert token < 3


class TestOddFolders:
    """What people have beside, around and instead of a checkpoint."""

    @pytest.mark.parametrize("name, head, said", [
        ("model.gguf", b"version https://git-lfs.github.com/spec/v1\n", "pointer of git-lfs.*pull"),
        ("ggml-model.bin", b"lmgg\1\0\0\0", "GGML file of before GGUF; try a GGUF"),
        ("ggml-model.bin", b"tjgg\3\0\0\0", "GGML file of before GGUF; try a GGUF"),
        ("model.pth", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "format of before 1.6; try"),
        ("model.gguf", b"GGUF\0\0\0\3" + bytes(20), "big-endian GGUF file; try a little"),
        ("adapter_config.json", b"{}", "an adapter alone; try the model that it was made for"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "of git-lfs.*pull")])
    def test_what_is_no_checkpoint_is_called_by_its_name(self, tmp_path, name, head, said):
        (tmp_path / name).write_bytes(head + bytes(99))
        with pytest.raises(ValueError, match=said):
            if name == "tokenizer.model":
                tokenizer.load_tokenizer(tmp_path / name)
            else:
                generate.load(tmp_path if "json" in name else tmp_path / name)

    def test_the_old_format_is_torchs(self, tmp_path):
        torch.save({"w": torch.ones(3)}, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
        with pytest.raises(ValueError, match="format of before 1.6; try to load and save"):
            generate.load(tmp_path / "m.pth")

    def test_a_gguf_file_alone_and_the_hub_cache(self, tmp_path, tiny):
        pytest.importorskip("gguf")
        model = random_model(SMALL)
        save_gguf(tmp_path / "saved", model)
        file, = (tmp_path / "saved").glob("*.gguf")
        shutil.copy(file, tmp_path / "m.gguf")
        for place in (tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "alone"):
            place.mkdir(parents=True)
            shutil.copy(tmp_path / "m.gguf", place)
        for path in (tmp_path / "models--a--b", tmp_path / "alone"):
            assert torch.equal(generate.load(path).norm.weight, model.norm.weight)
        shutil.copy(tmp_path / "m.gguf", tmp_path / "alone" / "n.gguf")
        with pytest.raises(ValueError, match="holds 2 GGUF files; try one, like .*m.gguf"):
            generate.load(tmp_path / "alone")

    def test_added_tokens_and_a_model_without_their_row(self, tiny, words, tmp_path, capsys):
        """Alpaca's [PAD] of id 32000, in a folder whose model has 32,000 rows."""
        shutil.copytree(tiny, tmp_path / "r")
        (tmp_path / "r" / "added_tokens.json").write_text('{"<s>": 1, "[PAD]": 400}')
        found = tokenizer.load_tokenizer(tmp_path / "r")
        assert found.vocab_size == 401 and found.special["[PAD]"] == 400
        assert found.encode("a [PAD]b") == [*words.encode("a "), 400, *words.encode("b")]
        ours = generate.tokenizer_beside(tmp_path / "r", 400)
        assert "[PAD]: the model has no row for it" in capsys.readouterr().err
        assert ours.encode("a [PAD]b") == words.encode("a [PAD]b")
        (tmp_path / "r" / "added_tokens.json").write_text('{"[PAD]": 402}')
        with pytest.raises(ValueError, match="gives .PAD. the id 402, which is not free or not"):
            tokenizer.load_tokenizer(tmp_path / "r")

    def test_special_tokens_on_the_command_line(self, tiny, words, capsys):
        tokenizer.main(["encode", "--tokenizer", str(tiny), "--special", "<s>a</s>"])
        assert capsys.readouterr().out.split() == [str(i) for i in words.encode("a", True, True)]
        texts = []
        for more in ([], ["--special"]):
            generate.main([str(tiny), "--prompt", "<s>a", "--json", "--temperature", "0", *more])
            texts.append(json.loads(capsys.readouterr().out)["ids"])
        generate.main([str(tiny), "--prompt", "a", "--json", "--temperature", "0"])
        assert texts[1] == json.loads(capsys.readouterr().out)["ids"] != texts[0]

    @pytest.mark.parametrize("seconds, left", [((2, 1), 1), ((1, 2), 2), ((9, 4, 1, 1.2), 2)])
    def test_busy_cores_are_left_to_others(self, monkeypatch, seconds, left):
        """seconds: what some work takes with the most threads, with one less, ..."""
        before, most = torch.get_num_threads(), len(seconds)
        monkeypatch.setattr(generate.timeit, "timeit", lambda work, number: seconds[
            most - torch.get_num_threads()])
        try:
            torch.set_num_threads(most)
            generate.leave_busy_cores()
            assert torch.get_num_threads() == most  # OMP_NUM_THREADS is set here
            monkeypatch.delenv("OMP_NUM_THREADS")
            generate.leave_busy_cores()
            assert torch.get_num_threads() == left
        finally:
            torch.set_num_threads(before)

    def test_arguments_are_utf_8_in_any_locale(self, tiny):
        """And files have names in UTF-8."""
        env = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
        done = subprocess.run([sys.executable, "tokenizer.py", "encode", "--tokenizer", str(tiny),
                               "é"], cwd=HERE, env=env, capture_output=True, text=True)
        wanted = tokenizer.load_tokenizer(tiny).encode("é")
        assert [int(i) for i in done.stdout.split()] == wanted, done.stderr


class TestGenerateCommand:
    def test_one_text_and_many(self, tiny, words, capsys):
        options = [str(tiny), "--prompt", "a man", "--max-new-tokens", "5"]
        generate.main([*options, "--json"])
        row = json.loads(capsys.readouterr().out)
        text = "a man" + row["text"]
        generate.main(options)
        assert capsys.readouterr().out == text + "\n" and len(row["ids"]) == 5
        generate.main([*options, "--num-samples", "2"])
        assert capsys.readouterr().out.startswith(f"--- 1 of 2\n{text}\n--- 2 of 2\na man")
        generate.main([str(tiny), "--prompt", "", "--stop", "the", "--json"])
        assert "the" not in json.loads(capsys.readouterr().out)["text"]
        for bad in (["--stop", ""], ["--chat", "--bench", "4"], ["--bench", "65"]):
            with pytest.raises(ValueError, match="; try"):
                generate.main([str(tiny), *bad])

    def test_bench(self, tiny, capsys):
        generate.main([str(tiny), "--bench", "4", "--quantize", "int8"])
        row = json.loads(capsys.readouterr().out)
        assert list(row) == ["prefill_tokens_per_s", "decode_tokens_per_s", "weight_gb",
                             "bandwidth_gb_s", "bandwidth_fraction", "load_s", "first_token_s",
                             "dtype", "quantize"]
        matrices = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 100 * 64) + 400 * 64
        scales = 3 * (2 * 64 + 2 * 32 + 2 * 100 + 64) + 400
        assert row["weight_gb"] * 1e9 == matrices + 2 * (scales + 7 * 64 + 400 * 64)
        assert row["dtype"] == "bfloat16" and row["decode_tokens_per_s"] > 0

    def test_score_says_ids_and_windows(self, tiny, words, tmp_path, capsys):
        lines = [json.dumps({"text": text}) for text in (PROSE * 3, "in want of a wife")]
        (tmp_path / "t.jsonl").write_text("\n".join(lines))
        options = [str(tiny), "--score", str(tmp_path / "t.jsonl")]
        generate.main([*options, "--json"])
        long, short, total = map(json.loads, capsys.readouterr().out.splitlines())
        assert [(row["window"], row["stride"]) for row in (long, short)] == [(128, 64), (128, 0)]
        ids = words.encode("in want of a wife", bos=True)
        scores = generate.load(tiny)(torch.tensor([ids]))[0].log_softmax(-1)
        close(torch.tensor(short["logprobs"]), scores[range(len(ids) - 1), ids[1:]])
        for row, text in ((long, PROSE * 3), (short, "in want of a wife")):
            assert row["ids"] == words.encode(text)
            assert row["nll"] == pytest.approx(-sum(row["logprobs"]), rel=1e-4)
        assert total["tokens"] == len(long["ids"] + short["ids"]) and "ids" not in total
        generate.main(options)
        said = capsys.readouterr().out.splitlines()
        assert [", in windows of 128 tokens, 64 apart" in line for line in said] == [1, 0, 0]
        with pytest.raises(ValueError, match="holds no text; try"):
            (tmp_path / "empty.txt").write_text("")
            generate.main([str(tiny), "--score", str(tmp_path / "empty.txt")])

    @pytest.mark.parametrize("format", generate.EXPORTS)
    def test_export(self, tiny, words, tmp_path, capsys, format):
        out, options = tmp_path / "out" / "model", ["--prompt", "a man", "--temperature", "0"]
        out.parent.mkdir()
        generate.main([str(tiny), "--export", format, str(out)])
        if format == "meta":
            assert (out / "tokenizer.model").read_bytes() == words.data
        for path in (tiny, out):
            generate.main([str(path), *options, "--max-new-tokens", "9"])
        said = capsys.readouterr().out
        assert said[:len(said) // 2] == said[len(said) // 2:] and "a man" in said
        if format == "hf":
            from transformers import AutoTokenizer, LlamaForCausalLM
            theirs = AutoTokenizer.from_pretrained(out)
            assert theirs.encode(PROSE) == words.encode(PROSE, bos=True)
            assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")
            ends = LlamaForCausalLM.from_pretrained(out).generation_config
            assert (ends.bos_token_id, ends.eos_token_id) == (1, [2])

    def test_gguf_with_its_vocabulary(self, tiny, words, tmp_path, capsys):
        pytest.importorskip("gguf")
        names = [words.processor.id_to_piece(i) for i in range(400)]

        def vocabulary(w):
            w.kv_data[0].pop("tokenizer.ggml.tokens")
            w.kv_data[0].pop("tokenizer.ggml.scores")
            w.add_token_list(names)
            w.add_token_scores([words.processor.get_score(i) for i in range(400)])
            w.add_token_types([2, 3, 3] + [6] * 256 + [1] * 141)
            w.add_bos_token_id(1)
            w.add_eos_token_id(2)
        file, _ = save_gguf(tmp_path / "m", generate.load(tiny), extra=vocabulary)
        for path in (tiny, file):
            generate.main([str(path), "--prompt", "a man", "--temperature", "0", "--json"])
        ours, theirs = capsys.readouterr().out.splitlines()
        assert ours == theirs and len(json.loads(ours)["ids"]) > 20


PAT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"  # Llama 3's
       r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
NOVEL = ("It is a truth universally acknowledged, that a single man in possession of 1000 pounds\n"
         "    must be in want of a wife.  Don't you think so?\n\nНо это другое дело. Ça va: 42!\n")
FIXED = [
    "", " ", "\n", "  a  ", "In 2023: 1234567 llamas\n\n\n  x", NOVEL, "'s", "'rE", "\r", "日本語",
    "it's IT'S we'LLx I'Sx 'ſx don'Tx", "tab\tand\x1c\x1d\x85\xa0\u2028end", "a\r\n\r\nb \r\n c",
    "def f(x):\n    return x  # 10%\n", "👩\u200d👩\u200d👧 🦙", "٣٤٥٦ ⅷ½ 二〇 𝟙𝟚𝟛𝟜", "a\0b",
    "!" * 50 + "\n\n x", "<|eot_id|> <s> <0x0A> <unk>", "Ünï e\u0301 ß ǅ ﬁ ½ Å x𐐀𐐁1"]
BYTES = [bytes([i]) for i in range(256)]
LLAMA2, LLAMA3, TOK512 = (pytest.param(SHARED / "data" / name, marks=NEEDED) for name in (
    "tokenizers/llama2/tokenizer.model", "tokenizers/llama3/tokenizer.model",
    "stories260K/tok512.bin"))


def for_texts(check):
    from hypothesis import given, settings
    from hypothesis import strategies as st
    characters = st.characters(exclude_categories=("Cs", "Cn"))
    texts = st.lists(st.one_of(characters, st.sampled_from(FIXED), st.text(characters, max_size=8)),
                     max_size=12).map("".join)
    for text in FIXED:
        check(text)
    seeded = settings(derandomize=True, deadline=None, max_examples=120, database=None)
    seeded(given(texts)(lambda text: check(text)))()


def byte_pair(ranked):
    lines = (b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(ranked))
    return tokenizer.read_ranks(b"".join(lines))


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


def over_characters(model, kind="legacy"):
    """Hugging Face's tokenizer of a SentencePiece model, as transformers converts LLaMA's."""
    from tokenizers import (AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                            processors)
    from transformers.convert_slow_tokenizer import generate_merges
    names = [model.id_to_piece(i) for i in range(len(model))]
    vocab = {name: i for i, name in enumerate(names)}
    merges = generate_merges(vocab, {name: model.get_score(i) for name, i in vocab.items()})
    if kind == "words":  # a token that goes over the end of a word
        vocab["n▁"] = len(vocab)
        merges.insert(0, ("n", "▁"))
    theirs = Tokenizer(models.BPE(
        vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space, front = normalizers.Replace(" ", "▁"), [normalizers.Prepend("▁")] * (kind == "legacy")
    if kind in ("legacy", "replace"):
        theirs.normalizer = normalizers.Sequence([*front, space])
    else:
        scheme = "always" if kind == "words" else kind
        theirs.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    theirs.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        *[decoders.Strip(" ", 1, 0)] * (kind not in ("replace", "never"))])
    theirs.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    theirs.add_special_tokens([AddedToken(name, normalized=False) for name in names[:3]])
    theirs.add_special_tokens(["<|im_end|>", "<|im_end|>x"])
    theirs.add_tokens([AddedToken("<bla>", normalized=False)])
    return theirs


def over_bytes(kind):
    """A BPE over bytes, trained by Hugging Face's library, with one token that no merge makes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    whole, words = kind == "llama-bpe", pre_tokenizers.ByteLevel(False, use_regex=True)
    split = {"gpt-2": words, "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), words]), "llama-bpe":
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PAT), "isolated"),
                                 pre_tokenizers.ByteLevel(False, use_regex=False)])}[kind]
    theirs = Tokenizer(models.BPE(ignore_merges=whole))
    theirs.pre_tokenizer, theirs.decoder = split, decoders.ByteLevel()
    alphabet = [] if kind == "smollm" else pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator([NOVEL] * 9, trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=alphabet, min_frequency=2,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"] * (not whole)))
    file = json.loads(theirs.to_str())
    file["model"]["vocab"]["Ġwifes"] = len(file["model"]["vocab"])
    theirs = Tokenizer.from_str(json.dumps(file))
    if whole:
        theirs.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
        template = processors.TemplateProcessing(
            "<|begin_of_text|> $A", None, [("<|begin_of_text|>", len(file["model"]["vocab"]))])
        theirs.post_processor = processors.Sequence([processors.ByteLevel(), template])
    theirs.add_tokens(["<bla>"])
    return theirs


CHARACTER_KINDS = "legacy", "replace", "first", "always", "never", "words"


def hugging_face(kind):
    if kind in CHARACTER_KINDS:
        return over_characters(trained().processor, kind)
    return over_bytes(kind)


def unnamed_split():
    """llama.cpp's regular expressions for a GGUF that names no split, run by Hugging Face."""
    from tokenizers import Regex, pre_tokenizers
    patterns = (r"[\p{P}\$\+<=>\^~\|]+", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+"
                r"| ?[^\s\p{L}\p{N}]+|\s+(?!\S)", r"\p{N}+", r"[0-9][0-9][0-9]")
    return pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
        pre_tokenizers.ByteLevel(False, use_regex=False)])


def of_gguf(theirs, **more):
    """What a GGUF file has of Hugging Face's tokenizer."""
    file, added = json.loads(theirs.to_str()), theirs.get_added_tokens_decoder()
    names = [theirs.id_to_token(i) for i in range(theirs.get_vocab_size())]
    more |= {"tokens": names, "token_type": [1] * len(names),
             "merges": [" ".join(merge) for merge in file["model"]["merges"]]}
    for i, name in enumerate(names):
        if i in added:
            more["token_type"][i] = 3 if added[i].special else 4
        elif re.fullmatch("<0x..>", name):
            more["token_type"][i] = 6
    return {f"tokenizer.ggml.{key}": value for key, value in more.items()}


def many(n):
    """A BytePair of 512 + n tokens."""
    return byte_pair(BYTES + [b"%d!" % i for i in range(n)])


class TestSentencePiece:
    @pytest.mark.parametrize("file", [None, LLAMA2])
    def test_equals_sentencepiece(self, file):
        import sentencepiece
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
        assert ours.special == {"<unk>": 0, "<s>": 1, "</s>": 2} and ours.chat_template is None
        ids = [5, 1, *theirs.encode("a"), 2, *theirs.encode(" <s>")]
        assert [5, *ours.encode("<s>a</s> <s>", continues=True, allowed_special=["<s>", "</s>"])
                ][:4] == ids[:4] and 1 not in ours.encode("<s>a")
        assert [ours.token_bytes(i) for i in range(259)] == [" ⁇ ".encode(), b"", b"", *BYTES]

    def test_written_by_hand(self):
        """User-defined pieces, equal scores, no space in front: as the library reads the file."""
        import sentencepiece
        pieces = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3)]
        pieces += [(f"<0x{i:02X}>", 0, 6) for i in range(256)] + [("<|im_start|>", 0, 4)]
        pieces += [(word, 0, 1) for word in "▁ 中 国 人 民 中国 国人 人民 ▁中 人民人民".split()]
        for prefix in (True, False):
            data = tokenizer.write_model(pieces, prefix)
            ours, theirs = tokenizer.SentencePiece(data), sentencepiece.SentencePieceProcessor()
            theirs.LoadFromSerializedProto(data)
            text = "中国人民人民<|im_start|> 中国人民 <|im_start|>  x"
            assert ours.encode(text) == theirs.encode(text)
            assert ours.decode(ours.encode(text)) == text
            assert (ours.encode("国") == theirs.encode("国") == [262]) is not prefix
            with pytest.raises(ValueError, match="are equal.*; try"):
                tokenizer.huggingface_files(ours)
        ours = tokenizer.SentencePiece(tokenizer.write_model(pieces[:-5], True))
        with pytest.raises(ValueError, match="types; try"):
            tokenizer.huggingface_files(ours)


    @pytest.mark.parametrize("front, parts", [
        ("prepend", [" a", " b", "  c"]), ("always", [" a", " b", " c"]),
        ("first", [" a", "b", " c"]), ("never", ["a", "b", " c"])])
    def test_space_in_front(self, front, parts):
        ours = tokenizer.SentencePiece(trained().data, front=front)
        ids = ours.encode("a<s>b<s> c", allowed_special=["<s>"])
        shown = b"".join(ours.token_bytes(i) if i != 1 else b"|" for i in ids)
        assert shown.decode().split("|") == parts


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
        model = [tokenizer.train_sentencepiece(texts, 300, size).data for size in (3 << 24, 0)]
        assert model[0] == tokenizer.train_sentencepiece(texts[::4], 300).data != model[1]


class TestExtend:
    @NEEDED
    def test_chinese_llama(self, tmp_path, capsys):
        """Llama 2's pieces and chinese_sp.model's, encoded as the merged model of
        Chinese-LLaMA-Alpaca's own script."""
        wanted = json.loads((SHARED / "oracle/chinese_merge.json").read_text())
        data, out = SHARED / "data", str(tmp_path / "merged.model")
        tokenizer.main(["extend", str(data / "tokenizers/llama2"),
                        str(data / "vocab/chinese_sp.model"), out])
        assert "49953" in capsys.readouterr().out
        merged = tokenizer.load_tokenizer(out)
        added = merged.names[wanted["n_llama"]:]
        assert merged.vocab_size == wanted["n_merged"] == wanted["n_llama"] + len(added)
        assert added[:20] == wanted["first_added"] and added[-5:] == wanted["last_added"]
        for row in wanted["rows"]:
            assert merged.encode(row["text"]) == row["merged"]
            assert merged.decode(row["merged"]) == row["text"]

    def test_small(self, words, tmp_path):
        other = tokenizer.train_sentencepiece(["wife husband children " * 50], 300)
        other.save(tmp_path / "other.model")
        merged = tokenizer.extend(words, tmp_path / "other.model")
        assert merged.names[:400] == words.names
        assert merged.names[400:] == [name for name in other.names if name not in words.names]
        text = "husband of children"
        assert merged.decode(merged.encode(text)) == text
        assert len(merged.encode(text)) < len(words.encode(text))
        with pytest.raises(ValueError, match="only a SentencePiece model"):
            tokenizer.extend(tokenizer.Tokenizer, tmp_path / "other.model")


class TestSplitPattern:
    def test_equals_the_regex_module(self):
        import regex
        theirs = PAT.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
        def check(text, top=0x110000):
            assert tokenizer.split_pattern(PAT, top).findall(text) == regex.findall(theirs, text)
        for_texts(check)
        known = []
        for code in range(0x110000):
            kind = unicodedata.category(chr(code))
            if kind not in ("Cn", "Co", "Cs") and (kind[0] != "L" or code % 5 == 1):
                known.append(chr(code))
        check("".join(map("x{0}x {0} 1{0}2!{0}\n".format, known)))
        check("".join(map("x{0}x {0} 1{0}2!{0}\n".format, known[:128])))


class TestMerge:
    def test_worked_example(self):
        ranks = {"aa": 0, "ab": 1, "aaab": 2}
        for merge in (tokenizer.merge_naively, tokenizer.merge):
            parts = merge("aaabdaaabac", lambda left, right: ranks.get(left + right))
            assert parts == ["aaab", "d", "aaab", "a", "c"]

    def test_heap_equals_naive(self):
        draw = random.Random(0)
        for n in range(400):
            text = "".join(draw.choices("abc", k=n % 60))
            words = ["".join(draw.choices("abc", k=k)) for k in draw.choices(range(1, 6), k=40)]
            ranks, pairs = {w: i for i, w in enumerate(words)}, {}
            for rank in range(40):
                pairs[draw.choice(words), draw.choice([*words, "a", "b"])] = rank // 2
                pairs[draw.choice("ab"), draw.choice("abc")] = rank
            for rank in (lambda a, b: ranks.get(a + b), lambda a, b: pairs.get((a, b))):
                assert tokenizer.merge(text, rank) == tokenizer.merge_naively(text, rank)


class TestBytePair:
    def oracle(self, o):
        import tiktoken
        ranks = {token: i for i, token in enumerate(o.tokens[:len(o.ranks)])}
        return tiktoken.Encoding("", pat_str=PAT, mergeable_ranks=ranks, special_tokens=o.special)

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

    def test_special_tokens_only_where_allowed(self):
        ours, n, stops = ranked(), ranked().bos_id, {1, 8, 9}
        words = ("0 1 finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id "
                 "python_tag image 2 245").split()
        words = [f"<|{'reserved_special_token_' * w.isdigit()}{w}|>" for w in words]
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

    @pytest.mark.parametrize("file", [TOK512])
    def test_llama2c_merges_by_score(self, file):
        data, vocab, at = file.read_bytes(), {}, 4
        ours = tokenizer.load_tokenizer(file)
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

    @pytest.mark.parametrize("kind", ["model", "ranks", "bin"])
    def test_told_apart_wrong_ids_and_damage(self, kind, tmp_path):
        ours = ranked() if kind == "ranks" else trained()
        data = llama2c() if kind == "bin" else ours.data
        self.load(tmp_path, data).save(tmp_path / "saved")
        again, draw = tokenizer.load_tokenizer(tmp_path / "saved"), random.Random(0)
        assert type(again) is type(ours)
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
            (0, 2), (8, 2**31), (8, 2**32 - 1), (8, 6), (8, 4))]
        lies += [data + b"\0\0\0\0\2\0\0\0\7", data + b"\0\0\xc0\x7f\1\0\0\0\7", data + b"\0",
                 data.replace(b"<0xC1>", b"<0xC2>"),
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
    for i, (inside, key) in enumerate([*places(tree)]):
        true = inside[key]
        for lie in LIES[i % 3::3]:
            inside[key] = lie
            try:
                read(tree).encode("a 1\u20ac", bos=True, eos=True)
            except ValueError as error:
                assert "; try" in str(error) and "\n" not in str(error) and len(str(error)) < 400
                said.append(str(error))
        inside[key] = true
    return said


def check_saved(ours, folder):
    """What is loaded from a saved file does the same, whatever the file's name."""
    folder.mkdir()
    ours.save(folder / "tokenizer.model")
    again = tokenizer.load_tokenizer(folder / "tokenizer.model")
    for name in "special bos_id eos_id stop_ids adds_bos chat_template found_always".split():
        assert getattr(again, name) == getattr(ours, name), name
    assert [*map(again.encode, FIXED)] == [*map(ours.encode, FIXED)]
    return again


class TestHuggingFace:
    load = TestLoadTokenizer.load

    def equal(self, ours, theirs, for_texts=for_texts):
        names, hides = ours.special.keys(), isinstance(ours, tokenizer.SentencePiece)
        def check(text):
            ids = theirs.encode(text).ids
            assert ours.encode(text, bos=ours.adds_bos, allowed_special=names) == ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=hides)
            plain = ours.encode(text)
            special = {ours.special[name] for name in ours.special if name not in ours.found_always}
            assert not {*plain} & special
            if "<bla>" not in text and (hides or not ours.missing):  # SmolLM2 has not all bytes
                shown = b"".join(map(ours.token_bytes, ours.encode(text, continues=True)))
                assert shown.decode() == (text.replace("▁", " ") if hides else text)
        for_texts(check)
        for text in ("ab" * 1000, " wifes wifesx", "  <s> a<|im_end|> 1 <|eot_id|>b", "ananas\n",
                     "a<|im_end|>x<|im_end|>", "x    1   2  345    \n    6",
                     "a<bla> b <bla>", "<bla>", *(f"x{n * ' '}y" for n in range(40))):
            check(text)

    @pytest.mark.parametrize("kind", ["first", "smollm", "llama-bpe"])
    def test_added_tokens_take_in_spaces_or_are_words(self, kind, tmp_path):
        from tokenizers import AddedToken
        theirs = hugging_face(kind)
        theirs.add_tokens([AddedToken("<l>", lstrip=True, normalized=False),
                           AddedToken("<r>", rstrip=True, normalized=False),
                           AddedToken("wor", single_word=True, normalized=False),
                           AddedToken("<b>", lstrip=True, rstrip=True, normalized=False)])
        ours = self.load(tmp_path, theirs.to_str().encode())
        for text in ("a <l> b", "a  <r>  b", "a wor b word swor wor", " <b>\n <b> x",
                     "<r> <l> wor_"):
            ids = theirs.encode(text, add_special_tokens=False).ids
            assert ours.encode(text) == ids, text

    @pytest.mark.parametrize("kind", [*CHARACTER_KINDS, "smollm", "llama-bpe", "gpt-2"])
    def test_equals_tokenizers(self, kind, tmp_path):
        theirs = hugging_face(kind)
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
        assert check_saved(told, tmp_path / "x").data == told.data
        written = tokenizer.huggingface_files(ours)["tokenizer.json"]
        written = type(theirs).from_str(written.decode())
        self.equal(ours, written, lambda check: [*map(check, FIXED)])

    @pytest.mark.parametrize("kind", ["legacy", "llama-bpe"])
    def test_lies(self, kind, tmp_path):
        data = hugging_face(kind).to_str()
        read = lambda tree: self.load(tmp_path, json.dumps(tree).encode())
        if kind == "legacy":
            assert len(check_lies(read, json.loads(data))) > 100
        rest = {"normalized": True, "special": False, "single_word": False, "id": 3, "content": "a"}
        for part, change, named in (
                ("normalizer", {"type": "NFC"}, "NFC"), ("decoder", None, "decoder"),
                ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFD"}]}, "NFD"),
                ("pre_tokenizer", {"type": "Whitespace"}, "Whitespace"),
                ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "a+"}}, "a[+]"),
                ("post_processor", {"type": "BertProcessing"}, "Bert"),
                ("type", "WordPiece", "type .WordPiece"), ("dropout", 0.1, "dropout 0.1"),
                ("end_of_word_suffix", "</w>", "</w>"), ("merges", ["a zz"], "merge 0"),
                ("merges", ["u i"], "merge 0"), ("merges", [["", "e"]], "merge 0"),
                ("byte_fallback", kind != "legacy", "(normalizer|ignore_merges)"),
                *[("merges", [], "no scores"), (  # found only behind a space
                    "added_tokens", [rest | {"content": "<0x00>"}], "normalized true"),
                  ] * (kind == "legacy"),
                ("vocab", {"": 0, "a": 1}, "the ids"), ("vocab", {"a": 0.0}, "the ids")):
            tree = json.loads(data)
            tree["model" if part in tree["model"] else part] = (
                tree["model"] | {part: change} if part in tree["model"] else change)
            with pytest.raises(ValueError, match=f"file: .*{named}.*; try"):
                read(tree)
        deep = b'{"model":' * 100_000
        for name, lie in (("file", deep), ("file", data[:-9].encode()), ("file", b'{"a": 1}'),
                          ("file", b'{"model": "\xff"}'), ("tokenizer_config.json", b"[7]"),
                          ("tokenizer_config.json", b'{"bos_token": "absent"}'),
                          ("tokenizer_config.json", b'{"add_bos_token": 7}'),
                          ("chat_template.jinja", b"\xff")):
            (tmp_path / "file").write_text(data, "utf-8")
            (tmp_path / name).write_bytes(lie)
            with pytest.raises(ValueError, match="; try"):
                tokenizer.load_tokenizer(tmp_path / "file")
            (tmp_path / name).unlink()

    @pytest.mark.parametrize("file", [LLAMA2])
    def test_llama_2(self, file):
        ours = tokenizer.load_tokenizer(file)
        theirs = over_characters(ours.processor)
        self.equal(tokenizer.tokenizer_from_json(theirs.to_str().encode()), theirs)


class TestFromGGUF:
    @pytest.mark.parametrize("kind, front", [("legacy", True), ("replace", False)])
    def test_llama(self, kind, front, tmp_path):
        theirs = hugging_face(kind)
        scores = [trained().processor.get_score(i) for i in range(420)] + [0.0] * 3
        fields = of_gguf(theirs, model="llama", scores=scores, add_space_prefix=front,
                             bos_token_id=1, eos_token_id=2)
        fields["tokenizer.ggml.token_type"][0] = 2
        ours = tokenizer.tokenizer_from_gguf(fields)
        TestHuggingFace().equal(ours, theirs)
        assert check_saved(ours, tmp_path / "x").front == ours.front
        assert ours.adds_bos and (ours.bos_id, ours.stop_ids) == (1, {2, 420})
        with pytest.raises(ValueError, match="no token has id -1; try"):
            tokenizer.tokenizer_from_gguf(fields | {"tokenizer.ggml.bos_token_id": -1})
        fields["tokenizer.ggml.token_type"][422] = 3  # no token of all texts: a .model says it all
        model = tokenizer.tokenizer_from_gguf(fields)
        assert check_saved(model, tmp_path / "y").data == model.data and model.data[:1] == b"\n"
        used = next(i for i in ours.encode(NOVEL) if len(ours.token_bytes(i)) > 2)
        fields["tokenizer.ggml.token_type"][used] = 5  # unused
        assert used not in tokenizer.tokenizer_from_gguf(fields).encode(NOVEL)
        fields["tokenizer.ggml.token_type"][420] = 4
        assert tokenizer.tokenizer_from_gguf(fields).token_bytes(420) == b"<|im_end|>"
        if front:
            assert len(check_lies(tokenizer.tokenizer_from_gguf, fields)) > 50

    @pytest.mark.parametrize("pre, kind", [
        ("llama-bpe", "llama-bpe"), ("smollm", "smollm"), ("gpt-2", "gpt-2"), ("default", "gpt-2")])
    def test_gpt2(self, pre, kind, tmp_path):
        theirs = hugging_face(kind)
        if pre == "default":
            theirs.pre_tokenizer = unnamed_split()
        bos, eot, eos, _ = theirs.get_added_tokens_decoder()
        fields = of_gguf(theirs, model="gpt2", pre=pre, bos_token_id=bos, eos_token_id=eos,
                             eot_token_id=eot)
        fields["tokenizer.chat_template"] = "{{ 2 }}"
        ours = tokenizer.tokenizer_from_gguf(fields)
        TestHuggingFace().equal(ours, theirs)
        check_saved(ours, tmp_path / "x")
        assert ours.adds_bos is (kind == "llama-bpe") and ours.chat_template == "{{ 2 }}"
        assert (ours.bos_id, ours.eos_id) == (bos, eos) and {eos, eot} <= ours.stop_ids
        fields["tokenizer.ggml.add_bos_token"] = False
        assert not tokenizer.tokenizer_from_gguf(fields).adds_bos
        with pytest.raises(ValueError, match="pre .qwen2.*; try"):
            tokenizer.tokenizer_from_gguf(fields | {"tokenizer.ggml.pre": "qwen2"})
        if kind == "smollm":
            assert len(check_lies(tokenizer.tokenizer_from_gguf, fields)) > 50


def small(kind):
    if kind in ("trained", "ranked"):
        return globals()[kind]()
    return tokenizer.tokenizer_from_json(hugging_face(kind).to_str().encode())


class TestHuggingfaceFiles:
    @pytest.mark.parametrize("kind", [
        "trained", "ranked", "legacy", "first", "smollm", "gpt-2", "llama-bpe"])
    def test_transformers_reads_the_same_ids(self, kind, tmp_path):
        from transformers import AutoTokenizer
        made = small(kind)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(
            {"chat_template": "{{ 3 }}", "eos_token": [*made.special][-1]}))
        made.save(tmp_path / "t")
        ours = tokenizer.load_tokenizer(tmp_path / "t")
        for name, data in tokenizer.huggingface_files(ours).items():
            (tmp_path / name).write_bytes(data)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        def check(text):
            ids = ours.encode(text, bos=ours.adds_bos, allowed_special=ours.special)
            assert theirs.encode(text) == ids == again.encode(
                text, bos=again.adds_bos, allowed_special=again.special)
        again = tokenizer.load_tokenizer(tmp_path / "tokenizer.json")
        for_texts(check)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
        assert theirs.chat_template == again.chat_template == "{{ 3 }}"
        assert len(theirs) == ours.vocab_size and again.special == ours.special


class TestStreamDecoder:
    @pytest.mark.parametrize("kind", ["trained", "ranked", "legacy", "llama-bpe"])
    def test_equals_decode(self, kind):
        ours = small(kind)
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
        ("", []), ("a\n\n" * 21845 + "b", [65536]), ("é" * 65537, [65536, 1]),
        ("w" * 200000, [65536] * 3 + [3392]),
        (("é" * 99 + "\n\n") * 2000, [16463] * 12 + [4444]),  # at blank lines
        (("y" * 99 + "\r\n\r\n") * 2000, [16480] * 12 + [8240]),
        (("y" * 30000 + "\n\n\n\n") * 10, [30004] * 10),
        (("z" * 99 + "\n") * 2000, [16400] * 12 + [3200]),  # at line ends, where there are none
        ("v" * 60000 + "\n" + "v" * 5000 + "\n\n" + "v" * 9000, [65003, 9000]),
        ("v" * 60000 + "\n" + "v" * 9000 + "\n\n" + "v" * 60000, [60001, 65536, 3466])])
    def test_where(self, text, lengths):
        pieces = list(tokenizer.cut(io.StringIO(text, newline="")))
        assert "".join(pieces) == text and list(map(len, pieces)) == lengths


class TestDocuments:
    def test_files_folders_and_jsonl(self, tmp_path):
        skipped, jsonl = [], "\n".join(['{"text": "a\\nb"}', "", "{", '{"text":5}', "[1]", '"text"',
                 "7", '{"text": "\\ud800 pair"}', "[" * 100_000, json.dumps({"text": NOVEL * 999})])
        array = json.dumps([{"text": "one"}, {"text": "two"}, {"no": 1}])
        for name, data in {
                "z": b"last", "b/a": b"\xef\xbb\xbf\r\n", ".n/x": b"", ".x": b"", "a.py": b"first",
                "empty": b"", "nul": b"a\0b", "short": b"\xc3", "m.JSONL": jsonl.encode(),
                "l.json": array.encode(), "k.json": b'{"a": 1}', "run/run.json": b""}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
        (tmp_path / "b" / "up").symlink_to(tmp_path)
        (tmp_path / "linked").symlink_to(tmp_path / "b")
        reader = tokenizer.documents([tmp_path, tmp_path / "a.py", tmp_path / "absent"], skipped)
        assert ["".join(next(reader)) for _ in range(11)] == [
            "first", '{"a": 1}', "one", "two", "a\nb", "? pair", NOVEL * 999, "last", "\r\n",
            "\r\n", "first"]
        with pytest.raises(ValueError, match="absent does not exist; try"):
            next(reader)
        assert [line.removeprefix(str(tmp_path))[1:] for line in skipped] == [
            ".n: left out by its name", ".x: left out by its name", "empty: empty or not a regular "
            "file", "l.json: 1 lines are not JSON objects with a string \"text\"",
            "m.JSONL: 6 lines are not JSON objects with a string \"text\"", "nul: holds NUL bytes",
            "short: not UTF-8 text", "b/up: a link to a folder that holds it",
            "linked/up: a link to a folder that holds it",
            "run: a run, with its weights and its log"]

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
        hugging_face("legacy").save(str(tmp_path / "t.json"))
        status, out, err = self.run(capsys, "info", tmp_path / "t.json")
        assert (status, err) == (0, "") and "SentencePiece: 423 tokens, bos 1, eos 2" in out
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


class TestArrange:
    CONFIG = LlamaConfig(32, 4, 8, 4, 36, 64, 32)

    def arrange(self, options, size, near, seq_len=32, **change):
        """options are dp tp pp."""
        dp, tp, pp = options.split()
        config = replace(self.CONFIG, **change)
        return arrange(config, 8, seq_len, size, near, dp, int(tp), int(pp))

    @pytest.mark.parametrize("options, size, near, layout", [
        ("fsdp 1 1", 1, 1, {}), ("none 1 1", 1, 1, {}), ("fsdp 1 1", 4, 4, {"shards": 4}),
        ("fsdp 1 1", 8, 2, {"shards": 8}), ("ddp 1 1", 4, 2, {"replicas": 4}),
        ("fsdp 2 1", 4, 4, {"tp": 2, "shards": 2}), ("none 4 1", 4, 4, {"tp": 4}),
        ("ddp 1 2", 4, 4, {"pp": 2, "replicas": 2}),
        ("fsdp 2 2", 8, 8, {"pp": 2, "tp": 2, "shards": 2}),
        ("fsdp 1 4", 4, 4, {"pp": 4}), ("fsdp 4 1", 32, 8, {"tp": 4, "shards": 8}),
        ("hybrid 1 1", 8, 4, {"replicas": 2, "shards": 4}),  # the state within a machine
        ("hybrid 2 1", 8, 4, {"replicas": 2, "shards": 2, "tp": 2}),
        ("hybrid 4 1", 8, 2, {"replicas": 2, "tp": 4}),
        ("hybrid 1 1", 6, 4, {"replicas": 3, "shards": 2})])
    def test_possible(self, options, size, near, layout):
        found = self.arrange(options, size, near)
        assert found == Layout(**layout) and found.size == size

    @pytest.mark.parametrize("options, size, change, message", [
        ("fsdp 3 1", 3, {}, "--tp 3 does not divide n_kv_heads=4; try --tp with one of 1, 2, 4"),
        ("fsdp 4 1", 4, {"hidden_dim": 38}, "--tp 4 .* hidden_dim=38; try --tp with one of 1, 2$"),
        ("fsdp 4 1", 4, {"vocab_size": 61}, "--tp 4 .* vocab_size=61; try --tp with one of 1$"),
        ("fsdp 4 1", 4, {"seq_len": 30}, "--tp 4 .* seq_len=30; try --tp with one of 1, 2$"),
        ("fsdp 1 5", 5, {}, "--pp 5: .* 4 layers; try --pp with up to 4"),
        ("fsdp 4 1", 6, {}, "6 processes .* --tp 4 x --pp 1; try .* product is one of 1, 2, 3, 6"),
        ("fsdp 2 4", 4, {}, "4 processes .* --tp 2 x --pp 4; try .* is one of 1, 2, 4"),
        ("fsdp 1 1", 9, {}, "9 data-parallel .* 8 sequences of a step; try at most 8 processes"),
        ("ddp 2 1", 18, {}, "9 data-parallel .*; try at most 16 processes, or a larger"),
        ("none 2 1", 4, {}, "--dp none .* 2 x 2 .*--dp ddp or --dp fsdp, or 2 processes")])
    def test_impossible(self, options, size, change, message):
        with pytest.raises(ValueError, match=message) as error:
            self.arrange(options, size, 4, **change)
        assert "\n" not in str(error.value)

    def test_what_does_not_divide(self):
        assert [Layout(1, 4, pp=2).passes(2048, rows) for rows in (3, 4)] == [172, 128]
        config = SIZES["llama3.1-405b"][0]
        assert [train.stage_layers(config, i, 16) for i in range(16)] == [7, *[8] * 14, 7]


def saved_by_autograd(config, rows, seq_len, dtype, attention, backward):
    """Bytes of activations that a layer in dtype really keeps for its backward."""
    model = random_model(replace(config, n_layers=1), attention=attention, backward=backward,
                         dtype=dtype)
    x = torch.zeros(rows, seq_len, config.dim, dtype=dtype, requires_grad=True)
    known = [*model.parameters(), *llama.rope_table(config, torch.arange(seq_len))]
    known, held = {p.untyped_storage().data_ptr() for p in known}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.shape[:1] != (seq_len,) and storage.data_ptr() not in known:  # not rope's
            held[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.run_layers(x, seq_len, None)
    return sum(size for _, size in held.values())


def run_of(config, layout=Layout(), **settings):
    """What an engine and the cost of a rank take from a train.Run."""
    usual = {"device": "cpu", "micro_batch": 1, "seed": 0, "compile": False, "dtype": "fp32",
             "attention": "fused", "backward": "manual", "seq_len": 16, "rows": 8, "start": None,
             "tune": "all", "objective": "pretrain", "learned": 1.0}
    return SimpleNamespace(config=config, layout=layout, **usual | settings)


def cost(config, layout, rows=4, seq_len=2048, passes=1, place=0, dtype="bf16", **settings):
    """Memory and bytes sent, on the rank at that place, of so many micro-batches."""
    run = run_of(config, layout, seq_len=seq_len, dtype=dtype, rows=passes * rows * layout.dp,
                 **settings)
    return train.rank_memory(run, rows, place), train.rank_traffic(run, rows, place)


class TestCost:
    def test_flops(self):
        config = SIZES["65b"][0]
        matrices = 65285660672 - 32000 * 8192
        assert train.flops_per_token(config, 2048) == 6 * matrices + 6 * 80 * 8192 * 2048
        tied = SIZES["stories15m"][0]
        assert train.flops_per_token(tied, 256) == 6 * 15191712 + 6 * 6 * 288 * 256
        assert 1e8 < train.matmul_flops("cpu", torch.float32) < 1e15
        assert train.matmul_flops("mps", torch.float32) is None

    @pytest.mark.parametrize("backward, attention", [
        ("manual", "fused"), ("manual", "tiled"), ("manual", "equation"), ("autograd", "fused"),
        ("autograd", "equation")])
    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize("change", [{}, {"n_kv_heads": 4, "hidden_dim": 64},
                                        {"head_size": 20, "dim": 96}])
    def test_memory_counts_what_is_saved(self, change, dtype, backward, attention):
        config, kind = replace(SMALL, n_layers=2, **change), train.DTYPES[dtype]
        real = saved_by_autograd(config, 3, 40, kind, attention, backward)
        options = {"dtype": dtype, "attention": attention}
        found, _ = cost(config, Layout(), 3, 40, backward=backward, **options)
        if backward == "manual" and attention == "equation":
            real += 16 * 3 * config.n_heads * 40**2 // 2  # of one layer at a time
        assert found["activations"] == pytest.approx(2 * real, rel=0.01)
        assert sum(found[name] for name in ("weights", "gradients", "AdamW")) == (
            16 * config.n_params + 4 * 21)  # a count of steps for each parameter
        if backward == "autograd":
            again, _ = cost(config, Layout(), 3, 40, backward="recompute", **options)
            inputs = 2 * 3 * 40 * config.dim * kind.itemsize
            assert again["activations"] == inputs + found["activations"] // 2

    @pytest.mark.parametrize("tied", [False, True])
    def test_weights_are_those_of_torch(self, tied):
        """Uneven shards: 48, 24, 100 and 97 rows over 7 ranks."""
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
        memory, _ = cost(config, Layout(shards=7), 1, 8)
        assert memory["weights"] == memory["gradients"] == 4 * real > 4 * config.n_params / 7
        assert memory["AdamW"] == 8 * real + 4 * len(list(model.parameters()))

    @pytest.mark.parametrize("backward", llama.BACKWARD)
    def test_memory_falls_as_the_work_is_split(self, backward):
        config = replace(SMALL, n_layers=8, n_heads=8, n_kv_heads=8, dim=64, hidden_dim=128,
                         vocab_size=512)

        def need(passes=1, place=0, **layout):
            return cost(config, Layout(**layout), 2, 32, passes, place, backward=backward)[0]
        one, ddp, fsdp = need(), need(replicas=8), need(shards=8)
        hybrid = need(replicas=4, shards=2)
        assert ddp["weights"] == one["weights"] == 2 * hybrid["weights"] == 8 * fsdp["weights"]
        assert fsdp["activations"] == ddp["activations"] <= one["activations"]
        # Under autograd two inputs of products and two norms' weights are whole on each rank.
        layers = {"manual": 0, "autograd": 8, "recompute": 1}[backward]
        whole = layers * 3 * 2 * (2 * 32 * 64 + 64) * 2
        assert 4 * need(tp=4)["activations"] == one["activations"] + whole
        first, last = need(8, 0, pp=4), need(8, 3, pp=4)
        if backward == "manual":  # a quarter of the layers, of four micro-batches or one
            assert first["activations"] == one["activations"] == 4 * last["activations"]
        assert first["logits"] == 0 < last["logits"] == one["logits"]

    def test_buffers_and_logits(self):
        config, x = SIZES["7b"][0], 4 * 2048 * 4096 * 2
        root, matrices = (2 * 32000 + 1) * 4096, 32000 * 4096
        layer = (config.n_params - root) // 32
        first = 16 * layer + matrices  # in a pipeline whole copies, and no logits but at its end
        for layout, buffers, logits in (
                (Layout(), 0, 4 * matrices),
                (Layout(2), 2 * config.n_params + 4 * root, 4 * matrices),
                (Layout(1, 2), 2 * (root + 2 * layer) + 6 * root, 8 * matrices),
                (Layout(tp=2), 2 * x, 4 * matrices // 2), (Layout(1, 2, 2), 6 * first, None)):
            found, _ = cost(config, layout, passes=8)
            V = 32000 // layout.tp
            rows = 0 if logits is None else 12 * llama.logit_rows(V, 4096) * V
            assert (found["buffers"], found["logits"]) == (buffers, rows + (logits or 0))

    def test_bytes_on_the_wire(self):
        config = SIZES["7b"][0]

        def wire(layout, backward="manual", passes=3, place=0):
            found = cost(config, layout, passes=passes, place=place, backward=backward)[1]
            return {name: size for name, size in found.items() if size}
        P, root, x = config.n_params, (2 * 32000 + 1) * 4096, 4 * 2048 * 4096 * 2
        assert wire(Layout()) == {} and wire(Layout(8)) == {"replicas": 2 * 4 * P * 7 // 8}  # fp32
        fsdp = wire(Layout(1, 8))
        assert fsdp == {"shards": 3 * (2 * P + 2 * (P - root) + 4 * P) * 7 // 8}
        assert wire(Layout(2, 8)) == fsdp | {"replicas": 2 * 4 * P // 8 // 2}
        half = wire(Layout(2, pp=2), place=1)["replicas"] // 4  # the parameters of the last stage
        assert wire(Layout(1, 8, pp=2), place=1)["shards"] == 6 * half * 7 // 8
        for backward, exchanges in (("manual", 10), ("autograd", 8), ("recompute", 12)):
            assert wire(Layout(tp=8), backward) == {"tp": 3 * (32 * exchanges + 4) * x * 7 // 8}
        crossings = [wire(Layout(tp=2, pp=4), passes=4, place=place)["pp"] for place in range(4)]
        assert crossings == [4 * n * x // 2 for n in (1, 2, 2, 1)]

    @pytest.mark.parametrize("there, options, advice", [
        (25e9, "--size 7b", "7b needs about 11[0-9] GB .*weights 27.0.*, and 25 GB are free; try"),
        (25e9, "--size llama3.1-405b", "405b needs about .*; try a smaller --size"),
        (4e8, "--size stories15m --set max_seq_len=65536", "--micro-batch 1 or --seq-len 32768"),
        (6e8, "--size stories15m", None), (2**50, "--size stories15m", (32, True)),  # 8192 tokens
        (2**50, "--size stories15m --pp 2 --batch-tokens 16384", (8, True)),  # 4 x pp passes
        (2**50, "--size stories15m --micro-batch 7", (7, True))])
    def test_what_fits(self, there, options, advice, monkeypatch):
        """Fewer sequences at once where more do not fit; else a refusal before anything begins."""
        assert train.memory_there("cpu") > 1e8
        monkeypatch.setattr(train, "memory_there", lambda device: int(there))
        options = ["--gpu", "H100", "--plan", "--backward", "manual", *options.split()]
        args = train.parser().parse_args(options)
        run = train.resolve(args, "cpu", args.pp or 1, 1)
        if isinstance(advice, str):
            with pytest.raises(ValueError, match=advice):
                train.fit(run)
            return
        found = train.fit(run)
        if advice:
            assert (found.micro_batch, found.roomy) == advice
        else:
            assert found.micro_batch in (1, 2, 4, 8, 16) and not found.roomy


def planned(options, text=False):
    """What --plan prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train.main(["--plan", *options.split(), *([] if text else ["--json"])])
    return said.getvalue() if text else json.loads(said.getvalue())


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

    def test_65b_takes_21_days(self):
        """At the paper's 380 tokens/s on each of 2,048 A100: 49.7 % of their FLOP/s."""
        mfu = 380 * train.flops_per_token(SIZES["65b"][0], 2048) / 312e12
        found = planned(f"--size 65b --gpus 2048 --gpu A100 --tp 8 --mfu {mfu}")
        for name, value, within in (
                ("tokens_per_s", 380 * 2048, 1e-6), ("days", 20.8, 0.0025),
                ("mfu_as_papers", 0.497, 0.001), ("gpu_hours", 1022362, 0.005),
                ("tco2eq", 173, 0.005)):
            assert found[name] == pytest.approx(value, rel=within)

    def test_405b_as_it_was_trained(self):
        found = planned("--size llama3.1-405b --gpus 16384 --tp 8 --pp 16 --seq-len 8192")
        assert {"replicas": 1, "shards": 128, "tp": 8, "pp": 16, "fits": "yes",
                "bubble": 15 / 16}.items() <= found.items()
        assert found["memory"]["needed"] < 72e9 and 0.2 < found["mfu"] < 0.3

    @pytest.mark.parametrize("options, nearest", [
        ("--size 7b --dp ddp", "--dp fsdp --tp 1 --pp 1"),
        ("--size 7b --gpus 1", "more --gpus or --backward recompute"),
        ("--size llama3-70b --gpus 64 --pp 8 --dp ddp", "--dp fsdp --tp 4 --pp 8")])
    def test_what_does_not_fit_says_what_does(self, options, nearest):
        found = planned(options)
        assert found["memory"]["needed"] > 72e9 and found["fits"] == f"no; try {nearest}"

    def test_recomputing_takes_a_third_longer_in_less_memory(self):
        one, two = planned("--size 7b"), planned("--size 7b --backward recompute")
        assert two["step_s"] == pytest.approx(4 / 3 * one["step_s"])
        assert two["memory"]["activations"] < one["memory"]["activations"] / 4

    def test_cpu(self):
        found = planned("--size tiny --gpus 2 --gpu cpu --steps 50 --dtype fp32")
        assert found["steps"] == 50 and found["tokens"] == 50 * 2048 and 0 < found["days"] < 1

    def test_text(self):
        lines = planned("--size 7b", text=True).splitlines()
        assert len(lines) <= 40 and max(map(len, lines)) <= 80
        for line in ("params                6,738,415,616", "memory weights        3.37 GB",
                     "memory there          80.00 GB", "fits                  yes"):
            assert line in lines


def tensors_of(parameters):
    """What a state holds of these parameters, with other values in each tensor of AdamW."""
    parameters = dict(parameters)
    optimizer = train.make_optimizer(parameters, Recipe(0.1, 1, 1, eps=1e-8))
    for i, p in enumerate(parameters.values()):
        optimizer.state[p]["exp_avg"].fill_(i)
    return train.state_tensors(parameters, optimizer)


def save_now(folder, tensors, step, group=None):
    train.save_state(folder, tensors, {"step": step, "skipped": 7}, group).result()


def files(folder):
    return sorted(file.name for file in folder.iterdir())


class TestState:
    @pytest.fixture
    def states(self, tmp_path):
        """A folder with states of steps 1 to 3, of which two are kept, and the last tensors."""
        tensors, saving = tensors_of(random_model(SMALL).named_parameters()), None
        for step in (1, 2, 3):
            tensors["model.norm.weight"].fill_(step)
            facts = {"step": step, "skipped": step}
            saving = train.save_state(tmp_path, tensors, facts, None, saving)
        saving.result()
        return tmp_path, tensors

    def test_there_and_back_keeps_two(self, states):
        folder, tensors = states
        assert files(folder) == ["step-000000002", "step-000000003"]
        wanted = {name: t.clone() for name, t in tensors.items()}
        for t in tensors.values():
            t.fill_(-1)
        assert train.load_state(folder, tensors) == {"step": 3, "skipped": 3}
        assert all(torch.equal(t, wanted[name]) for name, t in tensors.items())
        kinds = {name.split(".")[0] for name in tensors}
        assert kinds == {"model", "exp_avg", "exp_avg_sq", "step"}
        assert train.load_state(folder / "none", tensors) is None
        (folder / "step-000000009").mkdir()  # damaged: the run went back to step 3
        (folder / "saving").mkdir()  # of a save that was cut short
        (folder / "saving" / "__9_0.distcp").write_bytes(b"")
        save_now(folder, tensors, 4)
        assert files(folder) == ["step-000000003", "step-000000004"]
        assert files(folder / "step-000000004") == [".metadata", "__0_0.distcp", "facts.json"]

    @pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "facts.json"])
    def test_damaged_is_named_and_passed_over(self, states, name, capsys):
        """A file of the newest state is gone, cut short, or has a flipped bit, which is found or
        one of padding."""
        folder, tensors = states
        state, file = folder / "step-000000003", folder / "step-000000003" / name
        data, wanted = file.read_bytes(), {name: t.clone() for name, t in tensors.items()}
        damaged, flips = [data[:0], data[:30], None], tokens(12, vocab=8 * len(data)).tolist()
        for bit in flips:
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            damaged.insert(0, flipped)
        for changed in damaged:
            file.unlink()
            if changed is not None:
                file.write_bytes(changed)
            if train.load_state(folder, tensors)["step"] == 3:
                assert all(torch.equal(t, wanted[name]) for name, t in tensors.items())
            else:
                assert torch.all(tensors["model.norm.weight"] == 2)
        said = capsys.readouterr().err.splitlines()
        assert all(f"{state} is damaged" in line for line in said)
        assert len(said) >= len(damaged) - 3 * (name == "__0_0.distcp")
        shutil.rmtree(folder / "step-000000002")
        with pytest.raises(ValueError, match="no state in .* is good; try --fresh"):
            train.load_state(folder, tensors)

    @pytest.mark.parametrize("word", ["mkdir", "BytesStorageMetadata", None])
    def test_hostile_metadata_is_not_executed(self, states, capsys, word):
        """Metadata of someone who means it, checksum included; None: as it was."""
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata
        folder, tensors = states
        state, mark = folder / "step-000000003", folder / "executed"
        metadata, facts = train.SafeReader(state).metadata, {"step": 3, "skipped": 3}

        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(mark),)
        if word == "BytesStorageMetadata":  # would be unpickled when it is loaded
            metadata.state_dict_metadata["model.norm.weight"] = BytesStorageMetadata()
        (state / ".metadata").write_bytes(pickle.dumps(Bomb() if word == "mkdir" else metadata))
        facts["crc32"] = train.checksum(state, facts)
        (state / "facts.json").write_text(json.dumps(facts))
        assert train.load_state(folder, tensors)["step"] == (2 if word else 3)
        assert not mark.exists() and (word or "") in capsys.readouterr().err

    def test_a_full_disk_keeps_the_older_states(self, states):
        folder, tensors = states
        with full_disk(100_000):
            with pytest.raises(OSError, match="state of step 4 could not be written.*try to free"):
                save_now(folder, tensors, 4)
        assert files(folder) == ["step-000000002", "step-000000003"]
        assert train.load_state(folder, tensors)["step"] == 3

    @pytest.mark.parametrize("free", [0, 2**60])
    def test_a_save_is_of_its_moment(self, tmp_path, monkeypatch, free):
        monkeypatch.setattr(train, "memory_there", lambda device: free)
        tensors, release, write = {"x": torch.ones(3)}, threading.Event(), train.Writer.write_data

        def slow(*args):
            assert release.wait(60)
            return write(*args)
        monkeypatch.setattr(train.Writer, "write_data", slow)
        if free == 0:  # no room for a copy: nobody may change it before it is saved
            release.set()
        saving = train.save_state(tmp_path, tensors, {"step": 1}, None)
        assert (tmp_path / "step-000000001").exists() == (free == 0)
        tensors["x"].fill_(2)
        release.set()
        saving = train.save_state(tmp_path, tensors, {"step": 2}, None, saving)  # waits
        assert (tmp_path / "step-000000001").exists()
        saving.result()
        for step in (2, 1):
            assert train.load_state(tmp_path, tensors)["step"] == step
            assert torch.all(tensors["x"] == step)
            shutil.rmtree(tmp_path / f"step-{step:09d}")

    def test_ctrl_c_is_no_damage(self, states, monkeypatch):
        def pressed(*args, **options):
            raise KeyboardInterrupt
        monkeypatch.setattr(train.SafeReader, "read_data", pressed)
        with pytest.raises(KeyboardInterrupt):
            train.load_state(*states)

    @pytest.mark.parametrize("tied", [False, True])
    def test_export_is_the_model(self, tmp_path, tied):
        model = random_model(replace(SMALL, tie_embeddings=tied))
        save_now(tmp_path / "state", tensors_of(model.named_parameters()), 1)
        run = run_of(model.config, out=tmp_path)
        train.export_state(tmp_path / "state" / "step-000000001", run)
        found = torch.load(tmp_path / "consolidated.00.pth")
        assert list(found) == [name for name, _ in model.named_parameters()]
        loaded = train.load(tmp_path)
        assert loaded.config == model.config
        for name, w in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], w)

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_export_holds_one_tensor(self, tmp_path, monkeypatch):
        config, used = replace(SMALL, n_layers=24, dim=256, hidden_dim=512), []
        weights = {f"model.{name}": torch.randn(shape)
                   for name, shape in train.shapes(config).items()}
        save_now(tmp_path, weights, 1)
        owner = sys.modules[train.write_meta.__module__]

        def anonymous():
            status = Path("/proc/self/status").read_text()
            return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])

        def measured(file, weight, dtype, write=owner.write_tensor):
            write(file, weight, dtype)
            used.append(anonymous() - before)
        monkeypatch.setattr(owner, "write_tensor", measured)
        before = anonymous()
        train.export_state(tmp_path / "step-000000001", run_of(config, out=tmp_path / "out"))
        assert len(used) == 24 * 9 + 3 and max(used) < 4 * config.n_params / 5


@contextlib.contextmanager
def full_disk(size):
    """No file of this process may grow beyond so many bytes."""
    import resource
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        signal.signal(signal.SIGXFSZ, handler)


SMALL_EVEN = replace(SMALL, n_layers=4, vocab_size=96)
LAYOUTS_OF_STATES = {"stages": Layout(pp=4), "grid": Layout(shards=2, tp=2),
                     "four": Layout(shards=4), "hybrid": Layout(replicas=2, shards=2)}


def rank_states(folder):
    """One of four ranks: states through every layout, disks that are full, damage, wrong bits."""
    folder, report, source = Path(folder), {}, "one"
    with train.join("cpu", 60) as world:
        rank, group = world.rank, train.patient_group()
        for name, layout in LAYOUTS_OF_STATES.items():
            engine = train.Engine(run_of(SMALL_EVEN, layout, seed=100))
            tensors = tensors_of(engine.parameters)
            facts = train.load_state(folder / source, tensors)
            train.save_state(folder / name, tensors, facts, group).result()
            source = name
        with full_disk(2_000 if rank == 2 else 2**40):
            try:
                save_now(folder / "hybrid", tensors, 2, group)
            except OSError as error:
                dist.barrier()
                report["full"] = str(error), files(folder / "hybrid")
            dist.barrier()
        save_now(folder / "hybrid", tensors, 2, group)
        if rank == 0:
            (folder / "hybrid" / "step-000000002" / "__3_0.distcp").write_bytes(b"")
        dist.barrier()
        report["damaged"] = train.load_state(folder / "hybrid", tensors)
        train.replicas_agree(tensors)
        if rank == 1:
            tensors["model.norm.weight"].to_local().view(torch.int32)[3] ^= 1
        try:
            train.replicas_agree(tensors)
        except SystemExit as end:
            report["wrong"] = end.code
        (folder / f"report-{rank}").write_text(json.dumps(report))
        dist.barrier()
        Path(folder / f"pid-{rank}").write_text(str(os.getpid()))
        time.sleep(60)  # until the test ends the parent


def rank_world(folder):
    """One of two ranks. At first one is killed while it writes; then all meet a mistake."""
    with train.join("cpu", 60) as world:
        rank, state, x = world.rank, Path(folder, "state"), {"x": torch.ones(4)}
        facts = train.load_state(state, x)
        if facts is None:  # the first time
            save_now(state, x, 1, train.patient_group())
            write = train.Writer.write_data

            def killed(*args):
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return write(*args)
            train.Writer.write_data = killed
        save_now(state, x, 2, train.patient_group())
        made = train.together(lambda: {"made by": rank})
        everywhere = train.of_all_ranks(lambda: rank + 5)
        Path(folder, f"world-{rank}").write_text(
            repr([*world, torch.get_num_threads(), facts, made, everywhere]))

        def fail_on_1():
            if rank == 1:
                raise OSError(28, "No space left on device", "shards")
        try:
            train.of_all_ranks(fail_on_1)
        except OSError as error:
            Path(folder, f"error-{rank}").write_text(str(error))
        raise ValueError("there is no such corpus; try --data")


def rank_start(folder):
    """The process that starts the ranks of rank_states."""
    command = [sys.executable, "-W", "ignore", __file__, "rank", "states", folder]
    sys.exit(train.start(4, command, Path(folder) / "state"))


@contextlib.contextmanager
def handlers_kept():
    """Puts pytest's handlers of signals back."""
    kept = {number: signal.getsignal(number) for number in train.STOPS}
    for number in kept:
        signal.signal(number, signal.SIG_DFL)  # a shell lets what it runs with & ignore SIGINT
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def launch(case, out, *words, seconds=200):
    """Starts two ranks of a case, which restart from states in out, and stops them when it takes
    too long; (status, what they and this process, their parent, said, what they printed)."""
    command = [sys.executable, "-W", "ignore", __file__, "rank", case, str(out), *words]
    line = f"exec {shlex.join(command)} 2>>{out}/err >>{out}/printed"
    stop = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    with open(out / "err", "a") as err, contextlib.redirect_stderr(err), handlers_kept():
        stop.start()
        try:
            status = train.start(2, ["sh", "-c", line], out / "state")
        finally:
            stop.cancel()
    return status, (out / "err").read_text(), (out / "printed").read_text()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def alive(pid):
    """Neither gone nor only waiting to be asked for its status."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What four ranks made of a state of one process: the folder, that state, their reports and
    what they said. Then the process that started them is killed, while they sleep."""
    folder = tmp_path_factory.mktemp("four")
    wanted = tensors_of(random_model(SMALL_EVEN).named_parameters())
    save_now(folder / "one", wanted, 1)
    with open(folder / "err", "w") as err:
        parent = subprocess.Popen([sys.executable, "-W", "ignore", __file__, "rank", "start",
                                   str(folder)], stderr=err, cwd=HERE)
    pids = [folder / f"pid-{rank}" for rank in range(4)]
    until(lambda: all(pid.exists() for pid in pids) or parent.poll() is not None)
    assert parent.poll() is None, (folder / "err").read_text()
    pids = [int(pid.read_text()) for pid in pids]
    assert all(map(alive, pids))
    parent.kill()
    parent.wait()
    reports = [json.loads((folder / f"report-{rank}").read_text()) for rank in range(4)]
    return folder, wanted, reports, (folder / "err").read_text(), pids


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of rank_world, the status and what was said."""
    folder = tmp_path_factory.mktemp("two")
    status, said, _ = launch("world", folder)
    return folder, status, said.splitlines()


class TestStatesOfRanks:
    def test_there_and_back_through_every_layout(self, four):
        folder, wanted, *_ = four
        for layout in LAYOUTS_OF_STATES:
            tensors = {name: torch.full_like(t, -1) for name, t in wanted.items()}
            assert train.load_state(folder / layout, tensors) == {"step": 1, "skipped": 7}
            assert all(torch.equal(t, wanted[name]) for name, t in tensors.items())
            written = {file.name for file in (folder / layout / "step-000000001").glob("*.distcp")}
            assert written == {f"__{rank}_0.distcp" for rank in range(4)}

    def test_what_happens_to_one_is_told_to_all(self, four):
        """A full disk, a damaged state, a wrong bit."""
        for report in four[2]:
            message, there = report["full"]
            assert re.match(r"the state of step 2 could not be written \(.*; try to free", message)
            assert there == ["step-000000001"]
            assert report["damaged"] == {"step": 1, "skipped": 7}
            assert report["wrong"] == 1
        damaged, wrong = four[3].splitlines()
        assert "step-000000002 is damaged and passed over" in damaged
        assert wrong.startswith("error: the copies of model.norm.weight on several ranks differ (1")

    def test_a_rank_killed_while_it_writes(self, two):
        folder, _, said = two
        assert files(folder / "state") == ["step-000000001", "step-000000002"]
        assert said[0] == "rank 1 was killed by signal 9; going on from the last good state"


class TestJoin:
    def test_place_threads_and_the_good_state(self, two):
        from tokenizer import cores
        for rank in range(2):
            found = eval((two[0] / f"world-{rank}").read_text())
            assert found[:4] == [rank, 2, 2, max(1, cores() // 2)]
            assert found[4] == {"step": 1, "skipped": 7}

    def test_a_mistake_of_all_is_one_line(self, two):
        _, status, said = two
        assert status == 2 and said[1:] == ["error: there is no such corpus; try --data"]

    def test_alone_nothing_is_started(self):
        with train.join("cpu", 60) as world:
            assert world == (0, 1, 1) and not dist.is_initialized()


class TestTogether:
    def test_result_and_error_are_everyones(self, two):
        for rank in range(2):
            assert eval((two[0] / f"world-{rank}").read_text())[5:] == [{"made by": 0}, [5, 6]]
            assert "No space left on device" in (two[0] / f"error-{rank}").read_text()
        assert train.together(lambda: 7) == 7 and train.of_all_ranks(lambda: 7) == [7]


@pytest.fixture
def handlers():
    with handlers_kept():
        yield


class TestStopper:
    @pytest.mark.parametrize("number", train.STOPS)
    def test_first_it_is_noted_then_it_acts(self, number, handlers, capsys):
        before, stopper = signal.getsignal(number), train.Stopper()
        os.kill(os.getpid(), number)
        assert stopper.signal == number and signal.getsignal(number) == signal.SIG_DFL
        assert "stopping after this step" in capsys.readouterr().err
        stopper.close()
        assert signal.getsignal(number) == before

    def test_what_is_ignored_stays_ignored(self, handlers):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        stopper = train.Stopper()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stopper.signal == 0
        stopper.close()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.usefixtures("handlers")
class TestStart:
    """The ranks are lines for a shell; $AGAIN starts came before."""

    def start(self, folder, line):
        (folder / "state").mkdir(exist_ok=True)
        line = f"cd {folder}; AGAIN=$TORCHELASTIC_RESTART_COUNT; touch $AGAIN-$RANK; {line}"
        return train.start(2, ["sh", "-c", line], folder / "state")

    def test_a_dead_rank_is_started_again_with_the_others(self, tmp_path, capfd):
        status = self.start(tmp_path, "[ $AGAIN = 3 ] && exit; [ $RANK = 0 ] && sleep 60;"
                            "mkdir state/step-$AGAIN; [ $AGAIN = 0 ] && exit 1; kill -9 $$")
        assert status == 0 and files(tmp_path)[-3:] == ["3-0", "3-1", "state"]
        lines = capfd.readouterr().err.splitlines()
        assert lines[0] == "rank 1 ended with status 1; going on from the last good state"
        assert lines[1:] == 2 * ["rank 1 was killed by signal 9; going on from the last good state"]

    @pytest.mark.parametrize("state", ["state/step-1", "state"])
    def test_twice_without_a_new_state_is_the_end(self, tmp_path, capfd, state):
        line = f"mkdir -p {state}; [ $RANK = 1 ] && kill -9 $$; sleep 60"
        assert self.start(tmp_path, line) == 1
        first, last = capfd.readouterr().err.splitlines()
        assert "going on" in first
        assert last.startswith("error: rank 1 was killed by signal 9, again")
        assert "1-0" in files(tmp_path) and "2-0" not in files(tmp_path)

    @pytest.mark.parametrize("status", [2, 143, 130, 129, 0])
    def test_what_was_meant_is_not_tried_again(self, tmp_path, status, capfd):
        """Asked to stop, others may still save; after a mistake they may wait for ever."""
        line = f"[ $RANK = 0 ] && sleep 0.4; touch saved-$RANK; exit {status}"
        assert self.start(tmp_path, line) == status
        assert ("saved-0" in files(tmp_path)) == (status != 2)
        assert capfd.readouterr().err == "" and "1-0" not in files(tmp_path)

    @pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
    def test_a_signal_is_passed_on_once_and_ranks_may_save(self, tmp_path, name):
        line = (f"trap 'echo got >> got-$RANK' {name}; touch ready-$RANK; while [ ! -e got-$RANK ];"
                "do sleep 0.02; done; sleep 0.3; touch saved-$RANK; exit 77")
        number = signal.Signals[f"SIG{name}"]

        def send():
            until(lambda: {"ready-0", "ready-1"} <= set(files(tmp_path)))
            os.kill(os.getpid(), number)
        thread = threading.Thread(target=send)
        thread.start()
        assert self.start(tmp_path, line) == 128 + number
        thread.join()
        for rank in range(2):
            assert (tmp_path / f"got-{rank}").read_text() == "got\n"
            assert (tmp_path / f"saved-{rank}").exists()

    def test_ignored_hangups_stay_ignored(self, tmp_path):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert self.start(tmp_path, "kill -HUP $PARENT_PID; sleep 0.1") == 0

    def test_without_the_parent_no_rank_lives(self, four):
        until(lambda: not any(map(alive, four[4])))  # they look every half a second


def shards(folder, sizes, weights=(None,) * 3):
    """Token shards of counted numbers, so that a token says where it stands."""
    sources = []
    for k, size in enumerate(sizes):
        for split, count in (("train", size), ("val", 101)):
            (np.arange(count) + 10_000 * k).astype("<u2").tofile(folder / f"{k}.{split}.bin")
        sources.append({"name": str(k), "path": f"text{k}", "dtype": "uint16", "val_bytes": 303,
                        "train_tokens": size, "val_tokens": 101, "weight": weights[k]})
    return sources


def batches_of(folder, sizes, weights=(None,) * 3, seed=0, bos_id=None):
    return train.Batches(folder, shards(folder, sizes, weights), 16, 4, seed, bos_id)


class TestBatches:
    def test_a_function_of_seed_step_and_number(self, tmp_path):
        one, two, other = (batches_of(tmp_path, [5000], seed=seed) for seed in (0, 0, 1))
        for step in (9, 3, 7):
            batch, again = one.step(step), two.step(step)
            assert batch.keys() == {"tokens", "targets"} and batch["tokens"].shape == (4, 16)
            assert all(torch.equal(batch[name], again[name]) for name in batch)
            row = one.sequence(4 * step + 2).tolist()
            assert row == list(range(row[0], row[0] + 17))  # T + 1 in a row
            assert batch["tokens"][2].tolist() == row[:-1]
            assert batch["targets"][2].tolist() == row[1:]
        assert not torch.equal(one.step(0)["tokens"], other.step(0)["tokens"])

    def test_every_epoch_reads_everything_evenly(self, tmp_path):
        batches, seen = batches_of(tmp_path, [5000]), np.zeros(5000)
        for step in range(3 * 5000 // 64):
            np.add.at(seen, batches.step(step)["tokens"].numpy(), 1)
        assert np.mean(seen == 0) < 0.01 and seen.max() <= 6
        assert batches.epochs(0, 3 * 5000 // 64) == pytest.approx(3, rel=0.02)
        short = batches_of(tmp_path, [20])  # to its last token
        assert {int(short.sequence(g)[0]) for g in range(50)} == {0, 1, 2, 3}

    def test_weights(self, tmp_path):
        batches = batches_of(tmp_path, [900, 5000, 300], [1, 2.0, 7])
        source = torch.stack([batches.step(s)["tokens"][:, 0] // 10_000 for s in range(250)])
        share = source.flatten().bincount() / source.numel()
        assert share.tolist() == pytest.approx([0.1, 0.2, 0.7], abs=0.01)
        free = batches_of(tmp_path, [900, 5000, 300])
        for k in range(3):
            assert free.epochs(k, 100) == pytest.approx(100 * 64 / 6200, rel=1e-3)

    def test_too_little_and_damage_are_said(self, tmp_path):
        with pytest.raises(ValueError, match="text0 has 16 tokens .*; try more text or"):
            batches_of(tmp_path, [16])
        source, = shards(tmp_path, [900])
        for other in ({}, source | {"train_tokens": 901}, source | {"dtype": "x"},
                      source | {"val_tokens": -9}, source | {"name": 3}):
            with pytest.raises(ValueError, match="shards in .* are damaged"):
                train.Batches(tmp_path, [other], 16, 4, 0)

    def test_held_out_windows(self, tmp_path):
        held_out, size = batches_of(tmp_path, [900]).held_out(10**6)
        targets = torch.cat([batch["targets"] for batch in held_out])
        assert targets.shape == (7, 16) and size == pytest.approx(300)  # 3 bytes a token
        assert targets.flatten().tolist() == [*range(1, 101), *[-1] * 12]  # each token once
        few, = batches_of(tmp_path, [900]).held_out(60)[0]
        assert len(few["targets"]) == 4

    def test_documents(self, tmp_path):
        batch = train.next_tokens(torch.tensor([[5, 1, 6, 7, 1], [6, 6, 1, 1, -1]]), 1)
        assert batch["begins"].nonzero().tolist() == [[0, 1], [1, 2], [1, 3]]
        assert batch["targets"].tolist() == [[1, 6, 7, 1], [6, 1, 1, -1]]
        close(train.document_starts(batch), starts(0, 1, 4, 6, 7, 8))
        batch = batches_of(tmp_path, [900], bos_id=400).step(0)
        assert torch.equal(batch["begins"], batch["tokens"] == 400)


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
        model, oracle = random_model(SMALL), random_model(SMALL)
        recipe = Recipe(0.01, 1, 1, eps=1e-8, weight_decay=0.5)
        ours = train.make_optimizer(dict(model.named_parameters()), recipe)
        theirs = torch.optim.AdamW(
            [{"params": p, "weight_decay": 0.5 if p.dim() > 1 else 0} for p in oracle.parameters()],
            0.01, (0.9, 0.95), 1e-8)
        for step in range(3):
            for p, same in zip(model.parameters(), oracle.parameters()):
                p.grad = same.grad = noise(*p.shape, seed=step)
            ours.step()
            theirs.step()
        before = random_model(SMALL).state_dict()
        for (name, p), wanted in zip(model.named_parameters(), oracle.parameters()):
            close(p, wanted, atol=1e-6)
            assert not torch.equal(p, before[name])


def engine_of(model, micro_batch=4):
    """One rank that holds all of it, with the weights of a model."""
    engine = train.Engine(run_of(model.config, micro_batch=micro_batch))
    engine.stage.load_state_dict(model.state_dict())
    return engine


class TestTrainStep:
    def step(self, engine, clip=1e9, lr=0.1, objective=train.PRETRAIN):
        """A step, and the gradients that AdamW got, by name."""
        recipe = Recipe(0.1, 1, 1, eps=1e-8, weight_decay=0.0)
        optimizer, seen = train.make_optimizer(engine.parameters, recipe), {}
        optimizer.register_step_pre_hook(lambda *_: seen.update(
            {name: p.grad.clone() for name, p in engine.parameters.items()}))
        batch = train.next_tokens(tokens(6, 21))
        return train.train_step(engine, optimizer, batch, objective, lr, clip), seen

    def test_frozen_weights_stay(self):
        engine = engine_of(random_model(SMALL))
        engine.stage.requires_grad_(False)
        engine.stage.output.requires_grad_(True)
        optimizer = train.make_optimizer(engine.parameters, SIZES["tiny"][1])
        train.train_step(engine, optimizer, train.next_tokens(tokens(2, 9)), train.PRETRAIN, 1, 1)
        before = random_model(SMALL).state_dict()
        changed = [name for name, p in engine.parameters.items() if not p.equal(before[name])]
        assert changed == ["output.weight"]

    def test_clips_to_the_norm(self):
        (_, norm, _), grads = self.step(engine_of(random_model(SMALL)), clip=1e-3)
        assert norm > 0.01
        assert get_total_norm(grads.values()).item() == pytest.approx(1e-3, rel=1e-3)

    def test_not_finite_changes_nothing(self):
        engine = engine_of(random_model(SMALL), 3)
        weight = engine.stage.layers[1].feed_forward.w2.weight
        handle = weight.register_hook(lambda grad: grad * math.inf)
        (loss, norm, _), grads = self.step(engine)
        assert math.isfinite(loss) and not math.isfinite(norm) and not grads
        handle.remove()
        for name, p in random_model(SMALL).named_parameters():
            assert torch.equal(engine.parameters[name], p)
            assert engine.parameters[name].grad is None

    def test_objective_is_the_callers(self):
        def squares(model, batch):
            return model.logits(model.hidden(batch["tokens"])).square().mean(-1).sum()
        model = random_model(SMALL)
        objective = train.Objective(squares, train.n_targets)
        (loss, norm, _), _ = self.step(engine_of(model), objective=objective)
        wanted = squares(model, train.next_tokens(tokens(6, 21))) / 120
        wanted.backward()
        assert loss == pytest.approx(wanted.item(), rel=1e-5)
        assert norm == pytest.approx(clip_grad_norm_(model.parameters(), 1).item(), rel=1e-5)


class TestEvaluate:
    @pytest.mark.parametrize("bos_id", [None, 50])
    def test_bits_per_byte(self, tmp_path, bos_id):
        sources, model, nll = shards(tmp_path, [900]), random_model(SMALL), 0
        (np.arange(101) % 97).astype("<u2").tofile(tmp_path / "0.val.bin")
        batches = train.Batches(tmp_path, sources, 16, 4, 0, bos_id)
        found = train.evaluate(engine_of(model), batches, train.PRETRAIN, 10**6)
        text = torch.arange(101) % 97
        for x, y in zip(text[:-1].split(16), text[1:].split(16)):
            begin = [at for at, token in enumerate(x) if at == 0 or token == bos_id]
            logits = model(x[None], boundaries=starts(*begin, len(x)))
            nll += F.cross_entropy(logits[0], y, reduction="sum").item()
        assert found["val_loss"] == pytest.approx(nll / 100, rel=1e-5)
        wanted = nll / math.log(2) / 300  # 3 bytes a token
        assert found["val_bpb"] == pytest.approx(wanted, rel=1e-5)


def case(steps, bos_id=None, backward="manual", dtype="fp32", tied=False, n_layers=2,
         hidden_dim=36, **layout):
    config = LlamaConfig(32, n_layers, 8, 4, hidden_dim, 64, 16, tie_embeddings=tied)
    return SimpleNamespace(layout=Layout(**layout), config=config, bos_id=bos_id, steps=steps,
                           backward=backward, dtype=dtype)


CASES = {
    "fsdp 4": case(3, 12, shards=4, hidden_dim=38), "tp 4": case(3, 12, tp=4),
    "fsdp 2 x tp 2": case(3, 12, shards=2, tp=2), "hybrid 2 x 2": case(3, 12, replicas=2, shards=2),
    "ddp 2 x tp 2": case(3, 12, replicas=2, tp=2), "pp 4": case(3, 12, pp=4, n_layers=5),
    "pp 2 x tp 2, tied": case(3, 12, pp=2, tp=2, tied=True),
    "pp 2 x fsdp 2, tied": case(3, 12, pp=2, shards=2, n_layers=3, tied=True),
    "tp 2, autograd": case(2, 12, "autograd", tp=2),
    "tp 2, recompute": case(2, 12, "recompute", tp=2),
    "fsdp 2, bf16": case(3, 12, dtype="bf16", shards=2),
    "tp 2, bf16": case(2, 12, dtype="bf16", tp=2)}
for _name, _layout in {"one": {}, "ddp 2": {"replicas": 2}, "fsdp 2": {"shards": 2},
                       "tp 2": {"tp": 2}, "pp 2": {"pp": 2, "n_layers": 3}}.items():
    CASES[f"{_name}, documents"] = case(8, 12, **_layout)
    CASES[f"{_name}, tied"] = case(3, tied=True, **_layout)


def step_rows(step):
    """Tokens of a step, some at the edges of each rank's part of 64 words; rows that 2 and 4 ranks
    share evenly and not, a rank that has none, and a row with fewer targets."""
    rows = 3 * tokens((8, 7, 5)[step % 3], 17, vocab=22, seed=step)
    rows[4, 9:] = -1
    return rows


def whole(tensor):
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def grow(parameters):
    """Weights that make every part of a layer matter."""
    for p in parameters:
        llama.local_shard(p.detach()).mul_(8 if p.dim() == 2 else 1)


def as_rank(case):
    """What this process finds as one of a layout, in two micro-batches a step and more."""
    steps = range(max(3, case.steps))
    batches = [train.next_tokens(step_rows(step), case.bos_id) for step in steps]
    micro_batch = 4 // (case.layout.dp * case.layout.pp)
    engine = train.Engine(run_of(case.config, case.layout, micro_batch=micro_batch,
                                 backward=case.backward, dtype=case.dtype))
    named = engine.parameters
    found = {"initial": {name: whole(p) for name, p in named.items()}, "place": engine.pp_rank,
             "rows": len(engine.rows(batches[0])["targets"])}
    grow(named.values())
    optimizer = train.make_optimizer(named, Recipe(1.0, 1, 1, eps=1e-8))
    with Calls() as calls:
        engine.loss(batches[1], train.PRETRAIN, train=True)
    found["calls"] = collections.Counter()
    for name in ("allreduce_", "_allgather_base_", "_reduce_scatter_base_", "broadcast_"):
        for args in calls.args.get(f"{name}.default", ()):
            found["calls"][f"{name} {tree_leaves(args)[0].dtype}"] += 1
    found["gradients"] = {name: whole(p.grad) for name, p in named.items()}
    held = named.values(), engine.gradients(), tree_leaves(list(optimizer.state.values()))
    found["bytes"] = [sum(llama.local_shard(x).nbytes for x in tensors) for tensors in held]
    optimizer.zero_grad()
    step = partial(train.train_step, engine, optimizer, objective=train.PRETRAIN, lr=3e-3, clip=1.0)
    found["steps"] = [step(batch, flag=i) for i, batch in enumerate(batches[:case.steps])]
    found["held out"], = engine.add_up(engine.loss(batches[2], train.PRETRAIN, train=False))
    mine = [llama.local_shard(p.detach()) for p in named.values()]
    before = [shard.clone() for shard in mine]
    engine.complete = partial(spoil, engine, engine.complete)
    loss, norm, _ = step(batches[0])
    unchanged = all(map(torch.equal, before, mine))
    return found | {"spoiled": (loss, norm, unchanged)}


def spoil(engine, complete):
    """Gradients are complete, and then not finite in one weight of the last rank alone."""
    complete()
    if dist.get_rank() == engine.layout.size - 1:
        engine.gradients()[-1].fill_(math.inf)


def alone(case):
    """The same by torch's own loss, backward, clipping and AdamW in one process."""
    model = Llama.create(case.config, 0, backward="autograd", dtype=train.DTYPES[case.dtype])
    named = dict(model.named_parameters())
    found = {"initial": {name: whole(p) for name, p in named.items()}, "steps": []}
    grow(named.values())

    def loss(rows):
        x, y = rows[:, :-1].clamp(min=0), rows[:, 1:].flatten()
        begin = [i for i, token in enumerate(x.flatten()) if i % 16 == 0 or token == case.bos_id]
        logits = model(x, boundaries=starts(*begin, x.numel()))
        return F.cross_entropy(logits.flatten(0, 1), y, ignore_index=-1)

    loss(step_rows(1)).backward()
    found["gradients"] = {name: whole(p.grad) for name, p in named.items()}
    matrices, norms = ([p for p in named.values() if p.dim() == n] for n in (2, 1))
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": norms, "weight_decay": 0}],
                                  3e-3, (0.9, 0.95), weight_decay=0.1)
    for i in range(case.steps):
        optimizer.zero_grad()
        value = loss(step_rows(i))
        value.backward()
        norm = clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        found["steps"].append((value.item(), norm.item()))
    return found | {"held out": loss(step_rows(2)).item()}


PARTS, WHOLES = noise(2, 3, 4).double(), noise(2, 3, 2, 4, seed=1).double()


def exchanged(rank):
    """g of 3 of 6 tokens, which are in rows of 2, g_bar of all, and what they do to gradients."""
    tp, found = llama.TensorParallel(dist.group.WORLD), []
    for exchange, x, dy in ((tp.g, PARTS, WHOLES), (tp.g_bar, WHOLES, PARTS)):
        x = x[rank].clone().requires_grad_()
        y = exchange(x, 2)
        y.backward(dy[rank])
        found += [y.detach(), x.grad]
    return found


def find_all(rank, size, folder):
    """All that one of `size` processes has to find out, each case in a file."""
    dist.init_process_group("gloo", f"file://{folder}/{size}", rank=rank, world_size=size)
    for name, of_case in CASES.items():
        if of_case.layout.size == size:
            torch.save(as_rank(of_case), f"{folder}/{name} {rank}.pt")
    if size == 2:
        torch.save(exchanged(rank), f"{folder}/exchanged {rank}.pt")
        torch.save([fine_tuned(*case) for case in FINE_TUNED], f"{folder}/fine-tuned {rank}.pt")
        torch.save(ppo_steps(folder, {"replicas": 2}), f"{folder}/ppo {rank}.pt")
    dist.destroy_process_group()


def rank_layouts(folder):
    """One, two and four ranks, forks of a process without threads: one import for all."""
    import torch._dynamo  # which optimizers import
    for size in (1, 2, 4):
        torch.multiprocessing.start_processes(find_all, (size, folder), size, start_method="fork")


@pytest.fixture(scope="module")
def found_by(tmp_path_factory, words):
    """name of a case -> what each rank found."""
    folder = tmp_path_factory.mktemp("layouts")
    found = {"folder": folder}
    save_meta(folder, random_model(replace(SMALL, vocab_size=400)))
    words.save(folder / "tokenizer.model")
    (folder / "rows.jsonl").write_text("\n".join(
        json.dumps({"instruction": text, "output": "x"}) for text in ("a man?", "of", "x in it")))
    command = [sys.executable, "-W", "ignore", __file__, "rank", "layouts", str(folder)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    for file in sorted(folder.glob("*.pt")):
        found.setdefault(file.stem[:-2], []).append(torch.load(file))
    return found


@pytest.fixture(scope="module", params=CASES)
def compared(request, found_by):
    """A case, what its ranks found, and what one process did."""
    case = CASES[request.param]
    return case, found_by[request.param], alone(case)


class TestLayouts:
    """The same training by one process and by many."""

    def test_initial_weights_gradients_and_all_steps(self, compared):
        case, ranks, oracle = compared
        within, within_norm = (1e-5, 1e-5) if case.dtype == "fp32" else (2e-3, 0.03)
        assert set().union(*(rank["initial"] for rank in ranks)) == set(oracle["initial"])
        for rank in ranks:
            for name, grad in rank["gradients"].items():
                assert torch.equal(rank["initial"][name], oracle["initial"][name]), name
                wanted = oracle["gradients"][name]
                assert (grad - wanted).abs().max() <= within_norm * wanted.abs().max(), name
            losses, norms, flags = zip(*rank["steps"])
            wanted_losses, wanted_norms = zip(*oracle["steps"])
            assert losses == pytest.approx(wanted_losses, rel=within)
            assert norms == pytest.approx(wanted_norms, rel=within_norm)
            assert flags == tuple(i * len(ranks) for i in range(case.steps))
            assert rank["held out"] == pytest.approx(oracle["held out"], rel=within)
        learnt = oracle["steps"][0][0] - oracle["steps"][-1][0]
        assert case.steps < 8 or learnt > 0.2, learnt

    def test_a_gradient_that_is_not_finite_on_one_rank_changes_no_weight(self, compared):
        for loss, norm, unchanged in (rank["spoiled"] for rank in compared[1]):
            assert math.isfinite(loss) and norm == math.inf and unchanged

    def test_the_plan_is_true(self, compared):
        case, ranks, _ = compared
        run = run_of(case.config, case.layout, backward=case.backward, dtype=case.dtype)
        for place in range(case.layout.pp):
            planned = train.rank_memory(run, 1, place)
            there = [rank["bytes"] for rank in ranks if rank["place"] == place]
            most = [max(each) for each in zip(*there)]
            assert most == [planned[what] for what in ("weights", "gradients", "AdamW")]

    def test_work_is_split(self, compared):
        case, ranks, _ = compared
        layout = case.layout
        assert all(rank["rows"] == 8 // layout.dp for rank in ranks)
        held = [rank["bytes"][0] // 4 for rank in ranks]  # weights
        norms, tables = case.config.dim * (2 * case.config.n_layers + 1), 64 * 32
        copies = layout.replicas * (layout.tp - 1) * norms  # norms are whole on each
        if layout.pp > 1 and case.config.tie_embeddings:
            copies += layout.replicas * tables  # on the first and on the last stage
        assert sum(held) == layout.replicas * case.config.n_params + copies
        assert layout.pp > 1 or max(held) < 1.2 * sum(held) / len(ranks)

    @pytest.mark.parametrize("name, sums, gathers, reductions", [
        # by 2 layers and the root, of 2 micro-batches; the root's weights stay for the backward
        ("ddp 2, documents", 3, 0, 0),  # once a step
        ("fsdp 2, documents", 0, 2 * (2 * 2 + 1), 2 * 3),
        ("fsdp 2, bf16", 0, 2 * (2 * 2 + 1), 2 * 3),
        ("hybrid 2 x 2", 3, 2 * (2 * 2 + 1), 2 * 3),  # between the replicas once a step
        # of 2 layers g and g_bar, forward and backward, h and h again; embedding and loss; norms
        ("tp 2, documents", 1, 2 * (2 * 6 + 3), 2 * (2 * 4 + 2)),
        ("pp 2, documents", 0, 0, 0)])
    def test_collectives_of_a_step(self, name, sums, gathers, reductions, found_by):
        weights = torch.bfloat16 if "bf16" in name else torch.float32  # as they travel
        wanted = {"allreduce_ torch.float32": sums, f"_allgather_base_ {weights}": gathers,
                  "_reduce_scatter_base_ torch.float32": reductions}
        for rank in found_by[name]:
            assert rank["calls"] == collections.Counter(wanted)


class TestTensorParallel:
    def test_g_and_g_bar_are_each_others_backward(self, found_by):
        for rank, (g, dx, g_bar, dx_bar) in enumerate(found_by["exchanged"]):
            for gathered in (g, dx_bar):
                close(gathered, PARTS.view(3, 2, 4), atol=0)
            for summed in (dx, g_bar):
                close(summed, WHOLES.sum(0).view(2, 3, 4)[rank], atol=1e-12)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of real text: some modules of the standard library."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("argparse ast bdb calendar cmd code codecs copy csv dis enum filecmp fractions "
                 "ftplib gzip heapq mailbox pdb platform queue random selectors shlex").split():
        file = Path(ast.__file__).with_name(f"{name}.py")
        if file.exists():
            shutil.copy(file, folder)
    return folder


def run_options(text, out, *more):
    shape = "dim=32 n_layers=2 n_heads=2 n_kv_heads=2 hidden_dim=64 max_seq_len=64"
    options = ("--vocab-size 400 --batch-tokens 256 --micro-batch 3 --steps 30 --save-every 6 "
               "--eval-every 10 --lr 0.003 --dtype fp32")
    return ["--data", str(text), "--set", *shape.split(), *options.split(), "--out", str(out),
            *more]


@pytest.fixture(scope="module")
def whole_run(text, tmp_path_factory):
    """An undisturbed run of 30 steps by one process, made once."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.main(run_options(text, out))
    return out


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    """Everything about each step that must not depend on how the run got there."""
    return [(r["step"], r["tokens"], r["loss"], r["lr"], r["grad_norm"], r.get("val_loss"))
            for r in log_of(out) if "event" not in r]


def nearly_equal(out, wanted):
    for ours, theirs in zip(losses(out), losses(wanted), strict=True):
        assert ours[:2] == theirs[:2]
        for a, b, within in zip(ours[2:], theirs[2:], (1e-5, 1e-5, 1e-4, 1e-5)):
            assert a == b or a == pytest.approx(b, rel=within)


def begun(whole_run, out):
    """A folder with the text of whole_run, where a run with its settings can begin."""
    shutil.copytree(whole_run / "tokens", out / "tokens")
    for name in ("tokenizer.model", "run.json"):
        shutil.copy(whole_run / name, out)
    return out


def same_weights(out, wanted):
    ours, theirs = (torch.load(folder / "consolidated.00.pth") for folder in (out, wanted))
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def before_steps(fault, set_attribute=partial(setattr, train)):
    """From now on fault(step, engine) is called before each step of runs in this process."""
    rate, go, now = train.learning_rate, train.train_step, []

    def learning_rate(step, *rest):
        now[:] = [step + 1]
        return rate(step, *rest)

    def train_step(engine, *rest):
        fault(now[0], engine)
        return go(engine, *rest)
    set_attribute("learning_rate", learning_rate)
    set_attribute("train_step", train_step)


def poison(monkeypatch, bad):
    """The n-th micro-batch that is trained on has a loss that is not a number if bad(n)."""
    calls = []

    def poisoned(model, batch):
        calls.append(torch.is_grad_enabled())
        broken = calls[-1] and bad(sum(calls))
        return train.next_token_loss(model, batch) * (math.nan if broken else 1)
    monkeypatch.setattr(train, "PRETRAIN", train.Objective(poisoned, train.n_targets))


def rank_killed(at, number, *options):
    """A run that gets a signal before its `at`-th step."""
    steps = []

    def fault(step, engine):
        steps.append(step)
        if len(steps) == int(at):
            os.kill(os.getpid(), int(number))
    before_steps(fault)
    train.main(list(options))


class TestRun:
    def test_learns_and_leaves_what_it_promises(self, whole_run):
        rows = log_of(whole_run)
        assert [r["step"] for r in rows] == list(range(1, 31))
        assert rows[0]["loss"] == pytest.approx(math.log(400), abs=0.3) and rows[-1]["loss"] < 5.6
        assert rows[9]["val_bpb"] > rows[29]["val_bpb"] and "val_bpb" not in rows[10]
        assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "world",
                "rank_params", "rank_tokens", "useful", "elapsed_s"} <= set(rows[0])
        assert rows[-1]["tokens"] == 30 * 256 and rows[0]["rank_tokens"] == 256
        assert {"params.json", "consolidated.00.pth", "tokenizer.model", "log.jsonl", "loss.svg",
                "state", "tokens"} <= set(files(whole_run))
        model = generate.load(whole_run)
        assert model.config.vocab_size == 400 and model.config.hidden_dim == 64
        assert rows[0]["rank_params"] == model.config.n_params

    def test_samples(self, whole_run, capsys):
        generate.main([str(whole_run), "--prompt", "import", "--prompt", "-1 + 2", "--json",
                       "--num-samples", "2", "--max-new-tokens", "9", "--temperature", "1"])
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [r["prompt"] for r in rows] == ["import"] * 2 + ["-1 + 2"] * 2
        assert all(len(r["ids"]) == len(r["logprobs"]) == 9 for r in rows)

    def test_killed_and_gone_on_bit_for_bit(self, text, whole_run, tmp_path):
        """A lock that a killed process leaves is none."""
        out, draw = begun(whole_run, tmp_path), random.Random(0)
        for number, status in ((9, -9), (signal.SIGTERM, 143), (9, -9)):
            words = ["killed", draw.randint(4, 9), int(number), *run_options(text, out)]
            done = subprocess.run([sys.executable, "-W", "ignore", __file__, "rank",
                                   *map(str, words)], cwd=HERE, capture_output=True, text=True)
            assert done.returncode == status, done.stderr
            with open(out / "log.jsonl", "a") as file:
                file.write('{"step": 2')  # a torn line
        train.main(run_options(text, out))
        assert losses(out) == losses(whole_run) and same_weights(out, whole_run)

    def test_goes_on_from_before_a_damaged_state(self, text, whole_run, tmp_path, capsys):
        shutil.copytree(whole_run, tmp_path / "r")
        newest = sorted((tmp_path / "r" / "state").iterdir())[-1]
        (newest / "__0_0.distcp").write_bytes(b"broken")
        train.main(run_options(text, tmp_path / "r"))
        assert "is damaged and passed over" in capsys.readouterr().err
        assert losses(tmp_path / "r") == losses(whole_run)
        events = [row for row in log_of(tmp_path / "r") if "event" in row]
        assert [(row["event"], row["step"]) for row in events] == [("resume", 24)]

    def test_finished_and_other_settings(self, text, whole_run, capsys):
        (whole_run / "consolidated.00.pth").unlink()  # as if killed just before it was written
        before, file = losses(whole_run), whole_run / "run.json"
        run = json.loads(file.read_text())
        del run["compile"]  # a run of before this setting existed
        file.write_text(json.dumps(run))
        train.main(run_options(text, whole_run))
        assert "finished at step 30; --steps N goes on, --fresh" in capsys.readouterr().err
        assert losses(whole_run) == before and generate.load(whole_run).config.dim == 32
        for change, was in ({"--lr": "lr=0.003", "--seed": "seed=0", "--seq-len": "seq_len=64",
                             "--backward": "backward=manual"}).items():
            value = "recompute" if change == "--backward" else "32"
            with pytest.raises(ValueError, match=f"trained with {was}; try --out DIR or --fresh"):
                train.main([*run_options(text, whole_run), change, value])
        with pytest.raises(ValueError, match="trained with n_layers=2; try"):
            train.main([*run_options(text, whole_run), "--set", "n_layers=3"])

    def test_every_setting_must_match_or_may_differ(self):
        """None is forgotten: what changes the result is compared."""
        free = {"out", "fresh", "minutes", "steps", "eval_every", "save_every", "layout", "device",
                "local_size", "threads", "code", "micro_batch", "roomy", "sources", "epochs",
                "learned", "eval", "eval_items"}
        parts = {*LlamaConfig.__dataclass_fields__, *Recipe.__dataclass_fields__}
        settings = {*train.Run.__dataclass_fields__, *parts} - {"config", "recipe"}
        assert settings == {*train.MUST_MATCH, *free}

    def test_fresh(self, text, whole_run, tmp_path):
        (tmp_path / "few").write_text("a few words")
        for data, why in (("nowhere", "there is no"), (f"{tmp_path}/few", "too little text")):
            with pytest.raises(ValueError, match=why):
                train.main(["--data", data, "--out", str(whole_run), "--fresh"])
            assert losses(whole_run) and generate.load(whole_run).config.dim == 32
        shutil.copytree(whole_run, tmp_path / "r")
        train.main([*run_options(text, tmp_path / "r"), "--fresh", "--steps", "2", "--lr", "0.01"])
        assert len(losses(tmp_path / "r")) == 2

    @pytest.mark.parametrize("more", [[], ["--fresh"]])
    def test_a_folder_of_something_else_is_left_alone(self, text, tmp_path, more):
        (tmp_path / "consolidated.00.pth").write_text("mine")
        with pytest.raises(ValueError, match="holds files that are no run's; try another --out"):
            train.main(run_options(text, tmp_path, *more))
        assert files(tmp_path) == ["consolidated.00.pth"]

    def test_edited_text_is_said_and_one_path_has_one_name(self, text, whole_run, tmp_path, capsys,
                                                           monkeypatch):
        monkeypatch.chdir(text.parent)
        shutil.copytree(text, tmp_path / "t")
        train.main([*run_options(tmp_path / "t", tmp_path / "r"), "--steps", "1"])
        assert "warning" not in capsys.readouterr().err
        with open(next((tmp_path / "t").iterdir()), "a") as file:
            file.write("more")
        train.main([*run_options(f"{tmp_path}/./t/", tmp_path / "r"), "--steps", "1"])
        assert re.search("warning: .*/t changed since it was cut .*; try", capsys.readouterr().err)

    def test_one_process_writes_a_run(self, text, tmp_path):
        with train.sole_writer(tmp_path), pytest.raises(ValueError, match="another process trains"):
            train.main(run_options(text, tmp_path))

    def test_auto_is_what_is_measured_to_be_faster(self, text, tmp_path, monkeypatch):
        rates = {torch.float32: 2, torch.bfloat16: 1}
        monkeypatch.setattr(train, "matmul_flops", lambda device, dtype: rates[dtype])
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
        assert train.faster_dtype("cpu") == "fp32" == train.faster_dtype("mps")
        args = train.parser().parse_args(["--size", "stories15m"])
        run = train.resolve(args, "cpu", 1, 1)
        assert train.fit(run).dtype == "fp32"
        need = sum(train.rank_memory(replace(run, dtype="bf16"), 1, 0).values())
        monkeypatch.setattr(train, "memory_there", lambda device: need / 0.89)
        assert train.fit(run).dtype == "bf16"  # fp32 would not fit
        rates[torch.bfloat16] = 3
        assert train.faster_dtype("cpu") == "bf16"
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
        assert train.faster_dtype("cpu") == "fp32"

    def test_a_run_keeps_its_dtype(self, text, whole_run, tmp_path, monkeypatch):
        options = run_options(text, begun(whole_run, tmp_path), "--dtype", "auto", "--steps", "2")
        monkeypatch.setattr(train, "faster_dtype", lambda device: "bf16")
        train.main(options)
        assert json.loads((tmp_path / "run.json").read_text())["dtype"] == "fp32"

    def test_a_mistake_before_there_is_text_leaves_no_settings(self, text, tmp_path):
        with pytest.raises(ValueError, match="; try"):
            train.main([*run_options(text, tmp_path / "r"), "--vocab-size", "99999"])
        train.main([*run_options(text, tmp_path / "r"), "--steps", "2"])
        assert len(losses(tmp_path / "r")) == 2

    @pytest.mark.parametrize("name, data", [
        ("run.json", "[]"), ("run.json", "{"), ("run.json", '{"sources": [{}]}'),
        ("run.json", '{"sources": 3}'), ("tokens/0.train.bin", "")])
    def test_damaged_files_of_a_run(self, text, whole_run, tmp_path, name, data):
        shutil.copytree(whole_run, tmp_path / "r")
        (tmp_path / "r" / name).write_text(data)
        with pytest.raises(ValueError, match="damaged.*; try --fresh"):
            train.main(run_options(text, tmp_path / "r"))

    def test_bad_files_are_named_and_counted(self, text, tmp_path, capsys):
        shutil.copytree(text, tmp_path / "t")
        (tmp_path / "t" / "bad.txt").write_bytes(b"\xff\xfe\x00")
        (tmp_path / "t" / "empty.txt").touch()
        (tmp_path / "t" / "lines.jsonl").write_text('{"text": "a"}\n{"txt": 3}\nx\n')
        train.main([*run_options(tmp_path / "t", tmp_path / "r"), "--steps", "1"])
        said = capsys.readouterr().err
        for name in ("bad.txt: not UTF-8 text", "empty.txt: empty", "lines.jsonl: 2 lines are not"):
            assert f"{tmp_path / 't'}/{name}" in said
        assert "passed over 3:" in said

    def test_skips_steps_that_are_not_finite_and_stops(self, text, whole_run, tmp_path,
                                                       monkeypatch):
        poison(monkeypatch, lambda n: n in (5, 6, 7) or n > 30)  # of two micro-batches a step
        with pytest.raises(ValueError, match="5 steps in a row .* is kept; try a lower --lr"):
            train.main([*run_options(text, begun(whole_run, tmp_path)), "--micro-batch", "2"])
        rows = log_of(tmp_path)
        assert [r["step"] for r in rows if r["loss"] is None] == [3, 4, 16, 17, 18, 19, 20]
        assert rows[-1]["skipped"] == 7 and rows[5]["skipped"] == 2
        assert files(tmp_path / "state") == ["step-000000006", "step-000000012"]

    def test_a_last_step_that_is_not_finite(self, text, whole_run, tmp_path, monkeypatch):
        poison(monkeypatch, lambda n: n > 4)
        train.main([*run_options(text, begun(whole_run, tmp_path)), "--micro-batch", "2",
                    "--steps", "3"])
        assert files(tmp_path / "state") == ["step-000000003"]
        assert log_of(tmp_path)[-1]["skipped"] == 1 and generate.load(tmp_path).config.dim == 32


def not_a_number(rank):
    """Rank 1 has a loss that is not a number at step 10: a fault for before_steps."""
    factor = [1]

    def poisoned(model, batch):
        return train.next_token_loss(model, batch) * factor[0]
    train.PRETRAIN = train.Objective(poisoned, train.n_targets)

    def fault(step, engine):
        factor[0] = math.nan if rank == 1 and step == 10 else 1
    return fault


def rank_runs(folder, *options):
    """One of two ranks: several runs one after the other, some with faults."""
    folder, report = Path(folder), {}
    with train.join("cpu", 60) as world:
        def go(name, *more):
            args = train.parser().parse_args([*options, "--out", str(folder / name), *more])
            try:
                with contextlib.ExitStack() as held:
                    train.train_rank(args, "cpu", world, train.time.perf_counter(), held)
            except (OSError, SystemExit) as end:
                return str(end)

        def stop(step, engine):
            if stop.at == step and world.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
        stop.at = 11
        before_steps(stop)
        report["stopped"] = go("grown", "--tp", "2")
        report["threads"] = torch.get_num_threads()
        stop.at = None
        asked = ["--eval", f"siqa={folder / 'dev.jsonl'}", "--eval-items", "5"]
        go("ddp", "--dp", "ddp", *asked)
        fault = not_a_number(world.rank)
        before_steps(fault)
        go("fsdp", *asked)
        go("fsdp", "--dp", "ddp")  # is finished
        with full_disk(100_000):
            report["full"] = go("fsdp", "--steps", "40")
        go("none", "--bench", "2")
        if world.rank == 1:  # whose clock is three times as fast
            train.time = SimpleNamespace(perf_counter=lambda: 3 * time.perf_counter())
        train.train_run = lambda run, *rest: sys.exit(run.steps)
        options = [*options[:options.index("--steps")], *options[options.index("--steps") + 2:]]
        report["steps"] = go("minutes", "--minutes", "0.2")
        (folder / f"report-{world.rank}").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, whole_run, text):
    """The folder of rank_runs, each rank's report, what was said and what was printed."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("fsdp", "ddp", "minutes", "grown"):
        begun(whole_run, folder / name)
    row = json.loads(PUBLISHED["siqa"][0])
    rows = [json.dumps({**row, "context": f"A{i} is.", "label": 1 + i % 3}) for i in range(7)]
    write_published(folder, "siqa", *rows)
    options = run_options(text, folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):
        before_steps(lambda step, engine: step == 6 and os.kill(os.getpid(), signal.SIGTERM),
                     partial(patch.setattr, train))
        train.main([*options, "--out", str(folder / "grown")])
    status, err, out = launch("runs", folder, *options)
    assert status == 0, err
    reports = [json.loads((folder / f"report-{rank}").read_text()) for rank in range(2)]
    return folder, reports, err, out


def rank_faulty(out, kind, *options):
    """A rank of a run in which something goes wrong."""
    rank, again = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    steps, write = [0], train.Writer.write_data

    def killed(step, engine):
        if (rank, again, step) == (1, 0, 8):
            while not (Path(out) / "state" / "step-000000006").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        if (rank, again, step) == (1, 1, 15):  # a wrong bit, found before the next state
            w = engine.parameters["layers.0.attention.wq.weight"].detach().to_local()
            w.view(torch.int32)[0, 3] ^= 1 << 20
        if (rank, again, step) == (0, 2, 14):
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(0.5)

    def slow_disk(step, engine):
        steps.append(step)

    def write_slowly(writer, *rest):
        if writer.facts["step"] == 27:
            time.sleep(0.3)
            Path(out, "until-27").write_text(str(steps[-1]))
        return write(writer, *rest)

    before_steps(locals()[kind])
    if kind == "slow_disk":
        train.Writer.write_data = write_slowly
    train.main(list(options))


class TestTraining:
    """Runs of two ranks with a fault, against the same ones in `two_ranks` without."""

    def test_killed_a_wrong_bit_asked_to_stop_and_a_slow_disk(self, text, whole_run, two_ranks,
                                                              tmp_path):
        out = begun(whole_run, tmp_path)
        options = run_options(text, out, "--dp", "ddp")
        status, said, _ = launch("faulty", out, "killed", *options)
        assert status == 143 and "Traceback" not in said
        assert "rank 1 was killed by signal 9; going on" in said
        assert "error: the copies of layers.0.attention.wq.weight on several ranks differ" in said
        assert "ended with status 1; going on" in said
        assert said.count("stopping after this step") == 1
        at = log_of(out)[-1]["step"]
        assert at in (14, 15) and (out / "state" / f"step-{at:09d}").exists()
        assert [row["step"] for row in log_of(out) if "event" in row] == [6, 12]
        options[options.index("--save-every") + 1] = "3"
        assert launch("faulty", out, "slow_disk", *options)[0] == 0
        assert int((out / "until-27").read_text()) > 27  # went on while it was written
        assert losses(out) == losses(two_ranks[0] / "ddp")
        assert same_weights(out, two_ranks[0] / "ddp")

    @pytest.mark.parametrize("name", ["ddp", "fsdp"])
    def test_benchmarks(self, name, two_ranks):
        """Their scores are those of the weights in the folder; the picture has a line for each."""
        out = two_ranks[0] / name
        asked = generate.questions("siqa", two_ranks[0] / "dev.jsonl", 0, 5)
        words = tokenizer.load_tokenizer(out / "tokenizer.model")
        scorer = generate.Scorer(generate.load(out), words)
        rows, = generate.measure(scorer, "siqa", asked, generate.EvalSettings(), {})
        measured = [row for row in log_of(out) if "scores" in row]
        assert [row["step"] for row in measured] == [10, 20, 30]
        assert measured[-1]["scores"] == {"siqa": sum(row["right"] for row in rows) / 5}
        assert (out / "scores.svg").read_text().count("<polyline") == 1

    def test_the_parent_prepares_starts_and_says_mistakes(self, text, tmp_path, monkeypatch):
        """Before there are ranks; --fresh is not for those that start again."""
        options, started = run_options(text, tmp_path / "r", "--fresh", "--nproc", "2"), []
        monkeypatch.setattr(train, "start", lambda *what: started.append(what) or 7)
        assert train.main(options) == 7
        (n, command, states), = started
        assert n == 2 and states == tmp_path / "r" / "state" and "--fresh" not in command
        assert command[:2] == [sys.executable, train.__file__]
        assert files(tmp_path / "r") == ["lock", "run.json", "tokenizer.model", "tokens"]
        with pytest.raises(ValueError, match="no multiple of --tp 3"):
            train.main([*options, "--tp", "3", "--set", "n_kv_heads=3", "n_heads=3", "dim=36",
                        "hidden_dim=66", "--vocab-size", "399", "--seq-len", "63"])
        assert len(started) == 1

    def test_grown_and_shrunk(self, text, whole_run, two_ranks):
        """By one process to step 7, by two to 12, when a signal came to one, then by one."""
        folder, reports, *_ = two_ranks
        assert [report["stopped"] for report in reports] == [
            str(128 + signal.SIGTERM), str(128 + signal.SIGUSR1)]
        train.main([*run_options(text, folder / "grown")])
        rows = [row for row in log_of(folder / "grown") if "event" not in row]
        assert [row["world"] for row in rows] == [1] * 7 + [2] * 5 + [1] * 18
        nearly_equal(folder / "grown", whole_run)
        nearly_equal(folder / "ddp", whole_run)

    def test_not_a_number_on_one_rank(self, two_ranks):
        rows = log_of(two_ranks[0] / "fsdp")
        assert [row["step"] for row in rows if row.get("loss", 0) is None] == [10]
        assert rows[-1]["skipped"] == 1 and rows[-1]["loss"] < 5.6

    def test_useful_time(self, two_ranks):
        """Steps whose loss was not finite were of no use."""
        useful = 0
        for row in log_of(two_ranks[0] / "fsdp"):
            if "event" not in row and row["step"] <= 30:
                seconds = row["tokens"] / row["step"] / row["tokens_per_s"]
                useful += seconds * (row["loss"] is not None)
                assert row["useful"] == pytest.approx(useful / row["elapsed_s"], abs=2e-3)
        assert 0 < row["useful"] < 1
        assert re.findall(r"(\d+)% of \d+\.\d minutes went into", two_ranks[2])

    def test_full_disk(self, two_ranks):
        for report in two_ranks[1]:
            assert re.match("the state of step 36 could not be written .*try", report["full"])
        states = two_ranks[0] / "fsdp" / "state"
        assert files(states) == ["step-000000024", "step-000000030"]

    def test_finished(self, two_ranks):
        assert two_ranks[2].count("finished at step 30; --steps N goes on, --fresh starts") == 1

    def test_many_ranks_know_one_number_of_steps(self, two_ranks):
        first, second = (int(report["steps"]) for report in two_ranks[1])
        assert first == second > 10

    def test_bench(self, two_ranks):
        lines = [line for line in two_ranks[3].splitlines() if line.startswith('{"tokens_per_s"')]
        benched = json.loads(*lines)
        assert benched["world"] == 2 and benched["layout"]["shards"] == 2
        assert {"tokens_per_s", "mfu", "peak_gflops", "step_s", "peak_rss_gb", "loss", "params",
                "backward", "dtype"} <= set(benched)

    def test_threads(self, two_ranks, text, whole_run, tmp_path):
        """Many ranks share the cores; one process goes on with the number that it began with."""
        for report in two_ranks[1]:
            assert report["threads"] == max(1, tokenizer.cores() // 2)
        mine, out = torch.get_num_threads(), begun(whole_run, tmp_path)
        run = json.loads((out / "run.json").read_text())
        assert run["threads"] == mine
        (out / "run.json").write_text(json.dumps(run | {"threads": mine + 1}))
        try:
            train.main([*run_options(text, out), "--steps", "1"])
            assert torch.get_num_threads() == mine + 1
        finally:
            torch.set_num_threads(mine)

    def test_fresh_is_not_for_torchrun(self, monkeypatch, tmp_path):
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(ValueError, match="try without --fresh"):
            train.main(["--fresh", "--out", str(tmp_path)])

    def test_torchrun_goes_on_without_a_node(self, text, whole_run, tmp_path):
        """Two agents of torchrun; one ends with its rank at step 9: the other goes on alone."""
        words = ["rank", "of_torchrun", *run_options(text, begun(whole_run, tmp_path / "r"))]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        agents = []
        for node in (0, 1):
            conf = f"is_host={1 - node},last_call_timeout=1,keep_alive_interval=1"
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2",
                       "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d",
                       "--rdzv-id", "7", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr",
                       "127.0.0.1", "--rdzv-conf", conf, "--monitor-interval", "0.1", __file__]
            agents.append(subprocess.Popen([*command, *words], cwd=HERE, stderr=subprocess.PIPE,
                                           text=True, env=os.environ | {"NODE": str(node)}))
        said = [agent.communicate(timeout=100)[1] for agent in agents]
        assert [agent.returncode for agent in agents] == [0, -9], said[0]
        rows = [row for row in log_of(tmp_path / "r") if "event" not in row]
        assert [row["world"] for row in rows] == [2] * 6 + [1] * 24
        nearly_equal(tmp_path / "r", whole_run)


def rank_of_torchrun(*options):
    """A rank of which the second node ends, with its agent, before step 9."""
    def fault(step, engine):
        if step == 9 and os.environ["NODE"] == "1":
            states = Path(options[options.index("--out") + 1]) / "state"
            while not (states / "step-000000006").exists():
                time.sleep(0.01)
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
    before_steps(fault)
    train.time = SimpleNamespace(perf_counter=time.perf_counter, monotonic=time.monotonic,
                                 sleep=lambda seconds: None)  # for a launcher that will not come
    train.main(list(options))


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
        assert {"tokens", "tiny", "100,000", "3.00"} <= set(texts)
        assert len(list(tree.iter("{http://www.w3.org/2000/svg}circle"))) == 1
        train.draw_loss(rows[:1], tmp_path / "one.svg", "one step")
        train.draw_loss([], tmp_path / "none.svg", "no step")
        assert files(tmp_path) == ["loss.svg", "one.svg"]


class TestMistakes:
    """What a user gets wrong is answered in one line with exit status 2."""

    CASES = [
        ("train --size 8b", "no size '8b'"), ("train --set dims=3", "unknown field 'dims'"),
        ("train --set dim", "--set"), ("train --set vocab_size=3", "--vocab-size"),
        ("train --steps -3", "--steps"), ("train --seq-len 4096", "--seq-len 4096"),
        ("train --data nowhere.txt", "no nowhere.txt"), ("train --json", "--json is for --plan"),
        ("train --data README.md=x", "'x' is not a positive float"),
        ("train --data README.md=1 llama.py", "some sources have a weight, some have none"),
        ("train --mixture table2 .", "no mixture 'table2'"),
        ("train --mixture table1 .", "commoncrawl"), ("train --warmpu 3", "--warmpu"),
        ("train --backward hand", "'manual', 'autograd', 'recompute'"),
        ("train --compile --document-mask", "try --no-document-mask"),
        ("train --compile --tp 2 --nproc 2", "--compile cannot see"),
        ("train --dp none --nproc 2", "try --dp ddp"),
        ("train --plan --dtype fp32", "--dtype bf16"),
        ("generate nowhere", "nowhere"), ("generate README.md", "README.md"),
        ("generate --top-p 2", "--top-p"), ("tokenizer info nowhere", "nowhere")]

    @pytest.mark.parametrize("command, named", CASES)
    def test_in_process(self, command, named, monkeypatch, capsys, tmp_path):
        module, *words = command.split()
        if module == "train":
            words += ["--out", str(tmp_path / "r")]
        monkeypatch.setattr(sys, "argv", [f"{module}.py", *words])
        monkeypatch.chdir(HERE)
        with pytest.raises(SystemExit) as end:
            tokenizer.command(sys.modules[module].main)
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


# ---------------------------------------------------------------------------------------------
# Fine-tuning


def lora_model(config=SMALL, rank=4, alpha=8.0, names=llama.MATRICES, **options):
    """A model whose LoRA changes something: B is not zero."""
    model = random_model(config, **options)
    llama.add_lora(model, rank, alpha, names)
    state = model.state_dict()
    model.init_weights(3, {name for name in state if "lora" not in name})
    for i, (name, p) in enumerate(model.named_parameters()):
        if name.endswith("lora_b"):
            p.data.copy_(noise(*p.shape, seed=i) / 10)
    return model


class TestLoRA:
    @pytest.mark.parametrize("backward", llama.BACKWARD)
    @pytest.mark.parametrize("names", [llama.MATRICES, ("wq", "wv")])
    def test_equals_peft(self, names, backward):
        peft = pytest.importorskip("peft")
        ours, plain = lora_model(names=names, backward=backward), oracle_of(random_model(SMALL))
        oracle = peft.get_peft_model(plain, peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=[train.PEFT_TARGETS[name] for name in names]))
        table = {theirs: name for theirs, name in generate.adapter_names(SMALL).items()}
        theirs = dict(oracle.named_parameters())
        pairs = []
        for theirs_name, name in table.items():
            p = dict(ours.named_parameters()).get(name)
            if p is not None:
                pairs.append((name, p, theirs[theirs_name.replace(".weight", ".default.weight")]))
        for name, p, other in pairs:
            other.data.copy_(in_hf_order(name, p.data, SMALL))
        x, y = tokens(2, 19), tokens(2, 19, seed=1)
        logits = oracle(x).logits
        close(ours(x), logits)
        F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        ours.loss(x, y).backward()
        assert len(pairs) == 2 * 3 * len(names)
        for name, p, other in pairs:
            close(in_hf_order(name, p.grad, SMALL), other.grad, atol=1e-6)
        assert all(p.grad is None for name, p in ours.named_parameters() if "lora" not in name)

    def test_begins_as_the_frozen_model(self):
        model = random_model(SMALL)
        before = model(tokens(2, 9))
        llama.add_lora(model, 4, 8)
        model.init_weights(3, {name for name in model.state_dict() if "lora" not in name})
        assert torch.equal(model(tokens(2, 9)), before)
        a = model.layers[1].feed_forward.w2.lora_a.detach()  # Kaiming-uniform: U(-1/10, 1/10)
        assert 0.09 < a.abs().max() <= 0.1 and abs(a.std() - 0.1 / math.sqrt(3)) < 0.005

    def test_no_gradient_of_a_frozen_matrix_is_computed(self):
        def addmm_flops(y, x, M, **options):  # in place the counter does not know it
            return 2 * math.prod(x) * M[1]

        def flops(model):
            known = {torch.ops.aten.addmm_: addmm_flops}
            with FlopCounterMode(display=False, custom_mapping=known) as counter:
                model.loss(tokens(2, 19), tokens(2, 19, seed=1)).backward()
            return counter.get_total_flops()
        whole, lora = flops(random_model(SMALL)), flops(lora_model(rank=1))
        matrices = sum(p.numel() for p in random_model(SMALL).parameters() if p.dim() == 2)
        spared = 2 * 38 * (matrices - 97 * 48)  # the embedding has no product
        sides = 3 * (96 + 72 + 72 + 96 + 3 * 148)  # in + out of all matrices
        assert lora == whole - spared + 4 * 2 * 38 * sides  # y, du, dA, dB

    def test_saved_loads_in_peft_and_merged_is_the_same(self, tmp_path):
        peft = pytest.importorskip("peft")
        ours, x = lora_model(), tokens(2, 19)
        weights = {name: generate.Weight(tuple(p.shape), p.dtype, (), lambda p=p: p.detach())
                   for name, p in ours.named_parameters()}
        run = run_of(SMALL, tune="lora", lora_rank=4, lora_alpha=8.0, start="base",
                     lora_targets=list(llama.MATRICES))
        generate.write_adapter(SMALL, train.adapter_settings(run), weights, tmp_path)
        oracle = peft.PeftModel.from_pretrained(oracle_of(random_model(SMALL)), tmp_path)
        close(ours(x), oracle(x).logits)
        save_meta(tmp_path / "base", random_model(SMALL))
        merged = generate.open_model(tmp_path / "base", adapter=tmp_path)
        close(merged(x), ours(x))
        oracle.save_pretrained(tmp_path / "again")
        again = generate.open_model(tmp_path / "base", adapter=tmp_path / "again")
        close(again(x), ours(x))
        save_meta(tmp_path / "other", random_model(replace(SMALL, dim=96)))
        with pytest.raises(ValueError, match="an adapter of another model; try the one"):
            generate.open_model(tmp_path / "other", adapter=tmp_path)


class TestAdapter:
    def test_equals_its_authors(self):
        file = SHARED / "oracle/llama_adapter.npz"
        if not file.exists():
            pytest.skip("no oracle here")
        arrays = {name: torch.from_numpy(x) for name, x in np.load(file).items()}
        config = LlamaConfig(32, 1, 4, 4, 8, 8, 8)
        attention = llama.Attention(config)
        for name in ("wq", "wk", "wv", "wo"):
            getattr(attention, name).weight.data = arrays[name].float()
        cos, sin = llama.rope_table(config, torch.arange(5))
        attend = partial(llama.attention_fused, positions=torch.arange(5))
        x = arrays["x"].float()
        close(attention(x, cos, sin, attend), arrays["y_without"], atol=1e-4)
        attention.prompt = torch.nn.Parameter(arrays["adapter"][0].float())
        attention.gate = torch.nn.Parameter(arrays["gate"].flatten().float())
        close(attention(x, cos, sin, attend), arrays["y_with"], atol=2e-3)

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    def test_gates_at_zero_change_no_bit(self, dtype):
        model = random_model(SMALL, dtype=dtype)
        before = model(tokens(2, 9))
        llama.add_adapter(model, 5, 2)
        model.init_weights(3, {name for name in model.state_dict() if "attention.wq" in name})
        fresh = random_model(SMALL, dtype=dtype)
        model.load_state_dict(fresh.state_dict(), strict=False)
        assert torch.equal(model(tokens(2, 9)), before)
        assert model.layers[0].attention.prompt is None
        assert abs(model.layers[2].attention.prompt.std() - 1) < 0.1

    def test_equation_and_gradient(self):
        q, k, v = noise(2, 4, 3, 6), noise(1, 2, 5, 6, seed=1), noise(1, 2, 5, 6, seed=2)
        gate = noise(4, seed=3)
        inputs = [x.double().requires_grad_() for x in (q, k, v, gate)]
        assert torch.autograd.gradcheck(llama.attention_to_prompt, inputs)
        wanted = F.scaled_dot_product_attention(q, k.expand(2, -1, -1, -1),
                                                v.expand(2, -1, -1, -1), enable_gqa=True)
        close(llama.attention_to_prompt(q, k, v, gate), wanted * gate.tanh()[:, None, None])

    def test_saved_and_generated_with(self, tmp_path):
        model = random_model(SMALL)
        save_meta(tmp_path / "base", model)
        llama.add_adapter(model, 5, 2)
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.data.copy_(noise(*p.shape, seed=i))
        weights = {name: generate.Weight(tuple(p.shape), p.dtype, (), lambda p=p: p.detach())
                   for name, p in model.named_parameters()}
        run = run_of(SMALL, tune="adapter", adapter_length=5, adapter_layers=2, start="base")
        generate.write_adapter(SMALL, train.adapter_settings(run), weights, tmp_path)
        loaded = generate.open_model(tmp_path / "base", adapter=tmp_path)
        close(loaded(tokens(2, 9)), model(tokens(2, 9)))
        with pytest.raises(ValueError, match="--compile wants equal layers"):
            generate.open_model(tmp_path / "base", compiled=True, adapter=tmp_path)


class TestTokenNLL:
    @pytest.mark.parametrize("tied", [False, True])
    def test_equals_autograd(self, tied, monkeypatch):
        monkeypatch.setattr(llama, "logit_rows", lambda *_: 7)  # several chunks
        model, x = random_model(replace(SMALL, tie_embeddings=tied)), tokens(2, 19)
        y, dnll = tokens(2, 19, seed=1), noise(2, 19, seed=2)
        y[0, 3:9] = -1
        found = model.nll_of(model.hidden(x), y)
        (found * dnll).sum().backward()
        mine = [p.grad for p in model.parameters()]
        oracle = random_model(model.config, backward="autograd")
        wanted = F.cross_entropy(oracle(x).flatten(0, 1), y.flatten(), reduction="none",
                                 ignore_index=-1).view(2, 19)
        (wanted * dnll).sum().backward()
        close(found, wanted)
        for a, p in zip(mine, oracle.parameters()):
            close(a, p.grad, atol=1e-4)


def texts_batch(values, reference=0.0):
    """A batch of texts of one token each, chosen and rejected in turns, with DPO's references."""
    n = len(values)
    batch = {"tokens": torch.zeros(n, 1, dtype=torch.long), "begins": torch.ones(n, 1),
             "targets": torch.zeros(n, 1, dtype=torch.long)}
    batch["reference"] = torch.as_tensor(reference).expand(n)[:, None]
    model = SimpleNamespace(hidden=lambda *args, **options: None,
                            nll_of=lambda *args: -torch.as_tensor(values)[:, None])
    return model, batch


class TestDPO:
    def test_equals_its_authors(self):
        file = SHARED / "oracle/dpo.json"
        if not file.exists():
            pytest.skip("no oracle here")
        oracle = json.loads(file.read_text())
        pairs = zip(oracle["policy_chosen"], oracle["policy_rejected"])
        references = zip(oracle["ref_chosen"], oracle["ref_rejected"])
        model, batch = texts_batch([x for pair in pairs for x in pair],
                                   [x for pair in references for x in pair])
        for case in oracle["cases"]:
            if set(case["kw"]) == {"beta"}:
                beta = case["kw"]["beta"]
                chosen, rejected, _ = train.implicit_rewards(model, batch, beta)
                close(chosen, torch.tensor(case["chosen_rewards"]))
                close(rejected, torch.tensor(case["rejected_rewards"]))
                loss = train.dpo_loss(model, batch, beta, 0.0)
                assert loss.item() == pytest.approx(sum(case["losses"]), rel=1e-5)
                right = sum(a > b for a, b in zip(case["chosen_rewards"], case["rejected_rewards"]))
                assert train.dpo_hits(model, batch, beta) == right

    def test_likelihood_of_the_chosen(self):
        model, batch = texts_batch([-3.0, -1.0, -5.0, -2.0])
        more = train.dpo_loss(model, batch, 0.1, 0.2) - train.dpo_loss(model, batch, 0.1, 0.0)
        assert more.item() == pytest.approx(0.2 * (3 + 5))

    def test_sums_and_gradient(self):
        """Sums over answers of several tokens, of two pairs in one row, against log-softmax."""
        batch = pair_batch()
        model, oracle = random_model(SMALL), random_model(SMALL, backward="autograd")
        train.dpo_loss(model, batch, 0.3, 0.2).backward()
        total = 0
        for row in range(2):
            edges = [*batch["begins"][row].nonzero().flatten().tolist(), 16]
            logp, mean = [], []
            for a, b in zip(edges, edges[1:]):
                x, y = batch["tokens"][row, a:b], batch["targets"][row, a:b]
                each = -F.cross_entropy(oracle(x[None])[0], y, reduction="none", ignore_index=-1)
                logp.append(each.sum() - batch["reference"][row, a])
                mean.append(-each.sum() / (y >= 0).sum())
            total = total - F.logsigmoid(0.3 * (logp[0] - logp[1])) + 0.2 * mean[0]
        total.backward()
        for a, b in zip(model.parameters(), oracle.parameters()):
            close(a.grad, b.grad)


def pair_batch():
    """Two rows of 16 tokens, each a pair of texts, with everything that objectives ask for."""
    batch = {"tokens": tokens(2, 16), "targets": torch.full((2, 16), -1),
             "begins": torch.zeros(2, 16, dtype=torch.int8), "margin": torch.zeros(2, 16),
             "reference": torch.zeros(2, 16)}
    for row, middle in enumerate((7, 10)):
        batch["begins"][row, [0, middle]] = 1
        batch["reference"][row, [0, middle]] = torch.tensor([-1.0, -2.0])
        for a, b in ((2, middle - 1), (middle + 3, 15)):
            batch["targets"][row, a:b] = batch["tokens"][row, a + 1:b + 1]
    return batch


def reward_batch():
    batch = pair_batch()
    batch["targets"].fill_(-1)
    for row, middle in enumerate((7, 10)):
        batch["targets"][row, middle - 1], batch["targets"][row, 14] = 1, 0
        batch["margin"][row, middle - 1] = row / 3
    return batch


class TestPPO:
    """trl's, through the numbers of ../shared/oracle."""

    @pytest.fixture
    def oracle(self):
        file = SHARED / "oracle/ppo.json"
        if not file.exists():
            pytest.skip("no oracle here")
        found = json.loads(file.read_text())
        for name, values in found.items():
            if isinstance(values, list):
                found[name] = torch.tensor(values)
        return found

    def test_rewards_advantages_and_returns(self, oracle):
        mask, values = oracle["mask"], oracle["values"]
        rewards = train.token_rewards(oracle["scores"], oracle["logprobs"],
                                      oracle["ref_logprobs"], mask, 0.2)
        close(rewards, oracle["rewards"] * mask)
        A, returns = train.advantages(rewards, values, mask)
        plain = oracle["advantages"]["plain"]
        close(A * mask, torch.tensor(plain["advantages"]) * mask)
        close(returns * mask, torch.tensor(plain["returns"]) * mask)

    def test_whiten(self, oracle):
        example = oracle["whiten_example"]
        x, mask = torch.tensor(example["x"]), torch.tensor(example["mask"])
        close(train.whiten(x, mask) * mask, torch.tensor(example["shifted"]) * mask)
        close(train.whiten(x, mask, shift=False) * mask, torch.tensor(example["unshifted"]) * mask)

    def test_losses(self, oracle):
        mask = oracle["mask"]
        plain = {name: torch.tensor(x) for name, x in oracle["advantages"]["plain"].items()}
        batch = {"old_logp": oracle["logprobs"], "old_values": plain["values"],
                 "advantages": plain["advantages"], "returns": plain["returns"]}
        policy, value = train.ppo_losses(oracle["new_logprobs"], oracle["new_values"], batch)
        found = (policy * mask).sum() / mask.sum()
        assert found.item() == pytest.approx(oracle["policy_loss"], rel=1e-5)
        found = 0.1 * (value * mask).sum() / mask.sum()
        assert found.item() == pytest.approx(oracle["value_loss_times_vf_coef"], rel=1e-5)

    def test_gradient(self):
        batch = {name: noise(2, 3, seed=i).double() for i, name in enumerate(
            ("old_logp", "old_values", "advantages", "returns"))}
        inputs = [noise(2, 3, seed=i).double().requires_grad_() for i in (7, 8)]
        assert torch.autograd.gradcheck(lambda *x: train.ppo_losses(*x, batch), inputs)


class TestReward:
    def test_loss_and_hits(self):
        batch, model = reward_batch(), random_model(SMALL)
        llama.add_score(model)
        model.score.data.copy_(noise(48))
        loss = train.reward_loss(model, batch)
        loss.backward()
        oracle, total, right = random_model(SMALL, backward="autograd"), 0, 0
        score = noise(48).requires_grad_()
        for row, middle in enumerate((7, 10)):
            h = [oracle.hidden(batch["tokens"][row:row + 1, a:b])[0, -1]
                 for a, b in ((0, middle), (middle, 15))]
            chosen, rejected = (x @ score for x in h)
            total = total - torch.log(torch.sigmoid(chosen - rejected - row / 3))
            right += int(chosen > rejected)
        total.backward()
        assert loss.item() == pytest.approx(total.item(), rel=1e-5)
        close(model.score.grad, score.grad)
        for p, q in zip(model.layers.parameters(), oracle.layers.parameters()):
            close(p.grad, q.grad)
        assert train.reward_hits(model, batch) == right
        assert not model.output.weight.requires_grad

    def test_margins(self):
        assert train.MARGINS["small"] == (1, 2 / 3, 1 / 3, 0)  # Llama 2, Table 27
        assert train.MARGINS["large"] == (3, 2, 1, 0)


FINE_TUNED = [("sft", "all", {"tp": 2}), ("reward", "all", {"tp": 2}), ("dpo", "all", {"tp": 2})]
for _layout in ({"replicas": 2}, {"shards": 2}):
    for _objective in ("sft", "reward", "dpo"):
        FINE_TUNED.append((_objective, "all", _layout))
    FINE_TUNED += [("sft", "lora", _layout), ("sft", "adapter", _layout)]


def fine_tuned(objective, tune, layout):
    """Losses of three steps, and the norms of their gradients."""
    config = replace(SMALL, n_kv_heads=4, vocab_size=98)
    run = run_of(config, Layout(**layout), objective=objective, tune=tune, lora_rank=4,
                 lora_alpha=8.0, lora_targets=list(llama.MATRICES), adapter_length=3,
                 adapter_layers=2, beta=0.1, nll=0.2)
    engine, losses, norms = train.Engine(run), [], []
    batch = reward_batch() if objective == "reward" else pair_batch()
    optimizer = train.make_optimizer(engine.parameters, Recipe(1.0, 1, 1, eps=1e-8))
    for _ in range(3):
        loss, norm, _ = train.train_step(engine, optimizer, batch, train.objective_of(run), 0.01, 1)
        losses.append(loss)
        norms.append(norm)
    return losses, norms


class TestFineTunedLayouts:
    @pytest.mark.parametrize("number", range(len(FINE_TUNED)))
    def test_losses_are_those_of_one_process(self, number, found_by):
        objective, tune, _ = FINE_TUNED[number]
        losses, norms = fine_tuned(objective, tune, {})
        assert losses[2] < losses[0]
        for found in found_by["fine-tuned"]:
            assert found[number][0] == pytest.approx(losses, rel=1e-5)
            assert found[number][1] == pytest.approx(norms, rel=1e-4)


def ppo_steps(folder, layout):
    """What two iterations of PPO give, with 8 and with 5 answers."""
    folder, found = Path(folder), []
    for n in (8, 5):
        recipe = Recipe(1.0, 1, 64 * n, eps=1e-8)
        run = run_of(replace(SMALL, vocab_size=400), Layout(**layout), objective="ppo", tune="all",
                     recipe=recipe, start=str(folder), reference=None, reward=["wc -c"],
                     data=[(str(folder / "rows.jsonl"), None)], template="belle", beta=0.1,
                     seq_len=64, seed=3, rows=n)
        words = tokenizer.load_tokenizer(folder / "tokenizer.model")
        engine, prompts = train.Engine(run), train.Prompts(run, words)
        optimizer = train.make_optimizer(engine.parameters, recipe)
        for step in range(2):
            loss, norm, _, figures = train.ppo_step(engine, optimizer, prompts, step, 0.01, 1.0, 0)
            found += [loss, norm, figures["reward"], figures["kl"]]
    return found


class TestPPOOfRanks:
    def test_as_one_process(self, found_by):
        alone = ppo_steps(found_by["folder"], {})
        assert alone[6] != alone[2]
        for found in found_by["ppo"]:
            assert found == pytest.approx(alone, rel=1e-4, abs=1e-5)


ROWS = [{"instruction": "Name a man.", "input": "", "output": "of x"},
        {"instruction": "Add", "input": "1 and 2", "output": "3"},
        {"messages": [{"role": "system", "content": "Be brief."},
                      {"role": "user", "content": "a man?"},
                      {"role": "assistant", "content": "It is 42!"},
                      {"role": "user", "content": "in of x"},
                      {"role": "assistant", "content": "wife"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "man"}]}]
PAIR = {"conversations": [{"from": "human", "value": "a man?"}],
        "chosen": {"from": "gpt", "value": "of x"}, "rejected": {"from": "gpt", "value": "wife in"}}


def sft_run(**settings):
    usual = {"objective": "sft", "margin": "none", "ghost": False, "seq_len": 128}
    return run_of(SMALL, **usual | settings)


class TestBestOf:
    def test_rows_for_sft(self, tiny, words, tmp_path, capsys):
        (tmp_path / "asked").write_text("a man?\nof x\n")
        options = [str(tiny), "--prompts", str(tmp_path / "asked"), "--best-of", "5", "--reward",
                   "wc -c", "--max-new-tokens", "30", "--template", "belle", "--ghost", "Act."]
        generate.main(options)
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        for row, question in zip(rows, ("a man?", "of x"), strict=True):
            assert row["messages"] == [{"role": "user", "content": question}]
            assert row["ghost"] == "Act." and row["reward"] == row["best"][-1]
            assert len(row["rejected"].encode()) < len(row["chosen"].encode()) == row["reward"]
            assert row["best"] == sorted(row["best"]) and row["mean"] <= row["reward"]
        with pytest.raises(ValueError, match="--prompts needs --reward; try"):
            generate.main(options[:5])
        for objective in ("sft", "reward", "dpo"):  # train.py reads the rows for all three
            example = train.example_of(rows[0], words, generate.chat_format(words, "belle"),
                                       sft_run(objective=objective, seq_len=500))
            assert example["begins"].sum() == 1 + (objective != "sft")

    def test_reward_models(self, tiny, tmp_path):
        """The last score of the question and its answer; two by Llama 2's rule."""
        scores = {"help": noise(64), "safe": 40 * noise(64, seed=10)}
        for name, score in scores.items():
            shutil.copytree(tiny, tmp_path / name)
            (tmp_path / name / "run.json").write_text('{"template": "belle"}')
            weight = generate.Weight((64,), torch.float32, (), lambda score=score: score)
            with open(tmp_path / name / "score.safetensors", "wb") as file:
                generate.write_safetensors(file, {"score": weight})
        names = [str(tmp_path / name) for name in scores]
        helpful, both = generate.reward_source(names[:1]), generate.reward_source(names)
        model, words, refused = generate.load(tiny), tokenizer.load_tokenizer(tiny), set()
        for answer in ("of x", "wife", "in 12", "man", "a man in of", "12", "truth", "x = 345"):
            ids = words.encode(f"Human: \na man?\n\nAssistant: \n{answer}", bos=True, eos=True)
            h = model.hidden(torch.tensor([ids]))[0, -1]
            r_help, r_safe = (h @ scores["help"]).item(), (h @ scores["safe"]).item()
            assert helpful("a man?", answer) == pytest.approx(r_help, rel=1e-3, abs=1e-4)
            refused.add(1 / (1 + math.exp(-r_safe)) < 0.15)
            wanted = r_safe if 1 / (1 + math.exp(-r_safe)) < 0.15 else r_help
            assert both("a man?", answer) == pytest.approx(wanted, rel=1e-3, abs=1e-4)
        assert refused == {True, False}
        for safety, wanted in ((-1.6, 5), (-1.8, -1.8)):  # sigmoid: 0.168, 0.142
            rule = generate.reward_source(["echo 5", f"echo {safety}"])
            assert rule("", "") == wanted


class TestAverage:
    def test_mean_of_weights(self, tmp_path):
        models = [random_model(SMALL, seed=i) for i in range(3)]
        for i, model in enumerate(models):
            save_meta(tmp_path / str(i), model)
        generate.main([f"{tmp_path}/0", "--average", f"{tmp_path}/1", f"{tmp_path}/2", "--export",
                       "meta", f"{tmp_path}/mean"])
        found = generate.load(tmp_path / "mean").state_dict()
        for name, *weights in zip(found, *(model.parameters() for model in models)):
            close(found[name], sum(weights) / 3)
        save_meta(tmp_path / "other", random_model(replace(SMALL, n_layers=2)))
        with pytest.raises(ValueError, match="is of another shape"):
            generate.average([f"{tmp_path}/0", f"{tmp_path}/other"])


class TestGuard:
    def test_probability_of_unsafe(self, tmp_path, words, capsys):
        config = replace(SMALL, dim=64, vocab_size=400, max_seq_len=2048)
        save_meta(tmp_path, random_model(config))
        words.save(tmp_path / "tokenizer.model")
        generate.main([str(tmp_path), "--guard", "a man?", "of x"])
        found = json.loads(capsys.readouterr().out)["unsafe"]
        prompt = generate.GUARD.format(role="Agent", conversation="User: a man?\n\nAgent: of x")
        assert "unsafe content in 'Agent' messages in conversations according our" in prompt
        assert prompt.count("\nS") == 11 and prompt.endswith("categories. [/INST]")
        logits = generate.load(tmp_path)(torch.tensor([words.encode(prompt, bos=True)]))[0, -1]
        token = words.encode("unsafe", continues=True)[0]
        assert found == pytest.approx(logits.softmax(-1)[token].item(), rel=1e-4)


class TestExamples:
    @pytest.mark.parametrize("template", ["alpaca", "alpaca-lora", "chatdoctor", "chinese-alpaca",
                                          "belle", "llama2"])
    def test_exactly_the_answers_are_learned(self, words, template):
        chat = generate.chat_format(words, template)
        for row in ROWS:
            found = train.example_of(row, words, chat, sft_run(seq_len=500))
            said = [m[1] for m in train.conversation(row, chat)[1] if m[0] == "assistant"]
            learned = found["targets"][found["targets"] >= 0].tolist()
            texts = [""]
            for i in learned:
                if i == words.eos_id:
                    texts.append("")
                else:
                    texts[-1] += words.token_bytes(i).decode()
            assert [text.strip() for text in texts] == [*said, ""]
            moved = found["tokens"][1:][found["targets"][:-1] >= 0].tolist()
            assert moved == learned and found["targets"][-1] == -1
            assert found["begins"].tolist() == [1] + [0] * (len(found["tokens"]) - 1)

    def test_published_forms(self, words):
        """The exact texts of Stanford Alpaca, alpaca-lora, Chinese-LLaMA-Alpaca and BELLE."""
        head = "Below is an instruction that describes a task"
        tail = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
        context = ", paired with an input that provides further context. "
        forms = {"alpaca": f"{head}{context}{tail}Add\n\n### Input:\n1 and 2\n\n### Response:",
                 "chinese-alpaca": f"{head}. {tail}Add\n1 and 2\n\n### Response: ",
                 "belle": "Human: \nAdd\n1 and 2\n\nAssistant: \n"}
        forms["alpaca-lora"] = forms["alpaca"] + "\n"
        for template, prompt in forms.items():
            chat = generate.chat_format(words, template)
            found = train.example_of(ROWS[1], words, chat, sft_run(seq_len=500))["tokens"].tolist()
            ids = words.encode(prompt, bos=True)
            assert found[:len(ids)] == ids, template
        chat = generate.chat_format(words, "alpaca")
        found = train.example_of(ROWS[0], words, chat, sft_run(seq_len=500))["tokens"].tolist()
        ids = words.encode(f"{head}. {tail}Name a man.\n\n### Response:", bos=True)
        assert found[:len(ids)] == ids

    @pytest.mark.parametrize("kind, template", [("llama3", LLAMA3_CHAT), ("chatml", CHATML),
                                                ("llama2", LLAMA2_CHAT)])
    def test_conversations_equal_transformers(self, kind, template, chat_tokenizer):
        ours, oracle = chat_tokenizer(kind, template)
        row = ROWS[2]
        found = train.example_of(row, ours, generate.chat_format(ours), sft_run(seq_len=500))
        wanted = oracle.apply_chat_template(row["messages"], chat_template=template, tokenize=True,
                                            return_dict=False)
        assert found["tokens"].tolist() == wanted
        ghost = train.example_of({**row, "ghost": "Act."}, ours, generate.chat_format(ours),
                                 sft_run(seq_len=500, ghost=True))
        answer = {"llama2": " wife "}.get(kind, "wife")
        last = ours.encode(answer, continues=True) + [ours.eos_id]
        assert ghost["targets"][ghost["targets"] >= 0].tolist() == last

    def test_pairs(self, words):
        chat = generate.chat_format(words, "alpaca")
        found = train.example_of(PAIR, words, chat, sft_run(objective="dpo", seq_len=500))
        middle, = found["begins"].nonzero()[0][1:]
        for part, text in ((slice(None, middle), "of x"), (slice(middle, None), "wife in")):
            ids = found["targets"][part]
            assert ids[ids >= 0].tolist() == words.encode(text, continues=True)  # no end
        rated = {**PAIR, "rating": "slightly"}
        found = train.example_of(rated, words, chat, sft_run(objective="reward", margin="large",
                                                             seq_len=500))
        assert found["targets"][middle - 1] == 1 and found["targets"][-1] == 0  # at the end
        assert (found["targets"] >= 0).sum() == 2
        assert found["margin"][middle - 1] == 1 and np.count_nonzero(found["margin"]) == 1

    def test_packed(self, tmp_path):
        assert train.pack(np.array([6, 5, 4]), [0, 1, 2], 10) == [[0, 2], [1]]
        np.savez(tmp_path / "examples.npz", tokens=np.arange(1, 16), targets=np.arange(1, 16),
                 begins=np.array([1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0], np.int8),
                 held=[False, False, False], rows=[0, 1, 5], offsets=[0, 6, 11, 15])
        examples = train.Examples(tmp_path, 10, 1, 0)
        batches = [examples.step(i) for i in range(40)]
        for i in range(0, 40, 2):  # an epoch has two rows
            facts = [examples.facts(i + k) for k in range(2)]
            assert sorted(facts[0]["rows"] + facts[1]["rows"]) == [0, 1, 5]
            assert facts[0]["real_tokens"] + facts[1]["real_tokens"] == 15
        assert len({str(examples.facts(i)) for i in range(40)}) > 3  # other orders
        row = next(b for i, b in enumerate(batches) if examples.facts(i)["rows"] == [0, 5])
        assert row["tokens"].tolist() == [[1, 2, 3, 4, 5, 6, 12, 13, 14, 15]]
        assert train.document_starts(row).tolist() == [0, 6, 10]
        row = next(b for i, b in enumerate(batches) if examples.facts(i)["rows"] == [1])
        assert row["targets"].tolist() == [[7, 8, 9, 10, 11] + 5 * [-1]]

    @pytest.mark.parametrize("row, said", [
        ({"instruction": "a"}, "it has no answer"), ({"text": "a"}, "no row of a known form"),
        ({"messages": [{"role": "user", "content": "a"}]}, "it has no answer"),
        ({"instruction": "a", "output": "of x " * 99}, "longer than the context"),
        ({"messages": [{"role": "user", "content": 3}]}, "a message has no text")])
    def test_bad_rows_are_named(self, row, said, words, tmp_path):
        (tmp_path / "rows.json").write_text(json.dumps([ROWS[0], row]))
        words.save(tmp_path / "tokenizer.model")
        run = sft_run(tokenizer=str(tmp_path), template="alpaca", out=tmp_path,
                      data=[(str(tmp_path / "rows.json"), None)])
        with pytest.raises(ValueError, match=f"row 1 of the data, .*{said}.*; try"):
            train.read_examples(run)
        with pytest.raises(ValueError, match="two answers are equal"):
            train.example_of({**PAIR, "rejected": PAIR["chosen"]}, words,
                             generate.chat_format(words, "alpaca"), sft_run(objective="dpo"))


class TestFineTuning:
    def options(self, tiny, data, out, *more):
        usual = "--template belle --dtype fp32 --seq-len 96 --batch-tokens 192 --lr 0.01"
        return ["--from", str(tiny), "--data", str(data), *usual.split(), "--out", str(out), *more]

    @pytest.fixture
    def rows(self, tmp_path):
        """Twenty questions and their answers."""
        file = tmp_path / "rows.json"
        file.write_text(json.dumps([{"instruction": f"man {i}", "output": f"of x {i} wife"}
                                    for i in range(20)]))
        return file

    @pytest.mark.parametrize("tune", ["all", "lora", "adapter", "embeddings"])
    def test_learns_and_goes_on_bit_for_bit(self, tiny, rows, tmp_path, tune, capsys):
        out = tmp_path / "a"
        options = self.options(tiny, rows, out, "--objective", "sft", "--tune", tune,
                               "--steps", "8", "--save-every", "4")
        train.main(options)
        log, first, before = log_of(out), losses(out), generate.load(tiny).state_dict()
        assert log[-1]["loss"] < log[0]["loss"] and log[0]["rows"] and log[-1]["val_loss"]
        assert "> man 0" in capsys.readouterr().out
        after = generate.load(out).state_dict()
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert bool(changed) == (tune != "adapter")  # which stands beside the weights
        assert tune != "embeddings" or changed == {"tok_embeddings.weight", "output.weight"}
        assert (out / "adapter_config.json").exists() == (tune in ("lora", "adapter"))
        shutil.rmtree(out / "state/step-000000008")
        (out / "consolidated.00.pth").unlink()
        train.main(options)
        assert losses(out) == first and log_of(out)[4]["event"] == "resume"
        for name, weight in generate.load(out).state_dict().items():
            assert torch.equal(weight, after[name])

    def test_fresh(self, tiny, rows, tmp_path):
        """A bad row leaves the old run; nothing of it stays beside a new one."""
        options = self.options(tiny, rows, tmp_path / "a", "--objective", "sft", "--steps", "2")
        train.main([*options, "--tune", "lora"])
        (tmp_path / "bad.json").write_text("[{}]")
        more = ["--fresh", "--data", str(tmp_path / "bad.json")]
        with pytest.raises(ValueError, match="no row of a known form"):
            train.main([*options, *more])
        assert len(losses(tmp_path / "a")) == 2 and (tmp_path / "a/adapter_config.json").exists()
        train.main([*options, "--fresh"])
        assert not (tmp_path / "a/adapter_config.json").exists()

    @pytest.mark.parametrize("objective", ["reward", "dpo"])
    def test_pairs(self, tiny, tmp_path, objective):
        rows = [{**PAIR, "conversations": [{"from": "human", "value": f"man {i}"}]}
                for i in range(20)]
        (tmp_path / "pairs.json").write_text(json.dumps(rows))
        train.main([*self.options(tiny, tmp_path / "pairs.json", tmp_path / "a", "--objective",
                                  objective), "--steps", "8"])
        log = log_of(tmp_path / "a")
        assert log[-1]["loss"] < log[0]["loss"] and log[-1]["val_accuracy"] == 1
        assert (tmp_path / "a/score.safetensors").exists() == (objective == "reward")
        assert objective == "reward" or log[0]["loss"] == pytest.approx(
            math.log(2) + 0.2 * 6, abs=1)

    def test_ppo(self, tiny, rows, tmp_path):
        """Towards short answers: the reward is a command that counts words."""
        command = ["--objective", "ppo", "--reward", "sh -c 'echo -$(wc -w)'", "--beta", "0.01"]
        options = self.options(tiny, rows, tmp_path / "a", *command, "--batch-tokens", "1536",
                               "--lr", "0.003", "--save-every", "6")
        train.main([*options, "--steps", "12"])
        log, first = log_of(tmp_path / "a"), losses(tmp_path / "a")
        reward = [row["reward"] for row in log]
        assert sum(reward[-3:]) > sum(reward[:3]) + 3
        assert abs(log[0]["kl"]) < 0.01 < log[-1]["kl"] < 300
        shutil.rmtree(tmp_path / "a/state/step-000000012")
        train.main([*options, "--steps", "12"])
        assert losses(tmp_path / "a") == first
        with pytest.raises(ValueError, match="ended with status 1 and said 'nothing', not one"):
            train.main([*options[:-6], "--out", str(tmp_path / "b"), "--reward", "false"])

    def test_larger_vocabulary(self, tiny, text, tmp_path):
        """Chinese-LLaMA's first stage: new rows are the mean of the old ones."""
        tokenizer.train_sentencepiece([Path(ast.__file__).read_text()], 420).save(
            tmp_path / "larger.model")
        options = self.options(tiny, text, tmp_path / "a", "--tune", "embeddings")
        del options[options.index("--template"):][:2]
        train.main([*options, "--tokenizer", str(tmp_path / "larger.model"), "--steps", "1",
                    "--lr", "1e-30"])
        old, new = generate.load(tiny), generate.load(tmp_path / "a")
        for name in ("tok_embeddings.weight", "output.weight"):
            a, b = old.state_dict()[name], new.state_dict()[name]
            assert b.shape == (420, 64) and torch.equal(b[:400], a)
            close(b[400:], a.mean(0).expand(20, -1))

    @pytest.mark.parametrize("more, said", [
        (["--objective", "sft"], "need a model to begin from; try --from"),
        (["--from", "TINY", "--objective", "sft"], "fine-tuning needs rows; try --data"),
        (["--from", "TINY", "--objective", "sft", "--tune", "lora", "--tp", "2"], "adapters run"),
        (["--from", "TINY", "--objective", "dpo", "--data", "x", "--minutes", "1"], "epochs"),
        (["--from", "TINY", "--objective", "ppo", "--data", "x"], "ppo needs --reward"),
        (["--from", "TINY", "--objective", "sft", "--data", __file__], "try --template alpaca or"),
        (["--from", "nowhere"], "nowhere")])
    def test_mistakes(self, more, said, tiny, tmp_path):
        more = [str(tiny) if word == "TINY" else word for word in more]
        with pytest.raises((ValueError, OSError), match=said):
            train.main([*more, "--out", str(tmp_path / "r")])

    def test_recipes_are_options(self, tiny, rows, tmp_path):
        for name, recipe in train.RECIPES.items():
            options = train.parser()
            assert recipe.keys() <= vars(options.parse_args([])).keys(), name
            assert recipe.get("template", "llama2") in generate.CHATS


PIECES = {  # what a student of llama.py may be asked to write, and the class that grades it
    "LlamaConfig": TestSizes, "Recipe": TestSizes, "SIZES": TestSizes,
    "rms_norm": TestRMSNorm, "rms_norm_backward": TestRMSNorm, "RMSNorm": TestRMSNorm,
    "rope_frequencies": TestRoPE, "rope_table": TestRoPE, "apply_rope": TestRoPE,
    "swiglu": TestSwiGLU, "swiglu_backward": TestSwiGLU, "FeedForward": TestSwiGLU,
    "first_visible": TestAttention, "visible": TestAttention, "tiles": TestAttention,
    "attention_equation": TestAttention, "attention_equation_backward": TestAttention,
    "tile_backward": TestAttention, "attention_tiled": TestAttention,
    "attention_tiled_backward": TestAttention, "attention_fused": TestAttention,
    "attention_fused_backward": TestAttention, "Attention": TestLlama, "Layer": TestLlama,
    "TensorParallel": TestTensorParallel, "Exchange": TestTensorParallel,
    "over_ranks": TestLayouts, "Llama.embed": TestLayouts, "softmax_over_ranks": TestLayouts,
    "by_hand": TestLayerByHand, "LayerByHand": TestLayerByHand, "KVCache": TestKVCache,
    "Llama": TestLlama, "Llama.init_weights": TestInitialisation, "Llama.loss": TestLoss,
    "next_token_nll": TestLoss, "SumNLL": TestLoss, "TokenNLL": TestTokenNLL,
    "LoRALinear": TestLoRA, "weight_gradients": TestLayerByHand, "add_lora": TestLoRA,
    "attention_to_prompt": TestAdapter, "add_adapter": TestAdapter}


class TestReadme:
    def test_every_piece_is_graded(self):
        table = (HERE / "README.md").read_text()
        assert set(re.findall(r"`llama\.py:([\w.]+)`", table)) <= set(PIECES)
        for piece, grader in PIECES.items():
            functools.reduce(getattr, piece.split("."), llama)  # exists
            assert any(name.startswith("test_") for name in vars(grader)), piece

    def test_every_symbol_exists(self):
        table = re.findall(r"^\|.*\|$", (HERE / "README.md").read_text(), re.M)
        symbols = [s for row in table for s in re.findall(r"`(\w+)\.py:([\w.]+)`", row)]
        assert len(symbols) >= 20
        for file, symbol in symbols:
            where = sys.modules[file]
            for part in symbol.split("."):
                where = getattr(where, part)

    def test_chat_on_a_laptop(self):
        """The parts of docs/chat.py; the command that it gives as a reward counts what it counts."""
        from importlib.util import module_from_spec, spec_from_file_location
        spec = spec_from_file_location("chat", HERE / "docs" / "chat.py")
        spec.loader.exec_module(chat := module_from_spec(spec))
        assert chat.kl_of_best(1) == 0 and chat.kl_of_best(4) == pytest.approx(0.636, abs=1e-3)
        assert chat.interval([1.0, 2.0, 3.0, 2.0]) == pytest.approx(0.8, abs=1e-3)
        for text, wanted in (("Happy, happy friends laughed.", 3), ("x", 0)):
            assert chat.reward(text) == wanted
            assert generate.reward_command(chat.REWARD)("", text) == wanted

    def test_one_statement_a_line_of_100_columns(self):
        for name in ("llama", "tokenizer", "generate", "train", "docs/chat"):
            source = (HERE / f"{name}.py").read_text()
            assert max(map(len, source.splitlines())) <= 100, name
            nodes = ast.walk(ast.parse(source))
            lines = [node.lineno for node in nodes if isinstance(node, ast.stmt)]
            assert len(lines) == len(set(lines)), f"two statements on a line of {name}.py"


if __name__ == "__main__":
    tokenizer.command(lambda words: globals()["rank_" + words[1]](*words[2:]))
