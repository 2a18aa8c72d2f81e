"""Gradient reduction, by `reduce.strategy`: whose gradients are summed where, and how they get there."""

import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from hpc_train.core.errors import UserError
from hpc_train.core.settings import Reduce
from hpc_train.train.comm import messages
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mpi_library import require_one_mpi
from hpc_train.train.reduce.buckets import NUM_NOTES, Bucket, BucketScheduler, StepFlags, make_buckets
from hpc_train.train.reduce.half_precision import packed, unpacked
from hpc_train.train.reduce.parameter_server import Server, Worker
from hpc_train.train.reduce.sharded import Sharded
from hpc_train.train.reduce.shards import Shards

Asked = Callable[[], tuple[bool, bool]]
Arrival = Callable[[], torch.Tensor]  # waits for a message, and gives it
_PART_BYTES, _MOST_UNDER_WAY = 1 << 19, 2  # of MPI's sums: a rank's part of a piece, and pieces


class Reducer(Protocol):
    """In each step: `begin_step` before the last backward, `reduce_gradients`, the optimizer, `sync_weights`."""

    num_updates: int  # of a step: an asynchronous server makes one for each worker
    syncs_weights: bool  # whether `sync_weights` communicates

    @property
    def shards(self) -> Shards | None:
        """Whose parts this rank updates; None: each rank makes the whole update."""

    def begin_step(self, loss: torch.Tensor) -> None:
        """What the backward to come makes is to be sent; `loss`, this rank's share, travels with it."""

    def reduce_gradients(self) -> StepFlags:
        """Collective. Returns when every gradient that this rank's optimizer uses is the sum over ranks.

        Its time is exposed communication.
        """

    def sum_owned(self, value: float) -> float:
        """The sum over the ranks that own different parts, collectively by these; `value` where each owns all."""

    def sync_weights(self, made: bool) -> bool:
        """Collective. The updated parts to all ranks. made: whether this rank's optimizer made the update.

        Returns whether those that own the weights made it: alike on all ranks.
        """


@contextmanager
def open_reducer(
    settings: Reduce, model: nn.Module, context: Context, team: Context, asked: Asked
) -> Iterator[Reducer]:
    """Collective. Sends the root's weights to all ranks, then reduces by `reduce.strategy` until the end.

    team: the servers, on each of them. asked: whether this rank was asked to stop, and whether it finds it time to
    save a checkpoint; see `StepFlags`.
    """
    strategy, size = settings.strategy, context.world.size
    hvd = None
    if strategy in ("horovod", "sharded"):
        hvd = context.on_all(partial(_load_horovod, settings))
        gpus = context.all_gather(_gpu_for_nccl(hvd, model, context))
        context.on_all(partial(check_gpus, strategy, gpus))
    broadcast_model(model, context)
    if size == 1:
        # Its gradients are the sum already. Sending them through Horovod all the same made the one rank's step a tenth
        # longer, and every speedup over that baseline look better than it is.
        yield Local(asked)
        return
    if hvd is not None and not hvd.is_initialized():
        hvd.init()  # once: with both of its settings below fixed, a second time crashes. It ends with the process
    with context.duplicate() as own, team.duplicate() as of_servers:  # Horovod makes its own
        if strategy == "parameter_server":
            if context.world.rank < settings.num_workers(size):
                yield Worker(settings, model, own, asked)
            else:
                yield Server(settings, model, own, of_servers, asked)
        elif strategy == "sharded":
            yield Sharded(InPieces(Horovod(hvd), size), model, own, asked)
        else:
            transport = InPieces(Mpi(own) if hvd is None else Horovod(hvd), size)
            yield AllReduce(transport, settings, model, size, asked)


def broadcast_model(model: nn.Module, context: Context) -> None:
    """Collective. The root's parameters and buffers on every rank."""
    if context.world.size == 1:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        host = tensor.detach().cpu().contiguous()
        context.broadcast_array(host.reshape(-1).view(torch.uint8).numpy())
        if host.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(host)


class Local:
    """One process: its own gradients are the sum."""

    num_updates = 1
    syncs_weights = False
    shards: Shards | None = None

    def __init__(self, asked: Asked) -> None:
        self._asked = asked

    def begin_step(self, loss: torch.Tensor) -> None:
        self._loss = loss.detach()

    def reduce_gradients(self) -> StepFlags:
        return StepFlags(self._loss.item(), *self._asked())

    def sum_owned(self, value: float) -> float:
        return value

    def sync_weights(self, made: bool) -> bool:
        return made


