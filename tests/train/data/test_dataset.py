"""What tasks get from files: one or many, one input or several, documents; and data that do not fit together."""

import os
import re
import socket
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hpc_train.core import config
from hpc_train.core.errors import UserError
from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.datasets.inspect.check import check
from hpc_train.datasets.inspect.structure import expand
from hpc_train.train.comm.context import Context
from hpc_train.train.data import files, hdf5_faults
from hpc_train.train.data.dataset import Buffers, Split, open_order, open_split
from hpc_train.train.data.files import Files, open_files
from hpc_train.train.data.tokens import StreamName, open_tokens
from hpc_train.train.tasks.classification import Classification
from tests import jobs

ALONE = Context(World())
STREAM = StreamName("train/inputs", "data.inputs", "train/inputs_offsets")


def job(file: object, **data: object) -> Config:
    train = {"steps": 1, "global_batch": 1}
    return config.from_values({"name": "x", "data": {"file": str(file), **data}, "train": train}, "test").config


def opened(file: object, **data: object) -> Files:
    return open_files(job(file, **data), ALONE)


def write(path: Path, begin: int = 0, stop: int = 30, dtype: str = "u1", width: int = 4, scale: float = 0.5) -> Path:
    with h5py.File(path, "w") as file:
        rows = np.arange(begin, stop)
        file["train/inputs"] = np.repeat(rows[:, None], width, 1).astype(dtype)
        file["train/inputs"].attrs["scale_factor"] = scale
        file["train/more"] = rows[:, None].astype("f8") / 10
        file["train/targets"] = rows % 3
    return path


def split(files: Files, inputs: str | list[str] = "train/inputs") -> Split:
    found = open_split(files, inputs, "train/targets", ("data.inputs", "data.targets"))
    assert found is not None
    return found


def test_the_files_of_a_pattern_are_one_data_set(tmp_path: Path) -> None:
    for name, begin, stop in (("part-1", 10, 11), ("part-0", 0, 10), ("part-2", 11, 30)):
        write(tmp_path / f"{name}.h5", begin, stop)
    task = Classification(job(tmp_path / "part-*.h5"), ALONE)
    assert task.num_samples == 30 and "3 files" in task.reading
    rows = np.array([29, 0, 10, 11])
    batch = task.batch(rows, 0)
    assert batch.inputs[:, 0].tolist() == rows.tolist() and batch.targets.tolist() == [2, 0, 1, 2]
    assert batch.floats()[:, 0].tolist() == (rows / 2).tolist()
    with pytest.raises(UserError, match="matches no file"):
        opened(tmp_path / "none-*.h5")


@pytest.mark.parametrize(
    "other, says",
    [
        ({"dtype": "f4"}, r"train/inputs is float32 \(n, 4\) in .*b\.h5 and uint8 \(n, 4\) in .*a\.h5"),
        ({"width": 5}, r"train/inputs is uint8 \(n, 5\) in"),
        ({"scale": 0.25}, r"has scale_factor, add_offset \(0.25, 0.0\) in .*b\.h5"),
    ],
)
def test_files_that_disagree_are_named(tmp_path: Path, other: dict[str, object], says: str) -> None:
    write(tmp_path / "a.h5")
    write(tmp_path / "b.h5", **other)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the files of data.file disagree: .*" + says):
        split(opened(tmp_path / "[ab].h5"))


def test_a_file_without_the_data_set_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    with h5py.File(write(tmp_path / "b.h5"), "r+") as file:
        del file["train/targets"]
    with pytest.raises(UserError, match=r"data.targets = .train/targets.: no such data set in .*b\.h5"):
        split(opened(tmp_path / "*.h5"))


def test_several_inputs_come_together(tmp_path: Path) -> None:
    both = split(opened(write(tmp_path / "a.h5")), ["train/inputs", "train/more"])
    batch = both.batch(np.array([7, 3]))
    assert [each.dtype for each in batch.inputs] == [torch.uint8, torch.float64], "as stored"
    first, second = batch.floats()
    assert first.tolist() == [[3.5] * 4, [1.5] * 4] and second.flatten().tolist() == pytest.approx([0.7, 0.3])
    with pytest.raises(UserError, match="take one data set"):
        Classification(job(tmp_path / "a.h5", inputs=["train/inputs", "train/more"]), ALONE)


def test_links_to_other_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "real.h5")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["train"] = h5py.ExternalLink("real.h5", "/train")
    with pytest.raises(UserError, match=r"a\.h5: train/inputs is a link to another file, real\.h5"):
        split(opened(tmp_path / "a.h5"))


def test_no_window_spans_two_documents(tmp_path: Path) -> None:
    ends = [0, 11, 11, 14, 40]
    for number in range(2):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["train/inputs"] = np.arange(40) + 100 * number
            file["train/inputs_offsets"] = ends
    files = opened(tmp_path / "?.h5")
    tokens = open_tokens(files, STREAM, 4, 1)
    assert tokens is not None and len(tokens) == 2 * (2 + 0 + 0 + 5)
    firsts = [0, 5, 14, 19, 24, 29, 34]
    assert tokens.windows(np.arange(14))[:, 0].tolist() == firsts + [100 + each for each in firsts]
    assert (np.diff(tokens.windows(np.arange(14))) == 1).all()
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        file["train/inputs"], file["train/inputs_offsets"] = np.arange(40), [0, 11, 11, 50, 40]
    with pytest.raises(
        UserError, match=r"bad\.h5: train/inputs_offsets is int64 \(5,\), and no beginnings of documents"
    ):
        open_tokens(opened(tmp_path / "bad.h5"), STREAM, 4, 1)


