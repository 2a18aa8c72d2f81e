"""Chunked data sets: chunks decoded whole, by threads, into a fixed amount of memory."""

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

from hpc_train.core.sampling import Indices, regular_chunk_edges, require_rows
from hpc_train.train.data.filters import DamagedChunk, Pipeline, open_pipeline
from hpc_train.train.data.hdf5_faults import damage_as_user_error

_MOST_THREADS = 8  # of a rank; more wait for each other's memory
_FEWEST_SLOTS = 2


class ChunkLocation(NamedTuple):
    """Where a chunk lies in its file: bytes. size: 0 of one never written. mask: bits of the filters left out."""

    address: int
    size: int
    mask: int


class RawChunks:
    """Chunks of a data set as they lie in its file, read past HDF5: its lock is not held then.

    HDF5 says where they lie, and nothing more: it copies as many bytes as a damaged index says (1.10.8, seen), and ends
    the process. Any thread may read.
    """

    def __init__(self, dataset: h5py.Dataset) -> None:
        self.chunk_bytes = prod(dataset.chunks) * dataset.dtype.itemsize
        self._dataset, self._is_packed = dataset, dataset.id.get_create_plist().get_nfilters() > 0
        self._file: int = dataset.file.id.get_vfd_handle()  # HDF5's own: data sets of a file take one together
        self._num_file_bytes = os.fstat(self._file).st_size
        self._shift = 0
        self._shift = self._base_address()

    def locate(self, corner: tuple[int, ...]) -> ChunkLocation:
        """Where the chunk at `corner` lies. Raises `DamagedChunk` for one that the file cannot hold."""
        info = self._dataset.id.get_chunk_info_by_coord(corner)
        if not info.size:
            return ChunkLocation(0, 0, 0)
        location = ChunkLocation(info.byte_offset + self._shift, info.size, info.filter_mask)
        if location.address + location.size > self._num_file_bytes:
            raise DamagedChunk("the file ends within it")
        if not self._is_packed and location.size != self.chunk_bytes:
            raise DamagedChunk(f"it holds {location.size:,} bytes and not {self.chunk_bytes:,}")
        return location

    def read(self, location: ChunkLocation) -> bytes:
        """The bytes at `place`. Raises `DamagedChunk` where the file has become shorter."""
        data = os.pread(self._file, location.size, location.address)
        if len(data) != location.size:
            raise DamagedChunk("the file ends within it")
        return data

    def read_into(self, target: np.ndarray, location: ChunkLocation) -> None:
        """Fills `target`, which is as long, with the bytes at `place`. Raises `DamagedChunk`, as `read` does."""
        if os.preadv(self._file, [target.data.cast("B")], location.address) != target.nbytes:
            raise DamagedChunk("the file ends within it")

    def _base_address(self) -> int:
        """What chunk addresses lack: in HDF5 1.10.8 (seen), the user block that the file begins with."""
        corner, block = (0,) * self._dataset.ndim, self._dataset.file.userblock_size
        location = self.locate(corner) if block else ChunkLocation(0, 0, 0)
        if not location.size:
            return 0
        _, content = self._dataset.id.read_direct_chunk(corner)
        return 0 if self.read(location) == content else int(block)


