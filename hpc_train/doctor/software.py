"""The MPI that each compiled package calls, its thread level, and whether Horovod works with this torch."""

import importlib
import importlib.metadata
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from time import monotonic

import numpy as np

from hpc_train.doctor.check import Answer, Finding, Status, Subject, Values, fail, ok, ranks_of, warn
from hpc_train.train.comm import messages
from hpc_train.train.comm.mpi_library import library_of, mpi, mpi_version

_INSTALL = "make install"
_SLOW_LOAD_S = 60.0
SLOW_FILES = "tar cf venv.tar .venv && sbcast -pf venv.tar /tmp/venv.tar   # copy the packages to each node's disk"
# Packages that call MPI, and the compiled module that does it.
_CALLERS = {"mpi4py": "mpi4py.MPI", "Horovod": "horovod.torch.mpi_lib_v2", "h5py": "h5py.h5p"}
_LEVELS = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
_BUILT = ("mpi", "nccl", "gloo", "cuda", "rocm", "ccl", "ddl")


# ---------------------------------------------------------------------------------------- what is installed


def probe_installed(subject: Subject) -> Values:
    """Versions of the packages that training needs (None: not installed), and how many seconds torch took to load."""
    names = {"mpi4py": "mpi4py", "torch": "torch", "horovod": "horovod", "h5py": "h5py", "nvidia-ml-py": "pynvml"}
    values = {name: importlib.metadata.version(name) if find_spec(module) else None for name, module in names.items()}
    strategy = subject.config.reduce.strategy if subject.config else None
    trains = strategy is not None or subject.context.world.size > 1
    needed = {"torch", "h5py"} | ({"mpi4py"} if strategy != "local" else set())
    needed |= {"horovod"} if strategy in ("horovod", "sharded", None) else set()
    began_s = monotonic()
    if values["torch"]:
        importlib.import_module("torch")
    return {"versions": values, "needed": sorted(needed) if trains else [], "load_s": monotonic() - began_s}


def evaluate_installed(answers: Sequence[Answer]) -> Finding:
    """Whether everything that this job needs is installed, in one version on all ranks."""
    first = answers[0].values["versions"]
    names = [name for name in first if name != "nvidia-ml-py"]
    parted = [answer for answer in answers if answer.values["versions"] != first]
    if parted:
        theirs = parted[0].values["versions"]
        unequal = [f"{name} {theirs[name]} and {first[name]}" for name in names if theirs[name] != first[name]]
        return fail(f"versions differ between ranks: {', '.join(unequal)}", _INSTALL, parted)
    there = ", ".join(f"{name} {first[name]}" for name in names if first[name])
    absent = [name for name in names if not first[name]]
    load_s = max(answer.values["load_s"] for answer in answers)
    if not absent:
        seen = f"{there}; torch loads in {load_s:.1f} s"
        return warn(seen, SLOW_FILES) if load_s > _SLOW_LOAD_S else ok(seen)
    seen = f"not installed: {', '.join(absent)}" + f" (installed: {there})" * bool(there)
    return Finding("fail" if set(absent) & set(answers[0].values["needed"]) else "warn", seen, _INSTALL)


# ---------------------------------------------------------------------------------------- one MPI


def probe_mpi(subject: Subject) -> Values:
    """The library whose MPI_Init each package calls. without_mpi: h5py if it was built without MPI."""
    values: Values = {"libraries": {}, "without_mpi": [], "errors": {}, **mpi_version(subject.context)}
    for name, module in _CALLERS.items():
        package = module.partition(".")[0]
        if find_spec(package) is None or (package == "horovod" and find_spec("torch") is None):
            continue
        try:
            loaded = importlib.import_module(module)
            values["libraries"][name] = library_of(str(loaded.__file__))
        except AttributeError:
            values["without_mpi"].append(name)
        except (ImportError, OSError) as error:
            if name != "Horovod":  # it has its own check
                values["errors"][name] = str(error)
    return values


def evaluate_mpi(answers: Sequence[Answer]) -> Finding:
    """Whether all packages of all ranks call the same MPI."""
    build = "rm -r .venv && make install MPICC=$(which mpicc)   # build all against one MPI, and use its mpirun"
    for answer in answers:
        for name, error in answer.values["errors"].items():
            return fail(f"{name} cannot be loaded: {error}", build, [answer])
    two = [answer for answer in answers if len(set(answer.values["libraries"].values())) > 1]
    if two:
        calls = ", ".join(f"{name} calls {path}" for name, path in two[0].values["libraries"].items())
        return fail(f"two MPIs in one process: {calls}", build, two)
    first = answers[0].values
    keys = ("version", "libraries")
    parted = [answer for answer in answers if any(answer.values.get(key) != first.get(key) for key in keys)]
    if parted:
        theirs, ours = (values.get("library", values.get("version")) for values in (parted[0].values, first))
        return fail(f"ranks load different MPIs: {theirs} and {ours}", build, parted)
    callers, paths = first["libraries"], list(first["libraries"].values())
    version = first.get("version", "MPI").partition(",")[0]
    seen = f"{version} ({paths[0] if paths else 'unknown'}), called by {', '.join(callers)}"
    if "h5py" in first["without_mpi"]:
        remedy = "HDF5_MPI=ON CC=mpicc pip install --no-build-isolation --no-binary=h5py h5py   # or make install"
        return warn(f"{seen}; h5py was built without MPI: ranks cannot write one file together", remedy)
    return ok(seen)


