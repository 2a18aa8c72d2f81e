"""Which state of the model was best on held-out samples, and what came after it."""

from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.validation import RunValidation, best_run
from hpc_train.analysis.scaling.compare import Group
from hpc_train.core.formatting import percent, plain, plural, significant

_WORSE = 0.01  # relative: less is no difference worth a sentence


def validation_notes(group: Group) -> list[str]:
    """Of the largest size that validated."""
    for row in reversed(group.rows):
        runs = {found: run for run in row.runs if (found := run.validation) is not None}
        best = best_run(list(runs))
        if best is not None:
            return [_best_text(best, runs[best])]
    return []


def _best_text(record: RunValidation, run: Run) -> str:
    step, value = record.best
    measure = plain(record.measure.replace("_", " "))
    said = (
        f"Best {measure} on held-out samples: {significant(value, 4)} after {step:,} of"
        f" {run.summary.num_steps:,} steps ({plural(run.size, 'rank')})"
    )
    if step == record.steps[-1]:
        return f"{said}, the last validation: more steps may still improve it."
    worse = (value - record.last if record.more_is_better else record.last - value) / (abs(value) or 1.0)
    after = f"{significant(record.last, 4)} after {record.steps[-1]:,} steps"
    if worse < _WORSE:
        return f"{said}; it is {after}, as good."
    kept = "" if run.config.checkpoint.keep_best else " checkpoint.keep_best keeps the best state."
    return f"{said}; by the end it is {percent(worse, 0)} worse, {after}.{kept}"
