"""What a test predicted of each class (a confusion matrix), or of each range of true values."""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hpc_train.analysis.report.model import Plot
from hpc_train.analysis.report.plots.canvas import BLACK, WHITE, sequential
from hpc_train.analysis.runs.counts import counts_of_test
from hpc_train.analysis.scaling.compare import Group
from hpc_train.core.formatting import percent, plural
from hpc_train.core.records import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROOM_FOR_NUMBERS = 12  # classes
_FULL = 0.55  # of the deepest shade: from here on text is white
_SPREAD = 4.0  # deviations of targets that the bins of a scatter span to each side, see train/metrics.py


def confusion_plot(group: Group) -> Plot | None:
    """Of the largest size with a test_confusion.csv, whose shares of a true class add up to 1; None without any."""
    found = _largest(group, "confusion")
    if found is None:
        return None
    size, counts = found
    off = counts - np.diag(np.diag(counts))
    true, predicted = np.unravel_index(int(off.argmax()), off.shape)
    right, most = float(np.trace(counts) / counts.sum()), int(off[true, predicted])
    confused = f" Most often confused: class {true} taken for {predicted}, {most:,} times." if most else ""
    return Plot(
        "confusion",
        f"Test samples of each true class by predicted class, in percent of the true class, on {plural(size, 'rank')}. "
        "meta.json (classes) lists which label is which class.",
        f"Confusion matrix of {len(counts)} classes: {percent(right, 1)} of {int(counts.sum()):,} samples right."
        + confused,
        partial(_paint_confusion, counts=counts),
        height=0.8,
    )


def scatter_plot(group: Group) -> Plot | None:
    """Of the largest size with a test_scatter.csv; None without any."""
    found = _largest(group, "scatter")
    if found is None:
        return None
    size, counts = found
    return Plot(
        "scatter",
        f"Predicted by true values of the test on {plural(size, 'rank')}, in standard deviations of the training "
        "targets from their mean; darker squares hold more values, and a perfect prediction lies on the line.",
        f"Predicted by true values: {int(counts.sum()):,} values, {percent(_share_near(counts), 1)} of them less than "
        "half a deviation from the line.",
        partial(_paint_scatter, counts=counts),
        height=0.8,
    )


def _largest(group: Group, name: str) -> tuple[int, FloatArray] | None:
    for row in reversed(group.rows):
        for run in row.runs:
            if (counts := counts_of_test(run.dir, name)) is not None:
                return run.size, counts
    return None


def _share_near(counts: FloatArray) -> float:
    apart = np.abs(np.subtract.outer(np.arange(len(counts)), np.arange(len(counts)))) * 2 * _SPREAD / len(counts)
    return float(counts[apart < 0.5].sum() / counts.sum())


def _paint_confusion(axes: "Axes", counts: FloatArray) -> None:
    from matplotlib.ticker import MaxNLocator

    percents = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(percents, cmap=sequential(), vmin=0, vmax=100, aspect="auto", interpolation="none")
    if len(counts) <= _ROOM_FOR_NUMBERS:
        for true, predicted in np.argwhere(percents >= 0.5):
            share = float(percents[true, predicted])
            color = WHITE if share > 100 * _FULL else BLACK
            axes.annotate(f"{share:.0f}", (predicted, true), ha="center", va="center", color=color, fontsize="small")
        axes.set_xticks(range(len(counts)))
        axes.set_yticks(range(len(counts)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set(xlabel="predicted class", ylabel="true class")


def _paint_scatter(axes: "Axes", counts: FloatArray) -> None:
    extent = (-_SPREAD, _SPREAD, -_SPREAD, _SPREAD)
    shades = np.log1p(counts.T)  # a single value is seen beside thousands
    axes.imshow(shades, cmap=sequential(), origin="lower", extent=extent, aspect="auto", interpolation="none")
    axes.plot([-_SPREAD, _SPREAD], [-_SPREAD, _SPREAD], color=BLACK, linewidth=0.8, linestyle=":")
    axes.grid(visible=False)
    axes.set(xlabel="true", ylabel="predicted")
