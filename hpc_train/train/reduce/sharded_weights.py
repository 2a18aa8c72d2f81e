"""Weights and optimizer state in equal parts: the rank that owns a part updates that part and no other."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from hpc_train.train.comm.context import Context
from hpc_train.train.reduce.buckets import Bucket, has_weight_decay, trainable_parameters

State = dict[str, dict[str, Any]]  # of an optimizer: a parameter's name -> what the optimizer keeps for it


class ParamShard(NamedTuple):
    """A tensor that this rank's optimizer updates: a parameter, or this rank's part of a bucket of parameters."""

    name: str
    parameter: nn.Parameter
    decays: bool


def whole_parameters(model: nn.Module) -> list[ParamShard]:
    """All parameters: what a rank owns if every rank makes every update."""
    return [ParamShard(name, each, has_weight_decay(each)) for name, each in trainable_parameters(model).items()]


class ShardedWeights:
    """The model's weights, moved into one flat tensor per bucket, each divided into `num_shards` equal parts.

    The model's parameters become views of the flat tensors, so a part that arrives is in the model at once. shard: the
    part that this rank owns; None if it owns none. buckets: the parameters of one are alike in `has_weight_decay`, and
    its message's length is a multiple of `num_shards`.
    """

    def __init__(self, model: nn.Module, buckets: list[Bucket], num_shards: int, shard: int | None) -> None:
        self._names = {parameter: name for name, parameter in trainable_parameters(model).items()}
        self._buckets, self.num_shards, self.shard = buckets, num_shards, shard
        self.flat = [_flatten(bucket, num_shards) for bucket in buckets]
        self.owned: list[ParamShard] = []
        if shard is not None:
            for bucket, flat in zip(buckets, self.flat, strict=True):
                part = nn.Parameter(self.split(flat)[shard])
                self.owned.append(ParamShard(bucket.name, part, has_weight_decay(bucket.parameters[0])))

    def split(self, message: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The parts of a bucket's message, as views."""
        return message.view(-1).chunk(self.num_shards)

    def gather(self, model: nn.Module, state: State, context: Context) -> tuple[dict[str, Any], State]:
        """Collective. On the root: the model's state, and the optimizer's by parameters, from all ranks' parts.

        Also brings the root's weights up to date. context: all ranks, with or without a part.
        """
        gathered: State = {}
        for bucket, flat in zip(self._buckets, self.flat, strict=True):
            mine: dict[str, torch.Tensor] = {}
            if self.shard is not None:
                kept = {key: torch.as_tensor(value) for key, value in state.get(bucket.name, {}).items()}
                mine = {"weights": self.split(flat)[self.shard].detach(), **kept}
            joined = gather_parts(mine, context)
            if context.world.is_root:
                flat.copy_(joined.pop("weights"))
                gathered |= self._by_parameter(bucket, joined)
        # Ranks without a part send nothing here and would run ahead. An asynchronous worker could then push its next
        # step, which the server would count as another worker's push of this step: deadlock.
        context.barrier()
        return model.state_dict(), gathered

    def load_model(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Loads a whole model's state, on every rank alone."""
        model.load_state_dict(state)

    def _by_parameter(self, bucket: Bucket, joined: dict[str, torch.Tensor]) -> State:
        state: State = {}
        for parameter, begin in _offsets(bucket):
            end = begin + parameter.numel()
            state[self._names[parameter]] = {
                key: value[begin:end].view_as(parameter) if value.ndim else value for key, value in joined.items()
            }
        return state

    def scatter(self, state: State) -> State:
        """The inverse of `gather`, on every rank alone: the state of this rank's parts."""
        if self.shard is None:
            return {}
        return {
            bucket.name: self._own_part(bucket, flat, state, self.shard)
            for bucket, flat in zip(self._buckets, self.flat, strict=True)
        }

    def _own_part(self, bucket: Bucket, flat: torch.Tensor, state: State, shard: int) -> dict[str, torch.Tensor]:
        by_parameter = [state.get(self._names[parameter], {}) for parameter in bucket.parameters]
        own: dict[str, torch.Tensor] = {}
        for key, first in by_parameter[0].items():
            if not first.ndim:
                own[key] = first  # a count of steps, the same for all parameters
                continue
            joined = torch.zeros_like(flat, dtype=first.dtype)
            for (parameter, begin), kept in zip(_offsets(bucket), by_parameter, strict=True):
                joined[begin : begin + parameter.numel()] = kept[key].view(-1)
            own[key] = self.split(joined)[shard].clone()
        return own


def _flatten(bucket: Bucket, num_shards: int) -> torch.Tensor:
    """One tensor that holds the bucket's weights and padding; the parameters become views of it."""
    num_weights = sum(parameter.numel() for parameter in bucket.parameters)
    first = bucket.parameters[0]
    flat = torch.zeros(num_weights + -num_weights % num_shards, dtype=first.dtype, device=first.device)
    for parameter, begin in _offsets(bucket):
        view = flat[begin : begin + parameter.numel()].view_as(parameter)
        view.copy_(parameter.detach())
        parameter.data = view
    return flat


def _offsets(bucket: Bucket) -> list[tuple[nn.Parameter, int]]:
    """Each parameter with its offset in the bucket's message."""
    ends = np.cumsum([parameter.numel() for parameter in bucket.parameters])
    return [(each, int(end) - each.numel()) for each, end in zip(bucket.parameters, ends, strict=True)]


def gather_parts(mine: dict[str, torch.Tensor], context: Context) -> dict[str, torch.Tensor]:
    """Collective. On the root: the parts of all ranks, joined by key; {} on the other ranks.

    mine: this rank's parts by key, {} if it owns none. A number (a count of steps) is the same in all parts.
    """
    kinds = context.gather({key: _kind(value) for key, value in mine.items()})
    if not context.world.is_root:  # both branches call `gather_arrays` for the same tensors in the same order
        for value in mine.values():
            if value.ndim:
                context.gather_arrays(value.cpu().numpy(), [])
        return {}
    joined: dict[str, torch.Tensor] = {}
    for key, first in next(kind for kind in kinds if kind).items():
        if isinstance(first, torch.Tensor):
            joined[key] = first
            continue
        _, dtype = first
        lengths = [kind[key][0] if kind else 0 for kind in kinds]
        joined[key] = torch.empty(sum(lengths), dtype=dtype)
        places = joined[key].split(lengths)
        into = [place.numpy() if kind else None for kind, place in zip(kinds, places, strict=True)]
        context.gather_arrays(mine[key].cpu().numpy() if mine else None, into)
    return joined


def _kind(value: torch.Tensor) -> Any:
    """(length, dtype) of a part; a number itself."""
    return (len(value), value.dtype) if value.ndim else value.cpu()
