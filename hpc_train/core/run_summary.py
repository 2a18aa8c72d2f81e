"""summary.json: a run in one record, made by the ranks at the run's end and by the analysis of any run."""

import json
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

import numpy as np

from hpc_train.core.energy_records import NO_METER, Energy, Quality
from hpc_train.core.records import SCHEMA
from hpc_train.core.statistics import mean_interval
from hpc_train.core.timing_log import PHASES, StepTimes


@dataclass(frozen=True, kw_only=True)
class RunShape:
    """What ran."""

    name: str
    size: int  # ranks
    num_hosts: int
    global_batch: int
    num_attempts: int


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What came out of a run."""

    loss: float | None = None  # the last training loss
    test: dict[str, float] = field(default_factory=dict)  # means over the test samples: loss, accuracy ...
    complete: bool = False
    fault: str | None = None  # why a run that reached its last step did not succeed


@dataclass(frozen=True, kw_only=True)
class RunSummary(RunResult, RunShape):
    """A run in one record (`summary.json`). Times are in seconds; None is unknown."""

    num_steps: int
    num_warmup: int  # of every attempt
    num_repeated: int = 0
    num_samples: int
    step_s: float | None  # mean over steady steps of the mean duration over the ranks that train
    step_low_s: float | None  # 95% interval of that mean, within this run
    step_high_s: float | None
    samples_per_s: float | None  # global batch / step_s
    step_median_s: float | None = None  # a typical step; unlike the mean, it does not add up to the run's duration
    phase_share: dict[str, float] = field(default_factory=dict)  # of the time in steady steps of the ranks that train
    joules: float | None = None
    energy_quality: Quality = "missing"
    energy_source: str = NO_METER
    schema: int = SCHEMA

    @property
    def energy(self) -> Energy:
        return Energy(self.joules, self.energy_quality, self.energy_source)

    def to_json(self) -> str:
        """Numbers that are not finite become null: JSON has no NaN."""
        return json.dumps(_finite(asdict(self)), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value


def summarise(shape: RunShape, times: StepTimes, energy: Energy, result: RunResult) -> RunSummary:
    """A run's summary. times: the sum over the ranks that train, however it was gathered (MPI, or their files).

    The duration of a step is its mean over ranks, not the maximum: a rank's steps follow each other without a gap, so
    means add up to the time that passed, while maxima count it twice if ranks are slow in turn.
    """
    step_s = times.mean_step_s
    low, mean, high = mean_interval(step_s)
    total_ns = float(times.phases_ns.sum())
    spent_ns = zip(PHASES, times.phases_ns.tolist(), strict=True)
    return RunSummary(
        **vars(shape),
        **vars(result),
        num_steps=times.num_steps,
        num_warmup=times.num_warmup,
        num_repeated=times.num_repeated,
        num_samples=times.num_samples,
        step_s=mean,
        step_low_s=low,
        step_high_s=high,
        samples_per_s=shape.global_batch / mean if mean else None,
        step_median_s=float(np.median(step_s)) if len(step_s) else None,
        # A phase of 0 ns was never entered: a recorded loop did not mark it, say. Its share is unknown rather than 0.
        phase_share={phase: spent / total_ns for phase, spent in spent_ns if spent},
        joules=energy.joules,
        energy_quality=energy.quality,
        energy_source=energy.source,
    )
