"""What HDF5 files hold and how it lies in them: plain facts, found without reading a value."""

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
from hpc_train.train.data.filters import filter_names, open_pipeline
from hpc_train.train.data.foreign_files import (
    HDF5_ERRORS,
    absurd_claim,
    cannot_open,
    meaning_of,
    not_a_file,
    other_meaning,
    reason_of,
)

CHECKSUMS = "checksums"
_REMARKABLE = ("scale_factor", "add_offset", "block_rows", "algorithm")
_LEVELS = {"gzip": 0, "zstd": 0, "blosc": 4, "blosc2": 4, "bzip2": 0}  # which of a filter's numbers is its level
_LISTED = 20
_RESTORE = "Restore the file, or prepare it again."


@dataclass(frozen=True)
class Fault:
    """Something wrong in a file. dataset: "" of the file itself. samples: first and last. number: of a `unit`."""

    kind: str
    file: str
    dataset: str
    what: str
    remedy: str = ""
    unit: str = ""  # chunk, block or rows
    number: int | None = None
    samples: tuple[int, int] | None = None

    def __str__(self) -> str:
        where = [self.file, self.dataset] if self.dataset else [self.file]
        if self.samples is not None:
            first, last = self.samples
            number = f"{self.unit} {self.number:,}, " if self.number is not None else ""
            where.append(f"{number}sample{'s' * (first != last)} {first:,}" + f" to {last:,}" * (first != last))
        return f"{': '.join(where)}: {self.what}" + f"\n  {self.remedy}" * bool(self.remedy)


