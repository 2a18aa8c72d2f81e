"""A plan as sentences, tables and plain values, for `hpc-train plan` and for reports."""

from dataclasses import asdict
from typing import Any

from hpc_train.analysis.models.predict import Candidate, Forecast, Prediction
from hpc_train.analysis.planning.plan import Option, Plan, nodes_text
from hpc_train.analysis.report.model import Column, Table, number_columns
from hpc_train.core.formatting import duration_text, percent, plural, significant, watt_hours_text, with_interval

SCHEMA = 1


def short_answer(plan: Plan) -> str | None:
    """ "ask for 16 nodes", for a headline; None without a recommendation."""
    return f"ask for {nodes_text(plan.prediction.measurements, plan.chosen)}" if plan.chosen else None


def answer(plan: Plan) -> list[str]:
    """The answer in sentences, the recommendation first."""
    measurements, chosen = plan.prediction.measurements, plan.chosen
    if plan.is_forecast:
        about = [f"For {plan.work.words}, in the training loop."] if plan.work else []
        return [*(f"{_where(option, plan)}: {_takes(option, plan)}" for option in plan.options), *about]
    if chosen is None:
        broken = "; ".join(
            f"{nodes_text(measurements, option)}: {' and '.join(option.broken)}" for option in plan.options[-1:]
        )
        return [f"Nothing to ask for: {plan.reason}. The largest looked at may break it, too: {broken}"]
    lines = [f"Ask for {_where(chosen, plan)}: {_takes(chosen, plan)}", f"Why: {plan.reason}."]
    if plan.why_not_smaller:
        lines.append(f"Not fewer: {plan.why_not_smaller}.")
    if plan.why_not_larger:
        lines.append(f"Not more: {plan.why_not_larger}.")
    if plan.work is not None:
        lines.append(f"For {plan.work.words}, in the training loop: start-up, tests and saving come on top.")
    if plan.power is not None and chosen.energy_j is not None:
        kind = "estimated by the runs" if plan.power.quality == "estimated" else "of the meters that the runs had"
        lines.append(f"Energy: {kind}; {plan.power.assumed}.")
    return lines


def _where(option: Option, plan: Plan) -> str:
    """ "8 nodes (32 ranks)"."""
    size = nodes_text(plan.prediction.measurements, option)
    return f"{size} ({plural(option.forecast.ranks, 'rank')})" if "node" in size else size


def _takes(option: Option, plan: Plan) -> str:
    if option.time_s is None:
        forecast = option.forecast
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
    with_nodes = bool(plan.prediction.measurements.ranks_per_node)
    titles = ["nodes", "ranks"] if with_nodes else ["ranks"]
    titles += ["time", "energy", "node-hours"] if plan.work else ["step (ms)", "samples/s"]
    rows = []
    for option in plan.options:
        forecast = option.forecast
        ranks = f"{forecast.ranks} <-" if option is plan.chosen else str(forecast.ranks)
        cells = [str(option.nodes), ranks] if with_nodes else [ranks]
        if plan.work:
            cells.append(duration_text(option.time_s, option.time_interval_s))
            cells.append(watt_hours_text(option.energy_j, option.energy_interval_j))
            cells.append(with_interval(option.node_hours, option.node_hours_interval))
        else:
            low, high = forecast.step_interval_s
            cells.append(with_interval(forecast.step_s * 1e3, (low * 1e3, high * 1e3)))
            cells.append(significant(forecast.samples_per_s, 4))
        rows.append((*cells, percent(forecast.efficiency, 0)))
    title = "Predicted (95% intervals)" if plan.is_forecast else "Options (95% intervals; <- recommended)"
    return Table("plan-options", title, tuple(number_columns(*titles, "efficiency")), tuple(rows))


def models_table(prediction: Prediction) -> Table:
    """The models, and by how much each missed the sizes that it had not seen."""
    rows = []
    for candidate in prediction.candidates:
        sizes = ", ".join(str(held_out.ranks) for held_out in candidate.held_out)
        form = candidate.fit.form if candidate.fit else f"not fitted: {candidate.reason}"
        mark = " <-" if candidate.model == prediction.chosen.model else ""
        rows.append((candidate.model + mark, percent(candidate.error), sizes or "none", form))
    title = f"Models, tested on the largest sizes held out (<- used: {prediction.why})"
    columns = (Column("model", True), Column("error"), Column("held out"), Column("step time", True))
    return Table("plan-models", title, columns, tuple(rows))


def parameters_table(prediction: Prediction) -> Table:
    rows = tuple(
        (name, *(significant(value) for value in (middle, low, high)))
        for name, (low, middle, high) in prediction.parameters.items()
    )
    columns = (Column("parameter", True), *number_columns("value", "95% from", "to"))
    return Table("plan-parameters", f"Parameters of the {prediction.chosen.model} model", columns, rows)


# ---------------------------------------------------------------------------------------------- for programs


def record(plan: Plan) -> dict[str, Any]:
    """The plan as plain values for JSON; None is what is not known."""
    return {
        "schema": SCHEMA,
        "answer": answer(plan),
        "nodes": plan.chosen.nodes if plan.chosen else None,
        "ranks": plan.chosen.forecast.ranks if plan.chosen else None,
        "is_forecast": plan.is_forecast,
        "reason": plan.reason,
        "why_not_larger": plan.why_not_larger,
        "why_not_smaller": plan.why_not_smaller,
        "limits": asdict(plan.limits),
        "work": asdict(plan.work) if plan.work else None,
        "power": asdict(plan.power) if plan.power else None,
        "options": [_option_record(option) for option in plan.options],
        **prediction_record(plan.prediction),
        "warnings": list(plan.warnings),
    }


def prediction_record(prediction: Prediction) -> dict[str, Any]:
    """Model, parameters, and what was measured and held out."""
    measurements = prediction.measurements
    return {
        "label": measurements.label,
        "scaling": "weak" if measurements.weak else "strong",
        "ranks_per_node": measurements.ranks_per_node,
        "model": prediction.chosen.model,
        "algorithm": prediction.chosen.algorithm if prediction.chosen.model == "mechanistic" else None,
        "why_model": prediction.why,
        "parameters": {
            name: {"value": middle, "low": low, "high": high}
            for name, (low, middle, high) in prediction.parameters.items()
        },
        "models": [_candidate_record(each) for each in prediction.candidates],
        "measured": [
            {"ranks": ranks, "step_s": step_s}
            for ranks, step_s in zip(measurements.ranks.tolist(), measurements.step_s.tolist(), strict=True)
        ],
    }


def _candidate_record(each: Candidate) -> dict[str, Any]:
    held_out = [{**asdict(one), "error": one.error} for one in each.held_out]
    return {"model": each.model, "error": each.error, "reason": each.reason, "held_out": held_out}


def _option_record(option: Option) -> dict[str, Any]:
    forecast: Forecast = option.forecast
    return {**asdict(forecast), **{key: value for key, value in asdict(option).items() if key != "forecast"}}
