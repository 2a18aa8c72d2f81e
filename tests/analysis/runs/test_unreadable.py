"""Files and folders that may not be read: one message, or the run left out and named."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_train.core.rundir import RunDir
from tests import jobs
from tests.synthetic import Recipe, write_run

pytestmark = pytest.mark.skipif(
    os.getuid() == 0 and not shutil.which("setpriv"), reason="root reads everything, and there is no setpriv here"
)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[list[RunDir]]:
    yield [write_run(tmp_path / "runs", Recipe(size=size, step_s=0.01 / size, steps=40)) for size in (1, 2, 4)]
    for folder, _, files in os.walk(tmp_path, onerror=lambda error: os.chmod(error.filename, 0o700)):
        for path in [folder, *(os.path.join(folder, file) for file in files)]:
            os.chmod(path, 0o700)


def said(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """`hpc-train words...` by somebody who may read only what the files' modes let their owner read."""
    may = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    return subprocess.run(
        [*may, str(jobs.HPC_TRAIN), *map(str, words)],
        cwd=folder,
        env=jobs.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("what", ["meta", "config", "timings(0)", "timings_dir", "energy_dir", "path"])
def test_an_unreadable_run_is_left_out_and_named(tmp_path: Path, runs: list[RunDir], what: str) -> None:
    closed: Path = eval(f"run.{what}", {"run": runs[2]})
    closed.chmod(0)
    done = said(tmp_path, "report", tmp_path / "runs", "--output", "report", "--json")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    tree = json.loads(done.stdout)
    assert [row["ranks"] for row in tree["groups"][0]["rows"]] == [1, 2]
    (note,) = [note for note in tree["notes"] if note.startswith("Left out")]
    assert str(closed) in note and "Permission denied" in note
    if what != "meta":
        return
    done = said(tmp_path, "plan", tmp_path / "runs", "--predict", "2")
    assert done.returncode == 0 and str(closed) in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("what", ["config", "timings_dir", "path"])
def test_an_unreadable_run_alone_is_one_message(tmp_path: Path, runs: list[RunDir], what: str) -> None:
    closed: Path = getattr(runs[0], what)
    closed.chmod(0)
    for words in (["report", runs[0].path], ["plan", runs[0].path]):
        done = said(tmp_path, *words)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert str(closed) in done.stderr
        assert "Permission denied" in done.stderr or "is not readable" in done.stderr  # in click's own words


def test_unreadable_folders_and_files_are_one_message(tmp_path: Path, runs: list[RunDir]) -> None:
    table = tmp_path / "table.csv"
    table.write_text("ranks,step_s\n1,1\n2,1\n")
    table.chmod(0)
    (tmp_path / "runs").chmod(0)
    for words, named in (
        (["report", tmp_path / "runs"], tmp_path / "runs"),
        (["report", runs[0].path.parent], runs[0].path.parent),
        (["plan", "--table", table], table),
    ):
        done = said(tmp_path, *words)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert str(named) in done.stderr
        assert "Permission denied" in done.stderr or "is not readable" in done.stderr


def test_a_place_that_may_not_be_written_is_one_message(tmp_path: Path, runs: list[RunDir]) -> None:
    (tmp_path / "runs").chmod(0o500)
    done = said(tmp_path, "report", tmp_path / "runs", "--output", tmp_path / "runs" / "report")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot be written" in done.stderr and "Permission denied" in done.stderr
