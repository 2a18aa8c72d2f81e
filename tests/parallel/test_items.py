"""Samples from a torch Dataset: the batches, losses and resumed steps are those of the same numbers in an HDF5 file."""

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from hpc_train.core.config import Loaded, load
from hpc_train.core.errors import UserError
from hpc_train.core.job_environment import JobEnvironment
from hpc_train.core.records import read_metrics
from hpc_train.core.rundir import RunDir, find
from hpc_train.core.validation_log import read_validation
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.data.items import _open_part, long_reading, open_items
from hpc_train.train.loop import train
from hpc_train.train.setup import open_job
from tests.own_dataset import Digits

ROOT = Path(__file__).parents[1]
STEPS = 12
DIGITS = ("data.dataset=tests.own_dataset:Digits", "data.test_options={train = false}")
SUMS = (
    f"data.dataset={__name__}:Sums",
    "data.test_options={num = 50, seed = 1}",
    "data.validation_options={num = 70, seed = 2}",
    *("validation.every_steps=4", "task.kind=regression"),
)


class Sums(Dataset[Any]):
    """Regression, batch by batch (`__getitems__`), of samples that differ in size from one use to the other."""

    def __init__(self, num: int = 300, seed: int = 0) -> None:
        self.inputs = np.random.default_rng(seed).random((num, 6), np.float32)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        return self.inputs[row], np.array([self.inputs[row].sum(), self.inputs[row].max()])

    def __getitems__(self, rows: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [self[row] for row in rows]


class Ages(Dataset[Any]):
    """60 items of three classes, with one fault."""

    def __init__(self, fault: str = "") -> None:
        if fault == "made":
            raise FileNotFoundError("no /data/ages")
        self.fault = fault

    def __len__(self) -> int:
        if self.fault == "length":
            raise NotImplementedError
        return 0 if self.fault == "empty" else 60

    def __getitem__(self, row: int) -> Any:
        faulty = {
            "single": torch.zeros(3),
            "triple": (torch.zeros(3), 1, 2),
            "string": ("a picture", 1),
            "scalar": (0.5, 1),
            "complex": (torch.zeros(3, dtype=torch.complex64), 1),
        }
        if self.fault in faulty:
            return faulty[self.fault]
        if row == 41 and self.fault == "raises":
            raise ValueError("no such age")
        if row == 41 and self.fault == "shape":
            return torch.zeros(4), 1
        if row == 41 and self.fault == "type":
            return torch.zeros(3), 1.0
        if row == 41 and self.fault == "pair":
            return None
        return torch.full((3,), float(row)), row % 3


class BySlices(Ages):
    def __getitems__(self, rows: list[int]) -> list[Any]:
        if self.fault == "fewer":
            return [self[row] for row in rows[1:]]
        raise OSError("the disk is gone")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.zeros(3), 1)])


class OneAtATime(Ages):
    """Counts how many threads are in `__getitem__`."""

    inside, most, lock = 0, 0, threading.Lock()

    def __getitem__(self, row: int) -> Any:
        with self.lock:
            type(self).inside += 1
            type(self).most = max(self.most, self.inside)
        threading.Event().wait(1e-3)
        with self.lock:
            type(self).inside -= 1
        return super().__getitem__(row)


class Counted(Ages):
    """Counts items; label 7 in row 41 is none of the three classes."""

    read: ClassVar[list[int]] = []

    def __len__(self) -> int:
        return 6000

    def __getitem__(self, row: int) -> Any:
        self.read.append(row)
        return torch.full((3,), row / 6000), 7 if row == 41 else row % 3


class Slow(Ages):
    """A million items of 5 ms each."""

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, row: int) -> Any:
        threading.Event().wait(5e-3)
        return super().__getitem__(row)


class Uneven(Ages):
    def __len__(self) -> int:
        return 60 + (JobEnvironment.current().rank or 0)


def no_dataset() -> int:
    return 3


def job(root: Path, *overrides: str, path: Path = ROOT / "own-dataset.toml") -> Loaded:
    keys = (f"run.root={root}", f"train.steps={STEPS}", "train.log_every=1", "train.threads=1", "reduce.strategy=mpi")
    return load(path, (*keys, *overrides))


def trained(context: Context, loaded: Loaded, resume: str = "never") -> RunDir:
    assert train(loaded, context, resume) == 0
    return context.on_root(lambda: find([Path(loaded.config.run.root)])[-1])


