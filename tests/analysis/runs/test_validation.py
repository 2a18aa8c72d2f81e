"""Validation in a report: a run of two ranks that validated after every tenth step, as it was recorded; and others."""

import csv
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpc_train.analysis.comparison.comparison import Metric, RunComparison, compare_sides
from hpc_train.analysis.comparison.sides import load_side, write_baseline
from hpc_train.analysis.energy.run_energy import energy_of
from hpc_train.analysis.report.model import Report
from hpc_train.analysis.report.report import make_report
from hpc_train.analysis.runs.load import Run, load, load_all
from hpc_train.cli.main import cli
from hpc_train.core.rundir import RunDir
from tests import jobs
from tests.analysis.rendered import notes, printed, table
from tests.laws import Laws, write
from tests.synthetic import Recipe, write_run

ROOT = jobs.ROOT / "tests" / "runs" / "mlp-validation"
WATTS = 20.0  # of the recorded run: an estimate of 10 W for each of two cores


@pytest.fixture(scope="module")
def run() -> Run:
    (only,) = load_all([ROOT])
    return only


@pytest.fixture(scope="module")
def rows(run: Run) -> list[dict[str, str]]:
    """Read without the package."""
    return list(csv.DictReader(run.dir.validation.open()))


@pytest.fixture(scope="module")
def made() -> Report:
    return make_report([ROOT])


def test_the_best_step_and_value_are_told_everywhere(run: Run, rows: list[dict[str, str]], made: Report) -> None:
    best = min(rows, key=lambda row: float(row["loss"]))
    assert run.validation is not None and run.validation.best == (int(best["step"]), float(best["loss"]))
    (row,) = made.rows
    assert (row["best_validation_step"], row["best_validation"]) == run.validation.best
    assert (row["validation_measure"], row["num_validations"]) == ("loss", len(rows))
    assert row["validation_s"] == pytest.approx(sum(float(each["seconds"]) for each in rows))
    (section,) = made.sections
    assert section.overview is not None
    titles = [column.title for column in section.overview.columns]
    assert section.overview.rows[0][titles.index("best validation")] == "0.3687 @ 50"
    assert table(section, "validation").rows[0][1:5] == ("loss", "0.3687", "50", "0.4099")
    (note,) = notes(section, "validation")
    assert note.startswith(
        "Best loss on held-out samples: 0.3687 after 50 of 120 steps (2 ranks); by the end it is 11%"
    )
    assert "0.3687 @ 50" in printed(made, full=False)


def test_its_energy_is_a_phase_of_its_own_and_none_of_the_steps(
    run: Run, rows: list[dict[str, str]], made: Report
) -> None:
    energy = energy_of(run)
    spent_s = [float(each["seconds"]) for each in rows]
    of_phases = {phase: each.known for phase, each in energy.phases.items()}
    joules = of_phases.pop("validation")
    assert joules == pytest.approx(WATTS * sum(spent_s), rel=1e-3)
    # The last one is after the last step, so it is no part of the loop's time.
    assert sum(of_phases.values()) == pytest.approx(WATTS * (energy.timeline.loop_s - sum(spent_s[:-1])), rel=1e-3)
    assert sum(of_phases.values()) + joules + energy.outside.known == pytest.approx(energy.gross.known)
    (row,) = made.rows
    assert row["joules_validation"] == pytest.approx(joules)
    by_phase = table(made.sections[0], "energy-by-phase")
    assert by_phase.columns[-1].title == "validation" and float(by_phase.rows[0][-1]) == pytest.approx(19.4, abs=0.1)


