"""The columns of CSV and Parquet files as arrays of numbers. Every error names its row and column."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.datasets.prepare.categories import find_categories, numbers_of
from hpc_train.datasets.prepare.cells import bad_cell
from hpc_train.datasets.prepare.csv_rows import CsvRows
from hpc_train.datasets.prepare.like import read_form
from hpc_train.datasets.prepare.parquet_rows import ParquetRows
from hpc_train.datasets.prepare.sources import Array, Options
from hpc_train.train.comm.context import Context

_BATCH_ROWS = 1 << 14
_MAX_LISTED = 20
_SHARE_OF_REAL = 0.01
_MAX_FLOAT32 = np.finfo(np.float32).max
_MAX_EXACT_INTEGER = 2**53  # of float64


class TableRows(Protocol):
    """A table of which any rows can be read. texts: the columns that hold text."""

    names: list[str]
    texts: frozenset[str]
    num_rows: int

    def read(self, start: int, stop: int, columns: list[str]) -> list[np.ndarray]:
        """Rows start to stop of each of `columns`: finite numbers, or strings. Raises `UserError` for a bad cell."""


@dataclass(frozen=True)
class Columns:
    """inputs: names of the columns to learn from; targets: the columns to learn. is_real: they hold no class numbers.

    categories: the different texts of each column of text, in order. one_hot: whether each text is an input of its own,
    which is 1 or 0; else a column of text is one input, the number of its text.
    """

    path: Path
    table: TableRows
    inputs: list[str]
    targets: list[str]
    is_real: bool
    categories: dict[str, list[str]]
    one_hot: bool

    @property
    def arrays(self) -> dict[str, Array]:
        """inputs (rows, columns) float32 and targets (rows,) or (rows, columns): int64, or float32 of real numbers.

        No targets of a table that lacks one of their columns.
        """
        num_rows = self.table.num_rows
        several = (len(self.targets),) if len(self.targets) > 1 else ()
        inputs = {"inputs": Array((num_rows, len(self.input_names)), np.dtype(np.float32), self._read_inputs)}
        if not set(self.targets) <= set(self.table.names):
            return inputs
        return inputs | {"targets": Array((num_rows, *several), self._target_type, self._read_targets)}

    @property
    def input_names(self) -> list[str]:
        """Of the columns of the inputs, such as weight and colour=red."""
        names: list[str] = []
        for name in self.inputs:
            is_text = name in self.categories and self.one_hot
            names += [f"{name}={text}" for text in self.categories[name]] if is_text else [name]
        return names

    @property
    def facts(self) -> dict[str, Any]:
        """For the file's attributes."""
        target = self.targets[0] if len(self.targets) == 1 else self.targets
        facts: dict[str, Any] = {"columns": self.input_names, "target": target}
        return facts | ({"categories": json.dumps(self.categories)} if self.categories else {})

    @property
    def _target_type(self) -> np.dtype:
        return np.dtype(np.float32 if self.is_real else np.int64)

    def _read_inputs(self, start: int, stop: int) -> np.ndarray:
        rows = np.empty((stop - start, len(self.input_names)), np.float32)
        if not len(rows):
            return rows
        column = 0
        for name, values in zip(self.inputs, self.table.read(start, stop, self.inputs), strict=True):
            numbers = self._numbers(name, start, values)
            if name in self.categories and self.one_hot:
                num = len(self.categories[name])
                rows[:, column : column + num] = numbers[:, None] == np.arange(num)
                column += num
            else:
                rows[:, column] = self._in_float32(name, start, numbers)
                column += 1
        return rows

    def _read_targets(self, start: int, stop: int) -> np.ndarray:
        if start == stop:
            return np.empty((0, *self.arrays["targets"].shape[1:]), self._target_type)
        columns = [
            self._numbers(name, start, values)
            for name, values in zip(self.targets, self.table.read(start, stop, self.targets), strict=True)
        ]
        if not self.is_real:
            return whole_numbers(self.path, self.targets[0], start, columns[0])
        reals = [self._in_float32(name, start, each) for name, each in zip(self.targets, columns, strict=True)]
        return np.stack(reals, axis=1).astype(np.float32) if len(reals) > 1 else reals[0].astype(np.float32)

    def _numbers(self, name: str, start: int, values: np.ndarray) -> np.ndarray:
        """Texts by their number among the column's."""
        if name not in self.categories:
            return values
        numbers, unknown = numbers_of(values, self.categories[name])
        if unknown is not None:
            shown = ", ".join(self.categories[name][:_MAX_LISTED])
            what = f"'{values[unknown]}' is none of the texts {shown}"
            raise bad_cell(self.path, start + unknown, name, what, "Correct it, or remove the row.")
        return numbers

    def _in_float32(self, name: str, start: int, numbers: np.ndarray) -> np.ndarray:
        is_large = np.abs(numbers.astype(np.float64)) > _MAX_FLOAT32
        if is_large.any():
            first = int(np.argmax(is_large))
            raise bad_cell(self.path, start + first, name, f"{numbers[first]} is too large for 32 bits")
        return numbers


def open_columns(path: Path, options: Options, context: Context) -> Columns:
    """Collective. The table at `path` with the columns options.target as targets. Raises `UserError`."""
    if options.like is not None:
        return _columns_like(path, options.like, context)
    table = _open_rows(path, context)
    targets = context.on_root(lambda: _targets(path, table, options.target))
    inputs = context.on_root(lambda: _inputs(path, table, targets, options.drop))
    texts = [name for name in (*inputs, *targets) if name in table.texts]
    if len(targets) > 1 and (wrong := [name for name in targets if name in texts]):
        context.on_root(lambda: _refuse_texts(path, wrong[0]))
    categories = {name: _categories(path, table, name, context) for name in texts}
    is_real = len(targets) > 1 or (
        targets[0] not in texts
        and context.on_root(lambda: are_real(table.read(0, min(table.num_rows, _BATCH_ROWS), targets)[0]))
    )
    return Columns(path, table, inputs, targets, is_real, categories, options.categories != "codes")


