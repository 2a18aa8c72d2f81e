"""Classification of arrays, from HDF5."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hpc_train.core.sampling import rank_span
from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.train import models
from hpc_train.train.comm.context import Context
from hpc_train.train.data.dataset import Batch
from hpc_train.train.data.labels import open_classes
from hpc_train.train.data.mixing import poor_mixing
from hpc_train.train.data.samples import open_samples, warn

_TEST_BATCH = 1024


class Classification:
    """Trains with cross-entropy on inputs and labels."""

    def __init__(self, config: Config, context: Context) -> None:
        """Collective. Opens the data and checks all labels, each rank a part of them."""
        self.config, data = config, config.data
        samples = open_samples(config, context)
        self.order, self.in_step = samples.order, samples.in_step
        names = (data.targets, data.test_targets)
        self.train, self.held_out, classes = open_classes(
            samples.train, samples.held_out, names, samples.files.paths[0], config.task.num_classes, context
        )
        self.num_samples, self.num_classes = len(self.train), classes.num
        self.reading = "; ".join(filter(None, (*samples.reading, classes.describe(data.targets))))
        self.facts = samples.facts | {"classes": classes.listed()}
        if why := poor_mixing(self.train.targets, data.targets, self.order, self.num_classes, context):
            is_collective = data.read == "collective"
            remedy = "leave data.read out" if is_collective else "data.shuffle_chunks and data.memory_mb mix more"
            warn(context, f"{why}: {remedy}, or store the samples in random order.")

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
