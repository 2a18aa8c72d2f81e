"""What launchers and Slurm put into the environment, as one value."""

import pytest

from hpc_train.core.job_environment import JobEnvironment

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
of = JobEnvironment.from_variables


def test_outside_of_any_job() -> None:
    job = of({})
    assert job == JobEnvironment()
    assert job.is_first_rank and not job.is_launched and job.launcher is None


@pytest.mark.parametrize(
    "variables, expected",
    [
        (MPIRUN, ("mpirun", 2, 3, 1)),
        (STEP, ("srun", None, 4, None)),
        (STEP | {"PMIX_RANK": "1", "SLURM_LOCALID": "0"}, ("srun", 1, 4, 0)),
        (STEP | MPIRUN, ("mpirun", 2, 3, 1)),  # inherited from the daemons that mpirun starts by srun
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, (None, None, None, None)),  # sbatch
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, (None, 0, 2, 0)),  # MPICH's own mpiexec
        ({"PMIX_RANK": "many", "OMPI_COMM_WORLD_SIZE": "-1"}, (None, None, None, None)),
    ],
)
def test_launchers(variables: dict[str, str], expected: tuple[object, ...]) -> None:
    job = of(variables)
    assert (job.launcher, job.rank, job.size, job.local_rank) == expected
    assert job.is_launched == (job.rank is not None) and job.is_first_rank == (job.rank in (None, 0))


def test_the_job_that_slurm_describes() -> None:
    job = of(STEP | {"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": ""})
    assert (job.job_id, job.num_nodes, job.cpus_per_task) == ("7", 2, None)


def test_cpus_of_each_node() -> None:
    assert of({"SLURM_JOB_CPUS_PER_NODE": "72(x2),36"}).cpus_per_node == (72, 72, 36)
    assert of({"SLURM_JOB_CPUS_PER_NODE": "all"}).cpus_per_node == ()
