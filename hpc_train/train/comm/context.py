"""Opens and closes MPI, and ends the whole job when one rank fails. With `messages`, alone imports mpi4py.

Two kinds of failure meet here. One that every rank knows of (raised by `on_root` or `on_all`) unwinds every rank in
order: nothing hangs, and one rank tells the user. One that a single rank meets cannot be waited for by the others:
that rank says what happened and aborts the job.
"""

import ctypes
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter_ns, sleep
from types import FrameType, TracebackType
from typing import Any, TypeVar, cast

import numpy as np

from hpc_train.core.errors import JointFailure, UserError, refused
from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.redaction import message
from hpc_train.core.signals import ENDING, TERMINATED, DeferredSignals, ignore
from hpc_train.core.world import World
from hpc_train.train.comm import messages

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
_PING_PONGS = 20
_ROOT_SPEAKS_FIRST_S = 0.5
_ASLEEP_S = 0.002


class Waiting:
    """Whether this rank waits for others. `with context.waiting:` surrounds each call that ends once they make it, too.

    So the watch tells a late rank from those that wait for it.
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
    """The ranks of this job. `comm` is None where there is no MPI (one process, strategy `local`)."""

    world: World
    comm: Any = None
    waiting: Waiting = field(default_factory=Waiting, compare=False)

    def on_root(self, fn: Callable[[], T]) -> T:
        """Collective. Runs `fn` on the root; every rank returns its value, or raises its exception.

        A UserError is raised alike on every rank. Any other exception is raised on the root, and as `JointFailure`
        on the others.
        """
        if self.comm is None:
            return fn()
        mine, error = _attempt(fn) if self.world.is_root else (None, None)
        with self.waiting:
            value, shared = self.comm.bcast((mine, _shared(error, 0)), root=0)
        if shared is not None:
            raise _joint(error or shared)
        return cast(T, value)

    def on_all(self, fn: Callable[[], T]) -> T:
        """Collective. Runs `fn` on every rank; where any fails, every rank raises.

        A UserError of the lowest failing rank is raised alike everywhere. Any other exception is raised on that rank,
        and as `JointFailure` on the others.
        """
        if self.comm is None:
            return fn()
        value, error = _attempt(fn)
        shared = self.all(_shared(error, self.world.rank))
        faults = [(rank, fault) for rank, fault in enumerate(shared) if fault is not None]
        if not faults:
            return cast(T, value)
        lowest, fault = faults[0]
        raise _joint(error if error is not None and self.world.rank == lowest else fault)

    def gather(self, value: T) -> list[T]:
        """Collective. Every rank's value, in rank order, on the root; an empty list on the others."""
        with self.waiting:
            return [value] if self.comm is None else self.comm.gather(value, root=0) or []

    def all(self, value: T) -> list[T]:
        """Collective. Every rank's value, in rank order, on every rank."""
        with self.waiting:
            return [value] if self.comm is None else self.comm.allgather(value)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Collective. The element-wise sum over ranks, on every rank."""
        if self.comm is None:
            return values
        total = np.empty(values.shape, values.dtype)
        with self.waiting:
            messages.add_up(self.comm, np.ascontiguousarray(values), total)
        return total

    def max(self, values: np.ndarray) -> np.ndarray:
        """Collective. The element-wise maximum over ranks, on every rank."""
        return np.max(self.all(values), axis=0)

    def broadcast_array(self, array: np.ndarray) -> None:
        """Collective. Replaces `array` by the root's."""
        if self.comm is not None:
            with self.waiting:
                messages.broadcast(self.comm, array)

    def gather_arrays(self, mine: np.ndarray | None, places: list[np.ndarray | None]) -> None:
        """Collective. On the root, each rank's array is put in its place, rank by rank: no copy of all is held.

        places: on the root, by rank, contiguous; None for a rank whose `mine` is None. Empty elsewhere.
        """
        with self.waiting:
            if not self.world.is_root:
                if mine is not None:
                    messages.send(self.comm, mine, dest=0)
                return
            for rank, place in enumerate(places):
                if place is not None and rank:
                    messages.receive(self.comm, place, source=rank)
                elif place is not None:
                    place[...] = mine

    def exchange(self, rows: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Collective. Sends the first counts[0] of `rows` to rank 0, the next counts[1] to rank 1, and so on.

        Returns what this rank was sent, in the senders' order, and how many rows by each.
        """
        if self.comm is None:
            return rows, counts
        with self.waiting:
            return messages.exchange(self.comm, rows, counts)

    @contextmanager
    def duplicate(self) -> Iterator["Context"]:
        """Collective. The same ranks with a communicator of their own: no message on it meets one of another's."""
        if self.comm is None:
            yield self
            return
        with self.waiting:
            comm = self.comm.Dup()
        yield replace(self, comm=comm)
        comm.Free()  # collective: not where a rank failed alone

    def team(self, number: int) -> "Context":
        """Collective. The ranks that give the same `number`, in their order, as a context of their own."""
        if self.comm is None:
            return self
        with self.waiting:
            comm = self.comm.Split(number, self.world.rank)
        return Context(replace(self.world, rank=comm.rank, size=comm.size), comm, self.waiting)

    def barrier(self) -> None:
        """Collective."""
        if self.comm is not None:
            with self.waiting:
                self.comm.Barrier()

    def wait_asleep(self) -> None:
        """Collective. A barrier at which ranks that wait leave their cores to those that are at work."""
        if self.comm is not None:
            with self.waiting:
                request = self.comm.Ibarrier()
                while not request.Test():
                    sleep(_ASLEEP_S)


def _attempt(fn: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return fn(), None
    except OSError as error:
        return None, refused(error) or error
    except Exception as error:  # noqa: BLE001  every rank must hear of it before it is raised again
        return None, error


def _shared(error: Exception | None, rank: int) -> Exception | None:
    """What other ranks raise for `error`: exceptions of others may not travel through pickle."""
    if error is None or type(error) is UserError:
        return error
    return JointFailure(f"rank {rank}: {type(error).__name__}: {error}")


# ------------------------------------------------------------------------------------- opening and closing


@contextmanager
def open_context(use_mpi: bool) -> Iterator[Context]:
    """Collective. The ranks of this job; on a failure of this rank alone the whole job is ended.

    A UserError or JointFailure raised on every rank passes through for `cli/main.py` to report.
    """
    if not use_mpi:
        signal.signal(signal.SIGTERM, _end_rank)
        os.environ["MPI4PY_RC_INITIALIZE"] = "0"  # an h5py built with MPI imports mpi4py, which would start MPI
        yield Context(World(host=socket.gethostname()))
        return
    # Once MPI is there, a rank that leaves waits for all others in MPI_Finalize: signals are kept until it can abort.
    early = DeferredSignals()
    _on_ending(early)
    context = _start_mpi()
    try:
        context = _placed(context)
        _on_ending(_end_rank)
        for number in early.numbers:
            signal.raise_signal(number)
        with context.duplicate() as ours:  # a task of the user's may talk on MPI_COMM_WORLD
            yield ours
    except BaseException as error:  # a KeyboardInterrupt on one rank must end the others too
        if context.world.size == 1 or known_to_all(error):
            raise
        _abort(context, error)


def known_to_all(error: BaseException) -> bool:
    """Whether every rank raises `error` (or its like), so that no rank waits for another in vain."""
    return isinstance(error, JointFailure) or (isinstance(error, UserError) and error.joint)


def _joint(error: E) -> E:
    """Marks a UserError that every rank raises: it needs no abort."""
    if isinstance(error, UserError):
        error.joint = True
    return error


def _on_ending(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in ENDING:
        signal.signal(number, handler)


def _end_rank(number: int, frame: FrameType | None) -> None:
    """Raises, once: a second signal would break into what the first one has begun, and the rank might not abort."""
    _on_ending(lambda number, frame: None)  # ignored, Python would tell of one that is under way with a traceback
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(TERMINATED)


def _abort(context: Context, error: BaseException) -> None:
    """Says which rank failed and ends every rank at once; waiting for the others could hang for ever."""
    code = _exit_code(error)
    try:
        ignore()  # a second signal must not break into this: the rank would leave, and wait for the others
        ending = DeferredSignals()
        signal.signal(signal.SIGTERM, ending)
        if context.world.rank:
            # Where all ranks fail alike, the root speaks for them: it ends the others before they repeat it.
            sleep(_ROOT_SPEAKS_FIRST_S)
        sys.stdout.flush()
        if not ending.numbers:  # else mpirun ends the job already: another rank has spoken
            sys.stderr.write(_last_words(context.world, error))
            sys.stderr.flush()
    finally:  # even where nothing can be written any more
        end_job(context, code)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def _last_words(world: World, error: BaseException) -> str:
    if isinstance(error, UserError):
        text = f"{error}\n"
    elif isinstance(error, KeyboardInterrupt):
        text = "interrupted\n"
    elif isinstance(error, SystemExit):
        text = "interrupted by SIGTERM\n" if error.code == TERMINATED else f"ended with exit code {error.code}\n"
    else:
        text = "".join(traceback.format_exception(error))
    text = message(text)
    head = f"hpc-train: rank {world.rank} on {world.host}: "
    return head + text.replace("\n", f"\n[rank {world.rank}] ", text.count("\n") - 1)


def end_job(context: Context, code: int) -> None:
    """Ends every rank at once, from whatever thread. The system keeps 8 bits, and a failed job never ends with 0."""
    context.comm.Abort(code & 0xFF or 1)


@contextmanager
def join_mpi() -> Iterator[Context]:
    """Collective. The ranks of a program that is not ours, which goes on: nothing of it is ended or aborted.

    They get a communicator of their own, so that no message of ours meets one of the program's.
    """
    context = _placed(_start_mpi())
    comm = context.comm.Dup()
    yield Context(context.world, comm)
    comm.Barrier()  # collective: not where a rank failed alone
    comm.Free()


def _start_mpi() -> Context:
    """Starts MPI, which talks to the launcher alone. What is raised, every rank meets by itself."""
    # Open MPI waits by spinning. Horovod's thread that waits then keeps the rank's core from the thread that trains:
    # softmax on 2 ranks took 7 to 24 ms a step, and 0.7 to 0.9 ms when a waiting thread offers its core to others.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    # Open MPI 4.1 sums without blocking, in place, by a tree that sends everything log N times, and not the 2 (N-1)/N
    # times of a ring: 4 MiB over 4 nodes at 100 Mbit/s took 1.8 s. By Rabenseifner's algorithm, which moves what a
    # ring moves, it takes 0.6 s.
    os.environ.setdefault("OMPI_MCA_coll_libnbc_iallreduce_algorithm", "3")
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(
            f"mpi4py cannot be loaded: {error}",
            "Run `make install`, load the MPI it was built with, or use one process: --set reduce.strategy=local",
        ) from None
    comm = MPI.COMM_WORLD
    expected = JobEnvironment.current().size
    if expected is not None and expected != comm.size:
        # Each rank is alone in its own MPI and finds this by itself: all of them, so one message is enough.
        raise _joint(
            UserError(
                f"the launcher started {expected} ranks, but {MPI.Get_library_version().split(',')[0].strip()} "
                f"({library_of(MPI.__file__)}) sees {comm.size}",
                "The mpirun or srun on PATH belongs to another MPI: use the one hpc-train was installed with "
                "(under Slurm with Open MPI: srun --mpi=pmix).",
            )
        )
    return Context(World(comm.rank, comm.size, host=socket.gethostname()), comm)


def _placed(context: Context) -> Context:
    """Collective. With this rank's place on its host."""
    world, comm = context.world, context.comm
    try:
        node = comm.Split_type(mpi().COMM_TYPE_SHARED)  # the first time that ranks talk
    except mpi().Exception as error:
        raise UserError(
            f"the ranks cannot reach each other through MPI: {error}",
            "Above, MPI says why: often a device or transport that it was told to use is not there (UCX_NET_DEVICES, "
            "UCX_TLS, OMPI_MCA_pml, OMPI_MCA_btl).",
        ) from None
    placed = replace(world, local_rank=node.rank, local_size=node.size)
    node.Free()
    return Context(placed, comm)


# ------------------------------------------------------------------------------------- what others ask of MPI


class _SymbolInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def mpi() -> Any:
    """mpi4py's MPI, for its constants."""
    from mpi4py import MPI

    return MPI


def library_of(extension: str) -> str:
    """Path of the MPI library that a compiled Python module calls: where its own MPI_Init lies."""
    function = ctypes.cast(ctypes.CDLL(extension).MPI_Init, ctypes.c_void_p)
    info = _SymbolInfo()
    found = ctypes.CDLL(None).dladdr(function, ctypes.byref(info))
    assert found and info.file, f"no symbol information for MPI_Init in {extension}"
    return os.path.realpath(os.fsdecode(info.file))


def require_one_mpi(name: str, extension: str) -> None:
    """Raises a UserError naming both libraries unless `extension` (of package `name`) calls mpi4py's MPI."""
    from mpi4py import MPI

    ours, theirs = library_of(MPI.__file__), library_of(extension)
    if ours != theirs:
        raise UserError(
            f"two MPIs in one process: mpi4py calls {ours}, {name} calls {theirs}",
            "Build both against one (rm -r .venv && make install MPICC=/path/to/mpicc), and use its mpirun.",
        )


def mpi_version(context: Context) -> dict[str, str]:
    """The MPI library's name, version and path; empty where the ranks do not talk through MPI."""
    if not type(context.comm).__module__.startswith("mpi4py"):
        return {}
    from mpi4py import MPI

    return {"version": MPI.Get_library_version().splitlines()[0].strip(" \0"), "library": library_of(MPI.__file__)}


def clock_offsets_ns(context: Context) -> list[int]:
    """Collective. On the root: each rank's monotonic clock minus the root's, in ns (empty elsewhere)."""
    return [offset_ns for offset_ns, _ in compared_clocks(context, perf_counter_ns)]


def compared_clocks(context: Context, now_ns: Callable[[], int]) -> list[tuple[int, int]]:
    """Collective. On the root: (each rank's clock minus the root's, how far that may be wrong), in ns; empty elsewhere.

    Ping-pong with each rank in turn; the exchange with the shortest round trip tells best (Cristian, "Probabilistic
    clock synchronization", Distributed Computing 1989): its error is at most half that round trip.
    """
    comm, world = context.comm, context.world
    if comm is None:
        return [(0, 0)]
    with context.waiting:
        return _compared_with_root(comm, world, now_ns)


def _compared_with_root(comm: Any, world: World, now_ns: Callable[[], int]) -> list[tuple[int, int]]:
    stamp = np.empty(1, dtype=np.int64)
    if not world.is_root:
        for _ in range(_PING_PONGS):
            messages.receive(comm, stamp, source=0)
            stamp[0] = now_ns()
            messages.send(comm, stamp, dest=0)
        return []
    found = [(0, 0)]
    for rank in range(1, world.size):
        trips = []
        for _ in range(_PING_PONGS):
            at_ns, sent_ns = now_ns(), perf_counter_ns()
            messages.send(comm, stamp, dest=rank)
            messages.receive(comm, stamp, source=rank)
            half_ns = (perf_counter_ns() - sent_ns) // 2
            trips.append((half_ns, int(stamp[0]) - at_ns - half_ns))
        half_ns, offset_ns = min(trips)
        found.append((offset_ns, half_ns))
    return found


def parallel_file_options(context: Context) -> dict[str, Any]:
    """What h5py.File needs besides path and mode to be opened by all ranks together, through MPI-IO."""
    return {} if context.comm is None else {"driver": "mpio", "comm": context.comm}
