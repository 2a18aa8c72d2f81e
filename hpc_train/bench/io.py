"""How long ranks take to write, send and read the same bytes, raw and in HDF5's layouts.

The storage model T_r = T_w + T_c says that reading takes as long as writing and transferring. Each term is measured
from a barrier until the slowest rank is done:
- T_w: the ranks open a new file, write their shares, close it, and call fsync.
- T_c: each rank sends its share to the next one through MPI, memory to memory; a single rank copies its share.
- T_r: the ranks open the file, read their shares into memory, and close it.
All process the data in blocks of 8 MiB, so that memory is bounded and a signal is handled after one block.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

from hpc_train.bench.file_layouts import BLOCK_CHUNKS, CHUNK_BYTES, CHUNK_ROWS, LAYOUTS, ROW_BYTES, Layout, Share
from hpc_train.bench.io_model import Row
from hpc_train.core.errors import UserError
from hpc_train.core.filesystem import drop_pages, resident
from hpc_train.core.sampling import rank_span
from hpc_train.train.comm import messages
from hpc_train.train.comm.context import Context
from hpc_train.train.data.parallel_hdf5 import require_parallel_hdf5

_REMOVER = """
import os, shutil, sys, time
sys.stdin.read()  # returns when the other process has ended
for _ in range(100):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    if not os.path.exists(sys.argv[1]):
        break
    time.sleep(0.1)  # a rank that is still alive may have created a file
"""
_WARM = 0.05  # fraction in the page cache from which a file counts as warm


def measure(
    folder: Path,
    size_mb: int,
    repeat: int,
    context: Context,
    say: Callable[[str], None],
    layouts: tuple[Layout, ...] = LAYOUTS,
    counts: Sequence[int] = (),
) -> list[Row]:
    """Collective. A row for each mode of reading, on `counts` ranks (1, 2, 4, ... and all); complete on the root.

    Each repetition measures all layouts in turn. The first one is not counted: it compares the data read with the data
    written. `folder` contains one file at a time, and none at the end, even after an interrupt. Raises `UserError`.
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
                    _round(share, rows, layouts[:: -1 if number % 2 else 1], is_counted=number > 0)
                context.idle_barrier()
    order = [(layout.name, mode) for layout in layouts for mode, _ in layout.reads]
    return sorted(rows.values(), key=lambda row: (row.ranks, order.index((row.layout, row.mode))))


def _progress(number: int, repeat: int) -> str:
    return f"repetition {number} of {repeat}" if number else "trying every layout once"


@contextmanager
def _team(count: int, context: Context) -> Iterator[Context]:
    """Collective. The first `count` ranks as a context; of the others, the rest."""
    with context.split(int(context.world.rank >= count)) as team:
        yield replace(team, world=replace(team.world, local_size=min(count, context.world.local_size)))


@contextmanager
def _scratch(folder: Path, size_mb: int, context: Context) -> Iterator[Path]:
    """Collective. A new folder in `folder`. Every rank removes it at the end: an interrupt may reach only one."""
    place = context.on_root(lambda: _new_folder(folder, size_mb))
    try:
        with _removed_at_exit(place) if context.world.is_root else nullcontext():
            context.on_all(lambda: _require_shared(place))
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _removed_at_exit(place: Path) -> Iterator[None]:
    """A second process removes `place` when this one has ended in whatever way.

    After Ctrl-C, mpirun kills ranks that do not return from a call into C within a second.
    """
    silent = subprocess.DEVNULL
    with subprocess.Popen(
        [sys.executable, "-S", "-c", _REMOVER, place],
        stdin=subprocess.PIPE,
        stdout=silent,
        stderr=silent,
        start_new_session=True,  # signals to the job do not reach it
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
        raise UserError(f"--dir {place.parent} is not visible on all nodes", "Name a folder on a shared file system.")


def _block() -> np.ndarray:
    """Data that gzip compresses to about half, as many images."""
    return np.random.default_rng(0).integers(0, 16, (BLOCK_CHUNKS * CHUNK_ROWS, ROW_BYTES), np.uint8)


def _round(share: Share, rows: dict[tuple[str, str, int], Row], layouts: tuple[Layout, ...], is_counted: bool) -> None:
    """Collective. Every layout once, on the ranks of `share`."""
    transfer_s = _timed(share.context, partial(_transfer, share))
    stem = share.path
    for number, layout in enumerate(layouts):
        # A new name: on GlusterFS a node was seen to open a file that another node had just removed.
        share = replace(share, path=stem.with_name(f"{stem.name}-{number}.h5"))
        write_s = _timed(share.context, partial(_write_through, layout, share))
        for mode, act in layout.reads:
            is_cold = _drop(share)
            if not is_counted:
                share.buffer.fill(0xFF)  # not a value of the data
            read_s = _timed(share.context, partial(act, share, mode == "collective"))
            if not is_counted:
                _compare(share, layout.name, mode)
                continue
            ranks = share.context.world.size
            row = rows.setdefault((layout.name, mode, ranks), Row(layout.name, mode, layout.written, ranks))
            row.is_cold &= is_cold
            row.write_s.append(write_s)
            row.transfer_s.append(transfer_s)
            row.read_s.append(read_s)
        share.context.on_root(share.path.unlink)


def _timed(context: Context, act: Callable[[], None]) -> float:
    """Collective. Seconds until the slowest rank is done."""
    context.barrier()
    began = perf_counter()
    act()
    return float(context.max(np.array([perf_counter() - began]))[0])


def _write_through(layout: Layout, share: Share) -> None:
    layout.write(share, layout.written == "collective")
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
    """Collective. Drops the file from the page cache. Returns whether that succeeded on every node."""
    share.context.barrier()
    drop_pages(share.path)
    share.context.barrier()
    held = resident(share.path)  # None: unknown, which does not count as cold
    return not share.context.max(np.array([held is None or held > _WARM]))[0]


def _compare(share: Share, layout: str, mode: str) -> None:
    """Raises `UserError` if the last block that was read differs from the data written."""
    *_, (_, num) = [block for block in share.blocks() if block[1]] or [(0, 0)]
    if not np.array_equal(share.buffer[:num], share.data[:num]):
        raise UserError(
            f"{share.path}: {layout}, {mode}: data read differ from data written",
            "The file system lost or changed data: name another --dir.",
        )
