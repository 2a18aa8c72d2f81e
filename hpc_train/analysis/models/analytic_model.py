"""The mechanistic model: the parts of a data-parallel step, each with its own law in the number of ranks."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_train.analysis.models.measurements import Measurements
from hpc_train.analysis.models.scaling_models import (
    LAST_MESSAGE_SHARE,
    Algorithm,
    Fit,
    ModelName,
    TooFewSizes,
    residual_scale,
)
from hpc_train.analysis.stats.order_statistics import expected_maximum
from hpc_train.core.records import FloatArray, IntArray
from hpc_train.core.statistics import nonnegative_least_squares

_OUTLIER = 2.0  # standard errors beyond which a size pulls the fit no harder
_MOST_ITERATIONS = 40
_PARTS_OF_A_STEP = (1.0, 0.5, 0.25, 0.125, 0.03)
# Dropped in this order if there are more parts than sizes: the first need the widest range of sizes to show at all.
_DROPPED = ("latency_between_s", "noise_s", "fixed_s", "transfer_inside_s")


@dataclass(frozen=True, eq=False)
class _Parts:
    """The parts that are linear in their parameters, at n numbers of ranks."""

    names: tuple[str, ...]
    computing: FloatArray  # (n, parts)
    sending: FloatArray  # (n, parts) communication, hidden and exposed
    known_s: FloatArray  # (n,) communication that a benchmark measured
    hides: FloatArray  # (n, parts) computation that can hide communication
    input_s: FloatArray  # (n,)

    def step_s(self, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(step times, Jacobian). Exposed communication = the last message + what the overlap cannot hide."""
        whole = self.sending @ values + self.known_s
        beyond = (1 - LAST_MESSAGE_SHARE) * whole - self.hides @ values
        is_beyond = (beyond > 0)[:, None]
        columns = self.computing + LAST_MESSAGE_SHARE * self.sending
        slope = columns + np.where(is_beyond, (1 - LAST_MESSAGE_SHARE) * self.sending - self.hides, 0.0)
        exposed = LAST_MESSAGE_SHARE * whole + np.maximum(beyond, 0.0)
        return np.asarray(self.computing @ values + exposed + self.input_s), slope


def fit_analytic_model(measurements: Measurements, algorithm: Algorithm) -> Fit:
    """Fits the parts that these sizes can distinguish. Raises `TooFewSizes`."""
    return _AnalyticFit(measurements, names_=_free(measurements), algorithm=algorithm).fitted()


@dataclass(frozen=True, eq=False)
class _AnalyticFit(Fit):
    """T(N) = fixed + compute share + noise E[max of N] share + input + exposed(N), seconds.

    share: samples of a rank relative to the smallest size (1 in weak scaling, where fixed and compute are one).
    exposed(N) = 0.05 C + max(0, 0.95 C - overlap compute share): communication that the backward pass does not hide.
    C(N) = messages latency + 2(N-1)/N transfer, for a ring with 2(N-1) messages, for a tree with 2 log2 N (Thakur,
    Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 19(1), 2005).
    transfer: seconds to move one gradient over the slowest link of the ring: a link within a node while all ranks share
    one, the slower network as soon as they do not. Hence two transfer times.
    """

    names_: tuple[str, ...] = ()
    algorithm: Algorithm = "ring"

    @property
    def model(self) -> ModelName:
        return "mechanistic"

    @property
    def names(self) -> tuple[str, ...]:
        return self.names_

    @property
    def form(self) -> str:
        return f"fixed + compute + noise E[max of N] + input + communication ({self.algorithm}) beyond the overlap"

    def predict(self, values: FloatArray, ranks: IntArray) -> FloatArray:
        return _parts(self.measurements, ranks, self.names, self.algorithm).step_s(values)[0]

    def refit(self, step_s: FloatArray) -> FloatArray:
        parts = _parts(self.measurements, self.measurements.ranks, self.names, self.algorithm)
        scale = residual_scale(self.measurements)
        # A refit to similar times starts at the known solution; the first fit tries several, since costs have kinks.
        known = len(self.values) > 0
        starts = [self.values] if known else _starts(self.names, step_s[0], self.measurements.overlap)
        solutions = [_solve(parts, step_s, scale, start) for start in starts]
        return min(solutions, key=lambda solution: solution[0])[1]


