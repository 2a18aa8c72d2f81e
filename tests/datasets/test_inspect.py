"""`hpc-train data check` and `data info` on real files, whole and damaged: one message for each fault."""

import fcntl
import json
import subprocess
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpc_train.core.filesystem import stripe_count
from hpc_train.core.world import World
from hpc_train.datasets.inspect.advice import Advice, of_dataset, of_file
from hpc_train.datasets.inspect.check import check
from hpc_train.datasets.inspect.faults import Fault
from hpc_train.datasets.inspect.info import inform
from hpc_train.datasets.inspect.structure import read_structure
from hpc_train.train.comm.context import Context
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
        (
            {"chunks": (32, 16, 16), "compression": 32015, "shuffle": True, "fletcher32": True},
            ["chunk 7", "fletcher32"],
        ),
        ({"chunks": (32, 8, 16), "fletcher32": True}, ["chunk 14", "fletcher32"]),
        ({"chunks": (1, 16, 16), "fletcher32": True}, ["chunk 240", "fletcher32"]),
    ],
)
def test_a_flipped_bit(tmp_path: Path, packed: dict[str, Any], words: list[str]) -> None:
    if packed.get("compression") == 32015:
        pytest.importorskip("hdf5plugin", exc_type=ImportError)
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
    monkeypatch.setattr("hpc_train.datasets.inspect.chunk_ranges._MAX_CHUNK_ROW_BYTES", 1000)
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
    path = add("falling-offsets", ["train/inputs_offsets: sample 2: is 2: offsets rise"])
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


def test_unreadable_targets_accuse_no_other_part(tmp_path: Path) -> None:
    """The labels that only the unreadable part holds are not missing in the data to train on."""
    path = write(tmp_path / "part-0.h5", train__targets=np.repeat([0, 1, 2], 200))
    for row in (250, 350):  # the blocks of all samples of class 1
        flip(path, "train/targets", row)
    checked = check([path], ALONE, quiet=True)
    assert [(fault.kind, fault.dataset, fault.number) for fault in checked.faults] == [
        ("damaged", "train/targets", 2),
        ("damaged", "train/targets", 3),
    ]
    assert not checked.warnings, "half of the labels say nothing about empty or rare classes"
    write(path, train__targets=np.arange(600) % 2)
    assert [fault.kind for fault in check([path], ALONE, quiet=True).faults] == ["out of range"]
    cut = write(tmp_path / "part-1.h5", seed=1)
    cut.write_bytes(cut.read_bytes()[:-50_000])
    assert one(path, cut).kind == "unreadable"


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


# ------------------------------------------------------------------------------------------------ warnings


def test_copies_rare_and_empty_classes_and_constant_samples_are_warnings(tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).random((600, 16, 16), np.float32)
    inputs[[7, 8]], inputs[20] = inputs[3], 0.5
    labels = np.repeat([0, 1, 3], 200)
    labels[0] = 2
    labels[1] = 5
    path = write(tmp_path / "data.h5", train__inputs=inputs, train__targets=labels)
    checked = check([path], ALONE, quiet=True)
    assert not checked.faults
    said = "\n".join(str(warning) for warning in checked.warnings)
    assert "2 of 600 samples are copies of another: the first is sample 7, equal to sample 3" in said
    assert "1 of 600 samples are of one value throughout" in said
    assert "train/targets: 1 of 6 classes have no sample: 4" in said
    assert "2 of 6 classes are rare (the median class has 198 samples): 2 (1), 5 (1)" in said
    assert checked.datasets["train/inputs"]["equal_to"] == {"train/inputs": 2}
    assert jobs.run(0, "data", "check", path, cwd=tmp_path).code == 0
    assert jobs.run(0, "data", "check", "--strict", path, cwd=tmp_path).code == 1


def test_more_samples_than_memory_may_hold_are_counted_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpc_train.datasets.inspect.duplicates._MAX_HASHES", 200)
    inputs = np.random.default_rng(0).random((300, 16, 16), np.float32)
    path = write(tmp_path / "data.h5", train__inputs=np.concatenate([inputs, inputs]))
    num = check([path], ALONE, quiet=True).datasets["train/inputs"]["equal_to"]["train/inputs"]
    assert num % 4 == 0 and 150 < num < 450, "an estimate of 300"


# ------------------------------------------------------------------------------------------------ the commands


