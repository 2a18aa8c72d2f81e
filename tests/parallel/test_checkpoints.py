"""A checkpoint that all ranks write, read by other numbers of ranks, strategies and stages."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Checkpoint
from hpc_train.train.comm.context import Context
from hpc_train.train.reduce.reducer import open_reducer
from hpc_train.train.run.checkpoint import shares
from hpc_train.train.run.checkpoint.restore import load_newest
from hpc_train.train.run.checkpoint.saver import Saver
from hpc_train.train.setup import make_optimizer, open_job
from hpc_train.train.training_state import TrainingState
from tests import checkpoints
from tests.parallel.test_sharded import KEYS
from tests.parallel.test_train import CONFIGS, run

LAYOUTS: dict[str, dict[str, object]] = {
    "mpi": {"reduce__strategy": "mpi"},
    "stage 1": {"reduce__strategy": "sharded", "reduce__stage": 1},
    "stage 2": {"reduce__strategy": "sharded", "reduce__stage": 2},
    "stage 3": {"reduce__strategy": "sharded", "reduce__stage": 3},
    "server": {"reduce__strategy": "parameter_server"},
}


class _Control:
    stop = save = False


@contextmanager
def opened(context: Context, digits: Path, layout: str) -> Iterator[TrainingState]:
    """A job before its first step."""
    keys = {**KEYS, **LAYOUTS[layout], "data__file": digits}
    settings = tuple(f"{key.replace('__', '.')}={value}" for key, value in keys.items())
    config = load(CONFIGS / "mlp-mnist.toml", settings).config
    with (
        open_job(config, context) as job,
        open_reducer(config.reduce, job.model, job.mesh, _Control(), job.draw) as reducer,
    ):
        yield TrainingState(job, reducer, make_optimizer(job, reducer))


def copied(training: TrainingState, source: RunDir, target: Path, **settings: object) -> tuple[dict[str, Any], int]:
    """Loads the newest checkpoint and saves it again; the state in the copy, and the bytes that this rank read."""
    context, num_read = training.job.context, 0

    def plan(state: dict[str, Any]) -> Any:
        nonlocal num_read
        planned = training.plan(state)
        for group in planned.replicated:
            mine = shares.divide([each.into for each in group.wanted], group.context.world.size)
            for number, begin, end in mine[group.context.world.rank]:
                num_read += (end - begin) * group.wanted[number].into.itemsize
        return planned

    run_of = RunDir(target)
    context.on_root(partial(run_of.checkpoints_dir.mkdir, parents=True))
    facts = load_newest(source, context, lambda state, _: training.check(state), plan, print)
    with context.duplicate() as own:
        chosen = Checkpoint.model_validate(settings)
        with Saver(run_of, chosen, training.job.facts, own, print) as saver:
            saver.save_now(facts["step"], training.share())
    state = context.on_root(partial(checkpoints.state, run_of.checkpoint(facts["step"])))
    return state, num_read


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            assert_same(ours[key], value, f"{where}/{key}")
    elif isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("before", LAYOUTS)
def test_weights_and_moments_are_the_same_to_the_bit_for_any_ranks_and_layout(
    context: Context, shared_path: Path, digits: Path, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded by this many ranks and by each fewer, under every strategy and stage, and saved again."""
    size = context.world.size
    if size == 1:
        pytest.skip("one rank divides nothing")
    monkeypatch.setattr(shares, "_LEAST_BYTES_OF_A_WRITER", 1 << 10)  # so that small ones are divided, too
    keys = {**KEYS, "train__steps": 3, **LAYOUTS[before]}
    source = run(context, shared_path / "source", digits, "mlp-mnist.toml", **keys)
    expected = context.on_root(partial(checkpoints.state, source.checkpoint(3)))
    for num_ranks in range(1, size + 1):
        with context.split(int(context.world.rank >= num_ranks)) as some:
            for after in LAYOUTS if context.world.rank < num_ranks else ():
                if num_ranks == 1 and after != "stage 1":
                    continue  # one rank is `local` whatever is asked for
                with opened(some, digits, after) as training:
                    target = shared_path / f"{num_ranks} {after}"
                    state, num_read = copied(training, source, target)
                    assert_same(state, expected, f"{before}, then {after} on {num_ranks}")
                    if after == "stage 3":
                        total = sum(value.nbytes for _, value in shares.leaves(expected) if hasattr(value, "nbytes"))
                        assert num_read < 1.35 * total / num_ranks, "its share alone, and padding"
        context.barrier()


