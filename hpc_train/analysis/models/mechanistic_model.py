"""The mechanistic model: the parts of a data-parallel step, each with its own law in the number of ranks."""

from dataclasses import dataclass

import numpy as np

from hpc_train.analysis.models.measurements import Measurements
from hpc_train.analysis.models.nonnegative_regression import Prior, sample_posterior
from hpc_train.analysis.models.scaling_models import CannotFit, Fit, ModelName
from hpc_train.analysis.stats.order_statistics import expected_maximum
from hpc_train.core.records import FloatArray, IntArray
from hpc_train.core.statistics import nonnegative_least_squares

# The gradients of the layers next to the input are ready last, so no computation is left to hide their communication.
_LAST_MESSAGE_SHARE = 0.05
_WATCHED = 4  # times the largest size: chains are to agree on the prediction there
_MOST_R_HAT = 1.2  # chains that differ by more than this do not know what the sizes say


@dataclass(frozen=True)
class Priors:
    """Before the data. scales: of each part, in units of the step at the smallest size."""

    scales: dict[str, float]
    regression: Prior


# Estimated by `tests/benchmarks/plan_priors.py` on published series; `make bench-plan` shows what they do on others.
WEAK = Priors(
    {
        "imbalance_s": 0.052,
        "transfer_s": 0.75,
        "transfer_between_s": 0.052,
        "tree_between_s": 0.008,
        "ring_s": 0.00025,
        "ring_between_s": 0.0002,
    },
    Prior(presence=0.64, degrees=1.0, noise=0.004, noise_degrees=3.0, outlier_degrees=4.0),
)
STRONG = Priors(
    {
        "fixed_s": 0.0063,
        "imbalance_s": 0.0025,
        "tree_s": 0.0004,
        "ring_s": 0.00016,
        "cache_s": 0.12,
        "between_s": 0.017,
    },
    Prior(presence=0.4, degrees=1.0, noise=0.01, noise_degrees=3.0, outlier_degrees=4.0),
)

_SCALED_AS = {"micro_batch_s": "fixed_s"}  # no published series states its micro-batches


def fit_mechanistic(measurements: Measurements) -> Fit:
    """Samples the parts from their posterior.

    Raises `CannotFit` for one size without a measured network, and if the chains do not agree.
    """
    num_sizes = len(measurements.ranks)
    if num_sizes == 1 and not any(_is_pinned(measurements)):
        raise CannotFit("one size says nothing of how the time grows; a second, or --network, does")
    parts = parts_of_a_step(measurements, measurements.ranks)
    names = tuple(name for name, column in parts.items() if name == "compute_s" or np.ptp(column) > 0)
    priors = WEAK if measurements.weak else STRONG
    first_s = float(measurements.step_s[0])
    # A benchmark that tells more communication than the whole step took is not believed beyond the step.
    left_s = np.maximum(measurements.step_s - _known_s(measurements, measurements.ranks), 0.01 * measurements.step_s)
    beyond = parts_of_a_step(measurements, np.array([_WATCHED * measurements.largest]))
    asked = np.array([beyond[name][0] for name in names])
    posterior = sample_posterior(
        np.stack([parts[name] for name in names], axis=1),
        left_s,
        measurements.error * measurements.step_s / left_s,
        np.array([1.0, *(priors.scales[_SCALED_AS.get(name, name)] * first_s for name in names[1:])]),
        priors.regression,
        asked,
    )
    r_hat = posterior.r_hat(asked)
    if r_hat > _MOST_R_HAT:
        raise CannotFit(f"its chains do not agree beyond the measured sizes (R-hat {r_hat:.2f})")
    return _MechanisticFit(measurements, posterior.coefficients, posterior.noise, names)


@dataclass(frozen=True, eq=False)
class _MechanisticFit(Fit):
    """T(N) = compute share (1 + noise E[max of N]) + parts that only add + input + known communication, seconds.

    share: samples of a rank relative to the smallest size, 1 in weak scaling.
    """

    names_: tuple[str, ...] = ()

    @property
    def model(self) -> ModelName:
        return "mechanistic"

    @property
    def names(self) -> tuple[str, ...]:
        return self.names_

    @property
    def form(self) -> str:
        return " + ".join(name.removesuffix("_s").replace("_", " ") for name in self.names_)

    def predict(self, draws: FloatArray, ranks: IntArray) -> FloatArray:
        parts = parts_of_a_step(self.measurements, ranks)
        columns = np.stack([parts[name] for name in self.names], axis=0)
        return np.asarray(draws @ columns + _known_s(self.measurements, ranks))


def parts_of_a_step(measurements: Measurements, ranks: IntArray) -> dict[str, FloatArray]:
    """{part: (n,) seconds of it in a step for each second of its coefficient}.

    imbalance: ranks wait for the slowest, whose lead grows like log N. transfer: the volume of an all-reduce, which is
    2 (N-1)/N of the gradients. tree, ring: latencies of log2 N and of N messages. between: what is nothing while all
    ranks share a node. fixed: what more ranks do not divide (Amdahl). micro_batch: what each micro-batch costs, however
    few samples it has; nothing where their number falls as the samples do. cache: what a rank saves when its share of
    the samples becomes small enough for a faster memory.
    """
    n, first = np.asarray(ranks, dtype=float), float(measurements.ranks[0])
    growth, share = n / first, measurements.share(n)
    nodes, first_nodes = (measurements.nodes(each).astype(float) for each in (n, measurements.ranks[:1]))
    is_between = nodes > 1
    crosses = is_between & (first_nodes == 1)
    compute = share * (1 + (measurements.noise or 0.0) * expected_maximum(n))
    if not measurements.weak:
        return {
            "compute_s": compute,
            "fixed_s": 1 - share,
            "imbalance_s": share * np.log2(growth),
            "tree_s": np.log2(growth),
            "ring_s": growth - 1,
            "cache_s": share**2,
            "between_s": share * crosses,
            "micro_batch_s": _micro_batches_beyond_share(measurements, n),
        }
    inside, between = _is_pinned(measurements)
    parts = {"compute_s": compute, "imbalance_s": np.log2(growth)}
    if between or measurements.ranks_per_node not in (None, 1):  # else each message is between nodes
        parts["ring_s"] = growth - 1
    if not inside:
        parts["transfer_s"] = (n - 1) / n - (first - 1) / first
    if not between:
        parts["transfer_between_s"] = crosses * (n - 1) / n
        parts["tree_between_s"] = np.log2(nodes / first_nodes)
        parts["ring_between_s"] = nodes - first_nodes
    return parts


