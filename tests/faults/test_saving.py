"""Checkpoints: kills at each stage of a save, failing disks, damaged files, two jobs in one run directory."""

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from time import monotonic

import h5py
import pytest
import torch

from hpc_train.core.records import read_metrics
from hpc_train.core.rundir import RunDir
from hpc_train.train.run.checkpoint.reading import read
from hpc_train.train.run.checkpoint.writing import write
from tests import checkpoints
from tests.conftest import FaultTable
from tests.faults.conftest import Reference
from tests.faults.harness import STEPS, Job, assert_continuous, until

# Calls that one save makes besides making the file, in order: sync tensors, sync the sealed file, sync metrics and step
# records, rename, sync folder, then the third save removes the oldest one. Counted over the saves of steps 5, 10 and
# 15, in threads. There a save writes 6 times: four tensors, table, header.
STAGES = {
    "making the file of the second": "os.ftruncate:2",
    "its tensors half written": "os.pwrite:9",
    "its tensors not synced": "os.fsync:6",
    "before its header is written": "os.pwrite:12",
    "sealed, not synced": "os.fsync:7",
    "records not synced": "os.fsync:8",
    "before the rename": "os.rename:2",
    "after the rename": "os.rename:2:after",
    "before the oldest is removed": "os.unlink:1",
    "oldest removed": "os.unlink:1:after",
}


_ALWAYS = {"before the rename", "oldest removed"}


@pytest.mark.parametrize(
    "stage", [pytest.param(name, marks=[] if name in _ALWAYS else pytest.mark.thorough) for name in STAGES]
)
def test_killed_at_a_stage_of_a_save(
    stage: str, tmp_path: Path, digits: Path, reference: Reference, survived: FaultTable
) -> None:
    job = Job(0, tmp_path, digits, KILL_AT=STAGES[stage], TRACE_DELAY="0.05")
    ended = job.end()
    assert ended.code == -signal.SIGKILL, ended
    reached = job.num_traced()
    again = Job(0, tmp_path, digits, "--resume", "auto")
    done = again.end()
    assert done.code == 0, done
    assert "took over from" in done.out, "the lock of the dead"
    assert "checkpoint skipped" not in done.out, "whatever has a final name is complete"
    assert_continuous(again, reference(0))
    hidden = [path.name for path in again.run.checkpoints_dir.iterdir() if path.name.startswith(".")]
    assert not hidden and len(list(again.run.checkpoints_dir.iterdir())) == 2
    lost = reached - again.meta()["attempts"][-1]["first_step"]
    assert 0 <= lost <= 8
    survived(f"killed in a save: {stage}", "the newest whole one is used", again.seconds_to_first_step(), lost)


@pytest.mark.thorough
def test_killed_in_a_save_on_two_ranks(
    tmp_path: Path, digits: Path, reference: Reference, survived: FaultTable
) -> None:
    job = Job(2, tmp_path, digits, KILL_AT="os.rename:2", TRACE_DELAY="0.05")
    assert job.end().code not in (0, 75)
    reached = job.num_traced()
    again = Job(2, tmp_path, digits, "--resume", "auto")
    assert again.end().code == 0
    assert_continuous(again, reference(2))
    lost = reached - again.meta()["attempts"][-1]["first_step"]
    survived("root of 2 ranks killed in a save", "the newest whole one is used", again.seconds_to_first_step(), lost)


SHARDED = ("--set", "reduce.strategy=sharded", "--set", "reduce.stage=3", "--set", "train.optimizer=adamw")


