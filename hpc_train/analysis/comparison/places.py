"""Which phase changed on which host or rank, against the others of the same run.

What all hosts have in common (a slow day of the network, another version) is a change of the whole job. A place that
changed is one that moved against its neighbours: against the other hosts, or a rank against the others of its host. The
noise that a run's places share cancels, so that few repeats suffice. Only phases in which a rank works on its own
count: in communication it waits for others, and a slow place shows everywhere but there.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hpc_train.analysis.comparison.run_figures import RunFigures
from hpc_train.analysis.stats.estimate import Estimate
from hpc_train.core.records import FloatArray, IntArray
from hpc_train.core.timing_log import COMMUNICATION, PHASES

PlaceKind = Literal["host", "rank"]


@dataclass(frozen=True)
class Place:
    """A host, or a rank of one."""

    kind: PlaceKind
    name: str  # of the host; "3 on c0"
    index: int  # the host's position, or the rank


@dataclass(frozen=True)
class PlaceChange:
    """One phase at one place."""

    phase: str
    place: Place
    before_s: float  # mean seconds of a step
    after_s: float
    ratio: Estimate  # after over before, against its neighbours


def place_changes(before: Sequence[RunFigures], after: Sequence[RunFigures]) -> list[PlaceChange]:
    """Every phase at every place that has neighbours. [] if the sides differ in layout, or with one run on each.

    Hosts are matched by name where all runs used the same, else by their position.
    """
    runs = [*before, *after]
    layouts = {tuple(run.host_names.index(name) for name in _names_by_rank(run)) for run in runs}
    if len(layouts) > 1 or len(runs) < 3:
        return []
    names = runs[0].host_names if same_hosts(runs) else [f"node {index}" for index in range(len(runs[0].host_names))]
    host_of = np.array(next(iter(layouts)))
    found: list[PlaceChange] = []
    for phase in PHASES:
        if phase in COMMUNICATION or not all(phase in run.phases_s for run in runs):
            continue
        by_rank = np.array([run.phases_s[phase] for run in runs])  # (runs, ranks)
        for kind, places, values, groups in _kinds(by_rank, host_of, names):
            if (values > 0).all():
                moves = _against_neighbours(np.log(values), groups, len(before))
                free = sum(len(members) - 1 for members in groups)  # moves of one group add up to about 0
                found += _changes(phase, kind, places, values, moves, free, len(before))
    return found


def same_hosts(runs: Sequence[RunFigures]) -> bool:
    return len({tuple(run.host_names) for run in runs}) == 1


def _names_by_rank(run: RunFigures) -> list[str]:
    return [host or f"the host of rank {rank}" for rank, host in enumerate(run.hosts)]


_Kind = tuple[PlaceKind, list[str], FloatArray, list[list[int]]]  # ..., (runs, places), which are neighbours


def _kinds(by_rank: FloatArray, host_of: IntArray, names: list[str]) -> list[_Kind]:
    num_hosts = len(names)
    ranks_of: dict[int, list[int]] = defaultdict(list)
    for rank, host in enumerate(host_of.tolist()):
        ranks_of[host].append(rank)
    kinds: list[_Kind] = []
    if num_hosts > 1:
        by_host = np.stack([by_rank[:, ranks_of[host]].mean(axis=1) for host in range(num_hosts)], axis=1)
        kinds.append(("host", names, by_host, [list(range(num_hosts))]))
    neighbours = [ranks for ranks in ranks_of.values() if len(ranks) > 1]
    if neighbours:
        labels = [f"{rank} on {names[host]}" for rank, host in enumerate(host_of.tolist())]
        kinds.append(("rank", labels, by_rank, neighbours))
    return kinds


@dataclass(frozen=True, eq=False)
class _Move:
    """How a place moved against its neighbours, in logarithms."""

    place: int
    by_run: FloatArray  # (runs,)


def _against_neighbours(logs: FloatArray, groups: Sequence[Sequence[int]], num_before: int) -> list[_Move]:
    """Each place of three or more against the median of all; of two places the one that moved more against the other.

    logs: (runs, places). Less its mean over the runs: places that always differ make no worse neighbours than others.
    """
    logs = logs - logs.mean(axis=0)
    moves = []
    for members in groups:
        of_group = logs[:, list(members)]
        if len(members) > 2:
            apart = of_group - np.median(of_group, axis=1, keepdims=True)
            moves += [_Move(member, apart[:, index]) for index, member in enumerate(members)]
        else:
            moved = of_group[num_before:].mean(axis=0) - of_group[:num_before].mean(axis=0)
            more = int(np.abs(moved).argmax())
            moves.append(_Move(members[more], of_group[:, more] - of_group[:, 1 - more]))
    return moves


def _changes(
    phase: str,
    kind: PlaceKind,
    names: Sequence[str],
    values: FloatArray,
    moves: Sequence[_Move],
    num_free: int,
    num_before: int,
) -> list[PlaceChange]:
    """The variance from run to run is pooled over the places of the phase; a place that varies more has its own."""
    by_run = np.stack([move.by_run for move in moves], axis=1)  # (runs, moves)
    sides = (by_run[:num_before], by_run[num_before:])
    num_spare = sum(len(side) - 1 for side in sides)
    own = np.sum([((side - side.mean(axis=0)) ** 2).sum(axis=0) for side in sides], axis=0) / num_spare
    squared_errors = np.maximum(own, own.mean()) * sum(1 / len(side) for side in sides)
    differences = sides[1].mean(axis=0) - sides[0].mean(axis=0)
    return [
        PlaceChange(
            phase,
            Place(kind, names[move.place], move.place),
            float(values[:num_before, move.place].mean()),
            float(values[num_before:, move.place].mean()),
            Estimate(float(differences[index]), float(squared_errors[index]), float(num_spare * num_free), True),
        )
        for index, move in enumerate(moves)
    ]
