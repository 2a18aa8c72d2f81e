"""The columns of CSV and Parquet files as arrays of numbers. Every error names its row and column.

pyarrow parses both. It reads a CSV file from its start only, and each rank would parse the rows of all ranks before it:
so an index of line positions, which the ranks build together, tells where any row begins.
"""

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import rank_span
from hpc_train.datasets.prepare.sources import Array
from hpc_train.train.comm.context import Context

_MAX_HEADER_BYTES = 1 << 20
_INDEX_BYTES = 256 << 10  # between lines whose position is known
_BATCH_ROWS = 1 << 14
_MAX_LISTED = 20
_SHARE_OF_REAL = 0.01
_MAX_FLOAT32 = np.finfo(np.float32).max
_MAX_EXACT_INTEGER = 2**53  # of float64
_REMEDY = "Every value must be a number: correct it, or remove the row or the column."
_CUT_SHORT = "Do not change it meanwhile, and try again."


class TableRows(Protocol):
    """A table of which any rows can be read."""

    names: list[str]
    num_rows: int

    def read(self, start: int, stop: int, columns: list[str]) -> Any:
        """Rows start to stop of `columns`, as a pyarrow table. Raises `UserError`."""


@dataclass(frozen=True)
class Columns:
    """inputs: names of the columns to learn from; target: the column to learn. is_real: it holds no class numbers."""

    path: Path
    table: TableRows
    inputs: list[str]
    target: str
    is_real: bool

    @property
    def arrays(self) -> dict[str, Array]:
        """inputs (rows, columns) float32 and targets (rows,): int64, or float32 of real numbers."""
        num_rows = self.table.num_rows
        return {
            "inputs": Array((num_rows, len(self.inputs)), np.dtype(np.float32), self._read_inputs),
            "targets": Array((num_rows,), self._target_type, self._read_targets),
        }

    @property
    def _target_type(self) -> np.dtype:
        return np.dtype(np.float32 if self.is_real else np.int64)

    def _read_inputs(self, start: int, stop: int) -> np.ndarray:
        rows = np.empty((stop - start, len(self.inputs)), np.float32)
        if not len(rows):
            return rows
        table = self.table.read(start, stop, self.inputs)
        for index, name in enumerate(self.inputs):
            numbers = _numbers(self.path, name, start, table.column(index))
            is_large = np.abs(numbers.astype(np.float64)) > _MAX_FLOAT32
            if is_large.any():
                first = int(np.argmax(is_large))
                raise _bad_cell(self.path, start + first, name, f"{numbers[first]} is too large for 32 bits")
            rows[:, index] = numbers
        return rows

    def _read_targets(self, start: int, stop: int) -> np.ndarray:
        if start == stop:
            return np.empty(0, self._target_type)
        numbers = _read_numbers(self.path, self.table, self.target, start, stop)
        if self.is_real:
            return numbers.astype(np.float32)
        return whole_numbers(self.path, self.target, start, numbers)


def open_columns(path: Path, target: str | None, context: Context) -> Columns:
    """Collective. The table at `path` (.csv or .parquet) with the column `target` as targets. Raises `UserError`."""
    context.on_all(lambda: _require_pyarrow(path))
    is_csv = path.suffix.lower() == ".csv"
    table: TableRows = _CsvRows(path, context) if is_csv else context.on_all(lambda: _ParquetRows(path))
    name = context.on_root(lambda: _target(path, table, target))
    first = context.on_root(lambda: _read_numbers(path, table, name, 0, min(table.num_rows, _BATCH_ROWS)))
    return Columns(path, table, [each for each in table.names if each != name], name, are_real(first))


def are_real(first_targets: np.ndarray) -> bool:
    """Whether the first targets of a table are real numbers, to be learned by regression, and no class numbers.

    Fewer than one in a hundred that is not whole is taken for a mistake in a cell.
    """
    is_fraction = first_targets != np.floor(first_targets)
    return first_targets.dtype.kind == "f" and bool(is_fraction.mean() > _SHARE_OF_REAL)


def _read_numbers(path: Path, table: TableRows, name: str, start: int, stop: int) -> np.ndarray:
    return _numbers(path, name, start, table.read(start, stop, [name]).column(0))


