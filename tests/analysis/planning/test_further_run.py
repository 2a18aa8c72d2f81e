"""The further run that a plan names: it is made, and narrows the answer as the plan said."""

import numpy as np
import pytest

from hpc_train.analysis.models.predict import Forecast, Prediction, predict
from hpc_train.analysis.planning.budget import steps_work
from hpc_train.analysis.planning.further_run import further_run
from hpc_train.analysis.planning.plan import Limits, make_plan
from hpc_train.analysis.report.notes.plan import further_run_text
from tests.analysis.models.test_predict import measurements, noisy


def strong(sizes: list[int], seed: int = 0) -> Prediction:
    n = np.array(sizes)
    return predict(measurements(sizes, noisy(10.0 * (0.01 + 0.99 / n), seed), weak=False, batch=4096.0))


def width(forecast: Forecast) -> float:
    low, high = forecast.step_interval_s
    return float(np.log(high / low))


@pytest.mark.parametrize("seed", range(3))
def test_the_run_narrows_the_interval_by_what_was_said_or_more(seed: int) -> None:
    sizes, asked = [1, 2, 4, 8], 64
    before = strong(sizes, seed)
    (answer,) = before.at([asked])
    found = further_run(before, answer, [*sizes, 16, 32], 100, None)
    assert found is not None and found.ranks == 32 and found.nodes == 8 and not found.repeats
    assert found.node_hours == pytest.approx(8 * 100 * 10 * (0.01 + 0.99 / 32) / 3600, rel=0.2)
    (after,) = strong([*sizes, found.ranks], seed).at([asked])
    # The estimate takes everything as normal, which the heavy tails of the interval exceed: a run may narrow it more.
    assert width(after) < 1.5 * found.interval_ratio * width(answer) < width(answer)


def test_a_dear_run_is_not_named_and_a_useless_one_neither() -> None:
    before = strong([1, 2, 4, 8, 16, 32])
    (within,) = before.at([16])
    assert further_run(before, within, [1], 100, None) is None, "nothing is left to be learned at 1 rank"
    (beyond,) = before.at([128])
    cheap, dear = (further_run(before, beyond, [64, 128], 100, hours) for hours in (1e-3, None))
    assert cheap is None and dear is not None and dear.ranks in (64, 128)


def test_a_plan_says_it() -> None:
    foreseen = strong([1, 2, 4, 8])
    made = make_plan(foreseen, steps_work(foreseen.measurements, 1e6), Limits(max_nodes=16), run_steps=300)
    assert made.further is not None and made.further.steps == 300
    assert f"({made.further.ranks} ranks)" in further_run_text(made) and "scale --next" in further_run_text(made)
