"""What the ranks of a run used of their processors and of storage during the loop of the last attempt."""

from dataclasses import dataclass
from statistics import fmean

from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import list_at, positive_number


@dataclass(frozen=True)
class LoopUse:
    """None: not recorded, as by older versions.

    cores_busy: cores that a rank keeps busy, mean over ranks and time. num_cores: that a rank may use, mean over ranks.
    read_bytes, written_bytes: of all ranks together, what storage delivered and was given, the last checkpoint
    included, without what the page cache served. time_s: of the longest rank.
    """

    time_s: float | None = None
    cores_busy: float | None = None
    num_cores: float | None = None
    read_bytes: float | None = None
    written_bytes: float | None = None

    @property
    def read_bytes_per_s(self) -> float | None:
        return self._rate(self.read_bytes)

    @property
    def written_bytes_per_s(self) -> float | None:
        return self._rate(self.written_bytes)

    def _rate(self, num_bytes: float | None) -> float | None:
        return None if num_bytes is None or self.time_s is None else num_bytes / self.time_s


def loop_use(run: Run) -> LoopUse:
    times_s, cpu_s = _known(run, "loop_time_s"), _known(run, "loop_cpu_s")
    if not times_s or len(cpu_s) != len(times_s):
        return LoopUse()
    ranks = [rank for rank in list_at(run.meta, "ranks") if isinstance(rank, dict)]
    cores = [len(list_at(rank, "cores")) for rank in ranks]
    return LoopUse(
        time_s=max(times_s),
        cores_busy=fmean(spent / whole for spent, whole in zip(cpu_s, times_s, strict=True)),
        num_cores=fmean(cores) if cores and all(cores) else None,
        read_bytes=_sum(run, "loop_read_bytes"),
        written_bytes=_sum(run, "loop_written_bytes"),
    )


def _known(run: Run, key: str) -> list[float]:
    return [number for each in list_at(run.meta, key) if (number := positive_number(each)) is not None]


def _sum(run: Run, key: str) -> float | None:
    """Of the values of all ranks, of which 0 is one; None if a rank has none."""
    values = list_at(run.meta, key)
    known = [0.0 if value == 0 else positive_number(value) for value in values if not isinstance(value, bool)]
    return sum(filter(None, known)) if known and None not in known else None
