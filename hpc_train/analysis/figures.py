"""The figures of a report, as SVG to stand inside HTML."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from hpc_train.analysis.scaling import Group, Row, num_ranks
from hpc_train.analysis.strategies import Comparison, Entry
from hpc_train.analysis.tables import ranks_text
from hpc_train.analysis.words import energy_text, percent, significant
from hpc_train.records import PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color universal design" (2008): told apart with any colour vision.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"
GREY, PURPLE = "#999999", "#CC79A7"
PHASE_COLORS = dict(zip(PHASES, (ORANGE, SKY, BLUE, VERMILLION, GREEN, GREY), strict=True))
LINE_STYLES = [(BLUE, "-"), (VERMILLION, "--"), (GREEN, "-."), (PURPLE, ":"), (ORANGE, "-"), (BLACK, "--")]
MAX_POINTS = 400  # of a loss curve: more cannot be seen

_STYLE: Any = {
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.8,
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "axes.formatter.use_mathtext": False,
    "hatch.linewidth": 0.7,
}


@dataclass(frozen=True)
class Drawing:
    """A figure on the page: its caption and the SVG, which carries its own title for screen readers."""

    caption: str
    svg: Markup
    is_wide: bool = False  # as wide as the page's text


def group_drawings(group: Group, ident: str) -> list[Drawing]:
    """A group's figures; one that would show nothing is left out."""
    makers = (_speedup_drawing, _phase_drawing, _loss_drawing, _energy_drawing)
    made = (maker(group, f"{ident}-{number}") for number, maker in enumerate(makers))
    return [drawing for drawing in made if drawing is not None]


def _speedup_drawing(group: Group, ident: str) -> Drawing | None:
    rows = [row for row in group.rows if row.speedup is not None]
    if group.baseline is None:
        return None
    over = num_ranks(group.baseline.size)
    sizes = sorted({row.size for row in rows})
    ideal = [size / group.baseline.size for size in sizes]
    with _figure() as (figure, axes):
        axes.plot(sizes, ideal, color=GREY, linestyle="--", linewidth=1.2, label="ideal")
        whole = [row for row in rows if not row.incomplete]
        axes.plot(*_points(whole), color=BLUE, linewidth=1.4)
        for name, some, fill in (
            ("measured, 95% interval", whole, BLUE),
            ("incomplete run", [row for row in rows if row.incomplete], "white"),
        ):
            if some:
                axes.errorbar(
                    *_points(some),
                    yerr=_bars(some),
                    fmt="o",
                    color=BLUE,
                    markerfacecolor=fill,
                    markersize=5,
                    capsize=3,
                    label=name,
                )
        if sizes[-1] >= 8 * sizes[0]:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.minorticks_off()
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set(xlabel="ranks", ylabel=f"speedup over {over}")
        axes.legend(loc="upper left")
        told = ", ".join(f"{num_ranks(row.size)} {row.speedup:.2f}" for row in rows)
        svg = _svg(figure, ident, f"Speedup over {over}: {told}.")
    kind = "Samples per second" if group.weak else "Speed"
    return Drawing(f"{kind} relative to {over}. Dashed, the ideal: twice the ranks, twice the speed.", svg)


def _points(rows: list[Row]) -> tuple[list[int], list[float]]:
    return [row.size for row in rows], [row.speedup or 0.0 for row in rows]


def _bars(rows: list[Row]) -> list[list[float]]:
    """Lengths of the error bars below and above, as `errorbar` wants them; 0 without an interval."""
    spans = [(row.speedup or 0.0, row.speedup_interval or (row.speedup or 0.0,) * 2) for row in rows]
    return [[middle - low for middle, (low, _) in spans], [high - middle for middle, (_, high) in spans]]


