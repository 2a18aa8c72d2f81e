"""A user's function as a source: the samples that it yields are spooled to disk, then written as any data set is."""

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from hpc_train.core import owned_files
from hpc_train.core.errors import UserError
from hpc_train.core.world import World
from hpc_train.datasets.prepare.disk import cannot_write, write_all
from hpc_train.datasets.prepare.sources import Array, Options, Source, in_memory, state_of
from hpc_train.datasets.prepare.tables import split_arrays
from hpc_train.train.comm.context import Context

_BUFFER_BYTES = 4 << 20  # of samples in memory before they are written
_NAME = "Name package.module:function, as this folder sees it: a function of yours."
_SHAPE = "Yield (input, target) each time, both numbers of one shape and type; or return a dict of arrays."


def described(name: str) -> Source:
    """The data set without its samples: what its file will say about itself."""
    return Source(f"Samples of {name}", name, "see its source", {}, unit="samples")


def source(name: str, options: Options, output: Path | None, overwrite: bool, context: Context) -> Source:
    """Collective. The samples of `name`, package.module:function.

    The function takes nothing, or `rank` and `size`, and then yields this rank's share alone. It gives an iterable of
    (input, target) of any length, or a dict of arrays: inputs and targets, or train/inputs and so on.
    output: the samples are spooled beside it. overwrite: ignore what a killed run spooled. Raises `UserError`.
    """
    function = context.on_all(lambda: _UserFunction.load(name))
    returned = context.on_all(lambda: function.call(context.world))
    state = context.on_root(lambda: function.state)
    if isinstance(returned, dict):
        arrays = context.on_all(lambda: function.arrays(returned))
        parts = context.on_all(lambda: split_arrays(name, arrays, options.test_fraction))
        return replace(described(name), arrays=parts, state=state)
    spool = context.on_all(lambda: _spool_beside(name, output, context.world.rank))
    try:
        identity = [name, state, context.world.size]
        contents = None if overwrite or not state else _reusable(spool, identity, context)
        contents = contents or _fill(spool, function, returned, identity, context)
        spools = context.all_gather(spool)
        arrays = _arrays_of(spools, context.all_gather(contents), function)
        parts = context.on_all(lambda: split_arrays(name, arrays, options.test_fraction))
    except Exception:
        for path in spool.files:
            path.unlink(missing_ok=True)
        raise
    files = tuple(path for each in spools for path in each.files)
    return replace(described(name), arrays=parts, state=state, spools=files)


