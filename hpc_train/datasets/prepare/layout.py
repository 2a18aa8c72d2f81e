"""The layout of data sets in an HDF5 file: contiguous, to be mapped, or in compressed chunks with a checksum each."""

import io
from dataclasses import dataclass
from typing import Any

import h5py

from hpc_train.core.errors import UserError
from hpc_train.datasets.prepare.sources import Array

BLOCK_BYTES = 4 << 20  # of a contiguous data set, for each checksum
CHUNK_BYTES = 1 << 20  # small enough to hold many in memory for a shuffle, large enough to be worth a read
_LEVELS = {"gzip": (1, 9, 4), "zstd": (1, 22, 3)}  # lowest, highest, default
# HDF5 1.8's file format has a checksum beside each object's type, shape, address and attributes, such as scale_factor.
# In the older format, h5py's default, a changed byte there is read as if it were right.
FORMAT_1_8: dict[str, Any] = {"libver": ("v108", "v108")}
_REMEDY = "Write gzip:LEVEL (1 to 9), lzf or zstd:LEVEL (1 to 22), or omit it: uncompressed data read fastest."


def empty_file() -> bytes:
    """An HDF5 file in that format that holds nothing. Without times: equal data make equal files."""
    properties, access = h5py.h5p.create(h5py.h5p.FILE_CREATE), h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    properties.set_obj_track_times(False)
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_V18)
    memory = io.BytesIO()
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, memory)
    h5py.h5f.create(b"empty", h5py.h5f.ACC_TRUNC, properties, access).close()
    return memory.getvalue()


def make_groups(file: h5py.File, name: str) -> None:
    """Collective where `file` is. Makes the groups above data set `name`; h5py's own would record the time."""
    properties = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
    properties.set_obj_track_times(False)
    parts = name.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        group = "/".join(parts[:depth])
        if group not in file:
            h5py.h5g.create(file.id, group.encode(), gcpl=properties)


@dataclass(frozen=True)
class Layout:
    """name: "contiguous", or the compressor as --compress takes it. filters: arguments of h5py's create_dataset."""

    name: str
    filters: dict[str, Any]

    @property
    def is_chunked(self) -> bool:
        return bool(self.filters)

    def block_rows(self, array: Array) -> int:
        """Rows of a block, the unit of checksums and of sharing among ranks.

        Whole chunks, so that one rank writes a chunk, once.
        """
        if self.is_chunked:
            chunk_rows = self.chunk_rows(array)
            return chunk_rows * max(1, BLOCK_BYTES // max(1, chunk_rows * array.row_bytes))
        return max(1, BLOCK_BYTES // array.row_bytes)

    def chunk_rows(self, array: Array) -> int:
        return min(max(1, CHUNK_BYTES // array.row_bytes), max(1, array.shape[0]))

    def create(self, file: h5py.File, name: str, array: Array, chunk_rows: int | None = None) -> h5py.Dataset:
        """Collective where `file` is. A contiguous data set gets its place in the file now, and keeps it.

        chunk_rows: instead of those for an array of this length.
        """
        make_groups(file, name)
        if self.is_chunked and array.shape[0]:
            chunk = (chunk_rows or self.chunk_rows(array), *array.shape[1:])
            shuffle = array.dtype.itemsize > 1
            return file.create_dataset(
                name, array.shape, array.dtype, chunks=chunk, shuffle=shuffle, fletcher32=True, **self.filters
            )
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        # fill_time never: otherwise HDF5 would write all of it twice
        return file.create_dataset(name, array.shape, array.dtype, dcpl=properties, fill_time="never")


def parse(compress: str | None) -> Layout:
    """The layout for --compress. Raises `UserError` if it is unknown or its filter is not available."""
    if compress is None:
        return Layout("contiguous", {})
    kind, colon, given = compress.partition(":")
    if kind == "lzf" and not colon:
        return Layout("lzf", {"compression": "lzf"})
    if kind not in _LEVELS or (colon and not given.isdecimal()):
        raise UserError(f"--compress {compress}: no such compression", _REMEDY)
    low, high, default = _LEVELS[kind]
    level = int(given) if colon else default
    if not low <= level <= high:
        raise UserError(f"--compress {compress}: the level is {low} to {high}", _REMEDY)
    if kind == "gzip":
        _require_filter(h5py.h5z.FILTER_DEFLATE, "gzip", "Use an HDF5 library built with zlib, or --compress lzf.")
        return Layout(f"gzip:{level}", {"compression": "gzip", "compression_opts": level})
    remedy = "pip install hdf5plugin, or --compress gzip:4"
    try:
        import hdf5plugin
    except ImportError:
        raise UserError("--compress zstd needs the HDF5 filter zstd, in the package hdf5plugin", remedy) from None
    _require_filter(hdf5plugin.Zstd.filter_id, "zstd", remedy)
    return Layout(f"zstd:{level}", dict(hdf5plugin.Zstd(clevel=level)))


def _require_filter(filter_id: int, name: str, remedy: str) -> None:
    if not h5py.h5z.filter_avail(filter_id):
        raise UserError(f"--compress {name}: this HDF5 library has no filter {name} (number {filter_id})", remedy)
