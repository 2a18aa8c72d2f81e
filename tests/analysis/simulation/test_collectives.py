"""Collectives as recursions of maxima and sums: against the rounds themselves, and against the formulas in print."""

import numpy as np
import pytest

from hpc_train.analysis.simulation.collectives import ALGORITHMS, Algorithm, all_gather, all_reduce, reduce_scatter
from hpc_train.analysis.simulation.machine import Link, Machine
from hpc_train.core.records import FloatArray

INSIDE, BETWEEN = Link(1e-6, 1e-10), Link(5e-6, 1e-9)
ONE_RANK_A_NODE = Machine(1, INSIDE, BETWEEN)


def ring_by_rounds(entered: FloatArray, num_bytes: float, machine: Machine, laps: int) -> FloatArray:
    """In each round every rank waits for itself and for its left neighbour's message."""
    num_ranks = entered.shape[-1]
    nodes = np.arange(num_ranks) // machine.ranks_per_node
    within, across = (float(link.seconds(num_bytes / num_ranks)) for link in (machine.inside, machine.between))
    took_s = np.where(nodes == np.roll(nodes, 1), within, max(within, across))
    for _ in range(laps * (num_ranks - 1)):
        entered = np.maximum(entered, np.roll(entered, 1, axis=-1)) + took_s
    return entered


@pytest.mark.parametrize("ranks_per_node", [1, 2, 3, 4, 7, 16, 64])
def test_a_ring_without_its_rounds_is_the_ring_with_them(ranks_per_node: int) -> None:
    """Stragglers of up to three times the whole ring's time, anywhere."""
    random = np.random.default_rng(ranks_per_node)
    for num_ranks in [2, 3, 4, 5, 8, 13, 16, 31, 64, 100, 129, 512]:
        for across in (BETWEEN, Link(1e-7, 1e-11)):
            machine = Machine(ranks_per_node, INSIDE, across)
            lap_s = num_ranks * float(BETWEEN.seconds(1e6 / num_ranks))
            spreads = np.array([0.0, 0.01, 0.3, 6.0])[:, None] * lap_s
            entered = spreads * random.exponential(size=(4, num_ranks)) ** 2
            for laps, collective in ((2, all_reduce), (1, reduce_scatter), (1, all_gather)):
                left = collective("ring", entered, 1e6, machine)
                assert np.allclose(left, ring_by_rounds(entered, 1e6, machine, laps), rtol=1e-12, atol=0), num_ranks


@pytest.mark.parametrize("num_ranks", [2, 4, 16, 128])
def test_ranks_in_step_take_what_is_in_print(num_ranks: int) -> None:
    """Thakur et al. 2005, with one rank a node; the terms of the additions belong to the bytes."""
    size, rounds = 1e6, np.log2(num_ranks)
    a, b, part = BETWEEN.latency_s, BETWEEN.s_per_byte, (num_ranks - 1) / num_ranks
    printed: dict[Algorithm, float] = {
        "ring": 2 * (num_ranks - 1) * a + 2 * part * size * b,
        "rabenseifner": 2 * rounds * a + 2 * part * size * b,
        "recursive-doubling": rounds * (a + size * b),
        "tree": 2 * rounds * (a + size * b),
        "hierarchical": 2 * rounds * a + 2 * part * size * b,  # Rabenseifner's, where a rank is a node
    }
    assert set(printed) == set(ALGORITHMS)
    together = np.zeros((1, num_ranks))
    for algorithm, expected in printed.items():
        left = all_reduce(algorithm, together, size, ONE_RANK_A_NODE)
        assert left.max() == pytest.approx(expected), algorithm
    halves = {"ring": (num_ranks - 1) * a + part * size * b, "rabenseifner": rounds * a + part * size * b}
    for algorithm, expected in halves.items():
        for half in (reduce_scatter, all_gather):
            assert half(algorithm, together, size, ONE_RANK_A_NODE).max() == pytest.approx(expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8, 12, 37, 100])
def test_nobody_leaves_before_the_last_has_entered_and_a_late_rank_delays_by_its_lateness(
    algorithm: Algorithm, num_ranks: int
) -> None:
    machine = Machine(4, INSIDE, BETWEEN, overhead_s=2e-6)
    entered = np.random.default_rng(1).random((3, num_ranks)) * 1e-3
    left = all_reduce(algorithm, entered, 1e5, machine)
    least = 0.0 if num_ranks == 1 else machine.overhead_s + INSIDE.latency_s
    assert (left >= entered.max(-1, keepdims=True) + least).all()
    shifted = all_reduce(algorithm, entered + 0.25, 1e5, machine)
    assert np.allclose(shifted, left + 0.25), "time has no zero"
    later = entered.copy()
    later[:, num_ranks // 2] += 1.0
    late = all_reduce(algorithm, later, 1e5, machine)
    assert (late >= left - 1e-12).all()
    together = all_reduce(algorithm, np.zeros((1, num_ranks)), 1e5, machine)
    assert (late <= later.max(-1, keepdims=True) + together + 1e-12).all(), "those before it cost nothing more"


def test_ranks_of_a_node_share_its_link() -> None:
    """All 8 ranks of a node send half of the bytes to the other node at once, unless they first add up on the node."""
    machine, size = Machine(8, Link(0.0, 0.0), Link(0.0, 1e-9)), 8e6
    together = np.zeros((1, 16))
    assert all_reduce("ring", together, size, machine).max() == pytest.approx(2 * 15 / 16 * size * 1e-9)
    assert all_reduce("recursive-doubling", together, size, machine).max() == pytest.approx(8 * size * 1e-9)
    assert all_reduce("rabenseifner", together, size, machine).max() == pytest.approx(2 * 8 * size / 16 * 1e-9)
    assert all_reduce("tree", together, size, machine).max() == pytest.approx(2 * size * 1e-9)
    assert all_reduce("hierarchical", together, size, machine).max() == pytest.approx(size * 1e-9)
