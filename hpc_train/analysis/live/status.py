"""The state of a run as its files tell it: how far it is, how fast, at what power, and whether it still works."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any, Literal

import numpy as np

from hpc_train.analysis.live.tails import last_losses, last_timings
from hpc_train.analysis.runs.clocks import hosts_of
from hpc_train.analysis.runs.meta_json import attempts, dict_at, list_at, positive_number, text_at
from hpc_train.core import config as configs
from hpc_train.core.energy_records import Energy, Trace, disjoint, energy_of_run, read_traces
from hpc_train.core.errors import UserError
from hpc_train.core.lock import Holder
from hpc_train.core.rundir import RunDir, is_complete
from hpc_train.core.settings import Config
from hpc_train.core.timing_log import COMMUNICATION, PHASES
from hpc_train.core.validation_log import read_validation

State = Literal["starting", "training", "silent", "complete", "stopped", "failed", "killed"]
_MOST_RANKS_READ = 64
_SILENT_S = 60.0  # a job renews its lock every few seconds
_MOST_ENERGY_BYTES = 32 << 20  # of readings, which are read whole at each look
_POWER_S = 30.0  # over which the power is averaged
_COMPUTE = ("data", "forward", "backward")  # what a rank does without waiting for others


@dataclass(frozen=True)
class SlowestRank:
    """The rank that takes longest to compute, over its last steps."""

    rank: int
    host: str
    above_mean: float  # its time to compute over the mean of all ranks, less 1


@dataclass(frozen=True)
class Pace:
    """How fast the last steps were."""

    step_s: float
    samples_per_s: float | None
    exposed_share: float  # of the step, in which ranks only communicate
    slowest: SlowestRank | None  # None for one rank


@dataclass(frozen=True)
class RunStatus:
    """One run. Times are in seconds; None: not known, or not yet."""

    path: Path
    name: str
    state: State
    why: str | None  # what ended or silences it, in words
    size: int
    num_hosts: int
    job: str | None  # the Slurm job's id
    num_attempts: int
    num_steps_done: int
    num_steps: int | None
    losses: list[tuple[int, float]]  # (step, loss), the last ones
    pace: Pace | None
    left_s: float | None
    power_w: float | None
    energy: Energy
    checkpoints: list[int]  # their steps
    validation: dict[str, float] | None  # the newest
    updated_s: float | None  # since the last record

    @property
    def is_over(self) -> bool:
        return self.state in ("complete", "stopped", "failed", "killed")


def read_status(run: RunDir) -> RunStatus:
    """Reads the ends of a run's files, and changes nothing. Raises UserError if meta.json cannot be read."""
    meta = _read_meta(run)
    settings = _settings(run)
    size = int(positive_number(meta.get("size")) or run.size or 1)
    tried = attempts(meta)
    state, why = _state(run, meta)
    ranks = _ranks_to_read(size)
    timings = {rank: columns for rank in ranks if len((columns := last_timings(run.timings(rank)))["step"])}
    if state == "training" and not timings:
        state = "starting"
    num_done = max((int(columns["step"][-1]) + 1 for columns in timings.values()), default=0)
    pace = _pace(timings, hosts_of(meta, size), positive_number(meta.get("global_batch")))
    num_steps = settings.train.steps if settings is not None else None
    if settings is not None and settings.train.epochs is not None:
        told = positive_number(meta.get("num_steps"))
        num_steps = None if told is None else int(told)
    still = state in ("training", "starting")
    energy, power_w = _energy(run, meta)
    validations = read_validation(run.validation)
    return RunStatus(
        path=run.path,
        name=text_at(meta, "name") or run.path.parent.name,
        state=state,
        why=why,
        size=size,
        num_hosts=len(list_at(meta, "hosts")),
        job=text_at(dict_at(meta, "slurm"), "SLURM_JOB_ID"),
        num_attempts=len(tried),
        num_steps_done=num_done,
        num_steps=num_steps,
        losses=last_losses(run.metrics),
        pace=pace,
        left_s=pace.step_s * max(0, num_steps - num_done) if still and pace and num_steps else None,
        power_w=power_w if still else None,
        energy=energy,
        checkpoints=_checkpoints(run),
        validation=validations[-1] if validations else None,
        updated_s=_age_s(run.timings(0)),
    )


