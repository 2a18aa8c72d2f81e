"""The phase timer: where a step's time goes, in nanoseconds of the monotonic clock."""

from collections.abc import Callable
from time import perf_counter_ns
from types import TracebackType

from hpc_train.core.records import StepRecord


class _Phase:
    __slots__ = ("began_ns", "spent_ns")

    def __init__(self) -> None:
        self.began_ns = 0
        self.spent_ns = 0

    def __enter__(self) -> None:
        self.began_ns = perf_counter_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.spent_ns += perf_counter_ns() - self.began_ns


class _SynchronizedPhase(_Phase):
    """Waits for the device at both ends: exact for a GPU, at the price of the overlap it measures."""

    __slots__ = ("synchronize",)

    def __init__(self, synchronize: Callable[[], None]) -> None:
        super().__init__()
        self.synchronize = synchronize

    def __enter__(self) -> None:
        self.synchronize()
        super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.synchronize()
        super().__exit__(kind, error, trace)


class _UntimedPhase(_Phase):
    """Takes no time: what a host measures of work that a device does later tells nothing of it."""

    __slots__ = ()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Clock:
    """`with clock.forward: ...` adds to a phase; `clock.end_step(...)` ends the step and returns its record.

    Laps are contiguous: what no phase covers is the step's "other", so nothing is lost between steps.
    `synchronize` (torch.cuda.synchronize, say) is called at both ends of every phase when given. Without `times_phases`
    all of a step is "other".
    """

    def __init__(self, synchronize: Callable[[], None] | None = None, times_phases: bool = True) -> None:
        def phase() -> _Phase:
            if not times_phases:
                return _UntimedPhase()
            return _SynchronizedPhase(synchronize) if synchronize else _Phase()

        self.data, self.forward, self.backward = phase(), phase(), phase()
        self.reduce, self.optimizer, self.sync = phase(), phase(), phase()
        self._step_began_ns = perf_counter_ns()

    def restart(self) -> None:
        """Begins the first step now: what came before belongs to no step."""
        self._step_began_ns = perf_counter_ns()

    def exclude(self, ns: int) -> None:
        """Begins the step at hand `ns` later: so much of it belonged to something else. Between phases only."""
        self._step_began_ns += ns

    def end_step(self, step: int, num_samples: int, warmup: bool = False) -> StepRecord:
        """Ends the step: its record, in the order of `records.TIMING_COLUMNS` (the attempt is the log's)."""
        # Written out instead of looped over: every step pays for it, and a loop takes twice as long.
        now, began = perf_counter_ns(), self._step_began_ns
        data, forward, backward = self.data, self.forward, self.backward
        reduce, optimizer, sync = self.reduce, self.optimizer, self.sync
        d, f, b = data.spent_ns, forward.spent_ns, backward.spent_ns
        r, o, s = reduce.spent_ns, optimizer.spent_ns, sync.spent_ns
        data.spent_ns = forward.spent_ns = backward.spent_ns = 0
        reduce.spent_ns = optimizer.spent_ns = sync.spent_ns = 0
        self._step_began_ns = now
        other = now - began - d - f - b - r - o - s
        return (step, began, reduce.began_ns, d, f, b, r, o, s, other, num_samples, warmup)
