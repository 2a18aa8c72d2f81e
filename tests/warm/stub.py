"""What a launcher starts and sees in place of a command: `python -S -E stub.py SOCKET words...`."""

import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from types import FrameType

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until the child is known
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.connect(sys.argv[1])
    umask = os.umask(0)
    job = {
        "words": sys.argv[2:],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "umask": umask,
        "cores": list(os.sched_getaffinity(0)),
    }
    socket.send_fds(server, [b"\n"], [0, 1, 2])
    server.sendall(f"{job!r}\n".encode())
    for stream in (0, 1, 2):
        os.close(stream)  # the child alone has them: who reads sees its end
    answers = server.makefile()
    child = int(answers.readline())

    def pass_on(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    end_as(os.waitstatus_to_exitcode(int(answers.readline())))


def end_as(code: int) -> None:
    """Ends with this exit code, or by this signal where it is negative."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
