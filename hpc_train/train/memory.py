"""The memory that a rank needs to train a job, from shapes alone: no weight is allocated and no MPI started.

The loss of one micro-batch and its backward pass run on torch's fake tensors, which have a shape, a type and a device
but no bytes. What would be alive at a time is added up, and the largest sum counts. Around it stands what the strategy
keeps, by a formula. Weights, gradients and states of N ranks: Rajbhandari et al., "ZeRO", SC 2020, section 5.
"""

import weakref
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_train.core.errors import UserError
from hpc_train.core.key_rules import check_ranks
from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.data.device_queue import map_tensors
from hpc_train.train.device import autocast, recompute_blocks
from hpc_train.train.initial_weights import build
from hpc_train.train.reduce.buckets import trainable_parameters
from hpc_train.train.reduce.shard_blocks import find_blocks, parameters_of
from hpc_train.train.run.peak_memory import anonymous_bytes
from hpc_train.train.tasks import Task, open_task

_ALONE_BYTES = 1 << 20  # as in `reduce.buckets`: smaller gradients are copied into messages, which stay
_NUM_STEPS = 2  # the second finds what the first one keeps
_MPI_COPIES = 2  # of a message under way, at the root: Open MPI's own sum of what comes in
_NUM_BATCHES = 2  # the one in use, and the next
_MOST_RANKS = 1 << 20  # that are tried for the smallest number that fits
# Measured on x86-64 with torch 2.13, Open MPI 4.1 and Horovod 0.28 (make bench-memory prints what is left over):
_GAPS = 0.4  # of what moves in the heap: malloc's gaps between freed and living tensors, which stay with the process
_PAGES_OF_ITS_OWN = 32 << 20  # bytes from which on malloc takes none of the heap, at the latest (mallopt(3))
_STARTED_BYTES = 20 << 20  # a rank's MPI, threads and kernels beyond what the command itself takes


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at its fullest moment, by what they are for."""

    weights: int  # and buffers, such as running statistics
    gradients: int
    optimizer: int
    activations: int  # what forward keeps for backward, and temporary results at that moment, such as logits
    messages: int  # copies of gradients or weights for other ranks, and what MPI works in
    gaps: int  # that malloc leaves between tensors: measured, see `_GAPS`
    checkpoint: int  # the copy of a rank's share that is written while training goes on
    input: int  # batches
    base: int  # interpreter, torch, MPI and open data

    @property
    def total(self) -> int:
        return sum(vars(self).values())


class Trial:
    """A job's task and its model on fake tensors. Raises UserError for a job that cannot be tried so."""

    def __init__(self, config: Config) -> None:
        self.config = config
        remedy = "Train a few steps: the run's meta.json states the peak of every rank (peak_anonymous_bytes)."
        if config.reduce.strategy == "parameter_server":
            raise UserError("reduce.strategy = 'parameter_server': its memory is not known before the run", remedy)
        self._task: Task = open_task(config, Context(World()))
        if self._task.in_step:
            kind = config.task.kind
            raise UserError(f"task.kind = '{kind}': its batches depend on the weights, not on shapes alone", remedy)
        self.base = (anonymous_bytes() or 0) + _STARTED_BYTES
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = self._without_bytes(build(self._task.model, config.seed).model)
        self.parameters = trainable_parameters(self.model)
        if config.train.activation_checkpointing:
            recompute_blocks(self.model)

    def _without_bytes(self, model: nn.Module) -> nn.Module:
        """`model` with fake tensors of the CPU in place of its own; what was tied still is."""
        twins: dict[int, torch.Tensor] = {}
        with self._fake:
            for module in model.modules():
                for own in (module._parameters, module._buffers):
                    for name, each in own.items():
                        if each is None:
                            continue
                        if id(each) not in twins:
                            empty = torch.empty_strided(each.shape, each.stride(), dtype=each.dtype)
                            is_weight = isinstance(each, nn.Parameter)
                            twins[id(each)] = nn.Parameter(empty, each.requires_grad) if is_weight else empty
                        own[name] = twins[id(each)]
        return model

    def memory(self, num_ranks: int) -> Memory:
        """Of one of `num_ranks` ranks. Raises UserError for a number that the job cannot train on."""
        check_ranks(self.config, num_ranks)
        train, reduce = self.config.train, self.config.reduce
        share = -(-self.config.global_batch(num_ranks) // num_ranks)
        batch = self._task.batch(np.arange(-(-share // train.accumulate)), 0)
        stage = reduce.stage if reduce.strategy == "sharded" and num_ranks > 1 else 0
        all_bytes, shards = num_bytes(self.parameters.values()), num_ranks if stage else 1
        held = self._held(stage, num_ranks)
        optimizer = states(self.config) * (all_bytes // shards)
        live = self._steps(batch, stage, num_ranks)
        moving = held.gradients if stage < 2 else 0  # of what the steps make
        return Memory(
            weights=held.weights + num_bytes((*self.model.parameters(), *self.model.buffers())) - all_bytes,
            gradients=held.gradients,
            optimizer=optimizer,
            activations=max(0, int(live.peak) - moving),
            messages=held.messages,
            gaps=int(live.peak_with_gaps - live.peak),
            checkpoint=(all_bytes // shards + optimizer) if self.config.checkpoint.keep else 0,
            input=_NUM_BATCHES * train.accumulate * _bytes_of(batch),
            base=self.base,
        )

    def _steps(self, batch: Any, stage: int, num_ranks: int) -> "_LiveBytes":
        """What the trial of the first batch and the first steps allocate, on tensors without bytes."""
        train = self.config.train
        cast = autocast(train, torch.device("cpu"))
        groups = [[each] for each in self.parameters.values()]
        if stage > 1:
            groups = [list(group.values()) for name, group in self._blocks().items() if name]
        with self._fake, _Gradients(self.parameters, groups, stage, num_ranks) as gradients:
            fake = map_tensors(batch, self._fake.from_tensor)
            with _LiveBytes(0.0 if train.activation_checkpointing else _GAPS) as live:
                for step in range(_NUM_STEPS):
                    for number in range(train.accumulate)[-2:]:  # the second finds gradients of the first
                        gradients.is_last = number == train.accumulate - 1
                        with cast():
                            loss = self._task.loss(self.model, fake)
                        loss.backward()
                        del loss
                        gradients.end_pass()
                    self.model.zero_grad()
                    gradients.end_step()
        return live

    def _blocks(self) -> dict[str, dict[str, nn.Parameter]]:
        return parameters_of(self.model, find_blocks(self.model, self.config.reduce.shard_blocks))

    def _held(self, stage: int, num_ranks: int) -> "_Held":
        """What stays from step to step, but for the optimizer's; gradients of a step at stages 0 and 1."""
        all_bytes = num_bytes(self.parameters.values())
        if num_ranks == 1:
            return _Held(all_bytes, all_bytes, 0)
        part = all_bytes // num_ranks
        if stage > 1:  # see `block_weights.Buffers`
            blocks = {name: num_bytes(group.values()) for name, group in self._blocks().items()}
            root, block = blocks.pop("", 0), max(blocks.values(), default=0)
            if stage == 2:  # gradients of two blocks on their way
                return _Held(all_bytes, part, block + max(root, block))
            # And weights of the block that is computed, of the next one, and of what is in no block.
            return _Held(part, part, 3 * block + max(root, block) + root)
        small = sum(each.nbytes for each in self.parameters.values() if each.nbytes < _ALONE_BYTES)
        copies = all_bytes if self.config.reduce.compression != "none" else 0  # half the size to send, and to receive
        return _Held(all_bytes, all_bytes - small, small + copies)


@dataclass(frozen=True)
class _Held:
    weights: int
    gradients: int
    messages: int


class _Gradients:
    """Where a strategy lets a pass's gradients go, and what it and MPI allocate for them on the way.

    groups: parameters whose gradients leave together, as soon as they are complete; others leave at the end of a pass.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], groups: list[list[nn.Parameter]], stage: int, size: int
    ) -> None:
        self.is_last = True  # pass of a step
        self._groups, self._stage, self._size = groups, stage, size
        in_groups = {id(each) for group in groups for each in group}
        self._others = [each for each in parameters.values() if id(each) not in in_groups]
        self._working: deque[torch.Tensor] = deque(maxlen=2)  # of MPI, for the messages under way
        self._parts: list[torch.Tensor] = []  # of gradients, summed
        self._old_parts: list[torch.Tensor] = []

    def __enter__(self) -> Self:
        on = [(each, group) for group in self._groups for each in group] if self._size > 1 else []
        self._hooks = [
            each.register_post_accumulate_grad_hook(partial(self._on_gradient, group)) for each, group in on
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _on_gradient(self, group: list[nn.Parameter], parameter: torch.Tensor) -> None:
        if (self.is_last or self._stage > 1) and all(each.grad is not None for each in group):
            self._send(group)

    def _send(self, group: list[nn.Parameter]) -> None:
        length = sum(each.numel() for each in group)
        if self._stage:
            self._working.append(torch.empty(_MPI_COPIES * length))
        if self._stage == 1:
            self._parts.append(torch.empty(length // self._size))
        if self._stage > 1 or group[0].nbytes < _ALONE_BYTES:
            for each in group:
                each.grad = None

    def end_pass(self) -> None:
        if self._stage > 1:
            self._send(self._others)
            self._working.clear()

    def end_step(self) -> None:
        self._working.clear()
        self._old_parts, self._parts = self._parts, []
        if self._stage == 1:
            _ = [torch.empty(each.numel() * self._size) for each in self._old_parts]  # weights, from all ranks


def num_bytes(tensors: Any) -> int:
    return sum(each.nbytes for each in tensors)


def _bytes_of(batch: Any) -> int:
    found: list[int] = []
    map_tensors(batch, lambda tensor: found.append(tensor.nbytes))
    return sum(found)


def states(config: Config) -> int:
    """How many numbers the optimizer keeps for each weight."""
    return 2 if config.train.optimizer in ("adamw", "lamb") else int(config.train.momentum > 0)


class _LiveBytes(TorchDispatchMode):
    """Adds up the bytes of tensors that are made inside and still referred to, and what malloc leaves between them."""

    def __init__(self, gaps: float) -> None:
        super().__init__()
        self.peak = self.peak_with_gaps = 0.0
        self._gaps, self._now, self._now_in_heap = gaps, 0, 0
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
        self._known.add(key)
        self._count(storage.nbytes())
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._count(-num_bytes)

    def _count(self, num_bytes: int) -> None:
        self._now += num_bytes
        self._now_in_heap += num_bytes if abs(num_bytes) < _PAGES_OF_ITS_OWN else 0
        self.peak = max(self.peak, self._now)
        self.peak_with_gaps = max(self.peak_with_gaps, self._now + self._gaps * self._now_in_heap)


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
