"""What tasks see of HDF5: splits of samples, token streams, and in which order they are gone through."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import Order, rank_span, require_rows
from hpc_train.core.settings import Config
from hpc_train.train.comm.context import Context
from hpc_train.train.data.files import Files, chunk_cache_bytes
from hpc_train.train.data.readers import Reader

_SCAN_ROWS = 1 << 20
MAX_CLASSES = 1 << 16  # where there are not as many samples: a label beyond is an id, or damaged
_MOST_CHUNKS = 64  # mixed with each other: more make no better batches


@dataclass(frozen=True)
class Batch:
    """Samples as stored: `inputs` (n, *input_shape) of the file's dtype, `targets` (n,) int64. n may be 0.

    A stored input s means s * scale + offset (the attributes scale_factor and add_offset of the CF conventions):
    small integers travel to the device as they are and become floats there, by `floats`. Where data.inputs names
    several data sets, inputs, scale and offset are tuples.
    """

    inputs: Any
    targets: torch.Tensor
    scale: Any
    offset: Any

    def __len__(self) -> int:
        return len(self.targets)

    def floats(self) -> Any:
        """What the stored inputs mean, in float32, on the device they are on; a tuple where there are several."""
        if isinstance(self.inputs, tuple):
            return tuple(map(_scaled, self.inputs, self.scale, self.offset))
        return _scaled(self.inputs, self.scale, self.offset)


def _scaled(stored: torch.Tensor, scale: float, offset: float) -> torch.Tensor:
    values = stored.to(torch.float32)
    return values if (scale, offset) == (1.0, 0.0) else values * scale + offset


class Buffers:
    """Arrays that are filled again once nobody holds them: new memory costs more than the copy into it.

    Pinned where there is a GPU, which then fetches them by itself.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._num_free = _num_holders([np.empty(0)])[0]  # of an array that the list alone holds: Pythons differ
        self._is_pinned = torch.cuda.is_available()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of that shape, its content undefined."""
        num_bytes = prod(shape) * dtype.itemsize
        for array, num_holders in zip(self._arrays, _num_holders(self._arrays), strict=True):
            if len(array) >= num_bytes and num_holders == self._num_free:
                break
        else:
            array = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_pinned).numpy()
            self._arrays = [each for each in self._arrays if len(each) >= num_bytes] + [array]
        return array[:num_bytes].view(dtype).reshape(shape)


def _num_holders(arrays: list[np.ndarray]) -> list[int]:
    """How many references there are to each; a view of an array is one of them."""
    return [sys.getrefcount(array) for array in arrays]


@dataclass(frozen=True)
class Split:
    """Inputs and targets of one part of a data set, row by row. `scale` and `offset`: see `Batch`."""

    inputs: tuple[Reader, ...]
    targets: Reader
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    check_unchanged: Callable[[], None]
    buffers: Buffers = field(default_factory=Buffers)
    begin: Callable[[int], None] | None = None  # to be told each step's number: data that ranks exchange

    def __len__(self) -> int:
        return int(self.targets.shape[0])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of a sample of the first data set of inputs."""
        return tuple(self.inputs[0].shape[1:])

    def batch(self, rows: np.ndarray, step: int = 0) -> Batch:
        """The samples standing at `rows`, in that order. Reads only these rows, or the chunks that hold them.

        Collective where ranks read together (data.read).
        """
        self.check_unchanged()
        if self.begin is not None:
            self.begin(step)
        targets = torch.from_numpy(self.targets.take(rows).astype(np.int64, copy=False))
        inputs = tuple(torch.from_numpy(self._take(reader, rows)) for reader in self.inputs)
        if len(inputs) == 1:
            return Batch(inputs[0], targets, self.scale[0], self.offset[0])
        return Batch(inputs, targets, self.scale, self.offset)

    def prefetch(self, rows: np.ndarray) -> None:
        """A hint: these rows come soon."""
        for reader in (*self.inputs, self.targets):
            reader.prefetch(rows)

    def _take(self, reader: Reader, rows: np.ndarray) -> np.ndarray:
        return reader.take(rows, self.buffers.empty((len(rows), *reader.shape[1:]), reader.dtype))


