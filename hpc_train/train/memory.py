"""The memory that a rank needs to train a job, from shapes alone: no weight is allocated and no MPI started.

The loss of one micro-batch and its backward pass run on torch's fake tensors, which have a shape, a type and a device
but no bytes. What would be alive at a time is added up, and the largest sum counts.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_train.core.errors import UserError
from hpc_train.core.key_rules import check_ranks
from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.data.device_queue import map_tensors
from hpc_train.train.device import autocast, recompute_blocks
from hpc_train.train.reduce.buckets import trainable_parameters
from hpc_train.train.reduce.shard_blocks import find_blocks, parameters_of
from hpc_train.train.run.peak_memory import resident_bytes
from hpc_train.train.tasks import Task, open_task

_IN_PLACE_BYTES = 1 << 20  # as `reduce.buckets` sends them: smaller gradients are copied into messages
_NUM_BATCHES = 2  # the one in use, and the next, which a thread reads ahead
_MOST_RANKS = 1 << 20  # that are tried for the smallest number that fits


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at its peak, by what they are for."""

    weights: int  # and buffers, such as running statistics
    gradients: int
    optimizer: int
    activations: int  # what forward keeps for backward, and temporary results at the peak, such as logits
    messages: int  # copies of gradients or weights for other ranks
    input: int  # batches
    base: int  # interpreter, torch and open data, as this process has them: MPI adds to it

    @property
    def total(self) -> int:
        return sum(vars(self).values())