def _require_pyarrow(path: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError(f"--from {path} needs pyarrow, which cannot be found", "pip install pyarrow") from None


def _target(path: Path, table: TableRows, target: str | None) -> str:
    """The name of the column of targets. Raises `UserError` for unusable names, and for a table without data."""
    names = table.names
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        listed = ", ".join(repeated[:_MAX_LISTED])
        raise UserError(f"{path} has more than one column called {listed}", "Name every column, each once.")
    if bad := [name for name in names if "\0" in name]:
        raise UserError(f"{path} has a zero byte in the name of a column: {bad[0]!r}", "Name every column in text.")
    if target is None or target not in names:
        listed = ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")
        remedy = f"Its columns are {listed}: --target is one."
        raise UserError(f"prepare table: --target {target} is no column of {path}", remedy)
    if len(names) < 2 or not table.num_rows:
        raise UserError(f"{path} has {table.num_rows} rows of {len(names)} columns", "Inputs and a target are needed.")
    return target


def _bad_cell(path: Path, row: int, column: str, what: str, remedy: str = _REMEDY) -> UserError:
    """Messages count rows from 1, without the header."""
    return UserError(f"{path}, row {row + 1}, column {column}: {what}", remedy)


def _numbers(path: Path, name: str, start: int, values: Any) -> np.ndarray:
    """The values of a pyarrow column whose first row is `start`. Raises `UserError` if one is missing or no number."""
    import pyarrow as pa

    if values.null_count:
        missing = values.is_null().to_numpy()
        raise _bad_cell(path, start + int(np.argmax(missing)), name, "the value is missing")
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise _bad_cell(path, start, name, f"{values[0].as_py()!r} ({kind}) is no number")
    numbers: np.ndarray = values.to_numpy()
    if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
        first = int(np.argmax(~np.isfinite(numbers)))
        what = "the value is missing (NaN)" if np.isnan(numbers[first]) else "the value is infinite"
        raise _bad_cell(path, start + first, name, what)
    return numbers


def whole_numbers(path: Path, name: str, start: int, values: np.ndarray) -> np.ndarray:
    """Targets as int64. Raises `UserError` at the first that is no whole number."""
    if values.dtype.kind == "f":
        is_bad = ~(np.abs(values) < _MAX_EXACT_INTEGER) | (values != np.floor(values))
        if is_bad.any():
            first = int(np.argmax(is_bad))
            what = f"the target {values[first]} is no whole number"
            raise _bad_cell(
                path, start + first, name, what, "The first targets are the numbers of classes, so all must be."
            )
    return values.astype(np.int64)


# ---------------------------------------------------------------------------------------------- CSV


class _CsvRows:
    """Rows of a CSV file, one a line: numbers have no line ends in quotes."""

    def __init__(self, path: Path, context: Context) -> None:
        """Collective. Every rank indexes the lines of its share of the bytes."""
        self._path = path
        self.names, begin, end = context.on_root(lambda: _read_header(path))
        mine = context.on_all(lambda: _index_share(path, begin, end, context))
        index = [entry for of_rank in context.all_gather(mine) for entry in of_rank]
        # One more entry than there are pieces: where the last one ends.
        self._first_rows = np.cumsum([0, *(num_lines for _, num_lines in index)])
        self._offsets = [*(offset for offset, _ in index), end]
        self.num_rows = int(self._first_rows[-1])

    def read(self, start: int, stop: int, columns: list[str]) -> Any:
        first = int(np.searchsorted(self._first_rows, start, "right")) - 1
        last = int(np.searchsorted(self._first_rows, stop, "left"))
        first_row, end_row = int(self._first_rows[first]), int(self._first_rows[last])
        with self._path.open("rb") as file:
            file.seek(self._offsets[first])
            num_bytes = self._offsets[last] - self._offsets[first]
            lines = file.read(num_bytes)
        if len(lines) != num_bytes:
            raise UserError(f"{self._path} was cut short while it was read", _CUT_SHORT)
        table = self._parse(lines, first_row, columns)
        if table.num_rows != end_row - first_row:
            what = f"{self._path}: rows {first_row + 1} to {end_row} are read as {table.num_rows}"
            raise UserError(what, "One line is one row: correct these lines.")
        return table.slice(start - first_row, stop - start)

    def _parse(self, lines: bytes, first_row: int, columns: list[str]) -> Any:
        import pyarrow as pa
        from pyarrow import csv as pyarrow_csv

        try:
            return pyarrow_csv.read_csv(
                io.BytesIO(lines),
                # In one block and one thread: otherwise errors do not name the row.
                pyarrow_csv.ReadOptions(use_threads=False, column_names=self.names, block_size=max(1, len(lines))),
                pyarrow_csv.ParseOptions(ignore_empty_lines=False),
                pyarrow_csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.float64()), include_columns=columns),
            )
        except (pa.ArrowException, ValueError, OSError) as error:
            message = str(error)
        row, column = re.search(r"Row #(\d+)", message), re.search(r"CSV column #(\d+)", message)
        value = re.search(r"invalid value '(.*)'", message)
        what = f"{value[1]!r} is no number" if value else message.splitlines()[0]
        at_row = first_row + int(row[1]) - 1 if row else first_row
        raise _bad_cell(self._path, at_row, self.names[int(column[1])] if column else "?", what)