def _micro_batches_beyond_share(measurements: Measurements, ranks: FloatArray) -> FloatArray:
    """(n,) micro-batches relative to the smallest size, less samples likewise; 0 where their number stays as it is."""
    if measurements.accumulate is None or np.ptp(measurements.accumulate) == 0:
        return np.zeros(len(ranks))
    first = measurements.micro_batches(measurements.ranks[:1])[0]
    return np.asarray(measurements.micro_batches(ranks) / first - measurements.share(ranks))


# ---------------------------------------------------------------------------------------------- what was measured apart


def crosses_unseen_boundary(measurements: Measurements, ranks: int) -> bool:
    """Whether `ranks` need several nodes, and neither a run nor a benchmark measured communication between nodes."""
    network = measurements.network
    known = bool((measurements.nodes(measurements.ranks) > 1).any()) or (
        network and network.beta_between_s_per_byte is not None
    )
    return bool(measurements.nodes(np.array([ranks]))[0] > 1 and not known)


def _is_pinned(measurements: Measurements) -> tuple[bool, bool]:
    """Whether a benchmark measured the network (within a node, between nodes)."""
    network, size = measurements.network, measurements.gradient_bytes
    if network is None or size is None:
        return False, False
    return network.beta_inside_s_per_byte is not None, network.beta_between_s_per_byte is not None


def _known_s(measurements: Measurements, ranks: IntArray) -> FloatArray:
    """(n,) the wait for input, and exposed communication as a benchmark measured it.

    exposed = 0.05 C + max(0, 0.95 C - overlap compute share / micro-batches): what the backward pass of the last
    micro-batch does not hide of C seconds.
    """
    waits_s = input_s(measurements, ranks)
    first = measurements.ranks[:1]
    first_s, whole_s = (
        float(measurements.step_s[0] - input_s(measurements, first)[0]),
        _all_reduce_s(measurements, first),
    )
    share = measurements.share(np.asarray(ranks, dtype=float))
    overlap, first_overlap = (measurements.overlap / measurements.micro_batches(each) for each in (ranks, first))
    # The computation at the smallest size is what its step leaves: if it hides all of C, else if it hides a part.
    last_s, rest_s = _LAST_MESSAGE_SHARE * whole_s[0], (1 - _LAST_MESSAGE_SHARE) * whole_s[0]
    compute_s = first_s - last_s
    if first_overlap[0] * compute_s < rest_s:
        compute_s = (first_s - whole_s[0]) / max(1 - first_overlap[0], 0.01)
    whole_s = _all_reduce_s(measurements, ranks)
    hidden_s = overlap * max(compute_s, 0.0) * share
    beyond_s = np.maximum((1 - _LAST_MESSAGE_SHARE) * whole_s - hidden_s, 0.0)
    return np.asarray(waits_s + _LAST_MESSAGE_SHARE * whole_s + beyond_s)


def _all_reduce_s(measurements: Measurements, ranks: IntArray) -> FloatArray:
    """(n,) seconds of one all-reduce of all gradients by a ring, as far as a benchmark measured its network.

    2(N-1) messages and 2(N-1)/N of the bytes (Thakur, Rabenseifner and Gropp, "Optimization of collective communication
    operations in MPICH", IJHPCA 19(1), 2005).
    """
    n, is_between = np.asarray(ranks, dtype=float), measurements.nodes(ranks) > 1
    network, size = measurements.network, measurements.gradient_bytes or 0.0
    inside, between = _is_pinned(measurements)
    found = np.zeros_like(n)
    if network and inside:
        found = _ring_s(n, network.alpha_inside_s, network.beta_inside_s_per_byte, size)
    if network and between:
        found = np.where(is_between, _ring_s(n, network.alpha_between_s, network.beta_between_s_per_byte, size), found)
    return found


def _ring_s(n: FloatArray, alpha_s: float | None, beta_s_per_byte: float | None, num_bytes: float) -> FloatArray:
    return np.asarray(2 * (n - 1) * ((alpha_s or 0.0) + (beta_s_per_byte or 0.0) * num_bytes / n))


def input_s(measurements: Measurements, ranks: IntArray) -> FloatArray:
    """(n,) wait for input: per sample of a rank, plus a part that grows with the ranks that share the file system."""
    if measurements.input_s is None or not measurements.input_s.any():
        return np.zeros(len(ranks))
    coefficients = nonnegative_least_squares(_input_columns(measurements, measurements.ranks), measurements.input_s)
    return np.asarray(_input_columns(measurements, ranks) @ coefficients)


def _input_columns(measurements: Measurements, ranks: IntArray) -> FloatArray:
    share = measurements.share(ranks)
    return np.stack([share, share * ranks / measurements.largest], axis=1)
