"""Output of commands whose reader has left, as after `| head -1`."""

import os
import subprocess
from pathlib import Path

import pytest

from tests import jobs

RUNS = jobs.ROOT / "tests/runs/mlp-mnist"


def run_unread(folder: Path, *words: object) -> tuple[int, str]:
    """(exit code, stderr) of a command that writes into a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        jobs.command(0, *words), cwd=folder, env=jobs.environment(), stdout=writer, stderr=subprocess.PIPE, timeout=120
    )
    os.close(writer)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("config", "show", "configs/mlp-mnist.toml"),
        ("report", RUNS, "--output", "page"),
        ("report", RUNS, "--output", "page", "--format", "json"),
        ("plan", "--table", jobs.ROOT / "tests/scaling/p100-resnet50.csv", "--predict", "64"),
    ],
    ids=lambda words: " ".join(map(str, words[:2])),
)
def test_a_reader_that_leaves_is_no_failure(tmp_path: Path, words: tuple[object, ...]) -> None:
    assert run_unread(tmp_path, *words) == (0, "")
    assert "page" not in words or (tmp_path / "page/report.html").exists(), "the command still does its work"


def test_a_command_keeps_its_own_exit_code(tmp_path: Path) -> None:
    code, said = run_unread(tmp_path, "report", tmp_path / "nothing")
    assert code == 2 and "nothing" in said