class Transport(Protocol):
    """Collective messages under way: each call begins one and returns what waits for its end."""

    def sum(self, message: torch.Tensor, name: str, adasum: bool = False, last: bool = False) -> Arrival:
        """last: nothing leaves after it in this step."""

    def all_to_all(self, message: torch.Tensor, name: str) -> Arrival:
        """The n-th of equal parts of `message` goes to rank n."""

    def all_gather(self, part: torch.Tensor, name: str) -> Arrival:
        """The parts of all ranks, in their order."""

    def reduce_scatter(self, message: torch.Tensor, name: str) -> Arrival:
        """Of equal parts of the sum, this rank's. Not by MPI."""


class InPieces:
    """A transport whose messages are short enough to be counted in 32 bits, by MPI or by Horovod over it."""

    def __init__(self, transport: Transport, size: int) -> None:
        self._transport, self._size = transport, size

    def sum(self, message: torch.Tensor, name: str, adasum: bool = False, last: bool = False) -> Arrival:
        num = max(1, messages.MOST_BYTES // message.element_size())
        if adasum or len(message) <= num:  # Adasum looks at a whole layer
            return self._transport.sum(message, name, adasum, last)
        pieces = message.split(num)
        lasts = [last and piece is pieces[-1] for piece in pieces]
        arrivals = [self._transport.sum(p, f"{name}.{i}", False, lasts[i]) for i, p in enumerate(pieces)]
        return lambda: torch.cat([arrival() for arrival in arrivals])

    def all_to_all(self, message: torch.Tensor, name: str) -> Arrival:
        return self._by_columns(self._transport.all_to_all, message.view(self._size, -1), name, self._size)

    def all_gather(self, part: torch.Tensor, name: str) -> Arrival:
        return self._by_columns(self._transport.all_gather, part[None], name, self._size)

    def reduce_scatter(self, message: torch.Tensor, name: str) -> Arrival:
        return self._by_columns(self._transport.reduce_scatter, message.view(self._size, -1), name, 1)

    def _by_columns(
        self, send: Callable[[torch.Tensor, str], Arrival], rows: torch.Tensor, name: str, num_arriving: int
    ) -> Arrival:
        """rows: what this rank sends, a row for each rank or one; of `num_arriving` such rows consists what comes."""
        num = max(1, messages.MOST_BYTES // (rows.element_size() * self._size))
        if rows.shape[1] <= num:
            return send(rows.view(-1), name)
        arrivals = [send(each.contiguous().view(-1), f"{name}.{i}") for i, each in enumerate(rows.split(num, dim=1))]
        return lambda: torch.cat([arrival().view(num_arriving, -1) for arrival in arrivals], 1).view(-1)


class AllReduce:
    """Every rank sums every gradient and makes every update.

    With `reduce.compression` gradients travel in 16 bits (see `wire`) and are summed in 32: each rank gets its part of
    all ranks' gradients (all-to-all), adds them up, and sends the sum to all (all-gather). That moves the bytes of a
    ring.
    """

    num_updates = 1
    syncs_weights = False
    shards: Shards | None = None

    def __init__(self, transport: Transport, settings: Reduce, model: nn.Module, size: int, asked: Asked) -> None:
        self._transport, self._size, self._adasum = transport, size, settings.adasum
        self._wire = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}[settings.compression]
        # Adasum combines layer by layer; what it would make of the notes is no sum.
        apart = id if settings.adasum else None
        self._buckets = make_buckets(model, NUM_NOTES, size if self._wire else 1, apart)
        self._scheduler = BucketScheduler(self._buckets, self._send, asked)
        self.begin_step = self._scheduler.begin_step
        self._arriving: list[tuple[Bucket, torch.Tensor, Arrival]] = []

    def _send(self, bucket: Bucket) -> None:
        message = bucket.fill().view(-1)
        is_whole = not bucket.parameters or not (self._wire or self._adasum)
        if is_whole:
            arrival = self._transport.sum(message, bucket.name, last=bucket is self._buckets[-1])
        elif self._wire:
            parts = packed(message.view(self._size, -1), self._wire)
            arrival = self._transport.all_to_all(parts.view(-1), bucket.name)
        else:
            # Adasum adds what is orthogonal and averages what is parallel: it wants each rank's own mean gradient.
            arrival = self._transport.sum(message.mul_(self._size), bucket.name, adasum=True)
        self._arriving.append((bucket, message, arrival))

    def reduce_gradients(self) -> StepFlags:
        self._scheduler.finish()
        summed = [(bucket, message, self._sum(bucket, arrival)) for bucket, message, arrival in self._arriving]
        for _, message, arrival in summed:
            result = arrival()
            if result.data_ptr() != message.data_ptr():
                message.copy_(result)
        self._arriving.clear()
        return self._scheduler.shared()

    def _sum(self, bucket: Bucket, arrival: Arrival) -> Arrival:
        if self._wire is None or not bucket.parameters:
            return arrival
        part = unpacked(arrival().view(self._size, -1)).sum(0)
        gathered = self._transport.all_gather(packed(part[None], self._wire).view(-1), bucket.name)
        return lambda: unpacked(gathered().view(self._size, -1)).view(-1)

    def sum_owned(self, value: float) -> float:
        return value

    def sync_weights(self, made: bool) -> bool:
        return made


class Mpi:
    """Transport by MPI's own non-blocking collectives. Tensors of a GPU travel by way of the host's memory.

    MPI asks that all ranks begin them in the same order, and moves them on while it is called: each message that leaves
    gives those before it a push. Long sums go in pieces, two at a time, of which each rank's part stays in its cache:
    64 MiB in one took two to three times as long. The last sum of a step is a blocking one, begun when it is waited
    for: it takes half the time, and nothing is left to do meanwhile.
    """

    def __init__(self, context: Context) -> None:
        self._comm = context.comm
        self._to_begin: deque[Callable[[], Any]] = deque()
        self._under_way: deque[Any] = deque()
        self._num_asked = self._num_done = 0

    def sum(self, message: torch.Tensor, name: str, adasum: bool = False, last: bool = False) -> Arrival:
        host = message.cpu()
        array = host.numpy()
        num_pieces = -(-message.nbytes // (_PART_BYTES * self._comm.size))
        pieces = np.array_split(array, num_pieces) if num_pieces > 1 else [array]  # it takes as long as 64 KiB to sum
        if last or len(array) < self._comm.size:  # Rabenseifner's algorithm needs an element a rank: see startup.py
            return partial(self._sum_now, pieces, host)
        return self._queued([partial(messages.begin_all_reduce, self._comm, piece) for piece in pieces], host)

    def all_to_all(self, message: torch.Tensor, name: str) -> Arrival:
        host = message.cpu()
        received = torch.empty_like(host)
        begin = partial(messages.begin_all_to_all, self._comm, _bytes(host), _bytes(received))
        return self._queued([begin], received)

    def all_gather(self, part: torch.Tensor, name: str) -> Arrival:
        host = part.cpu()
        received = torch.empty(len(host) * self._comm.size, dtype=host.dtype)
        begin = partial(messages.begin_all_gather, self._comm, _bytes(host), _bytes(received))
        return self._queued([begin], received)

    def reduce_scatter(self, message: torch.Tensor, name: str) -> Arrival:
        raise AssertionError("strategy sharded is Horovod's")

    def _queued(self, begin: list[Callable[[], Any]], result: torch.Tensor) -> Arrival:
        self._to_begin.extend(begin)
        self._num_asked += len(begin)
        self._push()
        return partial(self._arrived, self._num_asked, result)

    def _arrived(self, number: int, result: torch.Tensor) -> torch.Tensor:
        while self._num_done < number:
            self._under_way.popleft().Wait()
            self._num_done += 1
            self._push()
        return result

    def _push(self) -> None:
        while self._under_way and self._under_way[0].Test():
            self._under_way.popleft()
            self._num_done += 1
        while self._to_begin and len(self._under_way) < _MOST_UNDER_WAY:
            self._under_way.append(self._to_begin.popleft()())

    def _sum_now(self, pieces: list[Any], result: torch.Tensor) -> torch.Tensor:
        self._arrived(self._num_asked, result)  # in the order of all ranks: what left before is there
        for piece in pieces:
            messages.all_reduce_in_place(self._comm, piece)
        return result


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.view(torch.uint8).numpy()


class Horovod:
    """Transport by Horovod: ring all-reduce in the background, from GPUs by NCCL where it was built with it."""

    def __init__(self, hvd: Any) -> None:
        self._hvd = hvd

    def sum(self, message: torch.Tensor, name: str, adasum: bool = False, last: bool = False) -> Arrival:
        op = self._hvd.Adasum if adasum else self._hvd.Sum
        return partial(self._hvd.synchronize, self._hvd.allreduce_async_(message, name=name, op=op))

    def all_to_all(self, message: torch.Tensor, name: str) -> Arrival:
        handle = self._hvd.alltoall_async(_as_half(message), name=f"{name}.to_all")
        return lambda: self._hvd.synchronize(handle)[0].view(message.dtype)  # with it, how much came from each rank

    def all_gather(self, part: torch.Tensor, name: str) -> Arrival:
        handle = self._hvd.allgather_async(_as_half(part), name=f"{name}.gather")
        return lambda: self._hvd.synchronize(handle).view(part.dtype)

    def reduce_scatter(self, message: torch.Tensor, name: str) -> Arrival:
        return partial(self._hvd.synchronize, self._hvd.reducescatter_async(message, name=name, op=self._hvd.Sum))


def _as_half(tensor: torch.Tensor) -> torch.Tensor:
    """Horovod knows no bfloat16; to move it, its 16 bits will do."""
    return tensor.view(torch.float16) if tensor.dtype == torch.bfloat16 else tensor


def _gpu_for_nccl(hvd: Any, model: nn.Module, context: Context) -> tuple[str, str] | None:
    """(host, GPU) of this rank's model, where Horovod would reduce it by NCCL."""
    device = next(model.parameters()).device
    if device.type != "cuda" or not hvd.nccl_built():
        return None
    return context.world.host, str(torch.cuda.get_device_properties(device).uuid)


def check_gpus(strategy: str, gpus: Sequence[tuple[str, str] | None]) -> None:
    """Raises UserError where ranks share a GPU: NCCL would end the job without naming it. gpus: (host, GPU) of each."""
    shared = [gpu for gpu, num_ranks in Counter(gpus).items() if gpu is not None and num_ranks > 1]
    if shared:
        host, _ = shared[0]
        ranks = ", ".join(str(rank) for rank, gpu in enumerate(gpus) if gpu == shared[0])
        raise UserError(
            f"reduce.strategy = '{strategy}': ranks {ranks} share one GPU of {host}, and NCCL wants one for each",
            "Start as many ranks on a host as it has GPUs, or set reduce.strategy = 'mpi'.",
        )


def restartable_horovod(settings: Reduce) -> Any:
    """Horovod's module, for `horovod_on`. Raises UserError.

    The fusion threshold is left open: with it and the cycle both fixed, Horovod 0.28.1 crashes when it starts again.
    """
    hvd = _load_horovod(settings)
    del os.environ["HOROVOD_FUSION_THRESHOLD"]
    return hvd


@contextmanager
def horovod_on(hvd: Any, context: Context) -> Iterator[None]:
    """Collective. Horovod with its thread, on the ranks of `context`, until the end."""
    hvd.init(comm=context.comm)
    yield
    hvd.shutdown()  # collective: not where a rank failed alone


def _load_horovod(settings: Reduce) -> Any:
    """Horovod's module, on the MPI that mpi4py started. Raises UserError; two MPIs are refused, both named."""
    # Its background thread looks for work once a cycle: at its own default of 1 ms it paces every small model.
    os.environ.setdefault("HOROVOD_CYCLE_TIME", str(settings.cycle_time_ms))
    os.environ["HOROVOD_FUSION_THRESHOLD"] = str(int(settings.fusion_threshold_mb * 2**20))  # see Bucket
    if settings.autotune:
        os.environ["HOROVOD_AUTOTUNE"] = "1"
        if settings.autotune_log_file:
            os.environ["HOROVOD_AUTOTUNE_LOG"] = settings.autotune_log_file
    if settings.hierarchical_allreduce:
        os.environ["HOROVOD_HIERARCHICAL_ALLREDUCE"] = "1"
    try:
        import horovod.torch as hvd
        import horovod.torch.mpi_lib_v2 as library
    except ImportError as error:
        raise UserError(
            f"reduce.strategy = '{settings.strategy}', and Horovod cannot be loaded on {socket.gethostname()}: {error}",
            "Run `make install`, or set reduce.strategy to mpi (or local for one process).",
        ) from None
    require_one_mpi("Horovod", library.__file__)
    return hvd
