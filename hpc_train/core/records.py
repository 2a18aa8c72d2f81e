"""The records the two halves share: what a training run writes down and what the analysis reads.

Durations are nanoseconds of a rank's monotonic clock; `meta.json` holds what aligns the clocks of different ranks.
"""

import io
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from time import perf_counter_ns
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from hpc_train.core.errors import UserError, not_written
from hpc_train.core.rundir import write_atomic
from hpc_train.core.statistics import mean_interval

# 2: the column `attempt`; 3: `test` in summary.json; 4: its step_s is the mean, not the median; 5: the phase `sync`
SCHEMA = 5
PHASES = ("data", "forward", "backward", "reduce", "optimizer", "sync", "other")
COMMUNICATION = ("reduce", "sync")  # the phases in which a rank only sends, receives and waits
TIMING_COLUMNS = (
    *("step", "start_ns", "arrived_ns"),
    *(f"{phase}_ns" for phase in PHASES),
    *("num_samples", "warmup", "attempt"),
)
METRIC_COLUMNS = ("step", "loss")
ENERGY_COLUMNS = ("time_s", "domain", "joules", "quality", "source", "attempt")

# One row of timings/rank-NNNNN.csv, in the order of TIMING_COLUMNS without the attempt, which is a file's own; a plain
# tuple because it is made every step.
StepRecord = tuple[int, ...]
Quality = Literal["measured", "estimated", "missing"]
NO_METER = "no meter"
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


_MOST_STEPS = 10**15  # a number beyond is damage


class BadRecord(UserError):
    """A line that is no record, other than a last line cut short by a crash."""


# ---------------------------------------------------------------------------------------------- writing


class RecordFile:
    """An append-only CSV file of integer records, written so that a killed process loses at most half a second.

    `write` keeps rows and hands them to the operating system once `flush_s` have passed since it last did. The
    rows' own time stamps (column `time_column`) serve as the clock, so writing reads none. `last` fills the last
    column of every row.
    """

    def __init__(self, path: Path, columns: Sequence[str], time_column: int, last: int, flush_s: float = 0.5) -> None:
        self._file = open_log(path, columns)
        self._line = ",".join(["%d"] * (len(columns) - 1)) + f",{last}\n"
        self._rows: list[StepRecord] = []
        self._time_column = time_column
        self._flush_ns = int(flush_s * 1e9)
        self._due_ns = perf_counter_ns() + self._flush_ns

    def write(self, row: StepRecord) -> None:
        self._rows.append(row)
        if row[self._time_column] > self._due_ns:
            self.flush()

    def flush(self) -> None:
        """Hands every row to the operating system: a later SIGKILL cannot take it back."""
        line = self._line  # % on a ready-made line: 0.9 us a row; repr 1.6, csv.writer 2.6, str and join 1.8
        text = "".join([line % row for row in self._rows])
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise not_written(self._file.name, error, len(text)) from None
        self._rows.clear()
        self._due_ns = perf_counter_ns() + self._flush_ns

    def discard(self) -> None:
        """Drops the rows that no file has yet: it belongs to another by now."""
        self._rows.clear()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            close_log(self._file)


def close_log(file: IO[str]) -> None:
    """Closes a file whose last rows the disk may have refused, and then refuses again."""
    with suppress(OSError):
        file.close()


def timing_log(path: Path, attempt: int = 1) -> RecordFile:
    """The log of one rank's steps. A step that began half a second ago is already on its way to the file."""
    _add_sync_column(path)
    return RecordFile(path, TIMING_COLUMNS, TIMING_COLUMNS.index("start_ns"), attempt)


def _add_sync_column(path: Path) -> None:
    """Upgrades the log that an attempt of an earlier version left behind: its new column holds 0, as it is read."""
    if not path.exists():
        return
    lines = [line.split(",") for line in path.read_text(encoding="utf-8", errors="replace").split("\n")]
    header = lines[0]
    if "sync_ns" in header or "other_ns" not in header:
        return
    place = header.index("other_ns")
    for cells in lines:
        if len(cells) > place:
            cells.insert(place, "0")
    header[place] = "sync_ns"
    write_atomic(path, "\n".join(map(",".join, lines)))


