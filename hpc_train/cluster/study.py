"""A scaling study: every size as often as asked, run here or as jobs of a batch system; only what is missing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from hpc_train.cluster.scheduler import Job, Scheduler
from hpc_train.cluster.site_profile import SiteProfile
from hpc_train.cluster.submission import Request, enqueue, is_run_of, queued_job, submit_script, with_venv
from hpc_train.core import rundir
from hpc_train.core.config import Loaded, dumps
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import plural
from hpc_train.core.paths import expanded
from hpc_train.core.rundir import RunDir, is_complete, write_atomic
from hpc_train.core.settings import Config

Say = Callable[[str], None]


@dataclass
class Study:
    """The runs of one configuration at several sizes, and what is still to do, in order."""

    loaded: Loaded
    folder: Path
    todo: list[tuple[int, int]]  # (number of ranks, repeat): round by round, so that a slow hour hits all sizes alike
    num_complete: int
    waiting: list[str]  # jobs of an earlier call that have not ended
    unfinished: dict[int, list[RunDir]] = field(default_factory=dict)  # by number of ranks: to be resumed

    def run_directory(self, num_ranks: int) -> RunDir:
        """The directory of an unfinished run, else a new one."""
        left = self.unfinished.get(num_ranks)
        if left:
            return left.pop(0)
        run = rundir.create(self.folder.parent, self.folder.name, num_ranks, datetime.now(UTC))
        write_atomic(run.config, dumps(self.loaded))
        return run


def plan(loaded: Loaded, sizes: list[int], repeats: int, queue: Mapping[str, str] | None = None) -> Study:
    """What is missing of the study `<run.root>/scale-<name>/`. A run counts if it is complete and of this job.

    queue: the jobs that have not ended, from `Scheduler.waiting_jobs`; None if runs are started here.
    """
    config, folder = loaded.config, folder_of(loaded.config)
    num_done = dict.fromkeys(sizes, 0)
    unfinished: dict[int, list[RunDir]] = {}
    waiting = []
    for path in sorted(folder.glob("*/config.toml")):
        run = RunDir(path.parent)
        num_ranks = run.size
        if num_ranks not in num_done or not is_run_of(run, config):
            continue
        if is_complete(run):
            num_done[num_ranks] += 1
        elif queue is not None and (job := queued_job(run.path, queue)):
            num_done[num_ranks] += 1
            waiting.append(job)
        else:
            unfinished.setdefault(num_ranks, []).append(run)
    todo = [(size, repeat) for repeat in range(repeats) for size in sizes if repeat >= num_done[size]]
    num_complete = sum(min(count, repeats) for count in num_done.values()) - len(waiting)
    return Study(loaded, folder, todo, num_complete, waiting, unfinished)


def folder_of(config: Config) -> Path:
    return expanded(config.run.root) / f"scale-{config.name}"


def sizes(config: Config) -> list[int]:
    """The numbers of ranks of the complete runs in the study's folder."""
    runs = [RunDir(path.parent) for path in sorted(folder_of(config).glob("*/config.toml"))]
    return [run.size for run in runs if is_complete(run)]


def weak_batch(config: Config, sizes: list[int]) -> int:
    """Samples per rank in weak scaling: the job's own, or its global batch divided by the smallest size."""
    if config.train.batch_per_rank is not None:
        return config.train.batch_per_rank
    global_batch, smallest = config.train.batch_size(1), min(sizes)
    if global_batch % smallest:
        raise UserError(
            f"--weak: train.global_batch = {global_batch} cannot be divided evenly among {smallest} ranks, the "
            "smallest size",
            "Set the batch of a rank: --set train.batch_per_rank=...",
        )
    return global_batch // smallest


def submit_all(study: Study, scheduler: Scheduler, site: SiteProfile, time_limit: str | None, say: Say) -> str:
    """Queues what is missing, each job after the previous one has ended in whatever way, and last the report's job.

    Returns the id of the report's job.
    """
    after = tuple(study.waiting)
    for size, repeat in study.todo:
        run = study.run_directory(size)
        job = enqueue(scheduler, Request(study.loaded, site, size, time_limit), run, after).job
        nodes = plural(site.num_nodes(size), "node")
        say(f"Job {job}: {plural(size, 'rank')} on {nodes}, repeat {repeat + 1}: {run.path}")
        after = (job,)
    script, folder = study.folder / "report.sbatch", study.folder.absolute()
    report = Job("report", 1, ("report", str(folder)), Path.cwd(), folder, "00:10:00", has_launcher=False)
    write_atomic(script, scheduler.render(report, with_venv(site)))
    return submit_script(scheduler, script, after)
