"""What chance alone would do."""

import numpy as np

from hpc_train.core.records import FloatArray

NUM_DRAWS = 1000
_LEVEL = 0.99


def largest_total_threshold(amounts: FloatArray, num_members: int) -> float:
    """The largest total of any member, exceeded in 1% of the cases in which amounts fall on members by chance.

    A Monte Carlo test of the maximum (Westfall and Young, "Resampling-Based Multiple Testing", 1993, section 2): each
    amount goes to one of `num_members` equal members at random, 1,000 times. Taking the maximum over members keeps the
    error rate at 1% however many there are. Deterministic, since the generator is seeded.
    """
    generator = np.random.default_rng(0)
    largest = np.empty(NUM_DRAWS)
    for index in range(NUM_DRAWS):
        members = generator.integers(0, num_members, len(amounts))
        largest[index] = np.bincount(members, amounts).max()
    return float(np.quantile(largest, _LEVEL))
