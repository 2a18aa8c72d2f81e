"""Which ranks share a batch and which share the weights: named axes over the ranks of a job, by `reduce.strategy`."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from hpc_train.core.settings import Reduce
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context


@dataclass(frozen=True)
class Axis:
    """The ranks along one axis. `size` is known on every rank; `context` is None on ranks that are not among them."""

    size: int
    context: Context | None


@dataclass(frozen=True)
class Mesh:
    """How the ranks of a job divide the work, seen from one of them.

    data: the ranks that train, each on its part of every global batch.
    replica: the ranks with equal tasks in different copies of the model: they sum each gradient over all copies.
    shard: the ranks that share one copy of the weights or of the optimizer's state; each updates its part.
    peers: the ranks with this rank's role, workers or servers: they open the task together.

    Of N ranks:
        strategy           data   replica   shard
        local, mpi, horovod   N         N       1
        sharded               N         1       N    (replica * shard = data, as with fully sharded parameters)
        parameter_server      W         W       S    (the last S = N - W ranks are servers and train on nothing)

    `ranks`, `peers` (which `data` uses) and the other axes have a communicator each: a task's messages on `peers` never
    meet a reducer's.
    """

    ranks: Context
    peers: Context
    data: Axis
    replica: Axis
    shard: Axis

    @property
    def trains(self) -> bool:
        """Whether this rank computes gradients."""
        return self.data.context is not None


@contextmanager
def open_mesh(settings: Reduce, context: Context) -> Iterator[Mesh]:
    """Collective. Divides the ranks of `context` by `reduce.strategy`; frees the communicators at the end."""
    size = context.world.size
    num_workers = settings.num_workers(size)
    is_server = context.world.rank >= num_workers
    alone = Axis(1, Context(World(host=context.world.host)))
    with ExitStack() as stack:
        ranks = stack.enter_context(context.duplicate())
        peers = stack.enter_context(context.split(int(is_server)))
        own = stack.enter_context(peers.duplicate())
        if settings.strategy == "parameter_server":
            data = Axis(num_workers, None if is_server else peers)
            replica = Axis(num_workers, None if is_server else own)
            yield Mesh(ranks, peers, data, replica, shard=Axis(settings.servers, own if is_server else None))
        elif settings.strategy == "sharded":
            yield Mesh(ranks, peers, Axis(size, peers), replica=alone, shard=Axis(size, own))
        else:
            yield Mesh(ranks, peers, Axis(size, peers), replica=Axis(size, own), shard=alone)
