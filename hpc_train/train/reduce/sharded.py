"""Optimizer state divided among the ranks (ZeRO stage 1: Rajbhandari et al., SC 2020).

Reduce-scatter gives each rank the summed gradients of its part of the weights, its optimizer updates that part, and
all-gather sends the parts to all ranks. Together they move as much as a ring all-reduce, and each rank keeps 1/N of
the optimizer's state.
"""

from functools import partial

import numpy as np
import torch
from torch import nn

from hpc_train.train.comm.context import Context
from hpc_train.train.reduce.buckets import Bucket, BucketScheduler, has_weight_decay, make_buckets
from hpc_train.train.reduce.sharded_weights import ShardedWeights
from hpc_train.train.reduce.step_flags import ControlFlags, StepFlags
from hpc_train.train.reduce.transports import Pending, Transport


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
        self._buckets = buckets = make_buckets(model, transport.size, group_by=has_weight_decay)
        self.shards = ShardedWeights(model, buckets[:-1], transport.size, context.world.rank)
        self._scheduler = BucketScheduler(buckets, self._send, control)
        self._sent: list[Pending] = []

    def begin_step(self, loss: torch.Tensor) -> None:
        self._scheduler.begin_step(loss)

    def _send(self, bucket: Bucket) -> None:
        message = bucket.fill().view(-1)
        begin = self._transport.reduce_scatter if bucket.parameters else self._transport.sum
        self._sent.append(begin(message, bucket.name))

    def reduce_gradients(self) -> StepFlags:
        self._scheduler.send_rest()
        if self._between:
            sums = [partial(self._between.sum, name=f"{bucket.name}.between") for bucket in self._buckets]
            self._sent = [begin(pending.wait()) for begin, pending in zip(sums, self._sent, strict=True)]
        *gradients, _ = [pending.wait() for pending in self._sent]  # the last are the flags
        self._sent.clear()
        for owned, gradient in zip(self.shards.owned, gradients, strict=True):
            owned.parameter.grad = gradient
        return self._scheduler.read_flags()

    def sum_over_shards(self, value: float) -> float:
        return float(self._context.sum(np.array([value]))[0])

    def sync_weights(self, made: bool) -> bool:
        parts = [self._transport.all_gather(each.parameter.detach(), each.name) for each in self.shards.owned]
        for weights, pending in zip(self.shards.flat, parts, strict=True):
            weights.copy_(pending.wait())
        return made
