"""The next run, in a report: the plan that a group's own sizes give, for the steps that its runs were set to."""

from dataclasses import dataclass

from hpc_train.analysis.models.predict import predict
from hpc_train.analysis.planning.budget import measurements_of, planned_work
from hpc_train.analysis.planning.plan import Plan, make_plan
from hpc_train.analysis.report.plan_tables import answer, sheets, short_answer
from hpc_train.analysis.report.table import Table
from hpc_train.analysis.scaling.compare import Group
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import percent

_TRUSTED = 0.2  # a model that missed held-out sizes by more leads no headline


@dataclass(frozen=True, eq=False)
class Advice:
    """A plan, how it stands in the headline ("" where it should not), and in tables and notes."""

    plan: Plan | None = None
    words: str = ""
    sheets: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()


def advice_of(group: Group) -> Advice:
    """The advice of a group with sizes to compare; empty without. What `hpc-train plan` says of the same runs.

    It stands in the headline where the model was tested on sizes that it had not seen, and came close.
    """
    if group.baseline is None or group.largest is None:
        return Advice()
    try:
        measurements = measurements_of(group)
        plan = make_plan(predict(measurements), planned_work(group, measurements))
    except UserError as error:
        return Advice(notes=(f"No plan for the next run: {error.what}.",))
    missed, words = plan.prediction.chosen.error, short_answer(plan) or ""
    if missed is None or missed > _TRUSTED:
        why = "not tested" if missed is None else f"off by {percent(missed, 0)} on sizes that it had not seen"
        notes = [f"The plan for the next run rests on a model that was {why}: hpc-train plan shows it."]
        return Advice(plan, "", (), tuple(notes))
    notes = [f"The next run: {answer(plan)[0]}", *answer(plan)[1:], *plan.warnings]
    return Advice(plan, words, tuple(sheets(plan)[:2]), tuple(notes))
