"""How a group scaled: the answer in one sentence, the overview of a short report, the table of speedups."""

from hpc_train.analysis.report.labels import WITHIN, ranks_text
from hpc_train.analysis.report.model import Table
from hpc_train.analysis.report.notes.scaling import group_notes, incomplete_notes, interval_notes, server_notes
from hpc_train.analysis.report.plots.speedup import speedup_plot
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.columns import CellColumn, interval, make_table, number
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.laws import SerialPart, fitted, serial_parts
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import (
    energy_text,
    interval_text,
    ms_text,
    percent,
    plural,
    ratio_interval_text,
    ratio_text,
    significant,
)


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
    """Time, speedup, exposed communication and energy: what a first look needs."""
    columns: list[CellColumn[Row]] = [
        number("ranks", ranks_text),
        number("step (ms)", lambda row: ms_text(row.step_s)),
        number("samples/s", lambda row: significant(row.samples_per_s, 4)),
        number("speedup", _speedup_text),
        interval(group.rows, lambda row: row.relative_speed, ratio_interval_text),
        number("efficiency", lambda row: percent(row.efficiency)),
        number("exposed", lambda row: percent(row.exposed_share)),
    ]
    if any(row.joules_per_sample is not None for row in group.rows):
        columns.append(number("energy / sample", lambda row: energy_text(row.joules_per_sample, row.energy.quality)))
    title = f"{_kind(group)} (exposed: communication)"
    return make_table("overview", title, group.rows, columns)


def scaling_table(group: Group) -> Table:
    baseline = plural(group.baseline.size, "rank") if group.baseline else None
    columns: list[CellColumn[Row]] = [
        number("ranks", ranks_text),
        number("runs", lambda row: str(len(row.runs))),
        number("step (ms)", lambda row: ms_text(row.step_s)),
        interval(group.rows, lambda row: row.step, lambda ends: interval_text(ends, 1e3)),
        number("samples/s", lambda row: significant(row.samples_per_s, 4)),
        number(f"speedup vs {baseline}" if baseline else "speedup", _speedup_text),
        interval(group.rows, lambda row: row.relative_speed, ratio_interval_text),
        number("speedup efficiency", lambda row: percent(row.efficiency)),
    ]
    return make_table("scaling", _kind(group), group.rows, columns)


def serial_table(group: Group) -> Table | None:
    """The serial part by size beside the law's, which is the same at all sizes; None without a speedup."""
    parts = serial_parts(group)
    if not parts:
        return None
    law = fitted(group)
    fit = f"; {law.name}'s law, fitted to all sizes: {percent(law.serial)}" if law else ""
    within = all(not each.row.relative_speed.between_runs for each in parts if each.row.relative_speed)
    columns: list[CellColumn[SerialPart]] = [
        number("ranks", lambda each: ranks_text(each.row)),
        number("serial part", lambda each: percent(each.part)),
        number(f"95% interval{f' {WITHIN}' * within}", _serial_interval_text),
    ]
    by = "Gustafson's law" if group.weak else "Karp-Flatt"
    return make_table("serial", f"Serial part of the baseline's time, by {by} at each size{fit}", parts, columns)


def _serial_interval_text(part: SerialPart) -> str:
    return "-" if part.interval is None else " to ".join(map(percent, part.interval))


def _kind(group: Group) -> str:
    if group.weak:
        return f"Weak scaling, batch per rank {group.keys['train.batch_per_rank']}"
    return f"Strong scaling, global batch {group.rows[0].global_batch}"


def _speedup_text(row: Row) -> str:
    if row.is_baseline:
        return "baseline"
    return "no baseline" if row.speedup is None else ratio_text(row.speedup)