def test_check_says_the_same_at_any_number_of_ranks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0).random((600, 16, 16), np.float32)
    test = np.concatenate([rng[5:8], changed(57, 2, np.nan)])
    for number, packed in enumerate([{}, GZIP]):
        write(tmp_path / f"part-{number}.h5", packed=packed, train__inputs=rng + np.float32(number), test__inputs=test)
    flip(tmp_path / "part-0.h5", "train/inputs", 590)
    flip(tmp_path / "part-1.h5", "train/inputs", 33)
    found = []
    for ranks in (0, 2):
        done = jobs.run(ranks, "data", "check", "--json", "part-*.h5", cwd=tmp_path)
        assert done.code == 1, done.err
        checked = json.loads(done.out)
        assert checked.pop("num_ranks") == max(1, ranks) and checked.pop("seconds") > 0
        found.append(checked)
    assert found[0] == found[1]
    kinds = {(fault["kind"], fault["file"], fault["unit"], fault["number"]) for fault in found[0]["faults"]}
    assert ("damaged", "part-0.h5", "block", 5) in kinds and ("damaged", "part-1.h5", "chunk", 1) in kinds
    assert ("not finite", "part-0.h5", "block", 0) in kinds and ("leakage", "part-0.h5 and 1 more", "", None) in kinds
    told = jobs.run(0, "data", "check", "part-0.h5 part-1.h5", cwd=tmp_path)
    assert told.code == 1 and "2 files, part-0.h5 the first" in told.out and "Traceback" not in told.err
    assert told.out.count("block 5, samples 500 to 599: its checksum (crc32) differs") == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere.h5"], "nowhere.h5 does not exist"),
        (["part-*.h5"], "part-*.h5 matches no file"),
        (["."], ". is a folder"),
    ],
)
@pytest.mark.parametrize("command", ["check", "info"])
def test_what_is_no_file(tmp_path: Path, words: list[str], message: str, command: str) -> None:
    done = jobs.run(0, "data", command, *words, cwd=tmp_path)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err and not done.out


def test_a_file_that_another_program_writes_is_not_called_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "data.h5")
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = jobs.run(0, "data", "check", path, cwd=tmp_path)
        assert (
            done.code == 2
            and "another program has it open for writing" in done.err
            and "HDF5_USE_FILE_LOCKING=FALSE" in done.err
        )
        assert jobs.run(0, "data", "check", path, cwd=tmp_path, HDF5_USE_FILE_LOCKING="FALSE").code == 0


def test_a_file_system_that_refuses_locks(tmp_path: Path) -> None:
    """A library put before the system's own refuses as such a file system does."""
    code = "#include <errno.h>\nint flock(int file, int what) { (void)file; (void)what; errno = ENOLCK; return -1; }\n"
    (tmp_path / "flock.c").write_text(code)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "flock.so", "flock.c"], cwd=tmp_path, check=True, timeout=60)
    path, refuse = write(tmp_path / "data.h5"), str(tmp_path / "flock.so")
    done = jobs.run(0, "data", "info", path, cwd=tmp_path, LD_PRELOAD=refuse)
    assert done.code == 2 and "data.h5 cannot be locked" in done.err and "No locks available" in done.err
    assert "set HDF5_USE_FILE_LOCKING=FALSE" in done.err
    done = jobs.run(0, "data", "check", path, cwd=tmp_path, LD_PRELOAD=refuse, HDF5_USE_FILE_LOCKING="FALSE")
    assert done.code == 0, done.err


def test_a_virtual_data_set_is_read_through_its_files(tmp_path: Path) -> None:
    layout = h5py.VirtualLayout((1200, 16, 16), np.float32)
    for number in range(2):
        write(tmp_path / f"part-{number}.h5", seed=number, train__inputs=changed(600, 9, np.nan) + np.float32(number))
        layout[600 * number : 600 * number + 600] = h5py.VirtualSource(
            f"part-{number}.h5", "train/inputs", (600, 16, 16)
        )
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file.create_virtual_dataset("train/inputs", layout)
    checked = check([tmp_path / "all.h5"], ALONE, quiet=True)
    assert [fault.samples for fault in checked.faults] == [(9, 609)] and checked.faults[0].kind == "not finite"
    facts = inform([tmp_path / "all.h5"], ALONE)["files"][0]["datasets"]["train/inputs"]
    assert facts["layout"] == "virtual" and facts["sources"] == ["part-0.h5", "part-1.h5"]
    assert facts["speed"]["sequential"]["samples"] == 1200


def test_info(tmp_path: Path) -> None:
    path = write(tmp_path / "data.h5", packed=GZIP)
    done = jobs.run(0, "data", "info", "--json", path, cwd=tmp_path)
    assert done.code == 0, done.err
    facts = json.loads(done.out)["files"][0]
    train = facts["datasets"]["train/inputs"]
    assert train["filters"] == ["shuffle", "gzip 4", "fletcher32"] and train["layout"] == "chunked"
    assert train["chunk"] == [32, 16, 16] and train["chunk_bytes"] == 32 << 10 and train["compression_ratio"] > 1
    assert train["checksums"] == "fletcher32" and facts["datasets"]["train/targets"]["checksums"] == "crc32"
    assert train["speed"]["shuffled"]["samples"] == 256 and train["speed"]["sequential"]["samples"] == 600
    assert train["speed"]["shuffled_again"]["page_cache"] == "warm"
    assert train["speed"]["shuffled"]["page_cache"] in ("cold", "warm")
    assert facts["file_system"] != "unknown file system" and facts["attributes"]["complete"] is True
    told = jobs.run(0, "data", "info", path, cwd=tmp_path)
    for word in ("train/inputs: 600x16x16 float32", "shuffle, gzip 4, fletcher32", "samples/s", "page cache"):
        assert word in told.out


def test_on_a_file_system_in_memory_nothing_is_called_cold(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("no /dev/shm")
    path = shm / f"{tmp_path.name}-{tmp_path.parent.name}.h5"
    try:
        write(path)
        facts = json.loads(jobs.run(0, "data", "info", "--json", path, cwd=tmp_path).out)["files"][0]
    finally:
        path.unlink()
    assert facts["file_system"] == "tmpfs"
    assert facts["datasets"]["train/inputs"]["speed"]["sequential"]["page_cache"] == "warm"


# ------------------------------------------------------------------------------------------------ advice


def advised(path: Path, name: str, values: np.ndarray, **packed: Any) -> list[Advice]:
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=values, **packed)
    return list(of_dataset(read_structure(path).datasets[0]))


def test_advice(tmp_path: Path) -> None:
    path, rng = tmp_path / "my data.h5", np.random.default_rng(0)
    noise, plain = rng.integers(0, 256, (2048, 32, 32), np.uint8), np.zeros((2048, 32, 32), np.uint8)
    gzip = {"compression": "gzip", "compression_opts": 1, "fletcher32": True}

    def one_advice(values: np.ndarray, **packed: Any) -> Advice:
        found = advised(path, "train/inputs", values, **packed)
        assert len(found) == 1, found
        return found[0]

    assert advised(path, "train/inputs", plain) == []
    assert advised(path, "train/inputs", plain, chunks=(1024, 32, 32), **gzip) == []
    assert "costs more than reading" in one_advice(noise, chunks=(1024, 32, 32), **gzip).what
    assert "not compressed" in one_advice(noise, chunks=(1024, 32, 32)).what
    assert "each is in 4 of them" in one_advice(plain, chunks=(1024, 16, 16), **gzip).what
    assert "one sample a chunk" in one_advice(plain, chunks=(1, 32, 32), **gzip).what
    assert "chunks of 10 KiB" in one_advice(plain, chunks=(10, 32, 32), **gzip).what
    large = np.zeros((16384, 32, 32), np.uint8)
    assert "chunks of 16 MiB" in one_advice(large, chunks=(16384, 32, 32), **gzip).what
    assert "no checksums" in one_advice(plain, chunks=(1024, 32, 32), compression="gzip").what
    assert "8-byte floats" in one_advice(rng.random((8, 4))).what
    assert "byte order" in one_advice(rng.random((8, 4)).astype(">f4")).what


def test_advice_on_lustre(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for `lfs`: there is no Lustre here."""
    lfs = tmp_path / "lfs"
    lfs.write_text('#!/bin/sh\n[ "$1 $2" = "getstripe -c" ] && echo 1\n')
    lfs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    path = write(tmp_path / "data.h5")
    assert stripe_count(path) == 1
    advice = list(of_file(read_structure(path).datasets, 2 << 30, stripe_count(path)))
    assert [each.remedy for each in advice] == [f"lfs migrate -c -1 {path}"] and "1 Lustre server:" in advice[0].what
    lfs.write_text("#!/bin/sh\nexit 1\n")
    assert stripe_count(path) is None
