"""What a job cost in joules, as figures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpc_train.analysis.figures.canvas import GREEN, Drawing, label_bar
from hpc_train.analysis.figures.steps import bars_by_size
from hpc_train.analysis.scaling import Group, Row, num_ranks
from hpc_train.analysis.words import energy_text, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def energy_drawing(group: Group) -> Drawing | None:
    """Energy per sample by size; None where no size has any."""
    rows = list(group.rows)
    if all(row.joules_per_sample is None for row in rows):
        return None
    qualities = " / ".join(sorted({row.energy.quality for row in rows} - {"missing"}))
    told = ", ".join(f"{num_ranks(row.size)} {energy_text(row.joules_per_sample, row.energy)}" for row in rows)
    hatched = " Hatched bars are estimates, not readings of a meter." if "estimated" in qualities else ""
    return Drawing(
        "energy-per-sample",
        f"Energy per sample trained on, whole run, {qualities}.{hatched}",
        f"Energy per sample: {told}.",
        lambda axes: _paint(axes, rows, qualities),
        height=0.75,
    )


def _paint(axes: "Axes", rows: Sequence[Row], qualities: str) -> None:
    most = max(row.joules_per_sample or 0.0 for row in rows)
    scale, unit = (1e3, "mJ") if most < 0.5 else (1.0, "J")
    for place, row in enumerate(rows):
        height = scale * (row.joules_per_sample or 0.0)
        estimated = row.energy.quality == "estimated"
        fill, hatch = ("white", "///") if estimated else (GREEN, None)
        axes.bar(place, height, 0.62, color=fill, edgecolor=GREEN, linewidth=1, hatch=hatch)
        words = f"{significant(height)}{' est.' if estimated else ''}"
        label_bar(axes, place, height, "missing" if row.joules_per_sample is None else words)
    bars_by_size(axes, rows, f"energy per sample ({unit}), {qualities}")