def open_log(path: Path, columns: Sequence[str]) -> IO[str]:
    """Opens a CSV file for appending whole lines: a new one gets its header, a line cut short by a crash is dropped.

    Raises UserError where the disk refuses.
    """
    header = ",".join(columns) + "\n"
    try:
        return _open_log(path, header)
    except OSError as error:
        raise not_written(path, error, len(header)) from None


def _open_log(path: Path, header: str) -> IO[str]:
    file = path.open("a+b")
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        begin = max(0, end - 65536)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        end = begin + newline + 1
        if newline >= 0 or begin == 0:
            break
    file.truncate(end)
    text = io.TextIOWrapper(file, encoding="utf-8")
    if end == 0:
        text.write(header)
        text.flush()
    return text


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Table:
    """The rows of one CSV file; `truncated` when its last line was cut short (and skipped)."""

    rows: list[list[str]]
    truncated: bool


def read_csv(path: Path, columns: Sequence[str]) -> Table:
    """Rows of a CSV whose header begins with `columns`. Raises `BadRecord` naming path:line."""
    text = path.read_text(encoding="utf-8", errors="replace")
    body, _, tail = text.rpartition("\n")
    lines = body.split("\n") if body else []
    if not lines:
        return Table([], truncated=True)
    if lines[0].split(",")[: len(columns)] != list(columns):
        raise BadRecord(f"{path}:1: the header is '{lines[0][:80]}'", f"Expected: {','.join(columns)}")
    rows = [line.split(",") for line in lines[1:]]
    width = len(lines[0].split(","))
    for number, row in enumerate(rows, 2):
        if len(row) != width:
            raise bad_line(path, number, lines[number - 1])
    return Table(rows, truncated=bool(tail))


def bad_line(path: Path, number: int, line: str) -> BadRecord:
    """The error that names line `number` of a file, counted from 1."""
    return BadRecord(
        f"{path}:{number}: no record: '{line[:80]}'", "Remove the line, or leave this run out of the report."
    )


def read_metrics(path: Path) -> tuple[list[int], list[float]]:
    """(steps, losses) of metrics.csv."""
    steps, losses = [], []
    for number, row in enumerate(read_csv(path, METRIC_COLUMNS).rows, 2):
        try:
            steps.append(int(row[0]))
            losses.append(float(row[1]))
            if not 0 <= steps[-1] < _MOST_STEPS:
                raise ValueError(row[0])
        except ValueError:
            raise bad_line(path, number, ",".join(row)) from None
    return steps, losses


def read_whole_metrics(path: Path) -> dict[int, float]:
    """Loss by step of what is whole in a metrics.csv that a crash may have cut, doubled or filled with zeros; the last
    line of a step counts. {} where there is no file.
    """
    losses: dict[int, float] = {}
    data = path.read_bytes() if path.exists() else b""
    for line in data[: data.rfind(b"\n") + 1].splitlines()[1:]:
        with suppress(ValueError):
            step, loss = line.split(b",")
            losses[int(step)] = float(loss)
    return losses


# ---------------------------------------------------------------------------------------------- energy


@dataclass(frozen=True)
class Energy:
    """Joules of a run, None where nothing was read. `quality` never mixes: one estimate makes a sum an estimate.

    source: the meters; of a missing figure, why it is missing.
    """

    joules: float | None = None
    quality: Quality = "missing"
    source: str = NO_METER

    def __str__(self) -> str:
        if self.joules is None:
            return f"energy {self.quality} ({self.source})"
        return f"{self.joules:,.4g} J {self.quality} ({self.source})"


