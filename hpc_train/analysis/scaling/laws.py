"""The laws that a first look at scaling is held against: Amdahl's and Gustafson's, drawn beside what was measured.

Both split the baseline's time into a part that more ranks shorten and a serial part that they do not. They are a
reference within the measured sizes, not a prediction beyond them: that is what the models of `plan` are for.
"""

from dataclasses import dataclass

import numpy as np

from hpc_train.analysis.scaling.compare import Group
from hpc_train.core.formatting import percent, plural

_CLOSE = 0.01  # of the ideal speedup: a law that stays nearer to it says no more than the ideal does


@dataclass(frozen=True)
class Law:
    """Amdahl's law (a fixed global batch) or Gustafson's (a batch per rank), fitted by its one number.

    With r = ranks / baseline ranks and s the serial part, of the baseline's time (Amdahl, "Validity of the single
    processor approach to achieving large scale computing capabilities", AFIPS 1967): S = 1 / (s + (1 - s) / r);
    Gustafson ("Reevaluating Amdahl's law", Communications of the ACM 31(5), 1988): S = s + (1 - s) r.
    """

    weak: bool
    serial: float  # part of the baseline's time, 0 to 1
    num_sizes: int  # that it was fitted to, the baseline among them
    worst: float  # largest relative distance of a measured speedup from it

    @property
    def name(self) -> str:
        return "Gustafson" if self.weak else "Amdahl"

    def speedup(self, times: float) -> float:
        """Over the baseline, on `times` its ranks."""
        s = self.serial
        return s + (1 - s) * times if self.weak else 1 / (s + (1 - s) / times)

    @property
    def words(self) -> str:
        """What it says and how far to trust it."""
        few = self.num_sizes == 2
        trust = (
            "drawn through both points, so nothing checks it"
            if few
            else f"fitted to {self.num_sizes} sizes, which it misses by {_up_to(self.worst)}"
        )
        return f"{self.name}'s law with a serial part of {percent(self.serial)} of the baseline's time, {trust}"


def _up_to(share: float) -> str:
    return "less than 1%" if share < 0.01 else f"up to {percent(share, 0)}"


def fitted(group: Group) -> Law | None:
    """The law of the group's complete rows; None from one size, and where it cannot describe them.

    Least squares of relative deviations, where the law is linear in s: Amdahl's in the time 1 / S, Gustafson's in S
    itself. A serial part below nothing is a speedup beyond the ideal, one of all and more a slowdown: no share of the
    time explains either.
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


def law_words(group: Group) -> str:
    """A sentence for below the figure: the law that is drawn, or why none is. "" without a baseline."""
    if group.baseline is None:
        return ""
    law = fitted(group)
    if law:
        return f"{law.words}."
    name = "Gustafson" if group.weak else "Amdahl"
    over = plural(group.baseline.size, "rank")
    largest = group.largest
    if largest is None:
        return f"{name}'s law is not drawn: only one size is complete."
    if (largest.speedup or 0) < 1:
        return f"{name}'s law is not drawn: it knows no job that is slower than on {over}."
    return f"{name}'s law is not drawn: no serial part can be told from these speedups."
