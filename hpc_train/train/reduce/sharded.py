"""Optimizer state divided among the ranks (ZeRO stage 1: Rajbhandari et al., SC 2020).

Reduce-scatter gives each rank the summed gradients of its part of the weights, its optimizer updates that part, and
all-gather sends the parts to all. Together they move what a ring all-reduce moves, and each rank keeps 1/N of the
optimizer's state.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from hpc_train.train.comm.context import Context
from hpc_train.train.reduce.buckets import NUM_NOTES, Bucket, BucketScheduler, StepFlags, decays, make_buckets
from hpc_train.train.reduce.shards import Shards


class Sharded:
    """transport: `reduce.Transport` of Horovod."""

    num_updates = 1
    syncs_weights = True

    def __init__(
        self, transport: Any, model: nn.Module, context: Context, asked: Callable[[], tuple[bool, bool]]
    ) -> None:
        self._transport, self._context = transport, context
        rank, size = context.world.rank, context.world.size
        buckets = make_buckets(model, NUM_NOTES, size, apart=decays)
        self.shards = Shards(model, buckets[:-1], size, rank)
        self._scheduler = BucketScheduler(buckets, self._send, asked)
        self.begin_step = self._scheduler.begin_step
        self._arriving: list[Callable[[], torch.Tensor]] = []

    def _send(self, bucket: Bucket) -> None:
        message = bucket.fill().view(-1)
        send = self._transport.reduce_scatter if bucket.parameters else self._transport.sum
        self._arriving.append(send(message, bucket.name))

    def reduce_gradients(self) -> StepFlags:
        self._scheduler.finish()
        summed = [arrival() for arrival in self._arriving]
        self._arriving.clear()
        for owned, gradient in zip(self.shards.owned, summed, strict=False):  # the last are the notes
            owned.parameter.grad = gradient
        return self._scheduler.shared()

    def sum_owned(self, value: float) -> float:
        return float(self._context.sum(np.array([value]))[0])

    def sync_weights(self, made: bool) -> bool:
        arriving = [self._transport.all_gather(each.parameter.detach(), each.name) for each in self.shards.owned]
        for weights, arrival in zip(self.shards.weights, arriving, strict=True):
            weights.copy_(arrival())
        return made
