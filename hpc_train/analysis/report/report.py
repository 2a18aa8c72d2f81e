"""From run directories to a report: gather the facts, build the sections."""

from collections.abc import Sequence
from pathlib import Path

from hpc_train.analysis.energy.cost import UNKNOWN, Tariff
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.facts import Facts, gather
from hpc_train.analysis.report.model import Note, Report, Section
from hpc_train.analysis.report.notes.scaling import scaling_notes
from hpc_train.analysis.report.records import Records
from hpc_train.analysis.report.sections.comparison import comparison_section
from hpc_train.analysis.report.sections.group import group_section
from hpc_train.analysis.report.sections.run_metadata import runs_metadata
from hpc_train.analysis.report.sections.strategies import strategy_section
from hpc_train.analysis.report.sections.target import target_section
from hpc_train.analysis.runs.meta_json import text_at


def make_report(paths: Sequence[Path], tariff: Tariff = UNKNOWN, target_loss: float | None = None) -> Report:
    """The report of the runs at or below `paths`. Raises `UserError` if there is none. The options: see `gather`."""
    guard = SectionGuard()
    return build_report(gather(paths, tariff, target_loss, guard), guard)


def build_report(facts: Facts, guard: SectionGuard | None = None) -> Report:
    guard = guard or SectionGuard()
    runs = facts.runs
    sections = _sections(facts, guard)
    compared = {side.name for each in facts.comparisons for side in (each.before, each.after)}
    of_all_runs = (*scaling_notes(facts.scaling, compared), *facts.skipped)
    notes = tuple(Note("all-runs", "caution", text) for text in of_all_runs)
    records = Records(facts, guard)
    rows = records.rows()
    shared, metadata = runs_metadata(runs, guard)
    assumptions = {run.assumption for run in runs if run.summary.energy_quality == "estimated"}
    return Report(
        job_names=tuple(dict.fromkeys(run.summary.name for run in runs)),
        dates=tuple(sorted({(text_at(run.meta, "started") or "")[:10] for run in runs} - {""})),
        sections=tuple(sections),
        notes=notes,
        assumptions=tuple(sorted(filter(None, assumptions))),
        shared_metadata=shared,
        metadata=metadata,
        csv_columns=records.csv_columns(),
        rows=tuple(record for group in rows for record in group),
        summary=records.summary(sections, notes, rows),
        guard=guard,
    )


def _sections(facts: Facts, guard: SectionGuard) -> list[Section]:
    """Strategies with an answer, the groups, what changed between these, other strategies, times to a loss.

    What changed comes before the groups if no group has a speedup: then it is the answer. A study of one group alone is
    a part of that group's section.
    """
    groups = facts.scaling.groups
    study_of = {group: study for group in groups for study in facts.targets if study.is_of(group)}
    of_groups = [group_section(energy, study_of.get(energy.group), len(groups) > 1, guard) for energy in facts.energies]
    of_strategies = [strategy_section(each, len(facts.strategies) > 1, guard) for each in facts.strategies]
    between_groups = [study for study in facts.targets if study not in study_of.values()]
    changes = [comparison_section(each, guard) for each in facts.comparisons]
    has_speedup = any(group.baseline for group in groups)
    return [
        *(section for section in of_strategies if section.headline),
        *([*of_groups, *changes] if has_speedup else [*changes, *of_groups]),
        *(section for section in of_strategies if not section.headline),
        *(target_section(study, guard) for study in between_groups),
    ]
