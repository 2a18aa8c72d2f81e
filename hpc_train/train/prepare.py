"""Making HDF5 data sets: every rank writes its own rows, collectively, and the file appears when it is whole."""

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter_ns
from typing import Any

import h5py
import numpy as np

from hpc_train.errors import UserError
from hpc_train.partition import rank_span
from hpc_train.train import storage, text
from hpc_train.train.context import Context, known_to_all, parallel_file_options, require_one_mpi
from hpc_train.train.progress import StepProgress
from hpc_train.train.sources import PICTURES, Array, Source

_BLOCK_BYTES = 32 << 20


def prepare(
    name: str,
    origin: Path | Sequence[Path] | None,
    output: Path | str,
    context: Context,
    overwrite: bool = False,
    tokenizer: str | None = None,
) -> None:
    """Collective. Writes data set `name` to `output`, a path or a URL; a complete one is left alone unless `overwrite`.

    origin: where it comes from, if that is not known; of text as many folders and files as you like. tokenizer: of
    text, "bytes" or "bpe:N". Raises `UserError`.
    """
    if context.comm is not None:
        context.on_all(_require_parallel_hdf5)
    origins = [origin] if isinstance(origin, Path) else list(origin or [])
    if name in text.TEXTS:
        source = text.source(name, origins, tokenizer or "bytes", context)
    else:
        source = context.on_all(lambda: _pictures(name, origins, tokenizer))
    url = output if isinstance(output, str) and storage.is_url(output) else None
    if context.on_root(
        lambda: _already_at(source, url, overwrite) if url else _already_there(source, Path(output), overwrite)
    ):
        if context.world.is_root:
            shown = storage.without_secrets(url) if url else output
            print(
                f"{shown} is complete: {source.title}, {source.num_rows:,} {source.unit} (--overwrite makes it again)"
            )
    elif url:
        _make_and_upload(source, url, context)
    else:
        _make(source, Path(output), context)


def _pictures(name: str, origins: list[Path], tokenizer: str | None) -> Source:
    if tokenizer:
        raise UserError(f"prepare {name}: --tokenizer {tokenizer} is for text", "Leave it out.")
    if len(origins) > 1:
        raise UserError(f"prepare {name}: --from is given {len(origins)} times", "Name one folder or file.")
    return PICTURES[name](origins[0] if origins else None)


def _make_and_upload(source: Source, url: str, context: Context) -> None:
    """Collective. HDF5 needs a file that can be written anywhere, which no URL is: it is made in $TMPDIR."""
    with TemporaryDirectory(prefix="hpc-train-") if context.world.is_root else nullcontext("") as mine:
        folder = Path(context.on_root(lambda: mine))
        context.on_all(lambda: _require_shared(folder))
        made = folder / url.rpartition("/")[2]
        context.on_root(lambda: _already_there(source, made, overwrite=True))
        _make(source, made, context)
        context.on_root(lambda: storage.upload(made, url))
        if context.world.is_root:
            print(f"{storage.without_secrets(url)}: written, read back and equal; its .sha256 beside it", flush=True)


def _require_shared(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder} is not seen by all nodes", "Set TMPDIR to a shared folder, or prepare on one node.")


def _already_at(source: Source, url: str, overwrite: bool) -> bool:
    if url.endswith("/"):
        raise UserError(f"{storage.without_secrets(url)} is a folder", "Name the HDF5 file to write in it.")
    if overwrite:
        return False
    with storage.opened(url) as found:
        if found is None:
            return False
        with suppress(OSError), h5py.File(found, "r") as file:
            if _holds(file, source):
                return True
    raise UserError(
        f"{storage.without_secrets(url)} exists and is not a complete {source.title}",
        "Name another file, or add --overwrite.",
    )


def _make(source: Source, output: Path, context: Context) -> None:
    """Collective. Temporary name, collective writes, read back, mark, rename."""
    unfinished = output.with_name(f".{output.name}.partial")
    began_ns = perf_counter_ns()
    try:
        checksums = _write(source, unfinished, context)
        context.on_all(lambda: _verify(source, unfinished, checksums, context))
        context.on_root(lambda: _complete(source, unfinished, output))
    except BaseException:
        unfinished.unlink(missing_ok=True)  # by every rank: the one that failed may be the only one to get here
        raise
    if context.world.is_root:
        num_bytes, spent_s = output.stat().st_size, (perf_counter_ns() - began_ns) / 1e9
        print(
            f"{output}: {source.title}, {source.num_rows:,} {source.unit}, {num_bytes / 1e6:.1f} MB in {spent_s:.1f} s "
            f"by {context.world.size} rank{'s' * (context.world.size != 1)}, read back and equal",
            flush=True,
        )


def _require_parallel_hdf5() -> None:
    if not h5py.get_config().mpi:
        raise UserError(
            "this h5py was built without MPI, and there are several ranks",
            "Run `make install`, which builds it with MPI, or prepare without mpirun.",
        )
    require_one_mpi("h5py", h5py.defs.__file__)


