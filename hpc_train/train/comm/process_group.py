"""torch.distributed with the interface of an mpi4py communicator, for loops started without MPI, by torchrun say."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import distributed

from hpc_train.core.world import World
from hpc_train.train.comm.context import Context


class ProcessGroup:
    """The methods of an mpi4py communicator that `Context` uses. All but `Send` and `Recv` are collective.

    It is a gloo group of its own: NCCL moves neither Python objects nor CPU memory, and the loop's messages stay apart.
    """

    MAX = distributed.ReduceOp.MAX

    def __init__(self) -> None:
        self.group = distributed.new_group(backend="gloo")
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def bcast(self, value: Any, root: int) -> Any:
        box = [value]
        distributed.broadcast_object_list(box, src=root, group=self.group)
        return box[0]

    def gather(self, value: Any, root: int) -> list[Any] | None:
        everyone = [None] * self.size if self.rank == root else None
        distributed.gather_object(value, everyone, dst=root, group=self.group)
        return everyone

    def allgather(self, value: Any) -> list[Any]:
        everyone = [None] * self.size
        distributed.all_gather_object(everyone, value, group=self.group)
        return everyone

    def Allreduce(self, values: np.ndarray, total: np.ndarray, op: Any = distributed.ReduceOp.SUM) -> None:
        total[...] = values
        distributed.all_reduce(torch.from_numpy(total), op, group=self.group)

    def Bcast(self, array: np.ndarray, root: int) -> None:
        distributed.broadcast(torch.from_numpy(array), src=root, group=self.group)

    def Barrier(self) -> None:
        distributed.barrier(group=self.group)

    def Send(self, array: np.ndarray, dest: int) -> None:
        distributed.send(torch.from_numpy(array), dst=dest, group=self.group)

    def Recv(self, array: np.ndarray, source: int) -> None:
        distributed.recv(torch.from_numpy(array), src=source, group=self.group)


@contextmanager
def join_process_group() -> Iterator[Context]:
    """Collective. The ranks of torch.distributed, which the program has initialised already."""
    comm = ProcessGroup()
    hosts = comm.allgather(socket.gethostname())
    rank, host = comm.rank, hosts[comm.rank]
    world = World(rank, comm.size, hosts[:rank].count(host), hosts.count(host), host, hosts.index(host))
    yield Context(world, comm)
    comm.Barrier()  # collective: skipped when a rank fails alone
    distributed.destroy_process_group(comm.group)
