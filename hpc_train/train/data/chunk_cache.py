"""Chunked data sets: threads decode whole chunks into a fixed amount of memory."""

import os
from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from math import prod
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import h5py
import numpy as np

from hpc_train.core.formatting import amount, plural
from hpc_train.core.sampling import Indices, regular_chunk_edges, require_rows
from hpc_train.train.data.filters import DamagedChunk, Pipeline, open_pipeline
from hpc_train.train.data.hdf5_faults import damage_as_user_error
from hpc_train.train.data.reader_interface import Reader

_MAX_THREADS = 8  # of a rank; more compete for memory bandwidth
_MIN_SLOTS = 2


class ChunkLocation(NamedTuple):
    """Where a chunk is in its file. size_bytes: 0 if it was never written. mask: bits of the filters not applied."""

    address: int
    size_bytes: int
    mask: int


class RawChunks:
    """The stored bytes of the chunks of a data set, read without HDF5, whose lock is not held then. Thread-safe.

    HDF5 only says where the chunks are: it would copy as many bytes as a damaged index claims, and crash the process
    (seen in 1.10.8).
    """

    def __init__(self, dataset: h5py.Dataset) -> None:
        self.chunk_bytes = prod(dataset.chunks) * dataset.dtype.itemsize
        self._dataset, self._is_filtered = dataset, dataset.id.get_create_plist().get_nfilters() > 0
        self._file: int = dataset.file.id.get_vfd_handle()  # HDF5's own: all data sets of a file use one descriptor
        self._num_file_bytes = os.fstat(self._file).st_size
        self._base = 0
        self._base = self._base_address()

    def locate(self, corner: tuple[int, ...]) -> ChunkLocation:
        """Where the chunk at `corner` is. Raises `DamagedChunk` if the file cannot hold it."""
        info = self._dataset.id.get_chunk_info_by_coord(corner)
        if not info.size:
            return ChunkLocation(0, 0, 0)
        location = ChunkLocation(info.byte_offset + self._base, info.size, info.filter_mask)
        if location.address + location.size_bytes > self._num_file_bytes:
            raise DamagedChunk("the file ends within it")
        if not self._is_filtered and location.size_bytes != self.chunk_bytes:
            raise DamagedChunk(f"it holds {location.size_bytes:,} bytes and not {self.chunk_bytes:,}")
        return location

    def read(self, location: ChunkLocation) -> bytes:
        """The bytes at `location`. Raises `DamagedChunk` if the file has become shorter."""
        data = os.pread(self._file, location.size_bytes, location.address)
        if len(data) != location.size_bytes:
            raise DamagedChunk("the file ends within it")
        return data

    def read_into(self, target: np.ndarray, location: ChunkLocation) -> None:
        """Fills `target`, which has the chunk's size. Raises `DamagedChunk` if the file has become shorter."""
        if os.preadv(self._file, [target.data.cast("B")], location.address) != target.nbytes:
            raise DamagedChunk("the file ends within it")

    def _base_address(self) -> int:
        """What must be added to HDF5's chunk addresses: 1.10.8 leaves out the user block at the start of the file."""
        corner, num_block_bytes = (0,) * self._dataset.ndim, self._dataset.file.userblock_size
        location = self.locate(corner) if num_block_bytes else ChunkLocation(0, 0, 0)
        if not location.size_bytes:
            return 0
        _, content = self._dataset.id.read_direct_chunk(corner)
        return 0 if self.read(location) == content else int(num_block_bytes)


