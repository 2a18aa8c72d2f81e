"""Who am I among the ranks: a value, passed as an argument, never looked up."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

# Launchers tell each process its rank before MPI is there: Open MPI, PMIx (srun --mpi=pmix), MPICH/Cray/Intel.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True)
class World:
    """A rank's place: its rank among all, and among those on its host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = "localhost"

    @property
    def is_root(self) -> bool:
        return self.rank == 0


def _first_int(names: tuple[str, ...], environ: Mapping[str, str]) -> int | None:
    return next((int(environ[name]) for name in names if environ.get(name, "").isdecimal()), None)


def launched_rank(environ: Mapping[str, str] = os.environ) -> int | None:
    """The rank the launcher (mpirun, srun) gave this process, or None when there was no launcher."""
    return _first_int(_RANK_VARIABLES, environ)


def launched_size(environ: Mapping[str, str] = os.environ) -> int | None:
    """How many ranks the launcher started, or None where it does not say.

    srun says it to every step; it is read only where SLURM_PROCID shows that this is a step's task and
    SLURM_STEP_ID that it is not the batch script itself.
    """
    size = _first_int(_SIZE_VARIABLES, environ)
    if size is None and "SLURM_PROCID" in environ and environ.get("SLURM_STEP_ID", "").isdecimal():
        size = _first_int(("SLURM_STEP_NUM_TASKS",), environ)
    return size
