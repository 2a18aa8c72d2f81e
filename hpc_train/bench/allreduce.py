"""Times of an all-reduce: with the program's strategies, with one MPI_Allreduce and with torch over gloo.

A strategy is timed as training uses it: its reducer gets one gradient and returns the sum over ranks with the loss and
the control flags, from `begin_step` to `reduce_gradients` (and `sync_weights`). Without a backward pass, nothing
overlaps. Limits are measured, too: a copy of the bytes, and their conversion to 16 bits, on all ranks at once, and a
message between two ranks.

All methods take turns, sample by sample. Horovod runs only during its turns: its background thread negotiates with all
ranks in every cycle, which slowed an MPI_Allreduce of 64 KiB on two cores from 0.04 to 3.7 ms.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from hpc_train.core.allreduce_times import Row, rank_groups
from hpc_train.core.errors import UserError
from hpc_train.core.settings import Reduce
from hpc_train.train.comm import messages
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mesh import Mesh, open_mesh
from hpc_train.train.reduce.all_reduce import AllReduce
from hpc_train.train.reduce.compression import compress, decompress
from hpc_train.train.reduce.horovod_library import horovod_on, restartable_horovod
from hpc_train.train.reduce.parameter_server import Server, Worker
from hpc_train.train.reduce.sharded import Sharded
from hpc_train.train.reduce.transports import HorovodTransport, MpiTransport, SplittingTransport

_SERVERS = Reduce(strategy="parameter_server")
_SAMPLE_S = 5e-3  # a sample is as many calls as take about that long, within a node
# Between nodes links may let a burst pass faster than their limit (a token bucket of 128 KiB fills in 10 ms at 100
# Mbit/s): calls that are not timed use it up first, and a sample is longer than it takes to fill again.
_SAMPLE_BETWEEN_S = 2e-2
_MAX_CALLS = 200
_GLOO_CONNECT_S, _GLOO_SUM_S = 60, 3600  # time limits of its rendezvous, and of a sum over the slowest link
_BF16_ERROR = 2**-7  # of 8 bits: each part is rounded once, and so is their sum
_PATTERN = (np.arange(1 << 18) % 251).astype(np.float32)  # a rank adds it 1 to 4 times: sums are exact in FP32

Exchange = Callable[[bool], None]  # True: owners set weights to the summed gradients, so that the sum can be checked


class Method(NamedTuple):
    """A method to sum one message. held: the result on this rank."""

    exchange: Exchange
    held: Callable[[], torch.Tensor]
    num_adding: int  # the first so many ranks contribute to the sum; 0: no sum
    by_horovod: bool = False
    share: float = 1.0  # of a call's time: a ping-pong is two messages
    tolerance: float = 0.0  # relative, of the sum


class RankGroup(NamedTuple):
    """Ranks that measure together. servers: mesh with a parameter server; gloo: process group."""

    context: Context
    nodes: int
    ranks_per_node: int
    servers: Mesh
    gloo: Any

    @property
    def size(self) -> int:
        return self.context.world.size


Make = Callable[[RankGroup, torch.Tensor], Method]


class NoFlags:
    """The control flags of ranks that neither stop nor save."""

    stop = save = False


def _model(message: torch.Tensor) -> nn.Module:
    """A model whose only weights are the message's memory."""
    return nn.ParameterList([nn.Parameter(message)])


# ------------------------------------------------------------------------------------------------- strategies


def _all_reduce(hvd: Any, compression: Literal["none", "bf16"], team: RankGroup, message: torch.Tensor) -> Method:
    """hvd: None for MPI."""
    model, loss = _model(message), torch.zeros(())
    transport = SplittingTransport(MpiTransport(team.context) if hvd is None else HorovodTransport(hvd, team.size))
    reducer = AllReduce(transport, Reduce(compression=compression), model, NoFlags())
    (parameter,) = model.parameters()

    def exchange(update: bool) -> None:
        parameter.grad = message
        reducer.begin_step(loss)
        reducer.reduce_gradients()

    tolerance = 0.0 if compression == "none" else _BF16_ERROR
    return Method(exchange, lambda: _gradient(parameter), team.size, hvd is not None, tolerance=tolerance)


def _sharded(team: RankGroup, message: torch.Tensor) -> Method:
    """Over MPI, as `reduce.transport` chooses on CPUs."""
    model, loss = _model(message), torch.zeros(())
    (parameter,) = model.parameters()
    reducer = Sharded(SplittingTransport(MpiTransport(team.context)), None, model, team.context, NoFlags())

    def exchange(update: bool) -> None:
        parameter.grad = message
        reducer.begin_step(loss)
        reducer.reduce_gradients()
        if update:
            _set_weights(reducer)
        reducer.sync_weights(True)

    return Method(exchange, lambda: parameter.detach(), team.size)


