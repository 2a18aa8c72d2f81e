"""The parameter server: servers hold the weights in parts and update them, workers make the gradients.

Li et al., "Scaling Distributed Machine Learning with the Parameter Server", OSDI 2014. The job's last `reduce.servers`
ranks are servers, each with its part of every bucket; the others are workers. A worker sends each part of a bucket to
the server it belongs to as soon as backward has made it, then waits for the new weights. A server moves
2 * bytes * W / S a step, and that is what a ring all-reduce, at 2 (N-1)/N * bytes a rank, does not have to.

Synchronous: a server sums what all workers send, in their order, and updates once: the losses are those of an
all-reduce. Asynchronous (`reduce.asynchronous`): it updates for each worker as its gradients come, and answers
that worker alone. Nobody waits for the slowest, gradients are of weights some updates old, and no two runs are alike.
"""

from collections.abc import Callable
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import nn

from hpc_train.core.settings import Reduce
from hpc_train.train.comm import messages
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mpi_library import mpi
from hpc_train.train.reduce.buckets import NUM_NOTES, Bucket, BucketScheduler, StepFlags, decays, make_buckets
from hpc_train.train.reduce.shards import Shards

Asked = Callable[[], tuple[bool, bool]]
_TO_WORKER = 1 << 14  # added to a bucket's number, which is the tag of what workers send


class Worker:
    """A rank that trains and owns no weights: `reduce_gradients` sends its gradients, receives the new weights."""

    num_updates = 1
    syncs_weights = False  # the new weights arrive in `reduce_gradients`

    def __init__(self, settings: Reduce, model: nn.Module, context: Context, asked: Asked) -> None:
        self._comm, self._num_workers = context.comm, settings.num_workers(context.world.size)
        self._buckets = make_buckets(model, NUM_NOTES, settings.servers, apart=decays)
        self.shards = Shards(model, self._buckets[:-1], settings.servers, None)
        self._scheduler = BucketScheduler(self._buckets, self._send, asked)
        self.begin_step = self._scheduler.begin_step
        self._leaving: list[Any] = []
        self._made = True  # whether the servers made the latest update

    def _send(self, bucket: Bucket) -> None:
        tag = self._buckets.index(bucket)
        message = bucket.fill().view(-1).cpu()
        parts = self.shards.cut(message) if bucket.parameters else [message] * self.shards.num_parts
        for server, part in enumerate(parts, self._num_workers):
            self._leaving += messages.begin_send(self._comm, part.numpy(), server, tag)

    def reduce_gradients(self) -> StepFlags:
        self._scheduler.finish()
        arriving: list[Any] = []
        received = []
        for tag, weights in enumerate(self.shards.weights, _TO_WORKER):
            host = weights.cpu()  # itself, unless it lies on a GPU
            received.append(host)
            for server, part in enumerate(self.shards.cut(host), self._num_workers):
                arriving += messages.begin_receive(self._comm, part.numpy(), server, tag)
        notes = np.empty(NUM_NOTES + 1, dtype=np.float32)
        last = _TO_WORKER + len(self._buckets) - 1
        arriving += messages.begin_receive(self._comm, notes, self._num_workers, last)
        for request in (*self._leaving, *arriving):
            request.Wait()
        self._leaving.clear()
        for weights, host in zip(self.shards.weights, received, strict=True):
            if host.data_ptr() != weights.data_ptr():
                weights.copy_(host)
        *shared, made = notes.tolist()
        self._made = bool(made)
        return StepFlags(*shared)

    def sum_owned(self, value: float) -> float:
        return value

    def sync_weights(self, made: bool) -> bool:
        return self._made


