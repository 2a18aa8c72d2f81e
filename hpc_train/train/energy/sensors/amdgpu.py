"""AMD GPUs, read from the kernel as rocm-smi and amd-smi do: the file gpu_metrics of the driver amdgpu, which counts
energy in 2^-16 J (kernel source, drivers/gpu/drm/amd/include/kgd_pp_interface.h), or else hwmon's power.
"""

import struct
from functools import partial
from pathlib import Path

from hpc_train.train.energy.sensors.hwmon import devices, sensors
from hpc_train.train.energy.sensors.meter import Meter, Now, SysFile, counter_meter

# Where energy_accumulator lies in `struct gpu_metrics_v<format>_<content>`, by (format, content).
_ENERGY_AT = {(1, 1): 24, (1, 2): 24, (1, 3): 24, (1, 4): 24, (1, 6): 16, (1, 7): 24}
_JOULES = 2.0**-16
_WHOLE = 2**64 - 1  # all bits set: the driver's word for "not measured"
_WITH_CORES = {0x74A0}  # MI300A: its socket holds the processor's cores, too


def amdgpu_meters(root: Path, now: Now, faults: list[str], first: int = 0) -> tuple[list[Meter], bool]:
    """(GPUs from gpu-`first` on in the order of their PCI addresses, whether they contain the processor's cores).

    A GPU inside a desktop processor reads its whole package, which RAPL has already: it is left out. Of the two dies of
    an MI250X the first reads for both and the second reads 0: it is left out, and its number with it.
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
            count = partial(_joules, SysFile(card / "gpu_metrics"), _ENERGY_AT[form]) if form in _ENERGY_AT else None
            if count and count() > 0:
                meters.append(counter_meter(f"gpu-{index}", "amdgpu energy", count, now))
            else:
                powers = [sensor for sensor in sensors(place) if not sensor.is_energy]
                meters += [sensor.meter(f"gpu-{index}", "amdgpu power", now) for sensor in powers[:1]]
            with_cores = with_cores or _device_id(card) in _WITH_CORES
        except OSError as error:
            faults.append(f"amdgpu {card.resolve().name}: {error}")
    return meters, with_cores


def _form(card: Path) -> tuple[int, int] | None:
    """(format, content) of gpu_metrics, None without it: formats 2 and 3 are those of GPUs inside processors."""
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
    if count == _WHOLE:
        raise OSError("gpu_metrics has no energy")
    return count * _JOULES


def _device_id(card: Path) -> int:
    try:
        return int((card / "device").read_text(), 16)
    except (OSError, ValueError):
        return 0
