"""How a group scaled: the answer in one sentence, the overview of a short report, the table of speedups."""

from hpc_train.analysis.report.labels import WITHIN
from hpc_train.analysis.report.model import Table
from hpc_train.analysis.report.notes.scaling import group_notes, incomplete_notes, interval_notes, server_notes
from hpc_train.analysis.report.plots.speedup import speedup_plot
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.columns import interval, make_table, number
from hpc_train.analysis.report.sections.quantities import (
    BEST,
    BEST_STEP,
    EFFICIENCY,
    ENERGY_PER_SAMPLE,
    EXPOSED,
    NUM_RUNS,
    RANKS,
    SAMPLES,
    SERIAL_PART,
    SPEEDUP,
    STEP,
)
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.laws import fitted, serial_part
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import interval_text, percent, plural, ratio_interval_text


def add_scaling(section: SectionBuilder, group: Group) -> None:
    section.overview(overview_table, group)
    section.part("Speedup and efficiency")
    section.table("scaling", scaling_table, group)
    section.table("serial", serial_table, group)
    section.notes("incomplete-mark", "caution", incomplete_notes, group)
    section.notes("comparison", "caution", group_notes, group)
    section.notes("intervals", "method", interval_notes, group)
    section.notes("servers", "method", server_notes, group)
    section.plot("speedup", speedup_plot, group)


def overview_table(group: Group) -> Table:
    """Time, speedup, exposed communication and energy: what a first look needs. With validations the best of them, in
    the room of samples/s.
    """
    validated = any(BEST.value(row) is not None for row in group.rows)
    columns = [
        *(RANKS.column, STEP.column, *(() if validated else (SAMPLES.column,)), SPEEDUP.column),
        interval(group.rows, lambda row: row.relative_speed, ratio_interval_text),
        *(EFFICIENCY.column, EXPOSED.column),
        *((number("best validation", _best_text),) if validated else ()),
    ]
    if any(row.joules_per_sample is not None for row in group.rows):
        columns.append(ENERGY_PER_SAMPLE.column)
    title = f"{_kind(group)} (exposed: communication)"
    return make_table("overview", title, group.rows, columns)


def _best_text(row: Row) -> str:
    """ "0.3687 @ 50": after 50 steps."""
    return "-" if BEST.value(row) is None else f"{BEST.cell_text(row)} @ {BEST_STEP.cell_text(row)}"


def scaling_table(group: Group) -> Table:
    baseline = f" vs {plural(group.baseline.size, 'rank')}" if group.baseline else ""
    columns = [
        *(RANKS.column, NUM_RUNS.column, STEP.column),
        interval(group.rows, lambda row: row.step, lambda ends: interval_text(ends, 1e3)),
        *(SAMPLES.column, SPEEDUP.titled(f"speedup{baseline}")),
        interval(group.rows, lambda row: row.relative_speed, ratio_interval_text),
        EFFICIENCY.titled("speedup efficiency"),
    ]
    return make_table("scaling", _kind(group), group.rows, columns)


def serial_table(group: Group) -> Table | None:
    """The serial part by size beside the law's, which is the same at all sizes; None without a speedup."""
    rows = [row for row in group.rows if serial_part(row) is not None]
    if not rows:
        return None
    law = fitted(group)
    fit = f"; {law.name}'s law, fitted to all sizes: {percent(law.serial)}" if law else ""
    within = not any(row.relative_speed.between_runs for row in rows if row.relative_speed)
    columns = [
        *(RANKS.column, SERIAL_PART.column),
        number(f"95% interval{f' {WITHIN}' * within}", _serial_interval_text),
    ]
    by = "Gustafson's law" if group.weak else "Karp-Flatt"
    return make_table("serial", f"Serial part of the baseline's time, by {by} at each size{fit}", rows, columns)


def _serial_interval_text(row: Row) -> str:
    part = serial_part(row)
    return "-" if part is None or part.interval is None else " to ".join(map(percent, part.interval))


def _kind(group: Group) -> str:
    if group.weak:
        return f"Weak scaling, batch per rank {group.keys['train.batch_per_rank']}"
    return f"Strong scaling, global batch {group.rows[0].global_batch}"
