"""The gate between turns: each rank of each contender waits at its own for the next block of steps.

Waiting is a blocking read of a FIFO, and the benchmark stops the processes besides (SIGSTOP): threads that never rest,
as Horovod's, take nothing from the contender whose turn it is. There is no barrier in it that would spin.
"""

import json
import os
from pathlib import Path
from time import perf_counter
from typing import IO

import torch

FOLDER, PLACE = "HPC_TRAIN_BENCH_GATE", "HPC_TRAIN_BENCH_PLACE"


class Gate:
    """Of one rank. `step(number)` at the same point of every step: a block's time is from opening to the next gate."""

    def __init__(self, rank: int, block: int) -> None:
        """rank: which gate of this contender, unless the environment says so."""
        self._place = int(os.environ.get(PLACE, rank))
        self._block, self._began_s = block, 0.0
        self._go: IO[str] | None = None

    def step(self, number: int, loss: torch.Tensor | None = None) -> None:
        """loss: of the step before, told after the time was taken."""
        if number % self._block:
            return
        seconds = perf_counter() - self._began_s
        if self._go is None:
            self._open()
            self._tell({"pid": os.getpid()})
        else:
            self._tell({"seconds": seconds, "loss": None if loss is None else float(loss)})
        if not self._go.readline():  # type: ignore[union-attr]
            raise SystemExit("the benchmark has ended")
        self._began_s = perf_counter()

    def _open(self) -> None:
        folder = Path(os.environ[FOLDER])
        self._said = (folder / f"said-{self._place}").open("w", buffering=1)
        self._go = (folder / f"go-{self._place}").open()

    def _tell(self, words: dict[str, object]) -> None:
        self._said.write(json.dumps(words) + "\n")
