"""Files and folders that data come from: every one is a regular file that may be read, or one error names it."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hpc_train.core.errors import UserError
from hpc_train.core.paths import other_kind


def require_file(path: Path, remedy: str) -> None:
    """Raises `UserError` unless `path` is a regular file that may be read.

    Reading a FIFO may wait for ever, and /dev/zero has no end.
    """
    try:
        kind = other_kind(path.stat().st_mode)
        if kind is None:
            path.open("rb").close()
            return
    except FileNotFoundError:
        raise UserError(f"--from {path} does not exist", remedy) from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    raise UserError(f"--from {path} is {kind}, and not a file", remedy)


def is_folder(path: Path) -> bool:
    """Raises `UserError` if that is unknown."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def folders_in(folder: Path) -> list[Path]:
    """The folders in `folder`, sorted, except hidden ones. Raises `UserError` if one cannot be read."""
    try:
        return sorted(each for each in folder.iterdir() if not each.name.startswith(".") and is_folder(each))
    except OSError as error:
        raise _unreadable(folder, error) from None


def files_below(folder: Path, hidden: bool = False) -> Iterator[Path]:
    """Everything below `folder` that is no folder, in the order of names. Links to folders are followed once.

    hidden: also what is in hidden folders. Raises `UserError` if a folder cannot be read: no part of the data is
    skipped silently.
    """
    seen = set()
    for here, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        try:
            found = os.stat(here)
        except OSError as error:
            raise _unreadable(Path(here), error) from None
        if (found.st_dev, found.st_ino) in seen:
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
        for name in sorted(files):
            if hidden or not name.startswith("."):
                yield Path(here, name)


def _raise(error: OSError) -> None:
    raise _unreadable(Path(os.fsdecode(error.filename)), error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    why = getattr(error, "strerror", None) or error
    return UserError(f"--from {path} cannot be read: {why}", "Make it readable (chmod, or ask its owner), or skip it.")
