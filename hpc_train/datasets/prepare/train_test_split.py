"""Which rows of a table are kept to test on: one at random in each stratum of n rows, found without a list of them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.datasets.prepare.sources import Array

_DEFAULT = 0.1


@dataclass(frozen=True)
class HeldOut:
    """Of `num_rows` rows, one in `every` is for tests; 0: none is. Strata are [k * every, (k + 1) * every)."""

    num_rows: int
    every: int

    @property
    def num_test(self) -> int:
        if not self.every:
            return 0
        whole, rest = divmod(self.num_rows, self.every)
        return whole + (1 if rest and self._place(np.array([whole]))[0] < rest else 0)

    def _place(self, strata: np.ndarray) -> np.ndarray:
        """The tested row's place in each of `strata`: a hash (the finalizer of SplitMix64, Steele et al., 2014)."""
        z = strata.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) % np.uint64(self.every)).astype(np.int64)

    def is_test(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) bool, of the rows from `start` on."""
        rows = np.arange(start, stop)
        if not self.every:
            return np.zeros(len(rows), bool)
        return rows % self.every == self._place(rows // self.every)

    def parts(self, array: Array, name: str, at_once: int) -> dict[str, Array]:
        """`train/name` and `test/name` of the rows of `array`, of which `at_once` are read together at most."""
        arrays = {}
        for part, num in (("train", self.num_rows - self.num_test), ("test", self.num_test)):
            if num:
                read = self._reader(array, part == "test", at_once)
                arrays[f"{part}/{name}"] = Array((num, *array.shape[1:]), array.dtype, read)
        return arrays

    def _reader(self, array: Array, test: bool, at_once: int) -> Callable[[int, int], np.ndarray]:
        if not self.every:
            return array.read
        per_stratum = 1 if test else self.every - 1

        def read(start: int, stop: int) -> np.ndarray:
            rows = np.empty((stop - start, *array.shape[1:]), array.dtype)
            place = start // per_stratum * self.every  # every stratum before has `per_stratum` rows of this part
            skip, filled = start - start // per_stratum * per_stratum, 0
            while filled < len(rows):
                left = -(-(len(rows) - filled + skip) // per_stratum) * self.every
                end = min(place + min(left, max(1, at_once)), self.num_rows)
                taken = array.read(place, end)[self.is_test(place, end) == test][skip:][: len(rows) - filled]
                skip = max(0, skip - int(np.count_nonzero(self.is_test(place, end) == test)))
                rows[filled : filled + len(taken)] = taken
                filled += len(taken)
                place = end
            return rows

        return read


def held_out(num_rows: int, fraction: float | None) -> HeldOut:
    """`fraction` is 0 (none), or one in a whole number of rows. Raises `UserError`."""
    share = _DEFAULT if fraction is None else fraction
    if share == 0:
        return HeldOut(num_rows, 0)
    every = round(1 / share) if 0 < share <= 0.5 else 0
    if not every or abs(1 / every - share) > 1e-3 * share:
        raise UserError(
            f"--test-fraction {share} is not one in a whole number of rows",
            "Give 0.5, 0.25, 0.2, 0.1, 0.05, 0.01 ..., or 0 for none.",
        )
    return HeldOut(num_rows, every)