class Server:
    """A rank that trains on nothing: `reduce_gradients` receives gradients, `sync_weights` sends weights to workers.

    team: the servers.
    """

    syncs_weights = True

    def __init__(self, settings: Reduce, model: nn.Module, context: Context, team: Context, asked: Asked) -> None:
        self._comm, self._team, self._asked = context.comm, team, asked
        self._num_workers = settings.num_workers(context.world.size)
        buckets = make_buckets(model, NUM_NOTES, settings.servers, apart=decays)
        self._notes_tag = len(buckets) - 1
        self.shards = Shards(model, buckets[:-1], settings.servers, team.world.rank)
        for owned in self.shards.owned:
            owned.parameter.grad = torch.zeros_like(owned.parameter)
        self._pushes = _Pushes(self._num_workers) if settings.asynchronous else None
        self.num_updates = self._num_workers if settings.asynchronous else 1
        self._answer = StepFlags(0.0, 0.0, 0.0)
        self._answered = list(range(self._num_workers))  # whom `sync_weights` sends it to, with the weights

    def begin_step(self, loss: torch.Tensor) -> None:
        raise AssertionError("a server trains on nothing")

    def reduce_gradients(self) -> StepFlags:
        return self._any_worker(self._pushes) if self._pushes else self._all_workers()

    def _all_workers(self) -> StepFlags:
        self._take_gradients(self._answered)
        loss, stop, save = np.sum([self._take_notes(worker) for worker in self._answered], axis=0).tolist()
        self._answer = StepFlags(loss, stop + self.sum_owned(self._asked()[0]), save)
        return self._answer

    def _any_worker(self, pushes: "_Pushes") -> StepFlags:
        status = mpi().Status()
        notes = StepFlags(*self._take_notes(mpi().ANY_SOURCE, status).tolist())
        self._answered = [status.source]
        self._take_gradients(self._answered)
        self._answer = pushes.hear(status.source, notes)
        if not pushes.end_a_step:
            return StepFlags(self._answer.loss, 0.0, 0.0)
        # The servers hear the workers in different orders: the first one says for all where to stop and to save.
        everyone = self._team.all_gather((pushes.stop_at, pushes.save_at, self._asked()[0]))
        return StepFlags(self._answer.loss, *pushes.follow(*everyone[0][:2], stop=any(asked for *_, asked in everyone)))

    def _take_notes(self, worker: int, status: Any = None) -> np.ndarray:
        notes = np.empty(NUM_NOTES, dtype=np.float32)
        messages.receive(self._comm, notes, worker, tag=self._notes_tag, status=status)
        return notes

    def _take_gradients(self, workers: list[int]) -> None:
        for tag, owned in enumerate(self.shards.owned):
            gradient = owned.parameter.grad
            assert gradient is not None
            received = torch.empty_like(gradient, device="cpu")
            for worker in workers:  # always in this order: a sum depends on it, in its last bits
                messages.receive(self._comm, received.numpy(), worker, tag=tag)
                if worker == workers[0]:
                    gradient.copy_(received)
                else:
                    gradient.add_(received.to(gradient.device))

    def sum_owned(self, value: float) -> float:
        if self._pushes:  # each server hears the workers in an order of its own: no sum would be of one gradient
            return value
        return float(self._team.sum(np.array([value], dtype=np.float64))[0])

    def sync_weights(self, made: bool) -> bool:
        leaving: list[Any] = []
        parts = [owned.parameter.detach().cpu().numpy() for owned in self.shards.owned]
        notes = np.array([*self._answer, made], dtype=np.float32)
        for worker in self._answered:
            for tag, part in enumerate(parts, _TO_WORKER):
                leaving += messages.begin_send(self._comm, part, worker, tag)
            if self.shards.part == 0:
                leaving += messages.begin_send(self._comm, notes, worker, _TO_WORKER + self._notes_tag)
        for request in leaving:
            request.Wait()
        return made


class _Pushes:
    """What an asynchronous server has heard. Workers are at different steps, and still all stop after the same one."""

    def __init__(self, num_workers: int) -> None:
        self._num = [0] * num_workers  # steps heard of each worker
        self._losses: list[float | None] = [None] * num_workers
        self.stop_at: int | None = None  # step
        self.save_at: int | None = None

    @property
    def end_a_step(self) -> bool:
        """Whether so many were heard as all workers make in a step."""
        return sum(self._num) % len(self._num) == 0

    def hear(self, worker: int, notes: StepFlags) -> StepFlags:
        """The answer to a worker: the loss is the mean of all workers' latest, unless its own is no number."""
        step = self._num[worker]
        self._num[worker] += 1
        self._losses[worker] = notes.loss if isfinite(notes.loss) else None
        self._ask(bool(notes.stop), bool(notes.save))
        known = [loss for loss in self._losses if loss is not None]
        loss = sum(known) / len(known) * len(self._losses) if isfinite(notes.loss) else notes.loss
        return StepFlags(loss, step == self.stop_at, step == self.save_at)

    def follow(self, stop_at: int | None, save_at: int | None, stop: bool) -> tuple[bool, bool]:
        """Whether all stop and save after the step that ends here, by what the first server says."""
        step = sum(self._num) // len(self._num) - 1
        self._ask(stop, False)
        if self.save_at is not None and self.save_at <= step:
            self.save_at = None
        return step == stop_at, step == save_at

    def _ask(self, stop: bool, save: bool) -> None:
        # The step after the latest that any worker has been answered in: all of them will hear of it in time.
        following = max(self._num)
        if stop and self.stop_at is None:
            self.stop_at = following
        if save and self.save_at is None:
            self.save_at = following
