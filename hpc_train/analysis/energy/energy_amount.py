"""An amount of energy that keeps apart how it came to be known, and what a meter's trace says of a stretch of time."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hpc_train.core.energy_records import Trace
from hpc_train.core.formatting import amount


@dataclass(frozen=True)
class EnergyAmount:
    """Measured and estimated parts side by side, None where there is no such part, and in words what is missing: then
    there is no total.

    shared: others may have drawn some of it, since a node was not this job's alone.
    """

    measured: float | None = None
    estimated: float | None = None
    lacking: tuple[str, ...] = ()
    shared: bool = False

    @property
    def known(self) -> float:
        """At least so much."""
        return (self.measured or 0.0) + (self.estimated or 0.0)

    @property
    def total(self) -> float | None:
        return None if self.lacking else self.known

    @property
    def quality(self) -> Literal["measured", "estimated", "mixed", "missing"]:
        """mixed: a sum of measured and estimated parts."""
        if self.lacking:
            return "missing"
        if self.estimated is not None:
            return "estimated" if self.measured is None else "mixed"
        return "measured"

    def __add__(self, other: "EnergyAmount") -> "EnergyAmount":
        lacking = tuple(dict.fromkeys(self.lacking + other.lacking))
        measured, estimated = _sum(self.measured, other.measured), _sum(self.estimated, other.estimated)
        return EnergyAmount(measured, estimated, lacking, self.shared or other.shared)

    def __mul__(self, factor: float) -> "EnergyAmount":
        measured, estimated = (None if part is None else part * factor for part in (self.measured, self.estimated))
        return EnergyAmount(measured, estimated, self.lacking, self.shared)

    def __sub__(self, other: "EnergyAmount") -> "EnergyAmount":
        """Without a part of itself, or set against another."""
        return self + other * -1.0

    def attributed(self) -> "EnergyAmount":
        """The same as an estimate: divided by a rule, which no meter has confirmed."""
        return EnergyAmount(None, self.known, self.lacking, self.shared)

    def mark(self) -> str:
        """What must stand beside every number that is made of it."""
        kind = {"estimated": " est.", "mixed": " part est."}.get(self.quality, "")
        return kind + " shared" * self.shared

    def text(self, factor: float = 1.0, unit: str = "J") -> str:
        """ "1.23 kJ part est. shared", "missing", or "at least 1.23 kJ" where a part is missing."""
        if not self.lacking:
            return amount(self.known * factor, unit) + self.mark()
        if not self.known > 0:
            return "missing"
        known = EnergyAmount(self.measured, self.estimated, (), self.shared)
        return f"at least {amount(self.known * factor, unit)}{known.mark()}"


NONE = EnergyAmount()


def _sum(one: float | None, other: float | None) -> float | None:
    return one if other is None else other if one is None else one + other


def _of(trace: Trace, joules: float, lacking: tuple[str, ...], shared: bool) -> EnergyAmount:
    estimated = trace.quality == "estimated"
    return EnergyAmount(None if estimated else joules, joules if estimated else None, lacking, shared)


def between(trace: Trace, begin_s: float, end_s: float, host: str, shared: bool) -> EnergyAmount:
    """What a domain drew from `begin_s` to `end_s` after the trace's first line, interpolated between readings.

    It is missing, but for the part known, where the readings end before: at once where the meter stopped to answer,
    else two sampling periods later, since what ends a run ends its last sample, too.
    """
    if not len(trace.time_s):
        return EnergyAmount(lacking=(f"{host} {trace.domain}",), shared=shared)
    begin_s, end_s = trace.begin_s + begin_s, trace.begin_s + end_s
    first_j, last_j = np.interp([begin_s, end_s], trace.time_s, trace.joules)
    drawn_j = float(last_j - first_j)
    lacking: tuple[str, ...] = ()
    if end_s > begin_s and not drawn_j > 0:  # no device draws nothing
        lacking = (f"{host} {trace.domain} (0 J, less than its meter can tell)",)
    if end_s > trace.time_s[-1] + (0.0 if trace.stopped else 2 * period_s(trace)):
        part = max(0.0, (trace.time_s[-1] - begin_s) / (end_s - begin_s))
        lacking = (f"{host} {trace.domain} after {100 * part:.0f}% of the time",)
    return _of(trace, drawn_j, lacking, shared)


def whole(trace: Trace, host: str, shared: bool, least_s: float) -> EnergyAmount:
    """All that a trace has counted, which must have gone on for `least_s`, the end of the loop."""
    seen = between(trace, 0.0, max(least_s, trace.end_s - trace.begin_s), host, shared)
    if not len(trace.time_s):
        return seen
    # Counted from 0 at its begin, which the first reading follows by a moment.
    return _of(trace, float(trace.joules[-1]), seen.lacking, shared)


def period_s(trace: Trace) -> float:
    """The time between two samples, in the median."""
    return float(np.median(np.diff(trace.time_s))) if len(trace.time_s) > 1 else 0.0


def peak_w(traces: list[Trace]) -> tuple[float, float] | None:
    """(the most watts that all domains of one attempt drew together, seconds over which each value is a mean).

    Each host's trace is counted from its own first line, which it wrote when the loop began, so the hosts' clocks need
    not agree. The slowest meter sets the time over which means are taken. None where a meter stopped.
    """
    if not traces or any(trace.stopped or trace.time_s[-1] <= trace.begin_s for trace in traces):
        return None
    span_s = min(float(trace.time_s[-1] - trace.begin_s) for trace in traces)
    over_s = min(max(period_s(trace) for trace in traces), span_s)
    grid_s = over_s * np.arange(int(span_s / over_s * (1 + 1e-9)) + 1)
    joules = np.zeros(len(grid_s))
    for trace in traces:
        joules += np.interp(trace.begin_s + grid_s, trace.time_s, trace.joules)
    return float(np.diff(joules).max() / over_s), over_s
