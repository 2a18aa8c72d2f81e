"""How a target loss was chosen and reached, and which runs did not reach it."""

from hpc_train.analysis.convergence.target import NOT_REACHED, TargetStudy
from hpc_train.analysis.report.labels import MARK
from hpc_train.analysis.report.notes.headlines import target_headline
from hpc_train.analysis.report.notes.scaling import mismatch_notes
from hpc_train.core.formatting import plural, significant


def headline_notes(study: TargetStudy) -> list[str]:
    answer = target_headline(study)
    return [f"{answer}."] if answer else []


def target_notes(study: TargetStudy) -> list[str]:
    notes = []
    if study.set_by is not None:
        whose = f"{plural(study.set_by.size, 'rank')}, batch {study.set_by.global_batch}"
        notes.append(
            f"The target {significant(study.target, 4)} was not given: it is the worst of the runs' best smoothed"
            f" losses, that of {whose}, so every complete run reached it. --target-loss sets another."
        )
    notes.append(
        "A run reaches the target at the first logged step at which the median of the logged losses around it (9 of"
        " them, or 1/50 of all if that is more; a third of all if these are few) is at or below the target. Seconds"
        " are of the loops until that step's end; warm-up and repeated steps count, time between attempts does not."
    )
    notes += _why_notes(study)
    if any(len(row.reaches) > 1 for row in study.rows):
        notes.append("Intervals are from how repeats differ; seconds of repeats are their geometric mean.")
    if any(row.incomplete for row in study.rows):
        notes.append(f"{MARK} incomplete: shown, never the reference.")
    return notes + mismatch_notes(study.runs) if study.num_groups > 1 else notes


def _why_notes(study: TargetStudy) -> list[str]:
    reaches = [(row, reach) for row in study.rows for reach in row.reaches]
    notes = [
        f"{reach.run.label} ({plural(row.size, 'rank')}): {reach.why}."
        for row, reach in reaches
        if reach.why and reach.why != NOT_REACHED
    ]
    short = [
        f"{plural(row.size, 'rank')}, batch {row.global_batch}" for row, reach in reaches if reach.why == NOT_REACHED
    ]
    if short:
        notes.append(f"Not reached within the recorded steps: {'; '.join(dict.fromkeys(short))}.")
    at_once = [plural(row.size, "rank") for row, reach in reaches if reach.at_once]
    if at_once:
        sizes = ", ".join(dict.fromkeys(at_once))
        notes.append(f"Reached by the first losses of {sizes}: the target is too easy to compare sizes.")
    return notes
