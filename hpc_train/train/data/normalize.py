"""Inputs at a scale at which models train: as the file's attributes say, or standardised."""

import numpy as np
import torch

from hpc_train.train.comm.context import Context
from hpc_train.train.data.dataset import Batch, Split, Standard
from hpc_train.train.data.moments import moments

_LARGE = 20.0  # root mean square of inputs from which on weights of the usual size make losses explode
_UNLIKE = 1000.0  # times as much does one feature vary as another
_NUM_LOOKED_AT = 256  # samples
_EDGE_OVER_CHANNELS = (8, 2)  # a series, an image: at least so many times as long as it has channels


def find_standard(train: Split, missing: tuple[float, ...], context: Context, channels_first: bool) -> Standard:
    """Collective. Mean and standard deviation of the training inputs, as stored.

    Of each feature of samples (features,), of each channel of images, series and fields, of all numbers of others. The
    deviation of a constant feature is 1, so that it becomes 0. channels_first: see `pooled_axes`.
    """
    found = moments(train.inputs[0], missing, context, pooled_axes(train.input_shape, channels_first))
    return Standard(torch.from_numpy(found.mean), torch.from_numpy(np.where(found.std > 0, found.std, 1.0)))


def pooled_axes(shape: tuple[int, ...], channels_first: bool = False) -> tuple[int, ...]:
    """The axes of a sample over which values count as one: not those of features and channels.

    channels_first: of samples of more than two axes the first is known to be that of the channels.
    """
    if len(shape) < 2:
        return ()
    if channels_first:
        return tuple(range(len(shape) > 2, len(shape)))
    ratio = _EDGE_OVER_CHANNELS[len(shape) == 3]
    inner = shape[1] if len(shape) == 3 else max(shape)
    channels = [axis for axis in (0, len(shape) - 1) if len(shape) < 4 and shape[axis] * ratio <= inner]
    return tuple(axis for axis in range(len(shape)) if [axis] != channels)


def unusual_scale(split: Split, name: str, context: Context) -> str:
    """Collective. What is unusual about the scale of inputs `name`, and the remedy; "" if it is usual.

    The root looks at some samples, evenly spaced.
    """

    def look() -> str:
        rows = np.unique(np.linspace(0, len(split) - 1, _NUM_LOOKED_AT).astype(np.int64))
        stored = torch.from_numpy(split.inputs[0].take(rows))
        values = Batch(stored, torch.zeros(0), split.scale[0], split.offset[0], split.filling).floats().double()
        known = values[torch.isfinite(values)]
        if not len(known):
            return ""
        size, low, high = float(known.square().mean().sqrt()), float(known.min()), float(known.max())
        if size > _LARGE:
            return f"{name} are large numbers, {low:g} to {high:g}"
        deviations = values.std(0)
        deviations = deviations[torch.isfinite(deviations) & (deviations > 0)]
        if values.ndim == 2 and len(deviations) > 1 and deviations.max() > _UNLIKE * deviations.min():
            unlike = float(deviations.max() / deviations.min())
            return f"{name} has features of unlike scale: one varies {unlike:,.0f} times as much as another"
        return ""

    why = context.on_root(look)
    return f'{why}, with which models train badly: data.normalize = "standardize" mends it.' if why else ""
