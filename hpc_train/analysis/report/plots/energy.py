"""What a job cost in joules, as figures: by size, by phase, and against the speedup that they bought."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hpc_train.analysis.energy.cost import GroupEnergy, RowEnergy
from hpc_train.analysis.energy.energy_amount import EnergyAmount
from hpc_train.analysis.report.plots.canvas import (
    BLUE,
    GREEN,
    GREY,
    SKY,
    VERMILLION,
    WHITE,
    Drawing,
    label_bar,
    legend_above,
)
from hpc_train.analysis.report.plots.steps import PHASE_COLORS, bars_by_size
from hpc_train.core.formatting import plural, ratio_text, significant
from hpc_train.core.records import COMMUNICATION, PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = {"above idle": GREEN, "at rest": SKY, "measured": GREEN, "estimated": GREEN}
_OUTSIDE = "outside steps"


def energy_drawings(cost: GroupEnergy) -> list[Drawing]:
    """A group's figures of energy; none where nothing was read or estimated."""
    if not cost.known:
        return []
    return [_size_drawing(cost), *_phase_drawing(cost), *_speedup_drawing(cost)]


def _unit(most_j: float) -> tuple[float, str]:
    """The factor from joules, and the unit in which the largest is at least 1."""
    ladder = ((1e9, "GJ"), (1e6, "MJ"), (1e3, "kJ"), (1.0, "J"), (1e-3, "mJ"), (1e-6, "uJ"))
    size, unit = next((pair for pair in ladder if most_j >= pair[0]), ladder[-1])
    return 1 / size, unit


def _qualities(parts: Sequence[EnergyAmount]) -> str:
    """ "measured", "estimated / measured": of what is known."""
    known = {"mixed": "part estimated"}
    return " / ".join(sorted({known.get(part.quality, part.quality) for part in parts if part.known > 0} - {"missing"}))


# ---------------------------------------------------------------------------------------------- by size


def _size_drawing(cost: GroupEnergy) -> Drawing:
    rows = cost.rows
    qualities = _qualities([row.per_sample for row in rows]) or "in part missing"
    with_idle = any(row.net.total is not None for row in rows)
    told = ", ".join(
        f"{plural(row.row.size, 'rank')} {row.per_sample.text()}"
        + (f" of which above idle {row.net_per_sample.text()}" if row.net.total is not None else "")
        for row in rows
    )
    split = " Green is above idle, light blue what the nodes draw at rest for as long." if with_idle else ""
    hatched = " Hatched is estimated, not read from a meter."
    is_hatched = any(_is_estimate(part) for row in rows for _, part in _parts(row))
    return Drawing(
        "energy-per-sample",
        f"Energy per sample trained on, whole run, {qualities}.{split}{hatched * is_hatched}",
        f"Energy per sample: {told}.",
        lambda axes: _paint_sizes(axes, rows, qualities),
        height=0.75,
    )


def _parts(row: RowEnergy) -> list[tuple[str, EnergyAmount]]:
    """What a bar is made of, from below: idle apart where it is known, else by how it came to be known."""
    whole = row.per_sample
    if row.net.total is not None and whole.total is not None:
        net = row.net_per_sample
        return [
            ("above idle", net),
            (
                "at rest",
                EnergyAmount(estimated=whole.known - net.known)
                if _is_estimate(net)
                else EnergyAmount(measured=whole.known - net.known),
            ),
        ]
    return [("measured", EnergyAmount(measured=whole.measured)), ("estimated", EnergyAmount(estimated=whole.estimated))]


def _is_estimate(part: EnergyAmount) -> bool:
    return (part.estimated or 0.0) > 0


def _paint_sizes(axes: "Axes", rows: Sequence[RowEnergy], qualities: str) -> None:
    scale, unit = _unit(max(row.per_sample.known for row in rows))
    named: set[str] = set()
    for place, row in enumerate(rows):
        below = 0.0
        for name, part in _parts(row):
            if part.known > 0:
                _bar(axes, place, scale * part.known, below, _COLORS[name], _is_estimate(part), name, named)
                below += scale * part.known
        part = row.per_sample
        least = "at least " if part.lacking else ""
        words = f"{least}{significant(scale * part.known)}{part.mark()}" if part.known > 0 else "missing"
        label_bar(axes, place, below, words)
    if len(named) > 1:
        legend_above(axes, 2)
    bars_by_size(axes, [row.row for row in rows], f"energy per sample ({unit}), {qualities}")


def _bar(
    axes: "Axes", place: int, height: float, below: float, color: str, hollow: bool, name: str, named: set[str]
) -> None:
    """One piece of a bar; an estimate is hatched. Named in the legend the first time."""
    how: dict[str, Any] = {"color": WHITE if hollow else color, "edgecolor": color, "linewidth": 1}
    axes.bar(place, height, 0.62, below, hatch="///" if hollow else None, label=None if name in named else name, **how)
    named.add(name)


