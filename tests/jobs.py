"""Starts real jobs, with mpirun or without, for the tests."""

import functools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from time import monotonic

from tests.warm.start import Server

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
HPC_TRAIN = Path(sys.executable).with_name("hpc-train")
COLD = bool(os.environ.get("HPC_TRAIN_COLD"))
# Python, torch and libraries read these variables while they load, so a warm start would ignore them.
_READ_WHILE_LOADING = ("PYTHONIO", "PYTHONUTF8", "LC_", "LANG", "LD_", "OMP_", "MKL_", "DNNL_", "MPI4PY_", "MPLCONFIG")


@dataclass(frozen=True)
class Ended:
    """The result of a job: exit code, output and wall seconds."""

    code: int
    out: str
    err: str
    seconds: float


def environment(**more: str) -> dict[str, str]:
    """The environment of the tests, without a launcher's variables, in which root may use mpirun."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_COMM", "PMIX_", "PMI_"))}
    return clean | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} | more


def command(ranks: int, *words: object, bind: str = "none", warm: bool = False) -> list[str]:
    """The command line of `hpc-train words...` on `ranks` ranks, without mpirun if 0.

    warm: start it as children of a process that has loaded torch (see tests/warm). HPC_TRAIN_COLD=1 overrides this.
    """
    assert shutil.which("mpirun"), "no mpirun on PATH: run the tests with `make test`"
    # By name: mpirun derives a --prefix from an absolute path, and an empty one from /bin/mpirun.
    launcher = ["mpirun", "--quiet", "-n", str(ranks), "--oversubscribe", "--bind-to", bind] if ranks else []
    program = warm_server().stub if warm and not COLD else [str(HPC_TRAIN)]
    return [*launcher, *program, *map(str, words)]


def program(folder: Path) -> Path:
    """Writes an `hpc-train` for PATH into a new folder: it starts warm unless HPC_TRAIN_COLD=1."""
    folder.mkdir()
    path = folder / "hpc-train"
    path.write_text(f'#!/bin/sh\nexec {shlex.join(command(0, warm=True))} "$@"\n')
    path.chmod(0o755)
    return path


@functools.cache
def warm_server() -> Server:
    """The warm server of this process. It ends with this process."""
    return Server(ROOT, environment())


def run(
    ranks: int, *words: object, cwd: Path, timeout_s: float = 120, bind: str = "none", cold: bool = False, **env: str
) -> Ended:
    """Runs `hpc-train words...` to its end; a job that hangs fails the test. cold: the test is about the start."""
    warm = not cold and bind == "none" and not any(key.startswith(_READ_WHILE_LOADING) for key in env)
    line = command(ranks, *words, bind=bind, warm=warm)
    began = monotonic()
    done = subprocess.run(
        line,
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
    )
    return Ended(done.returncode, done.stdout, done.stderr, monotonic() - began)


def settings(**keys: object) -> list[str]:
    """train__steps=5 -> --set train.steps=5"""
    return [word for key, value in keys.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def lacking(config: Path) -> str | None:
    """Why the model of a job cannot be made here: its package is missing or does not load; None if it can."""
    module, colon, _ = tomllib.loads(config.read_text())["task"].get("model", "").partition(":")
    try:
        if colon:
            import_module(module)
        return None
    except Exception as error:  # noqa: BLE001  a package may raise anything
        return f"{module}: {error}"


def install(folder: Path, *without: str) -> list[object]:
    """The command of an installation without these packages."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not path.name.lower().startswith(without):
            (site / path.name).symlink_to(path)
    return [folder / "bin/python", "-c", "from hpc_train.cli.main import main; main()"]