def test_the_order_follows_the_chunks_and_the_memory(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("train/inputs", (1000, 1 << 16), "u1", chunks=(8, 1 << 16), compression="gzip")
        file["train/targets"] = np.zeros(1000, int)
    for data, window in (({}, 64), ({"memory_mb": 20}, 13), ({"memory_mb": 1}, 1), ({"shuffle_chunks": 3}, 3)):
        found = open_order(split(opened(tmp_path / "a.h5", **data)).inputs, 1000, job(tmp_path / "a.h5", **data))
        assert str(found) == f"125 chunks, samples mixed within {window}"
    plain = opened(write(tmp_path / "b.h5"))
    assert str(open_order(split(plain).inputs, 30, job(tmp_path / "b.h5"))) == "all samples mixed"


def test_memory_is_used_again_when_nobody_holds_it() -> None:
    buffers = Buffers()
    first = torch.from_numpy(buffers.empty((4, 3), np.dtype(np.int16)))
    place, kept = first.data_ptr(), first[1:]
    second = torch.from_numpy(buffers.empty((4, 3), np.dtype(np.int16)))
    assert second.data_ptr() != place
    del first
    assert torch.from_numpy(buffers.empty((4, 3), np.dtype(np.int16))).data_ptr() != place, "a part of it is held"
    del kept
    third = torch.from_numpy(buffers.empty((2, 3), np.dtype(np.int16)))
    assert third.data_ptr() == place and third.shape == (2, 3)


def test_a_file_that_is_replaced_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHECK_EVERY_S", 0.0)
    both = split(opened(write(tmp_path / "a.h5")))
    both.batch(np.arange(3))
    write(tmp_path / "b.h5").replace(tmp_path / "a.h5")
    with pytest.raises(UserError, match=r"a\.h5 was replaced or changed while it was read"):
        both.batch(np.arange(3))


def test_a_refused_lock_names_the_variable() -> None:
    what, remedy = hdf5_faults.explain_open_failure(
        OSError("Unable to synchronously open file (unable to lock file, errno = 11)")
    )
    assert "cannot be locked" in what and "HDF5_USE_FILE_LOCKING=FALSE" in remedy


def test_what_is_no_file_is_said_at_once(tmp_path: Path) -> None:
    """Nothing is opened: a FIFO would block, and /dev/zero fill the memory."""
    os.mkfifo(tmp_path / "fifo.h5")
    (tmp_path / "link.h5").symlink_to("nowhere.h5")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.h5"))
    (tmp_path / "empty.h5").touch()
    kinds = {
        tmp_path / "fifo.h5": "is a FIFO",
        tmp_path / "link.h5": r"is a link to nowhere\.h5, which does not exist",
        tmp_path / "socket.h5": "is a socket",
        tmp_path: "is a folder",
        Path("/dev/zero"): "is a device",
        tmp_path / "none.h5": "does not exist",
        tmp_path / "empty.h5": "cannot be opened|is truncated|is not an HDF5 file",
        tmp_path / ("x" * 300): "cannot be accessed: File name too long",
    }
    for path, says in kinds.items():
        with pytest.raises(UserError, match=says):
            opened(path)
        if path.name != "empty.h5":
            with pytest.raises(UserError, match=says):
                expand([str(path)])


@pytest.mark.parametrize("job_file", sorted(jobs.CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_job_is_told_the_command_that_its_first_lines_show(job_file: Path) -> None:
    job_config = config.load(job_file).config
    shown = re.search(r"^#   (hpc-train prepare .*?)( && .*)?$", job_file.read_text(), re.MULTILINE)
    if job_config.data.file is None or shown is None:
        return  # it reads no file, or names the command of another job
    name = f"elsewhere/{Path(job_config.data.file).name}"
    with pytest.raises(UserError) as caught:
        open_files(job_config.model_copy(update={"data": job_config.data.model_copy(update={"file": name})}), ALONE)
    assert caught.value.remedy == f"Make it: {shown[1]}".replace("data/", "elsewhere/")


@pytest.mark.parametrize("where", ["train/inputs", "train/targets"])
def test_a_shape_that_no_such_file_holds_is_refused(tmp_path: Path, where: str) -> None:
    """Before memory is allocated, for chunked, contiguous and external values."""
    for name, layout in (("chunked", {"chunks": (2, 3)}), ("plain", {}), ("of nobody", {"dtype": h5py.string_dtype()})):
        path = write(tmp_path / f"{name}.h5")
        with h5py.File(path, "r+") as file:
            rest = file[where].shape[1:]
            del file[where]
            chunks = {"chunks": (2, *rest)} if "chunks" in layout else layout
            file.create_dataset(where, (1 << 44, *rest), **{"dtype": "u1"} | chunks)
        with pytest.raises(UserError, match=r"claims to be 17,592,186,044,416|was never written|and no numbers"):
            Classification(job(path), ALONE)
        (fault, *_) = check([path], ALONE, quiet=True).faults
        assert fault.kind in ("absurd", "empty", "unequal")
