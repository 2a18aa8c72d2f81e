"""What a comparison needs of one run, few enough numbers to be saved as a baseline."""

from math import isfinite
from typing import Annotated, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hpc_train.analysis.convergence.target import NO_PROGRESS
from hpc_train.analysis.runs.clocks import hosts_of
from hpc_train.analysis.runs.load import Run
from hpc_train.analysis.runs.meta_json import list_at, positive_number, text_at
from hpc_train.analysis.runs.repeats import Facts, recorded_facts
from hpc_train.core import config
from hpc_train.core.energy_records import Quality
from hpc_train.core.statistics import block_means
from hpc_train.core.timing_log import PHASES, read_timings

_LARGEST = 1e30  # a larger number is damage
Positive = Annotated[float, Field(gt=0, lt=_LARGEST)]
Amount = Annotated[float, Field(gt=-_LARGEST, lt=_LARGEST)]


class RunFigures(BaseModel):
    """One run. Times are means over steady steps; a phase that no rank entered is absent; None is unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    label: str
    started: str
    size: int = Field(gt=0, lt=10**15)
    global_batch: int = Field(gt=0, lt=10**15)
    step_s: Positive
    step_blocks_s: list[Positive] = Field(min_length=1)  # means of at most 50 blocks of consecutive steps
    phases_s: dict[str, list[Annotated[float, Field(ge=0, lt=_LARGEST)]]]  # by phase: of each rank that trains
    hosts: list[str | None] = Field(min_length=1)  # of each rank that trains
    joules_per_sample: Amount | None
    energy_quality: Quality
    loss: Amount | None  # the last training loss, where a lower one is better
    validation_measure: str = ""  # what validations go by; "" without them
    best_validation: Amount | None = None  # the best value of it
    peak_resident_bytes: Amount | None  # of the rank that took most
    peak_gpu_bytes: Amount | None
    start_up_s: Amount | None = None  # of the rank that took longest, until the first step
    settings: dict[str, str]  # what decides how long a step takes and what it computes, by dotted key
    facts: Facts  # software, hardware, and the rest of what repeats have in common

    @model_validator(mode="after")
    def _one_value_a_rank(self) -> Self:
        if wrong := [phase for phase, values in self.phases_s.items() if len(values) != len(self.hosts)]:
            raise ValueError(f"phases_s.{wrong[0]} and hosts are of unequal length")
        return self

    @property
    def samples_per_s(self) -> float:
        return self.global_batch / self.step_s

    @property
    def host_names(self) -> list[str]:
        """Each once, in the order of ranks; a host that was not recorded counts as one a rank."""
        return list(dict.fromkeys(host or f"the host of rank {rank}" for rank, host in enumerate(self.hosts)))

    def mean_phase_s(self, phase: str) -> float:
        """The mean over the ranks that train; 0 if none entered it."""
        return float(np.mean(self.phases_s.get(phase, [0.0])))


def figures_of(run: Run) -> RunFigures:
    """Reads every rank's timings. The run has steady steps. Raises `BadRecord` naming path:line."""
    num_workers = run.size - run.num_servers
    steady = [read_timings(run.dir.timings(rank)).steady.phases_ns for rank in range(num_workers)]
    phases_s = np.stack([rows.mean(axis=0) for rows in steady]) / 1e9
    summary = run.summary
    energy = summary.joules if summary.energy_quality != "missing" else None
    validated = run.validation
    loss = summary.loss if run.config.task.kind not in NO_PROGRESS else None
    return RunFigures(
        label=run.label,
        started=text_at(run.meta, "started") or "",
        size=run.size,
        global_batch=summary.global_batch,
        step_s=float(run.step_s.mean()),
        step_blocks_s=block_means(run.step_s).tolist(),
        phases_s={phase: phases_s[:, index].tolist() for index, phase in enumerate(PHASES) if phases_s[:, index].any()},
        hosts=hosts_of(run.meta, run.size)[:num_workers],
        joules_per_sample=energy / summary.num_samples if energy and summary.num_samples else None,
        energy_quality=summary.energy_quality,
        loss=loss if loss is not None and isfinite(loss) else None,
        validation_measure=validated.measure if validated else "",
        best_validation=validated.best[1] if validated and isfinite(validated.best[1]) else None,
        peak_resident_bytes=_largest(run, "peak_resident_bytes"),
        peak_gpu_bytes=_largest(run, "peak_gpu_bytes"),
        start_up_s=_largest(run, "start_up_s"),
        settings={key: str(value) for key, value in config.comparable(run.config).items()},
        facts=recorded_facts(run),
    )


def _largest(run: Run, key: str) -> float | None:
    known = [number for value in list_at(run.meta, key) if (number := positive_number(value)) is not None]
    return max(known, default=None)
