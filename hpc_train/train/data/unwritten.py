"""Rows that nobody wrote, as a writer leaves them that was stopped or that made room for more: HDF5 reads fill values.

A model would learn that zeros are class 0. Chunks that are not in the file are known never to have been written. Within
written storage, the rows at the end that hold nothing but fill values are taken for unwritten.
"""

from functools import partial
from itertools import product
from pathlib import Path

import h5py
import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.settings import Data
from hpc_train.train.comm.context import Context
from hpc_train.train.data.dataset import Part
from hpc_train.train.data.files import Files
from hpc_train.train.data.hdf5_faults import damage_as_user_error

_NUM_COMPARED = 256  # rows before the end: if one of them holds fill values alone, such rows are data
_LEAST_AT_END = 2  # samples and targets of fill values
_LEAST_SAMPLES_AT_END, _LEAST_SHARE_AT_END = 16, 0.01  # of fill values, with targets that are none
_READ_BYTES = 16 << 20
REMEDY = "Write them, or make the data sets shorter. With samples and targets, data.missing = 'drop' leaves them out."


def leave_out_unwritten(parts: list[Part], data: Data, context: Context) -> tuple[list[Part], str]:
    """Collective. The parts without rows that nobody wrote, and what was done.

    Raises `UserError` if there are some and data.missing is "refuse".
    """
    written, said = zip(*(_without(part, data, context) for part in parts), strict=True)
    return list(written), "; ".join(filter(None, said))


def _without(part: Part, data: Data, context: Context) -> tuple[Part, str]:
    rows = context.on_root(partial(_find, part.files, (part.inputs, part.targets), data.missing == "refuse"))
    if not len(rows):
        return part, ""
    num = len(part.split)
    said = f"{len(rows):,} of {num:,} samples of {part.inputs} are left out, as they were never written"
    return part.having(part.split.select(np.delete(np.arange(num), rows))), said


def _find(files: Files, names: tuple[str, str], refuses: bool) -> np.ndarray:
    """Rows over all files. Raises `UserError` for the first ones if `refuses`, and if no other rows are left."""
    found, begin = [np.zeros(0, np.int64)], 0
    for path, inputs, targets in zip(files.paths, *(files.datasets(name, "data") for name in names), strict=True):
        if refuses:
            require_written(path, inputs, targets)
        found.append(begin + unwritten_rows(path, inputs, targets))
        begin += len(inputs)
    rows = np.concatenate(found)
    if len(rows) == begin:
        raise UserError(
            f"{files.paths[0]}: none of the {begin:,} samples of {names[0]} was ever written", "Prepare the file again."
        )
    return rows


def require_written(path: Path, *datasets: h5py.Dataset) -> None:
    """Raises `UserError` if rows of samples and targets, or of other data sets, were never written."""
    for dataset in datasets:
        rows = rows_without_chunks(path, dataset)
        if len(rows):
            raise _refused(path, dataset.name, rows, len(dataset), f"were never written: they read as {_fill(dataset)}")
    if len(datasets) == 2:
        rows = rows_of_fill_values(path, *datasets)
        if len(rows):
            samples, targets = (dataset.name.strip("/") for dataset in datasets)
            what = f"hold the fill value {_fill(datasets[0])} alone, as if never written; see {targets} beside them"
            raise _refused(path, samples, rows, len(datasets[0]), what)


def _refused(path: Path, name: str, rows: np.ndarray, num_rows: int, what: str) -> UserError:
    return UserError(
        f"{path}: {len(rows):,} of {num_rows:,} rows of {name.strip('/')}, {rows[0]:,} to {rows[-1]:,}, {what}", REMEDY
    )


def _fill(dataset: h5py.Dataset) -> str:
    fill = np.ravel(dataset.fillvalue)
    return f"{fill[0]:g}" if fill.dtype.kind in "biuf" else "empty text"


def unwritten_rows(path: Path, inputs: h5py.Dataset, targets: h5py.Dataset) -> np.ndarray:
    """The rows that were never written in one or the other, increasing."""
    without = [rows_without_chunks(path, dataset) for dataset in (inputs, targets)]
    return np.unique(np.concatenate([*without, rows_of_fill_values(path, inputs, targets)]))


def rows_without_chunks(path: Path, dataset: h5py.Dataset) -> np.ndarray:
    """The rows of which the file lacks a chunk, increasing. A virtual data set has none: its sources do."""
    none = np.zeros(0, np.int64)
    if dataset.chunks is None or dataset.is_virtual or not dataset.size:
        return none
    with damage_as_user_error(path, f"the chunks of {dataset.name}"):
        starts = [range(0, size, step) for size, step in zip(dataset.shape, dataset.chunks, strict=True)]
        if dataset.id.get_num_chunks() >= np.prod([len(each) for each in starts]):
            return none
        rows = []
        for first in starts[0]:
            corners = ((first, *inner) for inner in product(*starts[1:]))
            if any(not dataset.id.get_chunk_info_by_coord(corner).size for corner in corners):
                rows.append(np.arange(first, min(first + dataset.chunks[0], len(dataset))))
    return np.concatenate(rows) if rows else none


def rows_of_fill_values(path: Path, inputs: h5py.Dataset, targets: h5py.Dataset) -> np.ndarray:
    """The last rows, if they hold nothing but fill values, and of those looked at before them none does."""
    with damage_as_user_error(path, f"the last rows of {inputs.name}"):
        num_rows = len(inputs)
        if num_rows == 0 or len(targets) != num_rows or inputs.dtype.kind not in "biuf":
            return np.zeros(0, np.int64)
        first = _first_of_fill_at_end(inputs)
        least = max(_LEAST_SAMPLES_AT_END, int(_LEAST_SHARE_AT_END * num_rows))
        if num_rows - first < least:
            first = max(first, _first_of_fill_at_end(targets, num_rows - first))
            least = _LEAST_AT_END
        if first == 0 or num_rows - first < least:
            return np.zeros(0, np.int64)
        compared = np.unique(np.linspace(0, first - 1, _NUM_COMPARED).astype(np.int64))
        if any(_is_fill(inputs, row, row + 1).all() for row in compared.tolist()):
            return np.zeros(0, np.int64)
    return np.arange(first, num_rows)


def _first_of_fill_at_end(dataset: h5py.Dataset, at_most: int | None = None) -> int:
    """The first of the last rows, `at_most` so many, that hold fill values alone; the number of rows if none does."""
    num_rows, size = len(dataset), 1
    row_bytes = max(1, dataset.dtype.itemsize * int(np.prod(dataset.shape[1:])))
    lowest = 0 if at_most is None else num_rows - at_most
    stop = num_rows
    while stop > lowest:
        begin = max(lowest, stop - size)
        is_other = np.flatnonzero(~_is_fill(dataset, begin, stop))
        if len(is_other):
            return begin + int(is_other[-1]) + 1
        stop, size = begin, min(2 * size, max(1, _READ_BYTES // row_bytes))
    return lowest


def _is_fill(dataset: h5py.Dataset, begin: int, stop: int) -> np.ndarray:
    """(stop - begin,) whether each row holds fill values alone."""
    values = np.asarray(dataset[begin:stop])
    fill = dataset.fillvalue
    is_fill = values == (b"" if values.dtype.kind in "OS" and not fill else fill)
    if values.dtype.kind == "f" and np.isnan(fill):
        is_fill = np.isnan(values)
    return np.asarray(is_fill.reshape(len(values), -1).all(axis=1))
