"""What a run's `meta.json` says of the machine, the software and the job."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_train import __version__, environment, shown
from hpc_train.records import SCHEMA
from hpc_train.train.context import Context, mpi_version


@dataclass(frozen=True)
class RankPlace:
    """Where one rank runs: the cores it may use, the ranks it shares them with, and the threads it takes."""

    rank: int
    host: str
    local_rank: int
    pid: int
    cores: list[int]
    threads: int


def place_ranks(context: Context, threads: int) -> list[RankPlace]:
    """Collective. Every rank's place, on every rank. `threads` of 0: the rank's cores, shared fairly."""
    world = context.world
    cores = sorted(os.sched_getaffinity(0))
    everyone = context.all((world.rank, world.host, world.local_rank, os.getpid(), cores, threads))
    of_host: dict[str, list[list[int]]] = {}
    for _, host, _, _, mine, _ in everyone:
        of_host.setdefault(host, []).append(mine)
    return [
        RankPlace(rank, host, local, pid, mine, asked or _fair_threads(mine, of_host[host]))
        for rank, host, local, pid, mine, asked in everyone
    ]


def _fair_threads(mine: list[int], of_host: list[list[int]]) -> int:
    """OMP_NUM_THREADS where the job sets it, else the rank's cores divided by the ranks that use them too."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdecimal() and int(told) > 0:
        return int(told)
    sharing = sum(1 for cores in of_host if set(cores) & set(mine))
    return max(1, len(mine) // max(1, sharing))


def crowding_warnings(places: list[RankPlace]) -> list[str]:
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


def describe(context: Context, places: list[RankPlace]) -> dict[str, Any]:
    """The root's part of meta.json: the machine, versions, git state and Slurm job."""
    return {
        "schema": SCHEMA,
        "hpc_train": __version__,
        "command": shown.command([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "size": context.world.size,
        "hosts": list(dict.fromkeys(place.host for place in places)),
        "ranks": [vars(place) for place in places],
        "cpu_model": _cpu_model(),
        "kernel": platform.release(),
        "versions": _versions(),
        "mpi": mpi_version(context),
        "git": git_state(Path.cwd()),
        "slurm": environment.recorded_slurm(os.environ),
        "environment": environment.recorded(os.environ),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for name in ("mpi4py", "horovod", "h5py"):
        if name in sys.modules:
            versions[name] = importlib.metadata.version(name)
    if "h5py" in sys.modules:
        versions["hdf5"] = sys.modules["h5py"].version.hdf5_version
    return versions


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def git_state(folder: Path) -> dict[str, Any]:
    """Commit and whether tracked files were changed, of the repository that `folder` lies in; {} outside one.

    changes: a checksum of the changes, which tells whether two runs of a dirty tree are repeats; not there where git
    takes too long to list them.
    """

    def git(*words: str) -> bytes:
        return subprocess.run(("git", "-C", str(folder), *words), capture_output=True, timeout=10, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").decode().strip()
        state = {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {}
    with suppress(OSError, subprocess.SubprocessError):
        if state["dirty"]:
            # No program of the user's (diff.external): it could print anything, or nothing.
            changes = git("diff", "HEAD", "--full-index", "--no-ext-diff", "--no-color")
            state["changes"] = hashlib.sha256(changes).hexdigest()[:16]
    return state
