"""The structure of HDF5 files: data sets, layouts, filters and attributes, found without reading a value."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob, has_magic
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.paths import exists, expanded
from hpc_train.datasets.inspect.faults import PREPARE_AGAIN, RESTORE, Fault
from hpc_train.train.data.filters import filter_names, open_pipeline
from hpc_train.train.data.hdf5_faults import (
    HDF5_ERRORS,
    error_text,
    explain_open_failure,
    impossible_size,
    not_a_file,
    scale_and_offset,
    scale_mismatch,
)

CHECKSUMS = "checksums"  # the group that holds a data set of CRC-32 values for each contiguous data set
_CF_ATTRIBUTES = ("scale_factor", "add_offset")
_SHOWN_ATTRIBUTES = (*_CF_ATTRIBUTES, "block_rows", "algorithm")
_BARE_DIMENSION = b"This is a netCDF dimension but not a netCDF variable"  # what the netCDF C library writes
_LEVEL_PARAMETER = {"gzip": 0, "zstd": 0, "blosc": 4, "blosc2": 4, "bzip2": 0}  # index of a filter's level
_MAX_LISTED = 20
_NAME_FILES = "Name HDF5 files, or a pattern such as data/part-*.h5"


@dataclass(frozen=True)
class DatasetInfo:
    """A data set in a file.

    layout: contiguous, chunked, virtual, external, compact, or empty (never written). offset: where a contiguous one
    begins in the file. filters: in the order in which they were applied, with their level. stored_bytes: in the file.
    block_rows: rows of each block that has a checksum; None without checksums. sources: the other files that hold the
    values of a virtual or external data set. is_coordinate: a dimension scale, the coordinates along an axis of others.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    layout: str
    stored_bytes: int
    offset: int | None = None
    chunk: tuple[int, ...] = ()
    filters: tuple[str, ...] = ()
    block_rows: int | None = None
    sources: tuple[str, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    is_coordinate: bool = False

    @property
    def group(self) -> str:
        """The part of the data: "train" of train/inputs."""
        return self.name.rpartition("/")[0]

    @property
    def base_name(self) -> str:
        """ "inputs" of train/inputs."""
        return self.name.rpartition("/")[2]

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        return prod(map(int, self.chunk)) * self.dtype.itemsize

    @property
    def num_chunks(self) -> tuple[int, ...]:
        """Along each dimension."""
        return tuple(-(-size // chunk) for size, chunk in zip(self.shape, self.chunk, strict=True))

    @property
    def compression_ratio(self) -> float | None:
        """Bytes of the values by bytes in the file; None where the file holds none of them."""
        return self.num_bytes / self.stored_bytes if self.stored_bytes and self.layout != "virtual" else None

    @property
    def meaning(self) -> Any:
        """(scale_factor, add_offset) as the file has them (CF conventions)."""
        return self.attributes.get("scale_factor", 1.0), self.attributes.get("add_offset", 0.0)

    @property
    def is_numeric(self) -> bool:
        return self.dtype.kind in "biuf" and self.dtype.itemsize <= 8 and bool(self.shape)


@dataclass(frozen=True)
class FileStructure:
    """The data sets and attributes of a file, and the faults that are visible without reading values."""

    path: Path
    num_bytes: int
    datasets: tuple[DatasetInfo, ...]
    faults: tuple[Fault, ...]
    attributes: dict[str, Any]


def expand(names: Sequence[str]) -> list[Path]:
    """The files that command-line words name. A quoted word may hold a pattern, or several of them.

    Raises `UserError` for anything that is not a file.
    """
    paths: list[Path] = []
    for word in names:
        for name in [word] if exists(expanded(word)) else word.split():
            paths += [path for path in _matches(name) if path not in paths]
    if not paths:
        raise UserError("no file is named", _NAME_FILES)
    return paths


def _matches(name: str) -> list[Path]:
    path = expanded(name)
    is_pattern = has_magic(str(path)) and not exists(path)
    found = sorted(map(Path, glob(str(path)))) if is_pattern else [path]
    if not found:
        raise UserError(f"{name} matches no file", "* stands for any part of a name: data/part-*.h5")
    for each in found:
        if why := not_a_file(each):
            remedy = f"Name HDF5 files, or a pattern such as {each}/*.h5" if "a folder" in why else _NAME_FILES
            raise UserError(f"{each} {why}", remedy)
    return found


def read_structure(path: Path) -> FileStructure:
    """The structure of the file `path`; its `faults` say what is wrong with it.

    Raises `UserError` if the file may not be read or is locked: this says nothing about its content.
    """
    faults: list[Fault] = []
    datasets: list[DatasetInfo] = []
    attributes: dict[str, Any] = {}
    try:
        with path.open("rb"), h5py.File(path, "r") as file:
            attributes = {name: _plain(value) for name, value in file.attrs.items()}
            if not attributes.get("complete", True):
                what = "was never completed: its writer was stopped"
                faults.append(Fault("incomplete", str(path), "", what, "Prepare it again."))
            _walk(file, path, datasets, faults, frozenset())
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "Look at its permissions.") from None
    except HDF5_ERRORS as error:
        what, remedy = explain_open_failure(error)
        if "locked" in what:
            raise UserError(f"{path} {what}", remedy) from None
        if datasets or attributes or not isinstance(error, OSError):
            what, remedy = f"its table of contents cannot be read: {error_text(error)}", RESTORE
        faults.append(Fault("unreadable", str(path), "", what, remedy))
    return FileStructure(path, path.stat().st_size, tuple(datasets), tuple(faults), attributes)


def _walk(
    group: h5py.Group, path: Path, datasets: list[DatasetInfo], faults: list[Fault], above: frozenset[int]
) -> None:
    """Adds what `group` holds to `datasets` and `faults`. A link back to a group `above` it is not followed."""
    address = h5py.h5o.get_info(group.id).addr
    if address in above:
        return
    for name in group:
        full = f"{group.name}/{name}".strip("/")
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            what = f"is a link to another file, {link.filename}, and is not followed"
            remedy = "Name that file, or copy the data set into this one: the file behind a link may change."
            faults.append(Fault("external", str(path), full, what, remedy))
            continue
        try:
            item = group[name]
        except HDF5_ERRORS as error:
            what = "is a link to nothing" if isinstance(link, h5py.SoftLink) else f"cannot be read: {error_text(error)}"
            faults.append(Fault("unreadable", str(path), full, what, RESTORE))
            continue
        if isinstance(item, h5py.Dataset):
            if _is_bare_dimension(item):
                continue
            info = _dataset_info(item, path, full)
            datasets.append(info)
            faults += _structural_faults(item, info)
        elif isinstance(item, h5py.Group) and full != CHECKSUMS:
            _walk(item, path, datasets, faults, above | {address})


def _is_bare_dimension(dataset: h5py.Dataset) -> bool:
    """Whether it is a dimension of a netCDF-4 file and holds no values: nobody ever writes it."""
    try:
        return bytes(dataset.attrs.get("NAME", b"")).startswith(_BARE_DIMENSION)
    except (*HDF5_ERRORS, UnicodeError):  # an attribute of another type, or a damaged one
        return False


def _dataset_info(dataset: h5py.Dataset, path: Path, name: str) -> DatasetInfo:
    layout, sources = _layout(dataset)
    checksums = dataset.file.get(f"{CHECKSUMS}/{name}")
    return DatasetInfo(
        path=path,
        name=name,
        shape=dataset.shape if dataset.shape is not None else (0,),
        dtype=dataset.dtype,
        layout=layout,
        stored_bytes=dataset.id.get_storage_size(),
        offset=dataset.id.get_offset() if layout == "contiguous" else None,
        chunk=tuple(dataset.chunks or ()),
        filters=tuple(_filters_with_levels(dataset)),
        block_rows=int(checksums.attrs.get("block_rows", 0)) if isinstance(checksums, h5py.Dataset) else None,
        sources=sources,
        attributes={key: _plain(dataset.attrs[key]) for key in _SHOWN_ATTRIBUTES if key in dataset.attrs},
        is_coordinate=h5py.h5ds.is_scale(dataset.id),
    )


def _layout(dataset: h5py.Dataset) -> tuple[str, tuple[str, ...]]:
    """(layout, other files that hold the values)."""
    if dataset.is_virtual:
        return "virtual", tuple(sorted({source.file_name for source in dataset.virtual_sources()}))
    if dataset.external:
        return "external", tuple(str(entry[0]) for entry in dataset.external)
    if dataset.chunks is not None:
        return "chunked", ()
    if dataset.id.get_create_plist().get_layout() == h5py.h5d.COMPACT:
        return "compact", ()
    return ("contiguous" if dataset.id.get_offset() is not None else "empty"), ()


def _filters_with_levels(dataset: h5py.Dataset) -> Iterator[str]:
    """The filters by their usual names: "gzip 4", "shuffle"."""
    plist = dataset.id.get_create_plist()
    for number, name in enumerate(filter_names(plist)):
        parameters, level = plist.get_filter(number)[2], _LEVEL_PARAMETER.get(name)
        yield f"{name} {parameters[level]}" if level is not None and len(parameters) > level else name


def _structural_faults(dataset: h5py.Dataset, info: DatasetInfo) -> Iterator[Fault]:
    """Faults that are visible without reading: values in other files, a missing filter, values never written."""
    file, name = str(info.path), info.name
    if info.layout == "external":
        what = f"stores its values in other files ({info.sources[0]}), which are not read"
        yield Fault("external", file, name, what, "Copy them into one HDF5 file: h5repack, or h5py's Group.copy.")
    for source in info.sources if info.layout == "virtual" else ():
        # "." is this file; "%b" stands for a series of files, which may have gaps.
        if source != "." and "%b" not in source and not (info.path.parent / source).is_file():
            what = f"takes values from {source}, which does not exist: they would be read as fill values"
            yield Fault("missing", file, name, what, "Put that file where it was, or make the data set again.")
    if why := impossible_size(dataset, info.path.stat().st_size):
        yield Fault("absurd", file, name, why, RESTORE)
    elif info.num_bytes and (info.layout == "empty" or (info.layout == "chunked" and not info.stored_bytes)):
        yield Fault("empty", file, name, "was never written: it reads as its fill value", PREPARE_AGAIN)
    if info.is_numeric:
        try:
            scale_and_offset(dataset)
        except UserError as error:
            yield Fault("meaning", file, name, error.what.partition(": ")[2], error.remedy)
    if info.block_rows is not None and info.block_rows < 1:
        what = f"its checksums {CHECKSUMS}/{name} have no attribute block_rows, and cannot be used"
        yield Fault("checksums", file, name, what, PREPARE_AGAIN)
    if info.layout == "chunked":
        try:
            open_pipeline(dataset)
        except UserError as error:
            yield Fault("filter", file, name, error.what.partition(f"{dataset.name} ")[2], error.remedy)


def differences_between_files(files: Sequence[FileStructure]) -> Iterator[Fault]:
    """Files of one data set that hold data sets of different names, shapes, types or CF attributes."""
    files = [file for file in files if file.datasets]
    if not files:
        return
    remedy = "Files of one data set hold equal samples: prepare those that differ again, or name fewer files."
    first = files[0]
    expected = {info.name: info for info in first.datasets}
    for file in files[1:]:
        present = {info.name: info for info in file.datasets}
        for name in sorted(expected.keys() ^ present.keys()):
            there, here = (first.path, file.path) if name in expected else (file.path, first.path)
            yield Fault("disagree", str(file.path), name, f"is in {there} and not in {here}", remedy)
        for name in sorted(expected.keys() & present.keys()):
            if (one := _row_type(expected[name])) != (other := _row_type(present[name])):
                yield Fault("disagree", str(file.path), name, f"is {other} here and {one} in {first.path}", remedy)
        for key in ("vocab_size", "tokenizer"):
            if first.attributes.get(key) != file.attributes.get(key):
                what = f"{key} is {file.attributes.get(key)} here and {first.attributes.get(key)} in {first.path}"
                yield Fault("disagree", str(file.path), "", what, remedy)


def differences_from_train(file: FileStructure) -> Iterator[Fault]:
    """Data sets of other parts whose stored numbers mean something else than those to train on."""
    by_name = {info.name: info for info in file.datasets if info.is_numeric}
    for name, info in by_name.items():
        part, _, rest = name.partition("/")
        train = by_name.get(f"train/{rest}")
        if part == "train" or train is None or len(info.shape) < 2:
            continue
        if why := scale_mismatch(train.dtype, train.meaning, info.dtype, info.meaning):
            what = f"means something else than {train.name} does: {why}"
            yield Fault("disagree", str(file.path), name, what, "Set the attributes alike, or prepare the file again.")


def _row_type(info: DatasetInfo) -> str:
    shape = ", ".join(["n", *map(str, info.shape[1:])])
    meaning = {key: value for key, value in info.attributes.items() if key in _CF_ATTRIBUTES}
    return f"{info.dtype} ({shape})" + (f" {meaning}" if meaning else "")


def _plain(value: Any) -> Any:
    """An attribute's value in types that JSON has."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist()) if value.size < _MAX_LISTED else f"{value.dtype} {value.shape}"
    return value if isinstance(value, str | int | float | bool | list | None) else str(value)
