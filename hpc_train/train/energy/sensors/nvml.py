"""NVIDIA GPUs from Volta on: nvmlDeviceGetTotalEnergyConsumption, mJ since the driver was loaded.

The counter is used instead of the power, because NVML's power readings cover only a quarter of the time on recent GPUs.
"""

from functools import partial
from pathlib import Path
from typing import Any

from hpc_train.train.energy.sensors.meter import Meter, Now, counter_meter


def nvml_meters(root: Path, now: Now, unreadable: list[str]) -> list[Meter]:
    """Every GPU that NVML shows to this process: all of the node's, or those that the job's cgroup allows."""
    if not (root / "dev/nvidiactl").exists():
        return []
    try:
        import pynvml
    except ImportError:
        unreadable.append("NVML: the Python package nvidia-ml-py is not installed")
        return []
    try:
        pynvml.nvmlInit()
        num_gpus = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        unreadable.append(f"NVML: {error}")
        return []
    meters = []
    for index in range(num_gpus):
        try:
            count = partial(_joules, pynvml, pynvml.nvmlDeviceGetHandleByIndex(index))
            meters.append(counter_meter(f"gpu-{index}", "NVML", count, now))
        except (OSError, pynvml.NVMLError) as error:  # older than Volta, or not permitted
            unreadable.append(f"NVML GPU {index}: {error}")
    return meters


def _joules(pynvml: Any, handle: Any) -> float:
    try:
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except pynvml.NVMLError as error:
        raise OSError(f"NVML: {error}") from None
