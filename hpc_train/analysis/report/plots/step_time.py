"""Where a step's time goes, by phase: in milliseconds, and as shares."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hpc_train.analysis.report.labels import ranks_text
from hpc_train.analysis.report.model import Plot
from hpc_train.analysis.report.plots.canvas import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    label_bar,
    legend_above,
    thinned,
)
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.rows import Row, timed_phases
from hpc_train.core.formatting import percent, plural, significant
from hpc_train.core.timing_log import COMMUNICATION, PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHASE_COLORS = dict(zip(PHASES, (ORANGE, SKY, BLUE, VERMILLION, GREEN, PURPLE, GREY), strict=True))
_READABLE = 6  # bars whose heights differ by more than this factor are shown as shares, too
_ROOM_FOR_WORDS, _ROOM_FOR_NUMBERS = 6, 9  # bars


def step_time_plot(group: Group) -> Plot | None:
    """A step's time by phase in ms, one stacked bar a size; None without steady steps."""
    rows = [row for row in group.rows if row.phase_s]
    if not rows:
        return None
    phases = timed_phases(rows)
    times = "; ".join(f"{plural(row.size, 'rank')}: {_times_text(row, phases)}" for row in rows)
    return Plot(
        "time-per-step",
        "Step time by phase: mean over ranks that train and over steady steps. Hatched: exposed communication.",
        f"Time per step by phase in ms: {times}.",
        partial(_paint_times, rows=rows),
    )


def step_share_plot(group: Group) -> Plot | None:
    """The same as shares; None if the bars in ms can all be read."""
    rows = [row for row in group.rows if row.phase_s]
    totals_s = [sum(row.phase_s.values()) for row in rows]
    if not rows or max(totals_s) <= _READABLE * min(totals_s):
        return None
    shares = "; ".join(f"{plural(row.size, 'rank')}: {_shares_text(row)}" for row in rows)
    return Plot(
        "share-of-step",
        "Shares of a step by phase. Hatched: exposed communication.",
        f"Shares of a step by phase: {shares}.",
        partial(_paint_shares, rows=rows),
    )


def _times_text(row: Row, phases: Sequence[str]) -> str:
    return ", ".join(f"{phase} {significant(1e3 * row.phase_s[phase])}" for phase in phases)


def _shares_text(row: Row) -> str:
    return ", ".join(f"{phase} {percent(share, 0)}" for phase, share in row.phase_share.items())


def _paint_times(axes: "Axes", rows: Sequence[Row]) -> None:
    heights = _stack(axes, rows, [{phase: 1e3 * spent for phase, spent in row.phase_s.items()} for row in rows])
    for place, row in enumerate(rows):
        if row.exposed_share is not None and len(rows) <= _ROOM_FOR_NUMBERS:
            name = " exposed" if len(rows) <= _ROOM_FOR_WORDS else ""
            label_bar(axes, place, heights[place], percent(row.exposed_share, 0) + name)
    bars_by_size(axes, rows, "time per step (ms)")


def _paint_shares(axes: "Axes", rows: Sequence[Row]) -> None:
    _stack(axes, rows, [{phase: 100 * share for phase, share in row.phase_share.items()} for row in rows])
    bars_by_size(axes, rows, "share of a step (%)")


def _stack(axes: "Axes", rows: Sequence[Row], heights_by_phase: list[dict[str, float]]) -> list[float]:
    """One bar a row, its phases stacked; returns the heights."""
    below = [0.0] * len(rows)
    for phase in timed_phases(rows):
        heights = [bar.get(phase, 0.0) for bar in heights_by_phase]
        how: dict[str, Any] = {"color": PHASE_COLORS[phase], "edgecolor": "white", "linewidth": 0.5, "label": phase}
        axes.bar(range(len(rows)), heights, 0.62, below, hatch="///" if phase in COMMUNICATION else None, **how)
        below = [base + height for base, height in zip(below, heights, strict=True)]
    legend_above(axes, 3)
    return below


def bars_by_size(axes: "Axes", rows: Sequence[Row], ylabel: str) -> None:
    """Axes for one bar a row, labelled with its ranks."""
    shown = thinned([float(place) for place in range(len(rows))], len(rows) / 12)
    axes.set_xticks(shown, [ranks_text(rows[place]) for place in shown])
    axes.set_xlim(-0.6, max(len(rows) - 0.4, 1.6))
    axes.margins(y=0.09)
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="ranks", ylabel=ylabel)
