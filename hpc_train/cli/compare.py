"""`hpc-train compare`: did it get slower?"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpc_train.cli.options import UserPath, on_first_rank
from hpc_train.core.redaction import printable

if TYPE_CHECKING:
    from hpc_train.analysis.comparison.comparison import RunComparison


def _percent(ctx: click.Context, param: click.Parameter, value: str) -> float:
    try:
        percent = float(value.strip().removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not value.strip().endswith("%") or not 0 <= percent <= 1000:  # is 0.05 a twentieth, or 0.05%?
        raise click.BadParameter(f"{value}: write a percentage with its sign, such as 3%")
    return percent / 100


@click.command()
@click.argument("before", type=UserPath())
@click.argument("after", type=UserPath(), required=False)
@click.option(
    "--threshold", default="3%", callback=_percent, metavar="PERCENT", help="Smaller changes are none (default: 3%)."
)
@click.option("--save", type=UserPath(), metavar="FILE", help="Write BEFORE into FILE, a baseline: baseline.json.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
@on_first_rank
def compare(before: Path, after: Path | None, threshold: float, save: Path | None, as_json: bool) -> None:
    """Did it get slower? Compares the runs AFTER a change with those BEFORE it.

    Each is a run, a folder of repeats, or a baseline (.json) that --save wrote. Prints what changed and by how much:
    step time, phases, energy, loss, memory, single hosts and ranks; and what differs in configuration, software and
    hardware. A change counts if it is beyond the threshold and its 95% interval excludes no change: take three
    repeats a side; one a side judges nothing. The exit code is 1 for a regression, and 2 for runs of unlike jobs.

    \b
    Example: hpc-train compare runs/main --save baseline.json
             hpc-train compare baseline.json runs/branch --threshold 5%
    """
    from hpc_train.analysis.comparison.comparison import compare_sides
    from hpc_train.analysis.comparison.sides import load_side, write_baseline
    from hpc_train.analysis.report.sections.comparison import record

    if after is None and save is None:
        raise click.UsageError("compare needs two sides, BEFORE and AFTER, or --save with one")
    if save is not None and save.suffix != ".json":
        raise click.UsageError(f"--save {save}: a baseline's name ends in .json")
    sides = []
    for path in (before, after):
        if path is not None:
            side, notes = load_side(path)
            sides.append(side)
            for note in notes:
                click.echo(printable(note), err=True)
    if save is not None:
        write_baseline(save, sides[0])
        click.echo(printable(_saved_text(save, len(sides[0].runs))), err=True)
    if len(sides) < 2:
        return
    comparison = compare_sides(sides[0], sides[1], threshold)
    if as_json:
        click.echo(json.dumps(record(comparison), indent=2))
    else:
        _print(comparison)
    if comparison.is_regression:
        sys.exit(1)


def _saved_text(path: Path, num_runs: int) -> str:
    few = "" if num_runs > 2 else " Three repeats or more make a baseline that shows small changes."
    return f"Baseline of {num_runs} run{'s' * (num_runs != 1)}: {path}.{few}"


def _print(comparison: "RunComparison") -> None:
    from hpc_train.analysis.report.renderers.terminal import fit_table, safe_text
    from hpc_train.analysis.report.sections.comparison import answer, comparison_tables
    from hpc_train.core.terminal import open_console

    console = open_console()
    first, *more = answer(comparison)
    console.print(safe_text(first, "bold"), *map(safe_text, more), "", sep="\n")
    for table in comparison_tables(comparison):
        console.print(safe_text(table.title), fit_table(table, console.width), sep="\n")
