"""The job around the program: Slurm's account of it, the clocks of its hosts, and what a fork would meet."""

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from time import time_ns

import numpy as np

from hpc_train.doctor import carriers
from hpc_train.doctor.check import Answer, Finding, Status, Subject, Values, by_host, counted, ranks_of, time_text
from hpc_train.train.comm.context import Context, compared_clocks

_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_STEP_ID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NTASKS",
    "SLURM_JOB_NUM_NODES",
    "SLURM_CPUS_PER_TASK",
)
_OFF_WARN_S, _OFF_FAIL_S = 0.1, 10.0
_FORK_SAFE = ("RDMAV_FORK_SAFE", "IBV_FORK_SAFE")
_COPIES_PINNED_PAGES = (5, 12)  # since then a fork copies the pages that an adapter writes to, and needs no variable

# ---------------------------------------------------------------------------------------- Slurm


def look_slurm(subject: Subject) -> Values:
    """What Slurm says of this rank, and what MPI and the system say."""
    world = subject.context.world
    return {
        "slurm": {name: subject.environ[name] for name in _SLURM if name in subject.environ},
        "by_srun": launched_by_srun(subject.environ),
        "rank": world.rank,
        "size": world.size,
        "local_rank": world.local_rank,
        "num_cores": len(os.sched_getaffinity(0)),
    }


def launched_by_srun(environ: Mapping[str, str]) -> bool:
    """mpirun starts its daemons by srun: their task numbers are inherited by ranks, and are not theirs."""
    is_step = environ.get("SLURM_STEP_ID", "").isdecimal() and "SLURM_PROCID" in environ
    return is_step and "OMPI_COMM_WORLD_RANK" not in environ


def judge_slurm(answers: Sequence[Answer]) -> Finding:
    """Whether Slurm counts ranks as MPI does, and the job uses what it was given."""
    inside = [answer for answer in answers if "SLURM_JOB_ID" in answer.values["slurm"]]
    if not inside:
        return Finding("n/a", "not in a Slurm job")
    jobs = {answer.values["slurm"].get("SLURM_JOB_ID") for answer in answers}
    if len(jobs) > 1:
        mend = "unset ${!SLURM_*}   # left over from another job: start anew with sbatch"
        return Finding("fail", f"ranks say different jobs: {', '.join(sorted(map(str, jobs)))}", mend)
    for words, told, known in (
        ("SLURM_PROCID", "SLURM_PROCID", "rank"),
        ("SLURM_LOCALID", "SLURM_LOCALID", "local_rank"),
        ("tasks of the step", "SLURM_STEP_NUM_TASKS", "size"),
    ):
        wrong = [
            answer
            for answer in inside
            if answer.values["by_srun"]
            and int(answer.values["slurm"].get(told, answer.values[known])) != answer.values[known]
        ]
        if wrong:
            values = wrong[0].values
            seen = f"{words} is {values['slurm'][told]}, and MPI's {known.replace('_', ' ')} {values[known]}"
            return Finding("fail", seen, "srun --mpi=pmix ...   # srun --mpi=list shows what there is", ranks_of(wrong))
    return _amounts(inside, answers)


def _amounts(inside: Sequence[Answer], answers: Sequence[Answer]) -> Finding:
    """Whether the job uses what it was given."""
    values, hosts = inside[0].values, by_host(answers)
    slurm = values["slurm"]
    nodes, per_task = (int(slurm.get(name, 0)) for name in ("SLURM_JOB_NUM_NODES", "SLURM_CPUS_PER_TASK"))
    tasks = 0 if values["by_srun"] else int(slurm.get("SLURM_NTASKS", 0))
    seen = f"job {slurm['SLURM_JOB_ID']}: {counted(len(answers), 'rank')} on {counted(len(hosts), 'node')}"
    if len(hosts) > nodes > 0:
        mend = "unset ${!SLURM_*}   # left over from another job"
        return Finding("fail", f"{seen}, and Slurm gave it {nodes}", mend)
    short = [answer for answer in inside if answer.values["num_cores"] < per_task]
    if short:
        told = f"SLURM_CPUS_PER_TASK = {per_task}, and a rank may use {short[0].values['num_cores']}"
        return Finding(
            "fail", told, "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK   # mpirun: --bind-to none", ranks_of(short)
        )
    if len(answers) > 1 and len(hosts) < nodes:
        return Finding(
            "warn", f"{seen}, of {nodes} that are paid for", f"srun -N {nodes} ...   # mpirun: --map-by node"
        )
    if len(answers) > 1 and tasks not in (0, len(answers)):
        return Finding(
            "warn",
            f"{seen}, and SLURM_NTASKS = {tasks}",
            f"mpirun -n {tasks} ...   # or #SBATCH --ntasks={len(answers)}",
        )
    return Finding("ok", seen)


