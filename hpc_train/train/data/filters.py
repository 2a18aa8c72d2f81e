"""Decodes the stored bytes of HDF5 chunks without HDF5: its global lock would let one thread decompress at a time.

The filters that the writer applied are undone here. numcodecs would not do: it has no LZF and not HDF5's framing of LZ4
and bitshuffle, and inflates with zlib, without a limit: 100 KB may become 100 MB.
"""

import ctypes
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_train.core.errors import UserError

# libdeflate, if it is installed: 3.7 times as fast as zlib on images.
_zlib_decompress: Any = import_module("deflate").zlib_decompress if find_spec("deflate") else None

_DEFLATE, _SHUFFLE, _FLETCHER32, _LZF = 1, 2, 3, 32000
_NAMES = {4: "szip", 5: "nbit", 6: "scaleoffset", 307: "bzip2", 32001: "blosc", 32004: "lz4", 32008: "bitshuffle"}
_NAMES |= {32013: "zfp", 32015: "zstd", 32026: "blosc2"}
_WORDS_AT_ONCE = 1 << 16  # of a checksum: the sum of their products with the weights fits into 64 bits
_WORD_WEIGHTS = np.arange(_WORDS_AT_ONCE, 0, -1, dtype=np.uint64)
_CHECKSUM_BYTES = 4

Decode = Callable[[Any, int], Any]  # (bytes, the maximum of decoded bytes) -> decoded bytes


class DamagedChunk(ValueError):
    """A chunk that does not decode, or whose checksum differs; the message says why."""


@dataclass(frozen=True)
class Pipeline:
    """Undoes the filters of a data set. names: of the filters, in the order in which they were applied."""

    steps: tuple[tuple[int, Decode], ...]  # the last filter first, each with its number among the filters
    names: tuple[str, ...]

    def decode(self, data: Any, mask: int, num_bytes: int, is_verified: bool = False) -> np.ndarray:
        """The `num_bytes` bytes of a chunk, from those stored in the file. Raises `DamagedChunk`.

        mask: bits of the filters that were not applied to this chunk. is_verified: skip its checksum, which was
        verified before.
        """
        for number, step in self.steps:
            if mask >> number & 1:
                continue
            if step is _verify and is_verified:
                data = memoryview(data)[:-_CHECKSUM_BYTES]
                continue
            try:
                data = step(data, num_bytes)
            except DamagedChunk:
                raise
            except MemoryError:
                raise DamagedChunk(f"filter {self.names[number]}: there is no memory for it") from None
            except Exception as error:  # noqa: BLE001  a decompressor may raise anything for damaged data
                raise DamagedChunk(f"filter {self.names[number]}: {error or type(error).__name__}") from None
        if len(data) != num_bytes:
            raise DamagedChunk(f"it holds {len(data):,} bytes and not {num_bytes:,}")
        return np.frombuffer(data, np.uint8)


def open_pipeline(dataset: h5py.Dataset) -> Pipeline | None:
    """What decodes the chunks of `dataset`; None if only HDF5 itself can. Raises `UserError` for a missing filter.

    gzip, lzf, shuffle and fletcher32 need nothing; zstd, blosc and others come with the package hdf5plugin.
    """
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(number) for number in range(plist.get_nfilters())]
    names = filter_names(plist)
    steps: list[tuple[int, Decode]] = []
    for number, (code, _, values, _) in reversed(list(enumerate(filters))):
        step = _step(code, values, dataset.dtype.itemsize)
        if step is None and not h5py.h5z.filter_avail(code):
            raise UserError(
                f"{dataset.file.filename}: {dataset.name} is compressed with filter {names[number]} (number {code}),"
                " which is not installed",
                "pip install hdf5plugin, or set HDF5_PLUGIN_PATH to the folder of that filter.",
            )
        if step is None:
            return None
        steps.append((number, step))
    return Pipeline(tuple(steps), names)


def filter_names(plist: Any) -> tuple[str, ...]:
    """The filters of a data set's creation property list, in the order in which they were applied."""
    return tuple(_name(*plist.get_filter(number)[::3]) for number in range(plist.get_nfilters()))


def _name(code: int, name: bytes) -> str:
    known = {_DEFLATE: "gzip", _SHUFFLE: "shuffle", _FLETCHER32: "fletcher32", _LZF: "lzf"} | _NAMES
    return known.get(code) or name.decode(errors="replace").partition(";")[0] or f"number {code}"


def _step(code: int, values: Sequence[int], itemsize: int) -> Decode | None:
    if code == _DEFLATE:
        return _inflate
    if code == _SHUFFLE:
        return partial(_unshuffle, values[0] if values else itemsize)
    if code == _FLETCHER32:
        return _verify
    function = _lzf() if code == _LZF else _plugins().get(code)
    return partial(_call, function, tuple(values)) if function else None


def _inflate(data: Any, num_bytes: int) -> Any:
    """At most a chunk and a checksum compressed with it: a few damaged bytes may inflate to gigabytes."""
    limit = num_bytes + _CHECKSUM_BYTES
    if _zlib_decompress:
        return _zlib_decompress(data, limit)
    stream = zlib.decompressobj()
    found = stream.decompress(data, limit)
    if not stream.eof:
        is_longer = stream.unconsumed_tail or stream.decompress(b"", 1)
        raise DamagedChunk(f"it holds more than {num_bytes:,} bytes" if is_longer else "its end is missing")
    return found


