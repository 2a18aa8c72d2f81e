"""POP efficiencies and stragglers: where ranks lose time to each other, and which ranks cause it."""

from typing import Any

from hpc_train.analysis.efficiency.pop import FACTORS
from hpc_train.analysis.efficiency.stragglers import Straggler, StragglerAnalysis
from hpc_train.analysis.report.labels import ranks_text, sizes_by_reason, straggler_text
from hpc_train.analysis.report.model import Column, Table, number_columns
from hpc_train.analysis.report.plots.arrivals import arrivals_plot
from hpc_train.analysis.report.plots.efficiency import efficiency_plot
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.columns import CellColumn, make_table, number, text
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import ms_text, percent, plain, ratio_text, significant

EFFICIENCY_COLUMNS = (
    *(f"pop_{factor}{end}" for factor in FACTORS for end in ("", "_low", "_high")),
    *("waiting_for", "waiting_share", "waiting_share_low", "waiting_share_high", "noise"),
)
_MOST_LINES = 12
_MOST_NAMES = 3
_FACTOR_LABELS = {  # indented below the factor that they multiply to
    "global": "global",
    "parallel": "= parallel",
    "load_balance": "  = load balance",
    "input": "  x input",
    "communication": "  x communication",
    "serialisation": "    = serialisation",
    "transfer": "    x transfer",
    "computational": "x computational",
}


def add_efficiency(section: SectionBuilder, group: Group) -> None:
    section.table("pop", pop_table, group)
    section.table("stragglers", straggler_table, group)
    section.notes("pop-missing", "caution", _pop_missing_notes, group)
    section.notes("stragglers", "method", _straggler_notes, group)
    section.plot("pop-efficiencies", efficiency_plot, group)
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
        label = "speedup efficiency: global / baseline's global"
        lines.append((label, *(_factor_text(row.efficiency) for row in rows), "-"))
    return Table("pop", "POP efficiencies (1: no loss)", tuple(columns), tuple(lines))


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
        number("cost", lambda pair: percent(pair[1].share)),
        number("95% interval", lambda pair: "-".join(map(percent, pair[1].share_interval or ())) or "-"),
        text("cause", lambda pair: _cause_text(pair[1])),
    ]
    title = "Stragglers (last in: share of the steps in which it arrives last; cost: share of the job's time)"
    return make_table("stragglers", title, found[:_MOST_LINES], columns)


def _cause_text(straggler: Straggler) -> str:
    if straggler.cause is None or straggler.excess is None:
        return "-"
    if straggler.cause == "computing":
        return f"computing {ratio_text(straggler.excess)}"
    return f"input {percent(straggler.excess)}"


def _worst(row: Row) -> StragglerAnalysis | None:
    """Of the row's runs the one that lost most to stragglers."""
    return max(row.stragglers, key=lambda run: run.share, default=None)


def waiting_text(row: Row) -> str:
    """ "; 14% lost to waiting for rank 5 on c3", "" without stragglers."""
    worst = _worst(row)
    if worst is None or not worst.stragglers:
        return ""
    names = [straggler_text(straggler) for straggler in worst.stragglers[:_MOST_NAMES]]
    num_more = len(worst.stragglers) - len(names)
    last = f"{num_more} more" if num_more else names.pop()
    whom = f"{', '.join(names)} and {last}" if names else last
    is_sporadic = not any(straggler.persistent for straggler in worst.stragglers)
    return f"; {percent(worst.share, 0)} lost to waiting for {whom}{', sporadically' if is_sporadic else ''}"


def _pop_missing_notes(group: Group) -> list[str]:
    reasons = sizes_by_reason((row.pop.missing, row.size) for row in group.rows)
    return [f"POP efficiencies missing for {sizes}: {why}." for why, sizes in reasons.items()]


def _straggler_notes(group: Group) -> list[str]:
    """Why no straggler is named, and how well clocks agree."""
    runs = [(row, run) for row in group.rows for run in row.stragglers]
    unnamed = sizes_by_reason((run.told, row.size) for row, run in runs if not row.pop.missing and row.size > 1)
    notes = [f"No straggler named for {sizes}: {why}." for why, sizes in unnamed.items()]
    unaligned = sizes_by_reason((run.unaligned, row.size) for row, run in runs)
    notes += [
        f"Clocks of {sizes} are not comparable ({plain(why)}): the order of arrival is inferred from how long each rank"
        " waited."
        for why, sizes in unaligned.items()
    ]
    clock_errors_s = [run.clock_error_s for _, run in runs if run.clock_error_s is not None]
    if clock_errors_s:
        notes.append(
            "Stragglers are found by their arrival at the reduction, on clocks aligned to"
            f" {significant(1e6 * max(clock_errors_s))} us (median over ranks), assuming that ranks leave a reduction"
            " together."
        )
    return notes


# ---------------------------------------------------------------------------------------------- for programs


def efficiency_record(row: Row) -> dict[str, Any]:
    """A row's factors as plain values under `EFFICIENCY_COLUMNS`; None is unknown."""
    record: dict[str, Any] = {}
    for factor in FACTORS:
        low, high = row.pop.intervals.get(factor, (None, None))
        record |= {f"pop_{factor}": row.pop.factors.get(factor), f"pop_{factor}_low": low, f"pop_{factor}_high": high}
    worst = _worst(row)
    is_known = worst is not None and (worst.stragglers or worst.clock_error_s is not None or worst.unaligned)
    low, high = (worst.share_interval if worst else None) or (None, None)
    noises = [run.load_balance.noise for run in row.runs if run.load_balance and run.load_balance.noise is not None]
    return {
        **record,
        "waiting_for": " + ".join(map(straggler_text, worst.stragglers)) if worst and worst.stragglers else None,
        "waiting_share": worst.share if worst and is_known else None,
        "waiting_share_low": low,
        "waiting_share_high": high,
        "noise": sum(noises) / len(noises) if noises else None,
    }


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
