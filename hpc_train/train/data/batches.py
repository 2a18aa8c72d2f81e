"""A rank's batches, step by step: rows by the sampler, read by the task, prefetched if it helps, on the device."""

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch

from hpc_train.core.sampling import BatchSampler, RankBatch
from hpc_train.train.data.device_queue import DeviceQueue
from hpc_train.train.data.prefetch import Prefetch


class Source(Protocol):
    """The members of a `Task` that make batches."""

    in_step: bool

    def batch(self, rows: np.ndarray, step: int) -> Any: ...

    def prefetch(self, rows: np.ndarray) -> None: ...


class StepBatch(NamedTuple):
    """A rank's share of a global batch."""

    parts: list[Any]  # made by `Task.batch`: gradients accumulate over them; empty on a parameter server
    num_samples: int  # of this rank
    num_global: int  # of all ranks


class Batches:
    """Iterates over a rank's batches of `steps`, on `device`.

    num_parts: into how many parts a share is split (train.accumulate); 0 on a parameter server, which does not train.
    allows_fewer: a share of fewer samples than parts has a part for each; else some of its parts are empty.
    Unless the task is `in_step`, batches are made ahead: by a thread if the loop would wait for them, and one more for
    a GPU, which is copied to while the loop computes.
    """

    _prefetch: Prefetch[StepBatch] | None = None

    def __init__(
        self,
        task: Source,
        sampler: BatchSampler,
        steps: range,
        num_parts: int,
        device: torch.device,
        allows_fewer: bool = True,
    ) -> None:
        reader = ShareReader(task, sampler, steps, num_parts, allows_fewer)
        if not task.in_step:
            self._prefetch = Prefetch(reader)
        self._source: Iterator[StepBatch] = self._prefetch or reader
        self._on_device = DeviceQueue[StepBatch](device)
        self._num_ahead = 1 if device.type != "cpu" and not task.in_step else 0
        self._next: StepBatch | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StepBatch:
        batch = self.peek()
        self._next = None
        if batch is None:
            raise StopIteration
        return batch

    def peek(self) -> StepBatch | None:
        """The batch that `next` will return; None after the last step."""
        if self._next is None:
            while len(self._on_device) <= self._num_ahead and (batch := next(self._source, None)) is not None:
                self._on_device.send(batch)
            self._next = self._on_device.receive() if len(self._on_device) else None
        return self._next

    def close(self) -> None:
        """Ends the thread that makes batches ahead."""
        if self._prefetch is not None:
            self._prefetch.close()

    def __del__(self) -> None:
        # The loop does not close after an exception: a read that hangs would delay the end of the job. In a process
        # that lives on, as under pytest, the thread ends here.
        self.close()


class ShareReader:
    """Reads a rank's share of each step by `Task.batch`; rows in chunks are announced early, by `Task.prefetch`."""

    def __init__(
        self, task: Source, sampler: BatchSampler, steps: range, num_parts: int, allows_fewer: bool = True
    ) -> None:
        self._task, self._num_parts, self._allows_fewer = task, num_parts, allows_fewer
        self._steps, self._shares = iter(steps), sampler.batches(steps)
        has_chunks = sampler.order.chunk_edges is not None and num_parts > 0
        self._num_ahead = sampler.order.steps_ahead(sampler.batch_size) if has_chunks else 0
        self._coming: deque[RankBatch] = deque()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StepBatch:
        rows, num_global = self._next_share()
        step = next(self._steps)
        if self._num_parts == 0:
            return StepBatch([], 0, num_global)
        num_parts = min(self._num_parts, max(1, len(rows))) if self._allows_fewer else self._num_parts
        parts = np.array_split(rows, num_parts)
        return StepBatch([self._task.batch(part, step) for part in parts], len(rows), num_global)

    def _next_share(self) -> RankBatch:
        while len(self._coming) <= self._num_ahead and (share := next(self._shares, None)) is not None:
            if self._num_ahead:
                self._task.prefetch(share.rows)
            self._coming.append(share)
        if not self._coming:
            raise StopIteration
        return self._coming.popleft()
