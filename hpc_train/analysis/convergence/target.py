"""How long until a loss is reached, and at what cost: larger batches are faster a sample, and take more samples."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import numpy as np

from hpc_train.analysis.energy.energy import RunEnergy
from hpc_train.analysis.energy.energy_amount import NONE, EnergyAmount
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import attempts, positive_number
from hpc_train.analysis.runs.step_timeline import timeline_of
from hpc_train.analysis.scaling.compare import Group, labels, mismatches
from hpc_train.analysis.stats.repeats import ratio_of_geometric_means_interval
from hpc_train.core.records import FloatArray, IntArray
from hpc_train.core.statistics import Interval

# Keys that change how fast the loss falls and not what it means: runs that differ in these alone have the same target.
TUNING = (
    *("seed", "train.global_batch", "train.batch_per_rank", "train.accumulate"),
    *("train.optimizer", "train.lr", "train.lr_reference_batch", "train.lr_warmup_steps", "train.schedule"),
    *("train.lr_milestones", "train.lr_decay", "train.momentum", "train.betas", "train.weight_decay"),
    "train.clip_norm",
)
_NO_PROGRESS = ("policy_gradient", "dqn")  # task.kind whose loss does not fall as the policy gets better
_LEAST_WINDOW, _MOST_WINDOW = 9, 1001
NOT_REACHED = "not reached"


@dataclass(frozen=True, eq=False)
class Reach:
    """One run's way to the target: until the end of the step that reached it, warm-up included. `why` it has none."""

    run: Run
    why: str = ""  # NOT_REACHED, or what is not known
    num_steps: int | None = None
    num_samples: float | None = None
    epochs: float | None = None
    seconds: float | None = None  # of the attempts' loops; the time between attempts is in none
    joules: EnergyAmount = NONE
    at_once: bool = False  # by the first loss that is judged


