"""The first look at a job's data, by a child process while the job starts: HDF5 crashes there, and not in the job."""

import os
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from hpc_train.core import child_process
from hpc_train.core.settings import Config

_MOST_S = 2.0  # about as long as torch takes to load: longer, and the job would wait for it


def begin(config: Callable[[], Config]) -> child_process.Child:
    """Its `wait` raises `UserError` where looking at the files of data.file ends a process."""
    return child_process.begin(lambda notes: _look(config(), notes))


def _look(config: Config, notes: child_process.Notes) -> None:
    os.environ["MPI4PY_RC_INITIALIZE"] = "0"  # an h5py built with MPI imports mpi4py, which would start MPI
    from hpc_train.datasets.inspect.structure import survey
    from hpc_train.train.data.foreign_files import data_paths, not_a_file

    until_s = monotonic() + _MOST_S
    for path in data_paths(config):
        if not_a_file(path) or monotonic() > until_s:
            return
        notes.at(Path(path).resolve())
        survey(path)
