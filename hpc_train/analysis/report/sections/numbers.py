"""The four numbers of a group that a page begins with: speedup, samples per second, energy per sample, what to ask for.

They are those of the largest complete size.
"""

from hpc_train.analysis.report.labels import interval_words
from hpc_train.analysis.report.model import KeyNumber
from hpc_train.analysis.report.notes.plan import criterion_text, nodes_text
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.next_run import NextRun
from hpc_train.analysis.report.sections.quantities import row_energy_text
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import ms_text, percent, plain, plural, ratio_text, significant


def add_numbers(section: SectionBuilder, group: Group, advice: NextRun) -> None:
    row = group.largest or next((row for row in reversed(group.rows) if not row.incomplete), group.rows[-1])
    section.number("Speedup", _speedup, group, row)
    section.number("Samples per second", _throughput, row)
    section.number("Energy per sample", _energy, row)
    section.number("Ask for", _request, advice)


def _speedup(group: Group, row: Row) -> KeyNumber:
    if group.baseline is None or row.speedup is None:
        return KeyNumber("Speedup", "no baseline", "a speedup needs steady steps of two sizes")
    detail = f"{percent(row.efficiency, 0)} efficiency on {plural(row.size, 'rank')}"
    if row.speedup_interval is not None:
        detail += f", {interval_words(row.relative_speed)}"
    title = "Speedup over" if row.speedup >= 1 else "Slower: the speed of"
    return KeyNumber(f"{title} {plural(group.baseline.size, 'rank')}", ratio_text(row.speedup), detail)


def _throughput(row: Row) -> KeyNumber:
    if row.samples_per_s is None:
        return KeyNumber("Samples per second", "missing", "no steady step recorded")
    detail = f"{ms_text(row.step_s)} ms a step on {plural(row.size, 'rank')}"
    rate = row.samples_per_s
    return KeyNumber("Samples per second", f"{rate:,.0f}" if rate >= 1000 else significant(rate), detail)


def _energy(row: Row) -> KeyNumber:
    return KeyNumber("Energy per sample", row_energy_text(row.joules_per_sample, row.energy), plain(row.energy.source))


def _request(advice: NextRun) -> KeyNumber:
    plan = advice.plan
    if plan is None or plan.chosen is None or not advice.trusted:
        return KeyNumber("Ask for", "no advice", advice.reason or "a plan needs steady steps of two sizes")
    return KeyNumber("Ask for", nodes_text(plan.prediction.measurements, plan.chosen), criterion_text(plan))
