"""Ranges of a file, written and read without HDF5: by any process that knows the offsets, without a lock or MPI."""

import os
from collections.abc import Iterator
from typing import Any, cast

import torch
import xxhash

from hpc_train.train.run.checkpoint.shares import UnusableCheckpoint

PIECE_BYTES = 4 << 20  # the most of one checksum


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor of the CPU."""
    return memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))


def cut(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The pieces of a range of bytes that one rank writes."""
    for first in range(begin, end, PIECE_BYTES):
        yield first, min(first + PIECE_BYTES, end)


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


def checksum(data: Any) -> int:
    return xxhash.xxh3_64_intdigest(data)
