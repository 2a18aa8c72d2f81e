"""Class labels as files store them, read as class numbers: whole numbers, one-hot rows or strings."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.labels import MAX_CLASSES, Classes, NoClasses, find_classes, is_label, whole_numbers
from hpc_train.core.sampling import rank_span
from hpc_train.train.comm.context import Context, joint
from hpc_train.train.data.dataset import Part, Split
from hpc_train.train.data.reader_interface import Reader
from hpc_train.train.data.readers import MmapReader

_SCAN_ROWS = 1 << 20  # of numbers
_REMEDY = (
    "Labels are whole numbers, one-hot rows or strings, one a sample: correct the data, or set data.targets to another "
    "data set."
)


class ClassReader(Reader):
    """Class numbers, int64 of shape (n,), of stored labels. values: see `Classes`."""

    def __init__(self, stored: Reader, values: np.ndarray | None) -> None:
        self._stored, self._values = stored, values
        self.shape, self.dtype = (len(stored),), np.dtype(np.int64)
        self.description, self.chunk_edges = stored.description, stored.chunk_edges

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        labels = whole_numbers(self._stored.take(rows))
        if self._values is not None:
            labels = np.searchsorted(self._values, labels)
        if out is None:
            return labels
        out[...] = labels
        return out

    def prefetch(self, rows: np.ndarray) -> None:
        self._stored.prefetch(rows)

    def close(self) -> None:
        self._stored.close()


class CheckedReader(Reader):
    """Labels of which each is to be a class number below `num`. told: whose they are, for messages."""

    def __init__(self, stored: Reader, num: int, told: str) -> None:
        self._stored, self._num, self._told = stored, num, told
        self.shape, self.dtype = stored.shape, stored.dtype
        self.description, self.chunk_edges = stored.description, stored.chunk_edges

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Raises `UserError` for a label that is no class number."""
        labels = self._stored.take(rows, out)
        wrong = np.flatnonzero((labels < 0) | (labels >= self._num))
        if len(wrong):
            raise UserError(
                f"{self._told}: label {labels[wrong[0]]} in row {rows[wrong[0]]:,} is none of 0 to {self._num - 1:,}",
                "Correct it, or task.num_classes. Without that key all labels are read first, and may be any numbers.",
            )
        return labels

    def prefetch(self, rows: np.ndarray) -> None:
        self._stored.prefetch(rows)

    def close(self) -> None:
        self._stored.close()


# ------------------------------------------------------------------------------------------------ opening


def open_classes(parts: list[Part], num_classes: int | None, context: Context) -> tuple[list[Part], Classes]:
    """Collective. The parts with class numbers as targets, and the classes. Reads all labels, each rank a part.

    The training samples come first. num_classes: as the user says; None: as found. Raises `UserError` for a value that
    is no label, and for a label of another part that the training samples do not have.
    """
    train = parts[0]
    labels = _Stored(train.files.paths[0], train.targets, train.split.targets, num_classes)
    distinct = labels.distinct(context)
    width = labels.num_columns  # of one-hot rows, of which some classes may have none
    try:
        classes = find_classes(distinct, num_classes or width, len(train.split))
    except NoClasses as error:
        if error.odd is not None:
            raise labels.odd(error.odd, "numbers from 0, as most labels are", context) from None
        raise joint(labels.no_classes(distinct, num_classes)) from None
    labels.require_known(classes, distinct, context)
    first = train.having(replace(train.split, targets=labels.as_class_numbers(classes.values, context)))
    others = [
        part.having(in_classes(part.split, part.targets, part.files.paths[0], classes, context)) for part in parts[1:]
    ]
    return [first, *others], classes


def stated_classes(parts: list[Part], num_classes: int) -> tuple[list[Part], Classes]:
    """The parts with class numbers as targets, of data that take long to read: labels are checked as they are read."""

    def checked(part: Part) -> Part:
        told = f"{part.files.paths[0]}: {part.targets}"
        return part.having(replace(part.split, targets=CheckedReader(part.split.targets, num_classes, told)))

    return [checked(part) for part in parts], Classes(num_classes)


def have_class_numbers(part: Part) -> bool:
    """Whether its labels are integers, one a sample, and so may be class numbers."""
    return part.split.targets.dtype.kind in "iu" and len(part.split.targets.shape) == 1


def in_classes(split: Split, name: str, path: Path, classes: Classes, context: Context) -> Split:
    """Collective. The split with class numbers as targets. Raises `UserError` for a label that is none of `classes`."""
    labels = _Stored(path, name, split.targets, classes.num)
    labels.require_known(classes, labels.distinct(context), context)
    return replace(split, targets=labels.as_class_numbers(classes.values, context))


