"""Writing a source's rows to HDF5 in blocks: collectively, in bounded memory, and so that a kill loses little."""

import errno
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count, groupby
from pathlib import Path
from time import perf_counter_ns

import h5py
import numpy as np

from hpc_train.core import owned_files
from hpc_train.core.errors import UserError
from hpc_train.core.progress import StepProgress
from hpc_train.core.sampling import rank_span
from hpc_train.datasets.prepare.disk import Disk, no_room
from hpc_train.datasets.prepare.journal import Blocks, Journal
from hpc_train.datasets.prepare.layout import BLOCK_BYTES, FORM, Layout, empty_file, row_bytes
from hpc_train.datasets.prepare.sources import Array, Source
from hpc_train.train.comm.context import Context, raised_on_all_ranks
from hpc_train.train.comm.mpi_library import parallel_file_options
from hpc_train.train.data.files import select_rows, transfer_properties

_WRITE_BYTES = 32 << 20  # at once by a rank, where memory allows
_SHARE_OF_MEMORY = 8  # what is written may be there as read, as rows, as sent between ranks and as compressed
_ROUNDS_BETWEEN_FLUSHES = 8
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Work:
    """What is written where, and how much at once: `memory_bytes` is for all that a rank has in memory of it."""

    source: Source
    output: Path
    layout: Layout
    memory_bytes: int

    @property
    def path(self) -> Path:
        """Its name until it is whole."""
        return self.output.with_name(f".{self.output.name}.partial")

    def num_blocks(self, array: Array) -> int:
        return -(-array.shape[0] // self.layout.block_rows(array))

    def blocks_at_once(self, array: Array) -> int:
        """Blocks that a rank writes together. Raises `UserError` where not even one block fits."""
        block = self.layout.block_rows(array) * row_bytes(array)
        room = min(_WRITE_BYTES, self.memory_bytes // _SHARE_OF_MEMORY)
        if block > max(room, BLOCK_BYTES):
            if block * _SHARE_OF_MEMORY > self.memory_bytes:
                need = -(-block * _SHARE_OF_MEMORY // 1_000_000)
                raise UserError(
                    f"--memory-mb: one row has {row_bytes(array) / 1e6:,.0f} MB, too much for the memory of a rank",
                    f"Set it to {need} times the ranks of a node, or more.",
                )
            return 1
        return max(1, room // block)

    def rows(self, array: Array, first: int, stop: int) -> tuple[int, int]:
        """The rows of blocks first to stop."""
        size = self.layout.block_rows(array)
        return min(first * size, array.shape[0]), min(stop * size, array.shape[0])

    def checksums(self, array: Array, rows: np.ndarray) -> list[int]:
        """CRC-32 of each block of `rows`, which begin with a block."""
        size = self.layout.block_rows(array)
        return [zlib.crc32(rows[at : at + size].data) for at in range(0, len(rows), size)]


def create(work: Work, context: Context) -> None:
    """Collective. The file with its data sets and none of their rows, made by the root: it is the same on any number
    of ranks.
    """
    context.on_root(lambda: _create(work))


def _create(work: Work) -> None:
    try:
        with owned_files.created(work.path) as empty:
            empty.write(empty_file())
    except OSError as error:
        raise no_room(work.output, error.errno) from None
    with opened_alone(work) as opened:
        assert opened.file is not None
        opened.file.attrs["complete"] = False
        for name, array in work.source.arrays.items():
            dataset = work.layout.create(opened.file, name, array)
            if name.endswith("inputs") and array.dtype == np.uint8 and len(array.shape) > 1:  # not tokens
                # CF conventions: 0 to 1
                dataset.attrs["scale_factor"], dataset.attrs["add_offset"] = (1 / 255, 0.0)
    if not work.layout.chunked:
        reserve(work, num_bytes(work))


def num_bytes(work: Work) -> int:
    return sum(array.shape[0] * row_bytes(array) for array in work.source.arrays.values())


def reserve(work: Work, num_bytes: int) -> None:
    """Takes the room on disk for the first `num_bytes` of the file. Raises `UserError`: now, and not half-way."""
    try:
        with owned_files.opened(work.path, "r+b") as file:
            if num_bytes > shutil.disk_usage(work.path.parent).free:  # what cannot be reserved would be written full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))
    except OSError as error:
        raise no_room(work.output, error.errno) from None


def write(work: Work, done: Blocks, journal: Journal | None, context: Context) -> Blocks:
    """Collective. Writes all blocks but those `done`; returns the checksums of all blocks, on every rank.

    journal: on the root, and None elsewhere.
    """
    arrays = work.source.arrays
    written = {name: dict(done.get(name, {})) for name in arrays}
    num_rows = sum(array.shape[0] for array in arrays.values())
    before = sum(_rows_done(work, array, written[name]) for name, array in arrays.items())
    label = f"writing {work.output.name}"
    shown = StepProgress(label, num_rows, "auto", context.world.is_root, unit=work.source.unit)
    shown.begin(before)
    rounds = count(1)
    with closing(shown) as progress, _file_of_all(work, context) as opened:
        if work.layout.chunked and opened.file:
            _hold_bookkeeping(opened.file)
        for name, array in arrays.items():
            for mine in _rounds(work, array, written[name], context):
                for rank_first, checksums in _round(work, opened, name, array, mine, context):
                    written[name].update(enumerate(checksums, rank_first))
                    if journal:
                        journal.add(name, rank_first, checksums)
                if not work.layout.chunked:
                    if journal:
                        journal.commit()
                elif next(rounds) % _ROUNDS_BETWEEN_FLUSHES == 0:
                    _flush(opened, journal)
                now = sum(_rows_done(work, a, written[n]) for n, a in arrays.items() if written[n])
                progress.advance(now, now - before, perf_counter_ns())
                before = now
        if work.layout.chunked and journal:
            journal.flushing()  # by closing
    if journal:
        journal.commit()
    context.barrier()  # where the root alone closed it, others would read too early
    return written


def _rows_done(work: Work, array: Array, blocks: dict[int, int]) -> int:
    return min(len(blocks) * work.layout.block_rows(array), array.shape[0])


def _rounds(work: Work, array: Array, done: dict[int, int], context: Context) -> Iterator[tuple[int, int]]:
    """Blocks [first, stop) that this rank writes next: as many rounds on every rank, with no blocks if need be."""
    todo = [block for block in range(work.num_blocks(array)) if block not in done]
    most, world = work.blocks_at_once(array), context.world
    shares = [_runs(todo[slice(*rank_span(len(todo), rank, world.size))], most) for rank in range(world.size)]
    for at in range(max(map(len, shares))):
        yield shares[world.rank][at] if at < len(shares[world.rank]) else (0, 0)


def _runs(blocks: list[int], most: int) -> list[tuple[int, int]]:
    """Neighbouring blocks together, at most `most` of them."""
    runs = [[block for _, block in group] for _, group in groupby(enumerate(blocks), lambda pair: pair[1] - pair[0])]
    return [(run[at], run[at] + len(run[at : at + most])) for run in runs for at in range(0, len(run), most)]


def _round(
    work: Work, opened: "Opened", name: str, array: Array, mine: tuple[int, int], context: Context
) -> list[tuple[int, list[int]]]:
    """Collective. Each rank writes its blocks; what was written, of all ranks."""
    dataset = opened.file and opened.file[name]
    begin, end = work.rows(array, *mine)
    rows = np.ascontiguousarray(context.on_all(partial(array.read, begin, end)))
    try:
        if work.layout.chunked and array.shape[0] and context.world.size > 1:
            _write_chunks(dataset, begin, _compressed(work, name, array, rows), context)
        else:
            write_rows(dataset, begin, rows, context)
        opened.require_written()
    except OSError as error:
        number = error.errno or next((number for number in _NO_ROOM if os.strerror(number) in str(error)), None)
        if number not in _NO_ROOM:
            raise
        raise no_room(work.output, number) from None
    return context.all_gather((mine[0], work.checksums(array, rows)))


def _compressed(work: Work, name: str, array: Array, rows: np.ndarray) -> list[tuple[int, bytes]]:
    """Each chunk of `rows` as HDF5's filters leave it, in a file in memory: (mask of the filters left out, bytes)."""
    if not len(rows):
        return []
    each = work.layout.chunk_rows(array)
    with h5py.File("chunks", "w", driver="core", backing_store=False) as file:
        like = Array((max(len(rows), each), *array.shape[1:]), array.dtype, array.read)
        dataset = work.layout.create(file, name, like, each)
        dataset[: len(rows)] = rows
        places = [(at,) + (0,) * (rows.ndim - 1) for at in range(0, len(rows), each)]
        file.flush()
        return [dataset.id.read_direct_chunk(place) for place in places]


def _write_chunks(dataset: h5py.Dataset | None, begin: int, chunks: list[tuple[int, bytes]], context: Context) -> None:
    """Collective. All ranks have compressed; the root writes for each in turn, so that it holds one rank's chunks.

    Not by a collective write: HDF5 (1.10.8 with lzf, seen) forgets there that a filter was left out, as it is for
    a chunk that does not get smaller, and such chunks cannot be read.
    """
    world = context.world
    for rank in range(world.size):
        if rank == world.rank and not world.is_root:
            context.comm.send((begin, chunks), dest=0)
        elif dataset is not None:
            first, theirs = context.comm.recv(source=rank) if rank else (begin, chunks)
            for index, (mask, data) in enumerate(theirs):
                place = (first + index * dataset.chunks[0],) + (0,) * (dataset.ndim - 1)
                dataset.id.write_direct_chunk(place, data, mask)


def write_rows(dataset: h5py.Dataset, begin: int, rows: np.ndarray, context: Context) -> None:
    """Collective. A rank with no rows takes part, too."""
    space, memory = select_rows(dataset, [(begin, len(rows))] if len(rows) else [])
    together = context.comm is not None and dataset.chunks is None
    dataset.id.write(memory, space, rows, dxpl=transfer_properties(together))


def _flush(opened: "Opened", journal: Journal | None) -> None:
    """On the root; nothing elsewhere. What was written until now outlives a kill."""
    if opened.file and journal:
        journal.flushing()
        opened.file.flush()
        opened.require_written()
        journal.commit()


def _hold_bookkeeping(file: h5py.File) -> None:
    """The index of the chunks goes to disk in a flush alone, so that the file is whole at any other moment."""
    cache = file.id.get_mdc_config()
    cache.incr_mode = cache.flash_incr_mode = cache.decr_mode = 0
    cache.evictions_enabled = False
    file.id.set_mdc_config(cache)


@dataclass(frozen=True)
class Opened:
    """An HDF5 file that is being written: `file` is None where the root writes it for all; `disk` where one does."""

    file: h5py.File | None
    disk: Disk | None = None

    def require_written(self) -> None:
        """Raises the `OSError` of a write that HDF5 has not heard of."""
        if self.disk:
            self.disk.require()


@contextmanager
def _file_of_all(work: Work, context: Context) -> Iterator[Opened]:
    """Collective. A file that all ranks write together, closed by all of them; one of chunks is the root's alone.

    Closing is collective: a rank that fails alone must not wait for the others in there, but go and end the job.
    """
    if work.layout.chunked and not context.world.is_root:
        yield Opened(None)
        return
    if work.layout.chunked or context.comm is None:
        with opened_alone(work) as opened:
            yield opened
        return
    file = h5py.File(work.path, "r+", **FORM, **parallel_file_options(context))
    try:
        yield Opened(file)
    except BaseException as error:
        if raised_on_all_ranks(error):
            with suppress(OSError, RuntimeError):  # on a full disk closing fails, too: the first error tells why
                file.close()
        raise
    file.close()


@contextmanager
def opened_alone(work: Work) -> Iterator[Opened]:
    """The file, written by this rank alone. Raises `UserError` where the system did not write all, at the latest here.

    HDF5 then has closed a file of which a part is missing: it must not be used.
    """
    disk = Disk(work.path)
    try:
        with h5py.File(disk, "r+", **FORM) as file:
            yield Opened(file, disk)
    finally:
        disk.close()
        if disk.error:
            raise no_room(work.output, disk.error.errno) from None


def sound(work: Work, told: Blocks, context: Context) -> tuple[Blocks, int]:
    """Collective. (those of the blocks that the journal `told` whose bytes in the file are right, how many are not).

    Every rank reads its share.
    """
    good: Blocks = {}
    num_bad = 0
    for name, array in work.source.arrays.items():
        blocks = sorted(block for block in told.get(name, {}) if block < work.num_blocks(array))
        share = blocks[slice(*rank_span(len(blocks), context.world.rank, context.world.size))]
        right = context.on_all(partial(_right_blocks, work, name, array, told, share))
        good[name] = {block: told[name][block] for each in context.all_gather(right) for block in each}
        num_bad += len(blocks) - len(good[name])
    return good, num_bad


def _right_blocks(work: Work, name: str, array: Array, told: Blocks, share: list[int]) -> list[int]:
    if not share:
        return []
    right = []
    try:
        with h5py.File(work.path, "r") as file:
            for block in share:
                begin, end = work.rows(array, block, block + 1)
                with suppress(OSError):  # a chunk whose own checksum is wrong
                    if zlib.crc32(file[name][begin:end]) == told[name][block]:
                        right.append(block)
    except (OSError, KeyError, RuntimeError):
        return []
    return right


def verify(work: Work, written: Blocks, context: Context) -> None:
    """Collective. Every rank reads its share of the closed file back. Raises `UserError` where it is not as written."""
    good, num_bad = sound(work, written, context)
    if num_bad:
        name = next(name for name in good if len(good[name]) < len(written[name]))
        block = min(set(written[name]) - set(good[name]))
        start, stop = work.rows(work.source.arrays[name], block, block + 1)
        raise UserError(
            f"{work.path}: rows {start} to {stop} of {name} do not read back as written",
            "The file system lost or changed data: prepare again, elsewhere if it happens twice.",
        )
