"""`hpc-train scale`: a scaling study."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpc_train.cli.options import UserPath, job_file, on_first_rank, overrides_option, site_option, sizes, time_option
from hpc_train.cli.report import print_report
from hpc_train.core.config import load
from hpc_train.core.errors import UserError

if TYPE_CHECKING:
    from hpc_train.analysis.planning.further_run import FurtherRun


@click.command()
@click.argument("config", type=UserPath())
@click.option("--ranks", callback=sizes, metavar="N,N,...", help="Numbers of ranks to compare.")
@click.option("--next", "is_next", is_flag=True, help="Instead: the one further run that plan says would tell most.")
@click.option("--weak", is_flag=True, help="Keep the batch of each rank: the work grows with the ranks.")
@click.option("--repeat", type=click.IntRange(1, 1000), default=1, show_default=True, help="Runs of each size.")
@site_option
@time_option
@overrides_option
@on_first_rank
def scale(
    config: Path,
    ranks: list[int],
    is_next: bool,
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
             hpc-train scale configs/mlp-mnist.toml --next
    """
    from hpc_train.cluster import local_study, study
    from hpc_train.cluster.site_profile import load_site
    from hpc_train.cluster.slurm import Slurm

    if bool(ranks) == is_next:
        raise UserError("scale needs --ranks or --next, one of them", "hpc-train scale --help has examples.")
    loaded = load(job_file(config), overrides)
    measured = study.sizes(loaded.config) if is_next else []
    if is_next:
        further = _further_run(study.folder_of(loaded.config), weak)
        if further is None:
            click.echo("No further run would narrow the interval of the plan by a tenth: nothing to do.")
            return
        ranks, repeat = [further.ranks], repeat + measured.count(further.ranks)
    ranks = sorted(set(ranks))
    if weak:
        batch = study.weak_batch(loaded.config, [*ranks, *measured])
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


def _further_run(folder: Path, weak: bool) -> "FurtherRun | None":
    """What the plan of a study's runs says, printed. Raises `UserError` if the study has no plan."""
    from hpc_train.analysis.guard import SectionGuard
    from hpc_train.analysis.report.notes.plan import further_run_text
    from hpc_train.analysis.report.sections.next_run import next_run
    from hpc_train.analysis.report.sections.plan import record
    from hpc_train.analysis.runs.load import load_known
    from hpc_train.analysis.scaling.compare import compare
    from hpc_train.core.rundir import write_atomic

    known, _ = load_known((folder,), SectionGuard())
    groups = [group for group in compare(known).groups if group.weak == weak and group.baseline is not None]
    if len(groups) != 1:
        found = "; ".join(group.label for group in groups) or "none of two sizes with steady steps"
        raise UserError(
            f"--next needs a study of one job in {folder}; there are {found}", "Measure sizes with --ranks."
        )
    advice = next_run(groups[0], SectionGuard())
    if advice.plan is None:
        raise UserError(f"--next: {advice.reason}", "Measure sizes with --ranks.")
    further = advice.plan.further
    if further is not None:
        click.echo(further_run_text(advice.plan))
        # The report of the run compares the two.
        write_atomic(folder / f"plan-{further.ranks}.json", json.dumps(record(advice.plan), indent=2) + "\n")
    return further
