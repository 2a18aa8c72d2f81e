"""How a plot gets onto the page and into files: one painter, two sizes. Colours, styles and helpers of all plots."""

import io
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any, TypeVar

from markupsafe import Markup

from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.model import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

T = TypeVar("T")

# Okabe and Ito, "Color universal design" (2008): distinct with any colour vision.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"
GREY, PURPLE, WHITE = "#999999", "#CC79A7", "#FFFFFF"
_NUM_SHADES = 15  # of a map: more are not distinguishable, and fewer make a smaller page

# What the page's light and dark modes change: the colours of `_STYLE`, black and white. Data keep theirs.
_MODES = {
    "#000000": "var(--ink)",
    "#222222": "var(--ink)",
    "#444444": "var(--soft)",
    "#555555": "var(--soft)",
    "#e4e4e4": "var(--line)",
    "#ffffff": "var(--paper)",
}

PAGE_WIDTH = 4.4  # inches, as drawn: the page scales it to its column
COLUMN_WIDTH = 3.35  # inches, 85 mm: one column of a proposal in two
_FONTS = {PAGE_WIDTH: 9, COLUMN_WIDTH: 7.5}  # points

_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # shipped with matplotlib: a figure is the same on every machine
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.8,
    "axes.labelcolor": "#222222",
    "axes.labelsize": "medium",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": "medium",
    "axes.formatter.use_mathtext": False,
    "hatch.linewidth": 0.7,
    "pdf.fonttype": 42,  # TrueType, embedded: many submission systems refuse Type 3
}
_NO_DATE: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # so that equal runs give equal bytes


def paint_or_explain(plot: Plot, label: str, guard: SectionGuard, paint: Callable[[Plot], T]) -> T:
    """`paint(plot)`; if that fails, paints the sentence about the failure. label: of the plot's section."""
    what = f"the figure '{plot.id}' of {label}"
    return guard.call(what, lambda why: paint(unmade_plot(plot.id, why)), paint, plot)


def unmade_plot(id: str, why: str) -> Plot:
    """Stands in for a plot that could not be made: the sentence that says so."""
    return Plot(id, f"{why}.", f"{why}.", partial(_paint_sentence, sentence=why), height=0.4)


def _paint_sentence(axes: "Axes", sentence: str) -> None:
    axes.set_axis_off()
    lines = "\n".join(textwrap.wrap(sentence, 46))
    axes.text(0.5, 0.5, lines, ha="center", va="center", transform=axes.transAxes)


def inline_svg(plot: Plot, ident: str) -> Markup:
    """The plot as an <svg> element inside HTML: unique ids, a title, no outside reference."""
    with _painted(plot, PAGE_WIDTH, {"svg.fonttype": "none", "svg.hashsalt": ident}) as figure:
        text = saved(figure, "svg", transparent=True, metadata=_NO_DATE).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # HTML knows both
    text = re.sub(r'\bid="', f'id="{ident}-', text)
    text = re.sub(r'(xlink:)?href="#', f'href="#{ident}-', text)
    text = text.replace("url(#", f"url(#{ident}-")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, Arial, sans-serif", text)
    text = re.sub(r"\b(fill|stroke)(: |=\")(#[0-9a-f]{6})", _by_mode, text)
    head, tail = text.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    title = escape(plot.description)
    return Markup(f'{head} role="img" aria-label="{title}"><title>{title}</title>{tail}')


def _by_mode(found: re.Match[str]) -> str:
    return f"{found[1]}{found[2]}{_MODES.get(found[3], found[3])}"


def figure_files(plot: Plot) -> dict[str, bytes]:
    """The plot for a proposal, by file ending: one column wide, fonts embedded."""
    with _painted(plot, COLUMN_WIDTH, {"svg.fonttype": "path", "svg.hashsalt": plot.id}) as figure:
        metadata = {"Title": plot.caption, "Subject": plot.description, "CreationDate": None, "Producer": None}
        pdf = saved(figure, "pdf", metadata=metadata)
        svg = saved(figure, "svg", metadata=_NO_DATE | {"Title": plot.caption, "Description": plot.description})
    title = escape(plot.description)
    return {"pdf": pdf, "svg": re.sub(rb"(<svg [^>]*>)", rf"\1<title>{title}</title>".encode(), svg, count=1)}


@contextmanager
def _painted(plot: Plot, width: float, style: dict[str, Any]) -> "Iterator[Figure]":
    """The figure, `width` inches wide."""
    with styled((width, width * plot.height), _FONTS[width], style) as figure:
        plot.paint(figure.subplots())
        yield figure


@contextmanager
def styled(size: tuple[float, float], font: float, style: dict[str, Any]) -> "Iterator[Figure]":
    """An empty figure of `size` inches with text of `font` points. No pyplot: nothing global is touched."""
    import matplotlib
    from matplotlib.figure import Figure

    rules: Any = {**_STYLE, "font.size": font, **style}
    with matplotlib.rc_context(rules):
        yield Figure(figsize=size, layout="constrained")


def saved(figure: "Figure", kind: str, **how: Any) -> bytes:
    """The figure as the content of a file: "svg", "pdf" or "png"."""
    file = io.BytesIO()
    figure.savefig(file, format=kind, **how)
    return file.getvalue()


def legend_above(axes: "Axes", columns: int) -> None:
    """The legend outside the axes, in `columns` columns."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns)


def label_bar(axes: "Axes", place: float, height: float, text: str) -> None:
    """Text on top of a bar."""
    axes.annotate(text, (place, height), (0, 3), textcoords="offset points", ha="center", fontsize="small")


def diverging() -> "Colormap":
    """From blue over nothing to vermillion: in the middle the paper shows, white or dark."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    stops = [(0.0, to_rgba(BLUE)), (0.5, to_rgba(BLUE, 0)), (0.5, to_rgba(VERMILLION, 0)), (1.0, to_rgba(VERMILLION))]
    return LinearSegmentedColormap.from_list("late", stops, N=_NUM_SHADES)


def sequential() -> "Colormap":
    """From nothing, where the paper shows, to blue."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    return LinearSegmentedColormap.from_list("more", [to_rgba(BLUE, 0), to_rgba(BLUE)], N=_NUM_SHADES)


def thinned(places: list[float], least: float) -> list[int]:
    """Which of ascending `places` to label so that labels are at least `least` apart: the last one always."""
    kept: list[int] = []
    for index in reversed(range(len(places))):
        if not kept or places[kept[-1]] - places[index] >= least:
            kept.append(index)
    return kept[::-1]
