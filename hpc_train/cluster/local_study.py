"""A scaling study on this machine: one mpirun after the other."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from time import monotonic
from types import FrameType

from hpc_train.cluster import launch
from hpc_train.cluster.study import Say, Study
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import plural
from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.progress import duration
from hpc_train.core.rundir import RunDir, is_complete
from hpc_train.core.settings import Config
from hpc_train.core.signals import CONTINUE, TERMINATED

_CHECKPOINT_S = 60.0  # how long ranks may take to save a checkpoint after an interruption
_LAST_LINES = 8  # of a failed run's log that are shown


@dataclass
class _Progress:
    """What the runs so far took, by number of ranks, and which sizes have failed."""

    began_s: float = field(default_factory=monotonic)
    took_s: dict[int, list[float]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)  # number of ranks: how it failed

    def text(self, todo: list[tuple[int, int]]) -> str:
        """ "3 min so far, about 5 min left". A new size is assumed to take as long as the mean of the others."""
        so_far = f"{duration(monotonic() - self.began_s)} so far"
        known = [seconds for runs in self.took_s.values() for seconds in runs]
        if not known:
            return so_far
        left_s = sum(fmean(self.took_s.get(size, known)) for size, _ in todo if size not in self.failed)
        return f"{so_far}, about {duration(left_s)} left"


def run_here(study: Study, say: Say) -> list[str]:
    """Runs what is missing with mpirun. Returns one line for each size that failed."""
    if not study.todo:
        return []
    cores = launch.num_cores()
    _check_mpirun()
    _warn_of_crowding([size for size, _ in study.todo], cores, say)
    for number in (signal.SIGTERM, signal.SIGHUP):  # the default action would leave mpirun running without a parent
        signal.signal(number, _terminate)
    progress = _Progress()
    for index, (size, repeat) in enumerate(study.todo):
        what = f"[{index + 1}/{len(study.todo)}] {plural(size, 'rank')}, repeat {repeat + 1}"
        if size in progress.failed:
            say(f"{what}: skipped, because this size has failed")
            continue
        say(f"{what} ({progress.text(study.todo[index:])})")
        _run_one(study, size, cores, progress, say)
    return list(progress.failed.values())


def _check_mpirun() -> None:
    if JobEnvironment.current().launcher == "mpirun":
        raise UserError("hpc-train scale starts mpirun itself and cannot run under mpirun", "Start it without mpirun.")
    if shutil.which("mpirun") is None:
        raise UserError("mpirun was not found", "Load your MPI module, or submit to Slurm with --site.")


def _warn_of_crowding(sizes: list[int], cores: int, say: Say) -> None:
    crowded = sorted({size for size in sizes if size > cores})
    if crowded:
        say(
            f"Note: {', '.join(map(str, crowded))} ranks share {cores} cores here and wait for each other: that "
            "measures this machine's limit, not how the job scales."
        )


def _run_one(study: Study, size: int, cores: int, progress: _Progress, say: Say) -> None:
    run = study.run_directory(size)
    started_s = monotonic()
    code = _mpirun(study.loaded.config, size, cores, run)
    took_s = monotonic() - started_s
    if code == 0 and is_complete(run):
        progress.took_s.setdefault(size, []).append(took_s)
        say(f"  done in {duration(took_s)}: {run.path}")
        return
    reason = "stopped on request" if code == CONTINUE else f"exit code {code}"
    progress.failed[size] = f"{plural(size, 'rank')}: {reason}, see {_log(run)}"
    say(f"  failed after {duration(took_s)} ({reason}); the end of its log:\n{_tail(_log(run))}")


def _mpirun(config: Config, num_ranks: int, cores: int, run: RunDir) -> int:
    """Trains in `run` to the end, output to its log. After an interruption the ranks may save a checkpoint."""
    program = Path(sys.executable).with_name("hpc-train")
    omp_threads = os.environ.get("OMP_NUM_THREADS", "")
    num_threads = config.train.threads or (int(omp_threads) if omp_threads.isdecimal() else 0) or 1
    launcher = launch.on_this_machine(num_ranks, num_threads, cores)
    command = [*launcher, str(program), "train", str(run.config), "--resume", str(run.path)]
    with _log(run).open("ab") as log:
        # A process group of its own: Ctrl-C reaches this process alone, which then stops the ranks in order.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
        try:
            return child.wait()
        except BaseException:
            _stop(child)
            raise


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """USR2, which mpirun forwards to the ranks; kills what has not ended after a while."""
    try:
        child.send_signal(signal.SIGUSR2)
        child.wait(_CHECKPOINT_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt, SystemExit):  # a second Ctrl-C or TERM: at once
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _log(run: RunDir) -> Path:
    return run.path / "mpirun.log"


def _tail(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-_LAST_LINES:])
