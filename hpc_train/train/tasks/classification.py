"""Classification of arrays into classes, from HDF5."""

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
from hpc_train.train.data.dataset import MAX_CLASSES, Batch, Split, first_outside, open_order, open_split, value_range
from hpc_train.train.data.files import Files, describe, open_files
from hpc_train.train.data.readers import Reader

_TEST_BATCH = 1024


class Classification:
    """Collective. Opens the data, checks it on every rank and trains with cross-entropy."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config = config
        data = config.data

        def open_both() -> tuple[Files, Split, Split | None]:
            assert isinstance(data.inputs, str) and isinstance(data.test_inputs, str)  # see core/key_rules.py
            files = open_files(config, context)
            train = open_split(files, data.inputs, data.targets, ("data.inputs", "data.targets"))
            test_keys = ("data.test_inputs", "data.test_targets")
            test = open_split(files, data.test_inputs, data.test_targets, test_keys, optional=True)
            assert train is not None
            if test is not None and test.input_shape != train.input_shape:
                raise UserError(
                    f"{files.paths[0]}: {data.inputs} has samples of {train.input_shape}, not {test.input_shape}",
                    f"Samples of {data.test_inputs} must have the same shape.",
                )
            if test is not None:
                files.require_same_scale(data.inputs, data.test_inputs)
            return files, train, test

        files, self.train, self.held_out = context.on_all(open_both)
        self.num_samples = len(self.train)
        way, why = choose_read_mode(self.train.inputs[0], files, config, context)
        self.in_step = way != "auto"
        if self.in_step:
            self.train = with_shared_reader(self.train, way, files, str(data.inputs), config, context)
        self.reading = describe(files, str(data.inputs), self.train.inputs[0]) + f", {why}" * bool(why)
        self.order = open_order(self.train.inputs, self.num_samples, config)
        parts = {data.targets: self.train.targets}
        if self.held_out is not None:
            parts[data.test_targets] = self.held_out.targets
        ranges = {name: value_range(labels, context) for name, labels in parts.items()}
        most = config.task.num_classes or max(self.num_samples, MAX_CLASSES)
        self.num_classes = int(config.task.num_classes or min(ranges[data.targets][1] + 1, most))
        context.on_all(lambda: self._check_labels(parts, ranges))

    def _check_labels(self, parts: dict[str, Reader], ranges: dict[str, tuple[int, int]]) -> None:
        for name, (low, high) in ranges.items():
            if low < 0 or high >= self.num_classes:
                row, wrong = first_outside(parts[name], 0, self.num_classes) or (0, high)
                raise UserError(
                    f"{self.config.data.file}: label {wrong} in {name}, row {row:,}, is out of range for "
                    f"{self.num_classes:,} classes",
                    "Labels are 0 to num_classes - 1: mend the data or set task.num_classes.",
                )

    def model(self) -> nn.Module:
        task = self.config.task
        return models.classifier(task.model, self.train.input_shape, self.num_classes, dict(task.options))

    def batch(self, rows: np.ndarray, step: int) -> Batch:
        return self.train.batch(rows, step)

    def prefetch(self, rows: np.ndarray) -> None:
        self.train.prefetch(rows)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return functional.cross_entropy(self._logits(model, batch), batch.targets, reduction="sum")

    def test_batches(self, world: World) -> Iterator[Batch]:
        if self.held_out is None:
            return
        start, stop = rank_span(len(self.held_out), world.rank, world.size)
        for begin in range(start, stop, _TEST_BATCH):
            yield self.held_out.batch(np.arange(begin, min(begin + _TEST_BATCH, stop)))

    def test(self, model: nn.Module, batch: Batch) -> tuple[int, dict[str, float]]:
        logits = self._logits(model, batch)
        loss = functional.cross_entropy(logits, batch.targets, reduction="sum")
        return len(batch), {"loss": loss.item(), "accuracy": (logits.argmax(1) == batch.targets).sum().item()}

    def _logits(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(batch.floats())
