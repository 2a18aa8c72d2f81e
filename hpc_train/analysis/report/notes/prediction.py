"""What to know before reading a prediction: odd measurements, a poor fit, where the network's costs are from."""

import numpy as np

from hpc_train.analysis.models.measurements import Measurements
from hpc_train.analysis.models.predict import Prediction
from hpc_train.core.formatting import plural

_ODD_GAIN = 1.1  # samples/s per rank over those at the size before
_POOR_FIT = 0.1


def prediction_notes(prediction: Prediction) -> list[str]:
    measurements = prediction.measurements
    return [
        *measurements.notes,
        *_superlinear_notes(measurements),
        *_poor_fit_notes(prediction),
        *_network_notes(measurements),
        *_micro_batch_notes(measurements),
    ]


def _superlinear_notes(measurements: Measurements) -> list[str]:
    per_rank = measurements.samples(measurements.ranks) / measurements.step_s / measurements.ranks
    return [
        f"{plural(size, 'rank')}: {100 * (gain - 1):.0f}% more samples/s per rank than at the size before, which no"
        " model explains. Repeat the smaller sizes before you trust a prediction."
        for gain, size in zip(per_rank[1:] / per_rank[:-1], measurements.ranks[1:].tolist(), strict=True)
        if gain > _ODD_GAIN
    ]


def _poor_fit_notes(prediction: Prediction) -> list[str]:
    fit, measurements = prediction.chosen.fit, prediction.measurements
    assert fit is not None
    misses = np.abs(fit(measurements.ranks) / measurements.step_s - 1)
    worst = int(np.argmax(misses))
    if misses[worst] <= _POOR_FIT:
        return []
    size = plural(int(measurements.ranks[worst]), "rank")
    return [f"{size}: the model misses the measured time by {100 * misses[worst]:.0f}%."]


def _network_notes(measurements: Measurements) -> list[str]:
    if measurements.network is None:
        return []
    if measurements.gradient_bytes is None:
        return ["The network's costs are not used: the size of the gradients is unknown (--gradient-bytes)."]
    return [f"The cost of an all-reduce is taken from {measurements.network.source}."]


def _micro_batch_notes(measurements: Measurements) -> list[str]:
    if measurements.accumulate is None or measurements.weak or (measurements.accumulate == 1).all():
        return []
    most = f"{measurements.most_whole_micro_batches:,.0f}"
    return [
        f"Up to {most} ranks a micro-batch is taken to keep its size, with fewer of them on more ranks. On more than"
        f" {most} it gets smaller, and no measured size shows what that costs."
    ]
