"""The machine, the software and the job, as meta.json records them."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_train import __version__
from hpc_train.core import environment, redaction
from hpc_train.core.records import SCHEMA
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mpi_library import mpi_version
from hpc_train.train.comm.placement import RankPlacement


def provenance(context: Context, places: list[RankPlacement]) -> dict[str, Any]:
    """On the root: the entries of meta.json on machine, versions, git state and Slurm job."""
    return {
        "schema": SCHEMA,
        "hpc_train": __version__,
        "command": redaction.command([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "size": context.world.size,
        "hosts": list(dict.fromkeys(place.host for place in places)),
        "ranks": [vars(place) for place in places],
        "cpu_model": _cpu_model(),
        "kernel": platform.release(),
        "versions": _versions(),
        "mpi": mpi_version(context),
        "git": git_state(Path.cwd()),
        "slurm": environment.recorded_slurm(os.environ),
        "environment": environment.recorded(os.environ),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for name in ("mpi4py", "horovod", "h5py"):
        if name in sys.modules:
            versions[name] = importlib.metadata.version(name)
    if "h5py" in sys.modules:
        versions["hdf5"] = sys.modules["h5py"].version.hdf5_version
    return versions


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def git_state(folder: Path) -> dict[str, Any]:
    """The commit of the repository around `folder` and whether tracked files were changed; {} outside of one.

    changes: a checksum of these changes; two runs of a dirty tree are repeats if it is the same. Absent if git takes
    too long to list them.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD").decode().strip()
        state = {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {}
    with suppress(OSError, subprocess.SubprocessError):
        if state["dirty"]:
            # --no-ext-diff: the user's own diff program (diff.external) could print anything, or nothing.
            changes = _git(folder, "diff", "HEAD", "--full-index", "--no-ext-diff", "--no-color")
            state["changes"] = hashlib.sha256(changes).hexdigest()[:16]
    return state


def _git(folder: Path, *words: str) -> bytes:
    return subprocess.run(("git", "-C", str(folder), *words), capture_output=True, timeout=10, check=True).stdout
