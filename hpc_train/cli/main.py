"""The command line. Each command imports its half inside, so that reports never touch MPI or torch."""

import errno
import io
import json
import os
import shlex
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from hpc_train import __version__
from hpc_train.cli.bench import bench
from hpc_train.cli.data import data
from hpc_train.cli.options import MOST_RANKS, Finite, Place, by_first_rank, sizes
from hpc_train.cli.plan import plan
from hpc_train.cli.prepare import prepare, stage
from hpc_train.core.config import dumps, load
from hpc_train.core.errors import JointFailure, UserError, refused, require
from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.paths import exists, expanded
from hpc_train.core.redaction import message, printable

# configs/ inside an installed wheel, or of the checkout
_JOB_FILES = (Path(__file__).parents[1] / "shipped" / "configs", Path(__file__).parents[2] / "configs")

_overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one key, e.g. --set train.steps=200 (repeatable).",
)


class _Group(click.Group):
    """Commands in the order they are used, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hpc-train")
def cli() -> None:
    """Train PyTorch models on MPI ranks, and learn where every second and joule went.

    \b
    Example:
      hpc-train prepare mnist-5k data/mnist-5k.h5
      mpirun -n 2 hpc-train train configs/softmax-mnist.toml
      hpc-train report runs/softmax-mnist
    """


cli.add_command(prepare)
cli.add_command(stage)
cli.add_command(data)


@cli.command()
@click.argument("config", type=Place())
@_overrides
@click.option(
    "--resume",
    default="never",
    metavar="never|auto|RUN",
    help="Begin a new run (never, the default), continue the newest unfinished one of this job on as many ranks if "
    "there is one (auto), or continue the run directory RUN.",
)
def train(config: Path, overrides: tuple[str, ...], resume: str) -> None:
    """Train as CONFIG says; start it with mpirun or srun.

    SIGTERM, SIGUSR2 or Ctrl-C end it after the step at hand, with a checkpoint and exit code 75; the same command with
    --resume auto goes on from there. To mpirun, send SIGUSR2: after Ctrl-C or SIGTERM it gives the ranks a second, then
    kills them, and ends with 1.

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
    looked = first_look.begin(lambda: load(_job_file(config), overrides).config) if job.is_first_rank else None
    alone = None if job.is_launched else load(_job_file(config), overrides)
    use_mpi = job.is_launched or (alone is not None and alone.config.reduce.strategy != "local")
    with open_context(use_mpi) as context:
        loaded = alone or context.on_root(lambda: load(_job_file(config), overrides))
        from hpc_train.train.loop import train as run

        context.on_root(lambda: looked and looked.wait())
        code = run(loaded, context, resume)
    if code:
        signals.ignore_signals()
        sys.exit(code)


@cli.command()
@click.argument("run", type=Place())
@click.option("--prompt", default="", metavar="TEXT", help="What to go on from; a new document without it.")
@click.option("--tokens", type=click.IntRange(1), default=200, show_default=True, help="How many to write, at most.")
@click.option("--temperature", type=Finite(0), default=0.8, show_default=True, help="0: always the likeliest.")
@click.option("--top-k", type=click.IntRange(1), metavar="K", help="Draw from the K likeliest tokens alone.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="The same seed writes the same text.",
)
@_overrides
@by_first_rank
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
        from hpc_train.train.generate import generate as write

        click.echo(write(run, overrides, prompt, tokens, temperature, top_k, seed))


_site = click.option("--site", metavar="NAME", help="Site profile: a shipped name, or the path of your own.")
_time = click.option("--time", metavar="TIME", help="Time limit, as sbatch takes it: 90, 12:00:00, 1-12:00:00.")


@cli.command()
@click.argument("config", type=Place())
@click.option("--nodes", type=click.IntRange(1, MOST_RANKS), required=True, help="How many nodes to ask for.")
@_site
@_time
@click.option("--dry-run", is_flag=True, help="Print the job script, and touch nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print job, run directory and script as JSON.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="Continue the newest unfinished run of this job on as many ranks, if there is one, or begin a new one.",
)
@_overrides
@by_first_rank
def submit(
    config: Path,
    nodes: int,
    site: str | None,
    time: str | None,
    dry_run: bool,
    as_json: bool,
    resume: str,
    overrides: tuple[str, ...],
) -> None:
    """Train as CONFIG says as a Slurm job, which goes on by itself after an interruption.

    What ended early goes on where it was when the same command is given again.

    \b
    Example: hpc-train submit configs/mlp-mnist.toml --nodes 4 --time 2:00:00
    """
    from hpc_train.cluster import submission
    from hpc_train.cluster.site_profile import load_site
    from hpc_train.cluster.slurm import Slurm

    scheduler, profile = Slurm(), load_site(site or "generic")
    loaded, num_ranks = load(_job_file(config), overrides), nodes * profile.ranks_per_node
    request = submission.Request(loaded, profile, num_ranks, time)
    if dry_run:
        left = submission.unfinished(loaded.config, num_ranks) if resume == "auto" else None
        new = expanded(loaded.config.run.root) / loaded.config.name / f"TIME-np{num_ranks}"
        click.echo(request.script(scheduler, left.path if left else new), nl=False)
        return
    queued = submission.submit(scheduler, request, resume)
    if as_json:
        click.echo(json.dumps({"job": queued.job, "run": str(queued.run), "script": str(queued.script)}))
        return
    click.echo(f"Job {queued.job}: {num_ranks} rank{'s' * (num_ranks != 1)} on {nodes} node{'s' * (nodes != 1)}")
    click.echo(f"Run directory: {queued.run}")
    click.echo(f"When it starts:   squeue --start --job {queued.job}")
    click.echo(f"What it says:     tail -f {shlex.quote(str(queued.run / f'job-{queued.job}.out'))}")
    click.echo(f"How it did:       hpc-train report {shlex.quote(str(queued.run))}")


