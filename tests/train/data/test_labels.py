"""Labels that are not classes: an error names data set, row and value before the first step, as `data check` does."""

import math
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.world import World
from hpc_train.datasets.inspect.check import check
from hpc_train.train.comm.context import Context
from hpc_train.train.tasks.classification import Classification
from tests.jobs import CONFIGS

ALONE = Context(World())


@pytest.mark.parametrize(
    "value, dtype, shown",
    [
        (-5, "i8", "-5"),
        (-(2**63), "i8", str(-(2**63))),
        (70_000, "i8", "70000"),
        (2**31 - 1, "i4", str(2**31 - 1)),
        (2**63 + 5, "u8", str(2**63 + 5)),
        (1e300, "f8", "1e+300"),
        (math.inf, "f8", "inf"),
        (math.nan, "f4", "nan"),
        (-5, "f4", "-5"),
    ],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_label_that_is_none_is_named(tmp_path: Path, part: str, value: float, dtype: str, shown: str) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        for each in ("train", "test"):
            labels = (np.arange(90) % 3).astype(dtype if each == part else "i8")
            if each == part:
                labels[17] = value
            file[f"{each}/inputs"], file[f"{each}/targets"] = rng.random((90, 4), np.float32), labels
    job = load(CONFIGS / "softmax-mnist.toml", (f"data.file={path}",)).config
    with pytest.raises(UserError) as told:
        Classification(job, ALONE)
    for word in (str(path), f"{part}/targets", "row 17", shown):
        assert word in told.value.what, told.value
    if dtype == "f4" and value == -5:
        return  # what a task of one's own may aim at
    faults = [fault for fault in check([path], ALONE, quiet=True).faults if fault.dataset == f"{part}/targets"]
    assert faults and faults[0].kind in ("out of range", "not finite")
    assert faults[0].samples is not None and faults[0].samples[0] == 17, faults


def test_many_samples_may_have_many_classes(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["train/inputs"], file["train/targets"] = np.ones((70_001, 1), np.float32), np.arange(70_001)
    job = load(CONFIGS / "softmax-mnist.toml", (f"data.file={tmp_path / 'x.h5'}",)).config
    assert Classification(job, ALONE).num_classes == 70_001
