"""`hpc-train doctor` on four hosts connected by TCP, under srun."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from tests.slurm.slurm import NODES, Cluster


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    return jobs.install(tmp_path_factory.mktemp("small"), "torch", "horovod")


def found(cluster: Cluster, folder: Path, *words: object) -> dict[str, Any]:
    """The findings by check. The exit code is 1, because torch is not installed."""
    line = ("srun", "--nodes=4", "--mpi=pmix", *words, "doctor", "--json")
    told = cluster.on("head", *line, cwd=folder, timeout_s=120, check=False)
    assert "{" in told, told
    return {check["check"]: check for check in json.loads(told[told.index("{") :])["checks"]}


def test_four_hosts(cluster: Cluster, without_torch: list[object], tmp_path: Path) -> None:
    checks = found(cluster, tmp_path, *without_torch)
    assert "TCP (eth0" in checks["transport"]["seen"] and checks["transport"]["status"] == "ok", checks["transport"]
    assert [each["host"] for each in checks["clocks"]["values"].values()] == list(NODES)
    assert checks["Slurm"]["status"] == "ok" and "4 ranks on 4 nodes" in checks["Slurm"]["seen"], checks["Slurm"]
    for name in ("one MPI", "all-reduce", "parallel file", "file locks", "clocks", "fork"):
        assert checks[name]["status"] in ("ok", "warn"), checks[name]


def test_variables_of_slurm_that_are_not_of_this_step(
    cluster: Cluster, without_torch: list[object], tmp_path: Path
) -> None:
    checks = found(cluster, tmp_path, "env", "SLURM_PROCID=0", *without_torch)
    assert checks["Slurm"]["status"] == "fail" and "SLURM_PROCID = 0, but MPI's rank is " in checks["Slurm"]["seen"]
