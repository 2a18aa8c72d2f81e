"""What Slurm counts for a step on all its nodes together: ConsumedEnergyRaw, where the centre has an energy plugin.

For nodes whose meters root alone may read. It costs a process and messages to every node, so it is asked twice a
minute, and by the root alone.
"""

import subprocess
from dataclasses import dataclass

from hpc_train.core.job_environment import JobEnvironment
from hpc_train.train.energy.sensors.meter import Meter

_ASK_S = 5.0  # no longer, since it is asked at the end too, when a job that was told to stop has seconds
_EVERY_S = 30.0
_OF_NODES = ("ipmi", "xcc", "pm_counters")  # plugins of AcctGatherEnergyType that measure all of a node
_OF_PROCESSORS = ("rapl",)  # its packages and their memory


@dataclass(frozen=True)
class Step:
    """A running step whose energy Slurm gathers. whole_nodes: GPUs and all; else packages and memory."""

    name: str
    plugin: str
    whole_nodes: bool


def find_step(num_hosts: int, job: JobEnvironment) -> Step | None:
    """The step that started these ranks on all `num_hosts` hosts, where Slurm has an energy plugin for it.

    Under mpirun there is none: the ranks of the first node then belong to the batch script, the others to another step.
    """
    if job.job_id is None or job.step_id is None or job.step_num_nodes != num_hosts:
        return None
    try:
        plugins = plugins_in(_ask("scontrol", "show", "config"))
    except OSError:
        return None
    for plugin in plugins:  # the one of GPUs is left out: their own counters are as good
        if plugin in _OF_NODES + _OF_PROCESSORS:
            return Step(f"{job.job_id}.{job.step_id}", plugin, plugin in _OF_NODES)
    return None


def plugins_in(config: str) -> list[str]:
    """The energy plugins that `scontrol show config` names, [] for none."""
    for line in config.splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "AcctGatherEnergyType":
            return [each.strip().removeprefix("acct_gather_energy/") for each in value.split(",")]
    return []


def step_meter(step: Step) -> Meter:
    """The meter of a step. Slurm's 0 means that it has measured nothing: missing, and not zero.

    It counts from the step's start. Where it has measured nothing yet when the loop begins, what it counted until the
    loop began is unknown and stays in: an estimate then.
    """
    began: list[float] = []

    def read() -> float:
        joules = joules_in(
            _ask("sstat", "--noheader", "--parsable2", "--format=ConsumedEnergyRaw", f"--jobs={step.name}")
        )
        if not began:
            began.append(joules or 0.0)
        elif not joules:
            raise OSError(f"Slurm has measured nothing for step {step.name}")
        return joules or 0.0

    def doubt() -> str:
        return "counted from the start of the step" if began and not began[0] else ""

    source = f"Slurm ConsumedEnergyRaw ({step.plugin})"
    return Meter("nodes" if step.whole_nodes else "packages", source, "measured", read, every_s=_EVERY_S, doubt=doubt)


def joules_in(answer: str) -> float | None:
    """The joules that sstat or sacct printed for a step; None for nothing, and for 0."""
    words = answer.split()
    return float(words[0]) or None if words and words[0].isdecimal() else None


def _ask(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_ASK_S, check=True)
    except subprocess.SubprocessError as error:
        raise OSError(f"{words[0]}: {error}") from None
    return done.stdout
