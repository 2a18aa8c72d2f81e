"""Gradients, and at stage 3 weights, divided among the ranks (ZeRO stages 2 and 3: Rajbhandari et al., SC 2020).

Stage 2: each block's gradients are summed as soon as backward has computed them, each rank receives its part, and the
whole gradients are freed. Stage 3: so are weights. A block's weights are gathered before its forward pass, freed after
it, and gathered again before its backward pass, always one block ahead. A rank then sends and receives 3 (N-1)/N times
the weights' bytes a step: two gathers and one reduce-scatter; a ring all-reduce moves 2 (N-1)/N.

Every rank must gather the same blocks in the same order. The trial of the first batch records the order, and compares
the ranks at each block; from then on a rank that leaves it raises an error instead of hanging.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from hpc_train.core.errors import UserError
from hpc_train.core.phase_clock import Phase
from hpc_train.core.settings import Reduce
from hpc_train.train.comm.context import Context, joint
from hpc_train.train.comm.mesh import Mesh
from hpc_train.train.reduce.block_weights import BlockShards, BlockWeights, Buffers
from hpc_train.train.reduce.buckets import Bucket
from hpc_train.train.reduce.cast_weights import CastWeights
from hpc_train.train.reduce.shard_blocks import find_blocks, parameters_of
from hpc_train.train.reduce.step_flags import NUM_FLAGS, ControlFlags, StepFlags
from hpc_train.train.reduce.transports import Pending, Transport, arriving_in

_MAX_SENDING = 2  # blocks whose gradients are on their way: each holds a whole block's gradients


class Visit(NamedTuple):
    """A rank comes to a block."""

    direction: str  # "forward" or "backward"
    block: str

    def __str__(self) -> str:
        return f"{self.block} ({self.direction})"


class VisitOrder:
    """In which order a rank comes to the blocks: recorded in the first pass, and the same in every later one."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._visits: list[Visit] = []
        self._position = 0
        self._is_recorded = False

    def begin_pass(self) -> None:
        self._position = 0
        if not self._is_recorded:
            self._visits.clear()

    def come_to(self, visit: Visit) -> None:
        """Collective while the order is recorded. Raises UserError if this rank is not where it should be."""
        if not self._is_recorded:
            self._require_all_at(visit)
            self._visits.append(visit)
        elif self.next != visit:
            here = "the end of the pass" if self.next is None else str(self.next)
            raise _other_path(f"rank {self._context.world.rank} is at {visit} and was at {here} in the first step")
        self._position += 1

    def end_pass(self) -> None:
        """After a backward pass. Collective while the order is recorded."""
        if not self._is_recorded:
            self._require_all_at(Visit("end", "the end of the pass"))
            self._is_recorded = True
        elif self.next is not None:
            rank = self._context.world.rank
            raise _other_path(f"rank {rank} is at the end of the pass and was at {self.next} in the first step")

    def _require_all_at(self, visit: Visit) -> None:
        everyone = self._context.all_gather(visit)
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                raise joint(_other_path(f"rank 0 is at {everyone[0]} while rank {rank} is at {other}"))

    @property
    def next(self) -> Visit | None:
        """Where this rank comes next; None at the end, and while the order is recorded."""
        return self._visits[self._position] if self._is_recorded and self._position < len(self._visits) else None

    def forward_blocks(self, default: list[str]) -> list[str]:
        """The blocks of a forward pass in their order; `default` if none is recorded."""
        recorded = [visit.block for visit in self._visits if visit.direction == "forward"]
        return recorded if self._is_recorded else default


def _other_path(what: str) -> UserError:
    return UserError(
        f"reduce.strategy = 'sharded': ranks take different paths through the model: {what}",
        "All ranks must use the same blocks in the same order in every step. Name larger blocks that hold all the "
        "paths (reduce.shard_blocks), or use reduce.stage = 1.",
    )


@dataclass
class _Sending:
    block: BlockWeights
    message: torch.Tensor
    pending: Pending
    completes: bool  # the gradients of a step: nothing will be added


