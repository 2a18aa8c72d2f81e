"""Rows of a CSV file in its usual forms: separated by commas, semicolons or tabs, with decimal commas, with text.

Each rank would have to parse the rows of all ranks before it: so an index of line positions, which the ranks build
together, tells where any row begins. pyarrow parses if it is installed, which is faster; Python's own csv gives the
same.
"""

import csv
import io
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import rank_span
from hpc_train.datasets.prepare.cells import bad_cell, finite
from hpc_train.train.comm.context import Context

_MAX_HEADER_BYTES = 1 << 20
_FIRST_BYTES = 1 << 20  # of rows, that show which columns are text
_INDEX_BYTES = 256 << 10  # between lines whose position is known
_SEPARATORS = ",;\t|"
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?")
_MISSING = ("", "NA", "N/A", "n/a", "#N/A", "NULL", "null", "NaN", "nan", "-nan", "-NaN")
_CUT_SHORT = "Do not change it meanwhile, and try again."
_UTF_8 = "It is text in UTF-8 with a header line: iconv -f latin1 -t utf-8 converts other text."


@dataclass(frozen=True)
class CsvForm:
    """How a CSV file is written. begin, end: the bytes of its rows. texts: the columns that hold text."""

    names: list[str]
    begin: int
    end: int
    separator: str = ","
    decimal: str = "."
    texts: frozenset[str] = frozenset()


class CsvRows:
    """Rows, one a line: no line ends within quotes."""

    def __init__(self, path: Path, context: Context, texts: frozenset[str] | None = None) -> None:
        """Collective. Every rank indexes the lines of its share of the bytes. texts: None to find them."""
        self._path = path
        self.form = context.on_root(lambda: csv_form(path))
        if texts is not None:
            self.form = replace(self.form, texts=texts & set(self.form.names))
        self.names, self.texts = self.form.names, self.form.texts
        mine = context.on_all(lambda: _index_share(path, self.form.begin, self.form.end, context))
        index = [entry for of_rank in context.all_gather(mine) for entry in of_rank]
        # One more entry than there are pieces: where the last one ends.
        self._first_rows = np.cumsum([0, *(num_lines for _, num_lines in index)])
        self._offsets = [*(offset for offset, _ in index), self.form.end]
        self.num_rows = int(self._first_rows[-1])
        self._parse = _with_pyarrow if _has_pyarrow() else _with_python

    def read(self, start: int, stop: int, columns: list[str]) -> list[np.ndarray]:
        first = int(np.searchsorted(self._first_rows, start, "right")) - 1
        last = int(np.searchsorted(self._first_rows, stop, "left"))
        first_row, end_row = int(self._first_rows[first]), int(self._first_rows[last])
        with self._path.open("rb") as file:
            file.seek(self._offsets[first])
            num_bytes = self._offsets[last] - self._offsets[first]
            lines = file.read(num_bytes)
        if len(lines) != num_bytes:
            raise UserError(f"{self._path} was cut short while it was read", _CUT_SHORT)
        values = self._parse(self._path, lines, first_row, self.form, columns)
        if len(values[0]) != end_row - first_row:
            what = f"{self._path}: rows {first_row + 1} to {end_row} are read as {len(values[0])}"
            raise UserError(what, "One line is one row: correct these lines.")
        wanted = [each[start - first_row : stop - first_row] for each in values]
        return [
            each if name in self.texts else finite(self._path, start, name, each)
            for name, each in zip(columns, wanted, strict=True)
        ]


# ---------------------------------------------------------------------------------------------- parsing


def _has_pyarrow() -> bool:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return False
    return True


def _with_pyarrow(path: Path, lines: bytes, first_row: int, form: CsvForm, columns: list[str]) -> list[np.ndarray]:
    """The values of `columns`, numbers as float64. Raises `UserError` for a missing value and for what is no number."""
    import pyarrow as pa
    from pyarrow import csv as pyarrow_csv

    types = {name: pa.string() if name in form.texts else pa.float64() for name in columns}
    try:
        table = pyarrow_csv.read_csv(
            io.BytesIO(lines),
            # In one block and one thread: otherwise errors do not name the row.
            pyarrow_csv.ReadOptions(use_threads=False, column_names=form.names, block_size=max(1, len(lines))),
            pyarrow_csv.ParseOptions(delimiter=form.separator, ignore_empty_lines=False),
            pyarrow_csv.ConvertOptions(
                column_types=types, include_columns=columns, decimal_point=form.decimal, null_values=list(_MISSING)
            ),
        )
    except (pa.ArrowException, ValueError, OSError) as error:
        raise _explained(path, first_row, form, str(error)) from None
    found = []
    for name in columns:
        values = table.column(name)
        if values.null_count:
            missing = values.is_null().to_numpy()
            raise bad_cell(path, first_row + int(np.argmax(missing)), name, "the value is missing")
        found.append(np.array(values.to_pylist(), str) if name in form.texts else values.to_numpy())
    return found


