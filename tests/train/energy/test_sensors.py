"""Meters are read from recorded trees, folders that look like /sys, and compared with integrals by hand."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_train.train.energy.sensors.choose import MeterChoice, choose_meters, estimate_meter
from hpc_train.train.energy.sensors.meter import Meter, SysFile
from hpc_train.train.energy.sensors.sampler import Sampler, idle_watts
from tests import sensor_trees as trees
from tests.sensor_trees import WRAP_J, Clock, joules, put
from tests.synthetic import energy_of

EPOCH_S = time.time() - time.perf_counter()


def domains(choice: MeterChoice) -> dict[str, str]:
    return {meter.domain: meter.source for meter in choice.meters}


def acpi(root: Path, number: int, says: str) -> trees.Play:
    return trees.hwmon(root, number, "power_meter", "power1_average", at_device=True, power1_oem_info=says)


INTERFACES: dict[str, tuple[Callable[[Path], trees.Play], str, str]] = {
    "RAPL package": (lambda root: trees.rapl(root, "intel-rapl:0", "package-0"), "package-0", "RAPL"),
    "RAPL, goes round": (lambda root: trees.rapl(root, "intel-rapl:0", "package-0", WRAP_J - 9e3), "package-0", "RAPL"),
    "RAPL memory": (lambda root: trees.rapl(root, "intel-rapl:11:0", "dram"), "dram-11", "RAPL"),
    "Cray": (trees.cray, "node", "Cray pm_counters"),
    "ACPI": (lambda root: acpi(root, 3, "Dell"), "node", "ACPI power meter"),
    "Grace": (lambda root: acpi(root, 3, "Grace Power Socket 1"), "grace-1", "ACPI power meter of the Grace"),
    "POWER": (
        lambda root: trees.hwmon(root, 0, "ibmpowernv", "energy1_input", energy1_label="System"),
        "node",
        "ibmpowernv",
    ),
    "System x": (lambda root: trees.hwmon(root, 0, "aem1", "energy1_input"), "node", "ibmaem"),
    "AMD processor": (
        lambda root: trees.hwmon(root, 0, "amd_energy", "energy1_input", energy1_label="Esocket0"),
        "package-0",
        "hwmon amd_energy",
    ),
    "MI250X": (lambda root: trees.amdgpu(root, 2, (1, 3), 24), "gpu-0", "amdgpu energy"),
    "MI300X": (lambda root: trees.amdgpu(root, 2, (1, 6), 16, device="0x74a1"), "gpu-0", "amdgpu energy"),
    "AMD GPU of a form to come": (lambda root: trees.amdgpu(root, 2, (1, 9), 24), "gpu-0", "amdgpu power"),
    "Intel GPU": (lambda root: trees.hwmon(root, 0, "xe", "energy1_input"), "gpu-0", "hwmon xe"),
}


@pytest.mark.parametrize("name", INTERFACES)
def test_joules_are_those_of_the_integral_by_hand(tmp_path: Path, name: str) -> None:
    """75 s at 1 Hz with jitter, of a power that goes up and down between 100 and 300 W."""
    make, domain, source = INTERFACES[name]
    play, clock = make(tmp_path), Clock()
    choice = choose_meters(tmp_path, clock)
    assert domains(choice) == {domain: source} and not choice.unreadable
    (meter,) = choice.meters
    began = meter.read()
    for step in range(1, 76):
        t_s = step + 0.3 * (step % 3 - 1)
        clock.now_s = 5000 + t_s
        play(t_s)
        assert meter.read() - began == pytest.approx(joules(t_s), rel=0.005, abs=1)
    assert not meter.assumption() and not meter.note() and meter.quality == "measured"


def test_what_contains_another_is_taken_alone(tmp_path: Path) -> None:
    root = tmp_path / "packages"
    for zone, label in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "dram"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:1:0", "dram"),
        ("intel-rapl:2", "psys"),
    ):
        trees.rapl(root, zone, label)
    trees.amdgpu(root, 4, (1, 3), 24)
    trees.amdgpu(root, 5, (1, 3), 24, share=0)  # the second die of the same MI250X
    trees.amdgpu(root, 6, (1, 3), 24)
    trees.amdgpu(root, 7, (2, 3), 24)  # a GPU inside a processor
    choice = choose_meters(root)
    names = ["package-0", "dram-0", "package-1", "dram-1", "gpu-0", "gpu-2"]
    assert list(domains(choice)) == names and choice.has_processors
    assert choice.unreadable == ["amdgpu device: amdgpu power reads 0 W"], "of the second die"

    acpi(root, 8, "CPU Power Socket 0")
    acpi(root, 9, "Grace Power Socket 0")
    acpi(root, 10, "SysIO Power Socket 0")
    assert list(domains(choose_meters(root))) == ["grace-0", "gpu-0", "gpu-2"]
    acpi(root, 11, "Module Power Socket 0")
    assert list(domains(choose_meters(root))) == ["module-0"], "with its GPU"
    acpi(root, 12, "Lenovo")
    assert domains(choose_meters(root)) == {"node": "ACPI power meter"}
    trees.cray(root)
    assert domains(choose_meters(root)) == {"node": "Cray pm_counters"}

    trees.rapl(tmp_path / "apu", "intel-rapl:0", "package-0")
    trees.amdgpu(tmp_path / "apu", 0, (1, 4), 24, device="0x74a0")
    assert (
        list(domains(choose_meters(tmp_path / "apu"))) == ["gpu-0"] and choose_meters(tmp_path / "apu").has_processors
    ), "MI300A"

    for number in (0, 1):
        acpi(tmp_path / "two", number, "Dell")
    choice = choose_meters(tmp_path / "two")
    assert choice.meters == [] and "may overlap" in choice.unreadable[0], "nobody says what they measure"


def test_a_machine_without_readable_meters_has_none(tmp_path: Path) -> None:
    choice = choose_meters(tmp_path)
    assert choice.meters == [] and not choice.has_processors and choice.unreadable == []
    trees.rapl(tmp_path, "intel-rapl:0", "package-0")
    counter = tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj"
    counter.unlink()
    counter.mkdir()  # reading it fails, as it does for users other than root
    choice = choose_meters(tmp_path)
    assert choice.meters == [] and "energy_uj" in choice.unreadable[0]
    trees.hwmon(tmp_path, 0, "power_meter", "power1_average")
    put(tmp_path / "sys/class/hwmon/hwmon0/power1_average", 0)
    choice = choose_meters(tmp_path)
    assert choice.meters == [] and "reads 0 W" in choice.unreadable[0], "0 W is a sensor that is not connected"


def rapl_meter(root: Path, clock: Clock) -> tuple[Meter, Callable[[float, float], float]]:
    """The meter of a counter, and what it reads when the counter is at some joules, seconds after the last time."""
    trees.rapl(root, "intel-rapl:0", "package-0")
    (meter,) = choose_meters(root, clock).meters
    meter.read()

    def after(passed_s: float, at_j: float) -> float:
        clock.now_s += passed_s
        put(root / "sys/class/powercap/intel-rapl:0/energy_uj", round(at_j * 1e6))
        return meter.read()

    return meter, after


def test_a_counter_that_starts_again_is_bridged_and_said_to_be(tmp_path: Path) -> None:
    """A driver loaded anew, a machine that slept: 10 s at 150 W, then the counter is back at 40 J a second later."""
    meter, after = rapl_meter(tmp_path, Clock())
    assert after(10, 1500) == pytest.approx(1500) and not meter.assumption()
    assert after(1, 40) == pytest.approx(1650), "and not the 260 kJ of a counter that went round"
    assert meter.assumption() == "the counter restarted: 1.0 s filled with the mean power"
    assert after(1, 190) == pytest.approx(1800)


def test_a_counter_that_went_round_unseen_is_doubted(tmp_path: Path) -> None:
    """At 1 kW it goes round every 262 s; it is not read for 600 s, in which it went round twice."""
    meter, after = rapl_meter(tmp_path, Clock())
    assert after(10, 10_000) == pytest.approx(10_000) and meter.max_period_s == pytest.approx(WRAP_J / 2000)
    assert after(100, 110_000) == pytest.approx(110_000) and not meter.assumption(), "not even at 2 kW"
    assert after(600, 710_000 % WRAP_J) == pytest.approx(710_000)
    assert meter.assumption().startswith("not read for 600 s")


def test_a_machine_that_sleeps_adds_nothing_to_a_power(tmp_path: Path) -> None:
    """The clock stands still in between; a sensor that fails for a time is bridged by a straight line and says so."""
    clock = Clock()
    trees.hwmon(tmp_path, 0, "power_meter", "power1_average")
    power = put(tmp_path / "sys/class/hwmon/hwmon0/power1_average", 100e6)
    (meter,) = choose_meters(tmp_path, clock).meters
    clock.now_s += 10
    assert meter.read() == pytest.approx(1000) and not meter.assumption()
    power.write_text("")
    clock.now_s += 10
    with pytest.raises(OSError):
        meter.read()
    put(power, 300e6)
    clock.now_s += 10
    assert meter.read() == pytest.approx(1000 + 20 * 200)
    assert meter.assumption() == "no power was read for 20.0 s: interpolated linearly"


def test_cray_counters_are_read_whole_and_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play, clock, folder = trees.cray(tmp_path), Clock(), tmp_path / "sys/cray/pm_counters"
    real, renewals = SysFile.number, iter([None, 10.0, 20.0])
    runs_wild = False

    def renewed_meanwhile(file: SysFile) -> float:
        number = real(file)
        if file._path.name == "energy" and (t_s := next(renewals, None)):
            play(t_s)  # between the reading of the energy and that of what belongs to it
        return time.monotonic_ns() if runs_wild and file._path.name == "freshness" else number

    monkeypatch.setattr(SysFile, "number", renewed_meanwhile)
    (meter,) = choose_meters(tmp_path, clock).meters
    clock.now_s += 20
    assert meter.read() == pytest.approx(joules(20), abs=1)
    put(folder / "generation", 26)
    clock.now_s += 9
    assert meter.read() == pytest.approx(joules(20), abs=1), "old, but not for long"
    assert meter.note() == "power cap changed 1 times" and not meter.assumption()
    clock.now_s += 9
    with pytest.raises(OSError, match="not updated for 18 s"):
        meter.read()

    play(38)
    assert meter.read() == pytest.approx(joules(38), abs=1)
    put(folder / "startup", 1700000099)  # the controller started again: more joules than before, but counted anew
    put(folder / "energy", "8000000 J 1700000000000000 us")
    put(folder / "freshness", 1)
    clock.now_s += 2
    assert meter.read() == pytest.approx(joules(38) * 40 / 38, abs=1) and "restarted" in meter.assumption()
    runs_wild = True
    with pytest.raises(OSError, match="updated during each"):
        meter.read()


@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no NVIDIA GPU here: NVML has no file to record")
def test_nvml_counts_what_its_power_says() -> None:
    gpus = [meter for meter in choose_meters().meters if meter.source == "NVML"]
    assert gpus
    began = gpus[0].read()
    time.sleep(2)
    assert 2 * 5 < gpus[0].read() - began < 2 * 2000


# --------------------------------------------------------------------------------------------- sampling


def test_an_estimate_is_watts_times_seconds_and_says_so() -> None:
    meter = estimate_meter(num_cores=4, watts_per_core=12.5)
    assert meter.quality == "estimated" and meter.source == "estimate: 12.5 W x 4 cores a node"
    began_s, before = time.monotonic(), meter.read()
    time.sleep(0.1)
    used, seconds = meter.read() - before, time.monotonic() - began_s
    assert 0.1 * 50 <= used <= seconds * 50


def rows(path: Path) -> list[list[str]]:
    return [line.split(",") for line in path.read_text().splitlines()[1:]]


def test_samples_are_joules_since_the_beginning(tmp_path: Path) -> None:
    """Meters of 100 W from an arbitrary start; by hand: 100 W x the time between first and last reading."""
    meter = Meter("package-0", "RAPL", "measured", lambda: 1e6 + 100 * time.monotonic())
    rare = Meter("nodes", "Slurm", "measured", lambda: 100 * time.monotonic(), period_s=0.3)
    words = Meter(
        "gpu-0", "x", "measured", time.monotonic, assumption=lambda: "in part", note=lambda: "power cap changed"
    )
    path = tmp_path / "node.csv"
    began = time.monotonic()
    with Sampler([meter, rare, words], path, hz=20, epoch_s=EPOCH_S):
        time.sleep(0.5)
    seconds = time.monotonic() - began
    written = rows(path)
    often = [row for row in written if row[1] == "package-0"]
    assert float(often[0][2]) == 0 and 8 <= len(often) <= 13
    assert 3 <= len([row for row in written if row[1] == "nodes"]) <= 4, "first, last and each 0.3 s"
    assert float(often[-1][2]) == pytest.approx(100 * seconds, rel=0.05)
    assert -0.001 <= time.time() - float(often[-1][0]) < 5, "written in milliseconds, rounded up or down"
    assert written[2][3:5] == ["estimated", "x (in part; power cap changed)"]
    assert energy_of(path).quality == "estimated"


def test_a_meter_that_disappears_makes_the_energy_missing(tmp_path: Path) -> None:
    trees.rapl(tmp_path, "intel-rapl:0", "package-0")
    counter = tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj"
    path = tmp_path / "node.csv"
    with Sampler(choose_meters(tmp_path).meters, path, hz=50, epoch_s=EPOCH_S):
        time.sleep(0.05)
        counter.write_text("")  # who has it open is told nothing more; the real /sys says ENODEV
        time.sleep(0.05)
    assert energy_of(path).quality == "missing" and energy_of(path).joules is None
    assert rows(path)[0][2:4] == ["0.000000", "measured"] and rows(path)[-1][2:4] == ["", "missing"]

    begun = [0]

    def read() -> float:
        if not begun[0]:
            raise OSError
        return 5e6

    late = Meter("gpu-0", "x", "measured", read)
    with Sampler([late], tmp_path / "late.csv", hz=50, epoch_s=EPOCH_S):
        begun[0] = 1
        time.sleep(0.05)
    assert {row[3] for row in rows(tmp_path / "late.csv")} == {"missing"}, "since when are its 5 MJ?"


def test_the_thread_takes_less_than_half_a_percent_of_a_core(tmp_path: Path) -> None:
    """Two processors with memory and eight GPUs, ten times a second."""
    for package in (0, 1):
        trees.rapl(tmp_path, f"intel-rapl:{package}", f"package-{package}")
        trees.rapl(tmp_path, f"intel-rapl:{package}:0", "dram")
    for number in range(8):
        trees.amdgpu(tmp_path, number, (1, 3), 24)
    meters = choose_meters(tmp_path).meters
    assert len(meters) == 12
    with Sampler(meters, tmp_path / "node.csv", hz=10, epoch_s=EPOCH_S):
        shares = []
        for _ in range(3):  # what other processes cost by emptying the caches is not the thread's
            began_s, used_s = time.monotonic(), time.process_time()
            time.sleep(0.7)
            shares.append((time.process_time() - used_s) / (time.monotonic() - began_s))
    assert len(rows(tmp_path / "node.csv")) >= 15 * 12
    print(f"12 meters, 10 times a second: {min(shares):.3%} of a core")
    assert min(shares) < 0.005


def test_rest_is_measured_where_a_meter_says_so(tmp_path: Path) -> None:
    def failing() -> float:
        raise OSError

    meters = [
        Meter("package-0", "RAPL", "measured", lambda: 100 * time.monotonic()),
        Meter("gpu-0", "NVML", "measured", lambda: 7.0),  # on, and draws nothing? it was not read
        Meter("gpu-1", "NVML", "measured", failing),
        Meter("nodes", "Slurm", "measured", time.monotonic, period_s=30),
        estimate_meter(1, 10),
    ]
    assert idle_watts(meters, 0.2) == {"package-0": pytest.approx(100, rel=0.01)}
