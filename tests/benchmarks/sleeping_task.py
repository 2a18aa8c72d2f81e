"""A task that sleeps where others compute: ranks that share a core then compute as long as they would alone."""

from collections.abc import Iterator
from time import sleep
from typing import Any

import numpy as np
import torch
from torch import nn

from hpc_train.core.config import Config
from hpc_train.core.world import World
from hpc_train.train.comm.context import Context

LAYERS, WIDTH = 5, 512  # 5.3 MB of gradients
FORWARD_S, BACKWARD_S = 0.02, 0.04


class Sleeping:
    def __init__(self, config: Config, context: Context) -> None:
        self.num_samples = 4096

    def model(self) -> nn.Module:
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        for layer in model:
            layer.register_forward_pre_hook(lambda *_: sleep(FORWARD_S / LAYERS))
            layer.register_full_backward_pre_hook(lambda *_: sleep(BACKWARD_S / LAYERS))
        return model

    def batch(self, rows: np.ndarray, step: int) -> Any:
        return torch.ones(len(rows), WIDTH)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        total: torch.Tensor = model(batch).square().mean(1).sum()
        return total

    def test_batches(self, world: World) -> Iterator[Any]:
        yield from ()

    def test(self, model: nn.Module, batch: Any) -> tuple[int, dict[str, float]]:
        raise AssertionError("there is no test batch")