class ChunkFile:
    """A chunked data set in its file. A block is a row of chunks: all those that hold the same samples."""

    def __init__(self, path: Path, dataset: h5py.Dataset) -> None:
        self.shape: tuple[int, ...] = dataset.shape
        self.dtype = dataset.dtype.newbyteorder("=")
        self._path, self._dataset, self._chunk = path, dataset, tuple(dataset.chunks)
        self.block_rows = self._chunk[0]
        self._pipeline = open_pipeline(dataset)
        self._raw = RawChunks(dataset)
        self._is_verified = np.zeros(-(-self.shape[0] // self.block_rows), dtype=bool)

    @property
    def filters(self) -> str:
        """The filters' names, for the log."""
        if self._pipeline is None:
            return "filters that only HDF5 has"
        return ", ".join(self._pipeline.names) or "not compressed"

    def read(self, block: int, target: np.ndarray) -> None:
        """Decodes a block into the first rows of `target`. Raises `UserError` if the block is damaged.

        Checksums are verified when a block is read for the first time.
        """
        first = block * self.block_rows
        rows = target[: min(self.block_rows, self.shape[0] - first)]
        where = f"of {self._dataset.name}, samples {first} to {first + len(rows) - 1},"
        if self._pipeline is None:
            with damage_as_user_error(self._path, f"block {block} {where}"):
                self._dataset.read_direct(rows, np.s_[first : first + len(rows)])
            return
        inner_starts = [range(0, size, step) for size, step in zip(self.shape[1:], self._chunk[1:], strict=True)]
        for inner in product(*inner_starts):
            corner = (first, *inner)
            with damage_as_user_error(self._path, f"chunk {corner} {where}"):
                self._read_chunk(corner, rows, self._pipeline, bool(self._is_verified[block]))
        self._is_verified[block] = True

    def _read_chunk(self, corner: tuple[int, ...], rows: np.ndarray, pipeline: Pipeline, is_verified: bool) -> None:
        """Decodes the chunk at `corner` into the part of `rows` that it covers."""
        inner = zip(corner[1:], self._chunk[1:], strict=True)
        target = rows[(slice(None), *(slice(start, start + size) for start, size in inner))]
        location = self._raw.locate(corner)
        is_stored_as_is = not pipeline.steps and bool(self._dataset.dtype.isnative)
        if not location.size_bytes:
            target[...] = self._dataset.fillvalue
        elif is_stored_as_is and target.shape == self._chunk and target.flags.c_contiguous:
            self._raw.read_into(target, location)  # without a copy between
        else:
            data = pipeline.decode(self._raw.read(location), location.mask, self._raw.chunk_bytes, is_verified)
            values = data.view(self._dataset.dtype).reshape(self._chunk)
            target[...] = values[tuple(map(slice, target.shape))]  # chunks at the edge reach beyond the data set


class ChunkCache(Reader):
    """Rows of chunked data sets in one or more files, decoded ahead as long as there is room.

    Each block is decoded into one of a fixed number of slots. A block that needs a slot takes that of the least
    recently used block with no rows to come; if all have rows to come, a prefetched block waits. So each block is
    decoded once per epoch.
    """

    def __init__(self, files: Sequence[ChunkFile], memory_bytes: int, num_threads: int) -> None:
        self._files = files
        first, lengths = files[0], np.array([file.shape[0] for file in files])
        self.shape = (int(lengths.sum()), *first.shape[1:])
        self.dtype = first.dtype
        starts = np.cumsum(lengths) - lengths
        edges = [
            start + regular_chunk_edges(length, first.block_rows)[:-1]
            for start, length in zip(starts, lengths, strict=True)
        ]
        self._first_blocks = np.cumsum([0, *map(len, edges)])  # of each file
        self.chunk_edges: Indices = np.append(np.concatenate(edges), self.shape[0])
        self._block_rows = first.block_rows
        num_blocks, block_bytes = len(self.chunk_edges) - 1, self.row_bytes * self._block_rows
        num_slots = min(num_blocks, max(_MIN_SLOTS, memory_bytes // block_bytes))
        self._slots = np.empty((num_slots, self._block_rows, *self.shape[1:]), self.dtype)
        self._free_slots = list(range(num_slots))
        self._slot_of = np.zeros(num_blocks, dtype=np.int64)  # of the blocks in the cache
        self._cached: OrderedDict[int, Future[None]] = OrderedDict()  # block -> its decoding; least recently used first
        self._num_to_come: Counter[int] = Counter()  # block -> how many prefetched batches have rows of it
        self._waiting: deque[int] = deque()  # prefetched blocks without a slot
        num_threads = min(_MAX_THREADS, max(1, num_threads))
        self._threads = ThreadPoolExecutor(num_threads, "hpc-train-read")
        self._lock = Lock()
        self.description = (
            f"{num_blocks:,} chunks of {amount(block_bytes, 'B')} ({first.filters}): decoded by "
            f"{plural(num_threads, 'thread')} into {amount(self._slots.nbytes, 'B')}"
        )

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        if out is None:
            out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        blocks = self._blocks_of(rows)
        inside = rows - self.chunk_edges[blocks]
        needed = list(dict.fromkeys(blocks.tolist()))
        flat = self._slots.reshape(-1, *self.shape[1:])
        with self._lock:
            for group in self._groups(needed):
                self._load(group)
                where = slice(None) if len(group) == len(needed) else np.flatnonzero(np.isin(blocks, group))
                slot_rows = self._slot_of[blocks[where]] * self._block_rows + inside[where]
                if isinstance(where, slice):
                    np.take(flat, slot_rows, axis=0, out=out, mode="clip")  # nothing is clipped; "raise" would buffer
                else:
                    out[where] = flat[slot_rows]
                for block in group:
                    self._num_to_come[block] -= self._num_to_come[block] > 0
                self._start_waiting()
        return out

    def prefetch(self, rows: np.ndarray) -> None:
        with self._lock:
            for block in dict.fromkeys(self._blocks_of(rows).tolist()):
                self._num_to_come[block] += 1
                if block not in self._cached and block not in self._waiting:
                    self._waiting.append(block)
            self._start_waiting()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _blocks_of(self, rows: np.ndarray) -> np.ndarray:
        require_rows(rows, len(self))
        if len(self._files) == 1:
            return rows // self._block_rows
        return np.searchsorted(self.chunk_edges, rows, "right") - 1

    def _groups(self, needed: list[int]) -> list[list[int]]:
        """`needed` in groups that fit into the slots; first the blocks that are decoded, which then make room."""
        ready = [block for block in needed if block in self._cached and self._cached[block].done()]
        rest = [block for block in needed if block not in ready] if len(ready) < len(needed) else []
        size = len(self._slots)
        return ([ready] if ready else []) + [rest[first : first + size] for first in range(0, len(rest), size)]

    def _load(self, wanted: Sequence[int]) -> None:
        """Returns once all of these blocks are decoded."""
        for block in wanted:
            if block in self._cached:
                self._cached.move_to_end(block)
        for block in wanted:
            if block not in self._cached:
                self._start(block, keep=set(wanted))
        for block in wanted:
            decoding = self._cached[block]
            try:
                decoding.result()
            except BaseException:  # Ctrl-C too: while a thread still writes to the slot, the block keeps it
                if decoding.cancel() or decoding.done():
                    del self._cached[block]
                    self._free_slots.append(int(self._slot_of[block]))
                raise

    def _start_waiting(self) -> None:
        while self._waiting and (self._free_slots or any(not self._num_to_come[block] for block in self._cached)):
            block = self._waiting.popleft()
            if block not in self._cached:
                self._start(block)

    def _start(self, block: int, keep: Collection[int] = ()) -> None:
        """Starts to decode a block into a free slot, or in place of a block outside `keep`."""
        if self._free_slots:
            slot = self._free_slots.pop()
        else:
            candidates = (cached for cached in self._cached if cached not in keep)
            evicted = min(candidates, key=lambda cached: self._num_to_come[cached] > 0)
            slot, decoding = int(self._slot_of[evicted]), self._cached.pop(evicted)
            if not decoding.cancel():
                decoding.exception()  # waits: until then a thread may be writing to the slot
        self._slot_of[block] = slot
        self._cached[block] = self._threads.submit(self._decode, block, slot)

    def _decode(self, block: int, slot: int) -> None:
        number = int(np.searchsorted(self._first_blocks, block, "right")) - 1
        self._files[number].read(block - int(self._first_blocks[number]), self._slots[slot])
