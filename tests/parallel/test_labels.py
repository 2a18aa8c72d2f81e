"""Labels and missing values are found by parts: every rank finds the same."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hpc_train.core import config
from hpc_train.core import labels as core_labels
from hpc_train.core.errors import UserError
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.data import labels
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
    assert task.facts["classes"] == (["ash", "elm", "fir", "oak"] if kind == "strings" else [-70, -63, -56, -49])
    assert task.batch(np.arange(40), 0).targets.tolist() == classes.tolist()


def test_strings_that_name_no_classes_are_not_all_collected(
    context: Context, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Identifiers: each rank stops to remember new ones once they are more than classes can be."""
    for module in (labels, core_labels):
        monkeypatch.setattr(module, "MAX_CLASSES", 50)
    monkeypatch.setattr(labels, "_SCAN_ROWS", 20)
    context.on_root(lambda: write(shared_path / "a.h5", np.array([f"id {row}" for row in range(400)], "S")))
    job = {"name": "a", "data": {"file": str(shared_path / "a.h5")}, "train": {"steps": 1, "global_batch": 4}}
    for most, keys in ((50, {}), (60, {"num_classes": 60})):
        with pytest.raises(UserError, match=rf"has more than {most} different labels \('id 0', "):
            Classification(config.from_values({**job, "task": keys}, "test").config, context)


@pytest.mark.parametrize("num_classes", [256, 257])
def test_each_rank_keeps_a_byte_a_sample_for_few_classes(num_classes: int, context: Context, shared_path: Path) -> None:
    names = np.array([f"{number:03d}" for number in range(num_classes)])[np.arange(3 * num_classes) % num_classes]
    context.on_root(lambda: write(shared_path / "a.h5", names.astype("S")))
    job = {"name": "a", "data": {"file": str(shared_path / "a.h5")}, "train": {"steps": 1, "global_batch": 4}}
    task = Classification(config.from_values(job, "test").config, context)
    assert task.train.targets.dtype.itemsize == (1 if num_classes == 256 else 2)
    rows = np.arange(len(names))
    assert task.batch(rows, 0).targets.tolist() == (rows % num_classes).tolist()


def test_a_value_that_one_rank_meets_is_told_on_all(context: Context, shared_path: Path) -> None:
    context.on_root(lambda: write(shared_path / "a.h5", np.r_[np.arange(39) % 4, 0.5]))
    job = {"name": "a", "data": {"file": str(shared_path / "a.h5")}, "train": {"steps": 1, "global_batch": 4}}
    with pytest.raises(UserError, match=r"0\.5 in train/targets, row 39, is no label"):
        Classification(config.from_values(job, "test").config, context)


def test_samples_with_missing_values_are_left_out_on_every_rank(context: Context, shared_path: Path) -> None:
    """A row in the first rank's part, and one in the last rank's."""
    context.on_root(lambda: write(shared_path / "a.h5", np.arange(40) % 4, missing=(2, 37)))
    data = {"file": str(shared_path / "a.h5")}
    job = {"name": "a", "data": data, "train": {"steps": 1, "global_batch": 4}}
    with pytest.raises(UserError, match=r"2 of 40 samples of train/inputs lack values: -1 in row 2 is the first"):
        Classification(config.from_values(job, "test").config, context)
    data["missing"] = "drop"
    task = Classification(config.from_values(job, "test").config, context)
    kept = np.delete(np.arange(40), (2, 37))
    assert task.num_samples == 38 and task.batch(np.arange(38), 0).inputs[:, 0].tolist() == kept.tolist()
    data["missing"] = "mean"
    task = Classification(config.from_values(job, "test").config, context)
    assert task.batch(np.array([37]), 0).floats()[0, 0].item() == pytest.approx(kept.mean())


def test_standardised_inputs_are_the_same_to_the_bit_on_any_number_of_ranks(
    context: Context, shared_path: Path
) -> None:
    context.on_root(lambda: write(shared_path / "a.h5", np.arange(1000) % 4, missing=(5,)))
    data = {"file": str(shared_path / "a.h5"), "normalize": "standardize", "missing": "mean"}
    job = {"name": "a", "data": data, "train": {"steps": 1, "global_batch": 4}}
    together = Classification(config.from_values(job, "test").config, context)
    alone = Classification(config.from_values(job, "test").config, Context(World()))
    rows = np.arange(1000)
    assert torch.equal(together.batch(rows, 0).floats(), alone.batch(rows, 0).floats())
    assert together.facts == alone.facts


def write(path: Path, targets: np.ndarray, missing: tuple[int, ...] = ()) -> None:
    inputs = np.repeat(np.arange(len(targets), dtype=np.float32)[:, None], 3, axis=1)
    inputs[list(missing)] = -1
    with h5py.File(path, "w") as file:
        file["train/inputs"], file["train/targets"] = inputs, targets
        file["train/inputs"].attrs["_FillValue"] = np.float32(-1)
