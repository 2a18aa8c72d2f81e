"""Model FLOPs and their share of the device's peak (MFU)."""

from typing import Any

from hpc_train.analysis.report.labels import ranks_text
from hpc_train.analysis.report.model import Column, Table, number_columns
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.scaling.compare import Group, Row
from hpc_train.analysis.scaling.mfu import GIVEN, counts_flops, flops_notes, flops_of
from hpc_train.core.formatting import amount, plain, significant

FLOPS_COLUMNS = ("flops_per_sample", "flops_per_s_per_rank", "peak_flops", "peak_source", "mfu")


def add_flops(section: SectionBuilder, group: Group) -> None:
    if counts_flops(group):
        section.table("flops", flops_table, group)
        section.notes("flops", "method", flops_notes, group)


def flops_table(group: Group) -> Table:
    rows = []
    for row in group.rows:
        flops = flops_of(row)
        source = {None: "-", GIVEN: f"given ({GIVEN})"}.get(flops.peak_source, plain(flops.peak_source or ""))
        cells = [ranks_text(row), amount(flops.per_sample, "FLOP"), amount(flops.per_rank_s, "FLOP/s")]
        rows.append((*cells, amount(flops.peak_s, "FLOP/s"), mfu_text(flops.mfu), source))
    columns = number_columns("ranks", "FLOP per sample", "FLOP/s per rank", "peak per rank", "MFU")
    columns.append(Column("peak from", is_text=True))
    title = "Model FLOPs (counted, forward and backward) and MFU, their share of the peak"
    return Table("flops", title, tuple(columns), tuple(rows))


def mfu_text(mfu: float | None) -> str:
    return "missing" if mfu is None else f"{significant(100 * mfu)}%"


def flops_record(row: Row) -> dict[str, Any]:
    """A row's model FLOPs as plain values under `FLOPS_COLUMNS`."""
    flops = flops_of(row)
    values = (flops.per_sample, flops.per_rank_s, flops.peak_s, flops.peak_source, flops.mfu)
    return dict(zip(FLOPS_COLUMNS, values, strict=True))
