"""Where ranks run: hosts, cores, and the number of threads of each."""

import os
from dataclasses import dataclass, replace

from hpc_train.core.formatting import plural
from hpc_train.train.comm.context import Context


@dataclass(frozen=True)
class RankPlacement:
    """Where one rank runs, the cores it may use, and its number of threads."""

    rank: int
    host: str
    local_rank: int
    pid: int
    cores: list[int]
    threads: int


def place_ranks(context: Context, threads: int) -> list[RankPlacement]:
    """Collective. The placement of all ranks. threads: of this rank; 0 for its fair share of its cores."""
    world = context.world
    cores = sorted(os.sched_getaffinity(0))
    everyone = context.all_gather(RankPlacement(world.rank, world.host, world.local_rank, os.getpid(), cores, threads))
    cores_by_host: dict[str, list[list[int]]] = {}
    for each in everyone:
        cores_by_host.setdefault(each.host, []).append(each.cores)
    return [
        each if each.threads else replace(each, threads=_fair_threads(each.cores, cores_by_host[each.host]))
        for each in everyone
    ]


def _fair_threads(mine: list[int], on_host: list[list[int]]) -> int:
    """OMP_NUM_THREADS if set, else the rank's cores divided by the number of ranks that use any of them."""
    configured = os.environ.get("OMP_NUM_THREADS", "")
    if configured.isdecimal() and int(configured) > 0:
        return int(configured)
    num_sharing = sum(1 for cores in on_host if set(cores) & set(mine))
    return max(1, len(mine) // max(1, num_sharing))


def crowding_warnings(places: list[RankPlacement]) -> list[str]:
    """One line for each host with fewer cores than ranks."""
    lines = []
    for host in sorted({place.host for place in places}):
        ranks = [place for place in places if place.host == host]
        cores = {core for place in ranks for core in place.cores}
        if len(ranks) > len(cores):
            lines.append(
                f"{len(ranks)} ranks on {host} share {plural(len(cores), 'core')}: each waits "
                f"for the others. Start at most {len(cores)} there, or give them more cores (mpirun --bind-to none)."
            )
    return lines
