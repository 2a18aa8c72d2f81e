"""Amdahl's and Gustafson's laws, fitted to measured speedups and drawn beside them.

Both split the baseline's time into a part that more ranks shorten and a serial part that they do not. They are a
reference within the measured sizes, not a prediction beyond them: `hpc-train plan` has models for that.
"""

from dataclasses import dataclass

import numpy as np

from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.statistics import Interval

_CLOSE = 0.01  # to the ideal speedup: a law that stays closer adds nothing to the ideal


@dataclass(frozen=True)
class Law:
    """Amdahl's law (strong scaling) or Gustafson's (weak scaling) with its one parameter fitted.

    With r = ranks / baseline ranks and s the serial part of the baseline's time (Amdahl, "Validity of the single
    processor approach to achieving large scale computing capabilities", AFIPS 1967): S = 1 / (s + (1 - s) / r);
    Gustafson ("Reevaluating Amdahl's law", Communications of the ACM 31(5), 1988): S = s + (1 - s) r.
    """

    weak: bool
    serial: float  # part of the baseline's time, 0 to 1
    num_sizes: int  # that it was fitted to, including the baseline
    worst: float  # largest relative deviation of a measured speedup

    @property
    def name(self) -> str:
        return law_name(self.weak)

    def speedup(self, times: float) -> float:
        """Over the baseline, on `times` its ranks."""
        s = self.serial
        return s + (1 - s) * times if self.weak else 1 / (s + (1 - s) / times)


def law_name(weak: bool) -> str:
    return "Gustafson" if weak else "Amdahl"


def fitted(group: Group) -> Law | None:
    """The law of the group's complete rows; None for one size, or if no serial part describes them.

    Least squares of relative deviations, where the law is linear in s: Amdahl's in the time 1 / S, Gustafson's in S
    itself. A serial part below 0 is a speedup beyond the ideal, one above 1 a slowdown: no share of the time is either.
    """
    if group.baseline is None:
        return None
    rows = [row for row in group.rows if row.speedup and not row.incomplete]
    if len({row.size for row in rows}) < 2:
        return None
    r = np.array([row.size / group.baseline.size for row in rows])
    measured = np.array([row.speedup for row in rows], dtype=float)
    ideal, seen = (r, measured) if group.weak else (1 / r, 1 / measured)
    slope, offset = (1 - ideal) / seen, 1 - ideal / seen
    serial = float(slope @ offset / (slope @ slope))
    law = Law(group.weak, serial, len(rows), 0.0)
    if not 0 < serial < 1 or law.speedup(float(r.max())) > (1 - _CLOSE) * r.max():
        return None
    worst = float(np.max(np.abs(np.array([law.speedup(each) for each in r]) / measured - 1)))
    return Law(group.weak, serial, len(rows), worst)


@dataclass(frozen=True)
class SerialPart:
    """The part of the baseline's time that one row's speedup leaves serial; below 0: a speedup beyond the ideal.

    Strong scaling: e = (1 / S - 1 / r) / (1 - 1 / r) (Karp and Flatt, "Measuring parallel processor performance",
    Communications of the ACM 33(5), 1990, there for r processors). Weak scaling: Gustafson's law solved for it. A part
    that grows with the ranks is no serial part but overhead, which a law with one part cannot describe.
    """

    part: float
    interval: Interval | None  # 95%: the part at the ends of the speedup's interval


def serial_part(row: Row) -> SerialPart | None:
    """Of a complete row of another size than its baseline's; None of others."""
    if row.relative_speed is None or row.incomplete or row.baseline_size is None or row.baseline_size == row.size:
        return None
    speedup, ends = row.relative_speed.value, row.speedup_interval
    times, weak = row.size / row.baseline_size, row.runs[0].config.train.batch_per_rank is not None
    interval = None if ends is None or not ends[0] else (_serial(ends[1], times, weak), _serial(ends[0], times, weak))
    return SerialPart(_serial(speedup, times, weak), interval)


def _serial(speedup: float, times: float, weak: bool) -> float:
    return (times - speedup) / (times - 1) if weak else (1 / speedup - 1 / times) / (1 - 1 / times)
