"""Where ranks ran, from meta.json."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import attempts, dict_at, list_at, positive_number


@dataclass(frozen=True)
class RankPlacement:
    rank: int
    host: str
    local_rank: int
    cores: frozenset[int]


@dataclass(frozen=True)
class CrowdedHost:
    """A host with more ranks than cores: each waits for the others."""

    host: str
    num_ranks: int
    num_cores: int


def hosts_of_attempt(meta: dict[str, Any], attempt: int) -> list[str]:
    """The hosts of one attempt; the run's hosts if meta.json does not list attempts."""
    for entry in attempts(meta):
        if entry.get("attempt") == attempt and isinstance(entry.get("hosts"), list):
            return [str(host) for host in entry["hosts"]]
    return list(meta["hosts"])


def placements(run: Run) -> tuple[RankPlacement, ...]:
    """Where every rank ran; () if meta.json does not list all ranks, or if attempts ran on different hosts."""
    numbers = range(1, run.summary.num_attempts + 1)
    if len({frozenset(hosts_of_attempt(run.meta, number)) for number in numbers}) > 1:
        return ()
    try:
        found = [_placement(entry) for entry in list_at(run.meta, "ranks")]
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError):  # damaged, or written by another program
        return ()
    is_complete = sorted(each.rank for each in found) == list(range(run.size))
    return tuple(found) if is_complete else ()


def crowded_hosts(run: Run) -> tuple[CrowdedHost, ...]:
    """The hosts of which training said the same in a warning; () if the cores of a rank there were not recorded."""
    found = []
    for host, ranks in groupby(sorted(placements(run), key=_host), key=_host):
        cores = [rank.cores for rank in ranks]
        num_cores = len(frozenset().union(*cores))
        if all(cores) and len(cores) > num_cores:
            found.append(CrowdedHost(host, len(cores), num_cores))
    return tuple(found)


@dataclass(frozen=True)
class SharedHost:
    """A host on which other programs kept cores busy while the steps ran. num_cpus: of the host; None: not recorded."""

    host: str
    foreign_cores: float  # mean over the loop
    num_cpus: int | None


_NOTICEABLE = 0.1  # of the host's CPUs; of those that ranks may use, if the host's are not recorded


def shared_hosts(run: Run) -> tuple[SharedHost, ...]:
    """Of the last attempt, the busiest first."""
    energy, found = dict_at(run.meta, "energy"), []
    for host, foreign in dict_at(energy, "foreign_cores").items():
        cores, known = positive_number(foreign), positive_number(dict_at(energy, "num_cpus").get(host))
        used = frozenset().union(*(place.cores for place in placements(run) if place.host == host))
        if cores is not None and cores >= _NOTICEABLE * (known or len(used) or 1):
            found.append(SharedHost(host, cores, int(known) if known else None))
    return tuple(sorted(found, key=lambda each: -each.foreign_cores))


def _host(placement: RankPlacement) -> str:
    return placement.host


def _placement(entry: dict[str, Any]) -> RankPlacement:
    cores = frozenset(map(int, entry.get("cores", [])))
    return RankPlacement(int(entry["rank"]), str(entry["host"]), int(entry["local_rank"]), cores)
