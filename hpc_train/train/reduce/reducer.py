"""Gradient reduction, by `reduce.strategy`: the interface that the loop uses, and which class implements it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from hpc_train.core.phase_clock import Phase
from hpc_train.core.settings import Reduce
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mesh import Mesh
from hpc_train.train.reduce.all_reduce import AllReduce
from hpc_train.train.reduce.block_weights import BlockShards
from hpc_train.train.reduce.fully_sharded import FullySharded
from hpc_train.train.reduce.horovod_library import open_horovod, start_horovod
from hpc_train.train.reduce.local import Local
from hpc_train.train.reduce.parameter_server import Server, Worker
from hpc_train.train.reduce.sharded import Sharded
from hpc_train.train.reduce.sharded_weights import ShardedWeights
from hpc_train.train.reduce.step_flags import ControlFlags, StepFlags
from hpc_train.train.reduce.torch_distributed import TorchTransport, open_torch_distributed, torch_groups
from hpc_train.train.reduce.transports import HorovodTransport, MpiTransport, SplittingTransport, Transport


class Lockstep(Protocol):
    """What a reducer needs whose ranks communicate within forward and backward passes: all make the same passes."""

    waits: Phase  # the time in which this rank waited for others, in passes too: exposed communication

    def end_trial(self) -> None:
        """Collective. Forgets the gradients of the trial of the first batch."""

    def join_forward(self) -> None:
        """Collective. Takes part in a forward pass of other ranks, without a batch of its own."""


class Reducer(Protocol):
    """In each step: `begin_step` before the last backward, `reduce_gradients`, the optimizer, `sync_weights`."""

    num_updates: int  # of a step: an asynchronous server makes one for each worker
    sends_weights: bool  # whether `sync_weights` communicates

    @property
    def shards(self) -> ShardedWeights | BlockShards | None:
        """Which parts of the weights this rank updates; None if every rank makes the whole update."""

    @property
    def lockstep(self) -> Lockstep | None:
        """None if a rank makes its passes through the model alone."""

    def begin_step(self, loss: torch.Tensor) -> None:
        """Sends the gradients of the coming backward pass as they are computed.

        loss: this rank's part of the global mean, which travels with them. Not on a server.
        """

    def reduce_gradients(self) -> StepFlags:
        """Collective. Returns once every gradient that this rank's optimizer uses is the sum over ranks.

        Its time is exposed communication.
        """

    def sum_over_shards(self, value: float) -> float:
        """Collective among the ranks that own different parts: the sum of `value` over them.

        Returns `value` itself if each rank owns everything.
        """

    def sync_weights(self, made: bool) -> bool:
        """Collective. Sends updated parts to the ranks that compute with them.

        made: whether this rank's optimizer made the update. Returns whether the owners of the weights made it.
        """


def keeps_parts(settings: Reduce, size: int) -> bool:
    """Whether a rank makes its parts of the first weights alone, so that the model need not be whole anywhere."""
    return settings.strategy == "sharded" and settings.stage > 1 and size > 1


@contextmanager
def open_reducer(
    settings: Reduce,
    model: nn.Module,
    mesh: Mesh,
    control: ControlFlags,
    draw: Callable[[str], torch.Tensor] | None = None,
) -> Iterator[Reducer]:
    """Collective. Sends the root's weights to all ranks, then reduces by `reduce.strategy` until the end.

    draw: the initial value of each trainable parameter, if the model has their shapes alone (see `keeps_parts`). They
    are then not sent: each rank draws what it keeps.
    """
    strategy, size = settings.strategy, mesh.ranks.world.size
    device = next(model.parameters()).device
    name = _transport_name(settings, device)
    hvd = open_horovod(settings, model, mesh.ranks) if name == "horovod" else None
    held = [each for each in (*model.parameters(), *model.buffers()) if not (draw and each.requires_grad)]
    broadcast_tensors(held, mesh.ranks)
    if size == 1:
        # Its gradients are the sum already. Sending them through Horovod all the same made the one rank's step a tenth
        # longer, and every speedup over that baseline too good.
        yield Local(control)
    elif strategy == "parameter_server":
        yield Worker(settings, model, mesh, control) if mesh.trains else Server(settings, model, mesh, control)
    else:
        with open_torch_distributed(mesh.ranks, device) if name == "torch" else nullcontext():
            yield _open_lockstep(name, hvd, settings, model, mesh, control, draw)


def _open_lockstep(
    name: str,
    hvd: Any,
    settings: Reduce,
    model: nn.Module,
    mesh: Mesh,
    control: ControlFlags,
    draw: Callable[[str], torch.Tensor] | None,
) -> Reducer:
    """Collective. The reducer of ranks that all train and that all take every step together."""
    if settings.strategy != "sharded":
        assert mesh.replica.context is not None
        return AllReduce(_open_transport(name, hvd, mesh.replica.context), settings, model, control)
    within, between = _open_transports(name, hvd, mesh)
    if settings.stage == 1:
        assert mesh.shard.context is not None
        return Sharded(within, between, model, mesh.shard.context, control)
    return FullySharded(within, between, settings, model, mesh, control, draw)


def _transport_name(settings: Reduce, device: torch.device) -> str:
    """Which library sends: "mpi", "horovod" or "torch"."""
    if settings.strategy != "sharded":
        return settings.strategy if settings.strategy in ("horovod", "torch") else "mpi"
    if settings.transport == "auto":
        return "horovod" if device.type == "cuda" else "mpi"
    return settings.transport


def _open_transport(name: str, hvd: Any, context: Context) -> Transport:
    """Collective. Among all ranks, which `context` joins. hvd: Horovod's library, if it sends."""
    if name == "mpi":
        return SplittingTransport(MpiTransport(context))
    if name == "torch":
        return SplittingTransport(TorchTransport(context.world.size))
    start_horovod(hvd)
    return SplittingTransport(HorovodTransport(hvd, context.world.size))


