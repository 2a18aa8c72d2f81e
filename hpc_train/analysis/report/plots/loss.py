"""Training loss by step."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from hpc_train.analysis.report.model import Plot
from hpc_train.analysis.report.plots.canvas import BLACK, BLUE, GREEN, ORANGE, PURPLE, VERMILLION
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.scaling.compare import Group
from hpc_train.core.formatting import plural, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINE_STYLES = [(BLUE, "-"), (VERMILLION, "--"), (GREEN, "-."), (PURPLE, ":"), (ORANGE, "-"), (BLACK, "--")]
_MOST_POINTS = 2400  # of all curves together: more are not visible, and each adds bytes to the page
_MOST_LINES = 12


def loss_plot(group: Group) -> Plot | None:
    """Training loss by step; None if no run wrote metrics."""
    runs = [run for row in group.rows for run in row.runs if len(run.metrics[0]) > 1]
    if not runs:
        return None
    drawn = in_turns(runs)[:_MOST_LINES]
    last = ", ".join(f"{plural(run.size, 'rank')} {significant(run.metrics[1][-1])}" for run in drawn)
    agreement = "" if group.weak else ": runs of one job should agree at any number of ranks"
    some = "" if len(drawn) == len(runs) else f" {len(drawn)} of {len(runs)} runs are drawn, every size in turn."
    return Plot(
        "training-loss",
        f"Training loss, one line a run{agreement}.{some}",
        f"Training loss by step; last values: {last}.",
        partial(_paint, runs=drawn),
    )


def in_turns(runs: Sequence[Run]) -> list[Run]:
    """The first run of each size, then the second of each, and so on."""
    before: dict[int, int] = {}
    turns = []
    for run in runs:
        turns.append((before.get(run.size, 0), run.size))
        before[run.size] = before.get(run.size, 0) + 1
    return [run for _, run in sorted(zip(turns, runs, strict=True), key=lambda pair: pair[0])]


def curve_style(index: int) -> tuple[str, str]:
    """(colour, line style) of the size at that place."""
    return _LINE_STYLES[index % len(_LINE_STYLES)]


def thinned_curve(run: Run, num_runs: int) -> tuple[list[int], list[float]]:
    """(steps, training losses) of one of so many curves, few enough for a page."""
    steps, losses = run.metrics
    stride = max(1, -(-len(steps) * num_runs // _MOST_POINTS))
    return steps[::stride], losses[::stride]


def _paint(axes: "Axes", runs: Sequence[Run]) -> None:
    sizes = sorted({run.size for run in runs})
    named = set()
    for run in runs:
        color, style = curve_style(sizes.index(run.size))
        axes.plot(
            *thinned_curve(run, len(runs)),
            color=color,
            linestyle=style,
            linewidth=min(1.3 + 0.9 * sizes[::-1].index(run.size), 5),
            alpha=0.85,
            label=None if run.size in named else plural(run.size, "rank"),
        )
        named.add(run.size)
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend(loc="best", ncols=1 + (len(sizes) > 6))
