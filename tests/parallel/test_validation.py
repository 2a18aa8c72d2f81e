"""Validation while a model trains: the same measures on any number of ranks, and nothing else changes."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpc_train.analysis.energy.run_energy import energy_of
from hpc_train.analysis.runs.load import load as load_run
from hpc_train.core.config import Loaded, load
from hpc_train.core.errors import UserError
from hpc_train.core.records import read_metrics
from hpc_train.core.rundir import RunDir, find, is_complete
from hpc_train.core.signals import CONTINUE
from hpc_train.core.timing_log import read_timings
from hpc_train.core.validation_log import read_validation
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.data.hold_out import _group_noise
from hpc_train.train.loop import train
from hpc_train.train.run.checkpoint.retention import checkpoints, step_of
from hpc_train.train.setup import open_job
from hpc_train.train.tasks.regression import Regression

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


@pytest.mark.parametrize("keys", [["reduce.strategy=horovod"], ["reduce.strategy=sharded", "reduce.stage=3"]], ids=str)
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
    if context.world.is_root:
        check_energy(*runs)
    timings = read_timings(runs[0].timings(context.world.rank))
    begins_ns = timings["start_ns"]
    gaps_ns = begins_ns[1:] - (begins_ns + timings.phases_ns.sum(axis=1))[:-1]
    is_after_validation = (np.arange(1, STEPS) % 4) == 0
    assert (gaps_ns[~is_after_validation] == 0).all() and (gaps_ns[is_after_validation] > 0).all()


def check_energy(validated: RunDir, other: RunDir) -> None:
    """Validations are a phase of the energy: of the power that the meters show, for as long as they took."""
    energy, without = energy_of(load_run(validated)), energy_of(load_run(other))
    assert "validation" not in without.phases
    rest = sum(amount.known for name, amount in energy.phases.items() if name != "validation")
    joules = energy.phases["validation"].known
    assert rest + joules + energy.outside.known == pytest.approx(energy.gross.known)
    if energy.gross.quality == "estimated":  # by a constant power
        seconds = sum(row["seconds"] for row in read_validation(validated.validation))
        assert joules == pytest.approx(seconds * energy.gross.known / energy.metered_s, rel=1e-3)


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
        (["data.validation_file=v.h5"], r"validation_file = 'v\.h5' and data\.hold_out = 0\.2: both"),
        (["reduce.strategy=parameter_server"], "does not go with reduce.strategy = 'parameter_server'"),
    ):
        with pytest.raises(UserError, match=says):
            job(cars, shared_path, *keys)


def test_the_best_state_is_kept_and_training_ends_without_a_better_one(
    context: Context, cars: Path, shared_path: Path, capfd: pytest.CaptureFixture[str]
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
        assert is_complete(run) and "Training ends: no better loss in 2 validations" in capfd.readouterr().out
    for num_steps in (16, 12):  # the loss stays as it is: the third validation ends it, which is the last one of 12
        flat = ("train.lr=1e-30", f"train.steps={num_steps}", "train.stop_after=2", "reduce.strategy=mpi")
        whole = trained(context, job(cars, shared_path / f"{num_steps}", *flat))
        assert context.on_root(lambda run=whole: [row["step"] for row in read_validation(run.validation)]) == [4, 8, 12]
        assert ("Training ends" in capfd.readouterr().out) == (num_steps == 16 and context.world.is_root)
    with pytest.raises(
        UserError, match=r"keep_best = 'validation\.accuracy': there is no such measure\n.*validation\.r2"
    ):
        trained(
            context, job(cars, shared_path / "b", "reduce.strategy=mpi", "checkpoint.keep_best=validation.accuracy")
        )
    with pytest.raises(UserError, match=r"train\.stop_after = 2 needs validation\.every_steps"):
        job(cars, shared_path, "validation.every_steps=0", "train.stop_after=2")


@pytest.fixture(scope="module")
def patients(context: Context, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 samples to train on, of 30 patients; others to validate on, in the same file and in one of their own."""

    def write() -> Path:
        rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("patients")
        inputs = rng.random((400, 7), np.float32)
        with h5py.File(folder / "own.h5", "w") as own, h5py.File(folder / "patients.h5", "w") as file:
            for part, rows in (("train", slice(0, 300)), ("validation", slice(300, 400))):
                file[f"{part}/inputs"], file[f"{part}/targets"] = inputs[rows], inputs[rows].sum(axis=1)
            own["x"], own["y"] = file["validation/inputs"][:], file["validation/targets"][:]
            file["patient"] = [f"P{row % 30}" for row in range(300)]
            file["number"] = np.arange(300) % 30
        return folder / "patients.h5"

    return context.on_root(write)


def test_samples_of_their_own_are_validated_on_and_tested_on(
    context: Context, patients: Path, shared_path: Path
) -> None:
    """In data.file, by their usual names, and in another file under other names: the same measures, and the test's."""
    own = patients.with_name("own.h5")
    by_names = [f"data.validation_{key}" for key in (f"file={own}", "inputs=x", "targets=y")]
    tests = [key.replace("validation_", "test_") for key in by_names]
    usual, by_file = (
        trained(context, job(patients, shared_path / name, "reduce.strategy=mpi", "data.hold_out=0", *keys))
        for name, keys in (("usual", ()), ("file", (*by_names, *tests)))
    )
    if context.world.is_root:
        rows = [without_seconds(run) for run in (usual, by_file)]
        assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [4, 8, 12]
        tested = json.loads(by_file.summary.read_text())["test"]
        assert tested == {name: pytest.approx(rows[0][-1][name], rel=1e-6) for name in tested} and tested
        assert not json.loads(usual.summary.read_text())["test"]
    keys = (*by_names[:2], "data.hold_out=0", "reduce.strategy=mpi")
    with pytest.raises(UserError, match=r"data\.validation_targets = 'validation/targets': no such data set in .*own"):
        train(job(patients, shared_path, *keys), context)


