"""The memory that a node has left for this job's ranks."""

from pathlib import Path

import numpy as np

from hpc_train.train.comm.context import Context


def available_bytes_per_rank(context: Context) -> int:
    """Collective. What each rank may take if all do, on the node that has least for each."""
    mine = _available_bytes() // context.world.local_size
    return int(-context.max(np.array([-mine]))[0])


def _available_bytes() -> int:
    """What the system could still give this process, its cgroup's limit included."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    for cgroup in Path("/proc/self/cgroup").read_text().splitlines():
        folder = Path("/sys/fs/cgroup") / cgroup.rpartition(":")[2].lstrip("/")
        try:
            limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        except OSError:  # not of version 2, or not ours to see
            continue
        if limit.isdecimal():
            found = min(found, int(limit) - int(used))
    return max(found, 0)
