"""From disk to a state on every rank: the newest checkpoint that is intact and fits."""

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hpc_train.core.errors import UserError
from hpc_train.core.rundir import RunDir
from hpc_train.train.comm.context import Context, joint
from hpc_train.train.run.checkpoint.reading import Index, StoredTensor, check_name, opened_state, read_index
from hpc_train.train.run.checkpoint.retention import checkpoints, step_of
from hpc_train.train.run.checkpoint.shares import UnusableCheckpoint, divide

State = dict[str, Any]


class Wanted(NamedTuple):
    """Numbers of a stored tensor, from place `begin` on, and the flat tensor of the CPU that they are read into."""

    stored: StoredTensor
    begin: int
    into: torch.Tensor


class Replicated(NamedTuple):
    """What all ranks of a context want alike: each reads a part of it and sends that to the others."""

    context: Context
    wanted: list[Wanted]


class Plan(NamedTuple):
    """What a rank reads. finish: puts it in its place."""

    replicated: list[Replicated]
    finish: Callable[[], None]


def load_newest(
    run: RunDir,
    context: Context,
    check: Callable[[State, dict[str, Any]], None],
    plan: Callable[[State], Plan],
    log: Callable[[str], None],
    step: int | None = None,
) -> dict[str, Any]:
    """Collective. Loads the newest checkpoint that is intact and fits, or the one after `step` steps; returns its
    manifest, {} if the run has none.

    check: on the root, with a state of tensors without memory and the manifest; raises `UnusableCheckpoint` to have
    the checkpoint before it, UserError to end. plan: on every rank, with a state of `StoredTensor`s; not collective.
    log: receives, on the root, a warning for each checkpoint that was skipped for an older one. Raises UserError if
    there are some and none can be used: starting over in silence would discard work.
    """
    refused: list[str] = []
    for path in context.on_root(lambda: [each for each in checkpoints(run) if step in (None, step_of(each))]):
        if refused and context.world.is_root:
            log(f"warning: checkpoint skipped: {refused[-1]}")
        index, fault = context.on_root(partial(_checked_index, path, check))
        if index is not None:
            fault = _load(index, context, plan)
            if not fault:
                return index.manifest
        refused.append(f"{path}: {fault}")
    if refused:
        raise joint(
            UserError(
                f"no checkpoint of {run.path} can be used:\n    " + "\n    ".join(refused),
                "Begin another run (--resume never), or move these away to begin this one again.",
            )
        )
    return {}


def _checked_index(path: Path, check: Callable[[State, dict[str, Any]], None]) -> tuple[Index | None, str]:
    try:
        index, state = read_index(path)
        check_name(index)
        check(state, index.manifest)
    except UnusableCheckpoint as error:
        return None, str(error)
    return index, ""


def _load(index: Index, context: Context, plan: Callable[[State], Plan]) -> str:
    """Collective. Returns why the checkpoint is damaged, or "" once all ranks have loaded it."""
    planned, fault = None, ""
    try:
        with opened_state(index) as state:
            planned = plan(state)
            for group in planned.replicated:
                for wanted in _divided(group)[group.context.world.rank]:
                    wanted.stored.read(wanted.begin, wanted.into)
    except UnusableCheckpoint as error:
        world = context.world
        fault = f"{error} (rank {world.rank} on {world.host})" if world.size > 1 else str(error)
    if faults := [each for each in context.all_gather(fault) if each]:
        return faults[0]
    assert planned is not None
    for group in planned.replicated:
        for reader, of_rank in enumerate(_divided(group)):
            for wanted in of_rank:
                group.context.broadcast_array(wanted.into.view(torch.uint8).numpy(), reader)
    context.on_all(planned.finish)
    return ""


def _divided(group: Replicated) -> list[list[Wanted]]:
    """By rank: what each reads."""
    wanted = group.wanted
    return [
        [
            Wanted(wanted[number].stored, wanted[number].begin + begin, wanted[number].into[begin:end])
            for number, begin, end in of_rank
        ]
        for of_rank in divide([each.into for each in wanted], group.context.world.size)
    ]


# ------------------------------------------------------------------------------------------------ the model


def check_fits(state: State, model: nn.Module) -> None:
    """Raises `UnusableCheckpoint` if a state is of another model."""
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


def plan_model(
    model: nn.Module, stored: dict[str, Any], without: Collection[str] = ()
) -> tuple[list[Wanted], Callable[[], None]]:
    """What to read for a model that this rank holds whole, and what puts it into the model.

    without: names of entries that it does not hold.
    """
    wanted: dict[int, Wanted] = {}
    loaded: dict[str, Any] = {}
    for name, entry in model.state_dict().items():
        if name in without:
            continue
        loaded[name] = stored[name]
        if isinstance(entry, torch.Tensor):
            loaded[name], flat = readable(entry)
            wanted[flat.data_ptr()] = Wanted(stored[name], 0, flat)  # a tied weight once
    return list(wanted.values()), partial(model.load_state_dict, loaded, strict=not without)


def readable(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of this shape to read into and its flat view: `tensor` itself unless it lies on a device or strided."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
    return tensor, tensor.view(-1)
