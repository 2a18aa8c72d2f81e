"""Optimizers and schedules of other packages, by their import path."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpc_train.core import rundir
from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.records import read_metrics
from hpc_train.core.settings import Train
from hpc_train.train.optimize import Optimizer, learning_rate, optimizer_misfit
from hpc_train.train.reduce.sharded_weights import whole_parameters
from tests import jobs

HERE = __name__


def halves(step: int, num_steps: int) -> float:
    return 1.0 if 2 * step < num_steps else 0.5


def endless(step: int, num_steps: int) -> float:
    return float("inf")


def of_step(step: int) -> float:
    return 1.0


def breaks(step: int, num_steps: int) -> float:
    return 1 / step


class OfMine(torch.optim.Optimizer):
    """As docs/how-to/models.md promises: its step() takes no closure."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for each in group["params"]:
                    each -= group["lr"] * each.grad


class Broken(OfMine):
    def __init__(self, params: Any, lr: float) -> None:
        raise RuntimeError("boom")


def settings(**keys: object) -> Train:
    return Train.model_validate({"steps": 10, "global_batch": 8, "lr": 0.1, **keys})


def steps(train: Train, num: int, model: nn.Module, optimizer: Optimizer | None = None) -> Optimizer:
    made = optimizer or Optimizer(train, whole_parameters(model), 8, lambda value: value)
    for _ in range(num):
        for each in model.parameters():
            each.grad = each.detach().square() + 1
        made.step(0)
    return made


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.mark.parametrize(
    "path, options", [("torch.optim:NAdam", {"betas": [0.8, 0.9]}), ("torch.optim:SGD", {"momentum": 0.9})]
)
def test_it_is_the_packages_with_decay_of_matrices_alone(path: str, options: dict[str, Any]) -> None:
    ours, theirs = linear(), linear()
    steps(settings(optimizer=path, optimizer_options=options, weight_decay=0.1, rates={"bias": 2.0}), 3, ours)
    groups = [{"params": [theirs.weight]}, {"params": [theirs.bias], "weight_decay": 0.0, "lr": 0.2}]
    torchs = getattr(torch.optim, path.partition(":")[2])(groups, lr=0.1, weight_decay=0.1, **options)
    for _ in range(3):
        for each in theirs.parameters():
            each.grad = each.detach().square() + 1
        torchs.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_one_of_the_users_own_needs_no_closure() -> None:
    ours, theirs = linear(), linear()
    steps(settings(optimizer=f"{HERE}:OfMine"), 3, ours)
    steps(settings(optimizer="sgd", momentum=0.0), 3, theirs)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-6)


def test_it_continues_from_its_state_to_the_bit() -> None:
    train = settings(optimizer="torch.optim:NAdam")
    whole, parts = linear(), linear()
    steps(train, 5, whole)
    state = steps(train, 2, parts).state()
    assert optimizer_misfit(state, train, dict(parts.named_parameters())) is None
    again = Optimizer(train, whole_parameters(parts), 8, lambda value: value)
    again.load(state)
    steps(train, 3, parts, again)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert again.num_bytes > 2 * sum(each.nbytes for each in parts.parameters())


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"optimizer": "torch.optim:Nothing"}, ("torch.optim has no class of torch.optim.Optimizer Nothing",)),
        ({"optimizer": "torch.nn:Linear"}, ("is no class of torch.optim.Optimizer", "'torch.optim:NAdam'")),
        ({"optimizer": "torch.optim:LBFGS"}, ("computes the loss several times a step", "takes no closure")),
        ({"optimizer": "torch.optim:Adafactor"}, ("keeps row_var of weight as (2, 1)", "Name another optimizer")),
        ({"optimizer": "torch.optim:Rprop", "weight_decay": 0.1}, ("train.weight_decay = 0.1", "has none")),
        (
            {"optimizer": "torch.optim:NAdam", "optimizer_options": {"beta": 1}},
            ("train.optimizer_options = {'beta': 1}: torch.optim:NAdam refuses them",),
        ),
        ({"optimizer": f"{HERE}:Broken"}, (f"{HERE}:Broken cannot be made: RuntimeError: boom, at {__file__}:",)),
        ({"schedule": f"{HERE}:of_step"}, ("of_step() takes 1 positional argument", "of (step, number of steps)")),
        ({"schedule": f"{HERE}:breaks"}, ("for step 0 of 10: ZeroDivisionError", f"at {__file__}:")),
        ({"schedule": "torch.optim.lr_scheduler:StepLR"}, ("StepLR' is a class", "of (step, number of steps)")),
        ({"schedule": f"{HERE}:HERE"}, ("is a value", "of (step, number of steps)")),
        ({"schedule": f"{HERE}:endless"}, ("gives inf for step 0 of 10", "a function of (step, number of steps)")),
    ],
)
def test_what_cannot_be_used_is_told(keys: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        steps(settings(**keys), 1, linear())
    for word in words:
        assert word in str(caught.value)


def test_a_schedule_multiplies_the_rate_after_the_warm_up() -> None:
    train = settings(schedule=f"{HERE}:halves", lr_warmup_steps=2)
    rates = [learning_rate(train, step, 8) for step in range(10)]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05])


@pytest.mark.parametrize(
    "override, words",
    [
        ("reduce.strategy=sharded", "may need whole layers, which reduce.strategy = 'sharded' cuts"),
        (
            "train.optimizer=adamw",
            "train.optimizer_options = {'momentum_decay': 0.1} is for optimizers of other packages",
        ),
        ("train.optimizer=adam", "train.optimizer = 'adam'"),
    ],
)
def test_keys_that_do_not_go_with_it(override: str, words: str) -> None:
    keys = ("train.optimizer=torch.optim:NAdam", "train.optimizer_options={momentum_decay = 0.1}", override)
    with pytest.raises(UserError) as caught:
        load(jobs.CONFIGS / "mlp-mnist.toml", keys)
    assert words in str(caught.value)


def test_a_resumed_run_is_the_run_in_one_go(digits: Path, tmp_path: Path) -> None:
    keys: dict[str, object] = {"data__file": digits, "train__global_batch": 12, "train__schedule": "constant"}
    keys |= {"train__optimizer": "torch.optim:NAdam", "train__lr": 0.002, "task__options": "{hidden = [8]}"}
    keys |= {"reduce__strategy": "mpi"}

    def train(folder: Path, num_steps: int, *words: object) -> list[float]:
        settings = jobs.settings(run__root=folder, train__steps=num_steps, **keys)
        done = jobs.run(2, "train", "configs/mlp-mnist.toml", *settings, *words, cwd=jobs.ROOT)
        assert done.code == 0, done.err
        (run,) = rundir.find([folder])
        return list(read_metrics(run.metrics)[1])

    once = train(tmp_path / "once", 6)
    train(tmp_path / "twice", 3)
    (run,) = rundir.find([tmp_path / "twice"])
    assert train(tmp_path / "twice", 6, "--resume", run.path) == once and len(once) == 6
