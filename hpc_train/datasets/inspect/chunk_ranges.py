"""Data sets read and verified range by range: blocks against their checksums, chunks by decoding them.

A range is some rows, a few MiB. Where chunks cut rows into so many parts that a row of chunks would fill the memory, a
range is one chunk. The ranges depend on the file alone, so that any rank can read any of them.
"""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import h5py
import numpy as np

from hpc_train.datasets.inspect.faults import RESTORE, Fault
from hpc_train.datasets.inspect.structure import CHECKSUMS, DatasetInfo
from hpc_train.train.data.chunk_cache import RawChunks
from hpc_train.train.data.filters import open_pipeline
from hpc_train.train.data.hdf5_faults import HDF5_ERRORS, error_text
from hpc_train.train.data.unwritten import REMEDY

_RANGE_BYTES = 4 << 20
_MAX_CHUNK_ROW_BYTES = 128 << 20  # of the chunks that are put together to whole rows


@dataclass
class RangeValues:
    """The values of one range without those that are damaged, which `faults` names.

    rows: the row number of each of `values`. unit, number: what messages call the range, such as "block" 3.
    is_whole_rows: False if the values are parts of rows.
    """

    info: DatasetInfo
    unit: str
    number: int
    values: np.ndarray
    rows: np.ndarray
    faults: list[Fault] = field(default_factory=list)
    is_whole_rows: bool = True

    def fault(self, kind: str, what: str, remedy: str, bad: np.ndarray) -> Fault:
        """A fault of the values at the indices `bad`."""
        samples = int(self.rows[bad[0]]), int(self.rows[bad[-1]])
        return Fault(kind, str(self.info.path), self.info.name, what, remedy, self.unit, self.number, samples)


