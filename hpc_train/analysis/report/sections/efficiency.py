"""POP efficiencies and stragglers: where ranks lose time to each other, and which ranks cause it."""

from typing import Any

from hpc_train.analysis.efficiency.pop import FACTORS
from hpc_train.analysis.efficiency.stragglers import Straggler
from hpc_train.analysis.report.labels import WITHIN, ranks_text, straggler_text
from hpc_train.analysis.report.model import Column, Table, number_columns
from hpc_train.analysis.report.notes.efficiency import pop_missing_notes, straggler_notes
from hpc_train.analysis.report.plots.arrivals import arrivals_plot
from hpc_train.analysis.report.plots.efficiency import efficiency_plot
from hpc_train.analysis.report.plots.rank_phases import rank_phases_plot
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.columns import CellColumn, make_table, number, text
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import ms_text, percent, ratio_text

_MOST_LINES = 12
_FACTOR_LABELS = {  # indented below the factor that they multiply to
    "global": "global",
    "parallel": "= parallel",
    "load_balance": "  = load balance",
    "input": "  x input",
    "communication": "  x communication",
    "serialisation": "    = serialisation",
    "transfer": "    x transfer",
    "computational": "x computation scaling",
}


def add_efficiency(section: SectionBuilder, group: Group) -> None:
    section.part("Efficiency factors and stragglers")
    section.table("pop", pop_table, group)
    section.table("stragglers", straggler_table, group)
    section.notes("pop-missing", "caution", pop_missing_notes, group)
    section.notes("stragglers", "method", straggler_notes, group)
    section.plot("pop-efficiencies", efficiency_plot, group)
    section.plot("rank-phases", rank_phases_plot, group)
    section.plot("late-ranks", arrivals_plot, group)


def pop_table(group: Group) -> Table | None:
    """One line a factor, one column a size; the interval is the largest size's. None if no factor is known."""
    rows = [row for row in group.rows if row.pop.factors]
    if not rows:
        return None
    last = rows[-1]
    sizes = ["1 rank" if row.size == 1 else f"{ranks_text(row)} ranks" for row in rows]
    columns = [Column("factor", is_text=True), *number_columns(*sizes, f"95% interval ({ranks_text(last)})")]
    lines = []
    for factor in FACTORS:
        if any(factor in row.pop.factors for row in rows):
            interval = last.pop.intervals.get(factor)
            cells = [_FACTOR_LABELS[factor], *(_factor_text(row.pop.factors.get(factor)) for row in rows)]
            lines.append((*cells, "-" if interval is None else "-".join(map(_factor_text, interval))))
    is_served = any(row.num_servers for row in rows)
    if group.baseline is not None and "global" in group.baseline.pop.factors and not is_served:
        lines.append(("speedup efficiency", *(_factor_text(row.efficiency) for row in rows), "-"))
    within = "" if last.pop.estimates["parallel"].between_runs else f"; interval {WITHIN}"
    title = f"POP efficiencies (1: no loss; speedup efficiency: global over the baseline's{within})"
    return Table("pop", title, tuple(columns), tuple(lines))


def _factor_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def straggler_table(group: Group) -> Table | None:
    """The worst first; None without stragglers."""
    found = [(row, straggler) for row in group.rows for run in row.stragglers for straggler in run.stragglers]
    if not found:
        return None
    found.sort(key=lambda pair: -pair[1].share)
    columns: list[CellColumn[tuple[Row, Straggler]]] = [
        number("ranks", lambda pair: ranks_text(pair[0])),
        text("straggler", lambda pair: straggler_text(pair[1])),
        text("kind", lambda pair: "persistent" if pair[1].persistent else "sporadic"),
        number("last in", lambda pair: percent(pair[1].share_last)),
        number("late by (ms)", lambda pair: ms_text(pair[1].late_s)),
        number("time lost", lambda pair: percent(pair[1].share)),
        number(f"95% interval {WITHIN}", lambda pair: "-".join(map(percent, pair[1].share_interval or ())) or "-"),
        text("cause", lambda pair: _cause_text(pair[1])),
    ]
    title = "Stragglers (last in: share of the steps in which it arrives last; time lost: share of the job's)"
    return make_table("stragglers", title, found[:_MOST_LINES], columns)


def _cause_text(straggler: Straggler) -> str:
    if straggler.cause is None or straggler.excess is None:
        return "-"
    if straggler.cause == "computing":
        return f"computing {ratio_text(straggler.excess)}"
    return f"input {percent(straggler.excess)}"


# ---------------------------------------------------------------------------------------------- for programs


def straggler_records(row: Row) -> list[dict[str, Any]]:
    """All stragglers of a row's runs as plain values; times in seconds."""
    return [
        {
            "run": str(run.dir.path),
            "ranks": list(straggler.ranks),
            "host": straggler.host,
            "whole_host": straggler.whole_host,
            "persistent": straggler.persistent,
            "share_last": straggler.share_last,
            "late_s": straggler.late_s,
            "cost_s_per_step": straggler.cost_s,
            "share": straggler.share,
            "share_interval": straggler.share_interval,
            "cause": straggler.cause,
            "excess": straggler.excess,
        }
        for run, waiting in zip(row.runs, row.stragglers, strict=True)
        for straggler in waiting.stragglers
    ]
