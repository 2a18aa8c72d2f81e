"""Where a step's time goes, by phase."""

from hpc_train.analysis.report.labels import communication_text, ranks_text
from hpc_train.analysis.report.model import Table
from hpc_train.analysis.report.notes.scaling import untimed_notes
from hpc_train.analysis.report.plots.step_series import slowest, step_distribution_plot, step_series_plot
from hpc_train.analysis.report.plots.step_time import step_share_plot, step_time_plot
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.columns import CellColumn, make_table, number
from hpc_train.analysis.runs.step_quantiles import QUANTILES, step_quantiles
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row, timed_phases
from hpc_train.core.formatting import ms_text, percent


def add_step_time(section: SectionBuilder, group: Group) -> None:
    section.part("Time of a step")
    section.table("phases", phase_table, group)
    section.notes("untimed-phases", "caution", untimed_notes, group)
    section.plot("time-per-step", step_time_plot, group)
    section.plot("share-of-step", step_share_plot, group)
    section.table("step-times", quantile_table, group)
    section.plot("step-times", step_series_plot, group)
    section.plot("step-distribution", step_distribution_plot, group)


def phase_table(group: Group) -> Table:
    phases = timed_phases(group.rows)
    columns: list[CellColumn[Row]] = [number("ranks", ranks_text), *map(_share_column, phases)]
    whose = "all ranks' time"
    if any(row.num_servers for row in group.rows):
        columns.append(number("servers busy", lambda row: percent(row.servers_busy)))
        whose = "the workers' time; servers busy: not in communication"
    title = f"Step time by phase (share of {whose}; {communication_text(phases)}: exposed communication)"
    return make_table("phases", title, group.rows, columns)


def _share_column(phase: str) -> CellColumn[Row]:
    return number(phase, lambda row: percent(row.phase_share.get(phase)))


def quantile_table(group: Group) -> Table | None:
    """How the times of steps are distributed; None without steady steps."""
    rows = [row for row in group.rows if row.phase_s]
    if not rows:
        return None
    columns: list[CellColumn[Row]] = [
        number("ranks", ranks_text),
        number("steps", lambda row: str(sum(len(run.step_s) for run in row.runs))),
        *map(_quantile_column, QUANTILES),
        number("slowest", lambda row: ms_text(slowest(row))),
    ]
    title = "Distribution of the time of a step in ms (p95: 1 step in 20 is slower; p99: 1 in 100)"
    return make_table("step-times", title, rows, columns)


def _quantile_column(name: str) -> CellColumn[Row]:
    return number(name, lambda row: ms_text(step_quantiles([run.step_s for run in row.runs]).get(name)))