def _phase_drawing(group: Group, ident: str) -> Drawing | None:
    rows = [row for row in group.rows if row.phase_s]
    if not rows:
        return None
    with _figure() as (figure, axes):
        below = [0.0] * len(rows)
        for phase in PHASES:
            heights = [1e3 * row.phase_s[phase] for row in rows]
            axes.bar(
                range(len(rows)),
                heights,
                0.62,
                below,
                color=PHASE_COLORS[phase],
                edgecolor="white",
                linewidth=0.5,
                hatch="///" if phase == "reduce" else None,
                label=phase,
            )
            below = [base + height for base, height in zip(below, heights, strict=True)]
        for place, row in enumerate(rows):
            if "reduce" in row.phase_share:
                _label_bar(axes, place, below[place], f"{percent(row.phase_share['reduce'], 0)} reduce")
        _bars_by_size(axes, rows, "time per step (ms)")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
        told = "; ".join(
            f"{num_ranks(row.size)}: "
            + ", ".join(f"{phase} {significant(1e3 * row.phase_s[phase])}" for phase in PHASES)
            for row in rows
        )
        svg = _svg(figure, ident, f"Time per step by phase in ms: {told}.")
    caption = (
        "Where a step's time goes: mean over ranks that train and steady steps (the tables' step time is the median of"
        " the ranks' mean). Hatched: exposed communication."
    )
    return Drawing(caption, svg)


