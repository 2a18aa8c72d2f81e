"""How long a benchmark over growing message sizes may take."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from time import monotonic

from hpc_train.core.formatting import binary_size

_LATENCY_BYTES = 64 << 10  # messages up to this size take about as long as an empty one


class Pace:
    """Before each size, prints the time left and decides whether there is time for it.

    budget_s: None for no limit. stopped: why it stopped, "" if it did not.
    """

    def __init__(self, sizes: Sequence[int], budget_s: float | None, say: Callable[[str], None]) -> None:
        self._sizes, self._budget_s, self._say = sizes, budget_s, say
        self._began_s = self._last_s = monotonic()
        self.stopped = ""

    def may_continue(self, index: int) -> bool:
        """Call before each size; the time since the last call is that of the size before."""
        now_s, size = monotonic(), self._sizes[index]
        coming_s = self._coming_s(index, now_s - self._last_s)
        self._last_s = now_s
        if index and self._budget_s is not None and now_s - self._began_s + coming_s[0] > self._budget_s:
            self.stopped = f"stopped before {binary_size(size)}: --minutes {self._budget_s / 60:g}"
            self._say(self.stopped)
            return False
        left = f", about {timedelta(seconds=round(sum(coming_s)))} left" if index else ""
        self._say(f"{binary_size(size)} ({index + 1} of {len(self._sizes)} sizes{left})")
        return True

    def _coming_s(self, index: int, last_s: float) -> list[float]:
        """Estimates for the sizes from `index` on, given that the one before took `last_s`."""
        coming_s = []
        for size in self._sizes[index:]:  # each is four times the one before
            last_s *= 4 if size > _LATENCY_BYTES else 1
            coming_s.append(last_s)
        return coming_s
