"""Rows that nobody wrote, and names of data sets to test on that no file has: named before a model trains."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_train.core import config
from hpc_train.core.errors import UserError
from hpc_train.core.world import World
from hpc_train.datasets.inspect.check import check
from hpc_train.train.comm.context import Context
from hpc_train.train.tasks.classification import Classification
from hpc_train.train.tasks.language import Language

ALONE = Context(World())
NUM_ROWS = 1000
INPUTS = np.random.default_rng(0).normal(size=(NUM_ROWS, 4)).astype("f4")
LABELS = np.arange(NUM_ROWS) % 3


def half_written(path: Path, inputs_rows: int, targets_rows: int, chunk: int | None) -> Path:
    """A file with room for NUM_ROWS rows whose writer was stopped."""
    with h5py.File(path, "w") as file:
        options = {"maxshape": (None, 4), "chunks": (chunk, 4)} if chunk else {}
        x = file.create_dataset("train/inputs", (NUM_ROWS, 4), "f4", **options)
        options = {"maxshape": (None,), "chunks": (chunk,)} if chunk else {}
        y = file.create_dataset("train/targets", (NUM_ROWS,), "i8", **options)
        x[:inputs_rows], y[:targets_rows] = INPUTS[:inputs_rows], LABELS[:targets_rows]
    return path


def opened(path: Path, **data: object) -> Classification:
    job = {"name": "a", "data": {"file": str(path), **data}, "train": {"steps": 1, "global_batch": 4}}
    return Classification(config.from_values(job, "test").config, ALONE)


@pytest.mark.parametrize(
    ("inputs_rows", "targets_rows", "chunk", "what", "num_left"),
    [
        (600, 600, 100, "400 of 1,000 rows of train/inputs, 600 to 999, were never written: they read as 0", 600),
        (1000, 600, 100, "400 of 1,000 rows of train/targets, 600 to 999, were never written", 600),
        (995, 995, 100, "5 of 1,000 rows of train/inputs, 995 to 999, hold the fill value 0 alone", 995),
        (600, 600, None, "400 of 1,000 rows of train/inputs, 600 to 999, hold the fill value 0 alone", 600),
        (600, 1000, None, "400 of 1,000 rows of train/inputs, 600 to 999, hold the fill value 0 alone", 600),
    ],
)
def test_a_half_written_file_is_named_or_its_rows_are_left_out(
    inputs_rows: int, targets_rows: int, chunk: int | None, what: str, num_left: int, tmp_path: Path
) -> None:
    path = half_written(tmp_path / "a.h5", inputs_rows, targets_rows, chunk)
    with pytest.raises(UserError) as error:
        opened(path)
    assert what in error.value.what and "data.missing = 'drop'" in error.value.remedy
    task = opened(path, missing="drop")
    assert task.num_samples == num_left and "as they were never written" in task.reading
    assert task.batch(np.arange(num_left), 0).inputs.numpy().tolist() == INPUTS[:num_left].tolist()


def test_data_check_names_rows_of_fill_values_at_the_end(tmp_path: Path) -> None:
    (fault,) = check([half_written(tmp_path / "a.h5", 600, 600, None)], ALONE, quiet=True).faults
    assert (fault.kind, fault.dataset, fault.samples) == ("unwritten", "train/inputs", (600, 999))
    assert "the fill value 0 alone" in fault.what


def test_rows_of_zeros_that_occur_elsewhere_are_data(tmp_path: Path) -> None:
    """Empty pictures of class 0, as a file in order has them at its end, too."""
    inputs, labels = INPUTS.copy(), LABELS.copy()
    inputs[::3] = labels[::3] = 0
    inputs[-3:] = labels[-3:] = 0
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["train/inputs"], file["train/targets"] = inputs, labels
    assert opened(tmp_path / "a.h5").num_samples == NUM_ROWS


def test_tokens_that_were_never_written_are_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        tokens = file.create_dataset("train/inputs", (1000,), "u1", maxshape=(None,), chunks=(100,))
        tokens[:500] = np.arange(500) % 50
        file.attrs["vocab_size"] = 256
    job = {"name": "a", "data": {"file": str(tmp_path / "a.h5")}, "train": {"steps": 1, "global_batch": 1}}
    task = {"kind": "language", "model": "gpt", "options": {"context": 8, "width": 8, "heads": 1, "layers": 1}}
    with pytest.raises(UserError, match="500 of 1,000 rows of train/inputs, 500 to 999, were never written"):
        Language(config.from_values({**job, "task": task}, "test").config, ALONE)


def test_a_name_to_test_on_that_no_file_has_is_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for part in ("train", "test"):
            file[f"{part}/inputs"], file[f"{part}/targets"] = INPUTS, LABELS
    for names in ({"test_inputs": "tests/inputs"}, {"test_inputs": "tests/x", "test_targets": "tests/y"}):
        with pytest.raises(UserError, match=r"data.test_inputs = 'tests/.*': no such data set.*\n.*test/inputs"):
            opened(tmp_path / "a.h5", **names)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file.move("test", "tests")
    assert "no samples to test on, as there is no test/inputs" in opened(tmp_path / "a.h5").reading


def test_data_sets_without_samples_are_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["train/inputs"], file["train/targets"] = INPUTS, LABELS
        file["test/inputs"], file["test/targets"] = INPUTS[:0], LABELS[:0]
    with pytest.raises(UserError, match="test/inputs and test/targets hold no samples"):
        opened(tmp_path / "a.h5")
