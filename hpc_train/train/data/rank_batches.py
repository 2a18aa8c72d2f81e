"""A rank's share of the samples that a model is measured on."""

from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np

from hpc_train.core.sampling import rank_span, shuffled
from hpc_train.core.world import World

_CHOICE_SEED = 0  # of at_most: runs with other seeds are measured on the same samples


class RankBatches(Iterator[Any]):
    """This rank's equal share of `num` samples, `at_once` a batch, in increasing order of their rows.

    at_most: so many of all samples, the same ones in every run; None: all. num_samples: of all ranks together, of
    num_stored. num_done: of this rank, in the batches so far.
    """

    def __init__(
        self, num: int, world: World, at_once: int, read: Callable[[np.ndarray], Any], at_most: int | None = None
    ) -> None:
        self.num_stored, self.num_samples, self.num_done = num, min(num, at_most or num), 0
        self._at_once, self._read = at_once, read
        self._chosen: np.ndarray | None = None
        if self.num_samples < num:  # not the first ones: files may be sorted
            self._chosen = np.sort(shuffled(np.arange(self.num_samples), num, _CHOICE_SEED, 0))
        self._next, self._stop = rank_span(self.num_samples, world.rank, world.size)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        begin, end = self._next, min(self._next + self._at_once, self._stop)
        if begin >= end:
            raise StopIteration
        self._next, self.num_done = end, self.num_done + end - begin
        return self._read(np.arange(begin, end) if self._chosen is None else self._chosen[begin:end])
