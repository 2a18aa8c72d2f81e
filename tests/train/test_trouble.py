"""When a rank fails, a job is killed, or the machine is not as it should be: nothing hangs and nothing is lost."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpc_train.core import rundir
from hpc_train.core.timing_log import read_timings
from tests import jobs

TASK = '''
import time
from hpc_train.train.tasks.classification import Classification

class OneRankFails(Classification):
    """Rank 1 meets a fault in its 5th step."""
    def __init__(self, config, context):
        super().__init__(config, context)
        self.rank, self.calls = context.world.rank, 0

    def loss(self, model, batch):
        self.calls += 1
        if self.rank == 1 and self.calls == 5:
            self.fail()
        return super().loss(model, batch)

    def fail(self):
        raise ValueError("a fault on one rank")

class OneRankExits(OneRankFails):
    def fail(self):
        raise SystemExit(3)

class OneRankCannotStart(Classification):
    def __init__(self, config, context):
        super().__init__(config, context)
        if context.world.rank == 1:
            raise RuntimeError("this node has no memory left")

class Slow(Classification):
    def loss(self, model, batch):
        time.sleep(0.01)
        return super().loss(model, batch)
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(TASK)
    return tmp_path


def train_words(digits: Path, **keys: object) -> list[str]:
    return ["train", str(jobs.CONFIGS / "softmax-mnist.toml"), *jobs.settings(data__file=digits, **keys)]


@pytest.mark.parametrize("strategy", ["horovod", "mpi"])
@pytest.mark.parametrize(
    "kind, words",
    [
        ("OneRankFails", ["rank 1 on ", "ValueError: a fault on one rank", "in loss"]),
        ("OneRankExits", ["rank 1 on ", "ended with exit code 3"]),
        ("OneRankCannotStart", ["rank 1 on ", "RuntimeError: this node has no memory left"]),
    ],
)
def test_one_ranks_failure_ends_every_rank_with_its_traceback(
    folder: Path, digits: Path, kind: str, words: list[str], strategy: str
) -> None:
    done = jobs.run(
        3, *train_words(digits, task__kind=f"mine:{kind}", reduce__strategy=strategy), cwd=folder, timeout_s=40
    )
    assert done.code not in (0, 2)
    assert done.seconds < 20, "start and failure together; the failure itself takes about a second"
    for word in words:
        assert word in done.err, done.err
    assert done.err.count("Traceback") == ("Exits" not in kind), "the other ranks do not repeat it"


def test_a_rank_that_cannot_load_horovod_is_named(folder: Path, digits: Path) -> None:
    """As on a node where the installation is broken: the other ranks must end, too."""
    broken = folder / "broken" / "horovod"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libnccl.so.2: cannot open shared object file')")
    words = [str(jobs.HPC_TRAIN), *train_words(digits, train__steps=3)]
    mpirun = jobs.command(1, "")[:-2]
    line = [*mpirun, *words, ":", "-n", "1", "env", f"PYTHONPATH={broken.parent}", *words]
    done = subprocess.run(line, cwd=folder, env=jobs.environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("hpc-train: ") == 1, done.stderr
    assert "Horovod cannot be loaded on " in done.stderr and "libnccl.so.2" in done.stderr


WRITE_FAILS = """
import sys
from hpc_train.cli.main import main
from hpc_train.datasets.prepare import writer
from hpc_train.core.job_environment import JobEnvironment

def fail(*args):
    raise OSError(5, "Input/output error")

if JobEnvironment.current().rank == 1:
    writer.write_rows = fail
