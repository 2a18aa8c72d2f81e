"""What a checkpoint holds, gathered from the ranks, and how a run resumes from it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from hpc_train.core.errors import UserError
from hpc_train.core.resume_rules import said
from hpc_train.train.optimize import Optimizer, loss_scale_misfit, optimizer_misfit
from hpc_train.train.reduce.block_weights import BlockShards
from hpc_train.train.reduce.buckets import trainable_parameters
from hpc_train.train.reduce.reducer import Reducer
from hpc_train.train.run.attempt import Attempt, check_resumes, log, require_first_start
from hpc_train.train.run.checkpoint.restore import broadcast, read_newest
from hpc_train.train.run.checkpoint.retention import path_of
from hpc_train.train.run.sanity_checks import check_weights_agree
from hpc_train.train.setup import Job


@dataclass(frozen=True)
class TrainingState:
    """Everything that changes while a job trains: the model, the optimizer and the task's own state."""

    job: Job
    reducer: Reducer
    optimizer: Optimizer

    def gather(self) -> dict[str, Any]:
        """Collective. All that resuming needs, complete on the root."""
        optimizer, shards = self.optimizer.state(), self.reducer.shards
        model: dict[str, Any] = {}
        if shards:
            holders = self.job.mesh.first_copy
            model, optimizer = shards.gather(self.job.model, optimizer, holders) if holders else ({}, {})
        else:
            model = self.job.model.state_dict()
        return {
            "model": model,
            "optimizer": optimizer,
            "loss_scale": self.optimizer.loss_scale,
            "task": self.job.task.state() if self.job.mesh.trains else {},
        }

    def misfit(self, state: dict[str, Any]) -> str | None:
        """Why this job cannot resume from `state`, whose model fits; None if it can."""
        task, kind = self.job.task, self.job.config.task.kind
        if not isinstance(state["task"], dict) or (state["task"] and not task.keeps_state):
            return f"task.kind = '{kind}' keeps no such state as it holds"
        if task.keeps_state and not state["task"] and task.state():
            return f"it holds no state of task.kind = '{kind}'"
        parameters, train = trainable_parameters(self.job.model), self.job.config.train
        return loss_scale_misfit(state["loss_scale"]) or optimizer_misfit(state["optimizer"], train, parameters)

    def check_weights(self, step: int) -> None:
        """Collective. Raises UserError if weights of which several ranks hold the same differ in any bit.

        step: how many are done. At stage 3 those are frozen weights, and the parts of several copies.
        """
        job, shards = self.job, self.reducer.shards
        divided = shards.divided if isinstance(shards, BlockShards) else []
        in_parts = {id(parameter) for block in divided for parameter in block.parameters.values()}
        whole = [parameter for parameter in job.model.parameters() if id(parameter) not in in_parts]
        check_weights_agree(step, whole, job.context)
        if divided and job.mesh.replica.size > 1 and job.mesh.shard.context:
            own = [block.own for block in divided]
            check_weights_agree(step, own, job.context, job.mesh.shard.context.world.rank)

    def load(self, state: dict[str, Any], with_loss_scale: bool) -> None:
        """The inverse of `gather`, on every rank alone."""
        optimizer, shards = state["optimizer"], self.reducer.shards
        if shards:
            shards.load_model(self.job.model, state["model"])
            self.optimizer.load(shards.scatter(optimizer))
        else:
            self.job.model.load_state_dict(state["model"])
            self.optimizer.load(optimizer)
        if with_loss_scale:
            self.optimizer.loss_scale = state["loss_scale"]
        if state["task"] and self.job.mesh.trains:
            self.job.task.load_state(state["task"])


def restore(training: TrainingState, attempt: Attempt) -> int:
    """Collective. Loads the newest good checkpoint of the run to resume, if any; returns the first step to take."""
    context = training.job.context
    state: dict[str, Any] = {}  # filled on the root: what `on_root` returns would be pickled for all ranks
    first_step = context.on_root(partial(_read, state, training, attempt))
    if first_step:
        state = broadcast(state, context)
        context.on_all(partial(_load, state, training, attempt, first_step))
    return first_step


def _read(state: dict[str, Any], training: TrainingState, attempt: Attempt) -> int:
    """Reads the newest good checkpoint into `state`; returns its step, 0 if the run begins."""
    if attempt.source is None:
        return 0
    found, facts = read_newest(attempt.source, training.job.model, log, training.misfit)
    if not found:
        require_first_start(attempt.source)
        return 0
    check_resumes(facts, training.job.facts, attempt, training.job.config.train.steps)
    log(f"Continuing at step {facts['step']} of {attempt.source.path}")
    for change in said(attempt.changes):
        log(f"  {change}")
    state.update(found)
    return int(facts["step"])


def _load(state: dict[str, Any], training: TrainingState, attempt: Attempt, step: int) -> None:
    """Raises UserError if model or task refuse their part of the state."""
    # The loss scale of another precision is no guide for this one.
    with_loss_scale = all(change.key != "train.precision" for change in attempt.changes)
    try:
        training.load(state, with_loss_scale)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        folder = path_of(attempt.source, step) if attempt.source else None
        raise UserError(
            f"{folder} does not fit this job: {type(error).__name__}: {error}",
            "Move it away to continue from the checkpoint before it, or begin another run: --resume never",
        ) from None
