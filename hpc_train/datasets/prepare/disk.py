"""Writing to a disk that may be full: one message, and no crash of HDF5."""

import errno
import io
import os
from pathlib import Path
from typing import IO, Any

from hpc_train.core import owned_files
from hpc_train.core.errors import UserError


class DiskFile:
    """A file object for h5py. It keeps the first error of a write in `error`, and writes nothing after it.

    HDF5 (1.10.8, seen) cannot continue after a write that failed while it flushed or closed: it ends by signal 11, at
    the latest when Python ends. So HDF5 never sees the error, and whoever opened the file calls `require_written`.
    """

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self._file: IO[bytes] = owned_files.opened(path, "r+b", buffering=0)

    def require_written(self) -> None:
        """Raises the `OSError` of the write that failed."""
        if self.error is not None:
            raise self.error

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, num_bytes: int = -1) -> bytes:
        return self._file.read(num_bytes)

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)  # type: ignore[attr-defined]

    def write(self, data: Any) -> int:
        try:
            if self.error is None:
                write_all(self._file, data)
        except OSError as error:
            self.error = error
        return memoryview(data).nbytes

    def truncate(self, size: int) -> int:
        try:
            if self.error is None:
                self._file.truncate(size)
        except OSError as error:
            self.error = error
        return size

    def flush(self) -> None:
        """The file is not buffered."""

    def close(self) -> None:
        self._file.close()


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