@dataclass(frozen=True)
class _UserFunction:
    """takes_rank: it yields the samples of one rank alone."""

    name: str
    function: Callable[..., Any]
    takes_rank: bool

    @classmethod
    def load(cls, name: str) -> "_UserFunction":
        """Raises `UserError` for what is not a function of samples, before it is called: `sys:exit` never is."""
        module, _, attribute = name.partition(":")
        if (here := os.getcwd()) not in sys.path:
            sys.path.insert(0, here)  # as `python -m` does: the user's module is in the current folder
        try:
            function = getattr(importlib.import_module(module), attribute, None)
        except ModuleNotFoundError as error:
            raise UserError(f"prepare {name}: {error}", _NAME) from None
        except SystemExit:
            raise UserError(f"prepare {name}: {module} ends this program when it is imported", _NAME) from None
        if not callable(function):
            raise UserError(f"prepare {name}: {module} has no function {attribute}", _NAME)
        if inspect.isbuiltin(function) or (isinstance(function, type) and function.__module__ == "builtins"):
            raise UserError(f"prepare {name}: {attribute} is Python's own, and gives no samples", _NAME)
        try:
            signature = inspect.signature(function)
            takes_rank = {"rank", "size"} <= set(signature.parameters)
            signature.bind(**dict.fromkeys(("rank", "size") if takes_rank else ()))
        except (TypeError, ValueError) as error:
            remedy = f"It takes nothing, or rank and size. {_SHAPE}"
            raise UserError(f"prepare {name}: it cannot be called: {error}", remedy) from None
        return cls(name, function, takes_rank)

    def call(self, world: World) -> Any:
        try:
            return self.function(rank=world.rank, size=world.size) if self.takes_rank else self.function()
        except SystemExit as error:
            raise self._exits(error) from None

    @property
    def state(self) -> str:
        """A hash of its module's file; "" if there is none, so that nothing of it is reused."""
        try:
            module = inspect.getsourcefile(inspect.unwrap(self.function))
        except TypeError:  # an object with __call__
            return ""
        return state_of([Path(module)]) if module else ""

    def arrays(self, returned: dict[Any, Any]) -> dict[str, Array]:
        """The arrays of a dict that the function returned."""
        arrays = {}
        for key, value in returned.items():
            array = _as_array(value)
            if not isinstance(key, str) or array.dtype.kind not in "biuf" or not array.ndim:
                raise self.error(f"{key} is {array.dtype} {array.shape}")
            is_flag = key.endswith("targets") and array.dtype.kind == "b"
            arrays[key] = in_memory(array.astype(np.int64) if is_flag else array)
        return arrays

    def samples(self, returned: Any) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The samples of an iterable that the function returned: (number, input, target)."""
        if not isinstance(returned, Iterable):
            raise self.error(f"it returned {type(returned).__name__}, nothing to iterate over")
        try:
            for index, sample in enumerate(returned):
                yield index, *self._pair(index, sample)
        except SystemExit as error:
            raise self._exits(error) from None

    def _pair(self, index: int, sample: Any) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise self.error(f"sample {index} is {type(sample).__name__}, no pair")
        x, y = _as_array(sample[0]), _as_array(sample[1])
        if x.dtype.kind not in "biuf" or x.ndim == 0 or not x.size or not y.size or y.dtype.kind not in "biuf":
            raise self.error(f"sample {index} is {x.dtype} {x.shape} with the target {y.dtype} {y.shape}")
        if y.dtype.kind == "u" and y.max() > np.iinfo(np.int64).max:
            raise self.error(f"sample {index} has the target {y}, too large for 64 bits")
        y = y.reshape(()) if y.size == 1 else y
        return x.astype(x.dtype.newbyteorder("="), copy=False), y.astype(
            np.float32 if y.dtype.kind == "f" else np.int64
        )

    def error(self, what: str) -> UserError:
        return UserError(f"prepare {self.name}: {what}", _SHAPE)

    def _exits(self, error: SystemExit) -> UserError:
        return self.error(f"it ends this program (exit code {error.code})")


def _as_array(value: Any) -> np.ndarray:
    """Rows of different lengths and the like become an array of objects, which is no number."""
    try:
        return np.asarray(value)
    except Exception:  # noqa: BLE001  a user's object may raise anything
        return np.empty((), object)


# ---------------------------------------------------------------------------------------------- samples on disk


@dataclass(frozen=True)
class _Contents:
    """The samples in a spool: the shapes and types of an input and of a target."""

    num_samples: int
    shape: tuple[int, ...]
    dtype: str
    target_shape: tuple[int, ...]
    target_dtype: str

    @property
    def kind(self) -> tuple[str, tuple[int, ...], str, tuple[int, ...]]:
        """Alike for all samples of a data set."""
        return self.dtype, self.shape, self.target_dtype, self.target_shape

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} with targets {self.target_dtype} {list(self.target_shape)}"


@dataclass(frozen=True)
class _Spool:
    """The samples of one rank on disk: the file `path`, written last, describes the inputs and targets beside it."""

    path: Path

    @property
    def inputs(self) -> Path:
        return self.path.with_name(f"{self.path.name}.inputs")

    @property
    def targets(self) -> Path:
        return self.path.with_name(f"{self.path.name}.targets")

    @property
    def files(self) -> tuple[Path, Path, Path]:
        return self.path, self.inputs, self.targets

    def complete(self, identity: list[Any], contents: _Contents) -> None:
        """Marks the spool complete. identity: what its samples depend on."""
        description = asdict(contents) | {"identity": identity, "bytes": self._num_bytes()}
        try:
            with owned_files.created(self.path, 0o644) as file:
                file.write(json.dumps(description).encode())
        except OSError as error:
            raise cannot_write(self.path, error.errno) from None

    def reusable(self, identity: list[Any]) -> _Contents | None:
        """What a killed run spooled completely, if nothing has changed since."""
        try:
            with owned_files.opened(self.path, "rb") as file:
                if owned_files.others_may_write(file):
                    return None
                found = json.loads(file.read())
            if found["identity"] != identity or found["bytes"] != self._num_bytes():
                return None
            shapes = tuple(found["shape"]), tuple(found["target_shape"])
            return _Contents(found["num_samples"], shapes[0], found["dtype"], shapes[1], found["target_dtype"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _num_bytes(self) -> list[int]:
        return [self.inputs.stat().st_size, self.targets.stat().st_size]


def _spool_beside(name: str, output: Path | None, rank: int) -> _Spool:
    if output is None:
        raise UserError(f"prepare {name}: samples are spooled beside a file, and not to a URL", "Name a file.")
    spool = _Spool(output.with_name(f".{output.name}.spool-{rank:05d}"))
    owned_files.require(*spool.files)
    return spool


def _reusable(spool: _Spool, identity: list[Any], context: Context) -> _Contents | None:
    """Collective. What a killed run left in this rank's spool; None unless the spools of all ranks are complete."""
    found = context.all_gather(spool.reusable(identity))
    return None if None in found else found[context.world.rank]


