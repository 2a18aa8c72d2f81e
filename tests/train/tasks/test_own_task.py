"""A user's own task: the README's works on any number of ranks, and a faulty one gives one message."""

import json
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from hpc_train.core import rundir
from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.records import read_metrics
from hpc_train.core.rundir import RunDir
from hpc_train.core.sampling import Order, regular_chunk_edges
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.setup import require_a_batch
from hpc_train.train.tasks import complete, open_task
from hpc_train.train.tasks.first_batch import check_is_sum, checked_loss
from tests import jobs

TESTS = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    """The README's task on 1 and on 2 ranks, from its own job file."""
    folder = tmp_path_factory.mktemp("own_task")
    (folder / "data").mkdir()
    (folder / "data/mnist-5k.h5").symlink_to(digits)
    for name in ("own_task.py", "own-task.toml"):
        shutil.copy(TESTS / name, folder)
    for ranks in (1, 2):
        keys = jobs.settings(train__steps=150, reduce__strategy="mpi")
        done = jobs.run(ranks, "train", "own-task.toml", *keys, cwd=folder)
        assert done.code == 0, done.err
        assert done.out.count("Test squared error: 0.0") == 1
    return rundir.find([folder])


def test_a_whole_task_is_less_than_thirty_lines() -> None:
    assert len((TESTS / "own_task.py").read_text().splitlines()) < 30


def test_it_learns_and_is_the_same_on_two_ranks(runs: list[RunDir], digits: Path) -> None:
    alone, together = ((np.array(read_metrics(run.metrics)[1])) for run in runs)
    np.testing.assert_allclose(alone, together, rtol=1e-4)
    with h5py.File(digits) as file:  # by hand: what the mean of all images would leave
        seen, unseen = (file[name][:].reshape(-1, 784)[:, 392:] / 255 for name in ("train/inputs", "test/inputs"))
    mean_image = ((unseen - seen.mean(axis=0)) ** 2).mean()
    errors = [json.loads(run.summary.read_text())["test"]["squared_error"] for run in runs]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4) and errors[0] < 0.8 * mean_image


MODULES = {
    "needs.py": ("import no_such_package\n", ["No module named 'no_such_package'", "needs.py:1"]),
    "raises.py": ("\n1 / 0\n", ["ZeroDivisionError: division by zero", "raises.py:2", "python -c 'import raises'"]),
    "syntax.py": ("\n\nclass Task\n", ["SyntaxError: expected ':'", "syntax.py:3"]),
    "value.py": ("int('ten')\n", ["ValueError: invalid literal for int()", "value.py:1"]),
    "deeper.py": ("import json\njson.loads('{')\n", ["JSONDecodeError", "deeper.py:2"]),
    "lacks.py": (
        "class Task:\n    def __init__(self, *args): 1 / 0\n    model = batch = loss = print\n",
        ["it has no test_batches and no test"],
    ),
    "counts.py": (
        "class Task:\n    def __init__(self, *args): pass\n    model = batch = loss = test_batches = test = print\n",
        ["it has no num_samples"],
    ),
    "none.py": (
        "class Task:\n    num_samples = 8\n    model = batch = test_batches = test = print\n    loss = None\n",
        ["it has no loss", "A task has num_samples, model, batch, loss"],
    ),
    "leaves.py": ("raise SystemExit(3)\n", ["leaves cannot be loaded: SystemExit: 3", "leaves.py:1"]),
    "calls.py": ("def Task(config, context): 1 / 0\n", ["calls has no class Task"]),
    "other.py": ("class task: pass\n", ["other has no class Task", "after the colon"]),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_does_not_load_is_told_with_its_own_error_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text, words = MODULES[name]
    kind = write_job(tmp_path, name, text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UserError) as caught:
        open_task(load(tmp_path / "job.toml").config, Context(World()))
    for word in (f"task.kind = '{kind}'", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    ["os:system", "os:_exit", "builtins:exit", "builtins:print", "shutil:rmtree", "subprocess:Popen", "os:environ"],
)
def test_what_is_no_task_is_never_called(kind: str) -> None:
    config = load(TESTS / "own-task.toml", (f"task.kind={kind}",)).config
    with pytest.raises(UserError, match=r"has no (class|model)") as caught:
        open_task(config, Context(World()))
    assert f"task.kind = '{kind}'" in caught.value.what


def test_that_is_one_message_of_one_rank(tmp_path: Path) -> None:
    write_job(tmp_path, "raises.py", MODULES["raises.py"][0])
    done = jobs.run(2, "train", "job.toml", cwd=tmp_path)
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err, done.err
    assert done.err.count("hpc-train: ") == 1 and f"{tmp_path / 'raises.py'}:2" in done.err
    assert not (tmp_path / "runs").exists()


def test_a_batch_that_does_not_fit_is_one_message_of_one_rank(tmp_path: Path, digits: Path) -> None:
    faulty = (TESTS / "own_task.py").read_text().replace("nn.Linear(392, 256)", "nn.Linear(784, 256)")
    (tmp_path / "own_task.py").write_text(faulty)
    keys = jobs.settings(data__file=digits, reduce__strategy="mpi")
    done = jobs.run(2, "train", TESTS / "own-task.toml", *keys, cwd=tmp_path)
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err, done.err
    assert done.err.count("hpc-train: ") == 1 and not list(tmp_path.rglob("metrics.csv"))
    for word in (
        "task.kind = 'own_task:LowerHalf'",
        "(64x392 and 784x256)",
        "0.weight is (256, 784)",
        "own_task.py:23",
    ):
        assert word in done.err


def write_job(folder: Path, name: str, text: str) -> str:
    """Writes the module `name` and a job that names its Task; returns task.kind."""
    kind = f"{name.removesuffix('.py')}:Task"
    (folder / name).write_text(text)
    (folder / "job.toml").write_text(f'name = "x"\n[task]\nkind = "{kind}"\n[train]\nsteps = 2\nglobal_batch = 4\n')
    return kind


@dataclass(frozen=True)
class Batch:
    inputs: torch.Tensor
    targets: torch.Tensor
    scale: float = 1.0


def first_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch.inputs), batch.targets, reduction="sum")


