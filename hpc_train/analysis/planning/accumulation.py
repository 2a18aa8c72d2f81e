"""Runs that accumulate gradients over fewer micro-batches on more ranks: one job to a plan."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from hpc_train.analysis.scaling.compare import Group

_KEY = "train.accumulate"


def with_any_accumulation(groups: Sequence[Group]) -> list[Group]:
    """Groups that have steady steps; those that differ in `train.accumulate` alone, and in their sizes, as one.

    A global batch that needs eight micro-batches on 8 ranks needs four on 16. The configuration is that of the largest
    size.
    """
    by_job: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        if any(row.step_s for row in group.rows):
            keys = {key: value for key, value in group.keys.items() if key != _KEY}
            by_job[json.dumps([keys, group.weak, group.series], sort_keys=True)].append(group)
    return [each for alike in by_job.values() for each in _as_one(alike)]


def _as_one(groups: list[Group]) -> list[Group]:
    rows = sorted(
        (row for group in groups for row in group.rows), key=lambda row: (row.size, row.incomplete is not None)
    )
    sizes = [row.size for row in rows if not row.incomplete]
    if len(groups) == 1 or len(set(sizes)) < len(sizes):
        return groups
    largest = max(groups, key=lambda group: max(row.size for row in group.rows))
    return [replace(largest, rows=tuple(rows))]
