"""What comes before the first step: ranks and their roles, device, task, model, and a trial of the first batch."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import zip_longest
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import nn

from hpc_train.core.errors import UserError
from hpc_train.core.formatting import amount
from hpc_train.core.key_rules import check_ranks
from hpc_train.core.sampling import BatchSampler, Shares, steps_per_epoch
from hpc_train.core.settings import Config
from hpc_train.train.comm.context import Context, warn
from hpc_train.train.comm.mesh import Mesh, open_mesh
from hpc_train.train.comm.placement import RankPlacement, crowding_warnings, place_ranks
from hpc_train.train.data.batches import Batches, StepBatch
from hpc_train.train.device import (
    autocast,
    count_flops,
    give_back_freed_memory,
    open_device,
    peak_flops,
    recompute_blocks,
)
from hpc_train.train.initial_weights import build
from hpc_train.train.memory import Division, divided_bytes, expected_peak_bytes, require_room, room_bytes
from hpc_train.train.onednn import compile_model, warn_of_channels_last
from hpc_train.train.optimize import Optimizer
from hpc_train.train.reduce.buckets import trainable_parameters
from hpc_train.train.reduce.reducer import Reducer, keeps_parts
from hpc_train.train.reduce.sharded_weights import whole_parameters
from hpc_train.train.run.peak_memory import anonymous_bytes, peak_anonymous_bytes, peak_gpu_bytes
from hpc_train.train.tasks import BUILT_IN, Task, open_task
from hpc_train.train.tasks.first_batch import check_is_sum, checked_loss
from hpc_train.train.trainable import limited


@dataclass(frozen=True)
class Job:
    """What is trained, and how the ranks divide the work."""

    config: Config
    context: Context
    mesh: Mesh
    placements: list[RankPlacement]  # of all ranks
    device: torch.device
    task: Task
    model: nn.Module
    draw: Callable[[str], torch.Tensor] | None  # if the model has the shapes of its parameters alone: their values
    batch_size: int  # of all ranks together
    facts: dict[str, Any]  # that every checkpoint records, and that must agree to resume
    autocast: Callable[[], AbstractContextManager[Any]]  # around forward passes

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.task.num_samples, self.batch_size)


@contextmanager
def open_job(config: Config, context: Context) -> Iterator[Job]:
    """Collective. Makes the task and its model on every rank; warns of ranks that share a core. Raises UserError."""
    context.on_all(partial(check_ranks, config, context.world.size))
    placements = place_ranks(context, config.train.threads)
    torch.set_num_threads(placements[context.world.rank].threads)
    for warning in crowding_warnings(placements):
        warn(context, warning)
    device = context.on_all(partial(open_device, config.train, context.world))
    with open_mesh(config.reduce, context) as mesh:
        task = _open_task(config, mesh, context)
        batch_size = _batch_size(config, task, context)
        config = _with_steps(config, task.num_samples, batch_size)
        model, draw = _make_model(task, config, mesh, device)
        facts = {
            "size": context.world.size,
            "global_batch": batch_size,
            "num_samples": task.num_samples,
            "order": str(task.order),
        }
        precision = autocast(config.train, device)
        yield Job(config, context, mesh, placements, device, task, model, draw, batch_size, facts, precision)


def _open_task(config: Config, mesh: Mesh, context: Context) -> Task:
    """Collective."""
    if mesh.peers.world.size == context.world.size:
        return open_task(config, mesh.peers)
    # Workers and servers open the task apart: an error of either must end both.
    return context.on_all(partial(open_task, config, mesh.peers))


def _batch_size(config: Config, task: Task, context: Context) -> int:
    """Collective. The global batch on this number of ranks. Raises UserError if the data are too small for it."""
    batch_size = config.global_batch(context.world.size)
    largest = int(context.max(np.array([task.num_samples]))[0])
    context.on_all(partial(_check_num_samples, config, task.num_samples, largest, context.world.rank))
    context.on_all(partial(require_a_batch, config, batch_size, task.num_samples))
    return batch_size


def _with_steps(config: Config, num_samples: int, batch_size: int) -> Config:
    """The job with as many train.steps as its train.epochs are; a part of an epoch is rounded up to whole steps."""
    epochs = config.train.epochs
    if epochs is None:
        return config
    # As Python writes it, a tenth of an epoch of 30 steps is 3 steps, which floats would make 4.
    return config.with_num_steps(ceil(Fraction(str(epochs)) * steps_per_epoch(num_samples, batch_size)))


def _check_num_samples(config: Config, num_samples: int, largest: int, rank: int) -> None:
    if num_samples != largest:
        raise UserError(
            f"task.kind = '{config.task.kind}': num_samples = {num_samples} on rank {rank}, {largest} elsewhere",
            "num_samples counts the whole data set and is the same on every rank; batch(rows) picks a rank's share.",
        )


def require_a_batch(config: Config, batch_size: int, num_samples: int) -> None:
    """Raises `UserError` if the data have fewer samples than a global batch."""
    if num_samples < 1:
        raise UserError(
            f"task.kind = '{config.task.kind}': num_samples = {num_samples}: there are no samples to train on",
            "num_samples is the number of samples in the whole training set: give the task some.",
        )
    if batch_size > num_samples:
        key = "global_batch" if config.train.global_batch else "batch_per_rank"
        raise UserError(
            f"train.{key}: a global batch of {batch_size} is larger than the data set's {num_samples} samples",
            f"Set it so that all ranks together take at most {num_samples}.",
        )


def _make_model(
    task: Task, config: Config, mesh: Mesh, device: torch.device
) -> tuple[nn.Module, Callable[[str], torch.Tensor] | None]:
    """Collective. The task's model on the device, and `Job.draw`.

    Raises UserError if ranks made different ones, whose gradients could not be summed, or if they cannot hold it.
    """
    context = mesh.ranks
    initial = context.on_all(partial(build, partial(limited, task.model, config.train), config.seed))
    mine = [(name, tuple(p.shape), str(p.dtype)) for name, p in initial.model.named_parameters()]
    roots = context.on_root(lambda: mine)
    context.on_all(partial(_check_same_model, mine, roots, context.world.rank))
    context.on_all(partial(_require_room, config, initial.model, mesh, room_bytes(context, device)))
    if not keeps_parts(config.reduce, context.world.size):
        return context.on_all(initial.materialise).to(device), None
    model = context.on_all(partial(initial.materialise, trainable_parameters(initial.model), device)).to(device)
    reasons = [why for why in context.all_gather(initial.whole_because) if why]
    if reasons:
        warn(context, f"Every rank makes the whole model before it keeps its part: {reasons[0]}")
        return context.on_all(initial.make_whole).to(device), None
    roots_digest = context.on_root(initial.digest)
    context.on_all(partial(_check_same_values, initial.digest(), roots_digest, context.world.rank))
    return model, initial.draw


def _require_room(config: Config, model: nn.Module, mesh: Mesh, available: int) -> None:
    require_room(config, model, _division(config, mesh), available)


def _division(config: Config, mesh: Mesh) -> Division:
    size = mesh.ranks.world.size
    stage = config.reduce.stage if config.reduce.strategy == "sharded" and size > 1 else 0
    return Division(stage, mesh.shard.size if stage else 1, size)


def _check_same_values(mine: str, roots: str, rank: int) -> None:
    if mine != roots:
        raise UserError(
            f"the model differs between ranks: its constructor uses other values on rank {rank} than on rank 0",
            "Random numbers of numpy or Python need a seed that is the same on every rank.",
        )


def _check_same_model(mine: list[Any], roots: list[Any], rank: int) -> None:
    for here, there in zip_longest(mine, roots):
        if here != there:
            raise UserError(
                f"the model differs between ranks: rank {rank} has {here}, rank 0 has {there}",
                "Task.model() must make the same parameters on every rank: it may depend on the configuration alone.",
            )


# ---------------------------------------------------------------------------------- once the reducer is there


def make_optimizer(job: Job, reducer: Reducer) -> Optimizer:
    """Collective. The optimizer of what this rank owns: its part of the weights, or all of them."""
    owned = reducer.shards.owned if reducer.shards else whole_parameters(job.model)
    num_shares = job.mesh.data.size
    make = partial(Optimizer, job.config.train, owned, job.batch_size, reducer.sum_over_shards, num_shares)
    return job.context.on_all(make)


def open_batches(job: Job, first_step: int) -> Batches:
    """This rank's batches from `first_step` on; empty ones on a server, which trains on nothing."""
    config, world = job.config, job.mesh.peers.world
    sampler = BatchSampler(job.task.order, job.batch_size, config.seed, Shares(world.size), world.rank)
    num_parts = config.train.accumulate if job.mesh.trains else 0
    steps, allows_fewer = range(first_step, config.train.steps), config.reduce.stage == 1
    return Batches(job.task, sampler, steps, num_parts, job.device, allows_fewer)


