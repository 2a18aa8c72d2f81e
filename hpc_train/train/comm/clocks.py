"""Clocks of ranks, compared with the root's."""

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

    The root exchanges messages with each rank in turn and uses the exchange with the shortest round trip (Cristian,
    "Probabilistic clock synchronization", Distributed Computing 1989): the error is at most half that round trip.
    """
    if context.comm is None:
        return [(0, 0)]
    with context.waiting:
        if context.world.is_root:
            return [(0, 0), *(_ping(context, rank, now_ns) for rank in range(1, context.world.size))]
        _pong(context, now_ns)
        return []


def _ping(context: Context, rank: int, now_ns: Callable[[], int]) -> tuple[int, int]:
    """(the clock of `rank` minus the root's, its maximum error)."""
    stamp = np.empty(1, dtype=np.int64)
    trips = []
    for _ in range(_PING_PONGS):
        at_ns, sent_ns = now_ns(), perf_counter_ns()
        messages.send(context.comm, stamp, dest=rank)
        messages.receive(context.comm, stamp, source=rank)
        half_ns = (perf_counter_ns() - sent_ns) // 2
        trips.append((half_ns, int(stamp[0]) - at_ns - half_ns))
    half_ns, offset_ns = min(trips)
    return offset_ns, half_ns


def _pong(context: Context, now_ns: Callable[[], int]) -> None:
    stamp = np.empty(1, dtype=np.int64)
    for _ in range(_PING_PONGS):
        messages.receive(context.comm, stamp, source=0)
        stamp[0] = now_ns()
        messages.send(context.comm, stamp, dest=0)
