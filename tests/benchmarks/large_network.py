"""Time of a step with divided weights over a network, FSDP2 and DeepSpeed over gloo beside it; a Markdown table.

    python -m tests.benchmarks.large_network [--rounds N] [--links unlimited,1gbit]

A GPT of 21M parameters, AdamW, fp32, a thread a rank, on four ranks: on four nodes of the test cluster, and on two of
them with two ranks each, where a copy on each node is possible. The cluster is namespaces of this machine
(tests/slurm), so it is for root. Rows take turns; a figure is the median over rounds of the mean step, with its range.
DeepSpeed is measured if PYTHONPATH has it. Batches are small, so that communication counts: with larger ones every
ratio is nearer to 1.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from hpc_train.core.rundir import find
from hpc_train.core.timing_log import COMMUNICATION, PHASES, read_timings
from tests import jobs
from tests.slurm.slurm import Cluster, MpiCrash, why_not

STEPS, FIRST, RANKS = 6, 2, 4  # the steps after the first two are measured
MODEL = {"layers": 12, "heads": 6, "width": 384, "context": 64}
ROWS: dict[str, tuple[int, dict[str, object] | None]] = {  # name -> (nodes, keys)
    "mpi": (4, {"strategy": "mpi"}),
    "stage 1": (4, {"strategy": "sharded", "stage": 1}),
    "stage 2": (4, {"strategy": "sharded", "stage": 2}),
    "stage 3": (4, {"strategy": "sharded", "stage": 3}),
    "FSDP2": (4, None),
    "stage 3, 2 nodes": (2, {"strategy": "sharded", "stage": 3}),
    "stage 3, 2 nodes, within node": (2, {"strategy": "sharded", "stage": 3, "shard_within": "node"}),
}
DEEPSPEED = importlib.util.find_spec("deepspeed")
if DEEPSPEED:
    ROWS["DeepSpeed ZeRO-3"] = (4, None)


def step_s(cluster: Cluster, folder: Path, row: str) -> tuple[float, float]:
    """(seconds of a step, the exposed communication in it; NaN for a peer), those of the slowest rank."""
    nodes, keys = ROWS[row]
    launch = ["srun", f"--nodes={nodes}", f"--ntasks-per-node={RANKS // nodes}", "--overcommit"]
    launch += ["--mpi=pmix", "--kill-on-bad-exit=1"]
    for _ in range(3):  # Open MPI sometimes crashes at start-up here: see MpiCrash
        runs = folder / "runs"
        shutil.rmtree(runs, ignore_errors=True)
        try:
            if keys is None:
                out = cluster.on("head", *launch, "python", "-m", __spec__.name, "--peer", row, timeout_s=400)
                times = [float(line.split()[1]) for line in out.splitlines() if line.startswith("STEP ")]
                return max(times), math.nan
            words = ["--set", "run.root=" + str(runs), *jobs.settings(**{f"reduce__{key}": keys[key] for key in keys})]
            cluster.on("head", *launch, "hpc-train", "train", folder / "job.toml", *words, cwd=folder, timeout_s=400)
        except MpiCrash:
            continue
        phases = [read_timings(find([runs])[0].timings(rank)).phases_ns[FIRST:] / 1e9 for rank in range(RANKS)]
        exposed = [each[:, [PHASES.index(phase) for phase in COMMUNICATION]].sum(axis=1).mean() for each in phases]
        return max(float(each.sum(axis=1).mean()) for each in phases), float(max(exposed))
    raise ChildProcessError(f"{row}: Open MPI crashed three times")


def peer(name: str) -> None:
    """A rank of a peer: the same model and optimizer, on tokens of no meaning."""
    import torch.distributed as dist

    from hpc_train.train.models.gpt import Gpt

    torch.set_num_threads(1)
    local = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    os.environ |= {key: os.environ[theirs] for key, theirs in local.items()}
    os.environ |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": "eth0"}
    torch.manual_seed(0)
    prepare = fsdp2 if name.startswith("FSDP2") else deepspeed
    step = prepare(Gpt(256, **MODEL))
    tokens = torch.randint(256, (1, MODEL["context"] + 1))
    for number in range(STEPS):
        if number == FIRST:
            began = time.perf_counter()
        step(tokens)
    dist.barrier()
    print("STEP", (time.perf_counter() - began) / (STEPS - FIRST), flush=True)
    dist.destroy_process_group()


def loss_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def fsdp2(model: torch.nn.Module) -> Callable[[torch.Tensor], None]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(tokens: torch.Tensor) -> None:
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def deepspeed(model: torch.nn.Module) -> Callable[[torch.Tensor], None]:
    """From a folder on PYTHONPATH: the project does not need it. It compiles a part of itself when it first starts."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed as library

    library.init_distributed(dist_backend="gloo")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    engine, *_ = library.initialize(model=model, optimizer=optimizer, config=settings)

    def step(tokens: torch.Tensor) -> None:
        engine.backward(loss_of(engine, tokens))
        engine.step()

    return step


def write_job(folder: Path) -> None:
    """A job and its data, Python's own source: nothing to fetch."""
    words = [word for path in sorted(Path(json.__file__).parent.glob("*.py")) for word in ("--from", path)]
    assert jobs.run(0, "prepare", "text", folder / "text.h5", *words, cwd=folder).code == 0
    lines = ['name = "large"', 'data.file = "text.h5"', 'task.kind = "language"', 'task.model = "gpt"']
    lines += ["task.options = {" + ", ".join(f"{key} = {value}" for key, value in MODEL.items()) + "}"]
    lines += [f"train.steps = {STEPS}", "train.batch_per_rank = 1", 'train.optimizer = "adamw"', "train.lr = 1e-4"]
    lines += ["train.threads = 1", "checkpoint.keep = 0"]
    (folder / "job.toml").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--links", default="unlimited,1gbit")
    parser.add_argument("--rows", default="|".join(ROWS))
    parser.add_argument("--peer", help="be a rank of FSDP2 or DeepSpeed")
    chosen = parser.parse_args()
    if chosen.peer:
        peer(chosen.peer)
        return
    if reason := why_not():
        raise SystemExit(f"no cluster here: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="hpc-train-large-"))
    # The nodes have a /tmp of their own.
    cluster = Cluster(shared=[folder, *([Path(DEEPSPEED.origin).parents[1]] if DEEPSPEED else [])])
    try:
        write_job(folder)
        print("| link | | step (s) | of it exposed communication (s) |\n|---|---|---|---|", flush=True)
        for link in chosen.links.split(","):
            cluster.shape(None if link == "unlimited" else link)
            found: dict[str, list[tuple[float, float]]] = {row: [] for row in chosen.rows.split("|")}
            for _ in range(chosen.rounds):
                for row, measured in found.items():
                    measured.append(step_s(cluster, folder, row))
                    print(f"{link}, {row}: {measured[-1][0]:.2f} s", file=sys.stderr, flush=True)
            for row, measured in found.items():
                steps, exposed = np.array(measured).T
                shown = f"{median(steps):.2f} ({min(steps):.2f} to {max(steps):.2f})"
                waited = "" if np.isnan(exposed).any() else f"{median(exposed):.2f}"
                print(f"| {link} | {row} | {shown} | {waited} |", flush=True)
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
