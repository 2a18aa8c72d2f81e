"""Copies a file from a storage to an open local file: ranges in parallel, each tried again when it fails.

fsspec's `get_file` is not enough. It reads one stream (WebHDFS: 160 MB/s, four ranges 300 MB/s), starts again at byte 0
when a connection breaks, cannot be ended while a server hangs, and opens the target by name, where another user may
have put a link. It shows no bytes on their way either, with which the copy on disk could be compared.
"""

import os
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from queue import Empty, SimpleQueue
from random import uniform
from time import monotonic, perf_counter_ns
from typing import IO

from hpc_train.core.errors import UserError
from hpc_train.core.progress import StepProgress
from hpc_train.datasets import storage
from hpc_train.datasets.storage import Source

RANGE_BYTES = 8 << 20
_NUM_STREAMS = 4  # more are no faster
# Before a failed range is tried again: doubled each time up to the maximum, and drawn from the upper half of that, so
# that a thousand nodes that failed together do not return together.
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.5, 15.0
_SECONDS_PER_MESSAGE = 10.0


@dataclass(frozen=True)
class _Failed:
    """A range that is tried again after `pause_s`."""

    error: Exception
    pause_s: float


class RangeCopy:
    """Copies `source` to an open file.

    Threads take ranges (start, end) from a queue. They report to another: (offset, CRC-32) of a range that is copied, a
    failure that is tried again, or an error that ends the copy.
    """

    def __init__(self, source: Source, descriptor: int) -> None:
        self._source, self._descriptor = source, descriptor
        self._ranges: SimpleQueue[tuple[int, int]] = SimpleQueue()
        self._events: SimpleQueue[tuple[int, int] | _Failed | UserError | OSError] = SimpleQueue()
        self._stop = threading.Event()

    def run(self, wait_s: float, progress: StepProgress) -> dict[int, int]:
        """CRC-32 of each range by offset, of the bytes as they came.

        Raises `UserError` if no range is completed for `wait_s` seconds, and `OSError` if the disk refuses a write.
        """
        num_bytes = self._source.num_bytes
        offsets = range(0, num_bytes, RANGE_BYTES)
        if self._source.has_ranges:
            for start in offsets:
                self._ranges.put((start, min(start + RANGE_BYTES, num_bytes)))
        elif num_bytes:
            self._ranges.put((0, num_bytes))
        for _ in range(_NUM_STREAMS):
            # Its own descriptor: a thread that returns after the end must not write to the next file of that number.
            descriptor = os.dup(self._descriptor)
            # Daemon: a read that never returns must not keep the process from ending.
            threading.Thread(target=self._copy_ranges, args=(descriptor,), daemon=True).start()
        try:
            return self._collect(len(offsets), wait_s, progress)
        finally:
            self._stop.set()

    def _collect(self, num_ranges: int, wait_s: float, progress: StepProgress) -> dict[int, int]:
        checksums: dict[int, int] = {}
        last_copied_s, last_message_s, trouble, copied_mb = monotonic(), 0.0, "", 0
        while len(checksums) < num_ranges:
            try:
                event = self._events.get(timeout=max(0.0, last_copied_s + wait_s - monotonic()))
            except Empty:
                raise UserError(
                    f"{self._source.url}: no byte came for {wait_s:g} s{trouble}",
                    "Stage it again when the storage works, or wait longer: --wait SECONDS",
                ) from None
            if isinstance(event, UserError | OSError):
                raise event
            if isinstance(event, _Failed):
                trouble = f" ({storage.error_text(event.error)})"
                if monotonic() - last_message_s > _SECONDS_PER_MESSAGE:
                    last_message_s = monotonic()
                    progress.log(f"  trying again in {event.pause_s:.1f} s{trouble}")
                continue
            offset, crc32 = event
            if offset not in checksums:  # without ranges a retry begins at the start
                last_copied_s, trouble = monotonic(), ""
                checksums[offset] = crc32
                before_mb, copied_mb = copied_mb, len(checksums) * RANGE_BYTES // 1_000_000
                progress.advance(copied_mb, copied_mb - before_mb, perf_counter_ns())
        return checksums

    def _copy_ranges(self, descriptor: int) -> None:
        """In a thread: copies ranges until there are none."""
        with os.fdopen(descriptor, "r+b", buffering=0):
            while not self._stop.is_set():
                try:
                    start, end = self._ranges.get_nowait()
                except Empty:
                    return
                self._copy_with_retries(descriptor, start, end)

    def _copy_with_retries(self, descriptor: int, start: int, end: int) -> None:
        for attempt in count():
            if self._stop.is_set():
                return
            try:
                self._copy(descriptor, start, end)
                return
            except Exception as error:  # noqa: BLE001  each client has its own errors
                if storage.is_missing(error) or isinstance(error, PermissionError):  # waiting does not help
                    what = f"{self._source.url}: {storage.error_text(error)}"
                    remedy = "It was changed during the copy: check it, and stage it again."
                    self._events.put(UserError(what, remedy))
                    return
                pause_s = min(_FIRST_PAUSE_S * 2.0 ** min(attempt, 10), _MAX_PAUSE_S) * uniform(0.5, 1)
                self._events.put(_Failed(error, pause_s))
                self._stop.wait(pause_s)

    def _copy(self, descriptor: int, start: int, end: int) -> None:
        for offset, data in self._read(start, end):
            if self._stop.is_set():
                return
            try:
                _pwrite_all(descriptor, data, offset)
            except OSError as error:  # the local disk's: no reason to read the source again
                self._events.put(error)
                return
            self._events.put((offset, zlib.crc32(data)))

    def _read(self, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        if self._source.has_ranges:
            yield start, self._source.read_range(start, end)
            return
        with self._source.open_stream() as stream:
            for offset in range(start, end, RANGE_BYTES):
                yield offset, _read_exactly(stream, min(RANGE_BYTES, end - offset))


def _read_exactly(stream: IO[bytes], num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        more = stream.read(num_bytes - len(data))
        if not more:
            raise EOFError(f"{num_bytes - len(data)} bytes are missing")
        data += more
    return data


def _pwrite_all(descriptor: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written
