"""HDF5 through MPI-IO: transfers that all ranks make together."""

from collections.abc import Sequence
from typing import Any

import h5py

from hpc_train.core.errors import UserError
from hpc_train.train.comm.mpi_library import require_one_mpi


def require_parallel_hdf5() -> None:
    """Raises `UserError` if this h5py cannot open a file on several ranks, or uses another MPI than mpi4py."""
    if not h5py.get_config().mpi:
        raise UserError(
            "this h5py was built without MPI, and there are several ranks",
            "Run `make install`, which builds it with MPI, or start one rank.",
        )
    require_one_mpi("h5py", h5py.defs.__file__)


def select_rows(dataset: h5py.Dataset, runs: Sequence[tuple[int, int]]) -> tuple[Any, Any]:
    """(file space, memory space) for a transfer of `runs` of rows, each (first row, number of rows); maybe of none.

    For collective transfers: h5py's own indexing skips a rank with no rows, and the others would wait forever.
    """
    space, rest = dataset.id.get_space(), tuple(dataset.shape[1:])
    space.select_none()
    for first, number in runs:
        space.select_hyperslab((first, *(0 for _ in rest)), (number, *rest), op=h5py.h5s.SELECT_OR)
    num_rows = sum(number for _, number in runs)
    memory = h5py.h5s.create_simple((max(1, num_rows), *rest))
    if not num_rows:
        memory.select_none()
    return space, memory


def transfer_properties(collective: bool) -> Any:
    """HDF5's transfer property list: by all ranks together, or by each alone."""
    found = h5py.h5p.create(h5py.h5p.DATASET_XFER)
    if collective:
        found.set_dxpl_mpio(h5py.h5fd.MPIO_COLLECTIVE)
    return found
