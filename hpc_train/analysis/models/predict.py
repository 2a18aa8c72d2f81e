"""Prediction of step times beyond what was measured, with intervals for a new run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from hpc_train.analysis.models.measurements import Measurements
from hpc_train.analysis.models.mechanistic_model import crosses_unseen_boundary, fit_mechanistic, input_s
from hpc_train.analysis.models.scaling_models import CannotFit, Fit, ModelName, fit_contention, fit_extra_p
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import plural
from hpc_train.core.records import FloatArray, IntArray
from hpc_train.core.statistics import LEVELS, Interval

MODELS: tuple[ModelName, ...] = get_args(ModelName)  # in the order of preference among equals
_NUM_FOLDS = 3  # at most so many of the largest sizes are held out, one after the other
_NOISE_DEGREES = 4.0  # of freedom: a new run may be an outlier as measured ones may
_DRAWS_EACH = 8  # of the errors, for each draw of the parameters


@dataclass(frozen=True)
class HeldOut:
    """A measured size, and its prediction by a model fitted to the smaller sizes alone."""

    model: ModelName
    ranks: int
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Relative; positive where the model was too slow."""
        return self.predicted_s / self.measured_s - 1


@dataclass(frozen=True, eq=False)
class Candidate:
    """One model: its fit or the reason why there is none, and its predictions of held-out sizes."""

    model: ModelName
    fit: Fit | None
    held_out: tuple[HeldOut, ...]
    reason: str | None = None  # why it could not be fitted, or not be tested

    @property
    def error(self) -> float | None:
        """Mean absolute relative error over the held-out sizes; None if none could be held out."""
        return float(np.mean([abs(each.error) for each in self.held_out])) if self.held_out else None


@dataclass(frozen=True)
class Forecast:
    """The time of a step of a new run at one number of ranks, with 95% intervals: as measured, or else by the fit."""

    ranks: int
    nodes: int
    step_s: float
    step_interval_s: Interval
    samples_per_s: float
    samples_per_s_interval: Interval
    efficiency: float  # samples/s per rank, relative to the smallest measured size
    measured_s: float | None  # if this size was measured
    extrapolation: float  # ranks / largest measured; 1 within the data
    drift: float  # relative standard deviation of series at large, of so many doublings with this growth
    computing_s: float | None = None  # of the step; None if the measured sizes do not say it
    input_s: float | None = None

    @property
    def is_forecast(self) -> bool:
        return self.measured_s is None


@dataclass(frozen=True)
class Drift:
    """By how much a model misses beyond the data: a Student distribution of relative errors.

    Its variance at one doubling is least^2 + (of_growth x growth)^2, and grows with the number of doublings.
    growth: the share of a step that it would not take at the efficiency of the largest measured size. weight: how many
    held-out sizes what is known of other series counts for.
    """

    least: float
    of_growth: float
    weight: float
    degrees: float

    def variance(self, growth: FloatArray) -> FloatArray:
        """Of one doubling."""
        return np.asarray(self.least**2 + (self.of_growth * growth) ** 2)

    def updated(self, squares: Sequence[float]) -> "Drift":
        """With the errors of held-out sizes: squares, over the variances expected of them, each counting 25 at most."""
        total = self.weight + sum(min(square, 25.0) for square in squares)
        factor = float(np.sqrt(total / (self.weight + len(squares))))
        weight, degrees = self.weight + len(squares), self.degrees + len(squares)
        return Drift(self.least * factor, self.of_growth * factor, weight, degrees)


# Of a series of which nothing is known, estimated by `tests/benchmarks/plan_drift.py` on published series:
# `make bench-plan` prints how many sizes of other sources such a drift holds.
DRIFT = Drift(least=0.042, of_growth=0.8, weight=0.17, degrees=4.0)


