"""The mechanistic model: what a data-parallel step consists of, with each part's own law in the number of ranks."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpc_train.analysis.models.measurements import Measurements
from hpc_train.analysis.models.scaling_models import LAST_MESSAGE_SHARE, Algorithm, Fit, TooFewSizes, residual_scale
from hpc_train.analysis.stats.order_statistics import expected_maximum
from hpc_train.core.records import FloatArray, IntArray
from hpc_train.core.statistics import nonnegative_least_squares

_OUTLIER = 2.0  # standard errors beyond which a size pulls no harder
_MOST_ITERATIONS = 40
_PARTS_OF_A_STEP = (1.0, 0.5, 0.25, 0.125, 0.03)
# Given up in this order where there are more parts than sizes: the first need the longest arm to be seen at all.
_GIVEN_UP = ("latency_between_s", "noise_s", "fixed_s", "transfer_inside_s")


@dataclass(frozen=True, eq=False)
class _Parts:
    """Columns over the ranks of the parts that are linear in their parameters, of computation and of communication."""

    names: tuple[str, ...]
    computing: FloatArray  # (n, parts)
    sending: FloatArray  # (n, parts) of the whole communication, hidden and exposed
    known_s: FloatArray  # (n,) communication known beforehand
    hides: FloatArray  # (n, parts) computation that communication may hide behind
    input_s: FloatArray  # (n,)

    def step_s(self, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(step times, Jacobian). Exposed = last message's share + what is more than the overlap can hide."""
        whole = self.sending @ values + self.known_s
        beyond = (1 - LAST_MESSAGE_SHARE) * whole - self.hides @ values
        is_beyond = (beyond > 0)[:, None]
        columns = self.computing + LAST_MESSAGE_SHARE * self.sending
        slope = columns + np.where(is_beyond, (1 - LAST_MESSAGE_SHARE) * self.sending - self.hides, 0.0)
        exposed = LAST_MESSAGE_SHARE * whole + np.maximum(beyond, 0.0)
        return np.asarray(self.computing @ values + exposed + self.input_s), slope


def fit_analytic_model(measurements: Measurements, algorithm: Algorithm) -> Fit:
    """T(N) = fixed + compute share + noise E[max of N] share + input + exposed(N), seconds.

    share: samples of a rank relative to the smallest size (1 in weak scaling, where fixed and compute are one).
    exposed(N) = 0.05 C + max(0, 0.95 C - overlap compute share): communication that the backward pass does not hide.
    C(N) = messages latency + 2(N-1)/N transfer, for a ring with 2(N-1) messages, for a tree with 2 log2 N (Thakur,
    Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 19(1), 2005).
    transfer: seconds to move one gradient over the slowest link of the ring, which is one within a node while all ranks
    share one, and the network's, slower, as soon as they do not: hence two. Raises `TooFewSizes`.
    """
    names = _free(measurements)
    parts = _parts(measurements, measurements.ranks, names, algorithm)
    scale = residual_scale(measurements)

    def predict(values: FloatArray, ranks: IntArray) -> FloatArray:
        return _parts(measurements, ranks, names, algorithm).step_s(values)[0]

    def refit(step_s: FloatArray, near: FloatArray | None = None) -> FloatArray:
        starts = _starts(names, step_s[0], measurements.overlap) if near is None else [near]
        return min((_solve(parts, step_s, scale, start) for start in starts), key=lambda found: found[0])[1]

    best = refit(measurements.step_s)
    form = f"fixed + compute + noise E[max of N] + input + communication ({algorithm}) beyond the overlap"
    return Fit("mechanistic", names, best, predict, lambda step_s: refit(step_s, best), form)


def crosses_unseen_boundary(measurements: Measurements, ranks: int) -> bool:
    """Whether `ranks` need several nodes, and neither a run nor a benchmark says what going between nodes costs."""
    network = measurements.network
    known = bool((measurements.nodes(measurements.ranks) > 1).any()) or (
        network and network.beta_between_s_per_byte is not None
    )
    return bool(measurements.nodes(np.array([ranks]))[0] > 1 and not known)


