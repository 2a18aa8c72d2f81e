"""Time to a target loss: held against numbers made by hand, and against runs whose batch costs a known share."""

import json
from dataclasses import replace
from math import exp, log
from pathlib import Path

import numpy as np
import pytest

from hpc_train.analysis.convergence.target import NOT_REACHED, TargetStudy, reach_of, smoothed, studies_of, window
from hpc_train.analysis.energy.cost import cost_of
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.facts import gather
from hpc_train.analysis.report.notes.headlines import target_headline
from hpc_train.analysis.report.notes.target import target_notes
from hpc_train.analysis.report.records import CSV_COLUMNS
from hpc_train.analysis.report.renderers.files import summary_tree, to_csv, write_report
from hpc_train.analysis.report.report import build_report, make_report
from hpc_train.analysis.report.sections.quantities import TARGET, names, record
from hpc_train.analysis.report.sections.target import study_record, target_section, target_table
from hpc_train.analysis.runs.load import Run, load, load_all
from hpc_train.analysis.scaling.compare import compare
from hpc_train.core.records import FloatArray
from hpc_train.core.rundir import RunDir
from tests.analysis.rendered import table
from tests.synthetic import Recipe, write_run

# One rank: 200 steps of 10 ms; four: 100 steps of 12 ms with four times the batch, whose loss falls twice as fast.
SMALL = Recipe(size=1, global_batch=100, step_s=0.010, steps=200, warmup=0, noise=0.0)
LARGE = Recipe(size=4, global_batch=400, step_s=0.012, steps=100, warmup=0, noise=0.0)
FALLING = 2.0 - 0.01 * np.arange(200)


def written(root: Path, recipe: Recipe, losses: FloatArray, **keys: object) -> RunDir:
    """A run with a loss logged at every step; keys of [train] as they shall be, momentum=0.9."""
    run = write_run(root, recipe)
    text = run.config.read_text()
    for key, value in keys.items():
        lines = [f"{key} = {value}" if line.startswith(f"{key} = ") else line for line in text.splitlines()]
        text = "\n".join([*lines, ""])
    run.config.write_text(text)
    lines = "".join(f"{step},{loss}\n" for step, loss in enumerate(losses.tolist()))
    run.metrics.write_text("step,loss\n" + lines)
    return run


def study(root: Path, target: float | None = None) -> TargetStudy:
    groups = compare(load_all([root])).groups
    energies = {each.run.dir.path: each for g in groups for row in cost_of(g).rows for each in row.runs}
    (found,) = studies_of(groups, energies, target)
    return found


def pair(root: Path) -> None:
    written(root, SMALL, FALLING)
    written(root, LARGE, FALLING[::2], lr=0.4)


def test_the_window_grows_with_the_log_and_is_odd() -> None:
    assert [window(n) for n in (1, 2, 3, 8, 20, 27, 200, 1000, 10**6)] == [1, 1, 1, 1, 5, 9, 9, 19, 1001]


def run_of(root: Path, losses: FloatArray) -> Run:
    return load(written(root, replace(SMALL, steps=len(losses)), losses))


def test_a_lucky_loss_reaches_nothing_and_a_median_does_not_lag(tmp_path: Path) -> None:
    losses = FALLING.copy()
    losses[[30, 60, 61]] = 0.0, np.nan, np.inf
    run = run_of(tmp_path, losses)
    steps, medians = smoothed(run)
    assert (steps[0], steps[-1], len(medians)) == (4, 195, 192)
    assert medians[96] == pytest.approx(1.0) and steps[96] == 100
    reach = reach_of(run, 1.0, None)
    assert (reach.num_steps, reach.num_samples, reach.epochs) == (101, 10_100, 10_100 / 5000)
    assert reach.seconds == pytest.approx(1.01)


