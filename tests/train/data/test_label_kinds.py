"""Labels as files store them: each kind is read as class numbers, with a line that says so, or named."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_train.core import config
from hpc_train.core.errors import UserError
from hpc_train.core.labels import NoClasses, find_classes
from hpc_train.core.world import World
from hpc_train.datasets.inspect.check import check
from hpc_train.train.comm.context import Context
from hpc_train.train.tasks.classification import Classification

ALONE = Context(World())
CLASSES = np.arange(40) % 4  # of the 40 training samples; the 8 test samples have the first ones


def opened(folder: Path, stored: object, test: object = None, num_classes: int | None = None) -> Classification:
    path = folder / "labels.h5"
    with h5py.File(path, "w") as file:
        file["train/inputs"] = np.random.default_rng(0).random((len(stored), 3), np.float32)  # type: ignore[arg-type]
        file["train/targets"] = stored
        if test is not None:
            file["test/inputs"] = np.zeros((len(test), 3), np.float32)  # type: ignore[arg-type]
            file["test/targets"] = test
    values = {
        "name": "labels",
        "task": {"num_classes": num_classes},
        "data": {"file": str(path)},
        "train": {"steps": 1, "global_batch": 4},
    }
    return Classification(config.from_values(values, "test").config, ALONE)


NAMES = np.array(["oak", "ash", "elm", "fir"])
KINDS: dict[str, tuple[object, list[object] | None]] = {
    "integers": (CLASSES.astype("u1"), None),
    "big-endian": (CLASSES.astype(">i8"), None),
    "whole floats": (CLASSES.astype("f4"), None),
    "a column": (CLASSES[:, None], None),
    "a column of floats": (CLASSES[:, None].astype("f8"), None),
    "one-hot": (np.eye(4, dtype="f4")[CLASSES], None),
    "one-hot integers": (np.eye(4, dtype="u1")[CLASSES], None),
    "one-hot bool": (np.eye(4, dtype=bool)[CLASSES], None),
    "from 1": (CLASSES + 1, [1, 2, 3, 4]),
    "thousands": (CLASSES * 1000, [0, 1000, 2000, 3000]),
    "identifiers": (CLASSES + 10**9, [10**9 + each for each in range(4)]),
    "bytes": (NAMES[CLASSES].astype("S"), ["ash", "elm", "fir", "oak"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_every_kind_are_class_numbers(kind: str, tmp_path: Path) -> None:
    stored, values = KINDS[kind]
    task = opened(tmp_path, stored, test=np.asarray(stored)[:8])
    expected = CLASSES if kind != "bytes" else np.array([3, 0, 1, 2])[CLASSES]
    assert task.num_classes == 4 and task.facts["classes"] == values
    rows = np.array([5, 2, 39, 0])
    assert task.batch(rows, 0).targets.tolist() == expected[rows].tolist()
    (held_out,) = task.test_batches(World())
    assert held_out.targets.tolist() == expected[:8].tolist()
    assert ("of train/targets are classes 0 to 3" in task.reading) == (values is not None)
    assert values is None or f"labels {values[0]!r}, " in task.reading
    assert not [fault for fault in check([tmp_path / "labels.h5"], ALONE, quiet=True).faults if "targets" in str(fault)]


def test_booleans_are_two_classes(tmp_path: Path) -> None:
    task = opened(tmp_path, CLASSES > 1)
    assert task.num_classes == 2 and task.batch(np.arange(4), 0).targets.tolist() == [0, 0, 1, 1]


def test_strings_of_variable_length_are_classes(tmp_path: Path) -> None:
    task = opened(tmp_path, [str(name) for name in NAMES[CLASSES]])
    assert task.facts["classes"] == ["ash", "elm", "fir", "oak"]
    assert task.batch(np.arange(4), 0).targets.tolist() == [3, 0, 1, 2]


@pytest.mark.parametrize(
    "change, says",
    [
        ({3: 10**9}, r"label 1000000000 in train/targets, row 3, is none of numbers from 0"),
        ({7: -1}, r"label -1 in train/targets, row 7, is none of numbers from 0"),
    ],
)
def test_a_label_that_does_not_go_with_the_others_is_named(change: dict[int, int], says: str, tmp_path: Path) -> None:
    stored = CLASSES.copy()
    for row, value in change.items():
        stored[row] = value
    with pytest.raises(UserError, match=says):
        opened(tmp_path, stored)


@pytest.mark.parametrize(
    "stored, says",
    [
        (CLASSES + 0.5, r"0\.5 in train/targets, row 0, is no label"),
        (np.where(CLASSES == 2, np.nan, CLASSES), r"10 of 40 samples of train/targets lack values: nan in row 2"),
        (np.ones((40, 3)), r"\[1\. 1\. 1\.\] in train/targets, row 0, is no label"),
        (np.ones((40, 2, 2), int), r"train/targets is int64 \(40, 2, 2\), and no labels"),
        (np.arange(40) * 10**6, r"train/targets has 40 different labels \(0, 1000000, 2000000, \.\.\.\): they name no"),
        ([f"sample {number}" for number in range(40)], r"has 40 different labels \('sample 0', .*they name no classes"),
        (np.full(40, 1 << 63, np.uint64), r"9223372036854775808 in train/targets, row 0, is no label"),
    ],
)
def test_what_is_no_label_is_named(stored: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        opened(tmp_path, stored)


def test_test_labels_are_those_of_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'yew' in test/targets, row 1, is none of the 4 classes\n.*needs samples"):
        opened(tmp_path, NAMES[CLASSES].astype("S"), test=np.array([b"oak", b"yew"]))
    with pytest.raises(UserError, match=r"label 4 in test/targets, row 0, is none of the 4 classes"):
        opened(tmp_path, CLASSES, test=np.array([4, 1]))
    assert opened(tmp_path, CLASSES, test=np.array([4, 1]), num_classes=5).num_classes == 5


def test_the_number_of_classes_that_a_job_states_is_kept() -> None:
    assert find_classes(np.arange(3), 10, 40).num == 10
    from_1 = find_classes(np.arange(1, 11), 10, 40)
    assert from_1.num == 10 and from_1.listed() == list(range(1, 11))
    assert find_classes(np.arange(1, 10), 10, 40).listed() is None, "nine of ten classes from 0"
    with pytest.raises(NoClasses):
        find_classes(np.array(["a", "b", "c"]), 2, 40)
