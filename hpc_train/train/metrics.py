"""`task.metrics`: measures beside a task's own, by name or import path, as sums over samples that add up over ranks.

Of a batch a metric gives a number, the sum over its samples, or a state, if what it says is no mean over samples: a
confusion matrix, or what a metric of torchmetrics keeps. States add up like numbers, and are finished once, of all.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import prod
from typing import Any, Protocol, Self

import numpy as np
import torch

from hpc_train.core.errors import UserError
from hpc_train.core.import_path import at_user_line, import_path, is_import_path

_NUM_TRIED = 64  # samples of no meaning, on which a metric of classes is tried
_BINS = 64  # of a scatter, along each axis
_SPREAD = 4.0  # deviations of the training targets from their mean that a scatter shows


class State(Protocol):
    """The sum of what a metric keeps of some samples."""

    def __add__(self, other: Self) -> Self: ...

    def measures(self, name: str) -> dict[str, float]:
        """Raises UserError if the metric cannot be computed."""

    def tables(self, name: str) -> dict[str, np.ndarray]:
        """What is shown as a figure, by name."""


Sums = dict[str, Any]  # a float, or a State
Metric = Callable[[torch.Tensor, torch.Tensor], Any]  # of what a model says and the targets -> a float, or a State


def add(sums: Sums, more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def total(everyone: Iterable[Mapping[str, Any]]) -> Sums:
    """The sums of all, in their order."""
    sums: Sums = {}
    for each in everyone:
        add(sums, each)
    return sums


def finished(sums: Mapping[str, Any], num: int) -> dict[str, float]:
    """The means over `num` samples, and what states say; {} of none."""
    found: dict[str, float] = {}
    for name, value in sums.items() if num else ():
        found |= value.measures(name) if is_state(value) else {name: value / num}
    return found


def tables(sums: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The figures behind some sums, by name."""
    found: dict[str, np.ndarray] = {}
    for name, value in sums.items():
        found |= value.tables(name) if is_state(value) else {}
    return found


def is_state(value: Any) -> bool:
    return hasattr(value, "tables")  # a task of a user's own gives numbers of any kind


# ------------------------------------------------------------------------------------------------ which ones


def of_classes(names: list[str], num_classes: int) -> dict[str, Metric]:
    """Metrics of probabilities (n, num_classes) and classes (n,). Raises UserError."""
    found: dict[str, Metric] = {}
    for name in names:
        if name.startswith("top") and name[3:].isdigit():
            found[f"{name}_accuracy"] = partial(_top, _num_most_probable(name, num_classes))
        elif name in ("f1", "confusion"):
            found[name] = partial(_confusion, num_classes, name)
        else:
            imported = _imported(name, {"num_classes": num_classes}, "top5, f1, confusion")
            classes = torch.arange(_NUM_TRIED) % num_classes
            _try(name, imported, torch.full((_NUM_TRIED, num_classes), 1 / num_classes), classes)
            found |= imported
    return found


def of_numbers(names: list[str], shape: tuple[int, ...], mean: torch.Tensor, std: torch.Tensor) -> dict[str, Metric]:
    """Metrics of predictions and targets (n, *shape) in the targets' units, in which they have this mean and deviation.

    Raises UserError.
    """
    found: dict[str, Metric] = {}
    for name in names:
        if name == "scatter":
            found[name] = partial(_scatter, mean, std)
        else:
            imported = _imported(name, {"num_outputs": prod(shape)}, "scatter; mse, mae and r2 are always there")
            num = next(each for each in count(3) if each not in shape)
            targets = torch.rand(num, *shape, generator=torch.Generator().manual_seed(0))
            _try(name, imported, targets.flip(0), targets)
            found |= imported
    return found


