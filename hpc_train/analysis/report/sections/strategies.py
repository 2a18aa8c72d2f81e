"""Reduction strategies on equal work: the answer in one sentence, tables, notes."""

from typing import Any

from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.model import Section, Table
from hpc_train.analysis.report.notes.headlines import strategy_headline
from hpc_train.analysis.report.notes.strategies import comparison_notes, theory_notes
from hpc_train.analysis.report.plots.strategies import strategy_bytes_plot, strategy_times_plot
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.columns import CellColumn, interval, make_table
from hpc_train.analysis.report.sections.quantities import (
    ENTRY_LOSS,
    EXPOSED,
    OPTIMIZER,
    RANKS,
    RELATIVE_SPEED,
    SAMPLES,
    STEP,
    STRATEGY,
    STRATEGY_NAME,
    VOLUME,
    record,
)
from hpc_train.analysis.report.sections.result import measure_column, measures_of
from hpc_train.analysis.scaling.rows import Row
from hpc_train.analysis.scaling.strategies import Comparison, Entry
from hpc_train.core.formatting import interval_text, ratio_interval_text


def strategy_section(comparison: Comparison, named: bool, guard: SectionGuard) -> Section:
    """named: with the comparison's label, since there are several."""
    label = f"Strategies on equal work: {comparison.label}" if named else "Strategies on equal work"
    section = SectionBuilder("strategies", label, guard)
    section.headline(strategy_headline, comparison, named)
    section.table("strategies", strategy_table, comparison)
    section.table("strategies-traffic", strategy_traffic_table, comparison)
    section.notes("strategies", "caution", comparison_notes, comparison)
    section.notes("strategies-theory", "method", theory_notes, comparison)
    section.plot("strategies-step-time", strategy_times_plot, comparison)
    section.plot("strategies-bytes", strategy_bytes_plot, comparison)
    return section.build()


def strategy_table(comparison: Comparison) -> Table:
    columns: list[CellColumn[Entry]] = [
        STRATEGY_NAME.text_column,
        RANKS.of(_row).column,
        STEP.of(_row).column,
        interval(comparison.entries, lambda entry: entry.row.step, lambda ends: interval_text(ends, 1e3)),
        SAMPLES.of(_row).column,
        RELATIVE_SPEED.titled(f"speed vs {comparison.reference}"),
        interval(comparison.entries, lambda entry: entry.relative_speed, ratio_interval_text),
        EXPOSED.of(_row).column,
    ]
    title = f"Strategies on equal work ({_work_text(comparison)})"
    return make_table("strategies", title, comparison.entries, columns)


def _row(entry: Entry) -> Row:
    return entry.row


def _work_text(comparison: Comparison) -> str:
    """ "global batch 120, 210 steps"."""
    keys = comparison.keys
    weak = keys.get("train.batch_per_rank")
    batch = f"batch per rank {weak}" if weak else f"global batch {keys.get('train.global_batch')}"
    steps = sorted({run.config.train.steps for entry in comparison.entries for run in entry.row.runs})
    return f"{batch}, {' or '.join(map(str, steps))} steps"


def strategy_traffic_table(comparison: Comparison) -> Table:
    columns: list[CellColumn[Entry]] = [
        STRATEGY_NAME.text_column,
        RANKS.of(_row).column,
        VOLUME.column,
        OPTIMIZER.column,
        ENTRY_LOSS.column,
        *map(_measure_column, measures_of([entry.row for entry in comparison.entries])),
    ]
    title = "Communication volume of the busiest rank in a step (theory), largest optimizer state of a rank, and result"
    return make_table("strategies-traffic", title, comparison.entries, columns)


def _measure_column(measure: str) -> CellColumn[Entry]:
    column, cell = measure_column(measure)
    return column, lambda entry: cell(entry.row)


def strategy_notes(comparison: Comparison) -> list[str]:
    return [*comparison_notes(comparison), *theory_notes(comparison)]


# ---------------------------------------------------------------------------------------------- for programs


def comparison_record(comparison: Comparison) -> dict[str, Any]:
    return {
        "label": comparison.label,
        "config": comparison.keys,
        "reference": comparison.reference,
        "notes": strategy_notes(comparison),
        "rows": [_entry_record(entry) for entry in comparison.entries],
    }


def _entry_record(entry: Entry) -> dict[str, Any]:
    return {
        **record(STRATEGY, entry),
        **{f"test_{measure}": value for measure, value in entry.row.test.items()},
        "runs": [str(run.dir.path) for run in entry.row.runs],
    }
