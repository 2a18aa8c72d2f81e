"""Strategies on equal work: one job under several ways to reduce, side by side with what theory says each must move."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import positive_number
from hpc_train.analysis.scaling.compare import Group, Row, differing_facts, equal_work, labels, relative_speed, work
from hpc_train.core.formatting import plural
from hpc_train.core.statistics import Interval

LOSS_TOLERANCE = 1e-5  # relative: what the order of sums may do to a loss
_REFERENCES = ("horovod", "mpi", "sharded", "parameter_server", "local")  # the first that was run is the reference


@dataclass(frozen=True)
class Traffic:
    """Bytes of a step that theory says the busiest rank must move."""

    must_move_bytes: float  # as the formulas of `traffic` count
    each_way_bytes: float  # sent, and as many received
    is_least: bool  # a lower bound: what the strategy really moves is its library's choice


@dataclass(frozen=True, eq=False)
class Entry:
    """One strategy at one number of ranks."""

    strategy: str
    keys: dict[str, Any]  # config.comparable of its runs
    row: Row
    traffic: Traffic | None
    ratio: float | None = None  # samples/s relative to the reference at the same number of ranks
    ratio_interval: Interval | None = None  # 95%
    is_reference: bool = False

    @property
    def optimizer_bytes(self) -> list[float] | None:
        """Optimizer state of each rank as the runs measured it; None where they did not, or differ."""
        stated = [_sizes_in_bytes(run) for run in self.row.runs]
        return stated[0] if all(each == stated[0] for each in stated) else None

    @property
    def where(self) -> str:
        """The strategy, and a parameter server's workers and servers."""
        row = self.row
        return f"{self.strategy} ({row.size - row.num_servers}+{row.num_servers})" if row.num_servers else self.strategy


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs of one job that differ in `reduce.*` alone."""

    label: str
    keys: dict[str, Any]  # what all have in common
    reference: str
    entries: tuple[Entry, ...]  # by number of ranks, the reference first
    notes: tuple[str, ...]

    @property
    def sizes(self) -> list[int]:
        """Numbers of ranks with a ratio between at least two strategies, ascending."""
        return sorted({e.row.size for e in self.entries if e.ratio is not None and not e.is_reference})


def compare_strategies(groups: Sequence[Group]) -> list[Comparison]:
    """Every job among the groups that was run under several settings of `reduce.*`."""
    families = equal_work(groups)
    keys = [work(family[0].keys) for family in families]
    members = [[run for group in family for row in group.rows for run in row.runs] for family in families]
    return list(map(_comparison, labels(members, keys), keys, families))


def traffic(row: Row, keys: dict[str, Any]) -> Traffic | None:
    """What a step's gradients of B bytes make the busiest of N ranks move; None where B is not known.

    Ring all-reduce: a rank sends 2(N-1)/N B and receives as many; no all-reduce does with less, so that is the least
    for MPI's and for Adasum, too (Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations", Journal of Parallel and Distributed Computing 69(2), 2009). Sharded: the two halves of the ring,
    reduce-scatter and all-gather, (N-1)/N B each. Parameter server (Li et al., OSDI 2014): each of S servers takes B/S
    from each of W workers and gives B/S to each, 2 B W/S together; a worker moves 2 B. In each direction that is half.
    """
    num_parameters = row.stated("num_parameters")
    if num_parameters is None:
        return None
    num_bytes = num_parameters * (2 if keys.get("reduce.compression") in ("fp16", "bf16") else 4)
    strategy, num_servers = keys.get("reduce.strategy"), row.num_servers
    if strategy == "parameter_server":
        both_ways = 2 * num_bytes * max((row.size - num_servers) / num_servers, 1.0)
        return Traffic(both_ways, both_ways / 2, is_least=False)
    ring = 2 * (row.size - 1) / row.size * num_bytes
    return Traffic(ring, ring, is_least=row.size > 1 and (strategy == "mpi" or bool(keys.get("reduce.adasum"))))


def _sizes_in_bytes(run: Run) -> list[float] | None:
    sizes = run.meta.get("optimizer_bytes")
    if not isinstance(sizes, list) or len(sizes) != run.size:
        return None
    return [float(size) for size in sizes] if all(size == 0 or positive_number(size) for size in sizes) else None


def _comparison(label: str, keys: dict[str, Any], family: list[Group]) -> Comparison:
    names = _strategy_names(family)
    order = sorted(range(len(family)), key=lambda i: (_REFERENCES.index(_strategy(family[i])), len(names[i]), names[i]))
    reference = family[order[0]]
    to = {row.size: row for row in reference.rows if not row.incomplete}
    entries = [
        _entry(names[i], family[i].keys, row, to.get(row.size), family[i] is reference)
        for i in order
        for row in family[i].rows
    ]
    entries.sort(key=lambda entry: entry.row.size)  # stable: the reference stays in front
    name = names[order[0]]
    return Comparison(label, keys, name, tuple(entries), tuple(_notes(entries, name)))


def _entry(name: str, keys: dict[str, Any], row: Row, to: Row | None, is_reference: bool) -> Entry:
    theory = traffic(row, keys)
    if is_reference:
        return Entry(name, keys, row, theory, 1.0 if row is to and row.step_s else None, None, is_reference=True)
    return Entry(name, keys, row, theory, *(relative_speed(row, to) if to is not None else (None, None)))


def _strategy(group: Group) -> str:
    return str(group.keys.get("reduce.strategy"))


def _strategy_names(family: list[Group]) -> list[str]:
    """The strategy's name, and what sets it apart from others of the same strategy: "horovod fp16"."""
    names = []
    for group in family:
        twins = [each.keys for each in family if _strategy(each) == _strategy(group)]
        apart = [key for key in twins[0] if any(a.get(key) != b.get(key) for a, b in pairwise(twins))]
        words = [_word(key.removeprefix("reduce."), group.keys.get(key)) for key in apart if key != "reduce.servers"]
        names.append(" ".join([_strategy(group).replace("_", " "), *filter(None, words)]))
    return names


