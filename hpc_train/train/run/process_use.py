"""What a rank's process used of its processors and its storage, since it began."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path
from time import CLOCK_BOOTTIME, clock_gettime, perf_counter

_IO, _STAT = Path("/proc/self/io"), Path("/proc/self/stat")
_STARTED = 22  # field of /proc/self/stat: when the process started, in ticks since the machine did (proc(5))


@dataclass(frozen=True)
class ProcessUse:
    """cpu_s: of all threads, user and system. read_bytes, written_bytes: what storage delivered and was given to write,
    without what the page cache served (proc(5), io); None: the kernel does not tell.
    """

    time_s: float
    cpu_s: float
    read_bytes: int | None
    written_bytes: int | None

    @classmethod
    def now(cls) -> "ProcessUse":
        used = resource.getrusage(resource.RUSAGE_SELF)
        moved = _io_bytes()
        cpu_s = used.ru_utime + used.ru_stime
        return cls(perf_counter(), cpu_s, moved.get("read_bytes"), moved.get("write_bytes"))

    def since(self, before: "ProcessUse") -> "ProcessUse":
        """time_s is then the time between."""
        return ProcessUse(
            self.time_s - before.time_s,
            self.cpu_s - before.cpu_s,
            _less(self.read_bytes, before.read_bytes),
            _less(self.written_bytes, before.written_bytes),
        )


def seconds_since_start() -> float | None:
    """Since this process was made, which includes loading Python and torch; None if the kernel does not tell."""
    try:
        fields = _STAT.read_text().rpartition(")")[2].split()  # the name before it may hold anything
    except OSError:
        return None
    return clock_gettime(CLOCK_BOOTTIME) - int(fields[_STARTED - 3]) / os.sysconf("SC_CLK_TCK")


def _less(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before


def _io_bytes() -> dict[str, int]:
    try:
        lines = _IO.read_text().splitlines()
    except OSError:  # no such file, or hidden from this process
        return {}
    return {name: int(value) for name, _, value in (line.partition(": ") for line in lines) if value.isdecimal()}
