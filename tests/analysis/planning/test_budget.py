"""What a plan starts from: step times with their errors, what hides communication, work and power."""

from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from hpc_train.analysis.models.measurements import from_group
from hpc_train.analysis.models.predict import predict
from hpc_train.analysis.planning.budget import steps_work, target_work
from hpc_train.analysis.planning.plan import Limits, make_plan
from hpc_train.analysis.planning.power import power
from hpc_train.analysis.report.facts import gather
from hpc_train.analysis.scaling.compare import Group
from tests.analysis.convergence.test_target import written
from tests.laws import Laws, study
from tests.synthetic import SHARES, Recipe, write_run

NORMAL_95 = 1.96


def group_of(root: Path, *recipes: Recipe) -> Group:
    for recipe in recipes:
        write_run(root, recipe)
    (found,) = gather([root]).scaling.groups
    return found


def test_the_error_of_a_step_time_is_that_of_its_interval(tmp_path: Path) -> None:
    group = group_of(tmp_path, Recipe(noise=0.02, steps=1010), Recipe(size=2, step_s=0.006, noise=0.04, steps=1010))
    errors = from_group(group).error
    for row, error in zip(group.rows, errors.tolist(), strict=True):
        low, high = row.step_interval_s or (0.0, 0.0)
        assert error == pytest.approx((high - low) / (2 * NORMAL_95 * (row.step_s or 0)), rel=0.15)
    # The standard error of the mean of 1000 independent steps.
    assert errors == pytest.approx([0.02 / sqrt(1000), 0.04 / sqrt(1000)], rel=0.5)


@pytest.mark.parametrize("backward", [0.2, 0.4, 0.6])
def test_communication_hides_behind_the_backward_passs_share_of_computing(tmp_path: Path, backward: float) -> None:
    shares = SHARES | {"forward": 0.7 - backward, "backward": backward}
    group = group_of(tmp_path, Recipe(shares=shares, steps=40), Recipe(size=2, step_s=0.006, shares=shares, steps=40))
    computing = 1 - shares["reduce"] - shares["data"]
    assert from_group(group).overlap == pytest.approx(backward / computing, rel=1e-3)


def test_power_that_fits_exactly_is_known_to_two_percent_at_best(tmp_path: Path) -> None:
    laws = Laws(steps=40, watts={"node": 300.0}, ranks_per_host=1, warmup=0)
    study(tmp_path, laws, (1, 2, 4))
    (group,) = gather([tmp_path]).scaling.groups
    found = power(from_group(group))
    assert found is not None and found.busy_w == pytest.approx(300, rel=0.02)
    assert found.relative_error == pytest.approx(0.02, abs=0.005), "a meter and a model are never exact"


def test_the_work_to_a_loss_is_known_to_no_better_than_its_runs_tell(tmp_path: Path) -> None:
    falling = 2.0 - 0.01 * np.arange(200)
    root = tmp_path / "one"
    written(root, Recipe(size=1, steps=200, warmup=0), falling)
    (group,) = gather([root]).scaling.groups
    assert target_work(group, 1.0).relative_error == 0.1, "one run"
    root = tmp_path / "several"
    for size, batch, speed in ((1, 32, 1.0), (2, 64, 1.6), (4, 128, 2.3)):  # steps = a / batch + b, nearly exactly
        steps_to_half = 100 / speed
        losses = 2.0 - np.arange(200) / steps_to_half
        recipe = Recipe(size=size, global_batch=None, batch_per_rank=32, steps=200, warmup=0)
        assert recipe.size * 32 == batch
        written(root, recipe, losses)
    (group,) = gather([root]).scaling.groups
    assert target_work(group, 1.0).relative_error == 0.05, "several batch sizes"


def test_an_extrapolation_is_bounded_on_both_sides_and_a_limit_counts_its_upper_end(tmp_path: Path) -> None:
    laws = Laws(name="job", steps=60, noise=0.01, serial=0.02, ranks_per_host=1)
    study(tmp_path, laws, (1, 2, 4, 8))
    (group,) = gather([tmp_path]).scaling.groups
    measurements = from_group(group)
    prediction, work = predict(measurements), steps_work(measurements, 10_000)
    for forecast in prediction.at([8, 16, 32]):
        low, high = forecast.step_interval_s
        assert 0 < low < forecast.step_s < high < np.inf
        rates = forecast.samples_per_s_interval
        assert rates == pytest.approx((laws.batch / high, laws.batch / low))
    at_32 = make_plan(prediction, work, Limits(max_nodes=32)).options[-1]
    assert at_32.forecast.ranks == 32 and at_32.time_s is not None and at_32.time_interval_s is not None
    assert at_32.time_s < at_32.time_interval_s[1] < np.inf
    between = (at_32.time_s + at_32.time_interval_s[1]) / 2
    tight = make_plan(prediction, work, Limits(max_nodes=32, deadline_s=between)).options[-1]
    assert [each.name for each in tight.broken] == ["deadline"], "it may take longer than the deadline"
