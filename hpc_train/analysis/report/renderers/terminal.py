"""A report in a terminal of any width: one screen with the answer, or everything."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from hpc_train.analysis.report.model import Note, NoteKind, Report, Table
from hpc_train.core.formatting import plain

_MOST_HEADLINES = 6  # of a short report
_MOST_CAUTIONS, _MOST_FINDINGS = 2, 2  # of a single section
_MOST_SECTIONS = 4  # whose notes add to these
_LEAST_TEXT_WIDTH = 12  # text columns wrap down to this many letters


def print_short(report: Report, console: Console) -> None:
    """The answers, one table, the notes that matter most: a screen of 80 x 24 for a job of a few sizes."""
    for index, section in enumerate(report.sections[:_MOST_HEADLINES]):
        console.print(safe_text(section.headline or section.label, "" if index else "bold"))
    if len(report.sections) > _MOST_HEADLINES:
        console.print(f"and {len(report.sections) - _MOST_HEADLINES} more")
    first = report.sections[0] if report.sections else None
    if first is not None and first.overview is not None:
        console.print("", safe_text(first.overview.title), fit_table(first.overview, console.width), sep="\n")
    more = min(len(report.sections), _MOST_SECTIONS) - 1  # one note each of further sections
    cautions, findings = _notes_in_turn(report, "caution"), _notes_in_turn(report, "finding")
    for text in (*cautions[: _MOST_CAUTIONS + more], *findings[: _MOST_FINDINGS + more]):
        console.print(safe_text(f"- {text}"))
    num_tables = sum(len(section.tables) for section in report.sections)
    num_notes = sum(len(section.notes) for section in report.sections) + len(report.notes)
    console.print(f"--full prints all {num_tables} tables and {num_notes} notes; the page also has figures.")


def _notes_in_turn(report: Report, kind: NoteKind) -> list[str]:
    """What a mark in the table above means; notes on all runs, which name those that could not be read; then the first
    of each section, the second of each, and so on.
    """
    several = len(report.sections) > 1
    by_section = [
        [(note, f"{section.label}: {note.text}" if several else note.text) for note in section.notes]
        for section in report.sections
    ]
    marks = [pair for pair in by_section[0] if pair[0].id == "incomplete-mark"] if by_section else []
    in_turn = [pair for turn in zip_longest(*by_section) for pair in turn if pair is not None]
    of_all = [*marks, *((note, note.text) for note in report.notes), *in_turn]
    return list(dict.fromkeys(text for note, text in of_all if note.kind == kind))


def print_full(report: Report, console: Console) -> None:
    """Every table and note."""
    for section in report.sections:
        console.print(safe_text(section.headline or section.label, "bold"), "")
        for table in section.tables:
            console.print(safe_text(table.title), fit_table(table, console.width), sep="\n")
        _print_notes(section.notes, console)
        console.print()
    _print_notes(report.notes, console)


def _print_notes(notes: Sequence[Note], console: Console) -> None:
    for note in notes:
        console.print(safe_text(f"- {note.text}"))


def safe_text(text: str, style: str = "") -> Text:
    """Text from anywhere, without markup and without control characters."""
    return Text(plain(text), style)


def fit_table(table: Table, width: int) -> RenderableType:
    """The table in `width` letters, or one line a row if it does not fit. No number is broken or truncated."""
    rich_table = RichTable(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, header_style="")
    widths = _least_widths(table)
    spare = width - sum(widths) - len(widths) - 1
    for column, least in zip(table.columns, widths, strict=True):
        # Text gives way if room is short; a title goes on one line if there is room.
        narrow = min(least, _LEAST_TEXT_WIDTH) if column.is_text else least
        wanted = max(narrow, min(max(least, len(column.title)), least + spare))
        spare -= wanted - least
        side: Literal["left", "right"] = "left" if column.is_text else "right"
        rich_table.add_column(safe_text(column.title), justify=side, overflow="fold", width=wanted)
    for row in table.rows:
        rich_table.add_row(*map(safe_text, row))
    if spare >= 0:
        return rich_table
    lines = [_row_line(table, row) for row in table.rows]
    return Text("\n" + "\n".join(lines) + "\n")


def _least_widths(table: Table) -> list[int]:
    """A column is at least as wide as its widest cell and as the longest word of its title."""
    widths = []
    for index, column in enumerate(table.columns):
        cells = [len(plain(row[index])) for row in table.rows]
        widths.append(max(cells + [len(word) for word in column.title.split()]))
    return widths


def _row_line(table: Table, row: tuple[str, ...]) -> str:
    cells = zip(table.columns, row, strict=True)
    return ", ".join(plain(f"{column.title} {cell}") for column, cell in cells)
