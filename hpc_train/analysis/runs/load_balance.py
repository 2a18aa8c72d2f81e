"""How the ranks of a run shared its steps and waited for each other: gathered one rank at a time.

Every rank's records are read once and dropped: what is kept grows with the ranks and with the steps, not with their
product. Steady steps alone count, of the ranks that train.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpc_train.analysis.runs.clocks import Clocks, Hosts
from hpc_train.core.records import PHASES, FloatArray, IntArray
from hpc_train.core.timings import Timings

NUM_BLOCKS = 50  # of consecutive steps, which the bootstrap draws
_NUM_LATEST = 6  # ranks that are known of each step: one fewer can be told to hold up the others
_MAP_RANKS, _MAP_TIMES = 256, 200
_NUM_CHECKS = 8  # parts of a run in which the clocks are compared
Basis = Literal["arrival", "wait"]


@dataclass(frozen=True, eq=False)
class Latest:
    """Who arrived last at each step's reduction. Row 0 is the last to come, row 1 the one before, and so on.

    late_s: (at most 6, steps) later than a rank that is the same for the whole run, -inf where there are no more.
    who: (the same) positions in `LoadBalance.ranks`, or in `Arrivals.hosts`; -1 where there are no more.
    """

    late_s: FloatArray
    who: IntArray


@dataclass(frozen=True, eq=False)
class Arrivals:
    """When ranks came to the reductions of the last attempt. R ranks that train, S steady steps of that attempt.

    basis: "arrival": the recorded moments on aligned clocks. "wait": where clocks cannot be aligned, how long each rank
    waited, as all leave a reduction together.
    """

    basis: Basis
    latest: Latest
    latest_hosts: Latest
    hosts: tuple[str, ...]  # the names that `latest_hosts.who` counts
    host_of: IntArray  # (R,) positions in `hosts`
    late_s: FloatArray  # (R,) mean over steps, later than the median rank
    typical_late_s: FloatArray  # (R,) median over steps, later than the median rank
    clock_error_s: FloatArray  # (R,) how far a rank seems to leave reductions before or after the median rank
    map_s: FloatArray  # (at most 256, at most 200) ranks x time: mean lateness, later than the mean of all ranks
    step_s: FloatArray  # (S,) time of each step, mean over ranks
    unaligned: str | None = None  # why waits are the basis

    @property
    def num_steps(self) -> int:
        return len(self.step_s)

    @property
    def whole_s(self) -> float:
        """Time of all these steps."""
        return float(self.step_s.sum())


@dataclass(frozen=True, eq=False)
class LoadBalance:
    """What the ranks that train did in the steady steps. R ranks, B at most 50 blocks of consecutive steps.

    Useful time is forward, backward, optimizer and other; input is the wait for data; exposed is the time in the
    reduction, waiting and sending together. A stretch is the useful time between two reductions.
    """

    ranks: IntArray  # (R,)
    hosts: tuple[str | None, ...]  # (R,)
    useful_blocks_s: FloatArray  # (R, B)
    input_s: FloatArray  # (R,)
    exposed_s: FloatArray  # (R,)
    ideal_s: FloatArray  # (B,) sums of each stretch's slowest rank's useful time
    ideal_input_s: FloatArray  # (B,) the same of useful time and input together
    whole_s: FloatArray  # (B,) time of the steps, mean over ranks
    steps: IntArray  # (B,) numbers of steps
    # Standard deviation over ranks of the useful time of a stretch, over its mean, pooled over the steps; None: 1 rank.
    noise: float | None
    imbalance: float | None  # the part of it that lasts: of the ranks' sums
    phases_told: bool  # False: exposed communication was not timed, so useful time is not known
    arrivals: Arrivals | None  # None: the moments were not recorded

    @property
    def useful_s(self) -> FloatArray:
        """(R,) useful time of each rank."""
        return np.asarray(self.useful_blocks_s.sum(axis=1))


class _Top:
    """The latest few of each step, and who they are, while they are gathered."""

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


class _Slowest:
    """Stretches between reductions: the slowest rank's, and how ranks differ. Of steady rows in several attempts."""

    def __init__(self, attempts: IntArray) -> None:
        num_steps = len(attempts)
        self._follows = np.flatnonzero(np.diff(attempts) == 0) + 1  # rows that follow a steady row of their attempt
        self._last = np.flatnonzero(np.diff(attempts, append=-1) != 0)  # what follows their reduction stands alone
        block = np.arange(num_steps) * min(NUM_BLOCKS, num_steps) // num_steps
        self.block_of = np.concatenate([block, block[self._last]])
        self.num_blocks = int(block[-1]) + 1
        self._busy, self._busy_input = np.zeros(len(self.block_of)), np.zeros(len(self.block_of))
        self._first: FloatArray | None = None
        self._sum, self._sum_of_squares = np.zeros(num_steps), np.zeros(num_steps)

    def add(self, before: FloatArray, after: FloatArray, stall: FloatArray) -> None:
        """Useful ns before and after each step's reduction, and the wait for input."""
        stretch = before.copy()
        stretch[self._follows] += after[self._follows - 1]
        self._first = stretch if self._first is None else self._first
        more = stretch - self._first
        self._sum += more
        self._sum_of_squares += more * more
        rest = after[self._last]
        np.maximum(self._busy, np.concatenate([stretch, rest]), out=self._busy)
        np.maximum(self._busy_input, np.concatenate([stretch + stall, rest]), out=self._busy_input)

    def ideal_s(self) -> tuple[FloatArray, FloatArray]:
        """(B,) sums of the slowest rank's useful time, and of its useful time and input."""
        sums = [np.bincount(self.block_of, busy, self.num_blocks) / 1e9 for busy in (self._busy, self._busy_input)]
        return sums[0], sums[1]

    def noise(self, num_ranks: int) -> float | None:
        if num_ranks < 2 or self._first is None:
            return None
        variance = (self._sum_of_squares - self._sum**2 / num_ranks) / (num_ranks - 1)
        mean = float((self._first + self._sum / num_ranks).mean())
        return sqrt(max(0.0, float(variance.mean()))) / mean if mean else None


