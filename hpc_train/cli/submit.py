"""`hpc-train submit`: train as a Slurm job."""

import json
import shlex
from pathlib import Path

import click

from hpc_train.cli.options import (
    MAX_RANKS,
    UserPath,
    job_file,
    on_first_rank,
    overrides_option,
    site_option,
    time_option,
)
from hpc_train.core.config import load
from hpc_train.core.formatting import plural
from hpc_train.core.paths import expanded


@click.command()
@click.argument("config", type=UserPath())
@click.option("--nodes", type=click.IntRange(1, MAX_RANKS), required=True, help="Number of nodes.")
@site_option
@time_option
@click.option("--dry-run", is_flag=True, help="Print the job script and change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print job, run directory and script as JSON.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="Resume the newest unfinished run of this job on as many ranks, if there is one (auto), or begin a new run.",
)
@overrides_option
@on_first_rank
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
    """Train the job CONFIG as a Slurm job, which resumes by itself after an interruption.

    Rerun the same command to resume a job that ended early.

    \b
    Example: hpc-train submit configs/mlp-mnist.toml --nodes 4 --time 2:00:00
    """
    from hpc_train.cluster import submission
    from hpc_train.cluster.site_profile import load_site
    from hpc_train.cluster.slurm import Slurm

    scheduler, profile = Slurm(), load_site(site or "generic")
    loaded, num_ranks = load(job_file(config), overrides), nodes * profile.ranks_per_node
    request = submission.Request(loaded, profile, num_ranks, time)
    if not profile.asks_for_cores:
        click.echo(
            "Note: this site profile asks for no cores a rank, and most clusters then give each rank one."
            " Set cores_per_rank in the profile.",
            err=True,
        )
    if dry_run:
        left = submission.unfinished(loaded.config, num_ranks) if resume == "auto" else None
        new = expanded(loaded.config.run.root) / loaded.config.name / f"TIME-np{num_ranks}"
        click.echo(request.script(scheduler, left.path if left else new), nl=False)
        return
    queued = submission.submit(scheduler, request, resume)
    if as_json:
        click.echo(json.dumps({"job": queued.job, "run": str(queued.run), "script": str(queued.script)}))
        return
    click.echo(f"Job {queued.job}: {plural(num_ranks, 'rank')} on {plural(nodes, 'node')}")
    click.echo(f"Run directory: {queued.run}")
    click.echo(f"Start time:       {scheduler.start_command.format(job=queued.job)}")
    click.echo(f"Output:           tail -f {shlex.quote(str(queued.run / f'job-{queued.job}.out'))}")
    click.echo(f"Result:           hpc-train report {shlex.quote(str(queued.run))}")
