"""The answers of a report, one sentence a section."""

from collections.abc import Iterator, Sequence
from math import inf

from hpc_train.analysis.convergence.target import TargetRow, TargetStudy
from hpc_train.analysis.report.labels import WITHIN, interval_words, straggler_text, worst_run
from hpc_train.analysis.report.notes.scaling import crowding_text, foreign_work_text, not_to_quote_text
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row
from hpc_train.analysis.scaling.strategies import Comparison, Entry
from hpc_train.core.formatting import ms_text, percent, plain, plural, ratio_interval_text, ratio_text, significant
from hpc_train.core.timing_log import COMMUNICATION, PHASES

_GROWN = 0.05  # of the baseline's step: a phase that grew by less is not worth a clause in the headline
_MOST_NAMES = 3
_MOSTLY = 0.9  # of the exposed communication: stragglers who cause that much are its explanation
_SLOWER_COMPUTING = 0.95  # computation scaling: a smaller loss is not worth a clause


def headline(group: Group, named: bool = False, advice: str = "") -> str:
    """The largest complete size against the baseline. named: with the group's label. advice: "ask for 16 nodes"."""
    answer = _answer(group)
    return (f"{plain(group.label)}: " if named else "") + answer + (f"; {advice}" if advice else "")


def _answer(group: Group) -> str:
    row, baseline = group.largest, group.baseline
    if row is None or baseline is None:
        return _answer_without_baseline(group)
    assert row.speedup is not None
    ranks, over = plural(row.size, "rank"), plural(baseline.size, "rank")
    efficiency, times = f"{percent(row.efficiency, 0)} efficiency", ratio_text(row.speedup)
    known = f"{interval_words(row.relative_speed)}, {efficiency}"
    unquotable = not_to_quote_text(row, baseline)
    lost = f"; {unquotable}" * bool(unquotable) + _slower_computing(row) + _lost(row) + _foreign([baseline, row])
    low, high = row.speedup_interval or (0.0, inf)
    if row.speedup_interval is not None and low <= 1 <= high:
        speed = f"not measurably faster than {over} ({times}, {known})"
    elif high < 1:
        speed = f"slower than {over}, {times} its speed ({known})"
    elif row.speedup < 1:
        speed = f"{times} the speed of {over} ({known})"
    else:
        return f"{ranks}: {times} over {over}{' in samples/s' * group.weak} ({known}){lost}"
    grown = "".join(f", {growth}" for growth in _growths(row, baseline))
    return f"{ranks}: {speed}{lost}{grown}"


def _answer_without_baseline(group: Group) -> str:
    row = next((row for row in reversed(group.rows) if not row.incomplete), group.rows[-1])
    speed = "no steady step recorded"
    if row.step_s:
        speed = f"{ms_text(row.step_s)} ms a step, {significant(row.samples_per_s, 4)} samples/s"
    return f"{plural(row.size, 'rank')}: {speed}; no baseline, so no speedup{_lost(row)}{_foreign([row])}"


def _foreign(rows: Sequence[Row]) -> str:
    text = foreign_work_text(rows)
    return f"; {text}" if text else ""


def _lost(row: Row) -> str:
    """What keeps the row from the ideal: exposed communication, and the stragglers that cause most of it."""
    share, lost = row.exposed_share, time_lost_text(row)
    most = max((each.share for each in row.stragglers), default=0.0)
    if share is None or (lost and most >= _MOSTLY * share):  # exposed communication is then mostly that wait
        return lost
    return f"; {percent(share, 0)} of the step is exposed communication (that no computing hides){lost}"


def _slower_computing(row: Row) -> str:
    """A clause if more is lost to computing than to communication: the same samples take more of the ranks' time."""
    computing, communication = (row.pop.factors.get(name, 1.0) for name in ("computational", "communication"))
    if computing >= min(communication, _SLOWER_COMPUTING):
        return ""
    crowded = crowding_text(row)
    why = f" ({crowded})" if crowded else ""
    return f"; computing a sample takes {ratio_text(1 / computing)} the time{why}"


def _growths(row: Row, baseline: Row) -> Iterator[str]:
    """The other phases that take notably longer per step and rank than at the baseline."""
    before, after = baseline.phase_s, row.phase_s
    notable = _GROWN * sum(before.values())
    for phase in PHASES:
        if phase not in COMMUNICATION and after[phase] - before[phase] > notable:
            yield f"{phase} grew from {ms_text(before[phase])} to {ms_text(after[phase])} ms"


def time_lost_text(row: Row) -> str:
    """ "; 14% of the time lost to straggler rank 5 on c3", "" without stragglers."""
    worst = worst_run(row)
    if worst is None or not worst.stragglers:
        return ""
    names = [straggler_text(straggler) for straggler in worst.stragglers[:_MOST_NAMES]]
    num_more = len(worst.stragglers) - len(names)
    last = f"{num_more} more" if num_more else names.pop()
    whom = f"{', '.join(names)} and {last}" if names else last
    is_sporadic = not any(straggler.persistent for straggler in worst.stragglers)
    what = f"{'sporadic ' * is_sporadic}straggler{'s' * (len(worst.stragglers) > 1)}"
    return f"; {percent(worst.share, 0)} of the time lost to {what} {whom}"


def strategy_headline(comparison: Comparison, named: bool = False) -> str:
    """The strategies' speeds at the largest number of ranks with a ratio. "" for none, and for 1: it sends nothing."""
    size = max(comparison.sizes, default=1)
    if size == 1:
        return ""
    entries = [entry for entry in comparison.entries if entry.row.size == size and entry.ratio is not None]
    entries.sort(key=lambda entry: -(entry.ratio or 0))
    speeds = ", ".join(f"{entry.where} {_speed_text(entry)}" for entry in entries)
    name = f"{plain(comparison.label)}: " if named else ""
    within = all(not entry.relative_speed.between_runs for entry in entries if entry.relative_speed)
    intervals = f"95% intervals{f' {WITHIN}' * within}"
    return f"{name}{plural(size, 'rank')} on equal work, speed against {comparison.reference} ({intervals}): {speeds}"


def _speed_text(entry: Entry) -> str:
    speed = f"{ms_text(entry.row.step_s)} ms a step" if entry.is_reference else ratio_text(entry.ratio or 0.0)
    if entry.ratio_interval is None:
        return speed
    low, high = entry.ratio_interval
    return f"{speed} ({ratio_interval_text((low, high))}{', no measurable difference' * (low <= 1 <= high)})"


def target_headline(study: TargetStudy) -> str:
    """The answer of the largest size in one sentence; "" if there is none."""
    row, reference = study.largest, study.reference
    if row is None or reference is None or row.speedup is None:
        return ""
    sizes = plural(row.size, "rank") + _batch(study, row), plural(reference.size, "rank") + _batch(study, reference)
    over = "over" if row.speedup >= 1 else "the speed of"
    speed = f"{sizes[0]}: {ratio_text(row.speedup)} {over} {sizes[1]} in time to a loss of {significant(study.target)}"
    efficiencies = f"{interval_words(row.relative_speed)}, {percent(row.efficiency, 0)} efficiency"
    if row.throughput_efficiency is not None:
        efficiencies += f", {percent(row.throughput_efficiency, 0)} by samples/s"
    more = 1 / row.statistical if row.statistical else 1.0
    samples = f"; it takes {significant(more)} times the samples" if abs(more - 1) > 0.01 else ""
    return f"{speed} ({efficiencies}){samples}"


def _batch(study: TargetStudy, row: TargetRow) -> str:
    batches = {each.global_batch for each in study.rows}
    return f" (batch {row.global_batch})" if len(batches) > 1 else ""
