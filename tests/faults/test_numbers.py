"""Wrong numbers: losses and gradients that are not finite, weights that differ between ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import FaultTable
from tests.faults.conftest import Reference
from tests.faults.harness import STEPS, Job, assert_continuous


@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=pytest.mark.thorough)])
def test_nan_on_one_rank_stops_all_with_the_weights_before_it(
    value: str, tmp_path: Path, digits: Path, reference: Reference, survived: FaultTable
) -> None:
    job = Job(3, tmp_path, digits, ACCIDENT=f"{value}:7:1")
    ended = job.end()
    assert ended.code == 2, ended
    assert f"the loss of step 7 is {value} on rank 1" in ended.err and ended.err.count("the loss of step") == 1
    assert job.newest() == 7 and all(torch.isfinite(each).all() for each in job.weights(7).values())
    again = Job(3, tmp_path, digits, "--resume", "auto")
    assert again.end().code == 0
    assert_continuous(again, reference(3))
    name = {"nan": "NaN", "inf": "infinite"}[value]
    survived(
        f"{name} loss on rank 1 of 3", "all stop, rank named, weights before it saved", again.seconds_to_first_step(), 0
    )


@pytest.mark.thorough
def test_weights_that_are_none_are_not_saved_and_the_loss_is_told(tmp_path: Path, digits: Path) -> None:
    """As after a step that diverged: the loss identifies the rank, and the last good checkpoint stays."""
    job = Job(2, tmp_path, digits, ACCIDENT="nan-weights:7:0")
    ended = job.end()
    assert ended.code == 2 and "the loss of step 7 is nan on rank 0" in ended.err, ended
    assert "holds NaN or infinity. The newest checkpoint is still step-00000005" in ended.err
    assert job.newest() == 5


def test_nan_is_skipped_by_all_ranks_alike_if_the_job_says_so(
    tmp_path: Path, digits: Path, survived: FaultTable
) -> None:
    words = ("--set", "train.on_nonfinite=skip", "--set", "train.check_weights_every=1")
    job = Job(2, tmp_path, digits, *words, ACCIDENT="nan:7:1")
    ended = job.end()
    assert ended.code == 0, ended
    assert "Step 7: the loss is nan, its update is skipped" in ended.out
    wrong = [step for step, loss in job.losses().items() if not np.isfinite(loss)]
    assert wrong == [7] and list(job.losses()) == list(range(STEPS))
    assert all(torch.isfinite(each).all() for each in job.weights().values())
    assert json.loads(job.run.summary.read_text())["complete"]
    survived("NaN loss, train.on_nonfinite = skip", "update skipped on all ranks, run continues", 0, 0)


def test_a_rank_whose_weights_part_is_named(tmp_path: Path, digits: Path, survived: FaultTable) -> None:
    job = Job(3, tmp_path, digits, "--set", "train.check_weights_every=4", ACCIDENT="weights:5:2")
    ended = job.end()
    assert ended.code == 2, ended
    assert "the weights after 8 steps differ between ranks: rank 2 on" in ended.err
    assert job.newest() == 5, "nothing is saved after they parted"
    survived("weights of rank 2 of 3 altered", "named at the next comparison (train.check_weights_every)", None, 3)


def test_a_gradient_that_is_infinite_stops_all_with_the_weights_before_it(
    tmp_path: Path, digits: Path, reference: Reference, survived: FaultTable
) -> None:
    job = Job(3, tmp_path, digits, ACCIDENT="inf-gradient:7:1")
    ended = job.end()
    assert ended.code == 2, ended
    assert ended.err.count("step 7: a gradient is not finite (the loss is") == 1
    assert job.newest() == 7 and all(torch.isfinite(each).all() for each in job.weights(7).values())
    again = Job(3, tmp_path, digits, "--resume", "auto")
    assert again.end().code == 0
    assert_continuous(again, reference(3))
    survived("infinite gradient, finite loss", "all stop, weights before it saved", again.seconds_to_first_step(), 0)


@pytest.mark.parametrize("kind", ["inf-gradient", pytest.param("nan", marks=pytest.mark.thorough)])
def test_a_run_whose_updates_are_all_left_out_is_no_success(kind: str, tmp_path: Path, digits: Path) -> None:
    """A short run fails at its end, a long one after 32 skipped updates in a row. A resumed run continues the count."""
    words = ("--set", "train.on_nonfinite=skip", "--set", "train.lr=0.1")
    short = Job(2, tmp_path / "short", digits, *words, ACCIDENT=f"{kind}:always:1")
    ended = short.end()
    assert ended.code == 2, ended
    assert f"none of the run's {STEPS} updates was made" in ended.err and not short.run.summary.exists()
    again = Job(2, tmp_path / "short", digits, *words, "--resume", "auto", ACCIDENT=f"{kind}:always:1").end()
    assert again.code == 2 and f"none of the run's {STEPS} updates was made" in again.err, again
    long = Job(2, tmp_path / "long", digits, *words, "--set", "train.steps=60", ACCIDENT=f"{kind}:always:1").end()
    assert long.code == 2 and "32 updates in a row were skipped; in the last, at step 31" in long.err, long


def test_a_test_that_is_nan_is_no_success(tmp_path: Path, digits: Path) -> None:
    job = Job(2, tmp_path, digits, ACCIDENT="nan-test")
    ended = job.end()
    assert ended.code == 2 and "the test loss is nan" in ended.err and "Saved: " in ended.err, ended
    summary = json.loads(job.run.summary.read_text())
    assert (summary["complete"], summary["fault"], summary["test"]["loss"]) == (False, "the test loss is nan", None)
    again = Job(2, tmp_path, digits, "--resume", str(job.run.path), ACCIDENT="nan-test")
    assert again.end().code == 2, "it is not complete"
    mended = Job(2, tmp_path, digits, "--resume", str(job.run.path))
    assert mended.end().code == 0
    summary = json.loads(job.run.summary.read_text())
    assert (summary["complete"], summary["fault"]) == (True, None) and summary["test"]["loss"] < 10


def test_a_worker_of_an_asynchronous_server_whose_updates_are_all_left_out_ends_with_the_others(
    tmp_path: Path, digits: Path
) -> None:
    """Only that worker knows of them, and the end of a run is collective."""
    words = ("train.on_nonfinite=skip", "reduce.strategy=parameter_server", "reduce.asynchronous=true")
    job = Job(
        3, tmp_path, digits, *(part for word in words for part in ("--set", word)), ACCIDENT="inf-gradient:always:1"
    )
    ended = job.end()
    assert ended.code == 0, ended
    assert job.run.summary.exists() and all(torch.isfinite(each).all() for each in job.weights().values())
