"""The HDF5 files of a data set: one, or those of a pattern, whose equally named data sets are read as one."""

import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import h5py
import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.filesystem import file_system
from hpc_train.core.settings import Config
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mpi_library import require_one_mpi
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
from hpc_train.train.data.readers import Reader, join

_LOOK_EVERY_S = 10.0
_DESCRIPTORS_A_FILE = 6  # its own, and a map each of inputs and targets to train and to test on
_OTHER_DESCRIPTORS = 128  # of MPI, logs, meters


class ChangeCheck:
    """Called now and then while files are read: raises `UserError` where one is not what it was."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._seen = {path: _identity(path) for path in paths}
        self._next_s = monotonic() + _LOOK_EVERY_S

    def __call__(self) -> None:
        if monotonic() < self._next_s:
            return
        self._next_s = monotonic() + _LOOK_EVERY_S
        for path, seen in self._seen.items():
            if _identity(path) != seen:
                raise UserError(
                    f"data.file: {path} was replaced or changed while it was read",
                    "What was trained since may be on other samples: begin again, or resume with the file as it was.",
                )


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Files:
    """Opened files, and what reading them may cost. memory_bytes, num_threads: see `open_reader`."""

    paths: Sequence[Path]
    opened: Sequence[h5py.File]
    memory_bytes: int
    num_threads: int
    check_unchanged: ChangeCheck

    def has(self, name: str) -> bool:
        """Whether the first file has a data set of that name."""
        with damage_as_user_error(self.paths[0], name):
            return find(self.opened[0], name) is not None

    def datasets(self, name: str, key: str) -> list[h5py.Dataset]:
        """Data set `name` of each file. Raises `UserError` where one has none, or one of another kind."""
        found: list[h5py.Dataset] = []
        for path, file in zip(self.paths, self.opened, strict=True):
            with damage_as_user_error(path, name):
                dataset = find(file, name)
                if dataset is None:
                    raise UserError(
                        f"{key} = '{name}': no such data set in {path}",
                        f"It holds: {', '.join(_dataset_names(file)) or 'none'}. Set {key} to one of them.",
                    )
                found.append(dataset)
                if (one := _rows_of(dataset)) != (first := _rows_of(found[0])):
                    raise UserError(
                        f"the files of data.file disagree: {name} is {one} in {path} and {first} in {self.paths[0]}",
                        "Files of one data set hold equal samples: prepare those that differ again, or name fewer.",
                    )
        return found

    def reader(self, name: str, key: str, memory_bytes: int | None = None) -> Reader:
        """Data set `name` of all files as one; memory_bytes: its part, where it is not all. Raises `UserError`."""
        parts = list(zip(self.paths, self.datasets(name, key), strict=True))
        return join(parts, self.memory_bytes if memory_bytes is None else memory_bytes, self.num_threads)

    def scale(self, name: str) -> tuple[float, float]:
        """What stored values of data set `name` mean (see `Batch`), alike in all files. Raises `UserError`."""
        found = [scale_and_offset(dataset) for dataset in self.datasets(name, "data")]
        for path, each in zip(self.paths, found, strict=True):
            if each != found[0]:
                raise UserError(
                    f"the files of data.file disagree: {name} has scale_factor, add_offset {each} in {path}"
                    f" and {found[0]} in {self.paths[0]}",
                    "Stored values must mean the same in all files of a data set.",
                )
        return found[0]

    def require_same_scale(self, name: str, other: str) -> None:
        """Raises `UserError` where stored numbers of data set `other` mean something else than those of `name`."""
        one, two = self.datasets(name, "data.inputs")[0], self.datasets(other, "data.test_inputs")[0]
        if why := scale_mismatch(one.dtype, scale_and_offset(one), two.dtype, scale_and_offset(two)):
            raise UserError(
                f"{self.paths[0]}: {name} and {other} disagree, so that a model would be tested on other values: {why}",
                "Stored numbers must mean the same in both: set the attributes alike, or prepare the file again.",
            )

    @property
    def tokenizer_attributes(self) -> dict[str, Any]:
        """What a prepared text says of its tokens: tokenizer, vocab_size and, of one that was learned, its json."""
        file = self.opened[0]
        with damage_as_user_error(self.paths[0], "what it says of its tokens"):
            facts = {name: file.attrs[name] for name in ("tokenizer", "vocab_size") if name in file.attrs}
            json = find(file, "tokenizer")
            if json is not None and (why := impossible_size(json, self.paths[0].stat().st_size)):
                raise ValueError(f"tokenizer {why}")
            return facts | ({"json": bytes(json[:]).decode()} if json is not None else {})


def open_files(config: Config, context: Context, example: str = "mnist-5k") -> Files:
    """Opens the job's data. example: what `hpc-train prepare` could make, for a message. Raises `UserError`."""
    paths = data_paths(config)
    _have_room(len(paths))
    opened = [_open(path, example) for path in paths]
    return Files(paths, opened, chunk_cache_bytes(config), num_decode_threads(context), ChangeCheck(paths))


