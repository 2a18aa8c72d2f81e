"""The file layouts that `bench io` compares, and the functions that write and read them."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from hpc_train.core.sampling import rank_span
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mpi_library import mpi, parallel_file_options
from hpc_train.train.data.files import num_decode_threads
from hpc_train.train.data.parallel_hdf5 import select_rows, transfer_properties
from hpc_train.train.data.readers import open_reader

ROW_BYTES, CHUNK_ROWS, BLOCK_CHUNKS = 1 << 16, 16, 8
CHUNK_BYTES = ROW_BYTES * CHUNK_ROWS
_GZIP = {"compression": "gzip", "compression_opts": 1}
_DATASET_OPTIONS: dict[str, dict[str, object]] = {"contiguous": {}, "chunked": {}, "gzip": _GZIP}
_READER_BYTES = 64 << 20  # of decoded chunks


@dataclass(frozen=True)
class Share:
    """The part of the file at `path` that a rank writes and reads: chunks of 1 MiB, `start` to `stop` of `total`."""

    path: Path
    context: Context
    start: int
    stop: int
    total: int
    data: np.ndarray  # one block, (rows, row bytes); all blocks have these values
    buffer: np.ndarray  # the same shape, for data read and received

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first row, number of rows), equally many on every rank because of collective I/O; some may have no rows."""
        longest = rank_span(self.total, 0, self.context.world.size)[1]
        for offset in range(0, longest, BLOCK_CHUNKS):
            first = min(self.start + offset, self.stop)
            yield first * CHUNK_ROWS, (min(first + BLOCK_CHUNKS, self.stop) - first) * CHUNK_ROWS


Access = Callable[[Share, bool], None]  # writes or reads the share; the bool: collective I/O


@dataclass(frozen=True)
class Layout:
    """A file layout. written: "independent" or "collective" I/O; reads: (mode, function) pairs."""

    name: str
    written: str
    write: Access
    reads: tuple[tuple[str, Access], ...]


# ------------------------------------------------------------------------------------------------- raw bytes


def _posix_write(share: Share, collective: bool) -> None:
    number = os.open(share.path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for first, num in share.blocks():
            done = os.pwrite(number, share.data[:num].reshape(-1).data, first * ROW_BYTES)
            assert done == num * ROW_BYTES, "a short write"
    finally:
        os.close(number)


def _posix_read(share: Share, collective: bool) -> None:
    number = os.open(share.path, os.O_RDONLY)
    try:
        for first, num in share.blocks():
            done = os.preadv(number, [share.buffer[:num].reshape(-1).data], first * ROW_BYTES) if num else 0
            assert done == num * ROW_BYTES, "a short read"
    finally:
        os.close(number)


def _mpi_write(share: Share, collective: bool) -> None:
    access = mpi().MODE_CREATE | mpi().MODE_WRONLY
    file = mpi().File.Open(share.context.comm, str(share.path), access)
    write = file.Write_at_all if collective else file.Write_at
    for first, num in share.blocks():
        write(first * ROW_BYTES, share.data[:num])
    file.Close()


def _mpi_read(share: Share, collective: bool) -> None:
    file = mpi().File.Open(share.context.comm, str(share.path), mpi().MODE_RDONLY)
    read = file.Read_at_all if collective else file.Read_at
    for first, num in share.blocks():
        read(first * ROW_BYTES, share.buffer[:num])
    file.Close()


# ------------------------------------------------------------------------------------------------- HDF5


def _hdf5_write(layout: str, share: Share, collective: bool) -> None:
    shape = (share.total * CHUNK_ROWS, ROW_BYTES)
    chunks = None if layout == "contiguous" else (CHUNK_ROWS, ROW_BYTES)
    with h5py.File(share.path, "w", **parallel_file_options(share.context)) as file:
        dataset = file.create_dataset("x", shape, np.uint8, chunks=chunks, **_DATASET_OPTIONS[layout])
        for first, num in share.blocks():
            space, memory = select_rows(dataset, [(first, num)] if num else [])
            dataset.id.write(memory, space, share.data, dxpl=transfer_properties(collective))


def _hdf5_read(share: Share, collective: bool) -> None:
    with h5py.File(share.path, "r", **parallel_file_options(share.context)) as file:
        dataset = file["x"]
        for first, num in share.blocks():
            space, memory = select_rows(dataset, [(first, num)] if num else [])
            dataset.id.read(memory, space, share.buffer, dxpl=transfer_properties(collective))


def _read_as_training(share: Share, collective: bool) -> None:
    """As training reads: from a memory map, or with chunks decoded by threads."""
    with h5py.File(share.path, "r") as file:
        reader = open_reader(share.path, file["x"], _READER_BYTES, num_decode_threads(share.context))
        blocks = [np.arange(first, first + num) for first, num in share.blocks()]
        for rows, coming in zip(blocks, [*blocks[1:], blocks[-1]], strict=True):
            reader.prefetch(coming)
            reader.take(rows, share.buffer[: len(rows)])
        reader.close()


_INDEPENDENT = ("independent", _hdf5_read)
_COLLECTIVE = ("collective", _hdf5_read)
_DIRECT = ("direct chunks", _read_as_training)

LAYOUTS = (
    Layout("raw POSIX", "independent", _posix_write, (("independent", _posix_read),)),
    Layout("raw MPI-IO", "independent", _mpi_write, (("independent", _mpi_read),)),
    Layout("raw MPI-IO", "collective", _mpi_write, (("collective", _mpi_read),)),
    Layout("contiguous", "independent", partial(_hdf5_write, "contiguous"), (_INDEPENDENT,)),
    Layout(
        "contiguous", "collective", partial(_hdf5_write, "contiguous"), (_COLLECTIVE, ("memory map", _read_as_training))
    ),
    Layout("chunked", "independent", partial(_hdf5_write, "chunked"), (_INDEPENDENT,)),
    Layout("chunked", "collective", partial(_hdf5_write, "chunked"), (_COLLECTIVE, _DIRECT)),
    # HDF5 writes compressed chunks only collectively.
    Layout("gzip", "collective", partial(_hdf5_write, "gzip"), (_INDEPENDENT, _COLLECTIVE, _DIRECT)),
)
