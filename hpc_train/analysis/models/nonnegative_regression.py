"""Bayesian regression on terms that can only add time: non-negative coefficients, most of them nearly 0."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_train.core.records import FloatArray

NUM_CHAINS = 64
NUM_SWEEPS = 160
_NUM_LINES = 2  # moves of all coefficients at a time, each sweep
_NUM_EXCHANGES = 3  # of a term that is there for one that is not, each sweep
NUM_KEPT = 8  # draws of a chain
NUM_DRAWS = NUM_CHAINS * NUM_KEPT
_CONVERGED = 1.1  # R-hat
_MOST_DOUBLINGS = 4  # of the sweeps, until chains agree
_NOISE_GRID = np.geomspace(0.001, 0.3, 24)  # relative standard deviations of one measurement


@dataclass(frozen=True)
class Prior:
    """What is known before the data.

    A term is there at all with probability `presence` (Mitchell and Beauchamp, "Bayesian variable selection in linear
    regression", JASA 83, 1988), and then its coefficient is half-Student with `degrees` of freedom
    around 0. Relative deviations of measurements are Student with `outlier_degrees` and a scale that is half-Student.
    """

    presence: float
    degrees: float
    noise: float
    noise_degrees: float
    outlier_degrees: float


@dataclass(frozen=True, eq=False)
class Posterior:
    """Draws from the posterior: coefficients (draws, terms), and the relative scale of a measurement (draws,)."""

    coefficients: FloatArray
    noise: FloatArray

    def r_hat(self, row: FloatArray) -> float:
        """By how much chains disagree on row @ coefficients; 1 if not at all.

        Of ranks, as normal scores, which single far draws do not sway: Vehtari et al., "Rank-normalization, folding,
        and localization: an improved R-hat", Bayesian Analysis 16(2), 2021.
        """
        from scipy.special import ndtri
        from scipy.stats import rankdata

        ranks = rankdata(self.coefficients @ row)
        scores = ndtri((ranks - 3 / 8) / (len(ranks) + 1 / 4)).reshape(NUM_KEPT, NUM_CHAINS)
        within = float(scores.var(axis=0, ddof=1).mean())
        between = float(scores.mean(axis=0).var(ddof=1))
        return float(np.sqrt(1 - 1 / NUM_KEPT + between / within)) if within > 0 else 1.0


def sample_posterior(
    columns: FloatArray,
    measured: FloatArray,
    error: FloatArray,
    scales: FloatArray,
    prior: Prior,
    asked: FloatArray | None = None,
) -> Posterior:
    """Gibbs sampling of measured = columns @ coefficients, coefficients >= 0, with relative deviations.

    columns: (n, terms); nothing draws the first coefficient to 0. error: (n,) the known relative standard error of each
    measurement, to which the noise adds. scales: (terms,) of the coefficients' prior, in units of `measured`.
    asked: (terms,) columns of a size that the draws are to predict: sampling goes on until the chains agree on it, or
    for 31 times as long.
    Each coefficient given the others is a truncated normal; the scales of the Student distributions are inverse gamma
    (Makalic and Schmidt, "A simple sampler for the horseshoe estimator", IEEE Signal Processing Letters 23(1), 2016).
    """
    sampler = Sampler(columns[None] / measured[:, None], error, np.asarray(scales)[None], prior, NUM_CHAINS)
    posterior = sampler.run(NUM_SWEEPS)
    for doublings in range(1, 1 + _MOST_DOUBLINGS):
        if asked is None or posterior.r_hat(asked) <= _CONVERGED:
            break
        posterior = sampler.run(NUM_SWEEPS << doublings)
    return posterior


class Sampler:
    """Chains that run at a time, one a row. Rows may be of several sets of measurements, some with fewer sizes.

    columns: (rows or 1, n, terms) relative to the measurements, 0 where there is none. error: (n,).
    scales: (rows or 1, terms).
    """

    def __init__(self, columns: FloatArray, error: FloatArray, scales: FloatArray, prior: Prior, num_rows: int) -> None:
        self._random = np.random.default_rng(0)
        self._columns, self._error, self._prior = columns, error, prior
        self._is_there = (np.abs(columns).sum(axis=2) > 0).astype(float)  # (rows or 1, n)
        _, num_sizes, num_terms = columns.shape
        self._prior_scales = np.broadcast_to(scales, (num_rows, num_terms))
        self._scales = self._prior_scales.copy()
        # Chains start at a first term that explains the data alone, which no prior draws to 0.
        self._values = np.zeros((num_rows, num_terms))
        self._values[:, 0] = self._is_there.sum(axis=1) / columns[:, :, 0].sum(axis=1)
        self._scales[:, 0] = 100 * self._values[:, 0]
        self._residuals = self._is_there - self._values[:, None, 0] * columns[:, :, 0]
        self._noise = np.full(num_rows, prior.noise)
        # Of each measurement, relative: low for outliers, 0 for none.
        self._precision = np.broadcast_to(self._is_there, (num_rows, num_sizes))
        self._log_prior = np.log(_NOISE_GRID) - (prior.noise_degrees + 1) / 2 * np.log1p(
            (_NOISE_GRID / prior.noise) ** 2 / prior.noise_degrees
        )

    def run(self, num_sweeps: int) -> Posterior:
        """The draws of the second half: `NUM_KEPT` of each row, those of all rows together, then the next."""
        values, noise = [], []
        every = num_sweeps // 2 // NUM_KEPT
        for sweep in range(num_sweeps):
            self._draw_coefficients()
            for _ in range(_NUM_LINES):
                self._move_along_a_line()
            for _ in range(_NUM_EXCHANGES):
                self._exchange_two_terms()
            self._draw_scales()
            self._draw_noise()
            if sweep >= num_sweeps - every * NUM_KEPT and (num_sweeps - 1 - sweep) % every == 0:
                values.append(self._values.copy())
                noise.append(self._noise)
        return Posterior(np.concatenate(values), np.concatenate(noise))

    def _draw_coefficients(self) -> None:
        weights = self._precision / (self._noise[:, None] ** 2 + self._error**2)
        for term in range(self._values.shape[1]):
            column = self._columns[:, :, term]
            # What is left to explain without this term.
            self._residuals += self._values[:, term, None] * column
            weighted = weights * column
            precision = (weighted * column).sum(axis=1) + self._scales[:, term] ** -2
            mean = (weighted * self._residuals).sum(axis=1) / precision
            drawn = _truncated_normal(mean, precision**-0.5, self._random)
            if term > 0:
                drawn *= self._is_present(mean * np.sqrt(precision), self._scales[:, term] * np.sqrt(precision))
            self._values[:, term] = drawn
            self._residuals -= self._values[:, term, None] * column

    def _move_along_a_line(self) -> None:
        """Moves all terms that are there at a time, which single ones that can stand for each other hardly do.

        Hit-and-run (Smith, "Efficient Monte Carlo procedures for generating points uniformly distributed over bounded
        regions", Operations Research 32(6), 1984): a direction from the posterior without its bound at 0, and along it
        a draw between the points where a coefficient becomes 0.
        """
        is_there = self._values > 0
        weighted = (self._precision / (self._noise[:, None] ** 2 + self._error**2))[:, :, None] * self._columns
        prior = self._scales**-2
        precision = np.swapaxes(weighted, 1, 2) @ self._columns * (is_there[:, :, None] & is_there[:, None, :])
        precision += np.eye(prior.shape[1]) * np.where(is_there, prior, 1.0)[:, None, :]
        root = np.linalg.cholesky(precision)
        drawn = self._random.standard_normal((*prior.shape, 1))
        direction = np.linalg.solve(np.swapaxes(root, 1, 2), drawn)[:, :, 0] * is_there
        along = (self._columns @ direction[:, :, None])[:, :, 0]
        gradient = (self._residuals[:, None, :] @ weighted)[:, 0] - prior * self._values
        slope = (gradient * direction).sum(axis=1)
        deviation = (drawn[:, :, 0] ** 2 * is_there).sum(axis=1) ** -0.5
        with np.errstate(divide="ignore", invalid="ignore"):
            bounds = -self._values / direction
        least = np.max(np.where(direction < 0, -np.inf, np.where(direction > 0, bounds, -np.inf)), axis=1)
        most = np.min(np.where(direction < 0, bounds, np.inf), axis=1)
        length = _between(slope * deviation**2, deviation, least, most, self._random)
        self._values = np.maximum(self._values + length[:, None] * direction, 1e-300 * is_there)
        self._residuals = self._residuals - length[:, None] * along

    def _exchange_two_terms(self) -> None:
        """Proposes another term in place of one that is there, with as much time over all sizes.

        Metropolis-Hastings, with the scales of both integrated out: drawn one at a time, two terms that explain the
        same sizes hardly change places, for both are there or neither in between.
        """
        num_rows, num_terms = self._values.shape
        if num_terms < 3:
            return
        rows = np.arange(num_rows)
        given, taken = _two_of(num_terms - 1, num_rows, self._random)
        columns = np.broadcast_to(self._columns, (num_rows, *self._columns.shape[1:]))
        of_given, of_taken = columns[rows, :, given], columns[rows, :, taken]
        value, sums = self._values[rows, given], (of_given.sum(axis=1), of_taken.sum(axis=1))
        is_possible = (value > 0) & (self._values[rows, taken] == 0) & (sums[0] > 0) & (sums[1] > 0)
        ratio = np.where(is_possible, sums[0] / np.where(is_possible, sums[1], 1.0), 1.0)
        residuals = self._residuals + value[:, None] * (of_given - ratio[:, None] * of_taken)
        weights = self._precision / (self._noise[:, None] ** 2 + self._error**2)
        log_odds = -np.sum(weights * (residuals**2 - self._residuals**2), axis=1) / 2 + np.log(ratio)
        log_odds += self._log_density(ratio * value, taken) - self._log_density(value, given)
        accepted = is_possible & (np.log(np.maximum(self._random.random(num_rows), 1e-300)) < log_odds)
        self._values[rows[accepted], taken[accepted]] = (ratio * value)[accepted]
        self._values[rows[accepted], given[accepted]] = 0.0
        self._residuals = np.where(accepted[:, None], residuals, self._residuals)

    def _log_density(self, values: FloatArray, terms: NDArray[np.intp]) -> FloatArray:
        """(rows,) of the half-Student prior of one term in each row, without its constant."""
        scales, degrees = self._prior_scales[np.arange(len(values)), terms], self._prior.degrees
        return np.asarray(-np.log(scales) - (degrees + 1) / 2 * np.log1p((values / scales) ** 2 / degrees))

    def _is_present(self, standardised: FloatArray, widening: FloatArray) -> NDArray[np.bool_]:
        """Whether a term is there at all, given the others: the prior's odds times the Bayes factor of its values.

        standardised: the conditional mean over its deviation. widening: the prior's scale over that deviation.
        """
        from scipy.special import log_ndtr

        log_factor = np.log(2) + log_ndtr(standardised) + standardised**2 / 2 - np.log(widening)
        log_odds = log_factor + np.log(self._prior.presence / (1 - self._prior.presence))
        return np.asarray(self._random.logistic(size=len(log_odds)) < log_odds)

    def _draw_scales(self) -> None:
        """Of the terms that are there; of the others from the prior."""
        degrees, values = self._prior.degrees, self._values[:, 1:]
        spread = values**2 + degrees * self._prior_scales[:, 1:] ** 2
        shape = (degrees + (values > 0)) / 2
        self._scales[:, 1:] = np.sqrt(spread / 2 / np.maximum(self._random.gamma(shape), 1e-12))

    def _draw_noise(self) -> None:
        """The weight of each measurement, then the noise they share, from a grid."""
        degrees = self._prior.outlier_degrees
        squares = self._residuals**2
        variance = self._noise[:, None] ** 2 + self._error**2
        drawn = self._random.gamma((degrees + 1) / 2, size=squares.shape)
        self._precision = self._is_there * drawn / ((degrees + squares / variance) / 2)
        variances = _NOISE_GRID**2 + self._error[:, None] ** 2  # (n, grid)
        fit = (self._precision * squares) @ (1 / variances) + self._is_there @ np.log(variances)
        self._noise = _NOISE_GRID[_categorical(self._log_prior - fit / 2, self._random)]


def _truncated_normal(mean: FloatArray, deviation: FloatArray, random: np.random.Generator) -> FloatArray:
    """Draws of normals that are at least 0. Far in the tail they are nearly exponential."""
    from scipy.special import ndtr, ndtri  # a third of a second to import, and only models need it

    below = ndtr(-mean / deviation)
    levels = np.clip(below + (1 - below) * random.random(len(mean)), 1e-16, 1 - 1e-12)
    in_tail = random.exponential(size=len(mean)) * deviation**2 / np.maximum(-mean, deviation)
    drawn = np.where(mean < -6 * deviation, in_tail, mean + deviation * ndtri(levels))
    return np.asarray(np.maximum(drawn, 0.0))


def _between(
    mean: FloatArray, deviation: FloatArray, least: FloatArray, most: FloatArray, random: np.random.Generator
) -> FloatArray:
    """Draws of normals between bounds that enclose 0. Where nearly nothing of the normal lies between them: 0."""
    from scipy.special import ndtr, ndtri

    low, high = ndtr((least - mean) / deviation), ndtr((most - mean) / deviation)
    drawn = mean + deviation * ndtri(np.clip(low + (high - low) * random.random(len(mean)), 1e-16, 1 - 1e-12))
    return np.asarray(np.where(high - low < 1e-9, 0.0, np.clip(drawn, least, most)))


def _two_of(num_terms: int, num_rows: int, random: np.random.Generator) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(rows,), (rows,) two different terms in each row, none of them the first."""
    one = random.integers(num_terms, size=num_rows)
    other = (one + 1 + random.integers(num_terms - 1, size=num_rows)) % num_terms
    return one + 1, other + 1


def _categorical(log_weights: FloatArray, random: np.random.Generator) -> NDArray[np.intp]:
    """(rows,) an index drawn in each row, by weights given as logarithms."""
    weights = np.cumsum(np.exp(log_weights - log_weights.max(axis=1, keepdims=True)), axis=1)
    return np.asarray((random.random((len(weights), 1)) * weights[:, -1:] > weights).sum(axis=1))
