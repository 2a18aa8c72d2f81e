"""NVIDIA GPUs from Volta on: nvmlDeviceGetTotalEnergyConsumption, mJ since the driver was loaded.

The counter, not the power: NVML's power readings cover a quarter of the time on recent GPUs.
"""

from functools import partial
from pathlib import Path
from typing import Any

from hpc_train.train.energy.sensors.meter import Meter, Now, counter_meter


def nvml_meters(root: Path, now: Now, faults: list[str]) -> list[Meter]:
    """Every GPU that NVML shows to this process: all of the node, or those that a job's cgroup lets it see."""
    if not (root / "dev/nvidiactl").exists():
        return []
    try:
        import pynvml
    except ImportError:
        faults.append("NVML: the Python package nvidia-ml-py is not installed")
        return []
    try:
        pynvml.nvmlInit()
        num_gpus = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        faults.append(f"NVML: {error}")
        return []
    meters = []
    for index in range(num_gpus):
        try:
            count = partial(_joules, pynvml, pynvml.nvmlDeviceGetHandleByIndex(index))
            meters.append(counter_meter(f"gpu-{index}", "NVML", count, now))
        except (OSError, pynvml.NVMLError) as error:  # older than Volta, or not ours to see
            faults.append(f"NVML GPU {index}: {error}")
    return meters


def _joules(pynvml: Any, handle: Any) -> float:
    try:
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except pynvml.NVMLError as error:
        raise OSError(f"NVML: {error}") from None