def _have_room(num_files: int) -> None:
    """Raises the soft limit of open files, as far as the hard one lets it, for `num_files` and maps of their data."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS_A_FILE * num_files + _OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def chunk_cache_bytes(config: Config) -> int:
    """Bytes for decoded chunks: two thirds of data.memory_mb, as batches on their way and decoders take some, too."""
    return (config.data.memory_mb << 20) * 2 // 3


def num_decode_threads(context: Context) -> int:
    """How many threads this rank may decode chunks with: the cores that are its own."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, (os.cpu_count() or 1) // context.world.local_size))


def require_parallel_hdf5() -> None:
    """Raises `UserError` where this h5py cannot open a file by several ranks, or by another MPI than ours."""
    if not h5py.get_config().mpi:
        raise UserError(
            "this h5py was built without MPI, and there are several ranks",
            "Run `make install`, which builds it with MPI, or start one rank.",
        )
    require_one_mpi("h5py", h5py.defs.__file__)


def select_rows(dataset: h5py.Dataset, runs: Sequence[tuple[int, int]]) -> tuple[Any, Any]:
    """(what of the file, what of memory) a transfer of `runs` of rows, (first, number) each, is about; maybe of none.

    For collective transfers: h5py's own indexing leaves out a rank with no rows, and the others would wait for ever.
    """
    space, rest = dataset.id.get_space(), tuple(dataset.shape[1:])
    space.select_none()
    for first, number in runs:
        space.select_hyperslab((first, *(0 for _ in rest)), (number, *rest), op=h5py.h5s.SELECT_OR)
    num_rows = sum(number for _, number in runs)
    memory = h5py.h5s.create_simple((max(1, num_rows), *rest))
    if not num_rows:
        memory.select_none()
    return space, memory


def transfer_properties(collective: bool) -> Any:
    """How rows travel: by all ranks together, or by each alone."""
    found = h5py.h5p.create(h5py.h5p.DATASET_XFER)
    if collective:
        found.set_dxpl_mpio(h5py.h5fd.MPIO_COLLECTIVE)
    return found


def describe(files: Files, name: str, reader: Reader) -> str:
    """What is read, from where, in which way and why: a line for the log."""
    num_bytes = int(np.prod(reader.shape, dtype=np.int64)) * reader.dtype.itemsize
    where = str(files.paths[0]) if len(files.paths) == 1 else f"{len(files.paths)} files, {files.paths[0]} the first"
    shape = "x".join(map(str, reader.shape[1:])) or "numbers"
    return (
        f"{name} of {where} ({file_system(files.paths[0])}): {len(reader):,} x {shape} {reader.dtype}, "
        f"{num_bytes / 1e6:,.1f} MB, {reader.description}"
    )


def find(file: h5py.File, name: str) -> h5py.Dataset | None:
    """Data set `name` of this file. Raises `UserError` for a link into another one."""
    place: Any = file
    for part in name.strip("/").split("/"):
        link = place.get(part, getlink=True) if isinstance(place, h5py.Group) else None
        if isinstance(link, h5py.ExternalLink):
            raise UserError(
                f"{file.filename}: {name} is a link to another file, {link.filename}",
                "Name that file in data.file, or copy the data set: a link says nothing of what it will find.",
            )
        place = place[part] if link is not None else None
    return place if isinstance(place, h5py.Dataset) else None


def _open(path: Path, example: str) -> h5py.File:
    if why := not_a_file(path):
        remedy = f"Make it: hpc-train prepare {example} {path}" if "not exist" in why else "Name an HDF5 file."
        raise UserError(f"data.file = '{path}' {why}", remedy)
    try:
        file = h5py.File(path, "r")
    except HDF5_ERRORS as error:
        what, remedy = explain_open_failure(error)
        raise UserError(f"data.file = '{path}' {what}", remedy) from None
    with damage_as_user_error(path, "attribute complete"):
        is_complete = bool(np.all(file.attrs.get("complete", True)))
    if not is_complete:
        raise UserError(f"data.file = '{path}' was never completed: its writer was stopped", "Prepare it again.")
    return file


def _rows_of(dataset: h5py.Dataset) -> str:
    """Type and shape of its rows, whose number may differ."""
    return f"{dataset.dtype} {('n', *(dataset.shape or ())[1:])}".replace("'", "")


def _dataset_names(file: h5py.File) -> list[str]:
    names: list[str] = []
    with suppress(*HDF5_ERRORS):  # of a damaged file, what is found before that
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names[:20]
