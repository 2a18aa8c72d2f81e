"""The further run that would tell most about the answer of a plan, and what it would cost."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpc_train.analysis.models.predict import Forecast, Prediction
from hpc_train.core.records import FloatArray, IntArray

_DEFAULT_STEPS = 100.0
_MOST_COST = 0.1  # of what the planned training takes
_NOTICEABLE = 0.9  # an interval that stays wider than this share of its width is not worth a run


@dataclass(frozen=True)
class FurtherRun:
    """A run that has not been made. interval_ratio: expected width of the answer's interval after it, over that now.

    node_hours: None if a table states no time of a step.
    """

    ranks: int
    nodes: int
    steps: float
    node_hours: float | None
    interval_ratio: float
    repeats: bool  # whether runs of this size are measured


def further_run(
    prediction: Prediction, answer: Forecast, sizes: Sequence[int], steps: float | None, most_node_hours: float | None
) -> FurtherRun | None:
    """Which of `sizes` would narrow the interval of `answer` most; the smaller one among equals.

    steps: of the runs so far, and so of this one. most_node_hours: of the planned training, of which it may take a
    tenth. None if none would narrow it noticeably.
    """
    measurements, num_steps = prediction.measurements, steps or _DEFAULT_STEPS
    ranks = np.array(sorted(set(sizes)))
    ratios = _interval_ratios(prediction, ranks, answer.ranks)
    best: FurtherRun | None = None
    for forecast, ratio in zip(prediction.at(ranks.tolist()), ratios.tolist(), strict=True):
        hours = None if measurements.stated == "rates" else forecast.nodes * num_steps * forecast.step_s / 3600
        is_cheap = most_node_hours is None or hours is None or hours <= _MOST_COST * most_node_hours
        if is_cheap and ratio < (_NOTICEABLE if best is None else 0.95 * best.interval_ratio):
            repeats = forecast.ranks in measurements.ranks
            best = FurtherRun(forecast.ranks, forecast.nodes, num_steps, hours, ratio, repeats)
    return best


def _interval_ratios(prediction: Prediction, ranks: IntArray, answer: int) -> FloatArray:
    """(n,) width of the answer's interval after a run of each size, over the width before, as if all were normal.

    What a run at m tells of the answer at a: Var(a | m) = Var(a) - Cov(a, m)^2 / Var(m), of logarithms. Both share the
    parameters and the drift up to the smaller of them; each has the noise of a run of its own.
    """
    measured = prediction.measurements.place(answer)
    if measured is not None:  # its interval comes from its own runs: only another one adds to them
        runs = prediction.measurements.repeats(measured)
        now, then = (float(np.mean(prediction.new_run_variance(measured, count))) for count in (runs, runs + 1))
        return np.where(ranks == answer, np.sqrt(then / now) if now else 1.0, 1.0)
    fit, largest = prediction.chosen.fit, prediction.measurements.largest
    assert fit is not None
    logs = np.log(np.maximum(fit.predict(fit.draws, np.append(ranks, answer)), 1e-300))
    covariance = np.cov(logs.T)
    doublings = np.log2(np.maximum(np.append(ranks, answer) / largest, 1.0))
    drift = float(prediction.doubling_variance(np.array([answer]))[0])
    covariance += drift * np.minimum.outer(doublings, doublings)
    covariance += np.diag(np.full(len(doublings), float(np.mean(fit.noise**2))))
    told = covariance[:-1, -1] ** 2 / np.diag(covariance)[:-1]
    return np.asarray(np.sqrt(np.maximum(1 - told / covariance[-1, -1], 0.0)))