def _parameter_server(team: RankGroup, message: torch.Tensor) -> Method:
    model, loss, workers = _model(message), torch.zeros(()), team.servers.data.size
    (parameter,) = model.parameters()
    if not team.servers.trains:
        server = Server(_SERVERS, model, team.servers, NoFlags())

        def serve(update: bool) -> None:
            server.reduce_gradients()
            if update:
                _set_weights(server)
            server.sync_weights(True)

        return Method(serve, lambda: parameter.detach(), workers)
    worker = Worker(_SERVERS, model, team.servers, NoFlags())

    def exchange(update: bool) -> None:
        parameter.grad = message
        worker.begin_step(loss)
        worker.reduce_gradients()

    return Method(exchange, lambda: parameter.detach(), workers)


def _set_weights(reducer: Server | Sharded) -> None:
    for owned in reducer.shards.owned:
        owned.parameter.data.copy_(_gradient(owned.parameter))


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


# ------------------------------------------------------------------------------------------------- peers and limits


def _plain_mpi(team: RankGroup, message: torch.Tensor) -> Method:
    comm, array = team.context.comm, message.numpy()
    return Method(lambda update: messages.all_reduce_in_place(comm, array), lambda: message, team.size)


def _ddp_gloo(team: RankGroup, message: torch.Tensor) -> Method:
    from torch import distributed

    return Method(lambda update: distributed.all_reduce(message, group=team.gloo), lambda: message, team.size)


def _memory(team: RankGroup, message: torch.Tensor) -> Method:
    array, copied = message.numpy(), torch.zeros_like(message)
    place = copied.numpy()
    return Method(lambda update: np.copyto(place, array), lambda: copied, 0)


def _convert(team: RankGroup, message: torch.Tensor) -> Method:
    """To 16 bits, as `reduce.compression` sends each rank its part. The few numbers that no equal part has stay."""
    length = len(message) // team.size * team.size
    converted: list[torch.Tensor] = []

    def exchange(update: bool) -> None:
        converted[:] = [compress(message[:length].view(team.size, -1), torch.bfloat16)] if length else []

    def held() -> torch.Tensor:
        return torch.cat([*(decompress(each).view(-1) for each in converted), message[length:]])

    return Method(exchange, held, 0, tolerance=_BF16_ERROR)


def _link(team: RankGroup, message: torch.Tensor) -> Method:
    comm, array, other = team.context.comm, message.numpy(), 1 - team.context.world.rank

    def ping(update: bool) -> None:
        messages.send(comm, array, other)
        messages.receive(comm, array, other)

    def pong(update: bool) -> None:
        messages.receive(comm, array, other)
        messages.send(comm, array, other)

    return Method(pong if other == 0 else ping, lambda: message, 0, share=0.5)


# ------------------------------------------------------------------------------------------------- measuring


def measure(
    sizes: Sequence[int], strategies: Sequence[str], repeat: int, context: Context, may_continue: Callable[[int], bool]
) -> list[Row]:
    """Collective. Rows for each of `strategies` and each limit on each of `rank_groups`; complete on the root.

    sizes: in bytes, multiples of 4. may_continue: called on the root before each size with its index. Every sum is
    checked once for each size, element by element: exactly, but for what 16 bits round. Raises `UserError`, on a single
    rank if its sum is wrong.
    """
    torch.set_num_threads(1)
    hvd = None
    if any(name.startswith("horovod") for name in strategies):
        hvd = context.on_all(partial(restartable_horovod, Reduce()))
    makes: dict[str, Make] = {
        "horovod": partial(_all_reduce, hvd, "none"),
        "horovod_bf16": partial(_all_reduce, hvd, "bf16"),
        "mpi": partial(_all_reduce, None, "none"),
        "mpi_bf16": partial(_all_reduce, None, "bf16"),
        "parameter_server": _parameter_server,
        "sharded": _sharded,
        "plain_mpi": _plain_mpi,
        "ddp_gloo": _ddp_gloo,
    }
    chosen = {name: makes[name] for name in strategies} | {"memory": _memory, "convert": _convert}
    rows: list[Row] = []
    with _gloo(context) if "ddp_gloo" in strategies else nullcontext() as world_group, ExitStack() as stack:
        groups = _rank_groups(context, world_group is not None, stack)
        for index, num_bytes in enumerate(sizes):
            if not context.on_root(partial(may_continue, index)):
                break
            for team in groups:
                if team is not None:
                    limits = {"link": _link} if team.size == 2 else {}
                    rows += _measure_size(chosen | limits, team, num_bytes, repeat, hvd)
                context.idle_barrier()
    return rows


