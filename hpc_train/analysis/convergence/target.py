"""Time and energy to a target loss: larger batches are faster per sample, and need more samples."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from hpc_train.analysis.energy.energy_amount import NONE, EnergyAmount
from hpc_train.analysis.energy.run_energy import RunEnergy
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import attempts, positive_number
from hpc_train.analysis.runs.step_timeline import timeline_of
from hpc_train.analysis.scaling.compare import Group
from hpc_train.analysis.scaling.labels import labels
from hpc_train.analysis.stats.estimate import Estimate, of_series, of_value, over_runs, ratio
from hpc_train.core.records import FloatArray, IntArray
from hpc_train.core.statistics import Interval

# Keys that change how fast the loss falls, not what it means: runs that differ in these alone have the same target.
TUNING = (
    *("train.global_batch", "train.batch_per_rank", "train.accumulate"),
    *("train.optimizer", "train.lr", "train.lr_reference_batch", "train.lr_warmup_steps", "train.schedule"),
    *("train.lr_milestones", "train.lr_decay", "train.momentum", "train.betas", "train.weight_decay"),
    "train.clip_norm",
)
NO_PROGRESS = ("policy_gradient", "dqn")  # task.kind whose loss does not fall as the policy improves
_LEAST_WINDOW, _MOST_WINDOW = 9, 1001
NOT_REACHED = "not reached"


@dataclass(frozen=True, eq=False)
class Reach:
    """What one run took until the end of the step that reached the target, warm-up included."""

    run: Run
    why: str = ""  # why it has no figures: NOT_REACHED, or what is unknown
    num_steps: int | None = None
    num_samples: float | None = None
    epochs: float | None = None
    seconds: float | None = None  # of the attempts' loops, without the time between attempts
    joules: EnergyAmount = NONE
    at_once: bool = False  # the first smoothed loss was at the target already


@dataclass(frozen=True, eq=False)
class TargetRow:
    """Runs of one size and one tuning. Figures are means over its runs, if all of them reached the target."""

    size: int
    incomplete: bool
    tuning: dict[str, Any]  # the keys of TUNING
    reaches: tuple[Reach, ...]
    relative_speed: Estimate | None = None  # by time to target, relative to the study's reference; None of itself, too
    throughput: float | None = None  # speedup by samples per second
    statistical: float | None = None  # samples that the reference took over samples that this row took
    reference_size: int = 1
    is_reference: bool = False

    @property
    def speedup(self) -> float | None:
        if self.is_reference:
            return 1.0
        return None if self.relative_speed is None else self.relative_speed.value

    @property
    def speedup_interval(self) -> Interval | None:
        """95%; None without repeats, since one run has one time to target."""
        return None if self.relative_speed is None else self.relative_speed.interval

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(reach.run for reach in self.reaches)

    @property
    def global_batch(self) -> int:
        return self.reaches[0].run.summary.global_batch

    @property
    def num_reached(self) -> int:
        return sum(reach.seconds is not None for reach in self.reaches)

    @property
    def reached(self) -> bool:
        return self.num_reached == len(self.reaches)

    @property
    def num_steps(self) -> float | None:
        return _mean_of_all([reach.num_steps for reach in self.reaches])

    @property
    def num_samples(self) -> float | None:
        return _mean_of_all([reach.num_samples for reach in self.reaches])

    @property
    def epochs(self) -> float | None:
        return _mean_of_all([reach.epochs for reach in self.reaches])

    @property
    def seconds(self) -> float | None:
        """The geometric mean, since speedups are ratios of it."""
        return over_runs(_seconds(self)).value if self.reached else None

    @property
    def joules(self) -> EnergyAmount | None:
        """The mean; None if the target was not reached."""
        parts = [reach.joules for reach in self.reaches]
        return sum(parts, NONE) * (1 / len(parts)) if self.reached else None

    @property
    def efficiency(self) -> float | None:
        return self._per_rank(self.speedup)

    @property
    def throughput_efficiency(self) -> float | None:
        return self._per_rank(self.throughput)

    @property
    def samples_per_s(self) -> float | None:
        """Global batch over the mean steady step; of several runs the geometric mean."""
        timed = [reach.run.step_s for reach in self.reaches if reach.run.step_s.any()]
        return self.global_batch / over_runs([of_series(each) for each in timed]).value if timed else None

    def _per_rank(self, speedup: float | None) -> float | None:
        return None if speedup is None else speedup * self.reference_size / self.size


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    """The mean; None if any value is unknown."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