@pytest.mark.thorough
@pytest.mark.parametrize("victim", range(4))
@pytest.mark.parametrize("stage", ["os.pwrite", "os.fsync", "os.fsync:after"])
def test_any_of_four_ranks_killed_in_a_save(
    victim: int, stage: str, tmp_path: Path, digits: Path, survived: FaultTable
) -> None:
    """Each writes its own ranges of the file. Killed in the second save, the first one is used."""
    name, _, when = stage.partition(":")
    whole = Job(4, tmp_path / "whole", digits, *SHARDED)
    assert whole.end().code == 0
    job = Job(
        4,
        tmp_path / "killed",
        digits,
        *SHARDED,
        KILL_AT=":".join([name, "1", *filter(None, [when])]),
        KILL_RANK=str(victim),
        KILL_IN_SAVE="2",
        TRACE_DELAY="0.05",
    )
    assert job.end().code not in (0, 75)
    assert [each.name for each in job.run.checkpoints_dir.glob("step-*")] == ["step-00000005.h5"]
    again = Job(4, tmp_path / "killed", digits, *SHARDED, "--resume", "auto")
    assert again.end().code == 0
    assert_ends_as(again.run, whole)
    survived(f"rank {victim} of 4 killed in a save at {stage}", "the newest whole one is used", None, None)


def test_a_rank_that_cannot_write_its_share_is_named(tmp_path: Path, digits: Path) -> None:
    """Training goes on, and the checkpoint before is the newest."""
    full = Job(2, tmp_path, digits, *SHARDED, FULL_DISK="1:2", TRACE_DELAY="0.02")
    ended = full.end()
    assert ended.code == 0, ended
    named = rf"No space left on device; .* \(rank 1 on {re.escape(socket.gethostname())}\)"
    assert re.search(rf"warning: the checkpoint of step 10 could not be written to .*: {named}", ended.out), ended.out
    assert not list(full.run.checkpoints_dir.glob(".*")), "what the others wrote is removed"
    assert full.run.checkpoint(STEPS).exists() and full.newest() == STEPS


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_fails_alone_does_not_wait_for_a_save(
    victim: int, tmp_path: Path, digits: Path, survived: FaultTable
) -> None:
    """The job ends at once with the rank's message, and the unfinished save cannot pass for a checkpoint."""
    job = Job(2, tmp_path, digits, SLOW_SAVE="30", ACCIDENT=f"exit:8:{victim}", TRACE_DELAY="0.05")
    job.wait_for_step(8)
    failed_s = monotonic()
    ended = job.end()
    took_s = monotonic() - failed_s
    assert ended.code not in (0, 75) and took_s < 9, (ended, took_s)
    assert f"rank {victim} on {socket.gethostname()}: ended with exit code 0" in ended.err, ended.err
    assert not list(job.run.checkpoints_dir.glob("step-*"))
    survived(f"rank {victim} of 2 fails during a save", "ends at once, the checkpoint before is used", took_s, None)


def test_ranks_that_stop_together_finish_a_save_under_way(tmp_path: Path, digits: Path) -> None:
    job = Job(2, tmp_path, digits, SLOW_SAVE="1.5", TRACE_DELAY="0.1").wait_for_step(6)
    os.kill(job.pid(1), signal.SIGTERM)
    ended = job.end()
    assert ended.code == 75 and job.run.checkpoint(5).exists() and job.newest() > 5, ended


def assert_ends_as(run: RunDir, reference: Job) -> None:
    """Asserts steps, losses and weights of the undisturbed run."""
    assert read_metrics(run.metrics) == read_metrics(reference.run.metrics)
    ours = checkpoints.weights(run.checkpoint(STEPS))
    assert all(torch.equal(ours[name], theirs) for name, theirs in reference.weights().items())


Damage = Callable[[Path], object]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def alter_facts(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["loader"].attrs.modify("global_batch", 401)


def alter_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"bytes"', b'"bytez"', 1))


def put_another_models(path: Path) -> None:
    """Replaces it by an intact checkpoint of another model."""
    _, facts = read(path)
    state = {"model": {"other": torch.zeros(3)}, "optimizer": {}, "loss_scale": [1.0, 0], "task": {}}
    write(path, state, facts)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a bit flipped": (flip_a_bit, "model/1.weight is damaged in bytes 0 to"),
    "truncated": (lambda path: os.truncate(path, 5000), "it has 5000 of"),
    "emptied": (lambda path: path.write_bytes(b""), "does not begin as a checkpoint"),
    "header damaged": (alter_header, "its header is damaged"),
    "facts altered": (alter_facts, "its names and facts are damaged: their checksum differs"),
    "of another model": (put_another_models, "of another model"),
}


