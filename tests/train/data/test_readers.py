"""Every reader gives the rows that h5py gives; errors name the damage."""

import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_train.core.errors import UserError
from hpc_train.core.sampling import BatchSampler, Order
from hpc_train.train.data import filters
from hpc_train.train.data.batches import Batches
from hpc_train.train.data.chunk_cache import ChunkCache, ChunkFile
from hpc_train.train.data.reader_interface import Reader
from hpc_train.train.data.readers import ConcatReader, H5pyReader, MmapReader, open_concat, open_reader
from tests.jobs import CONFIGS

PACKED = {"chunks": (16, 7, 5), "compression": "gzip", "shuffle": True, "fletcher32": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "big-endian": {"dtype": ">f4"},
    "chunked": {"chunks": (16, 7, 5)},
    "chunks that cut samples": {"chunks": (10, 4, 3), "compression": "gzip"},
    "gzip": PACKED,
    "gzip, big-endian": {**PACKED, "dtype": ">f4"},
    "lzf": {"chunks": (16, 7, 5), "compression": "lzf", "shuffle": True},
    "scaleoffset, which only HDF5 itself undoes": {"chunks": (16, 7, 5), "scaleoffset": 3},
    "fletcher32 alone": {"chunks": (16, 7, 5), "fletcher32": True},
}
ROWS = np.random.default_rng(0).permutation(203)


def values(seed: int = 0) -> np.ndarray:
    return np.round(np.random.default_rng(seed).integers(0, 9, (203, 7, 5)) / 8, 3).astype(np.float32)


