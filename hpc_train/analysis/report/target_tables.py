"""Time to a target loss in words and numbers: tables, notes, the answer in one sentence."""

from collections.abc import Sequence
from typing import Any

from hpc_train.analysis.convergence.target import NOT_REACHED, TargetRow, TargetStudy
from hpc_train.analysis.report.table import MARK, Column, Table
from hpc_train.core.formatting import percent, plural, ratio_interval_text, ratio_text, significant

TARGET_COLUMNS = (
    "target_loss",
    "num_reached",
    "steps_to_target",
    "samples_to_target",
    "epochs_to_target",
    "seconds_to_target",
    "joules_to_target",
    "joules_to_target_quality",
    "target_reference_ranks",
    "target_speedup",
    "target_speedup_low",
    "target_speedup_high",
    "target_efficiency",
    "statistical_efficiency",
)


def target_sheets(study: TargetStudy) -> list[Table]:
    """What it took to reach the target, then the speedup by it beside that by samples per second."""
    titles = ["ranks", "batch", *_tuned_titles(study), "runs", "steps", "samples", "epochs", "seconds", "energy"]
    rows = []
    for row in study.rows:
        cells = [*_names(study, row), str(len(row.reaches)), _count(row.num_steps)]
        joules = "-" if row.joules is None else row.joules.text()
        cells += [_count(row.num_samples), significant(row.epochs), _seconds(row), joules]
        rows.append(tuple(cells))
    title = f"To a training loss of {significant(study.target, 4)} (smoothed; warm-up included)"
    columns = tuple(Column(title) for title in titles)
    return [Table(title, columns, tuple(rows)), *_speed_sheets(study)]


def _speed_sheets(study: TargetStudy) -> list[Table]:
    if study.reference is None:
        return []
    titles = ["ranks", "batch", *_tuned_titles(study), "by time to target", "95% interval", "efficiency"]
    titles += ["by samples/s", "efficiency", "statistical"]
    rows = []
    for row in study.rows:
        cells = [_times(row.speedup), ratio_interval_text(row.speedup_interval), percent(row.efficiency)]
        cells += [_times(row.throughput), percent(row.throughput_efficiency), percent(row.statistical)]
        rows.append((*_names(study, row), *cells))
    against = f"{plural(study.reference.size, 'rank')}, batch {study.reference.global_batch}"
    title = f"Speedup vs {against} (statistical: samples taken there over samples taken here)"
    return [Table(title, tuple(Column(title) for title in titles), tuple(rows))]


def _tuned(study: TargetStudy) -> list[str]:
    """Keys that differ between rows, but for the batch, which has a column of its own."""
    keys = [key for key in study.rows[0].tuning if key not in ("train.global_batch", "train.batch_per_rank")]
    return [key for key in keys if len({str(row.tuning[key]) for row in study.rows}) > 1]


def _tuned_titles(study: TargetStudy) -> list[str]:
    return [key.removeprefix("train.").replace("_", " ") for key in _tuned(study)]


def _names(study: TargetStudy, row: TargetRow) -> list[str]:
    servers = row.runs[0].num_servers
    ranks = f"{row.size - servers}+{servers}" if servers else str(row.size)
    return [ranks + MARK * row.incomplete, str(row.global_batch), *(str(row.tuning[key]) for key in _tuned(study))]


def _seconds(row: TargetRow) -> str:
    if row.reached:
        return significant(row.seconds, 4)
    if all(reach.why == NOT_REACHED for reach in row.reaches):
        return NOT_REACHED
    return f"{row.num_reached} of {len(row.reaches)}" if row.num_reached else "missing"


def _count(mean: float | None) -> str:
    """A mean of counts, whole where it is."""
    return significant(mean, 4) if mean is None or mean % 1 else f"{mean:.0f}"


def _times(speedup: float | None) -> str:
    return "-" if speedup is None else ratio_text(speedup)


def target_headline(study: TargetStudy) -> str:
    """The answer of the largest size in one sentence; "" where there is none."""
    row, reference = study.largest, study.reference
    if row is None or reference is None or row.speedup is None:
        return ""
    goal = f"to a loss of {significant(study.target)}"
    speed = (
        f"{plural(row.size, 'rank')}{_batch(study, row)}: {ratio_text(row.speedup)} over"
        f" {plural(reference.size, 'rank')}{_batch(study, reference)} in time {goal}"
    )
    both = f"{percent(row.efficiency, 0)} efficiency"
    if row.throughput_efficiency is not None:
        both += f", {percent(row.throughput_efficiency, 0)} by samples/s"
    more = 1 / row.statistical if row.statistical else 1.0
    samples = f"; it takes {significant(more)} times the samples" if abs(more - 1) > 0.01 else ""
    return f"{speed} ({both}){samples}"


