"""`hpc-train bench`: benchmarks of the storage and the network, under mpirun."""

import json
import re
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from hpc_train.cli.options import CommandGroup, FiniteNumber, UserPath
from hpc_train.core import allreduce_times
from hpc_train.core.errors import UserError, require
from hpc_train.core.filesystem import file_system
from hpc_train.core.rundir import write_atomic

if TYPE_CHECKING:
    from hpc_train.bench.io_model import Row

_WIDTH = 110  # of tables, if the terminal is narrower or there is none
_STRATEGIES = (*allreduce_times.OURS, *allreduce_times.COMPRESSED, *allreduce_times.PEERS)
_COPIES = 8  # of a message that a rank holds at most: gradients, weights, buffers of servers and MPI
_COLUMNS = ("file", "read", "ranks", "cache", "T_w", "T_c", "T_r", "T_r/(T_w+T_c)", "w/MPI-IO", "r/POSIX")
_NOTES = (
    "* Written collectively: memory maps and direct chunks only read, and gzip chunks need all ranks.",
    "cold: the file was not in this machine's page cache (caches of devices and servers are not controlled); warm: the "
    "kernel kept it.",
    "±: half the interquartile range. Last columns: speed relative to the same bytes in a raw file in its faster mode.",
)


@click.group(cls=CommandGroup)
def bench() -> None:
    """Measure what the storage and the network of this machine can do, under mpirun.

    \b
    Example: mpirun -n 2 hpc-train bench allreduce
    """


# ---------------------------------------------------------------------------------------- allreduce


