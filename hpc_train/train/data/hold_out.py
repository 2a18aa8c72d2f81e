"""Which of the training samples are held out to validate on: a pure function of the seed and the row, or its group."""

from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import HOLD_OUT, rank_span, row_noise
from hpc_train.core.settings import Data
from hpc_train.train.comm.context import Context, joint
from hpc_train.train.data.dataset import Split
from hpc_train.train.data.reader_interface import Reader

_SCAN_ROWS = 1 << 20


def hold_out(train: Split, data: Data, seed: int, context: Context) -> tuple[Split, Split]:
    """Collective. (the samples to train on, those to validate on). Raises `UserError` if one side has none."""
    if train.groups is None:
        is_held_out = row_noise(seed, HOLD_OUT, np.arange(len(train)), 1)[:, 0] < np.uint64(data.hold_out * 2.0**64)
    else:
        is_held_out = _by_group(train.groups, data.hold_out, seed, context)
    if is_held_out.all() or not is_held_out.any():
        by = "" if data.hold_out_by is None else f", by the groups of {data.hold_out_by},"
        num = np.count_nonzero(is_held_out)
        raise joint(
            UserError(
                f"data.hold_out = {data.hold_out:g} of {len(train):,} samples{by} leaves {num:,} to validate on",
                "Set it so that samples remain on both sides"
                + (": of few groups, a larger share or another seed." if by else "."),
            )
        )
    return train.select(np.flatnonzero(~is_held_out)), train.select(np.flatnonzero(is_held_out))


def _by_group(groups: Reader, share: float, seed: int, context: Context) -> np.ndarray:
    """Collective. (n,) whether each row's group is held out; each rank reads a part."""
    start, stop = rank_span(len(groups), context.world.rank, context.world.size)
    found = [np.zeros(0, bool)]
    for begin in range(start, stop, _SCAN_ROWS):
        values, rows = np.unique(groups[begin : min(begin + _SCAN_ROWS, stop)], return_inverse=True)
        found.append(np.array([_group_noise(seed, value) < share for value in values.tolist()], bool)[rows.ravel()])
    return np.concatenate(context.all_gather(np.concatenate(found)))


@lru_cache(maxsize=_SCAN_ROWS)
def _group_noise(seed: int, value: Any) -> float:
    """A number of [0, 1): a function of the seed and the value alone, not of its type in the file (3, 3.0)."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return int.from_bytes(blake2b(f"hold out {seed} {value}".encode(), digest_size=8).digest()) / 2.0**64
