"""A user's own function as a source: what it yields is spooled to disk, then written like any other data set."""

import importlib
import inspect
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hpc_train.core import owned_files
from hpc_train.core.errors import UserError
from hpc_train.datasets.prepare.disk import no_room, write_all
from hpc_train.datasets.prepare.layout import row_bytes
from hpc_train.datasets.prepare.sources import Array, Options, Source, in_memory, state_of
from hpc_train.datasets.prepare.tables import divided
from hpc_train.train.comm.context import Context

_SPOOL_BYTES = 4 << 20  # of samples in memory before they go to disk
_NAME = "Name package.module:function, seen from this folder: a function of yours."
_SHAPE = (
    "Yield (input, target) each time: numbers of one shape and type, and a whole number. Or return a dict of arrays."
)


def named(name: str) -> Source:
    """What the file will say of itself, before a sample is there."""
    return Source(f"Samples of {name}", name, "see its source", {}, unit="samples")


def source(name: str, options: Options, output: Path | None, anew: bool, context: Context) -> Source:
    """Collective. The samples of `name`, package.module:function.

    The function takes nothing, or `rank` and `size` and then yields this rank's share alone. It gives an iterable of
    (input, target), of whatever length, or a dict of arrays: inputs and targets, or train/inputs and so on.
    output: the samples are spooled beside it. anew: not what a killed run spooled. Raises `UserError`.
    """
    function = context.on_all(partial(_found, name))
    shared = context.on_all(partial(_shares, name, function))
    world = context.world
    told = context.on_all(partial(_called, name, function, {"rank": world.rank, "size": world.size} if shared else {}))
    state = context.on_root(lambda: _state_of(function))
    if isinstance(told, dict):
        arrays = context.on_all(lambda: {str(key): in_memory(_plain(name, key, told[key])) for key in told})
        parts = context.on_all(lambda: divided(name, arrays, options.test_fraction))
        return replace(named(name), arrays=parts, state=state)
    beside = context.on_all(lambda: _beside(name, output))
    context.on_all(lambda: owned_files.require(*_files_of(_spool_of(beside, world.rank))))
    try:
        arrays, spools = _spooled(name, told, shared, beside, anew, state, context)
        parts = context.on_all(lambda: divided(name, arrays, options.test_fraction))
    except Exception:
        for path in _files_of(_spool_of(beside, world.rank)):
            path.unlink(missing_ok=True)
        raise
    return replace(named(name), arrays=parts, state=state, spools=spools)


def _beside(name: str, output: Path | None) -> Path:
    if output is None:
        raise UserError(f"prepare {name}: samples are spooled beside a file, and not to a URL", "Name a file.")
    return output


