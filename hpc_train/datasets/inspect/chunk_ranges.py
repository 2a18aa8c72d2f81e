"""Reading data sets piece by piece and verifying each: blocks against their checksums, chunks by decoding them.

A piece is some rows, a few MiB; of a data set whose chunks cut rows so that a row of chunks would fill the memory, it
is one chunk. Which pieces there are depends on the file alone, so that any rank can take any of them.
"""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import h5py
import numpy as np

from hpc_train.datasets.inspect.structure import CHECKSUMS, Fault, Found
from hpc_train.train.data.chunk_cache import RawChunks
from hpc_train.train.data.filters import Damaged, open_pipeline
from hpc_train.train.data.foreign_files import HDF5_ERRORS, reason_of

_PIECE_BYTES = 4 << 20
_MOST_BYTES = 128 << 20  # of chunks that are put together
_RESTORE = "Restore the file, or prepare it again."


@dataclass
class Piece:
    """What was read: `values` of the rows `rows`, both without what is damaged, which is in `faults`.

    unit, number: what a message calls it: "block" 3. is_whole: the values are whole rows, not parts of them.
    """

    unit: str
    number: int
    values: np.ndarray
    rows: np.ndarray
    faults: list[Fault] = field(default_factory=list)
    is_whole: bool = True


def piece_rows(found: Found) -> int:
    """Rows of a piece."""
    if found.layout == "contiguous" and found.block_rows:
        return found.block_rows
    rows = max(1, _PIECE_BYTES // max(1, found.row_bytes))
    return found.chunk[0] * max(1, rows // found.chunk[0]) if found.chunk else rows


def num_pieces(found: Found) -> int:
    if not _is_by_rows(found):
        return int(np.prod(_grid(found)))
    return -(-found.num_rows // piece_rows(found)) if found.num_bytes else 0


def _is_by_rows(found: Found) -> bool:
    return not found.chunk or found.dtype.hasobject or found.chunk[0] * found.row_bytes <= _MOST_BYTES


def _grid(found: Found) -> tuple[int, ...]:
    """How many chunks there are in each dimension."""
    return tuple(-(-size // chunk) for size, chunk in zip(found.shape, found.chunk, strict=True))


class Pieces:
    """The pieces of one data set of an open file. Any thread may read."""

    def __init__(self, file: h5py.File, found: Found) -> None:
        self._found, self._dataset, self._file = found, file[found.name], -1
        self._pipeline: Any = None
        self._raw: RawChunks | None = None
        self._checksums: np.ndarray | None = None
        if found.dtype.hasobject:
            return  # strings and lists, whose bytes are elsewhere: through HDF5
        if found.layout == "chunked":
            self._pipeline = open_pipeline(self._dataset)
            self._raw = RawChunks(self._dataset)
        elif found.layout == "contiguous":
            self._file = os.open(found.path, os.O_RDONLY)
            if found.block_rows:
                self._checksums = np.asarray(file[f"{CHECKSUMS}/{found.name}"][()]).reshape(-1)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def read(self, number: int) -> Piece:
        found = self._found
        if not _is_by_rows(found):
            return self._chunk_alone(number)
        start = number * piece_rows(found)
        stop = min(start + piece_rows(found), found.num_rows)
        if self._pipeline is not None:
            return self._chunks(start, stop)
        if self._file >= 0:
            return self._block(number, start, stop)
        return self._slab(number, start, stop)

    def _block(self, number: int, start: int, stop: int) -> Piece:
        """Past HDF5, whose lock is not held then. Not through a map: a file that ends early is a signal there."""
        found, wanted = self._found, (stop - start) * self._found.row_bytes
        unit = "rows" if self._checksums is None else "block"
        try:
            data = _read(self._file, wanted, (found.offset or 0) + start * found.row_bytes)
        except OSError as error:
            return self._lost(unit, number, (start, stop), f"it cannot be read: {error.strerror}")
        if len(data) != wanted:
            return self._lost(unit, number, (start, stop), "the file ends within it")
        if self._checksums is not None:
            if number >= len(self._checksums):
                return self._lost(unit, number, (start, stop), "no checksum stands beside it")
            if zlib.crc32(data) != int(self._checksums[number]):
                words = "its checksum (crc32) differs: bytes were changed after they were written"
                return self._lost(unit, number, (start, stop), words)
        values = np.frombuffer(data, found.dtype).reshape(stop - start, *found.shape[1:])
        return Piece(unit, number, values, np.arange(start, stop))

    def _slab(self, number: int, start: int, stop: int) -> Piece:
        """Through HDF5: layouts and filters that it alone knows."""
        try:
            values = np.asarray(self._dataset[start:stop] if self._found.shape else self._dataset[()])
        except HDF5_ERRORS as error:
            return self._lost("rows", number, (start, stop), f"HDF5 cannot read it: {reason_of(error)}")
        return Piece("rows", number, values, np.arange(start, stop))

    def _chunks(self, start: int, stop: int) -> Piece:
        """Whole rows put together from their chunks; rows of which a chunk is damaged are left out."""
        found, chunk = self._found, self._found.chunk
        values, is_good = np.empty((stop - start, *found.shape[1:]), found.dtype), np.ones(stop - start, dtype=bool)
        faults: list[Fault] = []
        for corner in product(range(start, stop, chunk[0]), *map(range, (0,) * 32, found.shape[1:], chunk[1:])):
            decoded = self._decoded(corner, faults)
            rows = slice(corner[0] - start, min(corner[0] + chunk[0], stop) - start)
            if decoded is None:
                is_good[rows] = False
            else:
                values[(rows, *map(slice, corner[1:], np.add(corner[1:], chunk[1:]).tolist()))] = decoded
        if not is_good.all():
            values = values[is_good]
        number = start // chunk[0] * int(np.prod(_grid(found)[1:]))
        return Piece("chunk", number, values, np.flatnonzero(is_good) + start, faults)

    def _chunk_alone(self, number: int) -> Piece:
        corner = tuple(np.multiply(np.unravel_index(number, _grid(self._found)), self._found.chunk).tolist())
        faults: list[Fault] = []
        values = self._decoded(corner, faults)
        if values is None:
            return self._nothing("chunk", number, faults)
        return Piece("chunk", number, values, np.arange(corner[0], corner[0] + len(values)), faults, is_whole=False)

    def _decoded(self, corner: tuple[int, ...], faults: list[Fault]) -> np.ndarray | None:
        """The part of the chunk at `corner` that lies within the data set; None, and a fault, where it is damaged."""
        found, chunk = self._found, self._found.chunk
        inside = tuple(min(size, end - low) for size, end, low in zip(chunk, found.shape, corner, strict=True))
        try:
            if self._raw is None:
                return np.asarray(self._dataset[tuple(map(slice, corner, np.add(corner, inside).tolist()))])
            place = self._raw.place(corner)
            if not place.size:
                raise Damaged("it was never written: its samples read as the fill value")
            if self._pipeline is None:
                return np.asarray(self._dataset[tuple(map(slice, corner, np.add(corner, inside).tolist()))])
            flat = self._pipeline.decode(self._raw.read(place), place.mask, found.chunk_bytes).view(found.dtype)
            return flat.reshape(chunk)[tuple(map(slice, inside))]
        except HDF5_ERRORS as error:
            number = int(np.ravel_multi_index(np.floor_divide(corner, chunk).tolist(), _grid(found)))
            faults.append(self._fault("chunk", number, (corner[0], corner[0] + inside[0]), reason_of(error)))
            return None

    def _lost(self, unit: str, number: int, span: tuple[int, int], words: str) -> Piece:
        return self._nothing(unit, number, [self._fault(unit, number, span, words)])

    def _nothing(self, unit: str, number: int, faults: list[Fault]) -> Piece:
        values = np.empty((0, *self._found.shape[1:]), self._found.dtype)
        return Piece(unit, number, values, np.arange(0), faults)

    def _fault(self, unit: str, number: int, span: tuple[int, int], words: str) -> Fault:
        samples = (span[0], span[1] - 1)
        return Fault("damaged", str(self._found.path), self._found.name, words, _RESTORE, unit, number, samples)


def _read(file: int, num_bytes: int, offset: int) -> memoryview:
    """As many bytes as there are: the system reads 2 GiB at most at once."""
    data, done = memoryview(bytearray(num_bytes)), 0
    while done < num_bytes and (read := os.preadv(file, [data[done:]], offset + done)):
        done += read
    return data[:done]


def verified_by(found: Found) -> str:
    """What a change of its bytes is found by, for people; "" where nothing would tell."""
    if found.layout == "contiguous" and found.block_rows:
        return "crc32 of blocks"
    known = {"fletcher32": "fletcher32", "gzip": "gzip's own checksum"}
    names = [name.partition(" ")[0] for name in found.filters]
    return next((words for name, words in known.items() if name in names), "")


def shares(datasets: list[Found], start: int, stop: int) -> Iterator[tuple[Found, range]]:
    """The pieces from `start` to `stop`, of all pieces of all data sets in order."""
    before = 0
    for found in datasets:
        count = num_pieces(found)
        numbers = range(max(0, start - before), min(count, stop - before))
        if numbers:
            yield found, numbers
        before += count
