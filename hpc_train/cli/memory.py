"""`hpc-train memory`: what a job's ranks need, before they are asked for."""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpc_train.cli.options import MAX_RANKS, UserPath, job_file, on_first_rank, overrides_option
from hpc_train.core.errors import UserError, require
from hpc_train.core.formatting import amount, plural

if TYPE_CHECKING:
    from hpc_train.train.memory import Memory

_MEANINGS = {  # of the parts that `train.memory.Memory` names
    "weights": "and buffers, such as running statistics",
    "gradients": "",
    "optimizer": "what it keeps for each weight",
    "activations": "what forward keeps for backward",
    "messages": "copies on the way to other ranks",
    "gaps": "that malloc keeps between tensors",
    "checkpoint": "the copy written while training goes on",
    "input": "batches",
    "base": "Python, torch, MPI and open data",
}
_UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def _num_bytes(ctx: click.Context, param: click.Parameter, words: str | None) -> float | None:
    """ "64GB" -> 64e9."""
    if words is None:
        return None
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([KMGT]?I?)B?", words.strip().upper(), re.ASCII)
    if not found or found[2] not in _UNITS or float(found[1]) == 0:
        raise click.BadParameter(f"{words}: write a size with its unit, such as 64GB or 512GiB")
    return float(found[1]) * _UNITS[found[2]]


@click.command()
@click.argument("config", type=UserPath())
@click.option("--ranks", type=click.IntRange(1, MAX_RANKS), default=1, metavar="N", help="Ranks; default: 1.")
@click.option("--ranks-per-node", type=click.IntRange(1, MAX_RANKS), metavar="R", help="Default: all on one node.")
@click.option("--node-memory", callback=_num_bytes, metavar="SIZE", help="Find the fewest full nodes that fit: 64GB.")
@click.option("--json", "as_json", is_flag=True, help="Print bytes as JSON.")
@overrides_option
@on_first_rank
def memory(
    config: Path,
    ranks: int,
    ranks_per_node: int | None,
    node_memory: float | None,
    as_json: bool,
    overrides: tuple[str, ...],
) -> None:
    """Print the memory that a rank of the job CONFIG needs, part by part.

    It follows from the shapes of the model and of a batch, which are read from the data, and is told within about 10%
    for a job on CPUs. Nothing is trained or allocated, and MPI is not needed. With GPUs, all but the base and gaps lies
    in the GPU's memory. The exit code is 1 if --node-memory holds the job on no number of nodes.

    \b
    Example: hpc-train memory configs/gpt-text.toml --ranks 8 --ranks-per-node 4
    """
    require("torch", "h5py")
    from hpc_train.core.config import load
    from hpc_train.train.comm.startup import open_context

    with open_context(use_mpi=False):
        from hpc_train.train.memory import Trial, smallest_by_strategy

        trial = Trial(load(job_file(config), overrides).config)
        needed = trial.memory(ranks, ranks_per_node)
        on_node = min(ranks, ranks_per_node or ranks)
        _require_room(node_memory, needed.base)
        fits = smallest_by_strategy(trial, on_node, node_memory) if node_memory else {}
    if as_json:
        found = {"ranks": ranks, "rank_bytes": vars(needed) | {"total": needed.total}}
        found |= {"ranks_on_node": on_node, "node_bytes": needed.total * on_node}
        smallest = {name: fitting and fitting[0] for name, fitting in fits.items()}
        click.echo(json.dumps(found | ({"smallest_ranks": smallest} if node_memory else {}), indent=2))
    else:
        _print_parts(needed, ranks, on_node)
        _print_fits(fits, on_node, node_memory)
    if fits and not any(fits.values()):
        click.echo(
            "hpc-train: the job fits on no number of such nodes. Put fewer ranks on a node (--ranks-per-node), use"
            " smaller batches (train.accumulate), or name larger nodes.",
            err=True,
        )
        sys.exit(1)


def _require_room(node_bytes: float | None, base_bytes: int) -> None:
    if node_bytes is not None and node_bytes < base_bytes:
        raise UserError(
            f"--node-memory {amount(node_bytes, 'B')}: one rank needs {amount(base_bytes, 'B')} for Python, torch, MPI"
            " and open data alone",
            "Write the memory of a node, such as 64GB.",
        )


def _print_fits(fits: "dict[str, tuple[int, Memory] | None]", on_node: int, node_memory: float | None) -> None:
    if node_memory:
        click.echo(
            f"\nFewest ranks that fit, {on_node:,} on each node of {amount(node_memory, 'B')}, in powers of two nodes:"
        )
    for name, fitting in fits.items():
        click.echo(
            f"  {name:17}" + (f"{fitting[0]:>9,}  {amount(fitting[1].total, 'B')} each" if fitting else "     none")
        )


def _print_parts(needed: "Memory", ranks: int, on_node: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Memory with {plural(ranks, 'rank')}, {on_node:,} on a node", title_justify="left")
    for name, justify in (("", "left"), ("a rank", "right"), ("a node", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, num_bytes in (*vars(needed).items(), ("total", needed.total)):
        table.add_row(name, amount(num_bytes, "B"), amount(num_bytes * on_node, "B"), _MEANINGS.get(name, ""))
    Console().print(table)
