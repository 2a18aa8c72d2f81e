"""Statistics against known values, and their intervals by how often they hold the truth."""

import numpy as np
import pytest

from hpc_train.analysis.stats.bootstrap import (
    block_counts,
    bootstrap_means,
    pooled_mean_interval,
    ratio_of_sums_interval,
    refit_draws,
)
from hpc_train.analysis.stats.chance_threshold import largest_total_threshold
from hpc_train.analysis.stats.repeats import ratio_of_geometric_means_interval
from hpc_train.core.statistics import NUM_RESAMPLES, mean_interval, percentile_interval


def test_a_resample_has_as_many_samples_and_blocks_as_there_are() -> None:
    same = block_counts([7, 7, 7], seed=1)
    assert [each.shape for each in same] == [(NUM_RESAMPLES, 7)] * 3
    assert (sum(each.sum(axis=1) for each in same) == 21).all()
    unequal = block_counts([2, 5], seed=1)
    assert set(np.unique(unequal[0].sum(axis=1))) == {0, 2, 4} and set(np.unique(unequal[1].sum(axis=1))) == {0, 5, 10}


def test_one_sample_has_the_interval_of_its_mean_and_several_a_wider_one() -> None:
    draws = np.random.default_rng(0)
    runs = [draws.normal(mean, 0.1, 200) for mean in (1.0, 1.1, 0.9)]
    assert pooled_mean_interval(runs[:1]) == mean_interval(runs[0])
    low, mean, high = pooled_mean_interval(runs)
    assert low is not None and mean == pytest.approx(1.0, abs=0.02) and high is not None
    assert high - low > 0.1, "the runs differ by more than their steps tell"
    assert pooled_mean_interval([np.zeros(0), np.zeros(0)]) == (None, None, None)


def test_nineteen_of_twenty_intervals_of_pooled_means_hold_the_truth() -> None:
    inside = 0
    for seed in range(200):
        draws = np.random.default_rng(seed)
        runs = [draws.normal(1.0, 0.2, 100) + draws.normal(0.0, 0.02) for _ in range(8)]
        low, _, high = pooled_mean_interval(runs)
        assert low is not None and high is not None
        inside += low <= 1.0 <= high
    assert inside >= 170  # 200 times 95%, less what eight runs tell too little of


def test_nineteen_of_twenty_intervals_of_a_ratio_hold_the_truth() -> None:
    inside = 0
    for seed in range(200):
        draws = np.random.default_rng(seed)
        whole = draws.normal(1.0, 0.1, 173)
        low, high = ratio_of_sums_interval(whole * draws.exponential(0.2, 173), whole) or (1.0, 0.0)
        inside += low <= 0.2 <= high
    assert inside >= 180
    assert ratio_of_sums_interval(np.ones(1), np.ones(1)) is None


def test_an_interval_holds_its_estimate() -> None:
    assert percentile_interval(np.array([1.0, 1.0]), 2.0) == (1.0, 2.0)


def test_welch_by_hand() -> None:
    # Equal variances and numbers: 4 degrees of freedom, t = 2.776, standard error sqrt(2 * 1 / 3).
    ours, theirs = np.exp([1.0, 2.0, 3.0]), np.exp([0.0, 1.0, 2.0])
    low, high = ratio_of_geometric_means_interval(ours.tolist(), theirs.tolist()) or (0.0, 0.0)
    assert np.log([low, high]) == pytest.approx([1 - 2.776 * (2 / 3) ** 0.5, 1 + 2.776 * (2 / 3) ** 0.5], abs=1e-3)
    assert ratio_of_geometric_means_interval([2.0, 2.0], [1.0, 1.0]) == pytest.approx((2.0, 2.0))
    assert ratio_of_geometric_means_interval([2.0], [1.0, 1.0]) is None


def test_chance_alone_exceeds_the_threshold_in_one_case_of_a_hundred() -> None:
    exceeded = 0
    for seed in range(300):
        draws = np.random.default_rng(seed)
        amounts = draws.exponential(1.0, 60)
        totals = np.bincount(draws.integers(0, 8, 60), amounts, 8)
        exceeded += totals.max() > largest_total_threshold(amounts, 8)
    assert exceeded <= 12


def test_refits_spread_as_the_values_do() -> None:
    fitted = np.full(100, 2.0)
    draws = refit_draws(fitted, np.full(100, 0.1), lambda values: np.array([np.log(values).mean()]), 500)
    assert draws.shape == (500, 1) and draws.std() == pytest.approx(0.1 / 10, rel=0.15)


def test_means_of_one_sample_are_those_of_its_blocks() -> None:
    values = np.random.default_rng(3).normal(1.0, 0.1, 500)
    assert bootstrap_means([values], seed=0).std() == pytest.approx(0.1 / 500**0.5, rel=0.3)
