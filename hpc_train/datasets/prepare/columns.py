"""CSV and Parquet by rows: where each begins, and the numbers of any of them, every error with its row and column."""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import rank_span
from hpc_train.datasets.prepare.sources import Array
from hpc_train.train.comm.context import Context

_SCAN_BYTES = 4 << 20
_BATCH_ROWS = 1 << 14
_PIECE_BYTES = 256 << 10  # between lines of which the place in the file is known
_REMEDY = "Every value must be a number: mend it, or leave the row or the column out."
Read = Callable[[int, int, Sequence[str]], Any]  # rows start to stop of some columns, as a pyarrow table


@dataclass(frozen=True)
class Columns:
    """`inputs` (rows, columns) float32, `targets` (rows,) int64; `names` are the inputs' columns."""

    inputs: Array
    targets: Array
    names: list[str]
    target: str


def opened(path: Path, target: str | None, context: Context) -> Columns:
    """Collective. The table at `path` (.csv or .parquet) with the column `target` as targets. Raises `UserError`."""
    context.on_all(partial(_require_pyarrow, path))
    if path.suffix.lower() == ".csv":
        names, num_rows, read = _csv(path, context)
    else:
        names, num_rows, read = context.on_all(partial(_parquet, path))
    target = context.on_root(lambda: _target(path, names, num_rows, target))
    inputs = [name for name in names if name != target]

    def read_inputs(start: int, stop: int) -> np.ndarray:
        rows = np.empty((stop - start, len(inputs)), np.float32)
        if stop > start:
            table = read(start, stop, inputs)
            for at, name in enumerate(inputs):
                numbers = _numbers(path, name, start, table.column(at))
                if len(large := np.flatnonzero(np.abs(numbers.astype(np.float64)) > np.finfo(np.float32).max)):
                    raise _fault(path, start + int(large[0]), name, f"{numbers[large[0]]} is too large for 32 bits")
                rows[:, at] = numbers
        return rows

    def read_targets(start: int, stop: int) -> np.ndarray:
        if stop == start:
            return np.empty(0, np.int64)
        return whole(path, target, start, _numbers(path, target, start, read(start, stop, [target]).column(0)))

    return Columns(
        Array((num_rows, len(inputs)), np.dtype(np.float32), read_inputs),
        Array((num_rows,), np.dtype(np.int64), read_targets),
        inputs,
        target,
    )


def _target(path: Path, names: list[str], num_rows: int, target: str | None) -> str:
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"{path} has more than one column called {', '.join(repeated[:20])}", "Name every column, each once."
        )
    if bad := [name for name in names if "\0" in name]:
        raise UserError(f"{path} has a zero byte in the name of a column: {bad[0]!r}", "Name every column in text.")
    if target is None or target not in names:
        shown = f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
        raise UserError(
            f"prepare table: --target {target} is no column of {path}", f"Its columns are {shown}: --target is one."
        )
    if len(names) < 2 or not num_rows:
        raise UserError(f"{path} has {num_rows} rows of {len(names)} columns", "Inputs and a target are needed.")
    return target


