"""Memory of a rank and time of a step by strategy and stage: a GPT of 85M parameters, AdamW, fp32, a thread a rank.

    python -m tests.benchmarks.large [--ranks 1 2 4] [--rounds 2] [--layers 16 --width 1024] [--only "stage 3"]

Each row is a job under mpirun. Memory is the peak of a rank's anonymous memory (RssAnon, read 500 times a second) less
what it had before the model was made: until it has its first weights, and during the steps; the largest rank counts.
Stages take turns; times are medians. formula: what docs/how-to/large-models.md promises of stage 3.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

STEPS, FIRST = 5, 2  # the steps after the first two are measured
MODEL = {"layers": 12, "heads": 12, "width": 768, "context": 128}
VARIANTS = {
    "mpi": {"reduce.strategy": "mpi"},
    **{f"stage {stage}": {"reduce.strategy": "sharded", "reduce.stage": stage} for stage in (1, 2, 3)},
}


# ------------------------------------------------------------------------------------------------- a rank's part


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise LookupError("RssAnon")


class Watch(threading.Thread):
    """The peak of this process's anonymous memory since the latest `begin`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def begin(self) -> None:
        self.peak = 0

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.002)


def rank_main(job: Path) -> None:
    from mpi4py import MPI

    from hpc_train.core.config import load
    from hpc_train.core.world import World
    from hpc_train.train import loop
    from hpc_train.train.comm.context import Context

    comm, facts = MPI.COMM_WORLD, {}
    watch, number = Watch(), 0
    begin_step = loop.Recorder.end_step

    def end_step(recorder: Any, *arguments: Any) -> None:
        nonlocal number
        begin_step(recorder, *arguments)
        number += 1
        if number == FIRST:
            watch.begin()
            facts["begun"] = time.perf_counter()
        if number == STEPS:
            facts["step_s"] = (time.perf_counter() - facts.pop("begun")) / (STEPS - FIRST)
            facts["peak"] = watch.peak

    make_optimizer = loop.make_optimizer

    def begun(*arguments: Any) -> Any:
        facts["start"] = watch.peak  # each rank has its weights
        return make_optimizer(*arguments)

    loop.Recorder.end_step, loop.make_optimizer = end_step, begun
    base = anonymous_bytes()
    watch.start()
    world = World(rank=comm.rank, size=comm.size, local_rank=comm.rank, local_size=comm.size)
    loop.train(load(job), Context(world, comm))
    everyone = comm.gather((facts["start"] - base, facts["peak"] - base, facts["step_s"]))
    if comm.rank == 0:
        starts, peaks, times = (max(each) for each in zip(*everyone, strict=True))
        print("RESULT", json.dumps({"start_bytes": starts, "peak_bytes": peaks, "step_s": times}), flush=True)


# ----------------------------------------------------------------------------------------------------- the table


def measure(folder: Path, ranks: int, variant: str) -> dict[str, float]:
    keys = VARIANTS[variant] if ranks > 1 else {"reduce.strategy": "local"}
    lines = ['name = "large"', "data.file = " + json.dumps(str(folder / "text.h5")), 'task.kind = "language"']
    lines += ['task.model = "gpt"', "task.options = {" + ", ".join(f"{k} = {v}" for k, v in MODEL.items()) + "}"]
    lines += [f"train.steps = {STEPS}", "train.batch_per_rank = 1", 'train.optimizer = "adamw"', "train.lr = 1e-4"]
    lines += ["train.threads = 1", "checkpoint.keep = 0", f"run.root = {json.dumps(str(folder / 'runs'))}"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    job = folder / "job.toml"
    job.write_text("\n".join(lines) + "\n")
    command = ["mpirun", "--quiet", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    command += [sys.executable, "-m", "mpi4py", "-m", "tests.benchmarks.large", "--job", str(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not found:
        sys.exit(done.stdout + done.stderr)
    return json.loads(found[0].removeprefix("RESULT"))


def formula_bytes(job: Path, ranks: int) -> float:
    """16 bytes of each parameter over N, weights and gradients of the two largest blocks, and activations."""
    from hpc_train.core.config import load
    from hpc_train.train.memory import Trial
    from hpc_train.train.reduce.shard_blocks import find_blocks, parameters_of

    trial = Trial(load(job).config)
    groups = parameters_of(trial.model, find_blocks(trial.model, None)).values()
    sizes = sorted(sum(each.numel() for each in group.values()) for group in groups)
    in_blocks = 8 * sum(sizes[-2:]) if ranks > 1 else 0
    return 16 * sum(sizes) / ranks + in_blocks + trial.memory(ranks).activations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=MODEL["layers"])
    parser.add_argument("--width", type=int, default=MODEL["width"])
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), help="strategies, such as 'stage 3'")
    parser.add_argument("--job", type=Path)
    chosen = parser.parse_args()
    if chosen.job:
        rank_main(chosen.job)
        return
    MODEL.update(layers=chosen.layers, width=chosen.width, heads=chosen.width // 64)
    folder = Path("runs/large")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = folder / "text"
    text.mkdir()
    for path in Path(json.__file__).parent.glob("*.py"):  # Python's own source: nothing to fetch
        shutil.copy(path, text)
    subprocess.run(["hpc-train", "prepare", "text", str(folder / "text.h5"), "--from", str(text)], check=True)
    print(
        f"{'ranks':>5}  {'strategy':9} {'peak of a rank, MB: start':>25} {'steps':>7} {'formula':>8}  "
        f"{'step, s (median, range)':>24}",
        flush=True,
    )
    for ranks in chosen.ranks:
        variants = chosen.only if ranks > 1 else ["mpi"]
        found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
        for _ in range(chosen.rounds):
            for variant in variants:
                found[variant].append(measure(folder, ranks, variant))
        for variant, rows in found.items():
            times = [row["step_s"] for row in rows]
            start, peak = (max(row[key] for row in rows) / 1e6 for key in ("start_bytes", "peak_bytes"))
            shown = f"{median(times):.2f} ({min(times):.2f}-{max(times):.2f})"
            # The formula of stage 3, and of one rank, which divides nothing.
            told = (
                f"{formula_bytes(folder / 'job.toml', ranks) / 1e6:,.0f}" if ranks == 1 or variant == "stage 3" else ""
            )
            name = variant if ranks > 1 else "local"
            print(f"{ranks:5}  {name:9} {start:25,.0f} {peak:7,.0f} {told:>8}  {shown:>24}", flush=True)


if __name__ == "__main__":
    main()
