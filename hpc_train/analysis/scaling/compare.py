"""How well did it scale? Runs that may be compared, as rows of growing size against a baseline."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from hpc_train.analysis.efficiency.pop import Efficiencies, efficiencies
from hpc_train.analysis.efficiency.stragglers import StragglerAnalysis, find_stragglers
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.repeats import Facts, assign_series, distinguishing_facts
from hpc_train.analysis.scaling.labels import labels, work
from hpc_train.analysis.scaling.rows import Row, pooled_row, with_speedup
from hpc_train.core import config
from hpc_train.core.formatting import listed, plural

_MOST_FACTS = 3  # in a group's label
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one job that differ in size alone. Without a baseline there is no speedup."""

    label: str
    keys: dict[str, Any]  # config.comparable
    weak: bool
    rows: tuple[Row, ...]  # by size; an incomplete row after the complete one of its size
    baseline: Row | None
    series: int = 0  # groups of several jobs that ran on equal terms have the same
    distinguished_by: Facts = field(default_factory=dict)  # what sets it apart from other series of the same job

    @property
    def runs(self) -> list[Run]:
        return [run for row in self.rows for run in row.runs]

    @property
    def largest(self) -> Row | None:
        """The largest complete row with a speedup."""
        known = [row for row in self.rows if row.speedup is not None and not row.is_baseline]
        return max((row for row in known if not row.incomplete), key=lambda row: row.size, default=None)


@dataclass(frozen=True, eq=False)
class Scaling:
    """All groups, those with most speedups first. not_made: sentences on what could not be computed."""

    groups: tuple[Group, ...]
    not_made: tuple[str, ...] = ()


def compare(runs: Sequence[Run], guard: SectionGuard | None = None) -> Scaling:
    """Groups runs whose configurations agree (`config.comparable`) and compares the sizes within a group.

    Runs of one size that differ in software, hardware or settings are no repeats: each kind has a group of its own.
    """
    guard = guard or SectionGuard()
    not_made: list[str] = []
    one_series = partial(_noted, not_made, [0] * len(runs))
    series = guard.call("which runs are repeats", one_series, assign_series, runs)
    by_key: dict[tuple[str, int], list[Run]] = defaultdict(list)
    for run, number in zip(runs, series, strict=True):
        by_key[json.dumps(config.comparable(run.config), sort_keys=True), number].append(run)
    found = []
    for group in _labelled(by_key):
        what = f"the comparison of {group.label}"
        runs_of_group = by_key[json.dumps(group.keys, sort_keys=True), group.series]
        made = guard.call(what, partial(_noted, not_made, None), _with_rows, group, runs_of_group, guard)
        found += [made] if made is not None else []
    found.sort(key=lambda group: (-sum(row.speedup is not None for row in group.rows), group.label))
    return Scaling(tuple(found), tuple(not_made))


def _noted(not_made: list[str], instead: T, why: str) -> T:
    not_made.append(f"{why}.")
    return instead


def _labelled(by_key: dict[tuple[str, int], list[Run]]) -> list[Group]:
    """The groups without their rows."""
    distinguished_by = _distinguished_by(by_key)
    keys = [config.comparable(runs[0].config) for runs in by_key.values()]
    names = labels(list(by_key.values()), keys)
    groups = []
    for (key, series), own, name in zip(by_key, keys, names, strict=True):
        facts = distinguished_by[key, series]
        weak = by_key[key, series][0].config.train.batch_per_rank is not None
        groups.append(Group(_with_facts(name, facts), own, weak, (), None, series, facts))
    return groups


def _distinguished_by(by_key: dict[tuple[str, int], list[Run]]) -> dict[tuple[str, int], Facts]:
    """What sets each group apart from other series of the same job; {} if there are none."""
    series_of_job: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for key, series in by_key:
        series_of_job[key].append((key, series))
    found: dict[tuple[str, int], Facts] = {}
    for groups in series_of_job.values():
        found |= zip(groups, distinguishing_facts([by_key[group] for group in groups]), strict=True)
    return found


def _with_facts(label: str, facts: Facts) -> str:
    named = listed([f"{name}: {value}" for name, value in facts.items()], _MOST_FACTS)
    return f"{label} ({named})" if facts else label


def _with_rows(group: Group, runs: Sequence[Run], guard: SectionGuard) -> Group:
    by_size: dict[tuple[int, bool], list[Run]] = defaultdict(list)
    for run in runs:
        by_size[run.size, run.incomplete is not None].append(run)
    rows = [pooled_row(by_size[key]) for key in sorted(by_size)]
    baseline = _baseline(rows)
    if baseline is not None:
        rows = [with_speedup(row, baseline) for row in rows]
    baseline_runs = None if baseline is None else baseline.runs
    rows = [_with_losses(row, baseline_runs, group.label, guard) for row in rows]
    baseline = next((row for row in rows if row.is_baseline), None)
    return replace(group, rows=tuple(rows), baseline=baseline)


def _baseline(rows: Sequence[Row]) -> Row | None:
    """The smallest complete row with steady steps, if another size has steady steps, too."""
    timed = [row for row in rows if row.step_s]
    smallest = next((row for row in timed if not row.incomplete), None)
    if smallest is None or all(row.size == smallest.size for row in timed):
        return None
    return smallest


def _with_losses(row: Row, baseline: Sequence[Run] | None, label: str, guard: SectionGuard) -> Row:
    """The row with what keeps it from the ideal: POP efficiencies and stragglers."""
    where = f"of {plural(row.size, 'rank')} ({label})"
    pop = guard.call(f"the POP efficiencies {where}", _no_efficiencies, efficiencies, row.runs, baseline)
    what = f"the stragglers {where}"
    stragglers = [guard.call(what, _no_stragglers, find_stragglers, run) for run in row.runs]
    return replace(row, pop=pop, stragglers=tuple(stragglers))


def _no_efficiencies(why: str) -> Efficiencies:
    return Efficiencies(missing=why)


def _no_stragglers(why: str) -> StragglerAnalysis:
    return StragglerAnalysis(none_because=why)


def equal_work(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that differ in `reduce.*` alone, if there are several: one job under several strategies."""
    by_work: dict[tuple[str, int], list[Group]] = defaultdict(list)
    for group in groups:
        by_work[json.dumps(work(group.keys), sort_keys=True), group.series].append(group)
    return [members for members in by_work.values() if len(members) > 1]
