"""A rank that dies, exits or hangs ends the job, which names the rank; the run resumes from its checkpoint."""

import os
import re
import signal
import socket
from pathlib import Path
from time import monotonic, sleep

import pytest

from tests import jobs
from tests.conftest import FaultTable
from tests.faults.conftest import Reference
from tests.faults.harness import Job, assert_continuous

HOST = socket.gethostname()


def last_words(ended: jobs.Ended) -> str:
    return [line for line in ended.err.splitlines() if line.startswith("hpc-train:")][-1]


def resume(job: Job, digits: Path, reference: Reference) -> tuple[float, int]:
    """Resumes after a fault; returns (seconds until it trains again, steps trained twice)."""
    reached = job.num_traced()
    again = Job(job.ranks, job.root, digits, "--resume", "auto")
    ended = again.end()
    assert ended.code == 0, ended
    assert_continuous(again, reference(job.ranks))
    return again.seconds_to_first_step(), reached - again.meta()["attempts"][-1]["first_step"]


@pytest.mark.parametrize(("ranks", "victim"), [(2, 0), pytest.param(3, 1, marks=pytest.mark.thorough)])
def test_a_killed_rank_ends_the_job_at_once_and_is_named(
    ranks: int, victim: int, tmp_path: Path, digits: Path, reference: Reference, survived: FaultTable
) -> None:
    job = Job(ranks, tmp_path, digits, TRACE_DELAY="0.2").wait_for_step(7).wait_for_checkpoint(5)
    os.kill(job.pid(victim), signal.SIGKILL)
    killed_s = monotonic()
    ended = job.end()
    took_s = monotonic() - killed_s
    assert ended.code not in (0, 75) and took_s < 10
    assert f"rank {victim} on {HOST} has died" in last_words(ended), ended.err
    assert f"where rank {victim} was" in ended.err, "its stack"
    assert job.newest() == 5 and job.run.lock.exists()
    recover_s, lost = resume(job, digits, reference)
    assert 1 <= lost <= 4
    survived(f"rank {victim} of {ranks} killed", f"named, job ended in {took_s:.1f} s", recover_s, lost)


@pytest.mark.parametrize("accident", ["exit:8:1", pytest.param("hard-exit:8:2", marks=pytest.mark.thorough)])
def test_a_rank_that_exits_ends_the_job(accident: str, tmp_path: Path, digits: Path, survived: FaultTable) -> None:
    job = Job(3, tmp_path, digits, ACCIDENT=accident)
    job.wait_for_step(9) if job.num_traced() < 9 else None
    left_s = monotonic()
    ended = job.end()
    took_s = monotonic() - left_s
    assert ended.code not in (0, 75) and took_s < 10, ended
    assert f"rank {accident[-1]} on {HOST}" in last_words(ended), ended.err
    call = "sys.exit(0)" if accident.startswith("exit") else "os._exit(5)"
    survived(f"{call} on one rank", f"named, job ended in {took_s:.1f} s")


@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_stopped_rank_is_named_with_its_stack(
    victim: int, tmp_path: Path, digits: Path, reference: Reference, survived: FaultTable
) -> None:
    stall_s = 4
    job = Job(3, tmp_path, digits, "--set", f"run.stall_s={stall_s}", TRACE_DELAY="0.2").wait_for_step(8)
    sleep(1.1)  # so that its last heartbeat comes from the loop
    os.kill(job.pid(victim), signal.SIGSTOP)
    stopped_s = monotonic()
    ended = job.end()
    took_s = monotonic() - stopped_s
    assert ended.code not in (0, 75) and took_s < stall_s + 10
    assert re.search(rf"rank {victim} on {HOST} is late: no heartbeat for \d+ s$", last_words(ended)), ended.err
    assert f"where rank {victim} was" in ended.err and "loop.py" in ended.err, "its stack"
    recover_s, lost = resume(job, digits, reference)
    what = f"named with its stack, job ended in {took_s:.1f} s (run.stall_s = {stall_s})"
    survived(f"rank {victim} of 3 stopped (SIGSTOP)", what, recover_s, lost)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_is_named_while_others_wait_for_its_weights(
    how: signal.Signals, tmp_path: Path, digits: Path, survived: FaultTable
) -> None:
    """At stage 3 ranks wait for one another inside of their forward and backward passes."""
    stage = [word for key in ("run.stall_s=4", "reduce.strategy=sharded", "reduce.stage=3") for word in ("--set", key)]
    job = Job(3, tmp_path, digits, *stage, TRACE_DELAY="0.2").wait_for_step(8)
    sleep(1.1)
    os.kill(job.pid(1), how)
    stopped_s = monotonic()
    ended = job.end()
    took_s = monotonic() - stopped_s
    assert ended.code not in (0, 75) and took_s < 14
    assert f"rank 1 on {HOST} {'is late' if how == signal.SIGSTOP else 'has died'}" in last_words(ended), ended.err
    survived(f"a rank at stage 3 met {how.name}", f"named, job ended in {took_s:.1f} s")


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.thorough)])
def test_a_rank_that_hangs_is_named_with_its_stack(
    victim: int, tmp_path: Path, digits: Path, reference: Reference, survived: FaultTable
) -> None:
    """It waits for something local, such as a file that never appears, and its process still responds."""
    stall_s = 3
    job = Job(2, tmp_path, digits, "--set", f"run.stall_s={stall_s}", ACCIDENT=f"stuck:8:{victim}")
    job.wait_for_step(9 if victim == 0 else 8)
    stuck_s = monotonic()
    ended = job.end()
    took_s = monotonic() - stuck_s
    assert ended.code not in (0, 75) and took_s < stall_s + 10
    assert re.search(rf"rank {victim} on {HOST} is late: (at step 8|no step has ended) for ", last_words(ended)), ended
    assert "traced.py" in ended.err.partition(f"where rank {victim} was")[2].splitlines()[1], ended.err
    recover_s, lost = resume(job, digits, reference)
    what = f"named with where it stands, job ended in {took_s:.1f} s (run.stall_s = {stall_s})"
    survived(f"rank {victim} of 2 lives and does not go on", what, recover_s, lost)


