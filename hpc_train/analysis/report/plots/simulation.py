"""A simulated step over ranks: what it is spent on, what was measured, and the other algorithms."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hpc_train.analysis.report.model import Plot
from hpc_train.analysis.report.plots.canvas import BLACK, BLUE, GREEN, ORANGE, VERMILLION, legend_above, thinned
from hpc_train.analysis.simulation.simulate import SimulatedStep
from hpc_train.analysis.simulation.study import Simulation
from hpc_train.core.formatting import plural, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# From the bottom: of the simulated step.
LAYERS = (
    ("input_s", "wait for input", ORANGE),
    ("computation_s", "computation", BLUE),
    ("imbalance_s", "wait for the slowest", GREEN),
    ("transfer_s", "exposed communication", VERMILLION),
)
_LOG_FROM = 10.0  # times the shortest step: from there on the axis of time is logarithmic


def simulation_plot(simulation: Simulation) -> Plot:
    """Milliseconds of a step, its parts on top of each other, at the simulated sizes."""
    told = "; ".join(f"{plural(step.ranks, 'rank')} {_ms(step.step_s)} ms" for step in simulation.steps)
    measured = ", ".join(f"{plural(each.ranks, 'rank')} {_ms(each.measured_s)} ms" for each in simulation.checks)
    return Plot(
        "simulation",
        "A simulated step, estimated and not measured: what it is spent on. Error bars: 95% of simulated runs."
        + (" Diamonds: measured." if measured else ""),
        f"Simulated step times: {told}." + (f" Measured: {measured}." if measured else ""),
        partial(_paint, simulation=simulation),
    )


def _ms(seconds: float) -> str:
    return significant(1e3 * seconds)


def _paint(axes: "Axes", simulation: Simulation) -> None:
    steps = curve(simulation)
    ranks = np.array([step.ranks for step in steps], dtype=float)
    bottom = np.zeros(len(steps))
    for name, label, color in LAYERS:
        top = bottom + 1e3 * np.array([getattr(step, name) for step in steps])
        if (top - bottom).max() > 0:
            axes.fill_between(ranks, bottom, top, color=color, alpha=0.75, linewidth=0, label=label)
        bottom = top
    low, high = (1e3 * np.array([step.step_interval_s[end] for step in steps]) for end in (0, 1))
    spread = [np.maximum(bottom - low, 0.0), np.maximum(high - bottom, 0.0)]
    axes.errorbar(ranks, bottom, yerr=spread, color=BLACK, linewidth=1, capsize=2, marker="o", markersize=3)
    measured = [(each.ranks, 1e3 * each.measured_s) for each in simulation.checks]
    if measured:
        axes.plot(*zip(*measured, strict=True), "D", color=BLACK, markerfacecolor="none", label="measured")
    shortest_ms = min([float(bottom.min()), *(ms for _, ms in measured)])
    _scale(axes, [step.ranks for step in steps], shortest_ms, float(bottom.max()))
    axes.set(xlabel="ranks", ylabel="step (ms)")
    legend_above(axes, 2)


def _scale(axes: "Axes", sizes: list[int], shortest_ms: float, longest_ms: float) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator

    axes.set_xscale("log", base=2)
    if longest_ms > _LOG_FROM * shortest_ms:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylim(bottom=0.5 * shortest_ms)
    else:
        axes.set_ylim(bottom=0)
    axes.minorticks_off()
    places = [float(np.log2(size)) for size in sizes]
    shown = [sizes[index] for index in thinned(places, (places[-1] - places[0]) / 6)]
    axes.set_xticks(shown, [f"{size:,}" for size in shown])


def curve(simulation: Simulation) -> Sequence[SimulatedStep]:
    """Measured sizes that were simulated, and the sizes asked for, by ranks."""
    by_ranks = {step.ranks: step for step in (*(each.simulated for each in simulation.checks), *simulation.steps)}
    return [by_ranks[ranks] for ranks in sorted(by_ranks)]
