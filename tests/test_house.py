"""The rules that hold the house up: who may import what, and that reports need only the base install."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from hpc_train.cli.main import cli
from tests import jobs

PACKAGE = Path(__file__).parents[1] / "hpc_train"
# The rooms, lowest first: a room imports rooms above it in its list, and never one below. Training and analysis meet
# only in the run directory; the command line imports a half inside each command.
TRAINING = (
    *("core", "train/comm", "train/data", "train/models", "train/energy", "train/run", "train/reduce", "train"),
    *("train/tasks", "train/inference", "datasets", "bench", "doctor"),
)
ANALYSIS = (
    *("core", "analysis", "analysis/stats", "analysis/runs", "analysis/efficiency", "analysis/scaling"),
    *("analysis/energy", "analysis/convergence", "analysis/models", "analysis/planning", "analysis/simulation"),
    *("analysis/comparison", "analysis/trace", "analysis/live", "analysis/report"),
)
# A file beside the rooms of train/: what it needs decides where it stands.
# Former names that files of users import: each ends with the release after its change.
ALIASES = {
    "partition.py": "core/sampling.py",
    "analysis/load.py": "analysis/runs/load.py",
    "train/dataset.py": "train/data/dataset.py",
}
LOOP = {f"train/{file}.py" for file in ("loop", "setup", "recording", "generate", "export", "memory")}

# A third-party or system module -> the only places that may import it.
ALLOWED = {
    "mpi4py": {f"train/comm/{file}.py" for file in ("startup", "mpi_library", "messages")},
    "horovod": {"train/reduce/horovod_library.py", "doctor/software.py"},
    "h5py": {
        f"train/data/{file}.py" for file in ("chunk_cache", "files", "filters", "hdf5_faults", "parallel_hdf5", "table")
    }
    | {"train/data/readers.py", "train/weights_file.py", "train/export.py"}
    | {f"train/run/checkpoint/{file}.py" for file in ("format", "image", "reading")}
    | {"train/data/collective.py", "train/data/unwritten.py", "train/inference/output_file.py", "bench/file_layouts.py"}
    | {"doctor/storage.py"}
    | {f"datasets/prepare/{file}.py" for file in ("array_files", "layout", "like", "netcdf", "prepare", "writer")}
    | {f"datasets/inspect/{file}.py" for file in ("check", "checks", "chunk_ranges", "info", "proposal", "structure")},
    "subprocess": {"core/filesystem.py", "train/run/provenance.py", "train/energy/sensors/slurm.py", "train/onednn.py"}
    | {"cluster/scheduler.py", "cluster/local_study.py", "bench/io.py", "doctor/supervisor.py", "doctor/job.py"},
    "pynvml": {"train/energy/sensors/nvml.py"},
    "gymnasium": {"train/tasks/reinforcement.py"},
}
NEEDS_TORCH = {"train", "datasets", "bench", "doctor"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def room(where: str) -> str:
    """The room of a file below hpc_train: "core", "train/comm", "analysis/report"; "" at the root."""
    folders = where.split("/")[:-1]
    return "/".join(folders[: 2 if folders[:1] in (["train"], ["analysis"]) else 1])


def file_of(name: str) -> str | None:
    """The file that a dotted name below hpc_train is or lies in; None where it is a name inside a module."""
    path = PACKAGE.joinpath(*name.split(".")[1:])
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return str(file.relative_to(PACKAGE))
    return None


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    where = str(path.relative_to(PACKAGE))
    mine = room(where)
    order = ANALYSIS if mine.startswith("analysis") else TRAINING
    may = {"core", "cluster"} if mine == "cluster" else set(order[: order.index(mine) + 1]) if mine in order else None
    for name in imports(path):
        package = name.partition(".")[0]
        theirs = file_of(name) if package == "hpc_train" else None
        if theirs and room(theirs) and may is not None and where not in {*LOOP, *ALIASES}:
            assert room(theirs) in may, f"{where} imports {name}: {mine} may import {sorted(may)}"
        if package == "torch":
            assert mine.split("/")[0] in NEEDS_TORCH, f"{where} imports {name}: torch is for {sorted(NEEDS_TORCH)}"
        if package in ALLOWED:
            assert where in ALLOWED[package], f"{where} imports {name}: only {sorted(ALLOWED[package])} may"


@pytest.mark.parametrize("alias, file", ALIASES.items())
def test_former_names_are_the_same_objects(alias: str, file: str) -> None:
    old, new = (import_module("hpc_train." + path.removesuffix(".py").replace("/", ".")) for path in (alias, file))
    assert old.__all__ and all(getattr(old, name) is getattr(new, name) for name in old.__all__)


# Who may not import whom inside analysis/report: data flows from facts to sections, then renderers.
FORBIDDEN_IN_REPORT = {
    "model": ("facts", "labels", "notes", "plots", "sections", "renderers", "records", "report"),
    "notes": ("plots", "sections", "renderers", "records", "report"),
    "plots": ("sections", "renderers", "records", "report"),
    "sections": ("renderers", "records", "report"),
    "renderers": ("facts", "labels", "notes", "sections", "records", "report"),
}


@pytest.mark.parametrize("path", sorted((PACKAGE / "analysis/report").rglob("*.py")), ids=lambda path: path.stem)
def test_a_report_is_built_one_way_and_renderers_see_the_model_alone(path: Path) -> None:
    where = path.relative_to(PACKAGE / "analysis/report")
    part = where.parts[0].removesuffix(".py")
    for name in imports(path):
        inside = name.removeprefix("hpc_train.analysis.report.").split(".")[0] if "analysis.report." in name else ""
        assert inside not in FORBIDDEN_IN_REPORT.get(part, ()), f"{where} imports {name}"
        if part == "renderers" and name.startswith("hpc_train.analysis."):
            assert inside or name.startswith("hpc_train.analysis.guard"), f"{where} imports {name}"


# MPI counts in 32 bits: what may be long goes through train/comm/messages.py, which cuts it.
BUFFERS = {"Bcast", "Gather", "Gatherv", "Scatter", "Scatterv", "Allgather", "Allgatherv", "Alltoall", "Alltoallv"}
BUFFERS |= {"Alltoallw", "Reduce", "Allreduce", "Reduce_scatter", "Reduce_scatter_block", "Scan", "Exscan"}
BUFFERS |= {f"I{name.lower()}" for name in BUFFERS} | {f"{name}_init" for name in BUFFERS}
BUFFERS |= {f"{kind}{name}" for name in ("send", "recv") for kind in ("I", "Is", "Ib", "Ir")} | {"Put", "Get"}
BUFFERS |= {"Send", "Ssend", "Bsend", "Rsend", "Recv", "Sendrecv", "Sendrecv_replace", "Mrecv", "Imrecv", "Accumulate"}
COMMON_WORDS = {"Reduce", "Get", "Put", "Scan"}  # of what is no communicator, too
# What Python pickles: small things only. Where, and how it is known to be small.
PICKLED = {
    "train/comm/context.py": "answers of functions, errors, facts: arrays go by broadcast_array and begin_gather",
    "train/comm/messages.py": "numbers",
    "doctor/__main__.py": "a rank's answers",
    "datasets/prepare/writer.py": "the chunks of one block",
    "train/comm/process_group.py": "no MPI: torch.distributed cuts",
}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_messages_of_arrays_go_through_the_one_place_that_cuts_them(path: Path) -> None:
    where = str(path.relative_to(PACKAGE))
    for used in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)):
        of_comm = ast.unparse(used.value).split(".")[-1] in ("comm", "_comm", "own", "COMM_WORLD")
        if where != "train/comm/messages.py" and (of_comm or used.attr not in COMMON_WORDS):
            assert used.attr not in BUFFERS, (
                f"{where}:{used.lineno}: {used.attr} is for train/comm/messages.py, which cuts"
            )
        if of_comm and used.attr in {"bcast", "gather", "allgather", "scatter", "alltoall", "send", "recv", "sendrecv"}:
            assert where in PICKLED, f"{where}:{used.lineno}: {used.attr} pickles, and its counts are 32 bits"


def test_the_ground_and_the_command_line_load_without_the_training_half() -> None:
    blocked = ["mpi4py", "horovod", "torch", "h5py"]
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"  # None makes the import fail
        "import hpc_train.cli.main, hpc_train.core.config, hpc_train.core.sampling, hpc_train.cluster.study\n"
        "import hpc_train.analysis.report.report\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_top_level_folders() -> None:
    tracked = subprocess.run(
        ["git", "ls-tree", "-d", "--name-only", "HEAD"], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=20
    ).stdout.split()
    assert {name for name in tracked if not name.startswith(".")} <= {"hpc_train", "slurm", "configs", "docs", "tests"}


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, (*path, name))


@pytest.mark.parametrize("path", list(commands(cli)), ids=" ".join)
def test_help_fits_a_screen_and_shows_an_example(path: tuple[str, ...]) -> None:
    told = CliRunner().invoke(cli, [*path, "--help"], prog_name="hpc-train", terminal_width=80).output
    assert told.count("Example:") == 1
    assert len(told.splitlines()) <= 40 and max(map(len, told.splitlines())) <= 80, told


def test_the_shell_completes_after_the_line_that_the_readme_tells() -> None:
    """The line's source names this program's commands when a shell asks for them."""
    asked = {"COMP_WORDS": "hpc-train tr", "COMP_CWORD": "1", "_HPC_TRAIN_COMPLETE": "bash_complete"}
    done = subprocess.run([jobs.HPC_TRAIN], env=jobs.environment(**asked), capture_output=True, text=True)
    assert done.stdout.split() == ["plain,train"], done.stderr
    line = 'eval "$(_HPC_TRAIN_COMPLETE=bash_source hpc-train)"'
    assert line in (jobs.ROOT / "README.md").read_text()
    shell = f"set -e; {line}; complete -p hpc-train"
    env = jobs.environment(PATH=f"{jobs.HPC_TRAIN.parent}:{jobs.environment()['PATH']}")
    done = subprocess.run(["bash", "-c", shell], env=env, capture_output=True, text=True)
    assert "_hpc_train_completion" in done.stdout, done.stderr
