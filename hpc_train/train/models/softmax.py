"""Softmax regression."""

from math import prod

import torch
from torch import nn


class Softmax(nn.Module):
    """One linear layer from the flattened input to the classes' logits; all weights begin as zero.

    Every class is then equally likely, so the first loss is ln(num_classes) for any data.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(prod(input_shape), num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, *input_shape) float -> logits (n, num_classes)."""
        return self.linear(inputs.flatten(1))
