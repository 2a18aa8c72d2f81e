"""The statistics that both halves compute: training writes them into summary.json and into the fits of all-reduces.

Everything else is in `analysis/stats`. Functions take and return arrays and know nothing of runs, ranks or units.
"""

from math import exp, sqrt

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Interval = tuple[float, float]

LEVELS = (0.025, 0.975)  # the quantiles that bound a 95% interval
NUM_BLOCKS = 50


def block_means(values: FloatArray, num_blocks: int = NUM_BLOCKS) -> FloatArray:
    """Means of at most `num_blocks` blocks of consecutive values, of nearly equal length."""
    return np.array([block.mean() for block in np.array_split(values, min(num_blocks, len(values)))])


def block_sums(values: FloatArray, num_blocks: int = NUM_BLOCKS) -> FloatArray:
    """Sums of the blocks of `block_means`."""
    return np.array([block.sum() for block in np.array_split(values, min(num_blocks, len(values)))])


def error_of_series(values: FloatArray) -> tuple[float, float]:
    """(squared standard error of the mean, its degrees of freedom) of 2 values or more, alike from one to the next.

    n values with the autocorrelation r from one to the next tell as much as n (1 - r) / (1 + r) independent ones
    (Zwiers and von Storch, "Taking serial correlation into account in tests of the mean", Journal of Climate 8, 1995;
    exact for a first-order autoregressive series). An estimate of r comes out too small by about (1 + 4 r) / n
    (Marriott and Pope, "Bias in the estimation of autocorrelations", Biometrika 41, 1954). That of independent values,
    1 / n, is corrected; more would be too much, since the error grows faster than r. Below 0 r counts as 0, and at
    least 2 values are effective, so that a series that only drifts has a large error.
    """
    n = len(values)
    deviations = values - values.mean()
    variance = float(deviations @ deviations) / n
    if variance == 0:
        return 0.0, n - 1.0
    seen = float(deviations[1:] @ deviations[:-1]) / n / variance
    autocorrelation = min(max((n * seen + 1) / (n - 1), 0.0), 1.0)
    effective = max(n * (1 - autocorrelation) / (1 + autocorrelation), 2.0)
    return variance / (effective - 1), effective - 1


def half_width(squared_error: float, degrees_of_freedom: float, level: float = 0.05) -> float:
    """Of the interval with a confidence of 1 - level, by Student's t."""
    from scipy.special import stdtrit  # a third of a second to import, and most commands print no interval

    return float(stdtrit(degrees_of_freedom, 1 - level / 2)) * sqrt(squared_error)


def mean_interval(values: FloatArray) -> tuple[float | None, ...]:
    """(low, mean, high): the mean of positive values in their order, and its 95% interval within this series.

    All None for no values, no interval below 2 values. Blocks of consecutive values (`block_means`) make up the series
    whose error counts: their means are more nearly normal, and resemble a first-order autoregressive series more, than
    single values are. The interval is symmetric in the logarithm, as those of ratios are.
    """
    if len(values) == 0:
        return None, None, None
    mean = float(values.mean())
    if len(values) < 2 or mean <= 0:
        return None, mean, None
    squared_error, degrees_of_freedom = error_of_series(block_means(values) / mean)
    factor = exp(half_width(squared_error, degrees_of_freedom))
    return mean / factor, mean, mean * factor


def nonnegative_least_squares(columns: FloatArray, wanted: FloatArray) -> FloatArray:
    """x >= 0 that minimises |columns @ x - wanted|. Columns may differ in size by any power of ten.

    Lawson and Hanson, "Solving Least Squares Problems", 1974, chapter 23 (scipy's nnls).
    """
    from scipy.optimize import nnls  # half a second to import, and most commands fit nothing

    # Without columns of like size nnls stops early: its tolerance is absolute.
    scales = np.maximum(np.abs(columns).max(axis=0), np.finfo(float).tiny)
    solution, _ = nnls(columns / scales, wanted)
    return np.asarray(solution / scales)
