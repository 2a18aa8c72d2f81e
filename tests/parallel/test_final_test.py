"""The test after training: a bound, a stop on request that keeps what there is, and a resumption that tests again."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from torch import nn

from hpc_train.core.config import Loaded, load
from hpc_train.core.rundir import RunDir, find, is_complete
from hpc_train.core.signals import CONTINUE
from hpc_train.core.timing_log import read_timings
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.evaluate import evaluate, measure
from hpc_train.train.loop import Control, train
from hpc_train.train.reduce.reducer import open_reducer
from hpc_train.train.setup import open_job
from hpc_train.train.tasks.regression import Regression

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS, NUM_TESTED = 6, 13_000  # several batches on each of four ranks


@pytest.fixture(scope="module")
def cars(context: Context, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def write() -> Path:
        rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("cars") / "cars.h5"
        inputs = rng.random((NUM_TESTED + 400, 7), np.float32)
        with h5py.File(path, "w") as file:
            for part, rows in (("train", slice(0, 400)), ("test", slice(400, None))):
                file[f"{part}/inputs"], file[f"{part}/targets"] = inputs[rows], inputs[rows].sum(axis=1)
        return path

    return context.on_root(write)


def job(cars: Path, root: Path, *overrides: str) -> Loaded:
    keys = (f"data.file={cars}", f"run.root={root}", f"train.steps={STEPS}", "train.threads=1")
    return load(CONFIGS / "mlp-auto-mpg.toml", (*keys, *overrides))


class Stopped(Regression):
    """Asks for a stop on the last rank, at its second batch of the first test that it sees; another run tests whole."""

    num_asked = 0

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self._asks, self._num_batches = context.world.rank == context.world.size - 1, 0

    def test(self, model: nn.Module, batch: Any) -> tuple[int, dict[str, float]]:
        self._num_batches += 1
        if self._asks and self._num_batches == 2 and not Stopped.num_asked:
            Stopped.num_asked += 1
            os.kill(os.getpid(), signal.SIGUSR2)
        return super().test(model, batch)


def test_a_stop_in_the_test_keeps_what_there_is_and_the_next_start_repeats_the_test_alone(
    context: Context, cars: Path, shared_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = job(cars, shared_path, "reduce.strategy=mpi", f"task.kind={__name__}:Stopped")
    Stopped.num_asked = 0
    assert train(loaded, context) == CONTINUE
    run = context.on_root(lambda: find([shared_path])[-1])
    if context.world.is_root:
        said, meta = capsys.readouterr().out, json.loads(run.meta.read_text())
        part = meta["test_until_stop"]
        assert 0 < part["num_samples"] < NUM_TESTED and part["num_samples"] % 1024 == 0
        assert f"{part['num_samples']:,} of {NUM_TESTED:,} samples: loss " in said and "Resumed, it tests again" in said
        assert meta["outcome"].startswith("stopped by ") and not run.summary.exists() and part["r2"] <= 1
    before = context.all_gather(read_timings(run.timings(context.world.rank)).values.tolist())
    Stopped.num_asked = 1
    assert train(loaded, context, "auto") == 0
    assert context.all_gather(read_timings(run.timings(context.world.rank)).values.tolist()) == before, "no step more"
    whole = trained(context, job(cars, shared_path / "whole", "reduce.strategy=mpi"))
    if context.world.is_root:
        assert is_complete(run) and "test_until_stop" not in json.loads(run.meta.read_text())
        assert measures_in(run) == measures_in(whole)


@pytest.mark.parametrize("keys", [["reduce.strategy=mpi"], ["reduce.strategy=sharded", "reduce.stage=3"]], ids=str)
def test_the_same_samples_each_once_on_any_number_of_ranks(
    keys: list[str], context: Context, cars: Path, shared_path: Path
) -> None:
    """Of all 13,000 and of 500, chosen whatever the seed, and of those held out, to six digits."""
    for samples in (["test.samples=500"], ["data.hold_out=0.3", "validation.every_steps=1"]):
        together = measured(context, job(cars, shared_path, *keys, *samples))
        if context.world.is_root:
            alone = measured(Context(World()), job(cars, shared_path, "reduce.strategy=local", *samples))
            assert together.keys() == alone.keys() and len(alone) == 4 + 4 * len(samples[1:])
            assert all(together[name] == pytest.approx(alone[name], rel=1e-6) for name in alone)
        context.barrier()


def test_a_bounded_test_says_so(
    context: Context, cars: Path, shared_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(context, job(cars, shared_path, "reduce.strategy=mpi", "test.samples=500"))
    assert not context.world.is_root or f"Test on 500 of {NUM_TESTED:,} samples\n" in capsys.readouterr().out


def trained(context: Context, loaded: Loaded) -> RunDir:
    assert train(loaded, context) == 0
    return context.on_root(lambda: find([Path(loaded.config.run.root)])[-1])


def measures_in(run: RunDir) -> dict[str, float]:
    found: dict[str, float] = json.loads(run.summary.read_text())["test"]
    return found


def measured(context: Context, loaded: Loaded) -> dict[str, float]:
    """The measures of the weights that a run begins with, on the samples to test and to validate on."""
    with (
        open_job(loaded.config, context) as opened,
        open_reducer(loaded.config.reduce, opened.model, opened.mesh, Idle(), opened.draw) as reducer,
    ):
        found = evaluate(opened, reducer)
        validated = measure(opened, reducer, opened.task.validation_batches(context.world)).measures
    assert found.is_whole and found.num_done == (loaded.config.test.samples or NUM_TESTED)
    return found.measures | {f"validation.{name}": value for name, value in validated.items()}


class Idle(Control):
    """Asks for nothing."""

    def __init__(self) -> None: ...

    stop = property(lambda self: False)
    save = property(lambda self: False)
