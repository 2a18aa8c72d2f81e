"""The parameter server: servers hold the weights in parts and update them, workers compute the gradients.

Li et al., "Scaling Distributed Machine Learning with the Parameter Server", OSDI 2014. The job's last `reduce.servers`
ranks are servers, each with its part of every bucket; the others are workers. A worker sends each part of a bucket to
its server as soon as backward has computed it, then waits for the new weights. With W workers and S servers, a server
receives and sends 2 W/S times the bytes of the model per step; a rank of a ring all-reduce moves 2 (N-1)/N times.

Synchronous: a server sums what all workers send, in their order, and updates once: the losses are those of an
all-reduce. Asynchronous (`reduce.asynchronous`): it updates for each worker as its gradients arrive, and answers
that worker alone. No worker waits for the slowest, gradients are some updates old, and no two runs are alike.
"""

from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import nn

from hpc_train.core.settings import Reduce
from hpc_train.train.comm import messages
from hpc_train.train.comm.mesh import Mesh
from hpc_train.train.reduce.buckets import Bucket, BucketScheduler, has_weight_decay, make_buckets
from hpc_train.train.reduce.sharded_weights import ShardedWeights
from hpc_train.train.reduce.step_flags import NUM_FLAGS, ControlFlags, StepFlags

_TO_WORKER = 1 << 14  # added to a bucket's number, which is the tag of what workers send


class Worker:
    """See `reducer.Reducer`. A rank that trains and owns no weights: `reduce_gradients` receives the new weights."""

    num_updates = 1
    sends_weights = False  # the new weights arrive in `reduce_gradients`
    lockstep = None

    def __init__(self, settings: Reduce, model: nn.Module, mesh: Mesh, control: ControlFlags) -> None:
        self._comm, self._num_workers = mesh.ranks.comm, mesh.data.size
        self._buckets = make_buckets(model, mesh.shard.size, group_by=has_weight_decay)
        self.shards = ShardedWeights(model, self._buckets[:-1], mesh.shard.size, None)
        self._scheduler = BucketScheduler(self._buckets, self._send, control)
        self._sent: list[Any] = []
        self._made = True  # whether the servers made the latest update

    def begin_step(self, loss: torch.Tensor) -> None:
        self._scheduler.begin_step(loss)

    def _send(self, bucket: Bucket) -> None:
        tag = self._buckets.index(bucket)
        message = bucket.fill().view(-1).cpu()
        parts = self.shards.split(message) if bucket.parameters else [message] * self.shards.num_shards
        for server, part in enumerate(parts, self._num_workers):
            self._sent += messages.begin_send(self._comm, part.numpy(), server, tag)

    def reduce_gradients(self) -> StepFlags:
        self._scheduler.send_rest()
        flags = np.empty(NUM_FLAGS + 1, dtype=np.float32)
        hosts = [weights.cpu() for weights in self.shards.flat]  # the weights themselves unless they are on a GPU
        for request in (*self._sent, *self._receive(hosts, flags)):
            request.Wait()
        self._sent.clear()
        for weights, host in zip(self.shards.flat, hosts, strict=True):
            if host.data_ptr() != weights.data_ptr():
                weights.copy_(host)
        *summed, made = flags.tolist()
        self._made = bool(made)
        return StepFlags(*summed)

    def _receive(self, weights: list[torch.Tensor], flags: np.ndarray) -> list[Any]:
        """Requests for all servers' parts of the weights, and for the flags from the first server."""
        requests: list[Any] = []
        for tag, flat in enumerate(weights, _TO_WORKER):
            for server, part in enumerate(self.shards.split(flat), self._num_workers):
                requests += messages.begin_receive(self._comm, part.numpy(), server, tag)
        return requests + messages.begin_receive(self._comm, flags, self._num_workers, _TO_WORKER + len(weights))

    def sum_over_shards(self, value: float) -> float:
        return value

    def sync_weights(self, made: bool) -> bool:
        return self._made


