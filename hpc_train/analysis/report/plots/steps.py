"""What steps were made of and came to: time by phase, and the loss."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hpc_train.analysis.report.plots.canvas import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Drawing,
    label_bar,
    legend_above,
    thinned,
)
from hpc_train.analysis.report.table import ranks_text
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.scaling.compare import Group, Row, timed_phases
from hpc_train.core.formatting import percent, plural, significant
from hpc_train.core.records import COMMUNICATION, PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHASE_COLORS = dict(zip(PHASES, (ORANGE, SKY, BLUE, VERMILLION, GREEN, PURPLE, GREY), strict=True))
_LINE_STYLES = [(BLUE, "-"), (VERMILLION, "--"), (GREEN, "-."), (PURPLE, ":"), (ORANGE, "-"), (BLACK, "--")]
_MOST_POINTS = 2400  # of all loss curves together: more cannot be seen, and each is a few bytes of the page
_MOST_LINES = 12
_READABLE = 6  # bars that differ by more than this are shown as shares, too
_ROOM_FOR_WORDS, _ROOM_FOR_NUMBERS = 6, 9  # bars


def time_drawings(group: Group) -> list[Drawing]:
    """A step's time by phase, stacked, in ms; as shares too, where the largest size's bar is too short to read."""
    rows = [row for row in group.rows if row.phase_s]
    if not rows:
        return []
    phases = timed_phases(rows)
    told = "; ".join(
        f"{plural(row.size, 'rank')}: "
        + ", ".join(f"{phase} {significant(1e3 * row.phase_s[phase])}" for phase in phases)
        for row in rows
    )
    caption = "Where a step's time goes: mean over ranks that train and steady steps. Hatched: exposed communication."
    drawings = [
        Drawing(
            "time-per-step", caption, f"Time per step by phase in ms: {told}.", lambda axes: _paint_times(axes, rows)
        )
    ]
    whole = [sum(row.phase_s.values()) for row in rows]
    if max(whole) > _READABLE * min(whole):
        told = "; ".join(
            f"{plural(row.size, 'rank')}: "
            + ", ".join(f"{phase} {percent(share, 0)}" for phase, share in row.phase_share.items())
            for row in rows
        )
        drawings.append(
            Drawing(
                "share-of-step",
                "The same as shares of a step. Hatched: exposed communication.",
                f"Shares of a step by phase: {told}.",
                lambda axes: _paint_shares(axes, rows),
            )
        )
    return drawings


def _paint_times(axes: "Axes", rows: Sequence[Row]) -> None:
    heights = _stack(axes, rows, [{phase: 1e3 * spent for phase, spent in row.phase_s.items()} for row in rows])
    for place, row in enumerate(rows):
        if row.exposed_share is not None and len(rows) <= _ROOM_FOR_NUMBERS:
            words = " exposed" if len(rows) <= _ROOM_FOR_WORDS else ""
            label_bar(axes, place, heights[place], percent(row.exposed_share, 0) + words)
    bars_by_size(axes, rows, "time per step (ms)")


def _paint_shares(axes: "Axes", rows: Sequence[Row]) -> None:
    _stack(axes, rows, [{phase: 100 * share for phase, share in row.phase_share.items()} for row in rows])
    bars_by_size(axes, rows, "share of a step (%)")


def _stack(axes: "Axes", rows: Sequence[Row], parts: list[dict[str, float]]) -> list[float]:
    """One bar a row, its phases on top of each other; the heights."""
    below = [0.0] * len(rows)
    for phase in timed_phases(rows):
        heights = [part.get(phase, 0.0) for part in parts]
        how: dict[str, Any] = {"color": PHASE_COLORS[phase], "edgecolor": "white", "linewidth": 0.5, "label": phase}
        axes.bar(range(len(rows)), heights, 0.62, below, hatch="///" if phase in COMMUNICATION else None, **how)
        below = [base + height for base, height in zip(below, heights, strict=True)]
    legend_above(axes, 3)
    return below


def bars_by_size(axes: "Axes", rows: Sequence[Row], ylabel: str) -> None:
    """The axes of one bar a row, named by its ranks."""
    shown = thinned([float(place) for place in range(len(rows))], len(rows) / 12)
    axes.set_xticks(shown, [ranks_text(rows[place]) for place in shown])
    axes.set_xlim(-0.6, max(len(rows) - 0.4, 1.6))
    axes.margins(y=0.09)
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="ranks", ylabel=ylabel)


def loss_drawing(group: Group) -> Drawing | None:
    """Training loss by step; None where no run wrote metrics."""
    runs = [run for row in group.rows for run in row.runs if len(run.metrics[0]) > 1]
    if not runs:
        return None
    shown = _one_by_one(runs)[:_MOST_LINES]
    told = ", ".join(f"{plural(run.size, 'rank')} {significant(run.metrics[1][-1])}" for run in shown)
    together = "" if group.weak else ": runs of one job should fall together at any number of ranks"
    some = "" if len(shown) == len(runs) else f" {len(shown)} of {len(runs)} runs are drawn, every size in turn."
    return Drawing(
        "training-loss",
        f"Training loss, one line a run{together}.{some}",
        f"Training loss by step; last values: {told}.",
        lambda axes: _paint_losses(axes, shown),
    )


def _one_by_one(runs: Sequence[Run]) -> list[Run]:
    """The first run of each size, then the second of each, and so on."""
    before: dict[int, int] = {}
    turns = []
    for run in runs:
        turns.append((before.get(run.size, 0), run.size))
        before[run.size] = before.get(run.size, 0) + 1
    return [run for _, run in sorted(zip(turns, runs, strict=True), key=lambda pair: pair[0])]


def _paint_losses(axes: "Axes", runs: Sequence[Run]) -> None:
    sizes = sorted({run.size for run in runs})
    named = set()
    for run in runs:
        steps, losses = run.metrics
        stride = -(-len(steps) * len(runs) // _MOST_POINTS)
        color, style = _LINE_STYLES[sizes.index(run.size) % len(_LINE_STYLES)]
        axes.plot(
            steps[::stride],
            losses[::stride],
            color=color,
            linestyle=style,
            linewidth=min(1.3 + 0.9 * sizes[::-1].index(run.size), 5),
            alpha=0.85,
            label=None if run.size in named else plural(run.size, "rank"),
        )
        named.add(run.size)
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend(loc="best", ncols=1 + (len(sizes) > 6))
