"""Divided weights over a network: what a copy on each node sends, where the time of a slow link is counted, and the
shipped job that divides its weights.
"""

import json
from pathlib import Path

import numpy as np

from hpc_train.core.config import load
from hpc_train.core.records import read_metrics
from hpc_train.core.rundir import RunDir, find
from hpc_train.core.timing_log import PHASES, read_timings
from tests import jobs
from tests.slurm.slurm import NODES, Cluster

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
        before = sum(map(cluster.sent_bytes, NODES))
        run = train(cluster, digits, tmp_path / within, per_node=2, reduce__shard_within=within)
        sent[within] = (sum(map(cluster.sent_bytes, NODES)) - before) / 2  # of one of the two nodes that it ran on
        found[within] = np.array(read_metrics(run.metrics)[1])
    assert len(found["node"]) == STEPS
    assert np.abs(found["node"] / found["job"] - 1).max() < 1e-5
    # Two ranks of a node each send 2 (n-1)/n of half the weights' bytes.
    parts = STEPS * 4 * NUM_WEIGHTS
    assert parts < sent["node"] < 1.4 * parts  # start-up sends the model once, and every packet has a header
    assert sent["node"] < 0.5 * sent["job"]


def test_torch_distributed_finds_the_other_nodes(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    """Ranks that srun started: the root listens where the other nodes reach it, and gloo where their names lead."""
    found = []
    for name in ("mpi", "torch"):
        made = train(cluster, digits, tmp_path / name, per_node=2, reduce__shard_within="node", reduce__transport=name)
        found.append(np.array(read_metrics(made.metrics)[1]))
    assert len(found[1]) == STEPS and np.abs(found[1] / found[0] - 1).max() < 1e-5


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


def test_gpt2_xl_by_the_shipped_script(cluster: Cluster, tmp_path: Path) -> None:
    """Its shipped settings but for the size, on four nodes."""
    files = sorted(Path(json.__file__).parent.glob("*.py"))
    words = [word for path in files for word in ("--from", path)]
    done = jobs.run(1, "prepare", "text", tmp_path / "text.h5", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    small = {"layers": 2, "heads": 2, "width": 32, "context": 64, "vocab_size": 256}
    keys: dict[str, object] = {f"task__options__{key}": value for key, value in small.items()}
    keys |= {"data__file": tmp_path / "text.h5", "run__root": tmp_path / "runs", "train__batch_per_rank": 2}
    keys |= {"train__steps": 4, "train__lr_warmup_steps": 1}
    script, config = jobs.ROOT / "slurm/train.sbatch", jobs.CONFIGS / "gpt2-xl.toml"
    job = cluster.sbatch("--nodes=4", script, config, *jobs.settings(**keys), cwd=tmp_path)
    cluster.ends(job, "COMPLETED", timeout_s=120)
    (run,) = find([tmp_path / "runs"])
    losses = np.array(read_metrics(run.metrics)[1])
    assert len(losses) == 4 and losses[-1] < losses[0] and run.checkpoint(4).exists()
    meta = json.loads(run.meta.read_text())
    assert len({rank["host"] for rank in meta["ranks"]}) == 4 and meta["precision"] == "bf16"
    assert load(run.config).config.reduce.stage == 3