def _word(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return key if value else ""
    return ("" if value == "none" else value) if isinstance(value, str) else f"{key}={value}"


# ---------------------------------------------------------------------------------------------- notes


def _notes(entries: list[Entry], reference: str) -> list[str]:
    notes = _loss_notes(entries, reference)
    if not any(entry.ratio is not None and not entry.is_reference for entry in entries):
        notes.append(f"No ratio: no number of ranks has steady steps of both a complete {reference} run and another.")
    for name, values in _facts_by_strategy(entries).items():
        told = "; ".join(f"{value} ({', '.join(where)})" for value, where in values.items())
        notes.append(f"Not alike: {name}: {told}.")
    for size, some in _by_size(entries).items():
        batches = {entry.where: entry.row.global_batch for entry in some}
        if len(set(batches.values())) > 1:
            told = ", ".join(f"{where} {batch}" for where, batch in batches.items())
            notes.append(f"{plural(size, 'rank')}: global batches differ ({told}): compare samples/s, not step times.")
    lacking = dict.fromkeys(entry.where for entry in entries if entry.traffic is None)
    if lacking:
        notes.append(f"Bytes to move missing for {', '.join(lacking)}: meta.json states no num_parameters.")
    lacking = dict.fromkeys(entry.where for entry in entries if entry.optimizer_bytes is None)
    if lacking:
        notes.append(f"Optimizer state missing for {', '.join(lacking)}: meta.json states no optimizer_bytes.")
    return notes


def _loss_notes(entries: list[Entry], reference: str) -> list[str]:
    """Where the final losses of equal work are not equal, and where they are."""
    notes, alike = [], []
    for size, some in _by_size(entries).items():
        known = [entry for entry in some if not entry.row.incomplete and entry.row.loss is not None]
        steps = {run.config.train.steps for entry in known for run in entry.row.runs}
        if len(known) < 2 or len(steps) > 1:
            continue
        first = known[0].row.loss or 0.0
        apart = [entry for entry in known[1:] if not _is_close(entry.row.loss or 0.0, first)]
        if not apart:
            alike.append(size)
            continue
        told = ", ".join(f"{entry.where} {entry.row.loss:.7g}{_by_design(entry)}" for entry in apart)
        notes.append(
            f"{plural(size, 'rank')}: final losses differ by more than {LOSS_TOLERANCE:g} relative from"
            f" {known[0].where}'s {first:.7g}: {told}{'; the others agree' * (len(apart) < len(known) - 1)}."
        )
    if alike:
        *most, last = map(str, alike)
        sizes = f"{', '.join(most)} and {last} ranks" if most else plural(alike[0], "rank")
        notes.append(f"Final losses agree within {LOSS_TOLERANCE:g} relative at {sizes}.")
    return notes


def _is_close(loss: float, to: float) -> bool:
    return abs(loss - to) <= LOSS_TOLERANCE * abs(to)  # not a number is close to nothing


def _by_design(entry: Entry) -> str:
    """Settings that change what is computed, and not only how it travels."""
    keys = entry.keys
    changing = [
        *(["asynchronous updates"] if keys.get("reduce.asynchronous") else []),
        *(["Adasum"] if keys.get("reduce.adasum") else []),
        *(["compressed gradients"] if keys.get("reduce.compression", "none") != "none" else []),
    ]
    return f" (as {' and '.join(changing)} may)" if changing else ""


def _by_size(entries: list[Entry]) -> dict[int, list[Entry]]:
    some: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        some[entry.row.size].append(entry)
    return some


def _facts_by_strategy(entries: list[Entry]) -> dict[str, dict[str, list[str]]]:
    """What the strategies do not have in common: fact -> value -> where it was seen.

    A fact that changes from run to run of every strategy alike is said beside their scaling. A library that only some
    strategies load is no difference.
    """
    runs = [(entry.strategy, run) for entry in entries for run in entry.row.runs]
    differing = {}
    for name, values in differing_facts([run for _, run in runs]).items():
        seen: dict[str, set[str]] = defaultdict(set)
        where: dict[str, list[str]] = defaultdict(list)
        for (strategy, _), value in zip(runs, values, strict=True):
            if value == "unknown" and name.startswith("version of "):
                continue
            seen[strategy].add(value)
            if strategy not in where[value]:
                where[value].append(strategy)
        if len({frozenset(each) for each in seen.values()}) > 1:
            differing[name] = dict(where)
    return differing
