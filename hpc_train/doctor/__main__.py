"""The process that runs the checks: python -m hpc_train.doctor PIPE PORT:TOKEN CONFIG KEY=VALUE...

`supervisor.py` starts it and reads, one JSON line at a time, which check begins and what it found. So the supervisor
can name a check that hangs or crashes.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.settings import Config
from hpc_train.doctor.check import Answer, Check, Finding, Subject, Values, fail, not_applicable, spans
from hpc_train.doctor.checks import CHECKS
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mpi_library import mpi
from hpc_train.train.comm.startup import open_context

START_S = 120.0  # MPI_Init on many nodes
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.001


class Pipe:
    """The way to the supervisor, which waits for this process."""

    def __init__(self, pipe: int) -> None:
        self._file = os.fdopen(pipe, "w", buffering=1)

    def send(self, **facts: Any) -> None:
        self._file.write(json.dumps(facts) + "\n")


def run(config: Config | None, pipe: Pipe, listens: str) -> None:
    """Collective. Runs every check, one after the other, until a rank does not answer.

    listens: "port:token" at which the root's supervisor accepts other ranks' faults.
    """
    remedy = "mpirun -n 2 hostname; srun --mpi=list   # do launcher and MPI belong together?"
    pipe.send(begins="MPI starts", limit_s=START_S, remedy=remedy)
    environ = dict(os.environ)  # before MPI_Init, which adds to it
    use_mpi = find_spec("mpi4py") is not None
    try:
        with open_context(use_mpi) as context:
            _check_all(Subject(context, config, environ), pipe, listens)
            return
    except UserError as error:  # MPI does not start, or has other ranks than the launcher started
        pipe.send(finding=fail(error.what, error.remedy).to_dict("MPI starts", []))
    if not JobEnvironment.from_variables(environ).is_launched:  # the other checks work without MPI
        with open_context(use_mpi=False) as context:
            _check_all(Subject(context, config, environ), pipe, listens)


def _check_all(subject: Subject, pipe: Pipe, listens: str) -> None:
    context = subject.context
    port, _, token = listens.partition(":")
    pipe.send(size=context.world.size, root=context.all_gather((context.world.host, int(port), token))[0])
    with context.duplicate() as for_answers:
        for number, check in enumerate(CHECKS):
            pipe.send(begins=check.name, limit_s=check.limit_s, remedy=check.remedy)
            if not _run_check(check, number, subject, for_answers, pipe):
                os._exit(1)  # MPI_Finalize would wait for the ranks that are lost
    pipe.send(begins="MPI ends", limit_s=10.0, remedy="")


def _run_check(check: Check, number: int, subject: Subject, for_answers: Context, pipe: Pipe) -> bool:
    """Collective. False on the root if ranks did not answer in time."""
    context, world = subject.context, subject.context.world
    missing = [name for name in check.needs if find_spec(name) is None or (name == "mpi4py" and context.comm is None)]
    values: Values = {"missing": missing} if any(context.all_gather(missing)) else _probe(check, subject)
    mine = Answer(world.rank, world.host, world.local_rank, values)
    answers, lost = _answers(mine, number, for_answers, check.limit_s)
    if not world.is_root:
        return True
    if lost:
        seen = f"no answer within {check.limit_s:g} s from rank{'s' * (len(lost) > 1)} {spans(lost)}"
        finding = Finding("fail", seen, check.remedy, tuple(lost))
    else:
        finding = _evaluate(check, answers)
    pipe.send(finding=finding.to_dict(check.name, answers))
    return not lost


def _probe(check: Check, subject: Subject) -> Values:
    try:
        return check.probe(subject)
    except Exception as error:  # noqa: BLE001  whatever a probe raises is its result
        return {"raised": f"{type(error).__name__}: {error}"}


def _evaluate(check: Check, answers: Sequence[Answer]) -> Finding:
    missing = [answer.values["missing"] for answer in answers if answer.values.get("missing")]
    if missing:
        return not_applicable(f"needs {' and '.join(missing[0])}")
    raised = [answer for answer in answers if "raised" in answer.values]
    if raised:
        return fail(f"it raised {raised[0].values['raised']}", check.remedy, raised)
    return check.evaluate(answers)


def _answers(mine: Answer, number: int, context: Context, timeout_s: float) -> tuple[list[Answer], list[int]]:
    """(every rank's answer in rank order, ranks without one after `timeout_s`) on the root.

    Point-to-point messages, because a gather that hangs cannot say which rank it waits for.
    """
    if context.comm is None:
        return [mine], []
    if not context.world.is_root:
        context.comm.send(mine, dest=0, tag=number)
        return [], []
    found, until_s = {0: mine}, monotonic() + timeout_s
    while len(found) < context.world.size and monotonic() < until_s:
        message = context.comm.improbe(source=mpi().ANY_SOURCE, tag=number)
        if message is None:
            sleep(_POLL_S)
            continue
        answer = message.recv()
        found[answer.rank] = answer
    return [found[rank] for rank in sorted(found)], [rank for rank in range(context.world.size) if rank not in found]


def main() -> None:
    # This process ends with its supervisor, however that one ends.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptor, listens, job, *overrides = sys.argv[1:]
    config = load(Path(job), tuple(overrides)).config if job else None
    run(config, Pipe(int(descriptor)), listens)


if __name__ == "__main__":
    main()
