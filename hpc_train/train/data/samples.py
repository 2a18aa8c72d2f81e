"""The samples of a job, opened: what is missing, at what scale, how ranks read them and in which order."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import HOLD_OUT, Order, row_noise
from hpc_train.core.settings import Config, Data
from hpc_train.train.comm.context import Context, warn
from hpc_train.train.data.collective import choose_read_mode, with_shared_reader
from hpc_train.train.data.dataset import Split, open_order, open_split
from hpc_train.train.data.files import Files, describe, open_files
from hpc_train.train.data.missing import handle_missing
from hpc_train.train.data.normalize import find_standard, unusual_scale
from hpc_train.train.data.unwritten import leave_out_unwritten

ReadTargets = Callable[[Files, Split, Split | None], tuple[Split, Split | None]]


@dataclass(frozen=True)
class Samples:
    """The training samples, those of them held out to validate on, and those to test on if the files have them.

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
    """Collective. Opens data.inputs with data.targets, and those to test on. Raises `UserError`.

    read_targets: collective; the training and the test samples with targets as the task takes them. channels_first: of
    inputs with more than two axes a sample; otherwise their shape tells.
    """
    data, name = config.data, str(config.data.inputs)
    files, train, held_out = context.on_all(lambda: _open(config, context))
    train, held_out, unwritten = leave_out_unwritten(train, held_out, files, data, context)
    train, held_out, missing_values, missing = handle_missing(train, held_out, files, data, context)
    train, held_out = read_targets(files, train, held_out)
    train, validation = _hold_out(train, data.hold_out, config.seed)
    facts: dict[str, Any] = {}
    if data.normalize == "standardize":
        standard = find_standard(train, missing_values, context, channels_first)
        train = replace(train, standard=standard)
        validation = None if validation is None else replace(validation, standard=standard)
        held_out = None if held_out is None else replace(held_out, standard=standard)
        facts["standardized"] = {"mean": standard.mean.tolist(), "std": standard.std.tolist()}
    elif why := unusual_scale(train, name, context):
        warn(context, why)
    mode, why = choose_read_mode(train.inputs[0], files, config, context)
    in_step = mode != "auto"  # all ranks read together, and only the loop may call MPI
    if in_step:
        train = with_shared_reader(train, mode, files, config, context)
    reading = [describe(files, name, train.inputs[0]) + f", {why}" * bool(why), *filter(None, [unwritten, missing])]
    if held_out is None:
        reading.append(f"no samples to test on, as there is no {data.test_inputs}")
    if validation is not None:
        reading.append(f"{len(validation):,} samples are held out to validate on")
    if data.normalize == "standardize":
        reading.append(f"{name} standardised")
    order = open_order(train.inputs, len(train), config)
    return Samples(files, train, validation, held_out, order, in_step, reading, facts)


def _hold_out(train: Split, share: float, seed: int) -> tuple[Split, Split | None]:
    """(the samples to train on, those to validate on): which row is which depends on (seed, row) alone."""
    if not share:
        return train, None
    numbers = row_noise(seed, HOLD_OUT, np.arange(len(train)), 1)[:, 0]
    is_held_out = numbers < np.uint64(share * 2.0**64)
    if is_held_out.all() or not is_held_out.any():
        raise UserError(
            f"data.hold_out = {share:g} of {len(train):,} samples leaves {np.count_nonzero(is_held_out):,} to validate "
            "on",
            "Set it so that samples remain on both sides.",
        )
    return train.select(np.flatnonzero(~is_held_out)), train.select(np.flatnonzero(is_held_out))


def _open(config: Config, context: Context) -> tuple[Files, Split, Split | None]:
    """(the files, the training samples, the test samples if the files have them). Raises `UserError`."""
    data = config.data
    if isinstance(data.inputs, list) or isinstance(data.test_inputs, list):
        raise UserError(
            f"data.inputs = {data.inputs}: the models of task.kind = '{config.task.kind}' take one data set",
            "Name one, or write a task of your own: it gets all of them.",
        )
    files = open_files(config, context)
    train = open_split(files, data.inputs, data.targets, ("data.inputs", "data.targets"))
    if not files.has_tests(data.test_inputs, data.test_targets):
        return files, _unscaled(train, data), None
    test = open_split(files, data.test_inputs, data.test_targets, ("data.test_inputs", "data.test_targets"))
    if test.input_shape != train.input_shape:
        raise UserError(
            f"{files.paths[0]}: {data.test_inputs} has samples of {test.input_shape}, and {data.inputs} of "
            f"{train.input_shape}",
            "Both need the same shape: correct data.test_inputs, or the file.",
        )
    files.require_same_scale(data.inputs, data.test_inputs)
    return files, _unscaled(train, data), _unscaled(test, data)


def _unscaled(split: Split, data: Data) -> Split:
    """The split without its attributes' scale, if data.normalize says so."""
    return replace(split, scale=(1.0,), offset=(0.0,)) if data.normalize == "none" else split
