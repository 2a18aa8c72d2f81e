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
piece. HDF5 opens a file only after these agree. Nothing is pickled. `format2.py` reads what earlier versions wrote.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
import xxhash

from hpc_train import __version__
from hpc_train.train.run.checkpoint import format2
from hpc_train.train.run.checkpoint.encoding import decode, dtype_name, encode, stored_dtype
from hpc_train.train.run.checkpoint.image import HEADER_BYTES, Image, Place, allocate, create
from hpc_train.train.run.checkpoint.pieces import PARTS, UnusableCheckpoint
from hpc_train.train.run.checkpoint.ranges import (
    PIECE_BYTES,
    Range,
    bytes_of,
    checksum,
    read_all,
    read_piece,
    write_all,
    write_pieces,
)
from hpc_train.train.run.checkpoint.retention import remove, step_of

FORMAT = 3
_MAGIC = b"hpc-train checkpoint 3\n"
_STATED = ("format", "hpc_train", "step")  # as attributes of the file; all other facts are those of /loader

# ------------------------------------------------------------------------------------------------ writing


def write(
    path: Path, state: dict[str, Any], manifest: dict[str, Any], before_rename: Callable[[], None] = lambda: None
) -> None:
    """Writes a checkpoint: temporary name, checksums, fsync, rename. `before_rename` may raise to prevent it.

    Raises `UnusableCheckpoint` if a weight is NaN or infinite, TypeError for a value that a checkpoint cannot hold,
    and OSError if the disk refuses.
    """
    for name, value in state["model"].items():
        if not _is_finite(value):
            raise UnusableCheckpoint(f"{name} holds NaN or infinity")
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")  # not the name another job uses
    try:
        _write_file(partial, state, {"format": FORMAT, "hpc_train": __version__, **manifest})
        before_rename()
        os.rename(partial, path)  # over a damaged checkpoint of the same step
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    if (folder := path.with_suffix("")).is_dir():  # of format 2, of the same step, which was refused
        remove(folder)


class Layout(NamedTuple):
    """A file whose data are still to come. places: of the data sets by name. table: of the pieces."""

    image: Image
    places: dict[str, Place]
    table: Place
    row: np.dtype[Any]  # of the table