class Server:
    """See `reducer.Reducer`. A rank that trains on nothing: `reduce_gradients` receives gradients, `sync_weights` sends
    the weights to the workers.
    """

    sends_weights = True
    lockstep = None

    def __init__(self, settings: Reduce, model: nn.Module, mesh: Mesh, control: ControlFlags) -> None:
        assert mesh.shard.context is not None
        self._comm, self._servers, self._control = mesh.ranks.comm, mesh.shard.context, control
        num_workers = mesh.data.size
        buckets = make_buckets(model, mesh.shard.size, group_by=has_weight_decay)
        self._flags_tag = len(buckets) - 1
        self.shards = ShardedWeights(model, buckets[:-1], mesh.shard.size, self._servers.world.rank)
        for owned in self.shards.owned:
            owned.parameter.grad = torch.zeros_like(owned.parameter)
        self._worker_steps = _WorkerSteps(num_workers) if settings.asynchronous else None
        self.num_updates = num_workers if settings.asynchronous else 1
        self._workers = list(range(num_workers))  # those that `sync_weights` answers, with `_answer` and the weights
        self._answer = StepFlags(0.0, 0.0, 0.0)

    def begin_step(self, loss: torch.Tensor) -> None:
        raise AssertionError("a server trains on nothing")

    def reduce_gradients(self) -> StepFlags:
        return self._next_worker(self._worker_steps) if self._worker_steps else self._all_workers()

    def _all_workers(self) -> StepFlags:
        self._sum_gradients(self._workers)
        flags = np.empty(NUM_FLAGS, dtype=np.float32)
        received = []
        for worker in self._workers:
            messages.receive(self._comm, flags, worker, tag=self._flags_tag)
            received.append(flags.copy())
        loss, stop, save = np.sum(received, axis=0).tolist()
        self._answer = StepFlags(loss, stop + self.sum_over_shards(self._control.stop), save)
        return self._answer

    def _next_worker(self, steps: "_WorkerSteps") -> StepFlags:
        flags = np.empty(NUM_FLAGS, dtype=np.float32)
        worker = messages.receive_from_any(self._comm, flags, self._flags_tag)
        self._workers = [worker]
        self._sum_gradients(self._workers)
        self._answer = steps.add(worker, StepFlags(*flags.tolist()))
        if not steps.is_end_of_step:
            return StepFlags(self._answer.loss, 0.0, 0.0)
        # Servers receive from the workers in different orders: the first server decides for all where to stop and save.
        everyone = self._servers.all_gather((steps.stop_at, steps.save_at, self._control.stop))
        stop_at, save_at, _ = everyone[0]
        stop, save = steps.end_step(stop_at, save_at, any(stop for *_, stop in everyone))
        return StepFlags(self._answer.loss, stop, save)

    def _sum_gradients(self, workers: list[int]) -> None:
        for tag, owned in enumerate(self.shards.owned):
            gradient = owned.parameter.grad
            assert gradient is not None
            received = torch.empty_like(gradient, device="cpu")
            for worker in workers:  # always in this order: the last bits of a sum depend on it
                messages.receive(self._comm, received.numpy(), worker, tag=tag)
                if worker == workers[0]:
                    gradient.copy_(received)
                else:
                    gradient.add_(received.to(gradient.device))

    def sum_over_shards(self, value: float) -> float:
        if self._worker_steps:  # servers serve different workers at this moment: a sum would mix two gradients
            return value
        return float(self._servers.sum(np.array([value], dtype=np.float64))[0])

    def sync_weights(self, made: bool) -> bool:
        requests: list[Any] = []
        parts = [owned.parameter.detach().cpu().numpy() for owned in self.shards.owned]
        flags = np.array([*self._answer, made], dtype=np.float32)
        for worker in self._workers:
            for tag, part in enumerate(parts, _TO_WORKER):
                requests += messages.begin_send(self._comm, part, worker, tag)
            if self.shards.shard == 0:
                requests += messages.begin_send(self._comm, flags, worker, _TO_WORKER + self._flags_tag)
        for request in requests:
            request.Wait()
        return made


class _WorkerSteps:
    """How far an asynchronous server's workers are: at different steps, and all must stop after the same one."""

    def __init__(self, num_workers: int) -> None:
        self._num_steps = [0] * num_workers  # received from each worker
        self._losses: list[float | None] = [None] * num_workers
        self.stop_at: int | None = None  # step
        self.save_at: int | None = None

    @property
    def is_end_of_step(self) -> bool:
        """Whether as many steps were received as all workers make in one step of the run."""
        return sum(self._num_steps) % len(self._num_steps) == 0

    def add(self, worker: int, flags: StepFlags) -> StepFlags:
        """The answer to a worker's step. Its loss estimates the global mean: the latest parts of all workers, added up.

        A worker without a finite part counts as the average of the others. If this worker's own part is not finite,
        the answer is that part, and the worker ends the job."""
        step = self._num_steps[worker]
        self._num_steps[worker] += 1
        self._losses[worker] = flags.loss if isfinite(flags.loss) else None
        self._request(bool(flags.stop), bool(flags.save))
        known = [loss for loss in self._losses if loss is not None]
        loss = sum(known) / len(known) * len(self._losses) if isfinite(flags.loss) else flags.loss
        return StepFlags(loss, step == self.stop_at, step == self.save_at)

    def end_step(self, stop_at: int | None, save_at: int | None, stop: bool) -> tuple[bool, bool]:
        """Whether all ranks stop, and save, after the step that ends here.

        stop_at, save_at: of the first server. stop: whether any server was asked to stop.
        """
        step = sum(self._num_steps) // len(self._num_steps) - 1
        self._request(stop, False)
        if self.save_at is not None and self.save_at <= step:
            self.save_at = None
        return step == stop_at, step == save_at

    def _request(self, stop: bool, save: bool) -> None:
        # The next step of the fastest worker. No worker has had an answer for it yet, so all can still be told.
        following = max(self._num_steps)
        if stop and self.stop_at is None:
            self.stop_at = following
        if save and self.save_at is None:
            self.save_at = following
