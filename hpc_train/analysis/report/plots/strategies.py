"""Strategies on equal work, side by side: step time, and the communication volume by theory."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from hpc_train.analysis.report.labels import ranks_text
from hpc_train.analysis.report.model import Plot
from hpc_train.analysis.report.plots.canvas import BLUE, SKY, VERMILLION, legend_above
from hpc_train.analysis.scaling.strategies import Comparison, Entry
from hpc_train.core.formatting import plural, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def strategy_times_plot(comparison: Comparison) -> Plot | None:
    """None if nothing was timed."""
    entries = _timed(comparison)
    if not entries:
        return None
    times = "; ".join(
        f"{_where(entry)}: computing {significant(_computing_ms(entry))} ms, exposed communication"
        f" {significant(_exposed_ms(entry))} ms"
        for entry in entries
    )
    return Plot(
        "strategies-step-time",
        "Step time of the ranks that train, by strategy and number of ranks: computing, and hatched, exposed"
        " communication.",
        f"Strategies on equal work, time per step: {times}.",
        partial(_paint_times, entries=entries),
        _height(entries),
    )


def strategy_bytes_plot(comparison: Comparison) -> Plot | None:
    """None if nothing was timed."""
    entries = _timed(comparison)
    if not entries:
        return None
    scale, unit = _byte_unit(max(_traffic_bytes(entry) for entry in entries))
    traffic = "; ".join(f"{_where(entry)}: {_traffic_text(entry, scale)} {unit}" for entry in entries)
    return Plot(
        "strategies-bytes",
        "Communication volume of a step by theory: the bytes of the busiest rank, by strategy and number of ranks.",
        f"Strategies on equal work, communication volume of a step: {traffic}.",
        partial(_paint_bytes, entries=entries, scale=scale, unit=unit),
        _height(entries),
    )


def _timed(comparison: Comparison) -> list[Entry]:
    return [entry for entry in comparison.entries if entry.row.phase_s]


def _where(entry: Entry) -> str:
    return f"{entry.where} on {plural(entry.row.size, 'rank')}"


def _exposed_ms(entry: Entry) -> float:
    return 1e3 * entry.row.exposed_s


def _computing_ms(entry: Entry) -> float:
    return 1e3 * sum(entry.row.phase_s.values()) - _exposed_ms(entry)


def _traffic_bytes(entry: Entry) -> float:
    return entry.traffic.volume_bytes if entry.traffic else 0.0


def _height(entries: Sequence[Entry]) -> float:
    return 0.25 + 0.052 * len(entries)


def _paint_times(axes: "Axes", entries: Sequence[Entry]) -> None:
    places = _places(entries)
    computing, exposed = list(map(_computing_ms, entries)), list(map(_exposed_ms, entries))
    axes.barh(places, computing, 0.62, color=BLUE, edgecolor="white", label="computing")
    axes.barh(places, exposed, 0.62, computing, color=VERMILLION, edgecolor="white", hatch="///", label="exposed")
    _label_axes(axes, entries, "time per step (ms)")
    legend_above(axes, 2)


def _paint_bytes(axes: "Axes", entries: Sequence[Entry], scale: float, unit: str) -> None:
    places = _places(entries)
    traffic = [_traffic_bytes(entry) / scale for entry in entries]
    axes.barh(places, traffic, 0.62, color=SKY, edgecolor="white")
    for place, entry, each in zip(places, entries, traffic, strict=True):
        text = _traffic_text(entry, scale)
        axes.annotate(text, (each, place), (3, 0), textcoords="offset points", va="center", fontsize="small")
    axes.margins(x=0.16)
    _label_axes(axes, entries, f"communication volume of a step ({unit})")


def _places(entries: Sequence[Entry]) -> list[float]:
    """From top to bottom, with a gap between numbers of ranks."""
    sizes = sorted({entry.row.size for entry in entries})
    return [-place - 0.5 * sizes.index(entry.row.size) for place, entry in enumerate(entries)]


def _label_axes(axes: "Axes", entries: Sequence[Entry], xlabel: str) -> None:
    axes.set_yticks(_places(entries), [f"{entry.strategy}, {ranks_text(entry.row)}" for entry in entries])
    axes.grid(visible=False, axis="y")
    axes.set(xlabel=xlabel)


def _traffic_text(entry: Entry, scale: float) -> str:
    if entry.traffic is None:
        return "missing"
    least = "\N{GREATER-THAN OR EQUAL TO} " if entry.traffic.is_least else ""
    return least + significant(entry.traffic.volume_bytes / scale)


def _byte_unit(most: float) -> tuple[float, str]:
    return next((pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if most >= pair[0]), (1.0, "B"))
