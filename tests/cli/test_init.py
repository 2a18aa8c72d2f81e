"""`hpc-train init` looks at a file, says what it takes it for, and writes a job that trains on it."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_train.core import rundir
from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.datasets.inspect.proposal import propose
from hpc_train.datasets.inspect.structure import read_structure
from tests import jobs

RNG = np.random.default_rng(0)
LABELS = np.arange(400) % 4
TABLE = (RNG.normal(size=(400, 6)) * [1, 10, 100, 1e3, 1, 1] + LABELS[:, None]).astype("f4")
IMAGES = RNG.integers(0, 256, (400, 16, 16, 3)).astype("u1")
FLOW = RNG.random((40, 2, 18, 20))
FILES: dict[str, tuple[dict[str, np.ndarray], dict[str, object], str]] = {
    "table": (
        {"x": TABLE, "y": LABELS},
        {"kind": "classification", "model": "mlp", "normalize": "standardize", "inputs": "x", "targets": "y"},
        "y: labels of 4 classes",
    ),
    "images": (
        {
            "images_train": IMAGES,
            "labels_train": LABELS + 1,
            "images_test": IMAGES[:40],
            "labels_test": LABELS[:40] + 1,
        },
        {"kind": "classification", "model": "resnet", "normalize": "standardize", "test_inputs": "images_test"},
        "images_test: 40 samples to test on",
    ),
    "strings": (
        {"spectra": TABLE, "species": np.array([b"oak", b"ash", b"elm", b"fir"])[LABELS]},
        {"kind": "classification", "model": "mlp", "inputs": "spectra", "targets": "species"},
        "species: labels of 4 classes",
    ),
    "real": (
        {"features": TABLE, "energy": TABLE.sum(axis=1), "id": np.arange(400)},
        {"kind": "regression", "model": "mlp", "targets": "energy"},
        "energy: real numbers",
    ),
    "fields": (
        {"input": RNG.random((40, 12, 10, 5)), "output": RNG.random((40, 12, 10))},
        {"kind": "regression", "model": "mlp", "inputs": "input", "targets": "output"},
        "output: 12 x 10 numbers a sample",
    ),
    "flow": (
        {"input": RNG.random((40, 3, 18, 20)), "output": RNG.random((40, 1, 18, 20)), "time": np.arange(40.0)},
        {"kind": "regression", "model": "unet", "normalize": "standardize", "options": {"levels": 2, "width": 16}},
        "output: 1 x 18 x 20 numbers a sample on the same grid",
    ),
    "forecast": (
        {"input": FLOW, "output": FLOW + RNG.random(FLOW.shape) / 9},
        {"kind": "regression", "model": "unet", "options": {"levels": 2, "width": 16, "residual": True}},
        "targets are near their inputs: the model predicts the change (residual)",
    ),
    "volumes": (
        {"x": RNG.random((40, 2, 16, 9, 10)), "y": RNG.random((40, 16, 9, 10))},
        {"kind": "regression", "model": "unet", "options": {"levels": 1, "width": 16}},
        "x: 40 samples of 2 x 16 x 9 x 10 fields",
    ),
    "amounts": (
        {"inputs": TABLE, "targets": RNG.integers(-900, 900, 400), "index": np.arange(400), "out": TABLE[:, 0]},
        {"kind": "regression", "targets": "targets"},
        "different whole numbers, too many for classes",
    ),
    "names": (
        {"data": TABLE, "index": np.arange(400), "out": TABLE[:, 0]},
        {"kind": "regression", "targets": "out"},
        "not used: index",
    ),
    "one-hot": (
        {"train/inputs": TABLE, "train/targets": np.eye(4)[LABELS]},
        {"kind": "classification", "inputs": "train/inputs"},
        "one-hot rows of 4 classes",
    ),
}


def write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
    return path


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_taken_for_what_it_is(name: str, tmp_path: Path) -> None:
    arrays, expected, said = FILES[name]
    proposal = propose(read_structure(write(tmp_path / "a.h5", arrays)))
    assert any(said in line for line in proposal.said), proposal.said
    (tmp_path / "a.toml").write_text(proposal.job("a", "a.h5"))
    config = load(tmp_path / "a.toml").config
    found = config.data.model_dump() | config.task.model_dump()  # both have options: the task's are meant
    assert {key: found[key] for key in expected} == expected


def test_values_that_a_target_lacks_are_no_values(tmp_path: Path) -> None:
    energy = TABLE.sum(axis=1)
    energy[7] = 1e20
    path = write(tmp_path / "a.h5", {"x": TABLE, "energy": energy})
    with h5py.File(path, "r+") as file:
        file["energy"].attrs["_FillValue"] = np.float32(1e20)
    proposal = propose(read_structure(path))
    assert proposal.drops_missing and "energy lacks values: samples that lack one are left out" in proposal.said
    assert not any("e+20" in line for line in proposal.said)
    several = np.stack([energy, TABLE.sum(axis=1)], axis=1)
    several[7, 0] = np.nan
    proposal = propose(read_structure(write(tmp_path / "c.h5", {"x": TABLE, "energy": several})))
    said = "energy lacks values: samples without any are left out; of the others the values that are there count"
    assert proposal.kind == "regression" and said in proposal.said, proposal.said
    path = write(tmp_path / "b.h5", {"x": TABLE, "y": np.where(LABELS == 3, -9999, LABELS)})
    with pytest.raises(UserError, match=r"y has 4 different labels, and -9999 in row 3 is unlike the others"):
        propose(read_structure(path))


def test_a_file_of_any_name_has_a_job_that_loads(tmp_path: Path) -> None:
    write(tmp_path / "we ird 'n\"me.h5", {"x": TABLE[:3], "y": LABELS[:3].astype("f4") / 7})
    done = jobs.run(0, "init", "we ird 'n\"me.h5", cwd=tmp_path)
    assert done.code == 0 and "mpirun" not in done.out, done
    assert load(tmp_path / "we ird 'n\"me.toml").config.name == "we-ird-n-me"


@pytest.mark.parametrize("name", ["images", "real", "flow", pytest.param("fields", marks=pytest.mark.thorough)])
def test_the_job_trains_as_it_stands(name: str, tmp_path: Path) -> None:
    """With the two commands that init prints."""
    write(tmp_path / "mine.h5", FILES[name][0])
    done = jobs.run(0, "init", "mine.h5", cwd=tmp_path)
    assert done.code == 0 and "hpc-train train mine.toml" in done.out, done
    again = jobs.run(0, "init", "mine.h5", cwd=tmp_path)
    assert again.code == 2 and "mine.toml exists" in again.err and "--force" in again.err
    trained = jobs.run(2, "train", "mine.toml", "--set", "train.steps=3", "--set", "train.threads=1", cwd=tmp_path)
    assert trained.code == 0 and "warning" not in trained.err, trained
    (run,) = rundir.find([tmp_path / "runs"])
    assert json.loads(run.summary.read_text())["num_steps"] == 3


def test_what_is_no_hdf5_file_is_prepared_first(tmp_path: Path) -> None:
    (tmp_path / "cars.csv").write_text("power,label,weight\n1,2,3\n")
    (tmp_path / "pets").mkdir()
    for name, command in [
        ("cars.csv", "hpc-train prepare table data/cars.h5 --from cars.csv --target label"),
        ("pets", "hpc-train prepare images data/pets.h5 --from pets"),
    ]:
        done = jobs.run(0, "init", name, cwd=tmp_path)
        assert done.code == 0 and command in done.out and f"hpc-train init {command.split()[3]}" in done.out, done


def test_a_file_without_samples_and_targets_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", {"x": TABLE, "y": LABELS[:7]})
    done = jobs.run(0, "init", "a.h5", cwd=tmp_path)
    assert done.code == 2 and "x float32 (400, 6), y int64 (7,)" in done.err and not (tmp_path / "a.toml").exists()
    (tmp_path / "b.h5").write_text("nothing")
    assert jobs.run(0, "init", "b.h5", cwd=tmp_path).code == 2