def _batch(study: TargetStudy, row: TargetRow) -> str:
    batches = {each.global_batch for each in study.rows}
    return f" (batch {row.global_batch})" if len(batches) > 1 else ""


def target_notes(study: TargetStudy) -> list[str]:
    """What must be known to read the tables of `target_sheets`."""
    notes = []
    if study.set_by is not None:
        whose = f"{plural(study.set_by.size, 'rank')}, batch {study.set_by.global_batch}"
        notes.append(
            f"The target {significant(study.target, 4)} was not given: it is the worst of the runs' best smoothed"
            f" losses, that of {whose}, so every complete run reached it. --target-loss sets another."
        )
    notes.append(
        "A run reaches the target at the first logged step at which the median of the logged losses around it (9 of"
        " them, or 1/50 of all where that is more; a third of all where these are few) is at or below the target."
        " Seconds are of the loops until that step's end, warm-up and steps taken twice included, time between"
        " attempts not."
    )
    notes += _why_notes(study)
    if any(len(row.reaches) > 1 for row in study.rows):
        notes.append("Intervals are from how repeats differ; seconds of repeats are their geometric mean.")
    if any(row.incomplete for row in study.rows):
        notes.append(f"{MARK} incomplete: shown, never the reference.")
    if any(len(_seeds(row)) > 1 for row in study.rows):
        notes.append("Runs that differ in seed alone are repeats here.")
    return [*notes, *study.notes]


def _seeds(row: TargetRow) -> set[int]:
    return {run.config.seed for run in row.runs}


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
        notes.append(
            f"Reached by the first losses that could be judged: {', '.join(dict.fromkeys(at_once))}. The target is too"
            " easy to tell sizes apart."
        )
    return notes


def target_record(study: TargetStudy, row: TargetRow) -> dict[str, Any]:
    """A row as plain values under `TARGET_COLUMNS`, in base units; None is unknown or not reached."""
    low, high = row.speedup_interval or (None, None)
    return {
        "target_loss": study.target,
        "num_reached": row.num_reached,
        "steps_to_target": row.num_steps,
        "samples_to_target": row.num_samples,
        "epochs_to_target": row.epochs,
        "seconds_to_target": row.seconds,
        "joules_to_target": row.joules.total if row.joules else None,
        "joules_to_target_quality": row.joules.quality if row.joules else NOT_REACHED,
        "target_reference_ranks": study.reference.size if study.reference else None,
        "target_speedup": row.speedup,
        "target_speedup_low": low,
        "target_speedup_high": high,
        "target_efficiency": row.efficiency,
        "statistical_efficiency": row.statistical,
    }


def study_record(study: TargetStudy) -> dict[str, Any]:
    """A study as plain values."""
    return {
        "label": study.label,
        "target_loss": study.target,
        "target_given": study.set_by is None,
        "headline": target_headline(study),
        "notes": target_notes(study),
        "rows": [
            {
                "ranks": row.size,
                "global_batch": row.global_batch,
                "tuning": row.tuning,
                "incomplete": row.incomplete,
                **target_record(study, row),
                "throughput_speedup": row.throughput,
                "throughput_efficiency": row.throughput_efficiency,
                "runs": [_run_record(row, index) for index in range(len(row.reaches))],
            }
            for row in study.rows
        ],
    }


def _run_record(row: TargetRow, index: int) -> dict[str, Any]:
    reach = row.reaches[index]
    return {
        "run": str(reach.run.dir.path),
        "why_not": reach.why or None,
        "steps": reach.num_steps,
        "seconds": reach.seconds,
        "joules": reach.joules.total if reach.seconds is not None else None,
    }


def records_by_run(studies: Sequence[TargetStudy]) -> dict[str, dict[str, Any]]:
    """`target_record` of the row that each run directory belongs to."""
    return {str(run.dir.path): target_record(study, row) for study in studies for row in study.rows for run in row.runs}
