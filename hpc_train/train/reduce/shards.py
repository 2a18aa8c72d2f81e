"""Weights and optimizer state in parts: each rank that owns a part updates that part, and no other."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from hpc_train.train.comm.context import Context
from hpc_train.train.reduce.buckets import Bucket, decays, trainable

State = dict[str, dict[str, Any]]  # of an optimizer: parameter's name -> what the optimizer keeps of it


class ParamShard(NamedTuple):
    """A tensor that this rank's optimizer updates: a parameter, or this rank's part of a bucket of them."""

    name: str
    parameter: nn.Parameter
    decays: bool


def whole(model: nn.Module) -> list[ParamShard]:
    """All parameters: what a rank owns where every rank makes every update."""
    return [ParamShard(name, parameter, decays(parameter)) for name, parameter in trainable(model).items()]


class Shards:
    """The model's weights, moved into one tensor a bucket, each cut into `num_parts` equal parts; `part` is owned here.

    The model's parameters become views of these tensors, so a part that arrives is in the model at once. buckets:
    their parameters are alike in `decays`, and their messages divisible by `num_parts`.
    """

    def __init__(self, model: nn.Module, buckets: list[Bucket], num_parts: int, part: int | None) -> None:
        self._names = {parameter: name for name, parameter in trainable(model).items()}
        self._buckets, self.num_parts, self.part = buckets, num_parts, part
        self.weights = [_moved(bucket, num_parts) for bucket in buckets]
        self.owned: list[ParamShard] = []
        if part is not None:
            for bucket, flat in zip(buckets, self.weights, strict=True):
                self.owned.append(
                    ParamShard(bucket.name, nn.Parameter(self.cut(flat)[part]), decays(bucket.parameters[0]))
                )

    def cut(self, message: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The parts of a bucket's message, as views."""
        return message.view(-1).chunk(self.num_parts)

    def gather(self, state: State, context: Context) -> State:
        """Collective. On the root the state by parameters, of the states by parts; the model's weights, too."""
        gathered: State = {}
        for bucket, flat in zip(self._buckets, self.weights, strict=True):
            mine: dict[str, torch.Tensor] = {}
            if self.part is not None:
                kept = {key: torch.as_tensor(value) for key, value in state.get(bucket.name, {}).items()}
                mine = {"": self.cut(flat)[self.part].detach(), **kept}
            joined = _joined(mine, context)
            if not context.world.is_root:
                continue
            flat.copy_(joined.pop(""))
            for parameter, begin in _places(bucket):
                gathered[self._names[parameter]] = {
                    key: value[begin : begin + parameter.numel()].view_as(parameter) if value.ndim else value
                    for key, value in joined.items()
                }
        # Ranks that send nothing would not wait. An asynchronous worker would push its next step, the server would take
        # that for another worker's push of this step and wait here, and that worker would wait for its answer.
        context.barrier()
        return gathered

    def scatter(self, state: State) -> State:
        """The state of this rank's parts, of the state by parameters; the opposite of `gather`."""
        scattered: State = {}
        if self.part is None:
            return scattered
        for bucket, flat in zip(self._buckets, self.weights, strict=True):
            of_parameters = [state.get(self._names[parameter], {}) for parameter in bucket.parameters]
            mine = scattered[bucket.name] = {}
            for key, value in of_parameters[0].items():
                if not value.ndim:
                    mine[key] = value
                    continue
                message = torch.zeros_like(flat, dtype=value.dtype)
                for (parameter, begin), each in zip(_places(bucket), of_parameters, strict=True):
                    message[begin : begin + parameter.numel()] = each[key].view(-1)
                mine[key] = self.cut(message)[self.part].clone()
        return scattered


def _moved(bucket: Bucket, num_parts: int) -> torch.Tensor:
    """One tensor that holds the bucket's weights, with the parameters as views of it."""
    num_weights = sum(parameter.numel() for parameter in bucket.parameters)
    first = bucket.parameters[0]
    flat = torch.zeros(num_weights + -num_weights % num_parts, dtype=first.dtype, device=first.device)
    for parameter, begin in _places(bucket):
        place = flat[begin : begin + parameter.numel()].view_as(parameter)
        place.copy_(parameter.detach())
        parameter.data = place
    return flat


def _places(bucket: Bucket) -> list[tuple[nn.Parameter, int]]:
    """Each parameter with where it begins in the bucket's message."""
    ends = np.cumsum([parameter.numel() for parameter in bucket.parameters])
    return [(each, int(end) - each.numel()) for each, end in zip(bucket.parameters, ends, strict=True)]


def _joined(mine: dict[str, torch.Tensor], context: Context) -> dict[str, torch.Tensor]:
    """Collective. On the root the tensors of all parts, joined by key; {} elsewhere. mine: {} where no part is owned.

    A number (a count of steps) is the same in all parts.
    """
    described: dict[str, Any] = {
        key: (len(value), value.dtype) if value.ndim else value.cpu() for key, value in mine.items()
    }
    everyone = context.gather(described)  # by rank; [] but on the root
    joined: dict[str, torch.Tensor] = {}
    for key in next((each for each in everyone if each), described):
        own = mine[key].cpu().numpy() if key in mine and mine[key].ndim else None
        kinds = [each.get(key) for each in everyone]
        known = [kind for kind in kinds if kind is not None]
        places: list[np.ndarray | None] = []
        if known and not isinstance(known[0], tuple):
            joined[key] = known[0]
            continue
        if known:
            joined[key] = torch.empty(sum(length for length, _ in known), dtype=known[0][1])
            rest = iter(joined[key].split([length for length, _ in known]))
            places = [None if kind is None else next(rest).numpy() for kind in kinds]
        context.gather_arrays(own, places)
    return joined
