"""One job that was run on unequal terms, such as two commits: each kind of runs against the kind before it."""

import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from hpc_train.analysis.comparison.comparison import DEFAULT_THRESHOLD, RunComparison, compare_sides
from hpc_train.analysis.comparison.differences import differences_of_work
from hpc_train.analysis.comparison.run_figures import figures_of
from hpc_train.analysis.comparison.sides import Side
from hpc_train.analysis.runs.meta_json import text_at
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row


def compare_groups(groups: Sequence[Group]) -> list[RunComparison]:
    """Groups of one job in the order in which they were first run, at the largest size that two of them share.

    A longer and a shorter run of one job are no state before and after a change.
    """
    by_job: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        by_job[json.dumps(group.keys, sort_keys=True)].append(group)
    found = []
    for members in by_job.values():
        ordered = sorted(members, key=_first_started)
        for before, after in pairwise(ordered):
            if _differ_in_length_alone(before, after):
                continue
            rows, others = _complete(before), _complete(after)
            if common := rows.keys() & others.keys():
                size = max(common)
                sides = _side(before, rows[size]), _side(after, others[size])
                if not differences_of_work(sides[0].runs, sides[1].runs):  # such as another number of hosts
                    found.append(compare_sides(*sides, DEFAULT_THRESHOLD))
    return found


def _differ_in_length_alone(one: Group, other: Group) -> bool:
    names = one.distinguished_by.keys() | other.distinguished_by.keys()
    return {name for name in names if one.distinguished_by.get(name) != other.distinguished_by.get(name)} == {"steps"}


def _first_started(group: Group) -> str:
    return min(text_at(run.meta, "started") or "" for run in group.runs)


def _complete(group: Group) -> dict[int, Row]:
    return {row.size: row for row in group.rows if not row.incomplete and row.step_s}


def _side(group: Group, row: Row) -> Side:
    return Side(group.label, tuple(figures_of(run) for run in row.runs if len(run.step_s)))
