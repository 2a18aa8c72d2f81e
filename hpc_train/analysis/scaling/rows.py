"""One size of a job: its runs pooled, and its speed relative to another size's."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import numpy as np

from hpc_train.analysis.efficiency.pop import Efficiencies
from hpc_train.analysis.efficiency.stragglers import StragglerAnalysis
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import positive_number
from hpc_train.analysis.stats.estimate import Estimate, of_series, over_runs, ratio
from hpc_train.core.energy_records import Energy, total_energy
from hpc_train.core.records import FloatArray
from hpc_train.core.statistics import Interval
from hpc_train.core.timing_log import COMMUNICATION, PHASES


@dataclass(frozen=True, eq=False)
class Row:
    """All runs of one size: repeats of each other (`runs/repeats.py`), incomplete runs apart. None is unknown."""

    size: int
    runs: tuple[Run, ...]
    incomplete: bool
    # Seconds of a step: of each run the mean over its steady steps and over ranks, which add up to its time; of
    # several runs the geometric mean of these, since speedups are ratios of it.
    step: Estimate | None
    step_median_s: float | None  # a typical step: a description, nothing is computed from it
    # Of the time in steady steps of all ranks that train; sums to 1. Without phases that took no time: a recorded loop
    # did not mark them, or no weights had to be synchronised.
    phase_share: dict[str, float]
    phase_s: dict[str, float]  # mean per step and rank that trains, warm-up excluded
    servers_busy: float | None  # share of the servers' time outside of communication
    energy: Energy  # mean per run
    joules_per_sample: float | None  # whole run over all its samples, warm-up included
    relative_speed: Estimate | None = None  # samples/s relative to the group's baseline; None of the baseline, too
    baseline_size: int | None = None
    pop: Efficiencies = field(default_factory=Efficiencies)
    stragglers: tuple[StragglerAnalysis, ...] = ()  # one a run

    @property
    def is_baseline(self) -> bool:
        return self.baseline_size is not None and self.relative_speed is None

    @property
    def step_s(self) -> float | None:
        return None if self.step is None else self.step.value

    @property
    def step_interval_s(self) -> Interval | None:
        """95%."""
        return None if self.step is None else self.step.interval

    @property
    def samples_per_s(self) -> float | None:
        return self.global_batch / self.step_s if self.step_s else None

    @property
    def speedup(self) -> float | None:
        if self.is_baseline:
            return 1.0
        return None if self.relative_speed is None else self.relative_speed.value

    @property
    def speedup_interval(self) -> Interval | None:
        """95%; None of the baseline, too."""
        return None if self.relative_speed is None else self.relative_speed.interval

    @property
    def efficiency(self) -> float | None:
        """Speedup efficiency: speedup * baseline size / size."""
        if self.speedup is None or self.baseline_size is None:
            return None
        return self.speedup * self.baseline_size / self.size

    @property
    def efficiency_interval(self) -> Interval | None:
        """95%; None of the baseline, too."""
        if self.speedup_interval is None or self.baseline_size is None:
            return None
        low, high = self.speedup_interval
        return low * self.baseline_size / self.size, high * self.baseline_size / self.size

    @property
    def global_batch(self) -> int:
        return self.runs[0].summary.global_batch

    @property
    def loss(self) -> float | None:
        """The last training loss, mean over the runs that have one."""
        known = [run.summary.loss for run in self.runs if run.summary.loss is not None]
        return fmean(known) if known else None

    @property
    def test(self) -> dict[str, float]:
        """The test measures, means over the runs that have them."""
        values: dict[str, list[float]] = {}
        for run in self.runs:
            for name, value in run.summary.test.items():
                values.setdefault(name, []).append(value)
        return {name: fmean(known) for name, known in values.items()}

    @property
    def exposed_share(self) -> float | None:
        """The share of exposed communication in a step; None if it was not timed."""
        timed = [self.phase_share[phase] for phase in COMMUNICATION if phase in self.phase_share]
        return sum(timed) if timed else None

    @property
    def exposed_s(self) -> float:
        """Exposed communication, mean per step and rank that trains."""
        return sum(self.phase_s.get(phase, 0.0) for phase in COMMUNICATION)

    @property
    def num_servers(self) -> int:
        """How many of its ranks hold weights and do not train."""
        return self.runs[0].num_servers

    def stated(self, key: str) -> float | None:
        """A positive number of meta.json, if all runs state the same."""
        values = {positive_number(run.meta.get(key)) for run in self.runs}
        return values.pop() if len(values) == 1 else None


def pooled_row(runs: Sequence[Run]) -> Row:
    """The row of runs of one size, all complete or all incomplete, without a speedup."""
    summaries = [run.summary for run in runs]
    timed = _step_times(runs)
    phases_s = np.sum([run.phases_s for run in runs], axis=0)
    total_s = float(phases_s.sum())
    num_rank_steps = sum(len(run.step_s) * (run.size - run.num_servers) for run in runs)
    energy = total_energy(Energy(each.joules, each.energy_quality, each.energy_source) for each in summaries)
    joules, num_samples = energy.joules, sum(each.num_samples for each in summaries)
    return Row(
        size=runs[0].size,
        runs=tuple(runs),
        incomplete=runs[0].incomplete is not None,
        step=over_runs([of_series(each) for each in timed]) if timed else None,
        step_median_s=float(np.median(np.concatenate(timed))) if timed else None,
        phase_share={phase: float(spent) / total_s for phase, spent in zip(PHASES, phases_s, strict=True) if spent},
        phase_s=dict(zip(PHASES, (phases_s / num_rank_steps).tolist(), strict=True)) if total_s else {},
        servers_busy=_servers_busy(np.sum([run.servers_s for run in runs], axis=0)),
        energy=Energy(None if joules is None else joules / len(runs), energy.quality, energy.source),
        joules_per_sample=joules / num_samples if joules is not None and num_samples else None,
    )


def timed_phases(rows: Sequence[Row]) -> list[str]:
    """The phases to show: `sync` is shown only if some row spent time in it, since many strategies have none."""
    synced = any("sync" in row.phase_share for row in rows)
    return [phase for phase in PHASES if phase != "sync" or synced]


def _servers_busy(spent_s: FloatArray) -> float | None:
    """The share of the servers' time outside of communication. spent_s: (len(PHASES),)."""
    communication_s = sum(spent_s[PHASES.index(phase)] for phase in COMMUNICATION)
    return float(1 - communication_s / spent_s.sum()) if spent_s.any() else None


