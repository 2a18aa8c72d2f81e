"""Whether a change can be chance: the test and the interval of a ratio, of many tests together."""

from collections.abc import Sequence
from math import expm1, sqrt

from hpc_train.analysis.stats.estimate import Estimate
from hpc_train.core.statistics import Interval, half_width

_ROUNDING = 1e-12  # logarithms that differ by less are equal
_LARGEST = 50.0  # a larger logarithm of a ratio says nothing, and would overflow


def relative(ratio: Estimate) -> float:
    """0.05 for 5% more."""
    return _less_one(ratio.log)


def relative_interval(ratio: Estimate, level: float) -> Interval | None:
    """Of `relative`, with a confidence of 1 - level; None: no error is known."""
    if ratio.squared_error is None:
        return None
    half = half_width(ratio.squared_error, ratio.degrees_of_freedom, level)
    return _less_one(ratio.log - half), _less_one(ratio.log + half)


def smallest_shown(ratio: Estimate, level: float) -> Interval | None:
    """The smallest decrease and increase whose interval would have excluded no change; None: no error is known."""
    if ratio.squared_error is None:
        return None
    half = half_width(ratio.squared_error, ratio.degrees_of_freedom, level)
    return _less_one(-half), _less_one(half)


def _less_one(logarithm: float) -> float:
    return expm1(min(logarithm, _LARGEST))


def p_value(ratio: Estimate) -> float:
    """Two-sided, of a ratio of 1, by Student's t of the logarithm. 1 if no error is known."""
    from scipy.special import stdtr  # a third of a second to import

    if ratio.squared_error is None or abs(ratio.log) < _ROUNDING:
        return 1.0
    error = sqrt(ratio.squared_error)
    return 0.0 if error < _ROUNDING else 2 * float(stdtr(ratio.degrees_of_freedom, -abs(ratio.log) / error))


def holm_levels(p_values: Sequence[float], level: float) -> list[float]:
    """The level at which each of several hypotheses is tested, in their order: it is rejected if its p is below.

    Holm's step-down procedure ("A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6(2), 1979): the chance that any true hypothesis is rejected stays below `level`. Once one is not
    rejected, all with larger p values are tested at its level.
    """
    levels, current, is_rejecting = [level] * len(p_values), level, True
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for number, index in enumerate(order):
        if is_rejecting:
            current = level / (len(order) - number)
        levels[index] = current
        is_rejecting = is_rejecting and p_values[index] < current
    return levels
