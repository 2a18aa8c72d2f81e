"""The process that makes the checks: python -m hpc_train.doctor PIPE PORT:TOKEN CONFIG KEY=VALUE...

`supervisor.py` starts it and hears, a JSON line at a time, what it is about to do and what came of it. So a check
that hangs or crashes is named by someone who does neither.
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
from hpc_train.doctor.check import Answer, Check, Finding, Subject, Values, ranks_of
from hpc_train.doctor.checks import CHECKS
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mpi_library import mpi
from hpc_train.train.comm.startup import open_context

START_S = 120.0  # MPI_Init on many nodes
_PR_SET_PDEATHSIG = 1
_LOOK_EVERY_S = 0.001


class Line:
    """The way to the process that waits for this one."""

    def __init__(self, pipe: int) -> None:
        self._file = os.fdopen(pipe, "w", buffering=1)

    def tell(self, **facts: Any) -> None:
        self._file.write(json.dumps(facts) + "\n")


def run(config: Config | None, line: Line, listens: str) -> None:
    """Collective. Every check, one after the other; ends where a rank does not answer.

    listens: "port:token" at which the process that waits for the root's hears of other ranks' faults.
    """
    line.tell(
        begins="MPI starts", limit_s=START_S, mend="mpirun -n 2 hostname; srun --mpi=list   # launcher and MPI fit?"
    )
    environ = dict(os.environ)  # as it was launched: MPI adds to it
    use_mpi = find_spec("mpi4py") is not None
    try:
        with open_context(use_mpi) as context:
            _check_all(Subject(context, config, environ), line, listens)
            return
    except UserError as error:  # MPI does not start, or sees other ranks than the launcher
        line.tell(finding=Finding("fail", error.what, error.remedy).to_dict("MPI starts", []))
    if not JobEnvironment.from_variables(environ).is_launched:  # the rest can be looked at without
        with open_context(use_mpi=False) as context:
            _check_all(Subject(context, config, environ), line, listens)


def _check_all(subject: Subject, line: Line, listens: str) -> None:
    context = subject.context
    port, _, token = listens.partition(":")
    line.tell(size=context.world.size, root=context.all_gather((context.world.host, int(port), token))[0])
    with context.duplicate() as for_answers:
        for number, check in enumerate(CHECKS):
            line.tell(begins=check.name, limit_s=check.limit_s, mend=check.mend)
            if not _make(check, number, subject, for_answers, line):
                os._exit(1)  # MPI cannot be ended without the ranks that are lost
    line.tell(begins="MPI ends", limit_s=10.0, mend="")


def _make(check: Check, number: int, subject: Subject, for_answers: Context, line: Line) -> bool:
    """Collective. One check; False where ranks did not answer in time, which the root says."""
    context, world = subject.context, subject.context.world
    lacking = [name for name in check.needs if find_spec(name) is None or (name == "mpi4py" and context.comm is None)]
    values: Values = {"lacking": lacking} if any(context.all_gather(lacking)) else _looked(check, subject)
    mine = Answer(world.rank, world.host, world.local_rank, values)
    answers, lost = _answers(mine, number, for_answers, check.limit_s)
    if not world.is_root:
        return True
    if lost:
        seen = f"no answer within {check.limit_s:g} s from rank{'s' * (len(lost) > 1)} {', '.join(map(str, lost))}"
        finding = Finding("fail", seen, check.mend, tuple(lost))
    else:
        finding = _judged(check, answers)
    line.tell(finding=finding.to_dict(check.name, answers))
    return not lost


def _looked(check: Check, subject: Subject) -> Values:
    try:
        return check.look(subject)
    except Exception as error:  # noqa: BLE001  whatever a look meets is what it saw
        return {"raised": f"{type(error).__name__}: {error}"}


def _judged(check: Check, answers: Sequence[Answer]) -> Finding:
    lacking = [answer for answer in answers if answer.values.get("lacking")]
    if lacking or any("lacking" in answer.values for answer in answers):
        return Finding("n/a", f"needs {' and '.join(lacking[0].values['lacking'])}")
    raised = [answer for answer in answers if "raised" in answer.values]
    if raised:
        return Finding("fail", f"it ended with {raised[0].values['raised']}", check.mend, ranks_of(raised))
    return check.judge(answers)


def _answers(mine: Answer, number: int, context: Context, patience_s: float) -> tuple[list[Answer], list[int]]:
    """Every rank's answer on the root, in rank order, and the ranks that gave none within `patience_s`.

    Not a gather: one that never ends could not say whom it waits for.
    """
    if context.comm is None:
        return [mine], []
    if not context.world.is_root:
        context.comm.send(mine, dest=0, tag=number)
        return [], []
    found, until = {0: mine}, monotonic() + patience_s
    while len(found) < context.world.size and monotonic() < until:
        message = context.comm.improbe(source=mpi().ANY_SOURCE, tag=number)
        if message is None:
            sleep(_LOOK_EVERY_S)
            continue
        answer = message.recv()
        found[answer.rank] = answer
    return [found[rank] for rank in sorted(found)], [rank for rank in range(context.world.size) if rank not in found]


def main() -> None:
    # Whoever ends the process that waits for this one, ends this one, too.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    pipe, listens, job, *overrides = sys.argv[1:]
    config = load(Path(job), tuple(overrides)).config if job else None
    run(config, Line(int(pipe)), listens)


if __name__ == "__main__":
    main()
