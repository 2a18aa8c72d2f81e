"""Tables: NumPy's .npy and .npz, CSV and Parquet, read where a rank's rows are and no further."""

import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.datasets.prepare import columns
from hpc_train.datasets.prepare.layout import row_bytes
from hpc_train.datasets.prepare.origin import require_file
from hpc_train.datasets.prepare.sources import Array, Options, Source, state_of
from hpc_train.datasets.prepare.train_test_split import held_out
from hpc_train.train.comm.context import Context

READ_BYTES = 4 << 20  # of a table that are read at once
_WRITE_AGAIN = "Write it again with numpy.savez."
# What zipfile and the decompressors raise for a damaged or encrypted archive.
_BROKEN = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error)
_KINDS = "Name a file .npy, .npz, .csv or .parquet."


def source(path: Path, options: Options, context: Context) -> Source:
    """Collective. The rows of the table at `path`: inputs, and targets out of the column or array `options.target`.

    A .npz whose arrays are called train/inputs and so on keeps its parts; of all else one row in 1 / test_fraction
    (0.1) is for tests. Raises `UserError`.
    """
    ending = path.suffix.lower()
    context.on_root(lambda: _require_table(path))
    if ending in (".npy", ".npz"):
        arrays = context.on_all(lambda: _npy(path, options) if ending == ".npy" else _npz(path, options))
        facts: dict[str, Any] = {}
    else:
        table = columns.opened(path, options.target, context)
        arrays = {"inputs": table.inputs, "targets": table.targets}
        facts = {"columns": table.names, "target": table.target}
    parts = context.on_all(lambda: divided(path.name, arrays, options.test_fraction))
    num_bytes = context.on_root(lambda: path.stat().st_size)
    facts |= {"source_bytes": num_bytes}
    return Source(
        f"Table {path.name}", str(path), "see its source", parts, facts, state=context.on_root(lambda: state_of([path]))
    )


def _require_table(path: Path) -> None:
    require_file(path, _KINDS)
    if path.suffix.lower() not in (".npy", ".npz", ".csv", ".parquet"):
        raise UserError(f"--from {path} is no table", _KINDS)


