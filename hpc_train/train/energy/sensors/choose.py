"""Which meters of a node count: the best set whose domains do not overlap, so that no joule is counted twice."""

from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from hpc_train.train.energy.sensors.amdgpu import amdgpu_meters
from hpc_train.train.energy.sensors.cray import cray_meters
from hpc_train.train.energy.sensors.hwmon import amd_energy_meters, intel_gpu_meters, module_meters, node_power_meters
from hpc_train.train.energy.sensors.meter import Meter, Now
from hpc_train.train.energy.sensors.nvml import nvml_meters
from hpc_train.train.energy.sensors.rapl import rapl_meters


@dataclass(frozen=True)
class MeterChoice:
    """The meters of a node. has_processors: the cores that compute are among what they measure. faults: meters that are
    there and cannot be read, in words.
    """

    meters: list[Meter]
    has_processors: bool
    faults: list[str]


def choose_meters(root: Path = Path("/"), now: Now = monotonic) -> MeterChoice:
    """The meters that this user can read now. `root` is where /sys lies, so that recorded trees can be read.

    What measures more of the node comes first: all of it (Cray, ACPI, service processor), then whole modules, then
    processors, their memory and GPUs, each by its own. Whoever contains another is taken alone. `now` is a clock in
    seconds that stands still while the machine sleeps.
    """
    faults: list[str] = []
    for find in (cray_meters, node_power_meters):
        if node := find(root, now, faults):
            return MeterChoice(node, True, faults)
    processors, with_gpus = module_meters(root, now, faults)
    if with_gpus:
        return MeterChoice(processors, True, faults)
    gpus = nvml_meters(root, now, faults)
    amd, with_cores = amdgpu_meters(root, now, faults, first=_next(gpus))
    gpus += amd
    gpus += intel_gpu_meters(root, now, faults, first=_next(gpus))
    if not with_cores:
        processors = processors or rapl_meters(root, now, faults) or amd_energy_meters(root, now, faults)
    return MeterChoice(processors + gpus, bool(processors) or with_cores, faults)


def _next(gpus: list[Meter]) -> int:
    """The number after the last GPU's: some in between may have no meter."""
    return 1 + max((int(meter.domain.removeprefix("gpu-")) for meter in gpus), default=-1)


def estimate_meter(num_cores: int, watts_per_core: float) -> Meter:
    """An assumption, not a meter: the cores of this node's ranks draw `watts_per_core` for as long as the run lasts."""
    watts = num_cores * watts_per_core
    source = f"estimate: {watts_per_core:g} W x {num_cores} core{'s' * (num_cores != 1)} a node"
    return Meter("cores", source, "estimated", lambda: monotonic() * watts)
