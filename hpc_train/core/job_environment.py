"""Which job, node and rank this process is: what the launcher and the scheduler put into its environment.

Everything else asks a `JobEnvironment`; no other module reads `SLURM_*`, `OMPI_COMM_*` or `PMIX_*` by name,
except `environment.py`, which copies them into meta.json.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

# Every launcher passes each process its rank before MPI starts: Open MPI, PMIx (srun --mpi=pmix), MPICH/Cray/Intel.
_RANK = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LOCAL_RANK = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


@dataclass(frozen=True)
class JobEnvironment:
    """The job, the step and the rank of this process. None: neither launcher nor scheduler says.

    A job is an allocation, a step is what one srun started in it. Under mpirun the ranks inherit a step of mpirun's
    own daemons; `launcher` tells the two cases apart.
    """

    launcher: Literal["mpirun", "srun"] | None = None  # srun: Slurm started this rank itself
    rank: int | None = None
    size: int | None = None
    local_rank: int | None = None

    job_id: str | None = None
    num_nodes: int | None = None
    num_tasks: int | None = None
    cpus_per_task: int | None = None
    cpus_per_node: tuple[int, ...] = ()  # of the job, by node

    step_id: str | None = None
    step_rank: int | None = None
    step_num_nodes: int | None = None
    step_num_tasks: int | None = None
    step_node: int | None = None  # index of this node among the nodes of the step

    @classmethod
    def current(cls) -> Self:
        """This process's. MPI_Init adds variables of a launcher under srun: keep a value from before it."""
        return cls.from_variables(os.environ)

    @classmethod
    def from_variables(cls, variables: Mapping[str, str]) -> Self:
        def number(*names: str) -> int | None:
            return next((int(variables[name]) for name in names if variables.get(name, "").isdecimal()), None)

        step_id, step_rank = number("SLURM_STEP_ID"), number("SLURM_PROCID")
        launcher = _launcher(variables, is_in_step=None not in (step_id, step_rank))
        by_srun = launcher == "srun"
        return cls(
            launcher=launcher,
            rank=number(*_RANK),
            size=number(*_SIZE, *["SLURM_STEP_NUM_TASKS"] * by_srun),
            local_rank=number(*_LOCAL_RANK, *["SLURM_LOCALID"] * by_srun),
            job_id=variables.get("SLURM_JOB_ID"),
            num_nodes=number("SLURM_JOB_NUM_NODES"),
            num_tasks=number("SLURM_NTASKS"),
            cpus_per_task=number("SLURM_CPUS_PER_TASK"),
            cpus_per_node=_repeated(variables.get("SLURM_JOB_CPUS_PER_NODE", "")),
            step_id=None if step_id is None else str(step_id),
            step_rank=step_rank,
            step_num_nodes=number("SLURM_STEP_NUM_NODES"),
            step_num_tasks=number("SLURM_STEP_NUM_TASKS"),
            step_node=number("SLURM_NODEID"),
        )

    @property
    def is_launched(self) -> bool:
        """Whether a launcher started this process as one of an MPI program's ranks."""
        return self.rank is not None

    @property
    def is_first_rank(self) -> bool:
        """Also true without a launcher."""
        return not self.rank

    @property
    def cpus_on_this_node(self) -> int | None:
        """CPUs that the job was given on this node."""
        if len(set(self.cpus_per_node)) == 1:
            return self.cpus_per_node[0]
        # `step_node` counts the step's nodes, `cpus_per_node` the job's: the same only if the step has all nodes.
        has_all_nodes = self.step_num_nodes == self.num_nodes == len(self.cpus_per_node)
        if not has_all_nodes or self.step_node is None or self.step_node >= len(self.cpus_per_node):
            return None
        return self.cpus_per_node[self.step_node]


def _launcher(variables: Mapping[str, str], is_in_step: bool) -> Literal["mpirun", "srun"] | None:
    if "OMPI_COMM_WORLD_RANK" in variables:
        return "mpirun"
    return "srun" if is_in_step else None


def _repeated(text: str) -> tuple[int, ...]:
    """Slurm's "72(x2),36" -> (72, 72, 36); () for anything else."""
    counts: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", word)
        if not match:
            return ()
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)
