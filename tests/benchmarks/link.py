"""Measures training over limited links against what `bench allreduce` on the same links predicts; a Markdown table.

    python -m tests.benchmarks.link [--links unlimited,1gbit,100mbit] [--steps N] [--work DIR]

Four nodes with one rank each, namespaces of this machine (tests/slurm), so it is for root. On each link, `bench
allreduce` fits latency and bandwidth of each strategy; then a perceptron of 5.3 MB of gradients is trained with each,
with and without 16-bit compression. Predicted: the sum over the step's messages of 2 (N-1) latency + 2 (N-1)/N bytes /
bandwidth. Measured: exposed communication, the median over steps of the mean over ranks that train (with quartiles).
Batches are small, so that little of it hides behind backward.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from torch import nn

from hpc_train.core.allreduce_times import Fit
from hpc_train.core.rundir import find
from hpc_train.core.timing_log import COMMUNICATION, PHASES, read_timings
from hpc_train.train.reduce.buckets import has_weight_decay, make_buckets
from tests import jobs
from tests.slurm.slurm import NODES, Cluster, why_not

LINKS = {"unlimited": None, "1gbit": "1gbit", "100mbit": "100mbit"}
WAYS = [
    ("horovod", "none"),
    ("horovod", "bf16"),
    ("mpi", "none"),
    ("mpi", "bf16"),
    ("parameter_server", "none"),  # reduce.compression does not go with it
]
HEADER = ("link", "strategy", "on the way", "bytes", "predicted (ms)", "measured (ms)", "error")
LAUNCH = ["srun", f"--nodes={len(NODES)}", "--ntasks-per-node=1", "--mpi=pmix", "--kill-on-bad-exit=1", "hpc-train"]
HIDDEN, WARMUP = (1024, 512), 2
_MOST_S = 400


@dataclass(frozen=True)
class Line:
    """A strategy on a link: seconds of a step's exposed communication."""

    link: str
    strategy: str
    compression: str
    num_bytes: int
    predicted_s: float
    measured_s: np.ndarray  # of each step

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_s / float(np.median(self.measured_s)) - 1

    def cells(self) -> tuple[str, ...]:
        low, middle, high = 1e3 * np.quantile(self.measured_s, [0.25, 0.5, 0.75])
        bits = "32 bits" if self.compression == "none" else self.compression
        measured = f"{middle:.4g} ({low:.4g} to {high:.4g})"
        return (
            self.link,
            self.strategy,
            bits,
            f"{self.num_bytes:,}",
            f"{1e3 * self.predicted_s:.4g}",
            measured,
            f"{self.error:+.0%}",
        )


@click.command(help=__doc__)
@click.option("--links", default=",".join(LINKS), show_default=True, help="Of these.")
@click.option("--steps", default=14, type=click.IntRange(WARMUP + 2), show_default=True, help="Of each training.")
@click.option("--work", default=Path("/tmp"), type=click.Path(path_type=Path), show_default=True, help="For a while.")
def main(links: str, steps: int, work: Path) -> None:
    if reason := why_not():
        raise click.ClickException(f"no cluster here: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="hpc-train-link-", dir=work))
    try:
        cluster = Cluster(shared=[folder])
        try:
            print(f"| {' | '.join(HEADER)} |\n| {' | '.join(['---'] * len(HEADER))} |", flush=True)
            for line in measure(cluster, folder, links.split(","), steps):
                print(f"| {' | '.join(line.cells())} |", flush=True)
        finally:
            cluster.down()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(
    cluster: Cluster, folder: Path, links: Sequence[str], steps: int, ways: Sequence[tuple[str, str]] = WAYS
) -> Iterator[Line]:
    """A line for each link and way."""
    data = folder / "mnist-5k.h5"
    if not data.exists():
        cluster.on("head", *LAUNCH, "prepare", "mnist-5k", data, cwd=folder, timeout_s=_MOST_S)
    for link in links:
        cluster.shape(LINKS[link])
        print(f"bench allreduce, {link}", file=sys.stderr, flush=True)
        strategies = ",".join(dict.fromkeys(strategy for strategy, _ in ways))
        words = ["--max", "4M", "--repeat", 3, "--strategies", strategies, "--output", folder / f"{link}.json"]
        cluster.on("head", *LAUNCH, "bench", "allreduce", *words, cwd=folder, timeout_s=_MOST_S)
        fits = json.loads((folder / f"{link}.json").read_text())["fits"]
        for strategy, compression in ways:
            print(f"training, {link}: {strategy}, {compression}", file=sys.stderr, flush=True)
            (fit,) = [each for each in fits if each["strategy"] == strategy and each["ranks"] == len(NODES)]
            sizes = message_bytes(strategy, compression)
            yield Line(
                link,
                strategy,
                compression,
                sum(sizes),
                sum(Fit(**fit).seconds(size) for size in sizes),
                exposed_s(cluster, folder, f"{link}-{strategy}-{compression}", strategy, compression, steps, data),
            )


def message_bytes(strategy: str, compression: str) -> list[int]:
    """Of each message of a step: what the reducer makes of this model."""
    model = nn.Sequential(nn.Linear(784, HIDDEN[0]), nn.Linear(HIDDEN[0], HIDDEN[1]), nn.Linear(HIDDEN[1], 10))
    if strategy == "parameter_server":
        buckets = make_buckets(model, group_by=has_weight_decay)
    else:
        buckets = make_buckets(model, 1 if compression == "none" else len(NODES))
    halves = 1 if compression == "none" else 2
    return [bucket.fill().nbytes // (halves if bucket.parameters else 1) for bucket in buckets]


def exposed_s(
    cluster: Cluster, folder: Path, name: str, strategy: str, compression: str, steps: int, data: Path
) -> np.ndarray:
    keys = jobs.settings(
        name=name,
        data__file=data,
        task__options=f"{{hidden={list(HIDDEN)}}}",
        train__steps=steps,
        train__global_batch=24,
        train__threads=1,
        train__warmup_steps=WARMUP,
        reduce__strategy=strategy,
        reduce__compression=compression,
        checkpoint__keep=0,
        run__root=folder / "runs",
    )
    words = ["train", jobs.CONFIGS / "mlp-mnist.toml", *keys]
    cluster.on("head", *LAUNCH, *words, cwd=folder, timeout_s=_MOST_S)
    (run,) = find([folder / "runs" / name])
    workers = len(NODES) - (strategy == "parameter_server")
    exposed = [PHASES.index(phase) for phase in COMMUNICATION]
    spent = [read_timings(run.timings(rank)).phases_ns[WARMUP:, exposed].sum(axis=1) for rank in range(workers)]
    return np.asarray(np.mean(spent, axis=0) / 1e9)


if __name__ == "__main__":
    main()
