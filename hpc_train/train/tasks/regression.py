"""Regression of arrays on arrays, from HDF5."""

from collections.abc import Callable, Iterator
from functools import partial
from math import prod

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hpc_train.core.errors import UserError
from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.train import models
from hpc_train.train.comm.context import Context
from hpc_train.train.data.dataset import Batch, Split, test_batches
from hpc_train.train.data.files import Files
from hpc_train.train.data.moments import Moments, moments
from hpc_train.train.data.normalize import pooled_axes
from hpc_train.train.data.samples import open_samples
from hpc_train.train.tasks.persistence import find_persistence

_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "mse": functional.mse_loss,
    "mae": functional.l1_loss,
    "huber": functional.huber_loss,
}


class Regression:
    """Trains with task.loss on targets of any shape, each brought to mean 0 and deviation 1 over the training samples.

    Measures are in the units of the targets. r2 is the coefficient of determination, by the variance of the test
    targets, averaged over outputs (as scikit-learn's r2_score); that of a constant output is 0.
    persistence_skill, where targets are as inputs are: 1 - MSE / MSE of the inputs taken for the prediction (Murphy,
    "Skill Scores Based on the Mean Square Error", 1988), both of targets of deviation 1.
    """

    def __init__(self, config: Config, context: Context) -> None:
        """Collective. Opens the data; each rank reads a part of the targets for their mean and deviation."""
        self.config, name = config, config.data.targets
        self._is_fields = config.task.model in models.FIELD_MODELS
        samples = open_samples(config, context, partial(self._checked, context), self._is_fields)
        self.train, self.validation, self.held_out = samples.train, samples.validation, samples.held_out
        self.order, self.in_step, self.num_samples = samples.order, samples.in_step, len(self.train)
        self._unit = abs(context.on_all(lambda: samples.files.scale(name))[0])
        found = self._moments(self.train, context)
        std = np.where(found.std > 0, found.std, 1.0)
        self._mean, self._std = _tensor(found.mean), _tensor(std)
        self.facts = samples.facts | {"targets_standardized": {"mean": found.mean.tolist(), "std": std.tolist()}}
        self.reading = "; ".join((*samples.reading, f"{name}: {prod(self._target_shape):,} a sample"))
        # By which r2 divides: of the samples that are measured, of standardised targets.
        self._variance = {
            id(split): torch.from_numpy(np.asarray((self._moments(split, context).std / std) ** 2))
            for split in (self.validation, self.held_out)
            if split
        }
        self._persistence: dict[int, float] = {}  # its mean square error, of standardised targets
        persistence = context.on_all(lambda: find_persistence(samples.files, config.data, self.train))
        if persistence is not None:
            self._persistence = {
                id(split): float(np.mean(persistence.mse(split, self._pooled, context) / std**2))
                for split in (self.validation, self.held_out)
                if split
            }
        self._measured: Split | None = None

    @property
    def _target_shape(self) -> tuple[int, ...]:
        return tuple(self.train.targets.shape[1:])

    @property
    def _pooled(self) -> tuple[int, ...]:
        """The axes of targets whose numbers count as one; a field without channels has no axis for them."""
        has_channels = len(self._target_shape) == len(self.train.input_shape)
        return pooled_axes(self._target_shape, self._is_fields and has_channels)

    def _moments(self, split: Split, context: Context) -> Moments:
        """Collective. Of the targets: for each of several, for each channel of a field, or of all its numbers."""
        return moments(split.targets, (), context, self._pooled)

    def _checked(
        self, context: Context, files: Files, train: Split, held_out: Split | None
    ) -> tuple[Split, Split | None]:
        """Collective. The splits. Raises `UserError` if their targets are no numbers, or of two shapes."""
        context.on_all(partial(self._check_targets, train, held_out))
        return train, held_out

    def _check_targets(self, train: Split, held_out: Split | None) -> None:
        data, path, shape = self.config.data, self.config.data.file, train.targets.shape[1:]
        for name, split in ((data.targets, train), (data.test_targets, held_out)):
            if split is None:
                continue
            if split.targets.dtype.kind not in "biuf":
                raise UserError(
                    f"{path}: {name} holds strings, and task.kind = 'regression' aims at numbers",
                    "Set task.kind to 'classification', or data.targets to another data set.",
                )
            if split.targets.shape[1:] != shape:
                raise UserError(
                    f"{path}: {name} has targets of {split.targets.shape[1:]}, not {shape}",
                    f"Targets of {data.test_targets} must have the same shape.",
                )

    def model(self) -> nn.Module:
        task = self.config.task
        return models.regressor(task.model, self.train.input_shape, self._target_shape, dict(task.options))

    def batch(self, rows: np.ndarray, step: int) -> Batch:
        return self.train.batch(rows, step)

    def prefetch(self, rows: np.ndarray) -> None:
        self.train.prefetch(rows)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        wanted = (batch.targets.float() - self._mean.to(batch.targets.device)) / self._std.to(batch.targets.device)
        return self._loss(model(batch.floats()).view(wanted.shape), wanted)

    def _loss(self, predicted: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The sum over samples of the mean over a sample's outputs."""
        return _LOSSES[self.config.task.loss](predicted, wanted, reduction="sum") / prod(self._target_shape)

    def test_batches(self, world: World) -> Iterator[Batch]:
        self._measured = self.held_out
        return test_batches(self.held_out, world, self.config.test.samples)

    def validation_batches(self, world: World) -> Iterator[Batch]:
        self._measured = self.validation
        return test_batches(self.validation, world)

    def test(self, model: nn.Module, batch: Batch) -> tuple[int, dict[str, float]]:
        device = batch.targets.device
        mean, std = self._mean.to(device), self._std.to(device)
        wanted = (batch.targets.float() - mean) / std
        predicted = model(batch.floats()).float().view(wanted.shape)
        # In 64 bits, and by the training samples' deviation: squares of small targets would be 0 in 32.
        errors = (predicted - wanted).double()
        variance = self._variance[id(self._measured)].to(device)
        stored = errors * std.double()
        unexplained = torch.where(variance > 0, errors.square() / variance.clamp_min(torch.finfo().tiny), 1.0)
        measures = {
            "loss": self._loss(predicted, wanted).item(),
            "mse": _sum_of_means(stored.square()) * self._unit**2,
            "mae": _sum_of_means(stored.abs()) * self._unit,
            "r2": len(batch) - _sum_of_means(unexplained),
        }
        if persistence := self._persistence.get(id(self._measured)):
            measures["persistence_skill"] = len(batch) - _sum_of_means(errors.square()) / persistence
        return len(batch), measures


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))


def _sum_of_means(values: torch.Tensor) -> float:
    """The sum over samples of the mean over each one's values."""
    return float(values.reshape(len(values), -1).mean(1).double().sum()) if len(values) else 0.0
