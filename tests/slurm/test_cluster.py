"""The test cluster itself: separate hosts that use TCP, a Slurm with accounting, and nothing left behind."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests import jobs
from tests.slurm.slurm import NODES, UP_S, Cluster, until

ALL_REDUCE = """
from mpi4py import MPI
import numpy, time
world = MPI.COMM_WORLD
values = numpy.ones(1 << 20, "f4")  # 4 MiB
for _ in range(6):
    world.Barrier()
    began = time.perf_counter()
    world.Allreduce(MPI.IN_PLACE, values)
    seconds = world.allreduce(time.perf_counter() - began, MPI.MAX)
    if world.rank == 0:
        print("seconds", seconds, flush=True)
"""


def test_it_is_up_soon(cluster: Cluster) -> None:
    assert cluster.up_s < UP_S


def test_four_nodes_are_four_hosts(cluster: Cluster) -> None:
    assert sorted(cluster.on("head", "srun", "--nodes=4", "hostname").split()) == list(NODES)
    addresses = {node: cluster.on(node, "hostname", "--all-ip-addresses").strip() for node in NODES}
    assert addresses == {node: f"10.77.0.{i}" for i, node in enumerate(NODES, start=1)}
    for node in NODES[:2]:
        cluster.on(node, "sh", "-c", "echo $(hostname) >/tmp/mine; cp /tmp/mine /dev/shm")
    assert cluster.on("n1", "cat", "/tmp/mine", "/dev/shm/mine").split() == ["n1", "n1"]


def test_a_training_over_four_nodes(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    sent = {node: cluster.sent_bytes(node) for node in NODES}
    words = jobs.settings(data__file=digits, train__steps=30, run__root=tmp_path / "runs")
    script, config = jobs.ROOT / "slurm/train.sbatch", jobs.CONFIGS / "softmax-mnist.toml"
    job = cluster.sbatch("--nodes=4", script, config, *words, cwd=tmp_path)
    cluster.ends(job, "COMPLETED", timeout_s=120)
    (meta,) = tmp_path.glob("runs/*/*/meta.json")
    ranks = json.loads(meta.read_text())["ranks"]
    assert sorted(rank["host"] for rank in ranks) == list(NODES)
    # A ring all-reduce of S bytes over N ranks: every rank sends 2 (N-1)/N S. Here S is 7,850 floats, 30 times.
    least_bytes = 30 * 2 * 3 / 4 * 7850 * 4
    assert all(cluster.sent_bytes(node) - sent[node] > least_bytes for node in NODES)


def test_a_limited_link_slows_an_all_reduce(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "all_reduce.py").write_text(ALL_REDUCE)

    def seconds() -> float:
        command = ["srun", "--nodes=4", "--mpi=pmix", "python", "-m", "mpi4py", "all_reduce.py"]
        lines = cluster.on("head", *command, cwd=tmp_path, timeout_s=60)
        return statistics.median(float(word) for word in re.findall(r"seconds (\S+)", lines))

    free = seconds()
    cluster.shape("200mbit")
    limited = seconds()
    # At 25 MB/s a ring's 2 x 3/4 x 4 MiB a rank take 250 ms.
    assert limited > 0.2 and limited > 2 * free


A_TEST_IN_THE_MIDDLE = """
from pathlib import Path
from tests.slurm.conftest import cluster

def test_it(cluster):
    job = cluster.sbatch("--nodes=4", "--wrap=srun sleep 300", cwd=Path.cwd())
    cluster.wait(job, "RUNNING")
    Path("in-the-middle").touch()
    cluster.on("n2", "sleep", 300, timeout_s=300)
"""


def traces(mark: str) -> set[str]:
    """The names of the processes with this mark in their environment."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.add((path.parent / "comm").read_text().strip())
        except OSError:  # it has just ended
            continue
    return found


def surroundings(own: Path) -> tuple[set[Path], set[str], set[Path]]:
    """What a cluster could leave behind besides processes: network devices, mounts, cgroups.

    Tests that run beside this one mount disks in folders of theirs, which do not count.
    """
    lines = Path("/proc/self/mounts").read_text().splitlines()
    mounts = {line for line in lines if "/pytest-of-" not in line or str(own) in line}
    return set(Path("/sys/class/net").iterdir()), mounts, set(Path("/sys/fs/cgroup").rglob("*slurm*"))


@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.thorough)])
def test_an_interrupted_test_leaves_nothing(cluster: Cluster, tmp_path: Path, end: signal.Signals) -> None:
    """A second pytest, with its own cluster, is stopped in the middle of a test with a running job."""
    mark, before, temporary = uuid.uuid4().hex, surroundings(tmp_path), tmp_path / "temporary"
    temporary.mkdir()
    (tmp_path / "test_it.py").write_text(A_TEST_IN_THE_MIDDLE)
    words = ["-c", jobs.ROOT / "pyproject.toml", "--basetemp", tmp_path / "base", "-p", "no:cacheprovider"]
    said = tmp_path / "said"
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", *words, tmp_path / "test_it.py"],
        cwd=tmp_path,
        env=jobs.environment(MARK=mark, TMPDIR=str(temporary), PYTHONPATH=str(jobs.ROOT)),
        stdout=said.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    everything = {"slurmctld", "slurmd", "slurmdbd", "mariadbd", "munged", "sleep"}
    try:
        until(lambda: (tmp_path / "in-the-middle").exists() or run.poll() is not None, "the test's middle", 60)
        assert run.poll() is None, said.read_text()
        until(lambda: everything <= traces(mark), f"{everything} running", 20)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, end)
        run.wait(timeout=30)
    until(lambda: not traces(mark), "the end of all its processes", 10)
    assert list(temporary.iterdir()) == []
    assert surroundings(tmp_path) == before
    assert cluster.all_idle()
