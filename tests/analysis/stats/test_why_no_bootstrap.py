"""Why intervals within a run are not bootstrapped: the stationary bootstrap covers too little of short runs."""

import numpy as np

from hpc_train.core.records import FloatArray, IntArray
from hpc_train.core.statistics import LEVELS, Interval, mean_interval
from tests.analysis.stats.simulated import Coverage, Steps, oracle_half_width


def chosen_length(values: FloatArray) -> float:
    """The mean length of blocks by Politis and White ("Automatic block-length selection for the dependent bootstrap",
    Econometric Reviews 23, 2004, corrected with Patton 2009).
    """
    n, deviations = len(values), values - values.mean()
    most = int(np.ceil(np.sqrt(n))) + 5
    covariances = np.array([deviations[lag:] @ deviations[: n - lag] / n for lag in range(most + 1)])
    small = np.abs(covariances / covariances[0]) < 2 * np.sqrt(np.log10(n) / n)
    silent = next((lag for lag in range(1, most - 4) if small[lag : lag + 5].all()), most)
    width = min(2 * max(silent - 1, 1), most)
    lags = np.arange(1, width + 1)
    weighted = np.where(lags <= width / 2, 1, 2 * (1 - lags / width)) * covariances[1 : width + 1]
    long_run = covariances[0] + 2 * weighted.sum()
    wanted = (2 * (lags @ weighted) / long_run) ** 2 * n
    return float(np.clip(np.cbrt(wanted), 1, np.ceil(min(3 * np.sqrt(n), n / 3))))


def drawn(n: int, mean_length: float, num_resamples: int) -> IntArray:
    """(num_resamples, n) positions: blocks of random length, each from anywhere, round the end (Politis and Romano,
    Journal of the American Statistical Association 89, 1994).
    """
    generator = np.random.default_rng(0)
    begins = generator.random((num_resamples, n)) < 1 / mean_length
    begins[:, 0] = True
    at = np.arange(n)
    last = np.maximum.accumulate(np.where(begins, at, 0), axis=1)
    starts = np.take_along_axis(generator.integers(0, n, (num_resamples, n)), last, axis=1)
    return np.asarray((starts + at - last) % n)


def bootstrapped(values: FloatArray) -> Interval:
    means = values[drawn(len(values), chosen_length(values), 500)].mean(axis=1)
    low, high = np.quantile(means, LEVELS)
    return float(low), float(high)


def test_the_stationary_bootstrap_covers_too_little_where_ours_holds() -> None:
    """A hundred steps with an autocorrelation of 0.8, whose eleven effective values make few blocks."""
    steps, generator = Steps(100, autocorrelation=0.8), np.random.default_rng(0)
    runs = list(steps.draw(generator, 300))
    oracle = oracle_half_width(steps.squared_error(1))
    ours = [(low, high) for low, _, high in map(mean_interval, runs) if low is not None and high is not None]
    assert Coverage.of([bootstrapped(run) for run in runs], 0.010, oracle).held < 0.85
    assert Coverage.of(ours, 0.010, oracle).held > 0.92


def test_the_bootstrap_itself_is_right_where_steps_are_independent() -> None:
    """Otherwise the test above would show an error of its own."""
    runs = list(Steps(300).draw(np.random.default_rng(1), 200))
    found = Coverage.of([bootstrapped(run) for run in runs], 0.010, oracle_half_width(Steps(300).squared_error(1)))
    assert 0.91 <= found.held <= 0.99 and 0.9 < found.width < 1.1
