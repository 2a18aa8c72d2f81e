"""Trees that look like /sys on machines with meters, played along a trace: recorded forms, numbers by formula."""

import math
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WRAP_J = 262_143.328850  # of a real Xeon
PERIOD_S = 60.0


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 5000.0

    def __call__(self) -> float:
        return self.now_s


def watts(t_s: float) -> float:
    """What the traces' devices draw."""
    return 200 + 100 * math.sin(2 * math.pi * t_s / PERIOD_S)


def joules(t_s: float) -> float:
    """By hand: the integral of `watts` from 0."""
    return 200 * t_s + 100 * PERIOD_S / (2 * math.pi) * (1 - math.cos(2 * math.pi * t_s / PERIOD_S))


def put(path: Path, text: object) -> Path:
    """Overwrites in place: some file systems wait for the disk when a file that was emptied is closed."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with path.open("r+") as file:
        file.write(f"{text}\n")
        file.truncate()
    return path


Play = Callable[[float], None]  # makes a tree what it is at a time


def rapl(root: Path, zone: str, label: str, first_j: float = 0.0) -> Play:
    folder = root / "sys/class/powercap" / zone
    put(folder / "name", label)
    put(folder / "max_energy_range_uj", round(WRAP_J * 1e6))
    play = lambda t_s: put(folder / "energy_uj", round((first_j + joules(t_s)) % WRAP_J * 1e6))  # noqa: E731
    play(0)
    return play


def cray(root: Path) -> Play:
    """As on an HPE Cray EX: a number, its unit and when it was taken, except for the counters of the counters."""
    folder = root / "sys/cray/pm_counters"
    for name, number in (("generation", 25), ("startup", 1699000000), ("version", 2), ("raw_scan_hz", 10)):
        put(folder / name, number)

    def play(t_s: float) -> None:
        for name in ("energy", "cpu_energy", "memory_energy", "accel0_energy"):
            put(folder / name, f"{7_000_000 + round(joules(t_s))} J {1700000000000000 + round(t_s * 1e6)} us")
        put(folder / "power", f"{round(watts(t_s))} W {1700000000000000 + round(t_s * 1e6)} us")
        put(folder / "freshness", 4_000_000 + round(t_s * 10))

    play(0)
    return play


def hwmon(root: Path, number: int, driver: str, channel: str, at_device: bool = False, **texts: str) -> Play:
    """A device of one channel: energy1_input in uJ, power1_average in uW."""
    folder = root / f"sys/class/hwmon/hwmon{number}" / ("device" if at_device else "")
    put(folder / "name", driver)
    for name, text in texts.items():
        put(folder / name, text)
    of_time = joules if channel.startswith("energy") else watts
    play = lambda t_s: put(folder / channel, round(of_time(t_s) * 1e6))  # noqa: E731
    play(0)
    return play


def amdgpu(
    root: Path, number: int, form: tuple[int, int], offset: int, share: float = 1.0, device: str = "0x740c"
) -> Play:
    """A GPU with the file gpu_metrics; `share` of the trace's joules is counted."""
    hwmon(root, number, "amdgpu", "power1_average")
    folder = root / f"sys/class/hwmon/hwmon{number}/device"
    put(folder / "device", device)

    def play(t_s: float) -> None:
        metrics = bytearray(struct.pack("<HBB", 120, *form).ljust(120, b"\xff"))
        struct.pack_into("<Q", metrics, offset, round((joules(t_s) * share + bool(share) * 9e6) * 2**16))
        put(folder / "gpu_metrics", "")
        with (folder / "gpu_metrics").open("r+b") as file:
            file.write(metrics)
        put(folder.parent / "power1_average", round(watts(t_s) * share * 1e6))

    play(0)
    return play


@contextmanager
def drawing(root: Path, watts: float) -> Iterator[None]:
    """A machine of two packages that draw so much each, in real time."""
    stop, began_s = threading.Event(), time.monotonic()
    zones = ("intel-rapl:0", "intel-rapl:1")
    for zone in zones:
        rapl(root, zone, f"package-{zone[-1]}")

    def draw() -> None:
        while not stop.wait(0.01):
            for zone in zones:
                put(root / "sys/class/powercap" / zone / "energy_uj", round((time.monotonic() - began_s) * watts * 1e6))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