def _require_pyarrow(path: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError(f"--from {path} needs pyarrow, which cannot be found", "pip install pyarrow") from None


def _fault(path: Path, row: int, column: str, what: str) -> UserError:
    """Rows are counted from 1, without the header."""
    return UserError(f"{path}, row {row + 1}, column {column}: {what}", _REMEDY)


def _numbers(path: Path, name: str, start: int, values: Any) -> np.ndarray:
    """The values of a column, from row `start` on. Raises `UserError` where one is missing or no number."""
    import pyarrow as pa

    if values.null_count:
        missing = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
        raise _fault(path, start + int(missing[0]), name, "the value is missing")
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise _fault(path, start, name, f"{values[0].as_py()!r} ({kind}) is no number")
    numbers = values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy()
    if numbers.dtype.kind == "f" and np.isnan(numbers).any():
        raise _fault(path, start + int(np.flatnonzero(np.isnan(numbers))[0]), name, "the value is missing (NaN)")
    if numbers.dtype.kind == "f" and np.isinf(numbers).any():
        raise _fault(path, start + int(np.flatnonzero(np.isinf(numbers))[0]), name, "the value is infinite")
    return numbers


def whole(path: Path, name: str, start: int, values: np.ndarray) -> np.ndarray:
    """Targets as int64. Raises `UserError` at the first that is no whole number."""
    if values.dtype.kind == "f":
        odd = np.flatnonzero(~(np.abs(values) < 2**53) | (values != np.floor(values)))
        if len(odd):
            raise UserError(
                f"{path}, row {start + int(odd[0]) + 1}, column {name}: the target {values[odd[0]]} is no whole number",
                "Targets are the numbers of classes: 0, 1, 2 ...",
            )
    return values.astype(np.int64)


# ---------------------------------------------------------------------------------------------- CSV


def _csv(path: Path, context: Context) -> tuple[list[str], int, Read]:
    """Collective. Every rank finds the lines of its share of the bytes. Numbers have no line ends in quotes."""
    names, begin, num_bytes = context.on_root(partial(_head, path))
    bounds = context.on_root(lambda: _bounds(path, begin, num_bytes, context.world.size))
    mine = context.on_all(lambda: _lines(path, *bounds[context.world.rank]))
    places, num_rows = [], 0
    for rank_places, num in context.all_gather(mine):
        places += [(num_rows + row, place) for row, place in rank_places]
        num_rows += num
    first_rows, offsets = np.array(places or [(0, begin)], np.int64).T

    @lru_cache(maxsize=1)  # neighbouring rows end and begin in the same lines
    def lines(index: int) -> bytes:
        stop = int(offsets[index + 1]) if index + 1 < len(offsets) else num_bytes
        with path.open("rb") as file:
            file.seek(int(offsets[index]))
            data = file.read(stop - int(offsets[index]))
        if len(data) != stop - int(offsets[index]):
            raise UserError(f"{path} was cut short while it was read", "Leave it alone, and try again.")
        return data

    def read(start: int, stop: int, wanted: Sequence[str]) -> Any:
        index = int(np.searchsorted(first_rows, start, "right")) - 1
        first, data = int(first_rows[index]), []
        while index < len(first_rows) and first_rows[index] < stop:
            data.append(lines(index))
            index += 1
        end = int(first_rows[index]) if index < len(first_rows) else num_rows
        return _parse(path, names, wanted, b"".join(data), first, end).slice(start - first, stop - start)

    return names, num_rows, read


def _head(path: Path) -> tuple[list[str], int, int]:
    """(names of the columns, where the rows begin, bytes of the file)."""
    try:
        with path.open("rb") as file:
            line = file.readline(1 << 20)
            begin, num_bytes = file.tell(), path.stat().st_size
        names = [name.strip() for name in next(csv.reader(io.StringIO(line.decode("utf-8-sig"))), [])]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"--from {path} cannot be read: {error}", "It is text in UTF-8 with a header line.") from None
    if not all(names) or not names or all(_is_number(name) for name in names):
        raise UserError(
            f"{path} has no header: its first line is {line[:60]!r}", "It names every column, each once: a,b,c"
        )
    return names, begin, num_bytes


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _bounds(path: Path, begin: int, num_bytes: int, size: int) -> list[tuple[int, int]]:
    """The ranks' shares of the bytes, each beginning with a line."""
    cuts = [begin]
    with path.open("rb") as file:
        for rank in range(1, size):
            file.seek(max(cuts[-1], begin + rank_span(num_bytes - begin, rank, size)[0]) - 1)
            file.readline()
            cuts.append(min(file.tell(), num_bytes))
    return list(zip(cuts, [*cuts[1:], num_bytes], strict=True))


