"""Stragglers: ranks and hosts that arrive last at the reductions, and the time that this costs the job.

A step takes the same time on every rank, since all leave a reduction together: arrivals show stragglers, durations
do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.load_balance import Arrivals, Latest, LoadBalance
from hpc_train.analysis.runs.rank_records import waits
from hpc_train.analysis.stats.chance_threshold import block_length, largest_total_threshold
from hpc_train.analysis.stats.estimate import of_ratio
from hpc_train.core.records import FloatArray, IntArray
from hpc_train.core.statistics import Interval

LEAST_SHARE = 0.01  # of the job's time: a straggler that costs less is not named
# A rank must be late by this many times what it leaves reductions apart (the clocks' error), where it is last.
_CLOCK_FACTOR = 3.0
_ERROR_RATE = 0.01  # of runs of ranks that are alike, in which somebody may be named
_NEGLIGIBLE = 0.9  # of the cost of all: who adds less to those named before stays unnamed
Cause = Literal["computing", "input"]


@dataclass(frozen=True)
class Straggler:
    """One rank, or all ranks of a host. Times are of the steps of the last attempt."""

    ranks: tuple[int, ...]  # one, or those of `host`
    host: str | None  # None: not recorded
    whole_host: bool
    persistent: bool  # late in its typical step; otherwise sporadically
    share_last: float  # of the steps in which it arrives last
    late_s: float  # mean over the steps in which it is last: after the next-to-last
    cost_s: float  # per step: saved if it, and those named before it, were never later than the next
    share: float  # of the job's time: cost
    share_interval: Interval | None  # 95%
    cause: Cause | None  # where it spends more time than the median rank; None: in neither
    excess: float | None  # computing: its useful time over the median rank's; input: its wait as a share of its time


@dataclass(frozen=True)
class StragglerAnalysis:
    """The stragglers of one run, the costliest first."""

    stragglers: tuple[Straggler, ...] = ()
    share: float = 0.0  # of the job's time: cost of all of them together
    share_interval: Interval | None = None  # 95%
    none_because: str | None = None  # why nobody is named; None if somebody is
    clock_error_s: float | None = None  # of the median rank, if arrivals on several hosts are compared
    unaligned: str | None = None  # why waits are compared instead of arrivals


def find_stragglers(run: Run) -> StragglerAnalysis:
    """Names the ranks or hosts that cost the job 1% of its time, by more than chance and clock errors explain.

    In each step the last rank to arrive is blamed for what the others would save if it were as early as the next. Equal
    ranks would share the blame by chance (`largest_total_threshold`). Whoever bears more is set aside, and the search
    continues without it: so several slow ranks are found, though each hides behind the others. A host is named instead
    of its ranks if more than half of them are late by half of what its latest rank is. What those named cost is added
    up over steps that did not choose them (`_held_out_saved_s`): the worst of many looks worse than it is. It is no
    more than what ranks lose by differing in computing and input (`_capped`).
    """
    balance = run.load_balance
    if balance is None:
        return StragglerAnalysis(none_because="no steady step")
    if reason := _why_no_waits(run, len(balance.ranks)):
        return StragglerAnalysis(none_because=reason)
    arrivals = balance.arrivals
    if arrivals is None:
        return StragglerAnalysis(none_because="arrivals at the reductions were not recorded")
    blamed = _blamed(arrivals, len(balance.ranks))
    saved_s = _capped(_held_out_saved_s(blamed.latest, blamed.members), arrivals, len(balance.ranks), blamed)
    share = float(saved_s[-1].sum()) / arrivals.whole_s
    clock_error_s = _typical_clock_error(arrivals)
    if not blamed.members or share < LEAST_SHARE:
        reason = f"no rank costs the others {LEAST_SHARE:.0%} of their time by more than chance"
        return StragglerAnalysis(none_because=reason, clock_error_s=clock_error_s, unaligned=arrivals.unaligned)
    return StragglerAnalysis(
        tuple(
            _straggler(balance, arrivals, blamed, index, saved_s[index + 1] - saved_s[index])
            for index in range(len(blamed.members))
        ),
        share,
        _saved_share_interval(saved_s[-1], arrivals),
        clock_error_s=clock_error_s,
        unaligned=arrivals.unaligned,
    )


def _saved_share_interval(saved_s: FloatArray, arrivals: Arrivals) -> Interval | None:
    """95%, of the time saved as a share of the time of the steps; it saves no less than nothing."""
    left = of_ratio(arrivals.step_s - saved_s, arrivals.step_s).interval
    return None if left is None else (max(0.0, 1 - left[1]), max(0.0, 1 - left[0]))


def _why_no_waits(run: Run, num_ranks: int) -> str | None:
    """Why ranks of the run do not wait for each other; None if they do."""
    if num_ranks == 1:
        return "one rank waits for nobody"
    if waits(run.config.reduce, num_ranks):
        return None
    if run.config.reduce.strategy == "parameter_server":
        return "no rank waits for another in a step, since servers answer each worker at once (reduce.asynchronous)"
    return "no rank waits for another in a step, since gradients are not reduced"


def _typical_clock_error(arrivals: Arrivals) -> float | None:
    compared = arrivals.basis == "arrival" and len(arrivals.hosts) > 1
    return float(np.median(arrivals.clock_error_s)) if compared else None


# ---------------------------------------------------------------------------------------------- the search


@dataclass(frozen=True, eq=False)
class _Blamed:
    """Who bears more blame than chance explains, the worst first."""

    latest: Latest  # of hosts or of ranks
    members: list[int]  # as `latest.who` counts them
    by_host: bool


def _blamed(arrivals: Arrivals, num_ranks: int) -> _Blamed:
    """Whole hosts if there are any, else ranks."""
    # On one host, too: there it is no clock's error, but ranks that leave apart begin, and arrive, apart.
    errors_s = arrivals.clock_error_s
    host_errors_s = _host_errors(arrivals, errors_s)
    families = 1 + (len(arrivals.hosts) > 1)  # searched for the same thing, so they share the error rate
    hosts = _search(arrivals, arrivals.latest_hosts, len(arrivals.hosts), host_errors_s, _ERROR_RATE / families)
    if any(_is_whole(arrivals, host) for host in hosts):
        return _Blamed(arrivals.latest_hosts, hosts, by_host=True)
    ranks = _search(arrivals, arrivals.latest, num_ranks, errors_s, _ERROR_RATE / families)
    return _Blamed(arrivals.latest, ranks, by_host=False)


def _search(arrivals: Arrivals, latest: Latest, num_members: int, errors_s: FloatArray, error_rate: float) -> list[int]:
    found: list[int] = []
    shares: list[float] = []
    # The last row of `latest` has nobody behind it to compare with.
    while num_members - len(found) > 1 and len(found) < len(latest.who) - 1:
        who, late_s = _last_without(latest, found)
        known = who >= 0
        blame_s = np.bincount(who[known], late_s[known], num_members)
        worst = int(np.argmax(blame_s))
        times_last = int(np.count_nonzero(who == worst))
        amounts, others = late_s[known], who[known] - np.searchsorted(np.sort(found), who[known])  # numbered anew
        length = block_length(amounts, others)
        if blame_s[worst] <= largest_total_threshold(amounts, others, num_members - len(found), length, error_rate):
            break
        if blame_s[worst] < _CLOCK_FACTOR * errors_s[worst] * times_last:
            break
        found.append(worst)
        shares.append(float(_saved_s(latest, found).sum()) / arrivals.whole_s)
    for index, share in enumerate(shares):
        if share >= _NEGLIGIBLE * shares[-1]:
            return found[: index + 1]
    return found


def _held_out_saved_s(latest: Latest, members: Sequence[int]) -> list[FloatArray]:
    """For the first 0, 1 ... of the members, (steps,) what is saved without them, on steps that did not choose them.

    Cross-fitting: for each half of the steps, as many members as were blamed are found anew in the other half. The
    halves alternate in blocks of consecutive steps, so that a disturbance hardly reaches into both.
    """
    num_steps = latest.who.shape[1]
    who, late_s = _last_without(latest, [])
    length = min(block_length(late_s, who), num_steps // 4 + 1)
    is_odd = np.arange(num_steps) // length % 2 == 1
    saved_s = [np.zeros(num_steps) for _ in range(len(members) + 1)]
    for half in (is_odd, ~is_odd):
        chosen = _most_blamed(latest, np.flatnonzero(~half), len(members))
        # In the order of the members as far as they are the same, so that each has its own cost.
        chosen.sort(key=lambda member: members.index(member) if member in members else len(members))
        for count in range(len(members) + 1):
            saved_s[count][half] = _saved_s(latest, chosen[:count])[half]
    return saved_s


def _capped(saved_s: list[FloatArray], arrivals: Arrivals, num_ranks: int, blamed: _Blamed) -> list[FloatArray]:
    """The same in proportion, together no more than POP's load balance x input x serialisation leaves to be saved.

    A rank that also leaves reductions late arrives later than by its computing and its input, and the others would wait
    for that part whoever came last. Without S of N ranks the mean of the others is at least (N mean - S slowest) /
    (N - S), so that a stretch saves at most N / (N - S) of what its slowest rank exceeds the mean by.
    """
    num_late = sum(len(_ranks_of(arrivals, blamed, member)) for member in blamed.members)
    total_s, most_s = float(saved_s[-1].sum()), float(arrivals.excess_s.sum()) * num_ranks / (num_ranks - num_late)
    part = min(1.0, most_s / total_s) if total_s > 0 else 1.0
    return [each * part for each in saved_s]


def _most_blamed(latest: Latest, steps: IntArray, count: int) -> list[int]:
    """Up to `count` members, each the one that bears most blame in these steps once those before are set aside."""
    chosen: list[int] = []
    while len(chosen) < count:
        who, late_s = (values[steps] for values in _last_without(latest, chosen))
        known = who >= 0
        if not known.any():
            break
        chosen.append(int(np.argmax(np.bincount(who[known], late_s[known]))))
    return chosen


def _last_without(latest: Latest, aside: Sequence[int]) -> tuple[IntArray, FloatArray]:
    """(steps,) who is last in each step among those not set aside, and by how many seconds; -1 and 0 if unknown."""
    kept = ~np.isin(latest.who, [*aside, -1])
    rank_among_kept = np.cumsum(kept, axis=0)
    first, second = np.argmax(rank_among_kept == 1, axis=0), np.argmax(rank_among_kept == 2, axis=0)
    steps = np.arange(latest.who.shape[1])
    known = rank_among_kept[-1] >= 2
    late_s = latest.late_s[first, steps] - np.where(known, latest.late_s[second, steps], 0.0)
    return np.where(known, latest.who[first, steps], -1), np.where(known, late_s, 0.0)


def _saved_s(latest: Latest, aside: Sequence[int]) -> FloatArray:
    """(steps,) seconds saved if those set aside were never later than the last of the others."""
    if not aside:
        return np.zeros(latest.who.shape[1])
    kept = ~np.isin(latest.who, [*aside, -1])
    others = np.where(kept, latest.late_s, -np.inf).max(axis=0)
    earliest_known = np.where(np.isfinite(latest.late_s), latest.late_s, np.inf).min(axis=0)
    return np.asarray(latest.late_s[0] - np.where(np.isfinite(others), others, earliest_known))


def _host_errors(arrivals: Arrivals, errors_s: FloatArray) -> FloatArray:
    """(hosts,) the median clock error over a host's ranks."""
    order = np.argsort(arrivals.host_of, kind="stable")
    ends = np.flatnonzero(np.diff(arrivals.host_of[order])) + 1
    errors = np.zeros(len(arrivals.hosts))
    for members in np.split(order, ends):
        errors[arrivals.host_of[members[0]]] = np.median(errors_s[members])
    return errors


