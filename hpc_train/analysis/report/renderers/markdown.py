"""The report as Markdown, to paste into a proposal, an issue or a wiki."""

import re
from collections.abc import Sequence

from hpc_train.analysis.report.model import Column, Note, Report, Table
from hpc_train.core.formatting import plain


def to_markdown(report: Report) -> str:
    """The answer, the tables and the notes of every section. Text from the runs is escaped."""
    blocks = []
    several = len(report.sections) > 1
    for section in report.sections:
        if several:
            blocks.append(f"## {_escaped(section.label)}")
        if section.headline:
            blocks.append(f"**{_escaped(section.headline)}**")
        blocks += map(_table, section.tables)
        if section.notes:
            blocks.append(_list(section.notes))
    if report.notes:
        blocks += ["## All runs"] * several + [_list(report.notes)]
    return "\n\n".join(blocks) + "\n"


def _table(table: Table) -> str:
    """A pipe table below its title, aligned so that the source is readable too."""
    header = [_escaped(column.title) for column in table.columns]
    rows = [[_escaped(cell) for cell in row] for row in table.rows]
    widths = [max(3, *map(len, cells)) for cells in zip(header, *rows, strict=True)]
    rules = [_rule(column, width) for column, width in zip(table.columns, widths, strict=True)]
    lines = [_line(table.columns, widths, cells) for cells in (header, rules, *rows)]
    return f"{_escaped(table.title)}\n\n" + "\n".join(lines)


def _rule(column: Column, width: int) -> str:
    dashes = "-" * (width - 1)
    return f":{dashes}" if column.is_text else f"{dashes}:"


def _line(columns: Sequence[Column], widths: Sequence[int], cells: Sequence[str]) -> str:
    padded = [
        cell.ljust(width) if column.is_text else cell.rjust(width)
        for column, width, cell in zip(columns, widths, cells, strict=True)
    ]
    return f"| {' | '.join(padded)} |"


def _list(notes: Sequence[Note]) -> str:
    return "\n".join(f"- {_escaped(note.text)}" for note in notes)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, leading spaces too."""
    indented = re.sub("^ +", lambda spaces: "\N{NO-BREAK SPACE}" * len(spaces[0]), plain(text))
    return re.sub(r"([\\`*\[\]<|~]|(?<!\w)_|_(?!\w))", r"\\\1", indented)
