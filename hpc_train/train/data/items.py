"""Samples from a torch.utils.data.Dataset of the user's: data.dataset = "package.module:Dataset"."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, default_collate

from hpc_train.core.errors import UserError
from hpc_train.core.formatting import amount, duration_text, plural
from hpc_train.core.import_path import at_user_line, import_path
from hpc_train.core.sampling import require_rows
from hpc_train.core.settings import Config
from hpc_train.train.comm.context import Context, joint, warn
from hpc_train.train.data.dataset import Part, Split, Use
from hpc_train.train.data.files import chunk_cache_bytes, num_decode_threads, without_values
from hpc_train.train.data.reader_interface import Reader

_MOST_THREADS = 8
_NUM_TIMED = 16  # items
_LONG_S = 30.0
_PARTS_PER_THREAD = 4  # of a batch: items may take unlike times
_PAIR = "Let __getitem__ return (input, target): tensors, arrays or numbers, of the same shape and type for every item."


def open_items(config: Config, context: Context) -> list[Part]:
    """Collective. The samples of data.dataset to train on, then those to validate and to test on if they are named.

    Raises `UserError`.
    """
    data = config.data
    named: list[tuple[Use, dict[str, Any] | None]] = [("train", {}), ("test", data.test_options or None)]
    if config.validation.is_due:
        named.insert(1, ("validation", data.validation_options or None))
    num_threads = data.threads or min(_MOST_THREADS, num_decode_threads(context))
    # One pool for all: with data.threads = 1, no two items are read at once, whoever asks.
    pool = ThreadPoolExecutor(num_threads, "hpc-train-items")
    parts = context.on_all(
        lambda: [_open_part(use, options, config, pool, num_threads) for use, options in named if options is not None]
    )
    lengths = context.all_gather([len(part.split) for part in parts])
    if len({tuple(each) for each in lengths}) > 1:
        raise joint(
            UserError(
                f"data.dataset = '{data.dataset}' has {lengths[0]} items on rank 0, and other numbers on other ranks",
                "It has to be the same on every rank: choose its items by a fixed seed, from the same files.",
            )
        )
    if why := long_reading(parts, config, context):
        warn(context, why)
    return parts


def long_reading(parts: list[Part], config: Config, context: Context) -> str:
    """Collective. That reading all items for their targets takes long, and what is to be done; "" if it does not.

    The root reads some items of the training samples, evenly spaced.
    """
    is_classes = config.task.kind == "classification"
    if is_classes and config.task.num_classes is not None:
        return ""

    def measure() -> float:
        targets = parts[0].split.targets
        rows = np.unique(np.linspace(0, len(targets) - 1, _NUM_TIMED).astype(np.int64))
        began_s = perf_counter()
        targets.take(rows)
        return (perf_counter() - began_s) / len(rows)

    num = sum(len(part.split) for part in parts)
    took_s = context.on_root(measure) * num / context.world.size
    if took_s < _LONG_S:
        return ""
    remedy = "task.num_classes leaves that out" if is_classes else "hpc-train prepare writes them to a file"
    return (
        f"{config.data.in_words}: all {num:,} items are read once for their targets, in about "
        f"{duration_text(took_s)}: {remedy}."
    )


def describe_items(config: Config, reader: Reader) -> str:
    """A line for the log."""
    shape = "x".join(map(str, reader.shape[1:]))
    size = amount(reader.num_bytes, "B")
    return f"{config.data.dataset}: {len(reader):,} x {shape} {reader.dtype}, {size}, {reader.description}"


def _open_part(use: Use, options: dict[str, Any], config: Config, pool: ThreadPoolExecutor, num_threads: int) -> Part:
    data, path = config.data, str(config.data.dataset)
    key = "data.options" if use == "train" else f"data.{use}_options"
    dataset = _make(path, key, {**data.options, **options})
    items = Items(path, dataset, pool, num_threads, chunk_cache_bytes(config) // 2)
    prefix = "" if use == "train" else f"{use}_"
    inputs, targets = (str(getattr(data, f"{prefix}{name}")) for name in ("inputs", "targets"))
    readers = ItemReader(items, 0), ItemReader(items, 1)
    if len(readers[0].shape) < 2:
        raise UserError(
            f"data.dataset = '{path}': the input of item 0 is one number", "Return a tensor (1,) or larger."
        )
    split = Split((readers[0],), readers[1], (1.0,), (0.0,), lambda: None)
    files = without_values(Path(path), {inputs: readers[0], targets: readers[1]})
    return Part(use, files, inputs, targets, split)


def _make(path: str, key: str, options: dict[str, Any]) -> Any:
    """The dataset. Raises `UserError` unless it has items by number."""
    make: Callable[..., Any] = import_path("data.dataset", path, "class of torch.utils.data.Dataset")
    told = f"data.dataset = '{path}'"
    if not callable(make):
        raise UserError(f"{told} is {type(make).__name__}", "Name a class, or a function that returns a Dataset.")
    try:
        dataset = make(**options)
    except TypeError as error:
        raise UserError(f"{key}: {told} refuses {options}: {error}", "See its arguments.") from None
    except Exception as error:  # noqa: BLE001  a user's own class may raise anything
        raise UserError(f"{told}: {_in_words(error)}", f"It was made with {options}: correct {key}.") from None
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise UserError(
            f"{told}: {type(dataset).__name__} has no items by number, which shuffling and resuming need",
            "Write a map-style Dataset: __getitem__(self, index) and __len__(self).",
        )
    try:
        num_items = len(dataset)
    except (TypeError, NotImplementedError):
        raise UserError(f"{told}: {type(dataset).__name__} has no length", "Write its __len__(self).") from None
    if not num_items:
        raise UserError(f"{told} has no items, made with {options}", f"Correct {key}.")
    return dataset


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}{at_user_line(error)}"


# ------------------------------------------------------------------------------------------------ reading items


@dataclass(frozen=True)
class _Form:
    """Type and shape of one input or target, as the dataset returns it."""

    kind: Any
    shape: tuple[int, ...]

    def __str__(self) -> str:
        name = self.kind.__name__ if isinstance(self.kind, type) else str(self.kind)
        return f"{name} {self.shape}" if self.shape else name


def _form(value: Any) -> _Form:
    return _Form(getattr(value, "dtype", type(value)), tuple(getattr(value, "shape", ())))


class Items:
    """The items of a map-style dataset, read by a pool of threads and collated as torch's DataLoader does."""

    def __init__(self, path: str, dataset: Any, pool: ThreadPoolExecutor, num_threads: int, memory_bytes: int) -> None:
        """Reads item 0. Raises `UserError` if it is no pair of numbers. memory_bytes: of the items read at once."""
        self._told, self._dataset, self._pool = f"data.dataset = '{path}'", dataset, pool
        self.num_threads, self._length = num_threads, len(dataset)
        self._at_once = getattr(dataset, "__getitems__", None)
        self._last = threading.local()
        (first,) = pool.submit(self._read, np.zeros(1, np.int64)).result()
        if not isinstance(first, tuple | list) or len(first) != 2:
            raise UserError(f"{self._told}: item 0 is {_shown(first)}, and no pair (input, target)", _PAIR)
        self._forms = [_form(value) for value in first]
        self.examples = self._collated([first])
        self._most_rows = max(1, memory_bytes // max(1, sum(example.nbytes for example in self.examples)))

    def __len__(self) -> int:
        return self._length

    def take(self, rows: np.ndarray, which: int) -> np.ndarray:
        """The inputs (which 0) or targets (1) of these rows.

        An item has both, and a batch asks for one after the other: the other one is kept until then.
        """
        kept = getattr(self._last, "kept", None)
        self._last.kept = None
        if kept is not None and kept[0] == which and np.array_equal(kept[1], rows):
            return kept[2]
        if len(rows) > self._most_rows:
            blocks = np.array_split(rows, -(-len(rows) // self._most_rows))
            return np.concatenate([self._arrays(block)[which] for block in blocks])
        both = self._arrays(rows)
        self._last.kept = 1 - which, rows.copy(), both[1 - which]
        return both[which]

    def _arrays(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(rows):
            inputs, targets = self.examples
            return inputs[:0], targets[:0]
        num_parts = min(len(rows), self.num_threads * (1 if self._at_once else _PARTS_PER_THREAD))
        parts = self._pool.map(self._read_alike, np.array_split(rows, num_parts))
        return self._collated([item for part in parts for item in part])

    def _read_alike(self, rows: np.ndarray) -> list[Any]:
        """Raises `UserError` for an item unlike item 0."""
        items = self._read(rows)
        for row, item in zip(rows.tolist(), items, strict=True):
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise UserError(f"{self._told}: item {row} is {_shown(item)}, and no pair (input, target)", _PAIR)
            for name, value, usual in zip(("input", "target"), item, self._forms, strict=True):
                if (found := _form(value)) != usual:
                    raise UserError(f"{self._told}: the {name} of item {row} is {found}, that of item 0 {usual}", _PAIR)
        return items

    def _read(self, rows: np.ndarray) -> list[Any]:
        numbers = rows.tolist()
        if self._at_once is None:
            return [self._one(number) for number in numbers]
        try:
            items = list(self._at_once(numbers))
        except Exception as error:  # noqa: BLE001  a user's own class may raise anything
            which = ", ".join(map(str, numbers[:5])) + ", ..." * (len(numbers) > 5)
            raise UserError(
                f"{self._told}: __getitems__ of items {which}: {_in_words(error)}", "Correct it there."
            ) from None
        if len(items) != len(numbers):
            raise UserError(
                f"{self._told}: __getitems__ returned {len(items)} items for {len(numbers)}", "Return one for each."
            )
        return items

    def _one(self, number: int) -> Any:
        try:
            return self._dataset[number]
        except Exception as error:  # noqa: BLE001  the same
            raise UserError(f"{self._told}: item {number}: {_in_words(error)}", "Correct it there.") from None

    def _collated(self, items: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Raises `UserError` for what torch cannot make a batch of."""
        try:
            inputs, targets = (values.detach().numpy() for values in default_collate([tuple(each) for each in items]))
        except (TypeError, RuntimeError, AttributeError) as error:  # AttributeError: of strings, torch makes a list
            first = _shown(items[0])
            raise UserError(f"{self._told}: items are {first}, of which no batch can be made: {error}", _PAIR) from None
        if "c" in (inputs.dtype.kind, targets.dtype.kind):
            raise UserError(f"{self._told}: items are complex numbers", "Return real and imaginary part as channels.")
        return inputs, targets


def _shown(item: Any) -> str:
    if isinstance(item, tuple | list):
        return f"({', '.join(str(_form(value)) for value in item[:4])}{', ...' * (len(item) > 4)})"
    return str(_form(item))


class ItemReader(Reader):
    """The inputs (which 0) or the targets (1) of a dataset's items."""

    def __init__(self, items: Items, which: int) -> None:
        self._items, self._which, example = items, which, items.examples[which]
        self.shape, self.dtype = (len(items), *example.shape[1:]), example.dtype
        self.description = f"items read by {plural(items.num_threads, 'thread')}"

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        require_rows(rows, len(self))
        values = self._items.take(rows, self._which)
        if out is None:
            return values
        out[...] = values
        return out
