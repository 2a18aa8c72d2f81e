"""The plan for the next run that a group's own sizes give, for the steps that its runs were set to."""

from dataclasses import dataclass

from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.models.predict import predict
from hpc_train.analysis.planning.budget import measurements_of, planned_work, run_steps
from hpc_train.analysis.planning.memory import rank_memory
from hpc_train.analysis.planning.plan import Plan, make_plan
from hpc_train.analysis.report.notes.plan import plan_warnings
from hpc_train.analysis.report.plots.forecast import forecast_plot
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.plan import answer, models_table, options_table, short_answer
from hpc_train.analysis.scaling.compare import Group
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import percent

_TRUSTED = 0.2  # a model that missed held-out sizes by more gives no recommendation


@dataclass(frozen=True, eq=False)
class NextRun:
    """A plan. reason: why its advice is not given, or why there is none.

    trusted: its model came close on sizes that it had not seen, or the advice is among the measured sizes alone.
    as_measured: the latter.
    """

    plan: Plan | None = None
    trusted: bool = False
    reason: str = ""
    as_measured: bool = False

    @property
    def short(self) -> str:
        """ "ask for 16 nodes"; "" without a recommendation."""
        return (short_answer(self.plan) or "") if self.plan and self.trusted else ""

    @property
    def for_headline(self) -> str:
        return self.short + ", the best of the sizes measured" * (self.as_measured and bool(self.short))


def next_run(group: Group, guard: SectionGuard) -> NextRun:
    """What `hpc-train plan` answers for the same runs; empty if there are no sizes to compare."""
    return guard.call(f"the plan for the next run of {group.label}", _not_made, _next_run, group)


def _not_made(why: str) -> NextRun:
    return NextRun(reason=f"{why}.")


def _next_run(group: Group) -> NextRun:
    if group.baseline is None or group.largest is None:
        return NextRun()
    try:
        measurements = measurements_of(group)
        memory = rank_memory(group, measurements.ranks_per_node)
        plan = make_plan(
            predict(measurements), planned_work(group, measurements), memory=memory, run_steps=run_steps(group)
        )
    except UserError as error:
        return NextRun(reason=f"No plan for the next run: {error.what}.")
    if plan.chosen and not plan.chosen.forecast.is_forecast and plan.prediction.missed():
        return NextRun(plan, True, as_measured=True)  # `make_plan` considers no other size then
    missed = plan.prediction.chosen.error
    if missed is None or missed > _TRUSTED:
        why = "not tested" if missed is None else f"off by {percent(missed, 0)} on sizes that it had not seen"
        return NextRun(plan, False, f"The model behind a plan for the next run was {why}: see hpc-train plan.")
    return NextRun(plan, True)


def add_next_run(section: SectionBuilder, advice: NextRun) -> None:
    section.part("The next run")
    if advice.reason:
        section.notes("next-run", "finding", list, [advice.reason])
    if advice.plan is None:
        return
    if advice.trusted:
        section.notes("next-run", "finding", _answer_notes, advice.plan)
        section.notes("next-run-details", "method", _detail_notes, advice.plan)
        section.table("plan-options", options_table, advice.plan)
        section.table("plan-models", models_table, advice.plan.prediction)
    section.plot("forecast", forecast_plot, advice.plan, advice.short)


def _answer_notes(plan: Plan) -> list[str]:
    return [f"The next run: {answer(plan)[0]}"]


def _detail_notes(plan: Plan) -> list[str]:
    return [*answer(plan)[1:], *plan_warnings(plan)]
