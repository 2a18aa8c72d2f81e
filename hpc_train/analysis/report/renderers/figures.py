"""Every figure as PDF and SVG, for a proposal."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpc_train.analysis.report.model import Plot, Report
from hpc_train.analysis.report.plots.canvas import figure_files, paint_or_explain
from hpc_train.core import rundir
from hpc_train.core.errors import UserError

_LONGEST = 60  # letters of a section's label in a file's name


def write_figures(report: Report, folder: Path) -> list[Path]:
    """Writes each figure as PDF and SVG, one column wide, and captions.md; returns the figures' paths.

    File names state the job and the figure: softmax-mnist-speedup.pdf. Raises `UserError`.
    """
    contents: dict[str, bytes] = {}
    captions = []
    for name, label, plot in _named_plots(report):
        files, caption = paint_or_explain(plot, label, report.guard, _with_caption)
        contents |= {f"{name}.{ending}": content for ending, content in files.items()}
        captions.append(f"**{name}**: {caption}\n")
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


def _named_plots(report: Report) -> Iterator[tuple[str, str, Plot]]:
    """(file name without ending, section's label, plot)"""
    prefixes = unique_prefixes([section.label for section in report.sections])
    for prefix, section in zip(prefixes, report.sections, strict=True):
        for plot in section.plots:
            yield f"{prefix}-{plot.id}", section.label, plot


def _with_caption(plot: Plot) -> tuple[dict[str, bytes], str]:
    return figure_files(plot), f"{plot.caption}\n\n> {plot.description}"


def unique_prefixes(labels: Sequence[str]) -> list[str]:
    """For each label the beginning of a file name: small letters, digits and hyphens, none twice."""
    prefixes: list[str] = []
    for label in labels:
        prefix = re.sub(r"[^a-z0-9]+", "-", label.lower())[:_LONGEST].strip("-") or "job"
        num_equal = sum(each == prefix or each.startswith(f"{prefix}--") for each in prefixes)
        prefixes.append(f"{prefix}--{num_equal + 1}" if num_equal else prefix)
    return prefixes
