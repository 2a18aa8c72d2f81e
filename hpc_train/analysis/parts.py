"""What a report says, in its order: the answer, the tables and the notes of each group and comparison."""

from collections.abc import Sequence
from dataclasses import dataclass

from hpc_train.analysis.headlines import headline, strategy_headline
from hpc_train.analysis.scaling import Group, Scaling
from hpc_train.analysis.sheets import Sheet, group_notes, sheets, strategy_notes, strategy_sheets
from hpc_train.analysis.strategies import Comparison


@dataclass(frozen=True, eq=False)
class Part:
    """What stands under a heading of its own: a group, or strategies on equal work."""

    of: Group | Comparison
    label: str
    headline: str  # the answer in one sentence; "" where there is none
    sheets: list[Sheet]
    notes: list[str]


def parts(scaling: Scaling, strategies: Sequence[Comparison]) -> list[Part]:
    """Everything in its order: strategies that several ranks tell apart, the groups, other strategies."""
    groups = [
        Part(group, group.label, headline(group, len(scaling.groups) > 1), sheets(group), group_notes(group))
        for group in scaling.groups
    ]
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
    return [*(part for part in compared if part.headline), *groups, *(part for part in compared if not part.headline)]
