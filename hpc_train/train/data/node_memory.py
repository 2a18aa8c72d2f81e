"""The memory of a node, and how much of it is available to each of this job's ranks."""

import os
import resource
from pathlib import Path

import numpy as np

from hpc_train.train.comm.context import Context

_STATUS = Path("/proc/self/status")


def physical_bytes() -> int:
    """All memory of this node."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_bytes_per_rank(context: Context) -> int:
    """Collective. How much each rank may allocate if all do: the least of all ranks, by their nodes and own limits."""
    mine = min(available_bytes() // context.world.local_size, _within_own_limits())
    return int(-context.max(np.array([-mine]))[0])


def _within_own_limits() -> int:
    """What this process may still take by `ulimit -d` and `ulimit -v` (setrlimit(2)); very much without a limit."""
    fields = status_bytes()
    left = [1 << 62]
    for limit, used in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and used in fields:
            left.append(soft - fields[used])
    return max(0, min(left))


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


def status_bytes() -> dict[str, int]:
    """What /proc/self/status states in kB, in bytes by name; {} if there is none."""
    if not _STATUS.is_file():
        return {}
    words = (line.split() for line in _STATUS.read_text().splitlines())
    return {each[0].rstrip(":"): int(each[1]) * 1024 for each in words if len(each) == 3 and each[2] == "kB"}
