"""The memory that a rank needs to train a job, from shapes alone: no weight is allocated and no MPI started.

The loss of one micro-batch and its backward pass run on torch's fake tensors, which have a shape, a type and a device
but no bytes. What would be alive at a time is added up, and the largest sum counts. Around it stands what the strategy
keeps, by a formula. Weights, gradients and states of N ranks: Rajbhandari et al., "ZeRO", SC 2020, section 5.
"""

import weakref
from collections import deque
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from math import ceil, inf
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_train.core.errors import UserError
from hpc_train.core.formatting import amount
from hpc_train.core.key_rules import check_ranks
from hpc_train.core.settings import Config, Reduce
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.data.device_queue import map_tensors
from hpc_train.train.data.node_memory import available_bytes_per_rank
from hpc_train.train.device import autocast, recompute_blocks
from hpc_train.train.initial_weights import build
from hpc_train.train.reduce.block_weights import Buffers, Flat
from hpc_train.train.reduce.buckets import trainable_parameters
from hpc_train.train.reduce.shard_blocks import find_blocks, parameters_of
from hpc_train.train.run.peak_memory import anonymous_bytes
from hpc_train.train.tasks import Task, open_task
from hpc_train.train.trainable import limited

_ALONE_BYTES = 1 << 20  # as in `reduce.buckets`: smaller gradients are copied into messages, which stay
_NUM_STEPS = 2  # the second finds what the first one keeps
_NUM_BATCHES = 2  # the one in use, and the next
_MOST_RANKS = 1 << 20  # that are tried for the smallest number that fits
_USABLE = 0.75  # of a rank's memory, for weights, gradients and optimizer: what is proposed leaves some for the rest
_TRIED_NODES, _STILL_SHRINKS = 8, 0.98  # beyond so many nodes, twice as many must need less of a rank
# Measured on x86-64 with torch 2.13, Open MPI 4.1 and Horovod 0.28 (make bench-memory prints what is left over):
_GAPS = 0.45  # of what moves in the heap: malloc's gaps between freed and living tensors, which stay with the process
_GAPS_RECOMPUTED = 0.3  # the same with activation checkpointing: see `device.give_back_freed_memory`
_PAGES_OF_ITS_OWN = 32 << 20  # bytes from which on malloc takes none of the heap, at the latest (mallopt(3))
_STARTED_BYTES = 20 << 20  # a rank's MPI, threads and kernels beyond what the command itself takes


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at its fullest moment, by what they are for."""

    weights: int  # and buffers, such as running statistics
    gradients: int
    optimizer: int
    activations: int  # what forward keeps for backward, and temporary results at that moment, such as logits
    messages: int  # copies of gradients or weights for other ranks
    gaps: int  # that malloc leaves between tensors: measured, see `_GAPS`
    checkpoint: int  # the copy of a rank's share of the state, which is written while training goes on
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
        self.model = self._without_bytes(build(partial(limited, self._task.model, config.train), config.seed).model)
        self.parameters = trainable_parameters(self.model)
        if config.train.activation_checkpointing:
            recompute_blocks(self.model)

    def with_reduce(self, **keys: Any) -> "Trial":
        """The same job with other keys of `reduce`."""
        other = copy(self)
        other.config = self.config.model_copy(update={"reduce": self.config.reduce.model_copy(update=keys)})
        return other

    def _without_bytes(self, model: nn.Module) -> nn.Module:
        """`model` with fake tensors of the CPU in place of its own; what was tied still is."""
        twins: dict[int, Any] = {}
        with self._fake:
            for module in model.modules():
                own: dict[str, Any]
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

    def memory(self, num_ranks: int, ranks_per_node: int | None = None) -> Memory:
        """Of one of `num_ranks` ranks. Raises UserError for a number that the job cannot train on."""
        check_ranks(self.config, num_ranks)
        train = self.config.train
        divided = Division.of(self.config.reduce, num_ranks, ranks_per_node or num_ranks)
        share = -(-self.config.global_batch(num_ranks) // num_ranks)
        batch = self._task.batch(np.arange(-(-share // train.accumulate)), 0)
        all_bytes = num_bytes(self.parameters.values())
        certain = certain_bytes(self.config, all_bytes, divided)
        small = sum(each.nbytes for each in self.parameters.values() if each.nbytes < _ALONE_BYTES)
        in_messages = small if divided.stage < 2 and num_ranks > 1 else 0
        live = self._steps(batch, divided)
        moving = certain.gradients - in_messages if divided.stage < 2 else 0  # gradients that come and go
        return Memory(
            weights=certain.weights + num_bytes((*self.model.parameters(), *self.model.buffers())) - all_bytes,
            gradients=certain.gradients - in_messages,
            optimizer=certain.optimizer,
            activations=max(0, int(live.peak) - moving),
            messages=in_messages + self._messages(divided),
            gaps=int(live.peak_with_gaps - live.peak),
            checkpoint=(1 + states(self.config)) * all_bytes // num_ranks if saves_while_training(self.config) else 0,
            input=_NUM_BATCHES * train.accumulate * _bytes_of(batch),
            base=self.base,
        )

    def _steps(self, batch: Any, divided: "Division") -> "_LiveBytes":
        """What the first steps allocate, on tensors without bytes."""
        train = self.config.train
        cast = autocast(train, torch.device("cpu"))
        groups = [[each] for each in self.parameters.values()]
        if divided.stage > 1:
            groups = [list(group.values()) for name, group in self._blocks().items() if name]
        with self._fake, _Gradients(self.parameters, groups, divided) as gradients:
            fake = map_tensors(batch, self._fake.from_tensor)
            with _LiveBytes(_GAPS_RECOMPUTED if train.activation_checkpointing else _GAPS) as live:
                for _ in range(_NUM_STEPS):
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

    def _messages(self, divided: "Division") -> int:
        """Bytes of the buffers that a strategy keeps for messages, small gradients apart."""
        if divided.stage < 2:
            # With compression: half the size to send, and as much to receive.
            all_bytes = num_bytes(self.parameters.values())
            return all_bytes if divided.size > 1 and self.config.reduce.compression != "none" else 0
        lengths = {name: sum(each.numel() for each in group.values()) for name, group in self._blocks().items()}
        root = lengths.pop("", 0)
        precision = self.config.train.precision
        gathered = torch.float32 if precision == "fp32" else torch.float16  # two bytes, as bf16
        return _buffer_bytes(list(lengths.values()), root, gathered if divided.stage == 3 else None)


@dataclass(frozen=True)
class Division:
    """What is divided, among how many ranks. stage: 0 if every rank keeps everything."""

    stage: int
    shards: int
    size: int  # all ranks

    @classmethod
    def of(cls, reduce: Reduce, num_ranks: int, ranks_per_node: int) -> Self:
        if reduce.strategy != "sharded" or num_ranks == 1:
            return cls(0, 1, num_ranks)
        within = {"job": num_ranks, "node": min(num_ranks, ranks_per_node)}.get(str(reduce.shard_within))
        return cls(reduce.stage, within or int(reduce.shard_within), num_ranks)


@dataclass(frozen=True)
class Certain:
    """Bytes that a rank holds at the end of every backward pass, whatever else it needs."""

    weights: int
    gradients: int
    optimizer: int


def certain_bytes(config: Config, all_bytes: int, divided: Division) -> Certain:
    """Of `all_bytes` of trainable weights: stage 1 divides the optimizer's state, 2 gradients, too, 3 weights, too."""
    part = all_bytes // divided.shards
    return Certain(
        weights=part if divided.stage == 3 else all_bytes,
        gradients=part if divided.stage >= 2 else all_bytes,
        optimizer=states(config) * (part if divided.stage else all_bytes),
    )


