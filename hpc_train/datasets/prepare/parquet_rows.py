"""Rows of a Parquet file, read forward in batches."""

from pathlib import Path
from typing import Any

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.datasets.prepare.cells import bad_cell, finite

_BATCH_ROWS = 1 << 14


class ParquetRows:
    """Rows in batches: a row group may be larger than memory. It needs pyarrow.

    A call that continues where the last one ended takes the batches that follow. Any other begins again at its group.
    """

    def __init__(self, path: Path) -> None:
        """Raises `UserError` for a damaged file, and without pyarrow."""
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError:
            raise UserError(f"--from {path} needs pyarrow, which cannot be found", "pip install pyarrow") from None

        self._path = path
        try:
            self._file = parquet.ParquetFile(path)
            metadata = self._file.metadata
            group_rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
            schema = self._file.schema_arrow
            self.names, self.num_rows = list(schema.names), metadata.num_rows
            if sum(group_rows) != self.num_rows or min(group_rows, default=0) < 0:
                raise ValueError(f"its groups have {sum(group_rows)} rows, and it says {self.num_rows}")
        except Exception as error:  # noqa: BLE001  pyarrow raises all kinds of errors for a damaged file
            raise UserError(
                f"--from {path} cannot be read: {_first_line(error)}", "Write the Parquet file again."
            ) from None
        is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_dictionary)
        self.texts = frozenset(each.name for each in schema if any(is_kind(each.type) for is_kind in is_text))
        self._group_starts = np.cumsum([0, *group_rows])
        self._columns: list[str] = []
        self._next_row = 0
        self._batches: Any = iter(())
        self._rest: Any = None  # of the last batch

    def read(self, start: int, stop: int, columns: list[str]) -> list[np.ndarray]:
        table = self._table(start, stop, columns)
        return [self._values(start, name, table.column(name)) for name in columns]

    def _values(self, start: int, name: str, values: Any) -> np.ndarray:
        import pyarrow as pa

        if name in self.texts:
            return np.array(["" if each is None else str(each) for each in values.to_pylist()], str)
        if values.null_count:
            missing = values.is_null().to_numpy()
            raise bad_cell(self._path, start + int(np.argmax(missing)), name, "the value is missing")
        kind = values.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise bad_cell(self._path, start, name, f"{values[0].as_py()!r} ({kind}) is no number")
        return finite(self._path, start, name, values.to_numpy())

    def _table(self, start: int, stop: int, columns: list[str]) -> Any:
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
