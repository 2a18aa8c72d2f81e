"""Classification of arrays, from HDF5."""

import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import rank_span
from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.train import models
from hpc_train.train.comm.context import Context
from hpc_train.train.data.collective import choose_read_mode, with_shared_reader
from hpc_train.train.data.dataset import Batch, Split, open_order, open_split
from hpc_train.train.data.files import Files, describe, open_files
from hpc_train.train.data.labels import open_classes
from hpc_train.train.data.missing import handle_missing
from hpc_train.train.data.mixing import poor_mixing

_TEST_BATCH = 1024


class Classification:
    """Trains with cross-entropy on inputs and labels.

    classes: the stored label of each class; None if labels are class numbers.
    """

    def __init__(self, config: Config, context: Context) -> None:
        """Collective. Opens the data and checks all labels, each rank a part of them."""
        self.config = config
        files, self.train, self.held_out = context.on_all(lambda: _open(config, context))
        self.train, self.held_out, missing = handle_missing(self.train, self.held_out, files, config.data, context)
        self.num_samples = len(self.train)
        mode, why = choose_read_mode(self.train.inputs[0], files, config, context)
        self.in_step = mode != "auto"  # all ranks read together, and only the loop may call MPI
        if self.in_step:
            self.train = with_shared_reader(self.train, mode, files, config, context)
        reading = describe(files, str(config.data.inputs), self.train.inputs[0]) + f", {why}" * bool(why)
        self.order = open_order(self.train.inputs, self.num_samples, config)
        names = (config.data.targets, config.data.test_targets)
        self.train, self.held_out, classes = open_classes(
            self.train, self.held_out, names, files.paths[0], config.task.num_classes, context
        )
        self.num_classes, self.classes = classes.num, classes.listed()
        if why := poor_mixing(self.train.targets, config.data.targets, self.order, self.num_classes, context):
            _warn_of_order(why, config, context)
        self.reading = "; ".join(filter(None, (reading, missing, classes.describe(config.data.targets))))

    def model(self) -> nn.Module:
        task = self.config.task
        return models.classifier(task.model, self.train.input_shape, self.num_classes, dict(task.options))

    def batch(self, rows: np.ndarray, step: int) -> Batch:
        return self.train.batch(rows, step)

    def prefetch(self, rows: np.ndarray) -> None:
        self.train.prefetch(rows)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return functional.cross_entropy(model(batch.floats()), batch.targets, reduction="sum")

    def test_batches(self, world: World) -> Iterator[Batch]:
        if self.held_out is None:
            return
        start, stop = rank_span(len(self.held_out), world.rank, world.size)
        for begin in range(start, stop, _TEST_BATCH):
            yield self.held_out.batch(np.arange(begin, min(begin + _TEST_BATCH, stop)))

    def test(self, model: nn.Module, batch: Batch) -> tuple[int, dict[str, float]]:
        logits = model(batch.floats())
        loss = functional.cross_entropy(logits, batch.targets, reduction="sum")
        return len(batch), {"loss": loss.item(), "accuracy": (logits.argmax(1) == batch.targets).sum().item()}


def _warn_of_order(why: str, config: Config, context: Context) -> None:
    remedy = "data.shuffle_chunks and data.memory_mb mix more"
    if config.data.read == "collective":
        remedy = "without data.read = 'collective' all samples are mixed"
    if context.world.is_root:
        print(f"warning: {why}: {remedy}, or store the samples in random order.", file=sys.stderr, flush=True)


def _open(config: Config, context: Context) -> tuple[Files, Split, Split | None]:
    """(the files, the training samples, the test samples if the files have them). Raises `UserError`."""
    data = config.data
    if isinstance(data.inputs, list) or isinstance(data.test_inputs, list):
        raise UserError(
            f"data.inputs = {data.inputs}: the models of task.kind = 'classification' take one data set",
            "Name one, or write a task of your own: it gets all of them.",
        )
    files = open_files(config, context)
    train = open_split(files, data.inputs, data.targets, ("data.inputs", "data.targets"))
    if not files.has(data.test_inputs) and not files.has(data.test_targets):
        return files, train, None
    test = open_split(files, data.test_inputs, data.test_targets, ("data.test_inputs", "data.test_targets"))
    if test.input_shape != train.input_shape:
        raise UserError(
            f"{files.paths[0]}: {data.inputs} has samples of {train.input_shape}, not {test.input_shape}",
            f"Samples of {data.test_inputs} must have the same shape.",
        )
    files.require_same_scale(data.inputs, data.test_inputs)
    return files, train, test
