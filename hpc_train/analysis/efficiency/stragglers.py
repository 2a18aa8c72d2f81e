"""Who holds the others up: ranks and hosts that come last to the reductions, and the time that costs the job.

A step takes as long on every rank, since all leave a reduction together: durations name nobody, arrivals do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.load_balance import Arrivals, Latest, LoadBalance
from hpc_train.analysis.runs.rank_records import waits
from hpc_train.analysis.stats.bootstrap import ratio_of_sums_interval
from hpc_train.analysis.stats.permutation import largest_total_threshold
from hpc_train.core.records import FloatArray, IntArray
from hpc_train.core.statistics import Interval

LEAST_SHARE = 0.01  # of the job's time: what costs less is not told
_CLOCK_FACTOR = 3.0  # how many times the clocks' error a rank must be late by, in the steps in which it is last
Cause = Literal["computing", "input"]


@dataclass(frozen=True)
class Straggler:
    """One rank, or all ranks of a host. Times are of the steps of the last attempt."""

    ranks: tuple[int, ...]  # one, or those of `host`
    host: str | None  # None: not written down
    whole_host: bool
    persistent: bool  # late in its typical step; otherwise now and then
    share_last: float  # of the steps in which it comes last
    late_s: float  # mean over the steps in which it comes last: later than the next
    cost_s: float  # per step: what would be saved were it, and who is named before it, never later than the next
    share: float  # of the job's time: cost
    share_interval: Interval | None  # 95%
    cause: Cause | None  # where more of its time goes than the median rank's; None: neither
    excess: float | None  # computing: its useful time over the median rank's; input: its wait as a share of its time


@dataclass(frozen=True)
class StragglerAnalysis:
    """Whom a run's ranks wait for. `told` says in words why there is nobody to be named; None where there is."""

    stragglers: tuple[Straggler, ...] = ()
    share: float = 0.0  # of the job's time: cost of all of them together
    share_interval: Interval | None = None  # 95%
    told: str | None = None
    clock_error_s: float | None = None  # of the median rank, where arrivals on several hosts are compared
    unaligned: str | None = None  # why waits are compared instead


def find_stragglers(run: Run) -> StragglerAnalysis:
    """Names those who cost the job 1% of its time or more, by more than chance and clocks' errors explain.

    In each step the last rank to arrive is blamed for what the others would save were it as early as the next. Alike
    ranks would share this blame by chance: each step's is given to a rank drawn at random, 1,000 times, and who bears
    more than the most that any rank bears in 99% of these draws is no accident. With that one set aside the search goes
    on, so that several slow ranks are found, though each alone hides behind the others. A host is named instead of a
    rank where more than half of its ranks are late by half of what its latest is.
    """
    balance = run.load_balance
    if balance is None:
        return StragglerAnalysis(told="no steady step")
    if len(balance.ranks) == 1:
        return StragglerAnalysis(told="one rank waits for nobody")
    if not waits(run.config.reduce, len(balance.ranks)):
        served = run.config.reduce.strategy == "parameter_server"
        how = "each worker is answered by itself (reduce.asynchronous)" if served else "gradients are not reduced"
        return StragglerAnalysis(told=f"no rank waits for another in a step, {how}")
    arrivals = balance.arrivals
    if arrivals is None:
        return StragglerAnalysis(told="when ranks came to the reductions was not recorded")
    errors_s = arrivals.clock_error_s * (len(arrivals.hosts) > 1)  # one host has one clock
    hosts = _found(arrivals, arrivals.latest_hosts, len(arrivals.hosts), _host_error(arrivals, errors_s))
    if not any(_is_whole(arrivals, host) for host in hosts):
        hosts = []
    ranks = [] if hosts else _found(arrivals, arrivals.latest, len(balance.ranks), errors_s)
    latest = arrivals.latest_hosts if hosts else arrivals.latest
    blamed = hosts or ranks
    saved_s = _saved_s(latest, blamed)
    share = float(saved_s.sum()) / arrivals.whole_s
    if not blamed or share < LEAST_SHARE:
        return StragglerAnalysis(
            told=f"no rank costs the others {LEAST_SHARE:.0%} of their time by more than chance",
            clock_error_s=_typical_error(arrivals),
            unaligned=arrivals.unaligned,
        )
    named = tuple(_straggler(balance, arrivals, latest, blamed, place, bool(hosts)) for place in range(len(blamed)))
    span = ratio_of_sums_interval(saved_s, arrivals.step_s)
    return StragglerAnalysis(named, share, span, None, _typical_error(arrivals), arrivals.unaligned)


def _typical_error(arrivals: Arrivals) -> float | None:
    compared = arrivals.basis == "arrival" and len(arrivals.hosts) > 1
    return float(np.median(arrivals.clock_error_s)) if compared else None


