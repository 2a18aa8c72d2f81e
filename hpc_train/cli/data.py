"""`hpc-train data`: what HDF5 files hold, whether they are whole, and how fast they can be read."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from hpc_train.cli.options import by_first_rank
from hpc_train.core import child_process
from hpc_train.core.errors import require
from hpc_train.core.job_environment import JobEnvironment

if TYPE_CHECKING:
    from hpc_train.datasets.inspect.check import Checked
    from hpc_train.datasets.inspect.structure import Fault

_MOST_LINES = 10  # of one kind of a data set; --json has them all

_files = click.argument("files", nargs=-1, required=True, metavar="FILE...")
_json = click.option("--json", "as_json", is_flag=True, help="Print all that was found as JSON.")


@click.group()
def data() -> None:
    """Look at HDF5 files, and verify them.

    \b
    Example: hpc-train data info data/mnist-5k.h5
    """


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
    require("h5py")
    notes = child_process.go_on_in_child()  # damaged files make HDF5 crash
    from hpc_train.train.comm.startup import open_context

    with open_context(use_mpi=JobEnvironment.current().is_launched) as context:
        from hpc_train.datasets.inspect.check import check as verify
        from hpc_train.datasets.inspect.structure import expand

        checked = verify(context.on_root(lambda: expand(files)), context, quiet=as_json, at=notes.at)
        if context.world.is_root:
            click.echo(json.dumps(asdict(checked), indent=2) if as_json else report(checked))
    if checked.faults or (strict and checked.warnings):
        sys.exit(1)


@data.command()
@_files
@click.option("--no-speed", is_flag=True, help="Read nothing, and measure nothing.")
@_json
@by_first_rank
def info(files: tuple[str, ...], no_speed: bool, as_json: bool) -> None:
    """Say what FILES hold and how it lies in them, how fast it is read here, and what would make that faster.

    
    Example: hpc-train data info data/mnist-5k.h5
    """
    require("h5py")
    notes = child_process.go_on_in_child()
    from hpc_train.train.comm.startup import open_context

    with open_context(use_mpi=False) as context:
        from hpc_train.datasets.inspect.info import inform
        from hpc_train.datasets.inspect.structure import expand

        facts = inform(expand(files), context, measure=not no_speed, at=notes.at)
    click.echo(json.dumps(facts, indent=2) if as_json else "\n".join(_told(facts)))
    if facts["faults"]:
        sys.exit(1)


def _told(facts: dict[str, Any]) -> Iterator[str]:
    from hpc_train.datasets.inspect.structure import Fault

    for file in facts["files"]:
        stripes = f", {file['stripes']} stripes" if file["stripes"] is not None else ""
        yield f"{file['path']}: {file['bytes'] / 1e6:,.1f} MB on {file['file_system']}{stripes}"
        for key, value in file["attributes"].items():
            yield f"  {key}: {value}"
        for name, data in file["datasets"].items():
            yield from _told_dataset(name, data)
        if file["advice"]:
            yield "  Advice:"
        for advice in file["advice"]:
            yield f"    {advice['dataset'] + ': ' if advice['dataset'] else ''}{advice['what']}"
            yield f"      {advice['command']}"
    if facts["faults"]:
        yield "Faults:"
        yield from _lines(tuple(Fault(**fault) for fault in facts["faults"]))


def _told_dataset(name: str, data: dict[str, Any]) -> Iterator[str]:
    shape = "x".join(map(str, data["shape"])) or "one value"
    lies = data["layout"]
    if data["chunk"]:
        lies += f" {'x'.join(map(str, data['chunk']))}, {data['chunk_bytes'] / (1 << 20):,.3f} MiB each"
    lies += f", from {', '.join(data['sources'])}" if data["sources"] else ""
    lies += f", {', '.join(data['filters'])}" if data["filters"] else ""
    if data["chunk"] and data["compression_ratio"]:
        lies += f", {data['compression_ratio']:.2f} times smaller"
    lies += f", checksums {data['checksums']}" if data["checksums"] else ", no checksums"
    yield f"  {name}: {shape} {data['dtype']}, {data['bytes'] / 1e6:,.1f} MB, {lies}"
    if data["attributes"]:
        yield "    " + ", ".join(f"{key} = {value}" for key, value in data["attributes"].items())
    speed = data.get("speed", {})
    if "error" in speed:
        yield f"    not read: {speed['error']}"
    elif speed:
        words = {"shuffled": "shuffled", "shuffled_again": "again", "sequential": "in order"}
        yield "    read here: " + "; ".join(
            f"{words[way]} {each['samples_per_s']:,.0f} samples/s, {each['bytes_per_s'] / 1e6:,.0f} MB/s"
            f" ({each['page_cache']} page cache)"
            for way, each in speed.items()
        )
        if data["chunk"]:
            yield "    training takes chunks in a shuffled order and mixes their samples: near the speed in order"


def report(checked: "Checked") -> str:
    """What `check` found, in lines."""
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
