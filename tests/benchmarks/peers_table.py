"""The table of the benchmark: ratios of pairs with their spread, what they must keep, and when nothing can be said."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HEADER = ("what", "result", "required", "met")
MOST_SPREAD = 0.05  # of the baseline: beyond, the machine was busy with something else


@dataclass(frozen=True)
class Line:
    """A row: values of each pair, and the bound that their median must keep; no bound: for information.

    baseline: what the values were divided by or divide, of each pair, in one unit; () where there is none to vary.
    note: why a bound is missed, or what was compared.
    """

    what: str
    values: Sequence[float]
    relation: str = ""
    bound: float | None = None
    baseline: Sequence[float] = ()
    note: str = ""
    is_percent: bool = False

    @property
    def quartiles(self) -> tuple[float, float, float]:
        low, middle, high = np.quantile(self.values, [0.25, 0.5, 0.75])
        return float(low), float(middle), float(high)

    @property
    def spread(self) -> float:
        """Of the baseline: the distance of its quartiles over its median."""
        if not len(self.baseline):
            return 0.0
        low, middle, high = np.quantile(self.baseline, [0.25, 0.5, 0.75])
        return float((high - low) / middle)

    @property
    def is_judged(self) -> bool:
        return self.bound is not None and self.spread <= MOST_SPREAD

    @property
    def is_met(self) -> bool:
        middle = self.quartiles[1]
        if not self.is_judged or self.bound is None:
            return True
        holds = {">": middle > self.bound, ">=": middle >= self.bound, "<": middle < self.bound}
        return holds.get(self.relation, middle <= self.bound)

    def cells(self) -> tuple[str, ...]:
        low, middle, high = map(self._text, self.quartiles)
        spread = f" ({low} to {high})" if len(self.values) > 1 else ""
        required = "" if self.bound is None else f"{self.relation} {self._text(self.bound)}"
        if self.bound is None:
            met = ""
        elif not self.is_judged:
            met = f"not judged: the baseline varies by {self.spread:.0%}"
        elif self.is_met:
            met = "yes"
        else:
            met = f"NO, by {abs(self.quartiles[1] / self.bound - 1):.0%}"
        return self.what, f"{middle}{spread}", required, met

    def _text(self, value: float) -> str:
        return f"{100 * value:.3g}%" if self.is_percent else f"{value:.3g}"


@dataclass(frozen=True)
class Section:
    """Lines that belong together, and notes below the table."""

    title: str
    lines: list[Line]
    notes: list[str] = field(default_factory=list)


def markdown(sections: Sequence[Section], facts: Sequence[str]) -> str:
    """The whole page."""
    rows = [HEADER, ("---",) * len(HEADER), *(line.cells() for section in sections for line in section.lines)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = [f"- {section.title}: {note}" for section in sections for note in section.notes]
    notes += [f"- {line.what}: {line.note}" for section in sections for line in section.lines if line.note]
    return "\n".join(["# This program and its peers on equal work", "", *facts, "", table, "", *notes]).rstrip() + "\n"


def draw(sections: Sequence[Section], path: Path) -> list[Path]:
    """One panel a section: medians with quartiles, the bound as a line. Returns the files, SVG and PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [1 + len(section.lines) for section in sections]
    figure = Figure(figsize=(9, 0.6 + 0.34 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(sections), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for panel, section in zip(panels, sections, strict=True):
        for place, line in enumerate(section.lines):
            low, middle, high = line.quartiles
            colour = "0.6" if line.bound is None or not line.is_judged else "tab:blue" if line.is_met else "tab:red"
            panel.barh(place, middle, 0.6, color=colour)
            panel.hlines(place, low, high, color="black", linewidth=1)
            if line.bound is not None:
                panel.vlines(line.bound, place - 0.4, place + 0.4, color="black", linestyle="--", linewidth=1)
        labels = ["\n".join(textwrap.wrap(line.what, 52)) for line in section.lines]
        panel.set_yticks(range(len(labels)), labels, fontsize=6)
        panel.invert_yaxis()
        panel.set_title(section.title, fontsize=8, loc="left")
        panel.tick_params(axis="x", labelsize=6)
        panel.spines[["top", "right"]].set_visible(False)
    made = [path.with_suffix(kind) for kind in (".svg", ".png")]
    for each in made:
        figure.savefig(each, dpi=150)
    return made
