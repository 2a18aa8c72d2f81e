"""The answer in one sentence: what stands first in the terminal and on the page."""

from hpc_train.analysis.report.load_balance_tables import waiting_words
from hpc_train.analysis.scaling.compare import Group, Row
from hpc_train.analysis.scaling.strategies import Comparison
from hpc_train.core.formatting import ms_text, percent, plain, plural, ratio_interval_text, ratio_text, significant
from hpc_train.core.records import COMMUNICATION, PHASES


def headline(group: Group, named: bool = False, advice: str = "") -> str:
    """The group's answer in one sentence: the largest complete size against the baseline. named: with its label.

    advice: how many nodes to ask for, in words: "ask for 16 nodes".
    """
    return (f"{plain(group.label)}: " if named else "") + _answer(group) + (f"; {advice}" if advice else "")


def _answer(group: Group) -> str:
    row, baseline = group.largest, group.baseline
    if row is None or baseline is None:
        shown = next((row for row in reversed(group.rows) if not row.incomplete), group.rows[-1])
        speed = (
            f"{ms_text(shown.step_s)} ms a step, {significant(shown.samples_per_s, 4)} samples/s"
            if shown.step_s
            else "no steady step recorded"
        )
        return f"{plural(shown.size, 'rank')}: {speed}; no baseline, so no speedup{_lost(shown)}"
    assert row.speedup is not None
    low, high = row.speedup_interval or (row.speedup, row.speedup)
    over, efficiency = plural(baseline.size, "rank"), f"{percent(row.efficiency, 0)} efficiency"
    times = ratio_text(row.speedup)
    if low <= 1 <= high:
        return (
            f"{plural(row.size, 'rank')}: no faster than {over} as far as can be told ({times}, 95% interval"
            f" {ratio_interval_text(row.speedup_interval)}, {efficiency}){_lost(row)}{_grown(row, baseline)}"
        )
    if row.speedup < 1:
        return (
            f"{plural(row.size, 'rank')}: slower than {over}, {times} its speed ({efficiency})"
            f"{_lost(row)}{_grown(row, baseline)}"
        )
    work = " in samples/s" if group.weak else ""
    return f"{plural(row.size, 'rank')}: {times} over {over}{work} ({efficiency}){_lost(row)}"


def strategy_headline(comparison: Comparison, named: bool = False) -> str:
    """The strategies' speeds at the largest number of ranks with a ratio. "" for none, and for 1: it sends nothing."""
    size = max(comparison.sizes, default=1)
    if size == 1:
        return ""
    entries = [entry for entry in comparison.entries if entry.row.size == size and entry.ratio is not None]
    words = []
    for entry in sorted(entries, key=lambda entry: -(entry.ratio or 0)):
        low, high = entry.ratio_interval or (0.0, 0.0)
        speed = f"{ms_text(entry.row.step_s)} ms a step" if entry.is_reference else ratio_text(entry.ratio or 0.0)
        words.append(f"{entry.where} {speed}{' (no difference can be told)' if low <= 1 <= high else ''}")
    name = f"{plain(comparison.label)}: " if named else ""
    return f"{name}{plural(size, 'rank')} on equal work, speed against {comparison.reference}: {', '.join(words)}"


def _lost(row: Row) -> str:
    """What keeps the row from the ideal: exposed communication, and who of all is waited for most of that time."""
    share, words = row.exposed_share, waiting_words(row)
    most = max((each.share for each in row.stragglers), default=0.0)
    if share is None or (words and most >= 0.5 * share):  # then little else is in it
        return words
    return f"; {percent(share, 0)} of the step is exposed communication{words}"


def _grown(row: Row, baseline: Row) -> str:
    """The other phases that take longer per step and rank than at the baseline, by 5% of its step or more."""
    before, after = baseline.phase_s, row.phase_s
    notable = 0.05 * sum(before.values())
    grown = [
        f", {phase} grew from {ms_text(before[phase])} to {ms_text(after[phase])} ms"
        for phase in PHASES
        if phase not in COMMUNICATION and after[phase] - before[phase] > notable
    ]
    return "".join(grown)
