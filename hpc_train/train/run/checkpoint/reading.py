"""Reads a checkpoint: the root verifies what is no tensor and makes an `Index`; any rank reads its ranges by it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch

from hpc_train.train.run.checkpoint import format2
from hpc_train.train.run.checkpoint.encoding import decode, dtype_name, stored_dtype
from hpc_train.train.run.checkpoint.format import FORMAT, LOADER, MAGIC, STRUCTURE, verified_table
from hpc_train.train.run.checkpoint.ranges import PIECE_BYTES, bytes_of, checksum, read_all
from hpc_train.train.run.checkpoint.retention import step_of
from hpc_train.train.run.checkpoint.shares import STATE_KEYS, UnusableCheckpoint, map_leaves


class DataSet(NamedTuple):
    """A tensor in the file. pieces: rows of the table that cover it, in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: np.ndarray


class Index(NamedTuple):
    """All that a checkpoint holds besides numbers, verified. structure: None in format 2."""

    path: Path
    manifest: dict[str, Any]
    structure: Any
    data_sets: dict[str, DataSet]


class StoredTensor:
    """A tensor of an open checkpoint. `name` is None in format 2, whose tensors are mapped into memory."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        self.ndim, self.num_numbers = len(shape), prod(shape)

    def read(self, begin: int, into: torch.Tensor) -> None:
        """Reads the numbers from place `begin` on. into: flat and contiguous, of the CPU and of this dtype.

        Raises `UnusableCheckpoint` if a byte of any piece that holds one of them differs from what was written.
        """
        raise NotImplementedError

    def whole(self) -> torch.Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read(0, tensor.view(-1))
        return tensor


class _InFile(StoredTensor):
    def __init__(self, handle: int, name: str, data_set: DataSet) -> None:
        super().__init__(name, data_set.shape, data_set.dtype)
        self._handle, self._pieces = handle, data_set.pieces

    def read(self, begin: int, into: torch.Tensor) -> None:
        first = begin * self.dtype.itemsize
        last, data = first + into.nbytes, bytes_of(into)
        ends, begins = self._pieces["end"], self._pieces["begin"]
        rows = self._pieces[np.searchsorted(ends, first, "right") : np.searchsorted(begins, last, "left")]
        for _, at, end, offset, expected in rows.tolist():
            if first <= at and end <= last:
                self._read_piece(data[at - first : end - first], at, offset, expected)
                continue
            piece = memoryview(bytearray(end - at))
            self._read_piece(piece, at, offset, expected)
            low, high = max(at, first), min(end, last)
            data[low - first : high - first] = piece[low - at : high - at]

    def _read_piece(self, into: memoryview, begin: int, offset: int, expected: int) -> None:
        read_all(self._handle, into, offset)
        if checksum(into) != expected:
            raise UnusableCheckpoint(
                f"{self.name} is damaged in bytes {begin} to {begin + len(into)}: its checksum differs"
            )

    def verify(self) -> None:
        """Raises `UnusableCheckpoint` if a byte differs from what was written."""
        buffer = memoryview(bytearray(PIECE_BYTES))
        for _, begin, end, offset, expected in self._pieces.tolist():
            self._read_piece(buffer[: end - begin], begin, offset, expected)


class _Mapped(StoredTensor):
    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__("", tuple(tensor.shape), tensor.dtype)
        self._tensor = tensor

    def read(self, begin: int, into: torch.Tensor) -> None:
        into.copy_(self._tensor.reshape(-1)[begin : begin + len(into)])


# ------------------------------------------------------------------------------------------------ a whole state


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, manifest) of a checkpoint whose every byte is as it was written. Raises `UnusableCheckpoint`."""
    index, _ = read_index(path)
    check_name(index)
    with opened_state(index) as state:
        return map_leaves(_whole, state), index.manifest


def _whole(leaf: Any) -> Any:
    return leaf.whole() if isinstance(leaf, StoredTensor) else leaf


def read_index(path: Path) -> tuple[Index, dict[str, Any]]:
    """(index, state with tensors on the meta device). Raises `UnusableCheckpoint`."""
    if path.is_dir():
        state, manifest = format2.read(path)
        return Index(path, manifest, None, {}), map_leaves(_as_meta, state)
    with _refusing(), opened(path) as handle:
        pieces = _by_data_set(verified_table(handle))
        # By this process's handle: a file put in its place meanwhile has another content.
        with h5py.File(f"/proc/self/fd/{handle}", "r", locking=False) as file:
            structure = json.loads(bytes(_contiguous(STRUCTURE, _data_set(file, STRUCTURE))[()]))
            data_sets: dict[str, DataSet] = {}

            def meta(name: str) -> torch.Tensor:
                if name not in data_sets:
                    data_sets[name] = _described(name, _data_set(file, name), pieces.get(name))
                return torch.empty(data_sets[name].shape, dtype=data_sets[name].dtype, device="meta")

            state = decode(structure, meta, lambda name, index: meta(name)[index])
            if not isinstance(state, dict) or set(state) != STATE_KEYS:
                raise UnusableCheckpoint("it holds no model and optimizer")
            return Index(path, _manifest(file), structure, data_sets), state


def check_name(index: Index) -> None:
    """Raises `UnusableCheckpoint` if a checkpoint is of another step than its name says."""
    if index.manifest["step"] != step_of(index.path):
        raise UnusableCheckpoint(f"it is of step {index.manifest['step']}")


