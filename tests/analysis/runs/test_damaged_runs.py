"""Damaged run directories and tables: one message that names file and entry, or the run left out and named.

Seeded: case N is the same everywhere. HPC_TRAIN_DAMAGES=FIRST:LAST plays other cases than the few of every day.
"""

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.facts import gather
from hpc_train.analysis.report.renderers.files import to_csv, to_json, write_report
from hpc_train.analysis.report.renderers.markdown import to_markdown
from hpc_train.analysis.report.report import build_report, make_report
from hpc_train.cli.main import cli
from hpc_train.core.errors import UserError
from tests.analysis.rendered import printed
from tests.synthetic import Recipe, write_run

RECORDED = Path(__file__).parents[2] / "runs" / "mlp-mnist"
FIRST, LAST = map(int, os.environ.get("HPC_TRAIN_DAMAGES", "0:25").split(":"))
LONGEST_S = 20.0
NO_NUMBER = re.compile(r"(?<![\w./-])[-+]?(?:nan|inf(?:inity)?)(?![\w./-])", re.IGNORECASE)
VALUES: list[Any] = [
    *(None, True, "", "x", -1, 0, 1, 7, 10**7, 10**18, 10**19, 10**400, 1e308, 5e-324, -1e308, [], {}, [[]]),
    *(float("nan"), float("inf"), ["\x1b[31mred\x07"], {"a": {"b": None}}, "=1+1", "\x1b]0;owned\x07", "9" * 5000),
]
CELLS = [
    *("", "x", "-1", "0", "nan", "inf", "1e308", "5e-324", "1e400", "0x1", "1_0", "\x1b[31m", "=1+1", "٣", "\x00"),
    *("9" * 18, "9" * 19, "9" * 5000, "-0", "1.5", '"', "'", ";"),
]
Draw = random.Random


# ---------------------------------------------------------------------------------------------- damages


def changed_json(draw: Draw, data: bytes) -> bytes:
    """Some entries of a JSON file get another value, are lost or renamed."""
    try:
        tree = json.loads(data)
    except ValueError:  # damaged before
        return data
    for _ in range(draw.randint(1, 3)):
        node: Any = tree
        while isinstance(node, dict | list) and node:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = draw.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.6:
                node = node[key]
                continue
            if draw.random() < 0.2:
                del node[key]
            else:
                node[key] = draw.choice(VALUES)
            break
    try:
        return json.dumps(tree).encode()
    except ValueError:
        return b"{}"


def changed_cells(draw: Draw, data: bytes) -> bytes:
    lines = [line.split(",") for line in data.decode("utf-8", "replace").split("\n")]
    for _ in range(draw.randint(1, 3)):
        row = draw.choice(lines)
        row[draw.randrange(len(row))] = draw.choice(CELLS)
    return "\n".join(map(",".join, lines)).encode("utf-8", "replace")


def moved_lines(draw: Draw, data: bytes) -> bytes:
    lines = data.split(b"\n")
    place = draw.randrange(len(lines))
    how = draw.choice(["lost", "twice", "swapped"])
    if how == "lost":
        del lines[place]
    elif how == "twice":
        lines.insert(place, lines[place])
    else:
        other = draw.randrange(len(lines))
        lines[place], lines[other] = lines[other], lines[place]
    return b"\n".join(lines)


def cut(draw: Draw, data: bytes) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def flipped(draw: Draw, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.randint(1, 5)):
        if damaged:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def replaced(draw: Draw, data: bytes) -> bytes:
    return draw.choice(
        [b"", b"\x00" * 100, draw.randbytes(300), b"[" * 100_000, b"null", b"[]", b"a,b\n1,2\n", b"\xff\xfe" + data]
    )


def damage(draw: Draw, run: Path) -> None:
    files = sorted(path for path in run.rglob("*") if path.is_file())
    for _ in range(draw.randint(1, 2)):
        path = draw.choice(files)
        if not path.is_file():
            continue
        if draw.random() < 0.15:
            path.unlink()
            how = draw.choice(["lost", "folder", "pipe", "loop", "device"])
            if how == "folder":
                path.mkdir()
            elif how == "pipe":
                os.mkfifo(path)
            elif how == "loop":
                path.symlink_to(path.name)
            elif how == "device":
                path.symlink_to("/dev/zero")
            continue
        kinds: list[Callable[[Draw, bytes], bytes]] = [cut, flipped, replaced]
        kinds += [changed_json] * 6 if path.suffix == ".json" else [changed_cells, changed_cells, moved_lines]
        path.write_bytes(draw.choice(kinds)(draw, path.read_bytes()))


# ---------------------------------------------------------------------------------------------- cases


def check_words(case: int, text: str, losses_may_be: bool = False) -> None:
    assert "Traceback" not in text, case
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), (case, "control characters")
    if not losses_may_be:
        found = NO_NUMBER.search(re.sub(r"(?s)Left out, since.*", "", text))  # which quotes what is wrong
        assert not found, (case, text[max(0, found.start() - 200) : found.end() + 50])


@pytest.mark.parametrize("case", range(FIRST, LAST))
def test_damaged_run_directories(case: int, tmp_path: Path) -> None:
    draw = Draw(case)
    for run in RECORDED.glob("*-np*"):  # a report may lie beside them
        shutil.copytree(run, tmp_path / "runs" / run.name)
    runs = sorted((tmp_path / "runs").iterdir())
    for run in draw.sample(runs, draw.choice([1, 1, 1, 3])):
        damage(draw, run)
    began = time.process_time()
    try:
        facts = gather([tmp_path / "runs"])
        made = build_report(facts)
    except UserError as error:
        check_words(case, str(error), losses_may_be=True)
        assert str(tmp_path) in error.what and error.remedy
    else:
        # A loss of nan is what a diverged run recorded.
        diverged = any(
            not abs(loss) < 1e300
            for run in facts.runs
            for loss in [run.summary.loss or 0.0, *run.metrics[1], *run.summary.test.values()]
        )
        texts = [printed(made, 100), to_markdown(made), to_csv(made), to_json(made)]
        if case % 10 == 0:
            texts.append(
                re.sub(r"<svg.*?</svg>", "", write_report(made, tmp_path / "report").read_text(), flags=re.DOTALL)
            )
        for text in texts:
            check_words(case, text, diverged)
        named = {run.dir.path.name for run in facts.runs}
        for run in runs:
            assert run.name in named or run.name in texts[0].replace("\n", ""), f"{case}: {run.name} is lost"
    done = CliRunner().invoke(cli, ["plan", str(tmp_path / "runs"), "--predict", "8,16"])
    assert done.exception is None or isinstance(done.exception, UserError | SystemExit), (case, done.exc_info)
    check_words(case, done.output)
    assert time.process_time() - began < LONGEST_S, case


def table(draw: Draw) -> bytes:
    columns = ["ranks", draw.choice(["step_s", "samples_per_s"])]
    columns += draw.sample(["ranks_per_node", "scaling", "global_batch", "joules", "x", "step_s"], draw.randint(0, 4))
    usual = {"ranks_per_node": "4", "scaling": draw.choice(["weak", "strong"]), "global_batch": "512", "joules": "30"}
    rows = [columns]
    for size in draw.sample([1, 2, 4, 8, 16, 32, 64], draw.randint(0, 6)):
        time_s = f"{draw.uniform(0.5, 2) / size:.5g}"
        rows.append([str(size), time_s, *(usual.get(name, "1") for name in columns[2:])])
    for _ in range(draw.randint(0, 3)):
        row = draw.choice(rows[1:] or rows)
        number = f"{draw.choice([1, 3, 9.9])}e{draw.randint(-330, 320)}"
        row[draw.randrange(len(row))] = draw.choice([*CELLS, number, number])
    text = "\n".join(map(",".join, rows)).encode()
    return draw.choice([cut, flipped, replaced, moved_lines])(draw, text) if draw.random() < 0.2 else text


@pytest.mark.parametrize("case", range(FIRST, LAST))
def test_damaged_tables(case: int, tmp_path: Path) -> None:
    draw = Draw(case)
    path = tmp_path / "table.csv"
    path.write_bytes(table(draw))
    words = draw.choice([[], ["--steps", "1e6"], ["--predict", "64,4096"], ["--samples", "1e9", "--deadline", "6h"]])
    words = [
        *words,
        *draw.choice([[], ["--json"], ["--ranks-per-node", "4"], ["--model", "usl"], ["--model", "extra-p"]]),
    ]
    began = time.process_time()
    done = CliRunner().invoke(cli, ["plan", "--table", str(path), *words])
    assert done.exception is None or isinstance(done.exception, UserError | SystemExit), (case, done.exc_info)
    if isinstance(done.exception, UserError):
        assert re.search(r"table\.csv|--", done.exception.what), (case, done.exception.what)
    check_words(case, done.output)
    check_words(case, str(done.exception or ""), losses_may_be=True)
    assert time.process_time() - began < LONGEST_S, case


# ---------------------------------------------------------------------------------------------- one by one


def test_an_absurd_size_is_one_message_at_once(tmp_path: Path) -> None:
    run = write_run(tmp_path, Recipe(size=2))
    tree = json.loads(run.meta.read_text())
    run.meta.write_text(json.dumps(tree | {"size": 10_000_000}))
    began = time.process_time()
    with pytest.raises(UserError) as error:
        make_report([tmp_path])
    assert f"{run.meta}: size = 10000000, and {run.timings_dir} holds records of 2" in error.value.what
    assert time.process_time() - began < 1


def test_a_damaged_run_is_left_out_and_named(tmp_path: Path) -> None:
    for size in (1, 2, 4):
        last = write_run(tmp_path, Recipe(size=size, step_s=0.01 / size))
    last.meta.write_text("{")
    guard = SectionGuard()
    facts = gather([tmp_path], guard=guard)
    assert [run.size for run in facts.runs] == [1, 2] and not guard.faults
    assert any(f"{last.meta} is not JSON" in note for note in facts.skipped)


def test_a_long_table_takes_seconds(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("ranks,step_s\n" + "".join(f"{2 ** (row % 6)},{1 + row % 7 / 100}\n" for row in range(100_000)))
    began = time.process_time()
    done = CliRunner().invoke(cli, ["plan", "--table", str(path)])
    assert done.exit_code == 0 and "16,667 lines" in done.output.replace("16667", "16,667")
    assert time.process_time() - began < 15
    path.write_text("ranks,step_s\n" + "".join(f"{row + 1},1.0\n" for row in range(100_000)))
    done = CliRunner().invoke(cli, ["plan", "--table", str(path)])
    assert isinstance(done.exception, UserError) and "100,000 numbers of ranks" in done.exception.what
