"""Micro-benchmarks of the machine, under mpirun: what its storage and its ranks can do."""

import json
from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from hpc_train.cli.bench_allreduce import allreduce
from hpc_train.cli.options import Place
from hpc_train.core.errors import UserError, require

if TYPE_CHECKING:
    from hpc_train.bench.io import Row

_COLUMNS = ("file", "read", "ranks", "cache", "T_w", "T_c", "T_r", "T_r/(T_w+T_c)", "w/MPI-IO", "r/POSIX")

_WIDTH = 110  # of the table, where the terminal is narrower or there is none
_NOTES = (
    "* Written collectively: memory maps and direct chunks only read, and gzip chunks need all ranks.",
    "cold: the file had left this machine's page cache (what a device or server keeps is out of reach); warm: the "
    "system kept it.",
    "±: half the distance of the quartiles. Last columns: speed over that of the same bytes raw, the faster mode.",
)


@click.group()
def bench() -> None:
    """Measure what this machine can do, under mpirun.

    \b
    Example: mpirun -n 2 hpc-train bench allreduce
    """


bench.add_command(allreduce)


@bench.command()
@click.option(
    "--size-mb", type=click.IntRange(1, 1 << 20), default=32, show_default=True, help="MiB in all, of all ranks."
)
@click.option(
    "--dir",
    "folder",
    type=Place(),
    default=Path("."),
    show_default=True,
    help="Where files are written, one at a time, and removed.",
)
@click.option("--repeat", type=click.IntRange(1, 10_000), default=5, show_default=True, help="Repetitions.")
@click.option("--json", "as_json", is_flag=True, help="Print every repetition as JSON instead of a table.")
def io(size_mb: int, folder: Path, repeat: int, as_json: bool) -> None:
    """Write, transfer and read times of HDF5, and of the same bytes raw: T_r = T_w + T_c, measured.

    On 1, 2, 4, ... and all ranks, each layout (contiguous, chunked, gzip chunks) in each mode (independent and
    collective MPI-IO through h5py, memory map, direct chunks), beside raw POSIX and raw MPI-IO.

    T_w: open, write, close and fsync. T_c: the same bytes from rank to rank, or copied by one. T_r: open, read, close.

    \b
    Example: mpirun -n 2 hpc-train bench io --dir /scratch
    """
    require("h5py", "mpi4py")
    from hpc_train.train.comm.startup import open_context

    with open_context(use_mpi=True) as context:
        from hpc_train.bench import io

        if size_mb < context.world.size:
            message = f"--size-mb {size_mb} is less than 1 MiB for each of {context.world.size} ranks"
            context.on_all(lambda: _refuse(UserError(message, "Name a larger size, or start fewer ranks.")))
        rows = io.measure(folder, size_mb, repeat, context, lambda words: click.echo(words, err=True))
        if not context.world.is_root:
            return
        facts = {"size_mib": size_mb, "repeat": repeat, "file_system": io.place_of(folder)}
    if as_json:
        click.echo(json.dumps({**facts, **model(rows), "rows": [_as_json(row, rows) for row in rows]}, indent=2))
        return
    _print(rows, facts)


def _refuse(error: Exception) -> None:
    raise error


# ---------------------------------------------------------------------------------------- what the rows say


def model(rows: Sequence["Row"]) -> dict[str, Any]:
    """How far T_r = T_w + T_c is from what was measured: `model_factor`, and `model_words` that say it.

    The factor of a row is the larger of r and 1/r, r being median T_r over median T_w + T_c; of all rows, the geometric
    median. 1: the model is right.
    """
    found = {(row.layout, row.mode, row.ranks): model_ratio(row) for row in rows}
    factors = {key: exp(abs(log(ratio))) for key, ratio in found.items()}
    ranked = sorted(factors, key=lambda key: factors[key])
    middle, num_below = exp(median(map(log, factors.values()))), sum(ratio < 1 for ratio in found.values())
    near, far = (
        (f"{layout}, {mode}, ranks: {ranks}", layout, mode, ranks) for layout, mode, ranks in (ranked[0], ranked[-1])
    )
    words = (
        f"T_r = T_w + T_c is off by a factor of {middle:.1f} in the median of {len(rows)} rows: from "
        f"{factors[near[1:]]:.1f} ({near[0]}) to {factors[far[1:]]:.1f} ({far[0]}). Reading took less than that sum in "
        f"{num_below} rows and more in {len(rows) - num_below}."
    )
    return {"model_factor": middle, "model_words": words}


def model_ratio(row: "Row") -> float:
    """Measured T_r over T_w + T_c."""
    return median(row.read_s) / (median(row.write_s) + median(row.transfer_s))


def against(row: "Row", rows: Sequence["Row"], layout: str, what: str) -> float | None:
    """The speed of `row` over that of raw `layout` at the same ranks, the best of its modes; medians of repetitions.

    what: "write_s" or "read_s".
    """
    raw = [getattr(other, what) for other in rows if other.layout == layout and other.ranks == row.ranks]
    ratios = [median(np.divide(seconds, getattr(row, what)).tolist()) for seconds in raw]
    return min(ratios, default=None)


def spread(seconds: Sequence[float]) -> float:
    """Half the distance of the quartiles, as a share of the median."""
    low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return float((high - low) / 2 / middle)


def _as_json(row: "Row", rows: Sequence["Row"]) -> dict[str, Any]:
    return {
        **vars(row),
        "model_ratio": model_ratio(row),
        "write_over_mpi_io": against(row, rows, "raw MPI-IO", "write_s"),
        "read_over_posix": against(row, rows, "raw POSIX", "read_s"),
    }


def _print(rows: Sequence["Row"], facts: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = f"{facts['size_mib']} MiB on {facts['file_system']}: milliseconds, medians of {facts['repeat']}"
    table = Table(*_COLUMNS, title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for row in rows:
        file = row.layout if row.mode == row.written else f"{row.layout} *"
        cells = [file, row.mode, str(row.ranks), "cold" if row.is_cold else "warm"]
        for seconds in (row.write_s, row.transfer_s, row.read_s):
            cells.append(f"{median(seconds) * 1e3:.1f} ±{spread(seconds):.0%}")
        ratios = (against(row, rows, "raw MPI-IO", "write_s"), against(row, rows, "raw POSIX", "read_s"))
        cells += [f"{model_ratio(row):.2f}", *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)]
        table.add_row(*cells)
    Console(width=max(Console().width, _WIDTH), highlight=False).print(table)
    for words in (model(rows)["model_words"], *_NOTES):
        click.echo(words)
