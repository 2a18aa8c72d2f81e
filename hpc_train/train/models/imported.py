"""Models of other packages: task.model = "package.module:factory", a class or a function that makes a torch module.

The factory is called with task.options, and with what the data decide where it has a parameter of that name
(input_shape, num_classes, num_outputs, vocab_size, context). A class of transformers is made from its own
configuration. The model keeps its class and the names of its weights; only its `forward` takes and gives what our own
models do: pictures become (n, channels, height, width), and an output with `logits` its logits.
"""

import inspect
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from hpc_train.core.errors import UserError, out_of_memory
from hpc_train.core.import_path import import_path, refused_options
from hpc_train.train.models.images import Layout, image_layout

_WITH_WEIGHTS = (nn.Linear, _ConvNd, nn.Embedding, nn.RNNBase)
Forward = Callable[..., Any]


def imported_on_arrays(
    path: str, input_shape: tuple[int, ...], num: tuple[str, int], options: dict[str, Any]
) -> nn.Module:
    """The model `path` from (n, *input_shape) to (n, num), of which num names what it counts: num_classes, num_outputs.

    Raises `UserError`.
    """
    counted, num_outputs = num
    given = {"input_shape": input_shape, counted: num_outputs, "num_labels": num_outputs}
    model = _make(path, given, options)
    first = next((part for part in model.modules() if isinstance(part, _WITH_WEIGHTS)), None)
    layout = _picture_layout(path, input_shape, first.in_channels) if isinstance(first, nn.Conv2d) else None
    model.forward = partial(_of_arrays, model.forward, model, layout, num)
    _let_norms_take_few(model)
    return model


def imported_on_tokens(path: str, vocab_size: int, context: int, options: dict[str, Any], masked: bool) -> nn.Module:
    """The model `path` from tokens (n, context) to logits (n, context, vocab_size); Raises `UserError`.

    masked: its `forward` then takes positions (n, k), as our own `Bert` does, and gives (n, k, vocab_size).
    """
    model = _make(path, {"vocab_size": vocab_size, "context": context}, options)
    model.forward = partial(_at_positions if masked else _of_tokens, model.forward, model)
    return model


def context_of(path: str, options: dict[str, Any]) -> int | None:
    """How many tokens the model takes at once: task.options.context, or as its configuration says; None if unknown."""
    factory = _factory(path)
    if hasattr(factory, "config_class"):
        return getattr(_config(path, factory, {}, options), "max_position_embeddings", None)
    parameter = inspect.signature(factory).parameters.get("context")
    default = parameter.default if parameter is not None and parameter.default is not parameter.empty else None
    return options.get("context", default)


# ------------------------------------------------------------------------------------------------------ making it


def _factory(path: str) -> Callable[..., Any]:
    factory = import_path("task.model", path, "model")
    if not callable(factory):
        raise UserError(
            f"task.model = '{path}' is {type(factory).__name__}, which makes no model",
            "Name a class of torch.nn.Module, or a function that returns a module.",
        )
    return factory


