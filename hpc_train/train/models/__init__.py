"""Models: plain `nn.Module`s, made by name."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from hpc_train.errors import UserError
from hpc_train.train.models.mlp import Mlp
from hpc_train.train.models.softmax import Softmax

CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {"softmax": Softmax, "mlp": Mlp}


def classifier(name: str, input_shape: tuple[int, ...], num_classes: int, options: dict[str, Any]) -> nn.Module:
    """The model `task.model` names, for inputs of `input_shape` and `num_classes` classes. Raises `UserError`."""
    if name not in CLASSIFIERS:
        raise UserError(f"task.model = '{name}' is not known", f"Known are: {', '.join(CLASSIFIERS)}.")
    make = CLASSIFIERS[name]
    accepted = list(inspect.signature(make).parameters)[2:]
    for option in options:
        if option not in accepted:
            raise UserError(
                f"task.options.{option}: {name} has no such option", f"Its options: {', '.join(accepted) or 'none'}."
            )
    try:
        return make(input_shape, num_classes, **options)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: torch's for more memory than there is
        raise UserError(
            f"task.options = {options}: {name} refuses them: {error}", "See the model's docstring."
        ) from None
