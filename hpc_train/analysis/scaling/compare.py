"""How well did it scale? Runs that may be compared, as rows of growing size against a baseline."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np

from hpc_train.analysis.efficiency.pop import Efficiencies, efficiencies
from hpc_train.analysis.efficiency.stragglers import StragglerAnalysis, find_stragglers
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.runs.clocks import hosts_of
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import positive_number
from hpc_train.analysis.runs.repeats import Facts, assign_series, distinguishing_facts, facts_of
from hpc_train.analysis.stats.bootstrap import bootstrap_means, pooled_mean_interval
from hpc_train.core import config
from hpc_train.core.energy_records import Energy, total_energy
from hpc_train.core.formatting import listed, ms_text, plural
from hpc_train.core.records import COMMUNICATION, PHASES, FloatArray
from hpc_train.core.settings import RECORDED
from hpc_train.core.statistics import Interval, percentile_interval

_MOST_FACTS = 3  # in a group's label
_MOST = 1e30  # a number beyond is damage
_UNEVEN = 0.1  # the mean step beyond the median one, relative, above which the reader is told both
SUPERLINEAR = 1.05  # an efficiency above which the reader is told what may be behind it


@dataclass(frozen=True, eq=False)
class Row:
    """All runs of one size: repeats (`repeats.py`) are pooled, an incomplete run with its like. None is unknown."""

    size: int
    runs: tuple[Run, ...]
    incomplete: bool
    step_s: float | None  # mean over the steady steps of all runs and over ranks: steps add up to it
    step_interval_s: Interval | None  # 95%
    step_median_s: float | None  # what a typical step takes: a description, nothing is computed from it
    samples_per_s: float | None  # global batch / step_s
    # Of the time in steady steps of all ranks that train; sums to 1. Without phases that took no time: a recorded loop
    # did not mark them, or no weights had to be synchronised.
    phase_share: dict[str, float]
    phase_s: dict[str, float]  # mean per step and rank that trains, warm-up excluded
    servers_busy: float | None  # share of the servers' time that is no waiting, receiving or sending
    energy: Energy  # mean per run
    joules_per_sample: float | None  # whole run over all its samples, warm-up included
    speedup: float | None = None  # samples/s relative to the group's baseline
    speedup_interval: Interval | None = None  # 95%
    efficiency: float | None = None  # speedup efficiency: speedup * baseline size / size
    is_baseline: bool = False
    pop: Efficiencies = field(default_factory=Efficiencies)
    stragglers: tuple[StragglerAnalysis, ...] = ()  # of each run: whom its ranks wait for

    @property
    def global_batch(self) -> int:
        return self.runs[0].summary.global_batch

    @property
    def loss(self) -> float | None:
        """The last training loss, mean over runs."""
        return _mean([run.summary.loss for run in self.runs])

    @property
    def test(self) -> dict[str, float]:
        """The test measures, means over the runs that have them."""
        names = dict.fromkeys(name for run in self.runs for name in run.summary.test)
        return {name: fmean(run.summary.test[name] for run in self.runs if name in run.summary.test) for name in names}

    @property
    def exposed_share(self) -> float | None:
        """The share of exposed communication in a step; None if it was not timed."""
        timed = [self.phase_share[phase] for phase in COMMUNICATION if phase in self.phase_share]
        return sum(timed) if timed else None

    @property
    def exposed_s(self) -> float:
        """Exposed communication, mean per step and rank that trains."""
        return sum(self.phase_s.get(phase, 0.0) for phase in COMMUNICATION)

    @property
    def num_servers(self) -> int:
        """How many of its ranks hold weights and do not train."""
        return self.runs[0].num_servers

    def stated(self, key: str) -> float | None:
        """A positive number of meta.json, where all runs state the same."""
        values = {positive_number(run.meta.get(key)) for run in self.runs}
        return values.pop() if len(values) == 1 else None


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one job that differ in size alone. Without a baseline there is no speedup."""

    label: str
    keys: dict[str, Any]  # config.comparable
    weak: bool
    rows: tuple[Row, ...]  # by size; an incomplete row after the complete one of its size
    baseline: Row | None
    notes: tuple[str, ...]
    series: int = 0  # groups of several jobs that ran on equal terms have the same

    @property
    def largest(self) -> Row | None:
        """The largest complete row with a speedup."""
        known = [row for row in self.rows if row.speedup is not None and not row.is_baseline]
        return max((row for row in known if not row.incomplete), key=lambda row: row.size, default=None)


@dataclass(frozen=True, eq=False)
class Scaling:
    """All groups, those with a speedup first, and what must be known to read them."""

    groups: tuple[Group, ...]
    notes: tuple[str, ...]


