"""Making HDF5 data sets: every rank writes its own rows, collectively, and the file appears when it is whole."""

import json
import os
import stat
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter_ns
from typing import Any

import h5py
import numpy as np

from hpc_train.core import owned_files
from hpc_train.core.errors import UserError
from hpc_train.datasets import storage
from hpc_train.datasets.prepare import images, journal, layout, tables, text, user_function
from hpc_train.datasets.prepare.disk import no_room
from hpc_train.datasets.prepare.journal import Blocks, Journal
from hpc_train.datasets.prepare.layout import Layout
from hpc_train.datasets.prepare.sources import PICTURES, Options, Source
from hpc_train.datasets.prepare.writer import Work, create, num_bytes, opened_alone, reserve, sound, verify, write
from hpc_train.train.comm.context import Context
from hpc_train.train.data.files import require_parallel_hdf5

_NOT_KEPT = ("http", "https", "memory", "data")
_MOST_NAMES = 3000  # of 16 bytes each in an attribute
_MOST_DIMENSIONS = 32  # of HDF5


def prepare(
    name: str,
    origin: Path | Sequence[Path] | None,
    output: Path | str,
    context: Context,
    overwrite: bool = False,
    tokenizer: str | None = None,
    options: Options | None = None,
    compress: str | None = None,
    memory_mb: int = 512,
) -> None:
    """Collective. Writes data set `name` to `output`, a path or a URL; a complete one is left alone unless `overwrite`.

    origin: where it comes from, if that is not known; of text as many folders and files as you like. tokenizer: of
    text, "bytes" or "bpe:N". options: of the other sources. compress: see `layout.parse`. memory_mb: what the ranks of
    a node may have in memory of the data, in 1e6 bytes. What was begun and killed is gone on with. Raises `UserError`.
    """
    if context.comm is not None:
        context.on_all(require_parallel_hdf5)
    asked = context.on_all(lambda: layout.parse(compress))
    memory_bytes = memory_mb * 1_000_000 // context.world.local_size
    url = output if isinstance(output, str) and storage.is_url(output) else None
    origins = [origin] if isinstance(origin, Path) else list(origin or [])
    options = options or Options()
    context.on_all(lambda: options.require_use(name, origins, tokenizer))
    # A user's function is not called where its samples are there.
    source = user_function.named(name) if ":" in name else _source(name, origins, tokenizer, options, context)
    if context.on_root(
        lambda: (
            _already_at(source, url, overwrite, asked)
            if url
            else _already_there(source, Path(output), overwrite, asked)
        )
    ):
        if context.world.is_root:
            shown = storage.without_secrets(url) if url else output
            theirs = "" if url else _owner(Path(output))
            print(f"{shown} is complete: {source.title}{_size(source)} (--overwrite makes it again{theirs})")
        return
    if ":" in name:
        source = user_function.source(name, options, None if url else Path(output), overwrite, context)
    if url:
        _make_and_upload(source, url, asked, memory_bytes, context)
    else:
        _make(source, Path(output), asked, memory_bytes, overwrite, context)


def _owner(output: Path) -> str:
    """Words for a file of somebody else, which says of itself what it holds."""
    found = output.stat()
    return "" if found.st_uid == os.geteuid() else f"; it belongs to {owned_files.owner(found)}"


def _size(source: Source) -> str:
    return f", {source.num_rows:,} {source.unit}" if source.arrays else ""


def _source(name: str, origins: list[Path], tokenizer: str | None, options: Options, context: Context) -> Source:
    """Collective."""
    if name in text.TEXTS:
        return text.source(name, origins, tokenizer or "bytes", context)
    if name == "images":
        return images.source(origins[0], options, context)
    if name == "table":
        return tables.source(origins[0], options, context)
    return context.on_all(lambda: PICTURES[name](origins[0] if origins else None))


def _make_and_upload(source: Source, url: str, asked: Layout, memory_bytes: int, context: Context) -> None:
    """Collective. HDF5 needs a file that can be written anywhere, which no URL is: it is made in $TMPDIR."""
    with TemporaryDirectory(prefix="hpc-train-") if context.world.is_root else nullcontext("") as mine:
        folder = Path(context.on_root(lambda: mine))
        context.on_all(lambda: _require_shared(folder))
        made = folder / url.rpartition("/")[2]
        _make(source, made, asked, memory_bytes, True, context)
        context.on_root(lambda: storage.upload(made, url))
        if context.world.is_root:
            print(f"{storage.without_secrets(url)}: written, read back and equal; its .sha256 beside it", flush=True)


