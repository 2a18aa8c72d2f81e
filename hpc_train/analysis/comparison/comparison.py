"""Two sides compared: every metric, every place, and what each difference amounts to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf, log
from typing import Literal, TypeVar

import numpy as np

from hpc_train.analysis.comparison.differences import Difference, differences, differences_of_work
from hpc_train.analysis.comparison.places import PlaceChange, place_changes, same_hosts
from hpc_train.analysis.comparison.run_figures import RunFigures
from hpc_train.analysis.comparison.sides import Side
from hpc_train.analysis.comparison.significance import holm_levels, p_value, relative, relative_interval, smallest_shown
from hpc_train.analysis.stats.estimate import Estimate, of_series, of_value, over_runs, ratio
from hpc_train.core.errors import UserError
from hpc_train.core.statistics import Interval
from hpc_train.core.timing_log import PHASES
from hpc_train.core.validation_log import is_score

Verdict = Literal[
    "regression", "improvement", "slower, step unaffected", "below the threshold", "no difference shown", "not judged"
]
Unit = Literal["s", "1/s", "J", "B", ""]

DEFAULT_THRESHOLD = 0.03
LEVEL = 0.05
# Three families of tests, each corrected within itself; the step time is judged alone. Hosts and ranks share one chance
# of a false verdict.
_METRICS_LEVEL, _PLACES_LEVEL = LEVEL, LEVEL / 2
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
    relative: float | None = None  # the change: 0.05 for 5% more
    interval: Interval | None = None  # of `relative`; with one run a side only within these runs
    level: float = LEVEL  # the interval's confidence is 1 - level
    smallest_shown: Interval | None = None  # the smallest decrease and increase that would have been shown
    verdict: Verdict = "not judged"
    why: str = ""  # why it is not judged


@dataclass(frozen=True)
class PlaceVerdict:
    """A phase on a host or a rank."""

    of: PlaceChange
    relative: float
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
        """The step time."""
        return self.metrics[0]

    @property
    def changed_places(self) -> list[PlaceVerdict]:
        """Those beyond the threshold, the costliest first."""
        kinds = ("regression", "improvement", "slower, step unaffected")
        changed = [place for place in self.places if place.verdict in kinds]
        return sorted(changed, key=lambda place: -abs(place.of.ratio.log) * place.of.before_s)


def compare_sides(before: Side, after: Side, threshold: float) -> RunComparison:
    """threshold: the relative change, such as 0.03, from which on a difference counts.

    Raises `UserError` for sides that did different work.
    """
    if apart := differences_of_work(before.runs, after.runs):
        told = "; ".join(f"{name}: {one} and {other}" for name, one, other in apart)
        raise UserError(
            f"{before.name} and {after.name} are not the same job: {told}",
            "Compare runs of the same ranks, hosts, batch, model and data; hpc-train report holds sizes side by side.",
        )
    metrics = _metrics(before, after, threshold)
    speed, step_s = metrics[0], metrics[0].before or 0.0
    places = place_changes(before.runs, after.runs)
    judged = [each for kind in ("host", "rank") for each in _judged_places(places, kind, threshold, step_s)]
    return RunComparison(
        before,
        after,
        threshold,
        tuple(_told_apart(each, added_s(each), speed) if each.name in PHASES else each for each in metrics),
        tuple(_told_apart(each, added_s(each), speed) for each in judged),
        tuple(differences(before.runs, after.runs)),
    )


def added_s(each: Metric | PlaceVerdict) -> float:
    """Seconds of a step that a phase takes longer than before."""
    if isinstance(each, PlaceVerdict):
        return each.relative * each.of.before_s
    return (each.after or 0.0) - (each.before or 0.0)


Judged = TypeVar("Judged", Metric, PlaceVerdict)


def _told_apart(each: Judged, added_s: float, speed: Metric) -> Judged:
    """A regression of a phase is none of the job if the step surely does not take so much longer: another phase, or the
    wait for other ranks, makes up for it. If the step's interval cannot exclude it, it stays a regression.
    """
    low, most = speed.interval or (0.0, inf)
    if each.verdict == "regression" and low <= 0 and added_s > most * (speed.before or 0.0):
        return replace(each, verdict="slower, step unaffected")
    return each


# ---------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class _Quantity:
    """What is compared. of: one run's value, with the error within the run if its steps tell it; None: unknown."""

    name: str
    unit: Unit
    of: Callable[[RunFigures], Estimate | None]
    more_is_better: bool = False
    least: float = 0.0  # a change by less, in the unit, is not judged


@dataclass(frozen=True)
class _Compared:
    """A quantity of both sides, before it is judged."""

    quantity: _Quantity
    before: float | None
    after: float | None
    ratio: Estimate | None  # None: it means another thing on the other side, or is not known on both
    why: str = ""


