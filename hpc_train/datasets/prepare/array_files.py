"""Files of arrays, HDF5, netCDF and Zarr, as a file that trains: renamed, cast, in part, in other chunks and filters.

Each rank reads the rows that it writes. A stored number s of an array with the attributes scale_factor and add_offset
(CF conventions) means s * scale_factor + add_offset: the attributes are copied, or applied where the array is cast to
floats. What stands for no value becomes NaN then.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.missing_values import declared_missing, is_missing
from hpc_train.datasets.prepare.categories import find_categories, numbers_of
from hpc_train.datasets.prepare.sources import Array, Options, Source, state_of
from hpc_train.datasets.prepare.tables import split_arrays
from hpc_train.train.comm.context import Context
from hpc_train.train.data.hdf5_faults import HDF5_ERRORS, damage_as_user_error, explain_open_failure, not_a_file

_CACHE_BYTES = 64 << 20  # of decoded chunks: neighbouring reads meet the same ones
_COPIED = ("scale_factor", "add_offset", "units", "long_name", "standard_name")
_CLASSIC = (b"CDF\x01", b"CDF\x02", b"CDF\x05")  # the first bytes of netCDF-3
_MAX_LISTED = 20
_TITLES = {"hdf5": "HDF5", "netcdf": "netCDF", "zarr": "Zarr"}
_ROWS = "Write --rows START:STOP or START:STOP:STEP, as Python does, with a positive step: --rows 0:1000"


@dataclass(frozen=True)
class StoredArray:
    """An array of a file. values: anything that takes slices of rows. file: kept open as long as they are read."""

    values: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    attributes: Mapping[str, Any]
    is_netcdf: bool = False
    file: Any = None

    @property
    def is_text(self) -> bool:
        return self.dtype.kind in "OSUT" and len(self.shape) == 1


@dataclass(frozen=True)
class _Wanted:
    """An array of the new file: its name, which one it is made of, and its type if it is cast."""

    name: str
    stored: str
    dtype: np.dtype | None


def source(kind: str, path: Path, options: Options, context: Context) -> Source:
    """Collective. The arrays of the file at `path`, or those of options.arrays: "NEW=NAME" or "NEW=NAME:TYPE".

    options.rows: which rows of each array, as a slice. Raises `UserError`.
    """
    stored = context.on_all(lambda: open_arrays(kind, path))
    wanted = context.on_all(lambda: _wanted(path, stored, options.arrays))
    rows = context.on_all(lambda: _slice(options.rows))
    categories, arrays = dict[str, list[str]](), dict[str, Array]()
    for each in wanted:
        found = stored[each.stored]
        if found.is_text:
            what, remedy = f"{path}: {each.stored}", "They name no classes: leave the array out, or write numbers."
            read = partial(_texts, found, range(*rows.indices(found.shape[0])))
            num_rows = len(range(*rows.indices(found.shape[0])))
            categories[each.name] = find_categories(read, num_rows, what, remedy, context)
            codes = partial(_codes, read, categories[each.name], path, each.stored)
            arrays[each.name] = Array((num_rows,), np.dtype(np.int64), codes, {})
        else:
            arrays[each.name] = _array(path, each, found, rows)
    facts: dict[str, Any] = {"arrays": ", ".join(f"{each.name}={each.stored}" for each in wanted)}
    facts |= {"rows": options.rows} if options.rows else {}
    facts |= {"categories": json.dumps(categories)} if categories else {}
    parts = context.on_all(lambda: split_arrays(path.name, arrays, options.test_fraction))
    state = context.on_root(lambda: state_of([path, path / "zarr.json"] if kind == "zarr" else [path]))
    return Source(f"{_TITLES[kind]} {path.name}", str(path), "see its source", parts, facts, state=state)


# ---------------------------------------------------------------------------------------------- which arrays and rows


def _wanted(path: Path, stored: dict[str, StoredArray], words: tuple[str, ...]) -> list[_Wanted]:
    listed = ", ".join(f"{name} {each.dtype} {each.shape}" for name, each in list(stored.items())[:_MAX_LISTED])
    if not words:
        usable = [name for name, each in stored.items() if each.dtype.kind in "biuf" or each.is_text]
        if not {"inputs", "train/inputs"} & set(usable):
            raise UserError(
                f"{path} holds {listed or 'no arrays'}: none is called inputs or train/inputs",
                "Say which is which: --array inputs=NAME --array targets=NAME, or train/inputs=NAME and so on.",
            )
        return [_Wanted(name, name, None) for name in usable]
    wanted = []
    for word in words:
        new, _, old = word.partition("=")
        name, _, kind = old.rpartition(":") if old not in stored and ":" in old else (old, "", "")
        if not new or name not in stored:
            raise UserError(
                f"prepare: --array {word}: {path} holds no array {name!r}",
                f"It holds {listed or 'none'}. Write --array NEW=NAME or NEW=NAME:TYPE, such as inputs=x:float32.",
            )
        wanted.append(_Wanted(new.strip("/"), name, _type(word, kind)))
    names = [each.name for each in wanted]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"prepare: --array {repeated}=... is given more than once", "Give each name once.")
    return wanted


def _type(word: str, kind: str) -> np.dtype | None:
    if not kind:
        return None
    try:
        dtype = np.dtype(kind)
    except TypeError:
        dtype = np.dtype(object)
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise UserError(
            f"prepare: --array {word}: {kind} is no type of numbers", "Write uint8, int64, float32 or such."
        )
    return dtype


def _slice(rows: str | None) -> slice:
    if rows is None:
        return slice(None)
    try:
        found = slice(*(int(word) if word.strip() else None for word in rows.split(":")))
        if rows.count(":") not in (1, 2) or (found.step is not None and found.step < 1):
            raise ValueError(rows)
    except (ValueError, TypeError):
        raise UserError(f"prepare: --rows {rows} are no rows", _ROWS) from None
    return found


# ---------------------------------------------------------------------------------------------- reading


def _array(path: Path, wanted: _Wanted, stored: StoredArray, rows: slice) -> Array:
    if stored.dtype.kind not in "biuf" or not stored.shape or stored.dtype.itemsize > 8:
        raise UserError(
            f"{path}: {wanted.stored} is {stored.dtype} {stored.shape}, and no rows of numbers",
            "Leave it out: --array names those that are copied.",
        )
    chosen = range(*rows.indices(stored.shape[0]))
    shape = (len(chosen), *stored.shape[1:])
    native = stored.dtype.newbyteorder("=")
    missing = sorted(declared_missing(stored.attributes, stored.dtype, stored.is_netcdf))
    attributes = {name: stored.attributes[name] for name in _COPIED if name in stored.attributes}
    read = partial(_rows, path, wanted.stored, stored, chosen)
    if wanted.dtype is None:
        if missing:  # of netCDF-4, whose own fill value no attribute declares
            attributes |= {"_FillValue": native.type(missing[0]), "missing_value": np.array(missing, native)}
        return Array(shape, native, read, attributes)
    if wanted.dtype.kind == "f":
        kept = {name: value for name, value in attributes.items() if name not in ("scale_factor", "add_offset")}
        scale = float(attributes.get("scale_factor", 1.0)), float(attributes.get("add_offset", 0.0))
        return Array(shape, wanted.dtype, partial(_meant, read, scale, tuple(missing), wanted.dtype), kept)
    return Array(shape, wanted.dtype, partial(_whole, path, wanted.stored, read, wanted.dtype), attributes)


def _rows(path: Path, name: str, stored: StoredArray, chosen: range, start: int, stop: int) -> np.ndarray:
    some = chosen[start:stop]
    if not len(some):
        return np.empty((0, *stored.shape[1:]), stored.dtype.newbyteorder("="))
    with damage_as_user_error(path, name):
        values = np.asarray(stored.values[some.start : some.stop : some.step])
    return values.astype(stored.dtype.newbyteorder("="), copy=False)


def _meant(
    read: Any, scale: tuple[float, float], missing: tuple[float, ...], dtype: np.dtype, start: int, stop: int
) -> np.ndarray:
    """The values that stored numbers mean, NaN for none."""
    values = read(start, stop)
    lacks = is_missing(values, missing)
    if scale != (1.0, 0.0):
        values = values.astype(np.float64) * scale[0] + scale[1]
    values = values.astype(dtype)
    values[lacks] = np.nan
    return np.asarray(values)


def _whole(path: Path, name: str, read: Any, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    values = read(start, stop)
    with np.errstate(invalid="ignore"):
        cast = values.astype(dtype)
    differs = (cast != values).reshape(len(values), -1).any(axis=1)
    if differs.any():
        row = int(np.argmax(differs))
        value = values[row][cast[row] != values[row]].ravel()[0] if values.ndim > 1 else values[row]
        raise UserError(
            f"{path}: {name} holds {value}, in row {start + row:,} of those chosen, which {dtype} cannot hold",
            f"Cast it to another type: --array NEW={name}:float32",
        )
    return np.asarray(cast)


def _texts(stored: StoredArray, chosen: range, start: int, stop: int) -> np.ndarray:
    some = chosen[start:stop]
    values = stored.values[some.start : some.stop : some.step]
    return np.array([each.decode(errors="replace") if isinstance(each, bytes) else str(each) for each in values], str)


def _codes(read: Any, categories: list[str], path: Path, name: str, start: int, stop: int) -> np.ndarray:
    if start == stop:
        return np.zeros(0, np.int64)
    numbers, unknown = numbers_of(read(start, stop), categories)
    if unknown is not None:
        raise UserError(f"{path}: {name} was changed while it was read", "Do not change it meanwhile, and try again.")
    return numbers.astype(np.int64)


# ---------------------------------------------------------------------------------------------- opening


def open_arrays(kind: str, path: Path) -> dict[str, StoredArray]:
    """All arrays of the file, by name. Raises `UserError`."""
    if kind == "zarr":
        return dict(_zarr_arrays(path))
    if why := not_a_file(path):
        raise UserError(f"--from {path} {why}", f"Name a {_TITLES[kind]} file.")
    is_classic = is_netcdf_3(path)
    if is_classic and kind == "hdf5":
        raise UserError(f"--from {path} is netCDF-3 and no HDF5", "prepare netcdf reads it.")
    return dict(_netcdf_3_arrays(path) if is_classic else _hdf5_arrays(path))


def kind_of(path: Path) -> str | None:
    """Which of `prepare`'s kinds of arrays a folder or file is; None for HDF5, which trains as it is, and others."""
    if path.is_dir():
        return "zarr" if any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zarray")) else None
    return "netcdf" if is_netcdf_3(path) else None