def opened(path: Path, name: str = "x", memory_bytes: int = 1 << 20) -> Reader:
    return open_reader(path, h5py.File(path, "r")[name], memory_bytes, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("userblock", [0, 512])
@pytest.mark.parametrize("memory_bytes", [1, 1 << 20], ids=["two chunks in memory", "all in memory"])
def test_every_layout_reads_alike(tmp_path: Path, layout: str, userblock: int, memory_bytes: int) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", userblock_size=userblock) as file:
        file.create_dataset("x", data=values(), **LAYOUTS[layout])
        expected = file["x"][()].astype(np.float32)
    reader = opened(path, memory_bytes=memory_bytes)
    assert (reader.shape, reader.dtype) == ((203, 7, 5), np.dtype(np.float32))
    assert isinstance(reader, MmapReader if layout in ("contiguous", "big-endian") else ChunkCache)
    out = np.empty((50, 7, 5), np.float32)
    for begin in range(0, 203, 50):
        rows = ROWS[begin : begin + 50]
        reader.prefetch(rows)
        assert np.array_equal(reader.take(rows), expected[rows])
        assert reader.take(rows, out[: len(rows)]).base is not None
        assert np.array_equal(out[: len(rows)], expected[rows])
    assert np.array_equal(reader[3:190], expected[3:190])
    assert len(reader.take(ROWS[:0])) == 0
    if reader.chunk_edges is not None:
        assert np.array_equal(reader.chunk_edges, [*range(0, 203, h5py.File(path)["x"].chunks[0]), 203])
    reader.close()


@pytest.mark.parametrize("layout", ["contiguous", "big-endian", "gzip", "scaleoffset, which only HDF5 itself undoes"])
@pytest.mark.parametrize("row", [-1, -203, 203, 204, 1 << 40])
def test_a_row_that_is_not_there_is_refused(tmp_path: Path, layout: str, row: int) -> None:
    """They are neither counted from the end nor clipped."""
    for name in "ab":
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.create_dataset("x", data=values(), **LAYOUTS[layout])
    parts = [(tmp_path / f"{n}.h5", h5py.File(tmp_path / f"{n}.h5", "r")["x"]) for n in "ab"]
    for reader, wrong in (
        (opened(tmp_path / "a.h5"), row),
        (open_concat(parts, 1 << 20, 1), row if row < 0 else row + 203),
    ):
        for out in (None, np.empty((2, 7, 5), np.float32)):
            with pytest.raises(IndexError, match=f"row {wrong} of"):
                reader.take(np.array([5, wrong]), out)
        reader.close()


@pytest.mark.parametrize("width, dtype", [(1 << 14, np.uint8), (1 << 13, np.int16), (9999, np.uint8)])
def test_large_batches_are_gathered_by_threads_alike(tmp_path: Path, width: int, dtype: type) -> None:
    """Rows of 9,999 bytes are not whole words: one thread gathers them."""
    expected = np.random.default_rng(0).integers(0, 100, (64, width)).astype(dtype)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = expected
    reader, rows, before = opened(tmp_path / "x.h5"), np.random.default_rng(1).permutation(64), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert np.array_equal(reader.take(rows, np.empty_like(expected)), expected[rows])
    finally:
        torch.set_num_threads(before)


def test_chunks_never_written_are_the_fill_value(tmp_path: Path) -> None:
    """A data set that was never written is refused: all of its samples would be the fill value."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        sparse = file.create_dataset("x", (100, 3), np.int16, chunks=(10, 3), compression="gzip", fillvalue=7)
        sparse[35] = 1
        file.create_dataset("none", (100, 3), np.int16, fillvalue=7)
        file.create_dataset("empty", (0, 3), np.int16, maxshape=(None, 3))
    assert opened(tmp_path / "x.h5").take(np.array([34, 35, 99])).tolist() == [[7] * 3, [1] * 3, [7] * 3]
    with pytest.raises(UserError, match="/none was never written: all of it would be its fill value"):
        opened(tmp_path / "x.h5", "none")
    assert opened(tmp_path / "x.h5", "empty").shape == (0, 3)


def split_in_files(folder: Path, **layout: Any) -> list[Path]:
    paths = []
    for number, (begin, stop) in enumerate(((0, 40), (40, 41), (41, 203))):
        paths.append(folder / f"part-{number}.h5")
        with h5py.File(paths[-1], "w") as file:
            file.create_dataset("x", data=values()[begin:stop], **layout)
    return paths


@pytest.mark.parametrize(
    "layout, kind",
    [({}, ConcatReader), ({"chunks": (16, 7, 5), "maxshape": (None, 7, 5), "compression": "gzip"}, ChunkCache)],
)
def test_files_read_as_one(tmp_path: Path, layout: dict[str, Any], kind: type) -> None:
    parts = [(path, h5py.File(path, "r")["x"]) for path in split_in_files(tmp_path, **layout)]
    reader = open_concat(parts, 1 << 20, 2)
    assert isinstance(reader, kind) and reader.shape == (203, 7, 5)
    reader.prefetch(ROWS[:40])
    assert np.array_equal(reader.take(ROWS), values()[ROWS])
    assert np.array_equal(reader[39:43], values()[39:43])
    if layout:
        assert reader.chunk_edges is not None and reader.chunk_edges[:7].tolist() == [0, 16, 32, 40, 41, 57, 73]
    reader.close()


def test_files_of_different_layouts_read_as_one(tmp_path: Path) -> None:
    for name, layout in (("a", {}), ("b", {"chunks": (16, 7, 5)})):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.create_dataset("x", data=values(), **layout)
    reader = open_concat([(tmp_path / f"{n}.h5", h5py.File(tmp_path / f"{n}.h5")["x"]) for n in "ab"], 1 << 20, 1)
    assert np.array_equal(reader.take(np.array([405, 0, 203, 202])), np.concatenate([values()] * 2)[[405, 0, 203, 202]])
    assert reader.chunk_edges is not None and len(reader.chunk_edges) == 203 + 13 + 1


def test_a_virtual_data_set_is_read_piece_by_piece(tmp_path: Path) -> None:
    layout = h5py.VirtualLayout((203, 7, 5), np.float32)
    for path, (begin, stop) in zip(split_in_files(tmp_path), ((0, 40), (40, 41), (41, 203)), strict=True):
        layout[begin:stop] = h5py.VirtualSource(path.name, "x", (stop - begin, 7, 5))
    columns = h5py.VirtualLayout((40, 7, 10), np.float32)
    columns[:, :, 5:] = h5py.VirtualSource("part-0.h5", "x", (40, 7, 5))
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
        file.create_virtual_dataset("columns", columns)
    reader = opened(tmp_path / "all.h5")
    assert isinstance(reader, ConcatReader) and np.array_equal(reader.take(ROWS), values()[ROWS])
    aside = opened(tmp_path / "all.h5", "columns")
    assert isinstance(aside, H5pyReader) and np.array_equal(aside.take(np.array([3, 1]))[:, :, 5:], values()[[3, 1]])
    (tmp_path / "part-1.h5").unlink()
    with pytest.raises(UserError, match=r"part-1\.h5, which does not exist"):
        opened(tmp_path / "all.h5")


def test_values_in_other_files_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", (10, 3), np.int8, external=[(str(tmp_path / "raw"), 0, 30)])
    with pytest.raises(UserError, match="the values of /x are in other files"):
        opened(tmp_path / "x.h5")


@pytest.mark.parametrize("layout", [PACKED, {"chunks": (16, 7, 5), "fletcher32": True}], ids=["gzip", "plain"])
def test_a_flipped_bit_is_named_at_the_first_read_of_its_chunk(tmp_path: Path, layout: dict[str, Any]) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        info = file.create_dataset("x", data=values(), **layout).id.get_chunk_info_by_coord((32, 0, 0))
    content = bytearray(path.read_bytes())
    content[info.byte_offset + info.size // 2] ^= 4
    path.write_bytes(content)
    reader = opened(path)
    assert np.array_equal(reader.take(np.array([31, 48])), values()[[31, 48]])
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"x\.h5: chunk \(32, 0, 0\) of /x, samples 32 to 47, cannot be read: .*fletch"
        ):
            reader.take(np.array([3, 40]))
    reader.close()


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=values(), **PACKED)
    reader = opened(path)
    with path.open("r+b") as opened_file:
        opened_file.truncate(path.stat().st_size // 4)
    with pytest.raises(UserError, match="the file ends within it"):
        reader[0:203]
    reader.close()


def test_a_filter_that_is_missing_is_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        kind = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        kind.set_chunk((10, 3))
        kind.set_filter(471, h5py.h5z.FLAG_OPTIONAL, (3,))  # of nobody's
        space = h5py.h5s.create_simple((10, 3))
        h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_INT8, space, kind)
    with pytest.raises(
        UserError, match=r"/x is compressed with filter .*\(number 471\), which is not installed"
    ) as told:
        opened(tmp_path / "x.h5")
    assert "pip install hdf5plugin" in told.value.remedy


@given(st.binary(max_size=40_000))
@settings(max_examples=20, deadline=None)
def test_checksums_are_those_of_hdf5(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    data = data or b"\0"
    with h5py.File("x", "w", driver="core", backing_store=False) as file:
        x = file.create_dataset("x", data=np.frombuffer(data, np.uint8), chunks=(len(data),), fletcher32=True)
        file.flush()
        _, stored = x.id.read_direct_chunk((0,))
    assert stored[-4:] == filters.fletcher32(data).to_bytes(4, "little")


@pytest.mark.parametrize("window, memory_chunks", [(4, 8), (4, 5), (8, 8), (20, 8), (1, 2)])
def test_each_chunk_is_decoded_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, memory_chunks: int
) -> None:
    """If memory holds two windows; with less memory, every row is still correct."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        data = file.create_dataset("x", data=np.arange(2000 * 5).reshape(2000, 5), chunks=(50, 5), compression="gzip")
        expected = data[()]
    reader = opened(tmp_path / "x.h5", memory_bytes=memory_chunks * 50 * 5 * 8)
    decoded: list[int] = []
    read = ChunkFile.read
    monkeypatch.setattr(ChunkFile, "read", lambda self, block, there: (decoded.append(block), read(self, block, there)))
    order, batch = Order(2000, reader.chunk_edges, window), 32
    task: Any = SimpleNamespace(
        batch=lambda rows, step: (rows, reader.take(rows)), prefetch=reader.prefetch, in_step=True
    )
    steps = range(-(-2000 // batch))
    for ((rows, values),), _, _ in Batches(task, BatchSampler(order, batch, 0), steps, 1, torch.device("cpu")):
        assert np.array_equal(values, expected[rows])
    if 2 * window <= memory_chunks:
        assert sorted(decoded) == list(range(40))
    reader.close()


@pytest.mark.parametrize("kind", ["gzip", "lzf"])
def test_a_chunk_that_claims_to_be_larger_is_refused(tmp_path: Path, kind: str) -> None:
    """25 KB that inflate to 26 MB: at most a chunk is decoded, and an error is raised."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        bomb = file.create_dataset("x", (1 << 18, 100), np.uint8, chunks=(1 << 18, 100), compression=kind)
        bomb[:] = 0
        _, content = bomb.id.read_direct_chunk((0, 0))
        small = file.create_dataset("small", (16, 800), np.uint8, chunks=(16, 800), compression=kind)
        small.id.write_direct_chunk((0, 0), content)
    reader = opened(tmp_path / "x.h5", "small")
    tracemalloc.start()
    with pytest.raises(
        UserError, match=r"chunk \(0, 0\) of /small.*: it holds (more than|[0-9,]* bytes and not) 12,800"
    ):
        reader.take(np.array([3]))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    reader.close()


def test_a_slot_stays_a_chunks_while_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C during a read, the thread that still decodes does not overwrite what is read next."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=np.arange(40).reshape(40, 1), chunks=(10, 1), compression="gzip")
    reader = opened(tmp_path / "x.h5", memory_bytes=1)  # two slots
    assert isinstance(reader, ChunkCache)
    read, may_go = ChunkFile.read, threading.Event()

    def slow(self: ChunkFile, block: int, there: np.ndarray) -> None:
        if block == 0:
            may_go.wait(30)
        read(self, block, there)

    monkeypatch.setattr(ChunkFile, "read", slow)
    with monkeypatch.context() as interrupted:

        def interrupt(future: Future[None], timeout: float | None = None) -> None:
            raise KeyboardInterrupt

        interrupted.setattr(Future, "result", interrupt)
        with pytest.raises(KeyboardInterrupt):
            reader.take(np.array([0]))
    threading.Timer(0.3, may_go.set).start()
    for rows in ([15, 25], [35, 19], [2, 12]):
        assert reader.take(np.array(rows)).reshape(-1).tolist() == rows
    reader.close()


def test_more_files_than_the_soft_limit_of_open_ones(tmp_path: Path) -> None:
    for number in range(300):
        with h5py.File(tmp_path / f"part-{number:03}.h5", "w") as file:
            for part, rows in (("train", 4), ("test", 2)):
                inputs = np.full((rows, 3), number % 200, np.uint8)
                file.create_dataset(f"{part}/inputs", data=inputs, chunks=(2, 3), maxshape=(None, 3))
                file[f"{part}/targets"] = np.arange(rows) % 2
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from hpc_train.core.config import load
from hpc_train.train.comm.context import Context
from hpc_train.train.tasks.classification import Classification
from hpc_train.core.world import World
import numpy as np
from pathlib import Path
from types import SimpleNamespace
job = load(Path({str(CONFIGS / "softmax-mnist.toml")!r}), ("data.file={tmp_path}/part-*.h5",)).config
task = Classification(job, Context(World()))
print(task.num_samples, int(task.batch(np.array([4 * 299]), 0).inputs[0, 0]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1200 99\n", done.stderr
    hard = code.replace("resource.getrlimit(resource.RLIMIT_NOFILE)[1]", "256")
    refused = subprocess.run([sys.executable, "-c", hard], capture_output=True, text=True)
    assert "Too many open files" in refused.stderr and "raise the limit (ulimit -n)" in refused.stderr, refused.stderr