def _read_header(path: Path) -> tuple[list[str], int, int]:
    """(names of the columns, where the rows begin, bytes of the file)."""
    try:
        with path.open("rb") as file:
            line = file.readline(_MAX_HEADER_BYTES)
            begin, num_bytes = file.tell(), path.stat().st_size
        names = [name.strip() for name in next(csv.reader(io.StringIO(line.decode("utf-8-sig"))), [])]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"--from {path} cannot be read: {error}", "It is text in UTF-8 with a header line.") from None
    if not all(names) or not names or all(map(_is_number, names)):
        raise UserError(
            f"{path} has no header: its first line is {line[:60]!r}", "It names every column, each once: a,b,c"
        )
    return names, begin, num_bytes


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _index_share(path: Path, begin: int, end: int, context: Context) -> list[tuple[int, int]]:
    """(offset, number of lines) of pieces of whole lines, in this rank's share of bytes begin to end."""
    start, stop = rank_span(end - begin, context.world.rank, context.world.size)
    pieces = []
    with path.open("rb") as file:
        stop = end if begin + stop == end else _next_line(file, begin + stop)
        offset = begin if not start else _next_line(file, begin + start)
        file.seek(offset)
        while offset < stop:
            lines = file.read(min(_INDEX_BYTES, stop - offset))
            if not lines:
                raise UserError(f"{path} was cut short while it was read", _CUT_SHORT)
            if not lines.endswith(b"\n"):
                lines += file.readline()
            pieces.append((offset, lines.count(b"\n") + (not lines.endswith(b"\n"))))  # the last may lack its end
            offset += len(lines)
    return pieces


def _next_line(file: Any, offset: int) -> int:
    """Where the first line begins that begins at `offset` or later."""
    file.seek(offset - 1)
    file.readline()
    return int(file.tell())


# ---------------------------------------------------------------------------------------------- Parquet


class _ParquetRows:
    """Rows of a Parquet file, read forward in batches: a row group may be larger than memory.

    A call that continues where the last one ended takes the batches that follow. Any other begins again at its group.
    """

    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        self._path = path
        try:
            self._file = parquet.ParquetFile(path)
            metadata = self._file.metadata
            group_rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
            self.names, self.num_rows = list(self._file.schema_arrow.names), metadata.num_rows
            if sum(group_rows) != self.num_rows or min(group_rows, default=0) < 0:
                raise ValueError(f"its groups have {sum(group_rows)} rows, and it says {self.num_rows}")
        except Exception as error:  # noqa: BLE001  pyarrow raises all kinds of errors for a damaged file
            raise UserError(
                f"--from {path} cannot be read: {_first_line(error)}", "Write the Parquet file again."
            ) from None
        self._group_starts = np.cumsum([0, *group_rows])
        self._columns: list[str] = []
        self._next_row = 0
        self._batches: Any = iter(())
        self._rest: Any = None  # of the last batch

    def read(self, start: int, stop: int, columns: list[str]) -> Any:
        import pyarrow as pa

        try:
            if columns != self._columns or start < self._next_row:
                self._seek(start, columns)
            taken: list[Any] = []
            while self._next_row < stop:
                taken += self._take(start, stop)
            return pa.Table.from_batches(taken).select(columns)
        except Exception as error:  # noqa: BLE001  as above
            self._columns = []
            what = f"{self._path}: rows {start} to {stop} cannot be read: {_first_line(error)}"
            raise UserError(what, "Write it again.") from None

    def _seek(self, row: int, columns: list[str]) -> None:
        """Begins with the row group that holds `row`."""
        group = int(np.searchsorted(self._group_starts, row, "right")) - 1
        groups = range(group, len(self._group_starts) - 1)
        self._batches = self._file.iter_batches(_BATCH_ROWS, groups, columns, use_threads=False)
        self._columns, self._next_row, self._rest = columns, int(self._group_starts[group]), None

    def _take(self, start: int, stop: int) -> list[Any]:
        """The rows of the next batch that are rows start to stop."""
        batch = next(self._batches) if self._rest is None else self._rest
        first, end = max(0, start - self._next_row), min(len(batch), stop - self._next_row)
        self._next_row += end
        self._rest = batch.slice(end) if end < len(batch) else None
        return [batch.slice(first, end - first)] if first < end else []


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
