"""What a model's outputs mean: predictions, row by row, and their measures where targets are known."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from hpc_train.core.errors import UserError
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Config
from hpc_train.train import models
from hpc_train.train.comm.context import Context
from hpc_train.train.inference.learned import Learned
from hpc_train.train.inference.samples import Samples
from hpc_train.train.inference.trained import ROW_KINDS
from hpc_train.train.metrics import Sums, of_classes
from hpc_train.train.tasks import classification, regression
from hpc_train.train.tasks.persistence import find_persistence

Predictions = dict[str, np.ndarray]
NO_CLASS = -1  # in place of a predicted number where there is no prediction; "" in place of a string


class Column(NamedTuple):
    """A data set of predictions. shape: of a row."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Meaning(NamedTuple):
    """How to read a model's outputs.

    predictions: of outputs (n, ...), and whether each row has a prediction. measures: the sums over samples of each
    measure, of outputs and targets as `Samples` gives them. constants: data sets that say what columns are.
    """

    columns: dict[str, Column]
    predictions: Callable[[torch.Tensor, np.ndarray], Predictions]
    measures: Callable[[torch.Tensor, torch.Tensor], Sums]
    constants: dict[str, np.ndarray]


def make_model(config: Config, learned: Learned) -> nn.Module:
    """A model as training made it, with weights that mean nothing yet. Raises UserError."""
    name, options = config.task.model, dict(config.task.options)
    if learned.classes is not None:
        return models.classifier(name, learned.shape, learned.classes.num, options)
    return models.regressor(name, learned.shape, learned.target_shape, options)


def require_arrays(config: Config, run: RunDir) -> None:
    """Raises UserError, with what to do instead, for a task that does not map samples to predictions."""
    if config.task.kind in ROW_KINDS:
        return
    instead = f"hpc-train evaluate {run.path} gives its test measures"
    if config.task.kind == "language":
        instead = f"hpc-train generate {run.path} writes text with it, {instead}"
    raise UserError(
        f"task.kind = '{config.task.kind}' predicts nothing of the rows of a file",
        f"{instead}, hpc-train export {run.path} writes its weights for a program of your own.",
    )


def meaning(config: Config, learned: Learned, samples: Samples, context: Context) -> Meaning:
    """Collective, since the measures of regression need the variance of all targets."""
    if learned.classes is None:
        return _of_regression(config, learned, samples, context)
    return _of_classification(config, learned)


# ------------------------------------------------------------------------------------------------ classification


def _of_classification(config: Config, learned: Learned) -> Meaning:
    assert learned.classes is not None
    measures = partial(classification.measures, of_classes(config.task.metrics, learned.classes.num))
    values: Any = np.arange(learned.classes.num) if learned.classes.values is None else learned.classes.values
    texts = learned.table and learned.table.classes
    if texts and learned.classes.values is None and len(texts) >= learned.classes.num:
        values = np.array(texts[: learned.classes.num])
    labels = np.char.encode(values, "utf-8") if values.dtype.kind == "U" else values.astype(np.int64)
    columns = {"probabilities": Column((len(labels),), np.dtype(np.float32)), "predicted": Column((), labels.dtype)}
    return Meaning(columns, partial(_classes, labels), measures, {"classes": labels})


def _classes(labels: np.ndarray, logits: torch.Tensor, has_prediction: np.ndarray) -> Predictions:
    probabilities = logits.float().softmax(1).cpu().numpy()
    predicted = labels[probabilities.argmax(1)]
    probabilities[~has_prediction] = np.nan
    predicted[~has_prediction] = b"" if labels.dtype.kind == "S" else NO_CLASS
    return {"probabilities": probabilities, "predicted": predicted}


# ------------------------------------------------------------------------------------------------ regression


def _of_regression(config: Config, learned: Learned, samples: Samples, context: Context) -> Meaning:
    targets = learned.targets
    assert targets is not None
    references = regression.References(torch.zeros(()), torch.ones(()), None)
    if samples.targets_name is not None:
        names = samples.name, samples.targets_name
        persistence = context.on_all(lambda: find_persistence(samples.files, *names, samples.split))
        targets = replace(targets, missing=samples.missing_targets)
        references = regression.find_references(samples.split, targets, persistence, context)

    def numbers(outputs: torch.Tensor, has_prediction: np.ndarray) -> Predictions:
        predicted = targets.predicted(outputs.view(len(outputs), *learned.target_shape)).cpu().numpy()
        predicted[~has_prediction] = np.nan
        return {"predicted": predicted}

    more = regression.open_metrics(config.task.metrics, targets, learned.target_shape)

    def measures(outputs: torch.Tensor, wanted: torch.Tensor) -> Sums:
        return regression.measures(more, outputs, wanted, targets, references, config.task.loss)

    columns = {"predicted": Column(learned.target_shape, np.dtype(np.float32))}
    return Meaning(columns, numbers, measures, {})
