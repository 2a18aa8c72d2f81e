"""Who arrives late at the reductions: ranks by time."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hpc_train.analysis.efficiency.stragglers import StragglerAnalysis
from hpc_train.analysis.report.labels import straggler_text
from hpc_train.analysis.report.model import Plot
from hpc_train.analysis.report.plots.canvas import BLACK, GREY, diverging
from hpc_train.analysis.runs.load_balance import Arrivals
from hpc_train.analysis.scaling.compare import Group
from hpc_train.core.formatting import plural, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_STRAGGLERS = 3  # in the caption and with an arrow
_MOST_HOSTS = 32  # separated by lines
_MOST_TIMES = 200  # columns of the map, as `load_balance` makes it


@dataclass(frozen=True, eq=False)
class _Map:
    """One run's map of lateness."""

    size: int
    ranks: list[int]
    waiting: StragglerAnalysis
    arrivals: Arrivals

    @property
    def stragglers(self) -> list[str]:
        return [straggler_text(straggler) for straggler in self.waiting.stragglers[:_MOST_STRAGGLERS]]

    @property
    def arrow_places(self) -> list[float]:
        """Where the stragglers are among the ranks: a host in the middle of its own."""
        stragglers = self.waiting.stragglers[:_MOST_STRAGGLERS]
        return [float(np.mean([self.ranks.index(rank) for rank in each.ranks])) for each in stragglers]


def arrivals_plot(group: Group) -> Plot | None:
    """The lateness of every rank in every step, of the run at the largest size that lost most to it.

    None if no rank is ever late.
    """
    found = _find(group)
    if found is None:
        return None
    arrivals, ranks = found.arrivals, found.ranks
    scale, unit = _time_unit(float(np.abs(arrivals.map_s).max()))
    latest = np.argsort(-arrivals.late_s)[:3]
    lateness = ", ".join(f"rank {ranks[at]} by {significant(scale * arrivals.late_s[at])} {unit}" for at in latest)
    how = "by arrival" if arrivals.basis == "arrival" else "by how long each waited, since clocks are not comparable"
    named = f" Stragglers: {' and '.join(found.stragglers)}." if found.stragglers else ""
    arrows = " Arrows point at them." if found.stragglers else ""
    num_lines = len(arrivals.map_s)
    lines = "" if len(ranks) == num_lines else f" A line is {len(ranks) / num_lines:.3g} ranks."
    return Plot(
        "late-ranks",
        f"Late arrivals at the reductions of {plural(found.size, 'rank')}, {how}: the job waits for orange ranks;"
        f" blue ones wait.{named}{arrows}{lines}",
        f"Lateness of {len(ranks)} ranks over {arrivals.num_steps} steady steps, latest on average over the median"
        f" rank: {lateness}.{named}",
        partial(_paint, found=found, scale=scale, unit=unit),
        height=0.72,
    )


def _find(group: Group) -> _Map | None:
    rows = [row for row in group.rows if not row.incomplete] or list(group.rows)
    for row in reversed(rows):
        maps = []
        for run, waiting in zip(row.runs, row.stragglers, strict=True):
            balance = run.load_balance
            if balance is not None and balance.arrivals is not None and balance.arrivals.map_s.any():
                maps.append(_Map(run.size, balance.ranks.tolist(), waiting, balance.arrivals))
        if maps:
            return max(maps, key=lambda each: each.waiting.share)
    return None


def _paint(axes: "Axes", found: _Map, scale: float, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    arrivals, values = found.arrivals, scale * found.arrivals.map_s
    most = float(np.quantile(np.abs(values), 0.99)) or float(np.abs(values).max()) or 1.0
    stride = -(-arrivals.num_steps // _MOST_TIMES)
    extent = (0.0, float(stride * values.shape[1]), len(found.ranks) - 0.5, -0.5)
    style: dict[str, Any] = {"aspect": "auto", "interpolation": "none", "extent": extent}
    image = axes.imshow(values, cmap=diverging(), vmin=-most, vmax=most, **style)
    bounds = np.flatnonzero(np.diff(arrivals.host_of)) + 0.5
    if len(bounds) < _MOST_HOSTS:
        axes.hlines(bounds, *extent[:2], color=GREY, linewidth=0.6)
    places = found.arrow_places
    beside: Any = axes.get_yaxis_transform()
    axes.plot([1.015] * len(places), places, "<", color=BLACK, markersize=4, transform=beside, clip_on=False)
    axes.set_xlim(0, arrivals.num_steps)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.grid(visible=False)
    hosts = ", lines: nodes" if 0 < len(bounds) < _MOST_HOSTS else ""
    axes.set(xlabel="steady step", ylabel=f"rank{hosts}")
    bar = axes.figure.colorbar(image, ax=axes, extend="both", pad=0.035)
    bar.set_label(f"later than the mean rank ({unit})")
    bar.outline.set_visible(False)


def _time_unit(most_s: float) -> tuple[float, str]:
    return (1.0, "s") if most_s >= 1 else (1e3, "ms") if most_s >= 1e-3 else (1e6, "us")
