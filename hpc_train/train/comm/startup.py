"""Starts and ends MPI, and aborts the whole job when one rank fails.

An error that every rank raises (by `on_root` or `on_all`) unwinds every rank in order, and one rank prints it. When a
single rank fails, the others would wait for it for ever: that rank prints its error and aborts the job.
"""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import sleep
from types import FrameType

from hpc_train.core.errors import UserError
from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.redaction import message
from hpc_train.core.signals import TERMINATED, TERMINATING, PendingSignals, ignore_signals
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context, joint, raised_on_all_ranks
from hpc_train.train.comm.mpi_library import library_of, mpi

_ROOT_SPEAKS_FIRST_S = 0.5


@contextmanager
def open_context(use_mpi: bool) -> Iterator[Context]:
    """Collective. The ranks of this job. A failure of this rank alone aborts the whole job.

    A UserError or JointFailure raised on every rank passes through for `cli/main.py` to report.
    """
    if not use_mpi:
        signal.signal(signal.SIGTERM, _end_rank)
        os.environ["MPI4PY_RC_INITIALIZE"] = "0"  # an h5py built with MPI imports mpi4py, which would start MPI
        yield Context(World(host=socket.gethostname()))
        return
    # Once MPI has started, a rank that exits waits for all others in MPI_Finalize: signals wait until it can abort.
    early = PendingSignals()
    _handle_ending(early)
    context = _start_mpi()
    try:
        context = _with_local_rank(context)
        _handle_ending(_end_rank)
        for number in early.numbers:
            signal.raise_signal(number)
        with context.duplicate() as ours:  # a user's task may use MPI_COMM_WORLD
            yield ours
    except BaseException as error:  # a KeyboardInterrupt on one rank must end the others too
        if context.world.size == 1 or raised_on_all_ranks(error):
            raise
        _abort(context, error)


def _handle_ending(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in TERMINATING:
        signal.signal(number, handler)


def _end_rank(number: int, frame: FrameType | None) -> None:
    """Raises once: a second signal would interrupt what the first one started, and the rank might not abort."""
    # Not SIG_IGN: Python prints a traceback for a signal that was already pending when it became ignored.
    _handle_ending(lambda number, frame: None)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(TERMINATED)


def _abort(context: Context, error: BaseException) -> None:
    """Prints which rank failed and ends every rank at once: waiting for the others could hang for ever."""
    code = _exit_code(error)
    try:
        ignore_signals()  # a second signal would interrupt this, and the rank would exit and wait for the others
        ending = PendingSignals()
        signal.signal(signal.SIGTERM, ending)
        if context.world.rank:
            # If all ranks fail alike, the root's message is enough: it ends the others before they repeat it.
            sleep(_ROOT_SPEAKS_FIRST_S)
        sys.stdout.flush()
        if not ending.numbers:  # after SIGTERM mpirun is ending the job already: another rank has printed why
            sys.stderr.write(_last_words(context.world, error))
            sys.stderr.flush()
    finally:  # even if nothing can be written any more
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
    """Ends every rank at once, from any thread. The system keeps 8 bits of `code`; a failed job never ends with 0."""
    context.comm.Abort(code & 0xFF or 1)


@contextmanager
def join_mpi() -> Iterator[Context]:
    """Collective. The ranks of another program, which outlives this context: nothing of it is ended or aborted.

    A communicator of their own keeps these messages apart from the program's.
    """
    context = _with_local_rank(_start_mpi())
    comm = context.comm.Dup()
    yield Context(context.world, comm)
    comm.Barrier()  # collective: skipped when a rank fails alone
    comm.Free()


def _start_mpi() -> Context:
    """Starts MPI, which contacts only the launcher. Every rank raises the same errors on its own."""
    # Open MPI waits by spinning. Horovod's waiting thread then keeps the core from the thread that trains: softmax on
    # 2 ranks took 7 to 24 ms a step, and 0.7 to 0.9 ms when a waiting thread yields its core.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    # Open MPI 4.1 implements an in-place MPI_Iallreduce by a tree that sends everything log N times instead of a
    # ring's 2 (N-1)/N times: 4 MiB over 4 nodes at 100 Mbit/s took 1.8 s. Rabenseifner's algorithm, which moves as
    # much as a ring, takes 0.6 s.
    os.environ.setdefault("OMPI_MCA_coll_libnbc_iallreduce_algorithm", "3")
    # Each rank of its MPI_Iallgather sends to all others at once; recursive doubling, where the number of ranks is a
    # power of two, took 59 instead of 84 ms for 7 MB over 4 nodes at 1 Gbit/s.
    os.environ.setdefault("OMPI_MCA_coll_libnbc_iallgather_algorithm", "2")
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
        # Each rank is alone in its own MPI and raises this on its own. All of them do, so one message is enough.
        raise joint(
            UserError(
                f"the launcher started {expected} ranks, but {MPI.Get_library_version().split(',')[0].strip()} "
                f"({library_of(MPI.__file__)}) sees {comm.size}",
                "The mpirun or srun on PATH belongs to another MPI: use the one hpc-train was installed with "
                "(under Slurm with Open MPI: srun --mpi=pmix).",
            )
        )
    return Context(World(comm.rank, comm.size, host=socket.gethostname()), comm)


def _with_local_rank(context: Context) -> Context:
    """Collective. The context with this rank's number among the ranks on its host."""
    world, comm = context.world, context.comm
    try:
        node = comm.Split_type(mpi().COMM_TYPE_SHARED)  # the first message between ranks
    except mpi().Exception as error:
        raise UserError(
            f"the ranks cannot reach each other through MPI: {error}",
            "MPI prints the reason above: often a device or transport that it is set to use is missing "
            "(UCX_NET_DEVICES, UCX_TLS, OMPI_MCA_pml, OMPI_MCA_btl).",
        ) from None
    placed = replace(world, local_rank=node.rank, local_size=node.size, node_root=node.bcast(world.rank, root=0))
    node.Free()
    return Context(placed, comm)
