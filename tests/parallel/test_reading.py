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
from hpc_train.train.data import collective
from hpc_train.train.data.collective import DistributedReader
from hpc_train.train.data.readers import MmapReader
from hpc_train.train.tasks.classification import Classification
from tests.parallel.test_train import CONFIGS, losses, run

STEPS = 60  # at 133 samples each: two epochs of mnist-5k, whose last batch is of 10 samples
KEYS: dict[str, object] = {"train__steps": STEPS, "train__global_batch": 133, "data__shuffle_chunks": 4}
WAYS: dict[str, dict[str, object]] = {
    "chunks": {"data__file": "packed.h5"},
    "chunks of many files": {"data__file": "part-*.h5"},
    "collective": {"data__read": "collective"},
    "collective, of chunks": {"data__file": "packed.h5", "data__read": "collective"},
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
    """Data distributed over memory give the same samples in the same order as a memory map, to the bit."""
    keys = {"train__steps": 40, "train__global_batch": 133, "reduce__strategy": "mpi"}
    mapped = losses(run(context, shared_path / "a", digits, "softmax-mnist.toml", **keys))
    distributed = losses(run(context, shared_path / "b", digits, "softmax-mnist.toml", **keys, data__read="memory"))
    assert np.array_equal(mapped, distributed)


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
    for keys, says in (*several, ({**KEYS, "train__accumulate": 2}, "accumulate = 2 does not go with")):
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
