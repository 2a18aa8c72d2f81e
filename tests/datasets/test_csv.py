"""CSV files as they come: other separators, decimal commas, text, several targets; with pyarrow and without it."""

import json
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_train.core.errors import UserError
from hpc_train.core.world import World
from hpc_train.datasets.inspect.proposal import preparation
from hpc_train.datasets.prepare.prepare import prepare
from hpc_train.datasets.prepare.sources import Options
from hpc_train.train.comm.context import Context

ALONE = Context(World())
COLOURS = ["red", "blue", "light green"]


@pytest.fixture(params=["pyarrow", "python"], autouse=True)
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs with pyarrow, and as where it cannot be imported."""
    if request.param == "python":
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    else:
        pytest.importorskip("pyarrow")
    return str(request.param)


def made(path: Path, separator: str = ",", decimal: str = ".", num_rows: int = 50) -> Path:
    """weight, colour, length, kind: weight = row / 4, length = -row * 1e3."""
    lines = [separator.join(("weight", '"colour"', "length", "kind"))]
    for row in range(num_rows):
        weight, colour = f"{row / 4:.2f}".replace(".", decimal), COLOURS[row % 3]
        lines.append(separator.join((weight, f'"{colour}"' if row % 2 else colour, f"-{row}e3", f"k{row % 4}")))
    path.write_text("\n".join(lines) + "\n")
    return path


def arrays(source: Path, **options: str) -> tuple[np.ndarray, np.ndarray, dict[str, object]]:
    """(inputs, targets, attributes) of the file that `prepare table` makes of it."""
    output = source.parent / "out.h5"
    prepare("table", source, output, ALONE, True, Options(test_fraction=0, **options))
    with h5py.File(output) as file:
        return file["train/inputs"][:], file["train/targets"][:], dict(file.attrs)


@pytest.mark.parametrize(
    ("name", "separator", "decimal"),
    [("a.csv", ",", "."), ("a.csv", ";", ","), ("a.tsv", "\t", "."), ("a.csv", ";", "."), ("a.csv", "\t", ",")],
)
def test_each_form_gives_the_same_numbers(name: str, separator: str, decimal: str, tmp_path: Path) -> None:
    inputs, targets, facts = arrays(made(tmp_path / name, separator, decimal), target="kind")
    rows = np.arange(50)
    assert list(facts["columns"]) == ["weight", "colour=blue", "colour=light green", "colour=red", "length"]
    assert np.array_equal(inputs[:, 0], (rows / 4).astype("f4")) and np.array_equal(inputs[:, 4], -1000.0 * rows)
    order = ["blue", "light green", "red"]
    assert np.array_equal(inputs[:, 1:4], [[COLOURS[row % 3] == each for each in order] for row in rows])
    assert targets.dtype == np.int64 and np.array_equal(targets, rows % 4)
    assert json.loads(str(facts["categories"])) == {"colour": order, "kind": ["k0", "k1", "k2", "k3"]}


def test_codes_several_targets_and_columns_that_are_left_out(tmp_path: Path) -> None:
    inputs, targets, facts = arrays(made(tmp_path / "a.csv"), target="length,weight", drop="kind", categories="codes")
    rows = np.arange(50)
    assert list(facts["columns"]) == ["colour"] and list(facts["target"]) == ["length", "weight"]
    assert inputs[:, 0].tolist() == [["blue", "light green", "red"].index(COLOURS[row % 3]) for row in rows]
    assert targets.dtype == np.float32 and np.array_equal(targets, np.stack([-1000.0 * rows, rows / 4], 1).astype("f4"))


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("a,b\n1,2\n3,x\n5,6\n", {"target": "a"}, "row 2, column b: 'x' is no number"),
        ("a;b\n1,5;2\n3;\n5;6\n", {"target": "a"}, "row 2, column b: the value is missing"),
        ("a,b\n1,2\n3,NA\n5,6\n", {"target": "a"}, "row 2, column b: the value is missing"),
        ("a,b\n1,2\n3\n", {"target": "a"}, "row 2"),
        ("a,b\n1,2\n", {"target": "a,c"}, "--target c is no column"),
        ("a,b\n1,2\n", {"target": "a,b"}, "rows of 2 columns"),
        ("a,b\n1,2\n", {"target": "a", "drop": "b"}, "leaves no inputs"),
        ("a,b\n1,2\n", {"target": "a", "drop": "c"}, "--drop c is no column"),
        ("a,b\n1,2\n", {"target": "a", "drop": "a"}, "--drop a is the target"),
        ("a,b,c\n1,x,3\n", {"target": "a,b"}, "column b holds text, and several targets are numbers"),
        (
            "a,day\n" + "".join(f"{row},day {row}\n" for row in range(1200)),
            {"target": "a"},
            "column day holds more than 1,000 different texts",
        ),
    ],
)
def test_what_is_no_table_is_named(text: str, options: dict[str, str], said: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError) as error:
        arrays(tmp_path / "a.csv", **options)
    assert said in error.value.what


def test_text_in_another_encoding_is_named_with_the_command_that_converts_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("größe,b\n1,2\n".encode("latin1"))
    with pytest.raises(UserError, match="iconv -f latin1"):
        arrays(tmp_path / "a.csv", target="b")


def test_columns_of_numpys_files(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(30, 4))
    np.save(tmp_path / "a.npy", values)
    inputs, targets, _ = arrays(tmp_path / "a.npy", target="0,-1")
    assert np.array_equal(inputs, values[:, 1:3]) and np.array_equal(targets, values[:, [0, 3]].astype("f4"))


def test_init_prints_the_command_for_each_form(tmp_path: Path) -> None:
    path = made(tmp_path / "a b.csv", ";", ",")
    path.write_text(path.read_text().replace("kind", "my class", 1))
    assert preparation(path) == f"hpc-train prepare table 'data/a b.h5' --from '{path}' --target 'my class'"


def test_a_table_like_another_has_its_columns_and_numbers(tmp_path: Path) -> None:
    """Of another form, and with fewer different texts."""
    inputs, targets, facts = arrays(made(tmp_path / "a.csv"), target="kind")
    new = made(tmp_path / "b.csv", ";", ",", 2)
    prepare("table", new, tmp_path / "b.h5", ALONE, True, Options(like=tmp_path / "out.h5"))
    with h5py.File(tmp_path / "b.h5") as file:
        assert np.array_equal(file["test/inputs"], inputs[:2]) and np.array_equal(file["test/targets"], targets[:2])
        assert list(file.attrs["columns"]) == list(facts["columns"]) and "train" not in file
