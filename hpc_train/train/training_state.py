"""What a checkpoint holds, in shares of the ranks, and how a run resumes from it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hpc_train.core.errors import UserError
from hpc_train.core.resume_rules import said
from hpc_train.core.rundir import RunDir
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.optimize import Optimizer, loss_scale_misfit, optimizer_misfit
from hpc_train.train.reduce.block_weights import BlockShards
from hpc_train.train.reduce.buckets import trainable_parameters
from hpc_train.train.reduce.reducer import Reducer
from hpc_train.train.reduce.sharded_weights import ParamShard, State, whole_parameters
from hpc_train.train.run.attempt import Attempt, check_resumes, log, require_first_start
from hpc_train.train.run.checkpoint.encoding import data_set_name
from hpc_train.train.run.checkpoint.reading import StoredTensor
from hpc_train.train.run.checkpoint.restore import (
    Plan,
    Replicated,
    Wanted,
    check_fits,
    load_newest,
    plan_model,
    readable,
)
from hpc_train.train.run.checkpoint.shares import Part, Share, UnusableCheckpoint, divide, map_leaves
from hpc_train.train.run.sanity_checks import check_weights_agree
from hpc_train.train.setup import Job


@dataclass(frozen=True)
class TrainingState:
    """Everything that changes while a job trains: the model, the optimizer and the task's own state."""

    job: Job
    reducer: Reducer
    optimizer: Optimizer

    def share(self) -> Share:
        """Collective. What this rank adds to a checkpoint: no number that another rank adds, and no copy."""
        mesh, kept = self.job.mesh, self.optimizer.state()
        copies = mesh.replica.context  # of this rank's part
        told = mesh.ranks.gather(self._kinds(kept) if copies is None or copies.world.is_root else {})
        task = self.job.task.state() if mesh.trains else {}
        held = self._held(kept)
        if copies is not None:
            mine = divide([part.numbers for part in held], copies.world.size)[copies.world.rank]
            held = [held[number].cut(begin, end) for number, begin, end in mine]
        if not mesh.ranks.world.is_root:
            return Share(None, held)
        model, optimizer = self._model_entries(), self._optimizer_entries(told)
        return Share(
            {"model": model, "optimizer": optimizer, "loss_scale": self.optimizer.loss_scale, "task": task}, held
        )

    @property
    def _owned(self) -> list[ParamShard]:
        return self.reducer.shards.owned if self.reducer.shards else whole_parameters(self.job.model)

    def _held(self, kept: State) -> list[Part]:
        """The weights and the optimizer's state that this rank updates."""
        held = []
        for shard in self._owned:
            optimizer = [(("optimizer", key), value) for key, value in kept.get(shard.name, {}).items() if value.ndim]
            for keys, tensor in [(("model",), shard.parameter), *optimizer]:
                flat = tensor.detach().contiguous().view(-1)
                for name, begin, offset, length in shard.segments:
                    held.append(Part(data_set_name(*keys, name), begin, flat[offset : offset + length]))
        return held

    def _kinds(self, kept: State) -> dict[str, dict[str, Any]]:
        """What the optimizer keeps of each parameter: dtypes of tensors, and numbers."""
        kinds: dict[str, dict[str, Any]] = {}
        for shard in self._owned:
            for key, value in kept.get(shard.name, {}).items():
                kind = value.dtype if value.ndim else value.cpu()
                for segment in shard.segments:
                    kinds.setdefault(segment.parameter, {})[key] = kind
        return kinds

    def _model_entries(self) -> dict[str, Any]:
        """The model's state, with a tensor without memory in place of each parameter that is trained."""
        parameters = dict(self.job.model.named_parameters(remove_duplicate=False))
        entries = self.job.model.state_dict()
        blanks: dict[int, torch.Tensor] = {}  # one for all names of a tied weight
        for name in entries.keys() & parameters.keys():
            parameter = parameters[name]
            if parameter.requires_grad:
                entries[name] = blanks.setdefault(id(parameter), _blank(parameter, parameter.dtype))
        return entries

    def _optimizer_entries(self, told: list[dict[str, dict[str, Any]]]) -> State:
        kinds: dict[str, dict[str, Any]] = {}
        for of_rank in told:
            for name, of_parameter in of_rank.items():
                kinds.setdefault(name, {}).update(of_parameter)
        return {
            name: {
                key: _blank(parameter, kind) if isinstance(kind, torch.dtype) else kind
                for key, kind in kinds[name].items()
            }
            for name, parameter in trainable_parameters(self.job.model).items()
            if name in kinds
        }

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

    # ------------------------------------------------------------------------------------------------ loading

    def check(self, state: dict[str, Any]) -> None:
        """Raises `UnusableCheckpoint` if this job cannot resume from a state. Tensors need no memory."""
        check_fits(state, self.job.model)
        task, kind = self.job.task, self.job.config.task.kind
        if not isinstance(state["task"], dict) or (state["task"] and not task.keeps_state):
            raise UnusableCheckpoint(f"task.kind = '{kind}' keeps no such state as it holds")
        if task.keeps_state and not state["task"] and task.state():
            raise UnusableCheckpoint(f"it holds no state of task.kind = '{kind}'")
        parameters, train = trainable_parameters(self.job.model), self.job.config.train
        if why := loss_scale_misfit(state["loss_scale"]) or optimizer_misfit(state["optimizer"], train, parameters):
            raise UnusableCheckpoint(why)

    def plan(self, state: dict[str, Any], with_loss_scale: bool = True) -> Plan:
        """What this rank reads of a stored state, and where it goes: only what it holds while it trains."""
        model, mesh = self.job.model, self.job.mesh
        freed = self.reducer.shards.freed if self.reducer.shards else frozenset()
        whole, load_model = plan_model(model, state["model"], _names(model, freed))
        task = map_leaves(partial(_wanted_whole, whole), state["task"])
        owned: list[Wanted] = []
        weights = {
            shard.name: _wanted_weights(shard, state["model"], owned) for shard in self._owned if shard.name in freed
        }
        optimizer = {shard.name: _wanted_state(shard, state["optimizer"], owned) for shard in self._owned}

        def finish() -> None:
            load_model()
            for shard in self._owned:
                if shard.name in weights:
                    shard.parameter.detach().copy_(weights[shard.name])
            self.optimizer.load(optimizer)
            if with_loss_scale:
                self.optimizer.loss_scale = state["loss_scale"]
            if task and mesh.trains:
                self.job.task.load_state(task)

        copies = mesh.replica.context or Context(World(host=mesh.ranks.world.host))
        return Plan([Replicated(mesh.ranks, whole), Replicated(copies, owned)], finish)