class ChunkFile:
    """A chunked data set in its file. A row of chunks, all that hold the same samples, is called a block."""

    def __init__(self, path: Path, dataset: h5py.Dataset) -> None:
        self.shape: tuple[int, ...] = dataset.shape
        self.dtype = dataset.dtype.newbyteorder("=")
        self._path, self._dataset, self._chunk = path, dataset, tuple(dataset.chunks)
        self.num_rows = self._chunk[0]
        self._pipeline = open_pipeline(dataset)
        self._raw = RawChunks(dataset)
        self._verified = np.zeros(-(-self.shape[0] // self.num_rows), dtype=bool)

    @property
    def filters(self) -> str:
        """Their names, for people."""
        return ", ".join(self._pipeline.names) or "not packed" if self._pipeline else "filters of HDF5's own"

    def read(self, block: int, target: np.ndarray) -> None:
        """Decodes a block into the first rows of `target`. Raises `UserError` where it is damaged.

        A checksum is looked at when its block is first read.
        """
        first = block * self.num_rows
        there = target[: min(self.num_rows, self.shape[0] - first)]
        where = f"of {self._dataset.name}, samples {first} to {first + len(there) - 1},"
        if self._pipeline is None:  # only HDF5 itself can
            with damage_as_user_error(self._path, f"block {block} {where}"):
                self._dataset.read_direct(there, np.s_[first : first + len(there)])
            return
        for inner in product(*map(range, [0] * (len(self.shape) - 1), self.shape[1:], self._chunk[1:])):
            corner = (first, *inner)
            with damage_as_user_error(self._path, f"chunk {corner} {where}"):
                self._read_chunk(corner, there, self._pipeline, bool(self._verified[block]))
        self._verified[block] = True

    def _read_chunk(self, corner: tuple[int, ...], there: np.ndarray, pipeline: Pipeline, verified: bool) -> None:
        """Decodes the chunk at `corner` into its place in the rows `there`."""
        target = there[(slice(None), *map(slice, corner[1:], np.add(corner[1:], self._chunk[1:]).tolist()))]
        location = self._raw.locate(corner)
        if not location.size:
            target[...] = self._dataset.fillvalue
        elif not pipeline.steps and target.shape == self._chunk and target.flags.c_contiguous and self._is_native:
            self._raw.read_into(target, location)
        else:
            data = pipeline.decode(self._raw.read(location), location.mask, self._raw.chunk_bytes, verified)
            values = data.view(self._dataset.dtype).reshape(self._chunk)
            target[...] = values[tuple(map(slice, target.shape))]

    @property
    def _is_native(self) -> bool:
        return bool(self._dataset.dtype.isnative)


class ChunkCache:
    """Rows of chunked data sets in one or more files, one after the other: decoded ahead, as long as there is room.

    A block is decoded into one of a fixed number of slots. Of those that nobody has announced, the one used longest ago
    makes room; what is announced and finds no room waits until there is some: so each is decoded once.
    """

    def __init__(self, files: Sequence[ChunkFile], memory_bytes: int, num_threads: int) -> None:
        self._files = files
        first, lengths = files[0], np.array([file.shape[0] for file in files])
        self.shape: tuple[int, ...] = (int(lengths.sum()), *first.shape[1:])
        self.dtype = first.dtype
        starts = np.cumsum(lengths) - lengths
        edges = [
            start + regular_chunk_edges(num, first.num_rows)[:-1] for start, num in zip(starts, lengths, strict=True)
        ]
        self._first_blocks = np.cumsum([0, *map(len, edges)])
        self.chunk_edges: Indices = np.append(np.concatenate(edges), self.shape[0])
        self._num_rows = first.num_rows
        block_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize * self._num_rows
        num_slots = min(len(self.chunk_edges) - 1, max(_FEWEST_SLOTS, memory_bytes // block_bytes))
        self._slots = np.empty((num_slots, self._num_rows, *self.shape[1:]), self.dtype)
        self._free = list(range(num_slots))
        self._slot_of = np.zeros(len(self.chunk_edges) - 1, dtype=np.int64)  # of the blocks that are held
        self._held: OrderedDict[int, Future[None]] = OrderedDict()  # block -> when it is there
        self._announced: Counter[int] = Counter()  # block -> how many times it will be taken from
        self._waiting: deque[int] = deque()  # announced, without a slot
        num_threads = min(_MOST_THREADS, max(1, num_threads))
        self._threads = ThreadPoolExecutor(num_threads, "hpc-train-read")
        self.description = (
            f"{len(self.chunk_edges) - 1:,} chunks of {block_bytes / 1e6:,.2f} MB ({first.filters}): decoded by "
            f"{num_threads} thread{'s' * (num_threads != 1)} into {self._slots.nbytes / 1e6:,.0f} MB"
        )
        self._lock = Lock()

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        if out is None:
            out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        blocks = self._blocks(rows)
        inside = rows - self.chunk_edges[blocks]
        needed = list(dict.fromkeys(blocks.tolist()))
        flat = self._slots.reshape(-1, *self.shape[1:])
        with self._lock:
            for part in self._parts(needed):
                self._load(part)
                here = slice(None) if len(part) == len(needed) else np.flatnonzero(np.isin(blocks, part))
                slots = self._slot_of[blocks[here]] * self._num_rows + inside[here]
                if isinstance(here, slice):
                    np.take(flat, slots, axis=0, out=out, mode="clip")
                else:
                    out[here] = flat[slots]
                for block in part:
                    self._announced[block] -= self._announced[block] > 0
                self._start_waiting()
        return out

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.take(np.arange(*rows.indices(len(self))))

    def prefetch(self, rows: np.ndarray) -> None:
        with self._lock:
            for block in dict.fromkeys(self._blocks(rows).tolist()):
                self._announced[block] += 1
                if block not in self._held and block not in self._waiting:
                    self._waiting.append(block)
            self._start_waiting()

    def _start_waiting(self) -> None:
        while self._waiting and (self._free or any(not self._announced[block] for block in self._held)):
            block = self._waiting.popleft()
            if block not in self._held:
                self._start(block)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _blocks(self, rows: np.ndarray) -> np.ndarray:
        require_rows(rows, len(self))
        return rows // self._num_rows if len(self._files) == 1 else np.searchsorted(self.chunk_edges, rows, "right") - 1

    def _parts(self, needed: list[int]) -> list[list[int]]:
        """`needed`, as many at once as there are slots; before all that is waited for, what is there and gives room."""
        there = [block for block in needed if block in self._held and self._held[block].done()]
        rest = [block for block in needed if block not in there] if len(there) < len(needed) else []
        size = len(self._slots)
        return ([there] if there else []) + [rest[first : first + size] for first in range(0, len(rest), size)]

    def _load(self, wanted: Sequence[int]) -> None:
        """Returns once all of these blocks are in their slots."""
        for block in wanted:
            if block in self._held:
                self._held.move_to_end(block)
        for block in wanted:
            if block not in self._held:
                self._start(block, keep=set(wanted))
        for block in wanted:
            decoded = self._held[block]
            try:
                decoded.result()
            except BaseException:  # Ctrl-C, too: while a thread still writes to the slot, it stays the block's
                if decoded.cancel() or decoded.done():
                    del self._held[block]
                    self._free.append(int(self._slot_of[block]))
                raise

    def _start(self, block: int, keep: Collection[int] = ()) -> None:
        """Has a block decoded, where no slot is free into that of one outside `keep` that is announced least."""
        if self._free:
            slot = self._free.pop()
        else:
            idle = (held for held in self._held if held not in keep)
            gone = min(idle, key=lambda held: self._announced[held] > 0)
            slot, before = int(self._slot_of[gone]), self._held.pop(gone)
            if not before.cancel():
                before.exception()  # until then it may be writing there
        self._slot_of[block] = slot
        self._held[block] = self._threads.submit(self._decode, block, slot)

    def _decode(self, block: int, slot: int) -> None:
        number = int(np.searchsorted(self._first_blocks, block, "right")) - 1
        self._files[number].read(block - int(self._first_blocks[number]), self._slots[slot])