def _is_whole(arrivals: Arrivals, host: int) -> bool:
    """Whether a host is late as a whole, rather than one of its ranks."""
    late_s = arrivals.late_s[arrivals.host_of == host]
    return len(late_s) > 1 and late_s.max() > 0 and float((late_s > 0.5 * late_s.max()).mean()) > 0.5


# ---------------------------------------------------------------------------------------------- one straggler


def _straggler(balance: LoadBalance, arrivals: Arrivals, blamed: _Blamed, index: int, saved_s: FloatArray) -> Straggler:
    """The one at `index` of those blamed. saved_s: (steps,) what it costs on top of those before it."""
    member = blamed.members[index]
    ranks = _ranks_of(arrivals, blamed, member)
    cost_s = float(saved_s.sum())
    others = [other for other in blamed.members if other != member]
    who, late_s = _last_without(blamed.latest, others)
    is_last = who == member
    cause, excess = _cause(balance, ranks)
    return Straggler(
        tuple(balance.ranks[ranks].tolist()),
        balance.hosts[ranks[0]],
        whole_host=len(ranks) > 1,
        persistent=bool(np.median(arrivals.typical_late_s[ranks]) >= 0.5 * np.median(arrivals.late_s[ranks])),
        share_last=float(is_last.mean()),
        late_s=float(late_s[is_last].mean()) if is_last.any() else 0.0,
        cost_s=cost_s / arrivals.num_steps,
        share=cost_s / arrivals.whole_s,
        share_interval=_saved_share_interval(saved_s, arrivals),
        cause=cause,
        excess=excess,
    )


def _ranks_of(arrivals: Arrivals, blamed: _Blamed, member: int) -> IntArray:
    """Positions of its ranks: all of a host that is late as a whole, the latest of another host."""
    if not blamed.by_host:
        return np.array([member])
    ranks = np.flatnonzero(arrivals.host_of == member)
    return ranks if _is_whole(arrivals, member) else ranks[[int(np.argmax(arrivals.late_s[ranks]))]]


def _cause(balance: LoadBalance, ranks: IntArray) -> tuple[Cause | None, float | None]:
    """On what these ranks spend more time than the median of the others, and how much more (`Straggler.excess`)."""
    others = np.setdiff1d(np.arange(len(balance.ranks)), ranks)
    useful_s, input_s = balance.useful_s, balance.input_s
    usual_s = float(np.median(useful_s[others]))
    more_computing_s = float(np.median(useful_s[ranks])) - usual_s
    more_input_s = float(np.median(input_s[ranks]) - np.median(input_s[others]))
    if max(more_computing_s, more_input_s) <= 0:
        return None, None
    if more_computing_s >= more_input_s and usual_s:
        return "computing", 1 + more_computing_s / usual_s
    return "input", float(np.median(input_s[ranks]) / balance.whole_s.sum())