def _pinned(measurements: Measurements) -> tuple[bool, bool]:
    """Whether the network's cost is known within a node, and between nodes."""
    network, size = measurements.network, measurements.gradient_bytes
    if network is None or size is None:
        return False, False
    return network.beta_inside_s_per_byte is not None, network.beta_between_s_per_byte is not None


def _free(measurements: Measurements) -> tuple[str, ...]:
    """The parts that these sizes can tell anything of, no more than there are sizes."""
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
    for name in _GIVEN_UP:
        if len(names) > len(ranks) and name in names:
            names.remove(name)
    if len(names) > len(ranks):
        raise TooFewSizes(f"{', '.join(names)}: {len(names)} parts cannot be told apart by {len(ranks)} sizes")
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
    # What goes between nodes passes the links within them, too: it costs what they cost, and more.
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
    """Communication that a benchmark measured, at each of the sizes."""
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
    """Waiting for input: per sample of a rank, and growing with the ranks that share the file system's bandwidth."""
    if measurements.input_s is None or not measurements.input_s.any():
        return np.zeros(len(ranks))

    def columns(sizes: IntArray) -> FloatArray:
        share = measurements.share(sizes)
        return np.stack([share, share * sizes / measurements.largest], axis=1)

    return np.asarray(columns(ranks) @ nonnegative_least_squares(columns(measurements.ranks), measurements.input_s))


def _starts(names: tuple[str, ...], whole_s: float, overlap: float) -> list[FloatArray]:
    """Where to begin: communication hidden, at the brink, and beyond what can be hidden."""
    common = {"compute_s": whole_s, "fixed_s": 0.05 * whole_s, "noise_s": 0.02 * whole_s, "latency_between_s": 0.0}
    guesses = [(0.05, 0.05), (0.05, 0.7), (0.05, 1.5), (overlap + 0.1, 0.1)]
    return [
        np.array([common.get(name, whole_s * (inside if "inside" in name else between)) for name in names])
        for inside, between in guesses
    ]


def _solve(parts: _Parts, step_s: FloatArray, scale: FloatArray, start: FloatArray) -> tuple[float, FloatArray]:
    """(cost, values >= 0) from `start`: relative residuals, outliers counted as their soft L1 norm, and a weak prior.

    The law is linear on each side of the point where sending outlasts what hides it, so a Gauss-Newton step is a
    non-negative least-squares problem. Steps are halved while they do not lower the cost: that ends at the point, too.
    """
    weights = 1 / (step_s * scale)
    prior = np.diag(np.array([name != "compute_s" for name in parts.names], dtype=float) / step_s[0])

    def cost_of(values: FloatArray) -> float:
        misses = (parts.step_s(values)[0] - step_s) * weights / _OUTLIER
        return float(_OUTLIER**2 * np.sum(np.sqrt(1 + misses**2) - 1) + np.sum((prior @ values) ** 2) / 2)

    values, cost = start, cost_of(start)
    for _ in range(_MOST_ITERATIONS):
        predicted, slope = parts.step_s(values)
        pull = weights * (1 + ((predicted - step_s) * weights / _OUTLIER) ** 2) ** -0.25
        columns = np.concatenate([slope * pull[:, None], prior])
        wanted = np.concatenate([(step_s - predicted + slope @ values) * pull, np.zeros(len(values))])
        towards = nonnegative_least_squares(columns, wanted) - values
        tried = ((cost_of(values + part * towards), part) for part in _PARTS_OF_A_STEP)
        lower, part = next(((each, part) for each, part in tried if each < cost * (1 - 1e-6)), (cost, 0.0))
        if not part:
            break
        values, cost = values + part * towards, lower
    return cost, values