@dataclass(frozen=True, eq=False)
class Prediction:
    """The chosen model with its intervals, and the candidates that it was chosen from."""

    measurements: Measurements
    chosen: Candidate
    candidates: tuple[Candidate, ...]  # in the order of `MODELS`
    drift: Drift
    why: str  # why this model

    @property
    def parameters(self) -> dict[str, tuple[float, float, float]]:
        """Each parameter: (low, value, high), 95%."""
        fit = self.chosen.fit
        assert fit is not None
        low, middle, high = np.quantile(fit.draws, (LEVELS[0], 0.5, LEVELS[1]), axis=0)
        return {name: (float(low[i]), float(middle[i]), float(high[i])) for i, name in enumerate(fit.names)}

    def reachable(self, ranks: int) -> bool:
        """Whether the measurements say anything about the cost of so many ranks."""
        return self.chosen.model != "mechanistic" or not crosses_unseen_boundary(self.measurements, ranks)

    def at(self, sizes: Sequence[int]) -> tuple[Forecast, ...]:
        """At each number of ranks: a measured size as it was measured, for no fit knows it better; others as fitted.

        Not measured `sizes` must be `reachable`. Raises `UserError` for a time below 0.
        """
        return tuple(self._as_measured(each) for each in self.fitted(sizes))

    def missed(self) -> tuple[Forecast, ...]:
        """The measured sizes, as fitted, whose measured time lies outside the fit's own interval."""
        return tuple(
            each
            for each in self.fitted(self.measurements.ranks.tolist())
            if not each.step_interval_s[0] <= (each.measured_s or 0.0) <= each.step_interval_s[1]
        )

    def new_run_variance(self, index: int, num_runs: int | None = None) -> FloatArray:
        """(draws,) of a new run's logarithm around the mean of a measured size: (k+1) error^2 + (1 + 1/k) noise^2.

        k is the number of runs of this size, or `num_runs`. error: of their mean, so that k error^2 is that of one run.
        noise: by which one run leaves the fit, a bound on what its error does not show.
        """
        assert self.chosen.fit is not None
        measured = self.measurements.repeats(index)
        runs = num_runs or measured
        error = float(self.measurements.error[index])
        return np.asarray((1 + 1 / runs) * (measured * error**2 + self.chosen.fit.noise**2))

    def _as_measured(self, fitted: Forecast) -> Forecast:
        index, measurements = self.measurements.place(fitted.ranks), self.measurements
        if index is None or fitted.measured_s is None:
            return fitted
        step_s = fitted.measured_s
        scale = np.tile(np.sqrt(self.new_run_variance(index)), _DRAWS_EACH)
        deviations = scale * np.random.default_rng(0).standard_t(_NOISE_DEGREES, size=len(scale))
        low_s, high_s = (step_s * float(np.exp(end)) for end in np.quantile(np.clip(deviations, -50.0, 50.0), LEVELS))
        samples = float(measurements.samples(np.array([fitted.ranks]))[0])
        return replace(
            fitted,
            step_s=step_s,
            step_interval_s=(low_s, high_s),
            samples_per_s=samples / step_s,
            samples_per_s_interval=(samples / high_s, samples / low_s),
            efficiency=fitted.efficiency * fitted.step_s / step_s,
            computing_s=None if fitted.computing_s is None else min(fitted.computing_s, step_s),
        )

    def fitted(self, sizes: Sequence[int]) -> tuple[Forecast, ...]:
        """What the fit says at each number of ranks, measured or not."""
        fit, measurements = self.chosen.fit, self.measurements
        assert fit is not None
        ranks = np.asarray(sizes, dtype=int)
        step_s = fit(ranks)
        if (step_s <= 0).any():
            size = plural(int(ranks[step_s <= 0][0]), "rank")
            raise UserError(
                f"{measurements.label}: the {fit.model} model has no time above 0 at {size}",
                "Choose another --model, or measure larger sizes.",
            )
        beyond = np.maximum(ranks / measurements.largest, 1.0)
        low_s, high_s = self._interval_s(fit, ranks, beyond)
        drift = np.sqrt(DRIFT.variance(_growth(measurements, ranks, step_s)) * np.log2(beyond))
        waits_s, computing_s = input_s(measurements, ranks), _computing_s(measurements, ranks)
        samples, nodes = measurements.samples(ranks), measurements.nodes(ranks)
        smallest = measurements.ranks[:1]
        base = measurements.samples(smallest)[0] / measurements.step_s[0] / smallest[0]
        measured = dict(zip(measurements.ranks.tolist(), measurements.step_s.tolist(), strict=True))
        return tuple(
            Forecast(
                ranks=size,
                nodes=int(nodes[i]),
                step_s=float(step_s[i]),
                step_interval_s=(float(low_s[i]), float(high_s[i])),
                samples_per_s=float(samples[i] / step_s[i]),
                samples_per_s_interval=(float(samples[i] / high_s[i]), float(samples[i] / low_s[i])),
                efficiency=float(samples[i] / step_s[i] / size / base),
                measured_s=measured.get(size),
                extrapolation=float(beyond[i]),
                drift=float(drift[i]),
                computing_s=None if computing_s is None else float(min(computing_s[i], step_s[i])),
                input_s=None if measurements.input_s is None else float(waits_s[i]),
            )
            for i, size in enumerate(ranks.tolist())
        )

    def doubling_variance(self, ranks: IntArray) -> FloatArray:
        """(n,) of the drift at each number of ranks."""
        fit = self.chosen.fit
        assert fit is not None
        return self.drift.variance(_growth(self.measurements, ranks, fit(ranks)))

    def _interval_s(self, fit: Fit, ranks: IntArray, beyond: FloatArray) -> tuple[FloatArray, FloatArray]:
        """95% interval of the step time of a new run.

        Three errors, in logarithms: of the parameters, of one run, and beyond the data of the model itself.
        """
        random = np.random.default_rng(0)
        step_s = np.tile(fit.predict(fit.draws, ranks), (_DRAWS_EACH, 1))
        noise = np.tile(fit.noise, _DRAWS_EACH)[:, None] * random.standard_t(_NOISE_DEGREES, size=(len(step_s), 1))
        drift = np.sqrt(self.doubling_variance(ranks) * np.log2(beyond))
        drift = drift * random.standard_t(self.drift.degrees, size=(len(step_s), 1))
        # A draw may predict no time at all (Extra-P's may be negative): it counts as almost none.
        mean_s = np.maximum(step_s, 1e-300) * np.exp(np.clip(drift, -50.0, 50.0))
        # Only what one run leaves the mean by is faster than linear speedup.
        least_s = np.where(beyond > 1, _linear_s(self.measurements, ranks), 0.0)
        new_s = np.maximum(mean_s, least_s) * np.exp(np.clip(noise, -50.0, 50.0))
        low, high = np.quantile(new_s, LEVELS, axis=0)
        return low, high