@pytest.mark.parametrize("words", [("data.read=collective",), ("reduce.strategy=mpi",)])
def test_ranks_that_wait_for_others_are_not_called_late(words: tuple[str, ...], tmp_path: Path, digits: Path) -> None:
    """In a collective read and in MPI's sums. The late rank is the last one that the watchdog checks."""
    settings = [word for key in ("run.stall_s=3", *words) for word in ("--set", key)]
    ended = Job(3, tmp_path, digits, *settings, ACCIDENT="stuck:8:2").end()
    assert ended.code not in (0, 75)
    assert re.search(rf"rank 2 on {HOST} is late: at step 8 for ", last_words(ended)), ended


def test_a_rank_that_is_stopped_after_the_last_step_is_named(
    tmp_path: Path, digits: Path, reference: Reference
) -> None:
    """No step ends during the test after training, and the job must not wait forever."""
    stall_s = 3
    job = Job(2, tmp_path, digits, "--set", f"run.stall_s={stall_s}", ACCIDENT="stopped-in-test:23:1")
    ended = job.end(timeout_s=stall_s + 40)
    assert ended.code not in (0, 75)
    assert re.search(rf"rank 1 on {HOST} is late: no heartbeat for \d+ s$", last_words(ended)), ended.err
    again = Job(2, tmp_path, digits, "--resume", "auto")
    assert again.end().code == 0
    assert_continuous(again, reference(2))


@pytest.mark.thorough
def test_a_rank_that_is_stopped_for_a_moment_is_waited_for(
    tmp_path: Path, digits: Path, reference: Reference, survived: FaultTable
) -> None:
    job = Job(2, tmp_path, digits, "--set", "run.stall_s=20").wait_for_step(3)
    pid = job.pid(1)
    os.kill(pid, signal.SIGSTOP)
    sleep(3)
    os.kill(pid, signal.SIGCONT)
    ended = job.end()
    assert ended.code == 0, ended
    assert_continuous(job, reference(2))
    survived("rank 1 stopped for 3 s, then continued", "the others wait; the run continues", 3.0, 0)


def test_sigterm_to_one_rank_stops_them_all_in_the_same_step(
    tmp_path: Path, digits: Path, reference: Reference, survived: FaultTable
) -> None:
    job = Job(3, tmp_path, digits, TRACE_DELAY="0.1").wait_for_step(6)
    os.kill(job.pid(2), signal.SIGTERM)
    ended = job.end()
    assert ended.code == 75 and "Stopped by a signal to another rank" in ended.out, ended
    assert not job.run.lock.exists() and not job.run.summary.exists()
    recover_s, lost = resume(job, digits, reference)
    assert lost == 0
    survived("SIGTERM to one rank", "all stop after the same step, checkpoint, exit code 75", recover_s, lost)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.thorough)])
def test_ctrl_c_or_sigterm_straight_to_mpirun_leaves_a_valid_checkpoint(
    number: signal.Signals, tmp_path: Path, digits: Path, reference: Reference, survived: FaultTable
) -> None:
    """mpirun sends SIGTERM and kills a second later: enough for a small model, and an older checkpoint stays valid.

    mpirun ends with 1 whatever the ranks end with. It passes SIGUSR2 on (tests/faults/test_resume.py).
    """
    job = Job(2, tmp_path, digits, TRACE_DELAY="0.1").wait_for_step(8)
    ended = job.signal(number).end()
    assert ended.code == 1
    if "Stopped by" in ended.out:
        assert (
            "Stopped by SIGTERM (which mpirun sends after Ctrl-C, too, and itself ends with 1) after step" in ended.out
        )
    recover_s, lost = resume(job, digits, reference)
    assert 0 <= lost <= 4
    survived(f"{number.name} to mpirun", "valid newest checkpoint", recover_s, lost)


def test_ctrl_c_on_one_process_saves_and_a_second_one_ends_it_at_once(tmp_path: Path, digits: Path) -> None:
    job = Job(0, tmp_path, digits, TRACE_DELAY="0.2").wait_for_step(2)
    once = job.signal(signal.SIGINT).end()
    assert once.code == 75 and "Stopped by SIGINT" in once.out
    job = Job(0, tmp_path, digits, "--resume", "auto", TRACE_DELAY="3").wait_for_step(1)
    job.signal(signal.SIGINT)
    sleep(0.3)
    twice = job.signal(signal.SIGINT).end()
    assert twice.code == 130 and not job.run.lock.exists()
