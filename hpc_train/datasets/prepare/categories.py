"""Texts as numbers: which text is which, the same on every rank."""

from collections.abc import Callable
from functools import partial

import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import rank_span
from hpc_train.train.comm.context import Context

_BATCH_ROWS = 1 << 14
_MAX_CATEGORIES = 1000  # more different texts are names or dates


def find_categories(
    read: Callable[[int, int], np.ndarray], num_rows: int, what: str, remedy: str, context: Context
) -> list[str]:
    """Collective. The different texts of `num_rows` rows, sorted; each rank reads a part.

    what, remedy: for the `UserError` of too many, such as "t.csv: column day".
    """
    mine = context.on_all(partial(_of_my_part, read, num_rows, what, remedy, context))
    found = sorted(set().union(*context.all_gather(mine)))
    context.on_all(partial(_require_few, found, what, remedy))
    return found


def _of_my_part(
    read: Callable[[int, int], np.ndarray], num_rows: int, what: str, remedy: str, context: Context
) -> set[str]:
    start, stop = rank_span(num_rows, context.world.rank, context.world.size)
    found: set[str] = set()
    for first in range(start, stop, _BATCH_ROWS):
        found |= set(read(first, min(first + _BATCH_ROWS, stop)).tolist())
        _require_few(sorted(found), what, remedy)
    return found


def _require_few(texts: list[str], what: str, remedy: str) -> None:
    if len(texts) > _MAX_CATEGORIES:
        shown = ", ".join(texts[:3])
        raise UserError(f"{what} holds more than {_MAX_CATEGORIES:,} different texts ({shown}, ...)", remedy)


def numbers_of(texts: np.ndarray, categories: list[str]) -> tuple[np.ndarray, int | None]:
    """(the number of each text, the first that is none of them or None)."""
    known = np.array(categories)
    numbers = np.minimum(np.searchsorted(known, texts), len(known) - 1)
    is_new = known[numbers] != texts
    return numbers, int(np.argmax(is_new)) if is_new.any() else None
