"""The MPI library behind mpi4py: its constants, its version, and whether other packages call the same one."""

import ctypes
import os
from typing import Any

from hpc_train.core.errors import UserError
from hpc_train.train.comm.context import Context


def mpi() -> Any:
    """mpi4py's MPI, for its constants."""
    from mpi4py import MPI

    return MPI


class _SymbolInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def library_of(extension: str) -> str:
    """Path of the MPI library that a compiled Python module calls: the file that contains its MPI_Init."""
    function = ctypes.cast(ctypes.CDLL(extension).MPI_Init, ctypes.c_void_p)
    info = _SymbolInfo()
    found = ctypes.CDLL(None).dladdr(function, ctypes.byref(info))
    assert found and info.file, f"no symbol information for MPI_Init in {extension}"
    return os.path.realpath(os.fsdecode(info.file))


def require_one_mpi(name: str, extension: str) -> None:
    """Raises a UserError naming both libraries unless `extension` (of package `name`) calls mpi4py's MPI."""
    ours, theirs = library_of(mpi().__file__), library_of(extension)
    if ours != theirs:
        raise UserError(
            f"two MPIs in one process: mpi4py calls {ours}, {name} calls {theirs}",
            "Build both against one (rm -r .venv && make install MPICC=/path/to/mpicc), and use its mpirun.",
        )


def mpi_version(context: Context) -> dict[str, str]:
    """The MPI library's name, version and path; empty where the ranks do not talk through MPI."""
    if not type(context.comm).__module__.startswith("mpi4py"):
        return {}
    version = mpi().Get_library_version().splitlines()[0].strip(" \0")
    return {"version": version, "library": library_of(mpi().__file__)}


def parallel_file_options(context: Context) -> dict[str, Any]:
    """Arguments of h5py.File, besides path and mode, with which all ranks open a file together through MPI-IO."""
    return {} if context.comm is None else {"driver": "mpio", "comm": context.comm}
