"""What a rank's process used of its processors and its storage, since it began."""

import resource
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

_IO = Path("/proc/self/io")


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


def _less(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before


def _io_bytes() -> dict[str, int]:
    try:
        lines = _IO.read_text().splitlines()
    except OSError:  # no such file, or hidden from this process
        return {}
    return {name: int(value) for name, _, value in (line.partition(": ") for line in lines) if value.isdecimal()}
