"""Reads a node's meters from a thread of its own and writes down what they say; what they say of a node at rest."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, perf_counter, sleep, time
from types import TracebackType

from hpc_train.errors import UserError, not_written
from hpc_train.records import ENERGY_COLUMNS, close_log, open_log
from hpc_train.train.sensors.meter import Meter


class Sampler:
    """Writes every meter's joules `hz` times a second, and at the beginning and the end: those since the beginning.

    A meter that fails while the job runs must not end the job, nor pass for measured: its line says missing. One that
    failed at the beginning is missing to the end, because nothing says what it counted before. epoch_s: what to add to
    `perf_counter` of this host for the column time_s, which so keeps step with the timings when the time of day is set.
    """

    def __init__(self, meters: Sequence[Meter], path: Path, hz: float, attempt: int = 1) -> None:
        self._meters, self._attempt = meters, attempt
        self._period_s = 1.0 / hz
        self.epoch_s = time() - perf_counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="energy", daemon=True)
        assert not any("," in meter.domain + meter.source for meter in meters), "a comma would end the CSV cell"
        self._file = open_log(path, ENERGY_COLUMNS)

    def __enter__(self) -> None:
        self._began = {meter.domain: _joules(meter) for meter in self._meters}
        self._write([self._line(meter, self._began[meter.domain]) for meter in self._meters])
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
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
        while not self._stop.wait(max(0.0, next_s - monotonic())):
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
        began, doubt = self._began[meter.domain], meter.doubt()
        said = [words for words in (doubt, meter.remark()) if words]
        source = f"{meter.source} ({'; '.join(said)})" if said else meter.source
        quality = "estimated" if doubt else meter.quality
        reading = ",missing" if joules is None or began is None else f"{joules - began:.6f},{quality}"
        return f"{meter.domain},{reading},{source},{self._attempt}\n"

    def _write(self, lines: list[str]) -> None:
        now_s = f"{self.epoch_s + perf_counter():.3f},"  # when they had all been read
        text = "".join([now_s + line for line in lines])
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