# Domains of one host's file that hold those of all hosts, since Slurm counts whole steps; what else a domain holds.
JOB_WIDE = ("nodes", "packages")
OWN_CORES = "cores"  # the domain of the estimate from this job's cores alone: what others draw is not in it
_PACKAGES = ("package-", "dram")
COUNTED_NOTHING = "counted 0 J, less than it can tell"
_HOLDS = {"node": ("",), "nodes": ("",), "packages": _PACKAGES, "psys": _PACKAGES}


_MOST_S, _MOST_J = 1e12, 1e18  # a number beyond is damage


@dataclass(frozen=True, eq=False)
class Trace:
    """One domain of a host during one attempt: joules counted up since the attempt's first reading.

    end_s: time of its last line; beyond time_s[-1] where the meter had stopped to answer by then.
    """

    domain: str
    attempt: int
    source: str
    quality: Quality  # of the last joules that were read: a doubt stays, since joules are cumulative
    time_s: FloatArray  # (readings,) seconds of the host's clock, never decreasing
    joules: FloatArray  # (readings,)
    begin_s: float
    end_s: float

    @property
    def stopped(self) -> bool:
        """Whether its last line had no joules: what was drawn after the last reading is missing."""
        return not len(self.time_s) or self.end_s > self.time_s[-1]

    @property
    def counted_nothing(self) -> bool:
        """Whether it read 0 J while a run worked. No device draws nothing: it is less than the meter can tell."""
        return self.end_s > self.begin_s and len(self.joules) > 0 and not self.joules[-1] > 0

    @property
    def energy(self) -> Energy:
        if self.stopped:
            return Energy()
        if self.counted_nothing:
            return Energy(source=f"{self.source} {COUNTED_NOTHING}")
        return Energy(float(self.joules[-1]), self.quality, self.source)


def read_traces(path: Path) -> list[Trace]:
    """Every domain of every attempt in energy/<host>.csv. Raises `BadRecord` naming path:line."""
    by_domain: dict[tuple[str, str], list[list[str]]] = {}
    rows = read_csv(path, ENERGY_COLUMNS).rows
    for row in rows:
        by_domain.setdefault((row[5], row[1]), []).append(row)
    try:
        return [_trace(lines) for lines in by_domain.values()]
    except ValueError:
        number = next(number for number, row in enumerate(rows, 2) if not _is_reading(row))
        raise bad_line(path, number, ",".join(rows[number - 2])) from None


def contained(domain: str, others: Iterable[str]) -> str | None:
    """Which of the other domains of its host, or of all hosts, holds this one's joules already; None: none of them."""
    holds = [
        other
        for other in others
        if other != domain
        and domain.startswith(_HOLDS.get(other, ()))
        and (other in JOB_WIDE or domain not in JOB_WIDE)
    ]
    return holds[0] if holds else None


def _trace(rows: list[list[str]]) -> Trace:
    """The rows of one domain and attempt. Raises ValueError for a number that is none."""
    known = [row for row in rows if _quality(row[3]) != "missing"]
    # A clock that was set back while the run went on stands still until it has caught up.
    time_s = np.maximum.accumulate(np.array([row[0] for row in rows], dtype=float))
    joules = np.array([row[2] for row in known], dtype=float)
    if not (np.abs(time_s) < _MOST_S).all() or not ((joules >= 0) & (joules < _MOST_J)).all():
        raise ValueError("no number that a meter reads")
    is_known = np.array([_quality(row[3]) != "missing" for row in rows])
    last = (known or rows)[-1]
    begin_s, end_s = float(time_s[0]), float(time_s[-1])
    return Trace(last[1], int(last[5]), last[4], _quality(last[3]), time_s[is_known], joules, begin_s, end_s)


def _is_reading(row: list[str]) -> bool:
    try:
        _trace([row])
    except ValueError:
        return False
    return True


def read_energy(path: Path) -> Energy:
    """The energy of one host: each domain's last reading in each attempt (they are cumulative since it began)."""
    return total_energy(trace.energy for trace in read_traces(path))


