"""All-reduce: every rank receives the sum of every gradient and makes every update."""

from dataclasses import dataclass

import torch
from torch import nn

from hpc_train.core.settings import Reduce
from hpc_train.train.reduce.buckets import Bucket, BucketScheduler, make_buckets
from hpc_train.train.reduce.compression import compress, decompress
from hpc_train.train.reduce.step_flags import ControlFlags, StepFlags
from hpc_train.train.reduce.transports import Pending, Transport

_DTYPES = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class AllReduce:
    """See `reducer.Reducer`. The transport joins the ranks of the mesh's axis `replica`.

    With `reduce.compression`, gradients travel in 16 bits and are summed in 32: each rank receives its part of all
    ranks' gradients (all-to-all), sums them, and sends the sum to all (all-gather). That moves as much as a ring.
    """

    num_updates = 1
    sends_weights = False
    shards = None
    lockstep = None

    def __init__(self, transport: Transport, settings: Reduce, model: nn.Module, control: ControlFlags) -> None:
        self._transport, self._adasum = transport, settings.adasum
        self._dtype = _DTYPES[settings.compression]
        # Adasum combines gradients layer by layer, and flags must be summed: each is a message of its own.
        group_by = id if settings.adasum else None
        self._buckets = make_buckets(model, transport.size if self._dtype else 1, group_by)
        self._scheduler = BucketScheduler(self._buckets, self._send, control)
        self._sent: list[tuple[Bucket, torch.Tensor, Pending]] = []

    def begin_step(self, loss: torch.Tensor) -> None:
        self._scheduler.begin_step(loss)

    def _send(self, bucket: Bucket) -> None:
        message = bucket.fill().view(-1)
        if bucket.parameters and self._dtype:
            parts = compress(message.view(self._transport.size, -1), self._dtype)
            pending = self._transport.all_to_all(parts.view(-1), bucket.name)
        elif bucket.parameters and self._adasum:
            # Adasum expects each rank's own mean gradient, not its share of the global one.
            pending = self._transport.adasum(message.mul_(self._transport.size), bucket.name)
        else:
            pending = self._transport.sum(message, bucket.name, is_last=bucket is self._buckets[-1])
        self._sent.append((bucket, message, pending))

    def reduce_gradients(self) -> StepFlags:
        self._scheduler.send_rest()
        if self._dtype:
            self._sent = [(bucket, message, self._sum_part(bucket, parts)) for bucket, message, parts in self._sent]
        for _, message, pending in self._sent:
            result = pending.wait()
            if result.data_ptr() != message.data_ptr():
                message.copy_(result)  # the gradients are views of the message
        self._sent.clear()
        return self._scheduler.read_flags()

    def _sum_part(self, bucket: Bucket, parts: Pending) -> Pending:
        """Sums the parts that arrived here, and begins to send the sum to all ranks."""
        if not bucket.parameters or self._dtype is None:
            return parts
        total = decompress(parts.wait().view(self._transport.size, -1)).sum(0)
        gathered = self._transport.all_gather(compress(total[None], self._dtype).view(-1), bucket.name)
        return _Decompressed(gathered, self._transport.size)

    def sum_over_shards(self, value: float) -> float:
        return value

    def sync_weights(self, made: bool) -> bool:
        return made


@dataclass
class _Decompressed:
    compressed: Pending
    num_rows: int

    def wait(self) -> torch.Tensor:
        return decompress(self.compressed.wait().view(self.num_rows, -1)).view(-1)
