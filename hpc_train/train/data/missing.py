"""Values that a file declares as missing, and NaN: named, left out, or replaced by the mean.

CF conventions: a stored number equal to the attribute _FillValue or missing_value stands for no value. In netCDF-4
files, floats that nobody wrote have a value of their own without such an attribute.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from hpc_train.core.errors import UserError
from hpc_train.core.missing_values import declared_missing, is_missing
from hpc_train.core.sampling import rank_span
from hpc_train.core.settings import Data
from hpc_train.train.comm.context import Context, joint
from hpc_train.train.data.dataset import Filling, Part, Split
from hpc_train.train.data.files import Files
from hpc_train.train.data.hdf5_faults import damage_as_user_error
from hpc_train.train.data.moments import moments
from hpc_train.train.data.reader_interface import Reader

_SCAN_BYTES = 64 << 20
_SMALL_BYTES = 64 << 20  # read in a moment, to find NaN that no attribute declares


@dataclass(frozen=True)
class _Scanned:
    """What data set `name` lacks.

    values: stored numbers that stand for none. rows: those with a missing value, increasing; of targets of which some
    may be missing, those without any. mean: of the other values, by their place in a sample, as stored; None if it was
    not asked for. num_in_part: rows of such targets that lack some.
    """

    name: str
    values: tuple[float, ...]
    rows: np.ndarray
    mean: np.ndarray | None = None
    num_in_part: int = 0


def handle_missing(
    parts: list[Part], data: Data, context: Context, may_lack_some: bool = False
) -> tuple[list[Part], tuple[float, ...], str]:
    """Collective. The parts as data.missing asks, the inputs' values that stand for none, and what was done.

    The training samples come first: the mean is theirs.

    All values are read for it, each rank a part, if the file declares which are missing, if data.missing is set, and of
    small data. Raises `UserError` if there are some and data.missing is "refuse". A sample without a target is left out
    in any case; with `may_lack_some`, one of several targets only if it lacks all of them.
    """
    filling: Filling | None = None
    values: tuple[float, ...] = ()
    handled, said = [], []
    for part in parts:
        scan = partial(_scan, part.files, data.missing, context)
        inputs = scan(part.inputs, part.split.inputs[0])
        targets = scan(part.targets, part.split.targets, may_lack_some and len(part.split.targets.shape) > 1)
        if part.use == "train":
            values = inputs.values
            if data.missing == "mean" and inputs.mean is not None:
                filling = Filling(values, torch.from_numpy(inputs.mean.astype(np.float32)))
        split, words = _handled(part.split, inputs, targets, filling)
        handled.append(part.having(split))
        said.append(words)
    return handled, values, "; ".join(filter(None, said))


def _handled(split: Split, inputs: _Scanned, targets: _Scanned, filling: Filling | None) -> tuple[Split, str]:
    """The split without what is missing, and what was done. Raises `UserError`, on all ranks, if nothing is left."""
    num_samples, said = len(split), []
    if filling:
        split = replace(split, filling=filling)
        if len(inputs.rows):
            num = f"{len(inputs.rows):,} of {num_samples:,}"
            said.append(f"the mean stands for missing values in {num} samples of {inputs.name}")
    incomplete = [targets] if filling else [inputs, targets]
    left_out = np.unique(np.concatenate([each.rows for each in incomplete]))
    names = " and ".join(each.name for each in incomplete if len(each.rows))
    if len(left_out) == num_samples:
        what = f"each of the {num_samples:,} samples lacks a value in {names}: none is left"
        remedy = "Targets need values: correct the data." if len(targets.rows) else 'Set data.missing = "mean".'
        raise joint(UserError(what, remedy))
    if len(left_out):
        split = split.select(np.delete(np.arange(num_samples), left_out))
        said.append(f"{len(left_out):,} of {num_samples:,} samples are left out, as {names} lacks values")
    if targets.num_in_part:
        num = f"{targets.num_in_part:,} of {num_samples:,}"
        said.append(f"{num} samples lack some of {targets.name}: the others count")
    return split, "; ".join(said)


def _scan(
    files: Files, mode: str, context: Context, name: str, reader: Reader, may_lack_some: bool = False
) -> _Scanned:
    """Collective. Raises `UserError` if a value is missing and `mode` is "refuse"."""
    values = context.on_all(partial(declared_values, files, name))
    may_be_nan = reader.dtype.kind == "f" and (mode != "refuse" or reader.num_bytes <= _SMALL_BYTES)
    if reader.dtype.kind == "O" or not (values or may_be_nan):
        return _Scanned(name, values, np.zeros(0, np.int64))
    rows, num_incomplete = [np.zeros(0, np.int64)], 0
    may_lack_some &= mode != "refuse"
    for begin, part in _my_parts(reader, context):
        missing = is_missing(part, values).reshape(len(part), -1)
        rows.append(begin + np.flatnonzero(missing.all(axis=1) if may_lack_some else missing.any(axis=1)))
        num_incomplete += int(np.count_nonzero(missing.any(axis=1)))
    mine = np.concatenate(rows)
    if mode == "refuse":
        _refuse_any(files, name, values, mine, reader, context)
    found = np.concatenate(context.all_gather(mine))
    num_in_part = int(context.sum(np.array([num_incomplete]))[0]) - len(found)
    mean = moments(reader, values, context).mean if mode == "mean" else None
    return _Scanned(name, values, found, mean, num_in_part)


def _my_parts(reader: Reader, context: Context) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, values) of this rank's part of all rows, block by block."""
    start, stop = rank_span(len(reader), context.world.rank, context.world.size)
    num_rows = max(1, _SCAN_BYTES // max(1, reader.row_bytes))
    for begin in range(start, stop, num_rows):
        yield begin, reader[begin : min(begin + num_rows, stop)]


def declared_values(files: Files, name: str) -> tuple[float, ...]:
    """The stored numbers that stand for no value in data set `name` of one of the files. Raises `UserError`."""
    found: set[float] = set()
    for path, file, dataset in zip(files.paths, files.opened, files.datasets(name, "data"), strict=True):
        with damage_as_user_error(path, f"attributes of {name}"):
            found |= declared_missing(dataset.attrs, dataset.dtype, "_NCProperties" in file.attrs)
    return tuple(sorted(found))


def _refuse_any(
    files: Files, name: str, values: tuple[float, ...], mine: np.ndarray, reader: Reader, context: Context
) -> None:
    """Collective. Raises `UserError`, on all ranks, if one found rows with a missing value. mine: of this rank."""
    number = int(context.sum(np.array([len(mine)]))[0])
    if not number:
        return
    row = -int(context.max(np.array([-mine[0] if len(mine) else -len(reader)]))[0])
    first = reader[row : row + 1]
    value = first[is_missing(first, values)][0]
    raise joint(
        UserError(
            f"{files.paths[0]}: {number:,} of {len(reader):,} samples of {name} lack values: {value:g} in row {row:,} "
            "is the first",
            'data.missing = "drop" leaves them out; "mean" puts the mean of the others in the place of inputs.',
        )
    )
