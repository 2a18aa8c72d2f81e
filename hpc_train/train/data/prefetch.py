"""Batches made ahead by a thread, as far as the loop would wait for them and no further."""

import threading
from collections import deque
from collections.abc import Iterator
from queue import SimpleQueue
from statistics import median
from time import perf_counter_ns
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")
_STEPS = 16  # between decisions
_WAIT_SHARE = 0.01  # of a step: less is as good as nothing
_WORK_SHARE = 0.1  # of a step: with less to do meanwhile, the loop would wait for the thread instead
_LEAST_WORK_NS = 100_000  # in which a thread can hand a batch over
_WINDOWS = 3  # of _STEPS: one alone may be long by chance
_FIRST_REST = 16  # windows
MAX_DEPTH = 8  # batches ahead


class Prefetch(Generic[T]):
    """`batches`, made by the loop itself as long as that takes it next to no time, else by a thread.

    Where the loop waits for more than a hundredth of its time, and has other work, batches are made ahead, each time
    twice as many, up to `MAX_DEPTH`. Where steps take longer with the thread than they took without, several decisions
    in a row, as on a rank with one core whose batches are small, the loop makes them itself again, and tries the thread
    once more later. The batches are the same, so ranks need not decide alike. Leaving the context ends the thread.
    """

    def __init__(self, batches: Iterator[T]) -> None:
        self.depth = 0  # how many are made ahead
        self._batches, self._ready = batches, SimpleQueue[tuple[bool, object]]()
        self._room = threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._stop = False
        self._is_settled = False
        self._last_ns, self._waits_ns, self._steps_ns = 0, deque[int](maxlen=_STEPS), deque[int](maxlen=_STEPS)
        self._alone_ns = 0.0
        self._num_longer = 0  # windows in a row whose steps were longer than without the thread
        self._num_resting, self._rest_windows = 0, _FIRST_REST

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread, once it has made the batch that it is at."""
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
        if len(self._steps_ns) == _STEPS and not self._is_settled:
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
            self._is_settled = True
            raise item
        return next(self._batches)  # the thread has stopped because it was told to

    def _decide(self) -> None:
        step_ns, wait_ns = median(self._steps_ns), median(self._waits_ns)
        self._waits_ns.clear()
        self._steps_ns.clear()
        if self.depth == 0:
            self._alone_ns = step_ns
            self._num_resting -= self._num_resting > 0
            works = step_ns - wait_ns > max(_WORK_SHARE * step_ns, _LEAST_WORK_NS)
            if wait_ns > _WAIT_SHARE * step_ns and works and not self._num_resting and self._thread is None:
                self._deepen(1)
            return
        self._num_longer = self._num_longer + 1 if step_ns > self._alone_ns else 0
        if self._num_longer == _WINDOWS:
            self._rest()
        elif not self._num_longer and wait_ns > _WAIT_SHARE * step_ns and self.depth < MAX_DEPTH:
            self._deepen(2 * self.depth)

    def _deepen(self, depth: int) -> None:
        if self._thread is None:
            self._stop, self._room, self._num_longer = False, threading.Semaphore(0), 0
            self._thread = threading.Thread(target=self._make, name="hpc-train-prefetch", daemon=True)
            self._thread.start()
        for _ in range(depth - self.depth):
            self._room.release()
        self.depth = depth

    def _rest(self) -> None:
        """No thread for some windows, each time for longer: other work on the node may have made the steps long."""
        self._stop, self.depth = True, 0
        self._room.release()
        self._num_resting, self._rest_windows = self._rest_windows, 2 * self._rest_windows

    def _make(self) -> None:
        try:
            while self._room.acquire() and not self._stop:
                self._ready.put((True, next(self._batches)))
            self._ready.put((False, None))
        except BaseException as error:  # noqa: BLE001  the loop raises it, StopIteration too, where it asks for the batch
            self._ready.put((False, error))