@pytest.mark.parametrize("layout", ["mpi", "stage 3"])
def test_mpi_io_writes_the_same_file(context: Context, shared_path: Path, digits: Path, layout: str) -> None:
    source = run(context, shared_path / "source", digits, "mlp-mnist.toml", **KEYS, **LAYOUTS["mpi"])
    with opened(context, digits, layout) as training:
        for write in ("independent", "collective"):
            copied(training, source, shared_path / write, write=write)
    files = [RunDir(shared_path / write).checkpoint(8) for write in ("independent", "collective")]
    with h5py.File(files[0]) as ours, h5py.File(files[1]) as theirs:
        assert np.array_equal(ours["pieces"][:], theirs["pieces"][:])
        assert np.array_equal(ours["model/enter.weight"][:], theirs["model/enter.weight"][:])
        assert ours["model/second.weight"] == ours["model/first.weight"], "tied weights are one data set"
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("write", ["independent", "collective"])
def test_a_rank_with_weights_that_are_no_numbers_is_named(
    context: Context, shared_path: Path, digits: Path, write: str
) -> None:
    rank, size = context.world.rank, context.world.size
    if size == 1:
        pytest.skip("one rank needs no name")
    run_of = RunDir(shared_path)
    context.on_root(partial(run_of.checkpoints_dir.mkdir, parents=True))
    with (
        opened(context, digits, "stage 3") as training,
        context.duplicate() as own,
        Saver(run_of, Checkpoint.model_validate({"write": write}), {}, own, print) as saver,
    ):
        saver.save_now(1, training.share())
        if rank == size - 1:
            with torch.no_grad():
                training.reducer.shards.owned[-1].parameter[0] = float("nan")
        with pytest.raises(UserError, match=rf"step 2 was not written: .* holds NaN .*\(rank {size - 1} on "):
            saver.save_now(2, training.share())
    context.barrier()
    assert [each.name for each in run_of.checkpoints_dir.iterdir()] == ["step-00000001.h5"]


def test_a_rank_that_cannot_read_its_ranges_is_named_and_the_checkpoint_before_is_used(
    context: Context, shared_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if context.world.size == 1:
        pytest.skip("one rank needs no name")
    keys = {**KEYS, "train__steps": 4, "checkpoint__every_steps": 2, **LAYOUTS["stage 3"]}
    source = run(context, shared_path, digits, "mlp-mnist.toml", **keys)
    last = context.world.size - 1
    said: list[str] = []
    failed: list[bool] = []
    expected = context.on_root(partial(checkpoints.state, source.checkpoint(2)))
    with opened(context, digits, "stage 3") as training:

        def plan(state: dict[str, Any]) -> Any:
            planned = training.plan(state)
            if context.world.rank == last and not failed:
                failed.append(True)
                planned.replicated[1].wanted[0].stored._handle = -1
            return planned

        facts = load_newest(source, context, lambda state, _: training.check(state), plan, said.append)
        assert facts["step"] == 2
        if context.world.is_root:
            assert "Bad file descriptor" in said[0] and f"(rank {last} on {context.world.host})" in said[0]
        own = training.reducer.shards.owned[0]
        (name, begin, offset, length), *_ = own.segments
        theirs = expected["model"][name].view(-1)[begin : begin + length]
        assert torch.equal(own.parameter.detach().view(-1)[offset : offset + length], theirs)
