"""The report as Markdown, to paste into a proposal, an issue or a wiki."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpc_train.analysis.report.table import Table
from hpc_train.core.formatting import plain

if TYPE_CHECKING:
    from hpc_train.analysis.report.report import Report


def to_markdown(report: "Report") -> str:
    """The answer, the tables and the notes of every part. What comes from the runs is text and no markup."""
    blocks = []
    several = len(report.parts) > 1
    for part in report.parts:
        if several:
            blocks.append(f"## {_text(part.label)}")
        if part.headline:
            blocks.append(f"**{_text(part.headline)}**")
        blocks += [_table(sheet) for sheet in part.sheets]
        if part.notes:
            blocks.append(_list(part.notes))
    if report.scaling.notes:
        blocks += ["## Between groups"] * several + [_list(report.scaling.notes)]
    return "\n\n".join(blocks) + "\n"


def _table(sheet: Table) -> str:
    """A pipe table below its title; the pipes are in line, so that it can be read as it stands."""
    rows = [[_text(column.title) for column in sheet.columns], *([_text(cell) for cell in row] for row in sheet.rows)]
    widths = [max(3, *(len(row[index]) for row in rows)) for index in range(len(sheet.columns))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column.is_text else cell.rjust(width)
            for cell, width, column in zip(row, widths, sheet.columns, strict=True)
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rule = [
        f":{'-' * (width - 1)}" if column.is_text else f"{'-' * (width - 1)}:"
        for width, column in zip(widths, sheet.columns, strict=True)
    ]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return f"{_text(sheet.title)}\n\n" + "\n".join(lines)


def _list(notes: Sequence[str]) -> str:
    return "\n".join(f"- {_text(note)}" for note in notes)


def _text(words: str) -> str:
    """Words that Markdown shows as they are, leading spaces too."""
    indented = re.sub("^ +", lambda spaces: "\N{NO-BREAK SPACE}" * len(spaces[0]), plain(words))
    return re.sub(r"([\\`*\[\]<|~]|(?<!\w)_|_(?!\w))", r"\\\1", indented)
