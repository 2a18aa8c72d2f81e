"""report.html: one file with everything inside it; figures as inline SVG, no script, nothing fetched."""

from functools import partial

import jinja2
from markupsafe import Markup

import hpc_train
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.model import Plot, Report, Section
from hpc_train.analysis.report.plots.canvas import inline_svg, paint_or_explain
from hpc_train.core.formatting import plain

_MOST_WHOLE, _FEW = 3, 4  # groups that show all of their figures; figures of each group if there are more groups


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
    is_brief = sum(section.kind == "group" for section in report.sections) > _MOST_WHOLE
    most = _FEW if is_brief else None
    figures = [_figures(section, f"p{index}", most, report.guard) for index, section in enumerate(report.sections)]
    return environment.get_template("report.html.jinja").render(
        report=report,
        version=hpc_train.__version__,
        sections=list(zip(report.sections, figures, strict=True)),
        several=len(report.sections) > 1,
        is_brief=is_brief,
        tables=report.table_ids,
    )


def _figures(section: Section, ident: str, most: int | None, guard: SectionGuard) -> list[tuple[str, Markup]]:
    """(caption, SVG) of the first `most` plots; None: of all."""
    return [
        paint_or_explain(plot, section.label, guard, partial(_captioned, f"{ident}-{number}"))
        for number, plot in enumerate(section.plots[:most])
    ]


def _captioned(ident: str, plot: Plot) -> tuple[str, Markup]:
    return plot.caption, inline_svg(plot, ident)
