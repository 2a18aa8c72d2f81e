"""Samples from HDF5 as tasks see them: splits of inputs and targets, and the order of an epoch."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import Order, rank_span
from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.data.files import Files, chunk_cache_bytes
from hpc_train.train.data.rank_batches import RankBatches
from hpc_train.train.data.reader_interface import Reader
from hpc_train.train.data.readers import SelectedReader, StringReader, is_strings

Use = Literal["train", "validation", "test"]
USES: tuple[Use, ...] = ("train", "validation", "test")
MAX_CHUNKS_MIXED = 64  # with each other: more make no better batches
_SCAN_ROWS = 1 << 20
_TEST_BATCH, _TEST_BYTES = 1024, 8 << 20  # samples at once, and bytes of their inputs, of which models make many more
_WIDE = (torch.float64, torch.int64, torch.int32)


@dataclass(frozen=True)
class Filling:
    """values: stored numbers that stand for no value, as NaN does. mean: what is put in their place, (*input_shape)."""

    values: tuple[float, ...]
    mean: torch.Tensor

    def filled(self, stored: torch.Tensor, floats: torch.Tensor) -> torch.Tensor:
        """`floats`, the numbers `stored` as float32, with the mean where a value is missing."""
        missing = ~torch.isfinite(floats)
        for value in self.values:
            missing |= stored == torch.tensor(value, dtype=stored.dtype, device=stored.device)
        return torch.where(missing, self.mean.to(floats.dtype), floats)


class Standard(NamedTuple):
    """Mean and standard deviation of stored numbers, float64, of a shape that goes with a sample's."""

    mean: torch.Tensor
    std: torch.Tensor

    def applied(self, values: torch.Tensor) -> torch.Tensor:
        """float32. The mean goes first: what is left of large numbers keeps its digits."""
        return ((values - self.mean.to(values.dtype)) / self.std.to(values.dtype)).to(torch.float32)


@dataclass(frozen=True)
class Batch:
    """Samples as stored: `inputs` (n, *input_shape) of the file's dtype, `targets` (n, ...). n may be 0.

    Targets that are whole numbers are int64, real ones float32. A stored input s means s * scale + offset (the
    attributes scale_factor and add_offset of the CF conventions). Small integers are copied to the device as they are
    and become floats there, by `floats`. If data.inputs names several data sets, inputs, scale and offset are tuples.
    filling: see data.missing = "mean". standard: see data.normalize = "standardize", in place of scale and offset.
    """

    inputs: Any
    targets: torch.Tensor
    scale: Any
    offset: Any
    filling: Filling | None = None
    standard: Standard | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def floats(self) -> Any:
        """The values that the stored inputs mean, float32, on their device; a tuple for several inputs."""
        if isinstance(self.inputs, tuple):
            return tuple(map(_unscaled, self.inputs, self.scale, self.offset))
        return _unscaled(self.inputs, self.scale, self.offset, self.filling, self.standard)


def _unscaled(
    stored: torch.Tensor, scale: float, offset: float, filling: Filling | None = None, standard: Standard | None = None
) -> torch.Tensor:
    is_wide = standard is not None and stored.dtype in _WIDE  # beyond what float32 tells apart
    values = stored.to(torch.float64 if is_wide else torch.float32)
    if filling is not None:
        values = filling.filled(stored, values)
    if standard is not None:
        return standard.applied(values)
    return values if (scale, offset) == (1.0, 0.0) else values * scale + offset


class Buffers:
    """Arrays that are reused once nobody holds them: a page fault in new memory costs more than the copy into it.

    Pinned if there is a GPU, which then copies from them asynchronously.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        # Of an array that only a list holds: Python's versions count differently.
        self._num_references_if_free = _num_references([np.empty(0)])[0]
        self._is_pinned = torch.cuda.is_available()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of that shape, its content undefined."""
        num_bytes = prod(shape) * dtype.itemsize
        for array, num_references in zip(self._arrays, _num_references(self._arrays), strict=True):
            if len(array) >= num_bytes and num_references == self._num_references_if_free:
                break
        else:
            array = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_pinned).numpy()
            self._arrays = [each for each in self._arrays if len(each) >= num_bytes] + [array]
        return array[:num_bytes].view(dtype).reshape(shape)


def _num_references(arrays: list[np.ndarray]) -> list[int]:
    """How many references there are to each array; a view of it is one."""
    return [sys.getrefcount(array) for array in arrays]


