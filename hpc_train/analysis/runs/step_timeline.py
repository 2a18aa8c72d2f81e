"""When each step of a run ended, on one rank's clock: the time of all attempts' loops, warm-up included."""

from dataclasses import dataclass

import numpy as np

from hpc_train.analysis.runs.load import Run
from hpc_train.core.records import FloatArray, IntArray
from hpc_train.core.timing_log import read_timings


@dataclass(frozen=True)
class Loop:
    """The loop of one attempt: from the start of its first recorded step to the end of its last."""

    attempt: int
    begin_ns: int  # of the rank's clock
    before_s: float  # duration of earlier attempts' loops
    lasted_s: float


@dataclass(frozen=True, eq=False)
class StepTimeline:
    """One row per recorded step, repeated ones included. Time between attempts does not count."""

    step: IntArray  # (rows,)
    attempt: IntArray  # (rows,)
    end_s: FloatArray  # (rows,) seconds of loops until the step's end, including earlier attempts'
    loops: tuple[Loop, ...]
    rank: int  # the rank whose clock it is

    @property
    def loop_s(self) -> float:
        """Duration of all attempts' loops."""
        return sum(loop.lasted_s for loop in self.loops)

    def of_first(self, step: int) -> int | None:
        """The row of a step's first run, None if there is none; later rows repeat it."""
        rows = np.flatnonzero(self.step == step)
        return int(rows[0]) if len(rows) else None

    def of_last(self, step: int) -> int | None:
        """The row of a step's last run, None if there is none."""
        rows = np.flatnonzero(self.step == step)
        return int(rows[-1]) if len(rows) else None


EMPTY_TIMELINE = StepTimeline(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), (), 0)


def timeline_of(run: Run) -> StepTimeline:
    """From the first rank that left timings: all ranks start a loop together, and end each step together."""
    num_workers = run.size - run.num_servers
    rank = next((rank for rank in range(num_workers) if run.dir.timings(rank).is_file()), None)
    if rank is None:
        return EMPTY_TIMELINE
    timings = read_timings(run.dir.timings(rank))
    attempt, begin_ns = timings["attempt"], timings["start_ns"]
    end_ns = begin_ns + timings.phases_ns.sum(axis=1)
    end_s, loops, before_s = np.zeros(len(attempt)), [], 0.0
    for number in np.unique(attempt).tolist():
        rows = attempt == number
        first_ns = int(begin_ns[rows][0])
        passed_s = (end_ns[rows] - first_ns) / 1e9
        loops.append(Loop(number, first_ns, before_s, float(passed_s[-1])))
        end_s[rows] = before_s + passed_s
        before_s += float(passed_s[-1])
    return StepTimeline(timings["step"], attempt, end_s, tuple(loops), rank)