def _blank(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(parameter.shape, dtype=dtype, device="meta")


def _names(model: nn.Module, parameters: Collection[str]) -> set[str]:
    """All names that a model's state has for these parameters, which may be tied."""
    named = dict(model.named_parameters(remove_duplicate=False))
    chosen = {id(named[name]) for name in parameters}
    return {name for name, parameter in named.items() if id(parameter) in chosen}


def _wanted_whole(wanted: list[Wanted], leaf: Any) -> Any:
    if not isinstance(leaf, StoredTensor):
        return leaf
    tensor = torch.empty(leaf.shape, dtype=leaf.dtype)
    wanted.append(Wanted(leaf, 0, tensor.view(-1)))
    return tensor


def _wanted_weights(shard: ParamShard, stored: dict[str, Any], wanted: list[Wanted]) -> torch.Tensor:
    tensor, flat = readable(shard.parameter.detach())
    for name, begin, offset, length in shard.segments:
        wanted.append(Wanted(stored[name], begin, flat[offset : offset + length]))
    return tensor


def _wanted_state(shard: ParamShard, stored: dict[str, Any], wanted: list[Wanted]) -> dict[str, torch.Tensor]:
    """What the optimizer keeps of a shard; zeros where it keeps nothing of a parameter in it."""
    kept: dict[str, torch.Tensor] = {}
    for name, begin, offset, length in shard.segments:
        for key, value in stored.get(name, {}).items():
            if not value.ndim:
                kept.setdefault(key, value.whole() if isinstance(value, StoredTensor) else value)
                continue
            target = kept.setdefault(key, torch.zeros(shard.parameter.shape, dtype=value.dtype))
            wanted.append(Wanted(value, begin, target.view(-1)[offset : offset + length]))
    return kept


def restore(training: TrainingState, attempt: Attempt) -> int:
    """Collective. Loads the newest good checkpoint of the run to resume, if any; returns the first step to take."""
    job, source = training.job, attempt.source
    if source is None:
        return 0
    # The loss scale of another precision is no guide for this one.
    with_loss_scale = all(change.key != "train.precision" for change in attempt.changes)

    def check(state: dict[str, Any], facts: dict[str, Any]) -> None:
        training.check(state)
        check_resumes(facts, job.facts, attempt, job.config.train.steps)

    def plan(state: dict[str, Any]) -> Plan:
        planned = training.plan(state, with_loss_scale)
        return planned._replace(finish=partial(_explaining, planned.finish, source))

    facts = load_newest(source, job.context, check, plan, log)
    job.context.on_root(partial(_say, facts, attempt, source))
    return int(facts.get("step", 0))


def _say(facts: dict[str, Any], attempt: Attempt, source: RunDir) -> None:
    if not facts:
        require_first_start(source)
        return
    log(f"Continuing at step {facts['step']} of {source.path}")
    for change in said(attempt.changes):
        log(f"  {change}")


def _explaining(finish: Callable[[], None], source: RunDir) -> None:
    """Raises UserError if model or task refuse their part of the state."""
    try:
        finish()
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"the newest good checkpoint of {source.path} does not fit this job: {type(error).__name__}: {error}",
            "Move it away to continue from the checkpoint before it, or begin another run: --resume never",
        ) from None
