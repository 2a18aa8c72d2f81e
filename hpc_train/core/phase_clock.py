"""Times the phases of a step, in nanoseconds of the monotonic clock."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from time import perf_counter_ns

from hpc_train.core.timing_log import PHASES, StepRecord


class Phase:
    """`with phase: ...` adds the time inside to `spent_ns`."""

    __slots__ = ("began_ns", "spent_ns")

    def __init__(self) -> None:
        self.began_ns = 0
        self.spent_ns = 0

    def __enter__(self) -> None:
        self.began_ns = perf_counter_ns()

    def __exit__(self, *error: object) -> None:
        self.spent_ns += perf_counter_ns() - self.began_ns


class _SynchronizedPhase(Phase):
    """Waits for the device at both ends: exact on a GPU, at the cost of the overlap that it measures."""

    __slots__ = ("synchronize",)

    def __init__(self, synchronize: Callable[[], None]) -> None:
        super().__init__()
        self.synchronize = synchronize

    def __enter__(self) -> None:
        self.synchronize()
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        self.synchronize()
        super().__exit__(*error)


class _UntimedPhase(Phase):
    """Records no time: the host's time says nothing about work that a device does asynchronously."""

    __slots__ = ()

    def __exit__(self, *error: object) -> None:
        pass


def _make_phase(synchronize: Callable[[], None] | None, times_phases: bool) -> Phase:
    if not times_phases:
        return _UntimedPhase()
    return _SynchronizedPhase(synchronize) if synchronize else Phase()


class _PhaseWithWaits:
    """A phase, less the time in which the rank waited for others within it: that is added to `reduce`."""

    __slots__ = ("phase", "reduce", "waits")

    def __init__(self, phase: Phase, waits: Phase, reduce: Phase) -> None:
        self.phase, self.waits, self.reduce = phase, waits, reduce

    def __enter__(self) -> None:
        self.waits.spent_ns = 0  # of another phase
        self.phase.__enter__()

    def __exit__(self, *error: object) -> None:
        self.phase.__exit__(*error)
        self.phase.spent_ns -= self.waits.spent_ns
        self.reduce.spent_ns += self.waits.spent_ns


class Clock:
    """`with clock.forward: ...` adds to a phase; `clock.end_step(...)` ends the step and returns its record.

    Steps follow each other without a gap: time outside of all phases is the step's "other". synchronize: called at both
    ends of every phase, such as torch.cuda.synchronize. Without `times_phases` a whole step is "other".
    """

    def __init__(self, synchronize: Callable[[], None] | None = None, times_phases: bool = True) -> None:
        phases = [_make_phase(synchronize, times_phases) for phase in PHASES if phase != "other"]
        self.data, self.forward, self.backward, self.reduce, self.optimizer, self.sync = phases
        self._step_began_ns = perf_counter_ns()
        self._times_phases = times_phases

    def passes(self, waits: Phase | None) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """(forward, backward), of which the time inside `waits` counts as `reduce`: it is exposed communication."""
        if waits is None or not self._times_phases:
            return self.forward, self.backward
        return _PhaseWithWaits(self.forward, waits, self.reduce), _PhaseWithWaits(self.backward, waits, self.reduce)

    def restart(self) -> None:
        """Begins the first step now: earlier time belongs to no step."""
        self._step_began_ns = perf_counter_ns()

    def exclude(self, ns: int) -> None:
        """Removes `ns` from the current step, which were spent on something else. Only between phases."""
        self._step_began_ns += ns

    def end_step(self, step: int, num_samples: int, warmup: bool = False) -> StepRecord:
        """Ends the step; returns its record in the order of `TIMING_COLUMNS`, to which the log adds `attempt`."""
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
