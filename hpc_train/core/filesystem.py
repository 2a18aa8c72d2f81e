"""The file system of a file, and how much of the file is in the page cache."""

import ctypes
import mmap
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np

_LFS_TIMEOUT_S = 10
_MAX_MAPPED_BYTES = 1 << 30


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`, as /proc/mounts names it."""
    place, found = str(path.resolve()), ("", "unknown file system")
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return found[1]
    for line in mounts:
        _, folder, kind = line.split()[:3]
        inside = place == folder or place.startswith(folder.rstrip("/") + "/")
        if inside and len(folder) >= len(found[0]):
            found = folder, kind
    return found[1]


def stripe_count(path: Path) -> int | None:
    """The Lustre stripe count of `path`; None if unknown."""
    lfs = shutil.which("lfs")
    if lfs is None:
        return None
    try:
        answer = subprocess.run(
            [lfs, "getstripe", "-c", str(path)], capture_output=True, text=True, timeout=_LFS_TIMEOUT_S, check=True
        )
        return int(answer.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def drop_pages(path: Path) -> None:
    """Asks the kernel to drop the file's pages from the page cache. It need not: tmpfs cannot."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)  # dirty pages cannot be dropped
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        pass  # `resident` shows the result
    finally:
        os.close(file)


def resident(path: Path, offset: int = 0, num_bytes: int | None = None) -> float | None:
    """The fraction (0 to 1) of the file, or of the first GiB from `offset`, in the page cache; None if unknown."""
    size, start = path.stat().st_size, offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    length = min(size - start, _MAX_MAPPED_BYTES, offset - start + (size if num_bytes is None else num_bytes))
    if length <= 0:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), length, prot=mmap.PROT_READ, offset=start) as mapped:
        pages = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
        view = np.frombuffer(mapped, np.uint8)
        refused = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(length), ctypes.c_void_p(pages.ctypes.data)
        )
        del view  # a map cannot be closed while an array refers to it
    return None if refused else float((pages & 1).mean())