def results(context: Context, run: RunDir) -> Any:
    """Losses, validations and the final test, which say to the bit whether two runs computed the same."""

    def read() -> Any:
        validations = read_validation(run.validation) if run.validation.exists() else []
        rows = [{name: row[name] for name in row if name != "seconds"} for row in validations]
        return read_metrics(run.metrics), rows, json.loads(run.summary.read_text())["test"]

    return context.on_root(read)


@pytest.fixture(scope="module")
def stored(context: Context, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The items of `Digits` and `Sums` in HDF5."""
    uses = {
        "digits": {"train": Digits(), "test": Digits(train=False)},
        "sums": {"train": Sums(), "test": Sums(50, 1), "validation": Sums(70, 2)},
    }

    def write() -> dict[str, Path]:
        folder = tmp_path_factory.mktemp("stored")
        for name, parts in uses.items():
            with h5py.File(folder / f"{name}.h5", "w") as file:
                for use, dataset in parts.items():
                    items = [dataset[row] for row in range(len(dataset))]
                    file[f"{use}/inputs"] = np.array([np.asarray(item[0]) for item in items])
                    file[f"{use}/targets"] = np.array([item[1] for item in items])
        return {name: folder / f"{name}.h5" for name in uses}

    return context.on_root(write)


@pytest.mark.parametrize(
    "name, keys",
    [
        ("digits", DIGITS),
        ("digits", (*DIGITS, "data.threads=3", "data.normalize=standardize", "train.accumulate=2")),
        ("digits", (*DIGITS, "data.hold_out=0.2", "validation.every_steps=5")),
        ("digits", (*DIGITS, "data.memory_mb=1", "task.model=softmax")),
        ("sums", SUMS),
    ],
    ids=str,
)
def test_a_run_is_that_of_the_same_numbers_in_a_file(
    name: str, keys: tuple[str, ...], context: Context, stored: dict[str, Path], shared_path: Path
) -> None:
    of_file = [key for key in keys if not key.startswith("data.") or "normalize" in key or "hold_out" in key]
    found = results(context, trained(context, job(shared_path / "items", *keys)))
    path = context.on_root(lambda: write_job(shared_path, stored[name]))
    expected = results(context, trained(context, job(shared_path / "file", *of_file, path=path)))
    assert len(found[0][0]) == STEPS and found[2]["loss"] > 0
    assert found == expected


def write_job(folder: Path, data: Path) -> Path:
    """The job without data.dataset, which no --set takes away."""
    text = (ROOT / "own-dataset.toml").read_text()
    path = folder / "own-dataset.toml"
    path.write_text(re.sub(r"^dataset.*\n^test_options.*$", f'file = "{data}"', text, flags=re.MULTILINE))
    return path


def test_batches_are_the_same_on_any_number_of_ranks_and_threads(context: Context, shared_path: Path) -> None:
    rows = np.random.default_rng(0).permutation(1500)[:100]
    reference = Digits()
    for keys in ((), ("data.threads=1",), ("data.threads=7",)):
        with open_job(job(shared_path, *DIGITS, *keys).config, context) as opened:
            batch = opened.task.batch(rows, 0)
            assert len(opened.task.batch(rows[:0], 0)) == 0
        inputs, targets = zip(*(reference[row] for row in rows.tolist()), strict=True)
        assert torch.equal(batch.inputs, torch.stack(inputs)) and batch.targets.tolist() == list(targets)


def test_losses_are_those_of_one_rank(context: Context, shared_path: Path) -> None:
    found = results(context, trained(context, job(shared_path / "ranks", *DIGITS)))
    if context.world.is_root:
        alone = Context(World())
        expected = results(alone, trained(alone, job(shared_path / "alone", *DIGITS, "reduce.strategy=local")))
        assert found[0][0] == expected[0][0] and found[0][1] == pytest.approx(expected[0][1], rel=1e-4)
    context.barrier()


def test_a_run_that_goes_on_is_the_one_that_was_not_stopped(context: Context, shared_path: Path) -> None:
    loaded = job(shared_path, *SUMS, "checkpoint.every_steps=6", "checkpoint.keep=9")
    run = trained(context, loaded)
    before = results(context, run)
    context.on_root(run.checkpoint(STEPS).unlink)
    context.on_root(run.summary.unlink)
    assert trained(context, loaded, str(run.path)).path == run.path
    assert results(context, run) == before


def test_with_one_thread_no_two_items_are_read_at_once(context: Context, shared_path: Path) -> None:
    keys = (
        f"data.dataset={__name__}:OneAtATime",
        "data.hold_out=0.2",
        "validation.every_steps=2",
        "train.steps=4",
        "train.global_batch=12",
    )
    for num_threads in (1, 4):
        OneAtATime.most = 0
        trained(
            context, job(shared_path / str(num_threads), "data.test_options={}", *keys, f"data.threads={num_threads}")
        )
        assert (OneAtATime.most == 1) == (num_threads == 1)


@pytest.mark.parametrize(
    "name, fault, says",
    [
        ("Nothing", "", "has no class of torch.utils.data.Dataset Nothing"),
        ("STEPS", "", "is int"),
        ("no_dataset", "", "int has no items by number"),
        ("Stream", "", "Stream has no items by number"),
        ("Ages", "made", r"FileNotFoundError: no /data/ages, at .*test_items\.py:\d+"),
        ("Ages", "length", "Ages has no length"),
        ("Ages", "empty", "has no items"),
        ("Ages", "single", r"item 0 is torch\.float32 \(3,\), and no pair"),
        ("Ages", "triple", r"item 0 is \(torch\.float32 \(3,\), int, int\), and no pair"),
        ("Ages", "string", r"items are \(str, int\), of which no batch can be made"),
        ("Ages", "scalar", "the input of item 0 is one number"),
        ("Ages", "complex", "complex numbers"),
        ("Ages", "raises", r"item 41: ValueError: no such age, at .*test_items\.py:\d+"),
        ("Ages", "shape", r"the input of item 41 is torch\.float32 \(4,\), that of item 0 torch\.float32 \(3,\)"),
        ("Ages", "type", "the target of item 41 is float, that of item 0 int"),
        ("Ages", "pair", "item 41 is NoneType, and no pair"),
        ("BySlices", "", r"__getitems__ of items 0: OSError: the disk is gone, at .*test_items\.py:\d+"),
        ("BySlices", "fewer", "__getitems__ returned 0 items for 1"),
    ],
)
def test_a_faulty_dataset_is_named(name: str, fault: str, says: str, context: Context, shared_path: Path) -> None:
    options = f"data.options={{fault = '{fault}'}}" if fault else "data.options={}"
    keys = (f"data.dataset={__name__}:{name}", options, "data.test_options={}")
    with pytest.raises(UserError, match=says) as caught:
        train(job(shared_path, *keys), context, "never")
    assert "data.dataset = " in caught.value.what and caught.value.remedy
    assert context.on_root(lambda: list(shared_path.rglob("meta.json"))) == []


def test_with_the_number_of_classes_items_are_read_when_they_are_needed(context: Context, shared_path: Path) -> None:
    keys = (f"data.dataset={__name__}:Counted", "data.test_options={}", "train.global_batch=12", "train.steps=20")
    Counted.read.clear()
    with open_job(job(shared_path, *keys).config, context) as opened:
        assert opened.task.num_classes == 8
    everyone = context.all_gather(Counted.read)
    assert {row for rows in everyone for row in rows} == set(range(6000))
    stated = job(shared_path, *keys, "task.num_classes=3")
    Counted.read.clear()
    with open_job(stated.config, context) as opened:
        assert len(Counted.read) < 300  # the example, the samples that show the scale of the inputs, a first batch
        assert opened.task.batch(np.array([3, 4]), 0).targets.tolist() == [0, 1]
        with pytest.raises(UserError, match=r"train/targets: label 7 in row 41 is none of 0 to 2\n.*task\.num_classes"):
            opened.task.batch(np.array([3, 41]), 0)


def test_reading_all_items_for_their_targets_is_told_if_it_takes_long(context: Context, shared_path: Path) -> None:
    slow = job(shared_path, f"data.dataset={__name__}:Slow", "data.test_options={}", "data.threads=1").config
    with ThreadPoolExecutor(1) as pool:
        parts = [_open_part("train", {}, slow, pool, 1)]
        said = long_reading(parts, slow, context)
        assert re.search(r"Slow': all 1,000,000 items are read once for their targets, in about [\d.]+ (min|h)", said)
        assert said.endswith("task.num_classes leaves that out.")
    with open_job(job(shared_path, *DIGITS).config, context) as opened:
        assert opened.task.num_samples == 1500
        assert not long_reading(open_items(opened.config, context), opened.config, context)


def test_ranks_with_unlike_datasets_are_refused(context: Context, shared_path: Path) -> None:
    uneven = job(shared_path, f"data.dataset={__name__}:Uneven", "data.test_options={}")
    if context.world.size > 1:
        with pytest.raises(UserError, match=r"Uneven' has \[60\] items on rank 0, and other numbers on other ranks"):
            train(uneven, context, "never")


def test_options_that_a_dataset_does_not_have_are_named(context: Context, shared_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.test_options: .* refuses .*'trian'"):
        train(job(shared_path, *DIGITS, "data.test_options={trian = false}"), context, "never")
