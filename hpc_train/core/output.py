"""Output that can no longer be written (`| head -1`, a full disk, a closed descriptor) must not end a training run."""

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast


class ProtectedStream:
    """A text stream in place of `sys.stdout` or `sys.stderr`: after the first failed write it drops everything.

    fault: why the write failed, None before.
    """

    def __init__(self, stream: TextIO, name: str, fault: str | None = None) -> None:
        self._stream, self.name, self.fault = stream, name, fault

    def write(self, text: str) -> int:
        """Returns len(text), written or not."""
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self._lose(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: Exception) -> None:
        if isinstance(error, BlockingIOError):
            return  # a slow reader of a non-blocking pipe: the rest stays buffered until the next flush
        if self.fault is not None:
            return
        self.fault = getattr(error, "strerror", None) or str(error)
        _discard(1 if self.name == "stdout" else 2)
        if self.name == "stdout":
            print(f"hpc-train: stdout cannot be written: {self.fault}. The job continues without it.", file=sys.stderr)


class UntilUnread:
    """A text stream in place of `sys.stdout`: text is dropped once its reader has left, as `head` does.

    The command still does all of its work and keeps its own exit code. Other errors are raised.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            return self._drop(len(text))

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self._drop(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _drop(self, num_characters: int) -> int:
        _discard(1)
        return num_characters


def drop_unread() -> None:
    """From now on a reader of stdout that leaves is no error."""
    if sys.stdout is not None:
        sys.stdout = cast(TextIO, UntilUnread(sys.stdout))


def _discard(descriptor: int) -> None:
    """Opens a descriptor on /dev/null: Python writes its buffer when it ends, and C libraries write to it, too."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def protect_output() -> None:
    """From now on, output that cannot be written does not end this process.

    Closed standard descriptors are opened on /dev/null: otherwise the next file that is opened, such as a checkpoint,
    would get their numbers and receive whatever is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            assert opened == number, "the lowest free number"
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, UntilUnread):  # `ProtectedStream` takes its place, and says that output was lost
            stream = stream.stream
        fault = None if stream is not None else "it was closed"
        stream = stream or open(number, "w", closefd=False, encoding="utf-8")  # noqa: SIM115  for the process's life
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, ProtectedStream(cast(TextIO, stream), name, fault))


def lost_streams() -> dict[str, str]:
    """Which of this process's streams were lost, and why: {"stdout": "Broken pipe"}."""
    streams = (sys.stdout, sys.stderr)
    return {each.name: each.fault for each in streams if isinstance(each, ProtectedStream) and each.fault is not None}
