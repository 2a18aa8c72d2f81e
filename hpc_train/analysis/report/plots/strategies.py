"""Strategies on equal work, side by side: time, and the bytes that theory says must move."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpc_train.analysis.report.plots.canvas import BLUE, SKY, VERMILLION, Drawing, legend_above
from hpc_train.analysis.report.table import ranks_text
from hpc_train.analysis.scaling.strategies import Comparison, Entry
from hpc_train.core.formatting import plural, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def strategy_drawings(comparison: Comparison) -> list[Drawing]:
    """Step time and bytes of the strategies; none where nothing was timed."""
    entries = [entry for entry in comparison.entries if entry.row.phase_s]
    if not entries:
        return []
    exposed = [1e3 * entry.row.exposed_s for entry in entries]
    computing = [1e3 * sum(entry.row.phase_s.values()) - wait for entry, wait in zip(entries, exposed, strict=True)]
    scale, unit = _byte_unit(max(entry.traffic.must_move_bytes if entry.traffic else 0.0 for entry in entries))
    times = "; ".join(
        f"{entry.where} on {plural(entry.row.size, 'rank')}: computing {significant(compute)} ms, exposed communication"
        f" {significant(wait)} ms"
        for entry, compute, wait in zip(entries, computing, exposed, strict=True)
    )
    moved = "; ".join(
        f"{entry.where} on {plural(entry.row.size, 'rank')}: must move {_moved_text(entry, scale)} {unit}"
        for entry in entries
    )
    height = 0.25 + 0.052 * len(entries)
    return [
        Drawing(
            "strategies-step-time",
            "A step's time on the ranks that train, by strategy and number of ranks: computing, and hatched, exposed"
            " communication.",
            f"Strategies on equal work, time per step: {times}.",
            lambda axes: _paint_times(axes, entries, computing, exposed),
            height,
        ),
        Drawing(
            "strategies-bytes",
            "The bytes that theory says the busiest rank must move in a step, by strategy and number of ranks.",
            f"Strategies on equal work, bytes of a step: {moved}.",
            lambda axes: _paint_bytes(axes, entries, scale, unit),
            height,
        ),
    ]


def _paint_times(axes: "Axes", entries: Sequence[Entry], computing: list[float], exposed: list[float]) -> None:
    places = _places(entries)
    axes.barh(places, computing, 0.62, color=BLUE, edgecolor="white", label="computing")
    axes.barh(places, exposed, 0.62, computing, color=VERMILLION, edgecolor="white", hatch="///", label="exposed")
    _name(axes, entries, "time per step (ms)")
    legend_above(axes, 2)


def _paint_bytes(axes: "Axes", entries: Sequence[Entry], scale: float, unit: str) -> None:
    places = _places(entries)
    moved = [(entry.traffic.must_move_bytes if entry.traffic else 0.0) / scale for entry in entries]
    axes.barh(places, moved, 0.62, color=SKY, edgecolor="white")
    for place, entry, each in zip(places, entries, moved, strict=True):
        words = _moved_text(entry, scale)
        axes.annotate(words, (each, place), (3, 0), textcoords="offset points", va="center", fontsize="small")
    axes.margins(x=0.16)
    _name(axes, entries, f"must move ({unit})")


def _places(entries: Sequence[Entry]) -> list[float]:
    """From top to bottom, with a gap between numbers of ranks."""
    sizes = sorted({entry.row.size for entry in entries})
    return [-place - 0.5 * sizes.index(entry.row.size) for place, entry in enumerate(entries)]


def _name(axes: "Axes", entries: Sequence[Entry], xlabel: str) -> None:
    axes.set_yticks(_places(entries), [f"{entry.strategy}, {ranks_text(entry.row)}" for entry in entries])
    axes.grid(visible=False, axis="y")
    axes.set(xlabel=xlabel)


def _moved_text(entry: Entry, scale: float) -> str:
    if entry.traffic is None:
        return "missing"
    least = "\N{GREATER-THAN OR EQUAL TO} " if entry.traffic.is_least else ""
    return least + significant(entry.traffic.must_move_bytes / scale)


def _byte_unit(most: float) -> tuple[float, str]:
    return next((pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if most >= pair[0]), (1.0, "B"))