def prepare_model(job: Job, batches: Batches, reducer: Reducer) -> tuple[nn.Module, dict[str, Any]]:
    """Collective. The model to train, wrapped as `train.*` asks, and facts for meta.json.

    Tries the first batch: a task whose model and batches do not fit is refused here, on all ranks at once, and not by
    one rank in the loop. The trial also counts the operations of a step.
    """
    train, batch = job.config.train, batches.peek()
    if train.activation_checkpointing:  # before the trial, which may take no more memory than a step
        give_back_freed_memory()
        job.context.on_all(partial(recompute_blocks, job.model))
    if reducer.lockstep:  # an error of one rank ends the job: the others may wait for it within a pass
        num_flops = _try_batch(job, batch)
        reducer.lockstep.end_trial()
    else:
        num_flops = job.context.on_all(partial(_try_batch, job, batch))
    num_tried = -(-batch.num_samples // len(batch.parts)) if batch and batch.parts else 0
    if not reducer.lockstep and job.config.task.kind not in BUILT_IN:
        job.context.on_all(partial(_check_is_sum, job, batch, num_tried))
    model = compile_model(job.model, job.device) if train.compile else job.model
    peak, source = peak_flops(train, job.device)
    strategy = job.config.reduce.strategy
    facts = {
        "device": str(job.device) if job.device.type == "cpu" else torch.cuda.get_device_name(job.device),
        "precision": train.precision,
        "strategy": strategy,
        "num_servers": job.mesh.shard.size if strategy == "parameter_server" else 0,
        "flops_per_sample": num_flops / num_tried if num_flops and num_tried else None,
        "peak_flops": peak,
        "peak_source": source,
        **_expect_memory(job),
    }
    return model, facts


def _expect_memory(job: Job) -> dict[str, Any]:
    """Collective. Facts for meta.json; warns if a rank expects to take more memory than there is.

    expected_peak_bytes: what each rank expects to take at most; None if unknown. rank_room_bytes: what every rank may
    take. divided_bytes: what of the state of all ranks more ranks would divide further.
    """
    is_on_cpu = job.device.type == "cpu"
    taken = (anonymous_bytes() or 0) if is_on_cpu else torch.cuda.memory_reserved(job.device)
    most = taken + room_bytes(job.context, job.device)
    own, tried = None, peak_gpu_bytes(job.device) or peak_anonymous_bytes()
    if tried and job.config.reduce.strategy != "parameter_server":  # servers hold what workers do not
        own = expected_peak_bytes(job.config, job.model, _division(job.config, job.mesh), tried, most)
    expected = job.context.all_gather(own)
    most_expected, room = (int(each) for each in job.context.max(np.array([own or 0, -most])) * [1, -1])
    all_bytes = sum(each.nbytes for each in trainable_parameters(job.model).values())
    if most_expected > room:
        warn(
            job.context,
            f"a rank expects to take {amount(most_expected, 'B')}, {amount(most_expected - room, 'B')} more "
            "than there is. Smaller batches, train.accumulate or a higher reduce.stage need less: hpc-train memory.",
        )
    return {
        "expected_peak_bytes": expected,
        "rank_room_bytes": room,
        "divided_bytes": divided_bytes(job.config, all_bytes, _division(job.config, job.mesh).stage),
    }


def _check_is_sum(job: Job, batch: StepBatch | None, num: int) -> None:
    if batch is not None and num:
        with job.autocast():
            check_is_sum(job.config, job.task, job.model, batch.parts[0], num)


def _try_batch(job: Job, batch: StepBatch | None) -> int:
    """The operations of a forward and backward pass over the first part of `batch`; 0 without one."""
    if batch is None or not batch.parts:
        return 0
    loss = partial(checked_loss, job.config, job.task, job.model, batch.parts[0])
    with job.autocast(), warn_of_channels_last(job.model, partial(warn, job.context)):
        return count_flops(loss, job.model)
