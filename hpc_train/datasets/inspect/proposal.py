"""What a file looks like as data to train on: inputs and targets by names and shapes, and a job that fits them."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, log2, prod
from pathlib import Path

import h5py
import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.formatting import plural
from hpc_train.core.labels import NoClasses, find_classes, is_label
from hpc_train.core.missing_values import declared_missing, is_missing
from hpc_train.datasets.inspect.names import INPUT_WORDS, TARGET_WORDS, words
from hpc_train.datasets.inspect.structure import DatasetInfo, FileStructure
from hpc_train.datasets.prepare.array_files import StoredArray, kind_of, open_arrays
from hpc_train.datasets.prepare.csv_rows import csv_form

_NUMBERING = {"id", "ids", "index", "idx", "row", "number", "time", "date", "weight", "weights", "mask"}
_TEST_WORDS = {"test", "testing", "valid", "validation", "val", "eval", "holdout"}
_TRAIN_WORDS = {"train", "training"}
_MOST_LISTED = 8
_LABELS_READ, _SAMPLES_READ, _BYTES_READ = 1 << 20, 1024, 64 << 20
_LEAST_PIXELS = 8  # on an edge of an image
_MOST_HALVINGS, _LEAST_CELLS = 4, 4  # of a field's grid, and cells along an edge that are left
_SMALL_IMAGE = 64  # pixels on an edge: for larger ones ResNet has another stem
_MOST_BATCH, _STEPS_AN_EPOCH = 256, 20
_LARGE = 20.0  # numbers from which on models train badly: see `train.data.normalize`


@dataclass(frozen=True)
class Proposal:
    """The data sets to learn from and to aim at, the task, and why: `said` is what the file is taken for."""

    path: Path
    inputs: DatasetInfo
    targets: DatasetInfo
    test: tuple[DatasetInfo, DatasetInfo] | None
    kind: str
    model: str
    options: str
    normalize: str
    drops_missing: bool
    said: tuple[str, ...]

    @property
    def batch(self) -> int:
        """A power of two, so that an epoch has some steps."""
        return int(min(_MOST_BATCH, 2 ** int(log2(max(1, self.inputs.num_rows / _STEPS_AN_EPOCH)))))

    @property
    def epochs(self) -> int:
        return 5 if self.model == "resnet" else 20

    def job(self, name: str, file: str) -> str:
        """The job file: TOML with comments."""
        steps = max(100, ceil(self.epochs * self.inputs.num_rows / self.batch))
        test = self.test or (None, None)
        names = {"inputs": self.inputs, "targets": self.targets, "test_inputs": test[0], "test_targets": test[1]}
        lines = [*(f"# {line}" for line in self.said), f"name = {_quoted(name)}", "seed = 0", "", "[data]"]
        lines.append(f"file = {_quoted(file)}")
        lines += [f"{key} = {_quoted(info.name)}" for key, info in names.items() if info]
        if self.normalize != "scale_factor":
            lines.append(f'normalize = "{self.normalize}"')
        if self.drops_missing:
            lines.append('missing = "drop"                 # or "mean": the mean of the others in their place')
        lines += ["", "[task]", f'kind = "{self.kind}"', f'model = "{self.model}"', f"options = {self.options}"]
        lines += ["", "[train]", f"steps = {steps:<24} # {plural(self.epochs, 'epoch')}, at least 100 steps"]
        lines += [f"global_batch = {self.batch:<17} # of all ranks together, so as many ranks at most"]
        lines += ['optimizer = "adamw"', "lr = 0.001", 'schedule = "cosine"', f"log_every = {max(1, steps // 20)}"]
        return "\n".join([*lines, "", "[run]", 'root = "runs"', ""])


def _quoted(text: str) -> str:
    """A string in TOML, which takes the escapes of JSON."""
    return json.dumps(text, ensure_ascii=False)


def propose(file: FileStructure) -> Proposal:
    """A job for the data sets of one file. Raises `UserError` if no two of them look like samples and targets."""
    inputs, targets = _pair(file)
    test = _test_pair(file, inputs, targets)
    with h5py.File(file.path, "r") as opened:
        kind, why = _kind(opened[targets.name], targets)
        rows = _first_rows(opened[inputs.name])
        are_alike = (inputs.shape, inputs.meaning) == (targets.shape, targets.meaning)
        is_near_inputs = are_alike and _are_near(rows, _first_rows(opened[targets.name]))
        lacking = [info.name for info in (inputs, targets) if _lacks_values(opened[info.name], info)]
    image_edge = _image_edge(inputs.shape[1:])
    num_halvings = _num_halvings(inputs.shape[1:], targets.shape[1:]) if kind == "regression" else 0
    predicts_change = bool(num_halvings) and is_near_inputs
    if num_halvings:
        residual = ", residual = true" if predicts_change else ""
        model, options = "unet", f"{{ levels = {num_halvings}, width = 16{residual} }}"
    elif image_edge:
        stem = "small" if image_edge <= _SMALL_IMAGE else "imagenet"
        model, options = "resnet", f'{{ depth = 18, width = 16, stem = "{stem}" }}'
    else:
        model, options = "mlp", "{ hidden = [256, 256] }"
    shape = " x ".join(f"{size:,}" for size in inputs.shape[1:])
    what = _named_numbers(len(inputs.shape), bool(image_edge), bool(num_halvings))
    said = [
        f"{inputs.name}: {plural(inputs.num_rows, 'sample')} of {shape} {what}, {inputs.dtype}",
        f"{targets.name}: {why}{' on the same grid' * bool(num_halvings)}",
        f"{test[0].name}: {plural(test[0].num_rows, 'sample')} to test on" if test else "no samples to test on",
        *(f"{name} lacks values: {_what_training_does(name == targets.name, kind, targets)}" for name in lacking),
        *(["targets are near their inputs: the model predicts the change (residual)"] if predicts_change else []),
    ]
    used = (inputs, targets, *(test or ()))
    others = [info.name for info in file.datasets if info not in used and not info.is_coordinate]
    if others:
        said.append(f"not used: {', '.join(others[:_MOST_LISTED])}{', ...' * (len(others) > _MOST_LISTED)}")
    known = rows[np.isfinite(rows)]
    is_large = inputs.meaning == (1.0, 0.0) and float(np.sqrt(np.mean(known**2) if len(known) else 0.0)) > _LARGE
    normalize = "standardize" if num_halvings or not image_edge or is_large else "scale_factor"
    return Proposal(file.path, inputs, targets, test, kind, model, options, normalize, bool(lacking), tuple(said))


# ------------------------------------------------------------------------------------------------ which data sets


def _pair(file: FileStructure) -> tuple[DatasetInfo, DatasetInfo]:
    """The likeliest inputs and targets: of as many rows, by their names, their group and their shapes."""
    usable = [info for info in file.datasets if info.num_rows > 1 and not info.is_coordinate]
    usable = [info for info in usable if not words(info.name) & _TEST_WORDS]
    pairs = [(x, y) for x, y in product(usable, usable) if x is not y and _can_be(x, y)]
    if not pairs:
        listed = ", ".join(f"{info.name} {info.dtype} {info.shape}" for info in file.datasets[:8]) or "nothing"
        raise UserError(
            f"{file.path} holds no samples with as many targets: {listed}",
            "Inputs are numbers (samples, ...), targets one row for each: hpc-train prepare --help makes such a file.",
        )
    return max(pairs, key=lambda pair: _likeliness(*pair))


def _can_be(inputs: DatasetInfo, targets: DatasetInfo) -> bool:
    are_targets = targets.is_numeric or (_holds_strings(targets) and len(targets.shape) == 1)
    return inputs.is_numeric and len(inputs.shape) > 1 and are_targets and inputs.num_rows == targets.num_rows


def _holds_strings(info: DatasetInfo) -> bool:
    return h5py.check_string_dtype(info.dtype) is not None


def _likeliness(inputs: DatasetInfo, targets: DatasetInfo) -> tuple[int, int]:
    """Names and groups count first; of equal ones the larger inputs with the smaller targets."""
    hints = 2 * bool(words(inputs.base_name) & INPUT_WORDS) + 2 * bool(words(targets.base_name) & TARGET_WORDS)
    hints += (inputs.group == targets.group) + (len(targets.shape) == 1)
    hints -= 2 * bool(words(inputs.base_name) & TARGET_WORDS) + 2 * bool(words(targets.base_name) & INPUT_WORDS)
    hints -= 3 * bool((words(inputs.base_name) | words(targets.base_name)) & _NUMBERING)
    return hints, inputs.row_bytes - targets.row_bytes


def _test_pair(
    file: FileStructure, inputs: DatasetInfo, targets: DatasetInfo
) -> tuple[DatasetInfo, DatasetInfo] | None:
    """The data sets called like those to train on, with "test" or the like for "train"."""

    def find(like: DatasetInfo) -> list[DatasetInfo]:
        rest = words(like.name) - _TRAIN_WORDS
        return [
            info
            for info in file.datasets
            if words(info.name) & _TEST_WORDS and words(info.name) - _TEST_WORDS == rest
            and info.shape[1:] == like.shape[1:] and info.dtype.kind == like.dtype.kind
        ]  # fmt: skip

    pairs = [(x, y) for x, y in product(find(inputs), find(targets)) if x.num_rows == y.num_rows]
    is_test = [pair for pair in pairs if words(pair[0].name) & {"test", "testing"}]
    return next(iter(is_test or pairs), None)


# ------------------------------------------------------------------------------------------------ what they hold


def _kind(targets: h5py.Dataset, info: DatasetInfo) -> tuple[str, str]:
    """(task.kind, why)."""
    if _holds_strings(info):
        names = targets.asstr(errors="replace")[:_LABELS_READ].astype(str)
        return _of_labels(names, np.arange(len(names)), info)
    values = targets[:_LABELS_READ]
    is_table = len(info.shape) == 2 and info.shape[1] > 1
    if is_table and is_label(values).all():
        return "classification", f"one-hot rows of {info.shape[1]:,} classes"
    if info.shape[1:] not in ((), (1,)):
        return "regression", f"{' x '.join(map(str, info.shape[1:]))} numbers a sample"
    values = values.reshape(-1)
    rows = np.flatnonzero(~_is_missing(values, targets))
    values = values[rows]
    if not is_label(values).all():
        return "regression", f"real numbers, {values.min():g} to {values.max():g}"
    return _of_labels(values.astype(np.int64), rows, info)


def _of_labels(values: np.ndarray, rows: np.ndarray, info: DatasetInfo) -> tuple[str, str]:
    """(task.kind, why) of the labels in these rows."""
    distinct = np.unique(values)
    try:
        classes = find_classes(distinct, None, info.num_rows)
    except NoClasses as error:
        if error.odd is None and distinct.dtype.kind == "i":
            return "regression", f"{len(distinct):,} different whole numbers, too many for classes"
        what = f"{info.path}: {info.name} has {len(distinct):,} different labels"
        if error.odd is not None:
            what += f", and {error.odd!r} in row {rows[np.argmax(values == error.odd)]:,} is unlike the others"
        raise UserError(
            what, "Correct it; or declare it as missing by the attribute _FillValue, and set data.missing."
        ) from None
    is_number = "" if classes.values is not None else '; for amounts, set task.kind to "regression"'
    return "classification", f"labels of {classes.num:,} {'class' if classes.num == 1 else 'classes'}{is_number}"


def _image_edge(shape: Sequence[int]) -> int | None:
    """The longer edge of an image stored as (h, w), (h, w, c) or (c, h, w), in pixels; None for another shape."""
    channels = [axis for axis in (0, 2) if len(shape) == 3 and shape[axis] in (1, 3)]
    if len(shape) != 2 and len(channels) != 1:
        return None
    edges = [size for axis, size in enumerate(shape) if axis not in channels]
    return max(edges) if min(edges) >= _LEAST_PIXELS else None


def _num_halvings(inputs: Sequence[int], targets: Sequence[int]) -> int:
    """How often a U-Net may halve the grid of fields with channels first, (c, h, w) or (c, d, h, w); 0 of others."""
    num_axes, grid = len(inputs), tuple(inputs if len(inputs) == 2 else inputs[1:])
    if num_axes not in (2, 3, 4) or tuple(targets) not in (grid, (*targets[:1], *grid)) or min(grid) < _LEAST_PIXELS:
        return 0
    return min(_MOST_HALVINGS, int(log2(min(grid) / _LEAST_CELLS)))


def _named_numbers(num_axes: int, are_images: bool, are_fields: bool) -> str:
    """What the numbers of samples are called."""
    if are_fields:
        return "fields"
    return "images" if are_images else "features" if num_axes == 2 else "numbers"


def _first_rows(inputs: h5py.Dataset) -> np.ndarray:
    row_bytes = max(1, inputs.dtype.itemsize * int(np.prod(inputs.shape[1:])))
    return np.asarray(inputs[: min(_SAMPLES_READ, max(1, _BYTES_READ // row_bytes))], np.float64)


def _are_near(inputs: np.ndarray, targets: np.ndarray) -> bool:
    """Whether targets (n, c, ...) taken for their inputs are less wrong than their means, in each channel."""
    axes = (0, *range(2, inputs.ndim))
    changes, deviations = np.nanmean((targets - inputs) ** 2, axes), np.nanvar(targets, axes)
    return bool(np.all(changes < deviations))


def _what_training_does(is_target: bool, kind: str, targets: DatasetInfo) -> str:
    """With samples that lack values: see `train.data.missing`."""
    if is_target and kind == "regression" and len(targets.shape) > 1:
        return "samples without any are left out; of the others the values that are there count"
    return "samples that lack one are left out"


def _lacks_values(dataset: h5py.Dataset, info: DatasetInfo) -> bool:
    """Whether one of the first rows lacks a value."""
    return info.is_numeric and bool(_is_missing(_first_rows(dataset).astype(dataset.dtype), dataset).any())


def _is_missing(values: np.ndarray, dataset: h5py.Dataset) -> np.ndarray:
    """Where values are missing, as training finds it."""
    declared = declared_missing(dataset.attrs, dataset.dtype, "_NCProperties" in dataset.file.attrs)
    return is_missing(values, tuple(declared))


# ------------------------------------------------------------------------------------------------ other files


def preparation(path: Path) -> str | None:
    """The command that makes an HDF5 file of a table, a folder of pictures, netCDF-3 or Zarr; None for what is HDF5."""
    suffix, file = path.suffix.lower(), shlex.quote(str(path))
    name = path.resolve().name.removesuffix(".zarr") if path.is_dir() else path.stem or path.name
    output = shlex.quote(f"data/{name}.h5")
    if kind := kind_of(path):
        inputs, targets = map(shlex.quote, _likely_names(open_arrays(kind, path)))
        return f"hpc-train prepare {kind} {output} --from {file} --array inputs={inputs} --array targets={targets}"
    if path.is_dir():
        return f"hpc-train prepare images {output} --from {file}"
    if suffix in (".csv", ".tsv"):
        columns = csv_form(path).names
        target = next((each for each in reversed(columns) if words(each) & TARGET_WORDS), columns[-1])
        return f"hpc-train prepare table {output} --from {file} --target {shlex.quote(target)}"
    if suffix in (".npz", ".npy", ".parquet"):
        target = {".npz": "", ".npy": " --target COLUMN_NUMBER", ".parquet": " --target COLUMN"}[suffix]
        return f"hpc-train prepare table {output} --from {file}{target}"
    return None


def _likely_names(arrays: dict[str, StoredArray]) -> tuple[str, str]:
    """(inputs, targets) by their names, else the largest and the smallest samples; NAME where there are none."""
    rows = {name: prod(each.shape[1:]) for name, each in arrays.items() if each.shape and not words(name) & _NUMBERING}
    inputs = max(rows, key=lambda name: (bool(words(name) & INPUT_WORDS), rows[name]), default="NAME")
    others = {
        name: size for name, size in rows.items() if name != inputs and arrays[name].shape[0] == arrays[inputs].shape[0]
    }
    return inputs, min(others, key=lambda name: (not words(name) & TARGET_WORDS, others[name]), default="NAME")


def lines_of(proposal: Proposal) -> Iterator[str]:
    """What the file is taken for, for the terminal."""
    yield f"{proposal.path}:"
    yield from (f"  {line}" for line in proposal.said)
    how = {"standardize": ", inputs standardised", "scale_factor": ""}[proposal.normalize]
    yield f"  {proposal.kind} with task.model = {proposal.model}{how}"
