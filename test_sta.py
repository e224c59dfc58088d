from test_head import *

import contextlib
import pickle
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import torch.distributed as dist

import train
from train import Layout, arrange, memory_needed, wire_bytes


class TestArrange:
    CONFIG = LlamaConfig(32, 4, 8, 4, 36, 64, 32)

    def arrange(self, options, size, near, seq_len=32, **change):
        """options are dp tp pp, `-` where one is not given."""
        dp, tp, pp = [None if option == "-" else option for option in options.split()]
        return arrange(replace(self.CONFIG, **change), 8, seq_len, size, near, dp,
                       tp and int(tp), pp and int(pp))

    @pytest.mark.parametrize("options, size, near, layout", [
        ("- - -", 1, 1, {}), ("none - -", 1, 1, {}), ("- - -", 4, 4, {"shards": 4}),
        ("- - -", 8, 2, {"shards": 8}), ("ddp - -", 4, 2, {"replicas": 4}),
        ("- 2 -", 4, 4, {"tp": 2, "shards": 2}), ("none 4 -", 4, 4, {"tp": 4}),
        ("ddp - 2", 4, 4, {"pp": 2, "replicas": 2}),
        ("fsdp 2 2", 8, 8, {"pp": 2, "tp": 2, "shards": 2}),
        ("- - 4", 4, 4, {"pp": 4}), ("- 4 -", 32, 8, {"tp": 4, "shards": 8}),
        ("hybrid - -", 8, 4, {"replicas": 2, "shards": 4}),  # the state within a machine
        ("hybrid 2 -", 8, 4, {"replicas": 2, "shards": 2, "tp": 2}),
        ("hybrid - -", 6, 4, {"replicas": 3, "shards": 2})])
    def test_possible(self, options, size, near, layout):
        found = self.arrange(options, size, near)
        assert found == Layout(**layout) and found.size == size

    @pytest.mark.parametrize("options, size, change, message", [
        ("- 3 -", 3, {}, "--tp 3 does not divide n_kv_heads=4; try --tp with one of 1, 2, 4"),
        ("- 4 -", 4, {"hidden_dim": 38}, "--tp 4 .* hidden_dim=38; try --tp with one of 1, 2$"),
        ("- 4 -", 4, {"vocab_size": 61}, "--tp 4 .* vocab_size=61; try --tp with one of 1$"),
        ("- 4 -", 4, {"seq_len": 30}, "--tp 4 .* seq_len=30; try --tp with one of 1, 2$"),
        ("- - 5", 5, {}, "--pp 5: 4 layers .*; try --pp with up to 4"),
        ("- 4 -", 6, {}, "6 processes .* --tp 4 x --pp 1; try .* product is one of 1, 2, 3, 6"),
        ("- 2 4", 4, {}, "4 processes .* --tp 2 x --pp 4; try .* is one of 1, 2, 4"),
        ("- - -", 9, {}, "9 data-parallel .* 8 sequences of a step; try at most 8 processes, or"),
        ("ddp 2 -", 18, {}, "9 data-parallel .*; try at most 16 processes, or a larger"),
        ("hybrid 4 -", 8, {"near": 2}, "over the 2 processes .* takes 4; try --dp fsdp"),
        ("none 2 -", 4, {}, "--dp none .* 2 x 2 .*--dp ddp or --dp fsdp, or 2 processes")])
    def test_impossible(self, options, size, change, message):
        with pytest.raises(ValueError, match=message) as error:
            self.arrange(options, size, **{"near": size, **change})
        assert "\n" not in str(error.value)

    def test_rows_that_do_not_divide_are_filled_up(self):
        assert [Layout(1, 4, pp=2).passes(2048, rows) for rows in (3, 4)] == [172, 128]
        assert Layout(pp=4).bubble(16) == 3 / 16 and Layout(tp=4).bubble(1) == 0
        assert [train.stage_layers(SIZES["llama3.1-405b"][0], stage, 16) for stage in range(16)
                ] == [7, *[8] * 14, 7]


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


