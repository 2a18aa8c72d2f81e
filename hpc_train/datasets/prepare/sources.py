"""A data set to prepare: arrays of which any rows can be read, so that every rank reads the rows it writes."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.datasets.prepare.netcdf import Netcdf

ARRAY_FILES = {"hdf5", "netcdf", "zarr"}
_TEXTS = ("text", "python-source", "shakespeare")


@dataclass(frozen=True)
class Array:
    """Rows to write as one data set: `read(start, stop)` gives any of them.

    attributes: of the data set, such as scale_factor; None for those that suit its values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]
    attributes: Mapping[str, Any] | None = None

    @property
    def row_bytes(self) -> int:
        return max(1, math.prod(self.shape[1:]) * self.dtype.itemsize)


def in_memory(values: np.ndarray) -> Array:
    return Array(values.shape, values.dtype, lambda start, stop: values[start:stop])


@dataclass(frozen=True)
class Source:
    """A data set to prepare: what it is, where it comes from, and its arrays by their path in the file.

    attributes: what else the file says about itself. unit: what a row is. state: changes when the source is changed,
    and is not part of the file. spools: files to remove when the data set is complete. netcdf: what makes the file one
    of netCDF-4.
    """

    title: str
    origin: str
    license: str
    arrays: dict[str, Array]
    attributes: dict[str, Any] = field(default_factory=dict)
    unit: str = "rows"
    state: str = ""
    spools: tuple[Path, ...] = ()
    netcdf: Netcdf | None = None

    def num_rows_of(self, part: str) -> int:
        """The samples, or tokens, of a part: "train" or "test"."""
        array = self.arrays.get(f"{part}/inputs")
        return array.shape[0] if array else 0

    @property
    def num_rows(self) -> int:
        return self.num_rows_of("train") + self.num_rows_of("test")


def state_of(paths: Iterable[Path]) -> str:
    """A hash of the names, sizes and modification times of `paths`, which changes when a file does."""
    state = blake2b(digest_size=16)
    for path in paths:
        with suppress(OSError):  # the error shows when the file is read
            found = path.stat()
            state.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return state.hexdigest()


@dataclass(frozen=True)
class Options:
    """Options of `prepare` that only some sources take. None: not given.

    size: pixels of a picture's sides. target, drop: a table's columns, "a,b" for several. categories: "one-hot" or
    "codes". like: a prepared table, with whose columns another is made. arrays, rows: see `array_files`. test_fraction:
    of the rows. tokenizer: of text.
    """

    size: int | None = None
    target: str | None = None
    test_fraction: float | None = None
    tokenizer: str | None = None
    drop: str | None = None
    categories: str | None = None
    arrays: tuple[str, ...] = ()
    rows: str | None = None
    like: Path | None = None

    def require_use(self, name: str, origins: list[Path]) -> None:
        """Raises `UserError` if data set `name` does not take an option that is given, or needs one that is not."""
        kind = "samples" if ":" in name else "text" if name in _TEXTS else name
        takers = {
            "--size": (self.size, {"images"}),
            "--target": (self.target, {"table"}),
            "--drop": (self.drop, {"table"}),
            "--categories": (self.categories, {"table"}),
            "--array": (" ".join(self.arrays) or None, ARRAY_FILES),
            "--rows": (self.rows, ARRAY_FILES),
            "--like": (self.like, {"table"}),
            "--test-fraction": (self.test_fraction, {"table", "images", "samples", *ARRAY_FILES}),
            "--tokenizer": (self.tokenizer, {"text"}),
        }
        for option, (value, kinds) in takers.items():
            if value is not None and kind not in kinds:
                raise UserError(f"prepare {name}: {option} {value} is not for it", "Leave it out.")
        if self.like is not None:
            self._require_like_alone(name, origins)
        if len(origins) > 1 and kind != "text":
            raise UserError(f"prepare {name}: --from is given {len(origins)} times", "Name one folder or file.")
        if kind in ("images", "table", *ARRAY_FILES) and not origins:
            example = {"images": "DIR", "table": "x.csv", "hdf5": "x.h5", "netcdf": "x.nc", "zarr": "x.zarr"}[kind]
            raise UserError(f"prepare {name} needs --from", f"Name where the data are: --from {example}")
        if kind == "samples" and origins:
            raise UserError(f"prepare {name} takes no --from", "The function itself knows where its samples are.")

    def _require_like_alone(self, name: str, origins: list[Path]) -> None:
        """Raises `UserError` for an option that --like decides, and for a table whose columns have no names."""
        decided = {"--target": self.target, "--drop": self.drop, "--categories": self.categories}
        for option, value in (decided | {"--test-fraction": self.test_fraction}).items():
            if value is not None:
                raise UserError(f"prepare {name}: {option} {value} is as in --like {self.like}", f"Leave {option} out.")
        if origins and origins[0].suffix.lower() in (".npy", ".npz"):
            raise UserError(
                f"--like {self.like}: the columns of {origins[0]} have no names", "It is for .csv, .tsv and .parquet."
            )
