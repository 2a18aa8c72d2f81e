"""What is trained: a task supplies the model, the samples and the loss; the trainer supplies everything else."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from hpc_train.core.errors import UserError
from hpc_train.core.import_path import import_path, is_import_path
from hpc_train.core.sampling import Order
from hpc_train.core.settings import RECORDED, Config
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context, joint
from hpc_train.train.tasks.classification import Classification
from hpc_train.train.tasks.dqn import Dqn
from hpc_train.train.tasks.language import Language, MaskedLanguage
from hpc_train.train.tasks.policy_gradient import PolicyGradient
from hpc_train.train.tasks.regression import Regression

BUILT_IN: dict[str, Callable[[Config, Context], Any]] = {
    "classification": Classification,
    "regression": Regression,
    "language": Language,
    "masked_language": MaskedLanguage,
    "policy_gradient": PolicyGradient,
    "dqn": Dqn,
}


class Task(Protocol):
    """What the trainer needs of a task, which it makes as `Task(config, context)` on every rank.

    A class need not inherit from this one: `open_task` gives a task the defaults of the optional members it lacks.
    """

    num_samples: int  # of the whole training set, the same on every rank

    def model(self) -> nn.Module:
        """A new model, the same on every rank: the generator is seeded, and the root's weights are sent to all."""

    def batch(self, rows: np.ndarray, step: int) -> Any:
        """The samples at `rows`: this rank's share of the global batch of `step`, or a part of it; may be empty.

        A thread may ask for batches ahead, unless the task is `in_step`. Draw random numbers from (step, rows), as
        `sampling.row_noise` does: then a batch depends neither on the thread nor on the number of ranks.
        """

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The SUM of the samples' losses (not their mean: shares differ in size)."""

    def test_batches(self, world: World) -> Iterator[Any]:
        """This rank's share of the test samples; empty if there are none."""

    def test(self, model: nn.Module, batch: Any) -> tuple[int, dict[str, float]]:
        """(how much a test batch counts, the SUM of each measure: {"loss": ..., "accuracy": ...})."""

    # Optional, with these defaults:

    def validation_batches(self, world: World) -> Iterator[Any]:
        """This rank's share of the samples that are held out to validate on, as often as asked; empty if none are."""
        return iter(())

    order: Order  # of the samples in an epoch: `dataset.open_order` for data in chunks. Default: Order(num_samples)
    reading: str | None = None  # a line for the log: which data are read, and how
    facts: dict[str, Any] | None = None  # more for meta.json: what the data's classes or scales were found to be
    in_step: bool = False  # batches depend on the weights, or need all ranks: the loop itself asks, at each step

    def prefetch(self, rows: np.ndarray) -> None:
        """A hint, only if `order` is by chunks: these rows are asked for soon."""

    keeps_state: bool  # whether checkpoints keep a state of this task, such as a replay memory. Default: if load_state

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and lists, the same on every rank."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from what `state` returned. Raises ValueError, LookupError or TypeError for anything else."""


_METHODS = ("model", "batch", "loss", "test_batches", "test")


def open_task(config: Config, context: Context) -> Task:
    """Collective. The task that `task.kind` names: built in, or a user's own "mypackage.mytask:MyTask"."""
    kind = config.task.kind
    make = BUILT_IN.get(kind) or context.on_all(lambda: _load(kind))
    task = make(config, context)
    context.on_all(lambda: _require(kind, task, ("num_samples", *_METHODS)))
    if config.validation.is_due and not hasattr(task, "validation_batches"):
        raise joint(
            UserError(
                f"{config.validation.in_words}: task.kind = '{kind}' has no validation_batches",
                "Write it as test_batches is written, or leave the key out.",
            )
        )
    return complete(task)


def complete(task: Any) -> Task:
    """`task` with the defaults of `Task` for the optional members it lacks. Nobody else asks what a task has."""
    defaults = {
        "order": Order(task.num_samples),
        "reading": None,
        "facts": None,
        "in_step": False,
        "validation_batches": partial(Task.validation_batches, task),
        "prefetch": partial(Task.prefetch, task),
        "keeps_state": hasattr(task, "load_state"),
        "state": partial(Task.state, task),
        "load_state": partial(Task.load_state, task),
    }
    for name, default in defaults.items():
        if getattr(task, name, None) is None:
            object.__setattr__(task, name, default)  # a frozen dataclass is a task, too
    return task


def _require(kind: str, task: object, names: tuple[str, ...]) -> None:
    if lacking := [name for name in names if getattr(task, name, None) is None]:
        raise UserError(
            f"task.kind = '{kind}': it has no {' and no '.join(lacking)}",
            f"A task has num_samples, {', '.join(_METHODS)}: see the class Task in {__file__}.",
        )


def _load(kind: str) -> Callable[[Config, Context], Any]:
    """The class of that name, if it has a task's methods: anything else, such as "os:system", is not called."""
    if kind == RECORDED:
        raise UserError(
            f"task.kind = '{kind}': another program ran the training loop of this run",
            "Start that program again: meta.json names it.",
        )
    if not is_import_path(kind):
        raise UserError(
            f"task.kind = '{kind}' is unknown", f"Known: {', '.join(BUILT_IN)}; your own: 'mypackage.mytask:MyTask'."
        )
    make = import_path("task.kind", kind, "class")
    if not isinstance(make, type):
        raise UserError(f"task.kind = '{kind}': {kind.replace(':', ' has no class ')}", "Name a class after the colon.")
    _require(kind, make, _METHODS)
    return make
