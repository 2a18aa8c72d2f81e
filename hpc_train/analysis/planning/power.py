"""Joules of a plan: from the power of a node, which depends on its load, and the predicted time."""

from dataclasses import dataclass, replace

import numpy as np

from hpc_train.analysis.models.measurements import Measurements
from hpc_train.analysis.stats.repeats import NORMAL_95
from hpc_train.core.formatting import plural, significant
from hpc_train.core.records import FloatArray

LEAST_POWER_ERROR = 0.02
_MOST_MISS = NORMAL_95 * LEAST_POWER_ERROR  # of a fit that tells what was measured
# Estimated by `tests/benchmarks/plan_power.py` on published series, all of one source: which share of its power above
# idle a node saves while its ranks wait, and the relative drift of its power in one doubling of the nodes.
SAVED_WHILE_WAITING = 0.2
POWER_DRIFT = 0.07
_SAVED_GRID = np.linspace(0.0, 1.0, 201)
_NOISE_GRID = np.geomspace(0.001, 0.3, 24)  # of one measured power, relative
_USUAL_NOISE = 0.03
_LEAST_SHOWN = 0.05  # range of loads that says something of the power while waiting


@dataclass(frozen=True)
class Power:
    """Joules = nodes x time x (waiting_w + (busy_w - waiting_w) x load).

    load: samples/s of a node, over the most that was measured; 1 at most. waiting_w lies between the power of an idle
    node, if that is known, and busy_w: ranks that wait for a message poll for it, which costs nearly as much as work.
    """

    busy_w: float  # of one node
    waiting_w: float  # of one node whose ranks only wait
    waiting_error_w: float  # standard deviation
    full_rate: float  # samples/s of one node
    most_nodes: float  # measured
    relative_error: float
    quality: str  # measured | estimated
    assumed: str  # how the two were separated
    # Measured over fitted power at numbers of nodes, ascending; (1,) if the fit tells all that was measured.
    at_nodes: tuple[float, ...] = (1.0,)
    shifts: tuple[float, ...] = (1.0,)

    @property
    def worst(self) -> tuple[float, float]:
        """(nodes, measured over fitted power) where the fit is off most; (1, 1) if it tells all that was measured."""
        return max(zip(self.at_nodes, self.shifts, strict=True), key=lambda pair: abs(np.log(pair[1])))

    def joules(self, nodes: FloatArray, time_s: FloatArray, samples: FloatArray) -> FloatArray:
        """Through the measured sizes where the fit contradicts them, shifted as between them, or as at the nearest."""
        load = self._load(nodes, time_s, samples)
        shift = np.interp(np.log2(nodes), np.log2(self.at_nodes), self.shifts)
        return np.asarray(nodes * time_s * (self.waiting_w + (self.busy_w - self.waiting_w) * load) * shift)

    def error(self, nodes: FloatArray, time_s: FloatArray, samples: FloatArray) -> FloatArray:
        """Relative standard deviation of `joules` for a time that is known."""
        waiting = (1 - self._load(nodes, time_s, samples)) * nodes * time_s * self.waiting_error_w
        doublings = np.log2(np.maximum(nodes / self.most_nodes, 1.0))
        known = self.relative_error**2 + POWER_DRIFT**2 * doublings
        return np.asarray(np.sqrt(known + (waiting / self.joules(nodes, time_s, samples)) ** 2))

    def _load(self, nodes: FloatArray, time_s: FloatArray, samples: FloatArray) -> FloatArray:
        return np.asarray(np.minimum(samples / np.maximum(nodes * time_s * self.full_rate, 1e-300), 1.0))


def power(measurements: Measurements) -> Power | None:
    """The power of a node as the meters told it at the measured sizes; None if they told nothing."""
    is_known = measurements.joules_per_step > 0  # nan is missing
    if not is_known.any():
        return None
    nodes = measurements.nodes(measurements.ranks)[is_known]
    node_s = nodes * measurements.step_s[is_known]
    watts = measurements.joules_per_step[is_known] / node_s
    rates = measurements.samples(measurements.ranks)[is_known] / node_s
    full_rate = float(rates.max())
    idle_w = min(measurements.idle_w or 0.0, float(watts.min()))
    busy_w, saved, saved_error, noise = _fitted(watts, idle_w, rates / full_rate)
    waiting_w = busy_w - saved * (busy_w - idle_w)
    draws = f"a node draws {significant(busy_w)} W at its most samples/s and {significant(waiting_w)} W while it waits"
    shown = float(rates.min()) < (1 - _LEAST_SHOWN) * full_rate
    why = f"fitted to {plural(len(watts), 'size')}" if shown else "of which the measured sizes show the first alone"
    found = Power(
        busy_w,
        waiting_w,
        saved_error * (busy_w - idle_w),
        full_rate,
        float(nodes.max()),
        max(noise, LEAST_POWER_ERROR),
        measurements.energy_quality,
        f"{draws}, {why}",
    )
    return _shifted(found, nodes.astype(float), measurements.step_s[is_known], watts, rates * node_s)


def _shifted(found: Power, nodes: FloatArray, step_s: FloatArray, watts: FloatArray, samples: FloatArray) -> Power:
    """As it was if it tells the measured power up to the error of meters."""
    ratios = watts * nodes * step_s / found.joules(nodes, step_s, samples)
    at_nodes = np.unique(nodes)
    shifts = np.array([ratios[nodes == each].mean() for each in at_nodes])
    if np.abs(shifts - 1).max() <= _MOST_MISS:
        return found
    return replace(found, at_nodes=tuple(at_nodes.tolist()), shifts=tuple(shifts.tolist()))


def _fitted(watts: FloatArray, idle_w: float, load: FloatArray) -> tuple[float, float, float, float]:
    """(watts of a busy node, the share above idle that it saves while it waits, that share's error, relative noise).

    The posterior means on a grid: the share is normal around `SAVED_WHILE_WAITING`, with as large a deviation, the
    noise half-Cauchy; for each of them the busy power is the one that fits best.
    """
    saved, noise = _SAVED_GRID[:, None, None], _NOISE_GRID[None, :, None]
    above_idle = 1 - saved * (1 - load)  # of (busy - idle), at each size
    wanted = np.mean((watts - idle_w) * above_idle / watts**2, axis=2, keepdims=True)
    busy = wanted / np.mean((above_idle / watts) ** 2, axis=2, keepdims=True)
    missed = (idle_w + busy * above_idle) / watts - 1
    log_weights = -np.sum(missed**2 / noise**2 / 2 + np.log(noise), axis=2)
    log_weights -= (_SAVED_GRID[:, None] / SAVED_WHILE_WAITING - 1) ** 2 / 2
    log_weights += np.log(_NOISE_GRID) - np.log1p((_NOISE_GRID / _USUAL_NOISE) ** 2)
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    mean = float(np.sum(weights * _SAVED_GRID[:, None]))
    error = float(np.sqrt(np.sum(weights * (_SAVED_GRID[:, None] - mean) ** 2)))
    busy_w = idle_w + float(np.sum(weights * busy[:, :, 0]))
    return busy_w, mean, error, float(np.sum(weights * _NOISE_GRID))
