"""The first look at a job's data, by a child process while the job starts: HDF5 crashes there, and not in the job."""

import os
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from hpc_train import apart
from hpc_train.config import Config

_MOST_S = 2.0  # about as long as torch takes to load: longer, and the job would wait for it


def begin(config: Callable[[], Config]) -> apart.Child:
    """Its `wait` raises `UserError` where looking at the files of data.file ends a process."""
    return apart.begin(lambda notes: _look(config(), notes))


def _look(config: Config, notes: apart.Notes) -> None:
    os.environ["MPI4PY_RC_INITIALIZE"] = "0"  # an h5py built with MPI imports mpi4py, which would start MPI
    from hpc_train.train.foreign import data_paths, not_a_file
    from hpc_train.train.inspect.survey import survey

    until_s = monotonic() + _MOST_S
    for path in data_paths(config):
        if not_a_file(path) or monotonic() > until_s:
            return
        notes.at(Path(path).resolve())
        survey(path)
