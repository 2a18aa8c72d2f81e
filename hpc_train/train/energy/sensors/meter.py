"""What a meter is, and how readings become joules: counters wrap around or restart, powers are integrated."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path

from hpc_train.core.energy_records import Quality

Now = Callable[[], float]
MAX_W = 2000.0  # of one processor package or GPU: a counter that implies more has restarted
_SLACK_S = 1.0  # a counter is read slightly later than its clock
_MAX_GAP_S = 120.0  # between readings of a power: longer than any sampling period that may be configured


@dataclass(frozen=True)
class Meter:
    """One domain of a node (a processor package, its memory, a GPU, the whole node). Domains of a node do not overlap.

    read: joules since some earlier moment, never fewer than the last time; raises OSError. period_s: how often to read
    a meter that is too expensive for every sample. max_period_s: how often it must be read so that its counter wraps
    around at most once. assumption: what had to be assumed so far, without a comma: its joules are then estimated.
    note: what else a reader of the records should know.
    """

    domain: str
    source: str
    quality: Quality
    read: Callable[[], float]
    period_s: float = 0.0
    max_period_s: float = inf
    assumption: Callable[[], str] = str
    note: Callable[[], str] = str


class SysFile:
    """A file of /sys that is read again and again: kept open, which takes a third of the time of reopening it.

    If its device was removed, the open file raises ENODEV: it is reopened at the next reading.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._fd = path, -1

    def read(self) -> bytes:
        """Its first 4096 bytes as they are now; such files hold no more. Raises OSError."""
        try:
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._fd, 4096, 0)
        except OSError as error:
            self._close()
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def number(self) -> float:
        """The number at its beginning. Raises OSError, also if there is none."""
        text = self.read()
        try:
            return float(text.split(None, 1)[0])
        except (ValueError, IndexError):
            raise OSError(f"{self._path}: no number: {text[:40]!r}") from None

    def millionths(self) -> float:
        """The same for a number in uJ or uW, in J or W."""
        return self.number() / 1e6

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self._close()


class Counter:
    """Joules since the first reading of a counter (also in joules) that wraps around at `wrap_j` and may restart.

    A counter that went back further than a wrap explains has restarted (driver reloaded, machine suspended): the gap is
    filled with the mean power until then. The same if it was not read for so long that it may have wrapped more than
    once. `assumption` names either.
    """

    def __init__(self, first_j: float, now: Now, wrap_j: float | None = None) -> None:
        self._now, self._wrap_j = now, wrap_j
        self._last_j, self._last_s = first_j, now()
        self._total_j, self._began_s = 0.0, self._last_s
        self.assumption = ""

    def advance(self, now_j: float, restarted: bool = False) -> float:
        """The joules up to this reading. restarted: the counter is known to have restarted since the last one."""
        now_s = self._now()
        passed_s, step_j = now_s - self._last_s, now_j - self._last_j
        may_have_wrapped = self._wrap_j is not None and passed_s * MAX_W > self._wrap_j
        if restarted or step_j < 0 or may_have_wrapped:
            step_j = self._corrected(step_j, now_j, passed_s, restarted)
        self._last_j, self._last_s = now_j, now_s
        self._total_j += step_j
        return self._total_j

    def _corrected(self, step_j: float, now_j: float, passed_s: float, restarted: bool) -> float:
        """The joules of an interval for which the difference of two readings is not enough."""
        if not restarted:
            num_wraps = self._num_wraps(step_j, passed_s)
            step_j += num_wraps * (self._wrap_j or 0.0)
            is_plausible = num_wraps == 0 or step_j <= MAX_W * (passed_s + _SLACK_S)
            if step_j >= 0 and is_plausible:
                return step_j
        self.assumption = f"the counter restarted: {passed_s:.1f} s filled with the mean power"
        return self._mean_w() * passed_s or min(now_j, MAX_W * passed_s)  # no power is known yet at the first reading

    def _num_wraps(self, step_j: float, passed_s: float) -> int:
        """How often the counter wrapped around; by the mean power if that may be more than once."""
        if self._wrap_j is None:
            return 0
        at_least = int(step_j < 0)
        if passed_s * MAX_W <= self._wrap_j:
            return at_least
        self.assumption = f"not read for {passed_s:.0f} s: the number of counter wraps follows from the mean power"
        return max(at_least, round((self._mean_w() * passed_s - step_j) / self._wrap_j))

    def _mean_w(self) -> float:
        lasted_s = self._last_s - self._began_s
        return self._total_j / lasted_s if lasted_s > 0 else 0.0


class PowerIntegral:
    """Joules since the first reading of a power, by the trapezoidal rule over the times of the readings.

    A gap without readings is interpolated linearly, and `assumption` says so. The clock stops while a machine is
    suspended, so that time adds nothing. A power of 0 W is a sensor that is not connected: reading it raises OSError.
    """

    def __init__(self, source: str, power_w: Callable[[], float], now: Now) -> None:
        self._source, self._power_w, self._now = source, power_w, now
        self._last_w, self._last_s = self._drawn_w(), now()
        self._total_j, self._failed = 0.0, False
        self.assumption = ""

    def read(self) -> float:
        try:
            now_w = self._drawn_w()
        except OSError:
            self._failed = True
            raise
        now_s = self._now()
        passed_s = now_s - self._last_s
        self._total_j += (self._last_w + now_w) / 2 * passed_s
        if self._failed or passed_s > _MAX_GAP_S:
            self.assumption = f"no power was read for {passed_s:.1f} s: interpolated linearly"
        self._last_w, self._last_s, self._failed = now_w, now_s, False
        return self._total_j

    def _drawn_w(self) -> float:
        watts = self._power_w()
        if watts <= 0:
            raise OSError(f"{self._source} reads {watts:g} W")
        return watts


def counter_meter(
    domain: str, source: str, count_j: Callable[[], float], now: Now, wrap_j: float | None = None
) -> Meter:
    """A meter of an energy counter. Raises OSError if it cannot be read now."""
    counter = Counter(count_j(), now, wrap_j)
    return Meter(
        domain,
        source,
        "measured",
        read=lambda: counter.advance(count_j()),
        max_period_s=wrap_j / MAX_W if wrap_j else inf,
        assumption=lambda: counter.assumption,
    )


def power_meter(domain: str, source: str, power_w: Callable[[], float], now: Now) -> Meter:
    """A meter of a power. Raises OSError if it cannot be read now."""
    integral = PowerIntegral(source, power_w, now)
    return Meter(domain, source, "measured", integral.read, assumption=lambda: integral.assumption)
