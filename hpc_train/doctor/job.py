"""The job around the program: Slurm's account of it, the clocks of its hosts, and what a fork would meet."""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from time import time_ns

import numpy as np

from hpc_train.core.job_environment import JobEnvironment
from hpc_train.doctor import carriers
from hpc_train.doctor.check import Answer, Finding, Status, Subject, Values, by_host, counted, ranks_of, time_text
from hpc_train.train.comm.clocks import compare_clocks
from hpc_train.train.comm.context import Context

_OFF_WARN_S, _OFF_FAIL_S = 0.1, 10.0
_STALE_VARIABLES = "unset ${!SLURM_*}   # left over from another job: submit with sbatch"
_FORK_SAFE = ("RDMAV_FORK_SAFE", "IBV_FORK_SAFE")
_COPIES_PINNED_PAGES = (5, 12)  # since then a fork copies the pages that an adapter writes to, and needs no variable

# ---------------------------------------------------------------------------------------- Slurm


def look_slurm(subject: Subject) -> Values:
    """What Slurm says of this rank, and what MPI and the system say."""
    world = subject.context.world
    return {
        "job": asdict(JobEnvironment.from_variables(subject.environ)),
        "rank": world.rank,
        "size": world.size,
        "local_rank": world.local_rank,
        "num_cores": len(os.sched_getaffinity(0)),
    }


def judge_slurm(answers: Sequence[Answer]) -> Finding:
    """Whether Slurm counts ranks as MPI does, and the job uses what it was given."""
    jobs = [JobEnvironment(**answer.values["job"]) for answer in answers]
    if all(job.job_id is None for job in jobs):
        return Finding("n/a", "not in a Slurm job")
    if len({job.job_id for job in jobs}) > 1:
        ids = ", ".join(sorted({str(job.job_id) for job in jobs}))
        return Finding("fail", f"ranks are in different jobs: {ids}", _STALE_VARIABLES)
    for answer, job in zip(answers, jobs, strict=True):
        if job.launcher == "srun" and (seen := _disagreement(job, answer.values)):
            mend = "srun --mpi=pmix ...   # srun --mpi=list prints the choices"
            return Finding("fail", seen, mend, (answer.rank,))
    return _use_of_allocation(jobs[0], answers)


def _disagreement(job: JobEnvironment, values: Values) -> str | None:
    """Where srun and MPI number the same rank differently."""
    counted_by_both = (
        ("SLURM_PROCID", job.step_rank, "rank"),
        ("SLURM_LOCALID", job.local_rank, "local_rank"),
        ("SLURM_STEP_NUM_TASKS", job.step_num_tasks, "size"),
    )
    for variable, by_srun, key in counted_by_both:
        if by_srun is not None and by_srun != values[key]:
            return f"{variable} = {by_srun}, but MPI's {key.replace('_', ' ')} is {values[key]}"
    return None


def _use_of_allocation(job: JobEnvironment, answers: Sequence[Answer]) -> Finding:
    """Whether the ranks use the nodes and cores that Slurm allocated."""
    num_ranks, num_hosts = len(answers), len(by_host(answers))
    num_nodes, cpus_per_task = job.num_nodes or 0, job.cpus_per_task or 0
    seen = f"job {job.job_id}: {counted(num_ranks, 'rank')} on {counted(num_hosts, 'node')}"
    if num_hosts > num_nodes > 0:
        return Finding("fail", f"{seen}, but Slurm allocated {num_nodes}", _STALE_VARIABLES)
    short = [answer for answer in answers if answer.values["num_cores"] < cpus_per_task]
    if short:
        return Finding(
            "fail",
            f"SLURM_CPUS_PER_TASK = {cpus_per_task}, but a rank may use {short[0].values['num_cores']}",
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK   # mpirun: --bind-to none",
            ranks_of(short),
        )
    if num_ranks > 1 and num_hosts < num_nodes:
        return Finding("warn", f"{seen} of {num_nodes} allocated", f"srun -N {num_nodes} ...   # mpirun: --map-by node")
    # A step may have fewer tasks than the job on purpose: only mpirun's number of ranks is compared.
    if job.launcher == "mpirun" and num_ranks > 1 and job.num_tasks not in (None, num_ranks):
        mend = f"mpirun -n {job.num_tasks} ...   # or #SBATCH --ntasks={num_ranks}"
        return Finding("warn", f"{seen}, but SLURM_NTASKS = {job.num_tasks}", mend)
    return Finding("ok", seen)


# ---------------------------------------------------------------------------------------- clocks


def look_clocks(subject: Subject) -> Values:
    """Collective. This rank's wall clock minus the root's, and by how much that may be wrong, in seconds."""
    found = subject.context.all_gather(compare_clocks(subject.context, time_ns))[0]
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
