"""POP efficiencies and stragglers in tables, notes, words and records."""

from collections import defaultdict
from typing import Any

from hpc_train.analysis.efficiency.pop import FACTORS
from hpc_train.analysis.efficiency.stragglers import Straggler
from hpc_train.analysis.report.table import Column, Table, ranks_text
from hpc_train.analysis.scaling.compare import Group, Row
from hpc_train.core.formatting import ms_text, percent, plain, plural, ratio_text, significant

BALANCE_COLUMNS = (
    *(f"pop_{factor}{end}" for factor in FACTORS for end in ("", "_low", "_high")),
    *("waiting_for", "waiting_share", "waiting_share_low", "waiting_share_high", "noise"),
)
_MOST_LINES = 12
_FORMULA = {  # how a factor stands in its product
    "global": "global",
    "parallel": "= parallel",
    "load_balance": "  = load balance",
    "input": "  x input",
    "communication": "  x communication",
    "serialisation": "    = serialisation",
    "transfer": "    x transfer",
    "computational": "x computational",
}


def balance_sheets(group: Group) -> list[Table]:
    """What is lost where, and to whom; nothing where nothing of it is known."""
    return [sheet for sheet in (_pop_sheet(group), _straggler_sheet(group)) if sheet is not None]


def _pop_sheet(group: Group) -> Table | None:
    rows = [row for row in group.rows if row.pop.factors]
    if not rows:
        return None
    shown = [factor for factor in FACTORS if any(factor in row.pop.factors for row in rows)]
    last = rows[-1]
    sizes = ["1 rank" if row.size == 1 else f"{ranks_text(row)} ranks" for row in rows]
    columns = [Column("factor", is_text=True), *map(Column, sizes)]
    columns += [Column(f"95% interval ({ranks_text(last)})")]
    lines = []
    for factor in shown:
        span = last.pop.intervals.get(factor)
        cells = [_FORMULA[factor], *(_share(row.pop.factors.get(factor)) for row in rows)]
        lines.append((*cells, "-" if span is None else "-".join(map(_share, span))))
    if (
        group.baseline is not None
        and "global" in group.baseline.pop.factors
        and not any(row.num_servers for row in rows)
    ):
        lines.append(("speedup efficiency: global / the baseline's", *(_share(row.efficiency) for row in rows), "-"))
    return Table("Efficiencies (POP; 1: nothing lost)", tuple(columns), tuple(lines))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _straggler_sheet(group: Group) -> Table | None:
    found = [(row, one) for row in group.rows for each in row.stragglers for one in each.stragglers]
    if not found:
        return None
    lines = tuple(
        (
            ranks_text(row),
            name(one),
            "persistent" if one.persistent else "sporadic",
            percent(one.share_last),
            ms_text(one.late_s),
            percent(one.share),
            "-" if one.share_interval is None else "-".join(map(percent, one.share_interval)),
            _cause(one),
        )
        for row, one in sorted(found, key=lambda pair: -pair[1].share)[:_MOST_LINES]
    )
    columns = (
        Column("ranks"),
        Column("wait for", is_text=True),
        Column("kind", is_text=True),
        Column("last in"),
        Column("by (ms)"),
        Column("costs"),
        Column("95% interval"),
        Column("more", is_text=True),
    )
    title = "Whom the others wait for (last in: share of the steps; costs: share of the job's time)"
    return Table(title, columns, lines)


def name(one: Straggler) -> str:
    """ "rank 5 on c3", "host c3 (ranks 20-23)"."""
    host = plain(one.host) if one.host else None
    if one.whole_host:
        consecutive = one.ranks[-1] - one.ranks[0] == len(one.ranks) - 1
        ranks = f"{one.ranks[0]}-{one.ranks[-1]}" if consecutive else ", ".join(map(str, one.ranks[:8]))
        return f"host {host} (ranks {ranks})"
    return f"rank {one.ranks[0]}" + (f" on {host}" if host else "")


