"""Measures training over limited links against what `bench allreduce` on the same links predicts; a Markdown table.

    python -m tests.benchmarks.link [--links unlimited,1gbit,100mbit] [--steps N] [--work DIR]

Four nodes with one rank each, namespaces of this machine (tests/slurm), so it is for root. On each link, `bench
allreduce` times messages with each strategy, with and without 16-bit compression; then a perceptron of 5.3 MB of
gradients is trained with each. Nine tenths of them belong to one layer, whose gradients are ready last: nothing hides
behind backward, so that the network alone is told. Predicted: the sum over the step's messages of the measured times,
in proportion between measured sizes, without the conversion before sending, which backward includes. Simulated: the
same messages by `hpc-train simulate`, from the latency, bandwidth and overhead that it fits to the benchmark. Measured:
exposed communication, the median over steps of the mean over ranks that train (with quartiles). Exit code 1 if a
prediction is off by more than 15%.
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

from hpc_train.analysis.simulation.collectives import Algorithm, all_reduce
from hpc_train.analysis.simulation.machine import Machine
from hpc_train.analysis.simulation.network import read_links
from hpc_train.core.allreduce_times import Row, interpolated_s, read_rows
from hpc_train.core.rundir import find
from hpc_train.core.timing_log import COMMUNICATION, PHASES, read_timings
from hpc_train.train.reduce.buckets import ALONE_BYTES, has_weight_decay, make_buckets
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
HEADER = (
    "link",
    "strategy",
    "on the way",
    "bytes",
    "predicted (ms)",
    "measured (ms)",
    "error",
    "simulated (ms)",
    "error",
)
LAUNCH = ["srun", f"--nodes={len(NODES)}", "--ntasks-per-node=1", "--mpi=pmix", "--kill-on-bad-exit=1", "hpc-train"]
HIDDEN, WARMUP = (1568, 64), 2
_MOST_S = 900
_PLAIN = [("horovod", "none"), ("mpi", "none")]  # their smallest sums tell what flags take
MOST_ERROR = 0.15


@dataclass(frozen=True)
class Line:
    """A strategy on a link: seconds of a step's exposed communication."""

    link: str
    strategy: str
    compression: str
    num_bytes: int
    predicted_s: float
    simulated_s: float | None  # None: the strategy is not simulated
    measured_s: np.ndarray  # of each step

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self._error(self.predicted_s)

    def _error(self, told_s: float) -> float:
        return told_s / float(np.median(self.measured_s)) - 1

    def cells(self) -> tuple[str, ...]:
        low, middle, high = 1e3 * np.quantile(self.measured_s, [0.25, 0.5, 0.75])
        bits = "32 bits" if self.compression == "none" else self.compression
        simulated = self.simulated_s
        measured = f"{middle:.4g} ({low:.4g} to {high:.4g})"
        return (
            self.link,
            self.strategy,
            bits,
            f"{self.num_bytes:,}",
            f"{1e3 * self.predicted_s:.4g}",
            measured,
            f"{self.error:+.0%}",
            *(("-", "-") if simulated is None else (f"{1e3 * simulated:.4g}", f"{self._error(simulated):+.0%}")),
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
            errors = []
            for line in measure(cluster, folder, links.split(","), steps):
                print(f"| {' | '.join(line.cells())} |", flush=True)
                errors.append(abs(line.error))
        finally:
            cluster.down()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    num_within = sum(error <= MOST_ERROR for error in errors)
    print(f"\n{num_within} of {len(errors)} rows within {MOST_ERROR:.0%}")
    sys.exit(num_within < len(errors))


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
        names = ",".join(dict.fromkeys(bench_name(*way) for way in (*ways, *_PLAIN)))
        words = [
            "--min",
            "5K",
            "--max",
            "5M",
            "--repeat",
            3,
            "--strategies",
            names,
            "--output",
            folder / f"{link}.json",
        ]
        cluster.on("head", *LAUNCH, "bench", "allreduce", *words, cwd=folder, timeout_s=_MOST_S)
        rows = read_rows(json.loads((folder / f"{link}.json").read_text()))
        rows = [row for row in rows if row.ranks == len(NODES)]
        for strategy, compression in ways:
            print(f"training, {link}: {strategy}, {compression}", file=sys.stderr, flush=True)
            sizes = message_bytes(strategy, compression)
            yield Line(
                link,
                strategy,
                compression,
                sum(sizes) // (1 if compression == "none" else 2),
                predicted_s(rows, strategy, compression, sizes),
                simulated_s(folder / f"{link}.json", rows, strategy, compression, sizes),
                exposed_s(cluster, folder, f"{link}-{strategy}-{compression}", strategy, compression, steps, data),
            )


def bench_name(strategy: str, compression: str) -> str:
    return strategy if compression == "none" else f"{strategy}_{compression}"


def predicted_s(rows: Sequence[Row], strategy: str, compression: str, sizes: Sequence[int]) -> float:
    """The times of a step's messages, added up.

    The benchmark sends the step's flags with each message: apart, where the message is compressed or long. A step
    sends them once, so the others are taken off.
    """
    own = [row for row in rows if row.strategy == bench_name(strategy, compression)]
    whole_s = sum(interpolated_s(own, size) for size in sizes) - before_sending_s(rows, compression, sizes)
    if strategy == "parameter_server":  # its flags do not wait for each other
        return whole_s
    num_apart = len(sizes) - 1 if compression != "none" else sum(size >= ALONE_BYTES for size in sizes)
    flags_s = interpolated_s([row for row in rows if row.strategy == strategy], 0)
    return whole_s - num_apart * flags_s


def before_sending_s(rows: Sequence[Row], compression: str, sizes: Sequence[int]) -> float:
    """Of the conversion to 16 bits."""
    converting = [row for row in rows if row.strategy == "convert"]
    return sum(interpolated_s(converting, size) for size in sizes) if compression != "none" else 0.0


def simulated_s(
    network: Path, rows: Sequence[Row], strategy: str, compression: str, sizes: Sequence[int]
) -> float | None:
    if strategy == "parameter_server":
        return None
    algorithm: Algorithm = "ring" if strategy == "horovod" else "rabenseifner"
    links = read_links(network, bench_name(strategy, compression), algorithm)
    assert links.inside is None and links.between is not None
    machine, halves = Machine(1, links.between, links.between, links.overhead_s), 1 if compression == "none" else 2
    together = np.zeros((1, len(NODES)))
    took_s = sum(float(all_reduce(algorithm, together, size / halves, machine).max()) for size in sizes)
    return took_s - before_sending_s(rows, compression, sizes)


def message_bytes(strategy: str, compression: str) -> list[int]:
    """Of the gradients in each message of a step, as 32 bits: what the reducer makes of this model."""
    model = nn.Sequential(nn.Linear(784, HIDDEN[0]), nn.Linear(HIDDEN[0], HIDDEN[1]), nn.Linear(HIDDEN[1], 10))
    if strategy == "parameter_server":
        buckets = make_buckets(model, group_by=has_weight_decay)
    else:
        buckets = make_buckets(model, 1 if compression == "none" else len(NODES))
    return [bucket.fill().nbytes for bucket in buckets if bucket.parameters]


def exposed_s(
    cluster: Cluster, folder: Path, name: str, strategy: str, compression: str, steps: int, data: Path
) -> np.ndarray:
    keys = jobs.settings(
        name=name,
        data__file=data,
        task__options=f"{{hidden={list(HIDDEN)}}}",
        train__steps=steps,
        train__global_batch=12,
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
