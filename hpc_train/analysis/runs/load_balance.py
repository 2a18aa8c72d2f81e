"""How the ranks of a run shared its steps, and when they arrived at its reductions: the values.

`rank_accumulator.py` and `arrivals.py` compute them. Only steady steps count, of the ranks that train.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hpc_train.core.records import FloatArray, IntArray
from hpc_train.core.timing_log import PHASES

Basis = Literal["arrival", "wait"]


@dataclass(frozen=True, eq=False)
class Latest:
    """Who arrived last at each step's reduction. Row 0 is the last to arrive, row 1 the one before, and so on.

    late_s: (at most 6, steps) seconds after a reference rank, the same for the whole run; -inf if there are no more.
    who: (the same) positions in `LoadBalance.ranks`, or in `Arrivals.hosts`; -1 if there are no more.
    """

    late_s: FloatArray
    who: IntArray


@dataclass(frozen=True, eq=False)
class Arrivals:
    """When ranks arrived at the reductions of the last attempt. R ranks that train, S steady steps of that attempt.

    basis: "arrival": the recorded times on aligned clocks. "wait": if clocks cannot be aligned, how long each rank
    waited, since all leave a reduction together.
    """

    basis: Basis
    latest: Latest
    latest_hosts: Latest
    hosts: tuple[str, ...]  # `latest_hosts.who` indexes them
    host_of: IntArray  # (R,) positions in `hosts`
    late_s: FloatArray  # (R,) mean over steps, after the median rank
    typical_late_s: FloatArray  # (R,) median over steps, after the median rank
    clock_error_s: FloatArray  # (R,) by how much a rank seems to leave reductions before or after the median rank
    map_s: FloatArray  # (at most 256, at most 200) ranks x time: mean lateness, after the mean of all ranks
    step_s: FloatArray  # (S,) time of each step, mean over ranks
    excess_s: FloatArray  # (S,) useful time and input before each reduction: the slowest rank's less the mean
    unaligned: str | None = None  # why the basis is waits

    @property
    def num_steps(self) -> int:
        return len(self.step_s)

    @property
    def whole_s(self) -> float:
        """The time of all these steps."""
        return float(self.step_s.sum())


@dataclass(frozen=True, eq=False)
class LoadBalance:
    """How the ranks that train spent the steady steps. R ranks, B (at most 50) blocks of consecutive steps.

    Useful time is forward, backward, optimizer and other; input is the wait for data; the rest of a step is exposed
    communication, waiting and sending together. A stretch is the useful time between two reductions. Blocks end where
    reductions do: what a rank does after the last reduction of a block counts in the next, and after the last of all in
    the first.
    """

    ranks: IntArray  # (R,)
    hosts: tuple[str | None, ...]  # (R,)
    useful_blocks_s: FloatArray  # (R, B)
    phases_s: FloatArray  # (R, len(PHASES)) sums over the steps
    ideal_s: FloatArray  # (B,) useful time of each stretch's slowest rank, summed
    ideal_input_s: FloatArray  # (B,) the same with the wait for input
    whole_s: FloatArray  # (B,) all time, mean over ranks
    steps: IntArray  # (B,) numbers of steps
    # Standard deviation over ranks of the useful time of a stretch, over its mean, pooled over the steps; None: 1 rank.
    noise: float | None
    imbalance: float | None  # the part of it that persists: of the ranks' sums
    phases_timed: bool  # False: exposed communication was not timed, so useful time is unknown
    arrivals: Arrivals | None  # None: arrival times were not recorded

    @property
    def input_s(self) -> FloatArray:
        """(R,) wait of each rank for its input."""
        return np.asarray(self.phases_s[:, PHASES.index("data")])

    @property
    def useful_s(self) -> FloatArray:
        """(R,) useful time of each rank."""
        return np.asarray(self.useful_blocks_s.sum(axis=1))