def divided(name: str, arrays: dict[str, Array], fraction: float | None) -> dict[str, Array]:
    """`arrays` as parts of a file: they are already, or have a row each for every sample. Raises `UserError`."""
    _require_names(name, arrays)
    if all("/" in each for each in arrays):
        if fraction is not None:
            raise UserError(f"--test-fraction {fraction}: {name} says itself what is tested on", "Leave it out.")
        for part in ("train", "test"):
            _same_length(name, {each: array for each, array in arrays.items() if each.startswith(part + "/")})
        return arrays
    _same_length(name, arrays)
    arrays = {each: _as_targets(Path(name), array) if each == "targets" else array for each, array in arrays.items()}
    kept = held_out(next(iter(arrays.values())).shape[0], fraction)
    parts = [kept.parts(a, each, max(1, READ_BYTES // row_bytes(a))) for each, a in arrays.items()]
    names = [f"{part}/{each}" for part in ("train", "test") for each in arrays]
    return {each: part[each] for each in names for part in parts if each in part}


def _require_names(name: str, arrays: dict[str, Array]) -> None:
    """Raises `UserError` where a file would have no inputs, or HDF5 would take a name for something else."""
    remedy = "Call them inputs and targets, or train/inputs and so on."
    if not any(each in arrays for each in ("inputs", "train/inputs")) or len({"/" in each for each in arrays}) > 1:
        raise UserError(f"{name} holds {', '.join(arrays) or 'no arrays'}", remedy)
    folders = {each[:at] for each in arrays for at, character in enumerate(each) if character == "/"}
    for each in arrays:
        parts = each.split("/")
        if {"", ".", ".."} & set(parts) or not each.isprintable() or each in folders or parts[0] == "checksums":
            raise UserError(f"{name}: an array cannot be called {each!r}", remedy)


def _as_targets(path: Path, array: Array) -> Array:
    if array.dtype.kind != "f" or len(array.shape) != 1:
        return array
    read = array.read
    return Array(array.shape, np.dtype(np.int64), lambda a, b: columns.whole(path, "targets", a, read(a, b)))


def _same_length(name: str, arrays: dict[str, Array]) -> None:
    lengths = {each: array.shape[0] if array.shape else 0 for each, array in arrays.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        told = ", ".join(f"{each} has {length} rows" for each, length in lengths.items())
        raise UserError(f"{name}: {told}", "Each sample is one row in all of them, and there is at least one.")


def _npy(path: Path, options: Options) -> dict[str, Array]:
    """One array of shape (rows, columns), of which column number `target` is the target."""
    with path.open("rb") as file:
        table, begin = _header(path, path.name, file, path.stat().st_size)
    if len(table.shape) != 2 or options.target is None or not options.target.lstrip("-").isdecimal():
        raise UserError(
            f"{path} is {table.dtype} {table.shape}, and --target is {options.target}",
            "Of a .npy of shape (rows, columns) give the target column's number, from 0: --target 0. Else use .npz.",
        )
    column = int(options.target)
    if not -table.shape[1] <= column < table.shape[1]:
        raise UserError(f"{path} has columns 0 to {table.shape[1] - 1}", "--target is one of these numbers.")
    column %= table.shape[1]

    def read(start: int, stop: int) -> np.ndarray:
        with path.open("rb") as file:
            return _rows(path, path.name, file, begin, table, start, stop)

    def targets(start: int, stop: int) -> np.ndarray:
        return columns.whole(path, str(column), start, read(start, stop)[:, column])

    kept = Array((table.shape[0], table.shape[1] - 1), table.dtype, lambda a, b: np.delete(read(a, b), column, axis=1))
    return {"inputs": kept, "targets": Array((table.shape[0],), np.dtype(np.int64), targets)}


def _npz(path: Path, options: Options) -> dict[str, Array]:
    """The arrays of an archive; `target` is the one that becomes the targets, `targets` or `y` without it."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.namelist() if entry.endswith(".npy")]
            if repeated := sorted({entry for entry in entries if entries.count(entry) > 1}):
                raise UserError(f"{path} holds {', '.join(repeated)} more than once", _WRITE_AGAIN)
            arrays = {entry.removesuffix(".npy"): _member(path, entry, archive) for entry in entries}
    except _BROKEN as error:
        raise UserError(f"{path} cannot be read: {error}", _WRITE_AGAIN) from None
    if arrays and all("/" in name for name in arrays) and options.target is None:
        return arrays
    target = options.target or _one_of(path, ("targets", "y", "labels"), arrays) or "targets"
    others = {name: array for name, array in arrays.items() if name != target}
    inputs = next(iter(others)) if len(others) == 1 else _one_of(path, ("inputs", "x", "X", "images", "data"), others)
    if target not in arrays or inputs is None:
        raise UserError(
            f"{path} holds {', '.join(arrays) or 'no arrays'}: none of them is told to be the "
            f"{'targets' if target not in arrays else 'inputs'}",
            "Call them inputs and targets (or: --target NAME), or train/inputs, train/targets, test/inputs and so on.",
        )
    return {"inputs": arrays[inputs], "targets": arrays[target]}


def _one_of(path: Path, names: Sequence[str], arrays: dict[str, Array]) -> str | None:
    """That of `names` that there is. Raises `UserError` where there are several: nobody says which is meant."""
    found = [name for name in names if name in arrays]
    if len(found) > 1:
        raise UserError(
            f"{path} holds {' and '.join(found)}, and either could be meant",
            "Name the targets with --target NAME; of inputs leave one in the file.",
        )
    return found[0] if found else None


def _member(path: Path, entry: str, archive: zipfile.ZipFile) -> Array:
    with archive.open(entry) as file:
        table, begin = _header(path, entry, file, archive.getinfo(entry).file_size)
    held: list[IO[bytes]] = []  # a compressed array is decompressed from its start: the next rows go on from these

    def read(start: int, stop: int) -> np.ndarray:
        try:
            if not held:
                held.append(zipfile.ZipFile(path).open(entry))  # noqa: SIM115  as long as there are rows to read
            return _rows(path, entry, held[0], begin, table, start, stop)
        except _BROKEN as error:
            raise UserError(f"{path}: {entry} cannot be read: {error}", _WRITE_AGAIN) from None

    return Array(table.shape, table.dtype, read)


def _header(path: Path, name: str, file: IO[bytes], num_bytes: int) -> tuple[Array, int]:
    """(shape and type, where the values begin) of an array as NumPy stores it. Objects are refused: they are code."""
    remedy = "Write numbers with numpy.save or numpy.savez, in C order."
    try:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
    except (*_BROKEN, SyntaxError, RecursionError, MemoryError, TypeError, TokenError) as error:  # NumPy parses text
        raise UserError(f"{path}: {name} is no NumPy array: {error}", remedy) from None
    if dtype.kind not in "biuf" or (fortran and len(shape) > 1) or not shape:
        order = ", in Fortran's order" if fortran else ""
        raise UserError(f"{path}: {name} is {dtype} {shape}{order}", remedy)
    if min(shape) < 0 or file.tell() + math.prod(shape) * dtype.itemsize > num_bytes:
        raise UserError(f"{path} is truncated: {name} should be {dtype} {shape}, in {num_bytes:,} bytes", remedy)
    return Array(shape, dtype.newbyteorder("="), lambda start, stop: np.empty(0, dtype)), file.tell()


def _rows(path: Path, name: str, file: IO[bytes], begin: int, table: Array, start: int, stop: int) -> np.ndarray:
    """Rows start to stop. Not mapped: pages of a map count as memory of the process."""
    size = row_bytes(table)
    rows = np.empty((stop - start, *table.shape[1:]), table.dtype)
    file.seek(begin + start * size, os.SEEK_SET)
    data = memoryview(rows.data).cast("B") if rows.size else memoryview(b"")
    filled = 0
    while filled < len(data):
        num = file.readinto(data[filled:])  # type: ignore[attr-defined]
        if not num:
            raise UserError(f"{path} is truncated: {name} should have {table.shape[0]} rows", "Write it again.")
        filled += num
    return rows
