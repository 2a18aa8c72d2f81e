"""Clocks of hosts, compared with the root's."""

from collections.abc import Callable
from time import perf_counter_ns

import numpy as np

from hpc_train.train.comm import messages
from hpc_train.train.comm.context import Context

_PING_PONGS = 20


def clock_offsets_ns(context: Context) -> list[int]:
    """Collective. On the root: each rank's monotonic clock minus the root's, in ns (empty elsewhere)."""
    return [offset_ns for offset_ns, _ in compare_clocks(context, perf_counter_ns)]


def compare_clocks(context: Context, now_ns: Callable[[], int]) -> list[tuple[int, int]]:
    """Collective. On the root: (each rank's clock minus the root's, its maximum error), in ns; empty elsewhere.

    The ranks of a host read one clock, so only the first rank of each host is asked. Hosts compare in pairs, along a
    binomial tree: after round k, 2^k hosts know their offset, and 2^k further ones learn theirs in the next round
    (Hunold and Carpen-Amarie, "Hierarchical clock synchronization in MPI", IEEE Cluster 2018). Offsets and maximum
    errors add up along the tree.
    """
    if context.comm is None:
        return [(0, 0)]
    world = context.world
    node_roots = context.all_gather(world.node_root)
    hosts = sorted(set(node_roots))
    with context.waiting:
        own = _offset_in_tree(context, hosts, now_ns) if world.rank in hosts else None
        of_hosts = context.gather(own)
    return [found for root in node_roots if (found := of_hosts[root]) is not None] if world.is_root else []


def _offset_in_tree(context: Context, hosts: list[int], now_ns: Callable[[], int]) -> tuple[int, int]:
    """(this host's clock minus the root's, its maximum error). hosts: the first rank of each."""
    own, offset_ns, error_ns = hosts.index(context.world.rank), 0, 0
    num_known = 1
    while num_known < len(hosts):
        if own < num_known and own + num_known < len(hosts):
            _tell_offset(context, hosts[own + num_known], (offset_ns, error_ns), now_ns)
        elif num_known <= own < 2 * num_known:
            offset_ns, error_ns = _learn_offset(context, hosts[own - num_known], now_ns)
        num_known *= 2
    return offset_ns, error_ns


def _tell_offset(context: Context, rank: int, own: tuple[int, int], now_ns: Callable[[], int]) -> None:
    """Sends `rank` the offset of its clock from the root's.

    Of some exchanges the one with the shortest round trip counts: its error is at most half that trip (Cristian,
    "Probabilistic clock synchronization", Distributed Computing 1989).
    """
    stamp = np.empty(1, dtype=np.int64)
    trips = []
    for _ in range(_PING_PONGS):
        at_ns, sent_ns = now_ns(), perf_counter_ns()
        messages.send(context.comm, stamp, dest=rank)
        messages.receive(context.comm, stamp, source=rank)
        half_ns = (perf_counter_ns() - sent_ns) // 2
        trips.append((half_ns, int(stamp[0]) - at_ns - half_ns))
    half_ns, offset_ns = min(trips)
    messages.send(context.comm, np.array([own[0] + offset_ns, own[1] + half_ns], dtype=np.int64), dest=rank)


def _learn_offset(context: Context, rank: int, now_ns: Callable[[], int]) -> tuple[int, int]:
    """(this clock minus the root's, its maximum error), by exchanges with a rank that knows its own offset."""
    stamp = np.empty(1, dtype=np.int64)
    for _ in range(_PING_PONGS):
        messages.receive(context.comm, stamp, source=rank)
        stamp[0] = now_ns()
        messages.send(context.comm, stamp, dest=rank)
    found = np.empty(2, dtype=np.int64)
    messages.receive(context.comm, found, source=rank)
    return int(found[0]), int(found[1])
