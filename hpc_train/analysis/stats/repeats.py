"""Errors from a few repeats of one measurement."""

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev

NORMAL_95 = 1.96  # half the width of a 95% interval of a normal distribution, in standard deviations


def relative_standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean over the mean; 0 for one value, whose error is unknown."""
    if len(values) < 2:
        return 0.0
    return stdev(values) / fmean(values) / sqrt(len(values))
