"""hpc-train bench io under a real mpirun: rows for every layout, mode and rank count, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import monotonic, sleep
from typing import Any

import pytest

from tests import jobs

LAYOUTS = {
    "raw POSIX": {"independent"},
    "raw MPI-IO": {"independent", "collective"},
    "contiguous": {"independent", "collective", "memory map"},
    "chunked": {"independent", "collective", "direct chunks"},
    "gzip": {"independent", "collective", "direct chunks"},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bench")
    done = jobs.run(2, "bench", "io", "--size-mb", 3, "--repeat", 2, "--dir", folder, "--json", cwd=folder)
    assert done.code == 0, done.err
    assert list(folder.iterdir()) == []
    yield json.loads(done.out)


def test_every_layout_and_mode_is_measured_on_one_and_on_both_ranks(found: dict[str, Any]) -> None:
    rows = {(row["layout"], row["mode"], row["ranks"]): row for row in found["rows"]}
    assert set(rows) == {(layout, mode, n) for layout, modes in LAYOUTS.items() for mode in modes for n in (1, 2)}
    for row in rows.values():
        assert all(len(row[name]) == 2 and min(row[name]) > 0 for name in ("write_s", "transfer_s", "read_s"))
        assert row["write_over_mpi_io"] > 0 and row["read_over_posix"] > 0
    assert rows["gzip", "direct chunks", 2]["written"] == "collective"
    assert found["file_system"] and found["size_mib"] == 3


def test_the_model_is_judged_by_the_rows(found: dict[str, Any]) -> None:
    ratios = []
    for row in found["rows"]:
        ratio = median(row["read_s"]) / (median(row["write_s"]) + median(row["transfer_s"]))
        assert row["model_ratio"] == pytest.approx(ratio)
        ratios.append(ratio)
    factors = sorted(max(ratio, 1 / ratio) for ratio in ratios)
    assert factors[0] <= found["model_factor"] <= factors[-1]
    assert f"off by a factor of {found['model_factor']:.1f}" in found["model_words"]
    assert f"less than that sum in {sum(ratio < 1 for ratio in ratios)} rows" in found["model_words"]


def test_an_interrupt_leaves_no_file(tmp_path: Path) -> None:
    words = jobs.command(2, "bench", "io", "--size-mb", 8, "--repeat", 1000, "--dir", tmp_path)
    child = subprocess.Popen(words, env=jobs.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    sleep_until(lambda: bool(list(tmp_path.glob("*/*.h5"))), 60)
    os.kill(child.pid, signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode != 0
    sleep_until(lambda: not list(tmp_path.iterdir()))


def test_ranks_that_are_killed_leave_no_file(tmp_path: Path) -> None:
    """As mpirun kills those that do not hear Ctrl-C."""
    words = jobs.command(2, "bench", "io", "--size-mb", 8, "--repeat", 1000, "--dir", tmp_path)
    with subprocess.Popen(words, env=jobs.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        sleep_until(lambda: bool(list(tmp_path.glob("*/*.h5"))), 60)
        for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    sleep_until(lambda: not list(tmp_path.iterdir()))


def sleep_until(is_so: Callable[[], bool], most_s: float = 10) -> None:
    began = monotonic()
    while not is_so():
        assert monotonic() - began < most_s
        sleep(0.01)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--size-mb", 1), "--size-mb 1 is less than 1 MiB for each of 2 ranks"),
        (("--dir", "absent"), "--dir absent cannot be written: No such file or directory"),
        (("--size-mb", 1 << 20), "MB left"),
    ],
)
def test_a_mistake_is_one_message(tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    done = jobs.run(2, "bench", "io", *words, cwd=tmp_path)
    assert done.code == 2 and done.out == "" and done.err.count("hpc-train: ") == 1, done.err
    assert message in done.err and "Traceback" not in done.err


@pytest.mark.thorough
def test_the_benchmark_against_bounds_and_peers_runs_to_its_table(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.benchmarks.io", "--quick", "--work", tmp_path]
    done = subprocess.run(words, cwd=jobs.ROOT, env=jobs.environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    table = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    required = [row[2] for row in table[2:] if row[2]]
    assert required == [">= 0.9", ">= 4", ">= 0.9", "< 0.01", "< 0.01", ">= 0.9", "< 1", "< 1"], done.stdout
    assert list(tmp_path.iterdir()) == []
