"""All ranks write their parts of a checkpoint in common calls of MPI-IO (`checkpoint.write = "collective"`).

MPI-IO gathers the pieces of many ranks on a few and writes them in large blocks, aligned to the file system's stripes.
"""

import errno
import os
from functools import partial
from itertools import zip_longest

import numpy as np

from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mpi_library import mpi
from hpc_train.train.run.checkpoint.ranges import checksum
from hpc_train.train.run.checkpoint.shares import Part, UnusableCheckpoint
from hpc_train.train.run.checkpoint.writing import Target, pieces_of


def write_parts_together(target: Target, parts: list[Part], context: Context) -> np.ndarray:
    """Collective. Writes and syncs all ranks' parts; returns the checksums of this rank's pieces.

    Raises, on the rank that it concerns, `UnusableCheckpoint` or OSError, once all ranks have made the same calls.
    """
    MPI = mpi()
    pieces: list[tuple[int, memoryview]] = []
    fault: UnusableCheckpoint | OSError | None = None
    try:
        pieces = list(pieces_of(target, parts))
    except UnusableCheckpoint as error:
        fault = error  # the others must not wait for this rank
    num_rounds = max(context.all_gather(len(pieces)))
    try:
        file = MPI.File.Open(context.comm, str(target.path), MPI.MODE_WRONLY)
    except MPI.Exception as error:
        raise _as_os_error(error) from None
    writes = [partial(file.Write_at_all, *(piece or (0, b""))) for _, piece in zip_longest(range(num_rounds), pieces)]
    for call in (*writes, file.Sync, file.Close):
        try:
            call()
        except MPI.Exception as error:
            fault = fault or _as_os_error(error)
    if fault:
        raise fault
    return np.array([checksum(piece) for _, piece in pieces], np.uint64)


def _as_os_error(error: Exception) -> OSError:
    MPI = mpi()
    codes = {MPI.ERR_NO_SPACE: errno.ENOSPC, MPI.ERR_QUOTA: errno.EDQUOT, MPI.ERR_READ_ONLY: errno.EROFS}
    code = codes.get(getattr(error, "error_class", 0), errno.EIO)
    return OSError(code, f"{os.strerror(code)} (MPI-IO: {error})")
