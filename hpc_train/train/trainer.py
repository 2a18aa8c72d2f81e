"""Training, top to bottom: one loop, visible."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import nn

from hpc_train.config import Config, Loaded
from hpc_train.errors import UserError
from hpc_train.partition import noise_seed, rank_batches
from hpc_train.train.attempt import Attempt, check_continues, open_attempt, say
from hpc_train.train.checkpoint import Saver, read_newest, restore
from hpc_train.train.context import Context
from hpc_train.train.guards import compare_weights, refuse_loss
from hpc_train.train.metadata import RankPlace, crowding_warnings, place_ranks
from hpc_train.train.recorder import Recorder
from hpc_train.train.reduce import open_reducer
from hpc_train.train.stop import CONTINUE, TERMINATED, StopRequest
from hpc_train.train.tasks import Task, open_task
from hpc_train.train.watch import open_watch
from hpc_train.world import World


@dataclass(frozen=True)
class Job:
    """What is trained, alike on every rank."""

    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch_size: int  # of all ranks together
    places: list[RankPlace]


def train(loaded: Loaded, context: Context, resume: str = "never") -> int:
    """Collective. Trains as configured, tests, and leaves a run directory. Returns the exit code of the process.

    resume: see `open_attempt`. The code is 0 at the end of the run, and `CONTINUE` after a stop on request.
    """
    config, is_root = loaded.config, context.world.is_root
    job = _set_up(config, context)
    model, optimizer = job.model, job.optimizer
    facts = {"size": context.world.size, "global_batch": job.batch_size, "num_samples": job.task.num_samples}
    with open_attempt(loaded, context, resume) as attempt:
        recorder = Recorder(loaded, context, job.places, attempt)
        saver = Saver(attempt.run, config.checkpoint, facts, is_root, recorder.say)
        first = _restore(attempt, facts, job, context)
        if first >= config.train.steps and context.on_root(attempt.run.summary.exists):
            context.on_root(lambda: print(f"{attempt.run.path} is complete: {first} steps", flush=True))
            return 0
        with (
            recorder,
            saver,
            StopRequest() as stop,
            open_reducer(config.reduce, model, context) as reducer,
            open_watch(context, config.run.stall_s, recorder.say) as watch,
        ):
            clock = recorder.clock
            stopped = False
            recorder.start(first, model, facts)
            batches = _batches(job, config, first, context.world)

            for step in range(first, config.train.steps):
                watch.step = step
                with clock.data:
                    batch, num_samples, num_global = next(batches)
                with clock.forward:
                    loss = job.task.loss(model, batch) / num_global  # a share of the global mean: shares may differ
                with clock.backward:
                    reducer.share(loss, bool(stop), saver.is_time)
                    loss.backward()  # the reducer overlaps its sends with this
                with clock.reduce:
                    shared = reducer.wait()  # exposed communication only
                with clock.optimizer:
                    if isfinite(shared.loss):
                        optimizer.step()
                    else:
                        _answer_nonfinite(step, loss, shared.loss, config, saver, job, context)
                    optimizer.zero_grad()
                recorder.end_step(step, shared.loss, num_samples, num_global)
                if config.train.check_weights_every and (step + 1) % config.train.check_weights_every == 0:
                    compare_weights(step + 1, model, context)
                if shared.save or saver.is_step(step + 1):
                    recorder.flush()
                    saver.save(step + 1, model, optimizer)
                if stopped := shared.stop > 0 and step + 1 < config.train.steps:
                    break

            watch.step = None
            return _end(stop.cause if stopped else None, recorder, saver, job, context)


def _set_up(config: Config, context: Context) -> Job:
    """Collective. Task, model and optimizer; warns where ranks are crowded."""
    places = place_ranks(context, config.train.threads)
    torch.set_num_threads(places[context.world.rank].threads)
    if context.world.is_root:
        for warning in crowding_warnings(places):
            print(warning, file=sys.stderr, flush=True)
    task = open_task(config, context)
    batch_size = _batch_size(config, task, context)
    torch.manual_seed(config.seed)
    model = _model(task, context)
    return Job(task, model, _optimizer(config, model), batch_size, places)


def _restore(attempt: Attempt, facts: dict[str, Any], job: Job, context: Context) -> int:
    """Collective. Loads the newest good checkpoint of the run that is continued, if any; the step to go on with."""
    state: dict[str, Any] = {}
    source = attempt.source

    def find() -> int:
        if source is None:
            return 0
        found, stated = read_newest(source, job.model, say)
        if found:
            check_continues(stated, facts, source)
            say(f"Continuing at step {stated['step']} of {source.path}")
            state.update(found)
        return int(stated.get("step", 0))

    first = context.on_root(find)
    if first:
        restore(state, job.model, job.optimizer, context)
    return first


def _answer_nonfinite(
    step: int, loss: torch.Tensor, total: float, config: Config, saver: Saver, job: Job, context: Context
) -> None:
    """Collective. Every rank knows that the global loss is no number: leaves the update out, or saves and raises."""
    if config.train.on_nonfinite == "skip":
        context.on_root(lambda: saver.say(f"Step {step}: the loss is {total}, its update is left out"))
        return
    saved = context.on_root(lambda: saver.save_now(step, job.model, job.optimizer))
    refuse_loss(step, loss, total, saved, context)


def _end(cause: str | None, recorder: Recorder, saver: Saver, job: Job, context: Context) -> int:
    """Collective. Saves the last state; then tests and sums up, unless the loop was stopped by `cause`."""
    recorder.flush()
    saved = context.on_root(lambda: saver.save_now(recorder.num_steps_done, job.model, job.optimizer))
    recorder.stop("complete" if cause is None else f"stopped by {cause}")
    if cause is None:
        recorder.finish(_test(job, context))
        return 0
    context.on_root(lambda: recorder.say(f"Stopped by {cause} after step {recorder.num_steps_done - 1}. {saved}"))
    return CONTINUE if saver.keeps else TERMINATED


def _batches(job: Job, config: Config, first: int, world: World) -> Iterator[tuple[Any, int, int]]:
    """(this rank's share, its samples, the global batch's samples) of step `first` and those after it."""
    steps, seed = range(first, config.train.steps), config.seed
    shares = rank_batches(steps, job.task.num_samples, job.batch_size, seed, world.rank, world.size)
    for step, (rows, num_global) in zip(steps, shares, strict=True):
        # Dropout and augmentation draw alike whether a run was interrupted before or not. torch.manual_seed seeds every
        # device there may be: 74 us a step, and the CPU's generator alone 1 us.
        torch.default_generator.manual_seed(noise_seed(seed, step, world.rank))
        yield job.task.batch(rows, step), len(rows), num_global


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


def _test(job: Job, context: Context) -> dict[str, float]:
    """Collective. The means of the task's measures, each test sample counted once; {} without test samples.

    The model that is tested is the root's, which a checkpoint holds: running statistics differ between ranks.
    """
    for buffer in job.model.buffers():
        context.broadcast_array(buffer.numpy())
    count, sums = 0, dict[str, float]()
    job.model.eval()
    with torch.no_grad():
        for batch in job.task.test_batches(context.world):
            num_counted, measures = job.task.test(job.model, batch)
            count += num_counted
            sums = {name: sums.get(name, 0.0) + value for name, value in measures.items()}
    everyone = context.all((count, sums))
    total = sum(count for count, _ in everyone)
    names = dict.fromkeys(name for _, sums in everyone for name in sums)
    return {name: sum(sums.get(name, 0.0) for _, sums in everyone) / total for name in names} if total else {}
