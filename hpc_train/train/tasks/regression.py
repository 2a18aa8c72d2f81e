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
from hpc_train.train.comm.context import Context, joint, warn
from hpc_train.train.data.dataset import Batch, Part, Split, test_batches
from hpc_train.train.data.files import Files
from hpc_train.train.data.hdf5_faults import damage_as_user_error
from hpc_train.train.data.missing import declared_values
from hpc_train.train.data.moments import Moments, moments
from hpc_train.train.data.normalize import pooled_axes
from hpc_train.train.data.samples import open_samples
from hpc_train.train.metrics import Metric, Sums
from hpc_train.train.tasks.persistence import Persistence, find_persistence

_MOST_NAMED = 16
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
        missing = context.on_all(lambda: declared_values(samples.files, name))
        found = moments(self.train.targets, missing, context, pooled_axes(self._target_shape, has_channels))
        self._require_known(found)
        std = np.where(found.std > 0, found.std, 1.0)
        names = context.on_root(lambda: target_names(samples.files, name, found.mean.size))
        known = float(found.known.mean())
        self._scale = TargetScale(_tensor(found.mean), _tensor(std), *scale, missing, known, tuple(names))
        self._metrics = context.on_all(lambda: open_metrics(config.task.metrics, self._scale, self._target_shape))
        self.facts = samples.facts | {
            "targets_standardized": {"mean": found.mean.tolist(), "std": std.tolist()},
            "target_shape": list(self._target_shape),
            "target_scale": list(scale),
            "target_names": names,
            "target_missing": list(missing),
            "target_known": known,
        }
        self._warn_of_two_scales(context)
        self.reading = "; ".join((*samples.reading, f"{name}: {prod(self._target_shape):,} a sample"))
        splits = [split for split in (self.validation, self.held_out) if split]
        inputs = str(config.data.inputs)
        persistence = context.on_all(lambda: find_persistence(samples.files, inputs, name, self.train))
        self._references = {id(split): find_references(split, self._scale, persistence, context) for split in splits}
        self._measured: Split | None = None

    def _warn_of_two_scales(self, context: Context) -> None:
        """A U-Net that predicts a change adds it to its inputs, and targets are standardised in any case."""
        normalize, task = self.config.data.normalize, self.config.task
        if task.model == "unet" and task.options.get("residual") and normalize != "standardize":
            warn(
                context,
                f"task.options.residual = true: the model adds to inputs of data.normalize = '{normalize}', "
                'and its targets are standardized, so it learns badly. Set data.normalize = "standardize".',
            )

    def _require_known(self, found: Moments) -> None:
        """Raises `UserError`, on all ranks, if targets are missing and data.missing does not say what to do then."""
        data = self.config.data
        if data.missing == "refuse" and found.known.min() < 1:
            share = 1 - float(found.known.mean())
            raise joint(
                UserError(
                    f"{data.in_words}: {data.targets} lacks {share:.3g} of its values",
                    'data.missing = "drop" leaves out samples without any target, and counts the others.'
                    if data.dataset is None
                    else "Leave them out in the Dataset.",
                )
            )

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
        return _loss(self.config.task.loss, model(batch.floats()).view(wanted.shape), wanted, self._scale.known)

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
    s * scale + offset. missing: stored numbers that stand for no target, as NaN does. known: the share of all targets
    that is there; what is not adds nothing to a loss or measure. names: of up to 16 targets, each of which is measured.
    """

    mean: torch.Tensor
    std: torch.Tensor
    scale: float
    offset: float
    missing: tuple[float, ...] = ()
    known: float = 1.0
    names: tuple[str, ...] = ()

    @property
    def pooled(self) -> tuple[int, ...]:
        """The axes of a target whose numbers have one mean and deviation."""
        return tuple(axis for axis, size in enumerate(self.std.shape) if size == 1)

    def standardized(self, targets: torch.Tensor) -> torch.Tensor:
        """NaN where a target is missing."""
        if self.known < 1 or self.missing:
            is_missing = ~torch.isfinite(targets)
            for value in self.missing:
                is_missing |= targets == torch.tensor(value, dtype=targets.dtype, device=targets.device)
            targets = torch.where(is_missing, torch.nan, targets.float())
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

    variance: of standardised targets, by which r2 divides. known: the share of them that is there. persistence_mse: of
    inputs taken for predictions, of standardised targets; None if they cannot be taken so.
    """

    variance: torch.Tensor
    known: torch.Tensor
    persistence_mse: float | None


