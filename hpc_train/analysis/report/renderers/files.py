"""report.html, scaling.csv and summary.json, and where they go."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from hpc_train.analysis.report.model import Report
from hpc_train.core import rundir
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import plain

_LONGEST_NAME = 100  # letters of a folder's name
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def default_output(paths: Sequence[Path]) -> Path:
    """`report/` in the deepest folder common to `paths`, inside a lone run.

    Never outside both the paths and the current folder: for runs far apart it is `report/` here. If the folder holds
    other runs, too, the name says which these are: they leave the report of all runs as it is.
    """
    given = [Path(os.path.abspath(path)) for path in paths]
    common, here = Path(os.path.commonpath(given)), Path.cwd()
    name = f"report-{_names_text(common, given)}" if _is_part(common, given) else "report"
    if common.is_relative_to(here):
        return common.relative_to(here) / name
    beside = common in given or {path.parent for path in given} == {common}
    return common / name if beside else Path(name)


def _is_part(common: Path, given: Sequence[Path]) -> bool:
    """Whether other runs, or folders of runs, lie beside those given, at or below `common`."""
    folders = {common, *(folder for path in given for folder in path.parents if folder.is_relative_to(common))}
    beside = {entry for folder in folders - set(given) for entry in _folders_in(folder)}
    others = (entry for entry in beside if not any(path.is_relative_to(entry) for path in given))
    return common not in given and any(_holds_runs(entry) for entry in others)


def _holds_runs(folder: Path) -> bool:
    return any(rundir.is_run(each) for each in (folder, *_folders_in(folder)))


def _folders_in(folder: Path) -> list[Path]:
    try:
        return [entry for entry in folder.iterdir() if entry.is_dir()]
    except OSError:  # gone, or not to be looked into
        return []


def _names_text(common: Path, given: Sequence[Path]) -> str:
    """The names of the paths given, in their order; of many the first, and a word that tells them from others."""
    names = [str(path.relative_to(common)).replace(os.sep, "-") for path in dict.fromkeys(given)]
    whole = "+".join(names)
    if len(whole) <= _LONGEST_NAME:
        return whole
    word = hashlib.sha256(whole.encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{names[0][:_LONGEST_NAME]}-and-{len(names) - 1}-more-{word}"


def write_report(report: Report, folder: Path) -> Path:
    """Writes the three files, each whole or not at all; returns report.html. Raises `UserError`."""
    from hpc_train.analysis.report.renderers.page import render_page  # needs matplotlib and jinja2

    # The page first: painting may fail, and the other files list what could not be made.
    contents = {"report.html": render_page(report), "scaling.csv": to_csv(report), "summary.json": to_json(report)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            rundir.write_atomic(folder / name, content)
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {folder}: {error.strerror}",
            "Name a folder that you may write: --output DIR",
        ) from None
    return folder / "report.html"


def to_csv(report: Report) -> str:
    """One line a row of every group; an empty cell is unknown."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(map(csv_cell, report.csv_columns))
    for row in report.rows:
        cells = {**row, "not_made": _not_made_text(report)}
        lines.writerow(csv_cell(cells.get(name)) for name in report.csv_columns)
    return text.getvalue()


def _not_made_text(report: Report) -> str | None:
    return ". ".join(report.guard.faults) or None


def csv_cell(value: Any) -> Any:
    """A cell that steers no terminal and that no spreadsheet takes for a formula; numbers stay numbers.

    Text that begins like a formula gets an apostrophe in front (OWASP, "CSV Injection").
    """
    if not isinstance(value, str):
        return value
    text = plain(value)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text


def to_json(report: Report) -> str:
    return json.dumps(summary_tree(report), indent=2, allow_nan=False) + "\n"


def summary_tree(report: Report) -> dict[str, Any]:
    """summary.json as plain values; None is unknown or no finite number."""
    not_made = _not_made_text(report)
    groups = []
    for group in report.summary["groups"]:
        groups.append({**group, "rows": [{**row, "not_made": not_made} for row in group["rows"]]})
    tree = {**report.summary, "groups": groups, "not_made": report.guard.faults}
    return {key: _finite(value) for key, value in tree.items()}


def _finite(value: Any) -> Any:
    """JSON has no nan and no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value
