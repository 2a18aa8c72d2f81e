"""What ranks lose to each other: the tree of POP efficiencies, and who is late when."""

from typing import TYPE_CHECKING, Any

import numpy as np

from hpc_train.analysis.efficiency.pop import FACTORS
from hpc_train.analysis.efficiency.stragglers import StragglerAnalysis
from hpc_train.analysis.report.load_balance_tables import name
from hpc_train.analysis.report.plots.canvas import BLACK, BLUE, GREY, VERMILLION, WHITE, Drawing, thinned
from hpc_train.analysis.report.table import ranks_text
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.load_balance import Arrivals
from hpc_train.analysis.scaling.compare import Group, Row
from hpc_train.core.formatting import percent, plural, significant
from hpc_train.core.records import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_COLUMNS = 7  # sizes in the tree
_WORST = 0.4  # an efficiency that is drawn in the full colour
_NUM_SHADES = 15  # of the map: more cannot be told apart, and fewer make a smaller page
_MOST_HOSTS = 32  # that are told apart by lines in the map
_TIMES = 200  # columns of the map at most, as `balance` makes it


def tree_drawing(group: Group) -> Drawing | None:
    """The POP efficiencies by size as a tree; None where none are known, or one rank alone has none to lose to."""
    rows = [row for row in group.rows if row.pop.factors]
    if not any(row.size > 1 for row in rows):
        return None
    shown = thinned([float(place) for place in range(len(rows))], (len(rows) - 1) / (_MOST_COLUMNS - 1))
    rows = [rows[place] for place in shown]
    factors = [factor for factor in FACTORS if any(factor in row.pop.factors for row in rows)]
    told = "; ".join(
        f"{plural(row.size, 'rank')}: "
        + ", ".join(f"{_words(factor)} {percent(row.pop.factors.get(factor), 0)}" for factor in factors)
        for row in rows
    )
    return Drawing(
        "pop-efficiencies",
        "POP efficiencies: each is the product of those that hang below it; the darker, the more is lost.",
        f"POP efficiencies, each the product of those below it. {told}.",
        lambda axes: _paint_tree(axes, rows, factors),
        height=0.16 + 0.075 * len(factors),
    )


def _words(factor: str) -> str:
    return factor.replace("_", " ")


def _paint_tree(axes: "Axes", rows: list[Row], factors: list[str]) -> None:
    for line, factor in enumerate(factors):
        for column, row in enumerate(rows):
            value = row.pop.factors.get(factor)
            loss = 0.0 if value is None else min(1.0, max(0.0, (1 - value) / (1 - _WORST)))
            axes.barh(line, 0.94, 0.88, column - 0.47, color=_blend(VERMILLION, loss), edgecolor="none")
            words = "-" if value is None else percent(value, 0)
            color = WHITE if loss > 0.75 else BLACK
            axes.annotate(words, (column, line), ha="center", va="center", color=color, fontsize="medium")
    _paint_branches(axes, factors)
    axes.set_xticks(range(len(rows)), [ranks_text(row) for row in rows])
    axes.set_yticks([])
    axes.set_xlim(-0.55 - 0.55 * len(rows), len(rows) - 0.5)
    axes.set_ylim(len(factors) - 0.4, -0.6)
    axes.set_xlabel("ranks (efficiencies in %)", x=0.75)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _paint_branches(axes: "Axes", factors: list[str]) -> None:
    """The factors' names left of the cells, each joined to the one that it is a factor of."""
    from matplotlib.transforms import blended_transform_factory

    place = blended_transform_factory(axes.transAxes, axes.transData)
    for line, factor in enumerate(factors):
        depth = FACTORS[factor]
        indent = 0.05 * depth
        axes.text(indent, line, _words(factor), transform=place, va="center", ha="left")
        above = [at for at in range(line) if FACTORS[factors[at]] == depth - 1]
        if above:
            x = indent - 0.03
            bend = ([x, x, indent - 0.008], [above[-1] + 0.35, line, line])
            axes.plot(*bend, transform=place, color=GREY, linewidth=0.8, clip_on=False)