@dataclass(frozen=True)
class Split:
    """Inputs and targets of the samples of one use, row by row. `scale` and `offset`: see `Batch`."""

    inputs: tuple[Reader, ...]
    targets: Reader
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    check_unchanged: Callable[[], None]
    groups: Reader | None = None  # of data.hold_out_by
    buffers: Buffers = field(default_factory=Buffers)
    begin_step: Callable[[int], None] | None = None  # collective: the ranks exchange the samples of the coming steps
    filling: Filling | None = None
    standard: Standard | None = None

    def __len__(self) -> int:
        return int(self.targets.shape[0])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of a sample of the first inputs."""
        return tuple(self.inputs[0].shape[1:])

    def batch(self, rows: np.ndarray, step: int = 0) -> Batch:
        """The samples at `rows`, in that order. Reads only these rows, or the chunks that hold them.

        Collective if data.read is "collective" or "memory".
        """
        self.check_unchanged()
        if self.begin_step is not None:
            self.begin_step(step)
        kind = np.float32 if self.targets.dtype.kind == "f" else np.int64
        targets = torch.from_numpy(self.targets.take(rows).astype(kind, copy=False))
        inputs = tuple(torch.from_numpy(self._take(reader, rows)) for reader in self.inputs)
        if len(inputs) == 1:
            return Batch(inputs[0], targets, self.scale[0], self.offset[0], self.filling, self.standard)
        return Batch(inputs, targets, self.scale, self.offset)

    def select(self, rows: np.ndarray) -> "Split":
        """The samples at `rows`, in increasing order, as a split of their own."""
        *inputs, targets = (SelectedReader(reader, rows) for reader in (*self.inputs, self.targets))
        groups = None if self.groups is None else SelectedReader(self.groups, rows)
        return replace(self, inputs=tuple(inputs), targets=targets, groups=groups)

    def prefetch(self, rows: np.ndarray) -> None:
        """A hint: these rows are needed soon."""
        for reader in (*self.inputs, self.targets):
            reader.prefetch(rows)

    def _take(self, reader: Reader, rows: np.ndarray) -> np.ndarray:
        return reader.take(rows, self.buffers.empty((len(rows), *reader.shape[1:]), reader.dtype))


@dataclass(frozen=True)
class Part:
    """The samples of one use. inputs, targets: the names of their data sets in `files`."""

    use: Use
    files: Files
    inputs: str
    targets: str
    split: Split

    def having(self, split: Split) -> "Part":
        return replace(self, split=split)


def open_split(files: Files, inputs: str | list[str], targets: str, keys: tuple[str, str]) -> Split:
    """Opens the data sets `inputs` and `targets` for reading. Raises `UserError` if they are not samples and targets.

    keys: the configuration keys that named them, for messages. Targets are numbers, or strings for a task that reads
    them (`labels.open_classes`).
    """
    names = [inputs] if isinstance(inputs, str) else inputs
    cache_bytes = files.memory_bytes // len(names)
    readers = {name: files.reader(name, keys[0], cache_bytes) for name in names}
    is_opened = targets in readers
    labels = readers[targets] if is_opened else open_column(files, targets, keys[1], cache_bytes // 8)
    for name, reader in readers.items():
        _check_samples(files, (name, reader), (targets, labels))
    scales, offsets = zip(*(files.scale(name) for name in names), strict=True)
    return Split(tuple(readers[name] for name in names), labels, scales, offsets, files.check_unchanged)


def open_column(files: Files, name: str, key: str, memory_bytes: int) -> Reader:
    """A data set of numbers or strings. Raises `UserError` if there is none."""
    parts = files.datasets(name, key)
    if is_strings(parts[0]):
        return StringReader(list(zip(files.paths, parts, strict=True)))
    return files.reader(name, key, memory_bytes)


def _check_samples(files: Files, inputs: tuple[str, Reader], targets: tuple[str, Reader]) -> None:
    """Raises `UserError` unless these (name, reader) pairs are inputs and their labels."""
    (name, x), (target_name, y), path = inputs, targets, files.paths[0]
    if len(x.shape) < 2 or x.dtype.itemsize > 8 or y.dtype.itemsize > 8:
        raise UserError(
            f"{path}: {name} is {x.dtype} {x.shape}, {target_name} is {y.dtype} {y.shape}",
            "Inputs are numbers of at most 8 bytes, of shape (samples, ...), targets one or several for each sample.",
        )
    if len(x) == len(y) == 0:
        raise UserError(
            f"{path}: {name} and {target_name} hold no samples",
            "Write some, or name other data sets; a file without data sets to test on is trained without a test.",
        )
    if len(x) != len(y):
        raise UserError(
            f"{path}: {name} has {len(x)} samples and {target_name} has {len(y)}",
            "Each input needs one target: prepare the file again.",
        )


def test_batches(split: Split | None, world: World, at_most: int | None = None) -> Iterator[Batch]:
    """This rank's share of a split's samples, in order; none of None. at_most: see `RankBatches`."""
    if split is None:
        return iter(())
    num_at_once = min(_TEST_BATCH, max(1, _TEST_BYTES // (4 * max(1, prod(split.input_shape)))))
    return RankBatches(len(split), world, num_at_once, split.batch, at_most)


def open_order(readers: Sequence[Reader], num_samples: int, config: Config, rows_per_sample: int = 1) -> Order:
    """The order that suits how samples are stored: chunk by chunk if any of `readers` has chunks, else all mixed.

    It depends on the files and the configuration alone: every rank, and a job that resumes, has the same.
    """
    chunked = next((reader for reader in readers if reader.chunk_edges is not None), None)
    if chunked is None or chunked.chunk_edges is None:
        return Order(num_samples)
    edges = np.unique(np.minimum(chunked.chunk_edges // rows_per_sample, num_samples))
    edges[-1] = num_samples
    chunk_bytes = max(1, int(np.diff(edges).max()) * chunked.row_bytes * rows_per_sample)
    # Two windows must fit: the next one is decoded while this one is trained on.
    window = config.data.shuffle_chunks or min(MAX_CHUNKS_MIXED, chunk_cache_bytes(config) // 2 // chunk_bytes)
    return Order(num_samples, edges, max(1, window))


def value_range(values: Reader, context: Context) -> tuple[int, int]:
    """Collective. (lowest, highest) of all labels or tokens, clipped to 63 bits and a sign; each rank reads a part."""
    start, stop = rank_span(len(values), context.world.rank, context.world.size)
    limit = int(np.iinfo(np.int64).max)
    low, high = limit, -limit
    for begin in range(start, stop, _SCAN_ROWS):
        part = values[begin : min(begin + _SCAN_ROWS, stop)]
        low, high = max(-limit, min(low, int(part.min()))), max(high, min(int(part.max()), limit))
    lowest, highest = context.max(np.array([-low, high], dtype=np.int64))
    return -int(lowest), int(highest)
