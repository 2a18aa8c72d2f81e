"""Regression of arrays on arrays, from HDF5."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hpc_train.core.errors import UserError
from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.train import metrics, models
from hpc_train.train.comm.context import Context
from hpc_train.train.data.dataset import Batch, Part, Split, test_batches
from hpc_train.train.data.moments import moments
from hpc_train.train.data.normalize import pooled_axes
from hpc_train.train.data.samples import open_samples
from hpc_train.train.metrics import Metric, Sums
from hpc_train.train.tasks.persistence import Persistence, find_persistence

_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "mse": functional.mse_loss,
    "mae": functional.l1_loss,
    "huber": functional.huber_loss,
}


class Regression:
    """Trains with task.loss on targets of any shape, each brought to mean 0 and deviation 1 over the training samples.

    Measures are in the units of the targets. r2 is the coefficient of determination, by the variance of the test
    targets, averaged over outputs (as scikit-learn's r2_score); that of a constant output is 0.
    persistence_skill, where targets may be later states of the inputs: 1 - MSE / MSE of the inputs taken for the
    prediction (Murphy, "Skill Scores Based on the Mean Square Error", 1988), both of standardised targets.
    """

    def __init__(self, config: Config, context: Context) -> None:
        """Collective. Opens the data; each rank reads a part of the targets for their mean and deviation."""
        self.config, name = config, config.data.targets
        is_field = config.task.model in models.FIELD_MODELS
        samples = open_samples(config, context, partial(self._checked, context), is_field)
        self.train, self.validation, self.held_out = samples.train, samples.validation, samples.held_out
        self.order, self.in_step, self.num_samples = samples.order, samples.in_step, len(self.train)
        scale = context.on_all(lambda: samples.files.scale(name))
        has_channels = is_field and len(self._target_shape) == len(self.train.input_shape)
        found = moments(self.train.targets, (), context, pooled_axes(self._target_shape, has_channels))
        std = np.where(found.std > 0, found.std, 1.0)
        self._scale = TargetScale(_tensor(found.mean), _tensor(std), *scale)
        self._metrics = context.on_all(lambda: open_metrics(config.task.metrics, self._scale, self._target_shape))
        self.facts = samples.facts | {
            "targets_standardized": {"mean": found.mean.tolist(), "std": std.tolist()},
            "target_shape": list(self._target_shape),
            "target_scale": list(scale),
        }
        self.reading = "; ".join((*samples.reading, f"{name}: {prod(self._target_shape):,} a sample"))
        splits = [split for split in (self.validation, self.held_out) if split]
        names = str(config.data.inputs), name
        persistence = context.on_all(lambda: find_persistence(samples.files, *names, self.train))
        self._references = {id(split): find_references(split, self._scale, persistence, context) for split in splits}
        self._measured: Split | None = None

    @property
    def _target_shape(self) -> tuple[int, ...]:
        return tuple(self.train.targets.shape[1:])

    def _checked(self, context: Context, parts: list[Part]) -> list[Part]:
        """Collective. The parts. Raises `UserError` if their targets are no numbers, or of two shapes."""
        context.on_all(partial(_check_targets, parts))
        return parts

    def model(self) -> nn.Module:
        task = self.config.task
        return models.regressor(task.model, self.train.input_shape, self._target_shape, dict(task.options))

    def batch(self, rows: np.ndarray, step: int) -> Batch:
        return self.train.batch(rows, step)

    def prefetch(self, rows: np.ndarray) -> None:
        self.train.prefetch(rows)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        wanted = self._scale.standardized(batch.targets)
        return _loss(self.config.task.loss, model(batch.floats()).view(wanted.shape), wanted)

    def test_batches(self, world: World) -> Iterator[Batch]:
        self._measured = self.held_out
        return test_batches(self.held_out, world, self.config.test.samples)

    def validation_batches(self, world: World) -> Iterator[Batch]:
        self._measured = self.validation
        return test_batches(self.validation, world)

    def test(self, model: nn.Module, batch: Batch) -> tuple[int, Sums]:
        outputs = model(batch.floats())
        references, loss = self._references[id(self._measured)], self.config.task.loss
        return len(batch), measures(self._metrics, outputs, batch.targets, self._scale, references, loss)


def _check_targets(parts: list[Part]) -> None:
    shape = parts[0].split.targets.shape[1:]
    for part in parts:
        path, targets = part.files.paths[0], part.split.targets
        if targets.dtype.kind not in "biuf":
            raise UserError(
                f"{path}: {part.targets} holds strings, and task.kind = 'regression' aims at numbers",
                "Set task.kind to 'classification', or data.targets to another data set.",
            )
        if targets.shape[1:] != shape:
            raise UserError(
                f"{path}: {part.targets} has targets of {targets.shape[1:]}, not {shape}",
                f"Targets of {part.targets} must have the same shape.",
            )


# ------------------------------------------------------------------------------------------------ targets and measures


@dataclass(frozen=True)
class TargetScale:
    """How targets as stored go with what a model learns, of mean 0 and deviation 1 over the training samples.

    mean, std: of stored targets, float32, of a shape that goes with a sample's. scale, offset: a stored target s means
    s * scale + offset.
    """

    mean: torch.Tensor
    std: torch.Tensor
    scale: float
    offset: float

    @property
    def pooled(self) -> tuple[int, ...]:
        """The axes of a target whose numbers have one mean and deviation."""
        return tuple(axis for axis, size in enumerate(self.std.shape) if size == 1)

    def standardized(self, targets: torch.Tensor) -> torch.Tensor:
        return (targets.float() - self.mean.to(targets.device)) / self.std.to(targets.device)

    def meant(self, targets: torch.Tensor) -> torch.Tensor:
        """Stored targets in their units, float32."""
        return (targets.double() * self.scale + self.offset).float()

    def predicted(self, outputs: torch.Tensor) -> torch.Tensor:
        """What a model's outputs mean, in the units of the targets, float32."""
        stored = outputs.double() * self.std.to(outputs.device).double() + self.mean.to(outputs.device).double()
        return (stored * self.scale + self.offset).float()


@dataclass(frozen=True)
class References:
    """What measures of samples compare with, over all of them.

    variance: of standardised targets, by which r2 divides. persistence_mse: of inputs taken for predictions, of
    standardised targets; None if they cannot be taken so.
    """

    variance: torch.Tensor
    persistence_mse: float | None


def find_references(
    split: Split, scale: TargetScale, persistence: Persistence | None, context: Context, missing: tuple[float, ...] = ()
) -> References:
    """Collective. missing: numbers that stand for no target."""
    std = scale.std.double().numpy()
    found = moments(split.targets, missing, context, scale.pooled)
    squares = None if persistence is None else persistence.mse(split, scale.pooled, context, missing)
    return References(
        variance=torch.from_numpy(np.asarray((found.std / std) ** 2)),
        persistence_mse=None if squares is None else float(np.mean(squares / std**2)),
    )


def measures(
    more: dict[str, Metric],
    outputs: torch.Tensor,
    targets: torch.Tensor,
    scale: TargetScale,
    references: References,
    loss: str,
) -> Sums:
    """The sums over samples of each measure. targets: (n, ...) as stored. more: of task.metrics."""
    wanted = scale.standardized(targets)
    predicted = outputs.float().view(wanted.shape)
    # In 64 bits, and by the training samples' deviation: squares of small targets would be 0 in 32.
    errors = (predicted - wanted).double()
    variance = references.variance.to(errors.device)
    stored = errors * scale.std.to(errors.device).double()
    unexplained = torch.where(variance > 0, errors.square() / variance.clamp_min(torch.finfo().tiny), 1.0)
    found: Sums = {
        "loss": _loss(loss, predicted, wanted).item(),
        "mse": _sum_of_means(stored.square()) * scale.scale**2,
        "mae": _sum_of_means(stored.abs()) * abs(scale.scale),
        "r2": len(targets) - _sum_of_means(unexplained),
    }
    if references.persistence_mse:
        found["persistence_skill"] = len(targets) - _sum_of_means(errors.square()) / references.persistence_mse
    return found | (metrics.sums_of(more, scale.predicted(predicted), scale.meant(targets)) if more else {})


def open_metrics(names: list[str], scale: TargetScale, target_shape: tuple[int, ...]) -> dict[str, Metric]:
    """Those that task.metrics names. Raises UserError."""
    mean, std = scale.mean.double() * scale.scale + scale.offset, scale.std.double() * abs(scale.scale)
    return metrics.of_numbers(names, prod(target_shape), mean, std)


def _loss(name: str, predicted: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The sum over samples of the mean over a sample's outputs."""
    return _LOSSES[name](predicted, wanted, reduction="sum") / prod(wanted.shape[1:])


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))


def _sum_of_means(values: torch.Tensor) -> float:
    """The sum over samples of the mean over each one's values."""
    return float(values.reshape(len(values), -1).mean(1).double().sum()) if len(values) else 0.0
