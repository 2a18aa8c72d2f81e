"""Divided weights over a network: what a copy on each node sends, and where the time of a slow link is counted."""

from pathlib import Path

import numpy as np

from hpc_train.core.records import read_metrics
from hpc_train.core.rundir import RunDir, find
from hpc_train.core.timing_log import PHASES, read_timings
from tests import jobs
from tests.slurm.slurm import Cluster

STEPS = 20
NUM_WEIGHTS = 784 * 1024 + 1024 + 1024 * 256 + 256 + 256 * 10 + 10


def train(cluster: Cluster, digits: Path, folder: Path, per_node: int, **keys: object) -> RunDir:
    """A run at stage 3 on two nodes, in a folder of its own."""
    keys |= {"reduce__strategy": "sharded", "reduce__stage": 3, "train__steps": STEPS, "train__threads": 1}
    keys |= {"data__file": digits, "run__root": folder, "task__options": "{hidden=[1024, 256]}"}
    launch = ["srun", "--nodes=2", f"--ntasks-per-node={per_node}", "--overcommit", "--mpi=pmix"]
    words = ["train", jobs.CONFIGS / "mlp-mnist.toml", *jobs.settings(**keys)]
    cluster.on("head", *launch, "--kill-on-bad-exit=1", "hpc-train", *words, cwd=folder.parent, timeout_s=100)
    return find([folder])[0]


def test_each_node_holds_a_copy_and_sends_parts(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    found, sent = {}, {}
    for within in ("job", "node"):
        before = cluster.sent_bytes("n1")
        run = train(cluster, digits, tmp_path / within, per_node=2, reduce__shard_within=within)
        sent[within] = cluster.sent_bytes("n1") - before
        found[within] = np.array(read_metrics(run.metrics)[1])
    assert len(found["node"]) == STEPS
    assert np.abs(found["node"] / found["job"] - 1).max() < 1e-5
    # Two ranks of a node each send 2 (n-1)/n of half the weights' bytes.
    parts = STEPS * 4 * NUM_WEIGHTS
    assert parts < sent["node"] < 1.4 * parts  # start-up sends the model once, and every packet has a header
    assert sent["node"] < 0.5 * sent["job"]


def test_a_slow_link_is_exposed_communication_and_no_pass(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    """At 12.5 MB/s the gathers of a forward pass alone take 0.2 s."""
    spent: dict[str, dict[str, float]] = {}
    for link in (None, "100mbit"):
        cluster.shape(link)
        timings = read_timings(train(cluster, digits, tmp_path / str(link), per_node=1).timings(0))
        spent[str(link)] = {phase: float(np.median(timings[f"{phase}_ns"])) / 1e9 for phase in PHASES}
    fast, slow = spent["None"], spent["100mbit"]
    assert slow["reduce"] > fast["reduce"] + 0.3, spent
    assert slow["forward"] + slow["backward"] < 2 * (fast["forward"] + fast["backward"]) + 0.02, spent
