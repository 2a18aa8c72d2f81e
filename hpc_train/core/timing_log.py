"""timings/rank-NNNNN.csv: one rank's steps, written in every step, read back and reduced to what a summary needs.

Durations are nanoseconds of the rank's monotonic clock; `meta.json` holds the offsets between the clocks of hosts.
"""

import io
import re
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter_ns

import numpy as np

from hpc_train.core.errors import not_written
from hpc_train.core.records import BadRecord, FloatArray, IntArray, bad_line, close_log, open_log
from hpc_train.core.rundir import write_atomic

PHASES = ("data", "forward", "backward", "reduce", "optimizer", "sync", "other")
COMMUNICATION = ("reduce", "sync")  # the phases in which a rank only sends, receives and waits
TIMING_COLUMNS = (
    *("step", "start_ns", "arrived_ns"),
    *(f"{phase}_ns" for phase in PHASES),
    *("num_samples", "warmup", "attempt"),
)
# A row without the last column (the attempt), which the log fills in. A plain tuple: one is made in every step.
StepRecord = tuple[int, ...]

_START_NS = TIMING_COLUMNS.index("start_ns")
_FLUSH_NS = 500_000_000
_MOST_ATTEMPTS = 1_000_000  # a larger number is damage
_MOST_NS, _MOST_COUNTED = 10**15, 10**12  # of one phase of one step, 11 days; of steps and samples
_MOST = np.array([_MOST_COUNTED, 1 << 62, 1 << 62, *[_MOST_NS] * len(PHASES), _MOST_COUNTED, 1, _MOST_ATTEMPTS])
_INTEGER = re.compile(r"\s*[+-]?\d{1,19}\s*")


# ------------------------------------------------------------------------------------------------ writing


class TimingLog:
    """The append-only log of one rank's steps, of which a killed process loses at most half a second.

    `write` buffers rows and hands them to the operating system when a step began more than half a second after the last
    time. The rows' own time stamps serve as the clock, so `write` reads none.
    """

    def __init__(self, path: Path, attempt: int = 1) -> None:
        _add_sync_column(path)
        self._file = open_log(path, TIMING_COLUMNS)
        self._line = ",".join(["%d"] * (len(TIMING_COLUMNS) - 1)) + f",{attempt}\n"
        self._rows: list[StepRecord] = []
        self._due_ns = perf_counter_ns() + _FLUSH_NS

    def write(self, row: StepRecord) -> None:
        self._rows.append(row)
        if row[_START_NS] > self._due_ns:
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
        self._due_ns = perf_counter_ns() + _FLUSH_NS

    def discard(self) -> None:
        """Drops the buffered rows: the file belongs to another job by now."""
        self._rows.clear()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            close_log(self._file)


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


# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Timings:
    """One rank's steps: `values` is int64 of shape (steps, len(TIMING_COLUMNS))."""

    values: IntArray
    truncated: bool

    def __getitem__(self, column: str) -> IntArray:
        return self.values[:, TIMING_COLUMNS.index(column)]

    @property
    def steady(self) -> "Timings":
        """The steps that are no warm-up: without copying where these are the first ones."""
        warmup = self["warmup"]
        num_first = int(np.argmin(warmup)) if len(warmup) and not warmup[-1] else len(warmup)
        only_first = not warmup[num_first:].any()
        return Timings(self.values[num_first:] if only_first else self.values[warmup == 0], self.truncated)

    @property
    def phases_ns(self) -> IntArray:
        """Durations in ns, shape (steps, len(PHASES))."""
        first = TIMING_COLUMNS.index("data_ns")
        return self.values[:, first : first + len(PHASES)]

    def steps_of_attempts(self, num_attempts: int) -> IntArray:
        """(num_attempts,) how many steps each attempt recorded."""
        return np.bincount(self["attempt"] - 1, minlength=num_attempts).astype(np.int64)

    def first(self, counts: IntArray) -> "Timings":
        """The first counts[a] steps of each attempt a: ranks that were killed recorded unequal numbers of them."""
        index = self["attempt"] - 1
        began = np.cumsum(np.bincount(index, minlength=len(counts))) - np.bincount(index, minlength=len(counts))
        return Timings(self.values[np.arange(len(index)) - began[index] < counts[index]], self.truncated)


