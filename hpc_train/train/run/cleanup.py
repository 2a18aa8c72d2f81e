"""Removes what jobs left behind: run directories without a step, and shared memory of ranks that have ended."""

import os
import stat
from contextlib import suppress
from pathlib import Path
from time import time

from hpc_train.core import lock
from hpc_train.core.rundir import RunDir

FileId = tuple[int, int]  # (device, inode)

# Open MPI 4 and 5, its one-sided windows, UCX, NCCL: the process that creates such a file keeps it mapped.
_SEGMENTS = ("vader_segment.", "sm_segment.", "osc_rdma.", "ucx_shm_posix_", "nccl-")
_YOUNG_S = 60.0  # age below which a segment's creator may be about to map it
_STALE_S = 3600.0  # age of a lock whose holder cannot be looked up from here
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # from which every process of the machine is visible
_FIRST_ENTRIES = {"lock", "timings", "energy", "checkpoints"}  # with a config.toml it may belong to a study


def remove_stale_runs(run: RunDir) -> None:
    """Removes run directories beside `run` whose job was killed before its first step: they hold no more than a lock.

    The lock's holder was a process of this machine that has ended, or the lock is older than that of a living job can
    be. Ages are by the file system's clock: `run` was just created on it.
    """
    for other in run.path.parent.iterdir():
        with suppress(OSError):
            if other != run.path and _is_stale(other, run.path.stat().st_mtime):
                _remove_empty(other)


def _is_stale(folder: Path, now_s: float) -> bool:
    names = {path.name for path in folder.iterdir()}
    if "lock" not in names or not names <= _FIRST_ENTRIES:
        return False
    return lock.is_held_by_dead_process(folder / "lock") or now_s - (folder / "lock").stat().st_mtime > _STALE_S


def remove_unbegun(run: RunDir) -> None:
    """Removes the directory of a run that ended before its start was recorded, as by a user's mistake: it is empty."""
    if not run.meta.exists():
        with suppress(OSError):
            _remove_empty(run.path)


def _remove_empty(folder: Path) -> None:
    """Removes the lock last: a folder that is not empty after all raises OSError, and keeps its lock."""
    for name in ("timings", "energy", "checkpoints"):
        with suppress(FileNotFoundError):
            (folder / name).rmdir()
    (folder / "lock").unlink(missing_ok=True)
    folder.rmdir()


def remove_stale_segments(folder: Path = Path("/dev/shm"), young_s: float = _YOUNG_S) -> list[str]:
    """Removes this user's shared-memory segments of MPI that no process has mapped or open; returns their names.

    Removes nothing if this process cannot see every process of the machine, as in a container.
    """
    try:
        if os.readlink("/proc/self/ns/pid") != _INITIAL_PID_NAMESPACE:
            return []
    except OSError:  # no /proc: there is no telling which are in use
        return []
    segments = _old_segments(folder, young_s)
    used = _files_in_use() if segments else set()
    removed = []
    for path in (path for file_id, path in segments.items() if file_id not in used):
        with suppress(OSError):  # another start was faster
            path.unlink()
            removed.append(path.name)
    return sorted(removed)


def _old_segments(folder: Path, young_s: float) -> dict[FileId, Path]:
    segments = {}
    with suppress(OSError):
        for path in folder.iterdir():
            status = path.lstat()
            is_old = time() - status.st_ctime > young_s
            is_own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            if path.name.startswith(_SEGMENTS) and is_own and is_old:
                segments[(status.st_dev, status.st_ino)] = path
    return segments


def _files_in_use() -> set[FileId]:
    """Every file that a process of this user has mapped or open."""
    used: set[FileId] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended; or it may not be inspected, such as sshd, and is no rank then
            used |= _mapped_files(process)
            used |= _open_files(process)
    return used


def _mapped_files(process: Path) -> set[FileId]:
    used = set()
    for line in (process / "maps").read_bytes().splitlines():
        device, inode = line.split(maxsplit=5)[3:5]
        major, _, minor = device.partition(b":")
        used.add((os.makedev(int(major, 16), int(minor, 16)), int(inode)))
    return used


def _open_files(process: Path) -> set[FileId]:
    used = set()
    for handle in (process / "fd").iterdir():
        with suppress(OSError):
            status = handle.stat()
            used.add((status.st_dev, status.st_ino))
    return used