def test_a_validation_that_no_meter_resolves_has_its_part_of_the_time(tmp_path: Path) -> None:
    """A counter that moves every other second, over validations of a tenth."""
    here = copied(tmp_path)
    (path,) = here.energy_dir.iterdir()
    header, *lines = path.read_text().splitlines()
    times = [float(line.split(",")[0]) for line in lines]
    coarse = []
    for line, time_s in zip(lines, times, strict=True):
        cells = line.split(",")
        cells[2] = str(40.0 * ((time_s - times[0]) // 2))
        coarse.append(",".join(cells))
    path.write_text("\n".join([header, *coarse, ""]))
    energy = energy_of(load(here))
    validation = energy.phases["validation"]
    assert validation.total is not None and 0 < validation.known < 0.2 * energy.gross.known
    assert all(each.total is not None for each in energy.phases.values())


def copied(tmp_path: Path) -> RunDir:
    (source,) = ROOT.iterdir()
    shutil.copytree(source, tmp_path / source.name)
    return RunDir(tmp_path / source.name)


def test_damaged_lines_are_left_out_and_without_any_there_is_no_validation(tmp_path: Path) -> None:
    here = copied(tmp_path)
    lines = here.validation.read_text().splitlines()
    here.validation.write_text("\n".join([*lines[:4], "nan,0.1,0.01,0.9", "40,inf,0.01,0.9", "50,0.06,0.3"]))
    record = load(here).validation
    assert record is not None and record.steps == (10, 20, 30) and record.best == (20, 0.444398077)
    here.validation.write_text(lines[0] + "\n")
    assert load(here).validation is None
    here.validation.unlink()
    (row,) = make_report([tmp_path]).rows
    assert [row[name] for name in ("best_validation", "validation_s", "joules_validation")] == [None] * 3


def test_what_keep_best_names_decides_which_state_is_best(tmp_path: Path) -> None:
    here = copied(tmp_path)
    text = here.config.read_text()
    assert 'keep_best = "validation.loss"' in text
    here.config.write_text(text.replace('keep_best = "validation.loss"', 'keep_best = "validation.accuracy"'))
    record = load(here).validation
    assert record is not None and (record.measure, record.more_is_better) == ("accuracy", True)
    assert record.best == (100, 0.943069307)


def validated(folder: Path, *best: float) -> Path:
    """Repeats of a job, one for each of these best losses."""
    folder.mkdir()
    for seed, loss in enumerate(best):
        law = Laws(ranks=2, ranks_per_host=2, steps=40, seed=seed, stamp=f"2026112{seed}T210000Z")
        directory, _ = write(folder, law)
        lines = [f"{step},0.01,{loss + more}" for step, more in ((10, 0.2), (20, 0.0), (30, 0.1))]
        directory.validation.write_text("\n".join(["step,seconds,loss", *lines, ""]))
    return folder


def test_compare_judges_the_best_validation(tmp_path: Path) -> None:
    before = load_side(validated(tmp_path / "a", 0.100, 0.101, 0.099))[0]
    after = load_side(validated(tmp_path / "b", 0.150, 0.151, 0.149))[0]
    worse, better = (_best_loss(compare_sides(*sides, 0.03)) for sides in ((before, after), (after, before)))
    assert (worse.verdict, better.verdict) == ("regression", "improvement")
    assert worse.before == pytest.approx(0.1, rel=0.01) and worse.after == pytest.approx(0.15, rel=0.01)
    write_baseline(tmp_path / "baseline.json", before)
    told = CliRunner().invoke(cli, ["compare", str(tmp_path / "baseline.json"), str(tmp_path / "b")])
    assert told.exit_code == 1 and "best validation loss" in " ".join(told.output.split())


def _best_loss(comparison: RunComparison) -> Metric:
    (metric,) = [each for each in comparison.metrics if each.name == "best validation loss"]
    return metric


def test_runs_without_validation_have_neither_table_nor_column(tmp_path: Path) -> None:
    for size in (1, 2):
        write_run(tmp_path, Recipe(size=size, step_s=0.01 / size))
    made = make_report([tmp_path])
    assert "validation" not in made.table_ids and made.sections[0].overview is not None
    assert "samples/s" in [column.title for column in made.sections[0].overview.columns]
    assert not any(plot.id == "validation" for plot in made.sections[0].plots)
