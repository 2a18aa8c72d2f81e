"""Tables by column: each title beside the function that makes its cells."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from hpc_train.analysis.report.labels import WITHIN
from hpc_train.analysis.report.model import Column, Table
from hpc_train.analysis.stats.estimate import Estimate
from hpc_train.core.statistics import Interval

T = TypeVar("T")
CellColumn = tuple[Column, Callable[[T], str]]


def number(title: str, cell: Callable[[T], str]) -> CellColumn[T]:
    return Column(title), cell


def text(title: str, cell: Callable[[T], str]) -> CellColumn[T]:
    return Column(title, is_text=True), cell


def interval(
    rows: Sequence[T], estimate: Callable[[T], Estimate | None], text_of: Callable[[Interval | None], str]
) -> CellColumn[T]:
    """95% intervals. The title says that all of them hold within one run, a cell that it alone does."""
    known = [each for each in map(estimate, rows) if each is not None and each.interval is not None]
    all_within = bool(known) and not any(each.between_runs for each in known)

    def cell(row: T) -> str:
        each = estimate(row)
        if each is None or each.interval is None:
            return "-"
        return text_of(each.interval) + ("" if all_within or each.between_runs else f" {WITHIN}")

    return number(f"95% interval {WITHIN}" if all_within else "95% interval", cell)


def make_table(id: str, title: str, rows: Sequence[T], columns: Sequence[CellColumn[T]]) -> Table:
    cells = tuple(tuple([cell(row) for _, cell in columns]) for row in rows)
    return Table(id, title, tuple(column for column, _ in columns), cells)
