"""Writing to a disk that may be full: one message, and no crash of HDF5."""

import errno
import io
import os
from pathlib import Path
from typing import IO, Any

from hpc_train.core import owned_files
from hpc_train.core.errors import UserError


class Disk:
    """What h5py takes for a file. The first write that fails is kept in `error`, and none is made after it.

    HDF5 (1.10.8, seen) cannot go on after a write that failed while it flushed or closed: it ends by signal 11, at the
    latest when Python ends. So it never hears of one, and whoever gave it this file asks `require`.
    """

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self._file: IO[bytes] = owned_files.opened(path, "r+b", buffering=0)

    def require(self) -> None:
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
        """Nothing waits here."""

    def close(self) -> None:
        self._file.close()


def no_room(path: Path, number: int | None) -> UserError:
    return UserError(
        f"{path} cannot be written: {os.strerror(number or errno.EIO)}",
        "Name a file on a file system with room that you may write.",
    )


def write_all(file: IO[bytes], data: Any) -> None:
    """Writes to an unbuffered file, which may take a part at a time. Raises `OSError`."""
    left = memoryview(data).cast("B")
    while len(left):
        left = left[file.write(left) :]
