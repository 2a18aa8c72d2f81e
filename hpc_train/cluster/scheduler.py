"""What hpc-train needs of a batch system. `slurm.py` implements it; another system adds a file like that one."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from hpc_train.cluster.site_profile import SiteProfile
from hpc_train.core.errors import UserError


@dataclass(frozen=True)
class Job:
    """What a job script runs, on how much of the system. Paths are absolute."""

    name: str
    num_ranks: int
    arguments: tuple[str, ...]  # of hpc-train
    working_folder: Path  # the paths in a job file are relative to it
    output_folder: Path  # the script is submitted from here, and its output goes here
    time_limit: str
    has_launcher: bool = True  # False: hpc-train runs as one process on one core


class Scheduler(Protocol):
    """A batch system. How a running job hears of its time limit and is requeued, is part of the script it renders."""

    name: str
    list_command: str  # for users: prints the id and the folder of each of their jobs
    start_command: str  # prints when {job} starts
    cancel_command: str  # removes {job}

    def render(self, job: Job, site: SiteProfile) -> str:
        """The job script. Raises `UserError` for values that a script cannot contain."""
        ...

    def submit(self, script: Path, after: Sequence[str] = ()) -> str:
        """Queues a script from its own folder, to start once the jobs `after` have ended in whatever way.

        Returns the job's id. Raises `Refused` if the job is not in the queue, `NoAnswer` if it may be.
        """
        ...

    def waiting_jobs(self, answer_s: float | None = None) -> dict[str, str]:
        """This user's queued and running jobs: id -> the folder that each was submitted from.

        answer_s: how long to wait for the answer. Raises `UserError`.
        """
        ...


class Refused(UserError):
    """The batch system is not installed here, or did not accept a request."""


class NoAnswer(Exception):
    """A command of the batch system ended without saying whether the request was accepted."""


def run_command(command: Sequence[str], folder: Path | None, answer_s: float) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a batch system's command. Raises `Refused` or `NoAnswer`."""
    # Files, not pipes: a wrapper's child that outlives it would keep a pipe open, and reading would wait for it.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            # A process group of its own, so that a site's wrapper is killed with all its children.
            child = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err, process_group=0
            )
        except OSError as error:
            why = "was not found" if isinstance(error, FileNotFoundError) else f"cannot be started ({error.strerror})"
            raise Refused(
                f"{command[0]} {why}: no batch system here",
                "Submit on a login node; --dry-run shows the script anywhere.",
            ) from None
        try:
            code = child.wait(answer_s)
        except subprocess.TimeoutExpired:
            raise NoAnswer(f"{command[0]} did not answer for {answer_s:.0f} s") from None
        finally:  # also after Ctrl-C
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        return code, _content(out), _content(err)


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
