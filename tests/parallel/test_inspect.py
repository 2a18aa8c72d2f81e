"""`data check` by several ranks: the same faults and statistics as one rank finds, with shares that are empty."""

import fcntl
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_train.core.errors import UserError
from hpc_train.core.world import World
from hpc_train.datasets.inspect.check import Checked, check
from hpc_train.train.comm.context import Context


def made(path: Path) -> Path:
    """Samples with a NaN, a chunk that is damaged, one that was never written, copies, and a leak."""
    rng = np.random.default_rng(0)
    inputs = rng.random((500, 20, 20), np.float32)
    inputs[[400, 401, 402]], inputs[77, 3, 3] = inputs[10], np.nan
    with h5py.File(path, "w") as file:
        train = file.create_dataset("train/inputs", inputs.shape, "f4", chunks=(30, 20, 20), fletcher32=True)
        train[:120], train[150:] = inputs[:120], inputs[150:]
        file["train/targets"] = np.arange(500) % 4
        file["test/inputs"] = np.concatenate([inputs[200:203], rng.random((50, 20, 20), np.float32)])
        file["test/targets"] = np.arange(53) % 5
        at = train.id.get_chunk_info_by_coord((300, 0, 0)).byte_offset
    with path.open("r+b") as raw:
        raw.seek(at + 100)
        raw.write(b"\xaa\x55")
    return path


def test_all_ranks_find_what_one_finds(context: Context, shared_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hpc_train.datasets.inspect.chunk_ranges._RANGE_BYTES", 50_000
    )  # many pieces, and data sets of one
    path = context.on_root(lambda: made(shared_path / "data.h5"))
    together = check([path], context, quiet=True)
    alone = check([path], Context(World()), quiet=True)
    assert _without_time(together) == _without_time(alone)
    found = {(fault.kind, fault.dataset, fault.number, fault.samples) for fault in together.faults}
    assert found == {
        ("unwritten", "train/inputs", 4, (120, 149)),
        ("damaged", "train/inputs", 10, (300, 329)),
        ("not finite", "train/inputs", 2, (77, 77)),
        ("leakage", "test/inputs", None, None),
        ("out of range", "test/targets", None, None),
    }
    assert together.datasets["train/inputs"]["equal_to"] == {"train/inputs": 3}
    assert together.datasets["test/inputs"]["equal_to"] == {"train/inputs": 3}
    context.barrier()


def test_a_file_that_the_root_may_not_open_is_an_error_of_all(context: Context, shared_path: Path) -> None:
    path = context.on_root(lambda: made(shared_path / "data.h5"))
    with ExitStack() as held:
        if context.world.is_root:
            fcntl.flock(held.enter_context(path.open("rb")), fcntl.LOCK_EX)
        with pytest.raises(UserError, match="cannot be locked") as caught:
            check([path], context, quiet=True)
        assert caught.value.joint or context.comm is None


def _without_time(checked: Checked) -> Checked:
    return replace(checked, seconds=0.0, num_ranks=0)
