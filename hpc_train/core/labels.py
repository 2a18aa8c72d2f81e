"""Which class a stored label is: labels may be numbers from 0, numbers of any kind, one-hot rows, or strings."""

from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_CLASSES = 1 << 16  # unless there are more samples: more different labels are identifiers, or real values
_NEARLY_ALL = 0.9
_SPARSE = 10  # times as many numbers as labels: they name classes, and are no class numbers
_MOST_SHOWN = 4
_TOO_LARGE = 1 << 62


@dataclass(frozen=True)
class Classes:
    """num: how many classes. values: the stored label of each, in order; None if labels are class numbers."""

    num: int
    values: np.ndarray | None = None

    def describe(self, name: str) -> str:
        """For the log: which labels of data set `name` are which class; "" if labels are class numbers."""
        if self.values is None:
            return ""
        shown = [repr(each) for each in self.values[:_MOST_SHOWN].tolist()]
        if self.num > _MOST_SHOWN:
            shown[-1:] = ["...", repr(self.values[-1].item())]
        return f"labels {', '.join(shown)} of {name} are classes 0 to {self.num - 1:,}"

    def listed(self) -> list[Any] | None:
        """The stored label of each class, for JSON; None if labels are class numbers."""
        return None if self.values is None else self.values.tolist()


class NoClasses(ValueError):
    """Labels that name no classes. odd: the first that does not go with the others; None if none does."""

    def __init__(self, odd: Any = None) -> None:
        super().__init__(odd)
        self.odd = odd


def find_classes(distinct: np.ndarray, num_classes: int | None, num_samples: int) -> Classes:
    """The classes of a data set with these `distinct` labels, sorted: int64 or strings. Raises `NoClasses`.

    num_classes: as the user says; None: as found. Numbers from 0 are class numbers. Numbers from 1 to the number of
    classes, numbers far apart, negative ones and strings are counted in their order.
    """
    most = num_classes or min(MAX_CLASSES, max(num_samples, 4) // 2)  # fewer than two samples a class: identifiers
    if distinct.dtype.kind == "i":
        low, high = int(distinct[0]), int(distinct[-1])
        if low == 1 and high > 1 and high == (num_classes or len(distinct)):
            return Classes(high, np.arange(1, high + 1))
        limit = num_classes or min(_SPARSE * len(distinct), max(num_samples, MAX_CLASSES))
        is_number = (distinct >= 0) & (distinct < limit)
        if is_number.all():
            return Classes(num_classes or high + 1)
        if num_classes is None and len(distinct) > most and is_number.mean() < _NEARLY_ALL:
            raise NoClasses
        is_other_count = num_classes is not None and len(distinct) != num_classes
        if 2 * is_number.sum() > len(distinct) or (is_other_count and is_number.any()):
            # Most labels are class numbers: the others are damaged, or mean that there is none.
            raise NoClasses(int(distinct[np.argmin(is_number)]))
    if len(distinct) > most:
        raise NoClasses
    return Classes(len(distinct), distinct)


def whole_numbers(stored: np.ndarray) -> np.ndarray:
    """Labels (n,), int64, of rows of numbers (n,), (n, 1) or one-hot (n, classes)."""
    if stored.ndim == 2:
        stored = stored[:, 0] if stored.shape[1] == 1 else stored.argmax(axis=1)
    return stored.astype(np.int64, copy=False)


def is_label(stored: np.ndarray) -> np.ndarray:
    """(n,) whether each row of numbers is a label: a whole number, or one-hot."""
    if stored.ndim == 2 and stored.shape[1] > 1:
        return np.asarray(((stored == 1).sum(axis=1) == 1) & ((stored != 0).sum(axis=1) == 1))
    flat = stored.reshape(len(stored))
    if flat.dtype.kind == "f":
        return np.asarray((np.trunc(flat) == flat) & (np.abs(flat) < _TOO_LARGE))
    return np.asarray(flat < _TOO_LARGE) if flat.dtype == np.uint64 else np.ones(len(flat), bool)