sys.argv = ["hpc-train", "prepare", "mnist-5k", "x.h5"]
main()
"""


def test_a_rank_that_cannot_write_ends_prepare(folder: Path) -> None:
    (folder / "job.py").write_text(WRITE_FAILS)
    line = [*jobs.command(3, "")[:-2], str(jobs.HPC_TRAIN.with_name("python")), "job.py"]
    done = subprocess.run(line, cwd=folder, env=jobs.environment(), capture_output=True, text=True, timeout=40)
    assert done.returncode not in (0, 2) and "rank 1 on " in done.stderr and "Input/output error" in done.stderr
    assert not list(folder.glob("*.h5")) and not list(folder.glob(".*"))


def test_a_mistake_made_on_every_rank_is_told_once(folder: Path, digits: Path) -> None:
    (folder / "every.py").write_text(TASK.replace("self.rank == 1 and ", ""))
    done = jobs.run(3, *train_words(digits, task__kind="every:OneRankFails"), cwd=folder, timeout_s=40)
    assert done.code not in (0, 2) and done.err.count("Traceback") == 1, done.err


def test_a_failure_ends_the_job_within_ten_seconds_of_it(folder: Path, digits: Path) -> None:
    began = time.time()
    jobs.run(4, *train_words(digits, task__kind="mine:OneRankFails"), cwd=folder, timeout_s=60)
    ended = time.time()
    (run,) = rundir.find([folder / "runs"])
    last_write = max(path.stat().st_mtime for path in run.timings_dir.iterdir())
    assert began < last_write and ended - last_write < 10


@contextmanager
def slow_job(folder: Path, digits: Path) -> Iterator[subprocess.Popen[str]]:
    """A job of two ranks that has recorded some hundred steps and would run for long."""
    words = train_words(digits, task__kind="mine:Slow", train__steps=100_000)
    job = subprocess.Popen(
        jobs.command(2, *words),
        cwd=folder,
        env=jobs.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (logs := list(folder.rglob("rank-00001.csv"))) or logs[0].stat().st_size < 10_000:
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.1)
        yield job
    finally:
        if job.poll() is None:
            job.kill()


def test_a_killed_run_keeps_all_but_its_last_second(folder: Path, digits: Path) -> None:
    with slow_job(folder, digits) as job:
        meta = json.loads(next(folder.rglob("meta.json")).read_text())
        for rank in meta["ranks"]:
            os.kill(rank["pid"], signal.SIGKILL)
        killed_ns = time.perf_counter_ns()
        job.communicate(timeout=20)
    assert job.returncode != 0
    (run,) = rundir.find([folder / "runs"])
    for rank in range(2):
        last = read_timings(run.timings(rank))
        assert 0 <= killed_ns - int(last["start_ns"][-1]) < 1e9, "a second of records at most"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_ends_and_leaves_records_that_can_be_read(folder: Path, digits: Path, number: int) -> None:
    with slow_job(folder, digits) as job:
        job.send_signal(number)
        _, errors = job.communicate(timeout=20)
    assert job.returncode != 0 and "Traceback" not in errors, errors
    (run,) = rundir.find([folder / "runs"])
    assert len(read_timings(run.timings(0)).values) > 30
    assert not list(run.path.rglob(".*")), "no temporary file is left"


def test_more_ranks_than_cores_are_told(folder: Path, digits: Path) -> None:
    num_cores = len(os.sched_getaffinity(0))
    done = jobs.run(num_cores + 1, *train_words(digits, train__steps=3), cwd=folder)
    assert done.code == 0 and done.err.count("warning: ") == 1
    assert f"{num_cores + 1} ranks on " in done.err and f"share {num_cores} core" in done.err


def test_a_launcher_of_another_mpi_is_named(folder: Path, digits: Path) -> None:
    """The environment says two ranks, and MPI sees one."""
    done = jobs.run(0, *train_words(digits, train__steps=3), cwd=folder, PMI_RANK="0", PMI_SIZE="2")
    assert (
        done.code == 2 and "the launcher started 2 ranks" in done.err and "sees 1" in done.err and "libmpi" in done.err
    )


def test_two_mpis_in_one_process_are_both_named(folder: Path, digits: Path, mpich: Path) -> None:
    """mpi4py is given MPICH, as a forgotten module would; Horovod keeps the Open MPI that it was built with."""
    libraries = mpich / "lib"
    env = {"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": str(libraries)}
    done = jobs.run(0, *train_words(digits, train__steps=3), cwd=folder, **env)
    assert done.code == 2, done.err
    assert f"two MPIs in one process: mpi4py calls {libraries}/libmpi.so" in done.err
    assert "Horovod calls " in done.err and "libmpi.so.40" in done.err and not list(folder.rglob("metrics.csv"))
