"""Format 3: one checkpoint is one HDF5 file `step-00001000.h5`, written whole or not at all and verified to the bit.

| data set or attribute | holds |
|---|---|
| `/model/NAME` | a tensor of the model, under its own name and shape |
| `/optimizer/KEY/NAME` | what the optimizer keeps of a parameter; numbers are one vector: `step`, of `step.rows` |
| `/task/...` | tensors of the task's own state |
| `/structure` | JSON: the nesting of the whole state, with its plain values |
| attributes of `/` and `/loader` | format, version, step; the job it belongs to |
| `/pieces` | of each piece of at most 4 MiB: data set, begin, end, offset in the file, xxh3 checksum |

The first 4096 bytes, which HDF5 leaves to the application, hold the checksums of the table and of every byte in no
piece. HDF5 opens a file only after these agree. Nothing is pickled. `writing.py` and `reading.py` handle the tensors;
`format2.py` reads what earlier versions wrote.
"""

import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import h5py
import numpy as np
import xxhash

from hpc_train.train.run.checkpoint.encoding import Encoded, dtype_name, stored_dtype
from hpc_train.train.run.checkpoint.image import HEADER_BYTES, Image, Place, allocate, create
from hpc_train.train.run.checkpoint.ranges import PIECE_BYTES, checksum, read_all, write_all
from hpc_train.train.run.checkpoint.shares import UnusableCheckpoint

FORMAT = 3
MAGIC = b"hpc-train checkpoint 3\n"
STRUCTURE, LOADER = "structure", "loader"
_STATED = ("format", "hpc_train", "step")  # as attributes of the file; all other facts are those of /loader
_TEXT_BYTES = 4096
_NUMBERS = ("begin", "end", "offset", "xxh3")


class Layout(NamedTuple):
    """A file whose data are still to come. places: of the data sets by name. table: of the pieces.

    kind: all but the step and the text of the structure, which a later checkpoint of the same job shares.
    """

    image: Image
    places: dict[str, Place]
    table: Place
    row: np.dtype[Any]  # of the table
    kind: Any


def lay_out(
    encoded: Encoded, num_pieces: int, facts: dict[str, Any], alignment: int = 1, before: Layout | None = None
) -> Layout:
    """Where every byte of a checkpoint goes. Only shapes and dtypes of the tensors are looked at.

    alignment: large data sets begin at a multiple of so many bytes. before: the layout of an earlier checkpoint, which
    is used again, and changed, if this one is alike: a new one takes 0.3 ms a tensor. Raises TypeError for a fact that
    no attribute holds.
    """
    text = json.dumps(encoded.structure).encode()
    text = text.ljust(len(text) + -len(text) % _TEXT_BYTES)  # room for a loss scale of more digits
    tensors = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in encoded.tensors.items()}
    kind = (tensors, encoded.rows, encoded.links, num_pieces, facts | {"step": None}, len(text), alignment)
    if before is None or before.kind != kind:
        return _new_layout(encoded, num_pieces, facts, text, kind, alignment)
    with h5py.File(before.image, "r+", locking=False) as file:
        file.attrs.modify("step", facts["step"])
        file[STRUCTURE][()] = np.frombuffer(text, f"S{len(text)}")[0]
    return before


def _new_layout(
    encoded: Encoded, num_pieces: int, facts: dict[str, Any], text: bytes, kind: Any, alignment: int
) -> Layout:
    image, places = Image(), {}
    width = max((len(name.encode()) for name in encoded.tensors), default=1)
    row = np.dtype([("data_set", f"S{width}"), *((field, "<u8") for field in _NUMBERS)])
    with create(image, alignment) as file:
        loader = file.create_group(LOADER)
        for key, value in facts.items():
            if type(value) not in (bool, int, float, str):
                raise TypeError(f"the fact {key} is of type {type(value).__name__}, which no checkpoint holds")
            (file if key in _STATED else loader).attrs[key] = value
        file.create_dataset(STRUCTURE, data=np.frombuffer(text, f"S{len(text)}")[0])
        for name, members in encoded.rows.items():
            file.create_dataset(f"{name}.rows", data=np.array([each.encode() for each in members]))
        for name, tensor in encoded.tensors.items():
            data_set, places[name] = allocate(
                file, name, tuple(tensor.shape), stored_dtype(dtype_name(tensor.dtype))[1]
            )
            data_set.attrs["dtype"] = dtype_name(tensor.dtype)
        for name, target in encoded.links.items():
            file[name] = file[target]
        _, table = allocate(file, "pieces", (num_pieces,), row)
    return Layout(image, places, table, row, kind)


