"""The forecast that every other one is compared with: the field stays as it is (persistence)."""

from dataclasses import dataclass

import numpy as np

from hpc_train.core.missing_values import is_missing
from hpc_train.train.comm.context import Context
from hpc_train.train.data.dataset import Split
from hpc_train.train.data.files import Files
from hpc_train.train.data.moments import moments
from hpc_train.train.data.reader_interface import Reader


@dataclass(frozen=True)
class Persistence:
    """input_scale, target_scale: scale and offset of the stored numbers."""

    input_scale: tuple[float, float]
    target_scale: tuple[float, float]

    def mse(
        self, split: Split, pooled: tuple[int, ...], context: Context, missing: tuple[float, ...] = ()
    ) -> np.ndarray:
        """Collective. Its mean square error, in the stored unit of the targets; each rank reads a part.

        pooled: axes of a target whose numbers count as one; they have size 1 in the result. missing: stored numbers
        that stand for no target.
        """
        found = moments(_Changes(self, split, missing), (), context, pooled)
        return np.asarray(found.mean**2 + found.std**2)


def find_persistence(files: Files, inputs: str, targets: str, split: Split) -> Persistence | None:
    """None if targets cannot be later states of the inputs: other shapes than fields of one, or of two units."""
    if split.input_shape != tuple(split.targets.shape[1:]) or len(split.input_shape) < 2:
        return None
    units = [files.units(name) for name in (inputs, targets)]
    if None not in units and units[0] != units[1]:
        return None
    return Persistence(files.scale(inputs), files.scale(targets))


class _Changes(Reader):
    """By how much targets differ from inputs, in the stored unit of the targets; NaN where one of them is missing."""

    def __init__(self, persistence: Persistence, split: Split, missing_targets: tuple[float, ...]) -> None:
        self._persistence, self._inputs, self._targets = persistence, split.inputs[0], split.targets
        self._missing, self._missing_targets = split.filling.values if split.filling else (), missing_targets
        self.shape, self.dtype = tuple(split.targets.shape), np.dtype(np.float64)

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        targets, inputs = self._targets.take(rows), _known(self._inputs.take(rows), self._missing)
        (scale, offset), (unit, origin) = self._persistence.input_scale, self._persistence.target_scale
        return _known(targets, self._missing_targets) - (inputs * scale + offset - origin) / unit


def _known(stored: np.ndarray, missing: tuple[float, ...]) -> np.ndarray:
    return np.where(is_missing(stored, missing), np.nan, stored.astype(np.float64))
