"""What a report says, in its order: the answer, the tables and the notes of each group and comparison."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec

from hpc_train.analysis.convergence.target import TargetStudy
from hpc_train.analysis.energy.cost import GroupEnergy
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.advice import Advice, advice_of
from hpc_train.analysis.report.cost_tables import cost_details, cost_notes, cost_sheets
from hpc_train.analysis.report.headlines import headline, strategy_headline
from hpc_train.analysis.report.table import Table, made_sheets
from hpc_train.analysis.report.tables import group_notes, sheets, strategy_notes, strategy_sheets
from hpc_train.analysis.report.target_tables import target_headline, target_notes, target_sheets
from hpc_train.analysis.scaling.compare import Group, Scaling
from hpc_train.analysis.scaling.strategies import Comparison

P = ParamSpec("P")


@dataclass(frozen=True, eq=False)
class Part:
    """What stands under a heading of its own: a group, strategies on equal work, groups judged by the same loss."""

    of: Group | Comparison | TargetStudy
    label: str
    headline: str  # the answer in one sentence; "" where there is none
    sheets: list[Table]
    notes: list[str]
    cost: GroupEnergy | None = None  # of a group
    study: TargetStudy | None = None  # of this group alone
    advice: Advice | None = None  # of a group
    details: tuple[Table | str, ...] = ()  # of the sheets and notes: what the terminal leaves to the page


def parts(
    scaling: Scaling,
    strategies: Sequence[Comparison],
    costs: Sequence[GroupEnergy],
    targets: Sequence[TargetStudy],
    guard: SectionGuard,
) -> list[Part]:
    """Everything in its order: strategies that several ranks tell apart, the groups, other strategies, times to a loss.

    A study of one group alone stands with that group.
    """
    several = len(scaling.groups) > 1
    alone = {group: study for group in scaling.groups for study in targets if study.is_of(group)}
    groups = [_group_part(cost, alone.get(cost.group), several, guard) for cost in costs]
    compared = [
        Part(
            each,
            f"Strategies on equal work{f': {each.label}' * (len(strategies) > 1)}",
            _sentence(guard, each.label, strategy_headline, each, len(strategies) > 1),
            strategy_sheets(each, guard),
            _notes(guard, each.label, strategy_notes, each),
        )
        for each in strategies
    ]
    reached = [
        Part(
            each,
            f"Time to a loss: {each.label}",
            _sentence(guard, each.label, target_headline, each),
            _target_sheets(guard, each),
            _notes(guard, each.label, target_notes, each),
        )
        for each in targets
        if each not in alone.values()
    ]
    first = [part for part in compared if part.headline]
    return [*first, *groups, *(part for part in compared if not part.headline), *reached]


def _group_part(cost: GroupEnergy, study: TargetStudy | None, several: bool, guard: SectionGuard) -> Part:
    group, label = cost.group, cost.group.label
    tables = sheets(group, guard)
    notes = [*_notes(guard, label, group_notes, group), *_notes(guard, f"{label}, energy", cost_notes, cost)]
    details: list[Table | str] = [*cost_sheets(cost, guard)]
    details += _notes(guard, f"{label}, tables of energy", cost_details, cost)
    if study is not None:
        answer = _sentence(guard, f"{label}, time to a loss", target_headline, study)
        notes += [f"{answer}."] * bool(answer)
        details += _target_sheets(guard, study)
        details += _notes(guard, f"{label}, time to a loss", target_notes, study)
    advice = guard.call(
        f"the plan for the next run of {label}", lambda why: Advice(notes=(f"{why}.",)), advice_of, group
    )
    details += advice.sheets
    return Part(
        group,
        group.label,
        _sentence(guard, label, headline, group, several, advice.words),
        [*tables, *(each for each in details if isinstance(each, Table))],
        [*notes, *advice.notes, *(each for each in details if isinstance(each, str))],
        cost,
        study,
        advice,
        tuple(details),
    )


def _sentence(guard: SectionGuard, label: str, make: Callable[P, str], *args: P.args, **more: P.kwargs) -> str:
    return guard.call(f"the answer for {label}", lambda why: why, make, *args, **more)


def _notes(guard: SectionGuard, label: str, make: Callable[P, list[str]], *args: P.args, **more: P.kwargs) -> list[str]:
    return guard.call(f"the notes on {label}", lambda why: [f"{why}."], make, *args, **more)


def _target_sheets(guard: SectionGuard, study: TargetStudy) -> list[Table]:
    return made_sheets(guard, {"To a training loss": lambda: target_sheets(study)})
