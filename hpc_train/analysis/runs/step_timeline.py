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
    gap_s: FloatArray  # (rows,) from there to the start of the attempt's next step; 0 after its last
    loops: tuple[Loop, ...]
    rank: int  # the rank whose clock it is

    @property
    def loop_s(self) -> float:
        """Duration of all attempts' loops."""
        return sum(loop.lasted_s for loop in self.loops)

    def after_step(self, step: int, lasted_s: float) -> tuple[int, float, float] | None:
        """(attempt, begin, end) of what took `lasted_s` between the last run of a step and the next step, in seconds of
        the attempt's loop. None if the loop had no such room there: then it happened in another attempt.
        """
        rows = np.flatnonzero(self.step == step)
        if not len(rows):
            return None
        row = int(rows[-1])
        attempt = int(self.attempt[row])
        begin_s = float(self.end_s[row]) - next(loop.before_s for loop in self.loops if loop.attempt == attempt)
        if row + 1 < len(self.step) and self.attempt[row + 1] == attempt and self.gap_s[row] < lasted_s:
            return None
        return attempt, begin_s, begin_s + lasted_s

    def of_first(self, step: int) -> int | None:
        """The row of a step's first run, None if there is none; later rows repeat it."""
        rows = np.flatnonzero(self.step == step)
        return int(rows[0]) if len(rows) else None


EMPTY_TIMELINE = StepTimeline(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0), (), 0)


def timeline_of(run: Run) -> StepTimeline:
    """From the first rank that left timings: all ranks start a loop together, and end each step together."""
    num_workers = run.size - run.num_servers
    rank = next((rank for rank in range(num_workers) if run.dir.timings(rank).is_file()), None)
    if rank is None:
        return EMPTY_TIMELINE
    timings = read_timings(run.dir.timings(rank))
    attempt, begin_ns = timings["attempt"], timings["start_ns"]
    end_ns = begin_ns + timings.phases_ns.sum(axis=1)
    gap_s = np.append((begin_ns[1:] - end_ns[:-1]) * (attempt[1:] == attempt[:-1]) / 1e9, 0.0)[: len(attempt)]
    end_s, loops, before_s = np.zeros(len(attempt)), [], 0.0
    for number in np.unique(attempt).tolist():
        rows = attempt == number
        first_ns = int(begin_ns[rows][0])
        passed_s = (end_ns[rows] - first_ns) / 1e9
        loops.append(Loop(number, first_ns, before_s, float(passed_s[-1])))
        end_s[rows] = before_s + passed_s
        before_s += float(passed_s[-1])
    return StepTimeline(timings["step"], attempt, end_s, gap_s, tuple(loops), rank)
