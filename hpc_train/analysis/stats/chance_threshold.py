"""What chance alone would do to amounts that fall on members, step after step."""

import numpy as np

from hpc_train.core.records import FloatArray, IntArray

NUM_DRAWS = 1000
_ALIKE = 0.1  # the autocorrelation of block totals below which blocks count as independent
_MOST_MEMBERS = 32  # whose totals are looked at to find the blocks' length


def block_length(amounts: FloatArray, who: IntArray) -> int:
    """How many consecutive steps belong together: the shortest power of two whose block totals hardly resemble the
    next block's.

    amounts, who: (steps,) what falls on which member in each step. Each member's totals are compared with their own
    mean, so that one who bears more all the time does not look like a long disturbance.
    """
    members = _heaviest(amounts, who)
    length = 1
    while 2 * length < len(amounts):
        totals = _block_totals(amounts, who, members, length)
        totals -= totals.mean(axis=0)
        if (totals[1:] * totals[:-1]).sum() <= _ALIKE * (totals**2).sum():
            break
        length *= 2
    return length


def _heaviest(amounts: FloatArray, who: IntArray) -> IntArray:
    members, position = np.unique(who, return_inverse=True)
    return np.asarray(members[np.argsort(-np.bincount(position, amounts))[:_MOST_MEMBERS]])


def _block_totals(amounts: FloatArray, who: IntArray, members: IntArray, length: int) -> FloatArray:
    """(blocks, members)"""
    starts = np.arange(0, len(amounts), length)
    return np.add.reduceat(np.where(who[:, None] == members, amounts[:, None], 0.0), starts, axis=0)


def largest_total_threshold(
    amounts: FloatArray, who: IntArray, num_members: int, length: int, error_rate: float
) -> float:
    """The largest total of any member that chance alone exceeds at the error rate, if all members are alike.

    A permutation test of the maximum (Westfall and Young, "Resampling-Based Multiple Testing", 1993, section 2): in
    each block of `length` steps the members are renamed by turning them round by a random number, 1,000 times. A
    disturbance of some steps stays whole, and the maximum over members keeps the error rate however many there are.
    Deterministic, since the generator is seeded.
    """
    block = np.arange(len(amounts)) // length
    cells, position = np.unique(block * num_members + who, return_inverse=True)
    totals = np.bincount(position, amounts)
    cell_block, cell_member = np.divmod(cells, num_members)
    generator = np.random.default_rng(0)
    largest = np.empty(NUM_DRAWS)
    for index in range(NUM_DRAWS):
        turned = (cell_member + generator.integers(0, num_members, block[-1] + 1)[cell_block]) % num_members
        largest[index] = np.bincount(turned, totals).max()
    return float(np.quantile(largest, 1 - error_rate))
