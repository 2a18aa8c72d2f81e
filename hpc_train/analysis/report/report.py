"""The answer, for people and programs: terminal tables, a self-contained HTML page, CSV and JSON."""

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, ParamSpec

from rich.console import Console

import hpc_train
from hpc_train.analysis.convergence.target import TargetStudy, studies_of
from hpc_train.analysis.energy.cost import UNKNOWN, GroupEnergy, RowEnergy, Tariff, cost_of
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.cost_tables import COST_COLUMNS, cost_notes, cost_record, places_record, verdict
from hpc_train.analysis.report.load_balance_tables import BALANCE_COLUMNS, balance_record, straggler_records
from hpc_train.analysis.report.markdown import to_markdown
from hpc_train.analysis.report.sections import Part, parts
from hpc_train.analysis.report.table import Table
from hpc_train.analysis.report.tables import group_notes, measures_of, strategy_notes
from hpc_train.analysis.report.target_tables import TARGET_COLUMNS, records_by_run, study_record
from hpc_train.analysis.report.terminal import fitted, shown
from hpc_train.analysis.runs.load import Run, load_known
from hpc_train.analysis.scaling.compare import Group, Row, Scaling, compare
from hpc_train.analysis.scaling.mfu import flops_of
from hpc_train.analysis.scaling.strategies import Comparison, Entry, compare_strategies
from hpc_train.core import rundir
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import plain, plural
from hpc_train.core.records import PHASES

P = ParamSpec("P")
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
# 2: test_<measure> for every test measure; 3: step_s is the mean, step_median_s the median; 4: share_sync, joules_sync
# (before, part of share_reduce and joules_reduce)
REPORT_SCHEMA = 4
FLOPS_COLUMNS = ("flops_per_sample", "flops_per_s_per_rank", "peak_flops", "peak_source", "mfu")
CSV_COLUMNS = (
    "group",
    "scaling",
    "strategy",
    "ranks",
    "num_servers",
    "num_runs",
    "num_hosts",
    "global_batch",
    "incomplete",
    "num_steps",
    "step_s",
    "step_low_s",
    "step_high_s",
    "step_median_s",
    "samples_per_s",
    "baseline_ranks",
    "speedup",
    "speedup_low",
    "speedup_high",
    "efficiency",
    *(f"share_{phase}" for phase in PHASES),
    "servers_busy",
    *BALANCE_COLUMNS,
    *FLOPS_COLUMNS,
    "joules",
    "joules_per_sample",
    "energy_quality",
    "energy_source",
    "loss",
    *COST_COLUMNS,
    *TARGET_COLUMNS,
    "not_made",  # what of this report could not be made, in words: the cells of it are empty
)  # and test_<measure> for every measure of any run