def _host_error(arrivals: Arrivals, errors_s: FloatArray) -> FloatArray:
    """(hosts,) the median over a host's ranks."""
    order = np.argsort(arrivals.host_of, kind="stable")
    ends = np.flatnonzero(np.diff(arrivals.host_of[order])) + 1
    errors = np.zeros(len(arrivals.hosts))
    for members in np.split(order, ends):
        errors[arrivals.host_of[members[0]]] = np.median(errors_s[members])
    return errors


def _is_whole(arrivals: Arrivals, host: int) -> bool:
    """Whether a host is late as a whole, and not one of its ranks."""
    late = arrivals.late_s[arrivals.host_of == host]
    return len(late) > 1 and late.max() > 0 and float((late > 0.5 * late.max()).mean()) > 0.5


def _blame(latest: Latest, aside: Sequence[int]) -> tuple[IntArray, FloatArray]:
    """(steps,) who is last in each step of those not set aside, and (steps,) by how many seconds; -1, 0: not known."""
    kept = ~np.isin(latest.who, [*aside, -1])
    place = np.cumsum(kept, axis=0)
    first, second = np.argmax(place == 1, axis=0), np.argmax(place == 2, axis=0)
    steps = np.arange(latest.who.shape[1])
    known = place[-1] >= 2
    late = latest.late_s[first, steps] - np.where(known, latest.late_s[second, steps], 0.0)
    return np.where(known, latest.who[first, steps], -1), np.where(known, late, 0.0)


def _saved_s(latest: Latest, aside: Sequence[int]) -> FloatArray:
    """(steps,) seconds that each would take less were those set aside never later than the last of the others."""
    if not aside:
        return np.zeros(latest.who.shape[1])
    kept = ~np.isin(latest.who, [*aside, -1])
    others = np.where(kept, latest.late_s, -np.inf).max(axis=0)
    least = np.where(np.isfinite(latest.late_s), latest.late_s, np.inf).min(axis=0)  # of those that are known
    return np.asarray(latest.late_s[0] - np.where(np.isfinite(others), others, least))


def _found(arrivals: Arrivals, latest: Latest, num: int, error_s: FloatArray) -> list[int]:
    """Positions of those who bear more blame than chance gives, the worst first; at most as many as can be told."""
    found: list[int] = []
    shares: list[float] = []
    while num - len(found) > 1 and len(found) < len(latest.who) - 1:
        who, late_s = _blame(latest, found)
        known = who >= 0
        blame = np.bincount(who[known], late_s[known], num)
        times = np.bincount(who[known], minlength=num)
        worst = int(np.argmax(blame))
        num_others = num - len(found)
        if blame[worst] <= largest_total_threshold(late_s[known], num_others):
            break
        if blame[worst] < _CLOCK_FACTOR * error_s[worst] * times[worst]:
            break
        found.append(worst)
        shares.append(float(_saved_s(latest, found).sum()) / arrivals.whole_s)
    # Those at the end who add next to nothing stay unnamed.
    enough = [place for place, share in enumerate(shares) if share >= 0.9 * shares[-1]]
    return found[: enough[0] + 1] if enough else []


def _straggler(
    balance: LoadBalance, arrivals: Arrivals, latest: Latest, blamed: Sequence[int], place: int, by_host: bool
) -> Straggler:
    """The one at `place` of those blamed, its cost on top of theirs who stand before it."""
    one = blamed[place]
    members = np.flatnonzero(arrivals.host_of == one) if by_host else np.array([one])
    whole = by_host and _is_whole(arrivals, one)
    if by_host and not whole:
        members = members[[int(np.argmax(arrivals.late_s[members]))]]
    saved_s = _saved_s(latest, blamed[: place + 1]) - _saved_s(latest, blamed[:place])
    cost_s = float(saved_s.sum())
    who, late_s = _blame(latest, [other for other in blamed if other != one])
    mine = who == one
    cause, excess = _cause(balance, members)
    return Straggler(
        tuple(balance.ranks[members].tolist()),
        balance.hosts[members[0]],
        whole,
        persistent=bool(np.median(arrivals.typical_late_s[members]) >= 0.5 * np.median(arrivals.late_s[members])),
        share_last=float(mine.mean()),
        late_s=float(late_s[mine].mean()) if mine.any() else 0.0,
        cost_s=cost_s / arrivals.num_steps,
        share=cost_s / arrivals.whole_s,
        share_interval=ratio_of_sums_interval(saved_s, arrivals.step_s),
        cause=cause,
        excess=excess,
    )


def _cause(balance: LoadBalance, members: IntArray) -> tuple[Cause | None, float | None]:
    """What those at `members` have more of than the median of the others."""
    others = np.setdiff1d(np.arange(len(balance.ranks)), members)
    useful, stall = balance.useful_s, balance.input_s
    usual = float(np.median(useful[others]))
    more = float(np.median(useful[members])) - usual
    more_input = float(np.median(stall[members]) - np.median(stall[others]))
    if max(more, more_input) <= 0:
        return None, None
    if more >= more_input and usual:
        return "computing", 1 + more / usual
    return "input", float(np.median(stall[members]) / balance.whole_s.sum())
