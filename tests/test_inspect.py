"""`hpc-train data check` and `data info` on real files, whole and damaged: one message for each fault."""

import fcntl
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpc_train.train.check import check
from hpc_train.train.context import Context
from hpc_train.train.survey import Fault
from hpc_train.world import World
from tests import jobs

ALONE = Context(World())


def write(path: Path, **changes: Any) -> Path:
    """600 samples to train on and 60 to test on, of 3 classes, with checksums as `prepare` writes them, or chunks."""
    rng = np.random.default_rng(changes.pop("seed", 0))
    packed = changes.pop("packed", {})
    arrays = {
        "train/inputs": rng.random((600, 16, 16), np.float32),
        "train/targets": np.arange(600, dtype=np.int64) % 3,
        "test/inputs": rng.random((60, 16, 16), np.float32),
        "test/targets": np.arange(60, dtype=np.int64) % 3,
    }
    arrays |= {name.replace("__", "/"): np.asarray(values) for name, values in changes.items()}
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            if packed and name.endswith("inputs"):
                file.create_dataset(name, data=values, **packed)
                continue
            file.create_dataset(name, data=values)
            rows = max(1, len(values) // 6)
            sums = [zlib.crc32(values[at : at + rows].tobytes()) for at in range(0, len(values), rows)]
            sums_of = file.create_dataset(f"checksums/{name}", data=np.array(sums, np.uint32))
            sums_of.attrs.update({"block_rows": rows, "algorithm": "crc32"})
        file.attrs["complete"] = True
    return path


GZIP = {"chunks": (32, 16, 16), "compression": "gzip", "shuffle": True, "fletcher32": True}


def flip(path: Path, name: str, row: int) -> None:
    """One bit of a row, or of the chunk that holds it."""
    with h5py.File(path) as file:
        dataset = file[name]
        if dataset.chunks:
            corner = (row // dataset.chunks[0] * dataset.chunks[0], *[0] * (dataset.ndim - 1))
            info = dataset.id.get_chunk_info_by_coord(corner)
            at = info.byte_offset + info.size // 2
        else:
            at = dataset.id.get_offset() + row * dataset[0].nbytes + 1
    with path.open("r+b") as raw:
        raw.seek(at)
        byte = raw.read(1)[0]
        raw.seek(at)
        raw.write(bytes([byte ^ 16]))


def one(path: Path, *more: Path) -> Fault:
    """The one fault of files."""
    faults = check([path, *more], ALONE, quiet=True).faults
    assert len(faults) == 1, [str(fault) for fault in faults]
    return faults[0]


def changed(rows: int, at: int, value: float) -> np.ndarray:
    values = np.random.default_rng(5).random((rows, 16, 16), np.float32)
    values[at, 3, 4] = value
    return values


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize(
    "packed, words",
    [
        ({}, ["block 2", "crc32"]),
        (GZIP, ["chunk 7", ""]),
        ({"chunks": (32, 16, 16), "fletcher32": True}, ["chunk 7", "fletcher32"]),
        ({"chunks": (32, 16, 16), "compression": "lzf", "fletcher32": True}, ["chunk 7", "fletcher32"]),
        ({"chunks": (32, 8, 16), "fletcher32": True}, ["chunk 14", "fletcher32"]),
        ({"chunks": (1, 16, 16), "fletcher32": True}, ["chunk 240", "fletcher32"]),
    ],
)
def test_a_flipped_bit(tmp_path: Path, packed: dict[str, Any], words: list[str]) -> None:
    path = write(tmp_path / "data.h5", packed=packed)
    whole = check([path], ALONE, quiet=True)
    assert not whole.faults and not whole.warnings
    assert whole.datasets["train/inputs"]["samples"] == 600
    assert whole.datasets["train/targets"]["classes"] == {"0": 200, "1": 200, "2": 200}
    with h5py.File(path) as file:
        assert whole.datasets["train/inputs"]["high"] == file["train/inputs"][:].max()
    flip(path, "train/inputs", 240)
    fault = one(path)
    rows = {"block 2": (200, 299), "chunk 240": (240, 240)}.get(words[0], (224, 255))
    assert fault.kind == "damaged" and fault.dataset == "train/inputs" and fault.samples == rows
    for word in [*words, str(path), "train/inputs", "sample"]:
        assert word in str(fault)


def test_chunks_that_would_fill_the_memory_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpc_train.train.pieces._MOST_BYTES", 1000)
    path = write(tmp_path / "data.h5", packed={"chunks": (40, 8, 16), "fletcher32": True})
    whole = check([path], ALONE, quiet=True)
    assert not whole.faults and not whole.datasets["train/inputs"]["compared"]
    flip(path, "train/inputs", 45)
    assert one(path).samples == (40, 79)


def test_a_chunk_that_was_never_written(tmp_path: Path) -> None:
    path = write(tmp_path / "data.h5")
    with h5py.File(path, "r+") as file:
        del file["train/inputs"]
        lazy = file.create_dataset("train/inputs", (600, 16, 16), np.float32, chunks=(100, 16, 16))
        lazy[:300] = changed(300, 0, 0.5)
        lazy[400:] = changed(200, 0, 0.25)
    fault = one(path)
    assert (fault.number, fault.samples) == (3, (300, 399)) and "never written" in fault.what


def test_a_contiguous_data_set_that_was_never_written(tmp_path: Path) -> None:
    path = tmp_path / "data.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("train/inputs", (600, 16), np.float32)
    assert "never written" in one(path).what


def damaged_files(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """Files with one thing wrong, and what must be said of it."""
    made: dict[str, tuple[Path, list[str]]] = {}

    def add(name: str, words: list[str], **changes: Any) -> Path:
        made[name] = write(folder / f"{name}.h5", **changes), words
        return made[name][0]

    path = add("truncated", ["is truncated", "Copy or prepare it again"])
    path.write_bytes(path.read_bytes()[:-50_000])
    path = add("signature", ["is not an HDF5 file"])
    path.write_bytes(b"hello" + path.read_bytes()[5:])
    path = add("incomplete", ["was never completed"])
    with h5py.File(path, "r+") as file:
        file.attrs["complete"] = False
    path = add("external-link", ["train/more", "link to another file, elsewhere.h5"])
    with h5py.File(path, "r+") as file:
        file["train/more"] = h5py.ExternalLink("elsewhere.h5", "inputs")
    path = add("external-values", ["train/raw", "other files", "raw.bin"])
    with h5py.File(path, "r+") as file:
        file.create_dataset("train/raw", (8,), np.uint8, external=[(folder / "raw.bin", 0, 8)])
    path = add("virtual", ["train/joined", "part-0.h5", "does not exist"])
    with h5py.File(path, "r+") as file:
        layout = h5py.VirtualLayout((600,), np.int64)
        layout[:] = h5py.VirtualSource("part-0.h5", "targets", (600,))
        file.create_virtual_dataset("train/joined", layout)
    add("nan", ["1 NaN in 1 sample", "block 1", "sample 123:"], train__inputs=changed(600, 123, np.nan))
    add("infinite", ["1 infinite", "block 5", "sample 599:"], train__inputs=changed(600, 599, np.inf))
    add("unequal", ["train/targets: has 599 rows", "train/inputs has 600"], train__targets=np.arange(599) % 3)
    labels = np.arange(600) % 3
    labels[[4, 9]] = -1
    add("negative", ["2 negative labels (-1)", "block 0, samples 4 to 9:"], train__targets=labels)
    add(
        "unknown-label",
        ["no sample of train/targets has its label 7"],
        test__targets=np.array([7] + [0, 1, 2] * 19 + [0, 1]),
    )
    rng = np.random.default_rng(0).random((600, 16, 16), np.float32)
    add(
        "leakage",
        ["3 of 60 samples are in train/inputs, too", "first is sample 0, equal to sample 5 there"],
        test__inputs=np.concatenate([rng[5:8], changed(57, 0, 0.5)]),
    )
    add("constant", ["every value is 0.5"], train__inputs=np.full((600, 16, 16), 0.5, np.float32))
    add("all-equal", ["all samples are equal"], train__inputs=np.repeat(changed(1, 0, 0.5), 600, axis=0))
    path = add("vocabulary", ["3 tokens out of the vocabulary (300, 400)", "0 to 255"])
    with h5py.File(path, "w") as file:
        file["train/inputs"] = np.array([1, 2, 300, 255, 400, 300])
        file.attrs["vocab_size"] = 256
    path = add("offsets", ["train/inputs_offsets", "ends with 6, and train/inputs has 7 rows"])
    with h5py.File(path, "w") as file:
        file["train/inputs"], file["train/inputs_offsets"] = np.arange(7), np.array([0, 3, 6])
    path = add("falling-offsets", ["train/inputs_offsets: sample 2: is 2: beginnings rise"])
    with h5py.File(path, "w") as file:
        file["train/inputs"], file["train/inputs_offsets"] = np.arange(7), np.array([0, 3, 2, 7])
    path = add(
        "filter",
        ["lzf (number 32099)", "not installed", "pip install hdf5plugin"],
        packed={"chunks": (32, 16, 16), "compression": "lzf"},
    )
    lzf, unknown = (number.to_bytes(2, "little") + b"\x08\0" for number in (32000, 32099))  # and its name's length
    path.write_bytes(path.read_bytes().replace(lzf, unknown, 1))
    return made


def test_each_fault_has_one_message(tmp_path: Path) -> None:
    for name, (path, words) in damaged_files(tmp_path).items():
        fault = str(one(path))
        assert all(word in fault for word in [*words, str(path)]), (name, fault)


def test_files_that_disagree(tmp_path: Path) -> None:
    first = write(tmp_path / "part-0.h5")
    second = write(tmp_path / "part-1.h5", seed=1)
    assert not check([first, second], ALONE, quiet=True).faults
    float64 = write(tmp_path / "float64.h5", seed=2, train__inputs=np.random.default_rng(3).random((600, 16, 16)))
    assert "float64 (n, 16, 16) here and float32 (n, 16, 16)" in one(first, float64).what.replace("is ", "")
    shape = write(
        tmp_path / "shape.h5", seed=2, train__inputs=np.random.default_rng(3).random((600, 8, 16), np.float32)
    )
    assert "(n, 8, 16)" in one(first, shape).what
    more = write(tmp_path / "more.h5", seed=2, train__weights=np.random.default_rng(3).random(600))
    assert "more.h5" in str(one(first, more)) and "train/weights" in str(one(first, more))
