"""How messages of gradients travel: collectives that run while backward computes, over MPI or over Horovod."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from hpc_train.train.comm import messages
from hpc_train.train.comm.context import Context


class Pending(Protocol):
    """A collective that has begun."""

    def wait(self) -> torch.Tensor:
        """Its result."""


class Transport(Protocol):
    """Collectives over `size` ranks. Each method begins one; all ranks begin them in the same order.

    message: one-dimensional; it must not change until the result is there. name: of the message, the same in all steps.
    """

    size: int

    def sum(self, message: torch.Tensor, name: str, is_last: bool = False) -> Pending:
        """The sum over ranks, in place if possible. is_last: nothing else is sent in this step."""

    def adasum(self, message: torch.Tensor, name: str) -> Pending:
        """Adasum (Maleki et al., MLSys 2021): adds what is orthogonal and averages what is parallel."""

    def reduce_scatter(self, message: torch.Tensor, name: str, into: torch.Tensor | None = None) -> Pending:
        """This rank's part of the sum, of `size` equal parts. into: where it goes; default: a new tensor.

        `message` may be overwritten.
        """

    def all_gather(self, part: torch.Tensor, name: str, into: torch.Tensor | None = None) -> Pending:
        """The parts of all ranks, in rank order. into: where they go; default: a new tensor."""

    def all_to_all(self, message: torch.Tensor, name: str) -> Pending:
        """Sends the n-th of `size` equal parts to rank n; returns the parts received, in rank order."""

    def progress(self) -> None:
        """Advances what is under way, for libraries that send only while they are called."""


# --------------------------------------------------------------------------------------------------------- MPI


class MpiTransport:
    """MPI's own non-blocking collectives. Tensors of a GPU are copied through the host's memory.

    MPI makes progress only while it is called, so each new message also advances those before it. A long sum is cut
    into pieces so small that each rank's part fits into its cache, with two in flight: 64 MiB in one piece took two to
    three times as long. The last sum of a step is a blocking one, which takes half the time: it begins in
    `wait`, when no computation is left to overlap with.
    """

    _PART_BYTES, _MAX_UNDER_WAY = 1 << 19, 2  # a rank's part of a piece; pieces under way

    def __init__(self, context: Context) -> None:
        self._comm, self.size = context.comm, context.world.size
        self._to_begin: deque[Callable[[], Any]] = deque()
        self._under_way: deque[Any] = deque()
        self._num_queued = self._num_done = 0

    def sum(self, message: torch.Tensor, name: str, is_last: bool = False) -> Pending:
        host = message.cpu()
        array = host.numpy()
        num_pieces = -(-message.nbytes // (self._PART_BYTES * self.size))
        pieces = (
            np.array_split(array, num_pieces) if num_pieces > 1 else [array]
        )  # array_split takes as long as a small sum
        if is_last or len(array) < self.size:  # Rabenseifner's algorithm needs an element per rank: see startup.py
            return _BlockingSum(self, pieces, host)
        return self._queue([partial(messages.begin_all_reduce, self._comm, piece) for piece in pieces], host, host)

    def adasum(self, message: torch.Tensor, name: str) -> Pending:
        raise AssertionError("only Horovod has Adasum")

    def reduce_scatter(self, message: torch.Tensor, name: str, into: torch.Tensor | None = None) -> Pending:
        # Open MPI 4.1 makes MPI_Ireduce_scatter_block of a tree to one rank, which then scatters: 7 MB over 4 nodes at
        # 1 Gbit/s took 170 ms. All-to-all in place, and a sum on each rank, takes 60 ms and no memory.
        host = message.cpu()
        begin = partial(messages.begin_all_to_all_in_place, self._comm, _bytes(host))
        into = torch.empty(len(host) // self.size, dtype=host.dtype, device=message.device) if into is None else into
        return _SumOfRows(self._queue([begin], host.view(self.size, -1), host), into)

    def all_gather(self, part: torch.Tensor, name: str, into: torch.Tensor | None = None) -> Pending:
        host = part.cpu()
        received = _on_host(into, len(host) * self.size, host.dtype)
        begin = partial(messages.begin_all_gather, self._comm, _bytes(host), _bytes(received))
        return arriving_in(self._queue([begin], received, host), into)

    def all_to_all(self, message: torch.Tensor, name: str) -> Pending:
        host = message.cpu()
        received = torch.empty_like(host)
        begin = partial(messages.begin_all_to_all, self._comm, _bytes(host), _bytes(received))
        return self._queue([begin], received, host)

    def progress(self) -> None:
        if self._under_way:
            self._advance()

    def _queue(self, begins: list[Callable[[], Any]], result: torch.Tensor, sent: torch.Tensor) -> Pending:
        self._to_begin.extend(begins)
        self._num_queued += len(begins)
        self._advance()
        return _Queued(self, self._num_queued, result, sent)

    def _advance(self) -> None:
        while self._under_way and self._under_way[0].Test():
            self._under_way.popleft()
            self._num_done += 1
        while self._to_begin and len(self._under_way) < self._MAX_UNDER_WAY:
            self._under_way.append(self._to_begin.popleft()())

    def wait_for(self, number: int) -> None:
        """Returns when the first `number` messages have arrived."""
        while self._num_done < number:
            self._under_way.popleft().Wait()
            self._num_done += 1
            self._advance()

    def sum_now(self, pieces: list[np.ndarray]) -> None:
        """Sums in place, after every message that was queued before: all ranks must keep one order."""
        self.wait_for(self._num_queued)
        for piece in pieces:
            messages.all_reduce_in_place(self._comm, piece)


@dataclass
class _Queued:
    transport: MpiTransport
    number: int  # of the last message that belongs to it
    result: torch.Tensor
    sent: torch.Tensor  # held until it has left: mpi4py 4.1 keeps no reference in reductions under way

    def wait(self) -> torch.Tensor:
        self.transport.wait_for(self.number)
        return self.result


@dataclass
class _SumOfRows:
    pending: Pending
    into: torch.Tensor

    def wait(self) -> torch.Tensor:
        rows = self.pending.wait()
        return self.into.copy_(rows.sum(0)) if self.into.device != rows.device else torch.sum(rows, 0, out=self.into)


@dataclass
class _BlockingSum:
    transport: MpiTransport
    pieces: list[np.ndarray]
    result: torch.Tensor

    def wait(self) -> torch.Tensor:
        self.transport.sum_now(self.pieces)
        return self.result


def _on_host(into: torch.Tensor | None, length: int, dtype: torch.dtype) -> torch.Tensor:
    """`into` if MPI can write there, else a new tensor."""
    return into if into is not None and into.device.type == "cpu" else torch.empty(length, dtype=dtype)


@dataclass
class _Copied:
    pending: Pending
    into: torch.Tensor

    def wait(self) -> torch.Tensor:
        result = self.pending.wait()
        return self.into if result.data_ptr() == self.into.data_ptr() else self.into.copy_(result)


def arriving_in(pending: Pending, into: torch.Tensor | None) -> Pending:
    """The same collective, whose result arrives in `into`, if given."""
    return pending if into is None else _Copied(pending, into)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy()  # MPI has no type for 16-bit floats


# ----------------------------------------------------------------------------------------------------- Horovod


class HorovodTransport:
    """Horovod's ring all-reduce in a background thread; from GPUs by NCCL if Horovod was built with it.

    hvd: horovod.torch, from `horovod_library`. ranks: Horovod's set of the ranks that send; default: all.
    """

    def __init__(self, hvd: Any, size: int, ranks: Any = None) -> None:
        self._hvd, self.size = hvd, size
        self._among = {} if ranks is None else {"process_set": ranks}

    def sum(self, message: torch.Tensor, name: str, is_last: bool = False) -> Pending:
        return self._pending(self._hvd.allreduce_async_(message, name=name, op=self._hvd.Sum, **self._among))

    def adasum(self, message: torch.Tensor, name: str) -> Pending:
        return self._pending(self._hvd.allreduce_async_(message, name=name, op=self._hvd.Adasum))

    def reduce_scatter(self, message: torch.Tensor, name: str, into: torch.Tensor | None = None) -> Pending:
        handle = self._hvd.reducescatter_async(message, name=name, op=self._hvd.Sum, **self._among)
        return arriving_in(self._pending(handle), into)

    def all_gather(self, part: torch.Tensor, name: str, into: torch.Tensor | None = None) -> Pending:
        handle = self._hvd.allgather_async(_as_fp16(part), name=f"{name}.gather", **self._among)
        return arriving_in(self._pending(handle, part.dtype), into)

    def all_to_all(self, message: torch.Tensor, name: str) -> Pending:
        return self._pending(self._hvd.alltoall_async(_as_fp16(message), name=f"{name}.to_all"), message.dtype)

    def progress(self) -> None:
        pass  # its own thread sends

    def _pending(self, handle: int, dtype: torch.dtype | None = None) -> Pending:
        return _HorovodHandle(self._hvd, handle, dtype)


@dataclass
class _HorovodHandle:
    hvd: Any
    handle: int
    dtype: torch.dtype | None  # to view the result as

    def wait(self) -> torch.Tensor:
        result = self.hvd.synchronize(self.handle)
        tensor = result[0] if isinstance(result, tuple) else result  # all-to-all also returns how much each rank sent
        return tensor if self.dtype is None else tensor.view(self.dtype)


def _as_fp16(tensor: torch.Tensor) -> torch.Tensor:
    """Horovod has no bfloat16; to move it, any 16 bits will do."""
    return tensor.view(torch.float16) if tensor.dtype == torch.bfloat16 else tensor


# ------------------------------------------------------------------------------------------------ long messages


class SplittingTransport:
    """A transport whose messages are cut so that 32 bits count them, by MPI or by Horovod over MPI.

    A message for `size` ranks is a matrix of `size` rows; a piece of it is some of its columns.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport, self.size = transport, transport.size

    def sum(self, message: torch.Tensor, name: str, is_last: bool = False) -> Pending:
        max_length = max(1, messages.MOST_BYTES // message.element_size())
        if len(message) <= max_length:
            return self._transport.sum(message, name, is_last)
        *pieces, last = message.split(max_length)
        pending = [self._transport.sum(piece, f"{name}.{number}") for number, piece in enumerate(pieces)]
        return _Joined([*pending, self._transport.sum(last, f"{name}.{len(pieces)}", is_last)], num_rows=1)

    def adasum(self, message: torch.Tensor, name: str) -> Pending:
        return self._transport.adasum(message, name)  # it needs a whole layer

    def reduce_scatter(self, message: torch.Tensor, name: str, into: torch.Tensor | None = None) -> Pending:
        if self._is_short(message.nbytes):
            return self._transport.reduce_scatter(message, name, into)
        rows = message.view(self.size, -1)
        return arriving_in(self._by_columns(self._transport.reduce_scatter, rows, name, num_rows=1), into)

    def all_gather(self, part: torch.Tensor, name: str, into: torch.Tensor | None = None) -> Pending:
        if self._is_short(part.nbytes * self.size):
            return self._transport.all_gather(part, name, into)
        return arriving_in(self._by_columns(self._transport.all_gather, part[None], name, num_rows=self.size), into)

    def all_to_all(self, message: torch.Tensor, name: str) -> Pending:
        return self._by_columns(self._transport.all_to_all, message.view(self.size, -1), name, num_rows=self.size)

    def progress(self) -> None:
        self._transport.progress()

    def _is_short(self, num_bytes: int) -> bool:
        return num_bytes <= messages.MOST_BYTES

    def _by_columns(
        self, begin: Callable[[torch.Tensor, str], Pending], rows: torch.Tensor, name: str, num_rows: int
    ) -> Pending:
        """rows: what this rank sends. num_rows: of the result."""
        max_columns = max(1, messages.MOST_BYTES // (rows.element_size() * self.size))
        if rows.shape[1] <= max_columns:
            return begin(rows.view(-1), name)
        pieces = [piece.contiguous().view(-1) for piece in rows.split(max_columns, dim=1)]
        return _Joined([begin(piece, f"{name}.{number}") for number, piece in enumerate(pieces)], num_rows)


@dataclass
class _Joined:
    pieces: list[Pending]  # each some columns of a matrix
    num_rows: int  # of the matrix

    def wait(self) -> torch.Tensor:
        return torch.cat([piece.wait().view(self.num_rows, -1) for piece in self.pieces], 1).view(-1)
