"""Requests to stop: a signal only sets a flag, which the loop reads at the end of a step."""

import signal
from types import FrameType
from typing import Any, Self

from hpc_train.core.job_environment import JobEnvironment

CONTINUE = 75  # exit code of a process that stopped on request and left a checkpoint: sysexits' EX_TEMPFAIL
TERMINATED = 128 + signal.SIGTERM
TERMINATING = (signal.SIGTERM, signal.SIGINT)
_HANDLED = (*TERMINATING, signal.SIGUSR2)


class PendingSignals:
    """A signal handler that remembers signals until the program can act on them.

    Blocking them would not work: a mask belongs to one thread, and the kernel delivers the signal to another one,
    such as NumPy's.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.numbers.append(number)


def defer_stop_signal() -> None:
    """Keeps SIGUSR2 for the `StopRequest` that comes later: without a handler it would end the process."""
    signal.signal(signal.SIGUSR2, PendingSignals())


def ignore_signals() -> None:
    """For a job that is ending: a launcher that sees one rank end may send SIGTERM to the others and report that."""
    for number in _HANDLED:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Whether SIGTERM, SIGINT or SIGUSR2 has arrived inside the block. A second Ctrl-C ends the process at once.

    Batch systems are asked to send SIGUSR2 some minutes before a job's time limit (not SIGUSR1: NCCL has used it);
    they and mpirun send SIGTERM before they kill.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {number: signal.signal(number, self._note) for number in _HANDLED}
        early = self._before[signal.SIGUSR2]
        if isinstance(early, PendingSignals) and early.numbers:
            self._note(signal.SIGUSR2, None)
        self._before[signal.SIGUSR2] = signal.SIG_IGN  # after the work there is nothing left to stop
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self._signal is not None

    @property
    def cause(self) -> str:
        """The signal's name, if this rank received it: other ranks only see that the job stops."""
        if self._signal is None:
            return "a signal to another rank"
        from_mpirun = self._signal == signal.SIGTERM and JobEnvironment.current().launcher == "mpirun"
        return self._signal.name + " (which mpirun sends after Ctrl-C, too, and itself ends with 1)" * from_mpirun

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)
