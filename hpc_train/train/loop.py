"""Training, top to bottom: one loop, visible."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hpc_train.core.config import Loaded
from hpc_train.core.errors import UserError
from hpc_train.core.key_rules import check_ranks
from hpc_train.core.resume_rules import said
from hpc_train.core.sampling import BatchSampler, Shares, noise_seed
from hpc_train.core.settings import Config
from hpc_train.core.signals import CONTINUE, TERMINATED, StopRequest
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.placement import RankPlacement, crowding_warnings, place_ranks
from hpc_train.train.comm.watchdog import open_watchdog
from hpc_train.train.data.batches import Batches
from hpc_train.train.data.device_queue import moved
from hpc_train.train.device import open_clock, open_device, peak_flops, precision, recompute_blocks, seed_noise, try_out
from hpc_train.train.onednn import compiled, layouts_watched
from hpc_train.train.optimize import Optimizer, misfit, scale_misfit
from hpc_train.train.reduce.buckets import trainable
from hpc_train.train.reduce.reducer import Reducer, broadcast_model, open_reducer
from hpc_train.train.reduce.shards import whole
from hpc_train.train.run import checkpoint
from hpc_train.train.run.attempt import Attempt, check_continues, is_complete, open_attempt, require_beginning, say
from hpc_train.train.run.checkpoint import Saver, read_newest
from hpc_train.train.run.leftovers import remove_dead_segments
from hpc_train.train.run.recorder import Recorder
from hpc_train.train.run.sanity_checks import (
    MOST_LEFT_OUT,
    LeftOut,
    compare_weights,
    fault_of_test,
    refuse_a_run_without_updates,
    refuse_alone,
    refuse_test,
    refuse_update,
)
from hpc_train.train.tasks import Task, checked_loss, open_task


@dataclass(frozen=True)
class Job:
    """What is trained, alike on every rank, and who trains it.

    team: the ranks that train, seen by one of them; of a parameter server, the servers. The same as all ranks without.
    """

    task: Task
    model: nn.Module
    batch_size: int  # of all ranks together
    facts: dict[str, Any]  # that each checkpoint states
    places: list[RankPlacement]
    device: torch.device
    team: Context
    is_server: bool
    autocast: Callable[[], AbstractContextManager[Any]]


def train(loaded: Loaded, context: Context, resume: str = "never") -> int:
    """Collective. Trains as configured, tests, and leaves a run directory. Returns the exit code of the process.

    resume: see `open_attempt`. The code is 0 at the end of the run, and `CONTINUE` after a stop on request.
    """
    if context.world.local_rank == 0:
        remove_dead_segments()
    config = loaded.config
    with (
        _set_up(config, context) as job,
        context.duplicate() as for_records,
        open_attempt(loaded, context, resume) as attempt,
    ):
        recorder = Recorder(loaded, for_records, job.places, attempt, open_clock(config.train, job.device))
        is_root = context.world.is_root
        saver = Saver(attempt.run, config.checkpoint, job.facts, is_root, recorder.say, recorder.secure)
        with (
            recorder,
            saver,
            StopRequest() as stop,
            open_reducer(config.reduce, job.model, context, job.team, lambda: (bool(stop), saver.is_time)) as reducer,
            open_watchdog(context, config.run, recorder.say) as watch,
        ):
            optimizer = _optimizer(config, job, reducer, context)
            snapshot = partial(_snapshot, job, optimizer, reducer, context)
            begun = _begin(attempt, recorder, job, optimizer, reducer, config, context)
            if begun is None:
                return 0  # the run was complete
            first, model, batches = begun
            task, clock, stopped = job.task, recorder.clock, False
            sync = clock.sync if reducer.syncs_weights else nullcontext()  # 0 ns, not 200, where nothing travels

            for step in range(first, config.train.steps):
                watch.step = step
                with clock.data:
                    parts, num_samples, num_global = next(batches)  # a server trains on nothing: no parts
                    seed_noise(job.device, noise_seed(config.seed, step, job.team.world.rank))
                    total = torch.zeros((), device=job.device)
                for number, part in enumerate(parts, 1):
                    with clock.forward, job.autocast():
                        loss = task.loss(model, part) / num_global  # a share of the global mean: shares may differ
                    with clock.backward:
                        total += loss.detach()
                        if number == len(parts):
                            reducer.begin_step(total)
                        (loss * optimizer.scale).backward()  # in the last, the reducer overlaps its sends with this
                overflowed = False
                for _ in range(reducer.num_updates):
                    with clock.reduce, context.waiting:
                        shared = reducer.reduce_gradients()  # exposed communication only
                    with clock.optimizer:
                        made = isfinite(shared.loss) and optimizer.step(step)
                        model.zero_grad()
                    with sync, context.waiting:
                        made = reducer.sync_weights(made)
                    overflowed |= isfinite(shared.loss) and not made
                optimizer.end_step(made, overflowed)
                if overflowed or not made:
                    recorder.flush()  # the attempt that continues from what is saved finds every step before this
                    left_out = LeftOut(step, total, shared.loss, overflowed, optimizer.num_left_out)
                    _answer_left_out(left_out, config, saver, snapshot, context)
                recorder.end_step(step, shared.loss, num_samples, num_global)
                if config.train.check_weights_every and (step + 1) % config.train.check_weights_every == 0:
                    compare_weights(step + 1, model, context)
                if shared.save or saver.is_step(step + 1):
                    recorder.flush()
                    saver.save(step + 1, snapshot())
                if stopped := shared.stop > 0 and step + 1 < config.train.steps:
                    break
            watch.step = None
            batches.close()
            return _end(stop.cause if stopped else None, recorder, saver, snapshot, optimizer, job, context)


@contextmanager
def _set_up(config: Config, context: Context) -> Iterator[Job]:
    """Collective. Who trains, on what device, which task and model; warns where ranks are crowded."""
    context.on_all(partial(check_ranks, config, context.world.size))
    places = place_ranks(context, config.train.threads)
    torch.set_num_threads(places[context.world.rank].threads)
    if context.world.is_root:
        for warning in crowding_warnings(places):
            print(warning, file=sys.stderr, flush=True)
    device = context.on_all(partial(open_device, config.train, context.world))
    is_server = context.world.rank >= config.reduce.num_workers(context.world.size)
    has_servers = config.reduce.strategy == "parameter_server"
    with context.split(is_server) if has_servers else nullcontext(context) as team, team.duplicate() as for_task:
        # Of a fault that one team alone meets, the other must hear, too.
        task = context.on_all(partial(open_task, config, for_task)) if has_servers else open_task(config, for_task)
        batch_size = _batch_size(config, task, context)
        torch.manual_seed(config.seed)
        model = _model(task, context).to(device)
        facts = {
            "size": context.world.size,
            "global_batch": batch_size,
            "num_samples": task.num_samples,
            "order": str(task.order),
        }
        yield Job(task, model, batch_size, facts, places, device, team, is_server, precision(config.train, device))


def _begin(
    attempt: Attempt,
    recorder: Recorder,
    job: Job,
    optimizer: Optimizer,
    reducer: Reducer,
    config: Config,
    context: Context,
) -> tuple[int, nn.Module, Batches] | None:
    """Collective. (the step to resume at, the model to train, the batches from it on); None if complete."""
    first = _restore(attempt, job, optimizer, reducer, config, context)
    if first >= config.train.steps and context.on_root(partial(is_complete, attempt.run)):
        context.on_root(lambda: say(f"{attempt.run.path} is complete: {first} steps"))
        return None
    batches = _open_batches(job, config, first)
    model, measured = _first_look(batches, job, config, context)
    recorder.start(first, model, job.facts | measured | {"reading": job.task.reading})
    if job.task.reading:
        context.on_root(lambda: say(f"Data: {job.task.reading}"))
    return first, model, batches


def _open_batches(job: Job, config: Config, first: int) -> Batches:
    """This rank's batches of step `first` and those after it; a parameter server's are empty."""
    world = job.team.world
    sampler = BatchSampler(job.task.order, job.batch_size, config.seed, Shares(world.size), world.rank)
    num_parts = 0 if job.is_server else config.train.accumulate
    return Batches(job.task, sampler, range(first, config.train.steps), num_parts, job.device)


def _optimizer(config: Config, job: Job, reducer: Reducer, context: Context) -> Optimizer:
    owned = reducer.shards.owned if reducer.shards else whole(job.model)
    num_shares = config.reduce.num_workers(context.world.size)
    return Optimizer(config.train, owned, job.batch_size, reducer.sum_owned, num_shares)


def _snapshot(job: Job, optimizer: Optimizer, reducer: Reducer, context: Context) -> dict[str, Any]:
    """Collective. All that continuing needs; whole on the root."""
    state = optimizer.state()
    if reducer.shards:
        state = reducer.shards.gather(
            state, context
        )  # before the weights are looked at: it brings the root's up to date
    own = {} if job.is_server else job.task.state()
    return {"model": job.model.state_dict(), "optimizer": state, "loss_scale": optimizer.loss_scale, "task": own}


def _restore(
    attempt: Attempt, job: Job, optimizer: Optimizer, reducer: Reducer, config: Config, context: Context
) -> int:
    """Collective. Loads the newest good checkpoint of the run that is continued, if any; the step to go on with."""
    state: dict[str, Any] = {}
    source = attempt.source

    def find() -> int:
        if source is None:
            return 0
        found, stated = read_newest(source, job.model, say, partial(_misfit, job, config))
        if not found:
            require_beginning(source)
        else:
            check_continues(stated, job.facts, attempt, config.train.steps)
            say(f"Continuing at step {stated['step']} of {source.path}")
            for change in said(attempt.changes):
                say(f"  {change}")
            state.update(found)
        return int(stated.get("step", 0))

    first = context.on_root(find)
    if first:
        state = checkpoint.broadcast(state, context)
        folder = attempt.source.checkpoint(first) if attempt.source else None
        context.on_all(lambda: _load(state, folder, attempt, job, optimizer, reducer))
    return first


def _misfit(job: Job, config: Config, state: dict[str, Any]) -> str | None:
    """Why this job cannot go on from `state`, whose model fits; None where it can."""
    own, keeps_own = state["task"], job.task.keeps_state
    if not isinstance(own, dict) or (own and not keeps_own):
        return f"task.kind = '{config.task.kind}' keeps no such state as it holds"
    if keeps_own and not own and job.task.state():
        return f"it holds no state of task.kind = '{config.task.kind}'"
    return scale_misfit(state["loss_scale"]) or misfit(state["optimizer"], config.train, trainable(job.model))


def _load(
    state: dict[str, Any], folder: Path | None, attempt: Attempt, job: Job, optimizer: Optimizer, reducer: Reducer
) -> None:
    """Puts a checkpoint's state in place. Raises UserError where model or task refuse theirs."""
    try:
        job.model.load_state_dict(state["model"])
        optimizer.load(reducer.shards.scatter(state["optimizer"]) if reducer.shards else state["optimizer"])
        if all(change.key != "train.precision" for change in attempt.changes):
            optimizer.loss_scale = state["loss_scale"]  # another precision's says nothing of this one's
        if state["task"] and not job.is_server:
            job.task.load_state(state["task"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{folder} does not fit this job: {type(error).__name__}: {error}",
            "Move it away to continue from the checkpoint before it, or begin another run: --resume never",
        ) from None


def _first_look(batches: Batches, job: Job, config: Config, context: Context) -> tuple[nn.Module, dict[str, Any]]:
    """Collective. Tries the first batch out before the loop: (the model to train, facts for meta.json).

    A task whose model and batches do not fit is told so here, on one rank; and a step's operations are counted.
    """
    coming = batches.peek()

    def warn(words: str) -> None:
        if context.world.is_root:
            print(words, file=sys.stderr, flush=True)

    def look() -> int:
        if coming is None or not coming.parts:
            return 0
        with job.autocast(), layouts_watched(job.model, warn):
            return try_out(lambda: checked_loss(config, job.task, job.model, coming.parts[0]), job.model)

    flops = context.on_all(look)
    if config.train.activation_checkpointing:
        context.on_all(partial(recompute_blocks, job.model))
    model = compiled(job.model, job.device) if config.train.compile else job.model
    num_first = -(-coming.num_samples // len(coming.parts)) if coming and coming.parts else 0
    peak, source = peak_flops(config.train, job.device)
    strategy = config.reduce.strategy
    facts = {
        "device": str(job.device) if job.device.type == "cpu" else torch.cuda.get_device_name(job.device),
        "precision": config.train.precision,
        "strategy": strategy,
        "num_servers": config.reduce.servers if strategy == "parameter_server" else 0,
        "flops_per_sample": flops / num_first if flops and num_first else None,
        "peak_flops": peak,
        "peak_source": source,
    }
    return model, facts


def _answer_left_out(
    left_out: LeftOut, config: Config, saver: Saver, snapshot: Callable[[], dict[str, Any]], context: Context
) -> None:
    """Collective. Every rank knows that an update was left out: goes on without it, or saves and raises.

    Not collective with an asynchronous parameter server, where the rank that met it is the only one to know.
    """
    is_scaled = config.train.precision == "fp16" and left_out.overflowed  # a smaller loss scale is the answer
    goes_on = is_scaled or config.train.on_nonfinite == "skip"
    if goes_on and left_out.num_in_a_row < MOST_LEFT_OUT:
        if context.world.is_root:
            saver.say(f"Step {left_out.step}: {left_out.why}, its update is left out")
    elif config.reduce.asynchronous:
        refuse_alone(left_out, context)
    else:
        state = snapshot()
        saved = context.on_root(lambda: saver.try_now(left_out.step, state))
        refuse_update(left_out, saved, context)


def _end(
    cause: str | None,
    recorder: Recorder,
    saver: Saver,
    snapshot: Callable[[], dict[str, Any]],
    optimizer: Optimizer,
    job: Job,
    context: Context,
) -> int:
    """Collective. Saves the last state; then tests and sums up, unless the loop was stopped by `cause`."""
    recorder.flush()
    # Asked of all ranks: those of an asynchronous parameter server each know of their own updates alone.
    if min(context.all_gather(optimizer.num_left_out)) >= recorder.num_steps_done and cause is None:
        refuse_a_run_without_updates(recorder.num_steps_done, context)
    state = snapshot()
    saved = context.on_root(lambda: saver.save_now(recorder.num_steps_done, state))
    outcome = "complete" if cause is None else f"stopped by {cause}"
    recorder.stop(outcome, optimizer_bytes=context.all_gather(optimizer.num_bytes))
    if cause is None:
        test = _test(job, context)
        fault = fault_of_test(test)
        recorder.finish(test, fault)
        if fault:
            refuse_test(fault, saved, context)
        return 0
    context.on_root(lambda: recorder.say(f"Stopped by {cause} after step {recorder.num_steps_done - 1}. {saved}"))
    return CONTINUE if saver.keeps else TERMINATED


def _batch_size(config: Config, task: Task, context: Context) -> int:
    """Collective. The global batch on this many ranks. Raises UserError where a rank or the data would run dry."""
    world, num_samples = context.world, task.num_samples
    batch_size = config.global_batch(world.size)
    most = int(context.max(np.array([num_samples]))[0])

    def check() -> None:
        if num_samples != most:
            raise UserError(
                f"task.kind = '{config.task.kind}': num_samples = {num_samples} on rank {world.rank}, {most} elsewhere",
                "num_samples counts the whole data set and is alike on every rank; batch(rows) picks a rank's share.",
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


def _test(job: Job, context: Context) -> dict[str, float]:
    """Collective. The means of the task's measures, each test sample counted once; {} without test samples.

    The model that is tested is the root's, which a checkpoint holds: running statistics differ between ranks.
    """
    broadcast_model(job.model, context)
    count, sums = 0, dict[str, float]()
    job.model.eval()
    with torch.no_grad(), job.autocast():
        for batch in job.task.test_batches(context.world):
            num_counted, measures = job.task.test(job.model, moved(batch, job.device))
            count += num_counted
            sums = {name: sums.get(name, 0.0) + value for name, value in measures.items()}
    everyone = context.all_gather((count, sums))
    total = sum(count for count, _ in everyone)
    names = dict.fromkeys(name for _, sums in everyone for name in sums)
    return {name: sum(sums.get(name, 0.0) for _, sums in everyone) / total for name in names} if total else {}