class TestCost:
    def test_flops(self):
        config = SIZES["65b"][0]
        matrices = 65285660672 - 32000 * 8192
        assert train.flops_per_token(config, 2048) == 6 * matrices + 6 * 80 * 8192 * 2048
        tied = SIZES["stories15m"][0]
        assert train.flops_per_token(tied, 256) == 6 * 15191712 + 6 * 6 * 288 * 256

    @pytest.mark.parametrize("backward, attention", [
        ("manual", "fused"), ("manual", "tiled"), ("manual", "equation"), ("autograd", "fused"),
        ("autograd", "equation")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("change", [{}, {"n_kv_heads": 4, "hidden_dim": 64},
                                        {"head_size": 20, "dim": 96}])
    def test_memory_counts_what_is_saved(self, change, dtype, backward, attention):
        config = replace(SMALL, n_layers=2, **change)
        real = saved_by_autograd(config, 3, 40, dtype, attention, backward)
        found = memory_needed(config, Layout(), 3, 40, dtype, attention, backward)
        if backward == "manual" and attention == "equation":
            real += 16 * 3 * config.n_heads * 40**2 // 2  # of one layer at a time
        assert found["activations"] == pytest.approx(2 * real, rel=0.01)
        assert sum(found[name] for name in ("weights", "gradients", "AdamW")) == (
            16 * config.n_params + 4 * 21)  # a count of steps for each parameter
        if backward == "autograd":
            again = memory_needed(config, Layout(), 3, 40, dtype, attention, "recompute")
            inputs = 2 * 3 * 40 * config.dim * dtype.itemsize
            assert again["activations"] == inputs + found["activations"] // 2

    def fit(self, name="7b", seq_len=2048, layout=Layout(), micro_batch=None, batch=2**22):
        return train.fit_memory(SIZES[name][0], layout, batch // seq_len, seq_len, torch.bfloat16,
                                "fused", "manual", "cpu", layout.size, micro_batch, name)

    @pytest.mark.parametrize("there, name, seq_len, advice", [
        (25e9, "7b", 2048,
         "7b needs about 11[0-9] GB .*has 25 GB free for it; try --size llama3.2-1b"),
        (25e9, "llama3.1-405b", 8192, "405b needs about .*; try --size"),
        (4e8, "stories15m", 65536, "try .*--seq-len 32768")])
    def test_what_does_not_fit_is_said_at_once(self, there, name, seq_len, advice, monkeypatch):
        assert train.memory_there("cpu") > 1e8
        monkeypatch.setattr(train, "memory_there", lambda device: int(there))
        with pytest.raises(ValueError, match=advice):
            self.fit(name, seq_len)

    def test_fewer_sequences_at_once_where_more_do_not_fit(self, monkeypatch):
        monkeypatch.setattr(train, "memory_there", lambda device: int(6e8))
        size, roomy = self.fit("stories15m", 256)
        assert size in (1, 2, 4, 8, 16) and not roomy
        monkeypatch.setattr(train, "memory_there", lambda device: 2**50)
        assert self.fit("stories15m", 256) == (32, True)  # 8192 tokens
        assert self.fit("stories15m", 256, Layout(pp=2), batch=2**14) == (8, True)  # 4 x pp passes
        assert self.fit("stories15m", 256, micro_batch=7) == (7, True)

    def test_matmul_rate(self):
        assert 1e8 < train.matmul_flops("cpu", torch.float32) < 1e15
        assert train.matmul_flops("mps", torch.float32) is None

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
        memory = memory_needed(config, Layout(shards=7), 1, 8, torch.float32, "fused", "manual")
        assert memory["weights"] == memory["gradients"] == 4 * real > 4 * config.n_params / 7
        assert memory["AdamW"] == 8 * real + 4 * len(list(model.parameters()))

    def test_memory_falls_as_the_work_is_split(self):
        config = replace(SMALL, n_layers=8, n_heads=8, n_kv_heads=8, dim=64, hidden_dim=128,
                         vocab_size=512)

        def need(layout, micro_batches=1, place=0):
            return memory_needed(config, layout, 2, 32, torch.bfloat16, "fused", backward,
                                 micro_batches, place)
        for backward in llama.BACKWARD:
            one, ddp, fsdp, hybrid = (need(Layout(replicas, shards)) for replicas, shards in
                                      ((1, 1), (8, 1), (1, 8), (4, 2)))
            assert ddp["weights"] == one["weights"] == 2 * hybrid["weights"] == 8 * fsdp["weights"]
            assert fsdp["activations"] == ddp["activations"] <= one["activations"]
            # Under autograd two inputs of products and two norms' weights are whole on each rank.
            layers = {"manual": 0, "autograd": 8, "recompute": 1}[backward]
            whole = layers * 3 * 2 * (2 * 32 * 64 + 64) * 2
            assert 4 * need(Layout(tp=4))["activations"] == one["activations"] + whole
            first, last = need(Layout(pp=4), 8, 0), need(Layout(pp=4), 8, 3)
            if backward == "manual":  # a quarter of the layers, of four micro-batches or one
                assert first["activations"] == one["activations"] == 4 * last["activations"]
            assert first["logits"] == 0 < last["logits"] == one["logits"]

    def test_buffers_and_logits(self):
        config, x = SIZES["7b"][0], 4 * 2048 * 4096 * 2
        root, matrices = (2 * 32000 + 1) * 4096, 32000 * 4096
        layer = (config.n_params - root) // 32

        def need(*layout):
            found = memory_needed(config, Layout(*layout), 4, 2048, torch.bfloat16, "fused",
                                  "manual", 8)
            return found["buffers"], found["logits"] - 12 * llama.logit_rows(
                32000 // layout[3], 4096) * 32000 // layout[3]
        assert need(1, 1, 1, 1) == (0, 4 * matrices)
        assert need(2, 1, 1, 1) == (2 * config.n_params + 4 * root, 4 * matrices)
        assert need(1, 2, 1, 1) == (2 * (root + 2 * layer) + 6 * root, 8 * matrices)
        assert need(1, 1, 1, 2) == (2 * x, 4 * matrices // 2)
        first = 16 * layer + matrices  # in a pipeline whole copies, and no logits but at its end
        assert memory_needed(config, Layout(1, 2, 2), 4, 2048, torch.bfloat16, "fused", "manual",
                             8)["buffers"] == 6 * first

    def test_bytes_on_the_wire(self):
        config = SIZES["7b"][0]

        def wire(layout, backward="manual", micro_batches=3, place=0):
            return wire_bytes(config, layout, 4, 2048, torch.bfloat16, backward, micro_batches,
                              place)
        P, root, x = config.n_params, (2 * 32000 + 1) * 4096, 4 * 2048 * 4096 * 2
        nothing = {"replicas": 0, "shards": 0, "pp": 0, "tp": 0}
        assert wire(Layout()) == nothing
        assert wire(Layout(8)) == {**nothing, "replicas": 2 * 4 * P * 7 // 8}  # once, in fp32
        fsdp = wire(Layout(1, 8))["shards"]
        assert fsdp == 3 * (2 * P + 2 * (P - root) + 4 * P) * 7 // 8
        assert wire(Layout(2, 8)) == {**nothing, "shards": fsdp, "replicas": 2 * 4 * P // 8 // 2}
        half = wire(Layout(2, pp=2), place=1)["replicas"] // 4  # the parameters of the last stage
        assert wire(Layout(1, 8, pp=2), place=1)["shards"] == 6 * half * 7 // 8
        for backward, exchanges in (("manual", 10), ("autograd", 8), ("recompute", 12)):
            tensor = wire(Layout(tp=8), backward)
            assert tensor == {**nothing, "tp": 3 * (32 * exchanges + 4) * x * 7 // 8}
        crossings = [wire(Layout(tp=2, pp=4), place=place)["pp"] for place in range(4)]
        assert crossings == [3 * n * x // 2 for n in (1, 2, 2, 1)]


def planned(size="7b", gpus=8, dp=None, tp=None, pp=None, gpu="H100", mfu=None, **change):
    """The plan of a size, in a layout that is asked for as on the command line."""
    config, recipe = SIZES[size]
    recipe, seq_len = recipe.filled()[0], config.max_seq_len
    run = SimpleNamespace(size=size, config=config, recipe=recipe, seq_len=seq_len, dtype="bf16",
                          attention="fused", backward="manual", micro_batch=None, steps=None)
    vars(run).update(change)
    run.rows = recipe.batch_tokens // run.seq_len
    run.layout = arrange(config, run.rows, run.seq_len, gpus, min(gpus, train.NODE), dp, tp, pp)
    return train.plan(run, gpus, gpu, mfu)


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
        found = planned("65b", 2048, gpu="A100", mfu=mfu, tp=8)
        assert found["tokens_per_s"] == pytest.approx(380 * 2048)
        assert found["days"] == pytest.approx(20.8, abs=0.05)
        assert found["mfu_as_papers"] == pytest.approx(0.497, abs=5e-4)
        assert found["gpu_hours"] == pytest.approx(1022362, rel=0.005)
        assert found["tco2eq"] == pytest.approx(173, rel=0.005)

    def test_405b_as_it_was_trained(self):
        found = planned("llama3.1-405b", 16384, tp=8, pp=16, seq_len=8192)
        assert {"replicas": 1, "shards": 128, "tp": 8, "pp": 16}.items() <= found.items()
        assert found["each"]["needs"] < 72e9 and found["fits"] == "yes"
        assert found["bubble"] == 15 / 16 and 0.2 < found["mfu"] < 0.3

    @pytest.mark.parametrize("options, nearest", [
        ({"gpus": 8, "dp": "ddp"}, "--dp fsdp --tp 1 --pp 1"),
        ({"gpus": 1}, "more --gpus or --backward recompute"),
        ({"size": "llama3-70b", "gpus": 64, "pp": 8, "dp": "ddp"}, "--dp fsdp --tp 4 --pp 8")])
    def test_what_does_not_fit_says_what_does(self, options, nearest):
        found = planned(**options)
        assert found["each"]["needs"] > 72e9 and found["fits"] == f"no; try {nearest}"

    def test_recomputing_takes_a_third_longer_in_less_memory(self):
        one, two = planned(backward="manual"), planned(backward="recompute")
        assert two["step_s"] == pytest.approx(4 / 3 * one["step_s"])
        assert two["memory"]["activations"] < one["memory"]["activations"] / 4

    def test_cpu(self):
        found = planned("tiny", 2, gpu="cpu", steps=50, dtype="fp32")
        assert found["steps"] == 50 and found["tokens"] == 50 * 2048 and 0 < found["days"] < 1
        with pytest.raises(ValueError, match="only the bf16 .*; try --dtype bf16"):
            planned(dtype="fp32")

    def test_text(self):
        lines = train.plan_text(planned()).splitlines()
        assert len(lines) <= 40 and max(map(len, lines)) <= 80
        for line in ("params                6,738,415,616", "memory weights        3.37 GB",
                     "each has              80.00 GB", "fits                  yes"):
            assert line in lines


def tensors_of(parameters):
    """What a state holds of these parameters, with other values in each tensor of AdamW."""
    parameters = dict(parameters)
    optimizer = train.make_optimizer(parameters, Recipe(0.1, 1, 1, eps=1e-8))
    for i, p in enumerate(parameters.values()):
        optimizer.state[p]["exp_avg"].fill_(i)
    return train.state_tensors(parameters, optimizer)


def save_now(folder, tensors, step, before=None):
    saving = train.save_state(folder, tensors, {"step": step, "skipped": 7}, before)
    saving.wait()
    return saving


def files(folder):
    return sorted(file.name for file in folder.iterdir())


class TestState:
    @pytest.fixture
    def states(self, tmp_path):
        """A folder with states of steps 1 to 3, of which two are kept, and the last tensors."""
        tensors, saving = tensors_of(random_model(SMALL).named_parameters()), None
        for step in (1, 2, 3):
            tensors["model.norm.weight"].fill_(step)
            saving = train.save_state(tmp_path, tensors, {"step": step, "skipped": step}, saving)
        saving.wait()
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

    @pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "facts.json"])
    @pytest.mark.parametrize("size", [None, 0, 30])
    def test_damaged_is_named_and_passed_over(self, states, name, size, capsys):
        """A file of the newest state is gone, or cut to so many bytes."""
        folder, tensors = states
        file = folder / "step-000000003" / name
        data = file.read_bytes()
        file.unlink()
        if size is not None:
            file.write_bytes(data[:size])
        assert train.load_state(folder, tensors)["step"] == 2
        assert torch.all(tensors["model.norm.weight"] == 2)
        said = capsys.readouterr().err
        assert "step-000000003 is damaged" in said and said.count("\n") == 1
        shutil.rmtree(folder / "step-000000002")
        with pytest.raises(ValueError, match="no state in .* is good; try --fresh"):
            train.load_state(folder, tensors)

    @pytest.mark.parametrize("name, least", [(".metadata", 12), ("__0_0.distcp", 9),
                                             ("facts.json", 12)])
    def test_no_flipped_bit_is_loaded(self, states, name, least):
        """Such a state is passed over, or the bit is one of padding, which means nothing."""
        folder, tensors = states
        wanted, passed_over = {name: t.clone() for name, t in tensors.items()}, 0
        file = folder / "step-000000003" / name
        data = file.read_bytes()
        for bit in tokens(12, vocab=8 * len(data)).tolist():
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            if train.load_state(folder, tensors)["step"] == 2:
                passed_over += 1
            else:
                assert all(torch.equal(t, wanted[name]) for name, t in tensors.items())
        assert passed_over >= least

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
        saving = train.save_state(tmp_path, tensors, {"step": 1})
        assert (tmp_path / "step-000000001").exists() == (free == 0)
        tensors["x"].fill_(2)
        wanted = torch.get_rng_state()
        release.set()
        saving = train.save_state(tmp_path, tensors, {"step": 2}, saving)  # waits for the first
        assert (tmp_path / "step-000000001").exists()
        saving.wait()
        saving.wait()  # once is enough
        torch.rand(3)
        assert train.load_state(tmp_path, tensors)["step"] == 2 and torch.all(tensors["x"] == 2)
        assert torch.equal(torch.get_rng_state(), wanted)
        shutil.rmtree(tmp_path / "step-000000002")
        assert train.load_state(tmp_path, tensors)["step"] == 1 and torch.all(tensors["x"] == 1)

    def test_ctrl_c_is_no_damage(self, states, monkeypatch):
        def pressed(*args, **options):
            raise KeyboardInterrupt
        monkeypatch.setattr(train.SafeReader, "read_data", pressed)
        with pytest.raises(KeyboardInterrupt):
            train.load_state(*states)

    def test_a_state_of_a_later_step_goes(self, states):
        folder, tensors = states
        (folder / "step-000000009").mkdir()  # damaged: the run went back to step 3
        (folder / "saving").mkdir()  # of a save that was cut short
        save_now(folder, tensors, 4)
        assert files(folder) == ["step-000000003", "step-000000004"]

    @pytest.mark.parametrize("tied", [False, True])
    def test_export_is_the_model(self, tmp_path, tied):
        model = random_model(replace(SMALL, tie_embeddings=tied))
        save_now(tmp_path / "state", tensors_of(model.named_parameters()), 1)
        train.export_state(tmp_path / "state" / "step-000000001", model.config, tmp_path)
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
        train.export_state(tmp_path / "step-000000001", config, tmp_path / "out")
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
    folder, report, source, saving = Path(folder), {}, "one", None
    with train.join("cpu", 60) as world:
        rank = world.rank
        torch.manual_seed(rank)
        for name, layout in LAYOUTS_OF_STATES.items():
            engine = train.Engine(SMALL_EVEN, layout, "cpu", 1, seed=100)
            tensors = tensors_of(engine.parameters)
            facts = train.load_state(folder / source, tensors)
            saving = train.save_state(folder / name, tensors, facts, saving)
            saving.wait()
            source = name
        with full_disk(2_000 if rank == 2 else 2**40):
            try:
                save_now(folder / "hybrid", tensors, 2, saving)
            except OSError as error:
                dist.barrier()
                report["full"] = str(error), files(folder / "hybrid")
            dist.barrier()
        save_now(folder / "hybrid", tensors, 2, saving)
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
            save_now(state, x, 1)
            write = train.Writer.write_data

            def killed(*args):
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return write(*args)
            train.Writer.write_data = killed
        save_now(state, x, 2)
        made = train.together(lambda: {"made by": rank})
        everywhere = train.together(lambda: rank + 5, everywhere=True)
        Path(folder, f"world-{rank}").write_text(
            repr([*world, torch.get_num_threads(), facts, made, everywhere]))

        def fail_on_1():
            if rank == 1:
                raise OSError(28, "No space left on device", "shards")
        try:
            train.together(fail_on_1, everywhere=True)
        except OSError as error:
            Path(folder, f"error-{rank}").write_text(str(error))
        raise ValueError("there is no such corpus; try --data")


def rank_start(folder, case, n):
    """The process that starts n ranks."""
    command = [sys.executable, "-W", "ignore", __file__, "rank", case, folder]
    sys.exit(train.start(int(n), command, Path(folder) / "state"))


def start_ranks(folder, case, n):
    """Starts a process that starts n ranks; what they say comes into folder/err."""
    command = [sys.executable, "-W", "ignore", __file__, "rank", "start", str(folder), case, str(n)]
    with open(folder / "err", "w") as err:
        return subprocess.Popen(command, stderr=err, cwd=HERE)


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
    torch.manual_seed(7)
    wanted = tensors_of(random_model(SMALL_EVEN).named_parameters())
    save_now(folder / "one", wanted, 1)
    parent, pids = start_ranks(folder, "states", 4), [folder / f"pid-{rank}" for rank in range(4)]
    until(lambda: all(pid.exists() for pid in pids) or parent.poll() is not None)
    assert parent.poll() is None, (folder / "err").read_text()
    pids = [int(pid.read_text()) for pid in pids]
    assert all(map(alive, pids))
    parent.kill()
    parent.wait()
    time.sleep(1)  # ranks look every half a second
    reports = [json.loads((folder / f"report-{rank}").read_text()) for rank in range(4)]
    return folder, wanted, reports, (folder / "err").read_text(), pids


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of rank_world, the status and what was said."""
    folder = tmp_path_factory.mktemp("two")
    status = start_ranks(folder, "world", 2).wait(60)
    return folder, status, (folder / "err").read_text().splitlines()


class TestStatesOfRanks:
    @pytest.mark.parametrize("layout", LAYOUTS_OF_STATES)
    def test_there_and_back_through_every_layout(self, four, layout):
        folder, wanted, *_ = four
        tensors = {name: torch.full_like(t, -1) for name, t in wanted.items()}
        torch.manual_seed(8)
        assert train.load_state(folder / layout, tensors) == {"step": 1, "skipped": 7}
        assert all(torch.equal(t, wanted[name]) for name, t in tensors.items())
        assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(7).get_state())
        written = {file.name for file in (folder / layout / "step-000000001").glob("*.distcp")}
        assert written == {f"__{rank}_0.distcp" for rank in range(4)}

    def test_one_full_disk_is_told_to_all(self, four):
        for report in four[2]:
            message, there = report["full"]
            assert re.match(r"the state of step 2 could not be written \(.*; try to free", message)
            assert there == ["step-000000001"]

    def test_damage_is_seen_by_all(self, four):
        assert [report["damaged"] for report in four[2]] == 4 * [{"step": 1, "skipped": 7}]
        said = [line for line in four[3].splitlines() if "damaged" in line]
        assert len(said) == 1 and "step-000000002 is damaged and passed over" in said[0]

    def test_a_rank_killed_while_it_writes(self, two):
        folder, _, said = two
        assert files(folder / "state") == ["step-000000001", "step-000000002"]
        assert said[0] == "rank 1 was killed by signal 9; going on from the last good state"


class TestReplicasAgree:
    def test_a_wrong_bit_ends_all_ranks(self, four):
        assert [report["wrong"] for report in four[2]] == 4 * [1]
        said = re.findall("error: (.*) is not what the other copies are (.*):", four[3])
        assert said == [("model.norm.weight of rank 1 or 3", "(1 such tensors)")]


class TestJoin:
    def test_place_and_threads(self, two):
        from tokenizer import cores
        for rank in range(2):
            found = eval((two[0] / f"world-{rank}").read_text())
            assert found[:5] == [rank, 2, rank, 2, max(1, cores() // 2)]
            assert found[5] == {"step": 1, "skipped": 7}  # of the state that was good

    def test_a_mistake_of_all_is_one_line(self, two):
        _, status, said = two
        assert status == 2 and said[1:] == ["error: there is no such corpus; try --data"]

    def test_the_mistake_of_one_rank_has_its_number(self, monkeypatch):
        begin = partial(dist.init_process_group, store=dist.HashStore(), rank=0, world_size=1)
        monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: begin("gloo"))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        threads = torch.get_num_threads()
        try:
            with pytest.raises(ValueError, match="^rank 1: no disk here; try another"):
                with train.join("cpu", 60):
                    raise ValueError("no disk here; try another")
        finally:
            dist.destroy_process_group()
            torch.set_num_threads(threads)

    def test_alone_nothing_is_started(self):
        with train.join("cpu", 60) as world:
            assert world == (0, 1, 0, 1) and not dist.is_initialized()


class TestTogether:
    def test_result_is_everyones(self, two):
        for rank in range(2):
            assert eval((two[0] / f"world-{rank}").read_text())[6:] == [{"made by": 0}, 5]

    def test_error_is_everyones(self, two):
        for rank in range(2):
            assert "No space left on device" in (two[0] / f"error-{rank}").read_text()

    def test_alone(self):
        assert train.together(lambda: 7) == train.together(lambda: 7, everywhere=True) == 7


@pytest.fixture
def handlers():
    """Puts pytest's handlers of signals back."""
    kept = {number: signal.getsignal(number) for number in train.STOPS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


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
        assert not any(alive(pid) for pid in four[4])


if __name__ == "__main__":
    from tokenizer import command
    command(lambda words: globals()["rank_" + words[1]](*words[2:]))