# ---------------------------------------------------------------------------------------------- by phase


def _phase_drawing(cost: GroupEnergy) -> list[Drawing]:
    rows = [row for row in cost.rows if row.phases and not row.loop.lacking]
    if not rows:
        return []
    told = "; ".join(
        f"{plural(row.row.size, 'rank')}: "
        + ", ".join(f"{name} {EnergyAmount(estimated=part).text()}" for name, part in _phases(row))
        for row in rows
    )
    return [
        Drawing(
            "energy-by-phase",
            "Energy per sample by phase, divided by the time that phases take: no meter is quick enough to tell them"
            " apart. Hatched: joules while ranks wait for exposed communication.",
            f"Energy per sample by phase, attributed by time: {told}.",
            lambda axes: _paint_phases(axes, rows),
            height=0.75,
        )
    ]


def _phases(row: RowEnergy) -> list[tuple[str, float]]:
    """(phase, joules per sample); the servers' part is in that of their phases."""
    num_samples = fmean(run.summary.num_samples for run in row.row.runs)
    joules = {phase: row.phases[phase].known for phase in PHASES if phase in row.phases}
    for phase, part in row.servers.items():
        joules[phase] = joules.get(phase, 0.0) + part.known
    parts = [*((phase, joules[phase]) for phase in PHASES if phase in joules), (_OUTSIDE, row.outside.known)]
    return [(name, part / num_samples) for name, part in parts if num_samples and part > 0]


def _paint_phases(axes: "Axes", rows: Sequence[RowEnergy]) -> None:
    parts = [dict(_phases(row)) for row in rows]
    scale, unit = _unit(max(sum(each.values()) for each in parts))
    below = [0.0] * len(rows)
    for name in (*PHASES, _OUTSIDE):
        heights = [scale * each.get(name, 0.0) for each in parts]
        if not any(heights):
            continue
        how: dict[str, Any] = {"color": PHASE_COLORS.get(name, WHITE), "linewidth": 0.5, "label": name}
        edge, hatch = GREY if name == _OUTSIDE else WHITE, "///" if name in COMMUNICATION else None
        axes.bar(range(len(rows)), heights, 0.62, below, edgecolor=edge, hatch=hatch, **how)
        below = [base + height for base, height in zip(below, heights, strict=True)]
    legend_above(axes, 3)
    bars_by_size(axes, [row.row for row in rows], f"energy per sample ({unit})")


# ---------------------------------------------------------------------------------------------- by speedup


def _speedup_drawing(cost: GroupEnergy) -> list[Drawing]:
    rows = [
        row
        for row in cost.rows
        if row.row.speedup is not None and row.per_sample.total is not None and not row.row.incomplete
    ]
    if len(rows) < 2 or cost.group.baseline is None:
        return []
    over = plural(cost.group.baseline.size, "rank")
    told = ", ".join(
        f"{plural(row.row.size, 'rank')} {ratio_text(row.row.speedup or 0.0)} for {row.per_sample.text()}"
        for row in rows
    )
    return [
        Drawing(
            "energy-against-speedup",
            f"What speedup costs in joules. Below the dashed line, joules times seconds are fewer than on {over}:"
            " there more ranks pay.",
            f"Speedup over {over} and energy per sample: {told}.",
            lambda axes: _paint_speedup(axes, rows, over),
        )
    ]


def _paint_speedup(axes: "Axes", rows: Sequence[RowEnergy], over: str) -> None:
    scale, unit = _unit(max(row.per_sample.known for row in rows))
    speedups = [row.row.speedup or 0.0 for row in rows]
    joules = [scale * row.per_sample.known for row in rows]
    highest = 1.25 * max(joules)
    first = joules[speedups.index(1.0)] if 1.0 in speedups else joules[0]
    ends = [0.0, min(max(speedups), highest / first)]
    axes.plot(ends, [first * end for end in ends], color=GREY, linestyle="--", linewidth=1.2, label="as much J s")
    axes.plot(speedups, joules, color=BLUE, linewidth=1.2)
    for kind, color, fill in (("measured", BLUE, BLUE), ("with estimates", VERMILLION, WHITE)):
        some = [index for index, row in enumerate(rows) if (row.per_sample.quality == "measured") == (color == BLUE)]
        if some:
            points = [speedups[index] for index in some], [joules[index] for index in some]
            axes.plot(*points, "o", color=color, markerfacecolor=fill, markersize=5, label=kind)
    for row, speedup, each in zip(rows, speedups, joules, strict=True):
        place = (speedup, each)
        axes.annotate(str(row.row.size), place, (0, 6), textcoords="offset points", ha="center", fontsize="small")
    axes.set_ylim(0, highest)
    axes.set_xlim(left=0)
    axes.legend(loc="lower right")
    axes.set(xlabel=f"speedup over {over} (numbers: ranks)", ylabel=f"energy per sample ({unit})")