def with_speedup(row: Row, baseline: Row) -> Row:
    """The row with its speedup S and speedup efficiency E against the baseline of s ranks.

    Strong scaling (the same global batch): S = T_s / T_p and E = S * s / p (Eager, Zahorjan and Lazowska,
    "Speedup versus efficiency in parallel systems", IEEE Transactions on Computers 38(3), 1989, with s = 1).
    Weak scaling (the same batch per rank): the ratio of samples per second, the scaled speedup of Gustafson
    (Communications of the ACM 31(5), 1988); E is then T_s / T_p. Both are the ratio of throughputs, which is computed
    here. T is the mean step, as in `efficiency/pop.py`: E is POP's global efficiency over the baseline's own.
    """
    if row is baseline:
        return replace(row, baseline_size=row.size)
    return replace(row, relative_speed=relative_speed(row, baseline), baseline_size=baseline.size)


def _step_times(runs: Sequence[Run]) -> list[FloatArray]:
    """The steady steps of each run that has some and whose clock went on."""
    return [run.step_s for run in runs if run.step_s.any()]


def relative_speed(row: Row, to: Row) -> Estimate | None:
    """The ratio of samples per second."""
    if row.step is None or to.step is None:
        return None
    before, after = ([of_series(step_s) for step_s in _step_times(each.runs)] for each in (to, row))
    return ratio(before, after).times(row.global_batch / to.global_batch)
