"""The phase timer: where a step's time goes, in nanoseconds of the monotonic clock."""

from collections.abc import Callable
from time import perf_counter_ns
from types import TracebackType

from hpc_train.records import PHASES, StepRecord


class _Phase:
    __slots__ = ("began_ns", "spent_ns")

    def __init__(self) -> None:
        self.began_ns = 0
        self.spent_ns = 0

    def __enter__(self) -> None:
        self.began_ns = perf_counter_ns()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.synchronize()
        super().__exit__(kind, error, trace)


class Clock:
    """`with clock("forward"): ...` adds to a phase; `clock.lap(...)` ends the step and returns its record.

    Laps are contiguous: what no phase covers is the step's "other", so nothing is lost between steps.
    `synchronize` (torch.cuda.synchronize, say) is called at both ends of every phase when given.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._phases = {
            name: _SynchronizedPhase(synchronize) if synchronize else _Phase() for name in PHASES if name != "other"
        }
        self._timed = tuple(self._phases.values())
        self._reduce = self._phases["reduce"]
        self._step_began_ns = perf_counter_ns()

    def __call__(self, phase: str) -> _Phase:
        return self._phases[phase]

    def restart(self) -> None:
        """Begins the first step now: what came before belongs to no step."""
        self._step_began_ns = perf_counter_ns()

    def lap(self, step: int, num_samples: int, warmup: bool = False) -> StepRecord:
        """Ends the step: its record, durations in ns in the order of `PHASES`."""
        now = perf_counter_ns()
        began, self._step_began_ns = self._step_began_ns, now
        spent = [phase.spent_ns for phase in self._timed]
        for phase in self._timed:
            phase.spent_ns = 0
        return (step, began, self._reduce.began_ns, *spent, now - began - sum(spent), num_samples, int(warmup))
