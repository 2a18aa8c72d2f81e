"""A model of a table, used on other tables: its columns and texts are those of training, or it is not used."""

import csv
import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests import jobs

NUM, NUM_NEW = 1200, 300
SENSORS, KINDS = ("A", "B", "C"), ("cold", "hot", "warm")
HEADER = ("hum", "temp", "sensor", "kind")


def rows(num: int, seed: int) -> list[tuple[str, ...]]:
    """The kind follows from the temperature alone."""
    rng = np.random.default_rng(seed)
    temps, hums = rng.normal(0, 1, num), rng.normal(0, 1, num)
    kinds = np.select([temps < -0.5, temps > 0.5], ["cold", "hot"], "warm")
    sensors = rng.choice(SENSORS, num)
    return [(f"{h:.3f}", f"{t:.3f}", s, k) for h, t, s, k in zip(hums, temps, sensors, kinds, strict=True)]


def write(path: Path, content: list[tuple[str, ...]], columns: tuple[str, ...] = HEADER) -> Path:
    """Columns that are no column of `HEADER` hold ids."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for number, row in enumerate(content):
            cells = dict(zip(HEADER, row, strict=True))
            writer.writerow([cells.get(name, f"id{number}") for name in columns])
    return path


def done(cwd: Path, *words: object, ranks: int = 0) -> str:
    found = jobs.run(ranks, *words, cwd=cwd)
    assert found.code == 0, found.err
    return found.out + found.err


def refused(cwd: Path, *words: object) -> str:
    found = jobs.run(0, *words, cwd=cwd)
    assert found.code == 2 and "Traceback" not in found.err, found.err
    return " ".join(found.err.split())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of a prepared table whose target is text."""
    folder = tmp_path_factory.mktemp("tables")
    write(folder / "train.csv", rows(NUM, 0))
    done(folder, "prepare", "table", "train.h5", "--from", "train.csv", "--target", "kind")
    keys = jobs.settings(data__file="train.h5", train__steps=200, train__lr=0.5, reduce__strategy="local")
    kind = jobs.settings(data__normalize="standardize", name="kinds", train__global_batch=100)
    done(folder, "train", "configs/softmax-mnist.toml", *keys, *kind)
    return folder


RUN = "runs/kinds"


def test_new_rows_are_prepared_like_the_training_table(work: Path) -> None:
    """Other order of columns, one more, no target, and texts that are rarer: the predictions are strings."""
    content = rows(NUM_NEW, 1)
    write(work / "new.csv", content, ("id", "sensor", "temp", "hum"))
    said = done(work, "prepare", "table", "new.h5", "--from", "new.csv", "--like", "train.h5", ranks=2)
    assert "no such columns: id" in said
    done(work, "predict", RUN, "new.h5", "--output", "out.h5")
    with h5py.File(work / "train.h5") as train, h5py.File(work / "new.h5") as new, h5py.File(work / "out.h5") as out:
        assert list(new.attrs["columns"]) == list(train.attrs["columns"]) and list(new) == ["checksums", "test"]
        assert np.array_equal(new["test/inputs"][:, :2], np.array([row[:2] for row in content], np.float32))
        assert out["classes"].asstr()[:].tolist() == list(KINDS)
        predicted = out["predicted"].asstr()[:]
    wanted = np.array([row[3] for row in content])
    assert (predicted == wanted).mean() > 0.8
    write(work / "known.csv", content, ("kind", "sensor", "temp", "hum"))
    done(work, "prepare", "table", "known.h5", "--from", "known.csv", "--like", "train.h5")
    record = json.loads(jobs.run(0, "evaluate", RUN, "--data", "known.h5", "--json", cwd=work).out)
    assert record["num_measured"] == NUM_NEW
    assert record["measures"]["accuracy"] == pytest.approx((predicted == wanted).mean())


