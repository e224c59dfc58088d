"""State, and the processes of a run: the sections of train.py."""
import contextlib
import functools
import itertools
import json
import logging
import os
import pickle
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from io import BytesIO
from pathlib import Path, PurePath
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.elastic.multiprocessing import (DefaultLogsSpecs, SignalException,
                                                       start_processes)

from cost import memory_there
from generate import Weight, shapes, write_meta
from llama import LlamaConfig, local_shard
from tokenizer import cores

# ---------------------------------------------------------------------------------------------
# State: torch.distributed.checkpoint's folder, tensors only; everything else is JSON


class SafeUnpickler(pickle.Unpickler):
    """Reads a checkpoint's metadata with the classes that it needs and no others. Entries that are
    not tensors, which would be unpickled when loaded, are refused by the same rule."""
    NEEDED = {"torch.distributed.checkpoint.metadata":
              "Metadata TensorStorageMetadata TensorProperties ChunkStorageMetadata MetadataIndex "
              "StorageMeta _MEM_FORMAT_ENCODING",
              "torch.distributed.checkpoint.filesystem": "_StorageInfo",
              "torch.serialization": "_get_layout",
              "torch": "Size float32 float16 bfloat16 float64 uint8 int64"}

    def find_class(self, module: str, name: str):
        if name in self.NEEDED.get(module, "").split():
            return super().find_class(module, name)
        if module.split(".")[0] == "pathlib":
            return PurePath  # the folder it was written to; not used
        raise pickle.UnpicklingError(f"its metadata names {module}.{name}")


class SafeReader(dcp.FileSystemReader):
    """Of one state, whose metadata is read once, by SafeUnpickler."""

    def __init__(self, state: Path):
        super().__init__(state)
        self.metadata = SafeUnpickler(BytesIO((state / ".metadata").read_bytes())).load()

    def read_metadata(self, *args, **kwargs):
        return self.metadata


class Writer(dcp.FileSystemWriter):
    """Writes a state aside. When all ranks have written, the one that coordinates renames it: a
    state is there wholly or not at all. The last two up to this step are kept."""

    def __init__(self, folder: Path, facts: dict):
        super().__init__(folder / "saving")
        self.facts, self.done = facts, folder / f"step-{facts['step']:09d}"

    def prepare_global_plan(self, plans):
        shutil.rmtree(self.path)  # of a save that was cut short
        self.path.mkdir()
        return super().prepare_global_plan(plans)

    def finish(self, metadata, results):
        super().finish(metadata, results)
        facts = {**self.facts, "crc32": checksum(self.path, self.facts)}
        (self.path / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        shutil.rmtree(self.done, ignore_errors=True)
        os.replace(self.path, self.done)
        states = sorted(self.done.parent.glob("step-*"))
        before = states.index(self.done) - 1
        for state in states[:max(0, before)] + states[before + 2:]:
            shutil.rmtree(state, ignore_errors=True)


def checksum(state: Path, facts: dict) -> int:
    """Of the two files of a state that are not zip archives."""
    return zlib.crc32((state / ".metadata").read_bytes() + json.dumps(facts).encode())


class Saving(NamedTuple):
    """A state that is being written."""
    group: dist.ProcessGroup | None  # of its collectives, which run beside those of training
    wait: Callable[[], None]         # until it is there; OSError on every rank if that failed


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict,
               before: Saving | None = None) -> Saving:
    """Begins to write folder/step-N, N being facts["step"], when the save `before` is done. What is
    written is a copy, so that training goes on meanwhile; where memory for a copy is short,
    training waits. Every rank calls this."""
    group = None
    if before:
        before.wait()
        group = before.group
    elif dist.is_initialized():
        group = patient_group()
    tensors, writer = {**tensors, "random": torch.get_rng_state()}, Writer(folder, facts)
    size = sum(local_shard(x).nbytes for x in tensors.values())
    size *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of all ranks on this machine
    roomy = memory_there("cpu") > 2 * size
    options = {"storage_writer": writer, "process_group": group, "no_dist": group is None}
    if roomy:
        write = dcp.async_save(tensors, **options).result
    else:
        write = partial(dcp.save, tensors, **options)

    @functools.cache  # so that dcp.save runs once
    def wait() -> None:
        try:
            write()
        except (OSError, dcp.api.CheckpointException) as error:
            if group is None or dist.get_rank() == 0:
                shutil.rmtree(writer.path, ignore_errors=True)
            raise OSError(f"the state of step {facts['step']} could not be written "
                          f"({cause_of(error)}); older states are untouched; try to free space, "
                          "then the same command") from None

    if not roomy:
        wait()
    return Saving(group, wait)


