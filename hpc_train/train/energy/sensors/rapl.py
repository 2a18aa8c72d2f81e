"""Intel and AMD processors: packages and their memory (kernel documentation, power/powercap/powercap.rst)."""

from pathlib import Path

from hpc_train.train.energy.sensors.meter import Meter, Now, SysFile, counter_meter

POWERCAP = Path("sys/class/powercap")


def rapl_meters(root: Path, now: Now, unreadable: list[str]) -> list[Meter]:
    """The counters of packages and their memory; adds those that cannot be read to `unreadable`.

    The zones "core" and "uncore" are parts of their package, and "psys" contains it: counting them, too, would count
    joules twice. Since Linux 5.10 only root may read the counters. They wrap around within minutes at full load.
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
            unreadable.append(f"RAPL: {error}")
    return meters


def _number(zone: Path) -> list[int]:
    """Sorts packages by number: a node may have more than ten."""
    return [int(part) for part in zone.name.split(":")[1:] if part.isdecimal()]
