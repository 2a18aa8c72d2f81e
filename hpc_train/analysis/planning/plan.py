"""How many nodes to ask for: predicted time, energy and node-hours held against what may be spent."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hpc_train.analysis.models.measurements import Measurements
from hpc_train.analysis.models.predict import Forecast, Prediction
from hpc_train.analysis.planning.budget import Power, Work, node_steps, power
from hpc_train.core.errors import UserError
from hpc_train.core.formatting import duration_text, percent, significant, watt_hours_text
from hpc_train.core.statistics import Interval

_UNSEEN = "all measured sizes are on one node, and nothing is known of what a second one costs"
_SEE = "Run on 2 nodes, or measure the network: hpc-train bench allreduce, and --network FILE."
FAR = 4.0  # times the largest measured size: candidates beyond are only looked at where --max-nodes asks for them


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
class Option:
    """One number of nodes: what the work takes there, with 95% intervals; None where unknown."""

    forecast: Forecast
    time_s: float | None = None
    time_interval_s: Interval | None = None
    node_hours: float | None = None
    node_hours_interval: Interval | None = None
    energy_j: float | None = None
    energy_interval_j: Interval | None = None
    broken: tuple[str, ...] = ()  # the limits it may break, in words

    @property
    def nodes(self) -> int:
        return self.forecast.nodes


@dataclass(frozen=True, eq=False)
class Plan:
    """The answer: a number of nodes and why no other, out of all options."""

    prediction: Prediction
    work: Work | None
    limits: Limits
    power: Power | None
    options: tuple[Option, ...]  # by nodes
    chosen: Option | None  # None: nothing keeps the limits, or sizes were only asked about
    reason: str  # what the choice went by
    why_not_larger: str
    why_not_smaller: str
    is_forecast: bool  # sizes were named and no budget: nothing is to be chosen
    warnings: tuple[str, ...] = field(default=())


def make_plan(
    prediction: Prediction, work: Work | None = None, limits: Limits | None = None, sizes: Sequence[int] = ()
) -> Plan:
    """Weighs whole nodes up to `limits.max_nodes` (by default `FAR` times the largest measured), or `sizes` alone.

    With a deadline the fewest nodes that meet it are best, with budgets alone the fastest within them. Without either
    it is the knee, the most speedup x efficiency, beyond which nodes cost more than they save (Eager, Zahorjan and
    Lazowska, "Speedup versus efficiency in parallel systems", IEEE Transactions on Computers 38(3), 1989). A limit
    counts as kept where the unfavourable end of the 95% interval keeps it. Raises `UserError` for limits on what is
    not known.
    """
    limits = limits or Limits()
    joules = power(prediction.measurements)
    _check(limits, work, joules)
    ranks = _sizes(prediction, limits, sizes)
    options = tuple(_option(each, prediction.measurements, work, joules, limits) for each in prediction.at(ranks))
    is_forecast = bool(sizes) and not limits.any_budget
    chosen, reason = (None, "these sizes were asked about") if is_forecast else _choose(options, limits)
    larger, smaller = _why_not(options, chosen, prediction, limits)
    warnings = _warnings(prediction, chosen or options[-1], limits)
    return Plan(
        prediction, work, limits, joules, options, chosen, reason, larger, smaller, is_forecast, tuple(warnings)
    )


def _check(limits: Limits, work: Work | None, joules: Power | None) -> None:
    if limits.any_budget and work is None:
        raise UserError(
            "a limit needs the amount of work, which a table does not state",
            "Add --steps, --samples or (for runs) --target-loss.",
        )
    if limits.energy_j is not None and joules is None:
        raise UserError(
            "--energy: no energy was measured, so none can be predicted",
            "Add a column joules to the table, or record runs where hpc-train finds a meter.",
        )


def _sizes(prediction: Prediction, limits: Limits, sizes: Sequence[int]) -> list[int]:
    """Numbers of ranks to look at."""
    measurements = prediction.measurements
    per_node = measurements.ranks_per_node or 1
    batch = int(measurements.batch) if not measurements.weak and measurements.batch > 1 else None
    if sizes:
        for size in sizes:
            if not prediction.reachable(size):
                raise UserError(f"--predict {size}: {_UNSEEN}", _SEE)
            if batch is not None and size > batch:
                raise UserError(f"--predict {size}: the global batch is {batch}", "Give no more ranks than samples.")
        return sorted(set(sizes))
    if prediction.reachable(2 * per_node):
        most = limits.max_nodes or int(FAR * measurements.nodes(measurements.ranks)[-1])
        ranks = [nodes * per_node for nodes in node_steps(most)]
    else:  # one node is all that is known: look at parts of it
        ranks = [size for size in node_steps(per_node) if size >= measurements.ranks[0]]
    return [size for size in ranks if batch is None or size <= batch] or [measurements.largest]


def _option(
    forecast: Forecast, measurements: Measurements, work: Work | None, joules: Power | None, limits: Limits
) -> Option:
    if work is None:
        return Option(forecast)
    samples = work.at(float(measurements.samples(np.array([forecast.ranks]))[0]))
    low, high = forecast.samples_per_s_interval
    time_s = samples / forecast.samples_per_s
    more = 1.96 * work.relative_error
    ratio_low = 1 - np.hypot(1 - forecast.samples_per_s / high, min(more, 0.9))
    ratio_high = 1 + np.hypot(forecast.samples_per_s / low - 1, more)
    span = (time_s * max(float(ratio_low), 0.0), time_s * float(ratio_high))
    nodes = forecast.nodes
    hours = nodes * time_s / 3600
    option = Option(forecast, time_s, span, hours, (nodes * span[0] / 3600, nodes * span[1] / 3600))
    if joules is not None:
        times, counts = np.array([time_s, *span]), samples * np.array([1.0, 1 - more, 1 + more])
        middle, least, most = joules.joules(np.full(3, nodes), times, counts)
        wide = 1.96 * joules.relative_error * middle
        low_j, high_j = middle - np.hypot(middle - least, wide), middle + np.hypot(most - middle, wide)
        option = replace(option, energy_j=float(middle), energy_interval_j=(float(max(low_j, 0.0)), float(high_j)))
    return replace(option, broken=tuple(_broken(option, limits)))


def _broken(option: Option, limits: Limits) -> list[str]:
    """Which limits the unfavourable end of the interval breaks."""
    broken = []
    for span, limit, name, told in (
        (option.time_interval_s, limits.deadline_s, "the deadline", duration_text),
        (option.energy_interval_j, limits.energy_j, "the energy budget", watt_hours_text),
        (option.node_hours_interval, limits.node_hours, "the budget", _node_hours),
    ):
        if limit is not None and span is not None and span[1] > limit:
            broken.append(f"{name} of {told(limit)} (up to {told(span[1])})")
    return broken


def _node_hours(hours: float) -> str:
    return f"{significant(hours)} node-hours"


# ---------------------------------------------------------------------------------------------- choosing


def _rate(option: Option) -> float:
    return (option.time_s and 1 / option.time_s) or option.forecast.samples_per_s


def _choose(options: tuple[Option, ...], limits: Limits) -> tuple[Option | None, str]:
    kept = [option for option in options if not option.broken]
    if not kept:
        return None, "no number of nodes keeps every limit"
    if limits.deadline_s is not None:
        return kept[0], "the fewest nodes that keep the deadline"
    if limits.any_budget:
        return max(kept, key=_rate), "the fastest within the budget"
    return max(kept, key=lambda option: _rate(option) ** 2 / option.nodes), "the knee: most speedup times efficiency"


def _why_not(
    options: tuple[Option, ...], chosen: Option | None, prediction: Prediction, limits: Limits
) -> tuple[str, str]:
    """(why not larger, why not smaller)."""
    if chosen is None:
        return "", ""
    place = options.index(chosen)
    larger = _why_not_larger(chosen, options[place + 1] if place + 1 < len(options) else None, prediction, limits)
    if place == 0:
        return larger, "it is the smallest that was looked at"
    before = options[place - 1]
    return larger, f"{nodes_text(prediction.measurements, before)}: {_fewer(before, chosen, limits)}"


def _why_not_larger(chosen: Option, after: Option | None, prediction: Prediction, limits: Limits) -> str:
    measurements = prediction.measurements
    if after is None:
        if not prediction.reachable(chosen.forecast.ranks + (measurements.ranks_per_node or 1)):
            return "what a second node costs was not measured: run on 2, or give --network"
        if not measurements.weak and measurements.batch > 1 and 2 * chosen.forecast.ranks > measurements.batch:
            return f"the global batch of {significant(measurements.batch)} gives more ranks nothing to do"
        bound = "--max-nodes" if limits.max_nodes else f"{FAR:g} times the largest measured: --max-nodes looks further"
        return f"it is the largest that was looked at ({bound})"
    if after.broken:
        return f"{nodes_text(measurements, after)} may break {' and '.join(after.broken)}"
    return f"{nodes_text(measurements, after)}: {_more(chosen, after)}"


def _more(chosen: Option, after: Option) -> str:
    """What going on to more nodes gains and costs."""
    faster = _rate(after) / _rate(chosen) - 1
    dearer = after.nodes / chosen.nodes / (1 + faster) - 1
    if faster <= 0:
        return "no faster"
    return f"{percent(faster, 0)} faster for {percent(dearer, 0)} more node-hours"


def _fewer(before: Option, chosen: Option, limits: Limits) -> str:
    if before.broken:
        return f"may break {' and '.join(before.broken)}"
    slower = 1 - _rate(before) / _rate(chosen)
    cheaper = 1 - before.nodes / chosen.nodes / (1 - slower)
    words = f"{percent(slower, 0)} slower"
    return f"{words}, and no cheaper" if cheaper < 0.005 else f"{words} for {percent(cheaper, 0)} fewer node-hours"


def nodes_text(measurements: Measurements, option: Option) -> str:
    """ "16 nodes", or ranks where nodes are not known."""
    if measurements.ranks_per_node is None or option.forecast.ranks < measurements.ranks_per_node:
        return f"{option.forecast.ranks} rank{'s' * (option.forecast.ranks != 1)}"
    return f"{option.nodes} node{'s' * (option.nodes != 1)}"


def _warnings(prediction: Prediction, chosen: Option, limits: Limits) -> list[str]:
    warnings, measurements = list(prediction.notes), prediction.measurements
    beyond = chosen.forecast.extrapolation
    if beyond > 1:
        far = " Run a larger size before you rely on it." if beyond > FAR else ""
        warnings.insert(
            0,
            f"Extrapolated: {chosen.forecast.ranks} ranks are {beyond:.3g} times the largest measured"
            f" ({measurements.largest}).{far}",
        )
    if prediction.chosen.model == "mechanistic" and chosen.forecast.step_interval_s[1] > 1.5 * chosen.forecast.step_s:
        warnings.append(
            f"Up to {measurements.largest} ranks communication may hide behind the backward pass, and these sizes do"
            " not tell where it no longer can: a larger size, or --network, narrows the interval."
        )
    if prediction.chosen.error is None:
        warnings.append(f"The model could not be tested on sizes it had not seen: {prediction.chosen.reason}.")
    elif prediction.chosen.error > 0.1:
        warnings.append(
            f"On the sizes held out the model was off by {percent(prediction.chosen.error, 0)}: the intervals are wide."
        )
    asked = limits.max_nodes or 0
    if asked and not prediction.reachable(asked * (measurements.ranks_per_node or 1)):
        warnings.append(
            "Only one node is looked at: what a second costs was not measured. Run on 2, or give --network."
        )
    return warnings
