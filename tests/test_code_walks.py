"""docs/explanation/code-walks.md: each step of a walk exists, and a walk crosses few files."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "explanation" / "code-walks.md"
MOST_FILES = {"A gradient": 5, "A sample": 7, "The time of a phase": 8, "A configuration key": 4}
STEP = re.compile(r"^\d+\. `([\w/]+\.py)` `([\w.]+)`", re.MULTILINE)


def walk(title: str) -> list[tuple[str, str]]:
    """(file below hpc_train, name of a function, class or method) of each step."""
    section = PAGE.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    return STEP.findall(section)


def defined(path: Path) -> set[str]:
    """The functions, classes and methods of a file, methods as `Class.method`."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            members = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
            names |= {node.name, *(f"{node.name}.{member}" for member in members)}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
    return names


@pytest.mark.parametrize("title", MOST_FILES)
def test_a_walk_names_what_exists_and_crosses_few_files(title: str) -> None:
    steps = walk(title)
    assert len(steps) > 2
    for file, name in steps:
        assert name in defined(ROOT / "hpc_train" / file), f"{PAGE.name}, {title}: {file} has no {name}"
    assert len({file for file, _ in steps}) <= MOST_FILES[title]
