"""report.html: one file with everything inside it; figures as inline SVG, no script, nothing fetched."""

from functools import partial
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

import hpc_train
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.plots.canvas import Drawing, inline
from hpc_train.analysis.report.plots.gallery import drawings, painted
from hpc_train.analysis.report.run_metadata import run_facts
from hpc_train.analysis.report.sections import Part
from hpc_train.analysis.runs.meta_json import text_at
from hpc_train.analysis.scaling.mfu import counts_flops
from hpc_train.core.formatting import plain

if TYPE_CHECKING:
    from hpc_train.analysis.report.report import Report

_MOST_WHOLE, _FEW = 3, 4  # groups with all of their figures; figures of each where there are more groups


def render(report: "Report") -> str:
    """The page as HTML. Everything from the runs is escaped by the template, and by `inline` inside figures."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hpc_train.analysis.report", ""),
        autoescape=True,
        finalize=lambda value: plain(value) if type(value) is str else value,  # what comes ready is Markup
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs, groups, guard = report.runs, report.scaling.groups, report.guard
    facts = [guard.call(f"the facts of {run.label}", lambda why: [("missing", why)], run_facts, run) for run in runs]
    common = set(facts[0]).intersection(*facts)
    assumptions = {run.assumption for run in runs if run.summary.energy_quality == "estimated"}
    parts = report.parts
    brief = len(groups) > _MOST_WHOLE
    return environment.get_template("report.html.jinja").render(
        headlines=report.headlines,
        several=len(parts) > 1,
        version=hpc_train.__version__,
        parts=[(part, _figures(part, f"p{index}", brief, guard)) for index, part in enumerate(parts)],
        brief=brief,
        notes=report.scaling.notes,
        with_strategies=bool(report.strategies),
        with_ranks=any(row.pop.factors and row.size > 1 for group in groups for row in group.rows),
        with_plan=any(part.advice is not None and part.advice.plan is not None for part in parts),
        with_flops=any(map(counts_flops, groups)),
        assumptions=sorted(filter(None, assumptions)),
        shared=[fact for fact in facts[0] if fact in common],
        runs=[
            (run.label, [fact for fact in some if fact not in common]) for run, some in zip(runs, facts, strict=True)
        ],
        names=list(dict.fromkeys(run.summary.name for run in runs)),
        dates=sorted({(text_at(run.meta, "started") or "")[:10] for run in runs} - {""}),
    )


def _figures(part: Part, ident: str, brief: bool, guard: SectionGuard) -> list[tuple[str, Markup]]:
    """(caption, SVG) of a part's figures; brief: the first few of them."""
    made = drawings(part, guard)[: _FEW if brief else None]
    return [
        painted(drawing, part, guard, partial(_captioned, f"{ident}-{number}")) for number, drawing in enumerate(made)
    ]


def _captioned(ident: str, drawing: Drawing) -> tuple[str, Markup]:
    return drawing.caption, inline(drawing, ident)
