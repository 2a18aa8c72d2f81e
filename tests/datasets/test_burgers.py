"""`prepare burgers`: fields that solve the equation, in a file that netCDF4 and xarray open."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from hpc_train.core.errors import UserError
from hpc_train.core.world import World
from hpc_train.datasets.inspect.check import check
from hpc_train.datasets.prepare import burgers
from hpc_train.datasets.prepare.prepare import prepare
from hpc_train.train.comm.context import Context

ALONE = Context(World())
FINE = 4  # times as many cells: enough for the steepest slopes


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("burgers") / "few.nc"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(burgers, "NUM_REALIZATIONS", {"train": 3, "test": 2})
        prepare("burgers", None, path, ALONE)
    return path


@pytest.fixture
def fine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same realizations at every point of the finer grid, which their random numbers belong to."""
    burgers._initial_state.cache_clear()
    monkeypatch.setattr(burgers, "CELLS", tuple(FINE * each for each in burgers.CELLS))
    monkeypatch.setattr(burgers, "_FINER", burgers._FINER // FINE)
    yield
    burgers._initial_state.cache_clear()


def derivative(field: np.ndarray, axis: int, order: int = 1) -> np.ndarray:
    """Along axis 0 for y or 1 for x, by Fourier modes."""
    waves = np.fft.fftfreq(field.shape[axis], 1 / field.shape[axis]) * 2 * np.pi / burgers.LENGTHS_M[axis]
    modes = np.fft.fft(field, axis=axis) * np.expand_dims((1j * waves) ** order, 1 - axis)
    return np.fft.ifft(modes, axis=axis).real


def tendency(velocity: np.ndarray) -> np.ndarray:
    """du/dt of the equation."""
    u, v = velocity
    return np.stack(
        [
            burgers.VISCOSITY_M2_S * (derivative(w, 0, 2) + derivative(w, 1, 2))
            - u * derivative(w, 1)
            - v * derivative(w, 0)
            for w in (u, v)
        ]
    )


@pytest.mark.usefixtures("fine")
@pytest.mark.parametrize("realization", [0, 511])
def test_an_independent_integration_in_time_comes_to_the_same_fields(realization: int) -> None:
    begin, end = burgers.STEP_S, 2 * burgers.STEP_S
    first, exact = burgers.velocity(realization, begin), burgers.velocity(realization, end)
    found = solve_ivp(
        lambda _, y: tendency(y.reshape(first.shape)).ravel(), (begin, end), first.ravel(), rtol=1e-7, atol=1e-8
    )
    reached = found.y[:, -1].reshape(first.shape)
    assert np.abs(exact - first).max() > 0.1, "it moves"
    assert np.abs(reached - exact).max() < 1e-4


def test_coarse_cells_are_points_of_the_fine_grid(request: pytest.FixtureRequest) -> None:
    coarse = burgers.velocity(5, 0.1)
    request.getfixturevalue("fine")
    assert np.allclose(burgers.velocity(5, 0.1)[:, ::FINE, ::FINE], coarse, atol=1e-9)


def test_targets_are_the_fields_a_step_later_and_no_realization_is_in_both_parts(file: Path) -> None:
    with h5py.File(file) as opened:
        seen = []
        for part, number in (("train", 3), ("test", 2)):
            group = {name: values[:] for name, values in opened[part].items() if name != "sample"}
            assert group["inputs"].shape == group["targets"].shape == (burgers.NUM_STEPS * number, 2, 32, 48)
            follows = np.flatnonzero(np.diff(group["realization"]) == 0)
            assert np.array_equal(group["inputs"][follows + 1], group["targets"][follows])
            assert np.allclose(np.diff(group["time"])[follows], burgers.STEP_S)
            row = 5
            realization, time_s = int(group["realization"][row]), float(group["time"][row])
            assert np.array_equal(group["inputs"][row], burgers.velocity(realization, time_s).astype("f4"))
            seen.append(set(group["realization"]))
        assert seen == [{0, 1, 2}, {3, 4}]


CODE = """
import json, sys, netCDF4, xarray
found = {}
with netCDF4.Dataset(sys.argv[1]) as file:
    inputs = file["train/inputs"]
    found["dimensions"] = inputs.dimensions
    found["units"] = [inputs.units, file["x"].units, file["train/time"].units]
    found["conventions"] = file.Conventions
    found["sum"] = float(inputs[:].astype("f8").sum())
whole = xarray.open_datatree(sys.argv[1], engine="netcdf4")
train = whole["train"]
found["coordinates"] = sorted(train.coords)
found["at"] = float(train.inputs.isel(sample=3).sel(component=1, x=0.5, y=0.25))
found["later"] = float(train.targets.where(train.realization == 1, drop=True).isel(sample=0).sel(component=0, x=0, y=0))
print(json.dumps(found))
"""


def test_netcdf4_and_xarray_open_it(file: Path) -> None:
    """In a child process: their wheels bring an HDF5 library of their own."""
    done = subprocess.run([sys.executable, "-c", CODE, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["dimensions"] == ["sample", "component", "y", "x"]
    assert found["units"] == ["m s-1", "m", "s"] and found["conventions"] == "CF-1.10"
    assert set(found["coordinates"]) == {"component", "realization", "time", "x", "y"}
    with h5py.File(file) as opened:
        assert found["sum"] == pytest.approx(opened["train/inputs"][:].astype("f8").sum())
        assert found["at"] == opened["train/inputs"][3, 1, 8, 16]
        assert found["later"] == opened["train/targets"][4, 0, 0, 0]


def test_the_file_has_no_faults_and_an_own_origin_is_refused(file: Path) -> None:
    checked = check([file], ALONE, quiet=True)
    assert not checked.faults and not checked.warnings
    with pytest.raises(UserError, match="prepare burgers takes no --from"):
        prepare("burgers", Path("x"), file.with_name("other.nc"), ALONE)
