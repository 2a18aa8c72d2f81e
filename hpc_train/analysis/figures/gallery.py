"""All figures of a report: in the page's order, and as files for a proposal."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_train import rundir
from hpc_train.analysis.figures.balance import map_drawing, tree_drawing
from hpc_train.analysis.figures.canvas import Drawing, files
from hpc_train.analysis.figures.energy import energy_drawings
from hpc_train.analysis.figures.forecast import forecast_drawing
from hpc_train.analysis.figures.speed import speedup_drawing
from hpc_train.analysis.figures.steps import loss_drawing, time_drawings
from hpc_train.analysis.figures.strategies import strategy_drawings
from hpc_train.analysis.figures.target import target_drawing
from hpc_train.analysis.parts import Part
from hpc_train.analysis.strategies import Comparison
from hpc_train.analysis.target import TargetStudy
from hpc_train.errors import UserError

if TYPE_CHECKING:
    from hpc_train.analysis.report import Report

_LONGEST = 60  # letters of a group's label in a file's name


def drawings(part: Part) -> list[Drawing]:
    """A part's figures; one that would show nothing is left out."""
    if isinstance(part.of, Comparison):
        return strategy_drawings(part.of)
    if isinstance(part.of, TargetStudy):
        return _known(target_drawing(part.of))
    group = part.of
    return [
        *_known(speedup_drawing(group)),
        *time_drawings(group),
        *_known(tree_drawing(group), map_drawing(group)),
        *(energy_drawings(part.cost) if part.cost else []),
        *_known(forecast_drawing(part.advice.plan, part.advice.words) if part.advice and part.advice.plan else None),
        *_known(loss_drawing(group), target_drawing(part.study) if part.study else None),
    ]


def _known(*made: Drawing | None) -> list[Drawing]:
    return [drawing for drawing in made if drawing is not None]


def write_figures(report: "Report", folder: Path) -> list[Path]:
    """Writes each figure as PDF and SVG, one column wide, and captions.md with their words; returns the figures' paths.

    The names say the job and what is shown: softmax-mnist-speedup.pdf. Raises `UserError`.
    """
    contents: dict[str, bytes] = {}
    captions = []
    for prefix, part in zip(prefixes(report.parts), report.parts, strict=True):
        for drawing in drawings(part):
            name = f"{prefix}-{drawing.name}"
            contents |= {f"{name}.{ending}": content for ending, content in files(drawing).items()}
            captions.append(f"**{name}**: {drawing.caption}\n\n> {drawing.told}\n")
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


def prefixes(parts: list[Part]) -> list[str]:
    """A file name's beginning for each part: its label in small letters, digits and hyphens, none twice."""
    made: list[str] = []
    for part in parts:
        plain = re.sub(r"[^a-z0-9]+", "-", part.label.lower())[:_LONGEST].strip("-") or "job"
        twins = sum(each == plain or each.startswith(f"{plain}--") for each in made)
        made.append(f"{plain}--{twins + 1}" if twins else plain)
    return made