def _open_rows(path: Path, context: Context, texts: frozenset[str] | None = None) -> TableRows:
    """Collective. texts: the columns of text; None to find them."""
    if path.suffix.lower() == ".parquet":
        return context.on_all(lambda: ParquetRows(path))
    return CsvRows(path, context, texts)


def _columns_like(path: Path, like: Path, context: Context) -> Columns:
    """Collective. The table at `path` with the columns, in their order, and the texts of the prepared file `like`."""
    form = context.on_root(lambda: read_form(like))
    table = _open_rows(path, context, frozenset(form.categories))
    columns = Columns(path, table, form.inputs, form.targets, form.is_real, form.categories, form.one_hot)
    context.on_root(lambda: _require_columns(columns, like))
    return columns


def _require_columns(columns: Columns, like: Path) -> None:
    """Raises `UserError` if a column of the inputs is not there, or holds numbers in place of text."""
    path, table = columns.path, columns.table
    _require_names(path, table.names)
    if missing := [name for name in columns.inputs if name not in table.names]:
        raise UserError(
            f"{path} has no column {missing[0]}, which {like} was made of",
            f"Its columns are {_shown(table.names)}. Name them as in the training data.",
        )
    for name in (*columns.inputs, *columns.targets):
        if name in table.names and (name in columns.categories) != (name in table.texts):
            kinds = ("text", "numbers") if name in columns.categories else ("numbers", "text")
            raise UserError(
                f"{path}: column {name} holds {kinds[1]}, and {kinds[0]} in the training data",
                "Write what the training data hold.",
            )
    if not table.num_rows:
        raise UserError(f"{path} has no rows", "Name a table with rows.")
    if left_out := [name for name in table.names if name not in (*columns.inputs, *columns.targets)]:
        print(f"Left out, since {like} has no such columns: {_shown(left_out)}", flush=True)


def are_real(first_targets: np.ndarray) -> bool:
    """Whether the first targets of a table are real numbers, to be learned by regression, and no class numbers.

    Fewer than one in a hundred that is not whole is taken for a mistake in a cell.
    """
    is_fraction = first_targets != np.floor(first_targets)
    return first_targets.dtype.kind == "f" and bool(is_fraction.mean() > _SHARE_OF_REAL)


def _targets(path: Path, table: TableRows, target: str | None) -> list[str]:
    """The names of the columns of targets. Raises `UserError` for unusable names, and for a table without data."""
    names = table.names
    _require_names(path, names)
    wanted = [] if target is None else _listed(target, names)
    if not wanted or (unknown := [name for name in wanted if name not in names]):
        shown = target if target is None or not wanted else unknown[0]
        raise UserError(
            f"prepare table: --target {shown} is no column of {path}",
            f"Its columns are {_shown(names)}: --target is one, or several: a,b.",
        )
    if len(names) <= len(wanted) or not table.num_rows:
        raise UserError(f"{path} has {table.num_rows} rows of {len(names)} columns", "Inputs and a target are needed.")
    return wanted


def _require_names(path: Path, names: list[str]) -> None:
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        listed = ", ".join(repeated[:_MAX_LISTED])
        raise UserError(f"{path} has more than one column called {listed}", "Name every column, each once.")
    if bad := [name for name in names if "\0" in name]:
        raise UserError(f"{path} has a zero byte in the name of a column: {bad[0]!r}", "Name every column in text.")


def _inputs(path: Path, table: TableRows, targets: list[str], drop: str | None) -> list[str]:
    left_out = [] if drop is None else _listed(drop, table.names)
    for name in left_out:
        if name not in table.names or name in targets:
            what = "is the target" if name in targets else f"is no column of {path}"
            others = [each for each in table.names if each not in targets]
            raise UserError(f"prepare table: --drop {name} {what}", f"Columns to leave out: {_shown(others)}.")
    inputs = [name for name in table.names if name not in (*targets, *left_out)]
    if not inputs:
        raise UserError(f"prepare table: --drop {drop} leaves no inputs", "Leave a column of inputs in.")
    return inputs


def _listed(words: str, names: list[str]) -> list[str]:
    """ "a,b" -> ["a", "b"], unless it is one name."""
    return [words] if words in names else [word.strip() for word in words.split(",")]


def _shown(names: list[str]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")


def _refuse_texts(path: Path, name: str) -> None:
    raise UserError(f"{path}: column {name} holds text, and several targets are numbers", "Name one target of text.")


def _categories(path: Path, table: TableRows, name: str, context: Context) -> list[str]:
    """Collective."""
    remedy = f"They are no categories: leave it out (--drop {name}), or write numbers."
    return find_categories(partial(_texts, table, name), table.num_rows, f"{path}: column {name}", remedy, context)


def _texts(table: TableRows, name: str, start: int, stop: int) -> np.ndarray:
    return table.read(start, stop, [name])[0]


def whole_numbers(path: Path, name: str, start: int, values: np.ndarray) -> np.ndarray:
    """Targets as int64. Raises `UserError` at the first that is no whole number."""
    if values.dtype.kind == "f":
        is_bad = ~(np.abs(values) < _MAX_EXACT_INTEGER) | (values != np.floor(values))
        if is_bad.any():
            first = int(np.argmax(is_bad))
            what = f"the target {values[first]} is no whole number"
            raise bad_cell(
                path, start + first, name, what, "The first targets are the numbers of classes, so all must be."
            )
    return values.astype(np.int64)
