"""Files with a few bytes changed where they say what they hold: one message, or a training like the whole file's."""

import json
import math
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

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
    import hpc_train.train.inspect.check
    import hpc_train.train.inspect.info
    import hpc_train.train.trainer  # noqa: F401  loaded here, once for all children

    torch.set_num_threads(1)
    return damage.whole_files(tmp_path_factory.mktemp("whole"))


def trained(folder: Path) -> tuple[damage.Outcome, str, dict[str, float]]:
    """(how it ended, its losses, what the test gave)."""
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
