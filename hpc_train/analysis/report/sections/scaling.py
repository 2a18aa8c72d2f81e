"""How a group scaled: the answer in one sentence, the overview of a short report, the table of speedups."""

from collections.abc import Iterator

from hpc_train.analysis.report.labels import MARK, ranks_text
from hpc_train.analysis.report.model import Table
from hpc_train.analysis.report.notes.scaling import group_notes
from hpc_train.analysis.report.plots.speedup import speedup_plot
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.columns import CellColumn, make_table, number
from hpc_train.analysis.report.sections.efficiency import waiting_text
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import (
    energy_text,
    interval_text,
    ms_text,
    percent,
    plain,
    plural,
    ratio_interval_text,
    ratio_text,
    significant,
)
from hpc_train.core.records import COMMUNICATION, PHASES

_GROWN = 0.05  # of the baseline's step: a phase that grew by less is not worth a clause in the headline


def add_scaling(section: SectionBuilder, group: Group) -> None:
    section.overview(overview_table, group)
    section.table("scaling", scaling_table, group)
    section.notes("incomplete-mark", "caution", _incomplete_notes, group)
    section.notes("comparison", "caution", group_notes, group)
    section.notes("servers", "method", _server_notes, group)
    section.plot("speedup", speedup_plot, group)


def overview_table(group: Group) -> Table:
    """Time, speedup, exposed communication and energy: what a first look needs."""
    columns: list[CellColumn[Row]] = [
        number("ranks", ranks_text),
        number("step (ms)", lambda row: ms_text(row.step_s)),
        number("samples/s", lambda row: significant(row.samples_per_s, 4)),
        *_speedup_columns(group),
        number("efficiency", lambda row: percent(row.efficiency)),
        number("exposed comm.", lambda row: percent(row.exposed_share)),
    ]
    if any(row.joules_per_sample is not None for row in group.rows):
        columns.append(number("energy / sample", lambda row: energy_text(row.joules_per_sample, row.energy)))
    return make_table("overview", _title(group), group.rows, columns)


def scaling_table(group: Group) -> Table:
    columns: list[CellColumn[Row]] = [
        number("ranks", ranks_text),
        number("runs", lambda row: str(len(row.runs))),
        number("step (ms)", lambda row: ms_text(row.step_s)),
        number("95% interval", lambda row: interval_text(row.step_interval_s, 1e3)),
        number("samples/s", lambda row: significant(row.samples_per_s, 4)),
        *_speedup_columns(group),
        number("speedup efficiency", lambda row: percent(row.efficiency)),
    ]
    return make_table("scaling", _title(group), group.rows, columns)


def _title(group: Group) -> str:
    if group.weak:
        return f"Scaling (weak scaling, batch per rank {group.keys['train.batch_per_rank']})"
    return f"Scaling (strong scaling, global batch {group.rows[0].global_batch})"


def _speedup_columns(group: Group) -> list[CellColumn[Row]]:
    against = f"speedup vs {plural(group.baseline.size, 'rank')}" if group.baseline else "speedup"
    return [number(against, _speedup_text), number("95% interval", _speedup_interval_text)]


def _speedup_text(row: Row) -> str:
    if row.is_baseline:
        return "baseline"
    return "no baseline" if row.speedup is None else ratio_text(row.speedup)


def _speedup_interval_text(row: Row) -> str:
    return "-" if row.is_baseline else ratio_interval_text(row.speedup_interval)


def _incomplete_notes(group: Group) -> list[str]:
    if not any(row.incomplete for row in group.rows):
        return []
    return [f"{MARK} incomplete: shown, never a baseline, never pooled with complete runs."]


def _server_notes(group: Group) -> list[str]:
    if not any(row.num_servers for row in group.rows):
        return []
    return ["Ranks are workers + servers, and both count in the efficiency."]


# ---------------------------------------------------------------------------------------------- the answer


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
    low, high = row.speedup_interval or (row.speedup, row.speedup)
    if low <= 1 <= high:
        interval = f"95% interval {ratio_interval_text(row.speedup_interval)}"
        speed = f"not measurably faster than {over} ({times}, {interval}, {efficiency})"
    elif row.speedup < 1:
        speed = f"slower than {over}, {times} its speed ({efficiency})"
    else:
        return f"{ranks}: {times} over {over}{' in samples/s' * group.weak} ({efficiency}){_lost(row)}"
    grown = "".join(f", {growth}" for growth in _growths(row, baseline))
    return f"{ranks}: {speed}{_lost(row)}{grown}"


def _answer_without_baseline(group: Group) -> str:
    row = next((row for row in reversed(group.rows) if not row.incomplete), group.rows[-1])
    speed = "no steady step recorded"
    if row.step_s:
        speed = f"{ms_text(row.step_s)} ms a step, {significant(row.samples_per_s, 4)} samples/s"
    return f"{plural(row.size, 'rank')}: {speed}; no baseline, so no speedup{_lost(row)}"


def _lost(row: Row) -> str:
    """What keeps the row from the ideal: exposed communication, and the stragglers that cause most of it."""
    share, waiting = row.exposed_share, waiting_text(row)
    most = max((each.share for each in row.stragglers), default=0.0)
    if share is None or (waiting and most >= 0.5 * share):  # exposed communication is then mostly that wait
        return waiting
    return f"; {percent(share, 0)} of the step is exposed communication{waiting}"


def _growths(row: Row, baseline: Row) -> Iterator[str]:
    """The other phases that take notably longer per step and rank than at the baseline."""
    before, after = baseline.phase_s, row.phase_s
    notable = _GROWN * sum(before.values())
    for phase in PHASES:
        if phase not in COMMUNICATION and after[phase] - before[phase] > notable:
            yield f"{phase} grew from {ms_text(before[phase])} to {ms_text(after[phase])} ms"
