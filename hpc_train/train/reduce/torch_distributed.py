"""torch.distributed as a transport: NCCL or RCCL between GPUs, gloo between CPUs, on the ranks that MPI started."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from hpc_train.core.errors import UserError
from hpc_train.train.comm.connections import root_addresses
from hpc_train.train.comm.context import Context, raised_on_all_ranks
from hpc_train.train.reduce.gpus import require_gpu_per_rank
from hpc_train.train.reduce.transports import Pending, arriving_in

# Former names, until torch 2.13 is the oldest one that is supported.
_reduce_scatter = getattr(distributed, "reduce_scatter_single", distributed.reduce_scatter_tensor)
_all_gather = getattr(distributed, "all_gather_single", distributed.all_gather_into_tensor)
_NEVER = timedelta(days=365)  # the watchdog ends a job that hangs, and names the rank


@contextmanager
def open_torch_distributed(context: Context, device: torch.device) -> Iterator[None]:
    """Collective. torch.distributed over the ranks of `context`, until the end. Raises UserError.

    GLOO_SOCKET_IFNAME, torch's own variable, names the network interface.
    """
    context.on_all(_require_torch_distributed)
    require_gpu_per_rank("torch", device, True, context)
    addresses = root_addresses(context, os.environ.get("GLOO_SOCKET_IFNAME"))
    world = context.world
    host = addresses[0] if addresses else context.on_root(lambda: world.host)
    # The system chooses the port, so the root listens before the others know where.
    store = _listen(host) if world.is_root else None
    port = context.on_root(lambda: store.port if store is not None else 0)
    store = store or TCPStore(host, port, is_master=False)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with context.waiting:
        distributed.init_process_group(backend, timeout=_NEVER, store=store, rank=world.rank, world_size=world.size)
    try:
        yield
    except BaseException as error:
        if raised_on_all_ranks(error):  # else this rank ends the job, and NCCL would wait for the others
            distributed.destroy_process_group()
        raise
    distributed.destroy_process_group()


def _listen(host: str) -> Any:
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def _require_torch_distributed() -> None:
    if not distributed.is_available():
        raise UserError(
            "reduce.strategy or reduce.transport = 'torch': this torch was built without torch.distributed",
            "Set it to 'mpi' or 'horovod'.",
        )
    if distributed.is_initialized():
        raise UserError(
            "reduce.strategy or reduce.transport = 'torch': the task has started torch.distributed itself, and a "
            "process has one",
            "Leave init_process_group out of the task, or set the key to 'mpi'.",
        )


def torch_groups(groups: Sequence[Sequence[int]]) -> list[Any]:
    """Collective. torch.distributed's group of each of `groups`, which are the same on every rank."""
    return [distributed.new_group(list(ranks)) for ranks in groups]


class TorchTransport:
    """See `transports.Transport`. Threads of gloo, or the GPU, send while backward computes.

    group: of the ranks that send, by `torch_groups`; default: all.
    """

    def __init__(self, size: int, group: Any = None) -> None:
        self.size, self._group = size, group

    def sum(self, message: torch.Tensor, name: str, is_last: bool = False) -> Pending:
        return _Work(distributed.all_reduce(message, group=self._group, async_op=True), message)

    def adasum(self, message: torch.Tensor, name: str) -> Pending:
        raise AssertionError("only Horovod has Adasum")

    def reduce_scatter(self, message: torch.Tensor, name: str, into: torch.Tensor | None = None) -> Pending:
        part = message.new_empty(len(message) // self.size)
        return arriving_in(_Work(_reduce_scatter(part, message, group=self._group, async_op=True), part), into)

    def all_gather(self, part: torch.Tensor, name: str, into: torch.Tensor | None = None) -> Pending:
        whole = part.new_empty(len(part) * self.size) if into is None else into
        return _Work(_all_gather(whole, part, group=self._group, async_op=True), whole)

    def all_to_all(self, message: torch.Tensor, name: str) -> Pending:
        received = torch.empty_like(message)
        return _Work(distributed.all_to_all_single(received, message, group=self._group, async_op=True), received)

    def progress(self) -> None:
        pass  # its own threads send


@dataclass
class _Work:
    work: Any
    result: torch.Tensor

    def wait(self) -> torch.Tensor:
        self.work.wait()
        return self.result
