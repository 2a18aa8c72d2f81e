"""With every storage layout and read mode, ranks train on the same samples, with the same losses, as one process."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.sampling import BatchSampler, Order, Shares
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.data import collective, dataset
from hpc_train.train.data.collective import CollectiveReader, DistributedReader
from hpc_train.train.data.dataset import open_order
from hpc_train.train.data.readers import MmapReader, SelectedReader
from hpc_train.train.tasks.classification import Classification
from tests.parallel.test_train import CONFIGS, losses, run

STEPS = 60  # at 133 samples each: two epochs of mnist-5k, whose last batch is of 10 samples
KEYS: dict[str, object] = {"train__steps": STEPS, "train__global_batch": 133, "data__shuffle_chunks": 4}
WAYS: dict[str, dict[str, object]] = {
    "chunks": {"data__file": "packed.h5"},
    "chunks of many files": {"data__file": "part-*.h5"},
    "collective": {"data__read": "collective"},
    "collective, of chunks": {"data__file": "packed.h5", "data__read": "collective"},
    "collective, by windows": {"data__read": "collective", "data__memory_mb": 1},
    "collective, less what is held out": {"data__read": "collective", "data__memory_mb": 1, "data__hold_out": 0.2},
    "collective, in two parts": {"data__read": "collective", "data__memory_mb": 1, "train__accumulate": 2},
    "memory": {"data__read": "memory"},
    "memory, a few steps at once": {"data__read": "memory", "data__memory_mb": 1},
    "memory, of chunks": {"data__file": "packed.h5", "data__read": "memory"},
}


@pytest.fixture(scope="module")
def packed(context: Context, digits: Path) -> Path:
    """The folder with the digits in gzip chunks, in one file and in three."""

    def write() -> None:
        with h5py.File(digits) as plain:
            for name, begin, stop in (
                ("packed", 0, 4000),
                ("part-0", 0, 1000),
                ("part-1", 1000, 1001),
                ("part-2", 1001, 4000),
            ):
                with h5py.File(digits.parent / f"{name}.h5", "w") as file:
                    for part in ("train", "test"):
                        rows = slice(begin, stop) if part == "train" else slice(None)
                        x, y = plain[f"{part}/inputs"], plain[f"{part}/targets"]
                        packing = {"compression": "gzip", "shuffle": True, "fletcher32": True}
                        chunk = {"chunks": (50, *x.shape[1:]), "maxshape": (None, *x.shape[1:])}
                        made = file.create_dataset(f"{part}/inputs", data=x[rows], **chunk, **packing)
                        made.attrs.update(x.attrs)
                        file[f"{part}/targets"] = y[rows]

    context.on_root(write)
    return digits.parent


def job(folder: Path, way: dict[str, object]) -> dict[str, object]:
    keys = {**KEYS, **way}
    if "data__file" in keys:
        keys["data__file"] = folder / str(keys["data__file"])
    return keys


@lru_cache
def alone(root: Path, digits: Path, folder: Path, way: str) -> np.ndarray:
    keys = job(folder, WAYS[way])
    return losses(run(Context(World()), root / "alone", digits, "softmax-mnist.toml", reduce__strategy="local", **keys))


@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_of_one_process(
    context: Context, shared_path: Path, digits: Path, packed: Path, way: str
) -> None:
    done = run(context, shared_path, digits, "softmax-mnist.toml", reduce__strategy="mpi", **job(packed, WAYS[way]))
    together, expected = losses(done), context.on_root(lambda: alone(shared_path, digits, packed, way))
    assert len(together) == STEPS and np.abs(together / expected - 1).max() < 1e-5
    says = json.loads(done.meta.read_text())["reading"]
    assert ("memory of" in says) == ("memory" in way) and ("collective reads" in says) == ("collective" in way)


def test_ways_that_mix_alike_train_alike(context: Context, shared_path: Path, digits: Path, packed: Path) -> None:
    """Data distributed over memory, or read together, give the samples of a memory map in its order, to the bit."""
    keys = {"train__steps": 40, "train__global_batch": 133, "reduce__strategy": "mpi"}
    mapped = losses(run(context, shared_path / "a", digits, "softmax-mnist.toml", **keys))
    for mode in ("memory", "collective"):
        together = losses(run(context, shared_path / mode, digits, "softmax-mnist.toml", **keys, data__read=mode))
        assert np.array_equal(mapped, together), mode


def test_a_file_sorted_by_class_trains_as_well_read_together(
    context: Context, shared_path: Path, digits: Path, packed: Path
) -> None:
    """It reached 0.778 where a memory map reached 0.890, when neighbours made a batch."""

    def sort() -> None:
        with h5py.File(digits) as plain, h5py.File(packed / "sorted.h5", "w") as file:
            order = np.argsort(plain["train/targets"][:], kind="stable")
            for name in ("train/inputs", "train/targets", "test/inputs", "test/targets"):
                values = plain[name][:]
                file[name] = values[order] if name.startswith("train") else values
                file[name].attrs.update(plain[name].attrs)

    context.on_root(sort)
    keys = {
        "train__steps": 150,
        "train__global_batch": 60,
        "reduce__strategy": "mpi",
        "data__file": packed / "sorted.h5",
    }
    accuracies = []
    for way in ({}, {"data__read": "collective"}, {"data__read": "collective", "data__memory_mb": 1}):
        done = run(context, shared_path / "sorted", digits, "softmax-mnist.toml", **keys, **way)
        accuracies.append(json.loads(done.summary.read_text())["test"]["accuracy"])
    assert accuracies[1] == accuracies[0] and accuracies[2] > accuracies[0] - 0.03 > 0.8


@pytest.mark.parametrize(("num_rows", "memory_bytes"), [(101, 1600), (101, 1 << 20), (997, 9000)])
def test_rows_read_together_arrive(
    context: Context, shared_path: Path, num_rows: int, memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row is read once an epoch, in few pieces, and sent at most once; two messages a window between two ranks."""
    values, world = np.arange(num_rows * 6, dtype=np.int16).reshape(num_rows, 2, 3), context.world
    path = shared_path / "rows.h5"

    def write() -> None:
        with h5py.File(path, "w") as file:
            file["train/inputs"] = values

    context.on_root(write)
    monkeypatch.setattr(collective, "chunk_cache_bytes", lambda config: memory_bytes)
    monkeypatch.setattr(dataset, "chunk_cache_bytes", lambda config: memory_bytes)
    monkeypatch.setattr(collective, "_READ_BYTES", 100)
    keys = ("data.read='collective'", "train.global_batch=10", "seed=5")
    settings = load(CONFIGS / "softmax-mnist.toml", keys).config
    for kept in (np.arange(num_rows), np.flatnonzero(np.arange(num_rows) % 5)):
        stored = SelectedReader(MmapReader(values), kept)
        reader = CollectiveReader(path, "train/inputs", stored, settings, context)
        order = open_order([reader], len(kept), settings)
        sampler = BatchSampler(order, 10, 5, Shares(world.size), world.rank)
        steps_per_epoch = -(-len(kept) // 10)
        for step, (rows, _) in enumerate(sampler.batches(range(2 * steps_per_epoch))):
            if step == 7:  # as after a resume, in the middle
                reader._held.clear()
            reader.begin_step(step)
            assert np.array_equal(reader.take(rows), values[kept[rows]])
            assert np.array_equal(reader.take(rows[:0]), values[:0])
        num_windows = len(order.window_ends(5, 0))
        assert (memory_bytes < 1 << 20) == (num_windows > 1)
        sent = context.sum(np.array([reader.num_sent]))[0]
        assert reader.num_exchanges == 2 * (2 * num_windows + 1), "and the window that was read anew"
        assert sent <= 3 * len(kept) and (sent > 0) == (world.size > 1)
        elsewhere = np.setdiff1d(np.arange(len(kept)), np.concatenate([held for held, _ in reader._held.values()]))
        if len(elsewhere):
            with pytest.raises(UserError, match=rf"sample \d+ is not on rank {world.rank} at this step"):
                reader.take(elsewhere[:1])
        reader.close()


@pytest.mark.parametrize("memory_bytes", [1, 3000, 1 << 20])
def test_distributed_rows_arrive(context: Context, memory_bytes: int) -> None:
    values, world = np.arange(101 * 6, dtype=np.int16).reshape(101, 2, 3), context.world
    sampler = BatchSampler(Order(101), 10, 5, Shares(world.size), world.rank)
    reader = DistributedReader(MmapReader(values), sampler, memory_bytes, context)
    for step, (rows, _) in enumerate(sampler.batches(range(50))):
        if step >= 7:  # as after a resume
            reader.begin_step(step)
            assert np.array_equal(reader.take(rows), values[rows])
            assert np.array_equal(reader.take(rows[:0]), values[:0])


def test_a_row_that_a_rank_does_not_hold_is_refused(context: Context) -> None:
    """Without an error, another sample would be trained on instead."""
    values, world = np.arange(101 * 6, dtype=np.int16).reshape(101, 2, 3), context.world
    sampler = BatchSampler(Order(101), 10, 5, Shares(world.size), world.rank)
    reader = DistributedReader(MmapReader(values), sampler, 1, context)  # one step's rows at once
    batches = [rows for rows, _ in sampler.batches(range(4))]
    reader.begin_step(0)
    elsewhere = np.setdiff1d(np.arange(101), batches[0])
    for rows in (batches[3], batches[0] - 101, batches[0] + 101, elsewhere, np.append(batches[0], elsewhere[-1])):
        for out in (None, np.empty((len(rows), 2, 3), np.int16)):
            with pytest.raises(UserError, match=rf"sample -?\d+ is not on rank {world.rank} at this step"):
                reader.take(rows, out)
    assert np.array_equal(reader.take(batches[0]), values[batches[0]])


def test_what_cannot_be_read_together_is_refused(
    context: Context, shared_path: Path, digits: Path, packed: Path
) -> None:
    def join() -> None:
        layout = h5py.VirtualLayout((4000, 28, 28), np.uint8)
        for number, (begin, stop) in enumerate(((0, 1000), (1000, 1001), (1001, 4000))):
            layout[begin:stop] = h5py.VirtualSource(f"part-{number}.h5", "train/inputs", (stop - begin, 28, 28))
        with h5py.File(packed / "virtual.h5", "w") as file, h5py.File(digits) as plain:
            file.create_virtual_dataset("train/inputs", layout)
            file["train/targets"] = plain["train/targets"][:]

    context.on_root(join)
    several = [
        (job(packed, {"data__file": name}), "train/inputs is in several") for name in ("part-*.h5", "virtual.h5")
    ]
    for keys, says in several:
        with pytest.raises(UserError, match=f"collective.*{says}|{says}.*collective"):
            run(context, shared_path, digits, "softmax-mnist.toml", **keys, data__read="collective")


def test_what_no_node_holds_is_distributed_over_all(
    context: Context, shared_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Automatically, on a network file system, if all nodes together hold it; else the log says what would help."""
    mb = 1e6
    nodes = replace(context, world=replace(context.world, host=f"n{context.world.rank}"))
    monkeypatch.setattr(collective, "file_system", lambda path: "lustre")
    for memory_mb, way in ((100.0, "auto"), (4.0, "memory"), (0.1, "auto")):
        monkeypatch.setattr(collective, "physical_bytes", lambda: int(memory_mb * mb))  # noqa: B023
        task = Classification(load(CONFIGS / "softmax-mnist.toml", (f"data.file={digits}",)).config, nodes)
        is_distributed = way == "memory" and context.world.size > 1
        assert task.in_step == is_distributed and ("distributed over the memory" in task.reading) == is_distributed
        assert ("on lustre, more than half of a node's" in task.reading) == (memory_mb < 100)
