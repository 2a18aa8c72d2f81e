"""`data check CONFIG`: what a job reads, by its names, and as training opens it."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_train.core import config
from hpc_train.core.errors import UserError
from hpc_train.core.world import World
from hpc_train.datasets.inspect.check import Checked, check
from hpc_train.train.comm.context import Context
from hpc_train.train.tasks import open_task
from tests import jobs

ALONE = Context(World())
RNG = np.random.default_rng(0)
INPUTS, LABELS = RNG.normal(size=(300, 4)).astype("f4"), np.arange(300) % 3
NAMES = {"inputs": "x_train", "targets": "y_train", "test_inputs": "x_test", "test_targets": "y_test"}


def made(path: Path, **changed: np.ndarray) -> Path:
    """A file whose names say nothing to `data check FILE`, and a data set that no job reads."""
    held_out = RNG.normal(size=(60, 4)).astype("f4")
    arrays = {"x_train": INPUTS, "y_train": LABELS, "x_test": held_out, "y_test": np.arange(60) % 3, "notes": [np.nan]}
    with h5py.File(path, "w") as file:
        for name, values in (arrays | changed).items():
            file[name] = values
    return path


def checked(
    path: Path, task: dict[str, object] | None = None, validation: dict[str, object] | None = None, **data: object
) -> Checked:
    values = {
        "name": "a",
        "data": {"file": str(path), **NAMES, **data},
        "task": task or {},
        "train": {"steps": 1, "global_batch": 64},
        "validation": validation or {},
    }
    job = config.from_values(values, "test").config
    found = check([path], ALONE, quiet=True, job=job)
    if not found.faults:
        assert open_task(job, ALONE).reading == found.reading, "what check passes, train accepts"
    return found


def test_a_healthy_job_passes_whatever_else_its_file_holds(tmp_path: Path) -> None:
    found = checked(made(tmp_path / "a.h5"))
    assert not found.faults and set(found.datasets) == {"x_train", "y_train", "x_test", "y_test"}
    assert found.reading is not None and "300 x 4" in found.reading


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"y_test": np.full(60, 7)}, "label 7 in y_test, row 0"),
        ({"y_train": np.arange(299) % 3}, "x_train has 300 samples and y_train has 299"),
        ({"x_test": INPUTS[:60]}, "60 of 60 samples are in x_train, too (leakage)"),
        ({"y_train": RNG.normal(size=300)}, "is no label"),
        ({"x_train": np.where(INPUTS > 2, np.nan, INPUTS)}, "lack values"),
        ({"x_train": INPUTS[:20], "y_train": LABELS[:20]}, "a global batch of 64 is larger than the data set's 20"),
    ],
)
def test_what_would_end_or_mislead_a_job_is_a_fault(changed: dict[str, np.ndarray], said: str, tmp_path: Path) -> None:
    faults = [str(fault) for fault in checked(made(tmp_path / "a.h5", **changed)).faults]
    assert any(said in fault for fault in faults), faults


def test_what_the_job_leaves_out_is_no_fault(tmp_path: Path) -> None:
    path = made(tmp_path / "a.h5", x_train=np.where(INPUTS > 2, np.nan, INPUTS))
    assert checked(path).faults and not checked(path, missing="drop").faults


def test_regression_has_no_labels(tmp_path: Path) -> None:
    path = made(tmp_path / "a.h5", y_train=np.arange(300), y_test=np.arange(400, 460))
    assert not checked(path, {"kind": "regression", "model": "mlp"}).faults
    assert checked(path).faults


def test_the_command_takes_a_job_or_files(tmp_path: Path) -> None:
    path, job = made(tmp_path / "a.h5"), tmp_path / "job.toml"
    names = "\n".join(f'{key} = "{name}"' for key, name in NAMES.items())
    job.write_text(f'name = "a"\n[data]\nfile = "{path}"\n{names}\n[train]\nsteps = 1\nglobal_batch = 64\n')
    done = jobs.run(2, *["data", "check", str(job)], cwd=tmp_path)
    assert done.code == 0 and "Training reads x_train of" in done.out and "No fault found" in done.out
    done = jobs.run(2, *["data", "check", str(job), "--set", "data.targets=y_trian", "--json"], cwd=tmp_path)
    assert done.code == 1
    (fault,) = json.loads(done.out)["faults"]
    assert fault["kind"] == "refused" and "data.targets = 'y_trian': no such data set" in fault["what"]
    done = jobs.run(2, *["data", "check", str(path), "--set", "data.targets=y"], cwd=tmp_path)
    assert done.code == 2 and "changes a job" in done.err


@pytest.mark.parametrize(("inputs", "targets"), [("x_train", "y_train"), ("images/train", "labels/train"), ("X", "y")])
def test_unequal_lengths_are_a_fault_by_any_name(inputs: str, targets: str, tmp_path: Path) -> None:
    for num, is_fault in ((299, True), (300, False)):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file[inputs], file[targets] = INPUTS, LABELS[:num]
        faults = [fault for fault in check([tmp_path / "a.h5"], ALONE, quiet=True).faults if fault.kind == "unequal"]
        assert bool(faults) == is_fault
        assert all(f"{targets}: has 299 rows, and {inputs} has 300 samples" in str(fault) for fault in faults)


def test_samples_to_validate_on_are_checked_too(tmp_path: Path) -> None:
    """Those of the training samples, in the file; those in a file of their own as training opens them."""
    path = made(tmp_path / "a.h5", x_val=INPUTS[:50] + 1, y_val=np.full(50, 9), patient=np.arange(300) // 3)
    keys = {"validation_inputs": "x_val", "validation_targets": "y_val"}
    found = checked(path, validation={"every_epochs": 1.0}, **keys)
    assert any("label 9 in y_val, row 0" in str(fault) for fault in found.faults)
    found = checked(path, validation={"every_epochs": 1.0}, validation_file=str(path), **keys)
    assert any("label 9 in y_val, row 0" in str(fault) for fault in found.faults)
    grouped = checked(path, validation={"every_epochs": 1.0}, hold_out=0.2, hold_out_by="patient")
    assert not grouped.faults and "patient" in grouped.datasets and grouped.reading
    assert "held out to validate on" in grouped.reading


def test_samples_to_test_on_in_a_file_of_their_own_are_checked_too(tmp_path: Path) -> None:
    path = made(tmp_path / "a.h5")
    for num_leaked, said in ((0, None), (30, "30 of 60 samples are in x_train, too (leakage)")):
        held_out = RNG.normal(size=(60, 4)).astype("f4")
        held_out[:num_leaked] = INPUTS[:num_leaked]
        with h5py.File(tmp_path / "test.h5", "w") as file:
            file["x_test"], file["y_test"] = held_out, np.arange(60) % 3
        found = checked(path, test_file=str(tmp_path / "test.h5"))
        assert found.files == (str(path), str(tmp_path / "test.h5")) and found.datasets["x_test"]["samples"] == 60
        assert [said in str(fault) for fault in found.faults] == [True] * (said is not None)
    with h5py.File(tmp_path / "test.h5", "r+") as file:
        file["y_test"][3] = 9
    faults = [str(fault) for fault in checked(path, test_file=str(tmp_path / "test.h5")).faults]
    assert any("label 9 in y_test, row 3" in fault for fault in faults), faults
    with pytest.raises(UserError, match=r"data\.test_file = '.*none\.h5' does not exist"):
        checked(path, test_file=str(tmp_path / "none.h5"))
