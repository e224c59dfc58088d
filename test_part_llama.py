from test_head import *
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
        assert eps["7b"] == eps["13b"] == eps["33b"] == 1e-6 and eps["65b"] == 1e-5 and eps["llama2-7b"] == 1e-5
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
    def test_frequencies(self, config, hf):
        oracle = hf.LlamaRotaryEmbedding(hf_config(config)).inv_freq
        torch.testing.assert_close(llama.rope_frequencies(config), oracle, rtol=1e-5, atol=0)

    def test_rotation_by_complex_numbers(self):
        x, positions = noise(2, 7, 4, 12), torch.arange(3, 10)
        f = 1e4 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
        angle = positions[:, None, None] * f
        z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        wanted = torch.view_as_real(z * torch.exp(1j * angle)).flatten(-2)
        cos, sin = llama.rope_table(replace(SMALL, dim=48), positions)
        close(llama.apply_rope(x, cos, sin), wanted.float())

    def test_transformers_rotation_after_the_permutation(self, hf):
        x, positions = noise(1, 9, 4, 12), torch.arange(9)
        halves = x.transpose(1, 2).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        cos, sin = hf.LlamaRotaryEmbedding(hf_config(SMALL))(x, positions[None])
        wanted = hf.apply_rotary_pos_emb(halves, halves, cos, sin)[0]
        found = llama.apply_rope(x, *llama.rope_table(SMALL, positions))
        found = found.transpose(1, 2).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        close(found, wanted)

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


HF_NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj"}

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
            x, *tables, attend, attend_backward, 0.1, llama.NoTensorParallel(), *weights),
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
                run = partial(llama.by_hand, attend_backward=backward, tp=llama.NoTensorParallel())
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

        class Noted(llama.NoTensorParallel):
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
        monkeypatch.setattr(llama, "logit_rows", lambda V, D: 4)

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
                                      llama.NoTensorParallel())
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
        monkeypatch.setattr(llama, "logit_rows", lambda V, D: 4)
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


