"""The samples that a trained model is used on, opened as training opened its own; a file may hold no targets."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.missing_values import is_missing
from hpc_train.core.settings import Config
from hpc_train.train.comm.context import Context, joint
from hpc_train.train.data.dataset import Batch, Filling, Split, open_split
from hpc_train.train.data.files import Files, describe, open_files
from hpc_train.train.data.hdf5_faults import scale_mismatch
from hpc_train.train.data.labels import in_classes
from hpc_train.train.data.missing import declared_values
from hpc_train.train.data.reader_interface import Reader
from hpc_train.train.data.table import PREPARE_LIKE, read_table, table_of
from hpc_train.train.inference.learned import Learned


@dataclass(frozen=True)
class Samples:
    """Rows of data set `name`, with the targets of `targets_name` if the file has them.

    targets_name: None without targets. missing, missing_targets: stored numbers that stand for no value. A row with a
    missing input has no prediction, unless data.missing = "mean"; one without a target is not measured.
    """

    files: Files
    name: str
    split: Split
    targets_name: str | None
    missing: tuple[float, ...]
    missing_targets: tuple[float, ...]
    reading: str  # what is read and how, for the log
    are_held_out: bool = False  # of the training samples

    def __len__(self) -> int:
        return len(self.split)

    def has_inputs(self, batch: Batch) -> np.ndarray:
        """(n,) whether each sample of a batch has all its values."""
        if self.split.filling is not None:
            return np.ones(len(batch), bool)
        return _is_whole(batch.inputs.numpy(), self.missing)

    def has_targets(self, batch: Batch) -> np.ndarray:
        """(n,) whether each sample of a batch has a target."""
        if self.targets_name is None:
            return np.zeros(len(batch), bool)
        stored = batch.targets.numpy()
        if stored.ndim > 1 and self.split.targets.dtype.kind == "f":  # of several, those that are there count
            return np.asarray(~is_missing(stored, self.missing_targets).reshape(len(stored), -1).all(axis=1))
        return _is_whole(stored, self.missing_targets)

    def num_targets_missing(self, batch: Batch) -> np.ndarray:
        """(n,) how many target values each sample of a batch lacks; 0 without targets."""
        if self.targets_name is None:
            return np.zeros(len(batch), np.int64)
        return np.asarray(is_missing(batch.targets.numpy(), self.missing_targets).reshape(len(batch), -1).sum(axis=1))


def _is_whole(stored: np.ndarray, missing: tuple[float, ...]) -> np.ndarray:
    return np.asarray(~is_missing(stored, missing).reshape(len(stored), -1).any(axis=1))


class _NoTargets(Reader):
    """Stands where a file has no targets."""

    description = "none"

    def __init__(self, num_rows: int) -> None:
        self.shape, self.dtype = (num_rows,), np.dtype(np.int64)

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        return np.zeros(len(rows), self.dtype)


def open_samples(
    config: Config,
    learned: Learned,
    like: str,
    names: tuple[str | None, str | None],
    needs_targets: bool,
    context: Context,
    log: Callable[[str], None],
) -> Samples:
    """Collective. The samples of data.file, which a trained model takes.

    like: the training data, for messages. names: the data sets of inputs and targets; None for those that the run's
    configuration names, to test on or else to train on. Raises UserError if the samples are not of the kind that the
    model has learned, and without usable targets if `needs_targets`; else a line says why they are left out.
    """
    files = context.on_all(partial(open_files, config, context))
    name, targets = context.on_all(partial(_names, config, files, *names))
    if targets is None and needs_targets:
        raise joint(
            UserError(
                f"{files.paths[0]} has no targets for {name}, and measures need them",
                f"Name their data set: --targets NAME. The file holds: {files.names_in_words()}.",
            )
        )
    split = context.on_all(partial(_open, files, name, targets))
    if not context.on_all(partial(_names_columns, files, name, learned, like)):
        log(f"warning: {files.paths[0]} does not name its columns: they are taken for those of training, in order")
    context.on_all(partial(_require_kind, config, files, name, split, learned))
    if targets is not None:
        try:
            split = _with_targets(files, split, targets, learned, like, context)
        except UserError as error:
            if needs_targets:
                raise
            log(f"Predictions are not compared with {targets}: {error.what}")
            split, targets = replace(split, targets=_NoTargets(len(split))), None
    missing = context.on_all(partial(declared_values, files, name))
    split = replace(split, standard=learned.standard)
    if config.data.normalize == "none":
        split = replace(split, scale=(1.0,), offset=(0.0,))
    if learned.mean_for_missing is not None:
        split = replace(split, filling=Filling(missing, learned.mean_for_missing))
    missing_targets: tuple[float, ...] = ()
    if targets is not None and learned.classes is None:
        missing_targets = context.on_all(partial(declared_values, files, targets))
    return Samples(files, name, split, targets, missing, missing_targets, describe(files, name, split.inputs[0]))


def _names(config: Config, files: Files, inputs: str | None, targets: str | None) -> tuple[str, str | None]:
    """(the data set of inputs, that of targets or None)."""
    data = config.data
    pairs = [(str(data.test_inputs), data.test_targets), (str(data.inputs), data.targets)]
    if inputs is None:
        found = [pair for pair in pairs if files.has(pair[0])]
        if not found:
            tried = " and no ".join(dict.fromkeys(name for name, _ in pairs))
            raise UserError(
                f"{files.paths[0]} has no {tried}, which are the inputs of the run",
                f"Name the data set of inputs: --inputs NAME. The file holds: {files.names_in_words()}.",
            )
        inputs, usual = found[0]
    else:
        files.datasets(inputs, "--inputs")
        usual = dict(pairs).get(inputs, "")
    if targets is not None:
        files.datasets(targets, "--targets")
        return inputs, targets
    return inputs, usual if usual and files.has(usual) else None


def _open(files: Files, name: str, targets: str | None) -> Split:
    if targets is not None:
        return open_split(files, name, targets, ("--inputs", "--targets"))
    reader = files.reader(name, "--inputs")
    if not len(reader.shape) or not len(reader):
        raise UserError(f"{files.paths[0]}: {name} has no rows", "Name a data set with samples: --inputs NAME.")
    scale, offset = files.scale(name)
    return Split((reader,), _NoTargets(len(reader)), (scale,), (offset,), files.check_unchanged)


def _names_columns(files: Files, name: str, learned: Learned, like: str) -> bool:
    """Whether samples of a table say that their columns are those of the run. Raises UserError if they are others."""
    if learned.table is None:
        return True
    table = table_of(files.paths[0], files.opened[0])
    if table is not None and (why := learned.table.differs(table)):
        raise UserError(f"{files.paths[0]}: {why}", PREPARE_LIKE.format(like))
    return read_table(files, name) is not None


def _require_kind(config: Config, files: Files, name: str, split: Split, learned: Learned) -> None:
    path, found = files.paths[0], split.inputs[0]
    if split.input_shape != learned.shape or found.dtype.kind not in "biuf" or found.dtype.itemsize > 8:
        raise UserError(
            f"{path}: {name} has samples of {found.dtype} {split.input_shape}, and the model takes "
            f"{learned.dtype} {learned.shape}",
            f"Name a data set of that shape: --inputs NAME. The file holds: {files.names_in_words()}.",
        )
    if config.data.normalize == "none":
        return
    if why := scale_mismatch(learned.dtype, learned.scale, found.dtype, files.scale(name)):
        raise UserError(
            f"{path}: {name} and the inputs that the run trained on disagree, so that the model would see other "
            f"values: {why}",
            "Stored numbers must mean the same: set the attributes alike, or prepare the file as the training data.",
        )


def _with_targets(files: Files, split: Split, name: str, learned: Learned, like: str, context: Context) -> Split:
    """Collective. The split with targets as the model has learned them. Raises UserError, on all ranks."""
    context.on_all(partial(_require_classes, files, learned, like))
    if learned.classes is not None:
        return in_classes(split, name, files.paths[0], learned.classes, context)
    context.on_all(partial(_require_targets, files, name, split, learned))
    return split


def _require_classes(files: Files, learned: Learned, like: str) -> None:
    """Raises UserError if class numbers stand for other texts than those of the run."""
    table = table_of(files.paths[0], files.opened[0])
    if table and learned.table and (why := learned.table.classes_differ(table)):
        raise UserError(f"{files.paths[0]}: {why}", PREPARE_LIKE.format(like))


def _require_targets(files: Files, name: str, split: Split, learned: Learned) -> None:
    found, scale = split.targets, learned.targets
    assert scale is not None
    if found.dtype.kind not in "biuf" or found.shape[1:] != learned.target_shape:
        raise UserError(
            f"{files.paths[0]}: {name} has targets of {found.dtype} {found.shape[1:]}, and the model predicts "
            f"{learned.target_shape}",
            "Name another data set: --targets NAME.",
        )
    if files.scale(name) != (scale.scale, scale.offset):
        raise UserError(
            f"{files.paths[0]}: {name} has scale_factor, add_offset {files.scale(name)}, and the targets that the run "
            f"trained on have {(scale.scale, scale.offset)}",
            "Stored numbers must mean the same: set the attributes alike, or name another data set: --targets NAME.",
        )