class RankAccumulator:
    """Takes the ranks one after the other, all of a host before the next host's; then tells their balance.

    clocks: None: they cannot be aligned. waits: whether a reduction makes ranks wait for each other at all.
    """

    def __init__(self, hosts: Hosts, clocks: Clocks | None, waits: bool) -> None:
        self._hosts, self._clocks, self._waits = hosts, clocks, waits
        self._ranks: list[int] = []
        self._sums: list[FloatArray] = []  # of each rank: (B,) useful time
        self._input: list[int] = []
        self._exposed: list[int] = []
        self._marked = 0  # ns of phases that a loop must mark
        self._slowest: _Slowest | None = None
        self._whole: FloatArray | None = None
        self._coming: _Coming | None = None

    def add(self, rank: int, timings: Timings) -> None:
        """One rank's steps, of which all ranks recorded the same number."""
        rows = timings.steady
        if not len(rows.values):
            return
        phases = dict(zip(PHASES, rows.phases_ns.T, strict=True))
        if self._slowest is None or self._whole is None:
            self._slowest, self._whole = _Slowest(rows["attempt"]), np.zeros(len(rows.values))
            self._coming = _Coming(rows["attempt"], self._hosts, self._clocks) if self._waits else None
        stall, exposed = phases["data"], phases["reduce"] + phases["sync"]
        whole = rows.phases_ns.sum(axis=1)
        useful = whole - stall - exposed
        before = rows["arrived_ns"] - rows["start_ns"]
        told = bool(((before >= 0) & (before <= whole)).all())
        before = np.clip(before - stall, 0, useful) if told else useful
        self._slowest.add(before.astype(np.float64), (useful - before).astype(np.float64), stall.astype(np.float64))
        self._whole += whole
        self._ranks.append(rank)
        block_of = self._slowest.block_of[: len(useful)]
        self._sums.append(np.bincount(block_of, useful, self._slowest.num_blocks) / 1e9)
        self._input.append(int(stall.sum()))
        self._exposed.append(int(exposed.sum()))
        self._marked += int(whole.sum() - phases["other"].sum())
        if not told:
            self._coming = None
        if self._coming:
            self._coming.add(rank, timings, rows)

    def balance(self) -> LoadBalance | None:
        """None where there was no steady step."""
        if self._slowest is None or self._whole is None:
            return None
        order = np.argsort(self._ranks)
        ranks = np.array(self._ranks, dtype=np.int64)[order]
        ideal_s, ideal_input_s = self._slowest.ideal_s()
        block_of = self._slowest.block_of[: len(self._whole)]
        useful = np.stack(self._sums)[order]
        phases_told = self._marked > 0 and (sum(self._exposed) > 0 or len(ranks) == 1 or not self._waits)
        arrivals = (
            self._coming.arrivals(order, self._whole) if self._coming and phases_told and len(ranks) > 1 else None
        )
        sums = useful.sum(axis=1)
        return LoadBalance(
            ranks,
            tuple(self._hosts[rank] for rank in ranks),
            useful,
            np.array(self._input)[order] / 1e9,
            np.array(self._exposed)[order] / 1e9,
            ideal_s,
            ideal_input_s,
            np.bincount(block_of, self._whole, self._slowest.num_blocks) / len(ranks) / 1e9,
            np.bincount(block_of, minlength=self._slowest.num_blocks),
            noise=self._slowest.noise(len(ranks)) if phases_told else None,
            imbalance=float(sums.std(ddof=1) / sums.mean()) if phases_told and len(ranks) > 1 and sums.any() else None,
            phases_told=phases_told,
            arrivals=arrivals,
        )


