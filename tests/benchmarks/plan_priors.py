"""Estimates the constants of the models behind `hpc-train plan` on published series, and prints them.

    python -m tests.benchmarks.plan_priors > tests/benchmarks/plan_priors.json

A coordinate search over the priors of `mechanistic_model.py`, for the error of sizes up to 8 times the largest one that
a fit has seen. It is done on parts A and B of the series, which differ in their sources, so that `make bench-plan`
judges the constants of each on the other, and on all, which are those of the package.
"""

import json
import sys
from collections import Counter
from dataclasses import replace

import numpy as np

from hpc_train.analysis.models import mechanistic_model
from hpc_train.analysis.models.nonnegative_regression import NUM_KEPT, Sampler
from hpc_train.core.records import FloatArray
from tests.published import Series, all_series

_NUM_CHAINS, _NUM_SWEEPS = 24, 96
_LEAST_BEYOND, _MOST_BEYOND = 1.9, 8.1
_SMALL_ERROR = 0.01  # smaller ones do not matter: runs differ by as much
_MOST_PRESENCE = 0.9
_MOST_NOISE = 0.01  # repeated runs of one job differ by about this much
_FACTORS = (2.5, 1.6, 1.3)  # by which a constant is changed


class Folds:
    """Every series cut after each of its sizes: the sizes before, and those up to 8 times the last of them."""

    def __init__(self, series: list[Series]) -> None:
        self.weak = series[0].weak
        self.parts = list(priors(self.weak).scales)
        num_of_origin = Counter(each.origin for each in series)
        known, ahead, weights = [], [], []
        for each in series:
            cuts = [(kept, ranks) for kept in range(2, len(each.ranks)) if len(ranks := _ahead(each, kept))]
            for kept, indices in cuts:
                before, after = self._columns(each, kept, indices)
                known.append(before)
                ahead.append(after)
                # Series count alike within an origin, and origins by the square root of their series.
                weights.append(num_of_origin[each.origin] ** -0.5 / len(cuts))
        self.known, self.ahead, self.weights = _padded(known), _padded(ahead), np.array(weights)

    def _columns(self, series: Series, kept: int, indices: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(sizes, parts) relative to the measured times: before the cut, and after it."""
        measured = series.measurements.smallest(kept)
        parts = mechanistic_model.parts_of_a_step(measured, series.ranks)
        columns = np.stack([parts[name] / series.step_s for name in ("compute_s", *self.parts)], axis=1)
        columns *= series.step_s[0]  # coefficients are in units of the first step, as the scales are
        shown = [True, *(np.ptp(parts[name][:kept]) > 0 for name in self.parts)]
        return columns[:kept] * shown, columns[indices] * shown

    def loss(self, values: dict[str, float]) -> float:
        """The mean logarithm of errors."""
        regression = replace(priors(self.weak).regression, noise=values["noise"], presence=values["presence"])
        scales = np.array([[1.0, *(values[name] for name in self.parts)]])
        rows = np.repeat(self.known, _NUM_CHAINS, axis=0)
        sampler = Sampler(rows, np.zeros(rows.shape[1]), scales, regression, len(rows))
        draws = sampler.run(_NUM_SWEEPS).coefficients.reshape(NUM_KEPT, len(self.known), _NUM_CHAINS, -1)
        guesses = np.einsum("kfct,fnt->fkcn", draws, self.ahead).reshape(len(self.known), -1, self.ahead.shape[1])
        is_there = self.ahead[:, :, 0] > 0
        errors = np.abs(np.log(np.median(guesses, axis=1), where=is_there, out=np.zeros(is_there.shape)))
        each = np.sum(np.log(_SMALL_ERROR + errors) * is_there, axis=1) / is_there.sum(axis=1)
        return float(self.weights @ each / self.weights.sum())


def _ahead(series: Series, kept: int) -> FloatArray:
    """The indices of the sizes that a fit to the `kept` smallest is asked for."""
    beyond = series.ranks / series.ranks[kept - 1]
    return np.flatnonzero((beyond >= _LEAST_BEYOND) & (beyond <= _MOST_BEYOND))


def _padded(arrays: list[FloatArray]) -> FloatArray:
    """Arrays of different lengths in one, 0 where there is nothing."""
    longest = max(len(each) for each in arrays)
    return np.stack([np.pad(each, ((0, longest - len(each)), (0, 0))) for each in arrays])


def priors(weak: bool) -> mechanistic_model.Priors:
    return mechanistic_model.WEAK if weak else mechanistic_model.STRONG


def use(weak: bool, values: dict[str, float]) -> None:
    """Makes the model use other constants: the scales of its parts, noise and presence."""
    regression = replace(priors(weak).regression, noise=values["noise"], presence=values["presence"])
    made = mechanistic_model.Priors({part: values[part] for part in priors(weak).scales}, regression)
    setattr(mechanistic_model, "WEAK" if weak else "STRONG", made)


def search(series: list[Series]) -> dict[str, float]:
    """The constants with the least loss found, from those that the package has."""
    folds, start = Folds(series), priors(series[0].weak)
    best = {**start.scales, "noise": start.regression.noise, "presence": start.regression.presence}
    least = folds.loss(best)
    for factor in _FACTORS:
        for name in best:
            for change in (factor, 1 / factor):
                tried = {**best, name: float(f"{best[name] * change:.2g}")}
                if tried["presence"] > _MOST_PRESENCE or tried["noise"] > _MOST_NOISE:
                    continue
                found = folds.loss(tried)
                if found < least - 1e-3:
                    least, best = found, tried
                    break
        print(f"  factor {factor}: {least:.4f} {best}", file=sys.stderr, flush=True)
    return best


def main() -> None:
    found = {}
    for part in ("A", "B", "all"):
        series = [each for each in all_series() if part in ("all", each.part)]
        by_kind = {weak: search([each for each in series if each.weak == weak]) for weak in (True, False)}
        found[part] = {"weak": by_kind[True], "strong": by_kind[False]}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
