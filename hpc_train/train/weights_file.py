"""Files of weights, read one tensor at a time: safetensors, HDF5 and the checkpoints of a run.

A reader holds no tensors of its own (but for checkpoints of format 2, which are loaded whole), so that a
rank can read what it needs and no more: a tensor, or some rows and columns of it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import h5py
import numpy as np
import safetensors
import torch

from hpc_train.core import rundir
from hpc_train.core.errors import UserError
from hpc_train.core.paths import exists
from hpc_train.core.rundir import RunDir
from hpc_train.train.data.hdf5_faults import HDF5_ERRORS
from hpc_train.train.models import gpt2_names
from hpc_train.train.run.checkpoint.reading import ModelTensors, is_checkpoint, open_model, read
from hpc_train.train.run.checkpoint.retention import checkpoints, step_of
from hpc_train.train.run.checkpoint.shares import UnusableCheckpoint

MODEL = "model"  # the group of an HDF5 file that holds the weights, one data set each
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}  # as a safetensors file calls them


Index = tuple[slice, ...]  # of a tensor's first dimensions; () for all of it


class Kind(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightsFile(Protocol):
    source: str  # what is read, for messages

    @property
    def step(self) -> int | None:
        """Of a checkpoint; None for another file."""

    def names(self) -> dict[str, Kind]:
        """Shape and dtype of each tensor, in the order of the file. Reads no tensor."""

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """One tensor in host memory, or the part of it that `index` selects."""


@contextmanager
def open_weights(path: Path, told: str, step: int | None = None, verifies: bool = True) -> Iterator[WeightsFile]:
    """The weights of a .safetensors file, an HDF5 file, or a run directory (its newest good checkpoint, or that of
    `step`), under the names that they have there.

    told: what messages call the path, such as "train.init_from = 'x.h5'". Raises UserError, also for an error
    that reading meets inside the block. verifies: see `open_model`.
    """
    remedy = "Name a .safetensors file, an .h5 file, or a run directory."
    if not exists(path):
        raise UserError(f"{told} does not exist", remedy)
    if path.is_dir() and not rundir.is_run(path):
        raise UserError(f"{told} is no run directory: no meta.json, or no folder timings/", remedy)
    if path.is_dir():
        with open_run(RunDir(path), step, verifies=verifies) as weights:
            yield weights
        return
    if not path.is_file() or path.suffix not in (".safetensors", ".h5"):
        raise UserError(f"{told} is no file of weights that can be read", remedy)
    try:
        if path.suffix == ".h5" and is_checkpoint(path):
            with open_model(path, verifies) as model:
                yield CheckpointWeights(str(path), model)
        elif path.suffix == ".h5":
            with h5py.File(path, "r") as file:
                yield Hdf5Weights(str(path), file)
        else:
            with safetensors.safe_open(path, "pt") as opened:
                yield SafetensorsWeights(str(path), opened)
    except (*HDF5_ERRORS, safetensors.SafetensorError, UnusableCheckpoint) as error:
        raise UserError(f"{told} cannot be read: {error}", "Copy it again, or export it anew.") from None


class SafetensorsWeights:
    step = None

    def __init__(self, source: str, file: Any) -> None:
        self.source, self._file = source, file

    def names(self) -> dict[str, Kind]:
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118  it is no mapping
        return {
            name: Kind(tuple(each.get_shape()), self._dtype(name, each.get_dtype())) for name, each in slices.items()
        }

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        return self._file.get_slice(name)[index] if index else self._file.get_tensor(name)

    def _dtype(self, name: str, code: str) -> torch.dtype:
        if code not in _DTYPES:
            raise UserError(f"{self.source}: {name} is of type {code}", f"Known: {', '.join(_DTYPES)}.")
        return _DTYPES[code]


class Hdf5Weights:
    """The data sets below `/model`, or those of the whole file if it has no such group."""

    step = None

    def __init__(self, source: str, file: h5py.File) -> None:
        self.source = source
        self._group = file.get(MODEL, file)

    def names(self) -> dict[str, Kind]:
        found: dict[str, Kind] = {}

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                found[name] = Kind(item.shape, self._dtype(name, item))

        self._group.visititems(visit)
        return found

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        data_set = self._group[name]
        found = np.asarray(data_set[index])
        stored = torch.from_numpy(np.ascontiguousarray(found).reshape(found.shape))  # which makes a number a vector
        return stored.view(self._dtype(name, data_set))

    def _dtype(self, name: str, data_set: h5py.Dataset) -> torch.dtype:
        """Files may state a type that HDF5 has not, such as bfloat16. Raises UserError for one that torch has not."""
        stated = getattr(torch, str(data_set.attrs.get("dtype")), None)
        if isinstance(stated, torch.dtype):
            return stated
        try:
            return torch.from_numpy(np.empty(0, data_set.dtype)).dtype
        except (TypeError, ValueError):
            raise UserError(
                f"{self.source}: {name} is of type {data_set.dtype}, no tensor", "Name a file of weights."
            ) from None


class LoadedWeights:
    """A state_dict. What is no tensor in it (a module's own extra state) counts as absent."""

    def __init__(self, source: str, state: dict[str, Any], step: int) -> None:
        self.source, self.step = source, step
        self._state = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        self.left_out = sorted(state.keys() - self._state.keys())

    def names(self) -> dict[str, Kind]:
        return {name: Kind(tuple(value.shape), value.dtype) for name, value in self._state.items()}

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        return self._state[name][index]


class CheckpointWeights:
    """The model of a checkpoint, read from its file."""

    def __init__(self, source: str, model: ModelTensors) -> None:
        self.source, self._model = source, model
        self.step, self.left_out = model.step, model.left_out

    def names(self) -> dict[str, Kind]:
        return {name: Kind(*kind) for name, kind in self._model.names().items()}

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Raises UserError for damage since it was opened."""
        try:
            return self._rows(name, *index) if len(index) == 1 else self._model.read(name)[index]
        except UnusableCheckpoint as error:
            raise UserError(f"{self.source}: {error}", "Try again: an older checkpoint takes its place.") from None

    def _rows(self, name: str, rows: slice) -> torch.Tensor:
        stored = self._model[name]
        first, last, _ = rows.indices(stored.shape[0])
        found = torch.empty((last - first, *stored.shape[1:]), dtype=stored.dtype)
        stored.read(first * prod(stored.shape[1:]), found.view(-1))
        return found


@contextmanager
def open_run(
    run: RunDir,
    step: int | None = None,
    log: Callable[[str], None] = lambda line: print(line, flush=True),
    verifies: bool = True,
) -> Iterator[CheckpointWeights | LoadedWeights]:
    """The weights of a run's newest good checkpoint, or of the one after `step` steps. Raises UserError.

    log: receives a warning for each newer checkpoint that is damaged. verifies: see `open_model`.
    """
    there = checkpoints(run)
    asked = [each for each in there if step in (None, step_of(each))]
    if not asked:
        which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        steps = ", ".join(str(step_of(each)) for each in reversed(there))
        remedy = (
            f"It has those of steps {steps}." if there else "It was not saved: train again, with checkpoint.keep = 1."
        )
        raise UserError(f"{run.path} has {which}", remedy)
    refused = []
    with ExitStack() as stack:
        for path in asked:
            try:
                weights = _open_checkpoint(path, stack, verifies)
            except UnusableCheckpoint as error:
                refused.append(f"{path}: {error}")
                log(f"warning: checkpoint skipped: {refused[-1]}")
                continue
            yield weights
            return
    raise UserError(
        f"no checkpoint of {run.path} can be used:\n    " + "\n    ".join(refused), "Name another step, or another run."
    )


def _open_checkpoint(path: Path, stack: ExitStack, verifies: bool) -> CheckpointWeights | LoadedWeights:
    """Raises `UnusableCheckpoint`."""
    if not path.is_dir():
        return CheckpointWeights(str(path), stack.enter_context(open_model(path, verifies)))
    state, manifest = read(path)
    return LoadedWeights(str(path), state["model"], manifest["step"])


# ------------------------------------------------------------------------------------------------ names of GPT-2


class AsGpt2:
    """A `Gpt`'s weights under the names and shapes of transformers' GPT2LMHeadModel.

    vocab_size: rows of the embedding beyond it, the padding of `vocab_multiple`, are left out.
    """

    def __init__(self, weights: WeightsFile, vocab_size: int) -> None:
        self.source, self.step, self._weights, self._vocab_size = weights.source, weights.step, weights, vocab_size
        self._ours = {gpt2_names.to_gpt2(name): name for name in weights.names()}

    def names(self) -> dict[str, Kind]:
        kinds = self._weights.names()
        return {theirs: self._kind(theirs, *kinds[ours]) for theirs, ours in self._ours.items()}

    def _kind(self, theirs: str, shape: tuple[int, ...], dtype: torch.dtype) -> Kind:
        if theirs == gpt2_names.EMBEDDING:
            return Kind((self._vocab_size, *shape[1:]), dtype)
        return Kind(shape[::-1] if gpt2_names.is_transposed(self._ours[theirs]) else shape, dtype)

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        ours = self._ours[name]
        if name == gpt2_names.EMBEDDING:
            return self._weights.read(ours)[: self._vocab_size][index]
        return _read_transposed(self._weights, ours, index, gpt2_names.is_transposed(ours))


class FromGpt2:
    """A GPT-2 of transformers under the names and shapes of `Gpt`. Names that a GPT-2 has not stay as they are."""

    def __init__(self, weights: WeightsFile) -> None:
        """Raises UserError if its head is not the embedding."""
        self.source, self.step, self._weights = weights.source, weights.step, weights
        kinds = weights.names()
        self._theirs = {
            gpt2_names.from_gpt2(name) or name: name
            for name in kinds
            if name != gpt2_names.HEAD and not gpt2_names.is_constant(name)
        }
        if gpt2_names.HEAD in kinds and not _are_equal(weights, gpt2_names.HEAD, self._theirs["tokens.weight"]):
            raise UserError(
                f"{self.source}: {gpt2_names.HEAD} differs from the embedding, and a gpt has one tensor for both",
                "Name a GPT-2 with tie_word_embeddings = true, as OpenAI's are.",
            )

    def names(self) -> dict[str, Kind]:
        kinds = self._weights.names()
        return {ours: self._kind(ours, *kinds[theirs]) for ours, theirs in self._theirs.items()}

    def _kind(self, ours: str, shape: tuple[int, ...], dtype: torch.dtype) -> Kind:
        return Kind(shape[::-1] if gpt2_names.is_transposed(ours) else shape, dtype)

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        return _read_transposed(self._weights, self._theirs[name], index, gpt2_names.is_transposed(name))


def _read_transposed(weights: WeightsFile, name: str, index: Index, is_transposed: bool) -> torch.Tensor:
    """`index` of a matrix or its transpose; another tensor is read as it is."""
    if not is_transposed:
        return weights.read(name, index)
    return weights.read(name, (*index, slice(None), slice(None))[1::-1] if index else ()).T


def _are_equal(weights: WeightsFile, one: str, other: str) -> bool:
    """Whether two matrices are; some rows of each are read at a time."""
    kinds, num_rows = weights.names(), 1024
    rows = [(slice(first, first + num_rows),) for first in range(0, kinds[one].shape[0], num_rows)]
    return kinds[one] == kinds[other] and all(
        torch.equal(weights.read(one, each), weights.read(other, each)) for each in rows
    )
