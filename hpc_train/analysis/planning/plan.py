"""How many nodes to ask for: predicted time, energy and node-hours against what may be spent."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from hpc_train.analysis.models.measurements import Measurements
from hpc_train.analysis.models.predict import Forecast, Prediction
from hpc_train.analysis.planning.budget import Work, node_counts
from hpc_train.analysis.planning.further_run import FurtherRun, further_run
from hpc_train.analysis.planning.memory import RankMemory
from hpc_train.analysis.planning.power import LEAST_POWER_ERROR, Power, power
from hpc_train.analysis.stats.repeats import NORMAL_95
from hpc_train.core.errors import UserError
from hpc_train.core.statistics import Interval

FAR = 4.0  # times the largest measured size: only --max-nodes considers more
_MOST_WORK_ERROR = 0.9  # of the work, downwards: beyond it the work would be less than nothing
LimitName = Literal["deadline", "energy", "node_hours", "memory"]
Criterion = Literal["asked", "none", "deadline", "budget", "knee"]


@dataclass(frozen=True)
class Limits:
    """What may be spent; None is no limit."""

    deadline_s: float | None = None
    energy_j: float | None = None
    node_hours: float | None = None
    max_nodes: int | None = None

    @property
    def any_budget(self) -> bool:
        return any(each is not None for each in (self.deadline_s, self.energy_j, self.node_hours))


@dataclass(frozen=True)
class BrokenLimit:
    """A limit that an option breaks or may break, in seconds, joules, node-hours or bytes of a rank."""

    name: LimitName
    limit: float
    worst: float  # the upper end of the option's interval; of memory what a rank would take
    best: float = 0.0  # the lower end; 0 if it is unknown

    @property
    def is_certain(self) -> bool:
        return self.best > self.limit


@dataclass(frozen=True)
class Option:
    """One number of nodes: what the work takes there, with 95% intervals. None is unknown."""

    forecast: Forecast
    time_s: float | None = None
    time_interval_s: Interval | None = None
    node_hours: float | None = None
    node_hours_interval: Interval | None = None
    energy_j: float | None = None
    energy_interval_j: Interval | None = None
    broken: tuple[BrokenLimit, ...] = ()

    @property
    def nodes(self) -> int:
        return self.forecast.nodes

    @property
    def speed(self) -> float:
        """To compare options of one plan: the work per second, or samples/s if the work is unknown."""
        return 1 / self.time_s if self.time_s else self.forecast.samples_per_s

    def against(self, other: "Option") -> tuple[float, float]:
        """(gain in speed, rise in node-hours) over another option, relative."""
        faster = self.speed / other.speed - 1
        return faster, self.nodes / other.nodes / (1 + faster) - 1


@dataclass(frozen=True, eq=False)
class Plan:
    """The chosen number of nodes among all options. `report/notes/plan.py` says why it and no other."""

    prediction: Prediction
    work: Work | None
    limits: Limits
    power: Power | None
    options: tuple[Option, ...]  # by nodes
    chosen: Option | None  # None: no option keeps the limits, or nothing is to be chosen
    criterion: Criterion  # what the choice was made by; "asked": sizes were named and no budget
    further: FurtherRun | None = None  # None: no run would tell much more

    @property
    def answer(self) -> Option:
        """The chosen option; the largest if none was chosen."""
        return self.chosen or self.options[-1]

    @property
    def was_asked(self) -> bool:
        """Whether sizes were named and none is to be chosen."""
        return self.criterion == "asked"

    @property
    def is_forecast(self) -> bool:
        """Whether the answer goes beyond the measured sizes, rather than tells what was measured."""
        told = (self.chosen,) if self.chosen else self.options
        return any(option.forecast.is_forecast for option in told)

    @property
    def next_larger(self) -> Option | None:
        return self._beside(1)

    @property
    def next_smaller(self) -> Option | None:
        return self._beside(-1)

    def _beside(self, step: int) -> Option | None:
        if self.chosen is None:
            return None
        index = self.options.index(self.chosen) + step
        return self.options[index] if 0 <= index < len(self.options) else None


def make_plan(
    prediction: Prediction,
    work: Work | None = None,
    limits: Limits | None = None,
    sizes: Sequence[int] = (),
    memory: RankMemory | None = None,
    run_steps: float | None = None,
) -> Plan:
    """Considers measured sizes and whole nodes up to `limits.max_nodes` (by default `FAR` times the largest measured),
    or `sizes` alone. A fit that misses a measured size is not asked about others: then only measured sizes count.

    With a deadline the fewest nodes that meet it are chosen, with budgets alone the fastest option within them. Without
    either it is the knee, the largest speedup x efficiency, beyond which nodes cost more than they save (Eager,
    Zahorjan and Lazowska, "Speedup versus efficiency in parallel systems", IEEE Transactions on Computers 38(3), 1989).
    A limit is kept if the upper end of the 95% interval keeps it. No size is chosen on which a rank would take more
    `memory` than it may. run_steps: of the measured runs. Raises `UserError` for a limit on what is unknown.
    """
    limits = limits or Limits()
    measured_power = power(prediction.measurements)
    _check(limits, work, measured_power)
    forecasts = prediction.at(_sizes(prediction, limits, sizes))
    options = [_option(forecast, prediction.measurements, work, measured_power) for forecast in forecasts]
    judged = tuple(
        replace(option, broken=(*_broken(option, limits), *_without_room(option, memory))) for option in options
    )
    chosen, criterion = (None, "asked") if sizes and not limits.any_budget else _choose(judged, limits)
    plan = Plan(prediction, work, limits, measured_power, judged, chosen, criterion)
    return replace(plan, further=_further_run(plan, run_steps))


def _further_run(plan: Plan, run_steps: float | None) -> FurtherRun | None:
    answer, measured = plan.answer, plan.prediction.measurements.ranks.tolist()
    considered = [*measured, *(option.forecast.ranks for option in plan.options)]
    sizes = [size for size in considered if size <= max(answer.forecast.ranks, measured[0])]
    return further_run(plan.prediction, answer.forecast, sizes, run_steps, answer.node_hours)


def _check(limits: Limits, work: Work | None, measured_power: Power | None) -> None:
    if limits.any_budget and work is None:
        raise UserError(
            "a limit needs the amount of work, which a table does not state",
            "Add --steps, --samples or (for runs) --target-loss.",
        )
    if limits.energy_j is not None and measured_power is None:
        raise UserError(
            "--energy: no energy was measured, so none can be predicted",
            "Add a column joules to the table, or record runs where hpc-train finds a meter.",
        )


# ---------------------------------------------------------------------------------------------- options


def _sizes(prediction: Prediction, limits: Limits, sizes: Sequence[int]) -> list[int]:
    """Numbers of ranks to consider."""
    measurements = prediction.measurements
    # In strong scaling a rank without a sample of the global batch would have nothing to do.
    most_ranks = int(measurements.batch) if not measurements.weak and measurements.batch > 1 else None
    if sizes:
        for size in sizes:
            _check_size(prediction, size, most_ranks)
        return sorted(set(sizes))
    per_node = measurements.ranks_per_node or 1
    most_nodes = limits.max_nodes or int(FAR * measurements.nodes(measurements.ranks)[-1])
    measured: list[int] = measurements.ranks[measurements.nodes(measurements.ranks) <= most_nodes].tolist()
    if measured and prediction.missed():
        return measured
    if prediction.reachable(2 * per_node):
        ranks = [nodes * per_node for nodes in node_counts(most_nodes)]
    else:  # only one node is known: consider parts of it
        ranks = [size for size in node_counts(per_node) if size >= measurements.ranks[0]]
    considered = sorted({*measured, *ranks})
    return [size for size in considered if most_ranks is None or size <= most_ranks] or [measurements.largest]


def _check_size(prediction: Prediction, size: int, most_ranks: int | None) -> None:
    if not prediction.reachable(size):
        raise UserError(
            f"--predict {size}: all measured sizes are on one node, so nothing is known of the cost of a second one",
            "Run on 2 nodes, or measure the network: hpc-train bench allreduce, and --network FILE.",
        )
    if most_ranks is not None and size > most_ranks:
        raise UserError(f"--predict {size}: the global batch is {most_ranks}", "Give no more ranks than samples.")


def _option(forecast: Forecast, measurements: Measurements, work: Work | None, measured_power: Power | None) -> Option:
    if work is None:
        return Option(forecast)
    samples = work.at(float(measurements.samples(np.array([forecast.ranks]))[0]))
    time_s = samples / forecast.samples_per_s
    low, high = _time_ratios(forecast, NORMAL_95 * work.relative_error)
    interval_s = (time_s * low, time_s * high)
    hours = forecast.nodes / 3600
    option = Option(
        forecast,
        time_s,
        interval_s,
        node_hours=hours * time_s,
        node_hours_interval=(hours * interval_s[0], hours * interval_s[1]),
    )
    if measured_power is None:
        return option
    place = measurements.place(forecast.ranks)
    joules_per_step = float("nan") if place is None else float(measurements.joules_per_step[place])
    if joules_per_step > 0:
        per_sample = joules_per_step / float(measurements.samples(measurements.ranks)[place])
        return _with_measured_energy(option, samples * per_sample, (low, high))
    return _with_energy(option, samples, work, measured_power)


def _time_ratios(forecast: Forecast, work_error: float) -> Interval:
    """The interval of the time over the time: errors of the speed and of the work are independent, so squares add."""
    slowest, fastest = forecast.samples_per_s_interval
    below = np.hypot(1 - forecast.samples_per_s / fastest, min(work_error, _MOST_WORK_ERROR))
    above = np.hypot(forecast.samples_per_s / slowest - 1, work_error)
    return max(1 - float(below), 0.0), 1 + float(above)


def _with_measured_energy(option: Option, expected_j: float, time_ratios: Interval) -> Option:
    """As the meters told at this size: a new run takes more by as much as it takes longer, or draws more power."""
    below, above = 1 - time_ratios[0], time_ratios[1] - 1
    low, high = (float(np.hypot(each, NORMAL_95 * LEAST_POWER_ERROR)) for each in (below, above))
    return replace(
        option, energy_j=expected_j, energy_interval_j=(expected_j * max(1 - low, 0.0), expected_j * (1 + high))
    )


def _with_energy(option: Option, samples: float, work: Work, measured_power: Power) -> Option:
    """With the joules of its time, and their interval: from the time, the work and the fit of the power."""
    assert option.time_s is not None and option.time_interval_s is not None
    work_error = NORMAL_95 * work.relative_error
    times_s = np.array([option.time_s, *option.time_interval_s])
    counts = samples * np.array([1.0, 1 - work_error, 1 + work_error])
    nodes = np.full(3, option.nodes, dtype=float)
    expected, least, most = measured_power.joules(nodes, times_s, counts)
    power_error = NORMAL_95 * measured_power.error(nodes, times_s, counts)[0] * expected
    low = max(float(expected - np.hypot(expected - least, power_error)), 0.0)
    high = float(expected + np.hypot(most - expected, power_error))
    return replace(option, energy_j=float(expected), energy_interval_j=(low, high))


# ---------------------------------------------------------------------------------------------- choosing


def _broken(option: Option, limits: Limits) -> tuple[BrokenLimit, ...]:
    candidates: tuple[tuple[LimitName, float | None, Interval | None], ...] = (
        ("deadline", limits.deadline_s, option.time_interval_s),
        ("energy", limits.energy_j, option.energy_interval_j),
        ("node_hours", limits.node_hours, option.node_hours_interval),
    )
    return tuple(
        BrokenLimit(name, limit, interval[1], interval[0])
        for name, limit, interval in candidates
        if limit is not None and interval is not None and interval[1] > limit
    )


def _without_room(option: Option, memory: RankMemory | None) -> tuple[BrokenLimit, ...]:
    ranks = option.forecast.ranks
    if memory is None or memory.at(ranks) <= memory.room(ranks):
        return ()
    return (BrokenLimit("memory", memory.room(ranks), memory.at(ranks)),)


def _choose(options: Sequence[Option], limits: Limits) -> tuple[Option | None, Criterion]:
    kept = [option for option in options if not option.broken]
    if not kept:
        return None, "none"
    if limits.deadline_s is not None:
        return min(kept, key=lambda option: (option.nodes, -option.speed)), "deadline"
    if limits.any_budget:
        return max(kept, key=lambda option: option.speed), "budget"
    return max(kept, key=lambda option: option.speed**2 / option.nodes), "knee"
