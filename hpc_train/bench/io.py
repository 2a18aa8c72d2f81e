"""How long ranks take to write, send and read the same bytes: raw, and by HDF5's layouts and ways of access.

The essay's storage model says that reading takes as long as writing and transferring together, T_r = T_w + T_c. What
stands for its letters here, each from a barrier to the moment when the last rank is done:
- T_w: the ranks open a new file, write their shares, close it, and call fsync.
- T_c: the same bytes go from memory to memory: each rank sends its share to the next one, by MPI. One rank copies its
  share. That is the essay's transfer: bytes on their way between processes, with no storage in it.
- T_r: the ranks open the file, read their shares into memory, and close it.
All go through the data in blocks of 8 MiB, so memory is bounded and a signal is heard within one.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import h5py
import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.filesystem import drop_pages, file_system, resident
from hpc_train.core.sampling import rank_span
from hpc_train.train.comm import messages
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mpi_library import mpi, parallel_file_options
from hpc_train.train.data.files import num_decode_threads
from hpc_train.train.data.parallel_hdf5 import require_parallel_hdf5, select_rows, transfer_properties
from hpc_train.train.data.readers import open_reader

_ROW_BYTES, _CHUNK_ROWS, _BLOCK_CHUNKS = 1 << 16, 16, 8
CHUNK_BYTES = _ROW_BYTES * _CHUNK_ROWS
_GZIP = {"compression": "gzip", "compression_opts": 1}
_REMOVER = """
import os, shutil, sys, time
sys.stdin.read()  # until its other end is gone
for _ in range(100):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    if not os.path.exists(sys.argv[1]):
        break
    time.sleep(0.1)  # a rank that is still there has made a file meanwhile
"""
_LAYOUTS: dict[str, dict[str, object]] = {"contiguous": {}, "chunked": {}, "gzip": _GZIP}
_READER_BYTES = 64 << 20  # of decoded chunks
_HELD = 0.05  # a file of which the page cache holds more is warm


@dataclass(frozen=True)
class Share:
    """What a rank writes and reads of the file at `path`: chunks of 1 MiB, `start` to `stop` of `total`."""

    path: Path
    context: Context
    start: int
    stop: int
    total: int
    data: np.ndarray  # of one block, (rows, row bytes): every block has these values
    buffer: np.ndarray  # alike; what is read and received

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first row, number of rows): equally often on every rank, with no rows if need be."""
        longest = rank_span(self.total, 0, self.context.world.size)[1]
        for offset in range(0, longest, _BLOCK_CHUNKS):
            first = min(self.start + offset, self.stop)
            yield first * _CHUNK_ROWS, (min(first + _BLOCK_CHUNKS, self.stop) - first) * _CHUNK_ROWS


Act = Callable[[Share, bool], None]  # the bool: collectively


@dataclass(frozen=True)
class Way:
    """A file and the ways it is read. written: how, "independent" or "collective"."""

    layout: str
    written: str
    write: Act
    reads: tuple[tuple[str, Act], ...]  # how, and what does it


@dataclass
class Row:
    """Seconds of each repetition; `is_cold`: whether the file had left the page cache before every read."""

    layout: str
    mode: str
    written: str
    ranks: int
    is_cold: bool = True
    write_s: list[float] = field(default_factory=list)
    transfer_s: list[float] = field(default_factory=list)
    read_s: list[float] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------- raw bytes


