"""What a meter is, and how readings become joules: of counters that go round or start again, and of powers."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path

from hpc_train.core.energy_records import Quality

Now = Callable[[], float]
MOST_W = 2000.0  # of one processor package or GPU: what would need more is no energy but a counter that started again
_SLACK_S = 1.0  # a counter is read a little later than its clock
_MOST_GAP_S = 120.0  # between readings of a power: longer than any period that may be asked for


@dataclass(frozen=True)
class Meter:
    """One domain of a node (a processor package, its memory, a GPU, all of it). No two domains of a node overlap.

    read: joules since some moment before, never fewer than the last time, or OSError. every_s: for a meter that costs
    too much to be read with each sample. within_s: how often it must be read not to miss a round of its counter. doubt:
    what the reader had to assume until now, in words without a comma: then its joules are estimated. remark: what else
    is to be known of the source.
    """

    domain: str
    source: str
    quality: Quality
    read: Callable[[], float]
    every_s: float = 0.0
    within_s: float = inf
    doubt: Callable[[], str] = str
    remark: Callable[[], str] = str


class SysFile:
    """A file of /sys that is read again and again: kept open, which takes a third of the time of opening it anew.

    One whose device was removed says ENODEV to who has it open, and is opened anew at the next reading.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._fd = path, -1

    def read(self) -> bytes:
        """Its first 4096 bytes, which is all that such a file has, as they are now. Raises OSError."""
        try:
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._fd, 4096, 0)
        except OSError as error:
            self._close()
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def number(self) -> float:
        """The number that it begins with. Raises OSError also where there is none."""
        text = self.read()
        try:
            return float(text.split(None, 1)[0])
        except (ValueError, IndexError):
            raise OSError(f"{self._path}: no number: {text[:40]!r}") from None

    def millionths(self) -> float:
        """The same of a number of uJ or uW, in J or W."""
        return self.number() / 1e6

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self._close()


class Counter:
    """Joules since the first reading of a counter, in joules too, that goes round at `wrap_j` and may start again.

    Where it went back farther than any device draws in that time, it started again (a driver loaded anew, a machine
    that slept): the mean power until then stands for the time in between, and `doubt` says so. So it does where a
    counter was not read for so long that it may have gone round more than once.
    """

    def __init__(self, first_j: float, now: Now, wrap_j: float | None = None) -> None:
        self._now, self._wrap_j = now, wrap_j
        self._last_j, self._last_s = first_j, now()
        self._total_j, self._began_s = 0.0, self._last_s
        self.doubt = ""

    def advance(self, now_j: float, restarted: bool = False) -> float:
        """The joules until this reading. restarted: it is known that the counter began anew since the last one."""
        now_s = self._now()
        passed_s, step_j = now_s - self._last_s, now_j - self._last_j
        if restarted or step_j < 0 or (self._wrap_j and passed_s * MOST_W > self._wrap_j):
            step_j = self._told(step_j, now_j, passed_s, restarted)
        self._last_j, self._last_s = now_j, now_s
        self._total_j += step_j
        return self._total_j

    def _told(self, step_j: float, now_j: float, passed_s: float, restarted: bool) -> float:
        """The joules of a step that is more than the difference of two readings."""
        rounds = 0
        if self._wrap_j and not restarted:
            rounds = self._rounds(step_j, passed_s)
            step_j += rounds * self._wrap_j
        if not restarted and step_j >= 0 and (not rounds or step_j <= MOST_W * (passed_s + _SLACK_S)):
            return step_j
        self.doubt = f"the counter started again: {passed_s:.1f} s are the mean power's"
        return self._mean_w() * passed_s or min(now_j, MOST_W * passed_s)  # at first no power is known

    def _rounds(self, step_j: float, passed_s: float) -> int:
        """How often the counter went round: what the mean power says where that may be more than once."""
        assert self._wrap_j
        least = int(step_j < 0)
        if passed_s * MOST_W <= self._wrap_j:
            return least
        self.doubt = f"not read for {passed_s:.0f} s: how often the counter went round is told by the mean power"
        return max(least, round((self._mean_w() * passed_s - step_j) / self._wrap_j))

    def _mean_w(self) -> float:
        lasted_s = self._last_s - self._began_s
        return self._total_j / lasted_s if lasted_s > 0 else 0.0


class Integral:
    """Joules since the first reading of a power, by the trapezoidal rule over the times at which it was really read.

    Where it could not be read for a time, a straight line stands for it, and `doubt` says so. The clock does not count
    while a machine sleeps, so that time adds nothing.
    """

    def __init__(self, first_w: float, now: Now) -> None:
        self._now = now
        self._last_w, self._last_s = first_w, now()
        self._total_j, self._failed = 0.0, False
        self.doubt = ""

    def advance(self, now_w: float) -> float:
        now_s = self._now()
        passed_s = now_s - self._last_s
        self._total_j += (self._last_w + now_w) / 2 * passed_s
        if self._failed or passed_s > _MOST_GAP_S:
            self.doubt = f"no power was read for {passed_s:.1f} s: a straight line stands for it"
        self._last_w, self._last_s, self._failed = now_w, now_s, False
        return self._total_j

    def failed(self) -> None:
        self._failed = True


def counting(domain: str, source: str, count_j: Callable[[], float], now: Now, wrap_j: float | None = None) -> Meter:
    """A meter of a counter. Raises OSError where it cannot be read now."""
    counter = Counter(count_j(), now, wrap_j)
    within_s = wrap_j / MOST_W if wrap_j else inf

    def read() -> float:
        return counter.advance(count_j())

    return Meter(domain, source, "measured", read, within_s=within_s, doubt=lambda: counter.doubt)


def integrating(domain: str, source: str, power_w: Callable[[], float], now: Now) -> Meter:
    """A meter of a power. Raises OSError where it cannot be read now; a power of 0 W is no reading, but a sensor that
    is not connected.
    """

    def drawn_w() -> float:
        watts = power_w()
        if watts <= 0:
            raise OSError(f"{source} reads {watts:g} W")
        return watts

    integral = Integral(drawn_w(), now)

    def read() -> float:
        try:
            return integral.advance(drawn_w())
        except OSError:
            integral.failed()
            raise

    return Meter(domain, source, "measured", read, doubt=lambda: integral.doubt)