def test_other_columns_are_refused(work: Path) -> None:
    """In another order, with other texts of an input or of the target, by predict, evaluate and a run's own test."""
    content = rows(NUM_NEW, 1)
    write(work / "moved.csv", content, ("temp", "hum", "sensor", "kind"))
    write(work / "fewer.csv", [row for row in content if row[2] != "B"])
    write(work / "kinds.csv", [(*row[:3], row[3].replace("hot", "boiling")) for row in content])
    for name, says in (
        ("moved", "moved.h5: column 1 of the inputs is 'temp', and 'hum' in training"),
        ("fewer", "fewer.h5: column 4 of the inputs is 'sensor=C', and 'sensor=B' in training"),
    ):
        done(work, "prepare", "table", f"{name}.h5", "--from", f"{name}.csv", "--target", "kind")
        for words in (("predict", RUN, f"{name}.h5", "--output", "no.h5"), ("evaluate", RUN, "--data", f"{name}.h5")):
            error = refused(work, *words)
            assert says in error and "prepare table NEW.h5 --from CSV --like train.h5" in error
    keys = jobs.settings(data__file="train.h5", data__test_file="moved.h5", train__steps=2, reduce__strategy="local")
    assert "column 1 of the inputs is 'temp'" in refused(work, "train", "configs/softmax-mnist.toml", *keys)
    done(work, "prepare", "table", "kinds.h5", "--from", "kinds.csv", "--target", "kind")
    assert "the target has the texts boiling, cold, warm, and the texts cold, hot, warm in training" in refused(
        work, "evaluate", RUN, "--data", "kinds.h5"
    )
    keys = jobs.settings(data__file="train.h5", data__test_file="kinds.h5", train__steps=2, reduce__strategy="local")
    assert "the target has the texts boiling" in refused(work, "train", "configs/softmax-mnist.toml", *keys)
    said = done(work, "predict", RUN, "kinds.h5", "--output", "kinds-out.h5")
    assert "Predictions are not compared with" in said and "accuracy" not in said.lower()
    assert not (work / "no.h5").exists()

    with h5py.File(work / "moved.h5") as moved, h5py.File(work / "nameless.h5", "w") as nameless:
        nameless["test/inputs"] = moved["test/inputs"][:]
    said = done(work, "predict", RUN, "nameless.h5", "--output", "nameless-out.h5")
    assert "warning: nameless.h5 does not name its columns" in said


def test_rows_that_the_training_table_does_not_explain_are_named(work: Path) -> None:
    content = rows(20, 2)
    write(work / "odd.csv", [*content, ("0", "0", "Z", "hot")])
    write(work / "short.csv", content, ("hum", "sensor"))
    like = ("--like", "train.h5")
    for words, says in (
        (("--from", "odd.csv", *like), "odd.csv, row 21, column sensor: 'Z' is none of the texts A, B, C"),
        (("--from", "short.csv", *like), "short.csv has no column temp, which train.h5 was made of"),
        (("--from", "odd.csv", "--like", "no.h5"), "--like no.h5: no such file"),
        (("--from", "odd.csv", *like, "--target", "kind"), "--target kind is as in --like train.h5"),
    ):
        assert says in refused(work, "prepare", "table", "bad.h5", *words)
    error = refused(work, "predict", RUN, "odd.csv", "--output", "bad.h5")
    assert "prepare table NEW.h5 --from odd.csv --like train.h5" in error
    assert not list(work.glob("*bad.h5*"))


def test_codes_of_texts_are_those_of_training(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", rows(200, 0))
    codes = ("--target", "temp", "--categories", "codes", "--drop", "kind")
    done(tmp_path, "prepare", "table", "train.h5", "--from", "train.csv", *codes)
    write(tmp_path / "new.csv", [row for row in rows(50, 1) if row[2] != "A"], ("sensor", "hum"))
    done(tmp_path, "prepare", "table", "new.h5", "--from", "new.csv", "--like", "train.h5")
    with h5py.File(tmp_path / "new.h5") as file:
        assert list(file.attrs["columns"]) == ["hum", "sensor"] and set(file["test/inputs"][:, 1]) == {1.0, 2.0}


def test_an_input_is_never_replaced(work: Path) -> None:
    """Whatever --force says, by any of its names."""
    before = (work / "train.h5").read_bytes()
    (work / "link.h5").symlink_to("train.h5")
    os.link(work / "train.h5", work / "hard.h5")
    for name in ("train.h5", "link.h5", "hard.h5"):
        error = refused(work, "predict", RUN, "train.h5", "--output", name, "--force")
        assert f"--output {name} is train.h5, which is read" in error
    assert (work / "train.h5").read_bytes() == before and (work / "link.h5").is_symlink()


def test_a_file_in_place_of_a_run_is_told(work: Path) -> None:
    for words in (("predict", "train.h5", RUN, "--output", "no.h5"), ("evaluate", "train.h5")):
        assert "train.h5 is a file; RUN is a run directory" in refused(work, *words)
