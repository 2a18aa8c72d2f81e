"""Why a plan chooses this number of nodes and no other, and what to know before relying on it."""

from hpc_train.analysis.models.measurements import Measurements
from hpc_train.analysis.models.predict import Forecast, Prediction
from hpc_train.analysis.planning.plan import FAR, BrokenLimit, Criterion, Option, Plan
from hpc_train.analysis.report.notes.prediction import prediction_notes
from hpc_train.core.formatting import amount, duration_text, percent, plural, significant, watt_hours_text

_CRITERIA: dict[Criterion, str] = {
    "asked": "these sizes were asked about",
    "none": "no number of nodes keeps every limit",
    "deadline": "the fewest nodes that keep the deadline",
    "budget": "the fastest within the budget",
    "knee": "the knee: most speedup times efficiency",
}
_SAME_COST = 0.005  # of the node-hours: a smaller saving is none
_WIDE = 1.5  # the upper end of a step's interval over the step: above it the interval is explained
_NOTICEABLE_ERROR = 0.1
_LONG_STEP_S = 10.0  # from here on a step is not told in milliseconds


def nodes_text(measurements: Measurements, option: Option) -> str:
    """ "16 nodes", or ranks if they fill no node or the ranks per node are unknown."""
    ranks, per_node = option.forecast.ranks, measurements.ranks_per_node
    return plural(ranks, "rank") if per_node is None or ranks < per_node else plural(option.nodes, "node")


def limit_text(broken: BrokenLimit) -> str:
    """ "the deadline of 6.00 h (up to 7.12 h)", "(6.50 h at least)" if it is surely broken."""
    end = broken.best if broken.is_certain else broken.worst
    words = "({} at least)" if broken.is_certain else "(up to {})"
    if broken.name == "deadline":
        return f"the deadline of {duration_text(broken.limit)} {words.format(duration_text(end))}"
    if broken.name == "energy":
        return f"the energy budget of {watt_hours_text(broken.limit)} {words.format(watt_hours_text(end))}"
    if broken.name == "memory":
        return f"the memory of a rank, {amount(broken.limit, 'B')} (it would take {amount(broken.worst, 'B')})"
    return f"the budget of {significant(broken.limit)} node-hours {words.format(f'{significant(end)} node-hours')}"


def broken_text(option: Option) -> str:
    """ "breaks the deadline of 1.00 s (9.69 s at least) and may break ..."."""
    return " and ".join(f"{'breaks' if each.is_certain else 'may break'} {limit_text(each)}" for each in option.broken)


def caveats(plan: Plan) -> list[str]:
    """What the first lines must say: what a table left open, and a fit that contradicts the measurements."""
    assumed = plan.prediction.measurements.assumed
    return [*([f"Assumed: {'; '.join(assumed)}."] if assumed else []), *_missed_notes(plan), *_power_notes(plan)]


def _power_notes(plan: Plan) -> list[str]:
    if plan.power is None or plan.work is None:
        return []
    nodes, shift = plan.power.worst
    if abs(shift - 1) <= _NOTICEABLE_ERROR:
        return []
    return [
        f"The model of power contradicts the measured joules: on {plural(round(nodes), 'node')} it tells"
        f" {percent(1 / shift, 0)} of them. Energy at other sizes is the model's, shifted as at the measured ones."
    ]


def _missed_notes(plan: Plan) -> list[str]:
    missed = plan.prediction.missed()
    if not missed:
        return []
    model, worst = plan.prediction.chosen.model, max(missed, key=_miss)
    stated, times_s = plan.prediction.measurements.stated, (worst.measured_s or 0.0, worst.step_s)
    measured, fitted = (step_text(each) for each in times_s)
    if stated == "rates":
        measured, fitted = (f"{significant(worst.samples_per_s * worst.step_s / each)} samples/s" for each in times_s)
    on = plural(worst.ranks, "rank")
    said = f"The {model} model contradicts the measurements: {measured}{' a step' * (stated != 'rates')} on {on}"
    only = "Do not rely on it for other sizes" if plan.was_asked else "The advice is among the measured sizes alone"
    return [f"{said}, for which it says {fitted}. {only}."]


def step_text(seconds: float) -> str:
    """ "33.4 ms", "369 s"."""
    return duration_text(seconds) if seconds >= _LONG_STEP_S else f"{significant(1e3 * seconds)} ms"


def _miss(fitted: Forecast) -> float:
    return abs(fitted.step_s / (fitted.measured_s or fitted.step_s) - 1)


def criterion_text(plan: Plan) -> str:
    return _CRITERIA[plan.criterion]


