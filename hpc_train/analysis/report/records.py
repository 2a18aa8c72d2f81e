"""A report as plain values in base units: the rows of scaling.csv and the tree of summary.json. None is unknown."""

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import hpc_train
from hpc_train.analysis.energy.cost import GroupEnergy, RowEnergy
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.facts import Facts
from hpc_train.analysis.report.model import Note, Section
from hpc_train.analysis.report.notes.energy import verdict
from hpc_train.analysis.report.sections import comparison
from hpc_train.analysis.report.sections.efficiency import straggler_records
from hpc_train.analysis.report.sections.energy import node_record
from hpc_train.analysis.report.sections.inference import inference_records
from hpc_train.analysis.report.sections.quantities import (
    BALANCE,
    COST,
    FAMILIES,
    FLOPS,
    GPU_USE,
    GROUP,
    MEMORY,
    RESULT,
    RUNS,
    SPEED,
    TARGET,
    USE,
    Quantity,
    names,
    record,
)
from hpc_train.analysis.report.sections.result import measures_of
from hpc_train.analysis.report.sections.strategies import comparison_record
from hpc_train.analysis.report.sections.target import records_by_run, study_record
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import plural

P = ParamSpec("P")
T = TypeVar("T")
# 2: test_<measure> for every test measure; 3: step_s is the mean, step_median_s the median; 4: share_sync, joules_sync
# (before, part of share_reduce and joules_reduce); 5: straggler, time_lost, joules_dynamic and volume_bytes (before,
# waiting_for, waiting_share, joules_net and must_move_bytes)
REPORT_SCHEMA = 5
NOT_MADE = "not_made"  # sentences about what could not be made, whose cells are empty
# And test_<measure> for every measure of any run.
CSV_COLUMNS = (*(each.name for family in FAMILIES.values() for each in family), NOT_MADE)


class Records:
    """Makes the plain values of one report; the values of what fails are None."""

    def __init__(self, facts: Facts, guard: SectionGuard) -> None:
        self._facts, self._guard = facts, guard
        self._target_by_run = guard.call("the numbers of times to a loss", _nothing, records_by_run, facts.targets)

    def csv_columns(self) -> tuple[str, ...]:
        rows = [row for group in self._facts.scaling.groups for row in group.rows]
        return (*CSV_COLUMNS, *(f"test_{measure}" for measure in measures_of(rows)))

    def rows(self) -> list[list[dict[str, Any]]]:
        """A list a group, with one record a row."""
        return [[self._row(energy.group, row) for row in energy.rows] for energy in self._facts.energies]

    def summary(
        self, sections: Sequence[Section], notes: Sequence[Note], rows: Sequence[list[dict[str, Any]]]
    ) -> dict[str, Any]:
        """The whole tree without `NOT_MADE`, which renderers may still add to. rows: what `rows` returned."""
        facts = self._facts
        of_groups = [section for section in sections if section.kind == "group"]
        return {
            "schema": REPORT_SCHEMA,
            "hpc_train": hpc_train.__version__,
            "headlines": [section.headline for section in sections if section.headline],
            "groups": [
                self._group(energy, [note.text for note in section.notes], records)
                for energy, section, records in zip(facts.energies, of_groups, rows, strict=True)
            ],
            "strategies": [self._made(each.label, comparison_record, each) for each in facts.strategies],
            "comparisons": [self._made(each.after.name, comparison.record, each) for each in facts.comparisons],
            "targets": [self._made(each.label, study_record, each) for each in facts.targets],
            "notes": [note.text for note in notes],
        }

    def _row(self, group: Group, energy: RowEnergy) -> dict[str, Any]:
        row = energy.row
        return {
            **self._values(row, "group", GROUP, (group, row)),
            **self._values(row, "runs", RUNS, row),
            **self._values(row, "speed", SPEED, row),
            **self._values(row, "balance", BALANCE, row),
            **self._values(row, "memory", MEMORY, row),
            **self._values(row, "processors and storage", (*USE, *GPU_USE), row),
            **self._values(row, "model FLOPs", FLOPS, row),
            **self._values(row, "energy and result", RESULT, row),
            **{f"test_{measure}": value for measure, value in row.test.items()},
            **self._values(row, "energy", COST, energy),
            **self._target_by_run.get(str(row.runs[0].dir.path), dict.fromkeys(names(TARGET))),
        }

    def _group(self, energy: GroupEnergy, notes: list[str], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        group = energy.group
        return {
            "label": group.label,
            "config": group.keys,
            "notes": notes,
            "more_hardware": self._made(group.label, verdict, energy),
            "rows": [self._row_details(each, record) for each, record in zip(energy.rows, rows, strict=True)],
        }

    def _row_details(self, energy: RowEnergy, record: dict[str, Any]) -> dict[str, Any]:
        row = energy.row
        return {
            **record,
            **self._call(row, "energy by node", (), node_record, energy),
            **self._call(row, "stragglers", ("stragglers",), _stragglers, row),
            **self._call(row, "uses of the trained model", ("inference",), inference_records, row),
            "runs": [str(run.dir.path) for run in row.runs],
        }

    def _values(self, row: Row, what: str, quantities: Sequence[Quantity[T]], of: T) -> dict[str, Any]:
        return self._call(row, what, names(quantities), record, quantities, of)

    def _call(
        self,
        row: Row,
        what: str,
        columns: Sequence[str],
        make: Callable[P, dict[str, Any]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> dict[str, Any]:
        """What `make` returns; None under each column if it fails."""
        what = f"the numbers of {plural(row.size, 'rank')}, {what}"
        return self._guard.call(what, lambda why: dict.fromkeys(columns), make, *args, **kwargs)

    def _made(self, label: str, make: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> Any:
        """What `make` returns, or the sentence about its failure."""
        return self._guard.call(f"the numbers of {label}", str, make, *args, **kwargs)


def _nothing(why: str) -> dict[str, dict[str, Any]]:
    return {}


def _stragglers(row: Row) -> dict[str, Any]:
    return {"stragglers": straggler_records(row)}
