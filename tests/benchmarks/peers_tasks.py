"""Tasks by which `hpc-train train` takes part: the work of all contenders, and others to measure single costs with."""

import json
import os
from collections.abc import Iterator
from time import monotonic, perf_counter, sleep
from typing import Any

import numpy as np
import torch
from torch import nn

from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.tasks.classification import Classification
from tests.benchmarks.peers_gate import Gate
from tests.benchmarks.peers_work import WORKS, Data, loss

FIRST_STEP = "HPC_TRAIN_BENCH_FIRST_STEP"  # a file's name without the rank
COPIES = "HPC_TRAIN_BENCH_COPIES"  # a file


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
    """A state of `task.options.megabytes`, of tensors as large as a model's, of which steps use next to nothing.

    Where the environment names COPIES, the state is copied half-way between two checkpoints, too, into memory that is
    there and into new memory: [[seconds], [seconds]] are written there.
    """

    num_samples = 1 << 20
    in_step = True  # the loop itself makes batches: what that takes is not the checkpoint's stall
    _TENSOR_MB, _SLEEP_S = 16, 0.03

    def __init__(self, config: Config, context: Context) -> None:
        megabytes = int(config.task.options["megabytes"])  # type: ignore[arg-type]
        self._every = config.checkpoint.every_steps if COPIES in os.environ else 0
        self._large = [
            torch.full((self._TENSOR_MB * 10**6 // 4,), 1.0) for _ in range(-(-megabytes // self._TENSOR_MB))
        ]
        self._place = [torch.zeros_like(each) for each in self._large] if self._every else []
        self._step, self._copies = _Counted(), tuple[list[float], list[float]](([], []))

    def model(self) -> nn.Module:
        model = nn.Linear(8, 1)
        for number, values in enumerate(self._large):
            model.register_buffer(f"large{number}", values)
        return model

    def batch(self, rows: np.ndarray, step: int) -> Any:
        if self._every:
            sleep(self._SLEEP_S)
        if self._every and step % self._every == self._every // 2 and step > self._every:
            self._copy()
        return torch.ones(len(rows), 8)

    def _copy(self) -> None:
        began = perf_counter()
        for mine, place in zip(self._large, self._place, strict=True):
            place.copy_(mine)
        middle = perf_counter()
        copies = [each.clone() for each in self._large]
        ended = perf_counter()
        del copies
        self._copies[0].append(middle - began)
        self._copies[1].append(ended - middle)
        with open(os.environ[COPIES], "w") as file:
            json.dump(self._copies, file)

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