def test_speedup_by_time_to_target_beside_that_by_throughput(tmp_path: Path) -> None:
    pair(tmp_path)
    found = study(tmp_path, 1.0)
    small, large = found.rows
    assert found.reference is small and found.set_by is None
    assert (large.num_steps, large.num_samples) == (51, 20_400)
    assert (small.seconds, large.seconds) == (pytest.approx(1.01), pytest.approx(0.612))
    assert large.speedup == pytest.approx(1.01 / 0.612) and large.efficiency == pytest.approx(1.01 / 0.612 / 4)
    assert large.throughput == pytest.approx(400 / 12 / 10) and large.throughput_efficiency == pytest.approx(
        0.8333, rel=1e-3
    )
    assert large.statistical == pytest.approx(10_100 / 20_400)
    assert large.speedup == pytest.approx((large.throughput or 0) * (large.statistical or 0))
    assert large.speedup_interval is None
    # 60 J a second: 120 J in 2 s, as tests/synthetic.py has it.
    assert large.joules is not None and large.joules.measured == pytest.approx(0.612 * 60)
    assert target_headline(found) == (
        "4 ranks (batch 400): 1.65x over 1 rank (batch 100) in time to a loss of 1.00 (no interval"
        " without repeats, 41% efficiency, 83% by"
        " samples/s); it takes 2.02 times the samples"
    )


def test_93_percent_by_samples_is_35_by_time_to_train(tmp_path: Path) -> None:
    """What published logs show: a large batch that keeps ranks busy and wastes their samples."""
    losses = 2.0 * np.exp(-np.arange(1000) / 200)
    written(tmp_path, replace(SMALL, steps=1000), losses)
    slower = losses ** (8 * 0.376)  # eight times the batch, a sample worth 0.376 of what it was; 93% by samples/s
    written(
        tmp_path,
        replace(LARGE, size=8, global_batch=800, step_s=0.010 / 0.93, steps=1000),
        2.0 * (slower / 2.0 ** (8 * 0.376)),
    )
    row = study(tmp_path, 0.2).rows[1]
    assert row.throughput_efficiency == pytest.approx(0.93, abs=0.002)
    assert row.efficiency == pytest.approx(0.35, abs=0.005)


def test_the_default_target_is_what_every_run_reached(tmp_path: Path) -> None:
    pair(tmp_path)
    found = study(tmp_path)
    assert found.target == pytest.approx(0.1) and found.set_by is not None and found.set_by.size == 4
    assert all(row.reached for row in found.rows) and found.rows[1].num_steps == 96
    notes = " ".join(target_notes(found))
    assert "that of 4 ranks, batch 400" in notes and "--target-loss" in notes
    assert "Intervals" not in notes


def test_not_reached_is_not_missing(tmp_path: Path) -> None:
    pair(tmp_path)
    found = study(tmp_path, 0.07)
    assert found.rows[1].reaches[0].why == NOT_REACHED and found.rows[1].joules is None
    cells = target_table(found).rows[1]
    assert NOT_REACHED in cells and "missing" not in cells
    assert target_headline(found) == ""
    assert "not compared, since no two sizes or settings reached it" in target_section(found, SectionGuard()).headline
    assert any("4 ranks, batch 400" in note and "Not reached" in note for note in target_notes(found))
    told = record(TARGET, (found, found.rows[1]))
    assert (told["num_reached"], told["seconds_to_target"], told["joules_to_target_quality"]) == (0, None, NOT_REACHED)
    assert study(tmp_path, 0.01).reference is None


def test_repeats_give_an_interval_by_welch(tmp_path: Path) -> None:
    for index, speed in enumerate((1.0, 1.1)):
        stamp = f"20261123T21000{index}Z"
        written(tmp_path, replace(SMALL, stamp=stamp, step_s=0.010 * speed), FALLING, seed=index)
        written(tmp_path, replace(LARGE, stamp=stamp, step_s=0.012 * speed), FALLING[::2], seed=index)
    found = study(tmp_path, 1.0)
    assert [len(row.runs) for row in found.rows] == [2, 2]
    small, large = found.rows
    assert small.seconds == pytest.approx(1.01 * 1.1**0.5, rel=1e-3)
    assert large.speedup == pytest.approx(1.01 / 0.612, rel=1e-3)
    # Two pairs of logarithms 0.0953 apart: variance 0.0953^2 / 2 each, 2 degrees of freedom, t = 4.303.
    spread = (2 * log(1.1) ** 2 / 2 / 2) ** 0.5
    assert large.speedup_interval == pytest.approx(
        tuple((large.speedup or 0) * exp(sign * 4.3027 * spread) for sign in (-1, 1)), rel=1e-3
    )


def test_one_repeat_that_did_not_reach_it_is_counted(tmp_path: Path) -> None:
    written(tmp_path, SMALL, FALLING)
    written(tmp_path, replace(SMALL, stamp="20261123T210001Z", step_s=0.0101), FALLING + 1.5)
    row = study(tmp_path, 1.0).rows[0]
    assert (row.num_reached, row.reached, row.seconds) == (1, False, None)
    assert "1 of 2" in target_table(study(tmp_path, 1.0)).rows[0]


def test_steps_taken_twice_count_as_time_before(tmp_path: Path) -> None:
    """60 steps, then from step 40 on again: step 100 ends after 60 + 61 steps of 10 ms, step 50 after 51."""
    directory = written(tmp_path, SMALL, FALLING)
    header, *lines = directory.timings(0).read_text().splitlines()
    again = [line.rpartition(",")[0] + ",2" for line in lines[40:]]
    directory.timings(0).write_text("\n".join([header, *lines[:60], *again, ""]))
    meta = json.loads(directory.meta.read_text())
    told = [{"attempt": 1, "first_step": 0}, {"attempt": 2, "first_step": 40}]
    directory.meta.write_text(json.dumps({**meta, "attempts": told}))
    run = load(directory)
    late, early = reach_of(run, 1.0, None), reach_of(run, 1.5, None)
    assert (late.num_steps, early.num_steps) == (101, 51)
    assert late.seconds == pytest.approx(0.60 + 0.61) and early.seconds == pytest.approx(0.51)
    told[0]["first_step"] = 40
    directory.meta.write_text(json.dumps({**meta, "attempts": told}))
    assert "resumes at step 40" in reach_of(load(directory), 1.0, None).why


def test_runs_without_a_loss_and_crashed_runs_get_their_words(tmp_path: Path) -> None:
    pair(tmp_path)
    crashed = written(tmp_path, replace(LARGE, size=8, complete=False), FALLING[::2] + 1.9)
    crashed.metrics.unlink()
    found = study(tmp_path)
    assert found.target == pytest.approx(0.1)  # crashed runs set no target
    assert found.rows[2].incomplete and "no loss was logged" in found.rows[2].reaches[0].why
    assert target_table(found).rows[2][0] == "8*" and "missing" in target_table(found).rows[2]


def test_the_report_has_it_in_words_csv_and_json(tmp_path: Path) -> None:
    pair(tmp_path)
    written(tmp_path, replace(SMALL, name="other", strategy="mpi"), FALLING)  # other groups are not in it
    facts = gather([tmp_path], target_loss=1.0)
    (of_both,) = [each for each in facts.targets if len(each.rows) == 2]
    made, section = build_report(facts), target_section(of_both, SectionGuard())
    assert section.headline in made.headlines
    assert any("lr" in column.title for column in table(section, "target").columns)
    record = summary_tree(made)["targets"][0]
    assert record["rows"][1]["target_speedup"] == pytest.approx(1.65, rel=0.01)
    assert json.dumps(study_record(of_both))
    lines = [line.split(",") for line in to_csv(made).splitlines()]
    column = lines[0].index("seconds_to_target")
    assert set(names(TARGET)) <= set(CSV_COLUMNS) and float(lines[1][column]) > 0
    assert "in time to a loss of 1.00" in write_report(made, tmp_path / "report").read_text()


def test_sizes_of_one_job_have_their_times_with_the_group(tmp_path: Path) -> None:
    written(tmp_path, SMALL, FALLING)
    written(tmp_path, replace(SMALL, size=2, step_s=0.006), FALLING)
    (section,) = make_report([tmp_path]).sections
    assert table(section, "target").rows
    speedup = table(section, "target-speedup").rows[1]
    assert speedup[2] == "1.67x" and speedup[-1] == "100.0%"
