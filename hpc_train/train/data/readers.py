"""Ways to read rows of an HDF5 data set: through a memory map, by decoded chunks, several files as one."""

import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import require_rows
from hpc_train.train.data.chunk_cache import ChunkCache, ChunkFile
from hpc_train.train.data.hdf5_faults import damage_as_user_error, impossible_size
from hpc_train.train.data.reader_interface import Reader

_WORTH_THREADS = 1 << 18  # bytes of a batch: below, threads cost more than they save


def open_reader(path: Path, dataset: h5py.Dataset, memory_bytes: int, num_threads: int) -> Reader:
    """The reader that suits the layout of `dataset`. Raises `UserError` for a data set that cannot be read.

    memory_bytes: for decoded chunks. num_threads: for decoding them.
    """
    with damage_as_user_error(path, str(dataset.name)):
        require_numbers(path, dataset)
        if dataset.is_virtual:
            return _open_virtual(path, dataset, memory_bytes, num_threads)
        if dataset.chunks is not None and dataset.size:
            return ChunkCache([ChunkFile(path, dataset)], memory_bytes, num_threads)
        offset = dataset.id.get_offset()
        if offset is None:  # compact or empty: small, or without values
            return MmapReader(np.asarray(dataset[()]))
        return MmapReader(np.asarray(np.memmap(path, dataset.dtype, "r", offset=offset, shape=dataset.shape)))


