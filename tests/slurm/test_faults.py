"""Faults under Slurm: every step is taken once, and the weights equal those of an undisturbed run."""

import csv
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, time
from typing import Any, NamedTuple

import pytest
import torch

from hpc_train.core.timing_log import read_timings
from tests import checkpoints, jobs
from tests.conftest import FaultTable
from tests.slurm.slurm import Cluster, until

STEPS = 400
EVERY = 50  # steps between checkpoints
RANK = "grep -lsxz 'trai[n]' /proc/[0-9]*/cmdline | cut -d/ -f3"  # its process; the brackets exclude this grep itself
SLOW = "6mbit"  # each step sends 42 KB over each of three links: some 60 ms a step, which leaves time for faults
SLOWER = "2mbit"  # and some 180 ms: trains for longer than a minute


def submit(cluster: Cluster, digits: Path, folder: Path, *words: object, **keys: object) -> int:
    """Submits a job of three ranks on three of the four nodes, from this folder."""
    mine = {"data__file": digits, "train__steps": STEPS, "train__log_every": 1, "run__root": folder / "runs"}
    sets = jobs.settings(**{**mine, "checkpoint__every_steps": EVERY, **keys})
    script, config = jobs.ROOT / "slurm/train.sbatch", jobs.CONFIGS / "softmax-mnist.toml"
    return cluster.sbatch("--nodes=3", "--output=%j.out", *words, script, config, *sets, cwd=folder)


def losses(folder: Path) -> list[tuple[int, str]]:
    """(step, loss as written) of the only run in a folder."""
    (path,) = folder.glob("runs/*/*/metrics.csv")
    with path.open() as file:
        return [(int(row["step"]), row["loss"]) for row in csv.DictReader(file)]


def attempts(folder: Path) -> list[dict[str, Any]]:
    """The attempts in meta.json of the only run in a folder."""
    (path,) = folder.glob("runs/*/*/meta.json")
    return json.loads(path.read_text())["attempts"]


def in_the_middle(folder: Path) -> bool:
    """Whether the run has a checkpoint and some steps after it."""
    return bool(list(folder.glob("runs/*/*/checkpoints/step-*"))) and losses(folder)[-1][0] > EVERY + 10


