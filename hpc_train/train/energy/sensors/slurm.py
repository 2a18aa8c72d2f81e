"""Slurm's count of a step on all its nodes together: ConsumedEnergyRaw, at centres with an energy plugin.

For nodes whose meters only root may read. Asking costs a process and messages to every node, so only the root asks,
twice a minute.
"""

import subprocess
from dataclasses import dataclass

from hpc_train.core.job_environment import JobEnvironment
from hpc_train.train.energy.sensors.meter import Meter

_TIMEOUT_S = 5.0  # short, because it is also asked at the end, when a job that was told to stop has only seconds
_PERIOD_S = 30.0
_NODE_PLUGINS = ("ipmi", "xcc", "pm_counters")  # plugins of AcctGatherEnergyType that measure the whole node
_PROCESSOR_PLUGINS = ("rapl",)  # packages and their memory


@dataclass(frozen=True)
class Step:
    """A running step whose energy Slurm gathers. whole_nodes: GPUs included; else packages and memory only."""

    name: str
    plugin: str
    whole_nodes: bool


def find_step(num_hosts: int, job: JobEnvironment) -> Step | None:
    """The step that started these ranks on all `num_hosts` hosts, if Slurm has an energy plugin for it.

    Under mpirun there is none: the ranks of the first node then belong to the batch script, the others to another step.
    """
    if job.job_id is None or job.step_id is None or job.step_num_nodes != num_hosts:
        return None
    try:
        plugins = plugins_in(_output_of("scontrol", "show", "config"))
    except OSError:
        return None
    for plugin in plugins:  # GPU plugins are skipped: the GPUs' own counters are as good
        if plugin in _NODE_PLUGINS + _PROCESSOR_PLUGINS:
            return Step(f"{job.job_id}.{job.step_id}", plugin, plugin in _NODE_PLUGINS)
    return None


def plugins_in(config: str) -> list[str]:
    """The energy plugins that `scontrol show config` names, [] for none."""
    for line in config.splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "AcctGatherEnergyType":
            return [each.strip().removeprefix("acct_gather_energy/") for each in value.split(",")]
    return []


def step_meter(step: Step) -> Meter:
    """The meter of a step."""
    counter = _StepCounter(step)
    return Meter(
        "nodes" if step.whole_nodes else "packages",
        f"Slurm ConsumedEnergyRaw ({step.plugin})",
        "measured",
        counter.read,
        period_s=_PERIOD_S,
        assumption=counter.assumption,
    )


class _StepCounter:
    """Joules of a step. Slurm's 0 means that it has measured nothing yet: missing rather than zero.

    Slurm counts from the step's start. If it has measured nothing when the loop begins, the joules before the loop are
    unknown and stay included: the result is then an estimate.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._first_j: float | None = None

    def read(self) -> float:
        columns = ("--noheader", "--parsable2", "--format=ConsumedEnergyRaw")
        joules = joules_in(_output_of("sstat", *columns, f"--jobs={self._step.name}"))
        if self._first_j is None:
            self._first_j = joules or 0.0
        elif not joules:
            raise OSError(f"Slurm has measured nothing for step {self._step.name}")
        return joules or 0.0

    def assumption(self) -> str:
        return "counted from the start of the step" if self._first_j == 0 else ""


def joules_in(answer: str) -> float | None:
    """The joules that sstat or sacct printed for a step; None for no number, and for 0."""
    words = answer.split()
    return float(words[0]) or None if words and words[0].isdecimal() else None


def _output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except subprocess.SubprocessError as error:
        raise OSError(f"{command[0]}: {error}") from None
    return done.stdout
