"""Which rank spends more time than the others, and in which phase: ranks by phases."""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hpc_train.analysis.report.model import Plot
from hpc_train.analysis.report.plots.canvas import BLACK, WHITE, diverging
from hpc_train.analysis.runs.load_balance import LoadBalance
from hpc_train.analysis.scaling.compare import Group
from hpc_train.core.formatting import ms_text, plural, significant
from hpc_train.core.records import FloatArray
from hpc_train.core.timing_log import PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_COLUMNS = 256  # of the map
_ROOM_FOR_NUMBERS = 8  # ranks
_FULL = 0.7  # of the deepest shade: from here on text is white


def rank_phases_plot(group: Group) -> Plot | None:
    """The run at the largest size whose ranks differ most; None if only 1 rank trained, or if all are alike."""
    rows = [row for row in group.rows if not row.incomplete] or list(group.rows)
    balances = [
        [run.load_balance for run in row.runs if run.load_balance and len(run.load_balance.ranks) > 1] for row in rows
    ]
    found = next((some for some in reversed(balances) if some), None)
    if found is None:
        return None
    balance = max(found, key=lambda each: float(_apart(each).std()))
    spent_s, phases = _by_step(balance)
    if not _apart(balance).any():
        return None
    rank, phase = np.unravel_index(int(np.argmax(spent_s - spent_s.mean(axis=0))), spent_s.shape)
    more_s = float(spent_s[rank, phase] - spent_s[:, phase].mean())
    num_ranks = len(balance.ranks)
    columns = f" A column is {num_ranks / _MOST_COLUMNS:.3g} ranks." if num_ranks > _MOST_COLUMNS else ""
    return Plot(
        "rank-phases",
        f"Time of a step by rank and phase on {plural(num_ranks, 'rank')}, against the mean rank: orange ranks take"
        f" longer, blue ones shorter. Below each phase its mean over ranks.{columns}",
        f"Time of a step by rank and phase of {plural(num_ranks, 'rank')}. Furthest above the mean rank: rank"
        f" {balance.ranks[rank]} in {phases[phase]}, by {ms_text(more_s)} ms.",
        partial(_paint, balance=balance),
        height=0.66,
    )


def _by_step(balance: LoadBalance) -> tuple[FloatArray, list[str]]:
    """((ranks, phases) seconds a step, names of the phases in which any rank spent time)."""
    spent_s = balance.phases_s / balance.steps.sum()
    timed = spent_s.any(axis=0)
    return spent_s[:, timed], [phase for phase, any_time in zip(PHASES, timed, strict=True) if any_time]


def _apart(balance: LoadBalance) -> FloatArray:
    spent_s, _ = _by_step(balance)
    return np.asarray(spent_s - spent_s.mean(axis=0))


def _paint(axes: "Axes", balance: LoadBalance) -> None:
    from matplotlib.ticker import MaxNLocator

    spent_s, phases = _by_step(balance)
    num_ranks = len(spent_s)
    apart_ms = 1e3 * _apart(balance).T
    if num_ranks > _MOST_COLUMNS:
        starts = np.arange(_MOST_COLUMNS) * num_ranks // _MOST_COLUMNS
        apart_ms = np.add.reduceat(apart_ms, starts, axis=1) / np.diff(np.append(starts, num_ranks))
    most = float(np.abs(apart_ms).max()) or 1.0
    extent = (-0.5, num_ranks - 0.5, len(phases) - 0.5, -0.5)
    style: dict[str, Any] = {"aspect": "auto", "interpolation": "none", "extent": extent}
    image = axes.imshow(apart_ms, cmap=diverging(), vmin=-most, vmax=most, **style)
    if num_ranks <= _ROOM_FOR_NUMBERS:
        for phase, rank in np.ndindex(apart_ms.shape):
            color = WHITE if abs(apart_ms[phase, rank]) > _FULL * most else BLACK
            text = significant(1e3 * float(spent_s[rank, phase]))
            axes.annotate(text, (rank, phase), ha="center", va="center", color=color, fontsize="small")
        axes.set_xticks(range(num_ranks), [str(rank) for rank in balance.ranks])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    means_ms = 1e3 * spent_s.mean(axis=0)
    names = [f"{phase}\n{significant(mean)} ms" for phase, mean in zip(phases, means_ms, strict=True)]
    axes.set_yticks(range(len(phases)), names, fontsize="small")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set(xlabel="rank")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("more than the mean rank (ms)")
    bar.outline.set_visible(False)
