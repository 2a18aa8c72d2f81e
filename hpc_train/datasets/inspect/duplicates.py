"""Samples with equal bytes, within a part of the data and between parts, found by their hashes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np

from hpc_train.datasets.inspect.statistics import SAMPLE_HASH
from hpc_train.train.comm.context import Context

_MAX_HASHES = 1 << 24  # of all ranks together: 16 bytes each


@dataclass(frozen=True)
class Duplicates:
    """`num` samples of part `copies` equal one of part `originals`, or an earlier one if both are the same part.

    example: (number of an original, number of its copy), of the lowest copy; counted over all parts.
    """

    originals: int
    copies: int
    num: int
    example: tuple[int, int]


def keep_one_in(num_samples: int) -> int:
    """The share of hashes to keep, one in so many, so that memory stays bounded."""
    return max(1, -(-num_samples // _MAX_HASHES))


def find_duplicates(hashes: Sequence[np.ndarray], ends: Sequence[int], context: Context) -> list[Duplicates]:
    """Collective. The pairs of parts that hold equal samples, the same on every rank.

    hashes: arrays of `SAMPLE_HASH` of this rank's samples. ends: the sample number at which each part ends.
    """
    mine = np.concatenate([np.empty(0, SAMPLE_HASH), *hashes])
    rows = _repeated(_exchange_by_hash(mine, context))
    part_pairs = list(combinations_with_replacement(range(len(ends)), 2))
    counted = context.all_gather([_count_copies(rows, ends, originals, copies) for originals, copies in part_pairs])
    found = []
    for index, (originals, copies) in enumerate(part_pairs):
        num = sum(of_rank[index][0] for of_rank in counted)
        examples = [of_rank[index][1] for of_rank in counted if of_rank[index][0]]
        if num:
            found.append(Duplicates(originals, copies, num, min(examples, key=lambda pair: pair[1])))
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


def _count_copies(rows: np.ndarray, ends: Sequence[int], originals: int, copies: int) -> tuple[int, tuple[int, int]]:
    """(number of copies, an example) among the sorted `rows` of this rank, as `Duplicates` has them."""
    part = np.searchsorted(np.asarray(ends), rows["sample"], "right")
    in_originals = rows[part == originals]
    in_copies = rows[part == copies]
    # The first of equal hashes is the original, because rows are sorted.
    first = np.searchsorted(in_originals["hash"], in_copies["hash"], "left")
    has_original = first < len(in_originals)
    has_original[has_original] = in_originals["hash"][first[has_original]] == in_copies["hash"][has_original]
    original = in_originals["sample"][first[has_original]]
    copy = in_copies["sample"][has_original]
    original, copy = original[original != copy], copy[original != copy]
    if not len(copy):
        return 0, (0, 0)
    lowest = int(np.argmin(copy))
    return len(copy), (int(original[lowest]), int(copy[lowest]))
