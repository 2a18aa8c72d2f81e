"""POP efficiencies: the useful part of the ranks' time, and where the rest is lost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

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
_NUM_TURNS = 10  # of the two halves of a run
_SAMPLES_PER_USEFUL, _SAMPLES_PER_WHOLE = "samples per useful second", "samples per second of all ranks"


@dataclass(frozen=True, eq=False)
class Efficiencies:
    """The factors of all runs of one size; 1: no loss. An unknown factor is absent. missing: why there are none.

    factors: as measured, geometric means over runs, so that they multiply as the factors of one run do. estimates: the
    same of a run that goes on, with the busiest rank's time from steps that did not choose it (`_estimated`).
    """

    factors: dict[str, float] = field(default_factory=dict)
    estimates: dict[str, Estimate] = field(default_factory=dict)
    missing: str | None = None

    @property
    def intervals(self) -> dict[str, Interval]:
        """95%, of runs that go on. The busiest rank's true time lies between its own, which is the largest by chance,
        too, and that on steps that did not choose it: intervals reach below the smaller and above the larger of the
        measured factor and the estimate. Only factors that compare with a baseline can exceed 1, since ranks lose no
        less than nothing.
        """
        found = {}
        for name, estimate in self.estimates.items():
            if estimate.interval is not None:
                (low, high), chosen = estimate.interval, self.factors[name] / estimate.value
                most = inf if name in ("global", "computational") else 1.0
                found[name] = low * min(chosen, 1.0), max(min(high * max(chosen, 1.0), most), self.factors[name])
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
    sides = [_of_runs(runs, baseline, of_run) for of_run in (_measured, _estimated)]
    measured, estimated = ({name: side[name] for name in FACTORS if name in side} for side in sides)
    return Efficiencies({name: each.value for name, each in measured.items()}, estimated)


def _of_runs(
    runs: Sequence[Run], baseline: Sequence[Run] | None, of_run: Callable[[Run], dict[str, Estimate]]
) -> dict[str, Estimate]:
    of_runs = [of_run(run) for run in runs]
    found = {name: over_runs([each[name] for each in of_runs]) for name in of_runs[0]}
    if baseline is not None and list(baseline) == list(runs):
        found |= {"computational": Estimate(0.0, 0.0, 1.0), "global": found["parallel"]}  # by definition
    elif baseline and not _missing(baseline):
        useful = [of_run(run)[_SAMPLES_PER_USEFUL] for run in baseline]
        found["computational"] = ratio([each[_SAMPLES_PER_USEFUL] for each in of_runs], useful)
        found["global"] = ratio([each[_SAMPLES_PER_WHOLE] for each in of_runs], useful)
    return found


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


def _measured(run: Run) -> dict[str, Estimate]:
    """The factors of one run that need no baseline, and samples per second of all ranks' useful and whole time."""
    useful_s = _balance(run).useful_s
    logarithms = _logarithms(run, useful_s.max(keepdims=True), *(each.sum(keepdims=True) for each in _blocks(run)))
    return {name: Estimate(float(each[0])) for name, each in logarithms.items()}


def _estimated(run: Run) -> dict[str, Estimate]:
    """The same with the busiest rank of `_busiest_s`, and their errors, without the first block: there ranks still wait
    for each other's warm-up, which a run that goes on does not.
    """
    blocks = [_busiest_s(_balance(run).useful_blocks_s), *_blocks(run)]
    blocks = [each[1:] if len(each) > 2 else each for each in blocks]
    totals = [each.sum(keepdims=True) for each in blocks]
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = _logarithms(run, *totals)
        without = _logarithms(run, *(total - each for total, each in zip(totals, blocks, strict=True)))
    # All useful time in one block, or in one half of them, tells no error.
    known = [name for name in whole if np.isfinite(whole[name]).all() and np.isfinite(without[name]).all()]
    return _measured(run) | {name: of_blocks(float(whole[name][0]), without[name]) for name in known}


def _blocks(run: Run) -> list[FloatArray]:
    """(B,) each: mean useful time, T_ideal, T_input, T, samples."""
    balance = _balance(run)
    samples = balance.steps * float(run.summary.global_batch)
    mean_s = np.asarray(balance.useful_blocks_s.mean(axis=0))
    return [mean_s, balance.ideal_s, balance.ideal_input_s, balance.whole_s, samples]


def _busiest_s(useful_s: FloatArray) -> FloatArray:
    """(B,) the useful time of the busiest rank, chosen for each half of the blocks by the other half; useful_s: (R, B).

    The busiest of ranks that are alike is busier than they by chance, in the blocks that chose it and in no others. The
    halves alternate every few blocks.
    """
    num_blocks = useful_s.shape[1]
    is_odd = np.arange(num_blocks) * _NUM_TURNS // num_blocks % 2 == 1
    chosen = [int(np.argmax(useful_s[:, half].sum(axis=1))) for half in (is_odd, ~is_odd)]
    return np.asarray(np.where(is_odd, useful_s[chosen[1]], useful_s[chosen[0]]))


def _logarithms(
    run: Run,
    busiest_s: FloatArray,
    mean_s: FloatArray,
    ideal_s: FloatArray,
    ideal_input_s: FloatArray,
    whole_s: FloatArray,
    samples: FloatArray,
) -> dict[str, FloatArray]:
    """The logarithms of the factors, (K,) as every argument."""
    num_ranks = len(_balance(run).ranks)
    parts = {
        "parallel": (mean_s, whole_s),
        "load_balance": (mean_s, busiest_s),
        "communication": (busiest_s, whole_s),
        _SAMPLES_PER_USEFUL: (samples, mean_s * num_ranks),
        _SAMPLES_PER_WHOLE: (samples, whole_s * num_ranks),
    }
    if _in_step(run):
        parts |= {
            "input": (ideal_s, ideal_input_s),
            "serialisation": (busiest_s, ideal_s),
            "transfer": (ideal_input_s, whole_s),
            "communication": (busiest_s * ideal_input_s, ideal_s * whole_s),  # serialisation x transfer
        }
    return {name: np.log(upper / lower) for name, (upper, lower) in parts.items()}