def _num_bytes(context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    """4, 64K, 16M, 1G: powers of 1024."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,18})([KMG]?)(i?B)?", text.strip(), re.IGNORECASE)
    size = int(found[1]) << (10 * " KMG".index(found[2].upper() or " ")) if found else 0
    if size < 4 or size % 4:
        raise click.BadParameter(f"{text}: write a multiple of 4 bytes, such as 4, 64K, 16M or 1G")
    return size


def _strategies(context: click.Context, option: click.Parameter, text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in _STRATEGIES:
            raise click.BadParameter(f"{name} is not one of {', '.join(_STRATEGIES)}")
    return names


@bench.command()
@click.option(
    "--min", "least", default="4", show_default=True, callback=_num_bytes, help="Smallest message: 4, 64K, 16M."
)
@click.option(
    "--max", "most", callback=_num_bytes, help="Largest message (default: 1G, if memory and --minutes allow)."
)
@click.option(
    "--repeat", type=click.IntRange(2, 10_000), default=11, show_default=True, help="Samples of each size and strategy."
)
@click.option(
    "--strategies",
    default=",".join(_STRATEGIES),
    callback=_strategies,
    help="Comma-separated. _bf16: compressed; plain_mpi: one MPI_Allreduce; ddp_gloo: torch.  [default: all]",
)
@click.option(
    "--minutes",
    type=FiniteNumber(0, 1e6, min_open=True),
    default=5,
    show_default=True,
    help="Without --max: skip sizes that would exceed this total time.",
)
@click.option(
    "--output", type=UserPath(), help="JSON file; figures go beside it.  [default: runs/bench/allreduce-TIME-npN.json]"
)
def allreduce(
    least: int, most: int | None, repeat: int, strategies: tuple[str, ...], minutes: float, output: Path | None
) -> None:
    """Latency and bus bandwidth of an all-reduce of 4 B to 1 GB with each strategy, and limits of memory and link.

    Measures 2, 4, ... ranks of a node, one rank on each of 2, 4, ... nodes, and all ranks. Fits T = 2 (N-1) latency +
    2 (N-1)/N bytes / bandwidth, and saves it for `hpc-train plan --network`.

    \b
    Example: mpirun -n 4 hpc-train bench allreduce --max 64M
    """
    require("torch", "mpi4py")
    from hpc_train.bench.pace import Pace
    from hpc_train.train.comm.mpi_library import mpi_version
    from hpc_train.train.comm.startup import open_context
    from hpc_train.train.data.node_memory import available_bytes_per_rank

    with open_context(use_mpi=True) as context:
        share = 0.5 if most is None else 1.0  # leave memory to others unless a size was requested
        room = int(available_bytes_per_rank(context) * share / _COPIES)
        context.on_root(partial(_require_room, least, most, room, context.world.size))
        path = context.on_root(partial(_output_path, output, context.world.size))
        from hpc_train.bench import allreduce  # imports torch, which takes seconds: after all checks

        sizes = allreduce_times.sizes(least, most or max(least, min(1 << 30, room)))
        pace = Pace(sizes, None if most else 60 * minutes, lambda words: click.echo(words, err=True))
        rows = allreduce.measure(sizes, strategies, repeat, context, pace.may_continue)
        hosts, mpi = context.gather(context.world.host), mpi_version(context).get("version", "")
        if not context.world.is_root:
            return
    facts = {"hosts": list(dict.fromkeys(hosts)), "mpi": mpi, "made": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
    _report_allreduce(rows, facts | {"stopped": pace.stopped}, path)


def _require_room(least: int, most: int | None, room: int, size: int) -> None:
    if size < 2:
        raise UserError("bench allreduce needs two or more ranks", "mpirun -n 2 hpc-train bench allreduce")
    if most is not None and most < least:
        raise UserError(f"--max {most} is less than --min {least}", "Choose a larger --max.")
    if (most or least) > room:
        raise UserError(
            f"--{'max' if most else 'min'} {most or least} bytes: each rank holds several such messages, and this "
            f"node has memory for {room:,} bytes",
            "Choose a smaller size, or start fewer ranks per node.",
        )


def _output_path(output: Path | None, size: int) -> Path:
    """The output file. Raises `UserError` if its folder cannot be written."""
    path = output or Path("runs") / "bench" / f"allreduce-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-np{size}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", "Choose another with --output.") from None
    return path


def _report_allreduce(rows: Sequence[allreduce_times.Row], facts: dict[str, Any], path: Path) -> None:
    from hpc_train.analysis.report import allreduce as report
    from hpc_train.analysis.report.renderers.terminal import fit_table
    from hpc_train.core.terminal import open_console

    console = open_console(width=max(open_console().width, _WIDTH), highlight=False)
    for table in report.tables(rows):
        click.echo(table.title)
        console.print(fit_table(table, console.width))
    for note in report.ratio_notes(rows):
        click.echo(note)
    write_atomic(path, json.dumps(allreduce_times.record(rows, facts), indent=1))
    for written in (path, *report.write_figure(rows, path)):
        click.echo(written)


# ---------------------------------------------------------------------------------------- io


@bench.command()
@click.option(
    "--size-mb", type=click.IntRange(1, 1 << 20), default=32, show_default=True, help="MiB of all ranks together."
)
@click.option(
    "--dir",
    "folder",
    type=UserPath(),
    default=Path("."),
    show_default=True,
    help="Where files are written, one at a time, and removed.",
)
@click.option("--repeat", type=click.IntRange(1, 10_000), default=5, show_default=True, help="Repetitions.")
@click.option("--json", "as_json", is_flag=True, help="Print every repetition as JSON instead of a table.")
def io(size_mb: int, folder: Path, repeat: int, as_json: bool) -> None:
    """Write, transfer and read times of HDF5 and of raw files, to test the storage model T_r = T_w + T_c.

    On 1, 2, 4, ... and all ranks: each layout (contiguous, chunked, gzip chunks) in each mode (independent and
    collective MPI-IO through h5py, memory map, direct chunks), and raw POSIX and MPI-IO.

    T_w: open, write, close and fsync. T_c: the same bytes sent from rank to rank. T_r: open, read, close.

    \b
    Example: mpirun -n 2 hpc-train bench io --dir /scratch
    """
    require("h5py", "mpi4py")
    from hpc_train.train.comm.startup import open_context

    with open_context(use_mpi=True) as context:
        from hpc_train.bench import io, io_model

        if size_mb < context.world.size:
            message = f"--size-mb {size_mb} is less than 1 MiB for each of {context.world.size} ranks"
            context.on_all(lambda: _refuse(UserError(message, "Choose a larger size, or start fewer ranks.")))
        rows = io.measure(folder, size_mb, repeat, context, partial(click.echo, err=True))
        if not context.world.is_root:
            return
        facts = {"size_mib": size_mb, "repeat": repeat, "file_system": file_system(folder)}
    if as_json:
        click.echo(
            json.dumps({**facts, **io_model.model(rows), "rows": [_as_json(row, rows) for row in rows]}, indent=2)
        )
        return
    _print_io(rows, facts)


def _refuse(error: Exception) -> None:
    raise error


def _as_json(row: "Row", rows: Sequence["Row"]) -> dict[str, Any]:
    from hpc_train.bench.io_model import model_ratio, speed_over

    return {
        **vars(row),
        "model_ratio": model_ratio(row),
        "write_over_mpi_io": speed_over(row, rows, "raw MPI-IO", "write_s"),
        "read_over_posix": speed_over(row, rows, "raw POSIX", "read_s"),
    }


def _print_io(rows: Sequence["Row"], facts: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    from hpc_train.bench.io_model import model, model_ratio, speed_over, spread
    from hpc_train.core.terminal import open_console

    title = f"{facts['size_mib']} MiB on {facts['file_system']}: milliseconds, medians of {facts['repeat']}"
    table = Table(*_COLUMNS, title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for row in rows:
        file = row.layout if row.mode == row.written else f"{row.layout} *"
        cells = [file, row.mode, str(row.ranks), "cold" if row.is_cold else "warm"]
        for seconds in (row.write_s, row.transfer_s, row.read_s):
            cells.append(f"{median(seconds) * 1e3:.1f} ±{spread(seconds):.0%}")
        ratios = (speed_over(row, rows, "raw MPI-IO", "write_s"), speed_over(row, rows, "raw POSIX", "read_s"))
        cells += [f"{model_ratio(row):.2f}", *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)]
        table.add_row(*cells)
    open_console(width=max(open_console().width, _WIDTH), highlight=False).print(table)
    for note in (model(rows)["model_words"], *_NOTES):
        click.echo(note)
