"""Model FLOPs and their share of the device's peak (MFU)."""

from hpc_train.analysis.report.model import Table
from hpc_train.analysis.report.notes.flops import flops_notes
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.columns import make_table, text
from hpc_train.analysis.report.sections.quantities import FLOPS, RANKS
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.mfu import GIVEN, counts_flops, flops_of
from hpc_train.core.formatting import plain


def add_flops(section: SectionBuilder, group: Group) -> None:
    if counts_flops(group):
        section.part("Model FLOPs and MFU")
        section.table("flops", flops_table, group)
        section.notes("flops", "method", flops_notes, group)


def flops_table(group: Group) -> Table:
    columns = [RANKS.column, *(each.column for each in FLOPS if each.title)]
    columns.append(text("peak from", lambda row: _source_text(flops_of(row).peak_source)))
    title = "Model FLOPs (counted, forward and backward) and MFU, their share of the peak"
    return make_table("flops", title, group.rows, columns)


def _source_text(source: str | None) -> str:
    if source is None:
        return "-"
    return f"given ({GIVEN})" if source == GIVEN else plain(source)
