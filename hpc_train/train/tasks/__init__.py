"""What is trained. A task brings the model, the samples and the loss; the trainer brings everything else."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from hpc_train.config import Config
from hpc_train.errors import UserError
from hpc_train.train.context import Context
from hpc_train.train.tasks.classification import Classification
from hpc_train.train.tasks.dqn import Dqn
from hpc_train.train.tasks.policy_gradient import PolicyGradient
from hpc_train.world import World

BUILT_IN: dict[str, Callable[[Config, Context], Any]] = {
    "classification": Classification,
    "policy_gradient": PolicyGradient,
    "dqn": Dqn,
}


class Task(Protocol):
    """What the trainer asks of a task; made as `Task(config, context)` on every rank."""

    num_samples: int  # of the whole training set, alike on every rank

    def model(self) -> nn.Module:
        """A new model, alike on every rank (the generator is seeded; the root's weights are sent to all)."""

    def batch(self, rows: np.ndarray, step: int) -> Any:
        """The samples at `rows`: this rank's share of the global batch of `step`; may be empty."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The SUM of the samples' losses (not their mean: shares differ in size)."""

    def test_batches(self, world: World) -> Iterator[Any]:
        """This rank's share of the test samples; nothing where there are none."""

    def test(self, model: nn.Module, batch: Any) -> tuple[int, dict[str, float]]:
        """Of a test batch: how much it counts, and the SUM of each measure: {"loss": ..., "accuracy": ...}."""


def open_task(config: Config, context: Context) -> Task:
    """Collective. The task that `task.kind` names: built in, or a user's own "mypackage.mytask:MyTask"."""
    kind = config.task.kind
    make = BUILT_IN.get(kind) or context.on_all(lambda: _load(kind))
    return make(config, context)


def _load(kind: str) -> Callable[[Config, Context], Any]:
    module_name, colon, name = kind.partition(":")
    if not colon:
        raise UserError(
            f"task.kind = '{kind}' is not known",
            f"Known are: {', '.join(BUILT_IN)}; your own: 'mypackage.mytask:MyTask'.",
        )
    here = str(Path.cwd())
    if here not in sys.path:  # the user's module usually lies where the job is started
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"task.kind = '{kind}': no module {error.name}", f"Looked in {here} and in sys.path.") from None
    except (TypeError, ValueError) as error:  # no module's name at all
        raise UserError(f"task.kind = '{kind}': {error}", "Write 'mypackage.mytask:MyTask'.") from None
    make = getattr(module, name, None)
    if not callable(make):
        raise UserError(
            f"task.kind = '{kind}': {module_name} has no class {name}", "Name the task class after the colon."
        )
    return make
