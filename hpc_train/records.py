"""The records the two halves share: what a training run writes down and what the analysis reads.

Durations are nanoseconds of a rank's monotonic clock; `meta.json` holds what aligns the clocks of different ranks.
"""

import io
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from time import perf_counter_ns
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from hpc_train.errors import UserError, not_written

SCHEMA = 3  # 2: the column `attempt`; 3: `test` in summary.json
PHASES = ("data", "forward", "backward", "reduce", "optimizer", "other")
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
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


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
    return RecordFile(path, TIMING_COLUMNS, TIMING_COLUMNS.index("start_ns"), attempt)


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
        except ValueError:
            raise bad_line(path, number, ",".join(row)) from None
    return steps, losses


# ---------------------------------------------------------------------------------------------- energy


@dataclass(frozen=True)
class Energy:
    """Joules of a run, None where nothing was read. `quality` never mixes: one estimate makes a sum an estimate."""

    joules: float | None = None
    quality: Quality = "missing"
    source: str = "no meter"

    def __str__(self) -> str:
        if self.joules is None:
            return f"energy {self.quality} ({self.source})"
        return f"{self.joules:,.4g} J {self.quality} ({self.source})"


def read_energy(path: Path) -> Energy:
    """The energy of one host: each domain's last reading in each attempt (they are cumulative since it began)."""
    last: dict[tuple[str, str], tuple[float | None, Quality, str]] = {}
    for number, row in enumerate(read_csv(path, ENERGY_COLUMNS).rows, 2):
        quality = _quality(row[3])
        try:
            joules = None if quality == "missing" else float(row[2])
        except ValueError:
            raise bad_line(path, number, ",".join(row)) from None
        if joules is not None and not isfinite(joules):
            raise bad_line(path, number, ",".join(row))
        last[row[1], row[5]] = joules, quality, row[4]
    return total_energy(Energy(*reading) for reading in last.values())


def _quality(text: str) -> Quality:
    return "measured" if text == "measured" else "estimated" if text == "estimated" else "missing"


def total_energy(parts: Iterable[Energy]) -> Energy:
    """The sum over hosts or domains. Any missing part makes it missing, any estimated part an estimate."""
    known = list(parts)
    if not known or any(part.joules is None or part.quality == "missing" for part in known):
        return Energy()
    quality: Quality = "estimated" if any(part.quality == "estimated" for part in known) else "measured"
    sources = sorted({part.source for part in known})
    return Energy(sum(part.joules or 0.0 for part in known), quality, " + ".join(sources))


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
    step_s: float | None  # median over steady steps of the mean duration over the ranks that train
    step_low_s: float | None  # 95% interval of that median
    step_high_s: float | None
    samples_per_s: float | None
    phase_share: dict[str, float] = field(default_factory=dict)  # of the time in steady steps of the ranks that train
    joules: float | None = None
    energy_quality: Quality = "missing"
    energy_source: str = "no meter"
    loss: float | None = None
    test: dict[str, float] = field(default_factory=dict)  # means over the test samples: loss, accuracy ...
    num_attempts: int = 1
    num_repeated: int = 0
    complete: bool = False
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(
            {k: v if not isinstance(v, float) or isfinite(v) else None for k, v in asdict(self).items()}, indent=2
        )


def summarise(
    *,
    name: str,
    size: int,
    num_hosts: int,
    global_batch: int,
    step_ns: FloatArray,
    phases_ns: IntArray,
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
    low, middle, high = median_interval(step_ns / 1e9)
    total = int(phases_ns.sum())
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
        # A phase that took no nanosecond was never marked, in a recorded loop say: its share is unknown and not 0.
        phase_share={phase: int(spent) / total for phase, spent in zip(PHASES, phases_ns, strict=True) if spent},
        joules=energy.joules,
        energy_quality=energy.quality,
        energy_source=energy.source,
        **rest,
    )


def median_interval(values: FloatArray, num_resamples: int = 1000, num_blocks: int = 50) -> tuple[float | None, ...]:
    """(low, median, high): the median and its 95% bootstrap interval; Nones for no values, no interval under 2.

    Neighbouring steps resemble each other, so whole blocks of consecutive steps are drawn rather than single ones
    (moving-block bootstrap, Künsch, Annals of Statistics 1989, here with disjoint blocks); each block stands for
    itself by its median. Deterministic: the generator is seeded.
    """
    if len(values) == 0:
        return None, None, None
    middle = statistics.median(values.tolist())
    if len(values) < 2:
        return None, middle, None
    medians = block_medians(values, num_blocks)
    draws = np.random.default_rng(0).integers(0, len(medians), (num_resamples, len(medians)))
    low, high = np.quantile(np.median(medians[draws], axis=1), [0.025, 0.975])
    return float(min(low, middle)), middle, float(max(high, middle))


def block_medians(values: FloatArray, num_blocks: int = 50) -> FloatArray:
    """Medians of at most `num_blocks` blocks of consecutive values."""
    return np.array([np.median(block) for block in np.array_split(values, min(num_blocks, len(values)))])
