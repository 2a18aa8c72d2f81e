"""Files with fixed names in folders where others may write: only files of this user, never a link.

In a folder with the sticky bit, such as /tmp, nobody else can replace a file once it has been checked.
"""

import os
import pwd
import stat
import tempfile
from pathlib import Path
from typing import IO

from hpc_train.core.errors import UserError


def opened(path: Path, mode: str, buffering: int = -1) -> IO[bytes]:
    """`path` opened as "rb", or as "r+b" or "ab", which create it.

    Raises `UserError` as `require` does, also for a file created at the same moment; `OSError` as `open` does.
    """
    require(path)
    file = open(path, mode, buffering, opener=_open)  # noqa: SIM115  the caller closes it
    if fault := _fault(os.fstat(file.fileno()), path):
        file.close()
        raise _refused(path, fault)
    return file


def created(path: Path, permissions: int = 0o666, buffering: int = -1) -> IO[bytes]:
    """A new, empty file at `path`, which replaces a file of this user. Raises `UserError` as `require` does."""
    require(path)
    path.unlink(missing_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, permissions), "w+b", buffering)


def require(*paths: Path) -> None:
    """Raises `UserError` if one of `paths` exists and is not a regular file of this user with one name (link)."""
    for path in paths:
        try:
            fault = _fault(path.lstat(), path)
        except FileNotFoundError:
            continue
        except OSError as error:
            remedy = "Choose a shorter name, or a folder that you may read."
            raise UserError(f"{path} cannot be created: {error.strerror}", remedy) from None
        if fault:
            raise _refused(path, fault)


def others_may_write(file: IO[bytes]) -> bool:
    return bool(os.fstat(file.fileno()).st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def owner(found: os.stat_result) -> str:
    """The name of a file's owner, or the user id without a name."""
    try:
        return pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        return str(found.st_uid)


def _open(path: str, flags: int) -> int:
    """As `open`, but never through a link, and never waiting for a FIFO."""
    flags = flags & ~os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    while flags & (os.O_RDWR | os.O_WRONLY):
        try:
            # Writable by this user only.
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            try:
                return os.open(path, flags)
            except FileNotFoundError:  # removed in between
                continue
    return os.open(path, flags)


def _fault(found: os.stat_result, path: Path) -> str | None:
    if stat.S_ISLNK(found.st_mode):
        return "is a link"
    if not stat.S_ISREG(found.st_mode):
        return "is not a regular file"
    # On NFS with all_squash, all files belong to one user.
    if found.st_uid != os.geteuid() and found.st_uid != _owner_of_new_files(path.parent):
        return f"belongs to {owner(found)}"
    if found.st_nlink > 1:
        return "has another name, too (a hard link)"
    return None


def _owner_of_new_files(folder: Path) -> int:
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_uid


def _refused(path: Path, fault: str) -> UserError:
    return UserError(f"{path} {fault} and is not used", "Remove it, or choose a folder of your own.")
