"""Samples whose bytes are equal, within a part of the data and between parts: found by their hashes, by all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpc_train.datasets.inspect.statistics import HASHED
from hpc_train.train.comm.context import Context

_MOST_HASHES = 1 << 24  # of all ranks together: 16 bytes each
_EXAMPLES = 5


@dataclass(frozen=True)
class Equal:
    """num samples of part `second` stand in part `first`, too; in one part, those that stood before.

    examples: (number of a sample of `first`, number of one of `second`), counted over all parts.
    """

    first: int
    second: int
    num: int
    examples: tuple[tuple[int, int], ...]


def keep_one_in(num_samples: int) -> int:
    """Of how many hashes one is kept, so that memory stays bounded: equal samples are kept, or left out, together."""
    return max(1, -(-num_samples // _MOST_HASHES))


def equal_samples(hashed: Sequence[np.ndarray], ends: Sequence[int], context: Context) -> list[Equal]:
    """Collective. The pairs of parts that hold equal samples; alike on every rank.

    hashed: arrays of `HASHED`, those of this rank's samples. ends: where the parts end in the numbers of samples.
    """
    rows = _repeated(_of_my_hashes(np.concatenate([np.empty(0, HASHED), *hashed]), context))
    samples, num_parts = rows["sample"], len(ends)
    starts = np.flatnonzero(np.append(True, rows["hash"][1:] != rows["hash"][:-1])[: len(rows)])
    group = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(rows))))
    part = np.searchsorted(np.asarray(ends), samples, "right")
    cells, firsts, nums = np.unique(group * num_parts + part, return_index=True, return_counts=True)
    counts, first = np.zeros((len(starts), num_parts), np.int64), np.zeros((len(starts), num_parts), np.int64)
    counts.flat[cells], first.flat[cells] = nums, firsts  # of each hash and part: how many, and the first in `rows`
    found = []
    for a, b in zip(*np.triu_indices(num_parts), strict=True):
        same = int(a == b)
        groups = np.flatnonzero((counts[:, a] > 0) & (counts[:, b] > same))
        num = int(context.sum(np.array([counts[groups, b].sum() - same * len(groups)], np.int64))[0])
        pairs = np.stack([samples[first[groups, a]], samples[first[groups, b] + same]], axis=1)
        mine = pairs[np.argsort(pairs[:, 1])][:_EXAMPLES]
        shown = sorted((two, one) for each in context.all_gather(mine) for one, two in each.tolist())[:_EXAMPLES]
        if num:
            found.append(Equal(int(a), int(b), num, tuple((one, two) for two, one in shown)))
    return found


def _of_my_hashes(mine: np.ndarray, context: Context) -> np.ndarray:
    """Collective. Those of all ranks whose hashes fall to this rank."""
    owners = ((mine["hash"] >> np.uint64(32)) * np.uint64(context.world.size) >> np.uint64(32)).astype(np.int64)
    sent = mine[np.argsort(owners, kind="stable")]
    return context.exchange(sent, np.bincount(owners, minlength=context.world.size))[0]


def _repeated(rows: np.ndarray) -> np.ndarray:
    """Those whose hash is there more than once, by hash, then by sample."""
    rows = rows[np.lexsort((rows["sample"], rows["hash"]))]
    is_same = rows["hash"][1:] == rows["hash"][:-1]
    return rows[(np.append(is_same, False) | np.insert(is_same, 0, False))[: len(rows)]]
