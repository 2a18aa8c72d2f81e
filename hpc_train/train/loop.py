"""Training, top to bottom. Start reading here.

`train` opens everything a run needs and then takes its steps. The phases of a step are the `with clock...` blocks;
what each rank spends in them is what the reports are about.
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite

import torch

from hpc_train.core.config import Loaded
from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.paths import expanded
from hpc_train.core.rundir import is_complete
from hpc_train.core.sampling import noise_seed
from hpc_train.core.signals import CONTINUE, TERMINATED, StopRequest
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.watchdog import open_watchdog
from hpc_train.train.device import open_clock, seed_noise
from hpc_train.train.evaluate import Watch, evaluate
from hpc_train.train.initial_from import begin_from, begin_parts_from
from hpc_train.train.reduce.reducer import open_reducer
from hpc_train.train.run.attempt import log, open_attempt, resumed
from hpc_train.train.run.checkpoint.saver import Saver
from hpc_train.train.run.cleanup import remove_stale_segments
from hpc_train.train.run.peak_memory import peak_anonymous_bytes, peak_gpu_bytes, peak_resident_bytes
from hpc_train.train.run.recorder import Recorder
from hpc_train.train.run.resume_command import resume_command
from hpc_train.train.run.sanity_checks import (
    MAX_SKIPPED_IN_A_ROW,
    SkippedUpdate,
    fault_in_test,
    raise_for_run_without_updates,
    raise_for_test,
    raise_for_update,
    raise_on_this_rank,
)
from hpc_train.train.setup import Job, make_optimizer, open_batches, open_job, prepare_model
from hpc_train.train.training_state import TrainingState, restore
from hpc_train.train.validation import Validation


def train(loaded: Loaded, context: Context, resume: str = "never") -> int:
    """Collective. Trains as configured, tests, and leaves a run directory. Returns the exit code of the process.

    resume: see `open_attempt`. The code is 0 at the end of the run. After a stop on
    request it is `CONTINUE` (75) if checkpoints are written, else `TERMINATED` (143).
    """
    if context.world.local_rank == 0:
        remove_stale_segments()  # shared memory of killed jobs, which would fill the node
    if resume not in ("never", "auto"):  # first: what may not change explains what a changed job would fail of
        context.on_root(partial(resumed, loaded.config, expanded(resume)))
    with (
        open_job(loaded.config, context) as job,
        # Communicators of their own: their messages never meet a reducer's or a task's.
        context.duplicate() as recorder_context,
        context.duplicate() as saver_context,
        open_attempt(loaded, context, resume) as attempt,
    ):
        config = job.config  # in which epochs are steps
        loaded = replace(loaded, config=config)
        begin_from(job, attempt)
        clock = open_clock(config.train, job.device)
        recorder = Recorder(loaded, recorder_context, job.placements, attempt, clock, job.device)
        saver = Saver(attempt.run, config.checkpoint, job.facts, saver_context, recorder.log, recorder.sync_records)
        with (
            recorder,
            saver,
            StopRequest() as stop,  # from here on a signal sets a flag
            # From here on all ranks have the root's weights, or their parts of the weights.
            open_reducer(config.reduce, job.model, job.mesh, Control(stop, saver), job.draw) as reducer,
            open_watchdog(context, config.run, recorder.log) as watchdog,
        ):
            optimizer = make_optimizer(job, reducer)
            begin_parts_from(job, reducer, attempt)
            training = TrainingState(job, reducer, optimizer)
            first_step = restore(training, attempt)
            if first_step >= config.train.steps and context.on_root(partial(is_complete, attempt.run)):
                context.on_root(partial(log, f"{attempt.run.path} is complete: {first_step} steps"))
                return 0

            # The first batch is read and tried before the clock starts: start-up belongs to no step.
            batches = open_batches(job, first_step)
            model, facts = prepare_model(job, batches, reducer)
            task, clock = job.task, recorder.clock
            # Strategies that send nothing after the update are not timed there: the timer itself takes 200 ns.
            sync = clock.sync if reducer.sends_weights else nullcontext()
            forward, backward = clock.passes(reducer.lockstep.waits if reducer.lockstep else None)
            facts |= {"reading": task.reading, "num_steps": config.train.steps}
            recorder.start(first_step, model, job.facts | facts | (task.facts or {}))
            context.on_root(partial(_say, job))

            validation = Validation(training, recorder, saver, stop)
            validation.catch_up(first_step)
            stopped = validation.was_stopped
            for step in range(first_step, first_step if stopped or validation.is_over else config.train.steps):
                watchdog.step = step
                with clock.data:
                    parts, num_samples, num_global = next(batches)  # a server trains on nothing: it has no parts
                    # Dropout is a function of (seed, step, rank), so a resumed run repeats it without saved state.
                    seed_noise(job.device, noise_seed(config.seed, step, job.mesh.peers.world.rank))
                    own_loss = torch.zeros((), device=job.device)

                for number, part in enumerate(parts, 1):
                    with forward, job.autocast():
                        # Divide the summed loss by the size of the global batch: gradients then add up over ranks to
                        # the exact mean, even where shares differ by a sample.
                        loss = task.loss(model, part) / num_global
                    with backward:
                        own_loss += loss.detach()
                        if number == len(parts):
                            # Gradients of earlier parts only accumulate. In this last backward pass the reducer sends
                            # each bucket as soon as it is full: communication overlaps with computation.
                            reducer.begin_step(own_loss)
                        (loss * optimizer.scale).backward()

                # One update per step; an asynchronous server makes one for each worker, and stops or saves after the
                # last. `context.waiting` lets the watchdog see which ranks wait for others, and so which rank is late.
                overflowed = False
                for _ in range(reducer.num_updates):
                    with clock.reduce, context.waiting:
                        flags = reducer.reduce_gradients()  # waits for communication that did not overlap
                    with clock.optimizer:
                        updated = isfinite(flags.loss) and optimizer.step(step)
                        model.zero_grad()
                    with sync, context.waiting:
                        updated = reducer.sync_weights(updated)
                    overflowed |= isfinite(flags.loss) and not updated
                optimizer.end_step(updated, overflowed)

                if overflowed or not updated:
                    recorder.flush()  # first: the attempt that resumes from a checkpoint finds every step before it
                    skipped = SkippedUpdate(step, own_loss, flags.loss, overflowed, optimizer.num_skipped_in_a_row)
                    _skip_update(skipped, training, saver)
                recorder.end_step(step, flags.loss, num_samples, num_global)
                if config.train.check_weights_every and (step + 1) % config.train.check_weights_every == 0:
                    training.check_weights(step + 1)
                if validation.is_due_after(step + 1):
                    watchdog.step = None
                    validation.run(step + 1)
                if flags.save or saver.is_due_after(step + 1):
                    recorder.flush()
                    saver.save(step + 1, training.share())
                saver.poll()
                # The flags are sums over ranks: all ranks stop after the same step.
                if stopped := validation.was_stopped or (flags.stop > 0 and step + 1 < config.train.steps):
                    break
                if validation.is_over:
                    break

            watchdog.step = None
            batches.close()  # ends the thread that reads ahead
            return _finish(stop, stopped, training, recorder, saver)


@dataclass(frozen=True)
class Control:
    """This rank's `ControlFlags`: they travel with the gradients of each step."""

    request: StopRequest
    saver: Saver

    @property
    def stop(self) -> bool:
        return bool(self.request)

    @property
    def save(self) -> bool:
        return self.saver.is_due_by_time