def room_bytes(context: Context, device: torch.device) -> int:
    """Collective. How many bytes of weights, gradients and states each rank may hold at least, on `device`."""
    available = available_bytes_per_rank(context)
    return available if device.type == "cpu" else int(torch.cuda.mem_get_info(device)[0])


def divided_bytes(config: Config, all_bytes: int, stage: int) -> int:
    """Bytes of all shards together that a stage divides among ranks; 0 of stage 0."""
    # One rank of two keeps the half of them, and all of the rest.
    kept = (sum(vars(certain_bytes(config, all_bytes, Division(stage, shards, shards))).values()) for shards in (1, 2))
    return 2 * (next(kept) - next(kept))


def require_room(config: Config, model: nn.Module, divided: Division, available: int) -> None:
    """Raises UserError if what a rank certainly holds is more than the `available` bytes, with what would fit.

    What depends on a batch, on libraries and on malloc is not counted: a job that may fit is not refused.
    """
    if not config.run.check_memory or config.reduce.strategy in ("parameter_server", "own"):
        return
    all_bytes = num_bytes(trainable_parameters(model).values())
    needed = certain_bytes(config, all_bytes, divided)
    total = sum(vars(needed).values())
    if total <= available:
        return
    parts = ", ".join(f"{name} {amount(each, 'B')}" for name, each in vars(needed).items())
    raise UserError(
        f"this job needs {amount(total, 'B')} a rank before activations and messages ({parts}), and a rank has "
        f"{amount(available, 'B')}",
        f"{_what_fits(config, all_bytes, divided, available)} hpc-train memory prints all parts; "
        "run.check_memory = false tries all the same.",
    )


