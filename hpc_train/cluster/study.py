"""A whole scaling study: every size, as often as asked, with mpirun here or as Slurm jobs; only what is missing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from time import monotonic
from types import FrameType

from hpc_train.cluster import slurm
from hpc_train.cluster.slurm import Site
from hpc_train.core import rundir
from hpc_train.core.config import Loaded, dumps
from hpc_train.core.errors import UserError
from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.paths import expanded
from hpc_train.core.progress import duration
from hpc_train.core.rundir import RunDir, write_atomic
from hpc_train.core.settings import Config
from hpc_train.core.signals import CONTINUE, TERMINATED

_PATIENCE_S = 60.0  # for a checkpoint, after an interruption
Say = Callable[[str], None]


@dataclass
class Study:
    """The runs of one configuration at several sizes, and what is still to do, in order."""

    loaded: Loaded
    folder: Path
    todo: list[tuple[int, int]]  # (number of ranks, repeat): round by round, so that a slow hour hits all sizes alike
    num_complete: int
    waiting: list[str]  # Slurm jobs of an earlier call that have not ended
    unfinished: dict[int, list[RunDir]] = field(default_factory=dict)  # of a size: to be continued

    def run_directory(self, num_ranks: int) -> RunDir:
        """One to work in: an unfinished run's, else a new one."""
        left = self.unfinished.get(num_ranks)
        if left:
            return left.pop(0)
        root, name = self.folder.parent, self.folder.name
        run = rundir.create(root, name, num_ranks, datetime.now(UTC))
        write_atomic(run.config, dumps(self.loaded))
        return run


def plan(loaded: Loaded, sizes: list[int], repeats: int, in_queue: Mapping[str, str] | None = None) -> Study:
    """What is missing of the study `<run.root>/scale-<name>/`. A run counts when it is complete and of this job.

    in_queue: Slurm's jobs that have not ended, as `waiting_jobs` tells them; None where runs are started here.
    """
    config = loaded.config
    folder = expanded(config.run.root) / f"scale-{config.name}"
    done = dict.fromkeys(sizes, 0)
    unfinished: dict[int, list[RunDir]] = {}
    waiting = []
    for path in sorted(folder.glob("*/config.toml")):
        run = RunDir(path.parent)
        num_ranks = run.size
        if num_ranks not in done or not slurm.is_of(run, config):
            continue
        if _is_complete(run):
            done[num_ranks] += 1
        elif in_queue is not None and (job := slurm.queued_job(run.path, in_queue)):
            done[num_ranks] += 1
            waiting.append(job)
        else:
            unfinished.setdefault(num_ranks, []).append(run)
    todo = [(size, repeat) for repeat in range(repeats) for size in sizes if repeat >= done[size]]
    num_complete = sum(min(count, repeats) for count in done.values()) - len(waiting)
    return Study(loaded, folder, todo, num_complete, waiting, unfinished)


