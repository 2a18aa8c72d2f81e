"""Reading training samples out of HDF5: where the file's layout allows it, straight out of a memory map."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from hpc_train.config import Config
from hpc_train.errors import UserError
from hpc_train.partition import rank_span
from hpc_train.train.context import Context

_SCAN_ROWS = 1 << 20


@dataclass(frozen=True)
class Batch:
    """Samples as stored: `inputs` (n, *input_shape) of the file's dtype, `targets` (n,) int64. n may be 0.

    A stored input s means s * scale + offset (the attributes scale_factor and add_offset of the CF conventions):
    small integers travel to the device as they are and become floats there.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    scale: float
    offset: float

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Split:
    """Inputs and targets of one part of a data set, row by row. `scale` and `offset`: see `Batch`."""

    inputs: Any
    targets: Any
    scale: float
    offset: float

    def __len__(self) -> int:
        return int(self.targets.shape[0])

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.inputs.shape[1:])

    def batch(self, rows: np.ndarray) -> Batch:
        """The samples standing at `rows`, in that order. Reads only these rows."""
        targets = torch.from_numpy(_take(self.targets, rows).astype(np.int64, copy=False))
        return Batch(torch.from_numpy(_take(self.inputs, rows)), targets, self.scale, self.offset)


def _take(array: Any, rows: np.ndarray) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return np.take(array, rows, axis=0)
    distinct, back = np.unique(rows, return_inverse=True)  # h5py wants rising indices
    taken = np.asarray(array[distinct])[back]
    return taken if taken.dtype.isnative else taken.astype(taken.dtype.newbyteorder("="))


def data_path(config: Config) -> Path:
    """Where the job's data lie. Raises `UserError` where it names none."""
    if config.data.file is None:
        raise UserError("data.file is required and not set", f"task.kind = '{config.task.kind}' reads an HDF5 file.")
    return Path(config.data.file).expanduser()


def open_split(path: Path, inputs: str, targets: str, keys: tuple[str, str], optional: bool = False) -> Split | None:
    """Opens one part of an HDF5 file for reading; None if `optional` and the file has neither data set.

    keys: the configuration keys that named `inputs` and `targets`, for messages. Raises `UserError`.
    """
    file = _open(path)
    names = dict(zip(keys, (inputs, targets), strict=True))
    absent = [key for key, name in names.items() if not isinstance(file.get(name), h5py.Dataset)]
    if optional and len(absent) == 2:
        return None
    if absent:
        raise _absent(file, path, absent[0], names[absent[0]])
    x, y = file[inputs], file[targets]
    if x.ndim < 2 or y.ndim != 1 or y.dtype.kind not in "iu" or x.dtype.kind not in "biuf" or x.dtype.itemsize > 8:
        raise UserError(
            f"{path}: {inputs} is {x.dtype} {x.shape}, {targets} is {y.dtype} {y.shape}",
            "Inputs are numbers of at most 8 bytes, of shape (samples, ...), targets integers of shape (samples,).",
        )
    if len(x) != len(y) or len(x) == 0:
        raise UserError(
            f"{path}: {inputs} has {len(x)} samples and {targets} has {len(y)}",
            "Each input needs one target: prepare the file again.",
        )
    return Split(_mapped(path, x), _mapped(path, y), _number(x, "scale_factor", 1.0), _number(x, "add_offset", 0.0))


@dataclass(frozen=True)
class Tokens:
    """A stream of token ids, cut into windows of `length`; with `ahead`, each window sees the one token after it."""

    values: Any
    length: int
    ahead: int

    def __len__(self) -> int:
        return (len(self.values) - self.ahead) // self.length

    def windows(self, rows: np.ndarray) -> np.ndarray:
        """(n, length + ahead) ids of the file's type: the windows at `rows`, which do not overlap."""
        starts, width = rows * self.length, self.length + self.ahead
        if isinstance(self.values, np.ndarray):
            return np.take(self.values, starts[:, None] + np.arange(width))
        native = self.values.dtype.newbyteorder("=")
        read = [self.values[start : start + width] for start in starts.tolist()]
        return np.array(read, native).reshape(len(rows), width)


