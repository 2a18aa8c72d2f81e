"""Why model FLOPs or MFU are missing, and what is wrong with an MFU above 100%."""

from collections.abc import Iterator, Sequence

from hpc_train.analysis.runs.meta_json import text_at
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.mfu import GIVEN, flops_of
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import plural


def flops_notes(group: Group) -> list[str]:
    return [*_missing_notes(group), *_impossible_notes(group)]


def _missing_notes(group: Group) -> Iterator[str]:
    if rows := _rows_without(group, "flops_per_sample"):
        yield (
            f"Model FLOPs missing for {_sizes(rows)}: the runs do not state one count. torch.utils.flop_counter could"
            " not count this model, or the runs are not alike."
        )
    if rows := _rows_without(group, "peak_flops"):
        devices = dict.fromkeys(text_at(run.meta, "device") or "unknown" for row in rows for run in row.runs)
        yield (
            f"MFU missing for {_sizes(rows)}: the peak of the device ({', '.join(devices)}) is unknown. Set {GIVEN}."
        )


def _impossible_notes(group: Group) -> Iterator[str]:
    for row in group.rows:
        if (flops_of(row).mfu or 0) > 1:
            size = plural(row.size, "rank")
            yield f"{size}: an MFU above 100% is impossible: the peak is too low for this device and precision."


def _rows_without(group: Group, key: str) -> list[Row]:
    return [row for row in group.rows if row.stated(key) is None]


def _sizes(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(plural(row.size, "rank") for row in rows))
