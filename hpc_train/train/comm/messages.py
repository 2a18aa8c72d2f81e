"""Every message of arrays between ranks. MPI counts in 32 bits: longer messages are cut into pieces.

mpi4py passes larger counts if the MPI library supports them (MPI 4 and later); Open MPI 4.1 does not. So no other
module calls MPI's methods for buffers.

Arrays are contiguous in memory.
"""

from typing import Any

import numpy as np

MOST_BYTES = 1 << 30  # of one message of MPI


def pieces(array: np.ndarray) -> list[np.ndarray]:
    """`array` as flat views that are short enough; one if it is empty."""
    assert array.flags.c_contiguous
    flat, max_length = array.reshape(-1), max(1, MOST_BYTES // array.itemsize)
    return [flat[begin : begin + max_length] for begin in range(0, max(1, len(flat)), max_length)]


def broadcast(comm: Any, array: np.ndarray, root: int = 0) -> None:
    """Collective. Overwrites `array` with that of rank `root`."""
    for piece in pieces(array):
        comm.Bcast(piece, root=root)


def all_reduce(comm: Any, array: np.ndarray, total: np.ndarray) -> None:
    """Collective. `total` becomes the sum over ranks."""
    for mine, sums in zip(pieces(array), pieces(total), strict=True):
        comm.Allreduce(mine, sums)


def maximum(comm: Any, array: np.ndarray, highest: np.ndarray) -> None:
    """Collective. `highest` becomes the element-wise maximum over ranks."""
    for mine, maxima in zip(pieces(array), pieces(highest), strict=True):
        comm.Allreduce(mine, maxima, op=_max_of(comm))


def _max_of(comm: Any) -> Any:
    if hasattr(comm, "MAX"):  # a `ProcessGroup`: there may be no mpi4py
        return comm.MAX
    from mpi4py import MPI

    return MPI.MAX


def all_reduce_in_place(comm: Any, array: np.ndarray) -> None:
    """Collective. `array` becomes the sum over ranks."""
    from mpi4py import MPI

    for piece in pieces(array):
        comm.Allreduce(MPI.IN_PLACE, piece)


def send(comm: Any, array: np.ndarray, dest: int, tag: int = 0) -> None:
    for piece in pieces(array):
        comm.Send(piece, dest=dest, **_tagged(tag))


def receive(comm: Any, array: np.ndarray, source: int, tag: int = 0) -> None:
    for piece in pieces(array):
        comm.Recv(piece, source=source, **_tagged(tag))


def receive_from_any(comm: Any, array: np.ndarray, tag: int) -> int:
    """Receives from whichever rank sends first, and returns that rank. For what fits one piece."""
    from mpi4py import MPI

    status, (piece,) = MPI.Status(), pieces(array)
    comm.Recv(piece, source=MPI.ANY_SOURCE, tag=tag, status=status)
    return int(status.source)


def _tagged(tag: int) -> dict[str, int]:
    return {"tag": tag} if tag else {}  # `ProcessGroup` has no tags


def send_and_receive(comm: Any, array: np.ndarray, dest: int, received: np.ndarray, source: int) -> None:
    """Both at once, as in a ring of ranks. For what fits one piece; `received` may be longer than needed."""
    ((mine,), (theirs,)) = pieces(array), pieces(received)
    comm.Sendrecv(mine, dest, recvbuf=theirs, source=source)


def begin_send(comm: Any, array: np.ndarray, dest: int, tag: int) -> list[Any]:
    """Requests to wait for."""
    return [comm.Isend(piece, dest=dest, tag=tag) for piece in pieces(array)]


def begin_receive(comm: Any, array: np.ndarray, source: int, tag: int) -> list[Any]:
    """Requests to wait for."""
    return [comm.Irecv(piece, source=source, tag=tag) for piece in pieces(array)]


# ------------------------------------------------------------------------------------------------ rows


def exchange(comm: Any, rows: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Collective. Sends the first counts[0] of `rows` to rank 0, the next counts[1] to rank 1, and so on.

    Returns the received rows, in the order of their senders, and how many each rank sent.
    """
    counts, theirs = counts.astype(np.int64), np.empty(comm.size, np.int64)
    comm.Alltoall(counts, theirs)
    row_bytes = rows.dtype.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))
    max_rows = max(1, MOST_BYTES // max(1, row_bytes * comm.size))  # between two ranks in one message
    num_rounds = max(comm.allgather(-(-int(counts.max(initial=0)) // max_rows)))
    received = np.empty((int(theirs.sum()), *rows.shape[1:]), rows.dtype)
    if num_rounds <= 1:
        _exchange_once(comm, rows, counts, received, theirs)
        return received, theirs
    send_starts, receive_starts = np.cumsum(counts) - counts, np.cumsum(theirs) - theirs
    for done in range(0, num_rounds * max_rows, max_rows):
        num_leaving, num_arriving = np.clip(counts - done, 0, max_rows), np.clip(theirs - done, 0, max_rows)
        leaving = [rows[start + done :][:num] for start, num in zip(send_starts, num_leaving, strict=True)]
        arriving = np.empty((int(num_arriving.sum()), *rows.shape[1:]), rows.dtype)
        _exchange_once(comm, np.concatenate(leaving), num_leaving, arriving, num_arriving)
        parts = np.split(arriving, np.cumsum(num_arriving)[:-1])
        for start, part in zip(receive_starts, parts, strict=True):
            received[start + done :][: len(part)] = part
    return received, theirs


def _exchange_once(comm: Any, rows: np.ndarray, counts: np.ndarray, received: np.ndarray, theirs: np.ndarray) -> None:
    from mpi4py import MPI

    row = MPI.BYTE.Create_contiguous(rows.dtype.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))).Commit()
    try:
        comm.Alltoallv([np.ascontiguousarray(rows), counts, row], [received, theirs, row])
    finally:
        row.Free()


# ------------------------------------------------------------------------------------- non-blocking collectives
# For messages that `transports.SplittingTransport` has cut: each returns a request.


def begin_all_reduce(comm: Any, array: np.ndarray) -> Any:
    """Collective. `array` becomes the sum over ranks."""
    from mpi4py import MPI

    assert array.nbytes <= _max_bytes(comm)
    return comm.Iallreduce(MPI.IN_PLACE, array)


def begin_gather(comm: Any, array: np.ndarray, received: np.ndarray, counts: list[int]) -> Any:
    """Collective. `received` becomes, on rank 0, the arrays of all ranks, which send `counts` numbers each."""
    assert received.nbytes <= _max_bytes(comm)
    is_root = comm.rank == 0
    return comm.Igatherv(array, [received, counts] if is_root else None, root=0)


def begin_all_to_all_in_place(comm: Any, array: np.ndarray) -> Any:
    """Collective. Sends the n-th of equal parts of `array` to rank n; the parts from all ranks take their places."""
    from mpi4py import MPI

    assert array.nbytes <= _max_bytes(comm)
    return comm.Ialltoall(MPI.IN_PLACE, array)


def begin_all_to_all(comm: Any, array: np.ndarray, received: np.ndarray) -> Any:
    """Collective. Sends the n-th of equal parts of `array` to rank n; `received` holds the parts from all ranks."""
    assert array.nbytes <= _max_bytes(comm)
    return comm.Ialltoall(array, received)


def begin_all_gather(comm: Any, array: np.ndarray, received: np.ndarray) -> Any:
    """Collective. `received` becomes the arrays of all ranks, in rank order."""
    assert received.nbytes <= _max_bytes(comm)
    return comm.Iallgather(array, received)


def _max_bytes(comm: Any) -> int:
    return max(MOST_BYTES, comm.size * 8)  # at least one number a rank is sent at once
