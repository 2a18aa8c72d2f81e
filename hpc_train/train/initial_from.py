"""`train.init_from`: a new run begins with the weights of a file or of another run."""

from pathlib import Path

import torch
from torch import nn

from hpc_train.core.errors import UserError
from hpc_train.core.paths import expanded
from hpc_train.train.models import gpt2_names
from hpc_train.train.models.gpt import Gpt
from hpc_train.train.run.attempt import Attempt, log
from hpc_train.train.run.checkpoint.retention import checkpoints
from hpc_train.train.weights_file import FromGpt2, Kind, WeightsFile, open_weights

_MOST_NAMED = 5  # tensors of a kind in a message


def begin_from(model: nn.Module, init_from: str | None, attempt: Attempt) -> None:
    """Loads `train.init_from`, unless a checkpoint is resumed. On the root, before the reducer sends its weights."""
    if init_from is not None and not (attempt.source and checkpoints(attempt.source)):
        log(f"Weights of {load_weights(model, init_from)}")


def load_weights(model: nn.Module, init_from: str) -> str:
    """Overwrites the model's parameters and buffers with those of `init_from`; returns where they came from, in words.

    Floating-point numbers are converted to the model's type. Raises UserError if tensors are missing, unexpected or of
    another shape, before it changes the model.
    """
    key = f"train.init_from = '{init_from}'"
    with open_weights(expanded(Path(init_from)), key) as found:
        weights: WeightsFile = (
            FromGpt2(found) if isinstance(model, Gpt) and gpt2_names.is_gpt2(found.names()) else found
        )
        kinds, padded = weights.names(), _padded_rows(model)
        targets = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        if faults := _faults(kinds, targets, padded):
            raise UserError(
                f"{key} is of another model:\n    " + "\n    ".join(faults),
                "Set task.model and task.options as they were there, or name weights of this model.",
            )
        for name, target in targets.items():
            with torch.no_grad():
                if kinds[name].shape == target.shape:
                    target.copy_(weights.read(name))
                else:
                    _fill_padded(target, weights.read(name))
        return weights.source


def _padded_rows(model: nn.Module) -> dict[str, int]:
    """The tensors that may have more rows than the file's, and how many rows the file's then have."""
    return {"tokens.weight": model.vocab_size} if isinstance(model, Gpt) else {}


def _fill_padded(target: torch.Tensor, rows: torch.Tensor) -> None:
    """Gives the embedding's added rows the mean of the others.

    The logit of such a token is then the mean logit, so that (Jensen's inequality) k of them beside V take at most
    k / (V + k) of the probability. Rows drawn anew would have logits near 0, where those of a trained model may all
    be near -50: the added tokens would get all of it.
    """
    target[: len(rows)].copy_(rows)
    target[len(rows) :] = rows.double().mean(0).to(target.dtype)


def _faults(kinds: dict[str, Kind], targets: dict[str, torch.Tensor], padded: dict[str, int]) -> list[str]:
    """Every tensor that does not fit, in words."""
    differing = []
    for name in kinds.keys() & targets.keys():
        (shape, dtype), target = kinds[name], targets[name]
        fitting = {tuple(target.shape), (padded.get(name, len(target) if target.ndim else 0), *target.shape[1:])}
        if shape not in fitting:
            differing.append(f"{name} is {list(shape)} there and {list(target.shape)} here")
        elif dtype != target.dtype and not (dtype.is_floating_point and target.is_floating_point()):
            differing.append(f"{name} is {dtype} there and {target.dtype} here".replace("torch.", ""))
    groups = {
        "missing": sorted(targets.keys() - kinds.keys()),
        "unexpected": sorted(kinds.keys() - targets.keys()),
        "differing": sorted(differing),
    }
    return [f"{title}: {_some(names)}" for title, names in groups.items() if names]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
