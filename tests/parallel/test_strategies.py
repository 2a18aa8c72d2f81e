"""Strategies on equal work: the same losses, resumed to the bit, and what each is for."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, nn

from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from hpc_train.core.rundir import RunDir
from hpc_train.core.signals import CONTINUE
from hpc_train.core.timing_log import read_timings
from hpc_train.train.comm.context import Context
from hpc_train.train.initial_weights import build
from hpc_train.train.loop import train
from hpc_train.train.models.mlp import Mlp
from hpc_train.train.tasks.classification import Classification
from tests import checkpoints
from tests.parallel.test_train import CONFIGS, losses, losses_alone, run

SMALL = {"task__options": "{hidden=[64]}", "train__threads": 1}


def keys_of(strategy: str, size: int) -> dict[str, object]:
    """The keys of "parameter_server 2", a strategy with its servers, or of "sharded 3", one with its stage.

    A test is skipped where the ranks are too few.
    """
    name, _, number = strategy.partition(" ")
    if name == "sharded":
        return {"reduce__strategy": name, "reduce__stage": int(number)}
    if number and size <= int(number):
        pytest.skip(f"{size} ranks are too few for {strategy}")
    return {"reduce__strategy": name, **({"reduce__servers": int(number)} if number else {})}


SPREAD = ["sharded 1", "sharded 2", "sharded 3", "parameter_server 1", "parameter_server 2"]


@pytest.mark.parametrize("strategy", ["horovod", "mpi", "torch", *SPREAD])
def test_losses_are_those_of_one_process(context: Context, shared_path: Path, digits: Path, strategy: str) -> None:
    """With accumulated, clipped gradients and a learning rate that changes; last batches of 176 are uneven on 3."""
    keys = {**SMALL, "train__steps": 40, "train__accumulate": 2, "train__clip_norm": 0.7, "train__schedule": "cosine"}
    keys |= {"train__lr_warmup_steps": 5, "train__weight_decay": 1e-3}
    together = losses(
        run(context, shared_path, digits, "mlp-mnist.toml", **keys, **keys_of(strategy, context.world.size))
    )
    alone = context.on_root(lambda: losses_alone(digits, "mlp-mnist.toml", tuple(keys.items())))
    assert np.abs(together / alone - 1).max() < 1e-5


@pytest.mark.parametrize("strategy", ["horovod", "torch", *SPREAD])
def test_a_prolonged_run_is_a_long_one_to_the_bit(
    context: Context, shared_path: Path, digits: Path, strategy: str
) -> None:
    """A checkpoint holds the optimizer's state whole, so that any other strategy could resume from it."""
    keys = {**SMALL, "train__optimizer": "adamw", "train__lr": 0.001, **keys_of(strategy, context.world.size)}
    whole = run(context, shared_path / "whole", digits, "mlp-mnist.toml", train__steps=8, **keys)
    begun = run(context, shared_path / "begun", digits, "mlp-mnist.toml", train__steps=5, **keys)
    context.on_root(begun.summary.unlink)
    more = {**keys, "train__steps": 8, "data__file": digits, "run__root": shared_path / "begun"}
    settings = tuple(f"{key.replace('__', '.')}={value}" for key, value in more.items())
    assert train(load(CONFIGS / "mlp-mnist.toml", settings), context, str(begun.path)) == 0
    context.barrier()
    ours, theirs = (checkpoints.state(each.checkpoint(8)) for each in (begun, whole))
    assert losses(begun).tolist() == losses(whole).tolist()
    for part in ("model", "optimizer"):
        assert ours[part].keys() == theirs[part].keys()
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    assert set(ours["optimizer"]) == set(ours["model"]), "by names of parameters, whatever the strategy"
    for name, kept in theirs["optimizer"].items():
        assert all(torch.equal(ours["optimizer"][name][key], value) for key, value in kept.items())
        assert kept["exp_avg"].shape == ours["model"][name].shape and kept["step"].item() == 8


def test_the_optimizers_state_is_divided_among_the_ranks(context: Context, shared_path: Path, digits: Path) -> None:
    keys = {**SMALL, "train__steps": 3, "train__optimizer": "adamw"}
    memory = {}
    for strategy in ("horovod", "sharded"):
        made = run(context, shared_path / strategy, digits, "mlp-mnist.toml", reduce__strategy=strategy, **keys)
        memory[strategy] = json.loads(made.meta.read_text())["optimizer_bytes"]
    assert len(memory["horovod"]) == context.world.size
    for whole, part in zip(memory["horovod"], memory["sharded"], strict=True):
        assert part == pytest.approx(whole / context.world.size, rel=0.01), "both moments, and little more"


