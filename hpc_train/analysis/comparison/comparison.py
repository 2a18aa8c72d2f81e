"""Two sides compared: every metric, every place, and what each difference amounts to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp, hypot, log
from typing import Literal

import numpy as np

from hpc_train.analysis.comparison.differences import Difference, differences
from hpc_train.analysis.comparison.log_change import LogChange, change, geometric_mean_of, holm_levels
from hpc_train.analysis.comparison.places import PlaceChange, place_changes, same_hosts
from hpc_train.analysis.comparison.run_figures import RunFigures
from hpc_train.analysis.comparison.sides import Side
from hpc_train.core.statistics import Interval, mean_interval
from hpc_train.core.timing_log import PHASES

Verdict = Literal["regression", "improvement", "below the threshold", "no difference shown", "not judged"]
Unit = Literal["s", "1/s", "J", "B", ""]

LEVEL = 0.05
# Three families of tests, each corrected within itself; the step time is judged alone. Hosts and ranks share one chance
# of a false verdict.
_METRICS_LEVEL, _PLACES_LEVEL = LEVEL, LEVEL / 2
ALONE_THRESHOLD = 0.15  # with one run a side: runs of the same job commonly differ by several percent
LEAST_SHARE = 0.001  # of a step: a phase whose change amounts to less is not judged
STEP_TIME, THROUGHPUT = "step time", "samples/s"
ONE_RUN_EACH = "one run a side"


@dataclass(frozen=True)
class Metric:
    """One quantity of the whole job; before and after are geometric means over repeats."""

    name: str
    unit: Unit
    before: float | None  # None: not every run of the side has it
    after: float | None
    relative: float | None  # the change: 0.05 for 5% more
    interval: Interval | None  # of `relative`; with one run a side only within these runs
    level: float  # the interval's confidence is 1 - level
    smallest_shown: float | None  # the smallest increase that would have been shown
    verdict: Verdict
    why: str = ""  # why it is not judged


@dataclass(frozen=True)
class PlaceVerdict:
    """A phase on a host or a rank."""

    of: PlaceChange
    interval: Interval
    level: float
    verdict: Verdict


@dataclass(frozen=True, eq=False)
class RunComparison:
    before: Side
    after: Side
    threshold: float
    metrics: tuple[Metric, ...]
    places: tuple[PlaceVerdict, ...]
    differences: tuple[Difference, ...]

    @property
    def one_run_each(self) -> bool:
        return len(self.before.runs) == len(self.after.runs) == 1

    @property
    def same_hosts(self) -> bool:
        return same_hosts([*self.before.runs, *self.after.runs])

    @property
    def is_regression(self) -> bool:
        return "regression" in [*(metric.verdict for metric in self.metrics), *(place.verdict for place in self.places)]

    @property
    def speed(self) -> Metric:
        """The step time, or the throughput if the sides take different global batches."""
        step_time, throughput, *_ = self.metrics
        return throughput if step_time.interval is None else step_time

    @property
    def changed_places(self) -> list[PlaceVerdict]:
        """Regressions and improvements, the costliest first."""
        changed = [place for place in self.places if place.verdict in ("regression", "improvement")]
        return sorted(changed, key=lambda place: -abs(place.of.change.difference) * place.of.before_s)


def compare_sides(before: Side, after: Side, threshold: float) -> RunComparison:
    """threshold: the relative change, such as 0.03, from which on a difference counts."""
    metrics = _metrics(before, after, threshold)
    step_s = metrics[0].before or 0.0
    places = place_changes(before.runs, after.runs)
    judged = [each for kind in ("host", "rank") for each in _judged_places(places, kind, threshold, step_s)]
    return RunComparison(
        before, after, threshold, tuple(metrics), tuple(judged), tuple(differences(before.runs, after.runs))
    )


# ---------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class _Quantity:
    """A metric before it is judged."""

    name: str
    unit: Unit
    of: Callable[[RunFigures], float | None]
    more_is_better: bool = False
    least: float = 0.0  # a difference below, in the metric's unit, is not judged


def _metrics(before: Side, after: Side, threshold: float) -> list[Metric]:
    step_s = geometric_mean_of([run.step_s for run in before.runs])
    least_s = LEAST_SHARE * step_s
    quantities = [
        _Quantity(STEP_TIME, "s", lambda run: run.step_s),
        _Quantity(THROUGHPUT, "1/s", lambda run: run.samples_per_s, more_is_better=True),
    ]
    entered = [phase for phase in PHASES if any(phase in run.phases_s for run in [*before.runs, *after.runs])]
    phases = [_Quantity(phase, "s", _phase(phase), least=least_s) for phase in entered]
    others = [
        _Quantity("energy per sample", "J", lambda run: run.joules_per_sample),
        _Quantity("final loss", "", lambda run: run.loss),
        _Quantity("peak memory of a rank", "B", lambda run: run.peak_resident_bytes),
        _Quantity("peak GPU memory of a rank", "B", lambda run: run.peak_gpu_bytes),
    ]
    details = [each for each in [*phases, *others] if _known(each, before) or _known(each, after)]
    return [
        *(_metric(each, before, after, threshold, LEVEL) for each in quantities),
        *_corrected(details, before, after, threshold),
    ]


def _phase(phase: str) -> Callable[[RunFigures], float | None]:
    return lambda run: run.mean_phase_s(phase) or None


def _known(quantity: _Quantity, side: Side) -> list[float] | None:
    """One value of each run; None if a run lacks it, or has none that is positive."""
    values = [quantity.of(run) for run in side.runs]
    known = [value for value in values if value is not None and value > 0]
    return known if len(known) == len(values) else None


def _corrected(quantities: Sequence[_Quantity], before: Side, after: Side, threshold: float) -> list[Metric]:
    changes = [_change(each, before, after) for each in quantities]
    judged = [index for index, each in enumerate(changes) if each is not None]
    levels = dict(zip(judged, holm_levels([_p(changes[index]) for index in judged], _METRICS_LEVEL), strict=True))
    return [_metric(each, before, after, threshold, levels.get(index, LEVEL)) for index, each in enumerate(quantities)]


def _p(of: LogChange | None) -> float:
    return 1.0 if of is None else of.p_value()


def _change(quantity: _Quantity, before: Side, after: Side) -> LogChange | None:
    values = _known(quantity, before), _known(quantity, after)
    if values[0] is None or values[1] is None or _why_apart(quantity, before, after):
        return None
    return change(values[0], values[1])


def _why_apart(quantity: _Quantity, before: Side, after: Side) -> str:
    """Why the metric means another thing on the other side."""
    if quantity.unit == "s" and before.runs[0].global_batch != after.runs[0].global_batch:
        return "the global batch differs"
    if quantity.unit == "J" and len({run.energy_quality for run in [*before.runs, *after.runs]}) > 1:
        return "measured on one side, estimated on the other"
    return ""


def _metric(quantity: _Quantity, before: Side, after: Side, threshold: float, level: float) -> Metric:
    values = _known(quantity, before), _known(quantity, after)
    means = [None if each is None else geometric_mean_of(each) for each in values]
    relative = means[1] / means[0] - 1 if means[0] and means[1] else None
    metric = Metric(quantity.name, quantity.unit, means[0], means[1], relative, None, level, None, "not judged")
    if relative is None:
        return replace(metric, why="not known on both sides")
    if why := _why_apart(quantity, before, after):
        return replace(metric, why=why)
    of = _change(quantity, before, after)
    if of is None:
        return _alone(metric, quantity, before, after, threshold)
    interval = of.interval(level)
    verdict = _verdict(of, level, threshold, quantity.more_is_better)
    if verdict != "no difference shown" and abs((means[1] or 0.0) - (means[0] or 0.0)) < quantity.least:
        verdict = "below the threshold"
    return replace(metric, interval=interval, smallest_shown=of.smallest_shown(level), verdict=verdict)


def _verdict(of: LogChange, level: float, threshold: float, more_is_better: bool = False) -> Verdict:
    if of.p_value() >= level:
        return "no difference shown"
    if abs(of.relative) < threshold:
        return "below the threshold"
    return "improvement" if (of.difference > 0) == more_is_better else "regression"


def _alone(metric: Metric, quantity: _Quantity, before: Side, after: Side, threshold: float) -> Metric:
    """With one run a side: how far chance moves a run is unknown, so only a large change of the step time counts."""
    if quantity.name not in (STEP_TIME, THROUGHPUT):
        return replace(metric, why=ONE_RUN_EACH)
    interval = _within_runs(before.runs[0], after.runs[0])
    if quantity.name == THROUGHPUT:
        more = after.runs[0].global_batch / before.runs[0].global_batch
        interval = more / interval[1], more / interval[0]
    low, high = interval[0] - 1, interval[1] - 1
    relative = metric.relative or 0.0
    metric = replace(metric, interval=(low, high), why=ONE_RUN_EACH)
    needed = max(threshold, ALONE_THRESHOLD)
    if not (low > needed or high < -needed):
        return metric
    return replace(metric, verdict="improvement" if (relative > 0) == quantity.more_is_better else "regression", why="")


def _within_runs(before: RunFigures, after: RunFigures) -> Interval:
    """The 95% interval of the ratio of the mean step times of two runs, from the intervals within each."""
    ratio, half_widths = after.step_s / before.step_s, []
    for run in (before, after):
        low, _, high = mean_interval(np.array(run.step_blocks_s))
        half_widths.append(log(high / low) / 2 if low and high else 0.0)
    factor = exp(hypot(*half_widths))
    return ratio / factor, ratio * factor


# ---------------------------------------------------------------------------------------------- places


def _judged_places(places: Sequence[PlaceChange], kind: str, threshold: float, step_s: float) -> list[PlaceVerdict]:
    of_kind = [each for each in places if each.place.kind == kind]
    levels = holm_levels([each.change.p_value() for each in of_kind], _PLACES_LEVEL)
    judged = []
    for each, level in zip(of_kind, levels, strict=True):
        verdict = _verdict(each.change, level, threshold)
        cost_s = abs(each.change.relative) * each.before_s
        if verdict != "no difference shown" and cost_s < LEAST_SHARE * step_s:
            verdict = "below the threshold"
        judged.append(PlaceVerdict(each, each.change.interval(level), level, verdict))
    return judged
