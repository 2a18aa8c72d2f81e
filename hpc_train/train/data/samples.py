"""The samples of a job, opened: what is missing, at what scale, how ranks read them and in which order."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import Order
from hpc_train.core.settings import Config, Data
from hpc_train.train.comm.context import Context, warn
from hpc_train.train.data.collective import choose_read_mode, with_shared_reader
from hpc_train.train.data.dataset import Part, Split, Use, open_column, open_order, open_split
from hpc_train.train.data.files import Files, describe, open_files
from hpc_train.train.data.hold_out import hold_out
from hpc_train.train.data.items import describe_items, open_items
from hpc_train.train.data.missing import handle_missing
from hpc_train.train.data.normalize import find_standard, unusual_scale
from hpc_train.train.data.other_samples import test_files, validation_files
from hpc_train.train.data.table import PREPARE_LIKE, read_table
from hpc_train.train.data.unwritten import leave_out_unwritten

ReadTargets = Callable[[list[Part]], list[Part]]


@dataclass(frozen=True)
class Samples:
    """The training samples, those to validate on, and those to test on if the files have them.

    in_step: whether all ranks read together, as only the training loop may. reading: what is read and how, for the log.
    facts: for meta.json.
    """

    files: Files
    train: Split
    validation: Split | None
    held_out: Split | None
    order: Order
    in_step: bool
    reading: list[str]
    facts: dict[str, Any]


def open_samples(config: Config, context: Context, read_targets: ReadTargets, channels_first: bool = False) -> Samples:
    """Collective. Opens data.inputs with data.targets, and those to validate and to test on. Raises `UserError`.

    read_targets: collective; the samples, those to train on first, with targets as the task takes them.
    channels_first: of inputs with more than two axes a sample; otherwise their shape tells.
    """
    data = config.data
    name = str(data.inputs) if data.dataset is None else "inputs"
    missing_values: tuple[float, ...] = ()
    unwritten = missing = ""
    if data.dataset is None:
        parts = context.on_all(lambda: _open(config, context))
        parts, unwritten = leave_out_unwritten(parts, data, context)
        parts, missing_values, missing = handle_missing(parts, data, context, config.task.kind == "regression")
    else:
        parts = open_items(config, context)
        context.on_all(lambda: [_alike(part, parts[0]) for part in parts])
    files = parts[0].files
    parts = read_targets(parts)
    splits = {part.use: part.split for part in parts}
    train, validation, held_out = splits["train"], splits.get("validation"), splits.get("test")
    if data.hold_out:
        train, validation = hold_out(train, data, config.seed, context)
    facts: dict[str, Any] = {"samples": context.on_all(lambda: _facts(parts[0].having(train)))}
    if data.normalize == "standardize":
        standard = find_standard(train, missing_values, context, channels_first)
        train = replace(train, standard=standard)
        validation = None if validation is None else replace(validation, standard=standard)
        held_out = None if held_out is None else replace(held_out, standard=standard)
        facts["standardized"] = {"mean": standard.mean.tolist(), "std": standard.std.tolist()}
    elif why := unusual_scale(train, name, context):
        warn(context, why)
    mode, why = ("auto", "") if data.dataset else choose_read_mode(train.inputs[0], files, config, context)
    in_step = mode != "auto"  # all ranks read together, and only the loop may call MPI
    if in_step:
        train = with_shared_reader(train, mode, files, config, context)
    read = describe_items(config, train.inputs[0]) if data.dataset else describe(files, name, train.inputs[0])
    reading = [read + f", {why}" * bool(why), *filter(None, [unwritten, missing])]
    if held_out is None:
        reading.append(
            f"no samples to test on, as there is no {'data.test_options' if data.dataset else data.test_inputs}"
        )
    if validation is not None:
        reading.append(f"{len(validation):,} samples {'are held out ' * bool(data.hold_out)}to validate on")
    if data.normalize == "standardize":
        reading.append(f"{name} standardised")
    order = open_order(train.inputs, len(train), config)
    return Samples(files, train, validation, held_out, order, in_step, reading, facts)


def held_out_rows(config: Config, context: Context) -> np.ndarray:
    """Collective. The rows of data.inputs that data.hold_out keeps to validate on. Raises `UserError`."""
    data = config.data
    parts, _ = leave_out_unwritten(context.on_all(lambda: _open(config, context)), data, context)
    parts, _, _ = handle_missing(parts, data, context, config.task.kind == "regression")
    _, held_out = hold_out(parts[0].split, data, config.seed, context)
    return np.asarray(held_out.inputs[0].stored_rows(np.arange(len(held_out))))


def _facts(train: Part) -> dict[str, Any]:
    """What a trained model needs to know of its inputs when it meets other data: see `inference/learned.py`."""
    filling, table = train.split.filling, read_table(train.files, train.inputs)
    return {
        "shape": list(train.split.input_shape),
        "dtype": train.split.inputs[0].dtype.str,
        "scale": list(train.files.scale(train.inputs)),
        "mean_for_missing": None if filling is None else filling.mean.tolist(),
        "table": None if table is None else asdict(table),
    }


def _open(config: Config, context: Context) -> list[Part]:
    """The samples to train on, then those to validate and to test on if there are some. Raises `UserError`."""
    data = config.data
    if any(isinstance(names, list) for names in (data.inputs, data.validation_inputs, data.test_inputs)):
        raise UserError(
            f"data.inputs = {data.inputs}: the models of task.kind = '{config.task.kind}' take one data set",
            "Name one, or write a task of your own: it gets all of them.",
        )
    files = open_files(config, context)
    train = _open_part("train", files, str(data.inputs), data.targets, data)
    if data.hold_out_by is not None:
        groups = open_column(files, data.hold_out_by, "data.hold_out_by", files.memory_bytes // 8)
        if groups.shape != train.split.targets.shape[:1]:
            raise UserError(
                f"data.hold_out_by = '{data.hold_out_by}' is {groups.shape} in {files.paths[0]}",
                f"Name a data set with one value for each of the {len(train.split):,} samples.",
            )
        train = train.having(replace(train.split, groups=groups))
    parts = [train]
    if (found := validation_files(config, files, context)) is not None:
        names = str(data.validation_inputs), data.validation_targets
        parts.append(_alike(_open_part("validation", found, *names, data), train))
    if (found := test_files(config, files, context)) is not None:
        parts.append(_alike(_open_part("test", found, str(data.test_inputs), data.test_targets, data), train))
    return parts


def _open_part(use: Use, files: Files, inputs: str, targets: str, data: Data) -> Part:
    prefix = "data." if use == "train" else f"data.{use}_"
    split = open_split(files, inputs, targets, (f"{prefix}inputs", f"{prefix}targets"))
    if data.normalize == "none":
        split = replace(split, scale=(1.0,), offset=(0.0,))
    return Part(use, files, inputs, targets, split)


def _alike(part: Part, train: Part) -> Part:
    """`part`. Raises `UserError` if its samples are of another shape or scale than those to train on."""
    if part.split.input_shape != train.split.input_shape:
        raise UserError(
            f"{part.files.paths[0]}: {part.inputs} has samples of {part.split.input_shape}, and {train.inputs} of "
            f"{train.split.input_shape}",
            f"Both need the same shape: correct data.{part.use}_inputs, or the file.",
        )
    train.files.require_same_scale(train.inputs, part.files, part.inputs)
    table, other = read_table(train.files, train.inputs), read_table(part.files, part.inputs)
    if table and other and (why := table.differs(other) or table.classes_differ(other)):
        raise UserError(f"{part.files.paths[0]}: {why}", PREPARE_LIKE.format(train.files.paths[0]))
    return part
