"""How much sooner a loss was reached, beside how much faster samples went by."""

from typing import TYPE_CHECKING

from hpc_train.analysis.convergence.target import TargetRow, TargetStudy
from hpc_train.analysis.report.plots.canvas import BLUE, SKY, Drawing
from hpc_train.core.formatting import plural, ratio_text, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_ROWS = 10
_ALIKE = 0.05  # speedups within this of each other are one and the same


def target_drawing(study: TargetStudy) -> Drawing | None:
    """Speedups by time to target and by samples per second; None where they do not differ."""
    rows = [row for row in study.rows if row.speedup or row.throughput][-_MOST_ROWS:]
    if study.reference is None or not any(_differ(row) for row in rows):
        return None
    goal, over = significant(study.target), plural(study.reference.size, "rank")
    told = ", ".join(f"{plural(row.size, 'rank')} (batch {row.global_batch}) {_words(row)}" for row in rows)
    return Drawing(
        "time-to-loss",
        f"Speedup over {over} in time to a training loss of {goal}, dark, with 95% intervals where runs were repeated,"
        " beside that in samples per second, light: what is lost between them went into more samples.",
        f"Speedup over {over} to a loss of {goal}, and in samples per second: {told}.",
        lambda axes: _paint(axes, study, rows, over),
    )


def _differ(row: TargetRow) -> bool:
    return row.throughput is not None and abs((row.speedup or 0.0) / row.throughput - 1) > _ALIKE


def _words(row: TargetRow) -> str:
    reached = "not reached" if row.speedup is None else ratio_text(row.speedup)
    return reached + (f" and {ratio_text(row.throughput)}" if row.throughput else "")


def _paint(axes: "Axes", study: TargetStudy, rows: list[TargetRow], over: str) -> None:
    for place, row in enumerate(rows):
        first = place == 0
        label = "by samples/s" if first else None
        axes.bar(place + 0.2, row.throughput or 0.0, 0.36, color=SKY, edgecolor="white", label=label)
        speedup = row.speedup or 0.0
        low, high = row.speedup_interval or (speedup, speedup)
        label = "by time to loss" if first else None
        bars = [[speedup - low], [high - speedup]] if row.speedup_interval else None
        axes.bar(place - 0.2, speedup, 0.36, color=BLUE, edgecolor="white", label=label, yerr=bars, capsize=3)
    several = len({row.global_batch for row in study.rows}) > 1
    names = [f"{row.size}\n({row.global_batch})" if several else str(row.size) for row in rows]
    axes.set_xticks(range(len(rows)), names)
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="ranks" + " (global batch)" * several, ylabel=f"speedup over {over}")
    axes.legend(loc="upper left")
