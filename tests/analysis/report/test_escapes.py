"""What names, keys and cells hold goes to nobody's terminal or spreadsheet as a command."""

import csv
import io
import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpc_train.analysis.report.renderers.files import csv_cell, to_csv, to_json, write_report
from hpc_train.analysis.report.renderers.markdown import to_markdown
from hpc_train.analysis.report.report import make_report
from hpc_train.cli.main import cli
from hpc_train.core.errors import UserError, printable
from tests import jobs
from tests.analysis.rendered import printed
from tests.synthetic import Recipe, write_run

OWNED = "\x1b]0;owned\x07\x9b31m\u202e"
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


def said(*words: object, cwd: Path) -> str:
    """What `hpc-train words...` prints, both streams, as a terminal would get it."""
    done = jobs.run(0, *words, cwd=cwd)
    assert "Traceback" not in done.err, done.err
    return done.out + done.err


def test_messages_do_not_steer_a_terminal(tmp_path: Path) -> None:
    job, table = tmp_path / f"job{OWNED}.toml", tmp_path / f"table{OWNED}.csv"
    job.write_text('"\\u001b]0;owned\\u0007" = 1\n[train]\n"st\\u009beps" = "\\u001b[31m"\n')
    table.write_text(f"ranks,step_s\n1,{OWNED}\n")
    run = write_run(tmp_path / "runs", Recipe(name="a"))
    lines = run.timings(0).read_text().splitlines()
    lines[7] = f"{OWNED},{lines[7]}"
    run.timings(0).write_text("\n".join(lines) + "\n")
    for words in (
        ["config", "show", job],
        ["config", "show", "--set", f"{OWNED}=1", job],
        ["plan", "--table", table],
        ["report", run.path],
        ["report", tmp_path / OWNED],
        ["report", run.path, "--format", OWNED],
        [OWNED],
    ):
        text = said(*words, cwd=tmp_path)
        assert text and not STEERING.search(text), (words, text)


def hostile(root: Path, words: str) -> Path:
    """Two runs with these words wherever a run directory may hold words."""
    meta = {
        "cpu_model": words,
        "device": words,
        "versions": {words: words},
        "git": {"commit": words},
        "mpi": {"version": words},
        "peak_flops": 1e12,
        "peak_source": words,
        "flops_per_sample": 1e6,
    }
    for size in (1, 2, 4):
        run = write_run(
            root,
            Recipe(
                size=size, step_s=0.01 / size, meta=meta, source=words, quality="estimated", assumption=words, steps=40
            ),
        )
        run.config.write_text(run.config.read_text().replace('file = "data/mnist.h5"', f"file = {toml(words)}"))
    return root


def toml(words: str) -> str:
    return '"' + "".join(f"\\u{ord(letter):04x}" for letter in words if letter >= " ") + '"'


def test_no_form_of_a_report_steers_a_terminal(tmp_path: Path) -> None:
    made = make_report([hostile(tmp_path, OWNED)])
    page = write_report(made, tmp_path / "report")
    for text in (
        printed(made),
        printed(made, full=False),
        to_markdown(made),
        to_csv(made),
        to_json(made),
        page.read_text(),
    ):
        assert not STEERING.search(text), STEERING.search(text)
    done = CliRunner().invoke(cli, ["plan", str(tmp_path), "--predict", "2"])
    assert done.exit_code == 0 and not STEERING.search(done.output)


@pytest.mark.parametrize("words", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "＝1+1", '=cmd|" /C calc"!A0'])
def test_no_cell_begins_as_a_formula(tmp_path: Path, words: str) -> None:
    made = make_report([hostile(tmp_path, words)])
    rows = list(csv.reader(io.StringIO(to_csv(made))))
    header, cells = rows[0], [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    for row in cells:
        for cell in row.values():
            if cell.lstrip()[:1] in ("=", "+", "-", "@", "＝") and cell:
                float(cell)  # a number stays a number
    assert len(header) == len(set(header))
    assert words.strip() in cells[0]["energy_source"] and float(cells[0]["step_s"]) > 0


def test_numbers_stay_numbers() -> None:
    assert [csv_cell(value) for value in (-1.5, -3, None, True, "a-b")] == [-1.5, -3, None, True, "a-b"]
    assert csv_cell("-1.5") == "'-1.5" and csv_cell("") == ""
    assert csv_cell("\r=1") == csv_cell("\t=1") == "\N{REPLACEMENT CHARACTER}=1"


def test_an_error_is_clean_however_it_is_shown() -> None:
    error = UserError(f"a{OWNED}\nb", f"{OWNED}c")
    assert not STEERING.search(f"{error}{error.what}{error.remedy}") and error.what.count("\n") == 1
    assert printable("Größe 10 µm, 日本") == "Größe 10 µm, 日本"


def test_folders_with_such_names_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / f"runs{OWNED}"
    write_run(folder, Recipe(steps=40))
    broken = write_run(folder, Recipe(size=2, steps=40))
    os.truncate(broken.meta, 3)
    text = said("report", folder, cwd=tmp_path)
    assert "Left out" in text and "Report: " in text and not STEERING.search(text)
