"""The load balance of a run, accumulated one rank at a time: every rank's records are read once and dropped."""

from dataclasses import dataclass
from math import sqrt

import numpy as np

from hpc_train.analysis.runs.arrivals import ArrivalAccumulator
from hpc_train.analysis.runs.clocks import Clocks, Hosts
from hpc_train.analysis.runs.load_balance import LoadBalance
from hpc_train.core.records import FloatArray, IntArray
from hpc_train.core.statistics import NUM_BLOCKS
from hpc_train.core.timing_log import Timings


class RankAccumulator:
    """Takes the ranks one after the other, all of a host before the next host's; then computes their load balance.

    Memory grows with the ranks and with the steps, not with their product. clocks: None if they cannot be aligned.
    waits: whether ranks wait for each other in reductions.
    """

    def __init__(self, hosts: Hosts, clocks: Clocks | None, waits: bool) -> None:
        self._hosts, self._clocks, self._waits = hosts, clocks, waits
        self._ranks: list[int] = []
        self._useful_s: list[FloatArray] = []  # of each rank: (B,)
        self._phases_ns: list[IntArray] = []  # of each rank: (len(PHASES),)
        self._exposed_ns = 0
        self._marked_ns = 0  # in phases that the loop marked itself
        self._stretches: _StretchAccumulator | None = None
        self._step_ns = np.zeros(0)
        self._arrivals: ArrivalAccumulator | None = None

    def add(self, rank: int, timings: Timings) -> None:
        """One rank's steps, of which all ranks recorded the same number."""
        rows = timings.steady
        if not len(rows.values):
            return
        if self._stretches is None:
            self._stretches, self._step_ns = _StretchAccumulator(rows["attempt"]), np.zeros(len(rows.values))
            self._arrivals = ArrivalAccumulator(rows["attempt"], self._hosts, self._clocks) if self._waits else None
        spent = _Spent.of(rows)
        self._useful_s.append(self._stretches.add(spent) / 1e9)
        self._step_ns += spent.step
        self._ranks.append(rank)
        self._phases_ns.append(rows.phases_ns.sum(axis=0))
        self._exposed_ns += int(spent.exposed.sum())
        self._marked_ns += int((spent.step - rows["other_ns"]).sum())
        if not spent.has_arrivals:  # one rank without them leaves nothing to compare
            self._arrivals = None
        if self._arrivals:
            self._arrivals.add(rank, timings, rows)

    def load_balance(self) -> LoadBalance | None:
        """None without a steady step."""
        if self._stretches is None:
            return None
        order = np.argsort(self._ranks)
        ranks = np.array(self._ranks, dtype=np.int64)[order]
        several = len(ranks) > 1
        timed = self._marked_ns > 0 and (self._exposed_ns > 0 or not several or not self._waits)
        arrivals = None
        if self._arrivals and timed and several:
            arrivals = self._arrivals.arrivals(order, self._step_ns, self._stretches.excess_s(len(ranks)))
        useful_s = np.stack(self._useful_s)[order]
        ideal_s, ideal_input_s = self._stretches.ideal_s()
        sums = useful_s.sum(axis=1)
        return LoadBalance(
            ranks,
            hosts=tuple(self._hosts[rank] for rank in ranks),
            useful_blocks_s=useful_s,
            phases_s=np.stack(self._phases_ns)[order] / 1e9,
            ideal_s=ideal_s,
            ideal_input_s=ideal_input_s,
            whole_s=self._stretches.whole_s(len(ranks)),
            steps=self._stretches.block_sizes(),
            noise=self._stretches.noise(len(ranks)) if timed else None,
            imbalance=float(sums.std(ddof=1) / sums.mean()) if timed and several and sums.any() else None,
            phases_timed=timed,
            arrivals=arrivals,
        )


@dataclass(frozen=True, eq=False)
class _Spent:
    """What one rank spent its steady steps on, (steps,) in ns each."""

    step: IntArray
    input_wait: IntArray
    exposed: IntArray
    before: IntArray  # useful, before the reduction
    has_arrivals: bool  # whether the arrivals at the reductions were recorded

    @classmethod
    def of(cls, rows: Timings) -> "_Spent":
        step, input_wait = rows.phases_ns.sum(axis=1), rows["data_ns"]
        exposed = rows["reduce_ns"] + rows["sync_ns"]
        useful = step - input_wait - exposed
        before = rows["arrived_ns"] - rows["start_ns"]
        has_arrivals = bool(((before >= 0) & (before <= step)).all())
        return cls(
            step, input_wait, exposed, np.clip(before - input_wait, 0, useful) if has_arrivals else useful, has_arrivals
        )

    @property
    def useful(self) -> IntArray:
        return self.step - self.input_wait - self.exposed


