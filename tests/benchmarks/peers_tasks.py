"""Tasks by which `hpc-train train` takes part: the work of all contenders, and others to measure single costs with."""

import json
import os
from collections.abc import Iterator
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import nn

from hpc_train.config import Config
from hpc_train.train.context import Context
from hpc_train.train.tasks.classification import Classification
from hpc_train.world import World
from tests.benchmarks.peers_gate import Gate
from tests.benchmarks.peers_work import WORKS, Data, loss

FIRST_STEP = "HPC_TRAIN_BENCH_FIRST_STEP"  # a file's name without the rank


class _Counted:
    """Which step the loop is in, by its calls of `loss`: the first is the try before the loop."""

    def __init__(self) -> None:
        self._calls = -1

    def next(self) -> int:
        self._calls += 1
        return self._calls - 1


class InMemory:
    """`task.model` of `WORKS`, on data in memory, with a gate before each block of steps."""

    def __init__(self, config: Config, context: Context) -> None:
        self._work = WORKS[config.task.model]
        self._data, self.num_samples = Data(self._work), self._work.num_samples
        self._gate, self._step = Gate(context.world.rank, int(config.task.options["block"])), _Counted()  # type: ignore[arg-type]

    def model(self) -> nn.Module:
        return self._work.model()

    def batch(self, rows: np.ndarray, step: int) -> Any:
        return self._data.batch(rows)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if (step := self._step.next()) >= 0:
            self._gate.step(step)
        return loss(model, batch) * len(batch[0])

    def test_batches(self, world: World) -> Iterator[Any]:
        return iter(())

    def test(self, model: nn.Module, batch: Any) -> tuple[int, dict[str, float]]:
        raise AssertionError("there is nothing to test on")


class FromFile(Classification):
    """Pictures from HDF5 as every job has them, with a gate before each block of steps."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self._gate, self._step = Gate(context.world.rank, config.train.log_every), _Counted()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if (step := self._step.next()) >= 0:
            self._gate.step(step)
        return super().loss(model, batch)


class Started(Classification):
    """A shipped job that writes down when its first step began."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self._rank, self._step = context.world.rank, _Counted()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if self._step.next() == 0:
            note_first_step(self._rank)
        return super().loss(model, batch)


class Large:
    """A state of `task.options.megabytes`, of tensors as large as a model's, of which steps use next to nothing."""

    num_samples = 1 << 20
    _TENSOR_MB = 16

    def __init__(self, config: Config, context: Context) -> None:
        self._num_tensors = max(1, int(config.task.options["megabytes"]) // self._TENSOR_MB)  # type: ignore[arg-type]
        self._step = _Counted()

    def model(self) -> nn.Module:
        model = nn.Linear(8, 1)
        for number in range(self._num_tensors):
            model.register_buffer(f"large{number}", torch.full((self._TENSOR_MB * 10**6 // 4,), float(number)))
        return model

    def batch(self, rows: np.ndarray, step: int) -> Any:
        return torch.ones(len(rows), 8)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if self._step.next() == 0 and FIRST_STEP in os.environ:
            note_first_step(0)
        return model(batch).square().sum()

    def test_batches(self, world: World) -> Iterator[Any]:
        return iter(())

    def test(self, model: nn.Module, batch: Any) -> tuple[int, dict[str, float]]:
        raise AssertionError("there is nothing to test on")


def note_first_step(rank: int) -> None:
    with open(f"{os.environ[FIRST_STEP]}-{rank}", "w") as file:
        json.dump(monotonic(), file)