# ------------------------------------------------------------------------------------------------ opening


def open_split(
    files: Files, inputs: str | list[str], targets: str, keys: tuple[str, str], optional: bool = False
) -> Split | None:
    """Opens one part of a data set for reading; None if `optional` and the files have neither inputs nor targets.

    keys: the configuration keys that named `inputs` and `targets`, for messages. Raises `UserError`.
    """
    names = [inputs] if isinstance(inputs, str) else inputs
    wanted = {name: keys[0] for name in names} | {targets: keys[1]}
    if optional and not any(files.has(name) for name in wanted):
        return None
    share = files.memory_bytes // len(names)
    readers = {name: files.reader(name, key, share if name in names else share // 8) for name, key in wanted.items()}
    y, path = readers[targets], files.paths[0]
    for name in names:
        x = readers[name]
        if y.dtype.kind == "f" and (found := first_outside(y, 0, MAX_CLASSES)):
            raise UserError(
                f"{path}: {found[1]:g} in {targets}, row {found[0]:,}, is no label",
                "Labels are whole numbers from 0, stored as integers: mend the data.",
            )
        if len(x.shape) < 2 or len(y.shape) != 1 or y.dtype.kind not in "iu" or not _is_number(x.dtype):
            raise UserError(
                f"{path}: {name} is {x.dtype} {x.shape}, {targets} is {y.dtype} {y.shape}",
                "Inputs are numbers of at most 8 bytes, of shape (samples, ...), targets integers of shape (samples,).",
            )
        if x.shape[0] != y.shape[0] or y.shape[0] == 0:
            raise UserError(
                f"{path}: {name} has {x.shape[0]} samples and {targets} has {y.shape[0]}",
                "Each input needs one target: prepare the file again.",
            )
    scales, offsets = zip(*(files.scale(name) for name in names), strict=True)
    return Split(tuple(readers[name] for name in names), y, scales, offsets, files.check_unchanged)


def _is_number(dtype: np.dtype) -> bool:
    return dtype.kind in "biuf" and dtype.itemsize <= 8


def open_order(readers: Sequence[Reader], num_samples: int, config: Config, rows_of: int = 1) -> Order:
    """The order that suits how samples lie: all mixed, or chunk by chunk where any of `readers` has chunks.

    rows_of: how many rows of the first reader make a sample. A function of the files and the configuration alone.
    """
    first = next((reader for reader in readers if reader.chunk_edges is not None), None)
    if first is None or first.chunk_edges is None:
        return Order(num_samples)
    edges = np.unique(np.minimum(first.chunk_edges // rows_of, num_samples))
    edges[-1] = num_samples
    if config.data.read == "collective":  # its chunks are global batches
        return Order(num_samples, edges)
    row_bytes = int(np.prod(first.shape[1:], dtype=np.int64)) * first.dtype.itemsize * rows_of
    chunk_bytes = max(1, int(np.diff(edges).max()) * row_bytes)
    window = config.data.shuffle_chunks or min(_MOST_CHUNKS, chunk_cache_bytes(config) // 2 // chunk_bytes)
    return Order(num_samples, edges, max(1, window))


# ------------------------------------------------------------------------------------------------ tokens


@dataclass(frozen=True)
class Tokens:
    """A stream of token ids, cut into windows of `length`; with `ahead`, each window sees the one token after it.

    starts: of each window, where no window spans two documents; None where they follow each other.
    """

    values: Reader
    length: int
    ahead: int
    check_unchanged: Callable[[], None]
    starts: np.ndarray | None = None

    def __len__(self) -> int:
        return (self.values.shape[0] - self.ahead) // self.length if self.starts is None else len(self.starts)

    def windows(self, rows: np.ndarray) -> np.ndarray:
        """(n, length + ahead) ids of the file's type: the windows at `rows`, which do not overlap."""
        self.check_unchanged()
        return self.values.take(self._places(rows).reshape(-1)).reshape(len(rows), self.length + self.ahead)

    def prefetch(self, rows: np.ndarray) -> None:
        """A hint: these windows come soon."""
        self.values.prefetch(self._places(rows)[:, [0, -1]].reshape(-1))

    def _places(self, rows: np.ndarray) -> np.ndarray:
        require_rows(rows, len(self))
        starts = rows * self.length if self.starts is None else self.starts[rows]
        return np.asarray(starts[:, None] + np.arange(self.length + self.ahead))


def open_tokens(
    files: Files, name: str, key: str, length: int, ahead: int, offsets: str | None = None, optional: bool = False
) -> Tokens | None:
    """Opens data set `name`, which the configuration's `key` names, as windows of `length` tokens.

    offsets: the data set that says where documents begin; windows then lie within one document, and its last tokens
    that fill none are left out. None if `optional` and the files have none of that name. Raises `UserError`.
    """
    if optional and not files.has(name):
        return None
    stream, path = files.reader(name, key), files.paths[0]
    if len(stream.shape) != 1 or stream.dtype.kind not in "iu":
        raise UserError(
            f"{path}: {name} is {stream.dtype} {stream.shape}, and no tokens",
            f"Tokens are whole numbers of shape (tokens,): make them with hpc-train prepare text {path} --from DIR",
        )
    starts = None if offsets is None else _starts(files, offsets, name, length + ahead)
    tokens = Tokens(stream, length, ahead, files.check_unchanged, starts)
    if len(tokens) == 0:
        raise UserError(
            f"{path}: {name} has {stream.shape[0]:,} tokens, too few for a window of task.options.context = {length}",
            "Prepare more text, or set task.options.context lower.",
        )
    return tokens


def _starts(files: Files, offsets: str, name: str, width: int) -> np.ndarray:
    """Where windows of `width` tokens begin, none of which leaves its document."""
    found, before = [], 0
    for path, bounds, stream in zip(
        files.paths, files.datasets(offsets, "data.offsets"), files.datasets(name, ""), strict=True
    ):
        ends = np.asarray(bounds[()]).astype(np.int64) if bounds.dtype.kind in "iu" else np.zeros(0, np.int64)
        if ends.ndim != 1 or len(ends) < 2 or ends[0] != 0 or ends[-1] != len(stream) or (np.diff(ends) < 0).any():
            raise UserError(
                f"{path}: {offsets} is {bounds.dtype} {bounds.shape}, and no beginnings of documents",
                f"It holds rising whole numbers from 0 to the number of tokens in {name}, {len(stream):,}.",
            )
        counts = np.diff(ends) // width
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        found.append(before + np.repeat(ends[:-1], counts) + inside * width)
        before += len(stream)
    return np.concatenate(found)


def value_range(values: Reader, context: Context) -> tuple[int, int]:
    """Collective. (lowest, highest) of all labels or tokens, each rank reading its share; within 63 bits and a sign."""
    start, stop = rank_span(len(values), context.world.rank, context.world.size)
    most = int(np.iinfo(np.int64).max)
    low, high = most, -most
    for begin in range(start, stop, _SCAN_ROWS):
        part = values[begin : min(begin + _SCAN_ROWS, stop)]
        low, high = max(-most, min(low, int(part.min()))), max(high, min(int(part.max()), most))
    lowest, highest = context.max(np.array([-low, high], dtype=np.int64))
    return -int(lowest), int(highest)


def first_outside(values: Reader, low: int, stop: int) -> tuple[int, Any] | None:
    """(row, value) of the first of `values` that is not in [low, stop), or no whole number; None where all are."""
    for begin in range(0, len(values), _SCAN_ROWS):
        part = values[begin : begin + _SCAN_ROWS]
        is_in = (part >= low) & (part < stop)
        if part.dtype.kind == "f":
            is_in &= part == np.trunc(part)
        if not is_in.all():
            row = int(np.argmin(is_in))
            return begin + row, part[row].item()
    return None
