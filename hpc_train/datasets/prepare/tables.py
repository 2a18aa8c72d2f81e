"""Tables: NumPy's .npy and .npz, CSV and Parquet. Each rank reads the rows that it writes, and no others."""

import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from tokenize import TokenError
from typing import IO, Any

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.datasets.prepare.columns import are_real, open_columns, whole_numbers
from hpc_train.datasets.prepare.origin import require_file
from hpc_train.datasets.prepare.sources import Array, Options, Source, state_of
from hpc_train.datasets.prepare.train_test_split import train_test_split
from hpc_train.train.comm.context import Context

_FIRST_ROWS = 1 << 14  # that tell class numbers from real numbers
_READ_BYTES = 4 << 20  # at once, of a table
_WRITE_AGAIN = "Write it again with numpy.savez."
_C_ORDER = "Write numbers with numpy.save or numpy.savez, in C order."
_SUFFIXES = (".npy", ".npz", ".csv", ".tsv", ".parquet")
_NAME_TABLE = "Name a file .npy, .npz, .csv, .tsv or .parquet."
# What zipfile and the decompressors raise for a damaged or encrypted archive.
_ARCHIVE_ERRORS = (
    *(OSError, EOFError, ValueError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
)
# NumPy evaluates the text of a header: a damaged one raises any error of a parser.
_HEADER_ERRORS = (*_ARCHIVE_ERRORS, SyntaxError, RecursionError, MemoryError, TypeError, TokenError)


def source(path: Path, options: Options, context: Context) -> Source:
    """Collective. The rows of the table at `path`: inputs, and targets from the column or array `options.target`.

    A .npz whose arrays are called train/inputs and so on keeps its parts. Otherwise one row in 1 / test_fraction (0.1)
    is for tests; with options.like all are, and `hpc-train predict` takes them. Raises `UserError`.
    """
    context.on_root(lambda: _require_table(path))
    suffix = path.suffix.lower()
    facts: dict[str, Any] = {}
    if suffix == ".npy":
        arrays = context.on_all(lambda: _npy_arrays(path, options.target))
    elif suffix == ".npz":
        arrays = context.on_all(lambda: _npz_arrays(path, options.target))
    else:
        columns = open_columns(path, options, context)
        arrays, facts = columns.arrays, columns.facts
    facts["source_bytes"] = context.on_root(lambda: path.stat().st_size)
    if options.like is None:
        parts = context.on_all(lambda: split_arrays(path.name, arrays, options.test_fraction))
    else:
        parts = {f"test/{name}": array for name, array in arrays.items()}
    state = context.on_root(lambda: state_of([path, *filter(None, [options.like])]))
    return Source(f"Table {path.name}", str(path), "see its source", parts, facts, state=state)


def _require_table(path: Path) -> None:
    require_file(path, _NAME_TABLE)
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"--from {path} is no table", _NAME_TABLE)


# ---------------------------------------------------------------------------------------------- train and test


