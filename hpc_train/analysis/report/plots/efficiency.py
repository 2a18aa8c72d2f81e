"""POP efficiencies as a tree of factors."""

from functools import partial
from typing import TYPE_CHECKING

from hpc_train.analysis.efficiency.pop import FACTORS
from hpc_train.analysis.report.labels import ranks_text
from hpc_train.analysis.report.model import Plot
from hpc_train.analysis.report.plots.canvas import BLACK, GREY, VERMILLION, WHITE, thinned
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import percent, plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_COLUMNS = 7  # sizes in the tree
_WORST = 0.4  # an efficiency that is drawn in the full colour


def efficiency_plot(group: Group) -> Plot | None:
    """The POP efficiencies by size; None if none is known, or if only 1 rank ran."""
    rows = [row for row in group.rows if row.pop.factors]
    if not any(row.size > 1 for row in rows):
        return None
    indices = thinned([float(index) for index in range(len(rows))], (len(rows) - 1) / (_MOST_COLUMNS - 1))
    rows = [rows[index] for index in indices]
    factors = [factor for factor in FACTORS if any(factor in row.pop.factors for row in rows)]
    values = "; ".join(f"{plural(row.size, 'rank')}: {_values_text(row, factors)}" for row in rows)
    return Plot(
        "pop-efficiencies",
        "POP efficiencies: each is the product of those below it in the tree; the deeper its colour, the more is lost.",
        f"POP efficiencies, each the product of those below it. {values}.",
        partial(_paint, rows=rows, factors=factors),
        height=0.16 + 0.075 * len(factors),
    )


def _values_text(row: Row, factors: list[str]) -> str:
    return ", ".join(f"{_label(factor)} {percent(row.pop.factors.get(factor), 0)}" for factor in factors)


def _label(factor: str) -> str:
    return "computation scaling" if factor == "computational" else factor.replace("_", " ")


def _paint(axes: "Axes", rows: list[Row], factors: list[str]) -> None:
    for line, factor in enumerate(factors):
        for column, row in enumerate(rows):
            value = row.pop.factors.get(factor)
            loss = 0.0 if value is None else min(1.0, max(0.0, (1 - value) / (1 - _WORST)))
            axes.barh(line, 0.94, 0.88, column - 0.47, color=(VERMILLION, loss), edgecolor="none")
            text = "-" if value is None else percent(value, 0)
            color = WHITE if loss > 0.75 else BLACK
            axes.annotate(text, (column, line), ha="center", va="center", color=color, fontsize="medium")
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
    """The factors' names left of the cells, each joined to its product."""
    from matplotlib.transforms import blended_transform_factory

    place = blended_transform_factory(axes.transAxes, axes.transData)
    for line, factor in enumerate(factors):
        depth = FACTORS[factor]
        indent = 0.05 * depth
        axes.text(indent, line, _label(factor), transform=place, va="center", ha="left")
        above = [at for at in range(line) if FACTORS[factors[at]] == depth - 1]
        if above:
            x = indent - 0.03
            bend = ([x, x, indent - 0.008], [above[-1] + 0.35, line, line])
            axes.plot(*bend, transform=place, color=GREY, linewidth=0.8, clip_on=False)