def _unshuffle(itemsize: int, data: Any, num_bytes: int) -> Any:
    """Bytes k of all elements were stored together; the bytes after the last whole element stay as they are."""
    if itemsize <= 1:
        return data
    flat = np.frombuffer(data, np.uint8)
    num, num_whole = len(flat) // itemsize, len(flat) // itemsize * itemsize
    found = np.empty(len(flat), np.uint8)
    for k in range(itemsize):  # as one transpose, numpy takes 10 times as long for elements of 2 or 4 bytes
        found[k:num_whole:itemsize] = flat[k * num : (k + 1) * num]
    found[num_whole:] = flat[num_whole:]
    return found.data


def _verify(data: Any, num_bytes: int) -> Any:
    """The bytes before the checksum. Raises `DamagedChunk` if it differs."""
    content, stored = memoryview(data)[:-_CHECKSUM_BYTES], bytes(memoryview(data)[-_CHECKSUM_BYTES:])
    found = fletcher32(content).to_bytes(_CHECKSUM_BYTES, "little")
    if stored not in (found, bytes((found[1], found[0], found[3], found[2]))):  # the latter: HDF5 before 1.6.3
        raise DamagedChunk("its checksum (fletcher32) differs: bytes were changed after they were written")
    return content


def fletcher32(data: Any) -> int:
    """HDF5's checksum: Fletcher's sums of 16-bit big-endian words modulo 65535; an odd last byte is a high one."""
    flat = np.frombuffer(data, np.uint8)
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    words = flat.view(">u2")
    first = second = 0
    for begin in range(0, len(words), _WORDS_AT_ONCE):
        block = words[begin : begin + _WORDS_AT_ONCE].astype(np.uint64)
        # The second sum adds up the first one after each word: a word counts once for itself and each word after it.
        second += len(block) * first + int(block @ _WORD_WEIGHTS[-len(block) :])
        first += int(block.sum())
    return _folded(second) << 16 | _folded(first)


def _folded(value: int) -> int:
    """Modulo 65535 as HDF5 folds it: a multiple of 65535 becomes 65535, and only 0 becomes 0."""
    return (value - 1) % 65535 + 1 if value else 0


# ------------------------------------------------------------------------------------ filters of other libraries

_FILTER = ctypes.CFUNCTYPE(
    ctypes.c_size_t,
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.POINTER(ctypes.c_void_p),
)
_REVERSE = 0x0100  # H5Z_FLAG_REVERSE


class _Class(ctypes.Structure):
    """H5Z_class2_t of HDF5's filter interface."""

    _fields_ = [
        ("version", ctypes.c_int),
        ("id", ctypes.c_int),
        ("encoder_present", ctypes.c_uint),
        ("decoder_present", ctypes.c_uint),
        ("name", ctypes.c_char_p),
        ("can_apply", ctypes.c_void_p),
        ("set_local", ctypes.c_void_p),
        ("filter", ctypes.c_void_p),
    ]


def _lzf() -> Any:
    """The filter function in h5py; a call by ctypes takes no lock. None in an h5py that does not export it."""
    own = ctypes.CDLL(h5py.h5z.__file__)
    return _FILTER(("lzf_filter", own)) if hasattr(own, "lzf_filter") else None


@cache
def _plugins() -> dict[int, Any]:
    """The filter functions of hdf5plugin, by number."""
    found: dict[int, Any] = {}
    spec = find_spec("hdf5plugin")
    if spec is None or spec.origin is None:
        return found
    for path in sorted((Path(spec.origin).parent / "plugins").glob("libh5*.so")):
        try:
            library = ctypes.CDLL(str(path))
            library.H5PLget_plugin_info.restype = ctypes.c_void_p
            kind = _Class.from_address(library.H5PLget_plugin_info())
        except (OSError, AttributeError):
            continue  # HDF5 itself may still be able to load it
        found[kind.id] = _FILTER(kind.filter)
    return found


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    return libc


def _call(function: Any, values: tuple[int, ...], data: Any, num_bytes: int) -> bytes:
    """Decodes by a filter function, which frees the buffer that it gets and allocates the one that it returns."""
    libc, source = _libc(), bytes(data)
    pointer = ctypes.c_void_p(libc.malloc(max(1, len(source))))
    if not pointer:
        raise MemoryError
    ctypes.memmove(pointer, source, len(source))
    room = ctypes.c_size_t(len(source))
    try:
        found = function(
            _REVERSE, len(values), (ctypes.c_uint * len(values))(*values), len(source), ctypes.byref(room), pointer
        )
        if not found:
            raise DamagedChunk("it does not decompress")
        if found > num_bytes + _CHECKSUM_BYTES:
            raise DamagedChunk(f"it holds {found:,} bytes and not {num_bytes:,}")
        return ctypes.string_at(pointer, found)
    finally:
        libc.free(pointer)
