"""`hpc-train data`: what HDF5 files hold, whether they are whole, and how fast they can be read."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from hpc_train.world import launched_rank

if TYPE_CHECKING:
    from hpc_train.train.check import Checked
    from hpc_train.train.survey import Fault

_MOST_LINES = 10  # of one kind of a data set; --json has them all

_files = click.argument("files", nargs=-1, required=True, metavar="FILE...")
_json = click.option("--json", "as_json", is_flag=True, help="Print all that was found as JSON.")


@click.group()
def data() -> None:
    """Look at HDF5 files, and verify them."""


@data.command()
@_files
@click.option("--strict", is_flag=True, help="Exit code 1 for warnings, too.")
@_json
def check(files: tuple[str, ...], strict: bool, as_json: bool) -> None:
    """Verify every chunk or block of FILES, which are one data set, and their values; under mpirun in parallel.

    Exit code 0: fine. 1: faults, each named: bytes that were changed or are missing, NaN and infinite values, labels
    and tokens out of range, unequal numbers of inputs and targets, files that disagree, data to train on in the test
    data. 2: no such file. Warnings: empty and rare classes, copies, constant samples.

    \b
    Example: hpc-train data check data/mnist-5k.h5
             mpirun -n 2 hpc-train data check "data/part-*.h5"
    """
    from hpc_train.train.context import open_context

    with open_context(use_mpi=launched_rank() is not None) as context:
        from hpc_train.train.check import check as verify
        from hpc_train.train.survey import expand

        checked = verify(context.on_root(lambda: expand(files)), context, quiet=as_json)
        if context.world.is_root:
            click.echo(json.dumps(asdict(checked), indent=2) if as_json else _report(checked))
    if checked.faults or (strict and checked.warnings):
        sys.exit(1)


def _report(checked: "Checked") -> str:
    num_files = len(checked.files)
    ranks = f" by {checked.num_ranks} ranks" * (checked.num_ranks > 1)
    head = checked.files[0] if num_files == 1 else f"{num_files:,} files, {checked.files[0]} the first"
    lines = [f"{head}: {checked.num_bytes / 1e6:,.1f} MB, read in {checked.seconds:.1f} s{ranks}"]
    for name, facts in checked.datasets.items():
        shape = "x".join(map(str, facts["shape"]))
        what = f"  {name}: {facts['samples']:,} {shape + ' ' if shape else ''}{facts['dtype']}"
        if facts["low"] is not None:
            what += f", {facts['low']:.6g} to {facts['high']:.6g}"
        if "classes" in facts:
            counts = facts["classes"].values()
            what += f", {len(counts):,} classes of {min(counts, default=0):,} to {max(counts, default=0):,} samples"
        if facts.get("constant_features"):
            what += f", {facts['constant_features']:,} of {facts['features']:,} features never change"
        if facts.get("compared") is False:
            what += ", samples not compared: its chunks cut them"
        lines.append(f"{what}; {facts['verified_by'] or 'no checksums: only readable'}")
    if checked.warnings:
        lines += ["Warnings:", *_lines(checked.warnings)]
    if checked.faults:
        lines += ["Faults:", *_lines(checked.faults)]
    else:
        lines.append("No fault found")
    return "\n".join(lines)


def _lines(faults: "tuple[Fault, ...]") -> list[str]:
    """One line each; of many of one kind the first ones, and a remedy once."""
    lines: list[str] = []
    seen: dict[tuple[str, str, str], int] = {}
    for index, fault in enumerate(faults):
        key = (fault.kind, fault.file, fault.dataset)
        seen[key] = seen.get(key, 0) + 1
        text, _, remedy = str(fault).partition("\n")
        if seen[key] <= _MOST_LINES:
            lines.append(f"  {text}")
        following = faults[index + 1] if index + 1 < len(faults) else None
        if following is None or (following.kind, following.file, following.dataset) != key:
            if seen[key] > _MOST_LINES:
                lines.append(f"  ... and {seen[key] - _MOST_LINES:,} more (--json has all)")
            if remedy:
                lines.append(f"  {remedy}")
    return lines
