"""One rank's step records, read back, and what they come to."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpc_train.core.records import PHASES, TIMING_COLUMNS, FloatArray, IntArray, bad_line, read_csv

_MOST_ATTEMPTS = 1_000_000  # a number beyond is damage
_MOST_NS, _MOST_COUNTED = 10**15, 10**12  # of one phase of one step, 11 days; steps and samples: beyond is damage
_MOST = np.array([_MOST_COUNTED, 1 << 62, 1 << 62, *[_MOST_NS] * len(PHASES), _MOST_COUNTED, 1, _MOST_ATTEMPTS])
_COMMA, _NEWLINE, _DIGIT_0, _DIGIT_9 = b",\n09"
_LINE_END = np.array([_COMMA] * (len(TIMING_COLUMNS) - 1) + [_NEWLINE], dtype=np.uint8)  # what ends each cell of a line
_HEADER = (",".join(TIMING_COLUMNS) + "\n").encode()
_SAFE_DIGITS = 18  # every integer of so many digits fits into 64 bits


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
    """One rank's step records. Raises `BadRecord` naming path:line; a last line cut short is skipped and said."""
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    values = _parsed(text[:whole])
    truncated = whole < len(text)
    if values is None:  # not as timing_log writes it: read as a person would, to name what is wrong
        values, truncated = _read_slowly(path)
    timings = Timings(values, truncated)
    attempts = timings["attempt"]
    follows = attempts[1:] >= attempts[:-1]  # an attempt follows the one before
    if len(values) and not (attempts[0] >= 1 and follows.all() and attempts[-1] <= _MOST_ATTEMPTS):
        row = 0 if attempts[0] < 1 else len(values) - 1 if follows.all() else int(np.argmin(follows)) + 1
        raise bad_line(path, row + 2, text.split(b"\n")[row + 1].decode("ascii", "replace"))
    if len(values) and ((values.min(axis=0) < 0) | (values.max(axis=0) > _MOST)).any():
        row = int(np.argmax(((values < 0) | (values > _MOST)).any(axis=1)))
        raise bad_line(path, row + 2, text.split(b"\n")[row + 1].decode("ascii", "replace"))
    return timings


def _parsed(text: bytes) -> IntArray | None:
    """(steps, len(TIMING_COLUMNS)) of whole lines that are all as they should be, None of any others.

    The check of commas and digits lets `np.fromstring` be used, which by itself takes much for a number that is none:
    together 0.5 us a line, a tenth of what splitting and int() take.
    """
    if not text.startswith(_HEADER):
        return None
    letters = np.frombuffer(text, dtype=np.uint8, offset=len(_HEADER))
    ends = np.flatnonzero(letters < _DIGIT_0)
    widths = np.diff(ends) - 1
    if (
        len(letters) == 0
        or len(ends) % len(_LINE_END)
        or (letters[ends].reshape(-1, len(_LINE_END)) != _LINE_END).any()
        or letters.max() > _DIGIT_9
        or not 1 <= ends[0] <= _SAFE_DIGITS
        or widths.min() < 1
        or widths.max() > _SAFE_DIGITS
    ):
        return None
    numbers = np.fromstring(text[len(_HEADER) :].replace(b"\n", b","), dtype=np.int64, sep=",")
    assert len(numbers) == len(ends), "every cell is digits between separators"
    return np.asfortranarray(numbers.reshape(-1, len(TIMING_COLUMNS)))  # columns are what everybody wants


def _read_slowly(path: Path) -> tuple[IntArray, bool]:
    """The values cell by cell, and whether the last line was cut short. Raises `BadRecord` naming path:line."""
    table = read_csv(path, TIMING_COLUMNS)
    try:
        values = np.array([row[: len(TIMING_COLUMNS)] for row in table.rows], dtype=np.int64)
    except (ValueError, OverflowError):
        number = next(number for number, row in enumerate(table.rows, 2) if not _fits(row[: len(TIMING_COLUMNS)]))
        raise bad_line(path, number, ",".join(table.rows[number - 2])) from None
    return values.reshape(-1, len(TIMING_COLUMNS)), table.truncated


def _fits(row: list[str]) -> bool:
    """Whether every cell is an integer of 64 bits."""
    try:
        np.array(row, dtype=np.int64)
    except (ValueError, OverflowError):
        return False
    return True


@dataclass(frozen=True)
class StepTimes:
    """What one rank adds to a summary: per-step durations and its phase totals over steady (not warm-up) steps."""

    step_ns: IntArray  # (steps,) whole duration of every steady step
    phases_ns: FloatArray  # (len(PHASES),) totals over the steady steps; months of thousands of ranks are no int64
    num_samples: int  # trained by this rank, warm-up included; of steps taken twice, once
    num_warmup: int
    num_repeated: int  # steps taken again, after an attempt that ended beyond its newest checkpoint


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