def _open_transports(name: str, hvd: Any, mesh: Mesh) -> tuple[Transport, Transport | None]:
    """Collective. Along the mesh's axis `shard`, and along `replica`; None with one replica."""
    shard, replica = mesh.shard.context, mesh.replica.context
    assert shard is not None and replica is not None
    if replica.world.size == 1:
        return _open_transport(name, hvd, shard), None
    if name == "mpi":
        return _open_transport(name, hvd, shard), _open_transport(name, hvd, replica)
    axes = [axis for axis in (shard, replica) if axis.world.size < mesh.ranks.world.size]
    groups = [group for axis in axes for group in _groups(axis, mesh.ranks)]
    sets = torch_groups(groups) if name == "torch" else start_horovod(hvd, groups)
    by_members = dict(zip(groups, sets, strict=True))
    within, between = (
        SplittingTransport(_among(name, hvd, axis.world.size, by_members.get(_members(axis, mesh.ranks))))
        for axis in (shard, replica)
    )
    return within, between


def _among(name: str, hvd: Any, size: int, ranks: Any) -> Transport:
    """ranks: the library's own set of them; None for all."""
    return TorchTransport(size, ranks) if name == "torch" else HorovodTransport(hvd, size, ranks)


def _members(axis: Context, ranks: Context) -> tuple[int, ...]:
    """Collective along an axis. Which of all `ranks` are on it."""
    return tuple(axis.all_gather(ranks.world.rank))


def _groups(axis: Context, ranks: Context) -> list[tuple[int, ...]]:
    """Collective. The members of every axis of this kind."""
    return sorted(set(ranks.all_gather(_members(axis, ranks))))


def broadcast_model(model: nn.Module, context: Context) -> None:
    """Collective. Overwrites parameters and buffers with the root's."""
    broadcast_tensors((*model.parameters(), *model.buffers()), context)


def broadcast_tensors(tensors: Iterable[torch.Tensor], context: Context) -> None:
    """Collective. Overwrites tensors with the root's."""
    if context.world.size == 1:
        return
    for tensor in tensors:
        host = tensor.detach().cpu().contiguous()
        context.broadcast_array(host.reshape(-1).view(torch.uint8).numpy())
        if host.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(host)
