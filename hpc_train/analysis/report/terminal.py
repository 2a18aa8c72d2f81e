"""Tables in a terminal, whatever its width."""

from typing import Literal

from rich import box
from rich.console import RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from hpc_train.analysis.report.table import Table
from hpc_train.core.formatting import plain


def shown(text: str, style: str = "") -> Text:
    """Words for the terminal, wherever they come from: nothing in them steers it, no markup is looked for."""
    return Text(plain(text), style)


def fitted(sheet: Table, width: int) -> RenderableType:
    """The table in `width` letters; where it does not fit, a line a row. No number is broken or cut short."""
    table = RichTable(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, header_style="")
    widths = []
    for index, column in enumerate(sheet.columns):
        cells = [len(plain(row[index])) for row in sheet.rows]
        widths.append(max([*cells, *(len(word) for word in column.title.split())]))
    spare = width - sum(widths) - len(widths) - 1
    for index, column in enumerate(sheet.columns):
        # Text gives way where room is short; a title goes on one line where there is room.
        least = min(widths[index], 12) if column.is_text else widths[index]
        wanted = max(least, min(max(widths[index], len(column.title)), widths[index] + spare))
        spare -= wanted - widths[index]
        widths[index] = wanted
        side: Literal["left", "right"] = "left" if column.is_text else "right"
        table.add_column(shown(column.title), justify=side, overflow="fold", width=widths[index])
    for row in sheet.rows:
        table.add_row(*map(shown, row))
    if spare >= 0:
        return table
    lines = [
        ", ".join(plain(f"{column.title} {cell}") for column, cell in zip(sheet.columns, row, strict=True))
        for row in sheet.rows
    ]
    return Text("\n" + "\n".join(lines) + "\n")
