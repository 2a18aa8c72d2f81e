"""Models of a step's time over the number of ranks N, and how their parameters are fitted.

share(N) is the samples of one rank in a step, relative to the smallest measured size: 1 in weak scaling, falling as 1/N
in strong scaling. `analytic_model.py` has the mechanistic model.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal, Self

import numpy as np

from hpc_train.analysis.models.measurements import Measurements
from hpc_train.core.records import FloatArray, IntArray
from hpc_train.core.statistics import nonnegative_least_squares

REPEATABILITY = 0.01  # repeated runs of one job differ by about this much: no measured size is more certain
# The gradients of the layers next to the input are ready last, so no computation is left to hide their communication.
LAST_MESSAGE_SHARE = 0.05
ModelName = Literal["mechanistic", "extra-p", "amdahl", "usl"]
Algorithm = Literal["ring", "tree"]


class TooFewSizes(Exception):
    """A model cannot be fitted to these sizes; the message says why."""


@dataclass(frozen=True, eq=False)
class Fit(ABC):
    """A model fitted to measurements. Calling it gives the seconds of a step at any numbers of ranks."""

    measurements: Measurements
    values: FloatArray = field(default_factory=lambda: np.zeros(0))  # (parameters,); empty before `fitted`

    @property
    @abstractmethod
    def model(self) -> ModelName: ...

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names of the parameters."""

    @property
    @abstractmethod
    def form(self) -> str:
        """The formula in words."""

    @abstractmethod
    def predict(self, values: FloatArray, ranks: IntArray) -> FloatArray:
        """Seconds of a step with these parameters."""

    @abstractmethod
    def refit(self, step_s: FloatArray) -> FloatArray:
        """The parameters for other step times of the same sizes."""

    def __call__(self, ranks: IntArray) -> FloatArray:
        return self.predict(self.values, np.asarray(ranks))

    def fitted(self) -> Self:
        return replace(self, values=self.refit(self.measurements.step_s))


def residual_scale(measurements: Measurements) -> FloatArray:
    """(n,) relative deviation within which each measured step time is trusted."""
    return np.hypot(measurements.error, REPEATABILITY)


# ---------------------------------------------------------------------------------------------- Amdahl, USL


def fit_contention(measurements: Measurements, with_coherence: bool) -> Fit:
    """Amdahl's law, or the universal scalability law. Raises `TooFewSizes`."""
    num_parameters, num_sizes = 3 if with_coherence else 2, len(measurements.ranks)
    if num_sizes < num_parameters:
        were = "was" if num_sizes == 1 else "were"
        raise TooFewSizes(f"{num_parameters} parameters need {num_parameters} sizes, and {num_sizes} {were} measured")
    return _ContentionFit(measurements, with_coherence=with_coherence).fitted()


@dataclass(frozen=True, eq=False)
class _ContentionFit(Fit):
    """T(N) = T1 share(N) (1 + sigma (N - 1) + kappa N (N - 1)), with kappa = 0 for Amdahl's law.

    Amdahl, AFIPS 1967, written as the loss against ideal sharing; kappa, the cost of keeping N ranks coherent, is
    Gunther's ("A general theory of computational scalability based on rational functions", arXiv:0808.1431, 2008).
    """

    with_coherence: bool = False

    @property
    def model(self) -> ModelName:
        return "usl" if self.with_coherence else "amdahl"

    @property
    def names(self) -> tuple[str, ...]:
        return ("T1_s", "sigma", "kappa") if self.with_coherence else ("T1_s", "sigma")

    @property
    def form(self) -> str:
        return "T1 share (1 + sigma (N-1)" + (" + kappa N (N-1))" if self.with_coherence else ")")

    def predict(self, values: FloatArray, ranks: IntArray) -> FloatArray:
        return np.asarray(self._columns(ranks) @ np.concatenate([values[:1], values[0] * values[1:]]))

    def refit(self, step_s: FloatArray) -> FloatArray:
        weights = 1 / (step_s * residual_scale(self.measurements))
        columns = self._columns(self.measurements.ranks) * weights[:, None]
        linear = nonnegative_least_squares(columns, step_s * weights)  # T1, T1 sigma, T1 kappa
        return np.concatenate([linear[:1], linear[1:] / max(linear[0], 1e-300)])

    def _columns(self, ranks: IntArray) -> FloatArray:
        n = np.asarray(ranks, dtype=float)
        columns = [np.ones_like(n), n - 1, n * (n - 1)][: len(self.names)]
        return np.stack(columns, axis=1) * self.measurements.share(ranks)[:, None]


# ---------------------------------------------------------------------------------------------- Extra-P

_POWERS = (0, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 1, 5 / 4, 4 / 3, 3 / 2, 5 / 3, 2, 5 / 2, 3)
_LOGS = (0, 1, 2)


def fit_extra_p(measurements: Measurements) -> Fit:
    """Extra-P's normal form with one term, chosen from its search space. Raises `TooFewSizes`.

    Calotoiu et al., "Using automated performance modeling to find scalability bugs in complex codes", SC 2013. As
    there, the term is the one with the least error over leave-one-out fits.
    """
    num_sizes = len(measurements.ranks)
    if num_sizes < 3:
        raise TooFewSizes(f"3 parameters (c0, c1 and a term) need 3 sizes, and there are {num_sizes}")
    terms = [_ExtraPFit(measurements, power=i, log=j) for i, j in product(_POWERS, _LOGS) if (i, j) != (0, 0)]
    return min(terms, key=_ExtraPFit.leave_one_out_error).fitted()


@dataclass(frozen=True, eq=False)
class _ExtraPFit(Fit):
    """T(N) = share(N) (c0 + c1 N^power log2(N)^log)."""

    power: float = 0.0
    log: int = 0

    @property
    def model(self) -> ModelName:
        return "extra-p"

    @property
    def names(self) -> tuple[str, ...]:
        return ("c0_s", "c1_s")

    @property
    def form(self) -> str:
        power = f" N^{self.power:.3g}" if self.power else ""
        log = f" log2(N)^{self.log}" if self.log else ""
        return f"share (c0 + c1{power}{log})"

    def predict(self, values: FloatArray, ranks: IntArray) -> FloatArray:
        return np.asarray(self.measurements.share(ranks) * (values[0] + values[1] * self._term(ranks)))

    def refit(self, step_s: FloatArray) -> FloatArray:
        return self._solve(step_s, np.ones(len(step_s)))

    def leave_one_out_error(self) -> float:
        """The mean relative error at each size of a fit to the others."""
        step_s, ranks = self.measurements.step_s, self.measurements.ranks
        errors = []
        for left_out in range(len(ranks)):
            kept = np.ones(len(ranks))
            kept[left_out] = 0
            guess = self.predict(self._solve(step_s, kept), ranks)[left_out]
            errors.append(abs(guess / step_s[left_out] - 1))
        return float(np.mean(errors))

    def _term(self, ranks: IntArray) -> FloatArray:
        n = np.asarray(ranks, dtype=float)
        return np.asarray(n**self.power * np.log2(n) ** self.log)

    def _solve(self, step_s: FloatArray, kept: FloatArray) -> FloatArray:
        """Least squares of relative residuals at the sizes that are kept (1; else 0)."""
        share = self.measurements.share(self.measurements.ranks)
        weights = np.sqrt(kept) / (step_s * residual_scale(self.measurements))
        columns = np.stack([share, share * self._term(self.measurements.ranks)], axis=1) * weights[:, None]
        return np.asarray(np.linalg.lstsq(columns, step_s * weights, rcond=None)[0])