def _cause(one: Straggler) -> str:
    if one.cause is None or one.excess is None:
        return "-"
    return f"computing {ratio_text(one.excess)}" if one.cause == "computing" else f"input {percent(one.excess)}"


def waiting_words(row: Row) -> str:
    """ "; 14% lost to waiting for rank 5 on c3": of the run that lost most to it; "" where nobody is to be named."""
    worst = max(row.stragglers, key=lambda each: each.share, default=None)
    if worst is None or not worst.stragglers:
        return ""
    names = [name(one) for one in worst.stragglers[:3]]
    more = len(worst.stragglers) - len(names)
    told = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 and not more else [", ".join(names)])
    told += f" and {more} more" if more else ""
    kinds = {one.persistent for one in worst.stragglers}
    now_and_then = ", now and then" if kinds == {False} else ""
    return f"; {percent(worst.share, 0)} lost to waiting for {told}{now_and_then}"


def balance_notes(group: Group) -> list[str]:
    """What must be known to read these tables, and why somebody or something is not in them."""
    notes = []
    missing: dict[str, list[str]] = defaultdict(list)
    nobody: dict[str, list[str]] = defaultdict(list)
    unaligned: dict[str, list[str]] = defaultdict(list)
    errors = []
    for row in group.rows:
        size = plural(row.size, "rank")
        if row.pop.missing:
            missing[row.pop.missing].append(size)
        for each in row.stragglers:
            if each.told and not row.pop.missing and row.size > 1:
                nobody[each.told].append(size)
            if each.unaligned:
                unaligned[each.unaligned].append(size)
            if each.clock_error_s is not None:
                errors.append(each.clock_error_s)
    notes += [f"POP efficiencies missing for {_list(sizes)}: {why}." for why, sizes in missing.items()]
    notes += [f"Nobody to be named for {_list(sizes)}: {why}." for why, sizes in nobody.items()]
    notes += [
        f"Clocks of {_list(sizes)} cannot be compared ({plain(why)}): who came last is told from how long each waited."
        for why, sizes in unaligned.items()
    ]
    if errors:
        notes.append(
            "Who comes last is told by arrival at the reduction, on clocks aligned to"
            f" {significant(1e6 * max(errors))} us in the median, as far as ranks leave it together."
        )
    return notes


def _list(sizes: list[str]) -> str:
    return ", ".join(dict.fromkeys(sizes))


def balance_record(row: Row) -> dict[str, Any]:
    """A row's factors as plain values under `BALANCE_COLUMNS`; None is what is not known."""
    factors: dict[str, Any] = {}
    for factor in FACTORS:
        low, high = row.pop.intervals.get(factor, (None, None))
        factors |= {f"pop_{factor}": row.pop.factors.get(factor), f"pop_{factor}_low": low, f"pop_{factor}_high": high}
    worst = max(row.stragglers, key=lambda each: each.share, default=None)
    noises = [run.load_balance.noise for run in row.runs if run.load_balance and run.load_balance.noise is not None]
    low, high = (worst.share_interval if worst else None) or (None, None)
    known = worst is not None and (worst.stragglers or worst.clock_error_s is not None or worst.unaligned)
    return {
        **factors,
        "waiting_for": " + ".join(map(name, worst.stragglers)) if worst and worst.stragglers else None,
        "waiting_share": worst.share if worst and known else None,
        "waiting_share_low": low,
        "waiting_share_high": high,
        "noise": sum(noises) / len(noises) if noises else None,
    }


def straggler_records(row: Row) -> list[dict[str, Any]]:
    """Everybody named in the runs of a row, as plain values; times in seconds."""
    return [
        {
            "run": str(run.dir.path),
            "ranks": list(one.ranks),
            "host": one.host,
            "whole_host": one.whole_host,
            "persistent": one.persistent,
            "share_last": one.share_last,
            "late_s": one.late_s,
            "cost_s_per_step": one.cost_s,
            "share": one.share,
            "share_interval": one.share_interval,
            "cause": one.cause,
            "excess": one.excess,
        }
        for run, each in zip(row.runs, row.stragglers, strict=True)
        for one in each.stragglers
    ]
