"""Models: plain `nn.Module`s, by name."""

import inspect
from collections.abc import Callable
from math import prod
from typing import Any

from torch import nn

from hpc_train.core.errors import UserError
from hpc_train.core.import_path import is_import_path
from hpc_train.train.models.bert import Bert
from hpc_train.train.models.gpt import Gpt
from hpc_train.train.models.imported import context_of, imported_on_arrays, imported_on_tokens
from hpc_train.train.models.mlp import Mlp
from hpc_train.train.models.resnet import ResNet
from hpc_train.train.models.softmax import Softmax
from hpc_train.train.models.unet import Unet
from hpc_train.train.models.vgg import Vgg

CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {"softmax": Softmax, "mlp": Mlp, "resnet": ResNet, "vgg": Vgg}
REGRESSORS: dict[str, Callable[..., nn.Module]] = {"linear": Softmax, "mlp": Mlp, "resnet": ResNet, "vgg": Vgg}
FIELD_MODELS: dict[str, Callable[..., nn.Module]] = {"unet": Unet}  # fields to fields on the same grid
CAUSAL: dict[str, Callable[..., nn.Module]] = {"gpt": Gpt}  # predict the next token
MASKED: dict[str, Callable[..., nn.Module]] = {"bert": Bert}  # predict masked tokens


def classifier(name: str, input_shape: tuple[int, ...], num_classes: int, options: dict[str, Any]) -> nn.Module:
    """The model `task.model` names, for inputs of `input_shape` and `num_classes` classes. Raises `UserError`."""
    if is_import_path(name):
        return imported_on_arrays(name, input_shape, ("num_classes", num_classes), options)
    return make_model(CLASSIFIERS, name, (input_shape, num_classes), options)


def regressor(
    name: str, input_shape: tuple[int, ...], target_shape: tuple[int, ...], options: dict[str, Any]
) -> nn.Module:
    """The model `task.model` names, from inputs to targets of these shapes. Raises `UserError`.

    Its outputs are (n, *target_shape), or as many numbers in a row.
    """
    num_outputs = prod(target_shape)
    if is_import_path(name):
        return imported_on_arrays(name, input_shape, ("num_outputs", num_outputs), options)
    given = (input_shape, target_shape if name in FIELD_MODELS else num_outputs)
    return make_model(REGRESSORS | FIELD_MODELS, name, given, options)


def language_model(name: str, vocab_size: int, context: int, options: dict[str, Any], masked: bool) -> nn.Module:
    """The model `task.model` names, for tokens below `vocab_size`, `context` of them at most. Raises `UserError`."""
    if is_import_path(name):
        return imported_on_tokens(name, vocab_size, context, options, masked)
    return make_model(MASKED if masked else CAUSAL, name, (vocab_size,), options)


def context_length(name: str, options: dict[str, Any], masked: bool) -> Any:
    """How many tokens that model takes at once, by its options or as it is by default; None if unknown."""
    if is_import_path(name):
        return context_of(name, options)
    return options.get("context", default(MASKED if masked else CAUSAL, name, "context"))


def make_model(
    known: dict[str, Callable[..., nn.Module]], name: str, given: tuple[Any, ...], options: dict[str, Any]
) -> nn.Module:
    """The model `known[name](*given, **options)`. Raises `UserError` for options that it does not accept."""
    make = _known(known, name)
    accepted = list(inspect.signature(make).parameters)[len(given) :]
    for option in options:
        if option not in accepted:
            raise UserError(
                f"task.options.{option}: {name} has no such option", f"Its options: {', '.join(accepted) or 'none'}."
            )
    try:
        return make(*given, **options)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: torch has too little memory
        raise UserError(
            f"task.options = {options}: {name} refuses them: {error}", "See the model's docstring."
        ) from None


def default(known: dict[str, Callable[..., nn.Module]], name: str, option: str) -> Any:
    """The default of an option of the model `name`. Raises `UserError` for an unknown model."""
    return inspect.signature(_known(known, name)).parameters[option].default


def _known(known: dict[str, Callable[..., nn.Module]], name: str) -> Callable[..., nn.Module]:
    if name not in known:
        raise UserError(
            f"task.model = '{name}' is unknown",
            f"Known: {', '.join(known)}; of another package: 'package.module:name'.",
        )
    return known[name]