def _say(job: Job) -> None:
    if job.task.reading:
        log(f"Data: {job.task.reading}")
    if job.config.train.epochs is not None:
        steps = f"{job.config.train.steps:,} steps, {job.steps_per_epoch:,} in each"
        log(f"train.epochs = {job.config.train.epochs:g}: {steps}")


def _skip_update(skipped: SkippedUpdate, training: TrainingState, saver: Saver) -> None:
    """Collective. After an update that was skipped: continues without it, or saves and raises UserError.

    Not collective with an asynchronous parameter server, where no other rank knows.
    """
    context, config = training.job.context, training.job.config
    is_scaled = config.train.precision == "fp16" and skipped.overflowed  # then the loss scale is halved
    continues = is_scaled or config.train.on_nonfinite == "skip"
    if continues and skipped.num_in_a_row < MAX_SKIPPED_IN_A_ROW:
        if context.world.is_root:
            saver.log(f"Step {skipped.step}: {skipped.why}, its update is skipped")
    elif config.reduce.asynchronous:
        raise_on_this_rank(skipped, context)
    else:
        saved = saver.save_now_or_explain(skipped.step, training.share())
        raise_for_update(skipped, saved, context)


def _finish(stop: StopRequest, stopped: bool, training: TrainingState, recorder: Recorder, saver: Saver) -> int:
    """Collective. Saves the last state; then tests and sums up, unless the loop was stopped on request."""
    stopped_by = stop.cause if stopped else None
    context, optimizer, num_steps = training.job.context, training.optimizer, recorder.num_steps_done
    recorder.flush()
    # The minimum over ranks: with an asynchronous parameter server each rank knows only of its own updates.
    if min(context.all_gather(optimizer.num_skipped_in_a_row)) >= num_steps and stopped_by is None:
        raise_for_run_without_updates(num_steps, context)
    # Saved before the test: a test that fails costs no training.
    saved = saver.save_now(num_steps, training.share())
    outcome = "complete" if stopped_by is None else f"stopped by {stopped_by}"
    recorder.stop(
        outcome,
        optimizer_bytes=context.all_gather(optimizer.num_bytes),
        peak_resident_bytes=context.all_gather(peak_resident_bytes()),
        peak_anonymous_bytes=context.all_gather(peak_anonymous_bytes()),
        peak_gpu_bytes=context.all_gather(peak_gpu_bytes(training.job.device)),
    )
    if stopped_by is not None:
        context.on_root(partial(recorder.log, f"Stopped by {stopped_by} after step {num_steps - 1}. {saved}"))
        _log_resume(saver, context, recorder)
        return CONTINUE if saver.is_enabled else TERMINATED
    tested = evaluate(training.job, training.reducer, Watch(stop, partial(recorder.measuring, "test")))
    if not tested.is_whole:
        cause = stop.cause
        recorder.test_stopped(f"stopped by {cause} in the test", tested.measures, tested.num_done)
        again = " Resumed, it tests again and trains no further." if saver.is_enabled else ""
        context.on_root(partial(recorder.log, f"Test stopped by {cause} after {tested}. {saved}{again}"))
        _log_resume(saver, context, recorder)
        return CONTINUE if saver.is_enabled else TERMINATED
    if tested.num_samples != tested.num_stored:
        context.on_root(partial(recorder.log, f"Test on {tested.num_done:,} of {tested.num_stored:,} samples"))
    fault = fault_in_test(tested.measures)
    recorder.finish(tested.measures, fault, tested.tables)
    if fault:
        raise_for_test(fault, saved, context)
    return 0


def _log_resume(saver: Saver, context: Context, recorder: Recorder) -> None:
    """Collective. The command that continues this run, if it left a checkpoint."""
    command = resume_command(sys.argv, JobEnvironment.current().launcher, context.world.size)
    if saver.is_enabled and command:
        context.on_root(partial(recorder.log, f"Resume: {command}"))