@cli.command()
@click.argument("config", type=Place())
@click.option("--ranks", callback=sizes, required=True, metavar="N,N,...", help="Numbers of ranks to compare.")
@click.option("--weak", is_flag=True, help="Keep the batch of each rank, so that work grows with the ranks.")
@click.option("--repeat", type=click.IntRange(1, 1000), default=1, show_default=True, help="Runs of each size.")
@_site
@_time
@_overrides
@by_first_rank
def scale(
    config: Path,
    ranks: list[int],
    weak: bool,
    repeat: int,
    site: str | None,
    time: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Train CONFIG at several sizes and report how it scales: with mpirun here, or with --site as Slurm jobs.

    Called again, it runs only what is missing.

    \b
    Example: hpc-train scale configs/mlp-mnist.toml --ranks 1,2 --repeat 2
    """
    from hpc_train.cluster import local_study, study
    from hpc_train.cluster.site_profile import load_site
    from hpc_train.cluster.slurm import Slurm

    ranks = sorted(set(ranks))
    loaded = load(_job_file(config), overrides)
    if weak:
        batch = study.weak_batch(loaded.config, ranks)
        loaded = load(_job_file(config), (*overrides, f"train.batch_per_rank={batch}"))
        click.echo(f"Weak scaling: {batch} samples a rank in each step (train.batch_per_rank)")
    profile, scheduler = load_site(site) if site else None, Slurm()
    planned = study.plan(loaded, ranks, repeat, scheduler.waiting_jobs() if profile else None)
    click.echo(f"Study: {planned.folder}: {planned.num_complete} runs complete, {len(planned.todo)} to do")
    if profile:
        job = study.submit_all(planned, scheduler, profile, time, click.echo)
        click.echo(f"Job {job} reports at the end: {planned.folder / f'job-{job}.out'}")
        return
    failed = local_study.run_here(planned, click.echo)
    _report((planned.folder,), None, None, "table")
    if failed:
        click.echo("\n".join(["Failed:", *failed, "The same command again runs what is missing."]), err=True)
        sys.exit(1)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=Place())
@click.option("--output", type=Place(), help="Folder for report.html, scaling.csv and summary.json.")
@click.option(
    "--figures",
    type=Place(),
    metavar="DIR",
    help="Write every figure there too, as PDF and SVG one column wide, for a proposal.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["table", "md", "csv", "json"]),
    help="What is printed: tables for the terminal (table, the default), Markdown to paste, numbers for programs.",
)
@click.option("--full", is_flag=True, help="Print every table and note instead of one screen.")
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option(
    "--target-loss",
    type=Finite(),
    metavar="LOSS",
    help="Compare times until this training loss; without it the best loss that every run reached.",
)
@click.option("--pue", type=Finite(1, 10), help="The centre's power usage effectiveness, over [energy] pue.")
@click.option("--co2-g-per-kwh", type=Finite(0, 1e9), metavar="GRAMS", help="Of the electricity, over [energy].")
@click.option("--price-per-kwh", type=Finite(0, 1e9), metavar="PRICE", help="With --currency, over [energy].")
@click.option("--currency", metavar="NAME", help="Of the price: EUR, say.")
@by_first_rank
def report(
    runs: tuple[Path, ...],
    output: Path | None,
    figures: Path | None,
    kind: str | None,
    full: bool,
    as_json: bool,
    **options: float | str | None,
) -> None:
    """Speedup, efficiency and energy of RUNS (run directories, or folders of them).

    Prints the answer and one table, and writes a page with every table and figure. A run that cannot be read is
    skipped and named. The exit code is 1 if a section could not be made, which says so in its place, and 2 if there
    is nothing to report.

    \b
    Example: hpc-train report runs/softmax-mnist --figures proposal/
    """
    if options["price_per_kwh"] is not None and options["currency"] is None:
        raise click.UsageError("--price-per-kwh needs --currency, EUR say")
    if as_json and kind not in (None, "json"):
        raise click.UsageError(f"--json is --format json, and --format {kind} is given too: leave one of them out.")
    kind = "json" if as_json else kind or "table"
    if full and kind != "table":
        raise click.UsageError(f"--full is for the terminal's tables; --format {kind} always has everything.")
    _report(runs, output, figures, kind, full, **options)


def _report(
    runs: tuple[Path, ...],
    output: Path | None,
    figures: Path | None,
    kind: str,
    full: bool = False,
    target_loss: Any = None,
    **tariff: Any,
) -> None:
    """Prints the report as `kind` and writes its files, whose paths the terminal's tables end with."""
    from rich.console import Console

    from hpc_train.analysis.energy.cost import Tariff
    from hpc_train.analysis.report.renderers.figures import write_figures
    from hpc_train.analysis.report.renderers.files import default_output, to_csv, to_json, write_report
    from hpc_train.analysis.report.renderers.markdown import to_markdown
    from hpc_train.analysis.report.renderers.terminal import print_full, print_short
    from hpc_train.analysis.report.report import make_report

    report = make_report(list(runs), Tariff(**tariff), target_loss)
    if kind == "table":
        (print_full if full else print_short)(report, Console())
    else:
        render = {"md": to_markdown, "csv": to_csv, "json": to_json}[kind]
        click.echo(render(report), nl=False)
    drawn = None if figures is None else write_figures(report, figures)
    page = write_report(report, output or default_output(list(runs)))
    if kind == "table":
        click.echo(printable(f"Report: {page}"))
        if drawn is not None:
            found = f"{len(drawn)} files in {figures}" if drawn else "none, no step was timed."
            click.echo(printable(f"Figures: {found}"))
    if report.guard.faults:
        click.echo("\n".join(["hpc-train: the report is not complete.", *report.guard.faults]), err=True)
        sys.exit(1)


cli.add_command(plan)


@cli.command()
@click.argument("config", required=False, type=Place())
@_overrides
@click.option("--json", "as_json", is_flag=True, help="Print what every rank saw as JSON instead of a table.")
def doctor(config: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Find out what works here, by doing it, and what mends the rest: alone, or under mpirun or srun as a job would be.

    MPI, an all-reduce and what carries it, cores, GPUs, Horovod, files and locks, meters, Slurm, clocks and fork, in
    seconds; with CONFIG also what that job needs. The exit code is 1 where a check fails.

    \b
    Example: mpirun -n 2 hpc-train doctor configs/mlp-mnist.toml
    """
    from hpc_train.doctor.supervisor import examine

    sys.exit(examine(_job_file(config) if config else None, overrides, as_json))


cli.add_command(bench)


@cli.group(cls=_Group)
def config() -> None:
    """Look at job files.

    \b
    Example: hpc-train config show configs/mlp-mnist.toml
    """


@config.command("show")
@click.argument("config", type=Place())
@_overrides
@by_first_rank
def show(config: Path, overrides: tuple[str, ...]) -> None:
    """Print CONFIG as resolved: every key, and where its value came from.

    \b
    Example: hpc-train config show configs/softmax-mnist.toml --set train.lr=0.1
    """
    click.echo(dumps(load(_job_file(config), overrides)), nl=False)


def _job_file(path: Path) -> Path:
    """`path`, or the job of that name that travels inside the package: configs/softmax-mnist.toml works anywhere."""
    if exists(path) or path.parent.name not in ("", "configs"):
        return path
    return next((folder / path.name for folder in _JOB_FILES if exists(folder / path.name)), path)


def main() -> None:
    """The console script: a user's mistake is one message on one rank and exit code 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):  # a terminal of LANG=C, a path that is not UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
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
    except JointFailure:  # the rank that met the fault says it
        _end("", 1)
    except OSError as error:
        if told := refused(error):
            _end_refused(told, job)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            # Python writes what is left once more when it ends, and would end with 120.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            remedy = "Make room where it goes, or send it elsewhere."
            _end_refused(UserError(f"output cannot be written: {error.strerror}", remedy), job)
        _end(traceback.format_exc(), 1)
    except Exception:  # noqa: BLE001  our own bug: said whole
        _end(traceback.format_exc(), 1)


def _end_refused(error: UserError, job: JobEnvironment) -> NoReturn:
    if job.is_first_rank:
        _end(f"hpc-train: {error}", 2)
    _end("" if error.joint else f"hpc-train: rank {job.rank} on {socket.gethostname()}: {error}", 2)


def _end(text: str, code: int) -> NoReturn:
    if text:
        print(message(text), file=sys.stderr, flush=True)
    sys.exit(code)