def _rank_groups(context: Context, with_gloo: bool, stack: ExitStack) -> list[RankGroup | None]:
    """Collective. The groups, None for those without this rank; `stack` frees their communicators."""
    from torch import distributed

    hosts, found = context.all_gather(context.world.host), []
    for ranks in rank_groups(hosts):
        is_in = context.world.rank in ranks
        team = stack.enter_context(context.split(int(not is_in)))
        servers = stack.enter_context(open_mesh(_SERVERS, team))
        wait = timedelta(seconds=_GLOO_SUM_S)
        group = distributed.new_group(list(ranks), timeout=wait, backend="gloo") if with_gloo else None
        of_hosts = [hosts[rank] for rank in ranks]
        most = max(of_hosts.count(host) for host in of_hosts)
        found.append(RankGroup(team, len(set(of_hosts)), most, servers, group) if is_in else None)
    return found


@contextmanager
def _gloo(context: Context) -> Iterator[Any]:
    """Collective. torch.distributed over gloo, on all ranks."""
    from torch import distributed
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    wait = timedelta(seconds=_GLOO_CONNECT_S)
    stores: list[Any] = []  # on the root, which serves the others until the end

    def listen() -> tuple[str, int]:
        stores.append(TCPStore(context.world.host, 0, is_master=True, wait_for_workers=False, timeout=wait))
        return context.world.host, stores[0].port

    def join() -> None:
        store = stores[0] if stores else TCPStore(host, port, is_master=False, timeout=wait)
        rank, size = context.world.rank, context.world.size
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
        distributed.barrier()  # fails here if ranks cannot connect

    host, port = context.on_root(partial(_explained, listen))
    context.on_all(partial(_explained, join))
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def _explained(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except RuntimeError as error:  # torch.distributed found no route, no name or no answer
        raise UserError(
            f"torch.distributed's gloo cannot connect: {str(error).splitlines()[0]}",
            "Set GLOO_SOCKET_IFNAME to the network interface, or omit ddp_gloo: --strategies horovod,mpi,plain_mpi",
        ) from None


def _measure_size(makes: dict[str, Make], team: RankGroup, num_bytes: int, repeat: int, hvd: Any) -> list[Row]:
    """Collective in the group. All methods for one size, in turns."""
    message = torch.zeros(num_bytes // 4)
    methods = {name: make(team, message) for name, make in makes.items()}
    for name, method in methods.items():
        with _horovod(method, team, hvd):
            _check(name, method, team, message)
    message.zero_()  # repeated sums of zeros do not overflow
    sample_s = _SAMPLE_S if team.nodes == 1 else _SAMPLE_BETWEEN_S
    calls = {name: _num_calls(_sample(method, team, 1, hvd), sample_s) for name, method in methods.items()}
    samples: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(repeat):
        for name in list(methods)[:: -1 if turn % 2 else 1]:
            samples[name].append(_sample(methods[name], team, calls[name], hvd))
    place = (team.size, team.nodes, team.ranks_per_node)
    return [Row(name, *place, num_bytes, tuple(found)) for name, found in samples.items()]


def _horovod(method: Method, team: RankGroup, hvd: Any) -> Any:
    return horovod_on(hvd, team.context) if method.by_horovod else nullcontext()


def _sample(method: Method, team: RankGroup, calls: int, hvd: Any) -> float:
    """Collective in the group. Seconds per call: the slowest rank's mean over `calls`, after as many untimed ones."""
    with _horovod(method, team, hvd):
        for _ in range(calls if team.nodes > 1 else 1):  # at least one: Horovod negotiates each new message once
            method.exchange(False)
        team.context.barrier()
        began = perf_counter()
        for _ in range(calls):
            method.exchange(False)
        mine = perf_counter() - began
    return float(team.context.max(np.array([mine]))[0]) * method.share / calls


def _num_calls(seconds: float, sample_s: float) -> int:
    return int(min(max(sample_s / seconds, 1), _MAX_CALLS))


def _check(name: str, method: Method, team: RankGroup, message: torch.Tensor) -> None:
    """Collective in the group. Raises `UserError` on a rank with a wrong sum, which ends the job."""
    rank = team.context.world.rank
    _each_block(message, lambda block, pattern: np.multiply(pattern, 1 + rank % 4, out=block))
    method.exchange(True)
    factor = sum(1 + each % 4 for each in range(method.num_adding)) if method.num_adding else None
    if factor is None:  # a copy has this rank's values; after a ping-pong both ranks have those of the first
        factor = 1 if name == "link" else 1 + rank % 4
    held, wrong = method.held().view(-1)[: len(message)], []
    _each_block(
        held,
        lambda block, pattern: wrong.append(not np.allclose(block, factor * pattern, rtol=method.tolerance, atol=0)),
    )
    if any(wrong):
        place = team.context.world.host
        raise UserError(
            f"{name}: {message.nbytes} bytes summed over {team.size} ranks are not their sum on {place}",
            "Its memory or its network may be broken: exclude that node and try again.",
        )


def _each_block(values: torch.Tensor, act: Callable[[np.ndarray, np.ndarray], object]) -> None:
    array = values.numpy()
    for start in range(0, len(array), len(_PATTERN)):
        block = array[start : start + len(_PATTERN)]
        act(block, _PATTERN[: len(block)])
