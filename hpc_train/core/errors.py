"""The one error type for mistakes a user can mend, and what other ranks raise for a fault of one of them."""

import errno
import os
from importlib.util import find_spec
from pathlib import Path

from hpc_train.core.redaction import printable


class UserError(Exception):
    """A mistake the user can mend: what is wrong (the key or file, its value) and the remedy.

    Only `cli/main.py` turns it into a message and exit code 2. `joint` says that every rank raises it, so that none
    need be aborted and one rank's message is enough.
    """

    joint = False

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what = printable(what)  # it names keys, cells and files, which may hold what steers a terminal
        self.remedy = printable(remedy)

    def __str__(self) -> str:
        return f"{self.what}\n  {self.remedy}"


def refused(error: OSError) -> UserError | None:
    """What the system says of a path that it does not let us use; None where the error names none."""
    if error.filename is None:
        return None
    remedy = "`ls -ld` and `df` show what stands in the way."
    return UserError(f"{os.fsdecode(error.filename)}: {error.strerror}", remedy)


def not_written(path: str | Path, error: OSError, num_bytes: int) -> UserError:
    """What to raise when the system refuses to write `num_bytes` to `path`: disk full, read-only, over quota."""
    return UserError(
        f"{path} could not be written: {error.strerror or error}; {room(Path(path).parent, error, num_bytes)}",
        "Make room, or choose another place (run.root, --output).",
    )


def room(folder: Path, error: OSError, num_bytes: int) -> str:
    """How much was to be written and, on a full disk, how much is free there; of a quota the system does not tell."""
    needed = f"{_size(num_bytes)} are needed"
    if error.errno != errno.ENOSPC:
        return needed
    try:
        disk = os.statvfs(folder)
    except OSError:
        return needed
    return f"{needed}, {_size(disk.f_bavail * disk.f_frsize)} are free"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 100_000 else f"{num_bytes:,} bytes"


class JointFailure(Exception):
    """Every rank raises it for a fault that some rank met; that rank's own exception carries the words."""


def require(*modules: str) -> None:
    """Raises UserError on a plain install, which has the analysis half only."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} cannot be found: this install reports, and does not train",
            "Run `make install` in a checkout: it builds hpc-train[train] against one MPI.",
        )
