"""Tasks that read in some blocks of steps and get the same samples again and again from memory in the others.

The two kinds of steps are interleaved in one run, so that what slows the machine slows both.
"""

from typing import Any

import numpy as np

from hpc_train.core.settings import Config
from hpc_train.train.comm.context import Context
from hpc_train.train.tasks.classification import Classification
from hpc_train.train.tasks.language import Language


def reads(step: int, block: int) -> bool:
    """Whether `step` reads the file."""
    return step // block % 2 == 0


def edge(block: int) -> int:
    """Steps at both ends of a block that do not count: batches made ahead are of the next block."""
    return block // 3


class _Alternating:
    """A task whose block of steps is train.log_every, so that what is said comes at a block's end."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)  # type: ignore[call-arg]
        self._block, self._made = config.train.log_every, dict[int, Any]()

    def batch(self, rows: np.ndarray, step: int) -> Any:
        if reads(step, self._block):
            return super().batch(rows, step)  # type: ignore[misc]
        if len(rows) not in self._made:
            self._made[len(rows)] = super().batch(rows, step)  # type: ignore[misc]
        return self._made[len(rows)]


class Pictures(_Alternating, Classification):
    pass


class Text(_Alternating, Language):
    pass
