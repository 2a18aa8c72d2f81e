"""Every job in configs/ trains for a few steps on one and on three ranks; `make models` trains them to their ends."""

import json
import tomllib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from hpc_train import rundir
from tests import jobs
from tests.benchmarks import models

JOBS = sorted(jobs.CONFIGS.glob("*.toml"))
Keys = dict[str, object]

# What makes a job of each kind short; a new kind needs a line here.
SHORT: dict[str, Keys] = {"classification": {"train__global_batch": 6}}
# Jobs that are too large for a test as they are shipped.
SMALLER: dict[str, Keys] = {}


@pytest.fixture(scope="module")
def data(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Keys]:
    """data(kind): the keys that name real data for a kind of task, prepared once."""

    @lru_cache
    def named(kind: str) -> Keys:
        return {"data__file": digits}

    return named


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_shipped_job_trains(tmp_path: Path, data: Callable[[str], Keys], path: Path, ranks: int) -> None:
    kind = tomllib.loads(path.read_text())["task"]["kind"]
    keys = {"train__steps": 3, "train__threads": 1, "run__root": tmp_path, **data(kind), **SHORT[kind]}
    done = jobs.run(ranks, "train", path, *jobs.settings(**keys | SMALLER.get(path.stem, {})), cwd=tmp_path)
    assert done.code == 0, done.err
    (run,) = rundir.find([tmp_path])
    summary = json.loads(run.summary.read_text())
    assert summary["complete"] and summary["num_steps"] == 3 and summary["size"] == ranks and summary["test"]


def test_every_job_with_an_aim_is_shipped() -> None:
    assert {row.job for row in models.ROWS} <= {path.stem for path in JOBS}


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
