"""The equal work of the peers' benchmark: models of this program, random data in memory, batches, optimizers.

Every contender trains the same model from the same weights on the same rows of the same data, in fp32 with one thread a
rank. Optimizers are plain, without weight decay, so that all have the same one: losses must agree.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hpc_train.core.sampling import BatchSampler, Order, Shares
from hpc_train.train.models.gpt import Gpt
from hpc_train.train.models.mlp import Mlp
from hpc_train.train.models.resnet import ResNet

SEED = 0
RANKS = 2
_CLASSES, _SHAPE, _PICTURE, _VOCABULARY, _CONTEXT = 10, (784,), (32, 32, 3), 256, 64


@dataclass(frozen=True)
class Work:
    """A training. block: steps of a turn, about a second; global_batch: of all ranks."""

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of a sample; () for tokens
    num_samples: int
    global_batch: int
    optimizer: str
    lr: float
    block: int

    def model(self) -> nn.Module:
        torch.manual_seed(SEED)
        return self.make()

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of all samples; of tokens, the windows and nothing."""
        noise = np.random.default_rng(SEED)
        if not self.shape:
            return noise.integers(0, _VOCABULARY, (self.num_samples, _CONTEXT + 1)), np.empty(0)
        inputs = noise.standard_normal((self.num_samples, *self.shape), np.float32)
        return inputs, noise.integers(0, _CLASSES, self.num_samples)

    def rows(self, rank: int, size: int, steps: int) -> Iterator[np.ndarray]:
        """This rank's samples of each step: those that `hpc-train train` takes."""
        sampler = BatchSampler(Order(self.num_samples), self.global_batch, SEED, Shares(size), rank)
        return (rows for rows, _ in sampler.batches(range(steps)))

    def new_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """torch's own optimizer, as peers use it."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), lr=self.lr)
        return torch.optim.AdamW(model.parameters(), lr=self.lr, betas=(0.9, 0.999), weight_decay=0.0)


WORKS = {
    "mlp": Work("MLP 10M", lambda: Mlp(_SHAPE, _CLASSES, (2048, 2048, 2048)), _SHAPE, 4096, 64, "sgd", 0.01, 12),
    "resnet": Work("ResNet-18", lambda: ResNet(_PICTURE, _CLASSES, 18, 64, "small"), _PICTURE, 512, 8, "sgd", 0.005, 3),
    "gpt": Work("GPT 10M", lambda: Gpt(_VOCABULARY, 6, 6, 384, _CONTEXT), (), 2048, 8, "adamw", 1e-4, 5),
}


class Data:
    """The samples in memory, and the loss of a batch of them."""

    def __init__(self, work: Work) -> None:
        self.inputs, self.targets = work.data()
        self._is_text = not work.shape

    def batch(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, targets) of these samples; of tokens, each target is the token after its input."""
        inputs = torch.from_numpy(self.inputs[rows])
        if self._is_text:
            return inputs[:, :-1], inputs[:, 1:]
        return inputs, torch.from_numpy(self.targets[rows])


def loss(model: Callable[[torch.Tensor], Any], batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The mean over the batch."""
    inputs, targets = batch
    return functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
