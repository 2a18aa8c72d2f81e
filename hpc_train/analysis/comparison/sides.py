"""The two sides of a comparison: the repeats below a path, or those that a baseline file holds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from hpc_train.analysis.comparison.run_figures import RunFigures, figures_of
from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.runs.load import Run, load_known
from hpc_train.core.errors import UserError
from hpc_train.core.paths import read_text
from hpc_train.core.rundir import write_atomic

SCHEMA = 1
_MOST_BYTES = 1 << 30
_ONE_KIND = "A side of a comparison is one run, or repeats of one run: name these alone."


class _Baseline(BaseModel):
    """A baseline file."""

    model_config = ConfigDict(extra="forbid")

    hpc_train_baseline: int  # the schema
    runs: list[RunFigures]


@dataclass(frozen=True, eq=False)
class Side:
    """Repeats: runs of one size that agree in configuration, software and hardware."""

    name: str  # as the user named it
    runs: tuple[RunFigures, ...]  # at least one

    @property
    def size(self) -> int:
        return self.runs[0].size


def load_side(path: Path) -> tuple[Side, list[str]]:
    """(the repeats at or below `path`, or in a baseline file; sentences on what was left out). Raises `UserError`."""
    notes: list[str] = []
    if path.suffix == ".json":
        runs = _read_baseline(path)
    elif path.is_file():
        raise UserError(
            f"{path} is a file, and neither a run nor a baseline",
            "Name a run, a folder of repeats, or a baseline (.json) that --save wrote.",
        )
    else:
        loaded, notes = load_known([path], SectionGuard())
        usable = [run for run in loaded if _why_unusable(run) is None]
        notes += [f"Left out: {run.label}: {why}." for run in loaded if (why := _why_unusable(run)) is not None]
        if not usable:
            raise UserError(f"{path} holds nothing to compare: {notes[-1]}", "Name complete runs, with steady steps.")
        runs = [figures_of(run) for run in usable]
    _require_repeats(path, runs)
    return Side(str(path), tuple(runs)), notes


def _why_unusable(run: Run) -> str | None:
    return run.incomplete or (None if len(run.step_s) else "no steady step")


def write_baseline(path: Path, side: Side) -> None:
    """Writes the side's figures into a file that `load_side` reads. Raises `UserError`."""
    baseline = _Baseline(hpc_train_baseline=SCHEMA, runs=list(side.runs))
    write_atomic(path, json.dumps(baseline.model_dump(), indent=1, allow_nan=False) + "\n")


def _read_baseline(path: Path) -> list[RunFigures]:
    remedy = "Write it with hpc-train compare RUNS --save FILE."
    text = read_text(path, remedy, _MOST_BYTES)
    try:
        tree: Any = json.loads(text)
        schema = tree.get("hpc_train_baseline") if isinstance(tree, dict) else None
        if type(schema) is int and schema > SCHEMA:
            raise UserError(
                f"{path} is a baseline of a later hpc-train (schema {schema})", "Use that version, or newer."
            )
        runs = _Baseline.model_validate(tree).runs
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path} is no baseline: {where}: {first['msg']}", remedy) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}", remedy) from None
    if not runs:
        raise UserError(f"{path} is a baseline without runs", remedy)
    return runs


def _require_repeats(path: Path, runs: Sequence[RunFigures]) -> None:
    """Raises `UserError` unless all are repeats of one run: different runs have no common mean."""
    for run in runs[1:]:
        for name, one, other in _differing(runs[0], run):
            raise UserError(f"{path}: its runs are no repeats: {name} is {one} and {other}", _ONE_KIND)


def _differing(one: RunFigures, other: RunFigures) -> list[tuple[str, str, str]]:
    """What keeps two runs from being repeats: (name, value, value). A fact that one did not record does not."""
    pairs = [("ranks", str(one.size), str(other.size))]
    keys = [key for key in dict.fromkeys([*one.settings, *other.settings]) if key != "seed"]
    pairs += [(key, one.settings.get(key, "unset"), other.settings.get(key, "unset")) for key in keys]
    pairs += [(name, value, other.facts[name]) for name, value in one.facts.items() if name in other.facts]
    return [pair for pair in pairs if pair[1] != pair[2]]
