"""report.html: one file with everything inside it; figures as inline SVG, no script, nothing fetched."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

import hpc_train
from hpc_train.analysis.load import Run
from hpc_train.analysis.scaling import Group, Row, Scaling, num_ranks
from hpc_train.analysis.sheets import MARK, energy_text, group_notes, headlines, percent, run_facts, sheets, significant
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


def render(runs: Sequence[Run], scaling: Scaling) -> str:
    """The page as HTML. Everything from the runs is escaped by the template, and by `_svg` inside figures."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hpc_train.analysis", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    groups = scaling.groups
    facts = [run_facts(run) for run in runs]
    common = set(facts[0]).intersection(*facts)
    assumptions = {run.assumption for run in runs if run.summary.energy_quality == "estimated"}
    return environment.get_template("report.html.jinja").render(
        headlines=headlines(scaling),
        several=len(groups) > 1,
        version=hpc_train.__version__,
        groups=[
            {
                "label": group.label,
                "sheets": sheets(group),
                "notes": group_notes(group),
                "drawings": drawings(group, f"g{index}"),
            }
            for index, group in enumerate(groups)
        ],
        notes=scaling.notes,
        assumptions=sorted(filter(None, assumptions)),
        shared=[fact for fact in facts[0] if fact in common],
        runs=[
            (run.label, [fact for fact in some if fact not in common]) for run, some in zip(runs, facts, strict=True)
        ],
        names=list(dict.fromkeys(run.summary.name for run in runs)),
        dates=sorted({str(run.meta.get("started", ""))[:10] for run in runs} - {""}),
    )


def drawings(group: Group, ident: str) -> list[Drawing]:
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


def _tick(row: Row) -> str:
    return f"{row.size}{MARK}" if row.incomplete else str(row.size)


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
        "Where a step's time goes: mean over ranks and steady steps (the tables' step time is the median of"
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


def _label_bar(axes: "Axes", place: int, height: float, words: str) -> None:
    axes.annotate(words, (place, height), (0, 3), textcoords="offset points", ha="center", fontsize=8)


def _bars_by_size(axes: "Axes", rows: Sequence[Row], ylabel: str) -> None:
    """One bar a row, named by its ranks."""
    axes.set_xticks(range(len(rows)), [_tick(row) for row in rows])
    axes.set_xlim(-0.6, max(len(rows) - 0.4, 1.6))
    axes.margins(y=0.09)
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="ranks", ylabel=ylabel)


@contextmanager
def _figure() -> "Iterator[tuple[Figure, Axes]]":
    """An empty figure of 5 x 3.3 inches in the report's style. No pyplot: nothing global is touched."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5, 3.3), layout="constrained")
        yield figure, figure.add_subplot()


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