def _computing_s(measurements: Measurements, ranks: IntArray) -> FloatArray | None:
    """A rank computes on each sample as long as it did at the largest size."""
    if measurements.computing_s is None:
        return None
    per_share = measurements.computing_s[-1] / measurements.share(measurements.ranks[-1:])[0]
    return np.asarray(per_share * measurements.share(ranks))


def _linear_s(measurements: Measurements, ranks: IntArray) -> FloatArray:
    """(n,) seconds of a step at linear speedup over the smallest size; 0 if a larger one was faster than that."""
    per_share = measurements.step_s / measurements.share(measurements.ranks)
    is_superlinear = bool((per_share[1:] < per_share[0]).any())
    return np.zeros(len(ranks)) if is_superlinear else per_share[0] * measurements.share(ranks)


def _growth(measurements: Measurements, ranks: IntArray, step_s: FloatArray) -> FloatArray:
    ranks = np.asarray(ranks)
    same_s = measurements.step_s[-1] * measurements.share(ranks) / measurements.share(measurements.ranks[-1:])[0]
    return np.asarray(1 - same_s / np.maximum(step_s, 1e-300))


def curve_sizes(prediction: Prediction, beyond: float = 4.0, num_sizes: int = 60) -> list[int]:
    """Numbers of ranks for a curve: evenly in log2 from the smallest to `beyond` times the largest."""
    ranks = np.geomspace(prediction.measurements.ranks[0], beyond * prediction.measurements.largest, num_sizes)
    wanted = {int(size) for size in np.round(ranks)} | set(prediction.measurements.ranks.tolist())
    return [size for size in sorted(wanted) if prediction.reachable(size)]


