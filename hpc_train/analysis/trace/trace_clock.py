"""One clock for all ranks and attempts of a run: nanoseconds since its first loop began, as the root's clock counts."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from hpc_train.analysis.runs.clocks import Clocks, clocks_of, hosts_of
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import attempts, list_at, text_at
from hpc_train.analysis.runs.step_timeline import Loop, timeline_of
from hpc_train.core.records import IntArray
from hpc_train.core.timing_log import Timings


@dataclass(frozen=True, eq=False)
class TraceClock:
    """Converts times of ranks' own clocks.

    The clocks of the last attempt were compared with the root's. Without that, and in earlier attempts, all ranks are
    taken to begin a loop together, right after a barrier.
    """

    loops: tuple[Loop, ...]  # of the reference rank
    begin_ns: dict[int, int]  # by attempt: when its loop began
    clocks: Clocks | None  # of the last attempt
    reference_ns: int  # the begin of the last loop on the root's clock

    def shown_ns(self, rank: int, rows: Timings, moments_ns: IntArray) -> IntArray:
        """`moments_ns` of the rank's clock, one row or more of each step of one attempt; rows: its steps."""
        attempt, first_ns = int(rows["attempt"][0]), int(rows["start_ns"][0])
        begin_ns = self.begin_ns[attempt]
        if self.clocks is None or attempt != self.loops[-1].attempt:
            return moments_ns - first_ns + begin_ns
        end_ns = int(rows["start_ns"][-1] + rows.phases_ns[-1].sum())
        return self.clocks.aligned_ns(rank, moments_ns, first_ns, end_ns) - self.reference_ns + begin_ns


def trace_clock(run: Run) -> TraceClock:
    timeline = timeline_of(run)
    loops = timeline.loops
    balance = run.load_balance
    is_wrong = balance is not None and balance.arrivals is not None and balance.arrivals.unaligned is not None
    clocks = None if is_wrong else clocks_of(run.meta, hosts_of(run.meta, run.size))
    reference_ns = 0
    if loops and clocks is not None:
        last = loops[-1]
        end_ns = last.begin_ns + round(last.lasted_s * 1e9)
        moment = np.array([last.begin_ns], np.int64)
        reference_ns = int(clocks.aligned_ns(timeline.rank, moment, last.begin_ns, end_ns)[0])
    return TraceClock(loops, _begins(run, loops), clocks, reference_ns)


def _begins(run: Run, loops: tuple[Loop, ...]) -> dict[int, int]:
    """When each attempt's loop began, from the reference rank's clock, or the time of day if that clock restarted."""
    entries = entries_by_attempt(run)
    begins: dict[int, int] = {}
    for before, loop in zip((None, *loops), loops, strict=False):
        if before is None:
            begins[loop.attempt] = 0
            continue
        end_ns = begins[before.attempt] + round(before.lasted_s * 1e9)
        one, other = entries.get(before.attempt, {}), entries.get(loop.attempt, {})
        since_ns = loop.begin_ns - before.begin_ns
        if list_at(one, "hosts")[:1] != list_at(other, "hosts")[:1] or begins[before.attempt] + since_ns < end_ns:
            since_ns = _apart_ns(text_at(one, "started"), text_at(other, "started"))
        begins[loop.attempt] = max(end_ns, begins[before.attempt] + since_ns)
    return begins


def entries_by_attempt(run: Run) -> dict[int, dict[str, Any]]:
    """What meta.json says of each attempt."""
    return {number: entry for entry in attempts(run.meta) if type(number := entry.get("attempt")) is int}


def _apart_ns(one: str | None, other: str | None) -> int:
    """Between two times as meta.json has them; 0 if one is unknown."""
    try:
        moments = [datetime.fromisoformat(text or "") for text in (one, other)]
        return round((moments[1] - moments[0]).total_seconds() * 1e9)
    except (ValueError, TypeError):  # TypeError: one has a time zone
        return 0
