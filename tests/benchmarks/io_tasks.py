"""Tasks that read in some blocks of steps and get the same samples again and again from memory in the others.

The two kinds of steps are interleaved in one run, so that what slows the machine slows both.
"""

from functools import cached_property
from typing import Any

import numpy as np

from hpc_train.train.tasks.classification import Classification
from hpc_train.train.tasks.language import Language

BLOCK = 24  # steps
EDGE = 8  # steps at both ends of a block that do not count: batches made ahead are of the next block


def reads(step: int) -> bool:
    """Whether `step` reads the file."""
    return step // BLOCK % 2 == 0


class _Alternating:
    @cached_property
    def _made(self) -> dict[int, Any]:
        return {}

    def batch(self, rows: np.ndarray, step: int) -> Any:
        if reads(step):
            return super().batch(rows, step)  # type: ignore[misc]
        if len(rows) not in self._made:
            self._made[len(rows)] = super().batch(rows, step)  # type: ignore[misc]
        return self._made[len(rows)]


class Pictures(_Alternating, Classification):
    pass


class Text(_Alternating, Language):
    pass
