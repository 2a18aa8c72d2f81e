"""Aligns the clocks of different hosts with the root's: each has its own offset and its own rate."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpc_train.core.records import FloatArray, IntArray

_MOST_NS = 1 << 61  # a number beyond is damage
Hosts = Sequence[str | None]  # of each rank; None: not recorded


@dataclass(frozen=True, eq=False)
class Clocks:
    """Each rank's monotonic clock minus the root's, (ranks,) in ns: at the start of the last attempt's loop, and its
    increase until the end.
    """

    offset_ns: IntArray
    drift_ns: FloatArray

    def aligned_ns(self, rank: int, moments_ns: IntArray, began_ns: int, ended_ns: int) -> IntArray:
        """Converts times of a rank's clock to the root's; the offset is interpolated linearly over the rank's loop.

        Assumes constant rates, which holds for minutes rather than for hours (Becker, Rabenseifner and Wolf,
        "Implications of non-constant clock drifts for the timestamps of concurrent events", IEEE Cluster 2008).
        `Arrivals.clock_error_s` is the remaining error, from when ranks leave reductions.
        """
        part = (moments_ns - began_ns) / max(1, ended_ns - began_ns)
        aligned = moments_ns - self.offset_ns[rank] - np.rint(self.drift_ns[rank] * part).astype(np.int64)
        return np.asarray(aligned, dtype=np.int64)


def hosts_of(meta: dict[str, Any], size: int) -> list[str | None]:
    """(size,) the host of each rank in the last attempt."""
    hosts: list[str | None] = [None] * size
    places = meta.get("ranks")
    for place in places if isinstance(places, list) else []:
        rank, host = (place.get("rank"), place.get("host")) if isinstance(place, dict) else (None, None)
        if isinstance(rank, int) and 0 <= rank < size and isinstance(host, str):
            hosts[rank] = host
    return hosts


def clocks_of(meta: dict[str, Any], hosts: Hosts) -> Clocks | None:
    """The clocks of the last attempt, from meta.json; None if it does not suffice to compare them.

    Ranks of one host read the same clock: their offset is the median of those measured on the host.
    """
    size = len(hosts)
    if None not in hosts and len(set(hosts)) == 1:
        return Clocks(np.zeros(size, np.int64), np.zeros(size))
    recorded = meta.get("clock_offsets_ns")
    start = _offsets(recorded, "start", size)
    if start is None:
        return None
    start = _of_hosts(start, hosts)
    # An attempt that was killed left no `end`: the one in meta.json is an earlier attempt's.
    end = _offsets(recorded, "end", size) if meta.get("ended") else None
    return Clocks(start, np.zeros(size) if end is None else (_of_hosts(end, hosts) - start).astype(np.float64))


def _offsets(recorded: Any, moment: str, size: int) -> IntArray | None:
    values = recorded.get(moment) if isinstance(recorded, dict) else None
    known = (
        isinstance(values, list)
        and len(values) == size
        and all(type(value) is int and abs(value) < _MOST_NS for value in values)
    )
    return np.array(values, dtype=np.int64) if known else None


def _of_hosts(offsets: IntArray, hosts: Hosts) -> IntArray:
    """Replaces each rank's offset by the median over its host."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, host in enumerate(hosts):
        if host is not None:
            ranks[host].append(rank)
    result = offsets.copy()
    for members in ranks.values():
        result[members] = np.sort(offsets[members])[len(members) // 2]
    return result
