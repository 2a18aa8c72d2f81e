"""What the statistics of data sets mean: faults, which spoil a training, and warnings, which are worth a look."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from hpc_train.core.errors import UserError
from hpc_train.core.labels import MAX_CLASSES, NoClasses, find_classes
from hpc_train.datasets.inspect.chunk_ranges import verified_by
from hpc_train.datasets.inspect.duplicates import Duplicates
from hpc_train.datasets.inspect.faults import PREPARE_AGAIN, Fault
from hpc_train.datasets.inspect.names import INPUT_WORDS, TARGET_WORDS, Names, words
from hpc_train.datasets.inspect.statistics import Statistics
from hpc_train.datasets.inspect.structure import DatasetInfo, FileStructure
from hpc_train.train.data.unwritten import REMEDY, rows_of_fill_values

_RARE_SHARE = 0.05  # of the samples of the median class
_MAX_LEAKED_SHARE = 0.01  # of a part: more of it among the samples to train on makes its scores worthless
_MAX_LISTED = 10
_ROWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Facts:
    """All that was counted.

    names: which belong together. datasets: those that were read. first_numbers: the sample number of each one's first
    row (see `find_duplicates`).
    unread: names of data sets and groups that could not be read in some file; "" is a whole file.
    """

    names: Names
    datasets: Sequence[DatasetInfo]
    first_numbers: Sequence[int]
    statistics: Mapping[str, Statistics]
    duplicates: Sequence[Duplicates]
    keep_one_in: int
    unread: Collection[str]

    def named(self, name: str) -> list[DatasetInfo]:
        return [info for info in self.datasets if info.name == name]

    def num_rows(self, name: str) -> int:
        return sum(info.num_rows for info in self.named(name))

    def files(self, name: str) -> str:
        """The files that hold data set `name`, for a message."""
        paths = [info.path for info in self.named(name)]
        return f"{paths[0]} and {len(paths) - 1:,} more" if len(paths) > 1 else str(paths[0])

    def sample(self, name: str, number: int) -> str:
        """Sample `number` for a message: its row and, if there are several files, the file."""
        numbered = [pair for pair in zip(self.datasets, self.first_numbers, strict=True) if pair[0].name == name]
        info, first = next((i, first) for i, first in numbered if first <= number < first + i.num_rows)
        return f"{number - first:,} of {info.path}" if len(numbered) > 1 else f"{number - first:,}"

    def is_fully_read(self, name: str) -> bool:
        """Whether the statistics cover all values: a label that is missing among those read may be among the others."""
        is_damaged = any(fault.kind in ("damaged", "unwritten") for fault in self.statistics[name].faults)
        is_unread = any(path in ("", name) or name.startswith(f"{path}/") for path in self.unread)
        return not is_damaged and not is_unread


def describe(facts: Facts) -> dict[str, dict[str, Any]]:
    """What is known about each data set, by name, ready for JSON."""
    described: dict[str, dict[str, Any]] = {}
    for name, statistics in facts.statistics.items():
        info = facts.named(name)[0]
        described[name] = {
            "role": statistics.role,
            "samples": facts.num_rows(name),
            "shape": list(info.shape[1:]),
            "dtype": str(info.dtype),
            "verified_by": verified_by(info) or None,
            "low": statistics.min,
            "high": statistics.max,
        }
        if statistics.role == "samples":
            num_features, num_varying = int(np.prod(info.shape[1:], dtype=np.int64)), statistics.num_varying
            described[name] |= {
                "constant_samples": statistics.num_constant_samples if statistics.is_compared else None,
                "constant_features": None if num_varying is None else num_features - num_varying,
                "features": num_features,
                "compared": statistics.is_compared,
            }
        if _has_classes(statistics):
            described[name]["classes"] = {str(label): num for label, num in sorted(statistics.labels.items())}
    for each in facts.duplicates:
        described[each.copies].setdefault("equal_to", {})[each.originals] = each.num * facts.keep_one_in
    return described


def value_faults(facts: Facts) -> Iterator[Fault]:
    """What the values of data sets show to be wrong."""
    for name, statistics in facts.statistics.items():
        is_class = _class_values(facts, name) is not None  # as training reads labels: any number may name a class
        yield from (fault for fault in statistics.faults if not (is_class and fault.kind == "out of range"))
        if statistics.role == "samples":
            yield from _constant_values(facts, name)
        if _has_classes(statistics):
            yield from _unknown_labels(facts, name)
    yield from (fault for fault, is_leak in _copies(facts) if is_leak)


def value_warnings(facts: Facts) -> Iterator[Fault]:
    """What is unusual about the values of data sets."""
    for name, statistics in facts.statistics.items():
        if statistics.role == "samples":
            yield from _constant_samples(facts, name)
        if _has_classes(statistics) and facts.is_fully_read(name):
            yield from _class_balance(facts, name)
    yield from (fault for fault, is_leak in _copies(facts) if not is_leak)


# ---------------------------------------------------------------------------------------------- samples


def _constant_values(facts: Facts, name: str) -> Iterator[Fault]:
    statistics = facts.statistics[name]
    if statistics.num_rows < 2:
        return
    if statistics.min is not None and statistics.min == statistics.max:
        what = f"every value is {statistics.min}: nothing can be learned from it"
        yield Fault("constant", facts.files(name), name, what, PREPARE_AGAIN)
    elif statistics.num_varying == 0:
        what = "all samples are equal: nothing can be learned from them"
        yield Fault("constant", facts.files(name), name, what, PREPARE_AGAIN)


def _constant_samples(facts: Facts, name: str) -> Iterator[Fault]:
    statistics = facts.statistics[name]
    if statistics.num_constant_samples and statistics.min != statistics.max:
        num, total = statistics.num_constant_samples, statistics.num_rows
        what = f"{num:,} of {total:,} samples are of one value throughout, such as empty pictures"
        yield Fault("constant", facts.files(name), name, what)


def _copies(facts: Facts) -> Iterator[tuple[Fault, bool]]:
    """(equal samples, whether they are a leak that is a fault)."""
    about = "about " if facts.keep_one_in > 1 else ""
    for each in facts.duplicates:
        where, num, total = facts.files(each.copies), each.num * facts.keep_one_in, facts.num_rows(each.copies)
        original, copy = facts.sample(each.originals, each.example[0]), facts.sample(each.copies, each.example[1])
        count, example = (
            f"{about}{num:,} of {total:,} samples",
            f"the first is sample {copy}, equal to sample {original}",
        )
        if each.originals == each.copies:
            yield Fault("copies", where, each.copies, f"{count} are copies of another: {example}"), False
            continue
        what = f"{count} are in {each.originals}, too (leakage): {example} there"
        is_leak = facts.names.is_training(each.originals) and num > _MAX_LEAKED_SHARE * total
        yield Fault("leakage", where, each.copies, what, "Split the data again, without copies."), is_leak


# ---------------------------------------------------------------------------------------------- classes


def _has_classes(statistics: Statistics) -> bool:
    return statistics.role == "labels" and len(statistics.labels) <= MAX_CLASSES


def _class_values(facts: Facts, name: str) -> np.ndarray | None:
    """The stored label of each class, where labels of data set `name` are not class numbers; None where they are."""
    name = _to_train_on(facts, name) or name
    statistics = facts.statistics[name]
    if not _has_classes(statistics) or not statistics.labels:
        return None
    try:
        found = find_classes(np.array(sorted(statistics.labels), np.int64), None, statistics.num_rows)
    except (NoClasses, OverflowError):  # labels beyond 63 bits are none
        return None
    return found.values


def _same_kind(facts: Facts, name: str) -> list[str]:
    """The data sets of other parts with the same meaning, such as train/targets for test/targets."""
    part = facts.names.part
    return [other for other in facts.statistics if part(other) == part(name) and other != name]


def _to_train_on(facts: Facts, name: str) -> str | None:
    """The data set to train on with the same meaning as `name`, which is another one."""
    return next((other for other in _same_kind(facts, name) if facts.names.is_training(other)), None)


def _unknown_labels(facts: Facts, name: str) -> Iterator[Fault]:
    """Labels that no sample to train on has."""
    train = _to_train_on(facts, name)
    # A damaged part of the training labels may hold the labels that seem to be missing.
    if train is None or not _has_classes(facts.statistics[train]) or not facts.is_fully_read(train):
        return
    known = facts.statistics[train].labels
    unknown = sorted(label for label in facts.statistics[name].labels if label not in known)
    if unknown:
        what = f"no sample of {train} has its label{'s' * (len(unknown) != 1)} {_listed(unknown)}"
        remedy = "Split the data again, with every class in each part."
        yield Fault("out of range", facts.files(name), name, what, remedy)


def _class_balance(facts: Facts, name: str) -> Iterator[Fault]:
    """Classes without samples, rare classes, and a single class."""
    where, labels = facts.files(name), facts.statistics[name].labels
    highest = max(facts.statistics[each].max or 0 for each in (name, *_same_kind(facts, name)))
    values = _class_values(facts, name)
    known = range(min(int(highest), MAX_CLASSES) + 1) if values is None else values.tolist()
    counts = {label: labels.get(label, 0) for label in known}
    present = [count for count in counts.values() if count]
    if not present:
        return
    absent = [label for label, count in counts.items() if not count]
    if absent:
        what = f"{len(absent):,} of {len(counts):,} classes have no sample: {_listed(absent)}"
        yield Fault("empty class", where, name, what)
    median = float(np.median(present))
    rare = [f"{label} ({count:,})" for label, count in counts.items() if 0 < count < _RARE_SHARE * median]
    if rare:
        what = f"{len(rare):,} of {len(counts):,} classes are rare (the median class has {int(median):,} samples)"
        yield Fault("rare class", where, name, f"{what}: {_listed(rare)}")
    if len(present) == 1 and labels.total() > 1:
        yield Fault("one class", where, name, "all samples have the same label")


def _listed(labels: Sequence[Any]) -> str:
    return ", ".join(map(str, labels[:_MAX_LISTED])) + ", ..." * (len(labels) > _MAX_LISTED)


# ---------------------------------------------------------------------------------------------- numbers of rows


def unequal_lengths(file: FileStructure, roles: Mapping[str, str]) -> Iterator[Fault]:
    """Targets that are not as many as their samples: those beside them, or those of the same name but for a word."""
    lengths = {info.name: info.num_rows for info in file.datasets}
    for info in file.datasets:
        if info.is_coordinate or (roles.get(info.name) != "labels" and not words(info.name) & TARGET_WORDS):
            continue
        num_samples = {
            # Variable-length samples have one more offset than samples.
            other.name: lengths.get(f"{other.name}_offsets", other.num_rows + 1) - 1
            for other in file.datasets
            if other.name != info.name and _belong_together(info, other)
        }
        if num_samples and info.num_rows not in num_samples.values():
            inputs = f"{info.group}/inputs"
            name = inputs if inputs in num_samples else next(iter(num_samples))
            what = f"has {info.num_rows:,} rows, and {name} has {num_samples[name]:,} samples"
            yield Fault("unequal", str(file.path), info.name, what, f"Each input needs one target. {PREPARE_AGAIN}")


def _belong_together(targets: DatasetInfo, other: DatasetInfo) -> bool:
    """Whether `other` may be the samples of `targets`: train/inputs of train/targets, x/train of y/train."""
    if not other.shape or other.name.endswith("_offsets"):
        return False
    if other.group == targets.group and targets.group:
        return True
    rests = (words(targets.name) - TARGET_WORDS, words(other.name) - INPUT_WORDS)
    return bool(words(other.name) & INPUT_WORDS) and rests[0] == rests[1]


def unwritten_faults(file: FileStructure, roles: Mapping[str, str]) -> Iterator[Fault]:
    """Samples at the end of a file that hold nothing but fill values, as do their targets."""
    by_name = {info.name: info for info in file.datasets}
    for info in file.datasets:
        targets = by_name.get(f"{info.group}/targets".lstrip("/"))
        if roles.get(info.name) != "samples" or targets is None or targets is info:
            continue
        with suppress(UserError), h5py.File(file.path, "r") as opened:
            rows = rows_of_fill_values(file.path, opened[info.name], opened[targets.name])
            if len(rows):
                fill = np.ravel(opened[info.name].fillvalue)[0]
                what = f"hold the fill value {fill:g} alone, as if never written; see {targets.name} beside them"
                span = int(rows[0]), int(rows[-1])
                yield Fault("unwritten", str(file.path), info.name, what, REMEDY, samples=span)


def offset_faults(info: DatasetInfo, datasets: Sequence[DatasetInfo]) -> Iterator[Fault]:
    """Offsets of variable-length samples that do not rise from 0 to the number of rows that they divide."""
    base = info.name.removesuffix("_offsets")
    num_rows = next((other.num_rows for other in datasets if (other.path, other.name) == (info.path, base)), None)
    last = 0
    with h5py.File(info.path, "r") as file:
        for start in range(0, info.num_rows, _ROWS_AT_ONCE):
            offsets = file[info.name][start : start + _ROWS_AT_ONCE].astype(np.int64)
            is_wrong = np.diff(offsets, prepend=last) < 0
            is_wrong[0] |= start == 0 and offsets[0] != 0
            if is_wrong.any():
                row = start + int(np.argmax(is_wrong))
                what = f"is {offsets[row - start]:,}: offsets rise from 0"
                yield Fault("out of range", str(info.path), info.name, what, PREPARE_AGAIN, samples=(row, row))
                return
            last = int(offsets[-1])
    if num_rows is not None and last != num_rows:
        what = f"ends with {last:,}, and {base} has {num_rows:,} rows"
        yield Fault("unequal", str(info.path), info.name, what, PREPARE_AGAIN)