# ---------------------------------------------------------------------------------------- threads


def probe_threads(subject: Subject) -> Values:
    """Collective. The thread level of MPI and, if it is MULTIPLE, an all-reduce in a second thread."""
    comm, strategy = subject.context.comm, subject.config.reduce.strategy if subject.config else "horovod"
    values: Values = {"level": _LEVELS[mpi().Query_thread()], "strategy": strategy, "sum": None}
    if min(subject.context.all_gather(_LEVELS.index(values["level"]))) < _LEVELS.index("MULTIPLE"):
        return values
    own, total = comm.Dup(), np.zeros(1)  # as Horovod's background thread does
    thread = threading.Thread(target=lambda: messages.all_reduce(own, np.ones(1), total))
    thread.start()
    comm.Barrier()
    thread.join()
    own.Free()
    return {**values, "sum": float(total[0])}


def evaluate_threads(answers: Sequence[Answer]) -> Finding:
    """Whether Horovod's background thread and the main thread may both call MPI."""
    low = [answer for answer in answers if answer.values["level"] != "MULTIPLE"]
    if low:
        level, strategy = low[0].values["level"], low[0].values["strategy"]
        seen = f"MPI_THREAD_{level}: Horovod's background thread and the main thread may not both call MPI"
        remedy = "unset MPI4PY_RC_THREAD_LEVEL MPI4PY_RC_THREADS   # or an MPI built with MPI_THREAD_MULTIPLE"
        return Finding("fail" if strategy in ("horovod", "sharded") else "warn", seen, remedy, ranks_of(low))
    wrong = [answer for answer in answers if answer.values["sum"] != len(answers)]
    if wrong:
        seen = f"a second thread's all-reduce of ones gave {wrong[0].values['sum']} on {len(answers)} ranks"
        return fail(seen, "Use another MPI: its MPI_THREAD_MULTIPLE does not work.", wrong)
    return ok("MPI_THREAD_MULTIPLE; two threads called MPI at once")


# ---------------------------------------------------------------------------------------- Horovod


def probe_horovod(subject: Subject) -> Values:
    """Collective. What Horovod was built with, and an all-reduce by it, which shows that it works with this torch."""
    values: Values = {"error": None, "sum": None, "built": [], "torch": importlib.metadata.version("torch")}
    values["needed"] = subject.config is None or subject.config.reduce.strategy in ("horovod", "sharded")
    try:
        import horovod.torch as hvd
        import torch
    except ImportError as error:  # built against another torch: a symbol is missing
        values["error"] = str(error)
    if any(subject.context.all_gather(values["error"])):
        return values
    values["built"] = [name for name in _BUILT if getattr(hvd, f"{name}_built")()]
    values["has_gpu"] = torch.cuda.is_available()
    if not all(subject.context.all_gather("mpi" in values["built"])):
        return values
    hvd.init()
    ones = hvd.allreduce(torch.ones(1000), op=hvd.Sum, name="doctor")
    return {**values, "size": hvd.size(), "sum": float(ones.mean())}


def evaluate_horovod(answers: Sequence[Answer]) -> Finding:
    """Whether Horovod works with this torch and this MPI."""
    rebuild = f"pip uninstall -y horovod && {_INSTALL}"
    bad: Status = "fail" if all(answer.values["needed"] for answer in answers) else "warn"
    broken = [answer for answer in answers if answer.values["error"]]
    if broken:
        values = broken[0].values
        seen = f"cannot be loaded with torch {values['torch']}: {values['error']}"
        return Finding(bad, seen, f"{rebuild}   # build it against this torch", ranks_of(broken))
    without = [answer for answer in answers if "mpi" not in answer.values["built"]]
    if without:
        return Finding(bad, "built without MPI", f"HOROVOD_WITH_MPI=1 {rebuild}", ranks_of(without))
    wrong = [answer for answer in answers if (answer.values["size"], answer.values["sum"]) != (len(answers),) * 2]
    if wrong:
        values = wrong[0].values
        seen = f"it has {values['size']} of {len(answers)} ranks, and the sum of ones is {values['sum']}"
        return Finding(bad, seen, f"{rebuild}   # against the MPI of this mpirun", ranks_of(wrong))
    values = answers[0].values
    seen = f"built with {', '.join(values['built'])}, works with torch {values['torch']}"
    slow = [answer for answer in answers if answer.values["has_gpu"] and "nccl" not in answer.values["built"]]
    if slow:
        remedy = f"HOROVOD_GPU_OPERATIONS=NCCL {rebuild}"
        return warn(f"{seen}; without NCCL, gradients go through host memory", remedy, slow)
    return ok(seen)
