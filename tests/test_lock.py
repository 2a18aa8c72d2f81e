"""The lock of a run directory, with real processes as its holders."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import pytest

from hpc_train import lock
from hpc_train.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from hpc_train import lock
with lock.held(Path(sys.argv[1]), print, beat_s=0.1):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_a_second_holder_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = hold(path)
    try:
        with pytest.raises(UserError, match=rf"in use by process {first.pid} on"), lock.held(path, print):
            pass
    finally:
        first.kill()
        first.wait()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = hold(path)
    first.send_signal(signal.SIGKILL)
    first.wait()
    said: list[str] = []
    began_s = monotonic()
    with lock.held(path, said.append):
        assert monotonic() - began_s < 2
        assert json.loads(path.read_text())["pid"] != first.pid
    assert not path.exists() and "took over from process" in said[0]
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_elsewhere_a_lock_that_moves_is_alive_and_one_that_stands_still_is_dead(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(
        json.dumps({"token": "t", "pid": 1, "host": "n7", "system": "another machine", "job": "17", "beat": 0})
    )
    moving = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import json, sys, time, pathlib\n"
            "path = pathlib.Path(sys.argv[1])\n"
            "for beat in range(1, 300):\n"
            "    other = path.with_name('new')\n"
            "    other.write_text(json.dumps(json.loads(path.read_text()) | {'beat': beat}))\n"
            "    other.rename(path)\n    time.sleep(0.1)\n",
            str(path),
        ]
    )
    said: list[str] = []
    try:
        with pytest.raises(UserError, match="Slurm job 17, process 1 on n7"), lock.held(path, said.append, beat_s=0.5):
            pass
    finally:
        moving.kill()
        moving.wait()
    assert "looking for 2 s" in said[0]
    began_s = monotonic()
    with lock.held(path, said.append, beat_s=0.25):
        assert 0.9 < monotonic() - began_s < 5
    assert "took over from Slurm job 17" in said[-1]


def test_the_same_job_started_again_does_not_wait_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    path.write_text(
        json.dumps({"token": "t", "pid": 1, "host": "n7", "system": "another machine", "job": "17", "restart": "0"})
    )
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    began_s = monotonic()
    with lock.held(path, print):
        assert monotonic() - began_s < 1


def test_a_holder_keeps_beating_and_leaves_anothers_lock_alone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lock.held(path, print, beat_s=0.05):
        sleep(0.3)
        assert json.loads(path.read_text())["beat"] >= 2
    path.write_text("no lock")
    with pytest.raises(UserError, match="is no lock of hpc-train"), lock.held(path, print):
        pass
