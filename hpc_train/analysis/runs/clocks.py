"""Clocks of different hosts, brought onto the root's: each has an offset of its own and runs at a rate of its own."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpc_train.core.records import FloatArray, IntArray

_MOST_NS = 1 << 61  # a number beyond is damage
Hosts = Sequence[str | None]  # of each rank; None: the run did not write it down


@dataclass(frozen=True, eq=False)
class Clocks:
    """Each rank's monotonic clock minus the root's: (ranks,) in ns when the last attempt's loop began, and how much
    further apart they were at its end.
    """

    offset_ns: IntArray
    drift_ns: FloatArray

    def aligned_ns(self, rank: int, moments_ns: IntArray, began_ns: int, ended_ns: int) -> IntArray:
        """Moments of a rank's clock on the root's, the offset interpolated linearly over the rank's loop.

        Rates are taken to be constant, which holds for minutes rather than for hours (Becker, Rabenseifner and Wolf,
        "Implications of non-constant clock drifts for the timestamps of concurrent events", IEEE Cluster 2008): when
        ranks leave a reduction shows how far that went wrong (`Arrivals.clock_error_s`).
        """
        part = (moments_ns - began_ns) / max(1, ended_ns - began_ns)
        aligned = moments_ns - self.offset_ns[rank] - np.rint(self.drift_ns[rank] * part).astype(np.int64)
        return np.asarray(aligned, dtype=np.int64)


def hosts_of(meta: dict[str, Any], size: int) -> list[str | None]:
    """(size,) where each rank ran, in the last attempt."""
    hosts: list[str | None] = [None] * size
    places = meta.get("ranks")
    for place in places if isinstance(places, list) else []:
        rank, host = (place.get("rank"), place.get("host")) if isinstance(place, dict) else (None, None)
        if isinstance(rank, int) and 0 <= rank < size and isinstance(host, str):
            hosts[rank] = host
    return hosts


def clocks_of(meta: dict[str, Any], hosts: Hosts) -> Clocks | None:
    """What meta.json says of the clocks in the last attempt; None where that is not enough to compare them.

    Ranks of one host read one clock: their offsets are the host's, the median of what was measured.
    """
    size = len(hosts)
    if None not in hosts and len(set(hosts)) == 1:
        return Clocks(np.zeros(size, np.int64), np.zeros(size))
    told = meta.get("clock_offsets_ns")
    start = _offsets(told, "start", size)
    if start is None:
        return None
    start = _of_hosts(start, hosts)
    # `end` of an attempt that was killed is the one before's.
    end = _offsets(told, "end", size) if meta.get("ended") else None
    return Clocks(start, np.zeros(size) if end is None else (_of_hosts(end, hosts) - start).astype(np.float64))


def _offsets(told: Any, moment: str, size: int) -> IntArray | None:
    values = told.get(moment) if isinstance(told, dict) else None
    known = (
        isinstance(values, list)
        and len(values) == size
        and all(type(value) is int and abs(value) < _MOST_NS for value in values)
    )
    return np.array(values, dtype=np.int64) if known else None


def _of_hosts(offsets: IntArray, hosts: Hosts) -> IntArray:
    """Each rank's offset replaced by the median over its host."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, host in enumerate(hosts):
        if host is not None:
            ranks[host].append(rank)
    result = offsets.copy()
    for members in ranks.values():
        result[members] = np.sort(offsets[members])[len(members) // 2]
    return result
