"""What the values of a data set tell: not-a-numbers, range, labels, constant and equal samples.

A tally is made of any pieces in any order; tallies of ranks add up to that of one rank.
"""

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from hpc_train.datasets.inspect.chunk_ranges import Piece
from hpc_train.datasets.inspect.structure import Fault, Found

MOST_LABELS = 1 << 16  # more different values are no classes
_MOST_FEATURE_BYTES = 16 << 20
_SHOWN = 10
_MOST_VALUE = 1e18  # the square of more, which training makes, is infinite in float32

HASHED = np.dtype([("hash", np.uint64), ("sample", np.int64)])


def role(found: Found, all_of_file: Sequence[Found], has_vocabulary: bool) -> str:
    """What the rows of a data set are: samples, labels, tokens, offsets, values, or other (no numbers)."""
    group, _, name = found.name.rpartition("/")
    beside = {other.name.rpartition("/")[2]: other for other in all_of_file if other.name.rpartition("/")[0] == group}
    if not found.is_numeric:
        return "other"
    if name.endswith("_offsets") and name.removesuffix("_offsets") in beside and len(found.shape) == 1:
        return "offsets"
    if len(found.shape) > 1:
        return "values" if name == "targets" else "samples"
    if found.dtype.kind not in "iu" or not group:
        return "values"
    if name == "targets" or any(len(other.shape) > 1 for other in beside.values()):
        return "labels"
    return "tokens" if has_vocabulary else "values"


class Tally:
    """Of one data set, over all its files.

    first: the first sample, which features are compared with; None if they are not. keep_one_in: of how many hashes one
    is kept, so that memory is bounded. vocabulary: how many tokens there are. most_classes: a label beyond is an id, or
    damaged.
    """

    def __init__(
        self,
        role: str,
        first: np.ndarray | None,
        keep_one_in: int,
        vocabulary: int | None = None,
        most_classes: int = MOST_LABELS,
    ) -> None:
        self.role, self._keep, self._vocabulary, self._most_classes = role, keep_one_in, vocabulary, most_classes
        is_small = first is not None and first.nbytes <= _MOST_FEATURE_BYTES
        self._first = first if is_small and role == "samples" else None
        self.varies = None if self._first is None else np.zeros(self._first.shape, dtype=bool)
        self.num_rows = self.num_constant = 0
        self.low: Any = None
        self.high: Any = None
        self.labels: Counter[int] = Counter()
        self.hashes: list[np.ndarray] = []
        self.is_compared = role == "samples"  # samples with each other
        self.faults: list[Fault] = []

    def add(self, piece: Piece, found: Found, first_sample: int) -> None:
        """Counts a piece of `found`, whose first row has the number `first_sample`; -1: it is compared with none."""
        self.faults += piece.faults
        if self.role == "other" or not found.is_numeric or not piece.values.size:
            return
        values = np.ascontiguousarray(piece.values)
        finite = self._finite(values, piece, found)
        self.num_rows += len(values) if piece.is_whole else 0
        if finite.size:
            self._widen(finite.min().item(), finite.max().item())
        if self.role == "labels":
            self._count_labels(values, piece, found)
        if self.role == "tokens" and self._vocabulary is not None:
            self._out_of(self._vocabulary, "tokens out of the vocabulary", values, piece, found)
        if self.role == "samples" and first_sample >= 0:
            self._compare(values, piece, first_sample)

    def _finite(self, values: np.ndarray, piece: Piece, found: Found) -> np.ndarray:
        if values.dtype.kind != "f":
            return values
        is_finite = np.isfinite(values)
        is_large = np.abs(values) > _MOST_VALUE
        if (is_large & is_finite).any():
            bad = np.flatnonzero((is_large & is_finite).reshape(len(values), -1).any(axis=1))
            what = f"{len(bad):,} sample{'s' * (len(bad) != 1)} with values beyond {_MOST_VALUE:g}"
            self._fault(
                "not finite",
                what,
                "Training is in float32, where their squares are infinite: scale the values.",
                piece,
                found,
                bad,
            )
        if is_finite.all():
            return values
        bad = np.flatnonzero(~is_finite.reshape(len(values), -1).all(axis=1))
        num_nan = int(np.isnan(values).sum())
        num_infinite = int(values.size - is_finite.sum()) - num_nan
        words = [f"{num:,} {name}" for num, name in ((num_nan, "NaN"), (num_infinite, "infinite")) if num]
        what = f"{' and '.join(words)} in {len(bad):,} sample{'s' * (len(bad) != 1)}"
        self._fault("not finite", what, "Remove these samples, or replace the values.", piece, found, bad)
        return values[is_finite]

    def _widen(self, low: Any, high: Any) -> None:
        self.low = low if self.low is None else min(self.low, low)
        self.high = high if self.high is None else max(self.high, high)

    def _count_labels(self, values: np.ndarray, piece: Piece, found: Found) -> None:
        if len(self.labels) <= MOST_LABELS:
            each, counts = np.unique(values, return_counts=True)
            self.labels.update(dict(zip(each.tolist(), counts.tolist(), strict=True)))
        self._out_of(None, "negative labels", values, piece, found)
        if values.max() >= self._most_classes:
            self._out_of(self._most_classes, "labels that are no classes", np.maximum(values, 0), piece, found)

    def _out_of(self, stop: int | None, words: str, values: np.ndarray, piece: Piece, found: Found) -> None:
        """A fault where a whole number is below 0, or `stop` or above."""
        is_out = values < 0
        if stop is not None:
            is_out |= values >= stop
        bad = np.flatnonzero(is_out)
        if len(bad):
            allowed = "0 and more" if stop is None else f"0 to {stop - 1:,}"
            shown = ", ".join(map(str, np.unique(values[bad])[:_SHOWN].tolist()))
            what = f"{len(bad):,} {words} ({shown}): {allowed} are allowed"
            self._fault("out of range", what, "Prepare the file again.", piece, found, bad)

    def _compare(self, values: np.ndarray, piece: Piece, first_sample: int) -> None:
        if not piece.is_whole:
            self.is_compared = False
            return
        flat = values.reshape(len(values), -1)
        if flat.shape[1] > 1:
            self.num_constant += int((flat == flat[:, :1]).all(axis=1).sum())
        if self.varies is not None:
            self.varies |= (values != self._first).any(axis=0)
        data, width = values.reshape(-1).view(np.uint8).data, flat.shape[1] * values.itemsize
        digests = [blake2b(data[at : at + width], digest_size=8).digest() for at in range(0, len(data), width)]
        kept = np.empty(len(values), HASHED)
        kept["hash"] = np.frombuffer(b"".join(digests), "<u8")
        kept["sample"] = piece.rows + first_sample
        self.hashes.append(kept[kept["hash"] % np.uint64(self._keep) == 0] if self._keep > 1 else kept)

    def _fault(self, kind: str, what: str, remedy: str, piece: Piece, found: Found, bad: np.ndarray) -> None:
        samples = int(piece.rows[bad[0]]), int(piece.rows[bad[-1]])
        self.faults.append(Fault(kind, str(found.path), found.name, what, remedy, piece.unit, piece.number, samples))

    def joined(self, others: Sequence["Tally"]) -> "Tally":
        """The sum of `others`, tallies of one data set that ranks made; what is not counted in them is not."""
        for other in others:
            self.faults += other.faults
            self.num_rows += other.num_rows
            self.num_constant += other.num_constant
            self.labels.update(other.labels)
            self.is_compared &= other.is_compared
            if other.low is not None:
                self._widen(other.low, other.high)
        return self
