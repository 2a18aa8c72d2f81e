"""A signal to one rank while MPI starts ends all ranks at once, whatever the moment."""

import os
import signal
import socket
from pathlib import Path
from time import monotonic, sleep

import pytest

from tests.faults.harness import Job

# What a rank has mapped into memory when it is signalled, in order. The ranks meet in MPI_Init between the first and
# the third.
MOMENTS = {
    "MPI's library is loaded": "/libmpi.so",
    "MPI looks for its parts": "/mca_",
    "MPI talks within the host": "/mca_btl_",
    "MPI has chosen its collectives": "/mca_coll_",
    "torch is being loaded": "/libtorch",
}


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(each) for task in tasks for each in (task / "children").read_text().split()]


def rank_of(pid: int) -> str | None:
    words = dict(each.partition("=")[::2] for each in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    return words.get("OMPI_COMM_WORLD_RANK")


def signal_at(job: Job, rank: int, mapped: str, number: signal.Signals) -> None:
    """Signals `rank` as soon as it has mapped a file whose path contains `mapped`."""
    end = monotonic() + 60
    victim = None
    while job.process.poll() is None:
        assert monotonic() < end, "waited in vain"
        try:
            victim = victim or next((pid for pid in children(job.process.pid) if rank_of(pid) == str(rank)), None)
            if victim and mapped in Path(f"/proc/{victim}/maps").read_text():
                os.kill(victim, number)
                return
        except (OSError, ProcessLookupError):
            victim = None  # between fork and exec
        sleep(0.0005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("moment", "victim"),
    [
        ("MPI's library is loaded", 1),
        ("MPI looks for its parts", 0),
        ("MPI has chosen its collectives", 1),
        *(pytest.param(moment, rank, marks=pytest.mark.thorough) for moment in MOMENTS for rank in (0, 1)),
    ],
)
def test_a_signal_to_one_rank_at_start_ends_all(
    moment: str, victim: int, number: signal.Signals, tmp_path: Path, digits: Path
) -> None:
    job = Job(2, tmp_path, digits, cold=True)
    signal_at(job, victim, MOMENTS[moment], number)
    signalled_s = monotonic()
    ended = job.end(timeout_s=60)
    took_s = monotonic() - signalled_s
    assert ended.code not in (0, 75) and took_s < 30, (ended, took_s)
    assert f"hpc-train: rank {victim} on {socket.gethostname()}: interrupted" in ended.err, ended.err
    assert "Traceback" not in ended.err


def test_a_request_to_stop_that_comes_at_start_is_answered_after_the_first_step(tmp_path: Path, digits: Path) -> None:
    job = Job(2, tmp_path, digits, cold=True)
    signal_at(job, 1, MOMENTS["MPI's library is loaded"], signal.SIGUSR2)
    ended = job.end()
    assert ended.code == 75 and "after step 0. Saved" in ended.out, ended
