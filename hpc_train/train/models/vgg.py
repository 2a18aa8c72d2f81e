"""VGG: deep stacks of small convolutions."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from hpc_train.train.models.images import BatchNorm, image_layout, initialise_convolutions

_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class Vgg(nn.Module):
    """VGG-11, 13, 16 and 19, configurations A, B, D and E (Simonyan and Zisserman, "Very Deep Convolutional Networks
    for Large-Scale Image Recognition", 2015).

    depth: layers with weights. On images of 224x224x3 and 1,000 classes (the paper's tables 2 and 3)

        depth        11             13             16             19
        parameters   132,863,336    133,047,848    138,357,544    143,667,240    in the paper 133, 133, 138, 144 M
        top-1        29.6           28.7           27.0           27.3           error in %, trained and tested at 256

    batch_norm: normalisation after each convolution; the paper is older and has none.
    width: channels of the first of the five stages, doubled in each up to eight times as many; 64 in the paper.
    hidden: units of the fully connected layers before the last; [4096, 4096] in the paper, [] for none.
    dropout: probability that such a unit is dropped in training; drawn by each rank for its own share.

    Each stage halves the image, rounding up, so that small images pass through five, too. He initialisation (2015):
    deep models without normalisation train from the start, where the paper had to begin with shallow ones. With
    batch_norm or dropout, losses depend on how many ranks share a global batch.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        depth: int = 16,
        batch_norm: bool = False,
        width: int = 64,
        hidden: Sequence[int] = (4096, 4096),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if depth not in _STAGES:
            raise ValueError(f"depth = {depth}: one of {', '.join(map(str, _STAGES))}")
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"width = {width!r}: a positive integer")
        if not isinstance(hidden, Sequence) or not all(isinstance(units, int) and units > 0 for units in hidden):
            raise ValueError(f"hidden = {hidden!r}: a list of positive integers")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout = {dropout}: at least 0 and below 1")
        self.layout = image_layout(input_shape, "vgg")
        widths = [self.layout.num_channels, *(width * min(2**stage, 8) for stage in range(len(_STAGES[depth])))]
        self.blocks = nn.ModuleList(
            _stage(num_in, num_out, num_layers, batch_norm)
            for (num_in, num_out), num_layers in zip(pairwise(widths), _STAGES[depth], strict=True)
        )
        height, length = self.layout.height, self.layout.width
        for _ in self.blocks:
            height, length = -(-height // 2), -(-length // 2)
        self.head = _head([widths[-1] * height * length, *hidden, num_classes], dropout)
        initialise_convolutions(self)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, *input_shape) float -> logits (n, num_classes)."""
        x = self.layout.channels_first(inputs)
        for stage in self.blocks:
            x = stage(x)
        return self.head(x.flatten(1))


def _stage(num_in: int, num_out: int, num_layers: int, batch_norm: bool) -> nn.Sequential:
    """3x3 convolutions with ReLU, then max-pooling: (n, num_in, h, w) -> (n, num_out, h / 2, w / 2)."""
    layers: list[nn.Module] = []
    for index in range(num_layers):
        layers.append(nn.Conv2d(num_out if index else num_in, num_out, 3, padding=1, bias=not batch_norm))
        layers += [BatchNorm(num_out)] if batch_norm else []
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True))


def _head(widths: list[int], dropout: float) -> nn.Sequential:
    """Fully connected layers with ReLU and dropout between them: (n, widths[0]) -> (n, widths[-1])."""
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(widths[:-1]):
        linear = nn.Linear(num_in, num_out)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU(inplace=True), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))
