"""Optimizer state divided among the ranks (ZeRO stage 1: Rajbhandari et al., SC 2020).

Reduce-scatter gives each rank the summed gradients of its part of the weights, its optimizer updates that part, and
all-gather sends the parts to all ranks. Together they move as much as a ring all-reduce, and each rank keeps 1/N of
the optimizer's state.
"""

import numpy as np
import torch
from torch import nn

from hpc_train.train.comm.context import Context
from hpc_train.train.reduce.block_weights import ALIGNMENT, BlockShards, BlockWeights
from hpc_train.train.reduce.buckets import Bucket, BucketScheduler, make_buckets, trainable_parameters
from hpc_train.train.reduce.step_flags import ControlFlags, StepFlags
from hpc_train.train.reduce.transports import Pending, Transport, arriving_in


class Sharded:
    """See `reducer.Reducer`. context: the ranks of the mesh's axis `shard`, which the transport joins, too.

    between: joins the ranks that own the same part in other copies; None if there is one copy.
    """

    num_updates = 1
    sends_weights = True
    lockstep = None

    def __init__(
        self, transport: Transport, between: Transport | None, model: nn.Module, context: Context, control: ControlFlags
    ) -> None:
        self._transport, self._between, self._context = transport, between, context
        *buckets, flags = make_buckets(model, transport.size * ALIGNMENT, alignment=ALIGNMENT)
        names = {parameter: name for name, parameter in trainable_parameters(model).items()}
        self._blocks: dict[str, BlockWeights] = {}
        for bucket in buckets:
            parameters = {names[each]: each for each in bucket.parameters}
            values = {name: parameter.detach() for name, parameter in parameters.items()}
            block = BlockWeights(bucket.name, parameters, transport.size, context.world.rank)
            whole = block.new_whole()
            for name, value in values.items():
                block.view(whole, name).copy_(value)
            block.keep(whole)
            self._blocks[bucket.name] = block
        self.shards = BlockShards(self._blocks.values())
        self._scheduler = BucketScheduler([*buckets, flags], self._send, control)
        self._sent: list[tuple[str, Pending]] = []

    def begin_step(self, loss: torch.Tensor) -> None:
        self._scheduler.begin_step(loss)

    def _send(self, bucket: Bucket) -> None:
        message, block = bucket.fill().view(-1), self._blocks.get(bucket.name)
        if block is None:
            pending = arriving_in(self._transport.sum(message, bucket.name), message)  # the flags
        else:
            pending = self._transport.reduce_scatter(message, bucket.name, block.gradient)
        self._sent.append((bucket.name, pending))

    def reduce_gradients(self) -> StepFlags:
        self._scheduler.send_rest()
        if self._between:
            self._sent = [self._sum_between(name, pending.wait()) for name, pending in self._sent]
        for _, pending in self._sent:
            pending.wait()
        self._sent.clear()
        for block in self.shards.blocks:
            block.give_gradients()
        return self._scheduler.read_flags()

    def _sum_between(self, name: str, part: torch.Tensor) -> tuple[str, Pending]:
        """Begins to sum a part over the copies."""
        assert self._between is not None
        return name, arriving_in(self._between.sum(part, f"{name}.between"), part)

    def sum_over_shards(self, value: float) -> float:
        return float(self._context.sum(np.array([value]))[0])

    def sync_weights(self, made: bool) -> bool:
        # Copies are sent, since MPI must not read where it writes.
        sent = [
            self._transport.all_gather(block.own.clone(), f"{block.name}.weights", block.weights)
            for block in self.shards.blocks
        ]
        for pending in sent:
            pending.wait()
        return made