def _try(name: str, imported: Mapping[str, Metric], said: torch.Tensor, targets: torch.Tensor) -> None:
    """Raises UserError if a metric of a package, or of the user, fails on samples of these shapes.

    Without it, the first validation, or the test after the last step, would find that.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of classes that do not occur in so few samples
            finished(sums_of(imported, said, targets), len(targets))
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  a user's function may raise anything
        raise UserError(
            f"task.metrics = '{name}' fails for predictions {tuple(said.shape)} and targets {tuple(targets.shape)}: "
            f"{type(error).__name__}: {error}{at_user_line(error)}",
            "Fix it, name a metric for such shapes, or write a function of (predictions, targets) that calls it.",
        ) from None


def sums_of(metrics: Mapping[str, Metric], said: torch.Tensor, targets: torch.Tensor) -> Sums:
    """Of a batch; {} of an empty one."""
    return {name: metric(said, targets) for name, metric in metrics.items()} if len(targets) else {}


def _imported(name: str, decided: dict[str, Any], known: str) -> dict[str, Metric]:
    if not is_import_path(name):
        raise UserError(f"task.metrics = '{name}' is unknown", f"Known: {known}; of a package: 'package.module:name'.")
    found = import_path("task.metrics", name, "metric")
    short = name.rpartition(":")[2].rpartition(".")[2]
    if isinstance(found, type):
        make = partial(_made, name, decided)
        _check_states(name, make())
        return {short: partial(_updated, make)}
    if not callable(found):
        raise UserError(
            f"task.metrics = '{name}' is {type(found).__name__}",
            "Name a metric of torchmetrics, or a function of (predictions, targets).",
        )
    return {short: partial(_of_function, name, found)}


# ------------------------------------------------------------------------------------------------ our own


def _num_most_probable(name: str, num_classes: int) -> int:
    """3 for "top3". Raises UserError."""
    if not 0 < int(name[3:]) <= num_classes:
        raise UserError(f"task.metrics = '{name}': there are {num_classes} classes", f"Write top1 to top{num_classes}.")
    return int(name[3:])


def _top(k: int, probabilities: torch.Tensor, classes: torch.Tensor) -> float:
    """How many samples have their class among the k most probable."""
    return float((probabilities.topk(k, 1).indices == classes.unsqueeze(1)).any(1).sum())


@dataclass(frozen=True)
class Confusion:
    """counts (classes, classes): of samples of each class, a row, by what was predicted."""

    counts: np.ndarray
    is_shown: bool

    def __add__(self, other: Self) -> "Confusion":
        return Confusion(self.counts + other.counts, self.is_shown)

    def measures(self, name: str) -> dict[str, float]:
        """The macro F1: the mean over classes that occur, or were predicted, of 2 TP / (2 TP + FP + FN)."""
        if self.is_shown:
            return {}
        found, occurs = np.diag(self.counts), self.counts.sum(0) + self.counts.sum(1)
        return {name: float((2 * found[occurs > 0] / occurs[occurs > 0]).mean())}

    def tables(self, name: str) -> dict[str, np.ndarray]:
        return {name: self.counts} if self.is_shown else {}


def _confusion(num_classes: int, name: str, probabilities: torch.Tensor, classes: torch.Tensor) -> Confusion:
    cells = classes * num_classes + probabilities.argmax(1)
    counts = torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
    return Confusion(counts.cpu().numpy(), name == "confusion")


# ------------------------------------------------------------------------------------------------ other packages


def _of_function(path: str, function: Callable[..., Any], said: torch.Tensor, targets: torch.Tensor) -> float:
    values = function(said, targets)
    if not isinstance(values, torch.Tensor) or values.shape != (len(targets),):
        shape = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise UserError(
            f"task.metrics = '{path}' returned {shape} for {len(targets)} samples",
            "Return a tensor with a value for each sample: ranks have unlike shares, and means of them would differ.",
        )
    return float(values.double().sum())


def _made(path: str, decided: dict[str, Any]) -> Any:
    make = import_path("task.metrics", path, "metric")
    try:
        try:
            return make(**decided)
        except (TypeError, ValueError):  # not every metric asks how many there are
            return make()
    except Exception as error:  # noqa: BLE001  a package raises anything
        remedy = "Name a function of (predictions, targets) that makes it and gives a value for each sample."
        raise UserError(f"task.metrics = '{path}' cannot be made: {error}", remedy) from None


def _check_states(path: str, metric: Any) -> None:
    """Raises UserError unless the metric keeps states that add up: sums, greatest and least values, all samples."""
    reductions = getattr(metric, "_reductions", None)
    if not isinstance(reductions, dict):
        raise UserError(
            f"task.metrics = '{path}' is a class, and no metric of torchmetrics",
            "Name such a class, or a function of (predictions, targets).",
        )
    for state, reduction in reductions.items():
        if _kind(reduction) is None:
            raise UserError(
                f"task.metrics = '{path}': its state {state} is reduced over ranks by {reduction}, and does not add up",
                "Name a metric whose states are sums, greatest or least values, or kept whole (sum, max, min, cat).",
            )


def _kind(reduction: Any) -> str | None:
    """sum, max, min or cat, as the class names it; None for others."""
    kind = str(getattr(reduction, "__name__", "")).removeprefix("dim_zero_")
    return kind if kind in ("sum", "max", "min", "cat") else None


@dataclass(frozen=True)
class TorchMetric:
    """The states of a metric of torchmetrics, as arrays, with how each adds up."""

    make: Callable[[], Any]
    states: dict[str, tuple[str, np.ndarray]]

    def __add__(self, other: Self) -> "TorchMetric":
        joined = {name: (kind, _ADDED[kind](mine, other.states[name][1])) for name, (kind, mine) in self.states.items()}
        return TorchMetric(self.make, joined)

    def measures(self, name: str) -> dict[str, float]:
        """Its value; of several, such as one for each class, each by its number."""
        metric = self.make()
        for state, (_, value) in self.states.items():
            tensor = torch.from_numpy(np.asarray(value))
            setattr(metric, state, [tensor] if isinstance(getattr(metric, state), list) else tensor)
        metric._update_count = 1  # else it warns that nothing was given to it
        value = metric.compute()
        if not isinstance(value, torch.Tensor):
            raise UserError(
                f"task.metrics: {type(metric).__name__} says {type(value).__name__}, no number",
                "Name a metric whose value is a number, or several.",
            )
        numbers = value.detach().flatten().tolist()
        return {name: numbers[0]} if len(numbers) == 1 else {f"{name}_{i}": each for i, each in enumerate(numbers)}

    def tables(self, name: str) -> dict[str, np.ndarray]:
        return {}


_ADDED: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "sum": np.add,
    "max": np.maximum,
    "min": np.minimum,
    "cat": lambda mine, other: np.concatenate((np.atleast_1d(mine), np.atleast_1d(other))),
}


def _updated(make: Callable[[], Any], said: torch.Tensor, targets: torch.Tensor) -> TorchMetric:
    metric = make()
    metric.update(said.cpu(), targets.cpu())
    states = {}
    for name, reduction in metric._reductions.items():
        value = getattr(metric, name)
        whole = torch.cat([torch.atleast_1d(each) for each in value]) if isinstance(value, list) else value
        states[name] = str(_kind(reduction)), whole.detach().numpy()
    return TorchMetric(make, states)


# ------------------------------------------------------------------------------------------------ a scatter


@dataclass(frozen=True)
class Scatter:
    """counts (true, predicted) of targets in bins of their deviation from -4 to 4; what lies outside is in the last."""

    counts: np.ndarray

    def __add__(self, other: Self) -> "Scatter":
        return Scatter(self.counts + other.counts)

    def measures(self, name: str) -> dict[str, float]:
        return {}

    def tables(self, name: str) -> dict[str, np.ndarray]:
        return {name: self.counts}


def _scatter(mean: torch.Tensor, std: torch.Tensor, said: torch.Tensor, targets: torch.Tensor) -> Scatter:
    true, predicted = (
        ((each.double().cpu() - mean) / std / _SPREAD + 1).mul(_BINS / 2).floor().clamp(0, _BINS - 1).long().flatten()
        for each in (targets, said)
    )
    return Scatter(torch.bincount(true * _BINS + predicted, minlength=_BINS**2).reshape(_BINS, _BINS).numpy())
