"""`hpc-train report`: speedup, efficiency and energy of runs."""

import sys
from pathlib import Path
from typing import Any

import click

from hpc_train.cli.options import FiniteNumber, UserPath, on_first_rank
from hpc_train.core.errors import UserError
from hpc_train.core.redaction import printable


@click.command()
@click.argument("runs", nargs=-1, required=True, type=UserPath())
@click.option("--output", type=UserPath(), help="Folder for report.html, scaling.csv and summary.json.")
@click.option(
    "--figures",
    type=UserPath(),
    metavar="DIR",
    help="Write every figure there too, as PDF and SVG one column wide, for a proposal.",
)
@click.option(
    "--trace",
    type=UserPath(),
    metavar="FILE",
    help="Write every rank's steps as a timeline for Perfetto (ui.perfetto.dev): trace.json.gz.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["table", "md", "csv", "json"]),
    help="What is printed: tables for the terminal (table, the default), Markdown to paste, numbers for programs.",
)
@click.option("--full", is_flag=True, help="Print every table and note instead of one screen.")
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option(
    "--target-loss",
    type=FiniteNumber(),
    metavar="LOSS",
    help="Compare times to this training loss (default: the best loss that every run reached).",
)
@click.option("--pue", type=FiniteNumber(1, 10), help="The centre's power usage effectiveness; overrides [energy] pue.")
@click.option("--co2-g-per-kwh", type=FiniteNumber(0, 1e9), metavar="GRAMS", help="CO2 per kWh; overrides [energy].")
@click.option(
    "--price-per-kwh", type=FiniteNumber(0, 1e9), metavar="PRICE", help="Overrides [energy]; needs --currency."
)
@click.option("--currency", metavar="NAME", help="Currency of the price, such as EUR.")
@on_first_rank
def report(
    runs: tuple[Path, ...],
    output: Path | None,
    figures: Path | None,
    trace: Path | None,
    kind: str | None,
    full: bool,
    as_json: bool,
    **options: float | str | None,
) -> None:
    """Speedup, efficiency and energy of RUNS (run directories, or folders of them).

    Prints the answer and one table, and writes a page with every table and figure. A run that cannot be read is
    skipped and named. The exit code is 1 if a section could not be made, which says so in its place, and 2 if there
    is nothing to report.

    \b
    Example: hpc-train report runs/softmax-mnist --figures proposal/
    """
    if options["price_per_kwh"] is not None and options["currency"] is None:
        raise click.UsageError("--price-per-kwh needs --currency, such as EUR")
    if as_json and kind not in (None, "json"):
        raise click.UsageError(f"--json is --format json, and --format {kind} is given too: leave one of them out.")
    kind = "json" if as_json else kind or "table"
    if full and kind != "table":
        raise click.UsageError(f"--full is for the terminal's tables; --format {kind} always has everything.")
    print_report(runs, output, figures, kind, full, trace=trace, **options)


def print_report(
    runs: tuple[Path, ...],
    output: Path | None,
    figures: Path | None,
    kind: str,
    full: bool = False,
    target_loss: Any = None,
    trace: Path | None = None,
    **tariff: Any,
) -> None:
    """Prints the report as `kind` and writes its files, whose paths the terminal's tables end with."""
    from hpc_train.analysis.energy.cost import Tariff
    from hpc_train.analysis.report.renderers.figures import write_figures
    from hpc_train.analysis.report.renderers.files import default_output, to_csv, to_json, write_report
    from hpc_train.analysis.report.renderers.markdown import to_markdown
    from hpc_train.analysis.report.renderers.terminal import print_full, print_short
    from hpc_train.analysis.report.report import make_report
    from hpc_train.core.terminal import open_console

    report = make_report(list(runs), Tariff(**tariff), target_loss)
    if kind == "table":
        (print_full if full else print_short)(report, open_console())
    else:
        render = {"md": to_markdown, "csv": to_csv, "json": to_json}[kind]
        click.echo(render(report), nl=False)
    drawn = None if figures is None else write_figures(report, figures)
    page = write_report(report, output or default_output(list(runs)))
    if kind == "table":
        click.echo(printable(f"Report: {page}"))
        if drawn is not None:
            found = f"{len(drawn)} files in {figures}" if drawn else "none, no step was timed."
            click.echo(printable(f"Figures: {found}"))
    if trace is not None:
        _write_trace(runs, trace)
        if kind == "table":
            click.echo(printable(f"Trace: {trace}"))
    if report.guard.faults:
        click.echo("\n".join(["hpc-train: the report is not complete.", *report.guard.faults]), err=True)
        sys.exit(1)


def _write_trace(runs: tuple[Path, ...], path: Path) -> None:
    from hpc_train.analysis.runs.load import load
    from hpc_train.analysis.trace.chrome_trace import write_trace
    from hpc_train.core.rundir import find

    found = find(list(runs))
    if len(found) > 1:
        raise UserError(f"--trace draws one run, and these are {len(found)}", f"Name one of them: {found[0].path}")
    write_trace(load(found[0]), path)
