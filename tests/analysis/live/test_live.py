"""`hpc-train watch` and `runs` beside a job that trains, is stopped, is killed and completes."""

import json
import os
import shutil
import signal
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from hpc_train.analysis.live import status
from hpc_train.analysis.live.screen import record, screen
from hpc_train.analysis.live.status import read_status
from hpc_train.analysis.live.tails import last_losses, last_timings
from hpc_train.cli.main import cli
from hpc_train.core.energy_records import COUNTED_NOTHING, Energy
from hpc_train.core.rundir import RunDir, find
from hpc_train.core.timing_log import read_timings
from tests import jobs
from tests.faults.harness import STEPS, Job, until

RECORDED = jobs.ROOT / "tests/runs/mlp-two-hosts"


def run(*words: object) -> str:
    ended = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.output


def watched(folder: Path) -> dict[str, Any]:
    return json.loads(run("watch", folder, "--once", "--json"))


def test_what_is_not_known_in_the_first_second_is_not_yet() -> None:
    nothing = Energy(source=f"estimate: 10 W x 2 cores a node {COUNTED_NOTHING}")
    status = replace(read_status(find([RECORDED])[0]), state="training", energy=nothing, validation={"step": 34.0})
    shown = Console(file=StringIO(), width=100)
    shown.print(screen(status, 100, False))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "not yet" in text and "missing" not in text, text
    assert json.dumps(record(status)["validation"]) == '{"step": 34}'


def test_a_job_is_followed_from_its_first_step_to_its_end(tmp_path: Path, digits: Path) -> None:
    job = (
        Job(2, tmp_path, digits, "--set", "train.log_every=1", TRACE_DELAY="0.2")
        .wait_for_step(7)
        .wait_for_checkpoint(5)
    )
    early = until(lambda: (seen := watched(tmp_path))["steps_done"] >= 6 and seen)
    assert early["state"] == "training" and early["steps"] == STEPS and early["ranks"] == 2
    assert (
        early["checkpoints"][-1] >= 5
        and early["loss"] > 0
        and early["left_s"] > 0
        and early["updated_s"] < 60
        and early["step_s"] > 0
    )
    until(lambda: watched(tmp_path)["steps_done"] > early["steps_done"])
    os.kill(job.pid(1), signal.SIGKILL)
    job.end()
    # mpirun may end a little before the rank that holds the lock does.
    killed = until(lambda: (seen := watched(tmp_path))["state"] == "killed" and seen)
    assert "ended without a word" in killed["why"] and killed["left_s"] is None

    again = Job(2, tmp_path, digits, "--resume", "auto", TRACE_DELAY="0.2")
    until(lambda: (seen := watched(tmp_path))["state"] == "training" and seen["attempts"] == 2 and seen["step_s"])
    again.signal(signal.SIGTERM).end()
    stopped = watched(tmp_path)
    assert stopped["state"] == "stopped" and stopped["why"].startswith("stopped by SIG"), stopped
    assert stopped["checkpoints"][-1] == stopped["steps_done"] < STEPS

    assert Job(2, tmp_path, digits, "--resume", "auto").end().code == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    (listed,) = json.loads(run("runs", tmp_path, "--json"))
    assert listed["state"] == "complete" and listed["steps_done"] == STEPS and listed["attempts"] == 3
    shown = run("watch", tmp_path)
    assert "complete" in shown and f"{STEPS}/{STEPS}, started 3 times" in shown and "100%" in shown
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, "watching touches nothing"


def test_a_run_of_two_hosts_is_read_as_it_was_recorded() -> None:
    (seen,) = json.loads(run("runs", RECORDED, "--json"))
    (path,) = RECORDED.glob("*/summary.json")
    summary = json.loads(path.read_text())
    assert seen["step_s"] == pytest.approx(summary["step_s"], rel=1e-6), "all of its steps are in the tail"
    assert seen["samples_per_s"] == pytest.approx(summary["samples_per_s"], rel=1e-6)
    assert seen["exposed_communication"] == pytest.approx(summary["phase_share"]["reduce"], rel=1e-3)
    assert (seen["joules"], seen["energy_quality"]) == (summary["joules"], summary["energy_quality"])
    assert (seen["hosts"], seen["slurm_job"], seen["slowest_host"]) == (2, "1", "n1")
    assert "rank 1 on n1: 5.4% above the mean" in run("watch", RECORDED, "--once")


def test_the_end_of_a_long_log_is_read_as_the_whole_is(tmp_path: Path) -> None:
    (source,) = RECORDED.glob("*/timings/rank-00000.csv")
    header, *lines = source.read_text().splitlines()
    cells = [line.split(",") for line in lines]
    many = [",".join([str(number), *cells[number % len(cells)][1:]]) for number in range(5000)]
    long = tmp_path / "rank-00000.csv"
    long.write_text("\n".join([header, *many, "5000,17"]))  # the last line is not finished
    tail, whole = last_timings(long), read_timings(long)
    num = len(tail["step"])
    assert 100 < num < 5000 and all((tail[name] == whole[name][-num:]).all() for name in tail)
    (tmp_path / "metrics.csv").write_text("step,loss\n0,2.5\n1,x\n2,1.5\n3,1")
    assert last_losses(tmp_path / "metrics.csv") == [(0, 2.5), (2, 1.5)]
    assert last_losses(tmp_path / "none.csv") == [] and not len(last_timings(tmp_path / "none.csv")["step"])


def test_a_lock_that_nobody_renews_is_told(tmp_path: Path) -> None:
    """On another machine the process cannot be looked up: the age of its last sign is what there is."""
    (recorded,) = RECORDED.glob("*-np4*")
    here = tmp_path / recorded.name
    shutil.copytree(recorded, here)
    (here / "summary.json").unlink()
    (here / "lock").write_text(json.dumps({"token": "t", "host": "n7", "pid": 5, "system": "other", "job": "12"}))
    os.utime(here / "lock", (0, 0))
    found = read_status(RunDir(here))
    assert found.state == "silent" and "no sign of Slurm job 12, process 5 on n7" in (found.why or "")
    os.utime(here / "lock")
    assert read_status(RunDir(here)).state == "training"


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    ended = jobs.run(0, "watch", tmp_path, cwd=tmp_path)
    assert ended.code == 2 and "holds no run directory" in ended.err


def test_more_readings_than_a_look_can_read_are_left_to_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    (recorded,) = RECORDED.glob("*-np4*")
    assert read_status(RunDir(recorded)).energy.joules == 768
    monkeypatch.setattr(status, "_MOST_ENERGY_BYTES", 10)
    energy = read_status(RunDir(recorded)).energy
    assert energy.joules is None and energy.quality == "missing" and "hpc-train report" in energy.source
