"""How long ranks take to sum the same bytes: by the program's own strategies, by plain MPI and by torch over gloo.

A strategy is timed as a training uses it: its reducer is handed one gradient and gives back the sum over ranks, loss
and notes included, from `begin_step` to `reduce_gradients` (and `sync_weights`); backward is left out, so nothing
overlaps. Beside it the limits: a copy of the bytes by all ranks at once, and a message between two ranks.

Everything takes turns, sample by sample. Horovod lives in its turns alone: its thread calls on all ranks once a cycle,
and with it alive an MPI_Allreduce of 64 KiB took 3.7 ms instead of 0.04 on two cores.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from hpc_train.core.allreduce_times import Row, teams
from hpc_train.core.errors import UserError
from hpc_train.core.settings import Reduce
from hpc_train.train.comm import messages
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mesh import Mesh, open_mesh
from hpc_train.train.reduce.all_reduce import AllReduce
from hpc_train.train.reduce.horovod_library import horovod_on, restartable_horovod
from hpc_train.train.reduce.parameter_server import Server, Worker
from hpc_train.train.reduce.sharded import Sharded
from hpc_train.train.reduce.transports import HorovodTransport, InPieces, MpiTransport

_SERVERS = Reduce(strategy="parameter_server")
_SAMPLE_S, _MOST_CALLS = 5e-3, 200  # calls are timed in rows of about so long
_GLOO_MEETS_S, _GLOO_SUMS_S = 60, 3600  # until its ranks have met; and a sum over the slowest link
_PATTERN = (np.arange(1 << 18) % 251).astype(np.float32)  # what a rank adds, times 1 to 4: sums are exact

Exchange = Callable[[bool], None]  # whether who owns weights sets them to the sum of gradients: slower, and checked


class Way(NamedTuple):
    """One way of summing `message`, made for it. held: what this rank has of the sum afterwards, and whose."""

    exchange: Exchange
    held: Callable[[], torch.Tensor]
    adding: int  # ranks that contribute: the first so many
    by_horovod: bool = False
    share: float = 1.0  # of a call that counts: a ping-pong is two messages


class Team(NamedTuple):
    """Ranks that measure together. servers: the mesh of its parameter server; gloo: its process group."""

    context: Context
    nodes: int
    ranks_per_node: int
    servers: Mesh
    gloo: Any

    @property
    def size(self) -> int:
        return self.context.world.size


Make = Callable[[Team, torch.Tensor], Way]


class NoFlags:
    """The control flags of ranks that neither stop nor save."""

    stop = save = False


def _model(message: torch.Tensor) -> nn.Module:
    """Weights of that size, for reducers that only look at it: the message's own memory."""
    return nn.ParameterList([nn.Parameter(message)])


# ------------------------------------------------------------------------------------------------- strategies


def _all_reduce(hvd: Any, team: Team, message: torch.Tensor) -> Way:
    """hvd: None for MPI."""
    model, loss = _model(message), torch.zeros(())
    transport = InPieces(MpiTransport(team.context) if hvd is None else HorovodTransport(hvd, team.size))
    reducer = AllReduce(transport, Reduce(), model, NoFlags())
    (parameter,) = model.parameters()

    def exchange(update: bool) -> None:
        parameter.grad = message
        reducer.begin_step(loss)
        reducer.reduce_gradients()

    return Way(exchange, lambda: _gradient(parameter), team.size, hvd is not None)


def _sharded(hvd: Any, team: Team, message: torch.Tensor) -> Way:
    model, loss = _model(message), torch.zeros(())
    (parameter,) = model.parameters()
    reducer = Sharded(InPieces(HorovodTransport(hvd, team.size)), model, team.context, NoFlags())

    def exchange(update: bool) -> None:
        parameter.grad = message
        reducer.begin_step(loss)
        reducer.reduce_gradients()
        if update:
            _set_weights(reducer)
        reducer.sync_weights(True)

    return Way(exchange, lambda: parameter.detach(), team.size, True)


