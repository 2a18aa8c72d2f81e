"""CSV files of a run that are appended to while it runs, and metrics.csv, one of them."""

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from hpc_train.core.errors import UserError, not_written

# 2: the column `attempt`; 3: `test` in summary.json; 4: its step_s is the mean, not the median; 5: the phase `sync`
SCHEMA = 5
METRIC_COLUMNS = ("step", "loss")

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


_MOST_STEPS = 10**15  # a larger number is damage


class BadRecord(UserError):
    """A line that is no record. (A last line cut short by a crash is no error: it is skipped.)"""


# ---------------------------------------------------------------------------------------------- writing


def close_log(file: IO[str]) -> None:
    """Closes a file; ignores that a disk which refused its last rows refuses them again."""
    with suppress(OSError):
        file.close()


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
