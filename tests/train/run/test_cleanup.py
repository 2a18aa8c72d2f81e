"""What killed jobs leave behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from hpc_train.core import lock
from hpc_train.core.rundir import RunDir
from hpc_train.train.run.cleanup import remove_stale_runs, remove_stale_segments
from tests import jobs

RANK = "import sys, time\nfrom mpi4py import MPI\nMPI.COMM_WORLD.Barrier()\nprint('up', flush=True)\ntime.sleep(60)"


@contextmanager
def ranks() -> Iterator[tuple[subprocess.Popen[str], set[str]]]:
    """Two ranks of MPI that wait, under an mpirun of their own session, and the segments that they made."""
    command = ["mpirun", "--quiet", "-n", "2", "--oversubscribe", "--bind-to", "none", sys.executable, "-c", RANK]
    job = subprocess.Popen(command, env=jobs.environment(), stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert job.stdout and (job.stdout.readline() + job.stdout.readline()).count("up") == 2
    pids = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    made = {line.split("/dev/shm/")[1] for line in maps.splitlines() if "/dev/shm/vader_segment" in line}
    try:
        yield job, made
    finally:
        for pid in [job.pid, *pids]:  # mpirun first: it would clean up
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        job.wait()


@pytest.mark.skipif(
    os.readlink("/proc/self/ns/pid") != "pid:[4026531836]", reason="in a container, whose segments end with it"
)
def test_segments_of_dead_ranks_are_removed_and_those_of_living_ones_stay() -> None:
    with ranks() as (_, dead):
        pass
    if not dead:
        pytest.skip("this MPI keeps no segments in /dev/shm")
    dead = {name for name in dead if Path("/dev/shm", name).exists()}
    assert dead, "ranks killed by SIGKILL leave them"
    with ranks() as (_, living):
        assert not dead & set(remove_stale_segments()), "too young: their maker may be about to map them"
        removed = set(remove_stale_segments(young_s=0.0))
        assert dead <= removed and not living & removed
        assert all(Path("/dev/shm", name).exists() for name in living)


def test_what_is_no_segment_of_this_user_stays(tmp_path: Path) -> None:
    kept = [tmp_path / "data", tmp_path / "vader_segment.folder", tmp_path / "vader_segment.link"]
    kept[0].write_text("")
    kept[1].mkdir()
    kept[2].symlink_to(kept[0])
    others = tmp_path / "vader_segment.others"
    others.write_text("")
    opened = (tmp_path / "nccl-open").open("w")
    mine = tmp_path / "ucx_shm_posix_1"
    mine.write_text("")
    if os.geteuid() == 0:
        os.chown(others, 12345, 12345)
        kept.append(others)
    else:
        others.unlink()
    assert remove_stale_segments(tmp_path, young_s=-1) == [mine.name]
    assert all(path.is_symlink() or path.exists() for path in [*kept, Path(opened.name)])
    opened.close()


def begun(path: Path, content: dict[str, object]) -> RunDir:
    run = RunDir(path)
    for folder in (run.timings_dir, run.energy_dir, run.checkpoints_dir):
        folder.mkdir(parents=True)
    run.lock.write_text(json.dumps({"token": "t", "system": lock._system(), **content}))
    return run


def test_a_run_that_was_killed_before_its_first_step_is_removed_and_no_other(tmp_path: Path) -> None:
    dead, living = {"pid": 2**22 + 1, "process": "1"}, {"pid": os.getpid(), "process": lock._process(os.getpid())}
    mine = begun(tmp_path / "mine", living)
    gone = [begun(tmp_path / "dead", dead), begun(tmp_path / "dead-without-folders", dead)]
    gone[1].timings_dir.rmdir()
    stale = begun(tmp_path / "stale", {"system": "elsewhere"})
    os.utime(stale.lock, (1, 1))
    kept = {name: begun(tmp_path / name, dead) for name in ("meta", "config", "steps", "script", "timings")}
    kept["meta"].meta.write_text("{}")
    kept["config"].config.write_text("name = 'a'")  # a study may be about to go on with it
    kept["steps"].metrics.write_text("step,loss\n0,1\n")
    (kept["script"].path / "train.sbatch").write_text("")
    kept["timings"].timings(0).write_text("step\n")
    kept["living"] = begun(tmp_path / "living", living)
    kept["elsewhere"] = begun(tmp_path / "elsewhere", {"system": "elsewhere"})
    (tmp_path / "queued" / "timings").mkdir(parents=True)
    before = {path: path.stat().st_ino for run in kept.values() for path in run.path.rglob("*")}
    remove_stale_runs(mine)
    assert not any(run.path.exists() for run in [*gone, stale])
    assert {path: path.stat().st_ino for path in before} == before and (tmp_path / "queued" / "timings").is_dir()


def test_without_proc_nobody_knows_what_is_in_use_and_all_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(path: str) -> str:
        raise FileNotFoundError(path)

    segment = tmp_path / "vader_segment.1"
    segment.write_text("")
    monkeypatch.setattr(os, "readlink", nothing)
    assert remove_stale_segments(tmp_path, young_s=-1) == [] and segment.exists()