def is_netcdf_3(path: Path) -> bool:
    """Whether a file is in the classic format of netCDF, which is not HDF5."""
    with path.open("rb") as file:
        return file.read(4) in _CLASSIC


def _hdf5_arrays(path: Path) -> Iterator[tuple[str, StoredArray]]:
    try:
        file = h5py.File(path, "r", rdcc_nbytes=_CACHE_BYTES)
    except HDF5_ERRORS as error:
        what, remedy = explain_open_failure(error)
        raise UserError(f"--from {path} {what}", remedy) from None
    found: list[tuple[str, h5py.Dataset]] = []
    with damage_as_user_error(path, "its table of contents"):
        file.visititems(lambda name, item: found.append((name, item)) if isinstance(item, h5py.Dataset) else None)
    is_netcdf = "_NCProperties" in file.attrs
    for name, dataset in found:
        if name.startswith("checksums/") or b"This is a netCDF dimension" in bytes(dataset.attrs.get("NAME", b"")):
            continue
        with damage_as_user_error(path, f"attributes of {name}"):
            attributes = {
                key: dataset.attrs[key] for key in (*_COPIED, "_FillValue", "missing_value") if key in dataset.attrs
            }
        plain = {key: value[0] if np.shape(value) == (1,) else value for key, value in attributes.items()}
        yield name, StoredArray(dataset, dataset.shape or (), dataset.dtype, plain, is_netcdf)


