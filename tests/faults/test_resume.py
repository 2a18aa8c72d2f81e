"""A run stopped at any step and resumed ends like an undisturbed one: bit for bit, or to 1e-5 on other ranks."""

import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from hpc_train.core import sampling
from hpc_train.train.run.checkpoint.retention import checkpoints
from tests import jobs
from tests.checkpoints import as_format_2
from tests.conftest import FaultTable
from tests.faults.conftest import Reference
from tests.faults.harness import BATCH, SAMPLES, SEED, STEPS, Job, assert_continuous


@pytest.mark.parametrize(
    ("ranks", "strategy", "stops"),
    [
        (3, "horovod", (2, 3)),
        pytest.param(4, "mpi", (6,), marks=pytest.mark.thorough),
        pytest.param(0, "local", (2, 1, 3), marks=pytest.mark.thorough),
        pytest.param(2, "horovod", (2, 1, 3), marks=pytest.mark.thorough),
    ],
)
def test_a_run_stopped_within_an_epoch_ends_as_if_it_had_not_been(
    ranks: int,
    strategy: str,
    stops: tuple[int, ...],
    tmp_path: Path,
    digits: Path,
    reference: Reference,
    survived: FaultTable,
) -> None:
    # These optimizers have state, which every rank must restore.
    optimizer = ("train.optimizer=adamw", "train.lr=0.01") if ranks in (0, 3) else ("train.momentum=0.9",)
    words = tuple(word for key in (f"reduce.strategy={strategy}", *optimizer) for word in ("--set", key))
    noisy = {"TRACE_DROPOUT": "0.3"}
    whole = reference(ranks, *words, **noisy)
    for number in stops:  # all of them within the first epoch of ten steps
        job = Job(ranks, tmp_path, digits, *words, "--resume", "auto", TRACE_DELAY="0.1", **noisy)
        stopped = job.wait_for_step(number).signal(signal.SIGUSR2).end()
        assert stopped.code == 75, stopped
        assert "Stopped by" in stopped.out and job.run.checkpoint(job.newest()).is_file()
        command = next(line for line in stopped.out.splitlines() if line.startswith("Resume: ")).split()
        launch = ["mpirun", "-n", str(ranks), "hpc-train"] if ranks else ["hpc-train"]
        assert command[1 : len(launch) + 2] == [*launch, "train"] and command[-2:] == ["--resume", "auto"]
        assert command.count("--resume") == 1
    assert job.newest() < 10
    done = Job(ranks, tmp_path, digits, *words, "--resume", "auto", **noisy)
    ended = done.end()
    assert ended.code == 0 and "Continuing at step" in ended.out
    assert_continuous(done, whole)

    attempts = done.meta()["attempts"]
    assert len(attempts) == len(stops) + 1
    assert all(each["outcome"].startswith("stopped by") for each in attempts[:-1])
    assert all(after["first_step"] == before["last_step"] + 1 for before, after in itertools.pairwise(attempts))
    assert attempts[-1]["outcome"] == "complete" and attempts[-1]["last_step"] == STEPS - 1
    summary = json.loads(done.run.summary.read_text())
    assert (summary["num_steps"], summary["num_attempts"], summary["num_repeated"]) == (STEPS, len(attempts), 0)
    assert summary["num_samples"] == 2 * SAMPLES + 4 * BATCH
    assert summary["num_warmup"] > json.loads(whole.run.summary.read_text())["num_warmup"], "of each attempt"
    report = jobs.run(0, "report", done.run.path, "--json", cwd=tmp_path)
    assert report.code == 0, report.err
    times = {1: "once", 2: "twice", 3: "three times"}[len(stops)]
    what = f"SIGUSR2 {times} within an epoch, {ranks or 1} rank{'s' * (ranks > 1)} ({strategy})"
    survived(what, "checkpoint, exit code 75; resumed: equal to the bit", done.seconds_to_first_step(), 0)