def load_state(folder: Path, tensors: dict[str, Tensor]) -> dict | None:
    """Fills the tensors, and torch's random generator, from the newest state that is good on every
    rank, whatever layout it was saved in, and returns its facts; None if there is none. A damaged
    state is named and passed over."""
    states = together(lambda: sorted(folder.glob("step-*")))
    for state in reversed(states):
        try:
            return together(partial(read_state, state, tensors), everywhere=True)
        except ValueError as error:
            print_rank0(f"{state} is damaged and passed over: {error}")
    if states:
        raise ValueError(f"no state in {folder} is good; try --fresh to start over")
    return None


def read_state(state: Path, tensors: dict[str, Tensor]) -> dict:
    """Fills the tensors and returns the facts; ValueError if bytes are not as they were written.
    Each tensor is stored as a zip archive (torch.save) with a CRC-32, which torch ignores and
    Python's zipfile checks. Each rank checks its share of the archives."""
    rank, size = 0, 1
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    try:
        facts = json.loads((state / "facts.json").read_text(encoding="utf-8"))
        if facts.pop("crc32") != checksum(state, facts):
            raise ValueError("facts.json or .metadata is not what was written")
        reader, random = SafeReader(state), torch.get_rng_state()
        for part in list(reader.metadata.storage_data.values())[rank::size]:
            with open(state / part.relative_path, "rb") as file:
                file.seek(part.offset)
                archive = BytesIO(file.read(part.length))
            if zipfile.ZipFile(archive).testzip():
                raise ValueError(f"{part.relative_path} is not what was written")
        dcp.load({**tensors, "random": random}, storage_reader=reader, no_dist=True)
        torch.set_rng_state(random)
        return facts
    except (Exception, dcp.api.CheckpointException) as error:  # whatever damaged bytes lead to
        raise ValueError(cause_of(error)) from None


def cause_of(error: BaseException) -> str:
    """The last line of what happened on the first rank that failed; Ctrl-C stays Ctrl-C."""
    while isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, KeyboardInterrupt):
        raise error
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


