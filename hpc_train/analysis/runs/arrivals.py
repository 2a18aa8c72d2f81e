"""When ranks arrive at reductions: accumulated one rank at a time, since ranks times steps may exceed the memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc_train.analysis.runs.clocks import Clocks, Hosts
from hpc_train.analysis.runs.load_balance import Arrivals, Latest
from hpc_train.core.records import FloatArray, IntArray
from hpc_train.core.timing_log import Timings

_NUM_LATEST = 6  # ranks kept of each step: one fewer can be named as stragglers
_MAP_RANKS, _MAP_TIMES = 256, 200
_NUM_CHECKS = 8  # parts of a run in which clocks are compared


class _LatestRanks:
    """The latest few members (ranks or hosts) of each step."""

    def __init__(self, num_steps: int) -> None:
        self._late = np.full((_NUM_LATEST, num_steps), -np.inf)
        self._who = np.full((_NUM_LATEST, num_steps), -1, dtype=np.int64)

    def add(self, late: FloatArray, who: int) -> None:
        at = np.flatnonzero(late > self._late[-1])
        if not len(at):
            return
        late_of = np.vstack([self._late[:, at], late[at]])
        who_of = np.vstack([self._who[:, at], np.full(len(at), who)])
        order = np.argsort(-late_of, axis=0, kind="stable")[:_NUM_LATEST]
        self._late[:, at] = np.take_along_axis(late_of, order, axis=0)
        self._who[:, at] = np.take_along_axis(who_of, order, axis=0)

    def latest(self) -> Latest:
        return Latest(self._late / 1e9, self._who)


@dataclass(frozen=True)
class _Lateness:
    """One rank's arrivals after the reference rank's."""

    host: int
    mean_ns: float
    median_ns: float
    leaves_ns: FloatArray  # (checks,) by how much it leaves reductions after the reference rank


class ArrivalAccumulator:
    """Takes the ranks one after the other, all of a host before the next host's, and keeps what `Arrivals` needs."""

    def __init__(self, attempts: IntArray, hosts: Hosts, clocks: Clocks | None) -> None:
        self._clocks = clocks
        names = [host if host is not None else f"the host of rank {rank}" for rank, host in enumerate(hosts)]
        self._hosts = {name: index for index, name in enumerate(dict.fromkeys(names))}
        self._host_of = [self._hosts[name] for name in names]
        self._attempt = int(attempts[-1])
        self._begin = int(np.argmax(attempts == self._attempt))
        num_steps = len(attempts) - self._begin
        self._top, self._top_hosts = _LatestRanks(num_steps), _LatestRanks(num_steps)
        self._reference: tuple[IntArray, IntArray] | None = None  # when the first rank arrives and leaves
        self._host: tuple[int, FloatArray] | None = None  # the current one, and its latest rank in each step
        self._num_added = 0
        self._lateness: list[_Lateness] = []
        self._times = np.arange(0, num_steps, -(-num_steps // _MAP_TIMES))
        part = max(1, num_steps // _NUM_CHECKS)  # one row a check: its steps
        self._checks = np.arange(num_steps // part * part).reshape(-1, part)
        self._map = np.zeros((min(_MAP_RANKS, len(hosts)), len(self._times)))
        self._map_ranks = np.zeros(len(self._map))

    def add(self, rank: int, timings: Timings, rows: Timings) -> None:
        """timings: all of the rank's steps; rows: the steady ones."""
        exposed = rows["reduce_ns"][self._begin :]
        if self._clocks is None:
            arrived, left = -exposed, np.zeros_like(exposed)
        else:
            last = Timings(timings.values[timings["attempt"] == self._attempt], False)
            began, ended = int(last["start_ns"][0]), int(last["start_ns"][-1] + last.phases_ns[-1].sum())
            times_ns = rows["arrived_ns"][self._begin :]
            arrived = self._clocks.aligned_ns(rank, times_ns, began, ended)
            left = arrived + exposed
        self._reference = (arrived, left) if self._reference is None else self._reference
        late = (arrived - self._reference[0]).astype(np.float64)
        host, index = self._host_of[rank], self._num_added
        self._top.add(late, index)
        if self._host is not None and self._host[0] == host:
            np.maximum(self._host[1], late, out=self._host[1])
        else:
            self._end_host()
            self._host = (host, late.copy())
        apart = left - self._reference[1]
        lateness = _Lateness(host, float(late.mean()), float(_median(late)), _median(apart[self._checks]))
        self._lateness.append(lateness)
        row = rank * len(self._map) // len(self._host_of)
        self._map[row] += np.add.reduceat(late, self._times)
        self._map_ranks[row] += 1
        self._num_added += 1

    def _end_host(self) -> None:
        if self._host is not None:
            self._top_hosts.add(self._host[1], self._host[0])

    def arrivals(self, order: IntArray, whole_ns: FloatArray, excess_s: FloatArray) -> Arrivals:
        """order: positions in which ranks were added, sorted by rank; whole_ns: of all steady steps, over all ranks.

        excess_s: see `Arrivals`, of all steady steps.
        """
        self._end_host()
        self._host = None
        mean = np.array([each.mean_ns for each in self._lateness])[order] / 1e9
        median = np.array([each.median_ns for each in self._lateness])[order] / 1e9
        checks = np.stack([each.leaves_ns for each in self._lateness])[order] / 1e9
        position = np.empty(len(order) + 1, dtype=np.int64)
        position[order] = np.arange(len(order))
        position[-1] = -1  # who = -1 stays -1
        latest = self._top.latest()
        counts = np.diff(np.append(self._times, len(latest.who[0])))
        known = self._map_ranks > 0
        cells = self._map[known] / self._map_ranks[known, None]
        all_ranks = self._map.sum(axis=0) / len(order)
        return Arrivals(
            "wait" if self._clocks is None else "arrival",
            Latest(latest.late_s, position[latest.who]),
            self._top_hosts.latest(),
            tuple(self._hosts),
            np.array([each.host for each in self._lateness])[order],
            mean - np.median(mean),
            median - np.median(median),
            np.abs(checks - np.median(checks, axis=0)).max(axis=1),
            (cells - all_ranks) / counts / 1e9,
            whole_ns[self._begin :] / len(order) / 1e9,
            excess_s[self._begin :],
        )


def _median(values: npt.NDArray[Any]) -> FloatArray:
    """The median along the last axis, the upper of two: np.median takes five times as long for a few values."""
    middle = values.shape[-1] // 2
    return np.asarray(np.partition(values, middle, axis=-1)[..., middle], dtype=np.float64)
