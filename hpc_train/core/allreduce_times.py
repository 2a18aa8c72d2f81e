"""Times of all-reduces, which `bench allreduce` measures and `plan` reads, and the network's latency and bandwidth.

A ring all-reduce of S bytes over N ranks takes 2 (N-1) steps, each with a latency alpha and S/N bytes at beta seconds
per byte: T = 2 (N-1) alpha + 2 (N-1)/N S beta (Thakur et al., "Optimization of collective communication operations in
MPICH", IJHPCA 2005; beta includes its term for the additions).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpc_train.core.statistics import FloatArray, Interval, half_width, nonnegative_least_squares

SCHEMA = 1
_MOST_COUNTED, _MOST_S = 10**12, 1e6  # larger numbers of a file are damage
OURS = ("horovod", "mpi", "parameter_server", "sharded")  # reduce.strategy
COMPRESSED = ("horovod_bf16", "mpi_bf16")  # with reduce.compression = "bf16", the conversion included
PEERS = ("plain_mpi", "ddp_gloo")  # one blocking MPI_Allreduce; torch.distributed's all_reduce over gloo
# A copy, and a conversion to bf16, on all ranks at once; one direction between two ranks.
LIMITS = ("memory", "convert", "link")


@dataclass(frozen=True)
class Row:
    """One strategy for `message_bytes` on `ranks` ranks of `nodes` hosts, with at most `ranks_per_node` each.

    strategy: one of OURS, COMPRESSED, PEERS or LIMITS. message_bytes: of 32 bits a number, compressed or not.
    samples_s: seconds per call on the slowest rank, each the mean of several calls. Strategies were sampled in turns:
    samples with the same index belong together.
    """

    strategy: str
    ranks: int
    nodes: int
    ranks_per_node: int
    message_bytes: int
    samples_s: tuple[float, ...]

    @property
    def place(self) -> tuple[int, int, int]:
        """(ranks, nodes, ranks per node)"""
        return self.ranks, self.nodes, self.ranks_per_node

    @property
    def quartiles_s(self) -> tuple[float, float, float]:
        low, middle, high = np.quantile(self.samples_s, [0.25, 0.5, 0.75])
        return float(low), float(middle), float(high)

    @property
    def time_s(self) -> float:
        """The median."""
        return self.quartiles_s[1]

    @property
    def bytes_per_s(self) -> float:
        """Bus bandwidth of an all-reduce, as nccl-tests defines it; S/T of a limit.

        S/T times 2 (N-1)/N is what a ring moves into each rank, and comparable with a link for any N.
        """
        factor = 1.0 if self.strategy in LIMITS else 2 * (self.ranks - 1) / self.ranks
        return factor * self.message_bytes / self.time_s


@dataclass(frozen=True)
class Fit:
    """Alpha and beta of one strategy on one number of ranks, with 95% intervals; None from 2 sizes, which fit exactly.

    error: the median over sizes of |predicted - measured| / measured.
    """

    strategy: str
    ranks: int
    nodes: int
    ranks_per_node: int
    alpha_s: float
    beta_s_per_byte: float
    error: float
    alpha_interval_s: Interval | None
    beta_interval_s_per_byte: Interval | None

    def seconds(self, message_bytes: float) -> float:
        return float(_shape(self.ranks, np.array([message_bytes]))[0] @ (self.alpha_s, self.beta_s_per_byte))


def _shape(ranks: int, message_bytes: np.ndarray) -> np.ndarray:
    """The design matrix: columns for alpha and beta."""
    return 2 * (ranks - 1) * np.stack([np.ones(len(message_bytes)), message_bytes / ranks], axis=1)


def fit(rows: Sequence[Row]) -> Fit:
    """Alpha and beta from one strategy's rows on the same ranks, with two sizes or more.

    Non-negative least squares of relative errors, so that every size counts alike: times span six powers of ten.
    Intervals are Student's of a linear regression, whose residuals tell the error, as far as they are above 0.
    """
    times_s = np.array([row.time_s for row in rows])
    scaled = _shape(rows[0].ranks, np.array([row.message_bytes for row in rows], float)) / times_s[:, None]
    ones = np.ones(len(rows))
    alpha_s, beta = nonnegative_least_squares(scaled, ones)
    first = rows[0]
    return Fit(
        *(first.strategy, first.ranks, first.nodes, first.ranks_per_node, float(alpha_s), float(beta)),
        error=float(np.median(np.abs(scaled @ (alpha_s, beta) - 1))),
        alpha_interval_s=_interval(scaled, (alpha_s, beta), 0),
        beta_interval_s_per_byte=_interval(scaled, (alpha_s, beta), 1),
    )


def _interval(scaled: FloatArray, fitted: Sequence[float], column: int) -> Interval | None:
    """scaled: (sizes, 2), of which `fitted` makes about 1 each."""
    spare = len(scaled) - 2
    if not spare:
        return None
    residuals = scaled @ fitted - 1
    # Relative to the fit's columns, which differ by any power of ten.
    scales = np.abs(scaled).max(axis=0)
    inverse = np.linalg.pinv((scaled / scales).T @ (scaled / scales))
    squared_error = float(residuals @ residuals) / spare * float(inverse[column, column]) / float(scales[column]) ** 2
    half = half_width(squared_error, spare)
    return max(0.0, float(fitted[column]) - half), float(fitted[column]) + half


def interpolated_s(rows: Sequence[Row], message_bytes: float) -> float:
    """Of a message between measured sizes, by the rows of one strategy on the same ranks: linear in the bytes.

    Nearer to the truth than a fit: libraries choose other algorithms at other sizes. Below the smallest size as long as
    there, above the largest at its rate.
    """
    times_s = {row.message_bytes: row.time_s for row in rows}
    sizes = sorted(times_s)
    if message_bytes > sizes[-1]:
        return times_s[sizes[-1]] * message_bytes / sizes[-1]
    return float(np.interp(message_bytes, sizes, [times_s[size] for size in sizes]))


def fits(rows: Sequence[Row]) -> list[Fit]:
    """A fit for each strategy and place with two sizes or more."""
    groups: dict[tuple[str, tuple[int, int, int]], list[Row]] = {}
    for row in rows:
        if row.strategy not in LIMITS:
            groups.setdefault((row.strategy, row.place), []).append(row)
    return [fit(group) for group in groups.values() if len(group) > 1]


def rank_groups(hosts: Sequence[str]) -> list[tuple[int, ...]]:
    """The groups of ranks to measure, given every rank's host. Rank 0 is in each.

    2, 4, 8 ... and all ranks of the first node, the first rank of 2, 4, 8 ... and all nodes, and all ranks.
    """
    inside = [rank for rank, host in enumerate(hosts) if host == hosts[0]]
    between = [hosts.index(host) for host in dict.fromkeys(hosts)]
    found: dict[tuple[int, ...], None] = {}
    for ranks in (inside, between):
        counts = sorted({1 << bit for bit in range(1, len(ranks).bit_length())} | {len(ranks)})
        found.update(dict.fromkeys(tuple(ranks[:count]) for count in counts if count > 1))
    if len(hosts) > 1:
        found[tuple(range(len(hosts)))] = None
    return list(found)


def sizes(least_bytes: int, most_bytes: int) -> list[int]:
    """Powers of 4 times `least_bytes` up to `most_bytes`."""
    found = [least_bytes]
    while found[-1] * 4 <= most_bytes:
        found.append(found[-1] * 4)
    return found


def pair_ratios(rows: Sequence[Row], strategy: str, message_bytes: int) -> dict[tuple[int, int, int], list[float]]:
    """By place, the speed of `strategy` relative to one MPI_Allreduce of the same size, sample by sample."""
    found = {(row.place, row.strategy): row for row in rows if row.message_bytes == message_bytes}
    return {
        place: np.divide(found[place, "plain_mpi"].samples_s, row.samples_s).tolist()
        for (place, name), row in found.items()
        if name == strategy and (place, "plain_mpi") in found
    }


def record(rows: Sequence[Row], facts: dict[str, Any]) -> dict[str, Any]:
    """The JSON file; `facts`: hosts, mpi and other metadata."""
    return {
        "schema": SCHEMA,
        "kind": "allreduce",
        **facts,
        "fits": [vars(each) for each in fits(rows)],
        "rows": [_row_record(row) for row in rows if row.strategy not in LIMITS],
        "link": {limit: [_row_record(row) for row in rows if row.strategy == limit] for limit in LIMITS},
    }


def _row_record(row: Row) -> dict[str, Any]:
    low, middle, high = row.quartiles_s
    place = {"ranks": row.ranks, "nodes": row.nodes, "ranks_per_node": row.ranks_per_node}
    times = {"time_s": middle, "low_s": low, "high_s": high, "samples_s": row.samples_s}
    key = "bytes_per_s" if row.strategy in LIMITS else "bus_bytes_per_s"
    return {"strategy": row.strategy, **place, "bytes": row.message_bytes, **times, key: row.bytes_per_s}


def read_rows(tree: dict[str, Any]) -> list[Row]:
    """The rows of a `record` that was read back; those that are damaged are left out."""
    link = tree.get("link")
    lists = [tree.get("rows"), *(link.get(limit) for limit in LIMITS if isinstance(link, dict))]
    listed = [each for found in lists if isinstance(found, list) for each in found]
    return [row for each in listed if isinstance(each, dict) and (row := _row(each)) is not None]


def _row(found: dict[str, Any]) -> Row | None:
    counts = [found.get(key) for key in ("ranks", "nodes", "ranks_per_node", "bytes")]
    samples = found.get("samples_s")
    if not all(type(count) is int and 0 < count < _MOST_COUNTED for count in counts) or not isinstance(samples, list):
        return None
    if not samples or not all(isinstance(each, int | float) and 0 < each < _MOST_S for each in samples):
        return None
    ranks, nodes, per_node, num_bytes = counts
    return Row(str(found.get("strategy")), ranks, nodes, per_node, num_bytes, tuple(map(float, samples)))  # type: ignore[arg-type]
