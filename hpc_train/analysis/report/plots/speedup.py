"""Speedup against the ideal and a fitted law."""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hpc_train.analysis.report.labels import interval_words
from hpc_train.analysis.report.model import Plot
from hpc_train.analysis.report.notes.laws import law_text
from hpc_train.analysis.report.plots.canvas import BLUE, GREY, VERMILLION, WHITE, thinned
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.laws import Law, fitted
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import percent, plural, ratio_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDE = 8  # sizes that span this much are drawn on logarithmic axes


def speedup_plot(group: Group) -> Plot | None:
    """Speedup over the baseline with its interval, the ideal and the fitted law; None without a baseline."""
    if group.baseline is None:
        return None
    rows = [row for row in group.rows if row.speedup is not None]
    over, law = plural(group.baseline.size, "rank"), law_text(group)
    speedups = ", ".join(f"{plural(row.size, 'rank')} {ratio_text(row.speedup or 0)}{_interval(row)}" for row in rows)
    kind = "Samples per second" if group.weak else "Speed"
    ideal = "twice the ranks, twice the samples per second" if group.weak else "N times the ranks, 1/N of the time"
    return Plot(
        "speedup",
        f"{kind} relative to {over}, with 95% intervals. Dashed, the ideal: {ideal}. {law}".strip(),
        f"Speedup over {over}: {speedups}. {law}".strip(),
        partial(_paint, group=group, rows=rows, law=fitted(group)),
    )


def _interval(row: Row) -> str:
    return "" if row.speedup_interval is None else f" ({interval_words(row.relative_speed)})"


def _paint(axes: "Axes", group: Group, rows: list[Row], law: Law | None) -> None:
    assert group.baseline is not None
    base, sizes = group.baseline.size, sorted({row.size for row in rows})
    ideal = "ideal: N x samples/s" if group.weak else "ideal: T/N"
    axes.plot(sizes, [size / base for size in sizes], color=GREY, linestyle="--", linewidth=1.2, label=ideal)
    if law:
        between = np.geomspace(sizes[0], sizes[-1], 60)
        label = f"{law.name}, {percent(law.serial)} serial"
        curve = [law.speedup(float(size) / base) for size in between]
        axes.plot(between, curve, color=VERMILLION, linestyle="-.", linewidth=1.2, label=label)
    _paint_points(axes, [row for row in rows if not row.incomplete], "measured, 95% interval", BLUE)
    _paint_points(axes, [row for row in rows if row.incomplete], "incomplete run", WHITE)
    _scale(axes, sizes)
    axes.set(xlabel="ranks", ylabel=f"speedup over {plural(base, 'rank')}")
    axes.legend(loc="upper left")


def _paint_points(axes: "Axes", rows: list[Row], label: str, fill: str) -> None:
    if not rows:
        return
    sizes, speedups = [row.size for row in rows], [row.speedup or 0.0 for row in rows]
    style: dict[str, Any] = {"color": BLUE, "markerfacecolor": fill, "markersize": 5, "capsize": 3}
    axes.errorbar(sizes, speedups, yerr=_bars(rows), fmt="o", label=label, **style)


def _scale(axes: "Axes", sizes: list[int]) -> None:
    places = [float(size) for size in sizes]
    if sizes[-1] >= _WIDE * sizes[0]:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        places = [float(np.log2(size)) for size in sizes]
    else:
        axes.set_ylim(bottom=0)
    axes.minorticks_off()
    shown = [sizes[index] for index in thinned(places, (places[-1] - places[0]) / 11)]
    axes.set_xticks(shown, [str(size) for size in shown])


def _bars(rows: list[Row]) -> list[list[float]]:
    """Lengths of the error bars below and above, as `errorbar` expects them; 0 without an interval."""
    spans = [(row.speedup or 0.0, row.speedup_interval or (row.speedup or 0.0,) * 2) for row in rows]
    return [[middle - low for middle, (low, _) in spans], [high - middle for middle, (_, high) in spans]]