def _fill(spool: _Spool, function: _UserFunction, returned: Any, identity: list[Any], context: Context) -> _Contents:
    """Collective. Writes this rank's samples to its spool."""
    contents = context.on_all(lambda: _write_samples(spool, function, returned, context.world))
    context.on_all(lambda: spool.complete(identity, contents))
    return contents


def _write_samples(spool: _Spool, function: _UserFunction, returned: Any, world: World) -> _Contents:
    """Writes the samples that fall to this rank: all of them if the function takes the rank, else one in `size`."""
    contents = _Contents(0, (), "", (), "")
    with _SpoolWriter(spool) as writer:
        for index, x, y in function.samples(returned):
            if not function.takes_rank and index % world.size != world.rank:
                continue
            found = _Contents(contents.num_samples + 1, x.shape, x.dtype.str, y.shape, y.dtype.str)
            if contents.num_samples and found.kind != contents.kind:
                raise function.error(f"sample {index} is {found}, those before {contents}")
            writer.add(x, y)
            contents = found
    return contents


class _SpoolWriter:
    """Writes samples through a buffer. Raises `UserError` if the disk is full."""

    def __init__(self, spool: _Spool) -> None:
        self._spool, self._num_bytes = spool, 0
        self._buffers: list[list[bytes]] = [[], []]
        try:
            spool.path.parent.mkdir(parents=True, exist_ok=True)
            self._files = [owned_files.created(path, 0o644, 0) for path in (spool.inputs, spool.targets)]
        except OSError as error:
            raise cannot_write(spool.path, error.errno) from None

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        for buffer, values in zip(self._buffers, (x, y), strict=True):
            buffer.append(values.tobytes())
            self._num_bytes += values.nbytes
        if self._num_bytes >= _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        try:
            for buffer, file in zip(self._buffers, self._files, strict=True):
                write_all(file, b"".join(buffer))
                buffer.clear()
        except OSError as error:
            raise cannot_write(self._spool.path, error.errno) from None
        self._num_bytes = 0

    def __enter__(self) -> "_SpoolWriter":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            for file in self._files:
                file.close()


def _arrays_of(spools: list[_Spool], contents: list[_Contents], function: _UserFunction) -> dict[str, Array]:
    """The samples of all ranks' spools as two arrays."""
    kinds = {each.kind: each for each in contents if each.num_samples}
    if len(kinds) != 1:
        what = ", ".join(str(kinds[kind]) for kind in sorted(kinds)) or "nothing"
        raise function.error(f"the ranks' samples are {what}")
    ((dtype, shape, target_dtype, target_shape),) = kinds
    counts = [each.num_samples for each in contents]
    is_interleaved = not function.takes_rank
    inputs = _SpooledRows([spool.inputs for spool in spools], counts, shape, np.dtype(dtype), is_interleaved)
    targets = _SpooledRows(
        [spool.targets for spool in spools], counts, target_shape, np.dtype(target_dtype), is_interleaved
    )
    return {"inputs": inputs.array, "targets": targets.array}


@dataclass(frozen=True)
class _SpooledRows:
    """Rows in one file for each rank. is_interleaved: row i is on rank i modulo size; else rank follows rank."""

    files: list[Path]
    counts: list[int]
    row_shape: tuple[int, ...]
    dtype: np.dtype
    is_interleaved: bool

    @property
    def array(self) -> Array:
        return Array((sum(self.counts), *self.row_shape), self.dtype, self.read)

    def read(self, start: int, stop: int) -> np.ndarray:
        rows = np.empty((stop - start, *self.row_shape), self.dtype)
        for rank in range(len(self.files)):
            of_file, of_rows = self._share(rank, start, stop)
            if of_file:
                rows[of_rows] = self._read_file(rank, of_file)
        return rows

    def _share(self, rank: int, start: int, stop: int) -> tuple[range, slice]:
        """(rows of this rank's file, where they go) of rows start to stop."""
        if self.is_interleaved:
            size = len(self.files)
            of_file = range(-(-(start - rank) // size), -(-(stop - rank) // size))
            return of_file, slice((rank - start) % size, None, size)
        before, num = sum(self.counts[:rank]), self.counts[rank]
        of_file = range(min(max(0, start - before), num), min(max(0, stop - before), num))
        first = before + of_file.start - start
        return of_file, slice(first, first + len(of_file))

    def _read_file(self, rank: int, rows: range) -> np.ndarray:
        shape = (len(rows), *self.row_shape)
        row_bytes = prod(self.row_shape) * self.dtype.itemsize
        values = np.fromfile(self.files[rank], self.dtype, prod(shape), offset=rows.start * row_bytes)
        if len(values) != prod(shape):
            raise UserError(f"{self.files[rank]} is truncated", "Prepare again with --overwrite.")
        return values.reshape(shape)
