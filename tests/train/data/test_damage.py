"""Files with a few bytes changed in their metadata: one message, or the same training as with the intact file."""

import json
import math
import re
import shutil
import struct
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import h5py
import pytest
import torch

from hpc_train.core.world import World
from hpc_train.datasets.inspect.check import check
from hpc_train.datasets.inspect.structure import read_structure
from hpc_train.train.comm.context import Context
from tests import damage

CASES = 6  # of each file; of a thorough run 60
KINDS = ("plain", "new", "gzip", "lzf", "text", "virtual")
JOB = """
name = "job"
[data]
file = "data.h5"
[task]
kind = "{kind}"
model = "{model}"
options = {{{options}}}
[train]
steps = 3
global_batch = 8
lr = 0.01
threads = 1
[reduce]
strategy = "local"
"""
SMALL = "context = 16, width = 8, layers = 1, heads = 1"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import hpc_train.datasets.inspect.info
    import hpc_train.train.loop  # noqa: F401  loaded here, once for all children

    torch.set_num_threads(1)
    return damage.whole_files(tmp_path_factory.mktemp("whole"))


def trained(folder: Path) -> tuple[damage.Outcome, str, dict[str, float]]:
    """(how it ended, its losses, its test measures)."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    ended = damage.hpc_train(folder, "train", "job.toml")
    if ended.code or ended.fault:
        return ended, "", {}
    (run,) = (folder / "runs" / "job").iterdir()
    return ended, (run / "metrics.csv").read_text(), json.loads((run / "summary.json").read_text())["test"]


def looked_at(folder: Path, command: str) -> damage.Outcome:
    """`data check` or `data info`, whose exit code for faults in files is 1."""
    ended = damage.hpc_train(folder, "data", command, "data.h5")
    return damage.Outcome(0, 0, False, "faults", "") if ended.code == 1 and "Faults:" in ended.out else ended


def cases(whole: dict[str, Path], kind: str, num: int, folder: Path) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Makes `folder`/data.h5 one damaged file after the other: (what was done; losses and test of the whole file)."""
    task = ("language", "gpt", SMALL) if kind == "text" else ("classification", "softmax", "")
    (folder / "job.toml").write_text(JOB.format(kind=task[0], model=task[1], options=task[2]))
    shutil.copy(whole[kind], folder / "data.h5")
    shutil.copy(whole["plain"], folder / "plain.h5")  # the virtual one's values
    ended, losses, test = trained(folder)
    assert not ended.fault and losses, ended
    assert looked_at(folder, "check").out.endswith("No fault found\n")
    for what, content in islice(damage.damages(whole[kind], seed=num), num):
        (folder / "data.h5").write_bytes(content)
        yield what, losses, test


@pytest.mark.parametrize("num", [CASES, pytest.param(10 * CASES, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_one_message_or_trains_as_the_whole_one(
    whole: dict[str, Path], kind: str, num: int, tmp_path: Path
) -> None:
    for what, losses, test in cases(whole, kind, num, tmp_path):
        ended, *found = trained(tmp_path)
        checked = looked_at(tmp_path, "check")
        for command, each in (("train", ended), ("check", checked), ("info", looked_at(tmp_path, "info"))):
            assert not each.fault, f"{what}: {command}: {each}"
        if "No fault found" in checked.out and not ended.code:
            assert found == [losses, test] and all(map(math.isfinite, test.values())), what


def attribute_bits(path: Path) -> Iterator[bytes]:
    """The file with one bit of scale_factor changed, first for training, then for testing."""
    content, value = path.read_bytes(), struct.pack("<d", 1 / 255)
    places = [found.start() for found in re.finditer(re.escape(value), content)]
    assert len(places) == 2
    for place in places:
        for bit in range(0, 64, 3):
            changed = bytearray(content)
            changed[place + bit // 8] ^= 1 << bit % 8
            yield bytes(changed)


def test_prepared_files_have_checksums_of_what_numbers_mean(digits: Path, tmp_path: Path) -> None:
    """HDF5's messages, as version 1.8 writes them."""
    for content in attribute_bits(digits):
        (tmp_path / "data.h5").write_bytes(content)
        (fault,) = read_structure(tmp_path / "data.h5").faults
        assert "incorrect metadata checksum" in fault.what


def test_without_checksums_parts_are_compared(whole: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB.format(kind="classification", model="softmax", options=""))
    for content in islice(attribute_bits(whole["plain"]), 0, None, 5):
        (tmp_path / "data.h5").write_bytes(content)
        faults = check([tmp_path / "data.h5"], Context(World()), quiet=True).faults
        assert {fault.kind for fault in faults} & {"meaning", "disagree"}, faults
        assert all("scale_factor" in fault.what for fault in faults)
        ended = damage.hpc_train(tmp_path, "train", "job.toml")
        assert ended.code == 2 and "scale_factor" in ended.err and not ended.fault


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 4e227, 1e-40, "one", [1.0, 2.0]])
@pytest.mark.parametrize("name", ["scale_factor", "add_offset"])
def test_what_leaves_no_usable_values_is_refused(
    whole: dict[str, Path], name: str, value: object, tmp_path: Path
) -> None:
    """If both data sets agree, neither exposes the other."""
    if name == "add_offset" and value in (0.0, 1e-40):
        return
    (tmp_path / "job.toml").write_text(JOB.format(kind="classification", model="softmax", options=""))
    shutil.copy(whole["plain"], tmp_path / "data.h5")
    with h5py.File(tmp_path / "data.h5", "r+") as file:
        for part in ("train", "test"):
            file[f"{part}/inputs"].attrs[name] = value
    faults = check([tmp_path / "data.h5"], Context(World()), quiet=True).faults
    assert [fault.dataset for fault in faults if fault.kind == "meaning"] == ["test/inputs", "train/inputs"]
    ended = damage.hpc_train(tmp_path, "train", "job.toml")
    assert ended.code == 2 and f"attribute {name}" in ended.err and not ended.fault
