"""What the image models share: images as stored, and batch normalisation of uneven shares."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from hpc_train.core.errors import UserError


class Layout(NamedTuple):
    """How a stored image is laid out; `axis`: of its channels, None if a single channel has no axis."""

    num_channels: int
    height: int
    width: int
    axis: int | None

    def channels_first(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, *stored shape) -> (n, num_channels, height, width); convolutions keep the order in memory.

        On a GPU in channels_last: tensor cores need it, and cuDNN would copy to it and back. On a CPU contiguous:
        channels_last, 1.05 to 1.4 times as fast there, triggers a bug of oneDNN that corrupts memory (`onednn.py`).
        """
        images = inputs.unsqueeze(1) if self.axis is None else inputs.movedim(1 + self.axis, 1)
        if inputs.device.type != "cpu":
            return images.contiguous(memory_format=torch.channels_last)
        # Flattened first: torch takes the strides that movedim gives a single channel for channels_last.
        return images.flatten(1).view(images.shape)


def image_layout(input_shape: tuple[int, ...], model: str) -> Layout:
    """The layout of images stored as (h, w), (h, w, c) or (c, h, w), where c is 1 or 3.

    Raises UserError for another shape, and if both ends could be the channels.
    """
    shape = tuple(input_shape)
    if len(shape) == 2:
        return Layout(1, *shape, axis=None)
    ends = [axis for axis in (0, 2) if len(shape) == 3 and shape[axis] in (1, 3)]
    if len(ends) != 1:
        why = "either end could be the channels" if ends else "that is no image"
        raise UserError(
            f"data.inputs has samples of {shape}: task.model = '{model}' needs images, and {why}",
            "Store (height, width), (height, width, channels) or (channels, height, width) with 1 or 3 channels.",
        )
    axis = ends[0]
    height, width = (size for index, size in enumerate(shape) if index != axis)
    return Layout(shape[axis], height, width, axis)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation (Ioffe and Szegedy, 2015) by the statistics of this rank's own share (Goyal et al., 2017).

    In an epoch's last batch a rank may have one sample, or none. A channel with fewer than two values has no variance:
    it is normalised by the running statistics, as in a test, and does not change them.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(n, num_features, height, width) -> the same shape; n may be 0."""
        if self.training and inputs.numel() < 2 * self.num_features:
            known = self.running_mean, self.running_var, self.weight, self.bias
            return functional.batch_norm(inputs, *known, training=False, eps=self.eps)
        return super().forward(inputs)


def initialise_convolutions(model: nn.Module) -> None:
    """He initialisation (2015) of every convolution, for the ReLU after it; biases begin as zero."""
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
