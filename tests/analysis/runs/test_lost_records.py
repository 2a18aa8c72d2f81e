"""A real run whose records were lost: it does not pass as complete, and its energy is not laid on few samples."""

import shutil
from pathlib import Path

import pytest

from hpc_train.analysis.comparison.sides import load_side
from hpc_train.analysis.runs.load import Run, load
from hpc_train.analysis.scaling.compare import compare
from hpc_train.core.errors import UserError
from hpc_train.core.rundir import RunDir

WHOLE = RunDir(Path(__file__).parents[2] / "runs" / "mlp-mnist" / "20261123T231950Z-np2")


@pytest.fixture
def copied(tmp_path: Path) -> RunDir:
    return RunDir(Path(shutil.copytree(WHOLE.path, tmp_path / "job" / WHOLE.path.name)))


def cut(run: RunDir, num_lines: int) -> None:
    for path in run.timings_dir.glob("rank-*.csv"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:num_lines]))


def joules_per_sample(run: Run) -> float | None:
    (group,) = compare([run]).groups
    return group.rows[0].joules_per_sample


def test_timings_that_end_early_on_all_ranks_are_no_complete_run(copied: RunDir) -> None:
    whole = load(WHOLE)
    assert whole.incomplete is None
    cut(copied, 40)
    run = load(copied)
    assert (
        run.incomplete == "the timings of all ranks end early: summary.json counts 60 steps; 39 of 60 steps can be used"
    )
    assert run.summary.num_steps == 39 and joules_per_sample(run) == joules_per_sample(whole)
    with pytest.raises(UserError, match=r"nothing to compare: Left out: .*timings of all ranks end early"):
        load_side(copied.path)


@pytest.mark.parametrize("has_summary", [True, False])
def test_the_energy_of_all_ranks_is_not_laid_on_the_samples_of_one(copied: RunDir, has_summary: bool) -> None:
    copied.timings(1).unlink()
    if not has_summary:
        copied.summary.unlink()
    run = load(copied)
    assert run.incomplete and "no timings of rank 1" in run.incomplete and "can be used" not in run.incomplete
    assert joules_per_sample(run) == pytest.approx(
        joules_per_sample(load(WHOLE)), rel=1e-3
    )  # ranks may differ by a sample
