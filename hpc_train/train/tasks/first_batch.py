"""The first batch of a task, tried before anything is trained."""

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from hpc_train.core.errors import UserError, out_of_memory
from hpc_train.core.import_path import user_line
from hpc_train.core.settings import Config


def checked_loss(config: Config, task: Any, model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss of the first batch. Raises `UserError` that names all shapes if batch and model do not fit together.

    Other errors of a task keep their type and traceback.
    """
    try:
        loss = task.loss(model, batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:  # torch's, for shapes or types that disagree
        if found := out_of_memory(error):
            raise found from None
        raise _does_not_fit(config, model, batch, f"{error}, {user_line(error)}") from None
    if not isinstance(loss, torch.Tensor) or loss.shape != () or not loss.requires_grad:
        raise _does_not_fit(config, model, batch, f"the loss is {_shown(loss)}, and not a differentiable number")
    return loss


def _does_not_fit(config: Config, model: nn.Module, batch: Any, why: str) -> UserError:
    weights = next(
        (f", whose first weight {name} is {tuple(weight.shape)}" for name, weight in model.named_parameters()), ""
    )
    return UserError(
        f"task.kind = '{config.task.kind}', task.model = '{config.task.model}': the first batch cannot be trained on: "
        f"{why}\n  batch: {_shown(batch)}\n  model: {type(model).__name__}{weights}",
        "Make them agree: Task.batch and Task.loss, or task.model and task.options. The loss is a sum over samples.",
    )


def _shown(value: Any) -> str:
    """The shapes and types of the tensors in a batch."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_shown(part)}" for name, part in value.items())
    if isinstance(value, tuple | list):
        return f"({', '.join(_shown(part) for part in value[:8])}{', ...' * (len(value) > 8)})"
    if is_dataclass(value):
        return _shown({part.name: getattr(value, part.name) for part in fields(value)})
    return repr(value) if isinstance(value, int | float | str | None) else type(value).__name__
