"""`hpc-train data`: what HDF5 files hold, whether they are intact, and how fast they can be read."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpc_train.cli.options import job_file, on_first_rank, overrides_option
from hpc_train.core import child_process
from hpc_train.core.config import load
from hpc_train.core.errors import UserError, require
from hpc_train.core.formatting import amount, binary_size
from hpc_train.core.job_environment import JobEnvironment

if TYPE_CHECKING:
    from hpc_train.datasets.inspect.check import Checked
    from hpc_train.datasets.inspect.faults import Fault

_MAX_LINES = 10  # for each kind of fault of a data set; --json has them all

_files = click.argument("files", nargs=-1, required=True, metavar="FILE...")
_json = click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")


@click.group()
def data() -> None:
    """Inspect and verify HDF5 files.

    \b
    Example: hpc-train data info data/mnist-5k.h5
    """


@data.command()
@click.argument("files", nargs=-1, required=True, metavar="CONFIG|FILE...")
@overrides_option
@click.option("--strict", is_flag=True, help="Exit code 1 for warnings, too.")
@_json
def check(files: tuple[str, ...], overrides: tuple[str, ...], strict: bool, as_json: bool) -> None:
    """Verify every chunk or block and the values of FILES, which are one data set, or of what the job CONFIG reads.

    Faults, each named: changed, missing or unwritten bytes, NaN and infinite values, labels and tokens out of range,
    unequal numbers of inputs and targets, files that differ, training samples in the test data; of a job, all that
    would end it before its first step. Warnings: empty and rare classes, copies, constant samples.
    Exit code 0: no fault. 1: faults. 2: no such file. Under mpirun in parallel.

    \b
    Example: hpc-train data check configs/softmax-mnist.toml
             mpirun -n 2 hpc-train data check "data/part-*.h5"
    """
    is_job = len(files) == 1 and files[0].endswith(".toml")
    if overrides and not is_job:
        raise UserError(f"--set {overrides[0]} changes a job, and {files[0]} is none", "Name one job file, x.toml.")
    require("h5py", *["torch"] * is_job)
    notes = child_process.go_on_in_child()  # HDF5 crashes on some damaged files
    from hpc_train.train.comm.startup import open_context

    with open_context(use_mpi=JobEnvironment.current().is_launched) as context:
        from hpc_train.datasets.inspect.check import check as verify
        from hpc_train.datasets.inspect.structure import expand
        from hpc_train.train.data.hdf5_faults import data_paths

        job = context.on_root(lambda: load(job_file(Path(files[0])), overrides).config) if is_job else None
        paths = context.on_root(
            lambda: expand(files) if job is None else expand([str(each) for each in data_paths(job)])
        )
        checked = verify(paths, context, quiet=as_json, on_file=notes.at, job=job)
        if context.world.is_root:
            click.echo(json.dumps(asdict(checked), indent=2) if as_json else "\n".join(check_lines(checked)))
    if checked.faults or (strict and checked.warnings):
        sys.exit(1)


@data.command()
@_files
@click.option("--no-speed", is_flag=True, help="Do not measure how fast the files are read.")
@_json
@on_first_rank
def info(files: tuple[str, ...], no_speed: bool, as_json: bool) -> None:
    """Show what FILES hold, their layout, how fast this machine reads them, and what would make reading faster.

    \b
    Example: hpc-train data info data/mnist-5k.h5
    """
    require("h5py")
    notes = child_process.go_on_in_child()
    from hpc_train.train.comm.startup import open_context

    with open_context(use_mpi=False) as context:
        from hpc_train.datasets.inspect.info import inform
        from hpc_train.datasets.inspect.structure import expand

        facts = inform(expand(files), context, measure=not no_speed, on_file=notes.at)
    click.echo(json.dumps(facts, indent=2) if as_json else "\n".join(_info_lines(facts)))
    if facts["faults"]:
        sys.exit(1)


def _info_lines(facts: dict[str, Any]) -> Iterator[str]:
    from hpc_train.datasets.inspect.faults import Fault

    for file in facts["files"]:
        stripes = f", {file['stripes']} stripes" if file["stripes"] is not None else ""
        yield f"{file['path']}: {amount(file['bytes'], 'B')} on {file['file_system']}{stripes}"
        yield from (f"  {key}: {value}" for key, value in file["attributes"].items())
        for name, data in file["datasets"].items():
            yield f"  {name}: {_shape(data['shape']) or 'one value'} {data['dtype']}, {_layout(data)}"
            if data["attributes"]:
                yield "    " + ", ".join(f"{key} = {value}" for key, value in data["attributes"].items())
            yield from _speed_lines(data)
        if file["advice"]:
            yield "  Advice:"
        for advice in file["advice"]:
            yield f"    {advice['dataset'] + ': ' if advice['dataset'] else ''}{advice['what']}"
            yield f"      {advice['remedy']}"
    if facts["faults"]:
        yield "Faults:"
        yield from _fault_lines([Fault(**fault) for fault in facts["faults"]])


def _shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _layout(data: dict[str, Any]) -> str:
    parts = [amount(data["bytes"], "B"), data["layout"]]
    if data["chunk"]:
        parts[-1] += f" {_shape(data['chunk'])}"
        parts.append(f"{binary_size(data['chunk_bytes'])} each")
    if data["sources"]:
        parts.append(f"from {', '.join(data['sources'])}")
    parts += data["filters"]
    if data["chunk"] and data["compression_ratio"]:
        parts.append(f"{data['compression_ratio']:.2f} times smaller")
    parts.append(f"checksums {data['checksums']}" if data["checksums"] else "no checksums")
    return ", ".join(parts)


def _speed_lines(data: dict[str, Any]) -> Iterator[str]:
    speed = data.get("speed", {})
    if "error" in speed:
        yield f"    not read: {speed['error']}"
    elif speed:
        labels = {"shuffled": "shuffled", "shuffled_again": "again", "sequential": "in order"}
        yield "    read here: " + "; ".join(
            f"{labels[order]} {each['samples_per_s']:,.0f} samples/s, {amount(each['bytes_per_s'], 'B/s')}"
            f" ({each['page_cache']} page cache)"
            for order, each in speed.items()
        )
        if data["chunk"]:
            yield "    training shuffles chunks and mixes their samples: its speed is near that in order"


def check_lines(checked: "Checked") -> Iterator[str]:
    """The result of `data check`, for people."""
    num_files = len(checked.files)
    ranks = f" by {checked.num_ranks} ranks" if checked.num_ranks > 1 else ""
    files = checked.files[0] if num_files == 1 else f"{num_files:,} files, {checked.files[0]} the first"
    yield f"{files}: {amount(checked.num_bytes, 'B')}, read in {checked.seconds:.1f} s{ranks}"
    for name, facts in checked.datasets.items():
        yield f"  {name}: {', '.join(_dataset_facts(facts))}; {facts['verified_by'] or 'no checksums: only readable'}"
    if checked.reading:
        yield f"  Training reads {checked.reading}"
    if checked.warnings:
        yield "Warnings:"
        yield from _fault_lines(checked.warnings)
    if checked.faults:
        yield "Faults:"
        yield from _fault_lines(checked.faults)
    else:
        yield "No fault found"


def _dataset_facts(facts: dict[str, Any]) -> Iterator[str]:
    shape = _shape(facts["shape"])
    yield f"{facts['samples']:,} {shape + ' ' if shape else ''}{facts['dtype']}"
    if facts["low"] is not None:
        yield f"{facts['low']:.6g} to {facts['high']:.6g}"
    if "classes" in facts:
        counts = facts["classes"].values()
        yield f"{len(counts):,} classes of {min(counts, default=0):,} to {max(counts, default=0):,} samples"
    if facts.get("constant_features"):
        yield f"{facts['constant_features']:,} of {facts['features']:,} features never change"
    if facts.get("compared") is False:
        yield "samples not compared: its chunks cut them"


def _fault_lines(faults: "Sequence[Fault]") -> Iterator[str]:
    """One line for each fault, the first ones of each kind, and their remedy once."""
    for _, group in groupby(faults, key=lambda fault: (fault.kind, fault.file, fault.dataset)):
        same_kind = list(group)
        texts = [str(fault).partition("\n") for fault in same_kind]
        yield from (f"  {text}" for text, _, _ in texts[:_MAX_LINES])
        if len(texts) > _MAX_LINES:
            yield f"  ... and {len(texts) - _MAX_LINES:,} more (--json has all)"
        if remedy := texts[-1][2]:
            yield f"  {remedy}"
