"""ResNet: deep residual networks."""

import torch
from torch import nn
from torch.nn import functional

from hpc_train.train.models.images import BatchNorm, image_layout, initialise_convolutions


class ResNet(nn.Module):
    """ResNet-18, 34, 50, 101 and 152 (He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2016).

    depth: layers with weights. On images of 224x224x3 and 1,000 classes the paper's table 1 gives

        depth   18      34      50      101     152
        GFLOPs  1.8     3.6     3.8     7.6     11.3      multiply-adds of one image, forward
        top-1   27.88   24.52   22.85   21.75   21.43     error in %, ten crops (tables 2 and 3)

    and the parameters are 11,689,512, 21,797,672, 25,557,032, 44,549,160 and 60,192,808. The stride of a bottleneck is
    in its 3x3 convolution and not in the first 1x1, as is usual since Gross and Wilber (2016).

    width: channels of the first of the four stages, doubled in each; 64 in the paper.
    stem: "imagenet": 7x7 of stride 2 and max-pooling of stride 2, for images of about 224; "small": 3x3 of stride 1
    and no pooling, the paper's section 4.2, for images of about 32.

    The last gamma of each residual block is zero at the start, so that a block begins as the identity (Goyal et al.,
    "Accurate, Large Minibatch SGD", 2017, section 5.1). Batch statistics are those of a rank's own share, as there:
    losses depend on how many ranks share a global batch.
    """

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, depth: int = 50, width: int = 64, stem: str = "imagenet"
    ) -> None:
        super().__init__()
        if depth not in _STAGES:
            raise ValueError(f"depth = {depth}: one of {', '.join(map(str, _STAGES))}")
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"width = {width!r}: a positive integer")
        if stem not in ("imagenet", "small"):
            raise ValueError(f"stem = {stem!r}: 'imagenet' or 'small'")
        self.layout = image_layout(input_shape, "resnet")
        block, stages = _STAGES[depth]
        self.stem = _stem(self.layout.num_channels, width, stem)
        self.blocks = nn.ModuleList()
        num_in = width
        for stage, num_blocks in enumerate(stages):
            for index in range(num_blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(block(num_in, width * 2**stage, stride))
                num_in = width * 2**stage * block.expansion
        self.head = nn.Linear(num_in, num_classes)
        initialise_convolutions(self)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, *input_shape) float -> logits (n, num_classes)."""
        x = self.stem(self.layout.channels_first(inputs))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Basic(nn.Module):
    """Two 3x3 convolutions beside a shortcut: figure 5 of the paper, left."""

    expansion = 1

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(_conv(num_in, num_out, 3, stride), BatchNorm(num_out), nn.ReLU(inplace=True))
        self.last = nn.Sequential(_conv(num_out, num_out, 3), _zero(BatchNorm(num_out)))
        self.shortcut = _shortcut(num_in, num_out, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, num_in, h, w) -> (n, num_out, h / stride, w / stride)."""
        return functional.relu(self.last(self.first(x)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut, the last four times as wide: figure 5 of the paper, right."""

    expansion = 4

    def __init__(self, num_in: int, num_mid: int, stride: int) -> None:
        super().__init__()
        num_out = num_mid * self.expansion
        self.first = nn.Sequential(_conv(num_in, num_mid, 1), BatchNorm(num_mid), nn.ReLU(inplace=True))
        self.second = nn.Sequential(_conv(num_mid, num_mid, 3, stride), BatchNorm(num_mid), nn.ReLU(inplace=True))
        self.last = nn.Sequential(_conv(num_mid, num_out, 1), _zero(BatchNorm(num_out)))
        self.shortcut = _shortcut(num_in, num_out, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, num_in, h, w) -> (n, 4 * num_mid, h / stride, w / stride)."""
        return functional.relu(self.last(self.second(self.first(x))) + self.shortcut(x))


_STAGES: dict[int, tuple[type[Basic] | type[Bottleneck], tuple[int, ...]]] = {
    18: (Basic, (2, 2, 2, 2)),
    34: (Basic, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def _conv(num_in: int, num_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(num_in, num_out, size, stride, padding=size // 2, bias=False)  # the normalisation after it has one


def _zero(norm: BatchNorm) -> BatchNorm:
    nn.init.zeros_(norm.weight)
    return norm


def _stem(num_channels: int, width: int, kind: str) -> nn.Sequential:
    size, stride = (7, 2) if kind == "imagenet" else (3, 1)
    layers = [_conv(num_channels, width, size, stride), BatchNorm(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *([nn.MaxPool2d(3, 2, padding=1)] if kind == "imagenet" else []))


def _shortcut(num_in: int, num_out: int, stride: int) -> nn.Module:
    """The identity, or a projection where shapes differ (option B of the paper)."""
    if stride == 1 and num_in == num_out:
        return nn.Identity()
    return nn.Sequential(_conv(num_in, num_out, 1, stride), BatchNorm(num_out))