@contextmanager
def opened_state(index: Index) -> Iterator[dict[str, Any]]:
    """The state with a `StoredTensor` in place of each tensor; single numbers are read.

    Raises `UnusableCheckpoint`, also for damage that is met inside the block.
    """
    if index.structure is None:
        yield map_leaves(_as_mapped, format2.mapped_state(index.path))
        return
    with _refusing(), opened(index.path) as handle:
        vectors: dict[str, torch.Tensor] = {}

        def stored(name: str) -> StoredTensor:
            return _InFile(handle, name, index.data_sets[name])

        def number(name: str, at: int) -> torch.Tensor:
            if name not in vectors:
                vectors[name] = stored(name).whole()
            return vectors[name][at].clone()

        yield decode(index.structure, stored, number)


def _as_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf


def _as_mapped(leaf: Any) -> Any:
    return _Mapped(leaf) if isinstance(leaf, torch.Tensor) else leaf


# ------------------------------------------------------------------------------------------------ the model alone


class ModelTensors:
    """The model's tensors in an open checkpoint. left_out: what is no tensor."""

    def __init__(self, handle: int, index: Index) -> None:
        self.step = int(index.manifest["step"])
        model = index.structure["dict"]["model"]["dict"]
        self._stored = {
            name: _InFile(handle, node["tensor"], index.data_sets[node["tensor"]])
            for name, node in model.items()
            if isinstance(node, dict) and "tensor" in node
        }
        self.left_out = sorted(model.keys() - self._stored.keys())

    def names(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor."""
        return {name: (each.shape, each.dtype) for name, each in self._stored.items()}

    def __getitem__(self, name: str) -> StoredTensor:
        return self._stored[name]

    def read(self, name: str) -> torch.Tensor:
        """Raises `UnusableCheckpoint` if a byte differs from what was written."""
        return self._stored[name].whole()

    def verify(self) -> None:
        """Raises `UnusableCheckpoint` if a byte of the model differs from what was written."""
        for stored in self._stored.values():
            stored.verify()


@contextmanager
def open_model(path: Path, verifies: bool = True) -> Iterator[ModelTensors]:
    """The model of a checkpoint of this format, every byte of which is as it was written.

    verifies: whether to read all of it before; else only what is read later is verified. Raises `UnusableCheckpoint`,
    also for damage that is met inside the block.
    """
    index, _ = read_index(path)
    with _refusing_io(), opened(path) as handle:
        model = ModelTensors(handle, index)
        if verifies:
            model.verify()
        yield model


def is_checkpoint(path: Path) -> bool:
    """Whether a file begins as one of this format, whatever its name."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


# ------------------------------------------------------------------------------------------------ files


@contextmanager
def opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def _refusing_io() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnusableCheckpoint(f"it cannot be read: {error}") from None


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        with _refusing_io():
            yield
    except UnusableCheckpoint:
        raise
    except Exception as error:  # noqa: BLE001  a hostile file makes h5py and json raise any kind of exception
        raise UnusableCheckpoint(f"it holds no training state: {error!r:.200}") from None


def _by_data_set(table: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of each data set, in the order of their places in it."""
    table = table[np.lexsort((table["begin"], table["data_set"]))]
    names, firsts = np.unique(table["data_set"], return_index=True)
    return {name.decode(): rows for name, rows in zip(names.tolist(), np.split(table, firsts[1:]), strict=True)}


def _data_set(file: h5py.File, name: str) -> h5py.Dataset:
    """A data set of this very file: no link on the way leaves it."""
    found: Any = file
    for key in name.split("/"):
        if not isinstance(found, h5py.Group) or not isinstance(found.get(key, getlink=True), h5py.HardLink):
            raise UnusableCheckpoint(f"it holds no data set {name}")
        found = found[key]
    if not isinstance(found, h5py.Dataset):
        raise UnusableCheckpoint(f"it holds no data set {name}")
    return found


def _contiguous(name: str, data_set: h5py.Dataset) -> h5py.Dataset:
    """The data set, if its bytes are one range of this very file."""
    properties = data_set.id.get_create_plist()
    if properties.get_layout() != h5py.h5d.CONTIGUOUS or properties.get_external_count():
        raise UnusableCheckpoint(f"{name} is not stored as one range of the file")
    return data_set


def _described(name: str, data_set: h5py.Dataset, pieces: np.ndarray | None) -> DataSet:
    """A data set that its pieces cover exactly, which is known before memory is taken for it."""
    dtype, stored = stored_dtype(str(data_set.attrs["dtype"]))
    if _contiguous(name, data_set).dtype != stored:
        raise UnusableCheckpoint(f"{name} is stored as {data_set.dtype} and said to be {dtype_name(dtype)}")
    num_bytes, offset = data_set.size * dtype.itemsize, data_set.id.get_offset()
    rows = np.empty(0, [(field, "<u8") for field in ("begin", "end", "offset")]) if pieces is None else pieces
    begins, ends = rows["begin"], rows["end"]
    if not (np.array_equal(begins[1:], ends[:-1]) and (rows["offset"] - begins == (offset or 0)).all()):
        raise UnusableCheckpoint(f"the pieces of {name} do not fit it")
    covered = int(ends[-1]) if len(rows) and begins[0] == 0 else 0
    if covered != num_bytes:
        raise UnusableCheckpoint(f"the pieces of {name} hold {covered} of its {num_bytes} bytes")
    return DataSet(data_set.shape, dtype, rows)


def _manifest(file: h5py.File) -> dict[str, Any]:
    facts = {key: _plain(value) for group in (file, file[LOADER]) for key, value in group.attrs.items()}
    if facts.get("format") != FORMAT:
        raise UnusableCheckpoint(f"it is not of format {FORMAT}")
    if type(facts.get("step")) is not int:
        raise UnusableCheckpoint("it says no step")
    return facts


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
