"""Ways to read rows of an HDF5 data set: through a memory map, by decoded chunks, of several files as one.

Every reader has `shape`, `dtype`, `edges` (see `Order`; None where rows lie by themselves) and
- `take(rows, out)`: these rows in this order, in native byte order, into `out` where it is given
- `reader[start:stop]`: the rows from start to stop, and `len(reader)`
- `expect(rows)`: a hint that these rows are taken soon
- `close()`
- `words`: how it reads and why, for people.
"""

import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np
import torch

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import Indices, require_rows
from hpc_train.train.data.chunk_cache import ChunkCache, ChunkFile
from hpc_train.train.data.hdf5_faults import damage_as_user_error, impossible_size

_WORTH_THREADS = 1 << 18  # bytes of a batch: below, threads cost more than they spare


class Reader(Protocol):
    shape: tuple[int, ...]
    dtype: np.dtype
    description: str  # how it is read, and why

    @property
    def chunk_edges(self) -> Indices | None: ...

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> np.ndarray: ...

    def prefetch(self, rows: np.ndarray) -> None: ...

    def close(self) -> None: ...


def open_reader(path: Path, dataset: h5py.Dataset, memory_bytes: int, num_threads: int) -> Reader:
    """The way to read `dataset` that suits its layout. Raises `UserError` for what cannot be read.

    memory_bytes: of decoded chunks. num_threads: that decode.
    """
    with damage_as_user_error(path, str(dataset.name)):
        require_numbers(path, dataset)
        if dataset.is_virtual:
            return _open_virtual(path, dataset, memory_bytes, num_threads)
        if dataset.chunks is not None and dataset.size:
            return ChunkCache([ChunkFile(path, dataset)], memory_bytes, num_threads)
        offset = dataset.id.get_offset()
        if offset is None:  # compact or empty: it is small or has no values
            return MmapReader(np.asarray(dataset[()]))
        return MmapReader(np.asarray(np.memmap(path, dataset.dtype, "r", offset=offset, shape=dataset.shape)))


def require_numbers(path: Path, dataset: h5py.Dataset) -> None:
    """Raises `UserError` unless `dataset` has rows of numbers, as many as the file can hold, and has them in it."""
    if dataset.dtype.kind not in "biuf":  # strings, lists of varying length, records: bytes lie elsewhere, or differ
        raise UserError(
            f"{path}: {dataset.name} holds {dataset.dtype}, and no numbers",
            "Name a data set of whole numbers or floats, or prepare the file again.",
        )
    if dataset.external:
        raise UserError(
            f"{path}: the values of {dataset.name} lie in other files ({dataset.external[0][0]})",
            "Copy them into one HDF5 file: h5repack, or h5py's Group.copy.",
        )
    if why := impossible_size(dataset, path.stat().st_size):
        raise UserError(f"{path}: {dataset.name} {why}", "Restore the file, or prepare it again.")
    if not dataset.shape:
        raise UserError(f"{path}: {dataset.name} is one value, and no rows", "Name a data set of samples.")
    is_plain = dataset.chunks is None and not dataset.is_virtual
    if is_plain and dataset.size and not dataset.id.get_storage_size():
        raise UserError(
            f"{path}: {dataset.name} was never written: all of it would be its fill value", "Prepare the file again."
        )


