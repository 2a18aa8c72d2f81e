"""Weights and optimizer state in equal parts: the rank that owns a part updates that part and no other."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from hpc_train.train.reduce.buckets import Bucket, has_weight_decay, trainable_parameters

State = dict[str, dict[str, Any]]  # of an optimizer: a parameter's name -> what the optimizer keeps for it


class Segment(NamedTuple):
    """Consecutive numbers of a parameter: from place `begin` of the parameter, at `offset` of the shard they lie in."""

    parameter: str
    begin: int
    offset: int
    length: int


class ParamShard(NamedTuple):
    """A tensor that this rank's optimizer updates: a parameter, or this rank's part of a bucket of parameters.

    segments: what it holds; numbers in none of them are padding.
    """

    name: str
    parameter: nn.Parameter
    decays: bool
    segments: tuple[Segment, ...] = ()


def whole_parameters(model: nn.Module) -> list[ParamShard]:
    """All parameters: what a rank owns if every rank makes every update."""
    return [
        ParamShard(name, each, has_weight_decay(each), (Segment(name, 0, 0, each.numel()),))
        for name, each in trainable_parameters(model).items()
    ]


class ShardedWeights:
    """The model's weights, moved into one flat tensor per bucket, each divided into `num_shards` equal parts.

    The model's parameters become views of the flat tensors, so a part that arrives is in the model at once. shard: the
    part that this rank owns; None if it owns none. buckets: the parameters of one are alike in `has_weight_decay`, and
    its message's length is a multiple of `num_shards`.
    """

    def __init__(self, model: nn.Module, buckets: list[Bucket], num_shards: int, shard: int | None) -> None:
        names = {parameter: name for name, parameter in trainable_parameters(model).items()}
        self.num_shards, self.shard = num_shards, shard
        self.freed: frozenset[str] = frozenset()  # parameters that the model holds no memory for
        self.flat = [_flatten(bucket, num_shards) for bucket in buckets]
        self.owned: list[ParamShard] = []
        if shard is not None:
            for bucket, flat in zip(buckets, self.flat, strict=True):
                part = nn.Parameter(self.split(flat)[shard])
                segments = _segments(bucket, names, shard * len(part), len(part))
                self.owned.append(ParamShard(bucket.name, part, has_weight_decay(bucket.parameters[0]), segments))

    def split(self, message: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The parts of a bucket's message, as views."""
        return message.view(-1).chunk(self.num_shards)


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


def _segments(bucket: Bucket, names: dict[nn.Parameter, str], first: int, length: int) -> tuple[Segment, ...]:
    """Which numbers of its parameters lie in a bucket's places `first` to `first + length`."""
    segments = []
    for parameter, at in _offsets(bucket):
        begin, end = max(first, at), min(first + length, at + parameter.numel())
        if begin < end:
            segments.append(Segment(names[parameter], begin - at, begin - first, end - begin))
    return tuple(segments)
