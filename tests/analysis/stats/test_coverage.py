"""How often each interval that the package prints holds the truth of simulated runs: nineteen times of twenty.

The quick form draws a thousand studies, the thorough form several thousands.
"""

import numpy as np
import pytest

from hpc_train.analysis.scaling.rows import Row, pooled_row, with_speedup
from hpc_train.core.statistics import Interval
from tests.analysis.stats.simulated import Coverage, Steps, oracle_half_width, timed

LEAST, MOST = 0.90, 0.98  # of intervals that hold the truth, at nominal 95%
WIDEST = 1.5  # times an oracle's
NUM_STUDIES = [1000, pytest.param(6000, marks=pytest.mark.thorough)]


def check(found: Coverage, name: str) -> None:
    assert LEAST <= found.held <= MOST and found.width <= WIDEST, (name, found)


@pytest.mark.parametrize("num_studies", NUM_STUDIES)
@pytest.mark.parametrize("num_runs", [(2, 2), (3, 3), (5, 5), (1, 3), (3, 2)])
@pytest.mark.parametrize("autocorrelation", [0.8, pytest.param(0.0, marks=pytest.mark.thorough)])
def test_speedup_and_efficiency_of_repeats(num_runs: tuple[int, int], autocorrelation: float, num_studies: int) -> None:
    """Of runs that differ by 3%: what the mean of many runs would show."""
    steps = Steps(100, autocorrelation=autocorrelation, run_noise=0.03)
    generator = np.random.default_rng([*num_runs, num_studies])
    intervals: list[Interval] = []
    for _ in range(num_studies):
        baseline = with_row(steps, generator, 1, num_runs[0])
        row = with_speedup(with_row(steps, generator, 4, num_runs[1]), baseline)
        assert row.speedup_interval is not None and row.relative_speed is not None and row.relative_speed.between_runs
        intervals.append(row.speedup_interval)
    error = sum(map(steps.squared_error, num_runs))
    check(Coverage.of(intervals, 1.0, oracle_half_width(error, sum(num_runs) - 2)), "speedup")


def with_row(steps: Steps, generator: np.random.Generator, ranks: int, num_runs: int) -> Row:
    return pooled_row([timed(ranks, series) for series in steps.draw(generator, num_runs)])


WITHIN = [
    Steps(100),
    Steps(100, autocorrelation=0.5),
    Steps(100, autocorrelation=0.8),
    Steps(1000, autocorrelation=0.8),
    Steps(1000, autocorrelation=0.95),
    Steps(20),
]


@pytest.mark.parametrize("num_studies", NUM_STUDIES)
@pytest.mark.parametrize("steps", WITHIN, ids=str)
def test_speedup_within_single_runs(steps: Steps, num_studies: int) -> None:
    """What these two runs would show if they had gone on."""
    generator = np.random.default_rng(steps.count)
    speedups: list[Interval] = []
    times: list[Interval] = []
    for _ in range(num_studies):
        baseline = with_row(steps, generator, 1, 1)
        row = with_speedup(with_row(steps, generator, 4, 1), baseline)
        assert row.relative_speed is not None and not row.relative_speed.between_runs
        assert row.speedup_interval is not None and row.step_interval_s is not None
        speedups.append(row.speedup_interval)
        times.append(row.step_interval_s)
    check(Coverage.of(speedups, 1.0, oracle_half_width(2 * steps.squared_error(1))), "speedup")
    check(Coverage.of(times, 0.010, oracle_half_width(steps.squared_error(1))), "step")
