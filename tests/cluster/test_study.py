"""Scaling studies with real mpirun: every size as often as asked, a failing one on its own, and again only the rest."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from time import monotonic, sleep

import pytest

from hpc_train.cluster import launch, study
from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from tests import jobs

CONFIG = jobs.CONFIGS / "softmax-mnist.toml"
SHORT = jobs.settings(train__steps=20, train__warmup_steps=2, train__global_batch=2, reduce__strategy="mpi")


def words(digits: Path, *more: object) -> list[str]:
    return ["scale", str(CONFIG), *SHORT, *jobs.settings(data__file=digits), *map(str, more)]


@pytest.fixture(scope="module")
def ended_study(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, jobs.Ended]:
    """Sizes 1, 2 and 4, where a global batch of 2 is too small for the last."""
    folder = tmp_path_factory.mktemp("study")
    return folder, jobs.run(0, *words(digits, "--ranks", "4,1,2"), cwd=folder)


def run_names(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("runs/scale-softmax-mnist/*-np*/summary.json"))


def test_a_failed_size_does_not_spoil_the_others(ended_study: tuple[Path, jobs.Ended]) -> None:
    folder, done = ended_study
    assert done.code == 1, done.err
    assert [name.rpartition("-")[2] for name in run_names(folder)] == ["np1", "np2"]
    assert "[3/3] 4 ranks, repeat 1" in done.out and "failed after" in done.out
    assert "train.global_batch = 2 is smaller than the 4 ranks" in done.out, "the reason, from the job's own words"
    assert "4 ranks: exit code 2, see runs/scale-softmax-mnist/" in done.err
    scaling = (folder / "runs/scale-softmax-mnist/report/scaling.csv").read_text()
    assert len(scaling.splitlines()) == 3, "a report of the two sizes"


def test_progress_tells_which_size_and_how_long(ended_study: tuple[Path, jobs.Ended]) -> None:
    out = ended_study[1].out
    assert "Study: runs/scale-softmax-mnist: 0 runs complete, 3 to do" in out
    assert "[1/3] 1 rank, repeat 1 (0:00 so far)" in out, "no estimate before anything was measured"
    assert "[2/3] 2 ranks, repeat 1 (" in out and " left)" in out
    assert ("4 ranks share" in out) == (launch.num_cores() < 4)


def test_again_runs_only_what_is_missing(ended_study: tuple[Path, jobs.Ended], digits: Path) -> None:
    folder, _ = ended_study
    before = run_names(folder)
    again = jobs.run(0, *words(digits, "--ranks", "1,2"), cwd=folder)
    assert again.code == 0, again.err
    assert "2 runs complete, 0 to do" in again.out and run_names(folder) == before
    more = jobs.run(0, *words(digits, "--ranks", "1", "--repeat", "2"), cwd=folder)
    assert more.code == 0, more.err
    assert "1 runs complete, 1 to do" in more.out
    (new,) = set(run_names(folder)) - set(before)
    assert new.endswith("-np1")
    other = jobs.run(0, *words(digits, "--ranks", "1", "--set", "train.lr=0.25"), cwd=folder)
    assert other.code == 0 and "0 runs complete, 1 to do" in other.out, "another job is another study"


def test_the_run_that_would_tell_most_is_made(digits: Path, tmp_path: Path) -> None:
    """Real runs on 1 and 2 ranks: --next runs what it names, unless it says that no run would tell more."""
    none = jobs.run(0, *words(digits, "--next"), cwd=tmp_path)
    assert none.code == 2 and "runs/scale-softmax-mnist does not exist" in none.err
    both = jobs.run(0, *words(digits, "--next", "--ranks", "1"), cwd=tmp_path)
    assert both.code == 2 and "--ranks or --next, one of them" in both.err
    assert jobs.run(0, *words(digits, "--ranks", "1,2"), cwd=tmp_path).code == 0
    before = run_names(tmp_path)
    done = jobs.run(0, *words(digits, "--next"), cwd=tmp_path)
    assert done.code == 0, done.err
    new = sorted(set(run_names(tmp_path)) - set(before))
    if "nothing to do" in done.out:
        assert not new
    else:
        (named,) = re.findall(r"The run that would tell most: (?:a repeat of )?20 steps on .*?(\d+) rank", done.out)
        assert [name.rpartition("-np")[2] for name in new] == [named]


def test_sizes_take_turns(tmp_path: Path) -> None:
    loaded = load(CONFIG, (f"run.root={tmp_path}",))
    todo = study.plan(loaded, [1, 2, 4], 2).todo
    assert todo == [(1, 0), (2, 0), (4, 0), (1, 1), (2, 1), (4, 1)]


def test_jobs_in_the_queue_are_not_submitted_twice(tmp_path: Path) -> None:
    loaded = load(CONFIG, (f"run.root={tmp_path}",))
    run = study.plan(loaded, [2], 1).run_directory(2)
    (run.path / "submitted.json").write_text(json.dumps({"job": "41"}))
    waiting = study.plan(loaded, [1, 2], 1, {"40": "", "41": ""})
    assert (waiting.todo, waiting.waiting, waiting.num_complete) == ([(1, 0)], ["41"], 0)
    ended = study.plan(loaded, [2], 1, {"40": ""})
    assert ended.todo == [(2, 0)] and ended.run_directory(2) == run, "what was left unfinished is continued"


def test_weak_scaling_keeps_the_batch_of_a_rank() -> None:
    assert study.weak_batch(load(CONFIG, ("train.global_batch=100",)).config, [2, 4]) == 50
    assert study.weak_batch(load(CONFIG, ("train.batch_per_rank=7",)).config, [2, 4]) == 7
    with pytest.raises(UserError, match=r"train\.global_batch = 100 cannot be divided evenly among 3 ranks"):
        study.weak_batch(load(CONFIG, ("train.global_batch=100",)).config, [3, 4])


def test_weak_scaling_is_asked_for_by_one_word(tmp_path: Path, digits: Path) -> None:
    done = jobs.run(0, *words(digits, "--ranks", "1", "--weak", "--set", "train.global_batch=6"), cwd=tmp_path)
    assert done.code == 0 and "Weak scaling: 6 samples per rank" in done.out, done.err
    (config,) = tmp_path.glob("runs/scale-softmax-mnist/*/config.toml")
    assert (load(config).config.train.batch_per_rank, load(config).config.train.global_batch) == (6, None)


def test_every_rank_gets_the_same_at_every_size() -> None:
    assert launch.on_this_machine(2, 2, 4)[4:] == ["--map-by", "slot:PE=2", "--bind-to", "core"]
    assert launch.on_this_machine(4, 2, 4)[4:] == ["--oversubscribe", "--bind-to", "none"]


@pytest.mark.parametrize("ranks", ["", "1,x", "0,1", "1;2", "-1"])
def test_wrong_sizes_are_refused(tmp_path: Path, ranks: str) -> None:
    done = jobs.run(0, "scale", CONFIG, f"--ranks={ranks}", cwd=tmp_path)
    assert done.code == 2 and "write numbers of ranks up to 10,000,000, such as 1,2,4,8" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_ends_the_ranks_and_leaves_a_checkpoint(
    tmp_path: Path, digits: Path, number: signal.Signals, code: int
) -> None:
    started = subprocess.Popen(
        jobs.command(0, *words(digits, "--ranks", "2", "--set", "train.steps=10000000")),
        cwd=tmp_path,
        env=jobs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    began = monotonic()
    while not (logs := list(tmp_path.glob("runs/*/*/mpirun.log"))) or "Step 0" not in logs[0].read_text():
        assert monotonic() - began < 60 and started.poll() is None
        sleep(0.05)
    started.send_signal(number)
    said, _ = started.communicate(timeout=60)
    assert started.returncode == code and ("interrupted" in said) == (code == 130), said
    assert list(logs[0].parent.glob("checkpoints/step-*.h5"))
    pids = [rank["pid"] for rank in json.loads((logs[0].parent / "meta.json").read_text())["ranks"]]
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):  # mpirun ends a moment before its last rank
        assert monotonic() - began < 90
        sleep(0.05)
