"""Submitting a training run: its directory, its script, its way into the queue, and what is known if that breaks."""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpc_train.cluster.scheduler import Job, NoAnswer, Refused, Scheduler
from hpc_train.cluster.site_profile import SiteProfile, time_limit_s
from hpc_train.core import rundir
from hpc_train.core.config import Loaded, dumps, load
from hpc_train.core.errors import UserError
from hpc_train.core.key_rules import check_ranks
from hpc_train.core.paths import expanded
from hpc_train.core.resume_rules import same_job, why_not
from hpc_train.core.rundir import RunDir, write_atomic
from hpc_train.core.settings import Config

_QUEUE_ANSWER_S = 20.0  # for a look into the queue after a submission that got no answer


@dataclass(frozen=True)
class Request:
    """A training run to submit. time_limit: None for the site's own."""

    loaded: Loaded
    site: SiteProfile
    num_ranks: int
    time_limit: str | None = None

    def script(self, scheduler: Scheduler, run: Path) -> str:
        """The script that trains in the run directory `run`. Raises `UserError`."""
        limit = self.time_limit or self.site.time
        try:
            limit_s = time_limit_s(limit)
        except ValueError as error:
            raise UserError(f"--time {limit}: {error}", "Write it as sbatch does: 90, 12:00:00 or 1-12:00:00") from None
        if limit_s <= self.site.signal_s:
            raise UserError(
                f"--time {limit}: not longer than the {self.site.signal_s} s before its end at which the job stops "
                "(signal_s)",
                "Ask for more time, or set signal_s lower in the site profile.",
            )
        run = run.absolute()
        arguments = ("train", str(run / "config.toml"), "--resume", str(run))
        job = Job(self.loaded.config.name, self.num_ranks, arguments, Path.cwd(), run, limit)
        return scheduler.render(job, with_venv(self.site))


def with_venv(site: SiteProfile) -> SiteProfile:
    """The site with the environment that this hpc-train runs in, unless the profile names one."""
    return site.model_copy(update={"venv": site.venv or sys.prefix})


@dataclass(frozen=True)
class Submitted:
    """A job in the queue."""

    job: str
    run: Path
    script: Path


def submit(scheduler: Scheduler, request: Request, resume: str = "auto") -> Submitted:
    """Queues a run: the newest unfinished one of this job on as many ranks, or a new one. Raises `UserError`.

    resume: "never" always begins a new run. If the scheduler refuses the job, no new run directory remains; if it may
    have accepted it, the directory stays, however this process ended.
    """
    config = request.loaded.config
    check_ranks(config, request.num_ranks)  # before the job waits in the queue for hours
    left = unfinished(config, request.num_ranks) if resume == "auto" else None
    if left is not None:
        if was_submitted(left.path) and (job := queued_job(left.path, scheduler.waiting_jobs())):
            raise UserError(
                f"{left.path} is in the queue, or running, as job {job}",
                "Wait until that job has ended (squeue), or begin another run: --resume never",
            )
        return enqueue(scheduler, request, left)
    if resume == "auto" and (passed := _newest_passed_over(config, request.num_ranks)):
        print(f"{passed} A new run begins.", file=sys.stderr)
    run = rundir.create(expanded(config.run.root), config.name, request.num_ranks, datetime.now(UTC))
    try:
        return enqueue(scheduler, request, run)
    except BaseException:
        if not was_submitted(run.path):  # ours, seconds old, and not in the queue
            shutil.rmtree(run.path)
        raise


def enqueue(scheduler: Scheduler, request: Request, run: RunDir, after: Sequence[str] = ()) -> Submitted:
    """Queues the training run of directory `run`, to start once the jobs `after` have ended in whatever way."""
    script = run.path / "train.sbatch"
    content = request.script(scheduler, run.path)
    write_atomic(run.config, dumps(request.loaded))
    write_atomic(script, content)
    _record_submission(run.path, None)  # before the scheduler can have the job: from here on the directory stays
    try:
        job = submit_script(scheduler, script, after)
    except Refused:
        _record(run.path).unlink(missing_ok=True)
        raise
    try:
        _record_submission(run.path, job)
    except UserError as error:  # a full disk; the queue knows the job's folder, too
        print(f"hpc-train: {_accepted(scheduler, job)}\n{error}", file=sys.stderr)
    return Submitted(job, run.path, script)