def _parameter_server(team: Team, message: torch.Tensor) -> Way:
    model, loss, workers = _model(message), torch.zeros(()), team.servers.data.size
    (parameter,) = model.parameters()
    if not team.servers.trains:
        server = Server(_SERVERS, model, team.servers, NoFlags())

        def serve(update: bool) -> None:
            server.reduce_gradients()
            if update:
                _set_weights(server)
            server.sync_weights(True)

        return Way(serve, lambda: parameter.detach(), workers)
    worker = Worker(_SERVERS, model, team.servers, NoFlags())

    def exchange(update: bool) -> None:
        parameter.grad = message
        worker.begin_step(loss)
        worker.reduce_gradients()

    return Way(exchange, lambda: parameter.detach(), workers)


def _set_weights(reducer: Server | Sharded) -> None:
    for owned in reducer.shards.owned:
        owned.parameter.data.copy_(_gradient(owned.parameter))


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


# ------------------------------------------------------------------------------------------------- peers and limits


def _plain_mpi(team: Team, message: torch.Tensor) -> Way:
    comm, array = team.context.comm, message.numpy()
    return Way(lambda update: messages.all_reduce_in_place(comm, array), lambda: message, team.size)


def _ddp_gloo(team: Team, message: torch.Tensor) -> Way:
    from torch import distributed

    return Way(lambda update: distributed.all_reduce(message, group=team.gloo), lambda: message, team.size)


def _memory(team: Team, message: torch.Tensor) -> Way:
    array, copied = message.numpy(), torch.zeros_like(message)
    place = copied.numpy()
    return Way(lambda update: np.copyto(place, array), lambda: copied, 0)


def _link(team: Team, message: torch.Tensor) -> Way:
    comm, array, other = team.context.comm, message.numpy(), 1 - team.context.world.rank

    def ping(update: bool) -> None:
        messages.send(comm, array, other)
        messages.receive(comm, array, other)

    def pong(update: bool) -> None:
        messages.receive(comm, array, other)
        messages.send(comm, array, other)

    return Way(pong if other == 0 else ping, lambda: message, 0, share=0.5)


# ------------------------------------------------------------------------------------------------- measuring


def measure(
    sizes: Sequence[int], strategies: Sequence[str], repeat: int, context: Context, go_on: Callable[[int], bool]
) -> list[Row]:
    """Collective. Rows for each of `strategies` and each limit on each of `network.teams`; complete on the root.

    sizes: in bytes, multiples of 4. go_on: asked on the root before each size, with its place in `sizes`. At each size
    every sum is checked once, number by number. Raises UserError, on one rank alone where a sum is wrong.
    """
    torch.set_num_threads(1)
    hvd = None
    if {"horovod", "sharded"} & set(strategies):
        hvd = context.on_all(partial(restartable_horovod, Reduce()))
    makes: dict[str, Make] = {
        "horovod": partial(_all_reduce, hvd),
        "mpi": partial(_all_reduce, None),
        "parameter_server": _parameter_server,
        "sharded": partial(_sharded, hvd),
        "plain_mpi": _plain_mpi,
        "ddp_gloo": _ddp_gloo,
    }
    chosen = {name: makes[name] for name in strategies} | {"memory": _memory}
    rows: list[Row] = []
    with _gloo(context) if "ddp_gloo" in strategies else nullcontext() as world_group, ExitStack() as stack:
        every = _teams(context, world_group is not None, stack)
        for place, num_bytes in enumerate(sizes):
            if not context.on_root(partial(go_on, place)):
                break
            for team in every:
                if team is not None:
                    limits = {"link": _link} if team.size == 2 else {}
                    rows += _measure_size(chosen | limits, team, num_bytes, repeat, hvd)
                context.idle_barrier()
    return rows


def _teams(context: Context, with_gloo: bool, stack: ExitStack) -> list[Team | None]:
    """Collective. This rank's teams, and None for those it is not in; `stack` frees their communicators."""
    from torch import distributed

    hosts, found = context.all_gather(context.world.host), []
    for ranks in teams(hosts):
        is_in = context.world.rank in ranks
        team = stack.enter_context(context.split(int(not is_in)))
        servers = stack.enter_context(open_mesh(_SERVERS, team))
        wait = timedelta(seconds=_GLOO_SUMS_S)
        group = distributed.new_group(list(ranks), timeout=wait, backend="gloo") if with_gloo else None
        of_hosts = [hosts[rank] for rank in ranks]
        most = max(of_hosts.count(host) for host in of_hosts)
        found.append(Team(team, len(set(of_hosts)), most, servers, group) if is_in else None)
    return found