def _posix_write(share: Share, together: bool) -> None:
    number = os.open(share.path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for first, num in share.blocks():
            done = os.pwrite(number, share.data[:num].reshape(-1).data, first * _ROW_BYTES)
            assert done == num * _ROW_BYTES, "a short write"
    finally:
        os.close(number)


def _posix_read(share: Share, together: bool) -> None:
    number = os.open(share.path, os.O_RDONLY)
    try:
        for first, num in share.blocks():
            done = os.preadv(number, [share.buffer[:num].reshape(-1).data], first * _ROW_BYTES) if num else 0
            assert done == num * _ROW_BYTES, "a short read"
    finally:
        os.close(number)


def _mpi_write(share: Share, together: bool) -> None:
    access = mpi().MODE_CREATE | mpi().MODE_WRONLY
    file = mpi().File.Open(share.context.comm, str(share.path), access)
    write = file.Write_at_all if together else file.Write_at
    for first, num in share.blocks():
        write(first * _ROW_BYTES, share.data[:num])
    file.Close()


def _mpi_read(share: Share, together: bool) -> None:
    file = mpi().File.Open(share.context.comm, str(share.path), mpi().MODE_RDONLY)
    read = file.Read_at_all if together else file.Read_at
    for first, num in share.blocks():
        read(first * _ROW_BYTES, share.buffer[:num])
    file.Close()


# ------------------------------------------------------------------------------------------------- HDF5


def _hdf5_write(layout: str, share: Share, together: bool) -> None:
    shape = (share.total * _CHUNK_ROWS, _ROW_BYTES)
    chunks = None if layout == "contiguous" else (_CHUNK_ROWS, _ROW_BYTES)
    with h5py.File(share.path, "w", **parallel_file_options(share.context)) as file:
        dataset = file.create_dataset("x", shape, np.uint8, chunks=chunks, **_LAYOUTS[layout])
        for first, num in share.blocks():
            space, memory = select_rows(dataset, [(first, num)] if num else [])
            dataset.id.write(memory, space, share.data, dxpl=transfer_properties(together))


def _hdf5_read(share: Share, together: bool) -> None:
    with h5py.File(share.path, "r", **parallel_file_options(share.context)) as file:
        dataset = file["x"]
        for first, num in share.blocks():
            space, memory = select_rows(dataset, [(first, num)] if num else [])
            dataset.id.read(memory, space, share.buffer, dxpl=transfer_properties(together))


def _our_read(share: Share, together: bool) -> None:
    """As training reads: from a memory map, or chunks decoded by threads."""
    with h5py.File(share.path, "r") as file:
        reader = open_reader(share.path, file["x"], _READER_BYTES, num_decode_threads(share.context))
        blocks = [np.arange(first, first + num) for first, num in share.blocks()]
        for rows, coming in zip(blocks, [*blocks[1:], blocks[-1]], strict=True):
            reader.prefetch(coming)
            reader.take(rows, share.buffer[: len(rows)])
        reader.close()


WAYS = (
    Way("raw POSIX", "independent", _posix_write, (("independent", _posix_read),)),
    Way("raw MPI-IO", "independent", _mpi_write, (("independent", _mpi_read),)),
    Way("raw MPI-IO", "collective", _mpi_write, (("collective", _mpi_read),)),
    *(
        Way(layout, how, partial(_hdf5_write, layout), reads)
        for layout, how, reads in (
            ("contiguous", "independent", (("independent", _hdf5_read),)),
            ("contiguous", "collective", (("collective", _hdf5_read), ("memory map", _our_read))),
            ("chunked", "independent", (("independent", _hdf5_read),)),
            ("chunked", "collective", (("collective", _hdf5_read), ("direct chunks", _our_read))),
            # Packed chunks can only be written collectively.
            (
                "gzip",
                "collective",
                (("independent", _hdf5_read), ("collective", _hdf5_read), ("direct chunks", _our_read)),
            ),
        )
    ),
)


# ------------------------------------------------------------------------------------------------- measuring


def measure(
    folder: Path,
    size_mb: int,
    repeat: int,
    context: Context,
    say: Callable[[str], None],
    ways: tuple[Way, ...] = WAYS,
    counts: Sequence[int] = (),
) -> list[Row]:
    """Collective. A row for each way of reading, on `counts` ranks (1, 2, 4, ... and all); complete on the root.

    Ways are interleaved: each repetition goes through all of them. One more, the first, is not counted: in it, what is
    read is compared with what was written. Files lie in `folder`, one at a time, and are gone at the end, an interrupt
    included. Raises `UserError`.
    """
    context.on_all(require_parallel_hdf5)
    rows: dict[tuple[str, str, int], Row] = {}
    counts = counts or sorted({1 << bit for bit in range(context.world.size.bit_length())} | {context.world.size})
    with ExitStack() as stack, _scratch(folder, size_mb, context) as place:
        teams = {count: stack.enter_context(_team(count, context)) for count in counts}
        block = _block()
        for number in range(repeat + 1):
            context.on_root(partial(say, _progress(number, repeat)))
            for count, team in teams.items():
                if context.world.rank < count:
                    start, stop = rank_span(size_mb, team.world.rank, count)
                    share = Share(place / f"{number}-{count}", team, start, stop, size_mb, block, np.empty_like(block))
                    _round(share, rows, ways[:: -1 if number % 2 else 1], is_counted=number > 0)
                context.idle_barrier()
    order = [(way.layout, mode) for way in ways for mode, _ in way.reads]
    return sorted(rows.values(), key=lambda row: (row.ranks, order.index((row.layout, row.mode))))


def _progress(number: int, repeat: int) -> str:
    return f"repetition {number} of {repeat}" if number else "trying every way once"


@contextmanager
def _team(count: int, context: Context) -> Iterator[Context]:
    """Collective. The first `count` ranks as a context; of the others, the rest."""
    with context.split(int(context.world.rank >= count)) as team:
        yield replace(team, world=replace(team.world, local_size=min(count, context.world.local_size)))


@contextmanager
def _scratch(folder: Path, size_mb: int, context: Context) -> Iterator[Path]:
    """Collective. A new folder in `folder`, removed at the end by every rank: an interrupt may reach one alone."""
    place = context.on_root(lambda: _new_folder(folder, size_mb))
    try:
        with _removed_at_last(place) if context.world.is_root else nullcontext():
            context.on_all(lambda: _require_shared(place))
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _removed_at_last(place: Path) -> Iterator[None]:
    """A process removes `place` when this one has ended, however: after Ctrl-C mpirun kills ranks that do not come back
    from a call of C within a second."""
    silent = subprocess.DEVNULL
    with subprocess.Popen(
        [sys.executable, "-S", "-c", _REMOVER, place],
        stdin=subprocess.PIPE,
        stdout=silent,
        stderr=silent,
        start_new_session=True,  # signals to the job are not for it
    ):
        yield


def _new_folder(folder: Path, size_mb: int) -> Path:
    try:
        free = shutil.disk_usage(folder).free
        if free < size_mb * CHUNK_BYTES * 1.1:
            raise UserError(
                f"--size-mb {size_mb}: {folder} has {free >> 20:,} MB left", "Name a smaller size, or another --dir."
            )
        return Path(tempfile.mkdtemp(prefix="hpc-train-bench-", dir=folder))
    except OSError as error:
        raise UserError(
            f"--dir {folder} cannot be written: {error.strerror}", "Name a folder that you may write."
        ) from None


def _require_shared(place: Path) -> None:
    if not place.is_dir():
        raise UserError(f"--dir {place.parent} is not seen by all nodes", "Name a folder on a shared file system.")


def _block() -> np.ndarray:
    """Bytes of which gzip leaves about half, as of many pictures."""
    return np.random.default_rng(0).integers(0, 16, (_BLOCK_CHUNKS * _CHUNK_ROWS, _ROW_BYTES), np.uint8)


def _round(share: Share, rows: dict[tuple[str, str, int], Row], ways: tuple[Way, ...], is_counted: bool) -> None:
    """Collective. Every way once, on the ranks of `share`."""
    transfer_s = _timed(share.context, partial(_transfer, share))
    stem = share.path
    for number, way in enumerate(ways):
        # A name of its own: on GlusterFS (seen) a node still opens the file that another has removed a moment ago.
        share = replace(share, path=stem.with_name(f"{stem.name}-{number}.h5"))
        write_s = _timed(share.context, partial(_write_through, way, share))
        for mode, act in way.reads:
            is_cold = _drop(share)
            if not is_counted:
                share.buffer.fill(0xFF)  # a value that is not in the data
            read_s = _timed(share.context, partial(act, share, mode == "collective"))
            if not is_counted:
                _compare(share, way, mode)
                continue
            ranks = share.context.world.size
            row = rows.setdefault((way.layout, mode, ranks), Row(way.layout, mode, way.written, ranks))
            row.is_cold &= is_cold
            for seconds, found in ((row.write_s, write_s), (row.transfer_s, transfer_s), (row.read_s, read_s)):
                seconds.append(found)
        share.context.on_root(share.path.unlink)


def _timed(context: Context, act: Callable[[], None]) -> float:
    """Collective. Seconds until the last rank was done."""
    context.barrier()
    began = perf_counter()
    act()
    return float(context.max(np.array([perf_counter() - began]))[0])


def _write_through(way: Way, share: Share) -> None:
    way.write(share, way.written == "collective")
    with share.path.open("rb") as file:
        os.fsync(file.fileno())


def _transfer(share: Share) -> None:
    comm, world = share.context.comm, share.context.world
    following, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    for _, num in share.blocks():
        if world.size == 1:
            np.copyto(share.buffer[:num], share.data[:num])
        else:
            messages.send_and_receive(comm, share.data[:num], following, share.buffer, before)


def _drop(share: Share) -> bool:
    """Collective. Asks the system to forget the file's pages; whether it did, on every node."""
    share.context.barrier()
    drop_pages(share.path)
    share.context.barrier()
    held = resident(share.path)  # None: nobody tells, and it is not called cold
    return not share.context.max(np.array([held is None or held > _HELD]))[0]


def _compare(share: Share, way: Way, mode: str) -> None:
    """The last block that was read is the data that was written."""
    *_, (_, num) = [block for block in share.blocks() if block[1]] or [(0, 0)]
    if not np.array_equal(share.buffer[:num], share.data[:num]):
        raise UserError(
            f"{share.path}: {way.layout}, {mode}: what is read differs from what was written",
            "The file system lost or changed data: name another --dir.",
        )


def place_of(folder: Path) -> str:
    """The file system of `folder`."""
    return file_system(folder)
