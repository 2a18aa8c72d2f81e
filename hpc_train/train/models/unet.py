"""U-Net: fields to fields, in two and three dimensions."""

from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.nn import functional

from hpc_train.core.errors import UserError

_CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
_UP_CONVOLUTIONS = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOLS = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
Padding = Literal["zeros", "circular", "replicate", "reflect"]  # torch's names


class Unet(nn.Module):
    """U-Net (Ronneberger, Fischer and Brox, 2015) for fields (h, w), 3-D U-Net (Cicek et al., 2016) for (d, h, w).

    Samples are (c, h, w) or (c, d, h, w), channels first; (h, w) is one channel. Targets are fields on the same grid:
    (c2, h, w), (c2, d, h, w), or one channel without an axis.

    levels: how often the grid is halved; 4 in the paper. width: channels on the finest grid, doubled at each level; 64.
    padding: what convolutions see beyond the edges: "zeros", "circular" for periodic fields, "replicate", "reflect".
    residual: the model predicts what is added to the input, for targets of as many channels as the inputs, such as a
    later state of the same fields. Both need one scale: data.normalize = "standardize".
    groups: of the group normalisation (Wu and He, 2018) after each convolution; they divide the width.

    Unlike the paper's: convolutions keep the size of the grid; averages take the place of maxima and GELU that of ReLU,
    which are smooth, so that rounding errors stay small; normalisation sees one sample at a time, so that results do
    not depend on how many ranks share a batch. A grid that 2^levels does not divide is padded, and the result cropped.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        target_shape: tuple[int, ...],
        levels: int = 4,
        width: int = 64,
        padding: Padding = "zeros",
        residual: bool = False,
        groups: int = 8,
    ) -> None:
        super().__init__()
        self.fields = field_shapes(input_shape, target_shape)
        num_in, num_out, grid = self.fields
        _check_options(levels, width, padding, groups, grid)
        if residual and num_in != num_out:
            raise ValueError(f"residual = true: inputs have {num_in} channels, and targets {num_out}")
        self.target_shape, self.is_residual, self.padding = tuple(target_shape), residual, padding
        self._multiple = 2**levels
        dimensions = len(grid)
        form = _Form(dimensions, padding, groups)
        widths = [width * 2**level for level in range(levels + 1)]
        down = [_Down(a, b, form, halves=level > 0) for level, (a, b) in enumerate(pairwise([num_in, *widths]))]
        up = [_Up(a, b, form) for a, b in pairwise(reversed(widths))]
        self.blocks = nn.ModuleList([*down, *up])
        self.head = _CONVOLUTIONS[dimensions](width, num_out, 1)
        self._initialise()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, *input_shape) float -> (n, *target_shape)."""
        grid = self.fields.grid
        x = inputs.reshape(len(inputs), self.fields.num_in, *grid)
        if x.device.type != "cpu":  # there cuDNN's tensor cores need it; see images.Layout for CPUs
            x = x.contiguous(memory_format=_CHANNELS_LAST[len(grid)])
        found = self.head(self._features(self._padded(x)))
        for axis, size in enumerate(grid, start=2):
            found = found.narrow(axis, 0, size)
        return (found + x if self.is_residual else found).reshape(len(inputs), *self.target_shape)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        num_down, skipped = len(self.blocks) // 2 + 1, []
        for block in self.blocks[:num_down]:
            x = block(x)
            skipped.append(x)
        for block, skip in zip(self.blocks[num_down:], reversed(skipped[:-1]), strict=True):
            x = block(x, skip)
        return x

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """At the end of each axis, to a multiple of 2^levels."""
        more = [-size % self._multiple for size in x.shape[2:]]
        if not any(more):
            return x
        widths = [width for each in reversed(more) for width in (0, each)]
        return functional.pad(x, widths, mode=_pad_mode(self.padding))

    def _initialise(self) -> None:
        """He initialisation (2015) of every convolution; biases begin as zero, and so does a predicted change."""
        for part in self.modules():
            if isinstance(part, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        if self.is_residual:
            nn.init.zeros_(self.head.weight)


class Fields(NamedTuple):
    """Channels of the inputs and of the targets, and the grid that both are on: (h, w) or (d, h, w)."""

    num_in: int
    num_out: int
    grid: tuple[int, ...]


def field_shapes(input_shape: tuple[int, ...], target_shape: tuple[int, ...]) -> Fields:
    """Raises `UserError` unless inputs and targets are fields on the same grid."""
    inputs, targets = tuple(input_shape), tuple(target_shape)
    num_in, grid = (1, inputs) if len(inputs) == 2 else (inputs[0], inputs[1:])
    if len(grid) in _CONVOLUTIONS and targets in (grid, (*targets[:1], *grid)):
        return Fields(num_in, 1 if targets == grid else targets[0], grid)
    raise UserError(
        f"data.inputs has samples of {inputs} and data.targets of {targets}: task.model = 'unet' needs fields on the "
        "same grid",
        "Store (channels, height, width) or (channels, depth, height, width), channels first, or choose another model.",
    )


class _Form(NamedTuple):
    """What all blocks have in common."""

    dimensions: int
    padding: Padding
    groups: int

    def layers(self, num_in: int, num_out: int) -> nn.Sequential:
        """Two convolutions of 3 cells a side, each with normalisation and GELU."""
        convolution, parts = _CONVOLUTIONS[self.dimensions], list[nn.Module]()
        for width in (num_in, num_out):
            # No bias: the normalisation after it has one.
            parts.append(convolution(width, num_out, 3, padding=1, padding_mode=self.padding, bias=False))
            parts += [nn.GroupNorm(self.groups, num_out), nn.GELU()]
        return nn.Sequential(*parts)


class _Down(nn.Module):
    """The left side of the paper's figure 1."""

    def __init__(self, num_in: int, num_out: int, form: _Form, halves: bool) -> None:
        super().__init__()
        self.halves = _POOLS[form.dimensions](2) if halves else nn.Identity()
        self.layers = form.layers(num_in, num_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, num_in, ...) -> (n, num_out, ...), on a grid half as fine if it halves."""
        return self.layers(self.halves(x))


class _Up(nn.Module):
    """The right side: brought to the finer grid, beside what the left side found there."""

    def __init__(self, num_in: int, num_out: int, form: _Form) -> None:
        super().__init__()
        self.doubles = _UP_CONVOLUTIONS[form.dimensions](num_in, num_out, 2, 2)
        self.layers = form.layers(2 * num_out, num_out)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """(n, num_in, ...) and (n, num_out, twice as fine) -> the latter's shape."""
        return self.layers(torch.cat((self.doubles(x), skip), dim=1))


def _check_options(levels: int, width: int, padding: str, groups: int, grid: tuple[int, ...]) -> None:
    """Raises ValueError."""
    for name, value, least in (("levels", levels, 0), ("width", width, 1), ("groups", groups, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} = {value!r}: a whole number from {least} on")
    if padding not in get_args(Padding):
        raise ValueError(f"padding = {padding!r}: one of {', '.join(get_args(Padding))}")
    if width % groups:
        raise ValueError(f"groups = {groups} do not divide width = {width}")
    if min(grid) < 2**levels + (padding == "reflect"):  # of which one cell has nothing to reflect
        size = " x ".join(map(str, grid))
        raise ValueError(f"levels = {levels}: a grid of {size} cells cannot be halved as often")


def _pad_mode(padding: str) -> str:
    return "constant" if padding == "zeros" else padding
