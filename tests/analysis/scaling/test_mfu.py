"""Model FLOPs and their share of a device's peak, beside hand-computed numbers; what is not known is missing."""

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc_train.analysis.report.notes.flops import flops_notes
from hpc_train.analysis.report.renderers.files import to_csv, write_report
from hpc_train.analysis.runs.load import load
from hpc_train.analysis.scaling.compare import compare
from hpc_train.analysis.scaling.mfu import flops_of
from tests.analysis.rendered import Page, notes, printed, report_and_facts, section_of, table
from tests.synthetic import Recipe, write_run


def counted(size: int, **meta: Any) -> Recipe:
    facts = {"flops_per_sample": 1_000_000, "peak_flops": 1e12, "peak_source": "Some GPU, dense bf16, data sheet"}
    return Recipe(size=size, step_s=0.010 / size, noise=0.0, meta={**facts, **meta})


def test_model_flops_and_mfu(tmp_path: Path) -> None:
    made, facts = report_and_facts(tmp_path, counted(1), counted(2))
    (group,) = facts.scaling.groups
    one, two = (flops_of(row) for row in group.rows)
    # 120 samples in 10 ms are 12,000 samples/s of 1 MFLOP: 12 GFLOP/s; on two ranks in 5 ms as much a rank.
    assert one.per_rank_s == pytest.approx(12e9) and two.per_rank_s == pytest.approx(12e9)
    assert one.mfu == pytest.approx(0.012)
    assert table(section_of(group), "flops").rows[1] == (
        "2",
        "1.00 MFLOP",
        "12.0 GFLOP/s",
        "1.00 TFLOP/s",
        "1.20%",
        "Some GPU, dense bf16, data sheet",
    )
    assert not flops_notes(group)
    write_report(made, tmp_path / "out")
    line = list(csv.DictReader((tmp_path / "out/scaling.csv").open()))[1]
    figures = [float(line[key]) for key in ("flops_per_sample", "flops_per_s_per_rank", "peak_flops", "mfu")]
    assert figures == pytest.approx([1e6, 12e9, 1e12, 0.012])
    assert "torch.utils.flop_counter" in Page((tmp_path / "out/report.html").read_text()).text


def test_servers_count_in_flops_per_rank(tmp_path: Path) -> None:
    meta = {"flops_per_sample": 1_000_000, "peak_flops": 1e12, "peak_source": "train.peak_tflops"}
    recipe = Recipe(size=4, strategy="parameter_server", servers=1, noise=0.0, meta=meta)
    (row,) = compare([load(write_run(tmp_path, recipe))]).groups[0].rows
    assert flops_of(row).per_rank_s == pytest.approx(12e9 / 4)
    (group,) = compare([*row.runs]).groups
    assert table(section_of(group), "flops").rows[0][-1] == "given (train.peak_tflops)"


@pytest.mark.parametrize("odd", [None, 0, -1, True, "12", [1]])
def test_flops_and_peaks_that_are_not_known_are_missing_with_the_reason(tmp_path: Path, odd: Any) -> None:
    made, facts = report_and_facts(
        tmp_path, counted(1, flops_per_sample=odd), counted(2, peak_flops=odd, peak_source=None, device="cpu")
    )
    (group,) = facts.scaling.groups
    rows = table(section_of(group), "flops").rows
    assert rows[0][1:] == ("missing", "missing", "1.00 TFLOP/s", "missing", "Some GPU, dense bf16, data sheet")
    assert rows[1][1:] == ("1.00 MFLOP", "12.0 GFLOP/s", "missing", "missing", "-")
    text = " ".join(printed(made).split())
    assert "Model FLOPs missing for 1 rank: the runs do not state one count" in text
    assert "MFU missing for 2 ranks: the peak of the device (cpu) is unknown. Set train.peak_tflops" in text
    line, _ = csv.DictReader(io.StringIO(to_csv(made)))
    assert (line["flops_per_sample"], line["mfu"]) == ("", "")


def test_runs_of_one_size_that_state_different_counts_have_none(tmp_path: Path) -> None:
    other = replace(counted(1, flops_per_sample=2_000_000), stamp="20261123T235900Z")
    _, facts = report_and_facts(tmp_path, counted(1), other)
    (group,) = facts.scaling.groups
    assert flops_of(group.rows[0]).per_sample is None and flops_of(group.rows[0]).peak_s == 1e12


def test_an_impossible_mfu_is_questioned_and_runs_that_count_nothing_have_no_table(tmp_path: Path) -> None:
    made, _ = report_and_facts(tmp_path / "a", counted(1, peak_flops=1e9))
    assert any("an MFU above 100% is impossible" in note for note in notes(made.sections[0], "flops"))
    made, _ = report_and_facts(tmp_path / "b", Recipe(), Recipe(size=2))
    assert "flops" not in made.table_ids and not notes(made.sections[0], "flops")