def _netcdf_3_arrays(path: Path) -> Iterator[tuple[str, StoredArray]]:
    from scipy.io import netcdf_file

    try:
        file = netcdf_file(path, "r", mmap=True)
    except (OSError, ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise UserError(f"--from {path} cannot be read: {error}", "Restore it, or write it again.") from None
    for name, variable in file.variables.items():
        values, attributes = variable.data, variable._attributes  # netcdf_file has no other way to all attributes
        yield name, StoredArray(values, values.shape, values.dtype, attributes, is_netcdf=True, file=file)


def _zarr_arrays(path: Path) -> Iterator[tuple[str, StoredArray]]:
    try:
        import zarr
    except ImportError:
        raise UserError(f"--from {path} needs zarr, which cannot be found", "pip install 'zarr>=3'") from None
    if not path.is_dir():
        raise UserError(f"--from {path} is no folder", "Name a Zarr group or array: --from x.zarr")
    try:
        opened = zarr.open(path, mode="r")
        members = [("inputs", opened)] if isinstance(opened, zarr.Array) else list(opened.members(max_depth=None))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--from {path} cannot be read: {error}", "Name a Zarr group or array.") from None
    for name, array in sorted(members, key=lambda member: member[0]):
        if isinstance(array, zarr.Array):
            yield name, StoredArray(array, array.shape, np.dtype(array.dtype), dict(array.attrs))
