"""Runs of thousands of ranks: read once, in memory that does not grow with them, in time that grows no faster."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import laws
from tests.laws import Laws, Slow

_REPORT = """
import resource, sys, time
from rich.console import Console
from pathlib import Path
from hpc_train.analysis.report.renderers.files import write_report
from hpc_train.analysis.report.renderers.terminal import print_full
from hpc_train.analysis.report.report import make_report
report = make_report([Path(sys.argv[1])])
with open(sys.argv[2] + ".txt", "w") as file:
    print_full(report, Console(file=file))
write_report(report, Path(sys.argv[2]))
used = resource.getrusage(resource.RUSAGE_SELF)
print(time.process_time(), used.ru_maxrss * 1024, time.perf_counter())
"""


@dataclass(frozen=True)
class Cost:
    """Of a report of one run: seconds of a core, and the most memory it held."""

    cpu_s: float
    peak_bytes: int
    wall_s: float


def law(ranks: int, steps: int) -> Laws:
    """Ranks that take 24 ms a step, 8 on a host, of which one is slow; a meter that is read once a second."""
    return Laws(
        ranks=ranks,
        ranks_per_host=8,
        steps=steps,
        work_s=0.024,
        weak=True,
        batch=4,
        noise=0.02,
        slow=(Slow(5, 1.3),),
        clock_offset_s=3.0,
        clock_drift=1e-6,
        clock_error_s=1e-6,
        sample_hz=1.0,
    )


def report_of(root: Path, ranks: int, steps: int) -> Cost:
    folder = root / f"{ranks}"
    folder.mkdir()
    laws.write(folder, law(ranks, steps))
    command = [sys.executable, "-c", _REPORT, str(folder), str(root / f"report-{ranks}")]
    done = subprocess.run(["bash", "-c", 'time -p "$@"', "_", *command], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    wall_s = float(done.stderr.split("real")[1].split()[0])
    cpu, peak, _ = done.stdout.split()
    told = (root / f"report-{ranks}.txt").read_text()
    assert "of the time lost to straggler rank 5 on c0" in " ".join(told.split())
    cost = Cost(float(cpu), int(peak), wall_s)
    print(f"{ranks} ranks x {steps} steps: {cost.wall_s:.1f} s, {cost.cpu_s:.1f} s of a core, {peak_mb(cost):.0f} MB")
    return cost


def peak_mb(cost: Cost) -> float:
    return cost.peak_bytes / 1e6


def test_time_grows_with_the_records_and_memory_does_not(tmp_path: Path) -> None:
    small, middle, large = (report_of(tmp_path, ranks, 250) for ranks in (64, 256, 1024))
    per_rank = (middle.cpu_s - small.cpu_s) / (256 - 64), (large.cpu_s - middle.cpu_s) / (1024 - 256)
    assert per_rank[1] < 1.5 * max(per_rank[0], 0.5e-3), per_rank
    assert large.peak_bytes - small.peak_bytes < 50e6  # their records are 17 MB as text, 25 MB as numbers
    assert large.cpu_s < 10


@pytest.mark.slow
def test_four_thousand_ranks_of_a_thousand_steps_in_ten_seconds(tmp_path: Path) -> None:
    cost = report_of(tmp_path, 4096, 1000)
    assert cost.cpu_s < 10  # and so it takes less on two cores that nobody else uses
    assert cost.peak_bytes < 2e9