def tried(model: nn.Module, batch: object, loss: object = first_loss) -> torch.Tensor:
    return checked_loss(load(TESTS / "own-task.toml").config, SimpleNamespace(loss=loss), model, batch)  # type: ignore[arg-type]


def test_a_batch_that_fits_gives_its_loss() -> None:
    model, batch = nn.Linear(3, 2), Batch(torch.ones(4, 3), torch.tensor([0, 1, 1, 0]))
    assert torch.equal(tried(model, batch), first_loss(model, batch))


@pytest.mark.parametrize(
    "inputs, targets, words",
    [
        ((4, 3), [0] * 4, ["mat1 and mat2 shapes cannot be multiplied (4x3 and 784x10)"]),
        ((4, 784), [0] * 3, ["to match target batch_size (3)", "targets: int64 (3,)"]),
        ((4, 784), [0, 1, 2, 10], ["Target 10 is out of bounds"]),
        ((4, 784), [0.0] * 4, ["targets: float32 (4,)"]),
    ],
)
def test_a_batch_that_does_not_fit_the_model_is_named_with_both_shapes(
    inputs: tuple[int, ...], targets: list[float], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        tried(nn.Linear(784, 10), Batch(torch.zeros(inputs), torch.tensor(targets)))
    what = str(caught.value)
    for word in (*words, "task.kind = 'own_task:LowerHalf', task.model = 'softmax'", f"inputs: float32 {inputs}"):
        assert word in what, what
    assert "model: Linear, whose first weight weight is (10, 784)" in what and "Task.batch and Task.loss" in what
    assert f"{Path(__file__).name}:" in what, "where the user's own code is"


@pytest.mark.parametrize(
    "loss, words",
    [
        (lambda model, batch: model(batch).square(), "the loss is float32 (2, 10), and not a differentiable number"),
        (lambda model, batch: model(batch).sum().item(), "the loss is "),
        (lambda model, batch: model(batch).sum().detach(), "not a differentiable number"),
    ],
)
def test_a_loss_that_cannot_be_trained_on_is_refused(loss: object, words: str) -> None:
    with pytest.raises(UserError) as caught:
        tried(nn.Linear(784, 10), torch.zeros(2, 784), loss)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "loss, is_mean",
    [
        (first_loss, False),
        (lambda model, batch: nn.functional.cross_entropy(model(batch.inputs), batch.targets), True),
        (lambda model, batch: first_loss(model, batch) / 7, False),
        (lambda model, batch: model(batch.inputs[:32]).sum() / len(batch.inputs), True),
        (lambda model, batch: model(batch.inputs)[31].sum(), False),  # which no part has
    ],
)
@pytest.mark.parametrize("num", [32, 5])
def test_a_mean_over_samples_is_told_from_a_sum(loss: Any, is_mean: bool, num: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    batch = Batch(torch.rand(num, 3), torch.arange(num) % 2)
    config = load(TESTS / "own-task.toml").config
    with pytest.raises(UserError, match=r"its loss is a mean over samples") if is_mean else nullcontext():
        check_is_sum(config, SimpleNamespace(loss=loss), model, batch, num)
    assert model.training


def test_a_task_with_a_mean_is_refused_before_the_first_step(tmp_path: Path, digits: Path) -> None:
    faulty = (TESTS / "own_task.py").read_text().replace(".mean(dim=1).sum()", ".mean()")
    (tmp_path / "own_task.py").write_text(faulty)
    done = jobs.run(
        2, "train", TESTS / "own-task.toml", *jobs.settings(data__file=digits, reduce__strategy="mpi"), cwd=tmp_path
    )
    assert done.code == 2 and 'reduction="sum"' in done.err and "Traceback" not in done.err, done.err
    assert not list(tmp_path.rglob("metrics.csv"))


@pytest.mark.parametrize(
    "returned, words",
    [
        ('{"squared_error": 1.0}', ["its test returned dict"]),
        ("1 // 0, {}", ["its test fails: ZeroDivisionError: ", "own_task.py:29"]),
        ('len(batch[0]), {"squared_error": None}', ["its test returned squared_error = None"]),
    ],
)
def test_a_test_that_fails_is_one_message_after_the_checkpoint(
    tmp_path: Path, digits: Path, returned: str, words: list[str]
) -> None:
    right = 'return len(batch[0]), {"squared_error": self.loss(model, batch).item()}'
    own = (TESTS / "own_task.py").read_text()
    assert right in own
    (tmp_path / "own_task.py").write_text(own.replace(right, f"return {returned}"))
    keys = {"data__file": digits, "reduce__strategy": "mpi", "train__steps": 2}
    done = jobs.run(2, "train", TESTS / "own-task.toml", *jobs.settings(**keys), cwd=tmp_path)
    assert done.code == 2 and "Traceback" not in done.err, done.err
    for word in ("task.kind = 'own_task:LowerHalf'", *words, "(number of samples, {name: sum over them})"):
        assert word in done.err
    assert list(tmp_path.glob("runs/*/*/checkpoints/step-*"))
    (tmp_path / "own_task.py").write_text(own)
    again = jobs.run(2, "train", TESTS / "own-task.toml", *jobs.settings(**keys), "--resume", "auto", cwd=tmp_path)
    assert again.code == 0 and len(list(tmp_path.glob("runs/*/*/summary.json"))) == 1, again.err


def test_a_task_without_samples_is_told_so() -> None:
    config = load(TESTS / "own-task.toml").config
    with pytest.raises(UserError, match=r"num_samples = 0: there are no samples to train on"):
        require_a_batch(config, 64, 0)


def test_other_faults_of_a_task_keep_their_own_type() -> None:
    def faulty(model: nn.Module, batch: object) -> torch.Tensor:
        raise KeyError("a fault of the task")

    with pytest.raises(KeyError):
        tried(nn.Linear(784, 10), torch.zeros(2, 784), faulty)


class Least:
    """Only the required members."""

    num_samples = 7
    model = batch = loss = test_batches = test = None


@dataclass(frozen=True)
class Frozen:
    num_samples: int = 7


class Replaying(Least):
    """Delegates the members that it lacks to another object, as a wrapper of a shipped task may."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.inner = SimpleNamespace(order=Order(7, regular_chunk_edges(7, 2)), prefetch=print, reading=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def state(self) -> dict[str, Any]:
        return self.kept

    def load_state(self, state: dict[str, Any]) -> None:
        self.kept = state


@pytest.mark.parametrize("make", [Least, Frozen])
def test_a_task_gets_the_defaults_of_the_members_it_lacks(make: type) -> None:
    task = complete(make())
    assert task.order.chunk_edges is None and task.order.num_samples == 7 and task.reading is None
    assert not task.in_step and not task.keeps_state and task.state() == {}
    task.prefetch(np.arange(3))
    task.load_state({})
    assert complete(task) is task


def test_a_task_keeps_the_members_it_has() -> None:
    task: Any = complete(Replaying())
    assert task.order is task.inner.order and task.prefetch is print and task.keeps_state and task.reading is None
    task.load_state({"x": 1})
    assert task.state() == {"x": 1}
