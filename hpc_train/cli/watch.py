"""`hpc-train runs` and `hpc-train watch`: which runs there are, and how one of them does while it trains."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING

import click

from hpc_train.cli.options import FiniteNumber, UserPath, on_first_rank

if TYPE_CHECKING:
    from hpc_train.analysis.live.status import RunStatus


@click.command()
@click.argument("folder", type=UserPath(), default="runs")
@click.option("--json", "as_json", is_flag=True, help="Print a list of records as JSON.")
@on_first_rank
def runs(folder: Path, as_json: bool) -> None:
    """Lists the runs below FOLDER (default: runs), the newest last.

    Each with its state, steps, loss and speed: training, starting, complete, stopped (with a checkpoint), failed,
    killed, or silent (no sign of its job).

    \b
    Example: hpc-train runs
             hpc-train runs runs/mlp-mnist --json
    """
    from hpc_train.analysis.live.screen import record, runs_table
    from hpc_train.analysis.live.status import read_status
    from hpc_train.core.rundir import find
    from hpc_train.core.terminal import open_console

    found = sorted((read_status(run) for run in find([folder])), key=lambda status: status.path.name)
    if as_json:
        click.echo(json.dumps([record(status) for status in found], indent=2))
    else:
        open_console().print(runs_table(found))


@click.command()
@click.argument("run", type=UserPath())
@click.option("--once", is_flag=True, help="Print the state now and end.")
@click.option(
    "--every", default=2.0, metavar="S", type=FiniteNumber(min=0.2), help="Seconds between two looks (default: 2)."
)
@click.option("--json", "as_json", is_flag=True, help="Print each state as a line of JSON.")
@on_first_rank
def watch(run: Path, once: bool, every: float, as_json: bool) -> None:
    """Shows how RUN does while it trains: from any machine that sees its files, without touching it.

    RUN is a run directory, or a folder of which the newest run is watched. Shows steps and time left, the loss,
    samples/s, exposed communication, the slowest rank, energy and power, checkpoints. Ends when the run ends; Ctrl-C
    ends the watching only.

    \b
    Example: hpc-train watch runs/mlp-mnist
             hpc-train watch runs/mlp-mnist --once --json
    """
    from hpc_train.analysis.live.screen import record
    from hpc_train.analysis.live.status import read_status
    from hpc_train.core.rundir import find

    newest = max(find([run]), key=lambda found: found.path.name)
    look = partial(read_status, newest)
    if as_json:
        _follow(look, lambda status: click.echo(json.dumps(record(status))), once, every)
    else:
        _show(look, once, every)


def _follow(look: Callable[[], "RunStatus"], show: Callable[["RunStatus"], None], once: bool, every: float) -> None:
    """Shows the state again and again until the run is over, or once."""
    while True:
        status = look()
        show(status)
        if once or status.is_over:
            return
        sleep(every)


def _show(look: Callable[[], "RunStatus"], once: bool, every: float) -> None:
    from rich.live import Live

    from hpc_train.analysis.live.screen import screen
    from hpc_train.core.terminal import open_console

    console = open_console()
    has_blocks = console.encoding.lower().startswith("utf")
    if once or not console.is_terminal:
        _follow(look, lambda status: console.print(screen(status, console.width, has_blocks)), once, every)
        return
    with Live(console=console, auto_refresh=False) as live:
        _follow(look, lambda status: live.update(screen(status, console.width, has_blocks), refresh=True), once, every)