@dataclass(frozen=True)
class _Stored:
    """The labels of data set `name`, as stored. num_classes: as the user says; None: as found."""

    path: Path
    name: str
    reader: Reader
    num_classes: int | None = None

    @property
    def num_columns(self) -> int | None:
        """Of one-hot rows; None for other labels."""
        is_one_hot = len(self.reader.shape) == 2 and self.reader.shape[1] > 1
        return self.reader.shape[1] if is_one_hot else None

    @property
    def _are_strings(self) -> bool:
        return self.reader.dtype.kind == "O"

    def distinct(self, context: Context) -> np.ndarray:
        """Collective. The distinct labels, sorted; all ranks raise `UserError` for a value that is none."""
        mine = context.on_all(partial(self._distinct_of_my_part, context))
        is_large = mine.dtype.kind != "i" or bool(len(mine) and (mine[0] < 0 or mine[-1] >= MAX_CLASSES))
        if not context.sum(np.array([is_large], np.int64))[0]:
            # The usual case: a sum of fixed size, however many ranks there are.
            return np.flatnonzero(context.sum(np.bincount(mine, minlength=MAX_CLASSES)))
        return context.merge(mine, self._merged)

    @property
    def _most_strings(self) -> int:
        """More different ones are no classes."""
        return max(MAX_CLASSES, self.num_classes or 0)

    def _merged(self, some: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Of strings no more than show that they are too many."""
        found = np.union1d(some, others)
        return found[: self._most_strings + 1] if self._are_strings else found

    def _distinct_of_my_part(self, context: Context) -> np.ndarray:
        shape = self.reader.shape
        if len(shape) != 1 and not (len(shape) == 2 and shape[1] and not self._are_strings):
            raise UserError(f"{self.path}: {self.name} is {self.reader.dtype} {shape}, and no labels", _REMEDY)
        found = np.zeros(0, "U1" if self._are_strings else np.int64)
        for begin, part in self._my_parts(context):
            if not self._are_strings:
                wrong = np.flatnonzero(~is_label(part))
                if len(wrong):
                    what = f"{part[wrong[0]]} in {self.name}, row {begin + wrong[0]:,}, is no label"
                    raise UserError(f"{self.path}: {what}", _REMEDY)
                part = whole_numbers(part)
            found = self._merged(found, _unique(part))
        return found

    def _my_parts(self, context: Context) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, values) of this rank's part of all rows, block by block."""
        start, stop = rank_span(len(self.reader), context.world.rank, context.world.size)
        for begin in range(start, stop, _SCAN_ROWS):
            yield begin, self.reader[begin : min(begin + _SCAN_ROWS, stop)]

    def require_known(self, classes: Classes, distinct: np.ndarray, context: Context) -> None:
        """Collective. Raises `UserError` if one of the `distinct` labels is none of `classes`."""
        known = np.arange(classes.num) if classes.values is None else classes.values
        unknown = distinct[~np.isin(distinct, known)]
        if len(unknown):
            raise self.odd(unknown[0].item(), f"the {classes.num:,} classes", context)

    def as_class_numbers(self, values: np.ndarray | None, context: Context) -> Reader:
        """Collective. A reader of class numbers; those of strings are kept in memory. values: see `Classes`."""
        if self._are_strings:
            assert values is not None
            kind = np.min_scalar_type(max(0, len(values) - 1))  # one byte a sample for up to 256 classes, on every rank
            numbers = [np.searchsorted(values, part).astype(kind) for _, part in self._my_parts(context)]
            mine = np.concatenate([np.zeros(0, kind), *numbers])
            return MmapReader(np.concatenate(context.all_gather(mine)))
        is_stored_so = self.reader.dtype.kind in "iu" and len(self.reader.shape) == 1 and values is None
        return self.reader if is_stored_so else ClassReader(self.reader, values)

    def odd(self, label: Any, others: str, context: Context) -> UserError:
        """Collective. The error of a label that is none of the `others`."""
        row = context.on_root(partial(self._first_row, label))
        return joint(
            UserError(
                f"{self.path}: label {label!r} in {self.name}, row {row:,}, is none of {others}",
                "Correct the data, or set task.num_classes to one more than the largest label."
                if isinstance(label, int)
                else "Correct the data: every class needs samples to train on.",
            )
        )

    def _first_row(self, label: Any) -> int:
        for begin in range(0, len(self.reader), _SCAN_ROWS):
            part = self.reader[begin : begin + _SCAN_ROWS]
            where = np.flatnonzero((part if self._are_strings else whole_numbers(part)) == label)
            if len(where):
                return begin + int(where[0])
        raise AssertionError(f"no row has label {label}, which was found in one")

    def no_classes(self, distinct: np.ndarray, num_classes: int | None) -> UserError:
        is_cut = self._are_strings and len(distinct) > self._most_strings
        more, num = "more than " * is_cut, min(len(distinct), self._most_strings) if is_cut else len(distinct)
        shown = ", ".join(repr(each) for each in distinct[:3].tolist())
        limit = "" if num_classes is None else f", and task.num_classes = {num_classes:,}"
        return UserError(
            f"{self.path}: {self.name} has {more}{num:,} different labels ({shown}, ...){limit}: they name no classes",
            _REMEDY,
        )


def _unique(labels: np.ndarray) -> np.ndarray:
    """Distinct labels, sorted. Small numbers are counted, which is ten times as fast as sorting them."""
    if labels.dtype.kind == "i" and labels.min() >= 0 and labels.max() < MAX_CLASSES:
        return np.flatnonzero(np.bincount(labels))
    return np.unique(labels)
