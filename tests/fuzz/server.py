"""A process that has loaded what commands need, and forks a child for each: JSON lines in, JSON lines out."""

import atexit
import json
import os
import resource
import select
import signal
import sys
import traceback
from time import monotonic
from typing import Any

_MOST_MEMORY_BYTES, _MOST_FILE_BYTES = 10 << 30, 1 << 30


def main() -> None:
    os.environ["MPI4PY_RC_INITIALIZE"] = "0"
    _preload()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answers.write("ready\n")
    for line in sys.stdin:
        answers.write(json.dumps(_run(json.loads(line))) + "\n")


def _preload() -> None:
    import h5py
    import hdf5plugin
    import jinja2
    import matplotlib.backends.backend_svg
    import matplotlib.figure
    import scipy.optimize
    import scipy.stats
    import torch

    import hpc_train.analysis.report.renderers.page
    import hpc_train.analysis.report.report
    import hpc_train.cli.main
    import hpc_train.datasets.inspect.check
    import hpc_train.datasets.inspect.info
    import hpc_train.datasets.prepare.prepare
    import hpc_train.datasets.stage
    import hpc_train.train.generate
    import hpc_train.train.loop

    del h5py, hdf5plugin, jinja2, matplotlib, scipy, hpc_train
    torch.set_num_threads(1)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """Forks a child that runs the job's command, and returns how it ended. Kills it if it takes too long."""
    child = os.fork()
    if child == 0:
        _be(job)
    handle = os.pidfd_open(child)
    in_time = _ends_in_time(handle, job["timeout_s"])
    os.close(handle)
    if not in_time:
        os.kill(child, signal.SIGUSR1)  # faulthandler prints its stack
        select.select([], [], [], 0.2)
        os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"code": code, "hung": not in_time}


def _ends_in_time(handle: int, timeout_s: float) -> bool:
    """Whether it ends in time. The timeout grows with the load of the machine."""
    began_s = monotonic()
    while not select.select([handle], [], [], 0.5)[0]:
        crowd = os.getloadavg()[0] / len(os.sched_getaffinity(0))
        if monotonic() - began_s > timeout_s * max(1.0, crowd):
            return False
    return True


def _be(job: dict[str, Any]) -> None:
    """In the child: runs `hpc-train words...` in the job's folder, and never returns."""
    code: object = 70
    try:
        os.setsid()
        os.chdir(job["folder"])
        for stream, name in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
            handle = os.open(name, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, stream)
        for limit, most in (
            (resource.RLIMIT_AS, _MOST_MEMORY_BYTES),
            (resource.RLIMIT_FSIZE, _MOST_FILE_BYTES),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(limit, (most, most))
        import faulthandler

        faulthandler.register(signal.SIGUSR1)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.argv = ["hpc-train", *job["words"]]
        from hpc_train.cli.main import main as command

        command()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    _leave(code)


def _leave(code: object) -> None:
    """Ends as Python does: exit functions first."""
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code if isinstance(code, int) else 1 if code else 0)


if __name__ == "__main__":
    main()