def _lines(path: Path, begin: int, end: int) -> tuple[list[tuple[int, int]], int]:
    """(row and place of a line every `_PIECE_BYTES` or so, number of lines), of bytes begin to end."""
    places, num_lines, place, last = [], 0, begin, 10
    with path.open("rb") as file:
        file.seek(begin)
        while place < end:
            data = np.frombuffer(file.read(min(_SCAN_BYTES, end - place)), np.uint8)
            if not len(data):
                raise UserError(f"{path} was cut short while it was read", "Leave it alone, and try again.")
            starts = np.flatnonzero(data[:-1] == 10) + 1 + place
            if last == 10:
                starts = np.insert(starts, 0, place)
            wanted = np.unique(np.searchsorted(starts, np.arange(place, place + len(data), _PIECE_BYTES)))
            places += [(num_lines + int(at), int(starts[at])) for at in wanted if at < len(starts)]
            num_lines += len(starts)
            last, place = int(data[-1]), place + len(data)
    return places, num_lines


def _parse(path: Path, names: list[str], wanted: Sequence[str], data: bytes, first: int, end: int) -> Any:
    """Rows first to end, which are `data`."""
    import pyarrow as pa
    from pyarrow import csv as reader

    try:
        table = reader.read_csv(
            io.BytesIO(data),
            reader.ReadOptions(use_threads=False, column_names=names, block_size=max(1, len(data))),
            reader.ParseOptions(ignore_empty_lines=False),
            reader.ConvertOptions(column_types=dict.fromkeys(wanted, pa.float64()), include_columns=list(wanted)),
        )
    except (pa.ArrowException, ValueError, OSError) as error:
        words = str(error)
        row = re.search(r"Row #(\d+)", words)
        column = re.search(r"CSV column #(\d+)", words)
        value = re.search(r"invalid value '(.*)'", words)
        where = names[int(column[1])] if column else "?"
        what = f"{value[1]!r} is no number" if value else words.splitlines()[0]
        raise _fault(path, first + int(row[1]) - 1 if row else first, where, what) from None
    if table.num_rows != end - first:
        raise UserError(
            f"{path}: rows {first + 1} to {end} are read as {table.num_rows}", "One line is one row: mend these lines."
        )
    return table


# ---------------------------------------------------------------------------------------------- Parquet


def _parquet(path: Path) -> tuple[list[str], int, Read]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        groups = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
        names, num_rows = list(file.schema_arrow.names), file.metadata.num_rows
        if sum(groups) != num_rows or min(groups, default=0) < 0:
            raise ValueError(f"its groups have {sum(groups)} rows, and it says {num_rows}")
    except Exception as error:  # noqa: BLE001  pyarrow raises what it likes for a damaged file
        raise UserError(
            f"--from {path} cannot be read: {_first_line(error)}", "Write the Parquet file again."
        ) from None
    ends = np.cumsum(groups, dtype=np.int64)

    held: list[tuple[Sequence[str], int, Any, Iterator[Any]]] = []  # columns, row, what is left of a batch, batches

    def batches(start: int, stop: int, wanted: Sequence[str]) -> Iterator[Any]:
        """Not by row groups: one may be larger than memory. The next rows go on from the last ones."""
        if held and held[0][0] == wanted and held[0][1] <= start:
            _, place, batch, more = held.pop()
        else:
            held.clear()
            first = int(np.searchsorted(ends, start, "right"))
            place, batch = int(ends[first]) - groups[first], None
            more = file.iter_batches(_BATCH_ROWS, range(first, len(groups)), list(wanted), use_threads=False)
        while place < stop:
            if batch is None or not len(batch):
                batch = next(more)
            skipped = min(max(0, start - place), len(batch))
            taken = batch.slice(skipped, stop - max(start, place))
            yield taken
            place, batch = place + skipped + len(taken), batch.slice(skipped + len(taken))
        held.append((wanted, place, batch, more))

    def read(start: int, stop: int, wanted: Sequence[str]) -> Any:
        try:
            return pa.Table.from_batches(list(batches(start, stop, wanted))).select(list(wanted))
        except Exception as error:  # noqa: BLE001  pyarrow raises what it likes for a damaged file
            what = f"{path}: rows {start} to {stop} cannot be read: {_first_line(error)}"
            raise UserError(what, "Write it again.") from None

    return names, num_rows, read


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
