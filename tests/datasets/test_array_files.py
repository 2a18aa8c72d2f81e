"""HDF5, netCDF and Zarr files as files that train: the same values, renamed, cast, in part, in other chunks."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.io import netcdf_file

from hpc_train.core import config
from hpc_train.core.errors import UserError
from hpc_train.core.world import World
from hpc_train.datasets.inspect.proposal import preparation
from hpc_train.datasets.prepare.prepare import prepare
from hpc_train.datasets.prepare.sources import Options
from hpc_train.train.comm.context import Context
from hpc_train.train.tasks.regression import Regression
from tests import jobs

ALONE = Context(World())
RNG = np.random.default_rng(0)
FIELD = RNG.normal(size=(60, 3, 4))
TARGET = FIELD.reshape(60, -1).sum(axis=1)
STORED = np.round(FIELD * 100).astype("i2")  # means stored / 100 + 5

NETCDF_4 = """
import sys
import netCDF4, numpy as np
field, target = np.load(sys.argv[2]), np.load(sys.argv[3])
with netCDF4.Dataset(sys.argv[1], "w") as file:
    for name, size in (("time", 60), ("y", 3), ("x", 4)):
        file.createDimension(name, size)
    variable = file.createVariable("t2m", "i2", ("time", "y", "x"), fill_value=-32768)
    variable.set_auto_maskandscale(False)
    variable.scale_factor, variable.add_offset, variable.units = 0.01, 5.0, "K"
    variable[:] = field
    file.createVariable("target", "f8", ("time",))[:] = target