def expected_peak_bytes(config: Config, model: nn.Module, divided: Division, tried: int, most: int) -> int:
    """The largest memory that this rank expects to take, told before its first step.

    tried: what it took at most until the end of the trial of the first batch, which holds everything but the
    optimizer's state and the copy for a checkpoint. On a CPU the state fills gaps that the next pass misses.
    most: what it may take: a copy that would exceed it is not made.
    """
    all_bytes = num_bytes(trainable_parameters(model).values())
    is_on_cpu = next(model.parameters()).device.type == "cpu"
    gaps = (_GAPS_RECOMPUTED if config.train.activation_checkpointing else _GAPS) if is_on_cpu else 0.0
    needed = tried + int((1 + gaps) * certain_bytes(config, all_bytes, divided).optimizer)
    is_copied = is_on_cpu and saves_while_training(config)
    copy = (1 + states(config)) * all_bytes // divided.size if is_copied else 0
    return needed + copy if needed + copy <= most else needed


def saves_while_training(config: Config) -> bool:
    """Else the only copy for a checkpoint is made at the end, when activations and gradients are gone."""
    checkpoint = config.checkpoint
    return checkpoint.keep > 0 and (checkpoint.every_steps > 0 or checkpoint.every_minutes > 0)


def _what_fits(config: Config, all_bytes: int, divided: Division, available: int) -> str:
    usable, keys = _USABLE * available, "reduce.strategy = 'sharded'"
    first = divided.stage + 1
    if config.reduce.shard_within != "job":
        keys += ", reduce.shard_within = 'job'"
        first = max(1, divided.stage)  # the same stage among more ranks
    for stage in range(first, 4):
        needed = sum(vars(certain_bytes(config, all_bytes, Division(stage, divided.size, divided.size))).values())
        if divided.size > 1 and (needed <= usable or (stage == 3 and needed <= available)):
            told = f"{amount(needed, 'B')} a rank, with activations and messages still to come."
            return f"Set {keys} and reduce.stage = {stage}: {told}"
    num_ranks = ceil((2 + states(config)) * all_bytes / max(1, usable))
    return f"Start {num_ranks:,} ranks or more with as much memory each, with {keys} and reduce.stage = 3."


def _buffer_bytes(lengths: list[int], root: int, gathered: torch.dtype | None) -> int:
    """What `Buffers` holds after forward and backward passes of `fully_sharded.FullySharded`.

    lengths: of blocks, in the model's order; root: of what is in no block. gathered: as what type weights are, one
    block ahead; None if they stay.
    """
    buffers = Buffers()
    for _ in range(_NUM_STEPS):  # buffers of the first are not those that the second would choose
        _pass_through(buffers, lengths, root, gathered)
    return buffers.num_bytes