def find_references(split: Split, scale: TargetScale, persistence: Persistence | None, context: Context) -> References:
    """Collective."""
    std = scale.std.double().numpy()
    found = moments(split.targets, scale.missing, context, scale.pooled)
    squares = None if persistence is None else persistence.mse(split, scale.pooled, context, scale.missing)
    return References(
        variance=torch.from_numpy(np.asarray((found.std / std) ** 2)),
        known=torch.from_numpy(np.asarray(found.known)),
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
    variance, known = references.variance.to(wanted.device), references.known.to(wanted.device)
    share = float(known.mean())
    # In 64 bits, and by the training samples' deviation: squares of small targets would be 0 in 32.
    errors = (predicted - wanted).double()
    if share < 1:
        errors = torch.where(torch.isfinite(wanted), errors, 0.0)
    stored = errors * scale.std.to(errors.device).double()
    relative = errors.square() / (variance * known).clamp_min(torch.finfo().tiny)
    unexplained = torch.where(variance > 0, relative, 1.0)
    found: Sums = {
        "loss": _loss(loss, predicted, wanted, share).item(),
        "mse": _sum_of_means(stored.square()) / share * scale.scale**2,
        "mae": _sum_of_means(stored.abs()) / share * abs(scale.scale),
        "r2": len(targets) - _sum_of_means(unexplained),
    }
    if references.persistence_mse:
        found["persistence_skill"] = len(targets) - _sum_of_means(errors.square()) / share / references.persistence_mse
    by_target = [_by_target(each, variance.shape) for each in (stored.abs() / known, unexplained)]
    for name, size, rest in zip(scale.names, *by_target, strict=bool(scale.names)):
        found |= {f"{name}_mae": size * abs(scale.scale), f"{name}_r2": len(targets) - rest}
    return found | (metrics.sums_of(more, scale.predicted(predicted), scale.meant(targets)) if more else {})


def open_metrics(names: list[str], scale: TargetScale, target_shape: tuple[int, ...]) -> dict[str, Metric]:
    """Those that task.metrics names. Raises UserError."""
    if names and scale.known < 1:
        raise UserError(f"task.metrics = {names} needs all targets, and some are missing", "Leave task.metrics out.")
    mean, std = scale.mean.double() * scale.scale + scale.offset, scale.std.double() * abs(scale.scale)
    return metrics.of_numbers(names, target_shape, mean, std)


def _by_target(values: torch.Tensor, shape: torch.Size) -> list[float]:
    """For each target the sum over samples. shape: of a sample, 1 along the axes over which values count as one."""
    pooled = [1 + axis for axis, size in enumerate(shape) if size == 1 and values.shape[1 + axis] != 1]
    means = values.mean(pooled, keepdim=True) if pooled else values
    return [float(each) for each in means.reshape(len(values), -1).sum(0)]


def target_names(files: Files, name: str, num_targets: int) -> list[str]:
    """The names of 2 to 16 targets: their data set's attribute `names`, the columns of a prepared table, or numbers.

    [] for one target, and for more.
    """
    if not 1 < num_targets <= _MOST_NAMED:
        return []
    dataset = files.datasets(name, "data.targets")[0]
    for attributes, key in ((dataset.attrs, "names"), (files.opened[0].attrs, "target")):
        with damage_as_user_error(files.paths[0], f"attribute {key}"):
            found = [
                each.decode() if isinstance(each, bytes) else str(each) for each in np.ravel(attributes.get(key, []))
            ]
        if len(found) == num_targets and len(set(found)) == num_targets:
            return ["_".join(each.split()) for each in found]
    return [f"target{number}" for number in range(num_targets)]


def _loss(name: str, predicted: torch.Tensor, wanted: torch.Tensor, known: float) -> torch.Tensor:
    """The sum over samples of the mean over a sample's outputs. known: the share of what is wanted that is no NaN."""
    if known < 1:  # an output without a target is what it is: it has no error, and no gradient
        wanted = torch.where(torch.isfinite(wanted), wanted, predicted.detach().to(wanted.dtype))
    return _LOSSES[name](predicted, wanted, reduction="sum") / (prod(wanted.shape[1:]) * known)


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))


def _sum_of_means(values: torch.Tensor) -> float:
    """The sum over samples of the mean over each one's values."""
    return float(values.reshape(len(values), -1).mean(1).double().sum()) if len(values) else 0.0
