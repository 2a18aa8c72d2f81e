"""Labels are read by parts: every rank finds the same classes."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_train.core import config
from hpc_train.core.errors import UserError
from hpc_train.train.comm.context import Context
from hpc_train.train.tasks.classification import Classification

NAMES = np.array(["oak", "ash", "elm", "fir"])


@pytest.mark.parametrize("kind", ["strings", "numbers"])
def test_every_rank_finds_the_same_classes(kind: str, context: Context, shared_path: Path) -> None:
    """Sorted by class, so that a rank sees a part of the classes alone."""
    names = np.sort(NAMES.repeat(10))
    classes = np.arange(4).repeat(10)
    stored = names.astype("S") if kind == "strings" else classes * 7 - 70
    context.on_root(lambda: write(shared_path / "a.h5", stored))
    job = {"name": "a", "data": {"file": str(shared_path / "a.h5")}, "train": {"steps": 1, "global_batch": 4}}
    task = Classification(config.from_values(job, "test").config, context)
    assert task.classes == (["ash", "elm", "fir", "oak"] if kind == "strings" else [-70, -63, -56, -49])
    assert task.batch(np.arange(40), 0).targets.tolist() == classes.tolist()


def test_a_value_that_one_rank_meets_is_told_on_all(context: Context, shared_path: Path) -> None:
    context.on_root(lambda: write(shared_path / "a.h5", np.r_[np.arange(39) % 4, 0.5]))
    job = {"name": "a", "data": {"file": str(shared_path / "a.h5")}, "train": {"steps": 1, "global_batch": 4}}
    with pytest.raises(UserError, match=r"0\.5 in train/targets, row 39, is no label"):
        Classification(config.from_values(job, "test").config, context)


def write(path: Path, targets: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file["train/inputs"], file["train/targets"] = np.ones((len(targets), 3), np.float32), targets
