"""POP efficiencies: the useful part of the ranks' time, and where the rest is lost."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.load_balance import LoadBalance
from hpc_train.analysis.runs.rank_records import waits
from hpc_train.analysis.stats.estimate import Estimate, of_blocks, over_runs, ratio
from hpc_train.core.records import FloatArray
from hpc_train.core.statistics import Interval

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
_SAMPLES_PER_USEFUL, _SAMPLES_PER_WHOLE = "samples per useful second", "samples per second of all ranks"


@dataclass(frozen=True, eq=False)
class Efficiencies:
    """The factors of all runs of one size; 1: no loss. An unknown factor is absent.

    estimates: geometric means over runs, so that they multiply as the factors of one run do. missing: why there are
    none.
    """

    estimates: dict[str, Estimate] = field(default_factory=dict)
    missing: str | None = None

    @property
    def factors(self) -> dict[str, float]:
        return {name: estimate.value for name, estimate in self.estimates.items()}

    @property
    def intervals(self) -> dict[str, Interval]:
        """95%, of what runs as long as these come to. Ranks lose no less than nothing: only the factors that compare
        with a baseline can exceed 1.
        """
        found = {}
        for name, estimate in self.estimates.items():
            if estimate.interval is not None:
                low, high = estimate.interval
                found[name] = (low, high if name in ("global", "computational") else min(high, 1.0))
        return found


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
    of_runs = [_of_run(run) for run in runs]
    found = {name: over_runs([each[name] for each in of_runs]) for name in FACTORS if name in of_runs[0]}
    if baseline is not None and list(baseline) == list(runs):
        found |= {"computational": Estimate(0.0, 0.0, 1.0), "global": found["parallel"]}  # by definition
    elif baseline and not _missing(baseline):
        useful = [_of_run(run)[_SAMPLES_PER_USEFUL] for run in baseline]
        found["computational"] = ratio([each[_SAMPLES_PER_USEFUL] for each in of_runs], useful)
        found["global"] = ratio([each[_SAMPLES_PER_WHOLE] for each in of_runs], useful)
    return Efficiencies({name: found[name] for name in FACTORS if name in found})


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


def _balance(run: Run) -> LoadBalance:
    assert run.load_balance is not None
    return run.load_balance


def _of_run(run: Run) -> dict[str, Estimate]:
    """The factors of one run that need no baseline, and samples per second of all ranks' useful and whole time."""
    balance = _balance(run)
    samples = balance.steps * float(run.summary.global_batch)
    blocks = (balance.useful_blocks_s, balance.ideal_s, balance.ideal_input_s, balance.whole_s, samples)
    totals = [each.sum(axis=-1, keepdims=True) for each in blocks]
    whole = _logarithms(_in_step(run), *totals)
    without = _logarithms(_in_step(run), *(total - each for total, each in zip(totals, blocks, strict=True)))
    return {name: of_blocks(float(whole[name][0]), without[name]) for name in whole}


def _logarithms(
    in_step: bool,
    useful_s: FloatArray,
    ideal_s: FloatArray,
    ideal_input_s: FloatArray,
    whole_s: FloatArray,
    samples: FloatArray,
) -> dict[str, FloatArray]:
    """The logarithms (K,) of the factors from K sums each: useful_s (R, K), the others (K,)."""
    mean, largest, num_ranks = useful_s.mean(axis=0), useful_s.max(axis=0), len(useful_s)
    parts = {
        "parallel": (mean, whole_s),
        "load_balance": (mean, largest),
        "communication": (largest, whole_s),
        _SAMPLES_PER_USEFUL: (samples, mean * num_ranks),
        _SAMPLES_PER_WHOLE: (samples, whole_s * num_ranks),
    }
    if in_step:
        parts |= {
            "input": (ideal_s, ideal_input_s),
            "serialisation": (largest, ideal_s),
            "transfer": (ideal_input_s, whole_s),
            "communication": (largest * ideal_input_s, ideal_s * whole_s),  # serialisation x transfer
        }
    return {name: np.log(upper / lower) for name, (upper, lower) in parts.items()}