def seal(handle: int, layout: Layout, table: np.ndarray) -> None:
    """Writes the table and the header. Raises OSError."""
    content = table.tobytes()
    write_all(handle, content, layout.table.offset)

    def frame(begin: int, end: int) -> bytes:
        layout.image.seek(begin)
        return layout.image.read(end - begin) or b""

    facts = {
        "bytes": layout.image.num_bytes,
        "num_pieces": len(table),
        "pieces_offset": layout.table.offset,
        "pieces_bytes": layout.table.num_bytes,
        "pieces_xxh3": checksum(content),
        "others_xxh3": _checksum_of_others(table, tuple(layout.table), layout.image.num_bytes, frame),
    }
    write_all(handle, _header(facts), 0)


def verified_table(handle: int) -> np.ndarray:
    """The pieces of a file in which every byte outside of them is as it was written. Raises `UnusableCheckpoint`."""
    found = os.fstat(handle).st_size
    header = _bytes_at(handle, 0, min(HEADER_BYTES, found))
    if not header.startswith(MAGIC):
        raise UnusableCheckpoint(f"it does not begin as a checkpoint of format {FORMAT}")
    try:
        facts = json.loads(header[len(MAGIC) :].partition(b"\n")[0])
        is_whole = _header(facts) == header and all(type(each) is int and each >= 0 for each in facts.values())
        num_bytes, num_rows, offset, length, of_table, of_others = (facts[key] for key in _HEADER_KEYS)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        is_whole = False
    if not is_whole:
        raise UnusableCheckpoint("its header is damaged: its checksum differs")
    if found != num_bytes:
        raise UnusableCheckpoint(f"it has {found} of {num_bytes} bytes")
    if not offset <= offset + length <= num_bytes:
        raise UnusableCheckpoint("its table leaves the file")
    content = _bytes_at(handle, offset, length)
    if checksum(content) != of_table:
        raise UnusableCheckpoint("its table of pieces is damaged: its checksum differs")
    table = _rows(content, num_rows)
    others = _checksum_of_others(
        table, (offset, length), num_bytes, lambda begin, end: _bytes_at(handle, begin, end - begin)
    )
    if others != of_others:
        raise UnusableCheckpoint("its names and facts are damaged: their checksum differs")
    return table


_HEADER_KEYS = ("bytes", "num_pieces", "pieces_offset", "pieces_bytes", "pieces_xxh3", "others_xxh3")


def _header(facts: dict[str, int]) -> bytes:
    told = MAGIC + json.dumps(facts).encode() + b"\n"
    return (told + f"{checksum(told):016x}\n".encode()).ljust(HEADER_BYTES, b"\0")


def _rows(content: bytes, num_rows: int) -> np.ndarray:
    width = len(content) // num_rows - 8 * len(_NUMBERS) if num_rows else 1
    row = np.dtype([("data_set", f"S{width}"), *((field, "<u8") for field in _NUMBERS)])
    table = np.frombuffer(content, row, num_rows)
    lengths = table["end"] - table["begin"]
    if num_rows and not (lengths.min() > 0 and lengths.max() <= PIECE_BYTES):
        raise UnusableCheckpoint("its table holds a piece of no size that is written")
    return table


def _checksum_of_others(
    table: np.ndarray, place: tuple[int, ...], num_bytes: int, read_bytes: Callable[[int, int], bytes]
) -> int:
    """The checksum of all bytes after the header that are in no piece and not in the table, whose place is given.

    Raises `UnusableCheckpoint` if pieces overlap or leave the file.
    """
    ranges = zip(table["offset"].tolist(), (table["end"] - table["begin"]).tolist(), strict=True)
    others, at = xxhash.xxh3_64(), HEADER_BYTES
    for begin, length in [*sorted([*ranges, *([place] if place[1] else [])]), (num_bytes, 0)]:
        if not at <= begin <= num_bytes - length:
            raise UnusableCheckpoint("its pieces overlap or leave the file")
        for first in range(at, begin, PIECE_BYTES):
            others.update(read_bytes(first, min(first + PIECE_BYTES, begin)))
        at = begin + length
    return others.intdigest()


def _bytes_at(handle: int, offset: int, length: int) -> bytes:
    data = bytearray(length)
    read_all(handle, memoryview(data), offset)
    return bytes(data)