def rows_per_range(info: DatasetInfo) -> int:
    if info.layout == "contiguous" and info.block_rows:
        return info.block_rows
    rows = max(1, _RANGE_BYTES // max(1, info.row_bytes))
    return info.chunk[0] * max(1, rows // info.chunk[0]) if info.chunk else rows


def num_ranges(info: DatasetInfo) -> int:
    if not _has_whole_rows(info):
        return int(np.prod(info.num_chunks))
    return -(-info.num_rows // rows_per_range(info)) if info.num_bytes else 0


def _has_whole_rows(info: DatasetInfo) -> bool:
    return not info.chunk or info.dtype.hasobject or info.chunk[0] * info.row_bytes <= _MAX_CHUNK_ROW_BYTES


def ranges_between(datasets: list[DatasetInfo], start: int, stop: int) -> Iterator[tuple[DatasetInfo, range]]:
    """Ranges start to stop in the sequence of all ranges of all data sets: their numbers in each data set."""
    before = 0
    for info in datasets:
        count = num_ranges(info)
        numbers = range(max(0, start - before), min(count, stop - before))
        if numbers:
            yield info, numbers
        before += count


def verified_by(info: DatasetInfo) -> str:
    """The checksum that reveals changed bytes; "" without one."""
    if info.layout == "contiguous" and info.block_rows:
        return "crc32 of blocks"
    filters = [name.partition(" ")[0] for name in info.filters]
    known = {"fletcher32": "fletcher32", "gzip": "gzip's own checksum"}
    return next((checksum for name, checksum in known.items() if name in filters), "")


class RangeReader:
    """Reads the ranges of one data set of an open file, from any thread."""

    def __init__(self, file: h5py.File, info: DatasetInfo) -> None:
        self._info, self._dataset, self._descriptor = info, file[info.name], -1
        self._pipeline: Any = None
        self._raw: RawChunks | None = None
        self._checksums: np.ndarray | None = None
        if info.dtype.hasobject:
            return  # strings and lists: their bytes are elsewhere in the file, and HDF5 finds them
        if info.layout == "chunked":
            self._pipeline = open_pipeline(self._dataset)
            self._raw = RawChunks(self._dataset)
        elif info.layout == "contiguous":
            self._descriptor = os.open(info.path, os.O_RDONLY)
            if info.block_rows:
                self._checksums = np.asarray(file[f"{CHECKSUMS}/{info.name}"][()]).reshape(-1)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, number: int) -> RangeValues:
        info = self._info
        if not _has_whole_rows(info):
            return self._read_one_chunk(number)
        start = number * rows_per_range(info)
        stop = min(start + rows_per_range(info), info.num_rows)
        if self._pipeline is not None:
            return self._read_chunks(start, stop)
        if self._descriptor >= 0:
            return self._read_block(number, start, stop)
        return self._read_through_hdf5(number, start, stop)

    def _read_block(self, number: int, start: int, stop: int) -> RangeValues:
        """Past HDF5, whose global lock would make threads wait. Not mapped: a file that ends early raises SIGBUS."""
        info, num_bytes = self._info, (stop - start) * self._info.row_bytes
        unit = "rows" if self._checksums is None else "block"
        try:
            data = _pread(self._descriptor, num_bytes, (info.offset or 0) + start * info.row_bytes)
        except OSError as error:
            return self._damaged(unit, number, start, stop, f"it cannot be read: {error.strerror}")
        if why := "the file ends within it" if len(data) != num_bytes else self._checksum_fault(number, data):
            return self._damaged(unit, number, start, stop, why)
        values = np.frombuffer(data, info.dtype).reshape(stop - start, *info.shape[1:])
        return RangeValues(info, unit, number, values, np.arange(start, stop))

    def _checksum_fault(self, number: int, data: memoryview) -> str:
        if self._checksums is None:
            return ""
        if number >= len(self._checksums):
            return "it has no checksum"
        if zlib.crc32(data) != int(self._checksums[number]):
            return "its checksum (crc32) differs: bytes were changed after they were written"
        return ""

    def _read_through_hdf5(self, number: int, start: int, stop: int) -> RangeValues:
        """For layouts and filters that only HDF5 decodes."""
        try:
            values = np.asarray(self._dataset[start:stop] if self._info.shape else self._dataset[()])
        except HDF5_ERRORS as error:
            return self._damaged("rows", number, start, stop, f"HDF5 cannot read it: {error_text(error)}")
        return RangeValues(self._info, "rows", number, values, np.arange(start, stop))

    def _read_chunks(self, start: int, stop: int) -> RangeValues:
        """Whole rows put together from their chunks, without the rows that a damaged chunk covers."""
        info = self._info
        values, is_good = np.empty((stop - start, *info.shape[1:]), info.dtype), np.ones(stop - start, dtype=bool)
        faults: list[Fault] = []
        within_row = [range(0, size, chunk) for size, chunk in zip(info.shape[1:], info.chunk[1:], strict=True)]
        for corner in product(range(start, stop, info.chunk[0]), *within_row):
            rows = slice(corner[0] - start, corner[0] - start + info.chunk[0])
            decoded = self._decode(corner, faults)
            if decoded is None:
                is_good[rows] = False
            else:
                values[(rows, *self._box(corner)[1:])] = decoded
        if not is_good.all():
            values = values[is_good]
        number = start // info.chunk[0] * int(np.prod(info.num_chunks[1:]))
        return RangeValues(info, "chunk", number, values, np.flatnonzero(is_good) + start, faults)

    def _read_one_chunk(self, number: int) -> RangeValues:
        index = np.unravel_index(number, self._info.num_chunks)
        corner = tuple(np.multiply(index, self._info.chunk).tolist())
        faults: list[Fault] = []
        values = self._decode(corner, faults)
        if values is None:
            return self._empty("chunk", number, faults)
        rows = np.arange(corner[0], corner[0] + len(values))
        return RangeValues(self._info, "chunk", number, values, rows, faults, is_whole_rows=False)

    def _decode(self, corner: tuple[int, ...], faults: list[Fault]) -> np.ndarray | None:
        """The part of the chunk at `corner` inside the data set. None if it is damaged, which adds to `faults`."""
        info, box = self._info, self._box(corner)
        try:
            if self._raw is not None:
                location = self._raw.locate(corner)
                if not location.size_bytes:
                    faults.append(self._unwritten(corner, box))
                    return None
                if self._pipeline is not None:
                    data = self._pipeline.decode(self._raw.read(location), location.mask, info.chunk_bytes)
                    inside = tuple(slice(part.stop - part.start) for part in box)
                    return data.view(info.dtype).reshape(info.chunk)[inside]
            return np.asarray(self._dataset[box])
        except HDF5_ERRORS as error:
            faults.append(self._damage("chunk", self._number(corner), box[0].start, box[0].stop, error_text(error)))
            return None

    def _unwritten(self, corner: tuple[int, ...], box: tuple[slice, ...]) -> Fault:
        what = "it was never written: its samples read as the fill value"
        number, span = self._number(corner), (box[0].start, box[0].stop - 1)
        return Fault("unwritten", str(self._info.path), self._info.name, what, REMEDY, "chunk", number, span)

    def _number(self, corner: tuple[int, ...]) -> int:
        """Of the chunk at `corner`."""
        info = self._info
        return int(np.ravel_multi_index(np.floor_divide(corner, info.chunk).tolist(), info.num_chunks))

    def _box(self, corner: tuple[int, ...]) -> tuple[slice, ...]:
        """What the chunk at `corner` covers of the data set."""
        sizes = zip(corner, self._info.chunk, self._info.shape, strict=True)
        return tuple(slice(low, min(low + chunk, size)) for low, chunk, size in sizes)

    def _damaged(self, unit: str, number: int, start: int, stop: int, why: str) -> RangeValues:
        return self._empty(unit, number, [self._damage(unit, number, start, stop, why)])

    def _empty(self, unit: str, number: int, faults: list[Fault]) -> RangeValues:
        values = np.empty((0, *self._info.shape[1:]), self._info.dtype)
        return RangeValues(self._info, unit, number, values, np.arange(0), faults)

    def _damage(self, unit: str, number: int, start: int, stop: int, why: str) -> Fault:
        path, samples = str(self._info.path), (start, stop - 1)
        return Fault("damaged", path, self._info.name, why, RESTORE, unit, number, samples)


def _pread(descriptor: int, num_bytes: int, offset: int) -> memoryview:
    """As many bytes as there are. The system reads 2 GiB at most in one call."""
    data, done = memoryview(bytearray(num_bytes)), 0
    while done < num_bytes and (read := os.preadv(descriptor, [data[done:]], offset + done)):
        done += read
    return data[:done]
