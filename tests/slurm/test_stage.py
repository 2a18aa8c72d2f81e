"""Staging from a real HDFS on the head to the disks of four nodes, over links of 200 Mbit/s."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest

from tests.hdfs import Hdfs
from tests.slurm.slurm import NODES, Cluster, until

pytestmark = pytest.mark.timeout(900)  # the first time 119 MB are fetched
HEAD = "10.77.0.254"
NUM_BYTES = (64 << 20) + 1
STAGE = ["srun", "--nodes=4", "--ntasks-per-node=1", "--mpi=pmix", "hpc-train", "stage"]


@pytest.fixture(scope="module")
def hdfs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hdfs]:
    folder = tmp_path_factory.mktemp("hdfs")
    with Hdfs(folder, HEAD, cluster.entering("head", folder)) as hdfs:
        yield hdfs


@pytest.fixture(scope="module")
def sha256(hdfs: Hdfs) -> str:
    """The checksum of /data.h5, which has a replica on both DataNodes."""
    content = os.urandom(NUM_BYTES)
    hdfs.write("/data.h5", content, 2)
    return hashlib.sha256(content).hexdigest()


def sums(cluster: Cluster, folder: str) -> set[str]:
    return {cluster.on(node, "sha256sum", f"{folder}/data.h5").split()[0] for node in NODES}


@pytest.mark.parametrize("client", ["webhdfs", pytest.param("hdfs", marks=pytest.mark.thorough)])
def test_four_nodes_stage_with_a_datanode_lost_half_way(
    cluster: Cluster, hdfs: Hdfs, sha256: str, tmp_path: Path, client: str
) -> None:
    url, folder = f"{hdfs.web if client == 'webhdfs' else hdfs.rpc}/data.h5", f"/tmp/{client}"
    cluster.shape("200mbit")  # 64 MiB take 2.7 s at least
    with ThreadPoolExecutor(1) as beside:
        staging = beside.submit(cluster.on, "head", *STAGE, url, folder, cwd=tmp_path, timeout_s=120)
        begun = ["sh", "-c", f"ls -A {folder} 2>/dev/null"]
        until(lambda: all(".data.h5.partial" in cluster.on(n, *begun, check=False) for n in NODES), "four begun", 40)
        sleep(1)
        assert {cluster.on(node, *begun).strip() for node in NODES} == {".data.h5.partial"}, "nobody is done"
        hdfs.kill(1)
        try:
            said = staging.result()
        finally:
            hdfs.restart(1)
    assert "copied to 4 nodes" in said and said.splitlines()[-1] == f"{folder}/data.h5"
    assert sums(cluster, folder) == {sha256}

    cluster.on("n3", "truncate", "--size=-1", f"{folder}/data.h5")
    again = cluster.on("head", *STAGE, url, folder, cwd=tmp_path, timeout_s=120)
    assert "copied to 1 node " in again and "reused on 3 nodes" in again
    assert sums(cluster, folder) == {sha256}


def test_one_nodes_full_disk_is_told_once(cluster: Cluster, hdfs: Hdfs, sha256: str, tmp_path: Path) -> None:
    cluster.on("n2", "sh", "-c", "mkdir /tmp/full && mount -t tmpfs -o size=8m tmpfs /tmp/full")
    told = ["sh", "-c", '"$@" 2>&1; echo "exit code $?"', "-", *STAGE, f"{hdfs.web}/data.h5", "/tmp/full"]
    said = cluster.on("head", *told, cwd=tmp_path, timeout_s=60)
    assert said.count("data.h5 needs 67.1 MB, and /tmp/full on n2 has 8.39 MB free") == 1, said
    assert said.strip().endswith("exit code 2"), said