def test_a_run_of_an_earlier_version_ends_as_if_that_had_gone_on(
    tmp_path: Path, digits: Path, reference: Reference
) -> None:
    """Its checkpoints are folders of format 2; the next ones are files beside them."""
    words = ("--set", "reduce.strategy=local", "--set", "train.optimizer=adamw", "--set", "train.lr=0.01")
    noisy = {"TRACE_DROPOUT": "0.3"}
    whole = reference(0, *words, **noisy)
    job = Job(0, tmp_path, digits, *words, TRACE_DELAY="0.1", **noisy)
    assert job.wait_for_step(7).signal(signal.SIGUSR2).end().code == 75
    for path in checkpoints(job.run):
        as_format_2(path)
    assert not list(job.run.checkpoints_dir.glob("*.h5"))
    done = Job(0, tmp_path, digits, *words, "--resume", "auto", **noisy)
    ended = done.end()
    assert ended.code == 0 and "Continuing at step" in ended.out and "warning" not in ended.out, ended
    assert_continuous(done, whole)
    assert [path.name for path in checkpoints(done.run)] == ["step-00000024.h5", "step-00000020.h5"]


def test_on_other_numbers_of_ranks_every_sample_is_seen_once_and_losses_agree(
    tmp_path: Path, digits: Path, reference: Reference, survived: FaultTable
) -> None:
    whole = reference(0)
    job = Job(2, tmp_path, digits, TRACE_DELAY="0.1")
    assert job.wait_for_step(4).signal(signal.SIGUSR2).end().code == 75
    parts = [(job, job.run, 0, job.newest())]
    for ranks in (3, 1):
        _, before, _, first = parts[-1]
        job = Job(ranks, tmp_path / f"on-{ranks}", digits, "--resume", str(before.path), TRACE_DELAY="0.1")
        if ranks == 3:
            assert job.wait_for_step(2).signal(signal.SIGUSR2).end().code == 75
        else:
            ended = job.end()
            assert ended.code == 0, ended
        parts.append((job, job.run, first, job.newest()))
        assert job.meta()["attempts"][0]["continues"] == str(before.path.resolve())
    losses = {step: loss for part in parts for step, loss in part[0].losses().items()}
    assert list(losses) == list(range(STEPS))
    assert np.allclose(list(losses.values()), list(whole.losses().values()), rtol=1e-5)
    seen = [
        int(row)
        for part, _, first, last in parts
        for rank in range(part.ranks)
        for line in part.rows(rank)[0][: last - first]
        for row in line.split(",")
        if row
    ]
    expected = [
        sampling.shuffled(np.arange(min(SAMPLES, STEPS * BATCH - epoch * SAMPLES)), SAMPLES, SEED, epoch)
        for epoch in range(3)
    ]
    assert sorted(seen) == sorted(np.concatenate(expected).tolist())
    recovery_s = job.seconds_to_first_step()
    survived("resumed on other numbers of ranks: 2, 3, 1", "each sample seen once; losses agree to 1e-5", recovery_s, 0)


def test_what_cannot_be_continued_is_said_and_a_complete_run_is_left_alone(
    tmp_path: Path, digits: Path, reference: Reference
) -> None:
    whole = reference(0)
    run = str(whole.run.path)
    before = whole.run.meta.read_text()
    same = Job(0, tmp_path, digits, "--resume", run).end()
    assert same.code == 0 and "is complete: 24 steps" in same.out
    assert whole.run.meta.read_text() == before and not whole.run.lock.exists()
    for words, named in [
        (["--set", "seed=7"], "seed = 7"),
        (["--set", "train.global_batch=200"], "global_batch is 200 here, and was 400"),
        (["--set", "train.optimizer=adamw"], "train.optimizer"),
    ]:
        refused = Job(0, tmp_path, digits, "--resume", run, *words).end()
        assert refused.code == 2 and named in refused.err, refused
    nowhere = Job(0, tmp_path, digits, "--resume", str(tmp_path)).end()
    assert nowhere.code == 2 and "holds no run directory" in nowhere.err