def _loss_drawing(group: Group, ident: str) -> Drawing | None:
    runs = [run for row in group.rows for run in row.runs if len(run.metrics[0]) > 1]
    if not runs:
        return None
    sizes = sorted({run.size for run in runs})
    with _figure() as (figure, axes):
        named = set()
        for run in runs:
            steps, losses = run.metrics
            stride = -(-len(steps) // MAX_POINTS)
            color, style = LINE_STYLES[sizes.index(run.size) % len(LINE_STYLES)]
            axes.plot(
                steps[::stride],
                losses[::stride],
                color=color,
                linestyle=style,
                linewidth=min(1.3 + 0.9 * sizes[::-1].index(run.size), 5),
                alpha=0.85,
                label=None if run.size in named else num_ranks(run.size),
            )
            named.add(run.size)
        axes.set(xlabel="step", ylabel="training loss")
        axes.legend(loc="best")
        told = ", ".join(f"{num_ranks(run.size)} {significant(run.metrics[1][-1])}" for run in runs)
        svg = _svg(figure, ident, f"Training loss by step; last values: {told}.")
    together = "" if group.weak else ": runs of one job should fall together at any number of ranks"
    return Drawing(f"Training loss, one line a run{together}.", svg)


def _energy_drawing(group: Group, ident: str) -> Drawing | None:
    rows = list(group.rows)
    known = [row.joules_per_sample for row in rows if row.joules_per_sample is not None]
    if not known:
        return None
    scale, unit = (1e3, "mJ") if max(known) < 0.5 else (1.0, "J")
    qualities = {row.energy.quality for row in rows} - {"missing"}
    with _figure() as (figure, axes):
        for place, row in enumerate(rows):
            height = scale * (row.joules_per_sample or 0.0)
            estimated = row.energy.quality == "estimated"
            axes.bar(
                place,
                height,
                0.62,
                color="white" if estimated else GREEN,
                edgecolor=GREEN,
                linewidth=1,
                hatch="///" if estimated else None,
            )
            words = f"{significant(height)}{' est.' if estimated else ''}"
            _label_bar(axes, place, height, "missing" if row.joules_per_sample is None else words)
        _bars_by_size(axes, rows, f"energy per sample ({unit}), {' / '.join(sorted(qualities))}")
        told = ", ".join(f"{num_ranks(row.size)} {energy_text(row.joules_per_sample, row.energy)}" for row in rows)
        svg = _svg(figure, ident, f"Energy per sample: {told}.")
    hatched = " Hatched bars are estimates, not readings of a meter." if "estimated" in qualities else ""
    return Drawing(f"Energy per sample trained on, whole run, {' / '.join(sorted(qualities))}.{hatched}", svg)


def strategy_drawings(comparison: Comparison, ident: str) -> list[Drawing]:
    """Step time and bytes of the strategies, side by side; none where nothing was timed."""
    entries = [entry for entry in comparison.entries if entry.row.phase_s]
    if not entries:
        return []
    sizes = sorted({entry.row.size for entry in entries})
    places = [-place - 0.5 * sizes.index(entry.row.size) for place, entry in enumerate(entries)]  # a gap between sizes
    with _figure(width=8.5, height=1.1 + 0.25 * len(entries), columns=2) as (figure, times, theory):
        exposed = [1e3 * entry.row.phase_s["reduce"] for entry in entries]
        computing = [1e3 * sum(entry.row.phase_s.values()) - wait for entry, wait in zip(entries, exposed, strict=True)]
        times.barh(places, computing, 0.62, color=BLUE, edgecolor="white", label="computing")
        color = PHASE_COLORS["reduce"]
        times.barh(places, exposed, 0.62, computing, color=color, edgecolor="white", hatch="///", label="exposed")
        moved = [entry.traffic.must_move_bytes if entry.traffic else 0.0 for entry in entries]
        scale, unit = _byte_unit(max(moved))
        theory.barh(places, [each / scale for each in moved], 0.62, color=SKY, edgecolor="white")
        for place, entry, each in zip(places, entries, moved, strict=True):
            words = _moved_text(entry, scale)
            theory.annotate(words, (each / scale, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
        times.set_yticks(places, [f"{entry.strategy}, {ranks_text(entry.row)}" for entry in entries])
        times.set(xlabel="time per step (ms)")
        theory.set(xlabel=f"must move ({unit})")
        theory.margins(x=0.15)
        for axes in (times, theory):
            axes.grid(visible=False, axis="y")
        handles, names = times.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=2)
        told = "; ".join(
            f"{entry.where} on {num_ranks(entry.row.size)}: computing {significant(compute)} ms, exposed communication"
            f" {significant(wait)} ms, must move {_moved_text(entry, scale)} {unit}"
            for entry, compute, wait in zip(entries, computing, exposed, strict=True)
        )
        svg = _svg(figure, ident, f"Strategies on equal work: {told}.")
    caption = (
        "Left, a step's time on the ranks that train, by strategy and number of ranks: computing, and hatched,"
        " exposed communication. Right, the bytes that theory says the busiest rank must move in a step."
    )
    return [Drawing(caption, svg, is_wide=True)]


def _moved_text(entry: Entry, scale: float) -> str:
    if entry.traffic is None:
        return "missing"
    return ("\N{GREATER-THAN OR EQUAL TO} " if entry.traffic.is_least else "") + significant(
        entry.traffic.must_move_bytes / scale
    )


def _byte_unit(most: float) -> tuple[float, str]:
    return next((pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if most >= pair[0]), (1.0, "B"))


def _label_bar(axes: "Axes", place: int, height: float, words: str) -> None:
    axes.annotate(words, (place, height), (0, 3), textcoords="offset points", ha="center", fontsize=8)


def _bars_by_size(axes: "Axes", rows: Sequence[Row], ylabel: str) -> None:
    """One bar a row, named by its ranks."""
    axes.set_xticks(range(len(rows)), [ranks_text(row) for row in rows])
    axes.set_xlim(-0.6, max(len(rows) - 0.4, 1.6))
    axes.margins(y=0.09)
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="ranks", ylabel=ylabel)


@contextmanager
def _figure(width: float = 5, height: float = 3.3, columns: int = 1) -> "Iterator[tuple[Any, ...]]":
    """(figure, axes ...), so many inches in size, in the report's style. No pyplot: nothing global is touched.

    Several columns share their vertical axis.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, *figure.subplots(1, columns, sharey=True, squeeze=False)[0]


def _svg(figure: "Figure", ident: str, description: str) -> Markup:
    """The figure as an <svg> element to stand inside HTML: ids of its own, a title, no outside reference."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": ident}):
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # HTML knows both
    text = re.sub(r'\bid="', f'id="{ident}-', text)
    text = re.sub(r'(xlink:)?href="#', f'href="#{ident}-', text)
    text = text.replace("url(#", f"url(#{ident}-")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, Arial, sans-serif", text)
    head, tail = text.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    told = escape(description)
    return Markup(f'{head} role="img" aria-label="{told}"><title>{told}</title>{tail}')
