"""What became of earlier plans: the sizes that they foresaw and that have been measured since."""

from hpc_train.analysis.planning.followed import FollowedPlan, Part, followed_plans
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.scaling.compare import Group
from hpc_train.core.formatting import duration_text, percent, plural, significant


def add_followed_plans(section: SectionBuilder, group: Group) -> None:
    section.notes("followed-plans", "finding", _notes, group)


def _notes(group: Group) -> list[str]:
    return list(map(followed_text, followed_plans(group)))


def followed_text(followed: FollowedPlan) -> str:
    """By how much plan and run part, and which part of the step missed most."""
    low, high = (significant(1e3 * end) for end in followed.interval_s)
    faster = "slower" if followed.error > 0 else "faster"
    where = "inside" if followed.is_inside else "outside"
    said = (
        f"{followed.plan.name} foresaw {significant(1e3 * followed.planned_s)} ms a step on"
        f" {plural(followed.ranks, 'rank')} ({low}-{high}); measured were {significant(1e3 * followed.measured_s)} ms,"
        f" {percent(abs(followed.error))} {faster}, {where} the interval."
    )
    if followed.parts:
        worst = max(followed.parts, key=lambda part: abs(part.measured - part.planned))
        said += f" Most of it is {_part_text(worst)}."
    if followed.power is not None:
        power = followed.power
        said += f" Power: {significant(power.measured)} W, foreseen {significant(power.planned)} W."
    return said


def _part_text(part: Part) -> str:
    return f"{part.name}: {duration_text(part.measured)}, foreseen {duration_text(part.planned)}"
