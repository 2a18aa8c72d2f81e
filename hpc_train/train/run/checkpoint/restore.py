"""From a run's checkpoints to a state on every rank: the newest one that is intact and fits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hpc_train.core.errors import UserError
from hpc_train.core.rundir import RunDir
from hpc_train.train.comm.context import Context
from hpc_train.train.run.checkpoint.format import read
from hpc_train.train.run.checkpoint.pieces import Blank, UnusableCheckpoint, local_pieces, map_leaves, skeleton
from hpc_train.train.run.checkpoint.retention import checkpoints


def read_newest(
    run: RunDir,
    model: nn.Module,
    log: Callable[[str], None],
    misfit: Callable[[dict[str, Any]], str | None] = lambda state: None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, manifest) of the newest intact checkpoint that fits `model`; ({}, {}) if a run has none.

    misfit: why the rest of a state does not fit, None if it does. log: receives a warning for each checkpoint that was
    skipped. Raises UserError if there are some and none can be used: starting over in silence would discard work.
    """
    refused = []
    for folder in checkpoints(run):
        try:
            state, manifest = read(folder)
            _check_fits(state, model)
            if why := misfit(state):
                raise UnusableCheckpoint(why)
        except UnusableCheckpoint as error:
            refused.append(f"{folder}: {error}")
            log(f"warning: checkpoint skipped: {refused[-1]}")
            continue
        return state, manifest
    if refused:
        raise UserError(
            f"no checkpoint of {run.path} can be used:\n    " + "\n    ".join(refused),
            "Begin another run (--resume never), or move these away to begin this one again.",
        )
    return {}, {}


def _check_fits(state: dict[str, Any], model: nn.Module) -> None:
    if not isinstance(state["model"], dict):
        raise UnusableCheckpoint("it holds no model")
    saved, expected = _kinds(state["model"]), _kinds(model.state_dict())
    for name in [*expected, *saved]:
        if expected.get(name) != saved.get(name):
            raise UnusableCheckpoint(
                f"it is of another model: {name} is {saved.get(name)} there and {expected.get(name)} here"
            )


def _kinds(entries: dict[str, Any]) -> dict[str, object]:
    """What must agree for an entry to be loaded: shape and dtype of a tensor, the type of anything else."""
    return {
        name: (tuple(entry.shape), entry.dtype) if isinstance(entry, torch.Tensor) else type(entry).__name__
        for name, entry in entries.items()
    }


def broadcast(state: dict[str, Any], context: Context) -> dict[str, Any]:
    """Collective. The root's state on every rank, over MPI: a thousand ranks that read one file would queue."""
    bones = context.on_root(lambda: skeleton(state))
    copy: dict[str, Any] = state if context.world.is_root else map_leaves(_allocated, bones)
    for piece in local_pieces(copy):
        context.broadcast_array(piece.tensor.reshape(-1).view(torch.uint8).numpy())
    return copy


def _allocated(name: str, leaf: Any) -> Any:
    return torch.empty(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, Blank) else leaf
