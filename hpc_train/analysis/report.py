"""The answer, for people and programs: terminal tables, a self-contained HTML page, CSV and JSON."""

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.table import Table
from rich.text import Text

import hpc_train
from hpc_train import rundir
from hpc_train.analysis.load import Run, load_all
from hpc_train.analysis.scaling import Group, Row, Scaling, compare
from hpc_train.analysis.sheets import Sheet, group_notes, headlines, plain, sheets
from hpc_train.errors import UserError
from hpc_train.records import PHASES

REPORT_SCHEMA = 1
CSV_COLUMNS = (
    "group",
    "scaling",
    "ranks",
    "num_runs",
    "num_hosts",
    "global_batch",
    "incomplete",
    "num_steps",
    "step_s",
    "step_low_s",
    "step_high_s",
    "samples_per_s",
    "baseline_ranks",
    "speedup",
    "speedup_low",
    "speedup_high",
    "efficiency",
    *(f"share_{phase}" for phase in PHASES),
    "joules",
    "joules_per_sample",
    "energy_quality",
    "energy_source",
    "loss",
    "test_accuracy",
)


@dataclass(frozen=True, eq=False)
class Report:
    """Everything a report says. Made by `make_report`."""

    runs: tuple[Run, ...]
    scaling: Scaling

    @property
    def headlines(self) -> list[str]:
        """The answer in words, one sentence a group, the best comparison first."""
        return headlines(self.scaling)

    def print(self, console: Console) -> None:
        """The tables in the terminal; nothing is cut short, whatever its width."""
        for line, group in zip(self.headlines, self.scaling.groups, strict=True):
            console.print(Text(line, style="bold"), "")
            console.print(terminal_table(group, console.width))
            for note in group_notes(group):
                console.print(Text(f"- {plain(note)}"))
            console.print()
        for note in self.scaling.notes:
            console.print(Text(f"- {plain(note)}"))

    def write(self, output_dir: Path) -> Path:
        """Writes report.html, scaling.csv and summary.json, each whole or not at all; returns report.html."""
        return write_report(self, output_dir)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON; None is what is not known or no finite number."""
        tree = {
            "schema": REPORT_SCHEMA,
            "hpc_train": hpc_train.__version__,
            "headlines": self.headlines,
            "groups": [
                {
                    "label": group.label,
                    "config": group.keys,
                    "notes": group_notes(group),
                    "rows": [
                        {**row_record(group, row), "runs": [str(run.dir.path) for run in row.runs]}
                        for row in group.rows
                    ],
                }
                for group in self.scaling.groups
            ],
            "notes": list(self.scaling.notes),
        }
        return {key: _finite(value) for key, value in tree.items()}


def make_report(paths: Sequence[Path]) -> Report:
    """The report of the runs at or below `paths`. Raises `UserError` for none and for a bad record."""
    runs = load_all(paths)
    scaling = compare(runs)
    passed_over = [f"Passed over: {path} has no meta.json or no timings." for path in rundir.fragments(paths)]
    return Report(tuple(runs), replace(scaling, notes=(*scaling.notes, *passed_over)))


def default_output(paths: Sequence[Path]) -> Path:
    """Where a report goes: `report/` in the deepest folder common to `paths`, inside a lone run.

    Never outside both the paths and the current folder: for runs far apart it is `report/` here.
    """
    given = [Path(os.path.abspath(path)) for path in paths]
    common, here = Path(os.path.commonpath(given)), Path.cwd()
    if common.is_relative_to(here):
        return common.relative_to(here) / "report"
    beside = common in given or {path.parent for path in given} == {common}
    return common / "report" if beside else Path("report")


def terminal_table(group: Group, width: int = 80) -> RenderableType:
    """A group's sheets as tables for a terminal of `width` columns; one too wide becomes lines of text."""
    return Stack(*(part for sheet in sheets(group) for part in (Text(sheet.title), _fitted(sheet, width))))


def _fitted(sheet: Sheet, width: int) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, header_style="")
    widths = []
    for index, column in enumerate(sheet.columns):
        cells = [len(row[index]) for row in sheet.rows]
        widths.append(max([*cells, *(len(word) for word in column.title.split())]))
    spare = width - sum(widths) - len(widths) - 1
    for index, column in enumerate(sheet.columns):
        # Text gives way where room is short; a title goes on one line where there is room.
        least = min(widths[index], 12) if column.is_text else widths[index]
        wanted = max(least, min(max(widths[index], len(column.title)), widths[index] + spare))
        spare -= wanted - widths[index]
        widths[index] = wanted
        side: Literal["left", "right"] = "left" if column.is_text else "right"
        table.add_column(Text(column.title), justify=side, overflow="fold", width=widths[index])
    for row in sheet.rows:
        table.add_row(*(Text(cell) for cell in row))
    if spare >= 0:
        return table
    lines = [
        ", ".join(f"{column.title} {cell}" for column, cell in zip(sheet.columns, row, strict=True))
        for row in sheet.rows
    ]
    return Text("\n" + "\n".join(lines) + "\n")


def write_report(report: Report, output_dir: Path) -> Path:
    """Writes the three files into `output_dir`, which is made; returns the page. Raises `UserError`."""
    from hpc_train.analysis.page import render  # draws, so brings in matplotlib and jinja2

    page = output_dir / "report.html"
    contents = {
        output_dir / "scaling.csv": scaling_csv(report),
        output_dir / "summary.json": json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n",
        page: render(report.runs, report.scaling),
    }
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for path, content in contents.items():
            rundir.write_atomic(path, content)
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {output_dir}: {error.strerror}",
            "Name a folder that you may write: --output DIR",
        ) from None
    return page


def scaling_csv(report: Report) -> str:
    """One line a row of every group, in base units; an empty cell is what is not known."""
    text = io.StringIO()
    lines = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    lines.writeheader()
    for group in report.scaling.groups:
        for row in group.rows:
            lines.writerow(row_record(group, row))
    return text.getvalue()


def row_record(group: Group, row: Row) -> dict[str, Any]:
    """A row as plain values under `CSV_COLUMNS`."""
    low, high = row.step_interval_s or (None, None)
    speedup_low, speedup_high = row.speedup_interval or (None, None)
    return {
        "group": group.label,
        "scaling": "weak" if group.weak else "strong",
        "ranks": row.size,
        "num_runs": len(row.runs),
        "num_hosts": max(run.summary.num_hosts for run in row.runs),
        "global_batch": row.global_batch,
        "incomplete": row.incomplete,
        "num_steps": sum(len(run.step_s) for run in row.runs),
        "step_s": row.step_s,
        "step_low_s": low,
        "step_high_s": high,
        "samples_per_s": row.samples_per_s,
        "baseline_ranks": group.baseline.size if group.baseline else None,
        "speedup": row.speedup,
        "speedup_low": speedup_low,
        "speedup_high": speedup_high,
        "efficiency": row.efficiency,
        **{f"share_{phase}": row.phase_share.get(phase) for phase in PHASES},
        "joules": row.energy.joules,
        "joules_per_sample": row.joules_per_sample,
        "energy_quality": row.energy.quality,
        "energy_source": row.energy.source,
        "loss": row.loss,
        "test_accuracy": row.test_accuracy,
    }


def _finite(value: Any) -> Any:
    """JSON has no nan and no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value