def lay_out(
    tensors: dict[str, torch.Tensor], rows: dict[str, list[str]], structure: Any, facts: dict[str, Any]
) -> Layout:
    """Where every byte of a checkpoint goes. Only shapes and dtypes of the tensors are looked at."""
    image, places = Image(), {}
    width = max((len(name.encode()) for name in tensors), default=1)
    row = np.dtype([("data_set", f"S{width}"), *((field, "<u8") for field in ("begin", "end", "offset", "xxh3"))])
    num_pieces = sum(-(-tensor.nbytes // PIECE_BYTES) for tensor in tensors.values())
    with create(image) as file:
        loader = file.create_group("loader")
        for key, value in facts.items():
            if type(value) not in (bool, int, float, str):
                raise TypeError(f"the fact {key} is of type {type(value).__name__}, which no checkpoint holds")
            (file if key in _STATED else loader).attrs[key] = value
        text = json.dumps(structure).encode()
        file.create_dataset("structure", data=np.frombuffer(text, f"S{len(text)}")[0])
        for name, members in rows.items():
            file.create_dataset(f"{name}.rows", data=np.array([each.encode() for each in members]))
        for name, tensor in tensors.items():
            data_set, places[name] = allocate(
                file, name, tuple(tensor.shape), stored_dtype(dtype_name(tensor.dtype))[1]
            )
            data_set.attrs["dtype"] = dtype_name(tensor.dtype)
        _, table = allocate(file, "pieces", (num_pieces,), row)
    return Layout(image, places, table, row)


def _write_file(path: Path, state: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes and syncs everything. The frame comes first: its pages may overlap the edges of tensors."""
    structure, tensors, rows = encode(state)
    layout = lay_out(tensors, rows, structure, facts)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(handle, layout.image.num_bytes)
        for offset, page in layout.image.pages():
            write_all(handle, page, offset)
        pieces = [
            piece
            for name, place in layout.places.items()
            for piece in write_pieces(handle, name, bytes_of(tensors[name]), place.offset)
        ]
        _seal(handle, layout, pieces)
        os.fsync(handle)
    finally:
        os.close(handle)


def _seal(handle: int, layout: Layout, pieces: list[Range]) -> None:
    """Writes the table and the header."""
    table = np.array([(name.encode(), *numbers) for name, *numbers in pieces], layout.row).tobytes()
    write_all(handle, table, layout.table.offset)
    covered = [(each.offset, each.end - each.begin) for each in pieces]

    def frame(begin: int, end: int) -> bytes:
        layout.image.seek(begin)
        return layout.image.read(end - begin) or b""

    facts = {
        "bytes": layout.image.num_bytes,
        "num_pieces": len(pieces),
        "pieces_offset": layout.table.offset,
        "pieces_bytes": layout.table.num_bytes,
        "pieces_xxh3": checksum(table),
        "others_xxh3": _checksum_of_others(covered, tuple(layout.table), layout.image.num_bytes, frame),
    }
    write_all(handle, _header(facts), 0)


def _header(facts: dict[str, int]) -> bytes:
    told = _MAGIC + json.dumps(facts).encode() + b"\n"
    return (told + f"{checksum(told):016x}\n".encode()).ljust(HEADER_BYTES, b"\0")


def _checksum_of_others(
    pieces: list[tuple[int, int]], table: tuple[int, ...], num_bytes: int, read_bytes: Callable[[int, int], bytes]
) -> int:
    """The checksum of all bytes after the header that are in no piece and not in the table.

    Raises `UnusableCheckpoint` if (offset, length) of these overlap or leave the file.
    """
    others, at = xxhash.xxh3_64(), HEADER_BYTES
    for begin, length in [*sorted([*pieces, *([table] if table[1] else [])]), (num_bytes, 0)]:
        if not at <= begin <= num_bytes - length:
            raise UnusableCheckpoint("its pieces overlap or leave the file")
        for first in range(at, begin, PIECE_BYTES):
            others.update(read_bytes(first, min(first + PIECE_BYTES, begin)))
        at = begin + length
    return others.intdigest()


def _is_finite(value: Any) -> bool:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return not is_float or bool(torch.isfinite(value).all())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------------ reading


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, manifest) of a checkpoint whose every byte is as it was written. Raises `UnusableCheckpoint`."""
    if path.is_dir():
        return format2.read(path)
    try:
        with _opened(path) as handle:
            pieces = _verified_table(handle)
            # By this process's handle: a file put in its place meanwhile has another content.
            with h5py.File(f"/proc/self/fd/{handle}", "r", locking=False) as file:
                return _state(handle, file, pieces), _manifest(path, file)
    except UnusableCheckpoint:
        raise
    except OSError as error:
        raise UnusableCheckpoint(f"it cannot be read: {error}") from None
    except Exception as error:  # noqa: BLE001  a hostile file makes h5py and json raise any kind of exception
        raise UnusableCheckpoint(f"it holds no training state: {error!r:.200}") from None


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait
    try:
        yield handle
    finally:
        os.close(handle)


def _verified_table(handle: int) -> list[Range]:
    """The table of pieces of a file in which every byte outside of the pieces is as it was written."""
    found = os.fstat(handle).st_size
    header = _bytes_at(handle, 0, min(HEADER_BYTES, found))
    if not header.startswith(_MAGIC):
        raise UnusableCheckpoint(f"it does not begin as a checkpoint of format {FORMAT}")
    try:
        facts = json.loads(header[len(_MAGIC) :].partition(b"\n")[0])
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
    table = _bytes_at(handle, offset, length)
    if checksum(table) != of_table:
        raise UnusableCheckpoint("its table of pieces is damaged: its checksum differs")
    pieces = _rows(table, num_rows)
    covered = [(each.offset, each.end - each.begin) for each in pieces]
    others = _checksum_of_others(
        covered, (offset, length), num_bytes, lambda begin, end: _bytes_at(handle, begin, end - begin)
    )
    if others != of_others:
        raise UnusableCheckpoint("its names and facts are damaged: their checksum differs")
    return pieces


_HEADER_KEYS = ("bytes", "num_pieces", "pieces_offset", "pieces_bytes", "pieces_xxh3", "others_xxh3")


def _rows(table: bytes, num_rows: int) -> list[Range]:
    if not num_rows:
        return []
    row = np.dtype([("data_set", f"S{len(table) // num_rows - 32}"), ("numbers", "<u8", 4)])
    rows = np.frombuffer(table, row, num_rows)
    pieces = [
        Range(name.decode(), *numbers) for name, numbers in zip(rows["data_set"], rows["numbers"].tolist(), strict=True)
    ]
    if not all(0 < each.end - each.begin <= PIECE_BYTES for each in pieces):
        raise UnusableCheckpoint("its table holds a piece of no size that is written")
    return pieces


def _bytes_at(handle: int, offset: int, length: int) -> bytes:
    data = bytearray(length)
    read_all(handle, memoryview(data), offset)
    return bytes(data)


def _manifest(path: Path, file: h5py.File) -> dict[str, Any]:
    facts = {key: _plain(value) for group in (file, file["loader"]) for key, value in group.attrs.items()}
    if facts.get("format") != FORMAT:
        raise UnusableCheckpoint(f"it is not of format {FORMAT}")
    if type(facts.get("step")) is not int or facts["step"] != step_of(path):
        raise UnusableCheckpoint(f"it is of step {facts.get('step')}")
    return facts


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _state(handle: int, file: h5py.File, pieces: list[Range]) -> dict[str, Any]:
    data_sets: dict[str, h5py.Dataset] = {}

    def visit(name: str, found: Any) -> None:  # each object once, and no link that leaves the file
        if isinstance(found, h5py.Dataset):
            data_sets[name] = found

    file.visititems(visit)
    by_name: dict[str, list[Range]] = {}
    for piece in pieces:
        by_name.setdefault(piece.data_set, []).append(piece)
    whole: dict[str, torch.Tensor] = {}

    def tensor(name: str) -> torch.Tensor:
        if name not in whole:
            if name not in data_sets:
                raise UnusableCheckpoint(f"it holds no data set {name}")
            whole[name] = _read_tensor(handle, name, data_sets[name], by_name.get(name, []))
        return whole[name]

    state = decode(json.loads(bytes(_contiguous("structure", data_sets["structure"])[()])), tensor)
    if not isinstance(state, dict) or set(state) != PARTS:
        raise UnusableCheckpoint("it holds no model and optimizer")
    return state


def _contiguous(name: str, data_set: h5py.Dataset) -> h5py.Dataset:
    """The data set, if its bytes are one range of this very file."""
    properties = data_set.id.get_create_plist()
    if properties.get_layout() != h5py.h5d.CONTIGUOUS or properties.get_external_count():
        raise UnusableCheckpoint(f"{name} is not stored as one range of the file")
    return data_set


def _read_tensor(handle: int, name: str, data_set: h5py.Dataset, pieces: list[Range]) -> torch.Tensor:
    """A tensor whose pieces cover it exactly, which is known before memory is taken for it."""
    dtype, stored = stored_dtype(str(data_set.attrs["dtype"]))
    if _contiguous(name, data_set).dtype != stored:
        raise UnusableCheckpoint(f"{name} is stored as {data_set.dtype} and said to be {dtype_name(dtype)}")
    num_bytes, offset = data_set.size * dtype.itemsize, data_set.id.get_offset()
    at = 0
    for piece in pieces:
        if piece.begin != at or piece.offset != offset + at:
            raise UnusableCheckpoint(f"the pieces of {name} do not fit it")
        at = piece.end
    if at != num_bytes:
        raise UnusableCheckpoint(f"the pieces of {name} hold {at} of its {num_bytes} bytes")
    tensor = torch.empty(data_set.shape, dtype=dtype)
    data = bytes_of(tensor)
    for piece in pieces:
        read_piece(handle, piece, data[piece.begin : piece.end])
    return tensor


# ------------------------------------------------------------------------------------------------ the model alone


class ModelTensors:
    """The model's tensors in an open checkpoint, one at a time. left_out: what is no tensor."""

    def __init__(self, handle: int, file: h5py.File, pieces: list[Range]) -> None:
        self.step = int(file.attrs["step"])
        self._handle, self._file = handle, file
        model = json.loads(bytes(_contiguous("structure", file["structure"])[()]))["dict"]["model"]["dict"]
        self._data_sets = {name: node["tensor"] for name, node in model.items() if isinstance(node, dict)}
        self.left_out = sorted(model.keys() - self._data_sets.keys())
        self._pieces: dict[str, list[Range]] = {}
        for piece in pieces:
            self._pieces.setdefault(piece.data_set, []).append(piece)

    def names(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor."""
        found = {name: self._file[data_set] for name, data_set in self._data_sets.items()}
        return {name: (each.shape, stored_dtype(str(each.attrs["dtype"]))[0]) for name, each in found.items()}

    def read(self, name: str) -> torch.Tensor:
        """Raises `UnusableCheckpoint` if a byte differs from what was written."""
        data_set = self._data_sets[name]
        return _read_tensor(self._handle, data_set, self._file[data_set], self._pieces.get(data_set, []))

    def verify(self) -> None:
        """Raises `UnusableCheckpoint` if a byte of the model differs from what was written."""
        buffer = memoryview(bytearray(PIECE_BYTES))
        for data_set in self._data_sets.values():
            for piece in self._pieces.get(data_set, []):
                read_piece(self._handle, piece, buffer[: piece.end - piece.begin])


@contextmanager
def open_model(path: Path) -> Iterator[ModelTensors]:
    """The model of a checkpoint of this format, every byte of which is as it was written.

    Raises `UnusableCheckpoint`, also for damage that is met inside the block.
    """
    try:
        with _opened(path) as handle:
            pieces = _verified_table(handle)
            with h5py.File(f"/proc/self/fd/{handle}", "r", locking=False) as file:
                model = ModelTensors(handle, file, pieces)
                model.verify()
                yield model
    except OSError as error:
        raise UnusableCheckpoint(f"it cannot be read: {error}") from None


def is_checkpoint(path: Path) -> bool:
    """Whether a file begins as one of this format, whatever its name."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC
