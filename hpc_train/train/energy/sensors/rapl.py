"""Intel and AMD processors: packages and their memory (kernel documentation, power/powercap/powercap.rst)."""

from pathlib import Path

from hpc_train.train.energy.sensors.meter import Meter, Now, SysFile, counter_meter

POWERCAP = Path("sys/class/powercap")


def rapl_meters(root: Path, now: Now, faults: list[str]) -> list[Meter]:
    """The packages' and their memory's counters; what cannot be read is told in `faults`.

    The zones "core" and "uncore" are parts of their package, and "psys" contains it: counter_meter them too would count
    joules twice. Since Linux 5.10 only root may read the counters. They go round within minutes under full load.
    """
    meters = []
    for zone in sorted((root / POWERCAP).glob("intel-rapl:*"), key=_number):
        try:
            name = (zone / "name").read_text().strip()
            if not name.startswith(("package", "dram")):
                continue
            domain = name if name.startswith("package") else f"{name}-{zone.name.split(':')[1]}"
            wrap_j = SysFile(zone / "max_energy_range_uj").millionths()
            meters.append(counter_meter(domain, "RAPL", SysFile(zone / "energy_uj").millionths, now, wrap_j))
        except OSError as error:
            faults.append(f"RAPL: {error}")
    return meters


def _number(zone: Path) -> list[int]:
    """In the order of packages, of which a node may have more than ten."""
    return [int(part) for part in zone.name.split(":")[1:] if part.isdecimal()]
