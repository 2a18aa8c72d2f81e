"""Joules of a plan: the power of a node at the load that a size leaves it, times the time."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hpc_train.analysis.models.measurements import Measurements
from hpc_train.analysis.planning.power import LEAST_POWER_ERROR, SAVED_WHILE_WAITING, power
from tests.analysis.models.test_predict import measurements
from tests.benchmarks import plan_power
from tests.published import all_series


def drawn(watts: Any, step_s: Any, ranks: list[int], **facts: Any) -> Measurements:
    """One rank a node, weak scaling with 64 samples a rank: `watts` of a node at each size."""
    known = measurements(ranks, step_s, ranks_per_node=1, **facts)
    return replace(known, joules_per_step=np.array(ranks) * np.asarray(watts) * known.step_s)


def test_joules_are_missing_where_no_meter_told_them() -> None:
    assert power(measurements([1, 2], [0.1, 0.1])) is None


@pytest.mark.parametrize("seed", range(3))
def test_the_power_of_busy_and_of_waiting_nodes_comes_back(seed: int) -> None:
    load = np.array([1.0, 0.9, 0.7, 0.5, 0.4])
    watts = (300 + 500 * load) * np.exp(np.random.default_rng(seed).normal(0, 0.01, 5))
    found = power(drawn(watts, 0.1 / load, [1, 2, 4, 8, 16]))
    assert found is not None
    assert found.busy_w == pytest.approx(800, rel=0.03)
    assert abs(found.waiting_w - 300) < 3 * found.waiting_error_w < 150
    ahead = np.array([32.0]), np.array([0.5]), np.array([32 * 64.0])  # five times as slow as one node
    truth = 32 * 0.5 * (300 + 500 * 0.2)
    assert abs(found.joules(*ahead)[0] / truth - 1) < 2 * found.error(*ahead)[0]


def test_sizes_of_one_load_leave_open_what_waiting_saves() -> None:
    found = power(drawn([500.0] * 3, [0.1] * 3, [1, 2, 4], idle_w=200.0))
    assert found is not None and found.busy_w == pytest.approx(500)
    saved = (500 - found.waiting_w) / (500 - 200)
    assert saved == pytest.approx(SAVED_WHILE_WAITING, abs=0.1) and "show the first alone" in found.assumed
    busy = np.array([4.0]), np.array([0.1]), np.array([4 * 64.0])
    slow = busy[0], np.array([0.4]), busy[2]
    assert found.joules(*busy)[0] == pytest.approx(4 * 0.1 * 500)
    assert 200 * 4 * 0.4 < found.joules(*slow)[0] < 500 * 4 * 0.4
    assert (
        found.error(*busy)[0] == pytest.approx(found.relative_error) and found.error(*slow)[0] > found.error(*busy)[0]
    )


def test_a_node_draws_no_less_than_idle_and_no_more_than_busy() -> None:
    found = power(drawn([900.0, 300.0], [0.1, 0.4], [1, 2], idle_w=280.0))
    assert found is not None and found.relative_error >= LEAST_POWER_ERROR
    assert 280 <= found.waiting_w < found.busy_w
    faster = found.joules(np.array([1.0]), np.array([0.01]), np.array([64.0]))
    assert faster[0] == pytest.approx(0.01 * 900), "ten times the fastest measured rate takes no more power"


def test_energy_passes_through_measurements_that_the_power_contradicts() -> None:
    """Nodes that draw more the less they have to do, which no share that waiting saves explains."""
    known = drawn([100, 109, 125, 140], [1.0, 1.1, 1.2, 1.36], [1, 2, 4, 8])
    found = power(known)
    assert found is not None and found.at_nodes == (1, 2, 4, 8) and found.worst[0] in (1, 8)

    def watts(nodes: list[float], step_s: list[float]) -> Any:
        counts = np.array(nodes)
        return found.joules(counts, np.array(step_s), 64 * counts) / counts / np.array(step_s)

    assert watts([1, 2, 4, 8], [1.0, 1.1, 1.2, 1.36]) == pytest.approx([100, 109, 125, 140])
    assert 125 < watts([6], [1.28])[0] < 140 and watts([16], [1.36])[0] == pytest.approx(140)
    agreed = power(drawn([100, 101, 99, 100], [1.0, 1.1, 1.2, 1.36], [1, 2, 4, 8]))
    assert agreed is not None and agreed.shifts == (1.0,)


def test_published_joules_follow_from_the_power_of_fewer_nodes_and_the_measured_time() -> None:
    """Better than the same power as at the largest known size, whose figures `make bench-plan` prints beside."""
    misses, same = [], []
    for series in plan_power.series_with_joules():
        for share in (0.25, 0.5):
            known = series.measurements.smallest(series.num_up_to(share))
            found, ahead = power(known), series.ranks[-1:]
            assert found is not None
            nodes = known.nodes(ahead).astype(float)
            joules = found.joules(nodes, series.step_s[-1:], known.samples(ahead))[0]
            misses.append(abs(joules / series.joules[-1] - 1))
            watts = known.joules_per_step[-1] / known.step_s[-1] / known.nodes(known.ranks[-1:])[0]
            same.append(abs(watts * nodes[0] * series.step_s[-1] / series.joules[-1] - 1))
    assert len(misses) == 10 and np.median(misses) < np.median(same) and np.median(misses) < 0.1


def test_series_without_joules_are_left_out() -> None:
    assert 0 < len(plan_power.series_with_joules()) < len(all_series())
