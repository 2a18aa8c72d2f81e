"""`hpc-train scale`: a scaling study."""

import sys
from pathlib import Path

import click

from hpc_train.cli.options import UserPath, job_file, on_first_rank, overrides_option, site_option, sizes, time_option
from hpc_train.cli.report import print_report
from hpc_train.core.config import load


@click.command()
@click.argument("config", type=UserPath())
@click.option("--ranks", callback=sizes, required=True, metavar="N,N,...", help="Numbers of ranks to compare.")
@click.option("--weak", is_flag=True, help="Keep the batch of each rank: the work grows with the ranks.")
@click.option("--repeat", type=click.IntRange(1, 1000), default=1, show_default=True, help="Runs of each size.")
@site_option
@time_option
@overrides_option
@on_first_rank
def scale(
    config: Path,
    ranks: list[int],
    weak: bool,
    repeat: int,
    site: str | None,
    time: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Train the job CONFIG at several sizes and report how it scales: with mpirun here, or as Slurm jobs (--site).

    Rerun the same command to run only what is missing.

    \b
    Example: hpc-train scale configs/mlp-mnist.toml --ranks 1,2 --repeat 2
    """
    from hpc_train.cluster import local_study, study
    from hpc_train.cluster.site_profile import load_site
    from hpc_train.cluster.slurm import Slurm

    ranks = sorted(set(ranks))
    loaded = load(job_file(config), overrides)
    if weak:
        batch = study.weak_batch(loaded.config, ranks)
        loaded = load(job_file(config), (*overrides, f"train.batch_per_rank={batch}"))
        click.echo(f"Weak scaling: {batch} samples per rank and step (train.batch_per_rank)")
    profile, scheduler = load_site(site) if site else None, Slurm()
    planned = study.plan(loaded, ranks, repeat, scheduler.waiting_jobs() if profile else None)
    click.echo(f"Study: {planned.folder}: {planned.num_complete} runs complete, {len(planned.todo)} to do")
    if profile:
        job = study.submit_all(planned, scheduler, profile, time, click.echo)
        click.echo(f"Job {job} writes the report at the end: {planned.folder / f'job-{job}.out'}")
        return
    failed = local_study.run_here(planned, click.echo)
    print_report((planned.folder,), None, None, "table")
    if failed:
        click.echo("\n".join(["Failed:", *failed, "Rerun the same command to run what is missing."]), err=True)
        sys.exit(1)