def test_checkpoints_come_by_time_on_the_roots_word(tmp_path: Path, digits: Path, reference: Reference) -> None:
    words = ("--set", "checkpoint.every_steps=0", "--set", "checkpoint.every_minutes=0.01")
    job = Job(2, tmp_path, digits, *words, TRACE_DELAY="0.1").wait_for_step(16)
    os.kill(job.pid(1), signal.SIGKILL)
    assert job.end().code not in (0, 75)
    assert 0 < job.newest() < 16
    again = Job(2, tmp_path, digits, *words, "--resume", "auto")
    assert again.end().code == 0
    assert_continuous(again, reference(2))


def test_a_run_is_prolonged_and_its_learning_rate_changed(tmp_path: Path, digits: Path) -> None:
    first = Job(0, tmp_path, digits, "--set", "train.steps=6")
    assert first.end().code == 0
    more = Job(0, tmp_path, digits, "--set", "train.steps=9", "--set", "train.lr=1e-9", "--resume", str(first.run.path))
    assert more.end().code == 0
    six, nine = more.weights(6), more.weights(9)
    assert all(np.allclose(six[name], nine[name], atol=1e-6) for name in six), "with next to no learning rate"
    assert list(more.losses()) == list(range(9))
    longer = ("--set", "train.steps=1000", "--set", "train.lr=1e-9")
    stopped = Job(0, tmp_path, digits, *longer, "--resume", str(first.run.path), TRACE_DELAY="0.1").wait_for_step(2)
    assert stopped.signal(signal.SIGUSR2).end().code == 75
    assert not first.run.summary.exists(), "it is unfinished, and its summary would say otherwise"


def test_a_changed_job_never_goes_on_or_begins_without_a_word(tmp_path: Path, digits: Path) -> None:
    cosine = ("--set", "train.schedule=cosine")
    whole = Job(0, tmp_path, digits, *cosine)
    assert whole.end().code == 0
    run, meta = whole.run.path, whole.run.meta.read_text()
    for words, named in [
        (("--set", "train.steps=30", *cosine), "train.steps = 30 here, 24 in the run"),
        (("--set", "train.lr=0.2", *cosine), "train.lr = 0.2 here, 0.1 in the run would change nothing"),
        (("--set", "train.steps=9", "--set", "train.schedule=constant"), "has taken 24 steps already"),
    ]:
        refused = Job(0, tmp_path, digits, *words, "--resume", str(run)).end()
        assert refused.code == 2 and named in refused.err and "--resume never" in refused.err, refused
        assert whole.run.path == run and run.joinpath("meta.json").read_text() == meta, "nothing is touched"
    more = ("--set", "train.steps=27", "--set", "train.schedule=constant", "--set", "train.lr=0.01")
    prolonged = Job(0, tmp_path, digits, *more, "--resume", str(run))
    ended = prolonged.end()
    assert ended.code == 0 and "train.schedule = 'constant' here, 'cosine' in the run: updates" in ended.out
    assert prolonged.meta()["attempts"][-1]["changed"]["train.steps"] == [24, 27]
    assert list(prolonged.losses()) == list(range(27))

    auto = Job(0, tmp_path, digits, "--set", "train.steps=2", "--resume", "auto")
    ended = auto.end()
    assert ended.code == 0 and f"{run} is not continued: it is complete, and train.lr = 0.1 here, 0.01" in ended.out
    # --resume RUN would refuse this: the run has taken 27 steps, and train.steps is 2.
    assert "It continues only with its own values\nA new run begins\n" in ended.out and auto.run.path != run


def test_what_no_step_depends_on_may_change_when_a_run_goes_on(
    tmp_path: Path, digits: Path, reference: Reference
) -> None:
    job = Job(0, tmp_path, digits, TRACE_DELAY="0.1").wait_for_step(3)
    assert job.signal(signal.SIGUSR2).end().code == 75
    free = ("--set", "train.on_nonfinite=skip", "--set", "train.log_every=1", "--set", "energy.pue=1.2")
    again = Job(0, tmp_path, digits, *free, "--resume", "auto")
    ended = again.end()
    assert ended.code == 0 and "Continuing at step" in ended.out and " there:" not in ended.out
    assert_continuous(again, reference(0))
