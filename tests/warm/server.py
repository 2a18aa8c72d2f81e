"""Forks a child for each stub that connects: `python -m tests.warm.server SOCKET`. It ends when its input does.

It loads what does not start MPI. mpi4py, h5py and what imports them are left to the child.
"""

import ast
import atexit
import gc
import os
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

_PROGRAM = os.path.join(os.path.dirname(sys.executable), "hpc-train")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the tests, whose end it sees
    _preload()
    gc.freeze()  # a child's garbage collection would copy every page
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(sys.argv[1])
        listening.listen(64)
        print("ready", flush=True)
        stub = _serve(listening)
    if stub is not None:
        _become(stub)
        _end(_code_of_program())


def _preload() -> None:
    import horovod.torch
    import jinja2
    import matplotlib.backends.backend_svg
    import matplotlib.figure
    import scipy.optimize
    import scipy.stats
    import torch

    import hpc_train.analysis.report.renderers.page
    import hpc_train.analysis.report.report
    import hpc_train.cli.main

    del horovod, jinja2, matplotlib, scipy, torch, hpc_train
    assert not {"mpi4py.MPI", "h5py"} & set(sys.modules), "these start MPI, which each child does by itself"


@dataclass(frozen=True)
class _Child:
    """A child and its stub; `ends` is a file descriptor that can be read once the child has ended."""

    pid: int
    ends: int
    stub: socket.socket

    def close(self) -> None:
        os.close(self.ends)
        self.stub.close()


def _serve(listening: socket.socket) -> socket.socket | None:
    """In a child: the connection to its stub. In the server: None, when its input has ended."""
    children: dict[int, _Child] = {}
    with select.epoll() as waiting:
        waiting.register(0, select.EPOLLIN)
        waiting.register(listening, select.EPOLLIN)
        while True:
            for ready, _ in waiting.poll():
                if ready == 0:
                    for child in children.values():
                        os.kill(child.pid, signal.SIGKILL)
                    return None
                if ready == listening.fileno():
                    stub, _ = listening.accept()
                    pid = os.fork()
                    if not pid:
                        for child in children.values():
                            child.close()
                        return stub
                    child = _Child(pid, os.pidfd_open(pid), stub)
                    children[child.ends] = child
                    waiting.register(child.ends, select.EPOLLIN)
                    waiting.register(stub, select.EPOLLRDHUP)
                    _tell(stub, pid)
                elif ready in children:
                    child = children.pop(ready)
                    _tell(child.stub, os.waitpid(child.pid, 0)[1])
                    child.close()
                else:
                    _kill_child_of(ready, children, waiting)


def _kill_child_of(stub: int, children: dict[int, _Child], waiting: select.epoll) -> None:
    """A stub that was killed takes its child with it."""
    for child in children.values():
        if child.stub.fileno() == stub:
            os.kill(child.pid, signal.SIGKILL)
            waiting.unregister(stub)


def _tell(stub: socket.socket, number: int) -> None:
    with suppress(OSError):  # it has been killed
        stub.send(f"{number}\n".encode())


def _become(stub: socket.socket) -> None:
    """Makes this child what the stub would have been as a process of its own."""
    with stub:
        _, streams, _, _ = socket.recv_fds(stub, 1, 3)
        with stub.makefile() as lines:
            job: dict[str, Any] = ast.literal_eval(lines.readline())
    os.setpgid(0, 0)
    os.chdir(job["folder"])
    os.umask(job["umask"])
    os.sched_setaffinity(0, job["cores"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(job["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = [_PROGRAM, *job["words"]]
    sys.path[:] = [os.path.dirname(_PROGRAM), *_given_path(), *_own_path]


def _code_of_program() -> object:
    """Runs the command as Python would, and returns what it ends with."""
    from hpc_train.__main__ import main as program

    try:
        program()
    except SystemExit as end:
        return end.code
    except BaseException:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _end(code: object) -> NoReturn:
    """Ends as Python does, except that it frees nothing: that would copy most pages of the server, in 0.2 s."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()
    atexit._run_exitfuncs()
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI, rc

        if MPI.Is_initialized() and not MPI.Is_finalized() and rc.finalize is not False:
            MPI.Finalize()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code & 0xFF if isinstance(code, int) else int(code is not None))


def _given_path() -> list[str]:
    return [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]


# Without the folder that `python -m` puts first, and what the server's own PYTHONPATH adds.
_own_path = [each for each in sys.path[1:] if each not in _given_path()]

if __name__ == "__main__":
    main()
