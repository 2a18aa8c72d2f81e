"""Cells of tables: what one may hold, and the message that names one by row and column."""

from pathlib import Path

import numpy as np

from hpc_train.core.errors import UserError

_REMEDY = "Every value must be a number: correct it, or remove the row, or leave the column out: --drop {column}"


def bad_cell(path: Path, row: int, column: str, what: str, remedy: str = _REMEDY) -> UserError:
    """Messages count rows from 1, without the header."""
    return UserError(f"{path}, row {row + 1}, column {column}: {what}", remedy.replace("{column}", column))


def finite(path: Path, start: int, name: str, numbers: np.ndarray) -> np.ndarray:
    """The numbers of a column whose first row is `start`. Raises `UserError` at the first that is none."""
    if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
        first = int(np.argmax(~np.isfinite(numbers)))
        what = "the value is missing (NaN)" if np.isnan(numbers[first]) else "the value is infinite"
        raise bad_cell(path, start + first, name, what)
    return numbers