def _quality(text: str) -> Quality:
    return "measured" if text == "measured" else "estimated" if text == "estimated" else "missing"


def total_energy(parts: Iterable[Energy]) -> Energy:
    """The sum over hosts or domains. Any missing part makes it missing, any estimated part an estimate.

    A sum of 0 J is missing: whoever divides by it, or compares with it, knows nothing.
    """
    known = list(parts)
    if lacking := [part.source for part in known if part.joules is None or part.quality == "missing"]:
        return Energy(source=" + ".join(sorted(set(lacking))))
    quality: Quality = "estimated" if any(part.quality == "estimated" for part in known) else "measured"
    source, joules = " + ".join(sorted({part.source for part in known})), sum(part.joules or 0.0 for part in known)
    if not joules > 0:
        return Energy(source=f"{source} {COUNTED_NOTHING}") if known else Energy()
    return Energy(joules, quality, source)


# ---------------------------------------------------------------------------------------------- summary


@dataclass(frozen=True)
class RunSummary:
    """A run in one record (`summary.json`). Times are in seconds; None is what could not be known."""

    name: str
    size: int
    num_hosts: int
    num_steps: int
    num_warmup: int  # of every attempt
    num_samples: int
    global_batch: int
    step_s: float | None  # mean over steady steps of the mean duration over the ranks that train
    step_low_s: float | None  # 95% interval of that mean
    step_high_s: float | None
    samples_per_s: float | None  # global batch / step_s: in so many seconds so many samples are trained
    step_median_s: float | None = None  # what a typical step takes; steps add up to their mean
    phase_share: dict[str, float] = field(default_factory=dict)  # of the time in steady steps of the ranks that train
    joules: float | None = None
    energy_quality: Quality = "missing"
    energy_source: str = NO_METER
    loss: float | None = None
    test: dict[str, float] = field(default_factory=dict)  # means over the test samples: loss, accuracy ...
    num_attempts: int = 1
    num_repeated: int = 0
    complete: bool = False
    fault: str | None = None  # why a run that reached its last step is no success
    schema: int = SCHEMA

    def to_json(self) -> str:
        """What is not finite becomes null: JSON has no NaN."""
        return json.dumps(_finite(asdict(self)), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value


def summarise(
    *,
    name: str,
    size: int,
    num_hosts: int,
    global_batch: int,
    step_ns: FloatArray,
    phases_ns: FloatArray,
    num_samples: int,
    num_warmup: int,
    num_repeated: int,
    energy: Energy,
    **rest: Any,
) -> RunSummary:
    """A run's summary from sums over ranks, so that ranks can reduce them and the analysis rebuild them.

    step_ns: (steady steps,) the mean of each step's duration over the ranks that train. Not the maximum: a rank's steps
    follow each other without a gap, so means add up to the time that passed, while maxima count it twice where ranks
    are slow in turn. phases_ns: (len(PHASES),) sums over the same ranks and steady steps. num_samples: of all steps.
    """
    low, middle, high = mean_interval(step_ns / 1e9)
    total = float(phases_ns.sum())
    return RunSummary(
        name=name,
        size=size,
        num_hosts=num_hosts,
        num_steps=len(step_ns) + num_warmup - num_repeated,
        num_warmup=num_warmup,
        num_repeated=num_repeated,
        num_samples=num_samples,
        global_batch=global_batch,
        step_s=middle,
        step_low_s=low,
        step_high_s=high,
        samples_per_s=global_batch / middle if middle else None,
        step_median_s=float(np.median(step_ns)) / 1e9 if len(step_ns) else None,
        # A phase that took no nanosecond was never marked, in a recorded loop say: its share is unknown and not 0.
        phase_share={phase: float(spent) / total for phase, spent in zip(PHASES, phases_ns, strict=True) if spent},
        joules=energy.joules,
        energy_quality=energy.quality,
        energy_source=energy.source,
        **rest,
    )
