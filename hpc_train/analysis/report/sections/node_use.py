"""What ranks took of their nodes: memory at the peak, processors, storage."""

from hpc_train.analysis.report.labels import ranks_text
from hpc_train.analysis.report.model import Plot, Table
from hpc_train.analysis.report.plots.memory import memory_plot
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.columns import CellColumn, make_table, number
from hpc_train.analysis.report.sections.quantities import GPU_USE, RANKS, USE
from hpc_train.analysis.runs.memory import PeakMemory, peak_memory
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import amount, percent


def add_node_use(section: SectionBuilder, group: Group) -> None:
    section.part("Memory, processors and storage")
    section.table("memory", memory_table, group)
    section.table("use", use_table, group)
    section.plot("memory", _memory_plot, group)


def memory_table(group: Group) -> Table | None:
    """None if no run recorded its peak."""
    rows = [(row, peak) for row, peak in _peaks(group) if peak.peak_bytes or peak.resident_bytes]
    if not rows:
        return None
    columns: list[CellColumn[tuple[Row, PeakMemory]]] = [
        number("ranks", lambda pair: ranks_text(pair[0])),
        number("of its own", lambda pair: _bytes_text(pair[1].own_bytes)),
        number("with files", lambda pair: _bytes_text(pair[1].resident_bytes)),
    ]
    if any(peak.on_gpu for _, peak in rows):
        columns.append(number("on its GPU", lambda pair: _bytes_text(pair[1].gpu_bytes)))
    columns += [
        number("expected", lambda pair: _bytes_text(pair[1].expected_bytes)),
        number("room", lambda pair: _bytes_text(pair[1].room_bytes)),
        number("taken of the room", lambda pair: _share_text(pair[1])),
    ]
    title = "Peak memory of the largest rank (room: what a rank may take of its node or GPU)"
    return make_table("memory", title, rows, columns)


def use_table(group: Group) -> Table | None:
    """None if no run recorded it. Columns of GPUs if a run was on GPUs."""
    rows = [row for row in group.rows if any(each.value(row) is not None for each in USE)]
    on_gpus = any(peak.on_gpu for _, peak in _peaks(group))
    title = (
        f"Processors and storage during the loop (cores{' and GPU' * on_gpus}: of a rank; bytes: of all"
        " ranks, read and written without the page cache)"
    )
    columns = [RANKS.column, *(each.column for each in (*(GPU_USE if on_gpus else ()), *USE))]
    return make_table("use", title, rows, columns) if rows else None


def _peaks(group: Group) -> list[tuple[Row, PeakMemory]]:
    """Each row with the run that took most."""
    return [
        (row, max(map(peak_memory, row.runs), key=lambda peak: peak.peak_bytes or peak.resident_bytes or 0.0))
        for row in group.rows
    ]


def _memory_plot(group: Group) -> Plot | None:
    return memory_plot(_peaks(group))


def _bytes_text(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else amount(num_bytes, "B")


def _share_text(peak: PeakMemory) -> str:
    return percent(peak.peak_bytes / peak.room_bytes, 0) if peak.peak_bytes and peak.room_bytes else "-"
