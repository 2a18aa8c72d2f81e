"""Refits of a model to values drawn around the fitted ones."""

from collections.abc import Callable

import numpy as np

from hpc_train.core.records import FloatArray


def refit_draws(
    fitted: FloatArray, scale: FloatArray, refit: Callable[[FloatArray], FloatArray], num_resamples: int
) -> FloatArray:
    """(num_resamples, parameters) refits to values drawn around the fitted ones.

    The parametric bootstrap (Davison and Hinkley, chapter 6) with log-normal deviations: `scale` (n,) is their relative
    standard deviation.
    """
    noise = np.random.default_rng(0).standard_normal((num_resamples, len(fitted)))
    return np.stack([refit(values) for values in fitted * np.exp(scale * noise)])
