"""Where ranks run: hosts, cores, and how many threads each takes."""

import os
from dataclasses import dataclass

from hpc_train.train.comm.context import Context


@dataclass(frozen=True)
class RankPlacement:
    """Where one rank runs: the cores it may use, the ranks it shares them with, and the threads it takes."""

    rank: int
    host: str
    local_rank: int
    pid: int
    cores: list[int]
    threads: int


def place_ranks(context: Context, threads: int) -> list[RankPlacement]:
    """Collective. Every rank's place, on every rank. `threads` of 0: the rank's cores, shared fairly."""
    world = context.world
    cores = sorted(os.sched_getaffinity(0))
    everyone = context.all_gather((world.rank, world.host, world.local_rank, os.getpid(), cores, threads))
    of_host: dict[str, list[list[int]]] = {}
    for _, host, _, _, mine, _ in everyone:
        of_host.setdefault(host, []).append(mine)
    return [
        RankPlacement(rank, host, local, pid, mine, asked or _fair_threads(mine, of_host[host]))
        for rank, host, local, pid, mine, asked in everyone
    ]


def _fair_threads(mine: list[int], of_host: list[list[int]]) -> int:
    """OMP_NUM_THREADS where the job sets it, else the rank's cores divided by the ranks that use them too."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdecimal() and int(told) > 0:
        return int(told)
    sharing = sum(1 for cores in of_host if set(cores) & set(mine))
    return max(1, len(mine) // max(1, sharing))


def crowding_warnings(places: list[RankPlacement]) -> list[str]:
    """One line a host whose ranks have fewer cores than they are."""
    lines = []
    for host in sorted({place.host for place in places}):
        ranks = [place for place in places if place.host == host]
        cores = {core for place in ranks for core in place.cores}
        if len(ranks) > len(cores):
            lines.append(
                f"warning: {len(ranks)} ranks on {host} share {len(cores)} core{'s' * (len(cores) != 1)}: each waits "
                f"for the others. Start at most {len(cores)} there, or give them more cores (mpirun --bind-to none)."
            )
    return lines
