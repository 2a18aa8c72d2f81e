"""Names of rows, ranks and sizes, the same in tables, sentences and plots."""

from collections.abc import Iterable

from hpc_train.analysis.efficiency.stragglers import Straggler, StragglerAnalysis
from hpc_train.analysis.scaling.rows import Row
from hpc_train.analysis.stats.estimate import Estimate
from hpc_train.core.formatting import plain, plural, ratio_interval_text

MARK = "*"  # on the number of ranks of an incomplete row
WITHIN = "within one run"  # of an interval that repeats say nothing about


def ranks_text(row: Row) -> str:
    """ "4", a parameter server's "3+1" (workers + servers), marked if the runs are incomplete."""
    ranks = f"{row.size - row.num_servers}+{row.num_servers}" if row.num_servers else str(row.size)
    return ranks + MARK * row.incomplete


def interval_words(estimate: Estimate | None) -> str:
    """ "95% interval 1.54-1.58 within one run", "no interval without repeats"."""
    if estimate is None or estimate.interval is None:
        return "no interval without repeats"
    return f"95% interval {ratio_interval_text(estimate.interval)}{'' if estimate.between_runs else f' {WITHIN}'}"


def communication_text(phases: Iterable[str]) -> str:
    """The phases that are exposed communication: "reduce", "reduce and sync"."""
    return "reduce and sync" if "sync" in phases else "reduce"


def sizes_by_reason(pairs: Iterable[tuple[str | None, int]]) -> dict[str, str]:
    """From (reason, ranks) pairs, of which no reason is skipped: {"no meter": "1 rank, 2 ranks"}."""
    sizes: dict[str, dict[str, None]] = {}
    for reason, size in pairs:
        if reason:
            sizes.setdefault(reason, {})[plural(size, "rank")] = None
    return {reason: ", ".join(names) for reason, names in sizes.items()}


def straggler_text(straggler: Straggler) -> str:
    """ "rank 5 on c3", "host c3 (ranks 20-23)"."""
    host = plain(straggler.host) if straggler.host else None
    ranks = straggler.ranks
    if not straggler.whole_host:
        return f"rank {ranks[0]}" + (f" on {host}" if host else "")
    is_range = ranks[-1] - ranks[0] == len(ranks) - 1
    return f"host {host} (ranks {f'{ranks[0]}-{ranks[-1]}' if is_range else ', '.join(map(str, ranks[:8]))})"


def worst_run(row: Row) -> StragglerAnalysis | None:
    """Of the row's runs the one that lost most to stragglers."""
    return max(row.stragglers, key=lambda run: run.share, default=None)