def crosses_unseen_boundary(measurements: Measurements, ranks: int) -> bool:
    """Whether `ranks` need several nodes, and neither a run nor a benchmark measured communication between nodes."""
    network = measurements.network
    known = bool((measurements.nodes(measurements.ranks) > 1).any()) or (
        network and network.beta_between_s_per_byte is not None
    )
    return bool(measurements.nodes(np.array([ranks]))[0] > 1 and not known)


def _pinned(measurements: Measurements) -> tuple[bool, bool]:
    """Whether a benchmark measured the network (within a node, between nodes)."""
    network, size = measurements.network, measurements.gradient_bytes
    if network is None or size is None:
        return False, False
    return network.beta_inside_s_per_byte is not None, network.beta_between_s_per_byte is not None


def _free(measurements: Measurements) -> tuple[str, ...]:
    """The names of the parts that these sizes can distinguish, no more than there are sizes."""
    ranks, nodes = measurements.ranks, measurements.nodes(measurements.ranks)
    inside, between = _pinned(measurements)
    wanted = {
        "compute_s": True,
        "fixed_s": not measurements.weak and len(ranks) > 1,
        "noise_s": measurements.noise is None and len(ranks) > 1,
        "transfer_inside_s": not inside and bool(((ranks > 1) & (nodes == 1)).any()),
        "transfer_between_s": not between and bool((nodes > 1).any()),
        "latency_between_s": not between and len(set(nodes[nodes > 1].tolist())) >= 3,
    }
    names = [name for name, is_wanted in wanted.items() if is_wanted]
    for name in _DROPPED:
        if len(names) > len(ranks) and name in names:
            names.remove(name)
    if len(names) > len(ranks):
        raise TooFewSizes(f"{', '.join(names)}: {len(names)} parts cannot be distinguished by {len(ranks)} sizes")
    if len(ranks) == 1 and not (inside or between):
        raise TooFewSizes("one size says nothing of how the time grows; a second, or --network, does")
    return tuple(names)


def _parts(measurements: Measurements, ranks: IntArray, names: tuple[str, ...], algorithm: Algorithm) -> _Parts:
    n = np.asarray(ranks, dtype=float)
    share, is_between = measurements.share(ranks), measurements.nodes(ranks) > 1
    messages = 2 * (n - 1) if algorithm == "ring" else 2 * np.log2(n)
    moved = 2 * (n - 1) / n
    waits = expected_maximum(n) * share
    zero = np.zeros_like(n)
    computing = {"fixed_s": zero + 1, "compute_s": share + (measurements.noise or 0.0) * waits, "noise_s": waits}
    # Messages between nodes pass the links within nodes, too: they cost at least as much as messages within one.
    sending = {
        "transfer_inside_s": np.where(is_between & _pinned(measurements)[1], 0.0, moved),
        "transfer_between_s": np.where(is_between, moved, 0.0),
        "latency_between_s": np.where(is_between, messages, 0.0),
    }
    hides = {"compute_s": measurements.overlap * share}
    computed, sent, hidden = (
        np.stack([columns.get(name, zero) for name in names], axis=1) for columns in (computing, sending, hides)
    )
    return _Parts(
        names, computed, sent, _known(measurements, messages, moved, is_between), hidden, _input(measurements, ranks)
    )