"""


def write_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        made = file.create_dataset("t2m", data=STORED, chunks=(7, 3, 2), compression="gzip")
        made.attrs.update({"scale_factor": 0.01, "add_offset": 5.0, "_FillValue": np.int16(-32768), "units": "K"})
        file["target"] = TARGET


def write_netcdf_4(path: Path) -> None:
    """In a process of its own: netCDF4 brings an HDF5 of its own, and one process holds one."""
    np.save(path.parent / "field.npy", STORED)
    np.save(path.parent / "target.npy", TARGET)
    files = [str(path), str(path.parent / "field.npy"), str(path.parent / "target.npy")]
    subprocess.run([sys.executable, "-c", NETCDF_4, *files], check=True, timeout=60)


def write_netcdf_3(path: Path) -> None:
    with netcdf_file(path, "w") as file:
        for name, size in (("time", 60), ("y", 3), ("x", 4)):
            file.createDimension(name, size)
        field = file.createVariable("t2m", "i2", ("time", "y", "x"))
        field[:] = STORED
        field.scale_factor, field.add_offset = np.float64(0.01), np.float64(5)  # of a float, scipy writes 32 bits
        field.units, field._FillValue = "K", np.int16(-32768)
        file.createVariable("target", "f8", ("time",))[:] = TARGET


def write_zarr(path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    group = zarr.create_group(path)
    field = group.create_array("t2m", data=STORED, chunks=(7, 3, 2))
    field.attrs.update({"scale_factor": 0.01, "add_offset": 5.0, "_FillValue": -32768, "units": "K"})
    group.create_array("target", data=TARGET, chunks=(60,))


FORMATS = {
    "hdf5": ("hdf5", "a.h5", write_hdf5),
    "netcdf-4": ("netcdf", "a.nc", write_netcdf_4),
    "netcdf-3": ("netcdf", "a.nc", write_netcdf_3),
    "zarr": ("zarr", "a.zarr", write_zarr),
}


def made(kind: str, source: Path, *arrays: str, compress: str | None = None, **options: Any) -> h5py.File:
    output = source.parent / "out.h5"
    options = {"test_fraction": 0, **options}
    prepare(kind, source, output, ALONE, True, Options(arrays=arrays, **options), compress)
    return h5py.File(output)


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_gives_the_same_data(form: str, tmp_path: Path) -> None:
    kind, name, write = FORMATS[form]
    write(tmp_path / name)
    with made(kind, tmp_path / name, "inputs=t2m", "targets=target") as file:
        inputs = file["train/inputs"]
        assert inputs.dtype == np.int16 and inputs.dtype.isnative and np.array_equal(inputs[:], STORED)
        assert (inputs.attrs["scale_factor"], inputs.attrs["add_offset"]) == (0.01, 5.0)
        assert inputs.attrs["_FillValue"] == -32768 and np.array_equal(file["train/targets"][:], TARGET)
    with made(kind, tmp_path / name, "inputs=t2m:float32", "targets=target", rows="5:50:3", compress="gzip:4") as file:
        inputs = file["train/inputs"]
        assert np.array_equal(inputs[:], (STORED[5:50:3] * 0.01 + 5).astype("f4")) and inputs.chunks == (15, 3, 4)
        assert "scale_factor" not in inputs.attrs and np.array_equal(file["train/targets"][:], TARGET[5:50:3])
    job = {
        "name": "a",
        "data": {"file": str(tmp_path / "out.h5")},
        "task": {"kind": "regression", "model": "mlp"},
        "train": {"steps": 1, "global_batch": 4},
    }
    assert Regression(config.from_values(job, "test").config, ALONE).num_samples == 15


def test_missing_values_become_nan_where_numbers_become_floats(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["t2m"][3, 1, 2] = -32768
    with made("hdf5", tmp_path / "a.h5", "inputs=t2m:float32", "targets=target") as file:
        assert np.argwhere(np.isnan(file["train/inputs"][:])).tolist() == [[3, 1, 2]]


def test_parts_keep_their_names_and_texts_become_class_numbers(tmp_path: Path) -> None:
    labels = np.array(["cat", "dog", "ape"])[np.arange(60) % 3]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["train/inputs"], file["test/inputs"] = FIELD, FIELD[:6]
        file["train/targets"], file["test/targets"] = labels.astype("S"), labels[:6].astype("S")
        file["train/note"] = np.arange(60)
    with made("hdf5", tmp_path / "a.h5", test_fraction=None) as file:
        assert sorted(file["train"]) == ["inputs", "note", "targets"] and np.array_equal(
            file["test/inputs"][:], FIELD[:6]
        )
        known = json.loads(file.attrs["categories"])["train/targets"]
        assert known == ["ape", "cat", "dog"]
        assert [known[code] for code in file["train/targets"][:]] == labels.tolist()


def test_one_row_in_ten_is_for_tests(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "a.h5")
    with made("hdf5", tmp_path / "a.h5", "inputs=t2m", "targets=target", test_fraction=None) as file:
        parts = [file["train/inputs"][:], file["test/inputs"][:]]
        assert [len(part) for part in parts] == [54, 6] and "scale_factor" in file["test/inputs"].attrs
        assert sorted(map(bytes, np.concatenate(parts))) == sorted(map(bytes, STORED))


@pytest.mark.parametrize(
    ("arrays", "options", "said"),
    [
        ((), {}, "none is called inputs or train/inputs"),
        (("inputs=t3m",), {}, "holds no array 't3m'"),
        (("inputs=t2m:text", "targets=target"), {}, "text is no type of numbers"),
        (
            ("inputs=t2m:uint8", "targets=target"),
            {},
            r"t2m holds -\d+, in row \d+ of those chosen, which uint8 cannot hold",
        ),
        (("inputs=t2m", "inputs=target"), {}, "--array inputs=... is given more than once"),
        (("inputs=t2m", "targets=target"), {"rows": "1:2:-1"}, "--rows 1:2:-1 are no rows"),
        (("inputs=t2m", "targets=target"), {"rows": "100:"}, "each sample is one row|has 0 rows"),
        (("inputs=t2m", "targets=target"), {"target": "a"}, "--target a is not for it"),
    ],
)
def test_what_cannot_be_is_named(arrays: tuple[str, ...], options: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_hdf5(tmp_path / "a.h5")
    with pytest.raises(UserError, match=said):
        made("hdf5", tmp_path / "a.h5", *arrays, **options)


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    write_netcdf_3(tmp_path / "a.nc")
    with pytest.raises(UserError, match=r"netCDF-3 and no HDF5\n.*prepare netcdf"):
        made("hdf5", tmp_path / "a.nc", "inputs=t2m", "targets=target")
    (tmp_path / "b.nc").write_bytes((tmp_path / "a.nc").read_bytes()[:200])
    for kind, name in (("netcdf", "b.nc"), ("netcdf", "none.nc"), ("zarr", "none.zarr"), ("zarr", ".")):
        with pytest.raises(UserError, match=r"--from .*"):
            made(kind, tmp_path / name, "inputs=t2m", "targets=target")


@pytest.mark.parametrize("form", ["netcdf-3", "zarr"])
def test_init_prints_the_command_that_makes_a_file_to_train_on(form: str, tmp_path: Path) -> None:
    kind, name, write = FORMATS[form]
    write(tmp_path / name)
    command = preparation(tmp_path / name)
    assert command == (
        f"hpc-train prepare {kind} data/a.h5 --from {tmp_path / name} --array inputs=t2m --array targets=target"
    )
    done = jobs.run(0, *shlex.split(command)[1:], cwd=tmp_path)
    assert done.code == 0, done.err
    done = jobs.run(0, "init", "data/a.h5", cwd=tmp_path)
    assert done.code == 0 and "regression" in done.out, done.err