def read_timings(path: Path) -> Timings:
    """One rank's step records. Raises `BadRecord` naming path:line; a last line cut short is skipped and reported.

    Columns are found by their names. Before schema 5 reduce_ns held the time of sync_ns, which reads as 0.
    """
    text = path.read_bytes()
    end = text.rfind(b"\n") + 1
    truncated = end < len(text) or not text
    if not end:
        return Timings(np.zeros((0, len(TIMING_COLUMNS)), np.int64), truncated)
    header, _, body = text[:end].partition(b"\n")
    columns = header.decode(errors="replace").split(",")
    if missing := [column for column in TIMING_COLUMNS if column not in [*columns, "sync_ns"]]:
        raise BadRecord(f"{path}:1: the header lacks {missing[0]}", f"Expected: {','.join(TIMING_COLUMNS)}")
    values = _by_name(_parsed(path, body, len(columns)), columns)
    if (row := _first_wrong_row(values)) is not None:
        raise bad_line(path, row + 2, _lines(body)[row])
    return Timings(values, truncated)


def _parsed(path: Path, body: bytes, num_columns: int) -> IntArray:
    """(lines, num_columns) integers of whole lines. Raises `BadRecord`.

    NumPy reads a line in 0.6 us, where pyarrow takes 0.4 us: not worth 170 MB in an install that only makes reports.
    """
    num_lines = body.count(b"\n")
    if not num_lines:
        return np.zeros((0, num_columns), np.int64)
    try:
        values = np.loadtxt(io.BytesIO(body), dtype=np.int64, delimiter=",", comments=None, ndmin=2)
        if values.shape == (num_lines, num_columns):  # loadtxt skips blank lines
            return values
    except ValueError:
        pass
    for number, line in enumerate(_lines(body), 2):
        cells = line.split(",")
        if len(cells) != num_columns or not all(map(_is_int64, cells)):
            raise bad_line(path, number, line)
    raise BadRecord(f"{path}: no table of integers", "Leave this run out of the report.")


def _is_int64(cell: str) -> bool:
    return _INTEGER.fullmatch(cell) is not None and abs(int(cell)) < 1 << 63


def _lines(body: bytes) -> list[str]:
    return body.decode(errors="replace").split("\n")[:-1]


def _by_name(values: IntArray, columns: list[str]) -> IntArray:
    """The columns of `TIMING_COLUMNS`, each of them contiguous in memory."""
    named = dict(zip(columns, values.T, strict=True))
    named.setdefault("sync_ns", np.zeros(len(values), np.int64))
    return np.stack([named[column] for column in TIMING_COLUMNS]).T


def _first_wrong_row(values: IntArray) -> int | None:
    """The first row that no run writes: a number out of its range, or an attempt before the one above it."""
    attempts = values[:, TIMING_COLUMNS.index("attempt")]
    wrong = ((values < 0) | (values > _MOST)).any(axis=1) | (attempts < 1)
    wrong[1:] |= attempts[1:] < attempts[:-1]
    return int(np.argmax(wrong)) if wrong.any() else None


# ------------------------------------------------------------------------------------------------ sums


@dataclass(frozen=True)
class StepTimes:
    """What ranks add to a summary: sums over `num_ranks` of them, of the same steps. Steady steps are no warm-up."""

    step_ns: IntArray | FloatArray  # (steady steps,) duration of each
    phases_ns: FloatArray  # (len(PHASES),) over all steady steps; months of thousands of ranks exceed int64
    num_samples: int  # warm-up included; of steps taken twice, once
    num_warmup: int  # of one rank, as the next
    num_repeated: int  # steps taken again, after an attempt that ended beyond its newest checkpoint
    num_ranks: int = 1

    def __add__(self, other: "StepTimes") -> "StepTimes":
        return replace(
            self,
            step_ns=self.step_ns + other.step_ns,
            phases_ns=self.phases_ns + other.phases_ns,
            num_samples=self.num_samples + other.num_samples,
            num_ranks=self.num_ranks + other.num_ranks,
        )

    @property
    def num_steps(self) -> int:
        """How many steps the run has made."""
        return len(self.step_ns) + self.num_warmup - self.num_repeated

    @property
    def mean_step_s(self) -> FloatArray:
        """(steady steps,) the mean over ranks of each step's duration."""
        return self.step_ns / max(1, self.num_ranks) / 1e9


NO_STEP_TIMES = StepTimes(np.zeros(0, np.int64), np.zeros(len(PHASES)), 0, 0, 0, num_ranks=0)


def step_times(timings: Timings) -> StepTimes:
    """Reduces one rank's records to what a summary needs."""
    phases = timings.steady.phases_ns
    steps, num_samples = timings["step"], timings["num_samples"]
    num_repeated = 0
    if (np.diff(steps) <= 0).any():
        _, last = np.unique(steps[::-1], return_index=True)
        num_samples, num_repeated = num_samples[::-1][last], len(steps) - len(last)
    return StepTimes(
        step_ns=phases.sum(axis=1),
        phases_ns=phases.sum(axis=0, dtype=np.float64),
        num_samples=int(num_samples.sum()),
        num_warmup=len(steps) - len(phases),
        num_repeated=num_repeated,
    )
