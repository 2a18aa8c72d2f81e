"""Which ranks share a batch and which share the weights: named axes over the ranks of a job, by `reduce.strategy`."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from hpc_train.core.errors import UserError
from hpc_train.core.settings import Reduce
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context, joint


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
        local, mpi, horovod, torch   N  N       1
        sharded               N        N/S      S    (S ranks share one copy: `reduce.shard_within`, default N)
        parameter_server      W         W       S    (the last S = N - W ranks are servers and train on nothing)

    With `sharded`, ranks with equal numbers on the axis `shard` hold equal parts, one in each copy: they are the axis
    `replica`. The root is the first rank of the first copy.

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
            copies = _copies(settings, context)
            of_copy = stack.enter_context(own.split(copies[own.world.rank]))
            of_part = stack.enter_context(own.split(of_copy.world.rank))
            replica, shard = Axis(of_part.world.size, of_part), Axis(of_copy.world.size, of_copy)
            yield Mesh(ranks, peers, Axis(size, peers), replica, shard)
        else:
            yield Mesh(ranks, peers, Axis(size, peers), replica=Axis(size, own), shard=alone)


def _copies(settings: Reduce, context: Context) -> list[int]:
    """Collective. In which copy of the weights each rank holds a part. Raises UserError if they differ in size."""
    ranks = range(context.world.size)
    if settings.shard_within == "job":
        return [0 for _ in ranks]
    if settings.shard_within != "node":
        return [rank // settings.shard_within for rank in ranks]
    hosts = context.all_gather(context.world.host)
    num_ranks = Counter(hosts)
    most, fewest = max(num_ranks, key=num_ranks.__getitem__), min(num_ranks, key=num_ranks.__getitem__)
    if num_ranks[most] != num_ranks[fewest]:
        raise joint(
            UserError(
                f"reduce.shard_within = 'node': {most} has {num_ranks[most]} ranks and {fewest} {num_ranks[fewest]}, "
                "and each node holds one copy of the weights in equal parts",
                "Start as many ranks on every node (srun --ntasks-per-node), or set reduce.shard_within to 'job'.",
            )
        )
    number = {host: index for index, host in enumerate(num_ranks)}
    return [number[host] for host in hosts]
