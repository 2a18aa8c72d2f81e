"""`hpc-train train` and `hpc-train generate`: train a model, and write text with one."""

import sys
from pathlib import Path

import click

from hpc_train.cli.options import FiniteNumber, UserPath, job_file, on_first_rank, overrides_option
from hpc_train.core.config import load
from hpc_train.core.errors import require
from hpc_train.core.job_environment import JobEnvironment


@click.command()
@click.argument("config", type=UserPath())
@overrides_option
@click.option(
    "--resume",
    default="never",
    metavar="never|auto|RUN",
    help="Begin a new run (never, the default), resume the newest unfinished run of this job on as many ranks, if "
    "there is one (auto), or resume the run RUN, a run directory or a folder whose newest run is meant.",
)
def train(config: Path, overrides: tuple[str, ...], resume: str) -> None:
    """Train the job CONFIG. Start it with mpirun or srun.

    SIGTERM, SIGUSR2 or Ctrl-C end it after the current step, with a checkpoint and exit code 75. The same command with
    --resume auto resumes from there. To stop mpirun, send it SIGUSR2: after Ctrl-C or SIGTERM, mpirun kills the ranks
    within a second and ends with 1.

    \b
    Example: mpirun -n 2 hpc-train train configs/mlp-mnist.toml --resume auto
    """
    require("torch", "h5py")
    from hpc_train.core import output, signals

    signals.defer_stop_signal()
    output.protect_output()
    from hpc_train.datasets.inspect import first_look
    from hpc_train.train.comm.startup import open_context

    job = JobEnvironment.current()
    looked = first_look.begin(lambda: load(job_file(config), overrides).config) if job.is_first_rank else None
    alone = None if job.is_launched else load(job_file(config), overrides)
    use_mpi = job.is_launched or (alone is not None and alone.config.reduce.strategy != "local")
    with open_context(use_mpi) as context:
        loaded = alone or context.on_root(lambda: load(job_file(config), overrides))
        from hpc_train.train.loop import train as run

        context.on_root(lambda: looked and looked.wait())
        code = run(loaded, context, resume)
    if code:
        signals.ignore_signals()
        sys.exit(code)


@click.command()
@click.argument("run", type=UserPath())
@click.option("--prompt", default="", metavar="TEXT", help="Text to continue; without it, a new document.")
@click.option("--tokens", type=click.IntRange(1), default=200, show_default=True, help="Maximum number of tokens.")
@click.option(
    "--temperature", type=FiniteNumber(0), default=0.8, show_default=True, help="0: always the likeliest token."
)
@click.option("--top-k", type=click.IntRange(1), metavar="K", help="Sample from the K likeliest tokens only.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="The same seed writes the same text.",
)
@overrides_option
@on_first_rank
def generate(
    run: Path, prompt: str, tokens: int, temperature: float, top_k: int | None, seed: int, overrides: tuple[str, ...]
) -> None:
    """Write text with the newest checkpoint of RUN, a language model's run directory.

    \b
    Example: hpc-train generate runs/gpt-text --prompt "def main(" --tokens 300
    """
    require("torch", "h5py")
    from hpc_train.train.comm.startup import open_context

    with open_context(use_mpi=False):
        from hpc_train.train.generate import Decoding
        from hpc_train.train.generate import generate as write

        click.echo(write(run, overrides, prompt, Decoding(tokens, temperature, top_k, seed)))
