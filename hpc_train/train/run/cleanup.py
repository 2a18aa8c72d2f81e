"""What killed jobs leave behind, removed by the next start: empty run directories, shared memory of dead ranks."""

import os
import stat
from contextlib import suppress
from pathlib import Path
from time import time

from hpc_train.core import lock
from hpc_train.core.rundir import RunDir

# Open MPI 4 and 5, its one-sided window, UCX, NCCL: each file is mapped by its maker for as long as that lives.
_SEGMENTS = ("vader_segment.", "sm_segment.", "osc_rdma.", "ucx_shm_posix_", "nccl-")
_YOUNG_S = 60.0  # of a segment: its maker may be about to map it
_STALE_S = 3600.0  # of a lock that nobody here can look up
_FIRST_PID_NAMESPACE = "pid:[4026531836]"  # from which every process of the machine is seen
_BEGUN = {"lock", "timings", "energy", "checkpoints"}  # with a config.toml it may be one that a study goes on with


def remove_stale_runs(run: RunDir) -> None:
    """Removes run directories beside `run` whose job was killed before its first step: a lock, and nothing else.

    Either the holder of the lock was a process of this machine that is gone, or the lock is older than a living job's
    can be. The file system's clock decides: `run` was just made on it.
    """
    for other in run.path.parent.iterdir():
        with suppress(OSError):
            if other != run.path and _is_begun_and_dead(other, run.path.stat().st_mtime):
                _remove_empty(other)


def _is_begun_and_dead(folder: Path, now_s: float) -> bool:
    names = {path.name for path in folder.iterdir()}
    if "lock" not in names or not names <= _BEGUN:
        return False
    return lock.is_held_by_dead_process(folder / "lock") or now_s - (folder / "lock").stat().st_mtime > _STALE_S


def _remove_empty(folder: Path) -> None:
    """Removes the lock last: a folder that is not empty after all raises OSError, and keeps its lock."""
    for name in ("timings", "energy", "checkpoints"):
        with suppress(FileNotFoundError):
            (folder / name).rmdir()
    (folder / "lock").unlink()
    folder.rmdir()


def remove_stale_segments(folder: Path = Path("/dev/shm"), young_s: float = _YOUNG_S) -> list[str]:
    """Removes this user's segments of MPI that no process has mapped or open; their names.

    Removes nothing where this process cannot see every process of the machine, in a container say.
    """
    try:
        if os.readlink("/proc/self/ns/pid") != _FIRST_PID_NAMESPACE:
            return []
    except OSError:  # no /proc: nobody can tell which are in use
        return []
    found = {}
    with suppress(OSError):
        for path in folder.iterdir():
            status = path.lstat()
            old = time() - status.st_ctime > young_s
            mine = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            if path.name.startswith(_SEGMENTS) and mine and old:
                found[(status.st_dev, status.st_ino)] = path
    used = _in_use() if found else set()
    removed = []
    for path in (path for key, path in found.items() if key not in used):
        with suppress(OSError):  # another start was quicker
            path.unlink()
            removed.append(path.name)
    return sorted(removed)


def _in_use() -> set[tuple[int, int]]:
    """(device, inode) of every file that a process of this user has mapped or open."""
    used = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended; or it may not be looked at, as sshd, and is no rank then
            for line in (process / "maps").read_bytes().splitlines():
                device, inode = line.split(maxsplit=5)[3:5]
                major, _, minor = device.partition(b":")
                used.add((os.makedev(int(major, 16), int(minor, 16)), int(inode)))
            for handle in (process / "fd").iterdir():
                with suppress(OSError):
                    status = handle.stat()
                    used.add((status.st_dev, status.st_ino))
    return used