# tests/train/run/test_checkpoint.py damages checkpoints in more ways, without a job.
@pytest.mark.parametrize(
    "names", [("a bit flipped", "of another model"), pytest.param(tuple(DAMAGES), marks=pytest.mark.thorough)]
)
def test_damaged_checkpoints_are_refused_with_the_reason_and_the_newest_good_one_is_used(
    names: tuple[str, ...], tmp_path: Path, digits: Path, reference: Reference, survived: FaultTable
) -> None:
    job = Job(0, tmp_path, digits, TRACE_DELAY="0.05").wait_for_step(13)
    assert job.signal(signal.SIGUSR2).end().code == 75
    newest = job.newest()
    for name in names:
        damage, reason = DAMAGES[name]
        copy = tmp_path / name.replace(" ", "-")
        shutil.copytree(job.run.path, copy)
        damage(RunDir(copy).checkpoint(newest))
        ended = Job(0, copy / "jobs", digits, "--resume", str(copy)).end()
        assert ended.code == 0, ended
        assert f"checkpoint skipped: {copy}" in ended.out and reason in ended.out
        assert "Continuing at step 10" in ended.out
        assert_ends_as(RunDir(copy), reference(0))
        survived(f"newest checkpoint {name}", "refused with the reason, the one before it is used", None, newest - 10)
    for path in job.run.checkpoints_dir.iterdir():
        flip_a_bit(path)
    refused = Job(0, tmp_path, digits, "--resume", "auto").end()
    assert refused.code == 2 and "no checkpoint of" in refused.err and refused.err.count("checksum differs") == 2
    assert refused.out.count("checksum differs") == 1  # of the newest: the older one was tried then


def test_the_second_job_in_a_run_directory_is_refused_and_told_of_the_first(
    tmp_path: Path, digits: Path, reference: Reference, survived: FaultTable
) -> None:
    first = Job(0, tmp_path, digits, TRACE_DELAY="3").wait_for_step(
        2
    )  # the second must start within this, even on a busy machine
    second = Job(0, tmp_path / "second", digits, "--resume", str(first.run.path)).end()
    pid = first.pid(0)
    assert second.code == 2 and f"is in use by process {pid} on" in second.err, second
    assert first.process.poll() is None
    first.process.kill()
    first.process.communicate()
    assert first.run.lock.exists()
    third = Job(0, tmp_path, digits, "--resume", "auto").end()
    assert third.code == 0 and f"took over from process {pid}" in third.out, third
    assert_ends_as(first.run, reference(0))
    survived("second job in a run directory", "refused, the first is named; a dead job's lock is taken over")


@pytest.mark.parametrize("ranks", [2, pytest.param(0, marks=pytest.mark.thorough)])
def test_a_job_that_was_stopped_so_long_that_another_took_over_writes_nothing_more_and_says_so(
    ranks: int, tmp_path: Path, digits: Path, reference: Reference, survived: FaultTable
) -> None:
    """Each job believes the other to be on another machine, whose processes it cannot see."""
    first = Job(ranks, tmp_path, digits, TRACE_DELAY="0.1", ELSEWHERE="n1").wait_for_step(8)
    root = first.pid(0)
    os.kill(root, signal.SIGSTOP)
    second = Job(ranks, tmp_path / "second", digits, "--resume", str(first.run.path), ELSEWHERE="n2").end()
    assert second.code == 0 and "looking for 20 s" in second.out and "took over from" in second.out, second
    left = {path: path.read_bytes() for path in first.run.path.rglob("*") if path.is_file()}
    os.kill(root, signal.SIGCONT)
    ended = first.end()
    assert ended.code == 2 and f"this job has lost its lock on {first.run.path}" in ended.err, ended
    assert "Traceback" not in ended.err
    assert {path: path.read_bytes() for path in first.run.path.rglob("*") if path.is_file()} == left
    assert_ends_as(first.run, reference(ranks))
    survived("stopped until another took over", "writes nothing more, exit code 2; the other's run is whole")


