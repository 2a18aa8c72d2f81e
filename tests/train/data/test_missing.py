"""Values that a file declares as missing: named, left out or replaced, in files that h5py and netCDF4 wrote."""

import subprocess
import sys
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

ALONE = Context(World())
LABELS = np.arange(30) % 3


def values() -> np.ndarray:
    return np.arange(120, dtype=np.float32).reshape(30, 4)


def write(path: Path, inputs: np.ndarray, targets: np.ndarray = LABELS, **attributes: object) -> Path:
    with h5py.File(path, "w") as file:
        for part in ("train", "test"):
            file[f"{part}/inputs"], file[f"{part}/targets"] = inputs, targets
            file[f"{part}/inputs"].attrs.update(attributes)
    return path


def opened(path: Path, **data: object) -> Classification:
    job = {"name": "a", "data": {"file": str(path), **data}, "train": {"steps": 1, "global_batch": 4}}
    return Classification(config.from_values(job, "test").config, ALONE)


@pytest.mark.parametrize("attribute", ["_FillValue", "missing_value"])
@pytest.mark.parametrize("dtype", ["f4", "i2"])
def test_missing_values_are_named_left_out_or_replaced(attribute: str, dtype: str, tmp_path: Path) -> None:
    inputs = values().astype(dtype)
    inputs[[7, 20], [1, 3]] = -999
    path = write(tmp_path / "a.h5", inputs, **{attribute: np.array(-999, dtype), "scale_factor": 0.5})
    with pytest.raises(UserError, match=r"2 of 30 samples of train/inputs lack values: -999 in row 7 is the first"):
        opened(path)
    dropped = opened(path, missing="drop")
    assert dropped.num_samples == 28 and "2 of 30 samples are left out, as train/inputs lacks values" in dropped.reading
    kept = np.delete(np.arange(30), [7, 20])
    batch = dropped.batch(np.array([6, 7, 27]), 0)
    assert batch.floats().tolist() == (values()[kept[[6, 7, 27]]] / 2).tolist()
    assert batch.targets.tolist() == LABELS[kept[[6, 7, 27]]].tolist()
    assert sum(len(each) for each in dropped.test_batches(World())) == 28
    replaced = opened(path, missing="mean")
    assert replaced.num_samples == 30 and "the mean stands for missing values in 2 of 30" in replaced.reading
    row = values()[7] / 2
    row[1] = np.delete(values()[:, 1], 7).mean() / 2
    assert replaced.batch(np.array([7]), 0).floats()[0].tolist() == pytest.approx(row.tolist())
    (held_out,) = replaced.test_batches(World())
    assert held_out.floats()[7].tolist() == pytest.approx(row.tolist()), "the mean of the training samples"


def test_where_each_sample_lacks_the_same_the_mean_of_all_stands_there(tmp_path: Path) -> None:
    """As of land in fields of the ocean."""
    inputs = values()
    inputs[:, 2] = np.nan
    path = write(tmp_path / "a.h5", inputs)
    with pytest.raises(UserError, match=r"each of the 30 samples lacks a value in train/inputs.*\n.*\"mean\""):
        opened(path, missing="drop")
    filled = opened(path, missing="mean").batch(np.arange(30), 0).floats()
    assert filled[:, 2].tolist() == pytest.approx([float(np.nanmean(inputs))] * 30)
    assert opened(path, missing="mean", normalize="standardize").batch(np.arange(30), 0).floats().isfinite().all()


def test_nan_is_named_and_missing_where_a_job_says_what_to_do(tmp_path: Path) -> None:
    inputs = values()
    inputs[3] = np.nan
    path = write(tmp_path / "a.h5", inputs)
    with pytest.raises(UserError, match=r"1 of 30 samples of train/inputs lack values: nan in row 3 is the first"):
        opened(path)
    assert opened(path, missing="drop").num_samples == 29
    filled = opened(path, missing="mean").batch(np.array([3]), 0).floats()[0]
    assert filled.tolist() == pytest.approx(np.delete(values(), 3, axis=0).mean(axis=0).tolist())


def test_a_sample_without_a_label_is_left_out(tmp_path: Path) -> None:
    targets = LABELS.astype("i4")
    targets[5] = -1
    path = write(tmp_path / "a.h5", values(), targets)
    with h5py.File(path, "r+") as file:
        for part in ("train", "test"):
            file[f"{part}/targets"].attrs["_FillValue"] = np.int32(-1)
    with pytest.raises(UserError, match=r"1 of 30 samples of train/targets lack values"):
        opened(path)
    for mode in ("drop", "mean"):
        task = opened(path, missing=mode)
        assert task.num_samples == 29 and task.num_classes == 3


def test_chunks_of_what_is_left_keep_their_order(tmp_path: Path) -> None:
    inputs = values()
    inputs[8:16] = -1e9  # one whole chunk, and a part of the next
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("train/inputs", data=inputs, chunks=(4, 4), compression="gzip", fillvalue=-1e9)
        file["train/inputs"].attrs["_FillValue"] = np.float32(-1e9)
        file["train/targets"] = LABELS
    task = opened(tmp_path / "a.h5", missing="drop", shuffle_chunks=1)
    assert task.num_samples == 22 and str(task.order).startswith("6 chunks")
    everything = task.batch(np.arange(22), 0)
    assert everything.inputs[:, 0].tolist() == np.delete(values(), np.arange(8, 16), axis=0)[:, 0].tolist()


# In a process of its own: netCDF4 brings an HDF5 of its own, and one process holds one.
NETCDF = """
import sys
import netCDF4, numpy as np
with netCDF4.Dataset(sys.argv[1], "w") as file:
    file.createDimension("sample", 30)
    file.createDimension("x", 4)
    inputs = file.createVariable("inputs", "f4", ("sample", "x"))
    targets = file.createVariable("targets", "i4", ("sample",))
    rows = np.array([row for row in range(30) if row != 11])
    inputs[rows] = np.arange(120, dtype="f4").reshape(30, 4)[rows]
    targets[:] = np.arange(30) % 3
"""


def test_a_netcdf_file_is_healthy_and_what_nobody_wrote_is_missing(tmp_path: Path) -> None:
    """Its dimensions without coordinates are data sets that are never written."""
    path = tmp_path / "a.nc"
    subprocess.run([sys.executable, "-c", NETCDF, str(path)], check=True, timeout=60)
    faults = [str(fault) for fault in check([path], ALONE, quiet=True).faults]
    assert not [fault for fault in faults if "never written" in fault], faults
    with pytest.raises(UserError, match=r"1 of 30 samples of inputs lack values: 9\.96921e\+36 in row 11"):
        opened(path, inputs="inputs", targets="targets")
    assert opened(path, inputs="inputs", targets="targets", missing="drop").num_samples == 29
