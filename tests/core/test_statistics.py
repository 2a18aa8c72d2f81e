"""The interval of a mean and non-negative least squares: known values, coverage, columns of unlike size."""

import numpy as np
import pytest

from hpc_train.core.statistics import block_means, block_sums, mean_interval, nonnegative_least_squares


def test_the_interval_of_a_mean() -> None:
    assert mean_interval(np.array([])) == (None, None, None)
    assert mean_interval(np.array([3.0])) == (None, 3.0, None)
    assert mean_interval(np.array([2.0, 2.0, 2.0])) == (2.0, 2.0, 2.0)
    values = np.random.default_rng(1).normal(10.0, 1.0, 2000)
    low, middle, high = mean_interval(values)
    assert low is not None and middle is not None and high is not None
    assert low < 10.0 < high and low < middle < high
    assert 0.05 < high - low < 0.3  # about 4 / sqrt(2000) = 0.09
    assert mean_interval(values) == (low, middle, high)


def test_blocks_that_resemble_themselves_widen_the_interval() -> None:
    draws = np.random.default_rng(2)
    alike = np.repeat(draws.normal(10.0, 1.0, 50), 40)  # 50 independent values, each lasting 40 steps
    independent = draws.normal(10.0, 1.0, 2000)
    widths = []
    for values in (alike, independent):
        low, _, high = mean_interval(values)
        assert low is not None and high is not None
        widths.append(high - low)
    assert widths[0] > 3 * widths[1]


def test_blocks_are_consecutive() -> None:
    values = np.array([1.0, 2.0, 3.0, 10.0, 20.0])
    assert (block_sums(values, 2).tolist(), block_means(values, 2).tolist()) == ([6.0, 30.0], [2.0, 15.0])
    assert len(block_sums(np.arange(7.0))) == 7


def test_negative_coefficients_are_zero_and_columns_may_differ_by_any_power_of_ten() -> None:
    columns = np.array([[1e-9, 1e6], [2e-9, 1e6], [3e-9, 1e6]])
    assert nonnegative_least_squares(columns, columns @ [3e9, 2e-6]) == pytest.approx([3e9, 2e-6])
    assert nonnegative_least_squares(columns, columns @ [3e9, -1e-7])[1] == 0
