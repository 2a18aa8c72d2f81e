"""Chooses a node's meters: the most complete set whose domains do not overlap, so that no joule counts twice."""

from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from hpc_train.core.formatting import plural
from hpc_train.train.energy.sensors.amdgpu import amdgpu_meters
from hpc_train.train.energy.sensors.cray import cray_meters
from hpc_train.train.energy.sensors.hwmon import amd_energy_meters, intel_gpu_meters, module_meters, node_power_meters
from hpc_train.train.energy.sensors.meter import Meter, Now
from hpc_train.train.energy.sensors.nvml import nvml_meters
from hpc_train.train.energy.sensors.rapl import rapl_meters


@dataclass(frozen=True)
class MeterChoice:
    """The meters of a node.

    has_processors: they measure the cores that compute. unreadable: meters that exist and cannot be read, and why.
    """

    meters: list[Meter]
    has_processors: bool
    unreadable: list[str]


def choose_meters(root: Path = Path("/"), now: Now = monotonic) -> MeterChoice:
    """The meters that this user can read now. root: the folder of /sys, so that tests can use recorded trees.

    Meters of more of the node come first: the whole node (Cray, ACPI, service processor), then whole modules, then
    processors, their memory and GPUs one by one. A meter that contains another replaces it. now: a clock in seconds
    that stops while the machine is suspended.
    """
    unreadable: list[str] = []
    for find in (cray_meters, node_power_meters):
        if node := find(root, now, unreadable):
            return MeterChoice(node, True, unreadable)
    processors, with_gpus = module_meters(root, now, unreadable)
    if with_gpus:
        return MeterChoice(processors, True, unreadable)
    gpus = nvml_meters(root, now, unreadable)
    amd, with_cores = amdgpu_meters(root, now, unreadable, first=_next(gpus))
    gpus += amd
    gpus += intel_gpu_meters(root, now, unreadable, first=_next(gpus))
    if not with_cores:
        processors = processors or rapl_meters(root, now, unreadable) or amd_energy_meters(root, now, unreadable)
    return MeterChoice(processors + gpus, bool(processors) or with_cores, unreadable)


def _next(gpus: list[Meter]) -> int:
    """The number after that of the last GPU: some before it may have no meter."""
    return 1 + max((int(meter.domain.removeprefix("gpu-")) for meter in gpus), default=-1)


def estimate_meter(num_cores: int, watts_per_core: float) -> Meter:
    """An assumption instead of a meter: each core of this node's ranks draws `watts_per_core` during the run."""
    watts = num_cores * watts_per_core
    source = f"estimate: {watts_per_core:g} W x {plural(num_cores, 'core')} a node"
    return Meter("cores", source, "estimated", lambda: monotonic() * watts)
