"""Where a step's time goes, by phase."""

from hpc_train.analysis.report.labels import communication_text
from hpc_train.analysis.report.model import Table
from hpc_train.analysis.report.notes.scaling import untimed_notes
from hpc_train.analysis.report.plots.step_series import step_distribution_plot, step_series_plot
from hpc_train.analysis.report.plots.step_time import step_share_plot, step_time_plot
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.columns import make_table
from hpc_train.analysis.report.sections.quantities import DISTRIBUTION, RANKS, SERVERS_BUSY, SHARES, STEPS
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import timed_phases


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
    columns = [RANKS.column, *(SHARES[phase].column for phase in phases)]
    whose = "all ranks' time"
    if any(row.num_servers for row in group.rows):
        columns.append(SERVERS_BUSY.column)
        whose = "the workers' time; servers busy: not in communication"
    title = f"Step time by phase (share of {whose}; {communication_text(phases)}: exposed communication)"
    return make_table("phases", title, group.rows, columns)


def quantile_table(group: Group) -> Table | None:
    """How the times of steps are distributed; None without steady steps."""
    rows = [row for row in group.rows if row.phase_s]
    title = "Distribution of the time of a step in ms (p95: 1 step in 20 is slower; p99: 1 in 100)"
    columns = [RANKS.column, STEPS.column, *(each.column for each in DISTRIBUTION)]
    return make_table("step-times", title, rows, columns) if rows else None
