"""The file systems of runs and data: parallel writing and reading, locks, stripes."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from hpc_train.core.filesystem import file_system, stripe_count
from hpc_train.core.formatting import binary_size, plural
from hpc_train.doctor.check import Answer, Finding, Subject, Values, fail, not_applicable, ok, warn
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.mpi_library import parallel_file_options

_STRIPED_BYTES = 1 << 30  # smaller files gain little from more stripes
_ROWS, _ROW_BYTES = 256, 1 << 13  # of a rank: 2 MiB

# ---------------------------------------------------------------------------------------- parallel file


def probe_parallel_file(subject: Subject) -> Values:
    """Collective. All ranks write one file through h5py and MPI-IO; each reads the rows of another rank."""
    context, folder = subject.context, subject.folder
    place, error = context.on_root(lambda: _new_folder(folder))
    values: Values = {"folder": str(folder), "file_system": file_system(folder), "error": error, "parallel": False}
    if place is None:
        return values
    try:
        sees = place.is_dir()
        if not all(context.all_gather(sees)):
            return {**values, "unseen": not sees}
        return {**values, **_write_and_read(place / "together.h5", context)}
    finally:
        context.barrier()
        shutil.rmtree(place, ignore_errors=True)


def _new_folder(folder: Path) -> tuple[Path | None, str | None]:
    try:
        return Path(tempfile.mkdtemp(prefix=".hpc-train-doctor-", dir=folder)), None
    except OSError as error:
        return None, error.strerror or str(error)


def _write_and_read(path: Path, context: Context) -> Values:
    import h5py

    world, options = context.world, parallel_file_options(context)
    if not h5py.get_config().mpi:
        if world.size > 1:
            return {"without_mpi": True}
        options = {}
    mine = _rows(world.rank)
    began = perf_counter()
    try:
        with h5py.File(path, "w", **options) as file:
            data = file.create_dataset("x", (world.size * _ROWS, _ROW_BYTES), "u1")
            with _collective(data, options):
                data[world.rank * _ROWS : (world.rank + 1) * _ROWS] = mine
        written_s = perf_counter() - began
        other = (world.rank + 1) % world.size
        with h5py.File(path, "r", **options) as file, _collective(file["x"], options):
            theirs = file["x"][other * _ROWS : (other + 1) * _ROWS]
    except OSError as error:
        return {"error": str(error), "parallel": bool(options)}
    same = bool(np.array_equal(theirs, _rows(other)))
    return {"parallel": bool(options), "same": same, "write_s": written_s, "bytes": mine.nbytes}


def _collective(data: Any, options: dict[str, Any]) -> Any:
    return data.collective if options else nullcontext()


def _rows(rank: int) -> np.ndarray:
    return np.random.default_rng(rank).integers(0, 256, (_ROWS, _ROW_BYTES), np.uint8)


def evaluate_parallel_file(answers: Sequence[Answer]) -> Finding:
    """Whether ranks read what they wrote together."""
    values = answers[0].values
    where = f"{values['folder']} ({values['file_system']})"
    elsewhere = "--set run.root=FOLDER   # a folder that every node can write"
    unseen = [answer for answer in answers if answer.values.get("unseen")]
    if unseen:
        return fail(f"{where}: what rank 0 creates there is not visible on all nodes", elsewhere, unseen)
    failed = [answer for answer in answers if answer.values["error"]]
    if failed:
        error = failed[0].values["error"]
        no_locks = "export HDF5_USE_FILE_LOCKING=FALSE   # this file system refuses locks"
        remedy = no_locks if "lock" in error else elsewhere
        return fail(f"{where}: {error}", remedy, failed)
    if values.get("without_mpi"):
        remedy = "HDF5_MPI=ON CC=mpicc pip install --no-build-isolation --no-binary=h5py h5py   # or make install"
        return warn("h5py was built without MPI: ranks cannot write one file together", remedy)
    wrong = [answer for answer in answers if not answer.values["same"]]
    if wrong:
        remedy = "export OMPI_MCA_io=^ompio   # ROMIO instead; on Lustre mount with flock"
        return fail(f"{where}: data read differ from data written", remedy, wrong)
    rate = sum(answer.values["bytes"] for answer in answers) / max(answer.values["write_s"] for answer in answers)
    how = "written by all ranks" if values["parallel"] else "written"
    return ok(f"{where}: {how} and read back; {rate / 1e6:,.0f} MB/s through the page cache")


# ---------------------------------------------------------------------------------------- locks


def probe_locks(subject: Subject) -> Values:
    """Collective. Exclusive locks where runs are written, and shared locks on the data file.

    hdf5: HDF5's error for a file there (HDF5 takes a flock of its own); None if it opened the file.
    """
    context, folder, data = subject.context, subject.folder, subject.data_file
    values: Values = {"setting": subject.environ.get("HDF5_USE_FILE_LOCKING", ""), "data": None}
    values["runs"] = _exclusive(folder, context) | {"folder": str(folder), "file_system": file_system(folder)}
    if data is not None and data.is_file():
        values["data"] = _shared(data) | {"folder": str(data), "file_system": file_system(data)}
    return values


def _exclusive(folder: Path, context: Context) -> Values:
    """Collective. For flock and fcntl: "held", "not seen by others", or the system's error."""
    place, error = context.on_root(lambda: _new_folder(folder))
    if place is None:
        return {"error": error}
    found: Values = {"error": None}
    for name, lock in (("flock", fcntl.flock), ("fcntl", fcntl.lockf)):
        found[name] = _held(place / name, lock, context)
    found["hdf5"] = _open_hdf5(place / f"{context.world.rank}.h5", "w")
    context.barrier()
    shutil.rmtree(place, ignore_errors=True)
    return found


