"""A plan as sentences, tables and plain values, for `hpc-train plan` and for reports."""

from dataclasses import asdict
from typing import Any

from hpc_train.analysis.models.predict import Candidate, Forecast, Prediction
from hpc_train.analysis.planning.plan import Option, Plan
from hpc_train.analysis.report.model import Table
from hpc_train.analysis.report.notes.plan import (
    broken_text,
    caveats,
    criterion_text,
    further_run_text,
    limit_text,
    nodes_text,
    plan_warnings,
    why_not_larger,
    why_not_smaller,
)
from hpc_train.analysis.report.sections.columns import CellColumn, make_table, number, text
from hpc_train.core.formatting import duration_text, percent, plural, significant, watt_hours_text, with_interval

SCHEMA = 1
# Of a forecast, unknown where a table states no steps, or no samples.
_OF_STEPS = ("step_s", "step_interval_s", "measured_s", "computing_s", "input_s")
_OF_SAMPLES = ("samples_per_s", "samples_per_s_interval")


def short_answer(plan: Plan) -> str | None:
    """ "ask for 16 nodes", for a headline; None without a recommendation."""
    return f"ask for {nodes_text(plan.prediction.measurements, plan.chosen)}" if plan.chosen else None


def answer(plan: Plan) -> list[str]:
    """The answer in sentences, the recommendation first."""
    measurements, chosen = plan.prediction.measurements, plan.chosen
    if plan.was_asked:
        about = [f"For {plan.work.words}, in the training loop."] if plan.work else []
        named = (f"{_where(option, plan)}: {_takes(option, plan)}" for option in plan.options)
        return [*named, *caveats(plan), *about]
    if chosen is None:
        fastest = max(plan.options, key=lambda option: option.speed)
        broken = f"The fastest considered, {nodes_text(measurements, fastest)}, {broken_text(fastest)}"
        return [f"Nothing to ask for: {criterion_text(plan)}. {broken}.", *caveats(plan)]
    lines = [f"Ask for {_where(chosen, plan)}: {_takes(chosen, plan)}", *caveats(plan), f"Why: {criterion_text(plan)}."]
    lines += [f"Not fewer: {why_not_smaller(plan)}.", f"Not more: {why_not_larger(plan)}."]
    if plan.work is not None:
        lines.append(f"For {plan.work.words}, in the training loop: start-up, tests and checkpoints are extra.")
    if plan.power is not None and chosen.energy_j is not None:
        lines.append(f"Energy: {_energy_source(plan, chosen)}.")
    return [*lines, *filter(None, [further_run_text(plan)])]


def _energy_source(plan: Plan, chosen: Option) -> str:
    assert plan.power is not None
    is_measured = not chosen.forecast.is_forecast
    if plan.prediction.measurements.job is None:
        kind, at_its_size = "as the table says", " for this size"
    else:
        kind = "estimated by the runs" if plan.power.quality == "estimated" else "measured by the runs' meters"
        at_its_size = " of this size"
    return f"{kind}{at_its_size if is_measured else f'; {plan.power.assumed}'}"


def _where(option: Option, plan: Plan) -> str:
    """ "8 nodes (32 ranks)"."""
    size = nodes_text(plan.prediction.measurements, option)
    return f"{size} ({plural(option.forecast.ranks, 'rank')})" if "node" in size else size


def _takes(option: Option, plan: Plan) -> str:
    if option.time_s is None:
        forecast = option.forecast
        if plan.prediction.measurements.stated == "steps":
            return f"{_step_text(forecast)} ms a step, efficiency {percent(forecast.efficiency, 0)}"
        rate = with_interval(forecast.samples_per_s, forecast.samples_per_s_interval)
        return f"{rate} samples/s, efficiency {percent(forecast.efficiency, 0)}"
    estimate = "estimated " if plan.power is not None and plan.power.quality == "estimated" else ""
    energy = watt_hours_text(option.energy_j, option.energy_interval_j) if option.energy_j is not None else "missing"
    return ", ".join(
        [
            duration_text(option.time_s, option.time_interval_s),
            f"{with_interval(option.node_hours, option.node_hours_interval)} node-hours",
            f"energy {estimate}{energy}",
        ]
    )


def plan_tables(plan: Plan) -> list[Table]:
    return [options_table(plan), models_table(plan.prediction), parameters_table(plan.prediction)]


