"""Which samples, in which order, on which rank: pure functions of (seed, epoch, step, shares).

Nothing is stored and nothing is drawn: the sample at a position of an epoch's order is computed. Any step on any
number of ranks finds its samples in time and memory proportional to the rank's share of the batch, whether the data
set has a thousand samples or a trillion, and resuming needs no generator state. (Data in chunks take memory for each
chunk, and at each step time for the whole global batch.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from hashlib import blake2b
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
_ROUNDS = 4  # of a Feistel network: enough for a pseudo-random permutation (Luby and Rackoff, SIAM J. Comput. 1988)
SPLIT_MIX_STEP = np.uint64(0x9E3779B97F4A7C15)  # between the states of SplitMix64
_POSITIONS_AT_ONCE = 8192


@dataclass(frozen=True)
class GlobalBatch:
    """Positions [start, stop) of epoch `epoch`'s order: what all ranks together train on in `step`."""

    step: int
    epoch: int
    start: int
    stop: int

    @property
    def num_samples(self) -> int:
        return self.stop - self.start


def global_batch(step: int, num_samples: int, batch_size: int) -> GlobalBatch:
    """The global batch of `step`. An epoch's last batch is short when `batch_size` does not divide the data."""
    epoch, index = divmod(step, steps_per_epoch(num_samples, batch_size))
    return GlobalBatch(step, epoch, index * batch_size, min((index + 1) * batch_size, num_samples))


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """An epoch takes each sample once. Its last step is short when `batch_size` does not divide the data."""
    return -(-num_samples // batch_size)


def rank_span(count: int, rank: int, size: int) -> tuple[int, int]:
    """[start, stop) of rank's equal share of `count` items: contiguous, in rank order, sizes differ by at most one."""
    small, num_larger = divmod(count, size)
    start = rank * small + min(rank, num_larger)
    return start, start + small + (rank < num_larger)


@dataclass(frozen=True)
class Shares:
    """How a global batch is divided over the ranks: a weight for each, from a step on.

    size: the number of ranks. changes: (the first step, a weight for each rank), in the order of steps. Before the
    first change, and if there is none, the shares are equal: their sizes differ by at most one.
    """

    size: int
    changes: tuple[tuple[int, tuple[float, ...]], ...] = ()

    def change(self, step: int, weights: Sequence[float]) -> "Shares":
        """These shares before `step`; from `step` on, shares in proportion to `weights`, which are not negative."""
        assert len(weights) == self.size and min(weights) >= 0 < sum(weights), weights
        before = [change for change in self.changes if change[0] < step]
        return replace(self, changes=(*before, (step, tuple(weights))))

    def span(self, step: int, count: int, rank: int) -> tuple[int, int]:
        """[start, stop) of rank's share of the `count` samples of `step`: contiguous, in rank order; may be empty."""
        weights = next((weights for first, weights in reversed(self.changes) if first <= step), None)
        if weights is None:
            return rank_span(count, rank, self.size)
        ends = _largest_remainders(count, weights)
        return ends[rank], ends[rank + 1]


@lru_cache(maxsize=64)
def _largest_remainders(count: int, weights: tuple[float, ...]) -> tuple[int, ...]:
    """0 and where each share of `count` ends, in proportion to `weights`.

    What rounding down leaves goes to the largest remainders, of equal ones to the lower rank (Hamilton's method).
    """
    # Exact arithmetic: if ranks rounded differently, a sample would be trained on twice or not at all.
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    quotas = [count * weight / total for weight in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(counts)), key=lambda rank: counts[rank] - quotas[rank])
    for rank in by_remainder[: count - sum(counts)]:
        counts[rank] += 1
    return tuple(accumulate(counts, initial=0))