def _known(
    measurements: Measurements, messages: FloatArray, moved: FloatArray, is_between: NDArray[np.bool_]
) -> FloatArray:
    """(n,) communication that a benchmark measured."""
    network, size = measurements.network, measurements.gradient_bytes or 0.0
    inside, between = _pinned(measurements)
    known = np.zeros_like(moved)
    if network and inside:
        cost = messages * (network.alpha_inside_s or 0.0) + moved * size * (network.beta_inside_s_per_byte or 0.0)
        known = np.where(is_between & between, known, cost)
    if network and between:
        cost = messages * (network.alpha_between_s or 0.0) + moved * size * (network.beta_between_s_per_byte or 0.0)
        known = np.where(is_between, cost, known)
    return known


def _input(measurements: Measurements, ranks: IntArray) -> FloatArray:
    """(n,) wait for input: per sample of a rank, plus a part that grows with the ranks that share the file system."""
    if measurements.input_s is None or not measurements.input_s.any():
        return np.zeros(len(ranks))
    coefficients = nonnegative_least_squares(_input_columns(measurements, measurements.ranks), measurements.input_s)
    return np.asarray(_input_columns(measurements, ranks) @ coefficients)


def _input_columns(measurements: Measurements, ranks: IntArray) -> FloatArray:
    share = measurements.share(ranks)
    return np.stack([share, share * ranks / measurements.largest], axis=1)


def _starts(names: tuple[str, ...], whole_s: float, overlap: float) -> list[FloatArray]:
    """Starting values: communication hidden, just hidden, and exposed."""
    common = {"compute_s": whole_s, "fixed_s": 0.05 * whole_s, "noise_s": 0.02 * whole_s, "latency_between_s": 0.0}
    guesses = [(0.05, 0.05), (0.05, 0.7), (0.05, 1.5), (overlap + 0.1, 0.1)]
    return [
        np.array([common.get(name, whole_s * (inside if "inside" in name else between)) for name in names])
        for inside, between in guesses
    ]


def _solve(parts: _Parts, step_s: FloatArray, scale: FloatArray, start: FloatArray) -> tuple[float, FloatArray]:
    """(cost, values >= 0) from `start`: relative residuals, outliers counted as their soft L1 norm, and a weak prior.

    The law is linear on each side of the point where communication outlasts what hides it, so a Gauss-Newton step is a
    non-negative least-squares problem. Steps are halved while they do not lower the cost, so it ends there, too.
    """
    problem = _Problem(parts, step_s, scale)
    values, cost = start, problem.cost(start)
    for _ in range(_MOST_ITERATIONS):
        towards = problem.gauss_newton(values) - values
        for part in _PARTS_OF_A_STEP:
            tried = values + part * towards
            lower = problem.cost(tried)
            if lower < cost * (1 - 1e-6):
                values, cost = tried, lower
                break
        else:
            break
    return cost, values


class _Problem:
    """The least-squares problem of one fit."""

    def __init__(self, parts: _Parts, step_s: FloatArray, scale: FloatArray) -> None:
        self._parts, self._step_s = parts, step_s
        self._weights = 1 / (step_s * scale)
        # All parts but the computation are drawn to 0, by as much as one of them as long as a whole step would cost.
        self._prior = np.diag(np.array([name != "compute_s" for name in parts.names], dtype=float) / step_s[0])

    def cost(self, values: FloatArray) -> float:
        residuals = self._residuals(self._parts.step_s(values)[0])
        prior = np.sum((self._prior @ values) ** 2) / 2
        return float(_OUTLIER**2 * np.sum(np.sqrt(1 + residuals**2) - 1) + prior)

    def gauss_newton(self, values: FloatArray) -> FloatArray:
        predicted, slope = self._parts.step_s(values)
        pull = self._weights * (1 + self._residuals(predicted) ** 2) ** -0.25
        columns = np.concatenate([slope * pull[:, None], self._prior])
        wanted = np.concatenate([(self._step_s - predicted + slope @ values) * pull, np.zeros(len(values))])
        return nonnegative_least_squares(columns, wanted)

    def _residuals(self, predicted: FloatArray) -> FloatArray:
        return np.asarray((predicted - self._step_s) * self._weights / _OUTLIER)