def export_state(state: Path, config: LlamaConfig, folder: Path) -> None:
    """Meta's folder from the state in step-N, a tensor at a time, whatever layout wrote it."""
    reader, weights = SafeReader(state), {}

    def read(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensors = {name: torch.empty(shape, dtype=dtype)}
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        return tensors[name]

    for name, shape in shapes(config).items():
        dtype = reader.metadata.state_dict_metadata[f"model.{name}"].properties.dtype
        weights[name] = Weight(shape, dtype, (), partial(read, f"model.{name}", shape, dtype))
    write_meta(config, weights, folder)


def state_tensors(parameters: dict[str, Tensor], optimizer) -> dict[str, Tensor]:
    """Everything that training goes on from: weights and AdamW's moments, by name."""
    state = {f"model.{name}": p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        state |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    return state


# ---------------------------------------------------------------------------------------------
# Many processes: how they start, and how a run survives one that ends

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
         if hasattr(signal, name)]  # of a terminal, a system, a dropped ssh, SLURM


class World(NamedTuple):
    rank: int = 0        # of this process among all
    size: int = 1        # processes in all
    local_rank: int = 0  # among those of this machine
    local_size: int = 1


def print_rank0(text: str) -> None:
    """On stderr, once for all ranks."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def join(device: str, timeout: float) -> Iterator[World]:
    """This process's place among the ranks that torchrun or `start` made; without them it is alone.
    A collective that takes `timeout` seconds is an error. Rank 0 reports an error at once, others
    after seconds: by then whoever started the ranks has ended them, so that an error that all ranks
    meet is said once."""
    env = os.environ
    rank, size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    world = World(rank, size, int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", size)))
    if size == 1:
        yield world
        return
    if "PARENT_PID" in env:
        watch = partial(end_with_parent, int(env["PARENT_PID"]))
        threading.Thread(target=watch, daemon=True).start()
    if device == "cuda":
        torch.cuda.set_device(world.local_rank)
    else:
        torch.set_num_threads(max(1, cores() // world.local_size))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield world
        dist.destroy_process_group()
    except (ValueError, OSError) as error:
        if rank == 0:
            raise
        time.sleep(5)
        raise ValueError(f"rank {rank}: {error}") from None
    except Exception:
        time.sleep(3)  # often the end of another rank is the cause, and that one is reported
        raise


def end_with_parent(parent: int) -> None:
    """Ends a rank, and the processes that it started, when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def patient_group() -> dist.ProcessGroup:
    """A group of all ranks for collectives that wait longer than --timeout: for text that rank 0
    prepares, or for a slow disk."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def together(work: Callable, everywhere: bool = False):
    """Runs work() on rank 0, or with `everywhere` on all ranks. Every rank gets rank 0's result or
    raises the first ValueError or OSError of any rank."""
    if not dist.is_initialized():
        return work()
    group, error, results = patient_group(), None, [None]
    try:
        if everywhere or dist.get_rank() == 0:
            results = [work()]
    except (ValueError, OSError) as caught:
        error = caught
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error, group)
    for error in errors:
        if error is not None:
            raise error
    dist.broadcast_object_list(results, 0, group)
    return results[0]


def start(n: int, command: list[str], states: Path) -> int:
    """Runs the command as n ranks on this machine (Linux, macOS) and returns its exit status. When
    a rank dies, all start again from the newest state; a second death without a new state is the
    end. A user's mistake (2) and a stop by a signal (over 128) are not tried again."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    heard = [number.name for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(heard)
    reached = None
    for again in itertools.count():
        try:
            rank, status = run_ranks(n, command, again)
        except SignalException as stop:
            return 128 + stop.sigval
        if status in (0, 2) or status > 128:
            return status
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        newest = max(states.glob("step-*"), default=None)
        if again and newest == reached:
            print_rank0(f"error: rank {rank} {how}, again before a new state was saved; try "
                        "--save-every with fewer steps, or the same command, which goes on from "
                        "the last good state")
            return 1
        print_rank0(f"rank {rank} {how}; going on from the last good state")
        reached = newest


def run_ranks(n: int, command: list[str], again: int) -> tuple[int, int]:
    """Starts the ranks and waits: (rank, exit status or minus the signal) of the first that died or
    met an error, else of one when all have ended. Each rank has a session of its own, so that a
    terminal's Ctrl-C reaches this process alone, which passes it on, once."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
              "TORCHELASTIC_RESTART_COUNT": again, "PARENT_PID": os.getpid()}
    envs, args = {}, dict.fromkeys(range(n), tuple(command[1:]))
    for rank in args:
        env = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        envs[rank] = {name: str(value) for name, value in env.items()}
    with tempfile.TemporaryDirectory() as logs:
        ranks = start_processes("train", command[0], args, envs, DefaultLogsSpecs(logs))
        processes = [handler.proc for handler in ranks.subprocess_handlers.values()]
        try:
            while True:  # ranks.wait() would end all when the first has stopped, while others save
                ended = [(process.poll(), rank) for rank, process in enumerate(processes)]
                failed = [end for end in ended if end[0] and end[0] <= 128]
                if failed:  # of several, a signal is more likely the cause
                    status, rank = min(failed)
                    return rank, status
                if None not in dict(ended):
                    status, rank = max(ended)
                    return rank, status
                time.sleep(0.05)
        except SignalException as stop:
            with contextlib.suppress(SignalException):  # a second one: at once
                ranks.close(stop.sigval, timeout=600)
            raise
        finally:
            ranks.close(signal.SIGKILL)


def replicas_agree(tensors: dict[str, Tensor]) -> None:
    """Ends all ranks with status 1 where the copies of a tensor on several ranks are not the same
    bits. To be called before a save, so that the last state stays good. Ranks compare one checksum
    a tensor, the exclusive or of its elements, which any one wrong bit changes."""
    if not dist.is_initialized():
        return
    checksums, wrong, found = {}, [], [None] * dist.get_world_size()
    for name, tensor in tensors.items():
        for dim, placement in enumerate(getattr(tensor, "placements", ())):
            if placement.is_replicate() and tensor.device_mesh.size(dim) > 1:
                mine = checksums.setdefault(tensor.device_mesh.get_group(dim), {})
                mine[name] = torch.hash_tensor(tensor.to_local()).item()
    for group, mine in checksums.items():
        ranks = dist.get_process_group_ranks(group)
        every = [None] * len(ranks)
        dist.all_gather_object(every, mine, group)
        for name in mine:
            common = statistics.mode(theirs[name] for theirs in every)
            odd = [rank for rank, theirs in zip(ranks, every) if theirs[name] != common]
            if odd:
                if len(ranks) == 2:  # either may be the wrong one
                    odd = ranks
                wrong.append(f"{name} of rank {' or '.join(map(str, odd))}")
    dist.all_gather_object(found, wrong)
    wrong = sorted(set(itertools.chain(*found)))
    if wrong:
        print_rank0(f"error: {wrong[0]} is not what the other copies are ({len(wrong)} such "
                    "tensors): a memory or processor failed in silence; nothing was saved since; "
                    "try without that one")
        dist.barrier()
        sys.exit(1)


class Stopper:
    """A signal of STOPS, unless it is ignored (nohup), ends the run after the step, with its state
    saved; the same one again at once. `signal` is its number, else 0."""

    def __init__(self):
        self.signal, self.before = 0, {}
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.stop)

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        print_rank0("\nstopping after this step; the same command goes on from there")