def why_not_larger(plan: Plan) -> str:
    """ "16 nodes: 31% faster for 2% more node-hours", "" if nothing was chosen."""
    if plan.chosen is None:
        return ""
    larger = plan.next_larger
    if larger is None:
        return _why_last(plan, plan.chosen)
    name = _beside_text(plan, larger)
    if larger.broken:
        return f"{name}: {broken_text(larger)}"
    faster, dearer = larger.against(plan.chosen)
    if faster <= 0:
        is_known = not (larger.forecast.is_forecast or plan.chosen.forecast.is_forecast)
        return f"{name}: {'measured' if is_known else 'predicted'} to be no faster"
    return f"{name}: {percent(faster, 0)} faster for {percent(dearer, 0)} more node-hours"


def _beside_text(plan: Plan, option: Option) -> str:
    """As `nodes_text`, but in ranks if the chosen option needs as many nodes."""
    if plan.chosen and option.nodes == plan.chosen.nodes:
        return plural(option.forecast.ranks, "rank")
    return nodes_text(plan.prediction.measurements, option)


def _why_last(plan: Plan, chosen: Option) -> str:
    """Why no larger option was considered."""
    measurements, ranks = plan.prediction.measurements, chosen.forecast.ranks
    if plan.prediction.missed():
        return "no larger size was measured, and the model is not trusted with one"
    if not plan.prediction.reachable(ranks + (measurements.ranks_per_node or 1)):
        return "what a second node costs was not measured: run on 2, or give --network"
    if not measurements.weak and measurements.batch > 1 and 2 * ranks > measurements.batch:
        return f"the global batch of {significant(measurements.batch)} gives more ranks nothing to do"
    bound = "--max-nodes" if plan.limits.max_nodes else f"{FAR:g} times the largest measured: --max-nodes raises it"
    return f"it is the largest size considered ({bound})"


def why_not_smaller(plan: Plan) -> str:
    """ "4 nodes: 45% slower for 3% fewer node-hours", "" if nothing was chosen."""
    if plan.chosen is None:
        return ""
    smaller = plan.next_smaller
    if smaller is None:
        return "it is the smallest size considered"
    name = _beside_text(plan, smaller)
    if smaller.broken:
        return f"{name}: {broken_text(smaller)}"
    faster, dearer = smaller.against(plan.chosen)
    slower = f"{name}: {percent(-faster, 0)} slower"
    if -dearer < _SAME_COST:
        return f"{slower}, and no fewer node-hours"
    return f"{slower} for {percent(-dearer, 0)} fewer node-hours"


def further_run_text(plan: Plan) -> str:
    """ "The run that would tell most: 50 steps on 8 nodes (32 ranks), about 0.02 node-hours. ...", "" if none would."""
    run = plan.further
    if run is None:
        return ""
    repeat = "a repeat of " if run.repeats else ""
    per_node, size = plan.prediction.measurements.ranks_per_node, plural(run.ranks, "rank")
    if per_node and run.ranks >= per_node:
        size = f"{plural(run.nodes, 'node')} ({size})"
    cost = "" if run.node_hours is None else f", about {significant(run.node_hours)} node-hours"
    return (
        f"The run that would tell most: {repeat}{run.steps:,.0f} steps on {size}{cost}."
        f" It would narrow the interval by about {percent(1 - run.interval_ratio, 0)} (scale --next)."
    )


def plan_warnings(plan: Plan) -> list[str]:
    """What limits the answer, the most important first."""
    option, prediction = plan.chosen or plan.options[-1], plan.prediction
    return [
        *_extrapolation_warnings(prediction, option),
        *prediction_notes(prediction),
        *_model_warnings(prediction, option),
        *_single_node_warnings(plan),
    ]


def _extrapolation_warnings(prediction: Prediction, option: Option) -> list[str]:
    ranks, beyond = option.forecast.ranks, option.forecast.extrapolation
    if beyond <= 1:
        return []
    largest = prediction.measurements.largest
    advice = " Run a larger size before you rely on it." if beyond > FAR else ""
    return [f"Extrapolated: {ranks} ranks are {beyond:.3g} times the largest measured ({largest}).{advice}"]


def _model_warnings(prediction: Prediction, option: Option) -> list[str]:
    warnings, chosen, forecast = [], prediction.chosen, option.forecast
    if forecast.is_forecast and forecast.step_interval_s[1] > _WIDE * forecast.step_s:
        warnings.append(
            f"Sizes up to {prediction.measurements.largest} ranks do not show what {forecast.ranks} cost: the interval"
            " is wide. A larger size narrows it."
        )
    if chosen.error is None:
        warnings.append(f"The model could not be tested on sizes that it had not seen: {chosen.reason}.")
    elif chosen.error > _NOTICEABLE_ERROR:
        warnings.append(
            f"On the sizes held out the model was off by {percent(chosen.error, 0)}: the intervals are wide."
        )
    return warnings


def _single_node_warnings(plan: Plan) -> list[str]:
    most_nodes, per_node = plan.limits.max_nodes, plan.prediction.measurements.ranks_per_node or 1
    if not most_nodes or plan.prediction.reachable(most_nodes * per_node):
        return []
    return ["Only one node is considered: the cost of a second was not measured. Run on 2, or give --network."]
