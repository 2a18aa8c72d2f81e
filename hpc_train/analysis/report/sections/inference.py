"""What the trained models were used for: rows a second, joules a row, measures, and what a caller waits for."""

from pathlib import Path
from typing import Any

from hpc_train.analysis.report.model import Table
from hpc_train.analysis.report.sections.builder import SectionBuilder
from hpc_train.analysis.report.sections.columns import CellColumn, make_table, number, text
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import energy_text, ms_text, percent, plain, significant
from hpc_train.core.inference_record import InferenceRecord, Latency, read_records

_Timed = tuple[InferenceRecord, Latency]


def add_inference(section: SectionBuilder, group: Group) -> None:
    section.part("Use of the trained model")
    section.table("inference", inference_table, group)
    section.table("latency", latency_table, group)


def inference_table(group: Group) -> Table | None:
    """Evaluations and predictions; None if there are none."""
    uses = [record for record in _records(group) if record.kind != "latency"]
    columns: list[CellColumn[InferenceRecord]] = [
        text("use", lambda use: plain(use.kind) + " (stopped)" * (not use.complete)),
        number("model of step", lambda use: str(use.step)),
        text("data", lambda use: plain(f"{Path(use.data).name} {use.inputs}")),
        number("rows", lambda use: f"{use.num_rows:,}"),
        number("ranks", _ranks_text),
        number("rows/s", lambda use: significant(use.samples_per_s)),
        number("energy a row", lambda use: energy_text(use.joules_per_sample, use.energy_quality)),
        text("measures", _measures_text),
    ]
    return make_table("inference", "Evaluations and predictions", uses, columns) if uses else None


def latency_table(group: Group) -> Table | None:
    """None if no latency was measured."""
    timed = [(record, latency) for record in _records(group) for latency in record.latencies]
    columns: list[CellColumn[_Timed]] = [
        text("device", lambda each: plain(each[0].work[-1].device.partition(",")[0]) if each[0].work else "-"),
        number("batch", lambda each: str(each[1].batch)),
        number("threads", lambda each: "-" if each[1].num_threads is None else str(each[1].num_threads)),
        number("calls", lambda each: f"{each[1].num_calls:,}"),
        number("median, ms", lambda each: ms_text(each[1].p50_s)),
        number("95%, ms", lambda each: ms_text(each[1].p95_s)),
        number("99%, ms", lambda each: ms_text(each[1].p99_s)),
        number("samples/s", lambda each: significant(each[1].samples_per_s)),
        number("energy a sample", lambda each: energy_text(each[1].joules_per_sample, each[1].energy_quality)),
    ]
    title = "Latency: what a caller on one rank waits for, from samples in memory to predictions in memory"
    return make_table("latency", title, timed, columns) if timed else None


def inference_records(row: Row) -> dict[str, Any]:
    """Every use as plain values."""
    return {"inference": [record.as_dict() for run in row.runs for record in read_records(run.dir)]}


def _records(group: Group) -> list[InferenceRecord]:
    return [record for row in group.rows for run in row.runs for record in read_records(run.dir)]


def _ranks_text(use: InferenceRecord) -> str:
    """Of each start, if they differ."""
    return ", ".join(map(str, dict.fromkeys(work.num_ranks for work in use.work))) or "-"


def _measures_text(use: InferenceRecord) -> str:
    told = [
        f"{plain(name.replace('_', ' '))} {percent(value, 2) if 'accuracy' in name else significant(value, 4)}"
        for name, value in use.measures.items()
    ]
    return ", ".join(told) or "-"
