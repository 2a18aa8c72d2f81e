"""`hpc-train bench allreduce`: what ranks need to sum the same bytes, as tables, a figure and a file for `plan`."""

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import accumulate
from operator import mul
from pathlib import Path
from time import monotonic
from typing import Any

import click

from hpc_train.cli.options import Finite, Place
from hpc_train.core import allreduce_times
from hpc_train.core.errors import UserError, require
from hpc_train.core.formatting import binary_size
from hpc_train.core.rundir import write_atomic

_LATENCY_BYTES = 64 << 10  # messages up to here take about as long as an empty one
_COPIES = 8  # of a message that a rank holds at most: gradients, weights, what servers and MPI receive
_WIDTH = 110  # of the tables, where the terminal is narrower or there is none


def _bytes_of(context: click.Context, option: click.Parameter, words: str | None) -> int | None:
    """4, 64K, 16M, 1G: powers of 1024."""
    if words is None:
        return None
    found = re.fullmatch(r"(\d{1,18})([KMG]?)(i?B)?", words.strip(), re.IGNORECASE)
    size = int(found[1]) << (10 * " KMG".index(found[2].upper() or " ")) if found else 0
    if size < 4 or size % 4:
        raise click.BadParameter(f"{words}: a multiple of 4 bytes, as 4, 64K, 16M or 1G")
    return size


def _strategies_of(context: click.Context, option: click.Parameter, words: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in words.split(",")))
    for name in names:
        if name not in (*allreduce_times.OURS, *allreduce_times.PEERS):
            raise click.BadParameter(f"{name}: of {', '.join((*allreduce_times.OURS, *allreduce_times.PEERS))}")
    return names


@click.command()
@click.option("--min", "least", default="4", show_default=True, callback=_bytes_of, help="Bytes: 4, 64K, 16M ...")
@click.option(
    "--max", "most", callback=_bytes_of, help="Bytes; 1G where memory and --minutes allow, unless it is given."
)
@click.option("--repeat", type=click.IntRange(2, 10_000), default=11, show_default=True, help="Samples of each.")
@click.option(
    "--strategies",
    default=",".join((*allreduce_times.OURS, *allreduce_times.PEERS)),
    callback=_strategies_of,
    help="Comma-separated. plain_mpi: one MPI_Allreduce; ddp_gloo: torch.distributed.  [default: all]",
)
@click.option(
    "--minutes",
    type=Finite(0, 1e6, min_open=True),
    default=5,
    show_default=True,
    help="Without --max: no size is begun that would take longer than that in all.",
)
@click.option(
    "--output", type=Place(), help="The JSON, with figures beside it.  [default: runs/bench/allreduce-TIME-npN.json]"
)
def allreduce(
    least: int, most: int | None, repeat: int, strategies: tuple[str, ...], minutes: float, output: Path | None
) -> None:
    """Latency and bus bandwidth of summing 4 B to 1 GB over ranks, by each strategy, beside memory and link.

    On 2, 4, ... ranks of a node, on one rank of each of 2, 4, ... nodes, and on all; T = 2 (N-1) latency + 2 (N-1)/N
    bytes / bandwidth is fitted, and saved where `hpc-train plan` finds it.

    \b
    Example: mpirun -n 4 hpc-train bench allreduce --max 64M
    """
    require("torch", "mpi4py")
    from hpc_train.train.comm.mpi_library import mpi_version
    from hpc_train.train.comm.startup import open_context
    from hpc_train.train.data.node_memory import available_bytes_per_rank

    with open_context(use_mpi=True) as context:
        share = 0.5 if most is None else 1.0  # what was not asked for leaves room to others
        room = int(available_bytes_per_rank(context) * share / _COPIES)
        context.on_root(partial(_require_room, least, most, room, context.world.size))
        path = context.on_root(partial(_place_for, output, context.world.size))
        from hpc_train.bench import allreduce  # torch, which takes seconds: after all that can be refused

        sizes = allreduce_times.sizes(least, most or max(least, min(1 << 30, room)))
        pace = Pace(sizes, None if most else 60 * minutes, lambda words: click.echo(words, err=True))
        rows = allreduce.measure(sizes, strategies, repeat, context, pace.go_on)
        hosts, mpi = context.gather(context.world.host), mpi_version(context).get("version", "")
        if not context.world.is_root:
            return
    facts = {"hosts": list(dict.fromkeys(hosts)), "mpi": mpi, "made": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
    _report(rows, facts | {"stopped": pace.stopped}, path)


def _require_room(least: int, most: int | None, room: int, size: int) -> None:
    if size < 2:
        raise UserError(
            "bench allreduce on one rank: nothing is summed", "Start two or more: mpirun -n 2 hpc-train bench allreduce"
        )
    if most is not None and most < least:
        raise UserError(f"--max {most} is less than --min {least}", "Name a larger one.")
    if (most or least) > room:
        raise UserError(
            f"--{'max' if most else 'min'} {most or least} bytes: each rank holds several such messages, and this "
            f"node's free memory is enough for {room:,} bytes",
            "Name a smaller size, or start fewer ranks on a node.",
        )


def _place_for(output: Path | None, size: int) -> Path:
    """The file to be, whose folder can be written."""
    path = output or Path("runs") / "bench" / f"allreduce-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-np{size}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", "Name another with --output.") from None
    return path


class Pace:
    """Says before each size what is next and what is left, and whether there is time for it.

    budget_s: None for as long as it takes.
    """

    def __init__(self, sizes: Sequence[int], budget_s: float | None, say: Callable[[str], None]) -> None:
        self._sizes, self._budget_s, self._say = sizes, budget_s, say
        self._began = self._last = monotonic()
        self.stopped = ""

    def go_on(self, place: int) -> bool:
        now, size = monotonic(), self._sizes[place]
        growth = [4 if each > _LATENCY_BYTES else 1 for each in self._sizes[place:]]  # small messages all take alike
        coming = list(accumulate(growth, mul, initial=now - self._last))[1:]
        self._last = now
        if place and self._budget_s is not None and now - self._began + coming[0] > self._budget_s:
            self.stopped = f"stopped before {binary_size(size)}: --minutes {self._budget_s / 60:g}"
            self._say(self.stopped)
            return False
        left = f", about {timedelta(seconds=round(sum(coming)))} left" if place else ""
        self._say(f"{binary_size(size)} ({place + 1} of {len(self._sizes)} sizes{left})")
        return True


def _report(rows: Sequence[allreduce_times.Row], facts: dict[str, Any], path: Path) -> None:
    from rich.console import Console

    from hpc_train.analysis.report import allreduce as report
    from hpc_train.analysis.report.renderers.terminal import fit_table

    console = Console(width=max(Console().width, _WIDTH), highlight=False)
    for table in report.tables(rows):
        click.echo(table.title)
        console.print(fit_table(table, console.width))
    for words in report.ratio_notes(rows):
        click.echo(words)
    write_atomic(path, json.dumps(allreduce_times.record(rows, facts), indent=1))
    for made in (path, *report.write_figure(rows, path)):
        click.echo(made)
