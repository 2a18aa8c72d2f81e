"""A positive quantity with its error, and the ratio of two: the run is the unit.

Repeats of a run differ by more than its steps do, so the error of several runs comes from how they differ. One run has
only its own steps to tell: its interval then holds within this run, and says nothing about the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, fsum, inf, log, sqrt
from statistics import fmean, variance

import numpy as np

from hpc_train.core.records import FloatArray
from hpc_train.core.statistics import Interval, block_means, block_sums, error_of_series, half_width


@dataclass(frozen=True)
class Estimate:
    """A positive quantity as its logarithm, whose errors are relative ones of the quantity.

    squared_error: the squared standard error of `log`; None: unknown. between_runs: whether it comes from how runs
    differ; otherwise it holds within the one run, or within the two of a ratio.
    """

    log: float
    squared_error: float | None = None
    degrees_of_freedom: float = 0.0
    between_runs: bool = False

    @property
    def value(self) -> float:
        return exp(self.log)

    @property
    def interval(self) -> Interval | None:
        """95%, by Student's t of the logarithm. An end beyond what a number can hold is 0 or infinite."""
        if self.squared_error is None:
            return None
        half = half_width(self.squared_error, self.degrees_of_freedom)
        return _exp(self.log - half), _exp(self.log + half)

    @property
    def relative_error(self) -> float:
        """The relative standard error; 0 if it is unknown."""
        return sqrt(self.squared_error or 0.0)

    def times(self, factor: float) -> "Estimate":
        """The quantity times a known factor."""
        return Estimate(self.log + log(factor), self.squared_error, self.degrees_of_freedom, self.between_runs)


def _exp(exponent: float) -> float:
    return exp(exponent) if exponent < 700 else inf


def of_value(value: float) -> Estimate:
    """One run's value, of which no series tells the error."""
    return Estimate(log(value))


def of_series(values: FloatArray) -> Estimate:
    """The mean of one run's positive values in their order, for example of its step times."""
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(log(mean))
    return Estimate(log(mean), *error_of_series(block_means(values) / mean))


def of_blocks(whole: float, without: FloatArray) -> Estimate:
    """A statistic of one run, from its logarithm over all blocks of steps and over all but each one, (B,) in order.

    The jackknife: B whole - (B - 1) without are a series whose mean has the statistic's error (Tukey, Annals of
    Mathematical Statistics 29, 1958). Blocks resemble their neighbours, hence `error_of_series`.
    """
    if len(without) < 2:
        return Estimate(whole)
    return Estimate(whole, *error_of_series(len(without) * whole - (len(without) - 1) * without))


def of_ratio(numerator: FloatArray, denominator: FloatArray) -> Estimate:
    """sum(numerator) / sum(denominator) of two series of the same steps of one run, such as parts of their times."""
    blocks = [block_sums(each) for each in (numerator, denominator)]
    whole = log(blocks[0].sum() / blocks[1].sum())
    without = [each.sum() - each for each in blocks]
    return of_blocks(whole, np.log(without[0] / without[1]))


def over_runs(runs: Sequence[Estimate]) -> Estimate:
    """The geometric mean over one run or more. The error of several is from how they differ."""
    if len(runs) == 1:
        return runs[0]
    logs = [run.log for run in runs]
    return Estimate(fmean(logs), variance(logs) / len(logs), len(logs) - 1, between_runs=True)


def ratio(numerator: Sequence[Estimate], denominator: Sequence[Estimate]) -> Estimate:
    """The ratio of the geometric means of two sets of runs, each of one run or more.

    Welch's t interval of the difference of the mean logarithms, with his approximate degrees of freedom ("The
    generalization of 'Student's' problem when several different population variances are involved", Biometrika
    34(1-2), 1947). If one side alone has repeats, the other's single run is taken to vary as these do (Student's t with
    equal variances). Of two single runs the errors are those within the runs.
    """
    sides = over_runs(numerator), over_runs(denominator)
    difference = sides[0].log - sides[1].log
    if sides[0].between_runs != sides[1].between_runs:
        repeated = max(numerator, denominator, key=len)
        logs = [run.log for run in repeated]
        return Estimate(difference, variance(logs) * (1 + 1 / len(logs)), len(logs) - 1, between_runs=True)
    if sides[0].squared_error is None or sides[1].squared_error is None:
        return Estimate(difference)
    squared_error = fsum(side.squared_error or 0.0 for side in sides)
    spread = fsum((side.squared_error or 0.0) ** 2 / side.degrees_of_freedom for side in sides)
    degrees_of_freedom = squared_error**2 / spread if spread else sides[0].degrees_of_freedom
    return Estimate(difference, squared_error, degrees_of_freedom, sides[0].between_runs)


def ratio_of_means(numerator: Sequence[FloatArray], denominator: Sequence[FloatArray]) -> Estimate:
    """`ratio` of two sets of runs from each run's positive values in their order, for example its step times."""
    return ratio([of_series(values) for values in numerator], [of_series(values) for values in denominator])