def test_records_are_cut_back_to_the_checkpoint_that_a_run_goes_on_from(
    tmp_path: Path, digits: Path, reference: Reference
) -> None:
    """Steps 10 to 12 came after the newest checkpoint: what a crash leaves of them does not matter."""
    job = Job(0, tmp_path, digits, "--set", "train.log_every=1", TRACE_DELAY="0.1").wait_for_step(14)
    job.process.kill()
    job.process.communicate()
    job.run.checkpoint(15).unlink(missing_ok=True)
    metrics = job.run.metrics
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_bytes("".join(lines[:12] + lines[5:7]).encode() + b"\0" * 30)  # steps 0 to 10; 4 and 5 twice; zeros
    again = Job(0, tmp_path, digits, "--resume", "auto")
    ended = again.end()
    assert ended.code == 0 and "Continuing at step 10" in ended.out and "warning" not in ended.out, ended
    assert_continuous(again, reference(0))


def test_losses_that_a_damaged_disk_lost_are_said(tmp_path: Path, digits: Path) -> None:
    job = Job(0, tmp_path, digits, TRACE_DELAY="0.1").wait_for_step(13)
    assert job.signal(signal.SIGUSR2).end().code == 75
    first = job.newest()
    lines = job.run.metrics.read_text().splitlines(keepends=True)
    job.run.metrics.write_text("".join(lines[:4]) + lines[4][:-3])  # steps 0 to 2, and the number of step 3 cut short
    again = Job(0, tmp_path, digits, "--resume", "auto")
    ended = again.end()
    assert ended.code == 0, ended
    assert f"the losses of {first - 3} steps from 3 to {first - 1} are lost" in ended.out
    assert list(again.losses()) == [0, 1, 2, *range(first, STEPS)]


# ------------------------------------------------------------------------------------------------ disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A new file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, timeout=20)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True, timeout=20)


