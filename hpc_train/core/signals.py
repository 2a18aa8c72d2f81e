"""Requests to stop: a signal only sets a flag, which the loop reads at the end of a step."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

from hpc_train.core.job_environment import JobEnvironment

CONTINUE = 75  # exit code of a process that stopped on request and left a checkpoint: sysexits' EX_TEMPFAIL
TERMINATED = 128 + signal.SIGTERM
TERMINATING = (signal.SIGTERM, signal.SIGINT)
_HANDLED = (*TERMINATING, signal.SIGUSR2)


class PendingSignals:
    """A signal handler that remembers signals until the program can act on them.

    A mask would not: it is one thread's, and the kernel gives the signal to another, numpy's say.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.numbers.append(number)


def defer_stop_signal() -> None:
    """Keeps SIGUSR2 until a `StopRequest` is there: before that it would end the process."""
    signal.signal(signal.SIGUSR2, PendingSignals())


def ignore_signals() -> None:
    """From now on: a launcher that sees one rank end may send the others SIGTERM, and report that as the job's end."""
    for number in _HANDLED:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """SIGTERM, SIGINT or SIGUSR2 that has come since it was entered. A second Ctrl-C ends the process at once.

    SIGUSR2 is what batch systems are asked to send some minutes before the end of a job's time (NCCL has used
    SIGUSR1); SIGTERM is what they, and mpirun, send before they kill.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {number: signal.signal(number, self._note) for number in _HANDLED}
        early = self._before[signal.SIGUSR2]
        if isinstance(early, PendingSignals) and early.numbers:
            self._note(signal.SIGUSR2, None)
        self._before[signal.SIGUSR2] = signal.SIG_IGN  # once the work is done there is nothing left to stop
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self._signal is not None

    @property
    def cause(self) -> str:
        """The signal's name; another rank's request is known by its effect alone."""
        if self._signal is None:
            return "a signal to another rank"
        from_mpirun = self._signal == signal.SIGTERM and JobEnvironment.current().launcher == "mpirun"
        return self._signal.name + " (which mpirun sends after Ctrl-C, too)" * from_mpirun

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)