@dataclass(frozen=True)
class Found:
    """A data set of a file. layout: contiguous, chunked, virtual, external, compact, or empty (nothing was written).

    offset: in the file, of a contiguous one. filters: in the order in which they were applied, with their level.
    stored_bytes: in the file. block_rows: of the checksums beside it; None without.
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
    sources: tuple[str, ...] = ()  # of a virtual or an external one: the files that hold its values
    attributes: dict[str, Any] = field(default_factory=dict)

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
        return int(np.prod(self.chunk, dtype=np.int64)) * self.dtype.itemsize

    @property
    def meaning(self) -> Any:
        """(scale_factor, add_offset), as the file has them."""
        return self.attributes.get("scale_factor", 1.0), self.attributes.get("add_offset", 0.0)

    @property
    def is_numeric(self) -> bool:
        """Whether statistics can be made of it."""
        return self.dtype.kind in "biuf" and self.dtype.itemsize <= 8 and bool(self.shape)


@dataclass(frozen=True)
class Surveyed:
    """What a file holds: its data sets, what is wrong with it, and what it says of itself."""

    path: Path
    num_bytes: int
    datasets: tuple[Found, ...]
    faults: tuple[Fault, ...]
    attributes: dict[str, Any]


def expand(names: Sequence[str]) -> list[Path]:
    """The files that words of a command line name: patterns, and lists of them within one quoted word.

    Raises `UserError` for what is no file.
    """
    paths: list[Path] = []
    for word in names:
        for name in [word] if exists(expanded(word)) else word.split():
            path = expanded(name)
            is_pattern = has_magic(str(path)) and not exists(path)
            found = sorted(map(Path, glob(str(path)))) if is_pattern else [path]
            if not found:
                raise UserError(f"{name} matches no file", "* stands for any part of a name: data/part-*.h5")
            for each in found:
                if why := not_a_file(each):
                    example = f"{each}/*.h5" if "a folder" in why else "data/part-*.h5"
                    raise UserError(f"{each} {why}", f"Name HDF5 files, or a pattern such as {example}")
            paths += [each for each in found if each not in paths]
    if not paths:
        raise UserError("no file is named", "Name HDF5 files, or a pattern such as data/part-*.h5")
    return paths


def survey(path: Path) -> Surveyed:
    """What `path` holds. What is wrong with the file is in `faults`.

    Raises `UserError` where it may not be read, or is locked: that says nothing of the file.
    """
    faults: list[Fault] = []
    datasets: list[Found] = []
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
        what, remedy = cannot_open(error)
        if "locked" in what:
            raise UserError(f"{path} {what}", remedy) from None
        if datasets or attributes or not isinstance(error, OSError):
            what, remedy = f"its table of contents cannot be read: {reason_of(error)}", _RESTORE
        faults.append(Fault("unreadable", str(path), "", what, remedy))
    return Surveyed(path, path.stat().st_size, tuple(datasets), tuple(faults), attributes)


def _walk(group: h5py.Group, path: Path, datasets: list[Found], faults: list[Fault], above: frozenset[int]) -> None:
    """Goes through a group and those in it; a link back to one `above` it is not followed."""
    address = h5py.h5o.get_info(group.id).addr
    if address in above:
        return
    for name in group:
        full = f"{group.name}/{name}".strip("/")
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            what = f"is a link to another file, {link.filename}, and is not followed"
            remedy = "Name that file, or copy the data set into this one: a link says nothing of what it will find."
            faults.append(Fault("external", str(path), full, what, remedy))
            continue
        try:
            item = group[name]
        except HDF5_ERRORS as error:
            what = "is a link to nothing" if isinstance(link, h5py.SoftLink) else f"cannot be read: {reason_of(error)}"
            faults.append(Fault("unreadable", str(path), full, what, _RESTORE))
            continue
        if isinstance(item, h5py.Group):
            if full == CHECKSUMS:
                continue
            _walk(item, path, datasets, faults, above | {address})
        elif isinstance(item, h5py.Dataset):
            found = _found(item, path, full)
            datasets.append(found)
            faults += _faults_of(item, found)


def _found(dataset: h5py.Dataset, path: Path, name: str) -> Found:
    plist = dataset.id.get_create_plist()
    sources: list[str] = []
    if dataset.is_virtual:
        layout = "virtual"
        sources = sorted({source.file_name for source in dataset.virtual_sources()})
    elif dataset.external:
        layout, sources = "external", [str(entry[0]) for entry in dataset.external]
    elif dataset.chunks is not None:
        layout = "chunked"
    elif plist.get_layout() == h5py.h5d.COMPACT:
        layout = "compact"
    else:
        layout = "contiguous" if dataset.id.get_offset() is not None else "empty"
    beside = dataset.file.get(f"{CHECKSUMS}/{name}")
    return Found(
        path=path,
        name=name,
        shape=dataset.shape if dataset.shape is not None else (0,),
        dtype=dataset.dtype,
        layout=layout,
        stored_bytes=dataset.id.get_storage_size(),
        offset=dataset.id.get_offset() if layout == "contiguous" else None,
        chunk=tuple(dataset.chunks or ()),
        filters=tuple(_filter_words(dataset)),
        block_rows=int(beside.attrs.get("block_rows", 0)) if isinstance(beside, h5py.Dataset) else None,
        sources=tuple(sources),
        attributes={key: _plain(dataset.attrs[key]) for key in _REMARKABLE if key in dataset.attrs},
    )


def _filter_words(dataset: h5py.Dataset) -> Iterator[str]:
    """gzip 4, shuffle, ...: the filters as people call them."""
    plist = dataset.id.get_create_plist()
    numbers = [plist.get_filter(number)[2] for number in range(plist.get_nfilters())]
    for name, values in zip(filter_names(plist), numbers, strict=True):
        place = _LEVELS.get(name)
        yield f"{name} {values[place]}" if place is not None and len(values) > place else name


def _faults_of(dataset: h5py.Dataset, found: Found) -> Iterator[Fault]:
    """What can be seen without reading: values in other files, a missing filter, values never written."""
    file, name = str(found.path), found.name
    if found.layout == "external":
        what = f"its values lie in other files ({found.sources[0]}), which are not read"
        yield Fault("external", file, name, what, "Copy them into one HDF5 file: h5repack, or h5py's Group.copy.")
    for source in found.sources if found.layout == "virtual" else ():
        if source != "." and "%b" not in source and not (found.path.parent / source).is_file():
            what = f"takes values from {source}, which does not exist: they would be read as fill values"
            yield Fault("missing", file, name, what, "Put that file where it was, or make the data set again.")
    if why := absurd_claim(dataset, found.path.stat().st_size):
        yield Fault("absurd", file, name, why, _RESTORE)
    elif found.num_bytes and (found.layout == "empty" or (found.layout == "chunked" and not found.stored_bytes)):
        yield Fault("empty", file, name, "was never written: it reads as its fill value", "Prepare the file again.")
    if found.is_numeric:
        try:
            meaning_of(dataset)
        except UserError as error:
            yield Fault("meaning", file, name, error.what.partition(": ")[2], error.remedy)
    if found.block_rows is not None and found.block_rows < 1:
        what = f"its checksums have no attribute block_rows: {CHECKSUMS}/{name} is of no use"
        yield Fault("checksums", file, name, what, "Prepare the file again.")
    if found.layout == "chunked":
        try:
            open_pipeline(dataset)
        except UserError as error:
            yield Fault("filter", file, name, error.what.partition(f"{dataset.name} ")[2], error.remedy)


def disagreements(files: Sequence[Surveyed]) -> Iterator[Fault]:
    """Where files that are one data set hold data sets of different names, shapes, types or meanings."""
    whole = [file for file in files if file.datasets]
    if len(whole) < 2:
        return
    remedy = "Files of one data set hold equal samples: prepare those that differ again, or name fewer files."
    first = whole[0]
    theirs = {found.name: found for found in first.datasets}
    for file in whole[1:]:
        mine = {found.name: found for found in file.datasets}
        for name in sorted(theirs.keys() ^ mine.keys()):
            there, here = (first.path, file.path) if name in theirs else (file.path, first.path)
            yield Fault("disagree", str(file.path), name, f"is in {there} and not in {here}", remedy)
        for name in sorted(theirs.keys() & mine.keys()):
            if (one := _kind_of(theirs[name])) != (other := _kind_of(mine[name])):
                yield Fault("disagree", str(file.path), name, f"is {other} here and {one} in {first.path}", remedy)
        for key in ("vocab_size", "tokenizer"):
            if first.attributes.get(key) != file.attributes.get(key):
                what = f"{key} is {file.attributes.get(key)} here and {first.attributes.get(key)} in {first.path}"
                yield Fault("disagree", str(file.path), "", what, remedy)


def parts_that_disagree(file: Surveyed) -> Iterator[Fault]:
    """Where numbers stored in the part to test on mean something else than those in the part to train on."""
    by_name = {found.name: found for found in file.datasets if found.is_numeric}
    for name, found in by_name.items():
        part, _, rest = name.partition("/")
        train = by_name.get(f"train/{rest}")
        if part == "train" or train is None or len(found.shape) < 2:
            continue
        if why := other_meaning(train.dtype, train.meaning, found.dtype, found.meaning):
            what = f"means something else than {train.name} does: {why}"
            yield Fault("disagree", str(file.path), name, what, "Set the attributes alike, or prepare the file again.")


def _kind_of(found: Found) -> str:
    shape = ", ".join(["n", *map(str, found.shape[1:])])
    meaning = {key: value for key, value in found.attributes.items() if key in ("scale_factor", "add_offset")}
    return f"{found.dtype} ({shape})" + (f" {meaning}" if meaning else "")


def _plain(value: Any) -> Any:
    """An attribute as JSON has it."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist()) if value.size < _LISTED else f"{value.dtype} {value.shape}"
    return value if isinstance(value, str | int | float | bool | list | None) else str(value)
