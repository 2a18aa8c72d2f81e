"""Every job in configs/ trains for a few steps on one and on three ranks; `make models` trains them to their ends."""

import json
import tomllib
from pathlib import Path

import pytest

from hpc_train.core import rundir
from tests import jobs
from tests.benchmarks import models

JOBS = sorted(jobs.CONFIGS.glob("*.toml"))
OF_PACKAGES = [path for path in JOBS if ":" in tomllib.loads(path.read_text())["task"]["model"]]
Keys = dict[str, object]

# What makes a job of each kind short. Another kind needs a line here, and data below where it reads any.
SHORT: dict[str, Keys] = {
    "classification": {"train__global_batch": 6},
    "regression": {"train__global_batch": 6},
    "language": {"train__global_batch": 6},
    "masked_language": {"train__global_batch": 6},
    "dqn": {"train__global_batch": 30, "rl__replay_start": 60, "rl__test_episodes": 3},
    "policy_gradient": {"train__global_batch": 6, "rl__test_episodes": 3},
}
# What makes the model of a job small enough for a test.
SMALLER: dict[str, Keys] = {
    name: {
        f"task__options__{key}": value
        for key, value in {"layers": 2, "heads": 2, "width": 32, "context": 64, "vocab_size": 256}.items()
    }
    for name in ("gpt2-124m", "gpt2-xl")
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The standard library's package json, byte by byte."""
    folder = tmp_path_factory.mktemp("tokens")
    files = sorted(Path(json.__file__).parent.glob("*.py"))
    words = [word for path in files for word in ("--from", path)]
    done = jobs.run(2, "prepare", "text", folder / "json.h5", *words, cwd=folder)
    assert done.code == 0, done.err
    return folder / "json.h5"


@pytest.fixture(scope="module")
def cars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cars")
    done = jobs.run(0, "prepare", "auto-mpg", folder / "auto-mpg.h5", cwd=folder)
    assert done.code == 0, done.err
    return folder / "auto-mpg.h5"


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fields")
    done = jobs.run(0, "prepare", "burgers", folder / "burgers.nc", cwd=folder)
    assert done.code == 0, done.err
    return folder / "burgers.nc"


def data(kind: str, name: str, request: pytest.FixtureRequest) -> Keys:
    """The keys that name real data for the job `name`, of a task of this kind; prepared once."""
    if name == "unet-burgers":
        return {"data__file": request.getfixturevalue("fields")}
    of_kind = {"classification": "digits", "regression": "cars", "language": "tokens", "masked_language": "tokens"}
    return {"data__file": request.getfixturevalue(of_kind[kind])} if kind in of_kind else {}


@pytest.mark.parametrize("ranks", [3, pytest.param(1, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_shipped_job_trains(tmp_path: Path, request: pytest.FixtureRequest, path: Path, ranks: int) -> None:
    if why := jobs.lacking(path):
        pytest.skip(why)
    kind = tomllib.loads(path.read_text())["task"]["kind"]
    keys = {
        "train__steps": 3,
        "train__threads": 1,
        "run__root": tmp_path,
        **data(kind, path.stem, request),
        **SHORT[kind],
    }
    done = jobs.run(ranks, "train", path, *jobs.settings(**keys | SMALLER.get(path.stem, {})), cwd=tmp_path)
    assert done.code == 0, done.err
    (run,) = rundir.find([tmp_path])
    summary = json.loads(run.summary.read_text())
    assert summary["complete"] and summary["num_steps"] == 3 and summary["size"] == ranks and summary["test"]


@pytest.mark.parametrize("path", OF_PACKAGES, ids=lambda path: path.stem)
def test_a_model_of_another_package_takes_fifteen_lines(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 15


def test_every_job_with_an_aim_is_shipped() -> None:
    beside_lightning = {f"{models.LIGHTNING}/{path.stem}" for path in (jobs.ROOT / "tests/lightning").glob("*.toml")}
    assert {row.job for row in models.ROWS} <= {path.stem for path in JOBS} | beside_lightning


@pytest.mark.thorough
def test_the_table_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole job, and one that misses its aim; what is complete is not trained again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    row = models.Row("softmax-mnist", "mnist-5k", (1,), "accuracy", ">=", 0.85)
    assert models.table([row], Path("runs"))[1] is False, "nothing is trained yet"
    assert models.train(row, Path("runs")) == []
    lines, met = models.table([row], Path("runs"))
    assert met and "| softmax: 7,850 | mnist-5k | accuracy 0.9" in lines[2] and "| yes |" in lines[2]
    worse = models.Row("softmax-mnist", "mnist-5k", (1,), "accuracy", "<", "loss")
    assert models.train(worse, Path("runs")) == [] and len(rundir.find([tmp_path])) == 1
    lines, met = models.table([row, worse], Path("runs"))
    assert not met and "accuracy < loss | no |" in lines[3]
