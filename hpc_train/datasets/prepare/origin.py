"""Files and folders that data come from: regular files that may be read, or one error that names what is not."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hpc_train.core.errors import UserError
from hpc_train.core.paths import other_kind

_MAY_READ = "Make it readable (chmod, or ask its owner), or leave it out."


def require_file(path: Path, remedy: str) -> None:
    """Raises `UserError` unless `path` is a regular file that may be read.

    Nobody may ever write into a FIFO, and /dev/zero has no end.
    """
    try:
        found = path.stat()
        kind = other_kind(found.st_mode)
        if kind is None:
            path.open("rb").close()
            return
    except FileNotFoundError:
        raise UserError(f"--from {path} does not exist", remedy) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    raise UserError(f"--from {path} is {kind}, and no file", remedy)


def is_folder(path: Path) -> bool:
    """Raises `UserError` where that cannot be known."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def folders_in(folder: Path) -> list[Path]:
    """The folders in `folder`, sorted, but for hidden ones. Raises `UserError` where one cannot be read."""
    try:
        return sorted(each for each in folder.iterdir() if not each.name.startswith(".") and is_folder(each))
    except OSError as error:
        raise unreadable(folder, error) from None


def files_below(folder: Path, hidden: bool = False) -> Iterator[Path]:
    """All that is below `folder` and is no folder, in the order of names. Links to folders are followed, once each.

    hidden: also what is in folders whose names begin with a dot. Raises `UserError` where a folder cannot be read:
    a part of the data must not be missing in silence.
    """
    seen = set()
    for here, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        try:
            found = os.stat(here)
        except OSError as error:
            raise unreadable(Path(here), error) from None
        if (found.st_dev, found.st_ino) in seen:
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
        for name in sorted(files):
            if hidden or not name.startswith("."):
                yield Path(here, name)


def _raise(error: OSError) -> None:
    raise unreadable(Path(os.fsdecode(error.filename)), error) from None


def unreadable(path: Path, error: Exception) -> UserError:
    why = getattr(error, "strerror", None) or error
    return UserError(f"--from {path} cannot be read: {why}", _MAY_READ)