def options_table(plan: Plan) -> Table:
    columns: list[CellColumn[Option]] = []
    if plan.prediction.measurements.ranks_per_node:
        columns.append(number("nodes", lambda option: str(option.nodes)))
    columns.append(number("ranks", lambda option: f"{option.forecast.ranks}{' <-' * (option is plan.chosen)}"))
    if plan.work:
        columns += [
            number("time", lambda option: duration_text(option.time_s, option.time_interval_s)),
            number("energy", lambda option: watt_hours_text(option.energy_j, option.energy_interval_j)),
            number("node-hours", lambda option: with_interval(option.node_hours, option.node_hours_interval)),
        ]
    else:
        stated = plan.prediction.measurements.stated
        if stated != "rates":
            columns.append(number("step (ms)", lambda option: _step_text(option.forecast)))
        if stated != "steps":
            columns.append(number("samples/s", lambda option: significant(option.forecast.samples_per_s, 4)))
    columns.append(number("efficiency", lambda option: percent(option.forecast.efficiency, 0)))
    title = "Predicted (95% intervals)" if plan.was_asked else "Options (95% intervals; <- recommended)"
    return make_table("plan-options", title, plan.options, columns)


def _step_text(forecast: Forecast) -> str:
    low, high = forecast.step_interval_s
    return with_interval(forecast.step_s * 1e3, (low * 1e3, high * 1e3))


def models_table(prediction: Prediction) -> Table:
    """The models, and by how much each missed the sizes that it had not seen."""
    used = prediction.chosen.model
    columns: list[CellColumn[Candidate]] = [
        text("model", lambda candidate: candidate.model + " <-" * (candidate.model == used)),
        number("extrapolation error", lambda candidate: percent(candidate.error)),
        number("held out", lambda candidate: ", ".join(str(each.ranks) for each in candidate.held_out) or "none"),
        text("step time", lambda each: each.fit.form if each.fit else f"not fitted: {each.reason}"),
    ]
    title = f"Models, tested on the largest sizes held out (<- used: {prediction.why})"
    return make_table("plan-models", title, prediction.candidates, columns)


def parameters_table(prediction: Prediction) -> Table:
    columns: list[CellColumn[tuple[str, tuple[float, float, float]]]] = [
        text("parameter", lambda pair: pair[0]),
        number("value", lambda pair: significant(pair[1][1])),
        number("95% from", lambda pair: significant(pair[1][0])),
        number("to", lambda pair: significant(pair[1][2])),
    ]
    of_rates = " (seconds of one sample, not of a step)" * (prediction.measurements.stated == "rates")
    title = f"Parameters of the {prediction.chosen.model} model{of_rates}"
    return make_table("plan-parameters", title, list(prediction.parameters.items()), columns)


# ---------------------------------------------------------------------------------------------- for programs


def record(plan: Plan) -> dict[str, Any]:
    """The plan as plain values for JSON; None is what is not known."""
    return {
        "schema": SCHEMA,
        "answer": answer(plan),
        "nodes": plan.chosen.nodes if plan.chosen else None,
        "ranks": plan.chosen.forecast.ranks if plan.chosen else None,
        "is_forecast": plan.is_forecast,
        "reason": criterion_text(plan),
        "why_not_larger": why_not_larger(plan),
        "why_not_smaller": why_not_smaller(plan),
        "limits": asdict(plan.limits),
        "work": asdict(plan.work) if plan.work else None,
        "power": asdict(plan.power) if plan.power else None,
        "further_run": asdict(plan.further) if plan.further else None,
        "options": [_option_record(option, plan) for option in plan.options],
        **prediction_record(plan.prediction),
        "warnings": plan_warnings(plan),
    }


def prediction_record(prediction: Prediction) -> dict[str, Any]:
    """Model, parameters, and what was measured and held out."""
    measurements = prediction.measurements
    return {
        "label": measurements.label,
        "job": measurements.job,
        "scaling": "weak" if measurements.weak else "strong",
        "stated": measurements.stated,
        "ranks_per_node": measurements.ranks_per_node,
        "model": prediction.chosen.model,
        "why_model": prediction.why,
        "parameters": {
            name: {"value": middle, "low": low, "high": high}
            for name, (low, middle, high) in prediction.parameters.items()
        },
        "models": [_candidate_record(each) for each in prediction.candidates],
        "measured": [
            {"ranks": ranks, "step_s": None if measurements.stated == "rates" else step_s}
            for ranks, step_s in zip(measurements.ranks.tolist(), measurements.step_s.tolist(), strict=True)
        ],
    }


def _candidate_record(each: Candidate) -> dict[str, Any]:
    held_out = [{**asdict(one), "error": one.error} for one in each.held_out]
    return {"model": each.model, "error": each.error, "reason": each.reason, "held_out": held_out}


def _option_record(option: Option, plan: Plan) -> dict[str, Any]:
    forecast, stated = option.forecast, plan.prediction.measurements.stated
    unknown = {"rates": _OF_STEPS, "steps": _OF_SAMPLES, "both": ()}[stated]
    own = {key: value for key, value in asdict(option).items() if key != "forecast"}
    return {
        **asdict(forecast),
        **dict.fromkeys(unknown),
        "is_forecast": forecast.is_forecast,
        **own,
        "broken": list(map(limit_text, option.broken)),
    }
