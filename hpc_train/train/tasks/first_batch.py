"""The first batch of a task, tried before anything is trained."""

from dataclasses import fields, is_dataclass
from math import isclose
from typing import Any

import torch
from torch import nn

from hpc_train.core.errors import UserError, out_of_memory
from hpc_train.core.import_path import at_user_line
from hpc_train.core.settings import Config
from hpc_train.train.data.device_queue import map_tensors

_MOST_TRIED = 8  # samples, to tell a mean from a sum
_ALIKE = 1e-2  # in bf16, too


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
        raise _does_not_fit(config, model, batch, f"{error}{at_user_line(error)}") from None
    if not isinstance(loss, torch.Tensor) or loss.shape != () or not loss.requires_grad:
        raise _does_not_fit(config, model, batch, f"the loss is {_shown(loss)}, and not a differentiable number")
    return loss


def check_is_sum(config: Config, task: Any, model: nn.Module, batch: Any, num: int) -> None:
    """Raises `UserError` if the task's loss is a mean over samples: then it weights parts of unlike size alike.

    The loss of the first of the `num` samples is compared with the losses of two parts of these, of unlike size. Says
    nothing of a batch that cannot be cut, and of a loss that cannot be computed on a part.
    """
    num_tried = min(num, _MOST_TRIED)
    num_first, is_training = num_tried // 4 or 1, model.training
    model.eval()  # without dropout, and without statistics of the batch
    try:
        spans = ((0, num_first), (num_first, num_tried), (0, num_tried))
        first, second, both = (float(task.loss(model, _cut(batch, num, *span)).detach()) for span in spans)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return
    finally:
        model.train(is_training)
    mean = (first * num_first + second * (num_tried - num_first)) / num_tried
    if num_tried > 1 and isclose(both, mean, rel_tol=_ALIKE) and not isclose(both, first + second, rel_tol=_ALIKE):
        raise UserError(
            f"task.kind = '{config.task.kind}': its loss is a mean over samples: {both:.4g} for {num_tried} of them, "
            f"{first:.4g} and {second:.4g} for the first {num_first} and the others. It is divided by the size of the "
            "global batch once more, and samples of small parts count more",
            'Return the sum from Task.loss: reduction="sum", or the mean times the number of samples.',
        )


def _cut(batch: Any, num: int, begin: int, end: int) -> Any:
    """The samples [begin, end) of a batch of `num`: of its tensors that have a row for each."""
    return map_tensors(batch, lambda tensor: tensor[begin:end] if tensor.ndim and len(tensor) == num else tensor)


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
