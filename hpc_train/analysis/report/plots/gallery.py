"""All figures of a report: in the page's order, and as files for a proposal."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hpc_train.analysis.convergence.target import TargetStudy
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.report.plots.balance import map_drawing, tree_drawing
from hpc_train.analysis.report.plots.canvas import Drawing, files, unmade
from hpc_train.analysis.report.plots.energy import energy_drawings
from hpc_train.analysis.report.plots.forecast import forecast_drawing
from hpc_train.analysis.report.plots.speed import speedup_drawing
from hpc_train.analysis.report.plots.steps import loss_drawing, time_drawings
from hpc_train.analysis.report.plots.strategies import strategy_drawings
from hpc_train.analysis.report.plots.target import target_drawing
from hpc_train.analysis.report.sections import Part
from hpc_train.analysis.scaling.strategies import Comparison
from hpc_train.core import rundir
from hpc_train.core.errors import UserError

if TYPE_CHECKING:
    from hpc_train.analysis.report.report import Report

T = TypeVar("T")
_LONGEST = 60  # letters of a group's label in a file's name


def drawings(part: Part, guard: SectionGuard | None = None) -> list[Drawing]:
    """A part's figures; one that would show nothing is left out, one that cannot be made says so in its place."""
    found, guard = [], guard or SectionGuard()
    for name, make in _makers(part).items():
        what = f"the figure '{name}' of {part.label}"
        found += guard.call(what, partial(_unmade, name), make)
    return found


def painted(drawing: Drawing, part: Part, guard: SectionGuard, paint: Callable[[Drawing], T]) -> T:
    """`paint` of the drawing; where that fails, of the sentence that says so."""
    what = f"the figure '{drawing.name}' of {part.label}"
    return guard.call(what, lambda why: paint(unmade(drawing.name, why)), paint, drawing)


def _unmade(name: str, why: str) -> list[Drawing]:
    return [unmade(name, why)]


def _makers(part: Part) -> dict[str, Callable[[], list[Drawing]]]:
    """By name, in the page's order."""
    of, cost, study, advice = part.of, part.cost, part.study, part.advice
    if isinstance(of, Comparison):
        return {"strategies": lambda: strategy_drawings(of)}
    if isinstance(of, TargetStudy):
        return {"target": lambda: _known(target_drawing(of))}
    plan = advice.plan if advice else None
    return {
        "speedup": lambda: _known(speedup_drawing(of)),
        "time-per-step": lambda: time_drawings(of),
        "efficiencies": lambda: _known(tree_drawing(of)),
        "lateness": lambda: _known(map_drawing(of)),
        "energy": lambda: energy_drawings(cost) if cost else [],
        "forecast": lambda: _known(forecast_drawing(plan, advice.words) if advice and plan else None),
        "training-loss": lambda: _known(loss_drawing(of)),
        "target": lambda: _known(target_drawing(study) if study else None),
    }


def _known(*made: Drawing | None) -> list[Drawing]:
    return [drawing for drawing in made if drawing is not None]


def write_figures(report: "Report", folder: Path) -> list[Path]:
    """Writes each figure as PDF and SVG, one column wide, and captions.md with their words; returns the figures' paths.

    The names say the job and what is shown: softmax-mnist-speedup.pdf. Raises `UserError`.
    """
    contents: dict[str, bytes] = {}
    captions = []
    for prefix, part in zip(prefixes(report.parts), report.parts, strict=True):
        for drawing in drawings(part, report.guard):
            name = f"{prefix}-{drawing.name}"
            drawn, words = painted(drawing, part, report.guard, _with_words)
            contents |= {f"{name}.{ending}": content for ending, content in drawn.items()}
            captions.append(f"**{name}**: {words}\n")
    if not contents:
        return []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            rundir.write_atomic(folder / file, content)
        rundir.write_atomic(folder / "captions.md", "\n".join(captions))
    except OSError as error:
        raise UserError(
            f"the figures cannot be written to {folder}: {error.strerror}",
            "Name a folder that you may write: --figures DIR",
        ) from None
    return [folder / file for file in contents]


def _with_words(drawing: Drawing) -> tuple[dict[str, bytes], str]:
    return files(drawing), f"{drawing.caption}\n\n> {drawing.told}"


def prefixes(parts: list[Part]) -> list[str]:
    """A file name's beginning for each part: its label in small letters, digits and hyphens, none twice."""
    made: list[str] = []
    for part in parts:
        plain = re.sub(r"[^a-z0-9]+", "-", part.label.lower())[:_LONGEST].strip("-") or "job"
        twins = sum(each == plain or each.startswith(f"{plain}--") for each in made)
        made.append(f"{plain}--{twins + 1}" if twins else plain)
    return made
