"""MNIST and Fashion-MNIST, from IDX files."""

import gzip
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.datasets.prepare.origin import require_file
from hpc_train.datasets.prepare.sources import Array, Source, state_of

_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
_FETCH_AGAIN = "Fetch the file again."
_IDX_FILES = {
    "train/inputs": "train-images-idx3-ubyte",
    "train/targets": "train-labels-idx1-ubyte",
    "test/inputs": "t10k-images-idx3-ubyte",
    "test/targets": "t10k-labels-idx1-ubyte",
}


def fashion_mnist(origin: Path | None) -> Source:
    """Fashion-MNIST, 60,000 + 10,000 pictures of clothes in 10 classes (Xiao, Rasul and Vollgraf, 2017)."""
    remedy = "apt-get install dataset-fashion-mnist, or name the folder of its four files: --from DIR"
    return _from_idx_files("Fashion-MNIST", "MIT", origin or _FASHION_MNIST, remedy)


def mnist(origin: Path | None) -> Source:
    """MNIST, 60,000 + 10,000 digits (LeCun, Cortes and Burges), from its four IDX files."""
    remedy = f"Name the folder of the four IDX files ({', '.join(_IDX_FILES.values())}; .gz too): --from DIR"
    if origin is None:
        raise UserError("prepare mnist needs --from", remedy)
    return _from_idx_files("MNIST", "see its source", origin, remedy)


# ---------------------------------------------------------------------------------------------- IDX files


def _from_idx_files(title: str, license: str, folder: Path, remedy: str) -> Source:
    """The four IDX files of an MNIST-like data set in `folder`, each plain or with .gz."""
    paths = {name: _find(folder, file, remedy) for name, file in _IDX_FILES.items()}
    arrays = {name: _IdxFile.open(path, 3 if name.endswith("inputs") else 1).array for name, path in paths.items()}
    for part in ("train", "test"):
        num_inputs, num_targets = arrays[f"{part}/inputs"].shape[0], arrays[f"{part}/targets"].shape[0]
        if num_inputs != num_targets:
            raise UserError(
                f"{paths[f'{part}/inputs']} has {num_inputs} images, {paths[f'{part}/targets']} {num_targets} labels",
                "Each image needs one label: fetch the files again.",
            )
    return Source(title, str(folder), license, arrays, state=state_of(paths.values()))


def _find(folder: Path, name: str, remedy: str) -> Path:
    # Some distributions of MNIST write a dot where others write a hyphen: train-images.idx3-ubyte.
    for candidate in (name, name.replace("-idx", ".idx")):
        for path in (folder / candidate, folder / f"{candidate}.gz"):
            if os.path.lexists(path):
                require_file(path, remedy)
                return path
    raise UserError(f"{folder / name} (or .gz) does not exist", remedy)


@dataclass(frozen=True)
class _IdxFile:
    """Bytes in IDX format: two zeros, type 8, the number of dimensions, their sizes (big-endian), the values."""

    path: Path
    shape: tuple[int, ...]

    @classmethod
    def open(cls, path: Path, num_dimensions: int) -> "_IdxFile":
        num_header_bytes = 4 + 4 * num_dimensions
        header = _read(path, 0, num_header_bytes)
        if len(header) < num_header_bytes or header[:4] != bytes((0, 0, 8, num_dimensions)):
            raise UserError(f"{path} is not an IDX file of bytes in {num_dimensions} dimensions", _FETCH_AGAIN)
        shape = struct.unpack(f">{num_dimensions}I", header[4:])
        num_bytes = num_header_bytes + math.prod(shape)
        if min(shape) < 1 or (path.suffix != ".gz" and path.stat().st_size < num_bytes):
            raise UserError(f"{path} is truncated: its header promises {shape}", _FETCH_AGAIN)
        return cls(path, shape)

    @property
    def array(self) -> Array:
        return Array(self.shape, np.dtype(np.uint8), self.read)

    def read(self, start: int, stop: int) -> np.ndarray:
        row_bytes, num_header_bytes = math.prod(self.shape[1:]), 4 + 4 * len(self.shape)
        data = _read(self.path, num_header_bytes + start * row_bytes, (stop - start) * row_bytes)
        if len(data) != (stop - start) * row_bytes:
            raise UserError(f"{self.path} is truncated: its header promises {self.shape[0]} rows", _FETCH_AGAIN)
        return np.frombuffer(data, np.uint8).reshape(stop - start, *self.shape[1:])


def _read(path: Path, offset: int, num_bytes: int) -> bytes:
    """Bytes of a file, which may be packed. Raises `UserError`."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            file.seek(offset)
            return file.read(num_bytes)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}", _FETCH_AGAIN) from None
