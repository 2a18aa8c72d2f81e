"""Samples with equal bytes, within a data set and between data sets, found by their hashes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np

from hpc_train.datasets.inspect.statistics import SAMPLE_HASH
from hpc_train.train.comm.context import Context

_MAX_HASHES = 1 << 24  # of all ranks together: 16 bytes each


@dataclass(frozen=True)
class Duplicates:
    """`num` samples of data set `copies` equal one of data set `originals`; an earlier one, if both are the same.

    example: (number of an original, number of its copy), of the lowest copy, counted over all that are compared.
    """

    originals: str
    copies: str
    num: int
    example: tuple[int, int]


def keep_one_in(num_samples: int) -> int:
    """The share of hashes to keep, one in so many, so that memory stays bounded."""
    return max(1, -(-num_samples // _MAX_HASHES))


def find_duplicates(hashes: Sequence[np.ndarray], ends: dict[str, int], context: Context) -> list[Duplicates]:
    """Collective. The pairs of data sets that hold equal samples, the same on every rank.

    hashes: arrays of `SAMPLE_HASH` of this rank's samples. ends: the sample number at which each data set ends.
    """
    rows = _repeated(_exchange_by_hash(np.concatenate([np.empty(0, SAMPLE_HASH), *hashes]), context))
    part_of_row = np.searchsorted(list(ends.values()), rows["sample"], "right")
    parts = {name: rows[part_of_row == number] for number, name in enumerate(ends)}
    pairs = list(combinations_with_replacement(ends, 2))
    of_ranks = context.all_gather([_count_copies(parts[originals], parts[copies]) for originals, copies in pairs])
    found = []
    for index, (originals, copies) in enumerate(pairs):
        counts = [of_rank[index] for of_rank in of_ranks if of_rank[index][0]]
        if counts:
            lowest = min((example for _, example in counts), key=lambda example: example[1])
            found.append(Duplicates(originals, copies, sum(num for num, _ in counts), lowest))
    return found


def _exchange_by_hash(mine: np.ndarray, context: Context) -> np.ndarray:
    """Collective. The hashes of all ranks that this rank compares: each rank has a range of the hashes' upper bits."""
    size = np.uint64(context.world.size)
    owners = ((mine["hash"] >> np.uint64(32)) * size >> np.uint64(32)).astype(np.int64)
    by_owner = mine[np.argsort(owners, kind="stable")]
    return context.exchange(by_owner, np.bincount(owners, minlength=context.world.size))[0]


def _repeated(rows: np.ndarray) -> np.ndarray:
    """The rows whose hash occurs more than once, sorted by hash and then by sample."""
    rows = rows[np.lexsort((rows["sample"], rows["hash"]))]
    equals_next = rows["hash"][1:] == rows["hash"][:-1]
    is_repeated = np.zeros(len(rows), dtype=bool)
    is_repeated[:-1] |= equals_next
    is_repeated[1:] |= equals_next
    return rows[is_repeated]


def _count_copies(originals: np.ndarray, copies: np.ndarray) -> tuple[int, tuple[int, int]]:
    """(number of copies, an example) among sorted rows of two data sets, as `Duplicates` has them."""
    # Rows are sorted: the first of several equal hashes is the original.
    first = np.searchsorted(originals["hash"], copies["hash"], "left")
    has_original = first < len(originals)
    has_original[has_original] = originals["hash"][first[has_original]] == copies["hash"][has_original]
    original, copy = originals["sample"][first[has_original]], copies["sample"][has_original]
    original, copy = original[original != copy], copy[original != copy]
    if not len(copy):
        return 0, (0, 0)
    lowest = int(np.argmin(copy))
    return len(copy), (int(original[lowest]), int(copy[lowest]))