# ---------------------------------------------------------------------------------------- clocks


def look_clocks(subject: Subject) -> Values:
    """Collective. This rank's wall clock minus the root's, and by how much that may be wrong, in seconds."""
    found = subject.context.all(compared_clocks(subject.context, time_ns))[0]
    offset_ns, error_ns = found[subject.context.world.rank]
    return {"offset_s": offset_ns / 1e9, "error_s": error_ns / 1e9}


def judge_clocks(answers: Sequence[Answer]) -> Finding:
    """Whether the hosts' times of day agree."""
    if len(answers) == 1:
        return Finding("n/a", "one rank, one clock")
    worst = max(answers, key=lambda answer: abs(answer.values["offset_s"]))
    error_s = max(answer.values["error_s"] for answer in answers)
    seen = f"wall clocks differ by {time_text(abs(worst.values['offset_s']))} at most, known to {time_text(error_s)}"
    off = [answer for answer in answers if abs(answer.values["offset_s"]) > _OFF_WARN_S + answer.values["error_s"]]
    if off:
        status: Status = "fail" if abs(worst.values["offset_s"]) > _OFF_FAIL_S else "warn"
        mend = "chronyc tracking; sudo chronyc makestep   # on that host: file times and logs do not agree"
        return Finding(status, seen, mend, ranks_of(off))
    return Finding("ok", seen)


# ---------------------------------------------------------------------------------------- fork


def look_fork(subject: Subject) -> Values:
    """Starts a program as this one does, then forks as workers of a DataLoader do; the child touches memory and ends.

    intact: whether what MPI received into is, in the parent, as it was.
    """
    values: Values = {"spawn_error": None, "fork_error": None, "intact": True, "kernel": platform.release()}
    values["verbs"] = [name for name in carriers.open_devices() if "uverbs" in name]
    values["set"] = [name for name in _FORK_SAFE if subject.environ.get(name, "") not in ("", "0")]
    try:
        subprocess.run(("true",), check=True, timeout=5)  # git, sacct and srun are asked this way: vfork or posix_spawn
    except (OSError, subprocess.SubprocessError) as error:
        values["spawn_error"] = str(error)
    buffer = _received(subject.context)
    before = buffer.copy()
    try:
        child = os.fork()
    except OSError as error:
        return {**values, "fork_error": error.strerror}
    if child == 0:
        buffer.fill(-1)
        os._exit(0)
    _, code = os.waitpid(child, 0)
    if code:
        values["fork_error"] = f"the child ended with {code}"
    values["intact"] = bool(
        np.array_equal(buffer, before) and np.array_equal(_received(subject.context, buffer), before)
    )
    return values


def _received(context: Context, buffer: np.ndarray | None = None) -> np.ndarray:
    """Collective. Memory that MPI wrote to: half a MiB of the ranks' sum."""
    buffer = np.empty(1 << 16) if buffer is None else buffer
    buffer[:] = context.sum(np.ones_like(buffer))
    return buffer


def judge_fork(answers: Sequence[Answer]) -> Finding:
    """Whether processes can be started, and leave MPI's memory alone."""
    refused = [answer for answer in answers if answer.values["spawn_error"] or answer.values["fork_error"]]
    if refused:
        values = refused[0].values
        seen = f"no process can be started: {values['spawn_error'] or values['fork_error']}"
        return Finding(
            "fail",
            seen,
            "ulimit -u; cat /sys/fs/cgroup/pids.max; free -g   # processes and memory that are left",
            ranks_of(refused),
        )
    broken = [answer for answer in answers if not answer.values["intact"]]
    if broken:
        return Finding(
            "fail",
            "a fork changed memory that MPI receives into",
            "export RDMAV_FORK_SAFE=1 IBV_FORK_SAFE=1",
            ranks_of(broken),
        )
    values = answers[0].values
    version = tuple(int(number) for number in re.findall(r"\d+", values["kernel"])[:2])
    exposed = [answer for answer in answers if answer.values["verbs"] and not answer.values["set"]]
    if exposed and version < _COPIES_PINNED_PAGES:
        seen = f"verbs are in use, and in Linux {values['kernel']} workers that fork may corrupt messages"
        return Finding("warn", seen, "export RDMAV_FORK_SAFE=1 IBV_FORK_SAFE=1", ranks_of(exposed))
    how = (
        f"verbs in use, {' and '.join(values['set']) or 'Linux ' + values['kernel']}"
        if values["verbs"]
        else "no verbs in use"
    )
    return Finding("ok", f"programs start, a forked child leaves MPI's memory alone ({how})")