def _explained(path: Path, first_row: int, form: CsvForm, message: str) -> UserError:
    """pyarrow's message as ours."""
    row, column = re.search(r"Row #(\d+)", message), re.search(r"CSV column #(\d+)", message)
    value = re.search(r"invalid value '(.*)'", message)
    what = f"{value[1]!r} is no number" if value else message.splitlines()[0]
    at_row = first_row + int(row[1]) - 1 if row else first_row
    return bad_cell(path, at_row, form.names[int(column[1])] if column else "?", what)


def _with_python(path: Path, lines: bytes, first_row: int, form: CsvForm, columns: list[str]) -> list[np.ndarray]:
    """As `_with_pyarrow`."""
    try:
        rows = list(csv.reader(lines.decode().splitlines(), delimiter=form.separator))
    except (ValueError, csv.Error) as error:
        raise bad_cell(path, first_row, "?", str(error), _UTF_8) from None
    for number, row in enumerate(rows):
        if len(row) != len(form.names):
            what = f"{len(row)} values, and the header names {len(form.names)}"
            raise bad_cell(path, first_row + number, "?", what, "Correct this line.")
    found = []
    for name in columns:
        index = form.names.index(name)
        cells = [row[index] for row in rows]
        found.append(
            np.array(cells, str) if name in form.texts else _floats(path, first_row, name, cells, form.decimal)
        )
    return found


def _floats(path: Path, first_row: int, name: str, cells: list[str], decimal: str) -> np.ndarray:
    if decimal != ".":
        cells = [cell.replace(decimal, ".") for cell in cells]
    with suppress(ValueError):
        return np.array(cells, str).astype(np.float64) if cells else np.zeros(0)
    number = next(number for number, cell in enumerate(cells) if not _is_number(cell))
    is_missing = cells[number].strip() in _MISSING
    what = "the value is missing" if is_missing else f"{cells[number]!r} is no number"
    raise bad_cell(path, first_row + number, name, what)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------------------------------------- header and first rows


def csv_form(path: Path) -> CsvForm:
    """How the file is written, by its header and first rows. Raises `UserError`."""
    try:
        with path.open("rb") as file:
            line = file.readline(_MAX_HEADER_BYTES)
            begin, num_bytes = file.tell(), path.stat().st_size
            first = file.read(_FIRST_BYTES)
        header = line.decode("utf-8-sig")
        separator = max(_SEPARATORS, key=lambda each: len(_cells(header, each)))
        names = [name.strip() for name in _cells(header, separator)]
        rows = _first_rows(first, separator, len(names))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"--from {path} cannot be read: {error}", _UTF_8) from None
    if not all(names) or not names or all(map(_is_number, names)):
        raise UserError(
            f"{path} has no header: its first line is {line[:60]!r}", "It names every column, each once: a,b,c"
        )
    decimal = _decimal(rows) if separator != "," else "."
    return CsvForm(names, begin, num_bytes, separator, decimal, _texts(names, rows, decimal))


def _cells(line: str, separator: str) -> list[str]:
    return next(csv.reader(io.StringIO(line), delimiter=separator), [])


def _first_rows(first: bytes, separator: str, num_columns: int) -> list[list[str]]:
    """Those that are whole."""
    lines = first.decode(errors="replace").splitlines()
    lines = lines[:-1] if len(first) == _FIRST_BYTES else lines
    return [row for row in csv.reader(lines, delimiter=separator) if len(row) == num_columns]


def _decimal(rows: list[list[str]]) -> str:
    cells = [cell.strip() for row in rows for cell in row]
    num_commas = sum(bool(_DECIMAL_COMMA.fullmatch(cell)) for cell in cells)
    return "," if num_commas > sum("." in cell and _is_number(cell) for cell in cells) else "."


def _texts(names: list[str], rows: list[list[str]], decimal: str) -> frozenset[str]:
    """The columns of which most values are no numbers: one that is none in a column of numbers is a mistake."""
    found = set()
    for index, name in enumerate(names):
        cells = [row[index].strip().replace(decimal, ".") for row in rows]
        known = [cell for cell in cells if cell not in _MISSING]
        if 2 * sum(map(_is_number, known)) < len(known):
            found.add(name)
    return frozenset(found)


# ---------------------------------------------------------------------------------------------- the index of lines


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
