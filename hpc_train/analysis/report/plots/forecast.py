"""The model behind a plan: measurements, what it predicted of sizes that it had not seen, and the extrapolation."""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hpc_train.analysis.models.predict import Prediction, curve_sizes
from hpc_train.analysis.planning.plan import Plan
from hpc_train.analysis.report.model import Plot
from hpc_train.analysis.report.plots.canvas import BLACK, BLUE, GREY, SKY, VERMILLION, WHITE, legend_above, thinned
from hpc_train.core.formatting import percent, plural, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUM_POINTS = 48  # of the curve
_LEAST_SIZES = 3  # any curve fits fewer


def forecast_plot(plan: Plan, advice: str) -> Plot | None:
    """Samples per second over ranks: measured, fitted with its 95% interval, held out, and what to ask for.

    advice: "ask for 16 nodes", "" if the model is not trusted with that. None from fewer than three sizes.
    """
    prediction = plan.prediction
    chosen, measurements = prediction.chosen, prediction.measurements
    if len(measurements.ranks) < _LEAST_SIZES:
        return None
    rates = measurements.samples(measurements.ranks) / measurements.step_s
    measured = ", ".join(
        f"{plural(size, 'rank')} {significant(rate)}"
        for size, rate in zip(measurements.ranks.tolist(), rates, strict=True)
    )
    dotted = f" Dotted: {advice}." if advice else ""
    return Plot(
        "forecast",
        f"Samples per second by the {chosen.model} model, fitted to {len(measurements.ranks)} sizes, with its 95%"
        f" interval; dashed beyond the measurements. {_test_text(prediction)}{dotted}",
        f"Samples per second measured: {measured}. A {chosen.model} model was fitted to these."
        f" {_test_text(prediction)}{_forecast_text(plan) if advice else ''}{dotted}",
        partial(_paint, plan=plan, advice=advice),
    )


def _test_text(prediction: Prediction) -> str:
    error = prediction.chosen.error
    if error is None:
        return "It was not tested on sizes that it had not seen."
    return (
        "White squares are its predictions of sizes before it had seen them: an extrapolation error of"
        f" {percent(error)} on average."
    )


def _forecast_text(plan: Plan) -> str:
    if plan.chosen is None:
        return ""
    forecast = plan.chosen.forecast
    interval = " to ".join(significant(end) for end in forecast.samples_per_s_interval)
    rate = significant(forecast.samples_per_s)
    return f" At {plural(forecast.ranks, 'rank')} {rate} are predicted (95% interval {interval})."


def _paint(axes: "Axes", plan: Plan, advice: str) -> None:
    prediction = plan.prediction
    measurements = prediction.measurements
    most = max([measurements.largest, *(option.forecast.ranks for option in plan.options)])
    sizes = curve_sizes(prediction, most / measurements.largest, _NUM_POINTS)
    curve = prediction.fitted(sizes)
    low, high = zip(*(each.samples_per_s_interval for each in curve), strict=True)
    rates = measurements.samples(measurements.ranks) / measurements.step_s
    ideal = [rates[0] * size / measurements.ranks[0] for size in (measurements.ranks[0], most)]
    axes.plot([measurements.ranks[0], most], ideal, color=GREY, linestyle="--", linewidth=1, label="ideal")
    axes.fill_between(sizes, low, high, color=SKY, alpha=0.45, linewidth=0, label="95% interval")
    seen = [each for each in curve if each.ranks <= measurements.largest]
    beyond = [each for each in curve if each.ranks >= measurements.largest]
    for part, style, label in ((seen, "-", f"{prediction.chosen.model} model"), (beyond, "--", None)):
        rate = [each.samples_per_s for each in part]
        axes.plot([each.ranks for each in part], rate, color=BLUE, linestyle=style, linewidth=1.4, label=label)
    axes.plot(measurements.ranks, rates, "o", color=BLUE, markersize=5, label="measured")
    held_out = prediction.chosen.held_out
    if held_out:
        at = np.array([each.ranks for each in held_out])
        guessed = measurements.samples(at) / np.array([each.predicted_s for each in held_out])
        how = {"color": VERMILLION, "markerfacecolor": WHITE, "markersize": 7, "markeredgewidth": 1.3}
        axes.plot(at, guessed, "s", label="predicted unseen", zorder=1.9, **how)  # type: ignore[arg-type]
    if plan.chosen and advice:
        axes.axvline(plan.chosen.forecast.ranks, color=BLACK, linestyle=":", linewidth=1.2, label=advice)
    _scale(
        axes, [*measurements.ranks.tolist(), most, *([plan.chosen.forecast.ranks] if plan.chosen and advice else [])]
    )


def _scale(axes: "Axes", sizes: list[int]) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator

    sizes = sorted(set(sizes))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.minorticks_off()
    places = [float(np.log2(size)) for size in sizes]
    shown = [sizes[index] for index in thinned(places, (places[-1] - places[0]) / 11)]
    axes.set_xticks(shown, [str(size) for size in shown])
    axes.set(xlabel="ranks", ylabel="samples/s")
    legend_above(axes, 2)
