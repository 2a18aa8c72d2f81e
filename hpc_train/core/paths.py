"""Paths and small files that users name. Errors are one message, and no open waits (a FIFO, say)."""

import os
import stat
from pathlib import Path

from hpc_train.core.errors import UserError

_MAX_BYTES = 1 << 20  # of a file that people write by hand
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def other_kind(mode: int) -> str | None:
    """The kind of file with the st_mode `mode`; None for a regular file."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "not a regular file")


def expanded(path: str | Path) -> Path:
    """`path` with ~ and ~user filled in. Raises `UserError` for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no such user here, or no home", "Write an absolute path.") from None


def exists(path: Path) -> bool:
    """Whether the path exists; False also for a name that is too long and in a folder without permission."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def same_file(path: Path, other: Path) -> bool:
    """Whether both name one file that is there, also through links."""
    try:
        return path.samefile(other)
    except (OSError, ValueError):
        return False


def read_text(path: Path, remedy: str, max_bytes: int = _MAX_BYTES) -> str:
    """The text of a file in UTF-8. Raises `UserError`."""
    content = read_small(path, remedy, max_bytes)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error.reason}, at byte {error.start:,}", remedy) from None


def read_small(path: Path, remedy: str, max_bytes: int = _MAX_BYTES) -> bytes:
    """The content of a regular file of at most `max_bytes`. Raises `UserError`."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if other_kind(status.st_mode) is None and status.st_size <= max_bytes:
                return file.read(status.st_size)  # with max_bytes, Python would ask for so much memory first
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", remedy) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", remedy) from None
    except ValueError as error:  # a name with a NUL
        raise UserError(f"{str(path)!r} cannot be read: {error}", remedy) from None
    if other_kind(status.st_mode) is None:
        raise UserError(f"{path} is too large: {status.st_size:,} bytes; the limit is {max_bytes:,}", remedy)
    raise UserError(f"{path} is {other_kind(status.st_mode)}, not a file", remedy)


def _open_without_waiting(path: str, flags: int) -> int:
    """Opens without waiting: opening a FIFO would wait until somebody writes to it."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
