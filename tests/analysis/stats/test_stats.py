"""Statistics against values found by hand; `test_coverage.py` tells how often intervals hold the truth."""

from math import log

import numpy as np
import pytest

from hpc_train.analysis.stats.bootstrap import refit_draws
from hpc_train.analysis.stats.chance_threshold import block_length, largest_total_threshold
from hpc_train.analysis.stats.estimate import (
    Estimate,
    of_blocks,
    of_ratio,
    of_series,
    of_value,
    over_runs,
    ratio,
    ratio_of_means,
)
from hpc_train.core.records import FloatArray
from hpc_train.core.statistics import mean_interval


def values(*numbers: float) -> list[Estimate]:
    return [of_value(number) for number in numbers]


def test_welch_by_hand() -> None:
    # Equal variances and numbers: 4 degrees of freedom, t = 2.776, standard error sqrt(2 * 1 / 3).
    found = ratio(values(*np.exp([1.0, 2.0, 3.0])), values(*np.exp([0.0, 1.0, 2.0])))
    half = 2.776 * (2 / 3) ** 0.5
    assert found.between_runs and found.interval is not None
    assert np.log(found.interval) == pytest.approx([1 - half, 1 + half], abs=1e-3)
    assert ratio(values(2.0, 2.0), values(1.0, 1.0)).interval == pytest.approx((2.0, 2.0))


def test_a_single_run_varies_as_the_other_side_s_repeats_do() -> None:
    # Student's t with 2 degrees of freedom, 4.303, and the standard error 1 * sqrt(1 + 1/3).
    for found in (
        ratio(values(1.0), values(*np.exp([0.0, 1.0, 2.0]))),
        ratio(values(*np.exp([0.0, -1.0, -2.0])), values(1.0)),
    ):
        assert found.between_runs and found.interval is not None
        half = 4.303 * (4 / 3) ** 0.5
        assert np.log(found.interval) == pytest.approx([-1 - half, -1 + half], abs=1e-3)


def test_two_single_runs_have_the_interval_within_them_and_single_values_have_none() -> None:
    draws = np.random.default_rng(0)
    one, other = draws.normal(2.0, 0.2, 100), draws.normal(1.0, 0.1, 100)
    found = ratio_of_means([one], [other])
    assert not found.between_runs and found.interval is not None
    low, high = found.interval
    assert low < found.value < high and found.value == pytest.approx(one.mean() / other.mean())
    # 0.1 / sqrt(50) = 1.4%, twice 1.98 of it; blocks of two look a little more alike than they are.
    assert 2 * 1.9 * 0.0141 < log(high / low) < 2 * 3.0 * 0.0141
    assert ratio(values(2.0), values(1.0)).interval is None and of_series(np.array([3.0])).interval is None


def test_repeats_have_a_geometric_mean_whose_error_is_how_they_differ() -> None:
    found = over_runs(values(1.0, 4.0))
    assert (found.value, found.degrees_of_freedom, found.between_runs) == (pytest.approx(2.0), 1, True)
    assert found.squared_error == pytest.approx(log(2) ** 2)  # the variance of 0 and log 4, by 2
    assert found.times(3.0).value == pytest.approx(6.0) and found.relative_error == pytest.approx(log(2))
    single = of_series(np.array([1.0, 2.0, 3.0]))
    assert over_runs([single]) is single and not single.between_runs


def test_the_jackknife_of_a_mean_has_the_error_of_that_mean() -> None:
    series = np.random.default_rng(1).normal(1.0, 0.01, 50)
    without = np.log((series.sum() - series) / 49)
    assert of_blocks(log(series.mean()), without).relative_error == pytest.approx(
        of_series(series).relative_error, rel=1e-2
    )
    assert of_ratio(2 * series, np.ones(50)).relative_error == pytest.approx(of_series(series).relative_error, rel=1e-2)
    assert of_ratio(series, series).relative_error == 0 and of_blocks(0.5, np.zeros(1)).interval is None


def test_a_series_without_spread_has_no_error_and_one_that_drifts_a_large_one() -> None:
    assert of_series(np.full(30, 2.0)).interval == pytest.approx((2.0, 2.0))
    drifting, mixed = np.linspace(1.0, 2.0, 40), np.random.default_rng(0).permutation(np.linspace(1.0, 2.0, 40))
    assert of_series(drifting).relative_error > 3 * of_series(mixed).relative_error


def test_one_run_has_the_interval_that_its_summary_has() -> None:
    series: FloatArray = np.random.default_rng(0).normal(1.0, 0.1, 200)
    low, mean, high = mean_interval(series)
    assert of_series(series).interval == pytest.approx((low, high)) and of_series(series).value == pytest.approx(mean)


def test_an_error_without_measure_gives_an_interval_without_ends() -> None:
    assert Estimate(0.0, 1e4, 1.0).interval == (0.0, float("inf"))


def test_chance_alone_exceeds_the_threshold_in_one_case_of_a_hundred() -> None:
    exceeded = 0
    for seed in range(300):
        draws = np.random.default_rng(seed)
        amounts = draws.exponential(1.0, 60)
        who = draws.integers(0, 8, 60)
        exceeded += np.bincount(who, amounts).max() > largest_total_threshold(amounts, who, 8, 1, error_rate=0.01)
    assert exceeded <= 9  # 3 expected


def test_a_block_is_as_long_as_what_disturbs_its_steps() -> None:
    draws = np.random.default_rng(0)
    single = draws.exponential(1.0, 1000), draws.integers(0, 8, 1000)
    assert block_length(*single) == 1
    bursts = single[0], np.repeat(single[1][:50], 20)
    assert 16 <= block_length(*bursts) <= 128
    always = np.where(draws.random(1000) < 0.5, 3, single[1])  # member 3 bears most all the time: no disturbance
    assert block_length(single[0], always) == 1


def test_what_falls_on_one_member_in_one_block_is_chance() -> None:
    amounts, who = np.ones(60), np.repeat([2, 0, 1], 20)
    assert largest_total_threshold(amounts, who, 3, 20, error_rate=0.01) == 60, "they may all have fallen on one"
    assert largest_total_threshold(amounts, who, 3, 1, error_rate=0.01) < 40


def test_refits_spread_as_the_values_do() -> None:
    fitted = np.full(100, 2.0)
    draws = refit_draws(fitted, np.full(100, 0.1), lambda values: np.array([np.log(values).mean()]), 500)
    assert draws.shape == (500, 1) and draws.std() == pytest.approx(0.1 / 10, rel=0.15)