def _make(path: str, given: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    factory = _factory(path)
    is_configured = hasattr(factory, "config_class")
    call = (
        partial(factory, _config(path, factory, given, options))
        if is_configured
        else partial(factory, **_named(factory, given) | options)
    )
    try:
        model = call()
    except Exception as error:  # noqa: BLE001  a user's constructor may raise anything
        raise out_of_memory(error) or refused_options("task.options", path, options, error) from None
    if not isinstance(model, nn.Module):
        raise UserError(
            f"task.model = '{path}' returned {type(model).__name__}, no torch module",
            "Name a class of torch.nn.Module, or a function that returns a module.",
        )
    return model


def _named(factory: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Those of `given` for which the factory has a parameter."""
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # written in C
        return {}
    return {name: value for name, value in given.items() if name in parameters}


def _config(path: str, factory: Any, given: dict[str, Any], options: dict[str, Any]) -> Any:
    """The configuration of a model of transformers. Such a class takes any keyword: a misspelt one is found here."""
    make = factory.config_class
    try:
        default = make()
        for option in options:
            if not hasattr(default, option):
                known = ", ".join(sorted(key for key in vars(default) if not key.startswith("_")))
                raise UserError(f"task.options.{option}: {make.__name__} has no such option", f"Its options: {known}.")
        decided = {name: value for name, value in given.items() if hasattr(default, name)}
        # Every token of the data is a token like any other, and training needs no cache of earlier tokens' keys.
        plain = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}
        plain = {name: value for name, value in plain.items() if hasattr(default, name)}
        return make(**plain | decided | options)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  a library raises errors of its own
        raise UserError(
            f"task.options = {options}: {make.__name__} refuses them: {error}", f"See {make.__name__}'s documentation."
        ) from None


# ------------------------------------------------------------------------------------------- what it takes and gives


def _picture_layout(path: str, input_shape: tuple[int, ...], num_channels: int) -> Layout:
    """How the stored pictures lie, for a model whose first layer convolves `num_channels`. Raises `UserError`."""
    shape = tuple(input_shape)
    ends = [axis for axis in (0, 2) if len(shape) == 3 and shape[axis] == num_channels]
    if len(ends) == 1:
        height, width = (size for axis, size in enumerate(shape) if axis != ends[0])
        return Layout(num_channels, height, width, ends[0])
    layout = image_layout(shape, path)
    if layout.num_channels not in (1, num_channels):
        raise UserError(
            f"data.inputs has pictures of {layout.num_channels} channels, and task.model = '{path}' begins with a "
            f"convolution of {num_channels}",
            "Set the model's number of channels in task.options.",
        )
    return layout


def _of_arrays(
    forward: Forward, model: nn.Module, layout: Layout | None, num: tuple[str, int], inputs: torch.Tensor
) -> torch.Tensor:
    if layout is not None:
        first = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
        inputs = layout.channels_first(inputs)
        if layout.num_channels < first.in_channels:  # grey, for a model of colours
            inputs = inputs.expand(-1, first.in_channels, -1, -1).contiguous()
    outputs = _logits(forward, model, inputs)
    (counted, num_outputs), found = num, prod(outputs.shape[1:])
    if found != num_outputs:
        is_classes = counted == "num_classes"
        needed = f"{num_outputs} {'classes' if is_classes else 'numbers a sample'}"
        remedy = "the option is often called num_classes"
        raise UserError(
            f"the model gives {found} numbers for each sample, and the targets have {needed}",
            f"Set the number in task.options ({remedy}){' or set task.num_classes' * is_classes}.",
        )
    return outputs


def _of_tokens(forward: Forward, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return _logits(forward, model, tokens)


def _at_positions(forward: Forward, model: nn.Module, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    logits = _logits(forward, model, tokens)
    return logits.gather(1, positions.unsqueeze(2).expand(-1, -1, logits.shape[2]))


def _logits(forward: Forward, model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    if not len(inputs):
        return _of_nothing(forward, model, inputs)
    output = forward(inputs)
    found = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if not isinstance(found, torch.Tensor):
        raise UserError(
            f"the model returns {type(output).__name__}, neither a tensor nor something with logits",
            "Name a model with a head, such as transformers:BertForMaskedLM in place of BertModel, or a task of your "
            "own as task.kind.",
        )
    return found


def _of_nothing(forward: Forward, model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Of a rank without samples in an epoch's last batch. Many models reshape with -1, which nothing has no size for.

    It passes through the model all the same, as ranks that divide the weights need; running statistics stay.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return _logits(forward, model, inputs.new_zeros(1, *inputs.shape[1:]))[:0]
    finally:
        for module, was in training.items():
            module.training = was


def _let_norms_take_few(model: nn.Module) -> None:
    """Batch norms of one value a channel use the running statistics, as our own do (`images.BatchNorm`)."""
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.forward = partial(_normalised, norm.forward, norm)  # type: ignore[method-assign]


def _normalised(forward: Forward, norm: _BatchNorm, inputs: torch.Tensor) -> torch.Tensor:
    if not norm.training or inputs.numel() >= 2 * norm.num_features:
        return forward(inputs)
    norm.training = False
    try:
        return forward(inputs)
    finally:
        norm.training = True
