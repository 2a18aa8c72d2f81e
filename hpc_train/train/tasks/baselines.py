"""Models that only count tokens: baselines for a trained model, on the same text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpc_train.core.sampling import positions_in, rank_span
from hpc_train.train.comm.context import Context

_BLOCK_TOKENS = 1 << 22  # counted at once


@dataclass(frozen=True)
class Bigrams:
    """A bigram model's losses, in nats, for the pairs in a test text: (a, b) has the code a * vocab_size + b."""

    codes: np.ndarray  # increasing
    losses: np.ndarray
    vocab_size: int

    def loss(self, windows: np.ndarray) -> float:
        """The sum of the losses of all tokens of (n, length + 1) windows except the first of each window."""
        codes = _codes(windows[:, :-1], windows[:, 1:], self.vocab_size)
        return float(self.losses[positions_in(self.codes, codes.reshape(-1))].sum())


def count_bigrams(train: Any, test: Any, vocab_size: int, context: Context) -> Bigrams:
    """Collective. A bigram model with Witten-Bell smoothing, counted on `train`, for the pairs of `test`.

    With c(a, b) pairs, c(a) pairs that begin with a, and T(a) different tokens after a,
    p(b|a) = (c(a, b) + T(a) p(b)) / (c(a) + T(a)), and p(b) likewise from single tokens and the uniform distribution
    (Witten and Bell, "The Zero-Frequency Problem", IEEE Trans. Inf. Theory 37, 1991; Chen and Goodman, 1996).
    Every rank counts its share and keeps the different pairs in it, not a table of the vocabulary squared. The root
    merges them in as many parts as there are ranks, by first token, so that it never holds all ranks' pairs.
    """
    size = context.world.size
    codes, counts = _pairs(train, *rank_span(len(train) - 1, context.world.rank, size), vocab_size)
    singles = count_tokens(train, vocab_size, context)
    wanted = _pairs(test, 0, len(test) - 1, vocab_size)[0] if context.world.is_root else codes[:0]
    num_pairs = np.zeros(len(wanted), np.int64)
    num_after, num_different = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64)
    for part in range(size):
        low, high = np.searchsorted(codes, [vocab_size * end for end in rank_span(vocab_size, part, size)])
        gathered = context.gather((codes[low:high], counts[low:high]))
        if not gathered:
            continue
        these, times = _merged(gathered)
        firsts = these // vocab_size
        np.add.at(num_after, firsts, times)
        np.add.at(num_different, firsts, 1)
        found = np.isin(wanted, these, assume_unique=True)
        num_pairs[found] = times[positions_in(these, wanted[found])]

    def losses() -> Bigrams:
        num_types = np.count_nonzero(singles)
        single = (singles + num_types / vocab_size) / (singles.sum() + num_types)
        first, second = wanted // vocab_size, wanted % vocab_size
        after, different = num_after[first], num_different[first]
        # A token that has no successor in training has 0 of 0 pairs: only single tokens are known then.
        smoothed = (num_pairs + different * single[second]) / np.maximum(after + different, 1)
        return Bigrams(wanted, -np.log(np.where(after > 0, smoothed, single[second])), vocab_size)

    return context.on_root(losses)


def count_tokens(train: Any, vocab_size: int, context: Context) -> np.ndarray:
    """Collective. How often each token occurs in `train`, (vocab_size,); every rank counts its share."""
    start, stop = rank_span(len(train), context.world.rank, context.world.size)
    counts = np.zeros(vocab_size, np.int64)
    for begin in range(start, stop, _BLOCK_TOKENS):
        part = np.asarray(train[begin : min(begin + _BLOCK_TOKENS, stop)])
        counts += np.bincount(part.astype(np.int64, copy=False), minlength=vocab_size)
    return context.sum(counts)


def _pairs(tokens: Any, start: int, stop: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The different pairs that begin at positions [start, stop): their increasing codes, and how often each occurs."""
    seen = (np.empty(0, np.int64), np.empty(0, np.int64))
    for begin in range(start, stop, _BLOCK_TOKENS):
        part = np.asarray(tokens[begin : min(begin + _BLOCK_TOKENS, stop) + 1])
        seen = _merged([seen, np.unique(_codes(part[:-1], part[1:], vocab_size), return_counts=True)])
    return seen


def _codes(first: np.ndarray, second: np.ndarray, vocab_size: int) -> np.ndarray:
    return first.astype(np.int64) * vocab_size + second


def _merged(counted: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Several lists of codes and counts as one."""
    codes, where = np.unique(np.concatenate([codes for codes, _ in counted]), return_inverse=True)
    counts = np.zeros(len(codes), np.int64)
    np.add.at(counts, where, np.concatenate([counts for _, counts in counted]))
    return codes, counts
