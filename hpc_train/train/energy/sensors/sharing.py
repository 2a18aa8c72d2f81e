"""Whether other jobs may have used this node: its meters count the joules of all of them."""

import os
from pathlib import Path

from hpc_train.core.job_environment import JobEnvironment

_MIN_S = 2.0  # /proc/stat counts in hundredths of a second, on every core
# A node counts as shared if the processor time of others exceeds both of these shares.
_OF_OWN = 0.05  # of this job's
_OF_NODE = 0.01  # of all the node's cores: daemons take that much


def has_part_of_node(job: JobEnvironment, root: Path = Path("/")) -> bool | None:
    """Whether this job was given only a part of the node, according to Slurm and the kernel's cgroups; None: unknown.

    An oversubscribed partition gives the same cores to other jobs, too, which only `foreign_cores` shows. Slurm's CPUs
    may be cores or hardware threads, so as many CPUs as the node has cores, and fewer than its threads, prove nothing.
    """
    num_threads, num_cores = _num_cpus(root)
    if job.job_id is not None:
        held = job.cpus_on_this_node
        if held is None or num_threads is None:
            return None
        return None if held == num_cores and held < num_threads else held < num_threads
    allowed = _cgroup_cpus(root)
    return (
        True if allowed and num_threads and allowed < num_threads else None
    )  # all cores are allowed: others may be allowed them, too


def busy_s(root: Path = Path("/")) -> float | None:
    """Seconds that all cores of the node together have worked since the boot; None if unknown."""
    try:
        fields = (root / "proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system, _idle, _iowait, irq, softirq = (int(field) for field in fields[1:8])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def own_s() -> float:
    """Seconds that cores have worked for this process and its children that have ended."""
    return sum(os.times()[:4])


def foreign_cores(busy_s: float | None, own_s: float, passed_s: float) -> float | None:
    """How many cores worked for others than this job during `passed_s`; None if that is too short to measure."""
    return None if busy_s is None or passed_s < _MIN_S else max(0.0, busy_s - own_s) / passed_s


def is_shared(part: bool | None, foreign: float | None, own: float, num_threads: int) -> bool | None:
    """Whether a node was shared. own: cores that worked for this job. None: nothing was measured or is known."""
    if foreign is not None and foreign > max(_OF_OWN * own, _OF_NODE * num_threads):
        return True
    return False if part is None and foreign is not None else part


def _num_cpus(root: Path) -> tuple[int | None, int | None]:
    """(hardware threads of all online cores, cores); None if unknown."""
    cpus = root / "sys/devices/system/cpu"
    try:
        num_threads = _count((cpus / "online").read_text())
        siblings = {path.read_text() for path in cpus.glob("cpu[0-9]*/topology/thread_siblings_list")}
    except (OSError, ValueError):
        return None, None
    return num_threads, len(siblings) or None


def _cgroup_cpus(root: Path) -> int | None:
    """How many CPUs this process's cgroup may use, version 2 or 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        folder = path.lstrip("/")
        if not controllers:
            file = root / "sys/fs/cgroup" / folder / "cpuset.cpus.effective"
        elif "cpuset" in controllers.split(","):
            file = root / "sys/fs/cgroup/cpuset" / folder / "cpuset.effective_cpus"
        else:
            continue
        try:
            return _count(file.read_text())
        except (OSError, ValueError):
            continue
    return None


def _count(ranges: str) -> int:
    """How many numbers 0-3,8 names."""
    pairs = [(word.split("-")[0], word.split("-")[-1]) for word in ranges.strip().split(",")]
    return sum(int(last) - int(first) + 1 for first, last in pairs)
