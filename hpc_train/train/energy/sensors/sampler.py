"""Samples a node's meters from a thread of its own into energy/<host>.csv, and measures a node's idle power."""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, perf_counter, sleep

from hpc_train.core.energy_records import ENERGY_COLUMNS
from hpc_train.core.errors import UserError, not_written
from hpc_train.core.records import close_log, open_log
from hpc_train.train.energy.sensors.meter import Meter

_FLUSH_S = 0.5


class Sampler:
    """Writes every meter's joules since the beginning `hz` times a second, and at the beginning and the end.

    A meter that fails during the job neither ends the job nor passes for measured: its line says missing. One that
    failed at the beginning stays missing, because its later counts have no starting point. epoch_s: the time of day at
    0 of `perf_counter`; it keeps the column time_s aligned with the timings even if the time of day is set. check:
    raises UserError if this job may write nothing any more.
    """

    def __init__(
        self,
        meters: Sequence[Meter],
        path: Path,
        hz: float,
        epoch_s: float,
        attempt: int = 1,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._meters, self._attempt, self._check = meters, attempt, check
        self._period_s, self._next_flush_s = 1.0 / hz, 0.0
        self._epoch_s = epoch_s
        self._unwritten = ""  # whole lines
        self._running = threading.Lock()  # held until the end: waiting for it costs half of what an Event does
        self._thread = threading.Thread(target=self._loop, name="energy", daemon=True)
        assert not any("," in meter.domain + meter.source for meter in meters), "a comma would end the CSV cell"
        self._file = open_log(path, ENERGY_COLUMNS)

    def __enter__(self) -> None:
        self._first_j = {meter.domain: _joules(meter) for meter in self._meters}
        self._write([self._line(meter, self._first_j[meter.domain]) for meter in self._meters])
        self._running.acquire()
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._running.release()
        self._thread.join()
        self._next_flush_s = 0.0
        try:
            self._sample(self._meters)
        finally:
            close_log(self._file)

    def _loop(self) -> None:
        frequent = [meter for meter in self._meters if not meter.period_s]
        rare = [meter for meter in self._meters if meter.period_s]
        began_s = monotonic()
        next_s = began_s + self._period_s
        due_s = {meter.domain: began_s + meter.period_s for meter in rare}
        while not self._running.acquire(timeout=max(0.0, next_s - monotonic())):
            now_s = monotonic()
            next_s = max(next_s + self._period_s, now_s)  # a late sample is not followed by a hasty one
            due = [meter for meter in rare if due_s[meter.domain] <= now_s]
            due_s |= {meter.domain: now_s + meter.period_s for meter in due}
            with suppress(UserError):  # readings are cumulative: the next one that can be written makes up for it
                self._sample(frequent)
                for meter in due:  # one at a time: a slow one must not delay the time stamps of the others
                    self._sample([meter])

    def _sample(self, meters: Sequence[Meter]) -> None:
        self._write([self._line(meter, _joules(meter)) for meter in meters])

    def _line(self, meter: Meter, joules: float | None) -> str:
        first_j, assumption, note = self._first_j[meter.domain], meter.assumption(), meter.note()
        source = meter.source
        if assumption or note:
            source += f" ({'; '.join(filter(None, (assumption, note)))})"
        if joules is None or first_j is None:
            return f"{meter.domain},,missing,{source},{self._attempt}\n"
        quality = "estimated" if assumption else meter.quality
        return f"{meter.domain},{joules - first_j:.6f},{quality},{source},{self._attempt}\n"

    def _write(self, lines: list[str]) -> None:
        """Hands lines to the operating system at most twice a second: a killed process loses no more than that."""
        now_s = perf_counter()
        time_s = f"{self._epoch_s + now_s:.3f},"
        self._unwritten += "".join([time_s + line for line in lines])
        if now_s < self._next_flush_s:
            return
        text, self._unwritten = self._unwritten, ""
        if self._check is not None:
            self._check()
        self._next_flush_s = now_s + _FLUSH_S
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise not_written(self._file.name, error, len(text)) from None


def idle_watts(meters: Sequence[Meter], idle_s: float) -> dict[str, float]:
    """Watts by domain during the next `idle_s` seconds, in which nothing should run.

    Skipped are estimates, meters that are read rarely, and those that failed, assumed something or did not move: a
    device that is switched on draws some power. Powers are read at least ten times, at most once a second.
    """
    usable = [meter for meter in meters if meter.quality == "measured" and not meter.period_s]
    began_s, first_j = monotonic(), {meter.domain: _joules(meter) for meter in usable}
    while (left_s := began_s + idle_s - monotonic()) > 0:
        sleep(min(left_s, 1.0, idle_s / 10))
        passed_s, last_j = monotonic() - began_s, {meter.domain: _joules(meter) for meter in usable}
    idle_w = {}
    for meter in usable:
        first, last = first_j[meter.domain], last_j[meter.domain]
        if first is not None and last is not None and last > first and not meter.assumption():
            idle_w[meter.domain] = (last - first) / passed_s
    return idle_w


def _joules(meter: Meter) -> float | None:
    try:
        return meter.read()
    except OSError:
        return None