def compare(runs: Sequence[Run], guard: SectionGuard | None = None) -> Scaling:
    """Groups runs whose configurations agree (`config.comparable`) and compares the sizes within a group.

    Runs of one size that differ in software, hardware or settings are no repeats: each kind is in a group of its own.
    """
    guard = guard or SectionGuard()
    notes: list[str] = []

    def unsorted(why: str) -> list[int]:
        notes.append(f"{why}.")
        return [0] * len(runs)

    series = guard.call("which runs are repeats", unsorted, assign_series, runs)
    by_key: dict[tuple[str, int], list[Run]] = defaultdict(list)
    for run, number in zip(runs, series, strict=True):
        by_key[json.dumps(config.comparable(run.config), sort_keys=True), number].append(run)
    members = list(by_key.values())
    keys = [config.comparable(group[0].config) for group in members]
    apart_by = _apart(by_key)
    named = [_with_facts(*each) for each in zip(labels(members, keys), apart_by, strict=True)]
    groups = []
    for label, key, some, (_, number) in zip(named, keys, members, by_key, strict=True):
        group = guard.call(f"the comparison of {label}", notes.append, _group, label, key, number, some, guard)
        groups += [group] if group is not None else []
    groups.sort(key=lambda group: (-sum(row.speedup is not None for row in group.rows), group.label))
    return Scaling(tuple(groups), (*notes, *_not_pooled(apart_by), *_between_groups(groups)))


def _apart(by_key: dict[tuple[str, int], list[Run]]) -> list[Facts]:
    """Of each group what sets it apart from other series of the same job; {} where there is one."""
    series: dict[str, list[int]] = defaultdict(list)
    for key, number in by_key:
        series[key].append(number)
    facts = {
        key: dict(zip(numbers, distinguishing_facts([by_key[key, n] for n in numbers]), strict=True))
        for key, numbers in series.items()
    }
    return [facts[key][number] for key, number in by_key]


def _with_facts(label: str, facts: Facts) -> str:
    told = listed([f"{name}: {value}" for name, value in facts.items()], _MOST_FACTS)
    return f"{label} ({told})" if facts else label


def _not_pooled(apart_by: Sequence[Facts]) -> list[str]:
    """What keeps runs of one job and one size from being repeats."""
    values: dict[str, dict[str, None]] = defaultdict(dict)
    for facts in apart_by:
        for name, value in facts.items():
            values[name][value] = None
    return [f"Not pooled, since they are no repeats: {name}: {' | '.join(seen)}." for name, seen in values.items()]