class MmapReader:
    """Rows of a contiguous data set, gathered straight out of the page cache.

    Not through h5py: its lock lets one thread at a time in, and a slab costs 2 to 4 times a gather from the map.
    """

    chunk_edges = None
    description = "contiguous: gathered from a memory map"

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self.shape: tuple[int, ...] = values.shape
        self.dtype = values.dtype.newbyteorder("=")
        self._words = _words(values) if values.dtype.isnative else None

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        require_rows(rows, len(self))
        if not self._values.dtype.isnative:
            return _into(out, np.take(self._values, rows, axis=0).astype(self.dtype))
        if out is None:
            return np.take(self._values, rows, axis=0)
        if self._words is not None and out.nbytes >= _WORTH_THREADS and _may_use_threads():
            # One core does not move what a machine's memory could: two took 0.6 to 0.8 of the time.
            there = torch.from_numpy(out.reshape(len(out), -1).view(np.int64))
            torch.index_select(self._words, 0, torch.from_numpy(rows), out=there)
            return out
        # All are there, so nothing is clipped: with "raise" numpy gathers into a buffer of its own first
        return np.take(self._values, rows, axis=0, out=out, mode="clip")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._values[rows].astype(self.dtype, copy=False)

    def prefetch(self, rows: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass


def _words(values: np.ndarray) -> torch.Tensor | None:
    """Rows as words of 8 bytes, which torch moves by several threads; None where they are no whole words."""
    if not values.size or values.nbytes // len(values) % 8:
        return None
    words = values.reshape(len(values), -1).view(np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a map of a file cannot be written to: nobody does
        return torch.from_numpy(words) if words.flags.aligned else None


def _may_use_threads() -> bool:
    """Whether torch's threads are idle: the loop itself asks, and not a thread that makes batches beside it."""
    return torch.get_num_threads() > 1 and threading.current_thread() is threading.main_thread()


def _into(out: np.ndarray | None, values: np.ndarray) -> np.ndarray:
    if out is None:
        return values
    out[...] = values
    return out


class ConcatReader:
    """Readers of equal rows, one after the other."""

    def __init__(self, parts: Sequence[Reader]) -> None:
        self._parts = parts
        self.description = f"{len(parts)} parts: {parts[0].description}"
        self._ends = np.cumsum([part.shape[0] for part in parts])
        self.shape: tuple[int, ...] = (int(self._ends[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype
        self.chunk_edges: Indices | None = None
        if any(part.chunk_edges is not None for part in parts):
            starts = self._ends - [part.shape[0] for part in parts]
            edges = [
                start + (np.arange(part.shape[0]) if part.chunk_edges is None else part.chunk_edges[:-1])
                for start, part in zip(starts, parts, strict=True)
            ]
            self.chunk_edges = np.append(np.concatenate(edges), self._ends[-1])

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        if out is None:
            out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for part, where, inside in self._split(rows):
            out[where] = part.take(inside)
        return out

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.take(np.arange(*rows.indices(len(self))))

    def prefetch(self, rows: np.ndarray) -> None:
        for part, _, inside in self._split(rows):
            part.prefetch(inside)

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def _split(self, rows: np.ndarray) -> list[tuple[Reader, np.ndarray, np.ndarray]]:
        """(part, which of `rows` lie in it, their rows there)."""
        require_rows(rows, len(self))
        numbers = np.searchsorted(self._ends, rows, "right")
        found = []
        for number in np.unique(numbers).tolist():
            where = np.flatnonzero(numbers == number)
            part = self._parts[number]
            found.append((part, where, rows[where] - (self._ends[number] - part.shape[0])))
        return found


class H5pyReader:
    """Rows through h5py, one thread at a time: for virtual data sets whose pieces are not whole rows."""

    chunk_edges = None
    description = "virtual, of pieces that are no whole rows: through h5py, one thread at a time"

    def __init__(self, dataset: h5py.Dataset) -> None:
        self._dataset = dataset
        self.shape: tuple[int, ...] = dataset.shape
        self.dtype = dataset.dtype.newbyteorder("=")

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        require_rows(rows, len(self))
        distinct, back = np.unique(rows, return_inverse=True)  # h5py wants rising indices
        with damage_as_user_error(self._dataset.file.filename, str(self._dataset.name)):
            return _into(out, np.asarray(self._dataset[distinct])[back].astype(self.dtype, copy=False))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        with damage_as_user_error(self._dataset.file.filename, str(self._dataset.name)):
            return np.asarray(self._dataset[rows]).astype(self.dtype, copy=False)

    def prefetch(self, rows: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass


def _open_virtual(path: Path, dataset: h5py.Dataset, memory_bytes: int, num_threads: int) -> Reader:
    """A data set that HDF5 puts together from others: each read its own way where they stand below each other."""
    sources = sorted(dataset.virtual_sources(), key=lambda source: source.vspace.get_select_bounds()[0])
    pieces, row = [], 0
    for source in sources:
        file = path if source.file_name == "." else path.parent / source.file_name
        if not file.is_file():
            raise UserError(
                f"{path}: {dataset.name} takes rows from {file}, which does not exist",
                "Without it these rows would be fill values: put the file where it was, or make the data set again.",
            )
        (first, *low), (last, *high) = source.vspace.get_select_bounds()
        is_rows = first == row and not any(low) and [n + 1 for n in high] == list(dataset.shape[1:])
        with h5py.File(file, "r") as opened:
            found = opened.get(source.dset_name)
            is_whole = (
                isinstance(found, h5py.Dataset)
                and found.shape == (last + 1 - first, *dataset.shape[1:])
                and found.dtype == dataset.dtype
            )
        if not (is_rows and is_whole):
            return H5pyReader(dataset)
        pieces.append((file, source.dset_name))
        row = last + 1
    if row != dataset.shape[0] or not pieces:
        return H5pyReader(dataset)
    return join([(file, h5py.File(file, "r")[name]) for file, name in pieces], memory_bytes, num_threads)


def join(parts: Sequence[tuple[Path, h5py.Dataset]], memory_bytes: int, num_threads: int) -> Reader:
    """Data sets of equal rows, one after the other, as one; those in equal chunks share their memory."""
    for path, data in parts:
        with damage_as_user_error(path, str(data.name)):
            require_numbers(path, data)
    if len(parts) > 1 and all(_is_like(data, parts[0][1]) for _, data in parts):
        return ChunkCache([ChunkFile(path, data) for path, data in parts], memory_bytes, num_threads)
    share = memory_bytes // len(parts)
    readers = [open_reader(path, data, share, num_threads) for path, data in parts]
    return readers[0] if len(readers) == 1 else ConcatReader(readers)


def _is_like(data: h5py.Dataset, first: h5py.Dataset) -> bool:
    plain = data.chunks is not None and data.size and not data.is_virtual and not data.external
    return (
        bool(plain) and data.chunks == first.chunks and data.shape[1:] == first.shape[1:] and data.dtype == first.dtype
    )
