"""On GlusterFS, a network file system that all nodes mount: data, training, checkpoints, a node that dies."""

import json
from pathlib import Path
from time import time

import h5py
import numpy as np
import pytest

from tests import jobs
from tests.conftest import FaultTable
from tests.slurm import gluster
from tests.slurm.gluster import MOUNTED, Volume
from tests.slurm.slurm import Cluster, until
from tests.slurm.test_faults import EVERY, SLOW, ends_as_quiet, quiet, submit

__all__ = ["quiet"]  # a fixture
pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]  # three minutes, and 22 MB of packages
SRUN = ["srun", "--nodes=4", "--ntasks-per-node=1", "--mpi=pmix"]


@pytest.fixture(scope="module")
def volume(cluster: Cluster) -> Volume:
    reason = gluster.why_not()
    if reason:
        pytest.skip(f"no GlusterFS here: {reason}")
    return Volume(cluster)


@pytest.fixture(scope="module")
def shared_digits(cluster: Cluster, volume: Volume) -> Path:
    """mnist-5k on the volume, prepared by one rank per node."""
    path = MOUNTED / "mnist-5k.h5"
    said = cluster.on("head", *SRUN, "hpc-train", "prepare", "mnist-5k", path, cwd=jobs.ROOT, timeout_s=120)
    assert "by 4 ranks, read back and equal" in said, said
    return path


def test_prepare_writes_in_parallel_what_every_node_reads_alike(
    cluster: Cluster, shared_digits: Path, digits: Path, tmp_path: Path
) -> None:
    checked = cluster.on("n4", jobs.HPC_TRAIN, "data", "check", shared_digits, timeout_s=60)
    assert "No fault found" in checked, checked
    for node in ("n1", "n4"):
        cluster.on(node, "cp", shared_digits, tmp_path / f"{node}.h5")
        with h5py.File(tmp_path / f"{node}.h5") as written, h5py.File(digits) as expected:
            names: list[str] = []
            expected.visititems(lambda name, each, names=names: names.append(name) if hasattr(each, "shape") else None)
            assert len(names) >= 4 and all(np.array_equal(written[name], expected[name]) for name in names)


def test_bench_io_tells_the_volume_from_a_nodes_own_disk(cluster: Cluster, volume: Volume) -> None:
    found = {}
    for place in (MOUNTED, Path("/tmp")):
        words = ["bench", "io", "--dir", place, "--size-mb", 4, "--repeat", 2, "--json"]
        # Nodes have a disk each: what all ranks write together lies on that of one of them.
        ranks = [*SRUN[:1], "--nodes=1", "--ntasks-per-node=2", "--overcommit", "--mpi=pmix"]
        who = SRUN if place == MOUNTED else ranks
        told = json.loads(cluster.on("head", *who, "hpc-train", *words, cwd=jobs.ROOT, timeout_s=240))
        assert all(min(row["write_s"] + row["transfer_s"] + row["read_s"]) > 0 for row in told["rows"])
        found[place] = told
    assert "fuse" in found[MOUNTED]["file_system"] and "fuse" not in found[Path("/tmp")]["file_system"]


def test_a_node_that_holds_data_dies_and_the_job_goes_on(
    cluster: Cluster, volume: Volume, shared_digits: Path, quiet: Path, tmp_path: Path, survived: FaultTable
) -> None:
    """This test must be the last: the node returns without the volume."""
    cluster.shape(SLOW)
    job = submit(cluster, shared_digits, tmp_path, "--nodelist=n1,n2,n3", run__root=MOUNTED / "runs")

    def in_the_middle() -> bool:
        words = f"ls -d {MOUNTED}/runs/*/*/checkpoints/step-* && tail -n 1 {MOUNTED}/runs/*/*/metrics.csv"
        lines = cluster.on("n1", "sh", "-c", words, check=False).split()
        return len(lines) > 1 and int(lines[-1].split(",")[0]) > EVERY + 10

    until(lambda: in_the_middle() or cluster.state(job) == "FAILED", "the middle of the training", 120)
    assert cluster.state(job) != "FAILED", cluster.output(job)
    crashed_at_s = time()
    cluster.crash("n3")
    until(lambda: cluster.show(job)["Restarts"] == "1", "back in the queue", 60)
    cluster.shape(None)
    cluster.on("head", "scontrol", "update", f"job={job}", "ReqNodeList=")
    cluster.wait(job, "COMPLETED", "FAILED", timeout_s=120)
    cluster.on("n1", "cp", "-r", MOUNTED / "runs", tmp_path / "runs", timeout_s=60)
    cost = ends_as_quiet(cluster, job, tmp_path, quiet, crashed_at_s, "NODE_FAIL")
    assert cost.steps_lost <= EVERY + 50
    survived("GlusterFS, one of three servers crashes with its rank", "requeued: NODE_FAIL, COMPLETED", *cost)