class Stops(Classification):
    """Requests a stop on the last rank that trains, in its 4th step."""

    def batch(self, rows: np.ndarray, step: int) -> Any:
        if step == 4 and self.rank == self.size - 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return super().batch(rows, step)

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.rank, self.size = context.world.rank, context.world.size


@pytest.mark.parametrize("servers", [1, 2])
def test_asynchronous_workers_train_and_all_stop_after_the_same_step(
    context: Context, shared_path: Path, digits: Path, servers: int
) -> None:
    keys: dict[str, object] = {**SMALL, **keys_of(f"parameter_server {servers}", context.world.size)}
    keys |= {"reduce__asynchronous": "true", "train__momentum": 0, "data__file": digits, "run__root": shared_path}
    keys |= {"train__steps": 30, "task__kind": f"{__name__}:Stops"}
    settings = tuple(f"{key.replace('__', '.')}={value}" for key, value in keys.items())
    assert train(load(CONFIGS / "mlp-mnist.toml", settings), context, "never") == CONTINUE
    made = RunDir(context.on_root(lambda: next(shared_path.glob("mlp-mnist/*"))))
    steps = context.all_gather(read_timings(made.timings(context.world.rank))["step"].tolist())
    assert len({tuple(each) for each in steps}) == 1 and 5 <= len(steps[0]) < 30, "workers and servers alike"
    assert made.checkpoint(len(steps[0])).exists()
    assert train(load(CONFIGS / "mlp-mnist.toml", settings), context, str(made.path)) in (0, CONTINUE)
    assert losses(made)[-1] < 0.5 * losses(made)[0]


@pytest.mark.parametrize(
    "keys, most",
    [
        ({"reduce__compression": "fp16"}, 1e-3),
        ({"reduce__compression": "bf16"}, 1e-2),
        ({"reduce__compression": "bf16", "reduce__strategy": "mpi"}, 1e-2),
        ({"train__precision": "bf16"}, 2e-2),
        ({"train__precision": "fp16", "reduce__strategy": "sharded"}, 1e-2),
        ({"reduce__fusion_threshold_mb": 64}, 1e-5),
    ],
)
def test_less_exact_ways_stay_near(
    context: Context, shared_path: Path, digits: Path, keys: dict[str, object], most: float
) -> None:
    if context.world.size == 1 and "train__precision" not in keys:
        pytest.skip("one rank sends nothing")
    near = losses(run(context, shared_path, digits, "mlp-mnist.toml", **SMALL, train__steps=20, **keys))
    exact = context.on_root(lambda: losses_alone(digits, "mlp-mnist.toml", (*SMALL.items(), ("train__steps", 20))))
    difference = np.abs(near / exact - 1).max()
    assert difference < most
    if "reduce__fusion_threshold_mb" not in keys:
        assert difference > 0, "the shorter numbers were really used"


ALL = ["horovod", "mpi", "torch", *SPREAD]


class Overflows(Classification):
    """In its 4th step, on the last rank that trains, a gradient is infinite, and the loss is not."""

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        self.is_last, self.now = context.world.rank == context.world.size - 1, False

    def batch(self, rows: np.ndarray, step: int) -> Any:
        self.now = step == 4 and self.is_last
        return super().batch(rows, step)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        loss = super().loss(model, batch)
        if self.now:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss


@pytest.mark.parametrize(
    "strategy, keys",
    [
        *((strategy, {}) for strategy in (*ALL, "mpi fp16", "horovod bf16")),
        *(
            (strategy, {"train__clip_norm": 0.5})
            for strategy in ("mpi", "sharded 1", "sharded 3", "parameter_server 2")
        ),
        *((strategy, {"train__precision": "fp16"}) for strategy in ("horovod", "sharded 1", "sharded 3")),
        ("mpi", {"train__accumulate": 2}),
    ],
)
def test_an_infinite_gradient_is_left_out_by_all_ranks_alike(
    context: Context, shared_path: Path, digits: Path, strategy: str, keys: dict[str, object]
) -> None:
    name, _, compression = strategy.partition(" ")
    if name in ("parameter_server", "sharded"):
        keys = keys_of(strategy, context.world.size) | keys
    else:
        keys = {"reduce__strategy": name, "reduce__compression": compression or "none"} | keys
        keys["train__check_weights_every"] = 1
    keys = {**SMALL, "train__steps": 8, "train__optimizer": "adamw", "train__lr": 0.001, **keys}
    keys |= {"task__kind": f"{__name__}:Overflows"}
    made = run(context, shared_path, digits, "mlp-mnist.toml", train__on_nonfinite="skip", **keys)
    found = losses(made)
    assert len(found) == 8 and np.isfinite(found).all() and found[-1] < found[0]
    state = checkpoints.state(made.checkpoint(8))
    assert all(
        kept["step"].item() == 7 and torch.isfinite(kept["exp_avg"]).all() for kept in state["optimizer"].values()
    )
    if "train__precision" in keys:
        return  # a smaller scale is the answer there
    with pytest.raises(UserError, match="step 4: a gradient is not finite"):
        run(context, shared_path / "stopped", digits, "mlp-mnist.toml", **keys)
    stopped = RunDir(context.on_root(lambda: next((shared_path / "stopped").glob("mlp-mnist/*"))))
    assert stopped.checkpoint(4).exists()


class Faint(Classification):
    """Its loss is a 1e-9th of what it should be, and so are its gradients."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model, batch) * 1e-9


@pytest.mark.parametrize("strategy", ["horovod", "mpi", "torch"])
@pytest.mark.parametrize("compression", ["fp16", "bf16"])
def test_small_gradients_arrive_in_16_bits_as_large_ones_do(
    context: Context, shared_path: Path, digits: Path, strategy: str, compression: str
) -> None:
    keys = {**SMALL, "train__steps": 20, "reduce__strategy": strategy, "reduce__compression": compression}
    usual = losses(run(context, shared_path / "usual", digits, "mlp-mnist.toml", train__lr=0.1, **keys))
    keys |= {"task__kind": f"{__name__}:Faint", "train__lr": 0.1 * 1e9}
    faint = losses(run(context, shared_path / "faint", digits, "mlp-mnist.toml", **keys))
    assert np.abs(faint * 1e9 / usual - 1).max() < 1e-2 and usual[-1] < 0.8 * usual[0]


def test_adasum(context: Context, shared_path: Path, digits: Path) -> None:
    keys = {**SMALL, "train__steps": 20, "reduce__adasum": "true"}
    if context.world.size & (context.world.size - 1):
        with pytest.raises(UserError, match="no power of two"):
            run(context, shared_path, digits, "mlp-mnist.toml", **keys)
        return
    made = losses(run(context, shared_path, digits, "mlp-mnist.toml", **keys))
    assert made[-1] < 0.5 * made[0]


def test_too_few_ranks_for_the_servers(context: Context, shared_path: Path, digits: Path) -> None:
    keys = {"reduce__strategy": "parameter_server", "reduce__servers": 4}
    with pytest.raises(UserError, match=r"reduce\.servers = 4 would serve, and none train"):
        run(context, shared_path, digits, "mlp-mnist.toml", **SMALL, train__steps=2, **keys)


@pytest.mark.parametrize("strategy", ["horovod", "mpi", *SPREAD])
def test_a_run_begins_with_the_weights_of_its_seed(
    context: Context, shared_path: Path, digits: Path, strategy: str
) -> None:
    """Weights before the first step: a learning rate of (almost) 0 leaves them as they were drawn."""
    keys = {**SMALL, "train__steps": 1, "train__lr": 1e-30, "train__weight_decay": 0.0, "seed": 11}
    made = run(context, shared_path, digits, "mlp-mnist.toml", **keys, **keys_of(strategy, context.world.size))
    kept = checkpoints.state(made.checkpoint(1))["model"]
    alone = build(lambda: Mlp((28, 28), 10, hidden=[64]), 11)
    for name, value in kept.items():
        assert torch.allclose(value, alone.draw(name), rtol=0, atol=1e-25), name


class OwnGroup(Classification):
    """Starts torch.distributed for itself, as a task with DistributedDataParallel in mind would."""

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context)
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)


def test_a_task_that_has_started_torch_distributed_is_named(context: Context, shared_path: Path, digits: Path) -> None:
    if context.world.size == 1:
        pytest.skip("one rank sends nothing")
    keys = {**SMALL, "train__steps": 1, "reduce__strategy": "torch", "task__kind": f"{__name__}:OwnGroup"}
    try:
        with pytest.raises(UserError, match=r"started torch\.distributed itself"):
            run(context, shared_path, digits, "mlp-mnist.toml", **keys)
    finally:
        distributed.destroy_process_group()
