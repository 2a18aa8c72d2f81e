"""The distribution of step times: what a typical step takes, and what slow ones take."""

from collections.abc import Sequence

import numpy as np

from hpc_train.core.records import FloatArray

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def step_quantiles(step_s: Sequence[FloatArray]) -> dict[str, float]:
    """{"p50": seconds, ...} of all steady steps of `step_s`, one array a run.

    Without those that need more steps than there are: 1 step in 100 is slower than p99, so p99 needs 100.
    """
    steps = np.concatenate([np.zeros(0), *step_s])
    return {
        name: float(np.quantile(steps, share))
        for name, share in QUANTILES.items()
        if len(steps) * (1 - share) >= 1 - 1e-9
    }


def slowest_step(step_s: Sequence[FloatArray]) -> float | None:
    """Seconds of the slowest steady step; None without one."""
    return max((float(each.max()) for each in step_s if len(each)), default=None)
