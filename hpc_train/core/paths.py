"""Paths and small files as users name them: what cannot be read is one message, and nothing is waited for."""

import os
import stat
from pathlib import Path

from hpc_train.core.errors import UserError

_MOST_BYTES = 1 << 20  # of a file that people write by hand
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def other_kind(mode: int) -> str | None:
    """What has the st_mode `mode`, in words; None for a regular file."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


def expanded(path: str | Path) -> Path:
    """`path` with ~ and ~user filled in. Raises `UserError` for a user that is not known here."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no such user here, or no home", "Write the whole path.") from None


def exists(path: Path) -> bool:
    """Whether something has that name; not where it is too long, or in a folder that may not be looked into."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def read_text(path: Path, remedy: str, most_bytes: int = _MOST_BYTES) -> str:
    """The text of a file in UTF-8. Raises `UserError`."""
    content = read_small(path, remedy, most_bytes)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error.reason}, at byte {error.start:,}", remedy) from None


def read_small(path: Path, remedy: str, most_bytes: int = _MOST_BYTES) -> bytes:
    """The content of a file of at most so many bytes. Raises `UserError`, also for what would be read for ever."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if other_kind(status.st_mode) is None and status.st_size <= most_bytes:
                return file.read(most_bytes)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", remedy) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", remedy) from None
    except ValueError as error:  # a name with a NUL
        raise UserError(f"{str(path)!r} cannot be read: {error}", remedy) from None
    if other_kind(status.st_mode) is None:
        raise UserError(f"{path} is too long: {status.st_size:,} bytes, and {most_bytes:,} at most are read", remedy)
    raise UserError(f"{path} is {other_kind(status.st_mode)}, and no file", remedy)


def _open_at_once(path: str, flags: int) -> int:
    """Opens without waiting: `open` of a pipe waits until somebody writes to it."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
