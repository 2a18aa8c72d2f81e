"""The ranks of a job as a value: what they may do together, and how an error on one rank reaches all of them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import sleep
from types import TracebackType
from typing import Any, TypeVar, cast

import numpy as np

from hpc_train.core.errors import JointFailure, UserError, refused
from hpc_train.core.world import World
from hpc_train.train.comm import messages

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
_POLL_S = 0.002


class _Done:
    """A request of one process."""

    def Test(self) -> bool:
        return True


class Waiting:
    """Whether this rank waits for other ranks: true inside `with context.waiting:`, which may be nested.

    Every call that returns only after other ranks have made it too belongs inside. The watchdog reads this value to
    distinguish a late rank from the ranks that wait for it.
    """

    def __init__(self) -> None:
        self._depth = 0

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1

    def __bool__(self) -> bool:
        return self._depth > 0


@dataclass(frozen=True)
class Context:
    """Some ranks, seen from one of them. `comm` is None if there is no MPI (one process, strategy `local`)."""

    world: World
    comm: Any = None  # mpi4py's communicator, or a `ProcessGroup`
    waiting: Waiting = field(default_factory=Waiting, compare=False)

    # --------------------------------------------------------------------------------------- functions and errors

    def on_root(self, fn: Callable[[], T]) -> T:
        """Collective. Runs `fn` on the root. Every rank returns its value, or raises its exception.

        A UserError is raised alike on every rank. Any other exception is raised on the root, and as `JointFailure`
        on the other ranks.
        """
        if self.comm is None:
            return fn()
        mine, error = _attempt(fn) if self.world.is_root else (None, None)
        with self.waiting:
            value, shared = self.comm.bcast((mine, _picklable(error, 0)), root=0)
        if shared is not None:
            raise joint(error or shared)
        return cast(T, value)

    def on_all(self, fn: Callable[[], T]) -> T:
        """Collective. Runs `fn` on every rank. If it fails on any rank, every rank raises.

        A UserError of the lowest failing rank is raised alike on every rank. Any other exception is raised on that
        rank, and as `JointFailure` on the other ranks.
        """
        if self.comm is None:
            return fn()
        value, error = _attempt(fn)
        rank, size = self.world.rank, self.world.size
        # One number in the usual case. The error travels only if there is one: its rank then sends it to all.
        lowest = -int(self.max(np.array([-size if error is None else -rank]))[0])
        if lowest == size:
            return cast(T, value)
        with self.waiting:
            fault = self.comm.bcast(_picklable(error, rank), root=lowest)
        raise joint(error if error is not None and rank == lowest else fault)

    # ------------------------------------------------------------------------------------------- values and arrays

    def gather(self, value: T) -> list[T]:
        """Collective. Every rank's value, in rank order, on the root; an empty list on the other ranks."""
        with self.waiting:
            return [value] if self.comm is None else self.comm.gather(value, root=0) or []

    def all_gather(self, value: T) -> list[T]:
        """Collective. Every rank's value, in rank order, on every rank."""
        with self.waiting:
            return [value] if self.comm is None else self.comm.allgather(value)

    def merge(self, value: T, merge: Callable[[T, T], T]) -> T:
        """Collective. All ranks' values merged pair by pair, in a tree: no rank holds more than two at once."""
        with self.waiting:
            return value if self.comm is None else self.comm.allreduce(value, op=merge)

    all = all_gather  # the former name, which users' tasks may call: until the next release

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Collective. The element-wise sum over ranks, on every rank."""
        if self.comm is None:
            return values
        total = np.empty(values.shape, values.dtype)
        with self.waiting:
            messages.all_reduce(self.comm, np.ascontiguousarray(values), total)
        return total

    def max(self, values: np.ndarray) -> np.ndarray:
        """Collective. The element-wise maximum over ranks, on every rank."""
        if self.comm is None:
            return values
        values = np.ascontiguousarray(values)
        highest = np.empty_like(values)
        as_sent = np.uint8 if values.dtype == np.bool_ else values.dtype  # MPI has no maximum of booleans
        with self.waiting:
            messages.maximum(self.comm, values.view(as_sent), highest.view(as_sent))
        return highest

    def broadcast_array(self, array: np.ndarray, root: int = 0) -> None:
        """Collective. Overwrites `array` with that of rank `root`."""
        if self.comm is not None:
            with self.waiting:
                messages.broadcast(self.comm, array, root)

    def begin_gather(self, mine: np.ndarray, counts: list[int]) -> tuple[Any, np.ndarray]:
        """Collective. A request to test, and the array that holds all ranks' arrays, in rank order, once it is done.

        counts: how many numbers each rank sends. Only the root receives, and only the root needs `counts`.
        """
        if self.comm is None:
            return _Done(), mine
        received = np.empty(sum(counts) if self.world.is_root else 0, mine.dtype)
        return messages.begin_gather(self.comm, mine, received, counts), received

    def exchange(self, rows: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Collective. Sends the first counts[0] of `rows` to rank 0, the next counts[1] to rank 1, and so on.

        Returns the received rows, in the order of their senders, and how many each rank sent.
        """
        if self.comm is None:
            return rows, counts
        with self.waiting:
            return messages.exchange(self.comm, rows, counts)

    def barrier(self) -> None:
        """Collective."""
        if self.comm is not None:
            with self.waiting:
                self.comm.Barrier()

    def idle_barrier(self) -> None:
        """Collective. A barrier at which waiting ranks sleep and leave their cores to the ranks that still work."""
        if self.comm is not None:
            with self.waiting:
                request = self.comm.Ibarrier()
                while not request.Test():
                    sleep(_POLL_S)

    # ------------------------------------------------------------------------------------------- further contexts

    @contextmanager
    def duplicate(self) -> Iterator["Context"]:
        """Collective. The same ranks with a communicator of their own: its messages never meet those of another."""
        if self.comm is None:
            yield self
            return
        with self.waiting:
            comm = self.comm.Dup()
        yield replace(self, comm=comm)
        comm.Free()  # collective: skipped when a rank fails alone

    @contextmanager
    def split(self, color: int) -> Iterator["Context"]:
        """Collective. The ranks that pass the same `color`, in their order, with a communicator of their own."""
        if self.comm is None:
            yield self
            return
        with self.waiting:
            comm = self.comm.Split(color, self.world.rank)
        yield Context(replace(self.world, rank=comm.rank, size=comm.size), comm, self.waiting)
        comm.Free()  # collective: skipped when a rank fails alone


def _attempt(fn: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return fn(), None
    except OSError as error:
        return None, refused(error) or error
    except Exception as error:  # noqa: BLE001  it is raised again once every rank knows
        return None, error


def _picklable(error: Exception | None, rank: int) -> Exception | None:
    """What the other ranks raise for `error`: an exception of another package may not survive pickle."""
    if error is None or type(error) is UserError:
        return error
    return JointFailure(f"rank {rank}: {type(error).__name__}: {error}")


def warn(context: Context, why: str) -> None:
    """Prints a warning, on the root."""
    if context.world.is_root:
        print(f"warning: {why}", file=sys.stderr, flush=True)


def joint(error: E) -> E:
    """Marks a UserError that every rank raises: it needs no abort."""
    if isinstance(error, UserError):
        error.joint = True
    return error


def raised_on_all_ranks(error: BaseException) -> bool:
    """Whether every rank raises `error` or its `JointFailure`, so that no rank is left waiting for another."""
    return isinstance(error, JointFailure) or (isinstance(error, UserError) and error.joint)