def _found(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does: the user's module lies where the command is given
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise UserError(f"prepare {name}: {error}", _NAME) from None
    except SystemExit:
        raise UserError(f"prepare {name}: {module} ends this program when it is imported", _NAME) from None
    if not callable(found):
        raise UserError(f"prepare {name}: {module} has no function {attribute}", _NAME)
    return found


def _shares(name: str, function: Any) -> bool:
    """Whether it shares out its samples. Raises `UserError` for what is no function of samples, before it is called:
    not even `sys:exit` is."""
    if inspect.isbuiltin(function) or (isinstance(function, type) and function.__module__ == "builtins"):
        raise UserError(f"prepare {name}: {name.rpartition(':')[2]} is Python's own, and gives no samples", _NAME)
    try:
        signature = inspect.signature(function)
        shared = {"rank", "size"} <= set(signature.parameters)
        signature.bind(**dict.fromkeys(("rank", "size") if shared else ()))
    except (TypeError, ValueError) as error:
        remedy = f"It takes nothing, or rank and size. {_SHAPE}"
        raise UserError(f"prepare {name}: it cannot be called: {error}", remedy) from None
    return shared


def _called(name: str, function: Any, words: dict[str, int]) -> Any:
    try:
        return function(**words)
    except SystemExit as error:
        raise _ended(name, error) from None


def _ended(name: str, error: SystemExit) -> UserError:
    return UserError(f"prepare {name}: it ends this program (exit code {error.code})", _SHAPE)


def _state_of(function: Any) -> str:
    try:
        module = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # of an object that can be called: where it comes from is not known, so nothing is kept of it
        return ""
    return state_of([Path(module)]) if module else ""


def _plain(name: str, key: Any, value: Any) -> np.ndarray:
    array = _as_array(value)
    if not isinstance(key, str) or array.dtype.kind not in "biuf" or not array.ndim:
        raise UserError(f"prepare {name}: {key} is {array.dtype} {array.shape}", _SHAPE)
    return array.astype(np.int64) if key.endswith("targets") and array.dtype.kind == "b" else array


def _spooled(
    name: str, told: Any, shared: bool, output: Path, anew: bool, state: str, context: Context
) -> tuple[dict[str, Array], tuple[Path, ...]]:
    """Collective. The samples on disk, each rank's in a file of its own, as arrays of all of them.

    Where the function shares out, rank after rank; else sample i is with rank i modulo size, and in its place.
    """
    world = context.world
    spool = _spool_of(output, world.rank)
    kept = context.all_gather(None if anew else _kept(spool, name, state, world.size))
    mine = kept[world.rank]
    if mine is None or not all(kept):
        mine = context.on_all(lambda: _spool(spool, name, told, shared, context))
    context.on_all(lambda: _note(spool, name, state, world.size, mine))
    ranks = context.all_gather((str(spool), mine))
    spools = tuple(Path(path) for path, _ in ranks)
    files = [path for spool in spools for path in _files_of(spool)]
    kinds = {(tuple(each["shape"]), each["dtype"]) for _, each in ranks if each["num"]}
    if len(kinds) != 1:
        what = ", ".join(f"{dtype} {shape}" for shape, dtype in sorted(kinds)) or "nothing"
        raise UserError(f"prepare {name}: the ranks' samples are {what}", _SHAPE)
    ((shape, dtype),) = kinds
    counts = [each["num"] for _, each in ranks]
    arrays = {
        end: Array(
            (sum(counts), *inner), np.dtype(kind), partial(_gathered, spools, end, inner, kind, counts, not shared)
        )
        for end, inner, kind in (("inputs", shape, dtype), ("targets", (), "int64"))
    }
    return arrays, tuple(files)


def _spool_of(output: Path, rank: int) -> Path:
    return output.with_name(f".{output.name}.spool-{rank:05d}")


def _files_of(spool: Path) -> list[Path]:
    """The first describes the others, and is written last."""
    return [spool.with_name(spool.name + end) for end in ("", ".inputs", ".targets")]


def _gathered(
    spools: tuple[Path, ...],
    end: str,
    inner: tuple[int, ...],
    kind: str,
    counts: list[int],
    dealt: bool,
    start: int,
    stop: int,
) -> np.ndarray:
    """Samples start to stop out of all ranks' spools."""
    rows = np.empty((stop - start, *inner), kind)
    size, before = len(spools), 0
    for rank, (spool, num) in enumerate(zip(spools, counts, strict=True)):
        if dealt:  # in turn: rank's samples are rank, rank + size ...
            first, last = -(-(start - rank) // size), -(-(stop - rank) // size)
            into = rows[(rank - start) % size :: size]
        else:
            first, last = min(max(0, start - before), num), min(max(0, stop - before), num)
            into = rows[max(0, before - start) : max(0, before - start) + last - first]
        before += num
        if last > first:
            each = row_bytes(Array((1, *inner), np.dtype(kind), in_memory(rows).read))
            with spool.with_name(spool.name + f".{end}").open("rb") as file:
                file.seek(first * each)
                data = file.read((last - first) * each)
            if len(data) != (last - first) * each:
                raise UserError(f"{spool}.{end} is truncated", "Prepare again with --overwrite.")
            into[:] = np.frombuffer(data, kind).reshape(last - first, *inner)
    return rows


def _kept(spool: Path, name: str, state: str, size: int) -> dict[str, Any] | None:
    """What a killed run spooled to the end, if nothing has changed since."""
    try:
        with owned_files.opened(spool, "rb") as file:
            noted = json.loads(file.read()) if not owned_files.others_may_write(file) else {}
        inputs = spool.with_name(spool.name + ".inputs").stat().st_size
        targets = spool.with_name(spool.name + ".targets").stat().st_size
    except (OSError, ValueError):
        return None
    same = noted.get("what") == [name, state, size] and [inputs, targets] == noted.get("bytes")
    return noted if same and state else None


def _note(spool: Path, name: str, state: str, size: int, mine: dict[str, Any]) -> None:
    ends = [spool.with_name(spool.name + end).stat().st_size for end in (".inputs", ".targets")]
    try:
        with owned_files.created(spool, 0o644) as file:
            file.write(json.dumps(mine | {"what": [name, state, size], "bytes": ends}).encode())
    except OSError as error:
        raise no_room(spool, error.errno) from None


def _spool(spool: Path, name: str, told: Any, shared: bool, context: Context) -> dict[str, Any]:
    """Writes this rank's samples to disk; returns how many there are, their shape and type."""
    if not isinstance(told, Iterable):
        raise UserError(f"prepare {name}: it returned {type(told).__name__}, nothing to iterate over", _SHAPE)
    num, shape, dtype = 0, [], ""
    with _Spooled(spool) as spooled:
        for index, x, y in _checked(name, told):
            if num == 0:
                shape, dtype = list(x.shape), x.dtype.str
            if not shared and index % context.world.size != context.world.rank:
                continue
            if list(x.shape) != shape or x.dtype.str != dtype:
                raise UserError(
                    f"prepare {name}: sample {index} is {x.dtype.str} {list(x.shape)}, those before {dtype} {shape}",
                    _SHAPE,
                )
            spooled.add(x, y)
            num += 1
    return {"num": num, "shape": shape, "dtype": dtype}


class _Spooled:
    """The inputs and targets of a rank, on their way to disk. Raises `UserError` where that is full, and no other."""

    def __init__(self, spool: Path) -> None:
        self._path = spool
        try:
            spool.parent.mkdir(parents=True, exist_ok=True)
            self._files = [owned_files.created(Path(f"{spool}{end}"), 0o644, 0) for end in (".inputs", ".targets")]
        except OSError as error:
            raise no_room(spool, error.errno) from None
        self._waiting: list[list[bytes]] = [[], []]
        self._num_bytes = 0

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        for waiting, values in zip(self._waiting, (x, y), strict=True):
            waiting.append(values.tobytes())
            self._num_bytes += values.nbytes
        if self._num_bytes >= _SPOOL_BYTES:
            self._flush()

    def _flush(self) -> None:
        try:
            for waiting, file in zip(self._waiting, self._files, strict=True):
                write_all(file, b"".join(waiting))
                waiting.clear()
        except OSError as error:
            raise no_room(self._path, error.errno) from None
        self._num_bytes = 0

    def __enter__(self) -> "_Spooled":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            for file in self._files:
                file.close()


def _checked(name: str, told: Iterable[Any]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The samples as arrays: (number, input, target)."""
    for index, sample in enumerate(_until_it_ends(name, told)):
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise UserError(f"prepare {name}: sample {index} is {type(sample).__name__}, no pair", _SHAPE)
        x, y = _as_array(sample[0]), _as_array(sample[1])
        if x.dtype.kind not in "biuf" or x.ndim == 0 or not x.size or y.size != 1 or y.dtype.kind not in "biu":
            raise UserError(
                f"prepare {name}: sample {index} is {x.dtype} {x.shape} with the target {y.dtype} {y.shape}", _SHAPE
            )
        if y.dtype.kind == "u" and y.max() > np.iinfo(np.int64).max:
            raise UserError(f"prepare {name}: sample {index} has the target {y}, too large for 64 bits", _SHAPE)
        yield index, x.astype(x.dtype.newbyteorder("="), copy=False), y.astype(np.int64).reshape(())


def _until_it_ends(name: str, told: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from told
    except SystemExit as error:
        raise _ended(name, error) from None


def _as_array(value: Any) -> np.ndarray:
    """Of rows that differ in length, and the like, an array of objects, which is no number."""
    try:
        return np.asarray(value)
    except Exception:  # noqa: BLE001  a user's object may raise what it likes
        return np.empty((), object)
