"""The part of a report on what trained models were used for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_train.analysis.report.report import make_report
from hpc_train.core.inference_record import InferenceRecord, Latency, Work, read_records, write_record
from hpc_train.core.rundir import RunDir
from tests.analysis.rendered import table
from tests.synthetic import Recipe, write_run

WORK = Work(
    began="2026-11-30T12:00:00Z",
    ended="2026-11-30T12:00:10Z",
    num_ranks=4,
    hosts=["a", "b"],
    device="cpu, 1 thread a rank",
    num_rows=3000,
    seconds=6.0,
)
LATENCY = {
    "num_threads": 2,
    "num_calls": 1000,
    "p50_s": 0.0012,
    "p95_s": 0.0034,
    "p99_s": 0.0123,
    "samples_per_s": 700.0,
}
PREDICT = InferenceRecord(
    kind="predict",
    run="runs/mlp/x",
    step=1000,
    data="/data/new.h5",
    inputs="test/inputs",
    rows=[0, 5000],
    batch=256,
    work=[WORK, replace(WORK, num_ranks=2, num_rows=2000, seconds=4.0)],
    complete=True,
    measures={"loss": 0.25, "accuracy": 0.938},
    num_measured=5000,
    joules=250.0,
    energy_quality="estimated",
    energy_source="estimate",
)


def keep(run: RunDir, name: str, record: InferenceRecord) -> None:
    folder = run.inference_dir / name
    folder.mkdir(parents=True)
    write_record(folder, record)


def test_uses_are_rows_with_their_rate_energy_and_measures(tmp_path: Path) -> None:
    run = write_run(tmp_path, Recipe(size=1, step_s=0.01))
    keep(run, "20261130T120000Z-predict", PREDICT)
    stopped = replace(PREDICT, kind="evaluate", complete=False, work=[WORK], joules=None, energy_quality="missing")
    keep(run, "20261130T130000Z-evaluate", replace(stopped, measures={"loss": float("nan")}))
    batches = [
        Latency(batch=batch, joules_per_sample=joules, energy_quality="measured", **LATENCY)  # type: ignore[arg-type]
        for batch, joules in ((1, 0.02), (2, None))
    ]
    keep(run, "20261130T140000Z-latency", replace(PREDICT, kind="latency", work=[WORK], latencies=batches))
    report = make_report([tmp_path])
    (section,) = report.sections
    assert table(section, "inference").rows == (
        (
            "predict",
            "1000",
            "new.h5 test/inputs",
            "5,000",
            "4, 2",
            "500",
            "50.0 mJ est.",
            "loss 0.2500, accuracy 93.80%",
        ),
        ("evaluate (stopped)", "1000", "new.h5 test/inputs", "3,000", "4", "500", "missing", "loss -"),
    )
    assert table(section, "latency").rows == (
        ("cpu", "1", "2", "1,000", "1.200", "3.400", "12.30", "700", "20.0 mJ"),
        ("cpu", "2", "2", "1,000", "1.200", "3.400", "12.30", "700", "missing"),
    )
    (row,) = report.summary["groups"][0]["rows"]
    first = row["inference"][0]
    assert first["num_rows"] == 5000 and first["joules_per_sample"] == 0.05 and first["samples_per_s"] == 500
    assert read_records(run)[0] == PREDICT


def test_a_damaged_record_costs_no_other_part_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPC_TRAIN_RAISE", raising=False)
    run = write_run(tmp_path, Recipe(size=1, step_s=0.01))
    keep(run, "20261130T120000Z-predict", PREDICT)
    path = run.inference_dir / "20261130T120000Z-predict/record.json"
    for damage in ('{"kind": ', json.dumps(PREDICT.as_dict() | {"work": [{"began": 3}]}), "[]"):
        path.write_text(damage)
        report = make_report([tmp_path])
        (section,) = report.sections
        assert "is no record" in table(section, "inference").rows[0][0] and table(section, "result").rows


def test_a_run_that_was_never_used_says_nothing_of_it(tmp_path: Path) -> None:
    write_run(tmp_path, Recipe(size=1, step_s=0.01))
    (section,) = make_report([tmp_path]).sections
    assert all(each.id not in ("inference", "latency") for part in section.parts for each in part.tables)
