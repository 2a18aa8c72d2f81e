"""Which rows of a table to test on: one at random in each stratum of n rows, computed without a list of rows."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import SPLIT_MIX_STEP, mix64
from hpc_train.datasets.prepare.sources import Array

_DEFAULT_FRACTION = 0.1


@dataclass(frozen=True)
class TrainTestSplit:
    """One in `every` of `num_rows` rows is for tests; 0: none. Stratum k has the rows from k * every on."""

    num_rows: int
    every: int

    @property
    def num_test(self) -> int:
        if not self.every:
            return 0
        num_whole, rest = divmod(self.num_rows, self.every)
        return num_whole + int(self._test_position(np.array([num_whole]))[0] < rest)

    def _test_position(self, strata: np.ndarray) -> np.ndarray:
        """The position of the test row within each of `strata`: a hash of the stratum's number."""
        return (mix64(strata.astype(np.uint64) * SPLIT_MIX_STEP) % np.uint64(self.every)).astype(np.int64)

    def num_rows_of(self, part: str) -> int:
        return self.num_test if part == "test" else self.num_rows - self.num_test

    def rows_of(self, part: str, start: int, stop: int) -> np.ndarray:
        """The rows of the table that are rows start to stop of `part`, "train" or "test", in ascending order."""
        numbers = np.arange(start, stop)
        if not self.every:
            return numbers
        if part == "test":
            return numbers * self.every + self._test_position(numbers)
        strata, positions = np.divmod(numbers, self.every - 1)
        return strata * self.every + positions + (positions >= self._test_position(strata))

    def split(self, array: Array, name: str, max_rows: int) -> dict[str, Array]:
        """`train/name` and `test/name`, which read about `max_rows` rows of `array` at once."""
        arrays = {}
        for part in ("train", "test"):
            if num := self.num_rows_of(part):
                read = partial(self._read, array, part, max_rows) if self.every else array.read
                arrays[f"{part}/{name}"] = replace(array, shape=(num, *array.shape[1:]), read=read)
        return arrays

    def _read(self, array: Array, part: str, max_rows: int, start: int, stop: int) -> np.ndarray:
        rows = np.empty((stop - start, *array.shape[1:]), array.dtype)
        per_stratum = 1 if part == "test" else self.every - 1
        num_at_once = max(1, max_rows * per_stratum // self.every)
        for first in range(start, stop, num_at_once):
            wanted = self.rows_of(part, first, min(first + num_at_once, stop))
            lowest, highest = int(wanted[0]), int(wanted[-1])
            rows[first - start : first - start + len(wanted)] = array.read(lowest, highest + 1)[wanted - lowest]
        return rows


def train_test_split(num_rows: int, fraction: float | None) -> TrainTestSplit:
    """fraction: 0 (none), or one in a whole number of rows; None: one in ten. Raises `UserError`."""
    fraction = _DEFAULT_FRACTION if fraction is None else fraction
    if fraction == 0:
        return TrainTestSplit(num_rows, 0)
    every = round(1 / fraction) if 0 < fraction <= 0.5 else 0
    if not every or abs(1 / every - fraction) > 1e-3 * fraction:
        raise UserError(
            f"--test-fraction {fraction} is not one in a whole number of rows",
            "Give 0.5, 0.25, 0.2, 0.1, 0.05, 0.01 ..., or 0 for none.",
        )
    return TrainTestSplit(num_rows, every)
