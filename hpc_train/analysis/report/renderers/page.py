"""report.html: one file with everything inside it; figures as inline SVG, no script, nothing fetched."""

import re
from collections.abc import Sequence
from functools import partial

import jinja2
from markupsafe import Markup, escape

import hpc_train
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.model import Part, Plot, Report, Section
from hpc_train.analysis.report.plots.canvas import inline_svg, paint_or_explain
from hpc_train.core.formatting import plain

_MOST_LEADING = 4  # figures that a page shows unfolded
_MOST_WHOLE, _FEW = 3, 4  # groups that show all of their figures; figures of each group if there are more groups

Figure = tuple[str, Markup]  # caption, SVG


def render_page(report: Report) -> str:
    """The page as HTML. The template escapes all text from the runs, and `inline_svg` that inside figures."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hpc_train.analysis.report.renderers", ""),
        autoescape=True,
        finalize=lambda value: plain(value) if type(value) is str else value,  # Markup is of another type
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    is_brief = sum(section.kind == "group" for section in report.sections) > _MOST_WHOLE
    first = next((section for section in report.sections if section.numbers), None)
    leading = _leading(first) if first else []
    cautions = [note for section in report.sections for note in section.notes if note.kind == "caution"]
    return environment.get_template("report.html.jinja").render(
        report=report,
        version=hpc_train.__version__,
        first=first,
        leading=_figures(leading, "lead", first.label if first else "", report.guard),
        sections=[
            (section, _parts(section, f"p{index}", leading, _FEW if is_brief else None, report.guard))
            for index, section in enumerate(report.sections)
        ],
        num_cautions=len(cautions) + len(report.notes),
        several=len(report.sections) > 1,
        is_brief=is_brief,
        tables=report.table_ids,
    )


def _unbroken(text: str) -> Markup:
    """The text, escaped, whose intervals ("1.97-2.01") stay on one line."""
    return Markup(re.sub(r"\b\d[\d.]*-\d[\d.]*\b", r'<span class="whole">\g<0></span>', str(escape(plain(text)))))


def _leading(section: Section) -> list[Plot]:
    plots = {plot.id: plot for plot in section.plots}
    return [plots[id] for id in section.leading if id in plots][:_MOST_LEADING]


def _parts(
    section: Section, ident: str, leading: Sequence[Plot], most: int | None, guard: SectionGuard
) -> list[tuple[Part, list[Figure]]]:
    """Each part with its figures: without those that lead the page, and `most` of the section's; None: all."""
    drawn = [plot for plot in section.plots if plot not in leading][:most]
    return [
        (part, _figures([plot for plot in part.plots if plot in drawn], f"{ident}-{number}", section.label, guard))
        for number, part in enumerate(section.parts)
    ]


def _figures(plots: Sequence[Plot], ident: str, label: str, guard: SectionGuard) -> list[Figure]:
    return [
        paint_or_explain(plot, label, guard, partial(_captioned, f"{ident}-{number}"))
        for number, plot in enumerate(plots)
    ]


def _captioned(ident: str, plot: Plot) -> Figure:
    return plot.caption, inline_svg(plot, ident)
