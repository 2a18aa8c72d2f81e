"""What differs between the sides in configuration, software and hardware."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hpc_train.analysis.comparison.run_figures import RunFigures

DifferenceKind = Literal["configuration", "software", "hardware"]
_HARDWARE = ("CPU", "device", "hosts", "threads per rank")  # facts (`runs/repeats.py`); ranks and nodes are found here
_WORK = ("hosts", "training samples", "parameters")  # of the facts, those that decide how much work a step is
_CONFIGURATION = ("steps", "training samples", "parameters", "precision")
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Difference:
    kind: DifferenceKind
    name: str
    before: str  # "a or b" if repeats differ
    after: str


def differences(before: Sequence[RunFigures], after: Sequence[RunFigures]) -> list[Difference]:
    """Configuration first. What a side did not record is no difference; a variable that it did not record was unset."""
    sides = (before, after)
    found = [Difference("configuration", *each) for each in _apart([[run.settings for run in side] for side in sides])]
    facts = [[_with_unset(run.facts, [*before, *after]) for run in side] for side in sides]
    found += [Difference(_kind(each[0]), *each) for each in _apart(facts) if _UNKNOWN not in each]
    found += [Difference("hardware", *each) for each in _apart([[_layout(run) for run in side] for side in sides])]
    return sorted(found, key=lambda each: ("configuration", "software", "hardware").index(each.kind))


def differences_of_work(before: Sequence[RunFigures], after: Sequence[RunFigures]) -> list[tuple[str, str, str]]:
    """(name, before, after) of what makes the sides different jobs: their size, batch, model or data.

    All else, such as a commit, a library or another setting, is a change that a comparison judges.
    """
    told = [[_work(run) for run in side] for side in (before, after)]
    return [each for each in _apart(told) if _UNKNOWN not in each]


def _work(run: RunFigures) -> dict[str, str]:
    task = {key: run.settings[key] for key in run.settings if key.startswith("task.") or key == "rl.environment"}
    facts = {name: run.facts[name] for name in _WORK if name in run.facts}
    return {"ranks": str(run.size), "global batch": str(run.global_batch), **task, **facts}


def _kind(name: str) -> DifferenceKind:
    if name in _CONFIGURATION or name.startswith(("checkpoint.", "energy.")):
        return "configuration"
    return "hardware" if name in _HARDWARE else "software"


def _layout(run: RunFigures) -> dict[str, str]:
    return {"ranks": str(run.size), "nodes": ", ".join(run.host_names)}


def _with_unset(facts: dict[str, str], runs: Sequence[RunFigures]) -> dict[str, str]:
    """The facts, with the variables of the environment that only others had set."""
    variables = {name: "not set" for run in runs for name in run.facts if name.startswith("environment ")}
    return {**variables, **facts} if any(name.startswith("environment ") for name in facts) else facts


def _apart(sides: Sequence[Sequence[dict[str, str]]]) -> list[tuple[str, str, str]]:
    """(name, before, after) of each name whose values are not the same."""
    names = dict.fromkeys(name for side in sides for values in side for name in values)
    pairs = [(name, *(_values(side, name) for side in sides)) for name in names]
    return [(name, before, after) for name, before, after in pairs if before != after]


def _values(side: Sequence[dict[str, str]], name: str) -> str:
    return " or ".join(sorted({values.get(name, _UNKNOWN) for values in side}))
