"""Model FLOPs and their share of the device's peak (MFU)."""

from typing import Any

from hpc_train.analysis.report.labels import ranks_text
from hpc_train.analysis.report.model import Table
from hpc_train.analysis.report.notes.flops import flops_notes
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.columns import CellColumn, make_table, number, text
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.mfu import GIVEN, counts_flops, flops_of
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import amount, plain, significant

FLOPS_COLUMNS = ("flops_per_sample", "flops_per_s_per_rank", "peak_flops", "peak_source", "mfu")


def add_flops(section: SectionBuilder, group: Group) -> None:
    if counts_flops(group):
        section.part("Model FLOPs and MFU")
        section.table("flops", flops_table, group)
        section.notes("flops", "method", flops_notes, group)


def flops_table(group: Group) -> Table:
    columns: list[CellColumn[Row]] = [
        number("ranks", ranks_text),
        number("FLOP per sample", lambda row: amount(flops_of(row).per_sample, "FLOP")),
        number("FLOP/s per rank", lambda row: amount(flops_of(row).per_rank_s, "FLOP/s")),
        number("peak per rank", lambda row: amount(flops_of(row).peak_s, "FLOP/s")),
        number("MFU", lambda row: _mfu_text(flops_of(row).mfu)),
        text("peak from", lambda row: _source_text(flops_of(row).peak_source)),
    ]
    title = "Model FLOPs (counted, forward and backward) and MFU, their share of the peak"
    return make_table("flops", title, group.rows, columns)


def _mfu_text(mfu: float | None) -> str:
    return "missing" if mfu is None else f"{significant(100 * mfu)}%"


def _source_text(source: str | None) -> str:
    if source is None:
        return "-"
    return f"given ({GIVEN})" if source == GIVEN else plain(source)


def flops_record(row: Row) -> dict[str, Any]:
    """A row's model FLOPs as plain values under `FLOPS_COLUMNS`."""
    flops = flops_of(row)
    values = (flops.per_sample, flops.per_rank_s, flops.peak_s, flops.peak_source, flops.mfu)
    return dict(zip(FLOPS_COLUMNS, values, strict=True))
