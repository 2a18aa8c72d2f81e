"""What cannot be read, never ends or is no data, given to prepare and stage: one message at once, and nothing left."""

import io
import os
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
import pytest

from hpc_train.core.errors import UserError
from hpc_train.core.world import World
from hpc_train.datasets.prepare.prepare import prepare
from hpc_train.datasets.prepare.sources import Options
from hpc_train.datasets.stage import stage
from hpc_train.train.comm.context import Context
from tests import jobs
from tests.core.test_owned_files import as_nobody

ALONE = Context(World())
X, Y = np.arange(60, dtype=np.float32).reshape(20, 3), np.arange(20) % 2


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Where another user can reach it: pytest closes its own folders to all others."""
    with TemporaryDirectory(prefix="hpc-train-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def refused(folder: Path, work: Callable[[], object], *words: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as caught:
        work()
    assert all(word in str(caught.value) for word in words), caught.value
    assert sorted(folder.rglob("*")) == before, "nothing is left"


def made(folder: Path, kind: str, origin: str, **options: object) -> Callable[[], None]:
    """prepare KIND x.h5 --from ORIGIN"""
    compress = options.pop("compress", None)
    return lambda: prepare(
        kind,
        folder / origin,
        folder / "x.h5",
        ALONE,
        False,
        Options(**options),
        compress,  # type: ignore[arg-type]
    )


# ---------------------------------------------------------------------------------------------- no files


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "a FIFO": (os.mkfifo, "a FIFO"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "does not exist"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize(
    "kind, place",
    [
        ("mnist-5k", "wheel.whl"),
        ("mnist", "train-images-idx3-ubyte"),
        ("images", "pets/cat/9.jpg"),
        ("text", "texts/9.txt"),
        ("text", "alone.txt"),
        ("shakespeare", "s.tar.gz"),
        ("table", "t.csv"),
        ("table", "t.npz"),
        ("table", "t.parquet"),
    ],
)
def test_what_is_no_file_is_not_opened(tmp_path: Path, special: str, kind: str, place: str) -> None:
    make, words = SPECIAL[special]
    for name in ("pets/cat", "pets/dog", "texts"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("1.txt", "2.txt"):
        (tmp_path / "texts" / name).write_text("some words")
    make(tmp_path / place)
    options = {"target": "k"} if kind == "table" else {}
    origin = {"mnist": ".", "images": "pets"}.get(kind, place.partition("/")[0])
    refused(tmp_path, made(tmp_path, kind, origin, **options), place, words)


@pytest.mark.timeout(20)
def test_what_is_no_file_is_not_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.h5")
    refused(tmp_path, lambda: prepare("mnist-5k", None, tmp_path / "x.h5", ALONE), "is not a regular file")
    (tmp_path / "x.h5").unlink()
    (tmp_path / "x.h5").symlink_to("/dev/null")
    for overwrite in (False, True):
        refused(tmp_path, lambda: prepare("mnist-5k", None, tmp_path / "x.h5", ALONE, overwrite), "not a regular")  # noqa: B023


@pytest.mark.timeout(20)
def test_what_is_no_file_is_not_staged(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for source in (tmp_path / "fifo", "/dev/zero", "/dev/null"):
        refused(tmp_path, lambda: stage(str(source), tmp_path / "to", ALONE, 5), str(source), "none of these")  # noqa: B023
    refused(tmp_path, lambda: stage("/proc/cpuinfo", tmp_path / "to", ALONE, 5), "says that it is empty, and is not")
    (tmp_path / "data").write_text("data")
    os.mkfifo(tmp_path / "data.sha256")
    assert stage(str(tmp_path / "data"), tmp_path / "to", ALONE, 5).read_text() == "data"


# ---------------------------------------------------------------------------------------------- unreadable


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    image.init()  # another user may not read Pillow's own files here
    for name in ("cat", "dog", "dog/more"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for index in range(5):
            image.fromarray(np.full((9, 9, 3), index, np.uint8)).save(tmp_path / "pets" / name / f"{index}.png")
            (tmp_path / "pets" / name / f"{index}.txt").write_text("some words")
    tmp_path.chmod(0o777)
    return tmp_path / "pets"


@pytest.mark.parametrize("mode", [0, 0o444])  # 0444: it can be listed, and nothing in it can be looked at
@pytest.mark.parametrize("kind", ["images", "text"])
@pytest.mark.parametrize("place", [".", "dog", "dog/more", "dog/more/3"])
def test_what_may_not_be_read_is_never_left_out(pets: Path, kind: str, place: str, mode: int) -> None:
    """Of 15 pictures 10 became a data set without a word."""
    if place[-1] == "3":
        place, mode = f"{place}.{'png' if kind == 'images' else 'txt'}", 0
    (pets / place).chmod(mode)
    told = as_nobody(made(pets.parent, kind, "pets", **({"size": 8} if kind == "images" else {})))
    assert told.startswith("UserError") and str(pets / place) in told, told
    assert "Permission denied" in told and "Make it readable" in told and not list(pets.parent.glob("*x.h5*"))


@pytest.mark.parametrize("kind", ["images", "text"])
def test_links_to_folders_are_followed_once(pets: Path, kind: str) -> None:
    (pets / "dog" / "more").rename(pets.parent / "elsewhere")
    (pets / "dog" / "more").symlink_to(pets.parent / "elsewhere")
    (pets / "dog" / "again").symlink_to(".")
    for picture in () if kind == "images" else (*pets.rglob("*.png"), *pets.parent.rglob("*.png")):
        picture.unlink(missing_ok=True)
    made(pets.parent, kind, "pets", **({"size": 8, "test_fraction": 0} if kind == "images" else {}))()
    with h5py.File(pets.parent / "x.h5") as file:
        if kind == "images":
            assert file["train/targets"][:].tolist().count(1) == 10 and len(file["train/targets"]) == 15
        else:
            assert "15 documents" in file.attrs["title"]


def test_outputs_that_may_not_be_written(pets: Path) -> None:
    pets.parent.chmod(0o755)
    for picture in pets.rglob("*.png"):
        picture.unlink()
    for output in ("x.h5", "secret/x.h5", "x" * 300, "x" * 250, "pets/cat/0.txt/x.h5", "a/" * 2100 + "x"):
        (pets.parent / "secret").mkdir(mode=0o700, exist_ok=True)
        told = as_nobody(lambda: prepare("text", pets, pets.parent / output, ALONE))  # noqa: B023
        assert told.startswith("UserError") and output.partition("/")[0][:40] in told, told
        told = as_nobody(lambda: stage(str(pets / "cat/0.txt"), pets.parent / output, ALONE, 5))  # noqa: B023
        assert told.startswith("UserError") and output.partition("/")[0][:40] in told, told


def test_names_of_any_bytes(pets: Path) -> None:
    os.rename(pets / "cat", os.fsencode(pets) + b"/c\xffat")
    made(pets.parent, "images", "pets", size=8)()
    made(pets.parent, "images", "pets", size=8)()
    with h5py.File(pets.parent / "x.h5") as file:
        assert file.attrs["classes"].tolist() == [r"c\xffat", "dog"]
    for picture in pets.rglob("*.png"):
        picture.unlink()
    (pets.parent / "x.h5").unlink()
    made(pets.parent, "text", "pets")()


def test_more_names_than_an_attribute_holds(tmp_path: Path) -> None:
    np.savetxt(
        tmp_path / "t.csv", np.ones((4, 5000)), "%d", ",", header=",".join(f"c{i}" for i in range(5000)), comments=""
    )
    made(tmp_path, "table", "t.csv", target="c0", test_fraction=0)()
    with h5py.File(tmp_path / "x.h5") as file:
        assert file.attrs["columns"].startswith('["c1", "c2"')
    made(tmp_path, "table", "t.csv", target="c0", test_fraction=0)()  # it is found complete


# ---------------------------------------------------------------------------------------------- no data


def npy(shape: object, kind: str = "<f4", body: bytes = b"\0" * 64) -> bytes:
    head = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    head += b" " * (63 - (len(head) + 10) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + body


def array(values: np.ndarray) -> bytes:
    kept = io.BytesIO()
    np.save(kept, values)
    return kept.getvalue()


def archive(path: Path, *entries: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file, warnings.catch_warnings(action="ignore"):
        for name, data in entries:
            file.writestr(name, data)
    return path


TARGETS = ("targets.npy", array(Y))
ARCHIVES: dict[str, tuple[tuple[tuple[str, bytes], ...], str]] = {
    "a negative shape": ((("inputs.npy", npy((-1, 3))), TARGETS), "is truncated"),
    "an absurd shape": ((("inputs.npy", npy((2**62, 2**62))), TARGETS), "is truncated"),
    "no columns": ((("inputs.npy", npy((20, 0))), TARGETS), "has the shape"),
    "many dimensions": ((("inputs.npy", npy((20, *[1] * 40), body=bytes(80))), TARGETS), "has the shape"),
    "no numbers": ((("inputs.npy", npy((20,), "|O")), TARGETS), "is object"),
    "brackets": ((("inputs.npy", b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"(" * 9000), TARGETS), "no NumPy array"),
    "twice": ((("inputs.npy", array(X)), ("inputs.npy", array(-X)), TARGETS), "inputs.npy more than once"),
    "contradicting": ((("x.npy", array(X)), TARGETS, ("y.npy", array(1 - Y))), "targets and y, and either"),
    "two inputs": ((("x.npy", array(X)), ("data.npy", array(-X)), TARGETS), "x and data, and either could be meant"),
    "a way out": ((("train/inputs.npy", array(X)), ("train/../x.npy", array(X))), "cannot be called 'train/../x'"),
    "a folder and no folder": (
        (("train/inputs.npy", array(X)), ("train/inputs/x.npy", array(X))), "cannot be called 'train/inputs'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("compress", [None, "lzf"])
@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(tmp_path: Path, name: str, compress: str | None) -> None:
    entries, words = ARCHIVES[name]
    archive(tmp_path / "t.npz", *entries)
    refused(tmp_path, made(tmp_path, "table", "t.npz", compress=compress), words)


def test_an_archive_that_is_encrypted_or_damaged(tmp_path: Path) -> None:
    whole = archive(tmp_path / "t.npz", ("inputs.npy", array(X)), TARGETS).read_bytes()
    rng = np.random.default_rng(0)
    for number in range(300):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 1 + number % 3):
            data[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "t.npz").write_bytes(data[: len(data) - int(rng.integers(60)) * (number % 2)])
        try:
            made(tmp_path, "table", "t.npz")()
        except UserError:
            assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]
        (tmp_path / "x.h5").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "text, words",
    [
        ("a,b,a,k\n1,2,3,0\n4,5,6,1\n", "more than one column called a"),
        ("a, a ,k\n1,2,0\n4,5,1\n", "more than one column called a"),
        ("a\0,k\n1,0\n1,1\n", "a zero byte in the name of a column"),
        ("a,k\n1,0\ninf,1\n", "row 2, column a: the value is infinite"),
        ("a,k\n1,0\n-1e39,1\n", "row 2, column a: -1e+39 is too large for 32 bits"),
        ("a,k\n1,0\n1,inf\n", "row 2, column k"),
        ("a,k\n1,0\n1,1e300\n", "row 2, column k"),
    ],
)
def test_contradicting_and_infinite_cells(tmp_path: Path, text: str, words: str) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "t.csv").write_text(text)
    refused(tmp_path, made(tmp_path, "table", "t.csv", target="k", test_fraction=0), words)


def test_repeated_columns_of_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = [pa.array(X[:, 0]), pa.array(X[:, 1]), pa.array(Y)]
    parquet.write_table(pa.Table.from_arrays(columns, names=["a", "a", "k"]), tmp_path / "t.parquet")
    refused(tmp_path, made(tmp_path, "table", "t.parquet", target="k"), "more than one column called a")


def test_postscript_is_no_picture(pets: Path) -> None:
    """Pillow would have Ghostscript run what calls itself a picture."""
    (pets / "cat" / "9.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    refused(pets.parent, made(pets.parent, "images", "pets", size=8), "damaged pictures", "cat/9.jpg")


@pytest.mark.parametrize("exponent", [6, 9, 18, 30])
def test_absurd_pictures(pets: Path, exponent: int) -> None:
    for compress in (None, "lzf"):
        refused(pets.parent, made(pets.parent, "images", "pets", size=10**exponent, compress=compress), "--memory-mb")


# ---------------------------------------------------------------------------------------------- functions


NONSENSE = {
    "return None": "nothing to iterate over",
    "return 5": "nothing to iterate over",
    "return 'abc'": "sample 0 is str, no pair",
    "return {}": "no arrays",
    "return {1: [2]}": "1 is int64",
    "return {'inputs': [[1], [2, 3]], 'targets': [0, 1]}": "inputs is object",
    "return {'inputs': 5, 'targets': 5}": "inputs is int64 ()",
    "return {'other': [1]}": "holds other",
    "return {'inputs': [1], 'train/targets': [1]}": "holds inputs, train/targets",
    "yield [], 0": "sample 0 is",
    "yield [1], 2**63": "too large for 64 bits",
    "yield [[1], [2, 3]], 0": "sample 0 is object",
    "yield [1], 0; exit(0)": "ends this program (exit code 0)",
    "import sys; sys.exit()": "ends this program (exit code None)",
    "yield from ()": "the ranks' samples are nothing",
}


@pytest.mark.parametrize("body", NONSENSE)
def test_functions_that_give_nonsense(tmp_path: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"nonsense{list(NONSENSE).index(body)}"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / f"{module}.py").write_text(f"from sys import exit\ndef f():\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    refused(tmp_path, lambda: prepare(f"{module}:f", None, tmp_path / "x.h5", ALONE, False), NONSENSE[body])


def test_names_that_are_no_function_of_samples(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(needed): ...\nvalue = 5\n")
    (tmp_path / "quits.py").write_text("import sys; sys.exit(0)\n")
    for name, ranks, words in [
        ("sys:exit", 0, "Python's own"),
        ("sys:exit", 2, "Python's own"),
        ("os:abort", 0, "Python's own"),
        ("mine:f", 0, "cannot be called"),
        ("mine:value", 0, "no function value"),
        ("quits:f", 2, "ends this program"),
        (":f", 0, "is not one of"),
        ("a:b:c", 0, "is not one of"),
        ("..mine:f", 0, "is not one of"),
    ]:
        done = jobs.run(ranks, "prepare", name, "x.h5", cwd=tmp_path)
        assert done.code == 2 and words in done.err and "Traceback" not in done.err, (name, done.code, done.err)
        assert not list(tmp_path.glob("*x.h5*"))


def test_urls_that_lead_nowhere(tmp_path: Path) -> None:
    for url in (
        "ftp://",
        "ftp://host",
        "http://",
        "s3://",
        "webhdfs://",
        "zip://x",
        "reference://x",
        "://",
        "xyz://y/z",
    ):
        refused(tmp_path, lambda: stage(url, tmp_path / "to", ALONE, 2), url.partition(":")[0])  # noqa: B023
        refused(tmp_path, lambda: prepare("mnist-5k", None, url, ALONE))  # noqa: B023
    for url in ("memory://x.h5", "http://host/x.h5"):
        refused(tmp_path, lambda: prepare("mnist-5k", None, url, ALONE), "nothing can be stored there")  # noqa: B023


def test_a_namenode_that_does_not_answer_is_one_message(tmp_path: Path) -> None:
    """hdfs-native would retry for minutes. Port 1 of this machine refuses."""
    url = "hdfs://127.0.0.1:1/x.h5"
    refused(tmp_path, lambda: stage(url, tmp_path, ALONE, wait_s=60.0), "no NameNode answers at 127.0.0.1:1")
