"""Which weights of a model are trained (`train.freeze`), and at which rates (`train.rates`)."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from hpc_train.core.errors import UserError
from hpc_train.core.settings import Train
from hpc_train.train.reduce.buckets import trainable_parameters

_MOST_NAMED = 12  # weights in a message


def limited(make: Callable[[], nn.Module], train: Train) -> nn.Module:
    """The model that `make` makes, in which the weights of `train.freeze` stay as they begin.

    They have no gradients, are neither sent nor updated, and have no optimizer state.

    Raises UserError for a pattern of `train.freeze` or `train.rates` that is no weight's name.
    """
    model = make()
    names = dict(model.named_parameters(remove_duplicate=False))  # a tied weight by each of its names
    for pattern in train.freeze:
        for name in _matching(f"train.freeze = {train.freeze}", pattern, names):
            names[name].requires_grad_(False)
    left = trainable_parameters(model)
    if train.freeze and not left:
        raise UserError(f"train.freeze = {train.freeze} leaves nothing to train", f"Leave out some of: {_some(names)}.")
    for pattern in train.rates:
        _matching(f"train.rates = {train.rates}", pattern, left)
    return model


def _matching(key: str, pattern: str, names: Iterable[str]) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise UserError(f"{key}: no weight that is trained is called '{pattern}'", f"There are {_some(names)}.")
    return found


def _some(names: Iterable[str]) -> str:
    known = list(names)
    half = _MOST_NAMED // 2
    return ", ".join(known if len(known) <= _MOST_NAMED else [*known[:half], "...", *known[-half:]])
