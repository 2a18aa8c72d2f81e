"""Strategies on equal work: one job under several settings of `reduce.*`, and the traffic that theory predicts."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import positive_number
from hpc_train.analysis.runs.repeats import differing_facts
from hpc_train.analysis.scaling.compare import Group, equal_work
from hpc_train.analysis.scaling.labels import differing_keys, labels, work
from hpc_train.analysis.scaling.rows import Row, relative_speed
from hpc_train.analysis.stats.estimate import Estimate
from hpc_train.core.statistics import Interval

LOSS_TOLERANCE = 1e-5  # relative: the order of sums may change a loss by this much
_REFERENCES = (
    "horovod",
    "mpi",
    "torch",
    "sharded",
    "parameter_server",
    "local",
)  # the first that was run is the reference


@dataclass(frozen=True)
class Traffic:
    """Bytes that the busiest rank must move in a step, in theory."""

    volume_bytes: float  # as `traffic` counts them
    each_way_bytes: float  # sent, and as many received
    is_least: bool  # a lower bound: the library chooses the algorithm


@dataclass(frozen=True, eq=False)
class Entry:
    """One strategy at one number of ranks."""

    strategy: str
    keys: dict[str, Any]  # config.comparable of its runs
    row: Row
    traffic: Traffic | None
    relative_speed: Estimate | None = None  # samples/s relative to the reference at the same number of ranks
    is_reference: bool = False

    @property
    def ratio(self) -> float | None:
        """1 of the reference itself."""
        if self.is_reference:
            return 1.0 if self.row.step_s and not self.row.incomplete else None
        return None if self.relative_speed is None else self.relative_speed.value

    @property
    def ratio_interval(self) -> Interval | None:
        """95%."""
        return None if self.relative_speed is None else self.relative_speed.interval

    @property
    def optimizer_bytes(self) -> list[float] | None:
        """Optimizer state of each rank as the runs measured it; None if they did not, or differ."""
        stated = [_bytes_by_rank(run) for run in self.row.runs]
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

    @property
    def sizes(self) -> list[int]:
        """Numbers of ranks with a ratio between at least two strategies, ascending."""
        return sorted({e.row.size for e in self.entries if e.ratio is not None and not e.is_reference})


def compare_strategies(groups: Sequence[Group]) -> list[Comparison]:
    """Each job among the groups that was run under several settings of `reduce.*`."""
    families = equal_work(groups)
    keys = [work(family[0].keys) for family in families]
    members = [[run for group in family for run in group.runs] for family in families]
    return list(map(_comparison, labels(members, keys), keys, families))


def traffic(row: Row, keys: dict[str, Any]) -> Traffic | None:
    """The bytes that the busiest of N ranks must move for B bytes of gradients; None if B is unknown.

    Ring all-reduce: a rank sends 2(N-1)/N B and receives as many; no all-reduce does with less, so that is the least
    for MPI's, torch's and for Adasum, too (Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations", Journal of Parallel and Distributed Computing 69(2), 2009). Sharded: the two halves of the ring,
    reduce-scatter and all-gather, (N-1)/N B each; at stage 3 there are two all-gathers, in 16 bits of at least half as
    many bytes. Copies that S ranks share: S in place of N, and 2(n-1)/n B/S between n of them. Parameter server (Li et
    al., OSDI 2014): each of S servers takes B/S from each of W workers and gives B/S to each, 2 B W/S together; a
    worker moves 2 B. In each direction that is half.
    """
    num_parameters = row.stated("num_parameters")
    if num_parameters is None:
        return None
    num_bytes = num_parameters * (2 if keys.get("reduce.compression") in ("fp16", "bf16") else 4)
    strategy, num_servers = keys.get("reduce.strategy"), row.num_servers
    if strategy == "parameter_server":
        both_ways = 2 * num_bytes * max((row.size - num_servers) / num_servers, 1.0)
        return Traffic(both_ways, both_ways / 2, is_least=False)
    if strategy == "sharded":
        return _sharded_traffic(row, keys, num_bytes)
    ring = 2 * (row.size - 1) / row.size * num_bytes
    return Traffic(
        ring, ring, is_least=row.size > 1 and (strategy in ("mpi", "torch") or bool(keys.get("reduce.adasum")))
    )


def _sharded_traffic(row: Row, keys: dict[str, Any], num_bytes: float) -> Traffic:
    within = keys.get("reduce.shard_within", "job")
    num_hosts = len(row.runs[0].meta["hosts"])
    shards = row.size if within == "job" else max(1, row.size // num_hosts) if within == "node" else int(within)
    copies = max(1, row.size // shards)
    is_half = keys.get("reduce.stage") == 3 and keys.get("train.precision") in ("fp16", "bf16")
    gathered = (2 if keys.get("reduce.stage") == 3 else 1) * (0.5 if is_half else 1.0)
    moved = (1 + gathered) * (shards - 1) / shards * num_bytes + 2 * (copies - 1) / copies * num_bytes / shards
    return Traffic(moved, moved, is_least=is_half)


def _bytes_by_rank(run: Run) -> list[float] | None:
    sizes = run.meta.get("optimizer_bytes")
    if not isinstance(sizes, list) or len(sizes) != run.size:
        return None
    return [float(size) for size in sizes] if all(size == 0 or positive_number(size) for size in sizes) else None


def _comparison(label: str, keys: dict[str, Any], family: Sequence[Group]) -> Comparison:
    named = sorted(zip(_strategy_names(family), family, strict=True), key=_reference_order)
    reference_name, reference = named[0]
    reference_rows = {row.size: row for row in reference.rows if not row.incomplete}
    entries = []
    for name, group in named:
        for row in group.rows:
            entries.append(_entry(name, group, row, reference_rows.get(row.size), group is reference))
    entries.sort(key=lambda entry: entry.row.size)  # stable: the reference stays first
    return Comparison(label, keys, reference_name, tuple(entries))


def _reference_order(named: tuple[str, Group]) -> tuple[int, int, str]:
    """By `_REFERENCES`, then the shortest name: the one with fewest settings of its own."""
    name, group = named
    return _REFERENCES.index(_strategy(group)), len(name), name


def _entry(name: str, group: Group, row: Row, reference: Row | None, is_reference: bool) -> Entry:
    entry = Entry(name, group.keys, row, traffic(row, group.keys), is_reference=is_reference)
    if is_reference or reference is None:
        return entry
    return replace(entry, relative_speed=relative_speed(row, reference))


def _strategy(group: Group) -> str:
    return str(group.keys.get("reduce.strategy"))


def _strategy_names(family: Sequence[Group]) -> list[str]:
    """The strategy, and what sets it apart from others of the same strategy: "horovod fp16"."""
    return [_strategy_name(group, family) for group in family]


def _strategy_name(group: Group, family: Sequence[Group]) -> str:
    namesakes = [each.keys for each in family if _strategy(each) == _strategy(group)]
    words = [_strategy(group).replace("_", " ")]
    for key in differing_keys(namesakes):
        if key.startswith("reduce.") and key != "reduce.servers":
            words.append(_setting_word(key.removeprefix("reduce."), group.keys.get(key)))
    return " ".join(filter(None, words))


def _setting_word(key: str, value: Any) -> str:
    """ "fp16", "adasum", "bucket_mb=8"; "" for a setting that is off."""
    if isinstance(value, bool):
        return key if value else ""
    if isinstance(value, str):
        return "" if value == "none" else value
    return f"{key}={value}"


def entries_by_size(entries: Sequence[Entry]) -> dict[int, list[Entry]]:
    found: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        found[entry.row.size].append(entry)
    return found


def differing_facts_by_strategy(entries: Sequence[Entry]) -> dict[str, dict[str, list[str]]]:
    """What the strategies do not have in common: fact -> value -> the strategies that have it.

    A fact that varies in the same way within every strategy is not one of them, nor is a library that only some load.
    """
    runs = [(entry.strategy, run) for entry in entries for run in entry.row.runs]
    differing = {}
    for name, values in differing_facts([run for _, run in runs]).items():
        values_of: dict[str, set[str]] = defaultdict(set)
        strategies_with: dict[str, list[str]] = defaultdict(list)
        for (strategy, _), value in zip(runs, values, strict=True):
            if value == "unknown" and name.startswith("version of "):
                continue
            values_of[strategy].add(value)
            if strategy not in strategies_with[value]:
                strategies_with[value].append(strategy)
        if len({frozenset(each) for each in values_of.values()}) > 1:
            differing[name] = dict(strategies_with)
    return differing
