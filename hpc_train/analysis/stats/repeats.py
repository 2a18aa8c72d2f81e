"""Errors and intervals from a few repeats of one measurement."""

from collections.abc import Sequence
from math import exp, fsum, log, sqrt
from statistics import fmean, stdev, variance

from hpc_train.core.statistics import LEVELS, Interval

NORMAL_95 = 1.96  # half the width of a 95% interval of a normal distribution, in standard deviations


def relative_standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean over the mean; 0 for one value, whose error is unknown."""
    if len(values) < 2:
        return 0.0
    return stdev(values) / fmean(values) / sqrt(len(values))


def ratio_of_geometric_means_interval(numerator: Sequence[float], denominator: Sequence[float]) -> Interval | None:
    """The 95% interval of the ratio of two geometric means of positive values; None if either has fewer than two.

    Welch's t interval of the difference of the mean logarithms, with his approximate degrees of freedom ("The
    generalization of 'Student's' problem when several different population variances are involved", Biometrika
    34(1-2), 1947).
    """
    from scipy.special import stdtrit  # a third of a second to import, and only repeats need it

    if min(len(numerator), len(denominator)) < 2:
        return None
    upper, lower = [log(value) for value in numerator], [log(value) for value in denominator]
    squared_errors = [variance(logs) / len(logs) for logs in (upper, lower)]
    difference, squared_error = fmean(upper) - fmean(lower), fsum(squared_errors)
    if squared_error == 0:
        return exp(difference), exp(difference)
    num_spare = (len(upper) - 1, len(lower) - 1)
    spread = fsum(each**2 / spare for each, spare in zip(squared_errors, num_spare, strict=True))
    degrees_of_freedom = squared_error**2 / spread
    half_width = float(stdtrit(degrees_of_freedom, LEVELS[1])) * squared_error**0.5
    return exp(difference - half_width), exp(difference + half_width)