def _is_complete(run: RunDir) -> bool:
    try:
        summary = json.loads(run.summary.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(summary, dict) and summary.get("complete") is True


def weak_batch(config: Config, sizes: list[int]) -> int:
    """Samples a rank in weak scaling: the job's own, or its global batch shared by the smallest size."""
    if config.train.batch_per_rank is not None:
        return config.train.batch_per_rank
    whole, smallest = config.train.batch_size(1), min(sizes)
    if whole % smallest:
        raise UserError(
            f"--weak: train.global_batch = {whole} cannot be shared evenly by {smallest} ranks, the smallest size",
            "Set train.batch_per_rank itself: --set train.batch_per_rank=...",
        )
    return whole // smallest


# ---------------------------------------------------------------------------------------------- here


def run_here(study: Study, say: Say) -> list[str]:
    """Runs what is missing with mpirun, one size after the other; returns what failed, one line each."""
    if study.todo and JobEnvironment.current().launcher == "mpirun":
        raise UserError("hpc-train scale starts mpirun itself and cannot run under mpirun", "Call it without mpirun.")
    if study.todo and shutil.which("mpirun") is None:
        raise UserError("mpirun was not found", "Load your MPI module, or name a site to submit to Slurm: --site.")
    cores = num_cores()
    crowded = sorted({size for size, _ in study.todo if size > cores})
    if crowded:
        names = ", ".join(map(str, crowded))
        say(
            f"Note: {names} ranks share {cores} cores here and wait for each other; that measures this machine's limit,"
            " not how the job scales."
        )
    for number in (signal.SIGTERM, signal.SIGHUP):  # or mpirun would go on without us
        signal.signal(number, _terminate)
    began = monotonic()
    failed: dict[int, str] = {}
    spent: dict[int, list[float]] = {}
    for index, (size, repeat) in enumerate(study.todo):
        what = f"[{index + 1}/{len(study.todo)}] {_ranks(size)}, repeat {repeat + 1}"
        if size in failed:
            say(f"{what}: left out, this size has failed")
            continue
        run = study.run_directory(size)
        left_s = _time_left_s([size for size, _ in study.todo[index:] if size not in failed], spent)
        say(f"{what} ({duration(monotonic() - began)} so far{f', about {duration(left_s)} left' * (left_s > 0)})")
        started = monotonic()
        code = _mpirun(study.loaded.config, size, cores, run)
        took_s = monotonic() - started
        if code == 0 and _is_complete(run):
            spent.setdefault(size, []).append(took_s)
            say(f"  done in {duration(took_s)}: {run.path}")
        else:
            reason = "stopped on request" if code == CONTINUE else f"exit code {code}"
            failed[size] = f"{_ranks(size)}: {reason}, see {_log(run)}"
            say(f"  failed after {duration(took_s)} ({reason}); its last words:\n{_tail(_log(run))}")
    return list(failed.values())


def _time_left_s(todo: list[int], spent: dict[int, list[float]]) -> float:
    """An estimate from the runs of this call, 0 without any; a new size is taken to last as long as their mean."""
    known = [seconds for each in spent.values() for seconds in each]
    return sum(fmean(spent.get(size, known)) for size in todo) if known else 0.0


def mpirun_words(num_ranks: int, num_threads: int, cores: int) -> list[str]:
    """How ranks are placed: each on as many cores as it has threads, at every size alike; unbound where they lack."""
    words = ["mpirun", "--quiet", "-n", str(num_ranks)]
    if num_ranks * num_threads > cores:
        return [*words, "--oversubscribe", "--bind-to", "none"]
    return [*words, "--map-by", f"slot:PE={num_threads}", "--bind-to", "core"]


def _mpirun(config: Config, num_ranks: int, cores: int, run: RunDir) -> int:
    """Trains in `run` to the end, output to its log. An interruption lets the ranks save a checkpoint."""
    program = Path(sys.executable).with_name("hpc-train")
    told = os.environ.get("OMP_NUM_THREADS", "")
    num_threads = config.train.threads or (int(told) if told.isdecimal() else 0) or 1
    words = ["train", str(run.config), "--resume", str(run.path)]
    command = [*mpirun_words(num_ranks, num_threads, cores), str(program), *words]
    with _log(run).open("ab") as log:
        # A process group of its own: Ctrl-C reaches this process alone, which then ends the ranks in good order.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
        try:
            return child.wait()
        except BaseException:
            _end(child)
            raise


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


def _end(child: subprocess.Popen[bytes]) -> None:
    """USR2, which mpirun hands to the ranks; whoever has not ended after a while is killed."""
    try:
        child.send_signal(signal.SIGUSR2)
        child.wait(_PATIENCE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt, SystemExit):  # a second Ctrl-C or TERM: at once
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def num_cores() -> int:
    """Physical cores that this process may use: mpirun gives out no others."""
    shared = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        shared.add(siblings.read_text() if siblings.exists() else str(cpu))
    return len(shared)


def _log(run: RunDir) -> Path:
    return run.path / "mpirun.log"


def _tail(path: Path, num_lines: int = 8) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-num_lines:])


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


# ---------------------------------------------------------------------------------------------- Slurm


def submit_all(study: Study, site: Site, time: str | None, say: Say) -> str:
    """Queues what is missing, each job after the one before has ended in whatever way, and last the report's job.

    Returns the id of the report's job.
    """
    after = tuple(study.waiting)
    for size, repeat in study.todo:
        run = study.run_directory(size)
        job = slurm.enqueue(study.loaded, site, run, size, time, after).job
        nodes = slurm.num_nodes(site, size)
        say(f"Job {job}: {_ranks(size)} on {nodes} node{'s' * (nodes != 1)}, repeat {repeat + 1}: {run.path}")
        after = (job,)
    script = study.folder / "report.sbatch"
    folder = str(study.folder.absolute())
    job_of_report = slurm.Job("report", 1, ("report", folder), Path.cwd(), "00:10:00", has_launcher=False)
    write_atomic(script, slurm.render(slurm.template(), slurm.at_home(site), job_of_report))
    return slurm.sbatch(script, after)