def _metrics(before: Side, after: Side, threshold: float) -> list[Metric]:
    least_s = LEAST_SHARE * over_runs([_step_time(run) for run in before.runs]).value
    speeds = [_Quantity(STEP_TIME, "s", _step_time), _Quantity(THROUGHPUT, "1/s", _throughput, more_is_better=True)]
    entered = [phase for phase in PHASES if any(phase in run.phases_s for run in [*before.runs, *after.runs])]
    details = [
        *(_Quantity(phase, "s", partial(_phase_time, phase), least=least_s) for phase in entered),
        _Quantity("energy per sample", "J", lambda run: _positive(run.joules_per_sample)),
        _Quantity("final loss", "", lambda run: _positive(run.loss)),
        *_validations([*before.runs, *after.runs]),
        _Quantity("peak memory of a rank", "B", lambda run: _positive(run.peak_resident_bytes)),
        _Quantity("peak GPU memory of a rank", "B", lambda run: _positive(run.peak_gpu_bytes)),
        _Quantity("start-up (s)", "", lambda run: _positive(run.start_up_s)),
    ]
    compared = [_compared(each, before, after) for each in details]
    known = [each for each in compared if each.before is not None or each.after is not None]
    levels = holm_levels([p_value(each.ratio) if each.ratio else 1.0 for each in known], _METRICS_LEVEL)
    return [
        *(_judged(_compared(each, before, after), LEVEL, threshold) for each in speeds),
        *(_judged(each, level, threshold) for each, level in zip(known, levels, strict=True)),
    ]


def _validations(runs: Sequence[RunFigures]) -> list[_Quantity]:
    """The best value of the measure that validations go by."""
    measures = dict.fromkeys(run.validation_measure for run in runs if run.validation_measure)
    return [
        _Quantity(
            f"best validation {measure.replace('_', ' ')}",
            "",
            partial(_best_validation, measure),
            more_is_better=is_score(measure),
        )
        for measure in measures
    ]


def _best_validation(measure: str, run: RunFigures) -> Estimate | None:
    return _positive(run.best_validation) if run.validation_measure == measure else None


def _step_time(run: RunFigures) -> Estimate:
    return replace(of_series(np.array(run.step_blocks_s)), log=log(run.step_s))


def _throughput(run: RunFigures) -> Estimate:
    step_time = _step_time(run)
    return replace(step_time, log=log(run.global_batch) - step_time.log)


def _phase_time(phase: str, run: RunFigures) -> Estimate | None:
    return _positive(run.mean_phase_s(phase))


def _positive(value: float | None) -> Estimate | None:
    """None for a value of which there is no ratio."""
    return of_value(value) if value is not None and value > 0 else None


def _compared(quantity: _Quantity, before: Side, after: Side) -> _Compared:
    ours, theirs = _known(quantity, after), _known(quantity, before)
    values = [over_runs(each).value if each else None for each in (theirs, ours)]
    if not ours or not theirs:
        return _Compared(quantity, values[0], values[1], None, "not known on both sides")
    why = _why_apart(quantity, before, after)
    return _Compared(quantity, values[0], values[1], None if why else ratio(ours, theirs), why)


def _known(quantity: _Quantity, side: Side) -> list[Estimate]:
    """One of each run; [] if it is unknown of any."""
    known = [each for run in side.runs if (each := quantity.of(run)) is not None]
    return known if len(known) == len(side.runs) else []


def _why_apart(quantity: _Quantity, before: Side, after: Side) -> str:
    """Why the quantity means another thing on the other side."""
    if quantity.unit == "J" and len({run.energy_quality for run in [*before.runs, *after.runs]}) > 1:
        return "measured on one side, estimated on the other"
    return ""


def _judged(compared: _Compared, level: float, threshold: float) -> Metric:
    quantity, change = compared.quantity, compared.ratio
    metric = Metric(quantity.name, quantity.unit, compared.before, compared.after, why=compared.why, level=level)
    if change is None:
        return metric
    metric = replace(metric, relative=relative(change), interval=relative_interval(change, level))
    if not change.between_runs:
        return replace(metric, why=ONE_RUN_EACH)  # how far chance moves a run is unknown
    verdict = _verdict(change, level, threshold, quantity.more_is_better)
    if verdict != "no difference shown" and abs((compared.after or 0.0) - (compared.before or 0.0)) < quantity.least:
        verdict = "below the threshold"
    return replace(metric, smallest_shown=smallest_shown(change, level), verdict=verdict)


def _verdict(change: Estimate, level: float, threshold: float, more_is_better: bool = False) -> Verdict:
    if p_value(change) >= level:
        return "no difference shown"
    if abs(relative(change)) < threshold:
        return "below the threshold"
    return "improvement" if (change.log > 0) == more_is_better else "regression"


# ---------------------------------------------------------------------------------------------- places


def _judged_places(places: Sequence[PlaceChange], kind: str, threshold: float, step_s: float) -> list[PlaceVerdict]:
    of_kind = [each for each in places if each.place.kind == kind]
    levels = holm_levels([p_value(each.ratio) for each in of_kind], _PLACES_LEVEL)
    judged = []
    for each, level in zip(of_kind, levels, strict=True):
        verdict = _verdict(each.ratio, level, threshold)
        cost_s = abs(relative(each.ratio)) * each.before_s
        if verdict != "no difference shown" and cost_s < LEAST_SHARE * step_s:
            verdict = "below the threshold"
        interval = relative_interval(each.ratio, level)
        assert interval is not None, "places are compared with repeats on a side"
        judged.append(PlaceVerdict(each, relative(each.ratio), interval, level, verdict))
    return judged
