"""The job: what Slurm says of it, the clocks of its hosts, and whether processes can be started."""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from time import time_ns

import numpy as np

from hpc_train.core.formatting import plural
from hpc_train.core.job_environment import JobEnvironment
from hpc_train.doctor import transport_counters
from hpc_train.doctor.check import (
    Answer,
    Finding,
    Status,
    Subject,
    Values,
    by_host,
    fail,
    not_applicable,
    ok,
    ranks_of,
    time_text,
    warn,
)
from hpc_train.train.comm.clocks import compare_clocks
from hpc_train.train.comm.context import Context

_OFF_WARN_S, _OFF_FAIL_S = 0.1, 10.0
_STALE_VARIABLES = "unset ${!SLURM_*}   # left over from another job: submit with sbatch"
_FORK_SAFE = ("RDMAV_FORK_SAFE", "IBV_FORK_SAFE")
_COPIES_PINNED_PAGES = (5, 12)  # from this Linux on, a fork copies pages that an adapter writes to

# ---------------------------------------------------------------------------------------- Slurm


def probe_slurm(subject: Subject) -> Values:
    """What Slurm says of this rank, and what MPI and the system say."""
    world = subject.context.world
    return {
        "job": asdict(JobEnvironment.from_variables(subject.environ)),
        "rank": world.rank,
        "size": world.size,
        "local_rank": world.local_rank,
        "num_cores": len(os.sched_getaffinity(0)),
    }


def evaluate_slurm(answers: Sequence[Answer]) -> Finding:
    """Whether Slurm counts ranks as MPI does, and the job uses what it was given."""
    jobs = [JobEnvironment(**answer.values["job"]) for answer in answers]
    if all(job.job_id is None for job in jobs):
        return not_applicable("not in a Slurm job")
    if len({job.job_id for job in jobs}) > 1:
        ids = ", ".join(sorted({str(job.job_id) for job in jobs}))
        return fail(f"ranks are in different jobs: {ids}", _STALE_VARIABLES)
    for answer, job in zip(answers, jobs, strict=True):
        if job.launcher == "srun" and (seen := _disagreement(job, answer.values)):
            remedy = "srun --mpi=pmix ...   # srun --mpi=list prints the choices"
            return fail(seen, remedy, [answer])
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
    seen = f"job {job.job_id}: {plural(num_ranks, 'rank')} on {plural(num_hosts, 'node')}"
    if num_hosts > num_nodes > 0:
        return fail(f"{seen}, but Slurm allocated {num_nodes}", _STALE_VARIABLES)
    short = [answer for answer in answers if answer.values["num_cores"] < cpus_per_task]
    if short:
        return fail(
            f"SLURM_CPUS_PER_TASK = {cpus_per_task}, but a rank may use {short[0].values['num_cores']}",
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK   # mpirun: --bind-to none",
            short,
        )
    if num_ranks > 1 and num_hosts < num_nodes:
        return warn(f"{seen} of {num_nodes} allocated", f"srun -N {num_nodes} ...   # mpirun: --map-by node")
    # A step may have fewer tasks than the job on purpose: only mpirun's number of ranks is compared.
    if job.launcher == "mpirun" and num_ranks > 1 and job.num_tasks not in (None, num_ranks):
        remedy = f"mpirun -n {job.num_tasks} ...   # or #SBATCH --ntasks={num_ranks}"
        return warn(f"{seen}, but SLURM_NTASKS = {job.num_tasks}", remedy)
    return ok(seen)


# ---------------------------------------------------------------------------------------- clocks


def probe_clocks(subject: Subject) -> Values:
    """Collective. This rank's wall clock minus the root's, and the error bound of that, in seconds."""
    world = subject.context.world
    each = replace(subject.context, world=replace(world, node_root=world.rank))  # ranks of one host, too
    found = subject.context.all_gather(compare_clocks(each, time_ns))[0]
    offset_ns, error_ns = found[subject.context.world.rank]
    return {"offset_s": offset_ns / 1e9, "error_s": error_ns / 1e9}


def evaluate_clocks(answers: Sequence[Answer]) -> Finding:
    """Whether the hosts' wall clocks agree."""
    if len(answers) == 1:
        return not_applicable("one rank, one clock")
    worst = max(answers, key=lambda answer: abs(answer.values["offset_s"]))
    error_s = max(answer.values["error_s"] for answer in answers)
    seen = f"wall clocks differ by at most {time_text(abs(worst.values['offset_s']))} (+- {time_text(error_s)})"
    off = [answer for answer in answers if abs(answer.values["offset_s"]) > _OFF_WARN_S + answer.values["error_s"]]
    if off:
        status: Status = "fail" if abs(worst.values["offset_s"]) > _OFF_FAIL_S else "warn"
        remedy = "chronyc tracking; sudo chronyc makestep   # on that host; file times and logs disagree"
        return Finding(status, seen, remedy, ranks_of(off))
    return ok(seen)


# ---------------------------------------------------------------------------------------- fork


def probe_fork(subject: Subject) -> Values:
    """Starts a program, then forks as a DataLoader does; the child writes to memory and ends.

    intact: whether the parent's receive buffer is unchanged, and MPI still receives into it.
    """
    values: Values = {"spawn_error": None, "fork_error": None, "intact": True, "kernel": platform.release()}
    values["verbs"] = [name for name in transport_counters.open_devices() if "uverbs" in name]
    values["set"] = [name for name in _FORK_SAFE if subject.environ.get(name, "") not in ("", "0")]
    try:
        subprocess.run(("true",), check=True, timeout=5)  # vfork or posix_spawn, as for git and sacct
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
    """Collective. Memory that MPI received into: half a MiB with the number of ranks."""
    buffer = np.empty(1 << 16) if buffer is None else buffer
    buffer[:] = context.sum(np.ones_like(buffer))
    return buffer


def evaluate_fork(answers: Sequence[Answer]) -> Finding:
    """Whether processes can be started, and a fork leaves MPI's memory unchanged."""
    refused = [answer for answer in answers if answer.values["spawn_error"] or answer.values["fork_error"]]
    if refused:
        values = refused[0].values
        seen = f"no process can be started: {values['spawn_error'] or values['fork_error']}"
        return fail(seen, "ulimit -u; cat /sys/fs/cgroup/pids.max; free -g   # remaining processes and memory", refused)
    broken = [answer for answer in answers if not answer.values["intact"]]
    if broken:
        return fail("a fork changed memory that MPI receives into", "export RDMAV_FORK_SAFE=1 IBV_FORK_SAFE=1", broken)
    values = answers[0].values
    version = tuple(int(number) for number in re.findall(r"\d+", values["kernel"])[:2])
    exposed = [answer for answer in answers if answer.values["verbs"] and not answer.values["set"]]
    if exposed and version < _COPIES_PINNED_PAGES:
        seen = f"verbs are in use, and on Linux {values['kernel']} a forked worker may corrupt messages"
        return warn(seen, "export RDMAV_FORK_SAFE=1 IBV_FORK_SAFE=1", exposed)
    how = (
        f"verbs in use, {' and '.join(values['set']) or 'Linux ' + values['kernel']}"
        if values["verbs"]
        else "no verbs in use"
    )
    return ok(f"programs start, and a fork leaves MPI's memory unchanged ({how})")
