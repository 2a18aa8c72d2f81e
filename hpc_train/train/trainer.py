"""Training, top to bottom: one loop, visible."""

import sys
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import nn

from hpc_train.config import Config, Loaded
from hpc_train.errors import UserError
from hpc_train.partition import rank_batches
from hpc_train.train.context import Context
from hpc_train.train.metadata import crowding_warnings, place_ranks
from hpc_train.train.recorder import Recorder
from hpc_train.train.reduce import open_reducer
from hpc_train.train.tasks import Task, open_task


def train(loaded: Loaded, context: Context) -> None:
    """Collective. Trains as configured, tests, and leaves a run directory."""
    config, world = loaded.config, context.world
    places = place_ranks(context, config.train.threads)
    torch.set_num_threads(places[world.rank].threads)
    if world.is_root:
        for warning in crowding_warnings(places):
            print(warning, file=sys.stderr, flush=True)

    task = open_task(config, context)
    batch_size = _batch_size(config, task, context)
    torch.manual_seed(config.seed)
    model = _model(task, context)
    optimizer = _optimizer(config, model)

    with open_reducer(config.reduce, model, context) as reducer, Recorder(loaded, context, places) as recorder:
        clock = recorder.clock
        recorder.start(batch_size, task.num_samples, model)
        batches = _batches(task, config, context, batch_size)

        for step in range(config.train.steps):
            with clock.data:
                batch, num_samples, num_global = next(batches)
            with clock.forward:
                loss = task.loss(model, batch) / num_global  # a share of the global mean: shares may differ in size
            with clock.backward:
                loss.backward()  # the reducer overlaps its sends with this
            with clock.reduce:
                reducer.wait()  # exposed communication only
            with clock.optimizer:
                optimizer.step()
                optimizer.zero_grad()
            recorder.end_step(step, loss, num_samples, num_global)

        recorder.stop()
        recorder.finish(_test_accuracy(task, model, context))


def _batches(task: Task, config: Config, context: Context, batch_size: int) -> Iterator[tuple[Any, int, int]]:
    """(this rank's share, its samples, the global batch's samples) of step 0, 1, 2, ..."""
    world = context.world
    steps = range(config.train.steps)
    for rows, num_global in rank_batches(steps, task.num_samples, batch_size, config.seed, world.rank, world.size):
        yield task.batch(rows), len(rows), num_global


def _batch_size(config: Config, task: Task, context: Context) -> int:
    """Collective. The global batch on this many ranks. Raises UserError where a rank or the data would run dry."""
    world, size, num_samples = context.world, context.world.size, task.num_samples
    batch_size = config.train.batch_size(size)
    most = int(context.max(np.array([num_samples]))[0])

    def check() -> None:
        if num_samples != most:
            raise UserError(
                f"task.kind = '{config.task.kind}': num_samples = {num_samples} on rank {world.rank}, {most} elsewhere",
                "num_samples counts the whole data set and is alike on every rank; batch(rows) picks a rank's share.",
            )
        if batch_size < size:
            raise UserError(
                f"train.global_batch = {batch_size} is smaller than the {size} ranks: some would have nothing to do",
                f"Set train.global_batch to {size} or more, or start fewer ranks.",
            )
        if batch_size > num_samples:
            key = "global_batch" if config.train.global_batch else "batch_per_rank"
            raise UserError(
                f"train.{key}: a global batch of {batch_size} is larger than the data set's {num_samples} samples",
                f"Set it so that all ranks together take at most {num_samples}.",
            )

    context.on_all(check)
    return batch_size


def _model(task: Task, context: Context) -> nn.Module:
    """Collective. The task's model; refused where ranks made different ones, whose gradients could not be summed."""
    model = context.on_all(task.model)
    mine = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    roots = context.on_root(lambda: mine)

    def check() -> None:
        if mine != roots:
            ours, other = next(pair for pair in zip_longest(mine, roots) if pair[0] != pair[1])
            raise UserError(
                f"the model differs between ranks: rank {context.world.rank} has {ours}, rank 0 has {other}",
                "Task.model() must make the same parameters on every rank: it may depend on the configuration alone.",
            )

    context.on_all(check)
    return model


def _optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    train = config.train
    if train.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=train.lr, weight_decay=train.weight_decay)
    return torch.optim.SGD(model.parameters(), lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)


def _test_accuracy(task: Task, model: nn.Module, context: Context) -> float | None:
    """Collective. The share of test samples answered rightly, each counted once; None without test samples."""
    counts = np.zeros(2, dtype=np.int64)
    model.eval()
    with torch.no_grad():
        for batch in task.test_batches(context.world):
            counts += task.num_correct(model, batch)
    correct, total = context.sum(counts)
    return int(correct) / int(total) if total else None
