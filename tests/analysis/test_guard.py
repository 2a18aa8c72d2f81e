"""A section of a report that cannot be made costs no other one, says why in its place, and is not hidden from tests."""

import csv
import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hpc_train.analysis.guard import RAISE
from hpc_train.analysis.report.renderers.markdown import to_markdown
from hpc_train.analysis.report.report import make_report
from hpc_train.cli.main import cli
from tests.analysis.rendered import Page, printed
from tests.synthetic import Recipe, write_run

HERE = "hpc_train.analysis."
# What fails -> where the report must say so, besides summary.json and scaling.csv: "text" is the terminal and Markdown.
PARTS = {
    "scaling.compare.efficiencies": "text",
    "energy.cost.energy_of": "text",
    "report.facts.studies_of": "text",
    "report.sections.group.headline": "text",
    "report.sections.scaling.overview_table": "short",
    "report.sections.next_run.predict": "text",
    "report.sections.step_time.phase_table": "text",
    "report.sections.energy.power_table": "text",
    "report.sections.quantities.worst_run": "",
    "report.sections.scaling.speedup_plot": "page",
    "report.plots.speedup._paint": "page",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("guard")
    for size in (1, 2, 4):
        write_run(root, Recipe(size=size, step_s=0.01 / size**0.9, steps=40))
    return root


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a \x1b[31mtest\n broke it")

    monkeypatch.setattr(HERE + request.param, fail)
    return str(request.param)


def said(runs: Path, folder: Path, *options: str) -> Result:
    return CliRunner().invoke(cli, ["report", str(runs), "--output", str(folder), *options])


@pytest.mark.parametrize("broken", PARTS, indirect=True)
def test_a_section_that_fails_says_why_in_its_place(
    runs: Path, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(RAISE)
    is_figure = broken.startswith("report.plots.")
    done = said(runs, tmp_path, *["--figures", str(tmp_path / "figures")] * is_figure)
    assert done.exit_code == 1 and "the report is not complete" in done.stderr, done.output
    assert "Traceback" not in done.output and "\x1b" not in done.output
    why = "because of a bug in hpc-train (ZeroDivisionError: a"
    made = make_report([runs])
    texts = [" ".join(text.split()) for text in (printed(made), to_markdown(made).replace("\\", ""))]
    short = " ".join(printed(made, full=False).split())
    html = (tmp_path / "report.html").read_text()
    page = Page(html).text
    for text in texts:
        assert (why in text) == (PARTS[broken] == "text"), text
        assert "4 ranks" in text and "Energy" in text
    assert why in short or PARTS[broken] != "short"
    assert (why in page) == (PARTS[broken] in ("text", "page"))
    assert 'id="notes"' in html and "<svg" in html
    tree = json.loads((tmp_path / "summary.json").read_text())
    assert len(tree["not_made"]) >= 1 and all("ZeroDivisionError" in told for told in tree["not_made"])
    assert [row["ranks"] for row in tree["groups"][0]["rows"]] == [1, 2, 4]
    lines = list(csv.DictReader(io.StringIO((tmp_path / "scaling.csv").read_text())))
    assert len(lines) == 3 and all("ZeroDivisionError" in line["not_made"] for line in lines)
    if is_figure:
        drawn = {path.name for path in (tmp_path / "figures").glob("*.pdf")}
        assert {f"softmax-mnist-{name}.pdf" for name in ("speedup", "time-per-step", "training-loss")} <= drawn
        assert why in (tmp_path / "figures" / "captions.md").read_text()


@pytest.mark.parametrize(
    "broken",
    ["scaling.compare.efficiencies", "report.sections.step_time.phase_table", "report.plots.speedup._paint"],
    indirect=True,
)
def test_the_traceback_is_there_for_those_who_ask(runs: Path, broken: str, tmp_path: Path) -> None:
    """As the whole test suite does (conftest.py)."""
    assert isinstance(said(runs, tmp_path).exception, ZeroDivisionError)


def test_a_whole_report_says_nothing_of_it(runs: Path, tmp_path: Path) -> None:
    done = said(runs, tmp_path, "--json")
    assert done.exit_code == 0 and not done.stderr and json.loads(done.stdout)["not_made"] == []