def submit_script(scheduler: Scheduler, script: Path, after: Sequence[str] = ()) -> str:
    """Queues a script and returns the job's id. Raises `UserError`, which says whether the job may be queued."""
    try:
        return scheduler.submit(script, after)
    except NoAnswer as fault:
        job = _find_job(scheduler, script.parent)
        if job is None:
            raise _may_be_accepted(scheduler, script.parent, str(fault)) from None
        print(f"hpc-train: {fault}. {_accepted(scheduler, job)}", file=sys.stderr)
        return job
    except KeyboardInterrupt:
        job = _find_job(scheduler, script.parent)
        outcome = _accepted(scheduler, job) if job else _may_be_accepted(scheduler, script.parent, "Ctrl-C")
        print(f"hpc-train: {outcome}", file=sys.stderr)
        raise


# ---------------------------------------------------------------------------------------------- unfinished runs


def unfinished(config: Config, num_ranks: int) -> RunDir | None:
    """The newest run of this job on as many ranks that has no summary."""
    left = [run for run in _without_summary(config) if run.size == num_ranks and is_run_of(run, config)]
    return left[-1] if left else None


def _newest_passed_over(config: Config, num_ranks: int) -> str | None:
    """Why the newest unfinished run of this name is not resumed; None if there is none."""
    left = _without_summary(config)
    why = why_not(left[-1], _read_config(left[-1]), config, left[-1].size, num_ranks) if left else None
    return f"{left[-1].path} is not continued: {why}." if why else None


def _without_summary(config: Config) -> list[RunDir]:
    """The unfinished runs of this name, oldest first."""
    runs = (RunDir(path.parent) for path in (expanded(config.run.root) / config.name).glob("*/config.toml"))
    return sorted((run for run in runs if not run.summary.exists()), key=lambda run: run.path.name)


def is_run_of(run: RunDir, config: Config) -> bool:
    """Whether this job began the run."""
    theirs = _read_config(run)
    return theirs is not None and same_job(theirs, config)


def _read_config(run: RunDir) -> Config | None:
    try:
        return load(run.config).config
    except UserError:
        return None


# ---------------------------------------------------------------------------------------------- queued runs


def queued_job(run: Path, queue: Mapping[str, str]) -> str | None:
    """The job of `queue` that trains in the run directory `run`, by the directory's record or the job's folder."""
    recorded = _recorded_job(run)
    if recorded in queue:
        return recorded
    here = os.path.realpath(run)
    return next((job for job, folder in queue.items() if folder and os.path.realpath(folder) == here), None)


def was_submitted(run: Path) -> bool:
    """Whether the scheduler has, had or may have a job of this run."""
    return _record(run).exists()


def _recorded_job(run: Path) -> str | None:
    """The id of the job that `run` was last submitted as, if it is known."""
    try:
        record: Any = json.loads(_record(run).read_text(encoding="utf-8"))
        return None if record["job"] is None else str(record["job"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _record_submission(run: Path, job: str | None) -> None:
    """job: None before the scheduler has given an id."""
    record = {"job": job, "submitted": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
    write_atomic(_record(run), json.dumps(record) + "\n")


def _record(run: Path) -> Path:
    return run / "submitted.json"


def _find_job(scheduler: Scheduler, folder: Path) -> str | None:
    try:
        return queued_job(folder, scheduler.waiting_jobs(_QUEUE_ANSWER_S))
    except UserError:
        return None


def _accepted(scheduler: Scheduler, job: str) -> str:
    return (
        f"{scheduler.name} has the job: {job} is in the queue ({scheduler.cancel_command.format(job=job)} removes it)"
    )


def _may_be_accepted(scheduler: Scheduler, folder: Path, fault: str) -> UserError:
    return UserError(
        f"{fault}: {scheduler.name} may have accepted the job all the same, so {folder} is kept",
        f"Look in a minute: {scheduler.list_command} shows each job and its folder. If no job has this folder, rerun "
        "the same command to submit it.",
    )
