"""Writes a source's rows to HDF5 block by block: collectively, in bounded memory, and so that a kill loses little."""

import errno
import os
import shutil
import zlib
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from time import perf_counter_ns

import h5py
import numpy as np

from hpc_train.core import owned_files
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import amount
from hpc_train.core.progress import StepProgress
from hpc_train.core.sampling import rank_span
from hpc_train.datasets.prepare.disk import DiskFile, cannot_write
from hpc_train.datasets.prepare.journal import Blocks, Journal
from hpc_train.datasets.prepare.layout import BLOCK_BYTES, FORMAT_1_8, Layout, empty_file
from hpc_train.datasets.prepare.sources import Array, Source
from hpc_train.train.comm.context import Context, raised_on_all_ranks
from hpc_train.train.comm.mpi_library import parallel_file_options
from hpc_train.train.data.parallel_hdf5 import select_rows, transfer_properties

_WRITE_BYTES = 32 << 20  # of a rank at once, if memory allows
_MEMORY_PER_WRITE = 8  # written bytes may be in memory as read, as rows, as sent between ranks and as compressed
_ROUNDS_PER_FLUSH = 8
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class WritePlan:
    """What to write, and where. memory_bytes: for all that a rank holds of the data."""

    source: Source
    output: Path
    layout: Layout
    memory_bytes: int

    @property
    def partial_path(self) -> Path:
        """The file's name until it is complete."""
        return self.output.with_name(f".{self.output.name}.partial")

    @property
    def journal_path(self) -> Path:
        return self.output.with_name(f".{self.output.name}.journal")

    @property
    def num_bytes(self) -> int:
        return sum(array.shape[0] * array.row_bytes for array in self.source.arrays.values())

    @property
    def num_blocks(self) -> int:
        return sum(map(self.num_blocks_of, self.source.arrays.values()))

    def num_blocks_of(self, array: Array) -> int:
        return -(-array.shape[0] // self.layout.block_rows(array))

    def blocks_at_once(self, array: Array) -> int:
        """Blocks that a rank writes together. Raises `UserError` if not even one block fits into memory."""
        block_bytes = self.layout.block_rows(array) * array.row_bytes
        write_bytes = min(_WRITE_BYTES, self.memory_bytes // _MEMORY_PER_WRITE)
        if block_bytes <= max(write_bytes, BLOCK_BYTES):
            return max(1, write_bytes // block_bytes)
        if block_bytes * _MEMORY_PER_WRITE > self.memory_bytes:
            needed_mb = -(-block_bytes * _MEMORY_PER_WRITE // 1_000_000)
            raise UserError(
                f"--memory-mb: one row has {amount(array.row_bytes, 'B')}, too much for the memory of a rank",
                f"Set it to {needed_mb} times the ranks of a node, or more.",
            )
        return 1

    def rows(self, array: Array, first: int, stop: int) -> tuple[int, int]:
        """The rows of blocks first to stop."""
        size = self.layout.block_rows(array)
        return min(first * size, array.shape[0]), min(stop * size, array.shape[0])

    def num_rows_in(self, array: Array, blocks: Collection[int]) -> int:
        """Rows in some of the blocks. The last block may be shorter."""
        size = self.layout.block_rows(array)
        return sum(min(size, array.shape[0] - block * size) for block in blocks)

    def checksums(self, array: Array, rows: np.ndarray) -> list[int]:
        """CRC-32 of each block of `rows`, which begin with a block."""
        size = self.layout.block_rows(array)
        return [zlib.crc32(rows[at : at + size].data) for at in range(0, len(rows), size)]


# ---------------------------------------------------------------------------------------------- the empty file


def create(plan: WritePlan) -> None:
    """On the root. The file with its data sets and none of their rows: the same for any number of ranks.

    Raises `UserError` on a full disk now, and not half-way; but for compressed data, whose size is unknown.
    """
    try:
        plan.partial_path.parent.mkdir(parents=True, exist_ok=True)
        with owned_files.created(plan.partial_path) as empty:
            empty.write(empty_file())
    except OSError as error:
        raise cannot_write(plan.output, error.errno) from None
    with open_alone(plan) as opened:
        assert opened.file is not None
        opened.file.attrs["complete"] = False
        for name, array in plan.source.arrays.items():
            dataset = plan.layout.create(opened.file, name, array)
            if array.attributes is not None:
                dataset.attrs.update(array.attributes)
                continue
            is_pictures = name.endswith("inputs") and array.dtype == np.uint8 and len(array.shape) > 1  # not tokens
            if is_pictures:  # values in [0, 1], by the CF conventions
                dataset.attrs["scale_factor"], dataset.attrs["add_offset"] = (1 / 255, 0.0)
        if plan.source.netcdf:
            plan.source.netcdf.write(opened.file)
    if not plan.layout.is_chunked:
        _reserve(plan)


def _reserve(plan: WritePlan) -> None:
    try:
        with owned_files.opened(plan.partial_path, "r+b") as file:
            # Where the file system cannot reserve, the C library writes zeros until the disk is full.
            if plan.num_bytes > shutil.disk_usage(plan.partial_path.parent).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(file.fileno(), 0, max(1, plan.num_bytes))
    except OSError as error:
        raise cannot_write(plan.output, error.errno) from None


# ---------------------------------------------------------------------------------------------- opened files


@dataclass(frozen=True)
class OpenFile:
    """An HDF5 file opened for writing.

    file: None on ranks whose rows the root writes. disk: what one process writes through; None in collective writes.
    """

    file: h5py.File | None
    disk: DiskFile | None = None

    def require_written(self) -> None:
        """Raises the `OSError` of a write that HDF5 has not seen."""
        if self.disk:
            self.disk.require_written()


@contextmanager
def open_alone(plan: WritePlan) -> Iterator[OpenFile]:
    """The file, written by this rank alone. Raises `UserError`, at the latest at the end, if bytes were not written.

    HDF5 then has closed a file of which a part is missing: it must not be used.
    """
    disk = DiskFile(plan.partial_path)
    try:
        with h5py.File(disk, "r+", **FORMAT_1_8) as file:
            yield OpenFile(file, disk)
    finally:
        disk.close()
        if disk.error:
            raise cannot_write(plan.output, disk.error.errno) from None


@contextmanager
def _open_together(plan: WritePlan, context: Context) -> Iterator[OpenFile]:
    """Collective. A contiguous file is opened by all ranks, a chunked one by the root alone."""
    if plan.layout.is_chunked and not context.world.is_root:
        yield OpenFile(None)
        return
    if plan.layout.is_chunked or context.comm is None:
        with open_alone(plan) as opened:
            yield opened
        return
    file = h5py.File(plan.partial_path, "r+", **FORMAT_1_8, **parallel_file_options(context))
    try:
        yield OpenFile(file)
    except BaseException as error:
        # Closing is collective: a rank that fails alone would wait in it for the others, instead of ending the job.
        if raised_on_all_ranks(error):
            with suppress(OSError, RuntimeError):  # on a full disk closing fails, too: the first error says why
                file.close()
        raise
    file.close()


# ---------------------------------------------------------------------------------------------- writing


def write(plan: WritePlan, done: Blocks, journal: Journal | None, context: Context) -> Blocks:
    """Collective. Writes all blocks except those `done`; returns the checksums of all blocks, on every rank.

    journal: on the root, and None elsewhere.
    """
    arrays = plan.source.arrays
    written = {name: dict(done.get(name, {})) for name in arrays}
    num_rows = sum(array.shape[0] for array in arrays.values())
    num_written = sum(plan.num_rows_in(arrays[name], written[name]) for name in arrays)
    label, unit = f"writing {plan.output.name}", plan.source.unit
    progress = StepProgress(label, num_rows, "auto", context.world.is_root, unit=unit)
    progress.begin(num_written)
    with closing(progress), _open_together(plan, context) as opened:
        if plan.layout.is_chunked and opened.file:
            _hold_metadata_in_memory(opened.file)
        writer = _BlockWriter(plan, opened, journal, context)
        for name, array in arrays.items():
            for first, stop in _my_rounds(plan, array, written[name], context):
                new = writer.write(name, first, stop)
                writer.end_round()
                written[name] |= new
                num_written += plan.num_rows_in(array, new)
                progress.advance(num_written, plan.num_rows_in(array, new), perf_counter_ns())
        if plan.layout.is_chunked and journal:
            journal.flushing()  # by closing the file
    if journal:
        journal.commit()
    context.barrier()  # where the root alone closed the file, other ranks would read too early
    return written


def _my_rounds(plan: WritePlan, array: Array, done: dict[int, int], context: Context) -> Iterator[tuple[int, int]]:
    """Blocks [first, stop) that this rank writes in each round: as many rounds on every rank, some without blocks."""
    todo = [block for block in range(plan.num_blocks_of(array)) if block not in done]
    max_blocks, world = plan.blocks_at_once(array), context.world
    shares = [todo[slice(*rank_span(len(todo), rank, world.size))] for rank in range(world.size)]
    runs = [_neighbours(share, max_blocks) for share in shares]
    for number in range(max(map(len, runs))):
        yield runs[world.rank][number] if number < len(runs[world.rank]) else (0, 0)


def _neighbours(blocks: list[int], max_blocks: int) -> list[tuple[int, int]]:
    """[first, stop) of neighbouring blocks, at most `max_blocks` together."""
    runs = []
    for _, group in groupby(enumerate(blocks), lambda pair: pair[1] - pair[0]):
        run = [block for _, block in group]
        for at in range(0, len(run), max_blocks):
            part = run[at : at + max_blocks]
            runs.append((part[0], part[-1] + 1))
    return runs


@dataclass
class _BlockWriter:
    """Writes blocks of all ranks, round by round, and notes them in the journal."""

    plan: WritePlan
    opened: OpenFile
    journal: Journal | None
    context: Context
    _num_rounds: int = field(default=0, init=False)

    def write(self, name: str, first: int, stop: int) -> dict[int, int]:
        """Collective. Writes this rank's blocks first to stop; returns the checksums of all ranks' blocks."""
        array, context = self.plan.source.arrays[name], self.context
        begin, end = self.plan.rows(array, first, stop)
        rows = np.ascontiguousarray(context.on_all(partial(array.read, begin, end)))
        try:
            if self.plan.layout.is_chunked and array.shape[0] and context.world.size > 1:
                dataset = self.opened.file and self.opened.file[name]
                _write_chunks(dataset, begin, _compress(self.plan, name, array, rows), context)
            elif self.opened.file:
                write_rows(self.opened.file[name], begin, rows, context)
            self.opened.require_written()
        except OSError as error:
            # A collective write raises HDF5's error without a number: its text has the system's words.
            number = error.errno or next((each for each in _DISK_FULL if os.strerror(each) in str(error)), None)
            if number not in _DISK_FULL:
                raise
            raise cannot_write(self.plan.output, number) from None
        written: dict[int, int] = {}
        for first_of_rank, checksums in context.all_gather((first, self.plan.checksums(array, rows))):
            written.update(enumerate(checksums, first_of_rank))
            if self.journal:
                self.journal.add(name, first_of_rank, checksums)
        return written

    def end_round(self) -> None:
        """On the root. Contiguous blocks are on disk once they are written; chunks once their index is flushed."""
        if not self.journal:
            return
        self._num_rounds += 1
        if not self.plan.layout.is_chunked:
            self.journal.commit()
        elif self.opened.file and self._num_rounds % _ROUNDS_PER_FLUSH == 0:
            self.journal.flushing()
            self.opened.file.flush()
            self.opened.require_written()
            self.journal.commit()


def write_rows(dataset: h5py.Dataset, begin: int, rows: np.ndarray, context: Context) -> None:
    """Collective. A rank with no rows takes part, too."""
    space, memory = select_rows(dataset, [(begin, len(rows))] if len(rows) else [])
    is_collective = context.comm is not None and dataset.chunks is None
    dataset.id.write(memory, space, rows, dxpl=transfer_properties(is_collective))


def _compress(plan: WritePlan, name: str, array: Array, rows: np.ndarray) -> list[tuple[int, bytes]]:
    """(mask of the filters that were skipped, bytes) of each chunk of `rows`: HDF5 compresses them in a memory file."""
    if not len(rows):
        return []
    chunk_rows = plan.layout.chunk_rows(array)
    with h5py.File("chunks", "w", driver="core", backing_store=False) as file:
        whole_chunks = Array((max(len(rows), chunk_rows), *array.shape[1:]), array.dtype, array.read)
        dataset = plan.layout.create(file, name, whole_chunks, chunk_rows)
        dataset[: len(rows)] = rows
        file.flush()
        within_row = (0,) * (rows.ndim - 1)
        return [dataset.id.read_direct_chunk((row, *within_row)) for row in range(0, len(rows), chunk_rows)]


def _write_chunks(dataset: h5py.Dataset | None, begin: int, chunks: list[tuple[int, bytes]], context: Context) -> None:
    """Collective. The root writes the chunks of each rank in turn, so that it holds those of one rank.

    Not by a collective write: HDF5 (1.10.8 with lzf, seen) forgets in it that a filter was skipped, as it is for a
    chunk that does not get smaller, and such chunks cannot be read.
    """
    world = context.world
    for rank in range(world.size):
        if rank == world.rank and not world.is_root:
            context.comm.send((begin, chunks), dest=0)
        elif dataset is not None:
            first_row, of_rank = context.comm.recv(source=rank) if rank else (begin, chunks)
            for index, (mask, data) in enumerate(of_rank):
                corner = (first_row + index * dataset.chunks[0],) + (0,) * (dataset.ndim - 1)
                dataset.id.write_direct_chunk(corner, data, mask)


def _hold_metadata_in_memory(file: h5py.File) -> None:
    """Makes HDF5 write the index of chunks in a flush alone, so that the file is intact at any other moment."""
    cache = file.id.get_mdc_config()
    cache.incr_mode = cache.flash_incr_mode = cache.decr_mode = 0
    cache.evictions_enabled = False
    file.id.set_mdc_config(cache)


# ---------------------------------------------------------------------------------------------- reading back


def intact(plan: WritePlan, expected: Blocks, context: Context) -> tuple[Blocks, int]:
    """Collective. (the blocks of `expected` whose bytes in the file have their checksum, how many have not).

    Every rank reads its share.
    """
    good: Blocks = {}
    num_bad = 0
    for name, array in plan.source.arrays.items():
        blocks = sorted(block for block in expected.get(name, {}) if block < plan.num_blocks_of(array))
        share = blocks[slice(*rank_span(len(blocks), context.world.rank, context.world.size))]
        mine = context.on_all(partial(_intact_blocks, plan, name, expected, share))
        good[name] = {block: expected[name][block] for of_rank in context.all_gather(mine) for block in of_rank}
        num_bad += len(blocks) - len(good[name])
    return good, num_bad


def _intact_blocks(plan: WritePlan, name: str, expected: Blocks, share: list[int]) -> list[int]:
    if not share:
        return []
    found = []
    try:
        with h5py.File(plan.partial_path, "r") as file:
            for block in share:
                begin, end = plan.rows(plan.source.arrays[name], block, block + 1)
                with suppress(OSError):  # a chunk whose own checksum is wrong
                    if zlib.crc32(file[name][begin:end]) == expected[name][block]:
                        found.append(block)
    except (OSError, KeyError, RuntimeError):
        return []
    return found


def verify(plan: WritePlan, written: Blocks, context: Context) -> None:
    """Collective. Reads the closed file back. Raises `UserError` if it is not as written."""
    good, num_bad = intact(plan, written, context)
    if num_bad:
        name = next(name for name in good if len(good[name]) < len(written[name]))
        block = min(set(written[name]) - set(good[name]))
        start, stop = plan.rows(plan.source.arrays[name], block, block + 1)
        raise UserError(
            f"{plan.partial_path}: rows {start} to {stop} of {name} do not read back as written",
            "The file system lost or changed data: prepare again, elsewhere if it happens twice.",
        )
