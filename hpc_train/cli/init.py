"""`hpc-train init`: a job file for a data file."""

import re
import shlex
from pathlib import Path

import click

from hpc_train.cli.options import UserPath, on_first_rank
from hpc_train.core import child_process
from hpc_train.core.config import load
from hpc_train.core.errors import UserError, require
from hpc_train.core.rundir import write_atomic


@click.command()
@click.argument("data", type=UserPath())
@click.option("--output", type=UserPath(), help="The job file (NAME.toml, for data in NAME.h5).")
@click.option("--force", is_flag=True, help="Replace the job file if it exists.")
@on_first_rank
def init(data: Path, output: Path | None, force: bool) -> None:
    """Look at DATA and write a job that trains on it: task, model, scale and batch, each with its reason.

    DATA is an HDF5 or netCDF-4 file. For a table (.csv, .parquet, .npy, .npz), a folder of pictures, netCDF-3 or Zarr,
    the command that makes an HDF5 file of it is printed.

    \b
    Example: hpc-train init measurements.h5
             hpc-train train measurements.toml
    """
    require("h5py")
    from hpc_train.datasets.inspect.proposal import lines_of, preparation, propose

    if not data.exists():
        raise UserError(f"{data} does not exist", "Name an HDF5 file, a table or a folder of pictures.")
    if command := preparation(data):
        click.echo(f"First:\n  {command}\nThen:\n  hpc-train init {shlex.quote(shlex.split(command)[3])}")
        return
    job = output or Path(f"{data.stem}.toml")
    if job.exists() and not force:
        raise UserError(f"{job} exists", "Name another file with --output, or replace it: --force.")
    child_process.go_on_in_child()  # HDF5 crashes on some damaged files
    from hpc_train.datasets.inspect.structure import read_structure

    file = read_structure(data)
    if file.faults and not file.datasets:
        raise UserError(str(file.faults[0]).partition("\n")[0], "Name an HDF5 file, a table or a folder of pictures.")
    proposal = propose(file)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", data.stem).strip("-._") or "job"
    write_atomic(job, proposal.job(name, str(data)))
    load(job)
    click.echo("\n".join(lines_of(proposal)))
    command, ranks = f"hpc-train train {shlex.quote(str(job))}", min(4, proposal.batch)
    click.echo(f"\n{job} trains on it:\n  {command}" + (f"\n  mpirun -n {ranks} {command}" if ranks > 1 else ""))
