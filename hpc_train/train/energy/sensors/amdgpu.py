"""AMD GPUs, read from the kernel as rocm-smi and amd-smi do.

The driver's file gpu_metrics counts energy in units of 2^-16 J (drivers/gpu/drm/amd/include/kgd_pp_interface.h in the
kernel's source). GPUs without that counter have their power in hwmon.
"""

import struct
from functools import partial
from pathlib import Path

from hpc_train.train.energy.sensors.hwmon import devices, sensors
from hpc_train.train.energy.sensors.meter import Meter, Now, SysFile, counter_meter

# Byte offset of energy_accumulator in `struct gpu_metrics_v<format>_<content>`, by (format, content).
_ENERGY_OFFSET = {(1, 1): 24, (1, 2): 24, (1, 3): 24, (1, 4): 24, (1, 6): 16, (1, 7): 24}
_JOULES = 2.0**-16
_NOT_MEASURED = 2**64 - 1  # all bits set
_WITH_CORES = {0x74A0}  # MI300A: its socket contains the processor's cores, too


def amdgpu_meters(root: Path, now: Now, unreadable: list[str], first: int = 0) -> tuple[list[Meter], bool]:
    """(GPUs from gpu-`first` on in the order of their PCI addresses, whether they contain the processor's cores).

    A GPU inside a desktop processor is skipped: it reads the whole package, which RAPL reads already. Of the two dies
    of an MI250X the first reads for both and the second reads 0: it is skipped, and so is its number.
    """
    meters, with_cores = [], False
    places = [
        (place if (place / "gpu_metrics").exists() else place / "device", place) for place in devices(root, "amdgpu")
    ]
    for index, (card, place) in enumerate(sorted(places, key=lambda both: both[0].resolve().name), first):
        try:
            form = _form(card)
            if form and form[0] > 1:
                continue
            count = (
                partial(_joules, SysFile(card / "gpu_metrics"), _ENERGY_OFFSET[form])
                if form in _ENERGY_OFFSET
                else None
            )
            if count and count() > 0:
                meters.append(counter_meter(f"gpu-{index}", "amdgpu energy", count, now))
            else:
                powers = [sensor for sensor in sensors(place) if not sensor.is_energy]
                meters += [sensor.meter(f"gpu-{index}", "amdgpu power", now) for sensor in powers[:1]]
            with_cores = with_cores or _device_id(card) in _WITH_CORES
        except OSError as error:
            unreadable.append(f"amdgpu {card.resolve().name}: {error}")
    return meters, with_cores


def _form(card: Path) -> tuple[int, int] | None:
    """(format, content) of gpu_metrics, None without it. Formats 2 and 3 belong to GPUs inside processors."""
    try:
        _, form, content = struct.unpack_from("<HBB", (card / "gpu_metrics").read_bytes())
    except (FileNotFoundError, struct.error):
        return None
    return form, content


def _joules(metrics: SysFile, offset: int) -> float:
    try:
        (count,) = struct.unpack_from("<Q", metrics.read(), offset)
    except struct.error:
        raise OSError("gpu_metrics is cut short") from None
    if count == _NOT_MEASURED:
        raise OSError("gpu_metrics has no energy")
    return count * _JOULES


def _device_id(card: Path) -> int:
    try:
        return int((card / "device").read_text(), 16)
    except (OSError, ValueError):
        return 0
