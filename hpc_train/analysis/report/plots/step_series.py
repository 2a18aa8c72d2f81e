"""Steps one by one: their times in order, and how these are distributed."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hpc_train.analysis.report.model import Plot
from hpc_train.analysis.report.plots.canvas import BLACK, BLUE, GREY, ORANGE, SKY, VERMILLION, legend_above
from hpc_train.analysis.report.plots.step_time import bars_by_size
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.step_quantiles import slowest_step, step_quantiles
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import ms_text, plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_POINTS = 400  # of the line: more are not visible, and each adds bytes to the page
_STYLES = {"p50": (BLUE, "-", ""), "p95": (ORANGE, "--", "s"), "p99": (VERMILLION, ":", "^")}
_SLOWER = {"p95": "1 step in 20", "p99": "1 in 100"}


def step_series_plot(group: Group) -> Plot | None:
    """Every steady step of the longest run at the largest size; None without steady steps."""
    rows = [row for row in group.rows if not row.incomplete] or list(group.rows)
    runs = [max(row.runs, key=lambda run: len(run.step_s)) for row in rows]
    run = next((run for run in reversed(runs) if len(run.step_s)), None)
    if run is None:
        return None
    quantiles = step_quantiles([run.step_s])
    stride = _stride(run)
    binned = f" A point is the mean of {stride} steps, the band reaches from the fastest to the slowest." * (stride > 1)
    told = ", ".join(f"{name} {ms_text(each)} ms" for name, each in quantiles.items())
    return Plot(
        "step-times",
        f"Every steady step of a run of {plural(run.size, 'rank')}, mean over ranks, with percentiles.{binned}",
        f"Times of {len(run.step_s)} steady steps of {plural(run.size, 'rank')}: {told},"
        f" slowest {ms_text(float(run.step_s.max()))} ms.",
        partial(_paint_series, run=run, quantiles=quantiles),
    )


def _stride(run: Run) -> int:
    return -(-len(run.step_s) // _MOST_POINTS)


def _paint_series(axes: "Axes", run: Run, quantiles: dict[str, float]) -> None:
    stride = _stride(run)
    starts = np.arange(0, len(run.step_s), stride)
    times_ms = 1e3 * run.step_s
    sizes = np.diff(np.append(starts, len(times_ms)))
    if stride > 1:
        low, high = np.minimum.reduceat(times_ms, starts), np.maximum.reduceat(times_ms, starts)
        axes.fill_between(starts, low, high, color=SKY, alpha=0.45, linewidth=0)
    axes.plot(starts, np.add.reduceat(times_ms, starts) / sizes, color=GREY, linewidth=0.9)
    for name, value in quantiles.items():
        color, style, _ = _STYLES[name]
        axes.axhline(1e3 * value, color=color, linestyle=style, linewidth=1.3, label=f"{name} {ms_text(value)} ms")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, max(1, len(times_ms) - 1))
    axes.set(xlabel="steady step", ylabel="time of a step (ms)")
    legend_above(axes, 3)


def step_distribution_plot(group: Group) -> Plot | None:
    """p50, p95, p99 and the slowest step of each size; None without steady steps."""
    rows = [row for row in group.rows if row.phase_s]
    if not rows:
        return None
    told = "; ".join(f"{plural(row.size, 'rank')}: {_told(row)}" for row in rows)
    drawn = {name for row in rows for name in step_quantiles([run.step_s for run in row.runs])}
    slower = "".join(f"{words} is slower than {name}, " for name, words in _SLOWER.items() if name in drawn)
    return Plot(
        "step-distribution",
        f"Slow steps over the typical one (p50), by number of ranks: {slower}the line ends at the slowest.",
        f"Percentiles of the time of a step in ms. {told}.",
        partial(_paint_distribution, rows=rows),
    )


def _told(row: Row) -> str:
    found = step_quantiles([run.step_s for run in row.runs])
    return ", ".join(f"{name} {ms_text(value)}" for name, value in {**found, "slowest": _slowest(row)}.items())


def _slowest(row: Row) -> float | None:
    return slowest_step([run.step_s for run in row.runs])


def _paint_distribution(axes: "Axes", rows: Sequence[Row]) -> None:
    places = range(len(rows))
    found = [step_quantiles([run.step_s for run in row.runs]) for row in rows]
    highs = [(_slowest(row) or 0.0) / each["p50"] for row, each in zip(rows, found, strict=True)]
    axes.axhline(1, color=BLUE, linewidth=1.3, label="p50")
    axes.vlines(places, 1, highs, color=GREY, linewidth=1.2)
    for name in ("p95", "p99"):
        color, _, marker = _STYLES[name]
        known = [place for place in places if name in found[place]]
        if known:
            values = [found[place][name] / found[place]["p50"] for place in known]
            axes.plot(known, values, marker, color=color, markersize=6, label=name)
    axes.plot(places, highs, "_", color=BLACK, markersize=9, label="slowest")
    legend_above(axes, 4)
    bars_by_size(axes, rows, "step time / p50")
