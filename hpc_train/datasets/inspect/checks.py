"""What the tallies of data sets mean: which are faults, that spoil a training, and which are worth a look."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from hpc_train.datasets.inspect.chunk_ranges import verified_by
from hpc_train.datasets.inspect.duplicates import Equal
from hpc_train.datasets.inspect.statistics import MOST_LABELS, Tally
from hpc_train.datasets.inspect.structure import Fault, Found, Surveyed

_RARE = 0.05  # of the samples of the middle class
_MOST_LEAKED = 0.01  # of a part: more of it in the part to train on spoils what it measures
_SHOWN = 10
_ROWS_AT_ONCE = 1 << 20
_PREPARE = "Prepare the file again."


@dataclass(frozen=True)
class Facts:
    """All that was counted. readable: the data sets; first_samples: their first rows' numbers (see `Equal`).

    equal: by the names of the data sets that were compared. num_varying: features that are not the same in all samples.
    """

    readable: Sequence[Found]
    first_samples: Sequence[int]
    tallies: Mapping[str, Tally]
    equal: Mapping[tuple[str, ...], Sequence[Equal]]
    num_varying: Mapping[str, int | None]
    keep_one_in: int

    def of(self, name: str) -> list[Found]:
        return [found for found in self.readable if found.name == name]

    def num_rows(self, name: str) -> int:
        return sum(found.num_rows for found in self.of(name))

    def where(self, name: str) -> str:
        """The files that hold data set `name`, for a message."""
        paths = [found.path for found in self.of(name)]
        return str(paths[0]) + f" and {len(paths) - 1:,} more" * (len(paths) > 1)

    def sample(self, name: str, number: int) -> str:
        """The sample of that number, for people: its row and, of several files, the file."""
        parts = [pair for pair in zip(self.readable, self.first_samples, strict=True) if pair[0].name == name]
        found, first = next((f, first) for f, first in parts if first <= number < first + f.num_rows)
        return f"{number - first:,}" + f" of {found.path}" * (len(parts) > 1)


def judge(facts: Facts) -> tuple[dict[str, dict[str, Any]], list[Fault], list[Fault]]:
    """(what is known of each data set, by name; faults; warnings)."""
    datasets: dict[str, dict[str, Any]] = {}
    faults: list[Fault] = []
    warnings: list[Fault] = []
    for name, tally in facts.tallies.items():
        found = facts.of(name)[0]
        faults += tally.faults
        datasets[name] = {
            "role": tally.role,
            "samples": facts.num_rows(name),
            "shape": list(found.shape[1:]),
            "dtype": str(found.dtype),
            "verified_by": verified_by(found) or None,
            "low": tally.low,
            "high": tally.high,
        }
        if tally.role == "samples":
            datasets[name] |= _of_samples(tally, facts.num_varying[name], found)
            faults += _constant(facts, name, tally)
            warnings += _constant_samples(facts, name, tally)
        if tally.role == "labels" and len(tally.labels) <= MOST_LABELS:
            datasets[name]["classes"] = {str(label): tally.labels[label] for label in sorted(tally.labels)}
            more = list(_classes(facts, name, tally))
            faults += [fault for fault in more if fault.kind == "out of range"]
            warnings += [fault for fault in more if fault.kind != "out of range"]
    for names, pairs in facts.equal.items():
        for pair in pairs:
            fault, is_leak = _equal(facts, names, pair)
            first, second = names[pair.first], names[pair.second]
            datasets[second].setdefault("equal_to", {})[first] = pair.num * facts.keep_one_in
            (faults if is_leak else warnings).append(fault)
    return datasets, faults, warnings


def _of_samples(tally: Tally, num_varying: int | None, found: Found) -> dict[str, Any]:
    num_features = int(np.prod(found.shape[1:], dtype=np.int64))
    return {
        "constant_samples": tally.num_constant if tally.is_compared else None,
        "constant_features": None if num_varying is None else num_features - num_varying,
        "features": num_features,
        "compared": tally.is_compared,
    }


def _constant(facts: Facts, name: str, tally: Tally) -> Iterator[Fault]:
    if tally.num_rows > 1 and tally.low is not None and tally.low == tally.high:
        what = f"every value is {tally.low}: nothing can be learned from it"
        yield Fault("constant", facts.where(name), name, what, _PREPARE)
    elif tally.num_rows > 1 and facts.num_varying[name] == 0:
        what = "all samples are equal: nothing can be learned from them"
        yield Fault("constant", facts.where(name), name, what, _PREPARE)


def _constant_samples(facts: Facts, name: str, tally: Tally) -> Iterator[Fault]:
    if tally.num_constant and tally.low != tally.high:
        what = (
            f"{tally.num_constant:,} of {tally.num_rows:,} samples are of one value throughout, such as empty pictures"
        )
        yield Fault("constant", facts.where(name), name, what)


def _classes(facts: Facts, name: str, tally: Tally) -> Iterator[Fault]:
    """Labels that no sample has, or few, or that the part to train on does not know."""
    base = name.rpartition("/")[2]
    others = [each for each in facts.tallies if each.rpartition("/")[2] == base and each != name]
    train = next((each for each in others if each.startswith("train")), None)
    if train is not None and tally.labels:
        unknown = sorted(label for label in tally.labels if label >= 0 and label not in facts.tallies[train].labels)
        if unknown and len(facts.tallies[train].labels) <= MOST_LABELS:
            what = f"no sample of {train} has its label{'s' * (len(unknown) != 1)} {_few(unknown)}"
            yield Fault("out of range", facts.where(name), name, what, "Split the data anew, every class in each part.")
    high = max([facts.tallies[each].high or 0 for each in (name, *others)], default=0)
    counts = {label: tally.labels.get(label, 0) for label in range(min(int(high), MOST_LABELS) + 1)}
    absent = [label for label, count in counts.items() if not count]
    present = [count for count in counts.values() if count]
    if absent and present:
        what = f"{len(absent):,} of {len(counts):,} classes have no sample: {_few(absent)}"
        yield Fault("empty class", facts.where(name), name, what)
    rare = [label for label, count in counts.items() if 0 < count < _RARE * float(np.median(present))]
    if rare:
        each = ", ".join(f"{label} ({counts[label]:,})" for label in rare[:_SHOWN])
        what = (
            f"{len(rare):,} of {len(counts):,} classes are rare beside the middle one's {int(np.median(present)):,}: "
        )
        yield Fault("rare class", facts.where(name), name, what + each + ", ..." * (len(rare) > _SHOWN))
    if len(present) == 1 and len(counts) > 0 and tally.labels.total() > 1:
        yield Fault("one class", facts.where(name), name, "all samples have the same label")


def _equal(facts: Facts, names: tuple[str, ...], pair: Equal) -> tuple[Fault, bool]:
    """(what is said of equal samples, whether it is a fault)."""
    first, second = names[pair.first], names[pair.second]
    num, total = pair.num * facts.keep_one_in, facts.num_rows(second)
    about = "about " * (facts.keep_one_in > 1)
    one, two = pair.examples[0]
    example = f"the first is sample {facts.sample(second, two)}, equal to sample {facts.sample(first, one)}"
    if first == second:
        what = f"{about}{num:,} of {total:,} samples are copies of another: {example}"
        return Fault("copies", facts.where(second), second, what), False
    what = f"{about}{num:,} of {total:,} samples are in {first}, too (leakage): {example} there"
    is_leak = first.startswith("train") and num > _MOST_LEAKED * total
    return Fault("leakage", facts.where(second), second, what, "Split the data anew, without copies."), is_leak


def _few(labels: Sequence[int]) -> str:
    return ", ".join(map(str, labels[:_SHOWN])) + ", ..." * (len(labels) > _SHOWN)


# ---------------------------------------------------------------------------------------------- numbers of rows


def unequal_numbers(file: Surveyed, roles: Mapping[str, str]) -> Iterator[Fault]:
    """Labels of which there are not as many as samples beside them."""
    lengths = {found.name: found.num_rows for found in file.datasets}
    for found in file.datasets:
        if roles.get(found.name) != "labels" and found.name.rpartition("/")[2] != "targets":
            continue
        group = found.name.rpartition("/")[0]
        beside = {
            name: lengths.get(f"{name}_offsets", num + 1) - 1
            for name, num in lengths.items()
            if name.rpartition("/")[0] == group and name != found.name and not name.endswith("_offsets")
        }
        if beside and found.num_rows not in beside.values():
            name = f"{group}/inputs" if f"{group}/inputs" in beside else next(iter(beside))
            what = f"has {found.num_rows:,} rows, and {name} has {beside[name]:,} samples"
            yield Fault("unequal", str(file.path), found.name, what, f"Each input needs one target. {_PREPARE}")


def offset_faults(found: Found, readable: Sequence[Found]) -> Iterator[Fault]:
    """Beginnings of variable-length samples that do not rise from 0 to the length of what they divide."""
    base = found.name.removesuffix("_offsets")
    length = next((other.num_rows for other in readable if (other.path, other.name) == (found.path, base)), None)
    before = 0
    with h5py.File(found.path, "r") as file:
        dataset = file[found.name]
        for start in range(0, found.num_rows, _ROWS_AT_ONCE):
            part = dataset[start : start + _ROWS_AT_ONCE].astype(np.int64)
            falling = np.flatnonzero(np.diff(part, prepend=before) < 0)
            wrong = 0 if start == 0 and part[0] != 0 else int(falling[0]) if len(falling) else None
            if wrong is not None:
                row, words = start + wrong, f"is {part[wrong]:,}: beginnings rise from 0"
                yield Fault("out of range", str(found.path), found.name, words, _PREPARE, samples=(row, row))
                return
            before = int(part[-1])
    if length is not None and before != length:
        what = f"ends with {before:,}, and {base} has {length:,} rows"
        yield Fault("unequal", str(found.path), found.name, what, _PREPARE)
