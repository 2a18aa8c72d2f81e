"""`hpc-train simulate`: a training step on ranks, networks and strategies that nobody has measured."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpc_train.cli.options import MOST_SIMULATED, UserPath, on_first_rank, sizes
from hpc_train.core.errors import UserError

if TYPE_CHECKING:
    from hpc_train.analysis.simulation.study import Simulation

_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_ALGORITHMS = ("ring", "rabenseifner", "recursive-doubling", "tree", "hierarchical")


def _latency(ctx: click.Context, param: click.Parameter, text: str | None) -> float | None:
    found = None if text is None else re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(ns|us|ms|s)", text.strip())
    if text is not None and found is None:
        raise click.BadParameter(f"{text}: write a time, such as 2us")
    return None if found is None else float(found[1]) * _SECONDS[found[2]]


def _bandwidth(ctx: click.Context, param: click.Parameter, text: str | None) -> float | None:
    """In bytes per second."""
    unit = r"(\d{1,9}(?:\.\d{1,9})?)\s*([kMGT]?)(B|bit)/s"
    found = None if text is None else re.fullmatch(unit, text.strip())
    value = 0.0 if found is None else float(found[1]) * _PREFIXES[found[2]] / (8 if found[3] == "bit" else 1)
    if text is not None and not value:
        raise click.BadParameter(f"{text}: write a rate, such as 12.5GB/s or 100Gbit/s")
    return value or None


@click.command()
@click.argument("runs", nargs=-1, required=True, type=UserPath())
@click.option(
    "--ranks",
    "asked",
    callback=sizes,
    metavar="N,N,...",
    help="Simulate these numbers of ranks; default: 1024 to 65536.",
)
@click.option("--network", type=UserPath(), help="Measured all-reduces: a file of hpc-train bench allreduce.")
@click.option("--latency", callback=_latency, metavar="TIME", help="Of the links between nodes, as you give it: 2us.")
@click.option("--bandwidth", callback=_bandwidth, metavar="RATE", help="Of a node's link: 12.5GB/s, 100Gbit/s.")
@click.option("--ranks-per-node", type=click.IntRange(1, 100_000), help="Other nodes than those measured.")
@click.option(
    "--batch-per-rank", type=click.IntRange(1, 10_000_000), help="Samples of each rank, in place of the runs'."
)
@click.option("--stage", type=click.IntRange(0, 3), help="Of sharding, as reduce.stage; 0: an all-reduce.")
@click.option("--algorithm", type=click.Choice(_ALGORITHMS), help="Of the all-reduce; default: the strategy's.")
@click.option("--seed", type=click.IntRange(0, 1 << 31), default=0, help="Of the random draws.")
@click.option("--figure", type=UserPath(), metavar="FILE", help="Draw the steps: a file .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="Print the simulation as JSON.")
@on_first_rank
def simulate(
    runs: tuple[Path, ...],
    asked: list[int],
    network: Path | None,
    latency: float | None,
    bandwidth: float | None,
    ranks_per_node: int | None,
    batch_per_rank: int | None,
    stage: int | None,
    algorithm: str | None,
    seed: int,
    figure: Path | None,
    as_json: bool,
) -> None:
    """The time of a step on 1,000 to 100,000 ranks, another network or another strategy: estimated, not measured.

    Draws the computation of each rank as RUNS measured it, and passes its messages over links as
    hpc-train bench allreduce measured them or as given.

    \b
    Example: hpc-train simulate runs/gpt --ranks 1024,16384 --latency 2us
               --bandwidth 25GB/s --figure steps.svg
    """
    from hpc_train.analysis.report.sections.simulation import simulation_record
    from hpc_train.analysis.simulation.study import Wanted, simulate_group
    from hpc_train.cli.plan import only_group

    if max(asked, default=1) > MOST_SIMULATED:
        raise UserError(f"--ranks {max(asked)}: {MOST_SIMULATED:,} are simulated at most", "Give fewer ranks.")
    if figure is not None and figure.suffix not in (".svg", ".pdf"):
        raise UserError(f"--figure {figure}: it can be drawn as .svg and .pdf", "Write steps.svg, say.")
    if figure is not None and not figure.parent.is_dir():
        raise UserError(f"--figure {figure}: there is no folder {figure.parent}", "Create it, or choose another.")
    wanted = Wanted(network, latency, bandwidth, ranks_per_node, batch_per_rank, stage, algorithm)  # type: ignore[arg-type]
    made = simulate_group(only_group(runs, "simulate"), asked, wanted, seed)
    if as_json:
        click.echo(json.dumps(simulation_record(made), indent=2))
    else:
        _print(made)
    if figure is not None:
        _draw(made, figure)
        if not as_json:
            click.echo(f"Figure: {figure}")


def _print(made: "Simulation") -> None:
    from hpc_train.analysis.report.renderers.terminal import fit_table, safe_text
    from hpc_train.analysis.report.sections.simulation import simulation_answer, simulation_notes, simulation_tables
    from hpc_train.core.terminal import open_console

    console = open_console()
    first, *more = simulation_answer(made)
    console.print(safe_text(first, "bold"), *map(safe_text, more), "", sep="\n")
    for table in simulation_tables(made):
        console.print(safe_text(table.title), fit_table(table, console.width), sep="\n")
    for note in simulation_notes(made):
        console.print(safe_text(f"- {note}"))


def _draw(made: "Simulation", path: Path) -> None:
    from hpc_train.analysis.report.plots.canvas import figure_files
    from hpc_train.analysis.report.plots.simulation import simulation_plot
    from hpc_train.core.rundir import write_atomic

    files = figure_files(simulation_plot(made))
    try:
        write_atomic(path, files[path.suffix.removeprefix(".")])
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", "Choose another with --figure.") from None