def open_tokens(path: Path, name: str, key: str, length: int, ahead: int, optional: bool = False) -> Tokens | None:
    """Opens data set `name`, which the configuration's `key` names, as windows of `length` tokens.

    None if `optional` and the file has none of that name. Raises `UserError`.
    """
    file = _open(path)
    stream = file.get(name)
    if optional and stream is None:
        return None
    if not isinstance(stream, h5py.Dataset):
        raise _absent(file, path, key, name)
    if stream.ndim != 1 or stream.dtype.kind not in "iu":
        raise UserError(
            f"{path}: {name} is {stream.dtype} {stream.shape}, and no tokens",
            f"Tokens are whole numbers of shape (tokens,): make them with hpc-train prepare text {path} --from DIR",
        )
    tokens = Tokens(_mapped(path, stream), length, ahead)
    if len(tokens) == 0:
        raise UserError(
            f"{path}: {name} has {len(stream):,} tokens, too few for a window of task.options.context = {length}",
            "Prepare more text, or set task.options.context lower.",
        )
    return tokens


def text_facts(path: Path) -> dict[str, Any]:
    """What a prepared text says of its tokens: tokenizer, vocab_size and, of one that was learned, its json."""
    file = _open(path, "python-source")
    facts = {name: file.attrs[name] for name in ("tokenizer", "vocab_size") if name in file.attrs}
    json = file.get("tokenizer")
    return facts | ({"json": bytes(json[:]).decode()} if isinstance(json, h5py.Dataset) else {})


def _number(dataset: h5py.Dataset, attribute: str, default: float) -> float:
    value = np.asarray(dataset.attrs.get(attribute, default))
    if value.size != 1 or value.dtype.kind not in "iuf":
        raise UserError(
            f"{dataset.file.filename}: attribute {attribute} of {dataset.name} is no number",
            "It is one number for the whole data set (CF conventions): mend it or remove it.",
        )
    return float(value.reshape(()))


def _open(path: Path, example: str = "mnist-5k") -> h5py.File:
    if path.is_dir():
        raise UserError(f"data.file = '{path}' is a folder", "Name an HDF5 file.")
    if not path.is_file():
        raise UserError(f"data.file = '{path}' does not exist", f"Make it: hpc-train prepare {example} {path}")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        reason = str(error)
        if "truncated" in reason:
            words, remedy = "is truncated: its end is missing", "Copy or prepare it again."
        elif "signature" in reason:
            words, remedy = (
                "is not an HDF5 file",
                "Name an HDF5 file; hpc-train prepare --help shows how to make one.",
            )
        else:
            words, remedy = (
                f"cannot be opened: {reason}",
                "Look at its permissions and at file locking (HDF5_USE_FILE_LOCKING).",
            )
        raise UserError(f"data.file = '{path}' {words}", remedy) from None
    if not file.attrs.get("complete", True):
        raise UserError(f"data.file = '{path}' was never completed: its writer was stopped", "Prepare it again.")
    return file


def _absent(file: h5py.File, path: Path, key: str, name: str) -> UserError:
    return UserError(
        f"{key} = '{name}': no such data set in {path}",
        f"It holds: {', '.join(_dataset_names(file)) or 'none'}. Set {key} to one of them.",
    )


def _dataset_names(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names[:20]


def _mapped(path: Path, dataset: h5py.Dataset) -> Any:
    """A memory map of a contiguous data set, else the data set itself.

    Not through h5py: its lock lets one thread at a time in, and a slab costs 2 to 4 times a gather from the map.
    """
    start = (
        dataset.id.get_offset() if dataset.chunks is None and not dataset.external and not dataset.is_virtual else None
    )
    if start is None or not dataset.dtype.isnative:
        return dataset
    return np.asarray(np.memmap(path, dataset.dtype, "r", offset=start, shape=dataset.shape))


def value_range(values: Any, context: Context) -> tuple[int, int]:
    """Collective. (lowest, highest) of all labels or tokens, every rank reading its share."""
    start, stop = rank_span(len(values), context.world.rank, context.world.size)
    low, high = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    for begin in range(start, stop, _SCAN_ROWS):
        part = values[begin : min(begin + _SCAN_ROWS, stop)]
        low, high = min(low, int(part.min())), max(high, min(int(part.max()), np.iinfo(np.int64).max))
    lowest, highest = context.max(np.array([-low, high], dtype=np.int64))
    return -int(lowest), int(highest)
