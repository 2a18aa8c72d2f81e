"""When each rank leaves a collective, given when each enters it.

Each function takes `entered`, (runs, N) seconds, and returns the same shape. A rank goes on as soon as its last message
has arrived: an algorithm of rounds is a recursion of maxima and sums ("max-plus"), in which a late rank delays only
those that its messages reach. Costs of the algorithms: Thakur, Rabenseifner and Gropp, "Optimization of collective
communication operations in MPICH", IJHPCA 19(1), 2005; of the ring: Patarasuk and Yuan, "Bandwidth optimal all-reduce
algorithms for clusters of workstations", Journal of Parallel and Distributed Computing 69(2), 2009.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from hpc_train.analysis.simulation.machine import Machine
from hpc_train.core.records import FloatArray, IntArray

Algorithm = Literal["ring", "rabenseifner", "recursive-doubling", "tree", "hierarchical"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)


def all_reduce(algorithm: Algorithm, entered: FloatArray, num_bytes: float, machine: Machine) -> FloatArray:
    """Each rank has `num_bytes`, and leaves with their sum over ranks."""
    if entered.shape[-1] == 1:
        return entered
    by_name: dict[Algorithm, Callable[[FloatArray, float, Machine], FloatArray]] = {
        "ring": _ring,
        "rabenseifner": _rabenseifner,
        "recursive-doubling": _recursive_doubling,
        "tree": _tree,
        "hierarchical": _hierarchical,
    }
    return by_name[algorithm](entered + machine.overhead_s, num_bytes, machine)


def reduce_scatter(algorithm: Algorithm, entered: FloatArray, num_bytes: float, machine: Machine) -> FloatArray:
    """Each rank has `num_bytes`, and leaves with its N-th of their sum: half an all-reduce."""
    if entered.shape[-1] == 1:
        return entered
    entered = entered + machine.overhead_s
    if algorithm in ("ring", "hierarchical"):
        return _around(entered, num_bytes, machine, laps=1)
    num_ranks = entered.shape[-1]
    return _among_power_of_two(entered, _halving(num_ranks, num_bytes), machine, num_bytes, num_bytes / num_ranks)


def all_gather(algorithm: Algorithm, entered: FloatArray, num_bytes: float, machine: Machine) -> FloatArray:
    """Each rank has an N-th of `num_bytes`, and leaves with all of them: the other half, in the reverse order."""
    if entered.shape[-1] == 1:
        return entered
    entered = entered + machine.overhead_s
    if algorithm in ("ring", "hierarchical"):
        return _around(entered, num_bytes, machine, laps=1)
    num_ranks = entered.shape[-1]
    rounds = _halving(num_ranks, num_bytes)[::-1]
    return _among_power_of_two(entered, rounds, machine, num_bytes / num_ranks, num_bytes)


# ---------------------------------------------------------------------------------------------- the ring


def _ring(entered: FloatArray, num_bytes: float, machine: Machine) -> FloatArray:
    """Reduce-scatter and all-gather around the ring: 2 (N-1) rounds with 1/N of the bytes each."""
    return _around(entered, num_bytes, machine, laps=2)


def _around(entered: FloatArray, num_bytes: float, machine: Machine, laps: int) -> FloatArray:
    """After T = laps (N-1) rounds of x_r <- max(x_r, x_(r-1)) + c_r, without making them.

    c_r is what the message from rank r-1 takes: c where both share a node, d >= c where it is the first of its node.
    Unrolled, x_r(T) is the largest x_(r-k) + what a path of T rounds costs that moves k times and stays T-k times, best
    at the dearest rank that it passes. So with C_r = c_1 + ... + c_r, and b_r the first rank on the node of r:
    - paths that pass a first rank: max over j <= b_r of x_j + C_r - C_j + (T - r + j) d,
    - in one lap, paths that stay within a node: max over b_r < j <= r of x_j + T c (two laps have dearer ones).
    Of the images j, j - N, ... of a rank the latest is dearest, so N of them suffice. j runs over all ranks up to b_r,
    and one lap earlier over those behind b_r (behind r in one lap: a path has N - 1 moves at most).
    """
    num_ranks = entered.shape[-1]
    rounds = laps * (num_ranks - 1)
    within_s, across_s = (float(each.seconds(num_bytes / num_ranks)) for each in (machine.inside, machine.between))
    if num_ranks <= machine.ranks_per_node:
        return np.repeat(entered.max(-1, keepdims=True) + rounds * within_s, num_ranks, axis=-1)
    across_s = max(across_s, within_s)
    ranks = np.arange(num_ranks)
    first = ranks // machine.ranks_per_node * machine.ranks_per_node
    spared_s = np.cumsum(np.where(first == ranks, 0.0, across_s - within_s))  # r d - C_r, up to a constant
    lap_s = float(spared_s[-1])
    lifted = entered + spared_s
    this_lap = np.maximum.accumulate(lifted, axis=-1)[..., first]
    behind = np.maximum.accumulate(lifted[..., ::-1], axis=-1)[..., ::-1] - lap_s  # one lap earlier
    behind = np.concatenate([behind, np.full((*behind.shape[:-1], 1), -np.inf)], axis=-1)
    earlier = behind[..., (ranks if laps == 1 else first) + 1]
    left: FloatArray = np.maximum(this_lap, earlier) - spared_s + rounds * across_s
    if laps > 1:
        return left
    return np.asarray(np.maximum(left, _latest_before(entered, machine.ranks_per_node) + rounds * within_s))


def _latest_before(entered: FloatArray, ranks_per_node: int) -> FloatArray:
    """The latest among the ranks of the same node up to each one, the node's first rank left out."""
    num_ranks = entered.shape[-1]
    padded = np.full((*entered.shape[:-1], -(-num_ranks // ranks_per_node) * ranks_per_node), -np.inf)
    padded[..., :num_ranks] = entered
    by_node = padded.reshape(*entered.shape[:-1], -1, ranks_per_node).copy()
    by_node[..., 0] = -np.inf
    return np.maximum.accumulate(by_node, axis=-1).reshape(padded.shape)[..., :num_ranks]


# ---------------------------------------------------------------------------------------------- powers of two

Round = tuple[int, float]  # (distance between partners, bytes that each sends to the other)


def _halving(ranks: int, num_bytes: float) -> list[Round]:
    """Recursive halving: partners at distance 1, 2, 4, ... exchange a half, a quarter, an eighth, ... of the bytes."""
    return [(1 << bit, num_bytes / (2 << bit)) for bit in range(ranks.bit_length() - 1)]


def _recursive_doubling(entered: FloatArray, num_bytes: float, machine: Machine) -> FloatArray:
    """log2 N rounds in which partners exchange all bytes."""
    rounds = [(distance, num_bytes) for distance, _ in _halving(entered.shape[-1], num_bytes)]
    return _among_power_of_two(entered, rounds, machine, num_bytes, num_bytes)


def _rabenseifner(entered: FloatArray, num_bytes: float, machine: Machine) -> FloatArray:
    """Reduce-scatter by recursive halving, all-gather by recursive doubling: 2 log2 N rounds, the bytes of a ring."""
    halves = _halving(entered.shape[-1], num_bytes)
    return _among_power_of_two(entered, [*halves, *halves[::-1]], machine, num_bytes, num_bytes)


def _among_power_of_two(
    entered: FloatArray, rounds: list[Round], machine: Machine, bytes_before: float, bytes_after: float
) -> FloatArray:
    """Rounds among the largest power of two of the ranks, as MPICH makes them.

    Each rank beyond it gives a neighbour `bytes_before` before and receives `bytes_after` after them: they are the even
    ones of the first ranks, two for each.
    """
    times = entered.copy()
    others, members = _others_and_members(entered.shape[-1])
    if len(others):
        before_s = machine.message_s(others, others + 1, bytes_before)
        times[..., others + 1] = np.maximum(times[..., others], times[..., others + 1]) + before_s
    among = times[..., members]
    for distance, size in rounds:
        pairs = among.reshape(*among.shape[:-1], -1, 2, distance)
        latest = np.maximum(pairs[..., :1, :], pairs[..., 1:, :])
        took_s = _exchange_s(entered.shape[-1], distance, size, machine)
        among = np.add(latest, np.broadcast_to(took_s, among.shape[-1:]).reshape(pairs.shape[-3:])).reshape(among.shape)
    times[..., members] = among
    if len(others):
        after_s = machine.message_s(others + 1, others, bytes_after)
        times[..., others] = np.maximum(times[..., others], times[..., others + 1]) + after_s
    return times


def _others_and_members(num_ranks: int) -> tuple[IntArray, IntArray]:
    power = 1 << (num_ranks.bit_length() - 1)
    others = 2 * np.arange(num_ranks - power)
    return others, np.concatenate([others + 1, np.arange(2 * len(others), num_ranks)])


@lru_cache(maxsize=128)  # the same rounds for each message of each step
def _exchange_s(num_ranks: int, distance: int, num_bytes: float, machine: Machine) -> FloatArray:
    """(power of two,) seconds of an exchange with the member at `distance`; a single number where all take as long."""
    _, members = _others_and_members(num_ranks)
    took_s = machine.message_s(members[np.arange(len(members)) ^ distance], members, num_bytes)
    return took_s[:1] if np.ptp(took_s) == 0 else took_s


# ---------------------------------------------------------------------------------------------- trees


def _tree(entered: FloatArray, num_bytes: float, machine: Machine) -> FloatArray:
    """A reduction to rank 0 along a binomial tree and a broadcast back: 2 log2 N rounds, all bytes in each."""
    num_ranks, times = entered.shape[-1], entered.copy()
    distances = [1 << bit for bit in range((num_ranks - 1).bit_length())]
    for distance in distances:
        parents, children = _pairs(num_ranks, distance)
        took_s = machine.message_s(children, parents, num_bytes)
        times[..., parents] = np.maximum(times[..., parents], times[..., children]) + took_s
    for distance in reversed(distances):
        parents, children = _pairs(num_ranks, distance)
        arrived = times[..., parents] + machine.message_s(parents, children, num_bytes)
        times[..., parents] = arrived
        times[..., children] = np.maximum(times[..., children], arrived)
    return times


def _pairs(num_ranks: int, distance: int) -> tuple[IntArray, IntArray]:
    parents = np.arange(0, num_ranks - distance, 2 * distance)
    return parents, parents + distance


def _hierarchical(entered: FloatArray, num_bytes: float, machine: Machine) -> FloatArray:
    """A ring's reduce-scatter within each node, Rabenseifner's all-reduce of each part between nodes, an all-gather.

    The parts of a node travel at once and share its link.
    """
    num_ranks, per_node = entered.shape[-1], machine.ranks_per_node
    starts = np.arange(0, num_ranks, per_node)
    sharing = min(num_ranks, per_node)
    lap_s = (sharing - 1) * float(machine.inside.seconds(num_bytes / sharing))
    nodes = np.maximum.reduceat(entered, starts, axis=-1) + lap_s
    if len(starts) > 1:
        nodes = _rabenseifner(nodes, num_bytes, Machine(1, machine.inside, machine.between))
    counts = np.diff(np.append(starts, num_ranks))
    return np.repeat(nodes + lap_s, counts, axis=-1)