def _pass_through(buffers: Buffers, lengths: list[int], root: int, gathered: torch.dtype | None) -> None:
    sending = deque[torch.Tensor]()
    weights: dict[int, torch.Tensor] = {}
    own = [buffers.take(Flat(root))] if gathered and root else []
    order = [*range(len(lengths)), *reversed(range(len(lengths)))]
    for place, block in enumerate(order):
        if gathered:
            for each in (block, *order[place + 1 : place + 2]):
                if each not in weights:
                    weights[each] = buffers.take(Flat(lengths[each]), gathered)
        if place >= len(lengths):
            _send(buffers, sending, lengths[block])
        if gathered and order[place + 1 : place + 2] != [block]:
            buffers.give(weights.pop(block))
    if root:
        _send(buffers, sending, root)
    for each in (*sending, *own):
        buffers.give(each)


def _send(buffers: Buffers, sending: deque[torch.Tensor], length: int) -> None:
    if len(sending) == 2:
        buffers.give(sending.popleft())
    sending.append(buffers.take(Flat(length)))


class _Gradients:
    """Where a strategy lets a pass's gradients go, and what it and MPI allocate for them on the way.

    groups: parameters whose gradients leave together, as soon as they are complete; others leave at the end of a pass.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], groups: list[list[nn.Parameter]], divided: Division
    ) -> None:
        self.is_last = True  # pass of a step
        self._groups, self._stage, self._shards = groups, divided.stage, divided.shards
        self._is_sent = divided.size > 1
        in_groups = {id(each) for group in groups for each in group}
        self._others = [each for each in parameters.values() if id(each) not in in_groups]
        self._working: deque[torch.Tensor] = deque(maxlen=2)  # of Open MPI's all-to-all in place: a rank's part
        self._parts: list[torch.Tensor] = []  # of gradients, summed
        self._old_parts: list[torch.Tensor] = []

    def __enter__(self) -> Self:
        on = [(each, group) for group in self._groups for each in group] if self._is_sent else []
        self._hooks = [each.register_post_accumulate_grad_hook(partial(self._on_gradient, group)) for each, group in on]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _on_gradient(self, group: list[nn.Parameter], parameter: torch.Tensor) -> None:
        if (self.is_last or self._stage > 1) and all(each.grad is not None for each in group):
            self._send(group)

    def _send(self, group: list[nn.Parameter]) -> None:
        part_length = sum(each.numel() for each in group) // self._shards
        if self._stage:
            self._working.append(torch.empty(part_length))
        if self._stage == 1:
            self._parts.append(torch.empty(part_length))
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
            _ = [torch.empty(each.numel() * self._shards) for each in self._old_parts]  # weights, from all ranks


def num_bytes(tensors: Any) -> int:
    return sum(each.nbytes for each in tensors)


def _bytes_of(batch: Any) -> int:
    found: list[int] = []
    map_tensors(batch, lambda tensor: found.append(tensor.nbytes))
    return sum(found)


def states(config: Config) -> int:
    """How many numbers the optimizer keeps for each weight; of another package's as many as Adam, as most do."""
    if config.train.optimizer in ("sgd", "lars"):
        return int(config.train.momentum > 0)
    return 2


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
    """(the ranks of the fewest full nodes that hold their own, in powers of two; the memory of one); None if none."""
    num_ranks, before = ranks_per_node, inf
    while num_ranks <= _MOST_RANKS:
        with suppress(UserError):  # not a number that the job can train on
            memory = trial.memory(num_ranks, ranks_per_node)
            if memory.total * ranks_per_node <= node_bytes:
                return num_ranks, memory
            if num_ranks > _TRIED_NODES * ranks_per_node and memory.total > _STILL_SHRINKS * before:
                return None
            before = memory.total
        num_ranks *= 2
    return None


def smallest_by_strategy(trial: Trial, ranks_per_node: int, node_bytes: float) -> dict[str, tuple[int, Memory] | None]:
    """`smallest` with whole weights on each rank, and with each stage of the strategy sharded."""
    choices: dict[str, dict[str, Any]] = {"mpi": {"strategy": "mpi"}}
    choices |= {f"sharded, stage {stage}": {"strategy": "sharded", "stage": stage} for stage in (1, 2, 3)}
    return {name: smallest(trial.with_reduce(**keys), ranks_per_node, node_bytes) for name, keys in choices.items()}