def _held(path: Path, lock: Callable[[int, int], None], context: Context) -> str:
    """Collective. What this rank found while the root held the lock on `path`."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        handle, mine = -1, str(error.strerror)
    else:
        mine = _take(handle, lock, fcntl.LOCK_EX) if context.world.is_root else ""
    context.barrier()
    # The gather is also the barrier until which the root keeps the lock.
    everyone = context.all_gather(mine or _take(handle, lock, fcntl.LOCK_EX))
    if handle >= 0:
        os.close(handle)
    mine = everyone[context.world.rank]
    if context.world.is_root or everyone[0] != "held":
        return str(everyone[0])
    return {"held": "not seen by others", "refused": "held"}.get(mine, str(mine))


def _shared(path: Path) -> Values:
    """Shared locks on the file itself, because its folder may be read-only for this user."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        return {"error": error.strerror}
    try:
        told = {"flock": _take(handle, fcntl.flock, fcntl.LOCK_SH), "fcntl": _take(handle, fcntl.lockf, fcntl.LOCK_SH)}
    finally:
        os.close(handle)
    return {"error": None, **told, "hdf5": _open_hdf5(path, "r")}


def _take(handle: int, lock: Callable[[int, int], None], kind: int) -> str:
    """ "held", "refused" as another has it, or why there are no locks here."""
    try:
        lock(handle, kind | fcntl.LOCK_NB)
        return "held"
    except (BlockingIOError, PermissionError):
        return "refused"
    except OSError as error:
        return error.strerror or str(error)


def _open_hdf5(path: Path, mode: str) -> str | None:
    if find_spec("h5py") is None:
        return None
    import h5py

    try:
        h5py.File(path, mode).close()
    except OSError as error:
        return str(error)
    return None


def evaluate_locks(answers: Sequence[Answer]) -> Finding:
    """Whether locks exclude a second writer, and HDF5 opens files."""
    worst = ok("")
    words = []
    for what in ("runs", "data"):
        some = [answer for answer in answers if answer.values[what] is not None]
        if not some:
            continue
        finding = _evaluate_place(what, some)
        words.append(finding.seen)
        if ("ok", "warn", "fail").index(finding.status) > ("ok", "warn", "fail").index(worst.status):
            worst = finding
    return worst if worst.status == "fail" else Finding(worst.status, "; ".join(words), worst.remedy, worst.ranks)


def _evaluate_place(what: str, answers: Sequence[Answer]) -> Finding:
    """One place, from the answers of the ranks that probed it."""
    facts = answers[0].values[what]
    where = f"{what} on {facts['folder']} ({facts['file_system']})"
    for answer in answers:
        if error := answer.values[what]["error"]:
            return fail(f"{where}: {error}", f"ls -ld {facts['folder']}   # or name another folder", [answer])
    closed = [answer for answer in answers if answer.values[what]["hdf5"]]
    if closed:
        seen = f"{where}: HDF5 cannot open a file: {closed[0].values[what]['hdf5']}"
        return fail(seen, "export HDF5_USE_FILE_LOCKING=FALSE   # and never run two writers of one file", closed)
    for how in ("flock", "fcntl"):
        without = [answer for answer in answers if answer.values[what][how] != "held"]
        if without:
            seen = f"{where}: {how} locks: {without[0].values[what][how]}"
            remedy = (
                "mount | grep "
                + facts["file_system"]
                + "   # on Lustre mount with flock, not localflock; a second writer is not excluded"
            )
            return warn(seen, remedy, without)
    return ok(f"{where}: locks hold")


# ---------------------------------------------------------------------------------------- stripes


def probe_stripes(subject: Subject) -> Values:
    """On the root: the number of Lustre servers (stripes) that have the data."""
    data = subject.data_file
    if data is None or not subject.context.world.is_root:
        return {}
    place = next(each for each in (data, *data.parents) if each.exists())
    num_bytes = place.stat().st_size if place.is_file() else None
    kind = file_system(place)
    stripes = stripe_count(place) if kind == "lustre" else None
    return {"place": str(place), "file_system": kind, "stripes": stripes, "bytes": num_bytes}


def evaluate_stripes(answers: Sequence[Answer]) -> Finding:
    """Whether large data are striped over several servers."""
    values = answers[0].values
    if not values:
        return not_applicable("no data file named: hpc-train doctor CONFIG")
    where = f"{values['place']} ({values['file_system']})"
    if values["file_system"] != "lustre":
        return not_applicable(f"{where}: users cannot set stripes there")
    if values["stripes"] is None:
        return warn(f"{where}: lfs does not print its stripe count", "module load lustre   # puts lfs on PATH")
    seen = f"{where}: {plural(values['stripes'], 'stripe')}"
    if (
        values["stripes"] != 1
        or len(answers) == 1
        or (values["bytes"] is not None and values["bytes"] < _STRIPED_BYTES)
    ):
        return ok(seen)
    if values["bytes"] is None:
        return warn(f"{seen}, and no data yet", f"lfs setstripe -c 8 {values['place']}   # before hpc-train prepare")
    return warn(
        f"{seen}, and {len(answers)} ranks read its {binary_size(values['bytes'])}",
        f"lfs migrate -c 8 {values['place']}",
    )
