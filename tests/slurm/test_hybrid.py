"""A copy of the weights on each node: gathers stay there, and only the sums of parts use the network."""

from pathlib import Path

import numpy as np

from hpc_train.core.records import read_metrics
from hpc_train.core.rundir import find
from tests import jobs
from tests.slurm.slurm import Cluster

STEPS = 20
NUM_WEIGHTS = 784 * 1024 + 1024 + 1024 * 256 + 256 + 256 * 10 + 10


def test_each_node_holds_a_copy_and_sends_parts(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    found, sent = {}, {}
    for within in ("job", "node"):
        keys = {"reduce__strategy": "sharded", "reduce__stage": 3, "reduce__shard_within": within}
        keys |= {"data__file": digits, "train__steps": STEPS, "run__root": tmp_path / within, "train__threads": 1}
        words = [*jobs.settings(**keys), "--set", "task.options={hidden=[1024, 256]}"]
        before = cluster.sent_bytes("n1")
        launch = ["srun", "--nodes=2", "--ntasks-per-node=2", "--overcommit", "--mpi=pmix", "--kill-on-bad-exit=1"]
        config = jobs.CONFIGS / "mlp-mnist.toml"
        cluster.on("head", *launch, "hpc-train", "train", config, *words, cwd=tmp_path, timeout_s=100)
        sent[within] = cluster.sent_bytes("n1") - before
        found[within] = np.array(read_metrics(find([tmp_path / within])[0].metrics)[1])
    assert len(found["node"]) == STEPS
    assert np.abs(found["node"] / found["job"] - 1).max() < 1e-5
    # Two ranks of a node each send 2 (n-1)/n of half the weights' bytes.
    parts = STEPS * 4 * NUM_WEIGHTS
    assert parts < sent["node"] < 1.4 * parts  # start-up sends the model once, and every packet has a header
    assert sent["node"] < 0.5 * sent["job"]
