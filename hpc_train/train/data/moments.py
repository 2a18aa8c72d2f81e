"""Mean and standard deviation of a data set, the same to the bit on any number of ranks."""

from math import prod
from typing import Any, NamedTuple

import numpy as np

from hpc_train.core.missing_values import is_missing
from hpc_train.core.sampling import rank_span
from hpc_train.train.comm.context import Context
from hpc_train.train.data.reader_interface import Reader

_MOST_BLOCKS = 256
_FIRST_ROWS = 64
_SLAB_BYTES = 32 << 20  # of float64 at once
_SUMS_BYTES = 64 << 20  # of all blocks, which every rank holds


class Moments(NamedTuple):
    """Of the stored numbers that are not missing, by their place in a sample; the mean of all where all are missing.

    known: the share of them that is not missing.
    """

    mean: np.ndarray
    std: np.ndarray
    known: np.ndarray


def moments(reader: Reader, missing: tuple[float, ...], context: Context, pooled: tuple[int, ...] = ()) -> Moments:
    """Collective. Reads all rows, each rank a part.

    missing: stored numbers that stand for no value; NaN does, too. pooled: axes of a sample whose places count as one;
    they have size 1 in the result.
    """
    # Near the values, so that the difference of squares keeps its digits.
    number, first_total, _ = _sums(reader, missing, (0, min(len(reader), _FIRST_ROWS)), 0.0, pooled)
    shift = first_total / np.maximum(number, 1)
    # Blocks depend on the data alone, and their sums are added in their order: so does the result.
    num_blocks = min(_MOST_BLOCKS, len(reader), max(1, _SUMS_BYTES // (3 * 8 * max(1, shift.size))))
    blocks = [rank_span(len(reader), block, num_blocks) for block in range(num_blocks)]
    first, stop = rank_span(num_blocks, context.world.rank, context.world.size)
    mine = [_sums(reader, missing, rows, shift, pooled) for rows in blocks[first:stop]]
    count, total, squares = np.sum([sums for part in context.all_gather(mine) for sums in part], axis=0)
    of_all = float((total + count * shift).sum() / max(count.sum(), 1))
    known = count / (len(reader) * prod(reader.shape[1 + axis] for axis in pooled))
    is_known, count = count > 0, np.maximum(count, 1)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    return Moments(np.where(is_known, mean + shift, of_all), std, known)


def _sums(
    reader: Reader, missing: tuple[float, ...], rows: tuple[int, int], shift: Any, pooled: tuple[int, ...]
) -> np.ndarray:
    """(3, ...) number, sum and sum of squares of what is known in these rows, less `shift`."""
    num_rows = max(1, _SLAB_BYTES // (8 * max(1, prod(reader.shape[1:]))))
    axes, sums = (0, *(1 + axis for axis in pooled)), []
    for begin in range(*rows, num_rows):
        part = reader[begin : min(begin + num_rows, rows[1])]
        known = ~is_missing(part, missing)
        values = np.where(known, part.astype(np.float64) - shift, 0.0)
        sums.append([np.sum(each, axis=axes, keepdims=True)[0] for each in (known, values, values**2)])
    return np.asarray(np.sum(sums, axis=0))
