"""Classification of arrays, from HDF5."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.train import metrics, models
from hpc_train.train.comm.context import Context, warn
from hpc_train.train.data.dataset import Batch, Part, test_batches
from hpc_train.train.data.labels import have_class_numbers, open_classes, stated_classes
from hpc_train.train.data.mixing import poor_mixing
from hpc_train.train.data.samples import open_samples
from hpc_train.train.metrics import Metric, Sums


class Classification:
    """Trains with cross-entropy on inputs and labels."""

    def __init__(self, config: Config, context: Context) -> None:
        """Collective. Opens the data and checks all labels, each rank a part of them."""
        self.config, data = config, config.data
        samples = open_samples(config, context, partial(self._read_labels, context))
        self.train, self.validation, self.held_out = samples.train, samples.validation, samples.held_out
        self.order, self.in_step, self.num_samples = samples.order, samples.in_step, len(self.train)
        self.reading = "; ".join(filter(None, (*samples.reading, self._classes.describe(data.targets))))
        self.facts = samples.facts | {"classes": self._classes.listed(), "num_classes": self.num_classes}
        self._metrics = context.on_all(lambda: metrics.of_classes(config.task.metrics, self.num_classes))
        if why := poor_mixing(self.train.targets, data.targets, self.order, self.num_classes, context):
            remedy = "data.shuffle_chunks and data.memory_mb mix more, or store the samples in random order"
            warn(context, f"{why}: {remedy}.")

    def _read_labels(self, context: Context, parts: list[Part]) -> list[Part]:
        num_classes = self.config.task.num_classes
        if self.config.data.dataset is not None and num_classes is not None and all(map(have_class_numbers, parts)):
            parts, self._classes = stated_classes(parts, num_classes)
        else:
            parts, self._classes = open_classes(parts, num_classes, context)
        self.num_classes = self._classes.num
        return parts

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
        return test_batches(self.held_out, world, self.config.test.samples)

    def validation_batches(self, world: World) -> Iterator[Batch]:
        return test_batches(self.validation, world)

    def test(self, model: nn.Module, batch: Batch) -> tuple[int, Sums]:
        return len(batch), measures(self._metrics, model(batch.floats()), batch.targets)


def measures(more: dict[str, Metric], logits: torch.Tensor, classes: torch.Tensor) -> Sums:
    """The sums over samples of each measure. logits: (n, classes), classes: (n,) those of the samples."""
    loss = functional.cross_entropy(logits, classes, reduction="sum")
    always = {"loss": loss.item(), "accuracy": (logits.argmax(1) == classes).sum().item()}
    return always | metrics.sums_of(more, logits.float().softmax(1), classes) if more else always
