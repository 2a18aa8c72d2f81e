"""Which samples, in which order, for which rank: pure functions of (seed, epoch, global batch).

Nothing is stored and nothing is drawn: the sample at a position of an epoch's order is computed, so any step on
any number of ranks finds its samples in time and memory proportional to its own share of the batch, whether the
data set holds a thousand samples or a trillion. Resuming needs no generator state.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import groupby

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
_ROUNDS = 4  # of a Feistel network: enough for a pseudo-random permutation (Luby and Rackoff, SIAM J. Comput. 1988)
_POSITIONS_AT_ONCE = 8192


@dataclass(frozen=True)
class GlobalBatch:
    """Positions [start, stop) of epoch `epoch`'s order: what all ranks together train on in one step."""

    epoch: int
    start: int
    stop: int

    @property
    def num_samples(self) -> int:
        return self.stop - self.start


def global_batch(step: int, num_samples: int, batch_size: int) -> GlobalBatch:
    """The global batch of `step`. An epoch's last batch is short when `batch_size` does not divide the data."""
    steps_per_epoch = -(-num_samples // batch_size)
    epoch, index = divmod(step, steps_per_epoch)
    return GlobalBatch(epoch, index * batch_size, min((index + 1) * batch_size, num_samples))


def rank_span(count: int, rank: int, size: int) -> tuple[int, int]:
    """[start, stop) of rank's share of `count` things: contiguous, in rank order, sizes differing by at most one."""
    small, num_larger = divmod(count, size)
    start = rank * small + min(rank, num_larger)
    return start, start + small + (rank < num_larger)


def rank_batches(
    steps: range, num_samples: int, batch_size: int, seed: int, rank: int, size: int
) -> Iterator[tuple[Indices, int]]:
    """For each of `steps`: the rows of `rank_samples`, and the samples of the whole global batch.

    Several steps are computed at once: a call on few positions costs as much as one on hundreds.
    """
    at_once = max(1, _POSITIONS_AT_ONCE * size // batch_size)
    for first in range(0, len(steps), at_once):
        batches = [global_batch(step, num_samples, batch_size) for step in steps[first : first + at_once]]
        for epoch, same in groupby(batches, key=lambda batch: batch.epoch):
            group = list(same)
            shares = [_share(batch, rank, size) for batch in group]
            rows = shuffled(np.concatenate([np.arange(*share) for share in shares]), num_samples, seed, epoch)
            ends = np.cumsum([stop - start for start, stop in shares])
            yield from zip(np.split(rows, ends[:-1]), (batch.num_samples for batch in group), strict=True)


def _share(batch: GlobalBatch, rank: int, size: int) -> tuple[int, int]:
    """[start, stop) of rank's positions in the epoch's order."""
    start, stop = rank_span(batch.num_samples, rank, size)
    return batch.start + start, batch.start + stop


def rank_samples(batch: GlobalBatch, num_samples: int, seed: int, rank: int, size: int) -> Indices:
    """The rows of the data set that `rank` of `size` trains on in `batch`; may be empty in an epoch's last batch."""
    return shuffled(np.arange(*_share(batch, rank, size)), num_samples, seed, batch.epoch)


def shuffled(positions: npt.NDArray[np.integer], num_samples: int, seed: int, epoch: int) -> Indices:
    """Rows standing at `positions` of epoch `epoch`'s order: a keyed bijection of [0, num_samples).

    A Feistel network on the grid Z_a x Z_b, a and b about sqrt(num_samples), with modular addition instead of
    exclusive-or; the few points beyond num_samples walk on along their cycle (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", CT-RSA 2002).
    """
    a = max(1, int(np.ceil(np.sqrt(num_samples))))
    b = -(-num_samples // a)
    keys = _round_keys(seed, epoch)
    points = _feistel(positions.astype(np.uint64), a, b, keys)
    while (outside := points >= num_samples).any():
        points[outside] = _feistel(points[outside], a, b, keys)
    return points.astype(np.int64)


def noise_seed(seed: int, step: int, rank: int) -> int:
    """A seed of 64 bits for what `rank` draws in `step`: dropout, augmentation."""
    return int.from_bytes(blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest())


def row_noise(seed: int, step: int, rows: npt.NDArray[np.integer], num: int) -> npt.NDArray[np.uint64]:
    """`num` times 64 random bits for each of `rows`, (rows, num): functions of (seed, step, row), whatever the rank.

    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), begun anew for each row.
    """
    key = np.uint64(int.from_bytes(blake2b(f"rows {seed} {step}".encode(), digest_size=8).digest()))
    states = _mix(rows.astype(np.uint64) ^ key)
    return _mix(states[:, None] + np.arange(1, num + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def drawn(rows: Indices, bound: int, seed: int) -> Indices:
    """For each row a number of [0, bound): what that sample draws, whichever rank holds it."""
    return (row_noise(seed, 0, rows, 1)[:, 0] % np.uint64(bound)).astype(np.int64)


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    return tuple(np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64))


def _feistel(points: npt.NDArray[np.uint64], a: int, b: int, keys: tuple[np.uint64, ...]) -> npt.NDArray[np.uint64]:
    left, right = points // np.uint64(b), points % np.uint64(b)
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mix(right ^ even) % np.uint64(a)) % np.uint64(a)
        right = (right + _mix(left ^ odd) % np.uint64(b)) % np.uint64(b)
    return left * np.uint64(b) + right


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