def predict(measurements: Measurements, model: ModelName | None = None, drift: Drift | None = None) -> Prediction:
    """Fits the mechanistic model, of which the others are special cases, or `model`; the others stand beside it.

    drift: of the site, from earlier plans; by default that of published series.
    A model that cannot be fitted hands over to the next in `MODELS`. Raises `UserError` with the reasons if none can.
    """
    candidates = tuple(candidate(name, measurements) for name in MODELS)
    wanted = [each for each in candidates if model in (None, each.model)]
    chosen = next((each for each in wanted if each.fit is not None), wanted[0])
    if chosen.fit is None:
        sizes = ", ".join(map(str, measurements.ranks))
        raise UserError(
            f"{measurements.label}: the {chosen.model} model cannot be fitted to {sizes} ranks: {chosen.reason}",
            "Measure more sizes (hpc-train scale), or the cost of an all-reduce: --network.",
        )
    why = "chosen by --model" if model else "the first that could be fitted"
    return Prediction(measurements, chosen, candidates, observed_drift(measurements, chosen, drift or DRIFT), why)


def _fit(model: ModelName, measurements: Measurements) -> Fit:
    if model == "mechanistic":
        return fit_mechanistic(measurements)
    if model == "extra-p":
        return fit_extra_p(measurements)
    return fit_contention(measurements, with_coherence=model == "usl")


def candidate(model: ModelName, measurements: Measurements) -> Candidate:
    try:
        fit = _fit(model, measurements)
    except CannotFit as error:
        return Candidate(model, None, (), str(error))
    except (np.linalg.LinAlgError, FloatingPointError) as error:
        return Candidate(model, None, (), f"its arithmetic failed ({error})")
    return Candidate(model, fit, *_hold_out(model, measurements))


def _hold_out(model: ModelName, measurements: Measurements) -> tuple[tuple[HeldOut, ...], str | None]:
    """The largest sizes, each predicted from all smaller ones.

    A size on several nodes is held out only if smaller ones are on several nodes, too: sizes on one node do not show
    the cost of communication between nodes, and a model that guesses it is no better for that.
    """
    found, reason = [], "fewer than 3 sizes: none can be held out"
    for kept in range(len(measurements.ranks) - 1, max(1, len(measurements.ranks) - 1 - _NUM_FOLDS), -1):
        training, ranks = measurements.smallest(kept), int(measurements.ranks[kept])
        if measurements.ranks_per_node and crosses_unseen_boundary(training, ranks):
            reason = "only one size is on several nodes: it cannot be held out"
            break
        try:
            guess = _fit(model, training)(np.array([ranks]))[0]
        except CannotFit as error:
            reason = f"without the largest size: {error}"
            break
        found.append(HeldOut(model, ranks, float(measurements.step_s[kept]), float(guess)))
    return tuple(found), None if found else reason


def observed_drift(measurements: Measurements, chosen: Candidate, drift: Drift | None = None) -> Drift:
    """The drift of series at large or of a site, and how the errors at the sizes that were held out compare with it."""
    assert chosen.fit is not None
    squares, known, noise = [], drift or DRIFT, float(np.median(chosen.fit.noise))
    for each in chosen.held_out:
        known_sizes = measurements.smallest(int((measurements.ranks < each.ranks).sum()))
        growth = _growth(known_sizes, np.array([each.ranks]), np.array([each.predicted_s]))
        # Logarithms, but a guess below 0 has none.
        error = float(np.log(max(each.predicted_s / each.measured_s, 1e-3)))
        expected = np.log2(each.ranks / known_sizes.largest) * float(known.variance(growth)[0]) + noise**2
        squares.append(error**2 / expected)
    return known.updated(squares)