def _middle(values: npt.NDArray[Any]) -> FloatArray:
    """The median along the last axis, the larger one of two: np.median takes five times as long for a few values."""
    middle = values.shape[-1] // 2
    return np.asarray(np.partition(values, middle, axis=-1)[..., middle], dtype=np.float64)


class _Coming:
    """Arrivals at the reductions of the last attempt, while they are gathered."""

    def __init__(self, attempts: IntArray, hosts: Hosts, clocks: Clocks | None) -> None:
        self._clocks = clocks
        names = [host if host is not None else f"the host of rank {rank}" for rank, host in enumerate(hosts)]
        self._hosts = {name: index for index, name in enumerate(dict.fromkeys(names))}
        self._host_of = [self._hosts[name] for name in names]
        self._attempt = int(attempts[-1])
        self._begin = int(np.argmax(attempts == self._attempt))
        num_steps = len(attempts) - self._begin
        self._top, self._top_hosts = _Top(num_steps), _Top(num_steps)
        self._base: tuple[IntArray, IntArray] | None = None  # arrivals and leaves of the first rank
        self._host: tuple[int, FloatArray] | None = None  # the one at hand, and its latest rank in each step
        self._num_added = 0
        self._of_rank: list[tuple[int, int, float, float, FloatArray]] = []
        self._times = np.arange(0, num_steps, -(-num_steps // _MAP_TIMES))
        part = max(1, num_steps // _NUM_CHECKS)  # the steps of each check, a row
        self._checks = np.arange(num_steps // part * part).reshape(-1, part)
        self._map = np.zeros((min(_MAP_RANKS, len(hosts)), len(self._times)))
        self._map_ranks = np.zeros(len(self._map))

    def add(self, rank: int, timings: Timings, rows: Timings) -> None:
        """timings: all of the rank's steps; rows: the steady ones."""
        exposed = rows["reduce_ns"][self._begin :]
        if self._clocks is None:
            came, left = -exposed, np.zeros_like(exposed)
        else:
            own = timings.values[timings["attempt"] == self._attempt]
            last = Timings(own, False)
            ended = int(last["start_ns"][-1] + last.phases_ns[-1].sum())
            moments = rows["arrived_ns"][self._begin :]
            came = self._clocks.aligned_ns(rank, moments, int(last["start_ns"][0]), ended)
            left = came + exposed
        self._base = (came, left) if self._base is None else self._base
        late = (came - self._base[0]).astype(np.float64)
        host, index = self._host_of[rank], self._num_added
        self._top.add(late, index)
        if self._host is not None and self._host[0] == host:
            np.maximum(self._host[1], late, out=self._host[1])
        else:
            self._end_host()
            self._host = (host, late.copy())
        apart = left - self._base[1]
        self._of_rank.append((rank, host, float(late.mean()), float(_middle(late)), _middle(apart[self._checks])))
        row = rank * len(self._map) // len(self._host_of)
        self._map[row] += np.add.reduceat(late, self._times)
        self._map_ranks[row] += 1
        self._num_added += 1

    def _end_host(self) -> None:
        if self._host is not None:
            self._top_hosts.add(self._host[1], self._host[0])

    def arrivals(self, order: IntArray, whole_ns: FloatArray) -> Arrivals:
        """order: positions in which ranks were added, sorted by rank; whole_ns: of all steady steps, over all ranks."""
        self._end_host()
        self._host = None
        mean, typical = (np.array([one[column] for one in self._of_rank])[order] / 1e9 for column in (2, 3))
        checks = np.stack([one[4] for one in self._of_rank])[order] / 1e9
        place = np.empty(len(order) + 1, dtype=np.int64)
        place[order] = np.arange(len(order))
        place[-1] = -1
        latest = self._top.latest()
        counts = np.diff(np.append(self._times, len(latest.who[0])))
        known = self._map_ranks > 0
        cells = self._map[known] / self._map_ranks[known, None]
        all_ranks = self._map.sum(axis=0) / len(order)
        return Arrivals(
            "wait" if self._clocks is None else "arrival",
            Latest(latest.late_s, place[latest.who]),
            self._top_hosts.latest(),
            tuple(self._hosts),
            np.array([one[1] for one in self._of_rank])[order],
            mean - np.median(mean),
            typical - np.median(typical),
            np.abs(checks - np.median(checks, axis=0)).max(axis=1),
            (cells - all_ranks) / counts / 1e9,
            whole_ns[self._begin :] / len(order) / 1e9,
        )