def open_concat(parts: Sequence[tuple[Path, h5py.Dataset]], memory_bytes: int, num_threads: int) -> Reader:
    """Data sets of equal rows, one after the other, as one; those in equal chunks share one cache."""
    for path, data in parts:
        with damage_as_user_error(path, str(data.name)):
            require_numbers(path, data)
    if len(parts) > 1 and all(_has_equal_chunks(data, parts[0][1]) for _, data in parts):
        return ChunkCache([ChunkFile(path, data) for path, data in parts], memory_bytes, num_threads)
    readers = [open_reader(path, data, memory_bytes // len(parts), num_threads) for path, data in parts]
    return readers[0] if len(readers) == 1 else ConcatReader(readers)


def require_numbers(path: Path, dataset: h5py.Dataset) -> None:
    """Raises `UserError` unless `dataset` has rows of numbers, no more than its file can hold, all in this file."""
    if dataset.dtype.kind not in "biuf":  # strings, variable-length lists, records
        raise UserError(
            f"{path}: {dataset.name} holds {dataset.dtype}, and no numbers",
            "Name a data set of integers or floats, or prepare the file again.",
        )
    require_stored(path, dataset)


def require_stored(path: Path, dataset: h5py.Dataset) -> None:
    """Raises `UserError` unless `dataset` has rows, no more than its file can hold, all in this file."""
    if dataset.external:
        raise UserError(
            f"{path}: the values of {dataset.name} are in other files ({dataset.external[0][0]})",
            "Copy them into one HDF5 file: h5repack, or h5py's Group.copy.",
        )
    if why := impossible_size(dataset, path.stat().st_size):
        raise UserError(f"{path}: {dataset.name} {why}", "Restore the file, or prepare it again.")
    if not dataset.shape:
        raise UserError(f"{path}: {dataset.name} is one value, and no rows", "Name a data set of samples.")
    is_contiguous = dataset.chunks is None and not dataset.is_virtual
    if is_contiguous and dataset.size and not dataset.id.get_storage_size():
        raise UserError(
            f"{path}: {dataset.name} was never written: all of it would be its fill value", "Prepare the file again."
        )


class MmapReader(Reader):
    """Rows of a contiguous data set, gathered from the page cache through a memory map.

    h5py is not used: its lock admits one thread at a time, and reading a slab costs 2 to 4 times a gather from the map.
    """

    description = "contiguous: gathered from a memory map"

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self.shape = values.shape
        self.dtype = values.dtype.newbyteorder("=")
        self._words = _as_words(values) if values.dtype.isnative else None

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        require_rows(rows, len(self))
        if not self._values.dtype.isnative:
            return _copied(np.take(self._values, rows, axis=0).astype(self.dtype), out)
        if out is None:
            return np.take(self._values, rows, axis=0)
        if self._words is not None and out.nbytes >= _WORTH_THREADS and _torch_threads_are_idle():
            # One core does not saturate the memory bandwidth: two took 0.6 to 0.8 of the time.
            words = torch.from_numpy(out.reshape(len(out), -1).view(np.int64))
            torch.index_select(self._words, 0, torch.from_numpy(rows), out=words)
            return out
        # All rows exist, so mode="clip" clips nothing; with "raise" numpy gathers into a buffer of its own first.
        return np.take(self._values, rows, axis=0, out=out, mode="clip")

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._values[rows].astype(self.dtype, copy=False)  # a view of the map: nothing is read yet


def _as_words(values: np.ndarray) -> torch.Tensor | None:
    """Rows as words of 8 bytes, which torch gathers with several threads; None if rows are not whole words."""
    if not values.size or values.nbytes // len(values) % 8:
        return None
    words = values.reshape(len(values), -1).view(np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that the map is read-only: it is only read
        return torch.from_numpy(words) if words.flags.aligned else None


def _torch_threads_are_idle() -> bool:
    """Whether the training loop itself is reading. A prefetch thread reads while the loop's threads compute."""
    return torch.get_num_threads() > 1 and threading.current_thread() is threading.main_thread()


def _copied(values: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    """`values`, in `out` if it is given."""
    if out is None:
        return values
    out[...] = values
    return out


class H5pyReader(Reader):
    """Rows through h5py, one thread at a time: for virtual data sets whose sources are not whole rows."""

    description = "virtual, with sources that are not whole rows: through h5py, one thread at a time"

    def __init__(self, dataset: h5py.Dataset) -> None:
        self._dataset = dataset
        self.shape = dataset.shape
        self.dtype = dataset.dtype.newbyteorder("=")

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        require_rows(rows, len(self))
        distinct, where = np.unique(rows, return_inverse=True)  # h5py takes increasing indices only
        return _copied(self._read(distinct)[where], out)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._read(rows)

    def _read(self, rows: np.ndarray | slice) -> np.ndarray:
        with damage_as_user_error(self._dataset.file.filename, str(self._dataset.name)):
            return np.asarray(self._dataset[rows]).astype(self.dtype, copy=False)


class ConcatReader(Reader):
    """Readers of equal rows, one after the other."""

    def __init__(self, parts: Sequence[Reader]) -> None:
        self._parts = parts
        self.description = f"{len(parts)} parts: {parts[0].description}"
        self._ends = np.cumsum([len(part) for part in parts])
        self._starts = self._ends - [len(part) for part in parts]
        self.shape = (int(self._ends[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype
        if any(part.chunk_edges is not None for part in parts):
            edges = [start + _chunk_starts(part) for start, part in zip(self._starts, parts, strict=True)]
            self.chunk_edges = np.append(np.concatenate(edges), self._ends[-1])

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        if out is None:
            out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for part, where, inside in self._by_part(rows):
            out[where] = part.take(inside)
        return out

    def prefetch(self, rows: np.ndarray) -> None:
        for part, _, inside in self._by_part(rows):
            part.prefetch(inside)

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def _by_part(self, rows: np.ndarray) -> list[tuple[Reader, np.ndarray, np.ndarray]]:
        """(part, which of `rows` are in it, their row numbers there)."""
        require_rows(rows, len(self))
        numbers = np.searchsorted(self._ends, rows, "right")
        found = []
        for number in np.unique(numbers).tolist():
            where = np.flatnonzero(numbers == number)
            found.append((self._parts[number], where, rows[where] - self._starts[number]))
        return found


class SelectedReader(Reader):
    """The rows `kept` of a reader, in increasing order."""

    def __init__(self, reader: Reader, kept: np.ndarray) -> None:
        self._reader, self._kept = reader, kept
        self.shape, self.dtype = (len(kept), *reader.shape[1:]), reader.dtype
        self.description = reader.description
        if reader.chunk_edges is not None:
            self.chunk_edges = np.unique(np.searchsorted(kept, reader.chunk_edges))

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        return self._reader.take(self._kept[rows], out)

    def stored_rows(self, rows: np.ndarray) -> np.ndarray:
        return self._reader.stored_rows(self._kept[rows])

    def prefetch(self, rows: np.ndarray) -> None:
        self._reader.prefetch(self._kept[rows])

    def close(self) -> None:
        self._reader.close()


def _chunk_starts(reader: Reader) -> np.ndarray:
    """The first row of each chunk; of a reader without chunks, every row."""
    return np.arange(len(reader)) if reader.chunk_edges is None else reader.chunk_edges[:-1]


# ------------------------------------------------------------------------------------------------ virtual data sets


def _open_virtual(path: Path, dataset: h5py.Dataset, memory_bytes: int, num_threads: int) -> Reader:
    """A virtual data set: each source by a reader of its own if the sources are whole rows, one after the other."""
    sources = sorted(dataset.virtual_sources(), key=lambda source: source.vspace.get_select_bounds()[0])
    parts, row = [], 0
    for source in sources:
        file = path if source.file_name == "." else path.parent / source.file_name
        if not file.is_file():
            raise UserError(
                f"{path}: {dataset.name} takes rows from {file}, which does not exist",
                "HDF5 would read fill values instead: put the file back, or create the data set again.",
            )
        if not _is_whole_rows(source, file, dataset, row):
            return H5pyReader(dataset)
        parts.append((file, source.dset_name))
        row = source.vspace.get_select_bounds()[1][0] + 1
    if row != dataset.shape[0] or not parts:
        return H5pyReader(dataset)
    return open_concat([(file, h5py.File(file, "r")[name]) for file, name in parts], memory_bytes, num_threads)


def _is_whole_rows(source: Any, file: Path, dataset: h5py.Dataset, first_row: int) -> bool:
    """Whether `source`, a data set of `file`, is all of the rows of `dataset` from `first_row` on, and nothing else."""
    (first, *low), (last, *high) = source.vspace.get_select_bounds()
    if first != first_row or any(low) or [index + 1 for index in high] != list(dataset.shape[1:]):
        return False
    with h5py.File(file, "r") as opened:
        found = opened.get(source.dset_name)
        return (
            isinstance(found, h5py.Dataset)
            and found.shape == (last + 1 - first, *dataset.shape[1:])
            and found.dtype == dataset.dtype
        )


def _has_equal_chunks(data: h5py.Dataset, first: h5py.Dataset) -> bool:
    """Whether `data` is in chunks of the same shape and type as those of `first`."""
    is_chunked = data.chunks is not None and data.size > 0 and not data.is_virtual and not data.external
    return is_chunked and (data.chunks, data.shape[1:], data.dtype) == (first.chunks, first.shape[1:], first.dtype)


# ------------------------------------------------------------------------------------------------ strings


class StringReader(Reader):
    """Strings of fixed or variable length, of one data set or several, one after the other; read in slices."""

    description = "strings"

    def __init__(self, parts: Sequence[tuple[Path, h5py.Dataset]]) -> None:
        for path, part in parts:
            require_stored(path, part)
        self._parts = [part for _, part in parts]
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.shape, self.dtype = (int(self._ends[-1]), *self._parts[0].shape[1:]), np.dtype(object)

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        require_rows(rows, len(self))
        first = int(rows.min(initial=0 if not len(rows) else int(rows[0])))
        return self[first : int(rows.max(initial=first)) + 1][rows - first]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        found = [np.zeros(0, "U1")]
        for part, end in zip(self._parts, self._ends, strict=True):
            first = int(end) - len(part)
            begin, until = max(start, first) - first, min(stop, int(end)) - first
            if begin < until:
                found.append(part.asstr(errors="replace")[begin:until].astype(str))
        return np.concatenate(found)


def is_strings(dataset: h5py.Dataset) -> bool:
    """Whether a data set holds strings, of fixed or of variable length."""
    return h5py.check_string_dtype(dataset.dtype) is not None
