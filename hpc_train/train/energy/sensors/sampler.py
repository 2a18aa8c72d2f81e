"""Reads a node's meters from a thread of its own and writes down what they say; what they say of a node at rest."""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, perf_counter, sleep
from types import TracebackType

from hpc_train.core.energy_records import ENERGY_COLUMNS
from hpc_train.core.errors import UserError, not_written
from hpc_train.core.records import close_log, open_log
from hpc_train.train.energy.sensors.meter import Meter

_FLUSH_S = 0.5


class Sampler:
    """Writes every meter's joules `hz` times a second, and at the beginning and the end: those since the beginning.

    A meter that fails while the job runs must not end the job, nor pass for measured: its line says missing. One that
    failed at the beginning is missing to the end, because nothing says what it counted before. epoch_s: the time of day
    at 0 of `perf_counter`, by which the column time_s keeps step with the timings, even where the time of day is set.
    check: raises UserError where nothing may be written any more.
    """

    def __init__(
        self,
        meters: Sequence[Meter],
        path: Path,
        hz: float,
        epoch_s: float,
        attempt: int = 1,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._meters, self._attempt, self._check = meters, attempt, check
        self._period_s, self._flush_s = 1.0 / hz, 0.0
        self._epoch_s = epoch_s
        self._kept = ""  # lines that no file has yet
        self._going_on = threading.Lock()  # held until the end; half the cost of an Event to wait for
        self._thread = threading.Thread(target=self._loop, name="energy", daemon=True)
        assert not any("," in meter.domain + meter.source for meter in meters), "a comma would end the CSV cell"
        self._file = open_log(path, ENERGY_COLUMNS)

    def __enter__(self) -> None:
        self._began = {meter.domain: _joules(meter) for meter in self._meters}
        self._write([self._line(meter, self._began[meter.domain]) for meter in self._meters])
        self._going_on.acquire()
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._going_on.release()
        self._thread.join()
        self._flush_s = 0.0
        try:
            self._sample(self._meters)
        finally:
            close_log(self._file)

    def _loop(self) -> None:
        often = [meter for meter in self._meters if not meter.every_s]
        rarely = {meter.domain: meter for meter in self._meters if meter.every_s}
        began_s = monotonic()
        due_s = {domain: began_s + meter.every_s for domain, meter in rarely.items()}
        next_s = began_s + self._period_s
        while not self._going_on.acquire(timeout=max(0.0, next_s - monotonic())):
            now_s = monotonic()
            next_s = max(next_s + self._period_s, now_s)  # a sample that came late is not made up for
            with suppress(UserError):  # readings are cumulative: the next one that can be written makes up for it
                self._sample(often)
                for domain in [domain for domain, at_s in due_s.items() if at_s <= now_s]:
                    due_s[domain] = now_s + rarely[domain].every_s
                    self._sample([rarely[domain]])

    def _sample(self, meters: Sequence[Meter]) -> None:
        self._write([self._line(meter, _joules(meter)) for meter in meters])

    def _line(self, meter: Meter, joules: float | None) -> str:
        began, doubt, remark = self._began[meter.domain], meter.doubt(), meter.remark()
        source = meter.source
        if doubt or remark:
            source += f" ({'; '.join(words for words in (doubt, remark) if words)})"
        if joules is None or began is None:
            return f"{meter.domain},,missing,{source},{self._attempt}\n"
        quality = "estimated" if doubt else meter.quality
        return f"{meter.domain},{joules - began:.6f},{quality},{source},{self._attempt}\n"

    def _write(self, lines: list[str]) -> None:
        """Lines go to the operating system twice a second at most: a killed process loses no more than that."""
        now_s = perf_counter()
        time_s = f"{self._epoch_s + now_s:.3f},"  # when all had been read
        self._kept += "".join([time_s + line for line in lines])
        if now_s < self._flush_s:
            return
        text, self._kept = self._kept, ""
        self._check()
        self._flush_s = now_s + _FLUSH_S
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise not_written(self._file.name, error, len(text)) from None


def idle_watts(meters: Sequence[Meter], idle_s: float) -> dict[str, float]:
    """Watts that each domain draws during the next `idle_s` seconds, in which nobody should work.

    Estimates and meters that are read rarely have none, nor has one that failed, was doubted or did not move: a device
    that is on draws something. Powers are read ten times or more, at most once a second.
    """
    known = [meter for meter in meters if meter.quality == "measured" and not meter.every_s]
    began_s, began = monotonic(), {meter.domain: _joules(meter) for meter in known}
    while (left_s := began_s + idle_s - monotonic()) > 0:
        sleep(min(left_s, 1.0, idle_s / 10))
        passed_s, ended = monotonic() - began_s, {meter.domain: _joules(meter) for meter in known}
    idle_w = {}
    for meter in known:
        first_j, last_j = began[meter.domain], ended[meter.domain]
        if first_j is not None and last_j is not None and last_j > first_j and not meter.doubt():
            idle_w[meter.domain] = (last_j - first_j) / passed_s
    return idle_w


def _joules(meter: Meter) -> float | None:
    try:
        return meter.read()
    except OSError:
        return None