@dataclass(frozen=True, eq=False)
class Order:
    """In which order an epoch visits the samples: all mixed, or chunk by chunk.

    Samples stored in compressed chunks are read chunk by chunk: the chunks are visited in a shuffled order, and samples
    are mixed within `window` chunks. chunk_edges: the first row of each chunk, and the end; None without chunks.
    """

    num_samples: int
    chunk_edges: Indices | None = None
    window: int = 1

    def __str__(self) -> str:
        if self.chunk_edges is None:
            return "all samples mixed"
        return f"{len(self.chunk_edges) - 1} chunks, samples mixed within {self.window}"

    @cached_property
    def _chunk_order_cache(self) -> dict[tuple[int, int], tuple[Indices, Indices]]:
        return {}

    @property
    def num_window_samples(self) -> int:
        """About how many samples are mixed with each other."""
        if self.chunk_edges is None:
            return self.num_samples
        return min(self.num_samples, -(-self.num_samples * self.window // (len(self.chunk_edges) - 1)))

    def steps_ahead(self, batch_size: int) -> int:
        """How many batches ahead rows are prefetched: the next window's, before this one's are all read."""
        return self.num_window_samples // batch_size + 2

    def rows(self, positions: npt.NDArray[np.integer], seed: int, epoch: int) -> Indices:
        """The rows of the data set at `positions` of epoch `epoch`'s order."""
        if self.chunk_edges is None:
            return shuffled(positions, self.num_samples, seed, epoch)
        chunks, ends = self._chunks_of(self.chunk_edges, seed, epoch)
        window_ends = ends[self.window - 1 :: self.window]
        # The window of each position, its first position and its size; a permutation within it; then chunk and row.
        windows = np.searchsorted(window_ends, positions, "right")
        firsts = windows * self.window
        begins = np.where(firsts > 0, ends[firsts - 1], 0)
        counts = ends[np.minimum(firsts + self.window, len(ends)) - 1] - begins
        window_keys = mix64(windows.astype(np.uint64) + np.uint64(1))
        keys = mix64(_round_keys(seed, epoch)[:, None] ^ window_keys)
        mixed = begins + _permuted(positions - begins, counts.astype(np.uint64), keys)
        slots = np.searchsorted(ends, mixed, "right")
        return self.chunk_edges[chunks[slots] + 1] - (ends[slots] - mixed)

    def window_ends(self, seed: int, epoch: int) -> Indices:
        """The position at which each window of epoch `epoch` ends."""
        if self.chunk_edges is None:
            return np.array([self.num_samples])
        _, ends = self._chunks_of(self.chunk_edges, seed, epoch)
        return np.append(ends[self.window - 1 : -1 : self.window], self.num_samples)

    def window_spans(self, window: int, seed: int, epoch: int) -> list[tuple[int, int]]:
        """[start, stop) of the rows that this window of epoch `epoch` mixes: of each chunk, increasing."""
        if self.chunk_edges is None:
            return [(0, self.num_samples)]
        chunks, _ = self._chunks_of(self.chunk_edges, seed, epoch)
        mixed = np.sort(chunks[window * self.window : (window + 1) * self.window])
        return list(zip(self.chunk_edges[mixed].tolist(), self.chunk_edges[mixed + 1].tolist(), strict=True))

    def _chunks_of(self, edges: Indices, seed: int, epoch: int) -> tuple[Indices, Indices]:
        """(the chunks in the epoch's order, the position at which each ends)."""
        found = self._chunk_order_cache.get((seed, epoch))
        if found is None:
            num_chunks = len(edges) - 1
            chunks = shuffled(np.arange(num_chunks), num_chunks, seed, epoch)
            found = chunks, np.cumsum(np.diff(edges)[chunks])
            while len(self._chunk_order_cache) > 1:  # two are kept: batches are made ahead across the end of an epoch
                self._chunk_order_cache.pop(next(iter(self._chunk_order_cache)))
            self._chunk_order_cache[seed, epoch] = found
        return found


def regular_chunk_edges(num_samples: int, chunk: int) -> Indices:
    """The edges of `num_samples` rows in chunks of `chunk` rows, the last of which may be shorter."""
    return np.append(np.arange(0, num_samples, chunk), num_samples)


class RankBatch(NamedTuple):
    """The rows of the data set that a rank trains on in a step, and the number of samples on all ranks."""

    rows: Indices
    num_global: int


@dataclass(frozen=True, eq=False)
class BatchSampler:
    """Which rows `rank` trains on at each step: a pure function of these values. Without shares, one rank has all."""

    order: Order
    batch_size: int  # of all ranks together
    seed: int
    shares: Shares = Shares(1)
    rank: int = 0

    def batch(self, step: int) -> RankBatch:
        """What this rank trains on in `step`; its rows may be none, as in an epoch's short last batch."""
        return next(self.batches(range(step, step + 1)))

    def batches(self, steps: range) -> Iterator[RankBatch]:
        """`batch` of each of `steps`, computed for many at once: a few positions cost as much as hundreds."""
        num_ranks = 1 if self.order.chunk_edges is not None else self.shares.size
        num_steps = max(1, _POSITIONS_AT_ONCE * num_ranks // self.batch_size)
        for first in range(0, len(steps), num_steps):
            some = steps[first : first + num_steps]
            batches = [global_batch(step, self.order.num_samples, self.batch_size) for step in some]
            for epoch, same in groupby(batches, key=lambda batch: batch.epoch):
                yield from self._batches_of(epoch, list(same))

    def _batches_of(self, epoch: int, batches: Sequence[GlobalBatch]) -> Iterator[RankBatch]:
        """This rank's part of each of these global batches of one epoch."""
        by_chunks = self.order.chunk_edges is not None
        spans = [self.shares.span(batch.step, batch.num_samples, self.rank) for batch in batches]
        # A rank's part of a batch in chunk order is a part of the batch's sorted rows, so it needs all of them.
        needed = [(0, batch.num_samples) for batch in batches] if by_chunks else spans
        positions = [batch.start + np.arange(*span) for batch, span in zip(batches, needed, strict=True)]
        ends = np.cumsum([len(each) for each in positions])
        rows = np.split(self.order.rows(np.concatenate(positions), self.seed, epoch), ends[:-1])
        for batch, span, found in zip(batches, spans, rows, strict=True):
            # Sorted, a rank stays with the same chunks as long as a window of the order lasts.
            yield RankBatch(np.sort(found)[slice(*span)] if by_chunks else found, batch.num_samples)


def shuffled(positions: npt.NDArray[np.integer], num_samples: int, seed: int, epoch: int) -> Indices:
    """The rows at `positions` of epoch `epoch`'s order: a keyed permutation of [0, num_samples)."""
    return _permuted(positions, np.asarray(num_samples, np.uint64), _round_keys(seed, epoch))


def _permuted(positions: npt.NDArray[np.integer], counts: Words, keys: Words) -> Indices:
    """Each position of [0, count) under a keyed permutation; counts and keys: one for each position, or for all.

    A Feistel network on the grid Z_a x Z_b, a and b about sqrt(count), with modular addition instead of
    exclusive-or; the few points beyond count are mapped again until they are inside (cycle walking: Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).
    """
    a = np.maximum(np.ceil(np.sqrt(counts)).astype(np.uint64), np.uint64(1))
    b = (counts + a - np.uint64(1)) // a
    points = _feistel(positions.astype(np.uint64), a, b, keys)
    while (outside := points >= counts).any():
        theirs = (a[outside], b[outside], keys[:, outside]) if counts.ndim else (a, b, keys)
        points[outside] = _feistel(points[outside], *theirs)
    return points.astype(np.int64)


def noise_seed(seed: int, step: int, rank: int) -> int:
    """A 64-bit seed for the random numbers of `rank` in `step`: dropout, augmentation."""
    return int.from_bytes(blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest())


HOLD_OUT = -1  # in place of a step: numbers that say which rows are held out


def row_noise(seed: int, step: int, rows: npt.NDArray[np.integer], num: int) -> npt.NDArray[np.uint64]:
    """`num` random 64-bit numbers for each of `rows`, (rows, num): functions of (seed, step, row), whatever the rank.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), with a state of its own for each row.
    """
    key = np.uint64(int.from_bytes(blake2b(f"rows {seed} {step}".encode(), digest_size=8).digest()))
    states = mix64(rows.astype(np.uint64) ^ key)
    return mix64(states[:, None] + np.arange(1, num + 1, dtype=np.uint64) * SPLIT_MIX_STEP)


def positions_in(values: Indices, wanted: Indices) -> Indices:
    """The index of each of `wanted` in the increasing `values`. Raises `LookupError` for one that is not there."""
    found = np.searchsorted(values, wanted)
    is_there = found < len(values)
    is_there[is_there] = values[found[is_there]] == wanted[is_there]
    if not is_there.all():
        raise LookupError(int(wanted[~is_there][0]))
    return found


def require_rows(rows: Indices, num_rows: int) -> None:
    """Raises `IndexError` if one of `rows` is not in [0, num_rows): numpy would count from the end, or clip."""
    if len(rows) and (rows.min() < 0 or rows.max() >= num_rows):
        wrong = rows[(rows < 0) | (rows >= num_rows)][0]
        raise IndexError(f"row {wrong} of {num_rows}")


def random_below(rows: Indices, bound: int, seed: int) -> Indices:
    """A random number of [0, bound) for each row: the same on whichever rank."""
    return (row_noise(seed, 0, rows, 1)[:, 0] % np.uint64(bound)).astype(np.int64)


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> Words:
    return np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64).astype(np.uint64)


def _feistel(points: Words, a: Words, b: Words, keys: Words) -> Words:
    left, right = points // b, points % b
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        left = (left + mix64(right ^ even) % a) % a
        right = (right + mix64(left ^ odd) % b) % b
    return left * b + right


def mix64(x: Words) -> Words:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