def _already_there(source: Source, output: Path, overwrite: bool) -> bool:
    """On the root, before work starts: True when there is nothing to do; raises where the output cannot be written."""
    if output.is_dir():
        raise UserError(f"{output} is a folder", "Name the HDF5 file to write, for example data/mnist-5k.h5")
    if output.exists() and not overwrite:
        try:
            with h5py.File(output, "r") as file:
                same = _holds(file, source)
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"{output} exists and is not a complete {source.title}", "Name another file, or add --overwrite."
            )
        return True
    unfinished = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            num_bytes = sum(int(np.prod(a.shape, dtype=np.int64)) * a.dtype.itemsize for a in source.arrays.values())
            os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))  # no room is told now, not half-way
        unfinished.unlink()
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise UserError(
            f"{output} cannot be written: {error.strerror}",
            "Name a file on a file system with room that you may write.",
        ) from None
    return False


def _holds(file: h5py.File, source: Source) -> bool:
    facts = {"complete": True, "title": source.title, **source.attributes}
    return all(name in file.attrs and file.attrs[name] == value for name, value in facts.items())


def _write(source: Source, unfinished: Path, context: Context) -> dict[str, int]:
    """Collective. Every rank writes its rows of every array; returns the checksums of this rank's rows."""
    world, checksums = context.world, {}
    num_rows = sum(array.shape[0] for array in source.arrays.values())
    shown = StepProgress(f"writing {unfinished.name[1:-8]}", num_rows, "auto", world.is_root, unit=source.unit)
    done = 0
    with closing(shown) as progress, _file_of_all(unfinished, context) as file:
        file.attrs["complete"] = False
        for name, array in source.arrays.items():
            dataset = file.create_dataset(name, array.shape, array.dtype)
            if name.endswith("inputs") and array.dtype == np.uint8 and len(array.shape) > 1:  # not tokens
                dataset.attrs["scale_factor"], dataset.attrs["add_offset"] = (1 / 255, 0.0)  # CF conventions: 0 to 1
            start, stop = rank_span(array.shape[0], world.rank, world.size)
            block = _block_rows(array)
            longest = rank_span(array.shape[0], 0, world.size)[1]
            checksum = 0
            for offset in range(0, longest, block):  # every rank takes part in every write, with no rows if need be
                begin, end = min(start + offset, stop), min(start + offset + block, stop)
                rows = context.on_all(partial(array.read, begin, end))
                _write_rows(dataset, begin, rows, context)
                checksum = zlib.crc32(rows.tobytes(), checksum)
                done += min(block, longest - offset) * world.size
                progress.advance(min(done, num_rows), len(rows) * world.size, perf_counter_ns())
            checksums[name] = checksum
    return checksums


@contextmanager
def _file_of_all(path: Path, context: Context) -> Iterator[h5py.File]:
    """Collective. A new file that all ranks write together, closed by all of them.

    Closing is collective: a rank that fails alone must not wait for the others in there, but go and end the job.
    """
    file = h5py.File(path, "w", **parallel_file_options(context))
    try:
        yield file
    except BaseException as error:
        if context.comm is None or known_to_all(error):
            file.close()
        raise
    file.close()


def _block_rows(array: Array) -> int:
    """How many rows are written and read at once."""
    return max(1, _BLOCK_BYTES // max(1, int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize))


def _write_rows(dataset: h5py.Dataset, begin: int, rows: np.ndarray, context: Context) -> None:
    """Collective. h5py's own indexing leaves out a rank with no rows, and the others would wait for it for ever."""
    space = dataset.id.get_space()
    memory = h5py.h5s.create_simple(rows.shape if len(rows) else (1, *rows.shape[1:]))
    if len(rows):
        space.select_hyperslab((begin,) + (0,) * (rows.ndim - 1), rows.shape)
    else:
        space.select_none()
        memory.select_none()
    transfer = h5py.h5p.create(h5py.h5p.DATASET_XFER)
    if context.comm is not None:
        transfer.set_dxpl_mpio(h5py.h5fd.MPIO_COLLECTIVE)
    dataset.id.write(memory, space, rows, dxpl=transfer)


def _verify(source: Source, unfinished: Path, checksums: dict[str, int], context: Context) -> None:
    """Reads this rank's rows back from the closed file and compares."""
    with h5py.File(unfinished, "r") as file:
        for name, array in source.arrays.items():
            start, stop = rank_span(array.shape[0], context.world.rank, context.world.size)
            checksum, block = 0, _block_rows(array)
            for begin in range(start, stop, block):
                checksum = zlib.crc32(file[name][begin : min(begin + block, stop)].tobytes(), checksum)
            if checksum != checksums[name]:
                raise UserError(
                    f"{unfinished}: rows {start} to {stop} of {name} do not read back as written",
                    "The file system lost or changed data: prepare again, elsewhere if it happens twice.",
                )


def _complete(source: Source, unfinished: Path, output: Path) -> None:
    """On the root: says what the file is, marks it complete, and gives it its name."""
    facts: dict[str, Any] = {
        "title": source.title,
        "origin": source.origin,
        "license": source.license,
        "num_rows": source.num_rows,
        "writer": "hpc-train",
        **source.attributes,
    }
    with h5py.File(unfinished, "r+") as file:
        file.attrs.update(facts)
        for part in ("train", "test"):
            file[part].attrs["num_rows"] = source.rows_of(part)
        file.attrs["complete"] = True
    with unfinished.open("rb") as whole:
        os.fsync(whole.fileno())
    unfinished.replace(output)