class Trial:
    """A job's task and its model on fake tensors. Raises UserError for a job that cannot be tried so."""

    def __init__(self, config: Config) -> None:
        self.config = config
        if config.reduce.strategy == "parameter_server":
            raise UserError(
                "reduce.strategy = 'parameter_server': its memory is not known before the run",
                "Train a few steps: the run's meta.json states the peak of every rank (peak_resident_bytes).",
            )
        self._task: Task = open_task(config, Context(World()))
        if self._task.in_step:
            raise UserError(
                f"task.kind = '{config.task.kind}': its batches depend on the weights, not on shapes alone",
                "Train a few steps: the run's meta.json states the peak of every rank (peak_resident_bytes).",
            )
        self.base = resident_bytes() or 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fake:
            self.model = self._task.model()
        self.parameters = trainable_parameters(self.model)
        self._whole: dict[tuple[int, bool], int] = {}
        if config.train.activation_checkpointing:
            recompute_blocks(self.model)

    def memory(self, num_ranks: int) -> Memory:
        """Of one of `num_ranks` ranks. Raises UserError for a number that the job cannot train on."""
        check_ranks(self.config, num_ranks)
        train, reduce = self.config.train, self.config.reduce
        num_workers = reduce.num_workers(num_ranks)
        share = -(-self.config.global_batch(num_ranks) // num_workers)
        part = -(-share // train.accumulate)
        all_bytes = sum(each.nbytes for each in self.parameters.values())
        model_bytes = sum(each.nbytes for each in (*self.model.parameters(), *self.model.buffers()))
        batch = self._task.batch(np.arange(part), 0)
        batch_bytes: list[int] = []
        map_tensors(batch, lambda tensor: batch_bytes.append(tensor.nbytes))
        frees = reduce.strategy == "sharded" and reduce.stage > 1
        peak = self._peak(part, frees, batch)
        held = _STAGES[reduce.stage if reduce.strategy == "sharded" else 0](self, all_bytes, num_ranks)
        return Memory(
            weights=held.weights + model_bytes - all_bytes,
            gradients=held.gradients,
            optimizer=_states(self.config) * (all_bytes // (num_ranks if reduce.strategy == "sharded" else 1)),
            activations=peak if frees else max(0, peak - held.gradients),
            messages=held.messages,
            input=_NUM_BATCHES * train.accumulate * sum(batch_bytes),
            base=self.base,
        )

    def _peak(self, part: int, frees: bool, batch: Any) -> int:
        """The most bytes alive in the passes over `part` samples, beyond weights and batch; frees: gradients go."""
        if (part, frees) not in self._whole:
            self._whole[part, frees] = self._measure(frees, batch)
        return self._whole[part, frees]

    def _measure(self, frees: bool, batch: Any) -> int:
        train = self.config.train
        hooks = []
        for each in self.parameters.values():
            if frees or (each.nbytes < _IN_PLACE_BYTES and train.accumulate == 1):
                hooks.append(each.register_post_accumulate_grad_hook(_free))
        cast = autocast(train, torch.device("cpu"))
        try:
            with self._fake:
                fake = map_tensors(batch, self._fake.from_tensor)
                with _LiveBytes() as live:
                    for _ in range(min(2, train.accumulate)):  # the second finds gradients of the first
                        with cast():
                            loss = self._task.loss(self.model, fake)
                        loss.backward()
                        del loss
        finally:
            for hook in hooks:
                hook.remove()
            self.model.zero_grad()
        return live.peak


def _free(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):
    """Adds up the bytes of tensors that are made inside and still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given: set[int] = set()
        map_tensors((*args, *(kwargs or {}).values()), lambda each: given.add(id(each.untyped_storage())))
        found = func(*args, **(kwargs or {}))
        map_tensors(found, lambda each: self._add(each.untyped_storage(), given))
        return found

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = id(storage)
        if key in given or key in self._known:
            return  # a view, or changed in place
        num_bytes = storage.nbytes()
        self._known.add(key)
        self._now += num_bytes
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._remove, key, num_bytes)

    def _remove(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._now -= num_bytes


# ------------------------------------------------------------------------------------- what a strategy keeps


@dataclass(frozen=True)
class _Held:
    weights: int
    gradients: int
    messages: int


def _whole(trial: Trial, all_bytes: int, num_ranks: int) -> _Held:
    """Every rank has all weights; large gradients are sent in place, small ones from flat messages that keep them."""
    reduce = trial.config.reduce
    small = sum(each.nbytes for each in trial.parameters.values() if each.nbytes < _IN_PLACE_BYTES)
    if trial.config.train.accumulate > 1:
        gradients, messages = all_bytes, small  # small ones are added up before they are copied
    else:
        gradients, messages = all_bytes - small, small
    if reduce.compression != "none":
        messages += all_bytes  # a copy of half the size to send, and one to receive
    return _Held(all_bytes, gradients, messages)


def _stage_1(trial: Trial, all_bytes: int, num_ranks: int) -> _Held:
    """As `_whole`, and the summed part of the gradients. Weights arrive after the update, when gradients are gone."""
    held = _whole(trial, all_bytes, num_ranks)
    return _Held(held.weights, held.gradients, held.messages + all_bytes // num_ranks)


def _stage_2(trial: Trial, all_bytes: int, num_ranks: int) -> _Held:
    """All weights; a part of the gradients, and those of three blocks: one that is computed, two being sent."""
    return _Held(all_bytes, all_bytes // num_ranks, 3 * _largest_block(trial))


def _stage_3(trial: Trial, all_bytes: int, num_ranks: int) -> _Held:
    """Parts of weights and gradients; two blocks' and the root group's weights, and three blocks' gradients."""
    groups = parameters_of(trial.model, find_blocks(trial.model, trial.config.reduce.shard_blocks))
    root = sum(each.nbytes for each in groups.get("", {}).values())
    return _Held(all_bytes // num_ranks, all_bytes // num_ranks, root + 5 * _largest_block(trial))


def _largest_block(trial: Trial) -> int:
    groups = parameters_of(trial.model, find_blocks(trial.model, trial.config.reduce.shard_blocks))
    return max(sum(each.nbytes for each in group.values()) for group in groups.values())


_STAGES: dict[int, Callable[[Trial, int, int], _Held]] = {0: _whole, 1: _stage_1, 2: _stage_2, 3: _stage_3}


def _states(config: Config) -> int:
    """How many numbers the optimizer keeps for each weight."""
    return 2 if config.train.optimizer in ("adamw", "lamb") else int(config.train.momentum > 0)


def smallest(trial: Trial, ranks_per_node: int, node_bytes: float) -> tuple[int, Memory] | None:
    """(the smallest number of ranks, in powers of two, of which a node holds its own, their memory); None if none."""
    num_ranks = 1
    while num_ranks <= _MOST_RANKS:
        try:
            memory = trial.memory(num_ranks)
        except UserError:  # not a number that the job can train on
            num_ranks *= 2
            continue
        if memory.total * min(num_ranks, ranks_per_node) <= node_bytes:
            return num_ranks, memory
        num_ranks *= 2
    return None