@contextmanager
def _gloo(context: Context) -> Iterator[Any]:
    """Collective. torch.distributed over gloo, on all ranks."""
    from torch import distributed
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    wait = timedelta(seconds=_GLOO_MEETS_S)
    stores: list[Any] = []  # the root's, which serves the others until the end

    def listen() -> tuple[str, int]:
        stores.append(TCPStore(context.world.host, 0, is_master=True, wait_for_workers=False, timeout=wait))
        return context.world.host, stores[0].port

    def join() -> None:
        store = stores[0] if stores else TCPStore(host, port, is_master=False, timeout=wait)
        rank, size = context.world.rank, context.world.size
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
        distributed.barrier()  # the ranks meet here, or not at all

    host, port = context.on_root(partial(_or_mend, listen))
    context.on_all(partial(_or_mend, join))
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def _or_mend(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except RuntimeError as error:  # of torch.distributed: no route, no name, no answer
        raise UserError(
            f"torch.distributed's gloo does not come up: {str(error).splitlines()[0]}",
            "Set GLOO_SOCKET_IFNAME to the network's device, or leave ddp_gloo out: --strategies horovod,mpi,plain_mpi",
        ) from None


def _measure_size(makes: dict[str, Make], team: Team, num_bytes: int, repeat: int, hvd: Any) -> list[Row]:
    """Collective in the team. All ways of summing that many bytes, in turns."""
    message = torch.zeros(num_bytes // 4)
    ways = {name: make(team, message) for name, make in makes.items()}
    for name, way in ways.items():
        with _horovod(way, team, hvd):
            _check(name, way, team, message)
    message.zero_()  # sums of zeros stay what they are, however often
    calls = {name: _num_calls(_sample(way, team, 1, hvd)) for name, way in ways.items()}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeat):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            samples[name].append(_sample(ways[name], team, calls[name], hvd))
    place = (team.size, team.nodes, team.ranks_per_node)
    return [Row(name, *place, num_bytes, tuple(found)) for name, found in samples.items()]


def _horovod(way: Way, team: Team, hvd: Any) -> Any:
    return horovod_on(hvd, team.context) if way.by_horovod else nullcontext()


def _sample(way: Way, team: Team, calls: int, hvd: Any) -> float:
    """Collective in the team. Seconds of a call, the slowest rank's mean over so many."""
    with _horovod(way, team, hvd):
        way.exchange(False)  # Horovod negotiates a message that it has not seen before
        team.context.barrier()
        began = perf_counter()
        for _ in range(calls):
            way.exchange(False)
        mine = perf_counter() - began
    return float(team.context.max(np.array([mine]))[0]) * way.share / calls


def _num_calls(seconds: float) -> int:
    return int(min(max(_SAMPLE_S / seconds, 1), _MOST_CALLS))


def _check(name: str, way: Way, team: Team, message: torch.Tensor) -> None:
    """Collective in the team. Raises UserError on the rank that holds a wrong number, which ends the job."""
    rank = team.context.world.rank
    _each_block(message, lambda block, pattern: np.multiply(pattern, 1 + rank % 4, out=block))
    way.exchange(True)
    factor = sum(1 + each % 4 for each in range(way.adding)) if way.adding else None
    if factor is None:  # a copy has this rank's values; a ping-pong gives both ranks the first one's
        factor = 1 if name == "link" else 1 + rank % 4
    held, wrong = way.held().view(-1)[: len(message)], []
    _each_block(held, lambda block, pattern: wrong.append(not np.array_equal(block, factor * pattern)))
    if any(wrong):
        place = team.context.world.host
        raise UserError(
            f"{name}: {message.nbytes} bytes summed over {team.size} ranks are not their sum on {place}",
            "Its memory or its network may be broken: leave that node out and try again.",
        )


def _each_block(values: torch.Tensor, act: Callable[[np.ndarray, np.ndarray], object]) -> None:
    array = values.numpy()
    for start in range(0, len(array), len(_PATTERN)):
        block = array[start : start + len(_PATTERN)]
        act(block, _PATTERN[: len(block)])
