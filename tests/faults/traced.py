"""A classification task that records its samples and causes faults on request.

Its settings come from the environment, so that the configuration stays that of an ordinary job:
  TRACE         folder: one file a process, one line a step with the time in ns and the rows of this rank
  TRACE_DELAY   seconds to wait in each step, so that a test can act meanwhile
  TRACE_DROPOUT probability of dropout in the model
  ACCIDENT      WHAT:STEP:RANK, e.g. nan:5:1 in the sixth step of the process on rank 1; see `_accidents`
  ELSEWHERE     name of the machine that this process takes itself to be on, when it looks at locks
  SLOW_SAVE     seconds that each sync of a checkpoint takes
  KILL_AT       FUNCTION:NUMBER, e.g. os.rename:1, kills the process before that call of it; os.rename:1:after, after it
  KILL_RANK     of KILL_AT; 0 without it
  KILL_IN_SAVE  calls of KILL_AT count from this save on
  FULL_DISK     RANK:SAVE, whose first write the disk refuses
"""

import errno
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hpc_train.core import lock
from hpc_train.core.settings import Config
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context
from hpc_train.train.data.dataset import Batch
from hpc_train.train.run.checkpoint import saver
from hpc_train.train.tasks.classification import Classification


class Traced(Classification):
    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self._rank = context.world.rank
        name = f"{time.time_ns()}-rank{self._rank}.txt"
        self._trace = (Path(os.environ["TRACE"]) / name).open("w") if "TRACE" in os.environ else None
        self._step = -1
        if "ELSEWHERE" in os.environ:
            lock._system = lambda: os.environ["ELSEWHERE"]
        if "KILL_AT" in os.environ and self._rank == int(os.environ.get("KILL_RANK", "0")):
            _kill_at(*os.environ["KILL_AT"].split(":"))
        if os.environ.get("FULL_DISK", "").startswith(f"{self._rank}:"):
            _refuse_writes(int(os.environ["FULL_DISK"].partition(":")[2]))
        if "SLOW_SAVE" in os.environ:
            _sync_slowly(float(os.environ["SLOW_SAVE"]))

    def model(self) -> nn.Module:
        dropout = nn.Dropout(float(os.environ.get("TRACE_DROPOUT", "0")))
        num_inputs = int(np.prod(self.train.input_shape))
        width = int(os.environ.get("TRACE_WIDTH", "64"))
        self._model = nn.Sequential(
            nn.Flatten(), nn.Linear(num_inputs, width), nn.GELU(), dropout, nn.Linear(width, self.num_classes)
        )
        return self._model

    def batch(self, rows: np.ndarray, step: int) -> Batch:
        self._step += 1
        if self._trace:
            self._trace.write(f"{time.time_ns()}:{','.join(map(str, rows))}\n")
            self._trace.flush()
        time.sleep(float(os.environ.get("TRACE_DELAY", "0")))
        if self._accident("exit"):
            sys.exit(0)
        if self._accident("hard-exit"):
            os._exit(5)
        if self._accident("stuck"):
            time.sleep(600)
        for kind, amount in (("weights", 1e-3), ("nan-weights", float("nan"))):
            if self._accident(kind):
                with torch.no_grad():
                    next(self._model.parameters()).add_(amount)
        return super().batch(rows, step)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        loss = super().loss(model, batch)
        if self._accident("inf-gradient"):
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return next((loss * float(kind) for kind in ("nan", "inf") if self._accident(kind)), loss)

    def test(self, model: nn.Module, batch: Batch) -> tuple[int, dict[str, float]]:
        num_samples, measures = super().test(model, batch)
        return num_samples, measures | ({"loss": float("nan")} if "nan-test" in os.environ.get("ACCIDENT", "") else {})

    def test_batches(self, world: World) -> Iterator[Batch]:
        if self._accident("stopped-in-test"):
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().test_batches(world)

    def _accident(self, kind: str) -> bool:
        what, _, rest = os.environ.get("ACCIDENT", "").partition(":")
        return what == kind and rest in (f"{self._step}:{self._rank}", f"always:{self._rank}")


def _sync_slowly(seconds: float) -> None:
    original = os.fsync

    def replaced(file: int) -> None:
        if threading.current_thread().name == "checkpoint":
            time.sleep(seconds)
        original(file)

    os.fsync = replaced


def _kill_at(function: str, number: str, when: str = "before") -> None:
    """Kills this process at a call of `function` by a thread that saves checkpoints, or by the one that makes them."""
    module_name, name = function.split(".")
    module: Any = {"os": os, "shutil": shutil, "torch": torch}[module_name]
    original = getattr(module, name)
    num_saves, calls = _count_saves(), 0

    def replaced(*words: Any, **options: Any) -> Any:
        nonlocal calls
        is_saving = threading.current_thread().name == "checkpoint" or name == "ftruncate"
        if is_saving and num_saves[0] >= int(os.environ.get("KILL_IN_SAVE", "0")):
            calls += 1
            if calls == int(number):
                if when == "after":
                    original(*words, **options)
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*words, **options)

    setattr(module, name, replaced)


def _refuse_writes(save: int) -> None:
    original, num_saves = os.pwrite, _count_saves()

    def replaced(*words: Any) -> int:
        if num_saves[0] == save and threading.current_thread().name == "checkpoint":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*words)

    os.pwrite = replaced


def _count_saves() -> list[int]:
    """One number: how many saves this rank has begun."""
    original, count = saver.write_parts, [0]

    def replaced(*words: Any) -> Any:
        count[0] += 1
        return original(*words)

    saver.write_parts = replaced
    return count
