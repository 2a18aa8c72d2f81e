"""An amount of energy with its quality, and the energy that a meter's trace shows for an interval of time."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hpc_train.core.energy_records import Trace
from hpc_train.core.formatting import amount


@dataclass(frozen=True)
class EnergyAmount:
    """Measured and estimated joules, None if there is no such part. lacking: what is missing, so there is no total.

    shared: other jobs may have drawn some of it.
    """

    measured: float | None = None
    estimated: float | None = None
    lacking: tuple[str, ...] = ()
    shared: bool = False

    @property
    def known(self) -> float:
        """A lower bound."""
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
        """A part less, or the difference from another amount."""
        return self + other * -1.0

    def attributed(self) -> "EnergyAmount":
        """The same as an estimate, for a part that a rule assigned and no meter confirmed."""
        return EnergyAmount(None, self.known, self.lacking, self.shared)

    def mark(self) -> str:
        """What to print after every number that is computed from it."""
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
    """The energy of a domain from `begin_s` to `end_s` after the trace's first line, interpolated between readings.

    If the readings end earlier, the rest is lacking: at once if the meter had stopped answering, else after two
    sampling periods, since the end of a run cuts its last period short.
    """
    if not len(trace.time_s):
        return EnergyAmount(lacking=(f"{host} {trace.domain}",), shared=shared)
    begin_s, end_s = trace.begin_s + begin_s, trace.begin_s + end_s
    first_j, last_j = np.interp([begin_s, end_s], trace.time_s, trace.joules)
    drawn_j = float(last_j - first_j)
    lacking: tuple[str, ...] = ()
    if end_s > begin_s and not drawn_j > 0:  # no device draws nothing
        lacking = (f"{host} {trace.domain} (0 J, less than its meter can resolve)",)
    if end_s > trace.time_s[-1] + (0.0 if trace.stopped else 2 * period_s(trace)):
        part = max(0.0, (trace.time_s[-1] - begin_s) / (end_s - begin_s))
        lacking = (f"{host} {trace.domain} after {100 * part:.0f}% of the time",)
    return _of(trace, drawn_j, lacking, shared)


def whole(trace: Trace, host: str, shared: bool, least_s: float) -> EnergyAmount:
    """All that a trace counted; the part until `least_s`, the end of the loop, is lacking if readings end earlier."""
    seen = between(trace, 0.0, max(least_s, trace.end_s - trace.begin_s), host, shared)
    if not len(trace.time_s):
        return seen
    # Joules count from 0 at the trace's first line, shortly before the first reading: nothing to subtract.
    return _of(trace, float(trace.joules[-1]), seen.lacking, shared)


def period_s(trace: Trace) -> float:
    """The median time between two readings."""
    return float(np.median(np.diff(trace.time_s))) if len(trace.time_s) > 1 else 0.0


def peak_w(traces: list[Trace]) -> tuple[float, float] | None:
    """(highest watts of all domains of one attempt together, seconds over which they are a mean).

    Each trace counts from its own first line, which was written when the loop started, so hosts' clocks need not agree.
    Means are over the period of the slowest meter. None if a meter stopped answering.
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
