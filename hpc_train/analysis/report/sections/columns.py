"""Tables by column: each title beside the function that makes its cells."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from hpc_train.analysis.report.model import Column, Table

T = TypeVar("T")
CellColumn = tuple[Column, Callable[[T], str]]


def number(title: str, cell: Callable[[T], str]) -> CellColumn[T]:
    return Column(title), cell


def text(title: str, cell: Callable[[T], str]) -> CellColumn[T]:
    return Column(title, is_text=True), cell


def make_table(id: str, title: str, rows: Sequence[T], columns: Sequence[CellColumn[T]]) -> Table:
    cells = tuple(tuple([cell(row) for _, cell in columns]) for row in rows)
    return Table(id, title, tuple(column for column, _ in columns), cells)
