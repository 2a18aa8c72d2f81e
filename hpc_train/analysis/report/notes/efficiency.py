"""Why POP efficiencies or stragglers are missing, and how well clocks agree."""

from hpc_train.analysis.report.labels import sizes_by_reason
from hpc_train.analysis.scaling.compare import Group
from hpc_train.core.formatting import plain, significant


def pop_missing_notes(group: Group) -> list[str]:
    reasons = sizes_by_reason((row.pop.missing, row.size) for row in group.rows)
    return [f"POP efficiencies missing for {sizes}: {why}." for why, sizes in reasons.items()]


def straggler_notes(group: Group) -> list[str]:
    """Why no straggler is named, and how well clocks agree."""
    runs = [(row, run) for row in group.rows for run in row.stragglers]
    unnamed = sizes_by_reason((run.none_because, row.size) for row, run in runs if not row.pop.missing and row.size > 1)
    notes = [f"No straggler named for {sizes}: {why}." for why, sizes in unnamed.items()]
    unaligned = sizes_by_reason((run.unaligned, row.size) for row, run in runs)
    notes += [
        f"Clocks of {sizes} are not comparable ({plain(why)}): the order of arrival is inferred from how long each rank"
        " waited."
        for why, sizes in unaligned.items()
    ]
    clock_errors_s = [run.clock_error_s for _, run in runs if run.clock_error_s is not None]
    if clock_errors_s:
        notes.append(
            "Stragglers are found by their arrival at the reduction, on clocks aligned to"
            f" {significant(1e6 * max(clock_errors_s))} us (median over ranks), assuming that ranks leave a reduction"
            " together."
        )
    return notes