@dataclass(frozen=True, eq=False)
class TargetStudy:
    """Groups of one job that may differ in TUNING, all compared by the time to the same loss."""

    label: str
    target: float
    set_by: TargetRow | None  # the row whose best loss the target is; None if it was given
    rows: tuple[TargetRow, ...]  # by size, then by batch
    reference: TargetRow | None  # the first complete row that reached it
    num_groups: int

    @property
    def runs(self) -> list[Run]:
        return [run for row in self.rows for run in row.runs]

    @property
    def largest(self) -> TargetRow | None:
        """The largest complete row with a speedup; of one size the fastest."""
        known = [row for row in self.rows if row.speedup and not row.incomplete and row is not self.reference]
        return max(known, key=lambda row: (row.size, row.speedup or 0.0), default=None)

    def is_of(self, group: Group) -> bool:
        """Whether its runs are exactly this group's."""
        return set(self.runs) == set(group.runs)


def window(num_values: int) -> int:
    """The number of logged losses in a median: 9, or 1/50 of all if that is more; at most a third of all, odd."""
    wanted = min(max(_LEAST_WINDOW, num_values // 50), _MOST_WINDOW, max(1, num_values // 3))
    return wanted if wanted % 2 else wanted - 1


def smoothed(run: Run) -> tuple[IntArray, FloatArray]:
    """(steps, losses): the running median of the logged losses, at each step with a whole window around it.

    Centred: a trailing median lags, by more steps the fewer were logged. A loss that is not finite counts as infinite.
    """
    steps, losses = np.array(run.metrics[0], np.int64), np.array(run.metrics[1], float)
    if not len(losses):
        return steps, losses
    width = window(len(losses))
    losses = np.where(np.isfinite(losses), losses, np.inf)
    medians = np.median(np.lib.stride_tricks.sliding_window_view(losses, width), axis=1)
    return steps[width // 2 : width // 2 + len(medians)], medians


def studies_of(
    groups: Sequence[Group], energies: Mapping[Path, RunEnergy], target: float | None = None
) -> list[TargetStudy]:
    """One study of all groups that differ in TUNING alone; energies: by run directory.

    The default target is the worst of the runs' best smoothed losses, which every complete run has reached. Without a
    given target there is no study of a single row, nor of tasks whose loss does not measure progress.
    """
    by_task: dict[tuple[str, int], list[Group]] = defaultdict(list)
    for group in groups:
        by_task[json.dumps(_fixed_keys(group), sort_keys=True), group.series].append(group)
    families = list(by_task.values())
    runs = [[run for group in family for run in group.runs] for family in families]
    names = labels(runs, [_fixed_keys(family[0]) for family in families])
    studies = []
    for name, members, family in zip(names, runs, families, strict=True):
        rows = _rows_by_tuning(members)
        goal = _Goal(target, None) if target is not None else _common_goal(members, num_rows=len(rows))
        if goal is not None:
            studies.append(_study(name, rows, goal, energies, len(family)))
    return sorted(studies, key=lambda study: (study.largest is None, study.label))  # those with a speedup first


def _fixed_keys(group: Group) -> dict[str, Any]:
    return {key: value for key, value in group.keys.items() if key not in TUNING}


@dataclass(frozen=True, eq=False)
class _Goal:
    loss: float
    set_by: Run | None  # None: it was given


def _common_goal(runs: Sequence[Run], num_rows: int) -> _Goal | None:
    """The worst of the complete runs' best smoothed losses; None if there is nothing to compare."""
    if num_rows < 2 or runs[0].config.task.kind in NO_PROGRESS:
        return None
    best = {run: float(smoothed(run)[1].min(initial=np.inf)) for run in runs if run.incomplete is None}
    known = [run for run, loss in best.items() if isfinite(loss)]
    if not known:
        return None
    worst = max(known, key=lambda run: best[run])
    return _Goal(best[worst], worst)


RowKey = tuple[int, int, bool, str]  # size, global batch, incomplete, tuning as JSON: rows sort by it


def _rows_by_tuning(runs: Sequence[Run]) -> dict[RowKey, list[Run]]:
    rows: dict[RowKey, list[Run]] = defaultdict(list)
    for run in runs:
        tuning = json.dumps(_tuning(run), sort_keys=True)
        rows[run.size, run.summary.global_batch, run.incomplete is not None, tuning].append(run)
    return dict(sorted(rows.items()))


def _tuning(run: Run) -> dict[str, Any]:
    sections = run.config.model_dump(mode="json")
    keys = [key.partition(".")[::2] for key in TUNING]
    return {f"{section}.{key}": sections[section][key] for section, key in keys}


def _study(
    label: str,
    runs_by_row: Mapping[RowKey, Sequence[Run]],
    goal: _Goal,
    energies: Mapping[Path, RunEnergy],
    num_groups: int,
) -> TargetStudy:
    rows = []
    for (size, _, incomplete, tuning), runs in runs_by_row.items():
        reaches = tuple(reach_of(run, goal.loss, energies.get(run.dir.path)) for run in runs)
        rows.append(TargetRow(size, incomplete, json.loads(tuning), reaches))
    index = next((index for index, row in enumerate(rows) if row.reached and not row.incomplete), None)
    if index is not None:
        rows = [_with_speedup(row, rows[index]) for row in rows]
    set_by = next((row for row in rows if goal.set_by in row.runs), None)
    reference = None if index is None else rows[index]
    return TargetStudy(label, goal.loss, set_by, tuple(rows), reference, num_groups)


def reach_of(run: Run, target: float, energy: RunEnergy | None) -> Reach:
    """When a run first had a smoothed loss at or below the target."""
    first = next((each.get("first_step") for each in attempts(run.meta)), 0)
    if first:
        return Reach(run, f"it resumes at step {first} from another run, so the steps before are not in it")
    steps, losses = smoothed(run)
    if not len(losses):
        return Reach(run, "no loss was logged")
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return Reach(run, NOT_REACHED)
    step = int(steps[below[0]])
    timeline = energy.timeline if energy else timeline_of(run)
    row = timeline.of_first(step)
    if row is None:
        return Reach(run, f"step {step}, which reached it, has no recorded time")
    if not run.summary.num_steps:
        return Reach(run, "its ranks recorded no step in common")
    num_samples = (step + 1) * run.summary.num_samples / run.summary.num_steps
    # Before schema 3 the key was num_train_samples.
    epoch_samples = positive_number(run.meta.get("num_samples", run.meta.get("num_train_samples")))
    return Reach(
        run,
        num_steps=step + 1,
        num_samples=num_samples,
        epochs=num_samples / epoch_samples if epoch_samples else None,
        seconds=float(timeline.end_s[row]),
        joules=energy.until(row) if energy else EnergyAmount(lacking=("no meter",)),
        at_once=bool(below[0] == 0),
    )


def _with_speedup(row: TargetRow, reference: TargetRow) -> TargetRow:
    """The row with its speedups: T_ref / T, and the ratio of samples per second.

    statistical: steps_ref x batch_ref / (steps x batch), how efficiently samples are used (statistical efficiency, Qiao
    et al., "Pollux", OSDI 2021, there from the gradient's noise; here counted). The speedup by time to target is about
    the product of it and of the speedup by samples per second; warm-up and pauses are the rest.
    """
    if reference.num_samples is None or reference.seconds is None:
        return row
    rate, reference_rate = row.samples_per_s, reference.samples_per_s
    return replace(
        row,
        relative_speed=None if row is reference or not row.reached else ratio(_seconds(reference), _seconds(row)),
        throughput=rate / reference_rate if rate and reference_rate else None,
        statistical=reference.num_samples / row.num_samples if row.num_samples else None,
        reference_size=reference.size,
        is_reference=row is reference,
    )


def _seconds(row: TargetRow) -> list[Estimate]:
    """Of each run, all of which reached the target."""
    return [of_value(reach.seconds) for reach in row.reaches if reach.seconds]
