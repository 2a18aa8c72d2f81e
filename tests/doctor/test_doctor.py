"""hpc-train doctor: each check finds what is wrong, on machines that really are so, and nothing where all is well.

What cannot be had without the hardware is judged from recorded /sys trees and from values that such ranks would tell.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import jobs

MLP = jobs.CONFIGS / "mlp-mnist.toml"
CHECKS = (
    *("installed", "one MPI", "threads of MPI", "all-reduce", "transport", "cores", "convolutions", "GPU", "Horovod"),
    *("parallel file", "file locks", "stripes", "disk space", "memory", "energy meters", "Slurm", "clocks", "fork"),
)
Found = dict[str, dict[str, Any]]


def report_of(out: str) -> tuple[dict[str, Any], Found]:
    told = json.loads(out)
    return told, {finding["check"]: finding for finding in told["checks"]}


def run(line: Sequence[object], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    words, all_env = list(map(str, line)), jobs.environment(**env)
    return subprocess.run(words, cwd=folder, env=all_env, capture_output=True, text=True, timeout=200)


def mpirun(*ranks: Sequence[object]) -> list[object]:
    """A rank for each command line."""
    apps = [word for line in ranks for word in (":", "-n", 1, *line)][1:]
    return ["mpirun", "--quiet", "--oversubscribe", "--bind-to", "none", *apps]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What may be wrong with a machine; see wrong_machine.c."""
    library = tmp_path_factory.mktemp("shim") / "wrong_machine.so"
    source = Path(__file__).with_name("wrong_machine.c")
    subprocess.run(["mpicc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, timeout=60)
    return library


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """`hpc-train` with MPI and HDF5 alone: starts four times as fast."""
    return jobs.install(tmp_path_factory.mktemp("small"), "torch", "horovod")


# ---------------------------------------------------------------------------------------- all is well


def test_a_machine_that_works(digits: Path) -> None:
    done = jobs.run(
        2, "doctor", MLP, "--json", *jobs.settings(data__file=digits, run__root=digits.parent), cwd=digits.parent
    )
    told, found = report_of(done.out)
    assert done.code == 0 and told["ranks"] == 2 and told["schema"] == 1, done.out + done.err
    assert tuple(found) == CHECKS
    assert not [finding for finding in told["checks"] if finding["status"] == "fail"]
    assert all(finding["remedy"] for finding in told["checks"] if finding["status"] == "warn")
    assert set(found["one MPI"]["values"]) == {"0", "1"}, "what every rank saw"
    libraries = found["one MPI"]["values"]["1"]["libraries"]
    assert set(libraries) == {"mpi4py", "Horovod", "h5py"} and len(set(libraries.values())) == 1
    assert "shared memory" in found["transport"]["seen"] and "pml ob1" in found["transport"]["seen"]
    assert "the sum is right" in found["all-reduce"]["seen"] and "GB/s" in found["all-reduce"]["seen"]
    for name in ("threads of MPI", "Horovod", "parallel file", "file locks", "disk space", "clocks", "fork"):
        assert found[name]["status"] == "ok", found[name]
    assert sorted(digits.parent.iterdir()) == [digits], "nothing is left behind"


def test_no_colours_into_a_file_under_mpirun(without_torch: list[object], tmp_path: Path) -> None:
    """mpirun gives its ranks a terminal, whatever its own output is."""
    done = run(mpirun(*[[*without_torch, "doctor"]] * 2), tmp_path, TERM="xterm-256color")
    assert "ok    all-reduce" in done.stdout and "\x1b" not in done.stdout, done.stdout + done.stderr


def test_a_plain_install(tmp_path: Path) -> None:
    """What is not there is said, and what can be checked is: the exit code is that of a machine that reports."""
    words = jobs.install(tmp_path / "plain", "torch", "horovod", "h5py", "mpi4py")
    done = run([*words, "doctor"], tmp_path, COLUMNS="120")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warn  installed" in done.stdout and "not installed: mpi4py, torch, horovod, h5py" in done.stdout
    assert "→ make install" in done.stdout and "n/a   Horovod" in done.stdout and "ok    fork" in done.stdout
    assert "1 rank, " in done.stdout.splitlines()[-1] and "mpirun -n 2 hpc-train doctor" in done.stdout
    told, found = report_of(run([*words, "doctor", MLP, "--json"], tmp_path).stdout)
    assert told["status"] == found["installed"]["status"] == "fail", "with a job, what it needs must be there"


# ---------------------------------------------------------------------------------------- all is wrong


@pytest.fixture(scope="module")
def wrong(digits: Path, shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Found]]:
    """Two ranks of one core, another MPI, another clock and no room: what each check says, of all of it at once."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "horovod").mkdir()
    (folder / "horovod/__init__.py").write_text("raise ImportError('undefined symbol: _ZN5torch')")
    library = Path(software_library())
    (folder / "lib").mkdir()
    shutil.copy(library, folder / "lib" / soname(library))
    keys = {"run__root": folder, "data__file": digits, "train__device": "cuda", "train__optimizer": "adamw"}
    free = shutil.disk_usage(folder).free
    width = int((free / 12 / 3) ** 0.5) + 10_000  # a layer of so many squared, its two moments, three checkpoints
    words = [jobs.HPC_TRAIN, "doctor", MLP, "--json", *jobs.settings(**keys, task__options__hidden=[width, width])]
    both = {
        "LD_PRELOAD": shim,
        "WRONG_SUMS": 1,
        "NO_LOCKS_BELOW": folder,
        "NO_FORK": 1,
        "MPI4PY_RC_THREAD_LEVEL": "funneled",
        "OMPI_MCA_btl": "self,tcp",
        "OMP_NUM_THREADS": 2,
    }
    second = {
        "SLURM_JOB_ID": 8,
        "CLOCK_AHEAD_S": 20,
        "LD_LIBRARY_PATH": folder / "lib",
        "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}",
    }
    ranks = [["env", *(f"{k}={v}" for k, v in (both | own).items()), *words] for own in ({"SLURM_JOB_ID": 7}, second)]
    core = min(os.sched_getaffinity(0))
    done = run(["taskset", "-c", core, *mpirun(*ranks)], folder)
    assert done.stdout, done.stderr
    yield done.returncode, report_of(done.stdout)[1]


def software_library() -> str:
    code = "from hpc_train.train.comm.mpi_library import library_of, mpi; print(library_of(mpi().__file__))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip()


def soname(library: Path) -> str:
    """libmpi.so.40.30.4 -> libmpi.so.40, the name that programs ask for."""
    return ".".join(library.name.split(".")[:3])


@pytest.mark.parametrize(
    "check, status, words",
    [
        ("one MPI", "fail", ["ranks load different MPIs", "lib/libmpi.so", "rank 1 on "]),
        ("threads of MPI", "fail", ["MPI_THREAD_FUNNELED", "MPI4PY_RC_THREAD_LEVEL"]),
        ("all-reduce", "fail", ["the sum is wrong in "]),
        ("transport", "warn", ["TCP (", "btl tcp", "instead of shared memory", "OMPI_MCA_btl"]),
        ("cores", "fail", ["2 ranks on ", " have 4 threads on 1 core", "% of a core", "--bind-to none"]),
        ("GPU", "fail", ["train.device = 'cuda'", "finds no GPU", "train.device=auto"]),
        ("Horovod", "fail", ["undefined symbol", "make install", "rank 1 on "]),
        ("file locks", "fail", ["Operation not supported", "HDF5_USE_FILE_LOCKING=FALSE"]),
        ("disk space", "fail", ["2 checkpoints of ", "and one in progress", "run.root="]),
        ("Slurm", "fail", ["ranks are in different jobs: 7, 8"]),
        ("clocks", "fail", ["differ by at most 20 s", "chronyc", "rank 1 on "]),
        ("fork", "fail", ["no process can be started: Resource temporarily unavailable", "ulimit -u"]),
    ],
)
def test_what_is_wrong_is_found(wrong: tuple[int, Found], check: str, status: str, words: list[str]) -> None:
    code, found = wrong
    finding = found[check]
    assert code == 1 and finding["status"] == status, finding
    text = f"{finding['seen']} {finding['remedy']} {finding['where']}"
    for word in words:
        assert word in text, finding


def test_two_mpis_in_one_process(mpich: Path, tmp_path: Path) -> None:
    """mpi4py is given MPICH, as a forgotten module would; a crash of what was built with the other is no end either."""
    env = {"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": str(mpich / "lib")}
    done = run([jobs.HPC_TRAIN, "doctor", "--json"], tmp_path, **env)
    finding = report_of(done.stdout)[1]["one MPI"]
    assert done.returncode == 1 and finding["status"] == "fail", done.stdout + done.stderr
    assert "two MPIs in one process: mpi4py calls " in finding["seen"] and f"{mpich}/lib/libmpi.so" in finding["seen"]


def test_a_mistake_is_told_once_before_any_check(tmp_path: Path) -> None:
    done = jobs.run(2, "doctor", "nothing.toml", cwd=tmp_path)
    assert done.code == 2 and done.out == "" and done.err.count("nothing.toml does not exist") == 1
    done = jobs.run(0, "doctor", "--set", "train.steps=1", cwd=tmp_path)
    assert done.code == 2 and "without CONFIG" in done.err


def test_a_laptop_whose_mpi_is_gone(without_torch: list[object], tmp_path: Path) -> None:
    """mpi4py's wheel brings none. That is said, and the rest is looked at without."""
    done = run([*without_torch, "doctor", "--json"], tmp_path, MPI4PY_MPIABI="mpich")  # there is none of that kind
    found = report_of(done.stdout)[1]
    assert done.returncode == 1 and "mpi4py cannot be loaded" in found["MPI starts"]["seen"], done.stderr
    assert found["all-reduce"]["seen"] == "needs mpi4py" and found["fork"]["status"] == "ok"


def test_a_launcher_of_another_mpi(without_torch: list[object], tmp_path: Path) -> None:
    done = run([*without_torch, "doctor", "--json"], tmp_path, PMI_RANK="0", PMI_SIZE="2")
    finding = report_of(done.stdout)[1]["MPI starts"]
    assert done.returncode == 1 and "the launcher started 2 ranks" in finding["seen"] and "srun" in finding["remedy"]


def test_a_rank_that_dies_is_named_at_once(without_torch: list[object], shim: Path, tmp_path: Path) -> None:
    words = [*without_torch, "doctor", "--json"]
    done = run(mpirun(words, ["env", f"LD_PRELOAD={shim}", "DIES_IN_FORK=1", *words]), tmp_path)
    _, found = report_of(done.stdout)
    assert done.returncode == 1 and "rank 1 on " in found["fork"]["seen"] and "signal 9" in found["fork"]["seen"]
    assert set(found) == set(CHECKS), "what was found before that is told, too"


# ---------------------------------------------------------------------------------------- nodes that share nothing


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting is for root")
def test_nodes_that_share_no_folder_and_leave_their_fabric_unused(without_torch: list[object], tmp_path: Path) -> None:
    """Rank 1 has run.root to itself, by a mount namespace; both have a recorded InfiniBand, and talk TCP."""
    record(tmp_path / "class/infiniband/mlx5_0/ports/1", link_layer="InfiniBand", state="4: ACTIVE", rate="100 Gb/sec")
    (tmp_path / "class/net").mkdir()
    (tmp_path / "runs").mkdir()
    words = [*without_torch, "doctor", "--json"]
    line = " ".join(f"'{word}'" for word in words)
    fabric = f"mount --bind {tmp_path}/class /sys/class"
    apart = [
        ["unshare", "-m", "sh", "-c", f"{fabric} && {own} && exec {line}"] for own in (":", "mount -t tmpfs x runs")
    ]
    done = run(mpirun(*apart), tmp_path, OMPI_MCA_btl="self,tcp")
    found = report_of(done.stdout)[1]
    assert found["transport"]["status"] == "warn" and "mlx5_0:1 (100 Gb/sec) is available" in found["transport"]["seen"]
    assert "OMPI_MCA_pml=ucx UCX_NET_DEVICES=mlx5_0:1" in found["transport"]["remedy"]
    assert found["parallel file"]["status"] == "fail" and "not visible on all nodes" in found["parallel file"]["seen"]
    assert found["file locks"]["status"] == "fail" and "rank 1 on " in found["file locks"]["where"]


def record(folder: Path, **files: str) -> None:
    """A part of /sys, as a machine showed it."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content + "\n")
