"""CSV records of a run: written by the training half in every step, read by the analysis.

Durations are nanoseconds of a rank's monotonic clock; `meta.json` holds the offsets between the clocks of hosts.
"""

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import IO

import numpy as np
import numpy.typing as npt

from hpc_train.core.errors import UserError, not_written
from hpc_train.core.rundir import write_atomic

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

# One row of timings/rank-NNNNN.csv without the last column (the attempt), which the file fills in. A plain tuple:
# one is made in every step.
StepRecord = tuple[int, ...]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


_MOST_STEPS = 10**15  # a larger number is damage


class BadRecord(UserError):
    """A line that is no record. (A last line cut short by a crash is no error: it is skipped.)"""


# ---------------------------------------------------------------------------------------------- writing


class RecordFile:
    """An append-only CSV file of integer records, of which a killed process loses at most half a second.

    `write` buffers rows and hands them to the operating system once `flush_s` have passed since the last time. The
    rows' own time stamps (column `time_column`) serve as the clock, so `write` reads none. last: the value of the last
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
        """Hands every row to the operating system, where a SIGKILL no longer affects it."""
        line = self._line  # measured per row: % on a ready-made line 0.9 us, repr 1.6, str and join 1.8, csv.writer 2.6
        text = "".join([line % row for row in self._rows])
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise not_written(self._file.name, error, len(text)) from None
        self._rows.clear()
        self._due_ns = perf_counter_ns() + self._flush_ns

    def discard(self) -> None:
        """Drops the buffered rows: the file belongs to another job by now."""
        self._rows.clear()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            close_log(self._file)


def close_log(file: IO[str]) -> None:
    """Closes a file; ignores that a disk which refused its last rows refuses them again."""
    with suppress(OSError):
        file.close()


def timing_log(path: Path, attempt: int = 1) -> RecordFile:
    """The log of one rank's steps. Buffered rows are flushed when a step began more than half a second after them."""
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
    """Opens a CSV file for appending. A new file gets its header; a last line cut short by a crash is removed.

    Raises UserError if the disk refuses.
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
    """The rows of one CSV file; truncated: its last line was cut short and skipped."""

    rows: list[list[str]]
    truncated: bool


def read_csv(path: Path, columns: Sequence[str]) -> Table:
    """The rows of a CSV file whose header begins with `columns`. Raises `BadRecord` naming path:line."""
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


def read_intact_metrics(path: Path) -> dict[int, float]:
    """{step: loss} of the intact lines of a metrics.csv that a crash may have cut, repeated or filled with zeros.

    The last line of a step counts. {} if there is no file.
    """
    losses: dict[int, float] = {}
    data = path.read_bytes() if path.exists() else b""
    for line in data[: data.rfind(b"\n") + 1].splitlines()[1:]:
        with suppress(ValueError):
            step, loss = line.split(b",")
            losses[int(step)] = float(loss)
    return losses
