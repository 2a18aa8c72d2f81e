"""A look at a job's data by a child process while the job starts, so that a crash of HDF5 ends the child only."""

import os
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from hpc_train.core import child_process
from hpc_train.core.settings import Config

_MAX_S = 2.0  # about as long as torch takes to load: longer, and the job would wait for the child


def begin(config: Callable[[], Config]) -> child_process.Child:
    """Starts the child. Its `wait` raises `UserError` if the files of data.file crash a process that opens them."""
    return child_process.begin(lambda notes: _look(config(), notes))


def _look(config: Config, notes: child_process.Notes) -> None:
    os.environ["MPI4PY_RC_INITIALIZE"] = "0"  # an h5py built with MPI imports mpi4py, which would start MPI
    from hpc_train.datasets.inspect.structure import read_structure
    from hpc_train.train.data.hdf5_faults import data_paths, not_a_file

    if config.data.dataset is not None:
        return
    deadline_s = monotonic() + _MAX_S
    keys = [key for key in ("file", "validation_file", "test_file") if key == "file" or getattr(config.data, key)]
    for path in (path for key in keys for path in data_paths(config, key)):
        if not_a_file(path) or monotonic() > deadline_s:
            return
        notes.at(Path(path).resolve())
        read_structure(path)