@dataclass(frozen=True, eq=False)
class TargetRow:
    """Runs of one size and one tuning. Figures are means over its runs where all of them reached the target."""

    size: int
    incomplete: bool
    tuning: dict[str, Any]  # the keys of TUNING but for the seed
    reaches: tuple[Reach, ...]
    speedup: float | None = None  # by time to target, relative to the study's reference
    speedup_interval: Interval | None = None  # 95%, by repeats
    throughput: float | None = None  # speedup by samples per second
    statistical: float | None = None  # samples that the reference took, over samples that this took
    reference_size: int = 1

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
        return self._mean([reach.num_steps for reach in self.reaches])

    @property
    def num_samples(self) -> float | None:
        return self._mean([reach.num_samples for reach in self.reaches])

    @property
    def epochs(self) -> float | None:
        return self._mean([reach.epochs for reach in self.reaches])

    @property
    def seconds(self) -> float | None:
        """The geometric mean, as suits what ratios are made of."""
        known = [reach.seconds for reach in self.reaches if reach.seconds]
        return geometric_mean(known) if len(known) == len(self.reaches) else None

    @property
    def joules(self) -> EnergyAmount | None:
        """The mean; None where the target was not reached."""
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
        """Global batch over the mean steady step of all runs."""
        steps = np.concatenate([reach.run.step_s for reach in self.reaches])
        return self.global_batch / float(steps.mean()) if len(steps) else None

    def _per_rank(self, speedup: float | None) -> float | None:
        return None if speedup is None else speedup * self.reference_size / self.size

    def _mean(self, values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return fmean(known) if len(known) == len(values) else None


@dataclass(frozen=True, eq=False)
class TargetStudy:
    """Groups of one job that may differ in TUNING, all judged by the same loss."""

    label: str
    target: float
    set_by: TargetRow | None  # whose best loss the target is; None where it was given
    rows: tuple[TargetRow, ...]  # by size, then by batch
    reference: TargetRow | None  # the first complete row that reached it
    notes: tuple[str, ...]

    def is_of(self, group: Group) -> bool:
        """Whether its runs are this group's, and no others."""
        return {run for row in self.rows for run in row.runs} == {run for row in group.rows for run in row.runs}

    @property
    def largest(self) -> TargetRow | None:
        """The largest complete row with a speedup; of one size the fastest."""
        known = [row for row in self.rows if row.speedup and not row.incomplete and row is not self.reference]
        return max(known, key=lambda row: (row.size, row.speedup or 0.0), default=None)


def window(num_values: int) -> int:
    """How many logged losses a median is taken over: 9, or 1/50 of them where that is more; at most a third, odd."""
    wanted = min(max(_LEAST_WINDOW, num_values // 50), _MOST_WINDOW, max(1, num_values // 3))
    return wanted if wanted % 2 else wanted - 1


def smoothed(run: Run) -> tuple[IntArray, FloatArray]:
    """(steps, losses): the running median of the logged losses at each step that has a whole window around it.

    Centred, so that it does not lag: fewer logged steps would be judged later than more. A loss that is no number
    counts as infinite.
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

    Without a target it is the worst of the runs' best smoothed losses, which every complete run has reached. There is
    none then for a single row, which nothing can be compared with, nor for tasks whose loss is no measure of progress.
    """
    by_task: dict[tuple[str, int], list[Group]] = defaultdict(list)
    for group in groups:
        fixed = {key: value for key, value in group.keys.items() if key not in TUNING}
        by_task[json.dumps(fixed, sort_keys=True), group.series].append(group)
    members = list(by_task.values())
    runs = [[run for group in some for row in group.rows for run in row.runs] for some in members]
    told = [{key: value for key, value in some[0].keys.items() if key not in TUNING} for some in members]
    found = [
        _study(label, some, energies, target, len(groups_of) > 1)
        for label, some, groups_of in zip(labels(runs, told), runs, members, strict=True)
    ]
    known = [study for study in found if study is not None]
    return sorted(known, key=lambda study: (study.largest is None, study.label))  # those that compare come first


def _study(
    label: str, runs: list[Run], energies: Mapping[Path, RunEnergy], given: float | None, several: bool
) -> TargetStudy | None:
    by_row: dict[tuple[int, int, bool, str], list[Run]] = defaultdict(list)
    for run in runs:
        tuned = json.dumps(_tuning(run), sort_keys=True)
        by_row[run.size, run.summary.global_batch, run.incomplete is not None, tuned].append(run)
    complete = [run for run in runs if run.incomplete is None]
    best = {run: float(smoothed(run)[1].min(initial=np.inf)) for run in complete}
    known = [run for run in best if isfinite(best[run])]
    if given is None and (len(by_row) < 2 or not known or runs[0].config.task.kind in _NO_PROGRESS):
        return None
    worst = None if given is not None else max(known, key=lambda run: best[run])
    target = given if worst is None else best[worst]
    assert target is not None
    rows = []
    for (size, _, incomplete, tuned), members in sorted(by_row.items(), key=lambda item: item[0]):
        reaches = tuple(reach_of(run, target, energies.get(run.dir.path)) for run in members)
        rows.append(TargetRow(size, incomplete, json.loads(tuned), reaches))
    reference = next((row for row in rows if row.reached and not row.incomplete), None)
    if reference is not None:
        place = rows.index(reference)
        rows = [_compared(row, reference) for row in rows]
        reference = rows[place]
    set_by = next((row for row in rows if worst in row.runs), None) if worst is not None else None
    return TargetStudy(label, target, set_by, tuple(rows), reference, tuple(mismatches(runs)) if several else ())


def _tuning(run: Run) -> dict[str, Any]:
    sections = run.config.model_dump(mode="json")
    keys = [key.partition(".")[::2] for key in TUNING if key != "seed"]
    return {f"{section}.{key}": sections[section][key] for section, key in keys}


def reach_of(run: Run, target: float, energy: RunEnergy | None) -> Reach:
    """When a run first had a smoothed loss at or below the target."""
    first = next((each.get("first_step") for each in attempts(run.meta)), 0)
    if first:
        return Reach(run, f"it goes on from step {first} of another run: how it came there is not in it")
    steps, losses = smoothed(run)
    if not len(losses):
        return Reach(run, "no loss was logged")
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return Reach(run, NOT_REACHED)
    step = int(steps[below[0]])
    course = energy.timeline if energy else timeline_of(run)
    row = course.of_first(step)
    if row is None:
        return Reach(run, f"step {step}, which reached it, has no time")
    if not run.summary.num_steps:
        return Reach(run, "its ranks recorded no step in common")
    num_samples = (step + 1) * run.summary.num_samples / run.summary.num_steps
    of_epoch = positive_number(
        run.meta.get("num_samples", run.meta.get("num_train_samples"))
    )  # the latter before schema 3
    return Reach(
        run,
        num_steps=step + 1,
        num_samples=num_samples,
        epochs=num_samples / of_epoch if of_epoch else None,
        seconds=float(course.end_s[row]),
        joules=energy.until(row) if energy else EnergyAmount(lacking=("no meter",)),
        at_once=bool(below[0] == 0),
    )


def _compared(row: TargetRow, reference: TargetRow) -> TargetRow:
    """The row with its speedups: T_ref / T, and the ratio of samples per second.

    statistical: steps_ref x batch_ref / (steps x batch), how well samples are used (statistical efficiency, Qiao et
    al., "Pollux", OSDI 2021, there from the gradient's noise; here counted). The speedup by time to target is about
    that by samples per second times it: what is left is warm-up and pauses.
    """
    if reference.num_samples is None or reference.seconds is None:
        return row
    rates = row.samples_per_s, reference.samples_per_s
    return replace(
        row,
        speedup=reference.seconds / row.seconds if row.seconds else None,
        speedup_interval=None if row is reference else _interval(row, reference),
        throughput=rates[0] / rates[1] if rates[0] and rates[1] else None,
        statistical=reference.num_samples / row.num_samples if row.num_samples else None,
        reference_size=reference.size,
    )


def _interval(row: TargetRow, reference: TargetRow) -> Interval | None:
    """95% of the ratio of times to target, from how repeats differ; None if a run did not reach it."""
    if not row.reached:
        return None
    ours, theirs = ([reach.seconds or 0.0 for reach in each.reaches] for each in (row, reference))
    return ratio_of_geometric_means_interval(theirs, ours)
