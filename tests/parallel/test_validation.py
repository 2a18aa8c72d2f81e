"""Validation while a model trains: the same measures on any number of ranks, and nothing else changes."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_train.core.config import Loaded, load
from hpc_train.core.errors import UserError
from hpc_train.core.records import read_metrics
from hpc_train.core.rundir import RunDir, find, is_complete
from hpc_train.core.timing_log import read_timings
from hpc_train.core.validation_log import read_validation
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.loop import train
from hpc_train.train.run.checkpoint.retention import checkpoints, step_of
from hpc_train.train.setup import open_job

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = 12


@pytest.fixture(scope="module")
def cars(context: Context, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def write() -> Path:
        rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("cars") / "cars.h5"
        inputs = rng.random((500, 7), np.float32)
        with h5py.File(path, "w") as file:
            for part, rows in (("train", slice(0, 400)), ("test", slice(400, 500))):
                file[f"{part}/inputs"], file[f"{part}/targets"] = inputs[rows], inputs[rows].sum(axis=1)
        return path

    return context.on_root(write)


def job(cars: Path, root: Path, *overrides: str) -> Loaded:
    return load(
        CONFIGS / "mlp-auto-mpg.toml",
        (
            *(f"data.file={cars}", f"run.root={root}", f"train.steps={STEPS}", "train.log_every=1", "train.threads=1"),
            *("data.hold_out=0.2", "validation.every_steps=4", "checkpoint.every_steps=6", *overrides),
        ),
    )


def trained(context: Context, loaded: Loaded, resume: str = "never") -> RunDir:
    assert train(loaded, context, resume) == 0
    return context.on_root(lambda: find([Path(loaded.config.run.root)])[-1])


@pytest.mark.parametrize("keys", [["reduce.strategy=mpi"], ["reduce.strategy=sharded", "reduce.stage=3"]], ids=str)
def test_each_sample_counts_once_on_any_number_of_ranks(
    keys: list[str], context: Context, cars: Path, shared_path: Path
) -> None:
    run = trained(context, job(cars, shared_path / "ranks", *keys))
    found = context.on_root(lambda: read_validation(run.validation))
    assert [row["step"] for row in found] == [4, 8, 12] and list(found[0]) == [
        "step",
        "seconds",
        "loss",
        "mse",
        "mae",
        "r2",
    ]
    if context.world.is_root:
        alone = trained(Context(World()), job(cars, shared_path / "alone", "reduce.strategy=local"))
        for row, expected in zip(found, read_validation(alone.validation), strict=True):
            for name in ("loss", "mse", "mae", "r2"):
                assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)
    context.barrier()


def test_training_is_the_same_with_validation_and_without(context: Context, cars: Path, shared_path: Path) -> None:
    """To the bit, and validations are in no step's time: steps follow each other without what they take."""
    runs = [
        trained(context, job(cars, shared_path / name, "reduce.strategy=mpi", *keys))
        for name, keys in (("with", ()), ("without", ("validation.every_steps=0",)))
    ]
    losses = [context.on_root(lambda run=run: read_metrics(run.metrics)) for run in runs]
    assert losses[0] == losses[1]
    assert context.on_root(lambda: not runs[1].validation.exists())
    timings = read_timings(runs[0].timings(context.world.rank))
    begins_ns = timings["start_ns"]
    gaps_ns = begins_ns[1:] - (begins_ns + timings.phases_ns.sum(axis=1))[:-1]
    is_after_validation = (np.arange(1, STEPS) % 4) == 0
    assert (gaps_ns[~is_after_validation] == 0).all() and (gaps_ns[is_after_validation] > 0).all()


def test_a_run_that_goes_on_has_each_validation_once(context: Context, cars: Path, shared_path: Path) -> None:
    """The checkpoint of step 6 is the newest that is left: the validation after 8 steps comes again."""
    loaded = job(cars, shared_path, "reduce.strategy=mpi", "checkpoint.keep=9")
    run = trained(context, loaded)
    before = context.on_root(lambda: read_validation(run.validation))
    context.on_root(run.checkpoint(STEPS).unlink)
    context.on_root(run.summary.unlink)
    assert trained(context, loaded, str(run.path)).path == run.path
    after = context.on_root(lambda: read_validation(run.validation))
    strip = [[{name: row[name] for name in row if name != "seconds"} for row in rows] for rows in (before, after)]
    assert strip[0] == strip[1]


def test_which_samples_are_held_out_depends_on_the_seed_alone(context: Context, cars: Path, shared_path: Path) -> None:
    held_out = []
    for keys in (["seed=1"], ["seed=1", "train.global_batch=8"], ["seed=2"]):
        with open_job(job(cars, shared_path, "reduce.strategy=mpi", *keys).config, context) as opened:
            task = opened.task
            mine = [batch.inputs[:, 0] for batch in task.validation_batches(context.world)]
            everyone = np.concatenate([np.concatenate(part) for part in context.all_gather(mine)])
            trains_on = task.batch(np.arange(task.num_samples), 0).inputs[:, 0].numpy()
        assert len(everyone) + len(trains_on) == 400 and not set(everyone) & set(trains_on)
        assert 50 < len(everyone) < 110
        held_out.append(everyone.tolist())
    assert held_out[0] == held_out[1] != held_out[2]


def test_what_cannot_be_validated_is_refused(cars: Path, shared_path: Path) -> None:
    for keys, says in (
        (["data.hold_out=0"], r"validation\.every_steps = 4 needs samples"),
        (["reduce.strategy=parameter_server"], "does not go with reduce.strategy = 'parameter_server'"),
    ):
        with pytest.raises(UserError, match=says):
            job(cars, shared_path, *keys)


def test_the_best_state_is_kept_and_training_ends_without_a_better_one(
    context: Context, cars: Path, shared_path: Path
) -> None:
    """A learning rate that is far too high: the first validation is the best."""
    keys = ("train.lr=3.0", "train.steps=40", "checkpoint.every_steps=2", "checkpoint.keep=1", "train.stop_after=2")
    loaded = job(cars, shared_path, "reduce.strategy=mpi", "checkpoint.keep_best=validation.loss", *keys)
    run = trained(context, loaded)
    rows = context.on_root(lambda: read_validation(run.validation))
    best = min(rows, key=lambda row: row["loss"])
    assert len(rows) < 10 and [row["step"] > best["step"] for row in rows[-3:]] == [False, True, True]
    kept = context.on_root(lambda: [step_of(path) for path in checkpoints(run)])
    assert kept == [rows[-1]["step"], best["step"]]
    if context.world.is_root:
        assert is_complete(run)
    with pytest.raises(
        UserError, match=r"keep_best = 'validation\.accuracy': there is no such measure\n.*validation\.r2"
    ):
        trained(
            context, job(cars, shared_path / "b", "reduce.strategy=mpi", "checkpoint.keep_best=validation.accuracy")
        )
    with pytest.raises(UserError, match=r"train\.stop_after = 2 needs validation\.every_steps"):
        job(cars, shared_path, "validation.every_steps=0", "train.stop_after=2")
