"""Models of a step's time over the number of ranks N, and how their parameters are fitted.

share(N) is the samples of one rank in a step, relative to the smallest measured size: 1 in weak scaling, falling as 1/N
in strong scaling. `mechanistic_model.py` has the mechanistic model.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from hpc_train.analysis.models.measurements import Measurements
from hpc_train.analysis.models.nonnegative_regression import NUM_DRAWS, Prior, sample_posterior
from hpc_train.analysis.stats.bootstrap import refit_draws
from hpc_train.core.records import FloatArray, IntArray

ModelName = Literal["mechanistic", "extra-p", "amdahl", "usl"]


class CannotFit(Exception):
    """A model cannot be fitted to these sizes: they are too few, or its chains do not agree. The message says why."""


@dataclass(frozen=True, eq=False)
class Fit(ABC):
    """A model fitted to measurements. Calling it gives the seconds of a step at any numbers of ranks."""

    measurements: Measurements
    draws: FloatArray  # (draws, parameters) equally likely values of the parameters
    noise: FloatArray  # (draws,) relative deviation of one run from the model

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
    def predict(self, draws: FloatArray, ranks: IntArray) -> FloatArray:
        """(draws, n) seconds of a step with each of these parameters."""

    def __call__(self, ranks: IntArray) -> FloatArray:
        """(n,) the median over the draws."""
        return np.asarray(np.median(self.predict(self.draws, np.asarray(ranks)), axis=0))


# ---------------------------------------------------------------------------------------------- Amdahl, USL

_FREE = 1e3  # prior scale of sigma and kappa: nothing draws them to 0
_LAW_PRIOR = Prior(
    presence=1 - 1e-9, degrees=1.0, noise=0.004, noise_degrees=3.0, outlier_degrees=30.0
)  # nearly least squares


def fit_contention(measurements: Measurements, with_coherence: bool) -> Fit:
    """Amdahl's law, or the universal scalability law. Raises `CannotFit`."""
    num_parameters, num_sizes = 3 if with_coherence else 2, len(measurements.ranks)
    if num_sizes < num_parameters:
        were = "was" if num_sizes == 1 else "were"
        raise CannotFit(f"{num_parameters} parameters need {num_parameters} sizes, and {num_sizes} {were} measured")
    columns = _contention_columns(measurements, measurements.ranks)[:, :num_parameters]
    scales = np.full(num_parameters, _FREE * measurements.step_s[0])
    posterior = sample_posterior(columns, measurements.step_s, measurements.error, scales, _LAW_PRIOR)
    whole_s, *losses = posterior.coefficients.T
    draws = np.stack([whole_s, *(loss / np.maximum(whole_s, 1e-300) for loss in losses)], axis=1)
    return _ContentionFit(measurements, draws, posterior.noise)


def _contention_columns(measurements: Measurements, ranks: IntArray) -> FloatArray:
    n = np.asarray(ranks, dtype=float)
    return np.stack([np.ones_like(n), n - 1, n * (n - 1)], axis=1) * measurements.share(n)[:, None]


@dataclass(frozen=True, eq=False)
class _ContentionFit(Fit):
    """T(N) = T1 share(N) (1 + sigma (N - 1) + kappa N (N - 1)), with kappa = 0 for Amdahl's law.

    Amdahl, AFIPS 1967, written as the loss against ideal sharing; kappa, the cost of keeping N ranks coherent, is
    Gunther's ("A general theory of computational scalability based on rational functions", arXiv:0808.1431, 2008).
    """

    @property
    def model(self) -> ModelName:
        return "usl" if self.draws.shape[1] == 3 else "amdahl"

    @property
    def names(self) -> tuple[str, ...]:
        return ("T1_s", "sigma", "kappa")[: self.draws.shape[1]]

    @property
    def form(self) -> str:
        return "T1 share (1 + sigma (N-1)" + (" + kappa N (N-1))" if self.model == "usl" else ")")

    def predict(self, draws: FloatArray, ranks: IntArray) -> FloatArray:
        linear = np.concatenate([draws[:, :1], draws[:, :1] * draws[:, 1:]], axis=1)
        return np.asarray(linear @ _contention_columns(self.measurements, ranks)[:, : draws.shape[1]].T)


# ---------------------------------------------------------------------------------------------- Extra-P

_POWERS = (0, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 1, 5 / 4, 4 / 3, 3 / 2, 5 / 3, 2, 5 / 2, 3)
_LOGS = (0, 1, 2)
_LEAST_SIZES = 5
_LEAST_NOISE, _MOST_NOISE = 0.004, 0.5  # relative


def fit_extra_p(measurements: Measurements) -> Fit:
    """Extra-P's normal form with one term or none, chosen from its search space. Raises `CannotFit`.

    Calotoiu et al., "Using automated performance modeling to find scalability bugs in complex codes", SC 2013. As
    there, five sizes are needed, and the term is the one with the least error over leave-one-out fits.
    """
    num_sizes, step_s = len(measurements.ranks), measurements.step_s
    if num_sizes < _LEAST_SIZES:
        raise CannotFit(f"Extra-P's method needs {_LEAST_SIZES} sizes, and there are {num_sizes}")
    power, log = min(product(_POWERS, _LOGS), key=lambda term: _leave_one_out_error(measurements, *term))
    columns = _extra_p_columns(measurements, measurements.ranks, power, log)
    fitted_s = columns @ _least_squares(columns, step_s, step_s)
    missed = float(np.sqrt(np.sum((step_s / fitted_s - 1) ** 2) / (num_sizes - columns.shape[1])))
    noise = min(max(missed, _LEAST_NOISE), _MOST_NOISE)
    scale = np.hypot(measurements.error, noise)
    draws = refit_draws(fitted_s, scale, lambda drawn_s: _least_squares(columns, drawn_s, step_s), NUM_DRAWS)
    return _ExtraPFit(measurements, draws, np.full(NUM_DRAWS, noise), power, log)


def _leave_one_out_error(measurements: Measurements, power: float, log: int) -> float:
    """The mean relative error at each size of a fit to the others."""
    columns, step_s = _extra_p_columns(measurements, measurements.ranks, power, log), measurements.step_s
    errors = []
    for left_out in range(len(step_s)):
        kept = np.arange(len(step_s)) != left_out
        guess = columns[left_out] @ _least_squares(columns[kept], step_s[kept], step_s[kept])
        errors.append(abs(guess / step_s[left_out] - 1))
    return float(np.mean(errors))


def _extra_p_columns(measurements: Measurements, ranks: IntArray, power: float, log: int) -> FloatArray:
    """(n, 2), or (n, 1) of the constant hypothesis."""
    n, share = np.asarray(ranks, dtype=float), measurements.share(ranks)
    has_term = (power, log) != (0, 0)
    return np.stack([share, share * n**power * np.log2(n) ** log][: 1 + has_term], axis=1)


def _least_squares(columns: FloatArray, wanted: FloatArray, scale: FloatArray) -> FloatArray:
    """Of residuals relative to `scale`."""
    return np.asarray(np.linalg.lstsq(columns / scale[:, None], wanted / scale, rcond=None)[0])


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
        return ("c0_s", "c1_s")[: self.draws.shape[1]]

    @property
    def form(self) -> str:
        if len(self.names) == 1:
            return "share c0"
        power = f" N^{self.power:.3g}" if self.power else ""
        log = f" log2(N)^{self.log}" if self.log else ""
        return f"share (c0 + c1{power}{log})"

    def predict(self, draws: FloatArray, ranks: IntArray) -> FloatArray:
        return np.asarray(draws @ _extra_p_columns(self.measurements, ranks, self.power, self.log).T)