def _blend(color: str, share: float) -> tuple[float, float, float]:
    """The color over white."""
    whole = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (1 - share * (1 - each) for each in whole)
    return red, green, blue


def map_drawing(group: Group) -> Drawing | None:
    """Ranks by time: who comes late to the reductions. Of the run that lost most to it at the largest size.

    None where nobody is ever late.
    """
    found = _shown(group)
    if found is None:
        return None
    run, waiting, arrivals = found
    scale, unit = _time_unit(float(np.abs(arrivals.map_s).max()))
    latest = np.argsort(-arrivals.late_s)[:3]
    ranks = run.load_balance.ranks if run.load_balance else latest
    told = ", ".join(f"rank {ranks[at]} by {significant(scale * arrivals.late_s[at])} {unit}" for at in latest)
    whom = " and ".join(name(one) for one in waiting.stragglers[:3])
    named = f" Waited for: {whom}." if whom else ""
    how = "by their arrival" if arrivals.basis == "arrival" else "by how long each waited, as clocks cannot be compared"
    named += " Arrows point at them." * bool(whom)
    rows = "" if len(ranks) == len(arrivals.map_s) else f" A row is {len(ranks) / len(arrivals.map_s):.3g} ranks."
    return Drawing(
        "late-ranks",
        f"Who comes late to the reductions of {plural(run.size, 'rank')}, {how}: orange ranks are waited for, blue ones"
        f" wait.{named}{rows}",
        f"Lateness of {len(ranks)} ranks over {arrivals.num_steps} steady steps, latest on average over the median"
        f" rank: {told}.{named}",
        lambda axes: _paint_map(axes, arrivals, ranks.tolist(), _places(waiting, ranks.tolist()), scale, unit),
        height=0.72,
    )


def _shown(group: Group) -> tuple[Run, StragglerAnalysis, Arrivals] | None:
    whole = [row for row in group.rows if not row.incomplete] or list(group.rows)
    for row in reversed(whole):
        known = [
            (run, waiting, run.load_balance.arrivals)
            for run, waiting in zip(row.runs, row.stragglers, strict=True)
            if run.load_balance is not None
            and run.load_balance.arrivals is not None
            and run.load_balance.arrivals.map_s.any()
        ]
        if known:
            return max(known, key=lambda each: each[1].share)
    return None


def _places(waiting: StragglerAnalysis, ranks: list[int]) -> list[float]:
    """Where those who are waited for stand among the ranks: a host in the middle of its own."""
    own = [[ranks.index(rank) for rank in one.ranks] for one in waiting.stragglers[:3]]
    return [float(np.mean(places)) for places in own]


def _paint_map(axes: "Axes", arrivals: Arrivals, ranks: list[int], late: list[float], scale: float, unit: str) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    values: FloatArray = scale * arrivals.map_s
    most = float(np.quantile(np.abs(values), 0.99)) or float(np.abs(values).max()) or 1.0
    colors = LinearSegmentedColormap.from_list("late", [BLUE, WHITE, VERMILLION], N=_NUM_SHADES)
    stride = -(-arrivals.num_steps // _TIMES)
    extent = (0.0, float(stride * values.shape[1]), len(ranks) - 0.5, -0.5)
    how = {"aspect": "auto", "interpolation": "none", "extent": extent}
    image = axes.imshow(values, cmap=colors, vmin=-most, vmax=most, **how)  # type: ignore[arg-type]
    bounds = np.flatnonzero(np.diff(arrivals.host_of)) + 0.5
    if len(bounds) < _MOST_HOSTS:
        axes.hlines(bounds, *extent[:2], color=GREY, linewidth=0.6)
    beside: Any = axes.get_yaxis_transform()
    axes.plot([1.015] * len(late), late, "<", color=BLACK, markersize=4, transform=beside, clip_on=False)
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
