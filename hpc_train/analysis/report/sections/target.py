"""Time to a target loss: the answer in one sentence, tables, notes."""

from collections.abc import Sequence
from typing import Any

from hpc_train.analysis.convergence.target import NOT_REACHED, TargetRow, TargetStudy
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.labels import MARK
from hpc_train.analysis.report.model import Section, Table
from hpc_train.analysis.report.notes.headlines import target_headline
from hpc_train.analysis.report.notes.target import headline_notes, target_notes
from hpc_train.analysis.report.plots.target import target_plot
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.columns import CellColumn, interval, make_table, number
from hpc_train.analysis.report.sections.quantities import TARGET, record
from hpc_train.core.formatting import percent, plain, plural, ratio_interval_text, ratio_text, significant


def target_section(study: TargetStudy, guard: SectionGuard) -> Section:
    """A comparison of several groups by their time to one loss."""
    section = SectionBuilder("target", f"Time to a loss: {study.label}", guard)
    section.headline(_answer, study)
    section.overview(_overview_table, study)
    _add_tables(section, study)
    return section.build()


def _answer(study: TargetStudy) -> str:
    """Never "": a section of its own without a sentence says nothing."""
    why = "not compared, since no two sizes or settings reached it in complete runs"
    return target_headline(study) or f"{plain(study.label)}: time to a loss of {significant(study.target)}: {why}"


def add_target(section: SectionBuilder, study: TargetStudy) -> None:
    """A study of one group alone, as a part of that group's section."""
    section.part("Time to a loss")
    section.notes("time-to-loss", "finding", headline_notes, study)
    _add_tables(section, study)


def _add_tables(section: SectionBuilder, study: TargetStudy) -> None:
    section.table("target", target_table, study)
    section.table("target-speedup", target_speedup_table, study)
    section.notes("target", "method", target_notes, study)
    section.plot("time-to-loss", target_plot, study)


def target_table(study: TargetStudy) -> Table:
    """What it took to reach the target."""
    columns: list[CellColumn[TargetRow]] = [
        *_name_columns(study),
        number("runs", lambda row: str(len(row.reaches))),
        number("steps", lambda row: _count(row.num_steps)),
        number("samples", lambda row: _count(row.num_samples)),
        number("epochs", lambda row: significant(row.epochs)),
        number("seconds", _seconds),
        number("energy", lambda row: "-" if row.joules is None else row.joules.text()),
    ]
    title = f"Time to a training loss of {significant(study.target, 4)} (smoothed; warm-up included)"
    return make_table("target", title, study.rows, columns)


def target_speedup_table(study: TargetStudy) -> Table | None:
    """The speedup by time to the target beside that by samples per second; None without a reference."""
    if study.reference is None:
        return None
    columns: list[CellColumn[TargetRow]] = [
        *_name_columns(study),
        number("by time to target", lambda row: _times(row.speedup)),
        interval(study.rows, lambda row: row.relative_speed, ratio_interval_text),
        number("efficiency", lambda row: percent(row.efficiency)),
        number("by samples/s", lambda row: _times(row.throughput)),
        number("efficiency", lambda row: percent(row.throughput_efficiency)),
        number("statistical", lambda row: percent(row.statistical)),
    ]
    reference = f"{plural(study.reference.size, 'rank')}, batch {study.reference.global_batch}"
    title = f"Speedup vs {reference} (statistical: samples that the reference took / samples taken)"
    return make_table("target-speedup", title, study.rows, columns)


def _overview_table(study: TargetStudy) -> Table:
    return target_speedup_table(study) or target_table(study)


def _name_columns(study: TargetStudy) -> list[CellColumn[TargetRow]]:
    """Ranks, batch and the other keys that differ between rows."""
    columns: list[CellColumn[TargetRow]] = [
        number("ranks", _ranks_text),
        number("batch", lambda row: str(row.global_batch)),
    ]
    for key in study.rows[0].tuning:
        is_batch = key in ("train.global_batch", "train.batch_per_rank")
        if not is_batch and len({str(row.tuning[key]) for row in study.rows}) > 1:
            columns.append(_key_column(key))
    return columns


def _key_column(key: str) -> CellColumn[TargetRow]:
    return number(key.removeprefix("train.").replace("_", " "), lambda row: str(row.tuning[key]))


def _ranks_text(row: TargetRow) -> str:
    num_servers = row.runs[0].num_servers
    ranks = f"{row.size - num_servers}+{num_servers}" if num_servers else str(row.size)
    return ranks + MARK * row.incomplete


def _seconds(row: TargetRow) -> str:
    if row.reached:
        return significant(row.seconds, 4)
    if all(reach.why == NOT_REACHED for reach in row.reaches):
        return NOT_REACHED
    return f"{row.num_reached} of {len(row.reaches)}" if row.num_reached else "missing"


def _count(mean: float | None) -> str:
    """A mean of counts, as an integer if it is one."""
    return significant(mean, 4) if mean is None or mean % 1 else f"{mean:.0f}"


def _times(speedup: float | None) -> str:
    return "-" if speedup is None else ratio_text(speedup)


# ---------------------------------------------------------------------------------------------- for programs


def study_record(study: TargetStudy) -> dict[str, Any]:
    return {
        "label": study.label,
        "target_loss": study.target,
        "target_given": study.set_by is None,
        "headline": target_headline(study),
        "notes": target_notes(study),
        "rows": [_row_record(study, row) for row in study.rows],
    }


def _row_record(study: TargetStudy, row: TargetRow) -> dict[str, Any]:
    return {
        "ranks": row.size,
        "global_batch": row.global_batch,
        "tuning": row.tuning,
        "incomplete": row.incomplete,
        **record(TARGET, (study, row)),
        "throughput_speedup": row.throughput,
        "throughput_efficiency": row.throughput_efficiency,
        "runs": [
            {
                "run": str(reach.run.dir.path),
                "why_not": reach.why or None,
                "steps": reach.num_steps,
                "seconds": reach.seconds,
                "joules": reach.joules.total if reach.seconds is not None else None,
            }
            for reach in row.reaches
        ],
    }


def records_by_run(studies: Sequence[TargetStudy]) -> dict[str, dict[str, Any]]:
    """The quantities of the row that each run directory belongs to."""
    rows = [(study, row) for study in studies for row in study.rows]
    return {str(run.dir.path): record(TARGET, pair) for pair in rows for run in pair[1].runs}
