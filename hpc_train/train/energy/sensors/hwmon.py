"""Power and energy sensors of the kernel's hwmon drivers (hwmon/sysfs-interface.rst in the kernel's documentation).

ACPI power meters, the service processors of POWER and System x, and AMD's and Intel's own sensors. Energies are in uJ,
powers in uW.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_train.train.energy.sensors.meter import Meter, Now, SysFile, counter_meter, power_meter

HWMON = Path("sys/class/hwmon")
_ACPI = "power_meter"
_ENERGY = ("energy", ("_input",))
_POWER = ("power", ("_average", "_input"))  # an average covers the whole interval, an input one moment


@dataclass(frozen=True)
class Sensor:
    """One channel of a device. label: the driver's name for it."""

    path: Path
    label: str
    is_energy: bool

    def meter(self, domain: str, source: str, now: Now) -> Meter:
        """Raises OSError if it cannot be read."""
        make = counter_meter if self.is_energy else power_meter
        return make(domain, source, SysFile(self.path).millionths, now)


def devices(root: Path, *drivers: str) -> Iterator[Path]:
    """The folders with the attributes of these drivers' devices, in the kernel's order."""
    for folder in sorted((root / HWMON).glob("hwmon*"), key=lambda path: (len(path.name), path.name)):
        for place in (folder, folder / "device"):  # the ACPI driver's attributes are in the device's folder
            if _text(place / "name") in drivers:
                yield place
                break


def sensors(place: Path) -> list[Sensor]:
    """The channels of a device: its energies, then its powers."""
    found = []
    for kind, endings in (_ENERGY, _POWER):
        for channel in range(1, 200):
            paths = [place / f"{kind}{channel}{ending}" for ending in endings]
            path = next((path for path in paths if path.exists()), None)
            if path is None:
                break
            found.append(Sensor(path, _text(place / f"{kind}{channel}_label"), kind == "energy"))
    return found


def node_power_meters(root: Path, now: Now, unreadable: list[str]) -> list[Meter]:
    """The whole node, measured by its service processor: by ACPI, ibmpowernv ("System") or ibmaem."""
    acpi = [place for place in devices(root, _ACPI) if not _measured_part(place)]
    if len(acpi) > 1:
        unreadable.append(f"ACPI power meter: {len(acpi)} of them do not state what they measure, and may overlap")
        acpi = []
    powernv = [s for place in devices(root, "ibmpowernv") for s in sensors(place) if s.label == "System"]
    aem = [sensor for place in devices(root, "aem1") for sensor in sensors(place)]
    for name, found in (
        ("ACPI power meter", [sensor for place in acpi for sensor in sensors(place)]),
        ("ibmpowernv", powernv),
        ("ibmaem", aem),
    ):
        for sensor in found:
            try:
                return [sensor.meter("node", name, now)]
            except OSError as error:
                unreadable.append(f"{name}: {error}")
    return []


def module_meters(root: Path, now: Now, unreadable: list[str]) -> tuple[list[Meter], bool]:
    """(meters of NVIDIA's Grace, whether they contain the GPUs): Module contains Grace and its GPU, Grace contains CPU
    and SysIO (NVIDIA Grace Performance Tuning Guide, "Power Telemetry").
    """
    of_kind: dict[str, list[Meter]] = {"module": [], "grace": []}
    for place in devices(root, _ACPI):
        kind, _, socket = _measured_part(place).partition(" Power Socket ")
        for sensor in sensors(place)[:1] if kind.lower() in of_kind else []:
            try:
                meter = sensor.meter(f"{kind.lower()}-{socket}", f"ACPI power meter of the {kind}", now)
                of_kind[kind.lower()].append(meter)
            except OSError as error:
                unreadable.append(f"ACPI power meter of the {kind}: {error}")
    modules, graces = of_kind["module"], of_kind["grace"]
    return (modules, True) if modules and len(modules) >= len(graces) else (graces, False)


def amd_energy_meters(root: Path, now: Now, unreadable: list[str]) -> list[Meter]:
    """AMD's processor packages by the driver amd_energy, whose other channels are their cores."""
    meters = []
    for place in devices(root, "amd_energy"):
        for sensor in sensors(place):
            if sensor.label.startswith("Esocket"):
                try:
                    meters.append(sensor.meter(f"package-{sensor.label[7:]}", "hwmon amd_energy", now))
                except OSError as error:
                    unreadable.append(f"amd_energy: {error}")
    return meters


def intel_gpu_meters(root: Path, now: Now, unreadable: list[str], first: int = 0) -> list[Meter]:
    """Intel GPUs by the drivers i915 and xe: the card, which contains its package; named from gpu-`first` on."""
    meters = []
    for index, place in enumerate(devices(root, "i915", "xe"), first):
        energies = [sensor for sensor in sensors(place) if sensor.is_energy]
        if energies:  # a GPU inside a processor has none: the package's meter covers it
            try:
                meters.append(energies[0].meter(f"gpu-{index}", f"hwmon {_text(place / 'name')}", now))
            except OSError as error:
                unreadable.append(f"Intel GPU: {error}")
    return meters


def _measured_part(place: Path) -> str:
    """What the firmware says an ACPI power meter measures; "" if it gives only the vendor's name."""
    info = _text(place / "power1_oem_info")
    return info if " Power Socket " in info else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