@dataclass(frozen=True, eq=False)
class Report:
    """Everything a report says. Made by `make_report`."""

    runs: tuple[Run, ...]
    scaling: Scaling
    strategies: tuple[Comparison, ...]
    costs: tuple[GroupEnergy, ...]  # of the groups, in their order
    targets: tuple[TargetStudy, ...]
    guard: SectionGuard = field(default_factory=SectionGuard)  # of what could not be made

    @cached_property
    def parts(self) -> list[Part]:
        """What stands under headings of its own, in its order."""
        return parts(self.scaling, self.strategies, self.costs, self.targets, self.guard)

    @property
    def headlines(self) -> list[str]:
        """The answer in words, one sentence a part, the best comparison of sizes first, after that of strategies."""
        return [part.headline for part in self.parts if part.headline]

    def print(self, console: Console) -> None:
        """The tables in the terminal, without details; nothing is cut short, whatever its width."""
        for part in self.parts:
            console.print(shown(part.headline or part.label, "bold"), "")
            for sheet in part.sheets:
                if sheet not in part.details:
                    console.print(shown(sheet.title), fitted(sheet, console.width), sep="\n")
            for note in part.notes:
                if note not in part.details:
                    console.print(shown(f"- {note}"))
            if more := [each.title for each in part.details if isinstance(each, Table)]:
                titles = dict.fromkeys(title.partition(" (")[0].partition(", ")[0] for title in more)
                console.print(shown(f"- On the page and by --format md: {'; '.join(titles)}."))
            console.print()
        for note in self.scaling.notes:
            console.print(shown(f"- {note}"))

    def text(self, kind: str) -> str:
        """The report as "md", "csv" or "json"."""
        if kind == "md":
            return to_markdown(self)
        return scaling_csv(self) if kind == "csv" else json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def write_figures(self, folder: Path) -> list[Path]:
        """Writes every figure as PDF and SVG for a proposal; returns their paths. Raises `UserError`."""
        from hpc_train.analysis.report.plots.gallery import write_figures

        return write_figures(self, folder)

    def write(self, output_dir: Path) -> Path:
        """Writes report.html, scaling.csv and summary.json, each whole or not at all; returns report.html."""
        return write_report(self, output_dir)

    def row_records(self, group: GroupEnergy) -> list[dict[str, Any]]:
        """A group's rows as plain values under `CSV_COLUMNS` and test_<measure>; None where it could not be made."""
        return [self._record(group.group, cost) for cost in group.rows]

    def _record(self, group: Group, cost: RowEnergy) -> dict[str, Any]:
        row = cost.row
        made = {
            **self._values(row, "speed and result", CSV_COLUMNS, row_record, group, row),
            **self._values(row, "balance", BALANCE_COLUMNS, balance_record, row),
            **self._values(row, "model FLOPs", FLOPS_COLUMNS, flops_record, row),
            **self._values(row, "energy", COST_COLUMNS, cost_record, cost),
            **self._values(row, "time to a loss", TARGET_COLUMNS, _reached, self.targets, row),
        }
        return made | {"not_made": ". ".join(self.guard.faults) or None}

    def _values(
        self,
        row: Row,
        what: str,
        columns: Sequence[str],
        make: Callable[P, dict[str, Any]],
        *args: P.args,
        **more: P.kwargs,
    ) -> dict[str, Any]:
        """What `make` gives; None under each of its columns where it fails."""
        what = f"the numbers of {plural(row.size, 'rank')}, {what}"
        return self.guard.call(what, lambda why: dict.fromkeys(columns), make, *args, **more)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON; None is what is not known or no finite number."""
        groups = self.scaling.groups
        tree = {
            "schema": REPORT_SCHEMA,
            "hpc_train": hpc_train.__version__,
            "headlines": self.headlines,
            "groups": [self._group_record(group, cost) for group, cost in zip(groups, self.costs, strict=True)],
            "strategies": [
                self._told(f"the numbers of {each.label}", comparison_record, each) for each in self.strategies
            ],
            "targets": [self._told(f"the numbers of {each.label}", study_record, each) for each in self.targets],
            "notes": list(self.scaling.notes),
            "not_made": self.guard.faults,
        }
        return {key: _finite(value) for key, value in tree.items()}

    def _group_record(self, group: Group, cost: GroupEnergy) -> dict[str, Any]:
        return {
            "label": group.label,
            "config": group.keys,
            "notes": self._told(f"the notes on {group.label}", _group_notes, group, cost),
            "more_hardware": self._told(f"where more hardware pays of {group.label}", verdict, cost),
            "rows": [
                {
                    **record,
                    **self._values(paid.row, "energy by place", (), places_record, paid),
                    **self._values(paid.row, "stragglers", ("stragglers",), _stragglers, paid.row),
                    "runs": [str(run.dir.path) for run in paid.row.runs],
                }
                for paid, record in zip(cost.rows, self.row_records(cost), strict=True)
            ],
        }

    def _told(self, what: str, make: Callable[P, Any], *args: P.args, **more: P.kwargs) -> Any:
        """What `make` gives, or the sentence that says why it is missing."""
        return self.guard.call(what, lambda why: why, make, *args, **more)


def _group_notes(group: Group, cost: GroupEnergy) -> list[str]:
    return [*group_notes(group), *cost_notes(cost)]


def _stragglers(row: Row) -> dict[str, Any]:
    return {"stragglers": straggler_records(row)}


def _reached(targets: Sequence[TargetStudy], row: Row) -> dict[str, Any]:
    found = records_by_run(targets)
    return found.get(str(row.runs[0].dir.path), dict.fromkeys(TARGET_COLUMNS))


def make_report(paths: Sequence[Path], tariff: Tariff = UNKNOWN, target_loss: float | None = None) -> Report:
    """The report of the runs at or below `paths`; those that cannot be read are left out and named.

    Raises `UserError` where there is none.

    tariff: put over what the runs' configurations say. target_loss: to which times are compared; None: one that all
    complete runs of a job reached.
    """
    guard = SectionGuard()
    runs, left_out = load_known(paths, guard)
    scaling = compare(runs, guard)
    scaling = replace(scaling, notes=(*scaling.notes, *left_out))
    costs = tuple(cost_of(group, tariff, guard) for group in scaling.groups)
    energies = {each.run.dir.path: each for cost in costs for row in cost.rows for each in row.runs}
    unmade: list[str] = []  # what has no part of its own to say so in

    def nothing(why: str) -> list[Any]:
        unmade.append(f"{why}.")
        return []

    targets = guard.call("times to a loss", nothing, studies_of, scaling.groups, energies, target_loss)
    strategies = guard.call("strategies on equal work", nothing, compare_strategies, scaling.groups)
    scaling = replace(scaling, notes=(*scaling.notes, *unmade))
    return Report(tuple(runs), scaling, tuple(strategies), costs, tuple(targets), guard)


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


def write_report(report: Report, output_dir: Path) -> Path:
    """Writes the three files into `output_dir`, which is made; returns the page. Raises `UserError`."""
    from hpc_train.analysis.report.page import render  # draws, so brings in matplotlib and jinja2

    page = output_dir / "report.html"
    rendered = render(report)  # first: the others tell which of its figures could not be made
    contents = {
        output_dir / "scaling.csv": scaling_csv(report),
        output_dir / "summary.json": report.text("json"),
        page: rendered,
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
    measures = measures_of([row for group in report.scaling.groups for row in group.rows])
    columns = (*CSV_COLUMNS, *(f"test_{measure}" for measure in measures))
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(map(csv_cell, columns))
    for cost in report.costs:
        lines.writerows([csv_cell(record.get(name)) for name in columns] for record in report.row_records(cost))
    return text.getvalue()


def csv_cell(value: Any) -> Any:
    """A cell that no terminal is steered by and no spreadsheet takes for a formula; numbers stay what they are.

    Words that begin as a formula does get an apostrophe in front (OWASP, "CSV Injection").
    """
    if not isinstance(value, str):
        return value
    words = plain(value)
    return f"'{words}" if words.lstrip().startswith(_FORMULA) else words


def row_record(group: Group, row: Row) -> dict[str, Any]:
    """A row as plain values: those of `CSV_COLUMNS` that its speed and its result come to, and test_<measure>."""
    low, high = row.step_interval_s or (None, None)
    speedup_low, speedup_high = row.speedup_interval or (None, None)
    return {
        "group": group.label,
        "scaling": "weak" if group.weak else "strong",
        "strategy": group.keys.get("reduce.strategy"),
        "ranks": row.size,
        "num_servers": row.num_servers,
        "num_runs": len(row.runs),
        "num_hosts": max(run.summary.num_hosts for run in row.runs),
        "global_batch": row.global_batch,
        "incomplete": row.incomplete,
        "num_steps": sum(len(run.step_s) for run in row.runs),
        "step_s": row.step_s,
        "step_low_s": low,
        "step_high_s": high,
        "step_median_s": row.step_median_s,
        "samples_per_s": row.samples_per_s,
        "baseline_ranks": group.baseline.size if group.baseline else None,
        "speedup": row.speedup,
        "speedup_low": speedup_low,
        "speedup_high": speedup_high,
        "efficiency": row.efficiency,
        **{f"share_{phase}": row.phase_share.get(phase) for phase in PHASES},
        "servers_busy": row.servers_busy,
        "joules": row.energy.joules,
        "joules_per_sample": row.joules_per_sample,
        "energy_quality": row.energy.quality,
        "energy_source": row.energy.source,
        "loss": row.loss,
        **{f"test_{measure}": value for measure, value in row.test.items()},
    }


def flops_record(row: Row) -> dict[str, Any]:
    """A row's model FLOPs as plain values under `FLOPS_COLUMNS`."""
    flops = flops_of(row)
    values = (flops.per_sample, flops.per_rank_s, flops.peak_s, flops.peak_source, flops.mfu)
    return dict(zip(FLOPS_COLUMNS, values, strict=True))