def split_arrays(name: str, arrays: dict[str, Array], test_fraction: float | None) -> dict[str, Array]:
    """`arrays` as parts of a file: they are already, or hold one row for each sample. Raises `UserError`.

    name: of the source, for messages.
    """
    _require_names(name, arrays)
    if all("/" in each for each in arrays):
        if test_fraction is not None:
            raise UserError(f"--test-fraction {test_fraction}: {name} has parts train and test", "Leave it out.")
        for part in ("train", "test"):
            _require_equal_lengths(name, {each: a for each, a in arrays.items() if each.startswith(f"{part}/")})
        return arrays
    _require_equal_lengths(name, arrays)
    split = train_test_split(next(iter(arrays.values())).shape[0], test_fraction)
    parts: dict[str, Array] = {}
    for each, array in arrays.items():
        if each == "targets" and array.dtype.kind == "f" and len(array.shape) == 1:
            array = _class_or_real_numbers(Path(name), array, each)
        parts |= split.split(array, each, max(1, _READ_BYTES // array.row_bytes))
    in_order = [f"{part}/{each}" for part in ("train", "test") for each in arrays]
    return {each: parts[each] for each in in_order if each in parts}


def _require_names(name: str, arrays: dict[str, Array]) -> None:
    """Raises `UserError` if a file would have no inputs, or if HDF5 would take a name for something else."""
    remedy = "Call them inputs and targets, or train/inputs and so on."
    is_divided = {"/" in each for each in arrays}
    if not ({"inputs", "train/inputs"} & set(arrays)) or len(is_divided) > 1:
        raise UserError(f"{name} holds {', '.join(arrays) or 'no arrays'}", remedy)
    groups: set[str] = set()
    for each in arrays:
        groups |= {str(parent) for parent in PurePosixPath(each).parents}
    for each in arrays:
        parts = each.split("/")
        if {"", ".", ".."} & set(parts) or not each.isprintable() or each in groups or parts[0] == "checksums":
            raise UserError(f"{name}: an array cannot be called {each!r}", remedy)


def _require_equal_lengths(name: str, arrays: dict[str, Array]) -> None:
    lengths = {each: array.shape[0] if array.shape else 0 for each, array in arrays.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        listed = ", ".join(f"{each} has {length} rows" for each, length in lengths.items())
        raise UserError(f"{name}: {listed}", "Each sample is one row in all of them, and there is at least one.")


def _class_or_real_numbers(path: Path, array: Array, column: str) -> Array:
    """`array` as int64 if its first rows are class numbers, else as it is."""
    if array.dtype.kind == "f" and are_real(array.read(0, min(array.shape[0], _FIRST_ROWS))):
        return array
    return replace(array, dtype=np.dtype(np.int64), read=partial(_read_whole_numbers, path, array, column))


def _read_whole_numbers(path: Path, array: Array, column: str, start: int, stop: int) -> np.ndarray:
    return whole_numbers(path, column, start, array.read(start, stop))


# ---------------------------------------------------------------------------------------------- NumPy's files


@dataclass(frozen=True)
class _NumpyArray:
    """An array in NumPy's format: `name` in the file `path`; its values begin at byte `offset`."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @classmethod
    def from_header(cls, path: Path, name: str, file: IO[bytes], num_bytes: int) -> "_NumpyArray":
        """num_bytes: of header and values. Raises `UserError`, also for objects, which would run code."""
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read(file)
        except _HEADER_ERRORS as error:
            raise UserError(f"{path}: {name} is no NumPy array: {error}", _C_ORDER) from None
        is_fortran = is_fortran and len(shape) > 1
        if dtype.kind not in "biuf" or is_fortran or not shape:
            order = ", in Fortran order" if is_fortran else ""
            raise UserError(f"{path}: {name} is {dtype} {shape}{order}", _C_ORDER)
        if min(shape) < 0 or file.tell() + math.prod(shape) * dtype.itemsize > num_bytes:
            what = f"{path} is truncated: {name} should be {dtype} {shape}, in {num_bytes:,} bytes"
            raise UserError(what, _C_ORDER)
        return cls(path, name, shape, dtype, file.tell())

    def read_from(self, file: IO[bytes], start: int, stop: int) -> np.ndarray:
        """Rows start to stop. Not mapped: pages of a map count as memory of the process."""
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        data = memoryview(rows.data).cast("B") if rows.size else memoryview(b"")
        file.seek(self.offset + start * math.prod(self.shape[1:]) * self.dtype.itemsize, os.SEEK_SET)
        while len(data):
            num_read = file.readinto(data)  # type: ignore[attr-defined]
            if not num_read:
                what = f"{self.path} is truncated: {self.name} should have {self.shape[0]} rows"
                raise UserError(what, "Write it again.")
            data = data[num_read:]
        # In this machine's byte order, whatever the file's.
        return rows.astype(self.dtype.newbyteorder("="), copy=False)


@dataclass
class _OpenArray:
    """An array that is read from a file kept open: a compressed one is decompressed from its start, and only once."""

    table: _NumpyArray
    open_file: Callable[[], IO[bytes]]
    _file: IO[bytes] | None = field(default=None, init=False)

    @property
    def array(self) -> Array:
        return Array(self.table.shape, self.table.dtype.newbyteorder("="), self.read)

    def read(self, start: int, stop: int) -> np.ndarray:
        try:
            self._file = self._file or self.open_file()
            return self.table.read_from(self._file, start, stop)
        except _ARCHIVE_ERRORS as error:
            raise UserError(f"{self.table.path}: {self.table.name} cannot be read: {error}", _WRITE_AGAIN) from None


def _npy_arrays(path: Path, target: str | None) -> dict[str, Array]:
    """One array of shape (rows, columns), of which column number `target`, or each of several, is a target."""
    with path.open("rb") as file:
        table = _NumpyArray.from_header(path, path.name, file, path.stat().st_size)
    words = (target or "").split(",")
    if len(table.shape) != 2 or not all(word.strip().lstrip("-").isdecimal() for word in words):
        raise UserError(
            f"{path} is {table.dtype} {table.shape}, and --target is {target}",
            "For a .npy of shape (rows, columns), give the target columns' numbers, from 0: --target 0 or 0,1.",
        )
    num_rows, num_columns = table.shape
    if not all(-num_columns <= int(word) < num_columns for word in words):
        raise UserError(f"{path} has columns 0 to {num_columns - 1}", "--target is one of these numbers.")
    columns = [int(word) % num_columns for word in words]
    if len(set(columns)) == num_columns:
        raise UserError(f"{path} has {num_columns} columns, and --target is {target}", "Inputs are needed, too.")
    array = _OpenArray(table, lambda: path.open("rb")).array
    inputs = Array((num_rows, num_columns - len(set(columns))), array.dtype, partial(_without_columns, array, columns))
    if len(columns) > 1:
        several = Array((num_rows, len(columns)), np.dtype(np.float32), partial(_only_columns, array, columns))
        return {"inputs": inputs, "targets": several}
    targets = Array((num_rows,), array.dtype, partial(_only_column, array, columns[0]))
    return {"inputs": inputs, "targets": _class_or_real_numbers(path, targets, str(columns[0]))}


def _without_columns(array: Array, columns: list[int], start: int, stop: int) -> np.ndarray:
    return np.delete(array.read(start, stop), columns, axis=1)


def _only_columns(array: Array, columns: list[int], start: int, stop: int) -> np.ndarray:
    return array.read(start, stop)[:, columns].astype(np.float32)


def _only_column(array: Array, column: int, start: int, stop: int) -> np.ndarray:
    return array.read(start, stop)[:, column]


def _npz_arrays(path: Path, target: str | None) -> dict[str, Array]:
    """The arrays of an archive; `target` is the one that becomes the targets, `targets` or `y` without it."""
    arrays = _npz_members(path)
    if arrays and all("/" in name for name in arrays) and target is None:
        return arrays
    target = target or _one_of(path, ("targets", "y", "labels"), arrays) or "targets"
    others = {name: array for name, array in arrays.items() if name != target}
    inputs = next(iter(others)) if len(others) == 1 else _one_of(path, ("inputs", "x", "X", "images", "data"), others)
    if target not in arrays or inputs is None:
        missing = "targets" if target not in arrays else "inputs"
        raise UserError(
            f"{path} holds {', '.join(arrays) or 'no arrays'}: none of them is known to be the {missing}",
            "Call them inputs and targets (or: --target NAME), or train/inputs, train/targets, test/inputs and so on.",
        )
    return {"inputs": arrays[inputs], "targets": arrays[target]}


def _npz_members(path: Path) -> dict[str, Array]:
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.namelist() if entry.endswith(".npy")]
            if repeated := sorted({entry for entry in entries if entries.count(entry) > 1}):
                raise UserError(f"{path} holds {', '.join(repeated)} more than once", _WRITE_AGAIN)
            for entry in entries:
                with archive.open(entry) as file:
                    table = _NumpyArray.from_header(path, entry, file, archive.getinfo(entry).file_size)
                arrays[entry.removesuffix(".npy")] = _OpenArray(table, partial(_open_member, path, entry)).array
    except _ARCHIVE_ERRORS as error:
        raise UserError(f"{path} cannot be read: {error}", _WRITE_AGAIN) from None
    return arrays


def _open_member(path: Path, entry: str) -> IO[bytes]:
    return zipfile.ZipFile(path).open(entry)


def _one_of(path: Path, names: Sequence[str], arrays: dict[str, Array]) -> str | None:
    """The one of `names` that is in `arrays`. Raises `UserError` if there are several: any could be meant."""
    found = [name for name in names if name in arrays]
    if len(found) > 1:
        raise UserError(
            f"{path} holds {' and '.join(found)}, and either could be meant",
            "Name the targets with --target NAME; leave one array of inputs in the file.",
        )
    return found[0] if found else None
