"""Plans that runs have followed: by how much plan and run part, in which part, and what that says of a site's plans."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpc_train.analysis.guard import SectionGuard
from hpc_train.analysis.models.predict import DRIFT, Drift
from hpc_train.analysis.runs.load import load_known
from hpc_train.analysis.runs.meta_json import list_at, positive_number
from hpc_train.analysis.scaling.compare import Group, compare
from hpc_train.analysis.scaling.rows import Row
from hpc_train.core.errors import UserError
from hpc_train.core.paths import read_text
from hpc_train.core.statistics import Interval

PLANS = "plan*.json"  # beside the run directories of a job, as `plan --json` and `scale --next` write them
_MOST_BYTES = 1 << 24


@dataclass(frozen=True)
class Part:
    """Seconds of a step, or watts of a node, as planned and as measured."""

    name: str
    planned: float
    measured: float


@dataclass(frozen=True)
class FollowedPlan:
    """A size that a plan foresaw before it was measured."""

    plan: Path
    ranks: int
    planned_s: float
    interval_s: Interval
    measured_s: float
    drift: float  # relative standard deviation that series at large have there
    parts: tuple[Part, ...]  # of the step, as far as plan and run know them
    power: Part | None = None

    @property
    def error(self) -> float:
        """Relative; positive where the run was slower than planned."""
        return self.measured_s / self.planned_s - 1

    @property
    def is_inside(self) -> bool:
        return self.interval_s[0] <= self.measured_s <= self.interval_s[1]


def followed_plans(group: Group) -> list[FollowedPlan]:
    """What the plans beside these runs foresaw of sizes that have been measured since."""
    folders = sorted({run.dir.path.parent for run in group.runs})
    found = []
    for path in [path for folder in folders for path in sorted(folder.glob(PLANS))]:
        tree = _read(path)
        if tree is None or tree.get("job") != json.loads(json.dumps(group.keys)):
            continue
        for row in group.rows:
            options = [each for each in list_at(tree, "options") if isinstance(each, dict)]
            option = next((each for each in options if each.get("ranks") == row.size), None)
            if option is not None and option.get("measured_s") is None and not row.incomplete and row.step_s:
                followed = _followed(path, option, row, row.step_s)
                found += [] if followed is None else [followed]
    return found


def site_drift(folder: Path) -> Drift:
    """The drift of a site's plans: that of published series, updated by what became of all plans below `folder`.

    Raises `UserError` if no run has followed a plan there.
    """
    outcomes: list[FollowedPlan] = []
    for job in sorted({path.parent for path in folder.rglob(PLANS)}):
        known, _ = load_known((job,), SectionGuard())
        for group in compare(known).groups:
            outcomes += followed_plans(group)
    beyond = [each for each in outcomes if each.drift > 0]
    if not beyond:
        raise UserError(
            f"--history {folder}: no run there has followed a plan to a larger size",
            "Keep plans beside the runs of their job: hpc-train plan RUNS --json > RUNS/plan.json",
        )
    return DRIFT.updated([float(np.log(each.measured_s / each.planned_s)) ** 2 / each.drift**2 for each in beyond])


def _read(path: Path) -> dict[str, Any] | None:
    """None for a file that is no plan: one that a shell has just begun, say."""
    try:
        tree = json.loads(read_text(path, "", _MOST_BYTES))
    except (UserError, ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) and tree.get("schema") == 1 else None


def _followed(path: Path, option: dict[str, Any], row: Row, measured_s: float) -> FollowedPlan | None:
    planned_s = positive_number(option.get("step_s"))
    ends = [positive_number(end) for end in list_at(option, "step_interval_s")]
    if planned_s is None or len(ends) != 2 or ends[0] is None or ends[1] is None:
        return None
    drift = positive_number(option.get("drift")) or 0.0
    parts = tuple(_parts(option, row, planned_s, measured_s))
    interval = (ends[0], ends[1])
    return FollowedPlan(path, row.size, planned_s, interval, measured_s, drift, parts, _power(option, row, measured_s))


def _parts(option: dict[str, Any], row: Row, planned_s: float, measured_s: float) -> Sequence[Part]:
    """Computation, input and what is left: communication, and the wait for other ranks."""
    computing_s, input_s = (positive_number(option.get(key)) for key in ("computing_s", "input_s"))
    if computing_s is None or row.exposed_share is None:
        return ()
    waited_s, exposed_s = row.phase_s.get("data", 0.0), row.exposed_s
    return (
        Part("computation", computing_s, measured_s - exposed_s - waited_s),
        Part("input", input_s or 0.0, waited_s),
        Part("communication and waiting", max(planned_s - computing_s - (input_s or 0.0), 0.0), exposed_s),
    )


def _power(option: dict[str, Any], row: Row, measured_s: float) -> Part | None:
    """Watts of all nodes while they train."""
    joules, seconds = (positive_number(option.get(key)) for key in ("energy_j", "time_s"))
    if joules is None or seconds is None or row.joules_per_sample is None:
        return None
    return Part("power", joules / seconds, row.joules_per_sample * row.global_batch / measured_s)
