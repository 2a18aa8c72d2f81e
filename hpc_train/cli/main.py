"""The command line: assembles the commands, and turns errors into messages and exit codes.

Each command imports its half inside, so that reports never load MPI or torch.
"""

import errno
import io
import os
import socket
import sys
import traceback
from typing import NoReturn

import click

from hpc_train import __version__
from hpc_train.cli.bench import bench
from hpc_train.cli.compare import compare
from hpc_train.cli.config import config
from hpc_train.cli.data import data
from hpc_train.cli.doctor import doctor
from hpc_train.cli.export import export
from hpc_train.cli.init import init
from hpc_train.cli.memory import memory
from hpc_train.cli.options import CommandGroup
from hpc_train.cli.plan import plan
from hpc_train.cli.predict import evaluate, predict
from hpc_train.cli.prepare import prepare, stage
from hpc_train.cli.report import report
from hpc_train.cli.scale import scale
from hpc_train.cli.simulate import simulate
from hpc_train.cli.submit import submit
from hpc_train.cli.train import generate, train
from hpc_train.cli.watch import runs, watch
from hpc_train.core.errors import JointFailure, UserError, out_of_memory, refused
from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.output import drop_unread
from hpc_train.core.redaction import message


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hpc-train")
def cli() -> None:
    """Train PyTorch models on MPI ranks, and learn where every second and joule went.

    \b
    Example:
      hpc-train prepare mnist-5k data/mnist-5k.h5
      mpirun -n 2 hpc-train train configs/softmax-mnist.toml
      hpc-train report runs/softmax-mnist
    """


_COMMANDS = (
    *(init, prepare, stage, data, train, evaluate, predict, generate, export, submit, scale, runs, watch),
    *(report, compare, plan, simulate, memory, doctor, bench, config),
)
for command in _COMMANDS:
    cli.add_command(command)


def main() -> None:
    """The console script: a user's mistake is one message on one rank and exit code 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # neither a terminal of LANG=C nor a path that is not UTF-8 may raise
            stream.reconfigure(errors="backslashreplace")
    drop_unread()
    job = JobEnvironment.current()
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except UserError as error:
        _end_refused(error, job)
    except click.ClickException as error:
        usage = io.StringIO()
        error.show(usage)
        _end(usage.getvalue().rstrip("\n") if job.is_first_rank else "", 2)
    except (click.Abort, KeyboardInterrupt):
        _end("hpc-train: interrupted" if job.is_first_rank else "", 130)
    except JointFailure:  # the rank that met the fault prints it
        _end("", 1)
    except OSError as error:
        if found := refused(error):
            _end_refused(found, job)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            # At its end Python writes its buffer once more, and would change the exit code to 120.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            remedy = "Make room there, or redirect the output elsewhere."
            _end_refused(UserError(f"output cannot be written: {error.strerror}", remedy), job)
        _end(traceback.format_exc(), 1)
    except Exception as error:  # noqa: BLE001  a bug of ours, but for memory: print all of it
        if found := out_of_memory(error):
            _end_refused(found, job)
        _end(traceback.format_exc(), 1)


def _end_refused(error: UserError, job: JobEnvironment) -> NoReturn:
    if job.is_first_rank:
        _end(f"hpc-train: {error}", 2)
    _end("" if error.joint else f"hpc-train: rank {job.rank} on {socket.gethostname()}: {error}", 2)


def _end(text: str, code: int) -> NoReturn:
    if text:
        print(message(text), file=sys.stderr, flush=True)
    sys.exit(code)