def _require_shared(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder} is not seen by all nodes", "Set TMPDIR to a shared folder, or prepare on one node.")


def _already_at(source: Source, url: str, overwrite: bool, asked: Layout) -> bool:
    if url.endswith("/"):
        raise UserError(f"{storage.without_secrets(url)} is a folder", "Name the HDF5 file to write in it.")
    if url.split("://")[0].lower() in _NOT_KEPT:
        raise UserError(f"{storage.without_secrets(url)}: nothing can be kept there", "Name a file, or s3://, hdfs://.")
    if overwrite:
        return False
    with storage.opened(url) as found:
        if found is None:
            return False
        with suppress(OSError), h5py.File(found, "r") as file:
            if _holds(file, source, asked):
                return True
    raise UserError(
        f"{storage.without_secrets(url)} exists and is not a complete {source.title}",
        "Name another file, or add --overwrite.",
    )


def _make(source: Source, output: Path, asked: Layout, memory_bytes: int, overwrite: bool, context: Context) -> None:
    """Collective. Temporary name, collective writes, read back, mark, rename.

    Killed or interrupted, it leaves the file under its temporary name and a journal beside it.
    """
    work = Work(source, output, asked, memory_bytes)
    noted, began_ns = output.with_name(f".{output.name}.journal"), perf_counter_ns()
    context.on_root(lambda: owned_files.require(work.path, noted))  # left by a killed run, and not by somebody else
    try:
        context.on_all(lambda: _require_shapes(work))
        done = _left_from_before(work, noted, overwrite, context)
        if not done:
            context.on_root(lambda: _make_room(work))
            create(work, context)
        with Journal(noted, _what(work), new=not done) if context.world.is_root else nullcontext() as lines:
            written = write(work, done, lines, context)
        verify(work, written, context)
        context.on_root(lambda: _complete(work, written, noted, output))
    except Exception:
        for path in (work.path, noted, *source.spools):  # by every rank: the one that failed may be the only one here
            with suppress(OSError):
                path.unlink()
        raise
    for path in source.spools:
        path.unlink(missing_ok=True)
    if context.world.is_root:
        num_bytes, spent_s = output.stat().st_size, (perf_counter_ns() - began_ns) / 1e9
        print(
            f"{output}: {source.title}, {source.num_rows:,} {source.unit}, {num_bytes / 1e6:.1f} MB in {spent_s:.1f} s "
            f"by {context.world.size} rank{'s' * (context.world.size != 1)}, read back and equal",
            flush=True,
        )


def _require_shapes(work: Work) -> None:
    """Raises `UserError` for what HDF5 cannot hold, and for rows that do not fit into memory."""
    for name, array in work.source.arrays.items():
        rows, *row = array.shape
        if len(array.shape) > _MOST_DIMENSIONS or min(row, default=1) < 1 or rows < (name == "train/inputs"):
            raise UserError(
                f"{work.source.title}: {name} has the shape {tuple(array.shape)}",
                f"It needs rows, and 1 to {_MOST_DIMENSIONS} dimensions of at least 1.",
            )
        work.blocks_at_once(array)
    if num_bytes(work) >= 1 << 63:
        raise UserError(f"{work.source.title} would have {num_bytes(work):,} bytes", "Ask for less: --size, say.")


def _left_from_before(work: Work, noted: Path, overwrite: bool, context: Context) -> Blocks:
    """Collective. The blocks that a killed run left and that still have their checksums; none to begin anew."""
    is_there = context.on_root(lambda: work.path.exists() and not overwrite)
    told, why = context.on_root(lambda: journal.read(noted, _what(work)) if is_there else ({}, ""))
    good, num_bad = sound(work, told, context) if told else ({}, 0)
    num_good = sum(map(len, good.values()))
    if num_bad and (work.layout.chunked or not num_good):
        good, why = {}, f"{num_bad} of its blocks are not as they were written"
    num_blocks = sum(work.num_blocks(array) for array in work.source.arrays.values())
    if context.world.is_root and is_there:
        if good:
            changed = f" ({num_bad} more have changed and are written again)" if num_bad else ""
            print(f"{work.path}: {num_good} of {num_blocks} blocks are there and sound, going on{changed}", flush=True)
        else:
            print(f"{work.path} is begun anew: {why}", flush=True)
    return good


