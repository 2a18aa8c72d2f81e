"""The energy of a job: by size, by phase, and against the speedup."""

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hpc_train.analysis.energy.cost import GroupEnergy, RowEnergy
from hpc_train.analysis.energy.energy_amount import EnergyAmount
from hpc_train.analysis.energy.run_energy import VALIDATION
from hpc_train.analysis.report.model import Plot
from hpc_train.analysis.report.plots.canvas import BLUE, GREEN, GREY, SKY, VERMILLION, WHITE, label_bar, legend_above
from hpc_train.analysis.report.plots.step_time import PHASE_COLORS, bars_by_size
from hpc_train.core.formatting import plural, ratio_text, sentence, significant
from hpc_train.core.timing_log import COMMUNICATION, PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = {"dynamic": GREEN, "idle": SKY, "measured": GREEN, "estimated": GREEN}
_OUTSIDE = "outside steps"
_SHOWN = (*PHASES, VALIDATION, _OUTSIDE)
_HEIGHT = 0.75


def _unit(most_j: float) -> tuple[float, str]:
    """The factor from joules to the unit in which the largest is at least 1, and that unit."""
    ladder = ((1e9, "GJ"), (1e6, "MJ"), (1e3, "kJ"), (1.0, "J"), (1e-3, "mJ"), (1e-6, "uJ"))
    size, unit = next((pair for pair in ladder if most_j >= pair[0]), ladder[-1])
    return 1 / size, unit


def _qualities(parts: Sequence[EnergyAmount]) -> str:
    """ "measured", "estimated / measured": of what is known."""
    known = {"mixed": "part estimated"}
    return " / ".join(sorted({known.get(part.quality, part.quality) for part in parts if part.known > 0} - {"missing"}))


# ---------------------------------------------------------------------------------------------- by size


def energy_by_size_plot(cost: GroupEnergy) -> Plot:
    rows = cost.rows
    qualities = _qualities([row.per_sample for row in rows]) or "partly missing"
    with_idle = any(row.net.total is not None for row in rows)
    is_hatched = any(_is_estimate(amount) for row in rows for _, amount in _pieces(row))
    split = " Green is dynamic, light blue the idle energy of the nodes." if with_idle else ""
    hatched = " Hatched is estimated, not read from a meter." if is_hatched else ""
    amounts = ", ".join(f"{plural(row.row.size, 'rank')} {_amount_text(row)}" for row in rows)
    return Plot(
        "energy-per-sample",
        f"Energy per sample trained on, whole run, {qualities}.{split}{hatched}",
        sentence(f"Energy per sample: {amounts}"),
        partial(_paint_sizes, rows=rows, qualities=qualities),
        _HEIGHT,
    )


def _amount_text(row: RowEnergy) -> str:
    net = f" of which dynamic {row.net_per_sample.text()}" if row.net.total is not None else ""
    return row.per_sample.text() + net


def _pieces(row: RowEnergy) -> list[tuple[str, EnergyAmount]]:
    """The pieces of a bar, bottom first: by idle power if that is known, else by quality."""
    whole = row.per_sample
    if row.net.total is None or whole.total is None:
        return [
            ("measured", EnergyAmount(measured=whole.measured)),
            ("estimated", EnergyAmount(estimated=whole.estimated)),
        ]
    net = row.net_per_sample
    idle_j = whole.known - net.known
    idle = EnergyAmount(estimated=idle_j) if _is_estimate(net) else EnergyAmount(measured=idle_j)
    return [("dynamic", net), ("idle", idle)]


def _is_estimate(amount: EnergyAmount) -> bool:
    return (amount.estimated or 0.0) > 0


def _paint_sizes(axes: "Axes", rows: Sequence[RowEnergy], qualities: str) -> None:
    scale, unit = _unit(max(row.per_sample.known for row in rows))
    named: set[str] = set()
    for place, row in enumerate(rows):
        top = 0.0
        for name, amount in _pieces(row):
            if amount.known > 0:
                label = None if name in named else name
                axes.bar(place, scale * amount.known, 0.62, top, label=label, linewidth=1, **_style(name, amount))
                named.add(name)
                top += scale * amount.known
        label_bar(axes, place, top, _bar_text(row.per_sample, scale))
    if len(named) > 1:
        legend_above(axes, 2)
    bars_by_size(axes, [row.row for row in rows], f"energy per sample ({unit}), {qualities}")


def _style(name: str, amount: EnergyAmount) -> dict[str, Any]:
    """An estimate is hatched, with no fill."""
    color = _COLORS[name]
    if _is_estimate(amount):
        return {"color": WHITE, "edgecolor": color, "hatch": "///"}
    return {"color": color, "edgecolor": color}


