"""Sphinx: `make docs` builds these pages offline, with warnings as errors."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

project = "hpc-train"
author = "the authors of hpc-train"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
exclude_patterns = ["_build", "_figures"]
html_theme = "furo"
html_title = "hpc-train"
html_copy_source = False
myst_heading_anchors = 3
os.environ["MPI4PY_RC_INITIALIZE"] = "0"  # reading docstrings imports the package, and must not start MPI
autodoc_typehints = "description"


def draw_figures() -> None:
    """The figures that reference/figures.md shows, from runs that are part of the repository."""
    folder = HERE / "_figures"
    command = [sys.executable, "-m", "hpc_train", "report", "tests/runs/mlp-mnist"]
    command += ["--output", str(folder / "report"), "--figures", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    subprocess.run(command, cwd=HERE.parent, env=environment, check=True, stdout=subprocess.DEVNULL)
    captions = (folder / "captions.md").read_text()
    pictures = [f"![{path.stem}](../_figures/{path.name})" for path in sorted(folder.glob("*.svg"))]
    (folder / "gallery.md").write_text("\n\n".join([*pictures, captions]))


def list_columns() -> None:
    """The table of reference/report-columns.md, from the same quantities as the files that it describes."""
    from hpc_train.analysis.report.sections.quantities import FAMILIES, JSON_FAMILIES

    lines = []
    for family, quantities in (FAMILIES | JSON_FAMILIES).items():
        lines += [f"\n## {family}\n", "| column | unit | meaning |", "|---|---|---|"]
        lines += [f"| `{each.name}` | {each.unit} | {each.meaning} |" for each in quantities]
    (HERE / "_figures" / "columns.md").write_text("\n".join(lines) + "\n")


draw_figures()
list_columns()