def _what(work: Work) -> dict[str, Any]:
    """What makes a file the one that was begun: all that decides about its bytes."""
    return {
        "format": 1,
        "title": work.source.title,
        "state": work.source.state,
        "layout": work.layout.name,
        "attributes": {name: str(value) for name, value in work.source.attributes.items()},
        "arrays": {name: [list(a.shape), str(a.dtype)] for name, a in work.source.arrays.items()},
    }


def _already_there(source: Source, output: Path, overwrite: bool, asked: Layout) -> bool:
    """On the root, before work starts: True when there is nothing to do; raises where the output is something else."""
    try:
        found = output.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise no_room(output, getattr(error, "errno", None)) from None
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{output} is a folder", "Name the HDF5 file to write, for example data/mnist-5k.h5")
    if not stat.S_ISREG(found.st_mode):  # one would wait at a FIFO for ever, and /dev/null must stay what it is
        raise UserError(f"{output} is no regular file", "Name the HDF5 file to write, for example data/mnist-5k.h5")
    if overwrite:
        return False
    try:
        with h5py.File(output, "r") as file:
            same = _holds(file, source, asked)
    except OSError:
        same = False
    if not same:
        raise UserError(
            f"{output} exists and is not a complete {source.title}", "Name another file, or add --overwrite."
        )
    return True


def _make_room(work: Work) -> None:
    """On the root: no room is told now, not half-way (of compressed data nobody knows how much it takes)."""
    try:
        work.path.parent.mkdir(parents=True, exist_ok=True)
        owned_files.created(work.path).close()
    except OSError as error:
        raise no_room(work.output, error.errno) from None
    reserve(work, 1 if work.layout.chunked else num_bytes(work))


def _holds(file: h5py.File, source: Source, asked: Layout) -> bool:
    facts = _attributes({"complete": True, "title": source.title, **source.attributes})
    same = all(name in file.attrs and np.array_equal(file.attrs[name], value) for name, value in facts.items())
    return same and file.attrs.get("layout", "contiguous") == asked.name


def _attributes(facts: dict[str, Any]) -> dict[str, Any]:
    """`facts` as HDF5 takes them: in UTF-8, and of many names one text in JSON, since an attribute has 64 KiB."""
    return {name: _attribute(value) for name, value in facts.items()}


def _attribute(value: Any) -> Any:
    if isinstance(value, str):  # names of files may hold any bytes
        return os.fsencode(value).decode(errors="backslashreplace")
    if isinstance(value, list):
        names = [_attribute(each) for each in value]
        return names if len(names) <= _MOST_NAMES else json.dumps(names)
    return value


def _complete(work: Work, written: Blocks, noted: Path, output: Path) -> None:
    """On the root: says what the file is, marks it complete, and gives it its name."""
    source = work.source
    facts: dict[str, Any] = {
        "title": source.title,
        "origin": source.origin,
        "license": source.license,
        "num_rows": source.num_rows,
        "writer": "hpc-train",
        "layout": work.layout.name,
        **source.attributes,
    }
    with Journal(noted, {}, new=False) as lines:
        lines.flushing()  # what HDF5 writes by closing tears a file that was whole
    with opened_alone(work) as opened:
        file = opened.file
        assert file is not None
        file.attrs.update(_attributes(facts))
        for part in ("train", "test"):
            if part in file:
                file[part].attrs["num_rows"] = source.rows_of(part)
        if not work.layout.chunked:
            for name, array in source.arrays.items():
                values = np.array([written[name][block] for block in range(len(written[name]))], np.uint32)
                layout.make_groups(file, f"checksums/{name}")
                sums = file.create_dataset(f"checksums/{name}", data=values)
                sums.attrs.update({"block_rows": work.layout.block_rows(array), "algorithm": "crc32"})
        file.attrs["complete"] = True
    with work.path.open("rb") as whole:
        os.fsync(whole.fileno())
    work.path.replace(output)
    noted.unlink()
