"""An HDF5 file without its data: what h5py writes of data sets that are allocated and not filled, kept in memory.

So that the HDF5 library never touches the disk: a disk that is full or gone refuses our own calls, with a reason, and
leaves no half-closed file inside the library. Bytes of tensors then go straight to the offsets found here.
"""

import io
from typing import Any, NamedTuple

import h5py
import numpy as np

HEADER_BYTES = 4096  # HDF5 leaves them to the application ("user block")
_PAGE = 4096


class Place(NamedTuple):
    """Where a data set's bytes lie in the file."""

    offset: int
    num_bytes: int


class Image(io.RawIOBase):
    """A sparse file in memory: pages that were written; all others read as zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self._at = 0
        self._pages: dict[int, bytearray] = {}

    def pages(self) -> list[tuple[int, bytes]]:
        """(offset, content) of the pages that were written, none of which reaches beyond the end."""
        return [(at, bytes(page[: self.num_bytes - at])) for at, page in sorted(self._pages.items())]

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self.num_bytes)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        view, begin = memoryview(data).cast("B"), self._at
        for done, page, first, length in self._parts(len(view)):
            self._pages.setdefault(page, bytearray(_PAGE))[first : first + length] = view[done : done + length]
        self._at = begin + len(view)
        self.num_bytes = max(self.num_bytes, self._at)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        for done, page, first, length in self._parts(len(view)):
            view[done : done + length] = self._pages.get(page, bytes(_PAGE))[first : first + length]
        self._at += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        self.num_bytes = self._at if size is None else size
        return self.num_bytes

    def _parts(self, num_bytes: int) -> list[tuple[int, int, int, int]]:
        """(bytes before, page, first byte in it, length) of each part of a range that begins here."""
        parts, done = [], 0
        while done < num_bytes:
            page, first = divmod(self._at + done, _PAGE)
            length = min(_PAGE - first, num_bytes - done)
            parts.append((done, page * _PAGE, first, length))
            done += length
        return parts


def create(image: Image, alignment: int) -> h5py.File:
    """A new HDF5 file in `image`, which HDF5 1.10 and all later versions read.

    Data sets of at least `alignment` bytes, and 64 KiB, begin at a multiple of `alignment`, or of a page.
    """
    return h5py.File(
        image,
        "w",
        libver=("v108", "v110"),
        userblock_size=HEADER_BYTES,
        alignment_threshold=max(1 << 16, alignment),
        alignment_interval=max(_PAGE, alignment),
    )


def allocate(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[h5py.Dataset, Place]:
    """A data set in one range of the file, whose bytes the caller writes there."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # the same state is the same file
    group, _, last = name.rpartition("/")
    parent = file.require_group(group or "/")
    kind = h5py.h5t.py_create(dtype, logical=True)
    made = h5py.h5d.create(parent.id, last.encode(), kind, h5py.h5s.create_simple(shape), properties)
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return h5py.Dataset(made), Place(made.get_offset() if num_bytes else 0, num_bytes)
