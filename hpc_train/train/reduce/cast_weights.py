"""A block's weights gathered in the 16 bits in which autocast uses them.

That sends half of the bytes, and ends the copies that autocast makes of FP32 weights, which autograd keeps from forward
to backward: at stage 3 they would be a whole model on each rank.
"""

from dataclasses import dataclass

import torch
from torch import nn

from hpc_train.train.reduce.block_weights import BlockWeights
from hpc_train.train.reduce.transports import Pending, Transport

# Autocast computes these in 16 bits, and casts their weights and biases. Others' weights, such as those of norms and
# embeddings, it uses in FP32.
_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class CastWeights:
    """Which of a block's weights autocast casts, and how the rest travels: a second, short message in FP32."""

    def __init__(self, model: nn.Module, block: BlockWeights, num_shards: int) -> None:
        modules = [module for module in model.modules() if type(module) in _CAST]
        cast = {id(each) for module in modules for each in module.parameters(recurse=False)}
        self._block, self.name = block, block.name
        self._rest = [name for name, parameter in block.parameters.items() if id(parameter) not in cast]
        self._spans = [{name: block.span(name, shard) for name in self._rest} for shard in range(num_shards)]
        self._length = max(sum(end - begin for begin, end in spans.values()) for spans in self._spans)
        self.saves_bytes = num_shards * self._length < block.length / 2

    def begin(self, transport: Transport, into: torch.Tensor) -> Pending:
        """Collective. Begins to gather the weights into `into`, in its type; `wait` sets the block's parameters."""
        block = self._block
        pending = transport.all_gather(block.own.to(into.dtype), f"{block.name}.cast", into)
        if not self._length:
            return _Gathering(self, pending, None, into)
        rest = block.own.new_zeros(self._length)
        torch.cat([block.segment(block.own, name) for name in self._rest], out=rest[: self._num_own])
        return _Gathering(self, pending, transport.all_gather(rest, f"{block.name}.rest"), into)

    @property
    def _num_own(self) -> int:
        return sum(end - begin for begin, end in self._spans[self._block.shard].values())

    def set(self, cast: torch.Tensor, rest: torch.Tensor | None) -> None:
        """rest: those of all ranks, in rank order, each padded to the same length."""
        block = self._block
        block.set(cast)
        places = {name: torch.empty_like(block.parameters[name], dtype=block.dtype) for name in self._rest}
        for number, spans in enumerate(self._spans):
            at = number * self._length
            for name, (begin, end) in spans.items():
                if begin < end:
                    assert rest is not None
                    places[name].view(-1)[begin:end] = rest[at : at + end - begin]
                    at += end - begin
        for name, place in places.items():
            block.parameters[name].data = place


@dataclass
class _Gathering:
    weights: CastWeights
    cast: Pending
    rest: Pending | None
    into: torch.Tensor

    def wait(self) -> torch.Tensor:
        self.cast.wait()
        self.weights.set(self.into, self.rest.wait() if self.rest else None)
        return self.into