def comparison_record(comparison: Comparison) -> dict[str, Any]:
    """Strategies on equal work as plain values."""
    return {
        "label": comparison.label,
        "config": comparison.keys,
        "reference": comparison.reference,
        "notes": strategy_notes(comparison),
        "rows": [_entry_record(entry) for entry in comparison.entries],
    }


def _entry_record(entry: Entry) -> dict[str, Any]:
    low, high = entry.row.step_interval_s or (None, None)
    ratio_low, ratio_high = entry.ratio_interval or (None, None)
    theory = entry.traffic
    return {
        "strategy": entry.strategy,
        "ranks": entry.row.size,
        "num_servers": entry.row.num_servers,
        "incomplete": entry.row.incomplete,
        "step_s": entry.row.step_s,
        "step_low_s": low,
        "step_high_s": high,
        "samples_per_s": entry.row.samples_per_s,
        "ratio": entry.ratio,
        "ratio_low": ratio_low,
        "ratio_high": ratio_high,
        "share_reduce": entry.row.phase_share.get("reduce"),
        "share_sync": entry.row.phase_share.get("sync"),
        "must_move_bytes": theory.must_move_bytes if theory else None,
        "each_way_bytes": theory.each_way_bytes if theory else None,
        "must_move_is_least": theory.is_least if theory else None,
        "optimizer_bytes": entry.optimizer_bytes,
        "loss": entry.row.loss,
        **{f"test_{measure}": value for measure, value in entry.row.test.items()},
        "runs": [str(run.dir.path) for run in entry.row.runs],
    }


def _finite(value: Any) -> Any:
    """JSON has no nan and no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value
