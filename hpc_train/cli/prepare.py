"""`hpc-train prepare` and `hpc-train stage`: make data sets, and copy them to the nodes."""

import sys
from pathlib import Path

import click

from hpc_train.cli.options import FiniteNumber, UserPath
from hpc_train.core.errors import require
from hpc_train.core.job_environment import JobEnvironment

_DATASETS = (
    *("mnist-5k", "auto-mpg", "burgers", "fashion-mnist", "mnist", "images", "table", "hdf5", "netcdf", "zarr"),
    *("text", "python-source", "shakespeare"),
)


def _dataset(ctx: click.Context, param: click.Parameter, value: str) -> str:
    module, _, function = value.partition(":")
    if value not in _DATASETS and not all(part.isidentifier() for part in (*module.split("."), function)):
        raise click.BadParameter(f"{value!r} is not one of {', '.join(_DATASETS)}, or package.module:function")
    return value


@click.command()
@click.argument("dataset", metavar="DATASET", callback=_dataset)
@click.argument("output", metavar="FILE|URL")
@click.option(
    "--from",
    "origin",
    multiple=True,
    type=click.Path(path_type=Path, exists=False),
    help="Where the data come from (text: repeatable).",
)
@click.option("--tokenizer", metavar="bytes|bpe:N", help="For text: bytes, or N byte pairs learned from it.")
@click.option("--size", type=click.IntRange(1), metavar="PIXELS", help="For images: crop to it (224).")
@click.option("--target", metavar="COLUMN,...", help="For a table: columns (.npz: array) to learn.")
@click.option("--drop", metavar="COLUMN,...", help="For a table: columns to leave out.")
@click.option("--categories", type=click.Choice(["one-hot", "codes"]), help="For a table: text (one-hot).")
@click.option("--like", type=UserPath(), metavar="TRAIN.h5", help="For a table: new rows, with its columns.")
@click.option(
    "--array", "arrays", multiple=True, metavar="NEW=NAME[:TYPE]", help="For arrays: one to take (repeatable)."
)
@click.option("--rows", metavar="START:STOP[:STEP]", help="For arrays: which rows of each.")
@click.option("--test-fraction", type=FiniteNumber(0, 0.5), metavar="SHARE", help="Of the rows to test on (0.1).")
@click.option("--compress", metavar="gzip:N|lzf|zstd:N", help="Write compressed chunks, which read slower.")
@click.option(
    "--memory-mb",
    type=click.IntRange(16),
    default=512,
    metavar="MB",
    help="For the data, of a node's ranks together (512).",
)
@click.option("--overwrite", is_flag=True, help="Make the output again if it exists or was begun.")
def prepare(
    dataset: str,
    output: str,
    origin: tuple[Path, ...],
    tokenizer: str | None,
    size: int | None,
    target: str | None,
    drop: str | None,
    categories: str | None,
    like: Path | None,
    arrays: tuple[str, ...],
    rows: str | None,
    test_fraction: float | None,
    compress: str | None,
    memory_mb: int,
    overwrite: bool,
) -> None:
    """Write a data set to HDF5, on one rank or in parallel under mpirun.

    DATASET: mnist-5k, auto-mpg, fashion-mnist, mnist; burgers (fields of a flow, in netCDF-4); images (a folder per
    class); table (.csv, .parquet, .npy, .npz; --like: rows to predict); arrays of hdf5, netcdf or zarr, renamed, cast
    and in part; text, python-source or shakespeare as tokens; or package.module:function, a function of yours that
    yields (input, target).
    After a kill, the same command resumes.
    A file for a URL (webhdfs://, hdfs://, s3://) is made in $TMPDIR first.

    \b
    Example: mpirun -n 2 hpc-train prepare fashion-mnist data/fashion-mnist.h5
             hpc-train prepare mnist-5k webhdfs://namenode:9870/data/mnist-5k.h5
             hpc-train prepare images data/pets.h5 --from pets --size 64
             hpc-train prepare table data/wine.h5 --from wine.csv --target taste
             hpc-train prepare table new.h5 --from new.csv --like data/wine.h5
             hpc-train prepare netcdf data/sst.h5 --from sst.nc \\
               --array inputs=sst:float32 --array targets=nino
    """
    require("h5py")
    from hpc_train.train.comm.startup import open_context

    with open_context(use_mpi=JobEnvironment.current().is_launched) as context:
        from hpc_train.datasets.prepare.prepare import prepare as write
        from hpc_train.datasets.prepare.sources import Options

        options = Options(size, target, test_fraction, tokenizer, drop, categories, arrays, rows, like)
        write(dataset, origin, output, context, overwrite, options, compress, memory_mb)


@click.command()
@click.argument("source", metavar="URL|FILE")
@click.argument("folder", metavar="DIR", type=UserPath(file_okay=False))
@click.option(
    "--wait",
    "wait_s",
    type=FiniteNumber(0, 1e6, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up if no byte comes for this long.",
)
@click.option("--check", "is_checked", is_flag=True, help="Then verify it as `data check` does, all ranks together.")
def stage(source: str, folder: Path, wait_s: float, is_checked: bool) -> None:
    """Copy a file to DIR on every node, once a node, or reuse a complete copy. The last line printed is its path.

    With --check, faults in its content are printed to stderr, and the exit code is 1.

    \b
    Example:
      srun --ntasks-per-node=1 \\
        hpc-train stage webhdfs://namenode:9870/data/mnist-5k.h5 "$TMPDIR"
      srun hpc-train train configs/softmax-mnist.toml \\
        --set data.file="$TMPDIR/mnist-5k.h5"
    """
    require("fsspec", *["h5py"] * is_checked)
    from hpc_train.train.comm.startup import open_context

    with open_context(use_mpi=JobEnvironment.current().is_launched) as context:
        from hpc_train.datasets.stage import stage as copy

        path = copy(source, folder, context, wait_s)
        if is_checked:
            from hpc_train.cli.data import check_lines
            from hpc_train.datasets.inspect.check import check

            checked = check([path], context, quiet=True)
            if checked.faults and context.world.is_root:
                click.echo("\n".join(check_lines(checked)), err=True)
    if is_checked and checked.faults:
        sys.exit(1)
