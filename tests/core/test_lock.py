"""The lock of a run directory, with real processes as its holders."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Timer
from time import monotonic, sleep

import pytest

from hpc_train.core import lock
from hpc_train.core.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from hpc_train.core import lock
with lock.hold(Path(sys.argv[1]), print, beat_s=0.1):
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
        with pytest.raises(UserError, match=rf"in use by process {first.pid} on"), lock.hold(path, print):
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
    with lock.hold(path, said.append):
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
        with pytest.raises(UserError, match="Slurm job 17, process 1 on n7"), lock.hold(path, said.append, beat_s=0.5):
            pass
    finally:
        moving.kill()
        moving.wait()
    assert "looking for 2 s" in said[0]
    began_s = monotonic()
    with lock.hold(path, said.append, beat_s=0.25):
        assert 0.9 < monotonic() - began_s < 5
    assert "took over from Slurm job 17" in said[-1]


def test_the_same_job_started_again_takes_over_only_from_what_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm counts the restart up although the old node may live, behind a network that is down."""
    path = tmp_path / "lock"
    path.write_text(
        json.dumps({"token": "t", "pid": 1, "host": "n7", "system": "another machine", "job": "17", "restart": "0"})
    )
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    began_s = monotonic()
    with lock.hold(path, print, beat_s=0.2):
        assert monotonic() - began_s >= 0.8


# On another machine as far as the lock can tell: it does not know this process's table of processes.
ELSEWHERE = """
import sys, time
from pathlib import Path
from hpc_train.core import lock
from hpc_train.core.errors import UserError
lock._system = lambda: "another machine"
with lock.hold(Path(sys.argv[1]), print, beat_s=0.1) as lease:
    print("held", flush=True)
    try:
        while True:
            lease.check()
            time.sleep(0.01)
    except UserError as error:
        print("lost", lease.is_lost, error, flush=True)
    time.sleep(0.5)
"""


def test_a_holder_that_was_stopped_learns_that_its_lock_was_taken_and_leaves_the_new_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = subprocess.Popen([sys.executable, "-c", ELSEWHERE, str(path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout and first.stdout.readline() == "held\n"
    first.send_signal(signal.SIGSTOP)
    said: list[str] = []
    try:
        with lock.hold(path, said.append, beat_s=0.1) as lease:
            assert "took over from" in said[-1]
            first.send_signal(signal.SIGCONT)
            told = first.communicate(timeout=20)[0]
            assert "lost True" in told and f"process {os.getpid()}" in told and "has taken it over" in told
            lease.confirm()
    finally:
        first.kill()
        first.wait()
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_beats_that_come_late_are_seen_by_who_waits(tmp_path: Path) -> None:
    """A holder that wakes within the patience, with a beat, keeps its lock."""
    path = tmp_path / "lock"
    first = subprocess.Popen([sys.executable, "-c", ELSEWHERE, str(path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout and first.stdout.readline() == "held\n"
    first.send_signal(signal.SIGSTOP)
    waker = Timer(0.6, first.send_signal, [signal.SIGCONT])
    waker.start()
    try:
        with pytest.raises(UserError, match="is in use by"), lock.hold(path, print, beat_s=1):
            pass
    finally:
        waker.cancel()
        first.kill()
        first.wait()


def test_a_lock_that_was_removed_is_lost_and_others_of_the_job_learn_it_after_a_long_step(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lock.hold(path, print) as lease:
        other_rank = lock.Lease(path, lease.token, beat_s=0.05)
        path.unlink()
        other_rank.check()
        sleep(0.2)
        for each in (other_rank, lease):
            with pytest.raises(UserError, match="its lock was removed"):
                each.check() if each is other_rank else each.confirm()
            assert each.is_lost


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"token": 7}', b"[" * 100_000, b'{"pid": "x"}', None])
def test_a_damaged_lock_is_one_message(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "lock"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)) as refused, lock.hold(path, print):
        pass
    assert "remove the file lock" in refused.value.remedy


@pytest.mark.parametrize("entry", [{"pid": "x"}, {"pid": None, "process": []}, {"host": 7}, {}])
def test_a_lock_with_damaged_entries_is_one_that_stands_still(tmp_path: Path, entry: dict[str, object]) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps({"token": "t", "system": lock._system(), **entry}))
    with lock.hold(path, print, beat_s=0.05):
        pass


def test_a_holder_keeps_beating_and_leaves_anothers_lock_alone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lock.hold(path, print, beat_s=0.05):
        sleep(0.3)
        assert json.loads(path.read_text())["beat"] >= 2
    path.write_text("no lock")
    with pytest.raises(UserError, match="is no lock of hpc-train"), lock.hold(path, print):
        pass