@pytest.fixture(scope="module")
def quiet(cluster: Cluster, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("quiet")
    job = submit(cluster, digits, folder)
    cluster.ends(job, "COMPLETED", timeout_s=120)
    return folder


def run_slowly(cluster: Cluster, digits: Path, folder: Path, *words: object, rate: str = SLOW) -> int:
    """Submits a job over links of this rate, and waits until it is in the middle of its training."""
    cluster.shape(rate)
    job = submit(cluster, digits, folder, *words)
    until(lambda: in_the_middle(folder) or cluster.state(job) == "FAILED", "the middle of the training", 180)
    assert cluster.state(job) != "FAILED", cluster.output(job)
    return job


class Recovery(NamedTuple):
    """The cost of a fault: seconds until the next step, and steps taken twice."""

    seconds: float
    steps_lost: int


def ends_as_quiet(
    cluster: Cluster, job: int, folder: Path, quiet: Path, fault_at_s: float, *accounted: str
) -> Recovery:
    """Waits for the end, and compares final states, step numbers, losses and weights bit for bit."""
    cluster.shape(None)
    cluster.ends(job, *accounted, "COMPLETED", timeout_s=120)
    assert [step for step, _ in losses(quiet)] == list(range(STEPS))
    assert losses(folder) == losses(quiet)
    ours, theirs = (weights(each) for each in (folder, quiet))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    began_s = moment(attempts(folder)[-1]["started"])
    (path,) = folder.glob("runs/*/*/timings/rank-00000.csv")
    timings = read_timings(path)
    last = timings["step"][timings["attempt"] == timings["attempt"][-1] - 1][-1]
    return Recovery(began_s - fault_at_s, int(last) + 1 - int(attempts(folder)[-1]["first_step"]))


def moment(written: str) -> float:
    """Seconds since 1970 of a time in meta.json."""
    return datetime.strptime(written, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob(f"runs/*/*/checkpoints/step-{STEPS:08d}.h5")
    return checkpoints.weights(path)


def test_time_limit(cluster: Cluster, digits: Path, tmp_path: Path, quiet: Path, survived: FaultTable) -> None:
    """The signal before the time limit leads to a checkpoint and a requeue, and the job completes."""
    job = run_slowly(cluster, digits, tmp_path, "--time=20", "--signal=USR2@90", rate=SLOWER)
    # The limit is set once the job trains: a busy machine may take a minute from the start of the job to its first
    # step. The signal comes when the controller next looks, within 30 s, and the end not before 45 s.
    cluster.limit(job, minutes=math.ceil((cluster.running_s(job) + 45) / 60))
    until(lambda: "requeued" in cluster.output(job), "the signal", 60)
    until(lambda: int(cluster.show(job)["Restarts"]) >= 1, "back in the queue", 60)
    cluster.limit(job, minutes=20)
    stopped_at_s = moment(
        attempts(tmp_path)[0]["ended"]
    )  # as recorded by the run: on a busy machine the output is late
    cost = ends_as_quiet(cluster, job, tmp_path, quiet, stopped_at_s, "REQUEUED")
    assert cost.steps_lost == 0
    survived("Slurm: time limit with --signal=USR2", "checkpoint, requeued, continued: REQUEUED, COMPLETED", *cost)


def test_preemption(cluster: Cluster, digits: Path, tmp_path: Path, quiet: Path, survived: FaultTable) -> None:
    """An urgent job takes all nodes; the job saves a checkpoint in its grace time, and resumes from there."""
    job = run_slowly(cluster, digits, tmp_path)
    taken_at_s = time()
    urgent = cluster.sbatch("-p", "urgent", "--nodes=4", "--exclusive", "--wrap=sleep 1", cwd=tmp_path)
    cluster.wait(urgent, "COMPLETED", timeout_s=30)
    assert cluster.show(job)["Restarts"] == "1"
    cost = ends_as_quiet(cluster, job, tmp_path, quiet, taken_at_s, "REQUEUED")
    assert cost.steps_lost == 0
    survived("Slurm: pre-emption", "checkpoint in the grace time, requeued: REQUEUED, COMPLETED", *cost)


def test_node_crash(cluster: Cluster, digits: Path, tmp_path: Path, quiet: Path, survived: FaultTable) -> None:
    """Slurm requeues the job with the spare node; it loses the steps since its last checkpoint."""
    job = run_slowly(cluster, digits, tmp_path)
    crashed_at_s = time()
    cluster.crash("n2")
    until(lambda: cluster.show(job)["Restarts"] == "1", "back in the queue", 60)
    cost = ends_as_quiet(cluster, job, tmp_path, quiet, crashed_at_s, "NODE_FAIL")
    assert "n2" not in json.dumps(attempts(tmp_path)[-1]) and cost.steps_lost <= EVERY + 50
    survived("Slurm: a node crashes", "requeued on a spare node: NODE_FAIL, COMPLETED", *cost)


@pytest.mark.thorough
def test_lost_link(cluster: Cluster, digits: Path, tmp_path: Path, quiet: Path, survived: FaultTable) -> None:
    """A node that cannot be reached counts as crashed."""
    job = run_slowly(cluster, digits, tmp_path)
    lost_at_s = time()
    cluster.link("n2", up=False)
    until(lambda: cluster.show(job)["Restarts"] == "1", "back in the queue", 60)
    cost = ends_as_quiet(cluster, job, tmp_path, quiet, lost_at_s, "NODE_FAIL")
    survived("Slurm: a node loses its link", "requeued on a spare node: NODE_FAIL, COMPLETED", *cost)


def test_cancelled_stays_cancelled(
    cluster: Cluster, digits: Path, tmp_path: Path, quiet: Path, survived: FaultTable
) -> None:
    """scancel ends a job for good, with a checkpoint; submitting it again resumes from there."""
    job = run_slowly(cluster, digits, tmp_path)
    cluster.shape(None)  # else a step may last as long as Slurm's KillWait here, 3 s
    cluster.cancel(job)
    cluster.wait(job, "CANCELLED", timeout_s=30)
    submitted_at_s = time()
    again = submit(cluster, digits, tmp_path)
    cost = ends_as_quiet(cluster, again, tmp_path, quiet, submitted_at_s)
    assert cluster.state(job) == "CANCELLED" and cluster.accounted(job) == ["CANCELLED"] and cost.steps_lost == 0
    survived("Slurm: scancel", "checkpoint, CANCELLED for good; the same command continues", *cost)


def test_killed_rank(cluster: Cluster, digits: Path, tmp_path: Path, quiet: Path, survived: FaultTable) -> None:
    """The job fails within 10 s and names the host; submitting it again resumes from the last checkpoint."""
    job = run_slowly(cluster, digits, tmp_path)
    cluster.on("n3", "sh", "-c", f"kill -KILL $({RANK})")
    cluster.wait(job, "FAILED", timeout_s=10)
    assert "n3" in cluster.output(job)
    submitted_at_s = time()
    again = submit(cluster, digits, tmp_path)
    cost = ends_as_quiet(cluster, again, tmp_path, quiet, submitted_at_s)
    survived("Slurm: a rank killed", "FAILED within 10 s, rank and host named; the same command continues", *cost)


@pytest.mark.thorough
def test_stopped_rank(cluster: Cluster, digits: Path, tmp_path: Path, survived: FaultTable) -> None:
    """The job names a stopped rank and its host after run.stall_s."""
    cluster.shape(SLOW)
    job = submit(cluster, digits, tmp_path, run__stall_s=6)
    until(lambda: in_the_middle(tmp_path), "the middle of the training", 180)
    cluster.on("n2", "sh", "-c", f"kill -STOP $({RANK})")
    stopped_s = monotonic()
    cluster.wait(job, "FAILED", timeout_s=30)
    assert "on n2 is late: no heartbeat for" in cluster.output(job) and "loop.py" in cluster.output(job)
    survived("Slurm: a rank stopped", f"FAILED, named with its stack, {monotonic() - stopped_s:.0f} s (stall_s = 6)")


@pytest.mark.parametrize("how", ["KILL", "STOP"])
def test_second_rank_of_a_node(how: str, cluster: Cluster, digits: Path, tmp_path: Path, survived: FaultTable) -> None:
    """It has no connection to the root: the first rank of its node sees it die, and tells the root of its silence."""
    cluster.shape(SLOW)
    job = submit(cluster, digits, tmp_path, "--nodes=2", "--ntasks-per-node=2", run__stall_s=6)
    until(lambda: in_the_middle(tmp_path), "the middle of the training", 180)
    second = f"for pid in $({RANK}); do grep -qz '^SLURM_LOCALID=1' /proc/$pid/environ && kill -{how} $pid; done"
    cluster.on("n2", "sh", "-c", second, check=False)
    ended_s = monotonic()
    cluster.wait(job, "FAILED", timeout_s=30)
    said = "is late: no heartbeat for" if how == "STOP" else "has died: its connection broke"
    assert f"rank 3 on n2 {said}" in cluster.output(job) and "loop.py" in cluster.output(job)
    survived(f"Slurm: the second rank of a node met SIG{how}", f"FAILED, named, {monotonic() - ended_s:.0f} s")


@pytest.mark.thorough
def test_second_job(cluster: Cluster, digits: Path, tmp_path: Path, survived: FaultTable) -> None:
    """The same job twice at the same time: a lock, whose holder is on another node, refuses the second."""
    first = run_slowly(cluster, digits, tmp_path)
    second = submit(cluster, digits, tmp_path)
    cluster.wait(second, "FAILED", timeout_s=60)
    assert f"is in use by Slurm job {first}, process" in cluster.output(second)
    assert cluster.state(first) == "RUNNING" and len(attempts(tmp_path)) == 1
    cluster.cancel(first)
    survived("Slurm: the same job submitted twice", "the second FAILED, naming the first, which continues")
