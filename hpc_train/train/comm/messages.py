"""Every message of arrays between ranks. MPI counts in 32 bits: what is longer goes in pieces.

mpi4py takes larger counts where the MPI library does, from MPI 4 on; Open MPI 4.1 does not. So no other module calls
MPI's methods for buffers: each function here cuts what it is given, or is only for what was cut before.

Arrays are contiguous in memory.
"""

from typing import Any

import numpy as np

MOST_BYTES = 1 << 30  # of one message of MPI


def pieces(array: np.ndarray) -> list[np.ndarray]:
    """`array` as flat views that are short enough; one, if it is empty."""
    assert array.flags.c_contiguous
    flat, each = array.reshape(-1), max(1, MOST_BYTES // array.itemsize)
    return [flat[begin : begin + each] for begin in range(0, max(1, len(flat)), each)]


def broadcast(comm: Any, array: np.ndarray) -> None:
    """Collective. Replaces `array` by the root's."""
    for piece in pieces(array):
        comm.Bcast(piece, root=0)


def all_reduce(comm: Any, array: np.ndarray, total: np.ndarray) -> None:
    """Collective. `total` becomes the sum over ranks."""
    for mine, sums in zip(pieces(array), pieces(total), strict=True):
        comm.Allreduce(mine, sums)


def all_reduce_in_place(comm: Any, array: np.ndarray) -> None:
    """Collective. `array` becomes the sum over ranks."""
    from mpi4py import MPI

    for piece in pieces(array):
        comm.Allreduce(MPI.IN_PLACE, piece)


def send(comm: Any, array: np.ndarray, dest: int, **options: Any) -> None:
    """options: tag, as in all functions for two ranks."""
    for piece in pieces(array):
        comm.Send(piece, dest=dest, **options)


def receive(comm: Any, array: np.ndarray, source: int, **options: Any) -> None:
    """options: tag and status; a sender that is not known beforehand sends what fits one piece."""
    for piece in pieces(array):
        comm.Recv(piece, source=source, **options)


def send_and_receive(comm: Any, array: np.ndarray, dest: int, received: np.ndarray, source: int) -> None:
    """At once, so that ranks may do so in a ring; for what fits one piece. `received` may be longer than what comes."""
    ((mine,), (theirs,)) = pieces(array), pieces(received)
    comm.Sendrecv(mine, dest, recvbuf=theirs, source=source)


def begin_send(comm: Any, array: np.ndarray, dest: int, tag: int) -> list[Any]:
    """Requests to wait for."""
    return [comm.Isend(piece, dest=dest, tag=tag) for piece in pieces(array)]


def begin_receive(comm: Any, array: np.ndarray, source: int, tag: int) -> list[Any]:
    """Requests to wait for."""
    return [comm.Irecv(piece, source=source, tag=tag) for piece in pieces(array)]


def exchange(comm: Any, rows: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Collective. Sends the first counts[0] of `rows` to rank 0, the next counts[1] to rank 1, and so on.

    Returns what this rank was sent, in the senders' order, and how many rows by each.
    """
    counts, theirs = counts.astype(np.int64), np.empty(comm.size, np.int64)
    comm.Alltoall(counts, theirs)
    row_bytes = rows.dtype.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))
    most = max(1, MOST_BYTES // max(1, row_bytes * comm.size))  # rows between two ranks in one message
    num_rounds = max(comm.allgather(-(-int(counts.max(initial=0)) // most)))
    received = np.empty((int(theirs.sum()), *rows.shape[1:]), rows.dtype)
    if num_rounds <= 1:
        _exchange_once(comm, rows, counts, received, theirs)
        return received, theirs
    starts, places = np.cumsum(counts) - counts, np.cumsum(theirs) - theirs
    for number in range(num_rounds):
        here, there = (np.clip(each - number * most, 0, most) for each in (counts, theirs))
        leaving = [rows[start + number * most :][:num] for start, num in zip(starts, here, strict=True)]
        arriving = np.empty((int(there.sum()), *rows.shape[1:]), rows.dtype)
        _exchange_once(comm, np.concatenate(leaving), here, arriving, there)
        for place, part in zip(places, np.split(arriving, np.cumsum(there)[:-1]), strict=True):
            received[place + number * most :][: len(part)] = part
    return received, theirs


def _exchange_once(comm: Any, rows: np.ndarray, counts: np.ndarray, received: np.ndarray, theirs: np.ndarray) -> None:
    from mpi4py import MPI

    row = MPI.BYTE.Create_contiguous(rows.dtype.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))).Commit()
    try:
        comm.Alltoallv([np.ascontiguousarray(rows), counts, row], [received, theirs, row])
    finally:
        row.Free()


# ------------------------------------------------------------------------------------- collectives under way
# For what was cut before (`reduce.InPieces`): each returns a request.


def begin_all_reduce(comm: Any, array: np.ndarray) -> Any:
    """Collective. `array` becomes the sum over ranks."""
    from mpi4py import MPI

    assert array.nbytes <= _most_at_once(comm)
    return comm.Iallreduce(MPI.IN_PLACE, array)


def begin_all_to_all(comm: Any, array: np.ndarray, received: np.ndarray) -> Any:
    """Collective. The n-th of equal parts of `array` goes to rank n, and its part for this rank comes back."""
    assert array.nbytes <= _most_at_once(comm)
    return comm.Ialltoall(array, received)


def begin_all_gather(comm: Any, array: np.ndarray, received: np.ndarray) -> Any:
    """Collective. The arrays of all ranks, in their order, on all of them."""
    assert received.nbytes <= _most_at_once(comm)
    return comm.Iallgather(array, received)


def _most_at_once(comm: Any) -> int:
    return max(MOST_BYTES, comm.size * 8)  # a number a rank is always sent together