def test_without_samples_to_validate_on_nothing_begins(context: Context, cars: Path, shared_path: Path) -> None:
    with pytest.raises(UserError, match=r"validation\.every_steps = 4 needs samples .* holds no validation/inputs"):
        train(job(cars, shared_path, "data.hold_out=0", "reduce.strategy=mpi"), context)


def test_a_group_is_held_out_whole_or_not_at_all(context: Context, patients: Path, shared_path: Path) -> None:
    """By strings or numbers, on any number of ranks; which groups depends on the seed and the value alone."""
    chosen = {}
    for by in ("patient", "number"):
        for seed in (1, 2):
            keys = (f"data.hold_out_by={by}", f"seed={seed}", "reduce.strategy=mpi")
            with open_job(job(patients, shared_path, *keys).config, context) as opened:
                task = opened.task
                sides = [task.validation.groups, task.train.groups]
                held_out, trained_on = ({str(group) for group in side[: len(side)]} for side in sides)
            assert held_out and trained_on and not held_out & trained_on and len(held_out | trained_on) == 30
            assert len(sides[0]) == 10 * len(held_out)
            chosen[by, seed] = held_out
    assert chosen["patient", 1] != chosen["patient", 2] and chosen["number", 1] != chosen["number", 2]
    assert chosen["patient", 1] == {f"P{n}" for n in range(30) if _group_noise(1, f"P{n}") < 0.2}
    for by, says in (("train/inputs", r"hold_out_by = 'train/inputs' is \(300, 7\)"), ("none", "no such data set")):
        with pytest.raises(UserError, match=says):
            train(job(patients, shared_path, f"data.hold_out_by={by}", "reduce.strategy=mpi"), context)


class Interrupted(Regression):
    """Asks for a stop on the last rank in the first validation of this process."""

    num_asked = 0

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self._is_last = context.world.rank == context.world.size - 1

    def validation_batches(self, world: World) -> Any:
        if self._is_last and not Interrupted.num_asked:
            Interrupted.num_asked += 1
            os.kill(os.getpid(), signal.SIGUSR2)
        return super().validation_batches(world)


def test_a_stop_in_a_validation_ends_the_job_and_the_next_start_makes_it(
    context: Context, cars: Path, shared_path: Path
) -> None:
    Interrupted.num_asked = 0
    keys = ("reduce.strategy=mpi", f"task.kind={__name__}:Interrupted")
    assert train(job(cars, shared_path, *keys), context) == CONTINUE
    run = context.on_root(lambda: find([shared_path])[-1])
    assert context.on_root(lambda: (not run.validation.exists(), run.checkpoint(4).exists())) == (True, True)
    Interrupted.num_asked = 1
    assert train(job(cars, shared_path, *keys), context, "auto") == 0
    whole = trained(context, job(cars, shared_path / "whole", "reduce.strategy=mpi"))
    if context.world.is_root:
        assert without_seconds(run) == without_seconds(whole)


def test_epochs_in_place_of_steps(context: Context, patients: Path, shared_path: Path) -> None:
    """300 samples in batches of 64: five steps an epoch, the last of 44. A tenth more than two epochs is eleven."""
    keys = ("data.hold_out=0", "reduce.strategy=mpi", "validation.every_steps=0", "validation.every_epochs=0.5")
    loaded = job(patients, shared_path / "epochs", *keys, "train.epochs=2.1")
    run = trained(context, loaded)
    steps = trained(context, job(patients, shared_path / "steps", *keys, "train.steps=11"))
    taken = read_timings(run.timings(context.world.rank))
    assert context.sum(taken["num_samples"].copy()).tolist() == [64, 64, 64, 64, 44] * 2 + [64]
    if context.world.is_root:
        assert read_metrics(run.metrics) == read_metrics(steps.metrics), "the schedule ends with them, too"
        assert [row["step"] for row in read_validation(run.validation)] == [3, 5, 8, 10]
        read = load_run(run)
        assert read.config.train.steps == 11 and not read.incomplete
        assert load(run.config).config == loaded.config, "which may be trained on other numbers of ranks"
    longer = job(patients, shared_path / "epochs", *keys, "train.epochs=3")
    with pytest.raises(UserError, match=r"train\.epochs = 3\.0 here, 2\.1 in the run"):
        train(longer, context, str(run.path))
    constant = (*keys, "train.schedule=constant")
    begun = trained(context, job(patients, shared_path / "constant", *constant, "train.epochs=1"))
    assert trained(context, job(patients, shared_path / "constant", *constant, "train.epochs=2"), str(begun.path))
    if context.world.is_root:
        assert read_metrics(begun.metrics)[0] == list(range(10))


def without_seconds(run: RunDir) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if name != "seconds"} for row in read_validation(run.validation)
    ]
