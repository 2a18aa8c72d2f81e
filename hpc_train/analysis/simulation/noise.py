"""How the computation of ranks varies: measured from rank to rank and from step to step, and drawn for other ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpc_train.analysis.runs.load import Run
from hpc_train.core.records import FloatArray
from hpc_train.core.timing_log import COMMUNICATION, PHASES, read_timings

_MOST_RANKS, _MOST_STEPS = 64, 2000  # read of a run: more say little more
_TAIL = 0.05  # the share of the largest deviations, which are drawn from a distribution instead of from the measured
_LEAST_IN_TAIL = 5
_WAITING = [PHASES.index(phase) for phase in ("data", *COMMUNICATION)]


@dataclass(frozen=True, eq=False)
class Noise:
    """Relative deviations of a rank's computation in a step from its mean.

    of_ranks: standard deviation of what persists, one for each rank. of_steps: ascending, of single steps.
    """

    of_ranks: float
    of_steps: FloatArray

    def rank_factors(self, shape: tuple[int, ...], random: np.random.Generator) -> FloatArray:
        return np.asarray(np.exp(self.of_ranks * random.standard_normal(shape)))

    def step_factors(self, shape: tuple[int, ...], random: np.random.Generator) -> FloatArray:
        """As measured up to the 95% quantile, exponential with the measured mean above it.

        Among 10^5 ranks the slowest is slower than any that was measured: maxima of many distributions, the normal one
        among them, behave as those of an exponential tail do (Pickands, "Statistical inference using extreme order
        statistics", Annals of Statistics 3(1), 1975).
        """
        if not len(self.of_steps):
            return np.ones(shape)
        num_tail = int(_TAIL * len(self.of_steps))
        drawn = self.of_steps[random.integers(len(self.of_steps), size=shape)]
        if num_tail >= _LEAST_IN_TAIL:
            threshold = self.of_steps[-num_tail - 1]
            excess = float((self.of_steps[-num_tail:] - threshold).mean())
            in_tail = drawn > threshold
            drawn[in_tail] = threshold + excess * random.standard_exponential(int(in_tail.sum()))
        return np.maximum(1 + drawn, 0.0)


NO_NOISE = Noise(0.0, np.zeros(0))


def measured_noise(runs: Sequence[Run]) -> Noise:
    """Pooled over runs of one size. A step that is slow on all ranks alike makes none wait, and is no noise."""
    persisting, deviations = [], []
    for run in runs:
        computing = _computing_ns(run)
        if computing.size == 0 or not computing.all():
            continue
        ranks, steps = computing.shape
        own = computing / computing.mean(1, keepdims=True)
        of_rank = computing.mean(1) / computing.mean()
        if ranks > 1:
            own = own / own.mean(0)
            # Means of so many steps vary by themselves: what persists is what exceeds that.
            within = own.var(axis=1, ddof=1).mean() / steps if steps > 1 else 0.0
            persisting.append(max(float(of_rank.var(ddof=1)) - within, 0.0))
        # The mean over few ranks, which is subtracted, holds a part of each deviation.
        deviations.append((own - 1).ravel() * np.sqrt(ranks / (ranks - 1) if ranks > 1 else 1.0))
    of_steps = np.sort(np.concatenate(deviations)) if deviations else np.zeros(0)
    return Noise(float(np.sqrt(np.mean(persisting))) if persisting else 0.0, of_steps)


def _computing_ns(run: Run) -> FloatArray:
    """(ranks, steps) of some ranks that train and of the steady steps that all of them recorded."""
    num_workers = run.config.reduce.num_workers(run.size)
    chosen = np.unique(np.linspace(0, num_workers - 1, min(num_workers, _MOST_RANKS)).astype(int))
    rows = []
    for rank in chosen:
        path = run.dir.timings(int(rank))
        if path.is_file():
            phases = read_timings(path).steady.phases_ns[:_MOST_STEPS]
            rows.append(phases.sum(1) - phases[:, _WAITING].sum(1))
    if not rows:
        return np.zeros((0, 0))
    length = min(map(len, rows))
    return np.array([row[:length] for row in rows], dtype=float)
