"""The statistics that both halves compute: training writes them into summary.json and into the fits of all-reduces.

Everything else is in `analysis/stats`. Functions take and return arrays and know nothing of runs, ranks or units.
"""

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Interval = tuple[float, float]

LEVELS = (0.025, 0.975)  # the quantiles that bound a 95% interval
NUM_RESAMPLES = 1000
NUM_BLOCKS = 50


def block_sums(values: FloatArray, num_blocks: int = NUM_BLOCKS) -> tuple[FloatArray, FloatArray]:
    """(sums, numbers of values) of at most `num_blocks` blocks of consecutive values, of nearly equal length."""
    blocks = np.array_split(values, min(num_blocks, len(values)))
    return np.array([block.sum() for block in blocks]), np.array([float(len(block)) for block in blocks])


def percentile_interval(draws: FloatArray, estimate: float) -> Interval:
    """The 95% percentile interval of bootstrap draws, widened to hold the estimate if it lies outside."""
    low, high = np.quantile(draws, LEVELS)
    return min(float(low), estimate), max(float(high), estimate)


def mean_interval(values: FloatArray, num_resamples: int = NUM_RESAMPLES) -> tuple[float | None, ...]:
    """(low, mean, high): the mean and its 95% bootstrap interval. All None for no values, no interval below 2 values.

    Consecutive values resemble each other (steps of a run do), so whole blocks of them are drawn rather than single
    ones: the bootstrap with disjoint blocks (Carlstein, Annals of Statistics 14(3), 1986).
    Deterministic, since the generator is seeded.
    """
    if len(values) == 0:
        return None, None, None
    mean = float(values.mean())
    if len(values) < 2:
        return None, mean, None
    sums, counts = block_sums(values)
    drawn = np.random.default_rng(0).integers(0, len(sums), (num_resamples, len(sums)))
    low, high = percentile_interval(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), mean)
    return low, mean, high


def nonnegative_least_squares(columns: FloatArray, wanted: FloatArray) -> FloatArray:
    """x >= 0 that minimises |columns @ x - wanted|. Columns may differ in size by any power of ten.

    Lawson and Hanson, "Solving Least Squares Problems", 1974, chapter 23 (scipy's nnls).
    """
    from scipy.optimize import nnls  # half a second to import, and most commands fit nothing

    # Without columns of like size nnls stops early: its tolerance is absolute.
    scales = np.maximum(np.abs(columns).max(axis=0), np.finfo(float).tiny)
    solution, _ = nnls(columns / scales, wanted)
    return np.asarray(solution / scales)
