"""Models of a step's time over the number of ranks: what they say, and how their parameters are fitted.

share(N) is the samples of one rank in a step, relative to the smallest measured size: 1 in weak scaling, falling as 1/N
in strong scaling. The mechanistic model has a room of its own, `analytic_model.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hpc_train.analysis.models.measurements import Measurements
from hpc_train.core.records import FloatArray, IntArray
from hpc_train.core.statistics import nonnegative_least_squares

# Repeated runs of one job differ by about this much: no measured size counts as more certain.
REPEATABILITY = 0.01
# The gradients of the layers next to the input are ready last, and nothing is left to hide their sending behind.
LAST_MESSAGE_SHARE = 0.05
ModelName = Literal["mechanistic", "extra-p", "amdahl", "usl"]
Algorithm = Literal["ring", "tree"]


class TooFewSizes(Exception):
    """A model cannot be fitted to these sizes; the message says why."""


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted model: parameters by name, and the time of a step at any number of ranks."""

    model: ModelName
    names: tuple[str, ...]
    values: FloatArray  # (parameters,)
    predict: Callable[[FloatArray, IntArray], FloatArray]  # (values, ranks) -> seconds a step
    refit: Callable[[FloatArray], FloatArray]  # step times of the same sizes -> values
    form: str  # the formula in words

    def __call__(self, ranks: IntArray) -> FloatArray:
        return self.predict(self.values, np.asarray(ranks))


def residual_scale(measurements: Measurements) -> FloatArray:
    """(n,) relative deviation that each measured step time is trusted to."""
    return np.hypot(measurements.error, REPEATABILITY)


# ---------------------------------------------------------------------------------------------- Amdahl, USL


def fit_contention(measurements: Measurements, with_coherence: bool) -> Fit:
    """T(N) = T1 share(N) (1 + sigma (N - 1) + kappa N (N - 1)), with kappa = 0 for Amdahl's law.

    Amdahl, AFIPS 1967, written as the loss against ideal sharing; kappa, what keeping N ranks coherent costs, is
    Gunther's ("A general theory of computational scalability based on rational functions", arXiv:0808.1431, 2008).
    """
    needed = 3 if with_coherence else 2
    _need(measurements, needed)
    start = 1 if with_coherence else 0

    def columns(ranks: IntArray) -> FloatArray:
        n = np.asarray(ranks, dtype=float)
        each = [np.ones_like(n), n - 1, n * (n - 1)][: 2 + start]
        return np.stack(each, axis=1) * measurements.share(ranks)[:, None]

    def predict(values: FloatArray, ranks: IntArray) -> FloatArray:
        return np.asarray(columns(ranks) @ np.concatenate([values[:1], values[0] * values[1:]]))

    def refit(step_s: FloatArray) -> FloatArray:
        weights = 1 / (step_s * residual_scale(measurements))
        solved = nonnegative_least_squares(columns(measurements.ranks) * weights[:, None], step_s * weights)
        return np.concatenate([solved[:1], solved[1:] / max(solved[0], 1e-300)])

    names = ("T1_s", "sigma", "kappa")[: 2 + start]
    form = "T1 share (1 + sigma (N-1)" + (" + kappa N (N-1))" if with_coherence else ")")
    return Fit("usl" if with_coherence else "amdahl", names, refit(measurements.step_s), predict, refit, form)


def _need(measurements: Measurements, sizes: int) -> None:
    if len(measurements.ranks) < sizes:
        have = len(measurements.ranks)
        raise TooFewSizes(
            f"{sizes} parameters need {sizes} sizes, and {have} {'was' if have == 1 else 'were'} measured"
        )


# ---------------------------------------------------------------------------------------------- Extra-P

_POWERS = (0, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 1, 5 / 4, 4 / 3, 3 / 2, 5 / 3, 2, 5 / 2, 3)
_LOGS = (0, 1, 2)


def fit_extra_p(measurements: Measurements) -> Fit:
    """T(N) = share(N) (c0 + c1 N^i log2(N)^j): Extra-P's normal form with one term, i and j from its search space.

    Calotoiu et al., "Using automated performance modeling to find scalability bugs in complex codes", SC 2013. As
    there, the term is the one with the least error over leave-one-out fits.
    """
    if len(measurements.ranks) < 3:
        raise TooFewSizes(f"3 parameters (c0, c1 and a term) need 3 sizes, and {len(measurements.ranks)} are there")
    terms = [(i, j) for i in _POWERS for j in _LOGS if (i, j) != (0, 0)]
    share = measurements.share(measurements.ranks)

    def column(term: tuple[float, int], ranks: IntArray) -> FloatArray:
        n = np.asarray(ranks, dtype=float)
        return np.asarray(n ** term[0] * np.log2(n) ** term[1])

    def solve(term: tuple[float, int], step_s: FloatArray, kept: FloatArray) -> FloatArray:
        weights = np.sqrt(kept) / (step_s * residual_scale(measurements))
        columns = np.stack([share, share * column(term, measurements.ranks)], axis=1) * weights[:, None]
        return np.asarray(np.linalg.lstsq(columns, step_s * weights, rcond=None)[0])

    def loss(term: tuple[float, int]) -> float:
        errors = []
        for left_out in range(len(measurements.ranks)):
            kept = np.ones(len(measurements.ranks))
            kept[left_out] = 0
            c0, c1 = solve(term, measurements.step_s, kept)
            guess = share[left_out] * (c0 + c1 * column(term, measurements.ranks)[left_out])
            errors.append(abs(guess / measurements.step_s[left_out] - 1))
        return float(np.mean(errors))

    best = min(terms, key=loss)
    everything = np.ones(len(measurements.ranks))

    def predict(values: FloatArray, ranks: IntArray) -> FloatArray:
        return np.asarray(measurements.share(ranks) * (values[0] + values[1] * column(best, ranks)))

    def refit(step_s: FloatArray) -> FloatArray:
        return solve(best, step_s, everything)

    power = f" N^{best[0]:.3g}" if best[0] else ""
    log = f" log2(N)^{best[1]}" if best[1] else ""
    return Fit("extra-p", ("c0_s", "c1_s"), refit(measurements.step_s), predict, refit, f"share (c0 + c1{power}{log})")
