"""Where ranks ran, from meta.json."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import attempts, list_at


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


def _host(placement: RankPlacement) -> str:
    return placement.host


def _placement(entry: dict[str, Any]) -> RankPlacement:
    cores = frozenset(map(int, entry.get("cores", [])))
    return RankPlacement(int(entry["rank"]), str(entry["host"]), int(entry["local_rank"]), cores)
