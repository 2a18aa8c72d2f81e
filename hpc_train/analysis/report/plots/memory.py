"""The most memory that a rank took, beside what it may take."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from hpc_train.analysis.report.model import Plot
from hpc_train.analysis.report.plots.canvas import BLUE, VERMILLION, label_bar, legend_above
from hpc_train.analysis.report.plots.step_time import bars_by_size
from hpc_train.analysis.runs.memory import PeakMemory
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.formatting import amount, plural, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Peaks = Sequence[tuple[Row, PeakMemory]]


def memory_plot(peaks: Peaks) -> Plot | None:
    """None if no run recorded its peak."""
    known = [(row, peak) for row, peak in peaks if peak.peak_bytes]
    if not known:
        return None
    where = "on its GPU" if known[0][1].on_gpu else "of its own"
    told = ", ".join(f"{plural(row.size, 'rank')} {_told(peak)}" for row, peak in known)
    return Plot(
        "memory",
        f"The most memory that a rank took {where}. Lines: what a rank may take, its share of the node or its GPU.",
        f"Largest peak memory of a rank {where}: {told}.",
        partial(_paint, peaks=known),
    )


def _told(peak: PeakMemory) -> str:
    room = f" of {amount(peak.room_bytes, 'B')}" if peak.room_bytes else ""
    return amount(peak.peak_bytes, "B") + room


def _paint(axes: "Axes", peaks: Peaks) -> None:
    taken = [peak.peak_bytes or 0.0 for _, peak in peaks]
    room = [peak.room_bytes for _, peak in peaks]
    scale, unit = next(pair for pair in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1.0, "B")) if max(taken) >= pair[0])
    axes.bar(range(len(peaks)), [each / scale for each in taken], 0.62, color=BLUE, label="taken at the peak")
    for place, each in enumerate(taken):
        label_bar(axes, place, each / scale, significant(each / scale))
    lines = [(most / scale, place - 0.4, place + 0.4) for place, most in enumerate(room) if most]
    if lines:
        axes.hlines(*zip(*lines, strict=True), color=VERMILLION, linewidth=2, label="room")
    legend_above(axes, 2)
    bars_by_size(axes, [row for row, _ in peaks], f"memory of a rank ({unit})")
    axes.set_ylim(bottom=0)
