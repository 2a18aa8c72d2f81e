"""The loop closed: a plan, the run that followed it, what the report says of both, and what later plans learn."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpc_train.analysis.models.predict import DRIFT
from hpc_train.analysis.planning.followed import followed_plans, site_drift
from hpc_train.analysis.report.sections.followed import followed_text
from hpc_train.analysis.runs.load import load_all
from hpc_train.analysis.scaling.compare import compare
from hpc_train.cli.main import cli
from hpc_train.core.errors import UserError
from tests.synthetic import SHARES, Recipe, write_run

HOSTS = ("a", "b", "c", "d", "e", "f", "g", "h")


def step_s(size: int) -> float:
    return 0.08 / size + 0.002


def write(folder: Path, size: int, slower: float = 1.0, **shares: float) -> Path:
    hosts = HOSTS[: max(size // 2, 1)]
    recipe = Recipe(size=size, step_s=slower * step_s(size), hosts=hosts, shares={**SHARES, **shares}, joules=50.0)
    return write_run(folder, recipe).path


def planned(folder: Path) -> Path:
    """Runs of 1 to 8 ranks, and their plan beside them."""
    job, *_ = [write(folder, size).parent for size in (1, 2, 4, 8)]
    done = CliRunner().invoke(cli, ["plan", str(job), "--json"], catch_exceptions=False)
    (job / "plan.json").write_text(done.output)
    return job


def test_a_run_is_compared_with_the_plan_that_it_followed(tmp_path: Path) -> None:
    job = planned(tmp_path)
    (before,) = compare(load_all([job])).groups
    assert followed_plans(before) == [], "what was measured before the plan is no outcome of it"
    write(tmp_path, 16, slower=1.5)
    (after,) = compare(load_all([job])).groups
    (found,) = followed_plans(after)
    assert found.ranks == 16 and found.error == pytest.approx(0.5, abs=0.1) and not found.is_inside
    assert found.planned_s == pytest.approx(step_s(16), rel=0.05)
    assert {part.name for part in found.parts} == {"computation", "input", "communication and waiting"}
    assert sum(part.measured for part in found.parts) == pytest.approx(found.measured_s)
    assert found.power is not None and found.power.measured > 0
    told = followed_text(found)
    assert (
        "plan.json foresaw" in told and "slower, outside the interval" in told and "Most of it is computation" in told
    )
    done = CliRunner().invoke(cli, ["report", str(job), "--full"], catch_exceptions=False)
    assert "plan.json foresaw" in done.output


def test_plans_of_other_jobs_and_broken_files_are_passed_over(tmp_path: Path) -> None:
    job = planned(tmp_path)
    write(tmp_path, 16)
    tree = json.loads((job / "plan.json").read_text())
    (job / "plan.json").write_text(json.dumps({**tree, "job": {"train.lr": 3}}))
    (job / "plan-empty.json").write_text("")
    (job / "plan-list.json").write_text("[]")
    (job / "plan-odd.json").write_text(json.dumps({**tree, "options": [3, {"ranks": 16, "step_s": "x"}]}))
    (group,) = compare(load_all([job])).groups
    assert followed_plans(group) == []


@pytest.mark.parametrize(("slower", "wider"), [(1.0, False), (1.6, True)])
def test_later_plans_learn_from_it(tmp_path: Path, slower: float, wider: bool) -> None:
    job = planned(tmp_path)
    with pytest.raises(UserError, match="no run there has followed a plan"):
        site_drift(tmp_path)
    options = json.loads((job / "plan.json").read_text())["options"]
    (foreseen,) = [option["step_s"] for option in options if option["ranks"] == 16]
    write(tmp_path, 16, slower * foreseen / step_s(16))
    found = site_drift(tmp_path)
    assert found.degrees == DRIFT.degrees + 1
    assert (found.least > DRIFT.least) == wider
    words = ["plan", str(job), "--predict", "32", "--json"]
    plain, taught = (
        json.loads(CliRunner().invoke(cli, [*words, *more], catch_exceptions=False).output)["options"][0]
        for more in ([], ["--history", str(tmp_path)])
    )
    widths = [option["step_interval_s"][1] / option["step_interval_s"][0] for option in (plain, taught)]
    assert (widths[1] > widths[0]) == wider and plain["step_s"] == taught["step_s"]
