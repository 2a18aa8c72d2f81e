"""All facts that a report is built from: what the runs measured and how they compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hpc_train.analysis.comparison.between_groups import compare_groups
from hpc_train.analysis.comparison.comparison import RunComparison
from hpc_train.analysis.convergence.target import TargetStudy, studies_of
from hpc_train.analysis.energy.cost import UNKNOWN, GroupEnergy, Tariff, cost_of
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.runs.load import Run, load_known
from hpc_train.analysis.scaling.compare import Scaling, compare
from hpc_train.analysis.scaling.strategies import Comparison, compare_strategies


@dataclass(frozen=True, eq=False)
class Facts:
    runs: tuple[Run, ...]
    scaling: Scaling
    energies: tuple[GroupEnergy, ...]  # one a group, in the groups' order
    strategies: tuple[Comparison, ...]
    targets: tuple[TargetStudy, ...]
    comparisons: tuple[RunComparison, ...] = ()  # of one job on unequal terms
    skipped: tuple[str, ...] = ()  # sentences: runs that could not be read, comparisons that could not be made


def gather(
    paths: Sequence[Path], tariff: Tariff = UNKNOWN, target_loss: float | None = None, guard: SectionGuard | None = None
) -> Facts:
    """Reads and compares the runs at or below `paths`; a note names those that cannot be read.

    Raises `UserError` if there is no run.

    tariff: overrides what the runs' configurations say. target_loss: to which times are compared; None: one that all
    complete runs of a job reached.
    """
    guard = guard or SectionGuard()
    runs, skipped = load_known(paths, guard)
    scaling = compare(runs, guard)
    energies = tuple(cost_of(group, tariff, guard) for group in scaling.groups)
    energy_by_run = {each.run.dir.path: each for energy in energies for row in energy.rows for each in row.runs}
    nothing = partial(_note_failure, skipped)  # no section can say so in its place
    targets = guard.call("times to a loss", nothing, studies_of, scaling.groups, energy_by_run, target_loss)
    strategies = guard.call("strategies on equal work", nothing, compare_strategies, scaling.groups)
    comparisons = guard.call("what changed between runs of one job", nothing, compare_groups, scaling.groups)
    return Facts(tuple(runs), scaling, energies, tuple(strategies), tuple(targets), tuple(comparisons), tuple(skipped))


def _note_failure(skipped: list[str], why: str) -> list[Any]:
    skipped.append(f"{why}.")
    return []
