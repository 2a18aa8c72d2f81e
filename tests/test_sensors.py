"""Meters are read from recorded trees: a folder that looks like /sys."""

import time
from pathlib import Path

import pytest

from hpc_train.records import read_energy
from hpc_train.train.sensors import Meter, Sampler, estimate_meter, find_meters, rapl_meters

WRAP_UJ = 262_143_328_850  # of a real Xeon


def zone(root: Path, name: str, label: str, energy_uj: int) -> Path:
    folder = root / "sys/class/powercap" / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(label + "\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{WRAP_UJ}\n")
    return folder / "energy_uj"


def test_packages_and_memory_count_once(tmp_path: Path) -> None:
    for name, label in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "dram"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:1:0", "dram"),
        ("intel-rapl:2", "psys"),
    ):
        zone(tmp_path, name, label, 5)
    meters = rapl_meters(tmp_path)
    assert [meter.domain for meter in meters] == ["package-0", "dram-0", "package-1", "dram-1"]
    assert {meter.quality for meter in meters} == {"measured"}


def test_a_counter_that_starts_again_goes_on(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", WRAP_UJ - 2_000_000)
    (meter,) = rapl_meters(tmp_path)
    assert meter.read() == 0
    readings = []
    for energy_uj in (WRAP_UJ - 1_000_000, 500_000, 2_500_000):
        counter.write_text(str(energy_uj))
        readings.append(meter.read())
    assert readings == pytest.approx([1.0, 2.5, 4.5])


def test_a_machine_without_readable_meters_has_none(tmp_path: Path) -> None:
    assert find_meters(tmp_path) == []
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 5)
    counter.unlink()
    counter.mkdir()  # reading it fails, as it does for users other than root
    assert rapl_meters(tmp_path) == []


def test_an_estimate_is_watts_times_seconds_and_says_so() -> None:
    meter = estimate_meter(num_cores=4, watts_per_core=12.5)
    assert meter.quality == "estimated" and meter.source == "estimate: 12.5 W x 4 cores a node"
    began_s, before = time.monotonic(), meter.read()
    time.sleep(0.1)
    joules, seconds = meter.read() - before, time.monotonic() - began_s
    assert 0.1 * 50 <= joules <= seconds * 50


def test_samples_are_joules_since_the_beginning(tmp_path: Path) -> None:
    """A meter of 100 W from an arbitrary start; by hand: 100 W x the time between first and last reading."""
    meter = Meter("package-0", "RAPL", "measured", lambda: 1e6 + 100 * time.monotonic())
    path = tmp_path / "node.csv"
    began = time.monotonic()
    with Sampler([meter], path, hz=20):
        time.sleep(0.5)
    seconds = time.monotonic() - began
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    assert float(rows[0][2]) < 1 and 8 <= len(rows) <= 13
    energy = read_energy(path)
    assert energy.quality == "measured" and energy.joules == pytest.approx(100 * seconds, rel=0.05)


def test_a_meter_that_fails_makes_the_energy_missing(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 5)
    path = tmp_path / "node.csv"
    with Sampler(rapl_meters(tmp_path), path, hz=50):
        time.sleep(0.05)
        counter.unlink()
        time.sleep(0.05)
    assert read_energy(path).quality == "missing" and read_energy(path).joules is None
