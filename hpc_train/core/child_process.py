"""Work that may crash a library, done by a child process: the parent waits, and reports a crash in one message.

Children are forked before MPI, torch and threads start, so nothing is loaded twice. (`doctor/supervisor.py` starts new
programs instead, which may also hang.)
"""

import ctypes
import faulthandler
import mmap
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from hpc_train.core.errors import UserError
from hpc_train.core.job_environment import JobEnvironment

_MAX_PATH_BYTES = 4096
_STDERR = 2
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_FROM_OUTSIDE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Notes:
    """Memory that a child shares with its parent: the file that it reads, known to the parent even after a crash."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, _MAX_PATH_BYTES)

    def at(self, path: object) -> None:
        name = os.fsencode(str(path))[: _MAX_PATH_BYTES - 1] + b"\0"
        self._shared[: len(name)] = name

    @property
    def place(self) -> str:
        return os.fsdecode(self._shared[:].partition(b"\0")[0])


class Child:
    """A running child process. Call `wait` before this process ends."""

    def __init__(self, pid: int, notes: Notes) -> None:
        self._pid, self._notes, self._has_ended = pid, notes, False

    def wait(self) -> int:
        """Its exit code. Raises `UserError` if a signal killed it."""
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self._has_ended = True
        if code < 0:
            raise _crashed(self._notes.place, -code)
        return code

    def end(self) -> None:
        """Kills it unless `wait` has returned: its pid may belong to another process by then."""
        if self._has_ended:
            return
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def begin(work: Callable[[Notes], object]) -> Child:
    """Runs `work` in a child only to see whether it crashes; its result and exceptions are dropped.

    The child ignores signals that a scheduler sends to all processes of a job.
    """
    notes = Notes()
    pid = _fork()
    if pid:
        return Child(pid, notes)
    for number in _FROM_OUTSIDE:
        signal.signal(number, signal.SIG_IGN)
    _silence_libraries()
    with suppress(BaseException):
        work(notes)
    os._exit(0)


def go_on_in_child() -> Notes:
    """Forks. The child returns and runs the rest of the program; the parent waits and never returns.

    The parent exits with the child's code, or raises `UserError` if a signal killed it. Ctrl-C and SIGTERM to the
    parent end both.
    """
    notes = Notes()
    pid = _fork()
    if not pid:
        if not JobEnvironment.current().is_launched:  # MPI reports its own errors there
            _silence_libraries()
        return notes
    child = Child(pid, notes)

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        sys.exit(child.wait())
    except (KeyboardInterrupt, SystemExit):
        child.end()
        raise


def _silence_libraries() -> None:
    """Python's own messages still reach the terminal.

    glibc reports a crash itself ("*** buffer overflow detected ***"); the parent's message says more.
    """
    sys.stderr = os.fdopen(os.dup(_STDERR), "w", buffering=1, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDERR)


def _fork() -> int:
    """0 in the child, which dies with its parent, ignores Ctrl-C and leaves no core file."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        faulthandler.disable()  # a traceback inside HDF5 helps no user, and Open MPI prints another:
        os.environ.update(OMPI_MCA_opal_signal="")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    return pid


def died_of(number: int) -> str:
    """signal 11 (Segmentation fault)"""
    return f"signal {number} ({signal.strsignal(number)})"


def _crashed(place: str, number: int) -> UserError:
    if number == signal.SIGKILL:
        return UserError(
            f"{place or 'the work'}: the process that read it was killed by {died_of(number)}",
            "Somebody killed it, or memory ran out: a file that claims to be huge is damaged.",
        )
    return UserError(
        f"{place or 'the work'} made HDF5 crash: {died_of(number)}",
        "The file is damaged in a way that HDF5 does not detect: restore it, or prepare it again.",
    )