class FullySharded:
    """See `reducer.Reducer`.

    transport: along the mesh's axis `shard`, which gathers do not leave. between: along its axis `replica`, on which
    the parts of gradients are summed once a step; None if there is one copy of the weights.
    draw: see `BlockWeights`. Raises UserError on all ranks alike if a part of the weights cannot be made.
    """

    num_updates = 1

    def __init__(
        self,
        transport: Transport,
        between: Transport | None,
        settings: Reduce,
        model: nn.Module,
        mesh: Mesh,
        control: ControlFlags,
        draw: Callable[[str], torch.Tensor] | None = None,
    ) -> None:
        assert mesh.shard.context is not None
        context = mesh.shard.context
        self._transport, self._between, self._context, self._control = transport, between, context, control
        self.lockstep, self.waits = self, Phase()
        self._frees = settings.stage == 3
        self.sends_weights = not self._frees
        modules = mesh.ranks.on_all(partial(find_blocks, model, settings.shard_blocks))
        groups = parameters_of(model, modules)
        world = context.world
        blocks = mesh.ranks.on_all(
            lambda: {name: BlockWeights(name, group, world.size, world.rank, draw) for name, group in groups.items()}
        )
        self._root = blocks.pop("", None)
        self._blocks = {block.name: block for block in blocks.values()}
        self.shards = BlockShards([*([self._root] if self._root else []), *blocks.values()])
        self._buffers = Buffers()
        self._gathering: dict[str, tuple[torch.Tensor, Pending]] = {}
        self._sending: deque[_Sending] = deque()
        cast = [CastWeights(model, block, world.size) for block in self._blocks.values()] if self._frees else []
        self._cast = {each.name: each for each in cast if each.saves_bytes}
        self._autocast_dtype: torch.dtype | None = None  # of this pass
        self._is_last_pass = False  # of a step
        self._summing: list[Pending] = []  # over the copies
        self._order = VisitOrder(mesh.ranks)
        self._in_backward: BlockWeights | None = None  # whose gradients arrive now
        self._missing: dict[str, int] = {}  # block -> how many of its gradients have not arrived in this pass
        self._sent: set[str] = set()  # blocks, in this pass
        self._is_pass_open = False
        self._open_hooks: list[saved_tensors_hooks] = []
        self._flags = Bucket("gradients", [], NUM_FLAGS, self.shards.blocks[0].device)
        for block in self.shards.blocks:
            if not self._frees:
                block.keep(transport.all_gather(block.own, f"{block.name}.weights", block.new_whole()).wait())
        self._attach(model, {name: modules[name] for name in blocks})

    # --------------------------------------------------------------------------------------------- hooks in the model

    def _attach(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        model.register_forward_pre_hook(lambda *_: self._begin_forward())
        model.register_forward_hook(lambda *_: self._end_forward(), always_call=True)
        for name, module in modules.items():
            block = self._blocks[name]
            module.register_forward_pre_hook(partial(self._before_forward, block))
            module.register_forward_hook(partial(self._after_forward, block), always_call=True)
        for block in self.shards.blocks:
            for parameter in block.parameters.values():
                parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, block))

    def _begin_forward(self) -> None:
        if self._is_pass_open and self._in_backward is None and self._missing:
            raise UserError(
                "reduce.strategy = 'sharded': Task.loss calls the model twice before one backward pass",
                "Call the model once for all samples of a batch, or use reduce.stage = 1.",
            )
        self._end_pass()  # that of the part of the batch before this one
        kind = self.shards.blocks[0].device.type
        self._autocast_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self._order.begin_pass()
        if self._root:
            self._gather(self._root)

    def _end_forward(self) -> None:
        if torch.is_grad_enabled():
            self._is_pass_open = True
        else:
            self._free(self._root)  # in a test no backward pass follows

    def _before_forward(self, block: BlockWeights, module: nn.Module, inputs: Any) -> None:
        if torch.is_grad_enabled() and block.name in self._missing:
            raise UserError(
                f"reduce.strategy = 'sharded': {block.name} is used twice in one forward pass",
                "Name a larger block that holds both uses (reduce.shard_blocks), or use reduce.stage = 1.",
            )
        self._visit(Visit("forward", block.name), block)
        if torch.is_grad_enabled():
            self._missing[block.name] = len(block.parameters)
        # Autograd would hold the gathered weights until backward: it keeps their places in the block instead.
        self._open_hooks.append(saved_tensors_hooks(partial(self._pack, block), partial(self._unpack, block)))
        self._open_hooks[-1].__enter__()

    def _after_forward(self, block: BlockWeights, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._open_hooks:
            self._open_hooks.pop().__exit__(None, None, None)
        for tensor in _tensors(outputs):
            if tensor.requires_grad:
                # Fires when backward comes to the block. A module's own backward hook would forbid what follows the
                # block to work in place.
                tensor.register_hook(lambda _: self._before_backward(block))
        if self._order.next != Visit("backward", block.name) or not torch.is_grad_enabled():
            self._free(block)

    def _before_backward(self, block: BlockWeights) -> None:
        if self._in_backward is block:
            return  # another output of the same block
        if self._in_backward is not None:
            self._send(self._in_backward)  # without gradients of parameters that this rank did not use
        self._in_backward = block
        self._visit(Visit("backward", block.name), block)

    def _pack(self, block: BlockWeights, saved: torch.Tensor) -> Any:
        self._progress()
        weights = block.weights
        if weights is None or saved.untyped_storage().data_ptr() != weights.untyped_storage().data_ptr():
            return saved
        return saved.storage_offset(), saved.shape, saved.stride()

    def _unpack(self, block: BlockWeights, packed: Any) -> torch.Tensor:
        self._progress()
        if isinstance(packed, torch.Tensor):
            return packed
        if block.weights is None:
            self._before_backward(block)  # no output of the block told that backward has come to it
        assert block.weights is not None
        offset, shape, stride = packed
        return block.weights.as_strided(shape, stride, offset)

    def _progress(self) -> None:
        self._transport.progress()
        if self._between:
            self._between.progress()

    def _on_gradient(self, block: BlockWeights, parameter: torch.Tensor) -> None:
        if block is self._root or block.name not in self._missing:
            return  # those outside of blocks arrive at any time, and leave at the end
        if block.name in self._sent:
            raise UserError(
                f"reduce.strategy = 'sharded': a gradient of {block.name} arrived after backward had left the block",
                "Blocks side by side belong into one: name it in reduce.shard_blocks, or use reduce.stage = 1.",
            )
        self._missing[block.name] -= 1
        if self._missing[block.name] == 0:
            self._send(block)

    # ------------------------------------------------------------------------------------------ weights and gradients

    def _visit(self, visit: Visit, block: BlockWeights) -> None:
        """This rank has come to `block`: gathers its weights, and begins to gather those of the next one."""
        self._order.come_to(visit)
        self._gather(block)
        following = self._order.next
        if following is not None and (following.direction == "forward" or torch.is_grad_enabled() or self._in_backward):
            self._begin_gather(self._blocks[following.block])

    def _begin_gather(self, block: BlockWeights) -> None:
        if self._frees and block.weights is None and block.name not in self._gathering:
            if self._autocast_dtype and block.name in self._cast:
                buffer = self._buffers.take(block, self._autocast_dtype)
                pending = self._cast[block.name].begin(self._transport, buffer)
            else:
                buffer = self._buffers.take(block)
                pending = self._transport.all_gather(block.own, f"{block.name}.weights", buffer)
            self._gathering[block.name] = buffer, pending

    def _gather(self, block: BlockWeights) -> None:
        self._begin_gather(block)
        if block.name in self._gathering:
            buffer, pending = self._gathering.pop(block.name)
            with self.waits, self._context.waiting:
                pending.wait()
            if block.weights is None:
                block.set(buffer)

    def _free(self, block: BlockWeights | None) -> None:
        if self._frees and block is not None and block.weights is not None:
            self._buffers.give(block.weights)
            block.unset()

    def _send(self, block: BlockWeights) -> None:
        """Begins to sum the block's gradients over ranks; its weights are no longer needed in this pass."""
        if block.name in self._sent:
            return
        self._sent.add(block.name)
        while len(self._sending) >= _MAX_SENDING or any(each.block is block for each in self._sending):
            self._receive()
        message = block.fill(self._buffers.take(block))
        # The first part of a batch is received in place, later ones are added.
        into = torch.empty_like(block.gradient) if block.has_gradient else block.gradient
        pending = self._transport.reduce_scatter(message, f"{block.name}.gradients", into)
        self._sending.append(_Sending(block, message, pending, self._is_last_pass))
        if block is not self._root:  # its weights serve all parts of a batch
            self._free(block)

    def _receive(self) -> None:
        sending = self._sending.popleft()
        block = sending.block
        with self.waits, self._context.waiting:
            received = sending.pending.wait()
        if block.has_gradient:
            block.gradient += received
        block.has_gradient = True
        self._buffers.give(sending.message)
        if self._between and sending.completes:
            pending = self._between.sum(block.gradient, f"{block.name}.between")
            self._summing.append(arriving_in(pending, block.gradient))

    def _end_pass(self) -> None:
        """Sends what is left of a forward and backward pass, and checks that it came to every block."""
        if not self._is_pass_open:
            return
        if self._in_backward is not None:
            self._send(self._in_backward)
        for name in self._missing:
            self._free(self._blocks[name])  # those whose output had no gradient
        if self._root:
            self._send(self._root)
        self._order.end_pass()
        self._in_backward, self._is_pass_open = None, False
        self._missing.clear()
        self._sent.clear()

    def _finish(self) -> None:
        self._end_pass()
        while self._sending:
            self._receive()
        self._free(self._root)

    # ------------------------------------------------------------------------------------------------ the interface

    def begin_step(self, loss: torch.Tensor) -> None:
        self._is_last_pass = True
        self._flags.write_flags(loss, self._control)

    def reduce_gradients(self) -> StepFlags:
        self._finish()
        for summing in self._summing:
            summing.wait()
        self._summing.clear()
        self._is_last_pass = False
        for block in self.shards.blocks:
            for owned in block.owned:
                owned.parameter.grad = block.segment(block.gradient, owned.name) if block.has_gradient else None
            block.has_gradient = False
        flags = self._flags.fill().view(-1)
        for transport in filter(None, (self._transport, self._between)):
            arriving_in(transport.sum(flags, self._flags.name, is_last=True), flags).wait()
        return self._flags.read_flags()

    def end_trial(self) -> None:
        """Collective. Forgets the gradients of the trial of the first batch."""
        self._finish()
        for block in self.shards.blocks:
            block.has_gradient = False

    def join_forward(self) -> None:
        """Collective. Takes part in a forward pass of other ranks, without a batch of its own."""
        if not self._frees:
            return
        with torch.no_grad():
            self._begin_forward()
            for name in self._order.forward_blocks(list(self._blocks)):
                self._visit(Visit("forward", name), self._blocks[name])
                self._free(self._blocks[name])
            self._end_forward()

    def sum_over_shards(self, value: float) -> float:
        return float(self._context.sum(np.array([value]))[0])

    def sync_weights(self, made: bool) -> bool:
        if not self._frees:
            for block in self.shards.blocks:
                # A copy is sent, since MPI must not read where it writes.
                pending = self._transport.all_gather(block.own.clone(), f"{block.name}.weights", block.weights)
                pending.wait()
        return made


def _tensors(outputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        yield outputs
    elif isinstance(outputs, tuple | list):
        for each in outputs:
            yield from _tensors(each)
    elif isinstance(outputs, dict):
        yield from _tensors(list(outputs.values()))
