"""Statistics of a data set's values: NaN and infinite values, range, labels, constant samples, hashes of samples.

Ranges of rows are added in any order, and the statistics of several ranks merge into those of one.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from hpc_train.core.formatting import plural
from hpc_train.core.labels import MAX_CLASSES
from hpc_train.datasets.inspect.chunk_ranges import RangeValues
from hpc_train.datasets.inspect.faults import PREPARE_AGAIN, Fault
from hpc_train.datasets.inspect.structure import DatasetInfo
from hpc_train.train.comm.context import Context

_MAX_FEATURE_BYTES = 16 << 20
_MAX_VALUE = 1e18  # the square of a larger value, which training computes, is infinite in float32
_MAX_LISTED = 10

SAMPLE_HASH = np.dtype([("hash", np.uint64), ("sample", np.int64)])


def role_of(info: DatasetInfo, datasets: Sequence[DatasetInfo], has_vocabulary: bool) -> str:
    """What the rows of a data set are: samples, labels, tokens, offsets, values, or other (not numeric).

    datasets: all of its file.
    """
    siblings = {other.base_name: other for other in datasets if other.group == info.group}
    if not info.is_numeric:
        return "other"
    divided = info.base_name.removesuffix("_offsets")
    if divided != info.base_name and divided in siblings and len(info.shape) == 1:
        return "offsets"
    if len(info.shape) > 1:
        return "values" if info.base_name == "targets" else "samples"
    if info.dtype.kind not in "iu" or not info.group:
        return "values"
    # Beside data set `targets`, whole numbers are numbers of simulations, patients or years.
    if info.base_name == "targets" or (
        "targets" not in siblings and any(len(other.shape) > 1 for other in siblings.values())
    ):
        return "labels"
    return "tokens" if has_vocabulary else "values"


@dataclass(frozen=True)
class Limits:
    """What values may be, and how many hashes of samples are kept.

    vocab_size: number of tokens; None if unknown. num_classes: a label of this or more is an id, or damaged.
    keep_one_in: the share of sample hashes that is kept, so that memory stays bounded. may_lack: values may be missing.
    """

    vocab_size: int | None = None
    num_classes: int = MAX_CLASSES
    keep_one_in: int = 1
    may_lack: bool = False


class Statistics:
    """Statistics of one data set over all its files.

    first_sample: features are compared with it, to find those that never change; None to skip this.
    """

    def __init__(self, role: str, first_sample: np.ndarray | None, limits: Limits) -> None:
        self.role, self._limits = role, limits
        is_small = first_sample is not None and first_sample.nbytes <= _MAX_FEATURE_BYTES
        self._first_sample = first_sample if is_small and role == "samples" else None
        self.feature_varies = None if self._first_sample is None else np.zeros(self._first_sample.shape, dtype=bool)
        self.num_varying: int | None = None  # features that differ between samples; None if they are not compared
        self.num_rows = self.num_constant_samples = 0
        self.min: Any = None
        self.max: Any = None
        self.labels: Counter[int] = Counter()
        self.hashes: list[np.ndarray] = []
        self.is_compared = role == "samples"  # whether samples are compared with each other
        self.faults: list[Fault] = []

    def add(self, part: RangeValues, first_number: int) -> None:
        """Adds a range of a data set whose first row is sample `first_number` among all that are compared.

        first_number: -1 if the data set is not compared.
        """
        self.faults += part.faults
        if self.role == "other" or not part.info.is_numeric or not part.values.size:
            return
        part.values = np.ascontiguousarray(part.values)
        self.num_rows += len(part.values) if part.is_whole_rows else 0
        finite = self._finite_values(part) if part.values.dtype.kind == "f" else part.values
        if finite.size:
            self._extend_range(finite.min().item(), finite.max().item())
        if self.role == "labels":
            self._add_labels(part)
        if self.role == "tokens" and self._limits.vocab_size is not None:
            self._require_below(self._limits.vocab_size, "tokens out of the vocabulary", part)
        if self.role == "samples" and first_number >= 0:
            self._add_samples(part, first_number)

    def reduce_features(self, context: Context) -> None:
        """Collective. Counts the features that differ between the samples of all ranks."""
        if self.feature_varies is not None:
            self.num_varying = int(np.count_nonzero(context.sum(self.feature_varies.astype(np.int32))))

    def merge(self, others: Sequence["Statistics"]) -> "Statistics":
        """Adds the statistics of other ranks, except what all ranks have in common by `reduce_features`."""
        for other in others:
            self.faults += other.faults
            self.num_rows += other.num_rows
            self.num_constant_samples += other.num_constant_samples
            self.labels.update(other.labels)
            self.is_compared &= other.is_compared
            if other.min is not None:
                self._extend_range(other.min, other.max)
        return self

    def _finite_values(self, part: RangeValues) -> np.ndarray:
        values = part.values
        is_finite = np.isfinite(values)
        is_large = is_finite & (np.abs(values) > _MAX_VALUE)
        if is_large.any():
            bad = _rows_with_any(is_large)
            what = f"{_samples(len(bad))} with values beyond {_MAX_VALUE:g}"
            remedy = "Training is in float32, where their squares are infinite: scale the values."
            self.faults.append(part.fault("not finite", what, remedy, bad))
        if is_finite.all() or self._limits.may_lack:
            return values[is_finite]
        bad = _rows_with_any(~is_finite)
        num_nan = int(np.isnan(values).sum())
        num_infinite = int(values.size - is_finite.sum()) - num_nan
        counts = [f"{num:,} {name}" for num, name in ((num_nan, "NaN"), (num_infinite, "infinite")) if num]
        what = f"{' and '.join(counts)} in {_samples(len(bad))}"
        self.faults.append(part.fault("not finite", what, "Remove these samples, or replace the values.", bad))
        return values[is_finite]

    def _extend_range(self, low: Any, high: Any) -> None:
        self.min = low if self.min is None else min(self.min, low)
        self.max = high if self.max is None else max(self.max, high)

    def _add_labels(self, part: RangeValues) -> None:
        if len(self.labels) <= MAX_CLASSES:
            labels, counts = np.unique(part.values, return_counts=True)
            self.labels.update(dict(zip(labels.tolist(), counts.tolist(), strict=True)))
        is_negative = part.values < 0
        self._require_none(is_negative, "negative labels", "0 and more", part)
        is_too_large = part.values >= self._limits.num_classes
        self._require_none(is_too_large, "labels that are not classes", f"0 to {self._limits.num_classes - 1:,}", part)

    def _require_below(self, stop: int, what: str, part: RangeValues) -> None:
        self._require_none((part.values < 0) | (part.values >= stop), what, f"0 to {stop - 1:,}", part)

    def _require_none(self, is_bad: np.ndarray, what: str, allowed: str, part: RangeValues) -> None:
        bad = np.flatnonzero(is_bad)
        if len(bad):
            shown = ", ".join(map(str, np.unique(part.values[bad])[:_MAX_LISTED].tolist()))
            what = f"{len(bad):,} {what} ({shown}): {allowed} are allowed"
            self.faults.append(part.fault("out of range", what, PREPARE_AGAIN, bad))

    def _add_samples(self, part: RangeValues, first_number: int) -> None:
        if not part.is_whole_rows:
            self.is_compared = False
            return
        flat = part.values.reshape(len(part.values), -1)
        if flat.shape[1] > 1:
            self.num_constant_samples += int((flat == flat[:, :1]).all(axis=1).sum())
        if self.feature_varies is not None:
            self.feature_varies |= (part.values != self._first_sample).any(axis=0)
        hashes = np.empty(len(flat), SAMPLE_HASH)
        hashes["hash"] = _hash_rows(flat)
        hashes["sample"] = part.rows + first_number
        # By the hash itself: equal samples are kept together, or dropped together.
        is_kept = hashes["hash"] % np.uint64(self._limits.keep_one_in) == 0
        self.hashes.append(hashes[is_kept])


def _rows_with_any(is_bad: np.ndarray) -> np.ndarray:
    return np.flatnonzero(is_bad.reshape(len(is_bad), -1).any(axis=1))


def _hash_rows(rows: np.ndarray) -> np.ndarray:
    """(n,) uint64, of the bytes of each row of a contiguous (n, width) array."""
    data, width = rows.reshape(-1).view(np.uint8).data, rows.shape[1] * rows.itemsize
    digests = [blake2b(data[at : at + width], digest_size=8).digest() for at in range(0, len(data), width)]
    return np.frombuffer(b"".join(digests), "<u8")


def _samples(number: int) -> str:
    return plural(number, "sample")
