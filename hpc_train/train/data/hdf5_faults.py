"""HDF5 files as others leave them: opened with care, and what is the matter with one told in words.

Neither torch nor MPI is needed for it, so that a child process can look at a file while this one loads them.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob, has_magic
from math import isfinite, prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.paths import exists, expanded, other_kind
from hpc_train.core.settings import Config

# What h5py raises of a damaged file, depending on which byte is wrong; MemoryError where it claims to be huge.
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError, SystemError)

_TOO_MANY = (errno.EMFILE, errno.ENFILE)
_FEWER = "A process may not have as many files open here: raise the limit (ulimit -n), or write fewer, larger files."
_FEWEST_BYTES_A_CHUNK = 8  # in a file: its place in the index alone takes more
_MOST_MEANING = 1e18  # of scale_factor and add_offset: the square of what they make is still a float32


def data_paths(config: Config) -> list[Path]:
    """The files of the job's data, those of a pattern in the order of their names. Raises `UserError` for none."""
    file = config.data.file
    if file is None:
        raise UserError("data.file is required and not set", f"task.kind = '{config.task.kind}' reads an HDF5 file.")
    path = expanded(file)
    if not has_magic(str(path)) or exists(path):
        return [path]
    found = sorted(Path(name) for name in glob(str(path)))
    if not found:
        raise UserError(f"data.file = '{file}' matches no file", "* stands for any part of a name: data/part-*.h5")
    return found


def not_a_file(path: Path) -> str:
    """What `path` is instead of a file that can be read at any place; "" where it is one. Nothing is opened."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return f"is a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "does not exist"
        return f"cannot be looked at: {error.strerror}"
    except ValueError as error:  # a null byte in its name
        return f"is no path: {error}"
    kind = other_kind(mode)
    return f"is {kind}, and no file" if kind else ""


@contextmanager
def damage_as_user_error(path: str | Path, name: str = "") -> Iterator[None]:
    """Turns what HDF5 and h5py raise of a damaged file into a `UserError` that names `path` and data set `name`."""
    try:
        yield
    except HDF5_ERRORS as error:
        what = f"{path}: {name} cannot be read" if name else f"{path} cannot be read"
        is_limit = isinstance(error, OSError) and error.errno in _TOO_MANY
        remedy = f"Restore the file, or prepare it again; hpc-train data check {path} says more."
        raise UserError(f"{what}: {error_text(error)}", _FEWER if is_limit else remedy) from None


def error_text(error: BaseException) -> str:
    """The words of an exception of h5py, in one line; a KeyError's are in quotes."""
    words = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(words).split()) or type(error).__name__


def explain_open_failure(error: Exception) -> tuple[str, str]:
    """(what is the matter with a file that HDF5 refuses, remedy)."""
    reason = error_text(error)
    if "truncated" in reason:
        return "is truncated: its end is missing", "Copy or prepare it again."
    if "signature" in reason:
        return "is not an HDF5 file", "Name an HDF5 file; hpc-train prepare --help shows how to make one."
    if "lock file" in reason and "errno = 11," in reason:
        return (
            "cannot be locked: another program has it open for writing",
            "Wait until that has ended; where none writes it, set HDF5_USE_FILE_LOCKING=FALSE.",
        )
    if "lock file" in reason:  # "lock" alone is in "superblock", too
        return (
            f"cannot be locked: {reason}",
            "Where the file system refuses locks, set HDF5_USE_FILE_LOCKING=FALSE, and let nobody write the file.",
        )
    if isinstance(error, OSError) and error.errno in _TOO_MANY:
        return f"cannot be opened: {os.strerror(error.errno or 0)}", _FEWER
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
        return f"cannot be opened: {reason}", "Look at its permissions."
    return f"cannot be opened: {reason}", "Restore the file, or prepare it again: its first bytes are damaged."


def impossible_size(dataset: h5py.Dataset, num_file_bytes: int) -> str:
    """Why a data set cannot be as large as it says, of a file of so many bytes; "" where it can."""
    shape = dataset.shape
    if shape is None:
        return "has no values: its data space is null"
    num_bytes = prod(shape) * dataset.dtype.itemsize
    claims = f"claims to be {' x '.join(f'{size:,}' for size in shape)} {dataset.dtype}"
    if num_bytes >= 1 << 62:
        return f"{claims}, more than any file holds"
    if not num_bytes or dataset.external:
        return ""
    if dataset.is_virtual:
        ends = [source.vspace.get_select_bounds()[1][0] + 1 for source in dataset.virtual_sources()]
        return "" if ends and max(ends) >= shape[0] else f"{claims}, and its sources have {max(ends, default=0):,} rows"
    if dataset.chunks is None:
        is_there = dataset.id.get_offset() is not None
        return f"{claims}, and its file has {num_file_bytes:,} bytes" if is_there and num_bytes > num_file_bytes else ""
    num_chunks = prod(-(-size // chunk) for size, chunk in zip(shape, dataset.chunks, strict=True))
    if num_chunks * _FEWEST_BYTES_A_CHUNK > num_file_bytes:
        return f"{claims} in {num_chunks:,} chunks, and its file has {num_file_bytes:,} bytes"
    return ""


def scale_and_offset(dataset: h5py.Dataset) -> tuple[float, float]:
    """(scale_factor, add_offset) of the CF conventions: what a stored number means. Raises `UserError`.

    One that is no number, or so large or small that nothing in float32 is left, is refused.
    """
    scale, offset = _number(dataset, "scale_factor", 1.0), _number(dataset, "add_offset", 0.0)
    for name, value, least in (("scale_factor", scale, 1 / _MOST_MEANING), ("add_offset", offset, 0.0)):
        if not isfinite(value) or not least <= abs(value) <= _MOST_MEANING:
            raise UserError(
                f"{dataset.file.filename}: attribute {name} = {value:g} of {dataset.name} leaves no usable values",
                "Training is in float32: set it right (CF conventions), or remove it.",
            )
    return scale, offset


def _number(dataset: h5py.Dataset, attribute: str, default: float) -> float:
    with damage_as_user_error(dataset.file.filename, f"attribute {attribute} of {dataset.name}"):
        value: Any = np.asarray(dataset.attrs.get(attribute, default))
    if value.size != 1 or value.dtype.kind not in "iuf":
        raise UserError(
            f"{dataset.file.filename}: attribute {attribute} of {dataset.name} is no number",
            "It is one number for the whole data set (CF conventions): mend it or remove it.",
        )
    return float(value.reshape(()))


def scale_mismatch(one: np.dtype, first: tuple[float, float], other: np.dtype, second: tuple[float, float]) -> str:
    """How stored numbers of two parts of a data set differ in what they mean; "" where they do not, or none can say.

    Whole numbers beside floats may well be scaled in one and not in the other.
    """
    if (one.kind == "f") != (other.kind == "f"):
        return ""
    if first != second:
        return f"scale_factor, add_offset are {first} and {second}"
    if one.kind != other.kind or one.isnative != other.isnative:
        return f"stored numbers are {one.str} and {other.str}"
    return ""
