"""What Slurm does to jobs, and that no job loses more than it may: every step once, and the weights of a quiet run."""

import csv
import json
from pathlib import Path

import pytest

from tests import jobs
from tests.cluster.slurm import Cluster, until

STEPS = 400
EVERY = 50  # steps between checkpoints
SLOW = "6mbit"  # each step sends 42 KB over each of three links: some 60 ms a step, which leaves time for faults


def submit(cluster: Cluster, digits: Path, folder: Path, *words: object, **keys: object) -> int:
    """A job of three ranks on three of the four nodes; the folder is its checkout."""
    mine = {"data__file": digits, "train__steps": STEPS, "train__log_every": 1, "run__root": folder / "runs"}
    sets = jobs.settings(**mine, checkpoint__every_steps=EVERY, **keys)
    script, config = jobs.ROOT / "slurm/train.sbatch", jobs.CONFIGS / "softmax-mnist.toml"
    return cluster.sbatch("--nodes=3", "--output=%j.out", *words, script, config, *sets, cwd=folder)


def losses(folder: Path) -> list[tuple[int, str]]:
    """(step, loss as written) of the only run below a folder."""
    (path,) = folder.glob("runs/*/*/metrics.csv")
    with path.open() as file:
        return [(int(row["step"]), row["loss"]) for row in csv.DictReader(file)]


def attempts(folder: Path) -> list[dict[str, object]]:
    """What meta.json tells of the attempts of the only run below a folder."""
    (path,) = folder.glob("runs/*/*/meta.json")
    return json.loads(path.read_text())["attempts"]


def in_the_middle(folder: Path) -> bool:
    """Whether a checkpoint is there and steps after it."""
    return bool(list(folder.glob("runs/*/*/checkpoints/step-*"))) and losses(folder)[-1][0] > EVERY + 10


@pytest.fixture(scope="module")
def quiet(cluster: Cluster, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str]]:
    """The losses of a run to which nothing happened."""
    folder = tmp_path_factory.mktemp("quiet")
    job = submit(cluster, digits, folder)
    cluster.wait(job, "COMPLETED", "FAILED", timeout_s=120)
    return losses(folder)


def run_slowly(cluster: Cluster, digits: Path, folder: Path, *words: object) -> int:
    """A job in the middle of its training."""
    cluster.shape(SLOW)
    job = submit(cluster, digits, folder, *words)
    until(lambda: in_the_middle(folder) or cluster.state(job) == "FAILED", "the middle of the training", 90)
    return job


def ends_as_quiet(cluster: Cluster, job: int, folder: Path, quiet: list[tuple[int, str]], *accounted: str) -> None:
    """Lets the job end, and compares: states of its attempts, step numbers, losses (and so the weights)."""
    cluster.shape(None)
    cluster.wait(job, "COMPLETED", "FAILED", timeout_s=120)
    until(lambda: cluster.accounted(job) == [*accounted, "COMPLETED"], f"attempts {accounted}, COMPLETED", 15)
    assert [step for step, _ in quiet] == list(range(STEPS))
    assert losses(folder) == quiet


def test_time_limit(cluster: Cluster, digits: Path, tmp_path: Path, quiet: list[tuple[int, str]]) -> None:
    """A minute is not enough: the signal before its end leads to a checkpoint, and the job goes on in a second one."""
    job = run_slowly(cluster, digits, tmp_path, "--time=1", "--signal=USR2@50")  # comes when the controller next looks
    until(lambda: cluster.show(job)["Restarts"] == "1", "back in the queue", 60)
    ends_as_quiet(cluster, job, tmp_path, quiet, "REQUEUED")


def test_preemption(cluster: Cluster, digits: Path, tmp_path: Path, quiet: list[tuple[int, str]]) -> None:
    """An urgent job takes all nodes; the job saves in its grace time, and goes on where it was."""
    job = run_slowly(cluster, digits, tmp_path)
    urgent = cluster.sbatch("-p", "urgent", "--nodes=4", "--exclusive", "--wrap=sleep 1", cwd=tmp_path)
    cluster.wait(urgent, "COMPLETED", timeout_s=30)
    assert cluster.show(job)["Restarts"] == "1"
    ends_as_quiet(cluster, job, tmp_path, quiet, "REQUEUED")
    first, second = attempts(tmp_path)
    assert second["first_step"] == first["last_step"] + 1  # not a step lost


def test_node_crash(cluster: Cluster, digits: Path, tmp_path: Path, quiet: list[tuple[int, str]]) -> None:
    """Slurm notices, and starts the job again with the spare node; it loses the steps since its last checkpoint."""
    job = run_slowly(cluster, digits, tmp_path)
    cluster.crash("n2")
    until(lambda: cluster.show(job)["Restarts"] == "1", "back in the queue", 60)
    ends_as_quiet(cluster, job, tmp_path, quiet, "NODE_FAIL")
    assert "n2" not in json.dumps(attempts(tmp_path)[-1])


def test_cancelled_stays_cancelled(
    cluster: Cluster, digits: Path, tmp_path: Path, quiet: list[tuple[int, str]]
) -> None:
    """scancel ends a job for good, with a checkpoint; the same command goes on from there when it is wanted again."""
    job = run_slowly(cluster, digits, tmp_path)
    cluster.cancel(job)
    cluster.wait(job, "CANCELLED", timeout_s=30)
    again = submit(cluster, digits, tmp_path)
    ends_as_quiet(cluster, again, tmp_path, quiet)
    assert cluster.state(job) == "CANCELLED" and cluster.accounted(job) == ["CANCELLED"]


def test_killed_rank(cluster: Cluster, digits: Path, tmp_path: Path, quiet: list[tuple[int, str]]) -> None:
    """The job fails within 10 s and names the host; submitted again, it goes on from the last checkpoint."""
    job = run_slowly(cluster, digits, tmp_path)
    rank = "grep -lsxz 'trai[n]' /proc/[0-9]*/cmdline | cut -d/ -f3"  # the brackets: not this grep itself
    cluster.on("n3", "sh", "-c", f"kill -KILL $({rank})")
    cluster.wait(job, "FAILED", timeout_s=10)
    assert "n3" in cluster.output(job)
    again = submit(cluster, digits, tmp_path)
    ends_as_quiet(cluster, again, tmp_path, quiet)
