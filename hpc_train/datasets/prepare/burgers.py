"""Fields of the two-dimensional Burgers equation, whose solution is known exactly: a netCDF-4 file to learn on.

    du/dt + (u . grad) u = viscosity * laplace(u)

By the Cole-Hopf transformation (Hopf, "The partial differential equation u_t + u u_x = mu u_xx", 1950; Cole, 1951)
u = -2 viscosity grad(phi) / phi solves it for every positive solution phi of the heat equation, and a Fourier mode of
wave number k of phi only decays: by exp(-viscosity k^2 t). In a mean wind U the same happens at x - U t. The velocity
at any time follows from the initial field at once: no steps in time, and no errors of such steps.
"""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.datasets.prepare.netcdf import Netcdf
from hpc_train.datasets.prepare.sources import Array, Source, in_memory

CELLS = (32, 48)  # along y and x
LENGTHS_M = (1.0, 1.5)
VISCOSITY_M2_S = 0.02  # of less, phi would range over more than the digits of a number
STEP_S = 0.05
NUM_STEPS = 4  # pairs of one realization: from the initial field on
NUM_REALIZATIONS = {"train": 480, "test": 80}  # none is in both parts
_FINER = 4  # phi has steep slopes: its modes are those of a grid so many times as fine
_SPEED_M_S = 1.0  # root mean square of each initial field, without the mean wind
_WIND_M_S = 0.5  # standard deviation of each component of the mean wind
_MOST_WAVES = 3  # along each axis, in an initial field
_SEED = 0


def burgers(origin: Path | None) -> Source:
    """Velocities u and v at a time, and a step later: 480 realizations to train on and 80 others to test on."""
    if origin is not None:
        raise UserError("prepare burgers takes no --from", "Its fields are computed.")
    arrays = {}
    for part, number in NUM_REALIZATIONS.items():
        first = 0 if part == "train" else NUM_REALIZATIONS["train"]
        shape = (number * NUM_STEPS, 2, *CELLS)
        for name, later in (("inputs", 0), ("targets", 1)):
            arrays[f"{part}/{name}"] = Array(shape, np.dtype(np.float32), partial(_rows, first, later))
        realizations, steps = np.divmod(np.arange(shape[0]), NUM_STEPS)
        arrays[f"{part}/realization"] = in_memory((first + realizations).astype(np.int32))
        arrays[f"{part}/time"] = in_memory(steps * STEP_S)
    origin_told = "computed: Fourier modes after a Cole-Hopf transformation"
    attributes = {"viscosity": VISCOSITY_M2_S, "viscosity_units": "m2 s-1", "step": STEP_S, "step_units": "s"}
    return Source("Burgers equation, 2-D", origin_told, "CC0-1.0", arrays, attributes, "fields", netcdf=_netcdf(arrays))


def _netcdf(arrays: dict[str, Array]) -> Netcdf:
    y, x = ((np.arange(cells) * length / cells) for cells, length in zip(CELLS, LENGTHS_M, strict=True))
    attributes = {
        "x": {"units": "m", "axis": "X", "long_name": "distance along x, periodic"},
        "y": {"units": "m", "axis": "Y", "long_name": "distance along y, periodic"},
        "component": {"long_name": "component of the velocity: 0 along x, 1 along y"},
    }
    told: dict[str, dict[str, Any]] = {
        "inputs": {"units": "m s-1", "long_name": "velocity", "coordinates": "realization time"},
        "targets": {
            "units": "m s-1",
            "long_name": "velocity one step later",
            "coordinates": "realization time",
            "names": ["u", "v"],
        },
        "realization": {"units": "1", "standard_name": "realization", "long_name": "number of the initial field"},
        "time": {"units": "s", "long_name": "time of the inputs since the initial field"},
    }
    return Netcdf(
        dimensions={name: ("sample", "component", "y", "x")[: len(array.shape)] for name, array in arrays.items()},
        coordinates={"component": np.arange(2, dtype=np.int8), "y": y, "x": x},
        attributes=attributes | {name: told[name.partition("/")[2]] for name in arrays},
    )


def _rows(first: int, later: int, start: int, stop: int) -> np.ndarray:
    """Rows of a part whose realizations begin at number `first`, `later` steps after the time of the row."""
    rows = np.empty((stop - start, 2, *CELLS), np.float32)
    for row in range(start, stop):
        realization, step = divmod(row, NUM_STEPS)
        rows[row - start] = velocity(first + realization, (step + later) * STEP_S)
    return rows


def velocity(realization: int, time_s: float) -> np.ndarray:
    """(2, *CELLS) the components along x and y at a time, in m/s."""
    (spectrum, (wind_y, wind_x)), (ky, kx) = _initial_state(realization), _wave_numbers()
    decay = np.exp(-VISCOSITY_M2_S * time_s * ky**2) * np.exp(-VISCOSITY_M2_S * time_s * kx**2)
    shift = np.exp(-1j * time_s * wind_y * ky) * np.exp(-1j * time_s * wind_x * kx)
    spectrum = spectrum * decay * shift
    phi = _on_cells(spectrum)
    return np.stack(
        [w - 2 * VISCOSITY_M2_S * _on_cells(1j * k * spectrum) / phi for w, k in ((wind_x, kx), (wind_y, ky))]
    )


@lru_cache(maxsize=2)
def _initial_state(realization: int) -> tuple[np.ndarray, np.ndarray]:
    """The modes of phi at time 0, on the finer grid, and the mean wind along y and x.

    phi = exp(-potential / 2 viscosity), where velocity - wind = grad(potential).
    """
    rng = np.random.default_rng((_SEED, realization))
    wind = _WIND_M_S * rng.standard_normal(2)
    ky, kx = _wave_numbers()
    is_smooth = (np.abs(ky) < _wave_number(0, _MOST_WAVES + 0.5)) & (np.abs(kx) < _wave_number(1, _MOST_WAVES + 0.5))
    noise = np.fft.fft2(rng.standard_normal(is_smooth.shape))
    steepness = np.hypot(ky, kx)
    steepness[0, 0] = 1.0
    modes = np.where(is_smooth, noise, 0.0) / steepness  # of equal strength in velocity
    modes[0, 0] = 0.0
    speeds = [np.fft.ifft2(1j * k * modes).real for k in (ky, kx)]
    potential = np.fft.ifft2(modes).real * _SPEED_M_S / np.sqrt(np.mean(np.square(speeds)))
    return np.fft.fft2(np.exp((potential.min() - potential) / (2 * VISCOSITY_M2_S))), wind


def _wave_numbers() -> tuple[np.ndarray, np.ndarray]:
    """Along y (rows, 1) and x (1, columns) of the finer grid, in radians per metre."""
    waves = (np.fft.fftfreq(_FINER * cells, 1 / (_FINER * cells)) for cells in CELLS)
    ky, kx = (_wave_number(axis, each) for axis, each in enumerate(waves))
    return ky[:, None], kx[None, :]


def _wave_number(axis: int, num_waves: Any) -> Any:
    """Of so many waves along an axis, 0 for y or 1 for x, in radians per metre."""
    return 2 * np.pi * num_waves / LENGTHS_M[axis]


def _on_cells(spectrum: np.ndarray) -> np.ndarray:
    """The field of these modes at every `_FINER`-th point: there, modes apart by a multiple of CELLS look the same."""
    rows, columns = CELLS
    folded = spectrum.reshape(_FINER, rows, _FINER, columns).sum(axis=(0, 2)) / _FINER**2
    return np.asarray(np.fft.ifft2(folded).real)
