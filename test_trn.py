from test_head import *

import ast
import contextlib
import functools
import random
import shutil
import signal
import socket
import time
from typing import NamedTuple

import torch.distributed as dist

import generate
import tokenizer
import train
import test_sta  # these three go when the parts are one file
from test_sta import files, full_disk, handlers, rank_start, start_ranks
test_sta.__file__ = __file__


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
    def batches(self, folder, sizes, weights=None, seed=0, **options):
        return train.Batches(folder, shards(folder, sizes, weights), 16, 4, seed, **options)

    def test_a_function_of_seed_step_and_number(self, tmp_path):
        one, two, other = (self.batches(tmp_path, [5000], seed=seed) for seed in (0, 0, 1))
        for step in (9, 3, 7):
            found = one.step(step)["tokens"]
            assert found.shape == (4, 16) and torch.equal(found, two.step(step)["tokens"])
            assert found[2].tolist() == one.sequence(4 * step + 2)[:-1].tolist()
        assert not torch.equal(one.step(0)["tokens"], other.step(0)["tokens"])
        assert not torch.equal(one.step(0)["tokens"], one.step(1)["tokens"])
        assert torch.equal(one.step(0)["targets"], one.step(0)["tokens"] + 1)

    def test_every_epoch_reads_everything_evenly(self, tmp_path):
        batches, seen = self.batches(tmp_path, [5000]), np.zeros(5000)
        for step in range(3 * 5000 // 64):
            for row in batches.step(step)["tokens"]:
                seen[row] += 1
        assert np.mean(seen == 0) < 0.01 and seen.max() <= 6
        assert batches.epochs(3 * 5000 // 64) == [pytest.approx(3, rel=0.02)]

    def test_weights(self, tmp_path):
        batches = self.batches(tmp_path, [900, 5000, 300], [1, 2.0, 7])
        begins = torch.cat([batches.step(step)["tokens"][:, 0] for step in range(250)])
        share = [(begins // 10_000 == k).float().mean().item() for k in range(3)]
        assert share == [pytest.approx(p, abs=0.01) for p in (0.1, 0.2, 0.7)]
        free = self.batches(tmp_path, [900, 5000, 300])
        assert free.epochs(100) == [pytest.approx(100 * 64 / 6200, rel=1e-3)] * 3

    def test_last_token_is_reached_and_too_little_is_said(self, tmp_path):
        batches = self.batches(tmp_path, [20])
        assert {int(batches.sequence(g)[0]) for g in range(50)} == {0, 1, 2, 3}
        with pytest.raises(ValueError, match="text0 has 16 tokens"):
            self.batches(tmp_path, [16])

    def test_damaged_shards_are_said(self, tmp_path):
        source, = shards(tmp_path, [900])
        for change in ({"train_tokens": 901}, {"dtype": "x"}, {"val_tokens": -9}, {"name": 3}):
            with pytest.raises(ValueError, match="shards in .* are damaged; try --fresh"):
                train.Batches(tmp_path, [{**source, **change}], 16, 4, 0)
        with pytest.raises(ValueError, match="damaged"):
            train.Batches(tmp_path, [{}], 16, 4, 0)

    def test_held_out_windows(self, tmp_path):
        batches = self.batches(tmp_path, [900])
        windows, size = batches.held_out(10**6)
        targets = windows[:, 1:][windows[:, 1:] >= 0]
        assert size == 300 and targets.tolist() == list(range(1, 101))  # each token once
        assert len(batches.held_out(60)[0]) == 4

    def test_documents(self, tmp_path):
        rows = torch.tensor([[5, 1, 6, 7, 1], [6, 6, 1, 1, -1]])
        batch = train.next_tokens(rows, bos_id=1)
        assert batch["targets"].tolist() == [[1, 6, 7, 1], [6, 1, 1, -1]]
        assert torch.equal(batch["tokens"], rows[:, :4])
        close(train.document_starts(batch["begins"]), starts(0, 1, 4, 6, 7, 8))
        assert "begins" not in train.next_tokens(rows)
        assert torch.equal(self.batches(tmp_path, [900], bos_id=40).step(0)["begins"],
                           self.batches(tmp_path, [900]).step(0)["tokens"] == 40)


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
        optimizers.append(train.make_optimizer(dict(model.named_parameters()), recipe))
        for step in range(3):
            for p, ours in zip(oracle.values(), model.parameters()):
                p.grad = noise(*p.shape, seed=step)
                ours.grad = p.grad.clone()
            for each in optimizers:
                each.step()
        for name, p in model.named_parameters():
            close(p, oracle[name], atol=1e-6)
            assert not torch.equal(p, before[name])


def engine_of(model, micro_batch=4):
    """One rank that holds all of it, with the weights of a model."""
    engine = train.Engine(model.config, train.Layout(), "cpu", micro_batch, dtype=model.dtype)
    engine.stage.load_state_dict(model.state_dict())
    return engine


class TestTrainStep:
    def step(self, engine, clip=1e9, lr=0.1, batch=None, objective=train.pretrain):
        recipe, seen = Recipe(0.1, 1, 1, eps=1e-8, weight_decay=0.0), {}
        optimizer = train.make_optimizer(engine.parameters, recipe)
        optimizer.register_step_pre_hook(lambda *_: seen.update(
            {name: p.grad.clone() for name, p in engine.parameters.items()}))
        batch = batch or train.next_tokens(tokens(6, 21))
        return train.train_step(engine, optimizer, batch, objective, lr, clip)[:2], seen

    def norm_of(self, grads):
        return torch.cat([grad.flatten() for grad in grads]).norm().item()

    def test_frozen_weights_stay(self):
        engine = engine_of(random_model(SMALL))
        model = engine.stage.requires_grad_(False)
        model.output.requires_grad_(True)
        optimizer = train.make_optimizer(engine.parameters, SIZES["tiny"][1])
        train.train_step(engine, optimizer, train.next_tokens(tokens(2, 9)), train.pretrain, 1, 1)
        changed = {name for (name, p), before in zip(model.named_parameters(),
                   random_model(SMALL).parameters()) if not torch.equal(p, before)}
        assert changed == {"output.weight"}

    def test_accumulation_is_one_batch(self):
        """Of micro-batches with unlike numbers of targets too."""
        batch = train.next_tokens(tokens(6, 21))
        batch["targets"][3, 5:] = batch["targets"][5, 1:] = -1
        model = random_model(SMALL)
        wanted = model.loss(batch["tokens"], batch["targets"])
        wanted.backward()
        for micro_batch in (1, 2, 4, 6):
            (loss, norm), grads = self.step(engine_of(random_model(SMALL), micro_batch),
                                            batch=batch)
            assert loss == pytest.approx(wanted.item(), rel=1e-5)
            assert norm == pytest.approx(self.norm_of(grads.values()), rel=1e-4)
            for name, p in model.named_parameters():
                close(grads[name], p.grad, atol=1e-6)

    def test_any_objective(self):
        """The engine knows an objective's sum and its targets alone."""
        def doubled(model, batch):
            return 2 * train.pretrain(model, {"tokens": batch["tokens"], "targets": batch["chosen"]})
        batch = train.next_tokens(tokens(6, 21))
        batch["chosen"] = batch["targets"].roll(1, 1)
        (loss, _), grads = self.step(engine_of(random_model(SMALL)), batch=batch, objective=doubled)
        model = random_model(SMALL)
        wanted = 2 * model.loss(batch["tokens"], batch["chosen"])
        wanted.backward()
        assert loss == pytest.approx(wanted.item(), rel=1e-5)
        close(grads["norm.weight"], model.norm.weight.grad)

    def test_clips_to_the_norm(self):
        (_, norm), grads = self.step(engine_of(random_model(SMALL)), clip=1e-3)
        assert norm > 0.01 and self.norm_of(grads.values()) == pytest.approx(1e-3, rel=1e-3)
        (_, norm), grads = self.step(engine_of(random_model(SMALL)), clip=1e9)
        assert self.norm_of(grads.values()) == pytest.approx(norm, rel=1e-4)

    def test_learning_rate_is_the_one_given(self):
        engine = engine_of(random_model(SMALL))
        before = engine.stage.norm.weight.detach().clone()
        self.step(engine, lr=1e-3)  # AdamW's first step moves each weight by lr
        close((engine.stage.norm.weight - before).abs(), torch.full((48,), 1e-3), atol=1e-5)

    def test_not_finite_changes_nothing(self):
        engine = engine_of(random_model(SMALL), 3)
        before = {name: p.detach().clone() for name, p in engine.parameters.items()}
        weight = engine.parameters["layers.1.feed_forward.w2.weight"]
        handle = weight.register_hook(lambda grad: grad * math.inf)
        (loss, norm), _ = self.step(engine)
        assert math.isfinite(loss) and not math.isfinite(norm)
        handle.remove()
        for name, p in engine.parameters.items():
            assert torch.equal(p, before[name]) and p.grad is None

    def test_mask_across_documents(self):
        rows = tokens(2, 21).clamp(min=2)
        rows[:, 8] = 1
        (loss, _), _ = self.step(engine_of(random_model(SMALL), 2),
                                 batch=train.next_tokens(rows, bos_id=1))
        model, x, y = random_model(SMALL), rows[:, :-1], rows[:, 1:]
        assert loss == pytest.approx(model.loss(x, y, starts(0, 8, 20, 28, 40)).item(), rel=1e-5)
        assert loss != pytest.approx(model.loss(x, y).item(), rel=1e-5)


class TestEvaluate:
    @pytest.mark.parametrize("bos_id", [None, 50])
    def test_bits_per_byte(self, tmp_path, bos_id):
        sources, model, nll = shards(tmp_path, [900]), random_model(SMALL), 0
        (np.arange(101) % 97).astype("<u2").tofile(tmp_path / "0.val.bin")
        batches = train.Batches(tmp_path, sources, 16, 4, 0, bos_id)
        engine = engine_of(model)
        loss, bpb = train.evaluate(engine, batches, 10**6)
        for at in range(0, 100, 16):
            x = torch.arange(at, min(at + 17, 101)) % 97
            cut = [2] if at == 48 and bos_id else []  # token 50 begins a document
            nll += model.loss(x[None, :-1], x[None, 1:], starts(0, *cut, len(x) - 1), "sum").item()
        assert loss == pytest.approx(nll / 100, rel=1e-5)
        assert bpb == pytest.approx(nll / math.log(2) / 300, rel=1e-5)  # 3 bytes a token
        assert all(p.grad is None for p in engine.parameters.values())


# Many ranks. A case is a function rank_CASE(*words), run by `test_llama.py rank CASE WORD ...`.


class Case(NamedTuple):
    layout: train.Layout
    config: LlamaConfig
    bos_id: int | None
    steps: int
    options: dict


def case(steps=3, bos_id=12, backward="manual", dtype=None, tied=False, n_layers=2, hidden_dim=36,
         **layout):
    config = LlamaConfig(32, n_layers, 8, 4, hidden_dim, 64, 16, tie_embeddings=tied)
    return Case(train.Layout(**layout), config, bos_id, steps,
                {"backward": backward, "dtype": dtype})


TIED, HALF = {"tied": True, "bos_id": None}, {"dtype": torch.bfloat16, "steps": 2}
CASES = {
    "ddp 4": case(replicas=4), "fsdp 4": case(8, shards=4, hidden_dim=38),
    "fsdp 4, tied": case(shards=4, **TIED), "fsdp 4, bf16": case(shards=4, **HALF),
    "hybrid 2 x 2": case(replicas=2, shards=2), "tp 4": case(8, tp=4), "tp 4, tied": case(tp=4, **TIED),
    "tp 4, autograd": case(2, backward="autograd", tp=4),
    "tp 4, recompute": case(2, backward="recompute", tp=4), "tp 4, bf16": case(tp=4, **HALF),
    "fsdp 2 x tp 2": case(20, shards=2, tp=2), "ddp 2 x tp 2": case(replicas=2, tp=2),
    "pp 4": case(pp=4, n_layers=5), "pp 2 x fsdp 2": case(8, pp=2, shards=2, n_layers=3),
    "pp 2 x fsdp 2, tied": case(pp=2, shards=2, n_layers=3, **TIED),
    "pp 2 x ddp 2": case(pp=2, replicas=2), "pp 2 x tp 2, tied": case(pp=2, tp=2, tied=True)}


def step_rows(step):
    """Tokens of a step, some at the edges of each rank's part of 64 words; rows that ranks share
    evenly and not, and some with a rank that has none."""
    return 3 * tokens((8, 7, 5)[step % 3], 17, vocab=22, seed=step)


def held_out_rows():
    rows = step_rows(2)
    rows[4, 9:] = -1
    return rows


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


@torch.no_grad()
def grow(parameters):
    """Weights that make every part of a layer matter."""
    for p in parameters:
        llama.local_shard(p).mul_(8 if p.dim() == 2 else 1)


def as_rank(layout, config, bos_id, steps, options):
    """What this process finds as one of a layout, in two micro-batches a step and more."""
    micro_batch = max(1, 4 // (layout.dp * layout.pp))
    engine = train.Engine(config, layout, "cpu", micro_batch, **options)
    named, batch = engine.parameters, partial(train.next_tokens, bos_id=bos_id)
    found = {"initial": {name: whole(p.detach()) for name, p in named.items()}}
    grow(named.values())
    optimizer = train.make_optimizer(named, Recipe(3e-3, 1, 1, eps=1e-8))
    with Calls() as calls:
        engine.loss(batch(step_rows(1)), train.pretrain, train=True)
    names = ("allreduce_", "_allgather_base_", "_reduce_scatter_base_", "broadcast_")
    calls = [f"{name} {tree_leaves(each)[0].dtype}".replace("torch.", "") for name in names
             for each in calls.args.get(f"{name}.default", ())]
    found["calls"] = {call: calls.count(call) for call in calls}
    found["gradients"] = {name: whole(p.grad) for name, p in named.items()}
    state = [x for values in optimizer.state.values() for x in values.values()]
    for name, held in {"weights": named.values(), "gradients": [p.grad for p in named.values()],
                       "AdamW": state}.items():
        found[f"bytes of {name}"] = sum(llama.local_shard(x).nbytes for x in held)
    optimizer.zero_grad()
    found["steps"] = [train.train_step(engine, optimizer, batch(step_rows(i)), train.pretrain,
                                       3e-3, 1.0)[:2] for i in range(steps)]
    held_out = batch(held_out_rows())
    found["nll"], = engine.add_up(engine.loss(held_out, train.pretrain, train=False))
    return found | {"place": engine.pp_rank, "rows": len(engine.rows(batch(step_rows(0)))["tokens"]),
                    "micro_batches": layout.passes(8, micro_batch)}


@functools.cache
def alone(config, bos_id, steps, dtype):
    """The same by torch's own loss, backward, clipping and AdamW in one process."""
    model = Llama.create(config, 0, backward="autograd", dtype=dtype)
    named = dict(model.named_parameters())
    found = {"initial": {name: whole(p.detach()) for name, p in named.items()}}
    grow(named.values())

    def loss(rows):
        x, y = rows[:, :-1].clamp(min=0), rows[:, 1:].flatten()
        begin = [at for at, token in enumerate(x.flatten()) if at % 16 == 0 or token == bos_id]
        logits = model(x, boundaries=starts(*begin, x.numel()) if bos_id else None)
        return F.cross_entropy(logits.flatten(0, 1), y, ignore_index=-1)

    loss(step_rows(1)).backward()
    found["gradients"] = {name: whole(p.grad) for name, p in named.items()}
    matrices, norms = ([p for p in named.values() if p.dim() == n] for n in (2, 1))
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": norms, "weight_decay": 0}],
                                  3e-3, (0.9, 0.95), weight_decay=0.1)
    found["steps"] = []
    for i in range(steps):
        optimizer.zero_grad()
        value = loss(step_rows(i))
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        found["steps"].append((value.item(), norm.item()))
    with torch.no_grad():
        return found | {"nll": loss(held_out_rows()).item()}


def exchanged():
    """What g and g_bar of four ranks make of 3 of 12 tokens each, in rows of 2, and of a gradient.
    """
    tp, found = llama.TensorParallel(dist.group.WORLD), {}
    for name, x in (("g", noise(3, 4, seed=tp.rank)), ("g_bar", noise(6, 2, 4, seed=tp.rank))):
        x = x.double().requires_grad_()
        y = getattr(tp, name)(x, 2)
        dy = noise(*y.shape, seed=4 + tp.rank, dtype=y.dtype)
        y.backward(dy)
        found[name] = [z.detach() for z in (x, y, dy, x.grad)]
    return found


def rank_layouts(folder):
    """One of four: what it finds in each case, in a file."""
    with train.join("cpu", 60) as world:
        for name, of_case in CASES.items():
            torch.save(as_rank(*of_case), f"{folder}/{name} {world.rank}")
        torch.save(exchanged(), f"{folder}/exchanged {world.rank}")


@pytest.fixture(scope="module")
def found_by(tmp_path_factory):
    """name of a case -> what each rank found."""
    folder = tmp_path_factory.mktemp("layouts")
    assert start_ranks(folder, "layouts", 4).wait(120) == 0, (folder / "err").read_text()

    @functools.cache
    def read(name):
        return [torch.load(folder / f"{name} {rank}") for rank in range(4)]
    return read


@pytest.fixture(params=CASES)
def compared(request, found_by):
    """A case, what its ranks found, and what one process did."""
    case = CASES[request.param]
    oracle = alone(case.config, case.bos_id, case.steps, case.options["dtype"])
    return case, found_by(request.param), oracle


class TestLayouts:
    """The same training by one process and by four."""

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
            planned = train.memory_needed(case.config, case.layout, 1, 16, dtype, "fused",
                                          case.options["backward"], 2, place)
            there = [rank for rank in ranks if rank["place"] == place]
            for what in ("weights", "gradients", "AdamW"):
                assert max(rank[f"bytes of {what}"] for rank in there) == planned[what]

    def test_work_is_split(self, compared):
        case, ranks, _ = compared
        layout = case.layout
        for rank in ranks:
            assert rank["rows"] == 8 // layout.dp and rank["micro_batches"] >= 2
        held = sum(rank["bytes of weights"] for rank in ranks) / 4
        norms, tables = case.config.dim * (2 * case.config.n_layers + 1), 64 * 32
        copies = layout.replicas * (layout.tp - 1) * norms  # norms are whole on each
        if layout.pp > 1 and case.config.tie_embeddings:
            copies += layout.replicas * tables  # on the first and on the last stage
        assert held == layout.replicas * case.config.n_params + copies

    def test_a_quarter_of_the_state_on_each_of_four(self, found_by):
        state = 16 * CASES["fsdp 4"].config.n_params
        for rank in found_by("fsdp 4"):
            held = sum(rank[f"bytes of {what}"] for what in ("weights", "gradients", "AdamW"))
            assert held == pytest.approx(state / 4, rel=0.1)

    @pytest.mark.parametrize("name, sums, gathers, reductions", [
        # by 2 layers and the root, of 2 micro-batches; the root's weights stay for the backward
        ("ddp 4", 3, 0, 0),  # once a step
        ("fsdp 4", 0, 2 * (2 * 2 + 1), 2 * 3), ("fsdp 4, bf16", 0, 2 * (2 * 2 + 1), 2 * 3),
        ("hybrid 2 x 2", 3, 2 * (2 * 2 + 1), 2 * 3),  # between the replicas once a step
        # of 2 layers g and g_bar, forward and backward, h and h again; embedding and loss; norms
        ("tp 4", 1, 2 * (2 * 6 + 3), 2 * (2 * 4 + 2)), ("pp 4", 0, 0, 0)])
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
            for rank in range(4):  # all tokens on each rank; of its own, the sum of all ranks'
                close(gathered[rank], parts.view(6, 2, 4), atol=0)
                close(summed[rank], wholes.sum(0).view(4, 3, 4)[rank], atol=1e-12)
            close((x * dx).sum(), (y * dy).sum(), atol=1e-12)


if __name__ == "__main__":
    tokenizer.command(lambda words: globals()["rank_" + words[1]](*words[2:]))
