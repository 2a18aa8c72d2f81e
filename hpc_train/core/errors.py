"""The error type for mistakes that a user can fix, and the one that other ranks raise for a fault of one rank."""

import errno
import os
import re
from importlib.util import find_spec
from pathlib import Path

from hpc_train.core.formatting import amount
from hpc_train.core.redaction import printable


class UserError(Exception):
    """A mistake that the user can fix: what is wrong (the key or file with its value) and the remedy.

    Only `cli/main.py` turns it into a message and exit code 2. joint: every rank raises it, so that no rank needs to be
    aborted and one message is enough.
    """

    joint = False

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what = printable(what)  # names of keys and files may contain control characters
        self.remedy = printable(remedy)

    def __str__(self) -> str:
        return f"{self.what}\n  {self.remedy}"


def refused(error: OSError) -> UserError | None:
    """The error of a path that the system refuses; None if the error names no path."""
    if error.filename is None:
        return None
    remedy = "`ls -ld` and `df` show the cause."
    return UserError(f"{os.fsdecode(error.filename)}: {error.strerror}", remedy)


def out_of_memory(error: BaseException) -> UserError | None:
    """The error of a process that the system gives no more memory; None for any other. Not of a GPU."""
    asked = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", str(error))  # torch's, on a CPU
    if not asked and not isinstance(error, MemoryError):
        return None
    size = f" for {amount(int(asked[1]), 'B')} more" if asked else ""
    return UserError(
        f"there is no memory{size}",
        "Smaller batches, train.accumulate, a higher reduce.stage or more ranks need less: hpc-train memory CONFIG.",
    )


def not_written(path: str | Path, error: OSError, num_bytes: int) -> UserError:
    """The error to raise if `num_bytes` cannot be written to `path`: disk full, read-only, over quota, no folder."""
    if error.errno == errno.ENOENT:
        return UserError(
            f"{path} could not be written: its folder does not exist", "Create the folder, or choose another."
        )
    return UserError(
        f"{path} could not be written: {error.strerror or error}; {room(Path(path).parent, error, num_bytes)}",
        "Free space, or choose another folder (run.root, --output).",
    )


def room(folder: Path, error: OSError, num_bytes: int) -> str:
    """How much was to be written and, on a full disk, how much is free (the system does not report quotas)."""
    needed = f"{amount(num_bytes, 'B')} are needed"
    if error.errno != errno.ENOSPC:
        return needed
    try:
        disk = os.statvfs(folder)
    except OSError:
        return needed
    return f"{needed}, {amount(disk.f_bavail * disk.f_frsize, 'B')} are free"


class JointFailure(Exception):
    """Every rank raises it for a fault of some rank, whose own exception has the message."""


def require(*modules: str) -> None:
    """Raises `UserError` on an install without the training half."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} cannot be found: this install can report but not train",
            "Run `make install` in a checkout: it builds hpc-train[train] against one MPI.",
        )
