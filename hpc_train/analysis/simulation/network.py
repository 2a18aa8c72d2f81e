"""The links of a machine, from all-reduces that `hpc-train bench allreduce` measured."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpc_train.analysis.planning.budget import measured_strategy, read_network
from hpc_train.analysis.simulation.collectives import Algorithm, all_reduce
from hpc_train.analysis.simulation.machine import Link, Machine
from hpc_train.core.allreduce_times import COMPRESSED, LIMITS, Row, read_rows
from hpc_train.core.errors import UserError
from hpc_train.core.statistics import nonnegative_least_squares

_FREE = Link(0.0, 0.0)


@dataclass(frozen=True)
class Links:
    """What was measured; None where no two ranks were so placed. overhead_s: of each collective."""

    inside: Link | None
    between: Link | None
    overhead_s: float
    source: str


def read_links(path: Path, strategy: str, algorithm: Algorithm) -> Links:
    """The links as this strategy uses them, or the first one of the file if this was not measured.

    Latencies are those of messages between two ranks. What a small all-reduce takes beyond its rounds of them is
    overhead, which does not grow with the ranks. The seconds per byte, additions included, are those of the all-reduces
    on most ranks: of one node, and one rank on each of several. Raises `UserError`.
    """
    read_network(path, strategy)  # raises if it is no such file
    rows = read_rows(json.loads(path.read_text(encoding="utf-8", errors="replace")))
    measured = list(dict.fromkeys(row.strategy for row in rows if row.strategy not in LIMITS))
    used = measured_strategy(strategy, measured or [strategy])
    inside = _fitted([row for row in rows if row.nodes == 1], used, algorithm)
    between = _fitted([row for row in rows if row.nodes == row.ranks], used, algorithm)
    if inside is None and between is None:
        remedy = "Measure two sizes of messages or more: hpc-train bench allreduce"
        raise UserError(f"{path} holds no times of all-reduces of {used}", remedy)
    overhead_s = max(found[1] for found in (inside, between) if found)
    return Links(inside and inside[0], between and between[0], overhead_s, f"{path.name}, {used}")


def _fitted(rows: Sequence[Row], strategy: str, algorithm: Algorithm) -> tuple[Link, float] | None:
    """(the link, overhead) from rows whose ranks are alike apart; None from fewer than two sizes."""
    most = max((row.ranks for row in rows if row.strategy == strategy), default=0)
    summed = [row for row in rows if row.strategy == strategy and row.ranks == most]
    if len({row.message_bytes for row in summed}) < 2:
        return None
    times_s = np.array([row.time_s for row in summed])
    of_latency, of_bytes = (
        np.array([_in_step_s(row, algorithm, unit) for row in summed]) for unit in (Link(1.0, 0.0), Link(0.0, 1.0))
    )
    if strategy in COMPRESSED:
        of_bytes = of_bytes / 2  # the rows count 32 bits a number
    message = min((row for row in rows if row.strategy == "link"), key=lambda row: row.message_bytes, default=None)
    if message is None:  # nobody timed single messages: a small all-reduce is all latency
        return Link(*_solved(of_latency, of_bytes, times_s, times_s)), 0.0
    left_s = np.maximum(times_s - message.time_s * of_latency, 0.01 * times_s)
    overhead_s, s_per_byte = _solved(np.ones(len(summed)), of_bytes, left_s, times_s)
    return Link(message.time_s, s_per_byte), overhead_s


def _solved(first: np.ndarray, second: np.ndarray, wanted_s: np.ndarray, times_s: np.ndarray) -> tuple[float, float]:
    """Both coefficients, none below 0, by the errors relative to `times_s`: these span six powers of ten."""
    columns = np.stack([first, second], axis=1) / times_s[:, None]
    found = nonnegative_least_squares(columns, wanted_s / times_s)
    return float(found[0]), float(found[1])


def _in_step_s(row: Row, algorithm: Algorithm, link: Link) -> float:
    """Of the row's all-reduce over this link alone."""
    machine = Machine(row.ranks, link, _FREE)
    return float(all_reduce(algorithm, np.zeros((1, row.ranks)), row.message_bytes, machine).max())