def equal_work(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that differ in `reduce.*` alone, where there are several: one job under several strategies."""
    by_work: dict[tuple[str, int], list[Group]] = defaultdict(list)
    for group in groups:
        by_work[json.dumps(work(group.keys), sort_keys=True), group.series].append(group)
    return [members for members in by_work.values() if len(members) > 1]


def work(keys: dict[str, Any]) -> dict[str, Any]:
    """The keys that say what is computed, without those that say how gradients are reduced."""
    return {key: value for key, value in keys.items() if not key.startswith("reduce.")}


def _group(label: str, keys: dict[str, Any], series: int, runs: list[Run], guard: SectionGuard) -> Group | None:
    by_size: dict[tuple[int, bool], list[Run]] = defaultdict(list)
    for run in runs:
        by_size[run.size, run.incomplete is not None].append(run)
    rows = [_row(size, tuple(by_size[size, cut]), cut) for size, cut in sorted(by_size)]
    timed = [row for row in rows if row.step_s]
    baseline = next((row for row in timed if not row.incomplete), None)
    if baseline is not None and all(row.size == baseline.size for row in timed):
        baseline = None
    if baseline is not None:
        rows = [_compared(row, baseline) for row in rows]
    to = baseline.runs if baseline else None
    rows = [_explained(row, to, label, guard) for row in rows]
    baseline = next((row for row in rows if row.is_baseline), None)
    weak = runs[0].config.train.batch_per_rank is not None
    return Group(label, keys, weak, tuple(rows), baseline, tuple(_within_group(rows, baseline, runs)), series)


def _explained(row: Row, baseline: Sequence[Run] | None, label: str, guard: SectionGuard) -> Row:
    """The row with what keeps it from the ideal."""
    where = f"of {plural(row.size, 'rank')} ({label})"
    pop = guard.call(
        f"the POP efficiencies {where}", lambda why: Efficiencies(missing=why), efficiencies, row.runs, baseline
    )
    waits = [
        guard.call(f"who is waited for {where}", lambda why: StragglerAnalysis(told=why), find_stragglers, run)
        for run in row.runs
    ]
    return replace(row, pop=pop, stragglers=tuple(waits))


def _row(size: int, runs: tuple[Run, ...], incomplete: bool) -> Row:
    low, middle, high = pooled_mean_interval([run.step_s for run in runs])
    phases = np.sum([run.phases_s for run in runs], axis=0)
    num_timed = sum(len(run.step_s) * (size - run.num_servers) for run in runs)  # steps of single ranks
    total = float(phases.sum())
    servers = np.sum([run.servers_s for run in runs], axis=0)
    each = [run.summary for run in runs]
    energy = total_energy(Energy(one.joules, one.energy_quality, one.energy_source) for one in each)
    num_samples = sum(one.num_samples for one in each)
    whole = energy.joules
    return Row(
        size,
        runs,
        incomplete,
        middle,
        (low, high) if low is not None and high is not None else None,
        step_median_s=float(np.median(np.concatenate([run.step_s for run in runs]))) if middle else None,
        samples_per_s=each[0].global_batch / middle if middle else None,
        phase_share={phase: float(spent) / total for phase, spent in zip(PHASES, phases, strict=True) if spent},
        phase_s=dict(zip(PHASES, (phases / num_timed).tolist(), strict=True)) if total else {},
        servers_busy=_servers_busy(servers),
        energy=Energy(whole / len(runs) if whole is not None else None, energy.quality, energy.source),
        joules_per_sample=whole / num_samples if whole is not None and num_samples else None,
    )


def timed_phases(rows: Sequence[Row]) -> list[str]:
    """The phases to show: `sync` is shown only if some row spent time in it, since many strategies have none."""
    synced = any("sync" in row.phase_share for row in rows)
    return [phase for phase in PHASES if phase != "sync" or synced]


def _servers_busy(spent_s: FloatArray) -> float | None:
    """The share of the servers' time outside of communication. spent_s: (len(PHASES),)."""
    waited_s = sum(spent_s[PHASES.index(phase)] for phase in COMMUNICATION)
    return float(1 - waited_s / spent_s.sum()) if spent_s.any() else None


def _compared(row: Row, baseline: Row) -> Row:
    """The row with its speedup S and speedup efficiency E against the baseline of s ranks.

    Strong scaling (the same global batch): S = T_s / T_p and E = S * s / p (Eager, Zahorjan and Lazowska,
    "Speedup versus efficiency in parallel systems", IEEE Transactions on Computers 38(3), 1989, with s = 1).
    Weak scaling (the same batch per rank): the ratio of samples per second, the scaled speedup of Gustafson
    (Communications of the ACM 31(5), 1988); E is then T_s / T_p. Both are the ratio of throughputs: so S is
    computed here. T is the mean step, as in `pop`: E is POP's global efficiency over the baseline's own.

    The 95% interval is the bootstrap's: means of both are drawn independently (`bootstrap_means`).
    """
    if row is baseline:
        return replace(row, speedup=1.0, efficiency=1.0, is_baseline=True)
    speedup, interval = relative_speed(row, baseline)
    efficiency = None if speedup is None else speedup * baseline.size / row.size
    return replace(row, speedup=speedup, speedup_interval=interval, efficiency=efficiency)


def relative_speed(row: Row, to: Row) -> tuple[float | None, Interval | None]:
    """The ratio of samples per second, and its 95% interval."""
    if not row.step_s or not to.step_s:
        return None, None
    more = row.global_batch / to.global_batch
    ratio = more * to.step_s / row.step_s
    if row.step_interval_s is None or to.step_interval_s is None:
        return ratio, None
    # Seeds by size: equal ones would draw the same blocks of both and hide part of the noise.
    before = bootstrap_means([run.step_s for run in to.runs], seed=2 * to.size)
    after = bootstrap_means([run.step_s for run in row.runs], seed=2 * row.size + 1)
    return ratio, percentile_interval(more * before / after, ratio)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


# ---------------------------------------------------------------------------------------------- notes


def _within_group(rows: list[Row], baseline: Row | None, runs: list[Run]) -> list[str]:
    notes = []
    if baseline is None:
        sizes = " and ".join(plural(size, "rank") for size in sorted({row.size for row in rows}))
        kind = "complete runs" if any(not row.incomplete for row in rows) else "no complete run"
        notes.append(f"No baseline: {kind} of {sizes} only. A speedup needs steady steps of two sizes.")
    elif baseline.size != 1:
        notes.append(f"The baseline is {plural(baseline.size, 'rank')}, not 1 rank: all speedups are relative to that.")
    notes += [f"Counted once: {copy} is a copy of {run.dir.path}." for run in runs for copy in run.copies]
    notes += [
        f"Incomplete: {run.label} ({plural(run.size, 'rank')}): {run.incomplete}." for run in runs if run.incomplete
    ]
    notes += [
        f"{run.label}: no steady step, all of its {run.summary.num_steps} steps are warm-up."
        for run in runs
        if not len(run.step_s) and not run.incomplete
    ]
    for row in rows:
        if row.step_s and row.step_median_s and abs(row.step_s / row.step_median_s - 1) > _UNEVEN:
            notes.append(
                f"{plural(row.size, 'rank')}: steps take {ms_text(row.step_s)} ms on average, which counts, and"
                f" {ms_text(row.step_median_s)} ms in the median: few of them take most of the difference."
            )
        if row.efficiency and row.efficiency > SUPERLINEAR:
            notes.append(
                f"{plural(row.size, 'rank')}: a speedup efficiency above 100% does not come from sharing the work:"
                " smaller shares may fit the caches, or the baseline was disturbed. Repeat the baseline to tell."
            )
    return notes + mismatches(runs) + _ranks_per_host(runs)


def mismatches(runs: Sequence[Run]) -> list[str]:
    """What differs between runs apart from their size: each fact with its values and where they were seen."""
    notes = []
    for name, values in differing_facts(runs).items():
        seen: dict[str, set[int]] = defaultdict(set)
        for run, value in zip(runs, values, strict=True):
            seen[value].add(run.size)
        by_size = sorted(seen.items(), key=lambda item: min(item[1]))
        told = "; ".join(f"{value} ({_sizes(sizes)})" for value, sizes in by_size)
        notes.append(f"Not alike: {name}: {told}.")
    return notes


def _ranks_per_host(runs: Sequence[Run]) -> list[str]:
    """Says where runs fill their hosts unequally: their ranks share memory and network with more or fewer others.

    A run on one host has as many ranks there as it has: it is another matter only if it has more than runs on several.
    """
    places = [(run, hosts_of(run.meta, run.size)) for run in runs]
    fullest = [(run, max(Counter(hosts).values())) for run, hosts in places if None not in hosts]
    usual = max((num for run, num in fullest if run.summary.num_hosts > 1), default=max(run.size for run in runs))
    seen: dict[int, set[int]] = defaultdict(set)
    for run, num in fullest:
        if run.summary.num_hosts > 1 or num > usual:
            seen[num].add(run.size)
    told = "; ".join(f"{num} ({_sizes(sizes)})" for num, sizes in sorted(seen.items()))
    return [f"Not alike: ranks per host: {told}."] if len(seen) > 1 else []


def differing_facts(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Facts that are not the same for all runs, each with its value for every run."""
    facts = [facts_of(run) for run in runs]
    values = {
        name: [fact.get(name, "unknown") for fact in facts] for name in dict.fromkeys(n for fact in facts for n in fact)
    }
    return {name: seen for name, seen in values.items() if len(set(seen)) > 1}


def _sizes(sizes: set[int]) -> str:
    *most, last = sorted(sizes)
    return f"{', '.join(map(str, most))} and {plural(last, 'rank')}" if most else plural(last, "rank")


# ---------------------------------------------------------------------------------------------- groups


def _differing(keys: Sequence[dict[str, Any]]) -> list[str]:
    every = dict.fromkeys(key for group in keys for key in group)
    return [key for key in every if len({json.dumps(group.get(key)) for group in keys}) > 1]


def _setting(keys: dict[str, Any], key: str) -> str:
    return f"{key} = {keys[key]}" if key in keys else f"{key} unset"


def labels(members: list[list[Run]], keys: list[dict[str, Any]]) -> list[str]:
    """A name for each group: its jobs' names, and what sets it apart from groups of the same name."""
    names = [" + ".join(dict.fromkeys(run.config.name for run in group)) for group in members]
    told = []
    for name, key in zip(names, keys, strict=True):
        twins = [other for twin, other in zip(names, keys, strict=True) if twin == name]
        alike = _differing([twin for twin in twins if twin.get("reduce.strategy") == key.get("reduce.strategy")])
        # Most keys of [reduce] mean something to one strategy only.
        differing = [
            each for each in _differing(twins) if not each.startswith("reduce.") or each in (*alike, "reduce.strategy")
        ]
        apart = [_setting(key, each) for each in differing]
        told.append(f"{name} ({', '.join(apart)})" if apart else name)
    return told


def _between_groups(groups: list[Group]) -> list[str]:
    """Which configuration keys keep the groups apart, and which runs are left without a comparison.

    Groups that `reduce.*` alone keeps apart are compared, as strategies on equal work.
    """
    notes = []
    works = [work(group.keys) for group in groups]
    recorded = [keys for keys in works if keys["task.kind"] == RECORDED]  # these lack what the others have
    for key in _differing(works):
        if recorded and not any(key in keys for keys in recorded):
            continue
        values = " | ".join(dict.fromkeys(str(keys.get(key, "unset")) for keys in works))
        notes.append(f"Not compared across groups, {key} differs: {values}.")
    side_by_side = [group for members in equal_work(groups) for group in members]
    lone = [group for group in groups if group.baseline is None and group not in side_by_side]
    if lone:
        names = ", ".join(run.label for group in lone for row in group.rows for run in row.runs)
        notes.append(f"Left without a comparison: {names}.")
    return notes