def _read_meta(run: RunDir) -> dict[str, Any]:
    try:
        meta = json.loads(run.meta.read_text(errors="replace"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{run.meta} cannot be read: {error}", "Name a run directory of hpc-train.") from None
    return meta if isinstance(meta, dict) else {}


def _settings(run: RunDir) -> Config | None:
    try:
        return configs.load(run.config).config
    except UserError:  # of another version, or damaged: the number of steps is unknown
        return None


# --------------------------------------------------------------------------------------------------- whether it works


def _state(run: RunDir, meta: Mapping[str, Any]) -> tuple[State, str | None]:
    """(the state, what ended or silences the run)."""
    if is_complete(run):
        return "complete", None
    tried = attempts(dict(meta))
    outcome = text_at(tried[-1], "outcome") if tried else None
    if run.lock.exists():
        holder, age_s = _holder(run.lock), _age_s(run.lock)
        if holder is not None and holder.is_gone:
            return "killed", f"{holder} has ended without a word"
        if age_s is not None and age_s > _SILENT_S:
            who = holder or "its job"
            return "silent", f"no sign of {who} for {age_s:.0f} s: it has died, or its file system hangs"
        return "training", None
    if outcome is None:
        return ("killed", "it ended without a word") if tried else ("starting", None)
    if outcome.startswith("stopped"):
        return "stopped", outcome
    return "failed", _fault(run) or outcome


def _holder(lock: Path) -> Holder | None:
    try:
        return Holder.parse(lock.read_bytes())
    except OSError:
        return None


def _fault(run: RunDir) -> str | None:
    try:
        summary = json.loads(run.summary.read_text(errors="replace"))
    except (OSError, ValueError, RecursionError):
        return None
    return text_at(summary, "fault") if isinstance(summary, dict) else None


def _age_s(path: Path) -> float | None:
    """Since a file was last written, by this machine's clock."""
    try:
        return max(0.0, time() - path.stat().st_mtime)
    except OSError:
        return None


# --------------------------------------------------------------------------------------------------- how it does


def _ranks_to_read(size: int) -> list[int]:
    """All ranks, or some that are evenly spread over a large job."""
    spread = np.linspace(0, size - 1, min(size, _MOST_RANKS_READ))
    return sorted({int(rank) for rank in spread})


def _pace(timings: dict[int, dict[str, Any]], hosts: list[str | None], global_batch: float | None) -> Pace | None:
    """Over the last steps that are no warm-up, or over all that there are."""
    phases_s, compute_s = [], {}
    for rank, columns in timings.items():
        steady = columns["warmup"] == 0
        chosen = steady if steady.any() else np.ones(len(steady), bool)
        of_rank = {phase: float(columns[f"{phase}_ns"][chosen].mean()) / 1e9 for phase in PHASES}
        phases_s.append(of_rank)
        compute_s[rank] = sum(of_rank[phase] for phase in _COMPUTE)
    if not phases_s:
        return None
    mean_s = {phase: float(np.mean([of_rank[phase] for of_rank in phases_s])) for phase in PHASES}
    step_s = sum(mean_s.values())
    if not step_s > 0:
        return None
    return Pace(
        step_s=step_s,
        samples_per_s=global_batch / step_s if global_batch else None,
        exposed_share=sum(mean_s[phase] for phase in COMMUNICATION) / step_s,
        slowest=_slowest(compute_s, hosts),
    )


def _slowest(compute_s: dict[int, float], hosts: list[str | None]) -> SlowestRank | None:
    mean_s = sum(compute_s.values()) / len(compute_s)
    if len(compute_s) < 2 or not mean_s > 0:
        return None
    rank = max(compute_s, key=compute_s.__getitem__)
    return SlowestRank(rank, hosts[rank] or "an unknown host", compute_s[rank] / mean_s - 1)


def _energy(run: RunDir, meta: dict[str, Any]) -> tuple[Energy, float | None]:
    """(the run's energy so far, its power in watts over the last readings)."""
    paths = sorted(run.energy_dir.glob("*.csv"))
    if sum(path.stat().st_size for path in paths) > _MOST_ENERGY_BYTES:
        return Energy(source="too many readings to be read again and again; hpc-train report sums them up"), None
    by_host: dict[str, list[Trace]] = {}
    for path in paths:
        try:
            by_host[path.stem] = read_traces(path)
        except (UserError, OSError):  # damage: `report` names it
            continue
    hosts = [host for host in list_at(meta, "hosts") if isinstance(host, str)]
    is_shared = any(dict_at(dict_at(meta, "energy"), "shared").values())
    energy = energy_of_run(by_host, hosts, is_shared)
    return energy, _power_w([trace for traces in disjoint(by_host).values() for trace in traces])


def _power_w(traces: Sequence[Trace]) -> float | None:
    """The mean power over the last readings, of traces that contain no other's joules."""
    newest = max((trace.attempt for trace in traces), default=0)
    drawn_w = []
    for trace in traces:
        if trace.attempt != newest:
            continue
        recent = trace.time_s >= trace.end_s - _POWER_S
        time_s, joules = trace.time_s[recent], trace.joules[recent]
        if len(time_s) < 2 or not time_s[-1] > time_s[0]:
            return None
        drawn_w.append(float((joules[-1] - joules[0]) / (time_s[-1] - time_s[0])))
    return sum(drawn_w) if drawn_w else None


def _checkpoints(run: RunDir) -> list[int]:
    steps = (path.stem.partition("-")[2] for path in run.checkpoints_dir.glob("step-*"))
    return sorted({int(step) for step in steps if step.isdecimal()})
