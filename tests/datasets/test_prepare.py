"""What `hpc-train prepare` makes of pictures, tables and a user's samples, in bounded memory and after a kill."""

import json
import os
import resource
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import h5py
import numpy as np
import pytest

from hpc_train.core.errors import UserError
from hpc_train.core.world import World
from hpc_train.datasets.prepare.prepare import prepare
from hpc_train.datasets.prepare.sources import Options, in_memory
from hpc_train.datasets.prepare.train_test_split import train_test_split
from hpc_train.train.comm.context import Context
from tests import jobs

ALONE = Context(World())


def contents(path: Path) -> dict[str, tuple[str, bytes]]:
    found: dict[str, tuple[str, bytes]] = {}
    with h5py.File(path) as file:
        assert file.attrs["complete"]
        file.visititems(
            lambda name, item: (
                found.update({name: (str(item.dtype), item[:].tobytes())}) if isinstance(item, h5py.Dataset) else None
            )
        )
    return found


def table_of(path: Path, name: str = "out.h5", **options: object) -> Path:
    output = path.with_name(name)
    prepare("table", path, output, ALONE, options=Options(**options))
    return output


# ---------------------------------------------------------------------------------------------- pictures


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Twelve pictures of two classes, in several modes and shapes; the left half of each tells its class."""
    image = pytest.importorskip("PIL.Image")
    for label, name in enumerate(("cat", "dog")):
        folder = tmp_path / "pets" / name
        folder.mkdir(parents=True)
        for index in range(6):
            values = np.full((40 + 10 * index, 60, 3), 40 + 150 * label, np.uint8)
            picture = image.fromarray(values)
            picture = picture.convert(("RGB", "L", "P", "RGBA", "CMYK", "RGB")[index])
            picture.save(folder / f"{index}.{'jpg' if index in (0, 1, 4) else 'png'}")
        (folder / "notes.txt").write_text("no picture")
    return tmp_path / "pets"


def test_a_class_a_folder(pets: Path) -> None:
    output = pets.parent / "pets.h5"
    prepare("images", pets, output, ALONE, options=Options(size=32, test_fraction=0.25))
    with h5py.File(output) as file:
        assert file.attrs["classes"].tolist() == ["cat", "dog"] and file.attrs["num_classes"] == 2
        assert file.attrs["num_rows"] == 12 and file["train"].attrs["num_rows"] == 9
        for part, num in (("train", 9), ("test", 3)):
            x, y = file[f"{part}/inputs"], file[f"{part}/targets"][:]
            assert x.shape == (num, 32, 32, 3) and x.dtype == np.uint8 and y.dtype == np.int64
            assert np.abs(x[:].mean(axis=(1, 2, 3)) - (40 + 150 * y)).max() < 15
        x, sums = file["train/inputs"], file["checksums/train/inputs"]
        assert sums.attrs["algorithm"] == "crc32" and sums.attrs["block_rows"] == (4 << 20) // (32 * 32 * 3)
        assert sums[:].tolist() == [zlib.crc32(x[:].tobytes())] and x.id.get_offset() is not None
    before = output.stat().st_mtime_ns
    prepare("images", pets, output, ALONE, options=Options(size=32, test_fraction=0.25))
    assert output.stat().st_mtime_ns == before


def test_folders_train_and_test_are_the_parts(pets: Path) -> None:
    (pets / "train").mkdir()
    (pets / "cat").rename(pets / "train" / "cat")
    (pets / "dog").rename(pets / "train" / "dog")
    (pets / "test" / "dog").mkdir(parents=True)
    (pets / "train" / "dog" / "0.jpg").rename(pets / "test" / "dog" / "0.jpg")
    prepare("images", pets, pets / "out.h5", ALONE, options=Options(size=8))
    with h5py.File(pets / "out.h5") as file:
        assert len(file["train/inputs"]) == 11 and file["test/targets"][:].tolist() == [1]


def test_damaged_pictures_are_named(pets: Path) -> None:
    whole = (pets / "cat" / "0.jpg").read_bytes()
    (pets / "cat" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    (pets / "dog" / "3.png").write_text("no picture")
    with pytest.raises(UserError, match="damaged pictures") as caught:
        prepare("images", pets, pets.parent / "out.h5", ALONE, options=Options(size=8))
    assert "cat/0.jpg (" in str(caught.value) and "dog/3.png (" in str(caught.value)
    assert not list(pets.parent.glob(".*")) and not list(pets.parent.glob("*.h5"))


# ---------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("every, num", [(2, 1), (2, 9), (10, 100), (10, 1003), (20, 7), (0, 5)])
def test_rows_held_out(every: int, num: int) -> None:
    split = train_test_split(num, 1 / every if every else 0)
    parts = split.split(in_memory(np.arange(num)), "x", max_rows=3)
    rows = {part: split.rows_of(part, 0, split.num_rows_of(part)) for part in ("train", "test")}
    assert sorted([*rows["train"], *rows["test"]]) == list(range(num))
    assert all(np.all(np.diff(of_part) > 0) for of_part in rows.values())
    strata = rows["test"] // every if every else []
    assert list(strata) == list(range(len(strata))), "one in each stratum, but for the last, which may have none"
    for part, expected in rows.items():
        if not len(expected):
            assert f"{part}/x" not in parts
            continue
        array = parts[f"{part}/x"]
        assert array.shape == expected.shape and array.read(0, len(expected)).tolist() == expected.tolist()
        for start in range(0, len(expected), 5):
            stop = min(start + 7, len(expected))
            assert array.read(start, stop).tolist() == expected[start:stop].tolist()
    if num >= 100:
        assert abs(len(rows["test"]) / num - 1 / every) < 0.02 and len(set(rows["test"] % every)) > 5


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(30_000, 4)).astype(np.float32)
    table[:, 2] = rng.integers(0, 7, len(table))
    return table


def write_csv(path: Path, values: np.ndarray) -> Path:
    lines = [f"{a:.9g},{b:.9g},{c:.0f},{d:.9g}\n" for a, b, c, d in values.tolist()]
    path.write_text("a,b,kind,d\n" + "".join(lines))
    return path


def test_the_same_table_in_every_format(tmp_path: Path, values: np.ndarray) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    x, y = np.delete(values, 2, axis=1), values[:, 2].astype(np.int64)
    np.savez(tmp_path / "plain.npz", inputs=x, targets=y)
    np.savez_compressed(tmp_path / "packed.npz", a=x, kind=y)
    np.save(tmp_path / "t.npy", values)
    columns = {"a": x[:, 0], "b": x[:, 1], "kind": y.astype(np.int16), "d": x[:, 2]}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=7000)
    made = [
        table_of(write_csv(tmp_path / "t.csv", values), "csv.h5", target="kind"),
        table_of(tmp_path / "t.parquet", "parquet.h5", target="kind"),
        table_of(tmp_path / "plain.npz", "plain.h5"),
        table_of(tmp_path / "packed.npz", "packed.h5", target="kind"),
        table_of(tmp_path / "t.npy", "npy.h5", target="2"),
    ]
    first = contents(made[0])
    assert all(contents(each) == first for each in made)
    split = train_test_split(len(values), None)
    train, test = (split.rows_of(part, 0, split.num_rows_of(part)) for part in ("train", "test"))
    with h5py.File(made[0]) as file:
        assert np.array_equal(file["train/inputs"][:], x[train]) and np.array_equal(file["test/targets"][:], y[test])
        assert file.attrs["columns"].tolist() == ["a", "b", "d"] and file.attrs["target"] == "kind"


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_either_byte_order_is_read(tmp_path: Path, values: np.ndarray, ending: str, order: str) -> None:
    x = values[:50].astype(f"{order}f4")
    if ending == "npy":
        np.save(tmp_path / "t.npy", x)
    else:
        np.savez(tmp_path / "t.npz", inputs=np.delete(x, 2, axis=1), targets=x[:, 2])
    output = table_of(tmp_path / f"t.{ending}", target="2" if ending == "npy" else None, test_fraction=0)
    with h5py.File(output) as file:
        assert np.array_equal(file["train/inputs"][:], np.delete(values[:50], 2, axis=1))
        assert np.array_equal(file["train/targets"][:], values[:50, 2])


@pytest.mark.parametrize(
    "row, column, cell, words",
    [
        (20_001, 0, "many", "row 20001, column a: 'many' is no number"),
        (3, 3, "", "row 3, column d: the value is missing"),
        (29_999, 2, "", "row 29999, column kind: the value is missing"),
        (12_345, 2, "2.5", "row 12345, column kind: the target 2.5 is no whole number"),
    ],
)
def test_a_bad_cell_is_named(tmp_path: Path, values: np.ndarray, row: int, column: int, cell: str, words: str) -> None:
    pytest.importorskip("pyarrow")
    path = write_csv(tmp_path / "t.csv", values)
    lines = path.read_text().splitlines()
    cells = lines[row].split(",")
    cells[column] = cell
    lines[row] = ",".join(cells)
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"no number|missing|whole") as caught:
        table_of(path, target="kind")
    assert f"{path}, {words}" in str(caught.value)


def test_tables_that_cannot_be(tmp_path: Path, values: np.ndarray) -> None:
    pytest.importorskip("pyarrow")
    path = write_csv(tmp_path / "t.csv", values)
    np.savez(tmp_path / "a.npz", inputs=values, targets=np.zeros(3, np.int64))
    np.savez(tmp_path / "o.npz", inputs=np.array([{}], object), targets=np.zeros(1, np.int64))
    np.save(tmp_path / "cut.npy", values)
    os.truncate(tmp_path / "cut.npy", 300_000)
    (tmp_path / "bare.csv").write_text("1,2\n3,4\n")
    (tmp_path / "bad.parquet").write_text("PAR1")
    (tmp_path / "short.csv").write_text("a,b\n1,2\n3\n")
    for name, options, words in [
        ("t.csv", {"target": "sort"}, "--target sort is no column"),
        ("t.csv", {"target": "kind", "test_fraction": 0.3}, "one in a whole number of rows"),
        ("t.csv", {"target": "kind", "size": 3}, "--size 3 is not for it"),
        ("a.npz", {}, "inputs has 30000 rows, targets has 3 rows"),
        ("o.npz", {}, "inputs.npy is object"),
        ("cut.npy", {"target": "2"}, "is truncated"),
        ("bare.csv", {"target": "1"}, "has no header"),
        ("bad.parquet", {"target": "1"}, "cannot be read"),
        ("short.csv", {"target": "a", "test_fraction": 0}, "row 2"),
        ("none.csv", {"target": "1"}, "does not exist"),
    ]:
        with pytest.raises(UserError) as caught:
            table_of(tmp_path / name, **options)
        assert words in str(caught.value), caught.value
    assert path.exists() and not list(tmp_path.glob("*.h5")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("compress", ["gzip:4", "lzf", "zstd:3"])
def test_compressed_chunks(tmp_path: Path, values: np.ndarray, compress: str) -> None:
    if compress.startswith("zstd"):
        pytest.importorskip("hdf5plugin")
    np.savez(tmp_path / "t.npz", inputs=np.repeat(values, 4, axis=0), targets=np.arange(4 * len(values)))
    prepare("table", tmp_path / "t.npz", tmp_path / "plain.h5", ALONE)
    prepare("table", tmp_path / "t.npz", tmp_path / "packed.h5", ALONE, compress=compress)
    plain, packed = contents(tmp_path / "plain.h5"), contents(tmp_path / "packed.h5")
    assert packed == {name: each for name, each in plain.items() if not name.startswith("checksums")}
    with h5py.File(tmp_path / "packed.h5") as file:
        x = file["train/inputs"]
        assert x.chunks == ((1 << 20) // 16, 4) and x.shuffle and x.fletcher32 and file.attrs["layout"] == compress
        filters = x.id.get_create_plist()
        assert [filters.get_filter(i)[0] for i in (0, 2)] == [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32]


def test_compression_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for compress, words in [("gzip:12", "the level is 1 to 9"), ("best", "no such compression"), ("lzf:3", "no such")]:
        with pytest.raises(UserError, match=words):
            prepare("mnist-5k", None, tmp_path / "x.h5", ALONE, compress=compress)
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with pytest.raises(UserError, match="filter zstd, in the package hdf5plugin"):
        prepare("mnist-5k", None, tmp_path / "x.h5", ALONE, compress="zstd:3")


# ---------------------------------------------------------------------------------------------- a user's samples

SAMPLES = """
import numpy as np

