"""Writing to a disk that may be full: one message, and no crash of HDF5."""

import errno
import io
import os
from pathlib import Path
from typing import IO, Any

from hpc_train.core import owned_files
from hpc_train.core.errors import UserError


class DiskFile(io.FileIO):
    """A file object for h5py. It keeps the first error of a write in `error`, and writes nothing after it.

    HDF5 (1.10.8, seen) cannot continue after a write that failed while it flushed or closed: it ends by signal 11, at
    the latest when Python ends. So HDF5 never sees the error, and whoever opened the file calls `require_written`.
    """

    def __init__(self, path: Path) -> None:
        with owned_files.opened(path, "r+b", buffering=0) as file:
            super().__init__(os.dup(file.fileno()), "r+b")
        self.error: OSError | None = None

    def require_written(self) -> None:
        """Raises the `OSError` of the write that failed."""
        if self.error is not None:
            raise self.error

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        try:
            while len(left) and self.error is None:  # a write to an unbuffered file may take a part
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return memoryview(data).nbytes

    def truncate(self, size: int | None = None) -> int:
        try:
            if self.error is None:
                return super().truncate(size)
        except OSError as error:
            self.error = error
        return size or 0


def cannot_write(path: Path, error_number: int | None) -> UserError:
    return UserError(
        f"{path} cannot be written: {os.strerror(error_number or errno.EIO)}",
        "Name a file on a file system with room that you may write.",
    )


def write_all(file: IO[bytes], data: Any) -> None:
    """Writes to an unbuffered file, which may take a part at a time. Raises `OSError`."""
    left = memoryview(data).cast("B")
    while len(left):
        left = left[file.write(left) :]
