"""The memory of a node, and how much of it is available to each of this job's ranks."""

import os
from pathlib import Path

import numpy as np

from hpc_train.train.comm.context import Context


def physical_bytes() -> int:
    """All memory of this node."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_bytes_per_rank(context: Context) -> int:
    """Collective. How much each rank may allocate if all do, on the node with the least available memory per rank."""
    mine = available_bytes() // context.world.local_size
    return int(-context.max(np.array([-mine]))[0])


def available_bytes() -> int:
    """What the system could still give this process, within the limits of its cgroup."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    for cgroup in Path("/proc/self/cgroup").read_text().splitlines():
        folder = Path("/sys/fs/cgroup") / cgroup.rpartition(":")[2].lstrip("/")
        try:
            limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        except OSError:  # cgroup version 1, or no permission
            continue
        if limit.isdecimal():
            found = min(found, int(limit) - int(used))
    return max(found, 0)
