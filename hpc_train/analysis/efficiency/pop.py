"""POP efficiencies: the useful part of the ranks' time, and where the rest is lost."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.load_balance import LoadBalance
from hpc_train.analysis.runs.rank_records import waits
from hpc_train.analysis.stats.bootstrap import block_counts
from hpc_train.core.records import FloatArray
from hpc_train.core.statistics import LEVELS

# The tree in order: global = parallel x computational, parallel = load balance x input x communication,
# communication = serialisation x transfer. The value is a factor's depth.
FACTORS = {
    "global": 0,
    "parallel": 1,
    "load_balance": 2,
    "input": 2,
    "communication": 2,
    "serialisation": 3,
    "transfer": 3,
    "computational": 1,
}
_MOST_CELLS = 8_000_000  # of one matrix of draws and ranks


@dataclass(frozen=True, eq=False)
class Efficiencies:
    """The factors of all runs of one size; 1: no loss. An unknown factor is absent.

    intervals: 95%, by bootstrap over runs and blocks of consecutive steps. missing: why there are no factors.
    """

    factors: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    missing: str | None = None


@dataclass(frozen=True, eq=False)
class _Sums:
    """Seconds over runs and steps, each (resamples,): C_i is the useful time of rank i, T the whole time."""

    mean_useful: FloatArray  # mean(C)
    max_useful: FloatArray  # max(C)
    ideal: FloatArray  # T_ideal
    ideal_input: FloatArray  # T_input
    whole: FloatArray  # T
    useful_of_sample: FloatArray  # sum of all ranks' useful time over the samples trained


def efficiencies(runs: Sequence[Run], baseline: Sequence[Run] | None) -> Efficiencies:
    """The POP efficiencies of runs of one size, computational (and global) against `baseline`.

    C_i: useful time of rank i of N. T: time of the run. c_iw: useful time of rank i in the stretch w between two
    reductions. d_iw: its wait for input there.

    - parallel = mean(C) / T = load balance x input x communication
    - load balance = mean(C) / max(C)
    - communication = serialisation x transfer
    - serialisation = max(C) / T_ideal, T_ideal = sum over w of max over i of c_iw: the loss if a different rank is the
      slowest in each stretch, even if all do the same work in total
    - input = T_ideal / T_input, T_input = sum over w of max over i of (c_iw + d_iw): the loss from waiting for data
    - transfer = T_input / T: the loss from communication that no computation hides
    - computational = (sum(C) per sample of the baseline) / (sum(C) per sample): more work, or slower work. For strong
      scaling this is sum(C_ref) / sum(C); for weak scaling, where the work grows with N, mean(C_ref) / mean(C)
    - global = parallel x computational: relative to N ranks like the baseline's that never wait for each other. The
      speedup efficiency of `scaling` is relative to the baseline as it ran: global over the baseline's global, up to
      rounding (a parameter server's servers count in the speedup efficiency alone)

    After the POP Centre of Excellence (pop-coe.eu, "POP Standard Metrics for Parallel Performance Analysis") and Rosas,
    Giménez and Labarta, "Scalability prediction for fundamental performance factors", Supercomputing Frontiers and
    Innovations 1(2), 2014. POP takes T_ideal from a simulated network without latency and with infinite bandwidth;
    for ranks that wait for each other in every step the sum above is the same. POP has no factor input: without waits
    for data it is 1, and the others are POP's.

    T is the mean over ranks of the time in steady steps, without a parameter server's servers. Useful time is forward,
    backward, optimizer and other. If ranks do not wait for each other in each step there is no T_ideal: then
    communication and input are one factor, max(C) / T, under "communication".
    """
    if missing := _missing(runs):
        return Efficiencies(missing=missing)
    exact, drawn = _sums(runs, None), _sums(runs, seed=2 * runs[0].size + 1)
    factors = [_factors(sums, _in_step(runs[0])) for sums in (exact, drawn)]
    if baseline and not _missing(baseline):
        # Seeds by size: equal ones would draw the same blocks of both and hide part of the noise.
        is_baseline = list(baseline) == list(runs)
        references = (exact, drawn) if is_baseline else (_sums(baseline, None), _sums(baseline, 2 * baseline[0].size))
        for each, sums, reference in zip(factors, (exact, drawn), references, strict=True):
            each["computational"] = reference.useful_of_sample / sums.useful_of_sample
            each["global"] = each["parallel"] * each["computational"]
    known, draws = factors
    values = {name: float(known[name][0]) for name in FACTORS if name in known}
    several = sum(len(_balance(run).whole_s) for run in runs) > 1
    return Efficiencies(values, {name: _span(name, draws[name], values[name]) for name in values if several})


def _span(name: str, draws: FloatArray, value: float) -> tuple[float, float]:
    """The 95% interval, shifted so that the draws' median is the value.

    Resampling biases a maximum: the busiest of many ranks is even busier in a sample drawn from a sample.
    """
    low, middle, high = (float(end) for end in np.quantile(draws, (LEVELS[0], 0.5, LEVELS[1])))
    most = np.inf if name in ("global", "computational") else 1.0
    return value + low - middle, max(value, min(value + high - middle, most))


def _missing(runs: Sequence[Run]) -> str | None:
    balances = [run.load_balance for run in runs]
    if any(balance is None for balance in balances):
        return "no steady step"
    if not all(balance.phases_timed for balance in balances if balance):
        return "exposed communication was not timed, so it cannot be separated from computing"
    if not all(balance.useful_blocks_s.any() for balance in balances if balance):
        return "no useful time was recorded"
    return None


def _in_step(run: Run) -> bool:
    """Whether stretches between reductions are meaningful: ranks wait for each other, or there is one rank."""
    balance = _balance(run)
    return len(balance.ranks) == 1 or waits(run.config.reduce, len(balance.ranks))


def _factors(sums: _Sums, in_step: bool) -> dict[str, FloatArray]:
    factors = {
        "parallel": sums.mean_useful / sums.whole,
        "load_balance": sums.mean_useful / sums.max_useful,
        "communication": sums.max_useful / sums.whole,
    }
    if in_step:
        serialisation, transfer = sums.max_useful / sums.ideal, sums.ideal_input / sums.whole
        factors |= {"serialisation": serialisation, "transfer": transfer, "communication": serialisation * transfer}
        factors["input"] = sums.ideal / sums.ideal_input
    return factors


def _balance(run: Run) -> LoadBalance:
    assert run.load_balance is not None
    return run.load_balance


def _sums(runs: Sequence[Run], seed: int | None) -> _Sums:
    """Over all steps of all runs, (1,); or over NUM_RESAMPLES bootstrap samples of runs and of their blocks of steps.

    Each run has its own slowest rank.
    """
    num_blocks = [len(_balance(run).whole_s) for run in runs]
    draws = [np.ones((1, blocks)) for blocks in num_blocks] if seed is None else block_counts(num_blocks, seed)
    total = np.zeros((5, len(draws[0])))
    useful, samples = np.zeros(len(draws[0])), np.zeros(len(draws[0]))
    for run, counts in zip(runs, draws, strict=True):
        balance = _balance(run)
        mean = counts @ balance.useful_blocks_s.mean(axis=0)
        ideals = (counts @ balance.ideal_s, counts @ balance.ideal_input_s)
        total += np.stack([mean, _largest(counts, balance.useful_blocks_s), *ideals, counts @ balance.whole_s])
        useful += mean * len(balance.ranks)
        samples += counts @ balance.steps * run.summary.global_batch
    mean, largest, ideal, ideal_input, whole = total
    return _Sums(mean, largest, ideal, ideal_input, whole, useful / samples)


def _largest(counts: FloatArray, useful: FloatArray) -> FloatArray:
    """(resamples,) the useful time of the busiest rank; in parts, to bound the memory."""
    if len(counts) == 1:
        return np.asarray((useful @ counts[0]).max(keepdims=True))
    part = max(1, _MOST_CELLS // len(useful))
    parts = [(counts[at : at + part] @ useful.T).max(axis=1) for at in range(0, len(counts), part)]
    return np.concatenate(parts)
