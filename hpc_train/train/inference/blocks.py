"""Which rows are computed at once, and by which rank: blocks that do not depend on the number of ranks.

A model's numbers depend, in their last bits, on how many rows it computes at once and on the number of threads. A block
is therefore the same rows on any number of ranks, and one thread computes it; a rank works on as many blocks at once as
it has threads.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Blocks:
    """`rows` of a file in blocks of `batch` rows, counted from the file's first row; the ends may cut one.

    Ranks take turns at stripes of neighbouring blocks, so that they do not all decode the same chunk of a file.
    """

    rows: range
    batch: int
    blocks_per_stripe: int

    @property
    def stripe_rows(self) -> int:
        return self.batch * self.blocks_per_stripe

    def stripes_from(self, row: int) -> range:
        """The numbers of the stripes that hold `row` and later rows; none if `row` is past the end."""
        last = -(-self.rows.stop // self.stripe_rows)
        return range(min(row // self.stripe_rows, last), last) if row < self.rows.stop else range(last, last)

    def stripe(self, number: int) -> range:
        """The rows of a stripe."""
        begin, end = number * self.stripe_rows, (number + 1) * self.stripe_rows
        return range(max(begin, self.rows.start), min(end, self.rows.stop))

    def blocks(self, number: int) -> list[range]:
        """The rows of each block of a stripe."""
        rows = self.stripe(number)
        edges = [rows.start, *range((rows.start // self.batch + 1) * self.batch, rows.stop, self.batch), rows.stop]
        return [range(begin, end) for begin, end in pairwise(edges)]


def in_order(pool: ThreadPoolExecutor, items: Iterator[T], compute: Callable[[T], R], num_ahead: int) -> Iterator[R]:
    """The results of `compute` in the order of `items`; up to `num_ahead` items are taken before they are needed."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(compute, item))
        if len(pending) > num_ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
