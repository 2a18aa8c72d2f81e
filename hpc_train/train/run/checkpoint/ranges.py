"""Pieces of data sets at their offsets in a checkpoint: written and read without HDF5, each with its checksum.

Any process that knows a data set's offset can do its part with these: no lock, no library state, no MPI.
"""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import xxhash

from hpc_train.train.run.checkpoint.pieces import UnusableCheckpoint

PIECE_BYTES = 4 << 20


class Range(NamedTuple):
    """One row of the table `/pieces`: bytes `begin` to `end` of a data set, where they lie, and their checksum."""

    data_set: str
    begin: int
    end: int
    offset: int
    xxh3: int


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor of the CPU."""
    return memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))


def write_all(handle: int, data: memoryview | bytes, offset: int) -> None:
    """`pwrite` until all is written: a call may write less than it was given. Raises OSError."""
    left = memoryview(data)
    while left:
        done = os.pwrite(handle, left, offset)
        left, offset = left[done:], offset + done


def read_all(handle: int, into: memoryview, offset: int) -> None:
    """`pread` until `into` is full. Raises `UnusableCheckpoint` if the file ends before, and OSError."""
    while into:
        done = os.preadv(handle, [into], offset)
        if not done:
            raise UnusableCheckpoint("it was cut short while it was read")
        into, offset = into[done:], offset + done


def write_pieces(handle: int, name: str, data: memoryview, offset: int) -> Iterator[Range]:
    """Writes a data set that begins at `offset` and yields its rows of the table. Raises OSError."""
    for begin in range(0, len(data), PIECE_BYTES):
        piece = data[begin : begin + PIECE_BYTES]
        write_all(handle, piece, offset + begin)
        yield Range(name, begin, begin + len(piece), offset + begin, checksum(piece))


def read_piece(handle: int, piece: Range, into: memoryview) -> None:
    """Reads a piece and compares its checksum. Raises `UnusableCheckpoint` with the data set's name, and OSError."""
    read_all(handle, into, piece.offset)
    if checksum(into) != piece.xxh3:
        raise UnusableCheckpoint(
            f"{piece.data_set} is damaged in bytes {piece.begin} to {piece.end}: its checksum differs"
        )


def checksum(data: Any) -> int:
    return xxhash.xxh3_64_intdigest(data)
