"""By how much a positive quantity changed from one set of repeats to another: the ratio of its geometric means."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, expm1, log, sqrt
from statistics import fmean, variance

from hpc_train.core.statistics import Interval

_ROUNDING = 1e-12  # logarithms that differ by less are equal
_LARGEST = 50.0  # a larger logarithm of a ratio says nothing, and would overflow


@dataclass(frozen=True)
class LogChange:
    """The difference of two mean logarithms, and how far chance may have moved it."""

    difference: float
    error: float  # its standard error
    degrees_of_freedom: float  # of Student's t

    @property
    def relative(self) -> float:
        """0.05 for 5% more."""
        return _ratio_less_one(self.difference)

    def p_value(self) -> float:
        """Two-sided, of no change."""
        from scipy.special import stdtr  # a third of a second to import

        if abs(self.difference) < _ROUNDING:
            return 1.0
        if self.error < _ROUNDING:
            return 0.0
        return 2 * float(stdtr(self.degrees_of_freedom, -abs(self.difference) / self.error))

    def interval(self, level: float = 0.05) -> Interval:
        """Of `relative`, with a confidence of 1 - level."""
        half = self._half_width(level)
        return _ratio_less_one(self.difference - half), _ratio_less_one(self.difference + half)

    def smallest_shown(self, level: float = 0.05) -> float:
        """The smallest relative increase whose interval would have excluded no change."""
        return _ratio_less_one(self._half_width(level))

    def _half_width(self, level: float) -> float:
        from scipy.special import stdtrit

        return float(stdtrit(self.degrees_of_freedom, 1 - level / 2)) * self.error


def _ratio_less_one(logarithm: float) -> float:
    return expm1(min(logarithm, _LARGEST))


def change(before: Sequence[float], after: Sequence[float]) -> LogChange | None:
    """Of the geometric mean of positive values, one of each run; None for one run on each side.

    Repeats on both sides: Welch's approximate t ("The generalization of 'Student's' problem when several different
    population variances are involved", Biometrika 34(1-2), 1947). One run on a side: it is taken to vary as the
    repeats of the other side do, which is Student's t of a new value against n others.
    """
    logs = [[log(value) for value in values] for values in (before, after)]
    difference = fmean(logs[1]) - fmean(logs[0])
    repeated = [each for each in logs if len(each) > 1]
    if not repeated:
        return None
    if len(repeated) == 1:
        (known,) = repeated
        return LogChange(difference, sqrt(variance(known) * (1 + 1 / len(known))), len(known) - 1)
    squares = [variance(each) / len(each) for each in logs]
    total = sum(squares)
    if not total:
        return LogChange(difference, 0.0, 1.0)
    spread = sum(square**2 / (len(each) - 1) for square, each in zip(squares, logs, strict=True))
    return LogChange(difference, sqrt(total), total**2 / spread)


def holm_levels(p_values: Sequence[float], level: float = 0.05) -> list[float]:
    """The level at which each of several hypotheses is tested, in their order: it is rejected if its p is below.

    Holm's step-down procedure ("A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6(2), 1979): the chance that any true hypothesis is rejected stays below `level`. Once one is not
    rejected, all with larger p values are tested at its level.
    """
    levels = [level] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    number, current = len(order), level
    is_rejecting = True
    for index in order:
        if is_rejecting:
            current = level / number
            number -= 1
        levels[index] = current
        is_rejecting = is_rejecting and p_values[index] < current
    return levels


def geometric_mean_of(values: Sequence[float]) -> float:
    """exp of the mean logarithm: of it changes are ratios."""
    return exp(fmean(map(log, values)))
