"""Files sorted by class are named where the order of an epoch would not mix their classes."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_train.core import config
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.tasks.classification import Classification

ALONE = Context(World())
SORTED = np.arange(10).repeat(100)
RANDOM = np.random.default_rng(0).permutation(SORTED)
IN_TURNS = np.tile(np.arange(10), 100)


def warning(
    folder: Path, labels: np.ndarray, capsys: pytest.CaptureFixture[str], chunk: int = 10, **data: object
) -> str:
    with h5py.File(folder / "a.h5", "w") as file:
        layout = {"chunks": (chunk, 4), "compression": "gzip"} if chunk else {}
        file.create_dataset("train/inputs", data=np.ones((len(labels), 4), np.float32), **layout)
        file["train/targets"] = labels
    job = {"name": "a", "data": {"file": str(folder / "a.h5"), **data}, "train": {"steps": 1, "global_batch": 20}}
    Classification(config.from_values(job, "test").config, ALONE)
    return capsys.readouterr().err


@pytest.mark.parametrize("chunk, data", [(10, {"shuffle_chunks": 2}), (100, {"shuffle_chunks": 3}), (100, {})])
def test_sorted_labels_that_are_hardly_mixed_are_named(
    chunk: int, data: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = warning(tmp_path, SORTED, capsys, chunk, **data)
    if chunk == 100 and not data:
        assert not said, "all ten chunks are mixed"
        return
    assert "warning: train/targets is sorted: 100 equal labels follow each other" in said


@pytest.mark.parametrize("labels", [RANDOM, IN_TURNS], ids=["random", "in turns"])
@pytest.mark.parametrize("data", [{"shuffle_chunks": 2}, {"shuffle_chunks": 1}])
def test_labels_in_a_good_order_are_not(
    labels: np.ndarray, data: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not warning(tmp_path, labels, capsys, 10, **data)


def test_what_is_mixed_over_all_samples_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not warning(tmp_path, SORTED, capsys, chunk=0)
    assert not warning(tmp_path, SORTED, capsys, chunk=1, shuffle_chunks=600), "600 pieces in a window"
    assert not warning(tmp_path, SORTED, capsys, chunk=0, read="collective"), "all of it is one window"
