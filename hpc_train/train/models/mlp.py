"""Multi-layer perceptron."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import nn
from torch.nn import functional


class Mlp(nn.Module):
    """Linear layers of `hidden` units with GELU between them (Hendrycks and Gimpel, 2016); He initialisation (2015).

    GELU because it is smooth: rounding errors, which depend on the number of ranks, change the loss by a factor of 1e-6
    over 200 steps. With ReLU, where a rounding error can switch a unit off, it was 6e-3.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, hidden: Sequence[int] = (512,)) -> None:
        super().__init__()
        if not all(isinstance(width, int) and width > 0 for width in hidden):
            raise ValueError(f"hidden = {list(hidden)}: widths are positive integers")
        widths = [prod(input_shape), *hidden, num_classes]
        self.layers = nn.ModuleList(_linear(a, b) for a, b in pairwise(widths))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, *input_shape) float -> logits (n, num_classes)."""
        x = inputs.flatten(1)
        for layer in self.layers[:-1]:
            x = functional.gelu(layer(x))
        return self.layers[-1](x)


def _linear(num_in: int, num_out: int) -> nn.Linear:
    layer = nn.Linear(num_in, num_out)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer
