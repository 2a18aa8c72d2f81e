"""The measure of held-out samples by step, beside the training loss."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from hpc_train.analysis.report.model import Plot
from hpc_train.analysis.report.plots.canvas import GREY, legend_above
from hpc_train.analysis.report.plots.loss import curve_style, in_turns, thinned_curve
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.validation import RunValidation
from hpc_train.analysis.scaling.compare import Group
from hpc_train.core.formatting import plain, plural, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LINES = 6
Validated = Sequence[tuple[Run, RunValidation]]


def validation_plot(group: Group) -> Plot | None:
    """None without validations."""
    known = [(run, found) for row in group.rows for run in row.runs if (found := run.validation) is not None]
    if not known:
        return None
    records = dict(known)
    drawn = [(run, records[run]) for run in in_turns([run for run, _ in known])[:_MOST_LINES]]
    some = "" if len(drawn) == len(known) else f" {len(drawn)} of {len(known)} runs are drawn, every size in turn."
    best = ", ".join(
        f"{plural(run.size, 'rank')} {significant(record.best[1], 4)} after {record.best[0]:,} steps"
        for run, record in drawn
    )
    measure = _name(drawn)
    return Plot(
        "validation",
        f"Validation {measure} by step, one line a run; a circle marks the best, grey is the training loss.{some}",
        f"Validation {measure} by step; best: {best}.",
        partial(_paint, drawn=drawn),
    )


def _name(drawn: Validated) -> str:
    """The loss, which compares with that of training; of runs that did not measure it what they went by."""
    return "loss" if all(record.losses for _, record in drawn) else plain(drawn[0][1].measure.replace("_", " "))


def _paint(axes: "Axes", drawn: Validated) -> None:
    sizes = sorted({run.size for run, _ in drawn})
    is_loss = _name(drawn) == "loss"
    if is_loss:
        for run, _ in drawn:
            axes.plot(
                *thinned_curve(run, len(drawn)),
                color=GREY,
                linewidth=0.8,
                label="training" if run is drawn[0][0] else None,
            )
    named = set()
    for run, record in drawn:
        values = record.losses if is_loss else record.values
        color, style = curve_style(sizes.index(run.size))
        label = None if run.size in named else f"validation, {plural(run.size, 'rank')}"
        axes.plot(record.steps, values, color=color, linestyle=style, marker=".", linewidth=1.6, label=label)
        place = record.steps.index(record.best[0])
        axes.plot([record.steps[place]], [values[place]], color=color, marker="o", markersize=9, fillstyle="none")
        named.add(run.size)
    axes.set(xlabel="step", ylabel=_name(drawn))
    legend_above(axes, 2)
