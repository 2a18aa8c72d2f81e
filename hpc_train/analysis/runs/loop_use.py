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
    included, without what the page cache served. time_s: of the longest rank. gpu_busy: share of the time in which a
    rank's GPU computed, mean over ranks; gpu_busy_least: of the rank whose GPU computed least; gpu_used_bytes: the most
    that was taken of one GPU, by all processes. These are None, too, if the driver told nothing of some rank's GPU.
    """

    time_s: float | None = None
    cores_busy: float | None = None
    num_cores: float | None = None
    read_bytes: float | None = None
    written_bytes: float | None = None
    gpu_busy: float | None = None
    gpu_busy_least: float | None = None
    gpu_used_bytes: float | None = None

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
    busy, used_bytes = _of_all(run, "loop_gpu_busy"), _of_all(run, "loop_gpu_used_bytes")
    return LoopUse(
        gpu_busy=fmean(busy) if busy else None,
        gpu_busy_least=min(busy, default=None),
        gpu_used_bytes=max(used_bytes, default=None),
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
    known = _of_all(run, key)
    return sum(known) if known else None


def _of_all(run: Run, key: str) -> list[float]:
    """The values of all ranks, of which 0 is one; [] if a rank has none."""
    values = list_at(run.meta, key)
    known = [0.0 if value == 0 else positive_number(value) for value in values if not isinstance(value, bool)]
    return [] if None in known else [value for value in known if value is not None]
