"""Batches made ahead by a thread, only if the training loop would wait for them otherwise."""

import threading
from collections import deque
from collections.abc import Iterator
from queue import SimpleQueue
from statistics import median
from time import perf_counter_ns
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")
MAX_DEPTH = 8  # batches ahead
_WINDOW_STEPS = 16  # between decisions
_MIN_WAIT_SHARE = 0.01  # of a step: a shorter wait is not worth a thread
_MIN_WORK_SHARE = 0.1  # of a step: with less other work, the loop would wait for the thread instead
_MIN_WORK_NS = 100_000  # the time in which a thread can hand over a batch
_NUM_LONGER_WINDOWS = 3  # in a row: one alone may be longer by chance
_FIRST_PAUSE = 16  # windows


class Prefetch(Generic[T]):
    """Iterates over `batches`: made by the loop itself as long as that costs it next to nothing, else by a thread.

    If the loop waits for more than 1% of its time and has other work, batches are made ahead, each time twice as many,
    up to `MAX_DEPTH`. If steps take longer with the thread than without, several decisions in a row, as on a rank with
    one core and small batches, the loop makes them itself again, and later tries the thread once more. The batches are
    the same in either case, so ranks need not decide alike.
    """

    def __init__(self, batches: Iterator[T]) -> None:
        self.depth = 0  # how many batches are made ahead
        self._batches, self._ready = batches, SimpleQueue[tuple[bool, object]]()
        self._room = threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._stop = False
        self._has_failed = False
        self._last_ns = 0
        self._waits_ns, self._steps_ns = deque[int](maxlen=_WINDOW_STEPS), deque[int](maxlen=_WINDOW_STEPS)
        self._step_without_ns = 0.0  # without the thread
        self._num_longer = 0  # windows in a row with longer steps than without the thread
        self._pause, self._next_pause = 0, _FIRST_PAUSE  # windows until the thread is tried again

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread after the batch that it is making."""
        self._stop = True
        self._room.release()
        if self._thread is not None:
            self._thread.join()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        began_ns = perf_counter_ns()
        item = self._next()
        now_ns = perf_counter_ns()
        if self._last_ns:
            self._waits_ns.append(now_ns - began_ns)
            self._steps_ns.append(now_ns - self._last_ns)
        self._last_ns = now_ns
        if len(self._steps_ns) == _WINDOW_STEPS and not self._has_failed:
            self._decide()
        return item

    def _next(self) -> T:
        if self._thread is None:
            return next(self._batches)
        is_batch, item = self._ready.get()
        if is_batch:
            self._room.release()
            return item  # type: ignore[return-value]
        self._thread.join()
        self._thread = None
        if isinstance(item, BaseException):
            self._has_failed = True
            raise item
        return next(self._batches)  # the thread has ended: `_pause_thread`

    def _decide(self) -> None:
        step_ns, wait_ns = median(self._steps_ns), median(self._waits_ns)
        self._waits_ns.clear()
        self._steps_ns.clear()
        waits = wait_ns > _MIN_WAIT_SHARE * step_ns
        if self.depth == 0:
            self._step_without_ns = step_ns
            self._pause = max(0, self._pause - 1)
            has_work = step_ns - wait_ns > max(_MIN_WORK_SHARE * step_ns, _MIN_WORK_NS)
            if waits and has_work and not self._pause and self._thread is None:
                self._deepen(1)
            return
        self._num_longer = self._num_longer + 1 if step_ns > self._step_without_ns else 0
        if self._num_longer == _NUM_LONGER_WINDOWS:
            self._pause_thread()
        elif not self._num_longer and waits and self.depth < MAX_DEPTH:
            self._deepen(2 * self.depth)

    def _deepen(self, depth: int) -> None:
        if self._thread is None:
            self._stop, self._room, self._num_longer = False, threading.Semaphore(0), 0
            self._thread = threading.Thread(target=self._make, name="hpc-train-prefetch", daemon=True)
            self._thread.start()
        for _ in range(depth - self.depth):
            self._room.release()
        self.depth = depth

    def _pause_thread(self) -> None:
        """No thread for some windows, each time twice as many: other work may have made steps longer."""
        self._stop, self.depth = True, 0
        self._room.release()
        self._pause, self._next_pause = self._next_pause, 2 * self._next_pause

    def _make(self) -> None:
        try:
            while self._room.acquire() and not self._stop:
                self._ready.put((True, next(self._batches)))
            self._ready.put((False, None))
        except BaseException as error:  # noqa: BLE001  the loop raises it, StopIteration too, when it gets to that batch
            self._ready.put((False, error))