class _StretchAccumulator:
    """Stretches between reductions: the slowest rank's, and how ranks differ.

    attempts: (steady steps,) the attempt of each; a stretch does not reach across attempts.
    """

    def __init__(self, attempts: IntArray) -> None:
        num_steps = len(attempts)
        self._follows = np.flatnonzero(np.diff(attempts) == 0) + 1  # steps that follow a steady step of their attempt
        # The last steps of attempts: the work after their reduction is a stretch of its own.
        self._last = np.flatnonzero(np.diff(attempts, append=-1) != 0)
        block = np.arange(num_steps) * min(NUM_BLOCKS, num_steps) // num_steps
        self._block_of_step = block
        # They complete the attempt's first stretch, which lacks the work before it: so no block is out of the ordinary.
        begin = np.flatnonzero(np.diff(attempts, prepend=-1) != 0)
        self._block_of_stretch = np.concatenate([block, block[begin]])
        self._num_blocks = int(block[-1]) + 1
        num_stretches = len(self._block_of_stretch)
        self._slowest, self._slowest_with_input = np.zeros(num_stretches), np.zeros(num_stretches)
        self._whole, self._with_input = np.zeros(num_stretches), np.zeros(num_stretches)  # summed over ranks
        self._first: FloatArray | None = None
        self._sum, self._sum_of_squares = np.zeros(num_steps), np.zeros(num_steps)

    def add(self, spent: _Spent) -> FloatArray:
        """(B,) the rank's useful time."""
        stretch = spent.before.astype(np.float64)
        after = (spent.useful - spent.before).astype(np.float64)
        stretch[self._follows] += after[self._follows - 1]
        self._first = stretch if self._first is None else self._first
        more = stretch - self._first  # small numbers: squares of whole times would lose the digits of the variance
        self._sum += more
        self._sum_of_squares += more * more
        rest = after[self._last]
        with_input = np.concatenate([stretch + spent.input_wait, rest])
        np.maximum(self._slowest, np.concatenate([stretch, rest]), out=self._slowest)
        np.maximum(self._slowest_with_input, with_input, out=self._slowest_with_input)
        self._with_input += with_input
        self._whole += np.concatenate([stretch + spent.input_wait + spent.exposed, rest])
        return self._block_sums(np.concatenate([stretch, rest]))

    def _block_sums(self, values: FloatArray) -> FloatArray:
        """(B,) sums of one value a stretch."""
        return np.asarray(np.bincount(self._block_of_stretch, values, self._num_blocks), dtype=np.float64)

    def whole_s(self, num_ranks: int) -> FloatArray:
        """(B,) mean over ranks."""
        return self._block_sums(self._whole) / num_ranks / 1e9

    def block_sizes(self) -> IntArray:
        """(B,) numbers of steps."""
        return np.bincount(self._block_of_step, minlength=self._num_blocks)

    def ideal_s(self) -> tuple[FloatArray, FloatArray]:
        """(B,) sums of the slowest rank's useful time, and of its useful time and input."""
        return self._block_sums(self._slowest) / 1e9, self._block_sums(self._slowest_with_input) / 1e9

    def excess_s(self, num_ranks: int) -> FloatArray:
        """(steps,) useful time and input before each step's reduction, the slowest rank's less the mean."""
        excess_ns = self._slowest_with_input - self._with_input / num_ranks
        return np.asarray(excess_ns[: len(self._block_of_step)] / 1e9)

    def noise(self, num_ranks: int) -> float | None:
        if num_ranks < 2 or self._first is None:
            return None
        variance = (self._sum_of_squares - self._sum**2 / num_ranks) / (num_ranks - 1)
        mean = float((self._first + self._sum / num_ranks).mean())
        return sqrt(max(0.0, float(variance.mean()))) / mean if mean else None
