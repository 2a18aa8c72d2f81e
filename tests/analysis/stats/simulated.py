"""Runs whose truth is known, drawn in memory: steps resemble their neighbours, and runs differ."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import NormalDist
from tempfile import TemporaryDirectory

import numpy as np
from scipy.signal import lfilter
from scipy.special import stdtrit

from hpc_train.analysis.runs.load import Run, load
from hpc_train.analysis.runs.rank_accumulator import RankAccumulator
from hpc_train.core.records import FloatArray
from hpc_train.core.statistics import Interval
from hpc_train.core.timing_log import Timings
from tests import laws
from tests.laws import Laws

NORMAL_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Steps:
    """Step times: mean 10 ms, noise and its autocorrelation from a step to the next, and how runs differ."""

    count: int = 200
    noise: float = 0.05  # relative standard deviation of a step
    autocorrelation: float = 0.0  # of a first-order autoregressive process
    run_noise: float = 0.0  # relative standard deviation of a run's mean

    def draw(self, generator: np.random.Generator, num_runs: int) -> Iterator[FloatArray]:
        settled = 200
        for _ in range(num_runs):
            shocks = generator.standard_normal(settled + self.count)
            series = lfilter([1.0], [1.0, -self.autocorrelation], shocks)[settled:]
            relative = 1 + self.noise * (1 - self.autocorrelation**2) ** 0.5 * series
            yield 0.010 * np.exp(self.run_noise * generator.standard_normal()) * relative

    def squared_error(self, num_runs: int) -> float:
        """Of the logarithm of the mean over steps and runs, approximately: what an oracle knows."""
        within = self.noise**2 * (1 + self.autocorrelation) / (1 - self.autocorrelation) / self.count
        return (self.run_noise**2 + within) / num_runs


@cache
def template(ranks: int = 1) -> Run:
    """A complete run, whose times a simulation replaces."""
    with TemporaryDirectory() as root:
        directory, _ = laws.write(Path(root), Laws(ranks=ranks, steps=30))
        return load(directory)


def recorded(law: Laws) -> Run:
    """The run of a law, as if it had been written and loaded, without phases and energy."""
    run = template(law.ranks)
    accumulator = RankAccumulator([law.host_of(rank) for rank in range(law.ranks)], None, waits=law.ranks > 1)
    step_ns = np.zeros(law.steps - law.warmup)
    for rank, values in enumerate(laws.rows(law)):
        timings = Timings(np.asarray(values, dtype=np.int64), truncated=False)
        accumulator.add(rank, timings)
        step_ns += timings.steady.phases_ns.sum(axis=1)
    return replace(run, step_s=step_ns / law.ranks / 1e9, load_balance=accumulator.load_balance())


def timed(ranks: int, steps_s: FloatArray) -> Run:
    return replace(template(ranks), step_s=steps_s)


def oracle_half_width(squared_error: float, spare: int | None = None) -> float:
    """Half of the 95% interval of someone who knows the true error; spare: degrees of freedom that repeats leave."""
    return squared_error**0.5 * (NORMAL_95 if spare is None else float(stdtrit(spare, 0.975)))


@dataclass(frozen=True)
class Coverage:
    """How often intervals held the truth, and their median width over the oracle's, in logarithms."""

    held: float
    width: float

    @classmethod
    def of(cls, intervals: Sequence[Interval], truth: float, half_width: float) -> "Coverage":
        ends = np.array(intervals)
        held = (ends[:, 0] <= truth) & (truth <= ends[:, 1])
        return cls(float(held.mean()), float(np.median(np.log(ends[:, 1] / ends[:, 0])) / (2 * half_width)))


def oracle_of(values: Sequence[float]) -> float:
    """Half of the 95% interval of someone who knows how these estimates spread, in their logarithms."""
    return NORMAL_95 * float(np.std(np.log(values)))
