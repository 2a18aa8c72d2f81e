"""The commands that start ranks: srun and mpirun inside a job, mpirun on this machine."""

import os
from pathlib import Path

from hpc_train.cluster.site_profile import SiteProfile


def in_job(site: SiteProfile, num_ranks: int) -> list[str]:
    """The launcher of a job script."""
    if site.launcher == "mpirun":
        return ["mpirun", "-n", str(num_ranks), *site.bind]
    # One rank that ends ends the step: the others would wait for it in MPI until the time limit.
    return ["srun", f"--mpi={site.mpi}", "--kill-on-bad-exit=1", "--unbuffered", *site.bind]


def on_this_machine(num_ranks: int, num_threads: int, cores: int) -> list[str]:
    """mpirun with each rank on as many cores as it has threads; unbound if there are too few cores.

    The placement is the same at every size, because a study compares sizes.
    """
    command = ["mpirun", "--quiet", "-n", str(num_ranks)]
    if num_ranks * num_threads > cores:
        return [*command, "--oversubscribe", "--bind-to", "none"]
    return [*command, "--map-by", f"slot:PE={num_threads}", "--bind-to", "core"]


def num_cores() -> int:
    """Physical cores that this process may use. mpirun counts these, not hardware threads."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    return len(cores)
