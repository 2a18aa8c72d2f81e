"""A block's weights in one flat tensor that is divided among the ranks, and blocks as a checkpoint sees them."""

from collections.abc import Callable, Iterable
from math import nan
from typing import NamedTuple

import torch
from torch import nn

from hpc_train.core.errors import UserError
from hpc_train.train.reduce.buckets import aligned, has_weight_decay
from hpc_train.train.reduce.sharded_weights import ParamShard, Segment

# Parameters begin, and are cut, at multiples of so many numbers: torch's fused optimizers compute the last few numbers
# of a tensor one by one, which rounds them otherwise than a vector of 16. So a cut changes no bit of an update.
ALIGNMENT = 16


class BlockWeights:
    """The parameters of one block, one behind the other and padded, in `num_shards` equal parts.

    The optimizer updates `own`, this rank's part, through `owned`: the segments of parameters that lie in it. While
    `weights` is a tensor, the parameters are views of it; else they have their shapes and no memory.

    draw: the initial value of a parameter, by name; None if the parameters have theirs.
    """

    def __init__(
        self,
        name: str,
        parameters: dict[str, nn.Parameter],
        num_shards: int,
        shard: int,
        draw: Callable[[str], torch.Tensor] | None = None,
    ) -> None:
        self.name, self.parameters, self.shard = name or "root", parameters, shard
        dtypes = {parameter.dtype for parameter in parameters.values()}
        if len(dtypes) != 1:
            raise UserError(
                f"reduce.strategy = 'sharded': the weights of {name or 'the model outside its blocks'} are of types "
                f"{', '.join(sorted(str(each) for each in dtypes))}",
                "Make them all float32, or use reduce.stage = 1.",
            )
        self.begins: dict[str, int] = {}
        end = 0
        for each, parameter in parameters.items():
            self.begins[each] = end
            end += aligned(parameter.numel(), ALIGNMENT)
        self.length = aligned(end, num_shards * ALIGNMENT)
        self.part_length = self.length // num_shards
        first = next(iter(parameters.values()))
        self.dtype, self.device = first.dtype, first.device
        self.weights: torch.Tensor | None = None
        self.own = torch.zeros(self.part_length, dtype=self.dtype, device=self.device)
        self.gradient = torch.zeros_like(self.own)
        for each, parameter in parameters.items():
            begin, end = self.span(each)
            if begin < end:  # one whole tensor at a time, and only those of which this rank has a part
                value = draw(each) if draw else parameter.detach()
                self.segment(self.own, each).copy_(value.reshape(-1)[begin:end])
        self.has_gradient = False
        self.owned = [
            ParamShard(
                each,
                nn.Parameter(self.segment(self.own, each)),
                has_weight_decay(parameter),
                (Segment(each, self.span(each)[0], 0, len(self.segment(self.own, each))),),
            )
            for each, parameter in parameters.items()
            if len(self.segment(self.own, each))
        ]
        self._unset = torch.full((), nan, dtype=self.dtype, device=self.device)
        self.unset()

    def new_whole(self) -> torch.Tensor:
        """Memory for the weights of the block."""
        return torch.empty(self.length, dtype=self.dtype, device=self.device)

    def give_gradients(self) -> None:
        """Gives the optimizer this rank's part of `gradient`, which holds the sum over ranks."""
        for owned in self.owned:
            owned.parameter.grad = self.segment(self.gradient, owned.name)

    def keep(self, whole: torch.Tensor) -> None:
        """Makes `whole`, which holds the block's weights, their memory for good; `own` becomes a part of it."""
        self.set(whole)
        part = self._part(whole).copy_(self.own)
        self.own = part
        for owned in self.owned:
            owned.parameter.data = self.segment(part, owned.name)

    def set(self, weights: torch.Tensor) -> None:
        """Makes the parameters views of `weights`."""
        self.weights = weights
        for name, parameter in self.parameters.items():
            parameter.data = self.view(weights, name)

    def unset(self) -> None:
        """Leaves the parameters their shapes and no memory. Who reads one of them reads NaN."""
        self.weights = None
        for parameter in self.parameters.values():
            parameter.data = self._unset.expand(parameter.shape)

    def _part(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[self.shard * self.part_length :][: self.part_length]

    def view(self, whole: torch.Tensor, name: str) -> torch.Tensor:
        """A parameter's place in a flat tensor of this block."""
        parameter, begin = self.parameters[name], self.begins[name]
        return whole[begin : begin + parameter.numel()].view(parameter.shape)

    def span(self, name: str, shard: int | None = None) -> tuple[int, int]:
        """Which of a parameter's numbers lie in a part: (begin, end), equal if none do. shard: default this rank's."""
        part = self.shard if shard is None else shard
        begin, num = part * self.part_length - self.begins[name], self.parameters[name].numel()
        return min(max(0, begin), num), max(0, min(num, begin + self.part_length))

    def segment(self, part: torch.Tensor, name: str) -> torch.Tensor:
        """A parameter's numbers in a tensor of the length of `own`; empty if none lie in it."""
        begin, end = self.span(name)
        offset = self.begins[name] - self.shard * self.part_length
        return part[begin + offset : end + offset] if begin < end else part[:0]

    def fill(self, message: torch.Tensor) -> torch.Tensor:
        """Moves the parameters' gradients into `message`; zeros for parameters that this rank did not use.

        What lies between them stays as it is: nobody reads it.
        """
        for name, parameter in self.parameters.items():
            place = self.view(message, name)
            place.zero_() if parameter.grad is None else place.copy_(parameter.grad)
            parameter.grad = None
        return message


class BlockShards:
    """All blocks' weights and optimizer state, as checkpoints ask for them. See `sharded_weights.ShardedWeights`."""

    def __init__(self, blocks: Iterable[BlockWeights]) -> None:
        self.blocks = list(blocks)

    @property
    def owned(self) -> list[ParamShard]:
        return [owned for block in self.blocks for owned in block.owned]

    @property
    def divided(self) -> list[BlockWeights]:
        """Between two steps: the blocks of which a rank holds nothing but its part."""
        return [block for block in self.blocks if block.weights is None]

    @property
    def freed(self) -> frozenset[str]:
        """Their parameters, which the model holds no memory for."""
        return frozenset(name for block in self.divided for name in block.parameters)


class Flat(NamedTuple):
    """So much as `Buffers` must know of a block, here of one on a device without memory."""

    length: int
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("meta")


class Buffers:
    """Memory that is used again and again: fresh memory of this size takes as long to be mapped as to be filled."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Of what is free."""
        return sum(each.nbytes for each in self._free)

    def take(self, block: BlockWeights | Flat, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor of the length of the block's weights. dtype: default theirs."""
        dtype = dtype or block.dtype
        alike = [each for each in self._free if each.dtype == dtype]
        fitting = [each for each in alike if len(each) >= block.length]
        if fitting:
            chosen = min(fitting, key=len)
        else:
            # A buffer that is too small gives way, so that there are never more than are used at a time.
            chosen = torch.empty(block.length, dtype=dtype, device=block.device)
            if alike:
                self._remove(max(alike, key=len))
            return chosen
        self._remove(chosen)
        return chosen[: block.length]

    def give(self, buffer: torch.Tensor) -> None:
        """Returns what `take` gave."""
        whole = buffer if buffer._base is None else buffer._base
        self._free.append(whole)

    def _remove(self, buffer: torch.Tensor) -> None:
        self._free = [each for each in self._free if each is not buffer]
