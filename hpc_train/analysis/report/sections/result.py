"""What each size cost and reached: energy of a run, last training loss, test measures."""

from collections import defaultdict
from collections.abc import Sequence

from hpc_train.analysis.report.labels import ranks_text
from hpc_train.analysis.report.model import Column, Table, number_columns
from hpc_train.analysis.report.plots.loss import loss_plot
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.scaling.compare import Group, Row
from hpc_train.core.energy_records import NO_METER
from hpc_train.core.formatting import energy_text, percent, plain, plural, significant


def add_result(section: SectionBuilder, group: Group) -> None:
    section.table("result", result_table, group)
    section.notes("energy-missing", "caution", _missing_notes, group)
    section.notes("energy-estimated", "method", _estimate_notes, group)
    section.plot("training-loss", loss_plot, group)


def result_table(group: Group) -> Table:
    measures = measures_of(group.rows)
    with_loss = any(row.loss is not None for row in group.rows)
    columns = number_columns("ranks", "energy per run", "per sample")
    columns.append(Column("meter", is_text=True))
    if with_loss:
        columns.append(Column("loss"))
    columns += number_columns(*map(measure_title, measures))
    rows = []
    for row in group.rows:
        cells = [ranks_text(row), energy_text(row.energy.joules, row.energy)]
        cells += [energy_text(row.joules_per_sample, row.energy), plain(row.energy.source)]
        if with_loss:
            cells.append(significant(row.loss, 4))
        cells += [measure_text(measure, row.test.get(measure)) for measure in measures]
        rows.append(tuple(cells))
    return Table("result", "Energy and result", tuple(columns), tuple(rows))


def measures_of(rows: Sequence[Row]) -> list[str]:
    """Every test measure of the rows, in the order in which runs state them."""
    return list(dict.fromkeys(measure for row in rows for measure in row.test))


def measure_title(measure: str) -> str:
    return f"test {plain(measure.replace('_', ' '))}"


def measure_text(measure: str, value: float | None) -> str:
    """An accuracy in percent, any other measure as a number."""
    return percent(value, 2) if measure.split("_")[-1] == "accuracy" else significant(value, 4)


def _missing_notes(group: Group) -> list[str]:
    sizes_by_reason: dict[str, dict[str, None]] = defaultdict(dict)
    for row in group.rows:
        if row.energy.quality == "missing":
            is_unread = row.energy.source == NO_METER
            reason = "not every host's meter was read" if is_unread else row.energy.source
            sizes_by_reason[reason][plural(row.size, "rank")] = None
    return [
        f"Energy missing for {', '.join(sizes)}: {why}. Missing is not zero." for why, sizes in sizes_by_reason.items()
    ]


def _estimate_notes(group: Group) -> list[str]:
    if not any(row.energy.quality == "estimated" for row in group.rows):
        return []
    runs = [run for row in group.rows for run in row.runs if run.summary.energy_quality == "estimated"]
    assumptions = dict.fromkeys((run.assumption or "the run does not state its assumption").rstrip(".") for run in runs)
    return [f"Energy marked est. is estimated, not measured: {assumption}." for assumption in assumptions]
