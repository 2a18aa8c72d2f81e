"""`hpc-train doctor`: what works on this machine, and how to fix the rest."""

import sys
from pathlib import Path

import click

from hpc_train.cli.options import UserPath, job_file, overrides_option


@click.command()
@click.argument("config", required=False, type=UserPath())
@overrides_option
@click.option("--json", "as_json", is_flag=True, help="Print what every rank saw as JSON instead of a table.")
def doctor(config: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Test what works on this machine, and print how to fix the rest. Run it alone, or under mpirun or srun like a job.

    Checks MPI, an all-reduce and its transport, cores, GPUs, Horovod, files and locks, energy meters, Slurm, clocks and
    fork, in seconds; with CONFIG also what that job needs. The exit code is 1 if a check fails.

    \b
    Example: mpirun -n 2 hpc-train doctor configs/mlp-mnist.toml
    """
    from hpc_train.doctor.supervisor import examine

    sys.exit(examine(job_file(config) if config else None, overrides, as_json))
