"""What each size cost and reached: energy of a run, last training loss, test measures."""

from collections.abc import Sequence

from hpc_train.analysis.report.model import Table
from hpc_train.analysis.report.notes.energy import estimate_notes, missing_notes
from hpc_train.analysis.report.notes.validation import validation_notes
from hpc_train.analysis.report.plots.counts import confusion_plot, scatter_plot
from hpc_train.analysis.report.plots.loss import loss_plot
from hpc_train.analysis.report.plots.validation import validation_plot
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.columns import CellColumn, make_table, number, text
from hpc_train.analysis.report.sections.quantities import BEST, ENERGY, ENERGY_PER_SAMPLE, LOSS, RANKS, VALIDATED
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import percent, plain, significant


def add_result(section: SectionBuilder, group: Group) -> None:
    section.part("Energy and result")
    section.table("result", result_table, group)
    section.notes("energy-missing", "caution", missing_notes, group)
    section.notes("energy-estimated", "method", estimate_notes, group)
    section.table("validation", validation_table, group)
    section.notes("validation", "finding", validation_notes, group)
    section.plot("training-loss", loss_plot, group)
    section.plot("validation", validation_plot, group)
    section.plot("confusion", confusion_plot, group)
    section.plot("scatter", scatter_plot, group)


def result_table(group: Group) -> Table:
    columns = [RANKS.column, ENERGY.column, ENERGY_PER_SAMPLE.titled("per sample")]
    columns.append(text("meter", lambda row: plain(row.energy.source)))
    if any(row.loss is not None for row in group.rows):
        columns.append(LOSS.column)
    columns += map(measure_column, measures_of(group.rows))
    return make_table("result", "Energy and result", group.rows, columns)


def validation_table(group: Group) -> Table | None:
    """None if no run validated."""
    rows = [row for row in group.rows if BEST.value(row) is not None]
    title = "Validation on held-out samples (the run with the best value; its time belongs to no step)"
    return make_table("validation", title, rows, [RANKS.column, *(each.column for each in VALIDATED)]) if rows else None


def measures_of(rows: Sequence[Row]) -> list[str]:
    """Every test measure of the rows, in the order in which runs state them."""
    return list(dict.fromkeys(measure for row in rows for measure in row.test))


def measure_column(measure: str) -> CellColumn[Row]:
    return number(f"test {plain(measure.replace('_', ' '))}", lambda row: _measure_text(measure, row.test.get(measure)))


def _measure_text(measure: str, value: float | None) -> str:
    """An accuracy in percent, any other measure as a number."""
    return percent(value, 2) if measure.split("_")[-1] == "accuracy" else significant(value, 4)
