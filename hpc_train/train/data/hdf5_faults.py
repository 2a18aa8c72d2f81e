"""What can be wrong with an HDF5 file, as messages for its user.

It needs neither torch nor MPI, so that a child process can look at a file while this one still imports them.
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

# What h5py raises for a damaged file, depending on the damaged byte; MemoryError if it claims to be huge.
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError, SystemError)

_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
_RAISE_LIMIT = "A process may not open as many files here: raise the limit (ulimit -n), or write fewer, larger files."
_MIN_BYTES_PER_CHUNK = 8  # in a file: its entry in the index alone takes more
_MAX_SCALE = 1e18  # of scale_factor and add_offset: the square of a value is still a float32


def data_paths(config: Config, key: str = "file") -> list[Path]:
    """The files of data.`key`, those of a pattern sorted by name. Raises `UserError` if there are none."""
    file = getattr(config.data, key)
    if file is None and config.data.dataset is not None:
        raise UserError(
            f"data.dataset = '{config.data.dataset}' is no HDF5 file, which this reads",
            "Name a file; training checks a Dataset itself.",
        )
    if file is None:
        raise UserError(f"data.{key} is required and not set", f"task.kind = '{config.task.kind}' reads an HDF5 file.")
    path = expanded(file)
    if not has_magic(str(path)) or exists(path):
        return [path]
    found = sorted(Path(name) for name in glob(str(path)))
    if not found:
        raise UserError(f"data.{key} = '{file}' matches no file", "* matches any part of a name: data/part-*.h5")
    return found


def not_a_file(path: Path) -> str:
    """What `path` is instead of a file that can be read at any offset; "" if it is one. Opens nothing."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return f"is a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "does not exist"
        return f"cannot be accessed: {error.strerror}"
    except ValueError as error:  # a null byte in its name
        return f"is not a path: {error}"
    kind = other_kind(mode)
    return f"is {kind}, and not a file" if kind else ""


@contextmanager
def damage_as_user_error(path: str | Path, name: str = "") -> Iterator[None]:
    """Turns what h5py raises for a damaged file into a `UserError` that names `path` and data set `name`."""
    try:
        yield
    except HDF5_ERRORS as error:
        what = f"{path}: {name} cannot be read" if name else f"{path} cannot be read"
        is_limit = isinstance(error, OSError) and error.errno in _TOO_MANY_FILES
        remedy = f"Restore the file, or prepare it again; hpc-train data check {path} says more."
        raise UserError(f"{what}: {error_text(error)}", _RAISE_LIMIT if is_limit else remedy) from None


def error_text(error: BaseException) -> str:
    """The message of an exception of h5py, in one line; str() of a KeyError would add quotes."""
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(message).split()) or type(error).__name__


def explain_open_failure(error: Exception) -> tuple[str, str]:
    """(what is wrong with a file that HDF5 does not open, remedy)."""
    reason = error_text(error)
    if "truncated" in reason:
        return "is truncated: its end is missing", "Copy or prepare it again."
    if "signature" in reason:
        return "is not an HDF5 file", "Name an HDF5 file; hpc-train prepare --help shows how to make one."
    if "lock file" in reason and "errno = 11," in reason:
        return (
            "cannot be locked: another program has it open for writing",
            "Wait until that has ended; if no program writes it, set HDF5_USE_FILE_LOCKING=FALSE.",
        )
    if "lock file" in reason:  # "lock" alone is in "superblock", too
        return (
            f"cannot be locked: {reason}",
            "If the file system has no locks, set HDF5_USE_FILE_LOCKING=FALSE, and do not write the file meanwhile.",
        )
    if isinstance(error, OSError) and error.errno in _TOO_MANY_FILES:
        return f"cannot be opened: {os.strerror(error.errno or 0)}", _RAISE_LIMIT
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
        return f"cannot be opened: {reason}", "Check its permissions."
    return f"cannot be opened: {reason}", "Restore the file, or prepare it again: its first bytes are damaged."


def impossible_size(dataset: h5py.Dataset, num_file_bytes: int) -> str:
    """Why a data set cannot have the size that it claims, in a file of `num_file_bytes`; "" if it can."""
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
        num_rows = max(ends, default=0)
        return "" if num_rows >= shape[0] else f"{claims}, and its sources have {num_rows:,} rows"
    if dataset.chunks is None:
        is_written = dataset.id.get_offset() is not None
        fits = num_bytes <= num_file_bytes or not is_written
        return "" if fits else f"{claims}, and its file has {num_file_bytes:,} bytes"
    num_chunks = prod(-(-size // chunk) for size, chunk in zip(shape, dataset.chunks, strict=True))
    fits = num_chunks * _MIN_BYTES_PER_CHUNK <= num_file_bytes
    return "" if fits else f"{claims} in {num_chunks:,} chunks, and its file has {num_file_bytes:,} bytes"


def scale_and_offset(dataset: h5py.Dataset) -> tuple[float, float]:
    """(scale_factor, add_offset) of the CF conventions: a stored number s means s * scale_factor + add_offset.

    Raises `UserError` if one is no number, or so large or small that values do not fit into float32.
    """
    scale, offset = _number(dataset, "scale_factor", 1.0), _number(dataset, "add_offset", 0.0)
    for name, value, least in (("scale_factor", scale, 1 / _MAX_SCALE), ("add_offset", offset, 0.0)):
        if not isfinite(value) or not least <= abs(value) <= _MAX_SCALE:
            raise UserError(
                f"{dataset.file.filename}: attribute {name} = {value:g} of {dataset.name} leaves no usable values",
                "Training is in float32: correct it (CF conventions), or remove it.",
            )
    return scale, offset


def _number(dataset: h5py.Dataset, attribute: str, default: float) -> float:
    with damage_as_user_error(dataset.file.filename, f"attribute {attribute} of {dataset.name}"):
        value: Any = np.asarray(dataset.attrs.get(attribute, default))
    if value.size != 1 or value.dtype.kind not in "iuf":
        raise UserError(
            f"{dataset.file.filename}: attribute {attribute} of {dataset.name} is no number",
            "It is one number for the whole data set (CF conventions): fix it or remove it.",
        )
    return float(value.reshape(()))


def scale_mismatch(one: np.dtype, first: tuple[float, float], other: np.dtype, second: tuple[float, float]) -> str:
    """How stored numbers of two data sets differ in what they mean; "" if they do not, or if it is unknown."""
    if (one.kind == "f") != (other.kind == "f"):
        return ""  # integers may be scaled where floats are not
    if first != second:
        return f"scale_factor, add_offset are {first} and {second}"
    if one.kind != other.kind or one.isnative != other.isnative:
        return f"stored numbers are {one.str} and {other.str}"
    return ""