def _bar_text(amount: EnergyAmount, scale: float) -> str:
    if not amount.known > 0:
        return "missing"
    return f"{'at least ' if amount.lacking else ''}{significant(scale * amount.known)}{amount.mark()}"


# ---------------------------------------------------------------------------------------------- by phase


def energy_by_phase_plot(cost: GroupEnergy) -> Plot | None:
    rows = [row for row in cost.rows if row.phases and not row.loop.lacking]
    if not rows:
        return None
    amounts = "; ".join(f"{plural(row.row.size, 'rank')}: {_phases_text(row)}" for row in rows)
    return Plot(
        "energy-by-phase",
        "Energy per sample by phase, divided by the time of each phase: no meter is fast enough to separate them."
        " Hatched: energy spent in exposed communication.",
        sentence(f"Energy per sample by phase, attributed by time: {amounts}"),
        partial(_paint_phases, rows=rows),
        _HEIGHT,
    )


def _phases_text(row: RowEnergy) -> str:
    return ", ".join(f"{name} {EnergyAmount(estimated=joules).text()}" for name, joules in _phases(row))


def _phases(row: RowEnergy) -> list[tuple[str, float]]:
    """(phase, joules per sample); the servers' energy is added to their phases."""
    num_samples = fmean(run.summary.num_samples for run in row.row.runs)
    joules = {phase: amount.known for phase, amount in row.phases.items()}
    for phase, amount in row.servers.items():
        joules[phase] = joules.get(phase, 0.0) + amount.known
    joules[_OUTSIDE] = row.outside.known
    order = [name for name in _SHOWN if joules.get(name, 0.0) > 0]
    return [(name, joules[name] / num_samples) for name in order if num_samples]


def _paint_phases(axes: "Axes", rows: Sequence[RowEnergy]) -> None:
    bars = [dict(_phases(row)) for row in rows]
    scale, unit = _unit(max(sum(bar.values()) for bar in bars))
    below = [0.0] * len(rows)
    for name in _SHOWN:
        heights = [scale * bar.get(name, 0.0) for bar in bars]
        if not any(heights):
            continue
        how: dict[str, Any] = {"color": PHASE_COLORS.get(name, WHITE), "linewidth": 0.5, "label": name}
        edge = WHITE if name in PHASES else GREY
        hatch = "///" if name in COMMUNICATION else "..." if name == VALIDATION else None
        axes.bar(range(len(rows)), heights, 0.62, below, edgecolor=edge, hatch=hatch, **how)
        below = [base + height for base, height in zip(below, heights, strict=True)]
    legend_above(axes, 3)
    bars_by_size(axes, [row.row for row in rows], f"energy per sample ({unit})")


# ---------------------------------------------------------------------------------------------- by speedup


def energy_by_speedup_plot(cost: GroupEnergy) -> Plot | None:
    rows = [row for row in cost.rows if row.row.speedup is not None and not row.row.incomplete]
    rows = [row for row in rows if row.per_sample.total is not None]
    if len(rows) < 2 or cost.group.baseline is None:
        return None
    over = plural(cost.group.baseline.size, "rank")
    prices = ", ".join(
        f"{plural(row.row.size, 'rank')} {ratio_text(row.row.speedup or 0.0)} for {row.per_sample.text()}"
        for row in rows
    )
    return Plot(
        "energy-against-speedup",
        f"Energy against speedup. Below the dashed line, joules times seconds are less than on {over}: more ranks pay"
        " there.",
        sentence(f"Speedup over {over} and energy per sample: {prices}"),
        partial(_paint_speedup, rows=rows, over=over),
    )


def _price_text(row: RowEnergy) -> str:
    speedup = ratio_text(row.row.speedup or 0.0)
    return f"{plural(row.row.size, 'rank')} {speedup} for {row.per_sample.text()}"


def _paint_speedup(axes: "Axes", rows: Sequence[RowEnergy], over: str) -> None:
    scale, unit = _unit(max(row.per_sample.known for row in rows))
    speedups = [row.row.speedup or 0.0 for row in rows]
    joules = [scale * row.per_sample.known for row in rows]
    highest = 1.25 * max(joules)
    first = joules[speedups.index(1.0)] if 1.0 in speedups else joules[0]
    ends = [0.0, min(max(speedups), highest / first)]
    axes.plot(ends, [first * end for end in ends], color=GREY, linestyle="--", linewidth=1.2, label="equal J s")
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
