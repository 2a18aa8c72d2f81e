"""Speedup by time to a target loss beside speedup by samples per second."""

from functools import partial
from typing import TYPE_CHECKING, Any

from hpc_train.analysis.convergence.target import TargetRow, TargetStudy
from hpc_train.analysis.report.model import Plot
from hpc_train.analysis.report.plots.canvas import BLACK, BLUE, SKY
from hpc_train.core.formatting import plural, ratio_text, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_ROWS = 10
_EQUAL = 0.05  # relative: speedups that differ by less look the same


def target_plot(study: TargetStudy) -> Plot | None:
    """None if the two speedups do not differ."""
    rows = [row for row in study.rows if row.speedup or row.throughput][-_MOST_ROWS:]
    if study.reference is None or not any(_differ(row) for row in rows):
        return None
    goal, over = significant(study.target), plural(study.reference.size, "rank")
    speedups = ", ".join(f"{plural(row.size, 'rank')} (batch {row.global_batch}) {_speedups_text(row)}" for row in rows)
    return Plot(
        "time-to-loss",
        f"Speedup over {over} in time to a training loss of {goal} (dark, with 95% intervals if runs were repeated),"
        " and in samples per second (light): the difference went into more samples.",
        f"Speedup over {over} to a loss of {goal}, and in samples per second: {speedups}.",
        partial(_paint, study=study, rows=rows, over=over),
    )


def _differ(row: TargetRow) -> bool:
    return row.throughput is not None and abs((row.speedup or 0.0) / row.throughput - 1) > _EQUAL


def _speedups_text(row: TargetRow) -> str:
    reached = "not reached" if row.speedup is None else ratio_text(row.speedup)
    return reached + (f" and {ratio_text(row.throughput)}" if row.throughput else "")


def _paint(axes: "Axes", study: TargetStudy, rows: list[TargetRow], over: str) -> None:
    _bars(axes, [row.throughput or 0.0 for row in rows], 0.2, "by samples/s", color=SKY)
    _bars(axes, [row.speedup or 0.0 for row in rows], -0.2, "by time to loss", color=BLUE)
    for place, row in enumerate(rows):
        if row.speedup is not None and row.speedup_interval is not None:
            low, high = row.speedup_interval
            ends = [[row.speedup - low], [high - row.speedup]]
            axes.errorbar(place - 0.2, row.speedup, yerr=ends, fmt="none", ecolor=BLACK, capsize=3)
    several = len({row.global_batch for row in study.rows}) > 1
    names = [f"{row.size}\n({row.global_batch})" if several else str(row.size) for row in rows]
    axes.set_xticks(range(len(rows)), names)
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="ranks" + " (global batch)" * several, ylabel=f"speedup over {over}")
    axes.legend(loc="upper left")


def _bars(axes: "Axes", heights: list[float], offset: float, label: str, **style: Any) -> None:
    places = [place + offset for place in range(len(heights))]
    axes.bar(places, heights, 0.36, edgecolor="white", label=label, **style)
