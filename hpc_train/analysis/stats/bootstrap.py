"""Bootstrap intervals of means, of ratios of sums, and of fits.

A sample is the values of one run in their order, for example its step times. Consecutive values resemble each other, so
blocks of them are drawn rather than single values (`core.statistics.mean_interval`).
"""

from collections.abc import Callable, Sequence

import numpy as np

from hpc_train.core.records import FloatArray
from hpc_train.core.statistics import NUM_RESAMPLES, Interval, block_sums, mean_interval, percentile_interval


def block_counts(num_blocks: Sequence[int], seed: int) -> list[FloatArray]:
    """How often each block of each sample is drawn: (NUM_RESAMPLES, blocks) a sample.

    Two stages (Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8): as many samples as
    there are, with replacement, then of each of these as many blocks as it has. So differences between samples widen
    the interval as they should.
    """
    generator = np.random.default_rng(seed)
    num_samples = len(num_blocks)
    chosen = generator.integers(0, num_samples, (NUM_RESAMPLES, num_samples))
    counts = [np.zeros((NUM_RESAMPLES, blocks)) for blocks in num_blocks]
    for draw in range(num_samples):
        for sample, blocks in enumerate(num_blocks):
            rows = np.flatnonzero(chosen[:, draw] == sample)
            drawn = generator.integers(0, blocks, (len(rows), blocks))
            cells = rows[:, None] * blocks + drawn
            counts[sample] += np.bincount(cells.ravel(), minlength=counts[sample].size).reshape(-1, blocks)
    return counts


def bootstrap_means(samples: Sequence[FloatArray], seed: int) -> FloatArray:
    """(NUM_RESAMPLES,) means of all values together, from samples and blocks drawn as `block_counts` says."""
    sums, sizes = zip(*(block_sums(sample) for sample in samples if len(sample)), strict=True)
    draws = block_counts([len(each) for each in sums], seed)
    totals = np.sum([counts @ each for counts, each in zip(draws, sums, strict=True)], axis=0)
    numbers = np.sum([counts @ each for counts, each in zip(draws, sizes, strict=True)], axis=0)
    return np.asarray(totals / numbers)


def pooled_mean_interval(samples: Sequence[FloatArray]) -> tuple[float | None, ...]:
    """(low, mean, high) of the values of all samples together: as `mean_interval`, whose result one sample gives."""
    low, mean, high = mean_interval(np.concatenate(samples))
    if len(samples) > 1 and mean is not None and low is not None:
        low, high = percentile_interval(bootstrap_means(samples, seed=0), mean)
    return low, mean, high


def ratio_of_sums_interval(numerator: FloatArray, denominator: FloatArray) -> Interval | None:
    """The 95% interval of sum(numerator) / sum(denominator), two series of the same steps; None below 2 steps."""
    if len(numerator) < 2:
        return None
    (upper, _), (lower, _) = block_sums(numerator), block_sums(denominator)
    drawn = np.random.default_rng(0).integers(0, len(upper), (NUM_RESAMPLES, len(upper)))
    ratios = upper[drawn].sum(axis=1) / lower[drawn].sum(axis=1)
    return percentile_interval(ratios, float(numerator.sum() / denominator.sum()))


def refit_draws(
    fitted: FloatArray, scale: FloatArray, refit: Callable[[FloatArray], FloatArray], num_resamples: int
) -> FloatArray:
    """(num_resamples, parameters) refits to values drawn around the fitted ones.

    The parametric bootstrap (Davison and Hinkley, chapter 6) with log-normal deviations: `scale` (n,) is their relative
    standard deviation.
    """
    noise = np.random.default_rng(0).standard_normal((num_resamples, len(fitted)))
    return np.stack([refit(values) for values in fitted * np.exp(scale * noise)])