@contextmanager
def fill(disk: Path) -> Iterator[None]:
    with (disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    yield
    (disk / "ballast").unlink()


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    for how in ("ro", "rw"):
        until(lambda how=how: not subprocess.run(["mount", "-o", f"remount,{how}", disk], timeout=20).returncode)
        if how == "ro":
            yield


def test_a_disk_without_room_leaves_the_old_checkpoint_valid(
    small_disk: Path, tmp_path: Path, digits: Path, reference: Reference, survived: FaultTable
) -> None:
    """It holds the whole run directory: the job cannot continue, and reports the room that it needs."""
    job = Job(0, tmp_path, digits, runs=small_disk, TRACE_DELAY="0.1").wait_for_step(7).wait_for_checkpoint(5)
    with fill(small_disk):
        ended = job.end()
    assert ended.code == 2 and "could not be written" in ended.err and "No space left on device" in ended.err, ended
    assert re.search(r"; [\d.]+ [kM]?B are needed, [\d.]+ [kM]?B are free", ended.err), ended.err
    assert job.newest() == 5
    reached = job.num_traced()
    again = Job(0, tmp_path, digits, "--resume", "auto", runs=small_disk)
    done = again.end()
    assert done.code == 0, done
    assert_continuous(again, reference(0))
    what = "exit code 2, says what could not be written; the old checkpoint is used"
    survived("disk full", what, again.seconds_to_first_step(), reached - 5)


@pytest.mark.parametrize(
    ("trouble", "says"),
    [pytest.param(read_only, "Read-only file system", marks=pytest.mark.thorough), (fill, "No space left on device")],
)
def test_a_disk_that_refuses_a_job_from_its_beginning(
    trouble: Callable[[Path], AbstractContextManager[None]],
    says: str,
    small_disk: Path,
    tmp_path: Path,
    digits: Path,
    reference: Reference,
) -> None:
    """The job fails with one message, whichever file comes first, and the previous run loses nothing."""
    first = Job(0, tmp_path, digits, runs=small_disk, TRACE_DELAY="0.1").wait_for_step(7)
    assert first.signal(signal.SIGUSR2).end().code == 75
    run = first.run
    for words in (("--resume", "auto"), ("--resume", "never")):
        with trouble(small_disk):
            refused = Job(0, tmp_path / "refused", digits, *words, runs=small_disk).end()
        assert refused.code == 2 and says in refused.err and "Traceback" not in refused.err, refused
    again = Job(0, tmp_path, digits, "--resume", str(run.path), runs=small_disk).end()
    assert again.code == 0, again
    assert_ends_as(run, reference(0))


@pytest.mark.parametrize(
    ("trouble", "says"),
    [(read_only, "Read-only file system"), pytest.param(fill, "No space left on device", marks=pytest.mark.thorough)],
)
def test_a_save_that_a_disk_refuses_is_told_and_the_training_goes_on(
    trouble: Callable[[Path], AbstractContextManager[None]],
    says: str,
    small_disk: Path,
    tmp_path: Path,
    digits: Path,
    reference: Reference,
    survived: FaultTable,
) -> None:
    """It holds only the checkpoints. A failed last save is an error."""
    first = Job(0, tmp_path, digits, TRACE_DELAY="0.1").wait_for_step(2)
    assert first.signal(signal.SIGUSR2).end().code == 75
    shutil.copytree(first.run.checkpoints_dir, small_disk, dirs_exist_ok=True)
    shutil.rmtree(first.run.checkpoints_dir)
    first.run.checkpoints_dir.symlink_to(small_disk)
    job = Job(0, tmp_path, digits, "--resume", "auto", TRACE_DELAY="0.2").wait_for_step(1)
    valid = job.newest()
    with trouble(small_disk):
        ended = job.end()
        assert job.newest() == valid
    assert ended.code == 2, ended
    assert "warning: the checkpoint of step 5 could not be written" in ended.out and says in ended.out
    assert "B are needed" in ended.out and f"The newest checkpoint is still step-{valid:08d}" in ended.out
    assert "the checkpoint of step 24 could not be written" in ended.err and len(job.losses()) == 24
    again = Job(0, tmp_path, digits, "--resume", "auto")
    assert again.end().code == 0
    assert_continuous(again, reference(0))
    what = "warned at each save, the run continues; exit code 2 at its end"
    survived(f"{says.lower()}, checkpoints only", what, again.seconds_to_first_step(), STEPS - valid)


def test_over_quota_the_training_goes_on_and_the_old_checkpoint_stays(
    tmp_path: Path, digits: Path, reference: Reference, survived: FaultTable
) -> None:
    """A limit on file sizes acts as a quota: it refuses checkpoints and lets logs grow."""
    job = Job(0, tmp_path, digits, TRACE_DELAY="0.1").wait_for_step(7).wait_for_checkpoint(5)
    resource.prlimit(job.pid(0), resource.RLIMIT_FSIZE, (100_000, 100_000))
    ended = job.end()
    assert ended.code == 2, ended
    assert "warning: the checkpoint of step 10 could not be written" in ended.out and "File too large" in ended.out
    assert "the checkpoint of step 24 could not be written" in ended.err, "the last one is no warning"
    assert job.newest() == 5 and len(job.losses()) == 24
    assert "B are needed" in ended.out
    again = Job(0, tmp_path, digits, "--resume", "auto")
    done = again.end()
    assert done.code == 0 and "Continuing at step 5" in done.out, done
    assert_continuous(again, reference(0))
    what = "warned at each save, the run continues; exit code 2 at its end"
    survived("file size limit (as over quota)", what, again.seconds_to_first_step(), 19)
