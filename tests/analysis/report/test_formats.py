"""`hpc-train report --format`: the same answer as tables, Markdown, CSV and JSON."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hpc_train.analysis.report.renderers.markdown import to_markdown
from hpc_train.analysis.report.report import make_report
from hpc_train.analysis.report.sections.quantities import FAMILIES, JSON_FAMILIES
from hpc_train.cli.main import cli
from tests import laws
from tests.synthetic import Recipe, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("formats")
    write_run(root, Recipe(steps=40, source="a|b <i>*x*</i> `c` [d](e) _f_"))
    write_run(root, Recipe(steps=40, size=2, step_s=0.006))
    write_run(root, Recipe(steps=40, size=4, step_s=0.004, complete=False))
    return root


def said(runs: Path, *options: str) -> Result:
    return CliRunner().invoke(cli, ["report", str(runs), "--output", str(runs / "report"), *options])


def test_markdown_has_the_answer_the_tables_and_the_notes(runs: Path) -> None:
    done = said(runs, "--format", "md")
    assert done.exit_code == 0 and done.output == to_markdown(make_report([runs]))
    lines = done.output.splitlines()
    assert lines[0].startswith("**2 ranks: 1.") and lines[0].endswith("**")
    tables = re.findall(r"((?:^\|.*\n)+)", done.output, re.MULTILINE)
    assert len(tables) == sum(len(section.tables) for section in make_report([runs]).sections)
    for table in tables:
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
        assert len({len(row) for row in rows}) == 1 and len({len(line) for line in table.splitlines()}) == 1
        assert all(re.fullmatch(r" (:-+|-+:) ", cell) for cell in rows[1])
    assert r"a\|b \<i>\*x\*\</i> \`c\` \[d\](e) \_f\_" in done.output
    assert r"- \* incomplete" in done.output and re.search(r"\| +4\\\* \|", done.output)
    assert "| \N{NO-BREAK SPACE}\N{NO-BREAK SPACE}= load balance" in done.output, "the tree of efficiencies"
    assert "Report:" not in done.output and (runs / "report" / "report.html").is_file()


def test_csv_and_json_are_the_files(runs: Path) -> None:
    text = said(runs, "--format", "csv").output
    assert [line["ranks"] for line in csv.DictReader(io.StringIO(text))] == ["1", "2", "4"]
    assert text == (runs / "report" / "scaling.csv").read_text()
    tree = said(runs, "--format", "json").output
    assert tree == (runs / "report" / "summary.json").read_text() and json.loads(tree)["schema"]
    assert said(runs, "--json").output == tree


def test_two_formats_at_once_are_a_mistake(runs: Path) -> None:
    done = said(runs, "--json", "--format", "csv")
    assert done.exit_code == 2 and "--format csv is given too" in done.output


def test_the_tables_say_where_the_page_and_the_figures_are(runs: Path, tmp_path: Path) -> None:
    done = said(runs, "--figures", str(tmp_path / "proposal"))
    assert f"Report: {runs / 'report' / 'report.html'}" in done.output
    made = list((tmp_path / "proposal").glob("*.[ps][dv][fg]"))
    assert f"Figures: {len(made)} files in {tmp_path / 'proposal'}" in done.output and len(made) == 18


def test_the_terminal_shows_one_screen_unless_asked_for_everything(runs: Path) -> None:
    made = make_report([runs])
    (section,) = made.sections
    done = said(runs)
    lines = done.output.splitlines()
    assert done.exit_code == 0 and len(lines) <= 23 and max(map(len, lines)) <= 80, done.output  # and the prompt
    text = " ".join(done.output.split())
    assert text.startswith(section.headline) and section.overview is not None
    assert all(cell in text for row in section.overview.rows for cell in row)
    assert sum(table.title in text for table in section.tables) == 1
    cautions = [note.text for note in section.notes if note.kind == "caution"]
    assert cautions[0] in text and "--full" in text
    full = " ".join(said(runs, "--full").output.split())
    assert all(table.title in full for table in section.tables) and all(note.text in full for note in section.notes)


def test_full_is_for_the_terminal(runs: Path) -> None:
    done = said(runs, "--full", "--format", "md")
    assert done.exit_code == 2 and "--format md always has everything" in done.output


# ---------------------------------------------------------------------------------------------- columns

UNITS = {"_s": "s", "_w": "W", "_g": "g", "_bytes": "B", "_js": "J s"}


def test_every_column_is_explained_and_its_name_carries_its_unit(runs: Path) -> None:
    quantities = [each for family in FAMILIES.values() for each in family]
    columns = [each.name for each in quantities]
    assert len(columns) == len(set(columns))
    (header, *_) = csv.reader(io.StringIO(said(runs, "--format", "csv").output))
    assert header == [*columns, "not_made", "test_accuracy"]
    for each in quantities:
        assert len(each.meaning) > 8 or each.meaning == "upper end", each.name
        for ending, unit in UNITS.items():
            if each.name.endswith(ending) and not each.name.endswith("per_s"):
                assert each.unit == unit, each.name
        is_energy = "joules" in each.name and not each.name.endswith(("quality", "shared"))
        assert (each.unit == "J") == is_energy, each.name


def test_what_json_has_beside_the_columns_is_explained_too(tmp_path: Path) -> None:
    """Strategies on equal work, and one job on two commits."""
    for index, strategy in enumerate(("horovod", "mpi")):
        write_run(tmp_path, Recipe(size=2, strategy=strategy, stamp=f"20261123T2{index}0000Z"))
    law = laws.Laws(ranks=2, ranks_per_host=1, steps=40)
    for commit, factor in (("a" * 40, 1.0), ("b" * 40, 1.2)):
        for seed in range(2):
            stamp = f"2026112{seed}T2{int(10 * factor) % 10}0000Z"
            meta = {"git": {"commit": commit, "dirty": False}}
            laws.write(tmp_path, replace(law, work_s=0.08 * factor, seed=seed, stamp=stamp, meta=meta))
    tree = json.loads(said(tmp_path, "--format", "json").output)
    (strategies,), (comparison,) = tree["strategies"], tree["comparisons"]
    families = [strategies["rows"], comparison["metrics"], comparison["places"]]
    assert all(families), "an empty list explains nothing"
    assert comparison["metrics"][0]["verdict"] == "regression" and comparison["is_regression"]
    for found, quantities in zip(families, JSON_FAMILIES.values(), strict=True):
        explained = {each.name for each in quantities}
        assert all({name for name in each if not name.startswith("test_")} - {"runs"} == explained for each in found)
    assert all(len(each.meaning) > 8 for quantities in JSON_FAMILIES.values() for each in quantities)


def test_tables_show_the_exported_values(runs: Path) -> None:
    """A column of a table and one of scaling.csv are one quantity: what a cell shows is what the file has, rounded."""
    made = make_report([runs])
    lines = list(csv.DictReader(io.StringIO(said(runs, "--format", "csv").output)))
    (section,) = made.sections
    titles = {each.title: each for family in FAMILIES.values() for each in family if each.title}
    compared = set()
    assert section.overview is not None
    for table in (section.overview, *section.tables):
        for place, column in enumerate(table.columns):
            quantity = titles.get(column.title)
            if (
                quantity is None
                or len(table.rows) != len(lines)
                or table.id.startswith(("energy-by", "target", "plan"))
            ):
                continue
            for row, line in zip(table.rows, lines, strict=True):
                shown = re.fullmatch(r"([\d.]+)(x|%| [mku]?(?:J|W|Js|FLOP))?(?: est\.)?\*?", row[place])
                if shown is None:
                    assert row[place] in ("baseline", "missing", "-", "4*"), (table.id, column.title, row[place])
                    continue
                exported = float(line[quantity.name])
                scale = {"%": 0.01, " m": 1e-3, " k": 1e3, " u": 1e-6}.get((shown[2] or "")[:2], 1.0)
                scale *= 1e-3 if quantity.unit == "s" else 1.0
                assert float(shown[1]) * scale == pytest.approx(exported, rel=6e-3, abs=6e-4), (table.id, column.title)
                compared.add(quantity.name)
    assert {
        "ranks",
        "step_s",
        "samples_per_s",
        "efficiency",
        "share_reduce",
        "joules",
        "joules_loop",
        "mean_w",
    } <= compared
