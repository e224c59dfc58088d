"""One class of tests per piece, named as the piece; each compares with an oracle that is not ours.

    python -m pytest                              # everything, offline, about two minutes on 2 cores
    python -m pytest -k TestRoPE                  # one piece
    python test_llama.py rank CASE                # what one rank of a test on many ranks does
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small products; a second thread only waits

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import llama
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


def starts(*offsets):
    """Boundaries (cu_seqlens): offsets at which documents start in the flattened batch, then B T."""
    return torch.tensor(offsets, dtype=torch.int32)


def random_model(config, seed=1, **options):
    """Initial weights, but the norms are random too, so that a test sees a norm that is left out."""
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