def endless():
    for i in range(2500):
        yield np.full((3, 2), i, np.int16), i % 5

def shares(rank, size):
    for i in range(2500 * rank // size, 2500 * (rank + 1) // size):
        yield np.full((3, 2), i, np.int16), i % 5

def arrays():
    return {"inputs": np.repeat(np.arange(2500, dtype=np.int16), 6).reshape(-1, 3, 2), "targets": np.arange(2500) % 5}

def odd():
    yield np.zeros(3), 0
    yield np.zeros(4), 0

def words():
    yield "a", "b"

def fails():
    yield np.zeros(3), 0
    raise RuntimeError("the detector is off")
"""


def test_a_function_of_samples(tmp_path: Path) -> None:
    (tmp_path / "mydata.py").write_text(SAMPLES)
    for name, ranks in (("arrays", 0), ("endless", 0), ("shares", 0), ("endless", 3), ("shares", 2)):
        done = jobs.run(ranks, "prepare", f"mydata:{name}", f"{name}{ranks}.h5", "--test-fraction", "0.2", cwd=tmp_path)
        assert done.code == 0, done.err
        assert contents(tmp_path / f"{name}{ranks}.h5") == contents(tmp_path / "arrays0.h5")
    again = jobs.run(0, "prepare", "mydata:endless", "endless0.h5", cwd=tmp_path)
    assert "is complete: Samples of mydata:endless" in again.out and not list(tmp_path.glob(".*"))
    for name, words in [
        ("odd", "sample 1 is"),
        ("words", "sample 0 is"),
        ("none", "has no function none"),
        ("fails", "the detector is off"),
    ]:
        done = jobs.run(0, "prepare", f"mydata:{name}", "x.h5", cwd=tmp_path)
        assert done.code and words in done.err, done.err
    assert not list(tmp_path.glob("x.h5")) and not list(tmp_path.glob(".*"))


REALS = """
import numpy as np

def fields():
    for row in range(40):
        yield np.full((3, 2), row, "f4"), np.array([row / 2, -row, 0.25])

def numbers():
    for row in range(40):
        yield [row], row / 2

def mixed():
    yield [0], 1
    yield [0], 0.5
"""


def test_a_function_gives_real_targets_one_or_several(tmp_path: Path) -> None:
    (tmp_path / "reals.py").write_text(REALS)
    rows = np.arange(40)
    for name, wanted in (("fields", np.stack([rows / 2, -rows, 0 * rows + 0.25], 1)), ("numbers", rows / 2)):
        for ranks in (0, 2):
            done = jobs.run(
                ranks, "prepare", f"reals:{name}", "a.h5", "--test-fraction", "0", "--overwrite", cwd=tmp_path
            )
            assert done.code == 0, done.err
            with h5py.File(tmp_path / "a.h5") as file:
                assert file["train/targets"].dtype == np.float32
                assert np.array_equal(file["train/targets"][:], wanted.astype("f4"))
    done = jobs.run(0, "prepare", "reals:mixed", "b.h5", cwd=tmp_path)
    assert (
        done.code == 2
        and "sample 1 is <i8 [1] with targets <f4 [], those before <i8 [1] with targets <i8 []" in done.err
    )


# ---------------------------------------------------------------------------------------------- memory, kills, room


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 300 MB."""
    path = tmp_path_factory.mktemp("big") / "big.npz"
    inputs = np.random.default_rng(0).integers(0, 250, (100_000, 3000), np.uint8)
    np.savez(path, inputs=inputs, targets=np.arange(100_000))
    return path


PEAK = """
import resource, sys
from hpc_train.cli.main import main
import hpc_train.datasets.prepare.prepare

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    main()
finally:
    print("grew_mb", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("compress", [[], ["--compress", "lzf"]], ids=["contiguous", "lzf"])
def test_memory_stays_within_the_budget(big: Path, compress: list[str]) -> None:
    words = ["prepare", "table", "out.h5", "--from", big.name, "--memory-mb", "64", "--overwrite", *compress]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *words],
        cwd=big.parent,
        env=jobs.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    grew_mb = float(done.stdout.split("grew_mb")[1])
    assert grew_mb < 64, done.stdout
    assert (big.parent / "out.h5").stat().st_size > (280 << 20 if not compress else 0)


def ranks_of(pid: int) -> list[int]:
    """The processes that do the work: mpirun's children, or the process itself."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(each) for each in children] or [pid]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# The rounds of milliseconds that are left after the last look at the journal would be over before the kill. A killed
# rank's job lives on for two seconds, until mpirun ends it: what its root has to do alone, it does.
SLOW = """
import sys
from random import uniform
from time import sleep
from hpc_train.cli.main import main
from hpc_train.datasets.prepare import writer

def slow(function):
    def slowed(*args):
        sleep(uniform(0, 0.05))
        function(*args)
        sleep(uniform(0, 0.05))
    return slowed

writer.write_rows, writer._write_chunks = slow(writer.write_rows), slow(writer._write_chunks)
main()
"""

_LZF = ["--compress", "lzf"]


@pytest.mark.parametrize(
    "ranks, compress",
    [
        (2, []),
        pytest.param(0, [], marks=pytest.mark.slow),
        pytest.param(0, _LZF, marks=pytest.mark.slow),
        pytest.param(2, _LZF, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment_it_ends_the_same(big: Path, ranks: int, compress: list[str]) -> None:
    folder, name = big.parent, f"killed-{ranks}{'-lzf' if compress else ''}.h5"
    words = ["prepare", "table", name, "--from", big.name, "--memory-mb", "16", *compress]
    whole = jobs.run(0, *["whole.h5" if word == name else word for word in words], "--overwrite", cwd=folder)
    assert whole.code == 0, whole.err
    (folder / "slow.py").write_text(SLOW)
    line = [*jobs.command(ranks, "")[:-2], str(jobs.HPC_TRAIN.with_name("python")), "slow.py", *words]
    journal, num_resumed = folder / f".{name}.journal", 0
    for lines in (0, 3, 3) if ranks and compress else (0, 3, 20, 30):  # chunks are noted eight rounds at a time
        enough = lines + (len(journal.read_text().splitlines()) if journal.exists() else 0)
        job = subprocess.Popen(
            line, cwd=folder, env=jobs.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        until = monotonic() + 60
        while monotonic() < until and job.poll() is None:
            if journal.exists() and len(journal.read_text().splitlines()) > enough:
                break
            sleep(0.001)
        assert job.poll() is None, job.communicate()
        pids = ranks_of(job.pid)
        os.kill(pids[-1], signal.SIGKILL)
        out = job.communicate(timeout=60)[0]
        while any(map(is_running, pids)):
            sleep(0.01)
        num_resumed += "resuming, " in out
        assert (folder / f".{name}.partial").exists() and not (folder / name).exists(), out
    entries = [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]
    num_blocks = sum(len(entry.get("crc32", [])) for entry in entries)
    done = jobs.run(ranks, *words, cwd=folder)
    assert done.code == 0, done.err
    assert num_resumed >= (1 if ranks and compress else 2), done.out
    assert f"{num_blocks} of " in done.out or compress, done.out
    assert contents(folder / name) == contents(folder / "whole.h5")
    assert not list(folder.glob(".*"))


def test_another_partial_is_written_again_and_said_so(tmp_path: Path, values: np.ndarray) -> None:
    np.savez(tmp_path / "t.npz", inputs=values, targets=np.arange(len(values)))
    words = ["prepare", "table", "t.h5", "--from", "t.npz"]
    (tmp_path / ".t.h5.partial").write_bytes(b"old")
    done = jobs.run(0, *words, cwd=tmp_path)
    assert done.code == 0 and ".t.h5.partial is written again: it has no journal" in done.out
    (tmp_path / "t.h5").rename(tmp_path / ".t.h5.partial")
    (tmp_path / ".t.h5.journal").write_text('{"title": "another"}\n')
    done = jobs.run(0, *words, cwd=tmp_path)
    assert done.code == 0 and "is written again: its source or its command is another" in done.out


def test_a_full_disk_is_told(big: Path) -> None:
    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 20, 100 << 20))

    done = subprocess.run(
        jobs.command(0, "prepare", "table", "full.h5", "--from", big.name),
        cwd=big.parent,
        env=jobs.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=small,
    )
    assert done.returncode == 2 and "full.h5 cannot be written" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(big.parent.glob("*full*"))


_GZIP = ["--compress", "gzip:4"]


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("compress", [[], _GZIP], ids=["contiguous", "gzip"])
@pytest.mark.parametrize("kind", ["mnist-5k", "images", "text", "table", "samples"])
def test_a_disk_that_fills_up_is_one_message(
    tmp_path: Path, disk_of: Callable[[str], Path], kind: str, compress: list[str], ranks: int
) -> None:
    """HDF5 (1.10.8) that cannot write while it flushes or closes a file ends by signal 11."""
    if ranks and kind not in ("mnist-5k", "samples"):
        pytest.skip("by two ranks all are written alike")
    words = {
        "mnist-5k": ["mnist-5k"],
        "images": ["images", "--from", "pictures", "--size", "96"],
        "text": ["text", "--from", "texts"],
        "table": ["table", "--from", "t.npz"],
        "samples": ["noise:samples"],
    }[kind]
    noise = np.random.default_rng(0).integers(0, 256, (40, 32_000), np.uint8)
    if kind == "images":
        image = pytest.importorskip("PIL.Image")
        for index, values in enumerate(noise):
            (tmp_path / "pictures" / str(index % 2)).mkdir(parents=True, exist_ok=True)
            picture = image.fromarray(values[:27_648].reshape(96, 96, 3))
            picture.save(tmp_path / "pictures" / str(index % 2) / f"{index}.png")
    (tmp_path / "texts").mkdir()
    for index, values in enumerate(noise):
        (tmp_path / "texts" / str(index)).write_bytes(np.maximum(values, 1).tobytes())
    np.savez(tmp_path / "t.npz", inputs=noise, targets=np.arange(40))
    (tmp_path / "noise.py").write_text(
        "import numpy as np\n"
        "def samples():\n"
        "    for row in np.random.default_rng(0).integers(0, 256, (40, 32_000), np.uint8):\n"
        "        yield row, 1\n"
    )
    for size in ("64k", "700k") if kind == "mnist-5k" else ("700k",):
        disk = disk_of(size)
        done = jobs.run(ranks, "prepare", words[0], disk / "x.h5", *words[1:], *compress, cwd=tmp_path)
        assert done.code == 2 and done.err.count("hpc-train: ") == 1 and done.out == "", (done.code, done.err)
        assert "x.h5" in done.err and "cannot be written: No space left on device" in done.err, done.err
        assert "Traceback" not in done.err and not list(disk.iterdir()), "nothing is left half-written"


def test_a_disk_that_fills_up_at_any_moment(digits: Path, tmp_path: Path, disk_of: Callable[[str], Path]) -> None:
    """Up to the last bytes: the checksums and attributes of a file whose rows are all there."""
    codes = []
    for kib in range(3_836, 3_868, 8):
        disk = disk_of(f"{kib}k")
        done = jobs.run(0, "prepare", "mnist-5k", disk / "x.h5", cwd=tmp_path)
        codes.append(done.code)
        assert done.code in (0, 2) and "Traceback" not in done.err, done.err
        assert [path.name for path in disk.iterdir()] == ["x.h5"] * (done.code == 0)
        if done.code == 0:
            assert contents(disk / "x.h5") == contents(digits)
    assert codes == sorted(codes, reverse=True) and set(codes) == {0, 2}


def test_real_targets_stay_real(tmp_path: Path) -> None:
    """In a CSV file and in NumPy's, of one column or several."""
    pytest.importorskip("pyarrow")
    rng = np.random.default_rng(0)
    rows, several = rng.random((60, 3)).round(3), rng.random((60, 2), np.float32)
    lines = [",".join(map(str, row)) for row in rows]
    (tmp_path / "t.csv").write_text("\n".join(["a,b,c", *lines]))
    np.savez(tmp_path / "t.npz", inputs=rows, targets=several)
    with h5py.File(table_of(tmp_path / "t.csv", target="c", test_fraction=0)) as file:
        assert file["train/targets"].dtype == np.float32
        assert np.allclose(file["train/targets"][:], rows[:, 2]) and file["train/inputs"].shape == (60, 2)
    with h5py.File(table_of(tmp_path / "t.npz", "npz.h5", target=None, test_fraction=0)) as file:
        assert np.array_equal(file["train/targets"][:], several)
    np.save(tmp_path / "t.npy", rows)
    with h5py.File(table_of(tmp_path / "t.npy", "npy.h5", target="2", test_fraction=0)) as file:
        assert np.array_equal(file["train/targets"][:], rows[:, 2])
