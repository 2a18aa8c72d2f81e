"""What a figure is, and how it gets onto the page and into files: one painter, two sizes."""

import io
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from hpc_train.core.formatting import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color universal design" (2008): told apart with any colour vision.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"
GREY, PURPLE, WHITE = "#999999", "#CC79A7", "#FFFFFF"

PAGE_WIDTH = 4.4  # inches, as drawn: the page scales it to its column
COLUMN_WIDTH = 3.35  # inches, 85 mm: one column of a proposal in two
_FONTS = {PAGE_WIDTH: 9, COLUMN_WIDTH: 7.5}  # points

_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: a figure is the same on every machine
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
    "pdf.fonttype": 42,  # TrueType, embedded: Type 3 is refused by many a submission system
}
_NO_DATE: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # the same runs give the same bytes


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure before it is drawn. Making one needs no matplotlib; `inline` and `files` do."""

    name: str  # of its files: "speedup"
    caption: str
    told: str  # what it shows, in words, for those who do not see it
    paint: Callable[["Axes"], None]
    height: float = 0.68  # relative to the width

    def __post_init__(self) -> None:
        for name in ("caption", "told"):  # names of jobs and hosts are in them
            object.__setattr__(self, name, plain(getattr(self, name)))


def unmade(name: str, why: str) -> Drawing:
    """What stands in the place of a figure that could not be made: the sentence that says so."""

    def paint(axes: "Axes") -> None:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "\n".join(textwrap.wrap(why, 46)), ha="center", va="center", transform=axes.transAxes)

    return Drawing(name, f"{why}.", f"{why}.", paint, height=0.4)


def inline(drawing: Drawing, ident: str) -> Markup:
    """The drawing as an <svg> element to stand inside HTML: ids of its own, a title, no outside reference."""
    with _painted(drawing, PAGE_WIDTH, {"svg.fonttype": "none", "svg.hashsalt": ident}) as figure:
        text = saved(figure, "svg", transparent=True, metadata=_NO_DATE).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # HTML knows both
    text = re.sub(r'\bid="', f'id="{ident}-', text)
    text = re.sub(r'(xlink:)?href="#', f'href="#{ident}-', text)
    text = text.replace("url(#", f"url(#{ident}-")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, Arial, sans-serif", text)
    head, tail = text.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    told = escape(drawing.told)
    return Markup(f'{head} role="img" aria-label="{told}"><title>{told}</title>{tail}')


def files(drawing: Drawing) -> dict[str, bytes]:
    """The drawing for a proposal, by the ending of the file's name: as wide as a column, with its fonts inside."""
    with _painted(drawing, COLUMN_WIDTH, {"svg.fonttype": "path", "svg.hashsalt": drawing.name}) as figure:
        described = {"Title": drawing.caption, "Subject": drawing.told, "CreationDate": None, "Producer": None}
        pdf = saved(figure, "pdf", metadata=described)
        svg = saved(figure, "svg", metadata=_NO_DATE | {"Title": drawing.caption, "Description": drawing.told})
    told = escape(drawing.told)
    return {"pdf": pdf, "svg": re.sub(rb"(<svg [^>]*>)", rf"\1<title>{told}</title>".encode(), svg, count=1)}


@contextmanager
def _painted(drawing: Drawing, width: float, style: dict[str, Any]) -> "Iterator[Figure]":
    """The figure, `width` inches wide."""
    with styled((width, width * drawing.height), _FONTS[width], style) as figure:
        drawing.paint(figure.subplots())
        yield figure


@contextmanager
def styled(size: tuple[float, float], font: float, style: dict[str, Any]) -> "Iterator[Figure]":
    """An empty figure of `size` inches with letters of `font` points. No pyplot: nothing global is touched."""
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
    """The legend outside the axes, in so many columns."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns)


def label_bar(axes: "Axes", place: float, height: float, words: str) -> None:
    """Words on top of a bar."""
    axes.annotate(words, (place, height), (0, 3), textcoords="offset points", ha="center", fontsize="small")


def thinned(places: list[float], least: float) -> list[int]:
    """Which of ascending `places` to label so that labels are at least `least` apart: the last one always."""
    kept: list[int] = []
    for index in reversed(range(len(places))):
        if not kept or places[kept[-1]] - places[index] >= least:
            kept.append(index)
    return kept[::-1]
