"""What a report says, in its order: the answer, the tables and the notes of each group and comparison."""

from collections.abc import Sequence
from dataclasses import dataclass

from hpc_train.analysis.advice import Advice, advice_of
from hpc_train.analysis.cost import GroupEnergy
from hpc_train.analysis.cost_sheets import cost_details, cost_notes, cost_sheets
from hpc_train.analysis.headlines import headline, strategy_headline
from hpc_train.analysis.scaling import Group, Scaling
from hpc_train.analysis.sheets import group_notes, sheets, strategy_notes, strategy_sheets
from hpc_train.analysis.strategies import Comparison
from hpc_train.analysis.tables import Sheet
from hpc_train.analysis.target import TargetStudy
from hpc_train.analysis.target_sheets import target_headline, target_notes, target_sheets


@dataclass(frozen=True, eq=False)
class Part:
    """What stands under a heading of its own: a group, strategies on equal work, groups judged by the same loss."""

    of: Group | Comparison | TargetStudy
    label: str
    headline: str  # the answer in one sentence; "" where there is none
    sheets: list[Sheet]
    notes: list[str]
    cost: GroupEnergy | None = None  # of a group
    study: TargetStudy | None = None  # of this group alone
    advice: Advice | None = None  # of a group
    details: tuple[Sheet | str, ...] = ()  # of the sheets and notes: what the terminal leaves to the page


def parts(
    scaling: Scaling, strategies: Sequence[Comparison], costs: Sequence[GroupEnergy], targets: Sequence[TargetStudy]
) -> list[Part]:
    """Everything in its order: strategies that several ranks tell apart, the groups, other strategies, times to a loss.

    A study of one group alone stands with that group.
    """
    several = len(scaling.groups) > 1
    alone = {group: study for group in scaling.groups for study in targets if study.is_of(group)}
    groups = [_group_part(cost, alone.get(cost.group), several) for cost in costs]
    compared = [
        Part(
            each,
            f"Strategies on equal work{f': {each.label}' * (len(strategies) > 1)}",
            strategy_headline(each, len(strategies) > 1),
            strategy_sheets(each),
            strategy_notes(each),
        )
        for each in strategies
    ]
    reached = [
        Part(each, f"Time to a loss: {each.label}", target_headline(each), target_sheets(each), target_notes(each))
        for each in targets
        if each not in alone.values()
    ]
    first = [part for part in compared if part.headline]
    return [*first, *groups, *(part for part in compared if not part.headline), *reached]


def _group_part(cost: GroupEnergy, study: TargetStudy | None, several: bool) -> Part:
    group = cost.group
    tables, notes = [*sheets(group)], [*group_notes(group), *cost_notes(cost)]
    details: list[Sheet | str] = [*cost_sheets(cost), *cost_details(cost)]
    if study is not None:
        answer = target_headline(study)
        notes += [f"{answer}."] * bool(answer)
        details += [*target_sheets(study), *target_notes(study)]
    advice = advice_of(group)
    details += advice.sheets
    return Part(
        group,
        group.label,
        headline(group, several, advice.words),
        [*tables, *(each for each in details if isinstance(each, Sheet))],
        [*notes, *advice.notes, *(each for each in details if isinstance(each, str))],
        cost,
        study,
        advice,
        tuple(details),
    )
